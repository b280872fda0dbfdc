r"""Other people's labels into the layout that evaluate.py --data reads.

    python -m extras.labels SRC OUT                        SRC/CLASS/*, a fifth of it to test on
    python -m extras.labels SRC OUT --group '(\d+)_r'      tiles of one patient stay on one side
    python -m extras.labels SRC OUT --label '_(OSCC|Normal)_'    the class is in the path
    python -m extras.labels table.csv OUT --tiles DIR      a table and the tiles that it names
    python -m extras.labels SRC OUT --threshold 127        grey or JPEG masks: above it is class 1

SRC is one of these; what is taken for what is said, and so is all that is left out:

    classes   SRC/CLASS/*, to any depth. --label REGEX finds the class in a tile's path below SRC,
              which begins with "/", instead: its first group, or all that it matches.
    split     train/ and test/ (training, testing; val where there is no test), each of classes or
              of masks; NCT-CRC-HE-100K/ is train and CRC-VAL-HE-7K/ is test.
    masks     x_mask.png, x-labelled.png, ... beside x.jpg, or masks/, labels/, annotations/, ...
              beside images/. Masks are those of class numbers that evaluate.py reads.
    a table   of commas, semicolons, tabs or bars. Columns are guessed by their names, or named by
              --path, --label, --split and --group; --split '' splits anew. A path may lack its
              folder and its ending, where one tile alone fits.

--group is a column of a table or a regex on the path, as --label is. With it whole groups, of a
patient or a slide, fall to one side; without, tiles do, and tiles of one slide on both sides
flatter any model. The split is seeded, and near --test in each class.

OUT gets labels.csv and a link to the tiles, or links to images and masks; nothing is copied but
masks that --threshold makes. It must not exist, and is whole or absent. SRC is only read.
"""

import csv
import os
import re
import shlex
import shutil
from argparse import ArgumentTypeError, Namespace
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import (
    UnreadableTile,
    list_tiles,
    make_parser,
    natural,
    open_mask,
    open_tile,
    path,
    progress,
    run_program,
)
from student import InputError

# Names of folders and splits, in lower case; of several the first that is there is taken.
TRAIN = ["train", "training", "nct-crc-he-100k", "nct-crc-he-100k-nonorm"]
TEST = ["test", "testing", "crc-val-he-7k", "val", "valid", "validation", "dev"]
IMAGE_FOLDERS = ["images", "image", "imgs", "img", "tiles", "patches"]
MASK_FOLDERS = ["masks", "mask", "labels", "label", "labelled", "labeled", "annotations"]
MASK_FOLDERS += ["annotation", "segmentation", "segmentations", "gt", "groundtruth", "ground_truth"]
MASK_NAME = re.compile(
    r"(.+)[-_. ](masks?|labels?|labell?ed|annotations?|seg|segmentation|gt)", re.IGNORECASE
)
IMAGE_NAME = re.compile(r"(.+)[-_. ](image|img|tile|patch)", re.IGNORECASE)
# Columns of tables, in lower case and with "_" for spaces.
GUESSES = {
    "path": "path file filename file_name file_path filepath image_path image image_name img tile "
    "tile_path tile_name patch image_id id".split(),
    "label": "label class target diagnosis category class_name label_name tissue type y".split(),
    "split": "split set partition subset phase".split(),
    "group": "group patient patient_id slide slide_id case case_id subject wsi".split(),
}
SEPARATORS = ",;\t|"


class Tile(NamedTuple):
    """A tile of SRC. Paths are relative to the folder of tiles."""

    file: str
    label: str  # its class, or the path of its mask
    split: str  # train or test; "" where SRC does not say
    group: str = ""
    name: str = ""  # of image and mask below images/ and masks/, without their endings


def left_out(things: list[str], why: str) -> None:
    """Say what does not come along."""
    if things:
        print(f"left out: {len(things):,} {why}, as {things[0]}")


# ---- folders -------------------------------------------------------------------------------------


