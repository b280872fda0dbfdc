"""Tasks against brute force and scikit-learn, dense probe and command line end to end, exported files against timm."""

import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import oracle, randomise, write_tiles
from PIL import Image

import data
import evaluate
import teachers
from data import InputError
from student import STUDENTS, Student, load_student


# ---- nearest neighbours: one query, one neighbour at a time --------------------------------------------------------
def ranked(bank, query):
    """Cosine similarities and places in the bank, nearest first; the earlier place first where they are equal."""
    similarity = [
        sum(a * b for a, b in zip(query, x)) / (math.hypot(*query) * math.hypot(*x)) for x in bank
    ]
    return sorted(zip(similarity, range(len(bank))), key=lambda pair: -pair[0])


def neighbours(problem, dim=None):
    """For each query its label and the (similarity, label) of the whole bank, nearest first."""
    train_x, train_y, test_x, test_y = (part.tolist() for part in problem)
    for query, truth in zip(test_x, test_y):
        yield truth, [(s, train_y[i]) for s, i in ranked([x[:dim] for x in train_x], query[:dim])]


def plain_knn(problem, k):
    hits, by_class = [], {}
    for truth, near in neighbours(problem):
        votes = {}
        for similarity, label in near[:k]:
            votes[label] = votes.get(label, 0) + math.exp(similarity / 0.07)
        hits.append(max(votes, key=votes.get) == truth)
        by_class.setdefault(truth, []).append(hits[-1])
    recalls = [sum(h) / len(h) for h in by_class.values()]
    return {"accuracy": sum(hits) / len(hits), "balanced_accuracy": sum(recalls) / len(recalls)}


def plain_retrieval(problem):
    hits = {"Acc@1": [], "Acc@3": [], "Acc@5": [], "mMV@5": []}
    for truth, near in neighbours(problem):
        five = [label for _, label in near[:5]]
        for n in (1, 3, 5):
            hits[f"Acc@{n}"].append(truth in five[:n])
        most = max(five.count(label) for label in five)
        hits["mMV@5"].append(next(label for label in five if five.count(label) == most) == truth)
    return {name: sum(values) / len(values) for name, values in hits.items()}


