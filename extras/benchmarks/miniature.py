"""The paper's three claims in miniature: drawn tissue, two offline teachers, no download.

    python -m extras.benchmarks.miniature            an hour on 2 slow CPU cores, from nothing
    python -m extras.benchmarks.miniature --tiles labelled/ --steps 500
                                                     the same students on real, labelled tiles
    python -m extras.benchmarks.miniature --tiny     a minute; shows that it runs

For each of three seeds (of teachers, students, tiles) it trains, by train.py's own command line, a
student of both teachers, one of each teacher alone, and one of both without nesting (--dims 48).
Then it prints, as mean and standard deviation over the seeds:

    (a) the student beside its teachers, each on the task that it knows
    (b) the student beside the students of one teacher, on the task that this teacher does not know
    (c) its first m channels beside those of the student without nesting, and beside two cuts of its
        own whole embedding to m channels: a random projection, and PCA

A toy: it shows what the method does, and says nothing about real tissue. With --tiles, students
learn from DIR/train without its labels, the teachers stay those of drawn tissue, and colour
histograms stand beside the embeddings; the three claims, which are about drawn tissue, are left
out. A call that was interrupted goes on where it was. OUT/miniature.png is drawn where matplotlib
is installed (pip install matplotlib).
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import evaluate
from data import TissueTiles, make_parser, path, positive, run_program
from evaluate import embed, figures_of, knn, linear_probe, load_student
from extras.benchmarks.timing import ROOT
from student import InputError, millions, truncate
from teachers import OFFLINE_STEPS, load_teacher

TASKS = {"cells": "toy_cells", "tissue": "toy_tissue"}  # label -> the teacher that knows it
BOTH = "student of both"
FLAT = "student of both, not nested"
RANDOM = "student of both, random projection"
PCA = "student of both, PCA"
STUDENTS = {  # name -> flags of train.py
    "student of toy_cells": ["--teachers", "toy_cells"],
    "student of toy_tissue": ["--teachers", "toy_tissue"],
    BOTH: [],
    FLAT: ["--dims", "48"],
}
DIMS = [2, 4, 8, 16, 48]
WIDTH = DIMS[-1]
TEACHER_WIDTH = 128
PROBES = {"kNN": knn, "linear": linear_probe}
TINY = {"seeds": 1, "steps": 4, "teacher_steps": 2}

Splits = dict[str, Tensor]  # {"train": (n, ...), "test": (n, ...)}
Key = tuple[str, int, str, str]  # model, dim, label, probe
Values = dict[Key, np.ndarray]  # per cent, of every seed: (seeds,)


# ---- training ------------------------------------------------------------------------------------


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where the student of this name and seed is."""
    return out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def train_one(folder: Path, name: str, seed: int, flags: list[str], machine: list[str]) -> None:
    """Train one student, or go on with it, in a process with one thread.

    flags: of train.py; machine: those of them that a resume takes as well
    """
    began = time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), *machine]
    if (folder / "last.pt").exists():  # an earlier call was interrupted
        command += ["--resume", str(folder)]
    else:
        command += ["--out", str(folder), *STUDENTS[name], *flags]
        command += ["--seed", str(seed), "--teacher-seed", str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise InputError(
            f"{folder}: {result.stderr.strip()}; put it right, or choose another --out"
        )
    print(f"  {folder}: {time.monotonic() - began:.0f} s", flush=True)


def train_all(out: Path, seeds: int, flags: list[str], machine: list[str]) -> None:
    """All students of all seeds, two at a time: faster than one after the other with two threads.

    The students of one teacher come first, for each of them trains that teacher, once.
    """
    names = list(STUDENTS)
    for stage in (names[:2], names[2:]):
        jobs = []
        with ThreadPoolExecutor(2) as pool:
            for seed in range(seeds):
                for name in stage:
                    folder = run_folder(out, name, seed)
                    jobs.append(pool.submit(train_one, folder, name, seed, flags, machine))
        for job in jobs:
            job.result()  # an error shows here


# ---- features, and their cuts --------------------------------------------------------------------


def draw_tiles(seed: int) -> tuple[Splits, dict[str, Splits]]:
    """Drawn tissue -> images by split, labels {split: {label: (n,)}}."""
    images = {}
    labels = {}
    for split, stream in (("train", "bank"), ("test", "test")):
        drawn = TissueTiles(stream, seed).draw(evaluate.N_TILES)
        images[split] = drawn["image"]
        labels[split] = {label: drawn[label] for label in TASKS}
    return images, labels


def read_tiles(root: str, size: int = 64) -> tuple[Splits, dict[str, Splits]]:
    """A labelled folder -> images by split, labels {split: {"class": (n,)}}."""
    images = {}
    labels = {}
    for split, (files, targets) in evaluate.labelled_files(root).items():
        if "class" not in targets:
            raise InputError(f"--tiles: {root} holds masks; give folders of classes")
        tiles = evaluate.CentreTiles(root, size, files, targets)
        seen = list(evaluate.readable_batches(tiles, f"reading {split}"))
        images[split] = torch.cat([batch["image"] for batch in seen])
        labels[split] = {"class": torch.cat([batch["class"] for batch in seen])}
    return images, labels


def extract(out: Path, weights: Path, seed: int, steps: int, images: Splits) -> dict[str, Splits]:
    """{model: features (n, D) by split} of the four students and the two teachers."""
    models = {}
    for name in STUDENTS:
        models[name], _ = load_student(run_folder(out, name, seed))
    for teacher in TASKS.values():
        models[f"teacher {teacher}"] = load_teacher(teacher, weights, steps=steps, seed=seed)
    features = {}
    for name, model in models.items():
        features[name] = {split: embed(model, x) for split, x in images.items()}
    return features


def cut_all(features: dict[str, Splits], seed: int) -> dict[tuple[str, int], Splits]:
    """{(model, dim): (n, dim) by split}: whole teachers, prefixes of students, and two cuts of the
    nested embedding that are no prefixes."""
    found = {}
    for name, x in features.items():
        if name in STUDENTS:
            for m in DIMS:
                found[name, m] = truncate(x, m)
        else:
            found[name, x["train"].shape[1]] = x
    z = features[BOTH]
    mean = z["train"].mean(0)
    covariance = (z["train"] - mean).double().T.cov()
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1).float()  # (D, D), largest first
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(z["train"].shape[1], WIDTH, generator=generator)
    for m in DIMS[:-1]:
        found[PCA, m] = {split: (x - mean) @ axes[:, :m] for split, x in z.items()}
        found[RANDOM, m] = {split: x @ directions[:, :m] for split, x in z.items()}
    return found


