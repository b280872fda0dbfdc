"""Train one small student on several frozen teachers, at every nested dim at once.

    python train.py                                         the offline demo: a CPU, minutes
    python train.py --teachers uni,virchow --data tiles/    published teachers, your own tiles
    torchrun --nproc-per-node 8 train.py ...                the same script on many GPUs or nodes
    python train.py --resume runs/demo                      go on where a run stopped

A run's folder holds student.pt (the student alone, which loads into timm), last.pt (all that a
resume needs) and log.jsonl. First comes the loop, `train`, with what a fork changes first; then
`main`, which sets the scene for it. The rest is what `main` calls: tiles and teachers, several
processes, the first lines, checkpoints, the log, the flags.

Optimiser, schedule and sizes are our choice, not checked against the paper's method section; no
vit_b or vit_s has been trained to its end here.
"""

import argparse
import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import evaluate
from data import (
    FolderTiles,
    Source,
    TissueTiles,
    batches,
    dim_list,
    epoch_order,
    make_parser,
    name_list,
    natural,
    path,
    positive,
    progress,
    run_program,
    save_atomically,
)
from losses import Standardizers, nested_loss
from student import STUDENTS, Adaptors, InputError, Student, Tokens, VisionTransformer, millions
from teachers import (
    OFFLINE,
    OFFLINE_STEPS,
    TEACHERS,
    Teacher,
    check_names,
    choose_device,
    find_weights,
    load_init,
    load_strictly,
    load_teacher,
    read_weights,
)

CLIP = 1.0  # largest norm of the gradient
WARMUP = 0.1  # share of the steps
DEMO_TILES = 4096  # drawn once; the demo goes over them several times
MANY_EPOCHS = 300  # above it a run says so; a rule of thumb
STATS_TILES = 1024  # that the targets' statistics are measured on

VIT = {"steps": 100_000, "batch_size": 64, "lr": 2e-4, "save_every": 1000}
TOY = {"steps": 1200, "batch_size": 32, "lr": 3e-3, "save_every": 250}
DEFAULTS = {
    "toy": TOY | {"dims": [2, 4, 8, 16, 48]},
    "vit_s": VIT | {"dims": [24, 48, 96, 192, 384]},
    "vit_b": VIT | {"dims": [48, 96, 192, 384, 768]},
}
# What last.pt holds, beside numbers and texts
PARTS = ["student", "adaptors", "standardizers", "optimizer", "scaler"]
# Flags of the machine, which --resume takes anew
MAY_CHANGE = ["data", "device", "workers", "weights_dir", "save_every", "log_every", "stop_at"]

# ---- the loop ----


