"""The hand-written ViT against timm's, the order of tokens, and the student around it."""

import pytest
import torch
from conftest import oracle, randomise

from student import STUDENTS, Student, VisionTransformer
from teachers import TEACHERS

ARCHS = {**STUDENTS, "uni": TEACHERS["uni"].arch, "virchow": TEACHERS["virchow"].arch}
PARAMETERS = {"uni": 303_350_784, "virchow": 631_229_184, "vit_s": 21_629_952, "vit_b": 85_727_232}
TENSORS = {"uni": 342, "virchow": 454, "vit_s": 175, "vit_b": 175}


def timm_twin(arch: dict) -> torch.nn.Module:
    """timm's own VisionTransformer with the same arguments."""
    oracle("timm")
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    swiglu = arch.get("swiglu", False)
    return TimmViT(
        img_size=arch["img_size"],
        patch_size=arch["patch_size"],
        embed_dim=arch["width"],
        depth=arch["depth"],
        num_heads=arch["heads"],
        mlp_ratio=arch["mlp_width"] / arch["width"],
        init_values=1e-5 if arch.get("layer_scale", True) else None,
        reg_tokens=arch.get("registers", 0),
        no_embed_class=not arch.get("pos_on_prefix", True),
        num_classes=0,
        global_pool="token",
        **({"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU} if swiglu else {}),
    ).eval()


@pytest.mark.parametrize("name", ARCHS)
def test_equal_to_timm_at_full_width_and_reduced_depth(name):
    arch = {**ARCHS[name], "depth": 2}
    ours = randomise(VisionTransformer(**arch))
    twin = timm_twin(arch)
    twin.load_state_dict(ours.state_dict(), strict=True)  # the same names and shapes, both ways
    x = torch.randn(2, 3, arch["img_size"], arch["img_size"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = twin.forward_features(x), ours(x)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    summary, patches = ours.split(got).values()
    torch.testing.assert_close(summary, twin(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(patches, expected[:, twin.num_prefix_tokens :], rtol=1e-4, atol=1e-4)


def test_a_swapped_gate_or_position_would_show():
    """Negative control: the comparison above fails when SwiGLU's halves or the position rows are misread."""
    arch = {**ARCHS["virchow"], "depth": 1}
    ours, twin = randomise(VisionTransformer(**arch)), timm_twin(arch)
    state = ours.state_dict()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for key in ("blocks.0.mlp.fc1.weight", "pos_embed"):
            dim = 0 if key.endswith("weight") else 1
            twin.load_state_dict({**state, key: state[key].roll(state[key].shape[dim] // 2, dim)})
            expected = twin.forward_features(x)
            assert (ours(x) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_counts(name):
    with torch.device("meta"):
        state = VisionTransformer(**ARCHS[name]).state_dict()
    assert (len(state), sum(v.numel() for v in state.values())) == (TENSORS[name], PARAMETERS[name])


def test_order_of_tokens_is_cls_registers_patches():
    arch = {**STUDENTS["toy"], "registers": 3, "depth": 0}
    vit = VisionTransformer(**arch)
    with torch.no_grad():
        vit.patch_embed["proj"].weight.zero_()
        for token, value in ((vit.cls_token, 1.0), (vit.reg_token, 2.0)):
            token.zero_()[..., 0] = value
        vit.pos_embed.zero_()[0, :, 1] = torch.arange(1.0, 65)
    vit.norm = torch.nn.Identity()
    tokens = vit(torch.zeros(1, 3, 64, 64))
    assert tokens[0, :, 0].tolist() == [1.0] + [2.0] * 3 + [0.0] * 64
    split = vit.split(tokens)
    assert split["summary"][0, 0] == 1 and split["patches"][0, :, 1].tolist() == list(range(1, 65))


def test_patch_i_is_the_i_th_piece_of_the_image_row_by_row():
    vit = VisionTransformer(**{**STUDENTS["toy"], "depth": 0})
    vit.norm = torch.nn.Identity()
    image = torch.zeros(1, 3, 64, 64)
    image[..., 8:16, 24:32] = 1  # row 1, column 3 of the 8 x 8 grid
    with torch.no_grad():
        difference = (vit(image) - vit(torch.zeros_like(image)))[0, 2:].abs().sum(-1)
    assert difference.nonzero().flatten().tolist() == [1 * 8 + 3]


def test_student_shapes_uint8_equals_float_and_other_sizes_are_refused():
    student = Student("toy", {"a": 24}, [4])
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = student(images)
    assert tokens["summary"].shape == (2, 48) and tokens["patches"].shape == (2, 64, 48)
    torch.testing.assert_close(tokens["summary"], student(images / 255)["summary"])
    adapted = student.adapt(tokens, 4)
    assert adapted["a"]["summary"].shape == (2, 24) and adapted["a"]["patches"].shape == (2, 64, 24)
    with pytest.raises(ValueError, match="32 x 32"):
        student(torch.zeros(1, 3, 32, 32))


def test_the_full_dim_belongs_to_nested_dims_and_wider_ones_do_not_fit():
    assert Student("toy", {}, [8, 2]).nested_dims == [2, 8, 48]
    with pytest.raises(ValueError, match="width of toy; give dims from 1 to 48"):
        Student("toy", {}, [96])
