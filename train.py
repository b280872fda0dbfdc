"""Train one small student on several frozen teachers, at every nested dim at once.

    python train.py                                       the offline demo: synthetic tissue, CPU, minutes
    python train.py --teachers uni,virchow --data tiles/  published teachers; says how to get missing weights
    torchrun --nproc-per-node 8 train.py ...              the same script on many GPUs
    python train.py --resume runs/demo                    go on where a run stopped

Place in the data flow:  data.py -> student.py and teachers.py -> losses.py -> [ train.py ] -> evaluate.py
A run folder holds last.pt (all that a resume needs), student.pt (the backbone, loads into timm), log.jsonl. Optimiser,
schedule, sizes are our choice, not checked against the paper's method section; vit_b and vit_s were not trained out."""

import argparse
import contextlib
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import teachers as cli
from data import InputError
from losses import Standardizers, nested_loss
from student import STUDENTS, Student, load_strictly, millions, read_weights
from teachers import OFFLINE, TEACHERS, check_names, find_weights, load_init, load_teacher

VIT = {"steps": 100_000, "batch_size": 64, "lr": 2e-4, "save_every": 1000}
DEFAULTS = {
    "toy": {"dims": [2, 4, 8, 16, 48], "steps": 2000, "batch_size": 32, "lr": 5e-3, "save_every": 250},
    "vit_s": {"dims": [24, 48, 96, 192, 384], **VIT},
    "vit_b": {"dims": [48, 96, 192, 384, 768], **VIT},
}
WEIGHT_DECAY, BETAS, CLIP, WARMUP = 0.05, (0.9, 0.95), 1.0, 0.04  # warmup: share of the steps
MAY_CHANGE = {"workers", "device", "data", "weights_dir", "save_every", "log_every", "stop_at"}  # on --resume


