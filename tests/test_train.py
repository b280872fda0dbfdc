"""The loop: resuming, processes, accumulation change nothing; bad input ends in one line; students load into timm."""

import ast
import collections
import contextlib
import dataclasses
import gc
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cards
import numpy as np
import pytest
import torch
from conftest import ROOT, oracle, write_shard, write_tiles
from forks import pair
from test_student import timm_twin
from test_teachers import published_file, shallow  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode

import data
import evaluate
import losses as losses_module
import teachers
import train
from data import InputError, epoch_order
from losses import Standardizers, distillation_loss
from student import STUDENTS, Student, VisionTransformer, load_student
from teachers import TEACHERS, load_init

TINY = [
    "--teacher-steps",
    "2",
    "--batch-size",
    "8",
    "--device",
    "cpu",
    "--dims",
    "4,16",
    "--stats-tiles",
    "16",
]


@pytest.fixture(autouse=True)
def small_evaluation(monkeypatch):
    monkeypatch.setattr(evaluate, "N_TILES", 32)


def main():
    """What the script does."""
    return train.train(train.parse_args())


def launch(*argv):
    train.train(train.parse_args(list(map(str, argv))))


@pytest.fixture
def run(weights_dir):
    return lambda *argv: launch(*argv, "--weights-dir", weights_dir)


