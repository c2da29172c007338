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
H           average within classes: H_nm = 1/n_c if n and m are of class c, else 0       (N, N)
h           z_nᵀS̃⁻¹z_n, the leverages                                                    (N,)
ā           (1−λ)n_c/(N(n_c−1)): without sample n, S̃ is N/(N−1)·[S̃ − ā z_n z_nᵀ]         (N,)
p'(c|x_n)   posterior of sample n from the fit without it, or without its group          (N, C)
==========  ==========================================================================  ==========

Every score needs S̃⁻¹ only between samples and class means. One symmetric rank-k update and one
Cholesky factorisation give it; the generalised eigenproblem S_B u = v S̃ u does not have to be
solved, because its eigenvectors satisfy EEᵀ = S̃⁻¹.

The dual path rests on S̃⁻¹Zᵀ = ZᵀA⁻¹. With a = A⁻¹ZMᵀ it gives z_nᵀS̃⁻¹μ_k = a_nk, and with
r_k = μ_k − (1−λ)/N·Zᵀa_k

    μ_jᵀS̃⁻¹μ_k = r_j·r_k/ρ + (1−λ)/N·a_j·a_k.

This form is stationary in a, so that an error in a enters squared. The textbook difference
[μ_j·μ_k − …]/ρ was rejected: it loses log₁₀(1/λ) digits.

The leave-one-out posterior divides by 1 − āh. For N < D this is of the order of λ, and the
difference would have lost all digits at λ = 1e-8; ``leave_one_out.md`` has the product (L6) that
the dual path takes instead, from A' = A + tr(S_W)·H. A'⁻¹Z = A⁻¹Z, so all this holds for A', too.

Comments ``# (7)`` bear the numbers of the paper, listed in ``sfda.py``; ``# (L3)`` those of
``leave_one_out.md``, the note on the leave-one-out posterior.

Memory: Z, one G, and blocks of rows that together stay below 2·D² (2·N²) numbers, plus 2·C·D;
for the leave-one-out posterior 2·C² more, and on the dual path (and for several λ) a second G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from scipy.linalg import eigh, get_blas_funcs, get_lapack_funcs

from sfda_tune.metrics._input import as_matrix, encode, encode_groups

Array: TypeAlias = Any  # an ndarray, or a torch tensor on the device of the features

dsymv, dsyrk, dtrsm = get_blas_funcs(("symv", "syrk", "trsm"), dtype=np.float64)
dpotrf, dpotri, dpotrs = get_lapack_funcs(("potrf", "potri", "potrs"), dtype=np.float64)

EPS = float(np.finfo(np.float64).eps)
JITTER = 1e-10  # × tr S_W/D: the ridge of the published λ floor, known to be enough
GUARD = 1e-8  # 1 − āh below it is rounding error on the primal path


# --- two backends, one vocabulary -------------------------------------------------------------


