"""Pictures of a run: how it learned, what it knows, what its patches see, what it finds.

    pip install matplotlib
    python -m extras.figures runs/demo                      patches and neighbours on drawn tissue
    python -m extras.figures runs/demo --data labelled/     on labelled tiles of your own

What is drawn, into RUN/figures/ or the folder --out:
    curves.png                  loss and cosines to the teachers while training, from log.jsonl
    accuracy-DATA.png           each task of results.json against the channels that are kept, with
                                its 95 % interval as a band, from chance to 100
    patches-DATA.png            patch tokens: three principal components as red, green, blue
    retrieval-DATA-LABEL.png    queries and their five nearest tiles, at three dims
DATA is the name of the folder and six digits that no other folder shares. What a run has not (no
log, no results yet, no intervals in results of before) is left out, and said. Pictures of these
names are replaced, nothing else. Tiles without labels give patch maps alone.
"""

import functools
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

import data
import evaluate
from data import make_parser, natural, path, run_program, save_atomically
from student import InputError, Student, truncate
from teachers import choose_device

BANK = 1024  # the most tiles that a retrieval sheet is searched in
QUERIES = 4  # of a retrieval sheet, each of another class where there are so many
NEAREST = 5
MAPS = 4  # tiles whose patches are drawn
SAME = "#0072B2"  # blue and orange, which colour-blind readers tell apart
OTHER = "#D55E00"
LEVEL = {  # models that are drawn as level lines of their own kind
    "chance": {"color": "black", "linestyle": ":"},
    "colour histogram": {"color": "grey", "linestyle": "-."},
}
STYLE = {"text.parse_math": False}  # a dollar in a name is a dollar
NAMES = {"cells": list(data.CELLS), "tissue": list(data.TISSUES)}  # of the labels of drawn tissue


def import_matplotlib():
    """matplotlib, told to draw into files. InputError names the pip command."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("pictures need: pip install matplotlib") from None
    matplotlib.use("agg")
    return matplotlib


# ---- text: names of runs and folders are anybody's -----------------------------------------------


@functools.cache
def glyphs_of(file: str) -> set[int]:
    """The characters that a font has."""
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(file).get_charmap())


@functools.cache
def font_with(character: str) -> str | None:
    """The name of an installed font that has a character, matplotlib's own first."""
    from matplotlib import font_manager

    own = font_manager.findfont("DejaVu Sans")
    if ord(character) in glyphs_of(own):
        return "DejaVu Sans"
    for font in sorted(font_manager.fontManager.ttflist, key=str):
        if font.name.startswith("Last Resort"):  # has every character, as a box
            continue
        try:
            known = glyphs_of(font.fname)
        except (OSError, RuntimeError):  # a font file that is gone or damaged
            continue
        if ord(character) in known:
            return font.name
    return None


def readable(text: str) -> str:
    """The text, with an escape for every character that no installed font has."""
    shown = ""
    for character in str(text):
        if font_with(character) is None:
            character = character.encode("ascii", "backslashreplace").decode()
            character = character.replace("\n", "\\n")
        shown += character
    # matplotlib leaves names that begin with an underscore out of a legend
    return f" {shown}" if shown.startswith("_") else shown


