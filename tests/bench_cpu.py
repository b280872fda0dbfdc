"""Speed on two CPU cores: the ViT beside timm's, what tiles and a cache cost, how time and memory grow, two processes.

    OMP_NUM_THREADS=2 python tests/bench_cpu.py              # all of them; an hour or so
    OMP_NUM_THREADS=2 python tests/bench_cpu.py vit loader   # some of them
    python tests/bench_cpu.py --tiny                         # minutes: only shows that everything runs

vit     forward, and forward + backward + AdamW, against timm's ViT with the same weights (asked: timm / ours >= 0.97)
folder  a training step from a folder of JPEG tiles against the same step in memory (asked: a share >= 0.90)
loader  tiles/s of data.FolderTiles in one process, from files and from a tar shard, against bare Pillow on the files
        (asked: >= 0.90): decode, crop, tensor; and decode and crop alone, which a training cannot do with
million opening a million tiles, 1,000 folders of files or 100 shards, the first and the second time (asked: the second
        in <= 5 s and <= 200 MB a process); needs 2 GB of disk
cache   tiles/s of an epoch from --cache against the same run with 64 tiles' outputs in memory for all (asked: a cost of
        <= 1.15 x); real train.py
growth  seconds per step and peak memory of the main process against the number of teachers, nested dims, tiles in a
        batch, workers; real train.py
ddp     tiles/s of one and of two gloo processes with one thread each; real train.py

Ratios are taken within pairs that alternate in one process, each pair in the other order than the one before; median
and quartiles are printed. JPEG tiles are drawn by the benchmark, and so lie in the page cache: no disk is measured.
Offline teachers are trained for two steps, which changes what they say and not how long it takes. Needs timm; Linux.
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
from conftest import ROOT
from PIL import Image
from test_student import timm_twin
from timing import (
    draw_folder,
    folder_step,
    interleaved,
    log_rates,
    ratios,
    spread,
    timed,
    training_step,
)
from torchvision.transforms import functional as TF

import data
from student import P14, REG4, STUDENTS, VisionTransformer
from teachers import OFFLINE, VIT_L, load_teacher
from train import DEFAULTS

VITS = {"S": STUDENTS["vit_s"], "B": STUDENTS["vit_b"], "L": P14 | VIT_L | REG4}
TRAIN = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import train
train.train(train.parse_args(sys.argv[1:]))
from bench_evaluate import memory
print(memory("VmHWM"))
"""


