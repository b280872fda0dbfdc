"""The exercises' code as it stands in EXERCISES.md, run with a tiny budget, in forked processes."""

import importlib
import inspect
import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT, oracle, write_tiles
from forks import python as fork

import losses
import train
from data import TissueTiles
from evaluate import embed, figures_of, knn, labelled_files, load_student

TEXT = (ROOT / "EXERCISES.md").read_text()
TINY = "--steps 8 --teacher-steps 2 --batch-size 4 --stats-tiles 32 --log-every 1 --device cpu"
SECTIONS = dict(re.findall(r"^## (\d+)\. (.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def code(exercise: str) -> list[str]:
    return re.findall(r"```py\n(.*?)```", SECTIONS[exercise], re.DOTALL)


def replaced(exercise: str):
    """Does, in a process, what 'In `file`, in place of `function`:' says, with the code below."""
    pattern = r"In `(\w+)\.py`, in place of `([\w.]+)`:\n\n```py\n(.*?)```"
    [(file, name, new)] = re.findall(pattern, SECTIONS[exercise], re.DOTALL)
    module = importlib.import_module(file)
    *owners, function = name.split(".")
    owner = module
    for part in owners:
        owner = getattr(owner, part)

    def patch():
        assert hasattr(owner, function)
        exec(textwrap.dedent(new), vars(module))
        setattr(owner, function, vars(module)[function])

    return patch


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with a demo's run and the teachers that it made."""
    folder = tmp_path_factory.mktemp("demo")
    python(folder, "train.py", *TINY.split())
    return folder


@pytest.fixture
def copy(tmp_path, demo):
    """A folder with the teachers."""
    shutil.copytree(demo / "weights", tmp_path / "weights")
    return tmp_path


def nothing():
    pass


def python(folder, *words: str, patch=nothing) -> str:
    child = fork(folder, *words, patch=patch)
    assert child.code == 0, child.err
    return child.out


def log(folder, run: str) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "runs" / run / "log.jsonl").read_text().splitlines()
    ]


def test_ten_exercises_each_with_goal_files_command_result_and_reason():
    assert list(SECTIONS) == [str(number) for number in range(1, 11)]
    for section in SECTIONS.values():
        places = []
        for word in ("**Goal**", "**Files**", "**Run**", "**What should come out.**", "**Why.**"):
            places.append(section.index(word))
        assert places == sorted(places)
    for line in TEXT.splitlines():
        assert len(line) <= 110, line


def test_the_list_at_the_top_leads_to_every_exercise():
    titles = {number: section.splitlines()[0] for number, section in SECTIONS.items()}
    listed = re.findall(r"^\| (\d+) \| \[(.+?)\]\(#(.+?)\)", TEXT, re.MULTILINE)
    assert {number: title for number, title, _ in listed} == titles
    for number, title, anchor in listed:  # as GitHub makes anchors of headings
        words = re.sub(r"[^\w\s-]", "", f"{number}. {title}".lower())
        assert anchor == words.replace(" ", "-")


def test_random_projections_against_nesting(demo):
    [script] = code("1")
    assert script.count("draw(1024)") == 2
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
        for label, score in zip(("cells", "tissue"), scores, strict=True):
            ours = 100 * figures_of(knn(z_m, bank[label], q_m, test[label]))["accuracy"]
            assert float(score) == pytest.approx(
                ours, abs=1.1
            )  # another order of sums can move one tile of 96


def test_plain_mse_on_raw_features(copy):
    """The teacher that is ten times as loud has a hundred times the loss, and with standardised
    targets it has not."""
    python(copy, "-c", code("3")[1])
    shares = {}
    for name in ("none", "phi-s"):
        flags = ["--weights-dir", "loud", "--standardize", name, "--out", f"runs/{name}"]
        python(copy, "train.py", *flags, *TINY.split(), patch=replaced("3"))
        terms = log(copy, name)[0]["terms"]
        mse = {"toy_tissue": 0.0, "toy_cells": 0.0}
        for t in mse:
            mse[t] = terms[f"{t}/summary_mse@48"] + terms[f"{t}/patch_mse@48"]
        shares[name] = mse["toy_tissue"] / mse["toy_cells"]
    assert shares["none"] > 30 and 0.5 < shares["phi-s"] < 2


def test_sampled_dims(copy):
    python(copy, "train.py", "--out", "runs/sampled", *TINY.split(), patch=replaced("4"))
    seen = []
    for line in log(copy, "sampled"):
        dims = {int(term.split("@")[1]) for term in line["terms"]}
        assert len(dims) == 2 and 48 in dims
        seen += dims - {48}
    assert len(seen) == 8 and set(seen) <= {2, 4, 8, 16} and len(set(seen)) > 1


