"""The loop: resuming, processes, accumulation change nothing; bad input ends in one line; students load into timm."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import cards
import pytest
import torch
from conftest import ROOT, oracle, write_tiles
from test_student import timm_twin
from test_teachers import published_file, shallow  # noqa: F401 - a fixture

import data
import evaluate
import teachers
import train
from data import InputError
from student import STUDENTS, Student, load_student
from teachers import TEACHERS, load_init

TINY = ["--teacher-steps", "2", "--batch-size", "8", "--device", "cpu", "--dims", "4,16", "--stats-tiles", "16"]


@pytest.fixture(autouse=True)
def small_evaluation(monkeypatch):
    monkeypatch.setattr(evaluate, "N_TILES", 32)


@pytest.fixture
def run(weights_dir):
    def run(*argv):
        train.train(train.parse_args([*map(str, argv), "--weights-dir", str(weights_dir)]))

    return run


def script(*argv, cwd=None, processes=1, **environment):
    """The real command line: a subprocess with one compute thread, like torchrun's."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*launcher, str(ROOT / argv[0]), *map(str, argv[1:])]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def checkpoint(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def assert_same(a, b, **tolerance):
    """Every tensor of two checkpoints: student and heads, standardisers, optimiser."""
    assert a["step"] == b["step"]
    for part in ("student", "standardizers"):
        assert a[part].keys() == b[part].keys()
        for key in a[part]:
            torch.testing.assert_close(a[part][key], b[part][key], **(tolerance or {"rtol": 0, "atol": 0}))
    if not tolerance:
        for key, state in a["optimizer"]["state"].items():
            assert all(torch.equal(value, b["optimizer"]["state"][key][name]) for name, value in state.items())


@pytest.fixture
def tiles(tmp_path):
    write_tiles(tmp_path / "tiles", 12)
    return tmp_path / "tiles"


@pytest.mark.parametrize("source", ["demo", "folder"])
def test_ten_steps_equal_five_resume_five(tmp_path, run, tiles, source):
    flags = [*TINY, "--steps", 10, *(["--data", tiles] if source == "folder" else [])]
    run(*flags, "--out", tmp_path / "straight")
    run(*flags, "--out", tmp_path / "halves", "--stop-at", 5)
    assert checkpoint(tmp_path / "halves")["step"] == 5
    run("--resume", tmp_path / "halves", "--workers", 2 if source == "folder" else 0)
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "halves"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "halves" / "log.jsonl").read_text().splitlines()]
    assert steps == [5, 10]


def test_killed_and_resumed_equals_undisturbed(tmp_path, run, weights_dir):
    flags = [*TINY, "--steps", 60, "--stop-at", 59, "--save-every", 7, "--log-every", 1, "--weights-dir", weights_dir]
    run(*flags[:-2], "--out", tmp_path / "warm", "--stop-at", 1)  # the offline teachers are there
    assert script("train.py", *flags, "--out", tmp_path / "straight").returncode == 0
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, flags), "--out", killed],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 20/"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    assert 0 < checkpoint(killed)["step"] < 59 and checkpoint(killed)["step"] % 7 == 0
    result = script("train.py", "--resume", killed, "--stop-at", 59)
    assert result.returncode == 0, result.stderr
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(killed))


