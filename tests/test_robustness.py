"""Corruptions against Pillow and plain formulas; what they cost models whose answer is known."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import oracle
from PIL import Image, ImageEnhance
from test_evaluate import write_quadrants, write_run
from torch import nn
from torchvision.transforms import v2

import data
import evaluate
from extras import figures, robustness
from extras.robustness import CORRUPTIONS, LEVELS, CorruptedTiles, corrupt


def tile(size=224, seed=0):
    """Drawn tissue, uint8 (3, size, size)."""
    image, *_ = data.draw_tissue("test", 0, seed, size)
    return torch.from_numpy(image).permute(2, 0, 1)


def as_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def difference(a, b):
    """The largest and the mean difference of a tile and another, in grey levels."""
    if isinstance(b, Image.Image):
        b = np.array(b).transpose(2, 0, 1)
    apart = np.abs(a.numpy().astype(float) - np.asarray(b, float))
    return apart.max(), apart.mean()


# ---- what each corruption does -------------------------------------------------------------------


@pytest.mark.parametrize(("size", "level"), [(224, 1), (224, 3), (112, 3), (64, 2)])
def test_blur_is_a_gaussian_in_pixels_of_a_224_px_tile(size, level):
    image = tile(size)
    sigma = CORRUPTIONS["blur"].strengths[level - 1] * size / 224
    reach = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    blurred = image.numpy().astype(float)
    for axis in (1, 2):
        width = [(0, 0), (0, 0), (0, 0)]
        width[axis] = (reach, reach)
        padded = np.pad(blurred, width, "reflect")
        blurred = np.zeros(image.shape)
        for i, weight in enumerate(weights):
            blurred += weight * np.take(padded, range(i, i + size), axis)
    largest, _ = difference(corrupt(image, "blur", level, 0), blurred)
    assert largest < 0.51
    assert difference(image, blurred)[1] > 0.5  # a blur that did nothing would show


@pytest.mark.parametrize("level", LEVELS)
def test_jitter_is_that_of_torchvision_on_a_pillow_image(level):
    image = tile()
    share = CORRUPTIONS["jitter"].strengths[level - 1]
    changes = []
    for seed in range(8):
        jitter = v2.ColorJitter(share, share, share, share / 4)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = jitter(as_pillow(image))  # by Pillow's ImageEnhance
            torch.manual_seed(seed)
            drawn = jitter.make_params([image])
        spoilt = corrupt(image, "jitter", level, seed)
        assert difference(spoilt, expected)[1] < 2.5
        changes.append(difference(image, spoilt)[1])
        for name, limit in (("brightness", share), ("saturation", share), ("contrast", share)):
            assert abs(drawn[f"{name}_factor"] - 1) <= limit
        assert abs(drawn["hue_factor"]) <= share / 4
    assert np.mean(changes) > 20 * share and len(set(changes)) == 8


@pytest.mark.parametrize("level", LEVELS)
def test_grey_is_a_mixture_with_the_grey_tile(level):
    image = tile()
    share = CORRUPTIONS["grey"].strengths[level - 1]
    spoilt = corrupt(image, "grey", level, 0)
    expected = ImageEnhance.Color(as_pillow(image)).enhance(1 - share)
    assert difference(spoilt, expected)[0] <= 2
    assert (spoilt[0] == spoilt[2]).all().item() == (share == 1)


@pytest.mark.parametrize("level", LEVELS)
def test_jpeg_is_what_pillow_reads_from_the_file_that_it_saved(level):
    image = tile()
    saved = io.BytesIO()
    as_pillow(image).save(saved, "JPEG", quality=CORRUPTIONS["jpeg"].strengths[level - 1])
    largest, mean = difference(corrupt(image, "jpeg", level, 0), Image.open(saved))
    assert largest == mean == 0
    assert difference(image, Image.open(saved))[1] > 1


@pytest.mark.parametrize("level", LEVELS)
def test_gamma_is_a_power_and_darkens(level):
    image = tile()
    expected = 255 * (image.numpy() / 255) ** CORRUPTIONS["gamma"].strengths[level - 1]
    spoilt = corrupt(image, "gamma", level, 0)
    assert difference(spoilt, expected)[0] <= 1
    assert spoilt.double().mean() < image.double().mean() - 5


@pytest.mark.parametrize("level", LEVELS)
def test_turns_are_quarters_and_lose_no_pixel(level):
    image = tile(64)
    degrees = CORRUPTIONS["turn"].strengths[level - 1]
    assert degrees == 90 * level
    expected = as_pillow(image).rotate(degrees)
    assert difference(corrupt(image, "turn", level, 0), expected)[0] == 0
    back = corrupt(corrupt(image, "turn", level, 0), "turn", 4 - level, 0)
    assert torch.equal(back, image)


def test_pepper_is_black_pixels_of_that_share_nested_by_strength():
    image = tile().clamp(min=1)
    before = torch.zeros(image.shape[1:], dtype=torch.bool)
    for level in LEVELS:
        share = CORRUPTIONS["pepper"].strengths[level - 1]
        spoilt = corrupt(image, "pepper", level, 5)
        black = (spoilt == 0).all(0)
        assert abs(black.double().mean().item() - share) < 4 * (share / black.numel()) ** 0.5
        assert torch.equal(spoilt, image.masked_fill(black, 0))  # whole pixels; others untouched
        assert (black | ~before).all()
        before = black


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strength_0_is_the_clean_tile_and_each_strength_is_further_from_it(name):
    image = tile()
    assert torch.equal(corrupt(image, name, 0, 1), image)
    kept = image.clone()
    state = torch.get_rng_state()
    changes = []
    for level in LEVELS:
        spoilt = corrupt(image, name, level, 1)
        assert spoilt.dtype == torch.uint8 and spoilt.shape == image.shape
        assert torch.equal(spoilt, corrupt(image, name, level, 1))
        changes.append(difference(image, spoilt)[1])
    assert torch.equal(image, kept)
    assert torch.equal(torch.get_rng_state(), state)  # what others draw from torch stays the same
    assert min(changes) > 0.2
    if name != "turn":  # no quarter is stronger than another
        assert changes == sorted(changes)


def test_what_is_random_is_a_function_of_seed_and_tile():
    tiles = [{"image": tile(64), "cells": 3}] * 3
    for name in CORRUPTIONS:
        spoilt = CorruptedTiles(tiles, name, 2, 0)
        assert len(spoilt) == 3 and spoilt[0]["cells"] == 3
        assert torch.equal(spoilt[1]["image"], CorruptedTiles(tiles, name, 2, 0)[1]["image"])
        is_random = name in ("jitter", "pepper")
        other_tile = torch.equal(spoilt[0]["image"], spoilt[1]["image"])
        other_seed = torch.equal(spoilt[0]["image"], CorruptedTiles(tiles, name, 2, 1)[0]["image"])
        assert other_tile == other_seed == (not is_random)
    assert torch.equal(tiles[0]["image"], tile(64))


# ---- what corruptions cost models whose answer is known ------------------------------------------


class MeanColour(nn.Module):
    """Knows the mean colour and nothing else: its embedding is what it differs from grey 127."""

    img_size = 16

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images):
        return {"summary": self.scale * (images.float().mean((2, 3)) - 127)}


class Corner(MeanColour):
    """Knows the colour of the upper left quarter."""

    def forward(self, images):
        return super().forward(images[..., :8, :8])


class Blind(MeanColour):
    """Says the same to every tile."""

    def forward(self, images):
        return {"summary": self.scale * torch.ones(len(images), 3)}


COLOURS = {"pink": (170, 95, 100), "blue": (95, 132, 106)}  # equally bright, to a person's eye


def write_colours(root, upper_only=False, n=20):
    """Tiles of two classes that differ in colour, in all of it or in the upper half."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = np.full((16, 16, 3), 127.0)
                rows = slice(0, 8) if upper_only else slice(None)
                pixels[rows] = colour
                pixels += rng.normal(0, 4, 3) + rng.normal(0, 8, pixels.shape)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def measured(model, root, dims=(3,)):
    """{(corruption, level): (balanced accuracy, cosine)} of the last of some dims."""
    result = robustness.measure({"model": (model, list(dims))}, str(root), 0)
    found = {}
    for row in result["rows"]:
        accuracy = None
        if row["scores"]:
            accuracy = row["scores"]["class"]["balanced_accuracy"]
        if row["dim"] == dims[-1]:
            found[row["corruption"], row["level"]] = (accuracy, row["cosine"])
    return found


