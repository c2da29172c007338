"""The Optuna engine of `sfda_tune.search`: any storage, any number of workers, no lost trial.

A worker holds the lock of its trial's checkpoint folder while it lives. Whoever finds a running
trial without a living worker continues it from its checkpoint, as a new trial with the same
parameters and the same folder; the old one is no evidence against its backbone.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from sfda_tune.engines import NO_TIME, Job, Trial, attempt
from sfda_tune.spaces import Dimension
from sfda_tune_optuna import _compat
from sfda_tune_optuna.pruner import SFDAPruner
from sfda_tune_optuna.sampler import SFDASampler

__all__ = ["open_study", "read_trials", "tune"]

RECORD = "sfda:trial"  # user attribute: the `Trial` as JSON values
FOLDER = "sfda:folder"  # user attribute of an enqueued trial: where it goes on
MANY = 40  # trials from which on Hyperband's brackets fill
STALE = 600.0  # seconds without an epoch after which a worker on another machine counts as dead


def tune(job: Job) -> list[Trial]:
    """Run trials until there are enough or the time is over; return all of the study."""
    study = open_study(job)
    while not job.is_over():
        with FileLock(job.folder / "study.lock"):  # one at a time asks and revives
            _revive(study, job)
            claimed = _claim(study, job)
        if claimed is None:
            if not any(t.state == "running" for t in read_trials(study)):
                break
            time.sleep(0.5)  # others are at work, and one of them may die
            continue
        ours, trial, lock = claimed
        try:
            _write(ours, trial)
            job.tell(read_trials(study))
            done = attempt(job.train, trial, lambda now: _report(study, job, ours, now))  # noqa: B023
            _end(study, ours, done)
        finally:  # an interrupted trial stays RUNNING: the next process finds it without its lock
            lock.release()
        job.tell(read_trials(study))
    return read_trials(study)


def check_storage(url: str | None) -> None:
    """Refuse a URL that no database understands, or whose driver is missing.

    Raises
    ------
    ValueError
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        if url is not None:
            make_url(url).get_dialect().import_dbapi()
    except (ArgumentError, ImportError) as error:
        raise ValueError(
            f"`storage` must be a URL such as sqlite:///study.db or postgresql://… but: {error}"
        ) from error


tune.check_storage = check_storage  # type: ignore[attr-defined]


def open_study(job: Job) -> Study:
    """Open or begin the study of a job; its first trials are the defaults, best backbone first."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    base = optuna.samplers.TPESampler(n_startup_trials=4, seed=job.seed)
    few = job.n_trials is not None and job.n_trials < MANY
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    hyperband = optuna.pruners.HyperbandPruner(max_resource=max(2, job.n_epochs + 1))
    with FileLock(job.folder / "study.lock"):
        study = optuna.create_study(
            study_name=job.name,
            storage=job.storage or _default_storage(job.folder),
            sampler=SFDASampler(job.scores, base_sampler=base, seed=job.seed),
            pruner=SFDAPruner(list(job.scores), base_pruner=halving if few else hyperband),
            directions=job.directions,
            load_if_exists=True,
        )
        if not study.get_trials(deepcopy=False):
            for backbone in list(job.scores)[: job.n_trials]:
                study.enqueue_trial({"backbone": backbone, **job.space.default()})
    return study


def _default_storage(folder: Path) -> str:
    """Return the URL of RUN/study.db; the name of RUN may hold ``?``, ``#`` or ``%``."""
    from sqlalchemy.engine import make_url

    path = (folder / "study.db").absolute()
    url = f"sqlite:///{quote(str(path))}?timeout=60"
    if make_url(url).database == str(path):
        return url
    return f"sqlite:///{path.as_uri()}?timeout=60&uri=true"  # before 2.1 it quotes nothing


def read_trials(study: Study) -> list[Trial]:
    """Return the trials of a study as `Trial`, without those that others continue."""
    trials = [t for t in study.get_trials(deepcopy=False) if RECORD in t.user_attrs]
    latest = {_record(t)["folder"]: t.number for t in trials}
    found = []
    for t in trials:
        record = _record(t)
        if latest[record["folder"]] == t.number:
            values = record["values"] and tuple(record["values"])
            found.append(Trial(**{**record, "values": values, "epochs": tuple(record["epochs"])}))
    return found


