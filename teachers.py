"""The teachers, frozen: tiles of data.py in, targets for losses.py out; published ones, and two offline for the demo.

    python teachers.py                every teacher: size, tile, normalisation, gate, where its weights are, licence
    python teachers.py uni tile.png   load one and embed a tile: are access, file and memory in order before a long run?
    teacher(images in [0, 1]) -> {"summary": CLS (B, D_t), "patches": (B, N, D_t)}, resampled to the student's grid
    teacher.embed(images)     -> the embedding that the model's card recommends, for evaluating the teacher itself
`TEACHERS` has one entry a teacher, from its card; every one is the ViT of student.py, loaded strictly."""

import importlib.util
import math
import os
import shutil
import sys
import time
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawTextHelpFormatter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torchvision.transforms import functional as TF

import student
from data import CELLS, TISSUE_VERSION, TISSUES, TissueTiles, open_tile, progress
from student import (
    IMAGENET,
    P14,
    REG4,
    VIT_B,
    VIT_S,
    InputError,
    VisionTransformer,
    millions,
    normalise,
)


@dataclass(frozen=True)
class TeacherSpec:  # what a teacher is, as its card has it
    arch: dict  # arguments of VisionTransformer
    licence: str  # of the weights, and whether it binds students
    repo: str = ""  # on Hugging Face; without one, weights are only looked for in --weights-dir
    file: str = "model.safetensors"  # in that repo
    gate: str = (
        "open"  # or "gated": access is on request; "gated?" where it changed or sources differ
    )
    norm: tuple = IMAGENET  # mean, std
    tile: str = "224 at 0.5"  # pixels at microns per pixel, as on the card
    resize: int = 0  # shorter side before the centre crop to img_size, as on the card; 0: img_size
    interpolation: str = "bicubic"  # of that resize
    patch_mean: bool = False  # the card's embedding is CLS and the mean of patches, not CLS alone
    antialias: bool = (
        True  # in the authors' resampling of pos_embed, where the file has another grid
    )
    task: str = ""  # offline teachers: the label of synthetic tissue that it knows


