"""What an epoch brings: the metrics on validation images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

__all__ = ["Epoch", "OutOfTimeError", "measure"]


class OutOfTimeError(Exception):
    """The time ended inside an epoch."""


@dataclass(frozen=True)
class Epoch:
    """What one epoch brought; number 0 is the linear head before any training.

    Parameters
    ----------
    number, steps : int
        Epochs and optimizer steps so far.
    seconds : float
        Wall time of this epoch, with its validation.
    lr : float
        Highest learning rate of the last step.
    train_loss : float
        Mean over the epoch; NaN for epoch 0.
    values : mapping of str to float
        Metrics on the validation images, which are attributes, too: accuracy, balanced_accuracy,
        macro_f1 and log_loss, of numbers r2, spearman, rmse and mae, of levels spearman, qwk, mae
        and accuracy, or of several labels map, macro_f1 and log_loss. A class without validation
        images does not count in the balanced accuracy.
    best : float
        The monitored metric of the best epoch so far.
    best_number : int
        Which epoch that is.
    images_per_second : float
        Training images over the time of training; NaN for epoch 0.
    interpolation : float, default 1
        How far these weights are on the way from the start to the trained ones.
    temperature : float, default 1
        By which their logits are to be divided, fitted to the validation images.
    error : float, default NaN
        Standard error of the monitored metric, where that of a share of the images is not its.
    thresholds : tuple of float, default ()
        Of several labels, from which probability on each is named, chosen on these images.

    Examples
    --------
    >>> epoch = Epoch(1, 4, 0.5, 1e-3, 0.3, {"accuracy": 0.9}, 0.9, 1, 100.0)
    >>> epoch.accuracy, epoch.to_dict()["accuracy"]
    (0.9, 0.9)
    """

    number: int
    steps: int
    seconds: float
    lr: float
    train_loss: float
    values: Mapping[str, float]
    best: float
    best_number: int
    images_per_second: float
    interpolation: float = 1.0
    temperature: float = 1.0
    error: float = math.nan
    thresholds: tuple[float, ...] = ()

    def __getattr__(self, name: str) -> float:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(f"an epoch has no {name!r}") from None

    def flatten(self) -> dict[str, float]:
        """Return all fields that are numbers, with the metrics among them."""
        others = ("values", "thresholds")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}
        return {**own, **self.values}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as `flatten` does; NaN becomes None, so that it is strict JSON."""
        found: dict[str, Any] = {
            k: v if math.isfinite(v) else None for k, v in self.flatten().items()
        }
        return found | ({"thresholds": list(self.thresholds)} if self.thresholds else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Epoch:
        """Build an epoch from `to_dict`'s result."""
        known: Any = {k: math.nan if v is None else v for k, v in values.items()}
        known["thresholds"] = tuple(known.get("thresholds", ()))
        names = {f.name for f in fields(cls)}
        own = {k: known.pop(k) for k in list(known) if k in names}
        return cls(**own, values=known)


def measure(labels: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """Return accuracy, balanced accuracy, macro-F1 and log-loss of probabilities (n, n_classes).

    Classes that `labels` lacks count in the macro-F1 if they are predicted, and not in the
    balanced accuracy.

    >>> measure(np.array([0, 1]), np.array([[0.75, 0.25], [0.25, 0.75]]))["accuracy"]
    1.0
    """
    from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

    found, present = p.argmax(1), np.unique(labels)
    macro: dict[str, Any] = {"average": "macro", "zero_division": 0}
    return {
        "accuracy": float(accuracy_score(labels, found)),
        "balanced_accuracy": float(recall_score(labels, found, labels=present, **macro)),
        "macro_f1": float(f1_score(labels, found, **macro)),
        "log_loss": float(log_loss(labels, p, labels=np.arange(p.shape[1]))),
    }
