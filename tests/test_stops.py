"""Runs that are stopped, killed, short of disk or crowded: nothing is lost, and one line says what happened."""

import builtins
import contextlib
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_tiles
from forks import Child, pair
from test_train import assert_same, checkpoint, losses

import data
import evaluate
import losses as losses_module
import student
import teachers
import train

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks, signals and limits of Linux"
)
ONE = [
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
ONE += ["--batch-size", 2, "--log-every", 1, "--save-every", 2]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums in one order here and in every child, which may not use more than one after a fork."""
    monkeypatch.setattr(evaluate, "N_TILES", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Six tiles, and undisturbed/: six steps over them, saves after 2, 4 and 6; half/: the same, stopped after 3."""
    folder = tmp_path_factory.mktemp("base")
    write_tiles(folder / "tiles", 6)
    folder.flags = flags = [
        *ONE,
        "--data",
        folder / "tiles",
        "--weights-dir",
        folder / "weights",
        "--steps",
        6,
    ]
    # the teachers are its own, made by one thread, as all that is compared with it
    assert Child(*flags, "--out", folder / "undisturbed").succeeds()
    assert Child(*flags, "--out", folder / "half", "--stop-at", 3).succeeds()
    return folder


class Folder(type(Path())):
    """A folder that can carry the flags of its runs."""


@pytest.fixture(scope="module", autouse=True)
def folders_carry_flags(tmp_path_factory):
    original = tmp_path_factory.mktemp
    tmp_path_factory.mktemp = lambda *args, **kwargs: Folder(original(*args, **kwargs))
    yield
    tmp_path_factory.mktemp = original


def resume(folder, *argv):
    """In this process: quick."""
    return train.train(train.parse_args(["--resume", str(folder), *map(str, argv)]))


def logged(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_undisturbed(folder, base):
    """The run has come to the same end as if nothing had happened, and nothing is left behind."""
    assert_same(checkpoint(base / "undisturbed"), checkpoint(folder))
    assert logged(folder) == logged(base / "undisturbed") and losses(folder) == losses(
        base / "undisturbed"
    )
    assert not list(folder.glob("*.tmp"))
    ours, theirs = (
        torch.load(x / "student.pt", weights_only=True) for x in (folder, base / "undisturbed")
    )
    assert ours["config"] == theirs["config"] and ours["config"]["step"] == 6
    assert all(
        torch.equal(value, theirs["state_dict"][key]) for key, value in ours["state_dict"].items()
    )


# ---- (a) stops ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_loop_after_a_step_and_the_resumed_run_is_the_undisturbed_one(
    tmp_path, base, name
):
    flags = [*base.flags[:-1], 400, "--save-every", 1000]
    command = [ROOT / "train.py", *flags, "--workers", 2, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        list(map(str, [sys.executable, *command])),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    number, lines = getattr(signal, name), []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 2/"):  # workers alone ignore it
            workers = [
                int(x)
                for x in Path(f"/proc/{process.pid}/task/{process.pid}/children")
                .read_text()
                .split()
            ]
            assert len(workers) == 2
            for pid in workers:
                os.kill(pid, number)
        if line.startswith(
            "step 6/"
        ):  # a terminal's Ctrl-C goes to the whole group, a cluster's SIGTERM to one
            (os.killpg if name == "SIGINT" else os.kill)(process.pid, number)
            break
    rest, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and not error, error
    said = re.search(
        r"stopped after step (\d+) of 400; go on with: python train.py --resume (.*)\n", rest
    )
    step = int(said[1])
    assert said[2] == str(tmp_path / "run") and 6 <= step < 60 and rest.endswith(said[0])
    last = checkpoint(tmp_path / "run")
    assert last["step"] == step and logged(tmp_path / "run") == [*range(1, step + 1)]
    assert torch.load(tmp_path / "run" / "student.pt", weights_only=True)["config"]["step"] == step
    assert not resume(tmp_path / "run", "--stop-at", step + 3)
    argv = [*flags, "--out", tmp_path / "undisturbed", "--stop-at", step + 3]
    assert not train.train(train.parse_args(list(map(str, argv))))
    assert_same(checkpoint(tmp_path / "undisturbed"), checkpoint(tmp_path / "run"))
    assert losses(tmp_path / "undisturbed") == losses(tmp_path / "run")


def at_step(n, action):
    """A patch: `action` is called when step n begins."""

    def patch():
        original = train.learning_rate

        def learning_rate(step, steps, peak):
            if step + 1 == n:
                action()
            return original(step, steps, peak)

        train.learning_rate = learning_rate

    return patch


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 1), ("SIGINT", 3), ("SIGTERM", 6)])
def test_a_signal_in_the_first_a_middle_and_the_last_step(tmp_path, base, name, step):
    number = getattr(signal, name)
    child = Child(
        *base.flags,
        "--out",
        tmp_path / "run",
        patch=at_step(step, lambda: os.kill(os.getpid(), number)),
    )
    assert child.wait() == 128 + number and not child.err, child.err
    assert (
        f"stopped after step {step} of 6; go on with: python train.py --resume {tmp_path}/run\n"
        in child.out
    )
    assert checkpoint(tmp_path / "run")["step"] == step and logged(tmp_path / "run") == [
        *range(1, step + 1)
    ]
    assert not resume(tmp_path / "run")
    assert_undisturbed(tmp_path / "run", base)


