"""What every metric promises; a new one inherits these tests by its name in `CALLS`."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from sfda_tune.metrics import METRICS, describe_metrics, get_metric

PRIORS = {"imagenet", "params"}  # computed from names
LOGITS = {"leep", "nce"}  # take the outputs of the source classifier in place of features
ELSEWHERE = {"sfda"}  # test_sfda.py
CALLS = sorted(set(METRICS) - PRIORS - ELSEWHERE)
BLIND = {"tmi"}  # does not measure separation, by its definition


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with threadpool_limits(1):
        yield


def call(name, X, y):
    if name in LOGITS:
        return METRICS[name](None, y, logits=X)
    return METRICS[name](X, y)


def samples(seed, N, D, C, separation=1.0):
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(N) % C)
    y[rng.random(N) < 0.2] = 0  # classes of different size
    mixing = np.eye(D) + 0.2 * rng.normal(size=(D, D)) / np.sqrt(D)
    return separation * rng.normal(size=(C, D))[y] + rng.normal(size=(N, D)) @ mixing, y


SHAPES = [(90, 12, 4), (40, 70, 3), (30, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_row_order_and_label_names_do_not_matter(name, shape):
    for seed in range(2):
        X, y = samples(seed, *shape)
        expected = call(name, X, y)
        order = np.random.default_rng(seed).permutation(len(y))
        permuted = call(name, X[order], y[order])
        assert permuted.value == pytest.approx(expected.value, abs=1e-8, rel=1e-8)
        if expected.per_sample is not None:
            assert permuted.per_sample == pytest.approx(expected.per_sample[order], abs=1e-7)
        for renamed in (
            np.random.default_rng(seed).permutation(shape[2])[y],
            [("class", -int(c)) for c in y],
            [("x", 1, 2.5, "y", (0,))[c] for c in y],
            np.array(list("dbcae"))[y],
        ):
            value = call(name, X, renamed).value
            assert value == pytest.approx(expected.value, abs=1e-8, rel=1e-8)


@pytest.mark.parametrize("name", CALLS)
def test_the_input_is_never_changed_and_nothing_is_random(name):
    for shape in SHAPES:
        X, y = samples(0, *shape)
        before = X.copy(), y.copy()
        X.flags.writeable = y.flags.writeable = False
        first = call(name, X, y)
        assert call(name, X, y).value == first.value
        np.testing.assert_array_equal(X, before[0])
        np.testing.assert_array_equal(y, before[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(set(CALLS) - BLIND))
def test_separable_features_beat_noise(name, shape):
    for seed in range(3):
        X, y = samples(seed, *shape, separation=5.0)
        noise = samples(seed + 100, *shape, separation=0.0)[0]
        score, chance = call(name, X, y).value, call(name, noise, y).value
        if name == "etran" and shape[0] < shape[1]:
            assert score == chance == 1  # the documented saturation
        else:
            assert score > chance


@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_plain(name):
    for shape in SHAPES:
        X, y = samples(0, *shape)
        result = call(name, X.astype(np.float32), y)
        assert np.isfinite(result.value)
        assert result.details["n_samples"] == shape[0]
        assert result.details["dtype"] in ("float32", "float64")
        if result.per_sample is not None:
            assert result.per_sample.shape == (shape[0],)
            assert not result.per_sample.flags.writeable
        assert json.loads(json.dumps(dict(result.details)))


@pytest.mark.parametrize("name", CALLS)
def test_float32_and_containers(name):
    import torch

    X, y = samples(0, 60, 6, 3)
    X = X.astype(np.float32)
    expected = call(name, X.astype(np.float64), y).value
    for same in (X, torch.as_tensor(X).requires_grad_(), X.tolist(), np.asfortranarray(X)):
        assert call(name, same, torch.as_tensor(y)).value == pytest.approx(expected, abs=1e-8)


rng = np.random.default_rng(7)
Y = np.repeat([0, 1, 2], [30, 20, 10])
NARROW, WIDE = rng.normal(size=(60, 8)), rng.normal(size=(60, 150))
DEGENERATE = {
    "singleton": (NARROW, np.where(np.arange(60) == 0, 9, Y)),
    "two samples of one class, one of another": (NARROW[:3], [0, 0, 1]),
    "constant": (np.full((60, 8), 0.1), Y),
    "zero": (np.zeros((60, 150)), Y),
    "no scatter": (np.eye(3, 8)[Y], Y),
    "no scatter, tied means": (np.eye(3, 8)[np.minimum(Y, 1)], Y),
    "dead columns": (np.hstack([NARROW, np.zeros((60, 5))]), Y),
    "equal columns": (np.hstack([NARROW, NARROW]), Y),
    "one column": (NARROW[:, :1], Y),
    "one direction": (np.outer(NARROW[:, 0], np.ones(8)), Y),
    "equal rows": (np.vstack([WIDE[:30], WIDE[:30]]), Y),
    "an offset": (NARROW + 1e6, Y),
    "huge": (1e6 * NARROW, Y),
    "tiny": (1e-6 * NARROW, Y),
    "tiny, wide": (1e-6 * WIDE, Y),
    "next to nothing": (1e-200 * NARROW, Y),
    "all singletons but two": (NARROW, np.maximum(np.arange(60), 1)),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", CALLS)
def test_degenerate_input_is_finite_and_silent(name, case):
    X, y = DEGENERATE[case]
    result = call(name, X, y)
    assert np.isfinite(result.value)
    if result.per_sample is not None:
        assert np.isfinite(result.per_sample).all()


@pytest.mark.parametrize("name", CALLS)
def test_the_state_of_warnings_is_left_alone(name):
    before = list(warnings.filters)
    call(name, NARROW, Y)
    assert list(warnings.filters) == before


BAD = {
    "not finite": (np.where(np.arange(8) == 3, [[np.nan]] * 5 + [[1]] * 55, NARROW), Y),
    "infinite": (np.where(np.arange(60)[:, None] == 7, -np.inf, NARROW), Y),
    "one class": (NARROW, ["cat"] * 60),
    "no rows": (np.empty((0, 8)), []),
    "no columns": (np.empty((60, 0)), Y),
    "too few labels": (NARROW, Y[:-1]),
    "one axis": (NARROW[:, 0], Y),
    "strings": (NARROW.astype(str), Y),
    "complex": (NARROW + 0j, Y),
    "ragged": ([[1.0], [1.0, 2.0]], [0, 1]),
    "too large": (1e80 * NARROW, Y),
    "NaN label": (NARROW, np.where(np.arange(60) == 4, np.nan, Y)),
    "label axes": (NARROW, Y[:, None]),
}
MESSAGES = {
    "not finite": r"`X` must be finite but 5 of 60 rows .* first is row 0; drop those rows",
    "infinite": r"`X` must be finite but 1 of 60 rows .* first is row 7; drop",
    "one class": r"`labels` must hold at least two classes but every label is 'cat'; .* pass",
    "no rows": r"`X` must have at least one row .* has shape \(0, 8\); check",
    "no columns": r"`X` must have at least one row and one column .* \(60, 0\); check",
    "too few labels": r"`labels` must hold one label per row .* 59 labels and 60 rows; pass",
    "one axis": r"`X` must be two-dimensional .* has shape \(60,\); pool or flatten",
    "strings": r"`X` must be .* real numbers but its dtype is <U\d+; convert",
    "complex": r"`X` must be .* real numbers but its dtype is complex128; convert",
    "ragged": r"`X` must be .* cannot build it from list .*; give every row the same",
    "too large": r"`X` must not exceed 1e\+75 .* spans -\d.*e\+80 to \d.*e\+80; divide",
    "NaN label": r"`labels` must not hold missing values but row 4 is nan",
    "label axes": r"`labels` must be one-dimensional .* has shape \(60, 1\)",
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", CALLS)
def test_bad_input_says_what_to_do(name, case):
    message = MESSAGES[case].replace("`X`", "`logits`" if name in LOGITS else "`features`")
    with pytest.raises(ValueError, match=message):
        call(name, *BAD[case])


@pytest.mark.parametrize("name", sorted(LOGITS | PRIORS))
def test_metrics_that_need_more_than_features_say_what(name):
    needs = {info.name: info.needs for info in describe_metrics()}[name]
    assert needs == (("logits",) if name in LOGITS else ("prior",))
    with pytest.raises(ValueError, match=rf"{needs[0]}.*; call `{name}"):
        get_metric(name)(NARROW, Y)


OPTIONS = [
    ("hscore", "shrinkage", [0, 1.5, "a", True, np.nan], r"a number in \(0, 1\]"),
    ("transrate", "epsilon", [0, -1, np.inf, None], "a number > 0"),
    ("gbc", "n_components", [0, 1.5, True], "an integer ≥ 1"),
    ("parc", "max_samples", [2, 100.0], "an integer ≥ 3"),
    ("nleep", "components_per_class", [0, 2.5], "an integer ≥ 1"),
    ("nleep", "covariance", ["tied", None], "one of 'full', 'diag', 'spherical'"),
    ("ped", "radius", [0, -1, "a"], "a number > 0"),
    ("ped", "step", [0, np.nan], "a number > 0"),
    ("ped", "exit_ratio", [-0.5], "a number > 0"),
    ("ped", "base", ["ped"], "another metric"),
    ("pactran", "a", [0, "1"], "a number > 0"),
    ("pactran", "s", [-1.0, np.inf], "a number > 0"),
    ("knn", "k", [0, (), (1, -1), 2.5], "integer"),
    ("linear_probe", "grid", [(), (0,), (1, np.inf)], "number"),
    ("linear_probe", "n_folds", [1, 2.5], "an integer ≥ 2"),
]


@pytest.mark.parametrize(("name", "option", "values", "rule"), OPTIONS)
def test_a_bad_option_is_refused(name, option, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=f"`{option}` must .*{rule}.* but is|another metric"):
            METRICS[name](NARROW, Y, **{option: value})
