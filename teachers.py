"""The teachers: published encoders, frozen, and two small ones that are made here.

    python teachers.py                all of them: size, tile, normalisation, access, file, licence
    python teachers.py --open         those that anyone can fetch, without a request
    python teachers.py uni tile.png   load one and embed a tile: are access, file, memory in order?

    teacher(images)        -> {"summary": CLS (B, D_t), "patches": (B, N, D_t)}, to learn from
    teacher.embed(images)  -> the embedding that the model's card recommends, to evaluate it

`TEACHERS` has one entry a teacher, with the facts of its card. Every one is the ViT of student.py.
To add one: an entry there (arch, licence, norm; a repo, or its file as weights/NAME.pth), then the
second command. Where tensors are refused, a line in RENAMES or UNUSED may be missing.
From the top: the registry; the frozen model; the way of its weights (find the file, read it, give
its tensors timm's names, load them strictly); the two offline teachers; the command line.
"""

import json
import math
import os
import pickle
import re
import time
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data import (
    CELLS,
    TISSUE_VERSION,
    TISSUES,
    TissueTiles,
    UnreadableTile,
    make_parser,
    open_tile,
    path,
    progress,
    run_program,
    save_atomically,
)
from student import (
    IMAGENET,
    P14,
    REG4,
    VIT_B,
    VIT_S,
    InputError,
    Tokens,
    VisionTransformer,
    millions,
    to_float,
)

# ---- the registry ----


@dataclass(frozen=True)
class TeacherSpec:
    """What a teacher is, as its card has it."""

    arch: dict  # arguments of VisionTransformer
    licence: str  # of the weights, and whether it binds students
    repo: str = ""  # on Hugging Face; without one, weights are only looked for in --weights-dir
    file: str = "model.safetensors"  # in that repo
    gate: str = "open"  # or "gated": on request
    norm: tuple = IMAGENET  # mean, std of the images that it takes
    tile: str = "224 at 0.5"  # pixels at microns per pixel, or "unstated" where none is published
    resize: int = 0  # shorter side before the centre crop to img_size; 0: img_size
    interpolation: str = "bicubic"  # of that resize
    patch_mean: bool = False  # the card's embedding: CLS and the mean of patches, not CLS alone
    antialias: bool = True  # in the authors' resampling of pos_embed, if the file has another grid
    task: str = ""  # of an offline teacher: the label of drawn tissue that it knows
    note: str = ""  # what else to know before it is used; shown where it is listed, and in a run


P16 = {"img_size": 224, "patch_size": 16}
P8 = {"img_size": 224, "patch_size": 8}
VIT_L = {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}
VIT_H = {"width": 1280, "depth": 32, "heads": 16, "mlp_width": 6832, "swiglu": True}
VIT_G = {"width": 1536, "depth": 40, "heads": 24, "mlp_width": 8192, "swiglu": True}
VIT_TOY = {"width": 128, "depth": 6, "heads": 4, "mlp_width": 512, "img_size": 64, "patch_size": 8}
SWIGLU_S = {"mlp_width": 2048, "swiglu": True}
SWIGLU_B = {"mlp_width": 4096, "swiglu": True}
SWIGLU_L = {"mlp_width": 5472, "swiglu": True}
REG8 = {"registers": 8, "pos_on_prefix": False}
NO_SCALE = {"layer_scale": False}

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))

APACHE = "Apache-2.0; binds students: no"
MIT = "MIT; binds students: no"
RESEARCH = "Apache-2.0; binds students: no, but its access terms say research only"
BINDS = "CC-BY-NC-ND-4.0; binds students: yes, its terms count them as derivatives, non-commercial"
NC_ND = "CC-BY-NC-ND-4.0; binds students: presume so, non-commercial and no derivatives"
NC_SA = "CC-BY-NC-SA-4.0; binds students: presume so, non-commercial, under the same licence"
OWKIN = "Owkin non-commercial; binds students: presume so"
KAIKO = "Kaiko non-commercial; binds students: presume so"
LUNIT_NC = "Lunit non-commercial; binds students: presume so"
UNSEEN = "unknown, ask on its page; binds students: presume so, its own teachers' licences do"
DRAWN = "Apache-2.0, drawn and trained here; binds students: no"

BIN = {"file": "pytorch_model.bin"}
GATED = {"gate": "gated"}
MAHMOOD = BIN | GATED | {"tile": "256 at 0.5", "interpolation": "bilinear"}
GIGAPATH = BIN | GATED | {"tile": "256 at 0.5", "resize": 256}
PAIGE = GATED | {"patch_mean": True}
KAIKO_CARD = {"norm": HALF, "interpolation": "bilinear", "tile": "256 at 0.5"}
KAIKO_REPO = "1aurent/vit_{}.kaiko_ai_towards_large_pathology_fms"
MIDNIGHT = {"norm": HALF, "interpolation": "bilinear", "patch_mean": True, "antialias": False}
NATURAL = {"tile": "natural images"}
DINOV2_REPO = "facebook/dinov2-with-registers-"
BILINEAR = {"interpolation": "bilinear"}
UNSTATED = {"tile": "224, unstated"}

