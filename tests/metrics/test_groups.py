"""Groups: what is left out together, against explicit refits."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from sfda_tune.metrics import _fisher
from sfda_tune.metrics.knn import knn
from sfda_tune.metrics.linear_probe import linear_probe
from sfda_tune.metrics.sfda import sfda
from sfda_tune.values.features import MetricResult


def terms(result: MetricResult) -> np.ndarray:
    assert result.per_sample is not None
    return result.per_sample


def refit(X: np.ndarray, y: np.ndarray, groups: np.ndarray, lam: float) -> np.ndarray:
    """Log p' of every row and class by a fit of the rows outside its group, one by one.

    Scale, λ and the ridge are those of all rows, as `sfda` states.
    """
    N, D = X.shape
    X = X / np.where(X.std(0) > 0, X.std(0), 1)
    classes = np.unique(y)

    def within(rows: np.ndarray) -> np.ndarray:
        S = np.zeros((D, D))
        for c in np.unique(y[rows]):
            Z = X[rows][y[rows] == c]
            Z = Z - Z.mean(0)
            S += Z.T @ Z
        return S / len(rows)

    ridge = lam * np.trace(within(np.arange(N))) / D
    out = np.full((N, len(classes)), -np.inf)
    for g in np.unique(groups):
        rest = np.flatnonzero(groups != g)
        S = (1 - lam) * within(rest) + N / len(rest) * ridge * np.eye(D)
        for n in np.flatnonzero(groups == g):
            for k, c in enumerate(classes):
                members = rest[y[rest] == c]
                if len(members):
                    v = X[n] - X[members].mean(0)
                    out[n, k] = np.log(len(members)) - 0.5 * v @ np.linalg.solve(S, v)
    return out - np.logaddexp.reduce(out, axis=1, keepdims=True)


def problem(N: int, D: int, sizes: list[int], C: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(N) % C)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    X = rng.normal(size=(N, D)) + 1.5 * rng.normal(size=(C, D))[y]
    return X + 0.5 * rng.normal(size=(len(sizes), D))[groups], y, groups


UNEQUAL = [1, 1, 1, 2, 2, 3, 4, 5, 7, 9, 5]
CASES = {
    "unequal": lambda: problem(40, 6, UNEQUAL, 3),
    "more features than images": lambda: problem(40, 90, UNEQUAL, 3),
    "two classes": lambda: problem(40, 12, [4] * 10, 2),
    "two groups": lambda: problem(40, 8, [20, 20], 3),
    "many classes": lambda: problem(40, 50, UNEQUAL, 13),
}


def whole_class(N: int, D: int):
    X, y, groups = problem(N, D, [3] * (N // 3), 3, seed=1)
    groups = groups.copy()
    groups[y == 2] = 0  # and rows of other classes
    return X, y, groups


def one_class_groups(N: int, D: int):
    X, y, _ = problem(N, D, [N], 3, seed=2)
    return X, y, y * 10 + np.arange(N) % 4


CASES |= {
    "a whole class": lambda: whole_class(36, 7),
    "a whole class, dual": lambda: whole_class(36, 60),
    "groups within classes": lambda: one_class_groups(36, 7),
    "groups within classes, dual": lambda: one_class_groups(36, 60),
}


def singular():
    X, y, groups = problem(40, 5, UNEQUAL, 3, seed=3)
    return np.hstack([X, X, X[:, :2] @ np.ones((2, 3)), np.ones((40, 1))]), y, groups


CASES["singular scatter"] = singular


@pytest.mark.parametrize("lam", [0.5, 0.1, 0.99])
@pytest.mark.parametrize("case", CASES)
def test_leaving_out_a_group_in_closed_form_is_a_refit_without_it(case, lam):
    X, y, groups = CASES[case]()
    expected = refit(X, y, groups, lam)
    own = expected[np.arange(len(y)), y]
    result = sfda(X, y, shrinkage=lam, groups=groups)
    judged = np.isfinite(own)
    assert np.abs(np.log(terms(result)[judged]) - own[judged]).max() < 1e-9
    assert (terms(result)[~judged] == 0).all()
    assert result.value == pytest.approx(np.exp(own[judged]).mean(), abs=1e-9)
    assert result.details["n_singletons"] == (~judged).sum()
    assert result.details["n_guarded"] == 0
    hits = expected.argmax(1) == y
    assert result.details["accuracy"] == pytest.approx(hits[judged].mean())


@pytest.mark.parametrize("dims", [6, 90])
def test_both_paths_and_both_backends_leave_out_groups_alike(dims, monkeypatch):
    torch = pytest.importorskip("torch")
    X, y, groups = problem(40, dims, UNEQUAL, 3)
    here = sfda(X, y, groups=groups)
    ops = _fisher.TorchOps(torch.device("cpu"))
    on_torch = functools.partial(_fisher.load, ops=ops)
    with monkeypatch.context() as patch:
        patch.setattr("sfda_tune.metrics.sfda.load", on_torch)
        there = sfda(X, y, groups=groups)
    assert np.abs(terms(there) - terms(here)).max() < 1e-12
    init = _fisher.Samples.__init__

    def other_path(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.dual = not self.dual

    monkeypatch.setattr(_fisher.Samples, "__init__", other_path)
    assert np.abs(terms(sfda(X, y, groups=groups)) - terms(here)).max() < 1e-10


@pytest.mark.parametrize("dims", [6, 90])
def test_groups_of_one_image_are_no_groups(dims):
    X, y, _ = problem(40, dims, UNEQUAL, 3)
    alone = sfda(X, y, groups=[f"g{n}" for n in range(40)])
    assert alone.value == sfda(X, y).value
    assert (terms(alone) == terms(sfda(X, y))).all()


def test_neither_the_order_of_rows_nor_the_names_of_groups_matter():
    X, y, groups = problem(40, 30, UNEQUAL, 3)
    at = np.random.default_rng(5).permutation(40)
    names = np.array(list("kjihgfedcba"))[groups]
    there = sfda(X[at], y[at], groups=names[at])
    assert np.abs(terms(there) - terms(sfda(X, y, groups=groups))[at]).max() < 1e-12


def test_with_challenge_and_rules_groups_are_left_out_as_well():
    X, y, groups = problem(60, 10, [6] * 10, 3)
    every: list[dict[str, Any]]
    every = [{"challenge": True}, {"shrinkage": "loo"}, {"shrinkage": "ledoit-wolf"}]
    for options in every:
        assert 0 < sfda(X, y, groups=groups, **options).value < sfda(X, y, **options).value


def test_tiny_shrinkage_is_guarded_and_finite():
    X, y, groups = problem(40, 90, UNEQUAL, 3)
    for lam in (1e-10, 1e-6):
        result = sfda(X, y, groups=groups, shrinkage=lam)
        assert 0 <= result.value <= 1
        assert np.isfinite(terms(result)).all()


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([0] * 40, "at least two groups"),
        ([0, 1] * 19, "one group per row"),
        ([None] + [1] * 39, "missing"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups, said):
    X, y, _ = problem(40, 6, UNEQUAL, 3)
    with pytest.raises(ValueError, match=rf"`groups`.*{said}"):
        sfda(X, y, groups=groups)


def test_groups_that_leave_nothing_to_judge_are_refused():
    X, y, _ = problem(40, 6, UNEQUAL, 3)
    with pytest.raises(ValueError, match="each of the 3 classes lies"):
        sfda(X, y, groups=y)
    with pytest.raises(ValueError, match="variant='official', which leaves nothing out"):
        sfda(X, y, groups=np.arange(40) // 2, variant="official")


def videos(seed: int = 0):
    """Frames of 60 videos in two classes; nothing but the video tells them apart."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(60), 5)
    X = rng.normal(size=(60, 200))[groups] + 0.1 * rng.normal(size=(300, 200))
    return X, groups % 2, groups


