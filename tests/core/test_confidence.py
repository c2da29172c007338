import pickle
import re

import numpy as np
import pytest
from scipy.stats import norm, rankdata
from scipy.stats import t as student

import sfda_tune.selection.uncertainty as module
from sfda_tune import Ranking, Score
from sfda_tune.selection.diagnostics import diagnose
from sfda_tune.selection.uncertainty import (
    bootstrap,
    confidence,
    find_plausible,
    shortlist,
    shrink,
)

FIELDS = (
    "score", "score_interval", "rank_interval", "in_top", "plausible", "separable", "resamples",
    "draws",
)  # fmt: skip


def data(n=4, N=60, C=3, seed=0, step=0.2):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, N)) + rng.normal(size=N) + step * np.arange(n)[:, None]
    return X, rng.permutation(np.arange(N) % C)


def same(a, b):
    return a.names == b.names and a.groups == b.groups and all(
        np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS
    )  # fmt: skip


# What is computed --------------------------------------------------------------------------------
def test_equals_a_loop_over_resamples_with_the_same_draws():
    X, y = data(n=4, N=23, C=4)
    y[:3] = [7, 8, 8]  # a class of one and a class of two
    got = bootstrap(X, y, n_resamples=40, seed=3)
    rng = np.random.default_rng(3)
    first = {int(np.flatnonzero(y == c)[0]) for c in set(y.tolist())}
    for r in range(40):
        u = iter(rng.random(len(y) - len(first)))
        drawn = {c: [] for c in set(y.tolist())}
        for n in range(len(y)):
            if n not in first:
                members = np.flatnonzero(y == y[n])
                drawn[int(y[n])].append(members[int(next(u) * len(members))])
        for place, i in enumerate(got.names):
            total = 0.0
            for c, rows in drawn.items():
                n_c = (y == c).sum()
                if n_c == 1:
                    total += X[i, y == c].sum()
                else:
                    total += n_c / (n_c - 1) * X[i, rows].sum()
            assert got.resamples[r, place] == pytest.approx(total / len(y), rel=1e-12)
    M = got.resamples
    np.testing.assert_allclose(got.score_interval.T, np.quantile(M, [0.05, 0.95], axis=0))
    ranks = rankdata(-got.draws, axis=1)
    top = [[(ranks[:, i] <= j).mean() for j in range(1, 5)] for i in range(4)]
    np.testing.assert_allclose(got.in_top, top)
    np.testing.assert_array_equal(got.draws, shrink(got.score, M, seed=3))
    assert got.n_fixed == 1
    assert got.dof == 23 - len(first)


def test_the_variance_of_resamples_is_the_unbiased_stratified_one():
    X, y = data(n=2, N=40, C=8)
    c = bootstrap(X, y, n_resamples=20_000)
    for place, i in enumerate(c.names):
        groups = [X[i, y == k] for k in range(8)]
        variance = sum((len(g) / 40) ** 2 * g.var(ddof=1) / len(g) for g in groups)
        assert c.resamples[:, place].var() == pytest.approx(variance, rel=0.05)
        assert c.resamples[:, place].mean() == pytest.approx(X[i].mean(), abs=0.01)


