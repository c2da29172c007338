"""Each metric against its published formula, written plainly, or against scikit-learn."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import multivariate_normal, spearmanr
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from sfda_tune.metrics._input import load, narrow, pca
from sfda_tune.metrics.etran import etran
from sfda_tune.metrics.gbc import gbc
from sfda_tune.metrics.hscore import hscore
from sfda_tune.metrics.knn import knn
from sfda_tune.metrics.leep import leep
from sfda_tune.metrics.linear_probe import _held_out, linear_probe
from sfda_tune.metrics.logme import logme
from sfda_tune.metrics.nce import nce
from sfda_tune.metrics.ncti import ncti
from sfda_tune.metrics.nleep import nleep
from sfda_tune.metrics.pactran import pactran
from sfda_tune.metrics.parc import parc
from sfda_tune.metrics.ped import ped
from sfda_tune.metrics.sfda import sfda
from sfda_tune.metrics.tmi import tmi
from sfda_tune.metrics.transrate import transrate

# N, D, C: more rows than columns, fewer, about as many, one column, more classes than columns
SHAPES = [(120, 10, 4), (40, 90, 3), (52, 50, 3), (30, 1, 3), (60, 4, 9)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with threadpool_limits(1):
        yield


def samples(seed, N, D, C, separation=1.0, scale=1.0):
    """Overlapping classes of different sizes, correlated dimensions, a mean away from zero."""
    rng = np.random.default_rng(seed)
    sizes = 2 + rng.multinomial(N - 2 * C, 2.0 ** -np.arange(C) / np.sum(2.0 ** -np.arange(C)))
    y = rng.permutation(np.repeat(np.arange(C), sizes))
    mixing = np.eye(D) + rng.normal(size=(D, D)) / np.sqrt(D)
    X = separation * rng.normal(size=(C, D))[y] + rng.normal(size=(N, D)) @ mixing
    return scale * X + rng.normal(size=D), y


def classes(X, y):
    return [X[y == c] for c in range(y.max() + 1)]


# --- the shared helpers -----------------------------------------------------------------------


def test_narrow_keeps_lengths_and_angles():
    X, _ = samples(0, 30, 80, 3)
    assert narrow(X).shape == (30, 30)
    assert narrow(X) @ narrow(X).T == pytest.approx(X @ X.T, abs=1e-10)
    assert narrow(X[:, :30]).shape == (30, 30)


@pytest.mark.parametrize("shape", SHAPES)
def test_pca_equals_scikit_learn(shape):
    X, _ = samples(0, *shape)
    k = min(5, shape[0] - 1, shape[1])
    scores, variances = pca(X - X.mean(axis=0), k)
    model = PCA(k, svd_solver="full")
    expected = model.fit_transform(X)
    assert variances == pytest.approx(model.explained_variance_)
    assert np.abs(scores) == pytest.approx(np.abs(expected), abs=1e-8)


# --- evidence, variance, rate -----------------------------------------------------------------


def best_evidence(F, y):
    """Maximum over α and β of log N(y; 0, I/β + FFᵀ/α)."""

    def negative(p):
        covariance = np.exp(-p[1]) * np.eye(len(y)) + np.exp(-p[0]) * F @ F.T
        return -multivariate_normal.logpdf(y, cov=covariance)

    starts = [(0, 0), (3, 2), (-2, 3)]
    options = {"xatol": 1e-8, "fatol": 1e-12, "maxiter": 4000, "maxfev": 4000}
    return -min(minimize(negative, s, method="Nelder-Mead", options=options).fun for s in starts)


@pytest.mark.parametrize("shape", [(60, 6, 3), (25, 40, 3), (30, 1, 3)])
def test_logme_is_the_maximum_of_the_evidence(shape):
    X, y = samples(1, *shape)
    expected = np.mean([best_evidence(X, (y == c).astype(float)) for c in range(shape[2])])
    result = logme(X, y)
    assert result.value == pytest.approx(expected / shape[0], abs=1e-8)
    assert result.details["converged"]


def evidence_by_matrices(F, y, tolerance=1e-10):
    """The fixed point of the paper with α, β and the D × D matrix A."""
    N, D = F.shape
    alpha = beta = 1.0
    for _ in range(3000):
        A = alpha * np.eye(D) + beta * F.T @ F
        m = beta * np.linalg.solve(A, F.T @ y)
        gamma = np.sum(beta * (s := np.linalg.eigvalsh(F.T @ F)) / (alpha + beta * s))
        new = gamma / (m @ m), (N - gamma) / np.sum((F @ m - y) ** 2)
        done = abs(np.log(new[0] / alpha)) + abs(np.log(new[1] / beta)) < tolerance
        alpha, beta = new
        if done:
            break
    A = alpha * np.eye(D) + beta * F.T @ F
    m = beta * np.linalg.solve(A, F.T @ y)
    terms = N * np.log(beta) + D * np.log(alpha) - np.linalg.slogdet(A)[1]
    return 0.5 * (terms - beta * np.sum((F @ m - y) ** 2) - alpha * m @ m - N * np.log(2 * np.pi))


@pytest.mark.parametrize("seed", range(3))
def test_logme_equals_the_fixed_point_of_the_paper(seed):
    X, y = samples(seed, 150, 20, 4)
    expected = np.mean([evidence_by_matrices(X, (y == c).astype(float)) for c in range(4)])
    assert logme(X, y).value == pytest.approx(expected / 150, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_hscore_equals_its_formula_with_scikit_learn(shape):
    for seed in range(3):
        X, y = samples(seed, *shape, scale=0.3)
        model = LedoitWolf().fit(X)
        M = np.stack([Z.mean(axis=0) for Z in classes(X, y)])[y]
        S_B = np.atleast_2d(np.cov(M.T, bias=True))
        expected = np.trace(np.linalg.solve(model.covariance_, (1 - model.shrinkage_) * S_B))
        result = hscore(X, y)
        assert result.details["shrinkage"] == pytest.approx(model.shrinkage_, rel=1e-9)
        assert result.value == pytest.approx(expected, rel=1e-8)
        assert hscore(1e9 * X + 3, y).value == pytest.approx(expected, rel=1e-7)


def test_hscore_with_a_fixed_shrinkage():
    X, y = samples(0, 40, 60, 3)
    S = np.cov(X.T, bias=True)
    S_B = np.cov(np.stack([Z.mean(axis=0) for Z in classes(X, y)])[y].T, bias=True)
    S_a = 0.7 * S + 0.3 * np.trace(S) / 60 * np.eye(60)
    expected = 0.7 * np.trace(np.linalg.solve(S_a, S_B))
    assert hscore(X, y, shrinkage=0.3).value == pytest.approx(expected, rel=1e-10)
    assert hscore(X, y, shrinkage=1).value == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [1e-4, 1.0])
def test_transrate_equals_its_formula(shape, epsilon):
    def R(Z):  # noqa: N802
        n, D = Z.shape
        return 0.5 * np.linalg.slogdet(np.eye(D) + Z.T @ Z / (n * epsilon))[1]

    X, y = samples(0, *shape)
    Z = X - X.mean(axis=0)
    given = sum(len(Z_c) / len(Z) * R(Z_c) for Z_c in classes(Z, y))
    result = transrate(X, y, epsilon=epsilon)
    assert result.value == pytest.approx(R(Z) - given, rel=1e-9)
    assert result.details["rate_given_class"] == pytest.approx(given, rel=1e-9)


def test_transrate_of_balanced_classes_is_that_of_the_published_code():
    X, _ = samples(0, 60, 8, 3)
    y = np.arange(60) % 3
    Z = X - X.mean(axis=0)

    def rate(Z):
        return 0.5 * np.linalg.slogdet(np.eye(8) + 1 / (len(Z) * 1e-4) * Z.T @ Z)[1]

    expected = rate(Z) - sum(rate(Z[y == c]) for c in range(3)) / 3
    assert transrate(X, y).value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(200, 100, 5), (120, 10, 4), (40, 90, 3), (60, 4, 9)])
def test_gbc_equals_its_formula(shape):
    X, y = samples(0, *shape, separation=0.4)
    K = min(64, shape[0] - 1, shape[1])
    groups = classes(PCA(K, svd_solver="full").fit_transform(X), y)
    expected = 0.0
    for a, b in permutations(groups, 2):
        S_a, S_b = (Z.var(axis=0).mean() * np.eye(K) for Z in (a, b))
        S = (S_a + S_b) / 2
        d = a.mean(axis=0) - b.mean(axis=0)
        logs = [np.linalg.slogdet(A)[1] for A in (S, S_a, S_b)]
        D_B = d @ np.linalg.solve(S, d) / 8 + 0.5 * (logs[0] - 0.5 * (logs[1] + logs[2]))
        expected -= np.exp(-D_B)
    assert gbc(X, y).value == pytest.approx(expected, rel=1e-8)
    assert gbc(1e-6 * X, y).value == pytest.approx(expected, rel=1e-6)


def test_gbc_of_a_class_of_one_sample_has_a_floor():
    X, y = samples(0, 60, 6, 3)
    y[0] = 3
    assert -12 <= gbc(X, y).value < 0


@pytest.mark.parametrize("shape", [(120, 10, 4), (40, 90, 3), (60, 4, 9)])
def test_parc_equals_scipy(shape):
    for seed in range(3):
        X, y = samples(seed, *shape)
        upper = np.triu_indices(len(y), 1)
        d_X = 1 - np.corrcoef(StandardScaler().fit_transform(X))[upper]
        d_Y = np.round(1 - np.corrcoef(np.eye(shape[2])[y])[upper], 9)  # two values
        expected = spearmanr(d_X, d_Y).statistic
        assert parc(X, y).value == pytest.approx(expected, abs=1e-10)


def test_parc_takes_a_share_of_each_class():
    X, y = samples(0, 600, 10, 4)
    whole, part = parc(X, y), parc(X, y, max_samples=300)
    assert (whole.details["n_used"], part.details["n_used"]) == (600, 300)
    assert part.value == pytest.approx(whole.value, abs=0.05)
    with pytest.raises(ValueError, match="`labels` must hold two samples of one class"):
        parc(X[:20], np.arange(20))


def test_parc_takes_whole_classes_where_they_are_many_and_small():
    rng = np.random.default_rng(0)
    y, centres = np.repeat(np.arange(60), 2), rng.normal(size=(60, 16))
    x = centres[y] + 0.5 * rng.normal(size=(120, 16))
    found = parc(x, y, max_samples=30)
    assert found.details["n_used"] == 30
    assert found.value > 0.1
    other = rng.permutation(120)
    assert parc(x[other], y[other], max_samples=30).value == pytest.approx(found.value)


# --- discriminants ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 100, 5), (120, 10, 4), (80, 120, 3), (100, 4, 9)])
@pytest.mark.parametrize("scale", [0.05, 0.2])
def test_ncti_equals_scikit_learn(shape, scale):
    X, y = samples(0, *shape, scale=scale)
    model = PCA(min(64, shape[0] - 1, shape[1]), svd_solver="full")
    Z = model.fit_transform(X)
    lam = np.exp(-model.explained_variance_[:32].sum())
    if lam < 1e-9:
        pytest.skip("at the floor scikit-learn's solver is another one")
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage=lam)
    U = lda.fit_transform(Z, y)
    P = lda.predict_proba(Z)
    seli = np.linalg.norm(U - U.mean(axis=0), "nuc")
    vc = sum(np.linalg.norm(P_c, "nuc") for P_c in classes(P, y))
    result = ncti(X, y)
    parts = result.details["hub_parts"]
    assert result.details["lambda"] == pytest.approx(lam)
    assert parts["ncc"] == pytest.approx(P[np.arange(len(y)), y].mean(), abs=1e-9)
    assert parts["seli"] == pytest.approx(seli, rel=1e-7)
    assert parts["vc"] == pytest.approx(-np.log(vc), abs=1e-7)
    assert result.value == pytest.approx(np.log(seli) + parts["ncc"] - np.log(vc), abs=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 0.4])
def test_etran_equals_scikit_learn(shape, scale):
    X, y = samples(0, *shape, scale=scale)
    S_W = sum(len(Z) * np.atleast_2d(np.cov(Z.T, bias=True)) for Z in classes(X, y)) / len(X)
    lam = max(np.exp(-5 * np.linalg.eigvalsh(S_W)[-1]), 1e-10)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=lam).fit(X, y)
    P = lda.predict_proba(X)
    result = etran(X, y)
    assert result.value == pytest.approx(P[np.arange(len(y)), y].mean(), abs=1e-8)
    energy = np.mean([logsumexp(x) for x in X])
    assert result.details["hub_parts"]["energy"] == pytest.approx(energy)
    logits = np.random.default_rng(0).normal(size=(len(y), 7))
    given = etran(X, y, logits=logits)
    assert given.value == result.value
    expected = np.mean([np.log(np.sum(np.exp(row))) for row in logits])
    assert given.details["hub_parts"]["energy"] == pytest.approx(expected)


# --- source classifier and clusters -----------------------------------------------------------


def plain_leep(theta, y):
    N, C = len(y), y.max() + 1
    joint = np.zeros((C, theta.shape[1]))
    for n in range(N):
        joint[y[n]] += theta[n] / N
    terms = []
    for n in range(N):
        total = 0.0
        for z in range(theta.shape[1]):
            total += joint[y[n], z] / joint[:, z].sum() * theta[n, z]
        terms.append(np.log(total))
    return np.array(terms)


def test_leep_equals_its_formula():
    for seed in range(3):
        logits, y = samples(seed, 50, 12, 4)
        terms = plain_leep(softmax(logits, axis=1), y)
        result = leep(None, y, logits=logits)
        assert result.value == pytest.approx(terms.mean(), abs=1e-12)
        assert result.per_sample == pytest.approx(terms, abs=1e-12)
        assert leep(logits, y, logits=logits + 5).value == pytest.approx(result.value, abs=1e-12)


def test_nce_equals_its_formula():
    logits, y = samples(0, 80, 6, 4)
    pairs = Counter(zip(y.tolist(), logits.argmax(axis=1).tolist(), strict=True))
    source = Counter(logits.argmax(axis=1).tolist())
    expected = sum(n / 80 * np.log(n / source[z]) for (_, z), n in pairs.items())
    assert nce(None, y, logits=logits).value == pytest.approx(expected, abs=1e-12)


def test_soft_and_hard_source_labels_agree_where_the_softmax_is_sharp():
    logits, y = samples(0, 80, 6, 4)
    one_hot = np.eye(6)[logits.argmax(axis=1)]
    hard = nce(None, y, logits=logits).value
    assert leep(None, y, logits=1e3 * one_hot).value == pytest.approx(hard, abs=1e-9)


def test_nleep_is_leep_on_the_clusters_of_scikit_learn():
    # many rows for each component; fewer than dimensions; one for each; both kinds at once
    for shape in [(120, 10, 4), (40, 90, 3), (60, 20, 30), (200, 40, 6)]:
        X, y = samples(0, *shape)
        data = load(X, y)
        model = PCA(0.8, svd_solver="full")
        Z = model.fit_transform(data.X)
        mixture = GaussianMixture(min(5 * shape[2], shape[0]), random_state=0)
        theta = mixture.fit(Z / np.sqrt(model.explained_variance_[0])).predict_proba(
            Z / np.sqrt(model.explained_variance_[0])
        )
        result = nleep(X, y)
        assert result.details["n_pca"] == Z.shape[1]
        assert result.value == pytest.approx(plain_leep(theta, data.y).mean(), abs=1e-6)


def test_nleep_of_many_classes_needs_no_covariance_of_each_component():
    """Five components for each of 60 classes, in 300 dimensions: 216 MB as matrices, twice."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(60), 6)
    X = rng.normal(size=(60, 400))[y] + rng.normal(size=(360, 400))
    tracemalloc.start()
    try:
        result = nleep(X, y)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert result.details["n_components"] == 300
    assert -0.5 < result.value <= 0


