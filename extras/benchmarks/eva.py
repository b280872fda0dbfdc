"""Are the features that kaiko-eva computes from an exported student ours, whole and cut?

    python -m extras.benchmarks.eva --eva EVA_VENV/bin/eva --eva-source EVA --tiles TILES
        [--run runs/NAME] [--dim 96]                            ten minutes on one CPU core

runs in this project's environment; kaiko-eva needs one of its own, EVA_VENV, made as eva.yaml says,
and a checkout EVA of github.com/kaiko-ai/eva at its version (the package has no configs).

TILES holds at least 400 images of 224 x 224 px, of at least four kinds, named KIND_NUMBER. They are
laid out as BACH, whose loader insists on 400 images in four classes, so the metrics are those of
this task, not of BACH. Tiles of 224 px, because eva shrinks bilinearly and we bicubically: only
there do both see the same pixels. Without --run the student is a ViT-S with random weights. Exit
code 1: features differ by more than 1e-5.
"""

import argparse
import csv
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import make_parser, path, positive, run_program
from evaluate import embed, load_student
from extras.benchmarks.timing import random_student
from extras.export import export
from student import InputError, Student

HERE = Path(__file__).parent
CONFIG = "configs/vision/pathology/offline/classification/bach.yaml"
CLASSES = ("Benign", "InSitu", "Invasive", "Normal")  # BACH's folders
N_TILES = 400
SIDE = 224  # px of a tile
TOLERANCE = 1e-5
HOUR = 3600


# ---- tiles ---------------------------------------------------------------------------------------


def choose_tiles(tiles: Path) -> list[tuple[str, Path]]:
    """400 tiles of four kinds in turn -> [(class of BACH, file), ...]."""
    kinds = {}
    for file in sorted(tiles.rglob("*.*")):
        if file.suffix in (".jpg", ".png", ".tif"):
            kinds.setdefault(file.stem.rpartition("_")[0], []).append(file)
    chosen = []
    most = max((len(files) for files in kinds.values()), default=0)
    for place in range(most):
        for name, kind in zip(CLASSES, sorted(kinds), strict=False):  # the first four
            if place < len(kinds[kind]):
                chosen.append((name, kinds[kind][place]))
    if len(kinds) < len(CLASSES) or len(chosen) < N_TILES:
        raise InputError(
            f"--tiles: {tiles} has not {N_TILES} images of four kinds, named KIND_NUMBER; give more"
        )
    return chosen[:N_TILES]


def lay_out(tiles: Path, root: Path) -> Path:
    """The tiles as BACH has its own -> the folder of its classes."""
    photos = root / "ICIAR2018_BACH_Challenge" / "Photos"
    for i, (name, file) in enumerate(choose_tiles(tiles)):
        image = Image.open(file).convert("RGB")
        if image.size != (SIDE, SIDE):
            raise InputError(f"--tiles: {file} is not of 224 x 224 px; give tiles of that size")
        (photos / name).mkdir(parents=True, exist_ok=True)
        image.save(photos / name / f"{i:03d}.tif")
    return photos


# ---- eva -----------------------------------------------------------------------------------------