def test_an_impatient_user_and_a_signal_while_a_checkpoint_is_written(tmp_path, base):
    def patch():
        def replace(a, b, original=os.replace):
            if Path(b).name == "last.pt" and (base.parent / "never").exists() is False:
                for _ in range(3):
                    os.kill(os.getpid(), signal.SIGINT)
                    os.kill(os.getpid(), signal.SIGTERM)
            original(a, b)

        at_step(2, lambda: setattr(os, "replace", replace))()

    child = Child(*base.flags, "--out", tmp_path / "run", patch=patch)
    assert child.wait() in (130, 143) and not child.err, (
        child.err
    )  # the save of step 2 is done, then step 3
    assert "stopped after step 3 of 6" in child.out and checkpoint(tmp_path / "run")["step"] == 3
    resume(tmp_path / "run")
    assert_undisturbed(tmp_path / "run", base)


BEFORE = {  # where a run can be before its loop, and the flags for it
    "drawing": (data, "draw_tissue", []),
    "offline teachers": (teachers, "train_offline_teacher", ["--teacher-steps", 3]),
    "filling a cache": (teachers.Teacher, "forward", ["--cache", "cache"]),
    "statistics": (losses_module.Standardizers, "measure", []),
}


@pytest.mark.parametrize(
    ("where", "name"), [*zip(BEFORE, ["SIGINT", "SIGTERM"] * 2), ("statistics", "SIGINT")]
)
def test_a_signal_before_the_loop_ends_at_once(tmp_path, base, where, name):
    owner, attribute, more = BEFORE[where]
    number = getattr(signal, name)
    more = [tmp_path / x if x == "cache" else x for x in more]

    def patch():
        original = getattr(owner, attribute)

        def signalled(*args, **kwargs):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            return original(*args, **kwargs)

        setattr(owner, attribute, signalled)

    flags = [
        *base.flags,
        *more,
        "--weights-dir",
        tmp_path if "teachers" in where else base.flags[-3],
    ]
    if where == "drawing":
        flags.remove("--data")
        flags.remove(base / "tiles")
    child = Child(*flags, "--out", tmp_path / "run", patch=patch)
    assert child.wait() in ([130] if name == "SIGINT" else [143, -15]), child.out + child.err
    assert (
        child.err.count("\n") <= 1 and "Traceback" not in child.err and "step 1/" not in child.out
    )
    assert not (tmp_path / "run" / "last.pt").exists()
    if where != "drawing":
        assert Child(
            *flags, "--out", tmp_path / "run"
        ).succeeds()  # the same command begins anew or goes on
    if where == "statistics":
        assert_undisturbed(tmp_path / "run", base)


