"""Write a student as a folder that timm opens, whole or cut to its first channels.

    python -m extras.export runs/demo student/                the whole embedding
    python -m extras.export runs/demo --dim 16 student-16/    its first 16 channels, as 16 numbers

    timm.create_model("local-dir:student-16", pretrained=True)        timm >= 1.0.16, nothing else

The folder holds model.safetensors, config.json (timm's, with the input's size, mean, std and
resampling; what timm does not know stands under "pathryoshka") and README.md, a model card for
Hugging Face. Uploaded as it is, it opens as "hf-hub:USER/NAME". Read the card before: it names
your folders of tiles, and the licences of the teachers may not let you share the student at all.

A cut student has zeros in its final norm from channel M on, and a head that passes the first M on:
so timm returns M numbers, or with num_classes=0 all channels, of which the rest is zero. The folder
is a RUN for evaluate.py, and something to begin from for `train.py --init`.

    pip install safetensors
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch

from data import make_parser, path, positive, run_program, save_atomically, sync_folder
from evaluate import load_student
from extras.card import model_card
from student import IMAGENET, InputError, Student, millions
from teachers import read_weights, student_file

# Of timm's entries those that differ least; config.json overrides what does
ENTRIES = {"vit_b": "vit_base_patch14_reg4_dinov2", "vit_s": "vit_small_patch14_reg4_dinov2"}
PLAIN = "vit_base_patch16_224"  # its blocks have no LayerScale


# ---- what the files hold -------------------------------------------------------------------------


def cut_weights(student: Student, dim: int) -> dict[str, torch.Tensor]:
    """The state dict of timm's model: of the backbone, and of a head where `dim` is a cut."""
    state = student.backbone.state_dict()
    width = student.backbone.width
    if dim < width:
        for key in ("norm.weight", "norm.bias"):
            state[key] = state[key].clone()
            state[key][dim:] = 0
        state["head.weight"] = torch.eye(dim, width)  # (M, D): passes on the first M channels
        state["head.bias"] = torch.zeros(dim)
    return state


def timm_config(config: dict, dim: int) -> dict:
    """config.json as timm reads it. config: of the student; it stands below "pathryoshka".

    InputError: timm cannot be told of this architecture in JSON.
    """
    arch = config["arch"]
    if arch.get("swiglu", False):
        raise InputError(
            f"RUN: {config['student']} has SwiGLU, which config.json cannot tell timm; "
            "export another student"
        )
    entry = PLAIN
    if arch.get("layer_scale", True):
        entry = ENTRIES.get(config["student"], ENTRIES["vit_b"])
    width = arch["width"]
    size = arch["img_size"]
    outputs = dim if dim < width else 0
    model_args = {
        "img_size": size,
        "patch_size": arch["patch_size"],
        "embed_dim": width,
        "depth": arch["depth"],
        "num_heads": arch["heads"],
        "mlp_ratio": arch["mlp_width"] / width,
        "reg_tokens": arch.get("registers", 0),
        "no_embed_class": not arch.get("pos_on_prefix", True),
    }
    pretrained_cfg = {
        "num_classes": outputs,
        "input_size": [3, size, size],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": IMAGENET[0],
        "std": IMAGENET[1],
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": entry,
        "num_classes": outputs,
        "num_features": width,
        "global_pool": "token",
        "model_args": model_args,
        "pretrained_cfg": pretrained_cfg,
        "pathryoshka": config,
    }


# ---- what the run's folder says beside the student -----------------------------------------------


def read_recipe(folder: Path) -> dict:
    """The flags of the run from its last.pt; none where a student lies alone."""
    file = folder / "last.pt"
    if not file.exists():
        return {}
    return read_weights(file).get("args", {})


def read_results(file: Path) -> dict:
    """results.json beside a student's file; nothing where that is of an earlier save."""
    results = file.with_name("results.json")
    if not results.exists():
        return {}
    if results.stat().st_mtime < file.stat().st_mtime:
        print(f"{results} is older than {file.name}: the card is without its figures")
        return {}
    try:
        return dict(json.loads(results.read_text()))
    except (TypeError, ValueError) as error:
        raise InputError(f"{results} cannot be read ({error}); move it") from None


# ---- the folder ----------------------------------------------------------------------------------


def export(run: str | Path, out: str | Path, dim: int | None = None) -> dict:
    """Write the folder -> the student's config, as it stands there.

    dim: channels to keep; None keeps all. The config's "trained_dims" are those that had heads.
    InputError: there is no such student, it has fewer channels, `out` exists or cannot be written,
    safetensors is missing.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("this writes model.safetensors: pip install safetensors") from None
    out = Path(out)
    if os.path.lexists(out):
        raise InputError(f"OUT: {out} exists; choose another name, or remove it")
    student, config = load_student(run)
    dim = dim or student.width
    if dim > student.width:
        raise InputError(f"--dim: {dim} is above the width of {run}; give 1 to {student.width}")
    smaller = [m for m in config["nested_dims"] if m < dim]
    trained = config.get("trained_dims", config["nested_dims"])  # the first, of a folder cut before
    config = config | {"nested_dims": [*smaller, dim], "trained_dims": trained}
    entry = timm_config(config, dim)
    file = student_file(run)
    card = model_card(
        out.absolute().name,
        config,
        millions(student),
        read_recipe(file.parent),
        read_results(file),
    )
    weights = safetensors.torch.save(cut_weights(student, dim), {"format": "pt"})
    write_folder(
        {
            "model.safetensors": weights,
            "config.json": json.dumps(entry, indent=1).encode(),
            "README.md": card.encode("utf-8", "replace"),
        },
        out,
    )
    return config


def write_folder(files: dict[str, bytes], out: Path) -> None:
    """Write files into a folder that is there with all of them, or not at all."""
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        for name, content in files.items():
            save_atomically(content, temporary / name)
        os.rename(temporary, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}; choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(str(out.parent))


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.export", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run folder or a student.pt")
    parser.add_argument("out", metavar="OUT", type=path, help="the folder to write")
    parser.add_argument("--dim", type=positive, help="channels to keep (default: all)")
    return parser.parse_args()


def main() -> None:
    """The command line."""
    args = parse_args()
    config = export(args.run, args.out, args.dim)
    dim = config["nested_dims"][-1]
    print(f"{args.out}: the student of {args.run}, {dim} numbers a tile")
    if dim not in config["trained_dims"]:
        trained = ", ".join(str(m) for m in config["trained_dims"])
        print(f"  {dim} is none of the nested dims ({trained}): no head was trained on it alone")
    print(f'  timm.create_model("local-dir:{args.out}", pretrained=True)    # timm >= 1.0.16')
    for name, licence in config.get("licences", {}).items():
        print(f"  made from {name}; licence {licence}")
    print(
        f"  before you share it, read {Path(args.out, 'README.md')}: it names your tiles' folders"
    )


if __name__ == "__main__":
    run_program(main)
