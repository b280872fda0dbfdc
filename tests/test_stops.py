"""Runs that are stopped, killed, damaged or short of disk: at most a few steps are lost, one line
says what happened, and whoever goes on comes to the same end, bit for bit."""

import builtins
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_tiles
from forks import Child, nothing, pair, run_training
from test_train import assert_same, checkpoint, launch, losses, student_file

import data
import evaluate
import losses as losses_module
import teachers
import train
from data import InputError
from student import Adaptors, Student

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks, signals and limits of Linux"
)
ONE = ["--teachers", "toy_cells", "--teacher-steps", 2, "--device", "cpu", "--dims", 4]
ONE += ["--stats-tiles", 2, "--batch-size", 2, "--log-every", 1, "--save-every", 2]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Sums in one order here and in every child, which has one thread."""
    monkeypatch.setattr(evaluate, "N_TILES", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Base:
    """A folder of runs to compare with, and the flags of these runs."""

    def __init__(self, folder):
        self.folder = folder
        self.flags = [*ONE, "--data", folder / "tiles", "--weights-dir", folder / "weights"]
        self.flags += ["--steps", 6]

    def __truediv__(self, name):
        return self.folder / name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Six tiles, and undisturbed/: six steps over them, saves after 2, 4 and 6; half/: three."""
    base = Base(tmp_path_factory.mktemp("base"))
    write_tiles(base / "tiles", 6)
    # the teacher is its own, made by one thread, as all that is compared with it
    assert Child(*base.flags, "--out", base / "undisturbed").succeeds()
    assert Child(*base.flags, "--out", base / "half", "--stop-at", 3).succeeds()
    return base


def resume(folder, *argv):
    """In this process: quick."""
    launch("--resume", folder, *argv)


def whole_lines(folder):
    """{step: loss} of the lines of log.jsonl that are whole; the last one of a step counts."""
    found = {}
    for text in (folder / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            found[line["step"]] = line["loss"]
    return found


def assert_undisturbed(folder, base):
    """The run has come to the same end as if nothing had happened, and nothing is left behind."""
    assert_same(checkpoint(base / "undisturbed"), checkpoint(folder))
    assert whole_lines(folder) == losses(base / "undisturbed")
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if not name.endswith(".tmp")] == [
        "last.pt",
        "log.jsonl",
        "student.pt",
    ]
    ours = student_file(folder)
    theirs = student_file(base / "undisturbed")
    assert ours["config"] == theirs["config"] and ours["config"]["step"] == 6
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)


def at_step(n, action):
    """A patch: `action` is called when step n, counted from 1, begins."""

    def patch():
        original = train.learning_rate

        def learning_rate(step, steps, peak):
            if step + 1 == n:
                action()
            return original(step, steps, peak)

        train.learning_rate = learning_rate

    return patch


def send(number):
    """An action: the process sends itself a signal."""
    return lambda: os.kill(os.getpid(), number)


# ---- Ctrl-C --------------------------------------------------------------------------------------
INTERRUPTED = re.compile(r"train\.py: interrupted; .*--resume.*\n")


@pytest.mark.parametrize(("step", "saved"), [(1, 0), (4, 2), (6, 4)])
def test_ctrl_c_in_a_step_is_one_line_and_the_run_goes_on(tmp_path, base, step, saved):
    out = tmp_path / "run"
    child = Child(*base.flags, "--out", out, patch=at_step(step, send(signal.SIGINT)))
    assert child.wait() == 130 and INTERRUPTED.fullmatch(child.err), child.err
    assert not list(out.glob("*.tmp"))
    if saved:
        assert checkpoint(out)["step"] == saved
        resume(out)
    else:
        assert not (out / "last.pt").exists()
        launch(*base.flags, "--out", out)
    assert_undisturbed(out, base)


def test_ctrl_c_with_workers_reaches_all_and_is_one_line(tmp_path, base):
    flags = [*base.flags, "--steps", 10**6, "--workers", 2]
    child = Child(*flags, "--out", tmp_path / "run")
    child.until("step 3/")
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    assert child.wait() == 130 and INTERRUPTED.fullmatch(child.err), child.err


