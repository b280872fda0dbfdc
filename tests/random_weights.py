"""Random weights in the published layout, to try the whole path of published teachers without access to any of them.

    python tests/random_weights.py uni virchow --out random-weights
    python train.py --teachers uni,virchow --weights-dir random-weights --data tiles/ --steps 2

The files have the published size (fp32: UNI 1.2 GB, Virchow 2.5 GB). What such a run learns means nothing.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from student import VisionTransformer
from teachers import TEACHERS

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "names", nargs="+", choices=[name for name, spec in TEACHERS.items() if not spec.task]
    )
    parser.add_argument("--out", type=Path, default=Path("random-weights"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        torch.manual_seed(0)
        path = args.out / f"{name}.bin"
        torch.save(VisionTransformer(**TEACHERS[name].arch).state_dict(), path)
        print(f"{path}: {path.stat().st_size / 1e9:.1f} GB of random weights")
