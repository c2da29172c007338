"""Levels in an order: which linear head names them best, which score knows the order of backbones?

Scikit-learn's digits as levels 0 … 9, as four grades of which the lowest has half of the images,
and blurred by five strengths; a folder of class folders called 0, 1, … may be added. 500 images
train heads on the frozen features of the demo backbones and give scores, the others test. The
proportional odds model (cumulative links, what CORAL puts on a network) has one weight and C − 1
biases, its penalty chosen by 5-fold cross-validation. Prints the means over the backbones of
Spearman's ρ, quadratic weighted κ, MAE and accuracy; then weighted τ of scores with the best ρ.
With ``--finetune`` instead: the same of four backbones, fine-tuned for six epochs on 300 images,
as numbers and as levels, tested on 600::

    python tests/benchmarks/levels.py [--finetune] [FOLDER]
"""

from __future__ import annotations

import sys

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize
from scipy.special import expit, softmax
from scipy.stats import rankdata, spearmanr, weightedtau
from sklearn.metrics import cohen_kappa_score

from sfda_tune import open_dataset, resolve_backbones
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.extraction.run import extract
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.heads import fit_head
from sfda_tune.finetuning.models import predict
from sfda_tune.finetuning.run import finetune
from sfda_tune.metrics.regression import ORDINAL, fit_ridge, ridge
from sfda_tune.metrics.sfda import sfda
from sfda_tune.selection.numbers import find_places, name_levels

TRAIN = 500
SCORES = {
    "ridge, ρ": ORDINAL["ridge"],
    "ridge, R²": ridge,
    "ridge of ranks, ρ": lambda x, y: ORDINAL["ridge"](x, rankdata(y)),
    "knn, ρ": ORDINAL["knn"],
    "logme": ORDINAL["logme"],
    "sfda of classes": sfda,
}


def blur() -> ImageDataset:
    """Return digits blurred by five strengths, each a level."""
    digits = open_dataset("digits")
    y = np.random.default_rng(0).integers(0, 5, len(digits))
    images = [
        gaussian_filter(x.astype(float), 0.4 * k) for x, k in zip(digits.items, y, strict=True)
    ]
    return open_dataset((np.rint(images).astype(np.uint8), y), task="ordinal")


def grade() -> ImageDataset:
    """Return digits as four grades, half of the images of the lowest."""
    digits = open_dataset("digits")
    grades = np.array([0, 0, 0, 0, 0, 1, 1, 2, 2, 3])[digits.labels]
    return open_dataset((digits.items, grades), task="ordinal")


