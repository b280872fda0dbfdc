"""Tiles, where all begins: synthetic tissue, folders and tar shards of images, and the order in which a run sees them.

    tile k of a run = view(seed, k, source[order(seed, k)])    one crop, flip and turn, for student.py and teachers.py
So a resume needs k alone, workers change nothing, rank r of W takes k = r, r + W, ...; images: uint8 (3, H, W)."""

import atexit
import contextlib
import csv
import glob
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawTextHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import functional as TF

from student import InputError

LARGEST = 2**28  # bytes of a tile's file, and of its pixels: Pillow's own limit for them
IMAGE = re.compile(
    r"(?is)(.*/)?[^./][^/]*\.(bmp|jpe?g|png|tiff?|webp)"
)  # not hidden, as macOS's "._x.png" are
reading = [
    torch.multiprocessing.RawArray("c", 4096)
]  # "PID TILE", of the tile being read; loader workers share it
atexit.register(
    lambda: [x.kill() for x in torch.multiprocessing.active_children() if x.daemon]
)  # SIGTERM is not heard

TISSUE_VERSION = 1  # raise it when a tile changes: the offline teachers are then trained anew
STREAMS = (
    "teacher",
    "distil",
    "bank",
    "test",
)  # keyed (stream, seed, k), so that nothing leaks from one into another
CELLS = {  # nuclei: radius (px of a 64 px tile), its spread, elongation, density, pale centre, nucleolus, mean number
    "lymphocyte": (2.1, 0.08, 1.1, 1.6, 0.0, 0.0, 30), "epithelial": (3.8, 0.10, 1.3, 0.9, 0.0, 0.0, 16),
    "pleomorphic": (4.2, 0.35, 1.6, 1.5, 0.0, 0.0, 14), "spindle": (2.7, 0.10, 4.0, 1.0, 0.0, 0.0, 16),
    "vesicular": (4.4, 0.10, 1.2, 1.0, 0.85, 0.0, 14), "nucleolar": (4.4, 0.10, 1.2, 0.5, 0.0, 2.2, 14)}  # fmt: skip
TISSUES = (
    "gland",
    "sheet",
    "fibres",
    "fat",
    "cribriform",
    "whorl",
)  # independent of the cells; a teacher knows one
HOLES = {
    "gland": (9, 14, 1),
    "fat": (8, 13, 5),
    "cribriform": (3.5, 5.5, 9),
}  # smallest and largest radius, number


def smooth_noise(
    rng: np.random.Generator, size: int, cells: int
) -> np.ndarray:  # (size, size), in [0, 1]
    coarse = rng.random((cells + 1, cells + 1), dtype=np.float32)  # enlarged bilinearly
    t = np.arange(size, dtype=np.float32) * (cells / size)
    i, f = t.astype(int), t % 1
    rows = coarse[i] * (1 - f)[:, None] + coarse[i + 1] * f[:, None]
    return rows[:, i] * (1 - f) + rows[:, i + 1] * f


