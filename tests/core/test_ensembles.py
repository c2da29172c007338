import pickle
import tracemalloc

import numpy as np
import pytest

from sfda_tune import Features
from sfda_tune.metrics._fisher import Scatter, load
from sfda_tune.metrics.sfda import sfda
from sfda_tune.selection.ensembles import Ensemble, leave_one_out, select_ensemble, t_ens

METHODS = ("sfda", "greedy")


def make_hub(seed=0, n=120, noise=0):
    """Two redundant strong backbones; a weaker one that alone separates classes 4 and 5."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 6
    one_hot = np.eye(6)[y]

    def wide(centres):
        return np.hstack([centres + rng.normal(size=(n, 6)), rng.normal(size=(n, noise))])

    strong = wide(4 * one_hot * [1, 1, 1, 1, 0, 0])
    rotation = np.linalg.qr(rng.normal(size=(strong.shape[1],) * 2))[0]
    twin = strong @ rotation + 0.2 * rng.normal(size=strong.shape)
    return {"strong": strong, "twin": twin, "other": wide(3.5 * one_hot * [0, 0, 1, 1, 1, 1])}, y


def same(a: Ensemble, b: Ensemble, tolerance=1e-10):
    assert a.backbones == b.backbones
    np.testing.assert_allclose(a.score, b.score, atol=tolerance)
    assert a.accuracy == b.accuracy
    assert dict(a.single) == pytest.approx(dict(b.single), abs=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("seed", "n", "noise"), [(0, 120, 0), (1, 60, 0), (2, 90, 100)])
def test_two_redundant_strong_ones_and_a_complementary_weaker_one(method, seed, n, noise):
    hub, y = make_hub(seed, n, noise)
    chosen = select_ensemble(hub, y, 2, method=method)
    assert set(list(chosen.single)[:2]) == {"strong", "twin"}  # the top 2 by single score
    assert "other" in chosen.backbones
    assert chosen.accuracy[1] > chosen.accuracy[0] + 0.05


@pytest.mark.parametrize("method", METHODS)
def test_order_of_backbones_rows_and_class_names_do_not_matter(method):
    hub, y = make_hub(n=60, noise=60)
    chosen = select_ensemble(hub, y, 3, method=method)
    assert select_ensemble(dict(reversed(hub.items())), y, 3, method=method) == chosen
    rows = np.random.default_rng(1).permutation(len(y))
    same(select_ensemble({b: x[rows] for b, x in hub.items()}, y[rows], 3, method=method), chosen)
    renamed = [("f", "b", 2.5, -1, (1,), "a")[c] for c in y]
    same(select_ensemble(hub, renamed, 3, method=method), chosen)


@pytest.mark.parametrize("method", METHODS)
def test_scale_and_shift_of_one_backbone_do_not_matter(method):
    hub, y = make_hub()
    before = {name: x.copy() for name, x in hub.items()}
    chosen = select_ensemble(hub, y, 3, method=method)
    same(select_ensemble(hub | {"other": 1e4 * hub["other"] - 7}, y, 3, method=method), chosen)
    assert all(np.array_equal(hub[name], before[name]) for name in hub)


@pytest.mark.parametrize("method", METHODS)
def test_from_one_to_all(method):
    hub, y = make_hub()
    everything = select_ensemble(hub, y, 3, method=method)
    assert sorted(everything.backbones) == sorted(hub)
    for k in (1, 2):
        assert select_ensemble(hub, y, k, method=method).backbones == everything.backbones[:k]
    for name, x in hub.items():
        metric = sfda(x, y, variant="loo", normalize="standardize")
        own = metric.value if method == "sfda" else metric.details["log_probability_scaled"]
        assert everything.single[name] == pytest.approx(own, abs=1e-12)
        assert everything.details["temperature"][name] == metric.details["temperature"]
    best = max(everything.single, key=everything.single.__getitem__)
    assert everything.backbones[0] == best == next(iter(everything.single))
    if method == "sfda":
        top = select_ensemble(hub, y, 3, r=1).backbones
        assert top == tuple(everything.single)
        assert select_ensemble(hub, y, 2, r=0).backbones == (best, "other")


def test_a_forecast_gives_the_order_and_features_the_rest():
    hub, y = make_hub()
    plain = select_ensemble(hub, y, 3)
    order = list(plain.single)
    assert select_ensemble(hub, y, 3, order=order) == plain
    turned = order[::-1]
    assert select_ensemble(hub, y, 3, r=1, order=turned).backbones == tuple(turned[:3])
    assert select_ensemble(hub, y, 3, order=turned).backbones[0] == turned[0]
    assert select_ensemble(hub, y, 3, order=turned).single == plain.single


def loo_posteriors(X, y, temperature):
    """Refit without each sample; the ridge is that of all samples."""
    X = (X - X.mean(0)) / X.std(0)
    n, dims = X.shape

    def within(rows):
        means = np.array([X[rows & (y == c)].mean(0) for c in range(y.max() + 1)])
        return means, (X - means[y])[rows].T @ (X - means[y])[rows] / rows.sum()

    ridge = 0.5 * np.trace(within(np.ones(n, bool))[1]) / dims * n / (n - 1)
    posteriors = []
    for i in range(n):
        rows = np.arange(n) != i
        means, S = within(rows)
        d = X[i] - means
        squares = np.sum(d @ np.linalg.inv(0.5 * S + ridge * np.eye(dims)) * d, axis=1)
        p = np.exp(-squares / 2) * np.bincount(y[rows])
        posteriors.append((p / p.sum()) ** temperature)
    return np.array([p / p.sum() for p in posteriors])


def test_greedy_against_a_plain_loop():
    hub, y = make_hub(3, n=60)
    hub["noise"] = np.random.default_rng(3).normal(size=(60, 4))
    result = select_ensemble(hub, y, 4, method="greedy")
    p = {b: loo_posteriors(x, y, result.details["temperature"][b]) for b, x in hub.items()}
    members = []
    for chosen, score, accuracy in zip(
        result.backbones, result.score, result.accuracy, strict=True
    ):
        means = {b: np.mean([p[m] for m in [*members, b]], axis=0) for b in set(hub) - {*members}}
        values = {b: np.mean(np.log(mean[np.arange(60), y])) for b, mean in means.items()}
        assert chosen == max(values, key=values.__getitem__)
        assert score == pytest.approx(values[chosen], abs=1e-10)
        assert accuracy == np.mean(means[chosen].argmax(axis=1) == y)
        members.append(chosen)


def test_fisher_features_against_those_of_the_fit():
    """With well separated classes of many samples, leaving one out changes little."""
    hub, y = make_hub(n=1200)
    features = hub["strong"] + hub["other"]
    x = load(features, y)
    x.normalize("standardize")
    S_W = Scatter(x)
    fit = S_W.discriminants(0.5, 0.5 * S_W.trace / x.D).fisher_features()
    x_hat = fit.Z + fit.M[fit.y]
    x_hat /= np.linalg.norm(x_hat, axis=1, keepdims=True)
    F = leave_one_out("sum", features, y)[1]
    np.testing.assert_allclose(F @ F.T, x_hat @ x_hat.T, atol=0.05)  # but for a rotation


def test_complementarity_by_singular_values():
    hub, y = make_hub()
    chosen = select_ensemble(hub, y, 2, r=0.3)
    a, b = chosen.backbones
    F = {m: leave_one_out(m, x, y)[1] for m, x in hub.items()}
    norm = {m: np.linalg.norm(np.stack([F[a], F[m]], 1), "nuc", axis=(1, 2)).mean() for m in F}
    T_com = (norm[b] - norm[a]) / (max(norm.values()) - norm[a])
    s = {m: value - 19 / 119 for m, value in chosen.single.items()}
    assert chosen.score[1] == pytest.approx(0.3 * s[b] / s[a] + 0.7 * T_com, abs=1e-9)
    F = [np.array([row]) for row in ([1.0, 0], [1.0, 0], [0, 0], [0, 1.0])]
    np.testing.assert_allclose(t_ens([0], np.ones(4), F, 0.0), [0, 0, 0, 1])  # copy, constant


def test_memory_grows_with_the_backbones_and_not_with_their_pairs():
    rng, peaks = np.random.default_rng(0), []
    y = np.arange(300) % 3
    for m in (20, 80):
        hub = {f"b{i:02}": rng.normal(size=(300, 4)) + np.eye(3, 4)[y] for i in range(m)}
        tracemalloc.start()
        select_ensemble(hub, y, 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 5 * peaks[0]  # 16 times, if it were the pairs


@pytest.mark.parametrize("method", METHODS)
def test_copies_are_taken_by_name_and_add_nothing(method):
    hub, y = make_hub()
    copies = {"c": hub["strong"], "b": hub["strong"].copy(), "a": 0.3 * hub["strong"]}
    chosen = select_ensemble(copies, y, 3, method=method)
    assert chosen.backbones == ("a", "b", "c")
    assert len(set(chosen.accuracy)) == 1
    assert chosen.score[2] == pytest.approx(0.5 if method == "sfda" else chosen.score[0])
    chosen = select_ensemble(copies | {"other": hub["other"]}, y, 2, method=method)
    assert chosen.backbones == ("a", "other")


@pytest.mark.parametrize("method", METHODS)
def test_singletons_and_constant_features(method):
    hub, y = make_hub(n=60)
    alone = [*y[:-2], "only", "single"]
    hub["constant"] = np.ones((60, 3))
    chosen = select_ensemble(hub, alone, 4, method=method)
    assert chosen.details["n_singletons"] == 2
    assert chosen.backbones[1] == "other"
    assert chosen.backbones[3] == "constant"
    assert np.isfinite([*chosen.score, *chosen.accuracy, *chosen.single.values()]).all()


def test_features_values_pickle_and_text():
    hub, y = make_hub()
    hub = {b: x.astype(np.float32) for b, x in hub.items()}
    values = {b: Features(x, [f"class {c}" for c in y], backbone=b) for b, x in hub.items()}
    chosen = select_ensemble(values, None, 2)
    assert chosen == select_ensemble(values, y, 2) == select_ensemble(hub, y, 2)
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert hash(chosen) == hash(pickle.loads(pickle.dumps(chosen)))
    assert [line.split()[0] for line in str(chosen).splitlines()] == ["sfda", *chosen.backbones]
    with pytest.raises(ValueError, match=r"`labels` must put the same rows .* 'other'"):
        select_ensemble({"other": values["other"]}, y[::-1] // 2, 1)


X, Y = np.random.default_rng(0).normal(size=(6, 2)), [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features_by_backbone": {}}, "`features_by_backbone` must map"),
        ({"features_by_backbone": [X]}, "`features_by_backbone` must map"),
        ({"features_by_backbone": {"a": X, "b": X[:5]}}, r"\['b'\]`: `labels` must .* 6 .* 5"),
        ({"features_by_backbone": {"a": X * np.nan}}, r"\['a'\]`: `features` must be finite"),
        ({"labels": None}, "`labels` must be given"),
        ({"labels": range(6)}, "`labels` must hold two classes or more, one of them with two"),
        ({"labels": [1] * 6}, "`labels` must hold two classes or more"),
        *(({"k": k}, "`k` must be an integer in 1 … 1") for k in (0, 2, 1.0, True, "1")),
        *(({"r": r}, r"`r` must be a number in \[0, 1\]") for r in (-0.1, 1.1, np.nan, "1", True)),
        *(({"method": m}, "`method` must be 'sfda' or 'greedy'") for m in ("top", None, [])),
        *(({"order": o}, "`order` must be a list of all") for o in ([], "a b", ["b"], [1], 3)),
        ({"order": ["a"], "method": "greedy"}, "`order` must be .* 'sfda', else None"),
    ],
)
def test_refuses(change, message):
    arguments = {"features_by_backbone": {"a": X}, "labels": Y, "k": 1} | change
    with pytest.raises(ValueError, match=message):
        select_ensemble(**arguments)
