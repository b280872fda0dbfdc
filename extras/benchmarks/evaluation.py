"""evaluate.py's tasks at the size of NCT-CRC-HE: seconds, and peak memory above the features.

    python -m extras.benchmarks.evaluation                           five minutes on 2 CPU cores
    python -m extras.benchmarks.evaluation knn linear --bank 20000   some of it, smaller
    python -m extras.benchmarks.evaluation --tiny                    seconds; shows that it runs
    python -m extras.benchmarks.evaluation table --before CHECKOUT   another version's table in turn

A bank of 100,000 features and 30,000 queries of 768 channels (the linear probe is tested on them),
9 classes that overlap, channels that correlate, a spectrum that decays as that of an encoder's
features. Asked for, on two cores: kNN 60 s and 2 GB above the features, linear probe 120 s.

`table` is a whole evaluation: two students and two teachers at five dims on 4,000 drawn tiles, half
of them to test on; resamples apart. CHECKOUT is a folder with the six files and extras/ as they
were; the two are run one after the other, --rounds times, in turn first and second.

Each task runs in a process of its own, so that peaks are separate. Seconds of CPU time stand beside
those of the clock, for a machine that is busy. Memory is Linux's VmHWM, set back when the features
stand, so this needs Linux.
"""

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

import evaluate
from data import make_parser, path, positive, run_program
from extras.benchmarks.timing import ROOT, choose_parts, memory
from student import Student, VisionTransformer
from teachers import TEACHERS, Teacher

SIZES = {"bank": 100_000, "queries": 30_000, "dim": 768, "classes": 9}
TINY = {"bank": 2000, "queries": 500, "dim": 64, "classes": 5}
TASKS = ["knn", "retrieval", "adaptive", "linear"]
TABLE_TILES = {False: 2000, True: 64}  # of each split; with --tiny
DIMS = [2, 4, 8, 16, 48]
CHUNK = 10_000  # rows drawn at a time, so that the peak is the task's and not this


def make_problem(sizes: dict[str, int]) -> list[torch.Tensor]:
    """train_x (bank, dim), train_y, test_x (queries, dim), test_y; the same on every call."""
    dim = sizes["dim"]
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, dim + 1) ** -0.5  # deviations along the axes: variances as 1 / rank
    axes, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
    centres = 0.35 * torch.randn(sizes["classes"], dim, generator=generator)
    centres[:, 64:] = 0  # classes differ along the leading axes, so that neighbours know them too
    problem = []
    for n in (sizes["bank"], sizes["queries"]):
        y = torch.randint(sizes["classes"], (n,), generator=generator)
        x = torch.empty(n, dim)
        for rows, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            z = centres[labels] + torch.randn(len(rows), dim, generator=generator)
            rows.copy_((z * spectrum) @ axes + 0.3)
        problem += [x, y]
    return problem


def measure(task: str, sizes: dict[str, int]) -> None:
    """Run one task in this process, and print what it took and found."""
    problem = make_problem(sizes)
    options = {}
    if task == "adaptive":
        options = {"dim": sizes["dim"] // 8, "shortlist": evaluate.SHORTLIST}
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = memory("VmRSS")
    began = time.monotonic()
    cpu_began = time.process_time()
    metrics = evaluate.figures_of(evaluate.TASKS[task](*problem, **options))
    seconds = time.monotonic() - began
    cpu_seconds = time.process_time() - cpu_began
    above = memory("VmHWM") - before
    size = sum(part.numel() * part.element_size() for part in problem) / 1e9
    values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"{task:9} {seconds:7.1f} s, {cpu_seconds:.1f} s of CPU,", end=" ")
    print(f"{above:.2f} GB above {size:.2f} GB of features; {values}", flush=True)


def time_calls(module: ModuleType, names: list[str], seconds: list[float]) -> None:
    """From now on, what calls of these functions take is added to a list; not twice where one calls
    another. A version may lack them.
    """
    running = []

    def timed(function: Callable, *args, **options):
        running.append(function)
        began = time.process_time()
        result = function(*args, **options)
        running.pop()
        if not running:
            seconds.append(time.process_time() - began)
        return result

    for name in names:
        if hasattr(module, name):
            setattr(module, name, functools.partial(timed, getattr(module, name)))


def measure_table(tiles: int) -> None:
    """A whole evaluation, of models with random weights, and print what it took."""
    evaluate.N_TILES = tiles
    torch.manual_seed(0)
    models = {}
    for name in ("toy_cells", "toy_tissue"):
        teacher = Teacher(name, VisionTransformer(**TEACHERS[name].arch)).eval()
        models[f"teacher {name}"] = (teacher, [teacher.embed_dim])
    for name in ("A", "B"):
        models[name] = (Student("toy").eval(), DIMS)
    sure = []
    time_calls(evaluate, ["resample", "make_rows", "compare"], sure)
    began = time.process_time()
    evaluate.run_tasks(models, None)
    seconds = time.process_time() - began
    print(f"table: {seconds - sum(sure):.1f} s of CPU, resamples {sum(sure):.1f} s", flush=True)


def compare_tables(before: str, rounds: int, tiny: bool) -> None:
    """measure_table, with the code that stands here and with another checkout's, in turn."""
    contenders = [("before", before), ("now", ROOT)]
    for _ in range(rounds):
        contenders.reverse()  # each is first as often: what came second was 5 % slower
        for name, folder in contenders:
            if folder is None:
                continue
            command = [sys.executable, __file__, "table", "--alone"]
            command += ["--tiny"] * tiny
            environment = {**os.environ, "PYTHONPATH": str(folder)}
            print(f"{name:7}", end="", flush=True)
            if subprocess.run(command, env=environment, check=False).returncode:
                sys.exit(1)


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.evaluation", __doc__)
    add = parser.add_argument
    add(
        "tasks", nargs="*", metavar="TASK", help=f"table, or of {', '.join(TASKS)} (default: these)"
    )
    for name, size in SIZES.items():
        add(f"--{name}", type=positive, help=f"(default: {size}; --tiny: {TINY[name]})")
    add("--tiny", action="store_true", help="small: seconds")
    add("--before", type=path, metavar="CHECKOUT", help="with table: another version")
    add("--rounds", type=positive, default=2, help="with table (default: 2)")
    add("--alone", action="store_true", help=argparse.SUPPRESS)  # one task, in this process
    args = parser.parse_args()
    defaults = TINY if args.tiny else SIZES
    for name in SIZES:
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    return args


def main() -> None:
    """The command line."""
    args = parse_args()
    if args.tasks == ["table"]:
        if args.alone:
            measure_table(TABLE_TILES[args.tiny])
        else:
            compare_tables(args.before, args.rounds, args.tiny)
        return
    sizes = {name: getattr(args, name) for name in SIZES}
    tasks = choose_parts(args.tasks, TASKS)
    if args.alone:
        measure(tasks[0], sizes)
        return
    print(f"{args.bank} x {args.dim}, {args.queries} queries,", end=" ")
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()}", flush=True)
    flags = [f"--{name}={size}" for name, size in sizes.items()]
    for task in tasks:
        command = [sys.executable, "-m", "extras.benchmarks.evaluation", task, "--alone", *flags]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            sys.exit(1)  # it has said why


if __name__ == "__main__":
    run_program(main)
