"""The student: one hand-written ViT, adaptor heads, and the cut to the first m channels.

    tokens  = LayerNorm(ViT(image))              one summary (CLS) and N patch tokens, width D
    z[:m]   = the first m channels of a token    `truncate`, for every m in nested_dims (the last one is D)
    h_{t,m} = adaptor head of teacher t at m     Linear(m, D), LayerNorm, GELU, Linear(D, D_t)
with one head for the summary and one for the patches. The ViT serves students and teachers, its parameters have timm's
names, and `timm_state` takes all other layouts. Sources: ViT (arXiv 2010.11929), registers (2309.16588), Matryoshka
(2205.13147), RADIO (2312.06709). The head's layers are our choice, not checked against the paper's method section."""

import importlib
import itertools
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std of the students' input, as of timm's DINOv2 ViTs
P14, REG4 = {"img_size": 224, "patch_size": 14}, {"registers": 4, "pos_on_prefix": False}
VIT_S = {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536}
VIT_B = {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
TOY = {"img_size": 64, "patch_size": 8, "width": 48, "depth": 5, "heads": 3, "mlp_width": 192, **REG4, "registers": 1}
STUDENTS = {"vit_b": P14 | VIT_B | REG4, "vit_s": P14 | VIT_S | REG4, "toy": TOY}  # 85.7 M, 21.6 M, 0.154 M parameters


class Attention(nn.Module):  # multi-head self-attention
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # its rows: all queries, then all keys, then all values
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:  # (B, T, 2 H) -> (B, T, H), the first half being the gate
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class Block(nn.Module):  # pre-norm
    def __init__(self, width: int, heads: int, mlp_width: int, swiglu: bool, layer_scale: bool):
        super().__init__()
        # LayerScale: 0.1 is our choice; DINOv2 has 1e-5, which a short distillation would spend its budget on leaving
        ls1, ls2 = ({"gamma": torch.full((width,), 0.1)} if layer_scale else {} for _ in range(2))
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = nn.ParameterDict(ls1)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        fc1, fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width // 2 if swiglu else mlp_width, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=SwiGLU() if swiglu else nn.GELU(), fc2=fc2))
        self.ls2 = nn.ParameterDict(ls2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1.get("gamma", 1) * self.attn(self.norm1(x))
        return x + self.ls2.get("gamma", 1) * self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A plain ViT: normalised images (B, 3, S, S) -> CLS, registers, patches row by row (B, 1 + registers + N, D).
    img_size: S, other images raise ValueError; width: D; mlp_width: rows of fc1; registers: extra tokens after CLS.
    pos_on_prefix: pos_embed has rows for CLS and registers too (UNI, Virchow2), or for patches alone (DINOv2 reg4)."""

    def __init__(
        self, img_size: int, patch_size: int, width: int, depth: int, heads: int, mlp_width: int,
        swiglu: bool = False, layer_scale: bool = True, registers: int = 0, pos_on_prefix: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.img_size, self.width, self.registers, self.pos_on_prefix = img_size, width, registers, pos_on_prefix
        self.grid = img_size // patch_size  # patches a side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2 + (1 + registers) * pos_on_prefix, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, stride=patch_size)})
        self.blocks = nn.Sequential(*[Block(width, heads, mlp_width, swiglu, layer_scale) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(init_weights)
        for token in [self.cls_token, self.pos_embed] + ([self.reg_token] if registers else []):
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        if (H, W) != (self.img_size, self.img_size):
            raise ValueError(f"images of {H} x {W} px given to a ViT for {self.img_size} x {self.img_size} px")
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # (B, N, D)
        prefix = torch.cat([1 * self.cls_token, 1 * self.reg_token], 1) if self.registers else self.cls_token
        x = x if self.pos_on_prefix else x + self.pos_embed
        x = torch.cat([prefix.expand(B, -1, -1), x], 1)  # (B, 1 + registers + N, D); 1 *: gradients lie as DDP wants
        return self.norm(self.blocks(x + self.pos_embed if self.pos_on_prefix else x))

    def split(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens (B, 1 + registers + N, D) -> {"summary": CLS (B, D), "patches": (B, N, D)}; registers are left out."""
        return {"summary": tokens[:, 0], "patches": tokens[:, 1 + self.registers :]}


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def millions(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def to_float(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (B, 3, H, W), uint8 or float in [0, 1], -> zero-mean floats. mean, std: (3, 1, 1), each model's own."""
    return (to_float(images) - mean) / std


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
            raise InputError(f"--dims: {self.nested_dims} do not fit the width of {arch}; give dims from 1 to {D}")
        for name, values in zip(("mean", "std"), IMAGENET):  # not in the state dict: timm keeps them in its config too
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.adaptors = nn.ModuleDict({t: nn.ModuleDict() for t in teacher_dims})
        for (t, D_t), m in itertools.product(teacher_dims.items(), self.nested_dims):  # h_{t,m}: (..., m) -> (..., D_t)
            heads = (nn.Sequential(nn.Linear(m, D), nn.LayerNorm(D), nn.GELU(), nn.Linear(D, D_t)) for _ in range(2))
            self.adaptors[t][str(m)] = nn.ModuleDict(zip(("summary", "patches"), heads))
        self.adaptors.apply(init_weights)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, img_size, img_size), uint8 or float in [0, 1] -> {"summary": (B, D), "patches": (B, N, D)}."""
        return self.backbone.split(self.backbone(normalise(images, self.mean, self.std)))

    def adapt(self, tokens: dict[str, Tensor], dim: int) -> dict[str, dict[str, Tensor]]:
        """The heads on z[:dim], dim of nested_dims -> {teacher: {"summary": (B, D_t), "patches": (B, N, D_t)}}."""
        z = truncate(tokens, dim)
        return {t: {kind: h(z[kind]) for kind, h in heads[str(dim)].items()} for t, heads in self.adaptors.items()}


def read_weights(path: str | Path) -> dict:
    """What a .safetensors, .bin, .pth or .pt file holds, on the CPU. Never runs code that a pickle carries."""
    try:
        if str(path).endswith(".safetensors"):
            return importlib.import_module("safetensors.torch").load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return content if isinstance(content, dict) else {"the whole content": content}
    except ImportError:
        raise InputError(f"{path} needs the library safetensors: pip install safetensors") from None
    except Exception as error:  # noqa: BLE001 - a damaged file raises many types
        unsafe = isinstance(error, pickle.UnpicklingError)
        why = "refused: no weights, or objects that could run code" if unsafe else f"damaged ({type(error).__name__})"
        raise InputError(f"{path} is {why}; put a whole copy of the right file there") from None


def load_strictly(model: nn.Module, state: dict, source: str) -> None:
    """Give a model (possibly on the meta device) exactly the tensors of `state`; InputError names three differences."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(getattr(value, "shape", "?")) for key, value in state.items()}
    if wrong := [key for key in expected | found if expected.get(key) != found.get(key)]:
        three = [f"{key} is {found.get(key, 'missing')}, expected {expected.get(key, 'none')}" for key in wrong[:3]]
        raise InputError(f"{source} holds another model: {len(wrong)} tensors differ, first {'; '.join(three)}")
    model.load_state_dict(state, assign=any(value.is_meta for value in model.state_dict().values()))


RENAMES = [  # in this order: wrappers of training code; Hugging Face's ViT and Dinov2; the DINOv2 repo; timm's are kept
    (r"^((module|backbone|model|vit|dinov2|embeddings|encoder)\.)+", ""), (r"^layernorm\.", "norm."),
    (r"^patch_embeddings\.projection", "patch_embed.proj"), (r"^position_embeddings", "pos_embed"),
    (r"^register_tokens", "reg_token"), (r"^layer\.", "blocks."), (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, as fully sharded training leaves them
    (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.qkv."), (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.weights_in|mlp\.w12)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.w3)\.", ".mlp.fc2."),
]  # fmt: skip
UNUSED = r"mask_token$|(pooler|classifier|head|dino_head|ibot_head)\."  # any other surplus tensor is refused


def timm_state(state: dict, vit: VisionTransformer, dtype: torch.dtype, antialias: bool = True) -> dict[str, Tensor]:
    """Weights in any published layout, perhaps memory-mapped -> timm's names, copies in `dtype`, positions of `vit`."""
    for wrapper in ("teacher", "state_dict", "model"):  # of a training checkpoint, or of a student.pt
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    parts: dict[str, list[Tensor]] = {}
    for key in sorted(state, key=lambda key: (".value." in key, ".key." in key)):  # query, key, value: the rows of qkv
        name = key
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if re.match(UNUSED, name):
            continue
        if not isinstance(state[key], Tensor) or not state[key].is_floating_point():
            raise ValueError(f"{key} is no floating-point tensor")
        parts.setdefault(name, []).append(state[key])  # two of one name get a shape that strict loading refuses
    if {"cls_token", "pos_embed"} <= parts.keys():
        cls_token, pos_embed = (torch.cat(parts[name]).float() for name in ("cls_token", "pos_embed"))  # (1, ., D)
        if not vit.pos_on_prefix and math.isqrt(pos_embed.shape[1] - 1) ** 2 == pos_embed.shape[1] - 1:
            # the DINOv2 repo and Hugging Face keep a row for CLS even where registers have none; timm adds it to CLS
            cls_token, pos_embed = cls_token + pos_embed[:, :1], pos_embed[:, 1:]
        prefix, patches = pos_embed.tensor_split([(1 + vit.registers) * vit.pos_on_prefix], 1)
        side = math.isqrt(patches.shape[1])
        if side != vit.grid and side**2 == patches.shape[1]:
            print(f"position embedding resampled from {side} x {side} to {vit.grid} x {vit.grid}")
            patches = patches.transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
            patches = F.interpolate(patches, (vit.grid, vit.grid), mode="bicubic", antialias=antialias)
            pos_embed = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], 1)  # (1, rows of vit, D)
        parts["cls_token"], parts["pos_embed"] = [cls_token], [pos_embed]
    return {name: (torch.cat(xs) if len(xs) > 1 else xs[0]).to(dtype, copy=True) for name, xs in parts.items()}


def load_published(vit: VisionTransformer, path: Path, source: str, dtype=torch.float32, antialias=True) -> dict:
    """Strictly load a file of any layout -> all that it holds. InputError: its name, three differences with shapes."""
    content = read_weights(path)
    try:
        state = timm_state(content, vit, dtype, antialias)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason, *_ = str(error).split("\n")
        raise InputError(f"{source} holds another model: {reason}; put the right file there") from None
    load_strictly(vit, state, source)
    return content


def load_student(run: str | Path, device: str | torch.device = "cpu") -> tuple[Student, dict]:
    """A trained student, its adaptor heads left out, from a run folder or a student.pt -> (student, its config)."""
    path = Path(run) / "student.pt" if Path(run).is_dir() else Path(run)
    content = read_weights(path) if path.exists() else {}
    if not {"state_dict", "config"} <= content.keys():
        why = "is not a student.pt written by train.py" if path.exists() else "does not exist"
        raise InputError(f"{path} {why}; give the folder of a run that has saved, or its student.pt")
    student = Student(content["config"]["arch"], {}, content["config"]["nested_dims"])
    load_strictly(student.backbone, content["state_dict"], str(path))
    return student.to(device).eval(), content["config"]
