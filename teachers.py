"""The teachers: frozen encoders behind one forward, published ones and the two offline ones of the demo.

Place in the data flow:  data.py -> student.py and [ teachers.py ] -> losses.py -> train.py -> evaluate.py

    teacher(images in [0, 1]) -> {"summary": CLS (B, D_t), "patches": (B, N, D_t)}, resampled to the student's grid

`TEACHERS` has one entry a teacher: architecture, normalisation, licence, where its weights are published. Every one is
the ViT of student.py, loaded strictly. Published weights: facts from the model cards, checked on random weights in the
published layout. Offline teachers: trained on first use with one of the two labels of synthetic tissue, then kept.
"""

import functools
import math
import os
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import CELLS, TASKS, TISSUE_VERSION, TISSUES, InputError, TissueTiles, make_folder, progress, save_atomically
from student import IMAGENET, VisionTransformer, load_strictly, normalise, to_float


@dataclass(frozen=True)
class TeacherSpec:
    arch: dict  # arguments of VisionTransformer
    licence: str
    norm: tuple = IMAGENET  # mean, std
    repo: str = ""  # on Hugging Face
    file: str = "pytorch_model.bin"  # in that repo
    task: str = ""  # offline teachers: the label of synthetic tissue that it knows, of data.TASKS


PATCH16, PATCH14 = {"img_size": 224, "patch_size": 16}, {"img_size": 224, "patch_size": 14}
VIT_L = {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096}
VIT_H = {"width": 1280, "depth": 32, "heads": 16, "mlp_width": 6832, "swiglu": True}
VIT_TOY = {"img_size": 64, "patch_size": 8, "width": 128, "depth": 6, "heads": 4, "mlp_width": 512}
BINDS = "CC-BY-NC-ND-4.0; its access terms count students distilled from it as derivatives, non-commercial"
TEACHERS = {
    "uni": TeacherSpec({**PATCH16, **VIT_L}, BINDS, repo="MahmoodLab/UNI"),
    "virchow": TeacherSpec({**PATCH14, **VIT_H}, "Apache-2.0", repo="paige-ai/Virchow"),
    "toy_cells": TeacherSpec(VIT_TOY, "Apache-2.0, drawn and trained here", task="cells"),
    "toy_tissue": TeacherSpec(VIT_TOY, "Apache-2.0, drawn and trained here", task="tissue"),
}
OFFLINE = [name for name, spec in TEACHERS.items() if spec.task]


class Teacher(nn.Module):
    """A frozen ViT with its own normalisation. dim: D_t; grid: patches a side; licence: what its weights come under."""

    def __init__(self, name: str, vit: VisionTransformer):
        super().__init__()
        self.name, self.vit, self.licence = name, vit.requires_grad_(False), TEACHERS[name].licence
        self.dim, self.grid = vit.width, vit.grid
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in TEACHERS[name].norm)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)  # frozen: whoever calls train() on a parent module does not change a teacher

    @torch.no_grad()
    def forward(self, images: Tensor, grid: int | None = None) -> dict[str, Tensor]:
        """Images (B, 3, H, W), uint8 or in [0, 1] -> {"summary": (B, D_t), "patches": (B, N, D_t)}, N = grid * grid.

        Images of another size are resized to the teacher's (bicubic, antialiased). Where `grid` is not the teacher's,
        its patch map is resampled (bilinear), so that patch i of teacher and student is the same piece of tissue.
        """
        images, size = to_float(images), self.vit.img_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        # the weights' dtype is the compute dtype: a frozen model needs no fp32 master copy and no autocast
        tokens = self.vit.split(self.vit(normalise(images, self.mean, self.std).to(self.vit.norm.weight.dtype)))
        if grid and grid != self.grid:
            patches = tokens["patches"].float().transpose(1, 2)  # (B, D_t, N)
            patches = F.interpolate(patches.unflatten(2, (self.grid, self.grid)), (grid, grid), mode="bilinear")
            tokens["patches"] = patches.flatten(2).transpose(1, 2)  # (B, grid * grid, D_t)
        return tokens


def check_names(names: list[str]) -> None:
    unknown = [name for name in names or [""] if name not in TEACHERS]
    if unknown:
        raise InputError(f"--teachers: no teacher is called '{unknown[0]}'; choose from {', '.join(TEACHERS)}")