P16, NO_SCALE = {"img_size": 224, "patch_size": 16}, {"layer_scale": False}
VIT_L = {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}
VIT_H = {"width": 1280, "depth": 32, "heads": 16, "mlp_width": 6832, "swiglu": True}
VIT_G = {"width": 1536, "depth": 40, "heads": 24, "mlp_width": 8192, "swiglu": True}
VIT_TOY = {"img_size": 64, "patch_size": 8, "width": 128, "depth": 6, "heads": 4, "mlp_width": 512}
SWIGLU_B, SWIGLU_L = {"mlp_width": 4096, "swiglu": True}, {"mlp_width": 5472, "swiglu": True}
OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
APACHE, MIT = (f"{licence}; binds students: no" for licence in ("Apache-2.0", "MIT"))
BINDS = "CC-BY-NC-ND-4.0; binds students: yes, its access terms count them as derivatives, non-commercial"
NC_ND = "CC-BY-NC-ND-4.0; binds students: presume so, non-commercial and no derivatives"
RESEARCH = "Apache-2.0; binds students: no, but its access terms say research only"
OWKIN, KAIKO, LUNIT_NC = (
    f"{who} non-commercial; binds students: presume so" for who in ("Owkin", "Kaiko", "Lunit")
)
UNI_CARD = {
    "file": "pytorch_model.bin",
    "gate": "gated",
    "tile": "256 at 0.5",
    "interpolation": "bilinear",
}
HALF = {
    "norm": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "interpolation": "bilinear",
}  # Kaiko's cards and Midnight's
KAIKO_REPO = "1aurent/vit_%s_224.kaiko_ai_towards_large_pathology_fms"
GIGAPATH = {"file": "pytorch_model.bin", "gate": "gated", "tile": "256 at 0.5", "resize": 256}
DRAWN = {"licence": "Apache-2.0, drawn and trained here; binds students: no", "tile": "64, drawn"}
TEACHERS = {
    "uni": TeacherSpec(P16 | VIT_L, BINDS, "MahmoodLab/UNI", **UNI_CARD),
    "uni2_h": TeacherSpec(
        P14 | VIT_G | REG4 | {"depth": 24, "registers": 8}, BINDS, "MahmoodLab/UNI2-h", **UNI_CARD
    ),
    "virchow": TeacherSpec(P14 | VIT_H, APACHE, "paige-ai/Virchow", gate="gated", patch_mean=True),
    "virchow2": TeacherSpec(
        P14 | VIT_H | {"registers": 4}, NC_ND, "paige-ai/Virchow2", gate="gated", patch_mean=True
    ),
    "h_optimus_0": TeacherSpec(
        P14 | VIT_G | REG4, APACHE, "bioptimus/H-optimus-0", gate="gated?", norm=OPTIMUS
    ),
    "h_optimus_1": TeacherSpec(
        P14 | VIT_G | REG4, BINDS, "bioptimus/H-optimus-1", gate="gated", norm=OPTIMUS
    ),
    "h0_mini": TeacherSpec(
        P14 | VIT_B | SWIGLU_B | REG4, NC_ND, "bioptimus/H0-mini", gate="gated", norm=OPTIMUS
    ),
    "gigapath": TeacherSpec(P16 | VIT_G, RESEARCH, "prov-gigapath/prov-gigapath", **GIGAPATH),
    "phikon": TeacherSpec(P16 | VIT_B | NO_SCALE, OWKIN, "owkin/phikon"),
    "phikon_v2": TeacherSpec(P16 | VIT_L, OWKIN, "owkin/phikon-v2"),
    "midnight": TeacherSpec(
        P14 | VIT_G, MIT, "kaiko-ai/midnight", **HALF, patch_mean=True, antialias=False
    ),
    "hibou_b": TeacherSpec(
        P14 | VIT_B | SWIGLU_B | REG4, APACHE, "histai/hibou-b", gate="gated?", norm=HIBOU
    ),
    "hibou_l": TeacherSpec(
        P14 | VIT_L | SWIGLU_L | REG4, APACHE, "histai/hibou-L", gate="gated?", norm=HIBOU
    ),
    "gpfm": TeacherSpec(P14 | VIT_L, NC_ND, "majiabo/GPFM", file="GPFM.pth", tile="512 at 0.25"),
    "kaiko_s16": TeacherSpec(
        P16 | VIT_S | NO_SCALE, KAIKO, KAIKO_REPO % "small_patch16", **HALF, tile="256 at 0.5"
    ),
    "kaiko_b16": TeacherSpec(
        P16 | VIT_B | NO_SCALE, KAIKO, KAIKO_REPO % "base_patch16", **HALF, tile="256 at 0.5"
    ),
    "kaiko_l14": TeacherSpec(
        P14 | VIT_L | REG4, KAIKO, KAIKO_REPO % "large_patch14_reg4", **HALF, tile="256 at 0.5"
    ),
    "lunit_s16": TeacherSpec(
        P16 | VIT_S | NO_SCALE, LUNIT_NC, "1aurent/vit_small_patch16_224.lunit_dino", norm=LUNIT
    ),
    "dinov2_s": TeacherSpec(
        P14 | VIT_S | REG4, APACHE, "facebook/dinov2-with-registers-small", tile="natural images"
    ),
    "dinov2_b": TeacherSpec(
        P14 | VIT_B | REG4, APACHE, "facebook/dinov2-with-registers-base", tile="natural images"
    ),
    "dinov2_l": TeacherSpec(
        P14 | VIT_L | REG4, APACHE, "facebook/dinov2-with-registers-large", tile="natural images"
    ),
    "toy_cells": TeacherSpec(VIT_TOY, **DRAWN, task="cells"),
    "toy_tissue": TeacherSpec(VIT_TOY, **DRAWN, task="tissue"),
}
OFFLINE = [name for name, spec in TEACHERS.items() if spec.task]
MADE_HERE = f"{{}}-v{TISSUE_VERSION}-{{}}-{{}}.pt"  # a file a recipe, so that a run with a tiny budget poisons no other


