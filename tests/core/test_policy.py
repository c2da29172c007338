import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from sfda_tune.selection import calibration
from sfda_tune.selection import policy as module
from sfda_tune.selection.calibration import Observation, calibrate
from sfda_tune.selection.policy import POLICIES, choose, delegate_to_base_sampler, survivors

NAMES = [f"b{k:02d}" for k in range(12)]
SCORES = {name: float(k) for k, name in enumerate(NAMES)}  # b11 is said to be the best
RIGHT = [Observation(name, "complete", score) for name, score in SCORES.items()]
WRONG = [Observation(name, "complete", -score) for name, score in SCORES.items()]


def test_many_trials_of_one_backbone_hide_nothing_of_the_others():
    value = {name: 0.5 + 0.05 * SCORES[name] for name in NAMES}
    best = max(value, key=lambda name: value[name])
    once = [seen(name, v) for name, v in value.items()]
    often = [*once, *(seen(best, value[best] - k / 1000) for k in range(1, 30))]
    told = [calibrate(SCORES, history) for history in (once, often)]
    assert [c.kendall_tau for c in told] == pytest.approx([1.0, 1.0])
    assert told[1].slope > 0.8 * told[0].slope
    worst = min(told[1].table, key=lambda row: row["best"])
    assert abs(worst["mean"] - worst["best"]) < 2 * worst["sd"] < 0.2


def test_a_tau_that_may_be_chance_is_no_warning():
    rng = np.random.default_rng(0)
    names = sorted(SCORES)[:6]
    said = [
        calibrate(SCORES, [seen(n, v) for n, v in zip(names, rng.normal(size=6), strict=True)])
        for _ in range(200)
    ]
    assert 0 < np.mean([c.warning is not None for c in said]) < 0.1


def test_rating_compares_each_value_with_the_range_once():
    class Counted(float):
        count = 0

        def __lt__(self, other):
            Counted.count += 1
            return float(self) < float(other)

        def __gt__(self, other):
            Counted.count += 1
            return float(self) > float(other)

    values = [[Counted(v)] for v in np.random.default_rng(0).random(300)]
    assert module.scalarize([[-math.inf], *values]) == [
        min(v for v, in values), *(v for v, in values)
    ]  # fmt: skip
    assert Counted.count < 10 * 300


def seen(name, value, state="complete", **kwargs):
    return Observation(name, state, value, **kwargs)


def trials(n=40, seed=0, params=True):
    rng = np.random.default_rng(seed)
    history = []
    for state in rng.choice(
        ["complete", "pruned", "failed", "running"], n, p=[0.6, 0.2, 0.1, 0.1]
    ):
        name, value, step, cost, lr = NAMES[int(rng.integers(12))], *rng.uniform(size=4).tolist()
        kwargs = {"cost": cost, "step": step, "feasible": bool(rng.random() < 0.9)}
        if params:
            kwargs["params"] = {"lr": 10**lr, "opt": "ab"[int(rng.integers(2))]}
        value = value if state in ("complete", "pruned") else None
        history.append(seen(name, value, str(state), **kwargs))
    return history


def follow(truth, n):
    """Run n trials whose values are `truth` and where nothing but the backbone varies."""
    history = []
    for number in range(n):
        name = choose(SCORES, history, number=number)
        history.append(seen(name, truth[name], params={}))
    return [o.backbone for o in history]


def fit(history=(), errors=None):
    return calibration.fit_model(NAMES, SCORES, history, 1.0, errors)


# What must not matter ---------------------------------------------------------------------------
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("params", [True, False])
def test_order_of_trials_and_names_and_units_do_not_matter(policy, params):
    for seed in range(10):
        history = trials(seed=seed, params=params)
        kwargs = {"policy": policy, "seed": seed, "number": 7}
        first = choose(SCORES, history, **kwargs)
        mixed = [history[i] for i in np.random.default_rng(seed).permutation(len(history))]
        assert choose(dict(reversed(SCORES.items())), iter(mixed), **kwargs) == first
        assert choose(SCORES, mixed, candidates=NAMES[::-1] + NAMES, **kwargs) == first
        assert str(calibrate(SCORES, mixed)) == str(calibrate(SCORES, history))
        for transform in (lambda s: 7 * s - 100, math.exp, lambda s: s**3):
            scores = {name: transform(s) for name, s in SCORES.items()}
            assert choose(scores, history, **kwargs) == first
        other = [o if o.value is None else replace(o, value=8 * o.value - 64) for o in history]
        assert choose(SCORES, other, **kwargs) == first


