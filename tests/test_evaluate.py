"""Tasks against brute force and scikit-learn, labelled folders, the command line end to end."""

import json
import math
import os
import re
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import oracle, randomise, write_tiles
from PIL import Image

import data
import evaluate
from evaluate import CentreTiles, labelled_files, load_student
from student import STUDENTS, InputError, Student
from teachers import load_teacher


def model_rows(result):
    """The rows without chance and colour histogram."""
    return [row for row in result["rows"] if row["model"] not in evaluate.BASELINES]


def figures(task, *problem, **options):
    """What a task finds, in numbers: {metric: value}."""
    return evaluate.figures_of(task(*problem, **options))


# ---- nearest neighbours: one query, one neighbour at a time --------------------------------------
def ranked(bank, query):
    """Cosine similarities and places in the bank, nearest first; the earlier place first where they
    are equal.
    """
    similarity = []
    for row in bank:
        product = sum(a * b for a, b in zip(query, row, strict=True))
        similarity.append(product / (math.hypot(*query) * math.hypot(*row)))
    return sorted(zip(similarity, range(len(bank)), strict=False), key=lambda pair: -pair[0])


def neighbours(problem, dim=None):
    """For each query its label and the (similarity, label) of the whole bank, nearest first."""
    train_x, train_y, test_x, test_y = (part.tolist() for part in problem)
    for query, truth in zip(test_x, test_y, strict=False):
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
    """Overlapping clusters: neither chance nor perfection hides a wrong vote -> train_x, train_y,
    test_x, test_y.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor(labels)
    centres, problem = torch.randn(len(labels), dim, generator=generator), []
    for n in (bank, queries):
        y = torch.randint(len(labels), (n,), generator=generator)
        problem += [centres[y] + spread * torch.randn(n, dim, generator=generator), numbers[y]]
    return problem


PROBLEMS = {
    "plain": {"spread": 1.5},
    "more queries than a chunk": {"bank": 30, "queries": 150},
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
def test_knn_and_retrieval_equal_brute_force(name, monkeypatch):
    if "chunk" in name:
        monkeypatch.setattr(evaluate, "SIMILARITIES", 30 * 64)
    problem = clusters(**PROBLEMS[name], seed=len(name))
    for k in (1, 5, 20, 1000):
        assert figures(evaluate.knn, *problem, k=k) == pytest.approx(plain_knn(problem, k)), k
    assert figures(evaluate.knn, *problem) == figures(evaluate.knn, *problem, k=20)  # the default
    expected = plain_retrieval(problem)
    assert figures(evaluate.retrieval, *problem) == pytest.approx(expected)
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
        assert figures(evaluate.knn, *problem, k=k)["accuracy"] == pytest.approx(6 / 9)
    assert figures(evaluate.retrieval, *problem) == pytest.approx(
        dict.fromkeys(("Acc@1", "Acc@3", "Acc@5", "mMV@5"), 6 / 9)
    )


def test_a_query_of_zeros_is_no_nan():
    problem = clusters(queries=4)
    problem[2][0] = 0
    for metrics in (
        figures(evaluate.knn, *problem),
        figures(evaluate.retrieval, *problem),
        figures(evaluate.adaptive_retrieval, *problem, 2, 200),
    ):
        assert all(0 <= value <= 1 for metric, value in metrics.items() if metric != "work")


def test_a_near_neighbour_outvotes_two_that_are_farther():
    near, far = [1.0, 0.0], [math.cos(math.pi / 6), math.sin(math.pi / 6)]
    bank, query = torch.tensor([far, near, far]), torch.tensor([[2.0, 0.0]])
    labels = torch.tensor([1, 0, 1])
    assert (
        figures(evaluate.knn, bank, labels, query, torch.tensor([0]), k=3)["accuracy"] == 1
    )  # e^(1 / 0.07) > 2 e^(0.866 / 0.07)
    farther = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, 0.1]])
    assert (
        figures(evaluate.knn, farther, labels, query, torch.tensor([1]), k=3)["accuracy"] == 1
    )  # nearly as near: two win


def test_duplicated_tiles_are_neighbours_of_their_own():
    train_x, train_y, test_x, test_y = clusters(bank=30)
    problem = (train_x.repeat(2, 1), train_y.repeat(2), test_x, test_y)
    for k in (1, 2, 5, 20):
        assert figures(evaluate.knn, *problem, k=k) == pytest.approx(plain_knn(problem, k))
    expected = plain_retrieval(problem)
    assert figures(evaluate.retrieval, *problem) == pytest.approx(expected)
    assert expected != pytest.approx(plain_retrieval((train_x, train_y, test_x, test_y)))
    same = (
        torch.ones(9, 4),
        torch.full((9,), 3),
        torch.ones(2, 4),
        torch.tensor([3, 0]),
    )  # one tile, nine times
    assert figures(evaluate.knn, *same) == {"accuracy": 0.5, "balanced_accuracy": 0.5}
    assert figures(evaluate.retrieval, *same)["mMV@5"] == 0.5


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
        metrics = figures(
            evaluate.retrieval,
            bank,
            torch.tensor(labels)[order],
            torch.tensor([[1.0, 0.0]]),
            torch.tensor([label]),
        )
        assert metrics["mMV@5"] == (label == majority)
        assert metrics == {f"Acc@{n}": float(label in labels[:n]) for n in (1, 3, 5)} | {
            "mMV@5": label == majority
        }


def test_knn_over_more_queries_than_a_chunk_finds_itself(monkeypatch):
    monkeypatch.setattr(evaluate, "SIMILARITIES", 7 * 1000)
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(1000) % 7
    assert figures(evaluate.knn, x, y, x, y, k=1) == {"accuracy": 1.0, "balanced_accuracy": 1.0}
    assert figures(evaluate.retrieval, x, y, x, y)["Acc@1"] == 1


@pytest.mark.parametrize("dim", [1, 2, 7, 12])
def test_adaptive_retrieval_with_the_whole_bank_is_a_full_search(dim):
    problem = clusters(bank=150, queries=90, dim=12, spread=2)
    full = figures(evaluate.retrieval, *problem)["Acc@1"]
    assert 0.2 < full < 0.9
    for shortlist in (
        {"shortlist": 200},  # above the bank
        {"shortlist": 150},
        {"shortlist": 1000},
    ):
        assert figures(evaluate.adaptive_retrieval, *problem, dim, **shortlist)[
            "Acc@1"
        ] == pytest.approx(full)


@pytest.mark.parametrize(("dim", "shortlist"), [(2, 1), (2, 5), (3, 20), (7, 3), (12, 1)])
def test_adaptive_retrieval_equals_plain_loops(dim, shortlist):
    problem = clusters(bank=80, queries=150, dim=12, labels=(0, 2, 5), spread=1.5)
    train_x, train_y, test_x, test_y = (part.tolist() for part in problem)
    hits = []
    for query, truth in zip(test_x, test_y, strict=False):
        chosen = [i for _, i in ranked([x[:dim] for x in train_x], query[:dim])[:shortlist]]
        best = ranked([train_x[i] for i in chosen], query)[0][1]
        hits.append(train_y[chosen[best]] == truth)
    got = figures(evaluate.adaptive_retrieval, *problem, dim, shortlist=shortlist)
    assert got["Acc@1"] == pytest.approx(sum(hits) / len(hits))
    if (
        dim < 12
    ):  # the shortlist is too short to reach a full search, so the test can tell them apart
        assert abs(got["Acc@1"] - figures(evaluate.retrieval, *problem)["Acc@1"]) > 0.003


def test_the_work_of_adaptive_retrieval_by_hand():
    """A full search: 100 x 16 multiply-adds a query. Here 100 x 4 for the shortlist, 10 x 16 to
    re-rank it.
    """
    problem = clusters(bank=100, queries=3, dim=16)
    assert figures(evaluate.adaptive_retrieval, *problem, 4, shortlist=10)["work"] == pytest.approx(
        (400 + 160) / 1600
    )
    assert figures(evaluate.adaptive_retrieval, *problem, 1, shortlist=10)["work"] == pytest.approx(
        (100 + 160) / 1600
    )
    assert figures(evaluate.adaptive_retrieval, *problem, 4, shortlist=500)[
        "work"
    ] == pytest.approx((400 + 1600) / 1600)
    assert (
        figures(evaluate.adaptive_retrieval, *problem, 16, shortlist=10)["work"] == 1
    )  # nothing to re-rank: one full search


# ---- nearest: of equally similar ones the earlier, whatever the order of the bank -------------
def plain_nearest(bank, queries, k):
    """In float64, one pair at a time; Python's sort is stable, so of equal ones the earlier
    comes.
    """
    bank = torch.nn.functional.normalize(bank.double(), dim=1).tolist()
    queries = torch.nn.functional.normalize(queries.double(), dim=1).tolist()
    found = []
    for query in queries:
        similarity = []
        for row in bank:
            total = 0.0
            for a, b in zip(query, row, strict=True):
                total += a * b
            similarity.append(total)
        order = sorted(range(len(bank)), key=similarity.__getitem__, reverse=True)
        found.append(order[:k])
    return found


def tied_problem(dim, seed=0, bank=120, queries=40, distinct=25):
    """A bank in which every row is there several times, also as a multiple, with labels at random.

    The factors are powers of two, so that rows of one direction are exactly equal when normalised.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(distinct, dim, generator=generator)
    chosen = torch.randint(distinct, (bank,), generator=generator)
    factors = 2.0 ** torch.randint(-3, 4, (bank, 1), generator=generator)
    train_y = torch.randint(3, (bank,), generator=generator)
    test_x = torch.randn(queries, dim, generator=generator)
    test_y = torch.randint(3, (queries,), generator=generator)
    return rows[chosen] * factors, train_y, test_x, test_y


@pytest.mark.parametrize("dim", [1, 2, 4, 16, 48])
@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_of_equally_similar_ones_the_earlier_in_the_bank_is_nearer(dim, k):
    bank, _, queries, _ = tied_problem(dim)
    similarity, index = evaluate.nearest(bank, queries, k)
    assert similarity.dtype == torch.float64
    assert (similarity.diff(dim=1) <= 0).all()
    for near, plain in zip(index.tolist(), plain_nearest(bank, queries, k), strict=True):
        assert near == plain
    ties = (similarity.diff(dim=1) == 0).sum(1)
    assert k == 1 or ties.min() > 0  # each query met some


