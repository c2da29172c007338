"""Linear algebra of the Fisher metrics: no eigendecomposition of a D × D matrix, one float64 copy.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
N, D, C     samples, feature dimensions, classes
Z           deviations z_n = x_n − μ_{y_n}, rows sorted by class                        (N, D)
M           class means μ_c, minus the overall mean                                     (C, D)
q           class frequencies n_c/N                                                     (C,)
S_W         ZᵀZ/N, the biased pooled within-class covariance                            (D, D)
G           the smaller of ZᵀZ/N ("primal") and ZZᵀ/N ("dual", N < D)                   (·, ·)
λ, ρ        shrinkage in (0, 1] and ridge > 0
S̃           (1−λ)S_W + ρI                                                               (D, D)
A           (1−λ)G + ρI = LLᵀ; it is S̃ itself on the primal path                         (·, ·)
δ           discriminants x_nᵀS̃⁻¹μ_k − ½μ_kᵀS̃⁻¹μ_k + log q_k                            (N, C)
==========  ==========================================================================  ==========

Every score needs S̃⁻¹ only between samples and class means. One symmetric rank-k update and one
Cholesky factorisation give it; the generalised eigenproblem S_B u = v S̃ u does not have to be
solved, because its eigenvectors satisfy EEᵀ = S̃⁻¹.

The dual path rests on S̃⁻¹Zᵀ = ZᵀA⁻¹. With a = A⁻¹ZMᵀ it gives z_nᵀS̃⁻¹μ_k = a_nk, and with
r_k = μ_k − (1−λ)/N·Zᵀa_k

    μ_jᵀS̃⁻¹μ_k = r_j·r_k/ρ + (1−λ)/N·a_j·a_k.

This form is stationary in a, so that an error in a enters squared. The textbook difference
[μ_j·μ_k − …]/ρ was rejected: it loses log₁₀(1/λ) digits.

Memory: Z, one G, and blocks of rows that together stay below 2·D² (2·N²) numbers, plus 2·C·D.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from scipy.linalg import eigh, get_blas_funcs, get_lapack_funcs

from sfda_tune.values import encode_labels

Array: TypeAlias = Any  # an ndarray, or a torch tensor on the device of the features

dsymv, dsyrk = get_blas_funcs(("symv", "syrk"), dtype=np.float64)
dpotrf, dpotrs = get_lapack_funcs(("potrf", "potrs"), dtype=np.float64)

EPS = float(np.finfo(np.float64).eps)
LARGEST = 1e75  # of |feature|: fourth powers stay finite in float64
JITTER = 1e-10  # × tr S_W/D: the ridge of the published λ floor, known to be enough


# --- two backends, one vocabulary -------------------------------------------------------------


class NumpyOps:
    """BLAS and LAPACK on the host; every large operand is passed without a copy."""

    device = "cpu"

    def asarray(self, array: Array) -> Array:
        return np.asarray(array)

    def to_numpy(self, array: Array) -> Array:
        return array

    def copy(self, array: Array) -> Array:
        return array.copy()

    def exp(self, array: Array) -> Array:
        return np.exp(array)

    def zeros(self, *shape: int) -> Array:
        return np.zeros(shape)

    def take(self, features: Array, order: Array) -> Array:
        """Rows in the given order, as a new float64 array."""
        out = np.empty(features.shape)
        step = max(
            1, 2**17 // features.shape[1]
        )  # blocks: a float32 gather would be half a copy more
        for i in range(0, len(out), step):
            out[i : i + step] = features[order[i : i + step]]
        return out

    def gram(self, Z: Array, dual: bool) -> Array:
        """Lower triangle of ZZᵀ/N if `dual`, else of ZᵀZ/N."""
        return dsyrk(1.0 / len(Z), Z.T, trans=int(dual), lower=1)  # Z.T: Fortran order, no copy

    def symv(self, G: Array, v: Array) -> Array:
        return dsymv(1.0, G, v, lower=1)

    def cholesky(self, G: Array, scale: float, ridge: float) -> Array | None:
        """Factor of scale·G + ridge·I in the memory of G; None if numerically singular."""
        G *= scale
        diagonal = np.einsum("ii->i", G)  # a writable view
        diagonal += ridge
        before = diagonal.copy()
        L, info = dpotrf(G, lower=1, clean=0, overwrite_a=1)
        return None if info or _singular(np.einsum("ii->i", L), before) else L

    def solve(self, L: Array, B: Array) -> Array:
        return dpotrs(L, B, lower=1)[0]

    def log_softmax(self, rows: Array) -> Array:
        """Over the columns; may overwrite `rows`."""
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        return rows

    def pick(self, rows: Array, columns: Array) -> Array:
        """One element of each row."""
        return rows[np.arange(len(rows)), columns]


class TorchOps:
    """The same on a torch device; always float64, since `float32` loses λ at its floor."""

    def __init__(self, device: Any) -> None:
        import torch  # imported already by whoever made the tensor

        self.torch, self.device = torch, device

    def asarray(self, array: Any) -> Array:
        return self.torch.as_tensor(array, device=self.device)

    def to_numpy(self, array: Array) -> Array:
        return array.cpu().numpy()

    def copy(self, array: Array) -> Array:
        return array.clone()

    def exp(self, array: Array) -> Array:
        return array.exp()

    def zeros(self, *shape: int) -> Array:
        return self.torch.zeros(shape, dtype=self.torch.float64, device=self.device)

    def take(self, features: Array, order: Array) -> Array:
        return features.index_select(0, self.asarray(order)).to(self.torch.float64)

    def gram(self, Z: Array, dual: bool) -> Array:
        return (Z @ Z.T if dual else Z.T @ Z).div_(len(Z))  # torch has no rank-k update

    def symv(self, G: Array, v: Array) -> Array:
        return G @ v

    def cholesky(self, G: Array, scale: float, ridge: float) -> Array | None:
        diagonal = G.mul_(scale).diagonal()
        diagonal += ridge
        L, info = self.torch.linalg.cholesky_ex(G)
        return None if int(info) or _singular(L.diagonal(), diagonal) else L

    def solve(self, L: Array, B: Array) -> Array:
        return self.torch.cholesky_solve(B, L)

    def log_softmax(self, rows: Array) -> Array:
        return self.torch.log_softmax(rows, 1)

    def pick(self, rows: Array, columns: Array) -> Array:
        return rows.gather(1, columns[:, None])[:, 0]


Ops: TypeAlias = NumpyOps | TorchOps


def _singular(pivots: Array, diagonal: Array) -> bool:
    """Whether a squared pivot is nothing but the rounding error of its diagonal element."""
    return bool((pivots**2 <= 16 * EPS * diagonal).any())


# --- input ------------------------------------------------------------------------------------


def load(features: Any, labels: Any, ops: Ops | None = None) -> Samples:
    """Check the input of a metric and sort it by class; `ops` overrides the choice of backend."""
    dtype = str(getattr(features, "dtype", "")).removeprefix("torch.")
    features, chosen = _as_matrix(features)
    n_rows = features.shape[0]
    codes, classes = encode_labels(labels)
    if len(codes) != n_rows:
        raise ValueError(
            f"`labels` must hold one label per row of `features` but there are {len(codes)} "
            f"labels and {n_rows} rows; pass the labels of exactly these rows."
        )
    if not codes.any():
        raise ValueError(
            f"`labels` must hold at least two classes but every label is {classes[0]!r}; "
            "a single class has no discriminant: pass samples of the other classes too."
        )
    ops = ops or chosen
    if isinstance(ops, TorchOps):
        features = ops.asarray(features)
    order = np.argsort(codes, kind="stable")
    samples = Samples(ops, ops.take(features, order), np.bincount(codes), order)
    samples.dtype = dtype or str(features.dtype)
    return samples


def _as_matrix(features: Array) -> tuple[Array, Ops]:
    """Return the features as a finite, real (N, D) array or CUDA tensor, and their backend."""
    ops: Ops = NumpyOps()
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported torch
    if torch is not None and isinstance(features, torch.Tensor):
        features = features.detach()
        if features.dtype == torch.bool or (
            features.is_floating_point() and features.itemsize < 4
        ):
            features = features.float()  # bfloat16, float8: unknown to NumPy, and without `min`
        if features.is_cuda:
            ops = TorchOps(features.device)
        else:
            features = features.numpy(force=True)
    else:
        try:
            features = np.asarray(features)
        except ValueError as error:  # ragged lists
            raise ValueError(
                f"`features` must be a (n_samples, n_dims) array but NumPy cannot build it from "
                f"{type(features).__name__} ({error}); give every row the same length."
            ) from None
    kind = "c" if "complex" in str(features.dtype) else getattr(features.dtype, "kind", "f")
    if kind not in "biuf":
        raise ValueError(
            f"`features` must be a dense array of real numbers but its dtype is {features.dtype}; "
            "convert it first, for instance with `features.astype(float)`."
        )
    if features.ndim != 2:
        raise ValueError(
            f"`features` must be two-dimensional (n_samples, n_dims) but has shape "
            f"{tuple(features.shape)}; pool or flatten each sample to one row."
        )
    if 0 in features.shape:
        raise ValueError(
            f"`features` must have at least one row and one column but has shape "
            f"{tuple(features.shape)}; check the step that extracted it."
        )
    with np.errstate(invalid="ignore"):
        low, high = float(features.min()), float(features.max())  # no copy; NaN comes through
    if not (math.isfinite(low) and math.isfinite(high)):
        finite = torch.isfinite if isinstance(ops, TorchOps) and torch else np.isfinite
        rows = np.flatnonzero(np.any(ops.to_numpy(~finite(features)), axis=1))
        raise ValueError(
            f"`features` must be finite but {len(rows)} of {len(features)} rows hold NaN or Inf, "
            f"the first is row {rows[0]}; drop those rows (and their labels) or extract them in "
            "float32 instead of half precision."
        )
    if max(-low, high) > LARGEST:
        raise ValueError(
            f"`features` must not exceed {LARGEST:g} in magnitude but spans {low:g} to {high:g}; "
            "divide it by a constant, or check for a broken backbone."
        )
    return features, ops


# --- the statistics of one stage --------------------------------------------------------------


class Samples:
    """Features sorted by class, split into class means `M` and deviations `Z`.

    `Z` is the only array of the size of the features and belongs to this object: `mix` overwrites
    it, the caller's array is never touched.
    """

    dtype = "float64"  # of the caller's features

    def __init__(self, ops: Ops, rows: Array, counts: np.ndarray, order: np.ndarray) -> None:
        self.ops, self.Z, self.counts, self.order = ops, rows, counts, order
        (self.N, self.D), self.C = rows.shape, len(counts)
        self.dual = self.N < self.D  # tests and benchmarks force the other path
        self.q = counts / self.N
        self.y = ops.asarray(np.repeat(np.arange(self.C), counts))
        self.M = ops.zeros(self.C, self.D)
        self._split()

    def of_each_class(self) -> Iterator[tuple[int, slice]]:
        """Classes and the slices of their rows."""
        bounds = np.concatenate([[0], np.cumsum(self.counts)]).tolist()
        for c, (i, j) in enumerate(pairwise(bounds)):
            yield c, slice(i, j)

    def _split(self) -> None:
        """Turn the rows in `Z` into class means and deviations from them."""
        copy = self.ops.copy
        for c, rows in self.of_each_class():
            Z_c = self.Z[rows]
            # Relative to a sample of the class: rounding cannot turn a constant class into one
            # with variance, nor can a large common offset cost digits.
            origin = copy(Z_c[0])
            Z_c -= origin
            mean = Z_c.mean(0)
            Z_c -= mean
            self.M[c] = origin + mean
        self.M -= copy(self.M[0])
        self.M -= self.ops.asarray(self.q) @ self.M

    def mix(self, p: Array) -> None:
        """Replace x_n by p_n·x_n + (1 − p_n)·(unweighted mean of the other class means)."""
        total = self.M.sum(0)
        for c, rows in self.of_each_class():
            others = (total - self.M[c]) / (self.C - 1)
            Z_c = self.Z[rows]
            Z_c += self.M[c] - others
            Z_c *= p[rows, None]
            Z_c += others
        self._split()

    def unsorted(self, values: Array) -> np.ndarray:
        """Per-sample values, in the order of the caller's rows."""
        out = np.empty(values.shape)
        out[self.order] = self.ops.to_numpy(values)
        return out


