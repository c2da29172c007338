import json
import math
import pickle
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sfda_tune import Ranking, Score
from sfda_tune.selection.evaluation import (
    evaluate,
    evaluate_many,
    fidelity,
    hit_at_k,
    kendall_tau,
    leave_models_out,
    pearson,
    permutation_p_value,
    regret_at_k,
    relative_at_k,
    spearman,
    static_order,
    static_order_null,
    weighted_tau,
    weighted_taus,
)
from sfda_tune.selection.tables import read_scores, read_truth

NAN = math.nan
AGREEMENT = (weighted_tau, kendall_tau, pearson, spearman, fidelity)
FIGURES = (
    *AGREEMENT,
    relative_at_k,
    regret_at_k,
    lambda s, t: hit_at_k(s, t, 2, of="pick"),
    lambda s, t: hit_at_k(s, t, 2, of="best"),
)
TRUTH = {"a": 60.0, "b": 80.0, "c": 70.0, "d": 50.0}


def samples():
    """Scores and truths with and without ties, of 2 to 9 models."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 10))
        yield rng.integers(0, 4, (2, n)) * 0.1 if seed % 2 else rng.normal(size=(2, n))


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or a == pytest.approx(b, abs=1e-12)


# Agreement -------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (weighted_tau, stats.weightedtau),
        (kendall_tau, stats.kendalltau),
        (pearson, stats.pearsonr),
        (spearman, stats.spearmanr),
    ],
)
def test_equals_scipy_with_and_without_ties(ours, theirs):
    for s, t in samples():
        assert same(ours(s, t), float(theirs(t, s).statistic)), (s, t)


def test_weighted_tau_by_hand():
    # Truth order d c b a, score order c d b a; weights 1, 1/2, 1/3, 1/4 of the positions.
    # All pairs: 3 · (1 + 1/2 + 1/3 + 1/4) = 6.25; only (c, d) disagrees: 1 + 1/2.
    assert weighted_tau([1, 2, 4, 3], [1, 2, 3, 4]) == pytest.approx(1 - 2 * 1.5 / 6.25)
    # The same mistake at the bottom weighs 1/3 + 1/4.
    assert weighted_tau([2, 1, 3, 4], [1, 2, 3, 4]) == pytest.approx(1 - 2 * (7 / 12) / 6.25)


def test_fidelity_by_hand():
    assert fidelity([1, 2, 3], [1, 2, 9]) == pytest.approx(stats.pearsonr([1, 7, 8], [1, 1, 2])[0])
    # A pair of equal truth counts half in each direction: Δscore −2 and 2.
    expected = stats.pearsonr([0, 0, 5, 5, 5, 5], [-2, 2, 1, 1, 3, 3])[0]
    assert fidelity([4, 2, 5], [1, 1, 6]) == pytest.approx(expected)


@pytest.mark.parametrize("figure", AGREEMENT)
@pytest.mark.parametrize(("s", "t"), [([5, 5, 5], [1, 2, 3]), ([1, 2, 3], [5, 5, 5])])
def test_all_equal_is_undefined_and_not_0(figure, s, t):
    assert math.isnan(figure(s, t))


@pytest.mark.parametrize("figure", AGREEMENT)
def test_perfect_and_reversed(figure):
    t = np.array([1.0, 2.0, 4.0, 7.0])
    assert figure(t, t) == pytest.approx(1)
    if figure is not fidelity:
        assert figure(-t, t) == pytest.approx(-1)


def test_many_rows_equal_one_row_at_a_time():
    S, T = np.random.default_rng(0).integers(0, 5, (2, 20, 7))
    one = [weighted_tau(s, t) for s, t in zip(S, T, strict=True)]
    np.testing.assert_allclose(weighted_taus(S, T), one, atol=1e-14)


@pytest.mark.parametrize("figure", FIGURES)
def test_order_of_the_models_does_not_matter(figure):
    for s, t in samples():
        order = np.random.default_rng(0).permutation(len(s))
        assert same(figure(s[order], t[order]), figure(s, t))


@pytest.mark.parametrize("figure", [weighted_tau, kendall_tau, spearman, *FIGURES[5:]])
def test_only_the_order_of_the_scores_matters(figure):
    for s, t in samples():
        assert same(figure(np.exp(s), t), figure(s, t))


@pytest.mark.parametrize("figure", AGREEMENT)
def test_unit_of_the_truth_does_not_matter(figure):
    for s, t in samples():
        assert same(figure(s, 100 * t + 3), figure(s, t))


# The top ---------------------------------------------------------------------------------------
def test_top_by_hand():
    scores = {"a": 4, "c": 3, "b": 2, "d": 1}
    assert [relative_at_k(scores, TRUTH, k) for k in (1, 2, 3, 4, 9)] == [0.75, 0.875, 1, 1, 1]
    assert [regret_at_k(scores, TRUTH, k) for k in (1, 2, 3)] == [20, 10, 0]
    assert [hit_at_k(scores, TRUTH, k, of="pick") for k in (1, 2, 3)] == [0, 0, 1]
    assert [hit_at_k(scores, TRUTH, k, of="best") for k in (1, 2, 3)] == [0, 0, 1]
    scores = {"c": 4, "a": 3, "d": 2, "b": 1}  # picks the second best, finds the best last
    assert [hit_at_k(scores, TRUTH, 2, of=of) for of in ("pick", "best")] == [1, 0]
    assert math.isnan(relative_at_k([1, 2], [-3, -1]))
    # Models of equal truth have equal rights.
    assert [hit_at_k([1, 2, 0], [7, 7, 5], 1, of=of) for of in ("pick", "best")] == [1, 1]


def test_tied_scores_give_the_mean_over_all_orders():
    for s, t in samples():
        n = len(s)
        orders = [np.array(order) for order in permutations(range(n))] if n <= 6 else []
        for k in range(1, n + 1) if orders else []:
            picks, hits = [], []
            for order in orders:
                top = order[np.argsort(-s[order], kind="stable")][:k]
                picks.append(t.max() - t[top].max())
                hits.append(np.sum(t > t[top[0]]) < k)
            assert regret_at_k(s, t, k) == pytest.approx(np.mean(picks))
            assert hit_at_k(s, t, k, of="pick") == pytest.approx(np.mean(hits))
            assert hit_at_k(s, t, k, of="best") == pytest.approx(np.mean(np.equal(picks, 0)))


# Models on one side, failed models, wrong input -------------------------------------------------
def ranking():
    values = {"b": 0.9, "c": 0.8, "a": 0.1, "x": 0.5}
    failed = Score("d", error="OSError: no weights")
    return Ranking([*(Score(name, value) for name, value in values.items()), failed])


def test_failed_and_unmatched_models_are_left_out_and_named():
    report = evaluate(ranking(), TRUTH | {"y": 99.0}, k=1, n_permutations=9)
    assert report.n_models == 3
    assert report.figures["weighted_tau"] == 1
    assert report.left_out == {"x": "no truth", "d": "OSError: no weights", "y": "no score"}
    assert "left_out d" in repr(report)
    for missing in (NAN, None, math.inf):
        scores = {"a": 1, "b": 3, "c": 2, "d": missing}
        assert kendall_tau(scores, TRUTH) == 1
        assert list(evaluate(scores, TRUTH, n_permutations=9).left_out) == ["d"]
    assert weighted_tau(pd.Series({"c": 3, "b": 4, "a": 2, "d": 1}), TRUTH) == 1


@pytest.mark.parametrize(
    ("figure", "args", "message"),
    [
        (
            weighted_tau,
            ({"a": 1, "d": NAN}, TRUTH),
            "at least 2 models .* a, d, .* a, b, c, d; check",
        ),
        (weighted_tau, ([1, 2], [1, 2, 3]), "sequences of equal length, but are list and list"),
        (weighted_tau, ([1, 2, 3, 4], TRUTH), "must both be mappings .* but are list and dict"),
        (
            weighted_tau,
            ({"a": "one", "b": 2}, TRUTH),
            "`scores` must hold numbers but 'a' is 'one'",
        ),
        (weighted_tau, (TRUTH, {"a": 1, "b": NAN}), "`truth` must be finite but 'b' is nan"),
        (weighted_tau, (TRUTH, {"a": 1, "b": None}), "`truth` must be finite but 'b' is None"),
        *(
            (regret_at_k, ([1, 2], [1, 2], k), "`k` must be an integer")
            for k in (0, 1.5, True, "2")
        ),
        *((leave_models_out, ([1, 2, 3], [1, 2, 3], m), "`m` must be an") for m in (0, 2, True)),
        (static_order, ({"x": TRUTH},), "at least 2 data sets"),
        (static_order, ({"x": {"a": NAN}},), r"`truths\['x'\]` must be finite but 'a' is nan"),
        (static_order, (TRUTH,), "`truths` must map data sets to"),
        (evaluate_many, ({}, {}), "`truths` must map data sets to"),
        (evaluate_many, ({"w": TRUTH}, {"x": TRUTH}), "must share a data set: .*no truth"),
        (
            evaluate_many,
            ({"x": {"a": "b"}}, {"x": TRUTH}),
            "data set 'x': `scores` must hold numbers",
        ),
    ],
)
def test_mistakes(figure, args, message):
    with pytest.raises(ValueError, match=message):
        figure(*args)


def test_wrong_options():
    with pytest.raises(ValueError, match=r"`of` must be 'pick' or 'best' but is 'top'\."):
        hit_at_k([1, 2], [1, 2], 1, of="top")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`k` must be an integer ≥ 1 but is"):
        evaluate([1, 2], [1, 2], k=(1, 0))
    with pytest.raises(ValueError, match=r"`n` must be an integer .* but is 0"):
        permutation_p_value([1, 2], [1, 2], n=0)


# Permutations ----------------------------------------------------------------------------------
def test_p_value_of_few_models_is_that_of_all_permutations():
    s, t = [1, 2, 4, 3, 5], [1, 2, 3, 4, 5]
    every = [weighted_tau(order, t) for order in permutations(s)]
    exact = np.mean(np.array(every) >= weighted_tau(s, t) - 1e-12)
    assert permutation_p_value(s, t, n=20_000) == pytest.approx(exact, abs=0.005)
    assert math.isnan(permutation_p_value([1, 1, 1, 1, 1], t))


def test_p_value_is_reproducible_and_blind_to_order_and_names():
    rng = np.random.default_rng(1)
    s, t = rng.integers(0, 6, 12), rng.random(12)
    p = permutation_p_value(s, t)
    order = rng.permutation(12)
    names = [f"m{i}" for i in order]
    truth = dict(zip(names, t[order], strict=True))
    assert permutation_p_value(dict(zip(names, s[order], strict=True)), truth) == p
    assert permutation_p_value(s, t, seed=1) == pytest.approx(p, abs=0.06)


@pytest.mark.parametrize("m", [1, 2])
def test_leave_models_out_is_the_range_over_all_subsets(m):
    scores = {"a": 1, "b": 4, "c": 2, "d": 3}
    left = leave_models_out(scores, TRUTH, m)
    values = {}
    for out in permutations(TRUTH, m):
        rest = {name: value for name, value in scores.items() if name not in out}
        values[frozenset(out)] = weighted_tau(rest, TRUTH)
    assert left[:2] == pytest.approx((min(values.values()), max(values.values())))
    assert values[frozenset(left.low_without)] == pytest.approx(left.low)
    assert values[frozenset(left.high_without)] == pytest.approx(left.high)


def test_leave_models_out_of_nothing_is_undefined():
    assert all(map(math.isnan, leave_models_out([1, 1, 1], [1, 2, 3])[:2]))
    # Dropping the only different one leaves nothing defined there, but the rest still counts.
    assert leave_models_out([1, 1, 2], [1, 2, 3]).low == 1


# Baselines --------------------------------------------------------------------------------------
def test_static_order_does_not_see_its_own_data_set():
    truths = {"x": {"a": 1, "b": 2, "c": 3}, "y": {"a": 9, "b": 9, "c": 1}, "z": {"a": 1, "b": 5}}
    order = static_order(truths)
    changed = static_order(truths | {"x": {"a": 3, "b": 2, "c": 1}})
    assert [changed[d] == order[d] for d in "xy"] == [True, False]
    # On y a, b share the upper two of three places (2/3), c has 1/6; on z a has 1/4, b 3/4.
    expected = {"a": (2 / 3 + 1 / 4) / 2, "b": (2 / 3 + 3 / 4) / 2, "c": 1 / 6}
    assert order["x"] == pytest.approx(expected)
    assert math.isnan(static_order(truths | {"x": {"new": 2}})["x"]["new"])


def test_static_null_of_equal_data_sets_is_that_of_one():
    one = static_order_null({"x": TRUTH}, n=4000)
    two = static_order_null({"x": TRUTH, "y": {m: v / 2 for m, v in TRUTH.items()}}, n=4000)
    assert (one.mean, one.sd) == pytest.approx((two.mean, two.sd))
    exact = [weighted_tau(order, list(TRUTH.values())) for order in permutations(range(4))]
    assert one.sd == pytest.approx(np.std(exact), abs=0.02)


def test_static_null_of_data_sets_without_common_models_is_narrower():
    rng = np.random.default_rng(0)
    values = [rng.random(11) for _ in range(4)]
    shared = {str(d): {str(i): x for i, x in enumerate(v)} for d, v in enumerate([values[0]] * 4)}
    apart = {str(d): {f"{d}{i}": x for i, x in enumerate(v)} for d, v in enumerate(values)}
    ratio = static_order_null(shared, n=4000).sd / static_order_null(apart, n=4000).sd
    assert ratio == pytest.approx(2, abs=0.15)  # √4


def test_static_null_ignores_data_sets_without_an_order():
    flat = {"a": 1, "b": 1}
    assert static_order_null({"x": TRUTH, "flat": flat}, n=50).sd > 0
    null = static_order_null({"flat": flat}, n=50, observed=0.5)
    assert all(map(math.isnan, (null.sd, null.p_value)))
    assert math.isnan(static_order_null({"x": TRUTH}, n=50).p_value)


# Reports ---------------------------------------------------------------------------------------
def test_evaluation_holds_the_single_figures():
    scores = {"a": 2, "b": 3, "c": 2, "d": 1}
    report = evaluate(scores, TRUTH, k=[1, 2, 4], n_permutations=99, seed=3)
    for figure in AGREEMENT:
        assert report.figures[figure.__name__] == figure(scores, TRUTH)
    assert report.p_value == permutation_p_value(scores, TRUTH, n=99, seed=3)
    assert report.without_one == leave_models_out(scores, TRUTH, 1)[:2]
    assert report.without_two == leave_models_out(scores, TRUTH, 2)[:2]
    assert report.figures["regret_at_2"] == regret_at_k(scores, TRUTH, 2)
    assert report.figures["best_in_top_2"] == hit_at_k(scores, TRUTH, 2, of="best")
    assert math.isnan(report.figures["regret_at_4"])  # any order would be perfect
    assert (report.n_models, report.n_ties, report.picks) == (4, 2, ("b",))
    assert repr(pickle.loads(pickle.dumps(report))) == repr(report)


def test_undefined_is_shown_and_stored_as_such():
    report = evaluate([1, 1, 1], [1, 2, 3], n_permutations=9)
    assert (report.n_ties, report.picks) == (3, ("0", "1", "2"))
    assert "figures weighted_tau   nan\n" in repr(report)
    data = json.loads(report.to_json())
    assert data["figures"]["weighted_tau"] is None
    assert (data["figures"]["regret_at_1"], data["figures"]["regret_at_3"]) == (1, None)
    assert all(map(math.isnan, evaluate([1, 1], [1, 2], n_permutations=9).without_one))


@pytest.fixture
def several():
    up = {"a": 1, "b": 2, "c": 3, "d": 4}
    down = {"a": 4, "b": 3, "c": 2, "d": 1}
    truth = {"x": up, "y": {"a": 1, "b": 3, "c": 2, "d": 4}, "z": down}
    return {"x": dict(up), "y": dict(up), "z": dict.fromkeys(up, 1)}, truth


def test_several_data_sets(several):
    scores, truth = several
    result = evaluate_many(scores, truth, k=1, n_permutations=9, n_draws=500)
    y = weighted_tau(scores["y"], truth["y"])
    assert result.means["weighted_tau"] == pytest.approx((1 + y) / 2)
    # On z the scores are all equal; x and z rank the models in opposite ways: no order for y.
    figures = [*(figure.__name__ for figure in AGREEMENT), "static_order"]
    assert result.undefined == dict.fromkeys(figures, 1)
    assert result.interval == pytest.approx((y, 1))
    order = static_order(truth)
    expected = {d: weighted_tau(order[d], truth[d]) for d in truth}
    assert result.static_order == pytest.approx(expected, nan_ok=True)
    assert result.null.observed == result.means["weighted_tau"]
    assert 0 < result.null.p_value < 1
    assert "undefined static_order" in repr(result)
    data = json.loads(result.to_json())["datasets"]
    assert [data[d]["figures"]["weighted_tau"] for d in "xz"] == [1, None]
    assert pickle.loads(pickle.dumps(result)).means == result.means


def test_order_of_data_sets_and_models_does_not_matter(several):
    scores, truth = several
    turned = {d: dict(reversed(one.items())) for d, one in reversed(truth.items())}
    a = evaluate_many(scores, truth, n_permutations=9, n_draws=200)
    b = evaluate_many(scores, turned, n_permutations=9, n_draws=200)
    assert a.interval == b.interval
    assert a.means == pytest.approx(b.means, nan_ok=True)
    assert a.null.p_value == b.null.p_value
    assert a.static_order == pytest.approx(dict(b.static_order), nan_ok=True)


def test_the_baseline_ranks_the_same_models(several):
    scores, truth = several
    scores["x"]["a"] = NAN
    result = evaluate_many(scores, truth, n_permutations=9, n_draws=9)
    rest = {d: dict(one) for d, one in truth.items()}
    del rest["x"]["a"]
    assert result.static_order["x"] == weighted_tau(static_order(rest)["x"], rest["x"])
    assert list(result.datasets["x"].left_out) == ["a"]
    prior = evaluate_many({"a": 1, "b": 2, "c": 3, "d": 4}, truth, n_permutations=9, n_draws=9)
    assert prior.datasets["z"].figures["weighted_tau"] == -1


def test_data_sets_without_counterpart_are_left_out(several):
    scores, truth = several
    scores |= {"w": scores["x"], "y": {"a": 1, "q": 2}}
    del scores["z"]
    result = evaluate_many(scores, truth, n_permutations=9, n_draws=9)
    assert list(result.datasets) == ["x"]
    assert (result.left_out["w"], result.left_out["z"]) == ("no truth", "no scores")
    assert "share 1" in result.left_out["y"]
    # One data set has neither an interval nor other data sets to learn an order from.
    assert all(map(math.isnan, (*result.interval, result.static_order["x"])))


# Files -----------------------------------------------------------------------------------------
@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "file.csv"  # told apart by content, not by suffix
        path.write_text(text, encoding="utf-8", newline="")
        return path

    return write


def test_read_a_ranking(tmp_path):
    ranking().to_json(tmp_path / "ranking.json")
    scores = read_scores(tmp_path / "ranking.json")
    assert isinstance(scores, Ranking)
    assert scores.failed == {"d": "OSError: no weights"}
    ranking().to_csv(tmp_path / "ranking.csv")
    table = read_scores(tmp_path / "ranking.csv")
    assert table == pytest.approx(dict(scores), nan_ok=True)
    assert weighted_tau(table, TRUTH) == weighted_tau(scores, TRUTH)


def test_read_json(write):
    assert read_truth(write('{"a": 1, "b": 2.5}')) == {"a": 1.0, "b": 2.5}
    nested = write('\n{"x": {"a": 1}, "y": {"a": 2, "b": 3}}')
    assert read_truth(nested) == {"x": {"a": 1}, "y": {"a": 2, "b": 3}}
    scores = read_scores(write('{"a": 1, "b": null}'))
    assert scores == pytest.approx({"a": 1, "b": NAN}, nan_ok=True)


@pytest.mark.parametrize(
    "text",
    [
        "model,score\na,1\nb,2.5\n",
        "Backbone;Score\r\na;1\r\n\r\nb;2.5\r\n",
        "name\tvalue\na\t1\nb\t2.5",
        '\ufeffscore,rank,name\n1,2,"a"\n2.5,1,b\n',
        ",arch,top1\n0,a,1\n1,b,2.5\n",  # pandas' row counter; neither column has a known name
        "model, accuracy, params\na, 1, 5\nb, 2.5, 6\n",
    ],
)
def test_read_csv(write, text):
    assert read_scores(write(text)) == {"a": 1, "b": 2.5}
    assert read_truth(write(text)) == {"a": 1, "b": 2.5}


def test_read_csv_with_more_columns(write):
    path = write("accuracy,model,score\n80,a,1\n90,b,2\n")
    assert read_scores(path) == {"a": 1, "b": 2}
    assert read_truth(path) == {"a": 80, "b": 90}
    path = write("dataset,model,accuracy\nx,a,1\nx,b,2\ny,a,3\n")
    assert read_truth(path) == {"x": {"a": 1, "b": 2}, "y": {"a": 3}}
    path = write("model,img_size,top1\na,224,80\nb,384,85\n")
    assert read_truth(path, column="top1") == {"a": 80, "b": 85}
    with pytest.raises(ValueError, match=r"`column` must be one of \['model', 'img_size', 'top1'"):
        read_truth(path, column="top5")


@pytest.mark.parametrize("cell", ["", "nan", "NaN", "failed", "None"])
def test_failed_models_in_csv(write, cell):
    path = write(f"model,score\na,1\nb,{cell}\nc,3\n")
    assert math.isnan(read_scores(path)["b"])
    with pytest.raises(ValueError, match=r"file.csv must be finite but 'b' is"):
        read_truth(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": must hold scores or accuracies but is empty"),
        ('{"a": 1', r": must be valid JSON \(Expecting"),
        ("{}", ": must hold a ranking"),
        ("[1, 2]", ": must hold a ranking"),
        ('{"x": {"a": 1}, "b": 2}', ": must hold a ranking"),
        ('{"a": "x"}', " must hold numbers but 'a' is 'x'"),
        ('{"x": {"a": [1]}}', r" x must hold numbers but 'a' is \[1\]"),
        ("a,1\nb,2\n", r": must hold column names, .* and rows below: \['a', '1'\]"),
        ("model,score\n", ": must hold column names, .* and rows below"),
        ("model,score\na,1\nb\n", ", row 3: must have 2 fields like the header"),
        ("model,score\na,1\nb,x\n", " must hold numbers but 'b' is 'x'"),
        ("model,score\na,1\na,2\n", ", row 3: must name each model once but has 'a'"),
        ("model,score\n,1\n", ", row 2: must name each model once but has ''"),
        ("score,value\n1,2\n", ": must have a column backbone, model or name but has"),
        ("model,p,q\na,1,2\n", ": must have one column of numbers, .* but has 2: p, q; pass"),
        ("model,note\na,x\n", ": must have one column of numbers, .* but has 0: none"),
    ],
)
def test_errors_name_file_and_place(write, text, message):
    with pytest.raises(ValueError, match=rf"file\.csv{message}"):
        read_scores(write(text))


def test_two_rankings_are_compared_by_what_they_have_in_common():
    from sfda_tune.selection.comparison import compare

    a = {"x": 0.9, "y": 0.8, "z": 0.7, "only": 1.0, "failed": None}
    b = {"y": 5.0, "x": 4.0, "z": 3.0, "new": 9.0, "failed": 1.0}
    found = compare(a, b)
    moves = [(r["backbone"], r["a"], r["b"], r["moved"]) for r in found.rows]
    assert moves == [("y", 2, 1, 1), ("x", 1, 2, -1), ("z", 3, 3, 0)]
    assert (found.only_a, found.only_b) == (("only",), ("failed", "new"))
    assert found.kendall_tau == pytest.approx(1 / 3)
    assert str(found).startswith("The first is y now, number 2 before; x is number 2.")
    with pytest.raises(ValueError, match="share none"):
        compare({"a": 1.0}, {"b": 1.0})


def test_compared_rankings_say_in_what_they_differ():
    from sfda_tune.selection.comparison import compare

    scores = [Score("a", 0.5), Score("b", 0.4)]
    one = Ranking(scores, "sfda (loo)", info={"n_samples": 100, "fingerprint": "p"})
    other = Ranking(scores, "knn", info={"n_samples": 200, "fingerprint": "q"})
    assert compare(one, one).differences == ()
    assert compare(one, other).differences == (
        "They differ in metric: sfda (loo) and knn.",
        "They differ in number of images: 100 and 200.",
        "They differ in images.",
    )


def test_an_evaluation_in_sentences_speaks_of_what_is_lost():
    truth = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}
    right = evaluate({"a": 4, "b": 3, "c": 2, "d": 1}, truth).describe()
    assert "Taking the first of these 4, a, loses nothing." in right
    assert "100 % of the pairs are in the right order" in right
    wrong = evaluate({"a": 1, "b": 2, "c": 3, "e": 4, "d": 4}, truth).describe()
    assert "d, loses 0.3 against the best" in wrong
    assert "Taking the best of its first three loses 0.1 against the best" in wrong
    assert "0 % of the pairs" in wrong
    assert "Left out: e." in wrong
