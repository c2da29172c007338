from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from sfda_tune import RankingInterruptedError, open_dataset, rank, resolve_backbones
from sfda_tune.pipelines.progress import NullProgress
from sfda_tune.pipelines.ranking import find_candidate_facts, find_prices, measure_sizes
from sfda_tune.selection.advice import recommend
from sfda_tune.selection.odds import find_odds
from sfda_tune.selection.racing import RaceConfig, make_rungs, run
from sfda_tune.selection.racing import simulate as simulate_final

CPU = {"device": "cpu", "workers": 0, "cache": False}


def simulate(n=12, N=640, seed=0, spread=1.0):
    """Per-image terms of n backbones whose true scores are `spread` apart, on a decaying curve."""
    rng = np.random.default_rng(seed)
    truth = spread * np.sort(rng.normal(size=n))[::-1]
    hardness = rng.normal(size=N)
    return truth, truth[:, None] + hardness + rng.normal(size=(n, N))


def race_on(terms, labels, **options):
    rungs = make_rungs(open_dataset((np.zeros((len(labels), 2, 2), np.uint8), labels.tolist())))
    names = [str(i) for i in range(len(terms))]
    asked = []

    def measure(active, rows):
        asked.append((list(active), rows))
        return rows, {name: terms[int(name)][rows] for name in active}

    return run(names, rungs, labels, measure, RaceConfig(**options)), asked


def test_rungs_are_nested_stratified_and_double():
    labels = [0] * 600 + [1] * 200
    rungs = make_rungs(open_dataset((np.zeros((800, 2, 2), np.uint8), labels)), seed=3)
    assert [len(rows) for rows in rungs] == [50, 100, 200, 400, 800]
    for few, more in pairwise(rungs):
        assert set(few) < set(more)
    for rows in rungs:
        assert np.isclose((rows < 600).mean(), 0.75, atol=0.02)
        assert (np.diff(rows) > 0).all()


def test_the_top_is_that_of_the_full_run():
    labels = np.arange(640) % 4
    wrong, used = 0, []
    for seed in range(20):
        _, terms = simulate(seed=seed)
        result, _ = race_on(terms, labels, top=3, seed=seed)
        best = np.argsort(-terms.mean(axis=1))[:3].astype(str)
        wrong += bool(set(best) & set(result.dropped))
        used.append(result.n_forward / result.n_full)
    assert wrong <= 2  # .05 of 20, with room for chance
    assert np.mean(used) < 0.6


def test_backbones_that_are_alike_all_stay():
    rng = np.random.default_rng(0)
    terms = rng.normal(size=(6, 640)) * 0.5 + rng.normal(size=640)
    result, asked = race_on(terms, np.arange(640) % 4, top=3)
    assert len(result.dropped) <= 1
    assert [len(rows) for _, rows in asked] == [40, 80, 160, 320, 640]


def test_whoever_left_sees_no_further_image():
    _, terms = simulate(spread=3.0)
    result, asked = race_on(terms, np.arange(640) % 4, top=2)
    assert len(result.dropped) >= 8
    for name, out in result.dropped.items():
        assert max(len(rows) for active, rows in asked if name in active) == out["images"]
        assert out["p_top"] < 0.0125
    forward = seen = 0
    for active, rows in asked:
        forward += len(active) * (len(rows) - seen)
        seen = len(rows)
    assert forward == result.n_forward
    assert result.n_full == 12 * 640


def test_unequal_gains_make_the_race_careful():
    _, terms = simulate(n=4, N=160, spread=0.5)
    labels, names = np.arange(160) % 4, "abcd"
    per_sample = dict(zip(names, terms, strict=True))
    even = dict.fromkeys(names, 0.1)
    uneven = dict(zip(names, (0.0, 1.0, -1.0, 0.5), strict=True))
    sure, unsure = (
        simulate_final(per_sample, gains, labels, 1600, RaceConfig(top=1))[1].mean(axis=0)
        for gains in (even, uneven)
    )
    assert sure.max() > unsure.max()
    assert sure.min() < unsure.min()
    assert unsure.sum() == pytest.approx(1)


