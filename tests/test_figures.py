"""Pictures of a run: which are drawn, from which lines and rows, with anybody's names in them."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import oracle, write_tiles
from PIL import Image
from test_evaluate import write_quadrants, write_run, write_tissue

import data
import evaluate
from extras import figures
from student import InputError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few tiles; matplotlib, or the test is skipped; a warning, as of a missing glyph, fails."""
    oracle("matplotlib")
    monkeypatch.setattr(evaluate, "N_TILES", 24)
    monkeypatch.setattr(figures, "BANK", 24)
    monkeypatch.setattr(figures, "QUERIES", 1)
    monkeypatch.setattr(figures, "MAPS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw(monkeypatch, *argv):
    """extras.figures as from the shell; the exit code."""
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, argv), "--device", "cpu"])
    try:
        data.run_program(figures.main)
    except SystemExit as stop:
        return stop.code
    return 0


def write_log(folder, steps=(10, 20, 30), teachers=("toy_cells", "toy_tissue")):
    """log.jsonl as train.py writes it."""
    with open(folder / "log.jsonl", "w") as file:
        for step in steps:
            terms = {}
            for teacher in teachers:
                for dim in (4, 8, 48):
                    terms[f"{teacher}/summary_cos@{dim}"] = 1 - dim / step / 50
                    terms[f"{teacher}/patch_cos@{dim}"] = 1 - dim / step / 40
                    terms[f"{teacher}/patch_l1@{dim}"] = 1 / step
            line = {"step": step, "loss": 9 / step, "lr": 1e-3, "grad_norm": 0.5, "terms": terms}
            file.write(json.dumps(line) + "\n")


def make_rows(models, intervals=True):
    """Rows of results.json: {model: {dim: balanced accuracy}}, intervals five points to each
    side."""
    rows = []
    for model, points in models.items():
        for dim, value in points.items():
            metrics = {"balanced_accuracy": value, "accuracy": value + 0.01}
            row = {"model": model, "parameters": 9, "dim": dim, "n": {"train": 9, "test": 9}}
            row["scores"] = {"cells": {"knn": metrics}, "tissue": {"knn": metrics}}
            if intervals:
                ends = {metric: [v - 0.05, v + 0.05] for metric, v in metrics.items()}
                row["intervals"] = {"cells": {"knn": ends}, "tissue": {"knn": ends}}
            rows.append(row)
    return rows


MODELS = {
    "student": {4: 0.5, 8: 0.7, 48: 0.75},
    "teacher toy_cells": {128: 0.9},
    "chance": {0: 1 / 6},
    "colour histogram": {24: 0.4},
}


def write_results(folder, title="synthetic tissue"):
    """results.json as evaluate.py writes it."""
    results = {title: {"rows": make_rows(MODELS), "differences": []}}
    (folder / "results.json").write_text(json.dumps(results))


def check_picture(file):
    with Image.open(file) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
        assert len(np.unique(np.array(picture.convert("L")))) > 8  # something is drawn


