"""The Ray engine of `sfda_tune.search`: one `Tuner`, whose trials are actors anywhere.

What a trial has reached stands in ``RUN/trials/NAME/trial.json``, beside its checkpoints, so all
machines must see the folder RUN. A trial whose actor was lost goes on from there. A search that
was interrupted, or is extended, is another experiment: its searcher knows the trials of the ones
before, and it begins with those that were left. Tune's own snapshots are not used: they are taken
now and then, so the last trials might be missing. Trials are numbered as Tune began them, which
``RUN/ray-trials.json`` keeps.
"""

from __future__ import annotations

import _thread
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock
from ray import tune as raytune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.pipelines.engines import NO_TIME, Job, Trial, read_trial, run_trial
from sfda_tune.pipelines.spaces import Dimension, Space
from sfda_tune.values.files import find_disk_fault, read_json, write_text
from sfda_tune.values.formats import EXPERIMENTS
from sfda_tune.values.ranking import Ranking
from sfda_tune_ray._compat import end_at_once
from sfda_tune_ray.callbacks import SchedulerStateCallback
from sfda_tune_ray.cluster import connect, count_places
from sfda_tune_ray.searcher import SFDASearcher
from sfda_tune_ray.spaces import backbone_resources
from sfda_tune_ray.trainable import limit_memory

__all__ = ["tune"]

RECORD, ORDER = "trial.json", "ray-trials.json"
METRICS = ["value", "cost"]  # by objective
FAULT = "fault"  # of the disk, in what a trial reports
FOLDER = "folder"  # of a trial that goes on in another experiment
TERMS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # only then "verbose=0" counts
    # Tune's own handler ends the running trials as if they were done, and tells nobody
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # a trial that the end of the time finds before its first epoch has nothing to report
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGUSR1") if hasattr(signal, n)]  # Tune's own
ALARM = getattr(signal, "SIGALRM", signal.SIGINT)  # Windows lacks it
MORE = 1000  # trials, where only the time ends a search

# Tune pickles callbacks and stoppers; what they report to stays in this process.
_JOBS: dict[str, Job] = {}
_FAULTS: dict[str, int] = {}  # of the disk, which end an experiment: its trials are left


def tune(job: Job) -> list[Trial]:
    """Run the trials that are not done yet on Ray; return all.

    `Job.storage` is the address of the cluster, see `sfda_tune_ray.cluster.connect`.
    """
    with FileLock(job.folder / "ray.lock"):  # whoever makes the same call waits for the result
        return _tune(job)


def _tune(job: Job) -> list[Trial]:
    job.update_trials(_read_all(job))
    if _is_done(job):
        return _read_all(job)
    with _connect(job), _quietly(), end_at_once():
        _JOBS[job.name] = job
        try:
            while not _is_done(job):
                _open_tuner(job).fit()
                if code := _FAULTS.pop(job.name, None):
                    raise OSError(code, os.strerror(code))
        finally:
            del _JOBS[job.name]
    return _read_all(job)


tune.spreads = True  # type: ignore[attr-defined]  # needs no helper processes
tune.seconds_to_end = 8.0  # type: ignore[attr-defined]  # or to begin, if the time ends before


@contextmanager
def _connect(job: Job) -> Iterator[None]:
    """Be connected to Ray, or not if the time ends before: to start it may take half a minute."""
    with ExitStack() as stack:
        with suppress(_TimeIsOver), _until(job.is_over):
            stack.enter_context(connect(job.storage))
        yield


class _TimeIsOver(BaseException):
    """Not for Ray to catch."""


@contextmanager
def _until(is_over: Callable[[], bool]) -> Iterator[None]:
    """Raise `_TimeIsOver` inside, whatever runs there; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise _TimeIsOver

    def watch() -> None:
        while not left.wait(0.2):
            if is_over():
                _thread.interrupt_main(ALARM)
                return

    left, thread = threading.Event(), threading.Thread(target=watch, daemon=True)
    before = signal.signal(ALARM, interrupt)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
        signal.signal(ALARM, signal.SIG_DFL if before is None else before)


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave the terminal to the progress of the search, and Ctrl-C to the search itself."""
    before = {name: os.environ.get(name) for name in TERMS}
    main = threading.current_thread() is threading.main_thread()
    handlers = {sign: signal.getsignal(sign) for sign in SIGNALS if main}
    log = logging.getLogger("optuna")  # of the searcher's study
    level = log.level
    os.environ |= TERMS
    log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(level)
        for sign, handler in handlers.items():
            if handler is not None:  # it was set by other means than Python's
                signal.signal(sign, handler)
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}


def _is_done(job: Job) -> bool:
    if job.is_over():
        return True
    past = _read_experiments(job)
    if past and past[-1]["end"] == "trials" and past[-1]["n_trials"] == job.n_trials:
        return True
    ended = [trial for trial in _read_all(job) if not _is_left(trial)]
    return len(ended) >= (job.n_trials or math.inf)