def draw_tissue(
    stream: str, seed: int, k: int, size: int = 64
) -> tuple[np.ndarray, int, int, np.ndarray]:
    """Tile k -> RGB uint8 (size, size, 3), places of its cells and tissue in CELLS and TISSUES, nuclei (size, size)."""
    rng = np.random.default_rng((STREAMS.index(stream), seed, k))
    cell, tissue = int(rng.integers(len(CELLS))), int(rng.integers(len(TISSUES)))
    name, (radius, spread, elongation, density, pale, nucleolus, count) = (
        TISSUES[tissue],
        list(CELLS.values())[cell],
    )
    y, x = np.mgrid[:size, :size].astype(np.float32) * (64 / size)  # coordinates of a 64 px tile
    normal = partial(rng.standard_normal, dtype=np.float32)
    angle, warp = rng.uniform(0, math.pi), 10 * (smooth_noise(rng, size, 3) - 0.5)
    centre_x, centre_y = rng.uniform(18, 46, 2).tolist()
    eosin = 0.35 + 0.35 * smooth_noise(
        rng, size, 8
    )  # a texture; with waves for fibres and whorls, none in the holes
    if name == "fibres":
        across = x * math.cos(angle) + y * math.sin(angle) + warp
        eosin += 0.35 * np.sin(across * rng.uniform(0.5, 0.7) + rng.uniform(0, 6))
    if name == "whorl":
        eosin += 0.4 * np.cos(
            (np.hypot(x - centre_x, y - centre_y) + 0.5 * warp) * rng.uniform(0.3, 0.4)
        )
    holes = np.zeros((size, size), np.float32)  # 1 inside a lumen or vacuole
    if name in HOLES:
        centres = (
            ([centre_x], [centre_y])
            if name == "gland"
            else rng.uniform(0, 64, (2, HOLES[name][2])).tolist()
        )
        hole_r = rng.uniform(*HOLES[name]).tolist()
        edge = np.min(
            [np.hypot(x - a, y - b) / r for a, b, r in zip(*centres, hole_r)], axis=0
        )  # 1 at a rim
        holes = 1 / (1 + np.exp(np.clip((edge + warp / 40 - 1) * 16, -30, 30)))
    n = max(
        4, rng.poisson(count)
    )  # nuclei: outside the holes, round the lumen of a gland; ellipses (n, size, size)
    nx, ny = rng.uniform(0, 64, (2, 3 * n)).astype(np.float32)
    order = np.flatnonzero(
        free := holes[(ny * size / 64).astype(int), (nx * size / 64).astype(int)] < 0.3
    )[:n]
    if name == "gland":
        off_ring = np.abs(np.hypot(nx - centre_x, ny - centre_y) / hole_r[0] - 1.45) + rng.uniform(
            0, 0.8, 3 * n
        )
        order = np.argsort(np.where(free, off_ring, 9), kind="stable")[:n]
    shape = (len(order), 1, 1)
    r, e = (
        radius * np.exp(spread * normal(shape)),
        np.sqrt(elongation * np.exp(0.15 * normal(shape))),
    )
    a, dx, dy = angle + 0.5 * normal(shape), x - nx[order, None, None], y - ny[order, None, None]
    d = np.hypot(
        (np.cos(a) * dx + np.sin(a) * dy) / (r * e), (np.cos(a) * dy - np.sin(a) * dx) / (r / e)
    )  # 1: rim
    body = np.clip((1 - d) * 3 + 0.5, 0, 1)
    chromatin = 1 - pale * np.clip(1.4 - 1.8 * d, 0, 1) + nucleolus * np.clip(2 - 5 * d, 0, 1)
    haematoxylin = (body * chromatin * (density * np.exp(0.12 * normal(shape)))).max(0)
    haematoxylin = haematoxylin * (0.85 + 0.3 * smooth_noise(rng, size, 16)) + 0.08 * (1 - holes)
    eosin = eosin * (1 - holes) * (1 - 0.5 * body.max(0))
    # Beer-Lambert: stain vectors (H, E of Ruifrok & Johnston 2001), strengths and light vary as from slide to slide.
    stains = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]], np.float32) * np.exp(
        0.10 * normal((2, 3))
    )
    stains *= np.exp(0.2 * normal((2, 1))) / np.linalg.norm(stains, axis=1, keepdims=True)
    rgb = np.exp(-np.stack([haematoxylin, eosin], -1) @ stains) * rng.uniform(
        0.92, 1
    ) + 0.02 * normal((size, size, 3))
    return (
        (np.clip(rgb, 0, 1) * 255).astype(np.uint8),
        cell,
        tissue,
        (d.min(0) < 1).astype(np.uint8),
    )


