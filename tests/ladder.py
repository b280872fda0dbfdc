"""The estimated rows of the README's ladder of hardware, counted without a GPU and never measured on one.

    python tests/ladder.py     # 15 s on a CPU

Time: operations of a tile (torch's FlopCounterMode, 2 for a multiply-add: forward of the teachers; forward and backward
of student, heads and loss) over 40 % of the card's dense peak in fp16 or bf16, an assumption. Memory at 64 tiles: what
autograd keeps for the backward pass under bf16 autocast (counted on a CPU at 2 and 4 tiles, then a straight line), the
teachers in bf16, student and heads with gradients and AdamW's moments in float32. Temporaries and the allocator's own
share are not in it.
"""

import torch
from bench_gpu import count_operations
from conftest import ROOT  # noqa: F401 - puts the repo on the path

from losses import Distiller
from student import Student, VisionTransformer, millions
from teachers import TEACHERS
from train import DEFAULTS

THREE = ["virchow2", "uni2_h", "h_optimus_1"]
ROWS = [  # card, its peak in TFLOP/s, cards, teachers, student, tiles in the run
    ("T4", 65, 1, ["phikon", "kaiko_b16"], "vit_s", 20_000 * 64),
    ("RTX 4090", 165, 1, THREE, "vit_b", 100_000 * 64),
    ("H100, H200", 989, 1, THREE, "vit_b", 100_000 * 64),
    ("16 H100", 989, 16, THREE, "vit_b", 20_000 * 1024),
]
SHARE = 0.4


def kept(model: Distiller, teacher_dims: dict[str, int], tiles: int) -> int:
    """Bytes that autograd keeps for the backward pass of so many tiles, each storage once, the parameters left out."""
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x  # which also keeps it, so that no other takes its place

    vit = model[0].backbone
    images, n = torch.rand(tiles, 3, vit.img_size, vit.img_size), vit.grid**2
    targets = {
        t: {"summary": torch.randn(tiles, D), "patches": torch.randn(tiles, n, D)}
        for t, D in teacher_dims.items()
    }
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", torch.bfloat16),
    ):
        loss, _ = model(images, targets)
    assert loss.requires_grad
    return sum(size for place, size in seen.items() if place not in own)


if __name__ == "__main__":
    memory = {}
    for card, peak, cards, names, student, tiles in ROWS:
        teachers, own = count_operations(names, student)
        hours = tiles * (teachers + own) / (SHARE * peak * cards) / 3600
        if (key := (*names, student)) not in memory:
            with torch.device("meta"):
                vits = {name: VisionTransformer(**TEACHERS[name].arch) for name in names}
            dims = {name: vit.width for name, vit in vits.items()}
            torch.manual_seed(0)
            model = Distiller(Student(student, dims, DEFAULTS[student]["dims"]))
            two, four = (kept(model, dims, n) for n in (2, 4))
            parts = (
                (two + (four - two) * 31) / 1e9,
                sum(map(millions, vits.values())) * 2e-3,
                millions(model) * 16e-3,
            )
            memory[key] = (
                "{:.1f} GB (kept {:.1f}, teachers {:.1f}, student and heads {:.1f})".format(
                    sum(parts), *parts
                )
            )
        text = (
            f"{teachers + own:.3f} TFLOP a tile, {teachers / (teachers + own):.0%} of it teachers"
        )
        print(
            f"{card}: {','.join(names)} -> {student}, {tiles:,} tiles: {text}; {hours:.1f} h; {memory[key]}",
            flush=True,
        )
