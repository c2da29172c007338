"""What the tests of the Tune adapter share: trainables that workers can import, and real runs."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

from ray import tune

NAMES = ["a", "b", "c", "d", "e", "f"]
SCORES = dict(zip(NAMES, (6.0, 5.0, 4.0, 3.0, 2.0, 1.0), strict=True))
VALUES = dict(zip(NAMES, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), strict=True))


def find_backbone(config):
    return config["backbone"] if "backbone" in config else config["model"]["backbone"]


def note(config, text=""):
    """Leave a mark that this trial had a process."""
    if "folder" in config:
        with open(Path(config["folder"]) / find_backbone(config), "a") as file:
            file.write(f"{os.getpid()} {text}\n")


def train(config):
    """Report the value of the backbone, and what the trial was given."""
    note(config)
    given = tune.get_context().get_trial_resources().required_resources
    tune.report({"acc": VALUES[find_backbone(config)], "gpus": given.get("GPU", 0)})


def crash(config):
    note(config)
    raise RuntimeError("CUDA out of memory")


def crash_once(config):
    """Fail until the file `repaired` exists."""
    note(config)
    if not (Path(config["folder"]) / "repaired").exists():
        raise RuntimeError("no data")
    tune.report({"acc": VALUES[find_backbone(config)]})


def die(config):
    """Be killed, as by a machine that goes down."""
    note(config)
    os.kill(os.getpid(), signal.SIGKILL)


def resume(config):
    """Report six times; be killed at the third, once; go on from the checkpoint."""
    folder, begin = Path(config["folder"]), 0
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as saved:
            begin = int((Path(saved) / "epoch").read_text())
    note(config, f"from {begin}")
    for epoch in range(begin + 1, 5):
        if epoch == 3 and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        place = folder / f"checkpoint {epoch}"
        place.mkdir(exist_ok=True)
        (place / "epoch").write_text(str(epoch))
        tune.report(
            {"acc": VALUES[find_backbone(config)]},
            checkpoint=tune.Checkpoint.from_directory(place),
        )


def make_tuner(trainable, folder, space, *, callbacks=None, max_failures=0, **options):
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(**options),
        run_config=tune.RunConfig(
            name="run",
            storage_path=str(folder),
            verbose=0,
            callbacks=callbacks,
            failure_config=tune.FailureConfig(max_failures=max_failures),
        ),
    )


def fit(*args, **kwargs):
    return run(make_tuner(*args, **kwargs))


def run(tuner):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        return tuner.fit()


def restore(folder, trainable, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tune.Tuner.restore(str(folder / "run"), trainable, **options)


# What Ray keeps to itself ------------------------------------------------------------------------
def find_config(tuner):
    """Return the `TuneConfig` that a tuner really used: restored ones are copies."""
    return tuner._local_tuner._tune_config


def find_searcher(tuner):
    searcher = find_config(tuner).search_alg
    return getattr(searcher, "searcher", searcher)


def find_study(searcher):
    """Return the study of an `OptunaSearch`."""
    return searcher._ot_study


def find_metric(scheduler):
    """Return the metric as some of Tune reads it."""
    return scheduler._metric


def find_trials(scheduler):
    """Return the ids of the trials that an ASHA knows."""
    return list(scheduler._trial_info)


def find_rungs(scheduler):
    """Return what an ASHA has recorded, by milestone."""
    return dict(scheduler._brackets[0]._rungs)
