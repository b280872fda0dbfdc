"""The student: a small vision transformer, the cut of its embedding, the heads for its teachers.

    z         = Student(images)       one summary (CLS) and N patch tokens, of width D
    z[:m]     = truncate(z, m)        the first m channels of every token
    h_{t,m}   = Adaptors(z)[m][t]     teacher t's tokens, predicted from z[:m], m of nested_dims

Letters in shapes: B tiles, T tokens a tile, N of them patches, D channels, D_t those of a teacher.

In this order: a block of the transformer, the transformer, the student around it, the cut, the
heads. The same transformer serves students and teachers; its parameters have timm's names, so that
weights move freely between the two. In training, student and adaptors are two modules in a row;
afterwards only the student's backbone is kept.

Sources: ViT (arXiv 2010.11929), registers (2309.16588), Matryoshka (2205.13147), RADIO
(2312.06709). The heads' layers are our choice, not checked against the paper's method section.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Tokens = dict[str, Tensor]  # {"summary": (B, D), "patches": (B, N, D)}

# Arguments of VisionTransformer, in parts that teachers.py combines as well
P14 = {"img_size": 224, "patch_size": 14}
VIT_S = {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536}
VIT_B = {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072}
REG4 = {"registers": 4, "pos_on_prefix": False}
STUDENTS = {
    "vit_b": P14 | VIT_B | REG4,  # 85.7 M parameters
    "vit_s": P14 | VIT_S | REG4,  # 21.6 M
    "toy": {  # 0.154 M, for a CPU; shallow, so without LayerScale
        "img_size": 64,
        "patch_size": 8,
        "width": 48,
        "depth": 5,
        "heads": 3,
        "mlp_width": 192,
        "layer_scale": False,
        "registers": 1,
        "pos_on_prefix": False,
    },
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, std: of the students' input


class InputError(ValueError):
    """Something the user can put right: a line that names the file or flag, and the remedy.

    Several lines where several things are wrong. It stands here because all other files import it.
    """

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


# ---- the transformer ----


class Attention(nn.Module):
    """Self-attention with several heads. The rows of qkv: all queries, all keys, all values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).reshape(B, T, D)
        return self.proj(x)


class Mlp(nn.Module):
    """Linear, GELU, linear; or SwiGLU, where the first half of fc1's output gates the other."""

    def __init__(self, width: int, mlp_width: int, swiglu: bool):
        super().__init__()
        self.swiglu = swiglu
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width // 2 if swiglu else mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # (B, T, mlp_width)
        if self.swiglu:
            gate, value = x.chunk(2, dim=-1)  # each (B, T, mlp_width / 2)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x)
        return self.fc2(x)


class LayerScale(nn.Module):
    """A learned factor for every channel of a residual branch."""

    def __init__(self, width: int):
        super().__init__()
        # 0.1 is our choice: from DINOv2's 1e-5 it takes a block too long to do anything at all
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x


