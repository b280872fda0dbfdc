"""Evaluation of frozen embeddings at every nested dim: students and teachers side by side.

    python evaluate.py runs/demo                        synthetic tissue, every task, beside the offline teachers
    python evaluate.py runs/a runs/b --data labelled/   several runs on tiles of your own
    python evaluate.py runs/demo --embed tiles/ --dim 16 --out embeddings.npz     embeddings for other tools
    python evaluate.py runs/demo --dim 16 --out student-16.pt                     the student cut to 16, for timm

Place in the data flow:  data.py -> student.py and teachers.py -> losses.py -> train.py -> [ evaluate.py ]
Features are taken after the final norm, cut to the first m channels, and only then normalised where a task does so."""

import json
import math
import os
import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid

import data
import teachers as cli
from data import InputError
from student import Student, load_student, millions, truncate
from teachers import OFFLINE, Teacher, load_teacher

TEMPERATURE, SHORTLIST, TOKENS = 0.07, 200, 100_000  # TOKENS: at most so many for the dense probe's fit
N_TILES = 2048  # of synthetic tissue, to learn from and again to test on
LABELS = {"class": "summary", "cells": "summary", "tissue": "summary", "mask": "patches", "nuclei": "patches"}


@torch.no_grad()
def embed(model: nn.Module, images: Tensor, batch_size: int = 64, kind: str = "summary") -> Tensor:
    """Float32, on the CPU, of images (n, 3, H, W): summary, a teacher's card embedding (n, D), or patches (n, N, D)."""
    device, card = next(model.parameters()).device, isinstance(model, Teacher) and kind == "summary"
    batches = (batch.to(device) for batch in images.split(batch_size))
    return torch.cat([(model.embed(batch) if card else model(batch)[kind]).float().cpu() for batch in batches])


def read(tiles: Dataset, label: str):
    """The readable tiles, in batches of 64."""
    workers = min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0
    for batch in data.batches(tiles, range(len(tiles)), 64, workers, label=f"embedding {label}"):
        readable = batch["index"] >= 0
        yield {key: values[readable] for key, values in batch.items()}