class Teacher(nn.Module):
    """A frozen ViT with its own normalisation. dim: D_t; grid: patches a side; embed_dim: width of `embed`; licence."""

    def __init__(self, name: str, vit: VisionTransformer):
        super().__init__()
        self.name, self.vit, self.spec = name, vit.requires_grad_(False), TEACHERS[name]
        self.dim, self.grid, self.licence = vit.width, vit.grid, self.spec.licence
        self.embed_dim, self.card_size = (
            (1 + self.spec.patch_mean) * vit.width,
            self.spec.resize or vit.img_size,
        )
        self.mean, self.std = (
            nn.Buffer(torch.tensor(x).view(3, 1, 1), persistent=False) for x in self.spec.norm
        )
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor, grid: int | None = None) -> dict[str, Tensor]:
        """Images (B, 3, S, S), uint8 or in [0, 1] -> {"summary": (B, D_t), "patches": (B, N, D_t)}, N = grid * grid.
        `grid` is the student's: patch i of both is the same piece of tissue. ValueError: images that are not square."""
        images, size = normalise(images), self.vit.img_size
        if (
            images.shape[-1] != size and images.shape[-2] == images.shape[-1]
        ):  # the ViT refuses others
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        # the weights' dtype is the compute dtype: a frozen model needs no fp32 master copy and no autocast
        tokens = self.vit.split(
            self.vit(normalise(images, self.mean, self.std).to(self.vit.norm.weight.dtype))
        )
        if grid and grid != self.grid:
            patches = (
                tokens["patches"].float().transpose(1, 2).unflatten(2, (self.grid, -1))
            )  # (B, D_t, grid, grid)
            tokens["patches"] = (
                F.interpolate(patches, (grid, grid), mode="bilinear").flatten(2).transpose(1, 2)
            )
        return tokens

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or in [0, 1] -> the card's embedding (B, embed_dim). InputError: far too small."""
        (height, width), size, mode = images.shape[-2:], self.vit.img_size, self.spec.interpolation
        if 4 * min(height, width) < size:
            raise InputError(
                f"{self.name}: a tile of {width} x {height} px is too small; give {size // 4} px or more"
            )
        images = normalise(
            TF.resize(images, self.spec.resize or size, TF.InterpolationMode(mode))
        )  # antialiased
        summary, patches = self(
            TF.center_crop(images.clamp(0, 1), size)
        ).values()  # bicubic overshoots
        return torch.cat([summary, patches.mean(1)] if self.spec.patch_mean else [summary], -1)


def check_names(
    names: list[str], flag: str = "--teachers"
) -> None:  # InputError: one is unknown, or there are none
    if unknown := [name for name in names or [""] if name not in TEACHERS]:
        raise InputError(
            f"{flag}: no teacher is called '{unknown[0]}'; choose from {', '.join(TEACHERS)}"
        )


def load_init(
    vit: VisionTransformer, init: str, weights_dir: str | Path = "weights"
) -> dict[str, str]:
    """train.py --init: begin from a published teacher, by name, or from a file -> licences of what it came from."""
    published = (
        find_weights([init], weights_dir) if init in TEACHERS else {}
    )  # an offline one has no file to find
    path = published.get(init) or (Path(init, "student.pt") if os.path.isdir(init) else Path(init))
    if not path.is_file():
        raise InputError(
            f"--init: {init} is no file and no published teacher; give dinov2_b, dinov2_s or runs/NAME"
        )
    content = student.load_published(vit, path, f"--init: {path}")
    config = (
        {"licences": {init: TEACHERS[init].licence}} if published else content.get("config", {})
    )
    return (
        config.get("licences")
        or config.get("teachers")
        or {path.name: "unknown; ask where the file comes from"}
    )