# Good and bad scores ----------------------------------------------------------------------------
def test_right_scores_are_followed_and_wrong_ones_reversed_after_a_few_trials():
    assert follow(SCORES, 4) == NAMES[:-5:-1]
    tried = follow({name: -score for name, score in SCORES.items()}, 8)
    assert tried[:2] == ["b11", "b10"]
    assert "b00" in tried


def test_without_prior_strength_the_scores_do_not_matter():
    assert {choose(SCORES, seed=seed, prior_strength=0) for seed in range(80)} == set(NAMES)
    assert calibrate(SCORES, trials(), prior_strength=0).slope == 0


def test_equal_scores_are_alike_and_unknown_ones_average():
    assert {choose(dict.fromkeys(NAMES, 0.5), seed=s) for s in range(100)} == set(NAMES)
    marked = dict(zip("abcdex", [1.0, 2.0, 2.0, 2.0, 3.0, math.nan], strict=True))
    z = calibration.fit_model([*"abcdexy"], marked, [], 1.0).z
    assert z[1] == z[2] == z[3] == z[5] == z[6] == 0
    assert z[0] == -z[4] < 0


def test_errors_widen_what_is_expected_by_the_slope():
    added = fit(errors={"b03": 2.0}).sd ** 2 - fit().sd ** 2
    assert added[3] == pytest.approx((0.8 * 2 / np.std(range(12))) ** 2)
    assert np.flatnonzero(added).tolist() == [3]


def test_a_diverged_trial_does_not_hide_the_others():
    slopes = [calibrate(SCORES, [*RIGHT[:6], seen("b06", v)]).slope for v in (-30, -1e30)]
    assert slopes[0] == pytest.approx(slopes[1])


# Degenerate input -------------------------------------------------------------------------------
@pytest.mark.parametrize("values", [(-1e300, 0.9), (1e160, -1e160), (1e308, -1e308, 0.0)])
def test_huge_values_and_costs_are_counted_but_do_not_overflow(values):
    history = [
        calibration.Observation("ab"[k % 2], "complete", v, 1e308) for k, v in enumerate(values)
    ]
    history += history
    assert module.choose(SCORES, history, number=2, cost_exponent=0.5) in SCORES
    assert math.isfinite(calibration.calibrate(SCORES, history).slope)


def test_few_candidates_empty_scores_and_only_failures_are_defined():
    assert choose({"a": 1.0}, [seen("a", None, "failed")] * 9) == "a"
    assert {choose({}, candidates=["a", "b"], seed=s) for s in range(30)} == {"a", "b"}
    assert choose(SCORES, [seen(name, None, "failed") for name in NAMES]) == "b11"
    odd = [seen("b11", v) for v in (math.nan, math.inf, -math.inf, None)]
    for policy in POLICIES:
        assert choose(SCORES, odd, policy=policy) in NAMES
        assert choose(SCORES, [seen("other", 1.0), seen("b01", 1.0)], policy=policy) in NAMES
    assert math.isnan(calibrate(SCORES, []).kendall_tau)
    assert math.isnan(calibrate(SCORES, [seen(n, 0.5) for n in NAMES]).kendall_tau)
    assert calibrate({}, []).table == ()


BAD = {"policy": "best", "candidates": [], "exploration": 1.5, "prior_strength": -1}
BAD |= {"cost_exponent": math.nan, "survivors": ["x"], "costs": {"b01": 0.0}}


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        choose(SCORES, **({"cost_exponent": 1.0} | {name: value}))
    with pytest.raises(ValueError, match="`state` must be"):
        Observation("a", "done")


# Kinds of evidence ------------------------------------------------------------------------------
def test_a_failing_backbone_is_left_and_not_proposed_again_and_again():
    history = []
    for number in range(30):
        name = choose(SCORES, history, number=number)
        history.append(seen(name, 0.5) if name < "b10" else seen(name, None, "failed"))
    picks = [o.backbone for o in history]
    assert picks[:3] == ["b11", "b10", "b09"]
    assert picks.count("b11") <= 3


def test_an_infeasible_backbone_is_left_although_its_values_are_the_best():
    table = calibrate(SCORES, [*RIGHT[:11], seen("b11", 99.0, feasible=False)]).table
    assert table[11]["mean"] < table[10]["mean"]


def test_a_pruned_value_is_weaker_evidence_than_a_final_one():
    def expected(state, step=None):
        return calibrate(SCORES, [*RIGHT[:6], seen("b11", -5.0, state, step=step)]).table[11]

    means = [expected("complete"), expected("pruned"), expected("pruned", 0.1)]
    assert means == sorted(means, key=lambda row: row["mean"])
    assert expected("pruned", 17) == means[1]  # a step that is no part of the budget


