"""Every benchmark runs to its end with a tiny budget, in this process, and counts rightly."""

import contextlib
import csv
import functools
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import oracle, write_tiles
from PIL import Image

import evaluate
import train
from data import InputError, save_atomically
from extras.benchmarks import (
    coverage,
    cpu,
    eva,
    evaluation,
    extraction,
    gpu,
    hardware,
    magnification,
    miniature,
    published,
    random_weights,
    real_tissue,
    stress,
    timing,
)
from student import STUDENTS, Adaptors, Student, VisionTransformer
from teachers import OFFLINE, TEACHERS, VIT_TOY, Teacher, load_teacher

STEPS = 2  # of the offline teachers
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def save_student(folder, arch="toy", dims=miniature.DIMS, seed=0):
    """A run folder with an untrained student."""
    torch.manual_seed(seed)
    config = {"arch": STUDENTS[arch], "nested_dims": dims, "student": arch}
    config |= {"step": 1, "steps": 1, "teachers": []}
    content = {"state_dict": Student(arch).backbone.state_dict(), "config": config}
    save_atomically(content, folder / "student.pt")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Call a benchmark's main as its command line does -> (its exit code, what it printed)."""

    def call(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
        capsys.readouterr()
        code = module.main()
        return code, capsys.readouterr().out

    return call


def in_this_process(command, weights_dir=None, **_):
    """Stands in for a process that runs Python code or train.py; -> what it prints."""
    words = [str(word) for word in command]
    if weights_dir and "--weights-dir" in words:
        words += ["--weights-dir", str(weights_dir)]  # teachers that are there
    said = io.StringIO()
    argv = sys.argv
    try:
        with contextlib.redirect_stdout(said):
            if words[1] == "-c":
                sys.argv = words[2:]
                exec(words[2], {})  # noqa: S102 - a benchmark's own text
            else:
                first = words.index(str(timing.ROOT / "train.py")) + 1
                train.main(train.parse_args(words[first:]))
    finally:
        sys.argv = argv
    return said.getvalue()


# ---- what they share -----------------------------------------------------------------------------


def test_contenders_take_turns_and_ratios_are_within_rounds():
    order = []

    def contender(name, seconds):
        order.append(name)
        return next(seconds)

    a = iter([1.0, 2.0, 3.0])
    b = iter([2.0, 8.0, 3.0])
    contenders = {"a": lambda: contender("a", a), "b": lambda: contender("b", b)}
    seconds = timing.interleaved(contenders, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert timing.ratios(seconds, "b", "a") == [2.0, 4.0, 1.0]
    assert timing.spread([1.0, 2.0, 3.0], ".1f") == "median 2.0, quartiles 1.5 to 2.5, of 3"


def test_a_wrong_part_is_named():
    assert timing.choose_parts([], ["vit", "ddp"]) == ["vit", "ddp"]
    with pytest.raises(InputError, match="PART: there is no vti; choose from vit, ddp"):
        timing.choose_parts(["vti"], ["vit", "ddp"])


def test_without_timm_the_pip_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="pip install timm"):
        timing.import_timm()


def test_the_benchmarks_step_is_the_step_of_train(tmp_path, weights_dir, monkeypatch):
    """From the same start, two steps on the same batches end at the same weights."""
    teachers = {t: load_teacher(t, weights_dir, steps=STEPS) for t in OFFLINE}
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 4, 3, 64, 64), generator=generator, dtype=torch.uint8)
    batches = [{"image": image} for image in images]
    models = []
    wrap = train.wrap

    def remember(model, *arguments, **more):
        models.append(model)
        return wrap(model, *arguments, **more)

    monkeypatch.setattr(train, "wrap", remember)
    cpu_device = torch.device("cpu")
    step = timing.training_step(teachers, "toy", [4, 48], cpu_device, torch.float32)
    for batch in batches:
        step(batch)

    args = train.parse_args(["--dims", "4,48", "--out", str(tmp_path)])
    student, adaptors, standardizers = train.make_models(args, cpu_device)
    model = torch.nn.Sequential(student, adaptors)
    monkeypatch.setattr(train, "learning_rate", lambda *_: 1e-4)
    train.train(
        args,
        steps=range(2),
        tiles=iter(batches),
        teachers=teachers,
        standardizers=standardizers,
        model=model,
        optimizer=train.make_optimizer(model, 1e-4),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        autocast=torch.autocast("cpu", enabled=False),
        device=cpu_device,
        grid=student.grid,
        save=lambda done: None,
    )
    for name, p in model.state_dict().items():
        assert torch.equal(p, models[0].state_dict()[name]), name
    torch.manual_seed(0)
    assert not torch.equal(Student("toy").backbone.norm.bias, student.backbone.norm.bias)


