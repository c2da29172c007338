"""The searcher, called as Tune calls it, with Ray's own wrappers outside."""

from __future__ import annotations

import math
import pickle

import numpy as np
import optuna
import pytest
from optuna.samplers import CmaEsSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import TrialState
from ray import tune
from ray.tune.search import (
    BasicVariantGenerator,
    ConcurrencyLimiter,
    Repeater,
    Searcher,
    SearchGenerator,
)
from ray.tune.search.optuna import OptunaSearch
from sfda_tune_optuna import SFDASampler
from sfda_tune_optuna.history import observe
from sfda_tune_ray import SFDASearcher, backbone_space
from tune_lab import NAMES, SCORES, VALUES

from sfda_tune.selection import policy
from sfda_tune.selection.policy import find_backed_off
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking

optuna.logging.set_verbosity(optuna.logging.ERROR)
LR = {"lr": tune.loguniform(1e-5, 1e-1)}
BASES = {
    "default": lambda: None,
    "random": lambda: RandomSampler(seed=0),
    "tpe": lambda: TPESampler(seed=0, n_startup_trials=3),
    "cmaes": lambda: CmaEsSampler(seed=0, warn_independent_sampling=False),
}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


class Spy(RandomSampler):
    """A sampler that notes what it is told."""

    def __init__(self):
        super().__init__(seed=0)
        self.log = []

    def before_trial(self, study, trial):
        self.log.append(("begin", trial.number))

    def after_trial(self, study, trial, state, values):
        self.log.append((state.name, trial.number, values and values[0]))


def make(base=None, param_space=None, scores=SCORES, mode="max", **options):
    options = {"seed": 0, **options}
    searcher = SFDASearcher(scores, base_sampler=base, **options)
    if param_space is None:
        param_space = {"backbone": backbone_space(SCORES), **LR}
    assert searcher.set_search_properties("acc", mode, param_space)
    return searcher


def result(value, iteration=1, **config):
    flat = {f"config/{name}": v for name, v in config.items()}
    return {"acc": value, "training_iteration": iteration, "time_total_s": 1.0, **flat}


def drive(searcher, n, first=0, param=lambda config: config["backbone"]):
    """Run n trials one after the other; return their configurations."""
    configs = []
    for k in range(first, first + n):
        config = searcher.suggest(f"t{k}")
        searcher.on_trial_complete(f"t{k}", result(VALUES[param(config)]))
        configs.append(config)
    return configs


def states(searcher):
    return [trial.state.name for trial in searcher.study.trials]


def find_history(searcher):
    searcher.calibration()  # tells the study what was waited with
    return list(observe(searcher.study, searcher.study.trials, searcher.param_name))


# The same choices as in Optuna --------------------------------------------------------------
def make_histories(seed):
    """Feed one random history of finished trials to both hosts."""
    rng = np.random.default_rng(seed)
    options = {"seed": seed, "prior_strength": float(rng.choice([0.5, 1.0, 2.0]))}
    options["policy"] = str(rng.choice(policy.POLICIES))
    options["survivors"] = [None, None, 3, ["b", "d"]][int(rng.integers(4))]
    sampler, searcher = SFDASampler(SCORES, **options), make(**options)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for n in range(int(rng.integers(1, 30))):
        name, lr = NAMES[int(rng.integers(6))], float(10 ** rng.uniform(-5, -1))
        value = VALUES[name] * rng.choice([1, -1]) + float(rng.normal(0, 0.1))
        state, steps = str(rng.choice(["COMPLETE", "PRUNED", "FAIL"], p=[0.7, 0.2, 0.1])), 4
        if state == "PRUNED" and n:
            steps = int(rng.integers(1, 4))
        elif state == "PRUNED":
            state = "COMPLETE"
        searcher.add_evaluated_point(
            {"backbone": name, "lr": lr},
            value,
            error=state == "FAIL",
            intermediate_values=[] if state == "FAIL" else [value] * steps,
        )
        seen = {} if state == "FAIL" else dict.fromkeys(range(steps), value)
        study.add_trial(
            optuna.create_trial(
                state=optuna.trial.TrialState[state],
                params={"backbone": name, "lr": lr},
                distributions={
                    "backbone": optuna.distributions.CategoricalDistribution(NAMES),
                    "lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
                },
                value=None if state == "FAIL" else value,
                intermediate_values=seen,
            )
        )
    return study, searcher


