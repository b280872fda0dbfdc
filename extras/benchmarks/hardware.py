"""Time and memory on hardware that was not at hand: counted on a CPU, not measured on a card.

    python -m extras.benchmarks.hardware      four settings, minutes on a CPU
    python -m extras.benchmarks.hardware --teachers midnight,openpath --tiles 4000 --card T4

The second is for tiles of your own: steps, hours, memory, and the size of a cache.

Time: operations of a tile (torch's FlopCounterMode, 2 for a multiply-add: forward of the teachers;
forward and backward of student, heads and loss) over 40 % of the card's dense peak in fp16 or bf16.
The 40 % are an assumption; gpu.py measures the share on a card. Memory at 64 tiles: what autograd
keeps for the backward pass under bf16 autocast (counted on a CPU at 2 and 4 tiles, then a straight
line); the teachers in bf16; student and heads with gradients and AdamW's moments in float32.
Temporaries and the allocator's own share are not in it. Cache: what `python -m extras.cache` would
write, and the hours with it: its teachers run once a tile instead of once a tile and epoch.
"""

from argparse import Namespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import make_parser, name_list, positive, run_program
from extras.benchmarks.gpu import THREE, count_operations
from losses import nested_loss
from student import Adaptors, Student, VisionTransformer, millions
from teachers import TEACHERS, check_names
from train import DEFAULTS, MANY_EPOCHS

SHARE = 0.4  # of the peak; an assumption
TILES = 64  # a step
PEAKS = {"T4": 65, "RTX 4090": 165, "A100": 312, "H100": 989}  # TFLOP/s, dense, as the makers say
GIGABYTES = {"T4": 16, "RTX 4090": 24, "A100": 80, "H100": 80}  # of memory; an A100 may have 40


class Setting(NamedTuple):
    card: str
    cards: int
    teachers: list[str]
    student: str
    tiles: int  # that there are
    steps: int
    batch_size: int


SETTINGS = [
    Setting("T4", 1, ["phikon", "kaiko_b16"], "vit_s", 100_000, 20_000, 64),
    Setting("RTX 4090", 1, THREE, "vit_b", 1_000_000, 100_000, 64),
    Setting("H100", 1, THREE, "vit_b", 1_000_000, 100_000, 64),
    Setting("H100", 16, THREE, "vit_b", 1_000_000, 20_000, 1024),
]


def kept_bytes(student: Student, adaptors: Adaptors, teacher_dims: dict, tiles: int) -> int:
    """Bytes that autograd keeps for the backward pass of so many tiles, but the parameters."""
    parameters = set()
    for module in (student, adaptors):
        for p in module.parameters():
            parameters.add(p.untyped_storage().data_ptr())
    kept = {}  # {place of a storage: bytes}, each storage once

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x  # which also keeps it, so that no other takes its place

    images = torch.rand(tiles, 3, student.img_size, student.img_size)
    targets = {}
    for t, D_t in teacher_dims.items():
        patches = torch.randn(tiles, student.grid**2, D_t)
        targets[t] = {"summary": torch.randn(tiles, D_t), "patches": patches}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            predictions = adaptors(student(images))
        loss, _ = nested_loss(predictions, targets)
    assert loss.requires_grad
    return sum(size for place, size in kept.items() if place not in parameters)


def estimate_memory(names: list[str], arch: str) -> str:
    """GB of a step of 64 tiles, and its parts, as text."""
    with torch.device("meta"):
        vits = {name: VisionTransformer(**TEACHERS[name].arch) for name in names}
    teacher_dims = {name: vit.width for name, vit in vits.items()}
    torch.manual_seed(0)
    student = Student(arch)
    adaptors = Adaptors(student.width, teacher_dims, DEFAULTS[arch]["dims"])
    two = kept_bytes(student, adaptors, teacher_dims, 2)
    four = kept_bytes(student, adaptors, teacher_dims, 4)
    kept = (two + (four - two) * (TILES - 2) / 2) / 1e9
    frozen = sum(millions(vit) for vit in vits.values()) * 2e-3  # bf16
    learning = millions(nn.Sequential(student, adaptors)) * 16e-3  # four times float32
    total = kept + frozen + learning
    parts = f"kept {kept:.1f}, teachers {frozen:.1f}, student and heads {learning:.1f}"
    return f"{total:.1f} GB ({parts})"


def cached_bytes(names: list[str], arch: str) -> int:
    """What extras.cache keeps of a tile: a summary and the student's grid of patches, in fp16."""
    tokens = 1 + Student(arch).grid ** 2
    width = sum(TEACHERS[name].arch["width"] for name in names)
    return 2 * tokens * width


def estimate(setting: Setting, memory: str) -> list[str]:
    """What a setting comes to, in lines. memory: of one card, see estimate_memory."""
    teachers, own = count_operations(setting.teachers, setting.student)  # TFLOP a tile
    rate = SHARE * PEAKS[setting.card] * setting.cards * 3600  # TFLOP an hour
    seen = setting.steps * setting.batch_size
    cached = min(seen, setting.tiles)
    gigabytes = setting.tiles * cached_bytes(setting.teachers, setting.student) / 1e9
    epochs = seen / setting.tiles
    return [
        f"{setting.cards} {setting.card}: {','.join(setting.teachers)} -> {setting.student}",
        f"  {setting.tiles:,} tiles, {setting.steps:,} steps of {setting.batch_size}: "
        f"{epochs:.1f} epochs",
        f"  {teachers + own:.3f} TFLOP a tile, {teachers / (teachers + own):.0%} of it teachers: "
        f"{seen * (teachers + own) / rate:.1f} h",
        f"  with extras.cache: {gigabytes:.1f} GB on disk, "
        f"{(cached * teachers + seen * own) / rate:.1f} h",
        f"  at {TILES} tiles a pass, of the card's {GIGABYTES[setting.card]} GB: {memory}",
    ]


def read_setting(args: Namespace) -> Setting:
    """The setting that the flags describe: at most MANY_EPOCHS epochs of the tiles."""
    check_names(args.teachers)
    batch_size = DEFAULTS[args.student]["batch_size"]
    steps = args.steps
    if steps is None:
        few = max(1, MANY_EPOCHS * args.tiles // batch_size)
        steps = min(few, DEFAULTS[args.student]["steps"])
    return Setting(args.card, 1, args.teachers, args.student, args.tiles, steps, batch_size)


def main() -> None:
    """The command line."""
    parser = make_parser("python -m extras.benchmarks.hardware", __doc__)
    parser.add_argument("--teachers", type=name_list, help="of teachers.py; asks for one setting")
    text = "(default: vit_s; train.py's own is vit_b)"
    parser.add_argument("--student", choices=["vit_s", "vit_b"], default="vit_s", help=text)
    parser.add_argument("--tiles", type=positive, default=100_000, help="that you have")
    text = f"(default: {MANY_EPOCHS} epochs, at most the student's own)"
    parser.add_argument("--steps", type=positive, help=text)
    parser.add_argument("--card", choices=PEAKS, default="T4")
    parser.add_argument("--tiny", action="store_true", help="the first setting alone")
    args = parser.parse_args()
    settings = SETTINGS[:1] if args.tiny else SETTINGS
    if args.teachers:
        settings = [read_setting(args)]
    print("counting on a CPU, a minute or two a setting", flush=True)
    memory = {}
    for setting in settings:
        models = (*setting.teachers, setting.student)
        if models not in memory:
            memory[models] = estimate_memory(setting.teachers, setting.student)
        print("\n".join(estimate(setting, memory[models])), flush=True)


if __name__ == "__main__":
    run_program(main)