def test_where_a_favourite_fails_those_that_left_come_back():
    rng = np.random.default_rng(0)
    terms = {name: rng.normal(size=320) + i for i, name in enumerate("abcd")}

    def measure(active, rows):
        good = [name for name in active if not (name == "d" and len(rows) > 40)]
        return rows, {name: terms[name][rows] for name in good}

    rungs = [np.arange(m) for m in (20, 40, 80, 160, 320)]
    result = run("abcd", rungs, np.arange(320) % 4, measure, RaceConfig(top=1))
    assert result.rungs[1]["dropped"] == ["a", "b", "c"]
    assert set(result.dropped) == {"a", "b"}
    assert result.rungs[-1] == {"images": 320, "backbones": 1, "dropped": []}
    assert result.n_forward == 2 * 320 + 2 * 40


@pytest.mark.parametrize("arguments", [{"top": 0}, {"top": True}, {"probability": 1.0}])
def test_wrong_parameters_are_named(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must"):
        RaceConfig(**arguments)


# Through the public door -------------------------------------------------------------------------
def test_rank_races_and_survivors_have_the_scores_of_the_full_run(tmp_path):
    options = {**CPU, "samples": 600, "variant": "loo"}
    kept = {**CPU, "samples": 600, "cache": tmp_path}
    full = rank("digits", "demo:*", variant="loo", **kept)
    raced = rank("digits", "demo:*", race=True, top=2, **options)
    forecasts = rank("digits", "demo:*", race=True, top=2, **kept)
    assert forecasts.info["race"] == raced.info["race"]  # of nothing but the scores, here
    assert forecasts.shortlist(2) == full.shortlist(2)
    assert raced.shortlist(2) == full.shortlist(2)
    report = raced.info["race"]
    assert report["forward_passes"] < 0.7 * report["full_run"]
    left = {s.backbone for s in raced.scores if "race" in s.details}
    assert left == {name for stage in report["stages"] for name in stage["dropped"]} != set()
    assert list(raced.values()) == sorted(raced.values(), reverse=True)
    for s in raced.scores:
        if s.backbone in left:
            assert s.details["note"].startswith("left the race after")
            assert s.n_samples < 600
        else:
            assert s.n_samples == 600
            assert s.value == pytest.approx(full[s.backbone], abs=1e-6)
    assert len(raced.shortlist(probability=0.95)) >= 1
    assert type(raced).from_json(raced.to_json()).to_json() == raced.to_json()


def test_a_race_skips_what_it_cannot_read_and_what_fails(photos, toy_zoo, tmp_path):
    import shutil

    shutil.copytree(photos, tmp_path / "photos")
    next((tmp_path / "photos" / "ant").iterdir()).write_bytes(b"no image")
    shutil.copytree(toy_zoo, tmp_path / "zoo")
    (tmp_path / "zoo" / "vit" / "model.safetensors").write_bytes(b"no weights")
    with pytest.warns(UserWarning, match="1 of 36 images could not be read"):
        ranking = rank(tmp_path / "photos", tmp_path / "zoo", race=True, top=1, **CPU)
    assert set(ranking.failed) == {"vit"}
    assert ranking.score(ranking.shortlist(1)[0]).n_samples == 35


@pytest.mark.parametrize(("after", "budget"), [(1, "1h"), (3, "1h"), (6, None)])
def test_an_interrupted_race_ranks_what_saw_images_and_goes_on(
    photos, toy_zoo, tmp_path, monkeypatch, after, budget
):
    monkeypatch.setattr("sfda_tune.pipelines.ranking.find_first_rung", lambda *_: 0)

    class Impatient(NullProgress):
        def __init__(self):
            self.finished = 0

        def finish(self, score):
            self.finished += 1
            if self.finished == after:
                raise KeyboardInterrupt

    options = {**CPU, "cache": tmp_path, "race": True, "top": 1, "samples": 36}
    with pytest.raises(RankingInterruptedError) as stop:
        rank(photos, toy_zoo, progress=Impatient(), budget=budget, **options)
    ranking = stop.value.ranking
    assert len(ranking.info.get("not_looked_at", ())) == max(4 - after, 0)
    n = ranking.info["n_samples"]
    seen = [score for score in ranking.scores if score.n_samples]
    assert len(seen) == min(after, 4)
    for score in seen:
        assert (score.n_samples == n) is (score.per_sample is not None)
        if score.n_samples < n:
            assert score.details["note"] == f"interrupted after {score.n_samples} images"
    assert any(score.n_samples < n for score in seen) is (after == 6)
    said = recommend(ranking, find_odds(ranking))
    assert f"The race was interrupted after {n} of 36 images." in said
    assert not any("saved" in line for line in said)
    ranking = rank(photos, toy_zoo, **options)
    assert not ranking.failed
    assert dict(ranking) == dict(rank(photos, toy_zoo, **{**options, "cache": False}))


def test_a_race_that_is_interrupted_while_it_judges_keeps_everybody(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sfda_tune.selection.racing.simulate", stop)
    with pytest.raises(RankingInterruptedError) as caught:
        rank("digits", "demo:*", samples=200, race=True, top=1, **CPU)
    assert {score.n_samples for score in caught.value.ranking.scores} == {60}


def test_metrics_that_cannot_race(photos, toy_zoo):
    for metric in ("sfda + params", "ncti", "logme"):
        with pytest.raises(ValueError, match="`race` needs a metric that is a mean over images"):
            rank(photos, toy_zoo, race=True, metric=metric, **CPU)


def test_who_has_no_time_leaves_and_the_race_ends_where_nobody_has_any():
    labels, (_, terms) = np.arange(640) % 4, simulate(6, spread=0.1)
    rungs = make_rungs(open_dataset((np.zeros((640, 2, 2), np.uint8), labels.tolist())))
    fit = {40: 5, 80: 3, 160: 2, 320: 0}  # how many there is time for

    def measure(active, rows):
        late = dict.fromkeys(active[fit[len(rows)] :])
        return rows, {n: terms[int(n)][rows] for n in active[: fit[len(rows)]]} | late

    def never(names, rows):
        return False

    result = run([*"012345"], rungs, labels, measure, RaceConfig(top=6), skip=never)
    assert [stage["images"] for stage in result.rungs] == [40, 80, 160]
    assert {n: out["images"] for n, out in result.dropped.items() if out["late"]} == {
        "3": 40,
        "4": 40,
        "2": 80,
    }
    assert "5" not in result.dropped  # it saw no image
    assert result.n_forward == 5 * 40 + 3 * 40 + 2 * 80
    for out in result.dropped.values():
        assert np.isfinite(out["gain"])


class Clock:
    """Time that goes by with the images that networks see: all see 200 in 1600 seconds."""

    def __init__(self, monkeypatch):
        demo = resolve_backbones("demo:*")
        price = find_prices(measure_sizes(demo, find_candidate_facts(demo)))
        self.now = 1000.0
        self.per_image = {name: 8 * p / sum(price.values()) for name, p in price.items()}
        monkeypatch.setattr("sfda_tune.pipelines.budget.time.perf_counter", lambda: self.now)

    def start(self, *_):
        pass

    def finish(self, score):
        pass

    def advance(self, backbone, n_images):
        self.now += self.per_image[backbone] * n_images


@pytest.mark.parametrize(("budget", "whole"), [(2000.0, True), (700.0, False), (60.0, False)])
def test_a_budget_that_does_not_suffice_makes_them_race(monkeypatch, budget, whole):
    options = {"samples": 200, "seed": 0, "device": "cpu", "workers": 0, "cache": False}
    options["batch_size"] = 10
    clock = Clock(monkeypatch)
    found = rank("digits", "demo:*", budget=budget, progress=clock, **options)
    assert clock.now - 1000 <= 1.05 * budget + 16  # a batch
    unseen = found.info.get("not_looked_at", [])
    assert not found.failed
    if whole:
        assert {**found} == {**rank("digits", "demo:*", **options)}
        assert "race" not in found.info
        return
    stages = [(stage["images"], stage["backbones"]) for stage in found.info["race"]["stages"]]
    assert stages[0][1] + len(unseen) == 8
    assert found.info["n_samples"] == stages[-1][0]
    said = recommend(found, find_odds(found))
    assert any("with more time, begins anew, for nothing was kept" in line for line in said)
    kept = replace(found, info={**found.info, "arguments": {}})
    said = recommend(kept, find_odds(kept))
    assert any("with more time, goes on from there" in line for line in said)
    if stages[-1][0] < 200:
        assert f"The time sufficed for {stages[-1][0]} of 200 images." in said
    assert sum(find_odds(found).best.values()) == pytest.approx(1)


def test_a_metric_that_is_no_mean_over_images_sees_all_within_a_budget(monkeypatch):
    clock = Clock(monkeypatch)
    options = {"samples": 200, "device": "cpu", "workers": 0, "cache": False}
    found = rank("digits", "demo:*", metric="logme", budget=700.0, progress=clock, **options)
    assert found.info["n_samples"] == 200
    assert "race" not in found.info
    assert 0 < len(found.info["not_looked_at"]) < 8


@pytest.mark.parametrize("metric", ["logme", "transrate"])
@pytest.mark.parametrize("budget", [30.0, 120.0])
def test_scores_of_few_images_are_not_among_those_of_all(monkeypatch, metric, budget):
    order = ["demo:resnet_noise", "demo:regnet_shapes", "demo:vit_untrained"]
    monkeypatch.setattr("sfda_tune.pipelines.ranking.order_by_promise", lambda *_: order)
    clock, options = Clock(monkeypatch), {"samples": 200, "batch_size": 10, **CPU}
    found = rank(
        "digits", order, metric=metric, ensemble=2, budget=budget, progress=clock, **options
    )
    scored = {score.backbone: score.n_samples for score in found.scores if score.error is None}
    assert scored == ({} if budget == 30 else {"demo:regnet_shapes": 200})
    assert set(found.info["not_looked_at"]) == set(order) - set(scored)


def test_a_budget_too_small_for_all_images_of_anybody_is_used(monkeypatch):
    """Opening a network takes 10 s, an image .1 s: all of 200 do not fit, 120 do."""
    clock = Clock(monkeypatch)
    clock.per_image = dict.fromkeys(clock.per_image, 0.1)
    clock.start = lambda *_: setattr(clock, "now", clock.now + 10)
    options = {"samples": 200, "batch_size": 10, **CPU}
    found = rank("digits", "demo:*", budget=40.0, progress=clock, **options)
    assert clock.now - 1000 == pytest.approx(10 + 30 * 0.1 + 10 + 90 * 0.1)
    assert found.info["n_samples"] == 120
    (score,) = [score for score in found.scores if score.n_samples]
    assert score.n_samples == 120
    unseen = [score.details["note"] for score in found.scores if not score.n_samples]
    assert unseen == ["not looked at: the 40 s did not suffice for it"] * 7
    said = recommend(found, find_odds(found))
    assert "The time sufficed for 120 of 200 images." in said
    assert not any("saved" in line for line in said)


class Broken(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def shrink(image):
    return torch.from_numpy(np.array(image.convert("RGB").resize((8, 8)))).permute(2, 0, 1) / 255


@pytest.mark.parametrize("begin", [0, 1, 3])
@pytest.mark.parametrize("budget", [31.0, 140.0, 400.0, 1000.0])
def test_scores_within_a_budget_are_of_the_same_images(monkeypatch, begin, budget):
    """Wherever the race begins, whenever the time is over, and though the first one fails."""
    monkeypatch.setattr("sfda_tune.pipelines.ranking.find_first_rung", lambda *_: begin)
    monkeypatch.setattr("sfda_tune.pipelines.ranking.order_by_promise", lambda facts, _: [*facts])
    clock = Clock(monkeypatch)
    clock.per_image["broken"] = 0.1
    backbones = [*resolve_backbones({"broken": (Broken(), shrink)}), *resolve_backbones("demo:*")]
    options = {"samples": 200, "batch_size": 10, **CPU}
    found = rank("digits", backbones, budget=budget, progress=clock, **options)
    assert set(found.failed) == {"broken"}
    n = found.info["n_samples"]
    whole = [s for s in found.scores if s.per_sample is not None]
    assert whole
    assert {len(s.per_sample) for s in whole} == {s.n_samples for s in whole} == {n}
    assert len(found.labels) == n
    others = [s for s in found.scores if s.n_samples and s not in whole]
    for score in others:  # of fewer images, and said so
        assert f"{score.n_samples} images" in score.details["note"]
    recommend(found, find_odds(found))


def test_an_ensemble_within_a_budget_by_a_metric_that_cannot_race(monkeypatch):
    clock, options = Clock(monkeypatch), {"samples": 200, "batch_size": 10, **CPU}
    found = rank(
        "digits", "demo:*", metric="logme", ensemble=2, budget=900.0, progress=clock, **options
    )
    assert found.info["ensemble"]["details"]["n_samples"] == 200