def test_nleep_of_separated_clusters_is_zero():
    X, y = samples(0, 80, 6, 4, separation=100.0)
    assert nleep(X, y, components_per_class=1).value == pytest.approx(0, abs=1e-6)
    for covariance in ("diag", "spherical"):
        assert nleep(X, y, covariance=covariance).value == pytest.approx(0, abs=1e-6)


def test_tmi_equals_its_formula():
    X, y = samples(0, 60, 5, 4)
    expected = sum(len(Z) / 60 * np.trace(np.cov(Z.T, bias=True)) for Z in classes(X, y))
    assert tmi(X, y).value == pytest.approx(expected, rel=1e-12)
    assert tmi(10 * X, y).value == pytest.approx(100 * expected, rel=1e-12)


# --- relaxation -------------------------------------------------------------------------------


def relaxed(X, y, radius, step, exit_ratio):
    """Balls that push each other, pair by pair, moving all samples in every step."""
    spread, centre = X.std(axis=0), X.mean(axis=0)
    X = (X - centre) / spread
    first, taken = None, 0
    while taken < 6:
        groups = classes(X, y)
        mu = [Z.mean(axis=0) for Z in groups]
        r = [np.sqrt(Z.var(axis=0).sum()) for Z in groups]
        delta = np.zeros_like(np.stack(mu))
        for i, j in combinations(range(len(mu)), 2):
            d = np.linalg.norm(mu[i] - mu[j])
            force = max(radius * (r[i] + r[j]) - d, 0)
            push = min(0.5 * step**2 * force, force) * (mu[i] - mu[j]) / d
            delta[i] += push
            delta[j] -= push
        total = np.abs(delta).sum()
        first = total if first is None else first
        if total <= exit_ratio * first:
            break
        X = X + delta[y]
        taken += 1
    return X * spread + centre, taken


