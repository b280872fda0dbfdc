"""What bench_cpu.py and bench_gpu.py share: tiles to read, interleaved timing, and the step that train.py takes."""

import functools
import itertools
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import conftest  # noqa: F401 - puts the repo on the path
import numpy as np
import torch
from PIL import Image

import data
from losses import Standardizers
from student import Student
from train import BETAS, CLIP, Distiller


def draw_jpeg(folder: Path, size: int, k: int) -> None:
    path = folder / f"{k:05d}.jpg"
    if not path.exists():
        Image.fromarray(data.draw_tissue("distil", 0, k, size)[0]).save(path, quality=90)


def draw_folder(folder: Path, n: int, size: int) -> Path:
    """n JPEG tiles of synthetic tissue, size x size px, drawn on all cores; what is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(functools.partial(draw_jpeg, folder, size), range(n), chunksize=16))
    return folder


def sync() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(work: Callable, *args, times: int = 1) -> float:
    """Seconds of one call, the mean of `times` calls in a row."""
    sync()
    began = time.perf_counter()
    for _ in range(times):
        work(*args)
    sync()
    return (time.perf_counter() - began) / times


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each contender measures, once in every round; every second round goes the other way round."""
    seconds = {name: [] for name in contenders}
    for i in range(rounds):
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            seconds[name].append(contenders[name]())
    return seconds


def spread(values: list[float], form: str = ".3f") -> str:
    low, median, high = np.percentile(values, (25, 50, 75))
    return f"median {median:{form}}, quartiles {low:{form}} to {high:{form}}, of {len(values)}"


def ratios(seconds: dict[str, list[float]], above: str, below: str) -> list[float]:
    return [a / b for a, b in zip(seconds[above], seconds[below])]


def log_rates(run: Path, skip: int) -> list[float]:
    """tiles/s of a run's log lines, without the first `skip`, which hold starting and compiling."""
    return [
        json.loads(line)["tiles_per_s"] for line in (run / "log.jsonl").read_text().splitlines()
    ][skip:]


def training_step(
    teachers: dict, name: str, dims: list[int], device, dtype, compiled: bool = False
) -> Callable:
    """A step of train.py's loop, batch -> None: the same pieces in the same order; to be changed when they change.
    Statistics are not measured: a standardiser takes as long with any. compiled: as --compile does it, teachers too."""
    torch.manual_seed(0)
    teacher_dims = {t: teacher.dim for t, teacher in teachers.items()}
    student, standardizers = (
        Student(name, teacher_dims, dims).to(device),
        Standardizers(teacher_dims).to(device),
    )
    optimizer = torch.optim.AdamW(
        student.parameter_groups(), lr=1e-4, betas=BETAS, fused=device.type != "mps"
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    model = torch.compile(Distiller(student)) if compiled else Distiller(student)
    for block in [
        block for teacher in teachers.values() for block in teacher.vit.blocks if compiled
    ]:
        block.compile(dynamic=False)
    first_bad = torch.full((), math.inf, device=device)

    def step(batch: dict) -> None:
        nonlocal first_bad
        optimizer.zero_grad()
        images = batch["image"].to(device, non_blocking=True).contiguous()
        targets = standardizers(
            {t: teacher(images, student.backbone.grid) for t, teacher in teachers.items()}
        )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss, _ = model(images, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        finite = loss.detach().isfinite() & (norm.isfinite() | scaler.is_enabled())
        first_bad = first_bad.minimum(torch.where(finite, math.inf, 1))
        optimizer.found_inf = (first_bad <= 1).float()
        scaler.step(optimizer)
        scaler.update()

    return step


def folder_step(
    step: Callable, tiles: data.Dataset, batch_size: int, workers: int, times: int, pin=False
) -> float:
    """Seconds per step with its tiles read from the folder, in the steady state.
    Workers read 2 batches each ahead. So as many steps go by first, and as many batches are still to be read at the
    end; otherwise a block would be fed from what was read outside its time. No worker outlives the call."""
    ahead = 2 * workers + 1
    loader = data.batches(tiles, range((2 * ahead + times) * batch_size), batch_size, workers, pin)
    for batch in itertools.islice(loader, ahead):
        step(batch)
    seconds = timed(lambda: step(next(loader)), times=times)
    loader.close()
    return seconds
