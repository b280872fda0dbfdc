"""What another magnification does, as a toy figure: a student of drawn tissue, asked about tissue that is drawn larger.

    python tests/magnification.py runs/demo     # a minute

kNN accuracy on 1024 tiles, the bank of 1024 at the scale of training. At twice the scale a tile shows a quarter of the
tissue; "resampled" is the same drawing shrunk to the scale of training, as a tile of a finer scan should be.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import draw_tissue
from evaluate import embed, knn
from student import load_student


def tiles(stream: str, scale: float, resampled: bool, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> images uint8 (n, 3, 64, 64), labels (n, 2) of cells and tissue."""
    images, labels, size = [], [], round(64 * scale)
    for drawn, *its_labels, _ in (draw_tissue(stream, 0, k, size) for k in range(n)):
        edge = (size - 64) // 2
        view = (
            Image.fromarray(drawn).resize((64, 64))
            if resampled
            else drawn[edge : edge + 64, edge : edge + 64]
        )
        images.append(np.asarray(view))
        labels.append(its_labels)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--tiles", type=int, default=1024)
    args = parser.parse_args()
    student, _ = load_student(args.run)
    images, bank_y = tiles("bank", 1, False, args.tiles)
    bank = embed(student, images)
    for scale, resampled in ((1, False), (1.41, False), (2, False), (2, True)):
        images, y = tiles("test", scale, resampled, args.tiles)
        z = embed(student, images)
        cells, tissue = (100 * knn(bank, bank_y[:, i], z, y[:, i])["accuracy"] for i in range(2))
        print(
            f"{scale} x{', resampled' * resampled}: cells {cells:.1f} %, tissue {tissue:.1f} %",
            flush=True,
        )