# ---- tasks: plain tensors in, metrics in [0, 1] out; x (n, D), y (n,) integers from 0 on ----------------------------
def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities (q, k) and indices (q, k) of the k nearest of the bank (all, if it has fewer), in order."""
    bank, k = F.normalize(bank.float(), dim=-1), min(k, len(bank))
    found = [(F.normalize(part.float(), dim=-1) @ bank.T).topk(k) for part in queries.split(1024)]  # bounds the matrix
    return torch.cat([similarity for similarity, _ in found]), torch.cat([index for _, index in found])


def vote(labels: Tensor, weights: Tensor) -> Tensor:
    """The label with the largest sum of weights. labels, weights: (q, k) -> (q,)."""
    totals = torch.zeros(len(labels), int(labels.max()) + 1)
    return totals.scatter_add_(1, labels, weights).argmax(-1)


def accuracies(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """predicted, truth: (n,) -> share of hits, and its mean over the classes that occur in `truth`."""
    hits = (predicted == truth).double()
    recalls = torch.stack([hits[truth == label].mean() for label in truth.unique()])
    return {"accuracy": hits.mean().item(), "balanced_accuracy": recalls.mean().item()}


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20) -> dict[str, float]:
    """k = 20 (at most the bank), cosine, votes weighted exp(similarity / 0.07), as in DINO (arXiv 2104.14294)."""
    similarity, index = nearest(train_x, test_x, k)
    return accuracies(vote(train_y[index], (similarity / TEMPERATURE).exp()), test_y)


def retrieval(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, float]:
    """Test queries train by cosine. Acc@n: a hit among the n nearest; mMV@5: majority of 5, ties to the nearest."""
    labels = train_y[nearest(train_x, test_x, 5)[1]]  # (q, 5)
    halves = 0.5 ** torch.arange(1, labels.shape[1] + 1)  # each above the sum of those after it, all below one vote
    metrics = {f"Acc@{n}": (labels[:, :n] == test_y[:, None]).any(-1).double().mean().item() for n in (1, 3, 5)}
    return metrics | {"mMV@5": accuracies(vote(labels, (1 + halves).expand(labels.shape)), test_y)["accuracy"]}


def adaptive_retrieval(train_x, train_y, test_x, test_y, dim: int, shortlist: int = SHORTLIST) -> dict[str, float]:
    """The 200 nearest at `dim` channels, re-ranked at all, as in MRL (2205.13147); work: its share of a full search."""
    (n, D), shortlist = train_x.shape, min(shortlist, len(train_x))
    candidates = nearest(**truncate({"bank": train_x, "queries": test_x}, dim), k=shortlist)[1]  # (q, shortlist)
    bank, queries, best = F.normalize(train_x.float(), dim=-1), F.normalize(test_x.float(), dim=-1), []
    for rows, part in zip(candidates.split(64), queries.split(64)):
        similarity = torch.einsum("qsd,qd->qs", bank[rows], part)
        best.append(rows.gather(1, similarity.argmax(-1, keepdim=True))[:, 0])
    work = 1.0 if dim == D else (n * dim + shortlist * D) / (n * D)
    return {"Acc@1": accuracies(train_y[torch.cat(best)], test_y)["accuracy"], "work": work}


def fit_linear(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Multinomial logistic regression of y (n,) on x (n, M), in float64 -> W (K, M), bias (K,), the classes (K,).
    Minimises sum_i CE_i + lambda / 2 ||W||^2, lambda = 100 / (M K), bias free. For K >= 3 this is scikit-learn's
    LogisticRegression(C=M*K/100); for K = 2 that one fits a single vector, and the same objective is C=2*M*K/100."""
    classes, y = y.unique(return_inverse=True)
    (n, M), K, mean = x.shape, len(classes), x.double().mean(0)
    x, decay = x.double() - mean, 100 / (M * K * n)  # everything divided by n
    # L-BFGS works on V, where W = P V and P P^T is about the inverse Hessian at zero: the same minimum, far fewer steps
    curvature, U = torch.linalg.eigh(x.T @ x / (n * K) + decay * torch.eye(M))
    P = U / curvature.sqrt()
    z = x @ P
    V, bias = (torch.zeros(rows, K, dtype=torch.float64, requires_grad=True) for rows in (M, 1))
    stop = {"max_iter": 5000, "max_eval": 10000, "tolerance_grad": 1e-7, "tolerance_change": 1e-13}
    optimizer = torch.optim.LBFGS([V, bias], history_size=100, line_search_fn="strong_wolfe", **stop)

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ V + bias, y) + decay / 2 * (P @ V).square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    W = (P @ V.detach()).T
    return W, bias.detach()[0] - W @ mean, classes


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, float]:
    """Logistic regression to convergence: sum of CE + 50 / (channels * classes) * ||W||^2, as `fit_linear` has it."""
    W, bias, classes = fit_linear(train_x, train_y)
    return accuracies(classes[(test_x.double() @ W.T + bias).argmax(-1)], test_y)


def overlap(confusion: Tensor) -> dict[str, float]:
    """mIoU and Dice, means over the classes that occur, from pixel counts (K, K), rows the truth, columns predicted."""
    hits, sizes = confusion.diagonal().double(), (confusion.sum(0) + confusion.sum(1)).double()
    metrics = {"mIoU": hits / (sizes - hits), "Dice": 2 * hits / sizes}
    return {name: values[sizes > 0].mean().item() for name, values in metrics.items()}


def dense_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, float]:
    """The linear probe on 100,000 patch tokens at most, labelled by their centre; logits enlarged; all test pixels.
    x: (n, N, D); y: masks (n, S, S) of class numbers 0 to 255."""
    grid = math.isqrt(train_x.shape[1])
    y = F.interpolate(train_y[:, None].float(), (grid, grid), mode="nearest-exact").flatten().long()  # (n * N,)
    some = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:TOKENS]
    W, bias, classes = fit_linear(train_x.flatten(0, 1)[some], y[some])
    confusion = torch.zeros(256 * 256, dtype=torch.long)
    for x, truth in zip(test_x.split(64), test_y.long().split(64)):
        logits = (x.double() @ W.T + bias).transpose(1, 2).unflatten(2, (grid, grid))  # (b, K, grid, grid)
        predicted = classes[F.interpolate(logits, truth.shape[1:], mode="bilinear").argmax(1)]  # (b, S, S)
        confusion += (256 * truth + predicted).flatten().bincount(minlength=256 * 256)
    return overlap(confusion.view(256, 256))


