"""Fine-tuning: a backbone and labelled images in, one `Epoch` after the other out.

Built from timm's parts: optimizers, parameter groups, schedules, transforms, mixup, EMA; torch's
AMP; scikit-learn's metrics. What is added here:

- The head starts as logistic (of numbers: ridge) regression on the frozen features (linear probe,
  then fine-tuning: Kumar et al., ICLR 2022, https://arxiv.org/abs/2202.10054); that is epoch 0.
- Images are decoded once, shrunk to what random crops need, and kept in memory where they fit.
- Everything random comes from streams named by (seed, epoch, row) or (seed, epoch, step), so a
  run depends neither on the number of workers nor on where it was interrupted.
- After the last epoch the weights half and three quarters of the way from that start count, too
  (WiSE-FT: Wortsman et al., CVPR 2022, https://arxiv.org/abs/2109.01903).
- A checkpoint is one safetensors file, written whole or not at all, without pickle.

Example
-------
>>> from sfda_tune import open_dataset, resolve_backbones
>>> from sfda_tune.finetuning.run import FinetuneConfig, finetune
>>> (backbone,) = resolve_backbones("demo:resnet_glyphs")
>>> run = finetune(backbone, open_dataset("digits", samples=100), FinetuneConfig(epochs=1))
>>> [(epoch.number, epoch.accuracy > 0.5) for epoch in run]
[(0, True), (1, True)]
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

import sfda_tune
from sfda_tune.backbones import devices
from sfda_tune.backbones.devices import check_precision, compute, lay_out
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import Passing
from sfda_tune.finetuning.checkpoints import DamagedError, read_state, write_state
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.epochs import Epoch, OutOfTimeError
from sfda_tune.finetuning.heads import start_head
from sfda_tune.finetuning.images import (
    Images,
    Order,
    own_randomness,
    plain_view,
    same,
    seed_streams,
    shrink,
    split,
    train_loader,
)
from sfda_tune.finetuning.models import (
    Model,
    forward,
    with_head,
    write_model,
)
from sfda_tune.finetuning.optimizers import make_optimizer
from sfda_tune.finetuning.shared import SharedWork
from sfda_tune.finetuning.tasks import Task, make_task
from sfda_tune.values.features import Backbone
from sfda_tune.values.files import AtLeast, check
from sfda_tune.values.formats import NOTED_EPOCH
from sfda_tune.values.metrics import signed

if TYPE_CHECKING:
    import torch

__all__ = [
    "DivergedError",
    "Epoch",
    "FineTuning",
    "FinetuneConfig",
    "OutOfTimeError",
    "SharedWork",
    "finetune",
]

T = TypeVar("T")

logger = logging.getLogger(__name__)

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
FORMAT = "sfda_tune.finetuning/1"
WINDOW, TOLERANCE = 8, 1.25  # steps between looks at the loss; what may be noise
INTERPOLATIONS = (1.0, 0.75, 0.5)
BACKOFF, MAX_BACKOFFS = 0.25, 3
BEFORE = {"warmup_epochs": 0.5, "batch_norm": "frozen", "lr": 5e-4}  # defaults of earlier versions
LATER = {"loss": "auto"}  # fields that configurations of earlier versions lack
NOTES = {
    "history": [NOTED_EPOCH],
    "unreadable": {str: str},
    "micro": AtLeast(1, int),
    "first_loss?": AtLeast(0),
    "backoffs?": [str],
}


class DivergedError(ValueError):
    """The loss became infinite or NaN."""


class _LostError(Exception):
    """The network does worse than one that knows nothing."""


def finetune(
    backbone: Backbone,
    dataset: ImageDataset,
    config: FinetuneConfig | None = None,
    *,
    val: ImageDataset | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    device: str = "auto",
    workers: int | None = None,
    max_unreadable: float = 0.1,
    shared: SharedWork | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> FineTuning:
    """Fine-tune a backbone; iterate over the result to make it happen.

    Parameters
    ----------
    backbone : Backbone
        Any that `resolve_backbones` gives.
    dataset : ImageDataset
        Images that cannot be read are left out and listed in ``unreadable`` of the result.
    config : FinetuneConfig, optional
    val : ImageDataset, optional
        Validation images, classes matched by name; default: ``config.val_fraction`` of `dataset`.
        Labels may be classes, numbers or several per image, see `sfda_tune.finetuning.tasks`.
    checkpoint_dir : str or path, optional
        Where state and best weights are kept after every epoch.
    resume : bool, default True
        Go on from the checkpoint that is there. On a CPU the result is that of a run without
        interruption, to the last bit. False starts over.
    device : str, default "auto"
    workers : int, optional
        Processes that decode and augment; has no influence on the result.
    max_unreadable : float, default 0.1
        Fraction of unreadable images, of both parts, above which they are refused.
    shared : SharedWork, optional
        Spares this run what earlier runs on the same images have done; no influence on the result.
    should_stop : callable, optional
        Asked before every batch and every image that is decoded, so inside an epoch, too; once it
        returns True, iterating raises `OutOfTimeError`.

    Returns
    -------
    FineTuning
        An iterator of `Epoch`; ``close()`` ends it early. Epochs before a resumption are in
        ``history`` and not repeated.

    Raises
    ------
    ValueError, DatasetError, BackboneError
        Fewer than two classes, numbers or images; no label that some images have and others do
        not; classes in `val` that `dataset` lacks; a field of `config` without a meaning for
        these labels; too many images unreadable; a checkpoint of
        another run. `DivergedError` and `OutOfTimeError` while
        iterating.

    Notes
    -----
    Timm draws from the global random streams of Python, NumPy and torch. They are given back as
    they were after every epoch, but runs in two *threads* of one process disturb each other.
    """
    config = config or FinetuneConfig()
    device = devices.resolve_device(device)
    check_precision(config.precision, device)
    parts = partial(split, dataset, val, config)
    how = ("split", config.val_fraction, config.seed)
    return FineTuning(
        backbone,
        shared.get_or_compute((dataset, val), how, parts) if shared else parts(),
        config,
        None if checkpoint_dir is None else Path(checkpoint_dir),
        resume,
        device,
        workers,
        shared,
        max_unreadable,
        should_stop,
    )


# The run ----------------------------------------------------------------------------------------
class FineTuning(Iterator[Epoch]):
    """A fine-tuning run: an iterator of `Epoch`. Made by `finetune`.

    ``history`` holds all epochs so far, ``best`` the best of them, ``unreadable`` the name of each
    unreadable image → reason, ``config`` the configuration with epochs and monitor filled in,
    ``backoffs`` why training went back to the best weights so far, each time with a quarter of the
    learning rate.
    """

    def __init__(
        self,
        backbone: Backbone,
        parts: tuple[ImageDataset, ImageDataset],
        config: FinetuneConfig,
        folder: Path | None,
        resume: bool,
        device: str,
        workers: int | None,
        shared: SharedWork | None = None,
        max_unreadable: float = 0.1,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self._max_unreadable = max_unreadable
        self.folder, self.device, self.workers = folder, device, workers
        self.train, self.val = parts
        self.backbone = backbone.taking(self.train.channels)
        self._shared, self._should_stop = shared, should_stop
        self.task = make_task(self.train)
        self.task.check(config)
        if config.monitor == "auto":
            config = replace(config, monitor=self.task.monitors[0])
        if config.epochs == "auto":
            epochs = round(30 * min(1, 200 / len(self.train)) ** (1 / 3))
            config = replace(config, epochs=max(5, epochs))
        self.config = config
        self.history: list[Epoch] = []
        self.best: Epoch | None = None
        self.unreadable: dict[str, str] = {}
        self._weights: dict[str, Any] = {}  # of the best epoch
        self._state: dict[str, Any] | None = None  # of the checkpoint
        self._changes: dict[str, Any] = {}  # weights with which training begins, if not epoch 0's
        self._start: dict[str, Any] = {}  # all weights then
        self._parts = INTERPOLATIONS
        self._first_loss = 0.0  # of the first batch
        self.backoffs: list[str] = []
        self._micro = config.batch_size  # images that go through the network at a time
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if resume and (folder / CHECKPOINT).is_file() and (folder / BEST).is_file():
                self._resume(folder)
        self._epochs = self._run()

    def __next__(self) -> Epoch:
        return next(self._epochs)

    def close(self) -> None:
        """End the run; the last checkpoint and the best weights stay usable."""
        self._epochs.close()

    def __enter__(self) -> FineTuning:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def model(self) -> Model:
        """Return the network with the best weights so far."""
        if self.best is None:
            raise ValueError("there is no model before the first epoch; iterate over the run.")
        with own_randomness(self.device):
            module, preprocessing, _ = with_head(self.backbone, self.task.n_outputs)
        module.load_state_dict(self._weights)
        return Model(module.eval(), preprocessing, self._decided(), self._provenance())

    def _decided(self) -> Task:
        """Return the task with the thresholds of the best epoch."""
        return self.task.decide_by(cast(Epoch, self.best).thresholds)

    def save_model(self, folder: str | os.PathLike[str]) -> Path:
        """Write the best weights so far as a timm checkpoint folder, and return it.

        ``model.safetensors``; ``config.json`` in timm's form with architecture, preprocessing and
        class names, so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens it;
        ``provenance.json`` with data set, configuration, versions, epochs, digests. A network that
        is none of timm's has no ``config.json``: `load_model` needs its Backbone then.
        """
        model, folder = self.model(), Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_model(self.backbone, model, folder)
        return folder

    def _provenance(self) -> dict[str, Any]:
        import timm
        import torch

        assert self.best is not None
        train, val = self._fingerprints
        return {
            "format": FORMAT,
            "backbone": self.backbone.name,
            "spec": self.backbone.spec,
            "classes": list(self.task.classes),
            "task": {"name": self.task.name, **self._decided().describe()},
            "dataset": self.train.name,
            "reading": None if self.train.reading is None else self.train.reading.to_dict(),
            "train": {"images": len(self.train), "fingerprint": train},
            "val": {"images": len(self.val), "fingerprint": val},
            "unreadable": self.unreadable,
            "config": self.config.to_dict(),
            "backoffs": self.backoffs,
            "best": self.best.to_dict(),
            "epochs": [epoch.to_dict() for epoch in self.history],
            "versions": {
                "sfda_tune": sfda_tune.__version__,
                "timm": timm.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    @cached_property
    def _fingerprints(self) -> list[str]:
        def digest(part: ImageDataset) -> str:
            text = json.dumps([part.digests(), part.labels.tolist(), part.classes])
            return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()

        parts = (self.train, self.val)
        return [self._once((part,), "digest", partial(digest, part)) for part in parts]

    def _once(self, owners: tuple[Any, ...], key: Hashable, make: Callable[[], T]) -> T:
        """Make what other runs with the same objects need, too, unless one has made it already."""
        return self._shared.get_or_compute(owners, key, make) if self._shared else make()

    def _start_once(self, what: Hashable, make: Callable[[], T]) -> T:
        """Make what depends on the backbone and the images, but not on how it is trained."""

        def note() -> tuple[T, dict[str, str]]:
            return make(), dict(self.unreadable)

        b, config = self.backbone, self.config
        how = self._how(self._images.prepare)
        named = (b.name, b.spec, how, config.batch_size, config.seed, self.device)
        if any(isinstance(why, Passing) for why in self.unreadable.values()):
            return make()  # what this run cannot read the next may
        found, unreadable = self._once((self.train, self.val, b.load), (what, *named), note)
        self.unreadable.update(unreadable)
        return found

    def _check_time(self) -> None:
        if self._should_stop is not None and self._should_stop():
            raise OutOfTimeError("the time is over")

    # One epoch after the other ------------------------------------------------------------------
    def _run(self) -> Generator[Epoch, None, None]:
        if self._finished():
            return
        try:
            started = time.perf_counter()
            with own_randomness(self.device):
                self._open()
                with devices.few_threads(self.module, self.preprocessing):
                    first = self._begin(started)
            if first is not None:
                yield first
            while not self._finished():
                started = time.perf_counter()
                with (
                    own_randomness(self.device),
                    devices.few_threads(self.module, self.preprocessing),
                    self._tf32(),
                ):
                    epoch = self._epoch(started)
                logger.info(
                    "%s, epoch %d: %s, %.1f s", self.backbone.name, epoch.number,
                    ", ".join(f"{k} {epoch.values[k]:.4f}" for k in self._judges), epoch.seconds,
                )  # fmt: skip
                yield epoch
        finally:
            self._loader = self._images = self._unseen = None  # lets workers and pixels go

    def _tf32(self) -> AbstractContextManager[None]:
        """Cut products in the backward pass, too; autocast knows by itself what it did."""
        if self.config.precision == "tf32":
            return compute(self.device, "tf32")
        return nullcontext()

    def _finished(self) -> bool:
        if not self.history or self.best is None:
            return False
        last, patience = self.history[-1].number, self.config.patience
        stale = patience is not None and last - self.best.number >= patience
        return stale or last >= cast(int, self.config.epochs)

    def _open(self) -> None:
        """Open the network."""
        self._check_time()
        seed_streams(2, self.config.seed)
        self.module, self.preprocessing, self.head = with_head(self.backbone, self.task.n_outputs)
        self.layout = lay_out(self.module.to(self.device))

    def _begin(self, started: float) -> Epoch | None:
        """Open the images, go back to the checkpoint or start the head; return epoch 0."""
        geometry, view = self.preprocessing.geometry, self.preprocessing.build()
        prepare = shrink(geometry, self.config.augmentation) if geometry else view
        self._images: Any = self._prepare(self.train, prepare)
        self._unseen: Any = self._prepare(self.val, view)
        for images in (self._images, self._unseen):
            kept = enumerate(images.kept or ())
            self._report(images, {row: why for row, why in kept if isinstance(why, str)})
        self._ema: Any = None
        state, self._state = self._state, None
        if state is not None:
            self._begin_with(state.get("start", {}))
            self._build()
            self._restore(state)
            return None
        probed = self.config.head == "probe"
        if probed:
            head, sharpness = self._start_once("head", self._make_head)
            self.module.load_state_dict(head, strict=False)
            if self.config.freeze == "none" and cast(int, self.config.epochs) > 0:
                make = partial(self._make_start, head, sharpness)
                self._begin_with(self._start_once(("start", self.config.batch_norm), make))
        self._build()
        return self._finish(0, started, math.nan, math.nan) if probed else None

    def _prepare(self, part: ImageDataset, prepare: Any) -> Images:
        """Return the images as they are before what differs between epochs."""
        check = None if self._should_stop is None else self._check_time
        images = partial(Images, part, prepare, self.workers, check)
        if self._shared is None:
            return images()
        return self._shared.recall_images(part, (self._how(prepare), self.workers), images)

    def _how(self, prepare: Any) -> Hashable:
        """Return what prepared images depend on."""
        return prepare.side if isinstance(prepare, shrink) else self.preprocessing.key

    def _report(self, images: Images, unreadable: Mapping[int, str]) -> None:
        """Take down unreadable images; refuse the data set if there are too many."""
        data, n = images.dataset, len(self.train) + len(self.val)
        self.unreadable.update({data.item_name(row): why for row, why in unreadable.items()})
        if len(self.unreadable) > self._max_unreadable * n:
            name, why = next(iter(self.unreadable.items()))
            raise DatasetError(
                f"{len(self.unreadable)} of the {n} images cannot be read, more than "
                f"max_unreadable={self._max_unreadable:g} allows; the first is {name} ({why})"
            )

    def _build(self) -> None:
        """Make everything that training needs besides the network."""
        import torch
        from timm.data.mixup import Mixup
        from timm.data.random_erasing import RandomErasing
        from timm.utils.model_ema import ModelEmaV3

        config = self.config
        self._order = Order(len(self.train), config.batch_size, config.seed)
        self._optimizer, self._schedule = make_optimizer(
            self.module, self.head, replace(config, lr=config.lr * self._rate), len(self._order)
        )
        self._scaler = torch.amp.GradScaler(
            torch.device(self.device).type, enabled=config.precision == "float16"
        )
        if config.ema_decay is not None:
            self._ema = ModelEmaV3(self.module, decay=config.ema_decay, use_warmup=True)
        self._mixup: Any = None
        if config.mixup or config.cutmix:
            self._mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=0.0, num_classes=self.task.n_outputs
            )
        given = config.augmentation
        self._erase = RandomErasing(
            given.get("re_prob", 0.0),
            mode=given.get("re_mode", "const"),
            max_count=given.get("re_count", 1),
            device=self.device,
        )
        weights = self.task.weigh(self.train.labels, config)
        self._class_weights = (
            None if weights is None else torch.tensor(weights, device=self.device).float()
        )
        self._targets = self.task.encode(self.train.labels)
        self._ignorance = self.task.ignorance(self.train.labels, config)
        self._loader: Any = train_loader(
            self._images, self.preprocessing, self._order, config, self.workers, self.device
        )

    def _make_head(self) -> tuple[dict[str, Any], float]:
        """Return the head as regression on the frozen features, and its sharpness."""
        inside = {id(p) for layer in self.head for p in layer.parameters()}
        names = [name for name, p in self.module.named_parameters() if id(p) in inside]
        self.module.eval()
        sharpness = self._fit_head()
        return self._pick(names), sharpness

    def _make_start(self, head: dict[str, Any], sharpness: float) -> dict[str, Any]:
        """Return what is another when training begins, but at epoch 0.

        The head is less sure of the images that it was fitted to, see `fit_head`. (One that is
        trained alone would have nothing to learn but its sharpness.) What normalises by batches
        has the statistics of the training images, and the head is fitted to what comes of them:
        the other one, fitted to other features, would be lost in the first step.
        """
        norms = self._norms() if self.config.batch_norm == "train" else {}
        names = [f"{n}.{k}" for n, x in norms.items() for k, _ in x.named_buffers(recurse=False)]
        before, start = self._pick(names) | head, head
        if names:
            usual = {name: layer.momentum for name, layer in norms.items()}
            self.module.eval()
            for layer in norms.values():
                if layer.num_batches_tracked is not None:
                    layer.num_batches_tracked.zero_()
                layer.momentum = None  # the mean over all batches; what was there counts no longer
                layer.train()
            sharpness = self._fit_head(Order(len(self.train), self.config.batch_size, 0))
            for name, layer in norms.items():
                layer.momentum = usual[name]
            start = self._pick(head)
        start = {k: v * sharpness for k, v in start.items()} | self._pick(names)
        self.module.load_state_dict(before, strict=False)
        return start

    def _pick(self, names: Iterable[str]) -> dict[str, Any]:
        """Return some of the weights."""
        state = self.module.state_dict()
        return {name: state[name].detach().cpu().clone() for name in names}

    def _begin_with(self, changes: dict[str, Any]) -> None:
        """Keep the weights from which training begins; the network has those of epoch 0."""
        self._changes, self._start = changes, _copy(self.module) | changes if changes else {}

    def _norms(self) -> dict[str, Any]:
        """Return the layers that can normalise by the statistics of a batch."""
        from torch.nn.modules.batchnorm import _BatchNorm

        layers = self.module.named_modules(remove_duplicate=False)  # as `state_dict` names them
        return {name: layer for name, layer in layers if isinstance(layer, _BatchNorm)}

    @contextmanager
    def _lone(self, n: int) -> Iterator[None]:
        """Normalise by what is known already if there is one image, which has no statistics."""
        learning = [layer for layer in self._norms().values() if layer.training] if n == 1 else []
        for layer in learning:
            layer.eval()
        try:
            yield
        finally:
            for layer in learning:
                layer.train()

    def _fit_head(self, order: Order | None = None) -> float:
        """Make the head regression on the features; return its sharpness in training."""
        import torch

        layers: list[Any] = self.head
        found: list[list[Any]] = [[] for _ in layers]
        latest: dict[int, Any] = {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, x, k=k: latest.update({k: x[0].cpu()}))
            for k, layer in enumerate(layers)
        ]

        def keep() -> None:  # a pass that failed behind the hooks is made again
            for k, x in latest.items():
                found[k].append(x)
            latest.clear()

        try:
            rows = self._predict(self._images, plain_view(self.preprocessing), keep, order)[0]
        finally:
            for hook in hooks:
                hook.remove()
        features = [torch.cat(kept).flatten(1).double() for kept in found if kept]
        # Of a distilled network's two heads timm averages the results.
        alike = len(features) == len(layers) and len({f.shape for f in features}) == 1
        x = torch.stack(features).mean(0).numpy() if alike else np.empty((len(rows), 0))
        sharpness = start_head(layers, x, self.train.labels[rows], self.task.fit_head)
        if sharpness is None and order is None:
            kinds = ", ".join(type(layer).__name__ for layer in layers)
            logger.warning("%s: its head (%s) starts at random", self.backbone.name, kinds)
        return 1.0 if sharpness is None else sharpness

    def _epoch(self, started: float) -> Epoch:
        """Train and validate once more; where training destroys the network, back off."""
        while True:
            try:
                return self._train(started)
            except _LostError as lost:
                self._back_off(lost)

    def _watch(self, loss: float, number: int) -> None:
        """Notice a loss above that of a network that knows nothing.

        Some begin higher, as features may differ much between an image and its augmented views.
        """
        limit = max(self._ignorance, TOLERANCE * self._first_loss)
        if loss <= limit or (math.isfinite(loss) and not self._may_back_off()):
            return
        if self._may_back_off():
            raise _LostError(
                f"the loss was {loss:.3g} in epoch {number}, the limit is {limit:.3g}"
            )
        self._require_finite(loss, number)

    def _may_back_off(self) -> bool:
        return self.best is not None and len(self.backoffs) < MAX_BACKOFFS

    def _back_off(self, lost: _LostError) -> None:
        """Go back to the best weights so far, and on with a smaller learning rate."""
        self.backoffs.append(str(lost))
        logger.warning(
            "%s: %s; it goes on from epoch %d with %g of the learning rate",
            self.backbone.name, lost, cast(Epoch, self.best).number, self._rate,
        )  # fmt: skip
        begun = cast(Epoch, self.best).number > 0
        self.module.load_state_dict(self._weights if begun else self._start or self._weights)
        self._build()

    @property
    def _rate(self) -> float:
        """Part of the learning rate that is left."""
        return BACKOFF ** len(self.backoffs)

    def _train(self, started: float) -> Epoch:
        """Train for an epoch, and validate."""
        import torch

        number = self.history[-1].number + 1 if self.history else 1
        if number == 1 and self._start:
            self.module.load_state_dict(self._start)
            if self._ema is not None:
                self._ema.set(self.module)
        self._train_mode()
        self._order.epoch = number
        total, n = torch.zeros((), device=self.device), 0
        window, n_window = total.clone(), 0  # since the loss was last looked at
        for step, (_, (rows, pixels, unreadable)) in enumerate(self._loader):
            done = (number - 1) * len(self._order) + step
            self._schedule.step_update(done)
            if unreadable:
                self._report(self._images, unreadable)
            if self._mixup is not None and len(rows) % 2:  # it mixes pairs
                rows, pixels = rows[:-1], pixels[:-1]
            if not rows:
                continue
            loss = self._step((self.config.seed, number, step), rows, pixels) * len(rows)
            total += loss
            window += loss
            n, n_window = n + len(rows), n_window + len(rows)
            if self._ema is not None:
                self._ema.update(self.module, step=done + 1)
            if done == 0:  # before any step
                self._first_loss = window.item() / n_window
            if step % WINDOW == WINDOW - 1 or step == len(self._order) - 1:
                self._watch(window.item() / n_window, number)
                window, n_window = torch.zeros_like(window), 0
        seconds = time.perf_counter() - started
        return self._finish(number, started, total.item() / max(n, 1), n / seconds)

    def _train_mode(self) -> None:
        self.module.train(self.config.freeze == "none")
        if self.config.batch_norm == "frozen":
            for layer in self._norms().values():
                layer.eval()
        for layer in self.head:
            layer.train()

    def _require_finite(self, loss: float, number: int) -> None:
        if not math.isfinite(loss):
            lr = self.config.lr
            raise DivergedError(
                f"training {self.backbone.name!r} diverged in epoch {number}: the loss is {loss} "
                f"with lr={lr:g}; try lr={lr / 10:g} or clip_grad=1"
                + (", or precision='bfloat16'." if self.config.precision == "float16" else ".")
            )

    def _step(self, key: tuple[int, ...], rows: list[int], pixels: list[Any]) -> torch.Tensor:
        """Make one optimizer step, in as many parts as the memory demands; return the loss."""
        import torch

        while True:
            seed_streams(1, *key)
            self._optimizer.zero_grad()
            try:
                loss = self._backward(rows, pixels)
                break
            except (RuntimeError, MemoryError) as error:
                self._halve(error, len(rows))
        if self.config.clip_grad is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip_grad)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return loss

    def _halve(self, error: Exception, n: int) -> None:
        """Go on with half as many images at a time, if it is the memory that failed."""
        if not devices.is_out_of_memory(error) or self._micro == 1:
            raise error
        self._micro = max(1, min(self._micro, n) // 2)
        logger.warning("out of memory: %d images at a time now", self._micro)

    def _backward(self, rows: list[int], pixels: list[Any]) -> torch.Tensor:
        """Accumulate the gradient of the mean loss of a batch; return that loss."""
        import torch

        x = self.preprocessing.normalize(torch.stack(pixels).to(self.device, non_blocking=True))
        y = torch.tensor(self._targets[rows], device=self.device)
        x = self._erase(x)
        if self._mixup is not None:
            x, y = self._mixup(x, y)
        total = torch.zeros((), device=self.device)
        for start in range(0, len(x), self._micro):
            self._check_time()
            part = slice(start, start + self._micro)
            some = x[part].contiguous(memory_format=self.layout)
            with compute(self.device, self.config.precision, exact=False), self._lone(len(some)):
                outputs = self.module(some).float()
            losses = self.task.loss(outputs, y[part], self.config, self._class_weights)
            self._scaler.scale(losses / len(x)).backward()
            total += losses.detach() / len(x)
        return total

    def _predict(
        self,
        images: Images,
        view: Any = same,
        passed: Callable[[], None] | None = None,
        order: Order | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the readable rows and their predictions."""
        import torch

        module = self.module if self._ema is None else self._ema.module
        rows: list[int] = []
        outputs: list[torch.Tensor] = []
        for some, pixels, unreadable in images.batches(self.config.batch_size, view, order):
            rows += some
            if unreadable:
                self._report(images, unreadable)
            start = 0
            while start < len(some):
                self._check_time()
                part = pixels[start : start + self._micro]
                try:
                    with self._lone(len(part)):
                        outputs.append(forward(module, self.preprocessing, part, self.device))
                    start += len(part)
                    if passed is not None:
                        passed()
                except (RuntimeError, MemoryError) as error:
                    self._halve(error, len(part))
        if not rows:
            raise DatasetError("no validation image can be read; pass other `val` images.")
        return np.array(rows), self.task.predict(torch.cat(outputs))

    # After an epoch -----------------------------------------------------------------------------
    def _finish(self, number: int, started: float, loss: float, rate: float) -> Epoch:
        """Validate, keep the best weights, write the checkpoint."""
        module = self.module if self._ema is None else self._ema.module
        module.eval()
        ends = number == self.config.epochs and number > 0 and bool(self._start)
        trained = _copy(module) if ends else {}
        tries: list[Epoch] = []
        guesses: list[tuple[np.ndarray, np.ndarray]] = []
        codes = self.val.group_codes
        for part in self._parts if ends else (1.0,):
            if part < 1:
                module.load_state_dict(self._between(trained, part))
            predict = partial(self._predict, self._unseen)
            rows, p = predict() if number else self._start_once("epoch 0", predict)
            self._require_finite(p.sum(), number)
            values = self.task.measure(self.val.labels[rows], p)
            guesses.append((rows, p))
            tries.append(Epoch(
                number=number,
                steps=number * len(self._order),
                seconds=time.perf_counter() - started,
                lr=max(group["lr"] for group in self._optimizer.param_groups) if number else 0.0,
                train_loss=loss,
                values=values,
                best=values[self.config.monitor],
                best_number=number,
                images_per_second=rate,
                interpolation=part,
            ))  # fmt: skip
        # By the log-loss: on few images, the accuracies of such neighbours differ by chance.
        tie = self.task.tie
        at = max(range(len(tries)), key=lambda k: signed(tries[k].values[tie], tie))
        rows, p = guesses[at]
        labels, groups = self.val.labels[rows], None if codes is None else codes[rows]
        epoch = replace(
            tries[at],
            seconds=tries[-1].seconds,
            temperature=self.task.fit_temperature(labels, p),
            thresholds=self.task.choose_thresholds(labels, p),
            error=self.task.find_error(labels, p, self.config.monitor, groups),
        )
        if self.best is not None and self._sort_key(epoch) <= self._sort_key(self.best):
            epoch = replace(epoch, best=self.best.best, best_number=self.best.number)
        else:
            self.best = epoch
            self._weights = self._between(trained, epoch.interpolation) if ends else _copy(module)
            if self.folder is not None:
                write_state(self.folder / BEST, self._weights, epoch.to_dict())
        if ends:
            module.load_state_dict(trained)
        self.history.append(epoch)
        if self.folder is not None:
            state = {
                "start": self._changes,
                "model": self.module.state_dict(),
                "ema": None if self._ema is None else self._ema.module.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
            }
            notes = {
                **self._identity(),
                "history": [epoch.to_dict() for epoch in self.history],
                "unreadable": self.unreadable,
                "micro": self._micro,
                "first_loss": self._first_loss if math.isfinite(self._first_loss) else 0.0,
                "backoffs": self.backoffs,
            }
            write_state(self.folder / CHECKPOINT, state, notes)
        return epoch

    def _between(self, trained: dict[str, Any], part: float) -> dict[str, Any]:
        """Return the weights that lie at `part` of the way from the start to the trained ones."""
        return {
            k: self._start[k].lerp(v, part) if v.is_floating_point() and part < 1 else v
            for k, v in trained.items()
        }

    def _sort_key(self, epoch: Epoch) -> tuple[float, float]:
        first, second = (signed(epoch.values[name], name) for name in self._judges)
        return first, second

    @property
    def _judges(self) -> tuple[str, str]:
        """The metrics that say which epoch is best."""
        return self.config.monitor, self.task.tie

    def _identity(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "backbone": self.backbone.name,
            "images": self._fingerprints,
            **self.config.to_dict(),
        }

    def _resume(self, folder: Path) -> None:
        try:
            state, notes = read_state(folder / CHECKPOINT)
            self._weights, best = read_state(folder / BEST)
        except DamagedError as error:
            logger.warning("%s; the run starts over", error)
            return
        if "start" not in state:  # an earlier version's
            mine, usual = vars(self.config), vars(FinetuneConfig())
            was = {k: v for k, v in BEFORE.items() if notes.get(k) == v and mine[k] == usual[k]}
            if was:
                logger.warning(
                    "%s: %s goes on by the defaults of the version that began it, %s",
                    self.backbone.name, folder, was,
                )  # fmt: skip
            self.config = replace(self.config, **was)
        for name, value in self._identity().items():
            if notes.get(name, LATER.get(name)) != value:
                raise ValueError(
                    f"`checkpoint_dir` {str(folder)!r} belongs to another run, with {name} "
                    f"{notes.get(name)!r} instead of {value!r}; pass resume=False to start over, "
                    "or another folder."
                )
        try:
            check(notes, NOTES)
            check(best, NOTED_EPOCH)
            self.best = Epoch.from_dict(best)
            self.history = [Epoch.from_dict(values) for values in notes["history"]]
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the checkpoints in {str(folder)!r} must be of this package, but {error}; delete "
                "them, or pass resume=False to start over."
            ) from error
        self.unreadable, self._micro = notes["unreadable"], notes["micro"]
        self.backoffs = notes.get("backoffs", [])
        self._first_loss, self._state = notes.get("first_loss", 0.0), state

    def _restore(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._ema is not None:
            self._ema.module.load_state_dict(state["ema"])


def _copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