def clusters(bank=60, queries=37, dim=6, labels=(0, 1, 2, 3), seed=0, spread=1.0):
    """Overlapping clusters: neither chance nor perfection hides a wrong vote -> train_x, train_y, test_x, test_y."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor(labels)
    centres, problem = torch.randn(len(labels), dim, generator=generator), []
    for n in (bank, queries):
        y = torch.randint(len(labels), (n,), generator=generator)
        problem += [centres[y] + spread * torch.randn(n, dim, generator=generator), numbers[y]]
    return problem


PROBLEMS = {
    "plain": {"spread": 1.5},
    "more queries than a chunk": {"bank": 30, "queries": 1500},
    "a bank below k": {"bank": 12},
    "a bank below five": {"bank": 3},
    "a bank of one": {"bank": 1},
    "one query": {"queries": 1},
    "one class": {"labels": (0,)},
    "empty classes": {"labels": (0, 2, 5), "spread": 1.8},
    "dim 7": {"dim": 7},
    "two channels": {"dim": 2},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_knn_and_retrieval_equal_brute_force(name):
    problem = clusters(**PROBLEMS[name], seed=len(name))
    for k in (1, 5, 20, 1000):
        assert evaluate.knn(*problem, k=k) == pytest.approx(plain_knn(problem, k)), k
    assert evaluate.knn(*problem) == evaluate.knn(*problem, k=20)  # the default
    expected = plain_retrieval(problem)
    assert evaluate.retrieval(*problem) == pytest.approx(expected)
    if name in (
        "plain",
        "more queries than a chunk",
        "empty classes",
        "dim 7",
    ):  # a wrong vote would show
        assert 0.2 < expected["Acc@1"] < expected["Acc@5"] and 0.2 < expected["mMV@5"] < 1


def test_one_channel_knows_nothing_but_the_sign():
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 1]).repeat(20)
    x = (torch.rand(40, 1, generator=generator) + 0.1) * (
        1 - 2 * y[:, None]
    )  # class 0 above, class 1 below zero
    problem = (
        x,
        y,
        7 * x[:9],
        torch.cat([y[:6], 1 - y[6:9]]),
    )  # three queries whose label is the other one
    for k in (5, 20, 1000):
        assert evaluate.knn(*problem, k=k)["accuracy"] == pytest.approx(6 / 9)
    assert evaluate.retrieval(*problem) == pytest.approx(
        dict.fromkeys(("Acc@1", "Acc@3", "Acc@5", "mMV@5"), 6 / 9)
    )


def test_a_query_of_zeros_is_no_nan():
    problem = clusters(queries=4)
    problem[2][0] = 0
    for metrics in (
        evaluate.knn(*problem),
        evaluate.retrieval(*problem),
        evaluate.adaptive_retrieval(*problem, 2),
    ):
        assert all(0 <= value <= 1 for metric, value in metrics.items() if metric != "work")


def test_a_near_neighbour_outvotes_two_that_are_farther():
    near, far = [1.0, 0.0], [math.cos(math.pi / 6), math.sin(math.pi / 6)]
    bank, query = torch.tensor([far, near, far]), torch.tensor([[2.0, 0.0]])
    labels = torch.tensor([1, 0, 1])
    assert (
        evaluate.knn(bank, labels, query, torch.tensor([0]), k=3)["accuracy"] == 1
    )  # e^(1 / 0.07) > 2 e^(0.866 / 0.07)
    farther = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, 0.1]])
    assert (
        evaluate.knn(farther, labels, query, torch.tensor([1]), k=3)["accuracy"] == 1
    )  # nearly as near: two win


def test_duplicated_tiles_are_neighbours_of_their_own():
    train_x, train_y, test_x, test_y = clusters(bank=30)
    problem = (train_x.repeat(2, 1), train_y.repeat(2), test_x, test_y)
    for k in (1, 2, 5, 20):
        assert evaluate.knn(*problem, k=k) == pytest.approx(plain_knn(problem, k))
    expected = plain_retrieval(problem)
    assert evaluate.retrieval(*problem) == pytest.approx(expected)
    assert expected != pytest.approx(plain_retrieval((train_x, train_y, test_x, test_y)))
    same = (
        torch.ones(9, 4),
        torch.full((9,), 3),
        torch.ones(2, 4),
        torch.tensor([3, 0]),
    )  # one tile, nine times
    assert evaluate.knn(*same) == {"accuracy": 0.5, "balanced_accuracy": 0.5}
    assert evaluate.retrieval(*same)["mMV@5"] == 0.5


@pytest.mark.parametrize(
    ("labels", "majority"),
    [
        ([0, 1, 1, 0, 2], 0),  # two against two: the nearest decides
        ([2, 1, 1, 0, 0], 1),  # of those that tie, not of all five
        ([2, 0, 1, 1, 0], 0),
        ([2, 1, 0, 0, 1], 1),
        ([4, 3, 2, 1, 0], 4),
        ([0, 1, 1, 1, 0], 1),
        ([0, 5, 0, 5, 5], 5),
        ([1, 0, 0, 1], 1),  # a bank of four
        ([0, 1, 1], 1),
        ([1, 0], 1),
        ([0, 0, 0, 1, 1, 1, 1, 1], 0),  # only five are asked
    ],
)
def test_majority_of_five_with_ties_to_the_nearest(labels, majority):
    angles = torch.arange(1, len(labels) + 1) * 0.1  # from the query, growing
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    bank = torch.stack([angles.cos(), angles.sin()], 1)[order]
    for label in range(6):
        metrics = evaluate.retrieval(
            bank, torch.tensor(labels)[order], torch.tensor([[1.0, 0.0]]), torch.tensor([label])
        )
        assert metrics["mMV@5"] == (label == majority)
        assert metrics == {f"Acc@{n}": float(label in labels[:n]) for n in (1, 3, 5)} | {
            "mMV@5": label == majority
        }


def test_knn_over_more_queries_than_a_chunk_finds_itself():
    x = torch.randn(2500, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(2500) % 7
    assert evaluate.knn(x, y, x, y, k=1) == {"accuracy": 1.0, "balanced_accuracy": 1.0}
    assert evaluate.retrieval(x, y, x, y)["Acc@1"] == 1


@pytest.mark.parametrize("dim", [1, 2, 7, 12])
def test_adaptive_retrieval_with_the_whole_bank_is_a_full_search(dim):
    problem = clusters(bank=150, queries=90, dim=12, spread=2)
    full = evaluate.retrieval(*problem)["Acc@1"]
    assert 0.2 < full < 0.9
    for shortlist in (
        {},
        {"shortlist": 150},
        {"shortlist": 1000},
    ):  # 200 when not given: above the bank
        assert evaluate.adaptive_retrieval(*problem, dim, **shortlist)["Acc@1"] == pytest.approx(
            full
        )


@pytest.mark.parametrize(("dim", "shortlist"), [(2, 1), (2, 5), (3, 20), (7, 3), (12, 1)])
def test_adaptive_retrieval_equals_plain_loops(dim, shortlist):
    problem = clusters(bank=80, queries=150, dim=12, labels=(0, 2, 5), spread=1.5)
    train_x, train_y, test_x, test_y = (part.tolist() for part in problem)
    hits = []
    for query, truth in zip(test_x, test_y):
        chosen = [i for _, i in ranked([x[:dim] for x in train_x], query[:dim])[:shortlist]]
        best = ranked([train_x[i] for i in chosen], query)[0][1]
        hits.append(train_y[chosen[best]] == truth)
    got = evaluate.adaptive_retrieval(*problem, dim, shortlist=shortlist)
    assert got["Acc@1"] == pytest.approx(sum(hits) / len(hits))
    if (
        dim < 12
    ):  # the shortlist is too short to reach a full search, so the test can tell them apart
        assert abs(got["Acc@1"] - evaluate.retrieval(*problem)["Acc@1"]) > 0.003


def test_the_work_of_adaptive_retrieval_by_hand():
    """A full search: 100 x 16 multiply-adds a query. Here 100 x 4 for the shortlist, 10 x 16 to re-rank it."""
    problem = clusters(bank=100, queries=3, dim=16)
    assert evaluate.adaptive_retrieval(*problem, 4, shortlist=10)["work"] == pytest.approx(
        (400 + 160) / 1600
    )
    assert evaluate.adaptive_retrieval(*problem, 1, shortlist=10)["work"] == pytest.approx(
        (100 + 160) / 1600
    )
    assert evaluate.adaptive_retrieval(*problem, 4, shortlist=500)["work"] == pytest.approx(
        (400 + 1600) / 1600
    )
    assert (
        evaluate.adaptive_retrieval(*problem, 16, shortlist=10)["work"] == 1
    )  # nothing to re-rank: one full search


# ---- linear probe: scikit-learn with the same objective ------------------------------------------------------------
FITS = {
    "three classes": {"bank": 300, "dim": 20, "labels": (0, 1, 2), "spread": 1.6},
    "two classes": {"bank": 200, "dim": 7, "labels": (0, 1), "spread": 1.6},
    "separable": {"bank": 120, "dim": 12, "spread": 0.1},
    "two, separable": {"bank": 60, "dim": 7, "labels": (3, 4), "spread": 0.1},
    "badly scaled": {"bank": 300, "dim": 11, "labels": (0, 1, 2), "spread": 1.6},
    "badly scaled, two": {"bank": 300, "dim": 11, "labels": (0, 1), "spread": 1.6},
    "empty classes": {"bank": 150, "dim": 7, "labels": (0, 2, 5), "spread": 1.6},
    "fewer tiles than channels": {"bank": 20, "dim": 50, "labels": (0, 1, 2), "spread": 4},
    "many classes": {"bank": 250, "dim": 7, "labels": tuple(range(12)), "spread": 0.7},
    "far from the origin": {"bank": 150, "dim": 9, "labels": (0, 1, 2), "spread": 1.6},
}


@pytest.mark.parametrize("name", FITS)
def test_linear_probe_is_scikit_learns(name):
    linear_model = oracle("sklearn.linear_model")
    train_x, train_y, test_x, test_y = clusters(**FITS[name], queries=200, seed=len(name))
    if "badly" in name:  # columns of scale 1e-2 to 1e3
        scales = torch.logspace(-2, 3, train_x.shape[1])
        train_x, test_x = train_x * scales, test_x * scales
    if "far" in name:
        train_x, test_x = train_x + 50, test_x + 50
    M, K = train_x.shape[1], len(FITS[name].get("labels", (0, 1, 2, 3)))
    C = (
        M * K / 100 * (2 if K == 2 else 1)
    )  # scikit-learn fits one vector to two classes, which ours halve
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an oracle that has not converged is none
        theirs = linear_model.LogisticRegression(
            C=C, solver="newton-cg", tol=1e-10, max_iter=10_000
        )
        theirs.fit(train_x.double().numpy(), train_y.numpy())
    W, bias, classes = evaluate.fit_linear(train_x, train_y)
    assert classes.tolist() == theirs.classes_.tolist() == sorted(set(train_y.tolist()))
    rows, intercepts = theirs.coef_, theirs.intercept_
    if K == 2:
        rows, intercepts = (
            np.concatenate([-rows, rows]) / 2,
            np.concatenate([-intercepts, intercepts]) / 2,
        )
    W, bias = W.double().numpy(), bias.double().numpy()
    W, rows = (
        W - W.mean(0),
        rows - rows.mean(0),
    )  # the same shift for all classes changes no prediction
    scale = np.abs(rows).max(0)  # of each channel, so that a badly scaled one counts as much
    assert (np.abs(W - rows) / scale.clip(1e-3 * scale.max())).max() < 2e-3
    logits = (
        test_x.double().numpy() @ (W - rows).T
        + (bias - bias.mean())
        - (intercepts - intercepts.mean())
    )
    assert np.abs(logits).max() < 1e-2 * max(
        1, np.abs(theirs.decision_function(test_x.double().numpy())).max()
    )
    assert np.abs((bias - bias.mean()) - (intercepts - intercepts.mean())).max() < 2e-3 * (
        1 + np.abs(intercepts).max()
    )
    predicted = theirs.predict(test_x.double().numpy())
    got, truth = evaluate.linear_probe(train_x, train_y, test_x, test_y), test_y.numpy()
    recalls = [(predicted[truth == label] == label).mean() for label in np.unique(truth)]
    expected = {"accuracy": (predicted == truth).mean(), "balanced_accuracy": np.mean(recalls)}
    assert got == pytest.approx(expected, abs=1e-12)
    if "separable" not in name:
        assert 1 / K < expected["accuracy"] < 1


def test_the_linear_probe_stands_at_the_minimum_of_its_objective():
    """Without scikit-learn: the gradient of sum CE + lambda / 2 ||W||^2, lambda = 100 / (M K), is zero, bias free."""
    x, y, _, _ = clusters(bank=90, dim=7, labels=(0, 1, 2), spread=1.6)
    W, bias, _ = evaluate.fit_linear(x, y)
    x = x.double().numpy()
    logits = x @ W.numpy().T + bias.numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    residual = p / p.sum(1, keepdims=True) - np.eye(3)[y.numpy()]  # (n, K)
    assert np.abs(residual.sum(0)).max() < 1e-4
    assert (
        np.abs(residual.T @ x + 100 / (7 * 3) * W.numpy()).max()
        < 1e-4 * np.abs(residual.T @ x).max()
    )


def test_linear_probe_on_one_class_and_on_a_class_that_only_the_test_set_has():
    train_x, train_y, test_x, test_y = clusters(labels=(4,))
    metrics = evaluate.linear_probe(train_x, train_y, test_x, test_y)
    assert metrics == {"accuracy": 1.0, "balanced_accuracy": 1.0}
    test_y[:10] = 1  # never seen in training, so never predicted
    metrics = evaluate.linear_probe(train_x, train_y, test_x, test_y)
    assert metrics == pytest.approx({"accuracy": 27 / 37, "balanced_accuracy": 0.5})


def test_linear_probe_with_constant_and_repeated_channels():
    x, y, test_x, test_y = clusters(bank=100, dim=5, labels=(0, 1, 2), spread=1.6)
    plain = evaluate.linear_probe(x, y, test_x, test_y)
    W, bias, _ = evaluate.fit_linear(
        torch.cat([x, x, torch.full((100, 1), 3.0), torch.zeros(100, 1)], 1), y
    )
    assert W.isfinite().all() and bias.isfinite().all() and W[:, 10:].abs().max() < 1e-6
    torch.testing.assert_close(W[:, :5], W[:, 5:10], atol=1e-5, rtol=1e-4)
    assert 1 / 3 < plain["accuracy"] < 1


# ---- dense probe ---------------------------------------------------------------------------------------------------
def test_overlap_of_hand_computed_confusions():
    assert evaluate.overlap(torch.tensor([[3, 1], [2, 4]])) == pytest.approx(
        {"mIoU": (3 / 6 + 4 / 7) / 2, "Dice": (6 / 9 + 8 / 11) / 2}
    )
    absent = torch.tensor(
        [[3, 0, 1], [0, 0, 0], [2, 0, 4]]
    )  # class 1 in neither: it does not count
    assert evaluate.overlap(absent) == evaluate.overlap(torch.tensor([[3, 1], [2, 4]]))
    surplus = torch.tensor(
        [[3, 0, 1], [0, 2, 0], [0, 0, 0]]
    )  # class 2 is predicted, but nowhere true: it counts 0
    assert evaluate.overlap(surplus) == pytest.approx(
        {"mIoU": (3 / 4 + 1 + 0) / 3, "Dice": (6 / 7 + 1 + 0) / 3}
    )
    missed = torch.tensor([[3, 0, 0], [0, 2, 0], [1, 0, 0]])  # class 2 is true, but never predicted
    assert evaluate.overlap(missed) == pytest.approx(
        {"mIoU": (3 / 4 + 1 + 0) / 3, "Dice": (6 / 7 + 1 + 0) / 3}
    )
    assert evaluate.overlap(torch.diag(torch.tensor([5, 0, 10**9]))) == {"mIoU": 1.0, "Dice": 1.0}
    assert evaluate.overlap(torch.tensor([[0, 4], [6, 0]])) == {"mIoU": 0.0, "Dice": 0.0}


def test_overlap_equals_sets_of_pixels():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, 500), rng.integers(0, 5, 500)
    confusion = torch.zeros(6, 6, dtype=torch.long)
    for t, p in zip(truth, predicted):
        confusion[t, p] += 1
    ious, dices = [], []
    for label in range(5):
        a, b = set(np.flatnonzero(truth == label)), set(np.flatnonzero(predicted == label))
        ious.append(len(a & b) / len(a | b))
        dices.append(2 * len(a & b) / (len(a) + len(b)))
    assert evaluate.overlap(confusion) == pytest.approx(
        {"mIoU": np.mean(ious), "Dice": np.mean(dices)}
    )


def write_quadrants(root, n, size, values=(0, 1), related=True, suffix="png"):
    """Tiles whose four quadrants are light or dark, with noise, and masks that say which (or something else)."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    width, height = size
    y, x = np.mgrid[:height, :width]
    quadrant = (y >= height / 2) * 2 + (x >= width / 2)
    for i in range(n):
        rng = np.random.default_rng((i, n))
        light, other = rng.integers(0, 2, (2, 4))
        pixels = 60 + 130 * light[quadrant][..., None] + rng.integers(-30, 30, (height, width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{i:02d}.{suffix}")
        mask = np.array(values, np.uint8)[(light if related else other)[quadrant]]
        Image.fromarray(mask).save(root / "masks" / f"{i:02d}.png")


def bright_patches(arch=None):
    """A student that was never trained: light and dark patches differ in its tokens anyway."""
    torch.manual_seed(0)
    return Student(arch or "toy", {}, [4]).eval()


@pytest.mark.parametrize(
    ("size", "values"),
    [((64, 64), (0, 1)), ((128, 128), (0, 255)), ((150, 120), (2, 5)), ((40, 52), (7, 1))],
)
def test_dense_probe_finds_what_the_patches_hold(tmp_path, size, values):
    write_quadrants(tmp_path / "train", 24, size, values)
    write_quadrants(tmp_path / "test", 10, size, values)
    models = {"student": (bright_patches(), [2, 7, 48])}
    rows = evaluate.report(models, [tmp_path], str(tmp_path), 0, ["dense"])
    assert [row["dim"] for row in rows] == [2, 7, 48]
    for row in rows:
        [(_, scores)] = row["scores"].items()
        assert scores["dense"]["mIoU"] > 0.9 and scores["dense"]["Dice"] > 0.94


def test_dense_probe_finds_nothing_where_nothing_is(tmp_path):
    write_quadrants(tmp_path / "train", 24, (64, 64), related=False)
    write_quadrants(tmp_path / "test", 10, (64, 64), related=False)
    [row] = evaluate.report(
        {"student": (bright_patches(), [48])}, [tmp_path], str(tmp_path), 0, ["dense"]
    )
    [(_, scores)] = row["scores"].items()
    assert scores["dense"]["mIoU"] < 0.6


def test_dense_probe_equals_scikit_learn_pillow_and_numpy(tmp_path):
    """By other means: tiles read by Pillow, tokens fitted by scikit-learn, pixels counted class by class."""
    linear_model = oracle("sklearn.linear_model")
    write_quadrants(tmp_path, 20, (90, 70), values=(0, 3))  # the last fifth is for testing
    for i, path in enumerate(
        sorted((tmp_path / "masks").iterdir())
    ):  # a third class that no pixel shows
        mask = np.array(Image.open(path))
        mask[20:40, 10 + i : 40 + i] = 9
        Image.fromarray(mask).save(path)
    student, dim = bright_patches(), 7
    tokens, masks = [], []
    for i in range(20):
        image, mask = (
            Image.open(tmp_path / folder / f"{i:02d}.png") for folder in ("images", "masks")
        )
        image = image.resize((82, 64), Image.Resampling.BICUBIC).crop((9, 0, 73, 64))
        masks.append(np.array(mask.resize((82, 64), Image.Resampling.NEAREST).crop((9, 0, 73, 64))))
        with torch.no_grad():
            tokens.append(
                student(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])["patches"][
                    0, :, :dim
                ]
            )
    tokens, masks = (
        torch.stack(tokens).double().numpy(),
        np.stack(masks),
    )  # (20, 64, dim), (20, 64, 64)
    x, y = (
        tokens[:16].reshape(-1, dim),
        masks[:16, 4::8, 4::8].reshape(-1),
    )  # a patch is what its centre is
    theirs = linear_model.LogisticRegression(
        C=dim * 3 / 100, solver="newton-cg", tol=1e-9, max_iter=10_000
    ).fit(x, y)
    logits = torch.from_numpy(
        np.stack([theirs.decision_function(z).T.reshape(3, 8, 8) for z in tokens[16:]])
    )
    logits = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear").numpy()
    predicted, truth = theirs.classes_[logits.argmax(1)], masks[16:]
    ious, dices = [], []
    for label in (0, 3, 9):
        a, b = truth == label, predicted == label
        ious.append((a & b).sum() / (a | b).sum())
        dices.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert 0.3 < np.mean(ious) < 0.97
    [row] = evaluate.report({"student": (student, [dim])}, [tmp_path], str(tmp_path), 0, ["dense"])
    [(_, scores)] = row["scores"].items()
    assert scores["dense"] == pytest.approx(
        {"mIoU": np.mean(ious), "Dice": np.mean(dices)}, abs=1e-3
    )


# ---- the command line ----------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    monkeypatch.setattr(evaluate, "N_TILES", 24)


def write_run(folder, nested=(4, 8), seed=0, teachers=(), **arch):
    """A run folder as train.py leaves it, of a student with random weights."""
    arch = STUDENTS["toy"] | arch
    student = randomise(Student(arch, {}, list(nested)), seed)
    with (
        torch.no_grad()
    ):  # the image outweighs what is the same for every image, so that neighbours are well apart
        for name, p in student.named_parameters():
            p *= 0.1 if name.endswith(("bias", "token", "pos_embed")) else 3 if p.ndim > 1 else 1
    config = {
        "arch": arch,
        "nested_dims": [*nested, arch["width"]],
        "teachers": list(teachers),
        "step": 1,
        "steps": 2,
    }
    config |= {
        "student": "toy",
        "licences": {"uni": "CC-BY-NC-ND-4.0; binds students: yes", "virchow": "Apache-2.0"},
    }
    config |= {"teacher_recipe": {"steps": 2, "seed": 0}}
    folder.mkdir(parents=True)
    torch.save(
        {"state_dict": student.backbone.state_dict(), "config": config}, folder / "student.pt"
    )
    return folder


def write_log(folder):
    with open(folder / "log.jsonl", "w") as file:
        for step in (1, 2, 3):
            terms = {
                "uni/summary_cos": {"48": 0.5 / step, "4": 0.6 / step},
                "uni/patches_l1": {"48": 1, "4": 2},
            }
            line = {"step": step, "loss": 9 / step, "lr": 1e-3, "tiles_per_s": 7, "terms": terms}
            file.write(json.dumps(line) + "\n")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture
def cli(monkeypatch, weights_dir):
    """evaluate.py as from the shell -> None; a RUN and flags of any type."""

    def cli(*argv):
        flags = [*map(str, argv), "--device", "cpu", "--weights-dir", str(weights_dir)]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
        evaluate.main()

    return cli


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one line with which evaluate.py ends, exit code 2."""

    def refused(*argv):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
        with pytest.raises(SystemExit) as stop:
            teachers.run_main(evaluate.main)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return refused


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    """A labelled folder of synthetic tissue, the class being the tissue; enough that kNN is neither 0 nor 1."""
    root = tmp_path_factory.mktemp("tissue")
    for split, stream, n in (("train", "bank", 90), ("test", "test", 60)):
        for k in range(n):
            image, _, tissue, _ = data.draw_tissue(stream, 0, k)
            (root / split / str(tissue)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / split / str(tissue) / f"{k:03d}.png")
    return root


def results(run):
    return json.loads((run / "results.json").read_text())


def test_command_line_on_a_labelled_folder(tmp_path, run, cli, capsys):
    root = tmp_path / "labelled"
    for split in ("train", "test"):
        for i, name in enumerate(("dark", "light")):
            for path in write_tiles(root / split / name, 12):
                Image.open(path).point(lambda v, i=i: v // 4 + 190 * i).save(path)
    cli(run, "--data", root)
    result = results(run)[str(root)]
    rows = result["rows"]
    assert [row["dim"] for row in rows] == [4, 8, 48] and {row["model"] for row in rows} == {
        str(run)
    }
    [(_, scores)] = rows[-1]["scores"].items()
    assert (
        scores["knn"] == scores["linear"] == {"accuracy": 1.0, "balanced_accuracy": 1.0}
    )  # dark against light
    assert scores["retrieval"] == dict.fromkeys(("Acc@1", "Acc@3", "Acc@5", "mMV@5"), 1.0)
    assert scores["adaptive"] == {"Acc@1": 1.0, "work": 1.0} and "dense" not in scores  # no masks
    count = sum(p.numel() for p in load_student(run)[0].backbone.parameters())
    assert all(row["parameters"] == count for row in rows)
    assert "100.0" in capsys.readouterr().out


def test_results_hold_protocol_counts_seed_and_versions(tmp_path, run, cli, tissue):
    cli(run, "--data", tissue, "--tasks", "knn,linear", "--seed", 5)
    result = results(run)[str(tissue)]
    assert set(result["protocol"]) == {"knn", "linear"} and all(result["protocol"].values())
    assert "k = 20" in result["protocol"]["knn"] and "0.07" in result["protocol"]["knn"]
    assert all(row["n"] == {"train": 90, "test": 60} for row in result["rows"])
    assert result["seed"] == 5 and result["unreadable"] == []
    assert result["torch"] == torch.__version__ and "centre crop" in result["tiles"]


def test_every_task_on_synthetic_tissue_and_the_figures(run, cli):
    write_log(run)
    cli(run)
    result = results(run)["synthetic tissue"]
    for row in result["rows"]:
        assert row["n"] == {"train": 24, "test": 24}
        assert {label: set(scores) for label, scores in row["scores"].items()} == {
            "cells": {"knn", "linear", "retrieval", "adaptive"},
            "tissue": {"knn", "linear", "retrieval", "adaptive"},
            "nuclei": {"dense"},
        }
        for scores in row["scores"].values():
            for metrics in scores.values():
                assert all(0 <= v <= (2 if m == "work" else 1) for m, v in metrics.items())
    oracle("matplotlib")
    figures = sorted(path.name for path in run.glob("*.png"))
    assert figures == ["curves-synthetic-tissue.png", "patches-synthetic-tissue-64px.png"]
    for name in figures:
        with Image.open(run / name) as figure:
            assert figure.format == "PNG" and min(figure.size) > 200
            assert len(np.unique(np.array(figure.convert("L")))) > 8  # something is drawn


@pytest.mark.parametrize("task", ["knn", "linear", "retrieval", "adaptive", "dense"])
def test_one_task_alone(run, cli, task):
    cli(run, "--tasks", task, "--dims", 7)
    [row] = results(run)["synthetic tissue"]["rows"]
    assert row["dim"] == 7
    labels = {"nuclei"} if task == "dense" else {"cells", "tissue"}
    assert {label: set(scores) for label, scores in row["scores"].items() if scores} == {
        key: {task} for key in labels
    }
    assert set(results(run)["synthetic tissue"]["protocol"]) == {task}


def test_seed_and_seed_alone_changes_synthetic_tissue(run, cli):
    scores = []
    for seed in (0, 0, 1):
        cli(run, "--tasks", "retrieval", "--dims", 48, "--seed", seed)
        scores.append(results(run)["synthetic tissue"]["rows"][0]["scores"])
    assert scores[0] == scores[1] != scores[2]


def test_wrong_flags_end_in_one_line(tmp_path, run, refused, tissue):
    write_quadrants(tmp_path / "masked", 5, (64, 64))
    out = tmp_path / "x.npz"
    (tmp_path / "exists.pt").write_bytes(b"mine")
    for flags, expected in (
        (
            ["--tasks", "knn,cluster"],
            "--tasks: choose from knn, linear, retrieval, adaptive, dense",
        ),
        (["--tasks", ""], "--tasks: choose from"),
        (["--tasks", "dense", "--data", tissue], "--tasks: .* masks"),
        (["--tasks", "knn,linear", "--data", tmp_path / "masked"], "--tasks: .* classes"),
        (["--dims", "7,49"], "--dims, --dim: 49 .* width .* 48"),
        (["--dims", "0"], "--dims"),
        (["--dim", 49, "--out", out], "--dims, --dim: 49 .* width .* 48"),
        (["--dim", 7], "--out"),
        (["--embed", tissue], "--out"),
        (["--out", out], "--out.* --embed"),
        ([run.parent / "run/student.pt", "--dim", 7, "--out", out], "one RUN"),
        (["--dim", 7, "--out", tmp_path / "exists.pt"], "--out: .*exists.pt exists"),
        (["--teachers", "unicorn"], "--teachers: no teacher is called 'unicorn'"),
        (["--teachers", "uni", "--weights-dir", tmp_path], "no weights for uni"),
        (["--data", tmp_path / "none"], "--data: .*none"),
        (["--data", ""], "--data"),
        (["--embed", tmp_path / "none", "--out", out], "--embed: .*none is no folder of images"),
        (["--seed", "-1"], "--seed"),
        (["--device", "tpu"], "--device: tpu"),
        (["--task", "knn"], "--task"),  # no abbreviations
    ):
        line = refused(run, *flags)
        assert line.startswith("evaluate.py: ") and re.search(expected, line), (flags, line)
    assert (tmp_path / "exists.pt").read_bytes() == b"mine" and not out.exists()
    assert not (run / "results.json").exists()


def test_runs_stand_side_by_side_as_they_stand_alone(tmp_path, run, cli, capsys, tissue):
    other = write_run(tmp_path / "other", nested=(16,), seed=1)
    alone = {}
    for folder in (run, other):
        cli(folder, "--data", tissue, "--tasks", "knn,retrieval")
        alone[folder] = results(folder)[str(tissue)]["rows"]
    assert alone[run][-1]["scores"] != alone[other][-1]["scores"]
    capsys.readouterr()
    cli(run, other / "student.pt", "--data", tissue, "--tasks", "knn,retrieval")
    rows = results(run)[str(tissue)]["rows"]
    assert rows == results(other)[str(tissue)]["rows"]  # the same in both folders
    assert [row["dim"] for row in rows] == [4, 8, 48, 16, 48]
    assert [row["scores"] for row in rows] == [row["scores"] for row in alone[run] + alone[other]]
    table = capsys.readouterr().out
    assert str(run) in table and str(other / "student.pt") in table


def test_the_model_card_keeps_one_section_a_title_the_newest(tmp_path, run, cli, tissue):
    other = tmp_path / "of ``` (.*)\n## Evaluation on tiles"
    other.symlink_to(tissue)
    cli(run, "--tasks", "knn")
    assert not (run / "model_card.md").exists()  # a run of before the cards gets none
    (run / "model_card.md").write_text("# Student\n\nwhat train.py wrote\n")
    cli(run, "--tasks", "knn")
    first = (run / "model_card.md").read_text()
    for root in (tissue, other, other):
        cli(run, "--tasks", "knn", "--data", root)
    cli(run, "--tasks", "retrieval")
    top, *sections = (run / "model_card.md").read_text().split("\n## Evaluation on ")
    assert top == "# Student\n\nwhat train.py wrote\n" == first.split("\n## ")[0]
    titles = [section.split("\n")[0] for section in sections]
    assert titles == [str(tissue), repr(str(other))[1:-1], "synthetic tissue"]
    assert "knn" in first and "retrieval" in sections[-1] and "knn" not in sections[-1]
    for section in sections:
        assert (
            section.count("```text\n") == 1 and section.endswith("\n```\n") and str(run) in section
        )


def test_students_of_two_sizes_stand_side_by_side(tmp_path, run, cli, tissue):
    small = write_run(tmp_path / "small", nested=(8,), img_size=32)
    alone = {}
    for folder in (run, small):
        cli(folder, "--data", tissue, "--tasks", "knn", "--dims", "8")
        alone[folder] = results(folder)[str(tissue)]["rows"]
    cli(run, small, "--data", tissue, "--tasks", "knn", "--dims", "8")
    assert [row["scores"] for row in results(run)[str(tissue)]["rows"]] == [
        row["scores"] for row in alone[run] + alone[small]
    ]
    cli(run, small, "--dims", "8")  # and with masks drawn at both sizes
    for row in results(run)["synthetic tissue"]["rows"]:
        assert row["scores"]["nuclei"]["dense"]["Dice"] > 0.3


def test_the_dense_probe_of_a_run_does_not_depend_on_what_stands_beside_it(
    tmp_path, run, cli, monkeypatch
):
    """Also where it is fitted on a part of the tokens, as on the default number of synthetic tiles."""
    monkeypatch.setattr(evaluate, "TOKENS", 300)  # of 24 x 64
    other = write_run(tmp_path / "other", seed=1)
    scores = []
    for runs in ([run], [run, other], [other, run]):
        cli(*runs, "--tasks", "dense", "--dims", 8)
        rows = results(run)["synthetic tissue"]["rows"]
        scores.append(next(row["scores"] for row in rows if row["model"] == str(run)))
    assert scores[0] == scores[1] == scores[2]


def test_offline_teachers_beside_a_run(tmp_path, cli):
    run = write_run(tmp_path / "taught", teachers=["toy_cells", "uni"])
    cli(run, "--tasks", "knn,dense", "--dims", "8")
    rows = results(run)["synthetic tissue"][
        "rows"
    ]  # the run's offline teachers by default, at their full width
    assert [(row["model"], row["dim"]) for row in rows] == [
        (str(run), 8),
        ("teacher toy_cells", 128),
    ]
    cli(run, "--tasks", "knn", "--dims", "8", "--teachers", "toy_tissue,toy_cells")
    models = [row["model"] for row in results(run)["synthetic tissue"]["rows"]]
    assert models == [str(run), "teacher toy_tissue", "teacher toy_cells"]
    cli(run, "--tasks", "knn", "--dims", "8", "--teachers", "")
    assert [row["model"] for row in results(run)["synthetic tissue"]["rows"]] == [str(run)]


def test_results_on_other_data_are_kept_and_damaged_ones_named(run, cli, tissue, refused):
    (run / "results.json").write_text('{"elsewhere": 1}')
    cli(run, "--tasks", "knn", "--seed", 3)
    cli(run / "student.pt", "--tasks", "knn", "--data", tissue)
    kept = results(run)
    assert set(kept) == {"elsewhere", "synthetic tissue", str(tissue)}
    assert kept["elsewhere"] == 1 and kept["synthetic tissue"]["seed"] == 3
    (run / "results.json").write_text("{")
    assert "results.json cannot be read" in refused(run, "--tasks", "knn", "--device", "cpu")
    assert (run / "results.json").read_text() == "{"


def test_unreadable_tiles_are_left_out_and_named(tmp_path, run, cli, capsys):
    root = tmp_path / "labelled"
    for split, n in (("train", 129), ("test", 70)):
        for name in ("a", "b"):
            write_tiles(root / split / name, n, (64, 64))
    # the last of the fixed order, so that it is alone in the last batch
    train, test = (data.labelled_files(str(root))[split] for split in ("train", "test"))
    assert len(train[0]) % 64 == 2  # 258 tiles, two of them: below one per cent
    for file in (train[0][-1], train[0][-2]):
        (root / file).write_bytes(b"broken")
    cli(run, "--data", root, "--tasks", "knn", "--dims", "8")
    err, result = capsys.readouterr().err, results(run)[str(root)]
    assert result["unreadable"] == sorted(str(root / file) for file in train[0][-2:])
    assert all(sum(file in line for line in err.splitlines()) == 1 for file in train[0][-2:])
    student, _ = load_student(run)  # the same numbers as from the readable tiles alone
    sides = []
    for files, targets in ((train[0][:-2], train[1]), test):
        images = [
            torch.from_numpy(np.array(Image.open(root / file))).permute(2, 0, 1) for file in files
        ]
        sides += [
            evaluate.embed(student, torch.stack(images))[:, :8],
            torch.tensor(targets["class"][: len(files)]),
        ]
    [row] = result["rows"]
    assert row["scores"]["class"]["knn"] == pytest.approx(evaluate.knn(*sides), abs=1e-3)


def test_a_mask_that_is_missing_is_left_out_of_the_dense_probe(tmp_path, run, cli, capsys):
    write_quadrants(tmp_path / "d" / "train", 130, (64, 64))
    write_quadrants(tmp_path / "d" / "test", 8, (64, 64))
    (tmp_path / "d" / "train" / "masks" / "17.png").unlink()
    cli(run, "--data", tmp_path / "d", "--tasks", "dense", "--dims", "48")
    result = results(run)[str(tmp_path / "d")]
    assert [Path(path).name for path in result["unreadable"]] == ["17.png"]
    assert "masks/17.png" in capsys.readouterr().err
    [row] = result["rows"]
    assert next(iter(row["scores"].values()))["dense"]["mIoU"] > 0.9


@pytest.mark.parametrize("missing", [True, False])
def test_without_matplotlib_one_line_says_so_and_all_else_runs(
    run, cli, capsys, monkeypatch, missing
):
    if missing:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    else:
        oracle("matplotlib")
    cli(run, "--tasks", "knn")
    printed = capsys.readouterr()
    lines = [
        line
        for line in (printed.out + printed.err).splitlines()
        if "pip install matplotlib" in line
    ]
    assert len(lines) == missing
    assert (
        results(run)["synthetic tissue"]["rows"]
        and (run / "patches-synthetic-tissue-64px.png").exists()
    )
    assert (run / "curves-synthetic-tissue.png").exists() != missing


def test_training_curves_stand_beside_the_scores_where_there_is_a_log(run, cli):
    oracle("matplotlib")
    widths = []
    for log in (False, True):
        if log:
            write_log(run)
        cli(run, "--tasks", "knn")
        with Image.open(run / "curves-synthetic-tissue.png") as figure:
            widths.append(figure.width)
    assert widths[1] == 2 * widths[0]  # two labels; and loss, cosines


def test_a_log_line_cut_off_by_a_power_cut_is_no_traceback(run, cli):
    write_log(run)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    try:
        cli(run, "--tasks", "knn")
    except InputError as error:  # left out of the curves, or named: either will do
        assert "log.jsonl" in str(error)
    assert results(run)["synthetic tissue"]["rows"]


def test_what_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(InputError, match="student.pt does not exist"):
        load_student(tmp_path)
    torch.save({"something": torch.zeros(1)}, tmp_path / "student.pt")
    with pytest.raises(InputError, match="not a student.pt"):
        load_student(tmp_path)
    content = torch.load(run / "student.pt", weights_only=True)
    content["state_dict"]["norm.weight"] = torch.zeros(7)
    torch.save(content, run / "student.pt")
    with pytest.raises(InputError, match=r"norm.weight is \(7,\), expected \(48,\)"):
        load_student(run)


# ---- files for other tools -----------------------------------------------------------------------------------------
def test_embed_batches_do_not_matter():
    student = randomise(Student("toy", {}, [8]))
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    whole, parts = evaluate.embed(student, images), evaluate.embed(student, images, batch_size=2)
    torch.testing.assert_close(whole, parts)
    with torch.no_grad():
        torch.testing.assert_close(whole, student(images)["summary"])


def timm_student(path):
    """The toy student's architecture as timm has it, weights from a file of ours."""
    arch = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 5,
        "num_heads": 3,
        "reg_tokens": 1,
    }
    model = oracle("timm").create_model(
        "vit_base_patch14_reg4_dinov2", num_classes=0, checkpoint_path=str(path), **arch
    )
    return model.eval()