def script(*argv, cwd=None, processes=1, **environment):
    """The real command line: a subprocess with one compute thread, like torchrun's."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*launcher, str(ROOT / argv[0]), *map(str, argv[1:])]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def checkpoint(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def losses(folder):
    return {
        line["step"]: line["loss"]
        for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    }


def assert_same(a, b, **tolerance):
    """Every tensor of two checkpoints: student and heads, standardisers, optimiser."""
    assert a["step"] == b["step"]
    for part in ("student", "standardizers"):
        assert a[part].keys() == b[part].keys()
        for key in a[part]:
            torch.testing.assert_close(
                a[part][key], b[part][key], **(tolerance or {"rtol": 0, "atol": 0})
            )
    if not tolerance:
        for key, state in a["optimizer"]["state"].items():
            assert all(
                torch.equal(value, b["optimizer"]["state"][key][name])
                for name, value in state.items()
            )


@pytest.fixture
def tiles(tmp_path):
    write_tiles(tmp_path / "tiles", 12)
    return tmp_path / "tiles"


@pytest.fixture
def shards(tmp_path, tiles):
    """The same tiles in three shards, in a folder of their own."""
    paths = sorted(tiles.iterdir())
    for name, some in zip("abc", (paths[:3], paths[3:7], paths[7:])):
        write_shard(
            tmp_path / "shards" / f"{name}.tar", {path.name: path.read_bytes() for path in some}
        )
    return tmp_path / "shards"


@pytest.mark.parametrize("source", ["demo", "folder", "shards"])
def test_ten_steps_equal_five_resume_five(tmp_path, run, tiles, shards, source):
    flags = [
        *TINY,
        "--steps",
        10,
        *{"demo": [], "folder": ["--data", tiles], "shards": ["--data", shards]}[source],
    ]
    run(*flags, "--out", tmp_path / "straight")
    run(*flags, "--out", tmp_path / "halves", "--stop-at", 5)
    assert checkpoint(tmp_path / "halves")["step"] == 5
    run("--resume", tmp_path / "halves", "--workers", 2 if source == "folder" else 0)
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "halves"))
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "halves" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == [5, 10]


@pytest.mark.parametrize("source", ["demo", "folder", "cached shards"])
def test_two_processes_with_accumulation_equal_one(
    tmp_path, weights_dir, tiles, shards, capsys, source
):
    """The folder's two by torchrun; the others, where it can be, as forks, which need no seconds for their imports."""
    flags = [*TINY, "--steps", 6, "--stop-at", 5, "--lr", 1e-3, "--weights-dir", weights_dir]
    if source == "folder":  # with weights that process 0 alone reads
        torch.manual_seed(7)
        torch.save(
            {"state_dict": Student("toy", {}, []).backbone.state_dict()}, tmp_path / "init.pt"
        )
        flags += ["--data", tiles, "--init", tmp_path / "init.pt"]
    for name, accumulate in (("one", 1), ("two", 2)):
        more = (
            ["--data", shards, "--cache", tmp_path / f"cache of {name}"]
            if source == "cached shards"
            else []
        )
        argv = [*flags, *more, "--out", tmp_path / name, "--accumulate", accumulate]
        if name == "one":
            launch(*argv)
            printed = capsys.readouterr().out
        elif source == "folder" or not sys.platform.startswith("linux"):
            result = script("train.py", *argv, processes=2)
            assert result.returncode == 0, result.stderr
            printed = result.stdout
        else:
            processes = pair(*argv)
            assert all(process.succeeds() for process in processes)
            printed = "".join(process.out for process in processes)
        assert printed.count("step 5/6") == 1  # process 0 alone speaks
    # AdamW divides by the root of a gradient that may be nearly zero, so sums in another order show in the weights
    assert_same(checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"), rtol=1e-3, atol=1e-4)
    fresh = Student("toy", {"toy_cells": 128, "toy_tissue": 128}, [4, 16]).state_dict()
    moved = (
        checkpoint(tmp_path / "one")["student"]["backbone.norm.weight"]
        - fresh["backbone.norm.weight"]
    )
    assert moved.abs().max() > 1e-3  # the tolerance is far below what five steps change
    if source == "cached shards":  # each of two processes made half of it
        one, two = (outputs_in(tmp_path / f"cache of {name}", 12) for name in ("one", "two"))
        for t in one:
            np.testing.assert_allclose(one[t], two[t], rtol=2e-3, atol=2e-3)


def outputs_in(cache, n):
    """{teacher: (n, 65, 128)} of a finished cache of the toy teachers."""
    names = ("toy_cells", "toy_tissue")
    outputs = np.fromfile(
        cache / "outputs", [("done", "u2"), *((t, "f2", (65, 128)) for t in names)]
    )
    assert len(outputs) == n and outputs["done"].all() and (cache / "complete").exists()
    return {t: outputs[t] for t in names}


def ranks(mark):
    """{rank: process} of the running processes that a test has started with this mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pairs = (
                text.partition("=")
                for text in (folder / "environ").read_text(errors="replace").split("\0")
            )
            environment = {key: value for key, _, value in pairs}
            if environment.get("MARK_OF_TEST") == mark and "RANK" in environment:
                found[int(environment["RANK"])] = int(folder.name)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("launcher", ["torchrun", "by hand"])
def test_a_killed_process_ends_the_others_within_a_minute(
    tmp_path, run, weights_dir, tiles, launcher
):
    run(
        *TINY, "--steps", 1, "--data", tiles, "--out", tmp_path / "warm"
    )  # the offline teachers are there
    flags = [
        *TINY,
        "--steps",
        10**6,
        "--log-every",
        5,
        "--data",
        tiles,
        "--weights-dir",
        weights_dir,
    ]
    command = [ROOT / "train.py", *flags, "--out", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MARK_OF_TEST": str(tmp_path)}
    if launcher == "torchrun":
        starts = [(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2], {})]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            own = {
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
            }
        starts = [([], {**own, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    processes, log = [], tmp_path / "run" / "log.jsonl"
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        for arguments, more in starts:
            whole = list(map(str, [sys.executable, *arguments, *command]))
            processes.append(
                subprocess.Popen(whole, env=environment | more, stdout=out, stderr=err)
            )
        try:
            deadline = time.monotonic() + 150
            while (
                not log.exists()
                and time.monotonic() < deadline
                and all(p.poll() is None for p in processes)
            ):
                time.sleep(0.1)
            assert log.exists(), (tmp_path / "err").read_text()
            os.kill(ranks(str(tmp_path))[1], signal.SIGKILL)
            code = processes[0].wait(60)  # torchrun itself, or rank 0
            assert processes[-1].wait(60) != 0
            text = (tmp_path / "err").read_text()
            assert not ranks(str(tmp_path)), "a process is still there"
        finally:
            for pid in [
                *ranks(str(tmp_path)).values(),
                *(p.pid for p in processes if p.poll() is None),
            ]:
                os.kill(pid, signal.SIGKILL)
            for process in processes:
                process.wait()
    if launcher == "torchrun":
        assert code != 0 and "Signal 9 (SIGKILL)" in text and "rank      : 1" in text, text
    else:
        last = text.strip().splitlines()[-1]  # what stands before it are torch's warnings
        assert (
            code == 1
            and last.startswith("train.py: another process was lost")
            and "Traceback" not in text
        ), text
    assert checkpoint(tmp_path / "run")["step"] == 0  # and that can be gone on with


def test_accumulated_gradients_are_the_mean_over_the_whole_batch(tmp_path, run, tiles, monkeypatch):
    """AdamW and clipping hide a wrong scale, so the optimiser's own mean of gradients is compared, unclipped."""
    monkeypatch.setattr(train, "CLIP", 1e9)
    for accumulate in (1, 4):
        run(
            *TINY,
            "--steps",
            1,
            "--data",
            tiles,
            "--accumulate",
            accumulate,
            "--out",
            tmp_path / str(accumulate),
        )
    one, four = (checkpoint(tmp_path / name)["optimizer"]["state"] for name in ("1", "4"))
    for key, state in one.items():
        torch.testing.assert_close(state["exp_avg"], four[key]["exp_avg"], rtol=1e-3, atol=1e-6)


def test_log_and_student_file(tmp_path, run, capsys):
    run(*TINY, "--steps", 4, "--log-every", 2, "--out", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert set(lines[0]) == {"step", "loss", "lr", "tiles_per_s", "peak_gb", "terms"}
    for t in ("toy_cells", "toy_tissue"):
        for key in ("summary_cos", "patch_cos", "patch_l1"):
            assert set(lines[0]["terms"][f"{t}/{key}"]) == {"48", "4"}
    assert all(line["tiles_per_s"] > 0 and line["peak_gb"] == 0 for line in lines)  # of a GPU
    printed = capsys.readouterr().out
    assert "ETA" in printed and "licence Apache-2.0" in printed
    config = torch.load(tmp_path / "run" / "student.pt", weights_only=True)["config"]
    assert config["nested_dims"] == [4, 16, 48] and set(config["teachers"]) == {
        "toy_cells",
        "toy_tissue",
    }
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_the_model_card_says_what_binds_and_its_snippet_runs_in_timm(tmp_path, weights_dir):
    """Of a run over tiles begun from a file, both with names that could break a line, stopped and renewed."""
    oracle("timm")
    folder = tmp_path / "of\n## `tissue` {step}"
    write_tiles(folder, 3)
    init = tmp_path / "their```{lr}\n# x.pt"
    torch.save({"state_dict": Student("toy", {}, []).backbone.state_dict()}, init)
    flags = [
        *TINY,
        "--steps",
        4,
        "--save-every",
        2,
        "--data",
        folder,
        "--init",
        init,
        "--weights-dir",
        weights_dir,
    ]
    launch(*flags, "--stop-at", 2, "--out", tmp_path / "run")
    card = (tmp_path / "run" / "model_card.md").read_text()
    licence = TEACHERS["toy_cells"].licence
    assert card.startswith(
        "# Student toy: 0.154 M parameters, nested dims m of [4, 16, 48], step 2 of 4\n"
    )
    assert f"\n  - toy_cells: {licence}\n  - toy_tissue: {licence}\n" in card
    assert (
        repr(f"3 tiles of {folder}") in card
        and repr(init.name)[1:-1] in card
        and "ask where the file comes from" in card
    )
    assert (
        "batch 8, lr 0.005, standardize phi-s, torch.float32, seed 0. Saves renew this card" in card
    )
    assert (
        card.count("\n#") == 0 and card.count("```") == 2 + 1
    )  # the names open no section and no fence
    (tmp_path / "run" / "model_card.md").write_text(card + "\n## Evaluation on tiles\n")
    launch("--resume", tmp_path / "run", "--weights-dir", weights_dir)
    renewed = (tmp_path / "run" / "model_card.md").read_text()
    assert renewed == card.replace(
        "step 2 of 4", "step 4 of 4"
    )  # an evaluation of the student of step 2 is gone
    [snippet] = re.findall(r"```python\n(.*?)```", renewed, re.DOTALL)
    student, _ = load_student(tmp_path / "run")
    images = torch.rand(2, 3, 64, 64)
    torch.save((images - student.mean) / student.std, tmp_path / "images.pt")
    script = f"import torch\nm = 48; images = torch.load('../images.pt')\n{snippet}\ntorch.save(z, '../z.pt')"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "run", check=True)
    torch.testing.assert_close(
        torch.load(tmp_path / "z.pt"), student(images)["summary"], rtol=1e-4, atol=1e-5
    )


def test_the_demos_card_has_its_table(tmp_path, run):
    run(*TINY, "--steps", 2, "--out", tmp_path / "run")
    [_, section] = (tmp_path / "run" / "model_card.md").read_text().split("\n## Evaluation on ")
    table = r"synthetic tissue\n```text\ncells, %, 32 tiles .*\nstudent +0.154 M +48 .*\n```\n"
    assert re.fullmatch(table, section, re.DOTALL)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_cards_settings_make_every_student_in_timm(name):
    card = train.CARD.format_map(collections.defaultdict(str, STUDENTS[name], size=1.0))
    [call] = [
        node
        for node in ast.walk(ast.parse(card.split("```")[1][6:]))
        if getattr(node, "keywords", None)
    ]
    settings = {
        x.arg: ast.literal_eval(x.value) for x in call.keywords if x.arg != "checkpoint_path"
    }
    model = oracle("timm").create_model(call.args[0].value, **settings)
    model.load_state_dict(VisionTransformer(**STUDENTS[name]).state_dict(), strict=True)


def test_a_loss_that_samples_its_dims_is_logged(tmp_path, run, monkeypatch):
    """As exercise 4 does, and further: parts of some dims alone, no dim being in all steps."""
    steps = iter([[4, 48], [16], [16, 48]])

    def sampled(student, tokens, targets):
        dims = next(steps)
        losses, parts = zip(*[distillation_loss(student.adapt(tokens, m), targets) for m in dims])
        return sum(losses), dict(zip(dims, parts))

    monkeypatch.setattr(losses_module, "nested_loss", sampled)
    run(*TINY, "--steps", 3, "--log-every", 1, "--out", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [set(line["terms"]["toy_cells/patch_cos"]) for line in lines] == [
        {"4", "48"},
        {"16"},
        {"16", "48"},
    ]


def test_a_finished_run_says_so(tmp_path, run, capsys):
    run(*TINY, "--steps", 2, "--out", tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    run("--resume", tmp_path / "run")
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_resume_keeps_its_arguments_and_its_tiles(tmp_path, run, tiles):
    run(*TINY, "--steps", 3, "--stop-at", 1, "--data", tiles, "--out", tmp_path / "run")
    for flag, value in (
        ("--lr", 1),
        ("--steps", 9),
        ("--teachers", "toy_cells"),
        ("--seed", 4),
        ("--dims", "2"),
    ):
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
    with pytest.raises(
        InputError, match=rf"--resume {tmp_path}/run, or begin another with --out {tmp_path}/run-3"
    ):
        run(*TINY, "--steps", 1, "--out", tmp_path / "run")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, run):
    with pytest.raises(
        InputError, match=r"^step [23]: the (loss|gradient) is not finite; .*last.pt is from before"
    ):
        run(*TINY, "--steps", 5, "--lr", 1e30, "--out", tmp_path / "run")
    kept = checkpoint(tmp_path / "run")
    assert kept["step"] == 0 and all(
        torch.isfinite(value).all() for value in kept["student"].values()
    )


class Spy(train.Distiller):
    """What train.py trains, kept for the test to look at."""

    def __init__(self, student):
        super().__init__(student)
        Spy.student = student


@pytest.mark.parametrize("scaler", [False, True])  # of fp16, which needs CUDA; here it only scales
@pytest.mark.parametrize(
    ("what", "accumulate"), [("loss nan", 1), ("loss inf", 2), ("gradient nan", 2)]
)
def test_from_a_step_that_is_not_finite_on_no_weight_changes(
    tmp_path, run, tiles, monkeypatch, what, accumulate, scaler
):
    if scaler and what == "gradient nan":
        pytest.skip("an overflow in fp16 is no fault: the scaler skips that step alone")
    calls = []

    def broken_in_step_5(student, tokens, targets, nested_loss=losses_module.nested_loss):
        loss, parts = nested_loss(student, tokens, targets)
        calls.append(loss.item())
        if len(calls) == 4 * accumulate + 1:
            loss = (
                loss * math.nan
                if what == "loss nan"
                else loss + math.inf
                if what == "loss inf"
                else loss * 1
            )
            if what == "gradient nan":
                loss.register_hook(lambda gradient: gradient * math.nan)
        return loss, parts

    def enabled(device, enabled, original=torch.amp.GradScaler):
        return original(device, init_scale=1024.0, enabled=scaler)

    monkeypatch.setattr(torch.amp, "GradScaler", enabled)
    monkeypatch.setattr(losses_module, "nested_loss", broken_in_step_5)
    monkeypatch.setattr(train, "Distiller", Spy)
    flags = [
        "--steps",
        20,
        "--log-every",
        10,
        "--save-every",
        4,
        "--accumulate",
        accumulate,
        "--data",
        tiles,
    ]
    kind = what.split()[0]
    message = rf"^step 5: the {kind} is not finite; {tmp_path}/run/last\.pt is from before: begin another run, with"
    with pytest.raises(InputError, match=message):
        run(*TINY, *flags, "--out", tmp_path / "run")
    assert (
        len(calls) == 8 * accumulate and not (tmp_path / "run" / "log.jsonl").exists()
    )  # noticed at the save of 8
    last, weights = checkpoint(tmp_path / "run"), Spy.student.state_dict()
    assert last["step"] == 4 and all(value.isfinite().all() for value in last["student"].values())
    if not scaler:  # that of fp16 has a mask of its own, for each step alone
        assert all(torch.equal(weights[key], value) for key, value in last["student"].items())
    assert torch.load(tmp_path / "run" / "student.pt", weights_only=True)["config"]["step"] == 4
    if scaler or what != "loss nan":
        return
    monkeypatch.undo()
    run(*TINY, *flags, "--stop-at", 4, "--out", tmp_path / "healthy")
    assert_same(checkpoint(tmp_path / "healthy"), last)
    run("--resume", tmp_path / "run", "--stop-at", 6)  # the last good step is one to go on from
    assert checkpoint(tmp_path / "run")["step"] == 6


def test_a_mask_that_is_never_needed_changes_no_bit(tmp_path, run, tiles, monkeypatch):
    run(*TINY, "--steps", 4, "--data", tiles, "--out", tmp_path / "masked")

    class Unmasked(torch.optim.AdamW):
        found_inf = property(lambda self: None, lambda self, value: None)

    monkeypatch.setattr(torch.optim, "AdamW", Unmasked)
    run(*TINY, "--steps", 4, "--data", tiles, "--out", tmp_path / "unmasked")
    assert_same(checkpoint(tmp_path / "masked"), checkpoint(tmp_path / "unmasked"))


@pytest.mark.parametrize("cache", [False, True])
def test_between_log_lines_the_host_reads_no_tensor(tmp_path, run, tiles, monkeypatch, cache):
    """On a GPU each such reading would wait for all that is queued."""
    counts, seen = [], collections.Counter()  # counts[i]: what had been seen when step i + 1 began
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, name=name, original=original):
            seen[name] += 1
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Readings(
        TorchDispatchMode
    ):  # those that torch does itself, as clip_grad_norm_ would on request
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name() in (
                "aten::_local_scalar_dense",
                "aten::nonzero",
                "aten::equal",
                "aten::is_nonzero",
            ):
                seen[function.name()] += 1
            return function(*args, **(kwargs or {}))

    def learning_rate(step, steps, peak, original=train.learning_rate):
        counts.append(dict(seen))
        return original(step, steps, peak)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    flags = ["--steps", 8, "--log-every", 8, "--accumulate", 2, "--data", tiles]
    with Readings():
        run(
            *TINY,
            *flags,
            *(["--cache", tmp_path / "cache"] if cache else []),
            "--out",
            tmp_path / "run",
        )
    assert len(counts) == 8 and all(count == counts[1] for count in counts[2:]), (
        counts
    )  # step 1 starts the loader
    assert (
        seen["item"] > counts[-1].get("item", 0) and seen["aten::_local_scalar_dense"]
    )  # the log line is counted


def test_counted_memory_of_vit_b_and_three_giants_at_batch_64():
    """What must lie on a GPU at once for --student vit_b --batch-size 64 in bf16: below 22 GB, counted on the CPU."""
    names, dims, batch = ("virchow2", "uni2_h", "h_optimus_1"), train.DEFAULTS["vit_b"]["dims"], 64
    teacher_dims = {name: TEACHERS[name].arch["width"] for name in names}
    assert teacher_dims == {"virchow2": 1280, "uni2_h": 1536, "h_optimus_1": 1536} and dims == [
        48,
        96,
        192,
        384,
        768,
    ]
    model = train.Distiller(Student("vit_b", teacher_dims, dims))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def tokens_of(B):
        D = teacher_dims.items()
        return {
            t: {"summary": torch.randn(B, D_t), "patches": torch.randn(B, 256, D_t)} for t, D_t in D
        }

    def saved_bytes(B):
        """Bytes kept for backward, of unique storages, without parameters (bf16 copies of them are counted)."""
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        images, targets = torch.randint(256, (B, 3, 224, 224), dtype=torch.uint8), tokens_of(B)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            loss, _ = model(images, targets)
        given = {
            y.untyped_storage().data_ptr() for tokens in targets.values() for y in tokens.values()
        }
        assert (
            loss.requires_grad and kept.keys() & given
        )  # the targets are among what is kept; counted below, once
        return sum(storage.nbytes() for address, storage in kept.items() if address not in given)

    one, two = saved_bytes(1), saved_bytes(2)
    with torch.device("meta"):
        vits = {name: VisionTransformer(**TEACHERS[name].arch) for name in names}
    outputs = batch * sum(
        (1 + 256) * D_t for D_t in teacher_dims.values()
    )  # numbers of the teachers' tokens
    parts = {
        "kept for backward": one + (batch - 1) * (two - one),
        "teachers, bf16": 2 * sum(p.numel() for vit in vits.values() for p in vit.parameters()),
        "student and heads: weights, gradients, moments": 16
        * sum(p.numel() for p in model.parameters()),
        "standardisers": sum(b.nbytes for b in Standardizers(teacher_dims).buffers()),
        "targets, fp32": 4 * outputs,
        "teachers' outputs, bf16": 2 * outputs,
    }
    print(*(f"{size / 1e9:7.3f} GB {part}" for part, size in parts.items()), sep="\n")
    print(f"{sum(parts.values()) / 1e9:7.3f} GB in all")
    assert (
        one > 50e6 and two > 1.5 * one - 500e6
    )  # something was counted, and it grows with the batch
    assert sum(parts.values()) < 22e9


@pytest.mark.parametrize("form", ["a folder", "a list", "a pattern", "one shard"])
def test_shards_on_the_command_line(tmp_path, run, shards, capsys, form):
    a, b, c = (str(shards / f"{name}.tar") for name in "abc")
    given = {
        "a folder": [f"{shards}/"],
        "a list": [c, a, b],
        "a pattern": [f"{shards}/*.tar"],
        "one shard": [b],
    }[form]
    for name in ("first", "second"):  # the second finds the index
        run(*TINY, "--steps", 1, "--data", *given, "--out", tmp_path / name)
    n = 4 if form == "one shard" else 12
    assert f"{n} tiles of " in capsys.readouterr().out and (tmp_path / "shards.index").exists()
    tiles = checkpoint(tmp_path / "first")["tiles"]
    assert (
        tiles["count"] == n
        and tiles == data.FolderTiles(shards if n == 12 else b, 64, 0).fingerprint()
    )
    assert_same(checkpoint(tmp_path / "first"), checkpoint(tmp_path / "second"))


@pytest.mark.parametrize("form", ["a folder", "one shard", "a pattern"])
def test_embeddings_of_shards_are_those_of_the_files(tmp_path, tiles, shards, monkeypatch, form):
    student = Student("toy", {}, [4])
    config = {
        "student": "toy",
        "arch": STUDENTS["toy"],
        "nested_dims": [4, 48],
        "step": 1,
        "steps": 1,
        "teachers": {},
    }
    torch.save(
        {"state_dict": student.backbone.state_dict(), "config": config}, tmp_path / "student.pt"
    )
    if form != "a folder":
        write_shard(
            shards / "all.tar", {path.name: path.read_bytes() for path in sorted(tiles.iterdir())}
        )
    given = {
        "a folder": shards,
        "one shard": shards / "all.tar",
        "a pattern": f"{shards}/[a-c].tar",
    }[form]
    embeddings = {}
    for name, path in (("folder", tiles), ("shards", given)):
        argv = [
            "evaluate.py",
            tmp_path / "student.pt",
            "--embed",
            path,
            "--out",
            tmp_path / f"{name}.npz",
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, [*argv, "--device", "cpu"])))
        evaluate.main()
        exported = np.load(tmp_path / f"{name}.npz")
        paths = [os.path.basename(path) for path in exported["paths"].tolist()]
        embeddings[name] = dict(zip(paths, exported["embeddings"]))
    assert (
        embeddings["folder"].keys() == embeddings["shards"].keys()
        and len(embeddings["folder"]) == 12
    )
    for name, embedding in embeddings["folder"].items():
        np.testing.assert_allclose(embeddings["shards"][name], embedding, rtol=1e-4, atol=1e-5)


