"""What another magnification does: a student of drawn tissue, asked about tissue drawn larger.

    python -m extras.benchmarks.magnification runs/demo     a minute on 2 CPU cores
    python -m extras.benchmarks.magnification runs/demo --tiles 64

kNN accuracy on 1024 tiles; the bank of 1024 is at the scale of training. At twice the scale a tile
shows a quarter of the tissue; "resampled" is the same drawing shrunk to the scale of training, as a
tile of a finer scan should be. A toy, which shows the kind of damage and no size of it.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import draw_tissue, make_parser, positive, run_program
from evaluate import embed, figures_of, knn, load_student
from student import InputError

SIDE = 64  # pixels of a tile


def draw(stream: str, scale: float, resampled: bool, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles at a scale -> images uint8 (n, 3, 64, 64), cells (n,), tissue (n,)."""
    size = round(SIDE * scale)
    edge = (size - SIDE) // 2
    images = []
    all_cells = []
    all_tissue = []
    for k in range(n):
        image, cells, tissue, _ = draw_tissue(stream, 0, k, size)
        if resampled:
            image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE)))
        else:
            image = image[edge : edge + SIDE, edge : edge + SIDE]
        images.append(image)
        all_cells.append(cells)
        all_tissue.append(tissue)
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return images, torch.tensor(all_cells), torch.tensor(all_tissue)


def main() -> None:
    """The command line."""
    parser = make_parser("python -m extras.benchmarks.magnification", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder or a student.pt, of the toy")
    parser.add_argument("--tiles", type=positive, default=1024, help="(default: 1024)")
    args = parser.parse_args()
    student, _ = load_student(args.run)
    if student.img_size != SIDE:
        raise InputError(f"RUN: {args.run} sees tiles of {student.img_size} px; give a toy student")
    images, bank_cells, bank_tissue = draw("bank", 1, False, args.tiles)
    bank = embed(student, images)
    for scale, resampled in ((1, False), (1.41, False), (2, False), (2, True)):
        images, test_cells, test_tissue = draw("test", scale, resampled, args.tiles)
        z = embed(student, images)
        cells = 100 * figures_of(knn(bank, bank_cells, z, test_cells))["accuracy"]
        tissue = 100 * figures_of(knn(bank, bank_tissue, z, test_tissue))["accuracy"]
        name = f"{scale} x, resampled" if resampled else f"{scale} x"
        print(f"{name}: cells {cells:.1f} %, tissue {tissue:.1f} %", flush=True)


if __name__ == "__main__":
    run_program(main)
