"""The README's snippet for whole-slide images: tiles have the size and the microns per pixel that it promises."""

import re

import numpy as np
import pytest
from conftest import ROOT, oracle
from PIL import Image

README = (ROOT / "README.md").read_text()
[SNIPPET] = [x for x in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "OpenSlide" in x]


def draw_slide(path, mpp: float, tags: dict) -> None:
    """Tiled TIFF with a pyramid, 520 x 330 microns: dots 20 microns apart on pink up to 400 microns, then blank."""
    with oracle("tifffile").TiffWriter(path) as file:
        for k in range(2):  # every level is drawn, not shrunk from the one below
            y, x = (np.arange(int(microns / mpp) >> k) * mpp * 2**k for microns in (330, 520))
            dots = (np.cos(x * np.pi / 10) + np.cos(y * np.pi / 10)[:, None])[..., None] > 1.2
            image = np.where(dots, (90, 40, 140), (230, 170, 200)).astype(np.uint8)
            image[:, x > 400] = 240
            file.write(
                image,
                tile=(256, 256),
                photometric="rgb",
                compression="zlib",
                subfiletype=int(k > 0),
                **tags,
            )


def pitch(profile: np.ndarray) -> float:  # pixels between dots: the peak of a zero-padded spectrum
    profile, n = (profile - profile.mean()) * np.hanning(len(profile)), 2**16
    spectrum = np.abs(np.fft.rfft(profile, n))
    spectrum[: n // 160] = 0
    return n / spectrum.argmax()


@pytest.mark.parametrize("mpp", [0.25, 0.2277, 0.5, 0.5021])
def test_tiles_of_a_slide_are_at_half_a_micron_per_pixel_whatever_the_scanner(
    mpp, tmp_path, monkeypatch
):
    oracle("openslide")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    draw_slide(
        "slides/a.svs", mpp, {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    )
    exec(SNIPPET, {})  # noqa: S102
    side = round(
        128 / mpp
    )  # 4.1 x 2.6 tiles: no partial ones, and not the fourth column, 1/8 of it tissue
    names = {f"{x}_{y}.jpg" for x in (0, side, 2 * side) for y in (0, side)}
    assert {file.name for file in (tmp_path / "tiles" / "a").iterdir()} == names
    for file in (tmp_path / "tiles" / "a").iterdir():
        pixels = np.asarray(Image.open(file).convert("L"), float)
        assert pixels.shape == (256, 256)
        assert [pitch(pixels.mean(axis)) for axis in (0, 1)] == pytest.approx([40, 40], rel=0.005)


@pytest.mark.parametrize(
    "unit, value", [("NONE", 1), ("INCH", 72), ("CENTIMETER", 1e4), ("CENTIMETER", 2e5)]
)
def test_a_slide_without_a_scale_or_with_a_false_one_is_left_out(
    unit, value, tmp_path, monkeypatch, capsys
):
    oracle("openslide")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    draw_slide("slides/a.svs", 0.5, {"resolution": (value, value), "resolutionunit": unit})
    exec(SNIPPET, {})  # noqa: S102
    assert not (tmp_path / "tiles").exists()
    assert re.fullmatch(
        r"slides/a\.svs \(\d+, \d+\) \S+ microns per pixel\n", capsys.readouterr().out
    )


def test_tiles_that_were_not_scanned_as_a_whole_are_left_out(tmp_path, monkeypatch):
    oracle("openslide")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slides").mkdir()
    pink, tags = (
        np.full((256, 256, 3), (230, 170, 200), np.uint8),
        {"resolution": (4e4, 4e4), "resolutionunit": 3},
    )
    layout = {
        "shape": (512, 1024, 3),
        "dtype": "uint8",
        "tile": (256, 256),
        "photometric": "rgb",
        "compression": "zlib",
    }
    oracle("tifffile").imwrite("slides/a.svs", iter([pink, pink, pink, None] * 2), **layout, **tags)
    exec(SNIPPET, {})  # noqa: S102
    assert [file.name for file in (tmp_path / "tiles" / "a").iterdir()] == ["0_0.jpg"]