@pytest.mark.parametrize("seed", range(20))
def test_the_same_history_leads_to_the_same_choice_as_in_optuna(seed):
    """Although here nobody says that a trial was stopped early: its iterations do."""
    study, searcher = make_histories(seed)
    theirs = study.ask().suggest_categorical("backbone", NAMES)
    ours = searcher.suggest("next")["backbone"]
    is_left = study.sampler.policy.delegates(find_history(searcher), len(study.trials) - 1)
    assert is_left or ours == theirs  # those left to TPE see the early ones otherwise
    slopes = searcher.calibration().slope, study.sampler.calibration(study).slope
    assert math.isclose(*slopes)


@pytest.mark.parametrize("chosen", ["prior", "greedy", "calibrated"])
def test_closed_loops_are_the_same_as_in_optuna(chosen):
    """The base sampler's draws, too."""
    study = optuna.create_study(
        direction="maximize", sampler=SFDASampler(SCORES, policy=chosen, seed=3)
    )

    def objective(trial):
        backbone = trial.suggest_categorical("backbone", NAMES)
        trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        return VALUES[backbone]

    study.optimize(objective, 25)
    ours = drive(
        make(param_space={"backbone": tune.choice(NAMES), **LR}, policy=chosen, seed=3), 25
    )
    assert ours == [trial.params for trial in study.trials]