class Distiller(nn.Module):
    """Student and loss in one forward: what DDP wraps and --compile compiles."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, images: Tensor, targets: dict) -> tuple[Tensor, dict]:
        return nested_loss(self.student, self.student(images), targets)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags over a resumed run's stored arguments over the defaults. InputError on what does not fit together."""
    parser = cli.OneLineParser("train.py", description=__doc__)
    add, offline = parser.add_argument, ",".join(OFFLINE)
    of = {key: "default: " + ", ".join(f"{name} {d[key]}" for name, d in DEFAULTS.items()) for key in DEFAULTS["toy"]}
    add("--teachers", type=cli.name_list, help=f"comma-separated, of {', '.join(TEACHERS)} (default: {offline})")
    add("--student", choices=STUDENTS, help="(default: toy with offline teachers alone, otherwise vit_b)")
    add("--dims", type=cli.dim_list, help=f"nested dims; the student's width is always one ({of['dims']})")
    add("--data", type=cli.path, help="a folder tree of tiles (png, jpg, tif, bmp, webp); without it tissue is drawn")
    add("--steps", type=cli.positive, help=f"optimiser steps; fixes the schedule ({of['steps']})")
    add("--stop-at", type=cli.positive, help="stop after this step with a checkpoint; --steps still fixes the schedule")
    add("--batch-size", type=cli.positive, help=f"tiles in a step, over all processes ({of['batch_size']})")
    add("--accumulate", type=cli.positive, help="split a step into so many passes when memory is short (default: 1)")
    add("--lr", type=float, help=f"peak rate; lower it if the loss is not finite ({of['lr']})")
    add("--seed", type=cli.natural, help="of student, order of tiles and synthetic tissue (default: 0)")
    add("--out", type=cli.path, help="run folder (default: runs/demo, with published ones runs/TEACHERS-STUDENT)")
    add("--resume", type=cli.path, metavar="DIR", help="go on with this run; its arguments are restored")
    add("--init", type=cli.path, help="begin from a published teacher (vit_b: dinov2_b), a student.pt or weights file")
    add("--standardize", choices=["phi-s", "channel", "none"], help="of the targets (default: phi-s)")
    add("--stats-tiles", type=cli.plural, help="for target statistics (default: 1024; published on a CPU: 64)")
    add("--teacher-steps", type=cli.positive, help="training of the offline teachers (default: 500)")
    add("--teacher-seed", type=cli.natural, help="of the offline teachers (default: 0)")
    add("--weights-dir", type=cli.path, help="where weights are looked for, offline teachers kept (default: weights)")
    add("--workers", type=cli.natural, help="that read tiles; more if a GPU waits (default: 8 a GPU, 0 on a CPU)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="auto (default): bf16 or fp16 on CUDA, else fp32")
    add("--device", help="cuda, mps or cpu (default: the best at hand)")
    add("--compile", action="store_true", default=None, help="torch.compile student and loss; for long GPU runs")
    add("--save-every", type=cli.positive, help=f"steps between checkpoints ({of['save_every']})")
    add("--log-every", type=cli.positive, help="steps between log lines (default: 50)")
    given = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}

    if folder := given.pop("resume", None):
        last = Path(folder) / "last.pt"
        if not (stored := read_weights(last).get("args") if last.exists() else None):
            raise InputError(f"--resume: {last} does not exist, or is no checkpoint of a run; give the folder of one")
        for key, value in given.items():
            value = sorted({*value, stored["dims"][-1]}) if key == "dims" else value
            if key not in MAY_CHANGE and value != stored.get(key):
                flag = f"--{key.replace('_', '-')}"
                raise InputError(f"{flag}: this run has {stored.get(key)}; leave the flag out, or do not --resume")
        return argparse.Namespace(**{**stored, **given, "dims": stored["dims"], "out": folder, "resume": True})

    args = {"teachers": OFFLINE, "accumulate": 1, "seed": 0, "standardize": "phi-s", "precision": "auto"}
    args |= {"teacher_steps": 500, "teacher_seed": 0, "weights_dir": "weights", "compile": False, "log_every": 50}
    args |= {"resume": False, **dict.fromkeys(("data", "stop_at", "stats_tiles", "workers", "device", "init")), **given}
    check_names(args["teachers"])
    published = [name for name in args["teachers"] if name not in OFFLINE]
    args.setdefault("student", "vit_b" if published else "toy")
    args.setdefault("out", f"runs/{'-'.join(args['teachers'])}-{args['student']}" if published else "runs/demo")
    args = {**DEFAULTS[args["student"]], **args}
    width = STUDENTS[args["student"]]["width"]
    args["dims"] = sorted({*args["dims"], width})
    if published and args["student"] == "toy":
        raise InputError(f"--student toy is for offline teachers alone, not for {published[0]}; use vit_b or vit_s")
    if args["dims"][-1] > width:
        raise InputError(f"--dims: {args['dims'][-1]} is above the width of {args['student']}; give dims up to {width}")
    if not 0 < args["lr"] < math.inf:
        raise InputError(f"--lr: {args['lr']} is not a positive number; try {DEFAULTS[args['student']]['lr']}")
    out = args["out"]
    if any((Path(out) / name).exists() for name in ("last.pt", "student.pt", "log.jsonl")):
        free = next(f"{out}-{i}" for i in range(2, 10**6) if not Path(f"{out}-{i}").exists())
        raise InputError(f"--out: {out} holds a run; go on with --resume {out}, or begin another with --out {free}")
    return argparse.Namespace(**args)