@pytest.mark.parametrize("shape", [(120, 10, 4), (40, 90, 3), (60, 4, 9)])
@pytest.mark.parametrize(("step", "exit_ratio"), [(0.1, 0.5), (0.5, 0.5), (0.8, 0.05), (3, 0.5)])
def test_ped_equals_its_steps(shape, step, exit_ratio):
    X, y = samples(0, *shape, separation=0.5)
    moved, steps = relaxed(X, y, 0.6, step, exit_ratio)
    result = ped(X, y, step=step, exit_ratio=exit_ratio)
    assert result.details["n_steps"] == steps > 0
    assert result.value == pytest.approx(logme(moved, y).value, abs=1e-8)
    expected = sfda(moved, y).value
    for base in ("sfda", sfda):
        value = ped(X, y, base=base, step=step, exit_ratio=exit_ratio).value
        assert value == pytest.approx(expected, abs=1e-7)


def test_ped_leaves_classes_without_overlap_alone():
    X, y = samples(0, 60, 8, 3, separation=50.0)
    result = ped(X, y)
    assert result.details["n_steps"] == 0
    assert result.value == pytest.approx(logme(X, y).value, abs=1e-9)
    assert ped(X, y, base=lambda features, labels: len(labels)).value == 60


# --- linear classifiers -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 4, 3), (20, 30, 3)])
@pytest.mark.parametrize(("a", "s"), [(1.0, 100.0), (0.1, 10.0)])
def test_pactran_equals_its_formula_with_torch(shape, a, s):
    """Newton's method, and the trace of the Hessian as torch computes it."""
    import torch

    X, y = samples(0, *shape)
    N, D, C = shape
    Z, target = torch.as_tensor(X - X.mean(axis=0)), torch.as_tensor(y)
    strength, beta = a * N, a * N * D / s

    def loss(theta):
        W, b = theta[: D * C].reshape(D, C), theta[D * C :]
        entropy = torch.nn.functional.cross_entropy(Z @ W + b, target)
        return entropy + (W**2).sum() / (2 * strength)

    theta = torch.zeros((D + 1) * C, dtype=torch.float64)
    H = g = torch.ones(1)
    for _ in range(50):
        H = torch.autograd.functional.hessian(loss, theta)
        g = torch.autograd.functional.jacobian(loss, theta)
        direction = torch.linalg.lstsq(H, g, driver="gelsd").solution  # b + constant: singular
        t = 1.0
        while loss(theta - t * direction) > loss(theta) and t > 1e-6:
            t /= 2
        theta = theta - t * direction
    assert g.abs().max() < 1e-8
    expected = loss(theta) + D * C / (2 * beta) * torch.log(strength / (D * C) * H.trace())
    result = pactran(X, y, a=a, s=s)
    assert result.value == pytest.approx(-float(expected), abs=2e-4)
    assert result.details["loss"] == pytest.approx(float(loss(theta)), abs=1e-8)
    assert result.details["converged"]


