"""Are the features that kaiko-eva computes from an exported student ours, and what does it make of
them?

    python -m extras.benchmarks.eva --eva EVA_VENV/bin/eva --eva-source EVA --tiles TILES
        [--run runs/NAME] [--dim 96]                            a quarter of an hour on a CPU

runs in this project's environment; kaiko-eva needs one of its own, EVA_VENV, made as eva.yaml says,
and a checkout EVA of github.com/kaiko-ai/eva at its version (the package has no configs).

TILES holds at least 400 images of at least four kinds, named KIND_NUMBER. They are laid out as
BACH, whose loader insists on 400 images in four classes, so the metrics are those of this task, not
of BACH. Before that they are shrunk to the student's size as evaluate.py does, for eva shrinks
bilinearly and we bicubically: only there do both see the same pixels. Then eva trains its linear
probe; what it finds on its validation tiles is printed beside ours, learned and asked on the same
tiles. Without --run the student is a ViT-S with random weights. Exit code 1: features differ by
more than 1e-5.
"""

import argparse
import csv
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from data import make_parser, path, positive, run_program
from evaluate import CentreTiles, check_dim, embed, figures_of, linear_probe, load_student
from extras.benchmarks.timing import random_student
from extras.export import export
from student import InputError, Student

HERE = Path(__file__).parent
CONFIG = "configs/vision/pathology/offline/classification/bach.yaml"
CLASSES = ("Benign", "InSitu", "Invasive", "Normal")  # BACH's folders
N_TILES = 400
TOLERANCE = 1e-5
HOUR = 3600


# ---- tiles ---------------------------------------------------------------------------------------


def choose_tiles(tiles: Path) -> list[tuple[str, Path]]:
    """400 tiles of four kinds in turn -> [(class of BACH, file), ...]."""
    kinds = {}
    for file in sorted(tiles.rglob("*.*")):
        if file.suffix in (".jpg", ".png", ".tif"):
            kinds.setdefault(file.stem.rpartition("_")[0], []).append(file)
    chosen = []
    most = max((len(files) for files in kinds.values()), default=0)
    for place in range(most):
        for name, kind in zip(CLASSES, sorted(kinds), strict=False):  # the first four
            if place < len(kinds[kind]):
                chosen.append((name, kinds[kind][place]))
    if len(kinds) < len(CLASSES) or len(chosen) < N_TILES:
        raise InputError(
            f"--tiles: {tiles} has not {N_TILES} images of four kinds, named KIND_NUMBER; give more"
        )
    return chosen[:N_TILES]


def lay_out(tiles: Path, size: int, root: Path) -> Path:
    """The tiles at size x size px as BACH has its own -> the folder of its classes."""
    photos = root / "ICIAR2018_BACH_Challenge" / "Photos"
    chosen = choose_tiles(tiles)
    reader = CentreTiles("", size, [str(file) for _, file in chosen])
    for i, (name, _) in enumerate(chosen):
        item = reader[i]
        if item["unreadable"]:
            raise InputError(f"--tiles: {item['unreadable'][0]}; replace it")
        (photos / name).mkdir(parents=True, exist_ok=True)
        to_pil_image(item["image"]).save(photos / name / f"{i:03d}.tif")
    return photos


# ---- eva -----------------------------------------------------------------------------------------


