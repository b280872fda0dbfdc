"""A teacher's real weights: by its publisher's own library, and by ours. Are they the same tokens?

    python -m extras.verify uni                 on a tile of drawn tissue
    python -m extras.verify uni tile.png        on a tile of yours
    python -m extras.verify h_optimus_0 tile.png --device cuda

    pip install timm transformers safetensors   whichever of the first two the teacher's card takes

The publisher's library opens the repo as the card says, from Hugging Face or, where weights/NAME/
holds the whole repo with its config.json, from there. CLS and patch tokens are compared in fp32 and
in bf16, from the same pixels. A repo whose code would have to run is not run: then it is said what
to compare by hand. No weights of any gated repo were at hand where this was written: so please
paste what it prints into an issue, whatever the verdict. Exit code 1: they differ.

Memory: twice the teacher in fp32 (9 GB for the largest), three times with transformers.
"""

import hashlib
import importlib
import platform
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import functional as TF

from data import draw_tissue, make_parser, path, run_program
from student import InputError, Tokens
from teachers import (
    OFFLINE,
    TEACHERS,
    Teacher,
    check_names,
    choose_device,
    find_in_cache,
    find_weights,
    load_teacher,
    open_named_tile,
    read_weights,
    timm_state,
)

# What the cards give to timm.create_model, beside the repo. SWIGLU stands for the two classes.
SWIGLU = "swiglu"
SCALE = {"init_values": 1e-5, "dynamic_img_size": True}
OPTIMUS = {"init_values": 1e-5, "dynamic_img_size": False}
ANY_SIZE = {"dynamic_img_size": True}
UNI2 = {
    "img_size": 224,
    "patch_size": 14,
    "depth": 24,
    "num_heads": 24,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
    "no_embed_class": True,
    "reg_tokens": 8,
    SWIGLU: True,
}
TIMM = {
    "uni": SCALE,
    "uni2_h": SCALE | UNI2,
    "virchow": {SWIGLU: True},
    "virchow2": {SWIGLU: True},
    "h_optimus_0": OPTIMUS,
    "h_optimus_1": OPTIMUS,
    "h0_mini": {SWIGLU: True},
    "gigapath": {},
    "mstar": SCALE,
    "pathorchestra": SCALE,
    "pathryoshka_b": {},
    "kaiko_s8": ANY_SIZE,
    "kaiko_b8": ANY_SIZE,
    "kaiko_s16": ANY_SIZE,
    "kaiko_b16": ANY_SIZE,
    "kaiko_l14": ANY_SIZE,
    "lunit_s8": {},
    "lunit_s16": {},
}
TRANSFORMERS = {  # the class; with AutoModel a repo could ask to run its own code
    "phikon": "ViTModel",
    "phikon_v2": "Dinov2Model",
    "midnight": "Dinov2Model",
    "dinov2_s": "Dinov2WithRegistersModel",
    "dinov2_b": "Dinov2WithRegistersModel",
    "dinov2_l": "Dinov2WithRegistersModel",
}
REMOTE_CODE = "its repo brings code of its own (trust_remote_code), which is not run here"
HUB_CODE = "its authors open it with the DINOv2 repo's code, which is not run here"
BY_HAND = {
    "hibou_b": REMOTE_CODE,
    "hibou_l": REMOTE_CODE,
    "gpfm": HUB_CODE,
    "openmidnight": HUB_CODE,
    "openpath": HUB_CODE,
    "sp22m": "its authors open it with code of their own, which is not run here",
    "gigapath_flash": "timm's hub call is known to return it with random weights",
}
LIMIT = 1e-4  # fp32: the largest difference that rounding explains, by the tokens' scale
LIMIT_BF16 = 2.0  # bf16: our error by theirs, both against their fp32


# ---- what is compared ----------------------------------------------------------------------------


def open_pixels(tile: str, name: str) -> Tensor:
    """A tile as the card's transform sees it: (1, 3, S, S) in [0, 1]. Without one, drawn tissue."""
    spec = TEACHERS[name]
    size = spec.arch["img_size"]
    if not tile:
        image, *_ = draw_tissue("distil", 0, 0, size)
        return TF.to_tensor(image)[None]
    pixels = TF.pil_to_tensor(open_named_tile(tile))[None] / 255
    mode = TF.InterpolationMode(spec.interpolation)
    pixels = TF.resize(pixels, spec.resize or size, mode)
    return TF.center_crop(pixels, size).clamp(0, 1)


