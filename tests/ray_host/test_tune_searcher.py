"""`SFDASearcher` in real runs of Ray Tune."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import ConcurrencyLimiter
from sfda_tune_optuna.history import observe
from sfda_tune_ray import SchedulerStateCallback, SFDASearcher, backbone_resources, backbone_space
from tune_lab import (
    SCORES,
    VALUES,
    crash,
    crash_once,
    die,
    find_backbone,
    find_searcher,
    fit,
    restore,
    resume,
    run,
    train,
)

from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Ray's sockets
]
MAX = {"metric": "acc", "mode": "max"}


def meet(config):
    """Train when another trial is there, too."""
    marks = Path(config["folder"])
    (marks / tune.get_context().get_trial_id()).touch()
    until = time.monotonic() + 60
    while len(list(marks.iterdir())) < 2:
        assert time.monotonic() < until, "alone"
        time.sleep(0.05)
    train({name: value for name, value in config.items() if name != "folder"})


def test_trap_S13_S20_T05_T06_real_run_nested_and_with_resources(tmp_path):
    """Derived values, resources by backbone and a nested parameter; trials run side by side."""
    space = {
        "model": {"backbone": backbone_space(SCORES, 3), "width": 7},
        "lr": tune.loguniform(1e-5, 1e-1),
        "twice": tune.sample_from(lambda config: 2 * find_backbone(config)),
        "folder": str(tmp_path / "marks"),
    }
    (tmp_path / "marks").mkdir()
    details = {"n_params": 1e9, "input_size": (3, 32, 32)}
    ranking = Ranking(
        [Score("a", 6.0, details=details), Score("b", 5.0), Score("c", 4.0, details=details)]
    )
    need = backbone_resources(
        ranking, cpus=1, gpu_memory=24e9, param_name="model/backbone", fractions=(1, 0.5)
    )
    searcher = SFDASearcher(
        ranking, param_name="model/backbone", seed=0,
        points_to_evaluate=[{"model": {"backbone": "b"}, "lr": 0.01}],
    )  # fmt: skip
    with_gpus = tune.with_resources(lambda config: meet(config), need)
    results = fit(
        with_gpus, tmp_path, space, search_alg=searcher, num_samples=3,
        max_concurrent_trials=2, **MAX,
    )  # fmt: skip
    assert not results.errors
    configs = [result.config for result in results]
    assert all(c["twice"] == 2 * find_backbone(c) and c["model"]["width"] == 7 for c in configs)
    assert results[0].config["lr"] == 0.01
    assert find_backbone(results[0].config) == "b"
    assert all(
        r.metrics["gpus"] == (0.5 if find_backbone(r.config) == "b" else 1) for r in results
    )
    assert results.get_best_result().config["model"]["backbone"] == "a"
    assert searcher.calibration().n_trials == 3


def test_trap_S02_when_all_backbones_fail_the_run_ends(tmp_path):
    searcher = SFDASearcher(SCORES, max_failures=1, seed=0)
    results = fit(
        crash, tmp_path, {"backbone": backbone_space(SCORES, 2)}, search_alg=searcher,
        num_samples=20, max_concurrent_trials=1, **MAX,
    )  # fmt: skip
    assert len(results.errors) == len(results) == 3  # the first failure of one says nothing


@pytest.mark.parametrize(
    "how", ["resume_errored", pytest.param("restart_errored", marks=pytest.mark.slow)]
)
def test_trap_S18_S19_errored_trials_come_back(tmp_path, how):
    space = {"backbone": backbone_space(SCORES, 2), "folder": str(tmp_path)}
    space |= {"lr": tune.uniform(0, 1)}
    searcher = SFDASearcher(SCORES, max_failures=1, seed=0)
    options = {"search_alg": searcher, "num_samples": 2, "max_concurrent_trials": 2}
    assert len(fit(crash_once, tmp_path, space, **options, **MAX).errors) == 2
    (tmp_path / "repaired").touch()
    tuner = restore(tmp_path, crash_once, **{how: True})
    results = run(tuner)
    assert not results.errors
    after = find_searcher(tuner)
    assert after is not searcher
    assert after.calibration().n_trials == 2
    states = [trial.state.name for trial in after.study.trials]
    assert states == ["FAIL"] * 2 + ["COMPLETE"] * 2
    assert after.suggest("next")["backbone"] in "ab"  # it is not the end


def test_trap_S09_a_killed_trial_goes_on_from_its_checkpoint(tmp_path):
    searcher = SFDASearcher(SCORES, seed=0)
    space = {"backbone": backbone_space(SCORES, 1), "folder": str(tmp_path)}
    results = fit(
        resume, tmp_path, space | {"lr": tune.uniform(0, 1)}, search_alg=searcher, num_samples=1,
        max_failures=1, **MAX,
    )  # fmt: skip
    marks = (tmp_path / "a").read_text().split("\n")[:-1]
    assert [mark.split(" ", 1)[1] for mark in marks] == ["from 0", "from 2"]
    assert results[0].metrics["training_iteration"] == 4
    (trial,) = searcher.study.trials
    assert (trial.state.name, trial.value) == ("COMPLETE", VALUES["a"])
    assert list(trial.intermediate_values) == [1, 2, 3, 4]


def test_a_dead_machine_is_not_the_backbones_fault(tmp_path):
    searcher = SFDASearcher(SCORES, max_failures=1, seed=0)
    results = fit(
        die, tmp_path, {"backbone": "a"}, search_alg=searcher, num_samples=2,
        callbacks=[SchedulerStateCallback(searcher=searcher)], **MAX,
    )  # fmt: skip
    assert len(results.errors) == 2
    assert [trial.state.name for trial in searcher.study.trials] == ["FAIL", "FAIL"]
    assert list(observe(searcher.study, searcher.study.trials, "backbone")) == []


def test_trap_S11_an_empty_space_needs_metric_and_mode_here(tmp_path):
    options = {"num_samples": 1, **MAX}
    with pytest.raises(Exception, match="`metric and mode` must be given, in TuneConfig or here"):
        fit(train, tmp_path, {}, search_alg=SFDASearcher(SCORES), **options)
    searcher = SFDASearcher(SCORES, seed=0, **MAX)
    assert fit(train, tmp_path / "2", {}, search_alg=searcher, **options)[0].metrics["acc"] == 0.9


def test_trap_C09_population_based_training_is_refused(tmp_path):
    scheduler = PopulationBasedTraining(hyperparam_mutations={"lr": [0.1, 0.2]})
    with pytest.raises(Exception, match="Search algorithms cannot be used with Population"):
        fit(
            train, tmp_path, {"backbone": backbone_space(SCORES)}, num_samples=1,
            search_alg=SFDASearcher(SCORES), scheduler=scheduler, **MAX,
        )  # fmt: skip


def test_trap_S12_T02_restore_gives_the_saved_searcher_and_space(tmp_path):
    searcher = SFDASearcher(SCORES, seed=5)
    space = {"backbone": backbone_space(SCORES), "lr": tune.uniform(0, 1)}
    fit(train, tmp_path, space, search_alg=searcher, num_samples=2, **MAX)
    tuner = restore(tmp_path, train)
    run(tuner)
    again = find_searcher(tuner)
    assert again.study.trials == searcher.study.trials
    assert len(again.study.trials) == 2
    assert again.suggest("next") == searcher.suggest("next")
    assert np.isclose(again.calibration().slope, searcher.calibration().slope)


def test_trap_W05_two_limits_are_refused(tmp_path):
    """Ray's own error, at once."""
    searcher = ConcurrencyLimiter(SFDASearcher(SCORES), 2)
    options = {"search_alg": searcher, "max_concurrent_trials": 3}
    with pytest.raises(ValueError, match="already a `ConcurrencyLimiter`"):
        fit(train, tmp_path, {"backbone": backbone_space(SCORES)}, **options, **MAX)