class NumpyOps:
    """BLAS and LAPACK on the host; every large operand is passed without a copy."""

    device = "cpu"
    block = 2**14, 2**20  # numbers in a block of rows, at least and at most: of the caches' size

    def asarray(self, array: Array) -> Array:
        return np.asarray(array)

    def to_numpy(self, array: Array) -> Array:
        return array

    def copy(self, array: Array) -> Array:
        return array.copy(order="K")

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

    def split(self, Z: Array, counts: np.ndarray) -> Array:
        """Subtract the mean of each class from its rows; return the means."""
        M = np.empty((len(counts), Z.shape[1]))
        for c, (i, j) in enumerate(_bounds(counts)):
            Z_c = Z[i:j]
            # Relative to a sample of the class: rounding cannot turn a constant class into one
            # with variance, nor can a large common offset cost digits.
            origin = Z_c[0].copy()
            Z_c -= origin
            mean = Z_c.mean(0)
            Z_c -= mean
            M[c] = origin + mean
        return M

    def gram(self, Z: Array, dual: bool) -> Array:
        """Lower triangle of ZZᵀ/N if `dual`, else of ZᵀZ/N."""
        return dsyrk(1.0 / len(Z), Z.T, trans=int(dual), lower=1)  # Z.T: Fortran order, no copy

    def symv(self, G: Array, v: Array) -> Array:
        return dsymv(1.0, G, v, lower=1)

    def norms(self, Z: Array, axis: int) -> Array:
        """Euclidean norms of the rows (axis 1) or columns (axis 0)."""
        return np.sqrt(np.einsum("ij,ij->i" if axis else "ij,ij->j", Z, Z))

    def squares(self, G: Array) -> float:
        """‖G‖² of a Gram matrix."""
        flat = G.ravel(order="K")  # a view; the triangle above is zero
        return 2 * float(flat @ flat) - float((G.diagonal() ** 2).sum())

    def cholesky(self, G: Array, ridge: float) -> Array | None:
        """Factor of G + ridge·I in the memory of G; None if numerically singular."""
        diagonal = np.einsum("ii->i", G)  # a writable view
        diagonal += ridge
        before = diagonal.copy()
        L, info = dpotrf(G, lower=1, clean=0, overwrite_a=1)
        return None if info or _singular(np.einsum("ii->i", L), before) else L

    def solve(self, L: Array, B: Array) -> Array:
        return dpotrs(L, B, lower=1)[0]

    def whiten(self, L: Array, rows: Array) -> Array:
        """L⁻¹z of each row z."""
        return dtrsm(1.0, L, rows.T, lower=1).T

    def inverse_squares(self, L: Array, rows: Array) -> Array:
        """‖L⁻¹z‖² of each row z."""
        V = self.whiten(L, rows)
        return np.einsum("ij,ij->i", V, V)

    def inverse(self, L: Array) -> Array:
        """(LLᵀ)⁻¹, whole; overwrites L."""
        return self.whole(dpotri(L, lower=1, overwrite_c=1)[0])

    def whole(self, G: Array) -> Array:
        """Both triangles of a symmetric matrix from the lower one."""
        lower = np.tril(G)
        out = lower + lower.T
        np.einsum("ii->i", out)[:] /= 2
        return out

    def eigh(self, matrices: Array) -> tuple[Array, Array]:
        """Eigenvalues and eigenvectors of a stack of symmetric matrices."""
        return np.linalg.eigh(matrices)

    def inverse_diagonals(self, L: Array, G: Array) -> tuple[Array, Array]:
        """Diagonals of A⁻¹ and of GA⁻¹ for A = LLᵀ; overwrites L."""
        inverse = dpotri(L, lower=1, overwrite_c=1)[0]
        diagonal = inverse.diagonal().copy()
        inverse *= G  # zero above the diagonal, as G is
        return diagonal, inverse.sum(0) + inverse.sum(1) - inverse.diagonal()

    def log_softmax(self, rows: Array) -> Array:
        """Over the columns; may overwrite `rows`."""
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        return rows

    def pick(self, rows: Array, columns: Array) -> Array:
        """One element of each row."""
        return rows[np.arange(len(rows)), columns]


class TorchOps:
    """The same on a torch device; always float64, since `float32` loses λ at its floor.

    No loop over classes: with 1,000 of them a GPU would do nothing but begin.
    """

    block = 2**22, 2**24

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

    def split(self, Z: Array, counts: np.ndarray) -> Array:
        n = self.asarray(counts)
        origin = Z[self.asarray(np.cumsum(counts) - counts)]
        for rows, c in self._by_class(n, len(Z)):
            Z[rows] -= origin[c]
        mean = self.torch.segment_reduce(Z, "sum", lengths=n, axis=0) / n[:, None]
        for rows, c in self._by_class(n, len(Z)):
            Z[rows] -= mean[c]
        return origin + mean

    def _by_class(self, counts: Array, N: int) -> Iterator[tuple[slice, Array]]:
        """Yield some rows at a time with their classes: no second array of the size of Z."""
        y, step = self.torch.repeat_interleave(counts), 2**13
        for i in range(0, N, step):
            yield slice(i, i + step), y[i : i + step]

    def gram(self, Z: Array, dual: bool) -> Array:
        return (Z @ Z.T if dual else Z.T @ Z).div_(len(Z))  # torch has no rank-k update

    def symv(self, G: Array, v: Array) -> Array:
        return G @ v

    def norms(self, Z: Array, axis: int) -> Array:
        return self.torch.linalg.vector_norm(Z, dim=axis)

    def squares(self, G: Array) -> float:
        return float(self.torch.linalg.vector_norm(G)) ** 2

    def cholesky(self, G: Array, ridge: float) -> Array | None:
        diagonal = G.diagonal()
        diagonal += ridge
        L, info = self.torch.linalg.cholesky_ex(G)
        return None if int(info) or _singular(L.diagonal(), diagonal) else L

    def solve(self, L: Array, B: Array) -> Array:
        return self.torch.cholesky_solve(B, L)

    def whiten(self, L: Array, rows: Array) -> Array:
        return self.torch.linalg.solve_triangular(L, rows.T, upper=False).T

    def inverse_squares(self, L: Array, rows: Array) -> Array:
        return self.norms(self.whiten(L, rows), 1) ** 2

    def inverse(self, L: Array) -> Array:
        return self.torch.cholesky_inverse(L)

    def whole(self, G: Array) -> Array:
        return G

    def eigh(self, matrices: Array) -> tuple[Array, Array]:
        return self.torch.linalg.eigh(matrices)

    def inverse_diagonals(self, L: Array, G: Array) -> tuple[Array, Array]:
        inverse = self.torch.cholesky_inverse(L)
        return inverse.diagonal().clone(), inverse.mul_(G).sum(0)

    def log_softmax(self, rows: Array) -> Array:
        return self.torch.log_softmax(rows, 1)

    def pick(self, rows: Array, columns: Array) -> Array:
        return rows.gather(1, columns[:, None])[:, 0]