def timm_features(model, folder):
    """Features of all tiles of a class folder by Pillow, timm and its own normalisation -> x, y."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    files = sorted(folder.rglob("*.png"))
    pixels = torch.stack(
        [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]
    )
    with torch.no_grad():
        return model((pixels / 255 - mean) / std), torch.tensor(
            [int(file.parent.name) for file in files]
        )


@pytest.mark.parametrize("dim", [7, 48])
def test_the_exported_student_loaded_by_timm_alone_gives_the_same_numbers(
    tmp_path, run, cli, capsys, tissue, dim
):
    cut = tmp_path / "cut.pt"
    cli(run, "--dim", dim, "--out", cut)
    assert str(cut) in capsys.readouterr().out
    model = timm_student(cut)
    problem = [*timm_features(model, tissue / "train"), *timm_features(model, tissue / "test")]
    assert problem[0].shape[1] == 48 and problem[0][:, :dim].abs().min(1)[0].max() > 0
    assert dim == 48 or problem[0][:, dim:].abs().max() == 0  # zeros, which change no cosine
    full = timm_features(timm_student(run / "student.pt"), tissue / "test")[0]
    torch.testing.assert_close(problem[2][:, :dim], full[:, :dim], atol=1e-5, rtol=1e-5)
    cli(run, "--data", tissue, "--dims", dim, "--tasks", "knn,retrieval")
    [row] = results(run)[str(tissue)]["rows"]
    [(_, scores)] = row["scores"].items()
    assert scores["knn"] == pytest.approx(plain_knn(problem, 20), abs=1e-9)
    assert scores["retrieval"] == pytest.approx(plain_retrieval(problem), abs=1e-9)
    assert 1.1 / 6 < scores["knn"]["accuracy"] < 0.95  # neither chance nor perfect
    cut_run = tmp_path / "cut" / "student.pt"  # a cut student is a RUN as any other
    cut_run.parent.mkdir()
    cut.rename(cut_run)
    cli(cut_run, "--data", tissue, "--dims", dim, "--tasks", "knn,retrieval")
    assert results(cut_run.parent)[str(tissue)]["rows"][0]["scores"] == row["scores"]


def test_a_cut_student_offers_no_dim_beyond_its_own(tmp_path, run, cli):
    cli(run, "--dim", 7, "--out", tmp_path / "cut.pt")
    _, config = load_student(tmp_path / "cut.pt")
    assert config["nested_dims"] == [4, 7]
    before = torch.load(run / "student.pt", weights_only=True)["config"]
    assert {**config, "nested_dims": 0} == {**before, "nested_dims": 0}


def test_an_existing_file_is_never_overwritten(tmp_path, run, refused, tissue):
    for name, flags in (("x.pt", ["--dim", 7]), ("x.npz", ["--embed", tissue])):
        (tmp_path / name).write_bytes(b"mine")
        assert f"{name} exists" in refused(run, *flags, "--out", tmp_path / name, "--device", "cpu")
        assert (tmp_path / name).read_bytes() == b"mine"


def test_export_holds_the_cut_embeddings_paths_and_licences(
    tmp_path, run, cli, monkeypatch, capsys
):
    write_tiles(tmp_path / "tiles" / "a", 70, (90, 70))
    write_tiles(tmp_path / "tiles" / "b", 60, (64, 64))
    (tmp_path / "tiles" / "a" / "tile_003.png").write_bytes(b"broken")
    cli(run, "--embed", tmp_path / "tiles", "--dim", 7, "--out", tmp_path / "x.npz")
    exported = np.load(tmp_path / "x.npz")  # no pickle inside
    names = [f"a/tile_{i:03d}.png" for i in range(70) if i != 3] + [
        f"b/tile_{i:03d}.png" for i in range(60)
    ]
    assert exported["paths"].tolist() == names and exported["embeddings"].shape == (129, 7)
    assert (exported["dim"], exported["model"], exported["step"]) == (7, "toy", 1)
    licences = ["uni: CC-BY-NC-ND-4.0; binds students: yes", "virchow: Apache-2.0"]
    assert exported["licences"].tolist() == licences and licences[0] in capsys.readouterr().out
    student, _ = load_student(run)
    for i in (0, 3, 128):  # beside one tile at a time, opened by hand
        image = Image.open(tmp_path / "tiles" / names[i])
        width, height = (round(side * 64 / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left = round((width - 64) / 2)
        pixels = torch.from_numpy(np.array(image.crop((left, 0, left + 64, 64)))).permute(2, 0, 1)
        with torch.no_grad():
            expected = student(pixels[None])["summary"][0, :7]
        torch.testing.assert_close(
            torch.from_numpy(exported["embeddings"][i]), expected, atol=1e-4, rtol=1e-4
        )
    cli(run, "--embed", tmp_path / "tiles" / "b", "--half", "--out", tmp_path / "y.npz")
    half = np.load(tmp_path / "y.npz")["embeddings"]
    assert half.dtype == np.float16 and half.shape == (60, 48)
    np.testing.assert_allclose(half[:, :7], exported["embeddings"][69:], atol=2e-3, rtol=2e-3)
    monkeypatch.setattr(
        os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InputError, match="cannot write .*z.npz: .*No space left"):
        cli(run, "--embed", tmp_path / "tiles", "--out", tmp_path / "z.npz")
    assert not list(tmp_path.glob("z.npz*"))


def test_the_last_batch_of_an_export_may_be_unreadable(tmp_path, run, cli):
    write_tiles(tmp_path / "tiles", 129, (64, 64))
    (tmp_path / "tiles" / "tile_128.png").write_bytes(b"broken")
    cli(run, "--embed", tmp_path / "tiles", "--out", tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["embeddings"].shape == (128, 48)


@pytest.mark.parametrize("moment", ["while embedding", "while writing"])
@pytest.mark.parametrize("reason", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_export_leaves_no_file(tmp_path, run, cli, monkeypatch, moment, reason):
    write_tiles(tmp_path / "tiles", 70, (64, 64))
    (tmp_path / "out").mkdir()
    calls = []

    def second_batch(model, images, embed=evaluate.embed):
        calls.append(len(images))
        if len(calls) == 2:
            raise reason
        return embed(model, images)

    def half_written(file, **content):
        calls.append(file.write(b"half of it"))
        raise reason

    if moment == "while embedding":
        monkeypatch.setattr(evaluate, "embed", second_batch)
    else:
        monkeypatch.setattr(np, "savez", half_written)
    with pytest.raises(reason):
        cli(run, "--embed", tmp_path / "tiles", "--out", tmp_path / "out" / "x.npz")
    assert calls and not list((tmp_path / "out").iterdir())
