"""Tar shards: their tiles are those of the same files in a folder; unfit shards are refused by
name, changed ones are unreadable; the command takes shards first and then train.py's flags."""

import bz2
import collections
import contextlib
import gzip
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import write_shard, write_tiles
from PIL import Image
from test_data import samples

import train
from data import FolderTiles, InputError, UnreadableTile, batches
from extras import shards as program
from extras.benchmarks.hostile import DAMAGE, damaged, encoded, within
from extras.shards import ShardTiles

FORMATS = {
    "gnu.tar": tarfile.GNU_FORMAT,
    "pax.tar": tarfile.PAX_FORMAT,
    "ustar.tar": tarfile.USTAR_FORMAT,
}
NAMES = [
    "plain.png",
    "b c/with spaces.jpg",
    "ü/Gewebe é 組織.png",
    "b c/upper.JPG",
    "deep/er/x.tar/12+34.png",
]


@pytest.fixture
def shards(tmp_path):
    """Two shards of six tiles each, as WebDataset writes them, in a folder of their own."""
    paths = write_tiles(tmp_path / "loose", 12, (64, 64))
    write_shard(tmp_path / "shards" / "a.tar", {path.name: path.read_bytes() for path in paths[:6]})
    write_shard(tmp_path / "shards" / "b.tar", {path.name: path.read_bytes() for path in paths[6:]})
    return tmp_path / "shards"


def files_of(given):
    """The names of the tiles of some shards."""
    return ShardTiles(given, 64, 0).files


def opened(tiles, name):
    """The tile of a name, or None where it is unreadable."""
    try:
        return tiles.open(tiles.files.index(name))
    except UnreadableTile as error:
        assert str(error) and len(str(error).splitlines()) == 1
        return None


@pytest.mark.parametrize("shard", FORMATS)
def test_a_shards_pixels_are_those_of_the_same_files_in_a_folder(tmp_path, shard):
    names = [*NAMES, "left/" * 25 + "ustar.png"]  # over 100 characters: ustar splits it
    if "ustar" not in shard:
        names.append(f"long {'n' * 130}/{'m' * 130}.png")  # a header of its own
    for i, name in enumerate(names):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    files = {name: (tmp_path / "folder" / name).read_bytes() for name in names}
    pax = {"pax_headers": {"comment": "ü" * 600}} if "pax" in shard else {}
    write_shard(tmp_path / "shards" / shard, files, format=FORMATS[shard], **pax)
    tiles = ShardTiles(tmp_path / "shards", 64, 0)
    folder = FolderTiles(tmp_path / "folder", 64, 0)
    assert tiles.files == [f"{shard}/{name}" for name in folder.files]
    for i in range(len(names)):
        assert np.array_equal(np.array(tiles.open(i)), np.array(folder.open(i)))
    assert torch.equal(samples(tiles, range(20), 1), samples(folder, range(20)))


@pytest.mark.parametrize(
    "name", ["._x.jpg", "sub/._x.jpg", "./._x.jpg", "@eaDir/x.jpg", ".t/x.jpg"]
)
def test_hidden_members_of_a_shard_are_left_out_as_hidden_files_are(tmp_path, name):
    good = write_tiles(tmp_path / "loose", 1)[0].read_bytes()
    shard = write_shard(tmp_path / "a.tar", {name: b"attributes", "./b/x.jpg": good})
    assert files_of(shard) == ["a.tar/./b/x.jpg"]


def test_a_member_whose_name_looks_like_a_shard_is_read(tmp_path):
    path = write_tiles(tmp_path / "loose", 1)[0]
    write_shard(tmp_path / "a.tar", {"y.tar/12+34/x.png": path.read_bytes()})
    tiles = ShardTiles(tmp_path / "a.tar", 64, 0)
    assert np.array_equal(np.array(tiles.open(0)), np.array(Image.open(path)))


def test_two_members_of_one_name_are_two_tiles_in_a_fixed_order(tmp_path):
    tiles = [block("x.png", noise_tile(i)) for i in range(3)]
    shards = ShardTiles(write_blocks(tmp_path / "a.tar", *tiles), 16, 0)
    assert shards.files == ["a.tar/x.png"] * 3
    for i in range(3):
        assert shards.open(i).tobytes() == Image.open(io.BytesIO(noise_tile(i))).tobytes()