# ---- cpu -----------------------------------------------------------------------------------------


def test_cpu_vit(run, monkeypatch):
    oracle("timm")
    monkeypatch.setattr(cpu, "VITS", {"S": STUDENTS["vit_s"]})
    code, out = run(cpu, "vit", "--tiny", "--pairs", 1, "--batch", 1)
    assert not code and out.count("timm / ours median") == 2


@LINUX
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("folder", "toy, batch 4, 1 workers"),
        ("loader", "shard: "),
        ("million", "2,000 tiles listed in"),
        ("growth", "1     5      8        0"),
        ("ddp", "tiles/s of 2: "),
    ],
)
def test_cpu_parts(run, monkeypatch, weights_dir, part, expected):
    """Processes of their own are stood in for, where starting them would take most of the time."""

    def load(name, folder, steps):
        return load_teacher(name, weights_dir, steps=steps)

    monkeypatch.setattr(cpu, "load_teacher", load)
    monkeypatch.setattr(cpu, "run", functools.partial(in_this_process, weights_dir=weights_dir))
    monkeypatch.setattr(cpu, "QUICK_TEACHERS", [*cpu.QUICK_TEACHERS[:2], "--stats-tiles", 8])
    flags = ["--tiny", "--files", 2000, "--tiles", 24, "--rounds", 1, "--workers", 0, 1]
    code, out = run(cpu, part, *flags)
    assert not code and expected in out


def test_a_process_that_fails_is_shown(tmp_path):
    with pytest.raises(SystemExit, match="no such flag"):
        cpu.run([sys.executable, "-c", "raise SystemExit('no such flag')"])


# ---- gpu and hardware ----------------------------------------------------------------------------


@pytest.fixture
def tables(monkeypatch):
    """What --tiny changes is as it was after the test."""
    for name in gpu.THREE:
        monkeypatch.setitem(TEACHERS, name, TEACHERS[name])
    monkeypatch.setitem(STUDENTS, "vit_b", STUDENTS["vit_b"])
    monkeypatch.setitem(train.DEFAULTS, "vit_b", train.DEFAULTS["vit_b"])
    yield
    torch._dynamo.config.fail_on_recompile_limit_hit = False


def test_gpu_on_a_cpu(run, tables, tmp_path):
    oracle("timm")
    code, out = run(gpu, "--device", "cpu", "--tiny", "--rounds", 1, "--tiles-dir", tmp_path)
    assert not code
    for part in ("matmul: ", "train: ", "usual / ours: ", "% of the step: ", "256 px: "):
        assert part in out, part
    assert len(list((tmp_path / "256").iterdir())) == 40


def test_gpu_without_one_ends_in_one_line(run):
    with pytest.raises(InputError, match="--device: .*--tiny only shows that it runs"):
        run(gpu, "--device", "cpu")


def test_operations_of_a_linear_teacher_are_counted_by_hand(tables):
    """Forward of a ViT of one block: every product of two matrices, 2 for a multiply-add."""
    gpu.make_small()
    arch = TEACHERS["virchow2"].arch
    N, D, M = 16, arch["width"], arch["mlp_width"]
    T = N + 1 + arch["registers"]
    embed = 2 * N * 3 * 14**2 * D
    attention = 2 * T * D * 3 * D + 2 * 2 * T * T * D + 2 * T * D * D
    mlp = 2 * T * D * M + 2 * T * M // 2 * D
    teachers, own = gpu.count_operations(["virchow2"], "vit_b")
    assert teachers == pytest.approx((embed + attention + mlp) / 1e12)
    assert own > teachers  # forward and backward, and wider


def test_patches_are_resampled_as_a_teacher_does_it():
    arch = {"img_size": 56, "patch_size": 14, "width": 64, "depth": 1, "heads": 1, "mlp_width": 64}
    torch.manual_seed(0)
    teacher = Teacher("uni", VisionTransformer(**arch))
    images = torch.rand(2, 3, 56, 56)
    whole = teacher(images)["patches"]
    assert torch.equal(gpu.resample(whole, 3), teacher(images, 3)["patches"])
    assert gpu.resample(whole, 4) is whole


def test_hardware(run, monkeypatch):
    small = hardware.SETTINGS[0]._replace(teachers=["lunit_s16"], student="toy")  # for a test
    monkeypatch.setattr(hardware, "SETTINGS", [small])
    code, out = run(hardware, "--tiny")
    assert not code and out.startswith("counting on a CPU")
    assert "1 T4: lunit_s16 -> toy\n  100,000 tiles, 20,000 steps" in out
    assert "of the card's 16 GB: " in out


