"""The schedulers, called as Tune calls them, with real trials and Ray's own schedulers inside."""

from __future__ import annotations

import logging
import pickle

import pytest
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    ResourceChangingScheduler,
    TrialScheduler,
)
from sfda_tune_optuna import SFDAPruner
from sfda_tune_ray import PerBackboneScheduler, SchedulerStateCallback, SFDAScheduler, SFDASearcher
from tune_lab import SCORES, find_metric, find_trials


class Controller:
    """What a scheduler may use of Tune's controller (C04), and nothing else."""

    def __init__(self, scheduler):
        self.scheduler, self.trials, self.stopped = scheduler, [], []
        self.search_alg = None

    def get_trials(self):
        return self.trials

    def get_live_trials(self):
        return {trial for trial in self.trials if trial.status != Trial.TERMINATED}

    def stop_trial(self, trial):
        assert trial in self.trials  # not from within on_trial_add (C01)
        if trial.status == Trial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
        else:
            self.scheduler.on_trial_remove(self, trial)
        trial.set_status(Trial.TERMINATED)
        self.stopped.append(trial)

    def pause_trial(self, trial, should_checkpoint=True):
        trial.set_status(Trial.PAUSED)

    def add(self, backbone, status=Trial.PENDING):
        config = {} if backbone is None else {"backbone": backbone}
        trial = Trial("stub", config=config, stub=True)
        trial.init_local_path = lambda: None  # no storage here; the real one runs in test_tune_*
        trial.set_status(status)
        self.scheduler.on_trial_add(self, trial)
        self.trials.append(trial)
        return trial

    def report(self, trial, iteration, value):
        trial.set_status(Trial.RUNNING)
        result = {"training_iteration": iteration, "acc": value, "time_total_s": iteration}
        trial.run_metadata.last_result = result
        decision = self.scheduler.on_trial_result(self, trial, result)
        if decision == TrialScheduler.STOP:
            self.stop_trial(trial)
        return decision


def make_asha(**options):
    return ASHAScheduler(metric="acc", mode="max", max_t=4, reduction_factor=2, **options)


def test_trap_C01_C02_vetoes_wait_for_the_choice_which_is_idempotent():
    scheduler = SFDAScheduler(SCORES, keep=2)
    controller = Controller(scheduler)
    trials = [controller.add(name) for name in "fab"]
    assert controller.stopped == []
    for _ in range(2):
        assert scheduler.choose_trial_to_run(controller) is trials[1]
        assert controller.stopped == [trials[0]]
    assert trials[0].last_result["sfda_pruned"] is True
    assert trials[0].last_result["config"] == {"backbone": "f"}


@pytest.mark.parametrize("wrap", [
    lambda: SFDAScheduler(SCORES, keep=1, base_scheduler=make_asha()),
    lambda: PerBackboneScheduler(make_asha),
])  # fmt: skip
def test_trap_C03_restored_and_recovered_trials_are_added_again(wrap):
    scheduler = wrap()
    controller = Controller(scheduler)
    controller.add("f", Trial.TERMINATED)
    controller.add("a", Trial.ERROR)
    waiting = controller.add("a")
    scheduler.on_trial_error(controller, waiting)
    scheduler.on_trial_add(controller, waiting)
    assert scheduler.choose_trial_to_run(controller) is waiting
    assert controller.stopped == []
    is_one = isinstance(scheduler, SFDAScheduler)
    base = scheduler.base_scheduler if is_one else scheduler.schedulers["a"]
    assert find_trials(base) == [waiting.trial_id]


@pytest.mark.parametrize("make", [make_asha, HyperBandScheduler, FIFOScheduler])
def test_trap_C04_C05_C08_C12_wrappers_look_like_what_they_wrap(make):
    for scheduler in (
        SFDAScheduler(["a"], base_scheduler=make()),
        PerBackboneScheduler(make),
        SFDAScheduler(["a"], base_scheduler=PerBackboneScheduler(make)),
    ):
        bare = make()
        assert scheduler.supports_buffered_results == bare.supports_buffered_results
        given = scheduler.set_search_properties("acc", "max")
        assert given == bare.set_search_properties("acc", "max")
        assert given is (make is not make_asha)  # it has a metric already
        assert scheduler.metric == find_metric(scheduler) == bare.metric == "acc"
        assert scheduler.debug_string()