def test_the_order_of_shards_is_reproducible_and_an_epoch_visits_each_tile_once(tmp_path, shards):
    whole = ShardTiles(shards, 64, 3)
    straight = samples(whole, range(24))
    assert len(whole) == 12 and whole.files == sorted(whole.files)
    shutil.copytree(shards, tmp_path / "elsewhere", copy_function=shutil.copyfile)  # other times
    a, b = str(shards / "a.tar"), str(shards / "b.tar")
    for given in (
        tmp_path / "elsewhere",
        [b, a],
        [str(shards)],
        [str(shards / "*.tar")],
        f"{shards}/[ab].tar",
        [a, a, shards],
    ):
        tiles = ShardTiles(given, 64, 3)
        assert tiles.files == whole.files and tiles.fingerprint == whole.fingerprint, given
        assert torch.equal(samples(tiles, range(24)), straight)
    assert torch.equal(samples(whole, range(13, 24), workers=2), straight[13:])
    # A view of 64 px is the whole tile, turned or mirrored: its sum tells which it is
    sums = straight.flatten(1).sum(1).tolist()
    assert len(set(sums[:12])) == 12 and sorted(sums[:12]) == sorted(sums[12:])
    assert sums[:12] != sums[12:]
    one = ShardTiles(a, 64, 3)
    assert one.files == [f"a.tar/tile_{i:03d}.png" for i in range(6)]
    assert one.fingerprint != whole.fingerprint


def test_shards_say_what_they_are(shards):
    tiles = ShardTiles([f"{shards}/a.tar", f"{shards}/b*"], 64, 0)
    assert tiles.description == f"12 tiles of {shards}/a.tar, {shards}/b*"
    assert tiles.program == "python -m extras.shards SHARDS" and tiles.has_outputs is False
    assert tiles.top == str(shards)


def test_shards_of_several_folders_are_named_from_the_folder_around_them(tmp_path, shards):
    shutil.copytree(shards, tmp_path / "more" / "deep")
    (tmp_path / "more" / "deep" / "circle").symlink_to(tmp_path / "more")
    (tmp_path / "more" / ".Trash-1000").symlink_to(shards)
    names = files_of([shards, tmp_path / "more"])
    assert len(names) == 24 and names[0] == "more/deep/a.tar/tile_000.png"
    assert names[-1] == "shards/b.tar/tile_011.png"


def test_a_path_that_exists_is_no_pattern(tmp_path, shards):
    shutil.copy(shards / "a.tar", tmp_path / "x[1].tar")
    shutil.copy(shards / "b.tar", tmp_path / "x1.tar")
    assert files_of(tmp_path / "x[1].tar")[0] == "x[1].tar/tile_000.png"


def test_a_pipe_named_as_a_shard_is_refused_and_not_waited_for(tmp_path, shards):
    os.mkfifo(shards / "z.tar")
    with (
        within(5, "a pipe"),
        pytest.raises(InputError, match=r"z\.tar is no whole.*no regular file"),
    ):
        files_of(shards)


@pytest.mark.parametrize(
    "given", ["gone", "gone.tar", "gone*.tar", "notes.txt", "c.tar.gz", "loose"]
)
def test_one_unfit_path_among_several_is_refused_by_name(tmp_path, shards, given):
    (tmp_path / "notes.txt").write_text("no tile")
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress((shards / "a.tar").read_bytes()))
    with pytest.raises(InputError, match=f"SHARDS: .*{re.escape(given)}") as error:
        files_of([str(shards), str(tmp_path / given)])
    assert "\n" not in str(error.value)
    assert ("compressed" in str(error.value)) == (given in ("c.tar.gz", "notes.txt"))


def test_shards_without_images_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", {"x.txt": b"no tile"})
    with pytest.raises(InputError, match=rf"SHARDS: no images .* in {tmp_path}/a\.tar"):
        files_of(tmp_path)


@pytest.mark.parametrize(
    "cut", ["in a tile", "in the last tile", "in a header", "between two members"]
)
def test_a_truncated_shard_ends_in_one_line(tmp_path, shards, cut):
    with tarfile.open(shards / "b.tar") as shard:
        members = [member for member in shard.getmembers() if member.name.endswith("png")]
    middle = members[3]
    last = members[-1]
    length = {
        "in a tile": middle.offset_data + 1000,
        "in the last tile": last.offset_data + last.size - 1,
        "in a header": middle.offset + 100,
        "between two members": middle.offset,
    }
    os.truncate(shards / "b.tar", length[cut])
    with pytest.raises(InputError, match=r"SHARDS: .*/shards/b\.tar is no whole, uncompressed tar"):
        files_of(shards)


