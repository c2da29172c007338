"""S1–S29 of the design page: the sampler between Optuna and `sfda_tune.selection.policy`."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.pruners import HyperbandPruner, NopPruner, PatientPruner, SuccessiveHalvingPruner
from optuna.samplers import (
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIISampler,
    PartialFixedSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import TrialState
from optuna_lab import NAMES, VALUES, Log, make_trial, objective, pairs, prunable, spy_on
from scipy.stats import binomtest
from sfda_tune_optuna import (
    SFDAPruner,
    SFDASampler,
    SFDAWarning,
    gate,
    load_ranking,
    save_ranking,
    suggest_backbone,
)
from sfda_tune_optuna.history import observe

from sfda_tune.selection import policy as decisions
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking

# Of GP, QMC, BruteForce, …: theirs. S29 sees to it that the default paths raise none.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

RANDOM = {"base_sampler": RandomSampler(seed=0), "seed": 0}


def make_study(sampler=None, **options):
    return optuna.create_study(
        **{"direction": "maximize"} | options, sampler=sampler or SFDASampler(VALUES, seed=0)
    )


@pytest.fixture
def never_left(monkeypatch):
    """No trial is left to the base sampler, so that every backbone is the policy's."""
    monkeypatch.setattr(decisions, "delegate_to_base_sampler", lambda *args, **kwargs: False)


# Which backbone, and for whom the rest is drawn --------------------------------------------------
@pytest.mark.parametrize("multivariate", [True, False])
def test_s1_the_order_of_suggestions_does_not_matter(multivariate, request):
    if not multivariate:  # such a base draws its own share in the order of the suggestions
        request.getfixturevalue("never_left")

    def lr_first(trial):
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        return VALUES[trial.suggest_categorical("backbone", NAMES)] - abs(lr - 1e-3)

    found = []
    for order in (objective, lr_first):
        base = TPESampler(n_startup_trials=3, multivariate=multivariate)
        study = make_study(SFDASampler(VALUES, base_sampler=base, seed=4))
        study.optimize(order, n_trials=25)
        found.append(pairs(study))
    assert found[0] == found[1]
    assert len({name for name, _ in found[0]}) > 1


def test_s2_an_enqueued_backbone_fixes_the_view_of_all_trials():
    log = Log()
    base = spy_on(TPESampler, log, multivariate=True)
    study = make_study(SFDASampler(VALUES, base_sampler=base, seed=0))
    study.add_trials([make_trial(name) for name in "aabbbc"])
    for name in "bcf":
        study.enqueue_trial({"backbone": name})
    study.optimize(objective, n_trials=3)
    assert [t.params["backbone"] for t in study.trials[6:]] == ["b", "c", "f"]
    done = [(number, seen - {6, 7, 8}, space) for number, seen, space in log]
    assert done == [(number, set(range(6)), {"lr"}) for number in (6, 7, 8)]


def test_s3_an_unknown_enqueued_backbone_fails_its_own_trial_only():
    study = make_study()
    study.enqueue_trial({"backbone": "nonsense"})
    with pytest.raises(ValueError, match="nonsense"):
        study.optimize(objective, n_trials=1)
    study.optimize(objective, n_trials=2)
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.sampler.n_in_flight == 0


def test_s4_a_retried_trial_keeps_its_backbone():
    log = Log()
    study = make_study(SFDASampler(VALUES, base_sampler=spy_on(RandomSampler, log), seed=0))
    study.add_trials([make_trial("e"), make_trial("a")])
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params={"backbone": "e"},  # as `RetryHeartbeatStaleTrialCallback` leaves it
            distributions={"backbone": CategoricalDistribution(NAMES)},
            system_attrs={"failed_trial": 0, "retry_history": [0]},
        )
    )
    trial = study.ask()
    trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    assert trial.suggest_categorical("backbone", NAMES) == "e"
    assert log[0][:2] == (2, {0, 1})


def test_s5_the_base_is_not_asked_when_nothing_is_open():
    log = Log()
    study = make_study(SFDASampler(VALUES, base_sampler=spy_on(RandomSampler, log), seed=0))
    study.enqueue_trial({"backbone": "c", "lr": 1e-3})
    study.optimize(objective, n_trials=1)
    study.optimize(lambda trial: len(trial.suggest_categorical("one", ["x"])), n_trials=1)
    assert log == []
    assert study.sampler.n_in_flight == 0


@pytest.mark.parametrize(
    "scores",
    [
        {"a": 1.0},
        {"x": 2.0, "y": 1.0},
        dict.fromkeys(NAMES, 0.5),
        {**VALUES, "a": float("nan"), "b": float("inf")},
        {name: np.float32(-value) for name, value in VALUES.items()},
        {**VALUES, "extra": 5.0},
        {},
        Ranking([Score("a", 0.4), Score("b", error="OSError: no weights")]),
    ],
    ids=["missing", "unknown", "tied", "nan-inf", "float32", "extra", "empty", "ranking"],
)
@pytest.mark.parametrize("policy", decisions.POLICIES)
@pytest.mark.filterwarnings("ignore::sfda_tune_optuna.SFDAWarning")
def test_s6_odd_scores_are_defined(scores, policy):
    study = make_study(SFDASampler(scores, policy=policy, seed=0))
    study.optimize(objective, n_trials=12)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert {t.params["backbone"] for t in study.trials} <= set(NAMES)
    study.sampler.calibration(study)


@pytest.mark.parametrize("choices", [(True, False), (0, 1, 2), (None, "x", 2.5)])
@pytest.mark.filterwarnings("ignore::sfda_tune_optuna.SFDAWarning")
def test_s7_choices_need_not_be_texts(choices):
    scores = {0: 0.1, "1": 0.9, 2: 0.5, "True": 0.3, "x": 1.0}
    study = make_study(SFDASampler(scores, seed=0))
    study.optimize(lambda t: float(t.suggest_categorical("backbone", choices) == choices[0]), 10)
    assert {type(t.params["backbone"]) for t in study.trials} <= {type(c) for c in choices}


