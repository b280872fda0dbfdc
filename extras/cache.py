"""Run the teachers once over a folder of tiles, keep their outputs, and train from those.

    python -m extras.cache cache/ --data tiles/ --teachers uni,virchow --student vit_s
    python -m extras.cache cache/ --fill-only --data tiles/ --teachers uni,virchow --student vit_s
    torchrun --nproc-per-node 8 -m extras.cache cache/ --data tiles/ ...    once it is filled
    python -m extras.cache cache/ --resume runs/x                           a run of this program

The cache's folder comes first, then the flags of train.py (python train.py --help).

The teachers are nine tenths of a run's cost. Where tiles are few and gone over many times, their
outputs can be kept: of ONE fixed view of every tile (crop, flip, turn), so the student sees less
variety than in train.py. Outputs are fp16, summary and patches on the student's grid: 2.2 MB a tile
for Virchow2, UNI2-h and H-optimus-1 together. The space is said first.

A teacher has a file of its own, cache/NAME.npy, so one cache serves students of any of its teachers
and of any --seed, --lr or --dims. cache/made_from.json says from which tiles, at which crop and
grid it was made, and from which weights each file; where one of them has changed, the cache is
refused. One process fills it, a teacher after the other; once stopped, the same command goes on.
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

import train
from data import (
    FolderTiles,
    Source,
    batches,
    epoch_order,
    make_parser,
    path,
    progress,
    run_program,
    save_atomically,
)
from student import STUDENTS, InputError
from teachers import OFFLINE, TEACHERS, choose_device, find_weights, load_teacher, offline_file

BATCH = 64  # tiles that a teacher is given at a time
CHUNK = 2**22  # bytes read at a time to hash a file


class CachedTiles(Source):
    """A source: one fixed view of every tile, with the teachers' outputs from the cache.

    Sample k -> {"image": uint8 (3, size, size), "outputs": {teacher: {"summary": (D_t,),
    "patches": (N, D_t)}}}, in fp16. Row r of the cache is sample r of `tiles`, whose seed is 0.
    """

    has_outputs = True
    program = "python -m extras.cache CACHE"

    def __init__(self, tiles: FolderTiles, files: dict[str, Path], seed: int):
        self.tiles = tiles
        self.seed = seed
        self.fingerprint = tiles.fingerprint
        self.description = f"{tiles.description}, one view each, outputs from a cache"
        self.unreadable = tiles.unreadable
        self.enlarged_named = False
        self.rows = {}  # {teacher: (n, 1 + N, D_t)}, summary first; mapped, not read
        for t, file in files.items():
            self.rows[t] = np.load(file, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, k: int) -> dict:
        n = len(self.tiles)
        r = int(epoch_order(self.seed, k // n, n)[k % n])
        outputs = {}
        for t, rows in self.rows.items():
            tokens = torch.from_numpy(rows[r].copy())  # (1 + N, D_t)
            outputs[t] = {"summary": tokens[0], "patches": tokens[1:]}
        return self.tiles[r] | {"outputs": outputs}


class Cache:
    """The folder, and made_from.json in it: what it was made from, and how far it is filled."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.record_file = self.folder / "made_from.json"
        self.record = {}
        if self.record_file.exists():
            self.record = self.read_record()

    def read_record(self) -> dict:
        try:
            record = json.loads(self.record_file.read_text())
            for key in ("tiles", "contents", "crop", "grid", "teachers"):
                record[key]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.record_file} is damaged ({type(error).__name__}); give another folder"
            ) from None
        return record

    def save_record(self) -> None:
        save_atomically(json.dumps(self.record, indent=1).encode(), self.record_file)

    def file(self, t: str) -> Path:
        return self.folder / f"{t}.npy"

    def refuse(self, what: str, then: object, now: object) -> None:
        raise InputError(
            f"{self.folder}: the cache was made with {what} {then}, now {now}; give another folder"
        )

    def check_tiles(self, tiles: FolderTiles, crop: int, grid: int) -> None:
        """Compare with the record, or begin one. InputError: other tiles, crop or grid."""
        if not self.record:
            self.record = {
                "tiles": tiles.fingerprint,
                "files": hash_stamps(tiles),
                "contents": hash_contents(tiles),
                "crop": crop,
                "grid": grid,
                "teachers": {},
            }
            return
        now = {"tiles": tiles.fingerprint, "crop": crop, "grid": grid}
        for what, value in now.items():
            if self.record[what] != value:
                self.refuse(what, self.record[what], value)
        stamps = hash_stamps(tiles)
        if self.record.get("files") == stamps:
            return  # no size and no time has changed, so nobody has to read them all
        contents = hash_contents(tiles)
        if self.record["contents"] != contents:
            self.refuse("tiles of contents", self.record["contents"][:12], contents[:12])
        self.record["files"] = stamps  # moved or copied, but the same
        self.save_record()

    def rows_done(self, t: str) -> int:
        return self.record["teachers"].get(t, {"rows": 0})["rows"]

    def check_weights(self, t: str, file: Path | None) -> None:
        """InputError: a teacher's rows come from other weights. None: they are not at hand."""
        entry = self.record["teachers"].get(t)
        if entry is None or file is None or entry["stamp"] == stamp(file):
            return
        weights = hash_file(file)
        if entry["weights"] != weights:
            self.refuse(f"weights of {t}", entry["weights"][:12], weights[:12])

    def begin(self, t: str, weights: Path, shape: tuple[int, ...]) -> None:
        """An empty file of a teacher. InputError: there is one that this cache did not make."""
        if t not in self.record["teachers"] and self.file(t).exists():
            raise InputError(
                f"{self.file(t)} exists, and made_from.json does not know it; "
                "move it, or give another folder"
            )
        entry = {"weights": hash_file(weights), "stamp": stamp(weights), "rows": 0}
        self.record["teachers"][t] = entry
        self.save_record()
        make_file(self.file(t), shape)

    def check_file(self, t: str, shape: tuple[int, ...]) -> None:
        """InputError: NAME.npy is cut off, or something else."""
        try:
            found = np.load(self.file(t), mmap_mode="r").shape
        except (OSError, ValueError, EOFError) as error:
            found = type(error).__name__
        if found != shape:
            raise InputError(
                f"{self.file(t)} is damaged: {found} where {shape} belongs; "
                f"remove it and {self.record_file}, or give another folder"
            )


