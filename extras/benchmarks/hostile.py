"""Images that a program may meet and should survive: odd ones, damaged ones, and what became of
them beside Pillow. stress.py reads many of them, tests/test_data.py some. No program of its own.
"""

import contextlib
import io
import re
import signal
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data import UnreadableTile, open_tile

SUFFIXES = ("png", "jpg", "tif", "bmp", "webp")
FORMATS = {"jpg": "jpeg", "tif": "tiff"}  # where Pillow's name is another
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
STRIPS = ((1, 1), (1, 5000), (5000, 1), (1000, 1), (1001, 1), (2, 1999))
AGREED = ("read", "refused", "broken")  # outcomes in which open_tile and Pillow agree


# ---- files in memory -----------------------------------------------------------------------------


def encoded(image: Image.Image, suffix: str, **options) -> bytes:
    """The image as a file of this suffix."""
    file = io.BytesIO()
    image.save(file, FORMATS.get(suffix, suffix), **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    length = struct.pack(">I", len(body))
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return length + kind + body + checksum


def png(width: int, height: int, depth: int, colour: int, rows: bytes, level: int = 1) -> bytes:
    """A PNG of a kind that Pillow does not write; rows: pixels, each row behind a filter byte."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    content += png_chunk(b"IHDR", header)
    content += png_chunk(b"IDAT", zlib.compress(rows, level))
    content += png_chunk(b"IEND", b"")
    return content


def noise(rng: np.random.Generator, width: int, height: int, *channels: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, *channels), dtype=np.uint8)


# ---- whole images --------------------------------------------------------------------------------


def plain_images(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """(suffix, content) of small tiles of 8 bits: colour, grey, palettes, several compressions."""
    for suffix in SUFFIXES:
        for mode in ("RGB", "RGB", "L", "P", "RGBA", "CMYK"):
            size = rng.integers(40, 101, 2).tolist()
            coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            smooth = coarse.resize(size, Image.Resampling.BICUBIC)
            with contextlib.suppress(OSError):  # a mode that the format does not know
                yield suffix, encoded(smooth.convert(mode), suffix)
                if suffix != "tif":
                    continue
                for way in ("tiff_lzw", "packbits", "tiff_deflate", "jpeg"):
                    yield suffix, encoded(smooth.convert(mode), suffix, compression=way)


def odd_images(rng: np.random.Generator) -> Iterator[tuple[str, str, bytes]]:
    """(what, suffix, content) of whole images that are unusual, and of some that lie of size."""
    rgb = Image.fromarray(noise(rng, 60, 45, 3))
    yield from odd_shapes(rng, rgb)
    yield from odd_modes(rng, rgb)
    yield from odd_files(rng, rgb)
    yield from false_sizes(rng)


def odd_shapes(rng, rgb) -> Iterator[tuple[str, str, bytes]]:
    for suffix in SUFFIXES:
        for width, height in STRIPS:
            strip = Image.fromarray(noise(rng, width, height, 3))
            yield f"strip {width}x{height}", suffix, encoded(strip, suffix)
        if suffix != "bmp":
            for way in range(10):  # 0 and 9 are no orientations
                exif = Image.Exif()
                exif[0x0112] = way
                yield f"orientation {way}", suffix, encoded(rgb, suffix, exif=exif)
        yield "no bytes", suffix, b""


def odd_modes(rng, rgb) -> Iterator[tuple[str, str, bytes]]:
    for suffix in ("png", "tif"):
        for mode in ("1", "L", "LA", "P", "RGBA"):
            yield f"mode {mode}", suffix, encoded(rgb.convert(mode), suffix)
        for top in (65535, 255, 200, 1):
            grey = Image.fromarray(rng.integers(0, top + 1, (40, 50)).astype(np.uint16))
            yield f"16-bit grey up to {top}", suffix, encoded(grey, suffix)
    deep = noise(rng, 50, 40, 6)
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    yield "16-bit RGB", "png", png(50, 40, 16, 2, rows)
    rows = b"".join(b"\0" + row[:, :4].tobytes() for row in deep)
    yield "16-bit grey and alpha", "png", png(50, 40, 16, 4, rows)
    yield "float", "tif", encoded(Image.fromarray(noise(rng, 50, 40).astype(np.float32)), "tif")
    yield "mode LAB", "tif", encoded(Image.new("LAB", (50, 40)), "tif")
    yield "mode YCbCr", "tif", encoded(rgb.convert("YCbCr"), "tif")


def odd_files(rng, rgb) -> Iterator[tuple[str, str, bytes]]:
    clear = rgb.quantize(16)
    yield "palette with transparency", "png", encoded(clear, "png", transparency=3)
    yield "palette with alphas", "png", encoded(clear, "png", transparency=bytes(range(0, 256, 16)))
    yield "RGB with a transparent colour", "png", encoded(rgb, "png", transparency=(1, 2, 3))
    yield "CMYK", "jpg", encoded(rgb.convert("CMYK"), "jpg")
    yield "progressive", "jpg", encoded(rgb, "jpg", progressive=True, quality=60)
    yield "lossless", "webp", encoded(rgb.convert("RGBA"), "webp", lossless=True)
    first, *more = [Image.fromarray(noise(rng, 60, 45, 3)) for _ in range(3)]
    together = {"save_all": True, "append_images": more}
    yield "animated", "webp", encoded(first, "webp", **together)
    yield "APNG", "png", encoded(first, "png", **together)
    yield "GIF", "png", encoded(first, "gif", **together)
    yield "several pages", "tif", encoded(first, "tif", **together)
    for kind in ("ppm", "tga", "ico", "pcx", "jpeg2000", "avif"):
        with contextlib.suppress(OSError, KeyError):  # this Pillow was built without it
            yield f"a {kind} inside", "png", encoded(rgb, kind)


def false_sizes(rng) -> Iterator[tuple[str, str, bytes]]:
    claims = ((60_000, 60_000), (20_000, 9_000), (10_000, 9_000), (2**31 - 1, 1), (0, 40))
    for width, height in claims:
        yield f"claims {width}x{height}", "png", png(width, height, 8, 2, b"\0" * 1000)
    yield "12000x12000", "png", png(12_000, 12_000, 1, 0, bytes(1501) * 12_000)
    yield "30000x40", "png", png(30_000, 40, 8, 0, (b"\0" + bytes(range(250)) * 120) * 40)
    yield "30000x20", "png", png(30_000, 20, 8, 0, bytes(30_001) * 20)
    bmp = encoded(Image.fromarray(noise(rng, 40, 30, 3)), "bmp")
    for claimed in (b"\xff\x7f", b"\xff\xff"):  # the height of this bitmap, as its header has it
        yield f"claims {claimed.hex()} rows", "bmp", bmp[:22] + claimed + bmp[24:]


# ---- damage --------------------------------------------------------------------------------------


def damaged(content: bytes, how: str, rng: np.random.Generator) -> bytes:
    """The content with a piece lost, changed or added; how: of DAMAGE."""
    n = len(content)
    start, stop = sorted(rng.integers(0, n + 1, 2).tolist())
    bits = re.match(r"\d+", how)
    if bits:
        reach = min(n, 10 ** rng.integers(2, 6))  # often the header alone
        return with_flipped_bits(content, rng.integers(0, reach * 8, int(bits[0])))
    if how == "zeroed":
        stop = min(stop, start + int(rng.integers(1, 200)))
        return content[:start] + bytes(stop - start) + content[stop:]
    more = rng.bytes(int(rng.integers(1, 300)))
    if how == "cut short":
        return content[:start]
    if how == "appended":
        return content + more
    if how == "inserted":
        return content[:start] + more + content[start:]
    return content  # under another suffix


def with_flipped_bits(content: bytes, bits: np.ndarray) -> bytes:
    changed = bytearray(content)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def hostile_images(n: int, seed: int = 0) -> Iterator[tuple[str, str, bytes]]:
    """n images as (what, name, content): each odd one once, then damaged ones. 2,000: 3 MB."""
    rng = np.random.default_rng(seed)
    odd = list(odd_images(rng))
    to_damage = list(plain_images(rng)) * 4
    for _, suffix, content in odd:
        if 0 < len(content) < 20_000:
            to_damage.append((suffix, content))
    for i in range(n):
        if i < len(odd):
            what, suffix, content = odd[i]
        else:
            what = DAMAGE[i % len(DAMAGE)]
            suffix, content = to_damage[rng.integers(len(to_damage))]
            content = damaged(content, what, rng)
            if what == "another suffix":
                suffix = SUFFIXES[rng.integers(len(SUFFIXES))]
        yield what, f"{i:05d} {what}.{suffix}", content


# ---- what becomes of them ------------------------------------------------------------------------


class TooLong(BaseException):
    """A BaseException, so that no `except Exception` on the way swallows it."""


@contextlib.contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """TooLong: the block is not done in time, as where a pipe or a loop would hang for ever."""

    def late(*_):
        raise TooLong(f"{what}: not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pillows_own(path: Path) -> tuple[tuple | None, bool]:
    """What Pillow makes of it: (size, pixels), or None where it raises; and whether open_tile may
    refuse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # a file, not a name: for a name Pillow maps raw pixels unseen
            with open(path, "rb") as file, Image.open(file) as image:
                refusable = max(image.size) > 1000 * min(image.size) or image.mode[0] in "IF"
                refusable |= image.format == "TIFF" and image.n_frames > 1
                upright = ImageOps.exif_transpose(image).convert("RGB")
                return (upright.size, upright.tobytes()), refusable
    except Exception:  # noqa: BLE001 - whatever it is
        return None, True


def opened_or_none(path: Path) -> Image.Image | None:
    """The tile, or None where it is refused, in one line."""
    try:
        return open_tile(path)
    except UnreadableTile as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"{path}: not one line: {error}") from None
        return None


def outcome(path: Path) -> str:
    """Read beside Pillow: a word of AGREED; another word where the two disagree."""
    with within(10, path.name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = opened_or_none(path)
    expected, refusable = pillows_own(path)
    if opened is None:
        if expected is None:
            return "broken"
        return "refused" if refusable else "lost"
    if expected is None:
        return "made up"
    if opened.mode == "RGB" and (opened.size, opened.tobytes()) == expected:
        return "read"
    return "other pixels"
