"""Time and memory on hardware that was not at hand: counted on a CPU, not measured on a card.

    python -m extras.benchmarks.hardware            20 s on a CPU: the README's estimated rows
    python -m extras.benchmarks.hardware --tiny     the first row alone

Time: operations of a tile (torch's FlopCounterMode, 2 for a multiply-add: forward of the teachers;
forward and backward of student, heads and loss) over 40 % of the card's dense peak in fp16 or bf16.
The 40 % are an assumption; gpu.py measures the share on a card. Memory at 64 tiles: what autograd
keeps for the backward pass under bf16 autocast (counted on a CPU at 2 and 4 tiles, then a straight
line); the teachers in bf16; student and heads with gradients and AdamW's moments in float32.
Temporaries and the allocator's own share are not in it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import make_parser, run_program
from extras.benchmarks.gpu import THREE, count_operations
from losses import nested_loss
from student import Adaptors, Student, VisionTransformer, millions
from teachers import TEACHERS
from train import DEFAULTS

SHARE = 0.4  # of the peak; an assumption
TILES = 64  # a step


class Row(NamedTuple):
    card: str
    peak: float  # TFLOP/s
    cards: int
    teachers: list[str]
    student: str
    tiles: int  # in the whole run


ROWS = [
    Row("T4", 65, 1, ["phikon", "kaiko_b16"], "vit_s", 20_000 * 64),
    Row("RTX 4090", 165, 1, THREE, "vit_b", 100_000 * 64),
    Row("H100, H200", 989, 1, THREE, "vit_b", 100_000 * 64),
    Row("16 H100", 989, 16, THREE, "vit_b", 20_000 * 1024),
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


def main() -> None:
    """The command line."""
    parser = make_parser("python -m extras.benchmarks.hardware", __doc__)
    parser.add_argument("--tiny", action="store_true", help="the first row alone")
    args = parser.parse_args()
    memory = {}
    for row in ROWS[:1] if args.tiny else ROWS:
        teachers, own = count_operations(row.teachers, row.student)
        tflop = teachers + own
        hours = row.tiles * tflop / (SHARE * row.peak * row.cards) / 3600
        setting = f"{','.join(row.teachers)} -> {row.student}"
        if setting not in memory:
            memory[setting] = estimate_memory(row.teachers, row.student)
        print(f"{row.card}: {setting}, {row.tiles:,} tiles: {tflop:.3f} TFLOP a tile,", end=" ")
        share = teachers / tflop
        print(f"{share:.0%} of it teachers; {hours:.1f} h; {memory[setting]}", flush=True)


if __name__ == "__main__":
    run_program(main)