# ---- --cache: the teachers run once --------------------------------------------------------------------------------
def test_cached_tiles_keep_images_and_outputs_together():
    tiles = [{"image": torch.full((3, 4, 4), i, dtype=torch.uint8)} for i in range(100)]
    rows = np.random.default_rng(0).permutation(100)
    outputs = np.zeros(100, [("done", "u2"), ("a", "f2", (6, 2))])

    def teach(batch):
        first = (
            batch["image"][:, 0, 0, 0].float()[:, None].expand(-1, 2) + 0.1
        )  # 0.1 is no fp16 number
        return {"a": {"summary": first, "patches": first[:, None].expand(-1, 5, 2) + 1}}

    cached = train.CachedTiles(tiles, rows, outputs, seed=1)
    cached.fill(teach, list(range(0, 100, 2)), 0)
    assert outputs["done"].tolist() == [1, 0] * 50 and (outputs["a"][1::2] == 0).all()
    cached.fill(teach, list(range(1, 100, 2)), 0)
    assert outputs["done"].all()
    batch = next(iter(data.batches(cached, range(200), 100)))
    drawn = batch["image"][:, 0, 0, 0]
    assert sorted(drawn.tolist()) == list(range(100))  # every tile once an epoch
    assert drawn.tolist() == rows[epoch_order(1, 0, 100)].tolist()
    expected = (drawn.float() + 0.1).half()
    assert torch.equal(batch["outputs"]["a"]["summary"], expected[:, None].expand(-1, 2))
    assert torch.equal(batch["outputs"]["a"]["patches"][:, 4, 1], (drawn.float() + 1.1).half())


CACHED = [*TINY, "--steps", 6, "--log-every", 1]
HALF = 2**-11  # half a unit in the last place of fp16, relative


@pytest.fixture(scope="module")
def cached(tmp_path_factory, weights_dir):
    """80 tiles (two batches of the teachers), their outputs in cache/, and run/: three steps of six over these."""
    folder = tmp_path_factory.mktemp("cached")
    write_tiles(folder / "tiles", 80, (72, 64))
    flags = ["--data", folder / "tiles", "--cache", folder / "cache", "--weights-dir", weights_dir]
    launch(*CACHED, *flags, "--stop-at", 3, "--out", folder / "run")
    return folder


def no_teacher(*_, **__):
    raise AssertionError("a teacher was loaded")


def one_by_one(teacher, images, grid=None, forward=teachers.Teacher.forward):
    """Teacher.forward, tile by tile and rounded to fp16: the same numbers however the tiles are batched."""
    alone = [forward(teacher, image[None], grid) for image in images]
    return {kind: torch.cat([tokens[kind] for tokens in alone]).half() for kind in alone[0]}


def test_a_cached_run_is_the_uncached_run_on_the_same_views_bit_for_bit(
    tmp_path, run, cached, monkeypatch
):
    monkeypatch.setattr(teachers.Teacher, "forward", one_by_one)
    flags = [*CACHED, "--data", cached / "tiles"]
    run(*flags, "--out", tmp_path / "uncached")
    run(*flags, "--cache", tmp_path / "cache", "--out", tmp_path / "cached")
    assert (
        losses(tmp_path / "uncached") == losses(tmp_path / "cached")
        and len(losses(tmp_path / "cached")) == 6
    )
    assert_same(checkpoint(tmp_path / "uncached"), checkpoint(tmp_path / "cached"))


