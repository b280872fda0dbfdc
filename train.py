"""Train one small student on several frozen teachers, at every nested dim at once: from tiles to checkpoint.

    python train.py                                       the offline demo: synthetic tissue, CPU, minutes
    python train.py --teachers uni,virchow --data tiles/  published teachers; says how to get missing weights
    python train.py --resume runs/demo                    go on where a run stopped
A run folder holds last.pt (all that a resume needs), student.pt (loads into timm), model_card.md, log.jsonl. Optimiser,
schedule, sizes are our choice, not checked against the paper's method section; no vit_b or vit_s has been trained."""

import argparse
import json
import math
import os
import time
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from signal import SIGINT, SIGTERM, signal

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout  # comes with torch
from torch import Tensor, nn

import data
import evaluate
import teachers as cli
from losses import Distiller, Standardizers
from student import (
    STUDENTS,
    InputError,
    Student,
    load_strictly,
    millions,
    read_weights,
    save_atomically,
)

VIT = {"steps": 100_000, "batch_size": 64, "lr": 2e-4, "save_every": 1000}
DEFAULTS = {
    "toy": {
        "dims": [2, 4, 8, 16, 48],
        "steps": 2000,
        "batch_size": 32,
        "lr": 5e-3,
        "save_every": 250,
    }
}
DEFAULTS |= {
    "vit_s": {"dims": [24, 48, 96, 192, 384], **VIT},
    "vit_b": {"dims": [48, 96, 192, 384, 768], **VIT},
}
BETAS, CLIP, WARMUP = (0.9, 0.95), 1.0, 0.04  # warmup: share of the steps
WHOLE = {
    "args",
    "step",
    "student",
    "standardizers",
    "optimizer",
    "scaler",
    "tiles",
}  # what a checkpoint holds
CARD = """# Student {student}: {size:.3f} M parameters, nested dims m of {nested_dims}, step {step} of {steps}
```python
import timm
model = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, checkpoint_path="student.pt", depth={depth},
    img_size={img_size}, patch_size={patch_size}, embed_dim={width}, num_heads={heads}, reg_tokens={registers}).eval()
z = model(images)[:, :m]  # of RGB images (B, 3, {img_size}, {img_size}) in [0, 1], less ImageNet's mean, over its std
```
- Data: {source!r}; batch {batch_size}, lr {lr}, standardize {standardize}, {dtype}, seed {seed}. Saves renew this card
- Made from the outputs of teachers (or begun from one), with licences that may bind it: {licences}
"""  # model_card.md: filled from a run's arguments and the config in its student.pt


