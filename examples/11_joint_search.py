"""Search backbone, learning rate and the parameters of each kind of backbone in one study.

`SFDASampler` chooses the backbone by its score and by the trials so far. All other parameters are
drawn from the trials of that backbone alone, so transformers may have other ones than
convolutional networks. `SFDAPruner` keeps to the best five and lets Hyperband stop bad runs early.
"""

import argparse
from functools import partial

import optuna
import torch
from finetune_digits import finetune, open_split
from sfda_tune_optuna import SFDAPruner, SFDASampler, suggest_backbone

import sfda_tune


def objective(trial: optuna.Trial, ranking: sfda_tune.Ranking, epochs: int) -> float:
    name = suggest_backbone(trial, ranking)
    lr = trial.suggest_float("lr", 3e-4, 1e-1, log=True)
    if "vit" in name:
        decay = trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True)
        optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=decay)
    else:
        momentum = trial.suggest_float("momentum", 0.5, 0.99)
        optimizer = partial(torch.optim.SGD, lr=lr, momentum=momentum)
    if trial.should_prune():  # not among the best five: not even one epoch
        raise optuna.TrialPruned
    accuracy = 0.0
    for epoch, accuracy in enumerate(finetune(name, optimizer, epochs), start=1):
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="6 trials of 2 epochs")
    smoke = parser.parse_args().smoke
    epochs = 2 if smoke else 9

    ranking = sfda_tune.rank(open_split()[0], "demo:*", progress=True)
    hyperband = optuna.pruners.HyperbandPruner(max_resource=epochs)
    sampler = SFDASampler(ranking, seed=0)
    pruner = SFDAPruner(ranking, keep=5, base_pruner=hyperband)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    study.optimize(partial(objective, ranking=ranking, epochs=epochs), 6 if smoke else 40)

    print(ranking)
    print(f"\nwhat the scores were worth: {sampler.calibration(study)}")
    print(f"best: {study.best_value:.3f} with {study.best_params}")


if __name__ == "__main__":
    main()