def test_failures_count_as_in_optuna():
    """One says nothing, two back off until trial 16; what ran before is not blamed."""
    sampler = SFDASampler(SCORES, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    searcher = make(param_space={"backbone": tune.choice(NAMES)})
    for n in range(24):
        trial, config = study.ask(), searcher.suggest(f"t{n}")
        backbone = trial.suggest_categorical("backbone", NAMES)
        assert config["backbone"] == backbone
        if backbone == "a":
            study.tell(trial, state=TrialState.FAIL)
            searcher.on_trial_complete(f"t{n}", error=True)
        elif backbone == "b":
            study.tell(trial, state=TrialState.FAIL)  # as `optimize` does
            searcher.on_trial_complete(f"t{n}", result(math.nan))
        else:
            trial.report(VALUES[backbone], 1)
            study.tell(trial, VALUES[backbone])
            searcher.on_trial_result(f"t{n}", result(VALUES[backbone]))
            searcher.on_trial_complete(f"t{n}", result(VALUES[backbone]))
    backed_off = find_backed_off(observe(study, study.trials, "backbone"), 15)
    assert backed_off == find_backed_off(find_history(searcher), 15) == {"a", "b"}


def test_standard_errors_of_a_ranking_are_used():
    details = {"standard_error": 0.5}
    ranking = Ranking([Score(name, value, details=details) for name, value in SCORES.items()])
    assert make(scores=ranking).sampler.policy.errors == dict.fromkeys(NAMES, 0.5)


# The base sampler ---------------------------------------------------------------------------
@each_base
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("outside", [None, ConcurrencyLimiter, Repeater])
def test_any_base_any_nesting_any_wrapper(base, nested, outside):
    space = {"backbone": backbone_space(SCORES)}
    options = {"spaces": {"b": {"drop": tune.uniform(0, 0.3)}}}
    if nested:
        space, options = {"model": space}, {**options, "param_name": "model/backbone"}
    searcher = SFDASearcher(SCORES, base_sampler=base(), seed=0, **options)
    outer = searcher if outside is None else outside(searcher, 1)
    assert outer.set_search_properties("acc", "max", space | LR)
    names = []
    for k in range(14):
        config = outer.suggest(f"t{k}")
        model = config["model"] if nested else config
        names.append(model["backbone"])
        assert 1e-5 <= config["lr"] <= 1e-1
        assert ("drop" in config) == (names[-1] == "b")
        outer.on_trial_complete(f"t{k}", result=result(VALUES[names[-1]]))
    assert names[0] == "a"
    assert len(set(names)) > 2
    assert searcher.calibration().n_trials == 14


def test_one_base_sampler_is_told_of_every_trial():
    searcher = make(spy := Spy())
    drive(searcher, 3)
    searcher.suggest("t3")
    searcher.on_trial_complete("t3", error=True)
    drive(searcher, 1, 4)
    complete = [e for n in range(3) for e in (("begin", n), ("COMPLETE", n, VALUES["a"]))]
    assert [e[:2] for e in spy.log[:6]] == [e[:2] for e in complete]
    assert spy.log[6:9] == [("begin", 3), ("FAIL", 3, None), ("begin", 4)]


def test_several_objectives(tmp_path):
    aims = {"metric": ["acc", "cost"], "mode": ["max", "min"]}
    costs = {name: 10.0**k for k, name in enumerate(reversed(NAMES))}  # the better, the dearer
    searcher = SFDASearcher(SCORES, seed=0, **aims)
    assert searcher.set_search_properties(None, None, {"backbone": backbone_space(SCORES), **LR})
    chosen = []
    for k in range(24):
        config = searcher.suggest(f"t{k}")
        told = {"acc": VALUES[config["backbone"]], "cost": costs[config["backbone"]]}
        searcher.on_trial_result(f"t{k}", told | {"training_iteration": 1})
        searcher.on_trial_complete(f"t{k}", told | {"training_iteration": 1})
        chosen.append(config["backbone"])
    assert len(set(chosen)) >= 5  # all are of the front
    searcher.on_trial_complete("unknown", {"acc": 1.0})  # half an answer is none
    assert searcher.calibration().n_trials == 24
    assert len(searcher.study.best_trials) > 1
    searcher.save(str(tmp_path / "state"))
    again = SFDASearcher(SCORES, seed=9, **aims)
    again.restore(str(tmp_path / "state"))
    assert again.study.trials == searcher.study.trials
    assert again.suggest("next") == searcher.suggest("next")
    # A trial that ended early says nothing: ranks of less than a trial are no evidence.
    searcher.on_trial_complete("next", {"acc": 9.0, "cost": 0.0, "training_iteration": 1})
    searcher.suggest("long")
    searcher.on_trial_complete("long", {"acc": 0.5, "cost": 1.0, "training_iteration": 5})
    assert [o.state for o in find_history(searcher)] == ["pruned"] * 25 + ["complete"]
    # Another experiment is learnt from, too.
    other = SFDASearcher(SCORES, seed=0, **aims)
    other.add_evaluated_point({"backbone": "a", "lr": 0.1}, [0.5, 3.0])
    other.add_evaluated_point({"backbone": "b", "lr": 0.1}, (), error=True)
    assert other.suggest("t0")["backbone"] in NAMES
    assert [t.values for t in other.study.trials] == [[0.5, 3.0], None, None]
    with pytest.raises(ValueError, match="`value` must be one for each metric"):
        other.add_evaluated_point({"backbone": "a", "lr": 0.1}, 0.5)


def test_the_weights_of_objectives_are_those_of_the_sampler():
    """A complete history of two objectives leads to the same choices on both hosts."""
    study = optuna.create_study(
        directions=["maximize", "minimize"], sampler=SFDASampler(SCORES, policy="prior", seed=3)
    )
    searcher = SFDASearcher(
        SCORES, policy="prior", seed=3, metric=["acc", "cost"], mode=["max", "min"]
    )
    searcher.set_search_properties(None, None, {"backbone": backbone_space(SCORES)})
    for k in range(30):
        trial = study.ask()
        backbone = trial.suggest_categorical("backbone", NAMES)
        assert searcher.suggest(f"t{k}")["backbone"] == backbone
        values = VALUES[backbone], (7 * k) % 11
        study.tell(trial, values)
        searcher.on_trial_complete(f"t{k}", {"acc": values[0], "cost": values[1]})


# What Tune calls, and when ------------------------------------------------------------------
def test_trap_S01_both_ways_of_calling():
    searcher = make()
    for name, call in (
        ("x", lambda: searcher.on_trial_complete("x", result(0.5), False)),
        ("y", lambda: searcher.on_trial_complete(trial_id="y", result=result(0.5), error=False)),
    ):
        searcher.suggest(trial_id=name)
        call()
    searcher.on_trial_result(trial_id="y", result=result(0.5))
    assert searcher.calibration().n_trials == 2


def test_trap_S02_S03_all_failed_is_finished_and_never_an_error():
    searcher = make(max_failures=2, survivors=2, exploration=0.0)
    for k in range(100):
        if searcher.suggest(f"t{k}") == Searcher.FINISHED:
            break
        searcher.on_trial_complete(f"t{k}", error=True)
    assert k == 4
    assert SearchGenerator(searcher).searcher.suggest("u") == Searcher.FINISHED
    named = make(max_failures=1, survivors=["b"])
    named.suggest("t0")
    named.on_trial_complete("t0", result(math.nan))
    assert named.suggest("t1") == Searcher.FINISHED
    runs = make(max_failures=1, survivors=["b"])
    runs.suggest("t0")
    runs.on_trial_result("t0", result(0.5))
    for k in range(3):
        runs.on_trial_complete(f"t{k}", error=True)
        assert runs.suggest(f"t{k + 1}")["backbone"] in NAMES  # it did run once


@pytest.mark.parametrize("param", ["backbone", "m/backbone"])
def test_trap_S04_S18_unknown_trials_are_known_by_their_config(param):
    searcher = SFDASearcher(SCORES, param_name=param, seed=0)
    searcher.set_search_properties("acc", "max", dict(LR))
    searcher.on_trial_result("new", result(0.6, 1, **{param: "c", "lr": 0.1}))
    searcher.on_trial_complete("new", result(0.7, 2, **{param: "c", "lr": 0.1}))
    searcher.on_trial_complete("new", result(0.7, 2, **{param: "c", "lr": 0.1}))
    (trial,) = searcher.study.trials
    assert (trial.params, trial.value) == ({param: "c", "lr": 0.1}, 0.7)
    assert trial.intermediate_values == {1: 0.6, 2: 0.7}


def test_trap_S18_an_unknown_trial_may_end_unnoticed():
    """`ConcurrencyLimiter` passes on the end of no trial that it has not let in."""
    searcher = make()
    drive(searcher, 1)
    for k, value in (("new", 0.5), ("other", 0.4)):
        searcher.on_trial_result(k, result(value, backbone="c", lr=0.01))
    searcher.on_trial_result("later", result(0.1, 2, backbone="d", lr=0.01))
    searcher.on_trial_result("other", result(0.6, 2, backbone="c", lr=0.01))
    searcher.suggest("t1")  # those that are as far as any have ended
    assert [t.value for t in searcher.study.trials] == [VALUES["a"], 0.6, 0.1, None]
    searcher.on_trial_complete("new", result(0.55, 1, backbone="c", lr=0.01))
    assert searcher.study.trials[-1].state == TrialState.PRUNED


def test_a_nested_parameter_that_is_not_named_is_found():
    """Else it would be drawn at random, and the trial be told of another one."""
    with pytest.raises(ValueError, match=r"`param_name` must .* has the backbones: 'model/net'"):
        make(param_space={"model": {"net": backbone_space(SCORES)}, **LR})
    assert make(param_space=LR).suggest("t0")["backbone"] == "a"  # not among the parameters at all


def test_trap_S05_an_unknown_error_may_be_explained():
    searcher = make()
    for k in range(2):
        searcher.on_trial_complete(f"new{k}", error=True)
        assert states(searcher) == ["FAIL"] * k  # nobody knows of which backbone
        for _ in range(2):
            searcher.explain_error(f"new{k}", "a", lost=False)
        searcher.explain_error(f"gone{k}", "b", lost=True)
    assert find_backed_off(find_history(searcher), 8) == {"a"}


def test_earlier_studies_are_learnt_from_as_in_optuna():
    first = make()
    drive(first, 12)
    earlier = observe(first.study, first.study.trials, "backbone")
    assert drive(make(previous=[first.study]), 12) == drive(make(previous=[earlier]), 12)


def test_a_lost_machine_is_not_the_backbones_fault():
    searcher = make(max_failures=1, survivors=["a"], exploration=0.0)
    for k in range(3):
        searcher.suggest(f"t{k}")
        searcher.on_trial_complete(f"t{k}", error=True)
        searcher.explain_error(f"t{k}", "a", lost=True)
    assert (states(searcher), find_history(searcher)) == (["FAIL"] * 3, [])
    assert searcher.suggest("next") != Searcher.FINISHED


def test_trap_S06_nothing_depends_on_intermediate_results():
    searcher = make()
    searcher.suggest("t0")
    searcher.on_trial_complete("t0")  # stopped while it was pending
    assert (states(searcher), find_history(searcher)) == (["FAIL"], [])
    searcher.suggest("t1")
    searcher.on_trial_result("t1", result(0.4))
    searcher.on_trial_complete("t1")  # stopped while it was paused: its last report counts
    assert states(searcher)[1:] == ["PRUNED"]
    assert searcher.calibration().n_trials == 1


def test_trap_S07_early_stopped_trials_are_lower_bounds():
    searcher = make()
    for k, iterations in enumerate((2, 4, 1)):
        searcher.suggest(f"t{k}")
        searcher.on_trial_complete(f"t{k}", result(0.5, iterations))
    assert states(searcher) == ["COMPLETE", "COMPLETE", "PRUNED"]  # the first was the longest
    history = find_history(searcher)
    assert [(o.state, o.step, o.value) for o in history] == [
        ("pruned", 0.5, 0.5), ("complete", None, 0.5), ("pruned", 0.25, 0.5),
    ]  # fmt: skip
    assert {o.cost for o in history} == {1.0}  # seconds, as Tune says


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_trap_S08_diverged_trials(value, mode):
    searcher = make(mode=mode)
    searcher.suggest("t0")
    searcher.on_trial_result("t0", result(value, 3))
    searcher.on_trial_complete("t0", result(value, 3))
    assert states(searcher) == ["FAIL" if math.isnan(value) else "COMPLETE"]
    drive(searcher, 12, 1)
    assert math.isfinite(searcher.calibration().slope)


def test_trap_S09_S19_every_report_counts_once():
    searcher = make()
    searcher.suggest("t0")
    for iteration in (1, 2, 1, 2, 3):  # restarted after 2
        searcher.on_trial_result("t0", result(0.1 * iteration, iteration))
    for value in (0.5, 0.6, math.nan):
        searcher.on_trial_complete("t0", result(value, 4))
    searcher.on_trial_complete("t0", error=True)
    (trial,) = searcher.study.trials
    assert trial.value == 0.5
    assert list(trial.intermediate_values) == [1, 2, 3, 4]


@pytest.mark.parametrize("reports", [True, False])
def test_trap_S19_an_errored_trial_may_come_back_under_its_id(reports):
    """Its failure is then no longer evidence."""
    searcher = make()
    params = searcher.suggest("t0")
    for _ in range(2):
        searcher.on_trial_complete("t0", error=True)
    searcher.suggest("t1")
    searcher.on_trial_complete("t0", error=True)
    assert [o.state for o in find_history(searcher)] == ["failed", "running"]
    if reports:
        searcher.on_trial_result("t0", result(0.7))
    searcher.on_trial_complete("t0", result(0.7))
    searcher.on_trial_complete("t0", error=True)
    assert [o.state for o in find_history(searcher)] == ["running", "complete"]
    assert searcher.study.trials[-1].params == params


def test_failing_after_reports_is_the_fault_of_a_parameter():
    searcher = make()
    searcher.suggest("t0")
    searcher.on_trial_result("t0", result(0.5))
    searcher.on_trial_complete("t0", error=True)
    assert find_history(searcher) == []


def test_trap_S10_a_report_without_the_metric_is_no_evidence():
    searcher = make()
    searcher.suggest("t0")
    searcher.on_trial_result("t0", {"training_iteration": 1})
    searcher.on_trial_complete("t0", {"training_iteration": 1})
    assert (states(searcher), find_history(searcher)) == (["FAIL"], [])


def test_trap_S11_S12_metric_mode_and_space_are_set_once():
    searcher = make()
    assert not searcher.set_search_properties("acc", "max", {})
    with pytest.raises(ValueError, match="`metric` must be that of TuneConfig, 'loss', or given"):
        SFDASearcher(SCORES, metric="acc").set_search_properties("loss", "max", {})
    for metric, mode in ((["a", "b"], ["min"]), (["a", "b"], "min"), ("a", ["min"])):
        with pytest.raises(ValueError, match="`mode` must be a list with one for each `metric`"):
            SFDASearcher(SCORES, metric=metric, mode=mode)
    with pytest.raises(ValueError, match="`metric and mode` must be given"):
        SFDASearcher(SCORES).suggest("t0")
    assert SFDASearcher(SCORES, metric="acc", mode="min", seed=0).suggest("t0") == {
        "backbone": "a"
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"backbone": tune.grid_search(NAMES)},
            "must not hold a grid_search .* without a search_alg",
        ),
        ({"backbone": "a", "lr": tune.grid_search([1, 2])}, "but 'lr' is one"),
        ({"backbone": tune.uniform(0, 1)}, "`backbone` must be a tune.choice"),
        ({"backbone": tune.choice(["x", "y"])}, "must be for the choices .* has none of"),
        ({"backbone": tune.choice(["b", "c"])}, "points_to_evaluate` must be backbones among"),
        (
            {"x": tune.choice([tune.uniform(0, 1), tune.uniform(2, 3)])},
            "must not nest domains, .* use `spaces`",
        ),
        ({"x": [tune.uniform(0, 1), 3]}, "must not hold domains in lists"),
    ],
)
def test_trap_S14_impossible_spaces_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        make(param_space=space, points_to_evaluate=[{"backbone": "a"}])


