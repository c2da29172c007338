"""How to extract, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from sfda_tune.backbones.devices import check_precision
from sfda_tune.values.features import Backbone, Features
from sfda_tune.values.text import integer, is_number, require

__all__ = ["PRECISIONS", "Extraction", "Map", "Settings"]

A = TypeVar("A")
B = TypeVar("B")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


class Map(Protocol):
    """Anything called like the builtin `map`: serial, threads, processes or remote actors."""

    def __call__(self, fn: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        """Apply `fn` to every item, in any order, anywhere."""
        ...


@dataclass(frozen=True)
class Settings:
    """How to extract.

    Parameters
    ----------
    device : str, default "auto"
        Any torch device; ``"auto"`` is CUDA, else MPS, else the CPU.
    precision : {"float32", "tf32", "bfloat16", "float16"}
        Of the forward pass, see `sfda_tune.backbones.devices.compute`; ``"tf32"`` is for CUDA
        devices. Features are always returned as float32. Halves move the scores of networks for
        phones by up to .02 (``tests/benchmarks/gpu.md``).
    batch_size : int, optional
        Default: by input size and device. Halved for as long as the memory does not suffice.
    workers : int, optional
        Decoding processes; 0 decodes in this process. Default: one per core, at most 8; 0 for
        small images that are in memory already, and within the processes of a pool.
    max_unreadable : float, default 0.1
        Fraction of unreadable images above which the data set is refused.
    threads : int, optional
        At most so many threads of the CPU compute a batch; a small network is computed with one,
        and another one with one where that is faster. The features are the same bits whatever is
        chosen. Default: as many as PyTorch has (`torch.get_num_threads`).

    Raises
    ------
    ValueError
        Naming the setting, the rule and the value.
    """

    device: str = "auto"
    precision: str = "float32"
    batch_size: int | None = None
    workers: int | None = None
    max_unreadable: float = 0.1
    threads: int | None = None

    def __post_init__(self) -> None:
        rule = f"one of {', '.join(PRECISIONS)}"
        require("precision", self.precision, rule, self.precision in PRECISIONS)
        check_precision(self.precision, self.device)
        for name, least in (("batch_size", 1), ("workers", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, integer(name, value, least))
        if not (is_number(self.max_unreadable) and 0 <= self.max_unreadable <= 1):
            raise ValueError(
                f"`max_unreadable` must lie in 0 … 1 but is {self.max_unreadable!r}; it is the "
                "fraction of images that may be unreadable."
            )


@dataclass(frozen=True, eq=False)
class Extraction:
    """What came of one backbone: its features, or the error that stopped it.

    Parameters
    ----------
    backbone : Backbone
    features : Features or None
    rows : array of int64, shape (n_samples,)
        Row of the data set behind each row of the features.
    error : str or None
    unreadable : dict of int to str
        Row of the data set → reason, for the images that could not be read.
    n_params : int or None
    input_size : (channels, height, width) or None
    images_per_second : float or None
        Forward passes only, on the device, as measured when they were made, in batches of `batch`.
    batch : int or None
        Images in a batch, None where an earlier version made the features.
    peak_memory : int or None
        Bytes that the forward passes took at most beside the weights; on CUDA only.
    peak_batch : int or None
        Images in a batch then.
    cached : bool
        No forward pass was needed.
    seconds : dict of str to float
        Spent now: ``load``, ``decode`` (waiting for pixels), ``forward``; ``decode_work`` is the
        time the decoding took in the workers, ``copy`` what features took to come to the host
        with the wait for the device, most of both hidden behind the forward passes.
    """

    backbone: Backbone
    features: Features | None
    rows: np.ndarray
    error: str | None = None
    unreadable: dict[int, str] = field(default_factory=dict)
    n_params: int | None = None
    input_size: tuple[int, int, int] | None = None
    images_per_second: float | None = None
    batch: int | None = None
    peak_memory: int | None = None
    peak_batch: int | None = None
    cached: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
