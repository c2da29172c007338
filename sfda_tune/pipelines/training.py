"""How a search fine-tunes: a trial, a short one, and the winner, which is then tested."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sfda_tune.data.splits import join
from sfda_tune.finetuning.calibration import calibrate_on_test
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.epochs import OutOfTimeError
from sfda_tune.finetuning.models import load_model, predict
from sfda_tune.finetuning.run import FineTuning, finetune
from sfda_tune.finetuning.tasks import Task
from sfda_tune.pipelines.budget import Budget, Workload
from sfda_tune.pipelines.engines import Trial
from sfda_tune.pipelines.inputs import Inputs
from sfda_tune.pipelines.latency import time_forward
from sfda_tune.pipelines.result import write_predictions
from sfda_tune.pipelines.run_folder import RunFolder
from sfda_tune.pipelines.trials import best_epoch
from sfda_tune.values.files import read_json, write_json
from sfda_tune.values.formats import PROVENANCE

__all__ = ["evaluate_winner", "train", "train_winner"]

Steps = Generator[Trial, None, None]  # the trial after every epoch
IsOver = Callable[[], bool]  # whether the time is over


def _finetune_config(inputs: Inputs, params: Mapping[str, Any]) -> FinetuneConfig:
    c = inputs.config
    more = {"monitor": c.metric, "seed": c.seed, "precision": c.precision}
    more |= {} if c.loss is None else {"loss": c.loss}
    return inputs.space.config(params, epochs=inputs.n_epochs, **more)


# Trials -----------------------------------------------------------------------------------------
def train(folder: RunFolder, inputs: Inputs, trial: Trial, is_over: IsOver) -> Steps:
    """Fine-tune on the training images; yield the trial after every epoch."""
    config, begun, cost = inputs.config, folder.now(), folder.state["costs"][trial.backbone]
    by_name = {"latency": cost["latency_ms"], "params": cost["n_params"]}
    costs = tuple(float(by_name[name]) for name in config.objective[1:])
    with finetune(
        inputs.backbones[trial.backbone],
        inputs.parts["train"],
        _finetune_config(inputs, trial.params),
        val=inputs.parts["val"],
        checkpoint_dir=folder.trial(trial.folder),
        device=inputs.device,
        workers=config.decoders,
        max_unreadable=config.max_unreadable,
        shared=inputs.shared,
        should_stop=is_over,
    ) as run:
        if run.history:  # of a dead worker
            yield _describe(trial, run, config.metric, costs, folder.now() - begun)
        for _ in run:
            yield _describe(trial, run, config.metric, costs, folder.now() - begun)


def _describe(
    trial: Trial, run: FineTuning, metric: str, costs: tuple[float, ...], seconds: float
) -> Trial:
    """Return the trial as it stands after the last epoch."""
    best = run.history[-1].best
    epochs = tuple(
        {
            "number": e.number,
            "value": e.values[metric],
            run.task.tie: e.values[run.task.tie],
            "train_loss": e.train_loss if math.isfinite(e.train_loss) else None,
            "seconds": e.seconds,
            "temperature": e.temperature,
            "interpolation": e.interpolation,
        }
        | ({"error": e.error} if math.isfinite(e.error) else {})
        | (
            {"thresholds": list(e.thresholds)}
            if run.best and e.number == run.best.number and e.thresholds
            else {}
        )
        for e in run.history
    )
    seconds = max(seconds, sum(e.seconds for e in run.history))
    return replace(trial, value=best, values=(best, *costs), seconds=seconds, epochs=epochs)


# The winner -------------------------------------------------------------------------------------
class FixedLengthFineTuning(FineTuning):
    """Keeps the last weights: it has no unseen images to choose the epoch by, or thresholds."""

    _thresholds: Sequence[float] = ()

    def interpolate(self, part: float) -> FixedLengthFineTuning:
        """Go as far from the start as was best in the trial."""
        self._parts = (part,)
        return self

    def decide_by(self, thresholds: Sequence[float]) -> FixedLengthFineTuning:
        """Take the thresholds of the trial."""
        self._thresholds = thresholds
        return self

    def _decided(self) -> Task:
        return self.task.decide_by(self._thresholds)

    def _sort_key(self, epoch: Any) -> tuple[float, float]:
        return float(epoch.number), 0.0


def train_winner(
    folder: RunFolder, budget: Budget, inputs: Inputs, work: Workload, best: Trial
) -> str:
    """Write RUN/model and return how it came about."""
    parts, backbone, trials = inputs.parts, inputs.backbones[best.backbone], folder.trials
    config, at = _finetune_config(inputs, best.params), best_epoch(best, work.metric)
    last = at["number"]
    end = budget.deadline - budget.seconds_to_test(work, trials)
    to_train = budget.seconds_to_train(work, trials)
    why = "for the budget was spent"
    has_checkpoint = any(folder.trial(best.folder).glob("*.safetensors"))
    if not has_checkpoint or budget.now() + to_train <= end:
        both = join(parts["train"], parts["val"])
        try:
            run = FixedLengthFineTuning(
                backbone, (both, parts["val"]), config, folder.trial("final"), True, inputs.device,
                inputs.config.decoders,
                should_stop=(lambda: budget.now() >= end) if has_checkpoint else None,
            ).interpolate(at.get("interpolation", 1.0))  # fmt: skip
            run.decide_by(at.get("thresholds", ()))
            _train_until(run, last)
            _save(run, folder, best, at, "train and val")
            what = f"{last} epoch{'s' * (last > 1)}" if last else "a linear probe, no epoch,"
            return f"{what} on training and validation images"
        except OutOfTimeError:
            pass
        except ValueError as error:  # it diverged with more images
            why = " ".join(str(error).split())
    run = finetune(
        backbone, parts["train"], config, val=parts["val"], device=inputs.device,
        checkpoint_dir=folder.trial(best.folder), shared=inputs.shared,
        workers=inputs.config.decoders,
    )  # fmt: skip
    _train_until(run, last)  # it is there, unless its checkpoint was damaged
    _save(run, folder, best, at, "train")
    return f"the weights of the best trial, {why}"


def _train_until(run: FineTuning, last: int) -> None:
    with run:
        while (run.history[-1].number if run.history else -1) < last:
            next(run)


def _save(
    run: FineTuning, folder: RunFolder, best: Trial, at: Mapping[str, Any], images: str
) -> None:
    path = run.save_model(folder.path / "model") / "provenance.json"
    note = {"trial": best.number, "images": images, "val": at}
    provenance = read_json(path, PROVENANCE)
    if images != "train":  # `best` was measured on images that it was trained on
        provenance["best"] = None
    write_json(path, {**provenance, "search": note})


def evaluate_winner(folder: RunFolder, inputs: Inputs, best: Trial) -> dict[str, Any]:
    """Test RUN/model, write predictions and the hardest images; return what the test adds.

    Of classes that is also what a temperature is worth: that of the trial, whose validation images
    it had not seen; the model may have been trained on them since. Of several labels, each one.
    """
    c, images, own = inputs.config, inputs.parts["test"], inputs.backbones[best.backbone]
    known = folder.state["costs"][best.backbone]["latency_ms"]  # what the trials were compared by
    path = folder.path / "model"
    model = load_model(path, backbone=own if own.load else None, plugins=c.plugins)
    p = predict(model, images, device=inputs.device, precision=c.precision)
    rows = np.flatnonzero(np.isfinite(p.reshape(len(p), -1)).all(1))
    write_predictions(folder.path, images, p, rows, model.task)
    labels, codes = images.labels[rows], images.group_codes
    temperature = best_epoch(best, c.metric).get("temperature")  # none in an older search
    calibration = None
    if temperature and images.task == "classification":
        n_val = len(inputs.parts["val"])
        calibration = calibrate_on_test(labels, p[rows], temperature, n_val)
    groups = None if codes is None else codes[rows]
    intervals = model.task.find_intervals(labels, p[rows], groups)
    return {
        **({"calibration": calibration} if calibration else {}),
        **model.task.examine(labels, p[rows]),
        "test": model.task.measure(labels, p[rows]),
        "test_interval": intervals[model.task.monitors[0]],
        "test_intervals": intervals,
        "latency_ms": known or time_forward(model.module, model.preprocessing, inputs.device),
    }