def fit_odds(x: np.ndarray, y: np.ndarray, C: int, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit P(y > k) = σ(wx + b_k) with the penalty t‖w‖²/2; return w and b."""
    above = (y[:, None] > np.arange(C - 1)).astype(float)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = theta[: x.shape[1]], theta[x.shape[1] :]
        f = (x @ w)[:, None] + b
        value = (np.logaddexp(0, f) - above * f).sum(axis=1).mean() + t / 2 * w @ w
        g = (expit(f) - above) / len(y)
        return value, np.concatenate([x.T @ g.sum(axis=1) + t * w, g.sum(axis=0)])

    shares = np.clip(above.mean(axis=0), 1e-3, 1 - 1e-3)
    start = np.concatenate([np.zeros(x.shape[1]), np.log(shares / (1 - shares))])
    theta = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    return theta[: x.shape[1]], theta[x.shape[1] :]


def choose_odds(x: np.ndarray, y: np.ndarray, C: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit with the penalty that predicts best in five folds."""
    fold, losses = np.random.default_rng(0).permutation(len(y)) % 5, {}
    for t in (1e-3, 1e-2, 1e-1, 1.0):
        total = 0.0
        for k in range(5):
            w, b = fit_odds(x[fold != k], y[fold != k], C, t)
            f = (x[fold == k] @ w)[:, None] + b
            above = y[fold == k][:, None] > np.arange(C - 1)
            total += float((np.logaddexp(0, f) - above * f).sum())
        losses[t] = total
    return fit_odds(x, y, C, min(losses, key=lambda t: losses[t]))


def judge(y: np.ndarray, place: np.ndarray, level: np.ndarray) -> list[float]:
    """Return Spearman's ρ of places, and kappa, MAE and accuracy of levels."""
    kappa = cohen_kappa_score(y, level, weights="quadratic")
    return [spearmanr(y, place)[0], kappa, np.abs(y - level).mean(), np.mean(y == level)]


def train_heads(x: np.ndarray, y: np.ndarray, C: int) -> dict[str, list[float]]:
    """Return how each head, trained on the first images, does on the others."""
    mean, scale = x[:TRAIN].mean(axis=0), x[:TRAIN].std(axis=0)
    z = (x - mean) / np.where(scale > 1e-6 * np.abs(mean), scale, np.inf)
    train, test, truth = z[:TRAIN], z[TRAIN:], y[TRAIN:]
    w, b, _ = fit_ridge(train, y[:TRAIN])
    place = test @ w + b
    found = {"ridge of places": judge(truth, place, np.clip(np.rint(place), 0, C - 1))}
    w, b = choose_odds(train, y[:TRAIN], C)
    f = test @ w
    found["proportional odds"] = judge(truth, f, (f[:, None] + b > 0).sum(axis=1))
    weight, bias, _ = fit_head(train, y[:TRAIN], C)
    p = softmax(test @ weight.T + bias, axis=1)
    place = find_places(p)
    found["classes, median"] = judge(truth, place, name_levels(p))
    found["classes, mean"] = judge(truth, place, np.rint(place))
    found["classes, likeliest"] = judge(truth, place, p.argmax(axis=1))
    return found


def tune_both(data: ImageDataset) -> dict[str, list[list[float]]]:
    """Fine-tune on levels, and on their places as numbers."""
    train, test, found = data.subset(range(300)), data.subset(range(300, min(900, len(data)))), {}
    C, names = len(data.classes), ("resnet_glyphs", "convnext_glyphs", "regnet_shapes")
    for backbone in resolve_backbones([f"demo:{n}" for n in (*names, "efficientnet_textures")]):
        numbers = ImageDataset("places", train.items, train.labels.astype(float), ())
        for kind, part in (("numbers", numbers), ("levels", train)):
            with finetune(backbone, part, FinetuneConfig(epochs=6), device="cpu") as run:
                for _ in run:
                    pass
                p = predict(run.model(), test, device="cpu")
            if kind == "levels":
                figures = judge(test.labels, find_places(p), name_levels(p))
            else:
                figures = judge(test.labels, p, np.clip(np.rint(p), 0, C - 1))
            found.setdefault(kind, []).append(figures)
    return found


def main() -> None:
    sets = {
        "digits 0 … 9": open_dataset("digits", task="ordinal"),
        "four grades": grade(),
        "blur": blur(),
    }
    tune = "--finetune" in sys.argv
    for folder in (a for a in sys.argv[1:] if a != "--finetune"):
        sets[folder] = open_dataset(folder, task="ordinal", split="all")
    for name, data in sets.items():
        data = data.subset(np.random.default_rng(0).permutation(len(data)))
        if tune:
            print(name)
            for kind, rows in tune_both(data).items():
                print(f"  {kind:22} " + "  ".join(f"{v:.3f}" for v in np.mean(rows, axis=0)))
            continue
        C, heads, truth = len(data.classes), [], []
        scores: dict[str, list[float]] = {score: [] for score in SCORES}
        for extraction in extract(data, resolve_backbones("demo:*")):
            assert extraction.features is not None
            x, y = extraction.features.x.astype(np.float64), extraction.features.y
            heads.append(train_heads(x, y, C))
            truth.append(max(head[0] for head in heads[-1].values()))
            for score, function in SCORES.items():
                scores[score].append(function(x[:TRAIN], y[:TRAIN]).value)
        print(f"{name}: {C} levels, {len(data)} images")
        for head in heads[0]:
            values = np.mean([h[head] for h in heads], axis=0)
            print(f"  {head:22} " + "  ".join(f"{v:.3f}" for v in values))
        for score, values in scores.items():
            lost = max(truth) - truth[int(np.argmax(values))]
            print(f"  {score:22} {weightedtau(values, truth)[0]:5.2f} ({lost:.3f})")


if __name__ == "__main__":
    main()
