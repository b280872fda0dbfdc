"""Evaluation of what train.py saved: frozen embeddings at every nested dim, students and teachers side by side.

    python evaluate.py runs/demo                        synthetic tissue, every task, beside the offline teachers
    python evaluate.py runs/a runs/b --data labelled/   several runs on tiles of your own
    python evaluate.py runs/demo --embed tiles/ --dim 16 --out X.npz    embeddings; without --embed, the cut student
Features are taken after the final norm, cut to the first m channels, and only then normalised where a task does so."""

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision import utils
from torchvision.transforms import functional as TF

import data
import teachers as cli
from data import save_atomically
from student import InputError, Student, millions, truncate
from teachers import load_strictly, read_weights

TOKENS, N_TILES = (
    100_000,
    2048,
)  # most that the dense probe fits; synthetic tiles, to learn from and again to test on
WORKERS = min(8, torch.get_num_threads()) if torch.cuda.is_available() else 0  # that read tiles
LABELS = {
    "class": "summary",
    "cells": "summary",
    "tissue": "summary",
    "mask": "patches",
    "nuclei": "patches",
}


def load_student(run: str | Path, device: str | torch.device = "cpu") -> tuple[Student, dict]:
    """A trained student, its adaptor heads left out, from a run folder or a student.pt -> (student, its config)."""
    path = Path(run) / "student.pt" if Path(run).is_dir() else Path(run)
    content = read_weights(path) if path.exists() else {}
    config = content.get("config")
    if not isinstance(config, dict) or not {
        "arch",
        "nested_dims",
        "step",
        "steps",
        "teachers",
        "student",
    } <= {*config}:
        why = "is not a student.pt written by train.py" if path.exists() else "does not exist"
        raise InputError(
            f"{path} {why}; give the folder of a run that has saved, or its student.pt"
        )
    student = Student(config["arch"])
    load_strictly(student.backbone, content.get("state_dict", {}), str(path))
    return student.to(device).eval(), config


@torch.no_grad()
def embed(model: nn.Module, images: Tensor, batch_size: int = 64, kind: str = "summary") -> Tensor:
    """Float32, on the CPU, of images (n, 3, H, W): summary, a teacher's card embedding (n, D), or patches (n, N, D)."""
    of = (
        model.embed
        if isinstance(model, cli.Teacher) and kind == "summary"
        else lambda x: model(x)[kind]
    )
    return torch.cat(
        [of(x.to(next(model.parameters()).device)).float().cpu() for x in images.split(batch_size)]
    )