def test_a_cached_run_differs_from_the_uncached_by_the_rounding_to_fp16(tmp_path, run, cached):
    # by channel: the eigenvectors of phi-s, and so the random student's first loss (by 0.4 %), turn with any rounding
    flags = [*CACHED, "--standardize", "channel", "--stop-at", 3, "--data", cached / "tiles"]
    run(*flags, "--out", tmp_path / "uncached")
    run(*flags, "--cache", cached / "cache", "--out", tmp_path / "cached")
    uncached, rounded = losses(tmp_path / "uncached"), losses(tmp_path / "cached")
    # the first loss sees the rounding of targets alone, the others that of AdamW's first steps too
    assert (
        abs(rounded[1] / uncached[1] - 1) < HALF / 10 and abs(rounded[3] / uncached[3] - 1) < HALF
    )


def test_cached_rows_are_the_teachers_outputs_on_the_first_epochs_views(cached, weights_dir):
    tiles, outputs = data.FolderTiles(cached / "tiles", 64, 0), outputs_in(cached / "cache", 80)
    images = torch.stack([tiles[k]["image"] for k in (0, 1, 63, 64, 79)])
    for name, rows in outputs.items():
        tokens = teachers.load_teacher(name, weights_dir, steps=2)(images, 8)
        expected = torch.cat([tokens["summary"][:, None], tokens["patches"]], 1)
        got = torch.from_numpy(rows[[0, 1, 63, 64, 79]]).float()
        torch.testing.assert_close(got, expected, rtol=1.1 * HALF, atol=1e-5)


def test_a_full_cache_needs_no_teacher_no_weights_and_no_certain_seed(
    tmp_path, cached, monkeypatch, capsys
):
    monkeypatch.setattr(teachers, "load_teacher", no_teacher)
    before = {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (cached / "cache").iterdir()
    }
    flags = [*CACHED, "--stop-at", 3, "--data", cached / "tiles", "--cache", cached / "cache"]
    flags += ["--weights-dir", tmp_path / "nothing"]
    launch(*flags, "--out", tmp_path / "again")
    assert (
        f"teacher toy_cells: its outputs in {cached / 'cache'}; licence Apache-2.0"
        in capsys.readouterr().out
    )
    assert_same(checkpoint(cached / "run"), checkpoint(tmp_path / "again"))
    seeds, original = [], data.FolderTiles.__init__

    def opened(tiles, root, size, seed, *more):
        seeds.append(seed)
        original(tiles, root, size, seed, *more)

    monkeypatch.setattr(data.FolderTiles, "__init__", opened)
    launch(*flags, "--seed", 3, "--out", tmp_path / "other")
    assert seeds == [0]  # the views are those that the teachers saw
    assert losses(tmp_path / "other") != losses(tmp_path / "again") == losses(cached / "run")
    assert before == {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (cached / "cache").iterdir()
    }


def test_a_cached_run_resumed_equals_the_straight_run(tmp_path, run, cached, monkeypatch):
    monkeypatch.setattr(teachers, "load_teacher", no_teacher)
    run(
        *CACHED,
        "--data",
        cached / "tiles",
        "--cache",
        cached / "cache",
        "--out",
        tmp_path / "straight",
    )
    shutil.copytree(cached / "run", tmp_path / "halves")
    run("--resume", tmp_path / "halves", "--stop-at", 6, "--workers", 2)
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "halves"))
    with pytest.raises(InputError, match="--cache: this run has"):
        run("--resume", tmp_path / "halves", "--cache", tmp_path / "another")


def test_a_cache_from_shards(tmp_path, run, shards, weights_dir, monkeypatch):
    flags = [*TINY, "--steps", 2, "--data", shards, "--cache", tmp_path / "cache"]
    run(*flags, "--out", tmp_path / "first")
    tiles = data.FolderTiles(shards, 64, 0)
    for name, rows in outputs_in(tmp_path / "cache", 12).items():
        expected = teachers.load_teacher(name, weights_dir, steps=2)(tiles[7]["image"][None])[
            "summary"
        ][0]
        torch.testing.assert_close(
            torch.from_numpy(rows[7, 0]).float(), expected, rtol=1.1 * HALF, atol=1e-5
        )
    monkeypatch.setattr(teachers, "load_teacher", no_teacher)
    run(*flags, "--out", tmp_path / "second")
    assert_same(checkpoint(tmp_path / "first"), checkpoint(tmp_path / "second"))
    shutil.copy(shards / "a.tar", shards / "d.tar")
    with pytest.raises(
        InputError, match="--cache: .* was made with tiles 12 tiles, .*, now 15 tiles, "
    ):
        run(*flags, "--out", tmp_path / "third")


def test_an_interrupted_cache_goes_on_where_it_was(tmp_path, run, cached, monkeypatch, capsys):
    seen = []

    def interrupted(teacher, images, grid=None, forward=teachers.Teacher.forward):
        seen.append((teacher.name, len(images)))
        if len(seen) == 4:  # one teacher has done the second batch, the other not
            raise KeyboardInterrupt
        return forward(teacher, images, grid)

    monkeypatch.setattr(teachers.Teacher, "forward", interrupted)
    flags = [*CACHED, "--stop-at", 3, "--data", cached / "tiles", "--cache", tmp_path / "cache"]
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--out", tmp_path / "run")
    row = 2 + 2 * 2 * 65 * 128  # bytes: done, two teachers
    assert (tmp_path / "cache" / "outputs").read_bytes()[::row] == b"\1" * 64 + b"\0" * 16
    run(
        *flags, "--out", tmp_path / "run"
    )  # it holds no checkpoint yet, so the same command goes on
    assert (
        seen
        == [("toy_cells", 64), ("toy_tissue", 64), ("toy_cells", 16), ("toy_tissue", 16)] + seen[4:]
    )
    assert seen[4:] == [("toy_cells", 16), ("toy_tissue", 16)]
    assert_same(checkpoint(cached / "run"), checkpoint(tmp_path / "run"))
    for path in (cached / "cache").iterdir():
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes(), path.name


def test_a_cache_replaces_unreadable_tiles_as_a_run_does(tmp_path, run, tiles, monkeypatch, capsys):
    write_tiles(tiles / "more", 100, (64, 64))
    (tiles / "broken.png").write_bytes(b"broken")
    broken = data.list_tiles(tiles).index("broken.png")
    k = epoch_order(0, 0, 113).tolist().index(broken)  # sample k of seed 0 would be the broken tile
    flags = [
        *TINY,
        "--batch-size",
        16,
        "--steps",
        8,
        "--stop-at",
        k // 16 + 1,
        "--log-every",
        1,
        "--data",
        tiles,
    ]
    monkeypatch.setattr(teachers.Teacher, "forward", one_by_one)
    run(*flags, "--out", tmp_path / "uncached")
    run(*flags, "--cache", tmp_path / "cache", "--out", tmp_path / "cached")
    assert capsys.readouterr().err.count("broken.png") == 2  # each run names it once
    assert losses(tmp_path / "cached") == losses(tmp_path / "uncached")
    assert_same(checkpoint(tmp_path / "cached"), checkpoint(tmp_path / "uncached"))


def change_one_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])


def change_one_weight(folder):
    path = next(folder.glob("toy_tissue-*"))
    content = torch.load(path, weights_only=True)
    content["norm.weight"][3] += 1e-3
    torch.save(content, path)


def enlarge(path):
    path.write_bytes(path.read_bytes() + b"\0")  # which png readers do not mind


OTHERS = {  # what is changed: the flags, and what the message says
    "teachers": (
        ["--teachers", "toy_cells"],
        r"teachers \['toy_cells', 'toy_tissue'\], now \['toy_cells'\]",
    ),
    "weights": ([], "weights of toy_tissue [0-9a-f]{64}, now [0-9a-f]{64}"),
    "tile added": ([], "tiles 80 tiles, [0-9a-f]{16}, now 81 tiles, [0-9a-f]{16}"),
    "tile removed": ([], "tiles 80 tiles, [0-9a-f]{16}, now 79 tiles, [0-9a-f]{16}"),
    "tile changed": ([], "tiles 80 tiles, [0-9a-f]{16}, now 80 tiles, [0-9a-f]{16}"),
    "tile changed in place": ([], "tiles 80 tiles, [0-9a-f]{16}, now 80 tiles, [0-9a-f]{16}"),
    "tile renamed": ([], "tiles 80 tiles, [0-9a-f]{16}, now 80 tiles, [0-9a-f]{16}"),
    "size": (["--student", "vit_s"], "crop 64, now 224"),
    "grid": ([], "grid 8, now 4"),
    "steps": (
        ["--teacher-steps", 3],
        r"recipe \{'steps': 2, 'seed': 0\}, now \{'steps': 3, 'seed': 0\}",
    ),
    "seed": (
        ["--teacher-seed", 3],
        r"recipe \{'steps': 2, 'seed': 0\}, now \{'steps': 2, 'seed': 3\}",
    ),
}


