"""The miniature's arithmetic: cuts against numpy, histograms against numpy, claims that hold and that do not."""

import miniature
import numpy as np
import pytest
import torch
from conftest import write_tiles

import data
import evaluate
from student import STUDENTS, Student
from teachers import load_teacher

STEPS = 2  # of the offline teachers


@pytest.fixture
def out(tmp_path, weights_dir):
    """Run folders of four untrained students of seed 0, and the teachers' tiny weights."""
    for i, name in enumerate(miniature.STUDENTS):
        torch.manual_seed(i)
        student, folder = Student("toy", {}, miniature.DIMS), miniature.folder(tmp_path, name, 0)
        config = {
            "arch": STUDENTS["toy"],
            "nested_dims": miniature.DIMS,
            "step": 1,
            "steps": 1,
            "student": "toy",
            "teachers": [],
        }
        data.save_atomically(
            {"state_dict": student.backbone.state_dict(), "config": config}, folder / "student.pt"
        )
    for name in miniature.TASKS.values():
        load_teacher(name, weights_dir, steps=STEPS)
    return tmp_path


def test_every_model_dim_task_and_probe_is_measured_and_untrained_students_fail_the_claims(
    out, weights_dir, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "N_TILES", 48)
    scores = miniature.measure(out, weights_dir, 0, STEPS, None)
    for name in miniature.STUDENTS:
        for key in (
            (name, m, label, probe)
            for m in miniature.DIMS
            for label in miniature.TASKS
            for probe in miniature.PROBES
        ):
            assert 0 <= scores[key] <= 100
    assert not any("histograms" in key[0] for key in scores)
    values = miniature.report([scores, scores])
    assert (
        values["student of both", 48, "cells", "kNN"].tolist()
        == [scores["student of both", 48, "cells", "kNN"]] * 2
    )
    assert not miniature.claims(values, 87.4)
    printed = capsys.readouterr().out
    assert "student of both, PCA" in printed and "wanted >= 10" in printed and "NO" in printed
    miniature.draw(values, out / "figure.png")
    assert (out / "figure.png").exists()


def test_claims_hold_exactly_at_the_margins():
    """Every difference of the three claims, moved one by one just below what is asked."""
    both, flat, cut = (
        "student of both",
        "student of both, not nested",
        "student of both, random projection",
    )
    values = {}
    for label, teacher in miniature.TASKS.items():
        for probe in miniature.PROBES:
            for other in miniature.TASKS.values():
                values[f"teacher {other}", 128, label, probe] = 93.0 if other == teacher else 20.0
                values[f"student of {other}", 48, label, probe] = 90.0 if other == teacher else 75.0
            values[both, 48, label, probe], values[flat, 48, label, probe] = 90.0, 91.0
            values[both, 2, label, probe], values[flat, 2, label, probe] = 60.0, 50.0
            values[cut, 2, label, probe] = 59.9
    as_arrays = {key: np.array([value]) for key, value in values.items()}
    assert miniature.claims(as_arrays, 86.0) and not miniature.claims(as_arrays, 85.9)
    moves = [
        (f"teacher {t}", 128, label, p, 0.1)
        for label, t in miniature.TASKS.items()
        for p in miniature.PROBES
    ]
    for label, teacher in miniature.TASKS.items():
        other = next(t for t in miniature.TASKS.values() if t != teacher)
        for probe in miniature.PROBES:
            moves += [(f"student of {other}", 48, label, probe, 0.1), (flat, 48, label, probe, 0.1)]
            moves += [(flat, 2, label, probe, 0.1), (cut, 2, label, probe, 0.1)]
    for *key, step in moves:
        assert not miniature.claims(
            {**as_arrays, tuple(key): as_arrays[tuple(key)] + step}, 86.0
        ), key


def test_cuts_are_prefixes_principal_axes_and_one_random_projection_for_both_splits():
    generator = torch.Generator().manual_seed(0)
    x = {
        name: {s: torch.randn(90, 48, generator=generator) for s in ("train", "test")}
        for name in miniature.STUDENTS
    }
    x["teacher toy_cells"] = {
        s: torch.randn(90, 128, generator=generator) for s in ("train", "test")
    }
    cuts = miniature.cuts(x, seed=0)
    whole = x["student of both"]
    for m in miniature.DIMS[:-1]:
        assert torch.equal(cuts["student of both", m]["test"], whole["test"][:, :m])
        mean = whole["train"].mean(0).numpy()
        axes = np.linalg.svd(whole["train"].numpy() - mean)[2][:m]  # (m, 48)
        expected = (whole["test"].numpy() - mean) @ axes.T
        got = cuts["student of both, PCA", m]["test"].numpy()
        np.testing.assert_allclose(np.abs(got), np.abs(expected), atol=2e-4)  # an axis has no sign
        z = cuts["student of both, random projection", m]
        projection = torch.linalg.lstsq(whole["train"], z["train"]).solution  # (48, m)
        torch.testing.assert_close(whole["test"] @ projection, z["test"], atol=1e-3, rtol=1e-3)
        assert (projection.abs() > 0.01).float().mean() > 0.9  # of all channels, not of some
    assert torch.equal(cuts["teacher toy_cells", 128]["train"], x["teacher toy_cells"]["train"])
    other = miniature.cuts(x, seed=1)["student of both, random projection", 2]["test"]
    assert not torch.equal(other, cuts["student of both, random projection", 2]["test"])


def test_real_tiles_and_their_colour_histograms(tmp_path, out, weights_dir):
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_tiles(tmp_path / "labelled" / split / name, 4, (64, 64))
    images, labels = miniature.labelled(str(tmp_path / "labelled"))
    assert labels["train"]["class"].bincount().tolist() == [4, 4]
    got = miniature.histograms(images["train"])
    expected = [
        np.concatenate(
            [np.histogram(channel, bins=16, range=(0, 256))[0] / 4096 for channel in image.numpy()]
        )
        for image in images["train"]
    ]
    np.testing.assert_allclose(got.numpy(), np.array(expected), atol=1e-6)
    scores = miniature.measure(out, weights_dir, 0, STEPS, str(tmp_path / "labelled"))
    assert {key[2] for key in scores} == {"class"} and (
        "colour histograms",
        48,
        "class",
        "kNN",
    ) in scores
