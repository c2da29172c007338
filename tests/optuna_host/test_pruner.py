"""P1–P14 of the design page: the pruner that stops non-survivors before their first epoch."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys

import numpy as np
import optuna
import pytest
from optuna.pruners import (
    HyperbandPruner,
    MedianPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState
from optuna_lab import NAMES, VALUES, Log, make_trial, objective, spy_on
from sfda_tune_optuna import SFDAPruner, SFDASampler, SFDAWarning, gate

from sfda_tune.selection import policy as decisions
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SURVIVORS = ["a", "b", "c"]
BASES = {
    "median": lambda: MedianPruner(n_startup_trials=2),
    "percentile": lambda: PercentilePruner(40.0, n_startup_trials=2),
    "halving": lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    "hyperband": lambda: HyperbandPruner(1, 9, 3),
    "hyperband-auto": HyperbandPruner,
    "patient": lambda: PatientPruner(MedianPruner(n_startup_trials=2), 1),
    "threshold": lambda: ThresholdPruner(lower=0.35),
    "wilcoxon": lambda: WilcoxonPruner(p_threshold=0.3, n_startup_steps=1),
}


def make_study(pruner, sampler=None, **options):
    return optuna.create_study(
        **{"direction": "maximize"} | options, pruner=pruner, sampler=sampler or RandomSampler(0)
    )


def ask(study, name):
    study.enqueue_trial({"backbone": name})
    trial = study.ask()
    trial.suggest_categorical("backbone", NAMES)
    return trial


def train(trial, name, rng, steps=9):
    """Report a noisy learning curve; return at which step it was pruned, None if never."""
    for step in range(steps):
        value = VALUES[name] * (1 - math.exp(-(step + 1) / 3)) + 0.1 * rng.normal()
        trial.report(value, step)
        if trial.should_prune():
            trial.study.tell(trial, state=TrialState.PRUNED)
            return step
    trial.study.tell(trial, value)
    return None


class Refusing(optuna.pruners.BasePruner):
    def prune(self, study, trial):
        raise AssertionError("the base pruner was asked")


def test_p1_gated_before_any_report():
    study = make_study(SFDAPruner(SURVIVORS))
    assert ask(study, "f").should_prune()
    assert not ask(study, "a").should_prune()


def test_p2_gated_after_a_report():
    trial = ask(make_study(SFDAPruner(SURVIVORS)), "f")
    trial.report(0.99, 0)
    assert trial.should_prune()


def test_p3_the_base_is_never_asked_about_gated_trials():
    study = make_study(SFDAPruner(SURVIVORS, base_pruner=Refusing()))
    assert ask(study, "f").should_prune()
    with pytest.raises(AssertionError, match="was asked"):
        ask(study, "a").should_prune()


@pytest.mark.parametrize("base", BASES)
def test_p4_p5_decisions_on_survivors_do_not_change(base):
    """Hyperband's brackets go by number, so there a failed trial takes each gated one's place."""
    n_pruned = 0
    for seed in range(20):
        names = np.random.default_rng(seed).choice(NAMES, 30)
        decisions = []
        for with_gated in (True, False):
            pruner = BASES[base]()
            study = make_study(
                SFDAPruner(SURVIVORS, base_pruner=pruner) if with_gated else pruner,
                study_name="s",
            )
            stops = []
            for i, name in enumerate(names):
                if name in SURVIVORS:
                    stops.append(train(ask(study, name), name, np.random.default_rng([seed, i])))
                elif with_gated:
                    trial = ask(study, name)
                    assert trial.should_prune()
                    study.tell(trial, state=TrialState.PRUNED)
                    done = study.trials[trial.number]
                    assert (done.value, done.intermediate_values) == (None, {})
                    assert not [key for key in done.system_attrs if "rung" in key]
                elif base.startswith("hyperband"):
                    study.tell(study.ask(), state=TrialState.FAIL)
            decisions.append(stops)
        assert decisions[0] == decisions[1]
        n_pruned += sum(stop is not None for stop in decisions[0])
    assert n_pruned > 10


def test_p5_gated_after_a_report_it_still_enters_no_rung():
    base = SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    study = make_study(SFDAPruner(SURVIVORS, base_pruner=base))
    for name in "fa":
        trial = ask(study, name)
        trial.report(0.5, 1)
        trial.should_prune()
    entered = [any("rung" in key for key in trial.system_attrs) for trial in study.trials]
    assert entered == [False, True]


def test_p6_no_base_prunes_no_survivor():
    study = make_study(SFDAPruner(VALUES, keep=3))
    assert study.pruner.survivors == set(SURVIVORS)
    for name in NAMES:
        stop = train(ask(study, name), name, np.random.default_rng(0))
        assert stop == (None if name in SURVIVORS else 0)


def test_p7_without_the_parameter_the_base_decides():
    study = make_study(SFDAPruner(SURVIVORS, base_pruner=ThresholdPruner(lower=0.0)))
    trial = study.ask()
    trial.report(-1.0, 0)
    assert trial.should_prune()
    trial = study.ask()
    trial.report(1.0, 0)
    assert not trial.should_prune()


def test_p8_pickle():
    pruner = pickle.loads(pickle.dumps(SFDAPruner(VALUES, keep=2, base_pruner=HyperbandPruner())))
    assert pruner.survivors == {"a", "b"}
    assert ask(make_study(pruner), "f").should_prune()


def test_p9_fixed_and_frozen_trials_are_never_gated():
    fixed = optuna.trial.FixedTrial({"backbone": "f"})
    fixed.suggest_categorical("backbone", NAMES)
    assert not fixed.should_prune()
    assert not make_trial("f").should_prune()
    for trial in (fixed, make_trial("f")):
        with pytest.raises(optuna.TrialPruned):
            gate(trial, SURVIVORS)  # asked for in so many words
        assert trial.user_attrs == {}


def test_p10_several_objectives_need_gate():
    study = make_study(SFDAPruner(SURVIVORS), direction=None, directions=["maximize"] * 2)
    with pytest.raises(NotImplementedError):
        ask(study, "f").should_prune()
    log = Log()
    study.sampler = SFDASampler(VALUES, base_sampler=spy_on(RandomSampler, log), seed=0)

    def run(trial):
        gate(trial, VALUES, keep=3)  # the backbone is not known yet: no objection
        value = objective(trial)
        gate(trial, VALUES, keep=3)
        return value, 1.0

    for name in "fad":
        study.enqueue_trial({"backbone": name})
    study.optimize(run, n_trials=3)
    assert [t.state.name for t in study.trials[1:]] == ["PRUNED", "COMPLETE", "PRUNED"]
    assert study.trials[1].user_attrs == {"sfda:gated": True}
    assert not any(1 in seen for _, seen, _ in log)


def test_p11_hyperband_learns_its_resource_from_the_first_survivor():
    study = make_study(SFDAPruner(SURVIVORS, base_pruner=HyperbandPruner()))
    for name in "fedfed" + "ab" * 20:
        train(ask(study, name), name, np.random.default_rng(ord(name)))
    # Before it knows its resource it prunes nobody.
    assert {t.state for t in study.trials[6:]} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_p12_gated_trials_do_not_reach_the_base_sampler():
    log = Log()
    base = spy_on(TPESampler, log, n_startup_trials=3, seed=0)
    for conditional in (True, False):
        study = make_study(
            SFDAPruner(SURVIVORS),
            SFDASampler(VALUES, base_sampler=base, conditional=conditional, seed=0),
        )
        for _ in range(10):
            trial = ask(study, "f")
            assert trial.should_prune()
            study.tell(trial, state=TrialState.PRUNED)
        for name in "aab":
            trial = ask(study, name)
            trial.suggest_float("lr", 1e-5, 1e-1, log=True)
            study.tell(trial, 0.5)
    assert [seen for _, seen, _ in log] == [set(), {10}, {10, 11}] * 2


DISTRIBUTED = """
import os, sys
import optuna, torch.distributed as dist
from optuna_integration import TorchDistributedTrial
from sfda_tune_optuna import SFDAPruner, gate
rank = int(sys.argv[1])
dist.init_process_group("gloo", f"file://{sys.argv[2]}", rank=rank, world_size=2)
if rank == 0:
    study = optuna.create_study(pruner=SFDAPruner(["a"]))
    for name in "ab":
        study.enqueue_trial({"backbone": name})
