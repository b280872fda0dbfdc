"""Other people's labels into our layout: what is found, how it is split, what is refused."""

import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_tiles
from PIL import Image

import data
from evaluate import CentreTiles, labelled_files
from extras import labels
from student import InputError

REAL = ROOT.parent / "shared" / "tiles"


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """extras.labels as from the shell, into OUT, beside SRC -> (what it says, the layout).

    Nothing below SRC may change by it.
    """

    def make(src, *flags):
        monkeypatch.setattr(sys, "argv", ["labels.py", *map(str, [src, tmp_path / "OUT", *flags])])
        before = snapshot(tmp_path)
        labels.main()
        after = snapshot(tmp_path)
        for name, seen in before.items():
            assert after[name] == seen
        return capsys.readouterr().out, labelled_files(tmp_path / "OUT")

    return make


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The one line with which it ends; nothing is left at OUT or beside it."""

    def refused(src, *flags):
        monkeypatch.setattr(sys, "argv", ["labels.py", *map(str, [src, tmp_path / "OUT", *flags])])
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as stop:
            data.run_program(labels.main)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        assert snapshot(tmp_path) == before
        return lines[0]

    return refused


def snapshot(folder):
    """{path: size and time} of all below a folder."""
    seen = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        seen[str(path)] = (status.st_size, status.st_mtime_ns)
    return seen


def classes_of(out, found, split):
    """{file below OUT/tiles: class} of a split, from labels.csv."""
    rows = (out / "labels.csv").read_text().splitlines()[1:]
    label_of = {}
    for row in rows:
        file, label = row.split(",")[:2]
        label_of[file] = label
    return {file.removeprefix("tiles/"): label_of[file] for file in found[split][0]}


# ---- classes without a split ---------------------------------------------------------------------


def write_classes(root, n=20, slides=5):
    """n tiles of each of two classes, SRC/CLASS/SLIDE_NUMBER.png, and things that are no tiles."""
    for name in ("stroma", "tumour"):
        for i, path in enumerate(write_tiles(root / name, n, (8, 8))):
            path.rename(path.with_name(f"{name[0]}{i % slides}_{i:03d}.png"))
    write_tiles(root / ".ipynb_checkpoints", 1, (8, 8))
    (root / "notes.txt").write_text("no tile")
    return root


def test_a_folder_of_classes_is_split_in_proportion(tmp_path, make):
    write_classes(tmp_path / "SRC", 20)
    said, found = make(tmp_path / "SRC")
    for split, n in (("train", 16), ("test", 4)):
        of = classes_of(tmp_path / "OUT", found, split)
        assert Counter(of.values()) == {"stroma": n, "tumour": n}
        for file, label in of.items():
            assert file.startswith(label + "/")
    assert re.search(r"stroma +16 +4\n", said) and re.search(r"all +32 +8\n", said)
    assert "no groups: tiles of one slide or patient may be in both splits" in said
    assert f"python evaluate.py RUN --data {tmp_path / 'OUT'}" in said
    files, targets = found["train"]
    tiles = CentreTiles(tmp_path / "OUT", 8, files, targets)
    assert all(not tiles[k]["unreadable"] for k in range(len(tiles)))
    assert os.path.realpath(tmp_path / "OUT" / "tiles") == str(tmp_path / "SRC")


def test_the_seed_and_the_share_decide(tmp_path, make):
    write_classes(tmp_path / "SRC", 20)
    tests = []
    for flags in ([], ["--seed", 0], ["--seed", 1], ["--test", 0.5]):
        _, found = make(tmp_path / "SRC", *flags)
        tests.append(sorted(found["test"][0]))
        (tmp_path / "OUT").rename(tmp_path / f"OUT{len(tests)}")
    assert tests[0] == tests[1] != tests[2]
    assert [len(files) for files in tests] == [8, 8, 8, 20]


def test_groups_stay_on_one_side(tmp_path, make):
    write_classes(tmp_path / "SRC", 50, slides=10)
    said, found = make(tmp_path / "SRC", "--group", r"/([a-z]\d)_", "--test", "0.3")
    sides = defaultdict(set)
    number_of = defaultdict(set)
    for split, (files, targets) in found.items():
        assert abs(len(files) - {"train": 70, "test": 30}[split]) <= 5
        assert set(targets["class"]) == {0, 1}
        for file, number in zip(files, targets["group"], strict=True):
            slide = Path(file).name.split("_")[0]
            sides[slide].add(split)
            number_of[slide].add(number)
    assert len(sides) == 20 and all(len(side) == 1 for side in sides.values())
    assert len(set.union(*number_of.values())) == 20
    assert "20 groups" in said and "no groups" not in said


def test_groups_of_unequal_size_and_mixed_classes(tmp_path, make):
    """Within half of the share, 60 tiles, though one group alone has 61."""
    rng = np.random.default_rng(0)
    patient = rng.choice(12, 300, p=np.arange(1, 13) / 78)
    for i in range(300):
        label = "ab"[int(rng.random() < (patient[i] % 4) / 4)]
        folder = tmp_path / "SRC" / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / f"P{patient[i]}_{i}.png")
    for seed in range(5):
        _, found = make(tmp_path / "SRC", "--group", r"P\d+", "--seed", seed)
        (tmp_path / "OUT").rename(tmp_path / f"OUT{seed}")
        n = {split: len(files) for split, (files, _) in found.items()}
        assert n["train"] + n["test"] == 300 and 30 <= n["test"] <= 90
        of = {split: set(targets["group"]) for split, (_, targets) in found.items()}
        assert not of["train"] & of["test"]
        # and no group of train could go to test and bring the classes nearer to their shares
        counts = defaultdict(Counter)
        for files, targets in found.values():
            for file, group in zip(files, targets["group"], strict=True):
                counts[group][Path(file).parent.name] += 1
        wanted = {label: 0.2 * sum(counts[group][label] for group in counts) for label in "ab"}
        tested = sum((counts[group] for group in of["test"]), Counter())

        def away(tested, wanted=wanted):
            return sum(abs(wanted[label] - tested[label]) for label in "ab")

        assert all(away(tested + counts[group]) >= away(tested) for group in of["train"])


def test_the_class_may_be_anywhere_in_the_path(tmp_path, make, refused):
    for patient in ("8863", "8864", "8865"):
        for label in "01":
            write_tiles(tmp_path / "SRC" / patient / label, 5, (8, 8))
    flags = ["--label", "/([01])/", "--group", r"^/(\d+)/"]
    said, found = make(tmp_path / "SRC", *flags, "--test", 0.3)
    for split in ("train", "test"):
        for file, label in classes_of(tmp_path / "OUT", found, split).items():
            assert file.split("/")[1] == label
    assert "3 groups" in said
    (tmp_path / "OUT").rename(tmp_path / "done")
    line = refused(tmp_path / "SRC", "--label", "/(tumour)/")
    assert "the path of no tile tells its class" in line
    assert "finds no group in /8863/0/tile_000.png" in refused(tmp_path / "SRC", "--group", "slide")
    assert "'(' is no regex" in refused(tmp_path / "SRC", "--label", "(")


def test_tiles_outside_of_classes_are_left_out_aloud(tmp_path, make):
    write_classes(tmp_path / "SRC", 10)
    write_tiles(tmp_path / "SRC", 2, (8, 8))
    said, found = make(tmp_path / "SRC")
    assert "left out: 2 tiles of no class, as tile_000.png" in said
    assert len(found["train"][0]) + len(found["test"][0]) == 20


def test_names_that_a_table_has_to_quote(tmp_path, make):
    name = 'odd, "quoted" é'
    for label in (name, "plain"):
        write_tiles(tmp_path / "SRC" / label / "a folder", 5, (8, 8))
    _, found = make(tmp_path / "SRC")
    files, targets = found["train"]
    assert {Path(file).parts[1] for file in files} == {name, "plain"}
    tiles = CentreTiles(tmp_path / "OUT", 8, files, targets)
    assert all(not tiles[k]["unreadable"] for k in range(len(tiles)))


# ---- splits that are there -----------------------------------------------------------------------


def test_nct_crc_he(tmp_path, make):
    for folder, n in (("NCT-CRC-HE-100K", 4), ("NCT-CRC-HE-100K-NONORM", 4), ("CRC-VAL-HE-7K", 2)):
        for name in ("ADI", "TUM"):
            write_tiles(tmp_path / "SRC" / folder / name, n, (8, 8), "tif")
    said, found = make(tmp_path / "SRC")
    assert "left out: 8 files of neither, as NCT-CRC-HE-100K-NONORM/ADI/tile_000.tif" in said
    for split, folder, n in (("train", "NCT-CRC-HE-100K", 4), ("test", "CRC-VAL-HE-7K", 2)):
        of = classes_of(tmp_path / "OUT", found, split)
        assert Counter(of.values()) == {"ADI": n, "TUM": n}
        assert all(file.startswith(f"{folder}/{label}/") for file, label in of.items())


def test_splits_of_other_names_and_at_any_depth(tmp_path, make, refused):
    for split, n in (("Training", 3), ("val", 2)):
        for name in ("a", "b"):
            write_tiles(tmp_path / "SRC" / "set" / split / name, n, (8, 8))
    said, found = make(tmp_path / "SRC")
    assert "split: training/ is train, val/ is test" in said
    assert [len(found[split][0]) for split in ("train", "test")] == [6, 4]
    (tmp_path / "OUT").rename(tmp_path / "first")
    write_tiles(tmp_path / "SRC" / "set" / "test" / "a", 2, (8, 8))
    write_tiles(tmp_path / "SRC" / "set" / "test" / "b", 2, (8, 8))
    write_tiles(tmp_path / "SRC" / "set" / "test" / "c", 1, (8, 8))
    said, found = make(tmp_path / "SRC")
    assert "left out: 4 files of neither, as set/val/a/tile_000.png" in said
    assert "left out: 1 test tiles of classes that train has not" in said
    assert len(found["test"][0]) == 4
    (tmp_path / "OUT").rename(tmp_path / "second")
    assert "--test: SRC says itself" in refused(tmp_path / "SRC", "--test", 0.5)


def test_classes_above_the_split(tmp_path, make):
    for name in ("a", "b"):
        write_tiles(tmp_path / "SRC" / name / "train", 3, (8, 8))
        write_tiles(tmp_path / "SRC" / name / "test", 1, (8, 8))
    _, found = make(tmp_path / "SRC")
    assert Counter(classes_of(tmp_path / "OUT", found, "train").values()) == {"a": 3, "b": 3}


# ---- masks ---------------------------------------------------------------------------------------


def write_mask(path, number, size=(8, 8)):
    """A mask of two numbers; the second tells which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size, 0)
    mask.paste(number, (0, 0, size[0], size[1] // 2))
    mask.save(path)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{}.png", "{}_mask.png"),
        ("{}.jpg", "{}-labelled.tif"),
        ("{}_image.jpg", "{}_Mask.png"),
        ("images/{}.jpg", "masks/{}.png"),
        ("Images/{}.jpg", "Labels/{}_label.png"),
        ("slide {}/{}.tif", "slide {}/{}.mask.png"),
        ("data/imgs/s{}/t.png", "data/annotations/s{}/t.png"),
        ("{}.png", "gt/{}.bmp"),
    ],
)
def test_masks_find_their_images(tmp_path, make, image, mask):
    for i in range(10):
        file = tmp_path / "SRC" / image.format(i, i)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(file, quality=100)
        write_mask(tmp_path / "SRC" / mask.format(i, i), i + 1)
    said, found = make(tmp_path / "SRC")
    assert re.search(r"tiles with masks +8 +2\n", said)
    seen = set()
    for files, targets in found.values():
        tiles = CentreTiles(tmp_path / "OUT", 8, files, targets)
        for k in range(len(tiles)):
            assert not tiles[k]["unreadable"]
            assert tiles[k]["mask"][0, 0] == tiles[k]["image"][0, 0, 0] + 1
            seen.add(int(tiles[k]["mask"][0, 0]))
    assert seen == set(range(1, 11))


