"""Teachers: every published layout into the one ViT, the card's embedding, wrong weight files,
offline teachers."""

import argparse
import dataclasses
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import cards
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, oracle, randomise, write_tiles
from forks import python as fork
from PIL import Image
from torchvision import transforms

import teachers
from data import run_program
from extras.benchmarks.published import load_apart
from student import STUDENTS, InputError, VisionTransformer
from teachers import (
    OFFLINE,
    TEACHERS,
    Teacher,
    find_weights,
    load_published,
    load_teacher,
    read_weights,
    timm_state,
)

PUBLISHED = [name for name in TEACHERS if name not in OFFLINE]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
OPTIMUS = ((0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517))
HIBOU = ((0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816))
LUNIT = ((0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464))
NORMS = {
    **dict.fromkeys(PUBLISHED, IMAGENET),
    **dict.fromkeys(["h_optimus_0", "h_optimus_1", "h0_mini"], OPTIMUS),
    **dict.fromkeys(["midnight", "kaiko_s16", "kaiko_b16", "kaiko_l14"], HALF),
    **dict.fromkeys(["kaiko_s8", "kaiko_b8"], HALF),
    **dict.fromkeys(["hibou_b", "hibou_l"], HIBOU),
    **dict.fromkeys(["lunit_s16", "lunit_s8"], LUNIT),
}
GRIDS = {  # patches a side, where they are not 16
    **dict.fromkeys(["uni", "gigapath", "phikon", "phikon_v2", "kaiko_s16", "kaiko_b16"], 14),
    **dict.fromkeys(["lunit_s16", "gigapath_flash", "mstar", "pathorchestra", "sp22m"], 14),
    **dict.fromkeys(["kaiko_s8", "kaiko_b8", "lunit_s8"], 28),
}
# every teacher in the layout its repo has, in one of the file forms; then the other layouts in
# circulation
FILES = [
    ("uni", "timm", "bin"),
    ("uni2_h", "timm", "bin"),
    ("virchow", "timm", "bin"),
    ("virchow2", "timm", "safetensors"),
    ("h_optimus_0", "timm", "bin"),
    ("h_optimus_1", "timm", "safetensors"),
    ("h0_mini", "timm", "safetensors"),
    ("gigapath", "timm", "bin"),
    ("gigapath_flash", "timm", "bin"),
    ("mstar", "timm", "safetensors"),
    ("pathorchestra", "timm", "bin"),
    ("openmidnight", "dinov2-swiglu", "pt"),
    ("openpath", "chunked-swiglu", "pth"),
    ("pathryoshka_b", "timm", "safetensors"),
    ("kaiko_s8", "timm", "safetensors"),
    ("kaiko_b8", "timm", "safetensors"),
    ("lunit_s8", "timm", "safetensors"),
    ("sp22m", "encoder", "bin"),
    ("phikon", "hf", "safetensors"),
    ("phikon_v2", "hf", "safetensors"),
    ("midnight", "hf", "safetensors"),
    ("hibou_b", "hf", "safetensors"),
    ("hibou_l", "hf", "safetensors"),
    ("gpfm", "timm", "pth"),
    ("kaiko_s16", "timm", "safetensors"),
    ("kaiko_b16", "timm", "safetensors"),
    ("kaiko_l14", "timm", "safetensors"),
    ("lunit_s16", "timm", "safetensors"),
    ("dinov2_s", "hf-518", "safetensors"),
    ("dinov2_b", "hf-518", "safetensors"),
    ("dinov2_l", "hf-518", "safetensors"),
    ("phikon", "hf", "bin"),
    ("midnight", "hf-518", "safetensors"),
    ("gpfm", "chunked", "pth"),
    ("gpfm", "dinov2", "bin"),
    ("dinov2_s", "timm", "safetensors"),
    ("dinov2_b", "dinov2", "pth"),
    ("h0_mini", "dinov2-swiglu", "pth"),
]


def shallow_depth(name):
    giant = TEACHERS[name].arch["width"] == 1536
    return 1 if giant and name not in ("openmidnight", "openpath") else 2


@pytest.fixture
def shallow(monkeypatch):
    """The published teachers at full width and depth 2 (1 for most giants): real layouts, small
    files."""
    for name in PUBLISHED:
        arch = {**TEACHERS[name].arch, "depth": shallow_depth(name)}
        monkeypatch.setitem(TEACHERS, name, dataclasses.replace(TEACHERS[name], arch=arch))


def published_file(name, folder, suffix="bin", layout="timm"):
    """Random weights of the shallow teacher under the name that users give the file -> the
    reference's forward."""
    folder.mkdir(parents=True, exist_ok=True)
    state, forward = cards.reference(name, layout, folder, shallow_depth(name))
    (folder / "model.safetensors").unlink(missing_ok=True)
    cards.write(state, folder / f"{name}.{suffix}")
    return forward