@pytest.mark.parametrize("metric", [sfda, knn, linear_probe])
def test_what_leaks_through_groups_is_not_scored(metric):
    X, y, groups = videos()
    assert metric(X, y).value > 0.85
    assert metric(X, y, groups=groups).value < 0.65
    at = np.random.default_rng(1).permutation(300)
    shuffled = metric(X[at], y[at], groups=[f"video {g % 7} {g}" for g in groups[at]])
    assert terms(shuffled) == pytest.approx(terms(metric(X, y, groups=groups))[at])


@pytest.mark.parametrize("metric", [knn, linear_probe])
def test_rivals_take_groups_of_one_as_none_and_refuse_what_cannot_be(metric):
    X, y, _ = problem(40, 6, UNEQUAL, 3)
    assert metric(X, y, groups=range(40)).value == metric(X, y).value
    with pytest.raises(ValueError, match="`groups` must hold at least two groups"):
        metric(X, y, groups=["one"] * 40)
    assert 0 <= metric(X, y, groups=np.arange(40) > 2).value <= 1


def test_a_neighbour_is_never_of_the_own_group():
    X, y = np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), [0, 0, 1, 1]
    assert knn(X, y, k=1).value == 1
    assert knn(X, y, k=(1, 2), groups=[0, 0, 1, 1]).value == 0
