"""What backbones cost: parameters, and how long a forward pass with one image takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sfda_tune.backbones.devices import few_threads, resolve_device
from sfda_tune.backbones.loading import describe, load
from sfda_tune.values.features import Backbone

__all__ = ["measure_costs", "measure_latency", "time_forward"]


def measure_latency(backbone: Backbone, device: str = "auto") -> float:
    """Return the milliseconds that a forward pass with one image takes: the fastest of several.

    Other work on the machine only makes it slower. In a search it is measured once for each
    backbone: `max_latency`, the objective, result, page and model card have the same number.

    >>> from sfda_tune import resolve_backbones
    >>> (backbone,) = resolve_backbones("demo:resnet_glyphs")
    >>> 0 < measure_latency(backbone, "cpu") < 10_000
    True
    """
    module, preprocessing = load(backbone)
    return time_forward(module, preprocessing, resolve_device(device))


def time_forward(module: Any, preprocessing: Any, device: str, n_images: int = 1) -> float:
    """Return the milliseconds of an opened network for a batch, see `measure_latency`."""
    import torch

    x = preprocessing.normalize(torch.stack([preprocessing.blank()] * n_images)).to(device)
    module, times = module.to(device), []
    until = time.perf_counter() + 0.5
    with torch.inference_mode(), few_threads(module, preprocessing):
        while len(times) < 4 or (len(times) < 30 and time.perf_counter() < until):
            started = time.perf_counter()
            module(x).sum().item()  # waits for the device
            times.append(time.perf_counter() - started)
    return 1000 * min(times[1:])  # the first one warms up


def measure_costs(
    backbones: Mapping[str, Backbone],
    device: str,
    *,
    max_params: float | None = None,
    max_latency: float | None = None,
    timed: bool = False,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return parameters and, if they matter, latencies; and who breaks a constraint, and why.

    Examples
    --------
    >>> from sfda_tune import resolve_backbones
    >>> found = {b.name: b for b in resolve_backbones("demo:resnet_glyphs")}
    >>> measure_costs(found, "cpu", max_params=1e5)[1]
    {'demo:resnet_glyphs': '0.195 M parameters > 0.1 M'}
    """
    costs, excluded = {}, {}
    for name, backbone in backbones.items():
        cost: dict[str, Any] = dict.fromkeys(("latency_ms", "n_params", "seconds_per_epoch"))
        costs[name] = cost
        try:
            n = cost["n_params"] = describe(backbone).n_params
            if max_params is not None and n > max_params:
                excluded[name] = f"{n / 1e6:.3g} M parameters > {max_params / 1e6:.3g} M"
            elif timed or max_latency is not None:
                ms = cost["latency_ms"] = measure_latency(backbone, device)
                if max_latency is not None and ms > max_latency:
                    excluded[name] = f"{ms:.3g} ms > {max_latency:.3g} ms on this device"
        except Exception as error:  # a backbone that cannot be opened is one candidate less
            excluded[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return costs, excluded
