"""Which score of several labels per image knows the order of frozen backbones?

Images of two or three of scikit-learn's digits each, the labels being which digits there are;
scored on 500 of them by the eight demo backbones. Truth: mean average precision of logistic
regression on 1,100 others. Prints weighted τ, and in brackets what the first choice lost::

    python tests/benchmarks/several_labels.py
"""

from __future__ import annotations

import numpy as np
from scipy.stats import weightedtau
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from sfda_tune import open_dataset, resolve_backbones
from sfda_tune.extraction.run import extract
from sfda_tune.metrics._linear import fit_logistic
from sfda_tune.metrics.multilabel import knn_multilabel, logme_multilabel, sfda_multilabel

N, TRAIN = 1600, 500
SETS = {
    "two digits": (2, np.ones(10)),
    "three digits": (3, np.ones(10)),
    "long tail": (2, 1.6 ** -np.arange(10)),
}
SCORES = {
    "λ = .5": lambda x, y: sfda_multilabel(x, y, shrinkage=0.5),
    "λ = .01": lambda x, y: sfda_multilabel(x, y, shrinkage=0.01),
    "λ by leave-one-out": sfda_multilabel,
    "weights by prevalence": lambda x, y: sfda_multilabel(x, y, weights="prevalence"),
    "logme": logme_multilabel,
    "knn": knn_multilabel,
}


def place_digits(n_digits: int, frequency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images of 2 × 2 places, some of them with a digit, and which digits there are."""
    rng, digits = np.random.default_rng(0), load_digits()
    images, labels = np.zeros((N, 16, 16), np.uint8), np.zeros((N, 10), np.int8)
    p = frequency[digits.target] / frequency[digits.target].sum()
    for image, row in zip(images, labels, strict=True):
        chosen = rng.choice(len(p), n_digits, p=p, replace=False)
        for place, k in zip(rng.permutation(4), chosen, strict=False):
            i, j = 8 * (place // 2), 8 * (place % 2)
            image[i : i + 8, j : j + 8] = np.rint(digits.images[k] * (255 / 16))
            row[digits.target[k]] = 1
    return images, labels


def probe(x: np.ndarray, y: np.ndarray) -> float:
    """Return the mean average precision on the images that are not trained on; the best of 4 C."""
    mean, scale = x[:TRAIN].mean(axis=0), x[:TRAIN].std(axis=0)
    z = (x - mean) / np.maximum(scale, 1e-2 * np.median(scale) + 1e-9)
    found = []
    for C in (1e-3, 1e-2, 1e-1, 1):
        theta, _ = fit_logistic(z[:TRAIN], y[:TRAIN], 1 / (C * TRAIN))
        logits = z[TRAIN:] @ theta[:-1] + theta[-1]
        found.append(average_precision_score(y[TRAIN:], logits, average="macro"))
    return max(found)


def main() -> None:
    for name, options in SETS.items():
        images, labels = place_digits(*options)
        data = open_dataset((images, labels), task="multilabel")
        truth, scores = [], {score: [] for score in SCORES}
        for extraction in extract(data, resolve_backbones("demo:*")):
            assert extraction.features is not None
            x = extraction.features.x.astype(np.float64)
            truth.append(probe(x, labels))
            for score, function in SCORES.items():
                scores[score].append(function(x[:TRAIN], labels[:TRAIN]).value)
        print(name)
        for score, values in scores.items():
            lost = max(truth) - truth[int(np.argmax(values))]
            print(f"  {score:22} {weightedtau(values, truth)[0]:5.2f} ({lost:.3f})")


if __name__ == "__main__":
    main()