def test_trap_C05_schedulers_made_later_get_the_properties_too():
    scheduler = PerBackboneScheduler(lambda: ASHAScheduler(max_t=4))
    assert scheduler.set_search_properties("acc", "max")
    controller = Controller(scheduler)
    trial = controller.add("late")
    assert controller.report(trial, 1, 0.5) == TrialScheduler.CONTINUE


def test_trap_C06_C07_slow_starters_survive_among_their_own():
    stops = {}
    for name, make in (("bare", make_asha), ("fair", lambda: PerBackboneScheduler(make_asha))):
        controller = Controller(make())
        for n in range(3):
            controller.report(controller.add("small"), 1, 0.5 + n / 100)
        stops[name] = controller.report(controller.add("big"), 1, 0.1)
    assert stops == {"bare": TrialScheduler.STOP, "fair": TrialScheduler.CONTINUE}
    scheduler = PerBackboneScheduler(make_asha)  # it still halves within a backbone
    controller = Controller(scheduler)
    controller.report(controller.add("big"), 1, 0.3)
    assert controller.report(controller.add("big"), 1, 0.1) == TrialScheduler.STOP


@pytest.mark.parametrize("base", [
    PopulationBasedTraining(hyperparam_mutations={"lr": [1, 2]}), ASHAScheduler, "asha",
])  # fmt: skip
def test_trap_C09_bases_that_cannot_work_are_refused(base):
    with pytest.raises(ValueError, match="`base_scheduler` must"):
        SFDAScheduler(["a"], base_scheduler=base)


def test_trap_C11_resources_that_change_do_not_go_with_unequal_ones():
    """Ray's own error; our documentation says so."""
    scheduler = SFDAScheduler(["a", "b"], base_scheduler=ResourceChangingScheduler())
    controller = Controller(scheduler)
    trials = [Trial("stub", config={"backbone": name}, stub=True) for name in "ab"]
    for n, trial in enumerate(trials):
        trial.placement_group_factory = PlacementGroupFactory([{"CPU": n + 1}])
    scheduler.on_trial_add(controller, trials[0])
    with pytest.raises(RuntimeError, match="ResourceChangingScheduler"):
        scheduler.on_trial_add(controller, trials[1])
    assert "ResourceChangingScheduler" in (SFDAScheduler.__doc__ or "")


def test_survivors_may_shrink_and_trials_without_backbone_pass():
    scheduler = SFDAScheduler(SCORES, keep=2, base_scheduler=make_asha())
    controller = Controller(scheduler)
    runs, waits, other = controller.add("a"), controller.add("a"), controller.add(None)
    assert controller.report(runs, 1, 0.5) == TrialScheduler.CONTINUE
    scheduler.set_survivors(["b"])
    assert controller.report(runs, 2, 0.9) == TrialScheduler.STOP
    assert scheduler.choose_trial_to_run(controller) is other
    paused = controller.add("a", Trial.PAUSED)
    assert scheduler.choose_trial_to_run(controller) is other
    assert set(controller.stopped) == {runs, waits, paused}
    assert find_trials(scheduler.base_scheduler) == [other.trial_id]  # it was told of both ends
    with pytest.raises(ValueError, match="`survivors` must be a non-empty collection"):
        scheduler.set_survivors([])