def test_shared_heads(copy):
    """Only the heads of the whole dim learn, and channels from `dim` on have no part in a
    prediction."""
    python(copy, "train.py", "--out", "runs/shared", *TINY.split(), patch=replaced("5"))
    last = torch.load(copy / "runs/shared/last.pt", weights_only=True)["adaptors"]
    (copy / "first.py").write_text(SHARED)
    assert python(copy, "first.py", patch=replaced("5")).split() == ["True", "False"]
    first = torch.load(copy / "first.pt", weights_only=True)
    moved = set()
    for key, value in last.items():  # heads.TEACHER.DIM. ...
        if not torch.equal(first[key], value):
            moved.add(key.split(".")[2])
    assert moved == {"48"}


SHARED = """
import torch
from student import Adaptors, Student
from train import DEFAULTS

torch.manual_seed(0)
Student("toy")
adaptors = Adaptors(48, {"toy_cells": 128, "toy_tissue": 128}, DEFAULTS["toy"]["dims"])
torch.save(adaptors.state_dict(), "first.pt")
z = {"summary": torch.randn(3, 48), "patches": torch.randn(3, 4, 48)}
changed = {}
for kind, x in z.items():
    changed[kind] = torch.cat([x[..., :4], torch.randn_like(x[..., 4:])], -1)
a, b = adaptors(z), adaptors(changed)
for m in (4, 8):
    print(torch.equal(a[m]["toy_cells"]["patches"], b[m]["toy_cells"]["patches"]))
"""


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


def test_stain_jitter(copy):
    """Only what the student sees is changed, within [0, 1], and by nothing where sigma is 0."""
    [function] = code("7")
    loop = inspect.getsource(train.train)
    assert loop.count("predictions = model(images)") == 1
    assert "`predictions = model(stain_jitter(images))`" in SECTIONS["7"]
    loop = loop.replace("model(images)", "model(stain_jitter(images))")

    def patch():
        exec(function + "\n\n" + loop, vars(train))

    plain = python(copy, "train.py", "--out", "runs/plain", *TINY.split())
    changed = python(copy, "train.py", "--out", "runs/jitter", *TINY.split(), patch=patch)
    assert "step 8/8" in plain and "step 8/8" in changed
    assert log(copy, "plain")[0]["loss"] != log(copy, "jitter")[0]["loss"]

    names = dict(vars(train))
    exec(function, names)
    images = torch.arange(0, 255, dtype=torch.uint8).repeat(3, 1)[None, :, None]  # (1, 3, 1, 255)
    seen = names["stain_jitter"](images, 0.4)
    assert 0 < seen.min() and seen.max() <= 1
    same = names["stain_jitter"](images, 0.0)
    assert (same - images / 255).abs().max() < 1 / 255


def test_another_optimiser(copy):
    """In place of the last line of make_optimizer; a resume has its state, and takes no other's."""
    [two_lines] = code("9")
    assert len(two_lines.splitlines()) == 2
    *kept, adamw = inspect.getsource(train.make_optimizer).splitlines()
    assert "AdamW" in adamw

    def patch():
        exec("\n".join([*kept, two_lines]), vars(train))

    flags = ["--out", "runs/sgd", "--lr", "0.1", *TINY.split()]
    python(copy, "train.py", *flags, "--stop-at", "4", patch=patch)
    refused = fork(copy, "train.py", "--resume", "runs/sgd")
    assert refused.code == 2
    assert "runs/sgd was trained by SGD, make_optimizer makes AdamW" in refused.err
    python(copy, "train.py", "--resume", "runs/sgd", "--stop-at", "8", patch=patch)
    state = torch.load(copy / "runs/sgd/last.pt", weights_only=True)["optimizer"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [5e-4, 0.0]
    assert all(group["momentum"] == 0.9 for group in state["param_groups"])
    assert "momentum_buffer" in state["state"][0]
    assert log(copy, "sgd")[-1]["step"] == 8


def test_which_prefix_should_count(copy):
    """The loss is the sum of its logged terms with the weights of the exercise, not with ones."""
    [line] = code("10")
    source = inspect.getsource(losses.nested_loss)
    [plain] = re.findall(r"^ +w_m = 1\.0\b.*\n", source, re.MULTILINE)

    def patch():
        exec(source.replace(plain, line), vars(losses))
        train.nested_loss = losses.nested_loss

    python(copy, "train.py", "--out", "runs/first", *TINY.split(), patch=patch)
    weighted = 0.0
    alike = 0.0
    terms = log(copy, "first")[0]["terms"]
    for m in (2, 4, 8, 16, 48):
        for t in ("toy_cells", "toy_tissue"):
            loss = 1 - terms[f"{t}/summary_cos@{m}"] + 0.9 * (1 - terms[f"{t}/patch_cos@{m}"])
            loss += 0.1 * terms[f"{t}/patch_l1@{m}"]
            alike += loss
            weighted += (4.0 if m == 2 else 0.25) * loss
    assert log(copy, "first")[0]["loss"] == pytest.approx(weighted, rel=1e-5)
    assert weighted != pytest.approx(alike, rel=1e-3)
