"""The paper's setting on one GPU: Virchow2, UNI2-h, H-optimus-1 -> ViT-B at five nested dims, 64 tiles a step.

    python tests/bench_gpu.py                               # all parts; 10 GB of disk, ten minutes or so (an estimate)
    python tests/bench_gpu.py train loader --weights-dir W --tiles-dir T     # some parts; W and T are kept, and reused
    python tests/bench_gpu.py nested --profile                   # and a table of the operations that take the time
    python tests/bench_gpu.py --device cpu --tiny                # minutes, no GPU: only shows that everything runs

matmul     the rate of an 8192 x 8192 x 8192 product in bf16: what the card can do, in this run (always measured)
train      train.py --compile from 256 px JPEG tiles: tiles/s of its log.jsonl, achieved TFLOP/s (asked: >= 60 % of it)
reference  against a loop written the usual way with timm: float32 teachers under autocast, nothing compiled, targets
           standardised by each batch's own statistics, .item() of every loss term in every step; the same tiles,
           targets, heads and losses (asked: its time / ours >= 1.25)
nested     five nested dims against 768 alone (asked: <= 8 % of the step)
loader     a step on tiles on the GPU / a step from the folder, 224 and 256 px JPEG tiles (asked: >= 97 % of the time)

Operations are counted by torch's FlopCounterMode for one tile on the meta device, 2 for a multiply-add, as in the rate
of the product: forward of the teachers; forward and backward of student and heads. Attention is counted there as its
two products forward and four backward, without what a fused kernel computes again. Standardising, resizing, losses and
the optimiser take time but count nothing. Ratios come from blocks of steps that alternate in one process. Weights are
random, of published size; tiles are drawn by the benchmark, so they lie in the page cache. Needs timm.
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import tempfile
from pathlib import Path

import cards
import torch
import torch.nn.functional as F
from test_student import timm_twin
from timing import (
    draw_folder,
    folder_step,
    interleaved,
    log_rates,
    ratios,
    spread,
    timed,
    training_step,
)
from torch.utils.flop_counter import FlopCounterMode

import data
import train
from losses import nested_loss
from student import STUDENTS, Student, VisionTransformer, normalise
from teachers import TEACHERS, InputError, choose_device, load_teacher, run_main

NAMES, DIMS = ["virchow2", "uni2_h", "h_optimus_1"], train.DEFAULTS["vit_b"]["dims"]
PARTS = ("train", "reference", "nested", "loader")


def make_shallow() -> None:
    """--tiny: the same widths at depth 2, for train.py too, which reads the same tables."""
    for name in NAMES:
        TEACHERS[name] = dataclasses.replace(
            TEACHERS[name], arch=TEACHERS[name].arch | {"depth": 2}
        )
    STUDENTS["vit_b"] = STUDENTS["vit_b"] | {"depth": 2}


def write_weights(folder: Path, device: torch.device) -> None:
    for path in (folder / f"{name}.bin" for name in NAMES):
        if not path.exists():
            torch.manual_seed(0)
            with device:  # a GPU draws a billion numbers in no time
                vit = VisionTransformer(**TEACHERS[path.stem].arch)
            cards.write({key: value.cpu() for key, value in vit.state_dict().items()}, path)


def matmul_rate(device: torch.device, size: int) -> float:
    """TFLOP/s of a (size, size) x (size, size) product in bf16, the median of blocks, once the clock has settled."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = functools.partial(torch.mm, a, b, out=out)
    rates = [2 * size**3 / timed(product, times=20) / 1e12 for _ in range(40)]
    print(
        f"matmul: {size}^3 in bf16, TFLOP/s: {spread(rates[10:], '.3g')} blocks of 20", flush=True
    )
    return statistics.median(rates[10:])