TEACHERS = {
    "uni": TeacherSpec(P16 | VIT_L, BINDS, "MahmoodLab/UNI", **MAHMOOD),
    "uni2_h": TeacherSpec(
        P14 | VIT_G | REG8 | {"depth": 24}, BINDS, "MahmoodLab/UNI2-h", **MAHMOOD
    ),
    "virchow": TeacherSpec(P14 | VIT_H, APACHE, "paige-ai/Virchow", **PAIGE),
    "virchow2": TeacherSpec(  # its registers have positions, so this is not REG4
        P14 | VIT_H | {"registers": 4}, NC_ND, "paige-ai/Virchow2", **PAIGE
    ),
    "h_optimus_0": TeacherSpec(
        P14 | VIT_G | REG4, APACHE, "bioptimus/H-optimus-0", norm=OPTIMUS, **GATED
    ),
    "h_optimus_1": TeacherSpec(
        P14 | VIT_G | REG4, BINDS, "bioptimus/H-optimus-1", norm=OPTIMUS, **GATED
    ),
    "h0_mini": TeacherSpec(
        P14 | VIT_B | SWIGLU_B | REG4, NC_ND, "bioptimus/H0-mini", norm=OPTIMUS, **GATED
    ),
    "gigapath": TeacherSpec(P16 | VIT_G, RESEARCH, "prov-gigapath/prov-gigapath", **GIGAPATH),
    "gigapath_flash": TeacherSpec(
        P16 | VIT_S | SWIGLU_S, RESEARCH, "prov-gigapath/prov-gigapath-flash", **GIGAPATH
    ),
    "phikon": TeacherSpec(P16 | VIT_B | NO_SCALE, OWKIN, "owkin/phikon"),
    "phikon_v2": TeacherSpec(P16 | VIT_L, OWKIN, "owkin/phikon-v2"),
    "midnight": TeacherSpec(P14 | VIT_G, MIT, "kaiko-ai/midnight", **MIDNIGHT),
    "hibou_b": TeacherSpec(
        P14 | VIT_B | SWIGLU_B | REG4, APACHE, "histai/hibou-b", norm=HIBOU, **GATED
    ),
    "hibou_l": TeacherSpec(
        P14 | VIT_L | SWIGLU_L | REG4, APACHE, "histai/hibou-L", norm=HIBOU, **GATED
    ),
    "gpfm": TeacherSpec(P14 | VIT_L, NC_ND, "majiabo/GPFM", file="GPFM.pth", tile="512 at 0.25"),
    "mstar": TeacherSpec(
        P16 | VIT_L, BINDS, "Wangyh/mSTAR", tile="256 at 0.5", **GATED, **BILINEAR
    ),
    "pathorchestra": TeacherSpec(
        P16 | VIT_L, NC_ND, "AI4Pathology/PathOrchestra", **BIN, **GATED, **BILINEAR, **UNSTATED
    ),
    "openmidnight": TeacherSpec(
        P14 | VIT_G | REG4,
        APACHE,
        "SophontAI/OpenMidnight",
        file="teacher_checkpoint_load.pt",
        **GATED,
        **BILINEAR,
        **UNSTATED,
    ),
    "openpath": TeacherSpec(
        P14 | VIT_G | REG4,
        APACHE,
        "taejoon89/openpath",
        file="teacher_checkpoint.pth",
        note="some channels of its CLS are huge, so --standardize channel; its card says 40x "
        "beside 0.5, and 40x is 0.25",
        **BILINEAR,
    ),
    "pathryoshka_b": TeacherSpec(  # the paper's own student
        P14 | VIT_B | REG4,
        UNSEEN,
        "SchuefflerLab/Pathryoshka-B",
        note="unseen: its file's name is a guess, and its 4 registers are inferred from 85.7 M "
        "parameters, which it would have without them too",
        **GATED,
        **UNSTATED,
    ),
    "kaiko_s8": TeacherSpec(
        P8 | VIT_S | NO_SCALE, KAIKO, KAIKO_REPO.format("small_patch8_224"), **KAIKO_CARD
    ),
    "kaiko_b8": TeacherSpec(
        P8 | VIT_B | NO_SCALE, KAIKO, KAIKO_REPO.format("base_patch8_224"), **KAIKO_CARD
    ),
    "kaiko_s16": TeacherSpec(
        P16 | VIT_S | NO_SCALE, KAIKO, KAIKO_REPO.format("small_patch16_224"), **KAIKO_CARD
    ),
    "kaiko_b16": TeacherSpec(
        P16 | VIT_B | NO_SCALE, KAIKO, KAIKO_REPO.format("base_patch16_224"), **KAIKO_CARD
    ),
    "kaiko_l14": TeacherSpec(
        P14 | VIT_L | REG4,
        KAIKO,
        KAIKO_REPO.format("large_patch14_reg4_224"),
        note="its repo is also named " + KAIKO_REPO.format("large_patch14_reg4_dinov2"),
        **KAIKO_CARD,
    ),
    "lunit_s8": TeacherSpec(
        P8 | VIT_S | NO_SCALE, LUNIT_NC, "1aurent/vit_small_patch8_224.lunit_dino", norm=LUNIT
    ),
    "lunit_s16": TeacherSpec(
        P16 | VIT_S | NO_SCALE, LUNIT_NC, "1aurent/vit_small_patch16_224.lunit_dino", norm=LUNIT
    ),
    "sp22m": TeacherSpec(P16 | VIT_S | NO_SCALE, NC_SA, "MountSinaiCompPath/SP22M", **BIN),
    "dinov2_s": TeacherSpec(P14 | VIT_S | REG4, APACHE, DINOV2_REPO + "small", **NATURAL),
    "dinov2_b": TeacherSpec(P14 | VIT_B | REG4, APACHE, DINOV2_REPO + "base", **NATURAL),
    "dinov2_l": TeacherSpec(P14 | VIT_L | REG4, APACHE, DINOV2_REPO + "large", **NATURAL),
    "toy_cells": TeacherSpec(VIT_TOY, DRAWN, tile="64, drawn", task="cells"),
    "toy_tissue": TeacherSpec(VIT_TOY, DRAWN, tile="64, drawn", task="tissue"),
}
OFFLINE = ["toy_cells", "toy_tissue"]
OFFLINE_STEPS = 250  # of their training
RECIPE_VERSION = 2  # raise it when their training changes: older files are then not taken


