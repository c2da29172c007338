"""Add the scheduler to a Ray Tune experiment that is there already: one line.

The experiment is as most are: random search, ASHA, the backbone as one more choice. With
`SFDAScheduler` around its ASHA the trials of all but the best three backbones never get an actor.
"""

import argparse
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from finetune_digits import finetune, open_split
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from sfda_tune_ray import SchedulerStateCallback, SFDAScheduler
from sfda_tune_ray.cluster import connect

import sfda_tune

warnings.simplefilter("ignore")  # of Ray, about its own future


def train(config: Mapping[str, Any], fit: Any) -> None:
    optimizer = partial(torch.optim.SGD, lr=config["lr"], momentum=0.9)
    for accuracy in fit(config["backbone"], optimizer, config["epochs"]):
        tune.report({"accuracy": accuracy})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="4 trials of 1 epoch")
    smoke = parser.parse_args().smoke
    epochs = 1 if smoke else 8

    ranking = sfda_tune.rank(open_split()[0], "demo:*", progress=True)
    print(ranking)
    asha = ASHAScheduler(max_t=epochs)
    scheduler = SFDAScheduler(ranking, keep=3, base_scheduler=asha)  # the line that is new
    with connect("local", num_cpus=2):
        results = tune.Tuner(
            tune.with_parameters(train, fit=finetune),
            param_space={
                "backbone": tune.choice(sorted(ranking)),
                "lr": tune.loguniform(1e-3, 1e-1),
                "epochs": epochs,
            },
            tune_config=tune.TuneConfig(
                metric="accuracy",
                mode="max",
                num_samples=4 if smoke else 24,
                max_concurrent_trials=2,
                reuse_actors=True,  # they need not import torch again
                scheduler=scheduler,
            ),
            run_config=tune.RunConfig(verbose=0, callbacks=[SchedulerStateCallback(scheduler)]),
        ).fit()
    ran = [result for result in results if "accuracy" in (result.metrics or {})]
    print(f"\n{len(results)} trials, {len(ran)} with an actor, for {sorted(scheduler.survivors)}")
    if ran:
        best = max(ran, key=lambda result: (result.metrics or {})["accuracy"])
        print(f"best: {(best.metrics or {})['accuracy']:.3f} with {best.config}")


if __name__ == "__main__":
    main()
