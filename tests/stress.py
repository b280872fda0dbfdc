"""What takes too long for the tests: many mutated images, a long run watched for leaks, a run killed again and again.

    python tests/stress.py                             # all of them; half an hour
    python tests/stress.py images --n 20000            # counts of mutated images by what became of them
    python tests/stress.py steps --steps 5000          # memory and open files of a run and its loader's workers
    python tests/stress.py kills --kills 10            # SIGKILL at random moments, --resume, then every tensor compared

Prints plain lines; exit status 1 where an image differs from Pillow's, where memory grew by more than 2 % or open files
grew at all between the first and the last quarter of a run, or where the killed run ended otherwise than its twin.
Needs Linux (/proc)."""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from conftest import ROOT, write_tiles
from test_data import hostile_images, outcome

FLAGS = [
    "--teacher-steps",
    "2",
    "--device",
    "cpu",
    "--dims",
    "4,16",
    "--batch-size",
    "8",
    "--stats-tiles",
    "16",
]
FIRST = 5  # seconds after the first log line before a run is measured


def images(args: argparse.Namespace, work: Path) -> bool:
    warnings.simplefilter("ignore")
    found, wrong, began = collections.defaultdict(collections.Counter), [], time.monotonic()
    for what, name, content in hostile_images(args.n, args.seed):
        path = work / name
        path.write_bytes(content)
        word = outcome(path)
        found[word][what] += 1
        wrong += [name] * (word not in ("read", "refused", "broken"))
        path.unlink()
    for word, kinds in sorted(found.items()):
        print(
            f"{word}: {kinds.total()}, of them "
            + ", ".join(f"{what} {n}" for what, n in kinds.most_common(12))
        )
    print(
        f"{args.n} images in {time.monotonic() - began:.0f} s, against Pillow: {len(wrong)} differ {wrong[:20]}"
    )
    return not wrong


def start(*flags, out: Path) -> subprocess.Popen:
    command = [sys.executable, ROOT / "train.py", *flags]
    with open(f"{out}.txt", "ab") as text:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            [str(x) for x in command], stdout=text, stderr=text, env=environment
        )