@pytest.mark.parametrize("conditional", [True, False])
def test_s8_a_number_of_the_same_name_is_left_to_the_base(conditional):
    study = make_study(SFDASampler({"0.5": 1.0, "a": 2.0}, conditional=conditional, seed=0))
    with pytest.warns(SFDAWarning, match="but 0.5, a are no choices"):
        study.optimize(lambda t: t.suggest_float("backbone", 0, 1) + t.suggest_int("n", 1, 3), 15)
    assert len({t.params["backbone"] for t in study.trials}) == 15


def tree(trial):
    value = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
    name = trial.suggest_categorical("backbone", ["a", "b"])
    value += trial.suggest_float(f"{name}_drop", 0.0, 1.0)
    if name == "b" and trial.suggest_categorical("b_pool", ["avg", "max"]) == "max":
        value += trial.suggest_int("b_max_size", 2, 9)
    return value


@pytest.mark.parametrize("base", [TPESampler, CmaEsSampler, GPSampler])
def test_s9_s10_each_backbone_has_its_own_space(base):
    log = Log()
    options = {"n_startup_trials": 1, "warn_independent_sampling": False}
    if base is TPESampler:
        options = {"n_startup_trials": 1, "multivariate": True}
    study = make_study(SFDASampler(VALUES, base_sampler=spy_on(base, log, **options), seed=0))
    n = 100 if base is not GPSampler else 12  # backbones take turns
    for i in range(n):
        study.enqueue_trial({"backbone": "ab"[i % 2], "b_pool": "avg"})
    study.optimize(tree, n_trials=n)
    spaces = {"a": {"lr", "a_drop"}, "b": {"lr", "b_drop", "b_pool"}}
    if base is CmaEsSampler:  # knows no categories
        spaces["b"] -= {"b_pool"}
    for number, _, space in log[2:]:
        assert space == spaces["ab"[number % 2]]


@pytest.mark.parametrize("base", [RandomSampler, TPESampler, QMCSampler])
def test_s11_a_batch_and_the_seeds_do_not_repeat_each_other(base):
    def first_parameters(seed):
        study = make_study(SFDASampler(VALUES, base_sampler=base(), seed=seed))
        space = {
            "backbone": CategoricalDistribution(NAMES),
            "lr": FloatDistribution(1e-5, 1e-1, log=True),
        }
        return [study.ask(space).params["lr"] for _ in range(6)]

    if base is not QMCSampler:  # its points are the same under every seed
        assert len({*first_parameters(1), *first_parameters(2)}) == 12
    assert len({*first_parameters(1)}) == 6
    assert first_parameters(1) == first_parameters(1)


def test_s12_threads():
    study = make_study(SFDASampler(VALUES, base_sampler=TPESampler(n_startup_trials=5), seed=0))
    study.optimize(objective, n_trials=200, n_jobs=8)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 200
    assert len(set(pairs(study))) == 200
    assert study.sampler.n_in_flight == 0


def test_s13_a_resumed_study_goes_on_as_if_never_stopped(tmp_path):
    def run(name, *stops):
        storage = f"sqlite:///{tmp_path / name}.db"
        for stop in stops:
            sampler = SFDASampler(VALUES, base_sampler=TPESampler(n_startup_trials=4), seed=3)
            study = make_study(sampler, study_name="s", storage=storage, load_if_exists=True)
            study.optimize(objective, n_trials=stop)
        return pairs(study)

    assert run("whole", 24) == run("pieces", 7, 1, 16)


