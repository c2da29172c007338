"""What fine-tuning will reach, and with what odds."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from sfda_tune import Ranking, Score, forecast
from sfda_tune.backbones.loading import measure_cost
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.cli.terminal import show_ranking
from sfda_tune.metrics.priors import Facts, look_up_facts
from sfda_tune.pipelines import ranking as pipeline
from sfda_tune.selection.advice import recommend
from sfda_tune.selection.calibration import estimate_errors
from sfda_tune.selection.evaluation import weighted_tau
from sfda_tune.selection.forecast import (
    COLUMNS,
    find_evidence,
    find_promise,
    is_forecast,
    normal_scores,
    order_by_forecast,
    read_coefficients,
    simulate_forecast,
)
from sfda_tune.selection.odds import find_odds, judge
from sfda_tune.selection.racing import RaceConfig, run

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
NAMES = ["resnet18.a1_in1k", "resnet50.a1_in1k", "resnet101.a1_in1k", "resnet152.a1_in1k"]
SCORES = dict(zip(NAMES, (0.7, 0.71, 0.69, 0.5), strict=True))


def simulate(n, rng):
    """Draw a hub from the model itself: scores, facts, and what fine-tuning reaches."""
    of = read_coefficients()
    logs = rng.normal(size=(3, n)) * [[0.3], [1.0], [1.0]]
    facts = {
        f"n{k}": Facts(100 * (1 - math.exp(-1.5 - e)), math.exp(g), math.exp(a))
        for k, (e, g, a) in enumerate(logs.T)
    }
    z = rng.normal(size=n)
    scale = np.array([of["scales"][key] for key in COLUMNS])
    x = (logs - logs.mean(axis=1, keepdims=True)) / np.hypot(logs.std(axis=1), scale)[:, None]
    w = np.array([of["full"][key] for key in COLUMNS])
    u = w @ x + of["full"]["images"] * normal_scores(z)
    u += of["full"]["residual"] * rng.normal(size=n)
    return dict(zip(facts, z.tolist(), strict=True)), facts, dict(zip(facts, u, strict=True))


def test_odds_are_those_of_the_model():
    rng, inside, said, hits, held = np.random.default_rng(0), [], [], [], []
    for _ in range(150):
        scores, facts, truth = simulate(12, rng)
        f = forecast(scores, facts=facts, n_draws=1000)
        order = sorted(truth, key=lambda name: -truth[name])
        for name, (low, high) in zip(f.names, f.rank_interval, strict=True):
            inside.append(low <= order.index(name) + 1 <= high)
        first = max(f.best, key=lambda name: f.best[name])
        said.append(f.best[first])
        hits.append(first == order[0])
        held.append(order[0] in f.shortlist(0.9))
    assert 0.88 < np.mean(inside) < 0.98  # ranks are whole numbers
    assert abs(np.mean(said) - np.mean(hits)) < 0.08
    assert np.mean(held) > 0.85


def test_the_order_of_the_backbones_does_not_matter():
    a = forecast(SCORES)
    b = forecast(dict(reversed(SCORES.items())))
    assert a.names == b.names
    assert np.array_equal(a.draws, b.draws)
    assert not np.array_equal(a.draws, forecast(SCORES, seed=1).draws)
    assert sum(a.best.values()) == pytest.approx(1)
    assert a.names[-1] == "resnet18.a1_in1k"  # small, and less accurate on ImageNet
    assert a.rank_interval.min() == 1
    assert a.rank_interval.max() == 4


def test_images_decide_where_nothing_else_differs():
    facts = dict.fromkeys("abc", Facts(80.0, 4.0, 10.0))
    f = forecast({"a": 0.3, "b": 0.9, "c": 0.5}, facts=facts)
    assert f.names == ("b", "c", "a")
    assert list(f.parts) == ["images"]
    more = {**facts, "c": Facts(80.01, 4.0, 10.0)}
    assert forecast({"a": 0.3, "b": 0.9, "c": 0.5}, facts=more).names == ("b", "c", "a")
    more["c"] = Facts(86.0, 40.0, 100.0)
    f = forecast({"a": 0.3, "b": 0.9, "c": 0.5}, facts=more)
    assert f.names[0] == "c"
    assert f.explain("c").startswith("ImageNet +")


def test_an_unknown_network_is_judged_by_its_images_and_less_surely():
    facts = look_up_facts(NAMES)
    for score, place in ((0.9, 0), (0.1, 4)):
        f = forecast({**SCORES, "mine": score}, facts=facts)
        assert "GMACs" not in f.explain("mine") or f.parts["GMACs"][f.names.index("mine")] == 0
        assert f.sd[f.names.index("mine")] > max(
            sd for sd, name in zip(f.sd, f.names, strict=True) if name != "mine"
        )
        assert (f.names.index("mine") >= 2) == (place == 4)
    assert all(math.isnan(v) for v in vars(look_up_facts(["mine"])["mine"]).values())


def test_a_name_alone_makes_no_network_of_timms():
    own = [Score(n, v, details={"spec": f"local-dir:/mine/{n}"}) for n, v in SCORES.items()]
    f = forecast(Ranking(tuple(own), "sfda (loo)"))
    assert list(f.parts) == ["images"]
    sized = [Score(s.backbone, s.value, details={**s.details, "gmacs": 2.0**k, "macts": 9.0})
             for k, s in enumerate(own)]  # fmt: skip
    assert list(forecast(Ranking(tuple(sized), "sfda (loo)")).parts) == ["GMACs", "images"]
    timm = [Score(n, v, details={"spec": f"hf-hub:timm/{n}"}) for n, v in SCORES.items()]
    assert "ImageNet" in forecast(Ranking(tuple(timm), "sfda (loo)")).parts


def test_the_odds_of_unknown_networks_know_the_error_of_their_scores():
    """Where the order of the scores is all luck, all may be the best."""
    noise = np.random.default_rng(0).normal(size=(800, 8))
    scores = {f"n{k}": float(noise[0, k]) for k in range(8)}
    f = forecast(scores, resamples=noise)
    assert max(f.best.values()) < 0.2
    one = forecast({"resnet50.a1_in1k": 0.9, "a": 0.1, "b": 0.2})
    assert list(one.parts) == ["images"]  # a fact that only one has compares nothing


def test_backbones_that_left_a_race_keep_their_score():
    rng = np.random.default_rng(0)
    terms = rng.normal(size=(3, 60))
    scores = [Score(n, t.mean(), t) for n, t in zip(NAMES[:3], terms, strict=True)]
    left = Score(NAMES[3], -1.0, details={"race": {"images": 20}})
    ranking = Ranking((*scores, left), "sfda (loo)", np.arange(60) % 3)
    plain = dict(ranking)
    assert set(forecast(ranking).names) == set(NAMES)
    assert not np.array_equal(forecast(ranking).draws, forecast(plain).draws)


def test_doubtful_scores_widen_the_odds():
    rng = np.random.default_rng(0)
    facts = dict.fromkeys(SCORES, Facts(80.0, 4.0, 10.0))
    sure = forecast(SCORES, facts=facts)
    noise = np.array(list(SCORES.values())) + rng.normal(size=(500, 4))
    unsure = forecast(SCORES, facts=facts, resamples=noise)
    assert unsure.names == sure.names
    assert max(unsure.best.values()) < max(sure.best.values())
    terms = rng.normal(size=(4, 60)) + np.array([[0], [0.1], [0.2], [0.3]])
    scores = [Score(n, t.mean(), t) for n, t in zip(NAMES, terms, strict=True)]
    ranking = Ranking(tuple(scores), "sfda (loo)", np.arange(60) % 3)
    plain = {s.backbone: s.value for s in scores}
    few, many = (abs(forecast(s).parts["images"]).max() for s in (ranking, plain))
    assert 0.2 * many < few < 0.9 * many  # what is known of the networks counts the more
    assert not np.array_equal(forecast(ranking).draws, forecast(plain).draws)


def test_resamples_are_in_the_order_of_the_scores_that_were_given():
    facts = dict.fromkeys(SCORES, Facts(80.0, 4.0, 10.0))
    evidence = Ranking([Score(n, v) for n, v in SCORES.items()], "sfda (loo)")
    by_forecast = order_by_forecast(evidence)
    assert [*by_forecast] != [*evidence] != [*SCORES]
    rng = np.random.default_rng(0)
    resamples = {n: v + 0.01 * rng.normal(size=200) for n, v in SCORES.items()}
    found = [
        forecast(s, train="head", facts=facts, resamples=np.stack([resamples[n] for n in s], 1))
        for s in (SCORES, evidence, by_forecast)
    ]
    assert found[0].best == found[1].best == found[2].best


def test_promise_is_that_of_many_draws_whatever_the_order():
    facts = look_up_facts([*NAMES, "vgg19.tv_in1k", "convnext_tiny.fb_in22k", "mine"])
    p = find_promise(facts)
    assert sum(p.values()) == pytest.approx(1)
    again = find_promise(dict(reversed(facts.items())))
    assert again == pytest.approx(p, rel=1e-9)
    of, draws = read_coefficients(), 20_000
    evidence = Ranking([Score("none of them", 0.0)], "sfda (loo)")
    drawn = forecast(evidence, unseen=facts, facts=facts, n_draws=draws, coefficients=of).best
    for name, known in facts.items():  # one more candidate, of which nothing is known, takes some
        if math.isfinite(known.top1):
            assert drawn[name] <= p[name] + 0.02
    many = find_promise({f"n{k}": Facts(80.0 + k / 1000, 4.0, 10.0) for k in range(1500)})
    assert list(many.values()) == sorted(many.values())
    assert min(many.values()) > 0


def test_forecasts_without_scores_behind_them_are_refused():
    with pytest.raises(ValueError, match="without the scores behind it"):
        forecast(Ranking([Score("a", 0.3), Score("b", -0.3)], "forecast (full)"))


def test_unseen_ones_are_judged_by_facts_whatever_their_scores():
    f = forecast(SCORES, unseen=[NAMES[3]])
    without = {n: v for n, v in SCORES.items() if n != NAMES[3]}
    for score in (-9.0, 9.0):
        assert forecast(without | {NAMES[3]: score}, unseen=[NAMES[3]]).best == f.best


def test_one_that_was_seen_alone_is_as_likely_the_best_as_the_others():
    best = forecast({"a": 0.9}, unseen=[*"bcdefgh"]).best
    assert sum(best.values()) == pytest.approx(1)
    assert max(best.values()) - min(best.values()) < 0.04


@pytest.mark.parametrize("part", ["scales", "correlations", "full"])
def test_coefficients_that_lack_one_are_refused(part):
    of = json.loads(json.dumps(read_coefficients()))
    del of[part]["gmacs"]
    with pytest.raises(
        ValueError, match=f"`coefficients` must have .* in '{part}' but lack gmacs"
    ):
        forecast(SCORES, coefficients=of)
    of = json.loads(json.dumps(read_coefficients())) | {"scales": dict.fromkeys(COLUMNS, 0.0)}
    same = dict.fromkeys(SCORES, Facts(80.0, 4.0, 10.0))
    assert sum(forecast(SCORES, facts=same, coefficients=of).best.values()) == pytest.approx(1)


def test_failed_backbones_are_left_out_and_nothing_is_refused():
    ranking = Ranking((Score("a", 0.2), Score("b", error="OSError: no weights")))
    assert forecast(ranking).names == ("a",)
    assert forecast(ranking).best == {"a": 1.0}
    with pytest.raises(ValueError, match=r"`scores` must have a backbone with a finite score"):
        forecast({"a": math.nan})
    for wrong, what in (([0.1, 0.2], "`scores` must be a Ranking"), ({"a": "x"}, "a number")):
        with pytest.raises(ValueError, match=what):
            forecast(wrong)
    with pytest.raises(ValueError, match=r"`resamples` must be finite, of the shape \(R, 4\)"):
        forecast(SCORES, resamples=np.ones((5, 3)))
    with pytest.raises(ValueError, match=r"shape \(5, 4\) and other numbers"):
        forecast(SCORES, resamples=np.full((5, 4), np.nan))
    for option in ({"n_draws": 1}, {"seed": -1}, {"level": 1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}` must"):
            forecast(SCORES, **option)
    with pytest.raises(ValueError, match="`probability` must lie in"):
        forecast(SCORES).shortlist(0)


def test_coefficients_say_where_they_come_from():
    of = read_coefficients()
    assert of["by"] == "tests/benchmarks/forecast.py --fit"
    assert set(of["fitted_to"]) >= {"threedpc", "fastai", "group1", "group3", "tmlr", "medmnist"}
    assert all(v >= 0 for v in of["full"].values())


def test_sizes_are_those_of_timms_tables():
    for name in (
        "resnet18.a1_in1k",
        "mobilenetv3_small_100.lamb_in1k",
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "cait_xxs24_224.fb_dist_in1k",
    ):
        (backbone,) = resolve_backbones(name)
        gmacs, macts = measure_cost(backbone)
        fact = look_up_facts([name])[name]
        assert gmacs == pytest.approx(fact.gmacs, abs=0.2)  # theirs leave attention out
        assert macts == pytest.approx(fact.macts, abs=0.02)


def a_ranking(n_images=60, metric="sfda (loo)", names=NAMES, spread=0.0):
    terms = np.random.default_rng(0).normal(size=(len(names), n_images))
    terms += spread * np.arange(len(names))[:, None]
    scores = tuple(Score(n, t.mean(), t) for n, t in zip(names, terms, strict=True))
    info = {"dataset": "photos", "n_samples": n_images, "n_classes": 3, "device": "cpu"}
    info["seconds"] = dict.fromkeys(
        ("total", "decode", "decode_work", "forward", "load", "score"), 0.0
    )
    return Ranking(
        (*scores, Score("broken", error="OSError: gone")), metric, np.arange(n_images) % 3, info
    )


def test_a_ranking_is_ordered_by_the_forecast_and_gives_its_scores_back():
    ranking = a_ranking()
    found = order_by_forecast(ranking)
    f = forecast(ranking)
    assert found.shortlist(9) == list(f.names) != ranking.shortlist(9)
    assert [found[name] for name in f.names] == f.mean.tolist()
    assert list(found)[-1] == "broken"
    assert found.failed == ranking.failed
    assert find_evidence(found).to_json() == ranking.to_json()
    assert order_by_forecast(found).to_json() == found.to_json()
    again = Ranking.from_json(found.to_json())
    assert is_forecast(again)
    assert again.to_json() == found.to_json()
    assert forecast(again).records() == f.records()
    records = {r["backbone"]: r for r in found.records()}
    for r in f.records():
        seen = records[r["backbone"]]
        assert seen["score"] == ranking[r["backbone"]]
        assert [seen[k] for k in ("forecast", "p_best", "why")] == [
            r["mean"],
            r["p_best"],
            r["why"],
        ]
    assert records["broken"]["forecast"] is records["broken"]["p_best"] is None
    assert "forecast" not in ranking.headings
    assert "forecast" in found.headings
    assert np.isnan(order_by_forecast(Ranking([Score("a", error="no")]))["a"])


def test_the_odds_of_a_forecast_are_of_the_forecast():
    found = order_by_forecast(a_ranking())
    f, odds = forecast(found), judge(found)
    assert list(map(str, odds.names)) == list(f.names)
    assert odds.best == pytest.approx(f.best)
    assert odds.rank_interval.tolist() == f.rank_interval.tolist()
    for p in (0.1, 0.5, 0.8, 0.95, 1.0):
        assert set(found.shortlist(probability=p)) == set(f.shortlist(p))
    assert judge(find_evidence(found)).best != odds.best
    assert find_odds(Ranking([Score("a", 1.0)])) is None


def test_what_was_not_looked_at_is_judged_by_what_is_known_of_it():
    new = ["convnext_base.fb_in22k_ft_in1k", "resnet26.bt_in1k", "mine"]
    ranking = a_ranking()
    unseen = [Score(name, error="not looked at: the time was over") for name in new]
    info = {**ranking.info, "not_looked_at": new}
    cut = Ranking((*ranking.scores, *unseen), ranking.metric, ranking.labels, info)
    found, f = order_by_forecast(cut), forecast(cut)
    assert set(f.names) == {*NAMES, *new}
    assert found.shortlist(1) == [new[0]]  # the largest, of the highest accuracy
    said = recommend(found, find_odds(found))[0]
    best = next(name for name in found if name in NAMES)
    assert said.startswith(f"Fine-tune {best} first: it is the best of the 4 that were looked at;")
    assert said.endswith(f"by what is known of it, {new[0]} may be better.")
    assert list(found.failed) == ["broken"]
    row = {r["backbone"]: r for r in found.records()}[new[0]]
    assert row["score"] is None
    assert row["note"] == "not looked at: the time was over"
    assert sum(judge(found).best.values()) == pytest.approx(1)
    assert find_evidence(found).to_json() == cut.to_json()
    again = Ranking.from_json(found.to_json())
    assert order_by_forecast(again).to_json() == found.to_json()
    # Nothing is known of the last: it may be anywhere, the more so for it
    sd = dict(zip(f.names, f.sd.tolist(), strict=True))
    assert sd["mine"] > sd[new[0]] > max(sd[n] for n in NAMES)
    seen = dict(zip(NAMES, (0.7, 0.71, 0.69, 0.5), strict=True))
    assert forecast(seen, unseen=new).names == forecast(seen, unseen=new[::-1]).names


def test_the_errors_that_tuners_count_are_those_of_the_forecast():
    ranking = a_ranking()
    found, f = order_by_forecast(ranking), forecast(ranking)
    assert estimate_errors(found) == dict(zip(f.names, f.error.tolist(), strict=True))
    assert (f.error < f.sd).all()
    assert (f.error > 0).all()
    sure = order_by_forecast(Ranking([Score(n, v) for n, v in SCORES.items()]))
    assert set(estimate_errors(sure).values()) == {0.0}


def test_what_is_trained_decides_how_much_the_images_weigh():
    full, head = (order_by_forecast(a_ranking(), train) for train in ("full", "head"))
    assert head.shortlist(9) == a_ranking().shortlist(9) != full.shortlist(9)
    assert full.metric == "forecast (full)"
    assert head.metric == "forecast (head)"
    assert judge(head).best != judge(full).best
    with pytest.raises(ValueError, match="`train` must be one of full, head"):
        forecast(SCORES, train="both")


def test_a_race_by_forecast_keeps_those_that_the_forecast_may_favour():
    """The scores alone would let the one leave that is best by what is known of it."""
    rng = np.random.default_rng(0)
    means = np.array([[1.2], [1.0], [0.5], [0.9]])
    terms = dict(zip(NAMES, rng.normal(size=(4, 800)) + means, strict=True))
    rungs, labels = [np.arange(m) for m in (50, 100, 200, 400, 800)], np.arange(800) % 4
    facts = look_up_facts(NAMES)

    def measure(names, rows):
        return rows, {name: terms[name][rows] for name in names}

    def race(judge):
        return run(NAMES, rungs, labels, measure, RaceConfig(top=1), judge)

    def by_forecast(names, S):
        return simulate_forecast(names, S, facts)

    scores = {name: float(t.mean()) for name, t in terms.items()}
    best = forecast(scores, facts=facts).names[0]
    assert best == "resnet152.a1_in1k"
    assert best in race(None).dropped
    assert best not in race(by_forecast).dropped
    S = rng.normal(size=(50, 4))
    each = [forecast(dict(zip(NAMES, row, strict=True)), facts=facts, n_draws=2) for row in S]
    found = simulate_forecast(NAMES, S, facts)
    for row, f in zip(found, each, strict=True):
        assert dict(zip(f.names, f.mean, strict=True)) == pytest.approx(
            dict(zip(NAMES, row, strict=True))
        )


def test_the_command_line_says_which_will_be_best_after_training(capsys):
    show_ranking(order_by_forecast(a_ranking(names=[f"{n}_" for n in NAMES])))
    assert "Any of them may be the best after fine-tuning." in capsys.readouterr().out
    show_ranking(order_by_forecast(a_ranking()))
    said = capsys.readouterr().out
    assert "because of" in said
    first, p = next(iter(forecast(a_ranking()).best.items()))
    wanted = f"Fine-tune {first} first: of these 4 it will be the best with probability {p:.2f}"
    assert wanted in said
    assert "ImageNet" in said
    show_ranking(order_by_forecast(a_ranking(names=NAMES[:1])))
    assert f"Best after fine-tuning, with probability .95: {NAMES[0]}" in capsys.readouterr().out
    show_ranking(order_by_forecast(a_ranking(spread=0.5), "head"))
    assert "Best once a head is trained, with probability .95, one of" in capsys.readouterr().out
    show_ranking(a_ranking())
    said = capsys.readouterr().out
    assert "Best by this score" in said
    assert "forecast" not in said


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_both_kinds_of_evidence_beat_either_on_eleven_cnns():
    """A table that the coefficients were fitted to, among others: a check of the arithmetic."""
    truth, probe = (
        json.loads((DATA / "ground_truth" / f"sfda_group1_cnn{kind}.json").read_text())
        for kind in ("", "_headonly")
    )
    sizes = {"resnet34": (73.314, 3.66, 3.74), "resnet50": (76.13, 4.11, 11.11),
             "resnet101": (77.374, 7.83, 16.23), "resnet152": (78.312, 11.56, 22.56),
             "densenet121": (74.434, 2.87, 6.9), "densenet169": (75.6, 3.4, 7.3),
             "densenet201": (76.896, 4.34, 7.85), "mnasnet1_0": (73.456, 0.33, 5.46),
             "mobilenet_v2": (71.878, 0.31, 6.68), "googlenet": (69.778, 1.5, 4.9),
             "inception_v3": (77.294, 2.85, 5.1)}  # fmt: skip
    facts = {name: Facts(*size) for name, size in sizes.items()}
    imagenet = {name: fact.top1 for name, fact in facts.items()}
    taus = []
    for data, accuracy in truth.items():
        f = forecast(probe[data], facts=facts, n_draws=10)
        mean = dict(zip(f.names, f.mean.tolist(), strict=True))
        columns = (mean, probe[data], imagenet)
        taus.append([weighted_tau(column, accuracy) for column in columns])
    both, images, prior = np.mean(taus, axis=0)
    assert images == pytest.approx(0.662, abs=0.001)
    assert both > max(images, prior) + 0.05


def test_sizes_are_counted_where_the_table_knows_most(monkeypatch):
    counted = []
    monkeypatch.setattr(pipeline, "measure_cost", lambda b: counted.append(b.name) or (2.0, 9.0))
    own = resolve_backbones("demo:resnet_glyphs")
    known = resolve_backbones(NAMES)
    scores = {b.name: Score(b.name, 0.5) for b in [*known, *own]}
    candidates = [*known, *own]
    pipeline.add_sizes(scores, candidates, pipeline.find_candidate_facts(candidates))
    assert counted == ["demo:resnet_glyphs"]
    assert scores["demo:resnet_glyphs"].details == {"gmacs": 2.0, "macts": 9.0}
    assert not scores[NAMES[0]].details
    pipeline.add_sizes(scores, own, pipeline.find_candidate_facts(own))
    assert len(counted) == 1  # nothing would be forecast


def test_the_advice_says_what_is_there_what_it_takes_and_what_helps():
    def advise(train, n, images_per_second=60.0):
        rng = np.random.default_rng(0)
        about = {"accuracy": 0.8, "n_samples": n, "images_per_second": images_per_second}
        p = rng.uniform(0.2, 1.0, n)
        scores = [Score(k, float(p.mean()), details=about, per_sample=p) for k in "abcdef"]
        labels = np.arange(n) % 2
        ranking = Ranking(scores, "sfda (loo)", labels)
        if train is not None:
            ranking = order_by_forecast(ranking, train)
        return " ".join(recommend(ranking, find_odds(ranking)))

    said = advise("full", 100)
    assert "right on 0.80 of new images (95 %: 0.71 to 0.87)" in said
    assert "An epoch over these 100 images takes about 5 s here." in said
    assert "More images would hardly make that surer" in said
    assert "epoch" not in advise("head", 100)
    said = advise(None, 100)  # ranked by a score alone
    assert said.startswith("By sfda (loo), before any training, a is the best of these 6: with")
    unsure = Ranking([Score("a", 0.9), Score("b", 0.5)], "knn + sfda")
    assert recommend(unsure, find_odds(unsure))[0].endswith(
        "a is the best of these 2; how sure that is cannot be told."
    )
    assert "An epoch over these 100 images takes about 5 s here." in said


def test_a_sentence_of_advice_names_at_most_three():
    """Groups are letters in a column; a list of 26 names fills a screen."""
    rng, names = np.random.default_rng(0), [f"net{i}" for i in range(26)]
    p = rng.uniform(0.2, 1.0, (26, 40))
    scores = [Score(n, float(x.mean()), per_sample=x) for n, x in zip(names, p, strict=True)]
    score = Ranking(scores, "sfda (loo)", np.arange(40) % 2)
    late = [Score(f"late{i}", error="not looked at: the time was over") for i in range(9)]
    cut = Ranking(
        (*scores, *late),
        "sfda (loo)",
        np.arange(40) % 2,
        {"not_looked_at": [s.backbone for s in late]},
    )
    for ranking in (score, order_by_forecast(score, "full"), order_by_forecast(cut, "full")):
        lines = recommend(ranking, find_odds(ranking))
        assert (
            max(sum(name in line.replace(",", "").split() for name in ranking) for line in lines)
            <= 3
        )
    assert any(
        re.search(r"one of: (net\d+, ){2}net\d+ and \d+ more", line)
        for line in recommend(score, find_odds(score))
    )
    assert "late2 and 6 more; the same" in lines[-1]
