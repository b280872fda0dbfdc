"""Robustness: what corrupted tiles cost a student, at every nested dim, beside its teachers.

    python -m extras.robustness runs/demo              drawn tissue, beside the offline teachers
    python -m extras.robustness runs/a --data labelled/ --teachers uni,virchow2

The bank stays clean, the test tiles are corrupted, and kNN (as in evaluate.py) asks whether they
still find their class. The cosine between the features of a tile, clean and corrupted, says how
far it has moved; that of two different clean tiles, in the last line, is what to hold it against:
where all features lie close together every cosine is high.

Corruptions, three strengths each, on the tile as the model sees it:
    blur      Gaussian, sigma in pixels of a 224 px tile (smaller tiles: less, in proportion)
    jitter    brightness, contrast and saturation changed by up to this share, hue by a quarter of
              it; by how much, and in which order, is drawn for each tile and kept for all strengths
    grey      this share of the colour is lost
    jpeg      saved at this quality
    gamma     raised to this power, which darkens
    turn      by so many degrees
    pepper    this share of the pixels is black; those of a lower share stay black at a higher one

They are those of a study of Pathryoshka-B, UNI2-h, Virchow2, Prov-GigaPath and Phikon-v2, read from
its code (github.com/schuefflerlab/Robustness-Evaluation-of-Pathology-FMs), where it trains on clean
tiles ("type 2"). Its strengths: jitter, JPEG, pepper as here; blur 0.5, 1, 2, 3, 4 with a kernel
that ends at one to three sigma, where ours ends at three; gamma 0.4, 0.8, 1.2, 1.6, 2; grey all of
it; one of the three turns at random. It fits a probe and reports AUROC, so figures do not compare.

Printed: a table a label, then the cosines; "lost" is clean less the mean of all 21, "kept" the part
of what lies above chance that is left of it ("-" where clean is within ten points of chance). Kept:
robustness.json in the folder of the run or --out, other data's results beside; with matplotlib a
picture, figures/robustness-DATA.png. On n tiles an accuracy has a standard error of up to
50 / sqrt(n) points.
"""

import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import evaluate
from data import make_parser, name_list, natural, path, run_program
from extras import figures
from student import InputError, truncate

TILES = 1024  # of drawn tissue, in the bank and again to test on
SIZE = 224  # pixels a side of the tiles that lengths are given for
LEVELS = (1, 2, 3)
FILE = "robustness.json"


# ---- corruptions: image uint8 (3, S, S), strength, seed -> image of the same kind ----------------


def blur(image: Tensor, sigma: float, seed: int) -> Tensor:
    """A Gaussian blur, its kernel cut at three sigma."""
    sigma = sigma * image.shape[-1] / SIZE
    reach = math.ceil(3 * sigma)
    return TF.gaussian_blur(image, 2 * reach + 1, sigma)


def jitter(image: Tensor, share: float, seed: int) -> Tensor:
    """Another brightness, contrast, saturation and hue, drawn as torchvision draws them."""
    transform = v2.ColorJitter(share, share, share, share / 4)
    with torch.random.fork_rng(devices=[]):  # what others draw from stays as it was
        torch.manual_seed(seed)
        return transform(image)


def grey(image: Tensor, share: float, seed: int) -> Tensor:
    """A mixture of the tile and its grey values."""
    return TF.adjust_saturation(image, 1 - share)


def jpeg(image: Tensor, quality: int, seed: int) -> Tensor:
    """What is left of a tile after it was saved as JPEG."""
    saved = TF.jpeg(TF.to_pil_image(image), quality)  # by Pillow: torchvision drops its own codec
    return TF.pil_to_tensor(saved)


def gamma(image: Tensor, exponent: float, seed: int) -> Tensor:
    """Values in [0, 1] to a power."""
    return TF.adjust_gamma(image, exponent)


