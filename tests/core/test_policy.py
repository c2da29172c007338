import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from sfda_tune.policy import (
    POLICIES,
    Observation,
    calibrate,
    choose,
    leaves_to_base,
    survivors,
)
from sfda_tune.policy import _fit as fit
from sfda_tune.policy import _log_improvement as log_improvement
from sfda_tune.values import Ranking, Score

NAMES = [f"b{k:02d}" for k in range(12)]
SCORES = {name: float(k) for k, name in enumerate(NAMES)}  # b11 is said to be the best


def seen(name, value, state="complete", **kwargs):
    return Observation(name, state, value, **kwargs)


def trials(n=40, seed=0, settings=True):
    rng = np.random.default_rng(seed)
    states = rng.choice(["complete", "pruned", "failed", "running"], n, p=[0.6, 0.2, 0.1, 0.1])
    return [
        Observation(
            NAMES[int(rng.integers(12))],
            str(state),
            float(rng.normal()) if state in ("complete", "pruned") else None,
            cost=float(rng.uniform(1, 9)),
            step=float(rng.uniform(0.1, 1)) if state == "pruned" else None,
            feasible=bool(rng.random() < 0.9),
            settings={"lr": float(10 ** rng.uniform(-5, -1)), "opt": "ab"[int(rng.integers(2))]}
            if settings
            else None,
        )
        for state in states
    ]


def follow(truth, n, scores=SCORES, **kwargs):
    """Run n trials whose values are `truth`; return what was tried."""
    history = []
    for number in range(n):
        name = choose(scores, history, number=number, **kwargs)
        history.append(seen(name, truth[name], settings={}))
    return [o.backbone for o in history]


# What must not matter ---------------------------------------------------------------------------
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("settings", [True, False])
def test_neither_the_order_of_trials_nor_of_names_matters(policy, settings):
    for seed in range(10):
        history = trials(seed=seed, settings=settings)
        kwargs = {"policy": policy, "seed": seed, "number": 7}
        first = choose(SCORES, history, **kwargs)
        mixed = [history[i] for i in np.random.default_rng(seed).permutation(len(history))]
        assert choose(dict(reversed(SCORES.items())), iter(mixed), **kwargs) == first
        assert choose(SCORES, mixed, candidates=NAMES[::-1] + NAMES, **kwargs) == first
        if settings:
            assert str(calibrate(SCORES, mixed)) == str(calibrate(SCORES, history))


@pytest.mark.parametrize("policy", POLICIES)
def test_only_the_order_of_scores_matters(policy):
    for seed in range(10):
        history, kwargs = trials(seed=seed), {"policy": policy, "number": seed}
        first = choose(SCORES, history, **kwargs)
        for transform in (lambda s: 7 * s - 100, math.exp, lambda s: s**3):
            scores = {name: transform(s) for name, s in SCORES.items()}
            assert choose(scores, history, **kwargs) == first


def test_neither_the_unit_nor_the_origin_of_values_matters():
    for seed in range(20):
        history = trials(seed=seed)
        other = [o if o.value is None else replace(o, value=8 * o.value - 64) for o in history]
        assert choose(SCORES, other) == choose(SCORES, history)


# Good and bad scores ----------------------------------------------------------------------------
def test_right_scores_are_followed_in_order():
    assert follow(SCORES, 4) == NAMES[:-5:-1]


def test_reversed_scores_are_reversed_after_a_few_trials():
    tried = follow({name: -score for name, score in SCORES.items()}, 8)
    assert tried[:2] == ["b11", "b10"]
    assert "b00" in tried


def test_without_prior_strength_the_scores_do_not_matter():
    picks = [
        {choose(SCORES, seed=s, number=n, prior_strength=0) for s in range(80)} for n in (0, 1)
    ]
    assert picks[0] == picks[1] == set(NAMES)
    assert calibrate(SCORES, trials(), prior_strength=0).slope == 0