class TissueTiles(
    Dataset
):  # tile k of a stream -> {"image": uint8 (3, size, size), "index": k, cells, tissue, nuclei}
    def __init__(self, stream: str, seed: int, size: int = 64):
        self.stream, self.seed, self.size = stream, seed, size

    def __getitem__(self, k: int) -> dict:
        image, cells, tissue, nuclei = draw_tissue(self.stream, self.seed, k, self.size)
        image = torch.from_numpy(image).permute(2, 0, 1)
        return {
            "image": image,
            "index": k,
            "cells": cells,
            "tissue": tissue,
            "nuclei": torch.from_numpy(nuclei),
        }

    def draw(
        self, n: int
    ) -> dict[str, torch.Tensor]:  # the first n tiles, on all cores, n in front of their shapes
        drawn = [
            *batches(
                self,
                range(n),
                64,
                min(8, os.cpu_count() or 1) * (n > 256),
                label=f"drawing {n} tiles",
            )
        ]
        return {key: torch.cat([batch[key] for batch in drawn]) for key in drawn[0]}


@lru_cache(maxsize=2)  # a batch can straddle two epochs
def epoch_order(
    seed: int, epoch: int, n: int
) -> np.ndarray:  # sample k is tile epoch_order(seed, k // n, n)[k % n]
    return np.random.default_rng((0, seed, epoch)).permutation(n)


def collate(samples: list[dict]) -> dict:
    """A batch whose images stay rows of pixels, as Pillow has them, in a view (B, 3, H, W): no pixel is moved again."""
    images = torch.stack([sample["image"].permute(1, 2, 0) for sample in samples]).permute(
        0, 3, 1, 2
    )
    return {
        "image": images,
        **default_collate([{k: x[k] for k in x if k != "image"} for x in samples]),
    }


def progress(
    items: Iterable, label: str, total: int
) -> Iterator:  # of items; every 5 s process 0 prints how far it is
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if ((now := time.monotonic()) - last > 5 or done == total) and os.environ.get(
            "RANK", "0"
        ) == "0":
            last, eta = now, (now - start) / done * (total - done)
            print(f"  {label}: {done}/{total}, {now - start:.0f} s, ETA {eta:.0f} s", flush=True)


def start_worker(
    shared: list, worker: int
) -> None:  # of a loader: says what it reads, and leaves signals to us
    reading[0] = shared[worker]
    reading[0].value = b"%d none yet" % os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(
    tiles: Dataset, ks: Sequence[int], batch_size: int, workers=0, pin=False, label=""
) -> Iterator[dict]:
    """Samples `ks` in batches, with progress if labelled; sample k depends on k alone, never on workers. Unreadable
    tiles are named once, kept in tiles.unreadable and a run's file, .record. InputError: over 1 %; a worker died."""
    shared = [torch.multiprocessing.RawArray("c", 4096) for _ in range(workers)]
    own = {
        "worker_init_fn": partial(start_worker, shared),
        "generator": torch.Generator(),
    }  # not the global generator
    loader = DataLoader(
        tiles,
        batch_size,
        sampler=ks,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        **own,
    )
    tiles, read = getattr(tiles, "tiles", tiles), iter(loader)  # those that are read
    if workers and hasattr(
        signal, "SIGCHLD"
    ):  # torch would raise anywhere; so the loader itself finds a dead worker
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for batch in progress(read, label, len(loader)) if label else read:
            for path in (
                x
                for x in "\0".join(batch.pop("skipped", [])).split("\0")
                if x and x not in tiles.unreadable
            ):
                note_unreadable(tiles, path, getattr(tiles, "record", None) or Path(os.devnull))
            if "index" in batch:  # of tiles for evaluation: unreadable ones are left out
                batch = {key: values[batch["index"] >= 0] for key, values in batch.items()}
            yield batch
    except (
        EOFError,
        OSError,
        RuntimeError,
    ):  # torch has many for a worker that died, and others raise them too
        time.sleep(workers and 0.5)  # it may be dying still
        last = dict(os.fsdecode(x.value).split(" ", 1) for x in shared if x.value)  # {PID: TILE}
        if dead := [
            last[pid]
            for pid in last.keys() - {str(x.pid) for x in torch.multiprocessing.active_children()}
        ]:
            raise InputError(
                f"--workers: one died (out of memory? then lower it), at {', '.join(dead)}"
            ) from None
        raise
    finally:
        del read, loader  # the workers end now, and not when the traceback of an error is forgotten


