"""A Gaussian mixture as scikit-learn fits it, at a cost that many components of few rows allow.

A component with m rows of any weight has the covariance BᵀB + r·I: B (m, K) are these rows,
centred and weighted, r is the regularisation. With B = V·s·Uᵀ the Mahalanobis distance of d is ::

    |d|²/r + Σ_j ((u_jᵀd)² (1/(s_j² + r) − 1/r))

which takes m columns instead of K; and of the responsibilities only those above zero are kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csc_array, csr_array
from scipy.sparse import vstack as stack_rows
from scipy.special import logsumexp

__all__ = ["fit_mixture"]

# As scikit-learn's `GaussianMixture` has them by default.
REGULARISATION, TOLERANCE, MAX_ITER = 1e-6, 1e-3, 100
COLUMNS, CELLS = 4096, 1 << 23  # of the blocks that are computed at a time


def fit_mixture(
    X: np.ndarray, n_components: int, covariance: str, seed: int
) -> tuple[Any, int, bool]:
    """Return responsibilities (N, n_components), perhaps sparse; steps; whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if covariance == "full":
        return _fit_full(X, n_components, seed)
    mixture = GaussianMixture(n_components, covariance_type=covariance, random_state=seed)
    with warnings.catch_warnings():  # reported in the details
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(X)
    return mixture.predict_proba(X), int(mixture.n_iter_), bool(mixture.converged_)


def _fit_full(X: np.ndarray, n_components: int, seed: int) -> tuple[csr_array, int, bool]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    N = len(X)
    if n_components == N:  # each row is a cluster, which k-means takes minutes to find out
        labels = np.unique(X, axis=0, return_inverse=True)[1].reshape(-1)
    else:
        with warnings.catch_warnings():  # fewer different rows than components
            warnings.simplefilter("ignore", ConvergenceWarning)
            state = np.random.RandomState(seed)  # as scikit-learn has it
            kmeans: Any = KMeans(n_components, n_init=cast(Any, 1), random_state=state)
            labels = kmeans.fit(X).labels_
    theta = csr_array((np.ones(N), (np.arange(N), labels)), shape=(N, n_components))
    before, fit, step = -math.inf, _maximise(X, theta), 0
    while step < MAX_ITER:
        step += 1
        likelihood, theta = _expect(X, fit)
        fit = _maximise(X, theta)
        if abs(likelihood - before) < TOLERANCE:
            return _expect(X, fit)[1], step, True
        before = likelihood
    return _expect(X, fit)[1], step, False


@dataclass(frozen=True)
class _Block:
    """Some components: their directions side by side, those of component k from ``starts[k]``."""

    means: np.ndarray  # (k, K)
    directions: np.ndarray  # (K, Σm)
    weights: np.ndarray  # (Σm,): what (uᵀd)² counts in the distance
    owners: csr_array  # (Σm, k): column → component
    base: np.ndarray  # (k,): what |d|² counts
    constant: np.ndarray  # (k,): log weight and log determinant


def _maximise(X: np.ndarray, theta: csr_array) -> list[_Block]:
    """M-step: weights, means and covariances of the components."""
    return list(_join(_components(X, csc_array(theta))))


def _components(X: np.ndarray, theta: csc_array) -> Iterator[tuple[Any, ...]]:
    K = X.shape[1]
    sizes = theta.sum(axis=0) + 10 * np.finfo(float).eps
    for k, size in enumerate(sizes):
        some = slice(theta.indptr[k], theta.indptr[k + 1])
        weights, rows = theta.data[some], X[theta.indices[some]]
        mean = weights @ rows / size
        B = np.sqrt(weights / size)[:, None] * (rows - mean)
        if len(B) < K:
            _, s, Ut = np.linalg.svd(B, full_matrices=False)
            U, values, base = Ut.T, s * s, 1 / REGULARISATION
        else:
            values, U = eigh(B.T @ B, check_finite=False)
            values, base = np.maximum(values, 0), 0.0
        values = values + REGULARISATION
        logdet = np.log(values).sum() + (K - len(values)) * math.log(REGULARISATION)
        constant = math.log(size / sizes.sum()) - 0.5 * (K * math.log(2 * math.pi) + logdet)
        yield mean, U, 1 / values - base, base, constant


def _join(components: Iterator[tuple[Any, ...]]) -> Iterator[_Block]:
    some: list[tuple[Any, ...]] = []
    for component in components:
        some.append(component)
        if sum(len(c[2]) for c in some) >= COLUMNS:
            yield _block(some)
            some = []
    if some:
        yield _block(some)


def _block(some: list[tuple[Any, ...]]) -> _Block:
    means, directions, weights, base, constant = zip(*some, strict=True)
    counts = [len(w) for w in weights]
    owner = np.repeat(np.arange(len(some)), counts)
    n = len(owner)
    owners = csr_array((np.ones(n), (np.arange(n), owner)), shape=(n, len(some)))
    return _Block(
        np.array(means), np.hstack(directions), np.concatenate(weights), owners,
        np.array(base), np.array(constant),
    )  # fmt: skip


def _expect(X: np.ndarray, fit: list[_Block]) -> tuple[float, csr_array]:
    """E-step: the mean log-likelihood, and the responsibilities."""
    n_components = sum(len(block.base) for block in fit)
    parts, total = [], 0.0
    size = max(1, CELLS // max(n_components, COLUMNS))
    for start in range(0, len(X), size):
        rows = X[start : start + size]
        logs = np.hstack([_log_densities(rows, block) for block in fit])
        norms = np.asarray(logsumexp(logs, axis=1, keepdims=True))
        total += norms.sum()
        parts.append(csr_array(np.exp(logs - norms)))
    return total / len(X), csr_array(stack_rows(parts))


def _log_densities(X: np.ndarray, block: _Block) -> np.ndarray:
    """Return the logarithms of weight times density, (N, k)."""
    squares = (X * X).sum(1)[:, None] - 2 * X @ block.means.T + (block.means**2).sum(1)
    offsets = (block.owners @ block.means * block.directions.T).sum(1)
    inner = (X @ block.directions - offsets) ** 2 * block.weights
    return block.constant - 0.5 * (squares * block.base + (block.owners.T @ inner.T).T)