def find_weights(
    names: list[str], weights_dir: str | Path = "weights", fetch: bool = True
) -> dict[str, Path]:
    """{name: file}, of weights_dir or Hugging Face's cache, or fetched now. InputError names all that are missing."""
    hub = (
        importlib.import_module("huggingface_hub")
        if importlib.util.find_spec("huggingface_hub")
        else None
    )
    found, missing, why = {}, [], "not tried" if hub else "huggingface_hub is not installed"
    for name, spec, local in (
        (x, TEACHERS[x], Path(weights_dir, x)) for x in names if x not in OFFLINE
    ):
        path = next(
            filter(
                Path.exists, (Path(f"{local}.{end}") for end in ("safetensors", "bin", "pth", "pt"))
            ),
            None,
        )
        if path is None and hub and spec.repo:
            try:  # in its cache, or fetched; where Hugging Face is out of reach, it is asked but once
                hub.logging.set_verbosity_error()  # its retries would bury the one line below
                path = hub.hf_hub_download(
                    spec.repo, spec.file, local_files_only=not fetch or "LocalEntry" in why
                )
            except Exception as error:  # noqa: BLE001 - gated, offline, disk full: many types, and the same remedy
                why = f"fetching failed: {type(error).__name__}"
        if path:
            found[name] = Path(path)
        elif fetch:
            access = (
                "open"
                if spec.gate == "open"
                else f"{spec.gate}: request access on its page, then hf auth login"
            )
            source = (
                f"{spec.file} of {spec.repo} (Hugging Face, {access}; {why})"
                if spec.repo
                else "its weights"
            )
            missing.append(f"{name}: put {source} at {local}{Path(spec.file).suffix}")
    if missing:
        raise InputError(f"no weights for {'; '.join(missing)}")
    return found