def stamp(file: str | Path) -> str:
    """Size and time of a file: if these are equal, its content is taken to be."""
    try:
        status = os.stat(file)
    except OSError:
        return "gone"
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


def hash_stamps(tiles: FolderTiles) -> str:
    stamps = hashlib.sha256()
    for name in tiles.files:
        stamps.update(stamp(os.path.join(tiles.top, name)).encode())
    return stamps.hexdigest()


def hash_contents(tiles: FolderTiles) -> str:
    contents = hashlib.sha256()
    for name in progress(tiles.files, "reading all tiles for a checksum", len(tiles.files)):
        contents.update(hash_file(os.path.join(tiles.top, name)).encode())
    return contents.hexdigest()


def hash_file(file: str | Path) -> str:
    """sha256 of a file; of one that cannot be read, its reason: the run will name it."""
    content = hashlib.sha256()
    if not os.path.isfile(file):
        return "no regular file"
    try:
        with open(file, "rb") as opened:
            chunk = opened.read(CHUNK)
            while chunk:
                content.update(chunk)
                chunk = opened.read(CHUNK)
    except OSError as error:
        return str(error.errno)
    return content.hexdigest()


def weights_file(t: str, args) -> Path | None:
    """Where a teacher's weights are, None if they are not at hand."""
    if t in OFFLINE:
        file = offline_file(t, args.weights_dir, args.teacher_steps, args.teacher_seed)
        return file if file.exists() else None
    return find_weights([t], args.weights_dir, fetch=False).get(t)


def say_space(cache: Cache, missing: dict[str, tuple[int, ...]]) -> None:
    """How much the missing files take, and how much is free. InputError: too little."""
    needed = 0
    for t, shape in missing.items():
        if cache.rows_done(t) == 0:
            needed += int(np.prod(shape)) * 2  # fp16
    existing = cache.folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    names = ", ".join(missing)
    space = f"{needed / 1e9:.3g} GB; {free / 1e9:.3g} GB are free"
    print(f"{cache.folder}: the outputs of {names} take {space}", flush=True)
    if needed > free:
        lacking = (needed - free) / 1e9
        raise InputError(
            f"{cache.folder} lacks {lacking:.3g} GB; take fewer tiles, or another disk"
        )


