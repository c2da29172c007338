"""The metrics of predictions: which way is better, and what people call them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LOWER", "call", "signed", "tell"]

LOWER = frozenset({"log_loss", "rmse", "mae"})  # metrics of which less is better
_NAMES = {
    "r2": "R²", "spearman": "Spearman's ρ", "rmse": "RMSE", "mae": "MAE", "map": "mAP",
    "qwk": "quadratic weighted κ",
    "macro_f1": "macro-F1", "log_loss": "log-loss",
}  # fmt: skip


def signed(value: float, metric: str) -> float:
    """Return a value such that more is better.

    >>> signed(0.9, "accuracy"), signed(2.5, "rmse")
    (0.9, -2.5)
    """
    return -value if metric in LOWER else value


def call(metric: str) -> str:
    """Return what people call a metric.

    >>> call("r2"), call("balanced_accuracy")
    ('R²', 'balanced accuracy')
    """
    return _NAMES.get(metric, metric.replace("_", " "))


def tell(value: float, interval: Sequence[float] | None = None) -> str:
    """Return the value of a metric in figures, with its interval where it is known.

    >>> tell(0.91234, (0.88, 0.94)), tell(0.5)
    ('0.9123 (95 %: 0.8800 to 0.9400)', '0.5000')
    """
    return f"{value:.4f}" + (" (95 %: {:.4f} to {:.4f})".format(*interval) if interval else "")