def some_images(n=2, size=224):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def difference(name, teacher, forward):
    """Largest difference of summary and patches to the reference library, relative to the output's
    scale."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMS[name])
    with torch.no_grad():
        summary, patches = forward((some_images() - mean) / std)
    got = teacher(some_images())
    assert got["summary"].shape == summary.shape and got["patches"].shape == patches.shape
    return max(
        (a - b).abs().max() / b.abs().max()
        for a, b in zip(got.values(), (summary, patches), strict=True)
    ).item()


# ---- the registry against timm and transformers --------------------------------------------------


def test_the_registry_has_the_31_published_teachers():
    assert set(PUBLISHED) == set(cards.COUNTS) and len(PUBLISHED) == 31
    assert {name for name, layout, _ in FILES} == set(PUBLISHED)
    for name, spec in TEACHERS.items():
        assert (
            spec.norm == NORMS[name] if name in NORMS else True
        ) and "binds students:" in spec.licence, name
        size, mode = CARD_RESIZE.get(name, (224, "bicubic"))
        assert (spec.resize or 224, spec.interpolation) == (size, mode), name
    mean_of_patches = {name for name, spec in TEACHERS.items() if spec.patch_mean}
    assert mean_of_patches == {"virchow", "virchow2", "midnight"}
    bound = {name for name, spec in TEACHERS.items() if "binds students: yes" in spec.licence}
    assert bound == {"uni", "uni2_h", "h_optimus_1", "mstar"}
    free = {name for name, spec in TEACHERS.items() if "binds students: no" in spec.licence}
    dinov2 = {"dinov2_s", "dinov2_b", "dinov2_l"}
    assert free == {
        "virchow",
        "h_optimus_0",
        "hibou_b",
        "hibou_l",
        "midnight",
        "gigapath",
        "gigapath_flash",
        "openmidnight",
        "openpath",
        *dinov2,
        *OFFLINE,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_same_tensors_as_the_reference_at_full_depth(name, tmp_path):
    """Keys, shapes, number of tensors and of parameters, on the meta device."""
    with torch.device("meta"):
        ours = VisionTransformer(**TEACHERS[name].arch)
        theirs = cards.timm_model(name) if name in cards.TIMM else cards.hf_model(name)
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    assert (len(shapes), sum(p.numel() for p in ours.parameters())) == cards.COUNTS[name]
    if name in cards.TIMM:
        assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    if name in cards.HF:
        # The published names, as save_pretrained writes them for one layer, then for all layers
        # without data
        state = cards.hf_file(cards.bare(cards.hf_model, name, depth=1), tmp_path)
        state = {
            key.replace(".layer.0.", f".layer.{i}."): value.to("meta")
            for key, value in state.items()
            for i in (range(cards.HF[name][1][1]) if ".layer.0." in key else [0])
        }
        with torch.device("meta"):
            full = cards.hf_model(name)
        assert sum(value.numel() for value in state.values()) == sum(
            p.numel() for p in full.parameters()
        )
        mapped = timm_state(state, ours, torch.float32)
        assert shapes == {key: tuple(value.shape) for key, value in mapped.items()}


@pytest.mark.parametrize(("name", "layout", "suffix"), FILES)
def test_published_weights_give_the_references_tokens(shallow, tmp_path, name, layout, suffix):
    forward = published_file(name, tmp_path, suffix, layout)
    teacher = load_teacher(name, tmp_path)
    (
        tmp_path / f"{name}.{suffix}"
    ).unlink()  # loaded is loaded: the file may go, and the disk is kept small
    assert teacher.grid == GRIDS.get(name, 16)
    assert difference(name, teacher, forward) <= 1e-5


def test_positions_of_virchow2s_kind_are_resampled_behind_their_five_prefix_rows():
    timm = oracle("timm")
    with torch.device("meta"):
        vit = VisionTransformer(**TEACHERS["virchow2"].arch | {"depth": 1})
    cls_token, pos_embed = torch.randn(1, 1, 1280), torch.randn(1, 5 + 37 * 37, 1280)
    mapped = timm_state({"cls_token": cls_token, "pos_embed": pos_embed}, vit, torch.float32)
    same_cls, resampled = mapped["cls_token"], mapped["pos_embed"]
    expected = timm.layers.resample_abs_pos_embed(pos_embed, [16, 16], num_prefix_tokens=5)
    assert torch.equal(same_cls, cls_token) and resampled.shape == (1, 261, 1280)
    torch.testing.assert_close(resampled, expected, rtol=1e-5, atol=1e-6)


def test_what_is_loaded_no_longer_depends_on_the_file(shallow, tmp_path):
    published_file("kaiko_s16", tmp_path)
    teacher = load_teacher("kaiko_s16", tmp_path)
    path = tmp_path / "kaiko_s16.bin"
    size = path.stat().st_size
    with open(path, "r+b") as file:  # in place, so that mapped memory would show it
        file.write(b"\0" * size)
    assert all(p.abs().sum() > 0 for p in teacher.parameters())


# ---- negative controls: each trap makes the comparison above fail --------------------------------


def test_trap_swapped_swiglu_halves(shallow, tmp_path):
    forward = published_file("virchow", tmp_path)
    teacher = load_teacher("virchow", tmp_path)
    fc1 = teacher.vit.blocks[0].mlp.fc1
    fc1.weight.data = fc1.weight.data.roll(len(fc1.weight) // 2, 0)
    assert difference("virchow", teacher, forward) > 1e-3


@pytest.mark.parametrize("name", ["virchow2", "uni2_h", "h_optimus_1", "kaiko_l14"])
def test_trap_registers_taken_for_patches(shallow, tmp_path, monkeypatch, name):
    forward = published_file(name, tmp_path)
    teacher = load_teacher(name, tmp_path)
    n = teacher.grid**2
    monkeypatch.setattr(
        teacher.vit, "split", lambda x: {"summary": x[:, 0], "patches": x[:, 1 : n + 1]}
    )
    assert difference(name, teacher, forward) > 1e-3


def test_trap_virchow2_positions_on_registers(shallow, tmp_path, monkeypatch):
    forward = published_file("virchow2", tmp_path)
    state = read_weights(tmp_path / "virchow2.bin")
    assert state["pos_embed"].shape == (1, 261, 1280)
    spec = TEACHERS["virchow2"]  # as in every other register model: positions for patches alone
    with torch.device("meta"):
        vit = VisionTransformer(**spec.arch | {"pos_on_prefix": False})
    with pytest.raises(
        InputError, match=r"pos_embed is \(1, 261, 1280\), expected \(1, 256, 1280\)"
    ):
        load_published(vit, tmp_path / "virchow2.bin", "virchow2.bin")
    state["pos_embed"] = torch.cat(
        [state["pos_embed"][:, :1], state["pos_embed"][:, 5:], state["pos_embed"][:, 1:5]], 1
    )
    cards.write(state, tmp_path / "virchow2.bin")  # registers' rows at the end
    assert difference("virchow2", load_teacher("virchow2", tmp_path), forward) > 1e-3


@pytest.mark.parametrize(
    ("name", "layout"), [("dinov2_s", "hf-518"), ("kaiko_l14", "timm"), ("midnight", "hf-518")]
)
def test_trap_antialias(shallow, tmp_path, monkeypatch, name, layout):
    forward = published_file(name, tmp_path, "safetensors", layout)
    spec = TEACHERS[name]
    monkeypatch.setitem(TEACHERS, name, dataclasses.replace(spec, antialias=not spec.antialias))
    assert difference(name, load_teacher(name, tmp_path), forward) > 1e-3


def test_trap_order_of_query_key_value(shallow, tmp_path):
    forward = published_file("phikon", tmp_path, layout="hf")
    state = read_weights(tmp_path / "phikon.bin")
    cards.write(
        dict(reversed(state.items())), tmp_path / "phikon.bin"
    )  # the order in the file must not matter
    assert difference("phikon", load_teacher("phikon", tmp_path), forward) <= 1e-5
    value = "encoder.layer.0.attention.attention.value.weight"
    state[value], state[value.replace("value", "query")] = (
        state[value.replace("value", "query")],
        state[value],
    )
    cards.write(state, tmp_path / "phikon.bin")
    assert difference("phikon", load_teacher("phikon", tmp_path), forward) > 1e-3


def test_trap_imagenet_statistics_and_lost_cls_row(shallow, tmp_path, monkeypatch):
    forward = published_file("h_optimus_0", tmp_path)
    monkeypatch.setitem(
        TEACHERS, "h_optimus_0", dataclasses.replace(TEACHERS["h_optimus_0"], norm=IMAGENET)
    )
    assert difference("h_optimus_0", load_teacher("h_optimus_0", tmp_path), forward) > 1e-3
    forward = published_file("dinov2_s", tmp_path, "pth", "dinov2")
    state = read_weights(tmp_path / "dinov2_s.pth")
    cards.write(
        {**state, "pos_embed": state["pos_embed"][:, 1:]}, tmp_path / "dinov2_s.pth"
    )  # not added to CLS
    assert difference("dinov2_s", load_teacher("dinov2_s", tmp_path), forward) > 1e-3


# ---- forward and the card's embedding ------------------------------------------------------------

CARD_RESIZE = {  # shorter side, interpolation, where it is not 224 bicubic
    **dict.fromkeys(
        ["uni", "uni2_h", "midnight", "kaiko_s16", "kaiko_b16", "kaiko_l14"], (224, "bilinear")
    ),
    **dict.fromkeys(["mstar", "openmidnight", "openpath", "pathorchestra"], (224, "bilinear")),
    **dict.fromkeys(["kaiko_s8", "kaiko_b8"], (224, "bilinear")),
    **dict.fromkeys(["gigapath", "gigapath_flash"], (256, "bicubic")),
}


@pytest.mark.parametrize("name", ["uni", "virchow2", "gigapath", "midnight", "hibou_b"])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_embed_is_the_cards_embedding_of_the_cards_view(shallow, tmp_path, monkeypatch, name, kind):
    """Against torchvision on Pillow images, as on the cards; registers never enter the mean of
    patches."""
    with torch.device("meta"):
        vit = VisionTransformer(**TEACHERS[name].arch)
    teacher, seen = Teacher(name, vit.to_empty(device="cpu")), []
    prefix = 1 + TEACHERS[name].arch.get("registers", 0)

    def tokens(x):
        seen.append(x)
        token = torch.arange(prefix + teacher.grid**2).float()
        return token[None, :, None].expand(len(x), -1, teacher.dim)

    monkeypatch.setattr(teacher.vit, "forward", tokens)
    sharp = torch.rand(
        3, 60, 50, generator=torch.Generator().manual_seed(0)
    )  # bilinear and bicubic must differ on it
    pixels = (
        (F.interpolate(sharp[None], (330, 280), mode="bicubic")[0].clamp(0, 1) * 255).round().byte()
    )
    images = pixels[None] if kind == "uint8" else pixels[None] / 255
    embedding = teacher.embed(images)
    size, mode = CARD_RESIZE.get(name, (224, "bicubic"))
    card = [transforms.Resize(size, transforms.InterpolationMode(mode)), transforms.CenterCrop(224)]
    card += [transforms.ToTensor(), transforms.Normalize(*NORMS[name])]
    expected = transforms.Compose(card)(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    assert (seen[0][0] - expected).abs().max() < 2.5 / 255 / min(
        NORMS[name][1]
    )  # Pillow rounds to uint8 twice
    patches = torch.arange(prefix, prefix + teacher.grid**2).float().mean()
    assert embedding.shape == (1, teacher.embed_dim) and (embedding[0, : teacher.dim] == 0).all()
    if name in ("virchow2", "midnight"):
        assert teacher.embed_dim == 2 * teacher.dim
        torch.testing.assert_close(embedding[0, teacher.dim :], patches.expand(teacher.dim))
    else:
        assert teacher.embed_dim == teacher.dim


def test_embed_at_224_px_is_made_of_the_distillation_outputs(shallow, tmp_path):
    published_file("virchow2", tmp_path)
    teacher = load_teacher("virchow2", tmp_path)
    outputs = teacher(some_images())
    expected = torch.cat([outputs["summary"], outputs["patches"].mean(1)], -1)
    torch.testing.assert_close(teacher.embed(some_images()), expected)
    assert not teacher.embed(some_images()).requires_grad


def test_tiles_that_no_teacher_can_take(weights_dir):
    teacher = load_teacher("toy_cells", weights_dir, steps=2)
    with pytest.raises(ValueError, match="given to a ViT"):
        teacher(torch.rand(1, 3, 64, 80))
    with pytest.raises(
        InputError, match="toy_cells: a tile of 100 x 15 px is too small; give 16 px or more"
    ):
        teacher.embed(torch.rand(1, 3, 15, 100))
    assert teacher.embed(torch.rand(1, 3, 16, 100)).shape == (1, 128)


def test_patches_meet_on_the_students_grid_and_images_are_resized(shallow, tmp_path):
    published_file("uni", tmp_path)
    teacher = load_teacher("uni", tmp_path)
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    own, resampled = teacher(images), teacher(images, grid=16)
    assert own["patches"].shape == (1, 196, 1024) and resampled["patches"].shape == (1, 256, 1024)
    maps = own["patches"].transpose(1, 2).view(1, 1024, 14, 14)
    expected = F.interpolate(maps, (16, 16), mode="bilinear").view(1, 1024, 256).transpose(1, 2)
    torch.testing.assert_close(resampled["patches"], expected)
    assert torch.equal(own["summary"], resampled["summary"])
    torch.testing.assert_close(own["summary"], teacher(images / 255)["summary"])
    large = F.interpolate(
        images.float() / 255, (448, 448)
    )  # nearest: the resize back must give about the same tile
    assert F.cosine_similarity(teacher(large)["summary"], own["summary"]).item() > 0.99


def test_teachers_stay_frozen_in_eval_mode_in_the_compute_dtype(weights_dir):
    teacher = load_teacher("toy_cells", weights_dir, dtype=torch.bfloat16, steps=2)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    tokens = teacher(images)
    assert tokens["summary"].dtype == torch.bfloat16 and not tokens["summary"].requires_grad
    reference = load_teacher("toy_cells", weights_dir, steps=2)(images)["summary"]
    assert F.cosine_similarity(tokens["summary"].float(), reference).min() > 0.99


def test_offline_teachers_are_trained_once_a_recipe_and_leave_the_callers_generator_alone(
    tmp_path, monkeypatch, capsys
):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_teacher("toy_tissue", tmp_path, steps=2, seed=1)
    assert torch.equal(before, torch.get_rng_state()) and "ETA" in capsys.readouterr().out
    other = load_teacher("toy_tissue", tmp_path, steps=3, seed=1)
    assert len(list(tmp_path.glob("*.pt"))) == 2  # the second recipe did not touch the first
    monkeypatch.setattr(teachers, "train_offline_teacher", lambda *_: pytest.fail("trained again"))
    again = load_teacher("toy_tissue", tmp_path, steps=2, seed=1)
    weights = [model.vit.state_dict()["blocks.0.mlp.fc1.weight"] for model in (first, other, again)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_a_teacher_of_an_older_recipe_is_not_taken(tmp_path):
    """0.1.0 trained it another way, and kept it under this name."""
    older = tmp_path / "toy_cells-v1-2-0.pt"
    older.write_bytes(b"of 0.1.0")
    load_teacher("toy_cells", tmp_path, steps=2)
    assert older.read_bytes() == b"of 0.1.0"
    assert [file.name for file in tmp_path.glob("toy_cells-v1.2-2-0.pt")]


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "layout", "suffix"),
    [("uni", "timm", "bin"), ("midnight", "hf", "safetensors")],
)
def test_loading_takes_little_more_than_the_model(tmp_path, name, layout, suffix):
    """fp32 files read into bf16: at most 1.2 x the model, above the mapped file (a copy in fp32
    alone would be 2 x)."""
    depth = 4 if name == "uni" else 2
    state, _ = cards.reference(name, layout, tmp_path, depth)
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    cards.write(state, tmp_path / f"{name}.{suffix}")
    took = load_apart(name, tmp_path, depth, torch.bfloat16)
    (tmp_path / f"{name}.{suffix}").unlink()
    libraries = 0.017  # GB that they keep, whatever the size
    # as much as the model; once 0.3 % less was measured, which pages in use before would explain
    assert 0.98 * took.size <= took.own < 1.2 * took.size + libraries, took


# ---- what users get wrong ------------------------------------------------------------------------


def test_unknown_names():
    with pytest.raises(InputError, match="'unii'; choose from uni, uni2_h, virchow"):
        load_teacher("unii")


def test_every_missing_teacher_has_a_line_of_its_own(tmp_path, capsys):
    (tmp_path / "midnight.bin").touch()
    with pytest.raises(InputError) as error:
        find_weights(["uni", "toy_cells", "midnight", "virchow", "kaiko_l14"], tmp_path)
    uni, virchow, kaiko, last = error.value.lines
    assert uni == (
        "no weights for uni: Hugging Face cannot be reached; ask for access at "
        "https://huggingface.co/MahmoodLab/UNI, then hf auth login and hf download MahmoodLab/UNI "
        f"pytorch_model.bin --local-dir {tmp_path}/uni, or put the file at {tmp_path}/uni.bin; "
        f"licence {TEACHERS['uni'].licence}"
    )
    assert "virchow: " in virchow and f"put the file at {tmp_path}/virchow.safetensors" in virchow
    assert "open to all at https://" in kaiko and "auth" not in kaiko
    assert "_reg4_224.kaiko" in kaiko and "_reg4_dinov2.kaiko" in kaiko  # both names of its repo
    assert last.startswith("open today, to begin with: --teachers midnight,openpath ")
    assert capsys.readouterr().out == f"weights of midnight: {tmp_path}/midnight.bin\n"
    with pytest.raises(InputError) as error:  # no advice that is no other
        find_weights(["openpath"], tmp_path)
    assert len(error.value.lines) == 1
    assert find_weights(["uni", "toy_cells"], tmp_path, fetch=False) == {}


def test_a_program_ends_with_those_lines(tmp_path):
    child = fork(tmp_path, "train.py", "--teachers", "uni,virchow", "--device", "cpu")
    assert child.code == 2 and child.out == ""
    starts = ("no weights for uni: ", "no weights for virchow: ", "open today, to begin with: ")
    for line, start in zip(child.err.splitlines(), starts, strict=True):
        assert line.startswith(f"train.py: {start}"), line


def test_a_folder_as_hf_download_leaves_it(tmp_path):
    for name, file in (
        ("uni", "pytorch_model.bin"),
        ("gpfm", "GPFM.pth"),
        ("pathryoshka_b", "pytorch_model.bin"),  # its file's name is a guess: either will do
        ("virchow", "model.safetensors"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
        assert find_weights([name], tmp_path) == {name: tmp_path / name / file}
    (tmp_path / "uni.pth").touch()  # what was put there by name comes first
    assert find_weights(["uni"], tmp_path) == {"uni": tmp_path / "uni.pth"}


class ConnectError(Exception):
    pass


class GatedRepoError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch):
    """huggingface_hub in front of a network that is made up: {"REPO/FILE": a path or an error}."""
    library = oracle("huggingface_hub")
    answers = {}
    asked = []

    def ask(url, timeout):
        assert timeout <= 3
        key = url.removeprefix("https://huggingface.co/").replace("/resolve/main", "")
        asked.append(key)
        answer = answers.get(key, ConnectError("Name or service not known"))
        if isinstance(answer, Exception):
            raise answer

    def download(repo, file):
        return answers[f"{repo}/{file}"]

    monkeypatch.setattr(library, "get_hf_file_metadata", ask)
    monkeypatch.setattr(library, "hf_hub_download", download)
    return library, answers, asked


def test_a_gate_that_is_closed_and_a_network_that_is_not_there(tmp_path, hub):
    _, answers, asked = hub
    answers["MahmoodLab/UNI/pytorch_model.bin"] = GatedRepoError("403\nAccess is restricted")
    answers["owkin/phikon/model.safetensors"] = str(tmp_path / "phikon.safetensors")
    with pytest.raises(InputError) as error:
        find_weights(["uni", "phikon", "virchow", "gigapath"], tmp_path)
    uni, virchow, gigapath, _ = error.value.lines
    assert uni.startswith("no weights for uni: fetching failed (GatedRepoError); ask for access at")
    assert virchow.startswith("no weights for virchow: Hugging Face cannot be reached; ")
    assert gigapath.startswith("no weights for gigapath: Hugging Face cannot be reached; ")
    assert len(asked) == 3  # out of reach once, it is not asked again
    assert find_weights(["phikon"], tmp_path) == {"phikon": tmp_path / "phikon.safetensors"}


def test_a_file_of_the_other_usual_name_and_a_cached_one(tmp_path, hub, monkeypatch):
    library, answers, asked = hub
    missing = library.errors.EntryNotFoundError.__new__(library.errors.EntryNotFoundError)
    answers["SchuefflerLab/Pathryoshka-B/model.safetensors"] = missing
    answers["SchuefflerLab/Pathryoshka-B/pytorch_model.bin"] = str(tmp_path / "found.bin")
    assert find_weights(["pathryoshka_b"], tmp_path) == {"pathryoshka_b": tmp_path / "found.bin"}
    answers["SchuefflerLab/Pathryoshka-B/pytorch_model.bin"] = missing
    with pytest.raises(InputError, match="its repo has no model.safetensors; ask for access"):
        find_weights(["pathryoshka_b"], tmp_path)
    asked.clear()
    cached = {"MahmoodLab/UNI": str(tmp_path / "cached.bin")}
    monkeypatch.setattr(library, "try_to_load_from_cache", lambda repo, file: cached.get(repo))
    for fetch in (True, False):
        assert find_weights(["uni"], tmp_path, fetch) == {"uni": tmp_path / "cached.bin"}
    assert not asked  # what is there needs no network


def test_the_real_library_without_a_network_is_not_waited_for(tmp_path, monkeypatch):
    """Its own call to download waited 23 s, in six tries. Here its address is a closed port."""
    constants = oracle("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(InputError, match="uni: Hugging Face cannot be reached"):
        find_weights(["uni", "virchow"], tmp_path)
    assert time.monotonic() - began < 10


class Payload:
    def __reduce__(self):
        return print, ("code in a pickle ran",)


def test_a_pickle_that_carries_code_is_refused(tmp_path, capsys):
    torch.save({"x": Payload()}, tmp_path / "uni.bin")
    (tmp_path / "virchow.bin").write_bytes(pickle.dumps(Payload()))
    for name in ("uni", "virchow"):
        with pytest.raises(InputError, match=f"{name}.bin is refused"):
            load_teacher(name, tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_damaged_files_are_named(shallow, tmp_path):
    for suffix in ("bin", "safetensors", "pth"):
        published_file("kaiko_s16", tmp_path, suffix)
        whole = (tmp_path / f"kaiko_s16.{suffix}").read_bytes()
        header = struct.pack("<Q", 1 << 60) + b"{}"
        pointer = (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"  # not yet pulled
        )
        for i, content in enumerate((whole[: len(whole) // 2], whole[:-9], b"", header, pointer)):
            path = tmp_path / f"broken-{i}" / f"kaiko_s16.{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            with pytest.raises(
                InputError, match=f"kaiko_s16.{suffix} is (damaged|refused)"
            ) as error:
                load_teacher("kaiko_s16", path.parent)
            assert "\n" not in str(error.value)
            path.unlink()
        (tmp_path / f"kaiko_s16.{suffix}").unlink()
    (tmp_path / "kaiko_s16.bin").mkdir()
    with pytest.raises(InputError, match="kaiko_s16.bin is damaged"):
        load_teacher("kaiko_s16", tmp_path)


def test_another_models_file_names_the_first_keys_and_shapes(shallow, tmp_path):
    published_file("virchow", tmp_path)
    (tmp_path / "virchow.bin").rename(tmp_path / "uni.bin")
    with pytest.raises(InputError) as error:
        load_teacher("uni", tmp_path)
    assert str(tmp_path / "uni.bin") in str(error.value)
    assert "cls_token is (1, 1, 1280), expected (1, 1, 1024); pos_embed is (1, 197, 1280)" in str(
        error.value
    )
    assert (
        "uni.bin, which should be pytorch_model.bin of MahmoodLab/UNI, holds another model: "
        in str(error.value)
    )
    state = VisionTransformer(**TEACHERS["uni"].arch).state_dict()
    state["tail.weight"] = state.pop("norm.weight")
    state["head.weight"] = torch.zeros(10, 1024)  # a classifier is left out
    cards.write(state, tmp_path / "uni.bin")
    message = r"norm.weight is missing, expected \(1024,\); tail.weight is \(1024,\), expected none"
    with pytest.raises(InputError, match=message):
        load_teacher("uni", tmp_path)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gigapath_flash", "kaiko_s16"),
        ("mstar", "gpfm"),
        ("pathorchestra", "phikon"),
        ("openmidnight", "midnight"),
        ("openpath", "midnight"),
        ("pathryoshka_b", "h0_mini"),
        ("kaiko_s8", "kaiko_s16"),
        ("kaiko_b8", "kaiko_s8"),
        ("lunit_s8", "lunit_s16"),
        ("sp22m", "dinov2_s"),
    ],
)
def test_a_near_relatives_file_is_refused_with_names_and_shapes(shallow, name, other):
    """On the meta device: what refuses is what loads."""
    with torch.device("meta"):
        ours = VisionTransformer(**TEACHERS[name].arch)
        theirs = VisionTransformer(**TEACHERS[other].arch)
    with pytest.raises(InputError) as error:
        teachers.refuse_differences(ours.state_dict(), theirs.state_dict(), "x.bin")
    assert re.search(r"(\w+\.?)+ is (missing|\([\d, ]+\)), expected (\(|none)", str(error.value))


def test_a_head_that_changes_the_embedding_is_not_dropped(shallow, tmp_path):
    """As in a file of Mettle's: an H-optimus-0 under `backbone.`, and a head on its CLS."""
    published_file("h_optimus_0", tmp_path)
    path = tmp_path / "h_optimus_0.bin"
    state = {f"backbone.{key}": value for key, value in read_weights(path).items()}
    cards.write(state, path)
    load_teacher("h_optimus_0", tmp_path)  # the control: without the head it is one
    head = {"head.P": torch.zeros(8, 1536), "head.mix": torch.zeros(1)}
    cards.write({**state, **head}, path)
    message = r"2 tensors differ, first head.P is \(8, 1536\), expected none; head.mix is \(1,\)"
    with pytest.raises(InputError, match=message):
        load_teacher("h_optimus_0", tmp_path)