def _open_tuner(job: Job) -> raytune.Tuner:
    """Return the tuner of the next experiment."""
    gpus = _share_gpu(job)
    train = raytune.with_resources(_make_trainable(job), {"cpu": 1, "gpu": gpus})
    past, known = _read_experiments(job), _read_all(job)
    path = job.folder / f"ray-{len(past)}"
    new = {"trials": [], "end": None, "n_trials": job.n_trials}
    _write_experiments(job, [*past, new])
    ended = [trial for trial in known if not _is_left(trial)]
    left = [{"backbone": t.backbone, **t.params, FOLDER: t.folder} for t in known if _is_left(t)]
    begun = [{"backbone": t.backbone, **t.params} for t in known]
    defaults = [{"backbone": b, **job.space.default()} for b in job.scores]
    lacking = [point for point in defaults if point not in begun]  # of a lost actor, too
    searcher = SFDASearcher(
        job.scores,
        points_to_evaluate=[*left, *lacking],
        **_aims(job),
        previous=job.previous,
        seed=job.seed,
    )
    for trial in ended:
        searcher.add_evaluated_point(
            {"backbone": trial.backbone, **trial.params},
            trial.values or (),
            error=trial.state == "failed",
            pruned=trial.state == "pruned",
            intermediate_values=trial.epochs,
        )
    scheduler = FIFOScheduler()  # nobody is hopeless where there is more than one objective
    if len(job.directions) == 1:
        scheduler = ASHAScheduler(
            **_aims(job),
            max_t=2 * job.n_epochs + 10,  # the trial knows its own end
            grace_period=2,  # the linear probe and one epoch
            reduction_factor=3,
        )
    return raytune.Tuner(
        train,
        param_space={"backbone": raytune.choice(sorted(job.scores)), **_convert(job.space)},
        tune_config=raytune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=job.n_trials - len(ended) if job.n_trials else MORE,
            max_concurrent_trials=max(1, count_places(gpus, 1)),
            reuse_actors=True,  # to import torch takes longer than a small trial
        ),
        run_config=raytune.RunConfig(
            name=path.name,
            storage_path=str(path.parent),
            stop=_Stop(job.name),
            callbacks=[_Listener(job.name), SchedulerStateCallback(scheduler, searcher)],
            failure_config=raytune.FailureConfig(max_failures=2),  # an actor may be lost
            verbose=0,
        ),
    )


def _aims(job: Job) -> dict[str, Any]:
    """Return `metric` and `mode`; lists if there is more than one."""
    modes = [direction[:3] for direction in job.directions]
    if len(modes) == 1:
        return {"metric": METRICS[0], "mode": modes[0]}
    return {"metric": METRICS[: len(modes)], "mode": modes}


def _convert(space: Space) -> dict[str, Any]:
    def domain(d: Dimension) -> Any:
        if d.choices:
            return raytune.choice(list(d.choices))
        if d.is_integer:
            make = raytune.lograndint if d.log else raytune.randint
            return make(int(d.low), int(d.high) + 1)
        return (raytune.loguniform if d.log else raytune.uniform)(d.low, d.high)

    return {d.name: domain(d) for d in space.dimensions}


def _share_gpu(job: Job) -> float:
    """Return the fraction of a GPU that holds any trial, 0 where there are none.

    Trials share actors, so they all get the same: what the largest needs by `backbone_resources`,
    which goes by the memory that ranking measured.
    """
    if not ray.cluster_resources().get("GPU", 0):
        return 0
    asked = ray.remote(num_gpus=1, num_cpus=0)(_measure_memory).remote()
    while not ray.wait([asked], timeout=0.5)[0]:  # others may have them all
        if job.is_over():
            ray.cancel(asked)
            return 1
    memory = ray.get(asked)
    if memory is None or not (job.folder / "ranking.json").is_file():
        return 1
    ranking = Ranking.from_json(job.folder / "ranking.json")
    sizes = [FinetuneConfig().batch_size]
    for d in job.space.dimensions:
        if d.name == "batch_size":
            sizes = [int(n) for n in d.choices or (d.high,)]
    need = backbone_resources(ranking, gpu_memory=memory, batch_size=max(sizes))
    shares = (need({"backbone": name}).required_resources["GPU"] for name in job.scores)
    return max(shares, default=1)