def test_two_processes_leave_together_wherever_the_signal_comes(tmp_path, base):
    flags = [*base.flags[:-1], 60, "--save-every", 1000]
    for process in pair(*flags, "--stop-at", 26, "--out", tmp_path / "undisturbed"):
        assert process.succeeds()

    def signal_itself(number):
        return lambda: os.kill(os.getpid(), number)

    never = at_step(99, lambda: None)
    cases = {  # at which step which process gets what
        "rank 1 alone": ((never, at_step(13, signal_itself(signal.SIGTERM))), 20, 143),
        "Ctrl-C": (
            (at_step(4, signal_itself(signal.SIGINT)), at_step(11, signal_itself(signal.SIGINT))),
            10,
            130,
        ),
    }
    for name, (patches, step, code) in cases.items():
        out = tmp_path / name
        processes = pair(*flags, "--out", out, patches=patches)
        assert [process.wait() for process in processes] == [code, code], [x.err for x in processes]
        assert checkpoint(out)["step"] == step and logged(out) == [*range(1, step + 1)], name
        assert processes[0].out.count(f"stopped after step {step} of 60; go on with:") == 1
        assert "stopped" not in processes[1].out
    for process in pair("--resume", tmp_path / "rank 1 alone", "--stop-at", 26):
        assert process.succeeds()
    assert_same(checkpoint(tmp_path / "undisturbed"), checkpoint(tmp_path / "rank 1 alone"))
    assert losses(tmp_path / "undisturbed") == losses(tmp_path / "rank 1 alone")


# ---- (b) kills ------------------------------------------------------------------------------------------------------
class Watched:
    """A file that reports every write."""

    def __init__(self, file, event):
        self.file, self.event = file, event

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.event("closed", os.fspath(self.file.name))

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        half = len(content) // 2
        for kind, part in (("half written", content[:half]), ("written", content[half:])):
            self.file.write(part)
            self.file.flush()
            self.event(kind, os.fspath(self.file.name))
        return len(content)


def watch(event):
    """A patch: event(kind, path) before and after each call by which a save or a log line changes the folder."""

    def open_(path, mode="r", *args, **kwargs):
        file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115 - handed on
        return file if mode in ("r", "rb") else Watched(file, event)

    def told(kind, original, which=lambda *args: args[0]):
        def call(*args, **kwargs):
            path = os.fspath(which(*args))
            event(f"before {kind}", path)
            result = original(*args, **kwargs)
            event(f"after {kind}", path)
            return result

        return call

    def patch():
        for module in (student, train, data):
            module.open = open_
        os.replace = told("replace", os.replace, lambda a, b: b)

        os.fsync = told("fsync", os.fsync, lambda number: os.readlink(f"/proc/self/fd/{number}"))
        os.unlink = told("unlink", os.unlink)

    return patch


def state_of(folder):
    """{name, the process left out: hash of what it holds}."""
    hashes = {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "lock"
    }
    return {re.sub(r"\.\d+\.tmp$", ".tmp", path.name): value for path, value in hashes.items()}


@pytest.fixture(scope="module")
def moments(base):
    """What a SIGKILL would leave in the run folder at each moment of an undisturbed run: [(event, folder)]."""
    out, kept = base / "watched", base / "moments"
    kept.mkdir()

    writes = itertools.count()

    def event(kind, path):
        if "written" in kind and "log" not in path and next(writes) % 150:
            return  # a checkpoint is written in a thousand pieces
        if os.path.dirname(path) == str(out) or path == str(out):
            i = len(list(kept.iterdir()))
            shutil.copytree(
                out,
                kept
                / f"{i:04d} {kind} {os.path.basename(re.sub('[.][0-9]+[.]tmp', '.tmp', path))}",
            )

    assert Child(*base.flags, "--out", out, patch=watch(event)).succeeds()
    assert_undisturbed(out, base)  # to look at it changes nothing
    return [(folder.name[5:], folder) for folder in sorted(kept.iterdir())]


def test_a_save_reaches_the_disk_before_it_gets_its_name(moments):
    """What a power cut can leave is told by the order of calls: content, its fsync, the name, the folder's fsync."""
    events = [event for event, _ in moments]
    for name in ("last.pt", "student.pt"):
        places = [i for i, event in enumerate(events) if event == f"before replace {name}"]
        assert len(places) == (4 if name == "last.pt" else 3)  # steps 0, 2, 4, 6
        for i in places:
            assert (
                events[i - 1] == f"closed {name}.tmp"
                and f"after fsync {name}.tmp" in events[i - 3 : i]
            )
            assert [x for x in events[i + 1 : i + 4] if "written" in x] == []
            assert events[i + 1 : i + 3] == [f"after replace {name}", "before fsync watched"], (
                events[i - 2 : i + 5]
            )
    order = [
        event.split()[-1]
        for event in events
        if event.startswith("after replace") and "log" not in event
    ]
    assert order == ["last.pt", *["student.pt", "model_card.md", "last.pt"] * 3]