def test_the_papers_own_student_as_teacher_and_as_a_beginning(shallow, tmp_path, monkeypatch):
    monkeypatch.setitem(STUDENTS, "vit_b", TEACHERS["pathryoshka_b"].arch)
    published_file("pathryoshka_b", tmp_path, "safetensors")
    teacher = load_teacher("pathryoshka_b", tmp_path)
    vit = VisionTransformer(**STUDENTS["vit_b"])
    licences = teachers.load_init(vit, "pathryoshka_b", tmp_path)
    assert licences == {"pathryoshka_b": TEACHERS["pathryoshka_b"].licence}
    for key, value in vit.state_dict().items():
        assert torch.equal(value, teacher.vit.state_dict()[key]), key


STRANGE = {
    "a list": [1, 2],
    "numbers": {"epoch": 3},
    "integer weights": lambda state: {**state, "norm.weight": state["norm.weight"].to(torch.int8)},
    "keys that are no text": {5: torch.zeros(1)},
    "two of one name": lambda state: {**state, "backbone.norm.weight": state["norm.weight"]},
    "positions without rows": lambda state: {**state, "pos_embed": torch.zeros(1, 0, 384)},
    "flat positions": lambda state: {**state, "pos_embed": torch.zeros(384)},
    "a scalar": lambda state: {**state, "norm.weight": torch.tensor(1.0)},
    "no positions": lambda state: {
        key: value for key, value in state.items() if key != "pos_embed"
    },
    "positions that are no square": lambda state: {**state, "pos_embed": torch.zeros(1, 201, 384)},
    "an empty wrapper": {"state_dict": {}},
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_files_are_refused_in_one_line(shallow, tmp_path, kind):
    content = STRANGE[kind]
    if callable(content):
        content = content(VisionTransformer(**TEACHERS["kaiko_s16"].arch).state_dict())
    torch.save(content, tmp_path / "kaiko_s16.pt")
    with pytest.raises(InputError, match="kaiko_s16.pt, .*holds another model") as error:
        load_teacher("kaiko_s16", tmp_path)
    assert "\n" not in str(error.value)


# ---- files that 0.1.0 refused, or took in silence for something else -----------------------------


def toy_vit() -> VisionTransformer:
    torch.manual_seed(3)
    return randomise(VisionTransformer(**STUDENTS["toy"]))


def load_toy(path) -> dict:
    vit = VisionTransformer(**STUDENTS["toy"])
    load_published(vit, path, str(path))
    return vit.state_dict()


def assert_loads(path, state):
    got = load_toy(path)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], state[key]) for key in state)