def count_operations(names: list[str], student: str) -> tuple[float, float]:
    """TFLOP for one tile: of the teachers' forward, of forward and backward of student, heads and loss."""
    with torch.device("meta"):
        teachers = [VisionTransformer(**TEACHERS[name].arch) for name in names]
        dims = {name: vit.width for name, vit in zip(names, teachers)}
        model = train.Distiller(Student(student, dims, train.DEFAULTS[student]["dims"]))
        image = torch.empty(1, 3, 224, 224)
        n = model[0].backbone.grid ** 2
        targets = {
            name: {"summary": torch.empty(1, D), "patches": torch.empty(1, n, D)}
            for name, D in dims.items()
        }
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        for vit in teachers:
            vit(image)
    with FlopCounterMode(display=False) as both:
        model(image, targets)[0].backward()
    return forward.get_total_flops() / 1e12, both.get_total_flops() / 1e12


def run_train(args: argparse.Namespace, tiles: Path, work: Path, rate: float) -> None:
    every, device = (1 if args.tiny else 20), args.device.type
    argv = [
        "--teachers",
        ",".join(NAMES),
        "--student",
        "vit_b",
        "--dims",
        ",".join(map(str, DIMS)),
        "--compile",
    ]
    argv += [
        "--data",
        tiles,
        "--batch-size",
        args.batch,
        "--out",
        work / "run",
        "--weights-dir",
        args.weights_dir,
    ]
    argv += ["--device", device, "--log-every", every, "--stop-at", 3 if args.tiny else args.steps]
    argv += ["--stats-tiles", 4] if args.tiny else []
    argv += ["--workers", args.workers] if args.workers is not None else []
    if device == "cuda":
        torch.cuda.empty_cache()  # what drawing the weights took
        torch.cuda.reset_peak_memory_stats()
    train.train(train.parse_args([*map(str, argv)]))
    rates = log_rates(work / "run", 2)  # the first two lines hold compiling, and the clock settling
    tiles_per_s, (teachers, student) = statistics.median(rates), count_operations(NAMES, "vit_b")
    achieved = tiles_per_s * (teachers + student)
    print(
        f"train: tiles/s {spread(rates, '.3g')} log lines; {args.batch / tiles_per_s:.4f} s a step"
    )
    print(f"  TFLOP a tile: teachers {teachers:.3f}, student and heads {student:.3f}")
    print(
        f"  {achieved:.3g} TFLOP/s, {achieved / rate:.1%} of the product's {rate:.3g} (asked: >= 60 %)"
    )
    if device == "cuda":
        peaks = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
        print(
            "  peak memory {:.1f} GB, {:.1f} GB with what the allocator keeps".format(*peaks),
            flush=True,
        )


class TimmStudent(Student):
    """Our heads on timm's ViT-B."""

    def __init__(self, teacher_dims: dict[str, int], dims: list[int]):
        super().__init__("vit_b", teacher_dims, dims)
        self.grid, self.backbone = self.backbone.grid, timm_twin(STUDENTS["vit_b"]).train()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return split(self.backbone, normalise(images, self.mean, self.std))