def note_unreadable(
    tiles: Dataset, path: str, record: Path
) -> None:  # names it once; InputError: over 1 %
    tiles.unreadable.append(path)
    text, line = record.read_text() if record.exists() else "", json.dumps(path)
    known = {
        *re.findall(r'(?m)^".*"$', text),
        *map(json.dumps, tiles.unreadable),
    }  # by all processes, and before
    if line not in text.splitlines():
        print(f"warning: skipped unreadable tile {path!r} ({len(known)} so far)", file=sys.stderr)
        with open(record, "a") as file:
            file.write(
                "\n" * (text[-1:] not in "\n") + line + "\n"
            )  # a full disk can have left half a line
    if len(known) > len(tiles.files) / 100:
        some = f"{tiles.unreadable[:3]}; mend or remove them (did a shard change? a mask: one channel, its tile's size)"
        raise InputError(
            f"{tiles.root}: over 1 % of {len(tiles.files)} tiles are unreadable: {some}"
        )


def top_and_roots(given: str | Path | list[str]) -> tuple[str, list[str]]:
    """Folders and shards that --data names, patterns expanded, and the folder around them: tiles' paths begin there."""
    texts = given if isinstance(given, list) else [str(given)]
    roots = sorted(
        {
            os.path.abspath(y)
            for x in texts
            for y in ([x] if os.path.exists(x) else glob.glob(x) or [x])
        }
    )
    return os.path.commonpath(
        [root if os.path.isdir(root) else os.path.dirname(root) for root in roots]
    ), roots


def stamp(path: str) -> list:  # bytes and time of a file or folder, from which a change is told
    return [os.path.getsize(path), os.path.getmtime(path)]


def list_tiles(
    given: str | Path | list, flag="--data", spare: Path | None = None, stamps: dict | None = None
) -> list:
    """Sorted relative paths of all images below a folder or, if none, in shards, as SHARD.tar/OFFSET+SIZE/NAME. With
    `spare`, that of shards or of 10,000 tiles is kept, as FOLDER.index or there. Fills {folder or shard: `stamp`}."""
    (top, roots), stamps, began = (
        top_and_roots(given),
        {} if stamps is None else stamps,
        time.time(),
    )
    place = (
        Path(f"{top}.index")
        if os.access(os.path.dirname(top), os.W_OK)
        else Path(spare or "", "tiles.index")
    )
    with contextlib.suppress(
        OSError, ValueError, TypeError, KeyError
    ):  # there is none, or something else
        index = json.loads(place.read_text())
        if index["roots"] == roots and all(stamp(x) == then for x, then in index["stamps"].items()):
            stamps.update(index["stamps"])
            return index["tiles"]
    tiles, shards = (
        set(),
        {root for root in roots if root.endswith(".tar") and os.path.isfile(root)},
    )
    if unfit := [root for root in roots if root not in shards and not os.path.isdir(root)]:
        raise InputError(
            f"{flag}: {unfit[0]} is no folder of images and no uncompressed .tar, or does not exist"
        )
    for root in roots:
        files = []
        for folder, _, names in os.walk(
            root, followlinks=True
        ):  # labelled folders are often made of links
            if (
                real := os.path.realpath(folder)
            ) not in stamps:  # a circle of links, or a folder linked twice
                stamps[real] = stamp(real)
                files += [os.path.join(folder, name) for name in names]
        images, tars = (
            set(filter(IMAGE.fullmatch, files)),
            {file for file in files if file.endswith(".tar")},
        )
        if images and tars:
            print(
                f"note: {root} holds images, so its tar files ({len(tars)}) are left out",
                file=sys.stderr,
            )
        tiles, shards = tiles | images, shards if images else shards | tars
    for path in sorted(shards):
        try:
            stamps[path], others = stamp(path), 0
            with tarfile.open(
                path if os.path.isfile(path) else os.devnull, "r:"
            ) as shard:  # not compressed; no pipe
                while (
                    member := shard.next()
                ) and member.size >= 0:  # below, tarfile would go round in circles
                    shard.members.clear()  # a million would take a gigabyte
                    if member.isreg() and not member.sparse and IMAGE.fullmatch(member.name):
                        tiles.add(f"{path}/{member.offset_data}+{member.size}/{member.name}")
                    others += not (member.isreg() or member.isdir()) or bool(member.sparse)
                shard.fileobj.seek(shard.offset)
                rest = shard.fileobj.read(2**20)
                if (
                    not shard.offset or len(rest) < 512 or rest.strip(b"\0")
                ):  # tarfile takes a bad header for the end
                    raise tarfile.TarError("empty, cut off or damaged")
        except (OSError, OverflowError, RecursionError, ValueError, tarfile.TarError) as error:
            raise InputError(
                f"{flag}: {path} is no whole, uncompressed tar ({error}); mend or remove it"
            ) from None
        if others:
            print(
                f"note: {path}: {others} links, devices or sparse files are left out",
                file=sys.stderr,
            )
    if not tiles:
        raise InputError(
            f"{flag}: {roots[0]} holds no images (png, jpg, tif, bmp, webp) and no tar shards of them"
        )
    tiles = sorted(tile.removeprefix(top).lstrip(os.sep).replace(os.sep, "/") for tile in tiles)
    if (
        spare
        and (shards or len(tiles) >= 10_000)
        and max(x[1] for x in stamps.values()) < began - 0.02
    ):  # none is new
        with contextlib.suppress(InputError):  # the next run takes as long, that is all
            save_atomically(
                json.dumps({"roots": roots, "stamps": stamps, "tiles": tiles}).encode(), place
            )
    return tiles