@pytest.mark.parametrize("source", ["demo", "folder"])
def test_two_processes_with_accumulation_equal_one(tmp_path, weights_dir, tiles, source):
    flags = [*TINY, "--steps", 6, "--stop-at", 5, "--lr", 1e-3, "--weights-dir", weights_dir]
    if source == "folder":  # with weights that process 0 alone reads
        torch.manual_seed(7)
        torch.save({"state_dict": Student("toy", {}, []).backbone.state_dict()}, tmp_path / "init.pt")
        flags += ["--data", tiles, "--init", tmp_path / "init.pt"]
    for name, processes, accumulate in (("one", 1, 1), ("two", 2, 2)):
        result = script("train.py", *flags, "--out", tmp_path / name, "--accumulate", accumulate, processes=processes)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("step 5/6") == 1  # process 0 alone speaks
    # AdamW divides by the root of a gradient that may be nearly zero, so sums in another order show in the weights
    assert_same(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"), rtol=1e-3, atol=1e-4)
    fresh = Student("toy", {"toy_cells": 128, "toy_tissue": 128}, [4, 16]).state_dict()
    moved = checkpoint(tmp_path / "one")["student"]["backbone.norm.weight"] - fresh["backbone.norm.weight"]
    assert moved.abs().max() > 1e-3  # the tolerance is far below what five steps change


def test_accumulated_gradients_are_the_mean_over_the_whole_batch(tmp_path, run, tiles, monkeypatch):
    """AdamW and clipping hide a wrong scale, so the optimiser's own mean of gradients is compared, unclipped."""
    monkeypatch.setattr(train, "CLIP", 1e9)
    for accumulate in (1, 4):
        run(*TINY, "--steps", 1, "--data", tiles, "--accumulate", accumulate, "--out", tmp_path / str(accumulate))
    one, four = (checkpoint(tmp_path / name)["optimizer"]["state"] for name in ("1", "4"))
    for key, state in one.items():
        torch.testing.assert_close(state["exp_avg"], four[key]["exp_avg"], rtol=1e-3, atol=1e-6)


def test_log_and_student_file(tmp_path, run, capsys):
    run(*TINY, "--steps", 4, "--log-every", 2, "--out", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert set(lines[0]) == {"step", "loss", "lr", "tiles_per_s", "terms"}
    for t in ("toy_cells", "toy_tissue"):
        for key in ("summary_cos", "patch_cos", "patch_l1"):
            assert set(lines[0]["terms"][f"{t}/{key}"]) == {"48", "4"}
    printed = capsys.readouterr().out
    assert "ETA" in printed and "licence Apache-2.0" in printed
    config = torch.load(tmp_path / "run" / "student.pt", weights_only=True)["config"]
    assert config["nested_dims"] == [4, 16, 48] and set(config["teachers"]) == {"toy_cells", "toy_tissue"}
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_finished_run_says_so(tmp_path, run, capsys):
    run(*TINY, "--steps", 2, "--out", tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    run("--resume", tmp_path / "run")
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_resume_keeps_its_arguments_and_its_tiles(tmp_path, run, tiles):
    run(*TINY, "--steps", 3, "--stop-at", 1, "--data", tiles, "--out", tmp_path / "run")
    run("--resume", tmp_path / "run", "--dims", "4,16", "--lr", "5e-3", "--stop-at", 1)  # the same again is no change
    for flag, value in (("--lr", 1), ("--steps", 9), ("--teachers", "toy_cells"), ("--seed", 4), ("--dims", "2")):
        with pytest.raises(InputError, match=f"{flag}: this run has"):
            run("--resume", tmp_path / "run", flag, value)
    write_tiles(tiles / "more", 1)
    with pytest.raises(InputError, match="--data: .* does not hold the tiles"):
        run("--resume", tmp_path / "run")
    (tiles / "more" / "tile_000.png").unlink()
    tiles.rename(tmp_path / "moved")
    run("--resume", tmp_path / "run", "--data", tmp_path / "moved")
    assert checkpoint(tmp_path / "run")["step"] == 3


def test_a_run_is_never_overwritten(tmp_path, run):
    run(*TINY, "--steps", 1, "--out", tmp_path / "run")
    (tmp_path / "run-2").mkdir()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(InputError, match=rf"--resume {tmp_path}/run, or begin another with --out {tmp_path}/run-3"):
        run(*TINY, "--steps", 1, "--out", tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, run):
    with pytest.raises(InputError, match=r"--lr: loss not finite at step [23]; .*last.pt keeps"):
        run(*TINY, "--steps", 5, "--lr", 1e30, "--out", tmp_path / "run")
    kept = checkpoint(tmp_path / "run")
    assert kept["step"] == 0 and all(torch.isfinite(value).all() for value in kept["student"].values())


BAD = {
    "--teachers unii": "--teachers: no teacher is called 'unii'",
    "--teachers ,": "--teachers",
    "--student vit_x": "--student",
    "--student toy --teachers uni": "--student toy",
    "--dims 4,x": "--dims",
    "--dims 0": "--dims",
    "--dims 96": "--dims: 96 is above the width of toy",
    "--dims 1000 --student vit_b": "--dims: 1000 is above",
    "--steps 0": "--steps",
    "--steps 1e3": "--steps",
    "--batch-size -1": "--batch-size",
    "--batch-size 10 --accumulate 4": "--batch-size",
    "--lr nan": "--lr",
    "--lr -1": "--lr",
    "--seed -1": "--seed",
    "--seed 99999999999999999999": "--seed",
    "--data=": "--data: it is empty",
    "--resume=": "--resume: it is empty",
    "--weights-dir=": "--weights-dir: it is empty",
    "--device meta": "--device",
    "--precision fp16 --device cpu": "--precision fp16",
    "--device gpu": "--device",
    "--data nowhere": "--data: nowhere is not a folder",
    "--resume nowhere": "--resume: nowhere/last.pt",
    "--stats-tiles 1": "--stats-tiles",
    "--standardize pca": "--standardize",
    "--step 5": "--step",  # no abbreviations: --step is neither --steps nor --stop-at
    "--teachers uni,virchow": "no weights for uni: put pytorch_model.bin of MahmoodLab/UNI",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_flags_end_in_one_line(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        teachers.run_main(lambda: train.train(train.parse_args(line.split())))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[line] in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was made


def test_an_empty_folder_and_a_missing_run_on_the_real_command_line(tmp_path):
    for argv, expected in (
        (["train.py", "--data", tmp_path, "--device", "cpu"], f"train.py: --data: {tmp_path} has no images"),
        (["evaluate.py", tmp_path / "x"], f"evaluate.py: {tmp_path}/x does not exist"),
    ):
        result = script(*argv, cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.startswith(expected) and result.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_refused_before_anything_slow(tmp_path, monkeypatch, capsys, weights_dir):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for out, weights in (("file", weights_dir), ("run", f"{tmp_path}/file/w")):
        argv = [*TINY, "--steps", "1", "--out", f"{tmp_path}/{out}", "--weights-dir", str(weights)]
        with pytest.raises(SystemExit) as stop:
            teachers.run_main(lambda argv=argv: train.train(train.parse_args(argv)))
        printed = capsys.readouterr()
        assert stop.value.code == 2 and printed.err.count("\n") == 1 and f"{tmp_path}/file" in printed.err
        assert "step 1/1" not in printed.out and "training" not in printed.out


def test_unreadable_tiles_end_the_run_by_name(tmp_path, run, tiles):
    (tiles / "broken.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"tiles: over 1 % of 13 tiles .*broken\.png"):
        run(*TINY, "--steps", 2, "--data", tiles, "--out", tmp_path / "run")


def test_small_tiles_get_one_warning_that_names_one(tmp_path, run, tiles, capsys):
    write_tiles(tiles / "small", 3, (50, 50))
    run(*TINY, "--steps", 3, "--data", tiles, "--out", tmp_path / "run")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "smaller" in line]
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {tiles / 'small'}/tile_00")


def test_vit_s_from_the_loop_loads_into_timm_at_every_dim(tmp_path, run, tiles):
    timm = oracle("timm")
    flags = ["--student", "vit_s", "--dims", "96", "--batch-size", 2, "--steps", 1, "--data", tiles]
    run(*TINY[:2], *flags, "--stats-tiles", 2, "--device", "cpu", "--out", tmp_path / "run")
    content = torch.load(tmp_path / "run" / "student.pt", weights_only=True)
    images = torch.rand(2, 3, 224, 224)
    student, _ = load_student(tmp_path / "run")
    with torch.no_grad():
        z = student(images)["summary"]
        normalised = (images - student.mean) / student.std
        for m in (384, 96):
            for key in ("norm.weight", "norm.bias"):  # cut to m: the norm's channels from m on are zeroed
                content["state_dict"][key][m:] = 0
            torch.save(content, tmp_path / "cut.pt")
            settings = {"img_size": 224, "num_classes": 0, "checkpoint_path": str(tmp_path / "cut.pt")}
            loaded = timm.create_model("vit_small_patch14_reg4_dinov2", **settings).eval()
            got = loaded(normalised)
            torch.testing.assert_close(got[:, :m], z[:, :m], rtol=1e-4, atol=1e-5)
            assert m == 384 or got[:, m:].abs().max() == 0


@pytest.mark.parametrize("name", STUDENTS)
def test_every_students_state_dict_loads_into_timm(name):
    timm_twin(STUDENTS[name]).load_state_dict(Student(name, {}, []).backbone.state_dict(), strict=True)


def test_published_teachers_shallow_end_to_end(tmp_path, shallow, tiles, capsys):  # noqa: F811 - a fixture
    for name, suffix in (("uni", "bin"), ("virchow", "safetensors")):
        published_file(name, tmp_path, suffix)
    flags = ["--teachers", "uni,virchow", "--student", "vit_s", "--steps", 2, "--batch-size", 2, "--data", tiles]
    flags += [
        "--stats-tiles",
        2,
        "--log-every",
        1,
        "--device",
        "cpu",
        "--weights-dir",
        tmp_path,
        "--out",
        tmp_path / "run",
    ]
    train.train(train.parse_args(list(map(str, flags))))
    printed = capsys.readouterr().out
    assert "grid 14" in printed and "grid 16" in printed and "licence CC-BY-NC-ND-4.0" in printed
    assert "step 2/2" in printed and "virchow summary" in printed
    config = torch.load(tmp_path / "run" / "student.pt", weights_only=True)["config"]
    assert config["teachers"] == ["uni", "virchow"]
    assert config["licences"] == {name: TEACHERS[name].licence for name in ("uni", "virchow")}
    assert "binds students: yes" in config["licences"]["uni"] and "licence " + config["licences"]["virchow"] in printed


@pytest.fixture
def one_layer(monkeypatch):
    """dinov2_s and vit_s with one layer each: enough for what --init has to do, and quick."""
    arch = STUDENTS["vit_s"] | {"depth": 1}
    monkeypatch.setitem(STUDENTS, "vit_s", arch)
    monkeypatch.setitem(TEACHERS, "dinov2_s", dataclasses.replace(TEACHERS["dinov2_s"], arch=arch))


@pytest.mark.parametrize("layout", ["hf-518", "timm", "dinov2"])
def test_init_from_dinov2_equals_the_reference(tmp_path, run, tiles, one_layer, capsys, layout):
    """37 x 37 position embeddings, resampled to 16 x 16: before any training the tokens are the reference's."""
    state, forward = cards.reference("dinov2_s", layout, tmp_path, depth=1)
    cards.write(state, tmp_path / "dinov2.pth")
    student = Student("vit_s", {}, [])
    assert list(load_init(student.backbone, str(tmp_path / "dinov2.pth"))) == ["dinov2.pth"]
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, expected = student.backbone.split(student.backbone(x)), forward(x)
    for got, wanted in zip(tokens.values(), expected):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())


def test_init_by_name_warm_start_and_inherited_licences(tmp_path, weights_dir, tiles, one_layer, capsys):
    def run(*argv):
        flags = [*TINY[:2], "--student", "vit_s", "--batch-size", 2, "--steps", 1, "--data", tiles, "--device", "cpu"]
        flags += ["--stats-tiles", 2, "--weights-dir", weights_dir, *argv]
        train.train(train.parse_args(list(map(str, flags))))
        return torch.load(tmp_path / argv[argv.index("--out") + 1] / "student.pt", weights_only=True)

    state, _ = cards.reference("dinov2_s", "timm", tmp_path, depth=1)
    cards.write(state, weights_dir / "dinov2_s.safetensors")
    first = run("--init", "dinov2_s", "--lr", 1e-9, "--teachers", "toy_cells", "--out", tmp_path / "first")
    assert first["config"]["licences"] == {name: TEACHERS[name].licence for name in ("dinov2_s", "toy_cells")}
    assert f"begun from dinov2_s; licence dinov2_s: {TEACHERS['dinov2_s'].licence}" in capsys.readouterr().out
    torch.testing.assert_close(first["state_dict"]["norm.weight"], state["norm.weight"], atol=1e-6, rtol=0)
    warm = ["--init", tmp_path / "first" / "student.pt", "--teachers", "toy_tissue", "--out", tmp_path / "second"]
    second = run(*warm, "--lr", 1e-9, "--stop-at", 1)
    assert list(second["config"]["licences"]) == ["dinov2_s", "toy_cells", "toy_tissue"]
    for key, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][key], value, atol=1e-6, rtol=0)
    (weights_dir / "dinov2_s.safetensors").unlink()  # a resume reads the checkpoint, not --init
    assert train.parse_args(["--resume", str(tmp_path / "first")]).init == "dinov2_s"
    with pytest.raises(InputError, match="--init: .*first/student.pt holds another model: .*cls_token is .*, expected"):
        train.train(train.parse_args([*TINY, "--init", f"{tmp_path}/first/student.pt", "--out", f"{tmp_path}/third"]))
    student = Student("vit_s", {}, [])
    assert list(load_init(student.backbone, str(tmp_path / "first"))) == ["dinov2_s", "toy_cells"]  # the run's folder
    assert torch.equal(student.backbone.norm.weight, first["state_dict"]["norm.weight"])
    for init, message in (("none.pt", "none.pt is no file"), ("toy_cells", "toy_cells is no file and no published")):
        with pytest.raises(InputError, match=f"--init: {message}"):
            train.train(train.parse_args([*TINY, "--init", init, "--out", f"{tmp_path}/third"]))
    with pytest.raises(InputError, match="no weights for dinov2_b"):
        train.train(train.parse_args([*TINY, "--init", "dinov2_b", "--out", f"{tmp_path}/third"]))
    assert not (tmp_path / "third").exists()


def test_licences_and_init_survive_a_resume(tmp_path, run):
    student = Student("toy", {}, [])
    config = {"licences": {"uni": "binds"}}
    torch.save({"state_dict": student.backbone.state_dict(), "config": config}, tmp_path / "student.pt")
    whole = [*TINY, "--steps", 4, "--seed", 3, "--init", tmp_path / "student.pt"]
    run(*whole, "--out", tmp_path / "whole")
    run(*whole, "--stop-at", 2, "--out", tmp_path / "parts")
    (tmp_path / "student.pt").unlink()
    run("--resume", tmp_path / "parts", "--stop-at", 4)
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    for name in ("whole", "parts"):
        config = torch.load(tmp_path / name / "student.pt", weights_only=True)["config"]
        assert list(config["licences"]) == ["uni", "toy_cells", "toy_tissue"] and config["licences"]["uni"] == "binds"


def test_runs_of_before_init_and_licences_go_on(tmp_path, run, weights_dir):
    run(*TINY, "--steps", 3, "--stop-at", 1, "--out", tmp_path / "run")
    content = checkpoint(tmp_path / "run")
    del content["licences"], content["args"]["init"]
    torch.save(content, tmp_path / "run" / "last.pt")
    with pytest.raises(InputError, match="--init: this run has None"):
        train.parse_args(["--resume", str(tmp_path / "run"), "--init", "dinov2_s"])
    run("--resume", tmp_path / "run")
    config = torch.load(tmp_path / "run" / "student.pt", weights_only=True)["config"]
    assert config["step"] == 3 and list(config["licences"]) == ["toy_cells", "toy_tissue"]
    old = {"state_dict": Student("toy", {}, []).backbone.state_dict(), "config": {"teachers": {"uni": "binds"}}}
    torch.save(old, tmp_path / "old.pt")
    assert load_init(Student("toy", {}, []).backbone, str(tmp_path / "old.pt")) == {"uni": "binds"}


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    data.save_atomically({"step": 1}, tmp_path / "last.pt")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="last.pt: .*No space left"):
        data.save_atomically({"step": 2}, tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_schedule_and_weight_decay():
    rates = [train.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and max(rates) == 1 and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.01 and train.learning_rate(0, 1, 1.0) == 1
    student = Student("toy", {"a": 24}, [4])
    names = {id(p): name for name, p in student.named_parameters()}
    decay, keep = ({names[id(p)] for p in group["params"]} for group in train.parameter_groups(student))
    assert decay | keep == set(names.values()) and not decay & keep
    assert all(name.endswith("weight") and "norm" not in name for name in decay)
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.reg_token", "backbone.norm.weight"} <= keep
    assert "adaptors.a.4.summary.1.weight" in keep and "adaptors.a.4.summary.0.weight" in decay


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_cuda_amp(tmp_path, run, precision):
    flags = ["--teacher-steps", 2, "--batch-size", 8, "--precision", precision, "--steps", 10]
    run(*flags, "--out", tmp_path / "run", "--stop-at", 5)
    run("--resume", tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == 10
