"""How fast is `bootstrap`, and do its intervals and probabilities keep their promise?

    python tests/benchmarks/confidence_speed.py [--seeds K] [--backbones n] [--images N]

time         1000 resamples of 50 backbones × 5000 images in 100 classes: < 2 s on one core
scores       share of true scores inside the 90 % interval, for normal, exponential (skewed) and
             small (5 images a class) data: about .90
ranks        share of true ranks inside the 90 % interval, of all backbones / of the observed first
             / of the true first, and its mean width; for `Confidence.rank_interval`, for bounds
             from each pair alone, and for quantiles of the resampled ranks
reliability  P(best) of all backbones against how often they were the best
groups       share of data sets of equal backbones in which some two are declared different: < .10

True scores are normal with a sd of `spread` standard errors of a paired difference; spread 0 means
differences of 1e-9. Images are drawn anew for every data set, with their hardness and the
backbones' strengths per class, within fixed classes.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

import numpy as np
from scipy.stats import rankdata
from threadpoolctl import threadpool_limits

from sfda_tune.selection.uncertainty import Confidence, bootstrap

SPREADS = (0.0, 0.5, 1.0, 3.0)
BINS = (0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0)


def simulate(
    rng: np.random.Generator, n: int, y: np.ndarray, spread: float, noise: str = "normal"
) -> tuple[np.ndarray, np.ndarray]:
    """Return true scores (n,) and contributions (n, N) of images drawn for them."""
    N = len(y)
    theta = spread * np.sqrt(2 / N) * rng.normal(size=n) if spread else 1e-9 * np.arange(n)
    strength = 0.5 * rng.normal(size=(n, y.max() + 1))[:, y]
    error = rng.exponential(size=(n, N)) - 1 if noise == "skewed" else rng.normal(size=(n, N))
    level = theta[:, None] + strength - strength.mean(axis=1, keepdims=True)
    return theta, level + 0.5 * rng.normal(size=N) + error


def from_quantiles(c: Confidence) -> np.ndarray:
    ranks = rankdata(-c.resamples, axis=1)
    q = [(1 - c.level) / 2, (1 + c.level) / 2]
    return np.quantile(ranks, q, axis=0, method="nearest").T


def from_single_pairs(c: Confidence) -> np.ndarray:
    delta = c.score[:, None] - c.score
    spread = np.abs(c.resamples[:, :, None] - c.resamples[:, None] - delta)
    sure = np.abs(delta) > np.quantile(spread, c.level, axis=0)
    better, worse = (sure & (delta < 0)).sum(axis=1), (sure & (delta > 0)).sum(axis=1)
    return np.stack([1 + better, len(delta) - worse], axis=1)


METHODS = {
    "rank_interval": lambda c: c.rank_interval,
    "single pairs": from_single_pairs,
    "quantiles": from_quantiles,
}


def speed() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(50, 5000)), np.arange(5000) % 100
    spent = []
    for _ in range(3):
        started = time.process_time()
        bootstrap(X, y)
        spent.append(time.process_time() - started)
    tracemalloc.start()
    bootstrap(X, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"1000 × 50 × 5000: {min(spent):.2f} s (target < 2), peak {peak / 2**20:.0f} MiB\n")


def score_coverage(seeds: int) -> None:
    print("coverage of the 90 % score intervals")
    for kind, n_c in (("normal", 40), ("skewed", 40), ("normal", 5), ("skewed", 5)):
        y, rng, inside = np.repeat(np.arange(10), n_c), np.random.default_rng(1), []
        for seed in range(seeds):
            theta, X = simulate(rng, 20, y, 1.0, kind)
            c = bootstrap(X, y, n_resamples=500, seed=seed)
            truth, (low, high) = theta[list(c.names)], c.score_interval.T
            inside.append(((low <= truth) & (truth <= high)).mean())
        error = np.std(inside) / np.sqrt(seeds)
        print(f"  {kind:8} {n_c:3} images a class  {np.mean(inside):.3f} ± {error:.3f}")
    print()


def rank_coverage(seeds: int, n: int, N: int) -> None:
    y = np.arange(N) % 10
    reliability, declared = [], []
    print(f"{n} backbones, {N} images, 90 % rank intervals: all / observed 1st / true 1st  width")
    print("  spread  " + "".join(f"{name:^29}" for name in METHODS))
    for spread in SPREADS:
        rng = np.random.default_rng(2)
        rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in METHODS}
        sure, right = [], []
        for seed in range(seeds):
            theta, X = simulate(rng, n, y, spread)
            c = bootstrap(X, y, n_resamples=500, seed=seed)
            truth = rankdata(-theta)[list(c.names)]
            for name, method in METHODS.items():
                low, high = method(c).T
                inside = (low <= truth) & (truth <= high)
                first = inside[truth == 1][0]
                rows[name].append((inside.mean(), inside[0], first, (high - low + 1).mean()))
            sure.append(c.in_top[:, 0])
            right.append(truth == 1)
            if not spread:
                declared.append(c.separable.any())
        cells = [
            "{:.2f} / {:.2f} / {:.2f}  {:4.1f}".format(*np.mean(rows[name], axis=0))
            for name in METHODS
        ]
        print(f"  {spread:6.1f}  " + "".join(f"{cell:^29}" for cell in cells))
        reliability.append((spread, np.concatenate(sure), np.concatenate(right)))
    print("\nreliability of P(best): mean P → how often it was the best (number of cases)")
    for spread, p, hit in reliability[1:]:
        bins = np.clip(np.digitize(p, BINS) - 1, 0, len(BINS) - 2)
        cells = [
            f"{p[bins == b].mean():.2f} → {hit[bins == b].mean():.2f} ({(bins == b).sum()})"
            for b in range(len(BINS) - 1)
            if (bins == b).sum() >= 20
        ]
        print(f"  spread {spread}: " + ", ".join(cells))
    print(f"\ngroups: {np.mean(declared):.3f} of {seeds} rankings of equals declare a difference")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--backbones", type=int, default=20)
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args()
    with threadpool_limits(1):
        speed()
        score_coverage(options.seeds)
        rank_coverage(options.seeds, options.backbones, options.images)


if __name__ == "__main__":
    main()