def read_tile(path: str | Path, stamps: dict | None = None) -> bytes:
    """A file or the part SHARD.tar/OFFSET+SIZE/NAME. OSError: no file (a pipe never ends), too large, changed stamp."""
    place = re.fullmatch(r"(.+?\.tar)/(\d+)\+(\d+)/.+", str(path), re.DOTALL)
    file, start, size = (
        (place[1], int(place[2]), int(place[3])) if place else (path, 0, os.path.getsize(path))
    )
    reading[0].value = os.fsencode(f"{os.getpid()} {path}")[:4095]
    if (
        not os.path.isfile(file)
        or size > LARGEST
        or (place and stamps and stamp(file) != stamps.get(file))
    ):
        raise OSError(f"{file} is no file, is too large, or has changed")
    with open(file, "rb") as content:
        content.seek(start)
        return content.read(size)


def open_tile(
    path: str | Path, mask: bool = False, stamps: dict | None = None
) -> Image.Image | None:
    """An image file as Pillow's RGB, upright after its EXIF tag; a mask as class numbers, mode L; None: unreadable."""
    try:
        with Image.open(io.BytesIO(read_tile(path, stamps))) as image:
            bomb = 3 * math.prod(image.size) > LARGEST or max(image.size) > 1000 * min(
                image.size
            )  # once enlarged
            if bomb or (
                image.mode[0] in "IF" and not 1 < image.getextrema()[1] < 256
            ):  # 16 bits, float: Pillow clips
                return None
            if not mask:
                ImageOps.exif_transpose(image, in_place=True)
                return image if image.mode == "RGB" else image.convert("RGB")
            numbers = (
                np.array(image.convert("L")) > 127 if image.format == "JPEG" else np.array(image)
            )  # JPEG blurs
        if numbers.ndim == 3 and (numbers[..., :1] == numbers[..., :3]).all():  # grey, saved as RGB
            numbers = numbers[..., 0]
        return (
            Image.fromarray(numbers.astype(np.uint8))
            if numbers.ndim == 2 and numbers.dtype.kind in "bu"
            else None
        )
    except Exception:  # noqa: BLE001 - Pillow raises a dozen types on broken files, and all mean the same here
        return None


def random_view(image: Image.Image, size: int, rng: np.random.Generator) -> torch.Tensor:
    """A random crop (3, size, size) at native scale, flipped and turned by quarters; a smaller tile is enlarged."""
    if min(image.size) < size:
        image = TF.resize(image, size, TF.InterpolationMode.BICUBIC)
    left, top = (int(rng.integers(length - size + 1)) for length in image.size)
    view = image.crop((left, top, left + size, top + size))
    turn = ((None, 0), (2, 6), (3, 1), (4, 5))[rng.integers(4)][
        rng.integers(2)
    ]  # PIL's: by quarters, then flipped
    return torch.from_numpy(np.array(view if turn is None else view.transpose(turn))).permute(
        2, 0, 1
    )