def run(command: list, **environment: str) -> str:
    """The output of a process; what it wrote to stderr is shown only if it failed."""
    environment = os.environ | environment
    result = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, env=environment
    )
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def adamw_step(x: torch.Tensor, forward: Callable, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    forward(x).square().mean().backward()
    optimizer.step()


def vit(args: argparse.Namespace, work: Path) -> None:
    print("our ViT and timm's, 224 px, patch 14, 4 registers, float32 (asked: timm / ours >= 0.97)")
    for name, arch in VITS.items():
        arch = arch | {"depth": 2 if args.tiny else arch["depth"]}
        batch = args.batch or (1 if name == "L" else 2)
        ours, twin = VisionTransformer(**arch), timm_twin(arch)
        twin.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        forwards = {"ours": ours, "timm": twin.forward_features}
        with torch.no_grad():
            error = (ours(x) - twin.forward_features(x)).abs().max().item()
            seconds = interleaved(
                {key: functools.partial(timed, f, x) for key, f in forwards.items()}, args.pairs
            )
        size = f"{name}, batch {batch}"
        print(f"  {size} forward: ours {statistics.median(seconds['ours']):.3f} s,", end=" ")
        print(
            f"timm / ours {spread(ratios(seconds, 'timm', 'ours'))}; largest difference {error:.1e}",
            flush=True,
        )

        steps = {}
        for key, model in (("ours", ours.train()), ("timm", twin.train())):
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
            steps[key] = functools.partial(timed, adamw_step, x, forwards[key], optimizer)
            steps[key]()  # makes the optimiser's state
        seconds = interleaved(steps, args.pairs)
        print(f"  {size} step:    ours {statistics.median(seconds['ours']):.3f} s,", end=" ")
        print(f"timm / ours {spread(ratios(seconds, 'timm', 'ours'))}", flush=True)


def folder(args: argparse.Namespace, work: Path) -> None:
    print("a step on a batch in memory / the same from 256 px JPEG tiles (asked: >= 0.90)")
    root = draw_folder(work / "tiles", args.tiles, 256)
    teachers = {name: load_teacher(name, work / "weights", steps=2) for name in OFFLINE}
    for name, batch_size, times in (
        ("toy", 4 if args.tiny else 32, 10),
        ("vit_s", 2 if args.tiny else 8, 4),
    ):
        step = training_step(
            teachers, name, DEFAULTS[name]["dims"], torch.device("cpu"), torch.float32
        )
        tiles = data.FolderTiles(root, STUDENTS[name]["img_size"], 0)
        batch = next(data.batches(tiles, range(batch_size), batch_size))
        times = 1 if args.tiny else times
        for workers in args.workers:
            from_folder = functools.partial(folder_step, step, tiles, batch_size, workers, times)
            in_memory = functools.partial(timed, step, batch, times=times)
            in_memory()
            seconds = interleaved({"memory": in_memory, "folder": from_folder}, args.rounds)
            line = f"  {name}, batch {batch_size}, {workers} workers: {statistics.median(seconds['memory']):.3f} s"
            print(
                f"{line} in memory, share {spread(ratios(seconds, 'memory', 'folder'))}", flush=True
            )


def loader(args: argparse.Namespace, work: Path) -> None:
    print(
        "tiles/s in one process, 224 px crops of 256 px JPEG tiles, against bare Pillow (asked: >= 0.90)"
    )
    root, n = draw_folder(work / "tiles", args.tiles, 256), min(200, args.tiles)
    paths, rng = [root / name for name in data.list_tiles(root)][:n], np.random.default_rng(0)
    sources = {"folder": data.FolderTiles(root, 224, 0)}
    (work / "shards").mkdir(exist_ok=True)
    with tarfile.open(work / "shards" / "0.tar", "w") as shard:  # the same files
        shard.add(root, ".")
    sources["tar shard"] = data.FolderTiles(work / "shards", 224, 0)

    def bare(tensor: bool) -> None:
        for path in paths:
            with Image.open(path) as image:
                image = image.convert("RGB")
                image.load()
            left, top = rng.integers(256 - 224 + 1, size=2).tolist()
            view = image.crop((left, top, left + 224, top + 224))
            if tensor:
                TF.pil_to_tensor(view)

    def through(tiles: data.Dataset) -> None:
        for k in range(n):  # as many as bare Pillow reads, of the same kind, in the order of a run
            tiles[k]

    contenders = {name: functools.partial(timed, through, tiles) for name, tiles in sources.items()}
    contenders |= {
        "bare Pillow": functools.partial(timed, bare, True),
        "and no tensor": functools.partial(timed, bare, False),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a DataLoader's worker
    interleaved(contenders, 1)
    seconds = interleaved(contenders, args.pairs)
    torch.set_num_threads(threads)
    for name, values in seconds.items():
        line = f"  {name}: {n / statistics.median(values):.0f} tiles/s, of bare Pillow's"
        print(f"{line} {spread(ratios(seconds, 'bare Pillow', name))}", flush=True)


OPEN = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import train
from pathlib import Path
from bench_evaluate import memory
before, began = memory("VmHWM"), time.perf_counter()
tiles = train.data.FolderTiles({data!r}, 224, 0, Path({spare!r}))
tiles.fingerprint()
train.data.epoch_order(0, 0, len(tiles.files))
print(len(tiles.files), time.perf_counter() - began, 1000 * (memory("VmHWM") - before), tiles.files[-1])
"""


def million(args: argparse.Namespace, work: Path) -> None:
    n = 10_000 if args.tiny else 1_000_000
    print(
        f"{n} tiles, simulated (1-byte files), opened by a process of its own, with fingerprint and one order"
    )
    for i in range(n):  # names of 41 and 51 characters
        folder = work / "files" / f"TCGA-AB-{i * 1000 // n:04d}-01Z"
        if i * 1000 // n != (i - 1) * 1000 // n:
            folder.mkdir(parents=True)
        os.close(os.open(folder / f"tile_{i:07d}_x1234.png", os.O_CREAT | os.O_WRONLY))
    (work / "million").mkdir()
    for j in range(100):
        with open(work / "million" / f"shard-{j:03d}.tar", "wb") as shard:
            for i in range(j * n // 100, (j + 1) * n // 100):
                info = tarfile.TarInfo(f"TCGA-AB-{i % 1000:04d}/tile_{i:07d}.png")
                info.size = 1
                shard.write(info.tobuf() + b"x".ljust(512, b"\0"))
            shard.write(bytes(1024))
    for name in ("files", "million"):
        for time_of in ("first", "second"):
            code = OPEN.format(
                root=str(ROOT),
                tests=str(ROOT / "tests"),
                data=str(work / name),
                spare=str(work / "run"),
            )
            count, seconds, peak, last = run([sys.executable, "-c", code]).split()
            index = (work / f"{name}.index").stat().st_size / 1e6
            line = f"  {name}, the {time_of} time: {count} tiles in {float(seconds):.2f} s, {float(peak):.0f} MB at the"
            print(
                f"{line} highest above the imports; index {index:.0f} MB; last {last}", flush=True
            )


NO_TEACHERS = """
import torch
def kept(self, k, memory=[]):
    n = len(self.rows)
    row = int(self.rows[train.data.epoch_order(self.seed, k // n, n)[k % n]])
    if not memory:  # the outputs of 64 tiles serve for all
        names = self.outputs.dtype.names[1:]
        memory += [{t: torch.from_numpy(self.outputs[t][i].copy()) for t in names} for i in range(64)]
    return self.tiles[row] | {"outputs": {t: {"summary": y[0], "patches": y[1:]} for t, y in memory[k % 64].items()}}
train.CachedTiles.__getitem__ = kept
"""


def cache(args: argparse.Namespace, work: Path) -> None:
    print(
        "seconds per step from --cache / of the same run without teachers, 256 px JPEG tiles, complete cache"
    )
    root, every = draw_folder(work / "tiles", args.tiles, 256), 2 if args.tiny else 20
    script = TRAIN.format(root=str(ROOT), tests=str(ROOT / "tests"))
    without = script.replace("import train\n", "import train\n" + NO_TEACHERS)
    for student, batch in (("toy", 32), ("vit_s", 8)):
        argv = [
            "--data",
            root,
            "--student",
            student,
            "--batch-size",
            batch,
            "--cache",
            work / f"cache-{student}",
        ]
        argv += [
            "--teacher-steps",
            2,
            "--weights-dir",
            work / "weights",
            "--stats-tiles",
            64,
            "--device",
            "cpu",
        ]
        argv += ["--log-every", every if student == "toy" else 4, "--steps", 10000]
        run(
            [sys.executable, "-c", script, *argv, "--stop-at", 1, "--out", work / f"made-{student}"]
        )
        stop, rates = (5 * every if student == "toy" else 16), {"cache": [], "without": []}
        for i in range(1 if args.tiny else 5):
            for name in list(rates)[:: -1 if i % 2 else 1]:
                out = work / f"{student}-{name}-{i}"
                code = script if name == "cache" else without
                run([sys.executable, "-c", code, *argv, "--stop-at", stop, "--out", out])
                rates[name].append(statistics.median(log_rates(out, 1)))
        cost = [b / a for a, b in zip(rates["cache"], rates["without"])]
        line = f"  {student}, batch {batch}: {statistics.median(rates['cache']):.1f} tiles/s from the cache,"
        print(f"{line} cost {spread(cost)}", flush=True)


def growth(args: argparse.Namespace, work: Path) -> None:
    print(
        "toy student, each run of train.py in a process of its own; one thing changes from the first line"
    )
    root, every = draw_folder(work / "tiles", args.tiles, 256), 2 if args.tiny else 20
    script = TRAIN.format(root=str(ROOT), tests=str(ROOT / "tests"))
    dims = {1: "48", 3: "4,16,48", 5: "2,4,8,16,48"}
    usual = {"teachers": 2, "dims": 5, "batch": 32, "workers": 0}
    values = {"teachers": [1], "dims": [1, 3], "batch": [8, 16, 64], "workers": [1, 2]}
    changes = [{}] + [{key: value} for key in values for value in values[key]]
    print("  teachers  dims  batch  workers   s/step   peak GB")
    for i, change in enumerate(changes[:: 4 if args.tiny else 1]):
        now, out = usual | change, work / f"growth-{i}"
        argv = [
            "--teachers",
            ",".join(OFFLINE[: now["teachers"]]),
            "--dims",
            dims[now["dims"]],
            "--student",
            "toy",
        ]
        argv += [
            "--batch-size",
            now["batch"],
            "--workers",
            now["workers"],
            "--data",
            root,
            "--out",
            out,
        ]
        argv += [
            "--teacher-steps",
            2,
            "--weights-dir",
            work / "weights",
            "--stats-tiles",
            64,
            "--device",
            "cpu",
        ]
        argv += ["--log-every", every, "--stop-at", 5 * every, "--steps", 1000]
        if (
            not i
        ):  # its teachers are trained by a run of its own, so that their training is in no peak
            prepare = argv[:-4] + [
                "--stop-at",
                1,
                "--steps",
                1000,
                "--out",
                work / "growth-prepare",
            ]
            run([sys.executable, "-c", script, *prepare])
        peak = float(run([sys.executable, "-c", script, *argv]).split()[-1])
        columns = "  ".join(f"{value:{len(key)}}" for key, value in now.items())
        print(
            f"  {columns}   {now['batch'] / statistics.median(log_rates(out, 1)):6.3f}   {peak:7.2f}",
            flush=True,
        )


def ddp(args: argparse.Namespace, work: Path) -> None:
    print("tiles/s of two gloo processes / of one, one thread each, global batch 32")
    root, every = draw_folder(work / "tiles", args.tiles, 256), 2 if args.tiny else 25
    for name, source in (
        ("demo, teachers' outputs kept", []),
        ("folder, teachers in every step", ["--data", root]),
    ):
        rates, runs = {1: [], 2: []}, [1, 2] if args.tiny else [1, 2, 2, 1, 1, 2]
        for i, processes in enumerate(runs):
            out = work / f"ddp-{len(source)}-{i}"
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
            ]
            command += [
                ROOT / "train.py",
                "--teacher-steps",
                2,
                "--weights-dir",
                work / "weights",
                "--stats-tiles",
                64,
            ]
            command += [
                "--device",
                "cpu",
                "--log-every",
                every,
                "--stop-at",
                6 * every,
                "--steps",
                6 * every + 1,
            ]
            command += ["--workers", 0, "--out", out, *source]
            run(command, OMP_NUM_THREADS="1")
            rates[processes].append(statistics.median(log_rates(out, 1)))
        ratio = statistics.median(rates[2]) / statistics.median(rates[1])
        text = "; ".join(f"{n}: " + ", ".join(f"{rate:.1f}" for rate in rates[n]) for n in rates)
        print(f"  {name}: ratio of medians {ratio:.2f} (tiles/s of {text})", flush=True)


PARTS = {
    "vit": vit,
    "folder": folder,
    "loader": loader,
    "million": million,
    "cache": cache,
    "growth": growth,
    "ddp": ddp,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--pairs", type=int, help="of vit and loader (default: 20)")
    parser.add_argument("--rounds", type=int, help="of folder (default: 7)")
    parser.add_argument("--batch", type=int, help="of vit (default: 2; L: 1)")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 1, 2], help="of folder (default: 0 1 2)"
    )
    parser.add_argument("--tiles", type=int, help="JPEG tiles to draw (default: 2000)")
    parser.add_argument(
        "--tiny", action="store_true", help="shallow and short; its numbers mean nothing"
    )
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"no part is called {unknown[0]}; choose from {', '.join(PARTS)}")
    for key, tiny, usual in (("pairs", 2, 20), ("rounds", 2, 7), ("tiles", 120, 2000)):
        setattr(args, key, getattr(args, key) or (tiny if args.tiny else usual))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()}")
    with tempfile.TemporaryDirectory() as work:
        for part in args.parts or PARTS:
            print(f"\n{part}: ", end="")
            PARTS[part](args, Path(work))


if __name__ == "__main__":
    main()