def run_eva(args: argparse.Namespace, folder: Path, dim: int, size: int, work: Path) -> Path:
    """One benchmark, as the documented command does it -> the folder of the embeddings.

    folder: the exported student, of `dim` numbers a tile of size x size px
    """
    name = folder.name
    knobs = {
        "STUDENT": folder,
        "IN_FEATURES": dim,
        "MODEL_NAME": name,
        "DATA_ROOT": work / "bach",
        "RESIZE_DIM": size,
        "EMBEDDINGS_ROOT": work / "embeddings",
        "OUTPUT_ROOT": work / "logs" / name,
        "N_RUNS": 1,
        "MAX_STEPS": args.steps,
        "N_DATA_WORKERS": 1,
        "TQDM_REFRESH_RATE": 0,
        "ACCELERATOR": "cpu",
    }
    environment = os.environ | {key: str(value) for key, value in knobs.items()}
    command = [args.eva, "predict_fit", "--config", str(Path(args.eva_source, CONFIG))]
    command += ["--trainer.callbacks.backbone", (HERE / "eva.yaml").read_text()]
    try:
        done = subprocess.run(
            command, check=False, env=environment, capture_output=True, text=True, timeout=HOUR
        )
    except subprocess.TimeoutExpired:  # it waits for its writer for ever where its main one failed
        raise InputError(f"--eva: {args.eva} is not done after an hour; try it by hand") from None
    if done.returncode:
        print(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        raise InputError(f"--eva: {args.eva} ended with exit code {done.returncode}; see above")
    return work / "embeddings" / name / "bach"


def compare(written: Path, photos: Path, student: Student, dim: int) -> bool:
    """Print how far eva's embeddings are from ours, and our probe -> whether they are equal."""
    with open(written / "manifest.csv", newline="") as manifest:
        rows = list(csv.DictReader(manifest))
    theirs = []
    pixels = []
    for row in rows:
        theirs.append(torch.load(written / row["embeddings"], weights_only=True)[0])
        pixels.append(np.asarray(Image.open(photos / row["origin"])))
    theirs = torch.stack(theirs)  # (400, D)
    ours = embed(student, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))[:, :dim]
    if theirs.shape != ours.shape:
        print(f"  {tuple(theirs.shape)} embeddings, of ours {tuple(ours.shape)}")
        return False
    difference = (theirs - ours).abs().max().item()
    varies = ours.std(0).mean()
    print(f"  {len(rows)} tiles, largest difference {difference:.1e};")
    print(f"  a channel varies over tiles by {varies:.2f}")
    print_probe(rows, ours)
    return len(rows) == N_TILES and difference <= TOLERANCE


def print_probe(rows: list[dict], features: torch.Tensor) -> None:
    """What our linear probe finds on the tiles that eva validates on. rows: of its manifest."""
    y = torch.tensor([int(row["target"]) for row in rows])
    learn = torch.tensor([row["split"] == "train" for row in rows])
    answers = linear_probe(features[learn], y[learn], features[~learn], y[~learn])
    print(f"  linear probes, {learn.sum()} tiles to learn from, {(~learn).sum()} to ask; ours:")
    for name, value in figures_of(answers).items():
        print(f"    {name} {value:.4f}")


def print_metrics(logs: Path) -> None:
    """What eva's own linear probe found."""
    print("  eva's:")
    [results] = logs.rglob("results.json")
    for name, value in json.loads(results.read_text())["metrics"]["val"][0].items():
        print(f"    {name} {value['mean']:.4f}")


# ---- the command line ----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.eva", __doc__)
    add = parser.add_argument
    add("--eva", type=path, required=True, help="the eva program of its environment")
    add("--eva-source", type=path, required=True, help="a checkout of eva, for its configs")
    add("--tiles", type=path, required=True, help="400 images, named KIND_NUMBER")
    add("--run", type=path, help="a run folder or student.pt (default: a random vit_s)")
    add("--dim", type=positive, default=96, help="the smaller dim (default: 96)")
    add("--steps", type=positive, default=200, help="of eva's linear probe (default: 200)")
    args = parser.parse_args()
    if not Path(args.eva).exists():
        raise InputError(
            f"--eva: {args.eva} does not exist; in an environment of its own: "
            "pip install 'kaiko-eva[vision]' 'jsonargparse<4.51' 'timm>=1.0.16' openslide-bin"
        )
    if not Path(args.eva_source, CONFIG).exists():
        raise InputError(f"--eva-source: {args.eva_source} has no {CONFIG}; give a checkout of eva")
    return args


def main() -> int:
    """The command line."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if not args.run:
            args.run = work / "random.pt"
            random_student("vit_s", args.run)
        student, _ = load_student(args.run)
        check_dim(args.dim, student, args.run, "--dim")
        photos = lay_out(Path(args.tiles), student.img_size, work / "bach")
        equal = True
        for dim in (student.width, args.dim):
            name = f"dim-{dim}"
            export(args.run, work / name, dim)
            began = time.monotonic()
            written = run_eva(args, work / name, dim, student.img_size, work)
            print(f"dim {dim}: {time.monotonic() - began:.0f} s", flush=True)
            equal &= compare(written, photos, student, dim)
            print_metrics(work / "logs" / name)
    return 0 if equal else 1


if __name__ == "__main__":
    run_program(main)