def parse_args(
    argv: list[str] | None = None,
) -> argparse.Namespace:  # checked, with the defaults of its student
    add, offline = (
        (parser := cli.OneLineParser("train.py", description=__doc__)).add_argument,
        ",".join(cli.OFFLINE),
    )
    of = {
        key: "default: " + ", ".join(f"{name} {d[key]}" for name, d in DEFAULTS.items())
        for key in DEFAULTS["toy"]
    }
    add(
        "--teachers",
        type=cli.name_list,
        help=f"comma-separated, of {', '.join(cli.TEACHERS)} (default: {offline})",
    )
    add(
        "--student",
        choices=STUDENTS,
        help="(default: toy with offline teachers alone, otherwise vit_b)",
    )
    add(
        "--dims",
        type=cli.dim_list,
        help=f"nested dims; the student's width is always one ({of['dims']})",
    )
    add(
        "--data",
        type=cli.path,
        nargs="+",
        help="folders of tiles (png, jpg, ...), or tar shards (or: drawn tissue)",
    )
    add("--steps", type=cli.positive, help=f"optimiser steps; fixes the schedule ({of['steps']})")
    add(
        "--stop-at",
        type=cli.positive,
        help="stop after this step with a checkpoint; --steps still fixes the schedule",
    )
    add(
        "--batch-size",
        type=cli.batch,
        help=f"tiles in a step, over all processes ({of['batch_size']})",
    )
    add(
        "--accumulate",
        type=cli.positive,
        help="split a step into so many passes when memory is short (default: 1)",
    )
    add("--lr", type=float, help=f"peak rate; lower it if the loss is not finite ({of['lr']})")
    add(
        "--seed",
        type=cli.natural,
        help="of student, order of tiles and synthetic tissue (default: 0)",
    )
    add(
        "--out",
        type=cli.folder,
        help="run folder (default: runs/demo, with published ones runs/TEACHERS-STUDENT)",
    )
    add(
        "--resume",
        type=cli.folder,
        metavar="DIR",
        help="go on with this run; its arguments are restored",
    )
    add(
        "--init",
        type=cli.path,
        help="begin from a published teacher (vit_b: dinov2_b), a student.pt or weights file",
    )
    add(
        "--standardize",
        choices=["phi-s", "channel", "none"],
        help="of the targets (default: phi-s)",
    )
    add(
        "--stats-tiles",
        type=cli.plural,
        help="for target statistics (default: 1024; published on a CPU: 64)",
    )
    add(
        "--teacher-steps", type=cli.positive, help="training of the offline teachers (default: 500)"
    )
    add("--teacher-seed", type=cli.natural, help="of the offline teachers (default: 0)")
    add(
        "--weights-dir",
        type=cli.folder,
        help="where weights are looked for, offline teachers kept (default: weights)",
    )
    add(
        "--cache",
        type=cli.folder,
        help="run the teachers once, on one view a tile, their outputs kept in this folder",
    )
    add(
        "--workers",
        type=cli.few,
        help="that read tiles; more if a GPU waits (default: 8 a GPU, 0 on a CPU)",
    )
    add(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        help="auto (default): bf16 or fp16 on CUDA, else fp32",
    )
    add("--device", type=cli.path, help="cuda, mps or cpu (default: the best at hand)")
    add(
        "--compile",
        action="store_true",
        default=None,
        help="torch.compile all models; for long GPU runs",
    )
    add("--save-every", type=cli.positive, help=f"steps between checkpoints ({of['save_every']})")
    add("--log-every", type=cli.positive, help="steps between log lines (default: 50)")
    flags = vars(parser.parse_args(argv))
    given = {key: value for key, value in flags.items() if value is not None}
    if folder := given.pop("resume", None):
        content = read_weights(last) if (last := Path(folder, "last.pt")).exists() else {}
        stored = (
            content["args"]
            if WHOLE <= content.keys() and str(content["step"]).isdecimal()
            else None
        )
        if (
            not isinstance(stored, dict)
            or stored.get("student") not in STUDENTS
            or not stored.keys() >= VIT.keys()
        ):
            raise InputError(
                f"--resume: {last} does not exist, or is no checkpoint of a run; give the folder of one"
            )
        for key in given.keys() - {
            "workers",
            "device",
            "data",
            "weights_dir",
            "save_every",
            "log_every",
            "stop_at",
        }:
            raise InputError(
                f"--{key.replace('_', '-')}: this run has {stored.get(key)}; drop it, or do not --resume"
            )
        given = stored | given | {"out": folder, "resume": True}
    cli.check_names(names := given.get("teachers", cli.OFFLINE))
    published = [name for name in names if name not in cli.OFFLINE]
    of_student = DEFAULTS[kind := given.get("student", "vit_b" if published else "toy")]
    out = f"runs/{'-'.join(names)}-{kind}" if published else "runs/demo"
    args = {
        "teachers": names,
        "student": kind,
        "out": out,
        "accumulate": 1,
        "seed": 0,
        "standardize": "phi-s",
    }
    args |= {
        "precision": "auto",
        "teacher_steps": 500,
        "teacher_seed": 0,
        "weights_dir": "weights",
        "compile": False,
    }
    args = dict.fromkeys(flags) | args | {"log_every": 50} | of_student | given
    args["dims"] = sorted({*args["dims"], STUDENTS[args["student"]]["width"]})
    if args["cache"] and not args["data"]:
        raise InputError(
            "--cache: give --data as well; drawn tissue keeps its teachers' outputs in memory"
        )
    if published and args["student"] == "toy":
        raise InputError(
            f"--student toy is for offline teachers alone, not for {published[0]}; use vit_b or vit_s"
        )
    if not 0 < args["lr"] < math.inf:
        raise InputError(
            f"--lr: {args['lr']} is not a positive number; try {DEFAULTS[args['student']]['lr']}"
        )
    return argparse.Namespace(**args)