class CentreTiles(Dataset):
    """Tile k of `files` -> {"image": uint8 (3, size, size), "index": k, -1 if unreadable, "skipped": its path, target}.
    targets: {"class": numbers (n,)} or {"mask": files (n,)}, whose numbers (size, size) are cut as their tile is."""

    def __init__(
        self, root: str | Path, size: int, files: list[str], targets: dict[str, list] | None = None
    ):
        self.root, self.size, self.files, self.targets, self.unreadable = (
            Path(root),
            size,
            files,
            targets or {},
            [],
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> dict:
        item, skipped = {kind: target[k] for kind, target in self.targets.items()}, ""
        if (image := data.open_tile(self.root / self.files[k])) is None:
            image, skipped = Image.new("RGB", (1, 1)), str(self.root / self.files[k])
        if "mask" in item:
            if (
                mask := data.open_tile(self.root / item["mask"], mask=True)
            ) is None or mask.size != image.size:
                mask, skipped = image.convert("L"), skipped or str(self.root / item["mask"])
            item["mask"] = self.centre(mask, "nearest")[0]
        return item | {
            "image": self.centre(image),
            "index": -1 if skipped else k,
            "skipped": skipped,
        }

    def centre(
        self, image: Image.Image, mode: str = "bicubic"
    ) -> Tensor:  # shorter side to `size`, then crop
        return TF.pil_to_tensor(
            TF.center_crop(TF.resize(image, self.size, TF.InterpolationMode(mode)), self.size)
        )


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities (q, k) and indices (q, k) of the k nearest of the bank (all, if it has fewer), in order."""
    bank, k = F.normalize(bank.float(), dim=-1), min(k, len(bank))
    found = [
        (F.normalize(part.float(), dim=-1) @ bank.T).topk(k) for part in queries.split(1024)
    ]  # bounds the matrix
    return torch.cat([similarity for similarity, _ in found]), torch.cat(
        [index for _, index in found]
    )


def accuracies(
    predicted: Tensor, truth: Tensor
) -> dict[str, float]:  # (n,); balanced: over the classes of `truth`
    hits = (predicted == truth).double()
    recalls = torch.stack([hits[truth == label].mean() for label in truth.unique()])
    return {"accuracy": hits.mean().item(), "balanced_accuracy": recalls.mean().item()}


def knn(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20
) -> dict[str, float]:
    """k = 20 (at most the bank), cosine, votes weighted exp(similarity / 0.07), as in DINO (arXiv 2104.14294)."""
    similarity, index = nearest(train_x, test_x, k)
    votes = torch.zeros(len(test_x), int(train_y.max()) + 1).scatter_add(
        1, train_y[index], (similarity / 0.07).exp()
    )
    return accuracies(votes.argmax(-1), test_y)


def retrieval(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, float]:
    """Test queries train by cosine. Acc@n: a hit among the n nearest; mMV@5: majority of 5, ties to the nearest."""
    labels = train_y[nearest(train_x, test_x, 5)[1]]  # (q, 5)
    votes = (labels[:, :, None] == labels[:, None]).sum(
        -1
    )  # (q, 5): how many of the five have the label of each
    majority = labels.gather(1, votes.argmax(-1, keepdim=True))[
        :, 0
    ]  # of equals argmax takes the first, the nearest
    metrics = {
        f"Acc@{n}": (labels[:, :n] == test_y[:, None]).any(-1).double().mean().item()
        for n in (1, 3, 5)
    }
    return metrics | {"mMV@5": accuracies(majority, test_y)["accuracy"]}


def adaptive_retrieval(
    train_x, train_y, test_x, test_y, dim: int, shortlist: int = 200
) -> dict[str, float]:
    """The 200 nearest at `dim` channels, re-ranked at all, as in MRL (2205.13147); work: its share of a full search."""
    candidates = nearest(**truncate({"bank": train_x, "queries": test_x}, dim), k=shortlist)[
        1
    ]  # (q, shortlist)
    bank, queries, best = (
        F.normalize(train_x.float(), dim=-1),
        F.normalize(test_x.float(), dim=-1),
        [],
    )
    for rows, part in zip(candidates.split(64), queries.split(64)):
        best.append(
            rows.gather(1, torch.einsum("qsd,qd->qs", bank[rows], part).argmax(-1, keepdim=True))[
                :, 0
            ]
        )
    work = (
        1.0
        if dim == train_x.shape[1]
        else dim / train_x.shape[1] + candidates.shape[1] / len(train_x)
    )
    return {"Acc@1": accuracies(train_y[torch.cat(best)], test_y)["accuracy"], "work": work}


def fit_linear(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logistic regression of y (n,) on x (n, M), in float64 -> W (K, M), bias (K,), classes (K,): minimises sum_i CE_i
    + lambda / 2 ||W||^2, lambda = 100 / (M K), bias free: scikit-learn's with C = M K / 100, for K = 2 twice that."""
    classes, y = y.unique(return_inverse=True)
    (n, M), K, mean = x.shape, len(classes), x.double().mean(0)
    x, decay = x.double() - mean, 100 / (M * K * n)  # everything divided by n
    # L-BFGS works on V, where W = P V and P P^T is about the inverse Hessian at zero: the same minimum, far fewer steps
    curvature, U = torch.linalg.eigh(x.T @ x / (n * K) + decay * torch.eye(M))
    z = x @ (P := U / curvature.sqrt())
    V, bias = (torch.zeros(rows, K, dtype=torch.float64, requires_grad=True) for rows in (M, 1))
    optimizer = torch.optim.LBFGS(
        [V, bias], max_iter=5000, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(z @ V + bias, y) + decay / 2 * (P @ V).square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    W = (P @ V.detach()).T
    return W, bias.detach()[0] - W @ mean, classes


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor
) -> dict[str, float]:
    """Logistic regression to convergence: sum of CE + 50 / (channels * classes) * ||W||^2, as `fit_linear` has it."""
    W, bias, classes = fit_linear(train_x, train_y)
    return accuracies(classes[(test_x.double() @ W.T + bias).argmax(-1)], test_y)


def overlap(
    confusion: Tensor,
) -> dict[str, float]:  # of pixel counts (K, K): rows the truth, columns predicted
    hits, sizes = confusion.diagonal().double(), (confusion.sum(0) + confusion.sum(1)).double()
    metrics = {"mIoU": hits / (sizes - hits), "Dice": 2 * hits / sizes}
    return {name: values[sizes > 0].mean().item() for name, values in metrics.items()}


def dense_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor
) -> dict[str, float]:
    """The linear probe on 100,000 patch tokens at most, labelled by their centre; logits enlarged; all test pixels.
    x: (n, N, D); y: masks (n, S, S) of class numbers 0 to 255."""
    grid = round(train_x.shape[1] ** 0.5)
    y = (
        F.interpolate(train_y[:, None].float(), (grid, grid), mode="nearest-exact").flatten().long()
    )  # (n * N,)
    some = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:TOKENS]
    W, bias, classes = fit_linear(train_x.flatten(0, 1)[some], y[some])
    confusion = torch.zeros(256 * 256, dtype=torch.long)
    for x, truth in zip(test_x.split(64), test_y.long().split(64)):
        logits = (
            (x.double() @ W.T + bias).transpose(1, 2).unflatten(2, (grid, grid))
        )  # (b, K, grid, grid)
        predicted = classes[
            F.interpolate(logits, truth.shape[1:], mode="bilinear").argmax(1)
        ]  # (b, S, S)
        confusion += (256 * truth + predicted).flatten().bincount(minlength=256 * 256)
    return overlap(confusion.view(256, 256))


