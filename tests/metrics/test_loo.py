"""`sfda(variant="loo")` against refitting without each sample; its invariances and its limits."""

from __future__ import annotations

import re
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import cho_factor, cho_solve
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf_shrinkage, oas
from threadpoolctl import threadpool_limits

from sfda_tune.metrics import _fisher
from sfda_tune.metrics._fisher import GUARD, NumpyOps, Scatter, TorchOps, load
from sfda_tune.metrics.sfda import LAMBDAS, TEMPERATURES, _score, sfda


def loo_log_posterior(x, lam):
    """All log p'(c|x_n), (N, C), in the caller's order of rows; −inf without another sample."""
    out = x.ops.zeros(x.N, x.C)
    with np.errstate(under="ignore"):
        for rows, log_p in Scatter(x).leave_one_out(lam).log_posterior():
            out[rows] = log_p
    return x.unsorted(out)


# N, D, C: more rows than columns, fewer, about as many, one column, more classes than columns
SHAPES = [(90, 20, 5), (50, 80, 4), (52, 50, 3), (50, 52, 3), (30, 1, 3), (60, 4, 11)]
NORMALIZATIONS = ("l2", "standardize", "none")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they save on matrices of this size."""
    with threadpool_limits(1):
        yield


def samples(seed, N, D, C, separation=0.25):
    """Overlapping classes of odd sizes (the first ones large, the last ones small), shuffled."""
    rng = np.random.default_rng(seed)
    sizes = 2 + rng.multinomial(N - 2 * C, 2.0 ** -np.arange(C) / np.sum(2.0 ** -np.arange(C)))
    y = rng.permutation(np.repeat(np.arange(C), sizes))
    mixing = rng.normal(size=(D, D)) / np.sqrt(D)
    X = separation * rng.normal(size=(C, D))[y] + rng.normal(size=(N, D)) @ mixing
    return X + rng.normal(size=D), y


def loo(X, y, shrinkage=None, *, ops=None, dual=None, challenge=False, normalize="l2"):
    """`sfda` with the choice of backend and of path overridden."""
    x = load(X, y, ops)
    if dual is not None:
        x.dual = dual
    return _score(x, "loo", shrinkage, challenge=challenge, normalize=normalize)


def terms_of(result):
    assert result.per_sample is not None
    return result.per_sample


# --- the oracle: fit again, without the sample ------------------------------------------------


def normalized(X, how):
    if how == "l2":
        X = X - X.mean(axis=0)
        return X / np.linalg.norm(X, axis=1, keepdims=True)
    return X / X.std(axis=0) if how == "standardize" else X


def deviations(X, y):
    return X - np.stack([X[y == c].mean(axis=0) for c in range(y.max() + 1)])[y]


def refitted(X, y, lam):
    """log p of each sample, shape (N, C), from means, covariance and priors of the others."""
    N, D = X.shape
    ridge = lam * np.sum(deviations(X, y) ** 2) / N / D  # λ tr(S_W)/D of all samples
    out = np.full((N, y.max() + 1), -np.inf)
    for n in range(N):
        X_n, y_n = np.delete(X, n, axis=0), np.delete(y, n)
        classes, y_n = np.unique(y_n, return_inverse=True)
        M = np.stack([X_n[y_n == c].mean(axis=0) for c in range(len(classes))])
        Z = X_n - M[y_n]
        S = (1 - lam) * Z.T @ Z / (N - 1) + N / (N - 1) * ridge * np.eye(D)
        V = X[n] - M
        distances = np.sum(V.T * cho_solve(cho_factor(S), V.T), axis=0)
        out[n, classes] = log_softmax(np.log(np.bincount(y_n) / (N - 1)) - distances / 2)
    return out


def of_true_class(log_p, y):
    return log_p[np.arange(len(y)), y]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lam", [1.0, 1 - 1e-6, 0.5, 0.1, 1e-3])
def test_the_posterior_is_that_of_a_fit_without_the_sample(shape, lam):
    for seed in range(2):
        X, y = samples(seed, *shape)
        for how in NORMALIZATIONS:
            expected = refitted(normalized(X, how), y, lam)
            for dual in (False, True):
                x = load(X, y)
                x.dual = dual
                x.normalize(how)
                # log p grows like 1/λ where N ≲ D
                assert loo_log_posterior(x, lam) == pytest.approx(expected, abs=1e-9, rel=1e-10)
                result = loo(X, y, lam, dual=dual, normalize=how)
                p = np.exp(of_true_class(expected, y))
                assert result.per_sample == pytest.approx(p, abs=1e-9)
                assert result.value == pytest.approx(p.mean(), abs=1e-9)
                assert result.details["n_guarded"] == 0
                assert result.details["jitter"] == 0


def test_the_oracle_sees_unsaturated_scores():
    """Otherwise the test above would compare ones with ones."""
    for shape in SHAPES:
        X, y = samples(0, *shape)
        assert 0.2 < np.exp(of_true_class(refitted(normalized(X, "l2"), y, 0.5), y)).mean() < 0.9


@pytest.mark.parametrize(
    ("lam", "tolerance"), [(1e-4, 1e-11), (1e-6, 1e-10), (1e-8, 1e-8), (1e-10, 1e-6)]
)
def test_the_dual_path_keeps_its_digits_for_small_lambda(lam, tolerance):
    """1 − āh is of the order of λ here: as a difference it would have no digit left."""
    for seed in range(3):
        X, y = samples(seed, 40, 90, 4)
        expected = refitted_by_span(X, y, lam)
        assert loo_log_posterior(load(X, y), lam) == pytest.approx(expected, rel=tolerance)


def refitted_by_span(X, y, lam):
    """`refitted` for N < D: distances within the span of the deviations and orthogonal to it."""
    N, D = X.shape
    ridge = lam * np.sum(deviations(X, y) ** 2) / N / D * N / (N - 1)
    out = np.empty((N, y.max() + 1))
    for n in range(N):
        X_n, y_n = np.delete(X, n, axis=0), np.delete(y, n)
        M = np.stack([X_n[y_n == c].mean(axis=0) for c in range(y.max() + 1)])
        _, s, V = np.linalg.svd(X_n - M[y_n], full_matrices=False)
        kept = s > 1e-10 * s[0]
        s, V = s[kept], V[kept]
        R = X[n] - M
        inside = R @ V.T
        distances = np.sum(inside**2 / ((1 - lam) * s**2 / (N - 1) + ridge), axis=1)
        distances += np.sum((R - inside @ V) ** 2, axis=1) / ridge
        out[n] = log_softmax(np.log(np.bincount(y_n)) - distances / 2)
    return out


@pytest.mark.parametrize("shape", [(90, 20, 5), (50, 80, 4)])
def test_a_singleton_vanishes_with_its_only_sample(shape):
    X, y = samples(0, *shape)
    y[[3, 17]] = [y.max() + 1, y.max() + 2]
    expected = refitted(normalized(X, "l2"), y, 0.5)
    assert of_true_class(expected, y)[[3, 17]].tolist() == [-np.inf, -np.inf]
    for ops in (None, TorchOps("cpu")):
        x = load(X, y, ops)
        x.normalize("l2")
        assert loo_log_posterior(x, 0.5) == pytest.approx(expected, abs=1e-11)
        result = loo(X, y, ops=ops)
        p = np.exp(of_true_class(expected, y))
        assert result.per_sample == pytest.approx(p, abs=1e-12)
        assert terms_of(result)[[3, 17]].tolist() == [0, 0]
        assert result.value == pytest.approx(np.delete(p, [3, 17]).mean(), abs=1e-12)
        assert result.details["n_singletons"] == 2


@pytest.mark.parametrize("shape", [(90, 20, 5), (50, 80, 4), (60, 4, 11)])
def test_details_are_summaries_of_the_posterior(shape):
    X, y = samples(1, *shape)
    X *= 3
    y[5] = y.max() + 1
    log_p = np.delete(refitted(normalized(X, "none"), y, 0.2), 5, axis=0)
    result = loo(X, y, 0.2, normalize="none")
    y = np.delete(y, 5)
    details = result.details
    scaled = [of_true_class(log_softmax(t * log_p, axis=1), y).mean() for t in TEMPERATURES]
    expected = {
        "mean_probability": np.exp(of_true_class(log_p, y)).mean(),
        "accuracy": np.mean(log_p.argmax(axis=1) == y),
        "log_probability": of_true_class(log_p, y).mean(),
        "log_probability_scaled": max(scaled),
        "temperature": TEMPERATURES[int(np.argmax(scaled))],
    }
    assert {key: details[key] for key in expected} == pytest.approx(expected, abs=1e-10)
    assert result.value == details["mean_probability"]
    assert details["temperature"] < 1
    facts = {
        "variant": "loo",
        "lambda": 0.2,
        "lambda_rule": "fixed",
        "normalize": "none",
        "challenge": False,
        "path": "dual" if shape[0] < shape[1] else "primal",
        "n_singletons": 1,
        "n_guarded": 0,
        "jitter": 0.0,
        "ridge": "lambda * tr(S_W)/D",
    }
    assert facts.items() <= details.items()
    counts = Counter(zip(y.tolist(), log_p.argmax(axis=1).tolist(), strict=True))
    wrong = Counter({pair: n for pair, n in counts.items() if pair[0] != pair[1]})
    found = [tuple(entry) for entry in details["confusions"]]
    most = sorted(((a, b, n) for (a, b), n in wrong.items()), key=lambda e: (-e[2], *e[:2]))
    assert found == most[:30]
    plain = {key: value for key, value in details.items() if key != "confusions"}
    assert all(type(value) in (int, float, str, bool) for value in plain.values())


def test_the_defaults_are_standardised_columns_and_one_half():
    X, y = samples(0, 90, 20, 5)
    result = sfda(X, y, variant="loo")
    assert result.value == sfda(X, y, variant="loo", shrinkage=0.5, normalize="standardize").value
    assert result.details["lambda_rule"] == "default 0.5"
    assert result.details["normalize"] == "standardize"


@pytest.mark.parametrize("shape", [(90, 20, 5), (50, 80, 4)])
def test_the_challenge_mixes_by_leave_one_out_confidence(shape):
    for seed in range(3):
        X, y = samples(seed, *shape)
        for how in NORMALIZATIONS:
            X_1 = normalized(X, how)
            p = np.exp(of_true_class(refitted(X_1, y, 0.3), y))
            M = np.stack([X_1[y == c].mean(axis=0) for c in range(y.max() + 1)])
            others = (M.sum(axis=0) - M) / (len(M) - 1)
            X_2 = p[:, None] * X_1 + (1 - p)[:, None] * others[y]
            expected = np.exp(of_true_class(refitted(X_2, y, 0.3), y))
            for dual in (False, True):
                result = loo(X, y, 0.3, dual=dual, challenge=True, normalize=how)
                assert result.per_sample == pytest.approx(expected, abs=1e-9)
                assert result.details["mean_probability_stage_1"] == pytest.approx(p.mean())
                assert result.details["challenge"] is True
                assert result.details["jitter_stage_2"] == 0


# --- λ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES[:4], (60, 4, 11), (200, 3, 2)])
def test_lambda_rules_equal_scikit_learn(shape):
    for seed in range(3):
        X, y = samples(seed, *shape)
        for how in NORMALIZATIONS:
            Z = deviations(normalized(X, how), y)
            expected = {
                "ledoit-wolf": ledoit_wolf_shrinkage(Z, assume_centered=True),
                "oas": oas(Z, assume_centered=True)[1],
            }
            for rule, lam in expected.items():
                for ops in (None, TorchOps("cpu")):
                    for dual in (False, True):
                        result = loo(X, y, rule, ops=ops, dual=dual, normalize=how)
                        assert result.details["lambda"] == pytest.approx(lam, rel=1e-10)
                        assert result.details["lambda_rule"] == rule


def test_lambda_rules_of_one_column_are_at_their_floor():
    X, y = samples(0, 30, 1, 3)
    for rule in ("ledoit-wolf", "oas"):
        assert loo(X, y, rule, normalize="none").details["lambda"] == 1e-10


@pytest.mark.parametrize("shape", [(90, 20, 5), (50, 80, 4)])
def test_lambda_by_leave_one_out_is_the_best_of_the_grid(shape):
    X, y = samples(0, *shape)
    for ops in (None, TorchOps("cpu")):
        each = [loo(X, y, lam, ops=ops) for lam in LAMBDAS]
        best = max(each, key=lambda result: result.details["log_probability_scaled"])
        result = loo(X, y, "loo", ops=ops)
        assert result.details["lambda"] == best.details["lambda"]
        assert result.details["lambda_rule"] == "loo"
        assert result.value == pytest.approx(best.value, abs=1e-12)
        assert result.per_sample == pytest.approx(terms_of(best), abs=1e-12)
        assert len({each.details["lambda"] for each in each}) == len(LAMBDAS)


def test_the_challenge_keeps_the_lambda_of_its_rule():
    X, y = samples(0, 90, 20, 5)
    for rule in ("ledoit-wolf", "oas", "loo"):
        lam = loo(X, y, rule).details["lambda"]
        result = loo(X, y, rule, challenge=True)
        assert result.details["lambda"] == lam
        assert result.value == pytest.approx(loo(X, y, lam, challenge=True).value, abs=1e-13)


# --- invariances ------------------------------------------------------------------------------


def rotated(X, seed=0):
    return X @ np.linalg.qr(np.random.default_rng(seed).normal(size=(X.shape[1],) * 2))[0]


OPTIONS = [
    {},
    {"challenge": True},
    {"normalize": "l2"},
    {"normalize": "l2", "challenge": True},
    {"normalize": "l2", "shrinkage": "oas"},
    {"normalize": "none"},
    {"normalize": "none", "shrinkage": "ledoit-wolf"},
    {"shrinkage": "oas"},
    {"shrinkage": "loo"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_shift_rotation_row_order_and_names_do_not_matter(shape, options):
    for seed in range(2):
        X, y = samples(seed, *shape)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(y))
        expected = sfda(X, y, variant="loo", **options)
        same = {
            "row order": (X[order], y[order]),
            "names": (X, rng.permutation(y.max() + 1)[y]),
            "shift": (X + 5, y),
            "small": (1e-3 * X, y),
            "large": (1e3 * X, y),
            "tiny": (1e-60 * X, y),
            "huge": (1e60 * X, y),
            "tiniest": (1e-250 * X, y),
        }
        if "normalize" in options:  # standardised columns depend on what the columns are
            same["rotation"] = (rotated(X), y)
        for what, (X_2, y_2) in same.items():
            result = sfda(X_2, y_2, variant="loo", **options)
            assert result.value == pytest.approx(expected.value, abs=1e-10), what
            if what == "row order":
                assert result.per_sample == pytest.approx(terms_of(expected)[order], abs=1e-9)
            elif what != "names":
                assert result.per_sample == pytest.approx(terms_of(expected), abs=1e-9)
        far = sfda(X + 1e6, y, variant="loo", **options).value
        assert far == pytest.approx(expected.value, abs=1e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float32_input_is_computed_in_float64(options):
    for seed, shape in enumerate([(90, 20, 5), (50, 80, 4)]):
        X, y = samples(seed, *shape)
        X32 = X.astype(np.float32)
        result = sfda(X32, y, variant="loo", **options)
        assert result.value == sfda(X32.astype(np.float64), y, variant="loo", **options).value
        assert result.value == pytest.approx(sfda(X, y, variant="loo", **options).value, abs=1e-6)
        assert result.details["dtype"] == "float32"


@pytest.mark.parametrize("shape", [(90, 20, 5), (50, 80, 4)])
def test_the_input_is_never_changed(shape):
    X, y = samples(0, *shape)
    before = X.copy(), y.copy()
    X.flags.writeable = y.flags.writeable = False
    for options in OPTIONS:
        first = sfda(X, y, variant="loo", **options)
        again = sfda(X, y, variant="loo", **options)
        assert again.value == first.value
        np.testing.assert_array_equal(terms_of(again), terms_of(first))
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(y, before[1])


# --- wide features ----------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.9, 0.45])
@pytest.mark.parametrize("options", [{}, {"shrinkage": "ledoit-wolf"}, {"normalize": "none"}])
def test_noise_dimensions_lower_the_value_and_raise_the_official_one(s, options):
    official, values = [], []
    for D in (20, 128, 400, 1024, 2048):
        r = np.random.default_rng(0)
        y = np.arange(500) % 10
        mu = s * r.normal(size=(10, 20))
        X = np.hstack([mu[y] + r.normal(size=(500, 20)), r.normal(size=(500, D - 20))])
        values.append(sfda(X, y, variant="loo", **options).value)
        official.append(sfda(X, y, variant="official").value)
    assert np.all(np.diff(values) < -0.01)
    assert np.all(np.diff(official) >= 0)
    assert official[-1] > 0.999


def test_the_width_table_of_the_design_notes():
    """Mean probability and log-probability, raw features, Ledoit–Wolf; s = 0.9."""
    expected = {20: (0.945, -0.12), 128: (0.916, -0.20), 400: (0.861, -0.41), 1024: (0.735, -1.26)}
    for D, (probability, log_probability) in expected.items():
        r = np.random.default_rng(0)
        y = np.arange(500) % 10
        mu = 0.9 * r.normal(size=(10, 20))
        X = np.hstack([mu[y] + r.normal(size=(500, 20)), r.normal(size=(500, D - 20))])
        result = sfda(X, y, variant="loo", shrinkage="ledoit-wolf", normalize="none")
        assert result.value == pytest.approx(probability, abs=6e-4)
        assert result.details["log_probability"] == pytest.approx(log_probability, abs=6e-3)


def test_few_samples_and_wide_backbones_do_not_tie():
    """78 samples, where `official` gives exactly 1 to most of them."""
    y = np.arange(78) % 6
    values, official = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        for D in (256, 768, 1664, 2208):
            for separation in (0.0, 0.05, 0.1):
                X = rng.normal(size=(78, D)) + separation * rng.normal(size=(6, D))[y]
                values.append(sfda(X, y, variant="loo").value)
                official.append(sfda(X, y, variant="official").value)
    assert len(values) == 96
    assert np.diff(np.sort(values)).min() > 1e-9
    assert sum(value > 1 - 1e-9 for value in official) > 48


def test_labels_at_random_score_like_chance():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 300)
    for D in (50, 1000):
        value = sfda(rng.normal(size=(300, D)), y, variant="loo").value
        assert value == pytest.approx(0.2, abs=0.06)


# --- two backends -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_torch_backend_equals_numpy(shape, options, monkeypatch):
    def forbidden(*_):
        raise AssertionError("the NumPy backend was used")

    X, y = samples(0, *shape)
    y[4] = y.max() + 1
    for dual in {False, shape[1] > 1}:  # N × N of rank 1 at the floor of λ: no digits to compare
        expected = loo(X, y, dual=dual, **options)
        with monkeypatch.context() as patch:
            for name in ("gram", "cholesky", "solve", "norms", "squares", "inverse_squares"):
                patch.setattr(NumpyOps, name, forbidden)
            patch.setattr(NumpyOps, "inverse_diagonals", forbidden)
            result = loo(X, y, ops=TorchOps("cpu"), dual=dual, **options)
        assert result.value == pytest.approx(expected.value, abs=1e-11)
        assert result.per_sample == pytest.approx(terms_of(expected), abs=1e-10)
        for key in ("accuracy", "log_probability_scaled", "temperature", "lambda", "n_guarded"):
            assert result.details[key] == pytest.approx(expected.details[key], abs=1e-10)


@pytest.mark.gpu
def test_a_cuda_tensor_is_scored_on_its_device():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for shape in SHAPES:
        X, y = samples(0, *shape)
        for options in OPTIONS:
            result = sfda(torch.as_tensor(X, device="cuda"), y, variant="loo", **options)
            expected = sfda(X, y, variant="loo", **options)
            assert result.details["device"].startswith("cuda")
            assert result.value == pytest.approx(expected.value, abs=1e-10)


# --- degenerate, but defined ------------------------------------------------------------------

rng = np.random.default_rng(7)
Y = np.repeat([0, 1, 2], [30, 20, 10])
NARROW, WIDE, CENTRES = rng.normal(size=(60, 8)), rng.normal(size=(60, 150)), np.eye(3, 8)

DEGENERATE = {
    "singleton": (NARROW, np.where(np.arange(60) == 0, 9, Y)),
    "singletons but one": (NARROW, np.maximum(np.arange(60), 1)),
    "singletons but one, wide": (WIDE, np.maximum(np.arange(60), 1)),
    "three samples": (NARROW[:3], [0, 1, 1]),
    "three samples, wide": (WIDE[:3], [0, 1, 1]),
    "constant": (np.full((60, 8), 0.1), Y),
    "zero": (np.zeros((60, 150)), Y),
    "no scatter": (CENTRES[Y], Y),
    "no scatter, tied means": (CENTRES[np.minimum(Y, 1)], Y),
    "dead columns": (np.hstack([NARROW, np.full((60, 5), 0.1)]), Y),
    "equal columns": (np.hstack([NARROW, NARROW]), Y),
    "one direction": (np.outer(NARROW[:, 0], np.ones(8)), Y),
    "equal rows": (np.vstack([WIDE[:30], WIDE[:30]]), Y),
    "equal rows, narrow": (np.vstack([NARROW[:30], NARROW[:30]]), Y),
    "a row at the mean": (np.vstack([NARROW - NARROW.mean(0), np.zeros((1, 8))]), [*Y, 2]),
    "one sample has a column of its own": (np.hstack([NARROW, np.eye(60)[:, :1]]), Y),
    "huge": (1e6 * NARROW, Y),
    "tiny": (1e-6 * NARROW, Y),
    "huge, wide": (1e6 * WIDE, Y),
    "tiny, wide": (1e-6 * WIDE, Y),
    "at the limit": (1e75 * np.tanh(NARROW), Y),
    "next to nothing": (1e-158 * NARROW, Y),
    "nothing squared": (1e-200 * NARROW, Y),
    "nothing at all": (1e-290 * NARROW, Y),
    "many scales": (NARROW * 10.0 ** np.arange(-12, 12, 3), Y),
    "one class far away": (np.where(Y[:, None] == 2, 1e70, 1e-70) * NARROW, Y),
    "far too far away": (np.where(Y[:, None] == 2, 1e75, 1e-250) * NARROW / 4, Y),
}


# Each case with each rule, and each way of normalising with each case and each rule.
RULES = ["loo", "ledoit-wolf", "oas", 1.0, 0.5, 1e-10, 1e-300]
TRIPLES = [
    (case, rule, NORMALIZATIONS[(7 * i + k) % 3])
    for i, case in enumerate(DEGENERATE)
    for k, rule in enumerate(RULES)
]


@pytest.mark.parametrize(("case", "shrinkage", "normalize"), TRIPLES)
def test_degenerate_input_is_finite_and_silent(case, shrinkage, normalize):
    X, y = DEGENERATE[case]
    with np.errstate(all="raise"):
        for ops in (None, TorchOps("cpu")):
            for challenge in (False, True):
                result = loo(X, y, shrinkage, ops=ops, challenge=challenge, normalize=normalize)
                terms = terms_of(result)
                assert np.all((terms >= 0) & (terms <= 1 + 1e-12))
                assert 0 <= result.value <= 1 + 1e-12
                assert all(np.isfinite(v) for v in result.details.values() if type(v) is float)


@pytest.mark.parametrize("shrinkage", [None, "loo", "ledoit-wolf", "oas", 1.0, 1e-10])
@pytest.mark.parametrize("case", ["constant", "zero"])
def test_constant_features_leave_the_priors(case, shrinkage):
    X, y = DEGENERATE[case]
    n = np.array([30, 20, 10])
    for normalize in NORMALIZATIONS:
        result = loo(X, y, shrinkage, normalize=normalize)
        assert result.per_sample == pytest.approx((n[Y] - 1) / 59, abs=1e-14)
        assert result.value == pytest.approx(n @ (n - 1) / 59 / 60, abs=1e-14)


def test_classes_without_scatter_are_told_apart():
    for normalize in NORMALIZATIONS:
        result = loo(*DEGENERATE["no scatter"], normalize=normalize)
        assert result.value == pytest.approx(1, abs=1e-12)
        assert result.details["accuracy"] == 1


def test_constant_columns_are_left_out_by_standardisation():
    X, y = DEGENERATE["dead columns"]
    x = load(X, y)
    x.normalize("standardize")
    assert np.all(x.Z[:, 8:] == 0)
    assert np.all(x.M[:, 8:] == 0)


def test_a_row_at_the_mean_stays_at_zero():
    """Its rounding error must not become a unit vector."""
    X, y = DEGENERATE["a row at the mean"]
    x = load(X + 0.1, y)
    x.normalize("l2")
    rows = x.Z + x.M[x.y]
    distances = np.linalg.norm(rows - rows[x.order == 60], axis=1)
    assert np.sort(distances)[1:] == pytest.approx(1, abs=1e-12)


def test_lambda_of_one_is_the_nearest_mean():
    """S̃ ∝ I: nothing of the covariance moves with the sample."""
    for X in (NARROW, WIDE):
        expected = refitted(X, Y, 1.0)
        assert loo_log_posterior(load(X, Y), 1.0) == pytest.approx(expected, abs=1e-10)


def test_guarded_samples_are_counted_and_their_bound_is_safe():
    """A column only one sample has: without it nothing but the ridge is known of its variance.

    The dual path has 1 − āh as a product and needs no guard.
    """
    X, y = DEGENERATE["one sample has a column of its own"]
    for lam, n_guarded in [(0.5, 0), (1e-4, 0), (1e-6, 0), (1e-10, 1)]:
        primal, dual = (loo(X, y, lam, dual=dual, normalize="none") for dual in (False, True))
        assert primal.details["n_guarded"] == n_guarded
        assert dual.details["n_guarded"] == 0
        # N × N of rank 9: the path not meant for this shape has few digits at the floor
        assert primal.per_sample == pytest.approx(terms_of(dual), abs=1e-8 if lam > 1e-8 else 1e-5)
        if lam > 1e-5:
            expected = np.exp(of_true_class(refitted(X, y, lam), y))
            assert primal.per_sample == pytest.approx(expected, abs=1e-8)
        x = load(X, y)
        fits = []
        for x.dual in (False, True):
            fits.append(Scatter(x).leave_one_out(lam))
        assert fits[0].gain == pytest.approx(fits[1].gain, rel=1e-3)
        assert fits[0].gain.max() * lam > 1e-4  # the sample in question
    assert GUARD > 1e-10


def test_a_ridge_below_the_floor_is_raised_and_reported():
    X, y = DEGENERATE["equal columns"]
    details = loo(X, y, 1e-300, normalize="none").details
    assert details["lambda"] == 1e-300
    assert details["jitter"] > 0
    assert loo(X, y, 1e-10, normalize="none").details["jitter"] == 0


# --- errors -----------------------------------------------------------------------------------


def test_all_classes_of_one_sample_are_an_error():
    for X in (NARROW, WIDE):
        with pytest.raises(
            ValueError, match="`labels` must give some class two samples but all 60"
        ):
            sfda(X, np.arange(60), variant="loo")


@pytest.mark.parametrize("shrinkage", [0, -0.1, 1.1, np.nan, np.inf, "0.5", True, [0.5], "Oas"])
def test_a_bad_shrinkage_names_the_rules(shrinkage):
    match = r"`shrinkage` must be a number in \(0, 1\] but is .* other rules are 'ledoit-wolf'"
    with pytest.raises(ValueError, match=match):
        sfda(NARROW, Y, variant="loo", shrinkage=shrinkage)


@pytest.mark.parametrize("normalize", ["L2", "", 2, False, ["l2"]])
@pytest.mark.parametrize("variant", ["loo", "official"])
def test_a_bad_normalize_names_the_valid_ones(normalize, variant):
    with pytest.raises(ValueError, match="`normalize` must be one of 'standardize', 'l2', 'none'"):
        sfda(NARROW, Y, variant=variant, normalize=normalize)


@pytest.mark.parametrize("challenge", [1, None, "yes"])
def test_a_bad_challenge_is_refused(challenge):
    with pytest.raises(ValueError, match="`challenge` must be True or False but is"):
        sfda(NARROW, Y, variant="loo", challenge=challenge)


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_options_of_loo_are_refused_by_the_other_variants(variant):
    for rule in ("ledoit-wolf", "oas", "loo"):
        with pytest.raises(ValueError, match=r"`shrinkage` must be .* belong to variant='loo'"):
            sfda(NARROW, Y, variant=variant, shrinkage=rule)
    with pytest.raises(ValueError, match=f"`challenge` must be False for variant='{variant}'"):
        sfda(NARROW, Y, variant=variant, challenge=True)
    for normalize in NORMALIZATIONS:
        with pytest.raises(ValueError, match=f"`normalize` must be None for variant='{variant}'"):
            sfda(NARROW, Y, variant=variant, normalize=normalize)
    expected = sfda(NARROW, Y, variant=variant).value
    assert sfda(NARROW, Y, variant=variant, challenge=False, normalize=None).value == expected


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype"),
    [(options, (np.float32, np.float64)[k % 2]) for k, options in enumerate(OPTIONS)],
)
@pytest.mark.parametrize("shape", [(1000, 200, 20), (200, 1000, 15), (20000, 50, 10)])
def test_one_copy_of_the_features_and_three_square_matrices(shape, dtype, options):
    N, D, C = shape
    X = np.random.default_rng(0).normal(size=(N, D)).astype(dtype)
    y = np.arange(N) % C
    sfda(X[: 2 * C], y[: 2 * C], variant="loo", **options)  # imports and caches
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        sfda(X, y, variant="loo", **options)
        peak = (tracemalloc.get_traced_memory()[1] - before) / 8
    finally:
        tracemalloc.stop()
    bound = N * D + 3 * min(N, D) ** 2 + 2 * C * D + 2 * C**2 + 2 * N * C * (N < D)
    overhead = 60 * N / 8 + 16 * N + 2**16  # labels as objects, row order, terms of each sample
    assert N * D < peak < bound + overhead


def test_equation_numbers_stand_on_code_and_are_those_of_paper_and_note():
    folder = Path(_fisher.__file__).parent
    fisher, sfda_py = ((folder / name).read_text() for name in ("_fisher.py", "sfda.py"))
    on_code = {
        number
        for line in (fisher + sfda_py).splitlines()
        for number in re.findall(r"\((L?\d)\)", line.partition("  # ")[2])
    }
    note = (folder / "leave_one_out.md").read_text()
    assert set(re.findall(r" \((L\d)\)$", note, re.MULTILINE)) == {n for n in on_code if "L" in n}
    assert {n for n in on_code if "L" not in n} == {str(n) for n in range(1, 8)}
    assert set(re.findall(r"^\((\d)\)  ", sfda_py, re.MULTILINE)) >= {"1", "7"}
