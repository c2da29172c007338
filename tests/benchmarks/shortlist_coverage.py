"""How often does `shortlist` hold the best, how long is it, and is P(best) what it says?

    python tests/benchmarks/shortlist_coverage.py [--seeds K] [--backbones n …] [--images N …]

coverage     share of data sets in whose ``shortlist(.95)`` the truly best backbone is: ≥ .95
size         mean length; beside it what is *needed*: the shortest list of a fixed length, from the
             first rank on, that holds the best in .95 of the data sets; that of an *oracle* which
             knows the distribution that the true scores were drawn from (the smallest set with
             posterior probability .95); and coverage / size by the *resamples* as they are
reliability  P(best) of all backbones against how often they were the best, with `shrink` and
             without

True scores have a sd of `spread` standard errors of a paired difference, and are *normal*, or
*crowded* at the top (−exponential), as where the best ones come near to a bound; an oracle is
given for the former. Spread 0: all are equal, and one of them is called the best. Images are of
ten classes, some of them hard for all backbones, and a third of a backbone's own error is that of
its family of four.
"""

from __future__ import annotations

import argparse

import numpy as np
from threadpoolctl import threadpool_limits

from sfda_tune.selection.uncertainty import bootstrap, shortlist

SPREADS = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)
SHAPES = ("normal", "crowded")
LEVEL = 0.95
BINS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)


def simulate(
    rng: np.random.Generator, n: int, N: int, spread: float, shape: str = "normal"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return true scores (n,), contributions (n, N) and labels of images drawn for them."""
    y = np.arange(N) % min(10, N // 4)
    theta = rng.normal(size=n) if shape == "normal" else -rng.exponential(size=n)
    theta = spread * np.sqrt(2 / N) * theta + 1e-9 * rng.permutation(n)
    family = rng.normal(size=(-(-n // 4), N))[np.arange(n) // 4]
    error = np.sqrt(2 / 3) * rng.normal(size=(n, N)) + np.sqrt(1 / 3) * family
    return theta, theta[:, None] + 0.5 * rng.normal(size=N) + error, y


def smallest(draws: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the smallest set, in the order of `first`, that has probability `LEVEL`."""
    p = np.bincount(draws.argmax(axis=1), minlength=draws.shape[1])[first] / len(draws)
    return first[: int((p.cumsum() < LEVEL - 1e-9).sum()) + 1]


def measure(seeds: int, n: int, N: int, spread: float, shape: str) -> dict[str, np.ndarray]:
    """Return the mean (held, length) of each kind of set, and (P, P unshrunk, is best)."""
    rng = np.random.default_rng([n, N, int(10 * spread)])
    found: dict[str, list] = {"shortlist": [], "oracle": [], "resamples": [], "best": []}
    place = []
    for seed in range(seeds):
        theta, X, y = simulate(rng, n, N, spread, shape)
        c = bootstrap(X, y, n_resamples=1000, seed=seed)
        best, at = int(theta.argmax()), np.array(c.names)
        names = shortlist(c, LEVEL)
        place.append(c.names.index(best) + 1)
        found["shortlist"].append((best in names, len(names)))
        order = np.arange(n)
        flat = at[smallest(c.resamples, order)]
        found["resamples"].append((best in flat, len(flat)))
        if shape == "normal":
            tau2 = 2 * spread**2
            error = np.sqrt(N) * rng.normal(size=(4000, n)) / np.sqrt(N)
            K = tau2 / (tau2 + 1)
            draws = K * np.sqrt(N) * c.score + np.sqrt(K) * error if K else error
            known = at[smallest(draws, order)]
            found["oracle"].append((best in known, len(known)))
        plain = np.bincount(c.resamples.argmax(axis=1), minlength=n) / len(c.resamples)
        found["best"].append(np.stack([c.in_top[:, 0], plain, at == best], axis=1))
    means = {k: np.mean(v, axis=0) for k, v in found.items() if k != "best" and v}
    needed = np.quantile(place, LEVEL, method="inverted_cdf")
    return means | {"best": np.concatenate(found["best"]), "needed": needed}


def reliability(p: np.ndarray, hit: np.ndarray) -> str:
    bins = np.digitize(p, BINS)
    return "  ".join(
        f"{p[bins == b].mean():.2f} → {hit[bins == b].mean():.2f}"
        for b in range(1, len(BINS) + 1)
        if (bins == b).sum() >= 20
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--backbones", type=int, nargs="+", default=[5, 20, 50, 200])
    parser.add_argument("--images", type=int, nargs="+", default=[100, 400])
    options = parser.parse_args()
    sure: dict[tuple[str, float], list[np.ndarray]] = {}
    print(
        "true scores  backbones  images  spread  coverage  size  needed  oracle        resamples"
    )
    with threadpool_limits(1):
        for shape in SHAPES:
            for n in options.backbones:
                for N in options.images:
                    for spread in SPREADS:
                        got = measure(options.seeds, n, N, spread, shape)
                        sets = [
                            "{:.2f} / {:<5.1f}".format(*got[k]) if k in got else ""
                            for k in ("oracle", "resamples")
                        ]
                        held, size = got["shortlist"]
                        print(
                            f"{shape:11}  {n:9}  {N:6}  {spread:6}  {held:8.3f}  {size:4.1f}"
                            f"  {got['needed']:6}  {sets[0]:12}  {sets[1]:12}",
                            flush=True,
                        )
                        sure.setdefault((shape, spread), []).append(got["best"])
    print("\nP(best) → how often it was the best")
    for (shape, spread), parts in sure.items():
        p, plain, hit = np.concatenate(parts).T
        print(f"{shape}, spread {spread}: {reliability(p, hit)}")
        print(f"{'':{len(shape)}}  without shrinking: {reliability(plain, hit)}")


if __name__ == "__main__":
    main()
