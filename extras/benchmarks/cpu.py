"""Speed on CPU cores: the ViT beside timm's, what tiles cost, how time and memory grow, processes.

    OMP_NUM_THREADS=2 python -m extras.benchmarks.cpu               all parts; an hour or so
    OMP_NUM_THREADS=2 python -m extras.benchmarks.cpu vit loader    some of them
    python -m extras.benchmarks.cpu --tiny                          minutes; shows that it runs

vit      forward, and forward + backward + AdamW, against timm's ViT with the same weights
         (asked: timm / ours >= 0.97)
folder   a training step from a folder of JPEG tiles against the same step in memory
         (asked: a share >= 0.90)
loader   tiles/s of FolderTiles and of a tar shard, in one process, against bare Pillow on the files
         (asked: >= 0.90): decode, crop, tensor; and without the tensor, which no training can do
million  listing a million tiles in 1,000 folders, with the order of one epoch, in a process of its
         own: seconds and memory; simulated by files of no bytes, which take a few minutes to make
growth   seconds a step and peak memory of train.py's main process against the number of teachers,
         nested dims, tiles in a batch, workers
ddp      tiles/s of one and of two gloo processes of train.py with one thread each

Ratios are taken within rounds whose order alternates; median and quartiles are printed. Tiles are
drawn by the benchmark, and so lie in the page cache: no disk is measured. Offline teachers are
trained for two steps, which changes what they say and not how long it takes. What a cache of the
teachers' outputs on disk costs is not measured here yet.

    pip install timm                                    for `vit`

Linux alone, as memory is read from /proc.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import functional as TF

from data import FolderTiles, batches, list_tiles, make_parser, natural, positive, run_program
from extras.benchmarks.timing import (
    ROOT,
    choose_parts,
    draw_folder,
    folder_step,
    interleaved,
    log_rates,
    ratios,
    spread,
    timed,
    timm_twin,
    training_step,
)
from extras.shards import ShardTiles
from student import P14, REG4, STUDENTS, VisionTransformer
from teachers import OFFLINE, VIT_L, load_teacher
from train import DEFAULTS

VITS = {"S": STUDENTS["vit_s"], "B": STUDENTS["vit_b"], "L": P14 | VIT_L | REG4}
USUAL = {"pairs": 20, "rounds": 7, "tiles": 2000, "files": 1_000_000}
TINY = {"pairs": 2, "rounds": 2, "tiles": 120, "files": 10_000}
QUICK_TEACHERS = ["--teacher-steps", 2, "--stats-tiles", 64, "--device", "cpu"]


def run(command: list, **environment: str) -> str:
    """What a process prints. It is shown, and this one ends, where that one fails."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        sys.exit(f"{' '.join(words)}\n{result.stdout}{result.stderr}")
    return result.stdout


# ---- vit -----------------------------------------------------------------------------------------


def adamw_step(x: torch.Tensor, forward: Callable, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    forward(x).square().mean().backward()
    optimizer.step()


def compare_forward(ours, twin, x: torch.Tensor, pairs: int) -> str:
    """Seconds of a forward pass, the ratio, and the largest difference of the tokens."""
    contenders = {
        "ours": functools.partial(timed, ours, x),
        "timm": functools.partial(timed, twin.forward_features, x),
    }
    with torch.no_grad():
        error = (ours(x) - twin.forward_features(x)).abs().max()
        seconds = interleaved(contenders, pairs)
    median = statistics.median(seconds["ours"])
    share = spread(ratios(seconds, "timm", "ours"))
    return f"ours {median:.3f} s, timm / ours {share}; largest difference {error:.1e}"


def compare_step(ours, twin, x: torch.Tensor, pairs: int) -> str:
    """Seconds of forward, backward and AdamW, and the ratio."""
    contenders = {}
    forwards = {"ours": (ours, ours), "timm": (twin, twin.forward_features)}
    for name, (model, forward) in forwards.items():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-6, fused=True)
        contenders[name] = functools.partial(timed, adamw_step, x, forward, optimizer)
    interleaved(contenders, 1)  # makes the optimisers' states
    seconds = interleaved(contenders, pairs)
    median = statistics.median(seconds["ours"])
    return f"ours {median:.3f} s, timm / ours {spread(ratios(seconds, 'timm', 'ours'))}"


def vit(args: argparse.Namespace, work: Path) -> None:
    """Our ViT beside timm's."""
    print("our ViT and timm's, 224 px, patch 14, 4 registers, float32 (asked: timm / ours >= 0.97)")
    for name, arch in VITS.items():
        if args.tiny:
            arch = arch | {"depth": 1}
        batch = args.batch or (1 if name == "L" else 2)
        ours = VisionTransformer(**arch)
        twin = timm_twin(arch)
        twin.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        print(f"  {name}, batch {batch} forward: {compare_forward(ours, twin, x, args.pairs)}")
        print(f"  {name}, batch {batch} step:    {compare_step(ours, twin, x, args.pairs)}")


