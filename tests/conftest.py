"""Shared by all tests: two processes, the repo on the path, oracles, tiny teachers and tiles, a copy of the sources."""

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


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite, where pytest-xdist is installed: two processes, a file at a time. Not with a path, -k or -m, nor
    with what asks for one process: -n 0, -s, --pdb, -p no:xdist."""
    option, has = config.option, config.pluginmanager.hasplugin
    if (
        not has("xdist")
        or hasattr(config, "workerinput")
        or option.numprocesses is not None
        or option.tx
    ):
        return
    some = option.file_or_dir or option.keyword or option.markexpr or option.collectonly
    if (
        not some
        and option.capture != "no"
        and not option.usepdb
        and not option.trace
        and (os.cpu_count() or 1) > 1
    ):
        option.numprocesses, option.dist, option.loadscopereorder = 2, "loadfile", False
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # which each of the two reads when it starts


def pytest_configure():
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # in the background of a script; what it starts inherits that
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    if hasattr(
        config, "workerinput"
    ):  # the longest files first, so that both processes end at about the same time
        longest = ["test_readme.py", "test_train.py", "test_teachers.py", "test_stops.py"]
        items.sort(key=lambda item: (*longest, item.path.name).index(item.path.name))


def oracle(name: str):
    """A library that tests compare with. Missing: the test skips and says so; on CI (CI=true) it fails."""
    try:
        return importlib.import_module(name)
    except ImportError:
        message = f"oracle {name} is missing: pip install -r requirements-test.txt"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random and far from its initial value, so that an unused or swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * (0.05 if p.ndim > 1 else 0.3)
                + (p.ndim == 1) * 0.5
            )
    return module.eval()


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory) -> Path:
    """Where the tiny offline teachers of this session (--teacher-steps 2) are kept."""
    return tmp_path_factory.mktemp("weights")


def copy_sources(folder: Path) -> Path:
    """The six files, for commands to run in; evaluation on drawn tissue takes 64 tiles instead of 2048."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    evaluation = (folder / "evaluate.py").read_text()
    assert evaluation.count(", N_TILES = 100_000, 2048 ") == 1
    (folder / "evaluate.py").write_text(
        evaluation.replace(", N_TILES = 100_000, 2048 ", ", N_TILES = 100_000, 64 ")
    )
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
    """A tar of files, each between the .cls and .json of its name that WebDataset puts beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as shard:
        for name, content in files.items():
            stem = name[: name.rfind(".")]
            beside = {f"{stem}.cls": b"3", name: content, f"{stem}.json": b'{"slide": 1}'}
            for member, text in beside.items() if neighbours else [(name, content)]:
                info = tarfile.TarInfo(member)
                info.size = len(text)
                shard.addfile(info, io.BytesIO(text))
    return path