gated = []
for _ in range(2):
    trial = TorchDistributedTrial(study.ask() if rank == 0 else None)
    trial.suggest_categorical("backbone", ["a", "b"])
    gated.append(bool(trial.should_prune()))
    try:
        gate(trial, ["a"])
    except optuna.TrialPruned:
        gated.append("raised")
print(gated, trial.user_attrs, flush=True)
dist.barrier()
os._exit(0)  # gloo's own teardown aborts now and then, when the other rank is gone first
"""


@pytest.mark.slow
def test_p13_all_ranks_of_a_distributed_trial_agree(tmp_path):
    pytest.importorskip("optuna_integration")
    outputs = [tmp_path / "rank0", tmp_path / "rank1"]
    ranks = []
    for rank, output in enumerate(outputs):
        command = [sys.executable, "-W", "ignore", "-c", DISTRIBUTED, str(rank)]
        with output.open("w") as file:
            ranks.append(
                subprocess.Popen(
                    [*command, str(tmp_path / "meet")],
                    stdout=file, stderr=subprocess.DEVNULL,
                    env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
                )
            )  # fmt: skip
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    for output in outputs:
        assert output.read_text() == "[False, True, 'raised'] {'sfda:gated': True}\n"


def test_p14_asking_twice_is_asking_once():
    study = make_study(SFDAPruner(SURVIVORS))
    trial = ask(study, "f")
    assert trial.should_prune()
    assert trial.should_prune()
    for _ in range(2):
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    assert study.trials[0].user_attrs == {"sfda:gated": True}


def test_survivors_that_are_no_choices_are_an_error():
    """Else every trial would be stopped, and nobody told why."""
    message = r"`scores` must name some of the choices of 'backbone', \['a'"
    with pytest.raises(ValueError, match=message):
        ask(make_study(SFDAPruner(["typo"])), "f").should_prune()
    with pytest.raises(ValueError, match=message):
        gate(ask(make_study(None), "f"), ["typo"])


def test_pruner_sampler_and_policy_keep_the_same():
    nan, inf = math.nan, math.inf
    failed = Ranking([Score("b", 0.2), Score("a", 0.2), Score("c", error="no weights")])
    for scores in (
        dict.fromkeys("cab", 1.0),
        {"a": nan, "b": 1.0, "c": 1.0},
        {"a": inf, "b": 0.5, "c": -inf},
        failed,
    ):
        for keep in (1, 2, 3, 9):
            best = set(decisions.survivors(scores, keep))
            assert SFDAPruner(scores, keep=keep).survivors == best
            sampler = SFDASampler(scores, survivors=keep, exploration=0, seed=0)
            study = make_study(SFDAPruner(scores, keep=keep), sampler)
            study.optimize(lambda t: len(t.suggest_categorical("backbone", list("abc"))), 9)
            assert {t.params["backbone"] for t in study.trials} <= best
            study.pruner = optuna.pruners.NopPruner()
            study.optimize(lambda t: len(t.suggest_categorical("backbone", list("abc"))), 9)
            assert {t.params["backbone"] for t in study.trials} == best


def test_a_ranking_keeps_its_best():
    ranking = Ranking([Score("x", 0.2), Score("y", 0.9), Score("z", error="OSError: no weights")])
    assert SFDAPruner(ranking, keep=2).survivors == {"x", "y"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], 2), ValueError, "`keep` must be None when names are given instead of .* is 2"),
        (([], None), ValueError, "must be scores or a non-empty collection"),
        (("abc", None), ValueError, "must be scores or a non-empty collection"),
        ((VALUES, 2.5), ValueError, "`keep` must be an integer ≥ 1 but is 2.5"),
        ((VALUES, 0), ValueError, "`keep` must be an integer ≥ 1 but is 0"),
        (({"a": math.nan}, 1), ValueError, "must be a mapping with a finite score"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    survivors, keep = arguments
    with pytest.raises(error, match=message):
        SFDAPruner(survivors, keep=keep)
    with pytest.raises(TypeError, match="`base_pruner` must be a pruner"):
        SFDAPruner(["a"], base_pruner=MedianPruner)


# What it says -----------------------------------------------------------------------------------
def test_a_wrong_name_is_said_once_under_any_sampler():
    study = make_study(SFDAPruner(SURVIVORS))
    study.optimize(lambda trial: len(trial.suggest_categorical("model", NAMES)), n_trials=1)

    def run(trial):
        trial.suggest_categorical("model", NAMES)
        return float(trial.should_prune())

    with pytest.warns(SFDAWarning, match="is 'backbone' and they have model: no trial") as said:
        study.optimize(run, n_trials=4)
    assert len(said) == 1


def test_behind_a_patient_pruner_it_says_that_it_is_asked_too_late():
    study = make_study(PatientPruner(SFDAPruner(SURVIVORS), 1))
    trial = ask(study, "f")
    for step in range(4):
        trial.report(-step, step)
    with pytest.warns(SFDAWarning, match=r"base_pruner=PatientPruner\(\.\.\.\)"):
        assert trial.should_prune()
