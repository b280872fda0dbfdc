"""Evaluation of frozen embeddings: kNN at every nested dim, the student beside its teachers.

Place in the data flow:  data.py -> student.py and teachers.py -> losses.py -> train.py -> [ evaluate.py ]

    python evaluate.py runs/demo                     synthetic tissue, both tasks, beside the offline teachers
    python evaluate.py runs/demo --data labelled/    a folder with train/CLASS/* and test/CLASS/*
    python evaluate.py runs/demo --embed tiles/ --dim 16 --out embeddings.npz

Features are taken after the final norm, cut to the first m channels, and only then L2-normalised. kNN as in DINO (arXiv
2104.14294): k = 20, never more than the bank, cosine similarity, votes weighted exp(similarity / 0.07).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import TASKS, CentreTiles, InputError, LabelledTiles, Skipped, TissueTiles, batches, progress, save_atomically
from student import Student, load_strictly, read_weights, truncate
from teachers import OFFLINE, Teacher, load_teacher

K, TEMPERATURE = 20, 0.07
N_TILES = 2048  # of synthetic tissue, in the bank and again in the test set
Models = dict[str, tuple[nn.Module, list[int]]]  # {name: (student or teacher, dims to cut it to)}
Labelled = Iterable[tuple[Tensor, dict[str, Tensor]]]  # batches of images (B, 3, H, W), {task: labels (B,)}


def load_student(run: str | Path, device: str | torch.device = "cpu") -> tuple[Student, dict]:
    """A trained student, its adaptor heads left out, from a run folder or a student.pt -> (student, its config)."""
    path = Path(run) / "student.pt" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise InputError(f"{path} does not exist; give the folder of a run that has saved, or a student.pt")
    content = read_weights(path)
    if not {"state_dict", "config"} <= content.keys():
        raise InputError(f"{path} is not a student.pt written by train.py; give the folder of a run")
    student = Student(content["config"]["arch"], {}, content["config"]["nested_dims"])
    load_strictly(student.backbone, content["state_dict"], str(path))
    return student.to(device).eval(), content["config"]


@torch.no_grad()
def embed(model: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Features (n, D) float32, on the CPU, of images (n, 3, H, W): a student's summary, a teacher's card embedding."""
    device = next(model.parameters()).device
    features = model.embed if isinstance(model, Teacher) else lambda batch: model(batch)["summary"]
    return torch.cat([features(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def knn(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = K) -> dict[str, float]:
    """Weighted k-nearest-neighbour vote. x: (n, D), y: (n,) integers -> accuracy and balanced accuracy in [0, 1]."""
    k = min(k, len(train_x))
    train_x, test_x = F.normalize(train_x.float(), dim=-1), F.normalize(test_x.float(), dim=-1)
    n_classes = int(max(train_y.max(), test_y.max())) + 1
    predicted = []
    for queries in test_x.split(1024):  # bounds the (queries, bank) matrix
        similarity, nearest = (queries @ train_x.T).topk(k, dim=-1)  # (q, k)
        votes = torch.zeros(len(queries), n_classes)
        votes.scatter_add_(1, train_y[nearest], (similarity / TEMPERATURE).exp())
        predicted.append(votes.argmax(-1))
    correct = (torch.cat(predicted) == test_y).float()  # (n,)
    recalls = [correct[test_y == label].mean() for label in test_y.unique()]
    return {"accuracy": correct.mean().item(), "balanced_accuracy": torch.stack(recalls).mean().item()}


def knn_rows(models: Models, bank: Labelled, test: Labelled) -> list[dict]:
    """kNN of every model at each of its dims on every task: rows of the table. bank and test are gone through once."""
    features, labels = [], []
    for batches_of in (bank, test):
        parts = [({name: embed(model, images) for name, (model, _) in models.items()}, y) for images, y in batches_of]
        features.append({name: torch.cat([x[name] for x, _ in parts]) for name in models})
        labels.append({task: torch.cat([y[task] for _, y in parts]) for task in parts[0][1]})
    rows = []
    for name, (model, dims) in models.items():
        count = sum(p.numel() for p in (model.backbone if isinstance(model, Student) else model).parameters())
        for dim in dims:
            train_x, test_x = (truncate(x, dim)[name] for x in features)
            tasks = {task: knn(train_x, labels[0][task], test_x, labels[1][task]) for task in labels[0]}
            rows.append({"model": name, "parameters": count, "dim": dim, "tasks": tasks})
    return rows


def folder_tiles(tiles: LabelledTiles, skipped: Skipped) -> Labelled:
    """A split of a labelled folder; unreadable tiles are named, counted and left out."""
    loader = batches(tiles, range(len(tiles.files)), 64)
    for batch in progress(loader, f"embedding {tiles.root}", len(loader)):
        skipped.check(batch)
        readable = batch["index"] >= 0
        yield batch["image"][readable], {"class": tiles.labels[batch["index"][readable]]}


def table(rows: list[dict], metric: str = "accuracy") -> str:
    """Aligned text: a line for each model and dim, a column for each task, in per cent."""
    tasks = list(rows[0]["tasks"])
    width = max(26, *(len(row["model"]) for row in rows)) + 2
    head = f"{'kNN ' + metric.replace('_', ' ') + ', %':{width}}{'parameters':>12}{'dim':>6}"
    lines = [head + "".join(f"{task:>10}" for task in tasks)]
    for row in rows:
        scores = "".join(f"{100 * row['tasks'][task][metric]:>10.1f}" for task in tasks)
        lines.append(f"{row['model']:{width}}{row['parameters'] / 1e6:>10.3f} M{row['dim']:>6}" + scores)
    return "\n".join(lines)


# ---- the command line (train.py uses the same pieces) -------------------------------------------------------------
class OneLineParser(argparse.ArgumentParser):
    """argparse with one-line errors, whole flags only, and the module docstring as the manual."""

    def __init__(self, prog: str, manual: str):
        super().__init__(prog, description=manual, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}; see python {self.prog} --help\n")


def choose_device(name: str | None, precision: str = "fp32") -> tuple[torch.device, torch.dtype]:
    """--device, or the best at hand (on CUDA the GPU of this process), and the compute dtype of --precision on it."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device: {name} is not to be had on this machine; use cpu, cuda or mps") from None
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"--precision fp16 needs CUDA; use fp32 or bf16 on {device.type}")
    if precision == "auto" and device.type == "cuda":  # T4 and V100 only emulate bf16, slowly
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def at_least(smallest: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not text.strip().isdecimal() or not smallest <= int(text) < 2**62:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {smallest} on")
        return int(text)

    return whole_number


def path(text: str) -> str:
    if not text:  # an unset variable of the shell; without this check the default would be taken in silence
        raise argparse.ArgumentTypeError("it is empty; give a path")
    return text


def name_list(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def dim_list(text: str) -> list[int]:
    return sorted({at_least(1)(part) for part in text.split(",")})


def run_main(main: Callable[[], None]) -> None:
    """Run a script: what a user can put right ends it with one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; train.py goes on with --resume, all else has to begin anew", file=sys.stderr)
        sys.exit(130)


def report(models: Models, runs: list[Path], data: str | None, seed: int) -> list[dict]:
    """Evaluate, print the table, and add it to the results.json of each run; what it holds on other data stays."""
    sizes = {model.backbone.img_size for model, _ in models.values() if isinstance(model, Student)}
    if len(sizes) > 1:
        raise InputError(f"RUN: students of {sizes} px see other images; evaluate each alone, not side by side")
    size = sizes.pop()
    if data:
        train = LabelledTiles(data, "train", size)
        test = LabelledTiles(data, "test", size, train.classes)
        skipped = Skipped(len(train.files) + len(test.files))
        rows = knn_rows(models, folder_tiles(train, skipped), folder_tiles(test, skipped))
    else:
        tissue = [TissueTiles(stream, seed, size).draw(N_TILES) for stream in ("bank", "test")]  # never trained on
        rows = knn_rows(models, *([(tiles["image"], {task: tiles[task] for task in TASKS})] for tiles in tissue))
    print("\n" + table(rows) + ("\n\n" + table(rows, "balanced_accuracy") if data else ""))
    view = f"shorter side to {size} px, centre crop" if data else f"drawn at {size} px"
    protocol = f"kNN, k = {K}, cosine, votes exp(similarity / {TEMPERATURE}); tiles: {view}"
    result = {"protocol": protocol, "seed": seed, "torch": torch.__version__, "rows": rows}
    for run in runs:
        file = (run if run.is_dir() else run.parent) / "results.json"
        try:
            results = json.loads(file.read_text()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}; move it") from None
        results |= {data or "synthetic tissue": result}
        save_atomically(results, file, lambda content, out: out.write(json.dumps(content, indent=1).encode()))
    return rows


def export(student: Student, config: dict, folder: str, dim: int, half: bool, out: str) -> None:
    """Embeddings of all tiles of a folder, cut to `dim`, into an .npz that exists only when it is whole.

    embeddings: (n, dim) fp32, or fp16; paths: (n,), of the readable tiles; dim; model; step; licences: (teachers,).
    """
    if Path(out).exists():
        raise InputError(f"--out: {out} exists; choose another name, or remove it")
    tiles, paths = CentreTiles(folder, student.backbone.img_size, "--embed"), []
    loader, skipped = batches(tiles, range(len(tiles.files)), 64), Skipped(len(tiles.files))
    embeddings = np.empty((len(tiles.files), dim), np.float16 if half else np.float32)
    for batch in progress(loader, f"embedding {folder}", len(loader)):
        readable = skipped.check(batch)["index"] >= 0
        features = truncate({"summary": embed(student, batch["image"][readable])}, dim)["summary"]
        embeddings[len(paths) : len(paths) + len(features)] = features
        paths += [tiles.files[i] for i in batch["index"][readable]]
    held = config.get("licences") or config["teachers"]  # a student.pt of before --init had both in one
    licences = [f"{name}: {text}" for name, text in held.items()]
    content = {"embeddings": embeddings[: len(paths)], "paths": paths, "dim": dim, "licences": licences}
    content |= {"model": config["student"], "step": config["step"]}
    save_atomically(content, out, lambda content, file: np.savez(file, **content))
    print(f"{len(paths)} embeddings of {dim} channels in {out}; licences: {'; '.join(licences)}")


def main() -> None:
    parser = OneLineParser("evaluate.py", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run folder or a student.pt; several stand side by side")
    add("--data", type=path, help="a labelled folder, train/CLASS/* and test/CLASS/* (default: synthetic tissue)")
    add("--dims", type=dim_list, help="comma-separated (default: each run's nested dims)")
    add("--teachers", type=name_list, help="beside the runs, '' for none (default: offline ones of the last run)")
    add("--embed", type=path, metavar="DIR", help="instead, write the embeddings of all tiles of a folder to --out")
    add("--dim", type=at_least(1), help="with --embed: channels to keep, best a nested dim (default: all)")
    add("--half", action="store_true", help="with --embed: fp16 instead of fp32")
    add("--out", type=path, metavar="X.npz", help="with --embed: the file to write")
    add("--seed", type=at_least(0), default=0, help="of the synthetic tissue (default: 0)")
    add("--device", help="cuda, mps or cpu (default: the best at hand)")
    add("--weights-dir", type=path, default="weights", help="where teachers' weights are (default: weights)")
    args = parser.parse_args()
    device, _ = choose_device(args.device)
    models = {}
    for run in args.runs:
        student, config = load_student(run, device)
        width = student.backbone.width
        for flag, dim in (("--dims", args.dims and args.dims[-1]), ("--dim", args.dim)):
            if dim and dim > width:
                raise InputError(f"{flag}: {dim} is above the width of {run}; give at most {width}")
        if config["step"] < config["steps"]:
            print(f"note: {run} has done {config['step']} of its {config['steps']} steps")
        models[run] = (student, args.dims or student.nested_dims)
    if args.embed:
        if len(args.runs) > 1 or not args.out:
            raise InputError("--embed takes one RUN, and --out X.npz")
        return export(student, config, args.embed, args.dim or width, args.half, args.out)
    offline = [name for name in config["teachers"] if name in OFFLINE]
    for name in offline if args.teachers is None else args.teachers:
        teacher = load_teacher(name, args.weights_dir, device, **config["teacher_recipe"])
        models[f"teacher {name}"] = (teacher, [teacher.embed_dim])
    report(models, [Path(run) for run in args.runs], args.data, args.seed)


if __name__ == "__main__":
    run_main(main)
