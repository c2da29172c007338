"""What earlier studies on other data are worth: replays of CLIP tables, warmed by three others.

    python tests/benchmarks/previous_studies.py [--seeds 9] [--tables held-out] [--rhos 0 .9]

Trials to the goal of `SFDASampler(previous=…)` over those without, on the same cases of
`study_replay`: geometric mean ± standard error over tables × seeds. The earlier studies are 36
trials of `SFDASampler` on three tables of other data sets, drawn per table and seed: as they are,
with their values reversed (what was best there is worst), and permuted among their trials.
"""

from __future__ import annotations

import argparse
import math
import warnings
from functools import cache

import numpy as np
import optuna
from optuna.study import Study
from sfda_tune_optuna import SFDASampler
from study_replay import Table, make_case, read_clip, run, suggest_setting

KINDS = ("natural", "reversed", "permuted")
TABLES = read_clip()


@cache
def make_earlier(index: int, seed: int) -> Study:
    table = TABLES[index]
    case = make_case(table, 0.5, 1000 + seed, 30)
    study = optuna.create_study(direction="maximize", sampler=SFDASampler(case.scores, seed=seed))
    for _ in range(36):
        trial = study.ask()
        k = int(trial.suggest_categorical("backbone", sorted(case.scores))[1:])
        study.tell(trial, case.table.value[k, suggest_setting(trial, table.space)])
    return study


@cache
def change(index: int, seed: int, kind: str) -> Study:
    """Return an earlier study with other values."""
    study = make_earlier(index, seed)
    values = np.array([trial.value for trial in study.trials])
    new = {"natural": values, "reversed": -values}.get(
        kind, np.random.default_rng([index, seed]).permutation(values)
    )
    changed = optuna.create_study(direction="maximize")
    for trial, value in zip(study.trials, new, strict=True):
        trial.value = float(value)
        changed.add_trial(trial)
    return changed


def find_earlier(table: Table, seed: int, kind: str) -> list[Study]:
    rng = np.random.default_rng([seed, 7, *table.name.encode()])
    others = [i for i, t in enumerate(TABLES) if t.name.split("@")[0] != table.name.split("@")[0]]
    return [change(int(i), seed % 3, kind) for i in rng.choice(others, 3, replace=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=9)
    parser.add_argument("--tables", choices=("fit", "held-out"), default="held-out")
    parser.add_argument("--rhos", type=float, nargs="+", default=[0.0, 0.9])
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    tables = TABLES[arguments.tables == "held-out" :: 2]
    for rho in arguments.rhos:
        for kind in KINDS:
            logs = []
            for table in tables:
                for seed in range(arguments.seeds):
                    case = make_case(table, rho, seed, 30)
                    previous = find_earlier(table, seed, kind)
                    alone = run(case, SFDASampler(case.scores, seed=seed))[0]
                    warmed = run(case, SFDASampler(case.scores, previous=previous, seed=seed))[0]
                    logs.append(math.log(warmed / alone))
            mean, error = np.mean(logs), np.std(logs) / math.sqrt(len(logs))
            print(f"ρ {rho:4.1f}  {kind:9s} {math.exp(mean):.2f} ± {error:.2f}", flush=True)


if __name__ == "__main__":
    main()