def test_equal_rows_are_equally_similar_wherever_they_stand():
    """A matrix product alone rounds them differently, in blocks and at the edges of the matrix."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 48, generator=generator)
    place = torch.randint(50, (1003,), generator=generator)
    queries = torch.randn(65, 48, generator=generator)
    similarity, index = evaluate.nearest(rows[place], queries, 1003)
    for values, order in zip(similarity, index, strict=True):
        for row in range(50):
            of_row = place[order] == row
            assert len(values[of_row].unique()) == 1
            assert (order[of_row].diff() > 0).all()


@pytest.mark.parametrize("dim", [2, 4, 16, 48])
def test_protocols_do_not_depend_on_the_order_of_the_bank(dim):
    """Tied in float32, told apart in float64: at 2 channels a bank of 3,000 has many such pairs."""
    train_x, train_y, test_x, test_y = clusters(bank=3000, queries=300, dim=48, spread=1.5)
    bank, queries = train_x[:, :dim], test_x[:, :dim]
    if dim == 2:
        unit = torch.nn.functional.normalize(bank), torch.nn.functional.normalize(queries)
        best = (unit[1] @ unit[0].T).topk(2).values
        share = (best[:, 0] == best[:, 1]).float().mean()
        assert share > 0.05  # what float32 cannot tell
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    _, index = evaluate.nearest(bank, queries, 20)
    _, shuffled = evaluate.nearest(bank[order], queries, 20)
    assert torch.equal(order[shuffled], index)
    for task in (evaluate.knn, evaluate.retrieval):
        expected = figures(task, bank, train_y, queries, test_y)
        assert figures(task, bank[order], train_y[order], queries, test_y) == expected
    expected = figures(evaluate.adaptive_retrieval, train_x, train_y, test_x, test_y, dim, 200)
    bank, labels = train_x[order], train_y[order]
    again = figures(evaluate.adaptive_retrieval, bank, labels, test_x, test_y, dim, 200)
    assert again == expected


@pytest.mark.parametrize("dim", [2, 4, 16, 48])
def test_protocols_equal_scikit_learn_and_brute_force_at_every_cut(dim):
    neighbors = oracle("sklearn.neighbors")
    metrics = oracle("sklearn.metrics")
    problem = clusters(bank=200, queries=80, dim=48, spread=2.5)
    problem[0], problem[2] = problem[0][:, :dim], problem[2][:, :dim]
    train_x, train_y, test_x, test_y = problem
    expected = plain_knn(problem, 20)
    assert figures(evaluate.knn, *problem) == pytest.approx(expected)
    assert figures(evaluate.retrieval, *problem) == pytest.approx(plain_retrieval(problem))
    theirs = neighbors.KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    theirs.fit(train_x.double().numpy(), train_y.numpy())
    predicted = theirs.predict(test_x.double().numpy())
    balanced = metrics.balanced_accuracy_score(test_y.numpy(), predicted)
    assert figures(evaluate.knn, *problem) == pytest.approx(
        {"accuracy": (predicted == test_y.numpy()).mean(), "balanced_accuracy": balanced}
    )
    assert 0.25 < expected["accuracy"] < 0.999


def test_adaptive_retrieval_takes_the_earlier_of_equals():
    """Two tiles with the same embedding and different labels, each first in one of two banks."""
    train_x, train_y, test_x, test_y = tied_problem(12)
    ranking = plain_nearest(train_x, test_x, 1)
    expected = sum(train_y[best[0]] == y for best, y in zip(ranking, test_y, strict=True))
    for dim in (3, 12):
        got = figures(
            evaluate.adaptive_retrieval, train_x, train_y, test_x, test_y, dim, shortlist=120
        )
        assert got["Acc@1"] == pytest.approx(expected.item() / 40)


# ---- linear probe: scikit-learn with the same objective ------------------------------------------
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
    got, truth = figures(evaluate.linear_probe, train_x, train_y, test_x, test_y), test_y.numpy()
    recalls = [(predicted[truth == label] == label).mean() for label in np.unique(truth)]
    expected = {"accuracy": (predicted == truth).mean(), "balanced_accuracy": np.mean(recalls)}
    assert got == pytest.approx(expected, abs=1e-12)
    if "separable" not in name:
        assert 1 / K < expected["accuracy"] < 1


def test_the_linear_probe_stands_at_the_minimum_of_its_objective():
    """Without scikit-learn: the gradient of sum CE + lambda / 2 ||W||^2, lambda = 100 / (M K), is
    zero, bias free.
    """
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
    metrics = figures(evaluate.linear_probe, train_x, train_y, test_x, test_y)
    assert metrics == {"accuracy": 1.0, "balanced_accuracy": 1.0}
    test_y[:10] = 1  # never seen in training, so never predicted
    metrics = figures(evaluate.linear_probe, train_x, train_y, test_x, test_y)
    assert metrics == pytest.approx({"accuracy": 27 / 37, "balanced_accuracy": 0.5})


def test_linear_probe_with_constant_and_repeated_channels():
    x, y, test_x, test_y = clusters(bank=100, dim=5, labels=(0, 1, 2), spread=1.6)
    plain = figures(evaluate.linear_probe, x, y, test_x, test_y)
    W, bias, _ = evaluate.fit_linear(
        torch.cat([x, x, torch.full((100, 1), 3.0), torch.zeros(100, 1)], 1), y
    )
    assert W.isfinite().all() and bias.isfinite().all() and W[:, 10:].abs().max() < 1e-6
    torch.testing.assert_close(W[:, :5], W[:, 5:10], atol=1e-5, rtol=1e-4)
    assert 1 / 3 < plain["accuracy"] < 1


# ---- dense probe ---------------------------------------------------------------------------------
def as_masks(confusion):
    """A true and a predicted mask (1, 1, pixels) of these counts: a row a true class."""
    truth = []
    predicted = []
    for t, row in enumerate(confusion):
        for p, count in enumerate(row):
            truth += [t] * count
            predicted += [p] * count
    return torch.tensor(predicted)[None, None], torch.tensor(truth)[None, None]


def overlap(confusion):
    return evaluate.figures_of(evaluate.tally_overlap(*as_masks(confusion)))


def test_overlap_of_hand_computed_confusions():
    two = overlap([[3, 1], [2, 4]])
    assert two == pytest.approx({"mIoU": (3 / 6 + 4 / 7) / 2, "Dice": (6 / 9 + 8 / 11) / 2})
    absent = [[3, 0, 1], [0, 0, 0], [2, 0, 4]]  # class 1 in neither: it does not count
    assert overlap(absent) == two
    expected = pytest.approx({"mIoU": (3 / 4 + 1 + 0) / 3, "Dice": (6 / 7 + 1 + 0) / 3})
    surplus = [
        [3, 0, 1],
        [0, 2, 0],
        [0, 0, 0],
    ]  # class 2 is predicted, but nowhere true: it counts 0
    assert overlap(surplus) == expected
    missed = [[3, 0, 0], [0, 2, 0], [1, 0, 0]]  # class 2 is true, but never predicted
    assert overlap(missed) == expected
    assert overlap([[5, 0, 0], [0, 0, 0], [0, 0, 900]]) == {"mIoU": 1.0, "Dice": 1.0}
    assert overlap([[0, 4], [6, 0]]) == {"mIoU": 0.0, "Dice": 0.0}


def plain_overlap(predicted, truth, void):
    """By sets of pixels, of all tiles together."""
    pairs = zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True)
    is_true, is_predicted = {}, {}
    for pixel, (p, t) in enumerate(pairs):
        if t != void:
            is_true.setdefault(t, set()).add(pixel)
            is_predicted.setdefault(p, set()).add(pixel)
    ious, dices = [], []
    for label in is_true.keys() | is_predicted.keys():
        a, b = is_true.get(label, set()), is_predicted.get(label, set())
        ious.append(len(a & b) / len(a | b))
        dices.append(2 * len(a & b) / (len(a) + len(b)))
    return {"mIoU": np.mean(ious), "Dice": np.mean(dices)}


@pytest.mark.parametrize("void", [-1, 255])
def test_overlap_equals_sets_of_pixels(void):
    """255 is a class as others, or none: then it makes no difference what is predicted there."""
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.choice(np.array([0, 1, 3, 255], np.uint8), (5, 4, 4)))
    predicted = torch.from_numpy(rng.choice(np.array([0, 1, 2, 3], np.uint8), (5, 4, 4)))
    predicted[truth != 255] = predicted[truth != 255].clamp(max=1)  # 2 and 3 stand there alone
    found = evaluate.figures_of(evaluate.tally_overlap(predicted, truth, void))
    assert found == pytest.approx(plain_overlap(predicted, truth, void))
    other = evaluate.figures_of(evaluate.tally_overlap(predicted, truth, 254 - void))
    assert found != pytest.approx(other)


def write_quadrants(root, n, size, values=(0, 1), related=True, suffix="png"):
    """Tiles whose four quadrants are light or dark, with noise, and masks that say which (or
    something else).
    """
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
    """A student that was never trained: light and dark patches differ in its tokens anyway.

    Its blocks hardly do anything, so that already two channels tell light from dark.
    """
    torch.manual_seed(0)
    student = Student(arch or "toy").eval()
    for module in student.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.trunc_normal_(module.weight, std=0.02)
    return student


@pytest.mark.parametrize(
    ("size", "values"),
    [((64, 64), (0, 1)), ((128, 128), (0, 255)), ((150, 120), (2, 5)), ((40, 52), (7, 1))],
)
def test_dense_probe_finds_what_the_patches_hold(tmp_path, size, values):
    write_quadrants(tmp_path / "train", 24, size, values)
    write_quadrants(tmp_path / "test", 10, size, values)
    models = {"student": (bright_patches(), [2, 7, 48])}
    rows = model_rows(evaluate.run_tasks(models, str(tmp_path), 0, ["dense"]))
    assert [row["dim"] for row in rows] == [2, 7, 48]
    for row in rows:
        [(_, scores)] = row["scores"].items()
        assert scores["dense"]["mIoU"] > 0.9 and scores["dense"]["Dice"] > 0.94


def test_dense_probe_finds_nothing_where_nothing_is(tmp_path):
    write_quadrants(tmp_path / "train", 24, (64, 64), related=False)
    write_quadrants(tmp_path / "test", 10, (64, 64), related=False)
    models = {"student": (bright_patches(), [48])}
    [row] = model_rows(evaluate.run_tasks(models, str(tmp_path), 0, ["dense"]))
    [(_, scores)] = row["scores"].items()
    assert scores["dense"]["mIoU"] < 0.6


def test_dense_probe_equals_scikit_learn_pillow_and_numpy(tmp_path):
    """By other means: tiles read by Pillow, tokens fitted by scikit-learn, pixels counted class by
    class.
    """
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
    [row] = model_rows(evaluate.run_tasks({"student": (student, [dim])}, tmp_path, 0, ["dense"]))
    [(_, scores)] = row["scores"].items()
    assert scores["dense"] == pytest.approx(
        {"mIoU": np.mean(ious), "Dice": np.mean(dices)}, abs=1e-3
    )


# ---- every task beside its oracles, at every cut, with and without ties --------------------------
def copied(x, y, times=4):
    """Each row several times, as a multiple too: equally near as the others of its block."""
    factors = 2.0 ** (torch.arange(times) - times)
    return torch.cat([x * factor for factor in factors]), torch.cat([y, y.roll(1), y, y.roll(2)])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dim", [2, 4, 16, 48])
def test_knn_linear_and_retrieval_equal_scikit_learn_and_plain_loops(dim, tied):
    neighbors = oracle("sklearn.neighbors")
    metrics = oracle("sklearn.metrics")
    linear_model = oracle("sklearn.linear_model")
    train_x, train_y, test_x, test_y = clusters(bank=60, queries=40, dim=dim, spread=2.5)
    if tied:
        train_x, train_y = copied(train_x, train_y)  # 20 neighbours are five blocks of four
        test_x[:20] = train_x[:20] / 2
    problem = (train_x, train_y, test_x, test_y)
    expected = plain_knn(problem, 20)
    assert figures(evaluate.knn, *problem) == pytest.approx(expected, abs=1e-12)
    assert figures(evaluate.retrieval, *problem) == pytest.approx(
        plain_retrieval(problem), abs=1e-12
    )
    near = neighbors.KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    probe = linear_model.LogisticRegression(
        C=dim * 4 / 100, solver="newton-cg", tol=1e-10, max_iter=10_000
    )
    for theirs, ours in ((near, evaluate.knn), (probe, evaluate.linear_probe)):
        theirs.fit(train_x.double().numpy(), train_y.numpy())
        predicted = theirs.predict(test_x.double().numpy())
        assert figures(ours, *problem) == pytest.approx(
            {
                "accuracy": metrics.accuracy_score(test_y.numpy(), predicted),
                "balanced_accuracy": metrics.balanced_accuracy_score(test_y.numpy(), predicted),
            },
            abs=1e-12,
        )
    assert 0.2 < expected["accuracy"] < 0.999


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dim", [2, 4, 16, 48])
def test_miou_and_dice_equal_scikit_learn_and_plain_loops(dim, tied):
    metrics = oracle("sklearn.metrics")
    linear_model = oracle("sklearn.linear_model")
    generator = torch.Generator().manual_seed(dim)
    problem = []
    for n in (20, 10):
        cells = torch.randint(3, (n, 4, 4), generator=generator)  # a class each of 4 x 4 patches
        tokens = torch.eye(3, dim)[cells].flatten(1, 2)
        if tied:
            tokens = tokens + 0.5 * torch.randint(-1, 2, tokens.shape, generator=generator)
        else:
            tokens = tokens + 0.4 * torch.randn(tokens.shape, generator=generator)
        masks = cells.repeat_interleave(3, 1).repeat_interleave(3, 2).to(torch.uint8)
        problem += [tokens, masks]
    train_x, train_y, test_x, test_y = problem
    x = train_x.flatten(0, 1).double().numpy()
    y = train_y[:, 1::3, 1::3].flatten().numpy()
    theirs = linear_model.LogisticRegression(
        C=dim * 3 / 100, solver="newton-cg", tol=1e-10, max_iter=10_000
    ).fit(x, y)
    assert (len(np.unique(x, axis=0)) < len(x)) == (tied and dim < 16)
    logits = theirs.decision_function(test_x.flatten(0, 1).double().numpy())
    logits = torch.from_numpy(logits).view(10, 4, 4, 3).permute(0, 3, 1, 2)
    logits = torch.nn.functional.interpolate(logits, (12, 12), mode="bilinear")
    predicted = logits.argmax(1)
    pair = (test_y.flatten().numpy(), predicted.flatten().numpy())
    expected = {
        "mIoU": metrics.jaccard_score(*pair, average="macro"),
        "Dice": metrics.f1_score(*pair, average="macro"),
    }
    found = figures(evaluate.dense_probe, *problem)
    assert found == pytest.approx(expected, abs=1e-9)
    assert found == pytest.approx(plain_overlap(predicted, test_y, -1), abs=1e-9)
    assert 0.2 < found["mIoU"] < 0.99


def test_what_is_of_no_class_is_neither_learned_nor_tested():
    """255 in masks of two classes more; the same where it stands in for other numbers."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(2, (30, 4, 4), generator=generator)
    x = torch.eye(2)[cells].flatten(1, 2) + 0.7 * torch.randn(30, 16, 2, generator=generator)
    y = cells.repeat_interleave(3, 1).repeat_interleave(3, 2).to(torch.uint8)
    void = torch.rand(y.shape, generator=generator) < 0.3
    masked = y.masked_fill(void, 255)
    found = figures(evaluate.dense_probe, x[:20], masked[:20], x[20:], masked[20:])
    W, bias, _ = evaluate.fit_linear(
        x[:20].flatten(0, 1)[~void[:20, 1::3, 1::3].flatten()],
        y[:20, 1::3, 1::3].flatten()[~void[:20, 1::3, 1::3].flatten()],
    )
    logits = (x[20:].double() @ W.T + bias).transpose(1, 2).unflatten(2, (4, 4))
    predicted = torch.nn.functional.interpolate(logits, (12, 12), mode="bilinear").argmax(1)
    assert found == pytest.approx(plain_overlap(predicted, masked[20:], 255))
    other = figures(evaluate.dense_probe, x[:20], y[:20], x[20:], y[20:])
    assert found != pytest.approx(other) and 0.3 < found["mIoU"] < 0.99
    white = 255 * y  # black and white alone: 255 is a class
    assert figures(evaluate.dense_probe, x[:20], white[:20], x[20:], white[20:]) == pytest.approx(
        other
    )