def choose_device(name: str | None, precision: str = "fp32") -> tuple[torch.device, torch.dtype]:
    """--device, or the best at hand (on CUDA the GPU of this process), and the compute dtype of --precision on it."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device: {name} is not to be had on this machine; use cpu, cuda or mps") from None
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16 needs CUDA; use fp32 or bf16 on {device.type}")
    if precision == "auto" and device.type == "cuda":  # T4 and V100 only emulate bf16, slowly
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


# ---- weight files -------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict:
    """What a .safetensors, .bin, .pth or .pt file holds, on the CPU. Never runs code that a pickle carries."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return content if isinstance(content, dict) else {"not a state dict": content}
    except ImportError:
        raise InputError(f"{path} needs the library safetensors: pip install safetensors") from None
    except pickle.UnpicklingError:
        why = "no weights file, or objects in it could run code"
        raise InputError(f"{path} is refused: {why}; put the right file there") from None
    except Exception as error:  # noqa: BLE001 - a damaged file raises many types
        raise InputError(f"{path} is damaged ({type(error).__name__}); put a whole copy there") from None


def find_weights(names: Iterable[str], weights_dir: str | Path = "weights") -> dict[str, Path]:
    """The file of every published teacher in `names`, found or fetched; one InputError names all that are missing."""
    found, missing, why = {}, [], ""
    for name in names:
        spec = TEACHERS[name]
        if spec.task:
            continue
        local = [Path(weights_dir) / f"{name}.{suffix}" for suffix in ("safetensors", "bin", "pth", "pt")]
        found[name] = next((path for path in local if path.exists()), None)
        if found[name] is None and "LocalEntryNotFound" not in why:  # once out of reach, not tried for the next
            try:
                import huggingface_hub

                print(f"looking for {spec.file} of {spec.repo} on Hugging Face", flush=True)
                huggingface_hub.logging.set_verbosity_error()  # its retries would bury the one line below
                found[name] = Path(huggingface_hub.hf_hub_download(spec.repo, spec.file))
            except ImportError:
                why = "huggingface_hub is not installed"
            except Exception as error:  # noqa: BLE001 - gated, offline, disk full: many types, and the same remedy
                why = f"fetching failed: {type(error).__name__}"
        if found[name] is None:
            where = f"put {spec.file} of {spec.repo} (Hugging Face; request access there) at {weights_dir}/{name}.bin"
            missing.append(f"{name}: {where} ({why}; licence {spec.licence})")
    if missing:
        raise InputError(f"no weights for {'. '.join(missing)}. With access, hf auth login lets them be fetched")
    return found


def load_teacher(
    name: str,
    weights_dir: str | Path = "weights",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    steps: int = 500,
    seed: int = 0,
) -> Teacher:
    """A frozen teacher, its weights held in `dtype`. steps, seed: training of an offline teacher, done on first use.

    InputError: unknown name, no weights, a file of another architecture, a damaged file.
    """
    check_names([name])
    spec = TEACHERS[name]
    if spec.task:
        # one file a recipe, so that a run with a tiny budget poisons no other
        path = Path(weights_dir) / f"{name}-v{TISSUE_VERSION}-{steps}-{seed}.pt"
        if not path.exists():
            make_folder(weights_dir, "--weights-dir")  # better refused before the training than after it
            save_atomically(train_offline_teacher(name, steps, seed, device), path)
    else:
        path = find_weights([name], weights_dir)[name]
    with torch.device("meta"):
        vit = VisionTransformer(**spec.arch)
    load_strictly(vit, read_weights(path), f"{path} ({name})")
    return Teacher(name, vit.to(dtype)).to(device)


# ---- offline teachers ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # both offline teachers learn from the same tiles
def teacher_tiles(seed: int, n: int) -> dict[str, Tensor]:
    return TissueTiles("teacher", seed).draw(n)


def train_offline_teacher(name: str, steps: int, seed: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Supervised training on one label of synthetic tissue -> the ViT's state dict, on the CPU."""
    batch_size, lr = 32, 1e-3
    task = TEACHERS[name].task
    tiles = teacher_tiles(seed, min(6144, steps * batch_size))
    images, labels = tiles["image"].to(device), tiles[task].to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in TEACHERS[name].norm)
    with torch.random.fork_rng(devices=[]):  # the caller's generator stays where it was
        torch.manual_seed(1000 * seed + TASKS.index(task))
        vit = VisionTransformer(**TEACHERS[name].arch).to(device).train()
        head = nn.Linear(vit.width, len({"cells": CELLS, "tissue": TISSUES}[task])).to(device)
        parameters = [*vit.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.05)
        for step in progress(range(steps), f"training offline teacher {name}", steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
            chosen = torch.randint(len(images), (batch_size,)).to(device)
            batch = torch.rot90(images[chosen], int(torch.randint(4, ())), (2, 3))
            summary = vit(normalise(batch.flip(3) if torch.rand(()) < 0.5 else batch, mean, std))[:, 0]  # (B, D_t)
            optimizer.zero_grad()
            F.cross_entropy(head(summary), labels[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return {key: value.cpu() for key, value in vit.state_dict().items()}
