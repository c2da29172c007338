"""How long a study takes to ask, beside TPE alone: trials in memory, seconds of this process.

python tests/benchmarks/ask_speed.py [--trials 10000] [--backbones 1500]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

ROOT = Path(__file__).resolve().parents[2]
if not any((Path(p) / "sfda_tune_optuna").is_dir() for p in sys.path):
    sys.path.append(str(ROOT / "integrations"))


def measure(n: int, names: list[str], sampler: optuna.samplers.BaseSampler) -> float:
    """Return the median seconds of an ask, after `n` trials."""
    rng = np.random.default_rng(0)
    space = {
        "backbone": CategoricalDistribution(names),
        "lr": FloatDistribution(1e-5, 1e-1, log=True),
        "decay": FloatDistribution(1e-5, 1e-1, log=True),
        "optimizer": CategoricalDistribution(["adam", "sgd", "lamb"]),
        "epochs": IntDistribution(1, 20),
    }
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(n):
        trial = random.ask(space)
        random.tell(trial, float(rng.normal()))
    study.add_trials(random.trials)
    seconds = []
    for _ in range(7):
        start = time.process_time()
        trial = study.ask(space)
        seconds.append(time.process_time() - start)
        study.tell(trial, float(rng.normal()))
    return float(np.median(seconds[2:]))


def main() -> None:
    from sfda_tune_optuna import SFDASampler

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--backbones", type=int, default=1500)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = [f"b{k:04d}" for k in range(args.backbones)]
    scores = {name: float(k) for k, name in enumerate(names)}
    alone = measure(args.trials, names, optuna.samplers.TPESampler(seed=0))
    ours = measure(args.trials, names, SFDASampler(scores, seed=0))
    print(f"TPE {alone * 1e3:.0f} ms, SFDASampler {ours * 1e3:.0f} ms, {ours / alone:.2f} times")


if __name__ == "__main__":
    main()