def test_masks_alone_and_images_alone_are_named(tmp_path, make, refused):
    for i in range(5):
        write_tiles(tmp_path / "SRC" / "images", 7, (8, 8))
        write_mask(tmp_path / "SRC" / "masks" / f"tile_00{i}.png", 1)
    write_mask(tmp_path / "SRC" / "masks" / "other.png", 1)
    said, found = make(tmp_path / "SRC")
    assert "left out: 2 images without a mask, as images/tile_005.png" in said
    assert "left out: 1 masks without an image, as masks/other.png" in said
    assert len(found["train"][0]) == 4 and len(found["test"][0]) == 1
    assert "numbers in masks: 0 50.0 %, 1 50.0 %" in said
    (tmp_path / "OUT").rename(tmp_path / "done")
    (tmp_path / "SRC" / "images" / "tile_000.jpg").write_bytes(b"")
    assert "are of one name; move one aside" in refused(tmp_path / "SRC")
    (tmp_path / "SRC" / "images").rename(tmp_path / "SRC" / "elsewhere")
    (tmp_path / "SRC" / "elsewhere" / "tile_000.jpg").unlink()
    line = refused(tmp_path / "SRC")
    assert "masks/other.png and others are taken for masks, but there are images such as" in line


def test_a_split_of_masks_is_kept(tmp_path, make):
    for split, n in (("train", 3), ("test", 2)):
        write_tiles(tmp_path / "SRC" / "images" / split, n, (8, 8))
        for i in range(n):
            write_mask(tmp_path / "SRC" / "masks" / split / f"tile_00{i}.png", 10 * n + i)
    _, found = make(tmp_path / "SRC")
    for split, n in (("train", 3), ("test", 2)):
        files, targets = found[split]
        tiles = CentreTiles(tmp_path / "OUT", 8, files, targets)
        numbers = sorted(int(tiles[k]["mask"][0, 0]) for k in range(len(tiles)))
        assert numbers == [10 * n + i for i in range(n)]