def choose_fonts(figure) -> None:
    """For every text of a figure, fonts that have its characters."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        families = ["DejaVu Sans"]
        for character in sorted(set(text.get_text()) - {"\n"}):
            font = font_with(character)
            if font and font not in families:
                families.append(font)
        text.set_fontfamily(families)


def file_name(title: str) -> str:
    """A short name for files from a title, mostly a path: its last part, and six digits by which
    two titles never share one. Drawn tissue needs none.
    """
    name = re.sub(r"\W+", "-", Path(title).name).strip("-")[-40:] or "data"
    if title == evaluate.DRAWN:
        return name
    digits = hashlib.sha256(title.encode(errors="surrogatepass")).hexdigest()[:6]
    return f"{name}-{digits}"


def save_figure(figure, file: Path) -> None:
    """As PNG, over an earlier one."""
    choose_fonts(figure)
    try:
        save_atomically(figure, file, write_png)
    except InputError as error:
        raise InputError(f"{error} with --out") from None
    print(file, flush=True)


def write_png(figure, file) -> None:
    """For save_atomically."""
    figure.savefig(file, format="png", dpi=100)


# ---- curves --------------------------------------------------------------------------------------


def read_log(file: Path) -> list[dict]:
    """The lines of a log.jsonl in the order of their steps. After a kill steps repeat: the last
    line of each counts.

    What is no whole line, as a power cut leaves it, is left out.
    """
    lines = {}
    for text in file.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            step = line["step"]
        except (ValueError, TypeError, KeyError):
            continue
        lines[step] = line
    return [lines[step] for step in sorted(lines)]


def split_term(term: str) -> tuple[str, str, int] | None:
    """ "toy_cells/summary_cos@48" -> ("toy_cells", "summary_cos", 48); None for terms of other
    names.
    """
    match = re.fullmatch(r"(.+)/([^/]+)@(\d+)", term)
    if match is None:
        return None
    return match[1], match[2], int(match[3])


class Curve(NamedTuple):
    """A cosine while training."""

    teacher: str
    dim: int
    points: list[tuple[int, float]]  # (step, value)


def collect_cosines(lines: list[dict]) -> dict[str, list[Curve]]:
    """The cosines among the terms, at the largest and the smallest dim: {name: curves}."""
    points = defaultdict(list)  # {(name, teacher, dim): ...}
    for line in lines:
        for term, value in line.get("terms", {}).items():
            parts = split_term(term)
            if parts and "cos" in parts[1]:
                teacher, name, dim = parts
                points[name, teacher, dim].append((line["step"], value))
    dims = {dim for _, _, dim in points}
    panels = defaultdict(list)
    for (name, teacher, dim), values in points.items():
        if dim in (min(dims), max(dims)):
            panels[name].append(Curve(teacher, dim, values))
    return panels


def draw_curves(run: str, lines: list[dict], file: Path) -> None:
    """A panel for the loss, and one for each kind of cosine: a colour a teacher, full dim solid.

    run: its name, for the title.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = collect_cosines(lines)
    count = len(panels) + 1
    figure = Figure(figsize=(7.5, 2.5 * count + 0.3), layout="constrained")
    rows = figure.subplots(count, 1, squeeze=False, sharex=True)[:, 0]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    plot_points(rows[0], losses, color="black")
    rows[0].set_title(readable(f"loss of {run}"))
    for axes, (name, curves) in zip(rows[1:], panels.items(), strict=True):
        largest = max(curve.dim for curve in curves)
        teachers = list(dict.fromkeys(curve.teacher for curve in curves))
        for curve in curves:
            colour = f"C{teachers.index(curve.teacher) % 10}"
            style = "-" if curve.dim == largest else "--"
            label = readable(f"{curve.teacher}, {curve.dim} channels")
            plot_points(axes, curve.points, color=colour, linestyle=style, label=label)
        axes.set_title(readable(f"cosine to the teacher: {name.removesuffix('_cos')}"))
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize="small")
    for axes in rows:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(lines) == 1:
            axes.set_xticks([lines[0]["step"]])
    rows[-1].set_xlabel("step")
    figure.get_layout_engine().set(w_pad=0.1)
    save_figure(figure, file)


def plot_points(axes, points: list[tuple[int, float]], **style) -> None:
    """A line through (x, y) pairs; of few, the points are marked, for a single one has no line."""
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    axes.plot(xs, ys, marker="." if len(points) < 30 else None, **style)


# ---- accuracy against channels -------------------------------------------------------------------


