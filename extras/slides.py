"""Tiles from whole slides, at one scale: what train.py --data wants.

    pip install openslide-python openslide-bin
    python -m extras.slides slides/ tiles/                      256 px at 0.5 microns per pixel
    python -m extras.slides slide.svs tiles/ --mpp 1 --size 224

SLIDES is a slide or a folder, searched to any depth; OUT gets a folder a slide, of JPEGs named
after their place in the slide, X_Y.jpg. A square is kept if it lies wholly in the scan and more
than a quarter of it is coloured, as tissue is and background is not. A slide that does not say its
scale, or is coarser than wanted, is left out, and said why: teachers know tissue at one scale
(`python teachers.py` says which), and at another their features are wrong.

A slide's folder appears when it is complete. Folders that exist are skipped, so the same command
goes on where it was stopped.
"""

import math
import shutil
from argparse import ArgumentTypeError
from collections import Counter
from pathlib import Path

from data import make_parser, path, positive, progress, run_program
from student import InputError

# Names of what OpenSlide reads.
ENDINGS = "bif czi dcm mrxs ndpi scn svs svslide tif tiff vms vmu".split()
FINEST = 0.1  # microns per pixel: no scanner is finer, so a smaller number is no scale
SLACK = 1.1  # a slide may be coarser than wanted by so much, since "20x" is 0.45 to 0.55
TISSUE = 0.25  # the least share of coloured pixels
SATURATION = 20  # of 255: grey below
QUALITY = 90  # of the JPEGs


class LeftOut(Exception):
    """Why a slide gives no tiles."""


def find_slides(place: str | Path) -> list[Path]:
    """A slide, or all slides below a folder, by their names, sorted. InputError: there are none."""
    place = Path(place)
    if not place.exists():
        raise InputError(f"SLIDES: {place} does not exist; give a slide or a folder of slides")
    if place.is_file():
        return [place]
    slides = []
    for file in sorted(place.rglob("*")):
        ending = file.suffix.lower().removeprefix(".")
        hidden = any(part.startswith(".") for part in file.relative_to(place).parts)
        if ending in ENDINGS and file.is_file() and not hidden:
            slides.append(file)
    if not slides:
        raise InputError(f"SLIDES: {place} holds no slides ({', '.join(ENDINGS)})")
    return slides


def name_folders(slides: list[Path]) -> list[str]:
    """A folder's name for every slide: its name without the ending, or all of it where others are
    called the same.
    """
    stems = Counter(slide.stem for slide in slides)
    names = Counter(slide.name for slide in slides)
    folders = []
    for slide in slides:
        if stems[slide.stem] == 1:
            folders.append(slide.stem)
        elif names[slide.name] == 1:
            folders.append(slide.name)
        else:
            folders.append(f"{slide.parent.name}_{slide.name}")
    twice = [name for name, count in Counter(folders).items() if count > 1]
    if twice:
        raise InputError(f"SLIDES: several slides are called {twice[0]}; rename them")
    return folders


def open_slide(file: Path, mpp: float):
    """An OpenSlide of a scale that is known and fine enough, and its microns per pixel. LeftOut
    says why not.
    """
    try:
        import openslide
    except ImportError:
        raise InputError("slides need: pip install openslide-python openslide-bin") from None
    try:
        slide = openslide.OpenSlide(file)
    except (openslide.OpenSlideError, OSError) as error:
        raise LeftOut(f"no slide that OpenSlide can read ({error})") from None
    text = slide.properties.get(openslide.PROPERTY_NAME_MPP_X, "")
    try:
        scanned = float(text)
    except ValueError:
        raise LeftOut("it does not say its microns per pixel") from None
    if not scanned > FINEST:
        raise LeftOut(f"{scanned:g} microns per pixel can be no scale")
    if scanned > SLACK * mpp:
        raise LeftOut(f"{scanned:g} microns per pixel are coarser than the wanted {mpp:g}")
    return slide, scanned


def cut_slide(slide, scanned: float, folder: Path, mpp: float, size: int, name: str) -> int:
    """Tiles of an open slide, of `size` px at `mpp`, into a folder -> how many. LeftOut: it is
    damaged.
    """
    import openslide

    width, height = slide.dimensions
    side = round(size * mpp / scanned)  # of a tile, in pixels as scanned
    places = []
    for y in range(0, height, side):
        for x in range(0, width, side):
            places.append((x, y))
    count = 0
    for x, y in progress(places, f"squares of {name}", len(places)):
        try:
            region = slide.read_region(
                (x, y), 0, (side, side)
            )  # RGBA, transparent outside the scan
        except openslide.OpenSlideError as error:
            raise LeftOut(f"it is damaged at {x}, {y} ({error})") from None
        tile = region.convert("RGB").resize((size, size))  # bicubic, antialiased
        saturation = tile.convert("HSV").getchannel("S").histogram()
        coloured = sum(saturation[SATURATION:]) / size**2
        scanned_wholly = region.getextrema()[3] == (255, 255)
        if scanned_wholly and coloured > TISSUE:
            tile.save(folder / f"{x}_{y}.jpg", quality=QUALITY)
            count += 1
    return count


def cut_slides(place: str | Path, out: str | Path, mpp: float, size: int) -> int:
    """Tiles of every slide -> how many are new; a line for each slide."""
    slides = find_slides(place)
    total = 0
    for file, name in zip(slides, name_folders(slides), strict=True):
        folder = Path(out) / name
        unfinished = (
            Path(out) / f".{name}.unfinished"
        )  # hidden, so that train.py sees no tiles in it
        if folder.exists():
            print(f"{file}: done already, {len(list(folder.iterdir()))} tiles in {folder}")
            continue
        shutil.rmtree(unfinished, ignore_errors=True)  # of an earlier run that was stopped
        try:
            slide, scanned = open_slide(file, mpp)
            unfinished.mkdir(parents=True)
            count = cut_slide(slide, scanned, unfinished, mpp, size, name)
        except LeftOut as why:
            shutil.rmtree(unfinished, ignore_errors=True)
            if file == Path(place):
                raise InputError(f"SLIDES: {file}: {why}; give another slide") from None
            print(f"{file}: left out: {why}", flush=True)
            continue
        unfinished.rename(folder)
        width, height = slide.dimensions
        scale = f"{width} x {height} px at {scanned:g} microns per pixel"
        print(f"{file}: {scale}: {count} tiles in {folder}", flush=True)
        slide.close()
        total += count
    return total


def microns(text: str) -> float:
    """Type of --mpp."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not FINEST < value < 100:
        raise ArgumentTypeError(f"{text!r} is no scale in microns per pixel, such as 0.5")
    return value


def main() -> None:
    """The command line."""
    parser = make_parser("python -m extras.slides", __doc__)
    parser.add_argument("slides", metavar="SLIDES", type=path, help="a slide or a folder of them")
    parser.add_argument("out", metavar="OUT", type=path, help="the folder for the tiles")
    parser.add_argument("--mpp", type=microns, default=0.5, help="microns per pixel (default: 0.5)")
    parser.add_argument("--size", type=positive, default=256, help="pixels a side (default: 256)")
    args = parser.parse_args()
    total = cut_slides(args.slides, args.out, args.mpp, args.size)
    print(f"{total} new tiles of {args.size} px at {args.mpp:g} microns per pixel in {args.out}")


if __name__ == "__main__":
    run_program(main)
