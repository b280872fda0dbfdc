"""Tiles from whole slides: their size, scale and number, what is left out, what a stop costs."""

import sys

import numpy as np
import pytest
from conftest import oracle
from PIL import Image

import data
from extras import slides
from student import InputError


def draw_slide(path, mpp: float, tags: dict) -> None:
    """A TIFF of 520 x 330 microns: dots 20 microns apart on pink up to 400 microns, then blank."""
    with oracle("tifffile").TiffWriter(path) as file:
        for level in range(2):  # every level is drawn, not shrunk from the one below
            y = np.arange(int(330 / mpp) >> level) * mpp * 2**level
            x = np.arange(int(520 / mpp) >> level) * mpp * 2**level
            dots = (np.cos(x * np.pi / 10) + np.cos(y * np.pi / 10)[:, None])[..., None] > 1.2
            image = np.where(dots, (90, 40, 140), (230, 170, 200)).astype(np.uint8)
            image[:, x > 400] = 240
            file.write(
                image,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                subfiletype=int(level > 0),
                **tags,
            )


def at_scale(mpp: float) -> dict:
    return {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}


def pitch(profile: np.ndarray) -> float:
    """Pixels between dots: the peak of a zero-padded spectrum."""
    n = 2**16
    profile = (profile - profile.mean()) * np.hanning(len(profile))
    spectrum = np.abs(np.fft.rfft(profile, n))
    spectrum[: n // 160] = 0
    return n / spectrum.argmax()


def run_as_typed(monkeypatch, *argv):
    """The exit code of the program."""
    monkeypatch.setattr(sys, "argv", ["slides.py", *map(str, argv)])
    try:
        data.run_program(slides.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def place(tmp_path):
    """A folder for slides, and tiles/ beside it."""
    oracle("openslide")
    (tmp_path / "slides").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("mpp", "wanted", "size"),
    [(0.25, 0.5, 256), (0.2277, 0.5, 256), (0.5021, 0.5, 256), (0.25, 1, 128), (0.25, 0.5, 224)],
)
def test_tiles_have_the_wanted_scale_whatever_the_scanner(
    mpp, wanted, size, place, monkeypatch, capsys
):
    draw_slide(place / "slides" / "a.svs", mpp, at_scale(mpp))
    flags = ["--mpp", wanted, "--size", size]
    assert run_as_typed(monkeypatch, place / "slides", place / "tiles", *flags) == 0
    side = round(size * wanted / mpp)
    names = set()
    for x in range(0, int(520 / mpp), side):
        share = (400 / mpp - x) / side  # of the tile that is tissue
        for y in range(0, int(330 / mpp) - side, side):
            if share > 0.25:
                names.add(f"{x}_{y}.jpg")
    assert {file.name for file in (place / "tiles" / "a").iterdir()} == names
    assert f"a.svs: {int(520 / mpp)} x {int(330 / mpp)} px" in capsys.readouterr().out
    for file in (place / "tiles" / "a").iterdir():
        pixels = np.asarray(Image.open(file).convert("L"), float)
        assert pixels.shape == (size, size)
        if int(file.name.split("_")[0]) + side < 400 / mpp:  # wholly of dots
            for axis in (0, 1):
                assert pitch(pixels.mean(axis)) == pytest.approx(20 / wanted, rel=0.01)


@pytest.mark.parametrize(
    ("unit", "value", "why"),
    [
        ("NONE", 1, "does not say its microns per pixel"),
        ("INCH", 72, "coarser than the wanted 0.5"),
        ("CENTIMETER", 1e4, "coarser than the wanted 0.5"),
        ("CENTIMETER", 2e5, "can be no scale"),
    ],
)
def test_a_slide_without_a_scale_or_with_a_false_one_is_left_out(
    unit, value, why, place, monkeypatch, capsys
):
    tags = {"resolution": (value, value), "resolutionunit": unit}
    draw_slide(place / "slides" / "a.svs", 0.5, tags)
    draw_slide(place / "slides" / "b.svs", 0.5, at_scale(0.5))
    assert run_as_typed(monkeypatch, place / "slides", place / "tiles") == 0
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if "a.svs" in line]
    assert "left out: " in line and why in line
    assert [folder.name for folder in (place / "tiles").iterdir()] == ["b"]


