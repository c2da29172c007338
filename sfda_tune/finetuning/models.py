"""Fine-tuned models: open the folder that fine-tuning wrote, ask for its predictions."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.backbones import loading
from sfda_tune.backbones.devices import (
    check_precision,
    choose_layout,
    compute,
    few_threads,
    resolve_device,
    use_threads,
)
from sfda_tune.backbones.plugins import BackboneError
from sfda_tune.backbones.preprocessing import Preprocessing
from sfda_tune.data.arrays import as_item
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import UnreadableImage
from sfda_tune.data.folders import image_files
from sfda_tune.data.formats import Reading, parse_reading
from sfda_tune.data.loader import Loader, cut, is_in_memory
from sfda_tune.finetuning.checkpoints import read_tensors, write_tensors
from sfda_tune.finetuning.tasks import Task, read_task
from sfda_tune.values import formats
from sfda_tune.values.features import Backbone
from sfda_tune.values.files import digest_file, read_json, replacing, unfinished, write_text
from sfda_tune.values.text import as_tuple, integer, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn


__all__ = [
    "PROVENANCE", "WEIGHTS", "Model", "forward", "load_model", "predict", "predict_batches",
    "read_reading", "with_head", "write_model",
]  # fmt: skip

PROVENANCE = "provenance.json"


@dataclass(frozen=True, eq=False)
class Model:
    """A fine-tuned network with all that its use needs.

    Parameters
    ----------
    module : torch.nn.Module
        Maps a batch (n, channels, height, width) to outputs (n, n_outputs); in eval mode.
    preprocessing : Preprocessing
    task : Task
        What the outputs mean: logits of classes, or numbers.
    provenance : mapping
        Data set, configuration, versions and metrics of the training.
    """

    module: nn.Module
    preprocessing: Preprocessing
    task: Task
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class, level or label behind each column of predictions; none for numbers."""
        return self.task.classes


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
        If there is no such model, it is damaged, or it needs `backbone` or `plugins`.
    """
    folder = Path(folder)
    try:
        provenance = read_json(folder / PROVENANCE, formats.PROVENANCE)
    except FileNotFoundError:
        raise BackboneError(
            f"`folder` must be a model saved by fine-tuning but {str(folder)!r} has no "
            f"{PROVENANCE}; open other timm checkpoints with timm.create_model('local-dir:…')."
        ) from None
    task = read_task(provenance)
    written, found = provenance.get("digests"), _digests(folder, task)
    if written not in (None, found):  # None: an earlier version wrote it
        odd = {*dict(written.items() ^ found.items())}
        raise BackboneError(
            f"{str(folder)!r} does not hold the model that was written: {', '.join(sorted(odd))} "
            'changed or missing; restore it. If you changed it yourself, delete "digests" from '
            f"{PROVENANCE}."
        )
    if (folder / CONFIG).is_file():
        backbone = Backbone(
            folder.name, f"local-dir:{folder}", plugins=as_tuple("plugins", plugins)
        )
    elif backbone is None:
        raise BackboneError(
            f"`backbone` must be given for {str(folder)!r}: its {provenance['backbone']!r} is no "
            "network of timm's; pass the Backbone with `load=`."
        )
    reading = read_reading(provenance)
    backbone = backbone.taking(3 if reading is None else reading.channels)
    module, preprocessing, _ = with_head(backbone, task.n_outputs)
    try:
        module.load_state_dict(read_tensors(folder / WEIGHTS))
    except (OSError, ValueError, RuntimeError) as error:
        raise BackboneError(
            f"the weights in {str(folder / WEIGHTS)!r} are not those of {backbone.name}: "
            f"{one_line(' '.join(str(error).split()))}"
        ) from error
    return Model(module.eval(), preprocessing, task, provenance)


def predict(
    model: Model | str | os.PathLike[str],
    images: Any,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: str = "float32",
    threads: int | None = None,
) -> np.ndarray:
    """Return the class probabilities of images, or the numbers that are predicted of them.

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
    threads : int, optional
        At most so many threads of the CPU compute; default: as many as PyTorch has.

    Returns
    -------
    array of float64, shape (n_images, n_classes), or (n_images,) for numbers
        Columns in the order of ``model.classes``; NaN where an image cannot be read, with a
        warning that names the first.
    """
    model = model if isinstance(model, Model) else load_model(model)
    dataset = _images(images, model)
    p = np.full((len(dataset), *model.task.shape), np.nan)
    unreadable: dict[int, str] = {}
    for rows, found, bad in predict_batches(
        model, dataset, batch_size, device, precision, threads
    ):
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
    threads: int | None = None,
) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
    """Yield rows, their predictions and what cannot be read, batch by batch; see `predict`."""
    dataset, device = _images(images, model), resolve_device(device)
    check_precision(precision, device)
    threads = None if threads is None else integer("threads", threads, 1)
    module = model.module.to(device)
    inputs = _Inputs(dataset, model.preprocessing.build())
    batches = cut(len(dataset), batch_size)
    for batch, made in Loader(inputs, batches, list, direct=is_in_memory(dataset)):
        rows = list(batch)
        bad = {row: why for row, why in zip(rows, made, strict=True) if isinstance(why, str)}
        pixels = [x for x in made if not isinstance(x, str)]
        p = np.full((len(rows), *model.task.shape), np.nan)
        if pixels:
            with use_threads(threads), few_threads(module, model.preprocessing):
                good = [row not in bad for row in rows]
                outputs = forward(module, model.preprocessing, pixels, device, precision)
                p[good] = model.task.predict(outputs)
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


def _images(images: Any, model: Model) -> ImageDataset:
    reading = read_reading(model.provenance)
    channels = 3 if reading is None else reading.channels
    if isinstance(images, ImageDataset):
        if images.channels != channels:
            raise ValueError(
                f"`images` must have {channels} channels, as those of the training, but have "
                f"{images.channels}; open them with the same `bands`."
            )
        return images
    if isinstance(images, str | os.PathLike):
        images = list(image_files(images)) if os.path.isdir(images) else [images]
    items = [os.fspath(i) if isinstance(i, os.PathLike) else i for i in images]
    if reading is not None:  # it is of arrays as they were given
        items = [
            as_item(item, f"`images[{n}]`", reading) if isinstance(item, np.ndarray) else item
            for n, item in enumerate(items)
        ]
    labels = np.zeros(len(items), np.int64)
    return ImageDataset("images", items, labels, ("",), reading=reading)


def read_reading(provenance: Mapping[str, Any]) -> Reading | None:
    """Return how the images were read that a model was trained on."""
    found = provenance.get("reading") or {}
    reading = parse_reading(found.get("bit_depth"), found.get("bands"))
    return reading and replace(reading, of=found.get("of"))


WEIGHTS, CONFIG = "model.safetensors", "config.json"


def with_head(
    backbone: Backbone, n_outputs: int
) -> tuple[nn.Module, Preprocessing, list[nn.Module]]:
    """Open a backbone with a new head; return module, preprocessing, layers of the head.

    Timm networks get timm's own head, networks of the user's own a linear layer on top.
    """
    import torch

    module, preprocessing = loading.load(backbone)
    if preprocessing.geometry is not None:  # a timm network: `load` took its head off
        network: Any = module
        network.reset_classifier(n_outputs)
        head = network.get_classifier()
        return module, preprocessing, list(head) if isinstance(head, tuple | list) else [head]
    with torch.inference_mode(), few_threads(module, preprocessing):
        width = _pool(module(preprocessing.blank()[None].float())).shape[1]
    headed = _headed(module, width, n_outputs)
    return headed.eval(), preprocessing, [headed.head]


def _headed(body: nn.Module, width: int, n_outputs: int) -> Any:
    from torch import nn

    class Headed(nn.Module):
        pretrained_cfg = {"classifier": "head"}  # noqa: RUF012 - tells timm which layer is last

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(width, n_outputs)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(_pool(self.body(x)))

        def __reduce__(self) -> Any:  # pickle finds no class of a function
            return _headed, (self.body, width, n_outputs), self.__dict__

    return Headed()


def _pool(features: torch.Tensor) -> torch.Tensor:
    """Average feature maps (n, n_dims, h, w) over h and w, as the extraction does."""
    return features.mean((2, 3)) if features.ndim == 4 else features


def forward(
    module: nn.Module,
    preprocessing: Preprocessing,
    pixels: list[torch.Tensor],
    device: str,
    precision: str = "float32",
) -> torch.Tensor:
    """Return the outputs of the head for decoded images, on the CPU."""
    import torch

    with torch.inference_mode(), compute(device, precision, exact=False):
        batch = preprocessing.normalize(torch.stack(pixels).to(device))
        return module(batch.contiguous(memory_format=choose_layout(module))).float().cpu()


def write_model(backbone: Backbone, model: Model, folder: Path) -> None:
    """Write weights, for a network of timm's its ``config.json``, and the provenance."""
    _write_network(backbone, model, folder)
    if model.provenance:
        provenance = {**model.provenance, "digests": _digests(folder, model.task)}
        write_text(folder / PROVENANCE, json.dumps(provenance, indent=1) + "\n")


