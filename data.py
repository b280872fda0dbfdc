"""Tiles: where training images come from, in which order, and which part of each is seen.

    sample k of a folder = random_view(tile epoch_order(seed, k // n, n)[k % n]), seeded by k

Sample k of a run is a function of (seed, k) alone: which tile, which crop, which flip, which turn.
So a resume needs to know k and nothing else, the number of loader workers changes nothing, and
process r of W takes k = r, r + W, r + 2 W, ...; the student and all its teachers see the same crop.
Images travel as uint8, (3, H, W), and each model normalises them inside.

Two sources of tiles are here (more are in extras/: tar shards, and teachers' outputs on disk):

    TissueTiles("distil", seed=0)               tissue that is drawn: no downloads, two known labels
    FolderTiles(["tiles/", "more/"], 224, 0)    every png, jpg, tif, bmp, webp below some folders
    for batch in batches(source, range(1000), 64, workers=8): batch["image"]  # (64, 3, 224, 224)

`Source` says what a source has to have. Last come the few things that touch disk and terminal for
all programs: a save that is whole or not there, progress, types for argparse, and the one place
where an error becomes one line.
"""

import argparse
import contextlib
import hashlib
import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from student import InputError


class Source(Dataset):
    """Where tiles come from: a Dataset with a length, which is an epoch; k runs beyond it.

    source[k] -> {"image": uint8 (3, S, S)}, a function of (seed, k) alone; with has_outputs also
    "outputs": {teacher: {"summary": (D_t,), "patches": (N, D_t)}}, and no teacher runs in training.
    It may have "unreadable" and "enlarged", as FolderTiles has them, for `batches` to name.
    """

    has_outputs = False
    description = ""  # for people: how many tiles, and of what
    fingerprint = ""  # a run goes on with a source of the same fingerprint only,
    program = "python train.py"  # and by the program that began it


# ---- Drawn tissue --------------------------------------------------------------------------------
# Two independent labels on every tile: the kind of its cells, and how the tissue is built.

TISSUE_VERSION = 1  # raise it when a tile changes: the offline teachers are then trained anew
STREAMS = ("teacher", "distil", "bank", "test")  # part of a tile's key: none leaks into another


class Nuclei(NamedTuple):
    """How one kind of cell looks. Lengths are in pixels of a 64 px tile."""

    radius: float
    spread: float  # of the radius, between the cells of a tile
    elongation: float
    density: float  # how much haematoxylin they take
    pale: float  # how much paler the centre is
    nucleolus: float  # how dark the dot in the centre is
    count: int  # mean number in a tile


CELLS = {
    "lymphocyte": Nuclei(2.1, 0.08, 1.1, 1.6, 0.0, 0.0, 30),
    "epithelial": Nuclei(3.8, 0.10, 1.3, 0.9, 0.0, 0.0, 16),
    "pleomorphic": Nuclei(4.2, 0.35, 1.6, 1.5, 0.0, 0.0, 14),
    "spindle": Nuclei(2.7, 0.10, 4.0, 1.0, 0.0, 0.0, 16),
    "vesicular": Nuclei(4.4, 0.10, 1.2, 1.0, 0.85, 0.0, 14),
    "nucleolar": Nuclei(4.4, 0.10, 1.2, 0.5, 0.0, 2.2, 14),
}
TISSUES = ("gland", "sheet", "fibres", "fat", "cribriform", "whorl")
HOLES = {  # lumens and vacuoles: smallest and largest radius, number
    "gland": (9, 14, 1),
    "fat": (8, 13, 5),
    "cribriform": (3.5, 5.5, 9),
}
# Optical density of haematoxylin and of eosin in red, green, blue (Ruifrok and Johnston 2001)
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]], np.float32)


