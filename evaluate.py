"""Evaluation: what a student's frozen embeddings know, at every nested dim, beside its teachers.

    python evaluate.py runs/demo                          drawn tissue, beside the offline teachers
    python evaluate.py runs/a runs/b --data labelled/     several runs on tiles of your own
    python evaluate.py runs/demo --embed tiles/ --dim 16 --out embeddings.npz

The models stay as they are. Features are taken once, after the final norm; for every nested dim m
they are cut to their first m channels, and only then normalised, where a task normalises. The
numbers are printed, then added to results.json in the folder of each run, or in the folder --out.

Tasks (PROTOCOLS has them in words): knn, linear and retrieval ask whether the summary
knows the class of a tile, adaptive whether a small cut finds what the whole embedding finds; dense
asks whether patch tokens know a mask. Pictures are drawn by `python -m extras.figures`; what
`python -m extras.export` writes for timm is a RUN too.

Read on from `run_tasks`: it goes from tiles to the rows of the table. The tasks themselves are
plain functions of tensors, tested against scikit-learn and against plain loops.
"""

import csv
import io
import json
import os
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import data
from data import (
    UnreadableTile,
    check_size,
    dim_list,
    list_tiles,
    make_parser,
    name_list,
    natural,
    open_tile,
    path,
    positive,
    read_file,
    run_program,
    save_atomically,
)
from student import InputError, Student, millions, truncate
from teachers import (
    OFFLINE,
    Teacher,
    choose_device,
    find_weights,
    load_strictly,
    load_teacher,
    read_student,
    student_file,
)

N_TILES = 2048  # of drawn tissue, to learn from and again to test on

TOKENS = 100_000  # the most patch tokens that the dense probe is fitted on
SIMILARITIES = 2**24  # of queries and bank that are in memory at a time: 128 MB
WORKERS = min(8, torch.get_num_threads()) if torch.cuda.is_available() else 0  # that read tiles
DRAWN = "synthetic tissue"  # the title of results without --data
LAYOUTS = "train/CLASS/* and test/CLASS/*, labels.csv (path, label, split), or images/* and masks/*"

# What tiles can be labelled with, and the tokens that are asked for it.
LABELS = {
    "class": "summary",
    "cells": "summary",
    "tissue": "summary",
    "mask": "patches",
    "nuclei": "patches",
}


# ---- models and their features -------------------------------------------------------------------


class CutStudent(Student):
    """A student whose tokens end at the first `dim` channels, and whose width that is."""

    def __init__(self, arch: dict, dim: int):
        super().__init__(arch)
        self.width = dim

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return truncate(super().forward(images), self.width)


def load_student(path: str | Path) -> tuple[Student, dict]:
    """A trained student -> (the student, on the CPU; its config).

    path: a run folder, its student.pt, or a folder that extras.export wrote.
    config holds "student" (its name), "arch", "nested_dims", "step", "steps", "teachers",
    "licences". InputError: there is none, or the file is something else.
    """
    file = student_file(path)
    remedy = "give the folder of a run that has saved, or its student.pt"
    if not file.exists():
        raise InputError(f"{file} does not exist; {remedy}")
    content = read_student(file)
    config = content.get("config")
    needed = {"arch", "nested_dims", "step", "steps", "teachers", "student"}
    if not isinstance(config, dict) or not needed <= config.keys():
        raise InputError(f"{file} is not a student.pt written by train.py; {remedy}")
    student = CutStudent(config["arch"], max(config["nested_dims"]))  # the width, where not cut
    load_strictly(student.backbone, content.get("state_dict", {}), str(file))
    return student.eval(), config


def embed(model: nn.Module, images: Tensor, batch_size: int = 64, kind: str = "summary") -> Tensor:
    """Features of images (n, 3, H, W) -> (n, D), or with kind "patches" (n, N, D); see features."""
    parts = []
    for batch in images.split(batch_size):
        parts.append(features(model, batch, [kind])[kind])
    return torch.cat(parts)