def test_equal_scores_are_alike_and_unknown_ones_average():
    equal = dict.fromkeys(NAMES, 0.5)
    assert {choose(equal, seed=s) for s in range(100)} == set(NAMES)
    marked = dict(zip("abcdex", [1.0, 2.0, 2.0, 2.0, 3.0, math.nan], strict=True))
    z = fit([*"abcdexy"], marked, [], 1.0).z
    assert z[1] == z[2] == z[3] == z[5] == z[6] == 0
    assert z[0] == -z[4] < 0


def test_errors_widen_what_is_expected_by_the_slope():
    found = fit(NAMES, SCORES, [], 1.0, {"b03": 2.0})
    plain = fit(NAMES, SCORES, [], 1.0)
    added = found.sd**2 - plain.sd**2
    assert added[3] == pytest.approx((0.8 * 2 / np.std(range(12))) ** 2)
    assert np.flatnonzero(added).tolist() == [3]


def test_a_diverged_trial_does_not_hide_the_others():
    history = [seen(name, 0.1 * k) for k, name in enumerate(NAMES[:6])]
    first = calibrate(SCORES, [*history, seen("b06", -3.0)])
    assert calibrate(SCORES, [*history, seen("b06", -1e30)]).slope == pytest.approx(first.slope)


# Degenerate input -------------------------------------------------------------------------------
def test_few_candidates_empty_scores_and_only_failures_are_defined():
    assert choose({"a": 1.0}, [seen("a", None, "failed")] * 9) == "a"
    assert {choose({}, candidates=["a", "b"], seed=s) for s in range(30)} == {"a", "b"}
    failed = [seen(name, None, "failed") for name in NAMES]
    assert choose(SCORES, failed) == "b11"
    values = [math.nan, math.inf, -math.inf, None]
    for policy in POLICIES:
        assert choose(SCORES, [seen("b11", v) for v in values], policy=policy) in NAMES
        assert choose(SCORES, [seen("other", 1.0), seen("b01", 1.0)], policy=policy) in NAMES
    assert math.isnan(calibrate(SCORES, []).kendall_tau)
    assert calibrate({}, []).table == ()


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"policy": "best"}, "policy"),
        ({"candidates": []}, "candidates"),
        ({"exploration": 1.5}, "exploration"),
        ({"prior_strength": -1}, "prior_strength"),
        ({"cost_exponent": math.nan}, "cost_exponent"),
        ({"survivors": ["x"]}, "survivors"),
        ({"costs": {"b01": 0.0}, "cost_exponent": 1.0}, "costs"),
    ],
)
def test_wrong_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        choose(SCORES, [], **kwargs)
    with pytest.raises(ValueError, match="`state` must be"):
        Observation("a", "done")


# Kinds of evidence ------------------------------------------------------------------------------
def test_a_failing_backbone_is_left_and_not_proposed_again_and_again():
    history, picks = [], []
    for number in range(30):
        picks.append(choose(SCORES, history, number=number))
        ok = picks[-1] not in ("b11", "b10")
        history.append(seen(picks[-1], 0.5 if ok else None, "complete" if ok else "failed"))
    assert picks[:3] == ["b11", "b10", "b09"]
    assert picks.count("b11") <= 3


def test_an_infeasible_backbone_is_left_although_its_values_are_the_best():
    history = [seen(name, 0.5 + 0.01 * k) for k, name in enumerate(NAMES)]
    history += [seen("b11", 0.9, feasible=False)] * 2
    table = {row["backbone"]: row for row in calibrate(SCORES, history[:11] + history[12:]).table}
    assert table["b11"]["mean"] < table["b10"]["mean"]


def test_a_pruned_value_is_weaker_evidence_than_a_final_one():
    def expected(state, step=None):
        others = [seen(name, 0.1 * k) for k, name in enumerate(NAMES[:6])]
        return calibrate(SCORES, [*others, seen("b11", -0.5, state, step=step)]).table[11]

    final, half, begun = expected("complete"), expected("pruned"), expected("pruned", 0.1)
    assert final["mean"] < half["mean"] < begun["mean"]
    assert expected("pruned", 17) == half  # a step that is no part of the budget


