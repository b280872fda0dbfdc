"""kNN against brute force, and the command line on a labelled folder."""

import json
import math

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
    config = {"arch": arch, "nested_dims": [4, 8, 48], "teachers": {}, "teacher_recipe": {}, "step": 1, "steps": 2}
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
    with pytest.raises(InputError, match=r"norm.weight is \(7,\), not \(48,\)"):
        evaluate.load_student(run)