@pytest.mark.parametrize("shape", [(60, 8, 2), (50, 80, 2), (40, 2, 2)])
def test_knn_of_two_classes_equals_scikit_learn(shape):
    for seed in range(3):
        X, y = samples(seed, *shape)
        for k in (1, 3, 5):
            model = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
            expected = cross_val_score(model, X, y, cv=LeaveOneOut())
            result = knn(X, y, k=k)
            np.testing.assert_array_equal(result.per_sample, expected)


def test_knn_equals_a_plain_vote():
    X, y = samples(0, 80, 6, 5)
    _, near = (
        NearestNeighbors(n_neighbors=21, metric="cosine", algorithm="brute").fit(X).kneighbors(X)
    )
    accuracies = {}
    for k in (1, 3, 5, 10, 20):
        right = []
        for n in range(80):
            votes = [y[m] for m in near[n] if m != n][:k]
            most = max(Counter(votes).values())
            winner = next(v for v in votes if votes.count(v) == most)
            right.append(winner == y[n])
        accuracies[str(k)] = np.mean(right)
    result = knn(X, y)
    assert result.details["accuracies"] == pytest.approx(accuracies)
    assert result.value == max(accuracies.values())
    assert accuracies[str(result.details["k"])] == result.value


def test_knn_in_blocks(monkeypatch):
    import importlib

    module = importlib.import_module("sfda_tune.metrics.knn")
    X, y = samples(0, 300, 6, 5)
    expected = knn(X, y)
    monkeypatch.setattr(module, "BLOCK", 300 * 7)
    np.testing.assert_array_equal(knn(X, y).per_sample, expected.per_sample)