def turn(image: Tensor, degrees: int, seed: int) -> Tensor:
    """Counter-clockwise, by quarters: pixels move, nothing is interpolated."""
    return torch.rot90(image, degrees // 90, (1, 2))


def pepper(image: Tensor, share: float, seed: int) -> Tensor:
    """Pixels at random places turn black."""
    noise = np.random.default_rng(seed).random(image.shape[1:])
    return image.masked_fill(torch.from_numpy(noise < share), 0)


class Corruption(NamedTuple):
    """How a tile is spoilt, how much, and what the strengths are, for people."""

    apply: Callable[[Tensor, float, int], Tensor]
    strengths: tuple[float, float, float]
    unit: str


CORRUPTIONS = {
    "blur": Corruption(blur, (1, 2, 4), "px"),
    "jitter": Corruption(jitter, (0.2, 0.4, 0.6), ""),
    "grey": Corruption(grey, (0.3, 0.6, 1), ""),
    "jpeg": Corruption(jpeg, (75, 50, 30), ""),
    "gamma": Corruption(gamma, (1.2, 1.6, 2), ""),
    "turn": Corruption(turn, (90, 180, 270), "degrees"),
    "pepper": Corruption(pepper, (0.1, 0.2, 0.3), ""),
}


def corrupt(image: Tensor, name: str, level: int, seed: int) -> Tensor:
    """A tile, uint8 (3, S, S), corrupted; level 0 is the tile as it is, 3 the strongest."""
    if level == 0:
        return image
    corruption = CORRUPTIONS[name]
    return corruption.apply(image, corruption.strengths[level - 1], seed)


class CorruptedTiles(Dataset):
    """Labelled tiles, each corrupted. What is random about tile k is a function of (seed, k)."""

    def __init__(self, tiles: Dataset, name: str, level: int, seed: int):
        self.tiles = tiles
        self.name = name
        self.level = level
        self.seed = seed
        self.unreadable = getattr(tiles, "unreadable", set())  # so that each is named once

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, k: int) -> dict:
        tile = dict(self.tiles[k])
        seed = int(np.random.SeedSequence((self.seed, k)).generate_state(1)[0])
        tile["image"] = corrupt(tile["image"], self.name, self.level, seed)
        return tile


# ---- from tiles to rows --------------------------------------------------------------------------


def open_tiles(root: str | None, seed: int, size: int) -> tuple[Dataset, Dataset, list[str]]:
    """Tiles for the bank, tiles to test on, and their labels of classes. InputError: no classes."""
    bank, test = evaluate.open_splits(root, seed, size)
    if root is None:  # drawn once, for they are read 22 times
        bank = [bank[k] for k in range(min(TILES, len(bank)))]
        test = [test[k] for k in range(min(TILES, len(test)))]
    labels = []
    for label, kind in evaluate.LABELS.items():
        if kind == "summary" and label in test[0]:
            labels.append(label)
    if not labels:
        raise InputError(f"--data: {root} has masks, no classes; give tiles of classes")
    return bank, test, labels


def measure(models: dict[str, tuple[nn.Module, list[int]]], root: str | None, seed: int) -> dict:
    """Every model at each of its dims, on clean tiles and under every corruption.

    models: {name: (student or teacher, dims)}; root: a labelled folder, None for drawn tissue.
    Returns a result that JSON can hold; its "rows": [{"model", "dim", "corruption", "level",
    "cosine", "scores": {label: {metric: value}}}, ...]. Corruption "clean" has level 0, "another
    tile" has the mean cosine of two different clean tiles, and no scores.
    """
    rows = []
    for size, group in evaluate.by_size(models).items():  # each model sees tiles of its own size
        bank_tiles, test_tiles, labels = open_tiles(root, seed, size)
        bank = evaluate.embed_tiles(group, bank_tiles, labels, "embedding the bank")
        clean = evaluate.embed_tiles(group, test_tiles, labels, "embedding clean tiles")
        rows += compare(group, labels, bank, clean, clean, "clean", 0)
        for name in CORRUPTIONS:
            for level in LEVELS:
                tiles = CorruptedTiles(test_tiles, name, level, seed)
                spoilt = evaluate.embed_tiles(group, tiles, labels, describe(name, level))
                rows += compare(group, labels, bank, clean, spoilt, name, level)
        others = {key: x.roll(1, 0) for key, x in clean.items()}
        rows += compare(group, [], bank, clean, others, "another tile", 0)
    chance = {}
    for label in labels:
        chance[label] = 1 / len(clean[label].unique())
    strengths = {}
    for name, corruption in CORRUPTIONS.items():
        strengths[name] = corruption.strengths
    return {
        "protocol": evaluate.PROTOCOLS["knn"] + "; the bank is clean",
        "strengths": strengths,
        "n": {"bank": len(bank[labels[0]]), "test": len(clean[labels[0]])},
        "chance": chance,  # of the balanced accuracy
        "seed": seed,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "rows": rows,
    }