def test_running_trials_make_batches_differ():
    for history in ([], RIGHT[::3], WRONG[::2], trials(30)):
        asked = []
        for number in range(100, 116):
            running = [seen(name, None, "running") for name in asked]
            asked.append(choose(SCORES, history + running, number=number))
        assert len(set(asked)) >= 3


def test_values_are_compared_as_if_with_the_same_settings():
    lr = {name: [0.1, 0.001][k % 2] for k, name in enumerate(NAMES)}
    value = {n: SCORES[n] / 12 - 2 * (lr[n] == 0.1) for n in NAMES}
    told = calibrate(SCORES, [seen(n, value[n], params={"lr": lr[n]}) for n in NAMES])
    untold = calibrate(SCORES, [seen(n, value[n]) for n in NAMES])
    assert told.kendall_tau > untold.kendall_tau


def test_where_only_the_backbone_varies_none_is_tried_twice():
    truth = dict(zip(NAMES, np.random.default_rng(0).permutation(12) / 12.0, strict=True))
    assert sorted(follow(truth, 12)) == NAMES


# Masks, costs, policies -------------------------------------------------------------------------
def test_survivors_are_left_with_the_given_frequency():
    inside, history = {"b03", "b04"}, trials()
    kwargs = {"survivors": inside, "seed": 3}
    assert {
        choose(SCORES, history, number=n, exploration=0, **kwargs) for n in range(99)
    } <= inside
    picks = [choose(SCORES, history, number=n, exploration=0.2, **kwargs) for n in range(1000)]
    assert binomtest(sum(name not in inside for name in picks), 1000, 0.2).pvalue > 1e-3
    assert choose(SCORES, survivors=NAMES, exploration=1) == "b11"


def test_costs_count_with_their_exponent():
    costs = dict.fromkeys(NAMES, 1.0) | {"b11": 1e6}
    assert choose(SCORES, costs=costs) == "b11"
    assert choose(SCORES, costs=costs, cost_exponent=1.0) == "b10"
    paid = [replace(o, cost=costs[o.backbone]) for o in RIGHT]
    assert choose(SCORES, paid) == "b11"
    assert choose(SCORES, paid, cost_exponent=3.0) != "b11"


def test_prior_draws_from_the_top_and_greedy_takes_the_best_mean():
    drawn = [choose(SCORES, WRONG[4:], seed=s, policy="prior") for s in range(50)]
    assert sum(name >= "b08" for name in drawn) > 35
    best = max(calibrate(SCORES, WRONG[4:]).table, key=lambda row: row["mean"])
    assert choose(SCORES, WRONG[4:], policy="greedy") == best["backbone"] < "b04"


# The guarantee ----------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1, 5, 2**62 + 3])
@pytest.mark.parametrize("scores", [None, SCORES])
def test_a_share_of_the_trials_is_left_to_the_base_whatever_they_say(seed, scores):
    for draw in range(5):
        history, left = trials(seed=draw), 0
        for number in range(100):
            left += delegate_to_base_sampler(number, seed=seed, history=history, scores=scores)
            assert left >= (number + 1 - 15) / 8
            assert number >= 8 or not left


def test_half_of_the_trials_are_left_while_the_scores_are_not_supported():
    for history, divisor in ((WRONG, 2), (RIGHT, 8)):
        picks = [
            delegate_to_base_sampler(n, seed=4, history=history, scores=SCORES)
            for n in range(8, 88)
        ]
        assert sum(picks) == 80 / divisor


def test_what_the_base_finds_is_found_in_eight_times_its_trials_whatever_the_scores():
    for seed in range(20):
        own = np.random.default_rng(seed).permutation(NAMES).tolist()  # what the base would try
        best, history, asked = own[-1], [], 0  # which the scores never propose
        while best not in {o.backbone for o in history}:
            number, others = len(history), sorted({*NAMES} - {best})
            if delegate_to_base_sampler(number, seed=seed, history=history, scores=SCORES):
                name, asked = own[asked], asked + 1
            else:
                name = choose(SCORES, history, number=number, candidates=others)
            history.append(seen(name, SCORES[name]))
        assert len(history) <= 8 * len(own) + 15


# What it says -----------------------------------------------------------------------------------
def test_calibration_says_what_the_scores_are_worth():
    rises, falls = calibrate(SCORES, RIGHT), calibrate(SCORES, WRONG)
    assert 0 < rises.slope_interval[0] < rises.slope < rises.slope_interval[1]
    assert (rises.n_backbones, rises.n_trials, rises.warning) == (12, 12, None)
    assert falls.slope < 0
    assert (rises.kendall_tau, falls.kendall_tau) == pytest.approx((1, -1))
    assert calibrate(SCORES, WRONG[:4]).warning is None
    lines = str(falls).splitlines()
    assert lines[2].split()[0] == "b00"
    assert "warning: the scores run against" in lines[14]