Ops: TypeAlias = NumpyOps | TorchOps


def _bounds(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """First row and end of each class."""
    return pairwise(np.concatenate([[0], np.cumsum(counts)]).tolist())


def _singular(pivots: Array, diagonal: Array) -> bool:
    """Whether a squared pivot is nothing but the rounding error of its diagonal element."""
    return bool((pivots**2 <= 16 * EPS * diagonal).any())


# --- input ------------------------------------------------------------------------------------


def load(features: Any, labels: Any, ops: Ops | None = None, groups: Any = None) -> Samples:
    """Check the input of a metric and sort it by class; `ops` overrides the choice of backend."""
    dtype = str(getattr(features, "dtype", "")).removeprefix("torch.")
    features = as_matrix(features, on_device=True)
    codes = encode(labels, features.shape[0])
    groups = encode_groups(groups, features.shape[0])
    chosen = NumpyOps() if isinstance(features, np.ndarray) else TorchOps(features.device)
    ops = ops or chosen
    if isinstance(ops, TorchOps):
        features = ops.asarray(features)
    order = np.argsort(codes, kind="stable")
    samples = Samples(ops, ops.take(features, order), np.bincount(codes), order)
    samples.dtype = dtype or str(features.dtype)
    samples.groups = None if groups is None else groups[order]
    return samples


# --- the statistics of one stage --------------------------------------------------------------


class Samples:
    """Features sorted by class, split into class means `M` and deviations `Z`.

    `Z` is the only array of the size of the features and belongs to this object: `mix` overwrites
    it, the caller's array is never touched.
    """

    dtype = "float64"  # of the caller's features
    groups: np.ndarray | None = None  # codes of what is left out together; None: one by one

    def __init__(self, ops: Ops, rows: Array, counts: np.ndarray, order: np.ndarray) -> None:
        self.ops, self.Z, self.counts, self.order = ops, rows, counts, order
        (self.N, self.D), self.C = rows.shape, len(counts)
        self.dual = self.N < self.D  # tests and benchmarks force the other path
        self.q = counts / self.N
        self.y = ops.asarray(np.repeat(np.arange(self.C), counts))
        self._split()

    @cached_property
    def n_left(self) -> np.ndarray:
        """How many samples of the own class remain without the group of each sample."""
        classes = np.repeat(np.arange(self.C), self.counts)
        if self.groups is None:
            return self.counts[classes] - 1
        pairs = self.groups * self.C + classes
        _, codes, sizes = np.unique(pairs, return_inverse=True, return_counts=True)
        return self.counts[classes] - sizes[codes]

    def of_each_class(self) -> Iterator[tuple[int, slice]]:
        """Classes and the slices of their rows."""
        for c, (i, j) in enumerate(_bounds(self.counts)):
            yield c, slice(i, j)

    def _split(self) -> None:
        """Turn the rows in `Z` into class means and deviations from them."""
        self.M = self.ops.split(self.Z, self.counts)
        self.M -= self.ops.copy(self.M[0])
        self.M -= self.ops.asarray(self.q) @ self.M

    def blocks(self) -> Iterator[slice]:
        """Slices of rows, small beside a D × D (N × N) matrix."""
        least, most = self.ops.block
        budget = min(max(min(self.N, self.D) ** 2 // 2, least), most)
        step = max(1, budget // max(self.C, self.D))
        yield from (slice(i, min(i + step, self.N)) for i in range(0, self.N, step))

    def normalize(self, how: str) -> None:
        """Scale the features by statistics of all samples: "none", "l2" or "standardize".

        Each of them begins with a power of two, which is exact and spares the squares underflow.
        "l2" divides each row (less the overall mean) by its norm, and leaves rows at the mean at
        zero; "standardize" divides each column by its standard deviation, constant ones by none.
        """
        ops, Z, M = self.ops, self.Z, self.M
        largest = max(float(part) for A in (Z, M) for part in (A.max(), -A.min()))
        if largest > 0:
            factor = 2.0 ** min(-math.frexp(largest)[1], 1000)
            Z *= factor
            M *= factor
        if how == "l2":
            for c, rows in self.of_each_class():
                Z_c = Z[rows]
                Z_c += M[c]
            norms = ops.to_numpy(ops.norms(Z, 1))
            # Below: the mean itself, but for rounding errors.
            Z *= ops.asarray(_inverse(norms, 1e-12 * norms.max()))[:, None]
            self._split()
        elif how == "standardize":
            variances = ops.norms(Z, 0) ** 2 / self.N + ops.asarray(self.q) @ M**2
            scale = ops.asarray(_inverse(np.sqrt(ops.to_numpy(variances)), 0.0))
            Z *= scale
            M *= scale

    def mix(self, p: Array) -> None:
        """Replace x_n by p_n·x_n + (1 − p_n)·(unweighted mean of the other class means)."""
        others = (self.M.sum(0) - self.M) / (self.C - 1)  # m_c of (7)
        shift = self.M - others
        for rows in self.blocks():
            c, Z = self.y[rows], self.Z[rows]
            Z += shift[c]  # x_n − m_c
            Z *= p[rows, None]
            Z += others[c]  # (7)
        self._split()

    def unsorted(self, values: Array) -> np.ndarray:
        """Per-sample values, in the order of the caller's rows."""
        out = np.empty(values.shape)
        out[self.order] = self.ops.to_numpy(values)
        return out


def _inverse(values: np.ndarray, zero: float) -> np.ndarray:
    """1/values, or 0 where they are at most `zero`."""
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > zero)


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

    def ledoit_wolf(self) -> float:
        """λ of Ledoit and Wolf (2004) for Z, the mean taken as known; 0 if there is one column.

        λ = min(b², d²)/d² with m = tr S_W/D, d² = ‖S_W‖²/D − m² and
        b² = (mean_n ‖z_n‖⁴ − ‖S_W‖²)/(ND).
        """
        x, trace = self.samples, self.trace
        if x.D == 1 or trace == 0:
            return 0.0
        fourth = float(((x.ops.norms(x.Z, 1) ** 2 / trace) ** 2).mean())  # in units of tr S_W
        square = x.ops.squares(self.G) / trace**2
        b2 = max(fourth - square, 0.0) / (x.N * x.D)
        d2 = max(square / x.D - 1 / x.D**2, EPS / x.D**2)
        return min(b2 / d2, 1.0)

    def oas(self) -> float:
        """λ of Chen, Wiesel, Eldar and Hero (2010) for Z, as scikit-learn; 0 for one column."""
        x, trace = self.samples, self.trace
        if x.D == 1 or trace == 0:
            return 0.0
        square = x.ops.squares(self.G) / trace**2
        d2 = max(square - 1 / x.D, EPS / x.D)
        return min((square + 1) / ((x.N + 1) * d2), 1.0)

    def discriminants(self, shrinkage: float, ridge: float) -> Discriminants:
        """δ for S̃ = (1−λ)S_W + ρI; overwrites G, so call it last."""
        L, rho = self._factor(shrinkage, ridge)
        return Discriminants(self.samples, self._solve(L, shrinkage, rho), jitter=rho - ridge)

    def leave_one_out(
        self, shrinkage: float, *, keep: bool = False
    ) -> LeaveOneOut | LeaveOneGroupOut:
        """Fit S̃ = (1−λ)S_W + λ(tr S_W/D)I; overwrites G unless told to `keep` it."""
        x = self.samples
        ridge = shrinkage * self.trace / x.D
        # A floor, so that the quotients by 1 − āh stay finite for any λ.
        least = JITTER * self.trace / x.D
        L, rho = self._factor(shrinkage, max(ridge, least), keep=keep or self.dual, lift=self.dual)
        solution = self._solve(L, shrinkage, rho)
        if x.groups is not None:
            beta, jitter = (1 - shrinkage) / x.N, rho - ridge
            if self.dual:
                inverse, G = x.ops.inverse(L), x.ops.whole(self.G)
                gram = DualGram(x, inverse, G, rho, self.trace)
            else:
                gram = PrimalGram(x, L, beta)
            return LeaveOneGroupOut(x, solution, gram, beta, rho, jitter=jitter)
        n = np.repeat(x.counts, x.counts).astype(np.float64)
        several = n > 1
        a_bar = np.where(several, (1 - shrinkage) / x.N * n / np.maximum(n - 1, 1), 0.0)  # (L1)
        if self.dual:
            inverse, h = map(x.ops.to_numpy, x.ops.inverse_diagonals(L, self.G))
            h = x.N * h  # (L6)
            rest = rho * (inverse - 1 / (n * (rho + self.trace))) * n / np.maximum(n - 1, 1)
            rest = np.where(several, rest, 1.0)  # (L6)
        else:
            h = np.empty(x.N)
            for rows in x.blocks():
                h[rows] = x.ops.to_numpy(x.ops.inverse_squares(L, x.Z[rows]))  # (L2)
            rest = 1 - a_bar * h
        # S̃ − ρI − ā z zᵀ is positive semidefinite, which bounds 1 − āh from below.
        bound = rho / (rho + a_bar * x.ops.to_numpy(x.ops.norms(x.Z, 1)) ** 2)  # (L7)
        doubtful = rest <= (bound / 2 if self.dual else GUARD)
        rest = np.where(doubtful, np.maximum(rest, bound), rest)
        return LeaveOneOut(
            x, solution, h, a_bar, rest, jitter=rho - ridge, n_guarded=int(doubtful.sum())
        )

    def _factor(
        self, shrinkage: float, ridge: float, *, keep: bool = False, lift: bool = False
    ) -> tuple[Array, float]:
        """L of A, or of A' with `lift`, and the ρ it took; in the memory of G unless `keep`.

        ρ is raised where the formula leaves S̃ numerically singular: to 1e-8 of the mean
        between-class variance if there is no scatter beside it (small enough for certainty, large
        enough for the priors to decide between equal means), else to 1e-40 of it, to 1e-280 for
        constant features; and by 1e-10, 1e-8, … of the mean within-class variance after a failed
        factorisation. The sum of what was added is reported as jitter.
        """
        x = self.samples
        between = float(x.ops.asarray(x.q) @ (x.M**2).sum(1))  # tr S_B
        least = 1e-8 if self.trace <= 1e-30 * between else 1e-40
        rho = max(ridge, least * between / x.D, 1e-280)
        step = max(JITTER * self.trace / x.D, 1e-280)
        while True:
            A = x.ops.copy(self.G) if keep else self.G
            A *= 1 - shrinkage  # (2), with the ridge that `cholesky` adds
            if lift:
                for c, rows in x.of_each_class():
                    A[rows, rows] += self.trace / int(x.counts[c])
            if (L := x.ops.cholesky(A, rho)) is not None:
                break
            rho += step
            step *= 100
            if not keep:
                self._gram()
        if not keep:
            del self.G
        return L, rho

    def _solve(self, L: Array, shrinkage: float, rho: float) -> Solution:
        x = self.samples
        return Dual(x, L, (1 - shrinkage) / x.N, rho) if self.dual else Primal(x, L)


class Primal:
    """S̃⁻¹ between samples and class means, from the factor of S̃."""

    def __init__(self, x: Samples, L: Array) -> None:
        self.x = x
        self.W = x.ops.solve(L, x.M.T)  # S̃⁻¹Mᵀ, (D, C)

    def samples(self, rows: slice) -> Array:
        """XS̃⁻¹Mᵀ, (n_rows, C)."""
        return (self.x.Z[rows] + self.x.M[self.x.y[rows]]) @ self.W

    def deviations(self, rows: slice) -> Array:
        """ZS̃⁻¹Mᵀ, (n_rows, C)."""
        return self.x.Z[rows] @ self.W

    def means(self) -> Array:
        """MS̃⁻¹Mᵀ, (C, C)."""
        return self.x.M @ self.W

    def squares(self) -> Array:
        """Diagonal of `means`."""
        return (self.x.M * self.W.T).sum(1)


class Dual:
    """The same from the factor of A or A'."""

    def __init__(self, x: Samples, L: Array, beta: float, rho: float) -> None:
        a = x.ops.solve(L, x.Z @ x.M.T)  # ZS̃⁻¹Mᵀ, (N, C)
        for _, rows in x.of_each_class():
            a[rows] -= a[rows].mean(0)  # the mean is zero in theory, rounding error/ρ in practice
        Q = beta * (a.T @ a)  # MS̃⁻¹Mᵀ, (C, C)
        for i in range(0, x.D, 1024):  # blocks of columns: no second (C, D) array
            columns = slice(i, i + 1024)
            r = x.M[:, columns] - beta * (a.T @ x.Z[:, columns])
            Q += r @ r.T / rho  # stationary in a, see the head of the module
        self.x, self.a, self.Q = x, a, Q

    def samples(self, rows: slice) -> Array:
        return self.a[rows] + self.Q[self.x.y[rows]]

    def deviations(self, rows: slice) -> Array:
        return self.a[rows]

    def means(self) -> Array:
        return self.Q

    def squares(self) -> Array:
        return self.Q.diagonal()


Solution: TypeAlias = Primal | Dual


class Discriminants:
    """δ_k(x_n) = x_nᵀS̃⁻¹μ_k − ½μ_kᵀS̃⁻¹μ_k + log q_k, computed in blocks of rows."""

    def __init__(self, samples: Samples, solution: Solution, jitter: float) -> None:
        self.samples, self.solution, self.jitter = samples, solution, jitter
        self.offset = samples.ops.asarray(np.log(samples.q)) - 0.5 * solution.squares()  # of (5)

    def log_posterior(self) -> Iterator[tuple[slice, Array]]:
        """Rows and their log p(c|x), the log-softmax of δ over all classes."""
        for rows in self.samples.blocks():
            delta = self.solution.samples(rows)
            delta += self.offset  # (5)
            yield rows, self.samples.ops.log_softmax(delta)  # (6)

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
        v, E = eigh(root_q[:, None] * ops.to_numpy(self.solution.means()) * root_q)  # (4)
        kept = min(x.D, x.C - 1)
        v, E = v[-kept:], E[:, -kept:]
        present = v > max(10 * x.C * EPS * v[-1], 0)
        T = root_q[:, None] * E * np.where(present, np.where(present, v, 1) ** -0.5, 0)
        out = ops.zeros(x.N, kept)
        for rows in x.blocks():
            out[rows] = self.solution.samples(rows) @ ops.asarray(T)  # x̂ of (4)
        return Samples(ops, out, x.counts, x.order)


class LeaveOneOut:
    """p'(c|x_n), the posterior of each sample from the fit without it, in blocks of rows.

    Without sample n of class c, μ_c is μ_c − z/(n_c−1), S̃ is N/(N−1)·[S̃ − ā z zᵀ] (the ridge is
    held at ρN/(N−1)) and the priors are (n_k − [k = c])/(N−1). By the formula of Sherman and
    Morrison, with d_k = (x−μ_k)ᵀS̃⁻¹(x−μ_k) and g_k = zᵀS̃⁻¹(x−μ_k), the squared distances become

        k ≠ c:  (N−1)/N · (d_k + ā g_k²/(1−āh)),     k = c:  (n_c/(n_c−1))²·(N−1)/N · h/(1−āh).

    A class of one sample vanishes with it: p' of this sample's own class is 0.
    """

    def __init__(
        self,
        samples: Samples,
        solution: Solution,
        h: np.ndarray,
        a_bar: np.ndarray,
        rest: np.ndarray,  # 1 − āh
        *,
        jitter: float,
        n_guarded: int,
    ) -> None:
        self.samples, self.solution = samples, solution
        self.jitter, self.n_guarded = jitter, n_guarded
        ops, N = samples.ops, samples.N
        n = np.repeat(samples.counts, samples.counts).astype(np.float64)
        others = np.maximum(n - 1, 1)
        own = np.where(n > 1, np.log(others), -np.inf)
        own -= 0.5 * (N - 1) / N * (n / others) ** 2 * h / rest  # (L4), (L5)
        self.own, self.h, self.gain = map(ops.asarray, (own, h, a_bar / rest))
        self.log_counts = ops.asarray(np.log(samples.counts))
        Q = solution.means()
        squares = ops.copy(Q.diagonal())
        self.between = -2 * Q  # squared distances of the class means, (C, C)
        self.between += squares
        self.between += squares[:, None]

    def log_posterior(self) -> Iterator[tuple[slice, Array]]:
        """Rows and their log p'(c|x)."""
        x = self.samples
        for rows in x.blocks():
            y, h = x.y[rows], self.h[rows, None]
            e = self.solution.deviations(rows)
            e = x.ops.pick(e, y)[:, None] - e  # g_k − h
            delta = (e + h) ** 2
            delta *= self.gain[rows, None]
            e *= 2
            delta += e
            delta += h
            delta += self.between[y]
            delta *= -0.5 * (x.N - 1) / x.N  # (L3)
            delta += self.log_counts  # the N − 1 of the priors cancels
            delta[x.ops.asarray(np.arange(len(y))), y] = self.own[rows]
            yield rows, x.ops.log_softmax(delta)  # (L5)


class PrimalGram:
    """H = Z_g S̃⁻¹ Z_gᵀ of groups g, and B⁻¹ − βH, from the factor of S̃."""

    def __init__(self, x: Samples, L: Array, beta: float) -> None:
        self.x, self.L, self.beta = x, L, beta

    def __call__(self, rows: Array, identity: Array, same: Array) -> tuple[Array, Array]:
        V = self.x.ops.whiten(self.L, self.x.Z[rows.reshape(-1)]).reshape(*rows.shape, -1)
        H = V @ V.swapaxes(1, 2)
        return H, identity - same - self.beta * H


class DualGram:
    """The same from A'⁻¹: H = N·[GA'⁻¹], B⁻¹ − βH = ρ([A'⁻¹] − same/(ρ + tr S_W)) (G4)."""

    def __init__(self, x: Samples, inverse: Array, G: Array, rho: float, trace: float) -> None:
        self.x, self.inverse, self.G, self.rho, self.trace = x, inverse, G, rho, trace

    def __call__(self, rows: Array, identity: Array, same: Array) -> tuple[Array, Array]:
        part = self.inverse[rows]  # (b, m, N)
        H = self.x.N * (part @ self.G[rows].swapaxes(1, 2))
        own = part[
            self.x.ops.asarray(np.arange(len(rows)))[:, None, None],
            self.x.ops.asarray(np.arange(rows.shape[1]))[None, :, None],
            rows[:, None, :],
        ]
        return H, self.rho * (own - same / (self.rho + self.trace))


class LeaveOneGroupOut:
    """p'(c|x_n), the posterior of each sample from the fit without its whole group g.

    With m samples of which m_k are of class k, n'_k = n_k − m_k, Z_g their deviations and a_k the
    indicator of those of class k, divided by n'_k::

        μ'_k = μ_k − Z_gᵀa_k,   S̃' = N/(N−m)·[S̃ − β Z_gᵀ B Z_g],   β = (1−λ)/N              (G1)
        B = I + 11ᵀ/n'_k in the block of each class, B⁻¹ = I − 11ᵀ/n_k                         (G2)
        v = x_n − μ'_k,   d'_k = (N−m)/N · [vᵀS̃⁻¹v + β uᵀ(B⁻¹ − βH)⁻¹u],   u = Z_gS̃⁻¹v        (G3)

    by the formula of Woodbury, with H = Z_gS̃⁻¹Z_gᵀ; the ridge is held at ρN/(N−m). A class that
    lies within the group vanishes with it (there B = I, and a_k = 0). Equally large groups are
    computed together.
    """

    def __init__(
        self,
        samples: Samples,
        solution: Solution,
        gram: PrimalGram | DualGram,
        beta: float,
        rho: float,
        *,
        jitter: float,
    ) -> None:
        self.samples, self.solution, self.gram = samples, solution, gram
        self.beta, self.rho, self.jitter, self.n_guarded = beta, rho, jitter, 0
        Q = solution.means()
        squares = samples.ops.copy(Q.diagonal())
        self.between = -2 * Q + squares + squares[:, None]  # of the class means, (C, C)

    def log_posterior(self) -> Iterator[tuple[Array, Array]]:
        """Rows and their log p'(c|x), whole groups at a time."""
        x = self.samples
        for rows in self._batches():
            yield rows.ravel(), self._of_groups(rows).reshape(rows.size, x.C)

    def _batches(self) -> Iterator[np.ndarray]:
        """Rows of some groups of one size, (b, m)."""
        x = self.samples
        assert x.groups is not None
        order = np.argsort(x.groups, kind="stable")
        sizes = np.bincount(x.groups)
        first = np.cumsum(sizes) - sizes
        width = max(x.N if x.dual else x.D, x.C)
        for m in np.unique(sizes[sizes > 0]).tolist():
            step = max(1, x.ops.block[1] // (m * max(width, m)))
            starts = first[sizes == m]
            for i in range(0, len(starts), step):
                yield order[starts[i : i + step, None] + np.arange(m)]

    def _of_groups(self, rows: np.ndarray) -> Array:
        x, ops, beta = self.samples, self.samples.ops, self.beta
        b, m = rows.shape
        at = ops.asarray(np.arange(b))[:, None, None]
        inner = ops.asarray(np.arange(m))
        y_host = np.repeat(np.arange(x.C), x.counts)[rows]
        n, left = x.counts[y_host].astype(np.float64), x.n_left[rows]
        whole = left == 0
        same = (y_host[:, :, None] == y_host[:, None, :]) / n[:, :, None]
        y = ops.asarray(y_host)
        indices = ops.asarray(rows)
        H, K = self.gram(indices, ops.asarray(np.eye(m)), ops.asarray(same))
        if whole.any():
            K = K + ops.asarray(same * whole[:, :, None])  # B = I where the class vanishes
        values, U = ops.eigh(K)
        scale = self._guard(rows, np.where(whole, 1.0, left / n), ops.to_numpy(values))
        T = U.swapaxes(1, 2) * ops.asarray(scale)[:, :, None]  # TᵀT = (B⁻¹ − βH)⁻¹

        share = np.where(whole, 0.0, 1 / np.where(whole, 1, left))
        a = ops.zeros(b, m, x.C)  # columns a_k
        a[at[:, :, 0], inner, y] = ops.asarray(share)
        counts = np.zeros((b, x.C))
        np.add.at(counts, (np.arange(b)[:, None], y_host), 1)
        remaining = x.counts - counts  # n'_k
        with np.errstate(divide="ignore"):
            log_counts = ops.asarray(np.log(remaining))

        E = self.solution.deviations(indices)  # (b, m, C)
        E = E - E[at, inner[None, :, None], y[:, None, :1]]  # relative to a class of the group
        E_own = E[at, inner[None, :, None], y[:, None, :]]  # [j, i]: z_j against the class of i
        Ha = H @ a
        p, r = T @ (H + E_own), T @ (E - Ha)  # T u_ik = p_i − r_k
        d = -2 * (p.swapaxes(1, 2) @ r)
        d += (p**2).sum(1)[:, :, None]
        d += (r**2).sum(1)[:, None, :]
        d *= beta  # (G3), second term
        own_e = E_own[at[:, :, 0], inner, inner]
        d += (H[at[:, :, 0], inner, inner] + 2 * own_e)[:, :, None]
        d += 2 * (Ha - E)
        d += ((a * (Ha - 2 * E)).sum(1))[:, None, :]
        d += 2 * (E_own.swapaxes(1, 2) @ a)
        d += self.between[y]
        # the own class by itself, where the sums above would cancel
        w = a[at, inner[None, :, None], y[:, None, :]] + ops.asarray(np.eye(m))  # [j, i]
        Hw = H @ w
        own = (w * Hw).sum(1) + beta * ((T @ Hw) ** 2).sum(1)
        d[at[:, :, 0], inner, y] = own
        delta = d * (-0.5 * (x.N - m) / x.N)
        delta += log_counts[:, None, :]  # the N − m of the priors cancels
        return ops.log_softmax(delta.reshape(b * m, x.C))

    def _guard(self, rows: np.ndarray, ratio: np.ndarray, values: np.ndarray) -> np.ndarray:
        """1/√ of the eigenvalues of B⁻¹ − βH, which rounding may not make too small.

        S̃ − ρI − βZ_gᵀBZ_g is positive semidefinite, so none is below ρ/(ρ + τ)·min n'_k/n_k
        with τ = β‖Z_g‖²·max n_k/n'_k.
        """
        x = self.samples
        squares = x.ops.to_numpy(x.ops.norms(x.Z[x.ops.asarray(rows.ravel())], 1)) ** 2
        tau = self.beta * squares.reshape(rows.shape).sum(1) / ratio.min(1)
        bound = (self.rho / (self.rho + tau) * ratio.min(1))[:, None]
        doubtful = values <= (bound / 2 if x.dual else np.maximum(bound / 2, GUARD * ratio.min()))
        self.n_guarded += int(doubtful.any(1).sum()) * rows.shape[1]
        return np.where(doubtful, np.maximum(values, bound), values) ** -0.5