def split(vit: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = vit.forward_features(images)
    return {"summary": tokens[:, 0], "patches": tokens[:, vit.num_prefix_tokens :]}


def usual_step(teachers: dict, device: torch.device, dtype: torch.dtype):
    """A step of the loop that one would write first: batch -> its loss terms as numbers."""
    twins = {}
    for name, teacher in teachers.items():
        with torch.device("meta"):
            twins[name] = cards.timm_model(name, depth=TEACHERS[name].arch["depth"])
        state = {key: value.float() for key, value in teacher.vit.state_dict().items()}
        twins[name].load_state_dict(state, strict=True, assign=True)
        twins[name].requires_grad_(False)
    torch.manual_seed(0)
    student = TimmStudent({name: teacher.dim for name, teacher in teachers.items()}, DIMS).to(
        device
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=1e-4, betas=train.BETAS, weight_decay=0.05
    )
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    @torch.no_grad()
    def teach(images: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
        outputs = {}
        for name, twin in twins.items():
            with autocast():
                outputs[name] = split(
                    twin, normalise(images, teachers[name].mean, teachers[name].std)
                )
            maps = outputs[name]["patches"].transpose(1, 2)  # (B, D_t, N)
            if (side := round(maps.shape[-1] ** 0.5)) != student.grid:
                maps = F.interpolate(
                    maps.unflatten(2, (side, side)), (student.grid, student.grid), mode="bilinear"
                )
                outputs[name]["patches"] = maps.flatten(2).transpose(1, 2)
        return outputs

    def standardise(y: torch.Tensor) -> torch.Tensor:
        y, axes = y.float(), tuple(range(y.ndim - 1))
        return (y - y.mean(axes)) / (y.std(axes) + 1e-6)

    def step(batch: dict) -> dict:
        images = batch["image"].to(device)
        outputs = teach(images)
        targets = {
            t: {kind: standardise(y) for kind, y in tokens.items()} for t, tokens in outputs.items()
        }
        optimizer.zero_grad()
        with autocast():
            loss, parts = nested_loss(student, student(images), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), train.CLIP)
        optimizer.step()
        return {
            (m, t, key): parts[m][t][key].item()
            for m in parts
            for t in parts[m]
            for key in parts[m][t]
        }

    return step, teach


def compare(contenders: dict, batch: dict, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of each on one batch in memory, in blocks of steps that alternate."""
    blocks = {
        name: functools.partial(timed, step, batch, times=args.block)
        for name, step in contenders.items()
    }
    interleaved(blocks, 1)  # compiles
    seconds = interleaved(blocks, args.rounds)
    for name, values in seconds.items():
        print(f"  {name}: s a step {spread(values, '.4f')} blocks of {args.block}", flush=True)
    return seconds


def against_usual(
    ours, plain: dict, batch: dict, args: argparse.Namespace, dtype: torch.dtype
) -> None:
    """plain: our teachers once more, not compiled."""
    print("reference: the usual loop with timm / ours (asked: >= 1.25)")
    usual, teach = usual_step(plain, args.device, dtype)
    for name, tokens in teach(batch["image"]).items():
        expected, got = tokens["patches"].float(), plain[name](batch["image"])["patches"].float()
        error = (got - expected).abs().max() / expected.abs().max()
        print(f"  {name}: largest difference of patches {error:.1e} of their scale")
    eager = training_step(plain, "vit_b", DIMS, args.device, dtype)
    seconds = compare({"ours": ours, "ours, not compiled": eager, "usual": usual}, batch, args)
    for name in ("ours", "ours, not compiled"):
        print(f"  usual / {name}: {spread(ratios(seconds, 'usual', name))}", flush=True)


def wait_for_tiles(ours, tiles: dict, batch: dict, args: argparse.Namespace) -> None:
    cuda = args.device.type == "cuda"
    workers = args.workers if args.workers is not None else 8 * cuda
    print(
        f"loader: {workers} workers; a step on tiles in memory / from the folder (asked: >= 0.97)"
    )
    contenders = {"memory": functools.partial(timed, ours, batch, times=args.block)}
    contenders["memory"]()
    for size, source in tiles.items():
        contenders[f"{size} px"] = functools.partial(
            folder_step, ours, source, args.batch, workers, args.block, pin=cuda
        )
    seconds = interleaved(contenders, args.rounds)
    for name, values in seconds.items():
        share = "" if name == "memory" else f", busy {spread(ratios(seconds, 'memory', name))}"
        print(f"  {name}: {args.batch / statistics.median(values):.3g} tiles/s{share}", flush=True)


def profile(step, batch: dict, device: torch.device) -> None:
    step(batch)
    with torch.profiler.profile() as profiler:  # of all devices there are
        timed(step, batch, times=1 if device.type == "cpu" else 3)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--device", default="cuda", help="(default: cuda; cpu only with --tiny)")
    parser.add_argument("--batch", type=int, help="tiles in a step (default: 64; --tiny: 2)")
    parser.add_argument(
        "--steps", type=int, default=240, help="of train, 20 to a log line (default: 240)"
    )
    parser.add_argument("--rounds", type=int, help="of alternating blocks (default: 5; --tiny: 2)")
    parser.add_argument("--block", type=int, help="steps in a block (default: 16; --tiny: 1)")
    parser.add_argument(
        "--tiles", type=int, help="JPEG tiles of each size (default: 3000; --tiny: 40)"
    )
    parser.add_argument("--workers", type=int, help="that read tiles (default: as train.py)")
    parser.add_argument(
        "--weights-dir", type=Path, help="keeps the random weights, 10 GB (default: temporary)"
    )
    parser.add_argument("--tiles-dir", type=Path, help="keeps the tiles (default: temporary)")
    parser.add_argument(
        "--profile", action="store_true", help="print the 25 operations that take the most time"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="depth 2, small and short; its numbers mean nothing"
    )
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"no part is called {unknown[0]}; choose from {', '.join(PARTS)}")
    if not args.tiny and not (args.device.startswith("cuda") and torch.cuda.is_available()):
        raise InputError(
            "--device: this needs a CUDA GPU; --device cpu --tiny only shows that everything runs"
        )
    args.device, dtype = choose_device(args.device, "auto")
    for key, tiny, usual in (
        ("batch", 2, 64),
        ("rounds", 2, 5),
        ("block", 1, 16),
        ("tiles", 40, 3000),
    ):
        setattr(args, key, getattr(args, key) or (tiny if args.tiny else usual))
    parts = args.parts or PARTS
    torch._dynamo.config.fail_on_recompile_limit_hit = (
        True  # otherwise it goes on uncompiled, and nobody knows
    )
    if args.tiny:
        make_shallow()
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, timm {cards.oracle('timm').__version__}, {dtype}, batch {args.batch}"
    )

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        args.weights_dir, tiles_dir = (
            args.weights_dir or work / "weights",
            args.tiles_dir or work / "tiles",
        )
        args.weights_dir.mkdir(parents=True, exist_ok=True)
        folders = {
            size: draw_folder(tiles_dir / str(size), args.tiles, size) for size in (224, 256)
        }
        write_weights(args.weights_dir, args.device)
        rate = matmul_rate(args.device, 256 if args.tiny else 8192)
        if "train" in parts:
            run_train(args, folders[256], work, rate)
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()
        if parts == ["train"] and not args.profile:
            return

        load = functools.partial(
            load_teacher, weights_dir=args.weights_dir, device=args.device, dtype=dtype
        )
        teachers = {name: load(name) for name in NAMES}
        tiles = {size: data.FolderTiles(folder, 224, 0) for size, folder in folders.items()}
        batch = {
            "image": next(data.batches(tiles[256], range(args.batch), args.batch))["image"].to(
                args.device
            )
        }
        ours = training_step(teachers, "vit_b", DIMS, args.device, dtype, compiled=True)
        if "reference" in parts:
            against_usual(ours, {name: load(name) for name in NAMES}, batch, args, dtype)
        if "nested" in parts:
            print("nested: what five dims cost above the single one (asked: <= 8 % of the step)")
            single = training_step(teachers, "vit_b", DIMS[-1:], args.device, dtype, compiled=True)
            seconds = compare({"five": ours, "single": single}, batch, args)
            more = [100 * (1 - ratio) for ratio in ratios(seconds, "single", "five")]
            print(f"  % of the step: {spread(more, '.2f')}", flush=True)
        if "loader" in parts:
            wait_for_tiles(ours, tiles, batch, args)
        if args.profile:
            profile(ours, batch, args.device)


if __name__ == "__main__":
    run_main(main)
