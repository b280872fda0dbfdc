"""What the benchmarks share: tiles to read, timing in turns, timm's models, a step of train.py.

Contenders are timed in turn within one process, every second round in reverse order, and compared
by the ratios within a round: whatever else the machine does then meets all of them alike. No
program of its own.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import train
from data import batches, draw_tissue
from losses import Standardizers, nested_loss
from student import STUDENTS, Adaptors, InputError, Student
from teachers import Teacher

ROOT = Path(__file__).resolve().parents[2]
Seconds = dict[str, list[float]]  # {contender: what it took, round by round}


# ---- what is asked for, and what is needed -------------------------------------------------------


def choose_parts(given: list[str], known: list[str]) -> list[str]:
    """The parts that were typed, or all. InputError: there is no such part."""
    for part in given:
        if part not in known:
            raise InputError(f"PART: there is no {part}; choose from {', '.join(known)}")
    return given or known


def import_timm():
    """The module timm. InputError names the pip command."""
    try:
        import timm
    except ImportError:
        raise InputError("this compares with timm: pip install timm") from None
    return timm


def timm_twin(arch: dict) -> nn.Module:
    """timm's own VisionTransformer with the arguments of ours: the same names, other code."""
    timm = import_timm()
    mlp = {}
    if arch.get("swiglu", False):
        mlp = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}
    twin = timm.models.vision_transformer.VisionTransformer(
        img_size=arch["img_size"],
        patch_size=arch["patch_size"],
        embed_dim=arch["width"],
        depth=arch["depth"],
        num_heads=arch["heads"],
        mlp_ratio=arch["mlp_width"] / arch["width"],
        init_values=1e-5 if arch.get("layer_scale", True) else None,
        reg_tokens=arch.get("registers", 0),
        no_embed_class=not arch.get("pos_on_prefix", True),
        num_classes=0,
        global_pool="token",
        **mlp,
    )
    return twin.eval()


def random_student(name: str, file: Path) -> None:
    """Write a student.pt whose weights are all far from their start. name: one in STUDENTS."""
    student = Student(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.05 * noise if p.ndim > 1 else 0.5 + 0.3 * noise)
    config = {"student": name, "arch": STUDENTS[name], "nested_dims": [student.width]}
    config |= {"step": 1, "steps": 1, "teachers": []}
    torch.save({"state_dict": student.backbone.state_dict(), "config": config}, file)


def memory(kind: str, process: int | str = "self") -> float:
    """GB of a process: VmRSS all now, RssAnon without files, VmHWM at its peak. Linux alone."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024 / 1e9
    return 0.0  # of a process that has just ended


# ---- tiles ---------------------------------------------------------------------------------------


def draw_jpeg(folder: Path, size: int, k: int) -> None:
    """Tile k of drawn tissue as a file, unless it is there."""
    path = folder / f"{k:05d}.jpg"
    if not path.exists():
        image, *_ = draw_tissue("distil", 0, k, size)
        Image.fromarray(image).save(path, quality=90)


def draw_folder(folder: Path, n: int, size: int) -> Path:
    """n JPEG tiles of drawn tissue, size x size px, drawn on all cores -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(functools.partial(draw_jpeg, folder, size), range(n), chunksize=16)
        list(drawn)  # an error in a process shows here
    return folder


# ---- time ----------------------------------------------------------------------------------------


def sync() -> None:
    """Wait for the GPU, where one is in use."""
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


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> Seconds:
    """What each contender measures, once a round; every second round goes the other way round."""
    seconds = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(contenders[name]())
        order.reverse()
    return seconds


def ratios(seconds: Seconds, above: str, below: str) -> list[float]:
    """seconds[above] / seconds[below], a ratio a round."""
    found = []
    for a, b in zip(seconds[above], seconds[below], strict=True):
        found.append(a / b)
    return found


def spread(values: list[float], form: str = ".3f") -> str:
    """The median and the quartiles, as text."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return f"median {median:{form}}, quartiles {low:{form}} to {high:{form}}, of {len(values)}"


def log_rates(run: Path, skip: int) -> list[float]:
    """tiles/s of a run's log lines, but the first `skip`, which hold starting and compiling."""
    rates = []
    for line in (run / "log.jsonl").read_text().splitlines():
        rates.append(json.loads(line)["tiles_per_s"])
    return rates[skip:]


# ---- a step of training --------------------------------------------------------------------------


def training_step(
    teachers: dict[str, Teacher],
    arch: str,
    dims: list[int],
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
) -> Callable[[dict], None]:
    """A step of train.train, batch -> nothing: its lines, without accumulation and logging.

    Change it when they change. Statistics are not measured: standardising takes as long with any.
    """
    torch.manual_seed(0)
    teacher_dims = {t: teacher.dim for t, teacher in teachers.items()}
    student = Student(arch)
    grid = student.grid
    adaptors = Adaptors(student.width, teacher_dims, dims)
    standardizers = Standardizers(teacher_dims).to(device)
    model = train.wrap(nn.Sequential(student, adaptors).to(device), teachers, compiled, world=1)
    compute_loss = torch.compile(nested_loss, disable=not compiled)
    optimizer = train.make_optimizer(model, lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def step(batch: dict) -> None:
        optimizer.zero_grad()
        images = batch["image"].to(device, non_blocking=True).contiguous()
        targets = standardizers(train.run_teachers(teachers, images, grid))
        with autocast:
            predictions = model(images)
        loss, _ = compute_loss(predictions, targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), train.CLIP)
        scaler.step(optimizer)
        scaler.update()

    return step


def folder_step(
    step: Callable[[dict], None],
    tiles: Dataset,
    batch_size: int,
    workers: int,
    times: int,
    pin: bool = False,
) -> float:
    """Seconds a step with its tiles read from the folder, in the steady state.

    A worker reads 2 batches ahead. So as many steps go by first, and as many batches are still to
    be read at the end: otherwise a block would be fed from what was read outside its time.
    """
    ahead = 2 * workers + 1
    ks = range((2 * ahead + times) * batch_size)
    loader = batches(tiles, ks, batch_size, workers, pin)
    for batch in itertools.islice(loader, ahead):
        step(batch)
    sync()
    began = time.perf_counter()
    for batch in itertools.islice(loader, times):
        step(batch)
    sync()
    seconds = (time.perf_counter() - began) / times
    loader.close()  # ends its workers
    return seconds
