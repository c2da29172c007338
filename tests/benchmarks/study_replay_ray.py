"""The replays of `study_replay`, through `SFDASearcher`.

    python tests/benchmarks/study_replay_ray.py [--tables 8] [--seeds 10] [--fit 0]

Trials to the goal of the searcher over those of `SFDASampler` on the same cases: geometric mean
and 95 % of a paired bootstrap over seeds, which decide on the first settings in all tables. The
choices and draws are the same, so every ratio is 1. The searcher is called as Tune calls it,
without the process that Tune spends on every trial; ``--fit n`` runs n cases through ``Tuner.fit``
as well, and ``--seeds 0 --fit n`` these only.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings

import numpy as np
import optuna
from ray import tune
from sfda_tune_ray import SFDASearcher
from sfda_tune_ray.cluster import connect
from study_replay import Case, make_case, ours, read_clip, read_shift


def make_space(case: Case) -> dict[str, object]:
    others = {name: tune.choice(values) for name, values in case.table.space.items()}
    return {"backbone": tune.choice(sorted(case.scores)), **others}


def make_searcher(case: Case) -> SFDASearcher:
    return SFDASearcher(case.scores, seed=case.seed)


def look_up(case: Case, config: dict[str, object]) -> float:
    h = 0
    for name, values in case.table.space.items():
        h = h * len(values) + values.index(config[name])
    return float(case.table.value[int(str(config["backbone"])[1:]), h])


def call(case: Case) -> int:
    """Return how many trials it took, calling the searcher directly."""
    searcher = make_searcher(case)
    searcher.set_search_properties("value", "max", make_space(case))
    for number in range(case.budget):
        value = look_up(case, searcher.suggest(str(number)))
        if value >= case.goal:
            return number + 1
        searcher.on_trial_complete(str(number), {"value": value, "training_iteration": 1})
    return case.budget


def fit(case: Case) -> int:
    """Return how many trials it took in a real run of Tune."""
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            lambda config: tune.report({"value": look_up(case, config)}),
            param_space=make_space(case),
            tune_config=tune.TuneConfig(
                metric="value", mode="max", search_alg=make_searcher(case), reuse_actors=True,
                num_samples=case.budget, max_concurrent_trials=1,
            ),
            run_config=tune.RunConfig(
                storage_path=folder, verbose=0, name="run",
                stop=Reached(case.goal),
            ),
        )  # fmt: skip
        return len(tuner.fit())


class Reached(tune.Stopper):
    """End the experiment at the goal."""

    def __init__(self, goal: float) -> None:
        self.goal, self.is_reached = goal, False

    def __call__(self, trial_id: str, result: dict[str, float]) -> bool:
        self.is_reached = self.is_reached or result["value"] >= self.goal
        return False

    def stop_all(self) -> bool:
        return self.is_reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--fit", type=int, default=0)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    tables = [*read_shift(), *read_clip()]
    tables = tables[:: max(1, len(tables) // arguments.tables)][: arguments.tables]
    rng = np.random.default_rng(0)
    print("ρ     cases  sampler  searcher  ratio")
    for rho in (-0.5, 0.0, 0.5, 0.9) if arguments.seeds else ():
        cases = [make_case(t, rho, seed, 30) for t in tables for seed in range(arguments.seeds)]
        a = np.array([ours(case)[0] for case in cases], dtype=float)
        b = np.array([call(case) for case in cases], dtype=float)
        logs = np.log(b / a)
        by_seed = logs.reshape(len(tables), -1).mean(axis=0)
        means = [np.exp(rng.choice(by_seed, len(by_seed)).mean()) for _ in range(2000)]
        low, high = np.quantile(means, [0.025, 0.975])
        print(
            f"{rho:4.1f}  {len(cases):5d}  {np.exp(np.log(a).mean()):7.2f}  "
            f"{np.exp(np.log(b).mean()):8.2f}  {np.exp(logs.mean()):.3f} [{low:.3f}, {high:.3f}]",
            flush=True,
        )
    if arguments.fit:
        with connect("local", num_cpus=2):
            logs = []
            for k in range(arguments.fit):
                case = make_case(tables[k % len(tables)], (0.0, 0.5, 0.9)[k % 3], k, 30)
                sampler, called, fitted = ours(case)[0], call(case), fit(case)
                logs.append(np.log(fitted / sampler))
                line = f"{case.table.name}: {sampler} by the sampler, {called} called, "
                print(f"{line}{fitted} through Tuner.fit", flush=True)
        means = [np.exp(rng.choice(logs, len(logs)).mean()) for _ in range(2000)]
        low, high = np.quantile(means, [0.025, 0.975])
        print(f"Tuner.fit ÷ sampler: {np.exp(np.mean(logs)):.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
