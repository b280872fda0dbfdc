"""The paper's setting on one GPU: Virchow2, UNI2-h, H-optimus-1 -> ViT-B, 64 tiles a step.

    python -m extras.benchmarks.gpu                     all parts; 10 GB of disk, ten minutes or so
    python -m extras.benchmarks.gpu train loader --weights-dir W --tiles-dir T
                                                        some parts; W and T are kept, and used again
    python -m extras.benchmarks.gpu nested --profile    and the operations that take most of it
    python -m extras.benchmarks.gpu --device cpu --tiny      a minute, no GPU: shows that it runs

matmul     the rate of an 8192 x 8192 x 8192 product in bf16: what the card can do, in this run
           (always measured)
train      train.py --compile from 256 px JPEG tiles: tiles/s of its log.jsonl, TFLOP/s as a share
           of that rate (asked: >= 60 %), and peak memory
reference  against a loop written the usual way with timm: float32 teachers under autocast, nothing
           compiled, targets standardised by each batch's own statistics, .item() of every loss term
           in every step; the same tiles, heads and losses (asked: its time / ours >= 1.25)
nested     five nested dims against 768 alone (asked: <= 8 % of the step)
loader     a step on tiles on the GPU / a step from the folder, 224 and 256 px JPEG tiles
           (asked: >= 97 % of the time)

Operations are counted by torch's FlopCounterMode for one tile, 2 for a multiply-add, as in the rate
of the product: forward of the teachers; forward and backward of student and heads. Attention counts
as its two products forward and four backward, without what a fused kernel computes again.
Standardising, resizing, losses and the optimiser take time and count nothing. Ratios come from
blocks of steps in turn, in one process. Weights are random, of published size; tiles are drawn by
the benchmark, so they lie in the page cache. The ten minutes are an estimate.

    pip install timm                                    for `reference`
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train
from data import FolderTiles, batches, make_parser, path, positive, run_program
from extras.benchmarks.random_weights import write_random_weights
from extras.benchmarks.timing import (
    Seconds,
    choose_parts,
    draw_folder,
    folder_step,
    import_timm,
    interleaved,
    log_rates,
    ratios,
    spread,
    timed,
    timm_twin,
    training_step,
)
from losses import nested_loss
from student import IMAGENET, STUDENTS, Adaptors, InputError, Student, Tokens, VisionTransformer
from teachers import TEACHERS, Teacher, choose_device, load_teacher

THREE = ["virchow2", "uni2_h", "h_optimus_1"]
PARTS = ["train", "reference", "nested", "loader"]
USUAL = {"batch": 64, "rounds": 5, "block": 16, "tiles": 3000, "steps": 240, "product": 8192}
TINY = {"batch": 2, "rounds": 2, "block": 1, "tiles": 40, "steps": 3, "product": 64}


def make_small() -> None:
    """--tiny: one narrow block and small images, in the tables that train.py reads as well."""
    small = {"depth": 1, "img_size": 56, "width": 192, "heads": 3, "mlp_width": 512}
    for name in THREE:
        spec = TEACHERS[name]
        TEACHERS[name] = dataclasses.replace(spec, arch=spec.arch | small)
    STUDENTS["vit_b"] = STUDENTS["vit_b"] | small
    train.DEFAULTS["vit_b"] = train.DEFAULTS["vit_b"] | {"dims": [48, 192]}


def matmul_rate(device: torch.device, size: int) -> float:
    """TFLOP/s of a product in bf16, the median of blocks, once the clock has settled."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    product = functools.partial(torch.mm, a, b, out=out)
    rates = []
    for _ in range(40):
        rates.append(2 * size**3 / timed(product, times=20) / 1e12)
    rates = rates[10:]
    print(f"matmul: {size}^3 in bf16, TFLOP/s: {spread(rates, '.3g')} blocks of 20", flush=True)
    return statistics.median(rates)