def test_tiles_that_were_not_scanned_as_a_whole_are_left_out(place, monkeypatch):
    pink = np.full((256, 256, 3), (230, 170, 200), np.uint8)
    oracle("tifffile").imwrite(
        place / "slides" / "a.svs",
        iter([pink, pink, pink, None] * 2),
        shape=(512, 1024, 3),
        dtype="uint8",
        tile=(256, 256),
        photometric="rgb",
        compression="zlib",
        resolution=(4e4, 4e4),
        resolutionunit=3,
    )
    assert run_as_typed(monkeypatch, place / "slides", place / "tiles") == 0
    assert [file.name for file in (place / "tiles" / "a").iterdir()] == ["0_0.jpg"]


def test_a_slide_that_was_interrupted_is_done_again_and_a_done_one_skipped(
    place, monkeypatch, capsys
):
    for name in "ab":
        draw_slide(place / "slides" / f"{name}.svs", 0.5, at_scale(0.5))
    assert run_as_typed(monkeypatch, place / "slides", place / "whole") == 0
    cut_slide = slides.cut_slide

    def stop_in_b(slide, scanned, folder, mpp, size, name):
        if name == "b":
            (folder / "0_0.jpg").write_bytes(b"half")
            raise KeyboardInterrupt
        return cut_slide(slide, scanned, folder, mpp, size, name)

    with monkeypatch.context() as patched:
        patched.setattr(slides, "cut_slide", stop_in_b)
        assert run_as_typed(monkeypatch, place / "slides", place / "tiles") == 130
    _, seen = data.list_tiles([place / "tiles"], "--data")
    assert seen and not any("b" in name for name in seen)  # what is unfinished is no tile
    before = {file.name: file.stat().st_mtime_ns for file in (place / "tiles" / "a").iterdir()}
    capsys.readouterr()
    assert run_as_typed(monkeypatch, place / "slides", place / "tiles") == 0
    assert "a.svs: done already" in capsys.readouterr().out
    after = {file.name: file.stat().st_mtime_ns for file in (place / "tiles" / "a").iterdir()}
    assert after == before
    assert sorted(path.name for path in (place / "tiles").iterdir()) == ["a", "b"]
    for file in (place / "whole" / "b").iterdir():
        assert (place / "tiles" / "b" / file.name).read_bytes() == file.read_bytes()


def test_what_is_no_slide_is_one_line(place, monkeypatch, capsys):
    (place / "slides" / "text.svs").write_text("no slide")
    (place / "slides" / "notes.txt").write_text("not looked at")
    draw_slide(place / "slides" / "b.svs", 0.5, at_scale(0.5))
    assert run_as_typed(monkeypatch, place / "slides", place / "tiles") == 0
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if "text.svs" in line]
    assert "left out: no slide that OpenSlide can read" in line
    for flags, words in (
        ([place / "slides" / "text.svs"], "text.svs: no slide that OpenSlide can read"),
        ([place / "none"], "none does not exist"),
        ([place / "tiles"], "holds no slides"),
        ([place / "slides", "--mpp", "0"], "--mpp"),
        ([place / "slides", "--mpp", "nan"], "--mpp"),
        ([place / "slides", "--size", "0"], "--size"),
    ):
        argv = [flags[0], place / "out", *flags[1:]]
        assert run_as_typed(monkeypatch, *argv) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
    assert not (place / "out").exists() or not list((place / "out").iterdir())


def test_slides_of_one_name_get_folders_of_their_own(place):
    for folder, name in (("x", "a.svs"), ("x", "a.tif"), ("y", "a.svs"), ("y", "b.ndpi")):
        (place / "slides" / folder).mkdir(exist_ok=True)
        (place / "slides" / folder / name).write_text("")
    found = slides.find_slides(place / "slides")
    assert slides.name_folders(found) == ["x_a.svs", "a.tif", "y_a.svs", "b"]


def test_without_openslide_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(InputError, match="pip install openslide-python openslide-bin"):
        slides.open_slide(tmp_path / "a.svs", 0.5)