def test_two_backbones_agree_with_the_normal_approximation_of_their_paired_difference():
    rng = np.random.default_rng(0)
    hard, d = 5 * rng.normal(size=2000), 0.4 * rng.normal(size=2000)
    d += 0.012 - d.mean()
    y = np.arange(2000) % 2
    c = bootstrap({"a": hard + d, "b": hard}, y, n_resamples=20_000)
    se = np.sqrt(sum(d[y == k].var(ddof=1) / 1000 for k in (0, 1)) / 4)
    z = norm.ppf(0.95)
    low, high = c.difference("a", "b")
    assert low == pytest.approx(0.012 - z * se, abs=0.05 * se)
    assert high == pytest.approx(0.012 + z * se, abs=0.05 * se)
    ahead = (c.resamples[:, 0] > c.resamples[:, 1]).mean()
    assert ahead == pytest.approx(norm.cdf(0.012 / se), abs=0.01)
    assert 0.6 < c.best["a"] < ahead  # part of the lead is luck
    wide = np.ptp(c.score_interval, axis=1)
    np.testing.assert_allclose(wide, 2 * z * 5 / np.sqrt(2000), rtol=0.05)
    assert (wide > 10 * (high - low)).all()  # pairing takes the hardness of the images away
    assert not c.separable[0, 1]  # as 0 lies in the interval
    assert low < 0 < high


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_of_two_backbones_separable_means_that_their_interval_excludes_zero(shift):
    X, y = data(n=2, step=shift)
    c = bootstrap(X, y)
    low, high = c.difference(*c.names)
    assert c.separable[0, 1] == c.separable[1, 0] == (not low < 0 < high) == bool(shift)
    assert c.groups == ((c.names,) if not shift else tuple((name,) for name in c.names))
    assert c.rank_interval.tolist() == ([[1, 1], [2, 2]] if shift else [[1, 2], [1, 2]])


def test_groups_are_maximal_runs_without_a_separable_pair():
    S = np.zeros((5, 5), bool)
    for i, j in [(0, 2), (0, 3), (0, 4), (1, 4), (2, 4)]:
        S[i, j] = S[j, i] = True
    assert module.find_groups(S) == [(0, 2), (1, 4), (3, 5)]
    S = np.zeros((3, 3), bool)
    S[1, 2] = S[2, 1] = True  # the neighbours are separable, the ends are not
    assert module.find_groups(S) == [(0, 2), (2, 3)]
    assert module.find_groups(np.zeros((3, 3), bool)) == [(0, 3)]
    assert module.find_groups(~np.eye(3, dtype=bool)) == [(0, 1), (1, 2), (2, 3)]


def test_intervals_groups_and_probabilities_fit_together():
    X, y = data(n=12, N=100, step=0.08)
    c = bootstrap(X, y)
    (low, high), rank = c.score_interval.T, np.arange(1, 13)
    assert (low <= c.score).all() & (c.score <= high).all()
    assert ((c.rank_interval[:, 0] <= rank) & (rank <= c.rank_interval[:, 1])).all()
    assert (np.diff(c.score) <= 0).all()
    np.testing.assert_allclose(c.in_top.sum(axis=0), rank)
    assert (np.diff(c.in_top, axis=1) >= 0).all()
    np.testing.assert_array_equal(c.in_top[:, -1], 1)
    assert sum(c.best.values()) == pytest.approx(1)
    assert set().union(*c.groups) == set(c.names)
    for group in c.groups:
        places = [c.names.index(name) for name in group]
        assert not c.separable[np.ix_(places, places)].any()
    assert len(c.groups) > 1
    np.testing.assert_array_equal(c.separable, c.separable.T)
    np.testing.assert_array_equal(bootstrap(X, y, k=3).in_top, c.in_top[:, :3])


def test_a_higher_level_gives_wider_intervals_and_separates_less():
    X, y = data(n=8, N=100, step=0.1)
    narrow, wide = bootstrap(X, y, level=0.5), bootstrap(X, y, level=0.99)
    assert (np.ptp(narrow.score_interval, axis=1) < np.ptp(wide.score_interval, axis=1)).all()
    assert (np.ptp(narrow.rank_interval, axis=1) <= np.ptp(wide.rank_interval, axis=1)).all()
    assert (narrow.separable >= wide.separable).all()