def test_an_estimate_is_what_its_parts_come_to(monkeypatch):
    monkeypatch.setattr(hardware, "count_operations", lambda *_: (3.0, 1.0))  # TFLOP a tile
    monkeypatch.setitem(hardware.PEAKS, "T4", 10)  # 4 TFLOP/s are reached, 14,400 an hour
    setting = hardware.Setting("T4", 1, ["lunit_s16", "uni"], "vit_s", 7200, 900, 64)
    lines = "\n".join(hardware.estimate(setting, "1.0 GB"))
    assert "7,200 tiles, 900 steps of 64: 8.0 epochs" in lines
    assert "75% of it teachers: 16.0 h" in lines  # 57,600 times 4 TFLOP
    # the teachers once: 7,200 times 3; 57,600 times 1. A tile: 257 tokens of 384 + 1024 numbers
    assert "with extras.cache: 5.2 GB on disk, 5.5 h" in lines


def test_the_setting_of_few_tiles_is_300_epochs(run, monkeypatch):
    monkeypatch.setattr(hardware, "estimate_memory", lambda *_: "1.0 GB")
    flags = ["--teachers", "lunit_s16", "--card", "A100"]
    out = run(hardware, *flags, "--tiles", 4000)[1]
    assert "1 A100: lunit_s16 -> vit_s\n  4,000 tiles, 18,750 steps of 64: 300.0 epochs" in out
    assert "100,000 steps of 64: 6.4 epochs" in run(hardware, *flags, "--tiles", 1_000_000)[1]
    with pytest.raises(InputError, match="no teacher is called .nobody."):
        run(hardware, "--teachers", "nobody")


def test_kept_bytes_are_those_of_a_known_graph():
    """Twice the tiles keep twice as much, but for what does not depend on them."""
    student = Student("toy")
    adaptors = Adaptors(student.width, {"t": 8}, [4])
    one, two, three = (hardware.kept_bytes(student, adaptors, {"t": 8}, n) for n in (1, 2, 3))
    assert one > 0 and two - one == pytest.approx(three - two, rel=0.01)


# ---- teachers ------------------------------------------------------------------------------------


def test_published(run, monkeypatch):
    oracle("timm")
    oracle("safetensors.torch")
    monkeypatch.setitem(TEACHERS, "lunit_s16", TEACHERS["lunit_s16"])  # --tiny changes it
    took = published.Loading(1.0, 1.1, 2.0, 0.0, 3.0)
    monkeypatch.setattr(published, "load_apart", lambda *_: took)  # tests/test_teachers.py runs it
    code, out = run(published, "lunit_s16", "--tiny", "--device", "cpu")
    assert not code and "1.10 GB (1.10 x the model)" in out and "timm / ours in time" in out
    difference = float(out.split("largest difference of patches ")[1].split()[0])
    assert difference < 1e-4
    with pytest.raises(InputError, match="toy_cells is made here"):
        run(published, "toy_cells")


def test_a_teacher_beside_another(run, monkeypatch):
    for name in ("lunit_s8", "lunit_s16"):
        monkeypatch.setitem(TEACHERS, name, TEACHERS[name])  # --tiny changes them
    flags = ("--beside", "lunit_s16", "--tiny", "--device", "cpu")
    code, out = run(published, "lunit_s8", *flags)
    assert not code and "lunit_s8 / lunit_s16 in time: median " in out
    # of tokens 785 / 197 = 3.98, of the image the same; of time so little says nothing
    assert 3 < float(out.split(" GB, ")[-1].split(" x ")[0]) < 4.5


def test_random_weights_are_a_teacher(run, tmp_path):
    code, _ = run(random_weights, "lunit_s16", "--out", tmp_path)
    assert not code
    teacher = load_teacher("lunit_s16", tmp_path)
    assert teacher(torch.rand(1, 3, 224, 224))["summary"].shape == (1, 384)
    before = (tmp_path / "lunit_s16.bin").stat().st_mtime_ns
    random_weights.write_random_weights("lunit_s16", tmp_path)
    assert (tmp_path / "lunit_s16.bin").stat().st_mtime_ns == before


# ---- evaluation and magnification ----------------------------------------------------------------


@LINUX
def test_evaluation(run, monkeypatch):
    started = []

    def start(command, **_):
        started.append(command[3])
        assert run(evaluation, *command[3:])[0] is None
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(evaluation.subprocess, "run", start)
    run(evaluation, "--tiny")
    assert started == ["knn", "retrieval", "adaptive", "linear"]
    code, out = run(evaluation, "knn", "--tiny", "--alone")
    assert not code and "0.00 GB of features" in out
    accuracy = float(out.split(" accuracy ")[1])
    assert 0.3 < accuracy < 1  # neither chance nor trivial