def test_ctrl_c_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, base):
    def patch():
        saves = itertools.count(1)

        def interrupted(number, original=os.fsync):
            if next(saves) == 7:  # a file and its folder each: 1 to 4 of step 2, 5 and 6 student.pt
                os.kill(os.getpid(), signal.SIGINT)
            original(number)

        os.fsync = interrupted

    out = tmp_path / "run"
    child = Child(*base.flags, "--out", out, patch=patch)
    assert child.wait() == 130 and INTERRUPTED.fullmatch(child.err), child.err
    assert not list(out.glob("*.tmp"))
    assert checkpoint(out)["step"] == 2 and student_file(out)["config"]["step"] == 4
    resume(out)
    assert_undisturbed(out, base)


def test_ctrl_c_before_the_last_bytes_of_a_checkpoint_is_one_line(tmp_path, base):
    """torch's writer then ends a file that is closed already: that must not abort the process."""

    def patch():
        writer = torch.serialization._open_zipfile_writer_buffer
        original = writer.__exit__

        def interrupted(self, *args):
            os.kill(os.getpid(), signal.SIGINT)
            return original(self, *args)

        writer.__exit__ = interrupted

    out = tmp_path / "run"
    shutil.copytree(base / "half", out)
    child = Child("--resume", out, patch=patch)
    assert child.wait() == 130 and INTERRUPTED.fullmatch(child.err), child.err
    assert not list(out.glob("*.tmp")) and checkpoint(out)["step"] == 3


BEFORE = {  # where a run can be before its loop
    "drawing": (data, "draw_tissue"),
    "offline teachers": (teachers, "train_offline_teacher"),
    "statistics": (losses_module.Standardizers, "measure"),
}


