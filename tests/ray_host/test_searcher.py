"""The searcher, called as Tune calls it, with Ray's own searchers inside and outside."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import pickle

import numpy as np
import optuna
import pytest
from hyperopt import hp
from ray import tune
from ray.tune.search import (
    BasicVariantGenerator,
    ConcurrencyLimiter,
    Repeater,
    Searcher,
    SearchGenerator,
)
from ray.tune.search.hyperopt import HyperOptSearch
from ray.tune.search.optuna import OptunaSearch
from sfda_tune_optuna import SFDASampler
from sfda_tune_ray import SFDASearcher, backbone_space
from sfda_tune_ray.searcher import WHOLE
from tune_lab import NAMES, SCORES, VALUES, find_study

from sfda_tune.selection import policy
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking

optuna.logging.set_verbosity(optuna.logging.ERROR)
LR = {"lr": tune.loguniform(1e-5, 1e-1)}
BASES = {
    "random": lambda: None,
    "optuna": lambda: OptunaSearch(seed=0),
    "hyperopt": lambda: HyperOptSearch(random_state_seed=0, n_initial_points=3),
}
each_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


class Spy(Searcher):
    """A searcher that notes what it is told."""

    def __init__(self):
        super().__init__()
        self.log, self.answer = [], {"lr": 0.1}

    def set_search_properties(self, metric, mode, config, **spec):
        self.config = config
        return True

    def suggest(self, trial_id):
        self.log.append(("suggest", trial_id))
        return self.answer

    def on_trial_result(self, trial_id, result):
        self.log.append(("result", trial_id, result["training_iteration"]))

    def on_trial_complete(self, trial_id, result=None, error=False):
        self.log.append(("complete", trial_id, result and result["acc"], error))

    def save(self, checkpoint_path):
        raise NotImplementedError


def make(base=None, space=None, scores=SCORES, mode="max", **options):
    options = {"seed": 0, **options}
    searcher = SFDASearcher(scores, base_searcher=base, **options)
    if space is None:
        space = {"backbone": backbone_space(SCORES), **LR}
    assert searcher.set_search_properties("acc", mode, space)
    return searcher


def spied(**options):
    """Return a searcher, and the log of the copy of the spy that the first trial asks."""
    searcher = make(Spy(), **options)
    searcher.suggest("t0")
    return searcher, searcher.base_searchers[searcher.records["t0"].key].log


def saved(searcher, folder):
    searcher.save(str(folder / "state"))
    return json.loads((folder / "state").read_text())


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


# The same choices as in Optuna --------------------------------------------------------------
class Refusing(optuna.samplers.RandomSampler):
    """A base sampler that gives no backbone."""

    def sample_independent(self, study, trial, name, distribution):
        raise LookupError(f"{name} is left to the base sampler")


def make_histories(seed):
    """Feed one random history of finished trials to both hosts."""
    rng = np.random.default_rng(seed)
    options = {"seed": seed, "prior_strength": float(rng.choice([0.5, 1.0, 2.0]))}
    options["policy"] = str(rng.choice(policy.POLICIES))
    options["survivors"] = [None, None, 3, ["b", "d"]][int(rng.integers(4))]
    sampler, searcher = SFDASampler(SCORES, base_sampler=Refusing(), **options), make(**options)
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


@pytest.mark.parametrize("seed", range(40))
def test_the_same_history_leads_to_the_same_choice_as_in_optuna(seed):
    study, searcher = make_histories(seed)
    try:
        theirs = study.ask().suggest_categorical("backbone", NAMES)
    except LookupError:
        theirs = None
    searcher.suggest("next")
    record = searcher.records["next"]
    assert (None if record.key == WHOLE else record.backbone) == theirs
    ours = searcher.calibration()
    assert math.isclose(ours.slope, study.sampler.calibration(study).slope)


@pytest.mark.parametrize("chosen", ["prior", "greedy"])
def test_closed_loops_are_the_same_as_in_optuna(chosen):
    study = optuna.create_study(
        direction="maximize", sampler=SFDASampler(SCORES, policy=chosen, seed=3)
    )
    study.optimize(lambda trial: VALUES[trial.suggest_categorical("backbone", NAMES)], 25)
    searcher = make(space={"backbone": tune.choice(NAMES)}, policy=chosen, seed=3)
    ours = [config["backbone"] for config in drive(searcher, 25)]
    assert ours == [trial.params["backbone"] for trial in study.trials]


def test_standard_errors_of_a_ranking_are_used():
    details = {"standard_error": 0.5}
    ranking = Ranking([Score(name, value, details=details) for name, value in SCORES.items()])
    assert make(scores=ranking).policy.errors == dict.fromkeys(NAMES, 0.5)


# The base searcher --------------------------------------------------------------------------
@each_base
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("outside", [None, ConcurrencyLimiter, Repeater])
def test_any_base_any_nesting_any_wrapper(base, nested, outside):
    space = {"backbone": backbone_space(SCORES), "const": 7}
    options = {"spaces": {"b": {"drop": tune.uniform(0, 0.3)}}}
    if nested:
        space, options = {"model": space}, {**options, "param_name": "model/backbone"}
    searcher = SFDASearcher(SCORES, base_searcher=base(), seed=0, **options)
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
    assert WHOLE in searcher.base_searchers  # trial 8 was the base's own


def test_the_base_chooses_its_share_and_learns_from_the_others():
    searcher = make(OptunaSearch(seed=0))
    drive(searcher, 20)
    whole = find_study(searcher.base_searchers[WHOLE]).trials
    assert len(whole) == 20  # its own two, and all others as added points
    assert {len(trial.params) for trial in whole} == {2}
    copies = sum(
        len(find_study(b).trials) for k, b in searcher.base_searchers.items() if k != WHOLE
    )
    opened = sum(r.backbone in searcher.base_searchers for r in searcher.records.values())
    assert copies == opened
    assert sum(r.key == WHOLE for r in searcher.records.values()) == 2


@each_base
def test_several_objectives(base, tmp_path):
    aims = {"metric": ["acc", "cost"], "mode": ["max", "min"]}
    costs = {name: 10.0**k for k, name in enumerate(reversed(NAMES))}  # the better, the dearer
    inner = OptunaSearch(seed=0) if base is BASES["optuna"] else base()
    if base is BASES["hyperopt"]:
        inner = None  # it knows one objective
    searcher = SFDASearcher(SCORES, base_searcher=inner, seed=0, **aims)
    assert searcher.set_search_properties(None, None, {"backbone": backbone_space(SCORES), **LR})
    chosen = []
    for k in range(24):
        config = searcher.suggest(f"t{k}")
        told = {"acc": VALUES[config["backbone"]], "cost": costs[config["backbone"]]}
        searcher.on_trial_result(f"t{k}", told | {"training_iteration": 1})
        searcher.on_trial_complete(f"t{k}", told | {"training_iteration": 1})
        chosen.append(config["backbone"])
    assert len(set(chosen)) == len(NAMES)  # all are of the front
    searcher.on_trial_complete("unknown", {"acc": 1.0})  # half an answer is none
    assert searcher.calibration().n_trials == 24
    if isinstance(inner, OptunaSearch):
        studies = {key: find_study(own) for key, own in searcher.base_searchers.items()}
        assert sum(len(s.trials) for key, s in studies.items() if key != WHOLE) >= 20
        assert len(studies[WHOLE].best_trials) > 1
    searcher.save(str(tmp_path / "state"))
    again = SFDASearcher(SCORES, base_searcher=copy.deepcopy(inner), seed=9, **aims)
    again.restore(str(tmp_path / "state"))
    assert again.records == searcher.records
    assert again.suggest("next") == searcher.suggest("next")
    # Another experiment is learnt from, too.
    other = SFDASearcher(SCORES, seed=0, **aims)
    other.add_evaluated_point({"backbone": "a", "lr": 0.1}, [0.5, 3.0])
    other.add_evaluated_point({"backbone": "b", "lr": 0.1}, (), error=True)
    assert [r.values for r in other.records.values()] == [(0.5, -3.0), ()]
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


def test_backbones_start_alike_and_one_base_may_serve_all():
    searcher = make(points_to_evaluate=[{"backbone": name} for name in "abc"], conditional=True)
    first = [searcher.suggest(f"t{k}") for k in range(3)]
    assert [config["backbone"] for config in first] == ["a", "b", "c"]
    assert len({config["lr"] for config in first}) == 1
    shared = make(OptunaSearch(seed=0), conditional=False)
    drive(shared, 8)
    assert list(shared.base_searchers) == [""]


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


@pytest.mark.parametrize("answer", [None, Searcher.FINISHED])
def test_trap_S02_the_bases_answer_is_passed_on_and_nothing_changes(answer, tmp_path):
    spy = Spy()
    spy.answer = answer
    searcher = make(spy, points_to_evaluate=[{"backbone": "c"}])
    assert searcher.suggest("t0") == answer
    state = saved(searcher, tmp_path)
    assert (state["number"], state["points"], state["records"]) == (0, 0, {})


def test_trap_S02_S03_all_failed_is_finished_and_never_an_error():
    searcher = make(max_failures=2, survivors=2)
    for k in range(100):
        if searcher.suggest(f"t{k}") == Searcher.FINISHED:
            break
        searcher.on_trial_complete(f"t{k}", error=True)
    assert k == 12  # the next best stands in for a failed survivor
    assert SearchGenerator(searcher).searcher.suggest("u") == Searcher.FINISHED
    named = make(max_failures=1, survivors=["b"])
    named.suggest("t0")
    named.on_trial_complete("t0", error=True)
    assert named.suggest("t1") == Searcher.FINISHED


@pytest.mark.parametrize("param", ["backbone", "m/backbone"])
def test_trap_S04_S18_unknown_trials_are_known_by_their_config(param):
    searcher = SFDASearcher(SCORES, param_name=param, base_searcher=Spy(), seed=0)
    searcher.set_search_properties("acc", "max", dict(LR))
    searcher.on_trial_result("new", result(0.6, 1, **{param: "c", "lr": 0.1}))
    searcher.on_trial_complete("new", result(0.7, 2, **{param: "c", "lr": 0.1}))
    (record,) = searcher.records.values()
    assert (record.backbone, record.value, record.params) == ("c", 0.7, {"lr": 0.1})
    assert searcher.base_searchers == {}


def test_a_nested_parameter_that_is_not_named_is_found():
    """Else it would be drawn at random, and the trial be told of another one."""
    with pytest.raises(ValueError, match=r"`param_name` must .* has the backbones: 'model/net'"):
        make(space={"model": {"net": backbone_space(SCORES)}, **LR})
    assert make(space=LR).suggest("t0")["backbone"] == "a"  # not among the parameters at all


def test_trap_S05_an_unknown_error_is_counted_and_may_be_explained(tmp_path):
    searcher = make(max_failures=1)
    searcher.on_trial_complete("new", error=True)
    assert saved(searcher, tmp_path)["unattributed"] == 1
    searcher.explain_error("new", "a", lost=False)
    assert "a" not in searcher.find_candidates()


def test_trap_S06_nothing_depends_on_intermediate_results():
    searcher, log = spied()
    searcher.on_trial_complete("t0")  # stopped while it was pending
    assert searcher.records["t0"].state == "lost"
    assert log[-1] == ("complete", "t0", None, False)
    assert searcher.calibration().n_trials == 0
    searcher.suggest("t1")
    searcher.on_trial_result("t1", result(0.4))
    searcher.on_trial_complete("t1")  # stopped while it was paused: its last report counts
    assert searcher.calibration().n_trials == 1


def test_trap_S07_early_stopped_trials_are_lower_bounds():
    searcher = make()
    for k, iterations in enumerate((4, 1)):
        searcher.suggest(f"t{k}")
        searcher.on_trial_complete(f"t{k}", result(0.5, iterations))
    history = policy_history(searcher)
    assert [(o.state, o.step) for o in history] == [("complete", None), ("pruned", 0.25)]


def policy_history(searcher):
    from sfda_tune_ray.history import observe

    return observe(searcher.records.values())


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_trap_S08_diverged_trials(value, mode):
    searcher, log = spied(mode=mode)
    searcher.on_trial_complete("t0", result(value, 3))
    assert log[-1] == ("complete", "t0", None, True)
    searcher.suggest("t1")
    searcher.on_trial_complete("t1", result(0.5, 3))
    assert all(o.value is None or math.isfinite(o.value) for o in policy_history(searcher))
    assert math.isfinite(searcher.calibration().slope)
    assert "a" in searcher.find_candidates()
    with_optuna = make(OptunaSearch(seed=0))
    with_optuna.suggest("t0")
    with_optuna.on_trial_complete("t0", result(value))
    (trial,) = find_study(with_optuna.base_searchers["a"]).trials
    assert trial.state == optuna.trial.TrialState.FAIL


def test_trap_S09_S19_every_report_counts_once():
    searcher, log = spied(max_failures=1)
    for iteration in (1, 2, 1, 2, 3):  # restarted after 2
        searcher.on_trial_result("t0", result(0.1 * iteration, iteration))
    assert [entry[2] for entry in log if entry[0] == "result"] == [1, 2, 3]
    for value in (0.5, 0.6, math.nan):
        searcher.on_trial_complete("t0", result(value, 4))
    searcher.on_trial_complete("t0", error=True)
    assert searcher.records["t0"].value == 0.6  # the last finite one
    assert sum(entry[0] == "complete" for entry in log) == 1
    searcher.suggest("t1")
    for _ in range(2):
        searcher.on_trial_complete("t1", error=True)
    assert sum(r.state == "failed" for r in searcher.records.values()) == 1
    searcher.on_trial_complete("t1", result(0.7, 4))
    assert searcher.records["t1"].state == "complete"


def test_failing_after_reports_is_the_fault_of_a_parameter():
    searcher = make(max_failures=1, survivors=["a"])
    searcher.suggest("t0")
    searcher.on_trial_result("t0", result(0.5))
    searcher.on_trial_complete("t0", error=True)
    assert policy_history(searcher) == []
    searcher.suggest("t1")
    searcher.on_trial_complete("t1", error=True)
    assert "a" in searcher.find_candidates()  # it did run once


def test_trap_S10_a_report_without_the_metric_is_no_evidence():
    searcher, log = spied()
    searcher.on_trial_result("t0", {"training_iteration": 1})
    searcher.on_trial_complete("t0", {"training_iteration": 1})
    assert searcher.records["t0"].state == "lost"
    assert [entry[0] for entry in log] == ["suggest", "complete"]


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
    ],
)
def test_trap_S14_impossible_spaces_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        make(space=space, points_to_evaluate=[{"backbone": "a"}])


@pytest.mark.filterwarnings("ignore:Choices for a categorical")
def test_trap_S14_no_domain_leaves():
    space = {"backbone": "a", "x": tune.choice([tune.uniform(0, 1), tune.uniform(2, 3)])}
    with pytest.raises(ValueError, match="must not nest domains"):
        make(OptunaSearch(seed=0), space).suggest("t0")
    for base in (None, HyperOptSearch(random_state_seed=0)):
        assert isinstance(make(base, space).suggest("t0")["x"], float)


def test_trap_S15_a_base_with_a_space_of_its_own_stays_active():
    def define(trial):
        trial.suggest_float("lr", 1e-5, 1e-1, log=True)

    own = {"lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)}
    for space in (define, own):
        base = OptunaSearch(space, metric="acc", mode="max", seed=0)
        configs = drive(make(base, {"backbone": backbone_space(SCORES)}), 10)
        assert all(1e-5 <= config["lr"] <= 1e-1 for config in configs)
    late = SFDASearcher(SCORES, base_searcher=OptunaSearch(own, metric="acc", mode="max"))
    assert late.set_search_properties("acc", "max", dict(LR)) is False  # Tune says what to do


def conditional(trial):
    if trial.suggest_categorical("backbone", NAMES) == "a":
        trial.suggest_float("drop_path", 0, 0.3)
    else:
        trial.suggest_float("bn_momentum", 0, 1)
    trial.suggest_float("lr", 0, 1)


def test_a_base_with_a_conditional_space_is_held_to_the_backbone():
    for options in ({}, {"conditional": False}):
        base = OptunaSearch(conditional, metric="acc", mode="max", seed=0)
        searcher = make(base, {"backbone": backbone_space(SCORES)}, **options)
        configs = drive(searcher, 30)
        for config in configs:
            own = "drop_path" if config["backbone"] == "a" else "bn_momentum"
            assert config.keys() == {"backbone", "lr", own}
        assert len({config["backbone"] for config in configs}) > 2


def test_a_base_that_cannot_be_held_to_a_backbone_is_refused():
    space = {
        "lr": hp.uniform("lr", 0, 1),
        "model": hp.choice("model", [{"backbone": name} for name in NAMES]),
    }
    base = HyperOptSearch(space, metric="acc", mode="max", random_state_seed=0)
    searcher = SFDASearcher(
        SCORES, base_searcher=base, param_name="model/backbone", metric="acc", mode="max", seed=0
    )
    with pytest.raises(
        ValueError, match=r"HyperOptSearch cannot be held to '.'; use OptunaSearch"
    ):
        [searcher.suggest(f"t{i}") for i in range(3)]


@each_base
def test_trap_S16_without_other_domains_the_base_is_left_alone(base):
    searcher = make(base(), {"backbone": tune.choice(NAMES), "const": 1}, policy="greedy")
    assert drive(searcher, 3)[0] == {"backbone": "a"}
    assert searcher.base_searchers == {}


def test_trap_S17_the_base_is_asked_once_for_a_trial():
    searcher, log = spied()
    assert searcher.suggest("t0") == searcher.suggest("t0")
    assert log == [("suggest", "t0")]


def test_trap_S18_a_bare_optuna_search_would_crash():
    """The reason for the trap; ours survives the same call."""
    bare = OptunaSearch(LR, metric="acc", mode="max")
    with pytest.raises(KeyError):
        bare.on_trial_complete("unknown", result(0.5))
    make(OptunaSearch(seed=0)).on_trial_complete("unknown", result(0.5, backbone="a", lr=0.1))


@pytest.mark.parametrize("name", ["AxSearch", "BayesOptSearch"])
def test_trap_S21_outdated_searchers_are_named(name, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "3.4.0")
    with pytest.raises(ValueError, match=f"{name} fails with .* 3.4.0; install"):
        SFDASearcher(SCORES, base_searcher=type(name, (Spy,), {})())


# Wrappers -----------------------------------------------------------------------------------
def test_trap_W01_W02_W03_W07_no_wrapper_inside():
    assert not hasattr(make(), "searcher")
    for inner, message in (
        (ConcurrencyLimiter(Spy(), 2), r"put it outside: ConcurrencyLimiter\(SFDASearcher"),
        (Repeater(Spy(), 2), r"put it outside: Repeater\(SFDASearcher"),
        (make(), "another class than SFDASearcher"),
        (BasicVariantGenerator(), "for random search, .* leave it out"),
        (OptunaSearch, "a Searcher of Ray Tune"),
    ):
        with pytest.raises(ValueError, match=message):
            SFDASearcher(SCORES, base_searcher=inner)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: ConcurrencyLimiter(s, 2)])
def test_trap_W01_W03_W04_tune_saves_and_restores_our_state(wrap, tmp_path):
    searcher = make(OptunaSearch(seed=0))
    drive(searcher, 3)
    SearchGenerator(wrap(searcher)).save_to_dir(str(tmp_path), "now")
    fresh = SFDASearcher(SCORES, base_searcher=OptunaSearch(seed=0))
    SearchGenerator(wrap(fresh)).restore_from_dir(str(tmp_path))
    assert fresh.records == searcher.records
    assert fresh.suggest("t3") == searcher.suggest("t3")


def test_trap_W06_repeated_trials_count_once(tmp_path):
    searcher = SFDASearcher(SCORES, seed=0)
    outer = Repeater(searcher, 2)
    outer.set_search_properties("acc", "max", {"backbone": backbone_space(SCORES), **LR})
    for k in range(4):
        assert outer.suggest(f"t{k}")["__trial_index__"] == k % 2
        outer.on_trial_complete(f"t{k}", result=result(0.5 + k / 10))
    assert [round(r.value, 3) for r in searcher.records.values()] == [0.55, 0.75]
    assert saved(searcher, tmp_path)["number"] == 2


def test_trap_C10_pauses_are_handed_through():
    class Pauses(Spy):
        def on_pause(self, trial_id):
            self.log.append(("pause", trial_id))

    searcher = make(Pauses())
    searcher.suggest("t0")
    limiter = ConcurrencyLimiter(searcher, 2)
    limiter.on_pause("t0")
    limiter.on_unpause("t0")  # which it does not have
    assert searcher.base_searchers["a"].log[-1] == ("pause", "t0")
    assert searcher.set_max_concurrency(3) is False


# Points, saved states, arguments ------------------------------------------------------------
@each_base
def test_points_come_first_and_may_be_partial(base):
    points = [{"backbone": "c", "lr": 0.01}, {"lr": 0.02}, {"backbone": "b"}]
    searcher = make(base(), points_to_evaluate=points)
    configs = drive(searcher, 4)
    assert [c["backbone"] for c in configs[:3]] == ["c", "a", "b"]
    assert [c["lr"] for c in configs[:2]] == [0.01, 0.02]
    if isinstance(base(), OptunaSearch):  # it learns what really ran, not what it proposed
        trials = find_study(searcher.base_searchers["c"]).trials
        assert [(t.state.name, t.params["lr"] == 0.01) for t in trials] == [
            ("FAIL", False), ("COMPLETE", True),
        ]  # fmt: skip


@each_base
@pytest.mark.filterwarnings("ignore:Choices for a categorical")
@pytest.mark.parametrize("told", [True, False], ids=["with space", "without"])
def test_trap_T02_a_restored_searcher_goes_on_alike(base, told, tmp_path):
    space = {
        "backbone": backbone_space(SCORES, temperature=1.0), **LR, "n": tune.qrandint(2, 8, 2),
        "m": {"w": tune.choice(["x", ("y", 1)])}, "deep": [3, 4], "const": math.inf,
    }  # fmt: skip
    searcher = make(base(), space, max_failures=5)
    drive(searcher, 10)
    searcher.suggest("live")
    assert saved(searcher, tmp_path)["number"] == 11
    again = SFDASearcher(SCORES, base_searcher=base(), seed=99)
    if told:
        again.set_search_properties("acc", "max", space)
    again.restore(str(tmp_path / "state"))
    assert again.records == searcher.records
    again.on_trial_complete("live", result(0.5))
    searcher.on_trial_complete("live", result(0.5))
    assert drive(again, 12, 20) == drive(searcher, 12, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_base_that_cannot_be_saved_is_made_anew(tmp_path):
    searcher, _ = spied()
    searcher.save(str(tmp_path / "state"))
    again = make(Spy())
    again.restore(str(tmp_path / "state"))
    again.on_trial_result("t0", result(0.5))
    again.on_trial_complete("t0", result(0.5))
    assert again.calibration().n_trials == 1
    assert again.base_searchers == {}


def test_states_of_others_are_refused(tmp_path):
    path = tmp_path / "state"
    make().save(str(path))
    with pytest.raises(ValueError, match="`base_searcher` must be a RandomSearcher, as when"):
        make(OptunaSearch()).restore(str(path))
    path.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="`checkpoint_path` must be a file of the format"):
        make().restore(str(path))


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
