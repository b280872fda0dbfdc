"""Sample k is a function of (seed, k) alone; tiles are read as Pillow reads them; unreadable ones are counted."""

import bz2
import collections
import contextlib
import gc
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_shard, write_tiles
from PIL import Image, ImageOps

import data
from data import (
    FolderTiles,
    InputError,
    TissueTiles,
    batches,
    draw_tissue,
    labelled_files,
)
from evaluate import CentreTiles


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
    assert data.list_tiles(tmp_path) == [f"deep/er/{path.name}"]
    assert FolderTiles(tmp_path, 64, 0)[0]["image"].shape == (3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_colour_conversion_is_pillows(tmp_path, mode):
    image = Image.open(write_tiles(tmp_path, 1, (64, 64))[0])
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    path = tmp_path / "converted.tif"
    image.save(path)
    assert np.array_equal(np.array(data.open_tile(path)), np.array(Image.open(path).convert("RGB")))


def test_exif_rotation_is_undone(tmp_path):
    image = Image.open(write_tiles(tmp_path, 1, (96, 80))[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(
        np.array(data.open_tile(tmp_path / "turned.png")), np.array(image.rotate(-90, expand=True))
    )


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_16_bit_grey_is_refused_and_not_clipped_to_white(tmp_path, mode):
    pixels = (
        np.random.default_rng(0)
        .integers(20_000, 60_000, (70, 70))
        .astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode])
    )
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode == mode
    assert data.open_tile(tmp_path / "x.tif") is None


def test_small_tiles_are_enlarged_and_one_is_named(tmp_path, capsys):
    write_tiles(tmp_path / "large", 3, (70, 70))
    write_tiles(tmp_path / "small", 2, (40, 90))
    dataset = FolderTiles(tmp_path, 64, 0)
    assert samples(dataset, range(5)).shape == (5, 3, 64, 64)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {tmp_path / 'small'}/tile_00")


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
    straight = [batch["image"] for batch in batches(dataset, range(800), 8)]
    assert {path.rsplit("/")[-1] for path in dataset.unreadable} == set(broken_files())
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 3 and all(
        sum(name in line for line in warnings) == 1 for name in broken_files()
    )
    assert torch.equal(torch.cat(straight)[101:160], samples(dataset, range(101, 160), workers=2))
    assert torch.cat(straight).flatten(1).float().std(1).min() > 1  # never the blank


def test_more_than_one_per_cent_unreadable_ends_the_run(tmp_path):
    write_tiles(tmp_path, 50)
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(
        InputError, match=rf"{tmp_path}: over 1 % of 51 tiles are unreadable: .*broken\.png"
    ):
        list(batches(FolderTiles(tmp_path, 64, 0), range(51), 8))


def test_a_folder_of_nothing_but_broken_tiles_does_not_hang(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="unreadable"):
        next(batches(FolderTiles(tmp_path, 64, 0), range(2), 2))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(InputError, match=f"--data: {tmp_path} holds no images "):
        FolderTiles(tmp_path, 64, 0)
    with pytest.raises(
        InputError, match="--data: .*nowhere is no folder of images and no uncompressed .tar"
    ):
        FolderTiles(tmp_path / "nowhere", 64, 0)


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    write_tiles(tmp_path / "elsewhere", 3)
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tiles" / "circle").symlink_to(tmp_path / "tiles")
    assert data.list_tiles(tmp_path / "tiles") == [f"linked/tile_00{i}.png" for i in range(3)]


# ---- hostile images ------------------------------------------------------------------------------------------------
SUFFIXES = ("png", "jpg", "tif", "bmp", "webp")
DAMAGE = (
    "cut short",
    "1 bit",
    "10 bits",
    "100 bits",
    "zeroed",
    "appended",
    "inserted",
    "another suffix",
)


@contextlib.contextmanager
def within(seconds, what):
    """Fail with something that no `except Exception` swallows, where a pipe or a loop would hang for ever."""

    def late(*_):
        pytest.fail(f"{what}: not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def encoded(image, suffix, **options):
    file = io.BytesIO()
    image.save(file, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
    return file.getvalue()


def png(width, height, depth, colour, rows, level=1):
    """A PNG made by hand, of kinds that Pillow does not write; rows: its pixels, each row behind a filter byte."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, level)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + parts


def plain_images(rng):
    """(suffix, content) of small tiles of 8 bits, some grey, some with a palette or compressed in another way."""
    for suffix in SUFFIXES:
        for mode in ("RGB", "RGB", "L", "P", "RGBA", "CMYK"):
            size = rng.integers(40, 101, 2)
            smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
                size.tolist(), 3
            )
            with contextlib.suppress(OSError):  # a mode that the format does not know
                yield suffix, encoded(smooth.convert(mode), suffix)
                if suffix == "tif":
                    for way in ("tiff_lzw", "packbits", "tiff_deflate", "jpeg"):
                        yield suffix, encoded(smooth.convert(mode), suffix, compression=way)


def odd_images(rng):
    """(what, suffix, content) of whole images that are unusual, and of some that claim to be huge."""

    def noise(width, height, *channels):
        return rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)

    rgb = Image.fromarray(noise(60, 45, 3))
    for suffix in SUFFIXES:
        for size in ((1, 1), (1, 5000), (5000, 1), (1000, 1), (1001, 1), (2, 1999)):
            yield (
                "strip {}x{}".format(*size),
                suffix,
                encoded(Image.fromarray(noise(*size, 3)), suffix),
            )
        for way in range(10) if suffix != "bmp" else ():  # 0 and 9 are no orientations
            exif = Image.Exif()
            exif[0x0112] = way
            yield f"orientation {way}", suffix, encoded(rgb, suffix, exif=exif)
        yield "no bytes", suffix, b""
    for suffix in ("png", "tif"):
        for mode in ("1", "L", "LA", "P", "RGBA"):
            yield f"mode {mode}", suffix, encoded(rgb.convert(mode), suffix)
        for top in (65535, 255, 200, 1):
            grey = Image.fromarray(rng.integers(0, top + 1, (40, 50)).astype(np.uint16))
            yield f"16-bit grey up to {top}", suffix, encoded(grey, suffix)
    deep = noise(50, 40, 6)
    yield "16-bit RGB", "png", png(50, 40, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep))
    yield (
        "16-bit grey and alpha",
        "png",
        png(50, 40, 16, 4, b"".join(b"\0" + row[:, :4].tobytes() for row in deep)),
    )
    clear = rgb.quantize(16)
    yield "palette with transparency", "png", encoded(clear, "png", transparency=3)
    yield "palette with alphas", "png", encoded(clear, "png", transparency=bytes(range(0, 256, 16)))
    yield "RGB with a transparent colour", "png", encoded(rgb, "png", transparency=(1, 2, 3))
    yield "CMYK", "jpg", encoded(rgb.convert("CMYK"), "jpg")
    yield "progressive", "jpg", encoded(rgb, "jpg", progressive=True, quality=60)
    yield "lossless", "webp", encoded(rgb.convert("RGBA"), "webp", lossless=True)
    yield "float", "tif", encoded(Image.fromarray(noise(50, 40).astype(np.float32)), "tif")
    for mode in ("LAB", "YCbCr"):
        yield (
            f"mode {mode}",
            "tif",
            encoded(rgb.convert("YCbCr") if mode == "YCbCr" else Image.new("LAB", (50, 40)), "tif"),
        )
    frames = [Image.fromarray(noise(60, 45, 3)) for _ in range(3)]
    for what, kind, suffix in (
        ("animated", "webp", "webp"),
        ("APNG", "png", "png"),
        ("GIF", "gif", "png"),
    ):
        yield what, suffix, encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    yield "several pages", "tif", encoded(frames[0], "tif", save_all=True, append_images=frames[1:])
    for kind in ("ppm", "tga", "ico", "pcx", "jpeg2000", "avif"):
        with contextlib.suppress(OSError, KeyError):  # this Pillow was built without it
            yield f"a {kind} inside", "png", encoded(rgb, kind)
    for width, height in (
        (60_000, 60_000),
        (20_000, 9_000),
        (10_000, 9_000),
        (2**31 - 1, 1),
        (0, 40),
    ):
        yield f"claims {width}x{height}", "png", png(width, height, 8, 2, b"\0" * 1000)
    yield "12000x12000", "png", png(12_000, 12_000, 1, 0, bytes(1501) * 12_000)
    yield "30000x40", "png", png(30_000, 40, 8, 0, (b"\0" + bytes(range(250)) * 120) * 40)
    yield "30000x20", "png", png(30_000, 20, 8, 0, bytes(30_001) * 20)
    for claimed in (
        b"\xff\x7f",
        b"\xff\xff",
    ):  # the height that a bitmap, here of 40x30, is said to have
        bmp = encoded(Image.fromarray(noise(40, 30, 3)), "bmp")
        yield f"claims {claimed.hex()} rows", "bmp", bmp[:22] + claimed + bmp[24:]


def damaged(content, how, rng):
    """The content with a piece lost, changed or added."""
    n, bits = len(content), re.match(r"\d+", how)
    start, stop = sorted(rng.integers(0, n + 1, 2).tolist())
    if bits:
        changed = bytearray(content)
        for bit in rng.integers(
            0, min(n, 10 ** rng.integers(2, 6)) * 8, int(bits[0])
        ):  # often in the header
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)
    if how == "zeroed":
        stop = min(stop, start + int(rng.integers(1, 200)))
        return content[:start] + bytes(stop - start) + content[stop:]
    more = rng.bytes(int(rng.integers(1, 300)))
    ways = {
        "cut short": content[:start],
        "appended": content + more,
        "inserted": content[:start] + more + content[start:],
    }
    return ways.get(how, content)


def hostile_images(n, seed=0):
    """n images as (what, name, content): each odd one once, and plain and odd ones damaged. n = 2,000 are 3 MB."""
    rng = np.random.default_rng(seed)
    odd, plain = list(odd_images(rng)), list(plain_images(rng))
    small = plain * 4 + [
        (suffix, content) for _, suffix, content in odd if 0 < len(content) < 20_000
    ]
    for i in range(n):
        if i < len(odd):
            what, suffix, content = odd[i]
        else:
            what, (suffix, content) = DAMAGE[i % len(DAMAGE)], small[rng.integers(len(small))]
            content = damaged(content, what, rng)
            if what == "another suffix":
                suffix = SUFFIXES[rng.integers(len(SUFFIXES))]
        yield what, f"{i:05d} {what}.{suffix}", content


def pillows_own(path):
    """((size, pixels) of the upright RGB image, or None where Pillow raises; whether open_tile may refuse it)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                open(path, "rb") as file,
                Image.open(file) as image,
            ):  # a file: for a name Pillow maps raw pixels unseen
                refusable = max(image.size) > 1000 * min(image.size) or image.mode[0] in "IF"
                upright = ImageOps.exif_transpose(image).convert("RGB")
                return (upright.size, upright.tobytes()), refusable
    except Exception:  # noqa: BLE001 - whatever it is
        return None, True


def outcome(path):
    """Read with open_tile, beside Pillow: "read", "refused", "broken"; another word where the two disagree."""
    with within(10, path.name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = data.open_tile(path)
    expected, refusable = pillows_own(path)
    if opened is None:
        return "broken" if expected is None else "refused" if refusable else "lost"
    if expected is None:
        return "made up"
    return (
        "read"
        if opened.mode == "RGB" and (opened.size, opened.tobytes()) == expected
        else "other pixels"
    )


def special_files(folder, good):
    """{name: whether it can be read} of links, pipes, sockets, huge files and odd names that are now in the folder."""
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
        wrong += [(word, name)] * (word not in ("read", "refused", "broken"))
        if "claims" in what or what in (
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
            "several pages",
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
            opened = data.open_tile(folder / name)
        assert (opened and opened.tobytes()) == (expected if readable else None), name
    (folder / "folder.png").mkdir()
    assert data.open_tile(folder / "folder.png") is None


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
            assert data.open_tile(tmp_path / "x.png") is None
        assert tracemalloc.get_traced_memory()[1] < 10e6  # bytes, at its most
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory):
    """{path: whether it can be read} of 500 hostile images and of special files, one folder below each other."""
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
    assert sorted(tiles.unreadable) == sorted(unreadable)
    lines = [
        line for line in capfd.readouterr().err.split("\n") if "skipped unreadable tile" in line
    ]
    assert len(lines) == len(unreadable)  # a line each, whatever is in a name
    for path in unreadable:
        assert sum(repr(path) in line for line in lines) == 1, path


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


# ---- tar shards and the index of tiles -----------------------------------------------------------------------------
FORMATS = {
    "gnu.tar": tarfile.GNU_FORMAT,
    "pax.tar": tarfile.PAX_FORMAT,
    "ustar.tar": tarfile.USTAR_FORMAT,
}
NAMES = [
    "plain.png",
    "b c/with spaces.jpg",
    "ü/Gewebe é 組織.png",
    "b c/upper.JPG",
    "deep/er/x.tar/12+34.png",
]


@pytest.fixture
def shards(tmp_path):
    """Two shards of six tiles each, as WebDataset writes them, in a folder of their own."""
    paths = write_tiles(tmp_path / "loose", 12, (64, 64))
    write_shard(tmp_path / "shards" / "a.tar", {path.name: path.read_bytes() for path in paths[:6]})
    write_shard(tmp_path / "shards" / "b.tar", {path.name: path.read_bytes() for path in paths[6:]})
    settle()
    return tmp_path / "shards"


def settle():
    """What changed within 20 ms is not yet indexed: more may be on its way."""
    time.sleep(0.04)


def names_of(tiles):
    """The members' own names, of SHARD.tar/OFFSET+SIZE/NAME."""
    return sorted(re.fullmatch(r"[^/]+\.tar/\d+\+\d+/(.+)", tile)[1] for tile in tiles)


def unopened(*_, **__):
    raise AssertionError("everything was read again")


@pytest.mark.parametrize("shard", FORMATS)
def test_a_shards_pixels_are_those_of_the_same_files_in_a_folder(tmp_path, shard):
    names = NAMES + (
        [] if "ustar" in shard else [f"long {'n' * 130}/{'m' * 130}.png"]
    )  # a header of its own
    names += ["left/" * 25 + "ustar.png"]  # over 100 characters: ustar splits it
    for i, name in enumerate(names):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    files = {name: (tmp_path / "folder" / name).read_bytes() for name in names}
    pax = {"pax_headers": {"comment": "ü" * 600}} if "pax" in shard else {}
    write_shard(tmp_path / "shards" / shard, files, format=FORMATS[shard], **pax)
    tiles = data.list_tiles(tmp_path / "shards")
    assert names_of(tiles) == sorted(names) == data.list_tiles(tmp_path / "folder")
    for tile in tiles:
        name, opened = (
            re.fullmatch(rf"{shard}/\d+\+\d+/(.+)", tile)[1],
            data.open_tile(tmp_path / "shards" / tile),
        )
        assert np.array_equal(np.array(opened), np.array(Image.open(tmp_path / "folder" / name))), (
            name
        )


@pytest.mark.parametrize("name", ["._x.jpg", "sub/._x.jpg", "./._x.jpg"])
def test_hidden_members_of_a_shard_are_left_out_as_hidden_files_are(tmp_path, name):
    good = write_tiles(tmp_path / "loose", 1)[0].read_bytes()
    write_shard(
        tmp_path / "shards" / "a.tar",
        {name: b"\0\5\26\7 macOS keeps attributes here", "x.jpg": good},
    )
    assert names_of(data.list_tiles(tmp_path / "shards")) == ["x.jpg"]


def test_links_folders_and_other_kinds_of_members_are_no_tiles(tmp_path):
    good = write_tiles(tmp_path / "loose", 1)[0].read_bytes()
    write_shard(tmp_path / "a.tar", {"x.png": good})
    with tarfile.open(tmp_path / "a.tar", "a") as shard:
        for kind, name in (
            (tarfile.DIRTYPE, "dir.png"),
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.FIFOTYPE, "pipe.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "x.png"
            shard.addfile(member)
    assert names_of(data.list_tiles(tmp_path / "a.tar")) == ["x.png"]


def test_a_member_whose_name_looks_like_a_place_in_a_shard_is_read(tmp_path):
    path = write_tiles(tmp_path / "loose", 1)[0]
    write_shard(tmp_path / "shards" / "a.tar", {"y.tar/12+34/x.png": path.read_bytes()})
    opened = data.open_tile(tmp_path / "shards" / data.list_tiles(tmp_path / "shards")[0])
    assert opened is not None and np.array_equal(np.array(opened), np.array(Image.open(path)))


def test_the_order_of_shards_is_reproducible_and_an_epoch_visits_each_tile_once(tmp_path, shards):
    whole, straight = data.list_tiles(shards), samples(FolderTiles(shards, 64, 3), range(24))
    assert len(whole) == 12 and whole == sorted(whole)
    shutil.copytree(
        shards, tmp_path / "elsewhere", copy_function=shutil.copyfile
    )  # other times and inodes
    a, b = str(shards / "a.tar"), str(shards / "b.tar")
    for given in (
        tmp_path / "elsewhere",
        [b, a],
        [str(shards)],
        [str(shards / "*.tar")],
        f"{shards}/[ab].tar",
    ):
        assert data.list_tiles(given) == whole, given
        assert torch.equal(samples(FolderTiles(given, 64, 3), range(24), workers=0), straight)
    assert torch.equal(samples(FolderTiles(shards, 64, 3), range(13, 24), workers=2), straight[13:])
    sums = (
        straight.flatten(1).sum(1).tolist()
    )  # a view of 64 px is the whole tile, flipped or turned
    assert (
        len(set(sums[:12])) == 12
        and sorted(sums[:12]) == sorted(sums[12:])
        and sums[:12] != sums[12:]
    )
    assert names_of(data.list_tiles(a)) == [f"tile_{i:03d}.png" for i in range(6)]


def test_nothing_is_listed_twice(shards):
    whole = data.list_tiles(shards)
    assert data.list_tiles([str(shards), str(shards)]) == whole
    assert data.list_tiles([str(shards / "a.tar"), str(shards / "*.tar")]) == whole
    assert data.list_tiles([str(shards), str(shards / "a.tar")]) == whole


def test_images_beside_shards_win(tmp_path, shards):
    write_tiles(shards / "images", 2)
    assert data.list_tiles(shards) == ["images/tile_000.png", "images/tile_001.png"]
    assert len(data.list_tiles(shards / "a.tar")) == 6


def test_a_path_that_exists_is_no_pattern(tmp_path):
    write_tiles(tmp_path / "tiles1", 1)
    write_tiles(tmp_path / "tiles[1]", 3)
    assert len(data.list_tiles(tmp_path / "tiles[1]")) == 3


def test_a_pipe_named_as_a_shard_is_refused_and_not_waited_for(tmp_path, shards):
    os.mkfifo(shards / "z.tar")
    with pytest.raises(InputError, match=r"z\.tar is no whole, uncompressed tar"):
        data.list_tiles(shards)


@pytest.mark.parametrize("given", ["gone", "gone.tar", "gone*.tar", "notes.txt", "c.tar.gz"])
def test_one_unfit_path_among_several_is_refused_by_name(tmp_path, shards, given):
    (tmp_path / "notes.txt").write_text("no tile")
    (tmp_path / "c.tar.gz").write_bytes(b"no shard")
    for others in (shards, tmp_path / "loose"):
        with pytest.raises(InputError, match=f"--data: .*{re.escape(given)}") as error:
            data.list_tiles([str(others), str(tmp_path / given)])
        assert "\n" not in str(error.value)


def test_compressed_and_missing_shards_end_in_one_line(tmp_path, shards):
    whole = (shards / "b.tar").read_bytes()
    for content in (gzip.compress(whole), bz2.compress(whole), b"no tar at all" * 99, b""):
        (shards / "b.tar").write_bytes(content)
        with pytest.raises(
            InputError, match=r"--data: .*/shards/b\.tar is no whole, uncompressed tar"
        ) as error:
            data.list_tiles(shards)
        assert "\n" not in str(error.value)
    with pytest.raises(
        InputError,
        match=r"--data: .*/shards/c\.tar is no folder of images and no uncompressed .tar",
    ):
        data.list_tiles(shards / "c.tar")


@pytest.mark.parametrize(
    "cut", ["in a tile", "in the last tile", "in a header", "between two members"]
)
def test_a_truncated_shard_ends_in_one_line(tmp_path, shards, cut):
    with tarfile.open(shards / "b.tar") as shard:
        members = [member for member in shard.getmembers() if member.name.endswith("png")]
    middle, last = members[3], members[-1]
    length = {
        "in a tile": middle.offset_data + 1000,
        "in the last tile": last.offset_data + last.size - 1,
    }
    length |= {"in a header": middle.offset + 100, "between two members": middle.offset}
    with open(shards / "b.tar", "r+b") as file:
        file.truncate(length[cut])
    with pytest.raises(InputError, match=r"--data: .*/shards/b\.tar is no whole, uncompressed tar"):
        data.list_tiles(shards)


def test_a_shard_damaged_in_its_middle_ends_in_one_line(shards):
    with tarfile.open(shards / "b.tar") as shard:
        middle = [member for member in shard.getmembers() if member.name.endswith("png")][3]
    with open(shards / "b.tar", "r+b") as file:
        file.seek(middle.offset)
        file.write(b"\xff" * 512)
    with pytest.raises(InputError, match=r"--data: .*/shards/b\.tar is no whole, uncompressed tar"):
        data.list_tiles(shards)


def test_a_corrupt_member_is_skipped_and_named(tmp_path, capsys):
    good = write_tiles(tmp_path, 1, (64, 64))[0].read_bytes()
    files = {f"{i:03d}.png": good for i in range(110)}
    write_shard(
        tmp_path / "shards" / "a.tar",
        files | {"broken one.png": good[:2000], "empty.png": b""},
        False,
    )
    write_shard(tmp_path / "shards" / "b.tar", files, False)
    dataset = FolderTiles(tmp_path / "shards", 64, 0)
    assert len(dataset.files) == 222
    images = samples(dataset, range(222), batch_size=32)
    assert images.flatten(1).float().std(1).min() > 1  # replaced, never the blank
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == len(dataset.unreadable) == 2
    for name in ("broken one.png", "empty.png"):
        assert (
            sum(f"/{name}'" in line and f"{tmp_path}/shards/a.tar/" in line for line in warnings)
            == 1
        )
    (tmp_path / "shards" / "b.tar").unlink()
    with pytest.raises(InputError, match="over 1 % of 112 tiles are unreadable: .*/a.tar/"):
        samples(FolderTiles(tmp_path / "shards", 64, 0), range(112))


def test_the_index_saves_the_reading_until_a_shard_changes(tmp_path, shards, monkeypatch):
    spare, index = tmp_path / "run", tmp_path / "shards.index"
    data.list_tiles(shards)
    assert not index.exists()  # without `spare`: evaluate.py writes nothing beside what it reads
    first = data.list_tiles(shards, spare=spare)
    assert index.exists() and not spare.exists() and first == data.list_tiles(shards)

    def kept():
        with monkeypatch.context() as patch:
            patch.setattr(tarfile, "open", unopened)
            return data.list_tiles(shards, spare=spare)

    assert kept() == first
    good = write_tiles(tmp_path / "loose", 1)[0].read_bytes()
    with tarfile.open(shards / "a.tar", "a") as shard:  # a member appended
        member = tarfile.TarInfo("appended.png")
        member.size = len(good)
        shard.addfile(member, io.BytesIO(good))
    settle()
    with pytest.raises(AssertionError, match="read again"):
        kept()
    assert len(data.list_tiles(shards, spare=spare)) == 13 and len(kept()) == 13
    write_shard(
        shards / "sub" / "c.tar", {"new.png": good}
    )  # a shard added in a new folder, then beside that one
    assert len(data.list_tiles(shards, spare=spare)) == 14
    write_shard(shards / "sub" / "d.tar", {"new.png": good})
    settle()
    assert len(data.list_tiles(shards, spare=spare)) == 15 and len(kept()) == 15
    (shards / "sub" / "c.tar").unlink()
    assert len(data.list_tiles(shards, spare=spare)) == 14
    shutil.copystat(
        shards / "a.tar", shards / "b.tar"
    )  # the same bytes with another time: read again, to be sure
    with pytest.raises(AssertionError, match="read again"):
        kept()
    data.list_tiles(shards, spare=spare)
    write_tiles(shards, 2)  # images now win
    assert data.list_tiles(shards, spare=spare) == ["tile_000.png", "tile_001.png"]


def test_shards_given_one_by_one_have_an_index_too(tmp_path, shards, monkeypatch):
    a, both = str(shards / "a.tar"), [str(shards / "a.tar"), str(shards / "b.tar")]
    assert len(data.list_tiles(a, spare=tmp_path / "run")) == 6
    assert len(data.list_tiles(both, spare=tmp_path / "run")) == 12  # not the index of a.tar alone
    monkeypatch.setattr(tarfile, "open", unopened)
    assert len(data.list_tiles(both, spare=tmp_path / "run")) == 12
    assert len(data.list_tiles(f"{shards}/*.tar", spare=tmp_path / "run")) == 12


DAMAGED = [
    "",
    "half",
    "null",
    "[]",
    '"text"',
    "{}",
    '{"roots": [], "stamps": {}, "tiles": []}',
    b"\xff\xfe\0",
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_index_is_made_anew(tmp_path, shards, content):
    index = tmp_path / "shards.index"
    first, good = data.list_tiles(shards, spare=tmp_path / "run"), index.read_bytes()
    index.write_bytes(
        good[: len(good) // 2]
        if content == "half"
        else content
        if isinstance(content, bytes)
        else content.encode()
    )
    assert data.list_tiles(shards, spare=tmp_path / "run") == first
    assert index.read_bytes() == good and not list(tmp_path.glob("*.tmp"))


def test_the_index_lies_in_the_run_folder_where_it_cannot_lie_beside_the_tiles(
    tmp_path, shards, monkeypatch
):
    monkeypatch.setattr(
        os, "access", lambda path, mode: (path, mode) != (str(tmp_path), os.W_OK)
    )  # root may write all
    first = data.list_tiles(shards, spare=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tiles.index"]
    assert not (tmp_path / "shards.index").exists() and not list(tmp_path.glob("*.tmp"))
    monkeypatch.setattr(tarfile, "open", unopened)
    assert data.list_tiles(shards, spare=tmp_path / "run") == first


@pytest.mark.parametrize("why", ["a folder in its place", "a read-only mount"])
def test_where_no_index_can_be_written_the_tiles_are_listed_all_the_same(tmp_path, shards, why):
    for index in (tmp_path / "shards.index", tmp_path / "run" / "tiles.index"):
        # on a read-only mount the temporary file can neither be opened nor unlinked (EROFS, even if it is not there)
        place = index if why == "a folder in its place" else Path(f"{index}.{os.getpid()}.tmp")
        place.mkdir(parents=True)
    assert len(data.list_tiles(shards, spare=tmp_path / "run")) == 12


def test_folders_of_images_and_of_shards_side_by_side(tmp_path, shards, capsys):
    loose = tmp_path / "loose"
    both = data.list_tiles([str(loose), str(shards)])
    assert len(both) == 24 and capsys.readouterr().err == ""
    assert samples(FolderTiles([str(shards), str(loose)], 64, 0), range(24)).shape == (
        24,
        3,
        64,
        64,
    )
    write_tiles(shards, 2)  # an archive beside its own unpacked tiles would count each twice
    assert len(data.list_tiles([str(loose), str(shards)])) == 14
    assert (
        capsys.readouterr().err
        == f"note: {shards} holds images, so its tar files (2) are left out\n"
    )
    assert (
        len(data.list_tiles([str(loose), str(shards), str(shards / "a.tar")])) == 20
    )  # named, so it is meant


def test_ten_thousand_tiles_in_a_folder_have_an_index(tmp_path, monkeypatch):
    for i in range(10):
        (tmp_path / "tiles" / str(i)).mkdir(parents=True)
        for j in range(1000 - (i == 0)):
            os.close(os.open(f"{tmp_path}/tiles/{i}/{j}.png", os.O_CREAT))
    index = tmp_path / "tiles.index"
    assert (
        len(data.list_tiles(tmp_path / "tiles", spare=tmp_path / "run")) == 9999
        and not index.exists()
    )
    for n in (10_000, 10_001):
        (tmp_path / "tiles" / "7" / f"new {n} é.png").touch()
        before = index.read_bytes() if index.exists() else b""
        settle()
        listed = data.list_tiles(tmp_path / "tiles", spare=tmp_path / "run")
        assert len(listed) == n and f"7/new {n} é.png" in listed and index.read_bytes() != before
        with monkeypatch.context() as patch:
            patch.setattr(os, "walk", unopened)
            assert data.list_tiles(tmp_path / "tiles", spare=tmp_path / "run") == listed
    (tmp_path / "tiles" / "3" / "5.png").unlink()
    assert len(data.list_tiles(tmp_path / "tiles", spare=tmp_path / "run")) == 10_000


def test_a_shard_that_comes_while_its_folder_is_listed_is_found_the_next_time(
    tmp_path, shards, monkeypatch
):
    def walk(*arguments, original=os.walk, **more):
        for found in original(*arguments, **more):
            shutil.copy(shards / "a.tar", shards / "late.tar")  # someone is still copying
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", walk)
        assert len(data.list_tiles(shards, spare=tmp_path / "run")) == 12
    assert len(data.list_tiles(shards, spare=tmp_path / "run")) == 18


# ---- hostile shards ------------------------------------------------------------------------------------------------
def block(name, content=b"", kind=tarfile.REGTYPE, size=None, form=tarfile.GNU_FORMAT, **changes):
    """A member of a shard as bytes: its header, which may lie about the size, and its content."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(form) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def write_blocks(path, *blocks):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(blocks) + bytes(1024))
    return path


def tree(folder):
    """What lies below a folder, links not followed: sizes, times and kinds."""
    found = sorted(
        os.path.join(top, name)
        for top, *both in os.walk(folder)
        for names in both
        for name in names
    )
    return {
        path: (os.lstat(path).st_size, os.lstat(path).st_mtime_ns, os.lstat(path).st_mode)
        for path in found
    }


def noise_tile(seed, size=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "png")


def listed_or_refused(shard, given=None):
    """The tiles of a shard, or None where it is refused in one line that names it; it may not hang."""
    try:
        with within(10, shard.name):
            return data.list_tiles(given or shard)
    except InputError as error:
        line = str(error)
        assert line.startswith("--data: ") and str(shard) in line and len(line.splitlines()) == 1, (
            line
        )
        return None


def around(cut):
    """Damage to a shard at the header of its fourth tile: (what is before it, what is after) -> what is written."""

    def damage(whole):
        place = whole.index(b"tile_009.png")
        return cut(whole[:place], whole[place:])

    return damage


UNFIT = {
    "no bytes": lambda whole: b"",
    "no members": lambda whole: bytes(10_240),
    "a block of zeros": lambda whole: bytes(512),
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "without its end": lambda whole: whole.rstrip(b"\0"),
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "a byte lost": lambda whole: whole[:700] + whole[701:],
    "a header zeroed": around(lambda before, rest: before + bytes(512) + rest[512:]),
    "a header and its tile zeroed": around(
        lambda before, rest: before + bytes(10_240) + rest[10_240:]
    ),
    "a bit flipped in a header": around(lambda before, rest: before + b"T" + rest[1:]),
    "two shards in one file": lambda whole: whole + whole,
    "text": lambda whole: b"no tar at all" * 999,
    "noise": lambda whole: np.random.default_rng(0).bytes(20_000),
}


@pytest.mark.parametrize("what", UNFIT)
def test_an_unfit_shard_is_refused_by_name_at_the_start(shards, what):
    unfit = shards / "b.tar"
    unfit.write_bytes(UNFIT[what](unfit.read_bytes()))
    for given in (unfit, [str(shards / "a.tar"), str(unfit)], shards):
        assert listed_or_refused(unfit, given) is None


def test_a_tile_zeroed_within_a_shard_is_unreadable_by_name(shards, capsys):
    whole = (shards / "b.tar").read_bytes()
    tile = next(tile for tile in data.list_tiles(shards / "b.tar") if tile.endswith("tile_009.png"))
    start = int(re.search(r"/(\d+)\+", tile)[1]) + 2000
    (shards / "b.tar").write_bytes(whole[:start] + bytes(3000) + whole[start + 3000 :])
    tiles = FolderTiles(shards, 64, 0)
    tiles.files += [tiles.files[0]] * 100
    samples(tiles, range(len(tiles.files)))
    assert (
        tiles.unreadable == [f"{shards}/b.tar/{tile.split('/', 1)[1]}"]
        and tile in capsys.readouterr().err
    )


LIES = [-512, -1024, -1536, -(10**6), -1, 0, 511, 10**9, 2**62, 2**80]


@pytest.mark.parametrize("size", LIES)
@pytest.mark.parametrize("place", ["header", "PAX"])
def test_a_member_that_lies_about_its_size_is_no_hang_and_no_other_tile(tmp_path, size, place):
    """tarfile goes back where a size is negative: in a circle, on Pythons that do not refuse it."""
    good = noise_tile(0, 40)  # 10 blocks
    lie = block("lie.png", good, size=size) if place == "header" else block("lie.png", good)
    if place == "PAX":
        record = f"{len(f'00 size={size}') + 1:02d} size={size}\n".encode()
        lie = block("pax", record, tarfile.XHDTYPE) + lie
    shard = write_blocks(tmp_path / "a.tar", block("a.png", good), lie, block("b.png", good))
    assert listed_or_refused(shard) is None


def test_a_member_a_little_longer_or_shorter_than_its_header_says(tmp_path):
    good, expected = noise_tile(0, 40), np.array(Image.open(io.BytesIO(noise_tile(0, 40))))
    sizes = {"short.png": len(good) - 200, "long.png": len(good) + 3, "right.png": len(good)}
    assert (
        len({-(-size // 512) for size in sizes.values()}) == 1
    )  # so the next header is found all the same
    shard = write_blocks(
        tmp_path / "a.tar", *(block(name, good, size=size) for name, size in sizes.items())
    )
    for tile in data.list_tiles(shard):
        opened = data.open_tile(tmp_path / tile)
        assert (
            opened is None
            if tile.endswith("short.png")
            else np.array_equal(np.array(opened), expected)
        ), tile


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_headers_of_headers_without_end_are_no_traceback(tmp_path, kind):
    """tarfile reads each inside the one before, to Python's limit of recursion."""
    more = block("more", b"x.png" if kind == tarfile.GNUTYPE_LONGNAME else b"14 path=x.png\n", kind)
    blocks = block("a.png", noise_tile(0)), *[more] * 3000, block("b.png", noise_tile(1))
    listed = listed_or_refused(write_blocks(tmp_path / "a.tar", *blocks))
    assert listed is None or names_of(listed) in (["a.png", "b.png"], ["a.png", "x.png"])


def test_absolute_names_and_those_that_climb_are_labels_alone(tmp_path):
    (tmp_path / "decoy.png").write_bytes(noise_tile(99))
    names = [
        str(tmp_path / "decoy.png"),
        "../decoy.png",
        "../../decoy.png",
        "x/../../../decoy.png",
        "//decoy.png",
    ]
    names += [
        "./decoy.png",
        "C:\\decoy.png",
        "\\\\host\\decoy.png",
        "~/decoy.png",
        "a.tar/../decoy.png",
        "line\nbreak.png",
    ]
    files = {name: noise_tile(i) for i, name in enumerate(names)}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        blocks = [block(name, content, form=form) for name, content in files.items()]
        shard = write_blocks(tmp_path / "deep" / "shards" / "a.tar", *blocks)
        before, tiles = tree(tmp_path), FolderTiles(shard, 16, 0)
        assert len(tiles.files) == len(names)
        expected = {np.array(Image.open(io.BytesIO(content))).sum() for content in files.values()}
        assert {int(image.sum()) for image in samples(tiles, range(len(names)), 2)} == expected
        assert (
            not tiles.unreadable and tree(tmp_path) == before
        )  # nothing is written, nothing else read


def test_links_devices_and_pipes_in_a_shard_are_left_out_with_one_note(tmp_path, capsys):
    kinds = {"SYM": "/etc/hostname", "LNK": "a.png", "CHR": "", "BLK": "", "FIFO": "", "DIR": ""}
    odd = [
        block(f"{kind}.png", kind=getattr(tarfile, f"{kind}TYPE"), linkname=to)
        for kind, to in kinds.items()
    ]
    odd.append(block("decoy.png", kind=tarfile.SYMTYPE, linkname=str(tmp_path / "decoy.png")))
    (tmp_path / "decoy.png").write_bytes(noise_tile(99))
    shard = write_blocks(
        tmp_path / "a.tar", block("a.png", noise_tile(0)), *odd, block("b.png", noise_tile(1))
    )
    plain, before = write_blocks(tmp_path / "b.tar", block("c.png", noise_tile(2))), tree(tmp_path)
    assert names_of(data.list_tiles([str(shard), str(plain)])) == ["a.png", "b.png", "c.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(shard) in lines[0] and re.search(r"\b6\b", lines[0]), (
        lines
    )  # without the folder
    samples(FolderTiles(shard, 16, 0), range(4))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "posix"])
def test_sparse_members_are_left_out_or_read_as_they_were(tmp_path, form):
    if not shutil.which("tar"):
        pytest.skip("needs GNU tar")
    bmp = encoded(Image.new("RGB", (400, 400)), "bmp")
    (tmp_path / "tiles").mkdir()
    with open(tmp_path / "tiles" / "holes.bmp", "wb") as file:  # black, but for its last row
        file.write(bmp[:54])
        file.seek(len(bmp) - 1200)
        file.write(bytes(range(240)) * 5)
    (tmp_path / "tiles" / "a.png").write_bytes(noise_tile(0))
    (tmp_path / "tiles" / "z.bmp").write_bytes(encoded(Image.new("RGB", (400, 400), "red"), "bmp"))
    command = [
        "tar",
        "--sparse",
        f"--format={form}",
        "-cf",
        "a.tar",
        "-C",
        "tiles",
        "a.png",
        "holes.bmp",
        "z.bmp",
    ]
    if subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("this tar does not write it")
    if (tmp_path / "a.tar").stat().st_size > 1.5 * len(bmp):
        pytest.skip("this file system keeps no holes")
    listed = {
        tile.rsplit("/", 1)[1]: data.open_tile(tmp_path / tile)
        for tile in data.list_tiles(tmp_path / "a.tar")
    }
    assert listed["a.png"] is not None and listed["z.bmp"].getpixel((5, 5)) == (255, 0, 0)
    holes = next((image for name, image in listed.items() if name.endswith("holes.bmp")), None)
    assert (
        holes is None or holes.tobytes() == Image.open(tmp_path / "tiles" / "holes.bmp").tobytes()
    )


@pytest.mark.filterwarnings("ignore")
def test_damaged_shards_are_listed_or_refused(tmp_path):
    rng, found = np.random.default_rng(0), collections.Counter()
    whole = write_shard(
        tmp_path / "whole.tar",
        {f"{i}.png": noise_tile(i) for i in range(3)},
        format=tarfile.GNU_FORMAT,
    )
    pax = {f"ü {'long' * 40} {i}.png": noise_tile(i) for i in range(3)}
    whole = [
        whole.read_bytes(),
        write_shard(tmp_path / "pax.tar", pax, format=tarfile.PAX_FORMAT).read_bytes(),
    ]
    before = tree(tmp_path)
    shard = tmp_path / "x.tar"
    for i in range(600):
        how = DAMAGE[i % (len(DAMAGE) - 1)]
        shard.write_bytes(damaged(whole[i % 2], how, rng))
        for tile in (listed := listed_or_refused(shard)) or []:
            with within(10, tile):
                data.open_tile(tmp_path / tile)
        found[listed is not None] += 1
        shard.unlink()
    assert tree(tmp_path) == before and min(found.values()) > 50, found


CHANGES = {
    "rewritten": lambda shard, other: shard.write_bytes(other),
    "replaced": lambda shard, other: (
        shard.with_name("x").write_bytes(other),
        os.replace(shard.with_name("x"), shard),
    ),
    "appended to": lambda shard, other: shard.write_bytes(shard.read_bytes() + bytes(10_240)),
    "truncated": lambda shard, other: os.truncate(shard, 700),
    "emptied": lambda shard, other: os.truncate(shard, 0),
    "deleted": lambda shard, other: shard.unlink(),
    "made a folder": lambda shard, other: (shard.unlink(), shard.mkdir()),
    "made a pipe": lambda shard, other: (shard.unlink(), os.mkfifo(shard)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_under_a_running_job_is_unreadable(tmp_path, capfd, change):
    """Three of its tiles among 400 are named; three among 100 are too many. With workers and without; with an index."""
    changing, run = tmp_path / "shards" / "a.tar", tmp_path / "run"
    run.mkdir()
    white = encoded(Image.new("RGB", (16, 16), "white"), "png")
    for n, workers in ((400, 0), (400, 2), (100, 0)):
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        (run / "unreadable.txt").unlink(missing_ok=True)
        size = len(noise_tile(0))
        write_shard(changing, {f"{i}.png": noise_tile(i) for i in range(3)}, False)
        write_shard(
            tmp_path / "shards" / "b.tar", {f"{i}.png": noise_tile(i) for i in range(3, n)}, False
        )
        other = write_shard(
            tmp_path / "other.tar", {f"{i}.png": white.ljust(size, b"\0") for i in range(3)}, False
        )
        settle()
        data.list_tiles(tmp_path / "shards", spare=run)  # so what follows comes from the index
        tiles = FolderTiles(tmp_path / "shards", 16, 0, run)
        loader = batches(tiles, range(2 * n), 8, workers)
        images = [next(loader)["image"]]
        CHANGES[change](changing, other.read_bytes())
        ending = (
            contextlib.nullcontext()
            if n == 400
            else pytest.raises(InputError, match=rf"over 1 % .*{changing}/")
        )
        with within(60, change), ending:
            images += [batch["image"] for batch in loader]
        assert all(
            image.float().mean() < 250 for image in torch.cat(images)
        )  # none of what is there now
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if "skipped unreadable tile" in line]
        assert (
            len(tiles.unreadable)
            == len(set(tiles.unreadable))
            == len(lines)
            == (3 if n == 400 else 2)
        ), err
        assert all(path.startswith(f"{changing}/") for path in tiles.unreadable)


# ---- workers that die ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["folder", "shard"])
@pytest.mark.parametrize(
    "pause", [0, 0.3]
)  # with a slow reader, batches of the dead worker are not yet fetched
def test_a_worker_that_dies_ends_in_one_line_that_names_its_tile(
    tmp_path, monkeypatch, source, pause
):
    content = {
        path.name: path.read_bytes() for path in write_tiles(tmp_path / "folder", 40, (32, 32))
    }
    write_shard(tmp_path / "shard" / "a.tar", content)
    deadly = content["tile_023.png"]

    def dies(file, *arguments, original=Image.open, **more):
        if file.read() == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        file.seek(0)
        return original(file, *arguments, **more)

    monkeypatch.setattr(Image, "open", dies)
    with within(60, "a dead worker"), pytest.raises(InputError) as error:
        for _ in batches(FolderTiles(tmp_path / source, 32, 0), range(40), 4, 2):
            time.sleep(pause)
    line = str(error.value)
    assert len(line.splitlines()) == 1 and "--workers" in line and "tile_023.png" in line, line
    assert len(re.findall(r"tile_\d", line)) == 1  # the other worker's is not to blame


LEFT = """
import sys, data
loader = data.batches(data.FolderTiles(sys.argv[1], 32, 0), range(10**6), 4, 2)
next(loader)
if sys.argv[2] == "failing":
    raise RuntimeError("something else")
"""


@pytest.mark.parametrize("how", ["failing", "ending"])
def test_a_script_that_ends_while_workers_wait_ends_at_once(tmp_path, how):
    """Workers ignore the signals with which Python ends them."""
    write_tiles(tmp_path, 8, (32, 32))
    command = [sys.executable, "-c", LEFT, str(tmp_path), how]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == (1 if how == "failing" else 0) and (
        "something else" in ended.stderr
    ) == (how == "failing")


def test_a_fault_in_a_worker_is_not_taken_for_a_dead_worker(tmp_path, monkeypatch):
    def faulty(*_):
        raise RuntimeError("a fault of ours, 1 of 2")

    write_tiles(tmp_path, 8, (32, 32))
    monkeypatch.setattr(data, "random_view", faulty)
    with pytest.raises(RuntimeError, match="a fault of ours") as fault:
        samples(FolderTiles(tmp_path, 32, 0), range(8), workers=2)
    for child in torch.multiprocessing.active_children():
        child.kill()  # for torch waits 10 s for each worker when garbage collection comes upon an iterator that failed
    del fault
    gc.collect()


@pytest.mark.parametrize("half", ["", '"/half a li'])
def test_unreadable_tiles_of_an_earlier_start_are_not_named_again(tmp_path, capsys, half):
    """half: what a full disk has left of the last line."""
    paths = [str(path) for path in write_tiles(tmp_path / "tiles", 300, (16, 16))[:3]]
    for path in paths:
        Path(path).write_bytes(b"broken")
    record = tmp_path / "run" / "unreadable.txt"
    record.parent.mkdir()
    record.write_text(json.dumps(paths[0]) + "\n" + json.dumps(paths[1]) + "\n" + half)
    for start in range(2):
        tiles = FolderTiles(tmp_path / "tiles", 16, 0, tmp_path / "run")
        samples(tiles, range(300), workers=2)
        named = capsys.readouterr().err
        assert [path in named for path in paths] == [False, False, start == 0]
        assert set(paths) <= set(tiles.unreadable) and len(tiles.unreadable) <= 4
    found = [
        line for line in record.read_text().splitlines() if line in list(map(json.dumps, paths))
    ]
    assert sorted(map(json.loads, found)) == paths  # each on a line of its own, once


# ---- labelled folders ----------------------------------------------------------------------------------------------
def as_pairs(root, kind="class"):
    """What labelled_files finds, unmixed: {split: [(file, class number or mask), ...] sorted}."""
    return {
        split: sorted(zip(files, targets[kind]))
        for split, (files, targets) in labelled_files(str(root)).items()
    }


def refused(root):
    """The one line with which a labelled folder is refused."""
    with pytest.raises(InputError) as error:
        labelled_files(str(root))
    line = str(error.value)
    assert line.startswith("--data: ") and "\n" not in line and str(root) in line
    return line


def test_class_folders(tmp_path):
    for split, classes in (("train", "cab"), ("test", "bc")):  # test lacks a class of train
        for name in classes:
            write_tiles(tmp_path / split / name / "patient", 2, (100, 70))
    found = as_pairs(tmp_path)
    tiles = {name: [f"{name}/patient/tile_{i:03d}.png" for i in range(2)] for name in "abc"}
    assert found["train"] == [
        (f"train/{file}", n) for n, name in enumerate("abc") for file in tiles[name]
    ]
    assert found["test"] == [
        (f"test/{file}", n) for n, name in ((1, "b"), (2, "c")) for file in tiles[name]
    ]
    files, targets = labelled_files(str(tmp_path))["train"]
    dataset = CentreTiles(tmp_path, 64, files, targets)
    assert len(dataset) == 6 and [dataset[k]["index"] for k in range(6)] == list(range(6))
    for k in range(6):  # every tile with the class of its own folder
        assert (
            "abc"[dataset[k]["class"]] == dataset.files[k].split("/")[1]
            and not dataset[k]["skipped"]
        )
        assert dataset[k]["image"].shape == (3, 64, 64)


def test_the_order_of_labelled_files_is_mixed_and_fixed(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            write_tiles(tmp_path / split / name, 20, (8, 8))
    first, second = labelled_files(str(tmp_path)), labelled_files(str(tmp_path))
    assert first == second
    classes = first["train"][1]["class"]
    assert sorted(classes) == [0] * 20 + [1] * 20 and classes != sorted(classes)


def test_nct_crc_he_as_it_is_unpacked(tmp_path):
    for folder, n in (("NCT-CRC-HE-100K", 3), ("CRC-VAL-HE-7K", 2)):
        for name in ("TUM", "ADI"):
            write_tiles(tmp_path / folder / name, n, (224, 224), suffix="tif")
    found = as_pairs(tmp_path)
    assert found["train"] == [
        (f"NCT-CRC-HE-100K/{name}/tile_{i:03d}.tif", n)
        for n, name in enumerate(("ADI", "TUM"))
        for i in range(3)
    ]
    assert [n for _, n in found["test"]] == [0, 0, 1, 1] and found["test"][0][
        0
    ] == "CRC-VAL-HE-7K/ADI/tile_000.tif"
    (tmp_path / "NCT-CRC-HE-100K").rename(tmp_path / "NCT-CRC-HE-100K-NONORM")
    assert as_pairs(tmp_path)["train"][0][0] == "NCT-CRC-HE-100K-NONORM/ADI/tile_000.tif"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig"]
)  # with the mark that spreadsheets put in front
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_labels_csv(tmp_path, encoding, end):
    rows = [
        "split,id,label,path",
        'train,1,tumour,"odd, names/a.png"',
        "train,2,stroma,b.png",
        "val,3,mucus,c.png",
    ]
    rows += [
        'test,4,"tumour","odd, names/é.png"',
        "test,5,stroma,b.png",
        ",6,tumour,d.png",
        "train,7,tumour,gone.png",
    ]
    (tmp_path / "labels.csv").write_bytes(end.join([*rows, ""]).encode(encoding))
    found = as_pairs(tmp_path)
    assert found["train"] == [
        ("b.png", 0),
        ("gone.png", 1),
        ("odd, names/a.png", 1),
    ]  # mucus is of val alone
    assert found["test"] == [("b.png", 0), ("odd, names/é.png", 1)]
    write_tiles(tmp_path, 1)[0].rename(tmp_path / "b.png")
    files, targets = labelled_files(str(tmp_path))["train"]
    dataset = CentreTiles(tmp_path, 64, files, targets)
    missing = {dataset.files[k]: dataset[k]["skipped"] for k in range(3)}
    assert missing == {name: str(tmp_path / name) for name in ("gone.png", "odd, names/a.png")} | {
        "b.png": ""
    }


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("", "has no tiles for train; a labelled folder holds"),
        ("path,label,split\n", "has no tiles for train; a labelled folder holds"),
        ("path,label\na.png,x\n", "has no tiles for train; a labelled folder holds"),
        ("path;label;split\na.png;x;train\n", "has no tiles for train; a labelled folder holds"),
        ("path,label,split\na.png,x,train\n", "no tiles for test"),
        ("path,label,split\na.png,x,test\n", "no tiles for train"),
        ("path,label,split\na.png,x,val\n", "no tiles for train"),
        (
            "path,label,split\na.png,x,train\nb.png,y,test\n",
            "b.png is in none of the classes of train",
        ),
        ("path,label,split\na.png,,train\nb.png,x,test\nc.png,x,train\n", "a.png"),
        ("path,label,split\na.png,x,train\nb.png\nc.png,y,test\n", "c.png"),
    ],
)
def test_unfit_labels_csv_is_refused_in_one_line(tmp_path, table, expected):
    (tmp_path / "labels.csv").write_text(table)
    assert expected in refused(tmp_path)


def test_a_quote_that_labels_csv_never_closes_is_refused_in_one_line(tmp_path):
    """The rest of the file becomes one field, longer than Python's csv takes."""
    (tmp_path / "labels.csv").write_text(
        'path,label,split\na.png,"x,train\n' + "b.png,x,test\n" * 12_000
    )
    assert "labels.csv" in refused(tmp_path)


def test_unfit_class_folders_are_refused_in_one_line(tmp_path):
    write_tiles(tmp_path / "train" / "a", 2)
    line = refused(tmp_path)
    assert f"{tmp_path} has no tiles for test" in line and "labels.csv" in line and "masks" in line
    (tmp_path / "test").mkdir()
    assert f"{tmp_path / 'test'} holds no images (png, jpg, tif, bmp, webp)" in refused(tmp_path)
    write_tiles(tmp_path / "test" / "b", 1)
    assert "test/b/tile_000.png is in none of the classes of train" in refused(tmp_path)
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "a")
    assert len(as_pairs(tmp_path)["test"]) == 1
    write_tiles(tmp_path / "train", 1)
    assert "train/tile_000.png is in none of the classes" in refused(tmp_path)
    assert "nowhere" in refused(tmp_path / "nowhere")


# ---- masks ---------------------------------------------------------------------------------------------------------
def write_masks(root, n, size=(64, 64), first=0):
    """Tiles of noise, each with a mask filled with its own number."""
    (root / "masks").mkdir(parents=True)
    for i, path in enumerate(write_tiles(root / "images", n, size)):
        Image.new("L", size, first + i).save(root / "masks" / path.name)


def test_masks_at_the_top_leave_the_last_fifth_for_testing(tmp_path):
    write_masks(tmp_path, 11)
    found = labelled_files(str(tmp_path))
    assert {split: len(files) for split, (files, _) in found.items()} == {"train": 9, "test": 2}
    names = sorted(file.rsplit("/", 1)[1] for file in found["test"][0])
    assert names == ["tile_009.png", "tile_010.png"]
    for files, targets in found.values():
        dataset = CentreTiles(tmp_path, 64, files, targets)
        for k in range(len(dataset)):
            number = int(files[k][-7:-4])
            assert (dataset[k]["mask"] == number).all() and dataset[k]["mask"].shape == (64, 64)
            assert not dataset[k]["skipped"]


def test_masks_below_train_and_test_and_of_another_suffix(tmp_path):
    for split, first in (("train", 0), ("test", 100)):
        write_masks(tmp_path / split, 3, first=first)
        for path in (
            tmp_path / split / "images"
        ).iterdir():  # as often: JPEG tiles, PNG masks, a folder a slide
            (path.parent / "slide").mkdir(exist_ok=True)
            Image.open(path).save(path.parent / "slide" / f"{path.stem}.jpg")
            path.unlink()
        for path in list((tmp_path / split / "masks").iterdir()):
            (path.parent / "slide").mkdir(exist_ok=True)
            path.rename(path.parent / "slide" / path.name)
    for split, first in (("train", 0), ("test", 100)):
        files, targets = labelled_files(str(tmp_path))[split]
        dataset = CentreTiles(tmp_path, 64, files, targets)
        assert len(dataset) == 3
        for k in range(3):
            assert (dataset[k]["mask"] == first + int(files[k][-7:-4])).all() and not dataset[k][
                "skipped"
            ]


@pytest.mark.parametrize("gap", ["images", "masks", "test"])
def test_unfit_mask_folders_are_refused_in_one_line(tmp_path, gap):
    write_masks(tmp_path / "train", 3)
    if gap != "test":
        write_masks(tmp_path / "test", 3)
        for path in (tmp_path / "test" / gap).iterdir():
            path.unlink()
    assert str(tmp_path) in refused(tmp_path)


def test_one_tile_cannot_be_both_trained_and_tested_on(tmp_path):
    write_masks(tmp_path, 1)
    assert "no tiles for train" in refused(tmp_path)


def mask_item(root, tile, mask, size=64):
    return CentreTiles(root, size, [tile], {"mask": [mask]})[0]


def numbers(size=(64, 64)):
    """Class numbers 0, 1, 2 in blocks, none of them symmetrical."""
    y, x = np.mgrid[: size[1], : size[0]]
    return ((y // 8 + 2 * (x // 16)) % 3).astype(np.uint8)


def test_kinds_of_masks(tmp_path):
    write_tiles(tmp_path, 1, (64, 64))
    values = numbers()
    palette = Image.fromarray(values).convert("P")
    palette = Image.fromarray(values, "L")
    palette.putpalette(
        [200, 10, 10, 10, 200, 10, 10, 10, 200]
    )  # mode P: colours on screen, numbers in the file
    binary = Image.fromarray(values * 100).convert("L").point(lambda v: 255 * (v > 50))
    kinds = {
        "grey.png": (Image.fromarray(values), values),
        "grey.tif": (Image.fromarray(values), values),
        "grey.bmp": (Image.fromarray(values), values),
        "palette.png": (palette, values),
        "one_bit.png": (binary.convert("1"), values > 0),
        "one_bit.tif": (binary.convert("1"), values > 0),
        "0_255.png": (binary, 255 * (values > 0)),
        "grey_rgb.png": (Image.fromarray(values).convert("RGB"), values),
        "grey_rgba.png": (Image.fromarray(values).convert("RGBA"), values),
        "16_bit.png": (Image.fromarray(values.astype(np.uint16)), values),
        "jpeg.jpg": (binary, values > 0),
        "jpeg_rgb.jpg": (binary.convert("RGB"), values > 0),
    }
    assert palette.mode == "P" and kinds["one_bit.png"][0].mode == "1"
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / name, **({"quality": 60} if "jpeg" in name else {}))
        item = mask_item(tmp_path, "tile_000.png", name)
        assert item["skipped"] == "", name
        assert np.array_equal(item["mask"].numpy(), expected.astype(np.uint8)), name


def test_unfit_masks_are_skipped_by_name(tmp_path):
    write_tiles(tmp_path, 1, (64, 64))
    values = numbers()
    Image.fromarray(np.stack([values * 50, values, values], -1)).save(tmp_path / "coloured.png")
    Image.fromarray(values.astype(np.uint16) * 300).save(tmp_path / "16_bit.png")
    Image.fromarray(numbers((64, 80))).save(tmp_path / "higher.png")
    Image.fromarray(numbers((128, 128))).save(tmp_path / "twice.png")
    (tmp_path / "text.png").write_text("no mask")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("coloured", "16_bit", "higher", "twice", "text", "empty", "missing"):
        item = mask_item(tmp_path, "tile_000.png", f"{name}.png")
        assert item["skipped"] == str(tmp_path / f"{name}.png")
        assert item["mask"].shape == (64, 64) and item["image"].shape == (
            3,
            64,
            64,
        )  # so that a batch can be stacked
    Image.fromarray(values).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    assert mask_item(tmp_path, "broken.png", "good.png")["skipped"] == str(tmp_path / "broken.png")
    with pytest.raises(InputError, match="over 1 % of 1 tiles are unreadable: .*coloured.png"):
        list(
            batches(
                CentreTiles(tmp_path, 64, ["tile_000.png"], {"mask": ["coloured.png"]}), range(1), 1
            )
        )


def test_a_mask_without_a_name_of_its_own_is_skipped_by_name(tmp_path):
    write_masks(tmp_path, 10)
    (tmp_path / "masks" / "tile_004.png").unlink()
    files, targets = labelled_files(str(tmp_path))["train"]
    dataset = CentreTiles(tmp_path, 64, files, targets)
    skipped = [dataset[k]["skipped"] for k in range(len(dataset)) if dataset[k]["skipped"]]
    assert len(skipped) == 1 and skipped[0].endswith("masks/tile_004.png")


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 90), (81, 64)])
def test_a_mask_is_cut_exactly_as_its_tile(tmp_path, size):
    """Where nothing has to be resized: a tile whose pixels are its mask."""
    values = np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(values).convert("RGB").save(tmp_path / "tile.png")
    Image.fromarray(values).save(tmp_path / "mask.png")
    item = mask_item(tmp_path, "tile.png", "mask.png")
    assert item["mask"].dtype == torch.uint8 and item["mask"].shape == (64, 64)
    assert all(torch.equal(item["mask"], channel) for channel in item["image"])
    assert item["mask"].unique().numel() > 200


@pytest.mark.parametrize("size", [(256, 128), (200, 320), (48, 30), (97, 71)])
def test_a_resized_mask_stays_under_its_tile(tmp_path, size):
    """Light where the mask is 7, dark where it is 2: the same edges, to the pixel that a resize may blur."""
    y, x = (np.mgrid[: size[1], : size[0]] - np.array(size[::-1])[:, None, None] / 2) / min(
        size
    )  # 0 at the centre
    values = np.where(np.hypot(x + 0.2, y - 0.05) < 0.35, 7, 2).astype(np.uint8)
    Image.fromarray((values > 4).astype(np.uint8) * 255).convert("RGB").save(tmp_path / "tile.png")
    Image.fromarray(values).save(tmp_path / "mask.png")
    item = mask_item(tmp_path, "tile.png", "mask.png")
    assert item["mask"].unique().tolist() == [2, 7]  # class numbers are never mixed
    light, labelled = item["image"][0] > 127, item["mask"] == 7
    assert 0.1 < labelled.float().mean() < 0.9
    assert (light != labelled).float().mean() < 0.02
    for shift in ((0, 2), (2, 0), (0, -2), (-2, 0)):
        assert (light.roll(shift, (0, 1)) != labelled).float().mean() > 0.02


# ---- synthetic tissue ----------------------------------------------------------------------------------------------
PINNED = {  # sha256 of the pixels, of the tiles as they were before nuclei were given out; with its cells and tissue
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
    """Else offline teachers, caches and results of before would silently mean other tiles: raise TISSUE_VERSION."""
    image, cells, tissue, _ = draw_tissue(*key)
    assert (cells, tissue) == PINNED[key][1:]
    assert hashlib.sha256(image.tobytes()).hexdigest() == PINNED[key][0]


@pytest.mark.parametrize("size", [64, 128])
def test_nuclei_are_where_the_tile_is_dark(size):
    """Haematoxylin takes red light: in every tile nuclei are darker in red than the rest, and never fill it."""
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
    # a nucleus is a piece, not pixels strewn about: a neighbour of a nuclear pixel mostly is one too
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