@pytest.mark.parametrize("where", BEFORE)
def test_ctrl_c_before_the_loop_is_one_line_and_the_same_command_begins_anew(tmp_path, base, where):
    owner, attribute = BEFORE[where]

    def patch():
        teachers.draw_labelled_tiles.cache_clear()  # of the process that this one is a fork of
        original = getattr(owner, attribute)

        def interrupted(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            return original(*args, **kwargs)

        setattr(owner, attribute, interrupted)

    flags = [*base.flags, "--out", tmp_path / "run"]
    if where != "statistics":
        flags += ["--weights-dir", tmp_path / "weights"]  # an empty one
    child = Child(*flags, patch=patch)
    assert child.wait() == 130 and INTERRUPTED.fullmatch(child.err), child.err
    assert "step 1/" not in child.out and not list(tmp_path.rglob("*.pt*"))
    assert Child(*flags).succeeds()
    assert_undisturbed(tmp_path / "run", base)


# ---- kills ---------------------------------------------------------------------------------------
class Watched:
    """A file that reports every write."""

    def __init__(self, file, event):
        self.file = file
        self.event = event
        self.path = os.fspath(file.name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.event("closed", self.path)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        half = len(content) // 2
        for kind, part in (("half written", content[:half]), ("written", content[half:])):
            self.file.write(part)
            self.file.flush()
            self.event(kind, self.path)
        return len(content)


def told(kind, event, original, which):
    """The call of the system, with an event before and after; which(*args): its path."""

    def call(*args):
        path = os.fspath(which(*args))
        event(f"before {kind}", path)
        result = original(*args)
        event(f"after {kind}", path)
        return result

    return call


def watch(event):
    """A patch: event(kind, path) at each call by which a save or a log line changes the folder."""

    def open_(path, mode="r", *args, **kwargs):
        file = builtins.open(path, mode, *args, **kwargs)
        if mode in ("r", "rb"):
            return file
        return Watched(file, event)

    def patch():
        train.open = open_
        data.open = open_
        os.replace = told("replace", event, os.replace, lambda a, b: b)
        os.fsync = told("fsync", event, os.fsync, lambda n: os.readlink(f"/proc/self/fd/{n}"))

    return patch


def short(path):
    """The name of a file; of a temporary one, without the process's number."""
    return re.sub(r"\.\d+\.tmp$", ".tmp", os.path.basename(path))


def state_of(folder):
    """{name: hash of what the file holds}."""
    state = {}
    for path in folder.iterdir():
        state[short(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return state


def copy_or_link(source, target):
    """A file that is replaced, never changed, need not be copied."""
    if source.endswith(".pt"):
        os.link(source, target)
    else:
        shutil.copy(source, target)


@pytest.fixture(scope="module")
def moments(base):
    """What a SIGKILL would leave in the run's folder at each moment of a run: [(event, folder)]."""
    out = base / "watched"
    kept = base / "moments"
    kept.mkdir()
    writes = itertools.count()

    def event(kind, path):
        if "written" in kind and "log" not in path and next(writes) % 400:
            return  # a checkpoint is written in a thousand pieces
        if out in (Path(path), Path(path).parent):
            number = len(list(kept.iterdir()))
            copy = kept / f"{number:04d} {kind} {short(path)}"
            shutil.copytree(out, copy, copy_function=copy_or_link)

    assert Child(*base.flags, "--out", out, patch=watch(event)).succeeds()
    assert_undisturbed(out, base)  # to look at it changes nothing
    return [(folder.name[5:], folder) for folder in sorted(kept.iterdir())]


def test_a_save_reaches_the_disk_before_it_gets_its_name(moments):
    """What a power cut leaves is told by the order of calls: content, its fsync, the name, the
    folder's fsync."""
    events = [event for event, _ in moments]
    for name in ("last.pt", "student.pt"):
        places = [i for i, event in enumerate(events) if event == f"before replace {name}"]
        assert len(places) == 3  # steps 2, 4, 6
        for i in places:
            assert events[i - 1] == f"closed {name}.tmp"
            assert events[i - 2] == f"after fsync {name}.tmp"
            assert events[i + 1 : i + 3] == [f"after replace {name}", "before fsync watched"]
    order = [event.split()[-1] for event in events if event.startswith("after replace")]
    assert order == 3 * ["student.pt", "last.pt"]


def test_at_each_moment_the_checkpoint_is_whole_and_the_student_is_not_older(moments):
    seen = set()
    steps = []
    for event, folder in moments:
        state = state_of(folder)
        key = (state.get("last.pt"), state.get("student.pt"))
        if key in seen:
            continue
        seen.add(key)
        saved = 0
        if "last.pt" in state:
            saved = checkpoint(folder)["step"]
        steps.append(saved)
        if "student.pt" in state:
            assert evaluate.load_student(folder)[1]["step"] >= saved, event
    assert steps == sorted(steps) and set(steps) == {0, 2, 4, 6}


def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(moments, base, tmp_path):
    """One resume for each distinct checkpoint and student, where most is left lying about."""
    worst = {}
    for event, folder in moments:
        state = state_of(folder)
        key = (state.get("last.pt"), state.get("student.pt"))
        left = len(state)
        if key not in worst or left > worst[key][0]:
            worst[key] = (left, event, folder)
    assert len(worst) == 7
    for i, (_, event, folder) in enumerate(worst.values()):
        out = tmp_path / str(i)
        shutil.copytree(folder, out)
        if (out / "last.pt").exists():
            resume(out)
        elif (out / "student.pt").exists():
            (out / "student.pt").unlink()  # a student is never overwritten: the user has to say so
            launch(*base.flags, "--out", out)
        else:
            launch(*base.flags, "--out", out)
        try:
            assert_undisturbed(out, base)
        except AssertionError as error:
            raise AssertionError(f"killed at: {event}") from error


KILLS = [  # the kind of call, of which file, the how manieth of them
    ("half written", "last.pt", 1),
    ("before replace", "last.pt", 1),
    ("after replace", "student.pt", 1),
    ("closed", "log.jsonl", 4),
]


@pytest.mark.parametrize(("kind", "name", "n"), KILLS)
def test_a_real_sigkill_between_the_calls_of_a_save(tmp_path, base, kind, name, n):
    def patch():
        count = itertools.count()

        def event(its_kind, path):
            if (its_kind, short(path).removesuffix(".tmp")) == (kind, name) and next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        watch(event)()

    out = tmp_path / "run"
    child = Child(*base.flags, "--out", out, patch=patch)
    assert child.wait() == -signal.SIGKILL, child.err
    if (out / "last.pt").exists():
        resume(out)
    else:
        (out / "student.pt").unlink()
        launch(*base.flags, "--out", out)
    assert_undisturbed(out, base)


def test_a_student_without_a_checkpoint_is_not_overwritten_and_no_resume_is_offered(tmp_path, base):
    """As a kill or a full disk leaves it, between the two files of a run's first save."""
    out = tmp_path / "run"
    shutil.copytree(base / "half", out)
    (out / "last.pt").unlink()
    before = state_of(out)
    with pytest.raises(InputError, match=f"--out {out}-2") as error:
        launch(*base.flags, "--out", out)
    assert "--resume" not in str(error.value)  # it would end in an error
    assert state_of(out) == before


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGKILL, 2), (signal.SIGTERM, 0)])
def test_a_killed_run_goes_on(tmp_path, base, number, workers):
    """What was done since the last save is done again; its lines in the log, too."""
    flags = [*base.flags, "--workers", workers, "--out", tmp_path / "run"]
    child = Child(*flags, patch=at_step(4, send(number)))
    assert child.wait() == -number
    assert checkpoint(tmp_path / "run")["step"] == 2
    resume(tmp_path / "run")
    assert_undisturbed(tmp_path / "run", base)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6]


