"""Evaluation: what a student's frozen embeddings know, at every nested dim, beside its teachers.

    python evaluate.py runs/demo                          drawn tissue, beside the offline teachers
    python evaluate.py runs/a runs/b --data labelled/     several runs on tiles of your own
    python evaluate.py runs/demo --embed tiles/ --dim 16 --out embeddings.npz

The models stay as they are. Features are taken once, after the final norm; for every nested dim m
they are cut to their first m channels, and only then normalised, where a task normalises. The
numbers are printed, then added to results.json in the folder of each run, or in the folder --out.
Beside the models stand `chance` and a `colour histogram`: what does not beat these has learned
nothing, or nothing but stain. Every figure has an interval, and students are compared with teachers
on the same tiles.

Tasks (PROTOCOLS has them in words): knn, linear and retrieval ask whether the summary
knows the class of a tile, adaptive whether a small cut finds what the whole embedding finds; dense
asks whether patch tokens know a mask. Pictures are drawn by `python -m extras.figures`; what
`python -m extras.export` writes for timm is a RUN too.

Read on from `run_tasks`: it goes from tiles to the rows of the table. The tasks themselves are
plain functions of tensors, tested against scikit-learn and against plain loops. They say what each
test tile adds to a figure (a `Tally`): `figures_of` makes numbers of it, and `resample` asks how
sure these are.
"""

import csv
import hashlib
import io
import json
import os
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import data
from data import (
    UnreadableTile,
    dim_list,
    list_tiles,
    make_parser,
    name_list,
    natural,
    open_mask,
    open_tile,
    path,
    positive,
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
SHORTLIST = 200  # tiles that adaptive retrieval re-ranks; the bank has to hold five times as many
RESAMPLES = 1000  # of the test tiles, for intervals
WORKERS = min(8, torch.get_num_threads()) if torch.cuda.is_available() else 0  # that read tiles
DRAWN = "synthetic tissue"  # the title of results without --data
CHANCE = "chance"
HISTOGRAM = "colour histogram"
BASELINES = {CHANCE: 0, HISTOGRAM: 24}  # the rows beside the models, and their dims
FEW = 10  # tiles of a class to test on, below which the table says so; a rule of thumb
VOID = 255  # in a mask: of no class, neither learned nor tested
LAYOUTS = "train/CLASS/* and test/CLASS/*, labels.csv (path, label, split), or images/* and masks/*"
COLUMNS = (["label", "path", "split"], ["group", "label", "path", "split"])  # of labels.csv
WANTED = (
    "wanted is a row a tile, path,label,split below a line that says so, with commas, split train "
    "or test, perhaps a column group; python -m extras.labels makes it of other tables"
)

CHIEF = ("balanced_accuracy", "mIoU")  # in the table with their intervals
HEADINGS = {  # those of the other figures are their names
    "balanced_accuracy": " balanced (95 %)   ",
    "mIoU": " mIoU (95 %)       ",
    "accuracy": "  acc.",
}

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
    images = images.to(next(model.parameters(), images).device)  # a histogram has no parameters
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


class Row(NamedTuple):
    """What a labelled folder says of a tile."""

    file: str  # relative to the folder
    label: str  # its class, "" for none, or the path of its mask
    group: str = ""  # such as its patient; "" where there is no such column


def labelled_files(root: str | Path) -> dict[str, tuple[list[str], dict[str, list]]]:
    """A labelled folder -> {"train": (files, targets), "test": (files, targets)}.

    files: paths relative to `root`. targets, one a file: {"class": numbers} or {"mask": paths};
    with a column `group` also {"group": numbers}. Three layouts are understood, see LAYOUTS;
    labels.csv comes before folders. InputError: a split has no tiles, or of one class alone; a tile
    is of a class that train has not, or there twice.
    """
    root = Path(root)
    kind, rows = find_rows(root)
    check_files(root, rows)
    number_of = {}  # of classes; masks stay paths
    if kind == "class":
        check_classes(root, rows)
        number_of = numbers_of([row.label for row in rows["train"]])
    group_number = numbers_of([row.group for row in rows["train"] + rows["test"]])
    found = {}
    for split in rows:
        # Mixed, always in the same way: else the bank would hold class after class, and where
        # neighbours are equally near the first class would win.
        order = np.random.default_rng(0).permutation(len(rows[split]))
        mixed = [rows[split][i] for i in order]
        targets = {kind: [number_of.get(row.label, row.label) for row in mixed]}
        if mixed[0].group:
            targets["group"] = [group_number[row.group] for row in mixed]
        found[split] = ([row.file for row in mixed], targets)
    return found


def find_rows(root: Path) -> tuple[str, dict[str, list[Row]]]:
    """What the labels of a folder are, "class" or "mask", and {"train": rows, "test": rows}."""
    kind = "class"
    if (root / "labels.csv").exists():
        rows = read_labels(root / "labels.csv")
    elif (root / "masks").is_dir() or (root / "train" / "masks").is_dir():
        kind = "mask"
        rows = find_masks(root)
    else:
        rows = find_classes(root)
    for split in rows:
        if not rows[split]:
            raise InputError(
                f"--data: {root} has no tiles for {split}; a labelled folder holds {LAYOUTS}; "
                "python -m extras.labels makes one of other folders and tables"
            )
    return kind, rows


def numbers_of(names: list[str]) -> dict[str, int]:
    """Each name's place among the sorted ones."""
    return {name: number for number, name in enumerate(sorted(set(names)))}


def read_labels(table: Path) -> dict[str, list[Row]]:
    """labels.csv -> {"train": rows, "test": rows}; what is of other splits is named."""
    rows = {"train": [], "test": []}
    others = Counter()
    for cells in read_table(table):
        split = cells["split"]
        if split in rows:
            rows[split].append(Row(cells["path"], cells["label"], cells.get("group", "")))
        else:
            others[split] += 1
    for split, count in others.items():
        print(f"{table}: left out are {count} rows of {split}")
    return rows


def read_table(table: Path) -> Iterator[dict[str, str]]:
    """The rows of labels.csv as {column: value}, without spaces round values. InputError: other
    columns, or a row that is not whole.
    """
    text = table.read_text("utf-8-sig", "surrogateescape")
    reader = csv.reader(text.split("\n"), skipinitialspace=True, strict=True)
    columns = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):  # an empty line, or the commas that spreadsheets leave
                continue
            if not columns:
                columns = cells
                if sorted(columns) not in COLUMNS:
                    raise InputError(f"--data: {table} has the columns {columns}; {WANTED}")
            elif len(cells) != len(columns) or "" in cells:
                where = f"{table}, line {reader.line_num}"
                raise InputError(f"--data: {where}: {cells} is not a value a column; {WANTED}")
            else:
                yield dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"--data: {table}, line {reader.line_num}: {error}; {WANTED}") from None


