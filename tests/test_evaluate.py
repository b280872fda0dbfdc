"""kNN against brute force, and the command line on a labelled folder."""

import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import write_tiles
from PIL import Image

import evaluate
from data import InputError
from student import STUDENTS, Student


def brute_force(train_x, train_y, test_x, test_y, k):
    """One query, one neighbour at a time."""
    predicted = []
    for q in test_x.double():
        similarity = [float(q @ b / (q.norm() * b.norm())) for b in train_x.double()]
        nearest = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:k]
        votes = {}
        for i in nearest:
            votes[int(train_y[i])] = votes.get(int(train_y[i]), 0) + math.exp(similarity[i] / 0.07)
        predicted.append(max(votes, key=votes.get))
    hits = [p == int(y) for p, y in zip(predicted, test_y)]
    recalls = [
        sum(h for h, y in zip(hits, test_y) if y == c) / sum(int(y) == c for y in test_y) for c in set(test_y.tolist())
    ]
    return sum(hits) / len(hits), sum(recalls) / len(recalls)


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_knn_equals_brute_force(k):
    generator = torch.Generator().manual_seed(k)
    centres = torch.randn(4, 6, generator=generator)
    train_y, test_y = torch.randint(4, (60,), generator=generator), torch.randint(3, (37,), generator=generator)
    train_x = centres[train_y] + torch.randn(60, 6, generator=generator)
    test_x = centres[test_y] + torch.randn(37, 6, generator=generator)
    got = evaluate.knn(train_x, train_y, test_x, test_y, k=k)
    accuracy, balanced = brute_force(train_x, train_y, test_x, test_y, min(k, 60))
    assert got["accuracy"] == pytest.approx(accuracy) and got["balanced_accuracy"] == pytest.approx(balanced)
    assert 0.2 < accuracy < 1  # neither chance nor perfect: a wrong vote would show