def _record(trial: FrozenTrial) -> dict[str, Any]:
    return trial.user_attrs[RECORD]


def _claim(study: Study, job: Job) -> tuple[optuna.Trial, Trial, FileLock] | None:
    """Ask for the next trial and lock its folder; None if all have begun."""
    waits = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    if job.n_trials is not None and not waits and len(read_trials(study)) >= job.n_trials:
        return None
    ours = study.ask()
    backbone = ours.suggest_categorical("backbone", sorted(job.scores))
    params = {d.name: _suggest(ours, d) for d in job.space.dimensions}
    folder = ours.user_attrs.get(FOLDER, f"{ours.number:05d}")
    lock = _lock(job, folder)
    lock.acquire(timeout=10)
    worker = f"{socket.gethostname()}:{os.getpid()}"
    return (
        ours,
        Trial(ours.number, backbone, params, folder, started=time.time(), worker=worker),
        lock,
    )


def _suggest(trial: optuna.Trial, d: Dimension) -> Any:
    if d.choices:
        return trial.suggest_categorical(d.name, d.choices)
    if d.is_integer:
        return trial.suggest_int(d.name, int(d.low), int(d.high), log=d.log)
    return trial.suggest_float(d.name, d.low, d.high, log=d.log)


def _lock(job: Job, folder: str) -> FileLock:
    path = job.folder / "trials" / folder
    path.mkdir(parents=True, exist_ok=True)
    return FileLock(path / "worker.lock")


def _report(study: Study, job: Job, ours: optuna.Trial, trial: Trial) -> bool:
    """Write down what the trial has reached; tell whether it is to stop."""
    _write(ours, trial)
    job.tell(read_trials(study))
    if len(job.directions) > 1:  # Optuna prunes for one objective only
        return False
    told = study.get_trials(deepcopy=False)[ours.number].intermediate_values
    for epoch in trial.epochs:
        if epoch["number"] not in told:
            ours.report(epoch["value"], epoch["number"])
    return trial.epochs[-1]["number"] < job.n_epochs and ours.should_prune()


def _write(ours: optuna.Trial, trial: Trial) -> None:
    ours.set_user_attr(RECORD, asdict(trial))


def _end(study: Study, ours: optuna.Trial, trial: Trial) -> None:
    _write(ours, trial)
    if trial.state == "complete":
        study.tell(ours, trial.values)
    elif trial.state == "pruned":
        study.tell(ours, state=TrialState.PRUNED)
    elif trial.error == NO_TIME:
        _abandon(study, ours.number)
    else:
        study.tell(ours, state=TrialState.FAIL)


def _abandon(study: Study, number: int) -> None:
    """End a trial that is no evidence: not through the sampler, which would blame the backbone."""
    trial = study.get_trials(deepcopy=False)[number]
    _compat.find_storage(study).set_trial_state_values(
        _compat.find_trial_id(study, trial)[1], TrialState.FAIL
    )


def _revive(study: Study, job: Job) -> None:
    """Enqueue again what dead workers left running."""
    for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        record = t.user_attrs.get(RECORD)
        folder = record["folder"] if record else t.user_attrs.get(FOLDER, f"{t.number:05d}")
        if not (job.folder / "trials" / folder).is_dir():  # on another machine, or just asked
            beat = max((t.datetime_start.timestamp() if t.datetime_start else 0.0), _beat(record))
            if time.time() - beat < STALE:
                continue
        lock = _lock(job, folder)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        lock.release()
        try:
            _abandon(study, t.number)
        except UpdateFinishedTrialError:  # it ended after we had looked
            continue
        if "backbone" in t.params and all(d.name in t.params for d in job.space.dimensions):
            study.enqueue_trial(t.params, user_attrs={FOLDER: folder})


def _beat(record: dict[str, Any] | None) -> float:
    """Return when a trial was last heard of."""
    return 0.0 if record is None else record["started"] + (record["seconds"] or 0.0)