def read_folder(args: Namespace) -> tuple[str, str, list[Tile]]:
    """A folder of classes or of masks -> the folder, "class" or "mask", its tiles."""
    top, files = list_tiles([args.src], "SRC", with_masks=True)
    split_of = split_files(files)
    files = list(split_of)
    masks = []
    if args.label is None:
        masks = [file for file in files if mask_key(file)[0]]
    if masks:
        return top, "mask", pair_masks(split_of)
    tiles = []
    nowhere = []
    for file, split in split_of.items():
        if args.label is None:
            label = class_folder(file, split)
        else:
            label = found_in(args.label, file)
        if label:
            tiles.append(Tile(file, label, split))
        else:
            nowhere.append(file)
    if not tiles:
        raise InputError(
            f"SRC: the path of no tile tells its class, as {files[0]}; give a folder of folders of "
            "classes, or a --label REGEX that finds the class in /PATH"
        )
    left_out(nowhere, "tiles of no class")
    return top, "class", tiles


def class_folder(file: str, split: str) -> str:
    """The folder that names a tile's class: the first, or that below the split's, or above it."""
    folders = file.split("/")[:-1]
    if not split:
        return folders[0] if folders else ""
    place = split_place(file)
    if place + 1 < len(folders):
        return folders[place + 1]
    return folders[place - 1] if place else ""


def split_place(file: str) -> int | None:
    """Which of a tile's folders, the outermost, is called as splits are; None: none."""
    for place, folder in enumerate(file.split("/")[:-1]):
        if folder.lower() in TRAIN + TEST:
            return place
    return None


def split_files(files: list[str]) -> dict[str, str]:
    """{file: train or test} of a folder that holds both, {file: ""} of another."""
    folder_of = {}
    for file in files:
        place = split_place(file)
        folder_of[file] = "" if place is None else file.split("/")[place]
    folders = {folder.lower() for folder in folder_of.values()}
    train = first_of(TRAIN, folders)
    test = first_of(TEST, folders)
    if train is None or test is None:
        return dict.fromkeys(files, "")
    print(f"split: {train}/ is train, {test}/ is test")
    split_of = {}
    others = []
    for file, folder in folder_of.items():
        if folder.lower() == train:
            split_of[file] = "train"
        elif folder.lower() == test:
            split_of[file] = "test"
        else:
            others.append(file)
    left_out(others, "files of neither")
    return split_of


def first_of(names: list[str], present) -> str | None:
    """The first of some names that is present."""
    for name in names:
        if name in present:
            return name
    return None


def found_in(pattern: str, file: str) -> str:
    """What a regex finds in /PATH: its first group, or all that it matches; "" for nothing."""
    match = re.search(pattern, "/" + file)
    if match is None:
        return ""
    return (match[1] if match.re.groups else match[0]) or ""


def mask_key(file: str) -> tuple[bool, str]:
    """Whether a file is a mask by its name or folders, and what it has in common with its image."""
    *folders, name = file.split("/")
    stem = os.path.splitext(name)[0]
    is_mask = False
    kept = []
    for folder in folders:
        if folder.lower() in MASK_FOLDERS:
            is_mask = True
        elif folder.lower() not in IMAGE_FOLDERS:
            kept.append(folder)
    match = MASK_NAME.fullmatch(stem)
    if match:
        is_mask = True
    elif not is_mask:
        match = IMAGE_NAME.fullmatch(stem)
    if match:
        stem = match[1]
    return is_mask, "/".join([*kept, stem])


