"""Published and recorded numbers replay: expected values from ../shared/data/README.md.

The evaluation kit turns recorded scores and fine-tuned accuracies into the figures that the
papers, or an independent recomputation with SciPy, report. Sources: README.md beside the data.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from sfda_tune.metrics.combine import combine
from sfda_tune.selection.evaluation import (
    evaluate_many,
    hit_at_k,
    leave_models_out,
    regret_at_k,
    spearman,
    static_order,
    static_order_null,
    weighted_tau,
)
from sfda_tune.selection.tables import read_scores, read_truth

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no recorded numbers at {DATA}")

# torchvision, weights IMAGENET1K_V1
IMAGENET = {
    "resnet34": 73.314,
    "resnet50": 76.130,
    "resnet101": 77.374,
    "resnet152": 78.312,
    "densenet121": 74.434,
    "densenet169": 75.600,
    "densenet201": 76.896,
    "mnasnet1_0": 73.456,
    "mobilenet_v2": 71.878,
    "googlenet": 69.778,
    "inception_v3": 77.294,
}


def truth_of(group: str):
    return read_truth(DATA / "ground_truth" / f"sfda_{group}.json")


def taus(scores, truth) -> list[float]:
    return [weighted_tau(scores[name], truth[name]) for name in truth]


def close(value, tolerance):
    return pytest.approx(value, abs=tolerance)


# Single scores ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def etran():
    return read_scores(DATA / "single_scores" / "etran_cifar100_group1.json")


def minmax(scores):
    low, high = min(scores.values()), max(scores.values())
    return {name: (value - low) / (high - low) for name, value in scores.items()}


def test_etran_on_cifar100(etran):
    truth = truth_of("group1_cnn")["cifar100"]
    assert weighted_tau(etran["lda"], truth) == close(0.869, 5e-4)
    assert weighted_tau(etran["energy"], truth) == close(0.572, 5e-4)
    lda, energy = minmax(etran["lda"]), minmax(etran["energy"])
    both = {name: 0.85 * lda[name] + 0.15 * energy[name] for name in lda}
    assert weighted_tau(both, truth) == close(0.900, 5e-4)


def test_etran_without_any_two_models(etran):
    left = leave_models_out(etran["lda"], truth_of("group1_cnn")["cifar100"], 2)
    assert left[:2] == (close(0.746, 5e-4), close(0.936, 5e-4))
    assert len(left.low_without) == len(left.high_without) == 2


@pytest.mark.parametrize(
    ("file", "dataset", "expected"),
    [("ncti_cifar10_group1", "cifar10", 0.843), ("logme_aircraft_group1", "aircraft", 0.557)],
)
def test_ncti_and_logme(file, dataset, expected):
    scores = read_scores(DATA / "single_scores" / f"{file}.json")
    assert weighted_tau(scores, truth_of("group1_cnn")[dataset]) == close(expected, 5e-4)


# Groups 1 to 3 of SFDA -------------------------------------------------------------------------
def test_published_means():
    published = json.loads((DATA / "published_tau_w.json").read_text())
    means = {name: np.mean(values) for name, values in published["supervised_group1"].items()}
    assert means == {
        name: close(value, 5e-4)
        for name, value in {
            "LEEP": 0.410,
            "LogME": 0.509,
            "NLEEP": 0.611,
            "PARC": 0.467,
            "SFDA": 0.710,
        }.items()
    }
    ssl = {name: np.mean(values) for name, values in published["ssl_group2"].items()}
    expected = {"NLEEP": 0.365, "PARC": 0.314, "LogME": 0.358, "GBC": 0.152, "SFDA": 0.582}
    expected |= {"LogME_PED": 0.627, "SFDA_PED": 0.628, "GBC_PED": 0.406}
    assert ssl == {name: close(value, 5.1e-4) for name, value in expected.items()}


def test_static_order_beats_every_published_metric():
    truth = truth_of("group1_cnn")
    values = taus(static_order(truth), truth)
    expected = [0.847, 0.712, 0.847, 0.903, 0.986, 0.993, 0.480, 0.824, 0.950, 0.932, 0.731]
    assert values == [close(value, 5.1e-4) for value in expected]
    assert np.mean(values) == close(0.837, 5e-4)


@pytest.mark.parametrize(("group", "expected"), [("group2_ssl", 0.685), ("group3_vit", 0.783)])
def test_static_order_of_the_other_groups(group, expected):
    truth = truth_of(group)
    assert np.mean(taus(static_order(truth), truth)) == close(expected, 5e-4)


def test_imagenet_accuracy_and_linear_head_as_scores():
    truth = truth_of("group1_cnn")
    assert np.mean([weighted_tau(IMAGENET, one) for one in truth.values()]) == close(0.654, 5e-4)
    head = taus(truth_of("group1_cnn_headonly"), truth)
    expected = [0.266, 0.690, 0.481, 0.898, 0.908, 0.756, 0.747, 0.815, 0.777, 0.145, 0.798]
    assert head == [close(value, 5.1e-4) for value in expected]
    assert np.mean(head) == close(0.662, 5e-4)


@pytest.mark.parametrize(
    ("group", "sd", "quantile"),
    [("group1_cnn", 0.252, 0.50), ("group2_ssl", 0.219, 0.42), ("group3_vit", 0.254, 0.50)],
)
def test_null_of_one_static_order(group, sd, quantile):
    null = static_order_null(truth_of(group), n=15_000)
    assert null.mean == close(0, 0.01)
    assert null.sd == close(sd, 0.01)
    assert null.quantiles[0.975] == close(quantile, 0.015)


@pytest.mark.parametrize(
    ("observed", "low", "high"),
    [(0.410, 0.045, 0.065), (0.509, 0.013, 0.027), (0.611, 0.002, 0.008), (0.710, 0, 0.001)],
)
def test_published_means_against_one_static_order(observed, low, high):
    """LEEP, LogME, NLEEP, SFDA: LEEP is not distinguishable from a fixed random order."""
    p = static_order_null(truth_of("group1_cnn"), observed=observed).p_value
    assert low <= p <= high


def test_report_on_all_data_sets():
    result = evaluate_many(truth_of("group1_cnn_headonly"), truth_of("group1_cnn"))
    assert result.means["weighted_tau"] == close(0.662, 5e-4)
    assert np.mean(list(result.static_order.values())) == close(0.837, 5e-4)
    assert result.null.sd == close(0.252, 0.01)
    assert result.null.p_value < 0.01
    assert result.interval[0] < 0.662 < result.interval[1]


# TMLR benchmark (arXiv 2405.20420) --------------------------------------------------------------
@pytest.fixture(scope="module")
def tmlr():
    """Scores {metric: {data set: {model: score}}}, truth {data set: {model: accuracy}}."""
    data = json.loads((DATA / "tmlr_bench" / "tmlr_scores.json").read_text())

    def named(values):
        return dict(zip(data["models"], values, strict=True))

    truth = {name: named(one["test"]) for name, one in data["datasets"].items()}
    metrics = set(next(iter(data["datasets"].values()))) - {"n_classes", "test"}
    scores = {
        metric: {name: named(one[metric]) for name, one in data["datasets"].items()}
        for metric in metrics
    }
    scores["imagenet"] = dict.fromkeys(truth, named(data["imagenet_top1"]))
    for metrics in (
        ("imagenet", "ncti", "etran_energy"),
        ("imagenet", "ncti"),
        ("imagenet", "sfda"),
        ("sfda", "logme"),
    ):
        scores["+".join(metrics)] = {
            name: combine(*(scores[metric][name] for metric in metrics)) for name in truth
        }
    return scores, truth


TRIPLE = "imagenet+ncti+etran_energy"


@pytest.mark.parametrize(
    ("metric", "mean", "natural"),
    [
        ("etran_energy", 0.668, 0.685),
        ("ncti", 0.663, 0.813),
        ("imagenet", 0.646, 0.744),
        ("gbc", 0.457, 0.660),
        ("parc", 0.450, 0.626),
        ("nleep", 0.431, 0.606),
        ("leep", 0.391, 0.525),
        ("pactran", 0.368, 0.427),
        ("logme", 0.353, 0.437),
        ("tmi", 0.304, 0.317),
        ("nce", 0.258, 0.419),
        ("sfda", 0.219, 0.315),
        ("hscore", 0.091, 0.028),
        ("reg_hscore", -0.094, 0.014),
        (TRIPLE, 0.768, 0.858),
        ("imagenet+ncti", 0.717, 0.843),
        ("imagenet+sfda", 0.392, None),
        ("sfda+logme", 0.327, None),
    ],
)
def test_tmlr_means(tmlr, metric, mean, natural):
    scores, truth = tmlr
    values = taus(scores[metric], truth)
    assert np.mean(values) == close(mean, 5.1e-4)
    if natural is not None:
        assert np.mean(values[:8]) == close(natural, 5.1e-4)


def test_tmlr_static_order(tmlr):
    _, truth = tmlr
    assert np.mean(taus(static_order(truth), truth)) == close(0.733, 5e-4)
    assert np.mean(taus(static_order(truth), truth)[:8]) == close(0.801, 5e-4)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (TRIPLE, [0.79, 0.89, 0.81, 0.97, 0.76, 0.86, 0.88, 0.90, 0.23, 0.60, 0.75]),
        ("imagenet+ncti", [0.87, 0.93, 0.82, 0.89, 0.80, 0.72, 0.78, 0.92, 0.12, 0.35, 0.68]),
        ("etran_energy", [0.48, 0.79, 0.89, 0.76, 0.64, 0.40, 0.76, 0.77, 0.36, 0.79, 0.72]),
        ("ncti", [0.94, 0.86, 0.78, 0.72, 0.76, 0.73, 0.83, 0.88, 0.07, 0.11, 0.61]),
        ("imagenet", [0.81, 0.78, 0.78, 0.83, 0.67, 0.69, 0.63, 0.76, 0.09, 0.52, 0.54]),
        ("sfda", [0.43, 0.30, 0.04, 0.16, 0.55, 0.21, 0.48, 0.35, -0.09, -0.01, -0.01]),
    ],
)
def test_tmlr_data_sets(tmlr, metric, expected):
    scores, truth = tmlr
    assert taus(scores[metric], truth) == [close(value, 5.1e-3) for value in expected]


@pytest.mark.parametrize(
    ("metric", "regret", "pick", "best"),
    [
        ("ncti", 0.0032, 0.91, 0.82),
        ("imagenet", 0.0038, None, 0.91),
        ("etran_energy", 0.0106, 0.82, 0.82),
        ("logme", 0.0446, 0.55, 0.55),
        ("sfda", 0.0520, 0.45, 0.09),
        (TRIPLE, 0.0032, None, None),
        ("imagenet+ncti", 0.0032, None, None),
    ],
)
def test_tmlr_top_picks(tmlr, metric, regret, pick, best):
    """The record takes the first of tied models in the order of the file."""
    scores, truth = tmlr

    def mean(figure, *args, **options):
        return np.mean(
            [figure(first_of_ties(scores[metric][d]), truth[d], *args, **options) for d in truth]
        )

    assert mean(regret_at_k, 1) == close(regret, 5.1e-5)
    if pick is not None:
        assert mean(hit_at_k, 3, of="pick") == close(pick, 5.1e-3)
    if best is not None:
        assert mean(hit_at_k, 3, of="best") == close(best, 5.1e-3)


def first_of_ties(scores):
    return {name: value - 1e-9 * row for row, (name, value) in enumerate(scores.items())}


@pytest.mark.parametrize(
    ("metric", "recorded", "expected"),
    [("sfda", 0.0520, 0.0494), (TRIPLE, 0.0032, 0.0031), ("imagenet+ncti", 0.0032, 0.0038)],
)
def test_tmlr_regret_with_ties_is_the_mean_over_their_orders(tmlr, metric, recorded, expected):
    """Unlike the recorded figures, ours cannot depend on the order of the models."""
    scores, truth = tmlr
    values = [regret_at_k(scores[metric][d], truth[d]) for d in truth]
    assert np.mean(values) == close(expected, 5.1e-5)
    assert round(np.mean(values), 4) != recorded


def test_tmlr_ties(tmlr):
    scores, _ = tmlr
    assert list(scores["sfda"]["flowers102"].values()).count(1.0) == 7


def test_tmlr_scores_follow_the_feature_width(tmlr):
    scores, truth = tmlr
    width = {"densenet121": 1024, "densenet161": 2208, "densenet169": 1664, "resnet50": 2048}
    width |= dict.fromkeys(["efficientnet_b0", "mobilenetv2_050", "mobilenetv2_100"], 1280)
    width |= {"resnet18": 512, "resnet34": 512, "vit_small_patch16_224": 384}
    expected = {"hscore": 0.64, "sfda": 0.62, "logme": 0.23, "ncti": 0.16, "gbc": -0.04}
    means = {m: np.mean([spearman(scores[m][d], width) for d in truth]) for m in expected}
    assert means == {m: close(value, 5.1e-3) for m, value in expected.items()}


def test_tmlr_interval_over_data_sets(tmlr):
    scores, truth = tmlr
    for metric, low, high in (("sfda", 0.10, 0.34), ("imagenet", 0.51, 0.75)):
        result = evaluate_many(scores[metric], truth, n_permutations=1)
        assert result.interval == (close(low, 0.015), close(high, 0.015))


# MedMNIST (arXiv 2412.20172) --------------------------------------------------------------------
DATASETS = {
    "bloodmnist": 7,
    "breastmnist": 8,
    "dermamnist": 7,
    "octmnist": 8,
    "organamnist": 6,
    "organcmnist": 6,
    "organsmnist": 5,
    "pathmnist": 7,
    "pneumoniamnist": 8,
    "retinamnist": 8,
    "tissuemnist": 6,
}


def medmnist(metric, read=read_scores):
    path = DATA / "medmnist" / f"{metric}_model.csv"
    return {dataset: read(path, column=dataset) for dataset in DATASETS}


def test_medmnist_sfda_is_saturated():
    scores = medmnist("sfda")
    assert {d: list(one.values()).count(1.0) for d, one in scores.items()} == DATASETS


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("sfda", 0.187),
        ("logme", 0.036),
        ("ncti", -0.084),
        ("parc", -0.104),
        ("nleep", -0.151),
        ("leep", -0.200),
        ("lp", -0.211),
        ("fu", -0.286),
    ],
)
def test_medmnist_means(metric, expected):
    truth = medmnist("AUCs", read_truth)
    assert np.mean(taus(medmnist(metric), truth)) == close(expected, 5.1e-4)