@pytest.mark.parametrize("policy", decisions.POLICIES)
@pytest.mark.parametrize(
    "make_pruner",
    [
        lambda: HyperbandPruner(1, 9),
        HyperbandPruner,
        lambda: PatientPruner(NopPruner(), 1),
        SuccessiveHalvingPruner,
    ],
)
def test_s14_pruners_and_the_restricted_study_of_hyperband(policy, make_pruner):
    def train(trial):
        value = objective(trial)
        for step in range(9):
            trial.report(value * (step + 1) / 9, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    study = make_study(SFDASampler(VALUES, policy=policy, seed=0), pruner=make_pruner())
    study.optimize(train, n_trials=15)
    assert {t.state.name for t in study.trials} <= {"COMPLETE", "PRUNED"}
    assert dict(load_ranking(study)) == VALUES
    assert study.sampler.n_in_flight == 0


def test_two_storages_with_one_name_both_get_their_ranking():
    sampler = SFDASampler(VALUES, seed=0)
    for copied in (sampler, sampler, pickle.loads(pickle.dumps(sampler))):
        study = optuna.create_study(study_name="same", sampler=copied)
        study.optimize(objective, n_trials=1)
        assert dict(load_ranking(study)) == VALUES


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_s16_a_copy_goes_on_with_the_same_trial(copied):
    study = make_study(SFDASampler(VALUES, base_sampler=TPESampler(n_startup_trials=2), seed=5))
    study.sampler = copied(study.sampler)
    study.optimize(objective, n_trials=12)
    expected = []
    for change in (lambda s: s, copied):
        again = make_study(copied(study.sampler))
        again.add_trials(study.trials)
        trial = again.ask()
        trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        again.add_trials([make_trial("f", value=9.0) for _ in range(20)])  # meanwhile
        again.sampler = change(again.sampler)
        trial.suggest_categorical("backbone", NAMES)
        expected.append(trial.params)
    assert expected[0] == expected[1]


@pytest.mark.parametrize(
    ("base", "options"),
    [(RandomSampler, {}), *((base, {"n_startup_trials": 0}) for base in (TPESampler, GPSampler))],
)
def test_s17_trials_without_the_parameter_belong_to_all(base, options):
    log = Log()
    study = make_study(SFDASampler(VALUES, base_sampler=spy_on(base, log, **options), seed=0))
    study.add_trials([make_trial(None, lr=lr) for lr in (1e-2, 1e-3, 1e-4)])
    study.optimize(objective, n_trials=5)
    study.optimize(lambda t: t.suggest_float("lr", 1e-5, 1e-1, log=True), n_trials=3)
    assert all(t.state == TrialState.COMPLETE for t in study.trials)
    assert [number for number, seen, _ in log if seen >= {0, 1, 2}] == list(range(3, 11))


# Several objectives, constraints, failures -------------------------------------------------------
@pytest.mark.parametrize("n", [2, 3])
def test_s18_several_objectives(n, never_left):
    seconds = dict(zip(NAMES, (9, 5, 7, 6, 1, 8), strict=True))

    def two(trial):
        return (objective(trial), seconds[trial.params["backbone"]], 1.0)[:n]

    directions = ["maximize", "minimize", "minimize"][:n]
    study = optuna.create_study(directions=directions, sampler=SFDASampler(VALUES, seed=1))
    study.optimize(two, n_trials=40)
    front = {t.params["backbone"] for t in study.best_trials}
    counts = [t.params["backbone"] for t in study.trials]
    assert {"a", "e"} <= front  # the most accurate, and the fastest
    assert counts.count("e") > counts.count("f")  # which is worse at both


@pytest.mark.parametrize("directions", [["maximize"], ["maximize", "minimize"]])
def test_s18_a_history_of_pruned_trials_alone(directions):
    study = optuna.create_study(directions=directions, sampler=SFDASampler(VALUES, seed=1))

    def prune(trial):
        objective(trial)
        raise optuna.TrialPruned

    study.optimize(prune, n_trials=15)
    assert {t.state for t in study.trials} == {TrialState.PRUNED}


def infeasible_best(set_constraint):
    def run(trial):
        value = objective(trial)
        set_constraint(trial, 1.0 if trial.params["backbone"] == "a" else -1.0)
        return value

    return run


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_s19_an_infeasible_best_backbone_is_left(legacy):
    if legacy:
        base = TPESampler(seed=0, constraints_func=lambda t: t.user_attrs["c"])
        run = infeasible_best(lambda trial, c: trial.set_user_attr("c", (c,)))
    elif hasattr(optuna.Trial, "set_constraint"):
        base = TPESampler(seed=0)
        run = infeasible_best(lambda trial, c: trial.set_constraint("memory", c))
    else:
        pytest.skip("Trial.set_constraint is new in optuna 5")
    study = make_study(SFDASampler(VALUES, base_sampler=base, seed=0))
    study.optimize(run, n_trials=40)
    late = [name for name, _ in pairs(study)][20:]
    assert late.count("a") < late.count("b")


def test_s20_a_backbone_that_always_fails_is_left():
    """TPE takes no notice of failures, and proposes what it knows least: its share is checked."""

    def run(trial):
        value = objective(trial)
        if trial.params["backbone"] == "a":
            raise MemoryError("out of memory")
        return value

    for seed in range(5):
        study = make_study(SFDASampler(VALUES, seed=seed))
        study.optimize(run, n_trials=60, catch=(MemoryError,))
        failed = [number for number, (name, _) in enumerate(pairs(study)) if name == "a"]
        assert 1 <= len(failed) <= 4
        # One failure may be Ctrl-C; after f more it comes back from trial 4^f on, not before.
        assert all(failed[f] >= 4**f for f in range(2, len(failed)))


def test_a_trial_that_failed_after_it_had_reported_says_nothing_of_its_backbone():
    """Ctrl-C, or a learning rate that diverged: not a backbone that does not fit into memory."""

    def run(trial):
        objective(trial)
        if trial.number % 2:
            trial.report(0.5, step=0)
        raise KeyboardInterrupt if trial.number % 2 else MemoryError

    study = make_study(SFDASampler(VALUES, seed=0))
    for _ in range(4):
        with contextlib.suppress(KeyboardInterrupt, MemoryError):
            study.optimize(run, n_trials=1)
    assert [o.state for o in observe(study, study.trials, "backbone")] == ["failed"] * 2


# The mask, the proxy, costs ----------------------------------------------------------------------
@pytest.mark.parametrize("survivors", [2, ("a", "b"), {"b", "a"}])
def test_s21_a_strict_mask_never_leaves(survivors):
    study = make_study(SFDASampler(VALUES, survivors=survivors, exploration=0.0, **RANDOM))
    study.optimize(objective, n_trials=40)
    assert {name for name, _ in pairs(study)[1:]} == {"a", "b"}


def test_s21_exploration_is_how_often_a_trial_steps_outside():
    sampler = SFDASampler(VALUES, survivors=2, exploration=0.2, **RANDOM)
    study = make_study(sampler)
    study.add_trials([make_trial(name, VALUES[name]) for name in NAMES])
    for _ in range(300):
        study.ask().suggest_categorical("backbone", NAMES)
    outside = sum(t.params["backbone"] not in "ab" for t in study.trials[6:])
    assert binomtest(outside, 300, 0.2).pvalue > 1e-3


def test_s21_survivors_must_be_choices():
    study = make_study(SFDASampler(VALUES, survivors=["a", "typo"], seed=0))
    with pytest.raises(ValueError, match=r"`survivors` must be choices .* \['typo'\] are not"):
        study.optimize(objective, n_trials=1)


def test_s22_scores_that_mislead_are_seen_and_said(monkeypatch):
    said = []
    logger = logging.getLogger("optuna.sfda_tune_optuna.sampler")
    monkeypatch.setattr(logger, "warning", said.append)
    study = make_study(SFDASampler({name: -value for name, value in VALUES.items()}, seed=0))
    study.optimize(objective, n_trials=40)
    calibration = study.sampler.calibration(study)
    assert calibration.slope < 0
    assert calibration.kendall_tau < 0
    assert calibration.warning
    assert [text.partition("(")[0] for text in said] == [calibration.warning.partition("(")[0]]


def regret(make_sampler, seeds=range(20)):
    """Mean distance to the best of a fixed table of 16 backbones × 3 learning rates."""
    rng = np.random.default_rng(8)
    accuracy = np.sort(rng.normal(0.7, 0.05, 16))[::-1, None] - [[0.0, 0.02, 0.06]]
    names = [f"n{i:02d}" for i in range(16)]
    lost = []
    for seed in seeds:
        study = make_study(make_sampler(names, accuracy[:, 0], seed))
        study.optimize(
            lambda t: float(
                accuracy[
                    names.index(t.suggest_categorical("backbone", names)),
                    t.suggest_categorical("lr", [0, 1, 2]),
                ]
            ),
            n_trials=20,
        )
        lost.append(accuracy.max() - study.best_value)
    return float(np.mean(lost))


def test_s22_good_scores_beat_tpe_and_bad_ones_are_no_worse():
    def with_proxy(correlation):
        def make(names, truth, seed):
            z = (truth - truth.mean()) / truth.std()
            noise = np.random.default_rng(seed).normal(size=len(z))
            proxy = correlation * z + (1 - correlation**2) ** 0.5 * noise
            return SFDASampler(dict(zip(names, proxy, strict=True)), seed=seed)

        return make

    tpe = regret(lambda names, truth, seed: TPESampler(seed=seed))
    assert regret(with_proxy(0.9)) < 0.5 * tpe
    assert regret(with_proxy(-0.9)) <= tpe  # the benchmark measures what lies between


def test_s23_a_batch_of_asks_is_diverse(never_left):
    study = make_study()
    trials = [study.ask() for _ in range(16)]
    assert len({trial.suggest_categorical("backbone", NAMES) for trial in trials}) >= 3


def test_s24_costs_count_when_asked_to(never_left):
    def share(exponent):
        sampler = SFDASampler(
            dict.fromkeys(NAMES, 1.0),
            costs={name: 100.0 if name in "abc" else 1.0 for name in NAMES},
            cost_exponent=exponent,
            **RANDOM,
        )
        study = make_study(sampler)
        study.optimize(lambda t: 0.5 if t.suggest_categorical("backbone", NAMES) else 0, 60)
        return sum(t.params["backbone"] in "def" for t in study.trials) / 60

    assert share(1.0) > 0.8
    assert 0.3 < share(0.0) < 0.7


# The pruner's non-survivors ----------------------------------------------------------------------
@pytest.mark.parametrize("keep", [5, 1])
def test_the_sampler_proposes_nothing_that_the_pruner_stops(keep):
    """As in README.md: a trial that is stopped for its backbone teaches nothing."""
    best = set(NAMES[:keep])
    for seed in range(4):
        # Scores that mislead: half of the trials are the base sampler's.
        scores = {name: -value if keep == 5 else value for name, value in VALUES.items()}
        pruner = SFDAPruner(best, base_pruner=HyperbandPruner())
        study = make_study(SFDASampler(scores, seed=seed), pruner=pruner)

        study.optimize(prunable, n_trials=40)
        assert [t.number for t in study.trials if t.params["backbone"] not in best] == []


def test_a_pruner_of_another_parameter_is_none_of_ours():
    study = make_study(pruner=SFDAPruner(["f"], param_name="net"))
    study.optimize(objective, n_trials=3)
    assert study.trials[0].params["backbone"] == "a"


@pytest.mark.parametrize("directions", [["maximize"], ["maximize", "minimize"]])
def test_a_backbone_that_a_gate_stops_is_left(directions):
    for seed in range(3):
        study = optuna.create_study(directions=directions, sampler=SFDASampler(VALUES, seed=seed))

        def run(trial):
            value = objective(trial)
            gate(trial, ["d", "e"])
            return value if len(directions) == 1 else (value, 1.0)

        study.optimize(run, n_trials=60)
        gated = [t.number for t in study.trials if t.params["backbone"] not in "de"]
        assert 4 <= len(gated) <= 12  # of each of the four at most three: see S20


# The base sampler --------------------------------------------------------------------------------
def test_s25_hooks_reach_the_base_once():
    calls = []

    class Counting(RandomSampler):
        def before_trial(self, study, trial):
            calls.append(("before", study, trial.number))

        def after_trial(self, study, trial, state, values):
            calls.append(("after", study, trial.number, state, values))

        def reseed_rng(self):
            calls.append(("reseed",))

    study = make_study(SFDASampler(VALUES, base_sampler=Counting(seed=0), seed=0))
    study.optimize(lambda trial: len(trial.suggest_categorical("backbone", NAMES)), n_trials=2)
    study.sampler.reseed_rng()
    done = TrialState.COMPLETE
    assert calls == [
        ("before", study, 0), ("after", study, 0, done, [1.0]),
        ("before", study, 1), ("after", study, 1, done, [1.0]), ("reseed",),
    ]  # fmt: skip


class Annealing(optuna.samplers.BaseSampler):
    """State of its own, as in Optuna's tutorial on user-defined samplers."""

    def __init__(self, seed=0):
        self.rng, self.temperature = np.random.RandomState(seed), 1.0
        self.moves, self.current = 0, None
        self.independent = RandomSampler(seed=seed)

    def infer_relative_search_space(self, study, trial):
        return optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))

    def sample_relative(self, study, trial, search_space):
        done = [t for t in study.get_trials(deepcopy=False) if t.values is not None]
        if not done:
            return {}
        worse = 0 if self.current is None else self.current.value - done[-1].value
        if self.current is None or self.rng.rand() < np.exp(min(0, worse) / self.temperature):
            self.current = done[-1]
        self.temperature, self.moves = 0.9 * self.temperature, self.moves + 1
        near = {
            name: float(np.clip(self.current.params[name] + self.rng.uniform(-2, 2), -10, 10))
            for name in "xy"
        }
        return {"backbone": self.current.params["backbone"], **near}  # more than it is asked for

    def sample_independent(self, *args):
        return self.independent.sample_independent(*args)


