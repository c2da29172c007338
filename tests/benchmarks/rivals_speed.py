"""How fast are the rival metrics? Prints, for each, the time of the obvious form over ours.

    python tests/benchmarks/rivals_speed.py [--quick] [--repeats K] [--only knn logme]

The obvious form is the published formula as one would type it: a loop over classes or pairs of
them, scikit-learn where it has the estimator, D × D matrices at any N. Both take turns on the same
data in one process, on one thread, and the best of K counts. The target is a ratio ≥ 1 everywhere;
the values are printed to show that both compute the same thing (scikit-learn's PCA is randomised
at some shapes, hence gbc, ncti and nleep differ in the third digit; linear_probe has other folds).
Exits with 1 if a ratio is < 0.95 where the obvious form takes more than 2 ms: below that, checking
the input is most of it.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.linalg import pinvh
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import spearmanr
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from sfda_tune.metrics import METRICS
from sfda_tune.metrics.linear_probe import GRID, TOLERANCE

LOGITS = ("leep", "nce")
SHAPES = [(2000, 512, 50), (600, 2048, 20)]
QUICK = [(600, 128, 10), (200, 400, 5)]


def gaussian_classes(N: int, D: int, C: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes that overlap, with features of unequal variance."""
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(N) % C)
    spread = 1 / np.sqrt(np.arange(1, D + 1))
    return spread * (rng.normal(size=(N, D)) + 0.25 * rng.normal(size=(C, D))[y]), y


def groups(X: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    return [X[y == c] for c in range(y.max() + 1)]


def logme(F, y):
    N, D = F.shape
    U, S, _ = np.linalg.svd(F, full_matrices=False)
    sigma, evidences = S**2, []
    for c in range(y.max() + 1):
        z2 = (U.T @ (y == c)) ** 2
        rest = max(np.sum(y == c) - z2.sum(), 0.0)
        alpha = beta = t = 1.0
        for _ in range(300):
            gamma = np.sum(sigma / (sigma + t))
            m2 = np.sum(sigma * z2 / (sigma + t) ** 2)
            r2 = max(np.sum(z2 * (t / (sigma + t)) ** 2) + rest, 1e-6 * np.sum(y == c))
            alpha, beta = gamma / m2, (N - gamma) / r2
            t, old = alpha / beta, t
            if abs(np.log(t / old)) < 1e-6:
                break
        log_det = np.sum(np.log(alpha + beta * sigma)) + (D - len(sigma)) * np.log(alpha)
        terms = N * np.log(beta) + D * np.log(alpha) - log_det - N * np.log(2 * np.pi)
        evidences.append(0.5 * (terms - beta * r2 - alpha * m2) / N)
    return np.mean(evidences)


def hscore(X, y):
    model = LedoitWolf(store_precision=False).fit(X)
    means = np.zeros_like(X)
    for c in range(y.max() + 1):
        means[y == c] = X[y == c].mean(axis=0)
    S_B = np.cov(means.T, bias=True)
    return np.trace(pinvh(model.covariance_) @ ((1 - model.shrinkage_) * S_B))


def transrate(X, y):
    def rate(Z):
        n, D = Z.shape
        return 0.5 * np.linalg.slogdet(np.eye(D) + Z.T @ Z / (n * 1e-4))[1]

    Z = X - X.mean(axis=0)
    return rate(Z) - sum(len(Z_c) / len(Z) * rate(Z_c) for Z_c in groups(Z, y))


def gbc(X, y):
    stats = [(Z.mean(axis=0), Z.var(axis=0).mean()) for Z in groups(PCA(64).fit_transform(X), y)]
    value = 0.0
    for i, (mu, s) in enumerate(stats):
        for j, (nu, r) in enumerate(stats):
            if i != j:
                m = (s + r) / 2
                D_B = np.sum((mu - nu) ** 2) / (8 * m) + 32 * np.log(m / np.sqrt(s * r))
                value -= np.exp(-D_B)
    return value


def parc(X, y):
    upper = np.triu_indices(len(y), 1)
    d_X = 1 - np.corrcoef(StandardScaler().fit_transform(X))[upper]
    d_Y = 1 - np.corrcoef(np.eye(y.max() + 1)[y])[upper]
    return spearmanr(d_X, np.round(d_Y, 9)).statistic


def ncti(X, y):
    model = PCA(64)
    Z = model.fit_transform(X)
    lam = max(np.exp(-model.explained_variance_[:32].sum()), 1e-10)
    lda = LinearDiscriminantAnalysis(solver="eigen", shrinkage=lam)
    U = lda.fit_transform(Z, y)
    P = lda.predict_proba(Z)
    vc = sum(np.linalg.norm(P_c, "nuc") for P_c in groups(P, y))
    seli = np.linalg.norm(U - U.mean(axis=0), "nuc")
    return np.log(seli) + P[np.arange(len(y)), y].mean() - np.log(vc)


def etran(X, y):
    S_W = sum(len(Z) / len(y) * np.cov(Z.T, bias=True) for Z in groups(X, y))
    lam = max(np.exp(-5 * np.linalg.eigvalsh(S_W)[-1]), 1e-10)
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=lam).fit(X, y)
    logsumexp(X, axis=1).mean()
    return lda.predict_proba(X)[np.arange(len(y)), y].mean()


