"""Ask and tell: a loop of your own, for the queue of a cluster or a trainer that is there already.

Trials are asked for in batches. A batch shares no results, but the sampler knows which backbones
are running and spreads its choices. A run that fails is told as failed, which lowers the chance
of its backbone; Optuna by itself would propose it again and again.
"""

import argparse
from functools import partial

import optuna
import torch
from finetune_digits import finetune, open_split
from optuna.trial import TrialState
from sfda_tune_optuna import SFDASampler, suggest_backbone

import sfda_tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="2 batches of 2 trials of 2 epochs")
    n_batches, n_trials, epochs = (2, 2, 2) if parser.parse_args().smoke else (6, 4, 8)

    ranking = sfda_tune.rank(open_split()[0], "demo:*", progress=True)
    print(ranking)
    study = optuna.create_study(direction="maximize", sampler=SFDASampler(ranking, seed=0))
    for _ in range(n_batches):
        batch = []
        for _ in range(n_trials):  # all suggestions come first: the queue needs them
            trial = study.ask()
            name = suggest_backbone(trial, ranking)
            batch.append((trial, name, trial.suggest_float("lr", 1e-3, 1e-1, log=True)))
        for trial, name, lr in batch:  # here one after the other; tell in any order
            optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
            try:
                *_, accuracy = finetune(name, optimizer, epochs)
            except torch.OutOfMemoryError as error:
                print(f"trial {trial.number}: {name} needs too much memory ({error})")
                study.tell(trial, state=TrialState.FAIL)
            else:
                print(f"trial {trial.number}: {accuracy:.3f} with {name}, lr {lr:.4f}")
                study.tell(trial, accuracy)
    print(f"\nbest: {study.best_value:.3f} with {study.best_params}")


if __name__ == "__main__":
    main()