def check_names(names: list[str], flag: str = "--teachers") -> None:
    """InputError: there are none, or one of them is no teacher."""
    if not names:
        raise InputError(f"{flag}: no teacher is named; choose from {', '.join(TEACHERS)}")
    for name in names:
        if name not in TEACHERS:
            known = ", ".join(TEACHERS)
            raise InputError(f"{flag}: no teacher is called '{name}'; choose from {known}")


# ---- the frozen model ----


class Teacher(nn.Module):
    """A frozen ViT with its own normalisation.

    dim: D_t.  grid: patches a side.  embed_dim: width of `embed`.  licence: of its weights.
    card_size: pixels of a tile's shorter side before `embed` cuts out the centre.
    """

    def __init__(self, name: str, vit: VisionTransformer):
        super().__init__()
        self.name = name
        self.spec = TEACHERS[name]
        self.licence = self.spec.licence
        self.vit = vit.requires_grad_(False)
        self.dim = vit.width
        self.grid = vit.grid
        self.embed_dim = 2 * vit.width if self.spec.patch_mean else vit.width
        self.card_size = self.spec.resize or vit.img_size
        mean, std = self.spec.norm
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, grid: int | None = None) -> Tokens:
        """Images (B, 3, S, S), uint8 or in [0, 1] -> {"summary": (B, D_t), "patches": (B, N, D_t)}.

        They are resized to the teacher's own size. grid: the student's; the map of patches is
        resampled to it, N = grid * grid, so that patch i of both is the same piece of tissue.
        Tokens have the dtype of the weights, resampled ones float32.
        ValueError: images that are not square (the ViT refuses them).
        """
        images = to_float(images)
        size = self.vit.img_size
        height, width = images.shape[2:]
        if height == width and height != size:
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
            images = images.clamp(0, 1)  # bicubic overshoots
        x = (images - self.mean) / self.std
        x = x.to(self.vit.norm.weight.dtype)  # frozen weights are kept in the compute dtype itself
        tokens = self.vit.split(self.vit(x))
        if grid is not None and grid != self.grid:
            patches = tokens["patches"].float()
            patches = patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            patches = F.interpolate(patches, (grid, grid), mode="bilinear")  # (B, D_t, grid, grid)
            tokens["patches"] = patches.flatten(2).transpose(1, 2)  # (B, grid * grid, D_t)
        return tokens

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or in [0, 1] -> the card's embedding (B, embed_dim).

        InputError: tiles that are smaller than a quarter of the teacher's input.
        """
        # here, for it takes seconds to import: what needs no resize should start without it
        from torchvision.transforms import functional as TF

        size = self.vit.img_size
        height, width = images.shape[2:]
        if 4 * min(height, width) < size:
            smallest = size // 4
            raise InputError(
                f"{self.name}: a tile of {width} x {height} px is too small; "
                f"give {smallest} px or more"
            )
        mode = TF.InterpolationMode(self.spec.interpolation)
        images = to_float(TF.resize(images, self.card_size, mode))
        images = TF.center_crop(images.clamp(0, 1), size)
        tokens = self(images)
        if self.spec.patch_mean:
            return torch.cat([tokens["summary"], tokens["patches"].mean(1)], dim=-1)
        return tokens["summary"]


# ---- finding the file ----

UNREACHABLE = "Hugging Face cannot be reached"
OPEN_TODAY = (
    "open today, to begin with: --teachers midnight,openpath (python teachers.py --open lists all)"
)


def find_weights(
    names: list[str], weights_dir: str | Path = "weights", fetch: bool = True
) -> dict[str, Path]:
    """{name: file} of published teachers: in weights_dir, in Hugging Face's cache, or fetched now.

    fetch=False: only look, and leave out what is not there.
    InputError: a line for each that is missing, with the way to get it; the others are printed.
    """
    found = {}
    missing = []
    why = ""
    for name in names:
        check_names([name])
        spec = TEACHERS[name]
        if spec.task:
            continue  # made here, on first use
        file = find_in_folder(name, weights_dir)
        if file is None and spec.repo:
            file = find_in_cache(spec)
            if file is None and fetch and why != UNREACHABLE:  # else it is not asked again
                file, why = fetch_from_hub(spec)
        if file is not None:
            found[name] = file
        else:
            missing.append(how_to_get(name, weights_dir, why))
    if missing and fetch:
        for name, file in found.items():
            print(f"weights of {name}: {file}")
        gates = {TEACHERS[name].gate for name in names if name not in found}
        if "gated" in gates:
            missing.append(OPEN_TODAY)
        raise InputError(*missing)
    return found


def repo_files(spec: TeacherSpec) -> list[str]:
    """What the weights may be called: as on the card, or as most repos call them."""
    return list(dict.fromkeys([spec.file, "model.safetensors", "pytorch_model.bin"]))


def find_in_folder(name: str, weights_dir: str | Path) -> Path | None:
    """NAME.safetensors, NAME.bin, NAME.pth or NAME.pt, or NAME/ and the file in it, as fetched."""
    files = [name + suffix for suffix in (".safetensors", ".bin", ".pth", ".pt")]
    files += [f"{name}/{file}" for file in repo_files(TEACHERS[name])]
    for file in files:
        file = Path(weights_dir, file)
        if file.exists():
            return file
    return None


def find_in_cache(spec: TeacherSpec) -> Path | None:
    """The file in Hugging Face's cache."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for file in repo_files(spec):
        cached = try_to_load_from_cache(spec.repo, file)
        if isinstance(cached, str):
            return Path(cached)
    return None


