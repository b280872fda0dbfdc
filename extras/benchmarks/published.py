"""Teachers at full size, in their published file form: seconds and memory to load, speed by timm's.

    python -m extras.benchmarks.published                    UNI, Virchow2, H-optimus-1
    python -m extras.benchmarks.published uni --pairs 5      one of them, shorter
    python -m extras.benchmarks.published --tiny             seconds: depth 2, shows that it runs
    python -m extras.benchmarks.published kaiko_s8 --beside kaiko_s16    what patch 8 costs

On 2 CPU cores some 15 minutes for the three. The weights are random, the files of published size
(UNI 1.2 GB, Virchow2 2.5 GB, H-optimus-1 4.5 GB) and removed afterwards. Loading is measured in a
process of its own. Speed is a ratio of pairs in turn, in one process, with the very same tensors:
ours with normalisation and the split into tokens, timm's forward_features with normalisation.

    pip install timm safetensors

Needs Linux (/proc) for the memory.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from data import make_parser, path, positive, run_program
from extras.benchmarks.timing import (
    ROOT,
    import_timm,
    interleaved,
    memory,
    ratios,
    spread,
    timed,
    timm_twin,
)
from student import InputError, VisionTransformer
from teachers import TEACHERS, check_names, choose_device, load_teacher

MEASURE = "import sys; from extras.benchmarks.published import measure; measure(*sys.argv[1:])"


class Loading(NamedTuple):
    """GB, but seconds."""

    size: float  # of the model
    own: float  # the process's own memory at its peak, above what was there
    peak: float  # with mapped files
    gpu: float
    seconds: float


def set_depth(name: str, depth: int) -> None:
    """Make a teacher shallower, in this process."""
    spec = TEACHERS[name]
    TEACHERS[name] = dataclasses.replace(spec, arch=spec.arch | {"depth": depth})


def write_file(name: str, folder: str | Path) -> Path:
    """Random weights under timm's names, in the kind of file in which the teacher is published."""
    torch.manual_seed(0)
    state = VisionTransformer(**TEACHERS[name].arch).state_dict()
    suffix = Path(TEACHERS[name].file).suffix
    file = Path(folder, name + suffix)
    if suffix != ".safetensors":
        torch.save(state, file)
        return file
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError(f"{name} is a .safetensors: pip install safetensors") from None
    save_file(state, file)
    return file


# ---- loading, in a process of its own ------------------------------------------------------------


def load_apart(
    name: str, folder: str | Path, depth: int, dtype: torch.dtype, device: str = "cpu"
) -> Loading:
    """Load a teacher in a new process -> what it took."""
    words = [name, folder, depth, str(dtype).removeprefix("torch."), device]
    command = [sys.executable, "-c", MEASURE, *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"loading {name}: {result.stderr}")
    return Loading(*map(float, result.stdout.split()[-5:]))


def measure(name: str, folder: str, depth: str, dtype: str, device: str) -> None:
    """In that process: load, watched by a thread, and print the numbers of Loading."""
    with contextlib.suppress(ImportError):
        import safetensors.torch  # noqa: F401 - what the library itself takes is not counted
    set_depth(name, int(depth))
    ones = torch.ones(64, 64, device=device)
    ones @ ones  # starts what computes, which is not counted either
    before = memory("RssAnon")
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, memory("RssAnon"))
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    teacher = load_teacher(name, folder, device, getattr(torch, dtype))
    seconds = time.monotonic() - began
    done.set()
    thread.join()
    size = 0
    for p in teacher.parameters():
        assert p.dtype == getattr(torch, dtype)
        size += p.numel() * p.element_size()
    gpu = torch.cuda.max_memory_allocated() / 1e9 if device.startswith("cuda") else 0
    print(size / 1e9, peak - before, memory("VmHWM"), gpu, seconds)


def report_loading(name: str, folder: str, dtype: torch.dtype, device: torch.device) -> None:
    """Load in bf16, and in what the device computes in, if that is another."""
    depth = TEACHERS[name].arch["depth"]
    for kind in dict.fromkeys([torch.bfloat16, dtype]):
        took = load_apart(name, folder, depth, kind, str(device))
        print(f"  loaded in {took.seconds:.1f} s (file cached) as {kind}: {took.size:.2f} GB;")
        share = took.own / took.size
        print(f"    own memory at its peak {took.own:.2f} GB ({share:.2f} x the model),", end=" ")
        print(f"{took.peak:.2f} GB with the mapped file, {took.gpu:.2f} GB of GPU", flush=True)


# ---- speed ---------------------------------------------------------------------------------------