def test_grey_masks_are_cut_at_the_threshold(tmp_path, make, refused):
    rng = np.random.default_rng(0)
    (tmp_path / "SRC" / "masks").mkdir(parents=True)
    write_tiles(tmp_path / "SRC" / "images", 5, (8, 8))
    for i in range(5):
        grey = np.kron(rng.integers(0, 2, (2, 2)) * 120 + 40, np.ones((4, 4)))
        mask = Image.fromarray(grey.astype(np.uint8))
        mask.save(tmp_path / "SRC" / "masks" / f"tile_00{i}.jpg", quality=100)
    line = refused(tmp_path / "SRC")
    assert "5 masks cannot be read, as masks/tile_000.jpg: a JPEG changes class numbers" in line
    assert "--threshold N" in line
    said, found = make(tmp_path / "SRC", "--threshold", 100)
    for files, targets in found.values():
        tiles = CentreTiles(tmp_path / "OUT", 8, files, targets)
        for k, file in enumerate(files):
            name = Path(file).stem
            grey = np.array(Image.open(tmp_path / "SRC" / "masks" / f"{name}.jpg"))
            assert np.array_equal(tiles[k]["mask"].numpy(), grey > 100)
    assert re.search(r"numbers in masks: 0 \d+.\d %, 1 \d+.\d %", said)