def load_teacher(
    name: str, weights_dir="weights", device="cpu", dtype=torch.float32, steps=500, seed=0
) -> Teacher:
    """A frozen teacher computing in `dtype`; offline ones are trained on first use. InputError: no or unfit weights."""
    check_names([name])
    spec, made_here = TEACHERS[name], Path(weights_dir) / MADE_HERE.format(name, steps, seed)
    path = made_here if spec.task else find_weights([name], weights_dir)[name]
    if spec.task and not path.exists():
        print(f"{path} is made now, or waited for if another run makes it", flush=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                student.save_atomically(train_offline_teacher(name, steps, seed, device), path)
    with torch.device("meta"):
        vit = VisionTransformer(**spec.arch)
    source = f"{path}, which should be {f'{spec.file} of {spec.repo}' if spec.repo else name},"
    student.load_published(vit, path, source, dtype, spec.antialias)
    return Teacher(name, vit).to(device)


def open_cache(folder: str, made_from: dict, row: np.dtype, n: int) -> np.memmap:
    """train.py --cache: memory-mapped outputs (n,), a `row` each. InputError: no space, not made from `made_from`."""
    record, outputs, size = (
        Path(folder) / "made_from.pt",
        Path(folder) / "outputs",
        n * row.itemsize,
    )
    if not outputs.exists():
        free = shutil.disk_usage(
            next(path for path in record.absolute().parents if path.exists())
        ).free
        print(
            f"--cache: the teachers' outputs on {n} tiles take {size / 1e9:.3g} GB; {folder} has {free / 1e9:.3g} GB"
        )
        if size > free:
            raise InputError(
                f"--cache: {folder} lacks {(size - free) / 1e9:.3g} GB; take fewer tiles or another disk"
            )
        reserve = getattr(os, "posix_fallocate", lambda number, _, size: os.truncate(number, size))
        with FileLock(f"{outputs}.lock"):
            if not outputs.exists():  # another run may have made it just now
                student.save_atomically(made_from, record)
                student.save_atomically(
                    size, outputs, lambda size, file: reserve(file.fileno(), 0, size)
                )
    then, now = (
        student.read_weights(record) | {"bytes": outputs.stat().st_size},
        made_from | {"bytes": size},
    )
    if differ := [
        f"{what} {then.get(what)}, now {now[what]}" for what in now if then.get(what) != now[what]
    ]:
        raise InputError(f"--cache: {folder} was made with {differ[0]}; give another folder")
    return np.memmap(outputs, row, "r+" if os.access(outputs, os.W_OK) else "r")


def train_offline_teacher(
    name: str, steps: int, seed: int, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Supervised training on one label of synthetic tissue -> the ViT's state dict, on the CPU."""
    spec, batch_size, lr = TEACHERS[name], 32, 1e-3
    tiles = TissueTiles("teacher", seed).draw(min(6144, steps * batch_size))
    images, labels = tiles["image"].to(device), tiles[spec.task].to(device)
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it was
        torch.manual_seed(1000 * seed + ("cells", "tissue").index(spec.task))
        vit = VisionTransformer(**spec.arch).to(device).train()
        head = nn.Linear(vit.width, len({"cells": CELLS, "tissue": TISSUES}[spec.task])).to(device)
        optimizer = torch.optim.AdamW(
            [*vit.parameters(), *head.parameters()], lr, (0.9, 0.99), weight_decay=0.05
        )
        for step in progress(range(steps), f"training offline teacher {name}", steps):
            optimizer.param_groups[0]["lr"] = (
                lr * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / steps)) / 2
            )
            chosen = torch.randint(len(images), (batch_size,)).to(device)
            batch = torch.rot90(images[chosen], int(torch.randint(4, ())), (2, 3))
            batch = TF.normalize(
                normalise(batch.flip(3) if torch.rand(()) < 0.5 else batch), *spec.norm
            )
            optimizer.zero_grad()
            F.cross_entropy(
                head(vit(batch)[:, 0]), labels[chosen]
            ).backward()  # of the summary (B, D_t)
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
    return {key: value.cpu() for key, value in vit.state_dict().items()}


def whole(
    smallest: int, largest: int, text: str
) -> int:  # these are types for argparse, which names the flag
    if not text.strip().isdecimal() or not smallest <= int(text) <= largest:
        raise ArgumentTypeError(f"{text!r} is not a whole number from {smallest} to {largest}")
    return int(text)


def path(text: str, folder: bool = False) -> str:  # anything but "", and as a folder no file
    if (
        not text
    ):  # an unset variable of the shell; without this check the default would be taken in silence
        raise ArgumentTypeError("it is empty; give a value")
    if folder and os.path.exists(text) and not os.path.isdir(text):
        raise ArgumentTypeError(f"{text} is a file; give a folder")
    return text


OneLineParser = partial(
    ArgumentParser, formatter_class=RawTextHelpFormatter, usage=SUPPRESS, allow_abbrev=False
)
natural, positive, plural = (partial(whole, smallest, 2**31 - 1) for smallest in range(3))
few, batch, folder = partial(whole, 0, 1024), partial(whole, 1, 2**16), partial(path, folder=True)


def name_list(text: str) -> list[str]:  # "uni, virchow" -> ["uni", "virchow"]
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def dim_list(text: str) -> list[int]:  # "96,24" -> [24, 96]
    return sorted({positive(part) for part in text.split(",")})


def run_main(
    main,
) -> None:  # what a user can put right ends a script with one line on stderr and exit code 2
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be no text
    try:
        code, text = main(), ""
        if (
            torch.distributed.is_initialized()
        ):  # only here, when the DDP module is gone: freeing it later can hang
            torch.distributed.destroy_process_group()
    except (InputError, OSError) as error:
        code, text = (
            2,
            f"{error}{'' if isinstance(error, InputError) else '; put it right, or choose another place'}",
        )
    except (MemoryError, RuntimeError) as error:
        code, text = 1, "another process was lost, its own messages say why; go on with --resume"
        if isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ) or "can't allocate memory" in str(error):
            code, text = (
                2,
                "out of memory; anew, lower --batch-size, raise --accumulate (same result) or fewer --dims",
            )
        elif not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
    except KeyboardInterrupt:
        code, text = (
            130,
            "interrupted; a run that has saved goes on with --resume, all else with the same command",
        )
    if code:
        OneLineParser().exit(
            code, text and f"{os.path.basename(sys.argv[0])}: {text.replace(chr(10), ' ')}\n"
        )