def test_a_model_of_colour_loses_all_without_colour_and_nothing_by_turns(tmp_path):
    found = measured(MeanColour(), write_colours(tmp_path))
    assert found["clean", 0] == (1, pytest.approx(1))
    for level in LEVELS:
        assert found["turn", level] == (1, pytest.approx(1))
        assert found["blur", level][0] == 1 and found["blur", level][1] > 0.99
    assert found["grey", 1][0] == 1
    assert found["grey", 3][0] < 0.8 and found["grey", 3][1] < 0.9
    assert found["another tile", 0][0] is None and found["another tile", 0][1] < 0.9
    assert len(found) == 2 + 3 * len(CORRUPTIONS)


def test_a_model_of_one_corner_loses_by_turns(tmp_path):
    found = measured(Corner(), write_colours(tmp_path, upper_only=True))
    assert found["clean", 0][0] == 1 and found["turn", 1][0] > 0.9  # still in the upper half
    assert found["turn", 2][0] < 0.8 and found["turn", 2][1] < 0.5


def test_a_model_that_sees_nothing_loses_nothing(tmp_path):
    """The control: whatever is done to the tiles, half of them are right and no feature moves."""
    found = measured(Blind(), write_colours(tmp_path))
    for (name, _), (accuracy, cosine) in found.items():
        assert accuracy == (None if name == "another tile" else 0.5)
        assert cosine == pytest.approx(1)


