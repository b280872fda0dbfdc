"""Tasks at the size of NCT-CRC-HE: seconds, CPU seconds (for a busy machine), and peak memory above the features.

    OMP_NUM_THREADS=2 python tests/bench_evaluate.py                  # all, about five minutes on two cores
    python tests/bench_evaluate.py knn linear --bank 20000            # some of them, smaller

A bank of 100,000 features and 30,000 queries of 768 channels (the linear probe tests on them too), 9 overlapping
classes, channels correlated, their spectrum decaying as that of an encoder's features. Targets on two cores: kNN 60 s
and 2 GB above the features, linear probe 120 s. Each task runs in a process of its own, so that peaks are separate;
memory is Linux's VmHWM, reset when the features stand.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate

TASKS = {
    "knn": evaluate.knn,
    "retrieval": evaluate.retrieval,
    "adaptive": lambda *problem: evaluate.adaptive_retrieval(*problem, dim=96),
    "linear": evaluate.linear_probe,
}


def features(bank: int, queries: int, dim: int, classes: int) -> list[torch.Tensor]:
    """train_x (bank, dim), train_y, test_x (queries, dim), test_y; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    spectrum = (
        torch.arange(1, dim + 1) ** -0.5
    )  # standard deviations along the principal axes: variances as 1 / rank
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    centres = 0.35 * torch.randn(classes, dim, generator=generator)
    centres[:, 64:] = (
        0  # what tells classes apart lies in the leading axes, so that neighbours know it too
    )
    problem = []
    for n in (bank, queries):
        y, x = torch.randint(classes, (n,), generator=generator), torch.empty(n, dim)
        for rows, labels in zip(
            x.split(10_000), y.split(10_000)
        ):  # the peak is to be the task's, not this
            z = centres[labels] + torch.randn(len(rows), dim, generator=generator)
            rows.copy_((z * spectrum) @ axes + 0.3)
        problem += [x, y]
    return problem


def memory(kind: str) -> float:
    """GB of this process: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(kind)) * 1024 / 1e9


def bench(task: str, sizes: list[int]) -> None:
    problem = features(*sizes)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before, began, cpu = memory("VmRSS"), time.monotonic(), time.process_time()
    metrics = TASKS[task](*problem)
    seconds, cpu, above = (
        time.monotonic() - began,
        time.process_time() - cpu,
        memory("VmHWM") - before,
    )
    size = sum(part.numel() * part.element_size() for part in problem) / 1e9
    values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(
        f"{task:9} {seconds:7.1f} s, {cpu:.1f} s of CPU, {above:.2f} GB above {size:.2f} GB of features   {values}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)"
    )
    for flag, default in (("bank", 100_000), ("queries", 30_000), ("dim", 768), ("classes", 9)):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [task for task in args.tasks if task not in TASKS]:
        parser.error(f"no task is called {unknown[0]}; choose from {', '.join(TASKS)}")
    sizes = [args.bank, args.queries, args.dim, args.classes]
    if args.alone:
        bench(args.tasks[0], sizes)
        sys.exit()
    print(
        f"{args.bank} x {args.dim}, {args.queries} queries; {torch.get_num_threads()} threads, load {os.getloadavg()}"
    )
    for task in args.tasks or TASKS:
        flags = [
            f"--{flag}={size}" for flag, size in zip(("bank", "queries", "dim", "classes"), sizes)
        ]
        subprocess.run([sys.executable, __file__, task, "--alone", *flags], check=True)
