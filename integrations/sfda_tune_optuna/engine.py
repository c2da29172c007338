"""The Optuna engine of `sfda_tune.search`: any storage, any number of workers, no lost trial.

A worker marks its trial with the folder RUN it works in, holds the lock of the trial's checkpoint
folder while it lives, and sends a sign of life now and then, however long an epoch takes. Who
shares the RUN sees by the lock whether a worker lives; who shares the database only counts one as
dead whose sign has not changed for `STALE` seconds of its own clock. The trial of a dead worker
ends, as no evidence against its backbone, and another one with the same parameters and the same
folder goes on from its checkpoint.

What is to be enqueued follows from what stands in the study, never from what this process has
just done: a kill between any two steps loses nothing. Where two machines enqueue the same, the
later one is withdrawn when its turn comes. A worker that was taken for dead finds its trial ended
and leaves it.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from sfda_tune.pipelines.clock import Beat
from sfda_tune.pipelines.engines import DIED, NO_TIME, Job, Trial, read_trial, run_trial
from sfda_tune.pipelines.spaces import Dimension
from sfda_tune.values.files import write_text
from sfda_tune.values.redaction import hide_secrets, redact
from sfda_tune_optuna import _compat
from sfda_tune_optuna.pruner import SFDAPruner
from sfda_tune_optuna.sampler import SFDASampler

__all__ = ["open_study", "read_trials", "tune"]

# User attributes of trials.
RECORD = "sfda:trial"  # the `Trial` as JSON values
FOLDER = "sfda:folder"  # of one that was enqueued: where it goes on
PLACE = "sfda:place"  # the RUN of its worker
BEAT = "sfda:beat"  # sign of life: another number each time
DOUBLE = "sfda:double"  # withdrawn, because another trial does the same
MANY = 40  # trials from which on Hyperband's brackets fill
STALE = 180.0  # seconds without a sign of life after which a worker counts as dead


def tune(job: Job) -> list[Trial]:
    """Run trials until there are enough or the time is over; return all of the study."""
    with _quiet():
        study = open_study(job)
        signs: dict[int, tuple[str, float]] = {}
        with _study_lock(job):
            _fail_dead_trials(study, job, signs)
            _enqueue_heirs(study, without_time=True)
        while not job.is_over():
            try:
                with _study_lock(job):  # one at a time asks, and looks for the dead
                    _fail_dead_trials(study, job, signs)
                    _enqueue_heirs(study)
                    claimed = _claim(study, job)
                if claimed is not None:
                    _work(study, job, *claimed)
                elif any(t.state == TrialState.RUNNING for t in _all(study)):
                    time.sleep(0.5)  # others are at work, and one of them may die
                else:
                    break
            except UpdateFinishedTrialError:  # we were taken for dead: another one goes on
                continue
        with _study_lock(job):
            _fail_dead_trials(study, job, signs)
        return [_settle(study, trial) for trial in read_trials(study)]


def _work(study: Study, job: Job, ours: optuna.Trial, trial: Trial, lock: FileLock) -> None:
    """Make a trial that is ours."""
    beats = iter(range(1 << 62))
    try:
        with Beat(lambda: _send(ours, next(beats)), STALE / 12):
            _write(ours, trial)
            job.update_trials(read_trials(study))
            done = run_trial(job.train, trial, partial(_report, study, job, ours))
            _write(ours, done)
            _end(study, done, ours.number)
    finally:  # an interrupted trial stays RUNNING: the next process finds it without its lock
        lock.release()
    job.update_trials(read_trials(study))


def _send(ours: optuna.Trial, beat: int) -> None:
    with suppress(UpdateFinishedTrialError):
        ours.set_user_attr(BEAT, beat)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the terminal to the progress of the search."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _study_lock(job: Job) -> FileLock:
    return FileLock(job.folder / "study.lock")


def check_storage(url: str | None) -> None:
    """Refuse a URL that no database understands, whose driver is missing, or where none answers.

    Raises
    ------
    ValueError
    """
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError

    if url is None:
        return
    try:
        parsed = make_url(url)
        parsed.get_dialect().import_dbapi()
        raw = "@" in (parsed.host or "")
    except (ArgumentError, ImportError) as error:
        raise ValueError(
            "`storage` must be a URL such as sqlite:///study.db or postgresql://… but: "
            f"{hide_secrets(str(error), url)}"
        ) from None  # the cause may show a password
    if raw:
        raise ValueError(
            f"`storage` {redact(url)!r} has an @ in its password that would end it; write %40."
        )
    engine = create_engine(parsed)
    try:
        engine.connect().close()
    except DBAPIError as error:
        raise ValueError(
            f"`storage` {redact(url)!r} cannot be opened: {hide_secrets(str(error.orig), url)}"
        ) from None
    finally:
        engine.dispose()


tune.check_storage = check_storage  # type: ignore[attr-defined]


def open_study(job: Job) -> Study:
    """Open or begin the study of a job; its first trials are the defaults, best backbone first."""
    base = optuna.samplers.TPESampler(n_startup_trials=4, seed=job.seed)
    few = job.n_trials is not None and job.n_trials < MANY
    halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    hyperband = optuna.pruners.HyperbandPruner(max_resource=max(2, job.n_epochs + 1))
    with _quiet(), _study_lock(job):
        study = optuna.create_study(
            study_name=job.name,
            storage=job.storage or _default_storage(job.folder),
            sampler=SFDASampler(
                job.scores, base_sampler=base, previous=job.previous, seed=job.seed
            ),
            pruner=SFDAPruner(list(job.scores), base_pruner=halving if few else hyperband),
            directions=job.directions,
            load_if_exists=True,
        )
        defaults = [{"backbone": b, **job.space.default()} for b in job.scores][: job.n_trials]
        for params in defaults:
            if all(_fixed(t) != params for t in _all(study)):
                study.enqueue_trial(params)
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
    latest = {_record(t)["folder"]: t for t in _all(study) if RECORD in t.user_attrs}
    return [read_trial(_record(t)) for t in sorted(latest.values(), key=lambda t: t.number)]


def _settle(study: Study, trial: Trial) -> Trial:
    """Say of the trial of a dead worker, which nobody goes on with now, how it ended."""
    ended = _all(study)[trial.number].state.is_finished()
    if trial.state != "running" or not ended:
        return trial
    return replace(trial, state="pruned" if trial.epochs else "failed", error=DIED)


def _all(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False)


def _record(trial: FrozenTrial) -> dict[str, Any]:
    return trial.user_attrs[RECORD]


def _fixed(trial: FrozenTrial) -> dict[str, Any]:
    """Return the parameters that a trial was enqueued with."""
    return trial.system_attrs.get("fixed_params", {})


def _folder(trial: FrozenTrial) -> str:
    """Return where a trial, or the first of those that it continues, began."""
    return trial.user_attrs.get(FOLDER, f"{trial.number:05d}")


# The next trial ---------------------------------------------------------------------------------
def _claim(study: Study, job: Job) -> tuple[optuna.Trial, Trial, FileLock] | None:
    """Ask for the next trial and lock its folder; None if all have begun."""
    while True:
        waits = any(t.state == TrialState.WAITING for t in _all(study))
        if job.n_trials is not None and not waits and _count(_all(study)) >= job.n_trials:
            return None
        ours = study.ask()
        ours.set_user_attr(PLACE, _place(job))
        if not _is_double(study, job, ours.number):
            break
        ours.set_user_attr(DOUBLE, True)
        _abandon(study, ours.number)
    folder = _folder(_all(study)[ours.number])
    lock = _lock(job, folder)
    try:
        lock.acquire(timeout=10)
    except Timeout:  # one that we took for dead holds on to it: begin anew, in a folder of our own
        folder = f"{ours.number:05d}"
        lock = _lock(job, folder)
        lock.acquire(timeout=10)
    try:
        backbone = ours.suggest_categorical("backbone", sorted(job.scores))
        params = {d.name: _suggest(ours, d) for d in job.space.dimensions}
    except BaseException:
        lock.release()
        raise
    worker = f"{socket.gethostname()}:{os.getpid()}"
    trial = Trial(ours.number, backbone, params, folder, started=time.time(), worker=worker)
    return ours, trial, lock


def _count(trials: Sequence[FrozenTrial]) -> int:
    """Count trials: those that have begun, and those that somebody is just asking for."""
    begun = {_record(t)["folder"] for t in trials if RECORD in t.user_attrs}
    return len(begun) + sum(
        t.state == TrialState.RUNNING and not {RECORD, DOUBLE} & t.user_attrs.keys()
        for t in trials
    )


def _is_double(study: Study, job: Job, number: int) -> bool:
    """Tell whether an earlier trial makes this one needless: two machines share no lock."""
    trials = [t for t in _all(study) if DOUBLE not in t.user_attrs]
    ours = next(t for t in trials if t.number == number)
    earlier = [t for t in trials if t.number < number]
    if FOLDER in ours.user_attrs:
        heirs = [t for t in earlier if t.user_attrs.get(FOLDER) == ours.user_attrs[FOLDER]]
        return not all(_is_left(t, without_time=True) for t in heirs)
    if _fixed(ours):
        return any(FOLDER not in t.user_attrs and _fixed(t) == _fixed(ours) for t in earlier)
    return job.n_trials is not None and _count(earlier) >= job.n_trials


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


def _place(job: Job) -> str:
    """Return what tells this RUN from those of other machines, and from its own copies."""
    file = job.folder / "place.txt"
    if not file.is_file():
        write_text(file, uuid.uuid4().hex)
    return f"{file.read_text(encoding='utf-8')} {job.folder.stat().st_ino}"


# A trial under way ------------------------------------------------------------------------------
def _report(study: Study, job: Job, ours: optuna.Trial, trial: Trial) -> bool:
    """Write down what the trial has reached; tell whether it is to stop."""
    try:
        _write(ours, trial)
    except UpdateFinishedTrialError:  # we were taken for dead
        return True
    job.update_trials(read_trials(study))
    if len(job.directions) > 1:  # Optuna prunes for one objective only
        return False
    told = _all(study)[ours.number].intermediate_values
    for epoch in trial.epochs:
        if epoch["number"] not in told:
            ours.report(epoch["value"], epoch["number"])
    return trial.epochs[-1]["number"] < job.n_epochs and ours.should_prune()


def _write(ours: optuna.Trial, trial: Trial) -> None:
    ours.set_user_attr(RECORD, asdict(trial))


def _end(study: Study, trial: Trial, number: int) -> None:
    if trial.state == "complete":
        study.tell(number, trial.values, skip_if_finished=True)
    elif trial.state == "pruned":
        study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
    elif trial.error == NO_TIME:
        _abandon(study, number)
    else:
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _abandon(study: Study, number: int) -> None:
    """End a trial that is no evidence: not through the sampler, which would blame the backbone."""
    _compat.find_storage(study).set_trial_state_values(
        _compat.find_trial_id(study, _all(study)[number])[1], TrialState.FAIL
    )


# The dead and their heirs -----------------------------------------------------------------------
def _fail_dead_trials(study: Study, job: Job, signs: dict[int, tuple[str, float]]) -> None:
    """End what dead workers have left running, as they would have if they came to an end."""
    for t in _all(study):
        if t.state != TrialState.RUNNING or not _is_dead(t, job, signs):
            continue
        record = t.user_attrs.get(RECORD)
        try:
            if record is not None and record["state"] != "running":
                _end(study, read_trial(record), t.number)
            else:
                _abandon(study, t.number)
        except UpdateFinishedTrialError:  # it ended after we had looked
            continue


def _is_dead(trial: FrozenTrial, job: Job, signs: dict[int, tuple[str, float]]) -> bool:
    """Tell whether the worker of a running trial is dead; `signs` of life, and when they came."""
    record = trial.user_attrs.get(RECORD)
    folder = record["folder"] if record else _folder(trial)
    if job.storage is not None:
        is_here = trial.user_attrs.get(PLACE) == _place(job)
    else:  # the study is in RUN: one without a record was just asked for, under the study's lock
        is_here = record is None or (job.folder / "trials" / folder).is_dir()
    if is_here:
        try:
            with _lock(job, folder).acquire(timeout=0):
                return True
        except Timeout:
            return False
    sign, now = repr((trial.params, trial.user_attrs)), time.monotonic()
    if signs.get(trial.number, ("", 0.0))[0] != sign:
        signs[trial.number] = sign, now
    return now - signs[trial.number][1] > STALE


def _enqueue_heirs(study: Study, *, without_time: bool = False) -> None:
    """Enqueue again what dead workers have left and nobody goes on with.

    `without_time`: also those that had no time for an epoch; now there is some.
    """
    trials = [t for t in _all(study) if DOUBLE not in t.user_attrs]
    latest = {_folder(t): t.number for t in trials}
    for t in trials:
        if latest[_folder(t)] == t.number and _is_left(t, without_time=without_time):
            params = _fixed(t) | t.params
            if RECORD in t.user_attrs or _fixed(t):  # else it was not even chosen
                study.enqueue_trial(params, user_attrs={FOLDER: _folder(t)})


def _is_left(trial: FrozenTrial, *, without_time: bool) -> bool:
    """Tell whether a trial ended without its worker, or without time for an epoch."""
    record = trial.user_attrs.get(RECORD, {"state": "running"})
    left = record["state"] == "running" or (without_time and record["error"] == NO_TIME)
    return trial.state == TrialState.FAIL and left
