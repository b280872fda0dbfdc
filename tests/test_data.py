"""Sample k is a function of (seed, k) alone; tiles are read as Pillow reads them; unreadable ones
are named with their reason and counted; programs end in one line, wherever their output goes."""

import argparse
import collections
import contextlib
import gc
import hashlib
import io
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_tiles
from PIL import Image

import data
from data import (
    FolderTiles,
    InputError,
    TissueTiles,
    UnreadableTile,
    batches,
    draw_tissue,
    list_tiles,
    open_tile,
)
from extras.benchmarks.hostile import (
    AGREED,
    hostile_images,
    opened_or_none,
    outcome,
    pillows_own,
    png,
    within,
)


def reason(path):
    """Why a tile cannot be read."""
    with pytest.raises(UnreadableTile) as error:
        open_tile(path)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def names_of(root):
    """The images below a folder, relative to it."""
    top, names = list_tiles(root)
    assert top == str(root)
    return names


def samples(dataset, ks, workers=0, batch_size=4):
    return torch.cat([batch["image"] for batch in batches(dataset, ks, batch_size, workers)])


@pytest.mark.parametrize("workers", [1, 2])
def test_sample_k_does_not_depend_on_workers_or_on_where_a_run_began(tmp_path, workers):
    write_tiles(tmp_path, 10)
    for dataset in (FolderTiles(tmp_path, 64, seed=3), TissueTiles("distil", 3)):
        straight = samples(dataset, range(24))
        assert torch.equal(straight, samples(dataset, range(24), workers))
        assert torch.equal(straight[13:], samples(dataset, range(13, 24), workers, batch_size=3))
        assert torch.equal(
            straight[1::2], samples(dataset, range(1, 24, 2), workers)
        )  # rank 1 of 2


def test_another_seed_gives_another_order_and_another_view(tmp_path):
    write_tiles(tmp_path, 10)
    a, b = (samples(FolderTiles(tmp_path, 64, seed), range(10)) for seed in (0, 1))
    assert not torch.equal(a, b)