def test_all_pictures_of_a_run(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    write_log(run)
    write_results(run)
    (run / "figures").mkdir()
    (run / "figures" / "mine.png").write_bytes(b"mine")
    (run / "figures" / "curves.png").write_bytes(b"of an earlier run of extras.figures")
    assert draw(monkeypatch, run) == 0
    printed = capsys.readouterr().out
    names = {
        "accuracy-synthetic-tissue.png",
        "curves.png",
        "patches-synthetic-tissue.png",
        "retrieval-synthetic-tissue-cells.png",
        "retrieval-synthetic-tissue-tissue.png",
    }
    assert {file.name for file in (run / "figures").iterdir()} == names | {"mine.png"}
    assert (run / "figures" / "mine.png").read_bytes() == b"mine"
    for name in names:
        check_picture(run / "figures" / name)
        assert str(run / "figures" / name) in printed


def test_labelled_masked_and_plain_tiles(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    write_tissue(tmp_path / "tissue")
    write_quadrants(tmp_path / "masked", 5, (64, 64))
    write_tiles(tmp_path / "plain", 3)
    for name in ("tissue", "masked", "plain"):
        out = tmp_path / f"out-{name}"
        assert draw(monkeypatch, run, "--data", tmp_path / name, "--out", out) == 0
        found = sorted(file.name.split("-")[0] for file in out.iterdir())
        assert found == (["patches", "retrieval"] if name == "tissue" else ["patches"])
        for file in out.iterdir():
            check_picture(file)
    printed = capsys.readouterr().out
    assert "no curves" in printed and "no scores" in printed
    assert printed.count("no retrieval sheets") == 2


NAMES = ["cost $5 and $6", "结果", "_hidden", "a\\b^{2}", "é & <b>", "\udcff", "two\nlines"]


def test_any_names_are_drawn_and_a_run_of_one_line(tmp_path, monkeypatch):
    run = tmp_path / "".join(NAMES[:2])
    run.mkdir()
    write_log(run, [10], teachers=NAMES)
    metrics = {"knn": {"balanced_accuracy": 0.5}}
    scores = {NAMES[0]: metrics, NAMES[1]: metrics}
    rows = []
    for name in NAMES:
        for dim in (4, 8):
            rows.append({"model": name, "dim": dim, "scores": scores})
    titles = ("cost $5 and $6", "结果/cost", "结果-cost")
    results = {title: {"rows": rows} for title in titles}
    (run / "results.json").write_text(json.dumps(results))
    drawn = {}
    save = figures.save_figure

    def keep(figure, file):
        drawn[file.name] = figure
        save(figure, file)

    monkeypatch.setattr(figures, "save_figure", keep)
    with oracle("matplotlib").rc_context(figures.STYLE):
        figures.draw_history(run, run / "figures")  # a glyph that is missing would warn
    files = [f"accuracy-{figures.file_name(title)}.png" for title in titles]
    assert set(drawn) == {"curves.png", *files} and len(set(files)) == 3
    for name in drawn:
        check_picture(run / "figures" / name)
    [legend] = drawn[files[0]].legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [figures.readable(name) for name in NAMES]
    assert drawn["curves.png"].axes[0].get_title() == figures.readable(f"loss of {run.name}")
    for axes in drawn["curves.png"].axes:
        for line in axes.get_lines():
            assert line.get_marker() == "."


def test_names_are_written_as_they_are_where_a_font_has_them():
    shown = [figures.readable(name) for name in NAMES]
    assert shown[0] == NAMES[0] and shown[2] == " _hidden"  # so that legends keep it
    assert shown[3:5] == NAMES[3:5] and shown[5:] == ["\\udcff", "two\\nlines"]
    if figures.font_with("结") is None:
        assert shown[1] == "\\u7ed3\\u679c"


def test_an_installed_font_that_has_the_characters_is_taken(tmp_path, monkeypatch):
    builder = oracle("fontTools.fontBuilder")
    pens = oracle("fontTools.pens.ttGlyphPen")
    font_manager = oracle("matplotlib.font_manager")
    pen = pens.TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 0))
    pen.lineTo((500, 500))
    pen.closePath()
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "jie"])
    font.setupCharacterMap({ord("结"): "jie"})
    font.setupGlyf({".notdef": pen.glyph(), "jie": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (600, 0), "jie": (600, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Tiny CJK", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "tiny.ttf")
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
    figures.font_with.cache_clear()
    try:
        manager.addfont(str(tmp_path / "tiny.ttf"))
        assert figures.readable("结a果") in ("结a\\u679c", "结a果")
        assert figures.font_with("结") is not None
        figure = oracle("matplotlib.figure").Figure()
        text = figure.text(0, 0, "a结")
        figures.choose_fonts(figure)
        assert text.get_fontfamily() == ["DejaVu Sans", figures.font_with("结")]
        figures.save_figure(figure, tmp_path / "x.png")
    finally:
        figures.font_with.cache_clear()


def test_the_last_line_of_a_step_counts_and_half_a_line_does_not(tmp_path):
    write_log(tmp_path, [10, 20, 30])
    text = (tmp_path / "log.jsonl").read_text()
    again = {"step": 20, "loss": 0.125, "terms": {"uni/summary_cos@48": 0.75}, "new": [1]}
    half = '{"step": 40, "lo'
    (tmp_path / "log.jsonl").write_text(text + json.dumps(again) + "\n[1]\n7\n" + half)
    lines = figures.read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [10, 20, 30] and lines[1] == again


def test_curves_are_cosines_at_the_ends_of_the_dims(tmp_path):
    write_log(tmp_path)
    panels = figures.collect_cosines(figures.read_log(tmp_path / "log.jsonl"))
    assert list(panels) == ["summary_cos", "patch_cos"]
    for curves in panels.values():
        found = [(curve.teacher, curve.dim) for curve in curves]
        assert found == [(t, m) for t in ("toy_cells", "toy_tissue") for m in (4, 48)]
    values = [1 - 4 / step / 50 for step in (10, 20, 30)]
    assert panels["summary_cos"][0].points == list(zip((10, 20, 30), values, strict=True))


def test_scores_are_the_first_metric_of_each_task_with_its_interval():
    metrics = {"knn": {"balanced_accuracy": 0.5, "accuracy": 0.75}, "adaptive": {}}
    rows = [{"model": "a", "dim": m, "scores": {"class": metrics}} for m in (4, 8)]
    ends = {"balanced_accuracy": [0.25, 0.625], "accuracy": [0, 1]}
    rows[1]["intervals"] = {"class": {"knn": ends}}
    panels = figures.collect_scores(rows)
    expected = {4: (50, None, None), 8: (50, 25, 62.5)}
    assert panels == {("class", "knn, balanced accuracy"): {"a": expected}}


def drawn_scores(monkeypatch, rows):
    """The figure of these rows, and where it would have been saved."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: drawn.append(figure))
    figures.draw_scores("tiles", rows, Path("unused"))
    return drawn[0]


def test_bands_level_lines_and_an_axis_from_chance_to_100(monkeypatch):
    figure = drawn_scores(monkeypatch, make_rows(MODELS))
    assert [axes.get_title() for axes in figure.axes] == [
        "cells: knn, balanced accuracy",
        "tissue: knn, balanced accuracy",
    ]
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == [
        "student",
        "teacher toy_cells (128 channels)",
        "chance",
        "colour histogram (24 channels)",
    ]
    for axes in figure.axes:
        heights = {}
        for line in axes.get_lines():
            heights[line.get_linestyle()] = np.round(line.get_ydata(), 9).tolist()
        assert heights == {
            "-": [50, 70, 75],
            "--": [90, 90],
            ":": [round(100 / 6, 9)] * 2,
            "-.": [40, 40],
        }
        [band] = axes.collections  # of the student; level ones are patches
        edges = band.get_paths()[0].vertices[:, 1]
        assert {45, 55, 65, 70, 75, 80} <= set(np.round(edges, 9))
        assert [round(patch.get_y(), 9) for patch in axes.patches] == [
            85,
            round(100 / 6 - 5, 9),
            35,
        ]
        low, high = axes.get_ylim()
        assert 100 / 6 - 7 < low < 100 / 6 - 5 and 100 < high < 102
    figure.draw_without_rendering()


def test_what_lies_below_chance_is_on_the_axis_and_without_chance_it_begins_at_0(monkeypatch):
    models = {"student": {4: 0.5, 8: 0.1}, "chance": {0: 0.2}}
    figure = drawn_scores(monkeypatch, make_rows(models, intervals=False))
    assert 7 < figure.axes[0].get_ylim()[0] < 10 and not figure.axes[0].collections
    figure = drawn_scores(monkeypatch, make_rows({"student": {4: 0.5, 8: 0.6}}))
    assert -3 < figure.axes[0].get_ylim()[0] <= 0


def test_one_dim_alone_has_a_point_and_a_bar(monkeypatch):
    figure = drawn_scores(monkeypatch, make_rows({"student": {48: 0.5}, "chance": {0: 0.2}}))
    student, chance = figure.axes[0].get_lines()
    assert list(student.get_xdata()) == [48] and list(chance.get_xdata()) == [0, 1]
    [bar] = figure.axes[0].collections
    assert np.round(bar.get_segments()[0][:, 1], 9).tolist() == [45, 55]


def test_results_of_before_intervals_are_drawn_and_it_is_said(tmp_path, capsys):
    results = {"old": {"rows": make_rows({"student": {4: 0.5, 8: 0.6}}, intervals=False)}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    figures.draw_history(tmp_path, tmp_path)
    assert "no intervals, chance and colour histogram for old" in capsys.readouterr().out
    check_picture(tmp_path / f"accuracy-{figures.file_name('old')}.png")


def test_two_titles_never_share_a_file_name_and_all_are_short():
    titles = [
        "a/b",
        "a-b",
        "a b",
        "b",
        "b/",
        "x/b",
        "..",
        "/",
        "y" * 300,
        "x" + "y" * 300,
        "\udcff",
    ]
    names = {figures.file_name(title) for title in titles}
    assert len(names) == len(titles)
    assert all(len(name) < 50 and "/" not in name for name in names)


def test_retrieval_frames_tell_whether_labels_match(tmp_path, monkeypatch):
    """A bank of two classes: the colours of the frames, tile by tile."""
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: drawn.append(figure))
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    bank = figures.Bank(images, {"class": labels}, torch.eye(6))
    queries = [{"image": images[0], "class": 0}, {"image": images[1], "class": 1}]
    order = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 2, 3, 5]])
    found = {4: (torch.ones(2, 5), order), 48: (torch.ones(2, 5), order)}
    figures.draw_retrieval("mine", found, bank, queries, "class", ["x", "y"], Path("unused"))
    from matplotlib.colors import to_hex

    [caption] = drawn[0].texts
    assert caption.get_text().startswith("mine: the 5 nearest of 6 tiles")
    framed = [axes for axes in drawn[0].axes if axes.get_images()]
    assert len(framed) == 2 * (1 + 2 * 5)
    for axes in framed:
        title = axes.get_title()
        colour = to_hex(axes.spines["left"].get_edgecolor()).upper()
        if title.startswith("query"):
            own = title.removeprefix("query: ")
            assert colour == "#000000"
        else:
            right = title.split()[0] == own
            assert colour == (figures.SAME if right else figures.OTHER)
            assert axes.spines["left"].get_linestyle() == ("-" if right else "--")


def test_patch_maps_name_class_and_model(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: drawn.update({file: figure}))
    run = write_run(tmp_path / "run")
    figures.draw_tiles(str(run / "student.pt"), None, 0, "cpu", tmp_path)
    figure = drawn[tmp_path / "patches-synthetic-tissue.png"]
    assert figure.get_suptitle() == "run, toy after 1 steps"
    _, cells, tissue, _ = data.draw_tissue("test", 0, 0)
    titles = [axes.get_title() for axes in figure.axes]
    named = f"{list(data.CELLS)[cells]}, {data.TISSUES[tissue]}"
    assert titles == [named, "4 channels", "8 channels", "48 channels"]
    sheet = drawn[tmp_path / "retrieval-synthetic-tissue-cells.png"]
    assert "run, toy after 1 steps" in sheet.texts[0].get_text()


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_patch_colours_are_principal_components(dim):
    tokens = torch.randn(2, 9, dim, generator=torch.Generator().manual_seed(0))
    tokens[..., 0] *= 5
    rgb = figures.colours_of(tokens)
    assert rgb.shape == (2, 9, 3) and 0 <= rgb.min() and rgb.max() <= 1
    red = rgb[..., 0].flatten().numpy()  # the first component is the channel that varies most
    assert abs(np.corrcoef(red, tokens[..., 0].flatten().numpy())[0, 1]) > 0.9
    assert torch.equal(rgb[..., dim:], torch.full_like(rgb[..., dim:], 0.5))
    assert figures.colours_of(torch.ones(2, 9, dim)).unique().tolist() == [0.5]


def test_what_cannot_be_drawn_is_one_line(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    for argv, words in (
        ([tmp_path / "none"], "none does not exist"),
        ([run, "--data", tmp_path / "nowhere"], "nowhere"),
        ([run, "--out", tmp_path / "file"], "--out"),
    ):
        assert draw(monkeypatch, *argv) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
    (run / "results.json").write_text("{")
    assert draw(monkeypatch, run) == 2
    assert "results.json cannot be read" in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        figures.import_matplotlib()
