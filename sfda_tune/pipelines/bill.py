"""What a ranking will cost, before any image is shown to a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from sfda_tune.backbones.devices import compute, resolve_device
from sfda_tune.backbones.loading import Description, create, find_license, load
from sfda_tune.backbones.weights import Told, free_space, look_up
from sfda_tune.extraction.run import find_pending
from sfda_tune.extraction.settings import Settings
from sfda_tune.metrics.priors import look_up_facts
from sfda_tune.pipelines.budget import time_decoding
from sfda_tune.pipelines.latency import time_forward
from sfda_tune.pipelines.ranking import find_prices, measure_sizes, prepare, rank
from sfda_tune.values.text import format_bytes, format_duration, some

__all__ = ["Bill", "draw_up_bill"]

UNKNOWN = "unknown"  # licence
BATCH, PATIENCE = 8, 5.0  # images of a trial run; the seconds that decoding may take


@dataclass(frozen=True)
class Bill:
    """What a ranking will cost on this machine.

    Parameters
    ----------
    n_backbones, n_images, n_copies : int
        Copies of files are no images more.
    n_computed, n_kept : int
        Images × backbones to compute, and those whose features are kept already.
    to_download : mapping of str to int
        Backbones that have images to see and whose weights are not here, and the bytes of these,
        as the hub tells.
    estimated : tuple of str
        Those whose bytes are four for each parameter, for the hub does not tell.
    download, disk, memory : int
        Bytes to download, of the features, of the largest network.
    free : int
        Bytes that are free where weights are kept.
    weights_disk : int or None
        Bytes of downloaded weights that may lie there at a time; those of larger networks do not.
    decode, forward : float
        Seconds: to decode the images once, by a few of them, with one process; and of the forward
        passes, by a trial run of one network and the multiplications of all.
    failed : mapping of str to str
        Backbones that cannot be opened, and why.
    licenses : mapping of str to str
        Under which licence the weights of each other one come, as timm, the checkpoint's folder or
        its card on the hub tells; "unknown" where nobody does.
    without : tuple of str
        Of `budget` and `race` what was given: all figures are those without it.
    """

    n_backbones: int
    n_images: int
    n_copies: int
    n_computed: int
    n_kept: int
    to_download: Mapping[str, int]
    estimated: tuple[str, ...]
    download: int
    disk: int
    memory: int
    decode: float
    forward: float
    free: int
    weights_disk: int | None
    failed: Mapping[str, str]
    licenses: Mapping[str, str]
    without: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.n_backbones} backbones, {self.n_images} images"
            + f" (and {self.n_copies} copies, left out)" * bool(self.n_copies)
            + f": {self.n_computed} forward passes, {self.n_kept} more are kept from before",
            f"about {format_duration(self.forward)} of forward passes, "
            f"{format_duration(self.decode)} of decoding beside them; measured here just now, on "
            "the machine as it is",
            f"{format_bytes(self.disk)} of features on disk, {format_bytes(self.memory)} of "
            "memory for the largest network",
        ]
        if self.to_download:
            lines += self._say_download()
        if self.without:
            given = " and ".join(f"--{name}" for name in self.without)
            lines.append(f"these are the figures without {given}: of all backbones on all images")
        if self.licenses:
            lines.append(f"licences of the weights: {self._say_licenses()}")
        lines += [f"{name} cannot be opened: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)

    def _say_licenses(self) -> str:
        of: dict[str, list[str]] = {}
        for name, license_ in self.licenses.items():
            of.setdefault(license_, []).append(name)
        order = sorted(of, key=lambda license_: (license_ == UNKNOWN, -len(of[license_])))
        return "; ".join(f"{license_} ({some(of[license_])})" for license_ in order)

    def _say_download(self) -> Iterator[str]:
        n, limit, about = len(self.to_download), self.weights_disk, "about " * bool(self.estimated)
        of = f"the weights of {n}, {about}{format_bytes(self.download)}"
        yield f"to download beside the forward passes: {of} ({some(self.to_download)})"
        if self.estimated:
            yield (
                f"the hub does not tell the size of {len(self.estimated)} of them (is it in "
                "reach?): four bytes for each parameter"
            )
        stay = self.download if limit is None else min(limit, self.download)
        kept = "and stay there" if limit is None else "at a time, removed in the end"
        yield (
            f"of {format_bytes(self.free)} that are free where weights are kept, they take up to "
            f"{format_bytes(stay)}, {kept}"
        )
        if stay > self.free:
            yield "that is more than there is: free some, or pass --weights-disk SIZE"
        if large := [m for m, size in self.to_download.items() if limit and size > limit]:
            yield f"larger than --weights-disk, so that they will fail: {some(large)}"


def draw_up_bill(dataset: Any, backbones: Any = "demo:*", **options: Any) -> Bill:
    """Find out what `rank` with these arguments will cost; no weights are fetched.

    The `options` are those of `rank`, which are refused as there, without `progress`.

    Examples
    --------
    >>> bill = draw_up_bill("digits", "demo:resnet_*", samples=50, cache=False)
    >>> bill.n_backbones, bill.n_computed, bill.n_kept, bill.to_download
    (2, 100, 0, {})
    """
    asked = signature(rank).bind(dataset, backbones, **options)
    asked.apply_defaults()
    del asked.arguments["progress"]
    ready = prepare(**asked.arguments)
    settings = replace(ready.settings, device=resolve_device(ready.settings.device))
    candidates, images = ready.candidates, ready.images
    digests = [ready.digests[row] for row in ready.twins.kept]
    pending, failed = find_pending(images, candidates, ready.store, settings.precision, digests)
    missing = {name: p for name, p in pending.items() if p.n_images}
    todo = [p.description.backbone for p in missing.values()]
    found = look_up_facts(backbone.spec for backbone in todo)
    prices = find_prices(measure_sizes(todo, {b.name: found[b.spec] for b in todo}))
    n_computed = sum(p.n_images for p in missing.values())
    sizes = {name: 4 * p.description.n_params for name, p in pending.items()}
    absent = {name: p.description.backbone.spec for name, p in missing.items() if not p.is_local}
    told = look_up(absent.values())
    download = {name: told[spec].size or sizes[name] for name, spec in absent.items()}
    licenses = {
        b.name: find_license(b) or told.get(b.spec, Told()).license or UNKNOWN
        for b in candidates
        if b.name not in failed
    }
    return Bill(
        len(candidates),
        len(images),
        len(ready.twins.copies),
        n_computed,
        len(images) * len(pending) - n_computed,
        download,
        tuple(name for name, spec in absent.items() if told[spec].size is None),
        sum(download.values()),
        sum(4 * (p.description.n_dims or 0) * p.n_images for p in missing.values()),
        max(sizes.values(), default=0),
        time_decoding(images, PATIENCE) * max((p.n_images for p in missing.values()), default=0),
        _time_forward({name: p.description for name, p in missing.items()}, prices, settings)
        * sum(prices[name] * p.n_images for name, p in missing.items()),
        free_space(),
        ready.limit,
        failed,
        licenses,
        tuple(name for name in ("budget", "race") if options.get(name)),
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