def test_running_trials_make_batches_differ():
    for history in ([], trials(60)):
        asked = []
        for number in range(100, 116):
            running = [seen(name, None, "running") for name in asked]
            asked.append(choose(SCORES, history + running, number=number))
        assert len(set(asked)) >= 3


def test_values_are_compared_as_if_with_the_same_settings():
    lr = {name: [0.1, 0.001][k % 2] for k, name in enumerate(NAMES)}
    value = {n: SCORES[n] / 12 - 2 * (lr[n] == 0.1) for n in NAMES}
    told = calibrate(SCORES, [seen(n, value[n], settings={"lr": lr[n]}) for n in NAMES])
    untold = calibrate(SCORES, [seen(n, value[n]) for n in NAMES])
    assert told.kendall_tau > untold.kendall_tau


def test_where_only_the_backbone_varies_none_is_tried_twice():
    truth = dict(zip(NAMES, np.random.default_rng(0).permutation(12) / 12.0, strict=True))
    assert sorted(follow(truth, 12)) == NAMES


# Masks and costs --------------------------------------------------------------------------------
def test_survivors_are_left_with_the_given_frequency():
    inside, history = {"b03", "b04"}, trials()
    kwargs = {"survivors": inside, "seed": 3}
    assert {
        choose(SCORES, history, number=n, exploration=0, **kwargs) for n in range(99)
    } <= inside
    picks = [choose(SCORES, history, number=n, exploration=0.2, **kwargs) for n in range(1000)]
    outside = sum(name not in inside for name in picks)
    assert binomtest(outside, 1000, 0.2).pvalue > 1e-3
    assert choose(SCORES, survivors=NAMES, exploration=1) == "b11"


def test_costs_count_with_their_exponent():
    costs = dict.fromkeys(NAMES, 1.0) | {"b11": 1e6}
    assert choose(SCORES, costs=costs) == "b11"
    assert choose(SCORES, costs=costs, cost_exponent=1.0) == "b10"
    history = [seen("b11", 0.5, cost=1e6), seen("b10", 0.4, cost=1.0), seen("b09", 0.3, cost=1.0)]
    assert choose(SCORES, [*history, *history], cost_exponent=3.0) != "b11"


def test_prior_draws_from_the_top_and_greedy_takes_the_best_mean():
    bad = [seen(name, -SCORES[name]) for name in NAMES[4:]]
    drawn = [choose(SCORES, bad, seed=s, policy="prior") for s in range(50)]
    assert sum(name >= "b08" for name in drawn) > 35
    best = max(calibrate(SCORES, bad).table, key=lambda row: row["mean"])
    assert choose(SCORES, bad, policy="greedy") == best["backbone"] < "b04"


# The guarantee ----------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1, 5, 2**62 + 3])
@pytest.mark.parametrize("scores", [None, SCORES])
def test_a_share_of_the_trials_is_left_to_the_base_whatever_the_trials_say(seed, scores):
    for draw in range(5):
        history, left = trials(seed=draw), 0
        for number in range(100):
            left += leaves_to_base(number, seed=seed, history=history, scores=scores)
            assert left >= (number + 1 - 15) / 8
            assert number >= 8 or not left


def test_half_of_the_trials_are_left_while_the_scores_are_not_supported():
    wrong = [seen(name, -score) for name, score in SCORES.items()]
    right = [seen(name, score) for name, score in SCORES.items()]
    for history, divisor in ((wrong, 2), (right, 8)):
        picks = [leaves_to_base(n, seed=4, history=history, scores=SCORES) for n in range(8, 88)]
        assert sum(picks) == 80 / divisor
    assert sum(leaves_to_base(n, seed=0, share=0.3) for n in range(100)) == 30