# ---- folder and loader ---------------------------------------------------------------------------


def folder(args: argparse.Namespace, work: Path) -> None:
    """A step whose tiles come from a folder beside the same step on tiles in memory."""
    print("a step on a batch in memory / the same from 256 px JPEG tiles (asked: >= 0.90)")
    root = draw_folder(work / "tiles", args.tiles, 256)
    teachers = {name: load_teacher(name, work / "weights", steps=2) for name in OFFLINE}
    settings = {"toy": (32, 10), "vit_s": (8, 4)}  # tiles in a batch, steps in a block
    if args.tiny:
        settings = {"toy": (4, 1)}
    for name, (batch_size, times) in settings.items():
        step = training_step(
            teachers, name, DEFAULTS[name]["dims"], torch.device("cpu"), torch.float32
        )
        tiles = FolderTiles(root, STUDENTS[name]["img_size"], 0)
        batch = next(batches(tiles, range(batch_size), batch_size))
        in_memory = functools.partial(timed, step, batch, times=times)
        for workers in args.workers:
            from_folder = functools.partial(folder_step, step, tiles, batch_size, workers, times)
            in_memory()
            seconds = interleaved({"memory": in_memory, "folder": from_folder}, args.rounds)
            median = statistics.median(seconds["memory"])
            share = spread(ratios(seconds, "memory", "folder"))
            print(f"  {name}, batch {batch_size}, {workers} workers: {median:.3f} s", end=" ")
            print(f"in memory, share {share}", flush=True)


def read_bare(paths: list[Path], rng: np.random.Generator, to_tensor: bool) -> None:
    """Pillow alone: decode and crop, and then perhaps a tensor."""
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("RGB")
            image.load()
        left, top = rng.integers(256 - 224 + 1, size=2).tolist()
        view = image.crop((left, top, left + 224, top + 224))
        if to_tensor:
            TF.pil_to_tensor(view)


def read_source(source: Dataset, n: int) -> None:
    for k in range(n):
        source[k]