CLASS_TASKS = {"knn": knn, "linear": linear_probe, "retrieval": retrieval, "adaptive": adaptive_retrieval}
TASKS = CLASS_TASKS | {"dense": dense_probe}


def evaluate(models: dict, train: Dataset, test: Dataset, tasks: list[str]) -> list[dict]:
    """models: {name: (model, dims to cut it to)} -> rows {"model", "dim", ..., "scores": {label: {task: metrics}}}."""
    fits = {"summary": [t for t in tasks if t in CLASS_TASKS], "patches": [t for t in tasks if t not in CLASS_TASKS]}
    labels = {label: kind for label, kind in LABELS.items() if label in train[0] and fits[kind]}
    x, rows = {}, []  # {(model, kind) or label: {split: features or labels}}
    for split, tiles in {"train": train, "test": test}.items() if labels else ():
        seen = [
            {(k, kind): embed(models[k][0], batch["image"], kind=kind) for k in models for kind in {*labels.values()}}
            | {label: batch[label] for label in labels}
            for batch in read(tiles, split)
        ]
        x = {key: x.get(key, {}) | {split: torch.cat([part[key] for part in seen])} for key in seen[0]}
    for name, (model, dims) in models.items():
        parameters = round(1e6 * millions(model.backbone if isinstance(model, Student) else model))
        for m in dims:
            scores = {label: {} for label in labels}
            for label, task in ((label, task) for label, kind in labels.items() for task in fits[kind]):
                z, y = x[name, labels[label]], x[label]
                run, z = (partial(TASKS[task], dim=m), z) if task == "adaptive" else (TASKS[task], truncate(z, m))
                scores[label][task] = run(z["train"], y["train"], z["test"], y["test"])
            n = {split: len(y) for label in labels for split, y in x[label].items()}
            rows.append({"model": name, "parameters": parameters, "dim": m, "n": n, "scores": scores})
    return rows


def table(rows: list[dict], label: str) -> str:
    """Aligned text, in per cent: a line for each model and dim, a column for each task and metric."""
    columns = [(task, metric) for task, scores in rows[0]["scores"][label].items() for metric in scores]
    first = {task: metric for task, metric in reversed(columns)}  # of each task's columns
    width = max(34, *(len(row["model"]) for row in rows)) + 2
    tasks = "".join(f"{task if first[task] == metric else '':>10}" for task, metric in columns)
    metrics = "".join(f"{metric.removesuffix('_accuracy'):>10}" for _, metric in columns)
    head = f"{label}, %, {rows[0]['n']['train']} tiles to learn from, {rows[0]['n']['test']} to test"
    lines = [f"{head:{width + 16}}{tasks}", f"{'model':{width}}parameters   dim{metrics}"]
    for row in rows:
        values = "".join(f"{100 * row['scores'][label][task][metric]:>10.1f}" for task, metric in columns)
        lines.append(f"{row['model']:{width}}{row['parameters'] / 1e6:>8.3f} M{row['dim']:>6}{values}")
    return "\n".join(lines)