def draw_tissue(stream: str, seed: int, k: int, size: int = 64):
    """Draw tile k of a stream.

    Returns the RGB image, uint8 (size, size, 3); the number of its kind of cell in CELLS; that of
    its tissue in TISSUES; and where nuclei are, uint8 (size, size) of 0 and 1.
    """
    rng = np.random.default_rng((STREAMS.index(stream), seed, k))
    cells = int(rng.integers(len(CELLS)))
    tissue = int(rng.integers(len(TISSUES)))
    kind = list(CELLS.values())[cells]
    name = TISSUES[tissue]

    # Architecture. Coordinates are those of a 64 px tile, whatever the size: x to the right, y down
    grid = np.mgrid[:size, :size].astype(np.float32) * (64 / size)  # (2, size, size)
    x = grid[1]
    y = grid[0]
    angle = rng.uniform(0, math.pi)
    warp = 10 * (smooth_noise(rng, size, 3) - 0.5)  # bends whatever would be straight or round
    centre = rng.uniform(18, 46, 2).tolist()
    eosin = draw_eosin(rng, name, x, y, angle, warp, centre)
    holes, hole_radii = draw_holes(rng, name, x, y, warp, centre)

    # Nuclei
    nuclei_x, nuclei_y = place_nuclei(rng, kind, name, holes, centre, hole_radii)
    distance, body, haematoxylin = draw_nuclei(rng, kind, nuclei_x, nuclei_y, angle, x, y)

    # Stains. Cytoplasm takes a little haematoxylin; nothing in a hole is stained
    haematoxylin = haematoxylin * (0.85 + 0.3 * smooth_noise(rng, size, 16)) + 0.08 * (1 - holes)
    eosin = eosin * (1 - holes) * (1 - 0.5 * body)
    image = stain(rng, haematoxylin, eosin)
    nuclei = (distance < 1).astype(np.uint8)
    return image, cells, tissue, nuclei


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Noise (size, size) in [0, 1]: cells x cells random values, enlarged bilinearly."""
    coarse = rng.random((cells + 1, cells + 1), dtype=np.float32)
    position = np.arange(size, dtype=np.float32) * (cells / size)
    i = position.astype(int)
    share = position % 1
    rows = coarse[i] * (1 - share)[:, None] + coarse[i + 1] * share[:, None]  # (size, cells + 1)
    return rows[:, i] * (1 - share) + rows[:, i + 1] * share


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, float32."""
    return rng.standard_normal(shape, dtype=np.float32)


def draw_eosin(rng, name, x, y, angle, warp, centre) -> np.ndarray:
    """How much eosin the tissue takes, (size, size): a texture, and waves in fibres and whorls."""
    eosin = 0.35 + 0.35 * smooth_noise(rng, len(x), 8)
    if name == "fibres":
        across = x * math.cos(angle) + y * math.sin(angle) + warp
        frequency = rng.uniform(0.5, 0.7)
        eosin += 0.35 * np.sin(across * frequency + rng.uniform(0, 6))
    if name == "whorl":
        outward = np.hypot(x - centre[0], y - centre[1]) + 0.5 * warp
        eosin += 0.4 * np.cos(outward * rng.uniform(0.3, 0.4))
    return eosin


def draw_holes(rng, name, x, y, warp, centre) -> tuple[np.ndarray, list[float]]:
    """Lumens and vacuoles: 1 inside, 0 outside, (size, size); and their radii."""
    if name not in HOLES:
        return np.zeros_like(x), []
    smallest, largest, number = HOLES[name]
    if name == "gland":  # it has one lumen, in its centre
        centres_x = [centre[0]]
        centres_y = [centre[1]]
    else:
        centres_x, centres_y = rng.uniform(0, 64, (2, number)).tolist()
    radii = rng.uniform(smallest, largest, number).tolist()
    to_rims = []  # of each hole: 0 in its centre, 1 at its rim
    for hole_x, hole_y, radius in zip(centres_x, centres_y, radii, strict=True):
        to_rims.append(np.hypot(x - hole_x, y - hole_y) / radius)
    beyond_rim = np.min(to_rims, axis=0) + warp / 40 - 1
    holes = 1 / (1 + np.exp(np.clip(beyond_rim * 16, -30, 30)))  # a rim that is a little soft
    return holes, radii


