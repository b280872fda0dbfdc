"""Real tiles through kaiko-eva: are the features that it computes from student.pt ours, at full width and cut?

    python tests/bench_eva.py --eva EVA_VENV/bin/eva --eva-source EVA --tiles TILES [--run runs/NAME] [--dim 96]

runs in this project's environment. EVA_VENV is another one, made as tests/eva.yaml says, and EVA a checkout of
github.com/kaiko-ai/eva at its version (the wheel has no configs). TILES holds at least 400 images of 224 x 224 px, of
at least four kinds, named KIND_NUMBER. They are laid out as BACH, whose loader insists on 400 images in four classes,
so the metrics are those of this task, not of BACH. Without --run the student is a ViT-S with random weights. Tiles of
224 px, because eva shrinks bilinearly and we bicubically: only there do both see the same pixels. Exit code 1:
features differ by more than 1e-4. One CPU core needs about ten minutes.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, randomise
from PIL import Image

from evaluate import embed, load_student
from student import STUDENTS, Student

VITS = {"vit_b": "vit_base_patch14_reg4_dinov2", "vit_s": "vit_small_patch14_reg4_dinov2"}
CLASSES = ("Benign", "InSitu", "Invasive", "Normal")  # BACH's folders
N_TILES, TOLERANCE = 400, 1e-4


def lay_out(tiles: Path, root: Path) -> Path:
    """400 tiles of four kinds in turn, laid out as BACH -> the folder of its classes."""
    kinds: dict[str, list[Path]] = {}
    for file in sorted(
        path for path in tiles.rglob("*.*") if path.suffix in (".jpg", ".png", ".tif")
    ):
        kinds.setdefault(file.stem.rpartition("_")[0], []).append(file)
    chosen = dict(zip(CLASSES, (kinds[name] for name in sorted(kinds))))
    in_turn = [
        (name, f) for row in zip_longest(*chosen.values()) for name, f in zip(chosen, row) if f
    ][:N_TILES]
    if len(chosen) < len(CLASSES) or len(in_turn) < N_TILES:
        sys.exit(
            f"{tiles} has not the {N_TILES} images of four kinds, named KIND_NUMBER, that this check needs"
        )
    photos = root / "ICIAR2018_BACH_Challenge" / "Photos"
    for i, (name, file) in enumerate(in_turn):
        (photos / name).mkdir(parents=True, exist_ok=True)
        image = Image.open(file).convert("RGB")
        if image.size != (224, 224):
            sys.exit(
                f"{file} is not of 224 x 224 px; there, resizing would differ and not the features"
            )
        image.save(photos / name / f"{i:03d}.tif")
    return photos


def run_eva(
    args: argparse.Namespace, student: Path, vit: str, width: int, name: str, work: Path
) -> Path:
    """One benchmark, as the documented command does it. -> the folder with the embeddings that eva wrote."""
    knobs = {
        "STUDENT": student,
        "VIT": vit,
        "IN_FEATURES": width,
        "MODEL_NAME": name,
        "DATA_ROOT": work / "bach",
    }
    knobs |= {
        "EMBEDDINGS_ROOT": work / "embeddings",
        "OUTPUT_ROOT": work / "logs" / name,
        "N_RUNS": 1,
    }
    knobs |= {
        "MAX_STEPS": args.steps,
        "N_DATA_WORKERS": 1,
        "TQDM_REFRESH_RATE": 0,
        "ACCELERATOR": "cpu",
    }
    config = args.eva_source / "configs/vision/pathology/offline/classification/bach.yaml"
    backbone = (ROOT / "tests" / "eva.yaml").read_text()
    command = [
        args.eva,
        "predict_fit",
        "--config",
        config,
        "--trainer.callbacks.backbone",
        backbone,
    ]
    environment = os.environ | {key: str(value) for key, value in knobs.items()}
    try:
        done = subprocess.run(
            command, check=False, env=environment, capture_output=True, text=True, timeout=3600
        )
    except (
        subprocess.TimeoutExpired
    ) as error:  # eva waits for its writer for ever where its main process has failed
        sys.exit(f"eva is not done after an hour:\n{(error.stderr or b'').decode()[-4000:]}")
    if done.returncode:
        sys.exit(
            f"eva ended with exit code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return work / "embeddings" / name / "bach"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--eva", required=True, help="the eva program of its environment")
    parser.add_argument(
        "--eva-source", required=True, type=Path, help="a checkout of eva, for its configs"
    )
    parser.add_argument("--tiles", required=True, type=Path)
    parser.add_argument(
        "--run", help="a run folder or a student.pt of a vit_b or vit_s (default: random ViT-S)"
    )
    parser.add_argument("--dim", type=int, default=96, help="the smaller dim (default: 96)")
    parser.add_argument(
        "--steps", type=int, default=200, help="of eva's linear probe (default: 200)"
    )
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.run:
            student, config = load_student(args.run)
        else:
            config = {
                "student": "vit_s",
                "arch": STUDENTS["vit_s"],
                "nested_dims": [24, 48, 96, 192, 384],
            }
            config |= {"step": 1, "steps": 1, "teachers": []}
            student = randomise(Student(config["arch"], {}, config["nested_dims"]))
        width = student.backbone.width
        vit = VITS.get(config["student"]) or sys.exit(
            f"{args.run} sees no tiles of 224 px; give a vit_b or vit_s"
        )
        photos = lay_out(args.tiles, work / "bach")
        equal = True
        for dim in (width, args.dim):
            file = work / f"student-{dim}.pt"
            if dim == width:
                torch.save({"state_dict": student.backbone.state_dict(), "config": config}, file)
            else:  # as the README says; eva's z is then z[:dim], and zeros
                cut = [
                    ROOT / "evaluate.py",
                    work / f"student-{width}.pt",
                    "--dim",
                    str(dim),
                    "--out",
                    file,
                ]
                subprocess.run([sys.executable, *cut], check=True)
            began = time.monotonic()
            written = run_eva(args, file, vit, width, f"dim-{dim}", work)
            seconds = time.monotonic() - began
            with open(written / "manifest.csv", newline="") as manifest:
                rows = list(csv.DictReader(manifest))
            theirs = torch.stack(
                [torch.load(written / row["embeddings"], weights_only=True)[0] for row in rows]
            )
            pixels = [np.asarray(Image.open(photos / row["origin"])) for row in rows]
            ours = embed(student, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
            difference = (theirs[:, :dim] - ours[:, :dim]).abs().max().item()
            rest = theirs[:, dim:].abs().max().item() if dim < width else 0.0
            equal &= (
                len(rows) == N_TILES and difference <= TOLERANCE and rest <= TOLERANCE
            )  # NaN is not equal
            print(
                f"dim {dim}: {len(rows)} tiles in {seconds:.0f} s; largest difference {difference:.1e}",
                end="",
            )
            print(
                f", beyond the cut {rest:.1e}; z varies over tiles by {ours[:, :dim].std(0).mean():.2f}"
            )
            results = json.loads(
                next((work / "logs" / f"dim-{dim}").rglob("results.json")).read_text()
            )
            for name, value in results["metrics"]["val"][0].items():
                print(f"    {name} {value['mean']:.4f}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
