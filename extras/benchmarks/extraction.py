"""What an extraction costs: tiles a second from a folder to embeddings, ours and timm's.

    OMP_NUM_THREADS=2 python -m extras.benchmarks.extraction                     25 minutes or so
    python -m extras.benchmarks.extraction --device cuda --tiles 8192            on a GPU
    python -m extras.benchmarks.extraction toy --tiles 8 --rounds 1              shows that it runs

Students with random weights are exported; timm opens the folder and brings its own transform. Both
read the same 224 px JPEG tiles, drawn here and so in the page cache, in batches of 64, with as many
workers (8 beside a GPU, else none), and compute in fp32. Reading, transform and forward are timed
together, then the forward alone on a batch in memory, in turns; medians and quartiles are printed.
Embeddings that differ by more than 1e-5 on a CPU end it with exit code 1.

    pip install timm safetensors
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import evaluate
from data import batches, list_tiles, make_parser, path, positive, run_program
from evaluate import CentreTiles, embed, load_student
from extras.benchmarks.timing import (
    draw_folder,
    import_timm,
    interleaved,
    random_student,
    ratios,
    spread,
    timed,
)
from extras.export import export
from student import STUDENTS, InputError, Student
from teachers import choose_device

BATCH = 64
TOLERANCE = 1e-5


class TimmTiles(Dataset):
    """Tiles as timm's users read them: Pillow, then the model's own transform."""

    def __init__(self, root: Path, files: list[str], transform: Callable):
        self.root = root
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> Tensor:
        with Image.open(self.root / self.files[k]) as image:
            return self.transform(image.convert("RGB"))


def our_embeddings(student: Student, tiles: CentreTiles) -> Tensor:
    """What evaluate.py --embed computes -> (n, D)."""
    parts = []
    for batch in batches(tiles, range(len(tiles)), BATCH, evaluate.WORKERS):
        parts.append(embed(student, batch["image"]))
    return torch.cat(parts)


@torch.inference_mode()
def timm_embeddings(model: nn.Module, tiles: TimmTiles, device: torch.device) -> Tensor:
    """The same by timm's model -> (n, D)."""
    parts = []
    for images in DataLoader(tiles, BATCH, num_workers=evaluate.WORKERS):
        parts.append(model(images.to(device)).cpu())
    return torch.cat(parts)


@torch.inference_mode()
def forward(model: nn.Module, images: Tensor) -> None:
    model(images)


def print_rates(title: str, seconds: dict[str, list[float]], n: int) -> None:
    """A line: tiles/s of both, and their ratio."""
    ours = n / statistics.median(seconds["ours"])
    theirs = n / statistics.median(seconds["timm"])
    share = spread(ratios(seconds, "timm", "ours"))
    print(f"  {title}: ours {ours:.1f} tiles/s, timm {theirs:.1f}; timm / ours {share}", flush=True)


def measure(name: str, root: Path, work: Path, device: torch.device, rounds: int) -> bool:
    """One student -> whether both give the same embeddings."""
    timm = import_timm()
    random_student(name, work / f"{name}.pt")
    export(work / f"{name}.pt", work / name)

    student = load_student(work / name)[0].to(device)
    model = timm.create_model(f"local-dir:{work / name}", pretrained=True).eval().to(device)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    _, files = list_tiles([root])
    tiles = CentreTiles(root, student.img_size, files)
    timm_tiles = TimmTiles(root, files, transform)
    contenders = {
        "ours": functools.partial(our_embeddings, student, tiles),
        "timm": functools.partial(timm_embeddings, model, timm_tiles, device),
    }
    difference = (contenders["ours"]() - contenders["timm"]()).abs().max()  # and warms both up
    n = len(files)
    print(f"{name}, {n} tiles, largest difference {difference:.1e}")
    timings = {key: functools.partial(timed, embed_all) for key, embed_all in contenders.items()}
    print_rates("from files", interleaved(timings, rounds), n)
    images = torch.rand(min(n, BATCH), 3, student.img_size, student.img_size, device=device)
    timings = {
        "ours": functools.partial(timed, forward, student, images),
        "timm": functools.partial(timed, forward, model, images),
    }
    print_rates("forward", interleaved(timings, rounds), len(images))
    return device.type != "cpu" or bool(difference <= TOLERANCE)


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.extraction", __doc__)
    add = parser.add_argument
    add("students", nargs="*", metavar="STUDENT", help="(default: vit_s vit_b)")
    add("--tiles", type=positive, default=128, help="to draw (default: 128)")
    add("--rounds", type=positive, default=5, help="of each measurement (default: 5)")
    add("--device", type=path, help="cuda, mps or cpu (default: the best at hand)")
    args = parser.parse_args()
    for name in args.students:
        if name not in STUDENTS:
            raise InputError(f"STUDENT: there is no {name}; choose from {', '.join(STUDENTS)}")
    return args


def main() -> int:
    """The command line."""
    args = parse_args()
    device, _ = choose_device(args.device)
    where = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {device}, {where}, {evaluate.WORKERS} workers")
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        root = draw_folder(work / "tiles", args.tiles, 224)
        for name in args.students or ["vit_s", "vit_b"]:
            equal &= measure(name, root, work, device, args.rounds)
    return 0 if equal else 1


if __name__ == "__main__":
    run_program(main)