TASKS = {
    f.__name__.split("_")[0]: f
    for f in (knn, linear_probe, retrieval, adaptive_retrieval, dense_probe)
}


def evaluate(models: dict, train: Dataset, test: Dataset, tasks: list[str]) -> list[dict]:
    """models: {name: (model, dims to cut it to)} -> rows {"model", "dim", ..., "scores": {label: {task: metrics}}}."""
    fits = {
        "summary": [task for task in tasks if task != "dense"],
        "patches": ["dense"] * ("dense" in tasks),
    }
    labels = {label: kind for label, kind in LABELS.items() if label in train[0] and fits[kind]}
    kinds, x, rows = (
        {*labels.values()},
        {},
        [],
    )  # x: {(model, kind) or label: {split: features or labels}}
    for split, tiles in {"train": train, "test": test}.items() if labels else ():
        seen = []
        for batch in data.batches(
            tiles, range(len(tiles)), 64, WORKERS, label=f"embedding {split}"
        ):
            z = {
                (k, kind): embed(models[k][0], batch["image"], kind=kind)
                for k in models
                for kind in kinds
            }
            seen.append(z | {label: batch[label] for label in labels})
        x = {
            key: x.get(key, {}) | {split: torch.cat([part[key] for part in seen])}
            for key in seen[0]
        }
    for name, (model, dims) in models.items():
        parameters = round(1e6 * millions(model.backbone if isinstance(model, Student) else model))
        for m in dims:
            scores = {label: {} for label in labels}
            for label, task in (
                (label, task) for label, kind in labels.items() for task in fits[kind]
            ):
                z, y = x[name, labels[label]], x[label]
                z, dim = (
                    (z, {"dim": m}) if task == "adaptive" else (truncate(z, m), {})
                )  # adaptive takes it whole
                scores[label][task] = TASKS[task](
                    z["train"], y["train"], z["test"], y["test"], **dim
                )
            n = {split: len(y) for label in labels for split, y in x[label].items()}
            rows.append(
                {"model": name, "parameters": parameters, "dim": m, "n": n, "scores": scores}
            )
    return rows