def pair_masks(split_of: dict[str, str]) -> list[Tile]:
    """Images and their masks; a name that two files share is an error, one alone is left out."""
    images = {}
    masks = {}
    for file in split_of:
        is_mask, key = mask_key(file)
        files = masks if is_mask else images
        if key in files:
            what = "masks of one tile" if is_mask else "of one name"
            raise InputError(f"SRC: {files[key]} and {file} are {what}; move one aside")
        files[key] = file
    tiles = []
    alone = []
    for key, image in images.items():
        if key in masks:
            split = split_of[image]
            parts = key.split("/")
            if split:  # its folder is made anew
                parts.pop(split_place(key))
            tiles.append(Tile(image, masks.pop(key), split, name="/".join(parts)))
        else:
            alone.append(image)
    if not tiles:
        here = f"images such as {alone[0]}" if alone else "no images"
        mask = next(iter(masks.values()))
        raise InputError(
            f"SRC: {mask} and others are taken for masks, but there are {here}; give masks the "
            "names of their images and _mask, or --label REGEX where they are tiles of classes"
        )
    print(f"masks: {tiles[0].label} is that of {tiles[0].file}")
    left_out(alone, "images without a mask")
    left_out(list(masks.values()), "masks without an image")
    return tiles


# ---- tables --------------------------------------------------------------------------------------


def read_table(args: Namespace) -> tuple[str, str, list[Tile]]:
    """A table and the tiles that it names -> the folder of tiles, "class", its tiles."""
    rows = table_rows(args.src)
    column_of = choose_columns(args, list(rows[0]))
    top, files = list_tiles([args.tiles or os.path.dirname(os.path.abspath(args.src))], "--tiles")
    find = tile_finder(top, files)
    label_of = {}
    tiles = []
    missing = []
    twice = []
    for row in rows:
        value = row[column_of["path"]]
        file = find(value)
        label = row[column_of["label"]]
        group = row[column_of["group"]] if "group" in column_of else ""
        if file is None or not label or ("group" in column_of and not group):
            missing.append(repr(value))
            continue
        if file in label_of:
            if label_of[file] != label:
                both = f"{label_of[file]} and {label}"
                raise InputError(f"SRC: {file} is both {both} in {args.src}; keep one row")
            twice.append(file)
            continue
        label_of[file] = label
        split = row[column_of["split"]].lower() if "split" in column_of else ""
        tiles.append(Tile(file, label, split, group))
    if not tiles:
        raise InputError(
            f"SRC: no row has a class and a tile below {top}, the first {missing[0]}; name the "
            "folder with --tiles DIR, and the columns with --path and --label"
        )
    left_out(missing, f"rows without a class, a group or a tile below {top}")
    left_out(twice, "rows of tiles that are there already")
    if "split" in column_of:
        tiles = known_splits(tiles)
    return top, "class", tiles