def make_file(file: Path, shape: tuple[int, ...]) -> None:
    """An empty array of its full size, so that the disk cannot become full half way."""
    file.parent.mkdir(parents=True, exist_ok=True)
    size = int(np.prod(shape)) * 2
    try:
        rows = np.lib.format.open_memmap(file, "w+", np.float16, shape)
        start = rows.offset
        del rows
        with open(file, "r+b") as opened:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, start + size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise InputError(f"cannot write {file}: {error}; take another disk") from None


@torch.no_grad()
def fill(
    cache: Cache, t: str, tiles: FolderTiles, teacher, grid: int, device, workers: int
) -> None:
    """Run one teacher over all tiles that it has not seen. A row counts once it is on the disk."""
    rows = np.load(cache.file(t), mmap_mode="r+")
    done = cache.rows_done(t)
    label = f"outputs of {t}, computed once"
    for batch in batches(tiles, range(done, len(tiles)), BATCH, workers, label=label):
        images = batch["image"].to(device).contiguous()
        tokens = teacher(images, grid)
        summary = tokens["summary"][:, None]  # (B, 1, D_t)
        outputs = torch.cat([summary, tokens["patches"]], dim=1).half().cpu()  # (B, 1 + N, D_t)
        if not outputs.isfinite().all():
            raise InputError(f"{t}: its outputs are not finite in fp16; leave it out, or no cache")
        rows[done : done + len(outputs)] = outputs.numpy()
        rows.flush()
        done += len(outputs)
        cache.record["teachers"][t]["rows"] = done
        cache.save_record()


def open_cache(folder: str, args) -> CachedTiles:
    """The source of a run: an old cache, or one that is filled now, as far as it is not."""
    arch = STUDENTS[args.student]
    crop = arch["img_size"]
    grid = crop // arch["patch_size"]
    tiles = FolderTiles(args.data, crop, seed=0)
    cache = Cache(folder)
    cache.check_tiles(tiles, crop, grid)
    missing = {}
    for t in args.teachers:
        cache.check_weights(t, weights_file(t, args))
        shape = (len(tiles), 1 + grid**2, TEACHERS[t].arch["width"])
        if cache.rows_done(t) > 0:
            cache.check_file(t, shape)
        if cache.rows_done(t) < len(tiles):
            missing[t] = shape
    if missing:
        fill_all(cache, missing, tiles, grid, args)
    files = {t: cache.file(t) for t in args.teachers}
    return CachedTiles(tiles, files, args.seed)


def fill_all(cache: Cache, missing: dict, tiles: FolderTiles, grid: int, args) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            f"{cache.folder} is not filled: run once without torchrun, with --fill-only"
        )
    device, dtype = choose_device(args.device, args.precision)
    find_weights(list(missing), args.weights_dir)  # names all that are missing at once
    say_space(cache, missing)
    workers = train.choose_workers(args, tiles, device)
    for t, shape in missing.items():  # one teacher in memory at a time
        teacher = load_teacher(
            t, args.weights_dir, device, dtype, args.teacher_steps, args.teacher_seed
        )
        if cache.rows_done(t) == 0:
            cache.begin(t, weights_file(t, args), shape)
        fill(cache, t, tiles, teacher, grid, device, workers)


def main() -> None:
    parser = make_parser("python -m extras.cache", __doc__)
    parser.add_argument("folder", metavar="CACHE", type=path, help="then the flags of train.py")
    parser.add_argument("--fill-only", action="store_true", help="fill it, and do not train")
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        parser.parse_args()
    own = sys.argv[1:2]
    flags = sys.argv[2:]
    if "--fill-only" in flags:
        flags.remove("--fill-only")
        own.append("--fill-only")
    own = parser.parse_args(own)
    args = train.parse_args(flags)
    if not args.data:
        raise InputError("--data: give the folders of tiles; drawn tissue needs no cache")
    source = open_cache(own.folder, args)
    if not own.fill_only:
        train.main(args, source)


if __name__ == "__main__":
    run_program(main)