# ---- how sure a figure is ------------------------------------------------------------------------
def answers(n=60, classes=3, right=0.7, seed=0):
    """Labels predicted and true, rightly with a probability; the last class is rare."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (n,), generator=generator)
    truth[truth == classes - 1] *= (torch.rand(n, generator=generator) < 0.3)[truth == classes - 1]
    is_right = torch.rand(n, generator=generator) < right
    return torch.where(is_right, truth, (truth + 1) % classes), truth


def plain_resamples(predicted, truth, groups, seed, times):
    """Balanced accuracy of resamples, one tile at a time."""
    classes = sorted(set(truth.tolist()))
    units = sorted(set(groups.tolist()))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(times):
        count = len(units) + 4  # the four that are added
        right = dict.fromkeys(classes, 0.0)
        whole = dict.fromkeys(classes, 0.0)
        for unit in torch.randint(count, (count,), generator=generator).tolist():
            if unit >= len(units):
                for label in classes:
                    whole[label] += 1 / len(classes)
                    right[label] += (unit < len(units) + 2) / len(classes)
                continue
            for p, t, group in zip(
                predicted.tolist(), truth.tolist(), groups.tolist(), strict=True
            ):
                if group == units[unit]:
                    whole[t] += 1
                    right[t] += p == t
        recalls = [right[label] / whole[label] for label in classes if whole[label]]
        found.append(sum(recalls) / len(recalls))
    return found


@pytest.mark.parametrize("grouped", [False, True])
def test_resamples_equal_a_plain_loop(grouped):
    predicted, truth = answers()
    groups = torch.arange(60)
    if grouped:
        groups = 7 * torch.randint(12, (60,), generator=torch.Generator().manual_seed(1))
    tallies = evaluate.tally_answers(predicted, truth)
    draws = evaluate.resample(tallies, groups, 3)["balanced_accuracy"]
    assert draws.shape == (1000,)
    plain = plain_resamples(predicted, truth, groups, 3, 20)
    assert draws[:20].tolist() == pytest.approx(plain, abs=1e-6)
    again = evaluate.resample(tallies, groups, 3)["balanced_accuracy"]
    assert torch.equal(draws, again)
    assert not torch.equal(draws, evaluate.resample(tallies, groups, 4)["balanced_accuracy"])


@pytest.mark.parametrize(("n", "wrong"), [(20, 0), (20, 3), (200, 10), (1000, 400)])
def test_the_interval_of_an_accuracy_is_that_of_agresti_and_coull(n, wrong):
    """Their formula: the usual interval of n + 4 tiles, two more of them right and two wrong."""
    truth = torch.zeros(n, dtype=torch.long)
    predicted = truth.clone()
    predicted[:wrong] = 1
    draws = evaluate.resample(evaluate.tally_answers(predicted, truth), torch.arange(n), 0)
    low, high = evaluate.interval(draws["accuracy"])
    p = (n - wrong + 2) / (n + 4)
    half = 1.96 * math.sqrt(p * (1 - p) / (n + 4))
    steps = 2 / n + 0.003  # the bootstrap's values are n + 1, and 1000 are drawn
    assert low == pytest.approx(p - half, abs=steps)
    assert high == pytest.approx(min(1, p + half), abs=steps)
    assert low <= 1 - wrong / n <= high
    if not wrong:
        assert low < 0.95  # 20 of 20 are no proof


def test_intervals_of_groups_are_wider_where_their_tiles_share_their_luck():
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(400, dtype=torch.long)
    groups = torch.arange(400) // 20
    predicted = (torch.rand(20, generator=generator) < 0.3).long()[groups]
    tallies = evaluate.tally_answers(predicted, truth)
    widths = []
    for units in (torch.arange(400), groups):
        low, high = evaluate.interval(evaluate.resample(tallies, units, 0)["accuracy"])
        widths.append(high - low)
    assert widths[1] > 3 * widths[0]  # sqrt(20) in the limit


def test_intervals_hold_their_figures(run, cli):
    cli(run)
    for row in results(run)["synthetic tissue"]["rows"]:
        for label, tasks in row["scores"].items():
            for task, metrics in tasks.items():
                intervals = row["intervals"][label][task]
                assert intervals.keys() == metrics.keys() - {"work"}
                for metric, (low, high) in intervals.items():
                    assert 0 <= low < high <= 1 + 1e-6
                    assert low - 1e-6 <= metrics[metric] <= high + 1e-6, (row, metric)


def test_differences_are_of_the_same_resamples(tmp_path, run, cli, capsys, tissue):
    """Two runs with the same weights: no tile differs, as far as 60 tiles can tell."""
    same = write_run(tmp_path / "same")
    cli(run, same, "--data", tissue, "--tasks", "retrieval,knn")
    result = results(run)[str(tissue)]
    printed = capsys.readouterr().out
    values = {}
    for row in result["rows"]:
        values[row["model"], row["dim"]] = row["scores"]["class"]["retrieval"]["Acc@1"]
    texts = {}
    for found in result["differences"]:
        assert found["text"] in printed and found["text"].endswith(found["verdict"])
        assert (found["label"], found["task"], found["metric"]) == ("class", "retrieval", "Acc@1")
        texts[found["text"].split(":")[0]] = found
    expected = []
    for name in (str(run), str(same)):
        for dim in (4, 8, 48):
            expected.append(f"{name} at {dim} less colour histogram")
            if dim < 48:
                expected.append(f"{name} at {dim} less {name} at 48")
            if name == str(same):
                expected.append(f"{name} at {dim} less {run} at {dim}")
    assert list(texts) == expected
    zero = texts[f"{same} at 48 less {run} at 48"]
    assert zero["difference"] == 0 and zero["verdict"] == "within noise"
    assert -4 / 64 < zero["low"] < 0 < zero["high"] < 4 / 64
    found = texts[f"{run} at 4 less colour histogram"]
    difference = values[str(run), 4] - values["colour histogram", 24]
    assert found["difference"] == pytest.approx(difference)
    assert found["low"] <= difference <= found["high"]
    assert f"less colour histogram: {100 * difference:+.1f} (" in found["text"]


def test_a_difference_is_above_below_or_within_noise():
    truth = torch.arange(200) % 2
    tallies = {}
    for model, wrong in (("A", 60), ("B", 20), ("C", 62)):
        predicted = truth.clone()
        predicted[:wrong] = 1 - predicted[:wrong]
        for metric, tally in evaluate.tally_answers(predicted, truth).items():
            tallies[evaluate.Figure(model, 1, "class", "knn", metric)] = tally
    pairs = {f"A less {name}": (("A", 1), (name, 1)) for name in "BC"}
    pairs["B less A"] = (("B", 1), ("A", 1))
    draws = evaluate.resample(tallies, torch.arange(200), 0)
    found = evaluate.compare(pairs, tallies, draws, torch.arange(200), 0)
    assert [one["verdict"] for one in found] == ["below", "within noise", "above"]
    assert [round(one["difference"], 9) for one in found] == [-0.2, 0.01, 0.2]
    assert all(one["metric"] == "balanced_accuracy" for one in found)
    assert found[0]["text"].startswith("A less B: -20.0 (-2")


# ---- what models are held against ----------------------------------------------------------------
def test_the_colour_histogram_counts_pixels():
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    found = evaluate.ColourHistogram(64)(images)
    for i, image in enumerate(images.numpy()):
        for channel in range(3):
            counts, _ = np.histogram(image[channel], 8, (0, 256))
            shares = found["summary"][i, channel::3]
            assert shares.tolist() == pytest.approx(counts / 4096, abs=1e-6)
            counts, _ = np.histogram(image[channel, 8:16, 24:32], 8, (0, 256))
            shares = found["patches"][i, 8 + 3, channel::3]
            assert shares.tolist() == pytest.approx(counts / 64, abs=1e-6)


def test_chance_knows_the_most_frequent_class_of_train():
    train_y = torch.tensor([0, 1, 1, 1, 2, 2])
    test_y = torch.tensor([0, 0, 1, 2])
    for task in ("knn", "linear"):
        found = evaluate.figures_of(evaluate.tally_chance(task, train_y, test_y))
        assert found == pytest.approx({"balanced_accuracy": 1 / 3, "accuracy": 1 / 4})
    found = evaluate.figures_of(evaluate.tally_chance("retrieval", train_y, test_y))
    for n in (1, 3, 5):  # n tiles of the bank, any of them: how often one is of the query's class
        hits = [1 - (5 / 6) ** n, 1 - (5 / 6) ** n, 1 - (1 / 2) ** n, 1 - (2 / 3) ** n]
        assert found[f"Acc@{n}"] == pytest.approx(sum(hits) / 4)
    masks = torch.tensor([[[3, 3], [3, 5]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    found = evaluate.figures_of(evaluate.tally_chance("dense", masks, masks))
    assert found == pytest.approx({"mIoU": 3 / 4 / 2, "Dice": 6 / 7 / 2})


def test_baselines_stand_last_and_do_not_look_like_models(run, cli, capsys, tissue):
    """Also where two students see tiles of different sizes."""
    small = write_run(run.parent / "small", nested=(8,), img_size=32)
    cli(run, small, "--data", tissue, "--tasks", "knn,retrieval", "--dims", "8")
    result = results(run)[str(tissue)]
    assert [row["model"] for row in result["rows"]][2:] == ["chance", "colour histogram"]
    assert [row["dim"] for row in result["rows"]][2:] == [0, 24]
    assert [row["parameters"] for row in result["rows"]][2:] == [0, 0]
    chance, histogram = (row["scores"]["class"] for row in result["rows"][2:])
    assert chance["knn"]["balanced_accuracy"] == pytest.approx(1 / 6)
    lines = capsys.readouterr().out.splitlines()
    for name, scores in (("chance", chance), ("colour histogram", histogram)):
        [line] = [line for line in lines if line.startswith(f"{name} ")]
        cells = line.removeprefix(name).split()
        assert cells[0] == "-" and float(cells[1]) == round(
            100 * scores["knn"]["balanced_accuracy"], 1
        )
    assert cells[-1] != "-" and "mMV@5" not in chance["retrieval"]
    problem = []  # the histogram's figures, of the pixels that the first student sees
    for split in ("train", "test"):
        tiles = CentreTiles(tissue, 64, *labelled_files(tissue)[split])
        images = torch.stack([tiles[k]["image"] for k in range(len(tiles))])
        problem += [evaluate.ColourHistogram(64)(images)["summary"]]
        problem += [torch.tensor([tiles[k]["class"] for k in range(len(tiles))])]
    assert histogram["knn"] == pytest.approx(figures(evaluate.knn, *problem))


def test_what_says_nothing_is_left_out_with_a_word(tmp_path, run, cli, capsys, refused):
    """Acc@3 and Acc@5 of two classes; a shortlist that is most of the bank."""
    for split in ("train", "test"):
        for i, name in enumerate(("dark", "light")):
            for path in write_tiles(tmp_path / "d" / split / name, 9):
                Image.open(path).point(lambda v, i=i: v // 4 + 190 * i).save(path)
    cli(run, "--data", tmp_path / "d")
    printed = capsys.readouterr().out
    result = results(run)[str(tmp_path / "d")]
    for row in result["rows"]:
        assert set(row["scores"]["class"]) == {"knn", "linear", "retrieval"}
        assert not row["scores"]["class"]["retrieval"].keys() & {"Acc@3", "Acc@5"}
    assert "left out: adaptive, which needs 20 tiles to learn from" in printed
    assert "left out: Acc@3 and Acc@5 of class: of two classes" in printed
    line = refused(run, "--data", tmp_path / "d", "--tasks", "adaptive", "--device", "cpu")
    assert "--tasks: none fits these 18 tiles" in line and "adaptive 20 tiles" in line


def test_the_scale_is_said(tmp_path, run, cli, capsys):
    """Crops of training are at the tiles' own scale; here they are shrunk, or not."""
    for size, expected in (
        (224, "tiles of 224 px are seen at 64 px, 3.5 times coarser than in training"),
        (64, ""),
        (32, "tiles of 32 px are seen at 64 px, 2 times finer than in training"),
    ):
        root = tmp_path / str(size)
        for split in ("train", "test"):
            for name in "ab":
                write_tiles(root / split / name, 3, (size + 9, size))
        cli(run, "--data", root, "--tasks", "knn")
        printed = capsys.readouterr().out
        assert expected in printed and expected in results(run)[str(root)]["tiles"]
        assert ("than in training" in printed) == bool(expected)