def folder_of_tiles(work: Path, n: int, broken: int) -> Path:
    """n tiles of 80 x 72 px, `broken` of them cut short."""
    for path in write_tiles(work / "tiles", n, (80, 72), "jpg")[:: n // broken][:broken]:
        path.write_bytes(path.read_bytes()[:300])
    return work / "tiles"


def measured(pid: int) -> tuple[float, int, int]:
    """MB in memory and open files of a process and its children, and their number."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    memory = [Path(f"/proc/{x}/status").read_text().partition("VmRSS:")[2].split()[0] for x in pids]
    return (
        sum(map(int, memory)) / 1e3,
        sum(len(os.listdir(f"/proc/{x}/fd")) for x in pids),
        len(pids),
    )


def steps(args: argparse.Namespace, work: Path) -> bool:
    tiles, out, seen = folder_of_tiles(work, 600, 5), work / "long", []
    flags = [
        *FLAGS,
        "--data",
        tiles,
        "--workers",
        2,
        "--steps",
        args.steps,
        "--save-every",
        250,
        "--log-every",
        50,
    ]
    run = start(*flags, "--weights-dir", work / "weights", "--out", out, out=out)
    began = time.monotonic()
    while run.poll() is None:
        time.sleep(args.every)
        if (out / "log.jsonl").exists():
            try:
                seen.append((time.monotonic(), *measured(run.pid)))
            except (OSError, IndexError, ValueError):  # a process has just ended
                continue
    text = Path(f"{out}.txt").read_text()
    if run.returncode:
        print(text[-2000:])
        return False
    seen = [
        line for line in seen if line[0] > seen[0][0] + FIRST and line[3] == 3
    ]  # the workers end before the run
    print(
        f"{args.steps} steps in {time.monotonic() - began:.0f} s, {len(seen)} samples; {text.count('skipped')} skipped"
    )
    if len(seen) < 8:
        print("too few samples; raise --steps")
        return False
    fits = True
    for name, place, allowed in (("memory, MB", 1, 1.02), ("open files", 2, 1.0)):
        values, quarter = [line[place] for line in seen], len(seen) // 4
        first, last = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
        print(
            f"{name}: median {first:g} in the first quarter, {last:g} in the last, {max(values):g} at most"
        )
        fits &= last <= allowed * first
    return fits


def same(a, b, where: str = "") -> list[str]:
    """Places at which two checkpoints differ, by a bit of a tensor or otherwise."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [place for key in a for place in same(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [place for i in range(len(a)) for place in same(a[i], b[i], f"{where}/{i}")]
    return [] if type(a) is type(b) and a == b else [where]


def tensors(content) -> int:
    if isinstance(content, dict):
        return sum(map(tensors, content.values()))
    return (
        sum(map(tensors, content))
        if isinstance(content, list)
        else isinstance(content, torch.Tensor)
    )


def at_step(out: Path) -> int:
    return (
        torch.load(out / "last.pt", weights_only=True)["step"] if (out / "last.pt").exists() else -1
    )


def kills(args: argparse.Namespace, work: Path) -> bool:
    tiles, straight, killed = folder_of_tiles(work, 600, 5), work / "straight", work / "killed"
    flags = [
        *FLAGS,
        "--data",
        tiles,
        "--workers",
        1,
        "--steps",
        args.kill_steps,
        "--save-every",
        3,
        "--log-every",
        2,
    ]
    flags += ["--weights-dir", work / "weights"]
    if start(
        *flags, "--out", work / "warm", "--stop-at", 1, out=work / "warm"
    ).wait():  # makes the offline teachers
        print(Path(f"{work}/warm.txt").read_text()[-2000:])
        return False
    began = time.monotonic()
    code = start(*flags, "--out", straight, out=straight).wait()
    length, random_waits, done, round_, fits = (
        time.monotonic() - began,
        random.Random(args.seed),
        0,
        0,
        code == 0,
    )
    print(f"undisturbed: exit {code}, {length:.1f} s")
    while (
        fits and done < args.kills
    ):  # a run that ends before it has been killed often enough is followed by another
        round_ += 1
        shutil.rmtree(killed, ignore_errors=True)
        code = None
        while code is None:
            wait = random_waits.uniform(0.1, length) if done < args.kills else 10 * length + 60
            before = at_step(killed)
            run = start(
                *(["--resume", killed] if before >= 0 else [*flags, "--out", killed]), out=killed
            )
            try:
                code = run.wait(wait)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
                done += 1
                left = ", ".join(path.name for path in killed.glob("*.tmp"))
                print(
                    f"kill {done}: {wait:.2f} s after a start from step {before}; now {at_step(killed)}; left {left}"
                )
                if done >= args.kills and wait > length:
                    print("does not end")
                    return False
        a, b = (torch.load(out / "last.pt", weights_only=True) for out in (straight, killed))
        differ = [place for place in same(a, b) if place not in ("/args/out", "/args/resume")]
        print(
            f"run {round_}: exit {code}; {tensors(a)} tensors compared at step {b['step']}; differ: {differ or 'none'}"
        )
        notes = [
            [json.loads(x)["step"] for x in (y / "log.jsonl").read_text().splitlines()]
            for y in (straight, killed)
        ]
        named = [
            sorted((x / "unreadable.txt").read_text().splitlines()) for x in (straight, killed)
        ]
        left = [path.name for path in killed.glob("*.tmp")]
        print(
            f"  same log: {notes[0] == notes[1]}; same unreadable tiles: {named[0] == named[1]}; left over: {left}"
        )
        fits = (
            code == 0 and not differ and notes[0] == notes[1] and named[0] == named[1] and not left
        )
        if code:
            print(Path(f"{killed}.txt").read_text()[-2000:])
    return fits


PARTS = {"images": images, "steps": steps, "kills": kills}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--n", type=int, default=20_000, help="mutated images (default: 20000)")
    parser.add_argument(
        "--steps", type=int, default=5000, help="of the run that is watched (default: 5000)"
    )
    parser.add_argument(
        "--every", type=float, default=2, help="seconds between two looks at it (default: 2)"
    )
    parser.add_argument("--kills", type=int, default=10, help="(default: 10)")
    parser.add_argument(
        "--kill-steps", type=int, default=300, help="steps of the run that is killed (default: 300)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the mutations and of the waits (default: 0)"
    )
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"no part is called {unknown[0]}; choose from {', '.join(PARTS)}")
    fits = True
    with tempfile.TemporaryDirectory() as work:
        for part in args.parts or PARTS:
            print(f"\n{part}", flush=True)
            (Path(work) / part).mkdir()
            fits &= PARTS[part](args, Path(work) / part)
    sys.exit(not fits)


if __name__ == "__main__":
    main()