def conditional(trial):
    if trial.suggest_categorical("backbone", NAMES) == "a":
        trial.suggest_float("drop_path", 0, 0.3)
    else:
        trial.suggest_float("bn_momentum", 0, 1)
    trial.suggest_float("lr", 0, 1)
    return {"const": 7}


def test_trap_S15_a_function_may_define_the_space_by_run(tmp_path):
    searcher = make(None, {"folder": "here"}, space=conditional)
    other = {"backbone": "f", "lr": 0.5}
    searcher.add_evaluated_point(other, 0.3)  # as soon as the function has shown its choices
    configs = drive(searcher, 30)
    for config in configs:
        own = "drop_path" if config["backbone"] == "a" else "bn_momentum"
        assert config.keys() == {"backbone", "lr", own, "const"}
    assert len({config["backbone"] for config in configs}) > 2
    assert searcher.study.trials[1].params == other
    searcher.save(str(tmp_path / "state"))
    again = SFDASearcher(SCORES, space=conditional, metric="acc", mode="max")
    again.restore(str(tmp_path / "state"))
    assert again.suggest("next") == searcher.suggest("next")
    late = SFDASearcher(SCORES, space=conditional, metric="acc", mode="max")
    assert late.set_search_properties("acc", "max", dict(LR)) is False  # Tune says what to do
    without = make(None, {}, space=lambda trial: {"lr": trial.suggest_float("lr", 0, 1)})
    with pytest.raises(ValueError, match="`space` must suggest 'backbone'"):
        without.suggest("t0")