def count_operations(names: list[str], arch: str) -> tuple[float, float]:
    """TFLOP for one tile: of the teachers' forward; of student, heads and loss, both ways."""
    targets = {}
    teacher_dims = {}
    with torch.device("meta"):  # shapes without numbers
        student = Student(arch)
        image = torch.empty(1, 3, student.img_size, student.img_size)
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            for name in names:
                vit = VisionTransformer(**TEACHERS[name].arch)
                vit(torch.empty(1, 3, vit.img_size, vit.img_size))
                teacher_dims[name] = vit.width
                patches = torch.empty(1, student.grid**2, vit.width)
                targets[name] = {"summary": torch.empty(1, vit.width), "patches": patches}
        adaptors = Adaptors(student.width, teacher_dims, train.DEFAULTS[arch]["dims"])
    with FlopCounterMode(display=False) as both:
        loss, _ = nested_loss(adaptors(student(image)), targets)
        loss.backward()
    return forward.get_total_flops() / 1e12, both.get_total_flops() / 1e12


# ---- train.py itself -----------------------------------------------------------------------------


def run_train(args: argparse.Namespace, tiles: Path, work: Path, rate: float) -> None:
    """train.py, called as it is typed, and what it achieved of the product's rate."""
    on_gpu = args.device.type == "cuda"
    flags = ["--teachers", ",".join(THREE), "--student", "vit_b", "--data", tiles]
    flags += ["--dims", ",".join(str(m) for m in args.dims), "--batch-size", args.batch]
    flags += ["--weights-dir", args.weights_dir, "--device", args.device.type]
    flags += ["--out", work / "run", "--stop-at", args.steps]
    flags += ["--log-every", 1 if args.tiny else 20]
    if on_gpu:
        flags += ["--compile"]
    if args.tiny:
        flags += ["--stats-tiles", 4]
    if args.workers is not None:
        flags += ["--workers", args.workers]
    if on_gpu:
        torch.cuda.empty_cache()  # what drawing the weights took
        torch.cuda.reset_peak_memory_stats()
    train.main(train.parse_args([str(flag) for flag in flags]))

    rates = log_rates(work / "run", 2)  # two lines hold compiling, and the clock settling
    tiles_per_s = statistics.median(rates)
    teachers, student = count_operations(THREE, "vit_b")
    achieved = tiles_per_s * (teachers + student)
    share = achieved / rate
    seconds = args.batch / tiles_per_s
    print(f"train: tiles/s {spread(rates, '.3g')} log lines; {seconds:.4f} s a step")
    print(f"  TFLOP a tile: teachers {teachers:.3f}, student and heads {student:.3f}")
    print(f"  {achieved:.3g} TFLOP/s, {share:.1%} of the product's {rate:.3g} (asked: >= 60 %)")
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 1e9
        reserved = torch.cuda.max_memory_reserved() / 1e9
        print(f"  peak memory {peak:.1f} GB, {reserved:.1f} GB with what the allocator keeps")


# ---- the usual loop ------------------------------------------------------------------------------


def run_timm(vit: nn.Module, images: Tensor, mean: Tensor, std: Tensor) -> Tokens:
    """Images uint8 (B, 3, S, S) -> tokens of a timm model."""
    tokens = vit.forward_features((images.float() / 255 - mean) / std)
    return {"summary": tokens[:, 0], "patches": tokens[:, vit.num_prefix_tokens :]}


def resample(patches: Tensor, grid: int) -> Tensor:
    """A map of patches (B, N, D_t) -> (B, grid * grid, D_t)."""
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, (side, side))
    maps = F.interpolate(maps, (grid, grid), mode="bilinear")
    return maps.flatten(2).transpose(1, 2)


def standardise_by_batch(y: Tensor) -> Tensor:
    y = y.float()
    axes = tuple(range(y.ndim - 1))
    return (y - y.mean(axes)) / (y.std(axes) + 1e-6)


