"""Sample k is a function of (seed, k) alone; tiles are read as Pillow reads them; unreadable ones are counted."""

import io

import numpy as np
import pytest
import torch
from conftest import write_tiles
from PIL import Image

import data
from data import CachedTiles, FolderTiles, InputError, LabelledTiles, Skipped, TissueTiles, batches, draw_tissue


def samples(dataset, ks, workers=0, batch_size=4):
    return torch.cat([batch["image"] for batch in batches(dataset, ks, batch_size, workers)])


@pytest.mark.parametrize("workers", [1, 2])
def test_sample_k_does_not_depend_on_workers_or_on_where_a_run_began(tmp_path, workers):
    write_tiles(tmp_path, 10)
    for dataset in (FolderTiles(tmp_path, 64, seed=3), TissueTiles("distil", 3)):
        straight = samples(dataset, range(24))
        assert torch.equal(straight, samples(dataset, range(24), workers))
        assert torch.equal(straight[13:], samples(dataset, range(13, 24), workers, batch_size=3))
        assert torch.equal(straight[1::2], samples(dataset, range(1, 24, 2), workers))  # rank 1 of 2


def test_another_seed_gives_another_order_and_another_view(tmp_path):
    write_tiles(tmp_path, 10)
    a, b = (samples(FolderTiles(tmp_path, 64, seed), range(10)) for seed in (0, 1))
    assert not torch.equal(a, b)


def test_every_tile_once_an_epoch_in_an_order_of_its_own():
    orders = [[data.tile_index(5, k, 7) for k in range(7 * e, 7 * e + 7)] for e in range(6)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) > 3


def test_a_view_is_a_piece_of_the_tile_at_native_scale_in_all_eight_poses(tmp_path):
    path = write_tiles(tmp_path, 1)[0]
    tile = np.array(Image.open(path))  # (80, 96, 3)
    dataset, poses, corners = FolderTiles(tmp_path, 64, seed=0), set(), set()
    windows = np.lib.stride_tricks.sliding_window_view(tile, (64, 64), axis=(0, 1))  # (17, 33, 3, 64, 64)
    for k in range(64):
        view = dataset[k]["image"]
        for pose in range(8):
            undone = torch.rot90(view.flip(2) if pose >= 4 else view, -(pose % 4), (1, 2)).numpy()
            where = np.argwhere((windows[..., 0, 0] == undone[:, 0, 0]).all(-1))
            hit = [tuple(w) for w in where if np.array_equal(windows[tuple(w)], undone)]
            if hit:
                poses.add(pose)
                corners.add(hit[0])
                break
        else:
            pytest.fail(f"view {k} is no crop of the tile")
    assert poses == set(range(8)) and len(corners) > 40


def test_cached_tiles_keep_images_and_outputs_together():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 3, 4, 4)

    def teach(chunk):
        first = chunk[:, 0, 0, 0].float() + 0.1  # 0.1 is no fp16 number
        return {"a": {"summary": first[:, None], "patches": first[:, None, None].expand(-1, 5, 2)}}

    batch = next(iter(batches(CachedTiles(images, teach, seed=1), range(100), 100)))
    assert sorted(batch["image"][:, 0, 0, 0].tolist()) == list(range(100))
    for kind in ("summary", "patches"):
        outputs = batch["outputs"]["a"][kind]
        assert torch.equal(outputs.flatten(1)[:, 0], (batch["image"][:, 0, 0, 0].float() + 0.1).half())


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "tif", "tiff", "bmp", "webp", "PNG"])
def test_formats(tmp_path, suffix):
    path = write_tiles(tmp_path / "deep" / "er", 1, suffix=suffix)[0]
    (tmp_path / "notes.txt").write_text("no tile")
    assert data.list_tiles(tmp_path) == [f"deep/er/{path.name}"]
    assert FolderTiles(tmp_path, 64, 0)[0]["image"].shape == (3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_colour_conversion_is_pillows(tmp_path, mode):
    image = Image.open(write_tiles(tmp_path, 1, (64, 64))[0])
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    path = tmp_path / "converted.tif"
    image.save(path)
    assert np.array_equal(np.array(data.open_tile(path)), np.array(Image.open(path).convert("RGB")))


def test_exif_rotation_is_undone(tmp_path):
    image = Image.open(write_tiles(tmp_path, 1, (96, 80))[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(data.open_tile(tmp_path / "turned.png")), np.array(image.rotate(-90, expand=True)))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_16_bit_grey_is_refused_and_not_clipped_to_white(tmp_path, mode):
    pixels = (
        np.random.default_rng(0)
        .integers(20_000, 60_000, (70, 70))
        .astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode])
    )
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode == mode
    assert data.open_tile(tmp_path / "x.tif") is None