def test_parameters_of_single_backbones_have_one_kind_of_values():
    spaces = {"a": {"pool": tune.choice(["avg", "max"])}, "b": {"pool": tune.choice(["token"])}}
    with pytest.raises(ValueError, match="`spaces` must give 'pool' the same choices"):
        make(spaces=spaces)


@each_base
def test_trap_S16_the_backbone_may_be_all(base):
    searcher = make(base(), {"backbone": tune.choice(NAMES), "const": 1}, policy="greedy")
    assert drive(searcher, 3)[0] == {"backbone": "a"}


def test_trap_S17_the_base_is_asked_once_for_a_trial():
    searcher = make(spy := Spy(), spaces={"a": {"drop": tune.uniform(0, 1)}})
    first = searcher.suggest("t0")
    first["lr"] = None
    assert searcher.suggest("t0")["lr"] is not None
    assert spy.log == [("begin", 0)]


def test_trap_S18_a_bare_optuna_search_would_crash():
    """The reason for the trap; ours survives the same call."""
    bare = OptunaSearch(LR, metric="acc", mode="max")
    with pytest.raises(KeyError):
        bare.on_trial_complete("unknown", result(0.5))
    make().on_trial_complete("unknown", result(0.5, backbone="a", lr=0.1))


# Wrappers -----------------------------------------------------------------------------------
class HyperOptSearch(Searcher):
    """Any other searcher of Tune."""