def nleep(X, y):
    model = PCA(0.8)
    Z = model.fit_transform(X)
    mixture = GaussianMixture(min(5 * (y.max() + 1), len(y)), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Z = Z / np.sqrt(model.explained_variance_[0])
        return leep(mixture.fit(Z).predict_proba(Z), y, probabilities=True)


def tmi(X, y):
    return sum(len(Z) / len(y) * np.trace(np.cov(Z.T, bias=True)) for Z in groups(X, y))


def ped(X, y):
    spread, centre = X.std(axis=0), X.mean(axis=0)
    X = (X - centre) / spread
    first = None
    for _ in range(6):
        mu = np.stack([Z.mean(axis=0) for Z in groups(X, y)])
        r = np.array([np.sqrt(Z.var(axis=0).sum()) for Z in groups(X, y)])
        difference = mu[:, None] - mu  # (C, C, D)
        d = np.linalg.norm(difference, axis=2)
        force = np.maximum(0.6 * (r[:, None] + r) - d, 0)
        np.fill_diagonal(force, 0)
        d[d == 0] = 1
        delta = np.sum((0.005 * force / d)[..., None] * difference, axis=1)
        total = np.abs(delta).sum()
        first = total if first is None else first
        if total <= 0.5 * first:
            break
        X = X + delta[y]
    return logme(X * spread + centre, y)


def pactran(X, y):
    (N, D), C = X.shape, y.max() + 1
    X = X - X.mean(axis=0)
    Y = np.eye(C)[y]

    def loss(flat):
        W, b = flat[: D * C].reshape(D, C), flat[D * C :]
        log_p = log_softmax(X @ W + b, axis=1)
        g = (np.exp(log_p) - Y) / N
        value = -np.sum(Y * log_p) / N + np.sum(W**2) / (2 * N)
        return value, np.concatenate([(X.T @ g + W / N).ravel(), g.sum(axis=0)])

    options = {"maxiter": 1000, "maxfun": 2000, "gtol": 1e-6, "ftol": 0.0}
    fit = minimize(loss, np.zeros((D + 1) * C), jac=True, method="L-BFGS-B", options=options)
    P = softmax(X @ fit.x[: D * C].reshape(D, C) + fit.x[D * C :], axis=1)
    H = np.sum((X**2).T @ (P * (1 - P))) / N + np.sum(P * (1 - P)) / N + D * C / N
    return -fit.fun - 0.5 * C * 100 / N * np.log(N / (D * C) * H)


def knn(X, y):
    near = NearestNeighbors(n_neighbors=21, metric="cosine", algorithm="brute").fit(X)
    neighbours = near.kneighbors(return_distance=False)
    best = 0.0
    for k in (1, 3, 5, 10, 20):
        right = 0
        for n, row in enumerate(neighbours):
            votes = np.bincount(y[row[:k]])
            tied = np.flatnonzero(votes == votes.max())
            right += next(c for c in y[row[:k]] if c in tied) == y[n]
        best = max(best, right / len(y))
    return best


def linear_probe(X, y):
    best = -np.inf, 0.0
    for C in GRID:
        right, log_p = 0, 0.0
        for train, test in StratifiedKFold(5).split(X, y):
            scaler = StandardScaler().fit(X[train])
            model = LogisticRegression(C=C, tol=TOLERANCE, max_iter=500)
            model.fit(scaler.transform(X[train]), y[train])
            p = model.predict_log_proba(scaler.transform(X[test]))
            right += np.sum(p.argmax(axis=1) == y[test])
            log_p += p[np.arange(len(test)), y[test]].sum()
        best = max(best, (log_p, right / len(y)))
    return best[1]


def leep(logits, y, *, probabilities=False):
    theta = logits if probabilities else softmax(logits, axis=1)
    joint = np.stack([Z.sum(axis=0) for Z in groups(theta, y)]) / len(y)
    given = joint / np.maximum(joint.sum(axis=0), 1e-300)
    return np.log((theta @ given.T)[np.arange(len(y)), y]).mean()


def nce(logits, y):
    z = logits.argmax(axis=1)
    value = 0.0
    for b in np.unique(z):
        for c in np.unique(y):
            p = np.mean((y == c) & (z == b))
            if p > 0:
                value += p * np.log(p / np.mean(z == b))
    return value


OBVIOUS = {f.__name__: f for f in (
    etran, gbc, hscore, knn, leep, linear_probe, logme, nce, ncti, nleep, pactran, parc, ped, tmi,
    transrate,
)}  # fmt: skip


def best_of(repeats: int, *functions: Callable[[], float]) -> list[tuple[float, float]]:
    """Seconds and value of each function, called in turn."""
    best = [(np.inf, np.nan)] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            started = time.process_time()
            value = float(function())
            best[i] = min(best[i], (time.process_time() - started, value))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=sorted(OBVIOUS), choices=sorted(OBVIOUS))
    o = parser.parse_args()
    slow = []
    with threadpool_limits(1):
        for N, D, C in QUICK if o.quick else SHAPES:
            X, y = gaussian_classes(N, D, C)
            print(f"N={N} D={D} C={C}\n{'metric':14}{'obvious s':>11}{'ours s':>9}{'ratio':>7}")
            for name in o.only:
                ours = METRICS[name]
                call = partial(ours, None, y, logits=X) if name in LOGITS else partial(ours, X, y)
                (a, u), (b, v) = best_of(o.repeats, partial(OBVIOUS[name], X, y), call)
                print(f"{name:14}{a:11.4f}{b:9.4f}{a / b:7.2f}  {u:.6f} {v:.6f}", flush=True)
                slow += [f"{name} at N={N}"] if a / b < 0.95 and a > 2e-3 else []
    if slow:
        sys.exit(f"slower than the obvious form: {', '.join(slow)}")


if __name__ == "__main__":
    main()