def _start(n: int) -> np.ndarray:
    """Return a vector in general position, the same each time."""
    return np.random.default_rng(0).normal(size=n)


class Scatter:
    """S_W of some samples, held as the smaller of its two Gram matrices."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.dual = samples.dual
        self._gram()
        self.trace = float(self.G.diagonal().sum())  # tr S_W

    def _gram(self) -> None:
        self.G = self.samples.ops.gram(self.samples.Z, self.dual)

    def __matmul__(self, v: Array) -> Array:
        if self.dual:
            return self.samples.Z.T @ (self.samples.Z @ v) / self.samples.N
        return self.samples.ops.symv(self.G, v)

    def sigma_from_row_sums(self) -> float:
        """‖S_W⁷·1‖ / ‖S_W⁶·1‖: the published estimate of the largest eigenvalue, not converged.

        Features whose deviations all sum to zero (class probabilities, for instance) have
        S_W·1 = 0; the published code then amplifies rounding errors, here a fixed vector starts
        the iteration instead.
        """
        ops, D = self.samples.ops, self.samples.D
        if self.trace == 0:
            return 0.0

        def step(v: Array) -> tuple[float, Array]:
            v = (self @ v) / self.trace  # ‖v‖ ≤ 1: no overflow or underflow on any scale
            norm = float(v @ v) ** 0.5
            return norm, v / (norm or 1.0)

        norm, v = step(ops.zeros(D) + D**-0.5)
        if norm <= 1e-12 / D:
            norm, v = step(ops.asarray(_start(D) / D**0.5))
        for _ in range(6):
            norm, v = step(v)
        return norm * self.trace

    def largest_eigenvalue(self) -> float:
        """Largest eigenvalue of S_W to machine precision, by Lanczos from a fixed start."""
        n = len(self.G)
        if n == 1 or self.trace == 0:
            return self.trace
        # Imported here: it doubles the import time of this module, and one variant needs it.
        from scipy.sparse.linalg import LinearOperator, eigsh

        ops = self.samples.ops

        def matvec(v: np.ndarray) -> np.ndarray:
            return ops.to_numpy(ops.symv(self.G, ops.asarray(v.ravel())))

        operator = LinearOperator((n, n), matvec=matvec, dtype=np.float64)  # type: ignore[call-arg]
        return float(eigsh(operator, k=1, which="LA", v0=_start(n), return_eigenvectors=False)[0])

    def discriminants(self, shrinkage: float, ridge: float) -> Discriminants:
        """δ for S̃ = (1−λ)S_W + ρI; overwrites G, so call it last.

        ρ is raised where the formula leaves S̃ numerically singular: to 1e-8 of the mean
        between-class variance if there is no scatter beside it (small enough for certainty, large
        enough for the priors to decide between equal means), else to 1e-40 of it, to 1e-280 for
        constant features; and by 1e-10, 1e-8, … of the mean within-class variance after a failed
        factorisation. The sum of what was added is `Discriminants.jitter`.
        """
        x = self.samples
        between = float(x.ops.asarray(x.q) @ (x.M**2).sum(1))  # tr S_B
        least = 1e-8 if self.trace <= 1e-30 * between else 1e-40
        rho = max(ridge, least * between / x.D, 1e-280)
        step = max(JITTER * self.trace / x.D, 1e-280)
        while (L := x.ops.cholesky(self.G, 1 - shrinkage, rho)) is None:
            rho += step
            step *= 100
            self._gram()
        del self.G
        solve = _solve_dual if self.dual else _solve_primal
        inner, squares = solve(x, L, (1 - shrinkage) / x.N, rho)
        return Discriminants(x, inner, squares, jitter=rho - ridge)


Inner: TypeAlias = Callable[[slice | None], Array]  # rows → XS̃⁻¹Mᵀ, (n_rows, C); None → MS̃⁻¹Mᵀ


def _solve_primal(x: Samples, L: Array, beta: float, rho: float) -> tuple[Inner, Array]:
    W = x.ops.solve(L, x.M.T)  # S̃⁻¹Mᵀ, (D, C)

    def inner(rows: slice | None) -> Array:
        return (x.M if rows is None else x.Z[rows] + x.M[x.y[rows]]) @ W

    return inner, (x.M * W.T).sum(1)


def _solve_dual(x: Samples, L: Array, beta: float, rho: float) -> tuple[Inner, Array]:
    a = x.ops.solve(L, x.Z @ x.M.T)  # ZS̃⁻¹Mᵀ, (N, C)
    for _, rows in x.of_each_class():
        a[rows] -= a[rows].mean(0)  # the mean is zero in theory, rounding error/ρ in practice
    Q = beta * (a.T @ a)  # MS̃⁻¹Mᵀ, (C, C)
    for i in range(0, x.D, 1024):  # blocks of columns: no second (C, D) array
        columns = slice(i, i + 1024)
        r = x.M[:, columns] - beta * (a.T @ x.Z[:, columns])
        Q += r @ r.T / rho

    def inner(rows: slice | None) -> Array:
        return Q if rows is None else a[rows] + Q[x.y[rows]]

    return inner, Q.diagonal()


class Discriminants:
    """δ_k(x_n) = x_nᵀS̃⁻¹μ_k − ½μ_kᵀS̃⁻¹μ_k + log q_k, computed in blocks of rows."""

    def __init__(self, samples: Samples, inner: Inner, squares: Array, jitter: float) -> None:
        self.samples, self.inner, self.jitter = samples, inner, jitter
        self.offset = samples.ops.asarray(np.log(samples.q)) - 0.5 * squares

    def blocks(self) -> Iterator[slice]:
        """Slices of rows, small beside a D × D (N × N) matrix."""
        x = self.samples
        budget = min(max(min(x.N, x.D) ** 2 // 2, 2**14), 2**20)
        step = max(1, budget // max(x.C, x.D))
        yield from (slice(i, min(i + step, x.N)) for i in range(0, x.N, step))

    def log_posterior(self) -> Iterator[tuple[slice, Array]]:
        """Rows and their log p(c|x), the log-softmax of δ over all classes."""
        for rows in self.blocks():
            delta = self.inner(rows)
            delta += self.offset
            yield rows, self.samples.ops.log_softmax(delta)

    def of_true_class(self, transform: Callable[[Array], Array] | None = None) -> Array:
        """Return log p(y_n|x_n), or the true class of ``transform(log_posterior)``; (N,)."""
        x, out = self.samples, self.samples.ops.zeros(self.samples.N)
        for rows, log_p in self.log_posterior():
            values = transform(log_p) if transform else log_p
            out[rows] = x.ops.pick(values, x.y[rows])
        return out

    def fisher_features(self) -> Samples:
        """Project the samples on the eigenvectors of S_B u = v S̃ u with v > 0 and UᵀS̃U = I.

        They lie in the span of S̃⁻¹Mᵀ, so the C × C matrix √q·MS̃⁻¹Mᵀ·√q has the same v > 0. There
        are at most min(D, C−1); coordinates of directions without separation are zero.
        """
        x, ops = self.samples, self.samples.ops
        root_q = np.sqrt(x.q)
        v, E = eigh(root_q[:, None] * ops.to_numpy(self.inner(None)) * root_q)
        kept = min(x.D, x.C - 1)
        v, E = v[-kept:], E[:, -kept:]
        present = v > max(10 * x.C * EPS * v[-1], 0)
        T = root_q[:, None] * E * np.where(present, np.where(present, v, 1) ** -0.5, 0)
        out = ops.zeros(x.N, kept)
        for rows in self.blocks():
            out[rows] = self.inner(rows) @ ops.asarray(T)
        return Samples(ops, out, x.counts, x.order)


def posterior(x: Samples, shrinkage: float) -> np.ndarray:
    """p(c|x_n) of regularised LDA with S̃ = (1−λ)S_W + λ(tr S_W/D)I, in the caller's row order."""
    S_W = Scatter(x)
    out = x.ops.zeros(x.N, x.C)
    for rows, log_p in S_W.discriminants(shrinkage, shrinkage * S_W.trace / x.D).log_posterior():
        out[rows] = x.ops.exp(log_p)
    return x.unsorted(out)
