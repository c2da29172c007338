import numpy as np
import pytest

from sfda_tune import Features, Score, rank, score
from sfda_tune.metrics.combine import combine, combine_hub
from sfda_tune.metrics.knn import knn
from sfda_tune.metrics.nce import nce
from sfda_tune.metrics.ncti import ncti
from sfda_tune.metrics.priors import imagenet
from sfda_tune.metrics.scoring import Scorer
from sfda_tune.metrics.sfda import sfda

CPU = {"device": "cpu", "workers": 0}


def hub(n=4, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(60) % 3
    return [
        Features(rng.normal(size=(60, 5 + i)) + 0.4 * i * y[:, None], y, backbone=f"b{i}")
        for i in range(n)
    ]


def ranked(metric, features, **options):
    scorer = Scorer(metric, **options)
    scores = scorer.combine([scorer.score(f) for f in features])
    return scorer, {s.backbone: s for s in scores}


def test_a_single_metric_is_itself():
    scorer, scores = ranked("sfda", hub(), variant="loo")
    assert scorer.label == "sfda (loo)"
    for f in hub():
        result = sfda(f.x, f.y, variant="loo")
        assert scores[f.backbone].value == result.value
        np.testing.assert_array_equal(scores[f.backbone].per_sample, result.per_sample)


def test_a_sum_of_names_averages_the_ranks():
    scorer, scores = ranked("2*sfda + knn", hub(), variant="official")
    assert scorer.label == "2*sfda (official) + knn"
    parts = [
        {f.backbone: float(sfda(f.x, f.y, variant="official")) for f in hub()},
        {f.backbone: float(knn(f.x, f.y)) for f in hub()},
    ]
    expected = combine(*parts, weights=[2, 1])
    assert {name: s.value for name, s in scores.items()} == expected
    for name, s in scores.items():
        assert s.per_sample is None
        assert s.details["parts"] == {"sfda": parts[0][name], "knn": parts[1][name]}
        assert s.details["sfda"]["lambda"] > 0


def test_metrics_of_a_hub_are_scaled_over_it():
    results = {f.backbone: ncti(f.x, f.y) for f in hub()}
    expected = combine_hub(results)
    for metric in ("ncti", "ncti + params"):
        _, scores = ranked(metric, hub())
        if metric == "ncti":
            assert {name: s.value for name, s in scores.items()} == pytest.approx(expected)
        assert len({s.value for s in scores.values()}) > 1


def test_priors_by_name_and_the_unknown_in_the_middle():
    features = [
        Features(f.x, f.y, backbone=name)
        for f, name in zip(
            hub(3), ("mine", "resnet18.a1_in1k", "convnext_base.fb_in1k"), strict=True
        )
    ]
    scorer, scores = ranked("sfda + imagenet", features, variant="loo")
    assert scorer.label == "sfda (loo) + imagenet"
    assert scores["mine"].details["note"] == "unknown to imagenet"
    assert "note" not in scores["resnet18.a1_in1k"].details
    single = {f.backbone: float(sfda(f.x, f.y, variant="loo")) for f in features}
    prior = {"mine": 1.0, "resnet18.a1_in1k": 0.0, "convnext_base.fb_in1k": 2.0}
    assert {name: s.value for name, s in scores.items()} == combine(single, prior)


def test_a_failed_backbone_stays_failed_and_does_not_shift_the_others():
    scorer = Scorer("sfda + knn")
    good = [scorer.score(f) for f in hub()]
    with_failed = scorer.combine([*good, Score("broken", error="OSError: no weights")])
    assert with_failed[-1].error == "OSError: no weights"
    assert [s.value for s in with_failed[:-1]] == [s.value for s in scorer.combine(good)]
    assert [s.error for s in scorer.combine([with_failed[-1]])] == ["OSError: no weights"]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("sfda + nothing", r"a sum of some of etran, (?!.*\b(leep|nce)\b)[^;]* but is 'nothing'"),
        ("sfda + sfda", "`metric` must name each metric once"),
        ("imagenet", "'sfda [+] imagenet'"),
        (imagenet, "'sfda [+] imagenet'"),
        ("imagenet + params", "must have a term that looks at the images"),
        ("sfda + leep", r"logits.*sfda_tune.metrics.leep.leep\(None, labels, logits=…\)"),
        (nce, "'nce' needs logits, which `rank` does not have; choose one of etran"),
        ("1.2.3*sfda", "`metric` must be a sum of"),
        ("sfda +", "`metric` must be a sum of"),
        (7, "`metric` must be a sum of"),
    ],
)
def test_combinations_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        Scorer(metric)


def test_own_function_may_bear_the_name_of_a_metric():
    def leep(x, y):
        return x.mean()

    def ncti(x, y):
        return x.std()

    (features,) = hub(1)
    assert score(features, leep).value == pytest.approx(features.x.mean())
    assert not Scorer(ncti).combined


def test_variant_belongs_to_sfda():
    with pytest.raises(ValueError, match="`variant` belongs to the metric 'sfda'"):
        Scorer("knn + params", "loo")
    assert Scorer("knn + sfda", "paper").label == "knn + sfda (paper)"


def test_one_backbone_has_no_rank():
    with pytest.raises(ValueError, match="ranks need several backbones"):
        score(hub(1)[0], "sfda + knn")


def test_rank_combines_and_keeps_failures(photos, toy_zoo, tmp_path):
    import shutil

    shutil.copytree(toy_zoo, tmp_path / "zoo")
    (tmp_path / "zoo" / "vit" / "model.safetensors").write_bytes(b"no weights")
    ranking = rank(photos, tmp_path / "zoo", metric="sfda + params", **CPU)
    assert set(ranking.failed) == {"vit"}
    good = [s for s in ranking.scores if s.error is None]
    parts = [{s.backbone: s.details["parts"]["sfda"] for s in good}]
    parts.append({s.backbone: s.details["n_params"] for s in good})
    assert {s.backbone: s.value for s in good} == combine(*parts)
    with pytest.raises(ValueError, match="`per_sample`"):
        ranking.shortlist(probability=0.9)


def test_rank_chooses_an_ensemble(photos, toy_zoo):
    ranking = rank(photos, toy_zoo, ensemble=2, **CPU)
    chosen = ranking.info["ensemble"]
    assert len(chosen["backbones"]) == 2
    assert set(chosen["backbones"]) <= set(ranking)
    assert type(ranking).from_json(ranking.to_json()).info["ensemble"]["method"] == "sfda"
    assert chosen["backbones"][0] == next(iter(ranking))  # by the forecast, not by its score
    with pytest.raises(ValueError, match="`ensemble` must be an integer in 1 … 4"):
        rank(photos, toy_zoo, ensemble=5, **CPU)