def loader(args: argparse.Namespace, work: Path) -> None:
    """What our way of reading a tile adds to Pillow's."""
    print("tiles/s in one process, 224 px crops of 256 px JPEG tiles, of bare Pillow's (>= 0.90)")
    root = draw_folder(work / "tiles", args.tiles, 256)
    n = min(200, args.tiles)
    paths = [root / name for name in list_tiles(root)[1][:n]]
    with tarfile.open(work / "0.tar", "w") as shard:  # the same files
        shard.add(root, ".")
    rng = np.random.default_rng(0)
    contenders = {
        "bare Pillow": functools.partial(timed, read_bare, paths, rng, True),
        "and no tensor": functools.partial(timed, read_bare, paths, rng, False),
        "folder": functools.partial(timed, read_source, FolderTiles(root, 224, 0), n),
        "shard": functools.partial(timed, read_source, ShardTiles([work / "0.tar"], 224, 0), n),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker of a DataLoader
    interleaved(contenders, 1)
    seconds = interleaved(contenders, args.pairs)
    torch.set_num_threads(threads)
    for name, values in seconds.items():
        rate = n / statistics.median(values)
        share = spread(ratios(seconds, "bare Pillow", name))
        print(f"  {name}: {rate:.0f} tiles/s, of bare Pillow's {share}", flush=True)


# ---- million -------------------------------------------------------------------------------------

LIST = """
import sys
import time
import data
from extras.benchmarks.timing import memory

before = memory("VmHWM")
began = time.perf_counter()
tiles = data.FolderTiles(sys.argv[1], 224, 0)
listed = time.perf_counter() - began
data.epoch_order(0, 0, len(tiles))
both = time.perf_counter() - began
print(f"{len(tiles):,} tiles listed in {listed:.2f} s, with an order {both:.2f} s;", end=" ")
print(f"{1000 * (memory('VmHWM') - before):.0f} MB at the highest above the imports")
"""


def million(args: argparse.Namespace, work: Path) -> None:
    """What it costs to list very many tiles."""
    print(f"{args.files} tiles of no bytes in 1,000 folders, names of 41 characters")
    for number in range(1000):
        below = work / "files" / f"TCGA-AB-{number:04d}-01Z"
        below.mkdir(parents=True)
        for i in range(number, args.files, 1000):
            os.close(os.open(below / f"tile_{i:07d}_x1234.png", os.O_CREAT | os.O_WRONLY))
    print(f"  {run([sys.executable, '-c', LIST, work / 'files'])}", end="")


# ---- growth and ddp: train.py in processes of its own --------------------------------------------

TRAIN = """
import sys
import train
from extras.benchmarks.timing import memory

train.main(train.parse_args(sys.argv[1:]))
print(memory("VmHWM"))
"""
NESTED = {1: "48", 3: "4,16,48", 5: "2,4,8,16,48"}  # flags by the number of dims
BASE = {"teachers": 2, "dims": 5, "batch": 32, "workers": 0}
CHANGES = [
    {},
    {"teachers": 1},
    {"dims": 1},
    {"dims": 3},
    {"batch": 8},
    {"batch": 16},
    {"batch": 64},
    {"workers": 1},
    {"workers": 2},
]


def train_apart(out: Path, setting: dict[str, int], flags: list) -> float:
    """Run train.py with the toy -> GB of its main process at the peak."""
    command = [sys.executable, "-c", TRAIN, "--student", "toy", "--out", out]
    command += ["--teachers", ",".join(OFFLINE[: setting["teachers"]])]
    command += ["--dims", NESTED[setting["dims"]], "--batch-size", setting["batch"]]
    command += ["--workers", setting["workers"], *QUICK_TEACHERS, *flags]
    return float(run(command).split()[-1])


def growth(args: argparse.Namespace, work: Path) -> None:
    """One thing changes from the first line."""
    print("toy student from a folder, each run in a process of its own")
    root = draw_folder(work / "tiles", args.tiles, 256)
    every = 1 if args.tiny else 20
    base = BASE | {"batch": 8} if args.tiny else BASE
    changes = CHANGES[:2] if args.tiny else CHANGES
    flags = ["--data", root, "--weights-dir", work / "weights", "--steps", 1000]
    # Teachers are trained by a run of its own, so that their training is in no peak
    train_apart(work / "growth-first", base, [*flags, "--stop-at", 1])
    print("  teachers  dims  batch  workers   s/step   peak GB")
    for i, change in enumerate(changes):
        setting = base | change
        out = work / f"growth-{i}"
        more = ["--log-every", every, "--stop-at", 5 * every]
        peak = train_apart(out, setting, [*flags, *more])
        seconds = setting["batch"] / statistics.median(log_rates(out, 1))
        columns = "  ".join(f"{value:{len(key)}}" for key, value in setting.items())
        print(f"  {columns}   {seconds:6.3f}   {peak:7.2f}", flush=True)


def ddp(args: argparse.Namespace, work: Path) -> None:
    """Two processes beside one."""
    print("tiles/s of two gloo processes / of one, one thread each, global batch 32")
    root = draw_folder(work / "tiles", args.tiles, 256)
    every = 1 if args.tiny else 25
    flags = ["--weights-dir", work / "weights", *QUICK_TEACHERS, "--workers", 0]
    flags += ["--batch-size", 8 if args.tiny else 32]
    flags += ["--log-every", every, "--stop-at", 6 * every, "--steps", 6 * every + 1]
    kinds = {"demo, teachers' outputs kept": [], "folder, teachers in steps": ["--data", root]}
    for kind, (title, data_flags) in enumerate(kinds.items()):
        rates = {1: [], 2: []}
        for i, processes in enumerate([1, 2] if args.tiny else [1, 2, 2, 1, 1, 2]):
            out = work / f"ddp-{kind}-{i}"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}", ROOT / "train.py", "--out", out]
            run([*command, *flags, *data_flags], OMP_NUM_THREADS="1")
            rates[processes].append(statistics.median(log_rates(out, 1)))
        ratio = statistics.median(rates[2]) / statistics.median(rates[1])
        print(f"  {title}: ratio of medians {ratio:.2f}")
        for processes, values in rates.items():
            shown = ", ".join(f"{rate:.1f}" for rate in values)
            print(f"    tiles/s of {processes}: {shown}", flush=True)


# ---- the command line ----------------------------------------------------------------------------

PARTS = {
    "vit": vit,
    "folder": folder,
    "loader": loader,
    "million": million,
    "growth": growth,
    "ddp": ddp,
}


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.cpu", __doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--pairs", type=positive, help="of vit and loader (default: 20)")
    add("--rounds", type=positive, help="of folder (default: 7)")
    add("--batch", type=positive, help="of vit (default: 2; L: 1)")
    add("--workers", type=natural, nargs="*", default=[0, 1, 2], help="of folder (default: 0 1 2)")
    add("--tiles", type=positive, help="JPEG tiles to draw (default: 2000)")
    add("--files", type=positive, help="of million (default: 1000000)")
    add("--tiny", action="store_true", help="small and short; its numbers mean nothing")
    args = parser.parse_args()
    for key, value in (TINY if args.tiny else USUAL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


def main() -> None:
    """The command line."""
    args = parse_args()
    parts = choose_parts(args.parts, list(PARTS))
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, load {os.getloadavg()}")
    with tempfile.TemporaryDirectory() as work:
        for part in parts:
            print(f"\n{part}: ", end="", flush=True)
            PARTS[part](args, Path(work))


if __name__ == "__main__":
    run_program(main)