@pytest.mark.parametrize("wrap", [
    make_asha,
    lambda: SFDAScheduler(SCORES, base_scheduler=make_asha()),
    lambda: PerBackboneScheduler(make_asha),
    lambda: SFDAScheduler(SCORES, base_scheduler=PerBackboneScheduler(make_asha)),
])  # fmt: skip
def test_trap_C18_T01_the_callback_keeps_the_rungs(wrap):
    old, new = wrap(), wrap()
    controller = Controller(old)
    for value in (0.5, 0.9):
        controller.report(controller.add("a"), 1, value)
    state = SchedulerStateCallback(old).get_state()
    assert b"Trial" not in pickle.dumps(state)  # data, not objects
    SchedulerStateCallback(new).set_state(pickle.loads(pickle.dumps(state)))
    controller = Controller(new)
    assert controller.report(controller.add("a"), 1, 0.1) == TrialScheduler.STOP
    assert SchedulerStateCallback(wrap()).get_state() != SchedulerStateCallback(new).get_state()


def test_trap_C08_what_cannot_be_saved_is_said(caplog):
    callback = SchedulerStateCallback(HyperBandScheduler(metric="acc", mode="max"))
    with caplog.at_level(logging.WARNING):
        callback.setup()
    assert "The state of HyperBandScheduler is not saved" in caplog.text
    assert callback.get_state() is None
    with pytest.raises(ValueError, match="`searcher` must be an SFDASearcher without"):
        SchedulerStateCallback(searcher="searcher")
    SchedulerStateCallback(searcher=SFDASearcher(SCORES)).set_state({"unused": 1})


def test_a_scheduler_is_no_factory():
    with pytest.raises(ValueError, match=r"`factory` must .* write `lambda: AsyncHyperBandSched"):
        PerBackboneScheduler(make_asha())


def test_trap_C19_all_backbones_get_their_turn():
    scheduler = PerBackboneScheduler(make_asha)
    controller = Controller(scheduler)
    for name in "xxxyyy":
        controller.add(name)
    order = ""
    while (trial := scheduler.choose_trial_to_run(controller)) is not None:
        assert scheduler.choose_trial_to_run(controller) is trial
        order += trial.config["backbone"]
        controller.report(trial, 1, 0.5)
    assert order == "xyxyxy"
    controller = Controller(scheduler := PerBackboneScheduler(make_asha))
    controller.add("x", Trial.RUNNING)  # has not reported yet, and counts
    for name in "xy":
        controller.add(name)
    assert scheduler.choose_trial_to_run(controller).config["backbone"] == "y"


# What it says -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scores", "name", "message"),
    [
        (SCORES, "model/backbone", "is 'model/backbone' and they have backbone: no trial is"),
        (["x"], "backbone", "names x, and all trials so far are stopped: d, e, f"),
        ({"x": 1.0, "f": 0.5}, "backbone", "but d has no score and is stopped; kept are f, x"),
    ],
)
def test_names_that_do_not_fit_are_said_once(caplog, scores, name, message):
    scheduler = SFDAScheduler(scores, param_name=name)
    controller = Controller(scheduler)
    with caplog.at_level(logging.WARNING):
        for backbone in "ffdeabc":
            controller.add(backbone)
            scheduler.choose_trial_to_run(controller)
    assert len(caplog.records) == 1
    assert message in caplog.records[0].getMessage()


def test_names_that_fit_are_not_complained_of(caplog):
    for scores in (SCORES, ["a", "b"]):
        scheduler = SFDAScheduler(scores)
        controller = Controller(scheduler)
        for backbone in "fabcde":
            controller.add(backbone)
        with caplog.at_level(logging.INFO):
            scheduler.choose_trial_to_run(controller)
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert "backbone f stopped before training: not among the 2 kept" in caplog.text


def test_keep_means_the_same_as_in_optuna():
    assert SFDAScheduler(SCORES).survivors == SFDAPruner(SCORES).survivors == {*"abcde"}
    for make_it in (SFDAScheduler, SFDAPruner):
        for arguments, message in (
            ((["a"], 2), "`keep` must be None when names are given instead of scores but is 2"),
            (([], None), "`scores` must be scores or a non-empty collection of names"),
            ((SCORES, 0), "`keep` must be an integer ≥ 1 but is 0"),
        ):
            with pytest.raises(ValueError, match=message):
                make_it(arguments[0], keep=arguments[1])