@pytest.mark.parametrize("name", ["base_sampler", "base_searcher"])
def test_trap_W01_W02_W03_W07_no_searcher_inside(name):
    assert not hasattr(make(), "searcher")
    for inner, message in (
        (ConcurrencyLimiter(HyperOptSearch(), 2), r"outside: ConcurrencyLimiter\(SFDASearcher"),
        (Repeater(HyperOptSearch(), 2), r"put it outside: Repeater\(SFDASearcher"),
        (HyperOptSearch(), r"is a HyperOptSearch; write SFDASearcher\(scores, base_sampler="),
        (make(), "sampler of Optuna, given as `base_sampler`, but is a SFDASearcher"),
        (BasicVariantGenerator(), "but is a BasicVariantGenerator; write"),
        (OptunaSearch, "but is a OptunaSearch; write .* functions as `space`"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must.*{message}"):
            SFDASearcher(SCORES, **{name: inner})


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: ConcurrencyLimiter(s, 2)])
def test_trap_W01_W03_W04_tune_saves_and_restores_our_state(wrap, tmp_path):
    searcher = make()
    drive(searcher, 3)
    SearchGenerator(wrap(searcher)).save_to_dir(str(tmp_path), "now")
    fresh = SFDASearcher(SCORES)
    SearchGenerator(wrap(fresh)).restore_from_dir(str(tmp_path))
    assert fresh.study.trials == searcher.study.trials
    assert fresh.suggest("t3") == searcher.suggest("t3")


