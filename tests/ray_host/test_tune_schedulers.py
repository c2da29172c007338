"""`SFDAScheduler`, `PerBackboneScheduler` and `SchedulerStateCallback` in real runs of Tune."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray import tune
from ray.tune.logger import LoggerCallback
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler
from ray.tune.search.optuna import OptunaSearch
from sfda_tune_ray import (
    SchedulerStateCallback,
    SFDAScheduler,
    SFDASearcher,
    backbone_space,
)
from tune_lab import (
    NAMES,
    SCORES,
    VALUES,
    find_config,
    find_rungs,
    find_searcher,
    find_study,
    fit,
    make_tuner,
    restore,
    run,
    train,
)

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Ray's sockets
]
MAX = {"metric": "acc", "mode": "max"}


@pytest.mark.parametrize("base", ["asha", pytest.param("hyperband", marks=pytest.mark.slow)])
def test_trap_C02_C13_C15_C17_vetoed_trials_never_start_and_results_work(tmp_path, base):
    base_scheduler = ASHAScheduler(max_t=2) if base == "asha" else HyperBandScheduler(max_t=2)
    scheduler = SFDAScheduler(SCORES, keep=2, base_scheduler=base_scheduler)
    results = fit(
        train, tmp_path, {"backbone": tune.grid_search(NAMES[:4]), "folder": str(tmp_path)},
        scheduler=scheduler, **MAX,
    )  # fmt: skip
    assert not results.errors
    assert [name for name in NAMES if (tmp_path / name).exists()] == ["a", "b"]
    assert len(results) == 4
    assert results.get_best_result().config["backbone"] == "a"
    assert results.get_dataframe()["config/backbone"].tolist() == ["a", "b"]
    vetoed = [r.config["backbone"] for r in results if r.metrics.get("sfda_pruned")]
    assert vetoed == ["c", "d"]


def test_trap_C14_C16_a_veto_counts_as_a_sample_and_as_pruned(tmp_path):
    base = OptunaSearch(points_to_evaluate=[{"backbone": "f"}, {"backbone": "a"}])
    results = fit(
        train, tmp_path, {"backbone": backbone_space(SCORES)}, search_alg=base, num_samples=2,
        scheduler=SFDAScheduler(["a"]), **MAX,
    )  # fmt: skip
    assert [r.metrics.get("acc") for r in results] == [None, VALUES["a"]]
    assert [t.state.name for t in find_study(base).trials] == ["PRUNED", "COMPLETE"]


def test_the_searcher_proposes_nothing_that_the_scheduler_stops(tmp_path):
    misled = {name: -score for name, score in SCORES.items()}
    searcher = SFDASearcher(misled, seed=0, points_to_evaluate=[{"backbone": "f"}])
    results = fit(
        train, tmp_path, {"backbone": tune.choice(NAMES)}, search_alg=searcher, num_samples=4,
        scheduler=SFDAScheduler(["a", "b"]), max_concurrent_trials=2, reuse_actors=True, **MAX,
    )  # fmt: skip
    tried = [r.config["backbone"] for r in results]
    assert tried[0] == "f"  # the user's word counts, and is vetoed
    assert {*tried[1:]} == {"a", "b"}
    assert searcher.calibration().n_trials == 3


class Tracker(LoggerCallback):
    """Opens a run when a trial starts, as those for MLflow, W&B and Comet do."""

    def __init__(self):
        self.runs, self.closed = {}, []

    def log_trial_start(self, trial):
        self.runs[trial] = []

    def log_trial_result(self, iteration, trial, result):
        self.runs[trial].append(result["acc"])

    def log_trial_end(self, trial, failed=False):
        self.closed.append(self.runs.pop(trial))


def test_loggers_that_open_a_run_per_trial_do_not_hear_of_vetoed_ones(tmp_path):
    tracker = Tracker()
    results = fit(
        train, tmp_path, {"backbone": tune.grid_search(NAMES[:4])},
        scheduler=SFDAScheduler(SCORES, keep=2), callbacks=[tracker], **MAX,
    )  # fmt: skip
    assert not results.errors
    assert sorted(tracker.closed) == [[VALUES["b"]], [VALUES["a"]]]
    assert tracker.runs == {}


DRIVER = """
import warnings; warnings.simplefilter("ignore")
import sys, ray
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from tune_lab import *
from test_tune_schedulers import make_driver_run
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
make_driver_run(Path(sys.argv[4])).fit()
"""


def waits(config):
    """The first two trials end; the others go on only when the file `go` exists."""
    folder = Path(config["folder"])
    (folder / f"trial {tune.get_context().get_trial_id()}").touch()
    while len(list(folder.glob("trial *"))) > 2 and not (folder / "go").exists():
        time.sleep(0.1)
    for epoch in range(1, 3):
        tune.report({"acc": VALUES[config["backbone"]] + epoch * 1e-3})


def make_driver_run(folder):
    scheduler = SFDAScheduler(
        SCORES, keep=6, base_scheduler=ASHAScheduler(max_t=2, grace_period=1)
    )
    searcher = SFDASearcher(SCORES, seed=0)
    space = {"backbone": backbone_space(SCORES, 3), "lr": tune.uniform(0, 1)}
    return make_tuner(
        waits, folder, space | {"folder": str(folder)}, search_alg=searcher, num_samples=5,
        scheduler=scheduler, max_concurrent_trials=2,
        callbacks=[SchedulerStateCallback(scheduler, searcher)], **MAX,
    )  # fmt: skip


@pytest.mark.slow
def test_trap_C18_T01_T03_a_killed_driver_is_restored(tmp_path, ray_cluster):
    """Searcher and rungs know all five trials, although the driver was killed."""
    here = Path(__file__).parent
    package = str(here.parents[1] / "integrations")
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, ray_cluster.address, str(here), package, str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("trial *"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(4)  # for the snapshot
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert len(list(tmp_path.glob("trial *"))) >= 4
    (tmp_path / "go").touch()
    tuner = restore(tmp_path, waits)
    results = run(tuner)
    assert len(results) == 5
    assert not results.errors
    searcher = find_searcher(tuner)
    assert searcher.calibration().n_trials == 5
    ends = [(trial.state.name, trial.value is None) for trial in searcher.study.trials]
    assert len(ends) == 5
    assert {*ends} <= {("COMPLETE", False), ("PRUNED", False)}  # those ASHA stops
    assert len(find_rungs(find_config(tuner).scheduler.base_scheduler)[1]) == 5