class CachedTiles:
    """Tiles on which the teachers run once: sample k -> one of `tiles`, and "outputs": {teacher: tokens}. outputs (n,),
    in memory or mapped, has fields "done" and {teacher: fp16 (1 + N, D_t), summary first}; row r is of tiles[r]."""

    def __init__(
        self, tiles: data.Dataset | list, rows: np.ndarray | range, outputs: np.ndarray, seed: int
    ):
        self.tiles, self.rows, self.outputs, self.seed = (
            tiles,
            rows,
            outputs,
            seed,
        )  # rows (n,): of each tile

    def fill(
        self, teach, todo: list[int], workers: int
    ) -> None:  # teach: batch -> {teacher: tokens}
        read = data.batches(self.tiles, todo, 64, workers, label="teachers' outputs, computed once")
        for batch, rows in zip(read, torch.tensor(todo).split(64)):
            for t, y in teach(batch).items():
                self.outputs[t][rows] = (
                    torch.cat([y["summary"][:, None], y["patches"]], 1).half().cpu()
                )
                if not np.isfinite(self.outputs[t][rows]).all():
                    raise InputError(
                        f"the outputs of teacher {t} are not finite in fp16; leave it out, or --cache"
                    )
            getattr(
                self.outputs, "flush", int
            )()  # of a file: a row is on the disk before it counts as done
            self.outputs["done"][rows] = 1
        getattr(self.outputs, "flush", int)()

    def __getitem__(self, k: int) -> dict:
        row = int(self.rows[data.epoch_order(self.seed, k // (n := len(self.rows)), n)[k % n]])
        tokens = {
            t: torch.from_numpy(self.outputs[t][row].copy()) for t in self.outputs.dtype.names[1:]
        }
        return self.tiles[row] | {
            "outputs": {t: {"summary": y[0], "patches": y[1:]} for t, y in tokens.items()}
        }


def learning_rate(
    step: int, steps: int, peak: float
) -> float:  # linear warmup, then a cosine to zero; step from 0
    warmup = max(1, round(WARMUP * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak * ((step + 1) / warmup if step < warmup else cosine)


def train(args: argparse.Namespace) -> int | None:  # exit code of a run that a signal has ended
    rank, world = (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )  # set by torchrun
    (device, dtype), out = cli.choose_device(args.device, args.precision), Path(args.out)
    say = (lambda message: None) if rank else (lambda message: print(message, flush=True))
    micro_batch, left = divmod(args.batch_size, world * args.accumulate)
    if left:
        raise InputError(
            f"--batch-size: make it a multiple of {world * args.accumulate} (processes x --accumulate)"
        )
    checkpoint = read_weights(out / "last.pt") if args.resume else None
    start, stop = (
        checkpoint["step"] if checkpoint else 0,
        min(args.stop_at or args.steps, args.steps),
    )
    if start >= stop:
        return say(f"{out} has done {start} of {args.steps} steps: nothing to do up to step {stop}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if (
        world > 1
    ):  # gloo between CPUs and NCCL between GPUs; half an hour: process 0 may have to fetch weights
        dist.init_process_group(timeout=timedelta(minutes=30))
    torch.manual_seed(args.seed)  # of the student
    teacher_dims = {name: cli.TEACHERS[name].arch["width"] for name in args.teachers}
    student = Student(args.student, teacher_dims, args.dims).to(device)
    vit, size, grid = student.backbone, student.backbone.img_size, student.backbone.grid
    say(
        f"student {args.student}: {millions(vit):.3f} M parameters, nested dims {args.dims}, on {device} in {dtype}"
    )
    licences = (
        checkpoint.get("licences", {}) if checkpoint else {}
    )  # of all that binds the student: init and teachers
    if not checkpoint and args.init and not rank:  # DDP gives it to the others
        licences = cli.load_init(vit, args.init, args.weights_dir)
        say(
            f"begun from {args.init}; licence "
            + "; ".join(f"{name}: {text}" for name, text in licences.items())
        )
    standardizers = Standardizers(teacher_dims, args.standardize).to(device)
    # The tiles, the run's folder, the teachers
    if rank:
        dist.barrier()  # process 0 goes first: it makes or fetches what the others then find
    seed = 0 if args.cache else args.seed  # a cache holds one view a tile, the same for every run
    tiles = (
        data.FolderTiles(args.data, size, seed, out)
        if args.data
        else data.TissueTiles("distil", seed, size)
    )
    fingerprint = tiles.fingerprint() if args.data else None
    if checkpoint and fingerprint != checkpoint["tiles"]:
        raise InputError(
            f"--data: {args.data} does not hold the tiles this run began with; give the same ones"
        )
    recipe = {"steps": args.teacher_steps, "seed": args.teacher_seed}
    full = args.cache and {"complete", "outputs"} <= {
        file.name for file in Path(args.cache).glob("*")
    }
    cli.find_weights(
        needed := [] if full else args.teachers, args.weights_dir
    )  # names every missing teacher at once
    try:
        _lock = rank or FileLock(out / "lock").acquire(
            timeout=0
        )  # released by the system when this process ends
    except Timeout:
        raise InputError(
            f"--out: another process works on {out}; wait for it, or choose another folder"
        ) from None
    if (
        not args.resume
        and not rank
        and any((out / name).exists() for name in ("last.pt", "student.pt", "log.jsonl"))
    ):
        free = next(f"{out}-{i}" for i in range(2, 10**6) if not Path(f"{out}-{i}").exists())
        raise InputError(
            f"--out: {out} holds a run; go on with --resume {out}, or begin another with --out {free}"
        )
    for left in () if rank else out.glob("*.tmp"):  # of a process that was killed
        left.unlink()
    teachers = {
        name: cli.load_teacher(name, args.weights_dir, device, dtype, **recipe) for name in needed
    }
    for name in args.teachers:
        licences[name], teacher = cli.TEACHERS[name].licence, teachers.get(name)
        text = (
            teacher
            and f"{millions(teacher):.3f} M parameters, width {teacher.dim}, grid {teacher.grid}"
        )
        say(f"teacher {name}: {text or f'its outputs in {args.cache}'}; licence {licences[name]}")
    source = (
        f"{len(tiles.files)} tiles of {tiles.root}"
        if args.data
        else f"synthetic tissue drawn at {size} px"
    )
    say(
        f"{args.steps} steps of {args.batch_size} tiles over {world} process(es); {source}; folder {out}, step {start}"
    )
    for block in (block for t in teachers for block in teachers[t].vit.blocks if args.compile):
        block.compile(dynamic=False)  # those of a teacher are alike, so one is compiled

    def to_device(
        batch: dict,
    ) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:  # images, outputs of the teachers
        images = batch["image"].to(device, non_blocking=True).contiguous()
        outputs = batch.get("outputs") or {
            name: teacher(images, grid) for name, teacher in teachers.items()
        }
        return images, {
            t: {kind: y.to(device, non_blocking=True) for kind, y in outputs[t].items()}
            for t in outputs
        }

    demo = not args.data and args.student == "toy"
    workers = (
        args.workers if args.workers is not None else 8 if device.type == "cuda" and not demo else 0
    )
    if demo:
        tiles = [
            {"image": image}
            for image in tiles.draw(min(8192, args.steps * args.batch_size))["image"]
        ]
    if (
        demo or args.cache
    ):  # few tiles, gone over many times: the teachers run once; otherwise in every step
        n = len(tiles) if demo else len(tiles.files)
        row = np.dtype(
            [("done", "u2"), *((t, "f2", (1 + grid**2, D_t)) for t, D_t in teacher_dims.items())]
        )
        rows, outputs = range(n), np.zeros(n * demo, row)
        if args.cache:
            tiles_of = "{count} tiles, {sha256:.16}".format(**tiles.fingerprint(contents=not rank))
            made_from = {
                "teachers": args.teachers,
                "recipe": recipe,
                "tiles": tiles_of,
                "crop": size,
                "grid": grid,
            }
            files = {
                t: Path(args.weights_dir) / cli.MADE_HERE.format(t, *recipe.values())
                for t in args.teachers
            }
            files = (
                ()
                if rank
                else (
                    files | cli.find_weights(args.teachers, args.weights_dir, fetch=False)
                ).items()
            )
            made_from |= {
                f"weights of {t}": sha256(np.memmap(f, mode="r")).hexdigest()
                for t, f in files
                if f.exists()
            }
            outputs = cli.open_cache(
                args.cache, {} if rank else made_from, row, n
            )  # process 0 has compared it
            rows = np.argsort(data.epoch_order(0, 0, n))  # row k is sample k of the first epoch
        tiles = CachedTiles(tiles, rows, outputs, args.seed)
    if world > 1 and not rank:
        dist.barrier()
    if teachers and (demo or args.cache):
        todo = [
            row
            for row in np.flatnonzero(outputs["done"] == 0).tolist()
            if demo or row % world == rank
        ]
        tiles.fill(lambda batch: to_device(batch)[1], todo, workers)
        if world > 1:
            dist.barrier()  # each process has made its share of the cache
        if args.cache and not rank:
            Path(args.cache, "complete").touch()
    if not checkpoint and not rank:  # statistics of the targets: measured once, then frozen
        n = args.stats_tiles or (
            64 if device.type == "cpu" and not set(args.teachers) <= set(cli.OFFLINE) else 1024
        )
        read = data.batches(
            tiles, range(n), min(n, args.batch_size), workers, label="target statistics"
        )
        standardizers.measure(to_device(batch)[1] for batch in read)
    for buffer in standardizers.buffers() if world > 1 else ():
        dist.broadcast(buffer, 0)
    optimizer = torch.optim.AdamW(
        student.parameter_groups(), lr=args.lr, betas=BETAS, fused=device.type != "mps"
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        for name, model in {"student": student, "standardizers": standardizers}.items():
            load_strictly(model, checkpoint[name], f"{out}/last.pt, its {name},")
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(
                checkpoint["scaler"] or scaler.state_dict()
            )  # empty where none was needed
        except Exception:  # noqa: BLE001 - other groups, keys, types: many types, and all mean the same
            raise InputError(
                f"{out}/last.pt: its optimizer is of another run; put a whole copy there"
            ) from None
    model = torch.compile(Distiller(student)) if args.compile else Distiller(student)
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def save(
        step: int,
    ) -> None:  # wherever it stops, last.pt is a whole checkpoint, the others are not older
        config = {
            "student": args.student,
            "arch": STUDENTS[args.student],
            "nested_dims": args.dims,
            "step": step,
        }
        config |= {
            "steps": args.steps,
            "teachers": args.teachers,
            "teacher_recipe": recipe,
            "licences": licences,
        }
        if step:
            save_atomically({"state_dict": vit.state_dict(), "config": config}, out / "student.pt")
            listed = "".join(f"\n  - {repr(name)[1:-1]}: {text}" for name, text in licences.items())
            words = {"size": millions(vit), "source": source, "dtype": dtype, "licences": listed}
            save_atomically(
                CARD.format(**vars(args) | config | config["arch"] | words).encode(),
                out / "model_card.md",
            )
        parts = {
            "student": student,
            "standardizers": standardizers,
            "optimizer": optimizer,
            "scaler": scaler,
        }
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {
            "step": step,
            "args": vars(args) | {"stop_at": None},
            "tiles": fingerprint,
            "licences": licences,
        }
        save_atomically(state, out / "last.pt")

    # The loop
    log, ks = (
        out / "log.jsonl",
        range(start * args.batch_size + rank, stop * args.batch_size, world),
    )
    if not checkpoint and not rank:
        save(0)  # a run can be resumed from its first moment, with the same targets
    elif not rank and log.exists():  # what comes after the checkpoint is done and written again
        lines = [
            x
            for x in log.read_bytes().splitlines()
            if x[:9] == b'{"step": ' and x[-2:] == b"}}" and x.isascii()
        ]
        save_atomically(
            b"".join(x + b"\n" for x in lines if int(x[9 : x.index(b",")]) <= start), log
        )
    loader = data.batches(tiles, ks, micro_batch, workers, pin=device.type == "cuda")
    done, logged, logged_at = start, start, (began := time.monotonic())
    numbers = [
        *(f"the outputs of teacher {t} are" for t in args.teachers),
        "the loss is",
        "the gradient is",
    ]
    first_bad, dead = (
        torch.full((len(numbers),), math.inf, device=device),
        [],
    )  # the step from which each is not finite
    came = np.zeros(
        1, int
    )  # SIGTERM or Ctrl-C, which end the loop after a step, on all processes after the same one
    before = {
        number: signal(number, lambda number, _: came.fill(number)) for number in (SIGTERM, SIGINT)
    }
    try:
        while done < stop:
            lr = learning_rate(done, args.steps, args.lr)
            done += 1
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
            optimizer.zero_grad()
            sums = 0.0  # (teachers + 1,): of each one's targets, and the loss
            for micro in range(1, args.accumulate + 1):
                images, outputs = to_device(next(loader))
                targets = standardizers(outputs)  # float32
                model.require_backward_grad_sync = (
                    micro == args.accumulate
                )  # DDP: gradients meet in the last pass
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, parts = model(images, targets)
                scaler.scale(loss / args.accumulate).backward()
                of_teachers = [y["summary"].sum() + y["patches"].sum() for y in targets.values()]
                sums += torch.stack([*of_teachers, loss.detach()])
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(student.parameters(), CLIP)
            finite = torch.stack([*sums, norm]).isfinite()
            finite[-1] |= (
                scaler.is_enabled()
            )  # where fp16 overflows, the scaler skips the step and lowers its scale
            first_bad = first_bad.minimum(torch.where(finite, math.inf, done))
            optimizer.found_inf = (
                first_bad.min() <= done
            ).float()  # from then on fused AdamW leaves all as it is
            scaler.step(optimizer)
            scaler.update()
            if world > 1 and done % 10 == 0:
                dist.all_reduce(torch.from_numpy(came), dist.ReduceOp.MAX)
            if came[0] and (world == 1 or done % 10 == 0):
                stop = done
            logs, saves = (
                done % every == 0 or done == stop for every in (args.log_every, args.save_every)
            )
            if not (logs or saves):  # only to log and to save the host waits for the device
                continue
            if world > 1:
                dist.all_reduce(sums)
                dist.all_reduce(
                    first_bad, dist.ReduceOp.MIN
                )  # on every process, so that all leave together
            spreads = {
                f"{t} at dim {m}": parts[m][t]["spread"] for m in parts for t in args.teachers
            }
            was_dead, dead, why = (
                dead,
                [head for head, spread in spreads.items() if spread < 1e-6],
                "",
            )
            if (bad := min(steps := first_bad.tolist())) < math.inf:
                why = f"{numbers[steps.index(bad)]} not finite"
            elif scaler.is_enabled() and scaler.get_scale() < 1:  # halved more than 16 times
                why = "the gradient is not finite in fp16, at any scale"
            elif was_dead and dead:  # for a while
                why = (
                    "the student has collapsed"
                    if len(dead) == len(spreads)
                    else f"dead adaptor of teacher {dead[0]}"
                )
            if why:
                why = f"step {min(bad, done):.0f}: {why}; {out}/last.pt is from before"
                raise InputError(f"{why}: begin another run, with a lower --lr or --precision fp32")
            if logs and not rank:
                now, text, terms, ends = time.monotonic(), "", {}, (max(parts), min(parts))
                for t in (
                    args.teachers
                ):  # terms at the largest/smallest dim, of this process's last batch
                    terms |= {
                        f"{t}/{key}": {m: parts[m][t][key].item() for m in ends}
                        for key in parts[ends[0]][t]
                    }
                    cosines = (
                        parts[m][t][key] for key in ("summary_cos", "patch_cos") for m in ends
                    )
                    text += "  {} summary {:.2f}/{:.2f} patch {:.2f}/{:.2f}".format(t, *cosines)
                rate = (done - logged) * args.batch_size / (now - logged_at)
                eta = (stop - done) * (now - began) / (done - start)
                logged, logged_at, loss = done, now, sums[-1].item() / args.accumulate / world
                peak = torch.cuda.max_memory_allocated() / 1e9
                line = {
                    "step": done,
                    "loss": loss,
                    "lr": lr,
                    "tiles_per_s": rate,
                    "peak_gb": peak,
                    "terms": terms,
                }
                try:
                    with open(log, "a") as file:
                        file.write(json.dumps(line) + "\n")
                except OSError as error:
                    raise InputError(
                        f"cannot write {log}: {error}; free some space, then --resume {out}"
                    ) from None
                text += f"  lr {lr:.1e}  {rate:.3g} tiles/s{f'  {peak:.1f} GB' if peak else ''}  ETA {eta:.0f} s"
                say(f"step {done}/{args.steps}  loss {loss:.3f}{text}")
            if saves and not rank:
                save(done)
    finally:
        for number, handler in before.items():
            signal(number, handler)
    if stop < args.steps or came[0]:
        say(
            f"stopped after step {stop} of {args.steps}; go on with: python train.py --resume {out}"
        )
    elif not rank:
        if demo:  # its table
            models = {
                f"teacher {name}": (teacher, [teacher.embed_dim])
                for name, teacher in teachers.items()
            }
            models["student"] = (student.eval(), student.nested_dims)
            evaluate.report(models, [out], None, args.seed, ["knn"])
        print(f"\nSaved {out}/student.pt. Next:\n  python evaluate.py {out} [--data labelled/]")
    return 128 + int(came[0]) if came[0] else None


if __name__ == "__main__":
    cli.run_main(lambda: train(parse_args()))