def find_masks(root: Path) -> dict[str, list[Row]]:
    """Below train/ and test/ or, without these, the last fifth of the images for testing."""
    if (root / "train").is_dir():
        return {"train": pair_masks(root, "train"), "test": pair_masks(root, "test")}
    rows = pair_masks(root, ".")
    cut = len(rows) - max(1, len(rows) // 5)
    return {"train": rows[:cut], "test": rows[cut:]}


def pair_masks(root: Path, top: str) -> list[Row]:
    """Images and masks of the same name below root/top.

    An image without a mask gets a path that does not exist, so that it is named as unreadable.
    """
    _, images = list_tiles([root / top / "images"], "--data")
    _, masks = list_tiles([root / top / "masks"], "--data")
    mask_of = {}
    for mask in masks:
        stem = os.path.splitext(mask)[0]
        if stem in mask_of:
            two = f"{mask_of[stem]} and {mask}"
            raise InputError(f"--data: {root / top}/masks: {two} are masks of one tile; keep one")
        mask_of[stem] = mask
    rows = []
    for image in images:
        mask = mask_of.get(os.path.splitext(image)[0], image)
        rows.append(Row(f"{top}/images/{image}", f"{top}/masks/{mask}"))
    return rows


def find_classes(root: Path) -> dict[str, list[Row]]:
    """Tiles of SPLIT/CLASS/, at any depth below."""
    rows = {"train": [], "test": []}
    for split in rows:
        if (root / split).is_dir():
            _, names = list_tiles([root / split], "--data")
            for name in names:
                folder, _, below = name.partition("/")
                rows[split].append(Row(f"{split}/{name}", folder if below else ""))
    return rows


def check_files(root: Path, rows: dict[str, list[Row]]) -> None:
    """InputError: a file is there twice, by its path or through links."""
    seen = {}
    for split in rows:
        for row in rows[split]:
            words = f"{row.file} of {split}"
            place = os.path.realpath(root / row.file)
            if place in seen:
                first = seen[place]
                raise InputError(f"--data: {root}: {first} and {words} are one file; keep one")
            seen[place] = words


def check_classes(root: Path, rows: dict[str, list[Row]]) -> None:
    """InputError: a split is of fewer than two classes, or a tile of one that train has not."""
    known = {row.label for row in rows["train"]} - {""}
    for split in rows:
        classes = sorted({row.label for row in rows[split]} - {""})
        if len(classes) < 2:
            raise InputError(
                f"--data: {root}: tiles of {split} are of {len(classes)} classes, {classes}: there "
                f"is nothing to tell apart; give two or more; a labelled folder holds {LAYOUTS}"
            )
        for row in rows[split]:
            if row.label not in known:
                raise InputError(
                    f"--data: {root}/{row.file} is in none of the classes of train; "
                    "move or remove it"
                )


class CentreTiles(Dataset):
    """Tile k of `files` -> {"image": uint8 (3, size, size), "index": k, and its target}.

    The shorter side, of "side" pixels, is resized to `size`, and the centre taken. targets:
    {"class": numbers}, {"mask": paths} or {"group": numbers}, one a file; a mask becomes numbers
    (size, size), cut as its tile is.
    An unreadable tile or mask has index -1, and "path: reason" under "unreadable", as FolderTiles.
    """

    def __init__(
        self, root: str | Path, size: int, files: list[str], targets: dict[str, list] | None = None
    ):
        self.root = Path(root)
        self.size = size
        self.files = files
        self.targets = targets or {}
        self.unreadable = set()  # filled by data.batches

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> dict:
        item = {"index": k, "unreadable": []}
        path = self.root / self.files[k]
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
        item["image"] = self.centre(image, "bicubic")
        item["side"] = min(image.size)
        if self.targets:  # to find test tiles by that are copies of training tiles
            digest = hashlib.blake2b(item["image"].numpy().tobytes(), digest_size=8).digest()
            item["pixels"] = int.from_bytes(digest, "big", signed=True)
        for kind in self.targets:
            item[kind] = self.targets[kind][k]
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


def find_doubts(train: dict, test: dict, files: list[str]) -> list[str]:
    """What makes figures doubtful -> sentences.

    train, test: as `embed_tiles` returns them; files: those of the test tiles
    """
    doubts = []
    copies = test["index"][torch.isin(test["pixels"], train["pixels"])]
    if len(copies):
        doubts.append(
            f"{len(copies)} of {len(files)} test tiles are in train too, pixel for pixel, as "
            f"{files[copies[0]]}: known by heart"
        )
    if "group" in test:
        groups = test["group"].unique()
        shared = torch.isin(groups, train["group"]).sum()
        if shared:
            doubts.append(
                f"{shared} of the {len(groups)} groups that are tested on are learned from too: "
                "on others the figures would be lower"
            )
    least = len(test["index"])
    if "class" in test:
        _, counts = test["class"].unique(return_counts=True)
        least = counts.min().item()
    if least < FEW:
        doubts.append(
            f"few tiles to test on, {least} (of the smallest class): no verdict means much, and "
            f"intervals lean on the four tiles that they add; give {FEW} or more"
        )
    if "mask" in test:
        values = classes_in(train["mask"], test["mask"])
        if len(values) == 1:
            doubts.append(f"all masks hold {values[0]} alone: there is nothing to tell apart")
        if len(values) == 2 and values[1] == VOID:
            doubts.append(
                f"masks hold {values[0]} and 255 alone: 255 is taken as a class, not as none"
            )
    return doubts


# ---- the tasks: plain tensors in, numbers out ----------------------------------------------------


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of the bank most similar to each query, by cosine in float64, nearest first.

    bank: (n, D), queries: (q, D) -> similarities (q, k) and places in the bank (q, k), with k at
    most n. Of equally similar rows the earlier in the bank is nearer.
    """
    k = min(k, len(bank))
    # float64, for in two channels float32 cannot tell the nearest from the next for half of the
    # queries: their labels would decide by where they stand in the bank.
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
    # Of equal values topk takes any, in any order. Rows with some, up to the next, are sorted whole
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    if tied.any():
        order = x[tied].argsort(dim=1, descending=True, stable=True)
        index[tied] = order[:, : index.shape[1]]
    return values[:, :k], index[:, :k]


class Tally(NamedTuple):
    """What each test tile adds to a figure: the mean over the columns of sum(part) / sum(whole).

    Accuracy has one column: part is 1 where the answer is right, whole is 1. Balanced accuracy has
    one for each class, zero for tiles of others. Figures of a resample are those of weighted tiles.
    """

    part: Tensor  # (n, columns)
    whole: Tensor  # (n, columns)


Tallies = dict[str, Tally]  # of a task, by the names of its figures


def mean_ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Sums (..., columns) -> (...), over the columns that hold anything."""
    return (part / whole).nanmean(-1)  # 0 / 0: a class of which a resample has no tile


def figures_of(tallies: dict) -> dict:
    """What tiles were tallied for: {metric: value}."""
    found = {}
    for metric, tally in tallies.items():
        found[metric] = mean_ratio(tally.part.sum(0), tally.whole.sum(0)).item()
    return found


def tally_mean(values: Tensor) -> Tally:
    """A plain mean of values (n,)."""
    values = values.double()[:, None]
    return Tally(values, torch.ones_like(values))


def tally_answers(predicted: Tensor, truth: Tensor) -> Tallies:
    """Of labels (n,): the accuracy in each class of `truth`, averaged, and that of all tiles."""
    hits = predicted == truth
    in_class = (truth[:, None] == truth.unique()).double()  # (n, K)
    balanced = Tally(in_class * hits[:, None], in_class)
    return {"balanced_accuracy": balanced, "accuracy": tally_mean(hits)}


# A task learns from features train_x (n, D) and class numbers train_y (n,), and is asked about
# test_x (q, D) and test_y (q,).


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20) -> Tallies:
    """Weighted votes of the k nearest. Equal votes: the lower class number."""
    similarity, index = nearest(train_x, test_x, k)
    weights = (similarity / 0.07).exp()  # (q, k)
    votes = torch.zeros(len(test_x), int(train_y.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, train_y[index], weights)
    return tally_answers(votes.argmax(1), test_y)


def retrieval(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Tallies:
    """Whether the nearest tiles are of the query's class; see PROTOCOLS."""
    _, index = nearest(train_x, test_x, 5)
    labels = train_y[index]  # (q, 5)
    tallies = {}
    for n in (1, 3, 5):
        hits = (labels[:, :n] == test_y[:, None]).any(1)
        tallies[f"Acc@{n}"] = tally_mean(hits)
    # How many of the five have the label of each; of equals argmax takes the first, the nearest.
    votes = (labels[:, :, None] == labels[:, None, :]).sum(2)  # (q, 5)
    majority = labels.gather(1, votes.argmax(1, keepdim=True))[:, 0]  # (q,)
    tallies["mMV@5"] = tally_mean(majority == test_y)
    return tallies


def adaptive_retrieval(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, dim: int, shortlist: int
) -> Tallies:
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
    hits = train_y[best] == test_y
    return {"Acc@1": tally_mean(hits), "work": tally_mean(torch.full(hits.shape, work))}


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


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Tallies:
    """Logistic regression on frozen features; see fit_linear."""
    W, bias, classes = fit_linear(train_x, train_y)
    logits = test_x.double() @ W.T + bias  # (q, K)
    return tally_answers(classes[logits.argmax(1)], test_y)


def dense_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Tallies:
    """The linear probe on patch tokens, its logits enlarged to the mask; see PROTOCOLS.

    x: (n, N, D), y: masks (n, S, S) of class numbers 0 to 255.
    """
    grid = round(train_x.shape[1] ** 0.5)
    y = F.interpolate(train_y[:, None].float(), (grid, grid), mode="nearest-exact")
    y = y.flatten().long()  # (n * N,)
    x = train_x.flatten(0, 1)  # (n * N, D)
    # The same tokens for every model and dim, whatever else is evaluated
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    void = void_of(train_y, test_y)
    chosen = chosen[y[chosen] != void][:TOKENS]
    W, bias, classes = fit_linear(x[chosen], y[chosen])
    classes = classes.to(torch.uint8)
    predicted = []
    for tokens in test_x.split(64):
        logits = tokens.double() @ W.T + bias  # (b, N, K)
        logits = logits.transpose(1, 2).unflatten(2, (grid, grid))  # (b, K, grid, grid)
        logits = F.interpolate(logits, test_y.shape[1:], mode="bilinear")  # (b, K, S, S)
        predicted.append(classes[logits.argmax(1)])
    return tally_overlap(torch.cat(predicted), test_y, void)


def void_of(train: Tensor, test: Tensor) -> int:
    """The number in masks that is of no class: VOID; -1 where two numbers are all there are, which
    may be black and white.
    """
    return VOID if len(classes_in(train, test)) > 2 else -1


def classes_in(*masks: Tensor) -> list[int]:
    """The numbers that occur in masks (n, S, S), in order."""
    found = set()
    for part in masks:
        found.update(part.flatten().bincount().nonzero()[:, 0].tolist())
    return sorted(found)


def tally_overlap(predicted: Tensor, truth: Tensor, void: int = -1) -> Tallies:
    """mIoU and Dice, means over the classes that are true or predicted somewhere.

    predicted, truth: (n, S, S). Pixels whose truth is `void` do not count.
    """
    predicted = predicted.where(truth.short() != void, truth)  # of uint8, -1 would be 255
    hits = []
    sizes = []
    for label in classes_in(predicted, truth):
        if label == void:
            continue
        is_true = truth == label
        is_predicted = predicted == label
        hits.append((is_true & is_predicted).sum((1, 2)))
        sizes.append(is_true.sum((1, 2)) + is_predicted.sum((1, 2)))
    hits = torch.stack(hits, 1).double()  # pixels (n, K)
    sizes = torch.stack(sizes, 1).double()  # of truth and prediction together
    return {"mIoU": Tally(hits, sizes - hits), "Dice": Tally(2 * hits, sizes)}


PROTOCOLS = {
    "knn": "k = 20 (at most the bank), cosine, votes weighted exp(similarity / 0.07), as in DINO "
    "(arXiv 2104.14294)",
    "linear": "logistic regression, to convergence: minimises the sum of cross-entropies "
    "+ 50 / (channels * classes) ||W||^2",
    "retrieval": "test queries train, cosine; Acc@n: a hit among the n nearest; mMV@5: majority of "
    "five, ties to the nearest",
    "adaptive": "the 200 nearest at m channels, re-ranked at all, as in MRL (arXiv 2205.13147); "
    "work: multiply-adds of both, as a share of a full search",
    "dense": "the linear probe on at most 100,000 patch tokens, each labelled by its centre; "
    "logits enlarged; all test pixels but those of 255, which is no class",
    CHANCE: "always the most frequent class of the tiles to learn from; in retrieval, random tiles",
    HISTOGRAM: "the same tasks on shares of pixels in 8 bins a channel, 24 numbers, of the tiles "
    "that the first model sees: what does not beat it may have learned stain alone",
    "intervals": "95 % of 1000 resamples of the test tiles, or of the groups of labels.csv, with "
    "two tiles more that are right and two that are wrong, as Agresti and Coull add them; for this "
    "student and these tiles to learn from: other seeds and other tiles are not in it",
    "differences": "points of a label's first figure (balanced accuracy by knn, or mIoU), at the "
    "smallest, the middle and the whole dim, on the same resamples; within noise: the interval "
    "holds 0, which is no proof that the two are equal",
}
TASKS = {
    "knn": knn,
    "linear": linear_probe,
    "retrieval": retrieval,
    "adaptive": adaptive_retrieval,
    "dense": dense_probe,
}


# ---- what models are held against ----------------------------------------------------------------


class ColourHistogram(nn.Module):
    """A model that sees stain alone: the shares of pixels in 8 bins of red, of green, of blue.

    Of the tile as its summary (B, 24), of each of 8 x 8 fields as its patches (B, 64, 24). It
    stands in the table as a model does, and is asked the same tasks.
    """

    def __init__(self, img_size: int):
        super().__init__()
        self.img_size = img_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        bins = images // 32  # uint8 (B, 3, S, S)
        shares = []
        for number in range(8):
            inside = (bins == number).float()
            shares.append(F.adaptive_avg_pool2d(inside, 8))  # (B, 3, 8, 8)
        patches = torch.cat(shares, 1).flatten(2).transpose(1, 2)  # (B, 64, 24)
        return {"summary": patches.mean(1), "patches": patches}


def tally_chance(task: str, train_y: Tensor, test_y: Tensor) -> Tallies:
    """The figures of an answer that looks at no tile; see PROTOCOLS."""
    void = -1
    if task == "dense":
        void = void_of(train_y, test_y)
    train_y = train_y.long()  # of uint8, -1 would be 255
    counts = train_y[train_y != void].bincount()
    answer = torch.full_like(test_y, counts.argmax().item())
    if task == "dense":
        return tally_overlap(answer, test_y, void)
    if task in ("knn", "linear"):
        return tally_answers(answer, test_y)
    share = (counts / counts.sum())[test_y]  # of the query's class, (n,)
    tallies = {"Acc@1": tally_mean(share)}
    if task == "retrieval":
        for n in (3, 5):
            tallies[f"Acc@{n}"] = tally_mean(1 - (1 - share) ** n)
    return tallies


# ---- how sure a figure is ------------------------------------------------------------------------


class Figure(NamedTuple):
    """The place of a figure in the table."""

    model: str
    dim: int
    label: str
    task: str
    metric: str


def resample(
    tallies: dict[Figure, Tally], groups: Tensor, seed: int, right: tuple = (1, 1, 0, 0)
) -> dict[Figure, Tensor]:
    """Every figure on the same resamples of the test tiles -> {figure: (RESAMPLES,)}.

    groups: (n,); tiles of the same number, those of a patient say, are drawn together. Four tiles
    are added, two right and two wrong (Agresti and Coull 1998, doi 10.1080/00031305.1998.10480550):
    else a model without errors would be sure of it, on however few tiles. right: which two.
    """
    added = groups.max() + 1 + torch.arange(4)
    weights = draw_weights(torch.cat([groups, added]), seed)
    parts = []
    wholes = []
    columns = []
    for tally in tallies.values():
        # What a tile weighs, spread over the columns: a class may have few tiles
        whole = torch.full((4, tally.whole.shape[1]), tally.whole.mean().item())
        parts.append(torch.cat([tally.part, torch.tensor(right)[:, None] * whole]))
        wholes.append(torch.cat([tally.whole, whole]))
        columns.append(whole.shape[1])
    parts = weights @ torch.cat(parts, 1).float()
    wholes = weights @ torch.cat(wholes, 1).float()
    figures = zip(tallies, parts.split(columns, 1), wholes.split(columns, 1), strict=True)
    return {figure: mean_ratio(part, whole) for figure, part, whole in figures}


def draw_weights(groups: Tensor, seed: int) -> Tensor:
    """How often each tile is in each resample -> (RESAMPLES, n). groups: (n,), see resample."""
    _, groups = groups.unique(return_inverse=True)
    count = int(groups.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    times = torch.empty(RESAMPLES, count)
    for row in times:
        drawn = torch.randint(count, (count,), generator=generator)
        row.copy_(drawn.bincount(minlength=count))
    return times[:, groups]


def interval(draws: Tensor) -> list[float]:
    """What holds 95 % of the values of a figure on resamples: [low, high]."""
    return draws.quantile(torch.tensor([0.025, 0.975])).tolist()


def choose_pairs(models: dict) -> dict[str, tuple]:
    """What people want compared: {"A at 16 less B": ((A, 16), (B, its dim)), ...}.

    Students at their smallest, a middle and their largest dim, less each teacher, the colour
    histogram, themselves whole, and earlier students at the same dim, where they have it.
    """
    rivals = {}
    earlier = []
    for name, (model, dims) in models.items():
        if isinstance(model, Teacher):
            rivals[name] = (name, dims[-1])
    rivals[HISTOGRAM] = (HISTOGRAM, BASELINES[HISTOGRAM])
    pairs = {}
    for name, (model, dims) in models.items():
        if isinstance(model, Teacher):
            continue
        for dim in sorted({dims[0], dims[len(dims) // 2], dims[-1]}):
            others = rivals | {f"{name} at {dims[-1]}": (name, dims[-1])}
            for student, its_dims in earlier:
                its_dim = dim if dim in its_dims else its_dims[-1]
                others[f"{student} at {its_dim}"] = (student, its_dim)
            for rival, key in others.items():
                if key != (name, dim):
                    pairs[f"{name} at {dim} less {rival}"] = ((name, dim), key)
        earlier.append((name, dims))
    return pairs


def compare(pairs: dict, tallies: dict, draws: dict, groups: Tensor, seed: int) -> list[dict]:
    """The first figure of each label, pair by pair -> differences as results.json holds them.

    pairs: see choose_pairs; tallies: {Figure: Tally}; draws: of `resample`, with the same seed.
    """
    first = {}  # {label: (task, metric)}
    firsts = {}  # the tallies of these
    for figure, tally in tallies.items():
        first.setdefault(figure.label, (figure.task, figure.metric))
        if first[figure.label] == (figure.task, figure.metric):
            firsts[figure] = tally
    values = figures_of(firsts)
    # Of the tiles that are added either model has one right that the other has wrong: the same two
    # right in both would say that they differ less than these tiles can tell.
    other_draws = resample(firsts, groups, seed, right=(1, 0, 1, 0))
    found = []
    for label, (task, metric) in first.items():
        for words, (one, other) in pairs.items():
            one = Figure(*one, label, task, metric)
            other = Figure(*other, label, task, metric)
            difference = values[one] - values[other]
            low, high = interval(draws[one] - other_draws[other])
            verdict = "within noise"
            if low > 0:
                verdict = "above"
            elif high < 0:
                verdict = "below"
            bounds = f"({per_cent(low):.1f} to {per_cent(high):.1f})"
            text = f"{words}: {per_cent(difference):+.1f} {bounds}: {verdict}"
            row = {"label": label, "task": task, "metric": metric, "text": text}
            row |= {"difference": difference, "low": low, "high": high, "verdict": verdict}
            found.append(row)
    return found


def per_cent(share: float) -> float:
    """With one digit after the point, and no -0.0."""
    return round(100 * share, 1) + 0.0


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
    {task: {metric: value}}}, "intervals": {label: {task: {metric: [low, high]}}}}, ...], with rows
    for chance and the colour histogram last; "differences": see compare; beside "protocol", "data",
    "tiles", "left_out", "doubts", "unreadable", "seed", "torch", "numpy". InputError: no task fits.
    """
    tallies = {}
    unreadable = set()
    doubts = set()
    seen = ["shorter side to the model's size, centre" if root else "drawn at the model's size"]
    histogram = ColourHistogram(next(iter(by_size(models))))
    all_models = {**models, HISTOGRAM: (histogram, [BASELINES[HISTOGRAM]])}
    for size, group in by_size(all_models).items():  # each model sees tiles of its own size
        train_tiles, test_tiles = open_splits(root, seed, size)
        plan, left_out = plan_tasks(train_tiles, tasks or list(TASKS))
        train = embed_tiles(group, train_tiles, plan, "embedding train")
        test = embed_tiles(group, test_tiles, plan, "embedding test")
        if root:
            unreadable.update(train_tiles.unreadable, test_tiles.unreadable)
            doubts.update(find_doubts(train, test, test_tiles.files))
            seen += tell_scale(test["side"], size, group)
        for name, (_, dims) in group.items():
            for dim in dims:
                tallies |= score(name, dim, plan, train, test)
    # From here on only labels and groups are needed, and these are the same at every size
    tallies |= score(CHANCE, BASELINES[CHANCE], plan, train, test)
    left_out += drop_meaningless(tallies, train)
    label = next(iter(plan))
    n = {"train": len(train[label]), "test": len(test[label])}
    groups = torch.arange(n["test"])  # each tile its own
    if "group" in test:
        groups = test["group"]
        n["groups"] = len(groups.unique())
    draws = resample(tallies, groups, seed)
    run = {figure.task for figure in tallies}
    return {
        "protocol": {key: PROTOCOLS[key] for key in PROTOCOLS if key in run or key not in TASKS},
        "data": str(Path(root).resolve()) if root else f"{DRAWN}, seed {seed}",
        "tiles": "; ".join(seen),
        "left_out": left_out,
        "doubts": sorted(doubts),
        "seed": seed,
        "unreadable": sorted(unreadable),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rows": make_rows(models, tallies, draws, n),
        "differences": compare(choose_pairs(models), tallies, draws, groups, seed),
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


def plan_tasks(tiles: Dataset, tasks: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The tasks that fit the labels of tiles to learn from -> {label: [task, ...]}; left out, in
    words. InputError: none fits.
    """
    needed = 5 * SHORTLIST
    plan = {}
    left_out = []
    tile = tiles[0]
    for label in LABELS:
        for task in tasks:
            fits = (task == "dense") == (LABELS[label] == "patches")
            if label not in tile or not fits:
                continue
            if task == "adaptive" and len(tiles) < needed:
                left_out = [f"adaptive, which needs {needed} tiles to learn from"]
                continue
            plan.setdefault(label, []).append(task)
    if not plan:
        raise InputError(
            f"--tasks: none fits these {len(tiles)} tiles to learn from; dense needs masks, all "
            f"others need classes, adaptive {needed} tiles as well; choose other tasks"
        )
    return plan, left_out


def embed_tiles(models: dict, tiles: Dataset, labels: Iterable[str], title: str) -> dict:
    """One pass over the tiles for all models -> features and labels of the readable ones.

    Features (n, D) or (n, N, D), of the kinds that these labels are asked of, are keyed (model,
    kind); whatever tiles come with, as labels (n,) and masks (n, S, S), is keyed by its name.
    """
    kinds = {LABELS[label] for label in labels}
    parts = defaultdict(list)
    for batch in readable_batches(tiles, title):
        for name, (model, _) in models.items():
            for kind, x in features(model, batch["image"], kinds).items():
                parts[name, kind].append(x)
        for key in batch.keys() - {"image"}:
            parts[key].append(batch[key])
    return {key: torch.cat(values) for key, values in parts.items()}


def score(name: str, dim: int, plan: dict, train: dict, test: dict) -> dict[Figure, Tally]:
    """The tasks of `plan` on one model, cut to `dim`, or on chance."""
    tallies = {}
    for label, tasks in plan.items():
        key = (name, LABELS[label])
        for task in tasks:
            if name == CHANCE:
                found = tally_chance(task, train[label], test[label])
            elif task == "adaptive":  # takes features whole, and cuts them itself
                found = adaptive_retrieval(
                    train[key], train[label], test[key], test[label], dim, SHORTLIST
                )
            else:
                cut = truncate({"train": train[key], "test": test[key]}, dim)
                found = TASKS[task](cut["train"], train[label], cut["test"], test[label])
            for metric, tally in found.items():
                tallies[Figure(name, dim, label, task, metric)] = tally
    return tallies


def drop_meaningless(tallies: dict[Figure, Tally], train: dict) -> list[str]:
    """Take out, in place, what says nothing -> in words."""
    words = {}
    for figure in list(tallies):
        label = figure.label
        if figure.metric in ("Acc@3", "Acc@5") and len(train[label].unique()) < 3:
            del tallies[figure]
            words[label] = f"Acc@3 and Acc@5 of {label}: of two classes any tile hits one"
    return list(words.values())


def tell_scale(sides: Tensor, size: int, models: dict) -> list[str]:
    """Where students see tiles at another scale than in training, which crops at the tiles' own.

    sides: the shorter ones of the tiles, before they were resized to `size`
    """
    students = [name for name, (model, _) in models.items() if isinstance(model, Student)]
    side = int(sides.median())
    if side == size or not students:
        return []
    how = f"{side / size:.3g} times coarser"
    if side < size:
        how = f"{size / side:.3g} times finer"
    seers = ", ".join(students)
    return [f"tiles of {side} px are seen at {size} px, {how} than in training ({seers})"]


def make_rows(models: dict, tallies: dict, draws: dict, n: dict[str, int]) -> list[dict]:
    """The rows of the table and of results.json; the baselines come last."""
    rows = {}
    for name, (model, dims) in models.items():
        for dim in dims:
            rows[name, dim] = {"model": name, "parameters": round(1e6 * millions(model))}
    for name, dim in BASELINES.items():
        rows[name, dim] = {"model": name, "parameters": 0}
    for (_, dim), row in rows.items():
        row |= {"dim": dim, "n": n, "scores": {}, "intervals": {}}
    for figure, value in figures_of(tallies).items():
        row = rows[figure.model, figure.dim]
        scores = row["scores"].setdefault(figure.label, {}).setdefault(figure.task, {})
        scores[figure.metric] = value
        intervals = row["intervals"].setdefault(figure.label, {}).setdefault(figure.task, {})
        if figure.metric != "work":  # which is no mean over tiles
            intervals[figure.metric] = interval(draws[figure])
    return list(rows.values())


# ---- what is printed and what is saved -----------------------------------------------------------


def print_result(result: dict) -> None:
    """For each label a table and differences, in per cent; then how they were found."""
    rows = result["rows"]
    for label in rows[0]["scores"]:
        print_table(rows, label)
        print()
        for difference in result["differences"]:
            if difference["label"] == label:
                print(difference["text"])
    print()
    sizes = {}
    for row in rows:
        if row["model"] not in BASELINES:
            sizes[row["model"]] = f"{row['model']} {row['parameters'] / 1e6:.3f} M"
    print(f"parameters: {', '.join(sizes.values())}")
    print(f"seed {result['seed']}; tiles: {result['tiles']}")
    for doubt in result["doubts"]:
        print(f"warning: {doubt}")
    for task, protocol in result["protocol"].items():
        print(f"{task}: {protocol}")
    for words in result["left_out"]:
        print(f"left out: {words}")


def print_table(rows: list[dict], label: str) -> None:
    """The table of one label: a line for each model and dim, "-" where a row has no such figure."""
    first = rows[0]
    width = max(16, *(len(row["model"]) for row in rows))
    n = first["n"]
    title = f"{label}, %, {n['train']} tiles to learn from, {n['test']} to test"
    if "groups" in n:
        title += f" in {n['groups']} groups"
    tasks = " " * (width + 6)
    metrics = f"{'model':{width}}{'dim':>6}"
    lines = []
    for row in rows:
        dim = "-" if row["model"] in BASELINES else row["dim"]
        lines.append(f"{row['model']:{width}}{dim:>6}")
    for task, values in first["scores"][label].items():
        tasks = f"{tasks:{len(metrics)}} {task}"
        for metric in values:
            metrics += HEADINGS.get(metric, f"{metric:>6}")
            for k, row in enumerate(rows):
                lines[k] += cell(row, label, task, metric)
    for line in ("", title, tasks, metrics, *lines):
        print(line.rstrip())


def cell(row: dict, label: str, task: str, metric: str) -> str:
    """A figure in per cent; a chief one with its interval."""
    value = row["scores"][label][task].get(metric)
    if value is None:
        return f"{'-':>6}"
    text = f"{100 * value:>6.1f}"
    if metric in CHIEF:
        low, high = row["intervals"][label][task][metric]
        bounds = f"({100 * low:.1f}-{100 * high:.1f})"
        text += f" {bounds:12}"
    return text


def read_results(file: Path) -> dict[str, dict]:
    """What results.json holds, {title: result}. InputError: it cannot be read; names --out."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read ({error}); move it, or give another folder with --out"
        ) from None


def save_result(result: dict, title: str, folder: str | Path, name: str = "results.json") -> None:
    """Put a result under its title into folder/name; those of other tiles stay.

    result["data"], where it is there, says which tiles: another result of the same title keeps it,
    and this one gets a number. InputError: it cannot be read or written; names --out.
    """
    file = Path(folder) / name
    results = read_results(file)
    data = result.get("data")
    typed = title
    number = 1
    while title in results and results[title].get("data", data) != data:
        number += 1
        title = f"{typed} ({number})"
    replaced = ", instead of its earlier rows" if title in results else ""
    results[title] = result
    try:
        save_atomically(json.dumps(results, indent=1).encode(), file)
    except InputError as error:
        raise InputError(f"{error} with --out") from None
    print(f"{title}: {file}{replaced}")


def write_embeddings(args: Namespace) -> None:
    """The program behind --embed: of all tiles below a folder the first channels, as an .npz."""
    student, config = load_student(args.runs[0])
    dim = args.dim or student.width
    check_dim(dim, student, args.runs[0], "--dim")
    student.to(choose_device(args.device)[0])
    top, files = list_tiles([args.embed], "--embed")
    tiles = CentreTiles(top, student.img_size, files)
    # Made whole at once: to join the batches of a million tiles would take twice the memory
    embeddings = np.empty((len(tiles), dim), np.float16 if args.half else np.float32)
    paths = []
    for batch in readable_batches(tiles, f"embedding {args.embed}"):
        tokens = truncate({"summary": embed(student, batch["image"])}, dim)
        start = len(paths)
        for k in batch["index"]:
            paths.append(files[k])
        embeddings[start : len(paths)] = tokens["summary"]
    licences = [f"{name}: {text}" for name, text in config.get("licences", {}).items()]
    content = {
        "embeddings": embeddings[: len(paths)],  # (n, dim), of the readable tiles
        "paths": paths,
        "dim": dim,
        "licences": licences,
        "model": config["student"],
        "step": config["step"],
    }
    file = io.BytesIO()
    np.savez(file, **content)
    save_atomically(file.getvalue(), args.out)
    print(f"{len(paths)} embeddings of {dim} channels in {args.out}")
    print(f"licences: {'; '.join(licences)}")


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
    add("--seed", type=natural, default=0, help="of drawn tissue and resamples (default: 0)")
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
        flags = (args.data, args.tasks, args.dims, args.teachers)
        if flags != (None, None, None, None) or args.seed:
            raise InputError("--embed: leave out --data, --tasks, --dims, --teachers, --seed")
    elif args.dim or args.half:
        raise InputError("--dim, --half: they need --embed DIR; extras.export cuts students")
    elif args.out and Path(args.out).is_file():
        raise InputError(f"--out: {args.out} is a file; give a folder for results.json")


def check_dim(dim: int, student: Student, run: str, flag: str) -> None:
    """InputError: the student has fewer channels."""
    if dim > student.width:
        raise InputError(f"{flag}: {dim} is above the width of {run}; give at most {student.width}")


def load_models(args: Namespace) -> dict[str, tuple[nn.Module, list[int]]]:
    """What is evaluated -> {name: (student or teacher, dims)}, on the device.

    args: runs, dims (None: each run's nested ones), teachers (None: the last run's offline ones),
    weights_dir, device.
    """
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
        if teachers != config["teachers"]:
            every = ",".join(config["teachers"])
            print(f"teachers that are not beside it, as they take long: add --teachers {every}")
    recipe = config.get("teacher_recipe", {})
    find_weights(teachers, args.weights_dir)  # names all that are missing at once
    for name in teachers:
        teacher = load_teacher(name, args.weights_dir, device, **recipe)
        models[f"teacher {name}"] = (teacher, [teacher.embed_dim])
    return models


def evaluate_runs(args: Namespace) -> None:
    """The program without --embed: a table of students and teachers, printed first, then saved."""
    result = run_tasks(load_models(args), args.data, args.seed, args.tasks)
    print_result(result)
    title = os.path.normpath(args.data) if args.data else DRAWN
    folders = [args.out]
    if args.out is None:  # that of each run
        folders = dict.fromkeys(student_file(run).parent for run in args.runs)
    problems = []
    for folder in folders:
        try:
            save_result(result, title, folder)
        except InputError as problem:  # the other folders get theirs
            problems.append(str(problem))
    if problems:
        raise InputError("; ".join(problems))


def main() -> None:
    """The command line."""
    args = parse_args()
    if args.embed:
        write_embeddings(args)
    else:
        evaluate_runs(args)


if __name__ == "__main__":
    run_program(main)
