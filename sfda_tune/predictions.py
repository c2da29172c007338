"""Fine-tuned models: open the folder that fine-tuning wrote, ask for class probabilities."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune import backbones as zoo
from sfda_tune import formats
from sfda_tune.checkpoints import read_tensors
from sfda_tune.classifiers import WEIGHTS, forward, probabilities, with_head
from sfda_tune.datasets import EXTENSIONS, ImageDataset, UnreadableImage
from sfda_tune.extraction import few_threads, resolve_device
from sfda_tune.files import read_json
from sfda_tune.images import one_line
from sfda_tune.preprocessing import Preprocessing
from sfda_tune.values import Backbone

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PROVENANCE", "Model", "load_model", "predict"]

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
        A folder (all images below it, sorted by path), a file, or a sequence of paths, encoded
        bytes, uint8 arrays ``(h, w[, c])`` or PIL images.
    batch_size : int, default 32
    device : str, default "auto"
    precision : {"float32", "bfloat16", "float16"}

    Returns
    -------
    array of float64, shape (n_images, n_classes)
        Columns in the order of ``model.classes``; NaN where an image cannot be read, with a
        warning that names the first.
    """
    model = model if isinstance(model, Model) else load_model(model)
    dataset = _images(images)
    device = resolve_device(device)
    module = model.module.to(device)
    transform, n = model.preprocessing.build(), len(dataset)
    p = np.full((n, len(model.classes)), np.nan)
    unreadable: list[str] = []
    with few_threads(module, model.preprocessing):
        for start in range(0, n, batch_size):
            pixels, rows = [], []
            for row in range(start, min(start + batch_size, n)):
                try:
                    pixels.append(transform(dataset.load(row)))
                    rows.append(row)
                except UnreadableImage as error:
                    unreadable.append(str(error))
            if rows:
                p[rows] = probabilities(
                    forward(module, model.preprocessing, pixels, device, precision)
                )
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} of {n} images cannot be read; the first: {unreadable[0]}",
            stacklevel=2,
        )
    return p


def image_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the images below a folder, hidden files left out."""
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            yield path


def _images(images: Any) -> ImageDataset:
    if isinstance(images, ImageDataset):
        return images
    if isinstance(images, str | os.PathLike):
        images = list(image_files(images)) if os.path.isdir(images) else [images]
    items = [os.fspath(i) if isinstance(i, os.PathLike) else i for i in images]
    return ImageDataset("images", items, np.zeros(len(items), np.int64), ("",))