def test_knn_over_more_queries_than_a_chunk():
    x = torch.randn(2500, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(2500) % 7
    assert evaluate.knn(x, y, x, y, k=1) == {"accuracy": 1.0, "balanced_accuracy": 1.0}


def test_embed_batches_do_not_matter():
    student = Student("toy", {}, [8]).eval()
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    whole, parts = evaluate.embed(student, images), evaluate.embed(student, images, batch_size=2)
    torch.testing.assert_close(whole, parts)
    with torch.no_grad():
        torch.testing.assert_close(whole, student(images)["summary"])


@pytest.fixture
def run(tmp_path):
    student, folder = Student("toy", {}, [4, 8]), tmp_path / "run"
    folder.mkdir()
    arch = STUDENTS["toy"]
    config = {"arch": arch, "nested_dims": [4, 8, 48], "teachers": [], "teacher_recipe": {}, "step": 1, "steps": 2}
    config |= {"student": "toy", "licences": {"uni": "CC-BY-NC-ND-4.0; binds students: yes", "virchow": "Apache-2.0"}}
    torch.save({"state_dict": student.backbone.state_dict(), "config": config}, folder / "student.pt")
    return folder


def test_command_line_on_a_labelled_folder(tmp_path, run, monkeypatch, capsys):
    for split in ("train", "test"):
        for i, name in enumerate(("dark", "light")):
            for path in write_tiles(tmp_path / "labelled" / split / name, 12):
                Image.open(path).point(lambda v, i=i: v // 4 + 190 * i).save(path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--data", str(tmp_path / "labelled"), "--device", "cpu"])
    evaluate.main()
    rows = json.loads((run / "results.json").read_text())[str(tmp_path / "labelled")]["rows"]
    assert [row["dim"] for row in rows] == [4, 8, 48]
    assert rows[-1]["tasks"]["class"] == {"accuracy": 1.0, "balanced_accuracy": 1.0}  # dark against light
    assert "100.0" in capsys.readouterr().out


def test_an_unfinished_run_is_named_and_students_of_two_sizes_are_refused(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate, "N_TILES", 8)
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--device", "cpu"])
    evaluate.main()
    assert "has done 1 of its 2 steps" in capsys.readouterr().out
    models = {name: (Student(name, {}, []).eval(), [8]) for name in ("toy", "vit_s")}
    with pytest.raises(InputError, match="side by side"):
        evaluate.report(models, [run], None, 0)
    (run / "results.json").write_text("{")
    with pytest.raises(InputError, match="results.json cannot be read"):
        evaluate.report({"toy": models["toy"]}, [run], None, 0)


def test_results_on_other_data_are_kept(run, monkeypatch):
    monkeypatch.setattr(evaluate, "N_TILES", 8)
    (run / "results.json").write_text('{"elsewhere": 1}')
    evaluate.report({"student": (Student("toy", {}, []).eval(), [48])}, [run / "student.pt"], None, seed=3)
    results = json.loads((run / "results.json").read_text())
    assert results["elsewhere"] == 1 and results["synthetic tissue"]["seed"] == 3
    assert set(results["synthetic tissue"]["rows"][0]["tasks"]) == {"cells", "tissue"}


def test_what_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(InputError, match="student.pt does not exist"):
        evaluate.load_student(tmp_path)
    torch.save({"something": torch.zeros(1)}, tmp_path / "student.pt")
    with pytest.raises(InputError, match="not a student.pt"):
        evaluate.load_student(tmp_path)
    content = torch.load(run / "student.pt", weights_only=True)
    content["state_dict"]["norm.weight"] = torch.zeros(7)
    torch.save(content, run / "student.pt")
    with pytest.raises(InputError, match=r"norm.weight is \(7,\), expected \(48,\)"):
        evaluate.load_student(run)


def test_export_holds_the_cut_embeddings_paths_and_licences(tmp_path, run, monkeypatch, capsys):
    write_tiles(tmp_path / "tiles" / "a", 70, (90, 70))
    write_tiles(tmp_path / "tiles" / "b", 60, (64, 64))
    (tmp_path / "tiles" / "a" / "tile_003.png").write_bytes(b"broken")

    def export(*flags):
        monkeypatch.setattr("sys.argv", ["evaluate.py", str(run), "--device", "cpu", *map(str, flags)])
        evaluate.main()

    export("--embed", tmp_path / "tiles", "--dim", 7, "--out", tmp_path / "x.npz")
    exported = np.load(tmp_path / "x.npz")  # no pickle inside
    names = [f"a/tile_{i:03d}.png" for i in range(70) if i != 3] + [f"b/tile_{i:03d}.png" for i in range(60)]
    assert exported["paths"].tolist() == names and exported["embeddings"].shape == (129, 7)
    assert (exported["dim"], exported["model"], exported["step"]) == (7, "toy", 1)
    licences = ["uni: CC-BY-NC-ND-4.0; binds students: yes", "virchow: Apache-2.0"]
    assert exported["licences"].tolist() == licences and licences[0] in capsys.readouterr().out
    student, _ = evaluate.load_student(run)
    for i in (0, 3, 128):  # beside one tile at a time, opened by hand
        image = Image.open(tmp_path / "tiles" / names[i])
        width, height = (round(side * 64 / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left = round((width - 64) / 2)
        pixels = torch.from_numpy(np.array(image.crop((left, 0, left + 64, 64)))).permute(2, 0, 1)
        with torch.no_grad():
            expected = student(pixels[None])["summary"][0, :7]
        torch.testing.assert_close(torch.from_numpy(exported["embeddings"][i]), expected, atol=1e-4, rtol=1e-4)
    export("--embed", tmp_path / "tiles" / "b", "--half", "--out", tmp_path / "y.npz")
    half = np.load(tmp_path / "y.npz")["embeddings"]
    assert half.dtype == np.float16 and half.shape == (60, 48)
    np.testing.assert_allclose(half[:, :7], exported["embeddings"][69:], atol=2e-3, rtol=2e-3)
    for flags, message in (
        (["--embed", tmp_path / "tiles", "--out", tmp_path / "x.npz"], "--out: .*x.npz exists"),
        (["--embed", tmp_path / "tiles"], "--embed takes one RUN, and --out"),
        (["--embed", tmp_path / "tiles", "--dim", 49, "--out", tmp_path / "z.npz"], "--dim: 49 is above the width"),
        (["--embed", tmp_path / "none", "--out", tmp_path / "z.npz"], "--embed: .*none is not a folder"),
    ):
        with pytest.raises(InputError, match=message):
            export(*flags)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="cannot write .*z.npz: .*No space left"):
        export("--embed", tmp_path / "tiles", "--out", tmp_path / "z.npz")
    assert not list(tmp_path.glob("z.npz*"))
