"""Reference models as their cards build them, with timm and transformers, and random weights in the
published layouts.

Nothing here is derived from teachers.TEACHERS: it is what the registry is checked against.
"""

import math
import re

import torch
from conftest import oracle, randomise

# tensors and parameters at 224 px (midnight with 257 rows, hibou in timm's form), as counted with
# timm and transformers
COUNTS = {
    "uni": (342, 303_350_784),
    "uni2_h": (343, 681_394_176),
    "virchow": (454, 631_229_184),
    "virchow2": (455, 631_239_424),
    "h_optimus_0": (567, 1_134_774_272),
    "h_optimus_1": (567, 1_134_774_272),
    "h0_mini": (175, 85_739_520),
    "gigapath": (566, 1_134_953_984),
    "gigapath_flash": (174, 21_681_024),
    "phikon": (150, 85_798_656),
    "phikon_v2": (342, 303_350_784),
    "midnight": (566, 1_134_769_664),
    "hibou_b": (175, 85_739_520),
    "hibou_l": (343, 303_657_216),
    "gpfm": (342, 303_227_904),
    "mstar": (342, 303_350_784),
    "pathorchestra": (342, 303_350_784),
    "openmidnight": (567, 1_134_774_272),
    "openpath": (567, 1_134_774_272),
    "pathryoshka_b": (175, 85_727_232),
    "kaiko_s8": (150, 21_670_272),
    "kaiko_b8": (150, 85_807_872),
    "kaiko_s16": (150, 21_665_664),
    "kaiko_b16": (150, 85_798_656),
    "kaiko_l14": (343, 303_230_976),
    "lunit_s8": (150, 21_670_272),
    "lunit_s16": (150, 21_665_664),
    "sp22m": (150, 21_665_664),
    "dinov2_s": (175, 21_629_952),
    "dinov2_b": (175, 85_727_232),
    "dinov2_l": (343, 303_230_976),
}
SWIGLU = "swiglu"  # stands for timm's SwiGLUPacked with SiLU, which the cards pass as classes
OPTIMUS = ("vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5})
VIRCHOW = {"init_values": 1e-5, "mlp_ratio": 5.3375, SWIGLU: True}
UNI2 = {
    "patch_size": 14,
    "depth": 24,
    "num_heads": 24,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
    SWIGLU: True,
}
GIGAPATH = {"patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 5.33334}
TIMM = {  # the name that the card gives to timm.create_model, and its arguments
    "uni": ("vit_large_patch16_224", {"init_values": 1e-5}),
    "uni2_h": (
        "vit_giant_patch14_224",
        {**UNI2, "init_values": 1e-5, "no_embed_class": True, "reg_tokens": 8},
    ),
    "virchow": ("vit_huge_patch14_224", VIRCHOW),
    "virchow2": ("vit_huge_patch14_224", {**VIRCHOW, "reg_tokens": 4}),
    "h_optimus_0": OPTIMUS,
    "h_optimus_1": OPTIMUS,
    "h0_mini": ("vit_base_patch14_reg4_dinov2", {"mlp_ratio": 5.33334, SWIGLU: True}),
    "gigapath": ("vit_giant_patch14_dinov2", {**GIGAPATH, "init_values": 1e-5}),
    "gigapath_flash": (
        "vit_small_patch16_224",
        {"mlp_ratio": 5.33334, "init_values": 1e-5, SWIGLU: True},
    ),
    "gpfm": ("vit_large_patch14_dinov2", {"init_values": 1e-5}),
    "mstar": ("vit_large_patch16_224", {"init_values": 1e-5}),
    "pathorchestra": ("vit_large_patch16_224", {"init_values": 1e-5}),
    "openmidnight": OPTIMUS,
    "openpath": OPTIMUS,
    "pathryoshka_b": ("vit_base_patch14_reg4_dinov2", {}),
    "kaiko_s8": ("vit_small_patch8_224", {}),
    "kaiko_b8": ("vit_base_patch8_224", {}),
    "kaiko_s16": ("vit_small_patch16_224", {}),
    "kaiko_b16": ("vit_base_patch16_224", {}),
    "kaiko_l14": ("vit_large_patch14_reg4_dinov2", {}),
    "lunit_s8": ("vit_small_patch8_224", {}),
    "lunit_s16": ("vit_small_patch16_224", {}),
    "sp22m": ("vit_small_patch16_224", {}),
    "dinov2_s": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2_b": ("vit_base_patch14_reg4_dinov2", {}),
    "dinov2_l": ("vit_large_patch14_reg4_dinov2", {}),
}
S, B, L, G = ((384, 12, 6), (768, 12, 12), (1024, 24, 16), (1536, 40, 24))
# class of transformers, (hidden_size, num_hidden_layers, num_attention_heads), further arguments
HF = {
    "phikon": ("ViT", B, {"patch_size": 16, "layer_norm_eps": 1e-6, "intermediate_size": 3072}),
    "phikon_v2": ("Dinov2", L, {"patch_size": 16}),
    "midnight": ("Dinov2", G, {"patch_size": 14, "use_swiglu_ffn": True}),
    "hibou_b": ("Dinov2WithRegisters", B, {"patch_size": 14, "use_swiglu_ffn": True}),
    "hibou_l": ("Dinov2WithRegisters", L, {"patch_size": 14, "use_swiglu_ffn": True}),
    "dinov2_s": ("Dinov2WithRegisters", S, {"patch_size": 14}),
    "dinov2_b": ("Dinov2WithRegisters", B, {"patch_size": 14}),
    "dinov2_l": ("Dinov2WithRegisters", L, {"patch_size": 14}),
}


def bare(build, *arguments, **keywords) -> torch.nn.Module:
    """build(...) without the initial weights, which take most of its time: for who sets every one
    of them."""
    with torch.device("meta"):
        model = build(*arguments, **keywords)
    assert not [*model.buffers()]
    return model.to_empty(device="cpu")


def timm_model(name: str, size: int = 224, depth: int | None = None) -> torch.nn.Module:
    timm = oracle("timm")
    model, arguments = TIMM[name]
    arguments = dict(arguments)
    if arguments.pop(SWIGLU, False):
        arguments |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    if depth:
        arguments["depth"] = depth
    return timm.create_model(model, img_size=size, num_classes=0, **arguments).eval()


def hf_model(name: str, size: int = 224, depth: int | None = None) -> torch.nn.Module:
    transformers = oracle("transformers")
    kind, (width, layers, heads), arguments = HF[name]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=depth or layers,
        num_attention_heads=heads,
        image_size=size,
        **arguments,
    )
    return getattr(transformers, f"{kind}Model")(config).eval()


def hf_file(model: torch.nn.Module, folder) -> dict:
    """The state dict as save_pretrained writes it: the published names."""
    model.save_pretrained(folder)
    return oracle("safetensors.torch").load_file(folder / "model.safetensors")


def dinov2_file(state: dict, registers: bool) -> dict:
    """timm's names -> those of the DINOv2 repo, as its own files have them. Inverse of what timm's
    loader does."""
    state = dict(state)
    if registers:
        row = torch.randn(
            state["cls_token"].shape, generator=torch.Generator().manual_seed(7)
        )  # the row of CLS: taken from cls_token, given to pos_embed
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - row
        state["pos_embed"] = torch.cat([row, state["pos_embed"]], 1)
    state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    return state


def training_checkpoint(state: dict, depth: int) -> dict:
    """The DINOv2 repo's names -> a checkpoint of its training: blocks in 4 chunks, heads beside the
    backbone."""
    chunk = math.ceil(depth / 4)
    inner = {"dino_head.mlp.0.weight": torch.zeros(8, 1024)}
    inner["ibot_head.last_layer.weight_v"] = torch.zeros(8, 1024)
    for key, value in state.items():
        key = re.sub(r"^blocks\.(\d+)", lambda i: f"blocks.{int(i[1]) // chunk}.{i[1]}", key)
        inner[f"backbone.{key}"] = value
    return {"teacher": inner}


def reference(name: str, layout: str, folder, depth: int = 2):
    """Random weights -> (state dict in the published layout, function of normalised images -> (CLS,
    patches)).

    layout: timm; encoder (timm's names behind that word); hf; hf-518 (37 x 37 positions);
    dinov2 (the repo's names, 37 x 37); dinov2-swiglu (w12, w3); chunked, chunked-swiglu (the repo's
    names in a training checkpoint).
    """
    if layout.startswith("hf"):
        model = randomise(bare(hf_model, name, 518 if layout == "hf-518" else 224, depth))
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)

        def forward(x):
            tokens = model(x).last_hidden_state
            return tokens[:, 0], tokens[:, prefix:]

        return hf_file(model, folder), forward

    timm = oracle("timm")
    model = bare(timm_model, name, depth=depth)
    published = 518 if name in ("kaiko_l14", "dinov2_s", "dinov2_b", "dinov2_l") else 224
    state = randomise(bare(timm_model, name, published, depth), seed=len(name)).state_dict()
    if layout.endswith("swiglu"):
        for key in list(state):
            state[key.replace("fc1", "w12").replace("fc2", "w3")] = state.pop(key)
    if layout.startswith(("dinov2", "chunked")):
        state = dinov2_file(state, "reg_token" in state)
    # timm's own loader reads the file, with its own key map and its own resampling
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), model)
    model.load_state_dict(filtered, strict=True)
    if layout == "encoder":
        state = {f"encoder.{key}": value for key, value in state.items()}
    if layout.startswith("chunked"):
        state = training_checkpoint(state, depth)

    def forward(x):
        tokens = model.forward_features(x)
        return tokens[:, 0], tokens[:, model.num_prefix_tokens :]

    return state, forward


def write(state: dict, path) -> None:
    """.safetensors; .bin, torch's zip format; .pth, the legacy pickle. Never into a file that is
    perhaps mapped."""
    new = path.with_name("new")
    if path.suffix == ".safetensors":
        oracle("safetensors.torch").save_file(
            {key: value.contiguous() for key, value in state.items()}, new
        )
    else:
        torch.save(state, new, _use_new_zipfile_serialization=path.suffix != ".pth")
    new.replace(path)