@pytest.mark.parametrize(("ema", "raw"), [("state_dict_ema", "state_dict"), ("model_ema", "model")])
@pytest.mark.parametrize("first", ["raw", "ema"])
def test_averaged_weights_are_taken_before_the_raw_ones_as_in_timm(
    tmp_path, capsys, ema, raw, first
):
    timm = oracle("timm")
    averaged = toy_vit().state_dict()
    other = {key: value + 1 for key, value in averaged.items()}
    content = {raw: other, ema: averaged, "epoch": 3}
    if first == "ema":
        content = dict(reversed(content.items()))
    torch.save(content, tmp_path / "x.pth")
    assert_loads(tmp_path / "x.pth", averaged)
    assert f"its averaged weights ({ema}) are taken" in capsys.readouterr().out
    of_timm = timm.models._helpers.load_state_dict(str(tmp_path / "x.pth"))
    assert all(torch.equal(of_timm[key], averaged[key]) for key in averaged)
    torch.save({raw: other}, tmp_path / "x.pth")
    assert_loads(tmp_path / "x.pth", other)
    assert "averaged" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "teacher.backbone.", "module._orig_mod.", "encoder."]
)
def test_prefixes_that_training_code_leaves(tmp_path, prefix):
    state = toy_vit().state_dict()
    content = {prefix + key: value for key, value in state.items()}
    if prefix.startswith("teacher"):
        content["teacher.dino_head.last_layer.weight"] = torch.zeros(3)
    torch.save({"state_dict": content}, tmp_path / "x.pth")
    assert_loads(tmp_path / "x.pth", state)