def place_nuclei(rng, kind, name, holes, centre, hole_radii) -> tuple[np.ndarray, np.ndarray]:
    """Where nuclei lie, x and y, (n,) each: outside the holes; in a gland, round the lumen."""
    n = max(4, rng.poisson(kind.count))
    tried_x, tried_y = rng.uniform(0, 64, (2, 3 * n)).astype(np.float32)  # more than are needed
    row = (tried_y * len(holes) / 64).astype(int)
    column = (tried_x * len(holes) / 64).astype(int)
    free = holes[row, column] < 0.3
    chosen = np.flatnonzero(free)[:n]
    if name == "gland":
        to_rim = np.hypot(tried_x - centre[0], tried_y - centre[1]) / hole_radii[0]
        off_ring = np.abs(to_rim - 1.45) + rng.uniform(0, 0.8, 3 * n)
        chosen = np.argsort(np.where(free, off_ring, 9), kind="stable")[:n]
    return tried_x[chosen], tried_y[chosen]


def draw_nuclei(rng, kind, nuclei_x, nuclei_y, angle, x, y):
    """Ellipses. Returns, (size, size) each: the distance to the nearest nucleus (0 in its centre,
    1 at its rim), how much of a pixel is nucleus, and the haematoxylin there."""
    shape = (len(nuclei_x), 1, 1)  # what follows is (n, size, size): one layer a nucleus
    radius = kind.radius * np.exp(kind.spread * normal(rng, shape))
    elongation = np.sqrt(kind.elongation * np.exp(0.15 * normal(rng, shape)))
    turn = angle + 0.5 * normal(rng, shape)
    dx = x - nuclei_x[:, None, None]
    dy = y - nuclei_y[:, None, None]
    along = (np.cos(turn) * dx + np.sin(turn) * dy) / (radius * elongation)
    across = (np.cos(turn) * dy - np.sin(turn) * dx) / (radius / elongation)
    distance = np.hypot(along, across)
    body = np.clip((1 - distance) * 3 + 0.5, 0, 1)
    pale = kind.pale * np.clip(1.4 - 1.8 * distance, 0, 1)
    dot = kind.nucleolus * np.clip(2 - 5 * distance, 0, 1)
    chromatin = 1 - pale + dot
    density = kind.density * np.exp(0.12 * normal(rng, shape))
    haematoxylin = body * chromatin * density
    return distance.min(0), body.max(0), haematoxylin.max(0)


def stain(rng, haematoxylin, eosin) -> np.ndarray:
    """Beer-Lambert: what light is left, as RGB uint8 (size, size, 3).

    Stain vectors, their strengths and the light vary from tile to tile, as from slide to slide.
    """
    stains = STAINS * np.exp(0.10 * normal(rng, (2, 3)))
    strengths = np.exp(0.2 * normal(rng, (2, 1)))
    stains *= strengths / np.linalg.norm(stains, axis=1, keepdims=True)
    transmitted = np.exp(-np.stack([haematoxylin, eosin], -1) @ stains)  # (size, size, 3)
    light = rng.uniform(0.92, 1)
    rgb = transmitted * light + 0.02 * normal(rng, transmitted.shape)
    return (np.clip(rgb, 0, 1) * 255).astype(np.uint8)


class TissueTiles(Source):
    """A source: tile k of a stream of drawn tissue.

    Item k -> {"image": uint8 (3, size, size), "cells": int, "tissue": int, "nuclei": (size, size)}.
    There is no end to them; `length` says how many count as an epoch.
    """

    def __init__(self, stream: str, seed: int, size: int = 64, length: int = 2**20):
        self.stream = stream
        self.seed = seed
        self.size = size
        self.length = length
        self.description = f"tissue that is drawn, {size} px a side"

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> dict:
        image, cells, tissue, nuclei = draw_tissue(self.stream, self.seed, k, self.size)
        image = torch.from_numpy(image).permute(2, 0, 1)  # (3, size, size)
        nuclei = torch.from_numpy(nuclei)
        return {"image": image, "cells": cells, "tissue": tissue, "nuclei": nuclei}

    def draw(self, n: int) -> dict[str, Tensor]:
        """Draw the first n on all cores -> {"image": (n, 3, size, size), "cells": (n,), ...}."""
        workers = 0
        if n > 256:  # for fewer, starting the workers takes longer than drawing
            workers = min(8, os.cpu_count() or 1)
        drawn = list(batches(self, range(n), 64, workers, label=f"drawing {n} tiles"))
        tiles = {}
        for key in drawn[0]:
            tiles[key] = torch.cat([batch[key] for batch in drawn])
        return tiles