def fetch_from_hub(spec: TeacherSpec) -> tuple[Path | None, str]:
    """The file, fetched into Hugging Face's cache -> (file or None, why it could not be had)."""
    try:
        import huggingface_hub as hub
    except ImportError:
        return None, "pip install huggingface_hub safetensors, or fetch it by hand"
    hub.logging.set_verbosity_error()  # its warnings would bury our lines
    for file in repo_files(spec):
        try:
            # Asked first, once: without a network hf_hub_download tries again and again, for 23 s
            hub.get_hf_file_metadata(hub.hf_hub_url(spec.repo, file), timeout=3)
            return Path(hub.hf_hub_download(spec.repo, file)), ""
        except hub.errors.EntryNotFoundError:
            continue  # perhaps it has another name
        except Exception as error:  # noqa: BLE001 - gated, offline, disk full: many types
            reason = type(error).__name__
            if re.search("Connect|Timeout|Offline", reason):
                return None, UNREACHABLE
            return None, f"fetching failed ({reason})"
    return None, f"its repo has no {spec.file}"


def how_to_get(name: str, weights_dir: str | Path, why: str) -> str:
    """The line about missing weights. why: they could not be fetched."""
    spec = TEACHERS[name]
    place = Path(weights_dir, name)
    if not spec.repo:
        return f"no weights for {name}: put them at {place}.pth"
    page = f"https://huggingface.co/{spec.repo}"
    access = f"open to all at {page}:"
    if spec.gate != "open":
        access = f"ask for access at {page}, then hf auth login and"
    line = (
        f"no weights for {name}: {why}; {access} hf download {spec.repo} {spec.file} "
        f"--local-dir {place}, or put the file at {place}{Path(spec.file).suffix}; "
        f"licence {spec.licence}"
    )
    if spec.note:
        line += f"; {spec.note}"
    return line


# ---- reading it ----


def read_weights(path: str | Path) -> dict:
    """What a .safetensors, .bin, .pth or .pt file holds, on the CPU; never runs a pickle's code.

    InputError: damaged, or with other Python objects beside its tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = read_safetensors(path)
        else:
            content = read_torch_file(path)
    except ImportError:
        raise InputError(f"{path} needs the library safetensors: pip install safetensors") from None
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: {why_refused(error)}") from None
    except Exception as error:  # noqa: BLE001 - a damaged file raises many types
        reason = type(error).__name__
        raise InputError(f"{path} is damaged ({reason}); put a whole copy there") from None
    if not isinstance(content, dict):
        return {"the whole content": content}
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory where the disk allows it."""
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        # a disk without mmap, or a path that is not UTF-8: the library opens neither by its name
        return safetensors.torch.load(path.read_bytes())


