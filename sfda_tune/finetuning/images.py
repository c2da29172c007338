"""Images for fine-tuning: decoded once, kept in memory where they fit, augmented per epoch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from sfda_tune.backbones.preprocessing import Bandwise, Geometry, Preprocessing
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import (
    UNREADABLE,
    Passing,
    Picture,
    UnreadableImage,
    digest_pixels,
    is_passing,
)
from sfda_tune.data.loader import Loader, count_workers, cut, is_in_memory
from sfda_tune.data.splits import hold_out, relabel
from sfda_tune.extraction import pixels
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.values.labels import find_varied
from sfda_tune.values.text import one_line

__all__ = [
    "Augmented",
    "Images",
    "Order",
    "augmentation",
    "collate",
    "look_at",
    "own_randomness",
    "plain_view",
    "same",
    "seed_streams",
    "shrink",
    "split",
    "train_loader",
]

Batch = tuple[list[int], list[Any], dict[int, str]]  # rows, tensors, unreadable row → reason


def seed_streams(*key: int) -> None:
    """Seed the global streams, which timm, torchvision and torch draw from."""
    import torch

    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's mixup and AugMix draw from it
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` formats a traceback each time
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def own_randomness(device: str) -> Iterator[None]:
    """Give the global random streams back as they were."""
    import torch

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = []
    if device.startswith("cuda"):
        index = torch.device(device).index
        devices = [torch.cuda.current_device() if index is None else index]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def split(
    dataset: ImageDataset, val: ImageDataset | None, config: FinetuneConfig
) -> tuple[ImageDataset, ImageDataset]:
    """Return training and validation images, with the same codes for the classes."""
    kinds = {"regression": "numbers", "ordinal": "levels", "multilabel": "several labels"}
    what = kinds.get(dataset.task, "classes")
    n, n_strata = len(dataset), len(np.unique(dataset.strata))
    if dataset.task == "multilabel":
        _require_varied(dataset, "dataset", 2)
    elif len(np.unique(dataset.labels)) < 2:
        raise ValueError(
            f"`dataset` must have images of at least two {what} but has {n} of "
            f"{len(np.unique(dataset.labels))}."
        )
    if val is None:  # every class gets its first two images for training
        n_train = max(n_strata, round(n * (1 - config.val_fraction)))
        if n_train >= n:
            each = {
                "regression": "of each tenth of the numbers",
                "ordinal": "of each level",
                "multilabel": "for each label",
            }.get(dataset.task, "of each class")
            raise ValueError(
                f"`dataset` has {n} images, too few to hold out val_fraction="
                f"{config.val_fraction:g} of them beside one {each}; pass `val`."
            )
        if dataset.group_codes is not None or dataset.times is not None:
            all_rows = np.arange(n)
            rows, out = hold_out(dataset, all_rows, config.val_fraction, config.seed, all_rows)
        else:
            rows = dataset.sample_rows(n_train, config.seed)
            out = np.setdiff1d(np.arange(n), rows)
        kept, val = dataset.subset(rows), dataset.subset(out)
        if dataset.task == "multilabel":
            _require_varied(kept, "dataset", 2)
            _require_varied(val, "val")
        return kept, val
    if val.channels != dataset.channels:
        raise ValueError(
            f"`val` must have {dataset.channels} channels, as `dataset`, but has {val.channels}; "
            "open both with the same `bands`."
        )
    if val.task != dataset.task:
        raise ValueError(
            f"`val` must hold {what}, as `dataset`, but is {val!r}; open it with "
            f"task={dataset.task!r}."
        )
    if dataset.task in ("regression", "ordinal"):
        val = relabel(val, dataset)
        if len(np.unique(val.labels)) < 2:
            raise ValueError(
                f"`val` must hold at least two different {what} but has {len(val)} images of "
                f"{len(np.unique(val.labels))}; pass more images."
            )
        return dataset, val
    if dataset.task == "multilabel":
        val = relabel(val, dataset)
        _require_varied(val, "val")
        return dataset, val
    unknown = sorted({val.classes[c] for c in np.unique(val.labels)} - set(dataset.classes))
    if unknown or not len(val):
        raise ValueError(
            f"`val` must hold images of the classes of `dataset` but has {len(val)} images, with "
            f"the unknown classes {unknown}."
        )
    code = {name: c for c, name in enumerate(dataset.classes)}
    labels = np.array([code.get(val.classes[c], -1) for c in val.labels])
    return dataset, replace(val, labels=labels, classes=dataset.classes)


def _require_varied(images: ImageDataset, name: str, least: int = 1) -> None:
    """Raise a ValueError if no label is known to be had and lacked by so many images each."""
    if not find_varied(images.labels, least).any():
        some = "some images" if least == 1 else f"{least} images"
        raise ValueError(
            f"`{name}` must have a label that {some} have and {some} do not, but among "
            f"{len(images)} none of the {len(images.classes)} is such; pass more images."
        )


class Images:
    """The images of a data set after `prepare`, in memory if all fit (`kept`), else made anew.

    An image is cached after what is the same in every epoch: `shrink` for training, the whole
    geometry for validation.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        prepare: Callable[[Any], Any],
        workers: int | None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.dataset, self.prepare = dataset, prepare
        self._check = check  # called before each image is decoded; raises if the time is over
        self.workers = count_workers(dataset, workers)
        self.kept: list[Any] | None = None
        self.nbytes = 0  # of those that are kept
        self._keep()

    def _keep(self) -> None:
        import psutil

        budget = min(pixels.PIXEL_BYTES, psutil.virtual_memory().available // 4)
        kept: list[Any] = []
        size = 0
        for rows, batch in self.loader(self, cut(len(self)), list, self.workers):
            if self._check is not None:
                self._check()
            if rows[0] != len(kept) or len(rows) != len(batch):
                raise RuntimeError(f"the decoding went astray at row {len(kept)}")
            kept += batch
            size += sum(getattr(item, "nbytes", 0) for item in batch)
            if size / len(kept) * len(self) > budget:
                return
        self.kept, self.nbytes = kept, size
        self._check = None  # other runs may share them

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, row: int) -> str:
        """Return what to call an image."""
        return self.dataset.item_name(row)

    def __getitem__(self, row: int) -> Any:
        """Return the prepared image, or the reason why there is none."""
        if self.kept is None:
            return self._make(row)
        if isinstance(self.kept[row], Passing):
            self.kept[row] = self._make(row)
        return self.kept[row]

    def _make(self, row: int) -> Any:
        if self._check is not None:  # outside of `try`: it is no property of the image
            self._check()
        try:
            return self.prepare(self.dataset.load(row))
        except UnreadableImage as error:
            return error.reason
        except MemoryError:  # no property of the image, either
            raise
        except Exception as error:  # of a transform, on an image of 1 × 100,000 pixels
            reason = one_line(f"{type(error).__name__}: {error}")
            return Passing(reason) if is_passing(error) else reason

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what asks for the time, where worker processes are not forked."""
        return {**vars(self), "_check": None}

    def batches(
        self, size: int, view: Callable[[Any], Any], order: Order | None = None
    ) -> Iterator[Batch]:
        """Yield all images, `view` applied, as they are numbered or in another order."""
        workers = 0 if self.kept is not None else self.workers
        rows: Any = cut(len(self), size)
        if order is not None:
            rows = [[row for _, row in part] for part in order]
        for _, batch in self.loader(_Viewed(self, view), rows, collate, workers):
            yield batch

    def loader(
        self, items: Any, batches: Iterable[Any], collate: Callable[[Any], Any], workers: int
    ) -> Loader:
        """Return what makes batches of `items` that are made of these images."""
        direct = not workers and (self.kept is not None or is_in_memory(self.dataset))
        return Loader(items, batches, collate, workers=workers, direct=direct)


def look_at(
    dataset: ImageDataset, check: Callable[[], None] | None = None, workers: int | None = None
) -> tuple[dict[int, str], list[str]]:
    """Decode every image: rows that cannot be read, with the reason; all digests of pixels.

    `check` is called before each, and may raise; so many `workers` decode, by default any.
    """
    images = Images(dataset, _digest, workers, check)
    found = [images[row] for row in range(len(images))]
    bad = {row: why for row, why in enumerate(found) if isinstance(why, str)}
    return bad, [UNREADABLE if row in bad else one.hex() for row, one in enumerate(found)]


def _digest(image: Picture) -> bytes:  # texts are reasons
    return bytes.fromhex(digest_pixels(image))


class _Viewed:
    def __init__(self, images: Images, view: Callable[[Any], Any]) -> None:
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def name(self, key: Any) -> str:
        """Return what to call an image."""
        return self.images.name(key)

    def __getitem__(self, row: int) -> tuple[int, Any]:
        item = self.images[row]
        return row, item if isinstance(item, str) else self.view(item)


class Augmented(_Viewed):
    """Items (epoch, row): the image as it looks in that epoch, whoever asks for it."""

    def __init__(self, images: Images, view: Callable[[Any], Any], seed: int) -> None:
        super().__init__(images, view)
        self.seed = seed

    def name(self, key: Any) -> str:
        """Return what to call an image."""
        return self.images.name(key[1])

    def __getitem__(self, key: Any) -> tuple[int, Any]:
        epoch, row = key
        seed_streams(0, self.seed, epoch, row)
        return super().__getitem__(row)


def collate(items: list[tuple[int, Any]]) -> Batch:
    """Sort out the unreadable images of a batch."""
    good = [(row, tensor) for row, tensor in items if not isinstance(tensor, str)]
    bad = {row: reason for row, reason in items if isinstance(reason, str)}
    return [row for row, _ in good], [tensor for _, tensor in good], bad


class Order:
    """The batches of an epoch: a permutation named by (seed, epoch), cut into even parts.

    No part holds a single image, which batch normalisation cannot train on.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0
        self.n_batches = max(1, min(-(-n // batch_size), n // 2))

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n)
        for part in np.array_split(order, self.n_batches):
            yield [(self.epoch, int(row)) for row in part]


def train_loader(
    images: Images,
    preprocessing: Preprocessing,
    order: Order,
    config: FinetuneConfig,
    workers: int | None,
    device: str,
) -> Loader:
    """Return the batches of an epoch, augmented, again and again."""
    # On a CPU the training itself keeps the cores busy, if nothing needs decoding.
    spare = images.kept is None or device != "cpu"
    workers = images.workers if spare or workers is not None else 0
    items = Augmented(images, augmentation(preprocessing, config.augmentation), config.seed)
    return images.loader(items, order, collate, workers)


class shrink:  # noqa: N801 - used as a function; a class, because a closure cannot be pickled
    """Image → uint8 array, no larger than random crops of the backbone's input size need."""

    def __init__(self, geometry: Geometry, arguments: Mapping[str, Any]) -> None:
        smallest = math.sqrt(min(arguments.get("scale") or (0.08,)))
        largest = max(geometry.input_size[1:])
        self.side = math.ceil(largest / max(0.5, min(smallest, geometry.crop_pct)))

    def __call__(self, image: Picture) -> np.ndarray:
        """Return the pixels (height, width, 3), or of all bands."""
        if isinstance(image, np.ndarray):
            bands = np.moveaxis(image, 2, 0)
            return np.stack([self(Image.fromarray(np.ascontiguousarray(b))) for b in bands], -1)
        factor = self.side / min(image.size)
        if factor < 1:
            size = [max(1, round(length * factor)) for length in image.size]
            image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        return np.array(image)


def augmentation(
    preprocessing: Preprocessing, arguments: Mapping[str, Any]
) -> Callable[[Any], Any]:
    """Return what makes a training input of a prepared image, by timm's `create_transform`.

    Where the bands are no colours each is treated as a grey image, all with the same random
    numbers: saturation and hue stay as they are, brightness and contrast change in all alike.
    """
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms import Compose, Grayscale

    if preprocessing.geometry is None or arguments.get("no_aug"):
        return plain_view(preprocessing)
    channels, mean = preprocessing.geometry.input_size[0], preprocessing.mean
    options = {
        "interpolation": preprocessing.geometry.interpolation,
        "mean": mean * 3 if channels == 1 else mean if channels == 3 else mean[:1],  # fills
        **{k: v for k, v in arguments.items() if not k.startswith("re_")},
    }
    steps: list[Any] = [create_transform(
        preprocessing.geometry.input_size, is_training=True, normalize=False, **options
    )]  # fmt: skip
    if channels not in (1, 3):
        return Bandwise(Compose(steps), random=True)
    if channels == 1:
        steps.append(Grayscale())
    return Compose([Image.fromarray, *steps])


def plain_view(preprocessing: Preprocessing) -> Callable[[Any], Any]:
    """Return what makes an input of a prepared training image as in validation."""
    from torchvision.transforms import Compose

    if preprocessing.geometry is None:
        return same
    if preprocessing.geometry.input_size[0] not in (1, 3):
        return preprocessing.geometry.build()
    return Compose([Image.fromarray, preprocessing.geometry.build()])


def same(item: Any) -> Any:
    """Return the item: validation images are prepared to the end."""
    return item
