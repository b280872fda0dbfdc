"""Random weights in the published layout: the whole path of published teachers, without access.

    python -m extras.benchmarks.random_weights uni virchow --out random-weights
    python train.py --teachers uni,virchow --weights-dir random-weights --data tiles/ --steps 2

The files have the published size in fp32 (UNI 1.2 GB, Virchow 2.5 GB, H-optimus-1 4.5 GB); a
gigabyte takes about ten seconds. What such a run learns means nothing.
"""

from pathlib import Path

import torch

from data import make_parser, path, run_program, save_atomically
from student import VisionTransformer
from teachers import OFFLINE, TEACHERS


def write_random_weights(name: str, folder: str | Path, device: str | torch.device = "cpu") -> Path:
    """A teacher's file of random weights, as folder/NAME.bin; one that is there is kept."""
    file = Path(folder, f"{name}.bin")
    if file.exists():
        return file
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws a billion numbers in no time
        vit = VisionTransformer(**TEACHERS[name].arch)
    save_atomically(vit.cpu().state_dict(), file)
    return file


def main() -> None:
    """The command line."""
    published = [name for name in TEACHERS if name not in OFFLINE]
    parser = make_parser("python -m extras.benchmarks.random_weights", __doc__)
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", choices=published, help=f"of {', '.join(published)}")
    add("--out", type=path, default="random-weights", help="the folder (default: random-weights)")
    args = parser.parse_args()
    for name in args.names:
        file = write_random_weights(name, args.out)
        print(f"{file}: {file.stat().st_size / 1e9:.1f} GB of random weights", flush=True)


if __name__ == "__main__":
    run_program(main)