def compare(
    models: dict, labels: list[str], bank: dict, clean: dict, spoilt: dict, name: str, level: int
) -> list[dict]:
    """The rows of one corruption: a row for each model and dim.

    bank, clean, spoilt: features and class numbers, as evaluate.embed_tiles returns them
    """
    rows = []
    for model, (_, dims) in models.items():
        key = (model, "summary")
        whole = {"bank": bank[key], "clean": clean[key], "spoilt": spoilt[key]}
        for dim in dims:
            cut = truncate(whole, dim)
            scores = {}
            for label in labels:
                found = evaluate.knn(cut["bank"], bank[label], cut["spoilt"], spoilt[label])
                scores[label] = evaluate.figures_of(found)
            cosine = F.cosine_similarity(cut["clean"].double(), cut["spoilt"].double())
            row = {"model": model, "dim": dim, "corruption": name, "level": level}
            rows.append({**row, "cosine": cosine.mean().item(), "scores": scores})
    return rows


# ---- the table -----------------------------------------------------------------------------------


def describe(name: str, level: int) -> str:
    """A corruption and its strength, for people: "blur 2 px"."""
    corruption = CORRUPTIONS[name]
    return f"{name} {corruption.strengths[level - 1]} {corruption.unit}".strip()


def values_of(rows: list[dict], label: str | None) -> dict[tuple[str, int], dict]:
    """{(model, dim): {(corruption, level): balanced accuracy in %, or without a label the
    cosine}}.
    """
    columns = {}
    for row in rows:
        column = columns.setdefault((row["model"], row["dim"]), {})
        if label is None:
            column[row["corruption"], row["level"]] = row["cosine"]
        elif label in row["scores"]:
            accuracy = row["scores"][label]["balanced_accuracy"]
            column[row["corruption"], row["level"]] = 100 * accuracy
    return columns


def mean_corrupted(column: dict[tuple[str, int], float]) -> float:
    """The mean over corruptions and strengths."""
    values = []
    for name in CORRUPTIONS:
        for level in LEVELS:
            values.append(column[name, level])
    return sum(values) / len(values)


def kept(clean: float, mean: float, chance: float) -> float | None:
    """What is left, in %, of what lies above chance; None where that is hardly anything."""
    if clean < chance + 10:
        return None
    return 100 * (mean - chance) / (clean - chance)


def print_result(result: dict) -> None:
    """A table a label, then the cosines; a line for each corruption and strength."""
    n = result["n"]
    for label, chance in result["chance"].items():
        print(
            f"\n{label}: balanced accuracy of kNN, %; chance is {100 * chance:.1f}; "
            f"{n['bank']} clean tiles in the bank, {n['test']} to test"
        )
        columns = values_of(result["rows"], label)
        widths = print_lines(columns, 1)
        means = []
        losses = []
        shares = []
        for column in columns.values():
            clean = column["clean", 0]
            mean = mean_corrupted(column)
            means.append(mean)
            losses.append(clean - mean)
            shares.append(kept(clean, mean, 100 * chance))
        print_line("mean of 21", means, widths, 1)
        print_line("lost, points", losses, widths, 1)
        print_line("kept, %", shares, widths, 0)
    print("\ncosine of a tile's features, clean and corrupted")
    columns = values_of(result["rows"], None)
    widths = print_lines(columns, 3)
    means = [mean_corrupted(column) for column in columns.values()]
    print_line("mean of 21", means, widths, 3)
    others = [column["another tile", 0] for column in columns.values()]
    print_line("another tile", others, widths, 3)
    print(f"\nknn: {result['protocol']}; seed {result['seed']}")


def print_lines(columns: dict[tuple[str, int], dict], digits: int) -> list[int]:
    """The head of a table, the line of clean tiles, and one for each corruption and strength.

    Returns the width of each column; the first of a model has room for its name.
    """
    names = f"{'':18}"
    dims = f"{'channels':18}"
    widths = []
    named = None
    for model, dim in columns:
        shown = "" if model == named else model
        widths.append(max(8, len(shown) + 2))
        names += f"{shown:>{widths[-1]}}"
        dims += f"{dim:>{widths[-1]}}"
        named = model
    print(f"{names}\n{dims}")
    print_line("clean", [column["clean", 0] for column in columns.values()], widths, digits)
    for name in CORRUPTIONS:
        for level in LEVELS:
            values = [column[name, level] for column in columns.values()]
            print_line(describe(name, level), values, widths, digits)
    return widths


def print_line(text: str, values: list[float | None], widths: list[int], digits: int) -> None:
    """A line of a table; None is a dash."""
    line = f"{text:18}"
    for value, width in zip(values, widths, strict=True):
        shown = "-" if value is None else f"{value:.{digits}f}"
        line += f"{shown:>{width}}"
    print(line)


# ---- the file and the picture --------------------------------------------------------------------