def test_trap_W06_repeated_trials_count_once():
    searcher = SFDASearcher(SCORES, seed=0)
    outer = Repeater(searcher, 2)
    outer.set_search_properties("acc", "max", {"backbone": backbone_space(SCORES), **LR})
    for k in range(4):
        assert outer.suggest(f"t{k}")["__trial_index__"] == k % 2
        outer.on_trial_complete(f"t{k}", result=result(0.5 + k / 10))
    assert [round(t.value, 3) for t in searcher.study.trials] == [0.55, 0.75]


def test_trap_C10_pauses_are_taken():
    searcher = make()
    searcher.suggest("t0")
    limiter = ConcurrencyLimiter(searcher, 2)
    limiter.on_pause("t0")
    limiter.on_unpause("t0")
    assert searcher.set_max_concurrency(3) is False


# Points, saved states, arguments ------------------------------------------------------------
@each_base
def test_points_come_first_and_may_be_partial(base):
    points = [{"backbone": "c", "lr": 0.01, "note": "x"}, {"lr": 0.02}, {"backbone": "b"}]
    searcher = make(base(), points_to_evaluate=points)
    configs = drive(searcher, 4)
    assert [c["backbone"] for c in configs[:3]] == ["c", "a", "b"]
    assert [c["lr"] for c in configs[:2]] == [0.01, 0.02]
    assert [c.get("note") for c in configs] == ["x", None, None, None]
    assert states(searcher) == ["COMPLETE"] * 4


def test_points_may_be_nested():
    space = {"model": {"backbone": tune.choice(NAMES), "drop": tune.uniform(0, 1)}}
    searcher = SFDASearcher(
        SCORES, param_name="model/backbone", metric="acc", mode="max",
        points_to_evaluate=[{"model": {"backbone": "d", "drop": 0.25, "width": 3}}],
    )  # fmt: skip
    searcher.set_search_properties(None, None, space)
    assert searcher.suggest("t0") == {"model": {"backbone": "d", "drop": 0.25, "width": 3}}


def test_what_this_experiment_does_not_search_is_left_out_of_others(caplog):
    searcher = SFDASearcher(SCORES, metric="acc", mode="max", seed=0)
    searcher.add_evaluated_point({"backbone": "c", "lr": 0.5, "folder": "x"}, 0.7)
    searcher.set_search_properties(None, None, {"backbone": backbone_space(SCORES), **LR})
    assert [t.params for t in searcher.study.trials] == [{"backbone": "c"}]
    assert "outside of the space: lr left out" in caplog.text
    assert searcher.calibration().n_trials == 1