def table(
    rows: list[dict], label: str
) -> str:  # aligned text, in per cent: a line for each model and dim
    scores, width = rows[0]["scores"][label], max(34, *(len(row["model"]) for row in rows)) + 2
    tasks = "".join(f"{task:>10}".ljust(10 * len(scores[task])) for task in scores)
    metrics = "".join(
        f"{metric.removesuffix('_accuracy'):>10}" for task in scores for metric in scores[task]
    )
    head = (
        f"{label}, %, {rows[0]['n']['train']} tiles to learn from, {rows[0]['n']['test']} to test"
    )
    lines = [f"{head:{width + 16}}{tasks}", f"{'model':{width}}parameters   dim{metrics}"]
    for row in rows:
        values = "".join(
            f"{100 * value:>10.1f}"
            for task in row["scores"][label].values()
            for value in task.values()
        )
        lines.append(
            f"{row['model']:{width}}{row['parameters'] / 1e6:>8.3f} M{row['dim']:>6}{values}"
        )
    return "\n".join(lines)


def report(
    models: dict, runs: list[Path], root: str | None, seed: int, tasks=tuple(TASKS)
) -> list[dict]:
    """Evaluate on a labelled folder or on synthetic tissue; print; add to each run's results.json; draw its figures."""
    title, name = (
        root or "synthetic tissue",
        re.sub(r"\W+", "-", root or "synthetic tissue").strip("-") or "data",
    )
    folders, rows, unreadable = {run if run.is_dir() else run.parent for run in runs}, [], set()
    splits, some = data.labelled_files(root).values() if root else ("bank", "test"), range(N_TILES)
    sizes = {
        k: m.backbone.img_size if isinstance(m, Student) else m.card_size
        for k, (m, _) in models.items()
    }
    for size in dict.fromkeys(sizes.values()):  # each model sees tiles of its own size
        group = {key: models[key] for key in models if sizes[key] == size}
        tiles = [
            CentreTiles(root, size, *x) if root else Subset(data.TissueTiles(x, seed, size), some)
            for x in splits
        ]
        rows += evaluate(group, *tiles, tasks)
        unreadable |= {path for split in tiles for path in getattr(split, "unreadable", [])}
        for folder in folders:
            draw_patches(group, tiles[1], folder / f"patches-{name}-{size}px.png")
    if not rows[0]["scores"]:
        raise InputError(
            f"--tasks: {root} holds {'classes, no masks' if 'dense' in tasks else 'masks, no classes'}"
        )
    print("\n" + (tables := "\n\n".join(table(rows, label) for label in rows[0]["scores"])))
    result = {
        "protocol": {
            task: TASKS[task].__doc__ for scores in rows[0]["scores"].values() for task in scores
        }
    }
    result["tiles"] = (
        "shorter side to the model's size, centre crop" if root else "drawn at the model's size"
    )
    result |= {
        "seed": seed,
        "unreadable": sorted(unreadable),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    for file in (folder / "results.json" for folder in folders):
        with FileLock(f"{file}.lock"):  # another evaluation adds its rows before or after
            try:
                earlier = json.loads(file.read_text()) if file.exists() else {}
                results = json.dumps({**earlier, title: result | {"rows": rows}}, indent=1).encode()
            except (TypeError, ValueError) as error:
                raise InputError(f"{file} cannot be read: {error}; move it") from None
            save_atomically(results, file)
            if (card := file.with_name("model_card.md")).exists():  # a section a title, the newest
                top, *others = card.read_bytes().split(heading := b"\n## Evaluation on ")
                section = f"{repr(title)[1:-1]}\n```text\n{tables}\n```\n".encode(
                    errors="backslashreplace"
                )
                others = [x for x in others if x.split(b"\n")[0] != section.split(b"\n")[0]]
                save_atomically(heading.join([top, *others, section]), card)
        print(
            f"{title}: {file}, pictures beside it{', instead of its earlier rows' if title in earlier else ''}"
        )
        draw_curves(rows, file.with_name("log.jsonl"), file.with_name(f"curves-{name}.png"))
    return rows


def draw_curves(rows: list[dict], log: Path, file: Path) -> None:
    """A panel a label, its first metric against the dims; then the run's loss and cosines, from its log.jsonl."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no curves are drawn without matplotlib: pip install matplotlib")
    panels = defaultdict(lambda: defaultdict(dict))  # {title: {line: {x: y}}}
    for row, (label, tasks) in ((r, item) for r in rows for item in r["scores"].items()):
        task, metric = next((task, metric) for task in tasks for metric in tasks[task])
        panels[f"{label}: {task} {metric}, %"][row["model"]][row["dim"]] = 100 * tasks[task][metric]
    lines = log.read_text().splitlines() if log.exists() else []
    for line in (
        json.loads(line) for line in lines if line.endswith("}}")
    ):  # a power cut can leave half a line
        panels["training loss"]["loss"][line["step"]] = line["loss"]
        for term, dim in (
            (term, dim) for term, values in line["terms"].items() for dim in values if "cos" in term
        ):
            panels["cosine to the teacher"][f"{term}, {dim} channels"][line["step"]] = line[
                "terms"
            ][term][dim]
    figure, dims = (
        Figure(figsize=(5 * len(panels), 4), layout="constrained"),
        sorted({row["dim"] for row in rows}),
    )
    scale = {"xlabel": "channels", "xscale": "symlog", "xticks": dims, "xticklabels": dims}
    for axes, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
        for label, points in lines.items():  # a teacher is not cut: a level line
            xs, style = (list(points), ".-") if len(points) > 1 else ([dims[0], dims[-1]], "--")
            axes.plot(xs, [*points.values()] * (len(xs) // len(points)), style, label=label)
        axes.set(title=title, **(scale if "%" in title else {"xlabel": "step"}))
        axes.legend(fontsize="small")
    save_atomically(figure, file, lambda figure, out: figure.savefig(out))


def draw_patches(
    models: dict, tiles: Dataset, file: Path
) -> None:  # a row a tile: it, then its tokens' PCA as RGB
    images = torch.stack([tiles[k]["image"] for k in range(min(4, len(tiles)))])
    views = {"tile": images / 255}
    for name, (model, _) in models.items():
        z = embed(model, images, kind="patches")  # (4, N, D)
        rgb = (z - z.mean((0, 1))) @ torch.linalg.eigh(z.flatten(0, 1).T.cov())[1][
            :, -3:
        ]  # (4, N, 3)
        low, top = rgb.flatten(0, 1).quantile(torch.tensor([0.02, 0.98]), 0)
        views[name] = (
            ((rgb - low) / (top - low).clamp(1e-9))
            .clamp(0, 1)
            .mT.unflatten(2, (round(len(z[0]) ** 0.5), -1))
        )
    cells = torch.stack(
        [F.interpolate(column, (224, 224)) for column in views.values()], 1
    ).flatten(0, 1)
    sheet = TF.to_pil_image(utils.make_grid(cells, nrow=len(views), padding=4, pad_value=1))
    for i, name in enumerate(views):
        ImageDraw.Draw(sheet).text(
            (10 + 228 * i, 8), name, "black", stroke_width=2, stroke_fill="white"
        )
    save_atomically(sheet, file, lambda sheet, out: sheet.save(out, "png"))


def main() -> None:  # the command line
    add = (parser := data.OneLineParser("evaluate.py", description=__doc__)).add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run folder or a student.pt; several stand side by side",
    )
    add("--data", type=data.path, help=f"a folder of {data.LABELLED} (default: synthetic tissue)")
    add(
        "--tasks",
        type=data.name_list,
        default=[*TASKS],
        help=f"of {', '.join(TASKS)} (default: all that fit)",
    )
    add("--dims", type=data.dim_list, help="comma-separated (default: each run's nested dims)")
    add(
        "--teachers",
        type=data.name_list,
        help="beside the runs, '' for none (default: the last run's, where offline)",
    )
    add(
        "--embed",
        type=data.path,
        metavar="DIR",
        help="instead, write the embeddings of all tiles of a folder to --out",
    )
    add(
        "--dim",
        type=data.positive,
        help="channels to keep, with --embed (default: all) or in a student.pt at --out",
    )
    add("--half", action="store_true", help="with --embed: fp16 instead of fp32")
    add(
        "--out",
        type=data.path,
        metavar="FILE",
        help="with --embed: the .npz to write; with --dim alone: the .pt",
    )
    add("--seed", type=data.natural, default=0, help="of the synthetic tissue (default: 0)")
    add("--device", type=data.path, help="cuda, mps or cpu (default: the best at hand)")
    add(
        "--weights-dir",
        type=data.folder,
        default="weights",
        help="where teachers' weights are (default: weights)",
    )
    device, models = cli.choose_device((args := parser.parse_args()).device)[0], {}
    if not args.tasks or not {*args.tasks} <= TASKS.keys():
        raise InputError(f"--tasks: choose from {', '.join(TASKS)}")
    for run in args.runs:
        student, config = load_student(run, device)
        if (dim := max([args.dim or 0, *(args.dims or [])])) > (width := student.backbone.width):
            raise InputError(
                f"--dims, --dim: {dim} is above the width of {run}; give at most {width}"
            )
        models[repr(run)[1:-1]] = (student, args.dims or config["nested_dims"])
    if args.embed or args.out or args.dim:
        if len(args.runs) > 1 or not args.out or not (args.embed or args.dim):
            raise InputError(
                "--out: give one RUN and --embed DIR --out X.npz, or --dim M --out X.pt"
            )
        if Path(args.out).exists():
            raise InputError(f"--out: {args.out} exists; choose another name, or remove it")
        if args.embed:  # embeddings (n, dim), paths (n,) of the readable tiles, and what made them
            files, dim, paths = data.list_tiles(args.embed, "--embed"), args.dim or width, []
            tiles = CentreTiles(data.top_and_roots(args.embed)[0], student.backbone.img_size, files)
            embeddings = np.empty((len(tiles), dim), np.float16 if args.half else np.float32)
            for batch in data.batches(
                tiles, range(len(tiles)), 64, WORKERS, label=f"embedding {args.embed}"
            ):
                features = truncate({"summary": embed(student, batch["image"])}, dim)["summary"]
                embeddings[len(paths) : len(paths) + len(features)] = features
                paths += [tiles.files[i] for i in batch["index"]]
            licences = [
                f"{name}: {text}"
                for name, text in (config.get("licences") or config["teachers"]).items()
            ]
            content = {
                "embeddings": embeddings[: len(paths)],
                "paths": paths,
                "dim": dim,
                "licences": licences,
            }
            content |= {"model": config["student"], "step": config["step"]}
            save_atomically(content, args.out, lambda content, file: np.savez(file, **content))
            return print(
                f"{len(paths)} embeddings of {dim} channels in {args.out}; licences: {'; '.join(licences)}"
            )
        state = (
            student.backbone.state_dict()
        )  # where the last norm is zero the ViT gives zeros, in timm too
        state["norm.weight"][args.dim :], state["norm.bias"][args.dim :] = 0, 0
        config["nested_dims"] = [m for m in config["nested_dims"] if m < args.dim] + [args.dim]
        save_atomically({"state_dict": state, "config": config}, args.out)
        return print(f"{args.out}: the student cut to {args.dim} channels; the others are zero")
    for name in (
        [x for x in config["teachers"] if x in cli.OFFLINE]
        if args.teachers is None
        else args.teachers
    ):
        teacher = cli.load_teacher(name, args.weights_dir, device, **config["teacher_recipe"])
        models[f"teacher {name}"] = (teacher, [teacher.embed_dim])
    report(models, [Path(run) for run in args.runs], args.data, args.seed, args.tasks)


if __name__ == "__main__":
    data.run_program(main)