@pytest.mark.parametrize("shape", [(120, 10, 4), (40, 90, 3), (60, 4, 9), (60, 5, 2)])
@pytest.mark.parametrize("C", [1e-3, 1e-1, 1.0])
def test_linear_probe_equals_scikit_learn(shape, C):
    X, y = samples(0, *shape)
    data = load(X, y)
    right, log_p = np.zeros(len(y)), np.zeros(len(y))
    for test in _held_out(data, 5):
        scaler = StandardScaler().fit(data.X[~test])
        model = LogisticRegression(C=C, tol=1e-8, max_iter=5000)
        model.fit(scaler.transform(data.X[~test]), data.y[~test])
        assert len(model.classes_) == shape[2]
        if shape[2] == 2:  # scikit-learn has one column of weights; ours has two, of opposite sign
            model.C = 2 * C
            model.fit(scaler.transform(data.X[~test]), data.y[~test])
        Z = scaler.transform(data.X[test])
        right[test] = model.predict(Z) == data.y[test]
        log_p[test] = model.predict_log_proba(Z)[np.arange(test.sum()), data.y[test]]
    result = linear_probe(X, y, grid=[C])
    assert result.details["log_likelihood"] == pytest.approx(log_p.mean(), abs=1e-3)
    assert result.value == pytest.approx(right.mean(), abs=1.5 / shape[0])


