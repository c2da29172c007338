"""What a ranking will cost, before any image is shown to a network."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sfda_tune.backbones.devices import compute, resolve_device
from sfda_tune.backbones.loading import Description, create, load
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.data.opening import open_dataset
from sfda_tune.extraction.run import find_pending
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import open_store
from sfda_tune.metrics.priors import look_up_facts
from sfda_tune.pipelines.budget import time_decoding
from sfda_tune.pipelines.latency import time_forward
from sfda_tune.pipelines.ranking import find_prices, measure_sizes
from sfda_tune.values.text import format_duration, some

__all__ = ["Bill", "draw_up_bill"]

BATCH, PATIENCE = 8, 5.0  # images of a trial run; the seconds that decoding may take


@dataclass(frozen=True)
class Bill:
    """What a ranking will cost on this machine.

    Parameters
    ----------
    n_backbones, n_images : int
    n_computed, n_kept : int
        Images × backbones to compute, and those whose features are kept already.
    to_download : tuple of str
        Backbones whose weights are not here.
    download, disk, memory : int
        Bytes of these weights (four for each parameter), of the features, of the largest network.
    decode, forward : float
        Seconds: to decode the images once, by a few of them, with one process; and of the forward
        passes, by a trial run of one network and the multiplications of all.
    failed : mapping of str to str
        Backbones that cannot be opened, and why.
    """

    n_backbones: int
    n_images: int
    n_computed: int
    n_kept: int
    to_download: tuple[str, ...]
    download: int
    disk: int
    memory: int
    decode: float
    forward: float
    failed: Mapping[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.n_backbones} backbones, {self.n_images} images: {self.n_computed} forward "
            f"passes, {self.n_kept} more are kept from before",
            f"about {format_duration(self.forward)} of forward passes, "
            f"{format_duration(self.decode)} of decoding beside them; measured here just now, on "
            "the machine as it is",
            f"{_say_size(self.disk)} of features on disk, {_say_size(self.memory)} of memory for "
            "the largest network",
        ]
        if self.to_download:
            lines.append(
                f"to download first: the weights of {len(self.to_download)}, about "
                f"{_say_size(self.download)} ({some(self.to_download)})"
            )
        lines += [f"{name} cannot be opened: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)


def draw_up_bill(
    dataset: Any,
    backbones: Any = "demo:*",
    *,
    samples: int | None = None,
    seed: int = 0,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    groups: Any = None,
    split_column: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    cache: bool | str | os.PathLike[str] | None = True,
    plugins: Iterable[str] = (),
) -> Bill:
    """Find out what `rank` with these arguments will cost; no weights are fetched.

    Examples
    --------
    >>> bill = draw_up_bill("digits", "demo:resnet_*", samples=50, cache=False)
    >>> bill.n_backbones, bill.n_computed, bill.n_kept, bill.to_download
    (2, 100, 0, ())
    """
    settings = Settings(resolve_device(device), precision)
    store = open_store(None if cache is True else cache) if cache else None  # type: ignore
    candidates = resolve_backbones(backbones, plugins=plugins)
    images = open_dataset(
        dataset, split=split, image_column=image_column, label_column=label_column,
        groups=groups, split_column=split_column,
    )  # fmt: skip
    if samples is not None:
        images = images.sample(samples, seed=seed)
    pending, failed = find_pending(images, candidates, store, precision)
    missing = {name: p for name, p in pending.items() if p.n_images}
    todo = [p.description.backbone for p in missing.values()]
    found = look_up_facts(backbone.spec for backbone in todo)
    prices = find_prices(measure_sizes(todo, {b.name: found[b.spec] for b in todo}))
    n_computed = sum(p.n_images for p in missing.values())
    absent = [name for name, p in pending.items() if not p.is_local]
    sizes = {name: 4 * p.description.n_params for name, p in pending.items()}
    return Bill(
        len(candidates),
        len(images),
        n_computed,
        len(images) * len(pending) - n_computed,
        tuple(absent),
        sum(sizes[name] for name in absent),
        sum(4 * (p.description.n_dims or 0) * p.n_images for p in missing.values()),
        max(sizes.values(), default=0),
        time_decoding(images, PATIENCE) * max((p.n_images for p in missing.values()), default=0),
        _time_forward({name: p.description for name, p in missing.items()}, prices, settings)
        * sum(prices[name] * p.n_images for name, p in missing.items()),
        failed,
    )


def _time_forward(
    descriptions: Mapping[str, Description], prices: Mapping[str, float], settings: Settings
) -> float:
    """Return the seconds for a price of 1, by the network in the middle with any weights."""
    if not prices:
        return 0.0
    name = sorted(prices, key=lambda name: prices[name])[len(prices) // 2]
    backbone, preprocessing = descriptions[name].backbone, descriptions[name].preprocessing
    module = load(backbone)[0] if backbone.load else create(backbone, pretrained=False).eval()
    with compute(settings.device, settings.precision):
        ms = time_forward(module, preprocessing, settings.device, BATCH)
    return ms / 1000 / BATCH / prices[name]


def _say_size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