# ---- tables --------------------------------------------------------------------------------------


def write_source(tmp_path, header, rows, separator=","):
    """SRC/TILES/tile_000.png to tile_019.png, and a table; row(i) gives the cells of tile i."""
    write_tiles(tmp_path / "SRC" / "tiles", 20, (8, 8))
    lines = [separator.join(header)]
    for i in range(20):
        lines.append(separator.join(map(str, rows(i))))
    table = tmp_path / "SRC" / "table.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return table


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("path", ["tiles/tile_{:03d}.png", "tile_{:03d}.png", "tile_{:03d}"])
def test_tables_of_other_separators_headers_and_short_paths(tmp_path, make, separator, path):
    header = ["Nr", "Image ID", "Diagnosis ", "Patient"]

    def row(i):
        return i, path.format(i), " benign" if i % 2 else "malignant", f"P{i // 4}"

    said, found = make(write_source(tmp_path, header, row, separator))
    for what, column in (("path", "Image ID"), ("label", "Diagnosis"), ("group", "Patient")):
        assert f"{what}: column '{column}', a guess (--{what} names another)" in said
    for split in ("train", "test"):
        for file, label in classes_of(tmp_path / "OUT", found, split).items():
            i = int(file[-7:-4])
            assert file == f"tiles/tile_{i:03d}.png"
            assert label == ("benign" if i % 2 else "malignant")
    groups = {split: set(targets["group"]) for split, (_, targets) in found.items()}
    assert len(groups["train"] | groups["test"]) == 5 and not groups["train"] & groups["test"]