# ---- several processes ---------------------------------------------------------------------------
def test_a_killed_process_ends_the_other(tmp_path, base):
    flags = [*base.flags, "--steps", 10**6, "--save-every", 4]
    processes = pair(*flags, "--out", tmp_path / "run")
    processes[0].until("step 5/")
    processes[1].kill()
    assert processes[1].wait() == -9 and processes[0].wait() == 1
    last = processes[0].err.strip().splitlines()[-1]  # what stands before it are torch's warnings
    assert last.startswith("train.py: another process was lost") and "--resume" in last
    assert "Traceback" not in processes[0].err
    saved = checkpoint(tmp_path / "run")["step"]
    assert saved >= 4
    for process in pair("--resume", tmp_path / "run", "--stop-at", saved + 1):
        assert process.succeeds()


def test_what_process_0_refuses_ends_the_other(tmp_path, base):
    processes = pair(*base.flags, "--out", base / "half")
    assert processes[0].fails("--out", base / "half")
    assert processes[1].wait() == 1
    assert "train.py: another process was lost" in processes[1].err
    assert "Traceback" not in processes[1].err


def test_two_processes_are_resumed_bit_for_bit(tmp_path, base):
    flags = [*base.flags, "--data", base / "tiles"]
    for process in pair(*flags, "--out", tmp_path / "straight"):
        assert process.succeeds()
    killed = (nothing, at_step(4, send(signal.SIGKILL)))
    for process in pair(*flags, "--out", tmp_path / "run", patches=killed):
        assert process.wait() != 0
    for process in pair("--resume", tmp_path / "run"):
        assert process.succeeds()
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "run"))
    assert losses(tmp_path / "straight") == losses(tmp_path / "run")