class UsualLoop:
    """The loop that one would write first, with timm's models and the weights of our teachers."""

    def __init__(self, teachers: dict[str, Teacher], args: argparse.Namespace):
        device = args.device
        dtype = args.dtype
        self.device = device
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.teachers = teachers  # for their means and deviations
        self.twins = {}
        for name, teacher in teachers.items():
            with torch.device("meta"):
                twin = timm_twin(TEACHERS[name].arch)
            state = {key: value.float() for key, value in teacher.vit.state_dict().items()}
            twin.load_state_dict(state, strict=True, assign=True)
            self.twins[name] = twin.requires_grad_(False)
        torch.manual_seed(0)
        teacher_dims = {name: teacher.dim for name, teacher in teachers.items()}
        self.student = timm_twin(STUDENTS["vit_b"]).train().to(device)
        self.grid = VisionTransformer(**STUDENTS["vit_b"]).grid
        self.adaptors = Adaptors(self.student.embed_dim, teacher_dims, args.dims).to(device)
        mean, std = IMAGENET
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        self.parameters = [*self.student.parameters(), *self.adaptors.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05
        )

    @torch.no_grad()
    def teach(self, images: Tensor) -> dict[str, Tokens]:
        outputs = {}
        for name, twin in self.twins.items():
            teacher = self.teachers[name]
            with self.autocast:
                outputs[name] = run_timm(twin, images, teacher.mean, teacher.std)
            outputs[name]["patches"] = resample(outputs[name]["patches"], self.grid)
        return outputs

    def step(self, batch: dict) -> dict[str, float]:
        images = batch["image"].to(self.device)
        targets = {}
        for name, tokens in self.teach(images).items():
            targets[name] = {kind: standardise_by_batch(y) for kind, y in tokens.items()}
        self.optimizer.zero_grad()
        with self.autocast:
            predictions = self.adaptors(run_timm(self.student, images, self.mean, self.std))
            loss, terms = nested_loss(predictions, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, train.CLIP)
        self.optimizer.step()
        return {term: value.item() for term, value in terms.items()}


# ---- ratios --------------------------------------------------------------------------------------


def compare(steps: dict[str, Callable], batch: dict, args: argparse.Namespace) -> Seconds:
    """Seconds a step of each on one batch in memory, in blocks of steps in turn."""
    contenders = {}
    for name, step in steps.items():
        contenders[name] = functools.partial(timed, step, batch, times=args.block)
    interleaved(contenders, 1)  # compiles
    seconds = interleaved(contenders, args.rounds)
    for name, values in seconds.items():
        print(f"  {name}: s a step {spread(values, '.4f')} blocks of {args.block}", flush=True)
    return seconds


def compare_usual(
    ours: Callable, plain: dict[str, Teacher], batch: dict, args: argparse.Namespace
) -> None:
    """plain: our teachers once more, not compiled."""
    print("reference: the usual loop with timm / ours (asked: >= 1.25)")
    usual = UsualLoop(plain, args)
    images = batch["image"]
    for name, tokens in usual.teach(images).items():
        expected = tokens["patches"].float()
        got = plain[name](images, usual.grid)["patches"].float()
        error = (got - expected).abs().max() / expected.abs().max()
        print(f"  {name}: largest difference of patches {error:.1e} of their scale")
    eager = training_step(plain, "vit_b", args.dims, args.device, args.dtype)
    steps = {"ours": ours, "ours, not compiled": eager, "usual": usual.step}
    seconds = compare(steps, batch, args)
    for name in ("ours", "ours, not compiled"):
        print(f"  usual / {name}: {spread(ratios(seconds, 'usual', name))}", flush=True)


def compare_nested(
    ours: Callable, teachers: dict[str, Teacher], batch: dict, args: argparse.Namespace
) -> None:
    print("nested: what five dims cost above the single one (asked: <= 8 % of the step)")
    single = training_step(
        teachers, "vit_b", args.dims[-1:], args.device, args.dtype, compiled=args.compile
    )
    seconds = compare({"five": ours, "single": single}, batch, args)
    costs = [100 * (1 - ratio) for ratio in ratios(seconds, "single", "five")]
    print(f"  % of the step: {spread(costs, '.2f')}", flush=True)


def compare_loader(
    ours: Callable, tiles: dict[int, FolderTiles], batch: dict, args: argparse.Namespace
) -> None:
    on_gpu = args.device.type == "cuda"
    workers = args.workers
    if workers is None:
        workers = 8 if on_gpu else 0
    print(
        f"loader: {workers} workers; a step on tiles in memory / from the folder (asked: >= 0.97)"
    )
    contenders = {"memory": functools.partial(timed, ours, batch, times=args.block)}
    contenders["memory"]()
    for size, source in tiles.items():
        contenders[f"{size} px"] = functools.partial(
            folder_step, ours, source, args.batch, workers, args.block, pin=on_gpu
        )
    seconds = interleaved(contenders, args.rounds)
    for name, values in seconds.items():
        print(f"  {name}: {args.batch / statistics.median(values):.3g} tiles/s", flush=True)
        if name != "memory":
            print(f"    of memory's {spread(ratios(seconds, 'memory', name))}", flush=True)