def _measure_memory() -> int | None:
    """Return the bytes of a GPU."""
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def _make_trainable(job: Job) -> Callable[[dict[str, Any]], None]:
    train_factory, folder, here = job.train_factory, job.folder, os.getcwd()
    made: list[Any] = []  # once in each actor

    def train(config: dict[str, Any]) -> None:
        limit_memory()
        with suppress(OSError):  # the data may have been given as a relative path
            os.chdir(here)
        own = folder / "trials" / _name(config, raytune.get_context().get_trial_id())
        own.mkdir(parents=True, exist_ok=True)
        if (own / RECORD).is_file():
            trial = read_trial(own / RECORD)
            if not _is_left(trial):  # it had ended, but nobody was told
                _report(trial)
                return
            trial = replace(trial, state="running", error=None)
        else:
            params = {key: value for key, value in config.items() if key != "backbone"}
            trial = Trial(-1, config["backbone"], params, own.name, started=time.time())
        trial = replace(trial, worker=f"{ray.util.get_node_ip_address()}:{os.getpid()}")
        _write(own, trial)

        def note(now: Trial) -> bool:
            _write(own, now)
            if now.epochs:
                _report(now)
            return False

        made[:] = made or [train_factory()]
        try:
            done = run_trial(made[0], trial, note)
        except Exception as error:  # Tune would try again, and then call the trial failed
            if (code := find_disk_fault(error)) is None:
                raise
            told = dict.fromkeys(METRICS, math.nan)
            raytune.report(told | {"training_iteration": 1, FAULT: code})
            return
        _write(own, done)
        if done.state == "failed" and done.error != NO_TIME:
            _report(done)

    return train


def _is_left(trial: Trial) -> bool:
    """Tell whether a trial is to go on: its process was killed, or had no time for an epoch."""
    return trial.state == "running" or trial.error == NO_TIME


def _report(trial: Trial) -> None:
    """Tell Tune what a trial has come to: not a number if it failed."""
    told = {"training_iteration": max(1, len(trial.epochs))}  # those of a lost actor count, too
    values = trial.values if trial.values and trial.state != "failed" else [math.nan] * 2
    raytune.report(told | dict(zip(METRICS, values, strict=False)))


def _name(config: dict[str, Any], trial_id: str) -> str:
    """Return the folder of a trial in ``RUN/trials``."""
    return config.get(FOLDER) or f"ray-{trial_id}"


def _write(folder: Path, trial: Trial) -> None:
    write_text(folder / RECORD, json.dumps(asdict(trial)))


def _read_experiments(job: Job) -> list[dict[str, Any]]:
    """Return what is known of each experiment.

    ``trials`` are in the order that Tune began them; ``end`` is "trials" if it had all it was to
    have, "time" if the budget was spent before, None if it was interrupted.
    """
    file = job.folder / ORDER
    return read_json(file, EXPERIMENTS) if file.is_file() else []


def _write_experiments(job: Job, experiments: list[dict[str, Any]]) -> None:
    write_text(job.folder / ORDER, json.dumps(experiments))


def _read_all(job: Job) -> list[Trial]:
    """Return all trials: in the order that Tune began them, then those that it never noted."""
    names = [name for past in _read_experiments(job) for name in past["trials"]]
    found = {f.parent.name: read_trial(f) for f in (job.folder / "trials").glob(f"ray-*/{RECORD}")}
    rest = sorted(found.keys() - {*names}, key=lambda name: found[name].started)
    order = [name for name in dict.fromkeys([*names, *rest]) if name in found]
    return [replace(found[name], number=n) for n, name in enumerate(order)]


class _Listener(raytune.Callback):
    """Passes the news on, and writes down how trials end that could not do so themselves."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def job(self) -> Job:
        return _JOBS[self.name]

    def _update_trials(self, trials: list[Any], end: str | None = None) -> None:
        if self.name in _FAULTS:
            return
        *past, now = _read_experiments(self.job)
        now |= {"trials": [_name(t.config, t.trial_id) for t in trials], "end": end}
        _write_experiments(self.job, [*past, now])
        self.job.update_trials(_read_all(self.job))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Note what an epoch has reached; end the search if the disk fails."""
        if FAULT in result:
            _FAULTS[self.name] = result[FAULT]
        self._update_trials(trials)

    def on_trial_complete(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        """Note that a trial is done, or that the scheduler has stopped it."""
        self._end(trial, "pruned", None)
        self._update_trials(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that the actor of a trial was lost too often."""
        self._end(trial, "failed", "its process ended")
        self._update_trials(trials)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Note that all is done, or that the time is over."""
        for trial in trials:
            if trial.is_finished():
                self._end(trial, "pruned", None)
        self._update_trials(trials, "time" if self.job.is_over() else "trials")

    def _end(self, trial: Any, state: str, error: str | None) -> None:
        folder = self.job.folder / "trials" / _name(trial.config, trial.trial_id)
        if (folder / RECORD).is_file() and self.name not in _FAULTS:
            known = read_trial(folder / RECORD)
            if known.state == "running":  # else it said so itself
                if not known.epochs:
                    state, error = "failed", error or NO_TIME
                _write(folder, replace(known, state=state, error=error))


class _Stop(raytune.Stopper):
    """Ends the experiment with the time budget."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never stop one trial alone."""
        return False

    def stop_all(self) -> bool:
        """Tell whether the time is over, or the disk fails."""
        job = _JOBS.get(self.name)
        return job is not None and (job.is_over() or self.name in _FAULTS)