def test_columns_can_be_named_and_splits_kept_or_made_anew(tmp_path, make, refused):
    header = ["file", "label", "grade", "set"]

    def row(i):
        return f"tile_{i:03d}.png", "all the same", "low" if i % 2 else "high", SETS[i // 4]

    SETS = ["Train", "Train", "TRAIN", "validation", "Test"]
    table = write_source(tmp_path, header, row)
    assert "all tiles are of one class, 'all the same'" in refused(table)
    flags = ["--label", "grade"]
    said, found = make(table, *flags)
    assert "split: 'train' is train, 'test' is test" in said
    assert "left out: 4 tiles of neither, as tiles/tile_012.png of 'validation'" in said
    assert sorted(found["test"][0]) == [f"tiles/tiles/tile_{i:03d}.png" for i in range(16, 20)]
    assert len(found["train"][0]) == 12
    (tmp_path / "OUT").rename(tmp_path / "first")
    said, found = make(table, *flags, "--split", "", "--test", 0.5, "--group", r"_(\d\d)")
    assert len(found["train"][0]) + len(found["test"][0]) == 20
    (tmp_path / "OUT").rename(tmp_path / "second")
    for flags, expected in (
        (["--label", "colour"], "--label: no column 'colour'; there are file, label, grade, set"),
        (["--split", "grade", "--label", "set"], "its splits are 'high' (10), 'low' (10), wanted"),
        (["--label", "grade", "--test", 0.5], "--test: SRC says itself"),
        (["--path", "grade"], "no row has a class and a tile below"),
        (["--threshold", 3, "--label", "grade"], "--threshold: SRC holds classes, no masks"),
    ):
        assert expected in refused(table, *flags), flags


def test_unfit_tables_are_refused(tmp_path, refused):
    write_tiles(tmp_path / "SRC" / "a", 2, (8, 8))
    write_tiles(tmp_path / "SRC" / "b", 2, (8, 8))
    table = tmp_path / "SRC" / "table.csv"
    for text, expected in (
        ("", "has no rows below a line of columns"),
        ("path,label\n", "has no rows below a line of columns"),
        ("x,y\n1,2\n", "which column is the path? Name it with --path: x, y"),
        ("path,x\n1,2\n", "which column is the label? Name it with --label: path, x"),
        ("path,label\na/tile_000.png\n", "row 1: 1 values in 2 columns"),
        ('path,label\na/tile_000.png,"x\n', "row 1: unexpected end of data"),
        ("path,label\ntile_000.png,x\n", "tile_000.png may be a/tile_000.png and b/tile_000.png"),
        ("path,label\nnone.png,x\n", "no row has a class and a tile below"),
        ("path,label\na/tile_000.png,x\na/tile_000.png,y\n", "is both x and y in"),
    ):
        table.write_text(text)
        assert expected in refused(table), text


def test_rows_that_fit_no_tile_are_left_out_aloud(tmp_path, make):
    rows = "path,label\n"
    for i, file in enumerate(write_tiles(tmp_path / "SRC" / "elsewhere", 10, (8, 8))):
        rows += f"C:\\data\\{file.name},{i % 2}\n"
    rows += "gone.png,1\ntile_001.png,\ntile_002.png,0\n"
    (tmp_path / "table.csv").write_text(rows)
    said, found = make(tmp_path / "table.csv", "--tiles", tmp_path / "SRC")
    assert "left out: 2 rows without a class, a group or a tile below" in said
    assert "left out: 1 rows of tiles that are there already, as elsewhere/tile_002.png" in said
    assert len(found["train"][0]) == 8 and len(found["test"][0]) == 2


# ---- what is refused, and what a stop leaves -----------------------------------------------------


def test_what_cannot_be_split_is_refused(tmp_path, refused):
    write_classes(tmp_path / "SRC", 10, slides=1)
    line = refused(tmp_path / "SRC", "--group", ".png")
    assert "1 groups or tiles cannot be split 0.8 to 0.2" in line
    (tmp_path / "one").mkdir()
    (tmp_path / "SRC" / "tumour").rename(tmp_path / "one" / "tumour")
    assert "all tiles are of one class, 'tumour'" in refused(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    assert "SRC: no images" in refused(tmp_path / "empty")
    assert "does not exist; give a folder of tiles or a table" in refused(tmp_path / "none")
    for flag in ("--path", "--split", "--tiles"):
        assert "they are for tables" in refused(tmp_path / "one", flag, "x")
    for share in ("0", "1", "-1", "much"):
        assert "--test" in refused(tmp_path / "one", "--test", share)


def test_what_exists_is_left_alone_and_src_is_never_written_in(tmp_path, monkeypatch):
    write_classes(tmp_path / "SRC", 10)
    (tmp_path / "exists").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for out, expected in (
        ("exists", "OUT: .*exists exists"),
        ("dangling", "OUT: .*dangling exists"),
        ("SRC/new", "OUT: .*new is inside of .*SRC, which is only read"),
    ):
        before = snapshot(tmp_path)
        argv = ["labels.py", str(tmp_path / "SRC"), str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(InputError, match=expected):
            labels.main()
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stop_leaves_nothing(tmp_path, monkeypatch, reason):
    write_classes(tmp_path / "SRC", 10)
    before = snapshot(tmp_path)

    def stop(*args, **keywords):
        raise reason

    monkeypatch.setattr(labels.csv, "writer", stop)
    monkeypatch.setattr(sys, "argv", ["labels.py", str(tmp_path / "SRC"), str(tmp_path / "OUT")])
    with pytest.raises((KeyboardInterrupt, InputError)) as error:
        labels.main()
    assert isinstance(error.value, KeyboardInterrupt) or "cannot write" in str(error.value)
    assert snapshot(tmp_path) == before


# ---- real tiles ----------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="no real tiles here")
def test_real_tiles(tmp_path, make, refused):
    said, found = make(REAL / "kather2016", "--test", 0.3)
    assert len(found["train"][0]) + len(found["test"][0]) == 100
    assert len(set(found["train"][1]["class"])) == len(set(found["test"][1]["class"])) == 8
    (tmp_path / "OUT").rename(tmp_path / "kather")
    said, found = make(REAL / "ocdc_masks")
    assert re.search(r"numbers in masks: 0 \d\d.\d %, 1 \d\d.\d %", said)
    assert len(found["train"][0]) == 8 and len(found["test"][0]) == 2
    (tmp_path / "OUT").rename(tmp_path / "masks")
    assert "1 groups or tiles cannot be split" in refused(REAL / "ocdc_masks", "--group", r"\d+_r")
    said, found = make(REAL / "oral")
    assert "split: train/ is train, test/ is test" in said
    assert len(found["train"][0]) + len(found["test"][0]) == 1188