def train(
    args: argparse.Namespace,
    steps: range,
    tiles: Iterator[dict],
    teachers: dict[str, Teacher],
    standardizers: Standardizers,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
    device: torch.device,
    grid: int,
    save: Callable[[int], None],
) -> None:
    """The steps of the method, in order.

    steps: those to do, counted from 0
    tiles: one batch a pass: {"image", and "outputs" where the teachers have run before}
    teachers: {name: frozen teacher}, {} where the tiles bring their outputs
    standardizers: raw outputs of the teachers -> targets
    model: images -> predictions {m: {teacher: tokens}}; student and adaptors in a row
    scaler, autocast: idle in fp32; the scaler works in fp16 alone
    grid: patches a side of the student
    save: writes a checkpoint, given the number of completed steps
    """
    compute_loss = torch.compile(nested_loss, disable=not args.compile)
    clock = Clock(steps.start)
    for step in steps:
        lr = learning_rate(step, args.steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        optimizer.zero_grad()  # here, for the gradients of all passes of a step add up
        step_loss = torch.zeros((), device=device)
        for micro_step in range(args.accumulate):
            batch = next(tiles)
            images = to_device(batch["image"], device)  # (B, 3, H, W)
            outputs = teacher_outputs(batch, images, teachers, grid)
            targets = standardizers(outputs)

            # DDP reads this in its forward, to average gradients once a step; else it does nothing
            model.require_backward_grad_sync = micro_step == args.accumulate - 1
            with autocast:
                predictions = model(images)
            loss, terms = compute_loss(predictions, targets)  # outside autocast, in float32
            loss = loss / args.accumulate
            scaler.scale(loss).backward()
            step_loss += loss.detach()

        scaler.unscale_(optimizer)  # so that the norm is the gradient's own
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()

        done = step + 1
        log_now = done % args.log_every == 0 or done == steps.stop
        save_now = done % args.save_every == 0 or done == steps.stop
        if log_now or save_now:  # at other steps the host need not wait for the device
            numbers = {"loss": mean_over_processes(step_loss).item(), "lr": lr}
            numbers["grad_norm"] = grad_norm.item()
            stop_if_not_finite(done, numbers, scaler, args.out)
        if log_now and is_process_0():
            log(args, done, steps.stop, numbers, terms, clock)  # terms: those of the last pass
        if save_now and is_process_0():
            save(done)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Images (B, 3, H, W). The loader's lie in memory as (B, H, W, 3): the device turns them."""
    return images.to(device, non_blocking=True).contiguous()


def teacher_outputs(
    batch: dict, images: Tensor, teachers: dict[str, Teacher], grid: int
) -> dict[str, Tokens]:
    """{teacher: tokens} of a batch. The teachers run now, or have run before and it brings them."""
    if "outputs" not in batch:
        return run_teachers(teachers, images, grid)
    outputs = {}
    for t, tokens in batch["outputs"].items():
        outputs[t] = {kind: y.to(images.device, non_blocking=True) for kind, y in tokens.items()}
    return outputs


@torch.no_grad()
def run_teachers(teachers: dict[str, Teacher], images: Tensor, grid: int) -> dict[str, Tokens]:
    """The frozen teachers' tokens of the same crops, their patches on the student's grid."""
    return {t: teacher(images, grid) for t, teacher in teachers.items()}


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW. Biases, norms, LayerScale, tokens and positions do not decay."""
    decay = []
    no_decay = []
    for name, p in model.named_parameters():
        if p.ndim < 2 or name.endswith(("cls_token", "reg_token", "pos_embed")):
            no_decay.append(p)
        else:
            decay.append(p)
    groups = [
        {"params": decay, "weight_decay": 0.05},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    # fused: all parameters in one kernel, and no wait for the device in fp16; not on Apple's GPU
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=decay[0].device.type != "mps")


def warmup_steps(steps: int) -> int:
    return max(1, round(WARMUP * steps))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of step 0, 1, ..., steps - 1: up a straight line to the peak, down a cosine towards 0."""
    warmup = warmup_steps(steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


# ---- the scene ----


def main(args: argparse.Namespace, source: Source | None = None) -> None:
    """Set the scene, train, and say what to do next.

    source: the tiles, where args.data does not tell them; a program of extras/ gives its own.
    """
    device, dtype = choose_device(args.device, args.precision)
    rank, world = join_processes(device)
    checkpoint = load_checkpoint(args.out) if args.resume else None
    start = checkpoint["step"] if checkpoint else 0
    stop = min(args.stop_at or args.steps, args.steps)
    if start >= stop:
        say(f"{args.out} has done {start} of {args.steps} steps: nothing to do up to step {stop}")
        return
    micro_batch = divide_batch(args, world)
    check_folder(args, checkpoint, source)
    with process_0_first(world):  # it fetches, or makes below, the weights that the others find
        if source is None or not source.has_outputs:
            find_weights(args.teachers, args.weights_dir)  # before anything that takes seconds

    student, adaptors, standardizers = make_models(args, device)
    introduce_student(args, source, student, adaptors, device, dtype)
    with process_0_first(world):
        licences = load_first_weights(args, student, checkpoint)
        if source is None:
            source = make_source(args, student, device, dtype)
        teachers = {} if source.has_outputs else load_teachers(args, device, dtype)
    model = nn.Sequential(student, adaptors)
    optimizer = make_optimizer(model, args.lr)
    introduce_run(args, source, student, optimizer, world)

    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"student": student, "adaptors": adaptors, "standardizers": standardizers}
    parts |= {"optimizer": optimizer, "scaler": scaler}
    if checkpoint:
        restore(args, parts, checkpoint, source)

    workers = choose_workers(args, source, device)
    pin = device.type == "cuda"
    loader = partial(batches, source, workers=workers, pin=pin)
    if checkpoint is None:
        measure_targets(args, standardizers, loader, teachers, device, student.grid)
    # Step s takes samples s * batch_size to (s + 1) * batch_size - 1, and process r of them every
    # world-th, from the r-th on. So a resume needs to know `start`, and nothing else of the tiles.
    samples = range(start * args.batch_size + rank, stop * args.batch_size, world)
    train(
        args,
        steps=range(start, stop),
        tiles=loader(samples, micro_batch),
        teachers=teachers,
        standardizers=standardizers,
        model=wrap(model, teachers, args.compile, world),
        optimizer=optimizer,
        scaler=scaler,
        autocast=torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        device=device,
        grid=student.grid,
        save=partial(save_checkpoint, args, parts, source, licences),
    )
    finish(args, stop, source, student, device)


def make_models(
    args: argparse.Namespace, device: torch.device
) -> tuple[Student, Adaptors, Standardizers]:
    """What learns, and what makes its targets."""
    torch.manual_seed(args.seed)
    teacher_dims = {t: TEACHERS[t].arch["width"] for t in args.teachers}
    student = Student(args.student)
    adaptors = Adaptors(student.width, teacher_dims, args.dims)
    standardizers = Standardizers(teacher_dims, args.standardize)
    return student.to(device), adaptors.to(device), standardizers.to(device)


def divide_batch(args: argparse.Namespace, world: int) -> int:
    """Tiles in one pass of one process. InputError: --batch-size cannot be divided so."""
    passes = world * args.accumulate
    if args.batch_size % passes:
        raise InputError(f"--batch-size: make it a multiple of {passes} (processes x --accumulate)")
    return args.batch_size // passes


def measure_targets(
    args: argparse.Namespace,
    standardizers: Standardizers,
    loader: Callable,
    teachers: dict[str, Teacher],
    device: torch.device,
    grid: int,
) -> None:
    """Process 0 measures the teachers' statistics, once, on the run's first samples."""
    n = args.stats_tiles or STATS_TILES
    if args.stats_tiles is None and device.type == "cpu" and not all_offline(teachers):
        n = 64  # published teachers that run now take seconds a tile there
    if is_process_0():
        # Batches that do not depend on processes and passes, which would round outputs differently
        tiles = loader(range(n), min(n, args.batch_size, 64), label="target statistics")
        standardizers.measure(raw_outputs(tiles, teachers, device, grid))
    if dist.is_initialized():
        for buffer in standardizers.buffers():
            dist.broadcast(buffer, 0)


def raw_outputs(
    tiles: Iterator[dict], teachers: dict[str, Teacher], device: torch.device, grid: int
) -> Iterator[dict[str, Tokens]]:
    for batch in tiles:
        images = to_device(batch["image"], device)
        yield teacher_outputs(batch, images, teachers, grid)


def wrap(model: nn.Module, teachers: dict[str, Teacher], compiled: bool, world: int) -> nn.Module:
    """Compile model and teachers, if wanted; let DDP average gradients over several processes."""
    if compiled:
        model.compile()  # in place, so that parameters keep their names
        for teacher in teachers.values():
            for block in teacher.vit.blocks:  # all alike, so that one is compiled
                block.compile(dynamic=False)
    if world > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def finish(
    args: argparse.Namespace, stop: int, source: Source, student: Student, device: torch.device
) -> None:
    """Say how to go on; the demo ends with what its teachers and its student know."""
    if not is_process_0():
        return
    if stop < args.steps:
        print(f"stopped after step {stop} of {args.steps}")
        print(f"go on with: {source.program} --resume {args.out}")
        return
    if isinstance(source, DemoTiles):
        models = {}
        # Once more: in training the demo had the teachers' outputs alone
        for t, teacher in load_teachers(args, device, torch.float32).items():
            models[f"teacher {t}"] = (teacher, [teacher.embed_dim])
        models["student"] = (student, args.dims)
        result = evaluate.run_tasks(models, None, args.seed, ["knn"])
        evaluate.print_result(result)
        evaluate.save_result(result, evaluate.DRAWN, args.out)
    print(f"\nSaved {args.out}/student.pt. Next:\n  python evaluate.py {args.out} [--data DIR]")


# ---- tiles and teachers ----


def all_offline(teachers: Iterable[str]) -> bool:
    """Whether none of these teachers is a published one."""
    return set(teachers) <= set(OFFLINE)


def make_source(
    args: argparse.Namespace, student: Student, device: torch.device, dtype: torch.dtype
) -> Source:
    """Where tiles come from: folders, or drawn tissue. Other sources: extras/."""
    if args.data:
        return FolderTiles(args.data, student.img_size, args.seed)
    if args.student == "toy" and all_offline(args.teachers):
        return draw_demo(args, student, load_teachers(args, device, dtype), device)
    length = args.steps * args.batch_size
    return TissueTiles("distil", args.seed, student.img_size, length)


def load_teachers(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Teacher]:
    """{name: frozen teacher}."""
    teachers = {}
    for t in args.teachers:
        teachers[t] = load_teacher(
            t, args.weights_dir, device, dtype, steps=args.teacher_steps, seed=args.teacher_seed
        )
    return teachers


def load_first_weights(
    args: argparse.Namespace, student: Student, checkpoint: dict | None
) -> dict[str, str]:
    """Load those of --init, if the run is new -> {name: licence} of all that it is made from."""
    if checkpoint:
        return checkpoint["record"]["licences"]
    licences = {}
    if args.init:
        licences = load_init(student.backbone, args.init, args.weights_dir)
        for name, licence in licences.items():
            say(f"begun from {name}; licence {licence}")
    for t in args.teachers:
        licences[t] = TEACHERS[t].licence
    return licences


class DemoTiles(Source):
    """A source: drawn tissue whose teachers have run already, tiles and outputs in memory."""

    has_outputs = True

    def __init__(self, images: Tensor, outputs: dict[str, Tokens], seed: int):
        self.images = images  # uint8 (n, 3, S, S)
        self.outputs = outputs  # fp16, (n, D_t) and (n, N, D_t)
        self.seed = seed
        self.description = f"{len(images):,} tiles of drawn tissue"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> dict:
        n = len(self.images)
        i = int(epoch_order(self.seed, k // n, n)[k % n])
        outputs = {}
        for t, tokens in self.outputs.items():
            outputs[t] = {kind: y[i] for kind, y in tokens.items()}
        return {"image": self.images[i], "outputs": outputs}


def draw_demo(
    args: argparse.Namespace, student: Student, teachers: dict[str, Teacher], device: torch.device
) -> DemoTiles:
    """Draw the demo's tiles, and run the teachers on them, once."""
    n = min(DEMO_TILES, args.steps * args.batch_size)
    drawn = TissueTiles("distil", args.seed, student.img_size).draw(n)
    images = drawn["image"].contiguous()
    outputs = {}
    for t, teacher in teachers.items():
        summary = torch.empty(n, teacher.dim, dtype=torch.float16)
        patches = torch.empty(n, student.grid**2, teacher.dim, dtype=torch.float16)
        outputs[t] = {"summary": summary, "patches": patches}
    starts = range(0, n, 64)
    for start in progress(starts, "teachers' outputs, computed once", len(starts)):
        rows = slice(start, start + 64)
        seen = run_teachers(teachers, images[rows].to(device), student.grid)
        for t, tokens in seen.items():
            for kind, y in tokens.items():
                outputs[t][kind][rows] = y
    return DemoTiles(images, outputs, args.seed)


def choose_workers(args: argparse.Namespace, source: Source, device: torch.device) -> int:
    """How many processes read tiles; on a CPU none, for the models need its cores."""
    if args.workers is not None:
        return args.workers
    if device.type == "cuda" and not isinstance(source, DemoTiles):
        return 8
    return 0


# ---- several processes ----


def join_processes(device: torch.device) -> tuple[int, int]:
    """Meet the other processes of a run, if torchrun has started any -> (rank, their number)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        return 0, 1
    # gloo between CPUs, NCCL between GPUs; half an hour, as process 0 may have to fetch weights
    dist.init_process_group(timeout=timedelta(minutes=30))
    return dist.get_rank(), world


def is_process_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print, in process 0 alone."""
    if is_process_0():
        print(text, flush=True)


@contextlib.contextmanager
def process_0_first(world: int) -> Iterator[None]:
    """The others wait until process 0 has gone through the block."""
    if world > 1 and not is_process_0():
        dist.barrier()
    yield
    if world > 1 and is_process_0():
        dist.barrier()


def mean_over_processes(value: Tensor) -> Tensor:
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


# ---- the first lines ----


def introduce_student(
    args: argparse.Namespace,
    source: Source | None,
    student: Student,
    adaptors: Adaptors,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    if source is None and args.data is None and not all_offline(args.teachers):
        say(
            "no --data: drawn tissue only shows that weights, memory and speed are in order; "
            "for a student of use give --data"
        )
    size = f"{millions(student):.3f} M parameters"
    dims = f"nested dims {adaptors.nested_dims}"
    say(f"student {args.student}: {size}, {dims}, on {device} in {dtype}")


def introduce_run(
    args: argparse.Namespace,
    source: Source,
    student: Student,
    optimizer: torch.optim.Optimizer,
    world: int,
) -> None:
    """What follows from the flags: teachers, licences, tiles, epochs, what is enlarged."""
    for t in args.teachers:
        arch = TEACHERS[t].arch
        with torch.device("meta"):
            vit = VisionTransformer(**arch)
        size = f"{millions(vit):.3f} M parameters, width {vit.width}, grid {vit.grid}"
        say(f"teacher {t}: {size}; licence {TEACHERS[t].licence}")
        if TEACHERS[t].note:
            say(f"  {TEACHERS[t].note}")
        times = vit.img_size / student.img_size
        if times > 1.5:
            say(f"  crops of {student.img_size} px are enlarged {times:.1f} times for it")
    epochs = args.steps * args.batch_size / len(source)
    text = f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.1f}"
    say(f"{args.steps:,} steps of {args.batch_size} are {text} epochs of {source.description}")
    if epochs > MANY_EPOCHS:
        fewer = MANY_EPOCHS * len(source) // args.batch_size
        say(f"  few tiles, many times over: --steps {max(1, fewer)} is {MANY_EPOCHS} epochs")
    warmup = warmup_steps(args.steps)
    say(
        f"{type(optimizer).__name__}, rate up to {args.lr:g} over {warmup:,} steps, "
        f"then down a cosine; standardised by: {args.standardize}"
    )
    say(f"on {world} process(es), into {args.out}")


# ---- the run's folder: checkpoints ----


def check_folder(args: argparse.Namespace, checkpoint: dict | None, source: Source | None) -> None:
    """A new run's folder is made; an old run goes on with the program that began it. InputError."""
    if checkpoint is None:
        if is_process_0():
            claim_folder(args.out)
        return
    begun_by = checkpoint["record"]["program"]
    program = "python train.py" if source is None else source.program
    if begun_by != program:
        raise InputError(
            f"--resume: {args.out} was begun by {begun_by}; "
            f"go on with: {begun_by} --resume {args.out}"
        )


def claim_folder(out: str) -> None:
    """Make a run's folder. InputError: it holds a run that has saved; one that has not may go."""
    folder = Path(out)
    number = 2
    while Path(f"{out}-{number}").exists():
        number += 1
    another = f"begin another with --out {out}-{number}"
    if (folder / "last.pt").exists():
        raise InputError(f"--out: {out} holds a run; go on with --resume {out}, or {another}")
    if (folder / "student.pt").exists():
        raise InputError(f"--out: {out} holds a student; {another}")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "log.jsonl").exists():
        print(f"{out} holds the log of a run that has saved nothing: it begins anew")
        (folder / "log.jsonl").unlink()


def save_checkpoint(
    args: argparse.Namespace, parts: dict, source: Source, licences: dict[str, str], step: int
) -> None:
    """Write student.pt, for use, and then last.pt, for --resume, after `step` completed steps.

    parts: {name: module, optimiser or scaler}
    Of all else that a step needs nothing has to be kept: tiles, views and rate are functions of the
    step. Whoever draws random numbers in the loop must seed them by it, or a resume is not exact.
    """
    student = parts["student"]
    config = {
        "student": args.student,
        "arch": STUDENTS[args.student],
        "nested_dims": parts["adaptors"].nested_dims,
        "step": step,
        "steps": args.steps,
        "teachers": args.teachers,
        "teacher_recipe": {"steps": args.teacher_steps, "seed": args.teacher_seed},
        "licences": licences,
        "tiles": source.description,
    }
    content = {"state_dict": student.backbone.state_dict(), "config": config}
    save_atomically(content, Path(args.out, "student.pt"))

    state = {name: part.state_dict() for name, part in parts.items()}
    state["step"] = step
    state["record"] = {
        "description": source.description,
        "fingerprint": source.fingerprint,
        "program": source.program,
        "licences": licences,
        "optimizer": type(parts["optimizer"]).__name__,
    }
    state["args"] = {key: value for key, value in vars(args).items() if key != "stop_at"}
    save_atomically(state, Path(args.out, "last.pt"))


def load_checkpoint(folder: str) -> dict:
    """What save_checkpoint wrote to last.pt. InputError: there is none, or it is something else."""
    file = Path(folder, "last.pt")
    if not file.exists():
        raise InputError(
            f"--resume: {file} does not exist; give a run's folder that has saved, "
            "or type its first command again"
        )
    checkpoint = read_weights(file)
    for key in ["step", "args", "record", *PARTS]:
        if key not in checkpoint:
            raise InputError(f"--resume: {file} is no checkpoint of this train.py: it lacks {key}")
    return checkpoint


def restore(args: argparse.Namespace, parts: dict, checkpoint: dict, source: Source) -> None:
    """Put every part of a run back to where the checkpoint was written.

    InputError: other tiles or another optimiser than it began with, or a part that does not fit.
    """
    began = checkpoint["record"]
    if began["fingerprint"] != source.fingerprint:
        raise InputError(
            f"--data: {args.out} began with {began['description']}; "
            f"{source.description} are others; give the same ones"
        )
    optimizer = type(parts["optimizer"]).__name__
    if began.get("optimizer", optimizer) != optimizer:  # torch might take its state all the same
        raise InputError(
            f"--resume: {args.out} was trained by {began['optimizer']}, "
            f"make_optimizer makes {optimizer}; begin another run"
        )
    for name, part in parts.items():
        where = f"{args.out}/last.pt, its {name},"
        if isinstance(part, nn.Module):
            load_strictly(part, checkpoint[name], where)
            continue
        if name == "scaler" and not checkpoint[name]:
            continue  # the run began without fp16, and goes on with it on another machine
        try:
            part.load_state_dict(checkpoint[name])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{where} is of another run ({error}); begin another") from None
    say(f"goes on after step {checkpoint['step']}")


# ---- the run's folder: the log ----


class Clock:
    """How fast the steps are done."""

    def __init__(self, done: int):
        self.done = done
        self.time = time.monotonic()

    def steps_per_second(self, done: int) -> float:
        """Since it was last asked."""
        now = time.monotonic()
        rate = (done - self.done) / (now - self.time)
        self.done = done
        self.time = now
        return rate


def log(
    args: argparse.Namespace,
    done: int,
    stop: int,
    numbers: dict[str, float],
    terms: dict[str, Tensor],
    clock: Clock,
) -> None:
    """A line of log.jsonl with all numbers and terms, and a shorter one on the screen.

    numbers: of the step. terms: of the loss, of the step's last pass in this process.
    """
    rate = clock.steps_per_second(done)
    line = {"step": done}
    for name, value in numbers.items():
        line[name] = finite_or_none(value)
    line["tiles_per_s"] = args.batch_size * rate
    line["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    values = torch.stack(list(terms.values())).tolist()  # one transfer, not one a term
    line["terms"] = {}
    for name, value in zip(terms, values, strict=True):
        line["terms"][name] = finite_or_none(value)
    append_line(Path(args.out, "log.jsonl"), json.dumps(line))
    text = f"step {done}/{args.steps}  loss {numbers['loss']:.3f}  {cosines(line['terms'])}"
    text += f"  lr {numbers['lr']:.1e}  {line['tiles_per_s']:.3g} tiles/s"
    if line["peak_gb"] > 0:
        text += f"  {line['peak_gb']:.1f} GB"
    print(f"{text}  ETA {(stop - done) / rate:.0f} s", flush=True)


def finite_or_none(value: float) -> float | None:
    """JSON has no inf and no nan; in fp16 a step that is skipped has them."""
    return value if math.isfinite(value) else None


def append_line(file: Path, line: str) -> None:
    """Append a line. If a kill or a full disk left half a line before, that one is ended first.

    InputError: it cannot be written.
    """
    try:
        with open(file, "a+b") as lines:
            size = lines.seek(0, os.SEEK_END)
            lines.seek(max(0, size - 1))
            if lines.read(1) not in (b"", b"\n"):
                lines.write(b"\n")
            lines.write(line.encode() + b"\n")
    except OSError as error:
        raise InputError(f"cannot write {file}: {error}; free some space, then --resume") from None


def cosines(terms: dict[str, float]) -> str:
    """For the screen: the terms "TEACHER/NAME_cos@M" at the largest / at the smallest M."""
    found = {}  # {"TEACHER/NAME": {M: value}}
    for term, value in terms.items():
        match = re.fullmatch(r"(.+)_cos@(\d+)", term)
        if match and value is not None:
            found.setdefault(match[1], {})[int(match[2])] = value
    texts = []
    for name, values in found.items():
        texts.append(f"{name} {values[max(values)]:.2f}/{values[min(values)]:.2f}")
    return "  ".join(texts)


def stop_if_not_finite(step: int, numbers: dict[str, float], scaler, out: str) -> None:
    """InputError: the run is lost. What is saved is from before.

    In fp16 the scaler skips a step whose gradient is not finite, and halves its scale; only when
    that has gone on for long is the run lost.
    """
    why = ""
    if scaler.is_enabled():
        if scaler.get_scale() < 1:
            why = "the gradient is not finite in fp16, at any scale"
    elif not math.isfinite(numbers["loss"]):
        why = "the loss is not finite"
    elif not math.isfinite(numbers["grad_norm"]):
        why = "the gradient is not finite"
    if why:
        raise InputError(
            f"step {step}: {why}; what {out} holds is from before: begin another run, "
            "with a lower --lr or --precision fp32"
        )


# ---- the flags ----


def make_flags() -> argparse.ArgumentParser:
    """The command line. Defaults that depend on the student are set by parse_args."""
    parser = make_parser("train.py", __doc__)
    group = parser.add_argument_group

    add = group("what to learn from").add_argument
    text = "by commas (default: the offline two); python teachers.py lists them"
    add("--teachers", type=name_list, default=OFFLINE, help=text)
    text = "folders of tiles, of 224 px or more for vit_* (default: drawn tissue)"
    add("--data", type=path, nargs="+", help=text)
    text = "where teachers' files are, or go (default: %(default)s)"
    add("--weights-dir", type=path, default="weights", help=text)
    text = "the targets; channel if a teacher has huge ones, as openpath (default: %(default)s)"
    add("--standardize", choices=["phi-s", "channel", "none"], default="phi-s", help=text)
    text = "that measure the targets; more for few, uneven tiles (default: 1024; slow CPU: 64)"
    add("--stats-tiles", type=positive, help=text)
    text = "the offline teachers' own; fewer for a first try (default: %(default)s)"
    add("--teacher-steps", type=positive, default=OFFLINE_STEPS, help=text)
    text = "the offline teachers'; change it to see what is chance (default: %(default)s)"
    add("--teacher-seed", type=natural, default=0, help=text)

    add = group("what to train").add_argument
    text = "vit_s where speed counts (default: toy for offline teachers, else vit_b)"
    add("--student", choices=STUDENTS, help=text)
    text = "prefixes that you will use; fewer save memory; the width is always one\n"
    add("--dims", type=dim_list, help=text + by_student("dims"))
    text = "begin from a teacher (vit_b: dinov2_b), a run or a file; for few tiles or little time"
    add("--init", type=path, help=text)
    text = "of the student and of the order and view of tiles (default: %(default)s)"
    add("--seed", type=natural, default=0, help=text)

    add = group("how long").add_argument
    text = "of the optimiser; they fix the schedule; fewer for few tiles: see the epochs printed\n"
    add("--steps", type=positive, help=text + by_student("steps"))
    text = f"tiles a step, over all GPUs; more on many {by_student('batch_size')}"
    add("--batch-size", type=positive, help=text)
    text = "passes a step, with the same result; 2 or 4 when memory is short (default: %(default)s)"
    add("--accumulate", type=positive, default=1, help=text)
    text = f"the highest rate; lower it when the loss jumps {by_student('lr')}"
    add("--lr", type=float, help=text)

    add = group("the machine").add_argument
    add("--device", type=path, help="cuda, cuda:1, mps or cpu (default: the best at hand)")
    text = "fp32 when a loss is not finite (auto: bf16 or fp16 on a GPU, fp32 on a CPU)"
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help=text)
    add("--compile", action="store_true", help="torch.compile all models; for GPU runs of hours")
    text = "that read tiles; more when the GPU waits (default: 8 a GPU; 0 on a CPU)"
    add("--workers", type=natural, help=text)

    add = group("saving, stopping, going on").add_argument
    text = "the run's folder, one a run (default: runs/demo, or runs/TEACHERS-STUDENT)"
    add("--out", type=path, help=text)
    add("--resume", type=path, metavar="DIR", help="go on with this run; its flags are restored")
    add("--stop-at", type=positive, help="a step to save and stop after, to go on with --resume")
    text = f"steps; fewer where jobs are killed {by_student('save_every')}"
    add("--save-every", type=positive, help=text)
    add("--log-every", type=positive, help="steps (default: a tenth of them, at most 50)")
    add("--cache", help=argparse.SUPPRESS)  # what it was is a program of its own now
    return parser


def by_student(key: str) -> str:
    """For a flag's help: its default for every student."""
    return "(" + ", ".join(f"{name}: {DEFAULTS[name][key]}" for name in DEFAULTS) + ")"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with defaults, checked. InputError names the one that is wrong."""
    parser = make_flags()
    args = parser.parse_args(argv)
    if args.cache:
        raise InputError(
            "--cache: it is a program now: python -m extras.cache FOLDER, then these flags"
        )
    if args.resume:
        return restore_args(parser, argv, args.resume)
    check_names(args.teachers)
    offline = all_offline(args.teachers)
    student = args.student or ("toy" if offline else "vit_b")
    name = "demo" if offline else "-".join([*args.teachers, student])
    parser.set_defaults(student=student, out=f"runs/{name}", **DEFAULTS[student])
    args = parser.parse_args(argv)  # once more, with the defaults of this student
    args.dims = sorted({*args.dims, STUDENTS[student]["width"]})
    if args.log_every is None:
        args.log_every = max(1, min(50, args.steps // 10))
    if not 0 < args.lr < math.inf:
        raise InputError(f"--lr: {args.lr} is no positive number; try {DEFAULTS[student]['lr']}")
    return args


def restore_args(parser: argparse.ArgumentParser, argv, folder: str) -> argparse.Namespace:
    """The flags that a run was begun with; those in MAY_CHANGE may be typed anew."""
    begun_with = load_checkpoint(folder)["args"]  # `main` reads the rest of the checkpoint
    begun_with |= {"resume": folder, "out": folder}
    parser.set_defaults(**begun_with)
    args = parser.parse_args(argv)
    args.dims = sorted({*args.dims, STUDENTS[args.student]["width"]})
    for key, value in begun_with.items():
        if key not in MAY_CHANGE and getattr(args, key) != value:
            flag = "--" + key.replace("_", "-")
            raise InputError(f"{flag}: this run has {value}; drop the flag, or begin another run")
    return args


if __name__ == "__main__":
    run_program(lambda: main(parse_args()))