@torch.no_grad()
def report_speed(
    name: str, folder: str, batch: int, pairs: int, device: torch.device, dtype: torch.dtype
) -> None:
    """tiles/s of ours and of timm's."""
    teacher = load_teacher(name, folder, device, dtype)
    with torch.device("meta"):
        twin = timm_twin(TEACHERS[name].arch)
    twin.load_state_dict(teacher.vit.state_dict(), strict=True, assign=True)  # the very same
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, 224, 224, generator=generator).to(device)

    def ours() -> torch.Tensor:
        return teacher(images)["patches"]

    def theirs() -> torch.Tensor:
        tokens = twin.forward_features(((images - teacher.mean) / teacher.std).to(dtype))
        return tokens[:, twin.num_prefix_tokens :]

    expected = theirs().float()  # warms up, too
    difference = (ours().float() - expected).abs().max() / expected.abs().max()
    print(f"  largest difference of patches {difference:.1e} of their scale")
    contenders = {"ours": functools.partial(timed, ours), "timm": functools.partial(timed, theirs)}
    seconds = interleaved(contenders, pairs)
    for contender, values in seconds.items():
        print(f"  {contender}: {batch / statistics.median(values):.3g} tiles/s")
    print(f"  timm / ours in time: {spread(ratios(seconds, 'timm', 'ours'))}", flush=True)


# ---- beside another teacher ----------------------------------------------------------------------


@torch.no_grad()
def report_beside(
    name: str, other: str, folder: str, batch: int, pairs: int, device: torch.device
) -> None:
    """Time and memory of a forward, as a ratio to another teacher's, in fp32."""
    images = torch.rand(batch, 3, 224, 224).to(device)
    forwards = {}
    needed = {}
    for t in (name, other):
        teacher = load_teacher(t, folder, device)
        forwards[t] = functools.partial(teacher, images)
        forwards[t]()  # warms up
        needed[t] = forward_memory(forwards[t])
    contenders = {t: functools.partial(timed, forward) for t, forward in forwards.items()}
    seconds = interleaved(contenders, pairs)
    print(f"  beside {other}, {batch} tiles at once, fp32:")
    print(f"  {name} / {other} in time: {spread(ratios(seconds, name, other))}")
    share = needed[name] / needed[other]
    print(f"  in memory above weights: {needed[name]:.4f} GB, {share:.2f} x the other", flush=True)


def forward_memory(forward: Callable) -> float:
    """GB at the peak of a call, above what was there before."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        forward()
    events = []
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            events.append((event.start_ns(), event.nbytes()))
    now = 0
    peak = 0
    for _, nbytes in sorted(events):
        now += nbytes
        peak = max(peak, now)
    return peak / 1e9


# ---- the command line ----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.published", __doc__)
    add = parser.add_argument
    usual = ["uni", "virchow2", "h_optimus_1"]
    add("names", nargs="*", default=usual, metavar="NAME", help=f"(default: {' '.join(usual)})")
    add("--device", type=path, help="cuda or cpu (default: the best at hand)")
    add("--pairs", type=positive, default=20, help="(default: 20)")
    add("--batch", type=positive, help="tiles (default: 64 on a GPU, 1 on a CPU)")
    add("--out", type=path, help="where files are meanwhile (default: a temporary folder)")
    add("--beside", metavar="NAME", help="another teacher: time and memory as ratios to it alone")
    add("--tiny", action="store_true", help="depth 2 and two pairs; its numbers mean nothing")
    args = parser.parse_args()
    others = [args.beside] if args.beside else []
    check_names(args.names + others, "NAME")
    for name in args.names + others:
        if TEACHERS[name].task:
            raise InputError(f"NAME: {name} is made here, not published; choose another")
    return args


def main() -> None:
    """The command line."""
    args = parse_args()
    device, dtype = choose_device(args.device, "auto")
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, timm {import_timm().__version__}")
    batch = args.batch or (64 if on_gpu else 1)
    pairs = 2 if args.tiny else args.pairs
    if args.tiny:
        for name in dict.fromkeys([*args.names, args.beside or args.names[0]]):
            set_depth(name, 2)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        if args.beside:
            write_file(args.beside, folder)
        for name in args.names:
            file = write_file(name, folder)
            print(f"\n{name}: {file.stat().st_size / 1e9:.2f} GB of random weights, {file.suffix}")
            if args.beside:
                report_beside(name, args.beside, folder, batch, pairs, device)
            else:
                report_loading(name, folder, dtype, device)
                report_speed(name, folder, batch, pairs, device, dtype)
                file.unlink()


if __name__ == "__main__":
    run_program(main)
