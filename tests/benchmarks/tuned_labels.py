"""Do scores of several labels per image, and of numbers, know the order of fine-tuned networks?

Truth: all demo backbones, fine-tuned with the defaults at two learning rates and `--seeds` seeds;
of the two rates the validation images choose, and held-out images judge. Several labels: 400
images of two handwritten digits each (`several_labels.place_digits`). Numbers: the sum of these
digits; the value of single digits. Prints Kendall's τ, weighted τ, and what the first choice loses
against the best, also for a frozen linear probe; and τ between two seeds, how sure the truth is::

    nice python tests/benchmarks/tuned_labels.py --seeds 2
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from scipy.stats import kendalltau, weightedtau
from several_labels import place_digits
from sklearn.datasets import load_digits

from sfda_tune import ImageDataset, open_dataset, resolve_backbones
from sfda_tune.extraction.run import extract
from sfda_tune.extraction.settings import Settings
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.models import predict
from sfda_tune.finetuning.run import finetune
from sfda_tune.finetuning.shared import SharedWork
from sfda_tune.metrics.multilabel import (
    knn_multilabel,
    linear_probe_multilabel,
    logme_multilabel,
    sfda_multilabel,
)
from sfda_tune.metrics.regression import knn_regression, logme_regression, ridge, ridge_probe
from sfda_tune.values.features import Backbone

TRAIN, TEST = 400, 800
RATES = (3e-4, 3e-3)
NUMBERS: dict[str, Callable] = {
    "ridge": ridge, "logme": logme_regression, "knn": knn_regression, "linear_probe": ridge_probe,
}  # fmt: skip
LABELS: dict[str, Callable] = {
    "sfda": sfda_multilabel, "logme": logme_multilabel, "knn": knn_multilabel,
    "linear_probe": linear_probe_multilabel,
}  # fmt: skip


def make_sets() -> dict[str, tuple[ImageDataset, ImageDataset]]:
    """Return training and test images by name."""
    placed, labels = place_digits(2, np.ones(10))
    digits = load_digits()
    single = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(single))
    given = {
        "two digits, which": (placed, labels, "multilabel"),
        "two digits, their sum": (placed, labels @ np.arange(10.0), "regression"),
        "one digit, its value": (single[order], digits.target[order].astype(float), "regression"),
    }
    sets = {}
    for name, (images, y, task) in given.items():
        data = open_dataset((images, y), task=task)
        rows = np.arange(len(data))
        sets[name] = data.subset(rows[:TRAIN]), data.subset(rows[TRAIN : TRAIN + TEST])
    return sets


def tune(
    backbone: Backbone, train: ImageDataset, test: ImageDataset, seed: int, shared: SharedWork
) -> float:
    """Return what the network of the better rate reaches on the test images."""
    found = []
    for lr in RATES:
        config = FinetuneConfig(epochs=15, lr=lr, seed=seed)
        run = finetune(backbone, train, config, device="cpu", workers=0, shared=shared)
        for _ in run:
            pass
        assert run.best is not None
        model = run.model()
        task = model.task
        value = task.measure(test.labels, predict(model, test, device="cpu"))[task.monitors[0]]
        found.append((run.best.values[task.monitors[0]], value))
    return max(found)[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    n_seeds = parser.parse_args().seeds
    backbones = resolve_backbones("demo:*")
    for name, (train, test) in make_sets().items():
        started, shared, truth, scores = time.perf_counter(), SharedWork(), {}, {}
        for extraction in extract(train, backbones, Settings(device="cpu", workers=0)):
            features, spec = extraction.features, extraction.backbone
            assert features is not None
            for score, of in (LABELS if train.task == "multilabel" else NUMBERS).items():
                scores.setdefault(score, []).append(of(features.x, features.y).value)
            truth[spec.name] = [tune(spec, train, test, s, shared) for s in range(n_seeds)]
        values = np.array(list(truth.values()))
        mean = values.mean(axis=1)
        print(f"{name} ({time.perf_counter() - started:.0f} s)")
        for backbone, row in zip(truth, values, strict=True):
            print(f"  {backbone:30}", *(f"{value:.3f}" for value in row))
        if n_seeds > 1:
            print(f"  τ between two seeds {kendalltau(values[:, 0], values[:, 1])[0]:.2f}")
        for score, x in scores.items():
            lost = mean.max() - mean[int(np.argmax(x))]
            taus = kendalltau(x, mean)[0], weightedtau(x, mean)[0]
            print(f"  {score:22} τ {taus[0]:5.2f}, weighted {taus[1]:5.2f}, lost {lost:.3f}")


if __name__ == "__main__":
    main()