def read_results(file: Path) -> dict[str, dict]:
    """results.json: {title: result}, of those that have rows."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise InputError(f"{file} cannot be read ({error}); move it") from None
    results = {}
    for title, result in content.items():
        if isinstance(result, dict) and result.get("rows"):
            results[title] = result
    return results


class Score(NamedTuple):
    """A figure of results.json, in per cent."""

    value: float
    low: float | None  # ends of its 95 % interval, where there is one
    high: float | None


def collect_scores(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict[int, Score]]]:
    """The first metric of each task: {(label, "task, metric"): {model: {dim: score}}}."""
    panels = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        for label, tasks in row["scores"].items():
            for task, metrics in tasks.items():
                metric = next(iter(metrics), None)
                if metric is None:
                    continue
                panel = (label, f"{task}, {metric.replace('_', ' ')}")
                score = read_score(row, label, task, metric)
                panels[panel][row["model"]][row["dim"]] = score
    return panels


def read_score(row: dict, label: str, task: str, metric: str) -> Score:
    """A metric of a row, with its interval where the row has one."""
    value = 100 * row["scores"][label][task][metric]
    intervals = row.get("intervals", {}).get(label, {}).get(task, {})
    low, high = intervals.get(metric) or (None, None)
    if low is None or high is None:
        return Score(value, None, None)
    return Score(value, 100 * low, 100 * high)


def draw_scores(title: str, rows: list[dict], file: Path) -> None:
    """A row of panels for each label, a panel for each task; a model of one dim, as a teacher is,
    is a level line.
    """
    from matplotlib.figure import Figure

    panels = collect_scores(rows)
    labels = list(dict.fromkeys(label for label, _ in panels))
    columns = 0
    for label in labels:
        columns = max(columns, sum(panel[0] == label for panel in panels))
    models = list(dict.fromkeys(row["model"] for row in rows))
    several = {row["dim"] for row in rows if len(dims_of(rows, row["model"])) > 1}
    ticks = sorted(several or {row["dim"] for row in rows if row["model"] not in LEVEL})
    width = max(6, 3.4 * columns)
    height = 2.9 * len(labels) + 0.2 * len(models) + 0.6
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(labels), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    styles = model_styles(models)
    handles = {}
    for row, label in enumerate(labels):
        tasks = [panel for panel in panels if panel[0] == label]
        for axes, panel in zip(grid[row], tasks, strict=False):  # a label may have fewer tasks
            axes.set_axis_on()
            axes.set_title(readable(f"{label}: {panel[1]}"), fontsize="medium")
            for model, points in panels[panel].items():
                handles[model] = draw_model(axes, points, ticks, styles[model])
            set_channels(axes, ticks)
            set_per_cent(axes, panels[panel])
        grid[row][0].set_ylabel("%")
    drawn = [model for model in models if model in handles]
    lines = [handles[model] for model in drawn]
    names = [legend_name(rows, model) for model in drawn]
    figure.legend(lines, names, loc="outside lower left", fontsize="small")
    title = readable(title)
    fits = int(9 * width)  # characters
    if len(title) > fits:
        title = "..." + title[-fits:]
    figure.suptitle(title, x=0.01, ha="left")
    figure.get_layout_engine().set(w_pad=0.1)
    save_figure(figure, file)


def dims_of(rows: list[dict], model: str) -> list[int]:
    """The dims that a model was cut to."""
    return [row["dim"] for row in rows if row["model"] == model]


def legend_name(rows: list[dict], model: str) -> str:
    """A model, and its channels where it has one number of them."""
    dims = dims_of(rows, model)
    if len(dims) > 1 or dims == [0]:  # chance has none
        return readable(model)
    return readable(f"{model} ({dims[0]} channels)")


def model_styles(models: list[str]) -> dict[str, dict]:
    """A colour each; chance and the colour histogram have lines of their own."""
    styles = {}
    for model in models:
        number = len(styles.keys() - LEVEL.keys())
        styles[model] = LEVEL.get(model) or {"color": f"C{number % 10}"}
    return styles


def draw_model(axes, points: dict[int, Score], ticks: list[int], style: dict):
    """The line of one model in one panel, and its interval as a band. Returns the line."""
    dims = sorted(points)
    scores = [points[dim] for dim in dims]
    lows = [score.low for score in scores]
    highs = [score.high for score in scores]
    band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
    if len(dims) == 1 and (len(ticks) > 1 or dims[0] not in ticks):
        line = axes.axhline(scores[0].value, **{"linestyle": "--", **style})
        if lows[0] is not None:
            axes.axhspan(lows[0], highs[0], **band)
        return line
    [line] = axes.plot(dims, [score.value for score in scores], "o-", markersize=4, **style)
    if None not in lows:
        if len(dims) == 1:
            axes.vlines(dims, lows, highs, color=style["color"])
        else:
            axes.fill_between(dims, lows, highs, **band)
    return line


def set_per_cent(axes, models: dict[str, dict[int, Score]]) -> None:
    """From chance, or what lies below it, to 100; from 0 where chance means nothing."""
    lowest = 0.0
    if "chance" in models:
        lowest = 100.0
        for points in models.values():
            for score in points.values():
                lowest = min(lowest, score.value if score.low is None else score.low)
    axes.set_ylim(lowest - 0.02 * (100 - lowest), 101)


def set_channels(axes, ticks: list[int]) -> None:
    """The axis of channels: powers of two are equally far apart, at most eight are written."""
    from matplotlib.ticker import NullLocator

    some = ticks[:: -(-len(ticks) // 8)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(some, [str(dim) for dim in some])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("channels")
    axes.grid(alpha=0.3)


# ---- tiles ---------------------------------------------------------------------------------------


def open_tiles(root: str | None, seed: int, size: int) -> tuple[Dataset, Dataset, dict]:
    """Tiles to search in, tiles to query with, and the names of their classes: {label: [name of
    class 0, ...]}.

    A folder without labels gives the same tiles for both, and no classes.
    """
    if root is None:
        bank = data.TissueTiles("bank", seed, size, BANK)
        queries = data.TissueTiles("test", seed, size, BANK)
        return bank, queries, NAMES
    if not is_labelled(Path(root)):
        top, files = data.list_tiles([root], "--data")
        tiles = evaluate.CentreTiles(top, size, files[:BANK])
        return tiles, tiles, {}
    splits = evaluate.labelled_files(root)
    pair = []
    for split in ("train", "test"):
        files, targets = splits[split]
        targets = {kind: values[:BANK] for kind, values in targets.items()}
        pair.append(evaluate.CentreTiles(root, size, files[:BANK], targets))
    names = {}
    if "class" in splits["train"][1]:
        names["class"] = class_names(Path(root), *splits["train"])
    return pair[0], pair[1], names


def is_labelled(root: Path) -> bool:
    """Whether a folder has one of the layouts that evaluate.py understands."""
    for name in ("labels.csv", "train", "masks"):
        if (root / name).exists():
            return True
    return False


def class_names(root: Path, files: list[str], targets: dict) -> list[str]:
    """The names of the class numbers of `labelled_files`, in order."""
    label_of = {}
    for rows in evaluate.find_rows(root)[1].values():
        for row in rows:
            label_of[row.file] = row.label
    names = {}
    for file, number in zip(files, targets["class"], strict=True):
        names[number] = label_of[file]
    return [names[number] for number in sorted(names)]


def three_dims(nested_dims: list[int]) -> list[int]:
    """The smallest, a middle and the largest dim, or as many as there are."""
    dims = sorted(nested_dims)
    return sorted({dims[0], dims[len(dims) // 2], dims[-1]})


def readable_tiles(tiles: Dataset, wanted: int) -> list[dict]:
    """The first tiles that can be read."""
    found = []
    for k in range(len(tiles)):
        tile = tiles[k]
        if not tile.get("unreadable"):
            found.append(tile)
        if len(found) == wanted:
            break
    if not found:
        raise InputError("--data: none of its tiles can be read")
    return found


def choose_tiles(tiles: Dataset, label: str | None, wanted: int) -> list[dict]:
    """Tiles of as many different classes as there are; without a label, simply the first."""
    if label is None:
        return readable_tiles(tiles, wanted)
    candidates = readable_tiles(tiles, 32 * wanted)
    firsts = []
    others = []
    seen = set()
    for tile in candidates:
        number = int(tile[label])
        if number in seen:
            others.append(tile)
        else:
            firsts.append(tile)
        seen.add(number)
    return (firsts + others)[:wanted]


# ---- patch maps ----------------------------------------------------------------------------------


def colours_of(tokens: Tensor) -> Tensor:
    """Patch tokens (B, N, D) -> their three principal components, over all B, as RGB in [0, 1] (B,
    N, 3).
    """
    centred = tokens.double() - tokens.double().mean((0, 1))
    _, axes = torch.linalg.eigh(centred.flatten(0, 1).T.cov().reshape(tokens.shape[2], -1))
    rgb = (centred @ axes[:, -3:]).flip(-1)  # (B, N, 3), the largest first
    missing = 3 - rgb.shape[-1]  # of a cut to one or two channels
    rgb = torch.nn.functional.pad(rgb, (0, missing))
    ends = torch.tensor([0.02, 0.98], dtype=rgb.dtype)
    low, high = rgb.flatten(0, 1).quantile(ends, dim=0)
    flat = high - low < 1e-9
    scaled = (rgb - low) / (high - low).clamp(min=1e-9)
    return torch.where(flat, 0.5, scaled).clamp(0, 1)


def draw_patches(
    student: Student, model: str, dims: list[int], tiles: Dataset, names: dict, file: Path
) -> None:
    """A row a tile: the tile under its classes, and its patch tokens at each dim.

    model: its name, for the title; names: {label: [name of class 0, ...]}.
    """
    from matplotlib.figure import Figure

    chosen = choose_tiles(tiles, next(iter(names), None), MAPS)
    images = torch.stack([tile["image"] for tile in chosen])
    tokens = {"patches": evaluate.embed(student, images, kind="patches")}  # (B, N, D)
    columns = len(dims) + 1
    figure = Figure(figsize=(2.3 * columns, 2.5 * len(images) + 0.8), layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False)
    for row, tile in zip(grid, chosen, strict=True):
        show(row[0], tile["image"])
        classes = ", ".join(names[label][int(tile[label])] for label in names)
        row[0].set_title(readable(classes or "tile")[:30], fontsize="medium")
    for column, dim in enumerate(dims, 1):
        colours = colours_of(truncate(tokens, dim)["patches"])
        maps = colours.unflatten(1, (student.grid, student.grid))  # (B, grid, grid, 3)
        for row, picture in zip(grid, maps, strict=True):
            row[column].imshow(picture.numpy(), interpolation="nearest")
            row[column].set_axis_off()
            row[column].set_title(f"{dim} channels", fontsize="medium")
    figure.suptitle(readable(model), x=0.01, ha="left", fontsize="medium")
    figure.supxlabel("patch tokens: three principal components as red, green, blue", fontsize=9)
    save_figure(figure, file)


def show(axes, image: Tensor) -> None:
    """A tile, uint8 (3, H, W), without axes."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_xticks([])
    axes.set_yticks([])