# What it does not depend on ----------------------------------------------------------------------
def test_nothing_depends_on_the_order_of_the_backbones_on_blocks_or_on_class_names(monkeypatch):
    X, y = data(n=7, N=101, step=0.05)
    names = list("gfaedcb")
    scores = dict(zip(names, X, strict=True))
    c = bootstrap(scores, y)
    assert same(c, bootstrap(scores, y))
    assert same(c, bootstrap({name: scores[name] for name in sorted(names)}, y))
    assert same(c, bootstrap(scores, [f"class {-label}" for label in y]))
    assert not same(c, bootstrap(scores, y, seed=1))
    for cells in (1, 777, 1 << 22):
        monkeypatch.setattr(module, "CELLS", cells)
        assert same(c, bootstrap(scores, y))
    # Neither do the resamples of one depend on who else is there.
    alone = bootstrap({"a": scores["a"]}, y)
    np.testing.assert_array_equal(alone.resamples[:, 0], c.resamples[:, c.names.index("a")])


def test_a_constant_shifts_the_scores_and_nothing_else():
    X, y = data(n=5)
    a, b = bootstrap(X, y), bootstrap(X + 100, y)
    np.testing.assert_allclose(b.score_interval, a.score_interval + 100)
    np.testing.assert_array_equal(a.rank_interval, b.rank_interval)
    np.testing.assert_array_equal(a.in_top, b.in_top)
    assert a.groups == b.groups


@pytest.mark.parametrize("factor", [1e-140, 2.0**-30, 3.0, 1e140])
def test_a_factor_scales_the_scores_and_nothing_else(factor):
    X, y = data(n=5)
    a, b = bootstrap(X, y), bootstrap(X * factor, y)
    np.testing.assert_allclose(b.score_interval, a.score_interval * factor)
    np.testing.assert_array_equal(a.rank_interval, b.rank_interval)
    np.testing.assert_array_equal(a.in_top, b.in_top)


def test_another_order_of_the_images_is_like_another_seed():
    X, y = data(n=4, N=300)
    order = np.random.default_rng(1).permutation(300)
    a, b = bootstrap(X, y, n_resamples=4000), bootstrap(X[:, order], y[order], n_resamples=4000)
    np.testing.assert_allclose(a.score_interval, b.score_interval, atol=0.02)
    np.testing.assert_allclose(a.in_top, b.in_top, atol=0.05)
    np.testing.assert_array_equal(a.rank_interval, b.rank_interval)


def test_the_input_is_not_changed_and_the_output_is_read_only():
    X, y = data()
    before = X.copy()
    c = bootstrap(X, y)
    np.testing.assert_array_equal(X, before)
    for field in FIELDS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(c, field)[0] = 0
    assert same(c, pickle.loads(pickle.dumps(c)))


# Ties and degenerate input -----------------------------------------------------------------------
def test_equal_backbones_share_rank_probability_and_group():
    X, y = data(n=1, N=50)
    c = bootstrap({"c": X[0], "a": X[0].copy(), "b": X[0], "low": X[0] - 9}, y)
    assert c.names == ("a", "b", "c", "low")
    assert c.best == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3, "low": 0})
    assert c.probability_in_top(2)["b"] == pytest.approx(2 / 3)
    assert c.probability_in_top(3) == pytest.approx({"a": 1, "b": 1, "c": 1, "low": 0})
    assert c.rank_interval.tolist() == [[1, 3], [1, 3], [1, 3], [4, 4]]
    assert c.groups == (("a", "b", "c"), ("low",))
    assert c.difference("a", "b") == (0, 0)
    assert shortlist(c) == ["a"]  # any one of them is a best one


@pytest.mark.parametrize("n", [1, 3, 8, 33])
def test_ties_are_exact_wherever_a_backbone_stands_among_others(n):
    """A matrix product may add up each column in another order; here the sums are exact."""
    rng = np.random.default_rng(n)
    X = rng.lognormal(sigma=3, size=(n, 487))
    c = bootstrap(np.concatenate([X, X[::-1]]), np.arange(487) % 7, n_resamples=99)
    for i in range(n):
        np.testing.assert_array_equal(
            c.resamples[:, c.names.index(i)], c.resamples[:, c.names.index(2 * n - 1 - i)]
        )