def test_a_corrupt_member_is_skipped_and_named(tmp_path, capsys):
    good = write_tiles(tmp_path, 1, (64, 64))[0].read_bytes()
    files = {f"{i:03d}.png": good for i in range(110)}
    broken = {"broken one.png": good[:2000], "empty.png": b""}
    write_shard(tmp_path / "shards" / "a.tar", files | broken, False)
    write_shard(tmp_path / "shards" / "b.tar", files, False)
    tiles = ShardTiles(tmp_path / "shards", 64, 0)
    assert len(tiles) == 222
    images = samples(tiles, range(222), batch_size=32)
    assert images.flatten(1).float().std(1).min() > 1  # replaced, never the blank
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == len(tiles.unreadable) == 2
    for name in broken:
        assert sum(f"'{tmp_path}/shards/a.tar/{name}': damaged (" in line for line in lines) == 1
    (tmp_path / "shards" / "b.tar").unlink()
    with pytest.raises(InputError, match="over 1 % of 112 tiles are unreadable: .*/a.tar/"):
        samples(ShardTiles(tmp_path / "shards", 64, 0), range(112))


# ---- the command ---------------------------------------------------------------------------------
def test_shards_come_first_and_then_the_flags_of_train(monkeypatch, shards):
    calls = []
    monkeypatch.setattr(train, "main", lambda args, source: calls.append((args, source)))
    given = [str(shards / "a.tar"), f"{shards}/b*"]
    monkeypatch.setattr(sys, "argv", ["shards.py", *given, "--steps", "5", "--seed", "3"])
    program.main()
    [(args, source)] = calls
    assert (args.steps, args.student) == (5, "toy")
    assert isinstance(source, ShardTiles) and len(source) == 12
    assert (source.size, source.seed) == (64, 3)  # of the student and of the run


@pytest.mark.parametrize("argv", [[], ["--steps", "5"], [""]])
def test_without_shards_the_command_says_what_it_needs(monkeypatch, capsys, argv):
    monkeypatch.setattr(sys, "argv", ["shards.py", *argv])
    with pytest.raises(SystemExit) as stop:
        program.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "SHARDS" in err


