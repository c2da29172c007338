"""`sfda` against eigen-decompositions, scikit-learn and published behaviour; its invariants."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from scipy.linalg import eigh
from scipy.special import log_softmax, softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from threadpoolctl import threadpool_limits

from sfda_tune.metrics import sfda as module
from sfda_tune.metrics._fisher import JITTER, NumpyOps, Scatter, TorchOps, load
from sfda_tune.metrics.sfda import _score

sfda = partial(module.sfda, variant="official")  # "loo" has a file of its own


def posterior(x, lam):
    """p(c|x_n) of regularised LDA with S̃ = (1−λ)S_W + λ(tr S_W/D)I, in the caller's row order."""
    S_W = Scatter(x)
    out = x.ops.zeros(x.N, x.C)
    for rows, log_p in S_W.discriminants(lam, lam * S_W.trace / x.D).log_posterior():
        out[rows] = x.ops.exp(log_p)
    return x.unsorted(out)


VARIANTS = ("official", "paper")
# N, D, C: more rows than columns, fewer, about as many, one column, more classes than columns
SHAPES = [(150, 20, 5), (60, 80, 4), (52, 50, 3), (50, 52, 3), (30, 1, 3), (60, 4, 11)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads cost more than they save on matrices of this size."""
    with threadpool_limits(1):
        yield


def terms_of(result):
    assert result.per_sample is not None
    return result.per_sample


def samples(seed, N, D, C, scale=0.3, separation=0.4):
    """Overlapping classes of odd sizes (the first ones large, the last ones small), shuffled."""
    rng = np.random.default_rng(seed)
    sizes = 2 + rng.multinomial(N - 2 * C, 2.0 ** -np.arange(C) / np.sum(2.0 ** -np.arange(C)))
    y = rng.permutation(np.repeat(np.arange(C), sizes))
    mixing = rng.normal(size=(D, D)) / np.sqrt(D)
    X = separation * rng.normal(size=(C, D))[y] + rng.normal(size=(N, D)) @ mixing
    return scale * X + rng.normal(size=D), y


def force(X, y, variant="official", shrinkage=None, *, ops=None, dual=None):
    """`sfda` with the choice of backend and of path overridden."""
    x = load(X, y, ops)
    if dual is not None:
        x.dual = dual
    return _score(x, variant, shrinkage)


# --- oracles: the steps as they are written down, by dense eigenproblems ----------------------


def statistics(X, y):
    C = y.max() + 1
    q = np.bincount(y) / len(y)
    M = np.stack([X[y == c].mean(axis=0) for c in range(C)])
    S_W = np.zeros((X.shape[1], X.shape[1]))
    for c in range(C):
        S_W += q[c] * np.atleast_2d(np.cov(X[y == c].T, bias=True))
    return q, M, S_W


def confmix(X, y, M, p):
    others = (M.sum(axis=0) - M) / (len(M) - 1)
    return p[:, None] * X + (1 - p)[:, None] * others[y]


def official_by_eigenvectors(X, y, shrinkage=None):
    """The nine steps of the published code; per-sample terms and λ."""
    D, n = X.shape[1], np.arange(len(y))
    S_W = statistics(X, y)[2]
    v, norms = np.ones(D), []
    for _ in range(7):
        v = S_W @ v
        norms.append(np.linalg.norm(v))
        v = v / norms[-1]
    lam = max(np.exp(-5 * norms[-1]), 1e-10) if shrinkage is None else shrinkage

    def stage(X):
        q, M, S_W = statistics(X, y)
        S_T = np.atleast_2d(np.cov(X.T, bias=True))
        S_W = (1 - lam) * S_W + lam * np.trace(S_W) / D * np.eye(D)
        S_T = (1 - lam) * S_T + lam * np.trace(S_T) / D * np.eye(D)
        E = eigh(S_T - S_W, S_W)[1]  # all D of them
        W = E @ E.T @ M.T
        return softmax(X @ W - 0.5 * np.sum(M * W.T, axis=1) + np.log(q), axis=1)

    p = softmax(stage(X), axis=1)[n, y]
    return stage(confmix(X, y, statistics(X, y)[1], p))[n, y], lam


def paper_by_eigenvectors(X, y, shrinkage=None):
    """Equations (1)–(7), scatters divided by N; per-sample terms and λ of both stages."""

    def stage(X):
        q, M, S_W = statistics(X, y)
        sigma = np.linalg.eigvalsh(S_W)[-1]
        lam = max(np.exp(-5 * sigma), 1e-10) if shrinkage is None else shrinkage
        S_B = (M - q @ M).T * q @ (M - q @ M)
        U = eigh(S_B, (1 - lam) * S_W + lam * np.eye(len(S_W)))[1]
        U = U[:, -min(len(S_W), len(M) - 1) :]
        X, M = (X - q @ M) @ U, (M - q @ M) @ U
        log_p = log_softmax(X @ M.T - 0.5 * np.sum(M**2, axis=1) + np.log(q), axis=1)
        return X, M, log_p[np.arange(len(y)), y], lam

    X, M, log_p, lam_1 = stage(X)
    _, _, log_p, lam_2 = stage(confmix(X, y, M, np.exp(log_p)))
    return log_p, (lam_1, lam_2)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shrinkage", [None, 0.9, 0.2, 1e-3])
def test_official_equals_the_published_steps(seed, shrinkage):
    for shape in SHAPES:
        X, y = samples(seed, *shape)
        terms, lam = official_by_eigenvectors(X, y, shrinkage)
        result = sfda(X, y, shrinkage=shrinkage)
        assert result.details["path"] == ("dual" if shape[0] < shape[1] else "primal")
        assert result.details["lambda"] == pytest.approx(lam, rel=1e-11)
        assert result.per_sample == pytest.approx(terms, abs=1e-10), shape
        assert result.value == pytest.approx(terms.mean(), abs=1e-12), shape
        assert result.details["jitter"] == result.details["jitter_stage_2"] == 0


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shrinkage", [None, 0.9, 0.2, 1e-3])
def test_paper_equals_its_equations(seed, shrinkage):
    for shape in SHAPES:
        X, y = samples(seed, *shape)
        terms, lams = paper_by_eigenvectors(X, y, shrinkage)
        result = sfda(X, y, variant="paper", shrinkage=shrinkage)
        details = result.details
        assert (details["lambda"], details["lambda_stage_2"]) == pytest.approx(lams, rel=1e-9)
        assert result.per_sample == pytest.approx(terms, abs=1e-9, rel=1e-9), shape
        assert result.value == pytest.approx(terms.mean(), abs=1e-10), shape
        assert details["log_likelihood"] == pytest.approx(terms.sum(), abs=1e-7)


def test_the_oracles_see_unsaturated_scores():
    """Otherwise the two tests above would compare ones with ones."""
    for seed in range(3):
        for shape in SHAPES:
            X, y = samples(seed, *shape)
            assert 0.1 < official_by_eigenvectors(X, y, 0.9)[0].mean() < 0.995, shape
            assert -3 < paper_by_eigenvectors(X, y, 0.9)[0].mean() < -0.005, shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shrinkage", [0.9, 0.2, 1e-3])
def test_stage_1_equals_scikit_learn(shape, shrinkage):
    for seed in range(3):
        X, y = samples(seed, *shape)
        lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(X, y)
        assert posterior(load(X, y), shrinkage) == pytest.approx(lda.predict_proba(X), abs=1e-10)


# `official` on the width table of the design notes: C = 10, N = 500, 20 informative dimensions.
# The generator is the one below; the numbers are those of the published code.
WIDTH_TABLE = {
    0.9: {20: 0.724, 128: 0.854, 400: 1.0, 1024: 1.0, 2048: 1.0},
    0.45: {20: 0.278, 128: 0.525, 400: 0.997, 1024: 1.0, 2048: 1.0},
}


@pytest.mark.parametrize(("s", "D"), [(s, D) for s in WIDTH_TABLE for D in WIDTH_TABLE[s]])
def test_official_favours_wide_features_as_published(s, D):
    r = np.random.default_rng(0)
    y = np.arange(500) % 10
    mu = s * r.normal(size=(10, 20))
    X = np.hstack([mu[y] + r.normal(size=(500, 20)), r.normal(size=(500, D - 20))])
    assert sfda(X, y).value == pytest.approx(WIDTH_TABLE[s][D], abs=6e-4)


# --- the two paths and the two backends -------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shrinkage", [None, 0.5, 1e-2])
def test_primal_and_dual_agree_on_any_shape(variant, shrinkage):
    for seed in range(10):
        for shape in [(50, 48, 4), (48, 50, 4), (40, 90, 5), (90, 40, 5)]:
            X, y = samples(seed, *shape)
            primal, dual = (force(X, y, variant, shrinkage, dual=dual) for dual in (False, True))
            assert (primal.details["path"], dual.details["path"]) == ("primal", "dual")
            assert primal.value == pytest.approx(dual.value, abs=1e-10)
            assert primal.per_sample == pytest.approx(dual.per_sample, abs=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_torch_backend_equals_numpy(variant, shape, monkeypatch):
    def forbidden(*_):
        raise AssertionError("the NumPy backend was used")

    for seed in range(3):
        X, y = samples(seed, *shape)
        for shrinkage in (None, 0.5):
            expected = sfda(X, y, variant=variant, shrinkage=shrinkage)
            with monkeypatch.context() as patch:
                for name in ("gram", "cholesky", "solve", "log_softmax", "take"):
                    patch.setattr(NumpyOps, name, forbidden)
                result = force(X, y, variant, shrinkage, ops=TorchOps("cpu"))
            assert result.value == pytest.approx(expected.value, abs=1e-10)
            assert result.per_sample == pytest.approx(expected.per_sample, abs=1e-9)
            assert isinstance(result.value, float)
            assert isinstance(result.per_sample, np.ndarray)


def test_the_torch_backend_survives_a_singular_matrix():
    X, y = samples(0, 60, 6, 3)
    X = np.hstack([X, X])
    expected = sfda(X, y, shrinkage=1e-300)
    result = force(X, y, shrinkage=1e-300, ops=TorchOps("cpu"))
    assert result.details["jitter"] == pytest.approx(expected.details["jitter"])
    assert result.value == pytest.approx(expected.value, abs=1e-9)


def test_a_tensor_that_says_it_is_on_cuda_stays_a_tensor(monkeypatch):
    """The choice of backend, without the device."""
    import torch

    X, y = samples(0, 60, 6, 3)
    X = np.round(8 * X)  # exact in every dtype below
    expected = sfda(X, y)
    monkeypatch.setattr(NumpyOps, "take", None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32):
        tensor = torch.as_tensor(X).to(dtype)
        result = sfda(tensor, torch.as_tensor(y))
        assert result.value == pytest.approx(expected.value, abs=1e-12)
        assert result.details["dtype"] == str(dtype)[6:]
        assert torch.equal(tensor, torch.as_tensor(X).to(dtype))  # unchanged
    assert 0 < sfda(torch.as_tensor(X > 0), y).value < 1
    with pytest.raises(ValueError, match="1 of 60 rows hold NaN or Inf, the first is row 7"):
        sfda(torch.where(torch.arange(60)[:, None] == 7, torch.nan, torch.as_tensor(X)), y)
    with pytest.raises(ValueError, match="its dtype is torch"):
        sfda(torch.as_tensor(X + 0j), y)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cuda_tensor_is_scored_on_its_device(variant):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for shape in SHAPES:
        X, y = samples(0, *shape)
        result = sfda(torch.as_tensor(X, device="cuda"), y, variant=variant)
        assert result.details["device"].startswith("cuda")
        assert result.value == pytest.approx(sfda(X, y, variant=variant).value, abs=1e-10)


# --- λ and σ ----------------------------------------------------------------------------------


def test_largest_eigenvalue_is_converged_on_both_paths():
    for seed, shape in enumerate([*SHAPES, (300, 200, 5), (200, 300, 5)]):
        X, y = samples(seed, *shape)
        expected = np.linalg.eigvalsh(statistics(X, y)[2])[-1]
        for dual in (False, True):
            x = load(X, y)
            x.dual = dual
            assert Scatter(x).largest_eigenvalue() == pytest.approx(expected, rel=1e-12)


def test_official_sigma_is_not_the_largest_eigenvalue():
    """A converged σ would be another metric."""
    X, y = samples(0, 200, 20, 5)
    sigma = sfda(X, y).details["sigma"]
    assert sigma < 0.999 * np.linalg.eigvalsh(statistics(X, y)[2])[-1]


def test_official_sigma_of_deviations_orthogonal_to_ones():
    """Class probabilities have S_W·1 = 0: the published σ would be 0/0."""
    X, y = samples(0, 80, 9, 3, scale=3)
    P = softmax(X, axis=1)
    order = np.random.default_rng(0).permutation(80)
    result = sfda(P, y)
    assert 0.5 < result.details["sigma"] / np.linalg.eigvalsh(statistics(P, y)[2])[-1] <= 1
    assert sfda(P[order], y[order]).value == pytest.approx(result.value, abs=1e-12)


def test_lambda_stops_at_its_floor():
    X, y = samples(0, 200, 20, 5, scale=100)
    for variant in VARIANTS:
        result = sfda(X, y, variant=variant)
        assert result.details["lambda"] == 1e-10
        assert np.isfinite(result.value)


def test_shrinkage_fixes_lambda_of_both_stages():
    X, y = samples(0, 200, 20, 5)
    assert sfda(X, y, shrinkage=0.25).details["lambda"] == 0.25
    details = sfda(X, y, variant="paper", shrinkage=0.25).details
    assert (details["lambda"], details["lambda_stage_2"]) == (0.25, 0.25)
    assert details["lambda_rule"] == "fixed"
    lam = sfda(X, y).details["lambda"]
    assert sfda(X, y, shrinkage=lam).value == sfda(X, y).value


# --- invariants -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_row_order_and_label_names_do_not_matter(variant, shape):
    for seed in range(4):
        X, y = samples(seed, *shape)
        expected = sfda(X, y, variant=variant)
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(y))
        permuted = sfda(X[order], y[order], variant=variant)
        assert permuted.value == pytest.approx(expected.value, abs=1e-12)
        assert permuted.per_sample == pytest.approx(terms_of(expected)[order], abs=1e-9)
        renamed = sfda(X, rng.permutation(y.max() + 1)[y], variant=variant)
        assert renamed.value == pytest.approx(expected.value, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_common_offset_does_not_matter(variant):
    for shape in SHAPES:
        X, y = samples(1, *shape)
        expected = sfda(X, y, variant=variant).value
        assert sfda(X + 5, y, variant=variant).value == pytest.approx(expected, abs=1e-11)
        assert sfda(X + 1e6, y, variant=variant).value == pytest.approx(expected, abs=1e-7)


def test_with_lambda_fixed_official_has_no_scale():
    X, y = samples(1, 40, 120, 6)
    expected = sfda(X, y, shrinkage=0.7).value
    for factor in (1e-60, 1e-6, 1e6, 1e60):
        assert sfda(factor * X, y, shrinkage=0.7).value == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_keep_their_range_and_are_means_of_their_terms(variant):
    for seed, shape in enumerate(SHAPES):
        result = sfda(*samples(seed, *shape), variant=variant)
        low, high = (0, 1) if variant == "official" else (-np.inf, 0)
        assert low < result.value <= high
        terms = terms_of(result)
        assert (terms.shape, terms.dtype) == ((shape[0],), np.float64)
        assert not terms.flags.writeable
        assert result.value == pytest.approx(terms.mean(), rel=1e-13)
        assert sfda(*samples(seed, *shape), variant=variant).value == result.value


def test_the_paper_value_does_not_grow_with_n():
    X, y = samples(0, 200, 20, 5)
    once, twice = (sfda(np.tile(X, (k, 1)), np.tile(y, k), variant="paper") for k in (1, 2))
    assert twice.value == pytest.approx(once.value, abs=1e-10)
    assert twice.details["log_likelihood"] == pytest.approx(2 * once.details["log_likelihood"])


def test_details_say_how_the_value_came_about():
    X, y = samples(0, 40, 60, 5)
    y[np.argmax(y)] = 5  # a class of its own
    details = sfda(X.astype(np.float32), y).details
    expected = {
        "variant": "official",
        "path": "dual",
        "n_samples": 40,
        "n_dims": 60,
        "n_classes": 6,
        "n_singletons": int(np.sum(np.bincount(y) == 1)),
        "dtype": "float32",
        "device": "cpu",
        "ridge": "lambda * tr(S_W)/D",
        "lambda_rule": "max(exp(-5 sigma), 1e-10)",
    }
    assert expected.items() <= details.items()
    assert expected["n_singletons"] > 0
    assert details["scatter"].startswith("S_W/N")
    assert all(type(value) in (int, float, str) for value in details.values())


# --- documented forms of input ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(150, 20, 5), (40, 60, 5)])
def test_float32_input_is_computed_in_float64(shape):
    for seed in range(10):
        X, y = samples(seed, *shape)
        X32 = X.astype(np.float32)
        for variant in VARIANTS:
            result = sfda(X32, y, variant=variant)
            assert result.value == sfda(X32.astype(np.float64), y, variant=variant).value
            assert result.value == pytest.approx(sfda(X, y, variant=variant).value, abs=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "float16", "float32"])
def test_every_real_dtype_is_promoted(dtype):
    """ConfMix in an integer array would truncate."""
    X, y = samples(0, 100, 6, 3)
    X = np.abs(10 * X).astype(dtype)
    assert sfda(X, y).value == sfda(X.astype(np.float64), y).value


def test_containers_of_features():
    import torch

    X, y = samples(0, 60, 6, 3)
    X = X.astype(np.float32)
    expected = sfda(X, y).value
    for same in (
        X.tolist(),
        tuple(map(tuple, X)),
        np.asfortranarray(X),
        np.repeat(X, 2, axis=1)[:, ::2],
        torch.as_tensor(X),
        torch.as_tensor(X, dtype=torch.float64).requires_grad_(),
    ):
        assert sfda(same, y).value == expected
    half = torch.as_tensor(X).to(torch.bfloat16)
    assert sfda(half, y).value == sfda(half.float().numpy(), y).value
    assert sfda(half, y).details["dtype"] == "bfloat16"


def test_containers_and_types_of_labels():
    import torch

    X, y = samples(0, 60, 6, 3)
    expected = sfda(X, y).value
    names = np.array(["b", "a", "c"])
    for same in (
        y.tolist(),
        tuple(y),
        torch.as_tensor(y),
        np.array([0, 7, -2])[y],
        y + 0.5,
        names[y],
        names[y].astype(object),
        names[y].tolist(),
        [("class", int(c)) for c in y],
        [("x", 1, None)[c] or 2.5 for c in y],
    ):
        assert sfda(X, same).value == pytest.approx(expected, abs=1e-13)
    assert sfda(X, y > 0).value == sfda(X, np.minimum(y, 1)).value


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(60, 6, 3), (30, 60, 3)])
def test_the_input_is_never_changed(variant, shape):
    X, y = samples(0, *shape)
    before = X.copy(), y.copy()
    first = sfda(X, y, variant=variant).value
    assert sfda(X, y, variant=variant).value == first
    X.flags.writeable = y.flags.writeable = False
    assert sfda(X, y, variant=variant).value == first
    np.testing.assert_array_equal(X, before[0])
    np.testing.assert_array_equal(y, before[1])


# --- degenerate, but defined ------------------------------------------------------------------

rng = np.random.default_rng(7)
Y = np.repeat([0, 1, 2], [30, 20, 10])
NARROW, WIDE, CENTRES = rng.normal(size=(60, 8)), rng.normal(size=(60, 150)), np.eye(3, 8)

DEGENERATE = {
    "singleton": (NARROW, np.where(np.arange(60) == 0, 9, Y)),
    "singletons only": (NARROW, np.arange(60)),
    "singletons only, wide": (WIDE, np.arange(60)),
    "two samples": (NARROW[:2], [0, 1]),
    "constant": (np.full((60, 8), 0.1), Y),
    "zero": (np.zeros((60, 150)), Y),
    "no scatter": (CENTRES[Y], Y),
    "no scatter, tied means": (CENTRES[np.minimum(Y, 1)], Y),
    "dead columns": (np.hstack([NARROW, np.zeros((60, 5))]), Y),
    "equal columns": (np.hstack([NARROW, NARROW]), Y),
    "one direction": (np.outer(NARROW[:, 0], np.ones(8)), Y),
    "equal rows": (np.vstack([WIDE[:30], WIDE[:30]]), Y),
    "huge": (1e6 * NARROW, Y),
    "tiny": (1e-6 * NARROW, Y),
    "huge, wide": (1e6 * WIDE, Y),
    "tiny, wide": (1e-6 * WIDE, Y),
    "at the limit": (1e75 * np.tanh(NARROW), Y),
    "next to nothing": (1e-158 * NARROW, Y),  # the squares are subnormal
    "nothing squared": (1e-200 * NARROW, Y),
    "many scales": (NARROW * 10.0 ** np.arange(-12, 12, 3), Y),
    "one class far away": (np.where(Y[:, None] == 2, 1e70, 1e-70) * NARROW, Y),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shrinkage", [None, 1.0, 0.5, 1e-10, 1e-300])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_input_is_finite_and_silent(case, shrinkage, variant):
    X, y = DEGENERATE[case]
    with np.errstate(all="raise"):
        for ops in (None, TorchOps("cpu")):
            result = force(X, y, variant, shrinkage, ops=ops)
            assert np.all(np.isfinite(terms_of(result)))
            assert np.isfinite(result.value)
            assert all(np.isfinite(v) for v in result.details.values() if isinstance(v, float))


@pytest.mark.parametrize("shrinkage", [None, 1.0, 1e-10])
@pytest.mark.parametrize("case", ["constant", "zero", "next to nothing"])
def test_constant_features_leave_the_priors(case, shrinkage):
    X, y = DEGENERATE[case]
    q = np.array([30, 20, 10]) / 60
    assert sfda(X, y, shrinkage=shrinkage).value == pytest.approx(q @ q, abs=1e-14)
    paper = sfda(X, y, variant="paper", shrinkage=shrinkage)
    assert paper.value == pytest.approx(q @ np.log(q), abs=1e-14)


def test_classes_without_scatter_are_told_apart_unless_their_means_tie():
    assert sfda(*DEGENERATE["no scatter"]).value == 1
    stage_1 = posterior(load(*DEGENERATE["no scatter, tied means"]), 0.5)
    expected = np.array([[1, 0, 0], [0, 2 / 3, 1 / 3], [0, 2 / 3, 1 / 3]])[Y]
    assert stage_1 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("shrinkage", "tolerance"), [(1e-10, 0.2), (1e-8, 5e-6), (1e-4, 1e-9)])
def test_equal_classes_stay_equal_for_small_lambda(shrinkage, tolerance):
    """N < D, each sample in two classes: one half, but for rounding error that ConfMix amplifies.

    ConfMix pulls the two means apart by the rounding error of the posterior, and 1/λ makes this a
    distance: at the floor of λ the value is known to a few percent, as the documentation says.
    """
    X = np.random.default_rng(0).normal(size=(60, 600))
    X[30:] = X[:30]
    y = np.arange(60) % 4  # sample i of class c is also sample i + 30, of class c ± 2
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(60)
        value = sfda(X[order], y[order], shrinkage=shrinkage).value
        assert value == pytest.approx(0.5, abs=tolerance)


def test_lambda_of_one_is_the_nearest_mean():
    """S̃ ∝ I: the posterior follows from Euclidean distances."""
    for X in (NARROW, WIDE):
        q, M, S_W = statistics(X, Y)
        distances = np.sum((X[:, None] - M) ** 2, axis=2) / (np.trace(S_W) / X.shape[1])
        expected = softmax(np.log(q) - distances / 2, axis=1)
        assert posterior(load(X, Y), 1.0) == pytest.approx(expected, abs=1e-12)
    tiny = sfda(1e-9 * WIDE, Y)
    assert tiny.details["lambda"] == 1
    assert tiny.value == pytest.approx(sfda(WIDE, Y, shrinkage=1.0).value, abs=1e-12)


def test_jitter_is_reported_and_only_where_needed():
    regular, singular = DEGENERATE["dead columns"], DEGENERATE["equal columns"]
    assert sfda(*regular).details["jitter"] == 0
    assert sfda(*singular).details["jitter"] == 0  # the floor of λ is enough
    details = sfda(*singular, shrinkage=1e-300).details
    mean_variance = np.trace(statistics(*singular)[2]) / 16
    assert details["jitter"] == pytest.approx(1e-10 * mean_variance)
    X, y = DEGENERATE["huge, wide"]
    assert sfda(X, y, variant="paper").details["jitter"] > 0


def test_a_pivot_of_rounding_error_counts_as_singular():
    """Whether it came out positive is a matter of luck."""
    for seed in range(20):
        X, y = samples(seed, 80, 9, 3)  # and a column that is the difference of two others
        doubled = np.hstack([X, X[:, :1] - X[:, 1:2]])
        x = load(doubled, y)
        S_W = Scatter(x)
        assert S_W.discriminants(1e-300, 0.0).jitter >= JITTER * S_W.trace / x.D
        result = sfda(doubled, y, shrinkage=1e-300)
        assert result.value == pytest.approx(sfda(X, y, shrinkage=1e-300).value, abs=1e-6)


def test_directions_without_separation_do_not_enter_the_paper_score():
    """Two classes with one mean: the third Fisher direction has v = 0 and is arbitrary."""
    for seed in range(10):
        noise = np.random.default_rng(seed).normal(size=(60, 8))
        X = np.vstack([noise[:20], noise[:20], noise[20:40] + 1, noise[40:] - 1])
        y = np.repeat([0, 1, 2, 3], 20)
        order = np.random.default_rng(seed).permutation(80)
        expected = sfda(X, y, variant="paper", shrinkage=0.5).value
        permuted = sfda(X[order], y[order], variant="paper", shrinkage=0.5).value
        assert permuted == pytest.approx(expected, abs=1e-12)
        dual = force(X, y, "paper", 0.5, dual=True).value
        assert dual == pytest.approx(expected, abs=1e-10)


# --- errors -----------------------------------------------------------------------------------

BAD = {
    "not finite": (np.where(np.arange(8) == 3, [[np.nan]] * 5 + [[1]] * 55, NARROW), Y),
    "infinite": (np.where(np.arange(60)[:, None] == 7, -np.inf, NARROW), Y),
    "one class": (NARROW, ["cat"] * 60),
    "no rows": (np.empty((0, 8)), []),
    "no columns": (np.empty((60, 0)), Y),
    "too few labels": (NARROW, Y[:-1]),
    "one axis": (NARROW[:, 0], Y),
    "three axes": (NARROW[:, None], Y),
    "objects": (NARROW.astype(object), Y),
    "strings": (NARROW.astype(str), Y),
    "complex": (NARROW + 0j, Y),
    "ragged": ([[1.0], [1.0, 2.0]], [0, 1]),
    "too large": (1e80 * NARROW, Y),
    "NaN label": (NARROW, np.where(np.arange(60) == 4, np.nan, Y)),
    "None label": (NARROW, [None, *Y[1:]]),
    "label axes": (NARROW, Y[:, None]),
    "unhashable label": (NARROW, [[c] for c in Y]),
}
MESSAGES = {
    "not finite": r"`features` must be finite but 5 of 60 rows .* first is row 0; drop those rows",
    "infinite": r"`features` must be finite but 1 of 60 rows .* first is row 7; drop",
    "one class": r"`labels` must hold at least two classes but every label is 'cat'; .* pass",
    "no rows": r"`features` must have at least one row .* has shape \(0, 8\); check",
    "no columns": r"`features` must have at least one row and one column .* \(60, 0\); check",
    "too few labels": r"`labels` must hold one label per row .* 59 labels and 60 rows; pass",
    "one axis": r"`features` must be two-dimensional .* has shape \(60,\); pool or flatten",
    "three axes": r"`features` must be two-dimensional .* has shape \(60, 1, 8\); pool or flatten",
    "objects": r"`features` must be .* real numbers but its dtype is object; convert",
    "strings": r"`features` must be .* real numbers but its dtype is <U\d+; convert",
    "complex": r"`features` must be .* real numbers but its dtype is complex128; convert",
    "ragged": r"`features` must be .* cannot build it from list .*; give every row the same",
    "too large": r"`features` must not exceed 1e\+75 .* spans -\d.*e\+80 to \d.*e\+80; divide",
    "NaN label": r"`labels` must not hold missing values but row 4 is nan",
    "None label": r"`labels` must not hold missing values but row 0 is None",
    "label axes": r"`labels` must be one-dimensional .* has shape \(60, 1\)",
    "unhashable label": r"`labels` must be a sequence of hashable labels",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_to_do(case):
    with pytest.raises(ValueError, match=MESSAGES[case]):
        sfda(*BAD[case])


def test_a_complex_or_infinite_tensor_is_refused():
    import torch

    tensor = torch.as_tensor(NARROW)
    with pytest.raises(ValueError, match="dtype is complex128"):
        sfda(tensor + 0j, Y)
    with pytest.raises(ValueError, match="1 of 60 rows"):
        sfda(torch.where(torch.arange(60)[:, None] == 7, torch.inf, tensor), Y)


@pytest.mark.parametrize("variant", ["best", "Official", None, ["official"]])
def test_an_unknown_variant_lists_the_valid_ones(variant):
    with pytest.raises(ValueError, match=r"`variant` must be one of 'official', 'paper'.* but is"):
        sfda(NARROW, Y, variant=variant)


@pytest.mark.parametrize("shrinkage", [0, -0.1, 1.1, np.nan, np.inf, "0.5", True, [0.5]])
def test_a_bad_shrinkage_is_refused(shrinkage):
    with pytest.raises(ValueError, match=r"`shrinkage` must be a number in \(0, 1\] but is"):
        sfda(NARROW, Y, shrinkage=shrinkage)


def test_shrinkage_may_be_any_real_number():
    for shrinkage in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        assert sfda(NARROW, Y, shrinkage=shrinkage).details["lambda"] == 0.5  # type: ignore[arg-type]
    assert sfda(NARROW, Y, shrinkage=1).details["lambda"] == 1


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2000, 300, 30), (300, 2000, 20), (20000, 50, 10)])
def test_one_copy_of_the_features_and_three_square_matrices(shape, dtype, variant):
    N, D, C = shape
    X = np.random.default_rng(0).normal(size=(N, D)).astype(dtype)
    y = np.arange(N) % C
    sfda(X[: 2 * C], y[: 2 * C], variant=variant)  # imports and caches
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        sfda(X, y, variant=variant)
        peak = (tracemalloc.get_traced_memory()[1] - before) / 8
    finally:
        tracemalloc.stop()
    bound = N * D + 3 * min(N, D) ** 2 + 2 * C * D
    if variant == "paper":
        bound += 2 * N * C + 2 * C**2
    overhead = 60 * N / 8 + 2**16  # labels as Python objects, the order of the rows, constants
    assert N * D < peak < bound + overhead
