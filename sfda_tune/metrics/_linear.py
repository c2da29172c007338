"""Linear classifiers on features: LDA in closed form, softmax and logistic regression."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from scipy.linalg import cho_solve, cholesky, eigh
from scipy.special import expit, log_softmax
from threadpoolctl import ThreadpoolController

from sfda_tune.metrics._input import Data

__all__ = [
    "fit_logistic",
    "fit_softmax",
    "lda_directions",
    "lda_log_posterior",
    "shrunk",
    "within",
]

LARGE = 1e9  # multiplications of one product, from which more threads may help


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def within(data: Data, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class means, and S_W with divisor N, of an (N, K) array."""
    M = data.means(X)
    Z = X - M[data.y]
    return M, Z.T @ Z / data.N


def shrunk(S: np.ndarray, lam: float, between: float, n_dims: int) -> np.ndarray:
    """S̃ = (1−λ)S + λ(tr S/D)I, kept regular: without scatter by `between`, the trace of S_B."""
    ridge = lam * np.trace(S) / n_dims
    if np.trace(S) <= 1e-30 * between or ridge == 0:
        ridge = max(ridge, 1e-8 * between / n_dims, 1e-280)
    return (1 - lam) * S + ridge * np.eye(len(S))


def lda_log_posterior(
    data: Data, X: np.ndarray, lam: float, n_dims: int | None = None
) -> np.ndarray:
    """Posterior log p(c|x_n) of LDA with S̃ = (1−λ)S_W + λ(tr S_W/D)I on centred features: (N, C).

    `n_dims` is D where the features were rotated into fewer dimensions.
    """
    M, S_W = within(data, X)
    S = shrunk(S_W, lam, float(data.q @ np.sum(M**2, axis=1)), n_dims or X.shape[1])
    W = cho_solve((cholesky(S, lower=True), True), M.T)  # S̃⁻¹Mᵀ
    return log_softmax(X @ W - 0.5 * np.sum(M * W.T, axis=1) + np.log(data.q), axis=1)


def lda_directions(data: Data, X: np.ndarray, lam: float) -> np.ndarray:
    """Project centred features on the min(D, C−1) leading u of S̃_B u = v S̃_W u, UᵀS̃_W U = I.

    Both matrices are shrunk by λ towards their own mean variance.
    """
    M, S_W = within(data, X)
    S_B = (M.T * data.q) @ M
    D = len(S_W)
    _, U = eigh(shrunk(S_B, lam, 0.0, D), shrunk(S_W, lam, float(np.trace(S_B)), D))
    return X @ U[:, -min(D, data.C - 1) :]


def fit_softmax(
    X: np.ndarray,
    y: np.ndarray,
    n_classes: int,
    penalty: float,
    *,
    start: np.ndarray | None = None,
    tolerance: float = 1e-6,
    max_iter: int = 500,
) -> tuple[np.ndarray, bool]:
    """Minimise (1/N) Σ_n −log softmax_{y_n}(x_nW + b) + ½·penalty·‖W‖²; the bias is free.

    Returns
    -------
    theta : ndarray of shape (n_dims + 1, n_classes)
        W above b.
    converged : bool
        Whether the largest gradient entry fell below `tolerance`.
    """
    N = len(X)
    rows = np.arange(N)

    def loss(delta: np.ndarray) -> float:
        delta -= delta.max(axis=1, keepdims=True)
        own = delta[rows, y]
        np.exp(delta, out=delta)
        total = delta.sum(axis=1)
        value = float(np.log(total).sum() - own.sum()) / N
        delta /= total[:, None]
        delta[rows, y] -= 1
        delta /= N
        return value

    return _fit(X, n_classes, loss, penalty, start, tolerance, max_iter)


def fit_logistic(
    X: np.ndarray,
    Y: np.ndarray,
    penalty: float,
    *,
    start: np.ndarray | None = None,
    tolerance: float = 1e-6,
    max_iter: int = 500,
) -> tuple[np.ndarray, bool]:
    """Minimise Σ_l [(1/N) Σ_n log(1 + exp(∓(x_nW + b)_l)) + ½·penalty·‖W_l‖²], a sum over labels.

    −log σ of the logit where Y is 1, of its negative where it is 0; nothing where it is −1.
    Returns what `fit_softmax` returns.
    """
    N, known = len(X), Y >= 0

    def loss(delta: np.ndarray) -> float:
        value = float(np.where(known, np.logaddexp(0, delta) - (Y == 1) * delta, 0.0).sum()) / N
        delta[:] = np.where(known, expit(delta) - Y, 0.0) / N
        return value

    return _fit(X, Y.shape[1], loss, penalty, start, tolerance, max_iter)


def _fit(
    X: np.ndarray,
    n_columns: int,
    loss: Callable[[np.ndarray], float],  # of XW + b, which it overwrites with its gradient
    penalty: float,
    start: np.ndarray | None,
    tolerance: float,
    max_iter: int,
) -> tuple[np.ndarray, bool]:
    from scipy.optimize import minimize

    N, D = X.shape

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        theta = flat.reshape(D + 1, n_columns)
        delta = X @ theta[:D]
        delta += theta[D]
        value = loss(delta)
        gradient = np.empty_like(theta)
        np.matmul(X.T, delta, out=gradient[:D])
        gradient[:D] += penalty * theta[:D]
        gradient[D] = delta.sum(axis=0)
        return value + 0.5 * penalty * float(np.vdot(theta[:D], theta[:D])), gradient.ravel()

    if start is None:
        start = np.zeros((D + 1, n_columns))
    # On two idle cores a second thread made it slower at every size tried, up to 20 times.
    with _blas().limit(limits=1 if N * D * n_columns < LARGE else None, user_api="blas"):
        fit = minimize(
            objective,
            start.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": max_iter, "maxfun": 2 * max_iter, "gtol": tolerance, "ftol": 0.0},
        )
    converged = bool(np.abs(fit.jac).max() <= tolerance) and math.isfinite(fit.fun)
    return fit.x.reshape(D + 1, n_columns), converged