def test_expected_values_have_the_unit_of_the_values():
    history = [seen(n, 1000 + 100 * s, params={}) for n, s in SCORES.items()]
    for row in calibrate(SCORES, history).table:
        assert row["mean"] == pytest.approx(row["best"], abs=20)


def test_survivors_are_the_best():
    scores = {"a": 0.5, "b": math.nan, "c": 0.9, "d": 0.5}
    assert survivors(scores) == survivors(scores, 9) == ("c", "a", "d")
    assert survivors(scores, 2) == ("c", "a")
    for wrong in (0, ["x"], "ab", True):
        with pytest.raises(ValueError, match="`keep` must be an integer ≥ 1"):
            survivors(scores, wrong)


def test_the_improvement_is_the_integral_and_never_underflows():
    found, x = fit(trials()), np.linspace(0, 40, 400_001)
    for mean, sd, log in zip(
        found.mean, found.sd, calibration.log_improvement(found), strict=True
    ):
        density = np.exp(-0.5 * ((found.top + x - mean) / sd) ** 2) / sd / math.sqrt(2 * math.pi)
        assert math.exp(log) == pytest.approx(np.trapezoid(x * density, x), rel=1e-3)
    tops = [*np.linspace(0, 60, 500), 1e6]
    steps = [calibration.log_improvement(found._replace(top=top))[0] for top in tops]
    assert np.isfinite(steps).all()
    assert (np.diff(steps) < 0).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"costs": [1, 2]}, "costs"),
        ({"costs": {"a": -1.0}}, "costs"),
        ({"cost_exponent": -1}, "cost_exponent"),
        ({"survivors": np.array([])}, "survivors"),
    ],
)
def test_a_policy_names_the_argument_that_is_wrong(wrong, named):
    with pytest.raises(ValueError, match=f"`{named}` must be"):
        module.BackbonePolicy({"a": 1.0, "b": 2.0}, **wrong)


def test_a_policy_takes_names_in_an_array():
    policy = module.BackbonePolicy({"a": 1.0, "b": 2.0}, survivors=np.array(["b"]), exploration=0)
    assert policy.survivors == ("b",)
    assert {type(name) for name in policy.survivors} == {str}


# Levels, hedges, names --------------------------------------------------------------------------
def test_levels_say_what_a_backbone_reaches_in_units_of_the_values():
    history = [seen(n, 100 * SCORES[n] + 7) for n in NAMES for _ in range(4)]
    levels = calibration.estimate_levels(SCORES, history)
    assert [levels[n] for n in NAMES] == pytest.approx([100 * k + 7 for k in range(12)], abs=60)
    one = calibration.estimate_levels({}, [seen("a", 0.9), seen("b", 0.5), seen("b", 0.52)])
    assert 0 < one["a"] - one["b"] < 0.5  # a single trial may have had bad parameters


def test_every_third_choice_goes_by_the_trials_alone():
    policy = module.BackbonePolicy(SCORES, seed=1)
    picks = [policy.choose([], number, NAMES) for number in range(60)]
    assert {name for i, name in enumerate(picks) if i % 3 != 2} == {"b11"}
    assert len({name for i, name in enumerate(picks) if i % 3 == 2}) > 5
    for other in ("prior", "greedy"):
        greedy = module.BackbonePolicy(SCORES, seed=1, policy=other)
        assert greedy.choose([], 2, NAMES) == choose(SCORES, number=2, seed=1, policy=other)


def test_one_failure_is_no_evidence_and_a_stop_is():
    for state, backs_off in (("failed", False), ("stopped", True)):
        history = [seen("b11", None, state)]
        assert ("b11" in module.find_backed_off(history, 3)) == backs_off
        fit = calibration.fit_model(NAMES, SCORES, history, 1.0)
        assert (fit.success[11] < fit.success[10]) == backs_off
    twice = [seen("b11", None, "failed")] * 2
    assert module.find_backed_off(twice, 15) == {"b11"}
    assert module.find_backed_off(twice, 16) == frozenset()


def test_names_that_do_not_fit_are_compared():
    policy = module.BackbonePolicy({"a": 1.0, "b": 2.0, "c": math.nan})
    assert policy.compare_names("net", ["net", "lr"], ["a", "b", "d"]) is None  # d is average
    assert policy.compare_names("net", ["net", "lr"], ["a"]) is None  # a shortlist
    assert "'net' and they have lr" in str(policy.compare_names("net", ["lr"], None))
    assert "b are no choices, and B have" in str(policy.compare_names("net", ["net"], ["a", "B"]))