def test_ties_within_a_resample_share_too():
    """Right or wrong on 4 images: most resamples tie."""
    c = bootstrap({"a": [1, 0, 1, 0], "b": [0, 1, 1, 0]}, [0, 0, 0, 0], n_resamples=4000)
    tied = (c.resamples[:, 0] == c.resamples[:, 1]).mean()
    assert tied == pytest.approx(1 / 8 + 6 / 32, abs=0.03)  # 3 draws
    assert c.best["a"] == pytest.approx(0.5, abs=0.03)
    assert sum(c.best.values()) == pytest.approx(1)
    only_a = (c.resamples[:, 0] > c.resamples[:, 1]).mean()
    assert c.best["a"] == pytest.approx(only_a + tied / 2)


def test_constant_contributions_give_points():
    y = np.arange(30) % 3
    c = bootstrap({"a": np.full(30, 0.1), "b": np.full(30, 0.3), "c": np.full(30, 0.1)}, y)
    np.testing.assert_allclose(c.score_interval, [[0.3, 0.3], [0.1, 0.1], [0.1, 0.1]])
    assert c.rank_interval.tolist() == [[1, 1], [2, 3], [2, 3]]
    assert c.groups == (("b",), ("a", "c"))
    zero = bootstrap(np.zeros((2, 30)), y)
    assert zero.best == {0: 0.5, 1: 0.5}
    assert zero.groups == ((0, 1),)


def test_a_difference_that_never_varies_is_certain():
    X, y = data(n=1)
    c = bootstrap({"a": X[0], "b": X[0] - 1e-6}, y)
    assert c.separable[0, 1]
    assert c.best == {"a": 1, "b": 0}
    assert c.rank_interval.tolist() == [[1, 1], [2, 2]]


def test_a_difference_of_rounding_is_none():
    X, y = data(n=1)
    c = bootstrap({"a": X[0], "b": np.nextafter(X[0], -9)}, y)
    assert not c.separable.any()
    assert c.groups == (c.names,)


def test_a_single_backbone():
    X, y = data(n=1)
    c = bootstrap(X, y)
    assert c.best == {0: 1.0}
    assert c.rank_interval.tolist() == [[1, 1]]
    assert c.groups == ((0,),)
    assert shortlist(c) == [0]
    assert c.score_interval[0, 0] < c.score[0] < c.score_interval[0, 1]


def test_the_only_image_of_a_class_stays():
    X = np.array([[1.0, 2.0, 3.0, 1000.0]])
    c = bootstrap(X, ["a", "a", "a", "b"])
    assert c.n_fixed == 1
    assert c.resamples.min() >= (3 * 1 + 1000) / 4
    assert c.resamples.max() <= (3 * 3 + 1000) / 4