def test_at_each_moment_the_folder_holds_a_whole_checkpoint_and_a_student_not_older(moments, base):
    seen, last_steps = set(), []
    for event, folder in moments:
        state = state_of(folder)
        if (key := (state.get("last.pt"), state.get("student.pt"))) in seen:
            continue
        seen.add(key)
        if not (folder / "last.pt").exists():
            assert not (folder / "student.pt").exists() and not (folder / "log.jsonl").exists(), (
                event
            )
            continue
        last_steps.append(checkpoint(folder)["step"])
        if (folder / "student.pt").exists():
            assert student.load_student(folder)[1]["step"] >= last_steps[-1], event
    assert last_steps == sorted(last_steps) and {*last_steps} == {0, 2, 4, 6}


def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(moments, base, tmp_path):
    """One resume for each distinct checkpoint, student and log, at the moment with the most temporary files."""
    groups = {}
    for event, folder in moments:
        state = state_of(folder)
        key = tuple(state.get(name) for name in ("last.pt", "student.pt", "log.jsonl"))
        count = sum(name.endswith(".tmp") for name in state)
        if key not in groups or count > groups[key][0]:
            groups[key] = (count, event, folder)
    assert len(groups) > 15 and sum(count for count, *_ in groups.values()) > 5
    seen = set()
    for i, (key, (_, event, folder)) in enumerate(groups.items()):
        if key[:2] in seen and i % 3:
            continue  # of those that differ by a log line alone, every third
        seen.add(key[:2])
        shutil.copytree(folder, tmp_path / str(i))
        if (folder / "last.pt").exists():
            resume(tmp_path / str(i))
        else:  # nothing was saved yet: the same command begins anew
            train.train(train.parse_args(list(map(str, [*base.flags, "--out", tmp_path / str(i)]))))
        try:
            assert_undisturbed(tmp_path / str(i), base)
        except AssertionError as error:
            raise AssertionError(f"killed at: {event}") from error


KILLS = [  # the kind of call, of which file, the how manieth of them
    ("half written", "last.pt", 1),
    ("before replace", "last.pt", 0),
    ("after replace", "student.pt", 1),
    ("before fsync", "run", 3),
    ("half written", "log.jsonl", 2),
]