# ---- Order and view: functions of (seed, k) ------------------------------------------------------


ORDER, VIEW = 0, 1  # what a generator is for is part of its key, beside the seed


@lru_cache(maxsize=2)  # a batch can straddle two epochs
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of n tiles in an epoch: sample k is tile epoch_order(seed, k // n, n)[k % n]."""
    return np.random.default_rng((ORDER, seed, epoch)).permutation(n)


def random_view(image: Image.Image, size: int, rng: np.random.Generator) -> Tensor:
    """A random crop at native scale, turned by quarters, perhaps mirrored: uint8 (3, size, size).

    Tissue has no up and no left, so all eight orientations are equally likely. There is no random
    scale, for a pixel stands for a length. A tile smaller than the crop is enlarged to it first.
    """
    shorter = min(image.size)
    if shorter < size:
        enlarged = (size * image.width // shorter, size * image.height // shorter)
        image = image.resize(enlarged, Image.Resampling.BICUBIC)
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    view = image.crop((left, top, left + size, top + size))
    # Pillow moves the pixels of a square when it turns by 90 degrees: nothing is interpolated.
    # torch.rot90 does the same; the loader is 5 to 16 % slower with it
    view = view.rotate(90 * int(rng.integers(4)))
    if rng.integers(2) == 1:
        view = ImageOps.mirror(view)
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)  # (size, size, 3) to (3, size, size)


# ---- Folders of tiles ----------------------------------------------------------------------------

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SYSTEM_FOLDERS = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX")  # beside the hidden ones
LARGEST_FILE = 2**28  # bytes
LARGEST_IMAGE = 2**28 // 3  # pixels, which is where Pillow begins to warn
LONGEST_STRIP = 1000  # longer side by shorter side: enlarging a strip to the crop would fill memory


class UnreadableTile(ValueError):
    """The message says in plain words why a tile cannot be read."""


def is_tile(name: str) -> bool:
    """Whether a file's name is that of a tile. Hidden ones, as macOS's "._x.png", never are."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def is_hidden(folder: str) -> bool:
    """Whether a folder is hidden (.ipynb_checkpoints, .Trash-1000) or made by a system."""
    return folder.startswith(".") or folder in SYSTEM_FOLDERS


def folders_of_tiles(names: list[str], with_masks: bool) -> list[str]:
    """The folders of a folder that may hold tiles, sorted."""
    names = sorted(name for name in names if not is_hidden(name))
    if "images" in names and "masks" in names and not with_masks:
        names.remove("masks")
    return names


def list_tiles(roots, flag: str = "--data", with_masks: bool = False) -> tuple[str, list[str]]:
    """List all images below one or several folders.

    Returns the folder around them all, and the images' names relative to it, sorted, with "/".
    Links to folders are followed, once each. A folder masks/ beside images/ holds labels, not
    tiles, and is left out unless with_masks. InputError, which names `flag`: a folder is missing,
    cannot be read, or there are no images.
    """
    roots = sorted({os.path.abspath(root) for root in as_list(roots)})
    for root in roots:
        if root.endswith(".tar") and not os.path.isdir(root):
            raise InputError(f"{flag}: {root}: for tar shards use python -m extras.shards {root}")
        if not os.path.isdir(root):
            raise InputError(f"{flag}: {root} is no folder, or does not exist; give one of images")

    def refuse(error: OSError):
        raise InputError(f"{flag}: cannot read {error.filename}: {error.strerror}; put it right")

    top = os.path.commonpath(roots)
    tiles = []
    visited = set()  # where folders really are: links can go round in circles
    for root in roots:
        for folder, below, files in os.walk(root, followlinks=True, onerror=refuse):
            real = os.path.realpath(folder)
            if real in visited:
                below.clear()
                continue
            visited.add(real)
            below[:] = folders_of_tiles(below, with_masks)
            inside = ""
            if folder != top:
                inside = os.path.relpath(folder, top).replace(os.sep, "/") + "/"
            tiles += [inside + name for name in files if is_tile(name)]
    if not tiles:
        named = ", ".join(roots)
        raise InputError(
            f"{flag}: no images (png, jpg, tif, bmp, webp) in {named}; give a folder of them "
            "(tar shards: python -m extras.shards)"
        )
    return top, sorted(tiles)


def as_list(roots) -> list[str]:
    """One folder or several -> a list of texts."""
    if isinstance(roots, str | Path):
        roots = [roots]
    return [str(root) for root in roots]


def read_file(path: str | Path) -> bytes:
    """All of an image file. UnreadableTile: no file (a pipe would never end), or too large."""
    if not os.path.exists(path):
        raise UnreadableTile("does not exist")
    if not os.path.isfile(path):
        raise UnreadableTile("no regular file")
    try:
        size = os.path.getsize(path)
        if size > LARGEST_FILE:
            raise UnreadableTile(f"too large ({size} bytes)")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableTile(f"cannot be read ({error.strerror})") from None


def open_tile(path_or_file: str | Path | BinaryIO) -> Image.Image:
    """Read an image as RGB of 8 bits, upright after its EXIF tag, as Pillow itself does.

    UnreadableTile says why it cannot be read, in words: damaged, 16 bits a channel, too large, ...
    """
    try:
        if isinstance(path_or_file, str | Path):
            path_or_file = io.BytesIO(read_file(path_or_file))
        with Image.open(path_or_file) as image:
            check_size(image.width, image.height)
            if image.mode.startswith("I;16"):
                raise UnreadableTile("16 bits a channel; save it as 8 bits")
            if image.mode in ("I", "F"):
                raise UnreadableTile("32 bits a channel; save it as 8 bits")
            if image.format == "TIFF" and image.n_frames > 1:
                return merge_pages(image)
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "RGB":
                return image
            return image.convert("RGB")
    except UnreadableTile:
        raise
    except Image.DecompressionBombError:
        raise UnreadableTile(f"too large (over {2 * LARGEST_IMAGE} px)") from None
    except UnidentifiedImageError:
        raise UnreadableTile("damaged (no image of a kind that is known)") from None
    except Exception as error:  # noqa: BLE001 - Pillow raises a dozen types on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableTile(f"damaged ({reason})") from None


def check_size(width: int, height: int) -> None:
    """UnreadableTile: so many pixels that memory may not hold them, once enlarged to the crop."""
    if width * height > LARGEST_IMAGE:
        raise UnreadableTile(f"too large ({width} x {height} px)")
    if max(width, height) > LONGEST_STRIP * min(width, height):
        raise UnreadableTile(f"too long and narrow ({width} x {height} px)")


def merge_pages(image: Image.Image) -> Image.Image:
    """A TIFF of three grey pages: these are red, green and blue. No other pages can be meant."""
    if image.n_frames != 3:
        raise UnreadableTile(f"more than one page ({image.n_frames})")
    pages = []
    for number in range(3):
        image.seek(number)
        if image.mode != "L" or (pages and image.size != pages[0].size):
            raise UnreadableTile("more than one page (3), and not three grey ones of one size")
        pages.append(ImageOps.exif_transpose(image))
    return Image.merge("RGB", pages)


def open_mask(path: str | Path) -> Image.Image:
    """A mask as class numbers 0 to 255, mode L. UnreadableTile: it is none, and why.

    A mask has one page, and one channel or three that are equal. JPEG changes numbers, so a JPEG
    has to be plainly black and white: then black is 0 and white is 1.
    """
    try:
        with Image.open(io.BytesIO(read_file(path))) as image:
            check_size(image.width, image.height)
            numbers = mask_numbers(image)
    except UnreadableTile:
        raise
    except Exception as error:  # noqa: BLE001 - Pillow raises a dozen types on damaged files
        raise UnreadableTile(f"damaged ({type(error).__name__})") from None
    if numbers.ndim == 3 and (numbers[..., :1] == numbers[..., :3]).all():  # grey, saved as RGB
        numbers = numbers[..., 0]
    whole = numbers.ndim == 2 and numbers.dtype.kind in "bui"  # bool, unsigned, signed
    if not whole or numbers.min() < 0 or numbers.max() > 255:
        found = f"{numbers.dtype} from {numbers.min()} to {numbers.max()}, shape {numbers.shape}"
        raise UnreadableTile(f"a mask has one channel of class numbers from 0 to 255, not {found}")
    return Image.fromarray(numbers.astype(np.uint8))


def mask_numbers(image: Image.Image) -> np.ndarray:
    """What a mask's file holds, (H, W) or (H, W, channels); of a palette its indices."""
    pages = getattr(image, "n_frames", 1)
    if pages > 1:
        raise UnreadableTile(f"more than one page ({pages})")
    if image.format == "JPEG":
        return black_and_white(np.array(image.convert("L")))
    packing = str(image.tile)  # how Pillow unpacks: grey of 2 bits as 0, 85, 170, 255
    numbers = np.array(image)
    if "'L;2" in packing:
        return numbers // 85
    if "'L;4" in packing:
        return numbers // 17
    return numbers


def black_and_white(grey: np.ndarray) -> np.ndarray:
    """Grey values (H, W) of a JPEG that is black and white but for its blur -> bool (H, W)."""
    between = (grey > 32) & (grey < 223)
    has_white = grey.max() >= 223
    all_black = grey.max() == 0
    if between.mean() > 0.02 or not (has_white or all_black):
        raise UnreadableTile("a JPEG changes class numbers; save masks as PNG")
    return grey > 127


class FolderTiles(Source):
    """A source: the images below some folders, in another order every epoch.

    Sample k -> {"image": uint8 (3, size, size), "unreadable": ["path: reason", ...] met on the way,
    "enlarged": [path] of a tile smaller than the crop}. An unreadable tile is replaced by the next
    of the epoch. Where tiles come from otherwise, two methods change: `find_tiles` and `open`.
    """

    def __init__(self, roots, size: int, seed: int):
        self.size = size
        self.seed = seed
        self.top, self.files = self.find_tiles(as_list(roots))
        self.description = f"{len(self.files):,} tiles of {', '.join(as_list(roots))}"
        names = hashlib.sha256("\0".join(self.files).encode(errors="surrogateescape"))
        self.fingerprint = f"{len(self.files)} tiles, sha256 of their names {names.hexdigest()}"
        self.unreadable = set()  # "path: reason" of those met so far: filled by `batches`
        self.enlarged_named = False  # whether `batches` has said that some are

    def find_tiles(self, roots: list[str]) -> tuple[str, list[str]]:
        """The folder around all tiles, and their sorted names in it."""
        return list_tiles(roots)

    def open(self, i: int) -> Image.Image:
        """Tile i of `files`. UnreadableTile: why it cannot be read."""
        return open_tile(os.path.join(self.top, self.files[i]))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> dict:
        n = len(self.files)
        order = epoch_order(self.seed, k // n, n)
        unreadable = []
        for ahead in range(n // 100 + 1):
            i = order[(k + ahead) % n]
            path = os.path.join(self.top, self.files[i])
            try:
                image = self.open(i)
            except UnreadableTile as reason:
                unreadable.append(f"{path!r}: {reason}")
                continue
            enlarged = [path] if min(image.size) < self.size else []
            view = random_view(image, self.size, np.random.default_rng((VIEW, self.seed, k)))
            return {"image": view, "unreadable": unreadable, "enlarged": enlarged}
        # More than 1 %: nothing is trained on the blank, `batches` names the tiles and ends the run
        blank = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        return {"image": blank, "unreadable": unreadable, "enlarged": []}


# ---- Loader --------------------------------------------------------------------------------------


def batches(
    source: Dataset,
    ks: Sequence[int],
    batch_size: int,
    workers: int = 0,
    pin: bool = False,
    label: str = "",
) -> Iterator[dict]:
    """Samples `ks` of a source in batches {"image": uint8 (B, 3, H, W), ... all that samples have}.

    workers: processes that read ahead, 0 to read in this one; pin: into memory from which a GPU
    copies faster; label: prints progress under this name. Unreadable tiles are named once on
    stderr and kept in source.unreadable. InputError: they are more than 1 %, or a worker died.
    A source whose samples say "unreadable" or "enlarged" has what FolderTiles has to count them.
    """
    loader = DataLoader(
        source,
        batch_size,
        sampler=ks,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=silence_worker,
        generator=torch.Generator(),  # without one, torch would draw from its global generator
    )
    loaded = loader
    if label:
        loaded = progress(loader, label, len(loader))
    try:
        for batch in loaded:
            name_unreadable(source, batch.pop("unreadable"))
            name_enlarged(source, batch.pop("enlarged"))
            yield batch
    except (ConnectionRefusedError, ConnectionResetError, EOFError):
        # A worker died with a batch on its way; mostly torch itself notices, see `explain`
        raise InputError(WORKER_DIED) from None


def silence_worker(number: int) -> None:
    """After Ctrl-C the main process says its one line, and a worker that it left says nothing."""

    def say_nothing(kind, error, traceback):
        pass

    sys.excepthook = say_nothing  # not for errors in tiles: torch hands those to the main process


def collate(samples: list[dict]) -> dict:
    """One batch of samples. Its images are a view (B, 3, H, W) of memory in the order B, H, W, 3,
    which is how Pillow has pixels: so they are not moved once more, and the GPU does the rest."""
    pixels = []
    others = []
    batch = {"unreadable": [], "enlarged": []}
    for sample in samples:
        other = dict(sample)
        pixels.append(other.pop("image").permute(1, 2, 0))  # (H, W, 3)
        batch["unreadable"] += other.pop("unreadable", [])
        batch["enlarged"] += other.pop("enlarged", [])
        others.append(other)
    batch["image"] = torch.stack(pixels).permute(0, 3, 1, 2)  # (B, 3, H, W)
    batch.update(default_collate(others))  # labels, or the teachers' outputs
    return batch


def name_unreadable(source: Dataset, found: list[str]) -> None:
    """Name each unreadable tile once. InputError: they are more than 1 % of the source's tiles."""
    if not found:
        return
    for tile in found:
        if tile not in source.unreadable:
            source.unreadable.add(tile)
            print(f"warning: skipped unreadable tile {tile}", file=sys.stderr)
    if len(source.unreadable) > len(source) / 100:
        first = "; ".join(sorted(source.unreadable)[:3])
        raise InputError(
            f"over 1 % of {len(source)} tiles are unreadable: {first}; mend or remove them"
        )


def name_enlarged(source: Dataset, found: list[str]) -> None:
    """Say once that tiles are smaller than the crop, for an enlarged tile shows less tissue."""
    if found and not source.enlarged_named:
        source.enlarged_named = True
        what = f"{found[0]!r}, perhaps not alone, is smaller than the crop: enlarged"
        print(f"warning: {what}", file=sys.stderr)


# ---- Disk and terminal, for all programs ---------------------------------------------------------


def save_atomically(content, path: str | Path, write: Callable = torch.save) -> None:
    """Write a file so that `path` holds the old content or the whole new one, come what may.

    content: bytes, or what write(content, file) can write. InputError, which names the path: the
    disk is full, the place is read-only, ...
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(temporary) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                # By way of memory: Ctrl-C while torch writes to a file can abort Python itself
                buffer = io.BytesIO()
                write(content, buffer)
                file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # first the content reaches the disk, then it gets its name
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = " ".join(str(error).split())
        raise InputError(
            f"cannot write {path}: {reason}; free some space or choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # it is in its place already, or was never made
            os.unlink(temporary)
    sync_folder(os.path.dirname(temporary) or ".")


def sync_folder(folder: str) -> None:
    """The new name reaches the disk as well, on systems where a folder can be synchronised."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def progress(items: Iterable, label: str, total: int) -> Iterator:
    """Yield the items; every 5 seconds, and at the end, process 0 prints how far it is."""
    start = time.monotonic()
    printed = start
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - printed > 5 or done == total:
            printed = now
            taken = now - start
            left = taken / done * (total - done)
            if os.environ.get("RANK", "0") == "0":
                print(f"  {label}: {done}/{total}, {taken:.0f} s, ETA {left:.0f} s", flush=True)


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A command line whose errors are one line, and whose --help shows the text as it stands."""
    return argparse.ArgumentParser(
        prog,
        usage=argparse.SUPPRESS,
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )


# Types for argparse: of a ValueError it makes "argument --steps: invalid positive value: '0'"


def natural(text: str) -> int:
    """A whole number from 0 on; torch and numpy take no larger seeds than 2**31 - 1 everywhere."""
    number = int(text)
    if not 0 <= number < 2**31:
        raise ValueError
    return number


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = natural(text)
    if number == 0:
        raise ValueError
    return number


def path(text: str) -> str:
    """A file or folder; not "", which an unset variable of the shell leaves."""
    if not text:
        raise ValueError
    return text


def name_list(text: str) -> list[str]:
    """Parse "uni, virchow" to ["uni", "virchow"], each once; "" to none."""
    names = [name.strip() for name in text.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def dim_list(text: str) -> list[int]:
    """Parse "96,24" to [24, 96]."""
    return sorted({positive(dim) for dim in text.split(",")})


WORKER_DIED = "--workers: a process that reads tiles died (out of memory?); use fewer workers"
OUT_OF_MEMORY = (
    "out of memory; lower --workers, or begin another run with a higher --accumulate (same "
    "result), a lower --batch-size or fewer --dims"
)
PROCESS_LOST = "another process was lost, its own messages say why; go on with --resume"
INTERRUPTED = (
    "interrupted; a run that has saved goes on with --resume, all else with the same command"
)
MEMORY_FULL = ("out of memory", "allocate memory")  # in the messages of torch and of systems
CONNECTION_LOST = ("gloo", "nccl error", "nccl communicator", "connection closed by peer")
READER_GONE = 141  # what a shell shows for a program in front of `| head`


def run_program(main: Callable) -> None:
    """Run a program. What a user can put right ends in a line on stderr and exit code 2.

    main may return another exit code. Faults of ours keep their traceback.
    """
    prepare_output()
    code = 0
    lines = []
    try:
        code = main() or 0
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not while Python ends
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BrokenPipeError:
        code = READER_GONE
    except (InputError, KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
        code, message = explain(error)
        if not message:
            raise
        lines = [message]
        if isinstance(error, InputError) and len(error.lines) > 1:
            lines = error.lines  # one a thing that is wrong
    finally:
        drop_unwritten_output()
    program = os.path.basename(sys.argv[0])
    for line in lines:
        with contextlib.suppress(OSError):
            print(f"{program}: {' '.join(line.splitlines())}", file=sys.stderr)
    if code:
        sys.exit(code)


def prepare_output() -> None:
    """Printing works where output was closed, and for names of files that are no text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))
        elif hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")


def drop_unwritten_output() -> None:
    """What a closed pipe or a full disk did not take is dropped, or Python would try it again."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the line for an error that a user can put right; (1, "") for any other."""
    text = str(error)
    if text.startswith("Caught ") and "in DataLoader worker process" in text:
        last = text.splitlines()[-1]  # of the worker's traceback: "student.InputError: MESSAGE"
        text = last.split(": ", 1)[-1]
    if isinstance(error, InputError):
        return 2, text
    if isinstance(error, KeyboardInterrupt):
        return 130, INTERRUPTED
    if text.startswith("DataLoader worker (pid"):
        return 2, WORKER_DIED
    if isinstance(error, MemoryError) or says(text, MEMORY_FULL):
        return 2, OUT_OF_MEMORY
    if isinstance(error, OSError):
        return 2, f"{text}; put it right, or choose another place"
    if is_distributed(error) or says(text, CONNECTION_LOST):
        return 1, PROCESS_LOST
    return 1, ""


def says(text: str, words: tuple[str, ...]) -> bool:
    """Whether a message has one of some words, which are all that tells such errors from others."""
    return any(word in text.lower() for word in words)


def is_distributed(error: BaseException) -> bool:
    """Whether the processes of a run could not reach each other."""
    return torch.distributed.is_available() and isinstance(error, torch.distributed.DistError)