@pytest.mark.parametrize("changed", OTHERS)
def test_a_cache_made_from_something_else_is_refused_by_name(
    tmp_path, cached, weights_dir, monkeypatch, changed
):
    tiles, cache, weights = (tmp_path / name for name in ("tiles", "cache", "weights"))
    shutil.copytree(cached / "tiles", tiles)
    shutil.copytree(cached / "cache", cache)
    weights.mkdir()
    for path in weights_dir.glob("toy_*-2-0.pt"):
        shutil.copy(path, weights)
    change = {
        "weights": lambda: change_one_weight(weights),
        "tile added": lambda: shutil.copy(tiles / "tile_003.png", tiles / "x.png"),
        "tile removed": lambda: (tiles / "tile_003.png").unlink(),
        "tile changed": lambda: enlarge(tiles / "tile_003.png"),
        "tile changed in place": lambda: change_one_byte(tiles / "tile_003.png"),
        "tile renamed": lambda: (tiles / "tile_003.png").rename(tiles / "x.png"),
        "grid": lambda: monkeypatch.setitem(STUDENTS, "toy", STUDENTS["toy"] | {"patch_size": 16}),
    }
    change.get(changed, lambda: None)()
    before = {path: path.read_bytes() for path in cache.iterdir()}
    monkeypatch.setattr(teachers, "load_teacher", no_teacher)
    flags = [
        *CACHED,
        "--data",
        tiles,
        "--cache",
        cache,
        "--weights-dir",
        weights,
        "--out",
        tmp_path / "run",
    ]
    with pytest.raises(
        InputError, match=f"^--cache: {cache} was made with {OTHERS[changed][1]}; give another"
    ) as error:
        launch(*flags, *OTHERS[changed][0])
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "last.pt").exists()
    assert before == {path: path.read_bytes() for path in cache.iterdir()}


def test_a_full_cache_that_has_lost_its_outputs_is_filled_again(tmp_path, run, cached):
    shutil.copytree(cached / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "outputs").unlink()
    flags = [*CACHED, "--data", cached / "tiles", "--cache", tmp_path / "cache", "--stop-at", 3]
    run(*flags, "--out", tmp_path / "run")
    assert_same(checkpoint(tmp_path / "run"), checkpoint(cached / "run"))


def test_a_cache_in_another_place_is_as_good(tmp_path, cached, monkeypatch):
    for name in ("tiles", "cache"):
        shutil.copytree(cached / name, tmp_path / f"moved {name}")
    monkeypatch.setattr(teachers, "load_teacher", no_teacher)
    flags = [
        "--data",
        tmp_path / "moved tiles",
        "--cache",
        tmp_path / "moved cache",
        "--weights-dir",
        tmp_path,
    ]
    launch(*CACHED, "--stop-at", 1, *flags, "--out", tmp_path / "run")
    assert losses(tmp_path / "run")[1] == losses(cached / "run")[1]


def test_a_disk_without_the_space_for_a_cache_is_refused_before_anything_is_written(
    tmp_path, run, tiles, monkeypatch
):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)
    )
    with pytest.raises(
        InputError, match=f"^--cache: {tmp_path}/deep/er lacks 0.000299 GB; take"
    ) as error:
        run(
            *TINY,
            "--steps",
            1,
            "--data",
            tiles,
            "--cache",
            tmp_path / "deep" / "er",
            "--out",
            tmp_path / "run",
        )
    assert "\n" not in str(error.value)
    assert (
        not (tmp_path / "deep" / "er" / "outputs").exists()
        and not (tmp_path / "run" / "last.pt").exists()
    )


def test_a_damaged_cache_is_refused_by_the_run(tmp_path, run, cached):
    shutil.copytree(cached / "cache", tmp_path / "cache")
    with open(tmp_path / "cache" / "outputs", "r+b") as file:
        file.truncate(1000)
    flags = [
        *CACHED,
        "--data",
        cached / "tiles",
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "run",
    ]
    with pytest.raises(
        InputError,
        match=rf"--cache: {tmp_path}/cache was made with bytes 1000, now 2662560; give another",
    ):
        run(*flags)


def test_runs_of_before_the_cache_go_on(tmp_path, run, tiles):
    run(*TINY, "--steps", 3, "--stop-at", 1, "--data", tiles, "--out", tmp_path / "run")
    content = checkpoint(tmp_path / "run")
    del content["args"]["cache"]
    torch.save(content, tmp_path / "run" / "last.pt")
    run("--resume", tmp_path / "run", "--stop-at", 3)
    assert checkpoint(tmp_path / "run")["step"] == 3


BAD = {
    "--teachers unii": "--teachers: no teacher is called 'unii'",
    "--teachers ,": "--teachers",
    "--student vit_x": "--student",
    "--student toy --teachers uni": "--student toy",
    "--dims 4,x": "--dims",
    "--dims 0": "--dims",
    "--dims 96": "--dims: [48, 96] do not fit the width of toy; give dims from 1 to 48",
    "--dims 1000 --student vit_b": "--dims: [768, 1000] do not fit the width of vit_b",
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
    "--data nowhere": "nowhere is no folder of images and no uncompressed .tar, or does not exist",
    "--data nowhere.tar": "nowhere.tar is no folder of images and no uncompressed .tar, or does not exist",
    "--cache=": "--cache: it is empty",
    "--cache kept": "--cache: give --data as well",
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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has 2.00 GiB free."
        ),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("a fault of ours"),
    ],
)
def test_out_of_memory_names_the_flags_to_lower(monkeypatch, capsys, error):
    monkeypatch.setattr(sys, "argv", ["/x/train.py"])
    ours = str(error) == "a fault of ours"

    def main():
        raise error

    with pytest.raises(RuntimeError if ours else SystemExit) as stop:
        teachers.run_main(main)
    line = capsys.readouterr().err
    assert ours or (
        stop.value.code == 2
        and line.startswith("train.py: out of memory; anew, lower --batch-size")
    )
    assert line.count("\n") == (not ours) and (ours or "--accumulate" in line)


def test_an_empty_folder_and_a_missing_run_on_the_real_command_line(tmp_path):
    for argv, expected in (
        (
            ["train.py", "--data", tmp_path, "--device", "cpu"],
            f"train.py: --data: {tmp_path} holds no images",
        ),
        (["evaluate.py", tmp_path / "x"], f"evaluate.py: {tmp_path}/x does not exist"),
    ):
        result = script(*argv, cwd=tmp_path)
        assert (
            result.returncode == 2
            and result.stderr.startswith(expected)
            and result.stderr.count("\n") == 1
        )


def test_a_folder_that_cannot_be_made_is_refused_before_anything_slow(
    tmp_path, monkeypatch, capsys, weights_dir
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for out, weights in (("file", weights_dir), ("run", f"{tmp_path}/file/w")):
        argv = [*TINY, "--steps", "1", "--out", f"{tmp_path}/{out}", "--weights-dir", str(weights)]
        with pytest.raises(SystemExit) as stop:
            teachers.run_main(lambda argv=argv: train.train(train.parse_args(argv)))
        printed = capsys.readouterr()
        assert (
            stop.value.code == 2
            and printed.err.count("\n") == 1
            and f"{tmp_path}/file" in printed.err
        )
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
            for key in (
                "norm.weight",
                "norm.bias",
            ):  # cut to m: the norm's channels from m on are zeroed
                content["state_dict"][key][m:] = 0
            torch.save(content, tmp_path / "cut.pt")
            settings = {
                "img_size": 224,
                "num_classes": 0,
                "checkpoint_path": str(tmp_path / "cut.pt"),
            }
            loaded = timm.create_model("vit_small_patch14_reg4_dinov2", **settings).eval()
            got = loaded(normalised)
            torch.testing.assert_close(got[:, :m], z[:, :m], rtol=1e-4, atol=1e-5)
            assert m == 384 or got[:, m:].abs().max() == 0


@pytest.mark.parametrize("name", STUDENTS)
def test_every_students_state_dict_loads_into_timm(name):
    timm_twin(STUDENTS[name]).load_state_dict(
        Student(name, {}, []).backbone.state_dict(), strict=True
    )


def test_published_teachers_shallow_end_to_end(tmp_path, shallow, tiles, capsys):  # noqa: F811 - a fixture
    for name, suffix in (("uni", "bin"), ("virchow", "safetensors")):
        published_file(name, tmp_path, suffix)
    flags = [
        "--teachers",
        "uni,virchow",
        "--student",
        "vit_s",
        "--steps",
        2,
        "--batch-size",
        2,
        "--data",
        tiles,
    ]
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
    assert (
        "binds students: yes" in config["licences"]["uni"]
        and "licence " + config["licences"]["virchow"] in printed
    )


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


def test_init_by_name_warm_start_and_inherited_licences(
    tmp_path, weights_dir, tiles, one_layer, capsys
):
    def run(*argv):
        flags = [
            *TINY[:2],
            "--student",
            "vit_s",
            "--batch-size",
            2,
            "--steps",
            1,
            "--data",
            tiles,
            "--device",
            "cpu",
        ]
        flags += ["--stats-tiles", 2, "--weights-dir", weights_dir, *argv]
        train.train(train.parse_args(list(map(str, flags))))
        return torch.load(
            tmp_path / argv[argv.index("--out") + 1] / "student.pt", weights_only=True
        )

    state, _ = cards.reference("dinov2_s", "timm", tmp_path, depth=1)
    cards.write(state, weights_dir / "dinov2_s.safetensors")
    first = run(
        "--init", "dinov2_s", "--lr", 1e-9, "--teachers", "toy_cells", "--out", tmp_path / "first"
    )
    assert first["config"]["licences"] == {
        name: TEACHERS[name].licence for name in ("dinov2_s", "toy_cells")
    }
    assert (
        f"begun from dinov2_s; licence dinov2_s: {TEACHERS['dinov2_s'].licence}"
        in capsys.readouterr().out
    )
    torch.testing.assert_close(
        first["state_dict"]["norm.weight"], state["norm.weight"], atol=1e-6, rtol=0
    )
    warm = [
        "--init",
        tmp_path / "first" / "student.pt",
        "--teachers",
        "toy_tissue",
        "--out",
        tmp_path / "second",
    ]
    second = run(*warm, "--lr", 1e-9, "--stop-at", 1)
    assert list(second["config"]["licences"]) == ["dinov2_s", "toy_cells", "toy_tissue"]
    for key, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][key], value, atol=1e-6, rtol=0)
    (weights_dir / "dinov2_s.safetensors").unlink()  # a resume reads the checkpoint, not --init
    assert train.parse_args(["--resume", str(tmp_path / "first")]).init == "dinov2_s"
    with pytest.raises(
        InputError,
        match="--init: .*first/student.pt holds another model: .*cls_token is .*, expected",
    ):
        train.train(
            train.parse_args(
                [*TINY, "--init", f"{tmp_path}/first/student.pt", "--out", f"{tmp_path}/third"]
            )
        )
    student = Student("vit_s", {}, [])
    assert list(load_init(student.backbone, str(tmp_path / "first"))) == [
        "dinov2_s",
        "toy_cells",
    ]  # the run's folder
    assert torch.equal(student.backbone.norm.weight, first["state_dict"]["norm.weight"])
    for init, message in (
        ("none.pt", "none.pt is no file"),
        ("toy_cells", "toy_cells is no file and no published"),
    ):
        with pytest.raises(InputError, match=f"--init: {message}"):
            train.train(train.parse_args([*TINY, "--init", init, "--out", f"{tmp_path}/third"]))
    with pytest.raises(InputError, match="no weights for dinov2_b"):
        train.train(train.parse_args([*TINY, "--init", "dinov2_b", "--out", f"{tmp_path}/third"]))
    assert not (tmp_path / "third").exists()


