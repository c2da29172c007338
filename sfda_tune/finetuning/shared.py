"""What fine-tunings of the same images have in common, done once instead of once for each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from sfda_tune.extraction import pixels
from sfda_tune.finetuning.images import Images

__all__ = ["SharedWork"]

T = TypeVar("T")


class SharedWork:
    """Splits, prepared images and starts of heads, kept for the next fine-tuning.

    Pass one to each call of `sfda_tune.finetuning.run.finetune` with the same `dataset` object
    (and the same `val`). Every run has the result that it would have alone, to the last bit.
    Prepared images take at most as much memory as those of one run may, with the last used ones
    kept. It serves one process, one run at a time; pickled it arrives empty.

    Examples
    --------
    >>> from sfda_tune import open_dataset, resolve_backbones
    >>> from sfda_tune.finetuning.run import FinetuneConfig, finetune
    >>> (backbone,) = resolve_backbones("demo:resnet_glyphs")
    >>> data, shared = open_dataset("digits", samples=100), SharedWork()
    >>> for lr in (0.001, 0.003):
    ...     config = FinetuneConfig(epochs=1, lr=lr)
    ...     print([e.number for e in finetune(backbone, data, config, shared=shared)])
    [0, 1]
    [0, 1]
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[Any, Any]] = {}
        self._images: OrderedDict[Hashable, Images] = OrderedDict()

    def __reduce__(self) -> tuple[type[SharedWork], tuple[()]]:
        return SharedWork, ()

    def get_or_compute(self, owners: tuple[Any, ...], key: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` returned for these objects and this key before, or does now."""
        full = (*map(id, owners), key)
        if full not in self._known:
            self._known[full] = (owners, make())  # an id is unique as long as its object lives
        return self._known[full][1]

    def recall_images(self, owner: Any, key: Hashable, make: Callable[[], Images]) -> Images:
        """Return prepared images, which stay in memory if they fit there."""
        full = (id(owner), key)
        images = self._images.pop(full, None) or make()  # they hold `owner`
        if images.kept is not None:
            self._images[full] = images
        kept = self._images
        while len(kept) > 1 and sum(i.nbytes for i in kept.values()) > pixels.PIXEL_BYTES:
            kept.popitem(last=False)
        return images