def report(models: dict, runs: list[Path], root: str | None, seed: int, tasks=tuple(TASKS)) -> list[dict]:
    """Evaluate on a labelled folder or on synthetic tissue; print; add to each run's results.json; draw its figures."""
    title, name = root or "synthetic tissue", re.sub(r"\W+", "-", root or "synthetic tissue").strip("-") or "data"
    files, rows, unreadable = data.labelled_files(root) if root else {"train": "bank", "test": "test"}, [], set()
    folders = {run if run.is_dir() else run.parent for run in runs}
    sizes = {k: m.backbone.img_size if isinstance(m, Student) else m.card_size for k, (m, _) in models.items()}
    for size in dict.fromkeys(sizes.values()):  # each model sees tiles of its own size
        group = {key: models[key] for key in models if sizes[key] == size}
        if root:
            tiles = [data.CentreTiles(root, size, *listed) for listed in files.values()]
        else:
            tiles = [Subset(data.TissueTiles(stream, seed, size), range(N_TILES)) for stream in files.values()]
        rows += evaluate(group, *tiles, tasks)
        unreadable |= {path for split in tiles for path in getattr(split, "unreadable", [])}
        for folder in folders:
            draw_patches(group, tiles[1], folder / f"patches-{name}-{size}px.png")
    if not rows[0]["scores"]:
        raise InputError(f"--tasks: {root} holds {'classes, no masks' if 'dense' in tasks else 'masks, no classes'}")
    print(*("\n" + table(rows, label) for label in rows[0]["scores"]), sep="\n")
    result = {"protocol": {task: TASKS[task].__doc__ for scores in rows[0]["scores"].values() for task in scores}}
    result["tiles"] = "shorter side to the model's size, centre crop" if root else "drawn at the model's size"
    result |= {"seed": seed, "unreadable": sorted(unreadable), "torch": torch.__version__, "numpy": np.__version__}
    for folder in folders:
        file = folder / "results.json"
        try:
            earlier = json.loads(file.read_text()) if file.exists() else {}
            results = json.dumps({**earlier, title: result | {"rows": rows}}, indent=1).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}; move it") from None
        data.save_atomically(results, file, lambda content, out: out.write(content))
        print(f"{file} and pictures beside it: {title}{', instead of its earlier rows' if title in earlier else ''}")
        draw_curves(rows, folder / "log.jsonl", folder / f"curves-{name}.png")
    return rows


def draw_curves(rows: list[dict], log: Path, file: Path) -> None:
    """A panel a label, its first metric against the dims; then the run's loss and cosines, from its log.jsonl."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no curves are drawn without matplotlib: pip install matplotlib")
    panels = defaultdict(lambda: defaultdict(dict))  # {title: {line: {x: y}}}
    for row in rows:
        for label, tasks in row["scores"].items():
            task, metric = next((task, metric) for task in tasks for metric in tasks[task])
            panels[f"{label}: {task} {metric}, %"][row["model"]][row["dim"]] = 100 * tasks[task][metric]
    lines = log.read_text().splitlines() if log.exists() else []
    for line in (json.loads(line) for line in lines if line.endswith("}")):  # a power cut can leave half a line
        panels["training loss"]["loss"][line["step"]] = line["loss"]
        for term, dim in ((term, dim) for term, values in line["terms"].items() for dim in values if "cos" in term):
            panels["cosine to the teacher"][f"{term}, {dim} channels"][line["step"]] = line["terms"][term][dim]
    figure, dims = Figure(figsize=(5 * len(panels), 4), layout="constrained"), sorted({row["dim"] for row in rows})
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for label, points in lines.items():  # a teacher is not cut: a level line
            xs, style = (list(points), ".-") if len(points) > 1 else ([dims[0], dims[-1]], "--")
            axes.plot(xs, [*points.values()] * (len(xs) // len(points)), style, label=label)
        axes.set(title=title, xlabel="channels" if "%" in title else "step", xscale="log" if "%" in title else "linear")
        if "%" in title:
            axes.set_xticks(dims, dims, minor=False)
        axes.legend(fontsize="small")
    figure.savefig(file)


def draw_patches(models: dict, tiles: Dataset, file: Path) -> None:
    """A row a tile: the tile, then each model's patch tokens, their first three principal components as RGB."""
    images = torch.stack([tiles[k]["image"] for k in range(min(4, len(tiles)))])
    columns = {"tile": images / 255}
    for name, (model, _) in models.items():
        z = embed(model, images, kind="patches")  # (4, N, D)
        colours = (z - z.mean((0, 1))) @ torch.linalg.eigh(z.flatten(0, 1).T.cov())[1][:, -3:]  # (4, N, 3)
        low, high = colours.flatten(0, 1).quantile(torch.tensor([0.02, 0.98]), 0)
        colours = ((colours - low) / (high - low).clamp(min=1e-9)).clamp(0, 1).transpose(1, 2)
        columns[name] = colours.unflatten(2, (math.isqrt(z.shape[1]), -1))
    cells = torch.stack([F.interpolate(column, (224, 224)) for column in columns.values()], 1).flatten(0, 1)
    sheet = TF.to_pil_image(make_grid(cells, nrow=len(columns), padding=4, pad_value=1))
    for i, name in enumerate(columns):
        ImageDraw.Draw(sheet).text((10 + 228 * i, 8), name, "black", stroke_width=2, stroke_fill="white")
    sheet.save(file)