@pytest.mark.parametrize(("kind", "name", "n"), KILLS)
def test_a_real_sigkill_between_the_calls_of_a_save(tmp_path, base, kind, name, n):
    def patch():
        count = [0]

        def event(its_kind, path):
            path = os.path.basename(re.sub(r"(\.\d+)?\.tmp$", "", path))
            if (its_kind, path) == (kind, name):
                if count[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1

        watch(event)()

    out = tmp_path / "run"
    child = Child(*base.flags, "--out", out, patch=patch)
    assert child.wait() == -signal.SIGKILL, child.err
    if (out / "last.pt").exists():
        again = Child("--resume", out)
    else:
        again = Child(*base.flags, "--out", out)
    assert again.succeeds()
    assert_undisturbed(out, base)


def test_a_log_cut_anywhere_or_ahead_of_the_checkpoint_is_mended_by_the_resume(tmp_path, base):
    whole = (base / "undisturbed" / "log.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    ahead = len(b"".join(lines[:3]))  # half/ stopped after step 3
    cases = {
        "two steps ahead": whole[: ahead + len(b"".join(lines[3:5]))],
        "half a line ahead": whole[: ahead + len(lines[3]) // 2],
        "one byte ahead": whole[: ahead + 1],
        "all but the end of the line": whole[: ahead + len(lines[3]) - 1],
        "cut right after an inner brace": whole[: ahead + lines[3].index(b"}") + 1],
        "no end of line": whole[: ahead - 1],
        "zeros, as a power cut leaves": whole[:ahead] + bytes(100),
        "bytes that are no text": whole[:ahead] + b"\xff\xfe{}\n",
        "an empty line": whole[:ahead] + b"\n",
        "another object": whole[:ahead] + b"{}\n",
        "no object": whole[:ahead] + b'"}"\n',
    }
    bad = {}
    for i, (case, log) in enumerate(cases.items()):
        shutil.copytree(base / "half", tmp_path / str(i))
        (tmp_path / str(i) / "log.jsonl").write_bytes(log)
        try:
            resume(tmp_path / str(i))
            assert_undisturbed(tmp_path / str(i), base)
        except Exception as error:  # noqa: BLE001 - all cases are looked at
            bad[case] = f"{type(error).__name__}: {str(error)[:200]}"
    assert not bad, bad


# ---- (c) a full disk ------------------------------------------------------------------------------------------------
def limit(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FULL = {  # what can no longer be written: bytes a file may have from step 4 on, and the name in the message
    "checkpoint": (1_500_000, "last.pt"),
    "student": (300_000, "student.pt"),
    "log": (10, "log.jsonl"),
}


@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_later(tmp_path, base, what):
    size, name = FULL[what]
    shutil.copytree(base / "half", tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    child = Child("--resume", tmp_path / "run", patch=at_step(4, limit(size)))
    assert child.fails(f"{tmp_path}/run/{name}")
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert after["last.pt"] == before["last.pt"] and after.keys() == before.keys()
    assert student.load_student(tmp_path / "run")[1]["step"] == (4 if what == "checkpoint" else 3)
    resume(tmp_path / "run")
    assert_undisturbed(tmp_path / "run", base)


def test_a_full_disk_at_the_start(tmp_path, base, weights_dir):
    """The first checkpoint, the log of a resumed run, the lock, the offline teachers."""
    child = Child(*base.flags, "--out", tmp_path / "run", patch=limit(500_000))
    assert child.fails(f"{tmp_path}/run/last.pt") and not list((tmp_path / "run").glob("*.*"))
    assert Child(*base.flags, "--out", tmp_path / "run").succeeds()
    assert_undisturbed(tmp_path / "run", base)
    shutil.copytree(base / "half", tmp_path / "half")
    child = Child("--resume", tmp_path / "half", patch=limit(100))
    assert child.fails(f"{tmp_path}/half/log.jsonl")
    assert (tmp_path / "half" / "log.jsonl").read_bytes() == (
        base / "half" / "log.jsonl"
    ).read_bytes()
    flags = [*base.flags, "--weights-dir", tmp_path / "weights", "--out", tmp_path / "other"]
    child = Child(*flags, patch=limit(100_000))
    assert child.fails(f"{tmp_path}/weights/toy_cells") and not list(
        (tmp_path / "weights").glob("*.pt*[!k]")
    )
    assert not (tmp_path / "other" / "last.pt").exists()
    assert Child(*flags).succeeds()


@pytest.fixture
def disk(tmp_path):
    """A real file system of few MB: disk(size) -> its folder; disk(size) again changes the size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size):
        options = f"remount,size={size}" if os.path.ismount(folder) else f"size={size}"
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            check=False,
            capture_output=True,
        )
        if result.returncode:
            pytest.skip(f"mounting is not allowed here: {result.stderr.decode().strip()}")
        return folder

    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("mounting needs root")
    yield sized
    if os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


def fill(folder):
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(("size", "step"), [("64k", None), ("512k", None), ("3m", 0), ("5m", 2)])
def test_a_real_disk_that_is_full(tmp_path, base, disk, size, step):
    """It ends at the first checkpoint (0.9 MB) or a later one (2.5 MB): the old file stays until the new is whole."""
    folder = disk(size)
    child = Child(*base.flags, "--out", folder / "run")
    assert child.fails(f"{folder}/run/")
    assert not list((folder / "run").glob("*.tmp"))
    began = (folder / "run" / "last.pt").exists()
    assert began == (step is not None)
    disk("20m")
    if began:
        assert checkpoint(folder / "run")["step"] == step
        resume(folder / "run")
    else:
        assert Child(*base.flags, "--out", folder / "run").succeeds()
    assert_undisturbed(folder / "run", base)


def test_a_real_disk_without_one_free_byte(tmp_path, base, disk, monkeypatch):
    """Resuming, caching, exporting, evaluating: each says which file, and changes none of those that are there."""
    folder = disk("8m")
    shutil.copytree(base / "half", folder / "run")
    (folder / "weights").mkdir()
    fill(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run, labelled = folder / "run", tmp_path / "labelled"
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_tiles(labelled / split / name, 2)
    evaluation = {"main": evaluate.main, "script": "evaluate.py"}
    none = ["--teachers=", "--device", "cpu"]
    cases = {
        "resume": ([*["--resume", run]], {}, "run/"),
        "run": ([*base.flags, "--out", folder / "other"], {}, "other"),
        "cache": (
            [*base.flags, "--cache", folder / "cache", "--out", tmp_path / "cached"],
            {},
            "cache",
        ),
        "teachers": (
            [*base.flags, "--weights-dir", folder / "weights", "--out", tmp_path / "w"],
            {},
            "weights/toy",
        ),
        "embeddings": (
            [run, "--embed", base / "tiles", "--out", folder / "x.npz", *none],
            evaluation,
            "x.npz",
        ),
        "cut": ([run, "--dim", 4, "--out", folder / "cut.pt", *none], evaluation, "cut.pt"),
        "results": ([run, "--data", labelled, *none], evaluation, "run/"),
    }
    bad = {}
    for case, (argv, more, name) in cases.items():
        child = Child(*argv, **more)
        try:
            assert child.fails(f"{folder}/{name}"), case
        except AssertionError as error:
            bad[case] = str(error)[-600:]
        now = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        changed = [path for path in before if now.get(path) != before[path]]
        new = [
            path
            for path in now.keys() - before.keys()
            if path.stat().st_size or path.suffix == ".tmp"
        ]
        if changed or new:
            bad[case] = f"{bad.get(case, '')} changed {changed} new {new}"
    assert not bad, bad
    disk("60m")
    bad = {}
    for case, (argv, more, _) in cases.items():  # with space, the same commands
        child = Child(*argv, **more)
        if child.wait():
            bad[case] = child.err[-600:]
    assert not bad, bad
    assert_undisturbed(run, base)
    assert json.loads((run / "results.json").read_text()).keys() == {str(labelled)}
    assert (
        len(np.load(folder / "x.npz")["embeddings"]) == 6
        and outputs_of_one(folder / "cache", 6).all()
    )


def outputs_of_one(cache, n):
    outputs = np.fromfile(cache / "outputs", [("done", "u2"), ("toy_cells", "f2", (65, 128))])
    assert len(outputs) == n and (cache / "complete").exists()
    return outputs["done"]


def test_a_cache_that_finds_no_space_leaves_nothing_and_the_same_command_works_later(
    tmp_path, base
):
    flags = [*base.flags, "--cache", tmp_path / "cache", "--out", tmp_path / "run"]
    child = Child(*flags, patch=limit(50_000))  # of 99,852 bytes
    assert child.fails(tmp_path / "cache")
    assert not (tmp_path / "cache" / "outputs").exists() and not list(
        (tmp_path / "cache").glob("*.tmp")
    )
    assert Child(*flags).succeeds() and outputs_of_one(tmp_path / "cache", 6).all()


EVALUATIONS = {  # what cannot be written: bytes a file may have, flags, the name
    "embeddings": (500, ["--embed", "TILES", "--out", "OUT/x.npz"], "x.npz"),
    "cut student": (100_000, ["--dim", 4, "--out", "OUT/cut.pt"], "cut.pt"),
    "results": (100, ["--data", "LABELLED", "--teachers="], "results.json"),
    "pictures of patches": (100, ["--data", "LABELLED", "--teachers="], "patches-"),
    "curves": (30_000, ["--data", "LABELLED", "--teachers="], "curves-"),
}


@pytest.mark.parametrize("what", EVALUATIONS)
def test_an_evaluation_on_a_full_disk_names_the_file(tmp_path, base, what):
    size, flags, name = EVALUATIONS[what]
    shutil.copytree(base / "undisturbed", tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text('{"earlier": {"rows": []}}')
    for split in ("train", "test"):
        for label in ("a", "b"):
            write_tiles(tmp_path / "labelled" / split / label, 2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    places = {"TILES": base / "tiles", "LABELLED": tmp_path / "labelled", "OUT": tmp_path}
    argv = [
        re.sub("TILES|LABELLED|OUT", lambda found: str(places[found[0]]), str(flag))
        for flag in flags
    ]

    def patch():
        if what in ("results", "curves"):  # the pictures before them still find space
            original, skipped = evaluate.draw_patches, what
            evaluate.draw_patches = lambda *args: (original(*args), limit(size)())[0]
            assert skipped
        else:
            limit(size)()

    more = {"main": evaluate.main, "script": "evaluate.py", "patch": patch}
    child = Child(tmp_path / "run", *argv, "--device", "cpu", **more)
    assert child.fails(name)
    after = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    done = ("results.json", "model_card.md")  # where only the curves find no space
    assert all(
        after[path] == content
        for path, content in before.items()
        if what != "curves" or path.name not in done
    )
    assert (
        not list(tmp_path.rglob("*.tmp"))
        and not (tmp_path / "x.npz").exists()
        and not (tmp_path / "cut.pt").exists()
    )
    assert "earlier" in json.loads((tmp_path / "run" / "results.json").read_text())
    if what in ("embeddings", "results"):
        assert Child(
            tmp_path / "run", *argv, "--device", "cpu", main=evaluate.main, script="evaluate.py"
        ).succeeds()


# ---- (f) crowds -----------------------------------------------------------------------------------------------------
def slowly(owner, attribute, record, seconds=0.4):
    """A patch: the call is noted in `record` and takes long enough to be met by another process."""

    def patch():
        original = getattr(owner, attribute)

        def slow(*args, **kwargs):
            with open(record, "a") as file:
                file.write(f"{os.getpid()} {args[0] if isinstance(args[0], str) else ''}\n")
            time.sleep(seconds)
            return original(*args, **kwargs)

        setattr(owner, attribute, slow)

    return patch


def waits(child):
    time.sleep(0.7)  # more than a whole run takes
    return os.waitpid(child.pid, os.WNOHANG) == (0, 0)


def test_two_runs_started_at_once_make_each_offline_teacher_once(tmp_path, base):
    flags = [
        *base.flags,
        "--teachers",
        "toy_cells,toy_tissue",
        "--weights-dir",
        tmp_path / "weights",
    ]
    patch = slowly(teachers, "train_offline_teacher", tmp_path / "made")
    children = [Child(*flags, "--out", tmp_path / name, patch=patch) for name in "ab"]
    assert all(child.succeeds() for child in children)
    made = [line.split()[1] for line in (tmp_path / "made").read_text().splitlines()]
    assert sorted(made) == ["toy_cells", "toy_tissue"]
    assert sorted(path.name for path in (tmp_path / "weights").glob("*.pt")) == [
        "toy_cells-v1-2-0.pt",
        "toy_tissue-v1-2-0.pt",
    ]
    assert_same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))


def test_who_makes_a_teacher_and_is_killed_leaves_it_to_the_one_who_waits(tmp_path, base):
    flags = [*base.flags, "--weights-dir", tmp_path / "weights"]
    patch = slowly(teachers, "train_offline_teacher", tmp_path / "made", 30)
    first = Child(*flags, "--out", tmp_path / "a", patch=patch)
    while not (tmp_path / "made").exists():
        time.sleep(0.01)
    second = Child(*flags, "--out", tmp_path / "b")
    assert waits(second)
    first.kill()
    assert first.wait() == -9 and second.succeeds()
    assert_undisturbed(tmp_path / "b", base)
    assert "wait" in second.out  # it said why nothing happened


def test_two_runs_into_one_folder_the_second_is_refused_and_the_first_unharmed(tmp_path, base):
    pause = tmp_path / "pause"

    def wait():
        pause.touch()
        while pause.exists():
            time.sleep(0.01)

    out = tmp_path / "run"
    first = Child(*base.flags, "--out", out, patch=at_step(2, wait))
    while not pause.exists():
        time.sleep(0.01)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert Child("--resume", out).fails(out, "--out")
    assert Child(*base.flags, "--out", out).fails(out, "--out")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    pause.unlink()
    assert first.succeeds()
    assert_undisturbed(out, base)


def test_two_runs_into_one_new_folder_one_wins(tmp_path, base):
    """Started at the very same moment, and with the second held up until the first has ended."""
    for held_up in (False, True):
        out, ready = tmp_path / f"run {held_up}", tmp_path / f"ready {held_up}"

        def patch(ready=ready):
            original = data.FolderTiles.__init__

            def late(*args, **kwargs):
                ready.touch()
                while not (tmp_path / "over").exists():
                    time.sleep(0.01)
                return original(*args, **kwargs)

            data.FolderTiles.__init__ = late

        second = Child(
            *base.flags, "--seed", 1, "--out", out, patch=patch if held_up else lambda: None
        )
        while held_up and not ready.exists():
            time.sleep(0.01)
        first = Child(*base.flags, "--out", out)
        if held_up:
            assert first.succeeds()
            (tmp_path / "over").touch()
        codes = [second.wait(), first.wait()]
        assert sorted(codes) == [0, 2], (held_up, codes, first.err + second.err)
        loser = second if codes[0] else first
        assert loser.fails(out, "--out")
        assert logged(out) == [1, 2, 3, 4, 5, 6] and checkpoint(out)["args"]["seed"] == (
            0 if codes[0] else 1
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_leaves_its_folder_free_at_once(tmp_path, base, workers):
    flags = [*base.flags[:-1], 400, "--workers", workers]
    child = Child(*flags, "--out", tmp_path / "run")
    child.until("step 3/")
    child.kill()
    assert child.wait() == -9
    began = time.monotonic()
    again = Child("--resume", tmp_path / "run", "--stop-at", 5)
    assert (
        again.succeeds()
        and time.monotonic() - began < 4
        and checkpoint(tmp_path / "run")["step"] == 5
    )


def test_two_runs_that_make_one_cache_at_once(tmp_path, base):
    flags = [*base.flags, "--cache", tmp_path / "cache"]
    patch = slowly(train.CachedTiles, "fill", tmp_path / "filled", 0.8)
    children = [Child(*flags, "--out", tmp_path / name, patch=patch) for name in "ab"]
    assert all(child.succeeds() for child in children)
    assert outputs_of_one(tmp_path / "cache", 6).all()
    assert_same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    assert Child(*flags, "--out", tmp_path / "alone", "--cache", tmp_path / "another").succeeds()
    assert_same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "alone"))
    assert (tmp_path / "cache" / "outputs").read_bytes() == (
        tmp_path / "another" / "outputs"
    ).read_bytes()


def test_one_folder_for_run_and_cache_works_or_is_refused(tmp_path, base):
    child = Child(*base.flags, "--cache", tmp_path / "run", "--out", tmp_path / "run")
    assert child.wait() == 0 or child.fails("--cache"), child.err


@pytest.mark.parametrize("point", ["reserving", "filling"])
def test_a_cache_whose_maker_is_killed_is_finished_by_another(tmp_path, base, point):
    flags = [*base.flags, "--cache", tmp_path / "cache"]
    owner, attribute = {
        "reserving": (os, "posix_fallocate"),
        "filling": (train.CachedTiles, "fill"),
    }[point]
    first = Child(
        *flags, "--out", tmp_path / "a", patch=slowly(owner, attribute, tmp_path / "mark", 30)
    )
    while not (tmp_path / "mark").exists():
        time.sleep(0.01)
    second = Child(*flags, "--out", tmp_path / "b")
    assert point == "filling" or waits(second)  # who fills at once does the same work twice
    first.kill()
    assert first.wait() == -9 and second.succeeds()
    assert outputs_of_one(tmp_path / "cache", 6).all() and checkpoint(tmp_path / "b")["step"] == 6


def test_two_evaluations_of_one_run_keep_both_rows(tmp_path, base):
    shutil.copytree(base / "undisturbed", tmp_path / "run")
    for folder in ("first", "second"):
        for split in ("train", "test"):
            for name in ("a", "b"):
                write_tiles(tmp_path / folder / split / name, 2)
    more = {"main": evaluate.main, "script": "evaluate.py"}
    more["patch"] = slowly(evaluate, "save_atomically", tmp_path / "saves", 0.3)
    flags = ["--teachers=", "--device", "cpu", "--tasks", "knn"]
    data_folders = [tmp_path / "first", tmp_path / "second"]
    children = [
        Child(tmp_path / "run", "--data", folder, *flags, **more) for folder in data_folders
    ]
    assert all(child.succeeds() for child in children)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() == {*map(str, data_folders)} and all(x["rows"] for x in results.values())


# ---- (i) determinism ------------------------------------------------------------------------------------------------
def test_one_seed_gives_the_same_bits_whatever_the_workers_and_however_often_it_was_stopped(
    tmp_path, base
):
    for workers, stops in ((1, []), (3, [1, 5]), (0, [1, 2, 3, 4, 5])):
        out = tmp_path / f"{workers} {stops}"
        first, *others = [*stops, 6]
        argv = [*base.flags, "--workers", workers, "--stop-at", first, "--out", out]
        train.train(train.parse_args(list(map(str, argv))))
        for i, stop in enumerate(others):
            resume(out, "--stop-at", stop, "--workers", workers if i % 2 else 0)
        assert_undisturbed(out, base)
    argv = [*base.flags, "--seed", 1, "--out", tmp_path / "another"]
    train.train(train.parse_args(list(map(str, argv))))
    assert losses(tmp_path / "another") != losses(base / "undisturbed")  # the seed is what decides