class Block(nn.Module):
    """A pre-norm transformer block: tokens (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, mlp_width: int, swiglu: bool, layer_scale: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_width, swiglu)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class VisionTransformer(nn.Module):
    """A plain ViT: normalised square images (B, 3, S, S) -> tokens (B, 1 + registers + N, D).

    The tokens are CLS, the registers, then the patches row by row, after the final LayerNorm.

    img_size: S, in pixels; another size raises ValueError
    patch_size: pixels a side, so N = (S / patch_size)^2
    width: D; depth: number of blocks; heads: of the attention
    mlp_width: rows of fc1
    swiglu: the MLP is a SwiGLU, whose fc2 takes half of mlp_width
    layer_scale: whether the blocks have one
    registers: extra tokens that belong to no patch
    pos_on_prefix: pos_embed has rows for CLS and registers too (UNI, Virchow2), or for the patches
        alone (DINOv2 with registers)
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int,
        swiglu: bool = False,
        layer_scale: bool = True,
        registers: int = 0,
        pos_on_prefix: bool = True,
    ):
        super().__init__()
        self.img_size = img_size
        self.grid = img_size // patch_size  # patches a side
        self.width = width
        self.extra_tokens = 1 + registers  # they stand before the patches
        self.pos_on_prefix = pos_on_prefix
        positions = self.grid**2
        if pos_on_prefix:
            positions += self.extra_tokens

        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        projection = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        blocks = [Block(width, heads, mlp_width, swiglu, layer_scale) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)

        init_weights(self, width)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if registers:
            nn.init.trunc_normal_(self.reg_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        B, _, H, W = x.shape
        if (H, W) != (self.img_size, self.img_size):
            raise ValueError(f"{(H, W)} px given to a ViT for {self.img_size} px a side")

        x = self.patch_embed["proj"](x)  # (B, D, grid, grid)
        x = x.flatten(2).transpose(1, 2)  # (B, N, D)
        if not self.pos_on_prefix:
            x = x + self.pos_embed
        tokens = [self.cls_token.expand(B, -1, -1)]
        if self.reg_token is not None:
            tokens.append(self.reg_token.expand(B, -1, -1))
        x = torch.cat([*tokens, x], dim=1)  # (B, 1 + registers + N, D)
        if self.pos_on_prefix:
            x = x + self.pos_embed
        x = self.blocks(x)
        return self.norm(x)

    def split(self, tokens: Tensor) -> Tokens:
        """(B, 1 + registers + N, D) -> {"summary": CLS (B, D), "patches": (B, N, D)}."""
        return {"summary": tokens[:, 0], "patches": tokens[:, self.extra_tokens :]}


def init_weights(model: nn.Module, width: int) -> None:
    """How linear layers and the patch embedding of a model of this width start. Our choice.

    A standard deviation of 0.02 suits a width of 384 and more. At 48 or 128 it is several times
    below 1 / sqrt(width): branches then begin near zero and hardly learn. Xavier's (Glorot 2010)
    grows as layers get narrow.
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if width >= 384:
            nn.init.trunc_normal_(module.weight, std=0.02)
        else:
            # flat, because Xavier would count a convolution's pixels among its outputs
            nn.init.xavier_normal_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


# ---- the student ----


def to_float(images: Tensor) -> Tensor:
    """Images as uint8 or as floats in [0, 1] -> floats in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float()


class Student(nn.Module):
    """A ViT, .backbone, that normalises its own input.

    arch: a name in STUDENTS, or the arguments of VisionTransformer.
    It has img_size (pixels a side), grid (patches a side) and width (D).
    """

    def __init__(self, arch: str | dict):
        super().__init__()
        if isinstance(arch, str):
            arch = STUDENTS[arch]
        self.backbone = VisionTransformer(**arch)
        self.img_size = self.backbone.img_size
        self.grid = self.backbone.grid
        self.width = self.backbone.width
        mean, std = IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tokens:
        """Images (B, 3, S, S), uint8 or in [0, 1] -> {"summary": (B, D), "patches": (B, N, D)}.

        ValueError: S is not the student's img_size.
        """
        x = (to_float(images) - self.mean) / self.std
        return self.backbone.split(self.backbone(x))


def truncate(tokens: Tokens, m: int) -> Tokens:
    """z -> z[:m]: the first m channels of every token. All six files cut embeddings here."""
    return {kind: z[..., :m] for kind, z in tokens.items()}


def make_head(m: int, D: int, D_t: int) -> nn.Module:
    """One of the two heads in h_{t,m}: m channels of a token (..., m) -> (..., D_t)."""
    return nn.Sequential(nn.Linear(m, D), nn.LayerNorm(D), nn.GELU(), nn.Linear(D, D_t))


class Adaptors(nn.Module):
    """All h_{t,m}: a head for the summary, one for the patches, of every teacher at every dim.

    width: D of the student
    teacher_dims: {teacher: D_t}
    nested_dims: the prefixes that have to predict the teachers; D itself is always one of them
    InputError: a nested dim that is not from 1 to D
    """

    def __init__(self, width: int, teacher_dims: dict[str, int], nested_dims: list[int]):
        super().__init__()
        self.nested_dims = sorted({*nested_dims, width})
        if self.nested_dims[0] < 1 or self.nested_dims[-1] > width:
            raise InputError(f"--dims: {nested_dims} do not fit the student; give 1 to {width}")
        self.heads = nn.ModuleDict()
        for t, D_t in teacher_dims.items():
            self.heads[t] = nn.ModuleDict()
            for m in self.nested_dims:
                summary = make_head(m, width, D_t)
                patches = make_head(m, width, D_t)
                self.heads[t][str(m)] = nn.ModuleDict({"summary": summary, "patches": patches})
        init_weights(self, width)

    def forward(self, tokens: Tokens) -> dict[int, dict[str, Tokens]]:
        """z -> {m: {teacher: {"summary": (B, D_t), "patches": (B, N, D_t)}}}, from z[:m] alone."""
        predictions = {}
        for m in self.nested_dims:
            z = truncate(tokens, m)  # (B, m) and (B, N, m)
            predictions[m] = {}
            for t, heads in self.heads.items():
                head = heads[str(m)]
                summary = head["summary"](z["summary"])  # (B, D_t)
                patches = head["patches"](z["patches"])  # (B, N, D_t)
                predictions[m][t] = {"summary": summary, "patches": patches}
        return predictions


def millions(model: nn.Module) -> float:
    """The number of a model's parameters, in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6