def table_rows(table: str) -> list[dict[str, str]]:
    """The rows of a table, {column: value}, without spaces round them."""
    text = Path(table).read_text("utf-8-sig", "surrogateescape")
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) < 2:
        raise InputError(f"SRC: {table} has no rows below a line of columns")
    separator = max(SEPARATORS, key=lines[0].count)
    rows = []
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        columns = [cell.strip() for cell in next(reader)]
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if len(cells) != len(columns):
                counted = f"{len(cells)} values in {len(columns)} columns"
                raise InputError(f"SRC: {table}, row {len(rows) + 1}: {counted}; put it right")
            rows.append(dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise InputError(f"SRC: {table}, row {len(rows) + 1}: {error}; put it right") from None
    print(f"table: {len(rows):,} rows of {', '.join(columns)}, divided by {separator!r}")
    return rows


def choose_columns(args: Namespace, columns: list[str]) -> dict[str, str]:
    """{what: column} of path and label, and of split and group where there are such columns."""
    column_of = {}
    plain = {column.lower().replace(" ", "_"): column for column in reversed(columns)}
    for what, guesses in GUESSES.items():
        named = getattr(args, what)
        if named in columns:
            column_of[what] = named
        elif named is None:
            guess = first_of(guesses, plain)
            if guess is not None:
                column_of[what] = plain[guess]
                print(f"{what}: column {plain[guess]!r}, a guess (--{what} names another)")
        elif named and what != "group":  # that may be a regex; --split '' stands for none
            raise InputError(f"--{what}: no column {named!r}; there are {', '.join(columns)}")
    for what in ("path", "label"):
        if what not in column_of:
            there = ", ".join(columns)
            raise InputError(f"SRC: which column is the {what}? Name it with --{what}: {there}")
    return column_of


def tile_finder(top: str, files: list[str]) -> Callable[[str], str | None]:
    """A function from a table's value to the file that it names, or None."""
    known = set(files)
    by_name = defaultdict(list)
    for file in files:
        name = os.path.basename(file)
        by_name[name].append(file)
        by_name[os.path.splitext(name)[0]].append(file)

    def find(value: str) -> str | None:
        value = value.replace("\\", "/")
        if os.path.isabs(value):
            value = os.path.relpath(value, top)
        value = os.path.normpath(value)
        if value in known:
            return value
        name = os.path.basename(value)
        fitting = by_name.get(name, [])
        if len(fitting) > 1:  # the folders that the table gives may tell them apart
            fitting = [file for file in fitting if f"/{file}".startswith(f"/{value}.")] or fitting
        if len(fitting) > 1:
            both = f"{fitting[0]} and {fitting[1]}"
            raise InputError(f"SRC: {value} may be {both}; give paths below the folder of tiles")
        return fitting[0] if fitting else None

    return find


def known_splits(tiles: list[Tile]) -> list[Tile]:
    """Splits of any usual name become train and test; others are an error, or left out."""
    names = Counter(tile.split for tile in tiles)
    train = first_of(TRAIN, names)
    test = first_of(TEST, names)
    if train is None or test is None:
        there = ", ".join(f"{name!r} ({n:,})" for name, n in names.items())
        raise InputError(
            f"SRC: its splits are {there}, wanted are train and test; --split '' splits anew"
        )
    print(f"split: {train!r} is train, {test!r} is test")
    kept = []
    others = []
    for tile in tiles:
        if tile.split == train:
            kept.append(tile._replace(split="train"))
        elif tile.split == test:
            kept.append(tile._replace(split="test"))
        else:
            others.append(f"{tile.file} of {tile.split!r}")
    left_out(others, "tiles of neither")
    return kept


# ---- groups and splits ---------------------------------------------------------------------------


def find_groups(tiles: list[Tile], pattern: str) -> list[Tile]:
    """Each tile with its group, found by a regex in its path."""
    grouped = []
    for tile in tiles:
        group = found_in(pattern, tile.file)
        if not group:
            raise InputError(f"--group: {pattern!r} finds no group in /{tile.file}; give another")
        grouped.append(tile._replace(group=group))
    return grouped


def split_tiles(tiles: list[Tile], kind: str, share: float, seed: int) -> list[Tile]:
    """Whole groups, or tiles where they have none, go to test at random while that brings each
    class nearer to its share; the others are train.
    """
    members = defaultdict(list)
    classes = Counter()
    for tile in tiles:
        members[tile.group or tile.file].append(tile)
        classes[class_of(tile, kind)] += 1
    wanted = {}
    for name, n in classes.items():  # of a class of two or more, at least one
        wanted[name] = share * n if n == 1 else max(1, share * n)
    tested = Counter()
    chosen = set()
    names = sorted(members)
    for i in np.random.default_rng(seed).permutation(len(names)):
        counts = Counter(class_of(tile, kind) for tile in members[names[i]])
        gain = 0
        for name, n in counts.items():
            gain += abs(wanted[name] - tested[name]) - abs(wanted[name] - tested[name] - n)
        if gain > 0 and len(chosen) + 1 < len(names):
            chosen.add(names[i])
            tested += counts
    if not chosen:
        raise InputError(
            f"SRC: {len(names)} groups or tiles cannot be split {1 - share:g} to {share:g}; give "
            "more, a --group of fewer tiles, or another --test"
        )
    for name, n in classes.items():
        if tested[name] == n:
            raise InputError(
                f"--seed: all tiles of {name!r} fell to test; give another, or less to --test"
            )
    print(f"split: {len(chosen):,} of {len(names):,} groups or tiles are test, seed {seed}")
    done = []
    for tile in tiles:
        split = "test" if (tile.group or tile.file) in chosen else "train"
        done.append(tile._replace(split=split))
    return done


def class_of(tile: Tile, kind: str) -> str:
    """What a split keeps in proportion: classes; masks are all alike."""
    return tile.label if kind == "class" else ""


# ---- what is written and told --------------------------------------------------------------------


def known_classes(tiles: list[Tile]) -> list[Tile]:
    """All tiles but those of the test set whose class no tile of train has: nobody can know it."""
    classes = {tile.label for tile in tiles if tile.split == "train"}
    kept = []
    others = []
    for tile in tiles:
        if tile.label in classes:
            kept.append(tile)
        else:
            others.append(f"{tile.file} of {tile.label!r}")
    left_out(others, "test tiles of classes that train has not")
    return kept


def write_layout(out: Path, top: str, kind: str, tiles: list[Tile], threshold: int | None) -> None:
    """OUT, whole or not at all: made beside, under a hidden name, and then renamed."""
    unfinished = out.parent / f".{out.name}.unfinished"
    # what a run that was stopped left; links in it are not followed
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        if kind == "class":
            write_table(unfinished, top, tiles)
        else:
            write_masks(unfinished, top, tiles, threshold)
        unfinished.rename(out)
    except OSError as error:
        raise InputError(f"OUT: cannot write {out}: {error}; choose another place") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_table(folder: Path, top: str, tiles: list[Tile]) -> None:
    """labels.csv, and tiles/, a link to the folder of tiles."""
    (folder / "tiles").symlink_to(top, target_is_directory=True)
    grouped = any(tile.group for tile in tiles)
    columns = ["path", "label", "split", "group"] if grouped else ["path", "label", "split"]
    with open(folder / "labels.csv", "w", newline="", errors="surrogateescape") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        for tile in tiles:
            row = [f"tiles/{tile.file}", tile.label, tile.split, tile.group]
            rows.writerow(row[: len(columns)])


def write_masks(folder: Path, top: str, tiles: list[Tile], threshold: int | None) -> None:
    """SPLIT/images/ and SPLIT/masks/ of the same names: links, or masks that are made."""
    pixels = np.zeros(256, np.int64)
    refused = []
    for tile in progress(tiles, "masks", len(tiles)):
        mask_file = os.path.join(top, tile.label)
        try:
            mask = read_mask(mask_file, threshold)
        except UnreadableTile as reason:
            refused.append(f"{tile.label}: {reason}")
            continue
        pixels += np.bincount(np.array(mask).ravel(), minlength=256)
        image_file = os.path.join(top, tile.file)
        link(image_file, folder / tile.split / "images", tile.name)
        if threshold is None:
            link(mask_file, folder / tile.split / "masks", tile.name)
        else:
            made = folder / tile.split / "masks" / f"{tile.name}.png"
            made.parent.mkdir(parents=True, exist_ok=True)
            mask.save(made)
    if refused:
        raise InputError(
            f"SRC: {len(refused)} masks cannot be read, as {'; '.join(refused[:3])}; put them "
            "right, or make black and white of grey with --threshold N"
        )
    shares = []
    for number in np.flatnonzero(pixels):
        shares.append(f"{number} {100 * pixels[number] / pixels.sum():.1f} %")
    print(f"numbers in masks: {', '.join(shares)}")
    if len(shares) == 1:
        print("warning: all masks hold one number: there is nothing to tell apart")


def read_mask(file: str, threshold: int | None) -> Image.Image:
    """A mask of class numbers, or 1 where a grey image is above the threshold."""
    if threshold is None:
        return open_mask(file)
    grey = np.array(open_tile(file).convert("L"))
    return Image.fromarray((grey > threshold).astype(np.uint8))


def link(file: str, folder: Path, name: str) -> None:
    """A link folder/NAME.ENDING to a file."""
    place = folder / (name + os.path.splitext(file)[1])
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(file)


def tell(out: Path, kind: str, tiles: list[Tile]) -> None:
    """How many tiles of which class are in which split, and what to type next."""
    counts = Counter()
    for tile in tiles:
        name = tile.label if kind == "class" else "tiles with masks"
        counts[name, tile.split] += 1
    names = sorted({name for name, _ in counts})
    width = max(len(name) for name in [*names, "all"])
    print(f"\n{'':{width}}{'train':>10}{'test':>10}")
    for name in names:
        print(f"{name:{width}}{counts[name, 'train']:>10,}{counts[name, 'test']:>10,}")
    if len(names) > 1:
        train = sum(tile.split == "train" for tile in tiles)
        print(f"{'all':{width}}{train:>10,}{len(tiles) - train:>10,}")
    groups = {tile.group for tile in tiles} - {""}
    if groups:
        print(f"{len(groups):,} groups")
    else:
        print(
            "no groups: tiles of one slide or patient may be in both splits, which flatters any "
            "model; --group REGEX keeps them together"
        )
    print(f"\npython evaluate.py RUN --data {shlex.quote(str(out))}")


# ---- the command line ----------------------------------------------------------------------------


def share(text: str) -> float:
    """Type of --test."""
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


def regex(text: str) -> str:
    """Type of --group and --label: a regex, which the name of a column mostly is as well."""
    try:
        re.compile(text)
    except re.error as error:
        raise ArgumentTypeError(f"{text!r} is no regex ({error})") from None
    return path(text)


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags, checked against what SRC is."""
    parser = make_parser("python -m extras.labels", __doc__)
    add = parser.add_argument
    add("src", metavar="SRC", type=path, help="a folder of tiles, or a table of them")
    add("out", metavar="OUT", type=path, help="the folder to make")
    add("--test", type=share, help="share of the test set (default: 0.2)")
    add("--seed", type=natural, default=0, help="of the split (default: 0)")
    add("--group", type=regex, help="what stays together: a regex on /PATH, or a column")
    add("--label", type=regex, help="the class: a regex on /PATH, or a column")
    add("--path", type=path, help="of a table: the column of paths or names")
    add("--split", help="of a table: the column of splits; '' for none")
    add(
        "--tiles", type=path, metavar="DIR", help="of a table: where its tiles are (default: there)"
    )
    add("--threshold", type=natural, help="of masks: grey above it is class 1, else 0")
    args = parser.parse_args(argv)
    if not os.path.exists(args.src):
        raise InputError(f"SRC: {args.src} does not exist; give a folder of tiles or a table")
    of_tables = (args.path, args.split, args.tiles)
    if os.path.isdir(args.src) and of_tables != (None, None, None):
        raise InputError("--path, --split, --tiles: they are for tables; SRC is a folder")
    if os.path.lexists(args.out):
        raise InputError(f"OUT: {args.out} exists; choose another name, or remove it")
    return args


def main() -> None:
    """The command line."""
    args = parse_args()
    out = Path(args.out)
    read = read_folder if os.path.isdir(args.src) else read_table
    top, kind, tiles = read(args)
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(top)):
        raise InputError(f"OUT: {out} is inside of {top}, which is only read; choose another place")
    if args.threshold is not None and kind == "class":
        raise InputError("--threshold: SRC holds classes, no masks; leave it out")
    if args.group and not any(tile.group for tile in tiles):
        tiles = find_groups(tiles, args.group)
    if tiles[0].split == "":
        tiles = split_tiles(tiles, kind, args.test or 0.2, args.seed)
    elif args.test:
        raise InputError("--test: SRC says itself what is train and what is test; leave it out")
    if kind == "class":
        tiles = known_classes(tiles)
        if len({tile.label for tile in tiles}) == 1:
            raise InputError(
                f"SRC: all tiles are of one class, {tiles[0].label!r}; give a folder of several, "
                "or a --label REGEX that finds the class in /PATH"
            )
    write_layout(out, top, kind, tiles, args.threshold)
    tell(out, kind, tiles)


if __name__ == "__main__":
    run_program(main)