def _digests(folder: Path, task: Task) -> dict[str, str]:
    values = {"classes": task.classes} | ({"task": about} if (about := task.describe()) else {})
    files = [folder / name for name in (WEIGHTS, CONFIG) if (folder / name).is_file()]
    return {
        name: hashlib.blake2b(json.dumps(value).encode(), digest_size=20).hexdigest()
        for name, value in values.items()
    } | {file.name: digest_file(file) for file in files}


def _write_network(backbone: Backbone, model: Model, folder: Path) -> None:
    from timm.models import save_for_hf

    module: Any = model.module
    if "architecture" not in (getattr(module, "pretrained_cfg", None) or {}):
        write_tensors(folder / WEIGHTS, module.state_dict(), {"format": "pt"})
        return
    more: dict[str, Any] = {"label_names": list(model.classes)}
    name = loading.timm_name(backbone.spec)
    if name.startswith("local-dir:"):  # a network can be called otherwise than its base variant
        more["architecture"] = loading.read_config(name.partition(":")[2])["architecture"]
    elif name and not name.startswith("hf-hub:"):
        more["architecture"] = name.partition(".")[0]
    with unfinished(folder) as new:
        save_for_hf(module, str(new), model_config=more, safe_serialization=True)
        for file in (WEIGHTS, CONFIG):
            with replacing(folder / file) as whole:
                os.replace(new / file, whole)