def test_the_table_fits_a_terminal_and_shows_what_was_found(run, cli, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    cli("run")
    printed = capsys.readouterr().out
    result = results(run)["synthetic tissue"]
    table = printed[printed.index("\ncells, %") : printed.index("\nrun at 4 less")].splitlines()
    assert max(len(line) for line in table) <= 110
    assert table[3].split("dim")[1].count("(95 %)") == 2
    for line, row in zip(table[4:], result["rows"], strict=True):
        assert line.startswith(row["model"])
        cells = line.removeprefix(row["model"]).split()[1:]
        for task in ("knn", "linear"):
            scores = row["scores"]["cells"][task]
            low, high = row["intervals"]["cells"][task]["balanced_accuracy"]
            balanced = f"{100 * scores['balanced_accuracy']:.1f}"
            bounds = f"({100 * low:.1f}-{100 * high:.1f})"
            assert cells[:3] == [balanced, bounds, f"{100 * scores['accuracy']:.1f}"]
            cells = cells[3:]
        assert len(cells) == 6  # of retrieval and adaptive
    assert "parameters: run 0.15" in printed and "1000 resamples" in printed


def test_groups_of_labels_csv_are_drawn_together(tmp_path, run, cli, capsys, tissue):
    rows = ["path,label,split,group"]
    for split in ("train", "test"):
        for k, file in enumerate(sorted((tissue / split).rglob("*.png"))):
            rows.append(f"{file},{file.parent.name},{split},{split}{k // 6}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    cli(run, "--data", tmp_path, "--tasks", "knn", "--dims", 8)
    assert "60 to test in 10 groups" in capsys.readouterr().out
    row = results(run)[str(tmp_path)]["rows"][0]
    assert row["n"] == {"train": 90, "test": 60, "groups": 10}
    alone = ["path,label,split", *(line.rpartition(",")[0] for line in rows[1:])]
    (tmp_path / "labels.csv").write_text("\n".join(alone))
    cli(run, "--data", tmp_path, "--tasks", "knn", "--dims", 8)
    again = results(run)[str(tmp_path)]["rows"][0]
    assert again["scores"] == row["scores"] and again["intervals"] != row["intervals"]


# ---- labelled folders ----------------------------------------------------------------------------
def as_pairs(root, kind="class"):
    """What labelled_files finds, unmixed: {split: [(file, class number or mask), ...] sorted}."""
    return {
        split: sorted(zip(files, targets[kind], strict=False))
        for split, (files, targets) in labelled_files(root).items()
    }


def refusal(root):
    """The one line with which a labelled folder is refused."""
    with pytest.raises(InputError) as error:
        labelled_files(root)
    line = str(error.value)
    assert line.startswith("--data: ") and "\n" not in line and str(root) in line
    return line


def test_class_folders(tmp_path):
    for split, classes in (("train", "cab"), ("test", "bc")):  # test lacks a class of train
        for name in classes:
            write_tiles(tmp_path / split / name / "patient", 2, (100, 70))
    found = as_pairs(tmp_path)
    tiles = {name: [f"{name}/patient/tile_{i:03d}.png" for i in range(2)] for name in "abc"}
    assert found["train"] == [
        (f"train/{file}", n) for n, name in enumerate("abc") for file in tiles[name]
    ]
    assert found["test"] == [
        (f"test/{file}", n) for n, name in ((1, "b"), (2, "c")) for file in tiles[name]
    ]
    files, targets = labelled_files(str(tmp_path))["train"]
    dataset = CentreTiles(tmp_path, 64, files, targets)
    assert len(dataset) == 6 and [dataset[k]["index"] for k in range(6)] == list(range(6))
    for k in range(6):  # every tile with the class of its own folder
        assert (
            "abc"[dataset[k]["class"]] == dataset.files[k].split("/")[1]
            and not dataset[k]["unreadable"]
        )
        assert dataset[k]["image"].shape == (3, 64, 64)


def test_the_order_of_labelled_files_is_mixed_and_fixed(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            write_tiles(tmp_path / split / name, 20, (8, 8))
    first, second = labelled_files(str(tmp_path)), labelled_files(str(tmp_path))
    assert first == second
    classes = first["train"][1]["class"]
    assert sorted(classes) == [0] * 20 + [1] * 20 and classes != sorted(classes)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig"]
)  # with the mark that spreadsheets put in front
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_labels_csv(tmp_path, encoding, end, capsys):
    rows = [
        " split,label ,path",
        'train,tumour,"odd, names/a.png"',
        "train , stroma, b.png ",
        "val,mucus,c.png",
        ",,",
        'test,"tumour","odd, names/é.png"',
        "test,stroma,d.png",
        "",
        "train,tumour,gone.png",
    ]
    (tmp_path / "labels.csv").write_bytes(end.join([*rows, ""]).encode(encoding))
    found = as_pairs(tmp_path)
    assert found["train"] == [
        ("b.png", 0),
        ("gone.png", 1),
        ("odd, names/a.png", 1),
    ]  # mucus is of val alone
    assert found["test"] == [("d.png", 0), ("odd, names/é.png", 1)]
    assert capsys.readouterr().out == f"{tmp_path}/labels.csv: left out are 1 rows of val\n"
    write_tiles(tmp_path, 1)[0].rename(tmp_path / "b.png")
    files, targets = labelled_files(str(tmp_path))["train"]
    dataset = CentreTiles(tmp_path, 64, files, targets)
    for k in range(3):
        name = dataset.files[k]
        missing = [] if name == "b.png" else [f"'{tmp_path / name}': does not exist"]
        assert dataset[k]["unreadable"] == missing


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("", "has no tiles for train; a labelled folder holds"),
        ("path,label,split\n", "has no tiles for train"),
        ("path,label\na.png,x\n", "has the columns ['path', 'label']; wanted is a row a tile"),
        ("path;label;split\na.png;x;train\n", "has the columns ['path;label;split']; wanted"),
        ("Path,label,split\na.png,x,train\n", "has the columns ['Path', 'label', 'split']"),
        ("path,label,split,patient\na.png,x,train,7\n", "'split', 'patient']; wanted"),
        ("path,label,split,\na.png,x,train,7\n", "'split', '']; wanted"),
        ("path,label,split,label\na.png,x,train,7\n", "'split', 'label']; wanted"),
        ("path,label,split\na.png,x,train\n", "has no tiles for test; a labelled folder"),
        ("path,label,split\na.png,x,test\n", "has no tiles for train; a labelled folder"),
        ("path,label,split\na.png,x,test\nb.png,x,Train\n", "has no tiles for train"),
        ("path,label,split\na.png,x,train\nb.png,x,val\n", "has no tiles for test"),
        (
            "path,label,split\na.png,x,train\nc.png,z,train\nb.png,y,test\nd.png,x,test\n",
            "b.png is in none of the classes of train",
        ),
        (
            "path,label,split\na.png,,train\nb.png,x,test\n",
            "line 2: ['a.png', '', 'train'] is not a value",
        ),
        (
            "path,label,split\na.png,x,train\nb.png,x,\n",
            "line 3: ['b.png', 'x', ''] is not a value a",
        ),
        ("path,label,split,group\na.png,x,train, \n", "line 2: ['a.png', 'x', 'train', '']"),
        ("path,label,split\na.png,x,train\n\nb.png\n", "line 4: ['b.png'] is not a value a column"),
        ("path,label,split\na,b.png,x,train\n", "line 2: ['a', 'b.png', 'x', 'train'] is not"),
        ('path,label,split\na.png,"x,train\nb.png,x,test\n', "labels.csv, line 4: unexpected end"),
        (
            "path,label,split\na.png,x,train\nb.png,x,test\na.png,y,test\n",
            "a.png of train and a.png of test are one file; keep one",
        ),
        (
            "path,label,split\na.png,x,train\nb.png,x,test\nc.png,x,test\n",
            "tiles of train are of 1 classes, ['x']: there is nothing to tell apart",
        ),
        (
            "path,label,split\na.png,x,train\nb.png,y,train\nc.png,x,test\n",
            "tiles of test are of 1 classes, ['x']",
        ),
    ],
)
def test_unfit_labels_csv_is_refused_in_one_line(tmp_path, table, expected):
    (tmp_path / "labels.csv").write_text(table)
    assert expected in refusal(tmp_path)


