"""The paper's three claims in miniature: drawn tissue, two offline teachers, four students, three seeds, no download.

    python tests/miniature.py                                 at most 40 minutes on 2 CPU cores, from nothing
    python tests/miniature.py --tiles labelled/ --steps 500   the same students on real, labelled tiles

For every seed (of teachers, students, tiles) it trains, with train.py's own command line, a student of both teachers,
one of each teacher alone, and one of both without nesting (--dims 48), then prints, mean and standard deviation:

  (a) the student beside its teachers, each on the task that it knows
  (b) the student beside the students of one teacher, on the task that this teacher does not know
  (c) its first m channels beside those of the student without nesting, and beside two cuts of its own whole embedding:
      a random projection and PCA, to m channels

A toy: it shows what the method does and says nothing about real tissue. With --tiles, students learn from DIR/train
without its labels, the teachers stay those of drawn tissue, and colour histograms stand beside the embeddings.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import evaluate
from student import load_student, truncate
from teachers import load_teacher

TASKS = {"cells": "toy_cells", "tissue": "toy_tissue"}  # label -> the teacher that knows it
STUDENTS = {  # name -> flags of train.py
    "student of toy_cells": ["--teachers", "toy_cells"],
    "student of toy_tissue": ["--teachers", "toy_tissue"],
    "student of both": [],
    "student of both, not nested": ["--dims", "48"],
}
DIMS = [2, 4, 8, 16, 48]
PROBES = {"kNN": evaluate.knn, "linear": evaluate.linear_probe}
Scores = dict[tuple[str, int, str, str], float]  # (model, dim, label, probe) -> per cent


def folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def train(out: Path, weights: Path, seeds: range, flags: list[str]) -> None:
    """All students of all seeds, two at a time with one thread each: faster than one after the other with two."""

    def run(job: tuple[str, int]) -> None:
        name, seed = job
        run_folder, began = folder(out, name, seed), time.monotonic()
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            *STUDENTS[name],
            "--seed",
            str(seed),
            *flags,
        ]
        command += ["--teacher-seed", str(seed), "--weights-dir", str(weights)]
        # an earlier call may have been interrupted: its runs go on, and with other flags they are refused
        command += ["--resume" if (run_folder / "last.pt").exists() else "--out", str(run_folder)]
        result = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise SystemExit(f"{' '.join(command)}\n{result.stderr}")
        print(f"  {run_folder}: {time.monotonic() - began:.0f} s", flush=True)

    names = list(STUDENTS)
    for stage in (
        names[:2],
        names[2:],
    ):  # the students of one teacher first: each trains that teacher, once
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, [(name, seed) for seed in seeds for name in stage]))


def features(out: Path, weights: Path, seed: int, steps: int, tiles: dict[str, Tensor]) -> dict:
    """{model: {split: (n, D)}} of the four students and the two teachers, on {split: images}."""
    models = {name: load_student(folder(out, name, seed))[0] for name in STUDENTS}
    models |= {
        f"teacher {name}": load_teacher(name, weights, steps=steps, seed=seed)
        for name in TASKS.values()
    }
    return {
        name: {split: evaluate.embed(model, images) for split, images in tiles.items()}
        for name, model in models.items()
    }


def cuts(x: dict[str, dict[str, Tensor]], seed: int) -> dict[tuple[str, int], dict[str, Tensor]]:
    """{(model, dim): {split: (n, dim)}}: prefixes; random and principal projections of the nested embedding."""
    found = {(name, f["train"].shape[1]): f for name, f in x.items() if name.startswith("teacher")}
    found |= {(name, m): truncate(x[name], m) for name in STUDENTS for m in DIMS}
    whole = x["student of both"]
    mean = whole["train"].mean(0)
    principal = (
        torch.linalg.eigh((whole["train"] - mean).T.double().cov())[1].flip(1).float()
    )  # (D, D), largest first
    random = torch.randn(
        whole["train"].shape[1], DIMS[-1], generator=torch.Generator().manual_seed(seed)
    )
    for m in DIMS[:-1]:
        found["student of both, PCA", m] = {
            split: (z - mean) @ principal[:, :m] for split, z in whole.items()
        }
        found["student of both, random projection", m] = {
            split: z @ random[:, :m] for split, z in whole.items()
        }
    return found


def histograms(images: Tensor) -> Tensor:
    """Colour histograms (n, 3 * 16), 16 bins a channel: what stain and brightness alone can tell."""
    bins = (images.long() // 16).flatten(2)  # (n, 3, pixels)
    return torch.stack([(bins == value).float().mean(-1) for value in range(16)], -1).flatten(1)


def labelled(tiles: str, size: int = 64) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """{split: images (n, 3, size, size)}, {split: {"class": (n,)}} of a labelled folder."""
    images, labels = {}, {}
    for split, (files, targets) in data.labelled_files(tiles).items():
        found = evaluate.CentreTiles(tiles, size, files, targets)
        images[split] = torch.stack([found[k]["image"] for k in range(len(found))])
        labels[split] = {"class": torch.tensor(targets["class"])}
    return images, labels


def synthetic(seed: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    drawn = {
        s: data.TissueTiles(stream, seed).draw(evaluate.N_TILES)
        for s, stream in (("train", "bank"), ("test", "test"))
    }
    return {s: d["image"] for s, d in drawn.items()}, {
        s: {label: d[label] for label in TASKS} for s, d in drawn.items()
    }


def measure(out: Path, weights: Path, seed: int, steps: int, tiles: str | None) -> Scores:
    images, labels = labelled(tiles) if tiles else synthetic(seed)
    found = cuts(features(out, weights, seed, steps, images), seed)
    if tiles:
        found["colour histograms", 48] = {split: histograms(x) for split, x in images.items()}
    metric = "balanced_accuracy" if tiles else "accuracy"
    return {
        (name, m, label, probe): 100
        * f(x["train"], labels["train"][label], x["test"], labels["test"][label])[metric]
        for (name, m), x in found.items()
        for label in labels["train"]
        for probe, f in PROBES.items()
    }


def report(scores: list[Scores]) -> dict[tuple[str, int, str, str], np.ndarray]:
    """Print every number, mean ± standard deviation over seeds -> {key: (seeds,)}."""
    values = {key: np.array([s[key] for s in scores]) for key in scores[0]}
    columns = sorted({key[2:] for key in values})
    print(
        f"\n{'mean ± sd of ' + str(len(scores)) + ' seeds, %':36}{'dim':>5}"
        + "".join(f"{' '.join(c):>16}" for c in columns)
    )
    for name, m in dict.fromkeys(key[:2] for key in values):
        cells = (values[name, m, *column] for column in columns)
        print(
            f"{name:36}{m:>5}"
            + "".join(f"{v.mean():>10.1f} ± {v.std(ddof=min(1, len(v) - 1)):<3.1f}" for v in cells)
        )
    return values


def claims(values: dict[tuple[str, int, str, str], np.ndarray], smaller: float) -> bool:
    """The three claims as differences in points, mean ± sd over seeds, with what the issue asked of each."""
    held, D, low = [], DIMS[-1], DIMS[0]

    def line(text: str, difference: np.ndarray, wanted: str, good: bool) -> None:
        held.append(good)
        spread = difference.std(ddof=min(1, len(difference) - 1))
        print(
            f"  {text:66}{difference.mean():>7.1f} ± {spread:<4.1f}  wanted {wanted:8} {'yes' if good else 'NO'}"
        )

    print(
        f"\n(a) one small student ({smaller:.1f} % smaller) matches each teacher on the task that it knows"
    )
    held.append(smaller >= 86)
    for label, teacher in TASKS.items():
        for probe in PROBES:
            d = (
                values["student of both", D, label, probe]
                - values[f"teacher {teacher}", 128, label, probe]
            )
            line(f"student minus teacher, {label}, {probe}", d, ">= -3", d.mean() >= -3)
    print("(b) it lacks no teacher's half, unlike a student of one")
    for label, other in (("tissue", "toy_cells"), ("cells", "toy_tissue")):
        for probe in PROBES:
            d = (
                values["student of both", D, label, probe]
                - values[f"student of {other}", D, label, probe]
            )
            line(f"student minus student of {other}, {label}, {probe}", d, ">= 15", d.mean() >= 15)
    print("(c) its prefixes work on their own")
    for label in TASKS:
        for probe in PROBES:
            nested = values["student of both", low, label, probe]
            d = nested - values["student of both, not nested", low, label, probe]
            line(
                f"first {low} channels, nested minus not, {label}, {probe}",
                d,
                ">= 10",
                d.mean() >= 10,
            )
            d = nested - values["student of both, random projection", low, label, probe]
            line(
                f"first {low} channels minus a random projection to {low}, {label}, {probe}",
                d,
                "> 0",
                d.mean() > 0,
            )
            d = (
                values["student of both", D, label, probe]
                - values["student of both, not nested", D, label, probe]
            )
            line(
                f"all {D} channels, nested minus not, {label}, {probe}", d, ">= -1", d.mean() >= -1
            )
    return all(held)


def draw(values: dict[tuple[str, int, str, str], np.ndarray], file: Path) -> None:
    """kNN accuracy against the dim, a panel a task: mean over seeds, a band of one standard deviation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no figure without matplotlib: pip install matplotlib")
    labels = sorted({key[2] for key in values})
    figure = Figure(figsize=(5 * len(labels), 4.2), layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False, sharey=True)[0]
    for axes, label in zip(panels, labels):
        for colour, name in enumerate(dict.fromkeys(key[0] for key in values)):
            points = {
                m: values[n, m, x, p] for n, m, x, p in values if (n, x, p) == (name, label, "kNN")
            }
            mean, sd = ([float(f(v)) for v in points.values()] for f in (np.mean, np.std))
            if len(points) == 1:
                axes.axhline(*mean, color=f"C{colour}", linestyle="--", label=name)
                continue
            axes.plot(list(points), mean, ".-", color=f"C{colour}", label=name)
            axes.fill_between(
                list(points), np.subtract(mean, sd), np.add(mean, sd), color=f"C{colour}", alpha=0.2
            )
        axes.set(title=label, xlabel="channels", xscale="log")
        axes.set_xticks(DIMS, DIMS)
        axes.minorticks_off()
    panels[0].set_ylabel("kNN accuracy, %" if len(labels) > 1 else "kNN balanced accuracy, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small"
    )
    figure.savefig(file, dpi=120)
    print(f"\nfigure: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder (default: runs/miniature, with --tiles runs/miniature-tiles)",
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every student (default: train.py's)")
    parser.add_argument(
        "--teacher-steps", type=int, default=500, help="of the offline teachers (default: 500)"
    )
    parser.add_argument(
        "--tiles",
        metavar="DIR",
        help="a labelled folder of real tiles: train/CLASS/* and test/CLASS/*",
    )
    parser.add_argument(
        "--weights-dir", type=Path, default=Path("runs/miniature/weights"), help="of the teachers"
    )
    args = parser.parse_args()
    out = args.out or Path("runs/miniature-tiles" if args.tiles else "runs/miniature")
    flags = ["--data", f"{args.tiles}/train"] if args.tiles else []
    for flag in ("steps", "teacher_steps"):
        flags += (
            [f"--{flag.replace('_', '-')}", str(getattr(args, flag))] if getattr(args, flag) else []
        )
    began = time.monotonic()
    train(out, args.weights_dir, range(args.seeds), flags)
    print(f"trained in {(time.monotonic() - began) / 60:.1f} min; measuring", flush=True)
    values = report(
        [
            measure(out, args.weights_dir, seed, args.teacher_steps, args.tiles)
            for seed in range(args.seeds)
        ]
    )
    draw(values, out / "miniature.png")
    if not args.tiles:
        student, teacher = (
            load_student(folder(out, "student of both", 0))[0],
            load_teacher("toy_cells", args.weights_dir, steps=args.teacher_steps),
        )
        parameters = [
            sum(p.numel() for p in model.parameters()) for model in (student.backbone, teacher)
        ]
        good = claims(values, 100 - 100 * parameters[0] / parameters[1])
        print(
            "\nall of it holds in the mean over seeds"
            if good
            else "\nNOT all of it holds: see the lines with NO"
        )
    print(f"{(time.monotonic() - began) / 60:.1f} min in all")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