# ---- retrieval sheets ----------------------------------------------------------------------------


class Bank(NamedTuple):
    """Tiles that are searched in: the readable ones."""

    images: Tensor  # (n, 3, S, S)
    labels: dict[str, Tensor]  # {label: class numbers (n,)}
    features: Tensor  # (n, D)


def embed_bank(student: Student, tiles: Dataset, labels: list[str]) -> Bank:
    """The tiles with their embeddings; at most BANK of them, so that memory holds them."""
    images = []
    numbers = defaultdict(list)
    features = []
    for batch in evaluate.readable_batches(tiles, "embedding the bank"):
        images.append(batch["image"])
        features.append(evaluate.embed(student, batch["image"]))
        for label in labels:
            numbers[label].append(batch[label])
    joined = {label: torch.cat(parts) for label, parts in numbers.items()}
    return Bank(torch.cat(images), joined, torch.cat(features))


def search(student: Student, dims: list[int], bank: Bank, queries: list[dict]) -> dict:
    """{dim: (similarities, indices), each (queries, NEAREST)}."""
    images = torch.stack([query["image"] for query in queries])
    tokens = {"bank": bank.features, "queries": evaluate.embed(student, images)}
    found = {}
    for dim in dims:
        cut = truncate(tokens, dim)
        found[dim] = evaluate.nearest(cut["bank"], cut["queries"], NEAREST)
    return found