def profile(step: Callable, batch: dict, device: torch.device) -> None:
    """The 25 operations that take the most time."""
    step(batch)
    with torch.profiler.profile() as profiler:  # of all devices there are
        timed(step, batch, times=3)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80))


# ---- the command line ----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.gpu", __doc__)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--device", type=path, default="cuda", help="(default: cuda; cpu only with --tiny)")
    add("--batch", type=positive, help="tiles in a step (default: 64)")
    add("--steps", type=positive, help="of train, 20 to a log line (default: 240)")
    add("--rounds", type=positive, help="of blocks in turn (default: 5)")
    add("--block", type=positive, help="steps in a block (default: 16)")
    add("--tiles", type=positive, help="JPEG tiles of each size (default: 3000)")
    add("--workers", type=int, help="that read tiles (default: as train.py)")
    add("--weights-dir", type=path, help="keeps the random weights, 10 GB (default: temporary)")
    add("--tiles-dir", type=path, help="keeps the tiles (default: temporary)")
    add("--profile", action="store_true", help="print the operations that take the most time")
    add("--tiny", action="store_true", help="small and short; its numbers mean nothing")
    args = parser.parse_args()
    args.parts = choose_parts(args.parts, PARTS)
    has_gpu = args.device.startswith("cuda") and torch.cuda.is_available()
    if not has_gpu and not args.tiny:
        raise InputError(
            "--device: this needs a CUDA GPU; --device cpu --tiny only shows that it runs"
        )
    args.device, args.dtype = choose_device(args.device, "auto")
    args.compile = args.device.type == "cuda"  # on a CPU it takes minutes and tells nothing
    for key, value in (TINY if args.tiny else USUAL).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    return args


def run_ratios(args: argparse.Namespace, folders: dict[int, Path]) -> None:
    """The parts that compare steps within this process."""
    load = functools.partial(
        load_teacher, weights_dir=args.weights_dir, device=args.device, dtype=args.dtype
    )
    teachers = {name: load(name) for name in THREE}
    crop = STUDENTS["vit_b"]["img_size"]
    tiles = {size: FolderTiles(folder, crop, 0) for size, folder in folders.items()}
    batch = next(batches(tiles[256], range(args.batch), args.batch))
    batch["image"] = batch["image"].to(args.device)
    ours = training_step(
        teachers, "vit_b", args.dims, args.device, args.dtype, compiled=args.compile
    )
    if "reference" in args.parts:
        compare_usual(ours, {name: load(name) for name in THREE}, batch, args)
    if "nested" in args.parts:
        compare_nested(ours, teachers, batch, args)
    if "loader" in args.parts:
        compare_loader(ours, tiles, batch, args)
    if args.profile:
        profile(ours, batch, args.device)


def main() -> None:
    """The command line."""
    args = parse_args()
    # Otherwise, at its limit of recompiling, torch goes on uncompiled, and nobody knows
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if args.tiny:
        make_small()
    args.dims = train.DEFAULTS["vit_b"]["dims"]
    if "reference" in args.parts:
        import_timm()  # its absence shows now, not in minutes
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.dtype}, batch {args.batch}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        args.weights_dir = Path(args.weights_dir or work / "weights")
        tiles_dir = Path(args.tiles_dir or work / "tiles")
        folders = {}
        for size in (224, 256):
            folders[size] = draw_folder(tiles_dir / str(size), args.tiles, size)
        for teacher in THREE:
            write_random_weights(teacher, args.weights_dir, args.device)
        rate = matmul_rate(args.device, args.product)
        if "train" in args.parts:
            run_train(args, folders[256], work, rate)
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()
        if args.parts != ["train"] or args.profile:
            run_ratios(args, folders)


if __name__ == "__main__":
    run_program(main)