def test_an_unreadable_tile_is_named_once_and_shifts_nothing(tmp_path, capsys):
    root = write_colours(tmp_path, n=51)
    (root / "test" / "pink" / "7.png").write_bytes(b"no picture")
    found = measured(MeanColour(), root)
    assert found["clean", 0] == found["turn", 3] == (1, pytest.approx(1))
    assert capsys.readouterr().err.count("7.png") == 1


def test_rows_are_those_of_knn_on_corrupted_tiles_by_hand(tmp_path):
    run = write_run(tmp_path / "run")
    root = str(write_colours(tmp_path / "tiles"))
    student, _ = evaluate.load_student(run)
    result = robustness.measure({"a": (student, [4, 48])}, root, 3)
    splits = evaluate.labelled_files(root)
    features = {}
    labels = {}
    for split, (files, targets) in splits.items():
        tiles = evaluate.CentreTiles(root, 64, files, targets)
        images = torch.stack([tiles[k]["image"] for k in range(len(tiles))])
        features[split] = evaluate.embed(student, images)
        labels[split] = torch.tensor(targets["class"])
    spoilt = CorruptedTiles(tiles, "pepper", 3, 3)
    images = torch.stack([spoilt[k]["image"] for k in range(len(tiles))])
    z = evaluate.embed(student, images)
    for dim in (4, 48):
        bank = features["train"][:, :dim]
        knn = evaluate.figures_of(evaluate.knn(bank, labels["train"], z[:, :dim], labels["test"]))
        cosines = []
        for a, b in zip(features["test"][:, :dim], z[:, :dim], strict=True):
            cosines.append((a @ b / a.norm() / b.norm()).item())
        [row] = [
            row
            for row in result["rows"]
            if (row["dim"], row["corruption"], row["level"]) == (dim, "pepper", 3)
        ]
        assert row["scores"]["class"] == pytest.approx(knn)
        assert row["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert result["chance"] == {"class": 0.5} and result["n"] == {"bank": 40, "test": 40}


def test_what_is_kept_is_a_share_of_what_lies_above_chance():
    assert robustness.kept(90, 70, 50) == 50
    assert robustness.kept(60, 55, 50) == 50 and robustness.kept(59, 55, 50) is None


# ---- the program ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def program(monkeypatch):
    """extras.robustness as from the shell, on a few tiles; its exit code."""
    monkeypatch.setattr(robustness, "TILES", 12)
    monkeypatch.setattr(evaluate, "N_TILES", 24)

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["robustness.py", *map(str, argv), "--device", "cpu"])
        try:
            data.run_program(robustness.main)
        except SystemExit as stop:
            return stop.code
        return 0

    return call


