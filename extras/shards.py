"""Train from tar shards: millions of small files are slow on many disks, a few large ones are not.

    python -m extras.shards 'shards/*.tar' --teachers uni,virchow --student vit_s
    python -m extras.shards a.tar b.tar more/ --teachers ...   files, folders of .tar, patterns
    torchrun --nproc-per-node 8 -m extras.shards 'shards/*.tar' --teachers ...
    python -m extras.shards 'shards/*.tar' --resume runs/x     go on with a run of this program

The shards come first, then the flags of train.py (python train.py --help) but --data.

A shard is a plain tar file of images, as WebDataset writes them; what else lies in it (.cls, .json)
is left alone. It must not be compressed (the images are already), for a tile is read by going
straight to its place. Tiles are called SHARD.tar/NAME and sorted by that; their order, their views
and what happens to unreadable ones are as with a folder of tiles, so runs can be resumed and
workers and processes share the tiles as ever. At the start every header is read, once.
"""

import glob
import io
import os
import sys
import tarfile

from PIL import Image

import train
from data import (
    LARGEST_FILE,
    FolderTiles,
    UnreadableTile,
    is_hidden,
    is_tile,
    make_parser,
    open_tile,
    path,
    run_program,
)
from student import STUDENTS, InputError

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gz, bz2, xz, zst begin so
BLOCK = 512  # bytes; headers and contents begin at multiples of it


class ShardTiles(FolderTiles):
    """A source: the images in tar shards. All is as in FolderTiles, but where tiles are and how one
    is read. Every shard is opened anew for a tile, so that loader workers share no open file."""

    program = "python -m extras.shards SHARDS"

    def find_tiles(self, roots: list[str]) -> tuple[str, list[str]]:
        """The folder around all shards, and the tiles' sorted names in it, SHARD.tar/NAME.

        InputError: there are no shards, no images in them, or one is compressed, cut off, damaged.
        """
        shards = find_shards(roots)
        top = os.path.commonpath([os.path.dirname(shard) for shard in shards])
        self.states = {}  # of every shard, as it was when it was listed
        found = []
        for shard in shards:
            self.states[shard] = state_of(shard)
            shard_name = os.path.relpath(shard, top).replace(os.sep, "/")
            for name, offset, size in list_shard(shard):
                found.append((f"{shard_name}/{name}", shard, offset, size))
        if not found:
            named = ", ".join(shards)
            raise InputError(
                f"SHARDS: no images (png, jpg, tif, bmp, webp) in {named}; give others"
            )
        names = []
        self.places = []  # of every tile: (shard, offset, size)
        for name, shard, offset, size in sorted(found):
            names.append(name)
            self.places.append((shard, offset, size))
        return top, names

    def open(self, i: int) -> Image.Image:
        """Tile i of `files`. UnreadableTile: why it cannot be read."""
        shard, offset, size = self.places[i]
        if size > LARGEST_FILE:
            raise UnreadableTile(f"too large ({size} bytes)")
        try:
            if state_of(shard) != self.states[shard]:  # another tile may lie in this place now
                raise UnreadableTile("its shard has changed since it was listed")
            with open(shard, "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise UnreadableTile(f"its shard cannot be read ({error.strerror})") from None
        return open_tile(io.BytesIO(content))


def state_of(shard: str) -> tuple[int, int, int]:
    """Size, time and kind of a file, from which a change is told. OSError: it is gone."""
    status = os.stat(shard)
    return status.st_size, status.st_mtime_ns, status.st_mode


def find_shards(given: list[str]) -> list[str]:
    """Files, folders and patterns -> the absolute paths of shards, sorted, each once."""
    shards = set()
    for text in given:
        found = []
        matches = [text]
        if not os.path.exists(text):  # what exists is a name, even if it looks like a pattern
            matches = glob.glob(text)
        for match in matches:
            if os.path.isdir(match):
                found += tars_below(match)
            else:
                found.append(os.path.abspath(match))
        if not found:
            raise InputError(f"SHARDS: {text}: no .tar file there; give files, folders, a pattern")
        shards.update(found)
    return sorted(shards)


def tars_below(folder: str) -> list[str]:
    """The absolute paths of all .tar files below a folder; links to folders are followed once."""
    shards = []
    visited = set()
    for inside, below, files in os.walk(os.path.abspath(folder), followlinks=True):
        real = os.path.realpath(inside)
        if real in visited:  # links can go round in circles
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not is_hidden(name))
        for name in files:
            if name.endswith(".tar") and not name.startswith("."):
                shards.append(os.path.join(inside, name))
    return shards


