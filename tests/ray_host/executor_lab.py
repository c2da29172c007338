"""Images, networks and stores that go wrong in an actor; workers import them by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sfda_tune.extraction.store import FeatureStore


@dataclass(frozen=True)
class Item:
    """An image that ends every process which reads it, except the driver's."""

    pixels: np.ndarray
    driver: int
    once: str = ""  # a file: the first process only
    later: str = ""  # a file: all but the first process
    hang: bool = False
    signal: int = signal.SIGKILL

    def __call__(self):
        if os.getpid() == self.driver or (self.once and os.path.exists(self.once)):
            return self.pixels
        if self.later and not os.path.exists(self.later):
            Path(self.later).touch()
            return self.pixels
        if self.once:
            Path(self.once).touch()
        if self.hang:
            time.sleep(1000)
        os.kill(os.getpid(), self.signal)


class Net(torch.nn.Module):
    """The mean of each channel; fails as it is told."""

    def __init__(self, how="", most=10**9, scale=1.0):
        super().__init__()
        self.how, self.most = how, most
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]) * scale)

    def forward(self, x):
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "slow":
            time.sleep(0.1)
        if self.how.startswith("/"):  # until the test says so, but not for too long
            until = time.monotonic() + 3
            while not os.path.exists(self.how) and time.monotonic() < until:
                time.sleep(0.05)
        if self.how == "exit":
            sys.exit(3)
        if self.how == "raise":
            raise RuntimeError("a broken network")
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory, says the test")
        return x.mean((2, 3)) * self.weight


def to_tensor(image):
    return torch.from_numpy(np.array(image.resize((8, 8)), np.float32)).permute(2, 0, 1) / 255


def to_small_tensor(image):
    return torch.from_numpy(np.array(image.resize((4, 4)), np.float32)).permute(2, 0, 1) / 255


@dataclass(frozen=True)
class Load:
    how: str = ""
    most: int = 10**9
    scale: float = 1.0  # of the weights: equal networks share their features
    small: bool = False  # another geometry: pixels and bundles are not shared

    def __call__(self):
        if self.how == "load":
            raise FileNotFoundError("no weights here")
        if self.how == "late":  # as after a download
            time.sleep(0.4)
        return Net(self.how, self.most, self.scale), to_small_tensor if self.small else to_tensor


class FullStore(FeatureStore):
    """A full disk."""

    def put(self, key, images, entry):
        raise OSError(28, "No space left on device")
