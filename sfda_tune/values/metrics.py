"""The metrics of predictions: which way is better, and what people call them."""

from __future__ import annotations

__all__ = ["LOWER", "call", "signed"]

LOWER = frozenset({"log_loss", "rmse", "mae"})  # metrics of which less is better
_NAMES = {"r2": "R²", "spearman": "Spearman's ρ", "rmse": "RMSE", "mae": "MAE"}


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