def ranks(mark):
    """{rank: process} of the running processes that a test has started with this mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "environ").read_text(errors="replace").split("\0")
            environment = dict(word.split("=", 1) for word in words if "=" in word)
            if environment.get("MARK_OF_TEST") == mark and "RANK" in environment:
                found[int(environment["RANK"])] = int(folder.name)
    return found


def test_torchrun_names_a_process_that_was_killed(tmp_path, base):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", 2, ROOT / "train.py", *base.flags]
    command += ["--steps", 10**6, "--out", tmp_path / "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MARK_OF_TEST": str(tmp_path)}
    with open(tmp_path / "err", "wb") as err:
        words = [str(word) for word in command]
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=err)
    try:
        end = time.monotonic() + 150
        while not (tmp_path / "run" / "last.pt").exists():
            assert time.monotonic() < end and process.poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.1)
        os.kill(ranks(str(tmp_path))[1], signal.SIGKILL)
        assert process.wait(60) != 0
        text = (tmp_path / "err").read_text()
        assert "Signal 9 (SIGKILL)" in text and "rank      : 1" in text, text
        assert not ranks(str(tmp_path)), "a process is still there"
    finally:
        for pid in ranks(str(tmp_path)).values():
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
    assert checkpoint(tmp_path / "run")["step"] >= 2  # and that can be gone on with


# ---- a full disk, a place that cannot be written -------------------------------------------------
def limit(size):
    """An action: from now on a file may have so many bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FULL = {"last.pt": 1_500_000, "student.pt": 300_000, "log.jsonl": 10}  # bytes from step 4 on


