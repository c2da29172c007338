"""Scores over a hub: combinations, hub-wide parts, priors by name, recorded benchmarks."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata, weightedtau

from sfda_tune.metrics.combine import combine, combine_hub
from sfda_tune.metrics.etran import etran
from sfda_tune.metrics.ncti import ncti
from sfda_tune.metrics.priors import imagenet_prior, look_up_facts, params_prior
from sfda_tune.values.features import MetricResult, Score
from sfda_tune.values.ranking import Ranking

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
recorded = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recorded numbers at {DATA}")


def read(name):
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def tau(truth, score):
    names = list(truth)
    return weightedtau([truth[n] for n in names], [score[n] for n in names]).statistic


def test_weights_do_not_round_apart_what_is_equal_on_paper():
    scores = {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1, "b": 1}
    assert set(combine(*scores, weights=[0.1] * 3).values()) == {0.5}


def test_rank_average_is_the_plain_one():
    rng = np.random.default_rng(0)
    scores = [dict(zip("abcdefgh", rng.integers(0, 5, 8).tolist(), strict=True)) for _ in range(3)]
    expected = np.mean([(rankdata(list(s.values())) - 1) / 7 for s in scores], axis=0)
    combined = combine(*scores)
    assert list(combined.values()) == pytest.approx(expected)
    assert list(combined) == list("abcdefgh")
    assert min(combined.values()) >= 0
    assert max(combined.values()) <= 1


def test_rank_without_ties():
    combined = combine({"a": 1, "b": 5, "c": 2}, {"c": 9, "a": 3, "b": 4}, weights=[3, 1])
    assert combined == pytest.approx({"a": 0, "b": 0.75 + 0.125, "c": 0.375 + 0.25})


def test_equal_rank_sums_are_exact_ties():
    up = {str(i): i for i in range(12)}
    down = {str(i): -i for i in range(12)}
    shifted = {str(i): (i + 5) % 12 for i in range(12)}
    assert set(combine(up, down).values()) == {0.5}
    sums = {n: up[n] + shifted[n] + down[n] for n in up}
    combined = combine(up, shifted, down)
    assert len(set(combined.values())) == len(set(sums.values()))


def test_rank_ignores_and_minmax_follows_distances():
    near, far = {"a": 0.0, "b": 1.0, "c": 2.0}, {"a": 0.0, "b": 1.0, "c": 100.0}
    assert combine(near) == combine(far)
    assert combine(far, method="minmax")["b"] == pytest.approx(0.01)
    moved = {name: 7 * score - 3 for name, score in far.items()}
    assert combine(moved, method="minmax") == pytest.approx(combine(far, method="minmax"))
    huge = {"a": -1.7e308, "b": 0.0, "c": 1.7e308}
    assert combine(huge, method="minmax")["b"] == pytest.approx(0.5)


@pytest.mark.parametrize("method", ["rank", "minmax"])
def test_failed_anywhere_is_nan_and_does_not_count(method):
    nan = float("nan")
    first = {"a": 1.0, "b": 2.0, "broken": nan, "c": 3.0, "infinite": math.inf}
    second = {"a": 3.0, "b": 1.0, "c": 2.0, "broken": 1e9, "infinite": 0.0, "unknown": 5.0}
    combined = combine(first, second, method=method)
    assert list(combined) == ["a", "b", "broken", "c", "infinite", "unknown"]
    assert all(math.isnan(combined[name]) for name in ("broken", "infinite", "unknown"))
    kept = "abc"
    clean = combine({n: first[n] for n in kept}, {n: second[n] for n in kept}, method=method)
    assert {n: combined[n] for n in kept} == pytest.approx(clean)


@pytest.mark.parametrize("method", ["rank", "minmax"])
def test_equal_scores_contribute_one_half(method):
    assert combine({"a": 2.0, "b": 2.0}, method=method) == {"a": 0.5, "b": 0.5}
    assert combine({"a": 2.0}, method=method) == {"a": 0.5}


def test_rankings_can_be_combined():
    ranking = Ranking([Score("a", 0.2), Score("b", 0.9), Score("c", error="OSError: no weights")])
    combined = combine(ranking, {"a": 80.0, "b": 70.0, "c": 60.0})
    assert combined["a"] == combined["b"] == 0.5
    assert math.isnan(combined["c"])


def test_bad_combinations_say_what_to_do():
    score = {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match=r"`scores` must be one or more mappings .* are \[\]"):
        combine()
    with pytest.raises(ValueError, match=r"`scores` must be .* are \['list'\]"):
        combine([1.0, 2.0])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"`scores` must share at least one .* check the spelling"
    ):
        combine(score, {"A": 1.0})
    with pytest.raises(ValueError, match="`method` must be one of 'rank', 'minmax' but is 'mean'"):
        combine(score, method="mean")
    for weights in ([1], [1, -1], [0, 0], [1, math.nan]):
        with pytest.raises(ValueError, match="`weights` must be 2 numbers ≥ 0"):
            combine(score, score, weights=weights)


# --- parts ------------------------------------------------------------------------------------


def hub(metric):
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    noise = rng.normal(size=(90, 6))
    return {f"{s}": metric(noise + s * np.eye(3, 6)[y], y) for s in (0, 1, 2, 4)}


@pytest.mark.parametrize("metric", [ncti, etran])
def test_hub_scores_are_the_weighted_mean_of_the_scaled_parts(metric):
    results = hub(metric)
    parts = [r.details["hub_parts"] for r in results.values()]
    weights = {"ncti": [1, 1, 1], "etran": [0.85, 0.15]}[metric.__name__]
    expected = 0
    for w, key in zip(weights, parts[0], strict=True):
        column = np.array([p[key] for p in parts])
        expected = expected + w * (column - column.min()) / np.ptp(column) / sum(weights)
    assert list(combine_hub(results).values()) == pytest.approx(expected)
    scores = [Score(name, r.value, details=r.details) for name, r in results.items()]
    assert combine_hub({s.backbone: s for s in scores}) == combine_hub(results)


def test_hub_scores_of_failed_backbones_and_other_weights():
    results = hub(etran)
    clean = combine_hub(results)
    with_failed = combine_hub({"failed": Score("failed", error="OSError: no"), **results})
    assert math.isnan(with_failed.pop("failed"))
    assert with_failed == pytest.approx(clean)
    only_lda = combine_hub(results, weights={"lda": 1, "energy": 0})
    lda = {name: r.details["hub_parts"]["lda"] for name, r in results.items()}
    assert only_lda == pytest.approx(combine(lda, method="minmax"))


def test_results_without_the_same_parts_are_refused():
    results = hub(etran)
    with pytest.raises(ValueError, match=r"`results` must be those of one metric .* none has any"):
        combine_hub({"a": MetricResult(1.0)})
    with pytest.raises(ValueError, match=r"`results` must be .* 'other' has others than"):
        combine_hub({**results, "other": hub(ncti)["1"]})
    with pytest.raises(ValueError, match=r"`weights` must name the parts \['lda', 'energy'\]"):
        combine_hub(results, weights={"lda": 1})


# --- recorded numbers -------------------------------------------------------------------------


@recorded
def test_etran_of_the_published_parts():
    """.85·minmax(lda) + .15·minmax(energy) on CIFAR-100: .900; its parts alone .869 and .572."""
    single = read("single_scores/etran_cifar100_group1.json")
    truth = read("ground_truth/sfda_group1_cnn.json")["cifar100"]
    assert tau(truth, single["lda"]) == pytest.approx(0.869, abs=5e-4)
    assert tau(truth, single["energy"]) == pytest.approx(0.572, abs=5e-4)
    results = {
        name: MetricResult(
            single["lda"][name],
            details={"hub_parts": {key: single[key][name] for key in ("lda", "energy")},
                     "hub_weights": {"lda": 0.85, "energy": 0.15}},
        )
        for name in single["lda"]
    }  # fmt: skip
    assert tau(truth, combine_hub(results)) == pytest.approx(0.900, abs=5e-4)


@recorded
@pytest.mark.parametrize(
    ("metrics", "mean", "natural"),
    [
        (("ncti", "etran_energy"), 0.768, 0.858),
        (("ncti",), 0.717, 0.843),
        (("sfda",), 0.392, None),
    ],
)
def test_rank_averages_with_the_prior_on_the_tmlr_benchmark(metrics, mean, natural):
    bench = read("tmlr_bench/tmlr_scores.json")
    models, taus = bench["models"], []
    imagenet = bench["imagenet_top1"]
    prior = imagenet if isinstance(imagenet, dict) else dict(zip(models, imagenet, strict=True))
    for columns in bench["datasets"].values():
        scores = [dict(zip(models, columns[metric], strict=True)) for metric in metrics]
        truth = dict(zip(models, columns["test"], strict=True))
        taus.append(tau(truth, combine(prior, *scores)))
    assert np.mean(taus) == pytest.approx(mean, abs=6e-4)
    if natural is not None:
        assert np.mean(taus[:8]) == pytest.approx(natural, abs=6e-4)


# --- priors -----------------------------------------------------------------------------------

TABLE = """model,img_size,top1,param_count
resnet50.a1_in1k,288,81.214,"25.56"
resnet50.a1_in1k,224,80.218,25.56
vit_base_patch16_224.augreg_in21k,224,85.1,"1,086.57"
"""


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text(TABLE)
    return file


def test_priors_by_name(table):
    names = ["resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k", "resnet50", "resnet50.other"]
    expected = dict.fromkeys(names[:3], 80.218) | {names[3]: math.nan}
    assert imagenet_prior(names, path=table) == pytest.approx(expected, nan_ok=True)
    assert imagenet_prior(names[:1], path=str(table), img_size=288)[names[0]] == 81.214
    assert math.isnan(imagenet_prior(names[:1], path=table, img_size=999)[names[0]])
    sizes = params_prior(["vit_base_patch16_224.augreg_in21k", "no such model"], path=table)
    assert sizes["vit_base_patch16_224.augreg_in21k"] == 1086.57
    assert math.isnan(sizes["no such model"])


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("convnext_base.fb_in22k", "convnext_base.fb_in22k_ft_in1k"),  # not …_384
        ("hf-hub:timm/convnextv2_tiny.fcmae", "convnextv2_tiny.fcmae_ft_in1k"),  # nor …in22k_in1k
        ("vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_224.openai_ft_in1k"),
        ("hiera_tiny_224.mae", "hiera_tiny_224.mae_in1k_ft_in1k"),
        ("beit_base_patch16_224.in22k_ft_in22k", "beit_base_patch16_224.in22k_ft_in22k_in1k"),
        ("swin_tiny_patch4_window7_224_in22k", None),  # no such name, today or before
        ("convnext_base.clip_laion2b", None),  # …_augreg_ft_in1k are other weights
        ("vit_base_patch16_224.mae", None),
        ("resnet50.a", None),  # of resnet50.a1_in1k
        ("resnet50", "resnet50.a1_in1k"),
    ],
)
def test_weights_without_labels_are_known_by_what_was_made_of_them(name, made):
    facts = look_up_facts([name, made or "mine"])
    assert len({str(f) for f in facts.values()}) == 1
    assert math.isnan(facts[name].top1) == (made is None)


def test_a_ranking_knows_its_sizes(table):
    ranking = Ranking(
        [
            Score("resnet50.a1_in1k", 0.2, details={"n_params": 25_560_000}),
            Score("mine", error="OSError: no weights"),
        ]
    )
    sizes = {"resnet50.a1_in1k": 25.56, "mine": math.nan}
    assert params_prior(ranking) == pytest.approx(sizes, nan_ok=True)
    assert params_prior(ranking, path=table) == pytest.approx(sizes, nan_ok=True)
    accuracies = {"resnet50.a1_in1k": 80.218, "mine": math.nan}
    assert imagenet_prior(ranking, path=table) == pytest.approx(accuracies, nan_ok=True)


def test_a_missing_table_says_where_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must be a CSV file .* leave it out"):
        imagenet_prior(["a"], path=tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("model,accuracy\na,1\n")
    with pytest.raises(ValueError, match="must be CSV with model, top1, but it lacks top1"):
        imagenet_prior(["a"], path=tmp_path / "other.csv")
    with pytest.raises(ValueError, match="`names` must be several names but is 'resnet50'"):
        imagenet_prior("resnet50", path=tmp_path / "other.csv")


def test_the_table_that_ships():
    names = ["resnet50.a1_in1k", "vit_base_patch16_224.augreg2_in21k_ft_in1k", "mine"]
    accuracies = imagenet_prior(names)
    assert 79 < accuracies[names[0]] < accuracies[names[1]] < 90
    assert math.isnan(accuracies["mine"])
    assert params_prior(names)[names[0]] == pytest.approx(25.56)


@recorded
def test_the_table_that_ships_is_the_published_one():
    published = DATA / "timm" / "results-imagenet.csv"
    with published.open(newline="") as lines:
        names = [row["model"] for row in csv.DictReader(lines)]
    for prior in (imagenet_prior, params_prior):
        assert prior(names) == prior(names, path=published)
