"""Exported students: what timm makes of the folder alone, what it says, what is refused."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import oracle, randomise, write_tiles
from forks import python as fork
from PIL import Image
from test_evaluate import plain_knn, plain_retrieval, write_run, write_tissue

import data
import evaluate
from evaluate import CentreTiles, embed, load_student
from extras import export
from student import IMAGENET, STUDENTS, Student, to_float
from teachers import load_init

CUTS = {"toy": (7, 16), "vit_s": (1, 96), "vit_b": (48, 767)}


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    return write_tissue(tmp_path_factory.mktemp("tissue"))


def write_student(folder, name):
    """A run folder of a student of published size, with random weights."""
    config = {"student": name, "arch": STUDENTS[name], "step": 1, "steps": 1, "teachers": []}
    config["nested_dims"] = [STUDENTS[name]["width"]]
    state = randomise(Student(name)).backbone.state_dict()
    folder.mkdir()
    torch.save({"state_dict": state, "config": config}, folder / "student.pt")
    return folder


def export_as_typed(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, argv)])
    export.main()


# ---- timm, without this repository ---------------------------------------------------------------

ALONE = """
import importlib.util, sys
from pathlib import Path

import timm, torch
from PIL import Image

assert importlib.util.find_spec("student") is None  # this repository is out of reach
work = Path(sys.argv[1])

def stub(repo_id, filename, **options):
    assert repo_id == "user/name"
    return str(work / f"student-{dim}" / filename)

@torch.no_grad()
def look(name):
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    views = [transform(Image.open(file)) for file in sorted((work / "tiles").iterdir())]
    x = torch.stack(views)
    return {"views": x, "features": model(x), "tokens": model.forward_features(x)}, model

seen = {}
for dim in sys.argv[2:]:
    seen[dim], model = look(f"local-dir:{work}/student-{dim}")
    if dim == sys.argv[2]:
        timm.models.save_for_hf(model, work / "saved", safe_serialization=True)
        seen[dim + " saved"], _ = look(f"local-dir:{work}/saved")
        timm.models._hub.hf_hub_download = stub
        seen[dim + " hub"], _ = look("hf-hub:user/name")