def test_help_is_the_manual(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shards.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        program.main()
    assert stop.value.code == 0 and program.__doc__.strip() in capsys.readouterr().out


# ---- hostile shards ------------------------------------------------------------------------------
def block(name, content=b"", kind=tarfile.REGTYPE, size=None, form=tarfile.GNU_FORMAT, **changes):
    """A member of a shard as bytes: its header, which may lie about the size, and its content."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(form) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def write_blocks(path, *blocks):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(blocks) + bytes(1024))
    return path


def tree(folder):
    """What lies below a folder, links not followed: sizes, times and kinds."""
    found = sorted(
        os.path.join(top, name)
        for top, *both in os.walk(folder)
        for names in both
        for name in names
    )
    return {
        path: (os.lstat(path).st_size, os.lstat(path).st_mtime_ns, os.lstat(path).st_mode)
        for path in found
    }


def noise_tile(seed, size=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "png")


def listed_or_refused(shard, given=None):
    """The tiles of a shard, or None where it is refused in one line that names it; no hanging."""
    try:
        with within(10, shard.name):
            return ShardTiles(given or shard, 16, 0)
    except InputError as error:
        line = str(error)
        assert line.startswith("SHARDS: ") and str(shard) in line, line
        assert len(line.splitlines()) == 1, line
        return None


def around(cut):
    """Damage at the header of the fourth tile: cut(before it, from it on) -> what is written."""

    def damage(whole):
        place = whole.index(b"tile_009.png")
        return cut(whole[:place], whole[place:])

    return damage


UNFIT = {
    "no bytes": lambda whole: b"",
    "no members": lambda whole: bytes(10_240),
    "a block of zeros": lambda whole: bytes(512),
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "without its end": lambda whole: whole.rstrip(b"\0"),
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "a byte lost": lambda whole: whole[:700] + whole[701:],
    "a header zeroed": around(lambda before, rest: before + bytes(512) + rest[512:]),
    "a header and its tile zeroed": around(
        lambda before, rest: before + bytes(10_240) + rest[10_240:]
    ),
    "a bit flipped in a header": around(lambda before, rest: before + b"T" + rest[1:]),
    "two shards in one file": lambda whole: whole + whole,
    "text": lambda whole: b"no tar at all" * 999,
    "noise": lambda whole: np.random.default_rng(0).bytes(20_000),
}


@pytest.mark.parametrize("what", UNFIT)
def test_an_unfit_shard_is_refused_by_name_at_the_start(shards, what):
    unfit = shards / "b.tar"
    unfit.write_bytes(UNFIT[what](unfit.read_bytes()))
    for given in (unfit, [str(shards / "a.tar"), str(unfit)], shards):
        assert listed_or_refused(unfit, given) is None


def test_a_tile_zeroed_within_a_shard_is_unreadable_by_name(shards):
    tiles = ShardTiles(shards, 64, 0)
    i = tiles.files.index("b.tar/tile_009.png")
    whole = (shards / "b.tar").read_bytes()
    start = tiles.places[i][1] + 2000
    (shards / "b.tar").write_bytes(whole[:start] + bytes(3000) + whole[start + 3000 :])
    tiles = ShardTiles(shards, 64, 0)
    assert opened(tiles, "b.tar/tile_009.png") is None
    assert opened(tiles, "b.tar/tile_008.png") is not None


LIES = [-512, -1024, -1536, -(10**6), -1, 0, 511, 10**9, 2**62, 2**80]


@pytest.mark.parametrize("size", LIES)
@pytest.mark.parametrize("place", ["header", "PAX"])
def test_a_member_that_lies_about_its_size_is_no_hang_and_no_other_tile(tmp_path, size, place):
    """tarfile goes back where a size is negative: in a circle, on Pythons that do not refuse it."""
    good = noise_tile(0, 40)  # 10 blocks
    lie = block("lie.png", good, size=size) if place == "header" else block("lie.png", good)
    if place == "PAX":
        record = f"{len(f'00 size={size}') + 1:02d} size={size}\n".encode()
        lie = block("pax", record, tarfile.XHDTYPE) + lie
    shard = write_blocks(tmp_path / "a.tar", block("a.png", good), lie, block("b.png", good))
    assert listed_or_refused(shard) is None


def test_a_member_a_little_longer_or_shorter_than_its_header_says(tmp_path):
    good, expected = noise_tile(0, 40), np.array(Image.open(io.BytesIO(noise_tile(0, 40))))
    sizes = {"short.png": len(good) - 200, "long.png": len(good) + 3, "right.png": len(good)}
    assert (
        len({-(-size // 512) for size in sizes.values()}) == 1
    )  # so the next header is found all the same
    shard = write_blocks(
        tmp_path / "a.tar", *(block(name, good, size=size) for name, size in sizes.items())
    )
    tiles = ShardTiles(shard, 16, 0)
    assert opened(tiles, "a.tar/short.png") is None
    for name in ("a.tar/long.png", "a.tar/right.png"):
        assert np.array_equal(np.array(opened(tiles, name)), expected)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_headers_of_headers_without_end_are_no_traceback(tmp_path, kind):
    """tarfile reads each inside the one before, to Python's limit of recursion."""
    more = block("more", b"x.png" if kind == tarfile.GNUTYPE_LONGNAME else b"14 path=x.png\n", kind)
    blocks = block("a.png", noise_tile(0)), *[more] * 3000, block("b.png", noise_tile(1))
    listed = listed_or_refused(write_blocks(tmp_path / "a.tar", *blocks))
    if listed is not None:
        names = [name.removeprefix("a.tar/") for name in listed.files]
        assert names in (["a.png", "b.png"], ["a.png", "x.png"])


def test_absolute_names_and_those_that_climb_are_labels_alone(tmp_path):
    (tmp_path / "decoy.png").write_bytes(noise_tile(99))
    names = [
        str(tmp_path / "decoy.png"),
        "../decoy.png",
        "../../decoy.png",
        "x/../../../decoy.png",
        "//decoy.png",
    ]
    names += [
        "./decoy.png",
        "C:\\decoy.png",
        "\\\\host\\decoy.png",
        "~/decoy.png",
        "a.tar/../decoy.png",
        "line\nbreak.png",
    ]
    files = {name: noise_tile(i) for i, name in enumerate(names)}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        blocks = [block(name, content, form=form) for name, content in files.items()]
        shard = write_blocks(tmp_path / "deep" / "shards" / "a.tar", *blocks)
        before, tiles = tree(tmp_path), ShardTiles(shard, 16, 0)
        assert len(tiles.files) == len(names)
        expected = {np.array(Image.open(io.BytesIO(content))).sum() for content in files.values()}
        assert {int(image.sum()) for image in samples(tiles, range(len(names)), 2)} == expected
        assert (
            not tiles.unreadable and tree(tmp_path) == before
        )  # nothing is written, nothing else read


def test_links_devices_and_pipes_in_a_shard_are_left_out_with_one_note(tmp_path, capsys):
    kinds = {"SYM": "/etc/hostname", "LNK": "a.png", "CHR": "", "BLK": "", "FIFO": "", "DIR": ""}
    odd = [
        block(f"{kind}.png", kind=getattr(tarfile, f"{kind}TYPE"), linkname=to)
        for kind, to in kinds.items()
    ]
    odd.append(block("decoy.png", kind=tarfile.SYMTYPE, linkname=str(tmp_path / "decoy.png")))
    (tmp_path / "decoy.png").write_bytes(noise_tile(99))
    shard = write_blocks(
        tmp_path / "a.tar", block("a.png", noise_tile(0)), *odd, block("b.png", noise_tile(1))
    )
    plain, before = write_blocks(tmp_path / "b.tar", block("c.png", noise_tile(2))), tree(tmp_path)
    assert files_of([shard, plain]) == ["a.tar/a.png", "a.tar/b.png", "b.tar/c.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(shard) in lines[0] and re.search(r"\b6\b", lines[0]), (
        lines
    )  # without the folder
    samples(ShardTiles(shard, 16, 0), range(4))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "posix"])
