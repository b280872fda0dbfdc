"""Teachers: published layouts into the one ViT, frozen forward, weight files that are wrong, the offline teachers."""

import dataclasses
import pickle
import struct

import pytest
import torch
import torch.nn.functional as F
from conftest import oracle, randomise
from test_student import timm_twin

import teachers
from data import InputError
from student import VisionTransformer
from teachers import TEACHERS, find_weights, load_teacher, read_weights

PUBLISHED = ["uni", "virchow"]


@pytest.fixture
def shallow(monkeypatch):
    """The published teachers at full width and depth 2: real layouts, small files."""
    for name in PUBLISHED:
        spec = TEACHERS[name]
        monkeypatch.setitem(TEACHERS, name, dataclasses.replace(spec, arch={**spec.arch, "depth": 2}))


def published_file(name, folder, suffix):
    """Random weights as timm would write them, under the name that users give the file."""
    twin = randomise(timm_twin(TEACHERS[name].arch), seed=len(name))
    path = folder / f"{name}.{suffix}"
    if suffix == "safetensors":
        oracle("safetensors.torch").save_file(twin.state_dict(), path)
    else:
        torch.save(twin.state_dict(), path, _use_new_zipfile_serialization=suffix != "pth")  # .pth: the legacy pickle
    return twin


@pytest.mark.parametrize("suffix", ["bin", "safetensors", "pth", "pt"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_give_timms_tokens(shallow, tmp_path, name, suffix):
    twin = published_file(name, tmp_path, suffix)
    teacher = load_teacher(name, tmp_path)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = twin.forward_features((images - mean) / std)
    got = teacher(images)
    assert teacher.grid == (16 if name == "virchow" else 14) and teacher.dim == expected.shape[-1]
    for ours, theirs in ((got["summary"], expected[:, 0]), (got["patches"], expected[:, 1:])):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_patches_meet_on_the_students_grid_and_images_are_resized(shallow, tmp_path):
    published_file("uni", tmp_path, "bin")
    teacher = load_teacher("uni", tmp_path)
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    own, resampled = teacher(images), teacher(images, grid=16)
    assert own["patches"].shape == (1, 196, 1024) and resampled["patches"].shape == (1, 256, 1024)
    maps = own["patches"].transpose(1, 2).view(1, 1024, 14, 14)
    expected = F.interpolate(maps, (16, 16), mode="bilinear").view(1, 1024, 256).transpose(1, 2)
    torch.testing.assert_close(resampled["patches"], expected)
    assert torch.equal(own["summary"], resampled["summary"])
    torch.testing.assert_close(own["summary"], teacher(images / 255)["summary"])
    large = F.interpolate(images.float() / 255, (448, 448))  # nearest: the resize back must give about the same tile
    assert F.cosine_similarity(teacher(large)["summary"], own["summary"]).item() > 0.99


def test_teachers_stay_frozen_in_eval_mode_in_the_compute_dtype(weights_dir):
    teacher = load_teacher("toy_cells", weights_dir, dtype=torch.bfloat16, steps=2)
    parent = torch.nn.ModuleList([teacher]).train()
    assert parent.training and not any(module.training for module in teacher.modules())
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
    assert len(list(tmp_path.iterdir())) == 2  # the second recipe did not touch the first
    monkeypatch.setattr(teachers, "train_offline_teacher", lambda *_: pytest.fail("trained again"))
    again = load_teacher("toy_tissue", tmp_path, steps=2, seed=1)
    weights = [model.vit.state_dict()["blocks.0.mlp.fc1.weight"] for model in (first, other, again)]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_unknown_names():
    with pytest.raises(InputError, match="'unii'; choose from uni, virchow"):
        load_teacher("unii")


def test_one_message_names_every_missing_teacher(tmp_path):
    with pytest.raises(InputError) as error:
        find_weights(["uni", "toy_cells", "virchow"], tmp_path)
    message = str(error.value)
    assert "\n" not in message and "toy_cells" not in message
    for part in ("MahmoodLab/UNI", "paige-ai/Virchow", "CC-BY-NC-ND-4.0", "Apache-2.0", f"{tmp_path}/virchow.bin"):
        assert part in message


class Payload:
    def __reduce__(self):
        return print, ("code in a pickle ran",)


def test_a_pickle_that_carries_code_is_refused(tmp_path, capsys):
    torch.save({"x": Payload()}, tmp_path / "uni.bin")
    (tmp_path / "virchow.bin").write_bytes(pickle.dumps(Payload()))
    for name in PUBLISHED:
        with pytest.raises(InputError, match=f"{name}.bin is refused"):
            load_teacher(name, tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_damaged_files_are_named(shallow, tmp_path):
    published_file("uni", tmp_path, "bin")
    whole = (tmp_path / "uni.bin").read_bytes()
    header = struct.pack("<Q", 1 << 60) + b"{}"
    for suffix, content in (("bin", whole[: len(whole) // 2]), ("bin", b""), ("safetensors", header)):
        path = tmp_path / "broken" / f"uni.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"uni.{suffix} is (damaged|refused)") as error:
            load_teacher("uni", path.parent)
        assert "\n" not in str(error.value)


def test_another_models_file_names_the_first_keys_and_shapes(shallow, tmp_path):
    published_file("virchow", tmp_path, "bin")
    (tmp_path / "virchow.bin").rename(tmp_path / "uni.bin")
    with pytest.raises(InputError) as error:
        load_teacher("uni", tmp_path)
    assert "cls_token is (1, 1, 1280), not (1, 1, 1024); pos_embed is (1, 257, 1280), not (1, 197, 1024)" in str(
        error.value
    )
    state = VisionTransformer(**TEACHERS["uni"].arch).state_dict()
    state["head.weight"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "uni.bin")
    with pytest.raises(
        InputError, match=r"norm.weight is missing, not \(1024,\); head.weight is \(1024,\), not expected"
    ):
        load_teacher("uni", tmp_path)


def test_safetensors_missing_names_the_pip_command(tmp_path, monkeypatch):
    (tmp_path / "uni.safetensors").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        read_weights(tmp_path / "uni.safetensors")