def test_a_whole_evaluation_is_timed(run, monkeypatch):
    places = []

    def start(command, env, **_):
        places.append(env["PYTHONPATH"])
        assert run(evaluation, *command[2:])[0] is None
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(evaluation.subprocess, "run", start)
    monkeypatch.setattr(evaluate, "N_TILES", 64)
    for name in ("resample", "make_rows", "compare"):
        monkeypatch.setattr(evaluate, name, getattr(evaluate, name))  # put back at the end
    run(evaluation, "table", "--tiny", "--before", "elsewhere", "--rounds", 2)
    now = str(timing.ROOT)
    assert places == [now, "elsewhere", "elsewhere", now]
    code, out = run(evaluation, "table", "--tiny", "--alone")
    assert not code and "s of CPU, resamples" in out


def test_coverage(run, monkeypatch):
    monkeypatch.setattr(coverage, "SETTINGS", coverage.SETTINGS[1::3])
    code, out = run(coverage, "--tiny")
    assert not code and "40 + 10" in out and "in groups of 10" in out


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    """Few simulations: 95 % of 80 are 76, give or take 2."""
    monkeypatch.setattr(coverage, "RECALLS", (0.6, 0.95))
    found = coverage.simulate(coverage.Setting((160, 40)), 80, 0)
    for recall in (0.6, 0.95):
        assert found[recall]["held"] >= 88 and found[recall]["equal"] >= 88, found
        assert found[recall]["held"] >= found[recall]["plain"]
    assert found[0.95]["width"] < found[0.6]["width"]
    apart = coverage.simulate(coverage.Setting((320, 80), group=10), 40, 0)
    assert apart[0.6]["unaware"] < 80 < apart[0.6]["held"]


def test_magnification(run, tmp_path):
    code, out = run(magnification, save_student(tmp_path / "run"), "--tiles", 12)
    assert not code and len(out.splitlines()) == 4 and "2 x, resampled: cells" in out
    with pytest.raises(InputError, match="tiles of 224 px; give a toy student"):
        run(magnification, save_student(tmp_path / "large", "vit_s"))


# ---- stress --------------------------------------------------------------------------------------


@LINUX
@pytest.mark.filterwarnings("ignore")
def test_stress_images(run):
    code, out = run(stress, "images", "--n", 50)
    assert code == 0 and "50 images in" in out and "0 differ from Pillow" in out


def test_a_difference_from_pillow_is_found(run, monkeypatch):
    monkeypatch.setattr(stress, "outcome", lambda path: "other pixels")
    code, out = run(stress, "images", "--n", 3)
    assert code == 1 and "3 differ from Pillow" in out


def test_growth_of_memory_is_found():
    steady = [100.0] * 8
    assert not stress.has_grown("memory, MB", steady, 1.02)
    assert stress.has_grown("memory, MB", [*steady[:6], 103.0, 103.0], 1.02)


def test_checkpoints_are_compared_to_the_bit():
    a = {"step": 3, "list": [torch.ones(2), {"x": 1.0}], "args": {"out": "a"}}
    b = {"step": 3, "list": [torch.ones(2), {"x": 1.0}], "args": {"out": "b"}}
    assert stress.differences(a, b) == ["/args/out"]
    b["list"][0] = torch.tensor([1.0, 1.0 + 2**-23])
    b["list"][1] = {"y": 1.0}
    assert stress.differences(a, b) == ["/list/0", "/list/1", "/args/out"]


def test_a_run_is_killed_resumed_and_ends(tmp_path, monkeypatch):
    started = []

    def start(flags, text):
        started.append(flags)
        code = "pass" if len(started) == 3 else "import time; time.sleep(60)"
        return subprocess.Popen([sys.executable, "-S", "-c", code])

    monkeypatch.setattr(stress, "start", start)
    monkeypatch.setattr(stress, "completed_steps", lambda out: len(started) - 1)  # -1: none yet
    code, kills = stress.killed_run(tmp_path / "run", ["--x"], [0.2, 0.1], limit=60)
    assert (code, kills) == (0, 2)
    assert started[0] == ["--x", "--out", tmp_path / "run"]
    assert started[1:] == [["--resume", tmp_path / "run"]] * 2


def test_the_last_line_of_a_step_counts(tmp_path):
    lines = '{"step": 2, "loss": 3.0}\n{"step": 4, "loss": 2.0}\n{"step": 4, "loss": 1.5}\n'
    (tmp_path / "log.jsonl").write_text(lines)
    assert stress.losses(tmp_path) == {2: 3.0, 4: 1.5}


# ---- eva -----------------------------------------------------------------------------------------


