"""The hand-written ViT against timm's, the order of tokens, and the student around it."""

import functools
import json
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from cards import bare
from conftest import oracle, randomise
from torch import nn

from evaluate import load_student
from extras.benchmarks.timing import timm_twin
from student import STUDENTS, Adaptors, InputError, Student, VisionTransformer, truncate
from teachers import TEACHERS, load_published

ARCHS = {**STUDENTS, "uni": TEACHERS["uni"].arch, "virchow": TEACHERS["virchow"].arch}
PARAMETERS = {"uni": 303_350_784, "virchow": 631_229_184, "vit_s": 21_629_952, "vit_b": 85_727_232}
TENSORS = {"uni": 342, "virchow": 454, "vit_s": 175, "vit_b": 175}


@pytest.mark.parametrize("name", ARCHS)
def test_equal_to_timm_at_full_width_and_reduced_depth(name):
    oracle("timm")
    arch = {**ARCHS[name], "depth": 2}
    ours, twin = randomise(bare(VisionTransformer, **arch)), bare(timm_twin, arch)
    twin.load_state_dict(ours.state_dict(), strict=True)  # the same names and shapes, both ways
    x = torch.randn(
        2, 3, arch["img_size"], arch["img_size"], generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        expected, got = twin.forward_features(x), ours(x)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    summary, patches = ours.split(got).values()
    torch.testing.assert_close(summary, twin(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(patches, expected[:, twin.num_prefix_tokens :], rtol=1e-4, atol=1e-4)


def test_a_swapped_gate_or_position_would_show():
    """Negative control: the comparison above fails when SwiGLU's halves or the position rows are
    misread."""
    oracle("timm")
    arch = {**ARCHS["virchow"], "depth": 1}
    ours, twin = randomise(bare(VisionTransformer, **arch)), bare(timm_twin, arch)
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
    student = Student("toy")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = student(images)
    assert tokens["summary"].shape == (2, 48)
    assert tokens["patches"].shape == (2, 64, 48)
    assert (student.img_size, student.grid, student.width) == (64, 8, 48)
    torch.testing.assert_close(tokens["summary"], student(images / 255)["summary"])
    with pytest.raises(ValueError, match=r"\(32, 32\)"):
        student(torch.zeros(1, 3, 32, 32))


def test_a_student_is_its_backbone_and_takes_arguments_instead_of_a_name():
    student = Student({**STUDENTS["toy"], "depth": 1})
    assert {key.split(".")[0] for key in student.state_dict()} == {"backbone"}
    assert student(torch.zeros(1, 3, 64, 64))["summary"][:, :16].shape == (1, 16)


def linear_layers(model):
    """[(name, weight (out, in))] of the linear layers and of the patch embedding."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert not module.bias.any(), name
            found.append((name, module.weight.detach().flatten(1)))
    return found


def test_narrow_models_start_from_xavier():
    adaptors = Adaptors(48, {"a": 128}, [4])
    for name, weight in [*linear_layers(Student("toy")), *linear_layers(adaptors)]:
        out, inputs = weight.shape
        expected = (2 / (inputs + out)) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.15), name


def test_a_vit_s_starts_as_ever():
    """0.1.0's start, tensor for tensor: a standard deviation of 0.02, cut at two."""
    student = Student({**STUDENTS["vit_s"], "depth": 1})
    adaptors = Adaptors(384, {"a": 128}, [24])
    for name, weight in [*linear_layers(student), *linear_layers(adaptors)]:
        assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
    torch.manual_seed(3)
    drawn = linear_layers(Adaptors(384, {"a": 128}, [24]))
    torch.manual_seed(3)
    again = Adaptors(384, {"a": 128}, [24])
    torch.manual_seed(3)
    for module in again.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # what torch itself does first, when a layer is made
    for name, weight in drawn:
        expected = nn.init.trunc_normal_(torch.empty_like(weight), std=0.02)
        assert torch.equal(weight, expected), name


def test_adaptors_predict_every_teacher_at_every_dim_from_the_prefix_alone():
    adaptors = randomise(Adaptors(48, {"a": 24, "b": 32}, [4, 16]))
    assert adaptors.nested_dims == [4, 16, 48]
    tokens = {"summary": torch.randn(2, 48), "patches": torch.randn(2, 9, 48)}
    predictions = adaptors(tokens)
    assert list(predictions) == [4, 16, 48]
    for m in predictions:
        assert list(predictions[m]) == ["a", "b"]
        for t, D_t in (("a", 24), ("b", 32)):
            assert predictions[m][t]["summary"].shape == (2, D_t)
            assert predictions[m][t]["patches"].shape == (2, 9, D_t)
    changed = {kind: z.clone() for kind, z in tokens.items()}
    for z in changed.values():
        z[..., 4:] = torch.randn_like(z[..., 4:])
    again = adaptors(changed)
    for t in ("a", "b"):
        for kind in tokens:
            assert torch.equal(predictions[4][t][kind], again[4][t][kind])
            assert not torch.allclose(predictions[16][t][kind], again[16][t][kind])


def test_the_full_dim_belongs_to_nested_dims_and_wider_ones_do_not_fit():
    assert Adaptors(48, {}, [8, 2]).nested_dims == [2, 8, 48]
    for dims in ([96], [0, 4], [-1]):
        with pytest.raises(InputError, match="--dims: .* give 1 to 48"):
            Adaptors(48, {}, dims)


def test_truncate_is_the_prefix_of_every_token():
    z = {"summary": torch.randn(2, 48), "patches": torch.randn(2, 3, 48)}
    cut = truncate(z, 8)
    assert torch.equal(cut["summary"], z["summary"][:, :8])
    assert torch.equal(cut["patches"], z["patches"][:, :, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_an_exported_student_takes_any_batch(dtype):
    """0.1.0 took len(x) in the ViT's forward, which fixes the batch of an export."""
    student = randomise(Student({**STUDENTS["toy"], "depth": 2}))
    example = torch.randint(0, 256, (3, 3, 64, 64)).to(dtype)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(student, (example,), dynamic_shapes={"images": {0: batch}})
    exported = program.module()
    for B in (1, 5, 17):
        images = torch.randint(0, 256, (B, 3, 64, 64)).to(dtype)
        if dtype == torch.float32:
            images = images / 255
        expected = student(images)
        got = exported(images)
        for kind in expected:
            torch.testing.assert_close(got[kind], expected[kind])


# ---- files that others made: refused in one line that names them, and no code of theirs runs -----
@pytest.fixture
def toy(tmp_path):
    """A whole student.pt as train.py writes it -> (its path, a fresh copy of its content)."""
    vit = randomise(Student("toy").backbone)
    config = {
        "student": "toy",
        "arch": STUDENTS["toy"],
        "nested_dims": [4, 48],
        "step": 2,
        "steps": 2,
    }
    config |= {
        "teachers": ["toy_cells"],
        "teacher_recipe": {"steps": 2, "seed": 0},
        "licences": {"toy_cells": "x"},
    }
    path = tmp_path / "student.pt"
    torch.save({"state_dict": vit.state_dict(), "config": config}, path)
    return path, torch.load(path, weights_only=True)


def load_all(path):
    """All that the scripts do with such a file: a student, a teacher or --init, and its plain
    content."""
    student, config = load_student(path)
    load_published(VisionTransformer(**STUDENTS["toy"]), path, f"--init: {path}")
    return student.backbone.state_dict(), config


def load_vit(path):
    vit = VisionTransformer(**STUDENTS["toy"])
    load_published(vit, path, str(path))
    return vit.state_dict(), {}


def assert_refused(path, load=load_all):
    with pytest.raises(InputError) as error:
        load(path)
    assert "\n" not in str(error.value) and path.name in str(error.value), error.value
    return str(error.value)


class Runs:
    """An object whose pickle calls `function` when it is read."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


CODE = {  # what a pickle could call, given a file to leave behind as a mark
    "os.system": lambda mark: Runs(os.system, f"touch {mark}"),
    "builtins.eval": lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    "builtins.exec": lambda mark: Runs(exec, f"open({str(mark)!r}, 'w')"),
    "builtins.open": lambda mark: Runs(open, str(mark), "w"),
    "subprocess": lambda mark: Runs(subprocess.Popen, ["touch", str(mark)]),
    "pathlib": lambda mark: Runs(Path.touch, mark),
    "functools.partial": lambda mark: Runs(functools.partial, os.system, f"touch {mark}"),
    "getattr": lambda mark: Runs(getattr, "text", "upper"),
    "torch.save": lambda mark: Runs(torch.save, {}, str(mark)),
    "torch.load": lambda mark: Runs(torch.load, str(mark)),
    "torch.hub": lambda mark: Runs(torch.hub.load, str(mark.parent), "x"),
    "a parameter of it": lambda mark: Runs(
        torch._utils._rebuild_parameter, Runs(os.system, f"touch {mark}"), True, {}
    ),
    "a module": lambda mark: torch.nn.Linear(2, 2),
    "numpy.fromfile": lambda mark: Runs(np.fromfile, str(mark)),
}


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("code", CODE)
def test_a_pickle_that_carries_code_is_refused_and_the_code_does_not_run(tmp_path, toy, code, form):
    path, content = toy
    mark = tmp_path / "mark"
    for place in ("top", "config", "state_dict"):
        made = CODE[code](mark)
        bad = (
            made if place == "top" else {**content, place: {**content[place], "norm.weight": made}}
        )
        if form == "plain pickle":
            path.write_bytes(pickle.dumps(bad))
        else:
            torch.save(bad, path, _use_new_zipfile_serialization=form == "zip")
        for suffix in ("pt", "safetensors"):
            shutil.copy(path, other := tmp_path / f"other.{suffix}")
            assert_refused(other)
            assert_refused(other, load_vit)
    assert not mark.exists()


def safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"norm.weight": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


HEADERS = {
    "length of 2^63": (one(), bytes(8), 2**63),
    "length of 2^64 - 1": (one(), bytes(8), 2**64 - 1),
    "length beyond the file": (one(), bytes(8), 10_000),
    "length of 0": (one(), bytes(8), 0),
    "length of 1": (one(), bytes(8), 1),
    "malformed JSON": (b'{"norm.weight": {"dtype"', bytes(8), None),
    "no text": (b"\xff" * 40, bytes(8), None),
    "a list": ([1, 2], bytes(8), None),
    "deeply nested": (b"[" * 100_000, bytes(8), None),
    "an entry that is a number": ({"norm.weight": 1}, bytes(8), None),
    "offsets beyond the file": (one(offsets=(0, 8000), shape=(2000,)), bytes(8), None),
    "offsets backwards": (one(offsets=(8, 0)), bytes(8), None),
    "offsets of another size": (one(offsets=(0, 4)), bytes(8), None),
    "overlapping offsets": (one() | {"norm.bias": one()["norm.weight"]}, bytes(8), None),
    "a hole between tensors": (one(offsets=(8, 16)), bytes(16), None),
    "a negative shape": (one(shape=(-2,)), bytes(8), None),
    "a shape that overflows": (one(shape=(2**62, 4)), bytes(8), None),
    "a fraction as shape": (one(shape=(2.0,)), bytes(8), None),
    "an unknown type": (one(dtype="F31"), bytes(8), None),
    "data left over": (one(), bytes(800), None),
    "nothing in it": ({}, b"", None),
    "only a note": ({"__metadata__": {"format": "pt"}}, b"", None),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_safetensors_file_with_a_bad_header_is_refused(tmp_path, case):
    oracle("safetensors")
    path = tmp_path / "bad.safetensors"
    safetensors(path, *HEADERS[case])
    assert_refused(path)
    assert_refused(path, load_vit)


@pytest.mark.parametrize(
    "kind", [torch.int64, torch.int8, torch.bool, torch.uint8, torch.complex64, "nan", "inf"]
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_no_finite_floats_are_refused(tmp_path, toy, kind, suffix):
    write = oracle("safetensors.torch").save_file
    _, content = toy
    for key in ("norm.weight", "blocks.3.attn.qkv.weight", "pos_embed"):
        state = dict(content["state_dict"])
        state[key] = state[key].to(kind) if isinstance(kind, torch.dtype) else state[key].clone()
        if isinstance(kind, str):
            state[key].view(-1)[-1] = float(kind)
        path = tmp_path / f"weights.{suffix}"
        torch.save(content | {"state_dict": state}, path) if suffix == "pt" else write(state, path)
        message = assert_refused(path, load_vit)
        assert key in message and (not isinstance(kind, str) or "not finite" in message)
        if suffix == "pt":
            assert key in assert_refused(path, load_student)


def test_half_precision_weights_are_taken(tmp_path, toy):
    """Not everything unusual is wrong: fp16, bf16 and float64 files load, as the same numbers."""
    path, content = toy
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {key: value.to(dtype) for key, value in content["state_dict"].items()}
        torch.save(state, path)
        got, _ = load_vit(path)
        assert all(torch.equal(value.float(), got[key]) for key, value in state.items())


def test_a_file_cut_anywhere_is_refused(tmp_path, toy):
    write = oracle("safetensors.torch").save_file
    path, content = toy
    write(content["state_dict"], tmp_path / "whole.safetensors")
    torch.save(content, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for whole in (path, tmp_path / "whole.safetensors", tmp_path / "legacy.pt"):
        text = whole.read_bytes()
        places = np.linspace(0, len(text) - 1, 24).astype(int).tolist() + [
            1,
            4,
            8,
            100,
            len(text) - 22,
            len(text) - 100,
        ]
        for place in places:
            cut = tmp_path / f"cut{whole.suffix}"
            cut.write_bytes(text[:place])
            assert_refused(cut, load_vit)
            if whole == path:
                assert_refused(cut)


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in b) and a.keys() == b.keys()


@pytest.mark.parametrize("form", ["zip", "safetensors"])
def test_a_flipped_byte_is_refused_or_changes_nothing(tmp_path, toy, form):
    """A zip has checksums. A safetensors file has none: a flip in a number is not seen, one in its
    header mostly."""
    write = oracle("safetensors.torch").save_file
    path, content = toy
    path = path if form == "zip" else tmp_path / "whole.safetensors"
    if form != "zip":
        write(content["state_dict"], path)
    whole, rng, refused = bytearray(path.read_bytes()), np.random.default_rng(0), 0
    header = 8 + int.from_bytes(whole[:8], "little") if form == "safetensors" else None
    flipped = tmp_path / f"flipped{path.suffix}"
    places = rng.integers(header or len(whole), size=100).tolist()
    places += [] if header else range(len(whole) - 60, len(whole), 3)  # and its directory's end
    for place in places:
        text = whole.copy()
        text[place] ^= 1 << rng.integers(8)
        flipped.write_bytes(text)
        try:
            state, config = load_all(flipped) if form == "zip" else load_vit(flipped)
        except InputError as error:
            assert "\n" not in str(error) and flipped.name in str(error)
            refused += 1
        else:
            assert same(state, content["state_dict"]), place
            assert form != "zip" or config == content["config"], place
    assert refused > (30 if form == "zip" else 60)


def other(**changes):
    return {**STUDENTS["toy"], **changes}


CONFIGS = {
    "none": None,
    "a list": [],
    "a text": "config",
    "empty": {},
    "no arch": {"arch": ...},
    "no step": {"step": ...},
    "no steps": {"steps": ...},
    "no student": {"student": ...},
    "no teachers": {"teachers": ...},
    "no dims": {"nested_dims": ...},
    "arch of another": {"arch": STUDENTS["vit_s"]},
    "depth negative": {"arch": other(depth=-1)},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_student_file_with_a_damaged_config_is_refused(toy, case):
    path, content = toy
    change = CONFIGS[case]
    config = {**content["config"], **change} if isinstance(change, dict) and change else change
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if value is not ...}
    torch.save({**content, "config": config}, path)
    assert_refused(path, load_student)


CONTENTS = {
    "no config": lambda content: {"state_dict": content["state_dict"]},
    "no weights": lambda content: {"config": content["config"]},
    "a tensor": lambda content: torch.zeros(3),
    "a list": lambda content: [content],
    "none": lambda content: None,
    "weights a list": lambda content: {**content, "state_dict": [1]},
    "weights none": lambda content: {**content, "state_dict": None},
    "weights a tensor": lambda content: {**content, "state_dict": torch.zeros(3)},
    "a weight missing": lambda content: {
        **content,
        "state_dict": dict([*content["state_dict"].items()][1:]),
    },
    "a weight too many": lambda content: {
        **content,
        "state_dict": {**content["state_dict"], "x": torch.zeros(1)},
    },
    "a weight of another shape": lambda content: {
        **content,
        "state_dict": {**content["state_dict"], "norm.bias": torch.zeros(4)},
    },
    "a weight that is a number": lambda content: {
        **content,
        "state_dict": {**content["state_dict"], "norm.bias": 0.0},
    },
    "keys that are numbers": lambda content: {
        **content,
        "state_dict": dict(enumerate(content["state_dict"].values())),
    },
    "another student": lambda content: {
        **content,
        "state_dict": Student("toy").state_dict(),
    },
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_student_file_that_holds_something_else_is_refused(toy, case):
    path, content = toy
    torch.save(CONTENTS[case](content), path)
    assert_refused(path, load_student)
    if case not in ("no config", "another student"):  # which are weights to begin from
        assert_refused(path, load_vit)


@pytest.mark.parametrize("suffix", ["pt", "bin", "pth", "safetensors"])
def test_files_that_are_nothing_of_the_kind(tmp_path, suffix):
    contents = {
        "empty": b"",
        "zeros": bytes(4096),
        "text": b"hello\n" * 50,
        "HTML": b"<html>",
        "zip": b"PK\3\4" * 99,
    }
    contents["LFS pointer"] = (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    contents["random"] = np.random.default_rng(0).bytes(10_000)
    contents["JSON"] = b'{"state_dict": {}}'
    for name, content in contents.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(content)
        assert_refused(path)
        assert_refused(path, load_vit)
    (folder := tmp_path / f"folder.{suffix}").mkdir()
    assert_refused(folder, load_vit)
    with zipfile.ZipFile(path := tmp_path / f"other.{suffix}", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({"state_dict": {}, "config": {}}))
        file.writestr("../../escaped", b"x")
    assert_refused(path)
    assert not (tmp_path.parent.parent / "escaped").exists()