def test_a_quote_that_labels_csv_never_closes_is_refused_in_one_line(tmp_path):
    """The rest of the file becomes one field, longer than Python's csv takes."""
    (tmp_path / "labels.csv").write_text(
        'path,label,split\na.png,"x,train\n' + "b.png,x,test\n" * 12_000
    )
    assert "labels.csv" in refusal(tmp_path)


def test_groups_of_labels_csv(tmp_path, run, cli, capsys):
    """A number a group, the same in both splits; those that are in both are named."""
    table = "path,label,split,group\n"
    groups = {}
    for i, file in enumerate(write_tiles(tmp_path / "d" / "tiles", 12, (64, 64))):
        groups[f"tiles/{file.name}"] = f"P{i // 2}"  # P0 to P3 are of train, P4 and P5 of test
        split = "train" if i < 8 else "test"
        table += f"tiles/{file.name},{'ab'[i % 2]},{split}, P{i // 2} \n"
    (tmp_path / "d" / "labels.csv").write_text(table)
    found = labelled_files(tmp_path / "d")
    number_of = {}
    for files, targets in found.values():
        tiles = CentreTiles(tmp_path / "d", 64, files, targets)
        for k, file in enumerate(files):
            number = tiles[k]["group"]
            assert number_of.setdefault(groups[file], number) == number
    assert sorted(number_of) == [f"P{i}" for i in range(6)]
    assert sorted(number_of.values()) == list(range(6))
    cli(run, "--data", tmp_path / "d", "--tasks", "knn", "--dims", "8")
    [few] = results(run)[str(tmp_path / "d")]["doubts"]
    assert few.startswith("few tiles to test on, 2 (of the smallest class): no verdict")
    (tmp_path / "d" / "labels.csv").write_text(table.replace("P5", "P0"))
    cli(run, "--data", tmp_path / "d", "--tasks", "knn", "--dims", "8")
    doubt, again = results(run)[str(tmp_path / "d")]["doubts"]
    assert again == few
    assert doubt.startswith("1 of the 2 groups that are tested on are learned from too")
    assert f"warning: {doubt}\n" in capsys.readouterr().out


