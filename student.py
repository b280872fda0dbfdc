"""The student: one hand-written ViT, the heads that losses.py compares, and the cut to the first m channels.

    tokens  = LayerNorm(ViT(image))              one summary (CLS) and N patch tokens, width D
    z[:m]   = the first m channels of a token    `truncate`, for every m in nested_dims (the last one is D)
    h_{t,m} = adaptor head of teacher t at m     Linear(m, D), LayerNorm, GELU, Linear(D, D_t)
a head for the summary, one for the patches. The ViT serves students and teachers, with timm's names. Sources: ViT
(arXiv 2010.11929), registers (2309.16588), Matryoshka (2205.13147), RADIO (2312.06709). The heads are our choice, not
checked against the paper's method section. Below: writing and reading weights, and the one error of all files."""

import contextlib
import functools
import importlib
import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean, std of the students' input, as of timm's DINOv2 ViTs
P14, REG4 = {"img_size": 224, "patch_size": 14}, {"registers": 4, "pos_on_prefix": False}
VIT_S, VIT_B = ({"width": D, "depth": 12, "heads": D // 64, "mlp_width": 4 * D} for D in (384, 768))
TOY = {
    "img_size": 64,
    "patch_size": 8,
    "width": 48,
    "depth": 5,
    "heads": 3,
    "mlp_width": 192,
    **REG4,
    "registers": 1,
}
STUDENTS = {
    "vit_b": P14 | VIT_B | REG4,
    "vit_s": P14 | VIT_S | REG4,
    "toy": TOY,
}  # 85.7 M, 21.6 M, 0.154 M parameters


class InputError(ValueError):
    """Something that the user can put right. The message is one line that names the file or flag and the remedy."""


class Block(
    nn.Module
):  # pre-norm; the rows of attn.qkv: all queries, then all keys, then all values
    def __init__(self, width: int, heads: int, mlp_width: int, swiglu: bool, layer_scale: bool):
        super().__init__()
        self.heads, self.swiglu, hidden = heads, swiglu, mlp_width // 2 if swiglu else mlp_width
        # LayerScale: 0.1 is our choice; DINOv2 has 1e-5, which a short distillation would spend its budget on leaving
        ls1, ls2 = ({"gamma": torch.full((width,), 0.1)} if layer_scale else {} for _ in range(2))
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.ls1 = nn.ParameterDict(ls1)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(hidden, width)}
        )
        self.ls2 = nn.ParameterDict(ls2)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        q, k, v = (
            self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        attended = (
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )  # each (B, heads, T, D / heads)
        x = x + self.ls1.get("gamma", 1) * self.attn.proj(attended)
        h = self.mlp.fc1(self.norm2(x))  # (B, T, mlp_width)
        gate, passed = h.chunk(2, dim=-1)  # for SwiGLU, the first half being the gate
        return x + self.ls2.get("gamma", 1) * self.mlp.fc2(
            F.silu(gate) * passed if self.swiglu else F.gelu(h)
        )


class VisionTransformer(nn.Module):
    """A plain ViT: normalised images (B, 3, S, S) -> CLS, registers, patches row by row (B, 1 + registers + N, D).
    img_size: S, other images raise ValueError; width: D; mlp_width: rows of fc1; registers: extra tokens after CLS.
    pos_on_prefix: pos_embed has rows for CLS and registers too (UNI, Virchow2), or for patches alone (DINOv2 reg4)."""

    def __init__(self, img_size: int, patch_size: int, width: int, depth: int, heads: int, mlp_width: int,
        swiglu: bool = False, layer_scale: bool = True, registers: int = 0, pos_on_prefix: bool = True):  # fmt: skip
        super().__init__()
        self.img_size, self.width, self.registers, self.pos_on_prefix = (
            img_size,
            width,
            registers,
            pos_on_prefix,
        )
        self.grid = img_size // patch_size  # patches a side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.grid**2 + (1 + registers) * pos_on_prefix, width)
        )
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, width, patch_size, stride=patch_size)}
        )
        self.blocks = nn.Sequential(
            *[Block(width, heads, mlp_width, swiglu, layer_scale) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)
        for token in [self.cls_token, self.pos_embed] + ([self.reg_token] if registers else []):
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"images of {tuple(x.shape[2:])} px given to a ViT for {self.img_size} px a side"
            )
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # (B, N, D)
        prefix = (
            torch.cat([1 * self.cls_token, 1 * self.reg_token], 1)
            if self.registers
            else self.cls_token
        )
        x = x if self.pos_on_prefix else x + self.pos_embed
        x = torch.cat(
            [prefix.expand(len(x), -1, -1), x], 1
        )  # (B, 1 + registers + N, D); 1 *: gradients as DDP wants
        return self.norm(self.blocks(x + self.pos_embed if self.pos_on_prefix else x))

    def split(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens (B, 1 + registers + N, D) -> {"summary": CLS (B, D), "patches": (B, N, D)}; registers are left out."""
        return {"summary": tokens[:, 0], "patches": tokens[:, 1 + self.registers :]}


def init_weights(module: nn.Module) -> None:  # for module.apply: linear layers and patch embedding
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def millions(model: nn.Module) -> float:  # of parameters
    return sum(p.numel() for p in model.parameters()) / 1e6


def normalise(images: Tensor, mean: Tensor | float = 0, std: Tensor | float = 1) -> Tensor:
    """Images (B, 3, H, W), uint8 or float in [0, 1], -> floats less mean over std, (3, 1, 1) each, each model's own."""
    return ((images.float() / 255 if images.dtype == torch.uint8 else images.float()) - mean) / std


def truncate(tokens: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
    """Cut every token to its first `dim` channels: z -> z[:m]. The one place where an embedding is cut."""
    return {kind: z[..., :dim] for kind, z in tokens.items()}


class Student(nn.Module):
    """A ViT backbone, and for training two adaptor heads (summary, patches) for every teacher at every nested dim.
    arch: a name in STUDENTS or a ViT's arguments; teacher_dims: {teacher: D_t}; nested_dims: up to D, always added."""

    def __init__(self, arch: str | dict, teacher_dims: dict[str, int], nested_dims: list[int]):
        super().__init__()
        self.backbone = VisionTransformer(**(STUDENTS[arch] if isinstance(arch, str) else arch))
        D = self.backbone.width
        self.nested_dims = sorted({*nested_dims, D})
        if self.nested_dims[0] < 1 or self.nested_dims[-1] > D:
            raise InputError(
                f"--dims: {self.nested_dims} do not fit the width of {arch}; give dims from 1 to {D}"
            )
        self.mean, self.std = (
            nn.Buffer(torch.tensor(x).view(3, 1, 1), persistent=False) for x in IMAGENET
        )
        self.adaptors = nn.ModuleDict({t: nn.ModuleDict() for t in teacher_dims})
        for t, D_t, m in (
            (t, D_t, m) for t, D_t in teacher_dims.items() for m in self.nested_dims
        ):  # h_{t,m}
            heads = (
                nn.Sequential(nn.Linear(m, D), nn.LayerNorm(D), nn.GELU(), nn.Linear(D, D_t))
                for _ in range(2)
            )
            self.adaptors[t][str(m)] = nn.ModuleDict(
                zip(("summary", "patches"), heads)
            )  # (..., m) -> (..., D_t)
        self.adaptors.apply(init_weights)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, img_size, img_size), uint8 or float in [0, 1] -> {"summary": (B, D), "patches": (B, N, D)}."""
        return self.backbone.split(self.backbone(normalise(images, self.mean, self.std)))

    def parameter_groups(
        self,
    ) -> list[dict]:  # for AdamW: biases, norms, LayerScale, tokens, positions do not decay
        groups = [{"params": [], "weight_decay": 0.05}, {"params": [], "weight_decay": 0.0}]
        for name, p in self.named_parameters():
            groups[p.ndim < 2 or name.endswith(("cls_token", "reg_token", "pos_embed"))][
                "params"
            ].append(p)
        return groups

    def adapt(self, tokens: dict[str, Tensor], dim: int) -> dict[str, dict[str, Tensor]]:
        """The heads on z[:dim], dim of nested_dims -> {teacher: {"summary": (B, D_t), "patches": (B, N, D_t)}}."""
        z = truncate(tokens, dim)
        return {
            t: {kind: h(z[kind]) for kind, h in heads[str(dim)].items()}
            for t, heads in self.adaptors.items()
        }


def save_atomically(content: dict | bytes, path: str | Path, write: Callable = torch.save) -> None:
    """Write so that `path` holds either the old file or the whole new one, on the disk, whenever the machine stops."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content) if isinstance(content, bytes) else write(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with (
            contextlib.ExitStack() as opened,
            contextlib.suppress(OSError),
        ):  # the new name as well, where systems can
            opened.callback(os.close, folder := os.open(temporary.parent, os.O_RDONLY))
            os.fsync(folder)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's own writer raises RuntimeError on a full disk
        raise InputError(
            f"cannot write {path}: {error}; free some space or choose another folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # it is in its place already, or the disk is read-only
            temporary.unlink()


def read_weights(path: str | Path) -> dict:
    """What a .safetensors, .bin, .pth or .pt file holds, on the CPU. Never runs code that a pickle carries."""
    try:
        if zipfile.is_zipfile(path) and (
            part := zipfile.ZipFile(path).testzip()
        ):  # torch.load checks no checksum
            raise ValueError(part)
        if str(path).endswith(".safetensors"):
            return importlib.import_module("safetensors.torch").load_file(path)
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
        return content if isinstance(content, dict) else {"the whole content": content}
    except ImportError:
        raise InputError(f"{path} needs the library safetensors: pip install safetensors") from None
    except Exception as error:  # noqa: BLE001 - a damaged file raises many types
        unsafe = "Unpickling" in type(error).__name__
        why = (
            "refused: no weights, or objects that could run code"
            if unsafe
            else f"damaged ({type(error).__name__})"
        )
        raise InputError(f"{path} is {why}; put a whole copy of the right file there") from None


def load_strictly(model: nn.Module, state: dict, source: str) -> None:
    """Give a model (possibly on the meta device) exactly the tensors of `state`; InputError names three differences."""
    state = state if isinstance(state, dict) else {"the whole": state}
    expected, found = (
        {key: tuple(getattr(x[key], "shape", "?")) for key in x}
        for x in (model.state_dict(), state)
    )
    if wrong := [key for key in expected | found if expected.get(key) != found.get(key)]:
        three = [
            f"{key} is {found.get(key, 'missing')}, expected {expected.get(key, 'none')}"
            for key in wrong[:3]
        ]
        raise InputError(
            f"{source} holds another model: {len(wrong)} tensors differ, first {'; '.join(three)}"
        )
    if unfit := [
        k for k, x in state.items() if not x.is_floating_point() or not sum(x.aminmax()).isfinite()
    ]:
        raise InputError(
            f"{source} is damaged: {unfit[0]} has values that are not finite, or not of floating point"
        )
    model.load_state_dict(state, assign=any(value.is_meta for value in model.state_dict().values()))


RENAMES = [  # in this order: wrappers of training code; Hugging Face's ViT and Dinov2; the DINOv2 repo; timm's are kept
    (r"^((module|backbone|model|vit|dinov2|embeddings|encoder)\.)+", ""), (r"^layernorm\.", "norm."),
    (r"^patch_embeddings\.projection", "patch_embed.proj"), (r"^position_embeddings", "pos_embed"),
    (r"^register_tokens", "reg_token"), (r"^layer\.", "blocks."), (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, as fully sharded training leaves them
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.qkv."), (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.weights_in|mlp\.w12)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.w3)\.", ".mlp.fc2.")]  # fmt: skip
UNUSED = r"mask_token$|(pooler|classifier|head|dino_head|ibot_head)\."  # any other surplus tensor is refused


def timm_state(
    state: dict, vit: VisionTransformer, dtype: torch.dtype, antialias: bool = True
) -> dict[str, Tensor]:
    """Weights in any published layout, perhaps memory-mapped -> timm's names, copies in `dtype`, positions of `vit`."""
    for wrapper in (
        "teacher",
        "state_dict",
        "model",
    ):  # of a training checkpoint, or of a student.pt
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    parts: dict[str, list[Tensor]] = {}
    for key in sorted(
        state, key=lambda key: (".value." in key, ".key." in key)
    ):  # query, key, value: the rows of qkv
        name = functools.reduce(lambda name, rename: re.sub(*rename, name), RENAMES, key)
        if not re.match(UNUSED, name):
            if not isinstance(state[key], Tensor) or not state[key].is_floating_point():
                raise ValueError(f"{key} is no floating-point tensor")
            parts.setdefault(name, []).append(
                state[key]
            )  # two of one name get a shape that strict loading refuses
    if {"cls_token", "pos_embed"} <= parts.keys():
        cls_token, pos_embed = (
            torch.cat(parts[name]).float() for name in ("cls_token", "pos_embed")
        )  # (1, ., D)
        if (
            not vit.pos_on_prefix
            and math.isqrt(pos_embed.shape[1] - 1) ** 2 == pos_embed.shape[1] - 1
        ):
            # the DINOv2 repo and Hugging Face keep a row for CLS even where registers have none; timm adds it to CLS
            cls_token, pos_embed = cls_token + pos_embed[:, :1], pos_embed[:, 1:]
        prefix, patches = pos_embed.tensor_split([(1 + vit.registers) * vit.pos_on_prefix], 1)
        side = math.isqrt(patches.shape[1])
        if side != vit.grid and side**2 == patches.shape[1]:
            print(f"position embedding resampled from {side} x {side} to {vit.grid} x {vit.grid}")
            patches = F.interpolate(
                patches.mT.unflatten(2, (side, -1)), vit.grid, mode="bicubic", antialias=antialias
            )
            pos_embed = torch.cat(
                [prefix, patches.flatten(2).mT], 1
            )  # of (1, D, grid, grid) to (1, rows of vit, D)
        parts["cls_token"], parts["pos_embed"] = [cls_token], [pos_embed]
    return {
        name: (torch.cat(xs) if len(xs) > 1 else xs[0]).to(dtype, copy=True)
        for name, xs in parts.items()
    }


def load_published(
    vit: VisionTransformer, path: Path, source: str, dtype=torch.float32, antialias=True
) -> dict:
    """Strictly load a file of any layout -> all that it holds. InputError: its name, three differences with shapes."""
    content = read_weights(path)
    try:
        state = timm_state(content, vit, dtype, antialias)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason, *_ = str(error).split("\n")
        raise InputError(
            f"{source} holds another model: {reason}; put the right file there"
        ) from None
    load_strictly(vit, state, source)
    return content


def load_student(run: str | Path, device: str | torch.device = "cpu") -> tuple[Student, dict]:
    """A trained student, its adaptor heads left out, from a run folder or a student.pt -> (student, its config)."""
    path = Path(run) / "student.pt" if Path(run).is_dir() else Path(run)
    content = read_weights(path) if path.exists() else {}
    config = content.get("config")
    if not isinstance(config, dict) or not {
        "arch",
        "nested_dims",
        "step",
        "steps",
        "teachers",
        "student",
    } <= {*config}:
        why = "is not a student.pt written by train.py" if path.exists() else "does not exist"
        raise InputError(
            f"{path} {why}; give the folder of a run that has saved, or its student.pt"
        )
    student = Student(config["arch"], {}, config["nested_dims"])
    load_strictly(student.backbone, content.get("state_dict", {}), str(path))
    return student.to(device).eval(), config