def draw_result(result: dict, title: str, file: Path) -> None:
    """A row of panels for each label and one for the cosines, a panel for each corruption: its
    strength to the right, a line for each model and dim.
    """
    from matplotlib.figure import Figure

    rows = [*result["chance"], None]
    height = 2.4 * len(rows) + 1.2
    figure = Figure(figsize=(2.2 * len(CORRUPTIONS), height), layout="constrained")
    grid = figure.subplots(len(rows), len(CORRUPTIONS), squeeze=False, sharey="row")
    for panels, label in zip(grid, rows, strict=True):
        columns = values_of(result["rows"], label)
        styles = line_styles(list(columns))
        for axes, name in zip(panels, CORRUPTIONS, strict=True):
            for key, column in columns.items():
                values = [column["clean", 0]]
                values += [column[name, level] for level in LEVELS]
                axes.plot(range(4), values, marker=".", **styles[key])
            strengths = [str(strength) for strength in CORRUPTIONS[name].strengths]
            axes.set_xticks(range(4), ["clean", *strengths], fontsize="small")
            axes.grid(alpha=0.3)
            axes.set_title(f"{name} {CORRUPTIONS[name].unit}".strip(), fontsize="medium")
        if label is None:
            panels[0].set_ylabel("cosine to the clean tile")
        else:
            chance = 100 * result["chance"][label]
            set_scale(panels, chance)
            panels[0].set_ylabel(figures.readable(f"{label}, balanced kNN, %"))
    lines = grid[0][0].get_lines()
    names = [figures.readable(f"{model}, {dim} channels") for model, dim in columns]
    names.append("chance")
    figure.legend(lines, names, loc="outside lower left", fontsize="small", ncols=3)
    n = result["n"]
    title = f"{title}: {n['test']} corrupted tiles, {n['bank']} clean ones in the bank"
    figure.suptitle(figures.readable(title), x=0.01, ha="left")
    figures.save_figure(figure, file)


def set_scale(panels, chance: float) -> None:
    """From chance, or what lies below it, to 100; with a line at chance."""
    lowest = chance
    for axes in panels:
        for line in axes.get_lines():
            lowest = min(lowest, *line.get_ydata())
        axes.axhline(chance, color="black", linestyle=":", linewidth=1)
    panels[0].set_ylim(lowest - 2, 101)


def line_styles(columns: list[tuple[str, int]]) -> dict[tuple[str, int], dict]:
    """A model of several dims: solid, from light to dark; of one, as teachers: dashed."""
    from matplotlib import colormaps

    dims = {}
    for model, dim in columns:
        dims.setdefault(model, []).append(dim)
    styles = {}
    single = 0
    for model, dim in columns:
        if len(dims[model]) == 1:
            styles[model, dim] = {"color": f"C{1 + single % 9}", "linestyle": "--"}
            single += 1
        else:
            share = 0.25 + 0.75 * dims[model].index(dim) / (len(dims[model]) - 1)
            styles[model, dim] = {"color": colormaps["Blues"](share)}
    return styles


# ---- the command line ----------------------------------------------------------------------------


def main() -> None:
    """The command line."""
    parser = make_parser("python -m extras.robustness", __doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run folder or a student.pt")
    add("--data", type=path, help=f"a folder of {evaluate.LAYOUTS} (default: drawn tissue)")
    add("--teachers", type=name_list, help="'' for none (default: the run's offline ones)")
    add("--out", type=path, help="folder of robustness.json and figures/ (default: RUN)")
    add("--seed", type=natural, default=0, help="of corruptions and drawn tissue (default: 0)")
    add("--device", type=path, help="cuda, mps or cpu (default: the best at hand)")
    add("--weights-dir", type=path, default="weights", help="of teachers (default: weights)")
    args = parser.parse_args()
    out = Path(args.out or args.run)
    if args.out and out.is_file():
        raise InputError(f"--out: {out} is a file; give a folder for robustness.json")
    if not out.is_dir() and not args.out:
        out = out.parent  # RUN is a student.pt
    evaluate.read_results(out / FILE)  # what is in the way is found before the work, not after
    models = evaluate.load_models(Namespace(runs=[args.run], dims=None, **vars(args)))
    result = measure(models, args.data, args.seed)
    print_result(result)
    title = args.data or evaluate.DRAWN
    evaluate.save_result(result, title, out, FILE)
    try:
        matplotlib = figures.import_matplotlib()
    except InputError as problem:
        print(f"no picture: {problem}")
        return
    with matplotlib.rc_context(figures.STYLE):
        name = figures.file_name(title)
        draw_result(result, title, out / "figures" / f"robustness-{name}.png")


if __name__ == "__main__":
    run_program(main)