def test_small_tiles_are_enlarged_and_named(tmp_path):
    write_tiles(tmp_path / "large", 3, (70, 70))
    write_tiles(tmp_path / "small", 2, (40, 90))
    dataset = FolderTiles(tmp_path, 64, 0)
    assert samples(dataset, range(5)).shape == (5, 3, 64, 64)
    assert sorted(dataset[k]["small"] for k in range(5)) == [
        "",
        "",
        "",
        *sorted(map(str, (tmp_path / "small").iterdir())),
    ]


def broken_files():
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(whole, "png")
    return {"empty.png": b"", "text.jpg": b"not an image", "truncated.png": whole.getvalue()[:5000]}


def test_unreadable_tiles_are_replaced_by_k_alone_named_once_and_counted(tmp_path, capsys):
    write_tiles(tmp_path, 397)
    for name, content in broken_files().items():
        (tmp_path / name).write_bytes(content)
    dataset, skipped = FolderTiles(tmp_path, 64, 0), Skipped(400)
    straight = []
    for batch in batches(dataset, range(800), 8):
        straight.append(skipped.check(batch)["image"])
    assert {path.rsplit("/")[-1] for path in skipped.paths} == set(broken_files())
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 3 and all(sum(name in line for line in warnings) == 1 for name in broken_files())
    assert torch.equal(torch.cat(straight)[101:160], samples(dataset, range(101, 160), workers=2))
    assert torch.cat(straight).flatten(1).float().std(1).min() > 1  # never the blank


def test_more_than_one_per_cent_unreadable_ends_the_run(tmp_path):
    write_tiles(tmp_path, 50)
    (tmp_path / "broken.png").write_bytes(b"")
    skipped = Skipped(51)
    with pytest.raises(InputError, match=r"--data: over 1 % of 51 tiles are unreadable: .*broken\.png"):
        for batch in batches(FolderTiles(tmp_path, 64, 0), range(51), 8):
            skipped.check(batch)


def test_a_folder_of_nothing_but_broken_tiles_does_not_hang(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="unreadable"):
        Skipped(5).check(next(iter(batches(FolderTiles(tmp_path, 64, 0), range(2), 2))))


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(InputError, match=f"--data: no images .* in {tmp_path}"):
        FolderTiles(tmp_path, 64, 0)
    with pytest.raises(InputError, match="--data: .*nowhere is not a folder"):
        FolderTiles(tmp_path / "nowhere", 64, 0)


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    write_tiles(tmp_path / "elsewhere", 3)
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tiles" / "circle").symlink_to(tmp_path / "tiles")
    assert data.list_tiles(tmp_path / "tiles") == [f"linked/tile_00{i}.png" for i in range(3)]


def test_labelled_folders(tmp_path):
    for split, classes in (("train", "ab"), ("test", "ba")):
        for name in classes:
            write_tiles(tmp_path / split / name / "patient", 2, (100, 70))
    train = LabelledTiles(tmp_path, "train", 64)
    assert (train.classes, len(train.files)) == (["a", "b"], 4)
    assert train.labels.tolist() == [0, 0, 1, 1] and [train[k]["index"] for k in range(4)] == [0, 1, 2, 3]
    assert train[0]["image"].shape == (3, 64, 64)
    write_tiles(tmp_path / "test" / "c", 1)
    with pytest.raises(InputError, match="none of the classes of train/"):
        LabelledTiles(tmp_path, "test", 64, train.classes)
    with pytest.raises(InputError, match="val is missing"):
        LabelledTiles(tmp_path, "val", 64)


def test_streams_of_tissue_do_not_leak_and_labels_are_independent():
    tiles = {(s, seed): draw_tissue(s, seed, 0)[0].tobytes() for s in data.STREAMS for seed in (0, 1)}
    assert len(set(tiles.values())) == len(tiles)
    labels = np.array([draw_tissue("test", 0, k, size=16)[1:] for k in range(1800)])
    joint = np.histogram2d(*labels.T, bins=6)[0]
    expected = len(labels) / 36  # chi-square with 35 degrees of freedom: 66.6 is its 99.9 % point
    assert ((joint - expected) ** 2 / expected).sum() < 66.6


@pytest.mark.parametrize("size", [64, 224])
def test_tissue_looks_like_he(size):
    tiles = np.stack([draw_tissue("bank", 0, k, size)[0] for k in range(24)]).astype(float)
    assert tiles.shape == (24, size, size, 3)
    red, green, blue = tiles.reshape(-1, 3).mean(0)
    assert green < red and green < blue  # pink to violet
    assert tiles.std((1, 2)).min() > 5  # none is blank


def test_progress_prints_eta(capsys):
    assert list(data.progress(range(3), "counting", 3, every=0)) == [0, 1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "counting: 1/3" in lines[0] and "ETA" in lines[0]