@each_base
@pytest.mark.filterwarnings("ignore:Choices for a categorical")
@pytest.mark.parametrize("told", [True, False], ids=["with space", "without"])
def test_trap_T02_a_restored_searcher_goes_on_alike(base, told, tmp_path):
    space = {
        "backbone": backbone_space(SCORES, temperature=1.0), **LR, "n": tune.qrandint(2, 8, 2),
        "m": {"w": tune.choice(["x", ("y", 1)])}, "deep": [3, 4], "const": math.inf,
    }  # fmt: skip
    searcher = make(base(), space)
    drive(searcher, 10)
    searcher.suggest("live")
    searcher.save(str(tmp_path / "state"))
    again = SFDASearcher(SCORES, base_sampler=base(), seed=99)
    if told:
        again.set_search_properties("acc", "max", space)
    again.restore(str(tmp_path / "state"))
    assert again.study.trials == searcher.study.trials
    again.on_trial_complete("live", result(0.5))
    searcher.on_trial_complete("live", result(0.5))
    assert drive(again, 12, 20) == drive(searcher, 12, 20)


def test_draws_do_not_depend_on_the_order_of_completion():
    """Nor on how many trials run at once, while nothing is known of them."""
    one, other = make(), make()
    configs = [[s.suggest(f"t{k}") for k in range(6)] for s in (one, other)]
    assert configs[0] == configs[1]
    for searcher, order in ((one, range(6)), (other, (3, 1, 5, 0, 4, 2))):
        for k in order:
            searcher.on_trial_complete(f"t{k}", result(VALUES[configs[0][k]["backbone"]]))
    assert drive(one, 6, 6) == drive(other, 6, 6)


def test_the_study_may_be_kept_in_a_storage():
    storage = optuna.storages.InMemoryStorage()
    searcher = make(storage=storage, points_to_evaluate=[{"backbone": "d"}])
    drive(searcher, 3)
    assert optuna.load_study(study_name=None, storage=storage).trials == searcher.study.trials
    again = make(storage=storage, points_to_evaluate=[{"backbone": "d"}])
    assert again.calibration().n_trials == 3
    assert drive(again, 1, 3)[0]["backbone"] == "a"  # the point was tried


@pytest.mark.filterwarnings("ignore:PartialFixedSampler is experimental")
def test_a_fixed_parameter_around_the_base():
    base = PartialFixedSampler({"lr": 0.01}, RandomSampler(seed=0))
    assert {config["lr"] for config in drive(make(base), 5)} == {0.01}


def test_min_mode_and_a_searcher_can_be_pickled():
    searcher = make(mode="min", policy="greedy")
    for k in range(6):
        config = searcher.suggest(f"t{k}")
        searcher.on_trial_complete(f"t{k}", result(VALUES[config["backbone"]]))
    table = {row["backbone"]: row["best"] for row in searcher.calibration().table}
    assert table["a"] == -VALUES["a"]
    assert pickle.loads(pickle.dumps(searcher)).suggest("t9") == searcher.suggest("t9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "most"}, "`metric and mode` must be given, .* but is .*'most'"),
        ({"metric": ["a"]}, "`mode` must be a list with one for each `metric`"),
        ({"param_name": "a//b"}, "`param_name` must be a name"),
        ({"space": {"lr": 1}}, "`space` must be a function of a trial"),
        ({"max_failures": 0}, "`max_failures` must be an integer ≥ 1"),
        ({"seed": -1}, "`seed` must be an integer ≥ 0"),
        ({"points_to_evaluate": ["a"]}, "`points_to_evaluate` must be a list of dicts"),
        ({"policy": "thompson"}, "`policy` must be one of calibrated, prior, greedy"),
        ({"survivors": ["typo"]}, r"`survivors` must be choices .* \['typo'\] are not"),
        ({"spaces": {"typo": {}}}, "`spaces and points_to_evaluate` must be backbones among"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