def import_library(name: str):
    """timm or transformers. InputError names the pip command."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"this teacher is compared with {name}: pip install {name}") from None


def local_copy(name: str, weights_dir: str) -> Path:
    """Where the whole repo may lie, with its config.json."""
    return Path(weights_dir, name)


def open_theirs(name: str, weights_dir: str) -> tuple[nn.Module, str]:
    """The teacher by its publisher's library, and how it was opened. InputError: it cannot be."""
    folder = local_copy(name, weights_dir)
    is_local = (folder / "config.json").exists()
    repo = TEACHERS[name].repo
    place = "a local copy of " + repo if is_local else repo
    library = "timm" if name in TIMM else "transformers"
    module = import_library(library)
    try:
        if library == "timm":
            arguments = {"num_classes": 0} | TIMM[name]
            how = f"timm.create_model, {place}, {arguments}"
            if arguments.pop(SWIGLU, False):
                arguments |= {"mlp_layer": module.layers.SwiGLUPacked, "act_layer": nn.SiLU}
            source = f"local-dir:{folder}" if is_local else f"hf-hub:{repo}"
            model = module.create_model(source, pretrained=True, **arguments)
        else:
            how = f"transformers.{TRANSFORMERS[name]}.from_pretrained, {place}"
            module.logging.set_verbosity_error()
            module.logging.disable_progress_bar()
            kind = getattr(module, TRANSFORMERS[name])
            model = kind.from_pretrained(folder if is_local else repo, dtype=torch.float32)
    except Exception as error:  # noqa: BLE001 - no network, no access, another layout: many types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError(
            f"{name}: {library} cannot open {place} ({reason}); it needs the network and access, "
            f"or the whole repo in {folder}"
        ) from None
    return model.eval(), how


def their_tokens(model: nn.Module, x: Tensor) -> Tokens:
    """What our teachers give, by the publisher's model."""
    if hasattr(model, "forward_features"):
        tokens = model.forward_features(x)
        prefix = model.num_prefix_tokens
    else:
        tokens = model(x).last_hidden_state
        prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    return {"summary": tokens[:, 0].float(), "patches": tokens[:, prefix:].float()}


def our_tokens(teacher: Teacher, x: Tensor) -> Tokens:
    """From pixels that are normalised already, as their model takes them."""
    tokens = teacher.vit.split(teacher.vit(x))
    return {kind: value.float() for kind, value in tokens.items()}


def their_tensors(name: str, model: nn.Module, teacher: Teacher, weights_dir: str) -> dict:
    """{timm's name: tensor}. transformers has names of its own in memory: so those of its file."""
    antialias = teacher.spec.antialias
    if name in TIMM:
        tensors = model.state_dict()
        positions = {key: tensors[key] for key in ("cls_token", "pos_embed")}
        return tensors | timm_state(positions, teacher.vit, antialias=antialias)
    file = local_copy(name, weights_dir) / "model.safetensors"
    if not file.exists():
        file = find_in_cache(teacher.spec)
    return timm_state(read_weights(file), teacher.vit, antialias=antialias)


def differing_tensors(expected: dict[str, Tensor], teacher: Teacher) -> list[str]:
    """Every tensor of ours that is not the same in theirs, as NAME by SIZE."""
    found = []
    for key, tensor in teacher.vit.state_dict().items():
        if key not in expected or expected[key].shape != tensor.shape:
            found.append(f"{key}, which is of another shape or missing")
            continue
        difference = (tensor.cpu() - expected[key].cpu()).abs().max().item()
        if difference > 0:
            found.append(f"{key} by {difference:.1e}")
    return found


# ---- the comparison ------------------------------------------------------------------------------


def largest(a: Tensor, b: Tensor) -> float:
    """Largest difference, by the root mean square of b."""
    return ((a - b).abs().max() / b.square().mean().sqrt()).item()