def test_a_tile_in_train_and_in_test_is_refused_also_through_links(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            write_tiles(tmp_path / split / name, 2, (8, 8))
    assert len(as_pairs(tmp_path)["test"]) == 4
    (tmp_path / "test" / "b" / "link.png").symlink_to("../../train/a/tile_001.png")
    line = refusal(tmp_path)
    assert "train/a/tile_001.png of train and test/b/link.png of test are one file" in line
    (tmp_path / "test" / "b" / "link.png").unlink()
    (tmp_path / "train" / "more").mkdir()
    (tmp_path / "train" / "a" / "folder").symlink_to(tmp_path / "test" / "a")
    assert "train/a/folder/tile_000.png of train and test/a/tile_000.png" in refusal(tmp_path)
    (tmp_path / "labels.csv").write_text(
        "path,label,split\ntrain/a/tile_000.png,a,train\ntrain/b/tile_000.png,b,train\n"
        "test/a/tile_000.png,a,test\ntrain/../train/b/tile_000.png,b,test\n"
    )
    assert "train/b/tile_000.png of train and train/../train/b/tile" in refusal(tmp_path)


def test_copies_of_training_tiles_are_told_below_the_table(tmp_path, run, cli, capsys):
    for split, first in (("train", 0), ("test", 40)):
        for k, name in enumerate("ab"):
            files = write_tiles(tmp_path / "d" / split / name, 10, (64, 64))
            for i, file in enumerate(files):  # light and dark, so that they are tiles of their own
                shift = first + 20 * k + i
                Image.open(file).point(lambda v, s=shift: v // 2 + s).save(file)
    cli(run, "--data", tmp_path / "d", "--tasks", "knn", "--dims", "8")
    assert results(run)[str(tmp_path / "d")]["doubts"] == []
    tile = Image.open(tmp_path / "d" / "train" / "a" / "tile_001.png")
    tile.save(tmp_path / "d" / "test" / "b" / "tile_000.bmp")  # another file of the same pixels
    cli(run, "--data", tmp_path / "d", "--tasks", "knn", "--dims", "8")
    [doubt] = results(run)[str(tmp_path / "d")]["doubts"]
    assert doubt.startswith("1 of 21 test tiles are in train too, pixel for pixel")
    assert doubt.endswith("as test/b/tile_000.bmp: known by heart")
    assert f"warning: {doubt}\n" in capsys.readouterr().out


def test_folders_that_systems_leave_are_no_classes(tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            write_tiles(tmp_path / split / name, 2, (8, 8))
            write_tiles(tmp_path / split / name / "@eaDir" / "tile_000.png", 1, (8, 8))
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash-1000"):
            write_tiles(tmp_path / split / name, 2, (8, 8))
        (tmp_path / split / "a" / "._tile_000.png").write_bytes(b"left by macOS")
    for split, pairs in as_pairs(tmp_path).items():
        tiles = [(f"{split}/{n}/tile_00{i}.png", k) for k, n in enumerate("ab") for i in range(2)]
        assert pairs == tiles


def test_unfit_class_folders_are_refused_in_one_line(tmp_path):
    write_tiles(tmp_path / "train" / "a", 2)
    write_tiles(tmp_path / "train" / "c", 2)
    line = refusal(tmp_path)
    assert f"{tmp_path} has no tiles for test" in line and "labels.csv" in line and "masks" in line
    assert "python -m extras.labels" in line
    (tmp_path / "test").mkdir()
    assert f"no images (png, jpg, tif, bmp, webp) in {tmp_path / 'test'}" in refusal(tmp_path)
    write_tiles(tmp_path / "test" / "a", 1)
    write_tiles(tmp_path / "test" / "b", 1)
    assert "test/b/tile_000.png is in none of the classes of train" in refusal(tmp_path)
    (tmp_path / "test" / "a").rename(tmp_path / "with_a")
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "a")
    assert "tiles of test are of 1 classes, ['a']" in refusal(tmp_path)
    write_tiles(tmp_path / "test" / "c", 1)
    assert len(as_pairs(tmp_path)["test"]) == 2
    (tmp_path / "train" / "c").rename(tmp_path / "aside")
    assert "tiles of train are of 1 classes, ['a']" in refusal(tmp_path)
    (tmp_path / "aside").rename(tmp_path / "train" / "c")
    write_tiles(tmp_path / "train", 1)
    assert "train/tile_000.png is in none of the classes" in refusal(tmp_path)
    assert "nowhere" in refusal(tmp_path / "nowhere")
    write_tiles(tmp_path / "flat" / "train", 1)
    write_tiles(tmp_path / "flat" / "test", 1)
    line = refusal(tmp_path / "flat")
    assert "tiles of train are of 0 classes, []" in line and "train/CLASS/*" in line


# ---- masks ---------------------------------------------------------------------------------------
def write_masks(root, n, size=(64, 64), first=0):
    """Tiles of noise, each with a mask filled with its own number."""
    (root / "masks").mkdir(parents=True)
    for i, path in enumerate(write_tiles(root / "images", n, size)):
        Image.new("L", size, first + i).save(root / "masks" / path.name)


def test_masks_at_the_top_leave_the_last_fifth_for_testing(tmp_path):
    write_masks(tmp_path, 11)
    found = labelled_files(str(tmp_path))
    assert {split: len(files) for split, (files, _) in found.items()} == {"train": 9, "test": 2}
    names = sorted(file.rsplit("/", 1)[1] for file in found["test"][0])
    assert names == ["tile_009.png", "tile_010.png"]
    for files, targets in found.values():
        dataset = CentreTiles(tmp_path, 64, files, targets)
        for k in range(len(dataset)):
            number = int(files[k][-7:-4])
            assert (dataset[k]["mask"] == number).all() and dataset[k]["mask"].shape == (64, 64)
            assert not dataset[k]["unreadable"]


def test_masks_below_train_and_test_and_of_another_suffix(tmp_path):
    for split, first in (("train", 0), ("test", 100)):
        write_masks(tmp_path / split, 3, first=first)
        for path in (
            tmp_path / split / "images"
        ).iterdir():  # as often: JPEG tiles, PNG masks, a folder a slide
            (path.parent / "slide").mkdir(exist_ok=True)
            Image.open(path).save(path.parent / "slide" / f"{path.stem}.jpg")
            path.unlink()
        for path in list((tmp_path / split / "masks").iterdir()):
            (path.parent / "slide").mkdir(exist_ok=True)
            path.rename(path.parent / "slide" / path.name)
    for split, first in (("train", 0), ("test", 100)):
        files, targets = labelled_files(str(tmp_path))[split]
        dataset = CentreTiles(tmp_path, 64, files, targets)
        assert len(dataset) == 3
        for k in range(3):
            assert (dataset[k]["mask"] == first + int(files[k][-7:-4])).all() and not dataset[k][
                "unreadable"
            ]


@pytest.mark.parametrize("gap", ["images", "masks", "test"])
def test_unfit_mask_folders_are_refused_in_one_line(tmp_path, gap):
    write_masks(tmp_path / "train", 3)
    if gap != "test":
        write_masks(tmp_path / "test", 3)
        for path in (tmp_path / "test" / gap).iterdir():
            path.unlink()
    assert str(tmp_path) in refusal(tmp_path)


def test_one_tile_cannot_be_both_trained_and_tested_on(tmp_path):
    write_masks(tmp_path, 1)
    assert "no tiles for train" in refusal(tmp_path)


def mask_item(root, tile, mask, size=64):
    return CentreTiles(root, size, [tile], {"mask": [mask]})[0]


def numbers(size=(64, 64)):
    """Class numbers 0, 1, 2 in blocks, none of them symmetrical."""
    y, x = np.mgrid[: size[1], : size[0]]
    return ((y // 8 + 2 * (x // 16)) % 3).astype(np.uint8)


def test_two_masks_of_one_name_are_refused(tmp_path):
    write_masks(tmp_path, 5)
    Image.new("L", (64, 64), 9).save(tmp_path / "masks" / "tile_001.tif")
    assert "tile_001.png and tile_001.tif are masks of one tile; keep one" in refusal(tmp_path)


def save_packed_png(path, values, bits):
    """A grey PNG of 2 or 4 bits, as optimisers write masks of few numbers; Pillow writes none."""
    height, width = values.shape
    rows = []
    for row in values:
        spread = (row[:, None] >> np.arange(bits)[::-1]) & 1  # (width, bits), the highest first
        rows.append(b"\0" + np.packbits(spread.astype(np.uint8)).tobytes())
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")):
        checked = struct.pack(">I", zlib.crc32(kind + body))
        content += struct.pack(">I", len(body)) + kind + body + checked
    path.write_bytes(content)


@pytest.mark.parametrize("bits", [2, 4])
def test_numbers_of_a_packed_png_are_those_in_the_file(tmp_path, bits):
    """Pillow spreads them over 0 to 255: 3 of 2 bits, 15 of 4 would be of no class."""
    values = np.random.default_rng(0).integers(0, 2**bits, (64, 64)).astype(np.uint8)
    save_packed_png(tmp_path / "mask.png", values, bits)
    assert np.array(Image.open(tmp_path / "mask.png")).max() == 255
    assert np.array_equal(np.array(data.open_mask(tmp_path / "mask.png")), values)


def test_masks_of_16_and_32_bits(tmp_path):
    values = np.arange(64 * 64).reshape(64, 64) % 256
    tifffile = oracle("tifffile")
    for kind in ("uint8", "uint16", ">u2", "int32", "uint32"):
        options = {"byteorder": ">"} if kind == ">u2" else {}
        tifffile.imwrite(tmp_path / "mask.tif", values.astype(kind), **options)
        assert np.array_equal(np.array(data.open_mask(tmp_path / "mask.tif")), values), kind
    for kind in ("uint16", "int32"):
        tifffile.imwrite(tmp_path / "mask.tif", (values + 1).astype(kind))
        with pytest.raises(data.UnreadableTile, match="class numbers from 0 to 255"):
            data.open_mask(tmp_path / "mask.tif")
    tifffile.imwrite(tmp_path / "mask.tif", values.astype("float32"))
    with pytest.raises(data.UnreadableTile, match="float32"):
        data.open_mask(tmp_path / "mask.tif")


@pytest.mark.parametrize("n", [2, 3])
def test_a_mask_of_several_pages_is_refused(tmp_path, n):
    """Its first page was taken."""
    pages = [Image.fromarray(numbers() + i) for i in range(n)]
    pages[0].save(tmp_path / "mask.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(data.UnreadableTile, match=rf"more than one page \({n}\)"):
        data.open_mask(tmp_path / "mask.tif")


def dense(root, run, cli):
    """The result of the dense probe on a folder of masks."""
    cli(run, "--data", root, "--tasks", "dense", "--dims", "48")
    result = results(run)[str(root)]
    return result["rows"][0]["scores"]["mask"]["dense"], result["doubts"]


def test_masks_of_one_value_and_black_and_white_ones_are_told(tmp_path, run, cli, capsys):
    write_quadrants(tmp_path / "white", 50, (64, 64), values=(0, 255))  # ten to test on
    scores, doubts = dense(tmp_path / "white", run, cli)
    assert doubts == ["masks hold 0 and 255 alone: 255 is taken as a class, not as none"]
    assert scores["mIoU"] > 0.9
    assert f"warning: {doubts[0]}\n" in capsys.readouterr().out
    write_quadrants(tmp_path / "three", 50, (64, 64), values=(0, 4))
    path = tmp_path / "three" / "masks" / "03.png"
    Image.new("L", (64, 64), 255).save(path)
    assert dense(tmp_path / "three", run, cli)[1] == []
    write_quadrants(tmp_path / "one", 50, (64, 64), values=(4, 4))
    assert dense(tmp_path / "one", run, cli)[1] == [
        "all masks hold 4 alone: there is nothing to tell apart"
    ]


def test_kinds_of_masks(tmp_path):
    write_tiles(tmp_path, 1, (64, 64))
    values = numbers()
    palette = Image.fromarray(values, "L")
    palette.putpalette(
        [200, 10, 10, 10, 200, 10, 10, 10, 200]
    )  # mode P: colours on screen, numbers in the file
    binary = Image.fromarray(values * 100).convert("L").point(lambda v: 255 * (v > 50))
    kinds = {
        "grey.png": (Image.fromarray(values), values),
        "grey.tif": (Image.fromarray(values), values),
        "grey.bmp": (Image.fromarray(values), values),
        "palette.png": (palette, values),
        "one_bit.png": (binary.convert("1"), values > 0),
        "one_bit.tif": (binary.convert("1"), values > 0),
        "0_255.png": (binary, 255 * (values > 0)),
        "grey_rgb.png": (Image.fromarray(values).convert("RGB"), values),
        "grey_rgba.png": (Image.fromarray(values).convert("RGBA"), values),
        "16_bit.png": (Image.fromarray(values.astype(np.uint16)), values),
        "jpeg.jpg": (binary, values > 0),
        "jpeg_rgb.jpg": (binary.convert("RGB"), values > 0),
    }
    assert palette.mode == "P" and kinds["one_bit.png"][0].mode == "1"
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / name, **({"quality": 60} if "jpeg" in name else {}))
        item = mask_item(tmp_path, "tile_000.png", name)
        assert item["unreadable"] == [], name
        assert np.array_equal(item["mask"].numpy(), expected.astype(np.uint8)), name


@pytest.mark.parametrize("values", [range(6), (0, 1), (0, 128, 255), range(0, 256, 16)])
def test_a_jpeg_of_class_numbers_is_refused(tmp_path, values):
    """It gave 100 % mIoU: every number below 128 became class 0."""
    write_tiles(tmp_path, 1, (64, 64))
    y, x = np.mgrid[:64, :64]
    classes = np.array(list(values), np.uint8)
    mask = Image.fromarray(classes[(y // 16 + x // 16) % len(classes)])
    mask.save(tmp_path / "mask.jpg", quality=95)
    with pytest.raises(data.UnreadableTile, match="JPEG changes class numbers; save masks as PNG"):
        data.open_mask(tmp_path / "mask.jpg")
    assert mask_item(tmp_path, "tile_000.png", "mask.jpg")["index"] == -1


def test_a_jpeg_that_is_black_or_white_alone_is_a_mask(tmp_path):
    for name, value in (("black", 0), ("white", 255)):
        Image.new("L", (64, 64), value).save(tmp_path / f"{name}.jpg")
        mask = np.array(data.open_mask(tmp_path / f"{name}.jpg"))
        assert (mask == (value > 0)).all()


def test_unfit_masks_are_named_with_a_reason(tmp_path):
    write_tiles(tmp_path, 1, (64, 64))
    values = numbers()
    Image.fromarray(np.stack([values * 50, values, values], -1)).save(tmp_path / "coloured.png")
    Image.fromarray(values.astype(np.uint16) * 300).save(tmp_path / "16_bit.png")
    Image.fromarray(numbers((64, 80))).save(tmp_path / "higher.png")
    Image.fromarray(numbers((128, 128))).save(tmp_path / "twice.png")
    (tmp_path / "text.png").write_text("no mask")
    (tmp_path / "empty.png").write_bytes(b"")
    reasons = {
        "coloured": "one channel",
        "16_bit": "from 0 to 255",
        "higher": "as large as its tile",
        "twice": "as large as its tile",
        "text": "damaged",
        "empty": "damaged",
        "missing": "does not exist",
    }
    for name, reason in reasons.items():
        item = mask_item(tmp_path, "tile_000.png", f"{name}.png")
        [line] = item["unreadable"]
        assert line.startswith(f"'{tmp_path / name}.png': ") and reason in line
        assert item["mask"].shape == (64, 64) and item["image"].shape == (
            3,
            64,
            64,
        )  # so that a batch can be stacked
    Image.fromarray(values).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    [line] = mask_item(tmp_path, "broken.png", "good.png")["unreadable"]
    assert line.startswith(f"'{tmp_path / 'broken.png'}': damaged")
    with pytest.raises(InputError, match="over 1 % of 1 tiles are unreadable: .*coloured.png"):
        list(
            data.batches(
                CentreTiles(tmp_path, 64, ["tile_000.png"], {"mask": ["coloured.png"]}), range(1), 1
            )
        )


def test_a_tile_without_a_mask_is_named(tmp_path):
    write_masks(tmp_path, 10)
    (tmp_path / "masks" / "tile_004.png").unlink()
    files, targets = labelled_files(str(tmp_path))["train"]
    dataset = CentreTiles(tmp_path, 64, files, targets)
    unreadable = []
    for k in range(len(dataset)):
        unreadable += dataset[k]["unreadable"]
    assert unreadable == [f"'{tmp_path}/masks/tile_004.png': does not exist"]


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 90), (81, 64)])
def test_a_mask_is_cut_exactly_as_its_tile(tmp_path, size):
    """Where nothing has to be resized: a tile whose pixels are its mask."""
    values = np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(values).convert("RGB").save(tmp_path / "tile.png")
    Image.fromarray(values).save(tmp_path / "mask.png")
    item = mask_item(tmp_path, "tile.png", "mask.png")
    assert item["mask"].dtype == torch.uint8 and item["mask"].shape == (64, 64)
    assert all(torch.equal(item["mask"], channel) for channel in item["image"])
    assert item["mask"].unique().numel() > 200


@pytest.mark.parametrize("size", [(256, 128), (200, 320), (48, 30), (97, 71)])
def test_a_resized_mask_stays_under_its_tile(tmp_path, size):
    """Light where the mask is 7, dark where it is 2: the same edges, to the pixel that a resize may
    blur.
    """
    y, x = (np.mgrid[: size[1], : size[0]] - np.array(size[::-1])[:, None, None] / 2) / min(
        size
    )  # 0 at the centre
    values = np.where(np.hypot(x + 0.2, y - 0.05) < 0.35, 7, 2).astype(np.uint8)
    Image.fromarray((values > 4).astype(np.uint8) * 255).convert("RGB").save(tmp_path / "tile.png")
    Image.fromarray(values).save(tmp_path / "mask.png")
    item = mask_item(tmp_path, "tile.png", "mask.png")
    assert item["mask"].unique().tolist() == [2, 7]  # class numbers are never mixed
    light, labelled = item["image"][0] > 127, item["mask"] == 7
    assert 0.1 < labelled.float().mean() < 0.9
    assert (light != labelled).float().mean() < 0.02
    for shift in ((0, 2), (2, 0), (0, -2), (-2, 0)):
        assert (light.roll(shift, (0, 1)) != labelled).float().mean() > 0.02


# ---- the command line ----------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def few_tiles(monkeypatch):
    monkeypatch.setattr(evaluate, "N_TILES", 24)
    monkeypatch.setattr(evaluate, "SHORTLIST", 4)  # five of them are no more than these tiles


def write_run(folder, nested=(4, 8), seed=0, teachers=(), **arch):
    """A run folder as train.py leaves it, of a student with random weights."""
    arch = STUDENTS["toy"] | arch
    student = randomise(Student(arch), seed)
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
            data.run_program(evaluate.main)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1, lines
        return lines[0]

    return refused


def write_tissue(root):
    """A labelled folder of drawn tissue, the class being the tissue; so many that kNN errs."""
    for split, stream, n in (("train", "bank", 90), ("test", "test", 60)):
        for k in range(n):
            image, _, tissue, _ = data.draw_tissue(stream, 0, k)
            (root / split / str(tissue)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / split / str(tissue) / f"{k:03d}.png")
    return root


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    return write_tissue(tmp_path_factory.mktemp("tissue"))


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
    rows = model_rows(result)
    assert [row["dim"] for row in rows] == [4, 8, 48] and {row["model"] for row in rows} == {
        str(run)
    }
    [(_, scores)] = rows[-1]["scores"].items()
    assert (
        scores["knn"] == scores["linear"] == {"accuracy": 1.0, "balanced_accuracy": 1.0}
    )  # dark against light
    assert scores["retrieval"] == dict.fromkeys(("Acc@1", "mMV@5"), 1.0)  # of two classes
    assert scores["adaptive"] == {"Acc@1": 1.0, "work": 1.0} and "dense" not in scores  # no masks
    count = sum(p.numel() for p in load_student(run)[0].backbone.parameters())
    assert all(row["parameters"] == count for row in rows)
    assert "100.0" in capsys.readouterr().out


def test_results_hold_protocol_counts_seed_and_versions(tmp_path, run, cli, tissue):
    cli(run, "--data", tissue, "--tasks", "knn,linear", "--seed", 5)
    result = results(run)[str(tissue)]
    words = {"chance", "colour histogram", "intervals", "differences"}
    assert set(result["protocol"]) == {"knn", "linear"} | words
    assert "k = 20" in result["protocol"]["knn"] and "0.07" in result["protocol"]["knn"]
    assert all(row["n"] == {"train": 90, "test": 60} for row in result["rows"])
    assert result["seed"] == 5 and result["unreadable"] == []
    assert result["torch"] == torch.__version__ and "centre" in result["tiles"]


def test_every_task_on_drawn_tissue(run, cli):
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
                for metric, value in metrics.items():
                    assert 0 <= value <= (2 if metric == "work" else 1)
    assert not list(run.glob("*.png"))  # pictures are drawn by extras.figures


@pytest.mark.parametrize("task", ["knn", "linear", "retrieval", "adaptive", "dense"])
def test_one_task_alone(run, cli, task):
    cli(run, "--tasks", task, "--dims", 7)
    [row] = model_rows(results(run)["synthetic tissue"])
    assert row["dim"] == 7
    labels = {"nuclei"} if task == "dense" else {"cells", "tissue"}
    assert {label: set(scores) for label, scores in row["scores"].items() if scores} == {
        key: {task} for key in labels
    }
    protocol = results(run)["synthetic tissue"]["protocol"]
    assert protocol.keys() & evaluate.TASKS.keys() == {task}


def test_seed_and_seed_alone_changes_synthetic_tissue(run, cli):
    scores = []
    for seed in (0, 0, 1):
        cli(run, "--tasks", "retrieval", "--dims", 48, "--seed", seed)
        *_, result = results(run).values()
        scores.append(result["rows"][0]["scores"])
    assert set(results(run)) == {"synthetic tissue", "synthetic tissue (2)"}  # other tiles
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
        (["--dims", "7,49"], "--dims: 49 .* width .* 48"),
        (["--dims", "0"], "--dims"),
        (["--embed", tissue, "--dim", 49, "--out", out], "--dim: 49 .* width .* 48"),
        (["--dim", 7], "--dim.* --embed DIR; .*extras.export"),
        (["--dim", 7, "--out", "student-7.pt"], "--dim.* --embed DIR; .*extras.export"),
        (["--embed", tissue], "--out"),
        (["--embed", tissue, "--out", out, "--tasks", "knn"], "--embed: .*--tasks"),
        (["--embed", tissue, "--out", out, "--data", tissue], "--embed: .*--data"),
        (["--embed", tissue, "--out", out, "--dims", "4"], "--embed: .*--dims"),
        (["--embed", tissue, "--out", out, "--teachers", ""], "--embed: .*--teachers"),
        ([run.parent / "run/student.pt", "--embed", tissue, "--out", out], "one RUN"),
        (["--embed", tissue, "--out", tmp_path / "exists.pt"], "--out: .*exists.pt exists"),
        (["--out", tmp_path / "exists.pt"], "--out: .*exists.pt is a file"),
        (["--teachers", "unicorn"], "--teachers: no teacher is called 'unicorn'"),
        (["--teachers", "gpfm", "--weights-dir", tmp_path], "no weights for gpfm"),
        (["--data", tmp_path / "none"], "--data: .*none"),
        (["--data", ""], "--data"),
        (["--embed", tmp_path / "none", "--out", out], "--embed: .*none is no folder"),
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
        alone[folder] = model_rows(results(folder)[str(tissue)])
    assert alone[run][-1]["scores"] != alone[other][-1]["scores"]
    capsys.readouterr()
    cli(run, other / "student.pt", "--data", tissue, "--tasks", "knn,retrieval")
    assert results(run) == results(other)  # the same in both folders
    rows = model_rows(results(run)[str(tissue)])
    assert [row["dim"] for row in rows] == [4, 8, 48, 16, 48]
    assert [row["scores"] for row in rows] == [row["scores"] for row in alone[run] + alone[other]]
    table = capsys.readouterr().out
    assert str(run) in table and str(other / "student.pt") in table


def test_students_of_two_sizes_stand_side_by_side(tmp_path, run, cli, tissue):
    small = write_run(tmp_path / "small", nested=(8,), img_size=32)
    alone = {}
    for folder in (run, small):
        cli(folder, "--data", tissue, "--tasks", "knn", "--dims", "8")
        alone[folder] = model_rows(results(folder)[str(tissue)])
    cli(run, small, "--data", tissue, "--tasks", "knn", "--dims", "8")
    assert [row["scores"] for row in model_rows(results(run)[str(tissue)])] == [
        row["scores"] for row in alone[run] + alone[small]
    ]
    cli(run, small, "--dims", "8")  # and with masks drawn at both sizes
    for row in model_rows(results(run)["synthetic tissue"]):
        assert row["scores"]["nuclei"]["dense"]["Dice"] > 0.3


def test_the_dense_probe_of_a_run_does_not_depend_on_what_stands_beside_it(
    tmp_path, run, cli, monkeypatch
):
    """Also where it is fitted on a part of the tokens, as on the default number of synthetic
    tiles.
    """
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
    # the run's offline teachers by default, at their full width
    rows = model_rows(results(run)["synthetic tissue"])
    assert [(row["model"], row["dim"]) for row in rows] == [
        (str(run), 8),
        ("teacher toy_cells", 128),
    ]
    cli(run, "--tasks", "knn", "--dims", "8", "--teachers", "toy_tissue,toy_cells")
    models = [row["model"] for row in model_rows(results(run)["synthetic tissue"])]
    assert models == [str(run), "teacher toy_tissue", "teacher toy_cells"]
    cli(run, "--tasks", "knn", "--dims", "8", "--teachers", "")
    assert [row["model"] for row in model_rows(results(run)["synthetic tissue"])] == [str(run)]


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


def test_two_folders_of_one_name_never_share_results(
    tmp_path, run, cli, tissue, monkeypatch, capsys
):
    """Typed alike in two places; and one folder typed in several ways."""
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        if place == "one":
            (tmp_path / place / "labelled").symlink_to(tissue)
        else:
            write_tissue(tmp_path / place / "labelled")
        cli(run, "--data", "labelled", "--tasks", "knn", "--dims", 8)
    assert set(results(run)) == {"labelled", "labelled (2)"}
    first = results(run)["labelled"]
    assert first["data"] == str(tissue) != results(run)["labelled (2)"]["data"]
    capsys.readouterr()
    for typed in ("labelled/", "./labelled"):
        cli(run, "--data", typed, "--tasks", "knn", "--dims", 4)
        assert set(results(run)) == {"labelled", "labelled (2)"}
        assert results(run)["labelled (2)"]["rows"][0]["dim"] == 4
        assert "labelled (2): " in capsys.readouterr().out
    assert results(run)["labelled"] == first


def test_a_long_data_path_loses_nothing(tmp_path, run, cli):
    """0.1.0 made a file name of it, and an evaluation ended in "File name too long"."""
    root = tmp_path
    for name in ("x" * 100, "y" * 100, "z" * 100):
        root = root / name
    for split in ("train", "test"):
        for name in "ab":
            write_tiles(root / split / name, 3)
    cli(run, "--data", root, "--tasks", "knn")
    assert results(run)[str(root)]["rows"]


def test_a_run_folder_that_cannot_be_written_loses_nothing(
    tmp_path, run, refused, capsys, monkeypatch
):
    """The table is printed first, then one line names --out; other folders get their results."""
    other = write_run(tmp_path / "other", seed=1)
    save = evaluate.save_atomically

    def read_only(content, path, *write):
        if Path(path).parent == run:
            raise InputError(f"cannot write {path}: Read-only file system; choose another folder")
        save(content, path, *write)

    monkeypatch.setattr(evaluate, "save_atomically", read_only)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), str(other), "--tasks", "knn"])
    with pytest.raises(SystemExit) as stop:
        data.run_program(evaluate.main)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "tiles to learn from" in printed.out and "balanced" in printed.out
    [line] = printed.err.splitlines()
    assert f"cannot write {run / 'results.json'}" in line and "--out" in line
    assert not (run / "results.json").exists() and results(other)


def test_results_go_to_the_folder_that_out_names(tmp_path, run, cli, refused):
    other = write_run(tmp_path / "other", seed=1)
    cli(run, other, "--tasks", "knn", "--out", tmp_path / "new" / "folder")
    rows = model_rows(results(tmp_path / "new" / "folder")["synthetic tissue"])
    assert {row["model"] for row in rows} == {str(run), str(other)}
    assert not (run / "results.json").exists() and not (other / "results.json").exists()
    (tmp_path / "file").write_text("mine")
    assert "--out" in refused(run, "--tasks", "knn", "--out", tmp_path / "file")


def test_what_the_demo_calls(tmp_path, weights_dir, capsys):
    """As train.py ends: a teacher and the student that it holds, one task, the run's folder."""
    student = bright_patches()
    teacher = load_teacher("toy_cells", weights_dir, steps=2)
    models = {"teacher toy_cells": (teacher, [teacher.embed_dim]), "student": (student, [4, 48])}
    result = evaluate.run_tasks(models, None, 3, ["knn"])
    evaluate.print_result(result)
    table = capsys.readouterr().out
    for words in (
        "cells, %, 24 tiles to learn from, 24 to test",
        "seed 3",
        "k = 20",
        "teacher toy",
    ):
        assert words in table
    evaluate.save_result(result, "synthetic tissue", tmp_path)
    rows = model_rows(results(tmp_path)["synthetic tissue"])
    assert [(row["model"], row["dim"]) for row in rows] == [
        ("teacher toy_cells", 128),
        ("student", 4),
        ("student", 48),
    ]
    assert set(rows[0]["scores"]) == {"cells", "tissue"}
    assert list(rows[0]["scores"]["cells"]["knn"]) == ["balanced_accuracy", "accuracy"]


def test_labels_csv_with_spaces_after_its_commas(tmp_path):
    (tmp_path / "labels.csv").write_text(
        "path, label, split\na.png, x, train\nb c.png, y , train \nd.png, x, test\n e.png,y,test\n"
    )
    found = as_pairs(tmp_path)
    assert found["train"] == [("a.png", 0), ("b c.png", 1)]
    assert found["test"] == [("d.png", 0), ("e.png", 1)]


def test_unreadable_tiles_are_left_out_and_named(tmp_path, run, cli, capsys):
    root = tmp_path / "labelled"
    for split, n in (("train", 129), ("test", 70)):
        for name in ("a", "b"):
            write_tiles(root / split / name, n, (64, 64))
    # the last of the fixed order, so that it is alone in the last batch
    train, test = (labelled_files(str(root))[split] for split in ("train", "test"))
    assert len(train[0]) % 64 == 2  # 258 tiles, two of them: below one per cent
    for file in (train[0][-1], train[0][-2]):
        (root / file).write_bytes(b"broken")
    cli(run, "--data", root, "--tasks", "knn", "--dims", "8")
    err, result = capsys.readouterr().err, results(run)[str(root)]
    named = [line.split("': ")[0] for line in result["unreadable"]]
    assert named == sorted(f"'{root / file}" for file in train[0][-2:])
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
    [row] = model_rows(result)
    assert row["scores"]["class"]["knn"] == pytest.approx(figures(evaluate.knn, *sides), abs=1e-3)


def test_a_mask_that_is_missing_is_left_out_of_the_dense_probe(tmp_path, run, cli, capsys):
    write_quadrants(tmp_path / "d" / "train", 130, (64, 64))
    write_quadrants(tmp_path / "d" / "test", 8, (64, 64))
    (tmp_path / "d" / "train" / "masks" / "17.png").unlink()
    cli(run, "--data", tmp_path / "d", "--tasks", "dense", "--dims", "48")
    result = results(run)[str(tmp_path / "d")]
    [line] = result["unreadable"]
    assert line.endswith("masks/17.png': does not exist")
    assert "masks/17.png" in capsys.readouterr().err
    [row] = model_rows(result)
    assert next(iter(row["scores"].values()))["dense"]["mIoU"] > 0.9


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


# ---- files for other tools -----------------------------------------------------------------------
def test_embed_batches_do_not_matter():
    student = randomise(Student("toy"))
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    whole, parts = evaluate.embed(student, images), evaluate.embed(student, images, batch_size=2)
    torch.testing.assert_close(whole, parts)
    with torch.no_grad():
        torch.testing.assert_close(whole, student(images)["summary"])


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
