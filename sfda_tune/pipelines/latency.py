"""How long a forward pass with one image takes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from sfda_tune.backbones.devices import resolve_device
from sfda_tune.backbones.loading import load
from sfda_tune.values.features import Backbone

__all__ = ["measure_latency"]


def measure_latency(backbone: Backbone, device: str = "auto") -> float:
    """Return the milliseconds that a forward pass with one image takes: the median of several.

    >>> from sfda_tune import resolve_backbones
    >>> (backbone,) = resolve_backbones("demo:resnet_glyphs")
    >>> 0 < measure_latency(backbone, "cpu") < 10_000
    True
    """
    module, preprocessing = load(backbone)
    return time_forward(module, preprocessing, resolve_device(device))


def time_forward(module: Any, preprocessing: Any, device: str) -> float:
    import torch
    from PIL import Image

    pixels = preprocessing.build()(Image.new("RGB", (256, 256)))
    x = preprocessing.normalize(torch.stack([pixels])).to(device)
    module, times = module.to(device), []
    until = time.perf_counter() + 0.5
    with torch.inference_mode():
        while len(times) < 4 or (len(times) < 30 and time.perf_counter() < until):
            started = time.perf_counter()
            module(x).sum().item()  # waits for the device
            times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times[1:]))  # the first one warms up