# Errors ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("per_sample", "labels", "options", "message"),
    [
        ({"a": [1.0, 2], "b": None, "c": None}, [0, 0], {}, "is None for b, c; leave them out"),
        ({"a": [1.0, 2], "b": [1.0]}, [0, 0], {}, "but has 'a' (2,), 'b' (1,); score all"),
        ([1.0, 2], [0, 0], {}, "or have the shape (n_backbones, n_samples) but has (2,)"),
        ({}, [], {}, "at least one backbone and one image but has 0 and 0"),
        (np.ones((2, 0)), [], {}, "at least one backbone and one image but has 2 and 0"),
        (np.ones((2, 3)), [0, 0], {}, "the same number of images but have 3 and 2"),
        (
            {"a": [1.0, 2], "b": [1, np.nan]},
            [0, 0],
            {},
            "must be finite but that of 'b' is nan for image 1 (such backbones: b); leave them",
        ),
        (np.array([[np.inf, -np.inf]]), [0, 0], {}, "that of 0 is inf for image 0"),
        (np.ones((1, 3)), [0, 1, 2], {}, "all 3 classes have one; nothing can be resampled"),
        (np.ones((1, 2)), [0, None], {}, "must not hold missing values"),
        (np.ones((1, 2)), [0, 0], {"n_resamples": 1}, "`n_resamples` must be an integer ≥ 2"),
        (np.ones((1, 2)), [0, 0], {"level": 90}, "`level` must lie in (0, 1) but is 90; 0.9"),
        (np.ones((1, 2)), [0, 0], {"seed": -1}, "`seed` must be an integer ≥ 0 but is -1"),
        (np.ones((1, 2)), [0, 0], {"k": 2}, "`k` must be an integer in 1 … 1 but is 2"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(per_sample, labels, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bootstrap(per_sample, labels, **options)


def test_errors_of_the_result():
    X, y = data(n=2)
    c = bootstrap({"a": X[0], "b": X[1]}, y)
    with pytest.raises(ValueError, match=r"`k` must be an integer in 1 … 2 but is 3"):
        c.probability_in_top(3)
    with pytest.raises(ValueError, match=r"but \['z'\] are not; there are b, a"):
        c.difference("a", "z")
    with pytest.raises(ValueError, match=r"`probability` must lie in \(0, 1\] but is 95"):
        shortlist(c, 95)


# Rankings ----------------------------------------------------------------------------------------
def ranking(X, y, names="abcdefgh", **info):
    scores = [Score(name, row.mean(), row) for name, row in zip(names, X, strict=False)]
    return Ranking([*scores, Score("broken", error="OSError: no")], "toy", y, info)


def test_confidence_of_a_ranking_is_the_bootstrap_of_its_contributions():
    X, y = data()
    r = ranking(X, y)
    c = confidence(r, seed=5, n_resamples=200, level=0.8)
    names = [name for name in r if name != "broken"]
    assert list(c.names) == names
    scores = {name: r.score(name).per_sample for name in reversed(names)}
    assert same(c, bootstrap(scores, y, seed=5, n_resamples=200, level=0.8))
    again = confidence(Ranking.from_json(r.to_json()), seed=5, n_resamples=200, level=0.8)
    assert same(c, again)


def test_images_alone_in_their_class_are_left_out_if_the_values_leave_them_out():
    X, y = data(n=3, N=41)
    y[7] = 9
    kept = y != 9
    X[:, 7] = 0
    scores = [Score(n, row[kept].mean(), row) for n, row in zip("abc", X, strict=True)]
    c = confidence(Ranking(scores, labels=y))
    assert same(c, confidence(ranking(X[:, kept], y[kept])))
    assert c.n_fixed == 1
    assert confidence(ranking(X, y)).n_fixed == 1  # here they count, but do not vary


def test_real_scores_of_sfda_can_be_resampled():
    from sfda_tune.metrics.sfda import sfda

    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    apart = [2.0, 0.0, 1.0]
    results = [sfda(rng.normal(size=(90, 6)) + a * np.eye(3, 6)[y], y) for a in apart]
    scores = [Score(name, r.value, r.per_sample) for name, r in zip("abc", results, strict=True)]
    c = confidence(Ranking(scores, labels=y))
    assert c.names == ("a", "c", "b")
    assert shortlist(c) == ["a"]


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (Ranking([Score("a", error="no")]), "`ranking` must have a backbone that could be scored"),
        (Ranking([Score("a", 1.0, [1.0, 1.0])]), "`ranking` must have labels but has none"),
        (
            Ranking([Score("a", 1.0, [1.0, 1.0]), Score("b", 0.5)], labels=[0, 0]),
            "is None for b; leave them out",
        ),
        (Ranking([Score("a", 1.0, [1.0, 1.0])], labels=[0, 0, 0]), "but have 2 and 3"),
        (
            Ranking([Score("a", 2.0, [1.0, 1.0])], labels=[0, 0]),
            "must be the means of their `per_sample` but 'a' has 2 and the mean 1; only scores",
        ),
    ],
)
def test_rankings_that_cannot_be_resampled(r, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        confidence(r)


def test_the_shortlist_leaves_out_whom_the_others_surely_beat():
    """Against a loop over the definition of `find_plausible`."""
    X, y = data(n=8, N=100, step=0.06)
    c = bootstrap(X, y)
    M, R = c.resamples, len(c.resamples)
    nu = 1 / (1 / c.dof + 1 / R)
    for probability in (0.3, 0.5, 0.8, 0.95, 1.0):
        expected = []
        for i, name in enumerate(c.names):
            others = [j for j in range(8) if j != i]
            error = [(M[:, j] - M[:, i]) - (c.score[j] - c.score[i]) for j in others]
            sigma = [np.sqrt(np.mean(e**2)) for e in error]
            T = max((c.score[j] - c.score[i]) / s for j, s in zip(others, sigma, strict=True))
            T = norm.isf(student.sf(T, nu)) if T > 0 else T
            k = (np.max([e / s for e, s in zip(error, sigma, strict=True)], axis=0) >= T).sum()
            if (k + 1 + np.sqrt(k)) / (R + 1) > 1 - probability or not expected:
                expected.append(name)
        assert shortlist(c, probability) == expected
    assert len(shortlist(c, 0.5)) < len(shortlist(c, 0.95)) < len(shortlist(c, 1.0)) == 8
    np.testing.assert_array_equal(find_plausible(c.score, M, dof=c.dof), c.plausible)


def test_the_shortlist_needs_only_one_of_several_that_are_best_together():
    """a and b are equal in every resample; c wins where they lose."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    x -= x.mean()
    c = bootstrap({"a": x, "b": x, "c": -x}, np.zeros(40))
    assert c.best["a"] == c.best["b"] == pytest.approx(0.25, abs=0.05)
    assert sorted(shortlist(c, 1.0)) == ["a", "c"]


def test_the_table_and_the_records_are_in_rank_order():
    X, y = data(n=3, step=1.0)
    c = bootstrap(dict(zip(["resnet", "vit", "a"], X, strict=True)), y)
    assert [r["backbone"] for r in c.records()] == ["a", "vit", "resnet"]
    assert c.records()[0] | {"score": 0, "interval_low": 0, "interval_high": 0} == {
        "backbone": "a", "score": 0, "interval_low": 0, "interval_high": 0,
        "rank": 1, "rank_low": 1, "rank_high": 1, "p_best": 1.0, "group": "a",
    }  # fmt: skip
    lines = repr(c).splitlines()
    assert lines[0] == "Confidence of 3 backbones (90% intervals, 1000 resamples)"
    assert re.match(r" *1 \[1–1\] +a +\d\.\d{4} \[\d\.\d{4}, \d\.\d{4}\] +1\.000 +a$", lines[2])


# Promises, by simulation -------------------------------------------------------------------------
def coverage(seeds, n, y, spread):
    rng = np.random.default_rng(0)
    inside = []
    for seed in range(seeds):
        theta = spread * np.sqrt(2 / len(y)) * rng.normal(size=n) + 1e-9 * np.arange(n)
        X = theta[:, None] + rng.normal(size=len(y)) + rng.normal(size=(n, len(y)))
        c = bootstrap(X, y, n_resamples=300, seed=seed)
        order = list(c.names)
        rank = rankdata(-theta)[order]
        (low, high), (first, last) = c.score_interval.T, c.rank_interval.T
        in_rank = (first <= rank) & (rank <= last)
        in_score = (low <= theta[order]) & (theta[order] <= high)
        inside.append((in_score.mean(), in_rank.mean(), in_rank[0], in_rank[rank == 1][0]))
    return np.mean(inside, axis=0)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize(("n_c", "seeds"), [(5, 150), (30, 150)])
def test_intervals_cover_the_truth(spread, n_c, seeds):
    score, rank, observed_first, true_first = coverage(seeds, 10, np.arange(10 * n_c) % 10, spread)
    assert 0.86 < score < 0.94
    assert min(rank, observed_first, true_first) > 0.85


@pytest.mark.parametrize("n", [5, 30])
@pytest.mark.parametrize(("spread", "longest"), [(0.0, 1.0), (0.5, 0.95), (2.0, 0.6), (5.0, 0.4)])
def test_the_best_is_plausible_in_95_of_100_data_sets(n, spread, longest):
    """With images, and beside an oracle, in tests/benchmarks/shortlist_coverage.py."""
    rng, seeds, held = np.random.default_rng(n), 120, []
    for _ in range(seeds):
        theta = spread * np.sqrt(2) * rng.normal(size=n)
        s = theta + rng.normal(size=n)
        stays = find_plausible(s, s + rng.normal(size=(300, n))) > 0.05
        best = theta.argmax() if spread else slice(None)  # any of equal ones
        held.append((stays[best].mean(), stays.sum()))
    covered, length = np.mean(held, axis=0)
    assert covered > 0.93
    assert length <= longest * n


def test_the_shortlist_holds_the_best_where_candidates_are_close():
    rng, N, n, held = np.random.default_rng(0), 150, 12, []
    for seed in range(40):
        theta = 0.5 * np.sqrt(2 / N) * rng.normal(size=n)
        X = theta[:, None] + rng.normal(size=N) + rng.normal(size=(n, N))
        c = bootstrap(X, np.arange(N) % 5, n_resamples=200, seed=seed)
        held.append(int(theta.argmax()) in shortlist(c))
    assert np.mean(held) > 0.92  # .80 by the resamples as they are


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_p_best_is_how_often_they_are_the_best(spread):
    rng, n, said, right, plain = np.random.default_rng(0), 12, [], [], []
    for seed in range(150):
        theta = spread * np.sqrt(2) * rng.normal(size=n)
        s = theta + rng.normal(size=n)
        M = s + rng.normal(size=(400, n))
        first = s.argmax()
        said.append((shrink(s, M, seed=seed).argmax(axis=1) == first).mean())
        plain.append((M.argmax(axis=1) == first).mean())
        right.append(theta.argmax() == first)
    error = np.std(right) / np.sqrt(150)
    assert abs(np.mean(said) - np.mean(right)) < 3 * error
    assert np.mean(plain) > np.mean(right) + (2 * error if spread < 1 else 0)


def test_equal_backbones_are_seldom_declared_different():
    rng, y = np.random.default_rng(0), np.arange(200) % 5
    declared = [
        bootstrap(rng.normal(size=(10, 200)), y, n_resamples=300).separable.any()
        for _ in range(300)
    ]
    assert np.mean(declared) < 0.15


@pytest.mark.slow
def test_many_images_and_backbones_take_seconds():
    import time

    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(50, 5000)), np.arange(5000) % 100
    started = time.process_time()
    bootstrap(X, y)
    assert time.process_time() - started < 2


# Diagnostics -------------------------------------------------------------------------------------
def kinds(r):
    return [d.kind for d in diagnose(r)]


def one(r, kind):
    (found,) = [d for d in diagnose(r) if d.kind == kind]
    assert str(found) == f"{found.severity}: {found.message}"
    return found


def test_a_sound_ranking_has_no_diagnostics():
    widths = [512, 64, 256, 128, 32]
    scores = [
        Score(f"m{d}", 0.5 + 0.01 * i, n_samples=5000, n_dims=d, details={"lambda": 0.5})
        for i, d in enumerate(widths)
    ]
    labels = np.arange(5000) % 10
    info = {"classes": list("abcdefghij"), "unreadable": {}}
    assert kinds(Ranking(scores, "sfda (official)", labels, info)) == []
    assert diagnose(Ranking([])) == []


def test_diagnose_failed():
    r = Ranking([Score("a", 1.0), Score("b", error="OSError: no weights")])
    found = one(r, "failed")
    assert found.severity == "warning"
    assert "1 of 2 backbones could not be scored (b; b: OSError: no weights)" in found.message


@pytest.mark.parametrize(
    ("values", "metric", "message"),
    [
        ([0.5, 0.5, 0.4, 0.4], "", "have the score 0.5 exactly (and 1 other tie): m0, m1"),
        ([1 - 1e-7, 1 - 2e-7, 0.2], "sfda (official)", "2 backbones score more than 1 − 1e-6"),
        ([1.0, 1.0], "sfda (official)", "m0, m1; use variant='loo' or more images"),
        ([0.5, 0.4, 1.0], "", None),
        ([0.5, 0.99998, 0.99999], "sfda (official)", None),
        ([1.5, 1.7, 2.0], "logme", None),  # 1 is not the largest value of this metric
        ([-1.0, 2.0, 2.1], "logme", None),
    ],
)
def test_diagnose_ties(values, metric, message):
    r = Ranking([Score(f"m{i}", v) for i, v in enumerate(values)], metric)
    if message is None:
        assert "ties" not in kinds(r)
    else:
        assert message in one(r, "ties").message


@pytest.mark.parametrize(
    ("metric", "details", "n_samples", "expected"),
    [
        ("sfda (official)", {}, 499, True),
        ("sfda (official)", {}, 500, False),
        ("sfda (paper)", {}, 499, True),
        ("sfda (loo)", {}, 499, False),
        ("knn", {}, 499, False),
        ("mine", {"in_sample": True}, 499, True),
        ("sfda (official)", {"in_sample": False}, 499, False),
    ],
)
def test_diagnose_few_samples(metric, details, n_samples, expected):
    scores = [Score(f"m{d}", d, None, n_samples, d, details) for d in (10, 99, 100)]
    r = Ranking(scores, metric)
    assert ("few_samples" in kinds(r)) == expected
    if expected:
        message = one(r, "few_samples").message
        assert "1 backbone has fewer than 5 images per feature (widest: m100, 499" in message
        assert message.endswith("or at least 500 images.")


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ([64, 128, 256, 512, 1024], "1.00"),
        ([64, 256, 128, 1024, 512], "0.80"),
        ([64, 1024, 128, 256, 512], False),  # 0.40
        ([64, 128, 256, 512], False),  # too few to tell
        ([1024, 512, 256, 128, 64], False),
        ([64, 64, 64, 64, 64], False),
        ([512, 64, 256, 1024, 128], False),
    ],
)
def test_diagnose_width(widths, expected):
    r = Ranking([Score(f"m{i}", i, n_dims=d) for i, d in enumerate(widths)])
    assert ("width" in kinds(r)) == bool(expected)
    if expected:
        assert f"follow the feature width (Spearman {expected} over 5" in one(r, "width").message


def test_diagnose_small_classes():
    labels = np.repeat([0, 1, 2], [10, 4, 1])
    info = {"classes": ["cat", "dog", "owl", "elk"]}
    found = one(Ranking([], labels=labels, info=info), "small_classes")
    assert found.severity == "warning"
    assert "3 classes have fewer than 5 images (elk: 0, owl: 1, dog: 4)" in found.message
    found = one(Ranking([], labels=labels[:-1]), "small_classes")
    assert found.severity == "note"
    assert "1 class has fewer than 5 images (class 1: 4)" in found.message
    assert kinds(Ranking([], labels=np.repeat([0, 1], 5))) == []


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        (1e-10, "at the lower bound (nothing is shrunk: overfits) for m"),
        (0.9995, "at 1 (the covariance is ignored) for m"),
        (0.5, None),
        (None, None),
    ],
)
def test_diagnose_shrinkage(lam, message):
    r = Ranking([Score("m", 0.5, details={"lambda": lam}), Score("other", 0.4)])
    assert [message is not None] == [kinds(r) == ["shrinkage"]]
    if message:
        assert message in one(r, "shrinkage").message


def test_diagnose_unreadable_and_warnings_come_first():
    r = Ranking([Score("m", error="no")], info={"unreadable": {"a.png": "truncated"}})
    assert kinds(r) == ["failed", "unreadable"]
    assert "1 image could not be read and took no part (a.png)" in one(r, "unreadable").message
