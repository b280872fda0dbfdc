"""extras/cache.py: the teachers run once, their outputs on disk, and students of them."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import forget_key_biases, write_tiles
from PIL import Image

import evaluate
import train
from data import FolderTiles, batches, run_program
from extras import cache
from student import InputError
from teachers import load_teacher

TINY = ["--teacher-steps", "2", "--batch-size", "8", "--device", "cpu", "--dims", "4,16"]
TINY += ["--stats-tiles", "16"]


@pytest.fixture(autouse=True)
def small_evaluation(monkeypatch):
    monkeypatch.setattr(evaluate, "N_TILES", 32)


@pytest.fixture
def tiles(tmp_path):
    write_tiles(tmp_path / "tiles", 12)
    return tmp_path / "tiles"


@pytest.fixture
def run(monkeypatch, weights_dir):
    """python -m extras.cache, in this process."""

    def call(*words):
        argv = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", ["cache.py", *argv, "--weights-dir", str(weights_dir)])
        cache.main()

    return call


def checkpoint(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(a, b):
    assert a["step"] == b["step"]
    for part in ("student", "adaptors", "standardizers"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    for number, state in a["optimizer"]["state"].items():
        other = b["optimizer"]["state"][number]
        assert all(torch.equal(state[key], other[key]) for key in state)


def test_rows_are_the_teachers_outputs_on_the_fixed_views(
    tmp_path, run, tiles, weights_dir, capsys
):
    run(tmp_path / "cache", "--fill-only", "--data", tiles, *TINY, "--out", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "the outputs of toy_cells, toy_tissue take" in printed and "GB are free" in printed
    assert not (tmp_path / "run").exists()
    views = FolderTiles([str(tiles)], 64, seed=0)
    images = torch.stack([views[k]["image"] for k in range(12)]).contiguous()
    for t in ("toy_cells", "toy_tissue"):
        rows = np.load(tmp_path / "cache" / f"{t}.npy")
        assert rows.shape == (12, 65, 128) and rows.dtype == np.float16
        tokens = load_teacher(t, weights_dir, steps=2)(images, 8)
        expected = torch.cat([tokens["summary"][:, None], tokens["patches"]], dim=1)
        torch.testing.assert_close(torch.from_numpy(rows).float(), expected, rtol=1e-3, atol=1e-3)


def test_a_student_of_a_cache_equals_one_of_the_same_fixed_views(tmp_path, run, tiles, weights_dir):
    """The oracle is a source that runs the teachers itself, on the same views, rounded to fp16."""
    run(tmp_path / "cache", "--data", tiles, *TINY, "--steps", 6, "--out", tmp_path / "cached")
    views = FolderTiles([str(tiles)], 64, seed=0)

    class Rounded(cache.CachedTiles):
        def __init__(self):
            self.tiles = views
            self.seed = 0
            self.fingerprint = ""
            self.description = "oracle"
            self.rows = {}
            images = torch.stack([views[k]["image"] for k in range(12)]).contiguous()
            for t in ("toy_cells", "toy_tissue"):
                tokens = load_teacher(t, weights_dir, steps=2)(images, 8)
                rows = torch.cat([tokens["summary"][:, None], tokens["patches"]], dim=1)
                self.rows[t] = rows.half().numpy()

    flags = [*TINY, "--steps", 6, "--out", tmp_path / "oracle", "--weights-dir", weights_dir]
    train.main(train.parse_args([str(flag) for flag in flags]), Rounded())
    a = [line["loss"] for line in log(tmp_path / "cached")]
    b = [line["loss"] for line in log(tmp_path / "oracle")]
    assert a == pytest.approx(b, rel=1e-3) and len(a) == 6
    samples = cache.CachedTiles(views, {"toy_cells": tmp_path / "cache" / "toy_cells.npy"}, seed=3)
    seen = [samples[k]["image"] for k in range(36)]  # three epochs: every tile once in each
    for epoch in (seen[:12], seen[12:24], seen[24:]):
        assert {image.numpy().tobytes() for image in epoch} == {x.numpy().tobytes() for x in seen}
    assert not torch.equal(torch.stack(seen[:12]), torch.stack(seen[12:24]))


def test_ten_steps_equal_five_and_five_at_any_worker_count(tmp_path, run, tiles):
    flags = ["--data", tiles, *TINY, "--steps", 10]
    run(tmp_path / "cache", *flags, "--out", tmp_path / "straight")
    run(tmp_path / "cache", *flags, "--out", tmp_path / "halves", "--stop-at", 5)
    run(tmp_path / "cache", "--resume", tmp_path / "halves", "--workers", 2)
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "halves"))


def test_one_cache_serves_students_of_any_of_its_teachers(tmp_path, run, tiles, monkeypatch):
    flags = ["--data", tiles, *TINY, "--steps", 2]
    run(tmp_path / "cache", "--fill-only", *flags, "--teachers", "toy_tissue")
    before = (tmp_path / "cache" / "toy_tissue.npy").read_bytes()
    loaded = []
    load = cache.load_teacher
    monkeypatch.setattr(cache, "load_teacher", lambda t, *rest: loaded.append(t) or load(t, *rest))
    run(tmp_path / "cache", *flags, "--out", tmp_path / "both", "--seed", 3)
    assert loaded == ["toy_cells"]  # only what was missing
    run(tmp_path / "cache", *flags, "--out", tmp_path / "one", "--teachers", "toy_cells")
    assert loaded == ["toy_cells"]
    assert (tmp_path / "cache" / "toy_tissue.npy").read_bytes() == before
    terms = log(tmp_path / "one")[0]["terms"]
    assert {term.split("/")[0] for term in terms} == {"toy_cells"}


def test_a_fill_that_was_stopped_goes_on(tmp_path, run, tiles, monkeypatch):
    flags = ["--fill-only", "--data", tiles, *TINY, "--teachers", "toy_cells"]
    monkeypatch.setattr(cache, "BATCH", 4)
    run(tmp_path / "whole", *flags)

    def stops_after_two(*arguments, **options):
        for number, batch in enumerate(batches(*arguments, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(cache, "batches", stops_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cache", *flags)
    record = json.loads((tmp_path / "cache" / "made_from.json").read_text())
    assert record["teachers"]["toy_cells"]["rows"] == 8
    asked = []

    def counted(source, ks, *rest, **options):
        asked.extend(ks)
        return batches(source, ks, *rest, **options)

    monkeypatch.setattr(cache, "batches", counted)
    run(tmp_path / "cache", *flags)
    assert asked == [8, 9, 10, 11]
    whole = np.load(tmp_path / "whole" / "toy_cells.npy")
    assert np.array_equal(np.load(tmp_path / "cache" / "toy_cells.npy"), whole)


def test_changes_are_refused_with_the_difference(tmp_path, run, tiles, weights_dir):
    flags = ["--fill-only", "--data", tiles, *TINY, "--teachers", "toy_cells"]
    folder = tmp_path / "cache"
    run(folder, *flags)
    run(folder, *flags)  # unchanged: taken as it is
    first = sorted(tiles.iterdir())[0]
    content = first.read_bytes()

    Image.fromarray(np.zeros((80, 96, 3), np.uint8)).save(first)
    with pytest.raises(InputError, match="the cache was made with tiles of contents"):
        run(folder, *flags)
    first.write_bytes(content)
    run(folder, *flags)  # the same content at another time

    write_tiles(tiles / "more", 1)
    with pytest.raises(InputError, match="the cache was made with tiles 12 tiles.* now 13 tiles"):
        run(folder, *flags)
    shutil.rmtree(tiles / "more")

    with pytest.raises(InputError, match="the cache was made with crop 64, now 224"):
        run(folder, *flags, "--student", "vit_s")

    weights = weights_dir / "toy_cells-v1.2-2-0.pt"
    content = weights.read_bytes()
    state = torch.load(weights, weights_only=True)
    state["norm.bias"] += 1
    torch.save(state, weights)
    try:
        with pytest.raises(InputError, match="the cache was made with weights of toy_cells"):
            run(folder, *flags)
    finally:
        weights.write_bytes(content)

    tiles.rename(tmp_path / "moved")
    run(folder, "--fill-only", "--data", tmp_path / "moved", *flags[3:])
    with open(folder / "toy_cells.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="toy_cells.npy is damaged"):
        run(folder, "--fill-only", "--data", tmp_path / "moved", *flags[3:])


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path, run, tiles):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "toy_cells.npy").write_bytes(b"mine")
    flags = ["--fill-only", "--data", tiles, *TINY, "--teachers", "toy_cells"]
    with pytest.raises(InputError, match="toy_cells.npy exists, and made_from.json does not know"):
        run(folder, *flags)
    assert (folder / "toy_cells.npy").read_bytes() == b"mine"
    (folder / "made_from.json").write_text("[1]")
    with pytest.raises(InputError, match="made_from.json is damaged"):
        run(folder, *flags)


def test_too_little_space_is_said_before_anything_is_written(tmp_path, run, tiles, monkeypatch):
    usage = shutil._ntuple_diskusage(1000, 700, 300)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="cache lacks .* GB; take fewer tiles"):
        run(tmp_path / "cache", "--data", tiles, *TINY, "--out", tmp_path / "run")
    assert not (tmp_path / "cache" / "toy_cells.npy").exists()


def test_the_wrong_program_is_told_the_right_one(tmp_path, run, tiles, weights_dir):
    flags = ["--data", tiles, *TINY, "--steps", 4, "--out", tmp_path / "run", "--stop-at", 2]
    run(tmp_path / "cache", *flags)
    resume = ["--resume", str(tmp_path / "run"), "--weights-dir", str(weights_dir)]
    with pytest.raises(InputError, match="was begun by python -m extras.cache CACHE; go on with"):
        train.main(train.parse_args(resume))
    with pytest.raises(InputError, match="python -m extras.cache FOLDER"):
        train.parse_args(["--cache", "cache"])
    with pytest.raises(InputError, match="--data: give the folders of tiles"):
        run(tmp_path / "cache", *TINY)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_two_processes_only_read_it(tmp_path, run, tiles, weights_dir, monkeypatch):
    from forks import Child, pair_environment

    flags = ["--data", tiles, *TINY, "--steps", 4, "--lr", "1e-3", "--weights-dir", weights_dir]
    run(tmp_path / "cache", *flags, "--out", tmp_path / "one")
    words = [tmp_path / "cache", *flags, "--out", tmp_path / "two", "--accumulate", "2"]
    own = pair_environment()
    children = []
    for rank in "01":
        environment = {**own, "RANK": rank, "LOCAL_RANK": rank}
        children.append(Child(*words, program=program, script="cache.py", **environment))
    for child in children:
        assert child.succeeds()
    one = checkpoint(tmp_path / "one")
    two = checkpoint(tmp_path / "two")
    forget_key_biases(one["student"])
    forget_key_biases(two["student"])
    for part in ("student", "adaptors"):
        for key in one[part]:
            torch.testing.assert_close(one[part][key], two[part][key], rtol=1e-3, atol=1e-4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="is not filled: run once without torchrun"):
        run(tmp_path / "empty", *flags, "--out", tmp_path / "three")


def program():
    run_program(cache.main)