def read_torch_file(path: Path) -> object:
    """What torch.save wrote; mapped into memory if it is a zip, as all are since torch 1.6."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # compares checksums, as torch.load does not
        if damaged:
            raise ValueError(damaged)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (RuntimeError, UnicodeError):
        # a disk without mmap, or a path that is not UTF-8: torch opens neither by its name
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def student_file(path: str | Path) -> Path:
    """The weights of a student: student.pt of a run's folder, or what extras.export wrote to one.

    A file stays as it is; whether it exists is for the caller to ask.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    exported = path / "model.safetensors"
    file = path / "student.pt"
    if exported.exists() and not file.exists():
        return exported
    return file


def read_student(file: Path) -> dict:
    """What student.pt holds, {"state_dict", "config"}; of an exported folder's file in that form.

    Other files come as they are. InputError: see read_weights.
    """
    content = read_weights(file)
    card = file.with_name("config.json")
    if file.suffix != ".safetensors" or not card.exists():
        return content
    try:
        config = json.loads(card.read_text())["pathryoshka"]
    except (KeyError, TypeError, ValueError):  # it is of another program
        return content
    state = {}
    for key, tensor in content.items():
        if not key.startswith("head."):  # timm's way to return the first channels alone
            state[key] = tensor
    return {"state_dict": state, "config": config}


def why_refused(error: pickle.UnpicklingError) -> str:
    """Of torch's "Unsupported global: GLOBAL argparse.Namespace was not ..." the name, if any."""
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None:
        return "it holds no weights, or objects that could run code; put the right file there"
    return (
        f"beside its tensors it holds other Python objects ({named[1]}), which could run code; "
        "where you trust it, save its tensors alone"
    )


# ---- giving its tensors timm's names ----

# A tensor's way, here from Hugging Face's Dinov2 to timm: its key
#     encoder.layer.0.attention.attention.query.weight
# becomes blocks.0.attn.qkv.weight, and so do those of key and value: the three are put together, in
# this order, as the rows of one tensor. What is UNUSED is dropped. All else must be just what the
# ViT has, or load_strictly refuses the file.

