"""Several workers on one database; run it again and the study goes on where it stopped.

Each worker is a process that knows nothing but the database: ranking and settings of the sampler
are read from the study. On other machines, start the same command with the same ``--storage``,
for instance ``postgresql+psycopg://user@host/database``; whoever comes first ranks.
"""

import argparse
import multiprocessing
from functools import partial
from multiprocessing.synchronize import Event

import optuna
import torch
from finetune_digits import finetune, open_split
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from sfda_tune_optuna import SFDASampler, load_ranking, save_ranking, suggest_backbone

import sfda_tune

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def objective(trial: optuna.Trial, ranking: sfda_tune.Ranking, epochs: int) -> float:
    name = suggest_backbone(trial, ranking)
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    accuracy = 0.0
    for epoch, accuracy in enumerate(finetune(name, optimizer, epochs)):
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def work(storage: str, study_name: str, n_trials: int, epochs: int, ranked: Event) -> None:
    """Run trials until the study, not this worker, has `n_trials`."""
    ranked.wait()
    study = optuna.load_study(study_name=study_name, storage=storage)
    study.sampler = SFDASampler.from_study(study)
    if len(study.get_trials(deepcopy=False, states=FINISHED)) < n_trials:
        run = partial(objective, ranking=load_ranking(study), epochs=epochs)
        study.optimize(run, callbacks=[MaxTrialsCallback(n_trials, states=FINISHED)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    # SQLite lets one process write at a time; the others wait, but not longer than this.
    parser.add_argument("--storage", default="sqlite:///digits.db?timeout=60")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--trials", type=int, default=24, help="of the whole study, in the end")
    parser.add_argument("--smoke", action="store_true", help="3 backbones, 4 trials of 2 epochs")
    options = parser.parse_args()
    names, study_name, n_trials, epochs = "demo:*", "digits", options.trials, 8
    if options.smoke:
        names, study_name, n_trials, epochs = "demo:*glyphs", "smoke", 4, 2

    study = optuna.create_study(
        study_name=study_name, storage=options.storage, direction="maximize", load_if_exists=True
    )
    # This process is a worker, too. Its helpers start afresh: a fork would share open connections.
    spawn = multiprocessing.get_context("spawn")
    arguments = (options.storage, study_name, n_trials, epochs, ranked := spawn.Event())
    helpers = [
        spawn.Process(target=work, args=arguments, daemon=True) for _ in range(options.workers - 1)
    ]
    for helper in helpers:
        helper.start()
    try:
        ranking = load_ranking(study)
        print(f"going on after {len(study.trials)} trials")
    except ValueError:
        ranking = sfda_tune.rank(open_split()[0], names, progress=True)
        save_ranking(study, ranking, settings={"seed": 0})
    print(ranking)
    ranked.set()
    work(*arguments)
    for helper in helpers:
        helper.join()
    print(f"\nbest: {study.best_value:.3f} with {study.best_params}")


if __name__ == "__main__":
    main()
