"""What takes too long for the tests: many hostile images, a long run, a run killed again and again.

    python -m extras.benchmarks.stress                      all of it; half an hour on 2 CPU cores
    python -m extras.benchmarks.stress images --n 20000     what became of each kind, beside Pillow
    python -m extras.benchmarks.stress steps --steps 5000   memory and open files of a run
    python -m extras.benchmarks.stress kills --kills 10     SIGKILL at random, --resume, compare
    python -m extras.benchmarks.stress --tiny               minutes; shows that everything runs

images  damaged and odd images (hostile.py) are read as Pillow reads them, or refused
steps   a run with two workers, looked at every 2 seconds: memory in the last quarter is at most
        2 % above the first, and no more files are open
kills   the killed and resumed run ends with every tensor of last.pt, and with the loss of every
        step (the last line of a step counts), as one that nobody disturbed

Exit code 1 where one of these does not hold. Needs Linux (/proc).
"""

import argparse
import collections
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from data import make_parser, natural, positive, run_program
from extras.benchmarks.hostile import AGREED, hostile_images, outcome
from extras.benchmarks.timing import ROOT, choose_parts, draw_folder, memory

FLAGS = ["--teacher-steps", 2, "--device", "cpu", "--dims", "4,16"]
FLAGS += ["--batch-size", 8, "--stats-tiles", 16]
WORKERS = 2  # of the long run
SETTLED = 5  # seconds after the first log line, before which a run is not judged
TINY = {"n": 300, "steps": 200, "every": 0.2, "kills": 1, "kill_steps": 60}


# ---- images --------------------------------------------------------------------------------------


def images(args: argparse.Namespace, work: Path) -> bool:
    """Count what became of hostile images -> whether open_tile and Pillow always agree."""
    warnings.simplefilter("ignore")
    kinds = collections.defaultdict(collections.Counter)  # {outcome: {what the image is: number}}
    wrong = []
    began = time.monotonic()
    for what, name, content in hostile_images(args.n, args.seed):
        path = work / name
        path.write_bytes(content)
        word = outcome(path)
        kinds[word][what] += 1
        if word not in AGREED:
            wrong.append(name)
        path.unlink()
    for word in sorted(kinds):
        most = ", ".join(f"{what} {n}" for what, n in kinds[word].most_common(12))
        print(f"{word}: {kinds[word].total()}, of them {most}")
    seconds = time.monotonic() - began
    print(f"{args.n} images in {seconds:.0f} s; {len(wrong)} differ from Pillow {wrong[:20]}")
    return not wrong


# ---- runs ----------------------------------------------------------------------------------------