def bowl(trial):
    offset = NAMES.index(trial.suggest_categorical("backbone", NAMES))
    return offset + sum(trial.suggest_float(name, -10, 10) ** 2 for name in "xy")


def test_a_base_with_state_keeps_it_and_may_return_too_much():
    bests = []
    for seed in range(4):
        base = Annealing(seed)
        study = optuna.create_study(sampler=SFDASampler(VALUES, base_sampler=base, seed=seed))
        study.optimize(bowl, n_trials=60)
        bests.append(study.best_value)
        assert base.moves == 59
    assert np.median(bests) < 2  # random search: 5


def test_a_base_is_never_copied():
    """A lock cannot be, and 400 MB should not be."""

    class Holder:
        def __init__(self):
            self.lock, self.calls = threading.Lock(), 0

        def constrain(self, trial):
            self.calls += 1
            return (trial.params["lr"] - 0.01,)

    holder = Holder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base = TPESampler(constraints_func=holder.constrain, seed=0)
    study = make_study(SFDASampler(VALUES, base_sampler=base, seed=0))
    study.optimize(objective, n_trials=12)
    assert holder.calls == 12


@pytest.mark.parametrize("fixed", ["a", "f"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_fixed_backbone_is_the_trial_s_on_both_sides(fixed, inside):
    log = Log()
    base = spy_on(TPESampler, log, seed=0)
    if inside:
        base = PartialFixedSampler({"backbone": fixed}, base)
    sampler = SFDASampler(VALUES, base_sampler=base, seed=0)
    study = make_study(sampler if inside else PartialFixedSampler({"backbone": fixed}, sampler))
    study.optimize(objective, n_trials=12)
    assert {name for name, _ in pairs(study)} == {fixed}
    assert [seen for _, seen, _ in log] == [set(range(n)) for n in range(12)]
    assert [space for _, _, space in log[1:]] == [{"lr"}] * 11


@pytest.mark.parametrize(
    "make_base",
    [
        lambda: BruteForceSampler(seed=0),
        lambda: GridSampler({"backbone": NAMES, "n": [1, 2, 3], "m": [0, 1]}, seed=0),
        lambda: GridSampler({"n": [1, 2, 3], "m": [0, 1]}, seed=0),
    ],
    ids=["brute-force", "whole-grid", "grid-without-backbone"],
)
@pytest.mark.parametrize("backbone_first", [True, False])
def test_exhaustive_bases_try_everything_once_best_scores_first(make_base, backbone_first):
    def run(trial):
        if backbone_first:
            value = VALUES[trial.suggest_categorical("backbone", NAMES)]
            return value - trial.suggest_int("n", 1, 3) / 100 - trial.suggest_int("m", 0, 1) / 100
        value = trial.suggest_int("n", 1, 3) / 100
        value = VALUES[trial.suggest_categorical("backbone", NAMES)] - value
        return value - trial.suggest_int("m", 0, 1) / 100

    study = make_study(SFDASampler(VALUES, base_sampler=make_base(), seed=0))
    study.optimize(run, n_trials=60)
    assert len(study.trials) == 36
    assert len({tuple(sorted(t.params.items(), key=str)) for t in study.trials}) == 36
    first = [t.params["backbone"] for t in study.trials]
    assert first[0] == "a"
    assert first[:12].count("f") < first[:12].count("a")


@pytest.mark.parametrize("base", ["brute", "grid", "grid without backbone"])
@pytest.mark.parametrize(
    ("options", "kept", "expected"),
    [
        ({"survivors": 1, "exploration": 0}, None, "a"),
        ({"survivors": 2, "exploration": 0}, None, "ab"),
        ({"survivors": ["d", "b"], "exploration": 0}, None, "bd"),
        ({"survivors": 3, "exploration": 0}, ["b", "c", "e"], "bce"),
        ({}, ["a", "d"], "ad"),
        ({}, None, "abcdef"),
    ],
)
def test_exhaustive_bases_try_what_may_be_tried_once_and_end(base, options, kept, expected):
    make = {
        "brute": lambda: BruteForceSampler(seed=0),
        "grid": lambda: GridSampler({"backbone": NAMES, "n": [1, 2, 3]}, seed=0),
        "grid without backbone": lambda: GridSampler({"n": [1, 2, 3]}, seed=0),
    }
    pruner = None if kept is None else SFDAPruner(kept)
    sampler = SFDASampler(VALUES, base_sampler=make[base](), seed=0, **options)
    study = make_study(sampler, pruner=pruner)

    def run(trial):
        value = VALUES[trial.suggest_categorical("backbone", NAMES)]
        return value - trial.suggest_int("n", 1, 3) / 100

    study.optimize(run, n_trials=40)
    tried = [(t.params["backbone"], t.params["n"]) for t in study.trials]
    assert sorted(tried) == [(name, n) for name in expected for n in (1, 2, 3)]
    study.optimize(run, n_trials=2)  # again: none of the others
    assert {t.params["backbone"] for t in study.trials} == {*expected}


def test_a_step_outside_the_mask_of_a_grid_is_one():
    base = GridSampler({"n": [1, 2, 3, 4, 5, 6]}, seed=0)
    sampler = SFDASampler(VALUES, base_sampler=base, survivors=2, exploration=0.5, seed=0)
    study = make_study(sampler)
    study.optimize(
        lambda t: VALUES[t.suggest_categorical("backbone", NAMES)] + t.suggest_int("n", 1, 6), 60
    )
    tried = [(t.params["backbone"], t.params["n"]) for t in study.trials]
    assert len(tried) == len({*tried}) < 36
    assert {*tried} > {(name, n) for name in "ab" for n in range(1, 7)}


def test_a_grid_leaves_out_backbones_that_failed():
    scores = [Score(name, VALUES[name]) for name in "abcd"]
    ranking = Ranking([*scores, Score("e", error="too large"), Score("f", error="no weights")])
    base = GridSampler({"n": [1, 2, 3]}, seed=0)
    study = make_study(SFDASampler(ranking, base_sampler=base, seed=0))
    study.optimize(lambda t: VALUES[suggest_backbone(t, ranking)] - t.suggest_int("n", 1, 3), 40)
    assert len(study.trials) == 12


def test_brute_force_knows_conditional_spaces():
    study = make_study(SFDASampler({"a": 2.0, "b": 1.0}, base_sampler=BruteForceSampler(), seed=0))

    def run(trial):
        if trial.suggest_categorical("backbone", ["a", "b"]) == "a":
            return trial.suggest_float("drop", 0, 0.3, step=0.1)
        return trial.suggest_int("pool", 1, 5, step=2) + len(trial.suggest_categorical("p", "xy"))

    study.optimize(run, n_trials=40)
    assert len(study.trials) == 4 + 3 * 2


def test_values_are_comparable_between_backbones_in_the_view():
    """Backbone a is .3 better; the same parameters are as good under both."""
    seen = {}

    class Spy(RandomSampler):
        def infer_relative_search_space(self, study, trial):
            return {"lr": FloatDistribution(1e-5, 1e-1, log=True)}

        def sample_relative(self, study, trial, search_space):
            seen.update({t.number: t for t in study.get_trials(deepcopy=False)})
            return {}

    study = make_study(SFDASampler(VALUES, base_sampler=Spy(), seed=0))
    lrs = [1e-4, 1e-3, 1e-2, 3e-4, 3e-3]
    values = [0.6, 0.9, 0.5, 0.8, 0.7]
    study.add_trials([make_trial("a", v, lr) for v, lr in zip(values, lrs, strict=True)])
    study.add_trials([make_trial("b", v - 0.3, lr) for v, lr in zip(values, lrs, strict=True)])
    study.enqueue_trial({"backbone": "a"})
    study.ask().suggest_float("lr", 1e-5, 1e-1, log=True)
    assert [seen[n].value for n in range(5)] == values
    assert [seen[n].value for n in range(5, 10)] == pytest.approx(values, abs=0.06)
    assert {seen[n].params["backbone"] for n in range(10)} == {"a"}
    assert study.trials[7].params["backbone"] == "b"  # the study itself is as it was
    assert study.trials[7].value == pytest.approx(0.2)


def test_a_parameter_of_one_backbone_is_drawn_from_its_trials_alone():
    seen = {}

    class Spy(TPESampler):
        def sample_relative(self, study, trial, search_space):
            done = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
            seen[trial.number] = (set(search_space), {t.number for t in done})
            return super().sample_relative(study, trial, search_space)

    study = make_study(SFDASampler(VALUES, base_sampler=Spy(n_startup_trials=2), seed=0))
    for i in range(12):
        study.enqueue_trial({"backbone": "ab"[i % 2], "b_pool": "avg"})
    study.optimize(tree, n_trials=12)
    assert seen[10] == ({"lr", "a_drop"}, {0, 2, 4, 6, 8})
    assert seen[11][1] == {1, 3, 5, 7, 9}


@pytest.mark.parametrize(
    "make_base",
    [
        lambda: NSGAIISampler(population_size=4, seed=0),
        lambda: GridSampler({"n": [0, 1, 2]}),
        BruteForceSampler,
        lambda: PartialFixedSampler({"m": 1}, GridSampler({"n": [0, 1, 2], "m": range(5)})),
    ],
)
def test_s26_samplers_with_state_in_the_study_see_all_of_it(make_base, monkeypatch):
    base, seen = make_base(), []
    infer = type(base).infer_relative_search_space

    def spy(self, study, trial):
        seen.append(study)
        return infer(self, study, trial)

    monkeypatch.setattr(type(base), "infer_relative_search_space", spy)
    study = make_study(SFDASampler(VALUES, base_sampler=base, seed=0))
    study.optimize(
        lambda t: VALUES[t.suggest_categorical("backbone", NAMES)] + t.suggest_int("n", 0, 2), 15
    )
    assert len(study.trials) >= (15 if isinstance(base, NSGAIISampler) else 3)
    assert set(map(type, seen)) == {optuna.Study}  # and no view of it
    assert all(t.state == TrialState.COMPLETE for t in study.trials)


def test_the_base_draws_its_share_jointly(monkeypatch):
    """A trial that is left to the base sampler: backbone and rest from the whole study."""
    log = Log()
    base = spy_on(TPESampler, log, n_startup_trials=2, multivariate=True)
    study = make_study(SFDASampler(VALUES, base_sampler=base, seed=0))
    study.add_trials([make_trial(name, VALUES[name]) for name in NAMES])
    monkeypatch.setattr(decisions, "delegate_to_base_sampler", lambda number, **_: number == 7)
    study.optimize(objective, n_trials=3)
    assert log[1] == (7, set(range(7)), {"backbone", "lr"})
    assert log[0][2] <= {"lr"}
    assert log[2][2] <= {"lr"}


@pytest.mark.parametrize("policy", decisions.POLICIES)
@pytest.mark.parametrize("survivors", [None, 3])
def test_only_the_unmasked_calibrated_policy_leaves_trials(policy, survivors, monkeypatch):
    monkeypatch.setattr(decisions, "delegate_to_base_sampler", lambda *args, **kwargs: True)
    policy_ = SFDASampler(VALUES, policy=policy, survivors=survivors, seed=0).policy
    assert policy_.delegates([], 0) == (policy == "calibrated" and survivors is None)


def test_every_generator_of_a_custom_sampler_is_keyed():
    class Custom(RandomSampler):
        def __init__(self):
            super().__init__(seed=0)
            self.inner = {"rng": [np.random.default_rng(0), np.random.RandomState(0)]}

        def sample_independent(self, study, trial, name, distribution):
            new, old = self.inner["rng"]
            return float(new.random() + old.random()) / 2

    def run(seed):
        study = make_study(SFDASampler({}, base_sampler=Custom(), seed=seed))
        study.optimize(
            lambda t: len(t.suggest_categorical("backbone", "a")) + t.suggest_float("x", 0, 1), 8
        )
        return [t.params["x"] for t in study.trials]

    assert len(set(run(0))) == 8
    assert run(0) == run(0) != run(1)


# What is kept, said and refused ------------------------------------------------------------------
def test_s27_nothing_of_numpy_gets_out(tmp_path):
    scores = {name: np.float32(value) for name, value in VALUES.items()}
    study = make_study(
        SFDASampler(scores, survivors=np.int64(4), seed=np.int64(3)),
        storage=f"sqlite:///{tmp_path}/s.db",
    )
    study.optimize(objective, n_trials=14)
    calibration = study.sampler.calibration(study)
    everything = [study.user_attrs, study.sampler.settings, vars(calibration)]
    everything += [[t.params, t.user_attrs, t.system_attrs] for t in study.trials]

    def walk(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            return all(map(walk, value))
        return type(value) in (str, int, float, bool, type(None))

    assert walk(everything)
    json.dumps(everything[:2], allow_nan=False)


def test_s28_a_loaded_study_gets_its_sampler_back(tmp_path):
    storage = f"sqlite:///{tmp_path}/s.db"
    sampler = SFDASampler(VALUES, survivors=("a", "b"), exploration=0.1, prior_strength=2, seed=3)
    study = make_study(sampler, study_name="s", storage=storage)
    study.optimize(objective, n_trials=5)
    loaded = optuna.load_study(study_name="s", storage=storage)
    assert isinstance(loaded.sampler, TPESampler)
    loaded.sampler = SFDASampler.from_study(loaded)
    assert loaded.sampler.settings == sampler.settings
    assert SFDASampler.from_study(loaded, seed=9, survivors=None).settings["seed"] == 9
    loaded.optimize(objective, n_trials=5)
    study.optimize(objective, n_trials=0)
    assert len(loaded.trials) == 10


def test_s28_another_base_is_asked_for_and_no_ranking_is_an_error():
    study = make_study(SFDASampler(VALUES, base_sampler=RandomSampler(), seed=0))
    study.optimize(objective, n_trials=1)
    with pytest.warns(SFDAWarning, match=r"Pass `base_sampler=RandomSampler\(\.\.\.\)`"):
        SFDASampler.from_study(study)
    own = make_study(SFDASampler(VALUES, base_sampler=TPESampler(n_startup_trials=2), seed=0))
    own.optimize(objective, n_trials=1)
    with pytest.warns(SFDAWarning, match="options and constraints"):
        SFDASampler.from_study(own)
    with pytest.warns(SFDAWarning, match="RandomSampler"):  # what is saved is still there
        SFDASampler.from_study(study)
    SFDASampler.from_study(study, base_sampler=RandomSampler())
    with pytest.raises(ValueError, match="must hold a ranking but has none"):
        SFDASampler.from_study(optuna.create_study())


def test_settings_join_a_ranking_that_the_user_saved():
    study = make_study(SFDASampler(VALUES, survivors=2, seed=3))
    save_ranking(study, VALUES)
    study.optimize(objective, n_trials=1)
    assert SFDASampler.from_study(study).settings == study.sampler.settings
    study.sampler = SFDASampler(VALUES, survivors=3, seed=3)
    study.optimize(objective, n_trials=1)  # one trial with other settings
    assert SFDASampler.from_study(study).settings["survivors"] == 2


def test_s29_default_paths_warn_of_nothing():
    code = """
import optuna, sfda_tune_optuna as s
optuna.logging.set_verbosity(optuna.logging.ERROR)
scores = {"a": 1.0, "b": 2.0, "c": 3.0}
study = optuna.create_study(sampler=s.SFDASampler(scores), pruner=s.SFDAPruner(
    scores, keep=2, base_pruner=optuna.pruners.HyperbandPruner()))
s.enqueue_top_k(study, scores, 2)
def objective(trial):
    name = s.suggest_backbone(trial, scores)
    trial.report(scores[name], 0)
    if trial.should_prune():
        raise optuna.TrialPruned
    return scores[name] + trial.suggest_float("lr", 0, 1)
study.optimize(objective, n_trials=25, callbacks=[s.CalibrationCallback()])
s.SFDASampler.from_study(study)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_another_ranking_warns_once_and_says_what_differs():
    study = make_study()
    study.optimize(objective, n_trials=2)
    study.sampler = SFDASampler({**VALUES, "b": 0.1, "g": 0.2}, seed=0)
    with pytest.warns(SFDAWarning, match="adds g; scores differently b") as caught:
        study.optimize(objective, n_trials=3)
    assert len(caught) == 1
    assert dict(load_ranking(study)) == VALUES
    save_ranking(study, {**VALUES, "b": 0.1, "g": 0.2})
    study.sampler = SFDASampler({**VALUES, "b": 0.1, "g": 0.2}, seed=0)
    study.optimize(objective, n_trials=1)  # no warning now


def test_names_that_do_not_fit_are_said_once():
    tagged = [f"{name}.in1k" for name in NAMES]
    for name, choices, match in (
        ("model", NAMES, r"`param_name` .* is 'backbone' and they have lr, model"),
        ("backbone", tagged, r"a, b, c, d, e and 1 more are no choices, and a\.in1k, .* no score"),
        ("backbone", ["a", "B"], r"but b, c, d, e, f are no choices, and B have no score"),
    ):
        study = make_study()

        def run(trial, name=name, choices=choices):
            return trial.suggest_float("lr", 0, 1) + len(trial.suggest_categorical(name, choices))

        with pytest.warns(SFDAWarning, match=match) as said:
            study.optimize(run, n_trials=5)
        assert len(said) == 1
    study = make_study()
    study.optimize(lambda t: len(t.suggest_categorical("backbone", NAMES[:2])), 5)  # a shortlist


def test_a_pruner_behind_another_is_still_respected():
    pruner = PatientPruner(SFDAPruner(VALUES, keep=1), 1)
    study = make_study(pruner=pruner)
    study.optimize(objective, n_trials=20)
    assert {name for name, _ in pairs(study)[1:]} == {"a"}


@pytest.mark.parametrize("how", ["interrupt", "error", "nan"])
def test_one_failure_says_nothing_of_the_backbone(how):
    names = [f"b{i:02}" for i in range(30)]
    truth = {name: 0.95 - i / 100 for i, name in enumerate(names)}
    study = make_study(SFDASampler(truth, seed=0))

    def run(trial):
        name = trial.suggest_categorical("backbone", names)
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        if trial.number == 0 and how != "nan":
            raise KeyboardInterrupt if how == "interrupt" else KeyError("image")
        return float("nan") if trial.number == 0 else truth[name] - abs(np.log10(lr) + 3) / 50

    for _ in range(12):
        with contextlib.suppress(KeyboardInterrupt, KeyError):
            study.optimize(run, n_trials=1)
    tried = [t.number for t in study.trials if t.params["backbone"] == "b00"]
    assert tried[1] <= 6


@pytest.mark.parametrize("scale", [1e160, 1e200, -1e307])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_huge_values_do_not_end_the_study(scale, direction):
    study = make_study(direction=direction)
    study.optimize(lambda trial: scale * objective(trial), n_trials=20)
    assert len(study.trials) == 20
    assert math.isfinite(study.sampler.calibration(study).slope)


def test_every_decision_is_one_line_of_the_log(caplog):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    optuna.logging.enable_propagation()
    try:
        study = make_study(pruner=SFDAPruner(VALUES, keep=3))
        study.enqueue_trial({"backbone": "f"})

        study.optimize(prunable, n_trials=20)
    finally:
        optuna.logging.disable_propagation()
    said = [r.getMessage() for r in caplog.records if "sfda_tune" in r.name]
    assert said[0] == "Trial 0: backbone f stopped before training: not among the 3 kept"
    assert "Trial 1: backbone a by score" in said
    left = [text for text in said if text.endswith("left to TPESampler")]
    assert left
    assert len(said) >= 20


def test_one_sampler_may_serve_two_studies():
    sampler = SFDASampler(VALUES, seed=0)
    one, two = make_study(sampler), make_study(sampler)
    trial = one.ask()
    trial.suggest_float("lr", 0, 1)  # remembered, never told
    two.enqueue_trial({"backbone": "f"})
    two.optimize(objective, n_trials=5)
    assert dict(load_ranking(two)) == VALUES
    assert two.trials[0].params["backbone"] == "f"


def test_asked_and_never_told_trials_are_forgotten(monkeypatch):
    monkeypatch.setattr("sfda_tune_optuna.sampler.MAX_IN_FLIGHT", 5)
    study = make_study()
    for _ in range(9):
        study.ask({"backbone": CategoricalDistribution(NAMES), "lr": FloatDistribution(0, 1)})
    assert study.sampler.n_in_flight == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": [1, 2]}, r"`scores` must be a Ranking or a mapping but is \[1, 2\]"),
        ({"scores": {"a": "high"}}, r"`scores\['a'\]` must be a number but is 'high'"),
        (
            {"base_sampler": TPESampler},
            r"`base_sampler` must be a sampler \(not a class\) or None",
        ),
        ({"policy": "thompson"}, "`policy` must be one of calibrated, prior, greedy but is"),
        ({"prior_strength": -1}, "`prior_strength` must be a number ≥ 0 but is -1"),
        ({"exploration": 1.5}, r"`exploration` must be in \[0, 1\] but is 1.5"),
        ({"survivors": "a"}, "`survivors` must be an integer ≥ 1, names or None but is 'a'"),
        ({"survivors": 0}, "`survivors` must be an integer ≥ 1"),
        ({"survivors": []}, "`survivors` must be an integer ≥ 1"),
        ({"seed": -1}, "`seed` must be an integer ≥ 0 but is -1"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SFDASampler(**{"scores": VALUES, **options})


def test_without_a_seed_two_samplers_differ_and_str_is_the_class():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = SFDASampler(VALUES), SFDASampler(VALUES)
    assert one.policy.seed != two.policy.seed
    assert str(one) == "SFDASampler"


# Earlier studies --------------------------------------------------------------------------------
def bump(trial, names=NAMES, sign=1.0):
    """The same optimum of lr for every backbone, on every data set."""
    offset = names.index(trial.suggest_categorical("backbone", names)) / 10
    lr = trial.suggest_float("lr", 1e-6, 1.0, log=True)
    return sign * (-((np.log10(lr) + 3) ** 2) - offset)


def make_earlier(seed, direction="minimize"):
    names = ["x", "y", "z"]  # other backbones, in another unit, on other data
    study = optuna.create_study(direction=direction, sampler=RandomSampler(seed=seed))
    study.optimize(lambda t: 100 * bump(t, names, -1.0) + 7, n_trials=30)
    return study


def tune_bump(previous, seed, n=10, **options):
    study = make_study(SFDASampler(VALUES, previous=previous, seed=seed, **options))
    study.optimize(bump, n_trials=n)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("multivariate", [False, True])
def test_earlier_studies_tell_of_the_parameters(multivariate):
    def distance(previous):
        found = []
        for seed in range(4):
            base = TPESampler(seed=seed, n_startup_trials=20, multivariate=multivariate)
            params = tune_bump(previous, seed, base_sampler=base)[4:]
            found += [abs(np.log10(p["lr"]) + 3) for p in params]
        return np.mean(found)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # multivariate is experimental
        assert distance([make_earlier(seed) for seed in range(2)]) < 0.7 * distance([])


def test_earlier_studies_that_mislead_change_nothing():
    """Nor do they before the third trial, nor those of other parameters."""
    misled = make_earlier(0, direction="maximize")  # what is best here was worst
    alone = tune_bump([], 0, 12)
    assert tune_bump([misled], 0, 12) == alone
    assert tune_bump([make_earlier(0)], 0, 3) == alone[:3]
    other = optuna.create_study(direction="maximize", sampler=RandomSampler(seed=0))
    other.optimize(lambda t: t.suggest_float("x", 0, 1) + len(
        t.suggest_categorical("backbone", ["x", "yy"])), n_trials=9)  # fmt: skip
    assert tune_bump([other], 0, 12) == alone


def test_observations_of_an_earlier_study_are_as_good_as_it():
    earlier = make_earlier(0)
    seen = observe(earlier, earlier.trials, "backbone")
    told = tune_bump([seen], 0, 10)
    assert told == tune_bump([earlier], 0, 10) == tune_bump([list(seen)], 0, 10)
    assert told != tune_bump([], 0, 10)


def test_earlier_studies_must_be_of_use():
    two = optuna.create_study(directions=["maximize", "maximize"])
    for previous, message in (
        ([two], "studies with one objective"),
        (["s"], "a list of studies"),
        ([optuna.create_study()], "studies with complete trials that have 'backbone'"),
    ):
        with pytest.raises(ValueError, match=f"`previous` must be {message}"):
            SFDASampler(VALUES, previous=previous)
    earlier = [make_earlier(0)]
    with pytest.raises(ValueError, match="`base_sampler` must be TPE or random search where"):
        SFDASampler(VALUES, previous=earlier, base_sampler=QMCSampler(seed=0))
    two.sampler = SFDASampler(VALUES, previous=earlier, seed=0)
    with pytest.raises(ValueError, match="left out with several objectives"):
        two.optimize(lambda trial: (bump(trial), 1.0), n_trials=1)