@pytest.mark.parametrize("name", FULL)
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_later(tmp_path, base, name):
    out = tmp_path / "run"
    shutil.copytree(base / "half", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    child = Child("--resume", out, patch=at_step(4, limit(FULL[name])))
    assert child.fails(f"cannot write {out}/{name}", "free some space")
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after["last.pt"] == before["last.pt"] and after.keys() == before.keys()
    assert student_file(out)["config"]["step"] == (4 if name == "last.pt" else 3)
    resume(out)
    assert_undisturbed(out, base)


def test_a_log_line_that_found_no_space_does_not_spoil_the_next(tmp_path, base):
    out = tmp_path / "run"
    shutil.copytree(base / "half", out)
    size = (out / "log.jsonl").stat().st_size
    child = Child("--resume", out, patch=at_step(4, limit(size + 20)))
    assert child.fails(f"cannot write {out}/log.jsonl")
    resume(out)
    assert_undisturbed(out, base)


def test_a_full_disk_at_the_start(tmp_path, base):
    """The first checkpoint, and the offline teachers."""
    flags = [*base.flags, "--weights-dir", tmp_path / "weights", "--out", tmp_path / "run"]
    child = Child(*flags, patch=limit(100_000))
    assert child.fails(f"cannot write {tmp_path}/weights/toy_cells")
    assert not list(tmp_path.rglob("*.pt*"))
    child = Child(*base.flags, "--out", tmp_path / "run", patch=limit(500_000))
    assert child.fails(f"cannot write {tmp_path}/run/student.pt")
    assert not list(tmp_path.rglob("*.pt*"))
    assert Child(*flags).succeeds()  # what was logged until then is no run
    assert_undisturbed(tmp_path / "run", base)


@pytest.fixture
def disk(tmp_path):
    """A real file system of few MB: disk(options) mounts it, or changes it -> its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        if os.path.ismount(folder):
            options = f"remount,{options}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"mounting is not allowed here: {result.stderr.strip()}")
        return folder

    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("mounting needs root")
    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("size", "step"), [("64k", None), ("2m", None), ("5m", 2)])
def test_a_real_disk_that_is_full(tmp_path, base, disk, size, step):
    """The old file stays until the new one is whole."""
    folder = disk(f"size={size}")
    out = folder / "run"
    assert Child(*base.flags, "--out", out).fails(f"cannot write {out}/")
    assert not list(out.glob("*.tmp"))
    assert (out / "last.pt").exists() == (step is not None)
    disk("size=20m")
    if step:
        assert checkpoint(out)["step"] == step
        resume(out)
    else:
        (out / "student.pt").unlink(missing_ok=True)
        assert Child(*base.flags, "--out", out).succeeds()
    assert_undisturbed(out, base)


def test_a_real_disk_that_is_read_only(tmp_path, base, disk):
    folder = disk("size=20m")
    shutil.copytree(base / "half", folder / "run")
    disk("ro")
    assert Child("--resume", folder / "run").fails(f"{folder}/run/log.jsonl")
    assert Child(*base.flags, "--out", folder / "new").fails(f"{folder}/new")
    place = ["--weights-dir", folder / "weights", "--out", tmp_path / "run"]
    assert Child(*base.flags, *place).fails(f"{folder}/weights")
    disk("rw")
    resume(folder / "run")
    assert_undisturbed(folder / "run", base)


@pytest.mark.parametrize("place", ["file/run", "/proc/nowhere/run"])
def test_a_place_that_cannot_be_made_is_told_before_anything_slow(tmp_path, base, place):
    (tmp_path / "file").write_text("")
    out = tmp_path / place  # of an absolute place, itself
    child = Child(*base.flags, "--out", out)
    assert child.fails(Path(*out.parts[:-1]))
    assert "teacher" not in child.out and "step 1/" not in child.out


# ---- a last.pt that is damaged, or of something else ---------------------------------------------
def put(*keys_and_value):
    """A damage: content[key][key]... becomes the value, or goes where it is `...`."""
    *keys, last, value = keys_and_value

    def damage(content):
        place = content
        for key in keys:
            place = place[key]
        if value is ...:
            del place[last]
        elif callable(value):
            place[last] = value(place[last])
        else:
            place[last] = value

    return damage


def with_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = math.nan
    return tensor


def optimizer_of(teacher_dims, nested_dims):
    """The state of an optimiser that has done a step."""
    student = Student("toy")
    model = torch.nn.Sequential(student, Adaptors(student.width, teacher_dims, nested_dims))
    optimizer = train.make_optimizer(model, 1e-3)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    return optimizer.state_dict()


WEIGHT = "backbone.blocks.1.mlp.fc1.weight"
HEAD = "heads.toy_cells.4.patches.0.bias"
DAMAGES = {
    "no step": put("step", ...),
    "no args": put("args", ...),
    "no record": put("record", ...),
    "no student": put("student", ...),
    "no adaptors": put("adaptors", ...),
    "no standardizers": put("standardizers", ...),
    "no optimizer": put("optimizer", ...),
    "no scaler": put("scaler", ...),
    "a weight missing": put("student", WEIGHT, ...),
    "a weight too many": put("student", lambda state: {**state, "x": torch.zeros(1)}),
    "a weight of another shape": put("student", WEIGHT, torch.zeros(3)),
    "a weight of whole numbers": put("student", WEIGHT, lambda w: w.long()),
    "a weight that is a number": put("student", WEIGHT, 1.0),
    "a weight that is nan": put("student", WEIGHT, with_nan),
    "a head that is inf": put("adaptors", HEAD, lambda w: w / 0 + math.inf),
    "heads of other dims": put(
        "adaptors", lambda _: Adaptors(48, {"toy_cells": 128}, [8]).state_dict()
    ),
    "heads of other teachers": put(
        "adaptors", lambda _: Adaptors(48, {"toy_tissue": 128}, [4]).state_dict()
    ),
    "a standardiser missing": put("standardizers", "toy_cells.summary.mean", ...),
    "a standardiser that is nan": put("standardizers", "toy_cells.summary.mean", with_nan),
    "optimiser empty": put("optimizer", {}),
    "optimiser without state": put("optimizer", "state", ...),
    "optimiser with one group": put("optimizer", "param_groups", lambda groups: groups[:1]),
    "optimiser of two teachers": put("optimizer", lambda _: optimizer_of({"a": 8, "b": 8}, [4])),
    "other tiles": put("record", "fingerprint", "6 tiles, another hash"),
    "args of other dims": put("args", "dims", [8, 48]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_it(tmp_path, base, case):
    out = tmp_path / "run"
    shutil.copytree(base / "half", out)
    content = checkpoint(out)
    DAMAGES[case](content)
    torch.save(content, out / "last.pt")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError) as error:
        resume(out)
    message = str(error.value)
    assert "\n" not in message and str(out) in message
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_checkpoint_that_is_cut_or_has_a_wrong_byte_is_refused(tmp_path, base, share):
    out = tmp_path / "run"
    shutil.copytree(base / "half", out)
    whole = (out / "last.pt").read_bytes()
    place = int(share * len(whole))
    wrong_byte = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for damaged in (whole[:place], wrong_byte):
        (out / "last.pt").write_bytes(damaged)
        with pytest.raises(InputError, match=f"^{out}/last.pt is ") as error:
            resume(out)
        assert "\n" not in str(error.value)
        assert (out / "last.pt").read_bytes() == damaged


def test_no_checkpoint_in_a_folder(tmp_path):
    for name in ("empty", "nowhere"):
        with pytest.raises(InputError, match=f"--resume: {tmp_path}/{name}/last.pt does not exist"):
            (tmp_path / "empty").mkdir(exist_ok=True)
            resume(tmp_path / name)


# ---- where a program can run: notebooks, threads, pipes ------------------------------------------
class NotebookOutput:
    """As a notebook's stdout: no `reconfigure`, no file behind it."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.stream.write(text)

    def flush(self):
        self.stream.flush()


def run_as_a_notebook_does():
    """What `%run train.py ...` does: the file as __main__, in a process that goes on."""
    sys.stdout = NotebookOutput(sys.stdout)
    sys.stderr = NotebookOutput(sys.stderr)
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        print("the notebook goes on")


def run_in_a_thread():
    """In another thread; the process ends with its exit code."""
    codes = []

    def run():
        try:
            run_training()
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    sys.exit(codes[0])


@pytest.mark.parametrize("program", [run_as_a_notebook_does, run_in_a_thread])
def test_a_run_from_a_notebook_and_from_a_thread(tmp_path, base, program):
    flags = [*base.flags, "--out", tmp_path / "run"]
    child = Child(*flags, program=program)
    assert child.succeeds() and child.err == ""
    assert "step 6/6" in child.out
    assert_undisturbed(tmp_path / "run", base)
    again = Child(*flags, program=program)
    assert again.fails(f"train.py: --out: {tmp_path}/run holds a run")
    if program is run_as_a_notebook_does:
        assert "the notebook goes on\n" in child.out and "the notebook goes on\n" in again.out


def close_output():
    """As `python train.py >&- 2>&-` has it."""
    os.close(1)
    os.close(2)
    sys.stdout = None
    sys.stderr = None


def test_a_run_without_output(tmp_path, base):
    child = Child(*base.flags, "--out", tmp_path / "run", patch=close_output)
    assert child.wait() == 0
    assert_undisturbed(tmp_path / "run", base)
    assert Child(*base.flags, "--out", tmp_path / "run", patch=close_output).wait() == 2


def test_a_real_run_whose_output_is_no_longer_read(tmp_path, base):
    """`| head -1`: it ends as other programs do, without a message."""
    flags = [str(flag) for flag in [*base.flags, "--out", tmp_path / "run"]]
    line = 'exec "$0" "$@" | head -1; exit ${PIPESTATUS[0]}'
    command = ["bash", "-c", line, sys.executable, str(ROOT / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "check": False, "timeout": 240}
    result = subprocess.run(command, env=environment, **options)
    assert result.returncode == 141 and result.stderr == ""
    assert result.stdout.startswith("student toy: ") and result.stdout.count("\n") == 1


# ---- determinism ---------------------------------------------------------------------------------
def test_one_seed_gives_the_same_bits_whatever_the_workers_and_however_often_it_was_stopped(
    tmp_path, base
):
    for workers, stops in ((1, []), (3, [1, 5])):
        out = tmp_path / f"{workers} {stops}"
        first, *others = [*stops, 6]
        launch(*base.flags, "--workers", workers, "--stop-at", first, "--out", out)
        for i, stop in enumerate(others):
            resume(out, "--stop-at", stop, "--workers", workers if i % 2 else 0)
        assert_undisturbed(out, base)
    launch(*base.flags, "--seed", 1, "--out", tmp_path / "another")
    assert losses(tmp_path / "another") != losses(base / "undisturbed")  # the seed is what decides
