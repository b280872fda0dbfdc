"""Real tissue: two small teachers of labelled tiles; students of both, of each, and not nested.

    python -m extras.benchmarks.real_tissue LABELLED_A LABELLED_B             an hour (estimate)
    python -m extras.benchmarks.real_tissue LABELLED_A LABELLED_B --seeds 3   three times that
    python -m extras.benchmarks.real_tissue LABELLED_A LABELLED_B --tiny      shows that it runs

Each folder holds train/CLASS/* and test/CLASS/* (or labels.csv), as for evaluate.py --data. Give
two folders that ask different questions, of thousands of tiles each, split by patient. With
hundreds, which is all that it was tried on, it is a smoke test: no accuracy of it means anything.

For each seed, on tiles shrunk whole to the student's 64 px:

    teachers    a ViT of the offline teachers' size for each folder, trained on all labels of train
    held back   a fifth of each class of train, which teachers have seen and students never see
    students    by train.py's own code, on the other four fifths of both folders, without labels

Two tables, of the test tiles and of the held-back ones. In both, kNN and the linear probe learn
from the four fifths (balanced accuracy, %), and "agree" is the share of tiles (%) on which a
model's linear probe decides as that of the folder's own teacher, right or wrong. Colour histograms
stand beside: what stain and light alone can tell.

Why two: a teacher may be wrong on the test set, and a student that copies it is then wrong as well.
On held-back tiles a teacher that has learned its training tiles is right (its row says so). There
the student's distance to it is what copying has lost; what both lose from there to the test set is
the teacher's own failure to generalise. Tiles of one slide may lie on both sides of the hold-back,
which makes copying look easier than it is on other slides.

OUT holds the teachers' weights, a run a student, and results.json. The same command goes on where
it was interrupted.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import functional as TF

import evaluate
import train
from data import (
    VIEW,
    Source,
    batches,
    epoch_order,
    make_parser,
    path,
    positive,
    progress,
    random_view,
    run_program,
    save_atomically,
)
from evaluate import embed, figures_of, fit_linear, knn, load_student, tally_answers
from extras.benchmarks.miniature import (
    BOTH,
    DIMS,
    FLAT,
    WIDTH,
    deviation,
    histograms,
    read_tiles,
    report,
    run_folder,
)
from student import STUDENTS, InputError, Student, millions, truncate
from teachers import TEACHERS, VIT_TOY, TeacherSpec, choose_device, load_teacher

TEACHER_OF = {"A": "real_a", "B": "real_b"}  # folder -> the teacher that knows its classes
FLAGS = {  # student -> flags of train.py
    BOTH: ["--teachers", "real_a,real_b"],
    "student of A": ["--teachers", "real_a"],
    "student of B": ["--teachers", "real_b"],
    FLAT: ["--teachers", "real_a,real_b", "--dims", str(WIDTH)],
}
PARTS = {"test": "test tiles", "held": "held-back training tiles"}  # what the tables are of
BATCH = 32  # of a teacher's training
PEAK_LR = 1e-3  # the same
LICENCE = "that of the labelled tiles; binds students: ask where the tiles come from"
TINY = {"seeds": 1, "steps": 2, "teacher_steps": 2}
TINY_TILES = 40  # of a split
TINY_FLAGS = ["--batch-size", "8", "--stats-tiles", "16"]

Labelled = dict[str, tuple[Tensor, Tensor]]  # {part: (images uint8 (n, 3, S, S), classes (n,))}
Scores = dict[tuple[str, int, str, str], float]  # {(model, dim, folder, metric): per cent}


# ---- tiles ---------------------------------------------------------------------------------------


def read_folder(root: str, most: int | None = None) -> Labelled:
    """The tiles of a labelled folder -> parts "train" and "test", at most so many of each.

    InputError: too few to hold any back, or a single class.
    """
    images, labels = read_tiles(root, STUDENTS["toy"]["img_size"])
    parts = {}
    for part, x in images.items():
        parts[part] = (x[:most], labels[part]["class"][:most])
    _, counts = parts["train"][1].unique(return_counts=True)
    if len(counts) < 2 or counts.max() < 5:
        raise InputError(
            f"{root}: too few training tiles; give two classes or more, one of them of five or more"
        )
    return parts


def hold_back(tiles: Labelled, seed: int) -> Labelled:
    """Part "train" is divided: a fifth of each class becomes "held", the rest "kept"."""
    images, labels = tiles["train"]
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        places = torch.nonzero(labels == label)[:, 0]
        places = places[torch.randperm(len(places), generator=generator)]
        held[places[: len(places) // 5]] = True
    return {
        "train": tiles["train"],
        "held": (images[held], labels[held]),
        "kept": (images[~held], labels[~held]),
        "test": tiles["test"],
    }


class WholeTiles(Source):
    """A source: whole tiles in memory, turned and mirrored, in another order every epoch.

    Sample k -> {"image": uint8 (3, S, S), and "class" where there are labels}.
    """

    program = "python -m extras.benchmarks.real_tissue LABELLED_A LABELLED_B"

    def __init__(self, images: Tensor, seed: int, labels: Tensor | None = None):
        self.images = images
        self.labels = labels
        self.seed = seed
        self.description = f"{len(images):,} whole tiles, shrunk to {images.shape[-1]} px"
        self.fingerprint = hash_tensors(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> dict:
        n = len(self.images)
        i = int(epoch_order(self.seed, k // n, n)[k % n])
        size = self.images.shape[-1]
        image = TF.to_pil_image(self.images[i])
        sample = {"image": random_view(image, size, np.random.default_rng((VIEW, self.seed, k)))}
        if self.labels is not None:
            sample["class"] = int(self.labels[i])
        return sample


def hash_tensors(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for x in tensors:
        content.update(x.contiguous().numpy().tobytes())
    return content.hexdigest()


# ---- teachers and students -----------------------------------------------------------------------


def register_teachers() -> None:
    """Two entries in teachers.TEACHERS, as whoever adds a teacher of their own writes one."""
    for name in TEACHER_OF.values():
        TEACHERS[name] = TeacherSpec(VIT_TOY, LICENCE, tile="64, whole tiles")


def train_teacher(
    images: Tensor, labels: Tensor, steps: int, seed: int, device: torch.device, label: str
) -> dict[str, Tensor]:
    """Train a ViT and a linear classifier on labelled tiles -> the ViT's state dict (CPU)."""
    torch.manual_seed(seed)
    vit = Student(VIT_TOY)  # the ViT of a teacher, with ImageNet's normalisation
    head = nn.Linear(vit.width, int(labels.max()) + 1)
    model = nn.ModuleList([vit, head]).to(device)
    optimizer = train.make_optimizer(model, PEAK_LR)
    source = WholeTiles(images, seed, labels)
    tiles = batches(source, range(steps * BATCH), BATCH)
    for step in progress(range(steps), label, steps):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, steps, PEAK_LR)
        batch = next(tiles)
        summary = vit(batch["image"].to(device))["summary"]  # (B, D_t)
        loss = F.cross_entropy(head(summary), batch["class"].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.CLIP)
        optimizer.step()
    state = vit.backbone.state_dict()
    return {key: value.cpu() for key, value in state.items()}