torch.save(seen, work / "seen.pt")
"""


@pytest.mark.parametrize("name", CUTS)
def test_timm_alone_gives_the_same_features(tmp_path, monkeypatch, name):
    """In a fresh process that has no path to this repository."""
    oracle("timm")
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # saves seconds
    run = write_student(tmp_path / name, name)
    size = STUDENTS[name]["img_size"]
    files = write_tiles(tmp_path / "tiles", 2, (size + 40, size + 13))
    tiles = CentreTiles(tmp_path / "tiles", size, [file.name for file in files])
    images = torch.stack([tiles[0]["image"], tiles[1]["image"]])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    views = (to_float(images) - mean) / std
    student, _ = load_student(run)
    z = embed(student, images)
    assert z.std() > 0.1 and (z[0] - z[1]).abs().max() > 1e-3
    dims = [*CUTS[name], student.width]
    for dim in dims:
        export.export(run, tmp_path / f"student-{dim}", dim)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", ALONE, tmp_path, *map(str, dims)]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    for folder in tmp_path.iterdir():  # of a vit_b a gigabyte
        if folder.is_dir():
            shutil.rmtree(folder)
    assert len(seen) == 3 + 2  # the smallest cut as saved by timm and as on Hugging Face too
    for key, found in seen.items():
        dim = int(key.split()[0])
        assert found["features"].shape == (2, dim)
        assert (found["views"] - views).abs().max() <= 1e-6, key
        assert (found["features"] - z[:, :dim]).abs().max() <= 1e-6, key
        assert found["tokens"][..., dim:].eq(0).all()  # of num_classes=0, and of patches


def timm_features(folder, tiles):
    """Features of all tiles of a class folder by Pillow and timm -> x, y."""
    timm = oracle("timm")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = []
    labels = []
    for file in sorted(tiles.rglob("*.png")):
        images.append(transform(Image.open(file)))
        labels.append(int(file.parent.name))
    with torch.no_grad():
        return model(torch.stack(images)), torch.tensor(labels)


@pytest.mark.parametrize("dim", [7, 48])
def test_tasks_on_timms_features_give_what_evaluate_finds(
    tmp_path, run, monkeypatch, capsys, tissue, dim
):
    cut = tmp_path / "cut"
    export_as_typed(monkeypatch, run, "--dim", dim, f"{cut}/")
    assert f"local-dir:{cut}" in capsys.readouterr().out
    problem = [*timm_features(cut, tissue / "train"), *timm_features(cut, tissue / "test")]
    assert problem[0].shape[1] == dim
    tasks = ["knn", "retrieval"]
    student, _ = load_student(run)
    row, *_ = evaluate.run_tasks({"whole": (student, [dim])}, tissue, 0, tasks)["rows"]
    scores = row["scores"]["class"]
    assert scores["knn"] == pytest.approx(plain_knn(problem, 20), abs=1e-9)
    assert scores["retrieval"] == pytest.approx(plain_retrieval(problem), abs=1e-9)
    assert 1.1 / 6 < scores["knn"]["accuracy"] < 0.95  # neither chance nor perfect
    student, _ = load_student(cut)  # an exported folder is a RUN as any other
    row, *_ = evaluate.run_tasks({"cut": (student, [dim])}, tissue, 0, tasks)["rows"]
    assert row["scores"]["class"] == scores


def test_num_classes_0_gives_all_channels_with_zeros(tmp_path, run):
    timm = oracle("timm")
    export.export(run, tmp_path / "cut", 7)
    model = timm.create_model(f"local-dir:{tmp_path / 'cut'}", pretrained=True, num_classes=0)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        z = model.eval()(x)
        whole = load_student(run)[0].backbone(x)[:, 0]
    assert z.shape == (2, 48) and z[:, 7:].eq(0).all()
    torch.testing.assert_close(z[:, :7], whole[:, :7], atol=1e-6, rtol=0)


def test_an_architecture_that_is_none_of_ours(tmp_path):
    """All of its arguments are written, so that timm's own defaults do not count."""
    timm = oracle("timm")
    arch = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 80, "registers": 0}
    run = write_run(tmp_path / "run", pos_on_prefix=True, **arch)
    export.export(run, tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        z = load_student(run)[0].backbone(x)[:, 0]
        torch.testing.assert_close(model(x), z, atol=1e-6, rtol=0)


# ---- a folder as RUN, and to begin from ----------------------------------------------------------


def test_a_cut_student_offers_no_dim_beyond_its_own(tmp_path, run):
    export.export(run / "student.pt", tmp_path / "cut", 7)
    student, config = load_student(tmp_path / "cut")
    assert config["nested_dims"] == [4, 7] and student.width == 7
    before = torch.load(run / "student.pt", weights_only=True)["config"]
    assert config.pop("trained_dims") == before["nested_dims"]
    assert {**config, "nested_dims": 0} == {**before, "nested_dims": 0}
    export.export(tmp_path / "cut", tmp_path / "again", 4)  # and may be cut again
    again = load_student(tmp_path / "again")[1]
    assert again["nested_dims"] == [4] and again["trained_dims"] == before["nested_dims"]


def test_a_cut_between_nested_dims_is_said(tmp_path, run, monkeypatch, capsys):
    told = {}
    for dim in (7, 8):
        export_as_typed(monkeypatch, run, tmp_path / f"cut-{dim}", "--dim", dim)
        told[dim] = "none of the nested dims (4, 8, 48)" in capsys.readouterr().out
    assert told == {7: True, 8: False}


def test_embed_takes_an_exported_folder(tmp_path, run):
    write_tiles(tmp_path / "tiles", 3, (64, 64))
    export.export(run, tmp_path / "cut", 7)
    for name in (run, "cut"):
        child = fork(tmp_path, "evaluate.py", name, "--embed", "tiles", "--out", f"{name}.npz")
        assert child.code == 0, child.err
    whole = np.load(f"{run}.npz")
    cut = np.load(tmp_path / "cut.npz")
    assert cut["dim"] == 7 and cut["licences"].tolist() == whole["licences"].tolist()
    np.testing.assert_array_equal(cut["embeddings"], whole["embeddings"][:, :7])
    words = ["evaluate.py", "cut", "--embed", "tiles", "--out", "x.npz", "--dim", "8"]
    assert fork(tmp_path, *words).fails("--dim: 8 is above the width of cut; give at most 7")


def test_init_begins_from_an_exported_folder(tmp_path, run):
    export.export(run, tmp_path / "cut", 7)
    student = Student("toy")
    licences = load_init(student.backbone, str(tmp_path / "cut"))
    assert licences == torch.load(run / "student.pt", weights_only=True)["config"]["licences"]
    expected = load_student(run)[0].backbone.state_dict()
    for key in ("norm.weight", "norm.bias"):
        expected[key][7:] = 0
    for key, tensor in student.backbone.state_dict().items():
        assert tensor.equal(expected[key]), key
    entry = json.loads((tmp_path / "cut" / "config.json").read_text())
    del entry["pathryoshka"]  # as timm itself saves it: then nobody knows what binds the student
    (tmp_path / "cut" / "config.json").write_text(json.dumps(entry))
    [licence] = load_init(student.backbone, str(tmp_path / "cut")).values()
    assert licence.startswith("unknown")
    with pytest.raises(data.InputError, match="model.safetensors is not a student.pt"):
        load_student(tmp_path / "cut")


# ---- the card ------------------------------------------------------------------------------------


def read_card(folder):
    """The card as Hugging Face's own library reads it."""
    return oracle("huggingface_hub").ModelCard.load(folder / "README.md")


def rows_of(card):
    """The cells of all rows of the card's tables, by the first."""
    rows = {}
    for line in card.text.splitlines():
        if line.startswith("|"):
            first, *others = line.strip("| ").split(" | ")
            rows.setdefault(first, []).append(others)
    return rows


def test_the_card_tells_what_is_known(tmp_path, run, monkeypatch, tissue):
    file = run / "student.pt"
    content = torch.load(file, weights_only=True)
    content["config"] |= {"teachers": ["uni", "virchow"], "step": 1500, "steps": 2000}
    content["config"]["tiles"] = "9 tiles of a|b, one view each, outputs from a cache"
    torch.save(content, file)
    torch.save({"args": {"lr": 0.001, "batch_size": 8, "workers": 3}}, run / "last.pt")
    words = ["evaluate.py", run, "--data", tissue, "--tasks", "knn,adaptive", "--device", "cpu"]
    assert fork(tmp_path, *words, "--teachers", "").code == 0
    export_as_typed(monkeypatch, run, "--dim", 8, tmp_path / "cut")
    card = read_card(tmp_path / "cut")
    assert card.data.library_name == "timm" and "pathology" in card.data.tags
    assert card.data.license == "other" and card.data.base_model == [
        "MahmoodLab/UNI",
        "paige-ai/Virchow",
    ]
    rows = rows_of(card)
    [[tile, licence]] = [rows[key][0] for key in rows if key.startswith("uni (")]
    assert (tile, licence) == ("256 at 0.5", content["config"]["licences"]["uni"])
    assert rows["steps done"] == [["1,500 of 2,000"]] and rows["--lr"] == [["0.001"]]
    assert rows["tiles"] == [["9 tiles of a\\|b, one view each, outputs from a cache"]]
    assert rows["teachers' outputs from a cache"][0][0].startswith("yes")
    assert "--workers" not in rows
    shown = {}
    for model in (str(run), "chance", "colour histogram"):
        for dim, value in rows[model]:
            shown[model, dim] = value
    expected = {}
    for row in json.loads((run / "results.json").read_text())[str(tissue)]["rows"]:
        value = 100 * row["scores"]["class"]["knn"]["balanced_accuracy"]
        low, high = row["intervals"]["class"]["knn"]["balanced_accuracy"]
        dim = "-" if row["model"] in evaluate.BASELINES else str(row["dim"])
        expected[row["model"], dim] = f"{value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    del expected[str(run), "48"]  # cut off
    assert shown == expected and len(shown) == 4
    assert "normalise after the cut" in card.text
    assert "Trained at the nested dims 4, 8, 48." in card.text
    export_as_typed(monkeypatch, run, tmp_path / "whole")  # here `adaptive` means something too
    assert [len(row) for row in rows_of(read_card(tmp_path / "whole"))[str(run)]] == [3, 3, 3]


def test_the_card_claims_nothing_that_is_not_known(tmp_path, run, monkeypatch, capsys):
    export_as_typed(monkeypatch, run, tmp_path / "a")
    text = read_card(tmp_path / "a").text
    assert "Nothing was measured" in text and "| tiles | not known |" in text
    assert "not known: the run's last.pt" in text
    (run / "results.json").write_text('{"old": {"rows": []}}')  # of an earlier save
    os.utime(run / "results.json", (1, 1))
    capsys.readouterr()
    export_as_typed(monkeypatch, run, tmp_path / "b")
    assert "results.json is older than student.pt" in capsys.readouterr().out
    assert "Nothing was measured" in read_card(tmp_path / "b").text


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        ({"midnight": "MIT; binds students: no"}, "apache-2.0"),
        ({"gigapath": "Apache-2.0; binds students: no, but ... research only"}, "other"),
        ({"midnight": "MIT; binds students: no", "x.pth": "unknown"}, "other"),
        ({}, "other"),
    ],
)
def test_the_cards_licence_is_free_only_where_all_are(tmp_path, run, licences, expected):
    content = torch.load(run / "student.pt", weights_only=True)
    content["config"]["licences"] = licences
    torch.save(content, run / "student.pt")
    export.export(run, tmp_path / "out")
    assert read_card(tmp_path / "out").data.license == expected