def parameter_groups(student: nn.Module) -> list[dict]:
    """No weight decay on biases, norms, LayerScale, tokens and position embeddings."""
    groups = [{"params": [], "weight_decay": WEIGHT_DECAY}, {"params": [], "weight_decay": 0.0}]
    for name, p in student.named_parameters():
        groups[p.ndim < 2 or name.endswith(("cls_token", "reg_token", "pos_embed"))]["params"].append(p)
    return groups


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup, then a cosine to zero; step counts from 0."""
    warmup = max(1, round(WARMUP * steps))
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak * ((step + 1) / warmup if step < warmup else cosine)


def train(args: argparse.Namespace) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    (device, dtype), out = cli.choose_device(args.device, args.precision), Path(args.out)

    def say(message: str) -> None:
        if not rank:
            print(message, flush=True)

    if args.batch_size % (world * args.accumulate):
        raise InputError(f"--batch-size: make it a multiple of {world * args.accumulate} (processes x --accumulate)")
    checkpoint = read_weights(out / "last.pt") if args.resume else None
    start, stop = checkpoint["step"] if checkpoint else 0, min(args.stop_at or args.steps, args.steps)
    if start >= stop:
        return say(f"{out} has done {start} of {args.steps} steps: nothing to do up to step {stop}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    # Student, standardisers, tiles
    torch.manual_seed(args.seed)
    teacher_dims = {name: TEACHERS[name].arch["width"] for name in args.teachers}
    student = Student(args.student, teacher_dims, args.dims).to(device)
    size, grid = student.backbone.img_size, student.backbone.grid
    text = f"{millions(student.backbone):.3f} M parameters, nested dims {args.dims}, on {device} in {dtype}"
    say(f"student {args.student}: {text}")
    licences = checkpoint.get("licences", {}) if checkpoint else {}  # of all that binds the student: init and teachers
    if not checkpoint and args.init and not rank:  # DDP gives it to the others
        licences = load_init(student.backbone, args.init, args.weights_dir)
        say(f"begun from {args.init}; licence " + "; ".join(f"{name}: {text}" for name, text in licences.items()))
    standardizers = Standardizers(teacher_dims, args.standardize).to(device)
    tiles = data.FolderTiles(args.data, size, args.seed) if args.data else data.TissueTiles("distil", args.seed, size)
    fingerprint = tiles.fingerprint() if args.data else None
    if checkpoint and fingerprint != checkpoint["tiles"]:
        raise InputError(f"--data: {args.data} does not hold the tiles this run began with; give the same folder")

    # Teachers, frozen
    recipe = {"steps": args.teacher_steps, "seed": args.teacher_seed}
    if rank:
        dist.barrier()  # process 0 goes first: it makes or fetches what the others then find
    find_weights(args.teachers, args.weights_dir)  # names every missing teacher at once
    out.mkdir(parents=True, exist_ok=True)
    teachers = {name: load_teacher(name, args.weights_dir, device, dtype, **recipe) for name in args.teachers}
    if world > 1 and not rank:
        dist.barrier()
    for name, teacher in teachers.items():
        text = f"{millions(teacher):.3f} M parameters, width {teacher.dim}, grid {teacher.grid}"
        say(f"teacher {name}: {text}; licence {teacher.licence}")
    licences |= {name: teacher.licence for name, teacher in teachers.items()}
    source = f"{len(tiles.files)} tiles of {args.data}" if args.data else f"synthetic tissue drawn at {size} px"
    say(f"{args.steps} steps of {args.batch_size} tiles over {world} process(es); {source}; run folder {out}")

    def teach(images: Tensor) -> dict[str, dict[str, Tensor]]:
        return {name: teacher(images.to(device, non_blocking=True), grid) for name, teacher in teachers.items()}

    # The demo goes over few tiles many times, so its teachers run once on each. Otherwise they run in every step.
    demo = not args.data and args.student == "toy"
    if demo:
        images = tiles.draw(min(8192, args.steps * args.batch_size))["image"]
        tiles = data.CachedTiles(images, teach, args.seed)
    workers = args.workers if args.workers is not None else 8 if device.type == "cuda" and not demo else 0

    def outputs_of(batch: dict) -> dict[str, dict[str, Tensor]]:
        outputs = batch.get("outputs") or teach(batch["image"])
        return {t: {kind: y.to(device) for kind, y in tokens.items()} for t, tokens in outputs.items()}

    # Statistics of the targets: measured once, by process 0, then frozen
    if checkpoint:
        load_strictly(standardizers, checkpoint["standardizers"], f"{out}/last.pt")
    elif not rank:
        n = args.stats_tiles or (64 if device.type == "cpu" and not set(args.teachers) <= set(OFFLINE) else 1024)
        read = data.batches(tiles, range(n), min(n, args.batch_size), workers, label="target statistics")
        standardizers.measure(outputs_of(batch) for batch in read)
    if world > 1:
        for buffer in standardizers.buffers():
            dist.broadcast(buffer, 0)

    # Optimiser
    optimizer = torch.optim.AdamW(parameter_groups(student), lr=args.lr, betas=BETAS, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if checkpoint:
        load_strictly(student, checkpoint["student"], f"{out}/last.pt")
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty where the run so far needed no scaler
            scaler.load_state_dict(checkpoint["scaler"])
    model = torch.compile(Distiller(student)) if args.compile else Distiller(student)
    if world > 1:
        model = DistributedDataParallel(model)

    def save(step: int) -> None:
        parts = {"student": student, "standardizers": standardizers, "optimizer": optimizer, "scaler": scaler}
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"step": step, "args": vars(args) | {"stop_at": None}, "tiles": fingerprint, "licences": licences}
        data.save_atomically(state, out / "last.pt")
        config = {"student": args.student, "arch": STUDENTS[args.student], "nested_dims": args.dims, "step": step}
        config |= {"steps": args.steps, "teachers": args.teachers, "teacher_recipe": recipe, "licences": licences}
        data.save_atomically({"state_dict": student.backbone.state_dict(), "config": config}, out / "student.pt")

    # The loop
    if not checkpoint and not rank:
        save(0)  # a run can be resumed from its first moment, with the same targets
    ks = range(start * args.batch_size + rank, stop * args.batch_size, world)
    micro_batch = args.batch_size // (world * args.accumulate)
    loader = data.batches(tiles, ks, micro_batch, workers, pin=device.type == "cuda")
    logged, logged_at = start, (began := time.monotonic())
    for step in range(start, stop):
        lr = learning_rate(step, args.steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for micro in range(args.accumulate):
            batch = next(loader)
            targets = standardizers(outputs_of(batch))  # float32
            reduce = world == 1 or micro == args.accumulate - 1  # gradients meet once a step
            with contextlib.nullcontext() if reduce else model.no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, parts = model(batch["image"].to(device, non_blocking=True), targets)
                scaler.scale(loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
        if world > 1:
            dist.all_reduce(total)
            total /= world
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        # The same on every process, so all leave together, before any update; where fp16 overflows the scaler skips.
        if not math.isfinite(total.item()) or not (scaler.is_enabled() or math.isfinite(norm.item())):
            kept = f"{out}/last.pt keeps the last good step; begin anew with a lower --lr"
            raise InputError(f"--lr: loss not finite at step {step + 1}; {kept} and another --out")
        scaler.step(optimizer)
        scaler.update()
        done = step + 1
        if not rank and (done % args.log_every == 0 or done == stop):
            now, text, terms, ends = time.monotonic(), "", {}, (args.dims[-1], args.dims[0])
            for t in args.teachers:  # terms at the largest/smallest dim, of this process's last batch
                text += f"  {t}"
                for key in parts[ends[0]][t]:
                    large, small = (parts[m][t][key].item() for m in ends)
                    terms[f"{t}/{key}"] = {ends[0]: large, ends[1]: small}
                    text += f" {key[:-4]} {large:.2f}/{small:.2f}" if key.endswith("_cos") else ""
            rate = (done - logged) * args.batch_size / (now - logged_at)
            eta = (stop - done) * (now - began) / (done - start)
            logged, logged_at, loss = done, now, total.item()
            line = {"step": done, "loss": loss, "lr": lr, "tiles_per_s": rate, "terms": terms}
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            say(f"step {done}/{args.steps}  loss {loss:.3f}{text}  lr {lr:.1e}  {rate:.3g} tiles/s  ETA {eta:.0f} s")
        if not rank and (done % args.save_every == 0 or done == stop):
            save(done)

    if stop < args.steps:
        say(f"stopped after step {stop} of {args.steps}; go on with: python train.py --resume {out}")
    elif not rank:
        if demo:  # its table
            models = {f"teacher {name}": (teacher, [teacher.embed_dim]) for name, teacher in teachers.items()}
            models["student"] = (student.eval(), student.nested_dims)
            evaluate.report(models, [out], None, args.seed, ["knn"])
        print(f"\nSaved {out}/student.pt. Next:\n  python evaluate.py {out} [--data labelled/]")


def main() -> None:
    train(parse_args())
    if dist.is_initialized():  # only here, when the DDP module is gone: freeing it later can hang
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run_main(main)