class FolderTiles(Dataset):
    """Sample k -> {"image": uint8 (3, size, size), "skipped": paths of unreadable tiles, joined by NUL}."""

    def __init__(
        self, root: str | Path | list[str], size: int, seed: int, spare: Path | None = None
    ):
        self.stamps, self.record = {}, spare and spare / "unreadable.txt"
        self.root, self.files = (
            Path(top_and_roots(root)[0]),
            list_tiles(root, spare=spare, stamps=self.stamps),
        )
        self.size, self.seed, self.unreadable, self.small = (
            size,
            seed,
            [],
            False,
        )  # unreadable: filled by `batches`

    def fingerprint(self, contents: bool = False) -> dict:
        """Count and hash of the sorted list, for a cache with all that the files hold: what a resumed run compares."""
        listing, label = hashlib.sha256(), "tiles compared with the cache's"
        for i, name in enumerate(
            progress(self.files, label, len(self.files)) if contents else self.files
        ):
            listing.update(b"\0"[:i] + os.fsencode(name))
            with contextlib.suppress(OSError):  # an unreadable tile, which the run will name
                listing.update(read_tile(self.root / name) if contents else b"")
        return {"count": len(self.files), "sha256": listing.hexdigest()}

    def __getitem__(self, k: int) -> dict:
        n, skipped = len(self.files), []
        for i in range(
            n // 100 + 1
        ):  # the next of the epoch for an unreadable one; more in a row would end the run
            path = self.root / self.files[epoch_order(self.seed, k // n, n)[(k + i) % n]]
            if image := open_tile(path, stamps=self.stamps):
                if min(image.size) < self.size and not self.small:
                    self.small = True  # one warning from each worker
                    print(
                        f"warning: {path}, perhaps not alone, is smaller than the crop: enlarged",
                        file=sys.stderr,
                    )
                view = random_view(image, self.size, np.random.default_rng((1, self.seed, k)))
                return {"image": view, "skipped": "\0".join(skipped)}
            skipped.append(str(path))
        return {
            "image": torch.zeros(3, self.size, self.size, dtype=torch.uint8),
            "skipped": "\0".join(skipped),
        }


LABELLED = "train/CLASS/* and test/CLASS/*, labels.csv (columns path, label, split), or images/* and masks/*"
SPLITS = {
    "train": ("train", "NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"),
    "test": ("test", "CRC-VAL-HE-7K"),
}


def labelled_files(root: str) -> dict[str, tuple[list[str], dict[str, list]]]:
    """{"train": (files, targets), "test": ...} of a folder of LABELLED or NCT-CRC-HE, for CentreTiles, in a fixed mixed
    order. images/ and masks/ at the top: the last fifth is the test set. InputError: a split or a class is missing."""
    folder, table, found, classes = Path(root), Path(root) / "labels.csv", {}, []
    csv.field_size_limit(
        2**31 - 1
    )  # a quote that is never closed is a row without a split, not a csv.Error
    text = table.read_text("utf-8-sig", "surrogateescape") if table.exists() else ""
    rows = [
        (row.get("path"), row.get("label"), row.get("split"))
        for row in csv.DictReader(text.split("\n"))
    ]
    for split, names in SPLITS.items():
        top, kind, pairs = (
            next((name for name in names if (folder / name).is_dir()), "."),
            "class",
            [],
        )
        if rows:
            pairs = [
                (file, label) for file, label, its_split in rows if file and its_split == split
            ]
        elif (folder / top / "masks").is_dir():
            kind, images = "mask", list_tiles(folder / top / "images")
            masks = {
                os.path.splitext(x)[0]: x for x in list_tiles(folder / top / "masks")
            }  # without one: unreadable
            pairs = [
                (f"{top}/images/{x}", f"{top}/masks/{masks.get(os.path.splitext(x)[0], x)}")
                for x in images
            ]
            cut = len(pairs) - max(1, len(pairs) // 5)
            pairs = pairs if top != "." else pairs[:cut] if split == "train" else pairs[cut:]
        elif top != ".":
            pairs = [
                (f"{top}/{name}", name[: max(0, name.find("/"))])
                for name in list_tiles(folder / top)
            ]
        if not pairs:
            raise InputError(
                f"--data: {root} has no tiles for {split}; a labelled folder holds {LABELLED}"
            )
        classes = classes or sorted({label for _, label in pairs if label})
        if unknown := [file for file, label in pairs if kind == "class" and label not in classes]:
            raise InputError(
                f"--data: {root}/{unknown[0]} is in none of the classes of train; move or remove it"
            )
        pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
        targets = [classes.index(label) if kind == "class" else label for _, label in pairs]
        found[split] = ([file for file, _ in pairs], {kind: targets})
    return found


# ---- what touches disk and terminal, for all programs ----


def save_atomically(content: dict | bytes, path: str | Path, write: Callable = torch.save) -> None:
    """Write so that `path` holds either the old file or the whole new one, on the disk, whenever the machine stops."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else write(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with (
            contextlib.ExitStack() as opened,
            contextlib.suppress(OSError),
        ):  # the new name as well, where systems can
            opened.callback(os.close, folder := os.open(temporary.parent, os.O_RDONLY))
            os.fsync(folder)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's own writer raises RuntimeError on a full disk
        raise InputError(
            f"cannot write {path}: {error}; free some space or choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # it is in its place already, or the disk is read-only
            temporary.unlink()


def whole(
    smallest: int, largest: int, text: str
) -> int:  # these are types for argparse, which names the flag
    if not text.strip().isdecimal() or not smallest <= int(text) <= largest:
        raise ArgumentTypeError(f"{text!r} is not a whole number from {smallest} to {largest}")
    return int(text)


def path(text: str, folder: bool = False) -> str:  # anything but "", and as a folder no file
    if (
        not text
    ):  # an unset variable of the shell; without this check the default would be taken in silence
        raise ArgumentTypeError("it is empty; give a value")
    if folder and os.path.exists(text) and not os.path.isdir(text):
        raise ArgumentTypeError(f"{text} is a file; give a folder")
    return text


OneLineParser = partial(
    ArgumentParser, formatter_class=RawTextHelpFormatter, usage=SUPPRESS, allow_abbrev=False
)
natural, positive, plural = (partial(whole, smallest, 2**31 - 1) for smallest in range(3))
few, batch, folder = partial(whole, 0, 1024), partial(whole, 1, 2**16), partial(path, folder=True)


def name_list(text: str) -> list[str]:  # "uni, virchow" -> ["uni", "virchow"]
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def dim_list(text: str) -> list[int]:  # "96,24" -> [24, 96]
    return sorted({positive(part) for part in text.split(",")})


def run_program(
    main,
) -> None:  # what a user can put right ends a script with one line on stderr and exit code 2
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be no text
    try:
        code, text = main(), ""
        if (
            torch.distributed.is_initialized()
        ):  # only here, when the DDP module is gone: freeing it later can hang
            torch.distributed.destroy_process_group()
    except (InputError, OSError) as error:
        code, text = (
            2,
            f"{error}{'' if isinstance(error, InputError) else '; put it right, or choose another place'}",
        )
    except (MemoryError, RuntimeError) as error:
        code, text = 1, "another process was lost, its own messages say why; go on with --resume"
        if isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ) or "can't allocate memory" in str(error):
            code, text = (
                2,
                "out of memory; anew, lower --batch-size, raise --accumulate (same result) or fewer --dims",
            )
        elif not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
    except KeyboardInterrupt:
        code, text = (
            130,
            "interrupted; a run that has saved goes on with --resume, all else with the same command",
        )
    if code:
        OneLineParser().exit(
            code, text and f"{os.path.basename(sys.argv[0])}: {text.replace(chr(10), ' ')}\n"
        )
