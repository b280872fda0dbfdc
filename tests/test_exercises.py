"""The exercises' code as it stands in EXERCISES.md, run with a tiny budget in a copy of the sources."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, copy_sources, oracle, write_tiles

from data import TissueTiles, labelled_files
from evaluate import embed, knn
from student import load_student

TEXT = (ROOT / "EXERCISES.md").read_text()
TINY = "--steps 8 --teacher-steps 2 --batch-size 4 --log-every 1 --device cpu"
SECTIONS = dict(re.findall(r"^## (\d)\. (.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def code(exercise: str) -> list[str]:
    return re.findall(r"```py\n(.*?)```", SECTIONS[exercise], re.DOTALL)


def replace(folder, exercise: str) -> None:
    """Do what 'In `file`, in place of `function`:' says, with the code below it."""
    [(file, name, new)] = re.findall(
        r"In `(\w+\.py)`, in place of `([\w.]+)`:\n\n```py\n(.*?)```", SECTIONS[exercise], re.DOTALL
    )
    node = ast.parse(source := (folder / file).read_text())
    for part in name.split("."):
        [node] = [x for x in node.body if getattr(x, "name", "") == part]
    lines = source.splitlines(keepends=True)
    (folder / file).write_text(
        "".join(lines[: node.lineno - 1]) + new + "".join(lines[node.end_lineno :])
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The sources as they are, with a demo's run and the teachers that it made."""
    folder = copy_sources(tmp_path_factory.mktemp("demo"))
    python(folder, "train.py", *TINY.split())
    return folder


@pytest.fixture
def copy(tmp_path, demo):
    """Sources to change, beside the teachers."""
    shutil.copytree(demo / "weights", tmp_path / "weights")
    return copy_sources(tmp_path)


def python(folder, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def log(folder, run: str) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "runs" / run / "log.jsonl").read_text().splitlines()
    ]


def test_eight_exercises_each_with_files_command_result_and_reason():
    assert list(SECTIONS) == list("12345678")
    for section in SECTIONS.values():
        assert all(
            word in section
            for word in ("**Files**", "**Run**", "**What should come out.**", "**Why.**")
        )


def test_random_projections_against_nesting(demo):
    [script] = code("1")
    assert script.count("draw(1024)") == 1
    (demo / "cuts.py").write_text(script.replace("draw(1024)", "draw(96)"))
    rows = re.findall(
        r"(\d) channels, (\w+): cells ([\d.]+)%, tissue ([\d.]+)%", python(demo, "cuts.py")
    )
    assert [(m, name) for m, name, *_ in rows] == [
        (m, name) for m in "248" for name in ("prefix", "random", "PCA")
    ]
    student, _ = load_student(demo / "runs/demo")
    bank, test = (TissueTiles(stream, 0).draw(96) for stream in ("bank", "test"))
    z, q = (embed(student, tiles["image"]) for tiles in (bank, test))
    for m, _, *scores in rows[::3]:  # the prefixes, by slices
        z_m, q_m = (x[:, : int(m)] - z[:, : int(m)].mean(0) for x in (z, q))
        for label, score in zip(("cells", "tissue"), scores):
            ours = 100 * knn(z_m, bank[label], q_m, test[label])["accuracy"]
            assert float(score) == pytest.approx(
                ours, abs=1.1
            )  # another order of sums can move one tile of 96


def test_plain_mse_on_raw_features(copy):
    """The teacher that is ten times as loud has a hundred times the loss, and with standardised targets it has not."""
    replace(copy, "3")
    python(copy, "-c", code("3")[1])
    shares = {}
    for name in ("none", "phi-s"):
        flags = ["--weights-dir", "loud", "--standardize", name, "--out", f"runs/{name}"]
        python(copy, "train.py", *flags, *TINY.split())
        terms = log(copy, name)[0]["terms"]
        shares[name] = terms["toy_tissue/mse"]["48"] / terms["toy_cells/mse"]["48"]
    assert shares["none"] > 30 and 0.5 < shares["phi-s"] < 2


def test_sampled_dims(copy):
    replace(copy, "4")
    python(copy, "train.py", "--out", "runs/sampled", *TINY.split())
    dims = [list(line["terms"]["toy_cells/summary_cos"]) for line in log(copy, "sampled")]
    assert len(dims) == 8 and all(first == "48" for first, _ in dims)
    assert {second for _, second in dims} <= {"2", "4", "8", "16"} and len(
        {second for _, second in dims}
    ) > 1


def test_shared_heads(copy):
    """Only the heads of the whole dim learn, and channels from `dim` on have no part in a prediction."""
    replace(copy, "5")
    python(copy, "train.py", "--out", "runs/shared", *TINY.split())
    last = torch.load(copy / "runs/shared/last.pt", weights_only=True)["student"]
    script = (
        "import torch; from student import *; torch.manual_seed(0); from train import DEFAULTS\n"
    )
    script += "s = Student('toy', {'toy_cells': 128, 'toy_tissue': 128}, DEFAULTS['toy']['dims'])\n"
    script += "torch.save(s.state_dict(), 'first.pt')\n"
    script += "z = {'summary': torch.randn(3, 48), 'patches': torch.randn(3, 4, 48)}\n"
    script += "cut = {kind: torch.cat([x[..., :4], torch.randn_like(x[..., 4:])], -1) for kind, x in z.items()}\n"
    script += "a, b = (s.adapt(tokens, 4)['toy_cells']['patches'] for tokens in (z, cut)); print(torch.equal(a, b))\n"
    script += (
        "print(torch.equal(*(s.adapt(tokens, 8)['toy_cells']['patches'] for tokens in (z, cut))))"
    )
    assert python(copy, "-c", script).split() == ["True", "False"]
    first = torch.load(copy / "first.pt", weights_only=True)
    moved = {
        key.split(".")[2]
        for key in last
        if key.startswith("adaptors.") and not torch.equal(first[key], last[key])
    }
    assert moved == {"48"}


def test_grouped_splits(tmp_path):
    """Its labels.csv is read as it stands, and no slide lies on both sides."""
    oracle("sklearn")
    for label in ("a", "b"):
        for slide in range(10):
            for path in write_tiles(tmp_path / "DIR" / label, 2, (8, 8), "jpg"):
                path.rename(path.with_name(f"{label}{slide}_{path.stem[-1]}.jpg"))
    python(tmp_path, "-c", code("6")[0])
    found = labelled_files(tmp_path / "DIR")
    slides = {
        split: {Path(file).name.split("_")[0] for file in files}
        for split, (files, _) in found.items()
    }
    assert (
        sum(len(files) for files, _ in found.values()) == 40
        and not slides["train"] & slides["test"]
    )