def test_eva_lays_tiles_out_as_bach(tmp_path):
    for kind in "abcd":
        tile = write_tiles(tmp_path / "tiles", 1, (224, 224))[0]
        for i in range(100):
            (tmp_path / "tiles" / f"{kind}_{i:03d}.png").hardlink_to(tile)
        tile.unlink()
    chosen = eva.choose_tiles(tmp_path / "tiles")
    assert len(chosen) == 400
    assert [(name, file.stem) for name, file in chosen[:5]] == [
        ("Benign", "a_000"),
        ("InSitu", "b_000"),
        ("Invasive", "c_000"),
        ("Normal", "d_000"),
        ("Benign", "a_001"),
    ]
    (tmp_path / "tiles" / "d_099.png").unlink()
    with pytest.raises(InputError, match="--tiles: .* has not 400 images of four kinds"):
        eva.choose_tiles(tmp_path / "tiles")


def test_evas_tiles_are_shrunk_as_evaluate_does(tmp_path, monkeypatch):
    monkeypatch.setattr(eva, "N_TILES", 4)
    files = []
    for kind in "abcd":
        file = tmp_path / "tiles" / f"{kind}_0.png"
        file.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(ord(kind)).integers(0, 256, (48, 80, 3), np.uint8)
        Image.fromarray(pixels).save(file)
        files.append(str(file))
    photos = eva.lay_out(tmp_path / "tiles", 32, tmp_path / "bach")
    seen = evaluate.CentreTiles("", 32, files)
    for i, name in enumerate(eva.CLASSES):
        laid = np.array(Image.open(photos / name / f"{i:03d}.tif"))
        assert np.array_equal(laid, seen[i]["image"].permute(1, 2, 0))
    Path(files[2]).write_bytes(b"none")
    with pytest.raises(InputError, match="--tiles: .*c_0.png.*replace it"):
        eva.lay_out(tmp_path / "tiles", 32, tmp_path / "again")


