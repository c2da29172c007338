"""What runs the trials of a search: Optuna, Ray Tune or anything that registers itself.

An engine is a function ``tune(job) -> trials``, registered as an entry point of the group
``sfda_tune.engines``. It chooses backbone and parameters of one `Trial` after the other, has each
made by `run_trial`, and returns all trials of the study, those of other workers too. One with a
true attribute ``spreads`` uses several machines by itself and is called by one process only; an
attribute ``check_storage`` is called with `Job.storage` before any work and may raise ValueError;
``seconds_to_end`` is what it takes at most to return once the time is over.
It is called again with a larger `Job.n_trials` or a later end if a search is extended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from sfda_tune.finetuning.epochs import OutOfTimeError
from sfda_tune.pipelines.spaces import Space
from sfda_tune.selection.calibration import Observation
from sfda_tune.values.files import find_disk_fault, read_json
from sfda_tune.values.formats import TRIAL

__all__ = [
    "DIED", "GROUP", "NO_TIME", "Engine", "Job", "OutOfTimeError", "Trial", "load_engine",
    "read_trial", "run_trial",
]  # fmt: skip

GROUP = "sfda_tune.engines"
# Errors of trials that say nothing of their backbones.
NO_TIME, DIED = "no time for an epoch", "its process ended"


@dataclass(frozen=True)
class Trial:
    """One fine-tuning of a search, finished or under way.

    Parameters
    ----------
    number : int
    backbone : str
    params : mapping of str to JSON value
        What the search varies, by field of `FinetuneConfig`.
    folder : str
        Name of the folder of its checkpoints in ``RUN/trials``. A trial that goes on where a dead
        worker stopped has the folder of that worker's trial.
    state : {"running", "complete", "pruned", "failed"}
        Pruned, too, if the time budget stopped it after an epoch.
    value : float, optional
        The metric on the validation images in the best epoch so far.
    values : tuple of float, optional
        All objectives, `value` first.
    started : float
        Unix time, for people; nothing is reckoned with it.
    seconds : float, optional
    worker : str
    error : str, optional
    epochs : tuple of dict
        ``number, value, log_loss, train_loss, seconds``; of numbers ``rmse`` and ``error``, the
        standard error of the value, in the place of ``log_loss``.
    """

    number: int
    backbone: str
    params: Mapping[str, Any]
    folder: str = ""
    state: str = "running"
    value: float | None = None
    values: tuple[float, ...] | None = None
    started: float = 0.0
    seconds: float | None = None
    worker: str = ""
    error: str | None = None
    epochs: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Job:
    """What an engine needs to know.

    Parameters
    ----------
    name : str
        Of the study; the same for all processes that join.
    folder : Path
        RUN.
    scores : mapping of str to float
        The backbones to choose from; higher is better.
    space : Space
    directions : tuple of {"maximize", "minimize"}
        One per objective.
    n_epochs : int
        Of a full trial.
    n_trials : int, optional
        Of the whole study.
    storage : str, optional
        Where the engine keeps its study; default: in RUN.
    seed : int
    train : callable
        Trial → iterator of the same trial, an epoch richer each time; raises what goes wrong.
    train_factory : callable
        Makes `train` again in another process, which sees the folder; can be pickled.
    update_trials : callable
        To be called with all trials after every event.
    is_over : callable
        Whether no trial may begin any more.
    previous : sequence of sequence of Observation
        What searches on other data have tried.
    """

    name: str
    folder: Path
    scores: Mapping[str, float]
    space: Space
    directions: tuple[Literal["maximize", "minimize"], ...]
    n_epochs: int
    n_trials: int | None
    storage: str | None = field(repr=False)  # may hold a password
    seed: int
    train: Callable[[Trial], Iterator[Trial]] = field(repr=False)
    train_factory: Callable[[], Callable[[Trial], Iterator[Trial]]] = field(repr=False)
    update_trials: Callable[[Sequence[Trial]], None] = field(repr=False)
    is_over: Callable[[], bool] = field(repr=False)
    previous: Sequence[Sequence[Observation]] = field(default=(), repr=False)


Engine = Callable[[Job], list[Trial]]


def run_trial(
    train: Callable[[Trial], Iterator[Trial]], trial: Trial, is_hopeless: Callable[[Trial], bool]
) -> Trial:
    """Train until the end, an error, the end of the time, or until the engine loses hope.

    `train` is that of the `Job`; `is_hopeless` is called after every epoch, with the trial as it
    is then. What ails the disk is raised: it says nothing of the trial, which goes on another time
    as that of a dead worker does.
    """
    state, error, begun = "complete", None, time.monotonic()
    steps = train(trial)
    try:
        for trial in steps:
            if is_hopeless(trial):
                state = "pruned"
                break
    except OutOfTimeError:
        state, error = ("pruned", None) if trial.epochs else ("failed", NO_TIME)
    except Exception as problem:  # one bad trial never ends a search
        if find_disk_fault(problem):
            raise
        text = " ".join(str(problem).split())[:300]
        state, error = "failed", f"{type(problem).__name__}: {text}"
    finally:
        steps.close()  # type: ignore[attr-defined]
    before = sum(epoch["seconds"] for epoch in trial.epochs)  # also those of a dead worker
    seconds = max(time.monotonic() - begun, before)
    return replace(trial, state=state, error=error, seconds=seconds)


def read_trial(source: Path | Mapping[str, Any]) -> Trial:
    """Return a trial from its JSON values, or from a file of these."""
    entry = read_json(source, TRIAL) if isinstance(source, Path) else source
    known = {f.name: entry[f.name] for f in fields(Trial) if f.name in entry}
    values = entry.get("values") and tuple(entry["values"])
    return Trial(**{**known, "values": values, "epochs": tuple(entry.get("epochs", ()))})


def load_engine(name: str) -> Engine:
    """Return an engine by its name.

    Raises
    ------
    ValueError
        If no installed package has it; the message names those that there are.

    Examples
    --------
    >>> load_engine("abacus")
    Traceback (most recent call last):
    ...
    ValueError: `engine` must be one of optuna... but is 'abacus'...
    """
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        there = ", ".join(sorted(found)) or "(none is installed)"
        raise ValueError(
            f"`engine` must be one of {there} but is {name!r}; pip install 'sfda-tune[optuna]' "
            "or 'sfda-tune[ray]'."
        )
    try:
        return found[name].load()
    except ModuleNotFoundError as error:
        raise ValueError(f"`engine` {name!r} cannot be used: {error}") from error