@torch.no_grad()
def features(model: nn.Module, images: Tensor, kinds: Iterable[str]) -> dict[str, Tensor]:
    """What a model gives for images (B, 3, H, W) -> {kind: float32 on the CPU}.

    kinds: "summary" (B, D), of a teacher the embedding that its card recommends; "patches"
    (B, N, D).
    """
    images = images.to(next(model.parameters()).device)
    tokens = {}
    if isinstance(model, Teacher):
        if "summary" in kinds:
            tokens["summary"] = model.embed(images)
        if "patches" in kinds:
            tokens["patches"] = model(images)["patches"]
    else:
        tokens = model(images)
    return {kind: tokens[kind].float().cpu() for kind in kinds}


# ---- labelled tiles ------------------------------------------------------------------------------


def labelled_files(root: str | Path) -> dict[str, tuple[list[str], dict[str, list]]]:
    """A labelled folder -> {"train": (files, targets), "test": (files, targets)}.

    files: paths relative to `root`, in a mixed order that is always the same, so that no class is
    always the earlier one where neighbours are equally near. targets: {"class":
    numbers} or {"mask": paths}, one a file. Three layouts are understood, see LAYOUTS; labels.csv
    comes before folders. InputError: a split has no tiles, one has masks and the other classes, or
    a tile of the test set is of a class that the training set has not.
    """
    root = Path(root)
    labels = None
    if (root / "labels.csv").exists():
        labels = read_labels(root / "labels.csv")
    found = {}
    classes = []
    for split in ("train", "test"):
        kind = "class"
        top = split if (root / split).is_dir() else "."
        if labels is not None:
            pairs = labels.get(split, [])
        elif (root / top / "masks").is_dir():
            kind = "mask"
            pairs = masked_files(root, top, split)
        elif top == split:
            pairs = class_files(root, split)
        else:
            pairs = []
        if not pairs:
            raise InputError(
                f"--data: {root} has no tiles for {split}; a labelled folder holds {LAYOUTS}"
            )
        if found and kind not in found["train"][1]:
            raise InputError(
                f"--data: {root} has masks for one split and classes for the other; give one kind"
            )
        mixed = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
        files = [file for file, _ in mixed]
        targets = [label for _, label in mixed]
        if kind == "class":
            if split == "train":
                classes = sorted(set(targets) - {""})
            targets = class_numbers(root, files, targets, classes)
        found[split] = (files, {kind: targets})
    return found


def read_labels(table: Path) -> dict[str, list[tuple[str, str]]]:
    """labels.csv, with columns path, label, split -> {split: [(path, label), ...]}."""
    csv.field_size_limit(2**31 - 1)  # a quote never closed: a row without a split, no csv.Error
    text = table.read_text("utf-8-sig", "surrogateescape")
    splits = {}
    for row in csv.DictReader(text.split("\n"), skipinitialspace=True):
        file = row.get("path")
        label = (row.get("label") or "").strip()
        split = (row.get("split") or "").strip()
        if file:
            splits.setdefault(split, []).append((file, label))
    return splits