def test_eva_compares_features(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eva, "N_TILES", 3)
    student = Student("toy").eval()
    photos = tmp_path / "photos"
    written = tmp_path / "written"
    written.mkdir()
    rows = []
    for path in write_tiles(photos, 3, (64, 64)):
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        torch.save(evaluate.embed(student, image[None]), written / f"{path.stem}.pt")
        rows.append({"origin": path.name, "embeddings": f"{path.stem}.pt"})
        rows[-1] |= {"target": len(rows) % 2, "split": "train"}
    rows[-1]["split"] = "val"  # 1, as the first of the other two
    with open(written / "manifest.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    assert eva.compare(written, photos, student, 48)
    assert "2 tiles to learn from, 1 to ask" in capsys.readouterr().out
    assert not eva.compare(written, photos, student, 16)  # they are 48 numbers, not 16
    torch.save(torch.full((1, 48), torch.nan), written / rows[0]["embeddings"])
    assert not eva.compare(written, photos, student, 48)


def test_eva_that_is_not_there_names_the_pip_command(run, tmp_path):
    flags = ["--eva-source", tmp_path, "--tiles", tmp_path]
    with pytest.raises(InputError, match="--eva: .*pip install 'kaiko-eva"):
        run(eva, "--eva", tmp_path / "eva", *flags)


def test_evas_random_student_is_one(tmp_path):
    eva.random_student("vit_s", tmp_path / "student.pt")
    student, config = evaluate.load_student(tmp_path / "student.pt")
    assert config["student"] == "vit_s" and student.backbone.norm.weight.std() > 0.1


# ---- an extraction -------------------------------------------------------------------------------


def test_extraction_compares_with_timm(run, monkeypatch):
    oracle("timm")
    words = ["toy", "--tiles", 3, "--rounds", 1, "--device", "cpu"]
    code, out = run(extraction, *words)
    assert code == 0 and out.count(" tiles/s, timm ") == 2
    monkeypatch.setattr(extraction, "TOLERANCE", -1)
    assert run(extraction, *words)[0] == 1
    with pytest.raises(InputError, match="STUDENT: there is no vit_x; choose from vit_b"):
        run(extraction, "vit_x")


# ---- the miniature -------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path, weights_dir):
    """Run folders of four untrained students of seed 0, and the teachers' tiny weights."""
    for i, name in enumerate(miniature.STUDENTS):
        save_student(miniature.run_folder(tmp_path, name, 0), seed=i)
    for name in miniature.TASKS.values():
        load_teacher(name, weights_dir, steps=STEPS)
    return tmp_path


def test_miniature_from_training_to_claims(run, tmp_path, monkeypatch, weights_dir):
    commands = []

    def start(command, **_):
        commands.append(command)
        in_this_process(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(evaluate, "N_TILES", 0)  # --tiny sets it
    quick = {"kNN": evaluate.knn, "linear": evaluate.knn}  # the next but one runs both probes
    monkeypatch.setattr(miniature, "PROBES", quick)
    monkeypatch.setattr(miniature.subprocess, "run", start)
    monkeypatch.setattr(miniature, "ThreadPoolExecutor", OneAfterTheOther)
    flags = ["--tiny", "--out", tmp_path, "--weights-dir", weights_dir]
    code, printed = run(miniature, *flags)
    assert not code and len(commands) == 4
    assert "student of both, PCA" in printed and "wanted >= 10" in printed
    assert "NOT all of it holds" in printed and (tmp_path / "miniature.png").exists()
    run(miniature, *flags)  # as after an interruption
    assert all("--resume" in command for command in commands[4:])


class OneAfterTheOther:
    """Stands in for a pool of threads, in which standard output cannot be redirected."""

    def __init__(self, workers):
        assert workers == 2

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        function(*arguments)
        return self

    def result(self):
        pass


def test_a_training_that_fails_ends_in_one_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "train.py: no space\n")
    monkeypatch.setattr(miniature.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match="x: train.py: no space; put it right"):
        miniature.train_one(tmp_path / "x", miniature.BOTH, 0, [], [])


def test_every_model_dim_task_and_probe_is_measured(out, weights_dir, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "N_TILES", 48)
    scores = miniature.measure(out, weights_dir, 0, STEPS, None)
    for name in miniature.STUDENTS:
        for m in miniature.DIMS:
            for label in miniature.TASKS:
                for probe in miniature.PROBES:
                    assert 0 <= scores[name, m, label, probe] <= 100
    assert not any("histograms" in key[0] for key in scores)
    values = miniature.report([scores, scores])
    key = ("student of both", 48, "cells", "kNN")
    assert values[key].tolist() == [scores[key]] * 2


def test_claims_hold_exactly_at_the_margins():
    """Every difference of the three claims, moved one by one just below what is asked."""
    flat = miniature.FLAT
    values = {}
    for label, teacher in miniature.TASKS.items():
        for probe in miniature.PROBES:
            for other in miniature.TASKS.values():
                values[f"teacher {other}", 128, label, probe] = 93.0 if other == teacher else 20.0
                values[f"student of {other}", 48, label, probe] = 90.0 if other == teacher else 75.0
            values[miniature.BOTH, 48, label, probe] = 90.0
            values[flat, 48, label, probe] = 91.0
            values[miniature.BOTH, 2, label, probe] = 60.0
            values[flat, 2, label, probe] = 50.0
            values[miniature.RANDOM, 2, label, probe] = 59.9
    values = {key: np.array([value]) for key, value in values.items()}
    assert miniature.claims(values, 86.0)
    assert not miniature.claims(values, 85.9)
    moved = []
    for label, teacher in miniature.TASKS.items():
        [other] = set(miniature.TASKS.values()) - {teacher}
        for probe in miniature.PROBES:
            moved.append((f"teacher {teacher}", 128, label, probe))
            moved.append((f"student of {other}", 48, label, probe))
            moved.append((flat, 48, label, probe))
            moved.append((flat, 2, label, probe))
            moved.append((miniature.RANDOM, 2, label, probe))
    for key in moved:
        assert not miniature.claims(values | {key: values[key] + 0.1}, 86.0), key


def test_cuts_are_prefixes_principal_axes_and_one_random_projection_for_both_splits():
    generator = torch.Generator().manual_seed(0)
    features = {}
    for name in miniature.STUDENTS:
        features[name] = {
            "train": torch.randn(90, 48, generator=generator),
            "test": torch.randn(90, 48, generator=generator),
        }
    features["teacher toy_cells"] = {
        "train": torch.randn(90, 128, generator=generator),
        "test": torch.randn(90, 128, generator=generator),
    }
    cuts = miniature.cut_all(features, seed=0)
    whole = features["student of both"]
    for m in miniature.DIMS[:-1]:
        assert torch.equal(cuts["student of both", m]["test"], whole["test"][:, :m])
        mean = whole["train"].mean(0).numpy()
        axes = np.linalg.svd(whole["train"].numpy() - mean)[2][:m]  # (m, 48)
        expected = (whole["test"].numpy() - mean) @ axes.T
        got = cuts[miniature.PCA, m]["test"].numpy()
        np.testing.assert_allclose(np.abs(got), np.abs(expected), atol=2e-4)  # an axis has no sign
        z = cuts[miniature.RANDOM, m]
        projection = torch.linalg.lstsq(whole["train"], z["train"]).solution  # (48, m)
        torch.testing.assert_close(whole["test"] @ projection, z["test"], atol=1e-3, rtol=1e-3)
        assert (projection.abs() > 0.01).float().mean() > 0.9  # of all channels, not of some
    teacher = features["teacher toy_cells"]
    assert torch.equal(cuts["teacher toy_cells", 128]["train"], teacher["train"])
    other = miniature.cut_all(features, seed=1)[miniature.RANDOM, 2]["test"]
    assert not torch.equal(other, cuts[miniature.RANDOM, 2]["test"])


def test_real_tiles_and_their_colour_histograms(tmp_path, out, weights_dir):
    labelled = tmp_path / "labelled"
    for split in ("train", "test"):
        for name in ("a", "b"):
            write_tiles(labelled / split / name, 4, (64, 64))
    images, labels = miniature.read_tiles(str(labelled))
    assert labels["train"]["class"].bincount().tolist() == [4, 4]
    expected = []
    for image in images["train"]:
        channels = []
        for channel in image.numpy():
            channels.append(np.histogram(channel, bins=16, range=(0, 256))[0] / 4096)
        expected.append(np.concatenate(channels))
    got = miniature.histograms(images["train"])
    np.testing.assert_allclose(got.numpy(), np.array(expected), atol=1e-6)
    scores = miniature.measure(out, weights_dir, 0, STEPS, str(labelled))
    assert {key[2] for key in scores} == {"class"}
    assert ("colour histograms", 48, "class", "kNN") in scores


# ---- real tissue ---------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
    """The two teachers of the benchmark, which leave the registry after the test."""
    for name in real_tissue.TEACHER_OF.values():
        monkeypatch.setitem(TEACHERS, name, None)
    real_tissue.register_teachers()


@pytest.fixture
def labelled(tmp_path):
    """Two folders of labelled tiles, of two classes and of three."""
    folders = []
    for name, classes in (("a", "xy"), ("b", "xyz")):
        for letter in classes:
            write_tiles(tmp_path / name / "train" / letter, 6, (70, 80))
            write_tiles(tmp_path / name / "test" / letter, 2, (70, 80))
        folders.append(tmp_path / name)
    return folders


def noise(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, 64, 64), generator=generator, dtype=torch.uint8)