def start(flags: list, text: Path) -> subprocess.Popen:
    """train.py in a process of its own; what it prints is added to a file."""
    command = [sys.executable, ROOT / "train.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(text, "ab") as file:
        words = [str(word) for word in command]
        return subprocess.Popen(words, stdout=file, stderr=file, env=environment)


def folder_of_tiles(work: Path) -> Path:
    """600 tiles, of which 5 are cut short."""
    folder = draw_folder(work / "tiles", 600, 72)
    for path in sorted(folder.iterdir())[::120]:
        path.write_bytes(path.read_bytes()[:300])
    return folder


def look(pid: int) -> tuple[float, int, int]:
    """MB in memory and open files of a process and its children, and how many they are."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pids = [str(pid), *children]
    megabytes = 0.0
    files = 0
    for process in pids:
        megabytes += 1000 * memory("VmRSS", process)
        files += len(os.listdir(f"/proc/{process}/fd"))
    return megabytes, files, len(pids)


def watch(run: subprocess.Popen, log: Path, every: float) -> list[tuple[float, int]]:
    """Look at a run until it ends -> (MB, open files), from when it has settled on."""
    seen = []
    judged_from = None
    while run.poll() is None:
        time.sleep(every)
        if not log.exists():
            continue
        if judged_from is None:
            judged_from = time.monotonic() + min(SETTLED, 5 * every)
        try:
            megabytes, files, processes = look(run.pid)
        except OSError:  # a process has just ended
            continue
        # at the end the workers go before the run does
        if time.monotonic() > judged_from and processes == 1 + WORKERS:
            seen.append((megabytes, files))
    return seen


def has_grown(what: str, values: list[float], allowed: float) -> bool:
    """Whether the median of the last quarter is more than `allowed` times that of the first."""
    quarter = len(values) // 4
    first = statistics.median(values[:quarter])
    last = statistics.median(values[-quarter:])
    highest = max(values)
    print(f"{what}: median {first:g} in the first quarter, {last:g} in the last, {highest:g} most")
    return last > allowed * first


def steps(args: argparse.Namespace, work: Path) -> bool:
    """Watch a long run -> whether neither its memory nor its open files grow."""
    out = work / "long"
    text = work / "long.txt"
    flags = [*FLAGS, "--data", folder_of_tiles(work), "--workers", WORKERS, "--steps", args.steps]
    flags += ["--save-every", 250, "--log-every", 20 if args.tiny else 50, "--out", out]
    began = time.monotonic()
    run = start([*flags, "--weights-dir", work / "weights"], text)
    seen = watch(run, out / "log.jsonl", args.every)
    if run.returncode:
        print(text.read_text()[-2000:])
        return False
    seconds = time.monotonic() - began
    skipped = text.read_text().count("skipped unreadable tile")
    print(f"{args.steps} steps in {seconds:.0f} s, {len(seen)} looks; {skipped} tiles skipped")
    if len(seen) < 8:
        print("too few looks; raise --steps")
        return False
    memory_grew = has_grown("memory, MB", [megabytes for megabytes, _ in seen], 1.02)
    files_grew = has_grown("open files", [files for _, files in seen], 1.0)
    return not (memory_grew or files_grew)


# ---- kills ---------------------------------------------------------------------------------------


def differences(a, b, where: str = "") -> list[str]:
    """Places at which two checkpoints differ, by a bit of a tensor or otherwise."""
    if type(a) is not type(b):
        return [where]
    if isinstance(a, torch.Tensor):
        equal = a.dtype == b.dtype and torch.equal(a, b)
        return [] if equal else [where]
    if isinstance(a, list) and len(a) == len(b):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if isinstance(a, dict) and a.keys() == b.keys():
        found = []
        for key in a:
            found += differences(a[key], b[key], f"{where}/{key}")
        return found
    return [] if a == b else [where]


def completed_steps(out: Path) -> int:
    """Of the last save; -1: nothing is saved yet."""
    if not (out / "last.pt").exists():
        return -1
    return torch.load(out / "last.pt", weights_only=True)["step"]


def losses(out: Path) -> dict[int, float]:
    """{step: loss}; after a kill a step may stand there twice, and the last line counts."""
    found = {}
    for line in (out / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found[entry["step"]] = entry["loss"]
    return found


def skipped_tiles(text: Path) -> set[str]:
    """The lines about unreadable tiles, each once: every start names them anew."""
    lines = text.read_text().splitlines()
    return {line for line in lines if "skipped unreadable tile" in line}


def killed_run(out: Path, flags: list, waits: list[float], limit: float) -> tuple[int, int]:
    """A run that gets SIGKILL after each of some seconds, and is then resumed, until it ends.

    -> its exit code and how often it was killed. limit: seconds for the last start, undisturbed.
    """
    kills_done = 0
    while True:
        undisturbed = kills_done == len(waits)
        wait = limit if undisturbed else waits[kills_done]
        before = completed_steps(out)
        now = ["--resume", out] if before >= 0 else [*flags, "--out", out]
        run = start(now, Path(f"{out}.txt"))
        try:
            return run.wait(wait), kills_done
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
        if undisturbed:
            print("does not end")
            return -9, kills_done
        kills_done += 1
        print(f"killed {wait:.2f} s after a start from step {before}; now {completed_steps(out)}")


def same_end(straight: Path, killed: Path) -> bool:
    """Whether two runs ended alike: checkpoint, losses, unreadable tiles, nothing left over."""
    a = torch.load(straight / "last.pt", weights_only=True)
    b = torch.load(killed / "last.pt", weights_only=True)
    differ = []
    for place in differences(a, b):
        if place not in ("/args/out", "/args/resume"):
            differ.append(place)
    same_losses = losses(straight) == losses(killed)
    same_tiles = skipped_tiles(Path(f"{straight}.txt")) == skipped_tiles(Path(f"{killed}.txt"))
    print(f"  last.pt of step {b['step']}: differs in {differ or 'nothing'}")
    print(f"  same losses: {same_losses}; same unreadable tiles: {same_tiles}")
    return not differ and same_losses and same_tiles


def kills(args: argparse.Namespace, work: Path) -> bool:
    """Kill runs at random moments -> whether all end as the undisturbed one."""
    straight = work / "straight"
    killed = work / "killed"
    flags = [*FLAGS, "--data", folder_of_tiles(work), "--workers", 1, "--steps", args.kill_steps]
    flags += ["--save-every", 3, "--log-every", 2, "--weights-dir", work / "weights"]
    warm = [*flags, "--out", work / "warm", "--stop-at", 1]
    code = start(warm, work / "warm.txt").wait()  # makes the offline teachers
    began = time.monotonic()
    if code == 0:
        code = start([*flags, "--out", straight], Path(f"{straight}.txt")).wait()
    length = time.monotonic() - began
    print(f"undisturbed: exit code {code}, {length:.1f} s", flush=True)
    generator = random.Random(args.seed)
    total = 0
    fits = code == 0
    while fits and total < args.kills:  # a run that ends early is followed by another
        waits = [generator.uniform(0.1, length) for _ in range(args.kills - total)]
        shutil.rmtree(killed, ignore_errors=True)
        Path(f"{killed}.txt").unlink(missing_ok=True)
        code, done = killed_run(killed, flags, waits, limit=10 * length + 60)
        total += done
        print(f"killed {done} times, exit code {code}")
        if code:
            print(Path(f"{killed}.txt").read_text()[-2000:])
        fits = code == 0 and same_end(straight, killed)
    return fits


# ---- the command line ----------------------------------------------------------------------------

PARTS = {"images": images, "steps": steps, "kills": kills}


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.stress", __doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--n", type=positive, default=20_000, help="hostile images (default: 20000)")
    add("--steps", type=positive, default=5000, help="of the long run (default: 5000)")
    add("--every", type=float, default=2, help="seconds between two looks at it (default: 2)")
    add("--kills", type=positive, default=10, help="(default: 10)")
    add("--kill-steps", type=positive, default=300, help="of the killed run (default: 300)")
    add("--seed", type=natural, default=0, help="of damage and of waits (default: 0)")
    add("--tiny", action="store_true", help="minutes for all: sets the first five above")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    return args


def main() -> int:
    """The command line."""
    args = parse_args()
    fits = True
    for part in choose_parts(args.parts, list(PARTS)):
        print(f"\n{part}", flush=True)
        with tempfile.TemporaryDirectory() as work:
            fits &= PARTS[part](args, Path(work))
    return 0 if fits else 1


if __name__ == "__main__":
    run_program(main)