def masked_files(root: Path, top: str, split: str) -> list[tuple[str, str]]:
    """Images and masks of the same name -> [(image, mask), ...].

    Without folders train/ and test/ (`top` is then "."), the last fifth of the images is the test
    set. An image without a mask is paired with a path that does not exist, so that it is named as
    unreadable.
    """
    _, images = list_tiles([root / top / "images"], "--data")
    _, masks = list_tiles([root / top / "masks"], "--data")
    mask_of = {}
    for mask in masks:
        mask_of[os.path.splitext(mask)[0]] = mask
    pairs = []
    for image in images:
        mask = mask_of.get(os.path.splitext(image)[0], image)
        pairs.append((f"{top}/images/{image}", f"{top}/masks/{mask}"))
    if top == split:
        return pairs
    cut = len(pairs) - max(1, len(pairs) // 5)
    if split == "train":
        return pairs[:cut]
    return pairs[cut:]


def class_files(root: Path, split: str) -> list[tuple[str, str]]:
    """Tiles of SPLIT/CLASS/, at any depth below -> [(file, class), ...]; class "": in no folder."""
    _, names = list_tiles([root / split], "--data")
    pairs = []
    for name in names:
        folder, slash, _ = name.partition("/")
        pairs.append((f"{split}/{name}", folder if slash else ""))
    return pairs


def class_numbers(root: Path, files: list[str], labels: list[str], classes: list[str]) -> list[int]:
    """The place of each label among the classes of the training set."""
    numbers = []
    for file, label in zip(files, labels, strict=True):
        if label not in classes:
            raise InputError(
                f"--data: {root}/{file} is in none of the classes of train; move or remove it"
            )
        numbers.append(classes.index(label))
    return numbers


def open_mask(path: str | Path) -> Image.Image:
    """A mask as class numbers 0 to 255, mode L. UnreadableTile: it is none, and why.

    A mask has one channel, or three that are equal. JPEG changes numbers, so a JPEG has to be
    plainly black and white: then black is 0 and white is 1.
    """
    try:
        with Image.open(io.BytesIO(read_file(path))) as image:
            check_size(image.width, image.height)
            is_jpeg = image.format == "JPEG"
            numbers = np.array(image.convert("L") if is_jpeg else image)
    except UnreadableTile:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow raises a dozen types on damaged files
        raise UnreadableTile(f"damaged ({type(error).__name__})") from None
    if is_jpeg:
        numbers = black_and_white(numbers)
    if numbers.ndim == 3 and (numbers[..., :1] == numbers[..., :3]).all():  # grey, saved as RGB
        numbers = numbers[..., 0]
    if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
        raise UnreadableTile("a mask has one channel of class numbers")
    if numbers.min() < 0 or numbers.max() > 255:
        raise UnreadableTile("a mask has class numbers from 0 to 255")
    return Image.fromarray(numbers.astype(np.uint8))


def black_and_white(grey: np.ndarray) -> np.ndarray:
    """Grey values (H, W) of a JPEG that is black and white but for its blur -> bool (H, W)."""
    between = (grey > 32) & (grey < 223)
    has_white = grey.max() >= 223
    all_black = grey.max() == 0
    if between.mean() > 0.02 or not (has_white or all_black):
        raise UnreadableTile("a JPEG changes class numbers; save masks as PNG")
    return grey > 127


class CentreTiles(Dataset):
    """Tile k of `files` -> {"image": uint8 (3, size, size), "index": k, and its target}.

    The shorter side is resized to `size`, and the centre taken. targets: {"class": numbers} or
    {"mask": paths}, one a file; a mask becomes numbers (size, size), cut as its tile is.
    An unreadable tile or mask has index -1, and "path: reason" under "unreadable", as FolderTiles.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,
        files: list[str],
        targets: dict[str, list] | None = None,
    ):
        self.root = Path(root)
        self.size = size
        self.files = files
        self.targets = targets or {}
        self.unreadable = set()  # filled by data.batches

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> dict:
        path = self.root / self.files[k]
        mask = None
        try:
            image = open_tile(path)
            if "mask" in self.targets:
                path = self.root / self.targets["mask"][k]
                mask = open_mask(path)
                if mask.size != image.size:
                    raise UnreadableTile("a mask is as large as its tile")
        except UnreadableTile as reason:
            item = {"index": -1, "unreadable": [f"{str(path)!r}: {reason}"]}
            image = Image.new("RGB", (1, 1))
            mask = Image.new("L", (1, 1))
        else:
            item = {"index": k, "unreadable": []}
        item["image"] = self.centre(image, "bicubic")
        if "class" in self.targets:
            item["class"] = self.targets["class"][k]
        if "mask" in self.targets:
            item["mask"] = self.centre(mask, "nearest")[0]  # (size, size)
        return item

    def centre(self, image: Image.Image, mode: str) -> Tensor:
        """The shorter side to `size`, then the centre -> (channels, size, size)."""
        # here, for it takes seconds to import: drawn tissue needs no resize
        from torchvision.transforms import functional as TF

        image = TF.resize(image, self.size, TF.InterpolationMode(mode))
        return TF.pil_to_tensor(TF.center_crop(image, self.size))


def readable_batches(tiles: Dataset, title: str) -> Iterator[dict]:
    """All tiles in batches, with progress under a title; unreadable ones are named and left out."""
    for batch in data.batches(tiles, range(len(tiles)), 64, WORKERS, label=title):
        if "index" in batch:  # drawn tissue has none, and is always readable
            readable = batch["index"] >= 0
            batch = {key: values[readable] for key, values in batch.items()}
        yield batch


# ---- the tasks: plain tensors in, numbers out ----------------------------------------------------


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of the bank most similar to each query, by cosine in float64, nearest first.

    bank: (n, D), queries: (q, D) -> similarities (q, k) and places in the bank (q, k), with k at
    most n. Of equally similar rows the earlier in the bank is nearer.
    """
    k = min(k, len(bank))
    bank = F.normalize(bank.double(), dim=-1)
    queries = F.normalize(queries.double(), dim=-1)
    # A matrix product rounds equal rows differently at different places. So where there are any,
    # each distinct row is multiplied once, and its similarity copied to where it stands.
    distinct, place = torch.unique(bank, dim=0, return_inverse=True)
    has_equal_rows = len(distinct) < len(bank)
    similarities = []
    indices = []
    rows = max(1, SIMILARITIES // len(bank))  # queries at a time
    for part in queries.split(rows):
        if has_equal_rows:
            similarity = (part @ distinct.T)[:, place]  # (rows, n)
        else:
            similarity = part @ bank.T  # (rows, n)
        values, index = largest(similarity, k)
        similarities.append(values)
        indices.append(index)
    return torch.cat(similarities), torch.cat(indices)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x (q, n), in order, and their places; of equals the earlier."""
    values, index = x.topk(min(k + 1, x.shape[1]))
    if index.shape[1] > k:
        # Of several that equal the k-th, topk takes any. Where the next does, sort the whole row.
        tied = values[:, k] == values[:, k - 1]
        index = index[:, :k]
        if tied.any():
            order = x[tied].argsort(dim=1, descending=True, stable=True)
            index[tied] = order[:, :k]
    index = index.sort(1).values
    values, order = x.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def accuracies(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Of labels (n,): accuracy, and its mean over the classes of `truth`, balanced_accuracy."""
    hits = (predicted == truth).double()
    recalls = []
    for label in truth.unique():
        recalls.append(hits[truth == label].mean())
    balanced = torch.stack(recalls).mean()
    return {"balanced_accuracy": balanced.item(), "accuracy": hits.mean().item()}


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20) -> dict:
    """Weighted votes of the k nearest. Equal votes: the lower class number."""
    similarity, index = nearest(train_x, test_x, k)
    weights = (similarity / 0.07).exp()  # (q, k)
    votes = torch.zeros(len(test_x), int(train_y.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, train_y[index], weights)
    return accuracies(votes.argmax(1), test_y)


def retrieval(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict:
    """Whether the nearest tiles are of the query's class; see PROTOCOLS."""
    _, index = nearest(train_x, test_x, 5)
    labels = train_y[index]  # (q, 5)
    metrics = {}
    for n in (1, 3, 5):
        hits = (labels[:, :n] == test_y[:, None]).any(1)
        metrics[f"Acc@{n}"] = hits.double().mean().item()
    # How many of the five have the label of each; of equals argmax takes the first, the nearest.
    votes = (labels[:, :, None] == labels[:, None, :]).sum(2)  # (q, 5)
    majority = labels.gather(1, votes.argmax(1, keepdim=True))[:, 0]  # (q,)
    metrics["mMV@5"] = accuracies(majority, test_y)["accuracy"]
    return metrics


def adaptive_retrieval(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    dim: int,
    shortlist: int = 200,
) -> dict:
    """The nearest at `dim` channels, re-ranked at all of them; see PROTOCOLS.

    It takes features whole, unlike the other tasks, and cuts them itself.
    """
    width = train_x.shape[1]
    cut = truncate({"bank": train_x, "queries": test_x}, dim)
    _, candidates = nearest(cut["bank"], cut["queries"], shortlist)  # (q, shortlist)
    if dim == width:  # a full search already
        best = candidates[:, 0]
        work = 1.0
    else:
        best = rerank(train_x, test_x, candidates)
        work = dim / width + candidates.shape[1] / len(train_x)
    return {"Acc@1": accuracies(train_y[best], test_y)["accuracy"], "work": work}


def rerank(bank: Tensor, queries: Tensor, candidates: Tensor) -> Tensor:
    """Of candidates (q, s), places in the bank, the most similar (q,); of equals the earlier."""
    bank = F.normalize(bank.double(), dim=-1)
    queries = F.normalize(queries.double(), dim=-1)
    candidates = candidates.sort(1).values  # so that the first of equals is the earlier
    best = []
    for part, query in zip(candidates.split(32), queries.split(32), strict=True):
        # A plain sum, not a matrix product, which rounds equal rows differently at different
        # places.
        similarity = (bank[part] * query[:, None]).sum(2)  # (32, s)
        best.append(part.gather(1, similarity.argmax(1, keepdim=True))[:, 0])
    return torch.cat(best)


def fit_linear(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logistic regression of labels y (n,) on x (n, M) -> W (K, M), bias (K,), classes (K,).

    In float64. Minimises sum_i CE_i + lambda / 2 ||W||^2 with lambda = 100 / (M K), the bias free:
    that is scikit-learn's LogisticRegression with C = M K / 100, for K = 2 with twice that.
    """
    classes, y = y.unique(return_inverse=True)
    n, M = x.shape
    K = len(classes)
    decay = 100 / (M * K) / n  # lambda / n: the whole objective is divided by n
    mean = x.double().mean(0)
    x = x.double() - mean
    # L-BFGS works on V, where W = P V and P P^T is about the inverse Hessian at zero: the same
    # minimum, found in far fewer steps, whatever the scales of the channels.
    hessian = x.T @ x / (n * K) + decay * torch.eye(M)
    curvature, U = torch.linalg.eigh(hessian)
    P = U / curvature.sqrt()
    z = x @ P
    V = torch.zeros(M, K, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(K, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [V, bias], max_iter=5000, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ V + bias, y)
        loss = loss + decay / 2 * (P @ V).square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    W = (P @ V.detach()).T  # (K, M)
    return W, bias.detach() - W @ mean, classes


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict:
    """Logistic regression on frozen features; see fit_linear."""
    W, bias, classes = fit_linear(train_x, train_y)
    logits = test_x.double() @ W.T + bias  # (q, K)
    return accuracies(classes[logits.argmax(1)], test_y)


def dense_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict:
    """The linear probe on patch tokens, its logits enlarged to the mask; see PROTOCOLS.

    x: (n, N, D), y: masks (n, S, S) of class numbers 0 to 255.
    """
    grid = round(train_x.shape[1] ** 0.5)
    y = F.interpolate(train_y[:, None].float(), (grid, grid), mode="nearest-exact")
    y = y.flatten().long()  # (n * N,)
    x = train_x.flatten(0, 1)  # (n * N, D)
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:TOKENS]
    W, bias, classes = fit_linear(x[chosen], y[chosen])
    confusion = torch.zeros(256 * 256, dtype=torch.long)
    for tokens, truth in zip(test_x.split(64), test_y.long().split(64), strict=True):
        logits = tokens.double() @ W.T + bias  # (b, N, K)
        logits = logits.transpose(1, 2).unflatten(2, (grid, grid))  # (b, K, grid, grid)
        logits = F.interpolate(logits, truth.shape[1:], mode="bilinear")  # (b, K, S, S)
        predicted = classes[logits.argmax(1)]  # (b, S, S)
        pairs = (256 * truth + predicted).flatten()
        confusion += pairs.bincount(minlength=256 * 256)
    return overlap(confusion.view(256, 256))


def overlap(confusion: Tensor) -> dict[str, float]:
    """mIoU and Dice, means over the classes that are true or predicted somewhere.

    confusion: pixel counts (K, K), a row a true class, a column a predicted one.
    """
    hits = confusion.diagonal().double()
    sizes = (confusion.sum(0) + confusion.sum(1)).double()  # of truth and prediction together
    present = sizes > 0
    iou = hits / (sizes - hits)
    dice = 2 * hits / sizes
    return {"mIoU": iou[present].mean().item(), "Dice": dice[present].mean().item()}


PROTOCOLS = {
    "knn": "k = 20 (at most the bank), cosine, votes weighted exp(similarity / 0.07), as in DINO "
    "(arXiv 2104.14294)",
    "linear": "logistic regression, to convergence: minimises the sum of cross-entropies "
    "+ 50 / (channels * classes) ||W||^2",
    "retrieval": "test queries train, cosine; Acc@n: a hit among the n nearest; mMV@5: majority of "
    "five, ties to the nearest",
    "adaptive": "the 200 nearest at m channels, re-ranked at all, as in MRL (arXiv 2205.13147); "
    "work: its multiply-adds, as a share of a full search",
    "dense": "the linear probe on at most 100,000 patch tokens, each labelled by its centre; "
    "logits enlarged; all test pixels",
}
TASKS = {
    "knn": knn,
    "linear": linear_probe,
    "retrieval": retrieval,
    "adaptive": adaptive_retrieval,
    "dense": dense_probe,
}


# ---- from tiles to rows --------------------------------------------------------------------------


def run_tasks(
    models: dict[str, tuple[nn.Module, list[int]]],
    root: str | Path | None,
    seed: int = 0,
    tasks: list[str] | None = None,
) -> dict:
    """Every task on every model at each of its dims -> a result that JSON can hold.

    models: {name: (student or teacher, dims to cut its embedding to)}; root: a labelled folder,
    None for drawn tissue (of `seed`); tasks: names in TASKS, all of them if None; those that fit no
    label are left out. result["rows"]: [{"model", "parameters", "dim", "n", "scores": {label:
    {task: {metric: value}}}}, ...], beside "protocol", "tiles", "seed", "unreadable", "torch",
    "numpy". InputError: no task fits the tiles.
    """
    tasks = list(tasks or TASKS)
    rows = []
    unreadable = set()
    for size, group in by_size(models).items():  # each model sees tiles of its own size
        train_tiles, test_tiles = open_splits(root, seed, size)
        plan = plan_tasks(train_tiles[0], tasks)
        if not plan:
            holds = "classes, no masks" if "dense" in tasks else "masks, no classes"
            raise InputError(f"--tasks: {root} holds {holds}; choose other tasks")
        train = extract(group, train_tiles, plan, "embedding train")
        test = extract(group, test_tiles, plan, "embedding test")
        if root:
            unreadable.update(train_tiles.unreadable, test_tiles.unreadable)
        for name, (model, dims) in group.items():
            for dim in dims:
                scores = score(name, dim, plan, train, test)
                rows.append(make_row(name, model, dim, scores, train, test))
    seen = "drawn at the model's size"
    if root:
        seen = "shorter side to the model's size, centre"
    protocol = {}
    for scores in rows[0]["scores"].values():
        for task in scores:
            protocol[task] = PROTOCOLS[task]
    return {
        "protocol": protocol,
        "tiles": seen,
        "seed": seed,
        "unreadable": sorted(unreadable),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rows": rows,
    }


def by_size(models: dict) -> dict[int, dict]:
    """Models that see tiles of one size together: {pixels a side: {name: (model, dims)}}."""
    groups = {}
    for name, (model, dims) in models.items():
        size = model.card_size if isinstance(model, Teacher) else model.img_size
        groups.setdefault(size, {})[name] = (model, dims)
    return groups


def open_splits(root: str | Path | None, seed: int, size: int) -> tuple[Dataset, Dataset]:
    """Tiles to learn from and to test on, of a labelled folder or drawn (N_TILES of each)."""
    if root:
        splits = labelled_files(root)
        return CentreTiles(root, size, *splits["train"]), CentreTiles(root, size, *splits["test"])
    train = data.TissueTiles("bank", seed, size, N_TILES)
    test = data.TissueTiles("test", seed, size, N_TILES)
    return train, test


def plan_tasks(tile: dict, tasks: list[str]) -> dict[str, list[str]]:
    """The tasks that fit each label of a tile -> {label: [task, ...]}; dense: labels of pixels."""
    plan = {}
    for label, kind in LABELS.items():
        fitting = [task for task in tasks if (task == "dense") == (kind == "patches")]
        if label in tile and fitting:
            plan[label] = fitting
    return plan


def extract(models: dict, tiles: Dataset, plan: dict, title: str) -> dict:
    """One pass over the tiles for all models -> features and labels of the readable ones.

    Features (n, D) or (n, N, D) are keyed (model, kind), labels (n,) or (n, S, S) by their name.
    """
    kinds = {LABELS[label] for label in plan}
    parts = defaultdict(list)
    for batch in readable_batches(tiles, title):
        for name, (model, _) in models.items():
            for kind, x in features(model, batch["image"], kinds).items():
                parts[name, kind].append(x)
        for label in plan:
            parts[label].append(batch[label])
    extracted = {}
    for key in parts:
        extracted[key] = torch.cat(parts[key])
    return extracted


def score(name: str, dim: int, plan: dict, train: dict, test: dict) -> dict:
    """The tasks of `plan` on one model, cut to `dim` -> {label: {task: {metric: value}}}."""
    scores = {}
    for label, tasks in plan.items():
        key = (name, LABELS[label])
        whole = {"train": train[key], "test": test[key]}
        cut = truncate(whole, dim)
        scores[label] = {}
        for task in tasks:
            if task == "adaptive":  # takes features whole, and cuts them itself
                metrics = adaptive_retrieval(
                    whole["train"], train[label], whole["test"], test[label], dim
                )
            else:
                metrics = TASKS[task](cut["train"], train[label], cut["test"], test[label])
            scores[label][task] = metrics
    return scores


def make_row(name: str, model: nn.Module, dim: int, scores: dict, train: dict, test: dict) -> dict:
    """One row of the table and of results.json."""
    label = next(iter(scores))
    return {
        "model": name,
        "parameters": round(1e6 * millions(model)),
        "dim": dim,
        "n": {"train": len(train[label]), "test": len(test[label])},
        "scores": scores,
    }


# ---- what is printed and what is saved -----------------------------------------------------------


def print_result(result: dict) -> None:
    """A table a label, in per cent, a line for each model and dim; then the protocols."""
    for label in result["rows"][0]["scores"]:
        print_table(result["rows"], label)
    for task, protocol in result["protocol"].items():
        print(f"{task}: {protocol}")
    print(f"seed {result['seed']}; tiles: {result['tiles']}")


def print_table(rows: list[dict], label: str) -> None:
    """The table of one label."""
    first = rows[0]
    width = 34
    for row in rows:
        width = max(width, len(row["model"]))
    n = first["n"]
    title = f"{label}, %, {n['train']} tiles to learn from, {n['test']} to test"
    tasks = f"{title:{width + 20}}"
    metrics = f"{'model':{width + 2}}parameters     dim"
    for task, values in first["scores"][label].items():
        tasks += f"{task:>10}".ljust(10 * len(values))
        for metric in values:
            metrics += f"{metric.removesuffix('_accuracy'):>10}"
    print(f"\n{tasks}\n{metrics}")
    for row in rows:
        line = f"{row['model']:{width + 2}}{row['parameters'] / 1e6:>8.3f} M{row['dim']:>8}"
        for values in row["scores"][label].values():
            for value in values.values():
                line += f"{100 * value:>10.1f}"
        print(line)
    print()


def save_result(result: dict, title: str, folder: str | Path) -> None:
    """Put a result under its title into folder/results.json; those of other titles stay.

    InputError: it cannot be read or written; names --out.
    """
    file = Path(folder) / "results.json"
    results = {}
    if file.exists():
        try:
            results = dict(json.loads(file.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise InputError(
                f"{file} cannot be read ({error}); move it, or give another folder with --out"
            ) from None
    results[title] = result
    try:
        save_atomically(json.dumps(results, indent=1).encode(), file)
    except InputError as error:
        raise InputError(f"{error} with --out") from None
    print(f"{title}: {file}")


def write_embeddings(
    student: Student, config: dict, folder: str, dim: int, half: bool, out: str
) -> None:
    """Write an .npz: of all tiles below a folder the first `dim` channels and paths; licences."""
    top, files = list_tiles([folder], "--embed")
    tiles = CentreTiles(top, student.img_size, files)
    embeddings = np.empty((len(tiles), dim), np.float16 if half else np.float32)
    paths = []
    for batch in readable_batches(tiles, f"embedding {folder}"):
        tokens = truncate({"summary": embed(student, batch["image"])}, dim)
        start = len(paths)
        for k in batch["index"]:
            paths.append(files[k])
        embeddings[start : len(paths)] = tokens["summary"]
    licences = []
    for name, text in config.get("licences", {}).items():
        licences.append(f"{name}: {text}")
    content = {
        "embeddings": embeddings[: len(paths)],  # (n, dim), of the readable tiles
        "paths": paths,
        "dim": dim,
        "licences": licences,
        "model": config["student"],
        "step": config["step"],
    }
    save_atomically(content, out, write_npz)
    print(f"{len(paths)} embeddings of {dim} channels in {out}; licences: {'; '.join(licences)}")


def write_npz(content: dict, file) -> None:
    """What save_atomically calls to write the .npz."""
    np.savez(file, **content)


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags, checked."""
    parser = make_parser("evaluate.py", __doc__)
    add = parser.add_argument
    tasks = ", ".join(TASKS)
    add("runs", nargs="+", metavar="RUN", help="a run, student.pt or exported folder; or several")
    add("--data", type=path, help=f"a folder of {LAYOUTS} (default: drawn tissue)")
    add("--tasks", type=name_list, help=f"of {tasks} (default: all that fit)")
    add("--dims", type=dim_list, help="comma-separated (default: each run's nested dims)")
    add("--teachers", type=name_list, help="'' for none (default: the last run's offline ones)")
    add("--embed", type=path, metavar="DIR", help="instead, write a folder's embeddings to --out")
    add("--dim", type=positive, help="with --embed: channels to keep (default: all)")
    add("--half", action="store_true", help="with --embed: fp16 instead of fp32")
    add("--out", type=path, help="folder of results.json (default: RUN); with --embed: an .npz")
    add("--seed", type=natural, default=0, help="of the drawn tissue (default: 0)")
    add("--device", type=path, help="cuda, mps or cpu (default: the best at hand)")
    add("--weights-dir", type=path, default="weights", help="of teachers (default: weights)")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: Namespace) -> None:
    """InputError: a flag has no meaning, alone or beside another."""
    if args.tasks is not None and (not args.tasks or not set(args.tasks) <= TASKS.keys()):
        raise InputError(f"--tasks: choose from {', '.join(TASKS)}")
    if args.embed:
        if len(args.runs) > 1 or not args.out:
            raise InputError("--embed: give one RUN, and the file to write with --out X.npz")
        if Path(args.out).exists():
            raise InputError(f"--out: {args.out} exists; choose another name, or remove it")
    elif args.dim or args.half:
        raise InputError(
            "--dim, --half: they need --embed DIR; python -m extras.export cuts students"
        )
    elif args.out and Path(args.out).is_file():
        raise InputError(f"--out: {args.out} is a file; give a folder for results.json")


def check_dim(dim: int, student: Student, run: str, flag: str) -> None:
    """InputError: the student has fewer channels."""
    if dim > student.width:
        raise InputError(f"{flag}: {dim} is above the width of {run}; give at most {student.width}")


def embed_tiles(args: Namespace) -> None:
    """The program behind --embed."""
    student, config = load_student(args.runs[0])
    dim = args.dim or student.width
    check_dim(dim, student, args.runs[0], "--dim")
    student.to(choose_device(args.device)[0])
    write_embeddings(student, config, args.embed, dim, args.half, args.out)


def evaluate_runs(args: Namespace) -> None:
    """The program without --embed: a table of students and teachers, printed first, then saved."""
    device = choose_device(args.device)[0]
    models = {}
    for run in args.runs:
        student, config = load_student(run)
        dims = args.dims or config["nested_dims"]
        check_dim(max(dims), student, run, "--dims")
        models[run] = (student.to(device), dims)
    teachers = args.teachers
    if teachers is None:
        teachers = [name for name in config["teachers"] if name in OFFLINE]
    recipe = config.get("teacher_recipe", {})
    find_weights(teachers, args.weights_dir)  # names all that are missing at once
    for name in teachers:
        teacher = load_teacher(name, args.weights_dir, device, **recipe)
        models[f"teacher {name}"] = (teacher, [teacher.embed_dim])
    result = run_tasks(models, args.data, args.seed, args.tasks)
    print_result(result)
    problems = []
    for folder in result_folders(args.runs, args.out):
        try:
            save_result(result, args.data or DRAWN, folder)
        except InputError as problem:  # the other folders get theirs
            problems.append(str(problem))
    if problems:
        raise InputError("; ".join(problems))


def result_folders(runs: list[str], out: str | None) -> list[Path]:
    """The folders for results.json: --out, or that of each run."""
    if out:
        return [Path(out)]
    folders = []
    for run in runs:
        folder = Path(run)
        if not folder.is_dir():
            folder = folder.parent
        if folder not in folders:
            folders.append(folder)
    return folders


def main() -> None:
    """The command line."""
    args = parse_args()
    if args.embed:
        embed_tiles(args)
    else:
        evaluate_runs(args)


if __name__ == "__main__":
    run_program(main)