def weights_folder(args: argparse.Namespace, seed: int) -> Path:
    """Where the teachers of this seed are."""
    return args.out / f"teachers-{seed}"


def train_teachers(args: argparse.Namespace, folders: dict[str, Labelled], seed: int) -> None:
    """Those of this seed that are not there yet."""
    device, _ = choose_device(args.device)
    for folder, tiles in folders.items():
        file = weights_folder(args, seed) / f"{TEACHER_OF[folder]}.pth"
        if not file.exists():
            title = f"training the teacher of {folder}, seed {seed}"
            state = train_teacher(*tiles["train"], args.teacher_steps, seed, device, title)
            save_atomically(state, file)


def train_students(args: argparse.Namespace, folders: dict[str, Labelled], seed: int) -> None:
    """All students of this seed, by train.py's command line; a run that is there goes on."""
    kept = torch.cat([tiles["kept"][0] for tiles in folders.values()])
    source = WholeTiles(kept, seed)
    machine = ["--weights-dir", str(weights_folder(args, seed))]
    if args.device:
        machine += ["--device", args.device]
    for name, flags in FLAGS.items():
        run = run_folder(args.out, name, seed)
        print(f"\n{name}, seed {seed}", flush=True)
        if (run / "last.pt").exists():
            words = ["--resume", str(run), *machine]
        else:
            words = ["--student", "toy", "--out", str(run), "--seed", str(seed), *flags, *machine]
            words += ["--steps", str(args.steps), "--log-every", str(max(1, args.steps // 5))]
            words += TINY_FLAGS if args.tiny else ["--stats-tiles", str(train.STATS_TILES)]
        train.main(train.parse_args(words), source)


# ---- what they know, and how well they copy ------------------------------------------------------


def load_models(args: argparse.Namespace, seed: int) -> dict[str, nn.Module]:
    """{row of the table: teacher or student} of a seed."""
    models = {}
    for folder, name in TEACHER_OF.items():
        models[f"teacher of {folder}"] = load_teacher(name, weights_folder(args, seed))
    for name in FLAGS:
        models[name], _ = load_student(run_folder(args.out, name, seed))
    return models


def describe(models: dict[str, nn.Module], tiles: Labelled) -> dict[tuple[str, int], dict]:
    """{(model, dim): {part: features (n, dim)}} of one folder's tiles, teachers first."""
    found = {}
    parts = {part: tiles[part][0] for part in ("kept", "held", "test")}
    for name, model in models.items():
        features = {part: embed(model, images) for part, images in parts.items()}
        dims = DIMS if name in FLAGS else [features["kept"].shape[1]]
        for m in dims:
            found[name, m] = truncate(features, m)
    colours = {part: histograms(images) for part, images in parts.items()}
    found["colour histograms", colours["kept"].shape[1]] = colours
    return found


def decide(features: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The linear probe, fitted on the part "kept" -> the classes that it gives to each part."""
    W, bias, classes = fit_linear(features["kept"], labels)
    decisions = {}
    for part in PARTS:
        logits = features[part].double() @ W.T + bias  # (n, K)
        decisions[part] = classes[logits.argmax(1)]
    return decisions


def measure(models: dict[str, nn.Module], folders: dict[str, Labelled]) -> dict[str, Scores]:
    """{part: scores} of all models, dims and folders of one seed."""
    scores = {part: {} for part in PARTS}
    for folder, tiles in folders.items():
        _, bank_y = tiles["kept"]
        found = describe(models, tiles)
        decisions = {}
        for key, features in found.items():
            decisions[key] = decide(features, bank_y)
        of_teacher = decisions[f"teacher of {folder}", VIT_TOY["width"]]
        for (name, m), features in found.items():
            for part in PARTS:
                y = tiles[part][1]
                decided = decisions[name, m][part]
                neighbours = figures_of(knn(features["kept"], bank_y, features[part], y))
                linear = figures_of(tally_answers(decided, y))
                agree = (decided == of_teacher[part]).double().mean().item()
                row = scores[part]
                row[name, m, folder, "kNN"] = 100 * neighbours["balanced_accuracy"]
                row[name, m, folder, "linear"] = 100 * linear["balanced_accuracy"]
                row[name, m, folder, "agree"] = 100 * agree
    return scores


def make_result(values: dict, sizes: dict[str, int], seeds: int) -> dict:
    """One table as results.json holds it; see evaluate.run_tasks. A metric has a value a seed."""
    rows = {}
    for (name, m, folder, metric), value in values.items():
        empty = {"model": name, "parameters": sizes.get(name, 0), "dim": m, "scores": {}}
        row = rows.setdefault((name, m), empty)
        numbers = {"mean": value.mean(), "sd": deviation(value), "seeds": value.tolist()}
        row["scores"].setdefault(folder, {})[metric] = numbers
    return {"seeds": seeds, "torch": torch.__version__, "rows": list(rows.values())}


# ---- the command line ----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = make_parser("python -m extras.benchmarks.real_tissue", __doc__)
    add = parser.add_argument
    add("labelled_a", type=path, metavar="LABELLED_A", help="labelled tiles: train/CLASS/*, ...")
    add("labelled_b", type=path, metavar="LABELLED_B", help="others, with other classes")
    add("--out", type=path, help="(default: runs/real_tissue; with --tiny: runs/real_tissue-tiny)")
    add("--seeds", type=positive, default=1, help="(default: 1)")
    add("--steps", type=positive, help="of every student (default: train.py's for the toy)")
    add("--teacher-steps", type=positive, default=500, help="of every teacher (default: 500)")
    add("--device", type=path, help="cuda, mps or cpu (default: the best at hand)")
    add("--tiny", action="store_true", help="two steps, few tiles; its numbers mean nothing")
    args = parser.parse_args()
    args.steps = args.steps or train.DEFAULTS["toy"]["steps"]
    if args.tiny:
        vars(args).update(TINY)
    args.out = Path(args.out or ("runs/real_tissue-tiny" if args.tiny else "runs/real_tissue"))
    return args


def check_out(args: argparse.Namespace, folders: dict[str, Labelled]) -> None:
    """OUT is begun, or goes on. InputError: it was begun with other tiles or steps."""
    settings = {"steps": args.steps, "teacher_steps": args.teacher_steps}
    for folder, tiles in folders.items():
        settings[folder] = hash_tensors(*tiles["train"], *tiles["test"])
    file = args.out / "settings.json"
    text = json.dumps(settings, indent=1)
    if file.exists() and file.read_text() != text:
        raise InputError(f"--out: {args.out} was begun with other tiles or steps; give another")
    save_atomically(text.encode(), file)


def main() -> None:
    """The command line."""
    args = parse_args()
    began = time.monotonic()
    register_teachers()
    folders = {}
    for folder, root in (("A", args.labelled_a), ("B", args.labelled_b)):
        folders[folder] = read_folder(root, TINY_TILES if args.tiny else None)
    check_out(args, folders)
    scores = []
    for seed in range(args.seeds):
        divided = {}
        for folder, tiles in folders.items():
            divided[folder] = hold_back(tiles, seed)
        train_teachers(args, divided, seed)
        train_students(args, divided, seed)
        models = load_models(args, seed)
        print(f"\nmeasuring seed {seed}", flush=True)
        scores.append(measure(models, divided))

    sizes = {name: round(1e6 * millions(model)) for name, model in models.items()}
    for folder, root in (("A", args.labelled_a), ("B", args.labelled_b)):
        counts = [f"{len(y):,} {part}" for part, (_, y) in divided[folder].items()]
        classes = len(folders[folder]["train"][1].unique())
        print(f"{folder}: {root}, {classes} classes; tiles: {', '.join(counts)}")
    results = {}  # saved once all of it is printed, which a full disk cannot undo
    for part, title in PARTS.items():
        print(f"\n{title}")
        values = report([of_seed[part] for of_seed in scores])
        results[title] = make_result(values, sizes, args.seeds)
    print()
    for title, result in results.items():
        evaluate.save_result(result, title, args.out)
    print(f"{(time.monotonic() - began) / 60:.1f} min in all")


if __name__ == "__main__":
    run_program(main)
