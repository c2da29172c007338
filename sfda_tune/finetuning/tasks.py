"""What labels are, to whoever trains on them: classes, numbers, levels, or several per image.

=================  ======================  ==========================  ==========================
                   `Classification`        `Regression`                `Multilabel`
=================  ======================  ==========================  ==========================
outputs            logits (n, C)           standardised numbers        logits (n, L)
                                           (n, 1)
targets            codes (n,)              (y − mean)/scale (n,), of   1, 0, −1 not known (n, L)
                                           the training part
predictions        probabilities (n, C)    numbers (n,), in the unit   probabilities (n, L)
                                           of the labels
loss               cross-entropy           squared, absolute, Huber    binary cross-entropy
start of the head  logistic regression     ridge regression, in        logistic regressions, each
                                           closed form                 label against the rest
=================  ======================  ==========================  ==========================

`Ordinal`, levels in an order, is `Regression` of their places 0 … C − 1; it names the nearest one.

A further kind of labels is a further class here, made by `make_task` and read by `read_task`; the
training, models and searches ask the task and never what kind it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from sfda_tune.data.checks import DatasetError
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.finetuning.calibration import fit_temperature
from sfda_tune.finetuning.epochs import measure
from sfda_tune.finetuning.heads import fit_head, fit_labels, fit_numbers
from sfda_tune.selection.evaluation import accuracy_interval, design_effect
from sfda_tune.selection.numbers import (
    DRAWS,
    measure_levels,
    measure_numbers,
    name_levels,
    resample_levels,
    resample_numbers,
)
from sfda_tune.selection.several import (
    UNDECIDED,
    choose_thresholds,
    describe_labels,
    measure_labels,
    resample_labels,
)
from sfda_tune.values.labels import NOUNS

if TYPE_CHECKING:
    import torch

__all__ = [
    "KINDS", "LOSSES", "MONITORS", "Classification", "Multilabel", "Ordinal", "Regression",
    "Task", "find_kind", "make_task", "read_task",
]  # fmt: skip


class Task(ABC):
    """How a kind of labels is trained on, predicted and judged."""

    name: ClassVar[str]  # that of `ImageDataset.task`
    monitors: ClassVar[tuple[str, ...]]  # what `measure` finds; the first by default
    losses: ClassVar[tuple[str, ...]]  # the first by default
    tie: ClassVar[str]  # the metric that tells apart what the chosen one does not
    exported: ClassVar[tuple[str, str]]  # names of outputs and predictions in ONNX
    refused: ClassVar[Mapping[str, Any]] = {}  # fields of a configuration without a meaning here
    n_draws_of_error: ClassVar[int] = DRAWS  # bootstrap samples after every epoch
    classes: tuple[str, ...]  # names of the columns of predictions; none for numbers

    @property
    @abstractmethod
    def n_outputs(self) -> int:
        """Width of the head."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the prediction for one image."""
        return (len(self.classes),)

    @property
    def unit(self) -> float:
        """The size of differences between predictions."""
        return 1.0

    def describe(self) -> dict[str, Any]:
        """Return what predictions need besides the classes, as JSON values."""
        return {}

    def check(self, config: Any) -> None:
        """Raise a ValueError if a `FinetuneConfig` has what makes no sense for these labels."""
        for name, allowed in (("monitor", self.monitors), ("loss", self.losses)):
            if (value := getattr(config, name)) not in ("auto", *allowed):
                raise ValueError(
                    f"`{name}` must be one of {allowed} for {self.name} but is {value!r}."
                )
        for name, allowed in self.refused.items():
            if (value := getattr(config, name)) != allowed:
                raise ValueError(
                    f"`{name}` must be {allowed!r} for {self.name} but is {value!r}: it is about "
                    "classes, one per image."
                )

    def find_loss(self, config: Any) -> str:
        """Return which loss a configuration means."""
        return self.losses[0] if config.loss == "auto" else config.loss

    @abstractmethod
    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Return targets of labels, as `loss` takes them."""

    def weigh(self, labels: np.ndarray, config: Any) -> np.ndarray | None:
        """Return the weight of each class in the loss; None for equal ones."""
        return None

    @abstractmethod
    def loss(
        self, outputs: torch.Tensor, targets: torch.Tensor, config: Any, weights: Any = None
    ) -> torch.Tensor:
        """Return the loss, summed over images."""

    @abstractmethod
    def ignorance(self, labels: np.ndarray, config: Any) -> float:
        """Return the mean loss of a network that knows nothing."""

    @abstractmethod
    def fit_head(self, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Fit a linear head to features (n, d).

        Return weight (n_outputs, d), bias, and the factor with which its training begins.
        """

    @abstractmethod
    def finish(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return predictions as a tensor, one per row, by operations that ONNX knows."""

    def predict(self, outputs: torch.Tensor) -> np.ndarray:
        """Return predictions, float64, one per row."""
        return self.finish(outputs.double()).numpy()

    @abstractmethod
    def measure(self, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """Return how good predictions are, by metric."""

    def fit_temperature(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        """Return what outputs are to be divided by; 1 where predictions are no probabilities."""
        return 1.0

    def choose_thresholds(self, labels: np.ndarray, predicted: np.ndarray) -> tuple[float, ...]:
        """Return from which probability on each label is named; none where one always is."""
        return ()

    def decide_by(self, thresholds: Sequence[float]) -> Task:
        """Return the task with what `choose_thresholds` found."""
        return self

    def examine(self, labels: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
        """Return what else a test tells, as JSON values."""
        return {}

    def resample(
        self,
        labels: np.ndarray,
        predicted: np.ndarray,
        groups: np.ndarray | None,
        n_draws: int = DRAWS,
    ) -> dict[str, np.ndarray]:
        """Return the metrics on bootstrap samples of the images, or groups, (n_draws,) each.

        None where an error is that of a share of the images.
        """
        return {}

    def find_error(
        self,
        labels: np.ndarray,
        predicted: np.ndarray,
        metric: str,
        groups: np.ndarray | None = None,
    ) -> float:
        """Return the standard error of a metric; NaN where it is that of a share of the images."""
        draws = self.resample(labels, predicted, groups, self.n_draws_of_error)
        return float(draws[metric].std()) if draws else math.nan

    def find_intervals(
        self, labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray | None
    ) -> dict[str, tuple[float, float]]:
        """Return 95 % intervals of metrics; images of a group count as one."""
        draws = self.resample(labels, predicted, groups)
        ends = {name: np.quantile(found, (0.025, 0.975)) for name, found in draws.items()}
        return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


@dataclass(frozen=True)
class Classification(Task):
    """One of several classes."""

    classes: tuple[str, ...]

    name: ClassVar[str] = "classification"
    monitors: ClassVar[tuple[str, ...]] = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")
    losses: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    tie: ClassVar[str] = "log_loss"
    exported: ClassVar[tuple[str, str]] = ("logits", "probabilities")

    @property
    def n_outputs(self) -> int:
        """One logit per class."""
        return len(self.classes)

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Return the codes."""
        return labels

    def weigh(self, labels: np.ndarray, config: Any) -> np.ndarray | None:
        """Return weights ∝ 1 / images of the class, 1 on the average image, if asked for."""
        if config.class_weights is None:
            return None
        counts = np.bincount(labels, minlength=len(self.classes))
        return len(labels) / np.maximum(counts, 1) / np.count_nonzero(counts)

    def loss(
        self, outputs: torch.Tensor, targets: torch.Tensor, config: Any, weights: Any = None
    ) -> torch.Tensor:
        """Return the cross-entropy."""
        from torch.nn.functional import cross_entropy

        smoothing = config.label_smoothing
        return cross_entropy(outputs, targets, weights, reduction="sum", label_smoothing=smoothing)

    def ignorance(self, labels: np.ndarray, config: Any) -> float:
        """Return log C."""
        return math.log(len(self.classes))

    def fit_head(self, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Fit logistic regression, see `sfda_tune.finetuning.heads.fit_head`."""
        return fit_head(x, labels, len(self.classes))

    def finish(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return softmax probabilities, whose rows add up to one."""
        return outputs.softmax(1)

    def measure(self, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """See `sfda_tune.finetuning.epochs.measure`."""
        return measure(labels, predicted)

    def fit_temperature(self, labels: np.ndarray, predicted: np.ndarray) -> float:
        """See `sfda_tune.finetuning.calibration.fit_temperature`."""
        return fit_temperature(labels, predicted)

    def find_intervals(
        self, labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray | None
    ) -> dict[str, tuple[float, float]]:
        """Return Wilson's interval of the accuracy."""
        right = predicted.argmax(axis=1) == labels
        effect = design_effect(right, groups)
        return {"accuracy": accuracy_interval(int(right.sum()), len(right), effect)}


@dataclass(frozen=True)
class Regression(Task):
    """A number, standardised by the mean and the standard deviation of the training part."""

    mean: float
    scale: float
    classes: tuple[str, ...] = field(default=(), init=False, repr=False)

    name: ClassVar[str] = "regression"
    monitors: ClassVar[tuple[str, ...]] = ("r2", "spearman", "rmse", "mae")
    losses: ClassVar[tuple[str, ...]] = ("mse", "l1", "huber")
    tie: ClassVar[str] = "rmse"
    exported: ClassVar[tuple[str, str]] = ("standardised", "numbers")
    refused: ClassVar[Mapping[str, Any]] = {
        "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0, "class_weights": None,
    }  # fmt: skip

    @classmethod
    def of(cls, labels: np.ndarray) -> Self:
        """Return the task of training labels; a DatasetError if they are all equal.

        >>> Regression.of(np.array([1.0, 3.0]))
        Regression(mean=2.0, scale=1.0)
        """
        mean, scale = float(labels.mean()), float(labels.std())
        if not 0 < scale < math.inf:
            raise DatasetError(
                f"`dataset` must have different {NOUNS.get(cls.name, 'numbers')} to train on but "
                f"all {len(labels)} are {mean:g}; add images with others."
            )
        return cls(mean, scale)

    @property
    def n_outputs(self) -> int:
        """One."""
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        """A number per image."""
        return ()

    @property
    def unit(self) -> float:
        """The scale."""
        return self.scale

    def describe(self) -> dict[str, Any]:
        """Return mean and scale."""
        return {"mean": self.mean, "scale": self.scale}

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Return (y − mean)/scale, float32."""
        return ((labels - self.mean) / self.scale).astype(np.float32)

    def loss(
        self, outputs: torch.Tensor, targets: torch.Tensor, config: Any, weights: Any = None
    ) -> torch.Tensor:
        """Return the squared or absolute error, or Huber's with δ = 1, of standardised numbers."""
        from torch.nn.functional import huber_loss, l1_loss, mse_loss

        losses = {"mse": mse_loss, "l1": l1_loss, "huber": huber_loss}
        return losses[self.find_loss(config)](outputs[:, 0], targets, reduction="sum")

    def ignorance(self, labels: np.ndarray, config: Any) -> float:
        """Return the mean loss of the mean."""
        import torch

        targets = torch.tensor(self.encode(labels))
        nothing = torch.zeros((len(targets), 1))
        return float(self.loss(nothing, targets, config)) / len(targets)

    def fit_head(self, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Fit ridge regression, see `sfda_tune.finetuning.heads.fit_numbers`."""
        return fit_numbers(x, (labels - self.mean) / self.scale)

    def finish(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return numbers in the unit of the labels, float64: their mean may be far from 0."""
        return self.mean + self.scale * outputs[:, 0].double()

    def measure(self, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """See `sfda_tune.selection.numbers.measure_numbers`."""
        return measure_numbers(labels, predicted)

    def resample(
        self,
        labels: np.ndarray,
        predicted: np.ndarray,
        groups: np.ndarray | None,
        n_draws: int = DRAWS,
    ) -> dict[str, np.ndarray]:
        """See `sfda_tune.selection.numbers.resample_numbers`."""
        return resample_numbers(labels, predicted, groups, n_draws=n_draws)


@dataclass(frozen=True)
class Ordinal(Regression):
    """One of several levels in an order; predictions are places 0 … C − 1, with fractions.

    Spearman's ρ chooses: it is what frozen features are scored by, and no rounding makes it jump
    from one level to the next on few images.
    """

    classes: tuple[str, ...] = ()

    name: ClassVar[str] = "ordinal"
    monitors: ClassVar[tuple[str, ...]] = ("spearman", "qwk", "mae", "accuracy")
    tie: ClassVar[str] = "mae"
    exported: ClassVar[tuple[str, str]] = ("standardised", "places")

    def decide(self, p: np.ndarray) -> np.ndarray:
        """Return the nearest level of each place, by position in `classes`."""
        return name_levels(p, len(self.classes))

    def measure(self, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """See `sfda_tune.selection.numbers.measure_levels`."""
        return measure_levels(labels, predicted, len(self.classes))

    def resample(
        self,
        labels: np.ndarray,
        predicted: np.ndarray,
        groups: np.ndarray | None,
        n_draws: int = DRAWS,
    ) -> dict[str, np.ndarray]:
        """See `sfda_tune.selection.numbers.resample_levels`."""
        n_levels = len(self.classes)
        return resample_levels(labels, predicted, n_levels, groups, n_draws=n_draws)


@dataclass(frozen=True)
class Multilabel(Task):
    """Several of the labels, none or all; each is named from a threshold of its own on.

    Without `thresholds`, during training, what is measured by them is measured at the best ones
    for the images at hand: of the same kind for all epochs, but too good. A winner is tested with
    those of its trial.
    """

    classes: tuple[str, ...]
    thresholds: tuple[float, ...] = ()

    name: ClassVar[str] = "multilabel"
    monitors: ClassVar[tuple[str, ...]] = ("map", "macro_f1", "log_loss")
    losses: ClassVar[tuple[str, ...]] = ("binary_cross_entropy",)
    tie: ClassVar[str] = "log_loss"
    exported: ClassVar[tuple[str, str]] = ("logits", "probabilities")
    refused: ClassVar[Mapping[str, Any]] = {"mixup": 0.0, "cutmix": 0.0, "class_weights": None}
    n_draws_of_error: ClassVar[int] = 200

    def __post_init__(self) -> None:
        if len(self.thresholds) not in (0, len(self.classes)):
            raise ValueError(
                f"`thresholds` must be {len(self.classes)}, one per label, or none, but are "
                f"{len(self.thresholds)}."
            )

    @property
    def n_outputs(self) -> int:
        """One logit per label."""
        return len(self.classes)

    def describe(self) -> dict[str, Any]:
        """Return the thresholds."""
        return {"thresholds": list(self.thresholds)} if self.thresholds else {}

    def encode(self, labels: np.ndarray) -> np.ndarray:
        """Return 1, 0 and −1, float32."""
        return labels.astype(np.float32)

    def loss(
        self, outputs: torch.Tensor, targets: torch.Tensor, config: Any, weights: Any = None
    ) -> torch.Tensor:
        """Return the binary cross-entropy, averaged over what is known of each image."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        known = (targets >= 0).to(outputs.dtype)
        smooth = targets.clamp(min=0) * (1 - config.label_smoothing) + config.label_smoothing / 2
        each = binary_cross_entropy_with_logits(outputs, smooth, reduction="none")
        return ((each * known).sum(1) / known.sum(1).clamp(min=1)).sum()

    def ignorance(self, labels: np.ndarray, config: Any) -> float:
        """Return the mean loss of the base rates."""
        import torch

        known = np.maximum((labels >= 0).sum(axis=0), 1)
        rates = np.clip((labels == 1).sum(axis=0) / known, 1e-6, 1 - 1e-6)
        s = config.label_smoothing
        logits = torch.tensor(rates * (1 - s) + s / 2).logit().expand(len(labels), -1)
        targets = torch.tensor(self.encode(labels)).double()
        return float(self.loss(logits, targets, config)) / len(labels)

    def fit_head(self, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Fit logistic regressions, see `sfda_tune.finetuning.heads.fit_labels`."""
        return fit_labels(x, labels)

    def finish(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return probabilities, each label by itself."""
        return outputs.sigmoid()

    def measure(self, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
        """See `sfda_tune.selection.several.measure_labels`."""
        return measure_labels(labels, predicted, self._thresholds(labels, predicted))

    def choose_thresholds(self, labels: np.ndarray, predicted: np.ndarray) -> tuple[float, ...]:
        """See `sfda_tune.selection.several.choose_thresholds`."""
        return tuple(choose_thresholds(labels, predicted).tolist())

    def decide_by(self, thresholds: Sequence[float]) -> Multilabel:
        """Return the task with these thresholds."""
        return replace(self, thresholds=tuple(thresholds))

    def decide(self, p: np.ndarray) -> np.ndarray:
        """Return which labels are named, (n, L); from .5 on where no thresholds are known."""
        return p >= np.array(self.thresholds or [UNDECIDED] * len(self.classes))

    def _thresholds(self, labels: np.ndarray, predicted: np.ndarray) -> tuple[float, ...]:
        return self.thresholds or self.choose_thresholds(labels, predicted)

    def examine(self, labels: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
        """Return a record for each label."""
        thresholds = self._thresholds(labels, predicted)
        return {"labels": describe_labels(labels, predicted, thresholds, self.classes)}

    def resample(
        self,
        labels: np.ndarray,
        predicted: np.ndarray,
        groups: np.ndarray | None,
        n_draws: int = DRAWS,
    ) -> dict[str, np.ndarray]:
        """See `sfda_tune.selection.several.resample_labels`."""
        thresholds = self._thresholds(labels, predicted)
        return resample_labels(labels, predicted, thresholds, groups, n_draws=n_draws)


KINDS: dict[str, type[Classification] | type[Regression] | type[Multilabel]] = {
    kind.name: kind for kind in (Classification, Regression, Ordinal, Multilabel)
}
MONITORS = tuple(dict.fromkeys(metric for kind in KINDS.values() for metric in kind.monitors))
LOSSES = tuple(dict.fromkeys(loss for kind in KINDS.values() for loss in kind.losses))


def find_kind(dataset: Any, task: str | None = None) -> type[Task]:
    """Return the kind of task of a data set that may not be open yet.

    What `task` says, or the labels of an `ImageDataset`; else classes, for others are asked for
    by name (`sfda_tune.data.labels`).
    """
    known = dataset.task if isinstance(dataset, ImageDataset) else ""
    return KINDS.get(task if task in KINDS else known, Classification)


def make_task(train: ImageDataset) -> Task:
    """Return the task of training images."""
    if train.task == "regression":
        return Regression.of(train.labels)
    if train.task == "ordinal":
        return replace(Ordinal.of(train.labels), classes=train.classes)
    if train.task == "multilabel":
        return Multilabel(train.classes)
    return Classification(train.classes)


def read_task(provenance: Mapping[str, Any]) -> Task:
    """Return the task of a model, from what `FineTuning.save_model` wrote."""
    about, classes = dict(provenance.get("task") or {}), tuple(provenance["classes"])
    name = about.pop("name", Classification.name)
    if name == Regression.name:
        return Regression(**about)
    if name == Ordinal.name:
        return Ordinal(**about, classes=classes)
    if name == Multilabel.name:
        return Multilabel(classes, tuple(about.get("thresholds", ())))
    return Classification(classes)