def draw_retrieval(
    model: str,
    found: dict,
    bank: Bank,
    queries: list[dict],
    label: str,
    names: list[str],
    file: Path,
) -> None:
    """A block for each query: the query, and a row of its nearest tiles for each dim.

    model: its name, for the caption; found: of `search`; names: of the classes of `label`.
    """
    from matplotlib.figure import Figure

    rows = len(queries) * len(found)
    height = 1.62 * rows + 0.7  # inches, 0.7 of them for the caption
    figure = Figure(figsize=(1.5 * (NEAREST + 1) + 0.4, height))
    figure.subplots_adjust(0.01, 0.7 / height, 0.99, 1 - 0.25 / height, 0.1, 0.24)
    grid = figure.subplots(rows, NEAREST + 1, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, query in enumerate(queries):
        own = int(query[label])
        block = grid[number * len(found) : (number + 1) * len(found)]
        show_framed(block[0][0], query["image"], f"query: {names[own]}", "black")
        for row, dim in zip(block, found, strict=True):
            similarity, index = found[dim]
            row[1].set_ylabel(f"{dim} channels", fontsize=8)
            for column in range(index.shape[1]):
                place = int(index[number, column])
                theirs = int(bank.labels[label][place])
                title = f"{names[theirs]} {similarity[number, column]:.3f}"
                if theirs == own:
                    show_framed(row[column + 1], bank.images[place], title, SAME)
                else:
                    show_framed(row[column + 1], bank.images[place], title, OTHER, "--")
    caption = (
        f"{readable(model)}: the {NEAREST} nearest of {len(bank.images)} tiles by the cosine of "
        f"the first channels, written above.\nBlue frame: right, of the query's {label}; orange "
        "and broken: wrong, of another."
    )
    figure.text(0.01, 0.15 / height, caption, fontsize=9)
    save_figure(figure, file)


def show_framed(axes, image: Tensor, title: str, colour: str, line: str = "-") -> None:
    """A tile in a coloured frame, with a line of text above it."""
    axes.set_axis_on()
    show(axes, image)
    axes.set_title(readable(title)[:24], fontsize=7, pad=3)
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linestyle(line)
        spine.set_linewidth(3)


# ---- the command line ----------------------------------------------------------------------------


def name_of(run: Path) -> str:
    """A run's name: that of its folder, also where RUN is "." or a student.pt."""
    folder = run if run.is_dir() else run.parent
    return folder.resolve().name


def draw_history(folder: Path, out: Path) -> None:
    """What the files of a run tell: the curves of its training, the scores of its evaluations."""
    lines = []
    if (folder / "log.jsonl").exists():
        lines = read_log(folder / "log.jsonl")
    if lines:
        draw_curves(name_of(folder), lines, out / "curves.png")
    else:
        print(f"no curves: {folder} has no log.jsonl with a step")
    results = {}
    if (folder / "results.json").exists():
        results = read_results(folder / "results.json")
    if not results:
        print(f"no scores: {folder} has no results.json; python evaluate.py {folder} makes one")
    for title, result in results.items():
        if "differences" not in result:  # as evaluate.py wrote them before it had intervals
            print(f"no intervals, chance and colour histogram for {title}: run evaluate.py again")
        draw_scores(title, result["rows"], out / f"accuracy-{file_name(title)}.png")


def draw_tiles(run: str, root: str | None, seed: int, device: str | None, out: Path) -> None:
    """What the student sees in tiles: patch maps and, where there are classes, retrieval sheets."""
    student, config = evaluate.load_student(run)
    student.to(choose_device(device)[0])
    dims = three_dims(config["nested_dims"])
    tiles, query_tiles, names = open_tiles(root, seed, student.img_size)
    name = file_name(root or evaluate.DRAWN)
    model = f"{name_of(Path(run))}, {config['student']} after {config['step']} steps"
    draw_patches(student, model, dims, query_tiles, names, out / f"patches-{name}.png")
    if not names:
        print(f"no retrieval sheets: {root} has no classes")
        return
    bank = embed_bank(student, tiles, list(names))
    for label in names:
        queries = choose_tiles(query_tiles, label, QUERIES)
        found = search(student, dims, bank, queries)
        file = out / f"retrieval-{name}-{label}.png"
        draw_retrieval(model, found, bank, queries, label, names[label], file)


def main() -> None:
    """The command line."""
    parser = make_parser("python -m extras.figures", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder or a student.pt")
    parser.add_argument("--data", type=path, help="tiles, labelled or not (default: drawn tissue)")
    parser.add_argument("--out", type=path, help="where pictures go (default: RUN/figures)")
    parser.add_argument("--seed", type=natural, default=0, help="of drawn tissue (default: 0)")
    parser.add_argument("--device", type=path, help="cuda, mps or cpu (default: the best at hand)")
    args = parser.parse_args()
    matplotlib = import_matplotlib()
    folder = Path(args.run)
    if not folder.is_dir():
        folder = folder.parent
    out = Path(args.out or folder / "figures")
    with matplotlib.rc_context(STYLE):
        draw_history(folder, out)
        draw_tiles(args.run, args.data, args.seed, args.device, out)


if __name__ == "__main__":
    run_program(main)