def test_real_tissue_from_teachers_to_tables(run, registered, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(real_tissue, "BATCH", 4)
    out = tmp_path / "out"
    flags = [*labelled, "--tiny", "--device", "cpu", "--out", out]
    _, printed = run(real_tissue, *flags)
    assert f"A: {labelled[0]}, 2 classes; tiles: 12 train, 2 held, 10 kept, 4 test" in printed
    assert f"B: {labelled[1]}, 3 classes; tiles: 18 train, 3 held, 15 kept, 6 test" in printed
    assert "2 steps of 8 are 0.6 epochs of 25 whole tiles, shrunk to 64 px" in printed
    expected = [("teacher of A", 128), ("teacher of B", 128)]
    for name in real_tissue.FLAGS:
        expected += [(name, m) for m in (2, 4, 8, 16, 48)]
    expected.append(("colour histograms", 48))
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["test tiles", "held-back training tiles"]
    for result in results.values():
        assert [(row["model"], row["dim"]) for row in result["rows"]] == expected
        for row in result["rows"]:
            assert row["scores"].keys() == {"A", "B"}
            for scores in row["scores"].values():
                assert scores.keys() == {"kNN", "linear", "agree"}
                assert 0 <= scores["kNN"]["mean"] <= 100 and len(scores["kNN"]["seeds"]) == 1
    of_both = evaluate.load_student(real_tissue.run_folder(out, real_tissue.BOTH, 0))[1]
    assert of_both["teachers"] == ["real_a", "real_b"] and of_both["nested_dims"] == miniature.DIMS
    flat = evaluate.load_student(real_tissue.run_folder(out, real_tissue.FLAT, 0))[1]
    assert flat["teachers"] == ["real_a", "real_b"] and flat["nested_dims"] == [48]
    of_b = evaluate.load_student(real_tissue.run_folder(out, "student of B", 0))[1]
    assert of_b["teachers"] == ["real_b"] and of_b["nested_dims"] == miniature.DIMS

    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.p*")}
    _, again = run(real_tissue, *flags)  # as after an interruption
    assert again.count("nothing to do") == 4 and "training the teacher" not in again
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.p*")} == before
    tables = printed[printed.index("\ntest tiles\n") : printed.index("results.json")]
    assert tables in again
    with pytest.raises(InputError, match="--out: .* was begun with other tiles or steps"):
        run(real_tissue, *labelled[::-1], "--tiny", "--device", "cpu", "--out", out)


def test_a_fifth_of_each_class_is_held_back():
    labels = torch.tensor([0] * 10 + [1] * 14 + [2] * 4)
    images = torch.arange(len(labels)).view(-1, 1, 1, 1)
    tiles = {"train": (images, labels), "test": (images, labels)}
    parts = real_tissue.hold_back(tiles, 0)
    assert parts["held"][1].tolist() == [0, 0, 1, 1]
    for images_of_part, labels_of_part in parts.values():
        assert torch.equal(labels[images_of_part.flatten()], labels_of_part)
    divided = torch.cat([parts["held"][0], parts["kept"][0]]).flatten()
    assert divided.sort().values.tolist() == list(range(len(labels)))
    assert torch.equal(parts["held"][0], real_tissue.hold_back(tiles, 0)["held"][0])
    assert not torch.equal(parts["held"][0], real_tissue.hold_back(tiles, 1)["held"][0])


def test_whole_tiles_are_turned_and_mirrored_and_each_keeps_its_label():
    images = noise(3, 0)
    tiles = real_tissue.WholeTiles(images, 0, torch.tensor([5, 6, 7]))
    seen = set()
    for k in range(120):
        sample = tiles[k]
        views = []
        for image in (images[sample["class"] - 5], images[sample["class"] - 5].flip(2)):
            views += [torch.rot90(image, turns, (1, 2)) for turns in range(4)]
        matches = [torch.equal(view, sample["image"]) for view in views]
        assert matches.count(True) == 1
        seen.add((sample["class"], matches.index(True)))
    assert len(seen) == 24  # all eight views of all three
    assert "class" not in real_tissue.WholeTiles(images, 0)[0]  # students get no labels


def test_a_teacher_of_labelled_tiles_learns_them(monkeypatch):
    losses = []

    def cross_entropy(logits, labels, original=torch.nn.functional.cross_entropy):
        losses.append(original(logits, labels))
        return losses[-1]

    monkeypatch.setattr(real_tissue.F, "cross_entropy", cross_entropy)
    monkeypatch.setattr(real_tissue, "BATCH", 8)
    images = noise(16, 0) // 2
    images[8:] += 128  # dark ones and bright ones
    labels = torch.arange(16) // 8
    state = real_tissue.train_teacher(images, labels, 12, 0, torch.device("cpu"), "teacher")
    assert losses[-1] < losses[0] / 4
    VisionTransformer(**VIT_TOY).load_state_dict(state)


def test_two_tables_of_what_models_know_and_whose_decisions_they_share(registered):
    """The tasks of evaluate.py, on each part; a copy of the teacher agrees where it is wrong."""
    torch.manual_seed(0)
    models = {}
    for folder, name in real_tissue.TEACHER_OF.items():
        models[f"teacher of {folder}"] = Teacher(name, VisionTransformer(**VIT_TOY))
    for name in real_tissue.FLAGS:
        models[name] = Student("toy")
    models["a copy of A"] = models["teacher of A"]
    folders = {}
    for folder, seed in (("A", 1), ("B", 2)):
        tiles = {}
        for part in ("kept", "held", "test"):
            tiles[part] = (noise(20, seed), torch.arange(20) % 2)
            seed += 10
        folders[folder] = tiles
    scores = real_tissue.measure(models, folders)
    name = "student of B"
    for part in real_tissue.PARTS:
        bank, bank_y = folders["A"]["kept"]
        queries, y = folders["A"][part]
        assert scores[part]["teacher of A", 128, "A", "agree"] == 100
        assert scores[part]["a copy of A", 128, "A", "agree"] == 100
        assert scores[part]["a copy of A", 128, "A", "linear"] < 100
        assert scores[part][name, 48, "A", "agree"] < 100
        for m in (2, 48):
            x = evaluate.embed(models[name], bank)[:, :m]
            z = evaluate.embed(models[name], queries)[:, :m]
            for metric, task in (("kNN", evaluate.knn), ("linear", evaluate.linear_probe)):
                found = evaluate.figures_of(task(x, bank_y, z, y))
                expected = 100 * found["balanced_accuracy"]
                assert scores[part][name, m, "A", metric] == pytest.approx(expected)
    assert scores["test"] != scores["held"]


@pytest.mark.parametrize(
    ("classes", "n", "why"),
    [("x", 6, "tiles of train are of 1 classes"), ("xy", 4, "too few training tiles")],
)
def test_too_few_labelled_tiles_are_refused(run, registered, tmp_path, classes, n, why):
    for letter in classes:
        for split in ("train", "test"):
            write_tiles(tmp_path / "few" / split / letter, n, (64, 64))
    with pytest.raises(InputError, match=f"few: {why}"):
        run(real_tissue, tmp_path / "few", tmp_path / "few", "--tiny", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