def test_licences_and_init_survive_a_resume(tmp_path, run):
    student = Student("toy", {}, [])
    config = {"licences": {"uni": "binds"}}
    torch.save(
        {"state_dict": student.backbone.state_dict(), "config": config}, tmp_path / "student.pt"
    )
    whole = [*TINY, "--steps", 4, "--seed", 3, "--init", tmp_path / "student.pt"]
    run(*whole, "--out", tmp_path / "whole")
    run(*whole, "--stop-at", 2, "--out", tmp_path / "parts")
    (tmp_path / "student.pt").unlink()
    run("--resume", tmp_path / "parts", "--stop-at", 4)
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))
    for name in ("whole", "parts"):
        config = torch.load(tmp_path / name / "student.pt", weights_only=True)["config"]
        assert (
            list(config["licences"]) == ["uni", "toy_cells", "toy_tissue"]
            and config["licences"]["uni"] == "binds"
        )


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
    old = {
        "state_dict": Student("toy", {}, []).backbone.state_dict(),
        "config": {"teachers": {"uni": "binds"}},
    }
    torch.save(old, tmp_path / "old.pt")
    assert load_init(Student("toy", {}, []).backbone, str(tmp_path / "old.pt")) == {"uni": "binds"}


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    data.save_atomically({"step": 1}, tmp_path / "last.pt")
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InputError, match="last.pt: .*No space left"):
        data.save_atomically({"step": 2}, tmp_path / "last.pt")
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_schedule_and_weight_decay():
    rates = [train.learning_rate(step, 100, 1.0) for step in range(100)]
    assert (
        rates[:4] == [0.25, 0.5, 0.75, 1.0]
        and max(rates) == 1
        and rates[4:] == sorted(rates[4:], reverse=True)
    )
    assert rates[-1] < 0.01 and train.learning_rate(0, 1, 1.0) == 1
    student = Student("toy", {"a": 24}, [4])
    names = {id(p): name for name, p in student.named_parameters()}
    decay, keep = ({names[id(p)] for p in group["params"]} for group in student.parameter_groups())
    assert decay | keep == set(names.values()) and not decay & keep
    assert all(name.endswith("weight") and "norm" not in name for name in decay)
    assert {
        "backbone.pos_embed",
        "backbone.cls_token",
        "backbone.reg_token",
        "backbone.norm.weight",
    } <= keep
    assert "adaptors.a.4.summary.1.weight" in keep and "adaptors.a.4.summary.0.weight" in decay


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_cuda_amp(tmp_path, run, precision):
    flags = ["--teacher-steps", 2, "--batch-size", 8, "--precision", precision, "--steps", 10]
    run(*flags, "--out", tmp_path / "run", "--stop-at", 5)
    run("--resume", tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == 10


# ---- last.pt: whole, of this run, or refused by name -----------------------------------------------------------------
FEW = [
    "--teachers",
    "toy_cells",
    "--teacher-steps",
    2,
    "--device",
    "cpu",
    "--dims",
    4,
    "--stats-tiles",
    2,
]
FEW += ["--batch-size", 2, "--log-every", 1]


@pytest.fixture(scope="module")
def halfway(tmp_path_factory, weights_dir):
    """tiles/, and run/: two steps of three over them; whole/: all three."""
    folder = tmp_path_factory.mktemp("halfway")
    write_tiles(folder / "tiles", 6)
    flags = [*FEW, "--steps", 3, "--data", folder / "tiles", "--weights-dir", weights_dir]
    launch(*flags, "--stop-at", 2, "--out", folder / "run")
    launch(*flags, "--out", folder / "whole")
    return folder


def put(*keys_and_value):
    """A damage: content[key][key]... becomes the value, or goes where it is `...`."""
    *keys, last, value = keys_and_value

    def damage(content):
        place = content
        for key in keys:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value(place[last]) if callable(value) else value

    return damage


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = math.nan
    return tensor


def optimizer_of(student):
    groups = [[p for p in student.parameters() if (p.ndim < 2) == small] for small in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    sum(p.sum() for p in student.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


WEIGHT = "backbone.blocks.1.mlp.fc1.weight"
DAMAGES = {  # of a last.pt; an entry (damage, True) may also be gone on with, if the end is the same
    **{
        f"no {key}": put(key, ...)
        for key in sorted(train.WHOLE if hasattr(train, "WHOLE") else train.CHECKPOINT)
    },
    **{
        f"{key} none": put(key, None)
        for key in ("student", "standardizers", "optimizer", "step", "args")
    },
    **{
        f"{key} a text": put(key, "x")
        for key in ("student", "standardizers", "optimizer", "step", "args", "tiles")
    },
    **{
        f"{key} a list": put(key, [1])
        for key in ("student", "standardizers", "optimizer", "step", "args", "tiles")
    },
    **{
        f"{key} a number": put(key, 5)
        for key in ("student", "standardizers", "optimizer", "args", "tiles")
    },
    "scaler a number": (put("scaler", 5), True),
    "scaler a text": (put("scaler", "x"), True),
    "no licences": (put("licences", ...), True),
    "step negative": put("step", -1),
    "step nan": put("step", math.nan),
    "step a fraction": put("step", 1.5),
    "step a whole fraction": put("step", 2.0),
    "step a tensor": put("step", torch.tensor(2)),
    "student of other dims": put(
        "student", lambda _: Student("toy", {"toy_cells": 128}, [8]).state_dict()
    ),
    "student of other teachers": put(
        "student", lambda _: Student("toy", {"toy_tissue": 128}, [4]).state_dict()
    ),
    "a weight missing": put("student", WEIGHT, ...),
    "a weight too many": put("student", lambda state: {**state, "x": torch.zeros(1)}),
    "a weight of another shape": put("student", WEIGHT, torch.zeros(3)),
    "a weight of whole numbers": put("student", WEIGHT, lambda w: w.long()),
    "a weight of bits": put("student", WEIGHT, lambda w: w > 0),
    "a weight that is a number": put("student", WEIGHT, 1.0),
    "a weight that is nan": put("student", WEIGHT, with_nan),
    "a head that is inf": put(
        "student", "adaptors.toy_cells.4.patches.0.bias", lambda w: w / 0 + math.inf
    ),
    "a standardiser missing": put("standardizers", "toy_cells.summary.mean", ...),
    "a standardiser that is nan": put("standardizers", "toy_cells.summary.mean", with_nan),
    "a standardiser of another width": put(
        "standardizers", "toy_cells.summary.mean", torch.zeros(3)
    ),
    "a scale of zero": put("standardizers", "toy_cells.patches.scale", torch.zeros(128)),
    "optimiser empty": put("optimizer", {}),
    "optimiser without state": put("optimizer", "state", ...),
    "optimiser without groups": put("optimizer", "param_groups", ...),
    "optimiser with one group": put("optimizer", "param_groups", lambda groups: groups[:1]),
    "optimiser of other dims": put(
        "optimizer", lambda _: optimizer_of(Student("toy", {"toy_cells": 128}, [8]))
    ),
    "optimiser of two teachers": put(
        "optimizer", lambda _: optimizer_of(Student("toy", {"a": 128, "b": 128}, [4]))
    ),
    "tiles of another folder": put("tiles", "sha256", "0" * 64),
    "tiles without their count": put("tiles", "count", ...),
    "args empty": put("args", {}),
    **{
        f"args without {key}": (put("args", key, ...), True)
        for key in ("teachers", "student", "dims", "steps", "seed")
    },
    **{
        f"args without {key}": (put("args", key, ...), True)
        for key in ("batch_size", "lr", "data", "weights_dir")
    },
    "args with a surplus key": (put("args", "colour", 1), True),
    "args of another student": put("args", "student", "vit_s"),
    "args of a student that is none": put("args", "student", "vit_x"),
    "args of other teachers": put("args", "teachers", ["toy_tissue"]),
    "args of teachers that are none": put("args", "teachers", ["toy"]),
    "args of no teachers": put("args", "teachers", []),
    "args of a teacher that is a number": put("args", "teachers", [1]),
    "args of teachers as one text": put("args", "teachers", "toy_cells"),
    "args of other dims": put("args", "dims", [8]),
    "args of dims too wide": put("args", "dims", [4, 480]),
    "args: lr nan": put("args", "lr", math.nan),
    "args: lr negative": put("args", "lr", -1.0),
    "args: standardize another": (
        put("args", "standardize", "pca"),
        True,
    ),  # the statistics are there already
    "args: data a number": put("args", "data", 5),
    "args: precision another": (put("args", "precision", "fp8"), True),
    "args: device another": put("args", "device", "gpu"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_it(tmp_path, halfway, case):
    damage, harmless = DAMAGES[case] if isinstance(DAMAGES[case], tuple) else (DAMAGES[case], False)
    content = checkpoint(halfway / "run")
    damage(content)
    shutil.copytree(halfway / "run", run := tmp_path / "run")
    torch.save(content, run / "last.pt")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    try:
        launch("--resume", run)
    except InputError as error:
        assert "\n" not in str(error), error
        assert (
            "last.pt" in str(error)
            or str(run) in str(error)
            or re.search(r"--[a-z-]+:", str(error))
        ), error
        assert before == {path.name: path.read_bytes() for path in run.iterdir()}
    else:
        assert harmless, "it was gone on with"
        assert_same(checkpoint(halfway / "whole"), checkpoint(run))


@pytest.mark.parametrize("place", [0, 10, 0.3, 0.9, -1])
def test_a_checkpoint_that_is_cut_or_flipped_is_refused(tmp_path, halfway, place):
    shutil.copytree(halfway / "run", run := tmp_path / "run")
    whole = bytearray((run / "last.pt").read_bytes())
    place = int(place * len(whole)) if isinstance(place, float) else place % len(whole)
    for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
        (run / "last.pt").write_bytes(damaged)
        with contextlib.suppress(InputError):  # a flip may hit a byte that means nothing
            launch("--resume", run)
            assert_same(checkpoint(halfway / "whole"), checkpoint(run))
            assert damaged is not whole[:place] and len(damaged) == len(whole)
            shutil.rmtree(run)
            shutil.copytree(halfway / "run", run)


# ---- numbers: what goes wrong is named with its step and its teacher ------------------------------------------------
NUMBERS = [
    "--teacher-steps",
    2,
    "--device",
    "cpu",
    "--dims",
    4,
    "--stats-tiles",
    8,
    "--batch-size",
    4,
]
NUMBERS += ["--log-every", 5]


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): the action is called with the student when step n begins."""
    monkeypatch.setattr(train, "Distiller", Spy)
    actions = collections.defaultdict(list)

    def learning_rate(step, steps, peak, original=train.learning_rate):
        for action in actions[step + 1]:
            action(Spy.student)
        return original(step, steps, peak)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    return lambda n, action: actions[n].append(action)


def stopped(run, *argv):
    """The message with which a run ends -> (its step, its text)."""
    with pytest.raises(InputError) as error:
        run(*argv)
    assert "\n" not in str(error.value) and "last.pt is from before" in str(error.value), (
        error.value
    )
    step, text = re.match(r"step (\d+): (.*)", str(error.value)).groups()
    del error
    gc.collect()  # the traceback held the run's variables, and so its lock
    return int(step), text


@pytest.mark.parametrize(
    ("teacher", "step", "value"),
    [("toy_cells", 1, math.inf), ("toy_tissue", 5, math.nan), ("toy_tissue", 11, -math.inf)],
)
def test_a_teacher_that_overflows_is_named(
    tmp_path, run, tiles, monkeypatch, at_step, teacher, step, value
):
    broken, mended = [], []

    def forward(self, images, grid=None, original=teachers.Teacher.forward):
        tokens = original(self, images, grid)
        if broken and self.name == teacher:
            tokens["patches"][-1, -1, -1] = value  # one number among thousands
        return tokens

    monkeypatch.setattr(teachers.Teacher, "forward", forward)
    at_step(step, lambda _: mended or broken.append(1))
    flags = [*NUMBERS, "--steps", 20, "--save-every", 4, "--data", tiles, "--out", tmp_path / "run"]
    at, text = stopped(run, *flags)
    assert at == step and re.search(rf"\bteacher {teacher}\b.* not finite", text), text
    kept = checkpoint(tmp_path / "run")
    assert kept["step"] == (step - 1) // 4 * 4 and all(
        x.isfinite().all() for x in kept["student"].values()
    )
    broken.clear()
    mended.append(1)
    run(
        "--resume", tmp_path / "run", "--stop-at", step + 1
    )  # with a teacher that is mended it goes on
    assert checkpoint(tmp_path / "run")["step"] == step + 1


def test_a_teacher_that_overflows_before_the_loop_is_named(tmp_path, run, tiles, monkeypatch):
    """In the statistics of the targets, and in a cache, whose fp16 holds numbers up to 65504."""
    factors = {"statistics": math.inf, "cache": 1e6}
    for where, factor in factors.items():

        def forward(self, images, grid=None, original=teachers.Teacher.forward, factor=factor):
            tokens = original(self, images, grid)
            return {
                kind: y * (factor if self.name == "toy_tissue" else 1) for kind, y in tokens.items()
            }

        with monkeypatch.context() as patch:
            patch.setattr(teachers.Teacher, "forward", forward)
            more = ["--cache", tmp_path / "cache"] if where == "cache" else []
            with pytest.raises(InputError, match=r"teacher toy_tissue.* not finite") as error:
                run(
                    *NUMBERS,
                    "--steps",
                    2,
                    "--data",
                    tiles,
                    *more,
                    "--out",
                    tmp_path / f"run of {where}",
                )
        assert (
            "\n" not in str(error.value) and not (tmp_path / f"run of {where}" / "last.pt").exists()
        )
        del error
        gc.collect()  # its traceback holds the locks


HEAD, BLOCK = "adaptors.toy_cells.4.summary.0.weight", "backbone.blocks.2.attn.qkv.bias"


@pytest.mark.parametrize(
    ("where", "step", "accumulate"), [(HEAD, 1, 1), (HEAD, 7, 2), (BLOCK, 7, 1)]
)
def test_a_poisoned_weight_is_told_as_a_loss_that_is_not_finite(
    tmp_path, run, tiles, at_step, where, step, accumulate
):
    at_step(step, lambda student: student.get_parameter(where).data.view(-1)[0].fill_(math.nan))
    flags = [
        *NUMBERS,
        "--accumulate",
        accumulate,
        "--steps",
        20,
        "--save-every",
        3,
        "--data",
        tiles,
    ]
    at, text = stopped(run, *flags, "--out", tmp_path / "run")
    assert at == step and text.startswith("the loss is not finite"), text
    kept = checkpoint(tmp_path / "run")
    assert kept["step"] == (step - 1) // 3 * 3 and all(
        x.isfinite().all() for x in kept["student"].values()
    )


def test_a_gradient_that_is_not_finite_under_a_finite_loss(tmp_path, run, tiles, at_step):
    def hook(student):
        student.get_parameter("backbone.pos_embed").register_hook(
            lambda gradient: gradient * math.inf
        )

    at_step(6, hook)
    at, text = stopped(
        run, *NUMBERS, "--steps", 20, "--save-every", 5, "--data", tiles, "--out", tmp_path / "run"
    )
    assert (
        at == 6
        and text.startswith("the gradient is not finite")
        and checkpoint(tmp_path / "run")["step"] == 5
    )


SOON = 30  # steps within which something that stays wrong has to be told


def stay_at_zero(student):  # the tokens of all tiles are the same from here on
    for p in student.backbone.norm.parameters():
        p.data.zero_()
        p.requires_grad_(False)


def collapse(student, forward=Student.forward):
    """The tokens of all tiles are those of the first one."""

    def same(images):
        return {kind: z[:1].expand_as(z) for kind, z in forward(student, images).items()}

    student.forward = same


def kill_head(t, m, kind):
    def kill(student):
        student.get_parameter(f"adaptors.{t}.{m}.{kind}.1.bias").data.fill_(
            -1e4
        )  # GELU then gives zeros

    return kill


DULL = [  # what goes wrong, in which step, and what the message has to say
    (stay_at_zero, 8, "the student has collapsed"),
    (collapse, 8, "the student has collapsed"),
    (kill_head("toy_cells", 4, "summary"), 1, "adaptor of teacher toy_cells at dim 4"),
    (kill_head("toy_tissue", 48, "summary"), 8, "adaptor of teacher toy_tissue at dim 48"),
    (kill_head("toy_tissue", 4, "patches"), 8, "adaptor of teacher toy_tissue at dim 4"),
]


@pytest.mark.parametrize(("action", "step", "expected"), DULL)
def test_a_collapsed_student_and_a_dead_adaptor_are_told(
    tmp_path, run, tiles, at_step, action, step, expected
):
    at_step(step, action)
    flags = [
        *NUMBERS,
        "--batch-size",
        2,
        "--steps",
        1000,
        "--stop-at",
        step + SOON,
        "--save-every",
        1000,
    ]
    at, text = stopped(run, *flags, "--data", tiles, "--out", tmp_path / "run")
    text = text.split(";")[0]  # what comes after names the run's folder
    assert expected in text and ("collapsed" in text) == ("collapsed" in expected) != (
        "dead" in text
    ), text
    assert step <= at < step + 25, at
    assert checkpoint(tmp_path / "run")["step"] == 0


@pytest.mark.parametrize(
    "case", ["toy", "vit_s", "bf16", "vit_b bf16", "one tile a step", "equal tiles"]
)
def test_a_healthy_run_raises_no_alarm(tmp_path, run, tiles, monkeypatch, case):
    name = case.split()[0] if case.startswith(("toy", "vit")) else "toy"
    if name != "toy":
        monkeypatch.setitem(STUDENTS, name, STUDENTS[name] | {"depth": 1})
        write_tiles(tiles, 12, (240, 230))
    if case == "equal tiles":
        for path in tiles.iterdir():
            shutil.copy(tiles / "tile_000.png", path) if path.name != "tile_000.png" else None
    batch = 1 if case == "one tile a step" else 2
    steps = 25 if case in ("bf16", "one tile a step", "equal tiles") else 1
    flags = [
        "--student",
        name,
        "--teachers",
        "toy_cells",
        "--teacher-steps",
        2,
        "--device",
        "cpu",
        "--stats-tiles",
        8,
        "--batch-size",
        batch,
    ]
    flags += ["--steps", 1000, "--stop-at", steps, "--log-every", 1, "--data", tiles]
    run(*flags, *(["--precision", "bf16"] if "bf16" in case else []), "--out", tmp_path / "run")
    assert checkpoint(tmp_path / "run")["step"] == steps
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["terms"]
    spreads = [x for key, values in first.items() if "spread" in key for x in values.values()]
    print(case, "smallest spread at step 1:", min(spreads, default="not logged"))
    assert batch == 1 or all(spread > 1e-5 for spread in spreads), (
        spreads
    )  # ten times what counts as dead


# ---- flags ----------------------------------------------------------------------------------------------------------
WRONG = [  # a command line of train.py, and what its message has to name
    *(
        (f"{flag}", flag)
        for flag in (
            "--steps",
            "--dims",
            "--data",
            "--out",
            "--resume",
            "--lr",
            "--teachers",
            "--cache",
        )
    ),
    *(
        (f"{flag} -5", flag)
        for flag in ("--steps", "--stop-at", "--accumulate", "--workers", "--teacher-seed")
    ),
    *(
        (f"{flag} 2147483648", flag)
        for flag in ("--steps", "--stop-at", "--seed", "--teacher-steps", "--save-every")
    ),
    *(
        (f"{flag} nan", flag)
        for flag in ("--steps", "--lr", "--dims", "--log-every", "--stats-tiles")
    ),
    *(
        (f"{flag} 1.5", flag)
        for flag in ("--batch-size", "--seed", "--accumulate", "--workers", "--dims")
    ),
    *(
        (f"{flag} 0", flag)
        for flag in ("--stop-at", "--batch-size", "--accumulate", "--lr", "--save-every")
    ),
    *((f"{flag} 0", flag) for flag in ("--log-every", "--teacher-steps", "--stats-tiles")),
    *((f"{flag} file", flag) for flag in ("--out", "--weights-dir", "--resume", "--cache")),
    *((f"{flag}=", flag) for flag in ("--out", "--steps", "--init", "--device", "--teachers")),
    ("--batch-size 65537", "--batch-size"),
    ("--batch-size 1e9", "--batch-size"),
    ("--batch-size 3 --accumulate 2", "--batch-size"),
    ("--batch-size ٣x", "--batch-size"),
    ("--workers 1025", "--workers"),
    ("--lr inf", "--lr"),
    ("--lr -inf", "--lr"),
    ("--lr 1e400", "--lr"),
    ("--lr fast", "--lr"),
    ("--dims ,", "--dims"),
    ("--dims -4", "--dims"),
    ("--dims 4,,8", "--dims"),
    ("--dims 99999999999", "--dims"),
    ("--student TOY", "--student"),
    ("--student vit_s,vit_b", "--student"),
    ("--teachers toy_cells,UNI", "--teachers"),
    ("--standardize PHI-S", "--standardize"),
    ("--precision fp8", "--precision"),
    ("--precision fp16 --device cpu", "--precision"),
    ("--device cuda:99", "--device"),
    ("--device cpu:x", "--device"),
    ("--device mps:1:2", "--device"),
    ("--data file", "file"),
    ("--data empty", "empty"),
    ("--data nowhere empty", "nowhere"),
    ("--data nowhere/*.tar", "--data"),
    ("--resume empty", "--resume"),
    ("--init nowhere.pt", "--init"),
    ("--init file", "file"),
    ("--init empty", "--init"),
    ("--init toy_cells", "--init"),
    ("--compile yes", "yes"),
    ("surplus", "surplus"),
    ("--nonsense 1", "--nonsense"),
    ("--batch_size 4", "--batch_size"),
    ("--out /proc/nowhere/run", "/proc/nowhere"),
    ("--weights-dir /proc/nowhere", "/proc/nowhere"),
    ("--out file/below", "file"),
    ("--weights-dir file/below", "file"),
    ("--cache file/below --data tiles", "file"),
    ("--cache /proc/nowhere --data tiles", "/proc/nowhere"),
    (["--steps", "1\n2"], "--steps"),
    (["--dims", "4,\n"], "--dims"),
    (["--teachers", "toy\ncells"], "--teachers"),
    (["--data", "no\nwhere"], "--data"),
    (["--out", "file\n/run", "--steps", "x\n"], "--steps"),
    (["--device", "c\npu"], "--device"),
    (["--init", "no\nwhere"], "--init"),
    (["--student", "\n"], "--student"),
    (["--out", "x" * 300], "xxx"),
    (["--resume", "x" * 5000], "xxx"),
    (["--weights-dir", "x" * 300], "xxx"),
]


def refused(monkeypatch, capsys, main, script, argv, *expected):
    """One line on stderr, exit code 2, nothing made in the current folder."""
    before = sorted(os.walk("."))
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as stop:
        teachers.run_main(main)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.count("\n") == 1, printed.err
    assert all(text in printed.err for text in expected) and printed.err.startswith(
        f"{script}: "
    ), printed.err
    made = [
        x
        for x in sorted(os.walk("."))
        if x not in before and x[2] != ["lock"] and "runs" not in x[1] + [x[0][2:]]
    ]
    assert not made, made  # but perhaps the lock of a folder that was meant to become a run's


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder: a file, an empty folder, tiles."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no weights\n")
    (tmp_path / "empty").mkdir()
    write_tiles(tmp_path / "tiles", 2)
    monkeypatch.setattr(teachers, "train_offline_teacher", no_teacher)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    WRONG,
    ids=[str(line)[:40].encode("ascii", "replace") for line, _ in WRONG],
)
def test_more_bad_flags_end_in_one_line_that_names_them(
    workplace, monkeypatch, capsys, line, expected
):
    words = line.split() if isinstance(line, str) else line
    if "/proc" in line or "below" in line or "xxx" in expected:
        monkeypatch.undo()  # the teachers are made first; two steps of them are quick
        monkeypatch.chdir(workplace)
        words = [*words, "--teacher-steps", "2"]
        words += (
            [] if "--weights-dir" in words else ["--weights-dir", str(workplace.parent / "weights")]
        )
    refused(monkeypatch, capsys, main, "train.py", words, expected)


WRONG_EVALUATION = [
    ("", "RUN"),
    ("nowhere", "nowhere"),
    ("empty", "empty"),
    ("file", "file"),
    ("run nowhere", "nowhere"),
    ("run --dims 96", "--dims"),
    ("run --dims x", "--dims"),
    ("run --dims 0", "--dims"),
    ("run --dim 0", "--dim"),
    ("run --dim 49 --out x.pt", "--dim"),
    ("run --dim 4", "--out"),
    ("run --dim nan --out x.pt", "--dim"),
    ("run --tasks sorting", "--tasks"),
    ("run --tasks ,", "--tasks"),
    ("run --embed tiles", "--out"),
    ("run --out x.npz", "--out"),
    ("run --embed tiles --out file", "--out"),
    ("run --embed tiles --out empty", "--out"),
    ("run --embed nowhere --out x.npz", "--embed"),
    ("run --embed empty --out x.npz", "--embed"),
    ("run --embed file --out x.npz", "--embed"),
    ("run --embed= --out x.npz", "--embed"),
    ("run --embed tiles --out /proc/x.npz", "/proc/x.npz"),
    ("run --embed tiles --out file/x.npz", "file/x.npz"),
    ("run run --embed tiles --out x.npz", "--out"),
    ("run --seed -1", "--seed"),
    ("run --seed 2147483648", "--seed"),
    ("run --device gpu", "--device"),
    ("run --weights-dir file", "--weights-dir"),
    ("run --teachers nobody", "--teachers"),
    ("run --teachers uni", "uni"),
    ("run --data nowhere", "nowhere"),
    ("run --data empty", "--data"),
    ("run --data tiles", "--data"),
    ("run --data=", "--data"),
    ("run --half yes", "yes"),
]


@pytest.mark.parametrize(("line", "expected"), WRONG_EVALUATION)
def test_bad_flags_of_evaluate(workplace, monkeypatch, capsys, line, expected):
    config = {
        "student": "toy",
        "arch": STUDENTS["toy"],
        "nested_dims": [4, 48],
        "step": 1,
        "steps": 1,
        "teachers": [],
    }
    config |= {"licences": {"toy_cells": "x"}, "teacher_recipe": {"steps": 2, "seed": 0}}
    torch.manual_seed(0)
    (workplace / "run").mkdir()
    content = {"state_dict": Student("toy", {}, []).backbone.state_dict(), "config": config}
    torch.save(content, workplace / "run" / "student.pt")
    refused(monkeypatch, capsys, evaluate.main, "evaluate.py", line.split(), expected)


WRONG_TEACHERS = [
    ("nobody", "nobody"),
    ("nobody tiles/tile_000.png", "nobody"),
    ("toy_cells", "TILE"),
    ("toy_cells nowhere.png", "nowhere.png"),
    ("toy_cells file", "file"),
    ("toy_cells tiles", "tiles"),
    ("toy_cells tiles/tile_000.png --device gpu", "--device"),
    ("toy_cells tiles/tile_000.png --precision fp8", "--precision"),
    ("toy_cells tiles/tile_000.png --precision fp16 --device cpu", "--precision"),
    ("toy_cells tiles/tile_000.png --weights-dir file", "--weights-dir"),
    ("uni tiles/tile_000.png --device cpu", "uni"),
    ("toy_cells tiles/tile_000.png surplus", "surplus"),
    ("--weights-dir=", "--weights-dir"),
]


@pytest.mark.parametrize(("line", "expected"), WRONG_TEACHERS)
def test_bad_flags_of_teachers(workplace, monkeypatch, capsys, line, expected):
    refused(monkeypatch, capsys, teachers.main, "teachers.py", line.split(), expected)
