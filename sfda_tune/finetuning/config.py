"""How to fine-tune, and what an epoch of it brings: the values of `sfda_tune.finetuning.run`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sfda_tune.extraction.settings import PRECISIONS
from sfda_tune.finetuning.tasks import LOSSES, MONITORS

__all__ = ["MONITORS", "FinetuneConfig"]

OPTIONAL = ("warmup_epochs", "layer_decay", "ema_decay", "clip_grad", "patience")  # may be None
SCHEDULES = ("cosine", "constant", "poly", "tanh", "wsd")
LIGHT = {"scale": (0.7, 1.0), "ratio": (0.9, 1.1), "hflip": 0.0, "color_jitter": None}


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune; every field is plain JSON.

    Parameters
    ----------
    epochs : int or "auto"
        0 keeps the linear probe as it is. ``"auto"``: 30 for 200 images, 18 for 1,000, 5 for
        50,000 (30·(200/n)^⅓, at least 5).
    batch_size : int, default 32
        Kept by gradient accumulation where the memory does not suffice for it.
    optimizer : str
        Any name that `timm.optim.create_optimizer_v2` knows.
    lr, weight_decay : float
        The default rate is the one with which pretrained networks went best untuned, see
        ``tests/benchmarks/finetuning_defaults.py``; very small ones can do with ten times as much.
    layer_decay : float, optional
        The learning rate of a layer is lr·layer_decay^(layers above it).
    head_lr_ratio : float, default 1
        Learning rate of the head over that of the last layer below it.
    schedule : {"cosine", "constant", "poly", "tanh", "wsd"}
        Of `timm.scheduler.create_scheduler_v2`; "poly" falls linearly.
    warmup_epochs : float, optional
        Default: a tenth of all epochs, however few steps an epoch has.
    head : {"probe", "random"}
        How the classifier starts.
    freeze : {"none", "backbone"}
        "backbone" trains the head only, with the backbone in eval mode.
    batch_norm : {"train", "frozen"}
        "train" normalises by each batch and learns its statistics, beginning (where the head
        starts as a probe) with those of the training images and a head fitted to them; "frozen"
        keeps the statistics of the pretraining, and trains scale and shift.
    label_smoothing, mixup, cutmix : float, default 0
        The last two are the α of `timm.data.Mixup`.
    augmentation : mapping
        Arguments of `timm.data.create_transform`. Default: crops of at least 70 % of the area,
        and no flips, which would change what characters and hand signs mean. ``{"no_aug": True}``
        switches it off. A backbone with a transform of the user's own is trained on what that
        transform returns.
    class_weights : {"balanced"} or None
        Weight of a class ∝ 1 / its images, 1 on the average image.
    ema_decay : float, optional
        Evaluate and keep a moving average of the weights (`timm.utils.ModelEmaV3`, warmed up).
    precision : {"float32", "tf32", "bfloat16", "float16"}
    clip_grad : float or None, default 1
        Largest norm of the gradient.
    patience : int, optional
        Stop after so many epochs without a better `monitor`.
    monitor : {"auto", "accuracy", "balanced_accuracy", "macro_f1", "log_loss"}
        Decides which weights are best; ties are decided by the log-loss. For numbers one of "r2",
        "spearman", "rmse" and "mae", and ties are decided by the RMSE. For levels one of
        "spearman", "qwk", "mae" and "accuracy", and ties are decided by the MAE. For several
        labels one of
        "map" (mean average precision), "macro_f1" and "log_loss". "auto": the first.
    loss : {"auto", "cross_entropy", "mse", "l1", "huber", "binary_cross_entropy"}
        What is minimised: the cross-entropy of classes; of standardised numbers the squared error
        (the default), the absolute one, or Huber's with δ = 1; of several labels the binary
        cross-entropy, averaged over those that are known of an image.
    val_fraction : float, default 0.2
        Part of the images held out, stratified, where no validation images are given.
    seed : int, default 0

    Raises
    ------
    ValueError
        Naming the field, the rule and the value.

    Examples
    --------
    >>> FinetuneConfig.from_dict(FinetuneConfig(lr=0.003).to_dict()).lr
    0.003
    """

    epochs: int | str = "auto"
    batch_size: int = 32
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    layer_decay: float | None = None
    head_lr_ratio: float = 1.0
    schedule: str = "cosine"
    warmup_epochs: float | None = None
    head: str = "probe"
    freeze: str = "none"
    batch_norm: str = "train"
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    augmentation: Mapping[str, Any] = field(default_factory=lambda: dict(LIGHT))
    class_weights: str | None = None
    ema_decay: float | None = None
    precision: str = "float32"
    clip_grad: float | None = 1.0
    patience: int | None = None
    monitor: str = "auto"
    loss: str = "auto"
    val_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("schedule", SCHEDULES),
            ("head", ("probe", "random")),
            ("freeze", ("none", "backbone")),
            ("batch_norm", ("frozen", "train")),
            ("class_weights", ("balanced", None)),
            ("precision", PRECISIONS),
            ("monitor", ("auto", *MONITORS)),
            ("loss", ("auto", *LOSSES)),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed} but is {value!r}.")
        if self.epochs != "auto":
            self._check("epochs", int, 0, math.inf)
        for name, kind, low, high in (
            ("batch_size", int, 2, math.inf),
            ("lr", float, 1e-12, math.inf),
            ("weight_decay", float, 0, math.inf),
            ("layer_decay", float, 1e-3, 1),
            ("head_lr_ratio", float, 1e-6, math.inf),
            ("warmup_epochs", float, 0, math.inf),
            ("label_smoothing", float, 0, 0.99),
            ("mixup", float, 0, math.inf),
            ("cutmix", float, 0, math.inf),
            ("ema_decay", float, 0, 1),
            ("clip_grad", float, 1e-12, math.inf),
            ("patience", int, 1, math.inf),
            ("val_fraction", float, 0.01, 0.9),
            ("seed", int, 0, math.inf),
        ):
            self._check(name, kind, low, high)
        if self.epochs == 0 and self.head == "random":
            raise ValueError("`epochs` must be > 0 with head='random'; 0 is the linear probe.")
        from timm.optim import list_optimizers  # pyright: ignore[reportPrivateImportUsage]

        if self.optimizer not in (names := list_optimizers()):
            raise ValueError(f"`optimizer` must be one of {names} but is {self.optimizer!r}.")
        from timm.data.transforms_factory import create_transform

        try:
            given = json.loads(json.dumps(dict(self.augmentation)))
            create_transform(32, is_training=True, **given)
        except (TypeError, ValueError, AssertionError, KeyError) as error:
            raise ValueError(
                "`augmentation` must be arguments of timm.data.create_transform, in JSON, but is "
                f"{self.augmentation!r} ({error})."
            ) from error
        object.__setattr__(self, "augmentation", given)

    def _check(self, name: str, kind: type, low: float, high: float) -> None:
        value = getattr(self, name)
        optional = name in OPTIONAL
        number = isinstance(value, int if kind is int else int | float)
        if (value is None and optional) or (
            number and not isinstance(value, bool) and low <= value <= high and value < math.inf
        ):
            return
        what = "an integer" if kind is int else "a number"
        limits = f"{low:g} … {high:g}" if high < math.inf else f"≥ {low:g}"
        auto = " or 'auto'" if name == "epochs" else " or None" if optional else ""
        raise ValueError(f"`{name}` must be {what} {limits}{auto} but is {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.loads(json.dumps(values | {"augmentation": dict(self.augmentation)}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneConfig:
        """Build a configuration from `to_dict`'s result, or from part of it."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            names = ", ".join(f.name for f in fields(cls))
            raise ValueError(f"`values` must only have the fields {names} but has {unknown}.")
        return cls(**values)