def test_sparse_members_are_left_out_or_read_as_they_were(tmp_path, form):
    if not shutil.which("tar"):
        pytest.skip("needs GNU tar")
    bmp = encoded(Image.new("RGB", (400, 400)), "bmp")
    (tmp_path / "tiles").mkdir()
    with open(tmp_path / "tiles" / "holes.bmp", "wb") as file:  # black, but for its last row
        file.write(bmp[:54])
        file.seek(len(bmp) - 1200)
        file.write(bytes(range(240)) * 5)
    (tmp_path / "tiles" / "a.png").write_bytes(noise_tile(0))
    (tmp_path / "tiles" / "z.bmp").write_bytes(encoded(Image.new("RGB", (400, 400), "red"), "bmp"))
    command = [
        "tar",
        "--sparse",
        f"--format={form}",
        "-cf",
        "a.tar",
        "-C",
        "tiles",
        "a.png",
        "holes.bmp",
        "z.bmp",
    ]
    if subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode:
        pytest.skip("this tar does not write it")
    if (tmp_path / "a.tar").stat().st_size > 1.5 * len(bmp):
        pytest.skip("this file system keeps no holes")
    tiles = ShardTiles(tmp_path / "a.tar", 16, 0)
    assert opened(tiles, "a.tar/a.png") is not None
    assert opened(tiles, "a.tar/z.bmp").getpixel((5, 5)) == (255, 0, 0)
    if "a.tar/holes.bmp" in tiles.files:
        holes = opened(tiles, "a.tar/holes.bmp")
        assert holes.tobytes() == Image.open(tmp_path / "tiles" / "holes.bmp").tobytes()


@pytest.mark.filterwarnings("ignore")
def test_damaged_shards_are_listed_or_refused(tmp_path):
    rng, found = np.random.default_rng(0), collections.Counter()
    whole = write_shard(
        tmp_path / "whole.tar",
        {f"{i}.png": noise_tile(i) for i in range(3)},
        format=tarfile.GNU_FORMAT,
    )
    pax = {f"ü {'long' * 40} {i}.png": noise_tile(i) for i in range(3)}
    whole = [
        whole.read_bytes(),
        write_shard(tmp_path / "pax.tar", pax, format=tarfile.PAX_FORMAT).read_bytes(),
    ]
    before = tree(tmp_path)
    shard = tmp_path / "x.tar"
    for i in range(600):
        how = DAMAGE[i % (len(DAMAGE) - 1)]
        shard.write_bytes(damaged(whole[i % 2], how, rng))
        tiles = listed_or_refused(shard)
        for name in tiles.files if tiles else []:
            with within(10, name):
                opened(tiles, name)
        found[tiles is not None] += 1
        shard.unlink()
    assert tree(tmp_path) == before and min(found.values()) > 50, found