def choose_device(name: str | None, precision: str = "fp32") -> tuple[torch.device, torch.dtype]:
    """--device, or the best at hand (on CUDA the GPU of this process), and the compute dtype of --precision on it."""
    name = name or (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    try:
        device = torch.device(
            f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name
        )
        torch.empty(0, device=device if device.type in ("cpu", "cuda", "mps") else "refused")
    except (RuntimeError, AssertionError):
        raise InputError(
            f"--device: {name} is not available on this machine; use cpu, cuda or mps"
        ) from None
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16 needs CUDA; use fp32 or bf16 on {device.type}")
    if precision == "auto" and device.type == "cuda":  # T4 and V100 only emulate bf16, slowly
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def main() -> None:  # the command line
    add = (parser := OneLineParser("teachers.py", description=__doc__)).add_argument
    add("name", nargs="?", metavar="NAME", help="a teacher to try; without it all are listed")
    add("tile", nargs="?", metavar="TILE", help="an image to embed")
    add(
        "--weights-dir",
        type=folder,
        default="weights",
        help="where weights are looked for (default: weights)",
    )
    add("--device", type=path, help="cuda, mps or cpu (default: the best at hand)")
    add(
        "--precision",
        choices=["auto", "fp32", "bf16", "fp16"],
        default="auto",
        help="(default: auto)",
    )
    args = parser.parse_args()
    if args.name is None:
        print(
            "tile: pixels at microns per pixel; access: to the repo on Hugging Face; to try one: NAME TILE\n"
        )
        found = find_weights(TEACHERS, args.weights_dir, fetch=False)
        for name, spec in TEACHERS.items():
            with torch.device("meta"):
                vit = VisionTransformer(**spec.arch)
            mean, std = (" ".join(f"{value:.3f}" for value in values) for values in spec.norm)
            where = (
                "made on first use"
                if spec.task
                else found.get(name, f"not found: {spec.file} of {spec.repo}")
            )
            line = f"{name:12}{millions(vit):9.3f} M  width {vit.width:4}  grid {vit.grid:2}  tile {spec.tile:14}"
            print(
                f"{line}  mean {mean}  std {std}  access {spec.gate}\n{'':14}{where}; licence {spec.licence}"
            )
        return
    check_names([args.name], "NAME")
    device, dtype = choose_device(args.device, args.precision)
    if not args.tile or (image := open_tile(args.tile)) is None:
        raise InputError(
            f"TILE: {args.tile or 'none'} is no image that can be read; give a png, jpg, tif, bmp or webp"
        )
    start, teacher, ready = (
        time.monotonic(),
        load_teacher(args.name, args.weights_dir, device, dtype),
        time.monotonic(),
    )
    z = teacher.embed(TF.pil_to_tensor(image)[None].to(device)).float().cpu()  # (1, embed_dim)
    seconds, first = time.monotonic() - ready, " ".join(f"{value:.4f}" for value in z[0, :5])
    print(
        f"{teacher.name}, {dtype} on {device}: loaded in {ready - start:.1f} s; licence {teacher.licence}"
    )
    print(
        f"{args.tile}: {image.width} x {image.height} px, shorter side to {teacher.card_size} px, then the centre"
    )
    print(f"embedding {tuple(z.shape)}, L2 norm {z.norm():.3f}, in {seconds:.2f} s, begins {first}")


if __name__ == "__main__":
    run_main(main)
