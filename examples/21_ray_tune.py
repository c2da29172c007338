"""From a ranking to fine-tuned survivors with Ray Tune.

`SFDASearcher` chooses the backbone by its score and by the trials so far; Optuna's TPE draws the
rest, from all trials, made comparable between backbones. Every backbone has an ASHA of its own,
which stops bad settings and not slow starters. Run again with --resume after it was stopped:
nothing is lost.
"""

import argparse
import warnings
from pathlib import Path

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from sfda_tune_ray import (
    PerBackboneScheduler,
    SchedulerStateCallback,
    SFDASearcher,
    backbone_resources,
    backbone_space,
    finetune_trainable,
)
from sfda_tune_ray.cluster import connect

import sfda_tune

warnings.simplefilter("ignore")  # of Ray, about its own future
optuna.logging.set_verbosity(optuna.logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="2 trials of 1 epoch")
    parser.add_argument("--resume", action="store_true", help="go on where it was stopped")
    parser.add_argument("--storage", default="ray_results", help="folder of the experiment")
    arguments = parser.parse_args()
    smoke, folder = arguments.smoke, Path(arguments.storage).resolve()
    epochs, trials = (1, 2) if smoke else (8, 20)

    data = sfda_tune.open_dataset("digits", samples=60 if smoke else 300)
    ranking = sfda_tune.rank(data, "demo:*", progress=True)
    print(ranking)

    with connect("local", num_cpus=2):
        needs = backbone_resources(ranking, cpus=1)  # with GPUs: gpu_memory=24e9
        trainable = finetune_trainable(data, config={"epochs": epochs})
        trainable = tune.with_resources(trainable, needs)
        searcher = SFDASearcher(ranking, seed=0)
        scheduler = PerBackboneScheduler(lambda: ASHAScheduler(max_t=epochs + 1))
        space = {"backbone": backbone_space(ranking, 5), "lr": tune.loguniform(1e-4, 1e-1)}
        if arguments.resume:  # with the searcher and scheduler that were saved
            tuner = tune.Tuner.restore(str(folder / "digits"), trainable, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=space,
                tune_config=tune.TuneConfig(
                    metric="accuracy",
                    mode="max",
                    search_alg=searcher,
                    scheduler=scheduler,
                    num_samples=trials,
                    max_concurrent_trials=2,
                    reuse_actors=True,  # they need not import torch again
                ),
                run_config=tune.RunConfig(
                    name="digits",
                    storage_path=str(folder),
                    verbose=0,
                    callbacks=[SchedulerStateCallback(scheduler, searcher)],
                ),
            )
        results = tuner.fit()
        best = results.get_best_result("accuracy", "max")
        if not arguments.resume:
            print(f"\nwhat the scores were worth: {searcher.calibration()}")
        print(f"best: {(best.metrics or {})['accuracy']:.3f} with {best.config}")
        print(f"its weights: {best.checkpoint}")


if __name__ == "__main__":
    main()
