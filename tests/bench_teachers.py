"""Teachers at full size, random weights in the published file form: seconds and memory to load, tiles/s beside timm's.

    python tests/bench_teachers.py                       # UNI, Virchow2, H-optimus-1 on the device at hand
    python tests/bench_teachers.py uni --pairs 5

Loading is measured in a process of its own; speed as the ratio of interleaved pairs in one process, the same weights:
ours with normalisation and the split into tokens, timm's forward_features with normalisation. Needs timm, and disk for
the files (UNI 1.2 GB, Virchow2 2.5 GB, H-optimus-1 4.5 GB), which are removed afterwards.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cards
import torch
from conftest import ROOT, randomise

from teachers import TEACHERS, choose_device, load_teacher

LOAD = """
import dataclasses, sys, threading, time
import huggingface_hub, safetensors.torch, torch
sys.path.insert(0, {root!r})
import teachers

def memory(kind):  # bytes of this process; RssAnon: its own memory, without mapped files
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))

spec = teachers.TEACHERS[{name!r}]
teachers.TEACHERS[{name!r}] = dataclasses.replace(spec, arch=spec.arch | {{"depth": {depth}}})
torch.ones(64, 64, device={device!r}) @ torch.ones(64, 64, device={device!r})
before, peak, done = memory("RssAnon"), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, memory("RssAnon"))
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
began = time.monotonic()
teacher = teachers.load_teacher({name!r}, {folder!r}, {device!r}, {dtype})
seconds = time.monotonic() - began
done = True
thread.join()
size = sum(p.numel() * p.element_size() for p in teacher.parameters())
assert all(p.dtype == {dtype} for p in teacher.parameters())
on_gpu = torch.cuda.max_memory_allocated() if {device!r} == "cuda" else 0
print(size, peak - before, memory("VmHWM"), on_gpu, seconds)
"""


def load(
    name: str, folder: Path, depth: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[float, ...]:
    """-> bytes of the model, peak of own memory above what was there, peak with mapped files, on the GPU, seconds."""
    script = LOAD.format(
        root=str(ROOT), name=name, depth=depth, folder=str(folder), dtype=dtype, device=device
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return tuple(map(float, result.stdout.split()[-5:]))


@torch.no_grad()
def speed(
    name: str, folder: Path, batch: int, pairs: int, device: torch.device, dtype: torch.dtype
) -> None:
    teacher = load_teacher(name, folder, device, dtype)
    with torch.device("meta"):
        twin = cards.timm_model(name)
    twin.load_state_dict(
        teacher.vit.state_dict(), strict=True, assign=True
    )  # the very same tensors
    images = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)

    def ours():
        return teacher(images)["patches"]

    def theirs():
        tokens = twin.forward_features(((images - teacher.mean) / teacher.std).to(dtype))
        return tokens[:, twin.num_prefix_tokens :]

    def seconds(forward):
        began = time.perf_counter()
        forward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    a, b = ours().float(), theirs().float()  # warm up, and the same result
    print(
        f"  largest difference of patches {((a - b).abs().max() / b.abs().max()).item():.1e} of their scale"
    )
    times = [
        (seconds(ours), seconds(theirs)) if i % 2 else (seconds(theirs), seconds(ours))[::-1]
        for i in range(pairs)
    ]
    ratios = sorted(theirs / ours for ours, theirs in times)
    rate, timm_rate = (batch / statistics.median(column) for column in zip(*times))
    print(
        f"  {rate:.2f} tiles/s, timm {timm_rate:.2f}, batch {batch}, {dtype}, {pairs} interleaved pairs:",
        end=" ",
    )
    low, median, high = (
        ratios[len(ratios) // 4],
        statistics.median(ratios),
        ratios[-1 - len(ratios) // 4],
    )
    print(
        f"ours / timm median {median:.3f}, quartiles {low:.3f} to {high:.3f}, range {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["uni", "virchow2", "h_optimus_1"])
    parser.add_argument("--device", help="cuda or cpu (default: the best at hand)")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--batch", type=int, help="(default: 64 on a GPU, 1 on a CPU)")
    parser.add_argument(
        "--out", help="where the files are written meanwhile (default: a temporary folder)"
    )
    args = parser.parse_args()
    device, dtype = choose_device(args.device, "auto")
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, timm {cards.oracle('timm').__version__}")
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        for name in args.names:
            suffix = Path(TEACHERS[name].file).suffix
            path = Path(folder) / f"{name}{suffix}"
            cards.write(randomise(cards.timm_model(name)).state_dict(), path)
            print(f"\n{name}: {path.stat().st_size / 1e9:.2f} GB of random weights as {suffix}")
            for kind in dict.fromkeys([torch.bfloat16, dtype]):
                depth = TEACHERS[name].arch["depth"]
                size, own, peak, on_gpu, seconds = load(
                    name, Path(folder), depth, kind, device.type
                )
                text = f"  loaded in {seconds:.1f} s (file cached) as {kind}: {size / 1e9:.2f} GB; own memory at its peak"
                print(
                    f"{text} {own / 1e9:.2f} GB ({own / size:.2f} x), with the mapped file {peak / 1e9:.2f} GB",
                    end="",
                )
                print(
                    f", GPU {on_gpu / 1e9:.2f} GB ({on_gpu / size:.2f} x)" if gpu else "",
                    flush=True,
                )
            speed(name, Path(folder), args.batch or (64 if gpu else 1), args.pairs, device, dtype)
            path.unlink()


if __name__ == "__main__":
    main()