def list_shard(shard: str) -> list[tuple[str, int, int]]:
    """The (name, offset, size) of every image in a tar file, from its headers.

    Links, devices and sparse files are left out, with a note. InputError: the file is compressed,
    cut off, damaged, or no tar at all.
    """
    tiles = []
    left_out = 0
    try:
        check_start(shard)
        with tarfile.open(shard, "r:") as tar:
            member = next_member(tar)
            while member is not None:
                if member.isreg() and not member.issparse():
                    if is_tile_name(member.name):
                        tiles.append((member.name, member.offset_data, member.size))
                elif not member.isdir():
                    left_out += 1
                member = next_member(tar)
            check_end(tar)
    except (OSError, OverflowError, RecursionError, ValueError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"SHARDS: {shard} is no whole, uncompressed tar: {reason}; mend or remove it"
        ) from None
    if left_out:
        what = f"{left_out} links, devices or sparse files are left out"
        print(f"note: {shard}: {what}", file=sys.stderr)
    return tiles


def check_start(shard: str) -> None:
    """TarError: the file is none (a pipe would be waited for without end), or is compressed."""
    if not os.path.isfile(shard):
        raise tarfile.TarError("no regular file")
    with open(shard, "rb") as file:
        start = file.read(8)
    if start.startswith(COMPRESSED):
        raise tarfile.TarError("compressed, so that no tile can be read alone; unpack it")


def next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next file in a shard, None at the end. TarError: the header is no good."""
    member = tar.next()
    tar.members.clear()  # tarfile keeps them all, which for a million is a gigabyte
    if member is not None and member.size < 0:
        raise tarfile.TarError("a size below zero")  # with which tarfile would go round in circles
    return member


def check_end(tar: tarfile.TarFile) -> None:
    """TarError: after the last file there are no zeros. tarfile takes a bad header for the end."""
    tar.fileobj.seek(tar.offset)
    rest = tar.fileobj.read(2**20)
    if tar.offset == 0:
        raise tarfile.TarError("empty")
    if len(rest) < BLOCK or rest.strip(b"\0"):
        raise tarfile.TarError("cut off or damaged")


def is_tile_name(name: str) -> bool:
    """Whether a name in a shard is that of an image, hidden neither itself nor by a folder."""
    *folders, file = name.split("/")
    for folder in folders:
        if is_hidden(folder) and folder not in (".", ".."):
            return False
    return is_tile(file)


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first flag (the shards), and the rest (train.py's flags)."""
    for i, word in enumerate(argv):
        if word.startswith("-"):
            return argv[:i], argv[i:]
    return argv, []


def main() -> None:
    """The command line."""
    parser = make_parser("python -m extras.shards", __doc__)
    parser.add_argument(
        "shards", type=path, nargs="+", metavar="SHARDS", help="then train.py's flags"
    )
    given, flags = split_arguments(sys.argv[1:])
    if not given and flags[:1] in (["-h"], ["--help"]):
        given = flags[:1]
    shards = parser.parse_args(given).shards
    args = train.parse_args(flags)
    if args.data:
        raise InputError("--data: the tiles are those of the shards; drop it, or use train.py")
    size = STUDENTS[args.student]["img_size"]
    train.main(args, ShardTiles(shards, size, args.seed))


if __name__ == "__main__":
    run_program(main)