def test_linear_probe_chooses_by_held_out_probability():
    X, y = samples(0, 120, 10, 4)
    by_C = {C: linear_probe(X, y, grid=[C]).details["log_likelihood"] for C in (1e-4, 1e-2, 1.0)}
    chosen = linear_probe(X, y, grid=list(by_C))
    assert chosen.details["C"] == max(by_C, key=by_C.__getitem__)
    assert chosen.details["log_likelihood"] == pytest.approx(max(by_C.values()), abs=1e-3)


def test_folds_hold_each_sample_once_and_all_classes():
    data = load(*samples(0, 103, 3, 4))
    masks = np.stack(_held_out(data, 5))
    assert (masks.sum(axis=0) == 1).all()
    assert np.ptp(masks.sum(axis=1)) <= 4
    for c in range(4):
        assert np.ptp(masks[:, data.y == c].sum(axis=1)) <= 1


def test_the_own_softmax_regression_is_a_minimum():
    from sfda_tune.metrics._linear import fit_softmax

    X, y = samples(0, 80, 6, 3)
    theta, converged = fit_softmax(X, y, 3, 0.01, tolerance=1e-9, max_iter=2000)

    def loss(flat):
        W, b = flat[:18].reshape(6, 3), flat[18:]
        log_p = log_softmax(X @ W + b, axis=1)[np.arange(80), y]
        return -log_p.mean() + 0.005 * np.sum(W**2)

    best = minimize(loss, np.zeros(21), method="BFGS", options={"gtol": 1e-6})
    assert converged
    assert loss(theta.ravel()) == pytest.approx(best.fun, abs=1e-9)