CHANGES = {
    "rewritten": lambda shard, other: shard.write_bytes(other),
    "replaced": lambda shard, other: (
        shard.with_name("x").write_bytes(other),
        os.replace(shard.with_name("x"), shard),
    ),
    "appended to": lambda shard, other: shard.write_bytes(shard.read_bytes() + bytes(10_240)),
    "truncated": lambda shard, other: os.truncate(shard, 700),
    "emptied": lambda shard, other: os.truncate(shard, 0),
    "deleted": lambda shard, other: shard.unlink(),
    "made a folder": lambda shard, other: (shard.unlink(), shard.mkdir()),
    "made a pipe": lambda shard, other: (shard.unlink(), os.mkfifo(shard)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_under_a_running_job_is_unreadable(tmp_path, capfd, change):
    """Three of its tiles among 400 are named; three among 100 are too many."""
    changing = tmp_path / "shards" / "a.tar"
    white = encoded(Image.new("RGB", (16, 16), "white"), "png")
    size = len(noise_tile(0))
    other = {f"{i}.png": white.ljust(size, b"\0") for i in range(3)}
    other = write_shard(tmp_path / "other.tar", other, False).read_bytes()
    for n, workers in ((400, 0), (400, 2), (100, 0)):
        shutil.rmtree(tmp_path / "shards", ignore_errors=True)
        files = {f"{i}.png": noise_tile(i) for i in range(n)}
        write_shard(changing, dict(list(files.items())[:3]), False)
        write_shard(tmp_path / "shards" / "b.tar", dict(list(files.items())[3:]), False)
        tiles = ShardTiles(tmp_path / "shards", 16, 0)
        loader = batches(tiles, range(2 * n), 8, workers)
        images = [next(loader)["image"]]
        CHANGES[change](changing, other)
        ending = contextlib.nullcontext()
        if n == 100:
            ending = pytest.raises(InputError, match=rf"over 1 % .*{changing}/")
        with within(60, change), ending:
            images += [batch["image"] for batch in loader]
        assert torch.cat(images).float().mean((1, 2, 3)).max() < 250  # none of what is there now
        err = capfd.readouterr().err
        lines = [line for line in err.splitlines() if "skipped unreadable tile" in line]
        assert len(tiles.unreadable) == len(lines) == (3 if n == 400 else 2), err
        for tile in tiles.unreadable:
            assert tile.startswith(f"'{changing}/") and ": its shard " in tile


# ---- training from shards ------------------------------------------------------------------------

TINY = ["--teacher-steps", "2", "--batch-size", "8", "--device", "cpu", "--dims", "4,16"]
TINY += ["--stats-tiles", "16", "--teachers", "toy_cells", "--steps", "10"]


@pytest.fixture
def launch(monkeypatch, weights_dir):
    """python -m extras.shards, in this process, with the real train.py."""

    def call(*words):
        argv = [str(word) for word in [*words, "--weights-dir", weights_dir]]
        monkeypatch.setattr(sys, "argv", ["shards.py", *argv])
        program.main()

    return call


def assert_same_run(a, b):
    one = torch.load(a / "last.pt", weights_only=True)
    two = torch.load(b / "last.pt", weights_only=True)
    assert one["step"] == two["step"] == 10
    for part in ("student", "adaptors", "standardizers"):
        for key, value in one[part].items():
            assert torch.equal(value, two[part][key]), key
    for number, state in one["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][number][key])


def test_a_run_from_shards_is_that_from_a_folder_and_resumes_bit_for_bit(
    tmp_path, shards, launch, weights_dir
):
    launch(shards / "*.tar", *TINY, "--out", tmp_path / "straight")
    launch(shards, *TINY, "--out", tmp_path / "halves", "--stop-at", 5)
    launch(shards, "--resume", tmp_path / "halves", "--workers", 2)
    assert_same_run(tmp_path / "straight", tmp_path / "halves")
    flags = [*TINY, "--data", tmp_path / "loose", "--weights-dir", weights_dir]
    flags += ["--out", tmp_path / "folder"]  # the same files under the same names, in two shards
    train.main(train.parse_args([str(flag) for flag in flags]))
    assert_same_run(tmp_path / "straight", tmp_path / "folder")


def test_the_wrong_program_is_told_the_right_one(tmp_path, shards, launch, weights_dir):
    launch(shards, *TINY, "--out", tmp_path / "run", "--stop-at", 1)
    resume = ["--resume", str(tmp_path / "run"), "--weights-dir", str(weights_dir)]
    with pytest.raises(InputError, match="was begun by python -m extras.shards SHARDS; go on with"):
        train.main(train.parse_args(resume))
    with pytest.raises(InputError, match="--data: the tiles are those of the shards"):
        launch(shards, *TINY, "--data", tmp_path / "loose", "--out", tmp_path / "other")
    with pytest.raises(InputError, match="for tar shards use python -m extras.shards"):
        data = str(shards / "a.tar")
        train.main(train.parse_args([*TINY, "--data", data, "--out", str(tmp_path / "third")]))
