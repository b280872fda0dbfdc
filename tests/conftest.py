"""Shared by all tests: the repo on the path, oracles, tiny teachers and tiles, a copy of the
sources; and the whole suite in two processes."""

import importlib
import io
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
os.environ["HF_HUB_CACHE"] = str(ROOT / "tests" / "none")  # nor finds the reader's own weights
LONGEST = ["test_readme.py", "test_train.py", "test_teachers.py", "test_stops.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite, where pytest-xdist is installed: two processes, a file at a time.

    Not with a path, -k or -m, nor with what asks for one process: -n 0, -s, --pdb, -p no:xdist.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if option.numprocesses is not None or option.tx:
        return
    if option.file_or_dir or option.keyword or option.markexpr or option.collectonly:
        return
    if option.capture == "no" or option.usepdb or option.trace or os.cpu_count() == 1:
        return
    option.numprocesses = 2
    option.dist = "loadfile"
    option.loadscopereorder = False
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # which each of the two reads when it starts


def pytest_configure():
    # In the background of a script Ctrl-C is ignored, and what the tests start would inherit that
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """The longest files first, so that both processes end at about the same time."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (*LONGEST, item.path.name).index(item.path.name))


def oracle(name: str):
    """A library that tests compare with. Missing: the test skips; on CI (CI=true) it fails."""
    try:
        return importlib.import_module(name)
    except ImportError:
        message = f"oracle {name} is missing: pip install -r requirements-test.txt"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random and far from its start, so that an unused or swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(0.05 * noise)
            else:
                p.copy_(0.3 * noise + 0.5)
    return module.eval()


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory) -> Path:
    """Where the tiny offline teachers of this session (--teacher-steps 2) are kept."""
    return tmp_path_factory.mktemp("weights")


def forget_key_biases(backbone):
    """Zero what no step can learn: the bias of the keys adds the same to all scores of a query, so
    that its gradient is rounding, which AdamW makes steps of.

    backbone: a state dict, changed in place
    """
    for key, bias in backbone.items():
        if key.endswith("attn.qkv.bias"):
            width = len(bias) // 3
            bias[width : 2 * width] = 0


def copy_sources(folder: Path) -> Path:
    """The six files and extras/, for commands to run in; evaluation on 64 tiles of drawn tissue."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    no_bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "extras", folder / "extras", ignore=no_bytecode)
    evaluation = (folder / "evaluate.py").read_text()
    assert evaluation.count("\nN_TILES = 2048") == 1
    evaluation = evaluation.replace("\nN_TILES = 2048", "\nN_TILES = 64")
    (folder / "evaluate.py").write_text(evaluation)
    return folder


def write_tiles(
    folder: Path, n: int, size: tuple[int, int] = (96, 80), suffix: str = "png"
) -> list[Path]:
    """n images of noise whose first pixel tells which they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        paths.append(folder / f"tile_{i:03d}.{suffix}")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def write_shard(path: Path, files: dict[str, bytes], neighbours: bool = True, **options) -> Path:
    """A tar of files, each between the .cls and .json of its name that WebDataset puts there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as shard:
        for name, content in files.items():
            members = {name: content}
            if neighbours:
                stem = name[: name.rfind(".")]
                members = {f"{stem}.cls": b"3", name: content, f"{stem}.json": b'{"slide": 1}'}
            for member, text in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(text)
                shard.addfile(info, io.BytesIO(text))
    return path