# Inside a training checkpoint the tensors lie under some of these, one in another, in this order.
# EMA, averaged over training, comes before the raw weights beside it, as in timm.
WRAPPERS = ["teacher", "state_dict_ema", "model_ema", "state_dict", "model"]
RENAMES = [  # applied one after the other, in this order
    # wrappers of training code (compiled, parallel, inside another model), and Hugging Face's own
    (r"^((_orig_mod|module|teacher|backbone|model|vit|dinov2|embeddings|encoder)\.)+", ""),
    # Hugging Face's ViT and Dinov2
    (r"^layernorm\.", "norm."),
    (r"^patch_embeddings\.projection", "patch_embed.proj"),
    (r"^position_embeddings", "pos_embed"),
    (r"^layer\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", ".attn.qkv."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out)\.", ".mlp.fc2."),
    # the DINOv2 repo: registers, SwiGLU, blocks in chunks as fully sharded training leaves them
    (r"^register_tokens", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    # timm's own names stay as they are
]
# Heads of pretraining, classifiers. Any other "head." may be part of the embedding: refused.
UNUSED = (
    r"^(mask_token$|(pooler|classifier|dino_head|ibot_head)\.|"
    r"head\.(weight$|bias$|mlp\.|last_layer\.))"
)


def unwrap(content: dict, source: str) -> dict:
    """The dict of tensors in a training checkpoint, or in a student.pt (under "state_dict")."""
    state = content
    for wrapper in WRAPPERS:
        inner = state.get(wrapper)
        if not isinstance(inner, dict):
            continue
        if wrapper.endswith("_ema"):
            print(f"{source}: its averaged weights ({wrapper}) are taken, not the raw ones")
        state = inner
    return state


def timm_name(key: str) -> str:
    """A tensor's key in any published layout -> its key in timm."""
    for pattern, name in RENAMES:
        key = re.sub(pattern, name, key)
    return key


def timm_state(
    state: dict,
    vit: VisionTransformer,
    dtype: torch.dtype = torch.float32,
    antialias: bool = True,
) -> dict[str, Tensor]:
    """Tensors in any published layout -> copies in `dtype` with timm's names and vit's positions.

    ValueError: a tensor that is none, or not of floating point.
    """
    parts = {}  # {timm's name: tensors}; three of them for the rows of qkv
    for key in sorted(state, key=qkv_sort_key):
        tensor = state[key]
        name = timm_name(key)
        if re.match(UNUSED, name):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{key} is no floating-point tensor")
        parts.setdefault(name, []).append(tensor)

    if "cls_token" in parts and "pos_embed" in parts:
        fit_positions(parts, vit, antialias)
    renamed = {}
    for name, tensors in parts.items():  # one at a time, so that little more than `dtype` is in use
        if len(tensors) > 1:  # two of one name by mistake get a shape that is refused
            renamed[name] = torch.cat(tensors).to(dtype)
        else:  # a copy: the tensor may be mapped, part of a file that may go
            renamed[name] = tensors[0].to(dtype, copy=True)
    return renamed


def qkv_sort_key(key: str) -> int:
    """For sorted(): Hugging Face's query, key and value come in the order of the rows of qkv."""
    for place, part in enumerate((".query.", ".key.", ".value.")):
        if part in key:
            return place
    return 0


def fit_positions(parts: dict[str, list], vit: VisionTransformer, antialias: bool) -> None:
    """Give pos_embed (1, rows, D) the rows that vit has, in place, and CLS its own row, if any.

    Rows in a file: extra tokens and patches (UNI, Virchow2); CLS and patches, though registers have
    none (the DINOv2 repo, Hugging Face); patches alone (timm's models with registers). The patches'
    grid may have another size. Any other number of rows is left as it is, and refused afterwards.
    """
    cls_token = torch.cat(parts["cls_token"]).float()  # (1, 1, D)
    pos_embed = torch.cat(parts["pos_embed"]).float()  # (1, rows, D)
    extra_rows = vit.extra_tokens if vit.pos_on_prefix else 0
    has_row_of_cls = is_square(pos_embed.shape[1] - 1)
    if not vit.pos_on_prefix and has_row_of_cls:
        cls_token = cls_token + pos_embed[:, :1]  # as timm does: CLS is given its position for good
        pos_embed = pos_embed[:, 1:]
    extra = pos_embed[:, :extra_rows]
    patches = pos_embed[:, extra_rows:]
    side = math.isqrt(patches.shape[1])
    if side != vit.grid and is_square(patches.shape[1]):
        print(f"position embedding resampled from {side} x {side} to {vit.grid} x {vit.grid}")
        patches = patches.transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
        size = (vit.grid, vit.grid)
        patches = F.interpolate(patches, size, mode="bicubic", antialias=antialias)
        patches = patches.flatten(2).transpose(1, 2)  # (1, grid * grid, D)
        pos_embed = torch.cat([extra, patches], dim=1)
    parts["cls_token"] = [cls_token]
    parts["pos_embed"] = [pos_embed]


def is_square(n: int) -> bool:
    return math.isqrt(n) ** 2 == n


# ---- loading them strictly ----

ANOTHER_MODEL = "put the right file there, or mend the entry or the --student that it has to fit"


def load_strictly(model: nn.Module, state: dict, source: str) -> None:
    """Give a model, possibly on the meta device, exactly the tensors of `state`.

    InputError: tensors are missing, left over or of another shape, or have unfit values.
    """
    if not isinstance(state, dict):
        raise InputError(f"{source} holds another model: no dict of tensors; {ANOTHER_MODEL}")
    expected = model.state_dict()
    refuse_differences(expected, state, source)
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise InputError(
                f"{source} is damaged: {key} is {tensor.dtype}; put a whole copy there"
            )
        low, high = tensor.aminmax()  # where isfinite() would take as much memory again
        if not (low.isfinite() and high.isfinite()):
            raise InputError(f"{source} is damaged: {key} is not finite; put a whole copy there")
    on_meta = any(tensor.is_meta for tensor in expected.values())
    model.load_state_dict(state, assign=on_meta)


def refuse_differences(expected: dict[str, Tensor], state: dict, source: str) -> None:
    """InputError: names two tensors of each kind of difference, with shapes."""
    reshaped = []
    missing = []
    for key, tensor in expected.items():
        wanted = shape_of(tensor)
        if key not in state:
            missing.append(f"{key} is missing, expected {wanted}")
        elif shape_of(state[key]) != wanted:
            reshaped.append(f"{key} is {shape_of(state[key])}, expected {wanted}")
    surplus = []
    for key, tensor in state.items():
        if key not in expected:
            surplus.append(f"{key} is {shape_of(tensor)}, expected none")
    count = len(reshaped) + len(missing) + len(surplus)
    if count:
        some = "; ".join(reshaped[:2] + missing[:2] + surplus[:2])
        raise InputError(
            f"{source} holds another model: {count} tensors differ, first {some}; {ANOTHER_MODEL}"
        )


def shape_of(value: object) -> str:
    """For messages, and to compare: "(1, 197, 1024)"."""
    if not isinstance(value, Tensor):
        return "no tensor"
    return str(tuple(value.shape))


def load_published(
    vit: VisionTransformer,
    path: str | Path,
    source: str,
    dtype: torch.dtype = torch.float32,
    antialias: bool = True,
) -> dict:
    """Strictly load a file of any published layout into vit -> all that the file holds.

    InputError: it is damaged, or another model's: then `source` begins the line, which names
    differences with their shapes.
    """
    content = read_student(Path(path))
    try:
        state = timm_state(unwrap(content, source), vit, dtype, antialias)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        # of odd shapes or keys; torch's own messages have several lines
        reason = str(error).split("\n")[0]
        raise InputError(f"{source} holds another model: {reason}; {ANOTHER_MODEL}") from None
    load_strictly(vit, state, source)
    return content


def load_teacher(
    name: str,
    weights_dir: str | Path = "weights",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: int = OFFLINE_STEPS,
    seed: int = 0,
) -> Teacher:
    """A frozen teacher that computes in `dtype`. Offline ones are trained on first use.

    steps, seed: the recipe of an offline teacher; published ones have none.
    InputError: its weights are missing, damaged, or another model's.
    """
    check_names([name])
    spec = TEACHERS[name]
    if spec.task:
        file = offline_file(name, weights_dir, steps, seed)
        source = f"{file}, which should be {name},"
        if not file.exists():
            print(f"{file} is made now: {steps} steps on drawn tissue", flush=True)
            save_atomically(train_offline_teacher(name, steps, seed, device), file)
    else:
        file = find_weights([name], weights_dir)[name]
        wanted = f"{spec.file} of {spec.repo}" if spec.repo else name
        source = f"{file}, which should be {wanted},"
    with torch.device("meta"):
        vit = VisionTransformer(**spec.arch)
    load_published(vit, file, source, dtype, spec.antialias)
    return Teacher(name, vit).to(device)


def load_init(
    vit: VisionTransformer, init: str, weights_dir: str | Path = "weights"
) -> dict[str, str]:
    """train.py --init: begin from a published teacher by name, a run's or exported folder, a file.

    -> {what it came from: licence}, of all that binds the student through it.
    InputError: there is no such file or teacher, or it is another model.
    """
    if init in TEACHERS and init not in OFFLINE:
        spec = TEACHERS[init]
        if spec.arch["width"] != vit.width:  # said before its file is asked for
            raise InputError(
                f"--init: {init} is {spec.arch['width']} channels wide, the student {vit.width}; "
                "give another --student (dinov2_s fits vit_s, dinov2_b vit_b)"
            )
        file = find_weights([init], weights_dir)[init]
        load_published(vit, file, f"--init: {file}", antialias=spec.antialias)
        return {init: spec.licence}
    file = student_file(init)
    if not file.is_file():
        raise InputError(
            f"--init: {init} is no file and no published teacher; "
            "give dinov2_b, dinov2_s or runs/NAME"
        )
    content = load_published(vit, file, f"--init: {file}")
    config = content.get("config")
    if isinstance(config, dict) and config.get("licences"):
        return config["licences"]  # an earlier student: what binds it binds this one
    return {file.name: "unknown; ask where the file comes from"}


# ---- the offline teachers ----


def offline_file(name: str, weights_dir: str | Path, steps: int, seed: int) -> Path:
    """Where an offline teacher is kept. Its recipe is in the name: one trained for a moment, to try
    something out, is never taken for another."""
    version = f"v{TISSUE_VERSION}.{RECIPE_VERSION}"
    return Path(weights_dir, f"{name}-{version}-{steps}-{seed}.pt")


@lru_cache(maxsize=1)
def draw_labelled_tiles(seed: int, n: int) -> dict[str, Tensor]:
    """{"image", "cells", "tissue"} of n tiles of a stream of their own; the teachers share them."""
    drawn = TissueTiles("teacher", seed).draw(n)
    return {key: drawn[key] for key in ("image", "cells", "tissue")}


def train_offline_teacher(
    name: str, steps: int, seed: int, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Train a ViT on `device`, on one of the two labels of drawn tissue -> its state dict (CPU).

    Batch, rates and the number of tiles are what gave good teachers in minutes, no more.
    """
    spec = TEACHERS[name]
    classes = {"cells": len(CELLS), "tissue": len(TISSUES)}[spec.task]
    batch_size = 32
    peak_lr = 2e-3
    tiles = draw_labelled_tiles(seed, min(6144, steps * batch_size))
    images = tiles["image"].to(device)
    labels = tiles[spec.task].to(device)
    mean = torch.tensor(spec.norm[0], device=device).view(3, 1, 1)
    std = torch.tensor(spec.norm[1], device=device).view(3, 1, 1)
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it was
        torch.manual_seed(1000 * seed + OFFLINE.index(name))
        vit = VisionTransformer(**spec.arch).to(device).train()
        head = nn.Linear(vit.width, classes).to(device)
        parameters = [*vit.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, peak_lr, betas=(0.9, 0.99), weight_decay=0.05)
        for step in progress(range(steps), f"training offline teacher {name}", steps):
            warmup = min(1, (step + 1) / 30)
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = peak_lr * warmup * cosine
            chosen = torch.randint(len(images), (batch_size,)).to(device)
            quarter_turns = int(torch.randint(4, ()))
            batch = torch.rot90(images[chosen], quarter_turns, (2, 3))
            if torch.rand(()) < 0.5:
                batch = batch.flip(3)
            batch = (to_float(batch) - mean) / std
            summary = vit(batch)[:, 0]  # (B, D_t)
            loss = F.cross_entropy(head(summary), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return {key: value.cpu() for key, value in vit.state_dict().items()}


# ---- the machine, and the command line ----


def choose_device(name: str | None, precision: str = "fp32") -> tuple[torch.device, torch.dtype]:
    """The device that --device names, or the best at hand, and the dtype that models compute in.

    precision: "auto" is bf16 or fp16 on CUDA, fp32 elsewhere.
    InputError: this machine has no such device, or the device no such precision.
    """
    if name is None and torch.cuda.is_available():
        name = "cuda"
    elif name is None and torch.backends.mps.is_available():
        name = "mps"
    elif name is None:
        name = "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # of this process; torchrun sets it
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        known = device.type in ("cpu", "cuda", "mps")
    except (RuntimeError, AssertionError):
        known = False
    if not known:
        raise InputError(f"--device: {name} is not available on this machine; use cpu, cuda or mps")
    if precision == "auto" and device.type == "cuda":
        # a T4 or V100 only emulates bf16, slowly
        emulates = not torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp16" if emulates else "bf16"
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16 needs CUDA; use fp32 or bf16 on {device.type}")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return device, dtypes.get(precision, torch.float32)


def list_teachers(weights_dir: str | Path, only_open: bool = False) -> None:
    """Print two or three lines a teacher, or for those alone that need no request."""
    print("tile: pixels at microns per pixel; access: to the repo on Hugging Face")
    print("to try one: python teachers.py NAME TILE\n")
    found = find_weights(list(TEACHERS), weights_dir, fetch=False)
    for name, spec in TEACHERS.items():
        if only_open and (spec.gate != "open" or not spec.repo):
            continue
        with torch.device("meta"):
            vit = VisionTransformer(**spec.arch)
        mean = " ".join(f"{value:.3f}" for value in spec.norm[0])
        std = " ".join(f"{value:.3f}" for value in spec.norm[1])
        if spec.task:
            where = "made on first use"
        elif name in found:
            where = found[name]
        elif spec.repo:
            where = f"not found: {spec.file} of {spec.repo}"
        else:
            where = f"not found: {Path(weights_dir, name)}.pth"
        size = f"{millions(vit):9.3f} M  width {vit.width:4}  grid {vit.grid:2}"
        print(f"{name:15}{size}  tile {spec.tile:14}  mean {mean}  std {std}  access {spec.gate}")
        print(f"{'':17}{where}; licence {spec.licence}")
        if spec.note:
            print(f"{'':17}{spec.note}")


def open_named_tile(tile: str) -> Image.Image:
    """The image that TILE names on a command line. InputError: it cannot be read."""
    try:
        return open_tile(tile)
    except UnreadableTile as reason:
        raise InputError(f"TILE: {tile}: {reason}; give a png, jpg or tif") from None


def try_teacher(name: str, tile: str, weights_dir: str, device: str, precision: str) -> None:
    """Load a teacher, embed an image, print how long it took and how the embedding begins."""
    from torchvision.transforms import functional as TF

    check_names([name], "NAME")
    device, dtype = choose_device(device, precision)
    if not tile:
        raise InputError("TILE: none is given; name an image to embed, png, jpg or tif")
    image = open_named_tile(tile)
    start = time.monotonic()
    teacher = load_teacher(name, weights_dir, device, dtype)
    loaded = time.monotonic()
    pixels = TF.pil_to_tensor(image)[None].to(device)  # (1, 3, H, W)
    z = teacher.embed(pixels).float().cpu()  # (1, embed_dim)
    done = time.monotonic()
    first = " ".join(f"{value:.4f}" for value in z[0, :5])
    print(f"{name}, {dtype} on {device}: loaded in {loaded - start:.1f} s")
    print(f"licence {teacher.licence}")
    if teacher.spec.note:
        print(teacher.spec.note)
    size = f"{image.width} x {image.height} px"
    print(f"{tile}: {size}, shorter side to {teacher.card_size} px, then the centre")
    print(f"embedding {tuple(z.shape)}, L2 norm {z.norm():.3f}, in {done - loaded:.2f} s")
    print(f"it begins {first}")


def main() -> None:
    parser = make_parser("teachers.py", __doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="to try; without it all are listed")
    parser.add_argument("tile", nargs="?", metavar="TILE", help="an image to embed")
    parser.add_argument(
        "--weights-dir", type=path, default="weights", help="where weights are looked for"
    )
    parser.add_argument("--device", type=path, help="cuda, mps or cpu (default: the best at hand)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--open", action="store_true", help="list only those that need no request")
    args = parser.parse_intermixed_args()  # NAME and TILE may stand apart, with flags between
    if args.name is None:
        list_teachers(args.weights_dir, args.open)
    else:
        try_teacher(args.name, args.tile, args.weights_dir, args.device, args.precision)


if __name__ == "__main__":
    run_program(main)