def test_every_tile_once_an_epoch_in_an_order_of_its_own():
    orders = [
        [data.epoch_order(5, k // 7, 7)[k % 7] for k in range(7 * e, 7 * e + 7)] for e in range(6)
    ]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) > 3


def test_a_view_is_a_piece_of_the_tile_at_native_scale_in_all_eight_poses(tmp_path):
    path = write_tiles(tmp_path, 1)[0]
    tile = np.array(Image.open(path))  # (80, 96, 3)
    dataset, poses, corners = FolderTiles(tmp_path, 64, seed=0), set(), set()
    windows = np.lib.stride_tricks.sliding_window_view(
        tile, (64, 64), axis=(0, 1)
    )  # (17, 33, 3, 64, 64)
    for k in range(64):
        view = dataset[k]["image"]
        for pose in range(8):
            undone = torch.rot90(view.flip(2) if pose >= 4 else view, -(pose % 4), (1, 2)).numpy()
            where = np.argwhere((windows[..., 0, 0] == undone[:, 0, 0]).all(-1))
            hit = [tuple(w) for w in where if np.array_equal(windows[tuple(w)], undone)]
            if hit:
                poses.add(pose)
                corners.add(hit[0])
                break
        else:
            pytest.fail(f"view {k} is no crop of the tile")
    assert poses == set(range(8)) and len(corners) > 40


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "tif", "tiff", "bmp", "webp", "PNG"])
def test_formats(tmp_path, suffix):
    path = write_tiles(tmp_path / "deep" / "er", 1, suffix=suffix)[0]
    (tmp_path / "notes.txt").write_text("no tile")
    assert names_of(tmp_path) == [f"deep/er/{path.name}"]
    assert FolderTiles(tmp_path, 64, 0)[0]["image"].shape == (3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_colour_conversion_is_pillows(tmp_path, mode):
    image = Image.open(write_tiles(tmp_path, 1, (64, 64))[0]).convert(mode)
    path = tmp_path / "converted.tif"
    image.save(path)
    assert np.array_equal(np.array(open_tile(path)), np.array(Image.open(path).convert("RGB")))


def test_exif_rotation_is_undone(tmp_path):
    image = Image.open(write_tiles(tmp_path, 1, (96, 80))[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        np.array(open_tile(tmp_path / "turned.png")), np.array(image.rotate(-90, expand=True))
    )


@pytest.mark.parametrize(
    ("mode", "kind", "bits"), [("I;16", "uint16", 16), ("I", "int32", 32), ("F", "float32", 32)]
)
def test_more_than_8_bits_are_refused_with_the_remedy(tmp_path, mode, kind, bits):
    pixels = np.random.default_rng(0).integers(20_000, 60_000, (70, 70)).astype(kind)
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode == mode
    assert reason(tmp_path / "x.tif") == f"{bits} bits a channel; save it as 8 bits"


def pages(path, *images, **options):
    images[0].save(path, "tiff", save_all=True, append_images=images[1:], **options)
    return path


def grey_pages(n, size=(50, 40)):
    rng = np.random.default_rng(n)
    return [Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_three_grey_pages_are_red_green_and_blue(tmp_path, compression):
    channels = grey_pages(3)
    opened = open_tile(pages(tmp_path / "x.tif", *channels, compression=compression))
    assert opened.mode == "RGB"
    for page, channel in zip(channels, opened.split(), strict=True):
        assert page.tobytes() == channel.tobytes()


def test_any_other_pages_are_refused_by_their_number(tmp_path):
    colour = Image.new("RGB", (50, 40))
    for n in (2, 4, 5):
        assert reason(pages(tmp_path / "x.tif", *grey_pages(n))) == f"more than one page ({n})"
    for three in (
        [colour] * 3,
        [*grey_pages(2), colour],
        [*grey_pages(2), Image.new("L", (50, 41))],
        [Image.new("I;16", (50, 40))] * 3,
        [Image.new("1", (50, 40))] * 3,
    ):
        assert re.match(
            r"more than one page \(3\)|16 bits", reason(pages(tmp_path / "x.tif", *three))
        )


def test_reasons_are_plain_words(tmp_path):
    whole = write_tiles(tmp_path, 1, suffix="jpg")[0].read_bytes()
    for content, expected in (
        (b"", r"damaged \(no image of a kind that is known\)"),
        (b"text", r"damaged \(no image of a kind that is known\)"),
        (whole[: len(whole) // 2], r"damaged \(image file is truncated.*\)"),
        (png(10_000, 9_000, 8, 2, b"\0" * 1000), r"too large \(10000 x 9000 px\)"),
        (png(60_000, 60_000, 8, 2, b"\0" * 1000), r"too large \(over 178956970 px\)"),
        (png(5000, 1, 8, 2, b"\0" * 15_001), r"too long and narrow \(5000 x 1 px\)"),
    ):
        (tmp_path / "x").write_bytes(content)
        with warnings.catch_warnings(action="ignore"):
            assert re.fullmatch(expected, reason(tmp_path / "x"))
    with open(tmp_path / "x", "wb") as file:
        file.truncate(2**28 + 1)
    assert reason(tmp_path / "x") == "too large (268435457 bytes)"
    os.mkfifo(tmp_path / "pipe.png")
    with within(5, "a pipe"):
        assert reason(tmp_path / "pipe.png") == reason(tmp_path) == "no regular file"
    assert reason(tmp_path / "nowhere") == "does not exist"


def test_a_tile_is_read_from_a_file_that_is_open(tmp_path):
    path = write_tiles(tmp_path, 1)[0]
    assert open_tile(io.BytesIO(path.read_bytes())).tobytes() == open_tile(path).tobytes()


def test_a_tile_that_cannot_be_read_from_its_disk_is_unreadable(tmp_path, monkeypatch):
    path = write_tiles(tmp_path, 1)[0]

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", broken)
    with pytest.raises(UnreadableTile, match=r"cannot be read \(Input/output error\)"):
        open_tile(path)


def test_small_tiles_are_enlarged_and_one_is_named(tmp_path, capsys):
    write_tiles(tmp_path / "large", 3, (70, 70))
    write_tiles(tmp_path / "small", 2, (40, 90))
    dataset = FolderTiles(tmp_path, 64, 0)
    assert samples(dataset, range(5)).shape == (5, 3, 64, 64)
    assert samples(dataset, range(5), workers=2).shape == (5, 3, 64, 64)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: '{tmp_path / 'small'}/tile_00")


def broken_files():
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(
        whole, "png"
    )
    return {"empty.png": b"", "text.jpg": b"not an image", "truncated.png": whole.getvalue()[:5000]}


def test_unreadable_tiles_are_replaced_by_k_alone_named_once_and_counted(tmp_path, capsys):
    write_tiles(tmp_path, 397)
    for name, content in broken_files().items():
        (tmp_path / name).write_bytes(content)
    dataset = FolderTiles(tmp_path, 64, 0)
    straight = samples(dataset, range(800), batch_size=8)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == len(dataset.unreadable) == 3
    for name in broken_files():
        assert sum(f"/{name}': damaged (" in line for line in lines) == 1
    assert torch.equal(straight[101:160], samples(dataset, range(101, 160), workers=2))
    assert straight.flatten(1).float().std(1).min() > 1  # never the blank


def test_an_unreadable_tile_is_replaced_by_the_next_of_its_epoch(tmp_path):
    write_tiles(tmp_path, 300, (64, 64))
    dataset = FolderTiles(tmp_path, 64, seed=2)
    n = len(dataset)
    for epoch in (0, 1):
        order = data.epoch_order(2, epoch, n)
        (tmp_path / dataset.files[order[7]]).write_bytes(b"")
        for place, expected in ((7, order[8]), (8, order[8])):
            seen = dataset[epoch * n + place]["image"].flatten(1).sort().values
            tile = torch.from_numpy(np.array(open_tile(tmp_path / dataset.files[expected])))
            assert torch.equal(seen, tile.flatten(0, 1).T.sort().values)


def test_more_than_one_per_cent_unreadable_ends_the_run(tmp_path):
    write_tiles(tmp_path, 50)
    (tmp_path / "broken.png").write_bytes(b"")
    expected = rf"over 1 % of 51 tiles are unreadable: '{tmp_path}/broken\.png': damaged .*; mend"
    with pytest.raises(InputError, match=expected):
        list(batches(FolderTiles(tmp_path, 64, 0), range(51), 8))


def test_a_folder_of_nothing_but_broken_tiles_does_not_hang(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="unreadable"):
        next(batches(FolderTiles(tmp_path, 64, 0), range(2), 2))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(InputError, match=f"--data: no images .* in {tmp_path}; "):
        FolderTiles(tmp_path, 64, 0)
    with pytest.raises(InputError, match="--data: .*/nowhere is no folder, or does not exist"):
        FolderTiles(tmp_path / "nowhere", 64, 0)
    with pytest.raises(InputError, match="--embed: .*/nowhere is no folder"):
        list_tiles(tmp_path / "nowhere", "--embed")


def test_a_tar_after_data_is_told_where_it_belongs(tmp_path):
    (tmp_path / "a.tar").touch()
    for given in (
        tmp_path / "a.tar",
        [tmp_path, tmp_path / "b.tar"],
        f"{tmp_path}/*.tar",
        tmp_path,
    ):
        with pytest.raises(InputError, match="python -m extras.shards") as error:
            FolderTiles(given, 64, 0)
        assert len(str(error.value).splitlines()) == 1
    write_tiles(tmp_path / "unpacked.tar", 1)
    assert names_of(tmp_path / "unpacked.tar") == ["tile_000.png"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_tiles(tmp_path / "closed", 1)
    write_tiles(tmp_path / "open", 1)
    scan = os.scandir

    def closed(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match="--data: cannot read .*/closed: Permission denied"):
        list_tiles(tmp_path)


def test_masks_beside_images_are_no_tiles(tmp_path):
    write_tiles(tmp_path / "train" / "images", 2)
    write_tiles(tmp_path / "train" / "masks", 2)
    write_tiles(tmp_path / "masks", 1)  # with no images/ beside it, a folder like others
    images = [name for name in names_of(tmp_path) if name.startswith("train/")]
    assert len(images) == 2 and all(name.startswith("train/images/") for name in images)
    assert len(names_of(tmp_path)) == 3
    assert len(names_of(tmp_path / "train" / "masks")) == 2
    assert len(list_tiles(tmp_path, with_masks=True)[1]) == 5


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    write_tiles(tmp_path / "elsewhere", 3)
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tiles" / "linked again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tiles" / "circle").symlink_to(tmp_path / "tiles")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "tiles")
    assert names_of(tmp_path / "tiles") == [f"linked/tile_00{i}.png" for i in range(3)]


def test_hidden_files_and_those_that_systems_leave_are_no_tiles(tmp_path):
    for folder in (".ipynb_checkpoints", ".Trash-1000/files", "@eaDir", "__MACOSX", "a/.hidden"):
        write_tiles(tmp_path / "tiles" / folder, 1)
    good = write_tiles(tmp_path / "tiles" / "a", 1)[0].read_bytes()
    for name in ("._x.png", ".png", ".x.jpg", "notes.txt", "png", "x.png.txt"):
        (tmp_path / "tiles" / "a" / name).write_bytes(good)
    assert names_of(tmp_path / "tiles") == ["a/tile_000.png"]
    hidden = tmp_path / "tiles" / ".Trash-1000"
    assert names_of(hidden) == ["files/tile_000.png"]  # named, so it is meant


def test_several_folders_are_named_from_the_folder_around_them(tmp_path):
    write_tiles(tmp_path / "b", 2)
    write_tiles(tmp_path / "a" / "deep", 1)
    tiles = FolderTiles([tmp_path / "b", tmp_path / "a"], 64, 0)
    assert tiles.top == str(tmp_path)
    assert tiles.files == ["a/deep/tile_000.png", "b/tile_000.png", "b/tile_001.png"]
    assert tiles.description == f"3 tiles of {tmp_path}/b, {tmp_path}/a"
    twice = FolderTiles(
        [tmp_path / "a", tmp_path / "b", tmp_path / "b", tmp_path / "a/deep"], 64, 0
    )
    assert twice.files == tiles.files and twice.fingerprint == tiles.fingerprint
    assert torch.equal(samples(twice, range(9)), samples(tiles, range(9)))


def test_the_fingerprint_tells_other_tiles_and_not_another_place(tmp_path):
    write_tiles(tmp_path / "a", 3)
    write_tiles(tmp_path / "b", 3)
    first, second = (FolderTiles(tmp_path / name, 64, 0).fingerprint for name in "ab")
    assert first == second and first.startswith("3 tiles")
    (tmp_path / "b" / "tile_001.png").rename(tmp_path / "b" / "tile_003.png")
    assert FolderTiles(tmp_path / "b", 64, 0).fingerprint != first


def test_a_relative_folder_and_names_that_are_no_text(tmp_path, monkeypatch):
    name = os.fsdecode(b"\xff\xfe.png")
    write_tiles(tmp_path / "tiles", 1)[0].rename(tmp_path / "tiles" / name)
    monkeypatch.chdir(tmp_path)
    tiles = FolderTiles("tiles", 64, 0)
    assert tiles.description == "1 tiles of tiles" and tiles.files == [name]
    assert samples(tiles, range(2)).shape == (2, 3, 64, 64)


def test_many_files_are_listed_quickly(tmp_path):
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for i in range(500):
            os.close(os.open(f"{tmp_path}/{folder}/{i}.png", os.O_CREAT))
    began = time.process_time()
    assert len(names_of(tmp_path)) == 10_000
    assert time.process_time() - began < 1  # some 0.05 s: a million files take seconds


def test_sources_say_what_they_are(tmp_path):
    write_tiles(tmp_path, 2)
    for source in (FolderTiles(tmp_path, 64, 0), TissueTiles("distil", 0, 64, length=2)):
        assert len(source) == 2 and source.has_outputs is False
        assert source.program == "python train.py" and source.description
    assert source.fingerprint == ""


def test_what_comes_with_a_sample_is_in_its_batch():
    """The teachers' outputs, nested; and a source that is a plain list stays as it was."""
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    source = []
    for k in range(6):
        tokens = {"summary": torch.full((4,), k), "patches": torch.full((2, 4), k)}
        source.append({"image": image + k, "outputs": {"a teacher": tokens}, "cells": k})
    for batch in batches(source, range(6), 3):
        assert batch.keys() == {"image", "outputs", "cells"}
        assert batch["image"].shape == (3, 3, 8, 8) and batch["image"].dtype == torch.uint8
        outputs = batch["outputs"]["a teacher"]
        assert outputs["summary"].shape == (3, 4) and outputs["patches"].shape == (3, 2, 4)
        assert torch.equal(outputs["summary"][:, 0], batch["cells"])
        assert torch.equal(batch["image"][:, 0, 0, 0], batch["cells"])
    assert source[0].keys() == {"image", "outputs", "cells"}


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(tmp_path, workers):
    write_tiles(tmp_path, 3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    samples(FolderTiles(tmp_path, 64, 0), range(8), workers)
    assert torch.equal(torch.rand(3), expected)


# ---- hostile images ------------------------------------------------------------------------------
def special_files(folder, good):
    """{name: whether it can be read} of links, pipes, sockets, huge files, odd names made here."""
    names = [
        "新しい é.png",
        "line\nbreak.png",
        "tab\t'quote\".png",
        "-dash.png",
        " .png",
        "x" * 251 + ".png",
    ]
    names += [os.fsdecode(b"\xff\xfe\x80.png"), "cr\rlf.png", "esc\x1b[31m.png"]
    readable = {}
    for name in names:
        with contextlib.suppress(OSError):  # a file system of UTF-8 alone
            (folder / name).write_bytes(good)
            (folder / f"bad {name}"[-240:]).write_bytes(good[:200])
            readable |= {name: True, f"bad {name}"[-240:]: False}
    (folder / "good link.png").symlink_to(folder / names[0])
    (folder / "broken link.png").symlink_to(folder / "nowhere")
    (folder / "circle a.png").symlink_to(folder / "circle b.png")
    (folder / "circle b.png").symlink_to(folder / "circle a.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "linked pipe.png").symlink_to(folder / "pipe.png")
    with (
        socket.socket(socket.AF_UNIX) as listener,
        contextlib.chdir(folder),
    ):  # a path of at most 107 bytes
        listener.bind("socket.png")
    (folder / "null.png").symlink_to("/dev/null")
    with open(folder / "huge.png", "wb") as file:
        file.write(good)
        file.truncate(600 * 2**20)  # sparse: Pillow would read it
    kinds = ("broken link", "circle a", "circle b", "pipe", "linked pipe", "socket", "null", "huge")
    return readable | {"good link.png": True} | {f"{kind}.png": False for kind in kinds}


@pytest.mark.filterwarnings("ignore")
def test_two_thousand_hostile_images_are_read_as_pillow_reads_them_or_not_at_all(tmp_path):
    found, wrong = collections.Counter(), []
    for what, name, content in hostile_images(2000):
        (tmp_path / name).write_bytes(content)
        word = outcome(tmp_path / name)
        found[word] += 1
        wrong += [(word, name)] * (word not in AGREED)
        if "claims" in what or what in (
            "several pages",
            "12000x12000",
            "30000x20",
            "strip 1x5000",
            "strip 5000x1",
            "strip 1001x1",
        ):
            assert word in ("refused", "broken"), name
        if what in (
            "30000x40",
            "strip 1000x1",
            "strip 2x1999",
            "CMYK",
            "APNG",
            "GIF",
            "16-bit RGB",
        ):
            assert word == "read", name
        (tmp_path / name).unlink()
    assert not wrong, wrong
    assert found["read"] > 500 and found["broken"] > 500 and found["refused"] > 20, (
        found
    )  # none is all there is


def test_links_pipes_sockets_huge_files_and_odd_names(tmp_path):
    good = write_tiles(tmp_path / "loose", 1, (64, 64))[0]
    expected, folder = pillows_own(good)[0][1], tmp_path / "tiles"
    folder.mkdir()
    for name, readable in special_files(folder, good.read_bytes()).items():
        with within(5, name):
            opened = opened_or_none(folder / name)
        assert (opened and opened.tobytes()) == (expected if readable else None), name
    (folder / "folder.png").mkdir()
    assert reason(folder / "folder.png") == "no regular file"


def test_an_endless_device_named_as_a_tile_is_not_read(tmp_path):
    (tmp_path / "x.png").symlink_to("/dev/zero")
    before, taken = (
        resource.getrlimit(resource.RLIMIT_AS),
        int(Path("/proc/self/statm").read_text().split()[0]),
    )
    resource.setrlimit(resource.RLIMIT_AS, (taken * os.sysconf("SC_PAGE_SIZE") + 2**30, before[1]))
    tracemalloc.start()
    try:
        with within(20, "/dev/zero"):
            assert reason(tmp_path / "x.png") == "no regular file"
        assert tracemalloc.get_traced_memory()[1] < 10e6  # bytes, at its most
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory):
    """{path: whether it can be read} of 500 hostile images and of special files."""
    folder = tmp_path_factory.mktemp("hostile")
    readable, good = {}, write_tiles(folder, 1, (64, 64))[0]
    for what, name, content in hostile_images(500, seed=1):
        path = folder / what[:1] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        expected, refusable = pillows_own(path)
        if not (expected and refusable):  # what may be refused is tested alone
            readable[str(path)] = expected is not None
        else:
            path.unlink()
    (folder / "special").mkdir()
    special = special_files(folder / "special", good.read_bytes())
    (folder / "special" / "folder.png").mkdir()  # listed as a folder, so never read
    return folder, readable | {f"{folder}/special/{name}": known for name, known in special.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_hostile_files_in_a_folder_are_named_once_counted_and_replaced(
    hostile_folder, capfd, workers
):
    folder, readable = hostile_folder
    unreadable = {path for path, known in readable.items() if not known}
    tiles = FolderTiles(folder, 32, seed=0)
    assert {f"{folder}/{file}" for file in tiles.files} >= readable.keys()
    tiles.files += ["tile_000.png"] * (
        101 * len(unreadable)
    )  # one good tile so often that 1 % is never reached
    order = data.epoch_order(0, 0, len(tiles.files))
    hostile = [k for k in range(len(order)) if tiles.files[order[k]] != "tile_000.png"]
    with within(60, "reading a folder"):
        images = samples(tiles, [*hostile, *hostile[:50]], workers, batch_size=16)
    assert len(images) == len(hostile) + 50 and images[0].shape == (3, 32, 32)
    assert len(tiles.unreadable) == len(unreadable)
    lines = capfd.readouterr().err.split("\n")
    lines = [line for line in lines if "skipped unreadable tile" in line]
    assert len(lines) == len(unreadable)  # a line each, whatever is in a name
    for path in unreadable:
        assert sum(f"tile {path!r}: " in line for line in lines) == 1, path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_hostile_files_ends_in_one_line(hostile_folder, workers):
    tiles = FolderTiles(hostile_folder[0], 32, seed=0)
    with (
        within(60, "reading a folder"),
        pytest.raises(InputError, match="over 1 % of .* tiles are unreadable") as error,
    ):
        samples(tiles, range(len(tiles.files)), workers, batch_size=16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["line\nbreak.png", os.fsdecode(b"\xff\xfe.png"), "cr\rlf.png"])
def test_a_broken_tile_of_an_odd_name_ends_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(InputError, match="over 1 % of 1 tiles are unreadable") as error:
        samples(FolderTiles(tmp_path, 32, 0), range(1))
    assert len(str(error.value).splitlines()) == 1


# ---- workers that die ----------------------------------------------------------------------------
# With a slow reader, its batches are not yet fetched; only in the main thread torch sees it at once
@pytest.mark.parametrize(("pause", "thread"), [(0, False), (0.3, False), (0, True)])
def test_a_worker_that_dies_ends_in_one_line(tmp_path, monkeypatch, capsys, pause, thread):
    paths = write_tiles(tmp_path, 40, (32, 32))
    deadly = paths[23].read_bytes()

    def dies(file, *arguments, original=Image.open, **more):
        if file.read() == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        file.seek(0)
        return original(file, *arguments, **more)

    def main():
        for _ in batches(FolderTiles(tmp_path, 32, 0), range(40), 4, 2):
            time.sleep(pause)

    monkeypatch.setattr(Image, "open", dies)
    with within(60, "a dead worker"):
        code, err = ending_of(main, capsys, thread)
    assert code == 2 and re.fullmatch(r"[^\n]+: --workers: .* died .*\n", err), err


LEFT = """
import sys, data
loader = data.batches(data.FolderTiles(sys.argv[1], 32, 0), range(10**6), 4, 2)
next(loader)
raise RuntimeError("something else")
"""


def test_a_script_that_fails_while_workers_wait_ends_at_once(tmp_path):
    write_tiles(tmp_path, 8, (32, 32))
    command = [sys.executable, "-c", LEFT, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and ended.stderr.endswith("RuntimeError: something else\n")


def end_workers():
    """Now, for torch waits 5 s for each when garbage collection comes upon a failed iterator."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises
    for child in torch.multiprocessing.active_children():
        child.kill()
        child.join()
    gc.collect()
    signal.signal(signal.SIGCHLD, before)


def test_a_fault_in_a_worker_is_not_taken_for_a_dead_worker(tmp_path, monkeypatch):
    def faulty(*_):
        raise RuntimeError("a fault of ours, 1 of 2")

    write_tiles(tmp_path, 8, (32, 32))
    monkeypatch.setattr(data, "random_view", faulty)
    with pytest.raises(RuntimeError, match="a fault of ours") as fault:
        samples(FolderTiles(tmp_path, 32, 0), range(8), workers=2)
    del fault
    end_workers()


# ---- synthetic tissue ----------------------------------------------------------------------------
PINNED = {  # sha256 of the pixels, cells, tissue
    ("teacher", 0, 0, 64): (
        "88b6415917486b718c4217e9d4dde0aa392841cdd5920e6a172c3b282e612ab6",
        5,
        3,
    ),
    ("distil", 3, 5, 64): (
        "95dca38194ea484c6c485bbb7466bfdd1cbbdeb5b99a6337d0c93e9d90b2eb62",
        5,
        3,
    ),
    ("bank", 0, 17, 64): ("8b43cd17d7e9a5dadd1e04d6d97909390a36ec00df3a0a14e9dd9a778ca507be", 0, 1),
    ("test", 1, 2, 64): ("5d8d03a875f96e253b0f71ebe7fc37e9f5ea681aacc6bb9a3c93e8ef3e4ea139", 4, 2),
    ("test", 0, 9, 48): ("518d4fe0bff32286a3420c93ad8351dd2a0c22d0aaf9e24ba380808098ef86c2", 2, 4),
    ("bank", 2, 4, 224): ("007da70fc8673292d9c953c14b12e3830b07d951b38845996461cfb51df20ac3", 2, 4),
}


@pytest.mark.parametrize("key", PINNED)
def test_tiles_of_this_tissue_version_never_change(key):
    """Else older teachers, caches and results would mean other tiles: raise TISSUE_VERSION."""
    image, cells, tissue, _ = draw_tissue(*key)
    assert (cells, tissue) == PINNED[key][1:]
    assert hashlib.sha256(image.tobytes()).hexdigest() == PINNED[key][0]


@pytest.mark.parametrize("size", [64, 128])
def test_nuclei_are_where_the_tile_is_dark(size):
    """Haematoxylin takes red light: nuclei are darker in red than the rest of their tile."""
    tiles = [draw_tissue("bank", 0, k, size) for k in range(40)]
    for image, cells, _, nuclei in tiles:
        assert (
            nuclei.dtype == np.uint8
            and nuclei.shape == (size, size)
            and set(np.unique(nuclei)) == {0, 1}
        )
        red, inside = image[..., 0].astype(float), nuclei == 1
        assert red[inside].mean() < red[~inside].mean() - 15, cells
        assert 0.02 < inside.mean() < 0.7
        darkest = red <= np.quantile(red, 0.05)
        assert inside[darkest].mean() > 0.8  # next to nothing dark lies outside
    assert 0.05 < np.mean([nuclei.mean() for *_, nuclei in tiles]) < 0.4
    # a nucleus is a piece, not pixels strewn about: a neighbour of its pixels mostly is one too
    pairs = [(nuclei[:, 1:][nuclei[:, :-1] == 1]).mean() for *_, nuclei in tiles]
    assert min(pairs) > 0.5


def test_nuclei_travel_with_their_tile():
    tiles = TissueTiles("test", 0, 32)
    drawn = tiles.draw(5)
    for k in range(5):
        image, cells, tissue, nuclei = draw_tissue("test", 0, k, 32)
        assert np.array_equal(tiles[k]["nuclei"], nuclei) and np.array_equal(
            drawn["nuclei"][k], nuclei
        )
        assert np.array_equal(drawn["image"][k].permute(1, 2, 0), image)
        assert (drawn["cells"][k], drawn["tissue"][k]) == (cells, tissue)


def test_streams_of_tissue_do_not_leak_and_labels_are_independent():
    tiles = {
        (s, seed): draw_tissue(s, seed, 0)[0].tobytes() for s in data.STREAMS for seed in (0, 1)
    }
    assert len(set(tiles.values())) == len(tiles)
    labels = np.array([draw_tissue("test", 0, k, size=16)[1:3] for k in range(1800)])
    joint = np.histogram2d(*labels.T, bins=6)[0]
    expected = len(labels) / 36  # chi-square with 35 degrees of freedom: 66.6 is its 99.9 % point
    assert ((joint - expected) ** 2 / expected).sum() < 66.6


@pytest.mark.parametrize("size", [64, 224])
def test_tissue_looks_like_he(size):
    tiles = np.stack([draw_tissue("bank", 0, k, size)[0] for k in range(24)]).astype(float)
    assert tiles.shape == (24, size, size, 3)
    red, green, blue = tiles.reshape(-1, 3).mean(0)
    assert green < red and green < blue  # pink to violet
    assert tiles.std((1, 2)).min() > 5  # none is blank


def test_progress_prints_eta(capsys, monkeypatch):
    clock = iter(range(0, 100, 6))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))  # six seconds an item
    assert list(data.progress(range(3), "counting", 3)) == [0, 1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "counting: 1/3" in lines[0] and "ETA" in lines[0]


def test_progress_is_that_of_process_0(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert list(data.progress(range(3), "counting", 3)) == [0, 1, 2]
    assert capsys.readouterr().out == ""


# ---- what touches the disk -----------------------------------------------------------------------
def test_a_save_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "made" / "x.pt"
    data.save_atomically({"a": torch.arange(3)}, path)
    assert torch.equal(torch.load(path)["a"], torch.arange(3))
    data.save_atomically(b"bytes", path)
    assert path.read_bytes() == b"bytes"
    data.save_atomically("text", path, lambda text, file: file.write(text.encode()))
    assert path.read_bytes() == b"text"

    def fails(content, file):
        file.write(b"half")
        raise content

    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at x.cc:1]\n file write failed"),
    ):
        with pytest.raises(InputError, match=rf"cannot write {path}: .*; free some space") as said:
            data.save_atomically(error, path, fails)
        assert len(str(said.value).splitlines()) == 1
    with pytest.raises(KeyError):  # a fault of ours stays one
        data.save_atomically(KeyError("x"), path, fails)
    assert path.read_bytes() == b"text" and len(list(path.parent.iterdir())) == 1


def test_a_save_where_nothing_can_be_written_names_the_path(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=f"cannot write {path}: "):
            data.save_atomically(b"", path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_save_beside_the_program_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.save_atomically(b"x", "here")
    assert os.listdir() == ["here"]


# ---- command lines -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--steps 0", "argument --steps: invalid positive value: '0'"),
        ("--steps x", "argument --steps: invalid positive value: 'x'"),
        ("--seed -1", "argument --seed: invalid natural value: '-1'"),
        ("--seed 2147483648", "argument --seed: invalid natural value: '2147483648'"),
        ("--dims 4,0", "argument --dims: invalid dim_list value: '4,0'"),
        ("--dims 4,", "argument --dims: invalid dim_list value: '4,'"),
        ("--data=", "argument --data: invalid path value: ''"),
        ("--ste 3", "unrecognized arguments: --ste 3"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(capsys, line, expected):
    parser = data.make_parser("x.py", "A manual.\n    with its own lines")
    for flag, kind in (("steps", "positive"), ("seed", "natural"), ("dims", "dim_list")):
        parser.add_argument(f"--{flag}", type=getattr(data, kind))
    parser.add_argument("--data", type=data.path)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(line.split())
    assert stop.value.code == 2 and capsys.readouterr().err == f"x.py: error: {expected}\n"
    assert "A manual.\n    with its own lines\n" in parser.format_help()


def test_types_of_flags():
    assert data.positive("12") == 12 and data.natural("0") == 0 and data.path("0") == "0"
    assert data.dim_list("96, 24,96") == [24, 96]
    assert data.name_list("uni, virchow,uni") == ["uni", "virchow"] and data.name_list("") == []
    assert isinstance(data.make_parser("x", ""), argparse.ArgumentParser)


# ---- programs end in one line --------------------------------------------------------------------
def ending_of(main, capsys, thread=False):
    """The exit code and what is on stderr when a program ends, perhaps in another thread."""
    codes = []

    def run():
        try:
            data.run_program(main)
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code)

    if thread:
        other = threading.Thread(target=run)
        other.start()
        other.join()
    else:
        run()
    return codes[0], capsys.readouterr().err


def raises(error):
    def main():
        raise error

    return main


ENDINGS = [
    (InputError("--data: x is missing;\ngive it"), 2, "--data: x is missing; give it"),
    (
        FileNotFoundError(2, "No such file or directory", "y\n"),
        2,
        r"\[Errno 2\] No such .*'y.n'; put it right",
    ),
    (MemoryError(), 2, "out of memory; lower --workers, or begin another run"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nGPU 0 has"), 2, "out of memory; lower"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 2, "out of memory; .*--dims"),
    (OSError(12, "Cannot allocate memory"), 2, "out of memory; .*--workers"),
    (torch.distributed.DistNetworkError("timed out"), 1, "another process was lost"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"), 1, "another proc"),
    (RuntimeError("NCCL error in: x.cpp"), 1, "another process was lost, .*--resume"),
    (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), 2, "--workers: "),
    (
        RuntimeError("DataLoader worker (pid(s) 5) exited unexpectedly"),
        2,
        "--workers: .*fewer workers",
    ),
    (KeyboardInterrupt(), 130, "interrupted; a run that has saved goes on with --resume"),
]


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize(("error", "code", "expected"), ENDINGS)
def test_what_a_user_can_put_right_is_one_line(monkeypatch, capsys, error, code, expected, thread):
    monkeypatch.setattr(sys, "argv", ["/x/train.py"])
    found, err = ending_of(raises(error), capsys, thread)
    assert found == code and re.fullmatch(rf"train\.py: {expected}[^\n]*\n", err), err


@pytest.mark.parametrize("error", [RuntimeError("1 of ours"), ValueError("ours"), KeyError("ours")])
def test_a_fault_of_ours_keeps_its_traceback(capsys, error):
    with pytest.raises(type(error), match="ours"):
        data.run_program(raises(error))
    assert capsys.readouterr().err == ""


def test_exit_codes_of_a_program_that_ends_well(capsys):
    assert ending_of(lambda: None, capsys) == ending_of(lambda: 0, capsys) == (0, "")
    assert ending_of(lambda: 143, capsys) == (143, "")


class Refusing(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, k):
        raise InputError("cache/: it has changed; make it anew")


def test_an_error_that_a_worker_meets_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    code, err = ending_of(lambda: list(batches(Refusing(), range(4), 2, 1)), capsys)
    assert code == 2
    assert err == "x.py: cache/: it has changed; make it anew\n"
    end_workers()


class Plain(io.StringIO):
    """As a notebook's: it has no `reconfigure`."""

    assert not hasattr(io.StringIO, "reconfigure")


@pytest.mark.parametrize("kind", ["none", "closed", "plain"])
def test_output_that_is_missing_closed_or_a_notebooks(monkeypatch, kind):
    for name in ("stdout", "stderr"):
        stream = Plain() if kind != "none" else None
        if kind == "closed":
            stream.close()
        monkeypatch.setattr(sys, name, stream)

    def main():
        print("printed")
        raise InputError("one line")

    with pytest.raises(SystemExit) as stop:
        data.run_program(main)
    assert stop.value.code == 2
    if kind == "plain":
        assert sys.stdout.getvalue() == "printed\n" and "one line\n" in sys.stderr.getvalue()


def test_names_that_are_no_text_are_printed(monkeypatch):
    written = {}
    for name in ("stdout", "stderr"):
        written[name] = io.BytesIO()
        monkeypatch.setattr(sys, name, io.TextIOWrapper(written[name], "utf-8"))

    def main():
        print(os.fsdecode(b"\xff.png"))
        raise InputError(os.fsdecode(b"no \xfe.png"))

    with pytest.raises(SystemExit):
        data.run_program(main)
    sys.stderr.flush()
    assert written["stdout"].getvalue() == b"\\udcff.png\n"
    assert written["stderr"].getvalue().endswith(b": no \\udcfe.png\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_to_a_full_disk(monkeypatch, capsys):
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    code, err = ending_of(lambda: print("x"), capsys)
    assert code == 2 and err.endswith(
        ": [Errno 28] No space left on device; put it right, or choose another place\n"
    )
    assert sys.stdout is not full  # which Python would try to write again when it ends
    with contextlib.suppress(OSError):
        full.close()


PROGRAM = """
import sys
import data
def main():
    if sys.argv[1] != "waits":
        print("begun", flush=True)
    if sys.argv[1] == "much":
        for line in range(100_000):
            print(line)
    if sys.argv[1] == "refused":
        raise data.InputError("no")
    if sys.argv[1] == "waits":
        tiles = data.FolderTiles(sys.argv[2], 32, 0)
        loader = data.batches(tiles, range(10**8), 4, 2)
        next(loader)
        print("begun", flush=True)  # while it forks, Python itself loses a Ctrl-C now and then
        for batch in loader:
            pass
data.run_program(main)
"""


def start_program(how, redirect="", folder="", **options):
    """A real program, below a shell."""
    line = f'exec "$PYTHON" -c "$PROGRAM" {how} "{folder}" {redirect}'
    if "|" in line:
        line = line.removeprefix("exec ")
    more = {"PYTHON": sys.executable, "PROGRAM": PROGRAM}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        ["bash", "-c", line], cwd=ROOT, env=os.environ | more, **pipes, **options
    )


@pytest.mark.parametrize(
    ("how", "redirect", "expected", "out"),
    [
        ("refused", ">&- 2>&-", 2, ""),
        ("much", "| head -1; exit ${PIPESTATUS[0]}", 141, "begun\n"),
    ],
)
def test_a_real_program_whose_output_is_closed_or_no_longer_read(how, redirect, expected, out):
    program = start_program(how, redirect)
    assert program.communicate(timeout=120) == (out, "")
    assert program.returncode == expected


def test_ctrl_c_while_workers_read_is_one_line(tmp_path):
    """Ctrl-C reaches all processes of a terminal's foreground, the loader's workers too."""
    write_tiles(tmp_path, 8, (32, 32))
    program = start_program("waits", folder=tmp_path, start_new_session=True)
    assert program.stdout.readline() == "begun\n"
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 130 and re.fullmatch(r"-c: interrupted; [^\n]*\n", err), err
