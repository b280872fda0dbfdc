"""Cut students: what timm makes of them alone, and what is refused."""

import sys

import numpy as np
import pytest
import torch
from conftest import oracle
from PIL import Image
from test_evaluate import plain_knn, plain_retrieval, write_run, write_tissue

import data
import evaluate
from evaluate import load_student
from extras import export


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    return write_tissue(tmp_path_factory.mktemp("tissue"))


def export_as_typed(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, argv)])
    export.main()


def timm_student(path):
    """The toy student's architecture as timm has it, weights from a file of ours."""
    arch = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3}
    model = oracle("timm").create_model(
        "vit_base_patch16_224",
        num_classes=0,
        checkpoint_path=str(path),
        reg_tokens=1,
        no_embed_class=True,
        **arch,
    )
    return model.eval()


def timm_features(model, folder):
    """Features of all tiles of a class folder by Pillow and timm, with ImageNet's mean and std -> x, y."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    images = []
    labels = []
    for file in sorted(folder.rglob("*.png")):
        images.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
        labels.append(int(file.parent.name))
    with torch.no_grad():
        return model((torch.stack(images) / 255 - mean) / std), torch.tensor(labels)


@pytest.mark.parametrize("dim", [7, 48])
def test_the_cut_student_loaded_by_timm_alone_gives_the_same_numbers(
    tmp_path, run, monkeypatch, capsys, tissue, dim
):
    cut = tmp_path / "cut" / "student.pt"
    export_as_typed(monkeypatch, run, "--dim", dim, cut)
    assert str(cut) in capsys.readouterr().out
    model = timm_student(cut)
    problem = [*timm_features(model, tissue / "train"), *timm_features(model, tissue / "test")]
    assert problem[0].shape[1] == 48 and problem[0][:, :dim].abs().min(1)[0].max() > 0
    assert dim == 48 or problem[0][:, dim:].abs().max() == 0  # zeros, which change no cosine
    full, _ = timm_features(timm_student(run / "student.pt"), tissue / "test")
    torch.testing.assert_close(problem[2][:, :dim], full[:, :dim], atol=1e-5, rtol=1e-5)
    tasks = ["knn", "retrieval"]
    student, _ = load_student(run)
    [row] = evaluate.run_tasks({"whole": (student, [dim])}, tissue, 0, tasks)["rows"]
    scores = row["scores"]["class"]
    assert scores["knn"] == pytest.approx(plain_knn(problem, 20), abs=1e-9)
    assert scores["retrieval"] == pytest.approx(plain_retrieval(problem), abs=1e-9)
    assert 1.1 / 6 < scores["knn"]["accuracy"] < 0.95  # neither chance nor perfect
    student, _ = load_student(cut.parent)  # a cut student is a RUN as any other
    [row] = evaluate.run_tasks({"cut": (student, [dim])}, tissue, 0, tasks)["rows"]
    assert row["scores"]["class"] == scores


def test_a_cut_student_offers_no_dim_beyond_its_own(tmp_path, run, monkeypatch):
    export_as_typed(monkeypatch, run / "student.pt", "--dim", 7, tmp_path / "cut.pt")
    _, config = load_student(tmp_path / "cut.pt")
    assert config["nested_dims"] == [4, 7]
    before = torch.load(run / "student.pt", weights_only=True)["config"]
    assert {**config, "nested_dims": 0} == {**before, "nested_dims": 0}


def test_what_cannot_be_exported_is_one_line(tmp_path, run, monkeypatch, capsys):
    (tmp_path / "mine.pt").write_bytes(b"mine")
    out = tmp_path / "x.pt"
    for argv, words in (
        ([run, "--dim", 7, tmp_path / "mine.pt"], "mine.pt exists"),
        ([run, "--dim", 49, out], "--dim: 49 is above the width"),
        ([run, "--dim", 0, out], "--dim"),
        ([run, out], "--dim"),
        ([tmp_path / "none", "--dim", 7, out], "none does not exist"),
    ):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            data.run_program(export.main)
        [line] = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and words in line, line
    assert (tmp_path / "mine.pt").read_bytes() == b"mine" and not out.exists()
