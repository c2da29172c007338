"""Fine-tuned models: open the folder that fine-tuning wrote, ask for class probabilities."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.backbones import specs as zoo
from sfda_tune.backbones.devices import check_precision
from sfda_tune.backbones.preprocessing import Preprocessing
from sfda_tune.data.loader import Loader, cut, is_in_memory
from sfda_tune.data.opening import ImageDataset, UnreadableImage, image_files
from sfda_tune.extraction.run import few_threads, resolve_device
from sfda_tune.finetuning.checkpoints import read_tensors
from sfda_tune.finetuning.heads import WEIGHTS, forward, probabilities, with_head
from sfda_tune.values import formats
from sfda_tune.values.files import read_json
from sfda_tune.values.ranking import Backbone
from sfda_tune.values.text import one_line

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PROVENANCE", "Model", "load_model", "predict", "predict_batches"]

PROVENANCE = "provenance.json"


@dataclass(frozen=True, eq=False)
class Model:
    """A fine-tuned network with all that its use needs.

    Parameters
    ----------
    module : torch.nn.Module
        Maps a batch (n, channels, height, width) to logits (n, n_classes); in eval mode.
    preprocessing : Preprocessing
    classes : tuple of str
        The class behind each column of the logits.
    provenance : mapping
        Data set, configuration, versions and metrics of the training.
    """

    module: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)


def load_model(
    folder: str | os.PathLike[str],
    *,
    backbone: Backbone | None = None,
    plugins: Iterable[str] = (),
) -> Model:
    """Open a folder that `FineTuning.save_model` wrote.

    Parameters
    ----------
    folder : str or path
    backbone : Backbone, optional
        What was fine-tuned, if it was a network of your own rather than one of timm.
    plugins : iterable of str
        Files or modules that register the architecture, if timm lacks it. They are never taken
        from the folder, for opening a model must not run code that came with it.

    Raises
    ------
    BackboneError
        If there is no such model, or it needs `backbone` or `plugins`.
    """
    folder = Path(folder)
    try:
        provenance = read_json(folder / PROVENANCE, formats.PROVENANCE)
    except FileNotFoundError:
        raise zoo.BackboneError(
            f"`folder` must be a model saved by fine-tuning but {str(folder)!r} has no "
            f"{PROVENANCE}; open other timm checkpoints with timm.create_model('local-dir:…')."
        ) from None
    classes = tuple(provenance["classes"])
    if (folder / "config.json").is_file():
        backbone = Backbone(folder.name, f"local-dir:{folder}", plugins=tuple(plugins))
    elif backbone is None:
        raise zoo.BackboneError(
            f"`backbone` must be given for {str(folder)!r}: its {provenance['backbone']!r} is no "
            "network of timm's; pass the Backbone with `load=`."
        )
    module, preprocessing, _ = with_head(backbone, len(classes))
    try:
        module.load_state_dict(read_tensors(folder / WEIGHTS))
    except (OSError, ValueError, RuntimeError) as error:
        raise zoo.BackboneError(
            f"the weights in {str(folder / WEIGHTS)!r} are not those of {backbone.name}: "
            f"{one_line(' '.join(str(error).split()))}"
        ) from error
    return Model(module.eval(), preprocessing, classes, provenance)


def predict(
    model: Model | str | os.PathLike[str],
    images: Any,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "float32",
) -> np.ndarray:
    """Return the class probabilities of images.

    Parameters
    ----------
    model : Model, str or path
        What `load_model` returns or opens.
    images : ImageDataset, path, or sequence
        A folder (all images below it, hidden ones left out, in natural order, as `open_dataset`
        finds them), a file, or a sequence of paths, encoded bytes, uint8 arrays ``(h, w[, c])``
        or PIL images.
    batch_size : int, default 32
    device : str, default "auto"
    precision : {"float32", "tf32", "bfloat16", "float16"}

    Returns
    -------
    array of float64, shape (n_images, n_classes)
        Columns in the order of ``model.classes``; NaN where an image cannot be read, with a
        warning that names the first.
    """
    model = model if isinstance(model, Model) else load_model(model)
    dataset = _images(images)
    p = np.full((len(dataset), len(model.classes)), np.nan)
    unreadable: dict[int, str] = {}
    for rows, found, bad in predict_batches(model, dataset, batch_size, device, precision):
        p[rows] = found
        unreadable |= bad
    if unreadable:
        row, why = next(iter(unreadable.items()))
        warnings.warn(
            f"{len(unreadable)} of {len(p)} images cannot be read; the first: "
            f"{dataset.item_name(row)}: {why}",
            stacklevel=2,
        )
    return p


def predict_batches(
    model: Model,
    images: Any,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "float32",
) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
    """Yield rows, their probabilities and what cannot be read, batch by batch; see `predict`."""
    dataset, device = _images(images), resolve_device(device)
    check_precision(precision, device)
    module = model.module.to(device)
    inputs = _Inputs(dataset, model.preprocessing.build())
    batches = cut(len(dataset), batch_size)
    for batch, made in Loader(inputs, batches, list, direct=is_in_memory(dataset)):
        rows = list(batch)
        bad = {row: why for row, why in zip(rows, made, strict=True) if isinstance(why, str)}
        pixels = [x for x in made if not isinstance(x, str)]
        p = np.full((len(rows), len(model.classes)), np.nan)
        if pixels:
            with few_threads(module, model.preprocessing):
                good = [row not in bad for row in rows]
                p[good] = probabilities(
                    forward(module, model.preprocessing, pixels, device, precision)
                )
        yield rows, p, bad


@dataclass(frozen=True)
class _Inputs:
    """What a network is shown, or why not; for `sfda_tune.data.loader`."""

    dataset: ImageDataset
    transform: Any

    def name(self, row: int) -> str:
        return self.dataset.item_name(row)

    def __getitem__(self, row: int) -> Any:
        try:
            return self.transform(self.dataset.load(row))
        except UnreadableImage as error:
            return error.reason
        except Exception as error:  # of a transform, on an image of 1 × 100,000 pixels
            return one_line(f"{type(error).__name__}: {error}")


def _images(images: Any) -> ImageDataset:
    if isinstance(images, ImageDataset):
        return images
    if isinstance(images, str | os.PathLike):
        images = list(image_files(images)) if os.path.isdir(images) else [images]
    items = [os.fspath(i) if isinstance(i, os.PathLike) else i for i in images]
    return ImageDataset("images", items, np.zeros(len(items), np.int64), ("",))