# ---- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_exported_is_one_line(tmp_path, run, monkeypatch, capsys):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "unsaved").mkdir()
    swiglu = write_run(tmp_path / "swiglu", swiglu=True)
    out = tmp_path / "x"
    before = sorted(os.listdir(tmp_path))
    for argv, words in (
        ([run, "--dim", 7, tmp_path / "mine"], "mine exists"),
        ([run, "--dim", 7, tmp_path / "folder"], "folder exists"),
        ([run, "--dim", 7, tmp_path / "link"], "link exists"),
        ([run, "--dim", 7, tmp_path / "mine" / "x"], "cannot write"),
        ([run, "--dim", 49, out], "--dim: 49 is above the width"),
        ([run, "--dim", 0, out], "--dim"),
        ([run], "OUT"),
        ([tmp_path / "none", "--dim", 7, out], "none does not exist"),
        ([tmp_path / "unsaved", out], "student.pt does not exist; give the folder of a run that"),
        ([swiglu, out], "SwiGLU"),
    ):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            data.run_program(export.main)
        [line] = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and words in line, line
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "mine").read_bytes() == b"mine"


def test_without_safetensors_the_pip_command_is_named(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(data.InputError, match="pip install safetensors"):
        export.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", [1, 3, 5, "rename"])  # a file is followed by its folder
def test_an_interrupted_export_leaves_nothing(tmp_path, run, monkeypatch, moment):
    calls = []

    def full(*args):
        calls.append(args)
        if moment in (len(calls), "rename"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename" if moment == "rename" else "fsync", full)
    with pytest.raises(data.InputError, match="cannot write .*: .*No space left on device"):
        export.export(run, tmp_path / "parent" / "out")
    assert calls and not list((tmp_path / "parent").iterdir())