def run_eva(args: argparse.Namespace, folder: Path, dim: int, name: str, work: Path) -> Path:
    """One benchmark, as the documented command does it -> the folder of the embeddings."""
    knobs = {
        "STUDENT": folder,
        "IN_FEATURES": dim,
        "MODEL_NAME": name,
        "DATA_ROOT": work / "bach",
        "EMBEDDINGS_ROOT": work / "embeddings",
        "OUTPUT_ROOT": work / "logs" / name,
        "N_RUNS": 1,
        "MAX_STEPS": args.steps,
        "N_DATA_WORKERS": 1,
        "TQDM_REFRESH_RATE": 0,
        "ACCELERATOR": "cpu",
    }
    environment = os.environ | {key: str(value) for key, value in knobs.items()}
    command = [args.eva, "predict_fit", "--config", str(Path(args.eva_source, CONFIG))]
    command += ["--trainer.callbacks.backbone", (HERE / "eva.yaml").read_text()]
    try:
        done = subprocess.run(
            command, check=False, env=environment, capture_output=True, text=True, timeout=HOUR
        )
    except subprocess.TimeoutExpired:  # it waits for its writer for ever where its main one failed
        raise InputError(f"--eva: {args.eva} is not done after an hour; try it by hand") from None
    if done.returncode:
        print(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        raise InputError(f"--eva: {args.eva} ended with exit code {done.returncode}; see above")
    return work / "embeddings" / name / "bach"


def compare(written: Path, photos: Path, student: Student, dim: int) -> bool:
    """Print how far eva's embeddings are from ours -> whether they are equal."""
    with open(written / "manifest.csv", newline="") as manifest:
        rows = list(csv.DictReader(manifest))
    theirs = []
    pixels = []
    for row in rows:
        theirs.append(torch.load(written / row["embeddings"], weights_only=True)[0])
        pixels.append(np.asarray(Image.open(photos / row["origin"])))
    theirs = torch.stack(theirs)  # (400, D)
    ours = embed(student, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))[:, :dim]
    if theirs.shape != ours.shape:
        print(f"  {tuple(theirs.shape)} embeddings, of ours {tuple(ours.shape)}")
        return False
    difference = (theirs - ours).abs().max().item()
    varies = ours.std(0).mean()
    print(f"  {len(rows)} tiles, largest difference {difference:.1e};")
    print(f"  a channel varies over tiles by {varies:.2f}")
    return len(rows) == N_TILES and difference <= TOLERANCE


def print_metrics(logs: Path) -> None:
    """What eva's own linear probe found."""
    [results] = logs.rglob("results.json")
    for name, value in json.loads(results.read_text())["metrics"]["val"][0].items():
        print(f"    {name} {value['mean']:.4f}")


# ---- the command line ----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.eva", __doc__)
    add = parser.add_argument
    add("--eva", type=path, required=True, help="the eva program of its environment")
    add("--eva-source", type=path, required=True, help="a checkout of eva, for its configs")
    add("--tiles", type=path, required=True, help="400 images of 224 px, named KIND_NUMBER")
    add("--run", type=path, help="a run folder or student.pt of a vit_b or vit_s (default: random)")
    add("--dim", type=positive, default=96, help="the smaller dim (default: 96)")
    add("--steps", type=positive, default=200, help="of eva's linear probe (default: 200)")
    args = parser.parse_args()
    if not Path(args.eva).exists():
        raise InputError(
            f"--eva: {args.eva} does not exist; in an environment of its own: "
            "pip install 'kaiko-eva[vision]' 'jsonargparse<4.51' 'timm>=1.0.16' openslide-bin"
        )
    if not Path(args.eva_source, CONFIG).exists():
        raise InputError(f"--eva-source: {args.eva_source} has no {CONFIG}; give a checkout of eva")
    return args


def main() -> int:
    """The command line."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if not args.run:
            args.run = work / "random.pt"
            random_student("vit_s", args.run)
        student, _ = load_student(args.run)
        if student.img_size != SIDE:
            raise InputError(f"--run: {args.run} sees no tiles of 224 px; give a vit_b or vit_s")
        photos = lay_out(Path(args.tiles), work / "bach")
        equal = True
        for dim in (student.width, args.dim):
            name = f"dim-{dim}"
            export(args.run, work / name, dim)
            began = time.monotonic()
            written = run_eva(args, work / name, dim, name, work)
            print(f"dim {dim}: {time.monotonic() - began:.0f} s", flush=True)
            equal &= compare(written, photos, student, dim)
            print_metrics(work / "logs" / name)
    return 0 if equal else 1


if __name__ == "__main__":
    run_program(main)