def test_table_file_and_picture_of_a_run(tmp_path, run_folder, program, capsys):
    oracle("matplotlib")
    out = tmp_path / "out"
    root = write_colours(tmp_path / "tiles")
    assert program(run_folder, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "cells: balanced accuracy of kNN, %; chance is" in printed
    assert "12 clean tiles in the bank, 12 to test" in printed
    lines = printed.splitlines()
    for name in CORRUPTIONS:
        for level in LEVELS:
            text = robustness.describe(name, level)
            assert sum(line.startswith(f"{text}  ") for line in lines) == 3, text
    for text, count in (("clean", 3), ("mean of 21", 3), ("kept, %", 2), ("another tile", 1)):
        assert sum(line.startswith(f"{text}  ") for line in lines) == count, text
    first = json.loads((out / "robustness.json").read_text())
    [(title, result)] = first.items()
    assert title == "synthetic tissue" and len(result["rows"]) == 3 * (2 + 21)
    assert {row["dim"] for row in result["rows"]} == {4, 8, 48}
    assert printed.index("another tile") < printed.index("robustness.json")  # told, then saved

    assert program(run_folder, "--data", root, "--out", out) == 0
    assert program(run_folder, "--data", root, "--out", out) == 0
    assert "instead of its earlier rows" in capsys.readouterr().out
    both = json.loads((out / "robustness.json").read_text())
    assert both["synthetic tissue"] == result and set(both) == {title, str(root)}
    pictures = {file.name for file in (out / "figures").iterdir()}
    assert pictures == {f"robustness-{figures.file_name(name)}.png" for name in both}
    for name in pictures:
        with Image.open(out / "figures" / name) as picture:
            assert min(picture.size) > 400
            assert len(np.unique(np.array(picture.convert("L")))) > 50


def test_without_matplotlib_the_table_and_the_file_are_there(
    tmp_path, run_folder, program, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    root = write_colours(tmp_path / "tiles")
    assert program(run_folder, "--data", root, "--out", tmp_path / "out") == 0
    assert "no picture: pictures need: pip install matplotlib" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["robustness.json"]


@pytest.mark.parametrize("content", ["{", "[1, 2]"])
def test_a_file_of_something_else_is_never_overwritten(
    tmp_path, run_folder, program, capsys, monkeypatch, content
):
    def measure(models, root, seed):
        raise AssertionError("work began before the place was looked at")

    monkeypatch.setattr(robustness, "measure", measure)
    file = tmp_path / "robustness.json"
    file.write_text(content)
    assert program(run_folder, "--out", tmp_path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(file) in line and "--out" in line
    assert file.read_text() == content


def test_what_cannot_be_measured_is_one_line(tmp_path, run_folder, program, capsys):
    write_quadrants(tmp_path / "masked", 5, (64, 64))
    (tmp_path / "file").write_text("mine")
    for argv, words in (
        ([tmp_path / "none"], "none does not exist"),
        ([run_folder, "--data", tmp_path / "nowhere"], "nowhere"),
        ([run_folder, "--data", tmp_path / "masked"], "masks, no classes"),
        ([run_folder, "--out", tmp_path / "file"], "--out"),
        ([run_folder, "--teachers", "nobody"], "nobody"),
    ):
        assert program(*argv) == 2, argv
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
    assert not (run_folder / "robustness.json").exists()