def main() -> None:
    parser = cli.OneLineParser("evaluate.py", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run folder or a student.pt; several stand side by side")
    add("--data", type=cli.path, help=f"a folder of {data.LABELLED} (default: synthetic tissue)")
    add("--tasks", type=cli.name_list, default=[*TASKS], help=f"of {', '.join(TASKS)} (default: all that fit)")
    add("--dims", type=cli.dim_list, help="comma-separated (default: each run's nested dims)")
    add("--teachers", type=cli.name_list, help="beside the runs, '' for none (default: the last run's, where offline)")
    add("--embed", type=cli.path, metavar="DIR", help="instead, write the embeddings of all tiles of a folder to --out")
    add("--dim", type=cli.positive, help="channels to keep, with --embed (default: all) or in a student.pt at --out")
    add("--half", action="store_true", help="with --embed: fp16 instead of fp32")
    add("--out", type=cli.path, metavar="FILE", help="with --embed: the .npz to write; with --dim alone: the .pt")
    add("--seed", type=cli.natural, default=0, help="of the synthetic tissue (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the best at hand)")
    add("--weights-dir", type=cli.path, default="weights", help="where teachers' weights are (default: weights)")
    args, models = parser.parse_args(), {}
    device, _ = cli.choose_device(args.device)
    if not args.tasks or not {*args.tasks} <= TASKS.keys():
        raise InputError(f"--tasks: choose from {', '.join(TASKS)}")
    for run in args.runs:
        student, config = load_student(run, device)
        width = student.backbone.width
        for flag, dim in (("--dims", args.dims and args.dims[-1]), ("--dim", args.dim)):
            if dim and dim > width:
                raise InputError(f"{flag}: {dim} is above the width of {run}; give at most {width}")
        if config["step"] < config["steps"]:
            print(f"note: {run} has done {config['step']} of its {config['steps']} steps")
        models[run] = (student, args.dims or student.nested_dims)
    if args.embed or args.out or args.dim:
        if len(args.runs) > 1 or not args.out or not (args.embed or args.dim):
            raise InputError("--out: give one RUN and --embed DIR --out X.npz, or --dim M --out X.pt")
        if Path(args.out).exists():
            raise InputError(f"--out: {args.out} exists; choose another name, or remove it")
        if args.embed:  # embeddings (n, dim), paths (n,) of the readable tiles, and what made them
            tiles = data.CentreTiles(args.embed, student.backbone.img_size, data.list_tiles(args.embed, "--embed"))
            dim, paths = args.dim or width, []
            embeddings = np.empty((len(tiles), dim), np.float16 if args.half else np.float32)
            for batch in read(tiles, args.embed):
                features = truncate({"summary": embed(student, batch["image"])}, dim)["summary"]
                embeddings[len(paths) : len(paths) + len(features)] = features
                paths += [tiles.files[i] for i in batch["index"]]
            licences = [f"{name}: {text}" for name, text in (config.get("licences") or config["teachers"]).items()]
            content = {"embeddings": embeddings[: len(paths)], "paths": paths, "dim": dim, "licences": licences}
            content |= {"model": config["student"], "step": config["step"]}
            data.save_atomically(content, args.out, lambda content, file: np.savez(file, **content))
            return print(f"{len(paths)} embeddings of {dim} channels in {args.out}; licences: {'; '.join(licences)}")
        state = student.backbone.state_dict()  # where the last norm is zero the ViT gives zeros, in timm too
        state["norm.weight"][args.dim :], state["norm.bias"][args.dim :] = 0, 0
        config["nested_dims"] = [m for m in config["nested_dims"] if m < args.dim] + [args.dim]
        data.save_atomically({"state_dict": state, "config": config}, args.out)
        return print(f"{args.out}: the student cut to {args.dim} channels; the others are zero")
    for name in [x for x in config["teachers"] if x in OFFLINE] if args.teachers is None else args.teachers:
        teacher = load_teacher(name, args.weights_dir, device, **config["teacher_recipe"])
        models[f"teacher {name}"] = (teacher, [teacher.embed_dim])
    report(models, [Path(run) for run in args.runs], args.data, args.seed, args.tasks)


if __name__ == "__main__":
    cli.run_main(main)