def histograms(images: Tensor) -> Tensor:
    """Colour histograms (n, 3 * 16), 16 bins a channel: what stain and light alone can tell."""
    bins = (images.long() // 16).flatten(2)  # (n, 3, pixels)
    shares = []
    for value in range(16):
        shares.append((bins == value).float().mean(-1))  # (n, 3)
    return torch.stack(shares, -1).flatten(1)


def measure(out: Path, weights: Path, seed: int, steps: int, tiles: str | None) -> dict[Key, float]:
    """Every model, dim, label and probe of one seed, in per cent."""
    images, labels = read_tiles(tiles) if tiles else draw_tiles(seed)
    found = cut_all(extract(out, weights, seed, steps, images), seed)
    if tiles:
        found["colour histograms", 48] = {split: histograms(x) for split, x in images.items()}
    metric = "balanced_accuracy" if tiles else "accuracy"
    scores = {}
    for (name, m), x in found.items():
        for label in labels["train"]:
            for probe, task in PROBES.items():
                train_y = labels["train"][label]
                test_y = labels["test"][label]
                result = figures_of(task(x["train"], train_y, x["test"], test_y))
                scores[name, m, label, probe] = 100 * result[metric]
    return scores


# ---- the table, and the claims -------------------------------------------------------------------


def deviation(values: np.ndarray) -> float:
    """Standard deviation over the seeds; 0 for one seed."""
    return values.std(ddof=1) if len(values) > 1 else 0.0


def mean_and_sd(values: np.ndarray) -> str:
    """As text; the mean alone of one seed, which tells nothing of how others would do."""
    if len(values) == 1:
        return f"{values.item():.1f}"
    return f"{values.mean():.1f} ± {deviation(values):<4.1f}"


def report(scores: list[dict[Key, float]]) -> Values:
    """Print every number, mean and standard deviation over the seeds."""
    values = {}
    for key in scores[0]:
        values[key] = np.array([of_seed[key] for of_seed in scores])
    columns = sorted({key[2:] for key in values})
    heading = f"mean ± sd of {len(scores)} seeds, %" if len(scores) > 1 else "one seed, %"
    line = f"\n{heading:36}{'dim':>5}"
    for label, probe in columns:
        line += f"{label + ' ' + probe:>16}"
    print(line)
    for name, m in dict.fromkeys(key[:2] for key in values):
        line = f"{name:36}{m:>5}"
        for label, probe in columns:
            line += f"{mean_and_sd(values[name, m, label, probe]):>16}"
        print(line)
    return values


def check(text: str, difference: np.ndarray, least: float, strictly: bool = False) -> bool:
    """Print a difference in points and what is wanted of its mean -> whether it holds."""
    mean = difference.mean()
    holds = mean > least if strictly else mean >= least
    wanted = f"{'>' if strictly else '>='} {least:g}"
    word = "yes" if holds else "NO"
    print(f"  {text:66}{mean_and_sd(difference):>14}  wanted {wanted:8} {word}")
    return bool(holds)


def claims(values: Values, smaller: float) -> bool:
    """Print the three claims -> whether all hold in the mean over the seeds.

    smaller: per cent by which the student is smaller than a teacher
    """
    good = smaller >= 86
    print(f"\n(a) one small student ({smaller:.1f} % smaller) matches each teacher on its task")
    for label, teacher in TASKS.items():
        for probe in PROBES:
            student = values[BOTH, WIDTH, label, probe]
            difference = student - values[f"teacher {teacher}", TEACHER_WIDTH, label, probe]
            good &= check(f"student minus teacher, {label}, {probe}", difference, -3)
    print("(b) it lacks no teacher's half, unlike a student of one")
    for label, other in (("tissue", "toy_cells"), ("cells", "toy_tissue")):
        for probe in PROBES:
            student = values[BOTH, WIDTH, label, probe]
            difference = student - values[f"student of {other}", WIDTH, label, probe]
            good &= check(f"student minus student of {other}, {label}, {probe}", difference, 15)
    print("(c) its prefixes work on their own")
    low = DIMS[0]
    for label in TASKS:
        for probe in PROBES:
            nested = values[BOTH, low, label, probe]
            what = f"{label}, {probe}"
            flat = values[FLAT, low, label, probe]
            good &= check(f"first {low} channels, nested minus not, {what}", nested - flat, 10)
            cut = values[RANDOM, low, label, probe]
            text = f"first {low} channels minus a random projection to {low}, {what}"
            good &= check(text, nested - cut, 0, strictly=True)
            whole = values[BOTH, WIDTH, label, probe] - values[FLAT, WIDTH, label, probe]
            good &= check(f"all {WIDTH} channels, nested minus not, {what}", whole, -1)
    return good


# ---- the figure ----------------------------------------------------------------------------------


def draw_model(axes, values: Values, name: str, label: str, colour: str) -> None:
    """kNN accuracy of a model against the channels; a line across, where it has one dim alone."""
    dims = []
    means = []
    deviations = []
    for (model, m, task, probe), value in values.items():
        if (model, task, probe) == (name, label, "kNN"):
            dims.append(m)
            means.append(value.mean())
            deviations.append(deviation(value))
    if len(dims) == 1:
        axes.axhline(means[0], color=colour, linestyle="--", label=name)
        return
    low = np.subtract(means, deviations)
    high = np.add(means, deviations)
    axes.plot(dims, means, ".-", color=colour, label=name)
    axes.fill_between(dims, low, high, color=colour, alpha=0.2)


def draw(values: Values, file: Path) -> None:
    """A panel a task: mean over seeds, a band of one standard deviation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno figure: pip install matplotlib")
        return
    names = dict.fromkeys(key[0] for key in values)
    labels = sorted({key[2] for key in values})
    figure = Figure(figsize=(5 * len(labels), 4.2), layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False, sharey=True)[0]
    for axes, label in zip(panels, labels, strict=True):
        for number, name in enumerate(names):
            draw_model(axes, values, name, label, f"C{number}")
        axes.set(title=label, xlabel="channels", xscale="log")
        axes.set_xticks(DIMS, DIMS)
        axes.minorticks_off()
    metric = "accuracy" if len(labels) > 1 else "balanced accuracy"
    panels[0].set_ylabel(f"kNN {metric}, %")
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=120)
    print(f"\nfigure: {file}")


# ---- the command line ----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.miniature", __doc__)
    add = parser.add_argument
    add("--out", type=path, help="(default: runs/miniature, or runs/miniature-tiles)")
    add("--seeds", type=positive, default=3, help="(default: 3)")
    add("--steps", type=positive, help="of every student (default: train.py's)")
    add("--teacher-steps", type=positive, default=OFFLINE_STEPS, help="(default: %(default)s)")
    add("--tiles", type=path, metavar="DIR", help="labelled tiles: train/CLASS/*, test/CLASS/*")
    add("--weights-dir", type=path, help="of the teachers (default: runs/miniature/weights)")
    add("--tiny", action="store_true", help="one seed, four steps; its numbers mean nothing")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    default = "runs/miniature"
    args.weights_dir = Path(args.weights_dir or f"{default}/weights")
    args.out = Path(args.out or (f"{default}-tiles" if args.tiles else default))
    return args


def make_flags(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What all students are trained with: flags, and those that a resume takes as well."""
    flags = ["--teacher-steps", str(args.teacher_steps)]
    machine = ["--weights-dir", str(args.weights_dir)]
    if args.tiles:
        flags += ["--data", f"{args.tiles}/train"]
    if args.tiny:  # stopped one step early, for the last one would be followed by an evaluation
        flags += ["--steps", str(args.steps + 1)]
        machine += ["--stop-at", str(args.steps)]
        flags += ["--stats-tiles", "16", "--batch-size", "8"]
    elif args.steps:
        flags += ["--steps", str(args.steps)]
    return flags, machine


def main() -> None:
    """The command line."""
    args = parse_args()
    if args.tiny:
        evaluate.N_TILES = 64
    began = time.monotonic()
    train_all(args.out, args.seeds, *make_flags(args))
    print(f"trained in {(time.monotonic() - began) / 60:.1f} min; measuring", flush=True)
    scores = []
    for seed in range(args.seeds):
        scores.append(measure(args.out, args.weights_dir, seed, args.teacher_steps, args.tiles))
    values = report(scores)
    draw(values, args.out / "miniature.png")
    if not args.tiles:
        student, _ = load_student(run_folder(args.out, BOTH, 0))
        teacher = load_teacher("toy_cells", args.weights_dir, steps=args.teacher_steps)
        smaller = 100 - 100 * millions(student) / millions(teacher)
        if claims(values, smaller):
            print("\nall of it holds in the mean over seeds")
        else:
            print("\nNOT all of it holds: see the lines with NO")
    print(f"{(time.monotonic() - began) / 60:.1f} min in all")


if __name__ == "__main__":
    run_program(main)