def rms_error(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, by that of b."""
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def describe(name: str, file: Path, device: torch.device) -> None:
    """What is compared, for whoever reads the issue; no folder's name, which is the user's own."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        for block in iter(partial(content.read, 1 << 24), b""):
            digest.update(block)
    print(f"teacher   {name}, {TEACHERS[name].repo}")
    print(f"file      {file.name}, {file.stat().st_size:,} bytes, sha256 {digest.hexdigest()}")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    for library in ("timm", "transformers"):
        try:
            versions += f", {library} {importlib.import_module(library).__version__}"
        except ImportError:
            versions += f", no {library}"
    print(f"versions  {versions}, on {device}", flush=True)


def say_by_hand(name: str, tokens: Tokens) -> None:
    """What a user compares where nothing is run."""
    spec = TEACHERS[name]
    first = 1 + spec.arch.get("registers", 0)
    print(f"theirs    not run: {BY_HAND[name]}")
    print(f"by hand   open {spec.repo} as its card says, in an environment that may be lost. Give")
    print(f"          it the same tile, {spec.arch['img_size']} px, mean {spec.norm[0]},")
    print(f"          std {spec.norm[1]}. After its last norm these should come out:")
    for label, token in (("[0, 0]", tokens["summary"]), (f"[0, {first}]", tokens["patches"][:, 0])):
        values = " ".join(f"{value:.4f}" for value in token[0, :6])
        print(f"          tokens{label} begins {values}, L2 norm {token.norm():.3f}")
    print("verdict   not compared")


@torch.no_grad()
def verify(name: str, tile: str, weights_dir: str, device: torch.device) -> int:
    """Print the comparison -> 0, or 1: they differ."""
    try:
        file = find_weights([name], weights_dir)[name]
    except InputError as error:
        raise InputError(error.lines[0]) from None  # without the advice to take another teacher
    spec = TEACHERS[name]
    mean = torch.tensor(spec.norm[0]).view(3, 1, 1)
    std = torch.tensor(spec.norm[1]).view(3, 1, 1)
    x = ((open_pixels(tile, name) - mean) / std).to(device)  # (1, 3, S, S)
    describe(name, file, device)
    print(f"tile      {'yours' if tile else 'drawn tissue'}, {x.shape[-1]} px")
    teacher = load_teacher(name, weights_dir, device)
    ours = our_tokens(teacher, x)
    if name in BY_HAND:
        say_by_hand(name, ours)
        return 0
    model, how = open_theirs(name, weights_dir)
    print(f"theirs    {how}")
    problems = compare_tensors(their_tensors(name, model, teacher, weights_dir), teacher)
    if name in TIMM:
        compare_norms(model, teacher)
    model.to(device)
    theirs = their_tokens(model, x)
    if ours["patches"].shape != theirs["patches"].shape:
        sizes = [tuple(tokens["patches"].shape) for tokens in (ours, theirs)]
        raise InputError(
            f"{name}: patches are {sizes[0]} by ours and {sizes[1]} by theirs; tell us"
        )
    problems += compare_fp32(ours, theirs)
    x = x.bfloat16()
    teacher.vit.bfloat16()  # as load_teacher(dtype=torch.bfloat16) leaves it
    problems += compare_bf16(our_tokens(teacher, x), their_tokens(model.bfloat16(), x), theirs)
    print("verdict   " + ("DIFFERENT: " + "; ".join(problems) if problems else "the same"))
    return 1 if problems else 0


def compare_tensors(expected: dict[str, Tensor], teacher: Teacher) -> list[str]:
    """Print, and return what is wrong."""
    count = len(teacher.vit.state_dict())
    found = differing_tensors(expected, teacher)
    if not found:
        print(f"tensors   {count}, all equal", flush=True)
        return []
    some = ", ".join(found[:3])
    print(f"tensors   {len(found)} of {count} differ: {some}", flush=True)
    return [f"{len(found)} tensors"]


def compare_norms(model: nn.Module, teacher: Teacher) -> None:
    """Print whether the repo's config has the card's mean and std; some have timm's defaults."""
    theirs = tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    if theirs != teacher.spec.norm:
        print(f"note      its config has mean {theirs[0]}, std {theirs[1]}; we follow its card:")
        print(f"          mean {teacher.spec.norm[0]}, std {teacher.spec.norm[1]}")


def compare_fp32(ours: Tokens, theirs: Tokens) -> list[str]:
    """Print, and return what is wrong."""
    problems = []
    for kind, expected in theirs.items():
        difference = largest(ours[kind], expected)
        print(f"fp32      {kind}: largest difference {difference:.1e} of their scale", flush=True)
        if not difference <= LIMIT:  # or it is no number
            problems.append(f"{kind} by {difference:.1e} in fp32")
    return problems


def compare_bf16(ours: Tokens, theirs: Tokens, exact: Tokens) -> list[str]:
    """Print, and return what is wrong. exact: theirs in fp32."""
    problems = []
    for kind, expected in exact.items():
        our_error = rms_error(ours[kind], expected)
        their_error = rms_error(theirs[kind], expected)
        print(f"bf16      {kind}: error {our_error:.1e} of their scale, theirs {their_error:.1e}")
        if not our_error <= LIMIT_BF16 * their_error:  # or it is no number
            problems.append(f"{kind} by {our_error:.1e} in bf16")
    return problems


def main() -> int:
    """The command line."""
    parser = make_parser("python -m extras.verify", __doc__)
    add = parser.add_argument
    add("name", metavar="NAME", help="a published teacher, see python teachers.py")
    add("tile", nargs="?", default="", metavar="TILE", help="an image (default: drawn tissue)")
    add("--weights-dir", type=path, default="weights", help="where weights are looked for")
    add("--device", type=path, help="cuda, mps or cpu (default: the best at hand)")
    args = parser.parse_args()
    check_names([args.name], "NAME")
    if args.name in OFFLINE:
        raise InputError(f"NAME: {args.name} is made here, not published; choose another")
    if args.name not in {**TIMM, **TRANSFORMERS, **BY_HAND}:
        raise InputError(f"NAME: {args.name} has no line in extras/verify.py; add one to TIMM")
    device, _ = choose_device(args.device)
    return verify(args.name, args.tile, args.weights_dir, device)


if __name__ == "__main__":
    run_program(main)
