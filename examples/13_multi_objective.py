"""Accuracy against latency on this device: find the backbones that are worth their time.

Optuna allows no pruning with several objectives; `gate` does what `SFDAPruner` does elsewhere.
"""

import argparse
import time
from functools import lru_cache, partial
from statistics import median

import optuna
import torch
from finetune_digits import DEVICE, finetune, open_backbone, open_split, prepare
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sfda_tune_optuna import SFDASampler, gate, suggest_backbone

import sfda_tune


@lru_cache  # a trial more does not make a network faster
@torch.no_grad()
def measure_latency(name: str, repeats: int = 20) -> float:
    """Return the median milliseconds of one image on this device."""
    network, x = open_backbone(name)[0].to(DEVICE), prepare(name)[0][0][:1]
    times = []
    for _ in range(repeats + 3):  # the first ones warm up
        start = time.perf_counter()
        network(x).cpu()  # waits for the device
        times.append(1000 * (time.perf_counter() - start))
    return median(times[3:])


def objective(trial: optuna.Trial, ranking: sfda_tune.Ranking, epochs: int) -> tuple[float, float]:
    name = suggest_backbone(trial, ranking)
    gate(trial, ranking, keep=5)
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    *_, accuracy = finetune(name, optimizer, epochs)
    return accuracy, measure_latency(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="4 trials of 2 epochs")
    smoke = parser.parse_args().smoke

    ranking = sfda_tune.rank(open_split()[0], "demo:*", progress=True)
    print(ranking)
    sampler = SFDASampler(ranking, seed=0)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    # Count what was trained, not what was stopped at the gate.
    enough = MaxTrialsCallback(4 if smoke else 24, states=(TrialState.COMPLETE,))
    run = partial(objective, ranking=ranking, epochs=2 if smoke else 8)
    study.optimize(run, callbacks=[enough])

    print("\naccuracy  ms per image  trials that none beats in both")
    for trial in sorted(study.best_trials, key=lambda trial: trial.values[1]):
        accuracy, milliseconds = trial.values
        print(f"{accuracy:8.3f}  {milliseconds:12.2f}  {trial.params}")


if __name__ == "__main__":
    main()
