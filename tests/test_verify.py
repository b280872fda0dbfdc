"""extras/verify.py on stand-ins: whole repos with random weights, in each layout."""

import json
import re
import shutil

import cards
import pytest
import torch
from conftest import oracle, write_tiles
from test_teachers import shallow  # noqa: F401 - a fixture

import teachers
from data import run_program
from extras import verify
from teachers import OFFLINE, TEACHERS

DEPTH = 2


def stand_in(name, weights_dir):
    """A local copy of a repo, as `hf download --local-dir` leaves it."""
    folder = weights_dir / name
    folder.mkdir(parents=True)
    if name in verify.TRANSFORMERS:
        layout = "hf-518" if name.startswith("dinov2") else "hf"
        cards.reference(name, layout, folder, DEPTH)  # save_pretrained: config.json, weights
        return folder
    state, _ = cards.reference(name, "timm", folder, DEPTH)
    (folder / "model.safetensors").unlink(missing_ok=True)
    cards.write(state, folder / TEACHERS[name].file)
    architecture, arguments = cards.TIMM[name]
    plain = {key: value for key, value in arguments.items() if key != cards.SWIGLU}
    size = 518 if name == "kaiko_l14" else 224
    config = {"architecture": architecture, "num_classes": 0}
    config["model_args"] = plain | {"depth": DEPTH, "img_size": size}
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def typed(monkeypatch, tmp_path, capsys):
    """`python -m extras.verify WORDS` -> exit code, stdout, stderr."""

    def run(*words):
        words = ["verify.py", *map(str, words), "--weights-dir", str(tmp_path), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", words)
        capsys.readouterr()  # of those who wrote the files
        code = 0
        try:
            run_program(verify.main)
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_every_published_teacher_has_one_way():
    tables = [*verify.TIMM, *verify.TRANSFORMERS, *verify.BY_HAND]
    assert sorted(tables) == sorted(name for name in TEACHERS if name not in OFFLINE)


# timm; timm with SwiGLU and registers; timm at another size; Hugging Face's ViT, and its Dinov2
# with registers at another size
@pytest.mark.parametrize("name", ["lunit_s16", "h0_mini", "phikon", "dinov2_s"])
def test_the_same_weights_are_found_the_same(shallow, typed, tmp_path, name):  # noqa: F811
    stand_in(name, tmp_path)
    tile = write_tiles(tmp_path / "tiles", 1, (300, 260))[0]
    code, out, err = typed(name, tile)
    assert code == 0 and not err, err
    assert out.endswith("verdict   the same\n")
    assert f"teacher   {name}, {TEACHERS[name].repo}\n" in out
    assert re.search(r"file      \S+, [\d,]+ bytes, sha256 [0-9a-f]{64}\n", out)
    library = "timm" if name in verify.TIMM else "transformers"
    assert f"{library} {oracle(library).__version__}" in out and f"torch {torch.__version__}" in out
    assert str(tmp_path) not in out  # it is pasted into an issue
    assert ", all equal\n" in out
    assert ("its config has mean (0.5, 0.5, 0.5)" in out) == (name in verify.TIMM)
    for kind in ("summary", "patches"):
        assert float(re.search(rf"fp32      {kind}: largest difference (\S+)", out)[1]) < 1e-5
        errors = re.search(rf"bf16      {kind}: error (\S+) of their scale, theirs (\S+)\n", out)
        assert 1e-4 < float(errors[1]) < 0.1 and 1e-4 < float(errors[2]) < 0.1


@pytest.mark.parametrize(
    ("name", "key", "count"),
    [
        ("lunit_s16", "blocks.1.mlp.fc2.weight", 30),
        ("phikon", "encoder.layer.1.output.dense.weight", 30),
    ],
)
def test_one_tensor_that_is_wrong_by_a_thousandth_is_found(
    shallow,  # noqa: F811
    typed,
    tmp_path,
    name,
    key,
    count,
):
    """The tokens alone may hide it: the last norm takes out what is added to all channels."""
    folder = stand_in(name, tmp_path)
    file = folder / "model.safetensors"
    state = dict(teachers.read_weights(file))
    state[key] = state[key] + 1e-3
    cards.write(state, tmp_path / f"{name}.safetensors")  # ours reads this one
    code, out, err = typed(name)
    assert code == 1 and not err, err
    assert f"tensors   1 of {count} differ: blocks.1.mlp.fc2.weight by 1.0e-03\n" in out
    assert "verdict   DIFFERENT: 1 tensors" in out
    shutil.copy(file, tmp_path / f"{name}.safetensors")
    assert typed(name)[0] == 0  # the control


def test_code_of_others_is_not_run(shallow, typed, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "hibou_b"
    folder.mkdir()
    cards.reference("hibou_b", "hf", folder, DEPTH)
    monkeypatch.setattr(verify, "open_theirs", lambda *_: pytest.fail("run"))
    code, out, err = typed("hibou_b")
    assert code == 0 and not err, err
    assert "not run: its repo brings code of its own (trust_remote_code)" in out
    assert "open histai/hibou-b as its card says" in out and "verdict   not compared\n" in out
    # what it gives to compare is what transformers makes of the file
    model = oracle("transformers").Dinov2WithRegistersModel.from_pretrained(folder)
    pixels = verify.open_pixels("", "hibou_b")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in TEACHERS["hibou_b"].norm)
    with torch.no_grad():
        tokens = model((pixels - mean) / std).last_hidden_state[0]
    for label, token in (("0, 0", tokens[0]), ("0, 5", tokens[5])):
        shown = re.search(rf"tokens\[{label}\] begins (.*), L2 norm (\S+)\n", out)
        values = [float(value) for value in shown[1].split()]
        assert values == pytest.approx(token[:6].tolist(), abs=1e-3)
        assert float(shown[2]) == pytest.approx(token.norm().item(), rel=1e-4)


def test_what_stops_it_is_one_line(shallow, typed, tmp_path):  # noqa: F811
    cases = {
        "uni": "no weights for uni: Hugging Face cannot be reached; ask for access at https://",
        "toy_cells": "NAME: toy_cells is made here, not published",
        "unii": "NAME: no teacher is called 'unii'",
    }
    for name, message in cases.items():
        code, _, err = typed(name)
        assert code == 2 and err.count("\n") == 1 and message in err, err
    folder = stand_in("lunit_s16", tmp_path)
    assert "TILE: none.png: does not exist" in typed("lunit_s16", "none.png")[2]
    (folder / "config.json").unlink()  # weights alone: their library has to ask the hub
    code, _, err = typed("lunit_s16")
    assert code == 2 and err.count("\n") == 1, err
    assert "timm cannot open 1aurent/vit_small_patch16_224.lunit_dino" in err
    assert f"or the whole repo in {folder}" in err