def test_a_refusal_shows_what_is_left_over_beside_what_is_missing(tmp_path):
    """0.1.0 named the first three differences: with three tensors missing, no key of the file was
    shown."""
    state = {"student." + key: value for key, value in toy_vit().state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(InputError) as error:
        load_toy(tmp_path / "x.pth")
    message = str(error.value)
    assert "cls_token is missing, expected (1, 1, 48)" in message
    assert "student.cls_token is (1, 1, 48), expected none" in message
    assert "\n" not in message


def test_an_honest_checkpoint_with_other_python_objects_is_told_what_to_do(tmp_path):
    state = toy_vit().state_dict()
    others = {
        "argparse.Namespace": argparse.Namespace(lr=0.1),
        "multiarray.scalar": np.float64(0.5),
    }
    for name, value in others.items():
        torch.save({"model": state, "extra": value}, tmp_path / "x.pth")
        with pytest.raises(InputError) as error:
            load_toy(tmp_path / "x.pth")
        message = str(error.value)
        assert "x.pth is refused" in message and "\n" not in message
        assert name in message and "save its tensors alone" in message


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no such names")
def test_weights_in_a_folder_whose_name_is_not_utf8(tmp_path):
    write = oracle("safetensors.torch").save_file
    state = toy_vit().state_dict()
    folder = os.path.join(os.fsencode(tmp_path), b"gr\xf6\xdfe")
    os.mkdir(folder)
    torch.save(state, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    write(state, tmp_path / "x.safetensors")
    for name in ("zip.pth", "legacy.pth", "x.safetensors"):
        os.rename(tmp_path / name, os.path.join(folder, os.fsencode(name)))
        assert_loads(Path(os.fsdecode(folder), name), state)


NO_MMAP = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static int refused(int fd, int prot) {
    char link[64], path[4096] = {0};
    if (fd < 0 || (prot & PROT_EXEC)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, path, sizeof path - 1) < 0) return 0;
    return strstr(path, "/without-mmap/") != NULL;
}
#define REPLACE(name) \
void *name(void *a, size_t n, int prot, int flags, int fd, off_t offset) { \
    if (refused(fd, prot)) { errno = ENODEV; return MAP_FAILED; } \
    void *(*next)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, #name); \
    return next(a, n, prot, flags, fd, offset); \
}
REPLACE(mmap)
REPLACE(mmap64)
"""
READ = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from teachers import read_weights
try:
    torch.load(sys.argv[2], mmap=True)
except RuntimeError as error:
    print(error, file=sys.stderr)
for path in sys.argv[2:]:
    total = sum(float(value.double().sum()) for value in read_weights(path).values())
    print(total)
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="the disk without mmap is made with gcc")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="LD_PRELOAD")
def test_weights_on_a_disk_that_refuses_mmap(tmp_path):
    """As network and FUSE disks do: mmap answers ENODEV for every file below one folder."""
    write = oracle("safetensors.torch").save_file
    (tmp_path / "shim.c").write_text(NO_MMAP)
    shim = tmp_path / "shim.so"
    build = ["gcc", "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"]
    subprocess.run([str(word) for word in build], check=True)
    folder = tmp_path / "without-mmap"
    folder.mkdir()
    state = toy_vit().state_dict()
    torch.save(state, folder / "x.pth")
    write(state, folder / "x.safetensors")
    paths = [str(folder / "x.pth"), str(folder / "x.safetensors")]
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    with_shim = [sys.executable, "-c", READ, str(ROOT), *paths]
    result = subprocess.run(with_shim, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    expected = sum(float(value.double().sum()) for value in state.values())
    assert [float(line) for line in result.stdout.split()] == pytest.approx([expected, expected])
    assert "unable to mmap" in result.stderr  # the control: torch itself is refused


def test_safetensors_missing_names_the_pip_command(tmp_path, monkeypatch):
    (tmp_path / "uni.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        read_weights(tmp_path / "uni.safetensors")


# ---- python teachers.py --------------------------------------------------------------------------


def test_the_list_of_teachers(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "virchow2.safetensors").touch()
    child = fork(tmp_path, "teachers.py")
    assert child.code == 0, child.err
    for name, spec in TEACHERS.items():
        entry = re.search(rf"^{name} .*\n.*", child.out, re.MULTILINE)[0]
        for part in (
            f"width {spec.arch['width']:4}",
            spec.tile,
            f"access {spec.gate}",
            f"licence {spec.licence}",
        ):
            assert part in entry, (name, part)
        if name in cards.COUNTS:
            assert f" {cards.COUNTS[name][1] / 1e6:.3f} M" in entry
            found = name == "virchow2"
            assert ("weights/virchow2.safetensors" in entry) == found and (
                f"not found: {spec.file} of {spec.repo}" in entry
            ) != found


def test_the_list_of_open_teachers(tmp_path):
    child = fork(tmp_path, "teachers.py", "--open")
    assert child.code == 0, child.err
    listed = set(re.findall(r"^(\w+) .* access open$", child.out, re.MULTILINE))
    assert listed == {name for name in PUBLISHED if TEACHERS[name].gate == "open"}
    assert {"midnight", "openpath", "dinov2_b", "sp22m"} <= listed
    assert "--standardize channel" in child.out


def test_trying_a_teacher_on_a_tile(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    cards.write(
        VisionTransformer(**TEACHERS["kaiko_s16"].arch).state_dict(), Path("weights/kaiko_s16.bin")
    )
    tile = write_tiles(tmp_path / "tiles", 1, (300, 260))[0]
    child = fork(tmp_path, "teachers.py", "kaiko_s16", tile, "--device", "cpu")
    assert child.code == 0, child.err
    teacher = load_teacher("kaiko_s16", tmp_path / "weights")
    norm = teacher.embed(torch.from_numpy(np.array(Image.open(tile))).permute(2, 0, 1)[None]).norm()
    assert "300 x 260 px, shorter side to 224 px, then the centre\n" in child.out
    assert f"embedding (1, 384), L2 norm {norm:.3f}, in " in child.out
    assert "loaded in " in child.out and "Kaiko non-commercial" in child.out
    # the rest in this process: starting Python takes longer than what is tested
    tiny = write_tiles(tmp_path / "tiny", 1, (55, 300))[0]
    Path("text.png").write_text("no image")
    Path("weights/lunit_s16.bin").write_bytes(b"PK")
    Path("weights/uni.bin").symlink_to("kaiko_s16.bin")
    for arguments, message in (
        (["kaiko_s17", tile], "no teacher is called 'kaiko_s17'; choose from"),
        (["kaiko_s16"], "TILE: none is given; name an image to embed"),
        (["kaiko_s16", "text.png"], "TILE: text.png: damaged"),
        (["kaiko_s16", "none.png"], "TILE: none.png: does not exist"),
        (["kaiko_s16", tiny], "kaiko_s16: a tile of 55 x 300 px is too small; give 56 px or more"),
        (["lunit_s16", tile], "weights/lunit_s16.bin is refused"),
        (
            ["uni", tile],
            "uni.bin, which should be pytorch_model.bin of MahmoodLab/UNI, "
            "holds another model: 342 tensors differ",
        ),
        (
            ["dinov2_s", tile],
            "no weights for dinov2_s: Hugging Face cannot be reached; open to all",
        ),
        (["kaiko_s16", tile, "--device", "tpu"], "--device: tpu"),
        (["kaiko_s16", tile, "--weights-dir", ""], "--weights-dir"),
        (["dinov2_s", "--weights-dir", "w", "no.png"], "TILE: no.png: does not exist"),
    ):
        monkeypatch.setattr(sys, "argv", ["teachers.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_program(teachers.main)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and len(lines) == 1 and message in lines[0], (arguments, lines)