def test_what_the_base_finds_is_found_in_eight_times_its_trials_whatever_the_scores():
    rng = np.random.default_rng(0)
    for seed in range(20):
        own = rng.permutation(NAMES).tolist()  # what the base would try
        best, history, asked = own[-1], [], 0  # its last one; never among the policy's
        scores = SCORES | {best: -1.0}
        while best not in {o.backbone for o in history}:
            number = len(history)
            if leaves_to_base(number, seed=seed, history=history, scores=scores):
                name, asked = own[asked], asked + 1
            else:
                name = choose(scores, history, number=number, candidates=sorted({*NAMES} - {best}))
            history.append(seen(name, scores[name]))
        assert len(history) <= 8 * len(own) + 15


# What it says -----------------------------------------------------------------------------------
def test_calibration_says_what_the_scores_are_worth():
    rises = calibrate(SCORES, [seen(n, s) for n, s in SCORES.items()])
    assert rises.kendall_tau == pytest.approx(1)
    assert 0 < rises.slope_interval[0] < rises.slope < rises.slope_interval[1]
    assert rises.warning is None
    assert (rises.n_backbones, rises.n_trials) == (12, 12)
    falls = calibrate(SCORES, [seen(n, -s) for n, s in SCORES.items()])
    assert falls.slope < 0
    assert falls.kendall_tau == pytest.approx(-1)
    assert "run against" in (falls.warning or "")
    assert calibrate(SCORES, [seen(n, -SCORES[n]) for n in NAMES[:4]]).warning is None
    lines = str(falls).splitlines()
    assert len(lines) == 2 + 12 + 1
    assert lines[2].split()[0] == "b00"
    flat = calibrate(SCORES, [seen(n, 0.5) for n in NAMES])
    assert math.isnan(flat.kendall_tau)


def test_expected_values_have_the_unit_of_the_values():
    table = calibrate(
        SCORES, [seen(n, 1000 + 100 * s, settings={}) for n, s in SCORES.items()]
    ).table
    for row in table:
        assert row["mean"] == pytest.approx(row["best"], abs=20)
        assert row["n_trials"] == 1


def test_survivors_are_the_best_or_the_named():
    scores = {"a": 0.5, "b": math.nan, "c": 0.9, "d": 0.5}
    assert survivors(scores) == survivors(scores, 9) == ("c", "a", "d")
    assert survivors(scores, 2) == ("c", "a")
    assert survivors(scores, ["d", "b", "c"]) == ("c", "d", "b")
    terms = {"a": np.arange(9) / 9, "b": 1 + np.arange(9) / 9}
    ranking = Ranking([Score(n, p.mean(), p) for n, p in terms.items()], labels=np.arange(9) % 3)
    assert survivors(ranking, probability=0.9) == ("b",)
    for wrong in ({"keep": 0}, {"keep": ["x"]}, {"keep": "ab"}, {"probability": 0.9}):
        with pytest.raises(ValueError, match="must be"):
            survivors(scores, **wrong)


def test_the_improvement_is_the_integral_and_never_underflows():
    found = fit(NAMES, SCORES, trials(), 1.0)
    x = np.linspace(0, 40, 400_001)
    for k, log in enumerate(log_improvement(found)):
        u = found.top + x
        density = np.exp(-0.5 * ((u - found.mean[k]) / found.sd[k]) ** 2) / found.sd[k]
        integral = np.trapezoid(x * density, x) / math.sqrt(2 * math.pi)
        assert math.exp(log) == pytest.approx(integral, rel=1e-3)
    far = log_improvement(found._replace(top=1e6))
    assert np.isfinite(far).all()
    steps = [log_improvement(found._replace(top=t))[0] for t in np.linspace(0, 60, 500)]
    assert (np.diff(steps) < 0).all()


def test_no_host_is_imported():
    code = "import sys, sfda_tune.policy; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"optuna", "ray", "torch"} & set(out.stdout.split())
