"""Add the pruner to a study that runs already: one argument, whatever its sampler.

The study began as most do: TPE, a median pruner, the backbone as one more categorical parameter.
Then `SFDAPruner` stops the trials of all but the best three backbones before their first epoch,
and asks the median pruner about the others.
"""

import argparse
from functools import partial

import optuna
import torch
from finetune_digits import finetune, open_split
from sfda_tune_optuna import SFDAPruner

import sfda_tune

NAMES = sorted(backbone.name for backbone in sfda_tune.resolve_backbones("demo:*"))


def objective(trial: optuna.Trial, epochs: int) -> float:
    name = trial.suggest_categorical("backbone", NAMES)
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    # The only line that is new: ask before the first epoch, as soon as the backbone is known.
    if trial.should_prune():
        raise optuna.TrialPruned
    accuracy = 0.0
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    for epoch, accuracy in enumerate(finetune(name, optimizer, epochs)):
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="2 + 6 trials of 2 epochs")
    smoke = parser.parse_args().smoke
    run = partial(objective, epochs=2 if smoke else 8)

    storage = optuna.storages.InMemoryStorage()  # as well the URL of a database
    sampler = optuna.samplers.TPESampler(seed=0)
    median = optuna.pruners.MedianPruner(n_startup_trials=3)
    study = optuna.create_study(
        storage=storage, direction="maximize", sampler=sampler, pruner=median
    )
    study.optimize(run, n_trials=2 if smoke else 8)

    # Later, perhaps in another process: rank, and open the study with the pruner around its own.
    ranking = sfda_tune.rank(open_split()[0], "demo:*", progress=True)
    print(ranking)
    study = optuna.load_study(
        study_name=study.study_name,
        storage=storage,
        sampler=sampler,
        pruner=SFDAPruner(ranking, keep=3, base_pruner=median),
    )
    study.optimize(run, n_trials=6 if smoke else 24)

    states = [trial.state.name for trial in study.trials]
    gated = sum(t.state.name == "PRUNED" and not t.intermediate_values for t in study.trials)
    print(f"\n{len(states)} trials, {states.count('PRUNED')} pruned, {gated} before any epoch")
    print(f"best: {study.best_value:.3f} with {study.best_params}")


if __name__ == "__main__":
    main()
