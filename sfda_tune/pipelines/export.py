"""The winner of a search for others: ONNX, what to do to an image first, and a model card."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.formats import Reading
from sfda_tune.data.groups import read_options
from sfda_tune.data.splits import fingerprint, match_labels, split_images
from sfda_tune.finetuning.models import Model, load_model, predict, read_reading
from sfda_tune.finetuning.tasks import Multilabel, Ordinal
from sfda_tune.pipelines.inputs import read_usable
from sfda_tune.pipelines.result import SearchResult
from sfda_tune.values.files import check_folder, read_json, replacing, write_json, write_text
from sfda_tune.values.formats import SPLITS
from sfda_tune.values.labels import NOUNS
from sfda_tune.values.metrics import call
from sfda_tune.values.text import one_line, printable

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Export", "export_onnx"]

LIMIT = 1e-4  # of a difference in probability, or in standardised numbers, of rounding
N_NOISE = 16


@dataclass(frozen=True)
class Export:
    """What was written, and how it compares with the network in torch.

    Parameters
    ----------
    folder : Path
        With ``model.onnx``, ``preprocessing.json`` and ``README.md``, the model card.
    images : str
        What both were shown.
    n_images : int
    max_difference : float
        The largest difference of a class probability, or of a number.
    value, value_torch : float or None
        Of the metric, on these images; None where they have no labels.
    metric : str, default "accuracy"
        Of numbers "r2", of levels "spearman", of several labels "map".
    why : str, default ""
        Why it is noise, if it is.
    """

    folder: Path
    images: str
    n_images: int
    max_difference: float
    value: float | None
    value_torch: float | None
    metric: str = "accuracy"
    why: str = ""

    def __str__(self) -> str:
        what = "numbers" if self.metric == "r2" else "probabilities"
        name, same = call(self.metric), ""
        if self.value is not None:
            same = f", {name} {self.value:.4f} (torch {self.value_torch:.4f})"
        why = f" ({self.why})" if self.why else ""
        return (
            f"{self.folder / 'model.onnx'}: on {self.n_images} {self.images}{why} its {what} "
            f"differ by at most {self.max_difference:.1e} from those of torch{same}"
        )


def export_onnx(
    run: SearchResult | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    images: ImageDataset | None = None,
    plugins: Iterable[str] = (),
) -> Export:
    """Write the winner of a search as ONNX, with all that its use needs, and compare the two.

    The graph takes ``pixels``, uint8 of the shape (n, channels, height, width), as resized and
    cropped by ``preprocessing.json``; normalisation and softmax are in it. It gives ``logits`` and
    ``probabilities`` (n, n_classes), for any n; or ``standardised`` (n, 1) and ``numbers`` (n,),
    in the unit of the labels. ``preprocessing.json`` has the classes or levels; of several labels
    per image (sigmoid in the place of softmax) the thresholds, too. Needs the extra ``[onnx]``.

    Parameters
    ----------
    run : SearchResult or path
        A finished search.
    out : path, optional
        Folder to write to; default: ``RUN/export``.
    images : ImageDataset, optional
        On which both are compared. Default: the test images of the search, opened again; noise,
        which the result says with the reason, if the search was given images in memory, or they
        are others now.
    plugins : iterable of str
        As for `load_model`.

    Raises
    ------
    ValueError
        If there is no finished search, its network or its transform is no network of timm's, or
        the probabilities differ by more than 1e-4 (numbers: 1e-4 of their standard deviation), or
        `images` have labels of another kind; nothing is written then.
    ImportError
        If ONNX is not installed.

    Examples
    --------
    >>> print(Export(Path("run/export"), "test images", 120, 2.4e-07, 0.95, 0.95))
    run/export/model.onnx: on 120 test images its probabilities differ by at most 2.4e-07 from \
those of torch, accuracy 0.9500 (torch 0.9500)
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"exporting needs {', '.join(missing)}: pip install 'sfda-tune[onnx]', or in a "
            "checkout pip install -e '.[onnx]'"
        )
    found = run if isinstance(run, SearchResult) else SearchResult.open(run)
    folder = Path(found.folder / "export" if out is None else out)
    check_folder("out", folder)
    model = load_model(found.folder / "model", plugins=plugins)
    geometry = model.preprocessing.geometry
    if geometry is None:
        raise ValueError(
            f"{found.best['backbone']} has a transform of your own, which ONNX cannot hold; call "
            "torch.onnx.export with `load_model(...).module`."
        )
    what, why = "images that were given", ""
    if images is None:
        images, what, why = _test_images(found, read_reading(model.provenance))
    if what != "images of noise" and images.task != model.task.name:
        raise ValueError(
            f"`images` must have labels for {model.task.name} but are {images!r}; open them with "
            f"task={model.task.name!r}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.onnx") as file:
        _write_graph(model, file)
        ours, theirs = predict(model, images, device="cpu"), _run(file, model, images)
        seen = np.isfinite((ours + theirs).reshape(len(images), -1)).all(axis=1)
        difference = float(np.abs(ours - theirs)[seen].max(initial=0.0))
        limit = LIMIT * model.task.unit
        if not difference <= limit:
            of = "the probability of a class" if model.classes else "a number"
            raise ValueError(
                f"the exported {found.best['backbone']} differs by {difference:.2g} in {of} on "
                f"{what}, more than {limit:g}: it is not written. Please report it with the "
                "output of `sfda-tune doctor`."
            )
    pair: tuple[float | None, float | None] = (None, None)
    if what != "images of noise":
        pair = _score(model, images, theirs, seen), _score(model, images, ours, seen)
    export = Export(folder, what, int(seen.sum()), difference, *pair, model.task.monitors[0], why)
    about = _describe(model)
    write_json(folder / "preprocessing.json", about)
    write_text(folder / "README.md", _write_card(found, model, export, about))
    return export


def _score(model: Model, images: ImageDataset, p: np.ndarray, seen: Any) -> float:
    """Return the first metric on images; some may be of classes that are not known."""
    first = model.task.monitors[0]
    if isinstance(model.task, Multilabel):
        labels = match_labels(images, model.classes)
        return model.task.measure(labels[seen], p[seen])[first]
    if not model.classes:
        return model.task.measure(images.labels[seen], p[seen])[first]
    code = {name: c for c, name in enumerate(model.classes)}
    labels = np.array([code.get(images.classes[c], -1) for c in images.labels])
    if isinstance(model.task, Ordinal):
        seen = seen & (labels >= 0)
        return model.task.measure(labels[seen], p[seen])[first]
    return float(np.mean(p[seen].argmax(1) == labels[seen]))


def _test_images(found: SearchResult, reading: Reading | None) -> tuple[ImageDataset, str, str]:
    """Open the test images again, or make some noise and say why."""
    config = read_json(found.folder / "config.json", {"directory?": str})
    splits = read_json(found.folder / "splits.json", SPLITS)
    # from where the search was started; from here, if it was moved together with its images
    places = dict.fromkeys([config.get("directory", os.getcwd()), os.getcwd()])
    named = [{name: _find(config.get(name), at) for name in ("dataset", "test")} for at in places]
    said = [
        f"the search was given `{name}` in memory"
        for name in ("dataset", "test", "groups")
        if str(config.get(name)).startswith("<")
    ]
    for paths in [] if said else named if named[0] != named[-1] else named[:1]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                given = config | {"groups": read_options(config)} | paths
                parts, _, _ = split_images(given, partial(read_usable, splits))
            if fingerprint(parts) == splits["fingerprint"]:
                return parts["test"], "test images", ""
            said.append(f"the images or labels of {paths['dataset']} are others now")
        except KeyError as error:
            said.append(f"the folder of the search does not say {error}")
        except (OSError, ValueError, TypeError) as error:  # moved away since, perhaps
            texts = [path for path in paths.values() if isinstance(path, str)]
            gone = [path for path in texts if os.path.isabs(path) and not os.path.exists(path)]
            said.append(f"there is nothing at {gone[0]}" if gone else one_line(error))
    rng, channels = np.random.default_rng(0), 3 if reading is None else reading.channels
    items = list(rng.integers(0, 256, (N_NOISE, 97, 131, channels), np.uint8))
    labels = np.zeros(N_NOISE, np.int64)
    kept = None if channels == 3 else reading
    noise = ImageDataset("noise", items, labels, ("",), reading=kept)
    return noise, "images of noise", printable(said[0])


def _find(spec: Any, place: str) -> Any:
    """Return what a data set was called, a path as it is called from elsewhere."""
    if not isinstance(spec, str) or spec == "digits":
        return spec
    prefix = "hf:" if spec.startswith("hf:") else ""
    path = os.path.join(place, os.path.expanduser(spec.removeprefix(prefix)))
    return spec if prefix and not os.path.exists(path) else prefix + path  # a name on the hub


def _write_graph(model: Model, file: Path) -> None:
    import torch
    from torch import nn

    class Whole(nn.Module):
        """From pixels to predictions."""

        def __init__(self) -> None:
            super().__init__()
            self.network: nn.Module = model.module

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            outputs = self.network(model.preprocessing.normalize(pixels))
            return outputs, model.task.finish(outputs)

    size = model.preprocessing.output_size
    pixels = torch.zeros((2, *size), dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program: Any = torch.onnx.export(
            Whole().eval(),
            (pixels,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            input_names=["pixels"],
            output_names=list(model.task.exported),
            verbose=False,
        )
        program.save(str(file), external_data=False)


def _run(file: Path, model: Model, images: ImageDataset) -> np.ndarray:
    """Return what the graph says, as somebody would who has it and the transform alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    transform = model.preprocessing.build()
    p = np.full((len(images), *model.task.shape), np.nan)
    for row in range(len(images)):
        try:
            pixels = transform(images.load(row)).numpy()[None]
        except Exception:  # `predict` has warned of it
            continue
        p[row] = np.asarray(session.run([model.task.exported[1]], {"pixels": pixels})[0])[0]
    return p


def _describe(model: Model) -> dict[str, Any]:
    """Return what to do to an image, as JSON values."""
    g = model.preprocessing.geometry
    assert g is not None
    (c, h, w), to = g.input_size, [math.floor(side / g.crop_pct) for side in g.input_size[1:]]
    resize = {
        "center": "the shorter side (the other in proportion)",
        "squash": "both sides (the proportions are lost)",
        "border": "the longer side (the other in proportion)",
    }[g.crop_mode]
    thresholds = getattr(model.task, "thresholds", ())
    convert: dict[str, Any] = {"do": "convert", "to": "RGB" if c == 3 else "L", "bits": 8}
    reading = read_reading(model.provenance)
    if reading is not None and reading.bands is not None:
        convert["bands"] = list(reading.bands)  # counted from 1
        convert["to"] = "bands, each for itself" if reading.channels != 3 else convert["to"]
    if reading is not None and reading.bit_depth is not None:
        convert["white"] = 2**reading.bit_depth - 1
    shapes = [["n", "classes"]] * 2 if model.classes else [["n", 1], ["n"]]
    crop = {"do": "cut out the middle", "size": [h, w]}
    if g.crop_mode == "border":
        fill = [round(255 * value) for value in g.fill]
        crop = {"do": "cut out or pad around the middle", "size": [h, w], "colour": fill}
    return {
        "steps": [
            convert,
            {"do": "resize", "what": resize, "to": to, "interpolation": g.interpolation}
            | {"antialias": True, "as_in": "torchvision.transforms.Resize of a Pillow image"},
            crop,
        ],
        "input": {"name": "pixels", "dtype": "uint8", "shape": ["n", c, h, w]},
        "inside_the_graph": {
            "scale": 1 / 255,
            "mean": list(model.preprocessing.mean),
            "std": list(model.preprocessing.std),
        },
        "outputs": dict(zip(model.task.exported, shapes, strict=True)),
        NOUNS.get(model.task.name, "classes"): list(model.classes),
        **({"thresholds": list(thresholds)} if thresholds else {}),
    }


_HUB = {"r2": "r_squared", "spearman": "spearmanr"}  # what the hub calls metrics
_KINDS = {
    "ordinal": "levels, from the lowest to the highest",
    "multilabel": "labels, of which an image may have several",
}
_USE = {  # of the probabilities
    "ordinal": "\nThe level of an image is the median by its probabilities: the first up to which "
    "they add up\nto one half.",
    "multilabel": " A label applies where its probability reaches its threshold, which stands "
    "there,\ntoo.",
}
_CARD = """\
---
{{ front }}
---
# {{ backbone }}, {{ how }} {{ dataset }}

{% if classes %}
{{ classes | length }} {{ kind }}: {{ classes[:20] | join(", ") }}
{{- ", …" if classes | length > 20 }}.
{% else %}
Predicts a number.
{% endif %}
Chosen by sfda_tune {{ version }} among {{ candidates }} backbones. {{ images }}.

| on {{ n_test }} test images | |
|---|---|
{% for name, value in test.items() -%}
| {{ name | call }} | {{ "%.4f" | format(value) }}
{%- if intervals[name] %} (95 % interval {{ "%.3f to %.3f" | format(*intervals[name]) }})
{%- endif %} |
{% endfor -%}
| latency of one image{{ where }} | {{ latency }} |
| parameters | {{ "{:,}".format(n_params) }} |

Weights of the pretrained network: {{ spec }}, licence {{ licence }}. What holds for them holds for
these, too.

## Use

`preprocessing.json` says how an image becomes `pixels` (uint8, {{ shape }}); normalisation and
{{ inside }} are in the graph.
{{- use }}
{% if labels %}

| label | test images with it | average precision | F1 | threshold |
|---|---|---|---|---|
{% for cells in labels -%}
| {{ cells | join(" | ") }} |
{% endfor -%}
{% endif %}


```python
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
({{ exported }},) = session.run(["{{ exported }}"], {"pixels": pixels})
```

{{ parity }}
"""


def _tell_label(record: dict[str, Any]) -> list[str]:
    """Return the cells of a label in the table of the model card."""
    figures = (record[key] for key in ("average_precision", "f1", "threshold"))
    told = ["–" if value is None else f"{value:.4f}" for value in figures]
    return [record["label"].replace("|", "\\|"), str(record["images"]), *told]


def _write_card(found: SearchResult, model: Model, export: Export, about: dict[str, Any]) -> str:
    """Return the model card, with the front matter of the Hugging Face hub."""
    import yaml
    from jinja2 import Environment

    best, config = found.best, getattr(model.module, "pretrained_cfg", None) or {}
    spec, ranked = str(model.provenance.get("spec", "")), found.ranking.score(best["backbone"])
    licence = config.get("license") or ranked.details.get("license") or "unknown"
    first = model.task.monitors[0]
    value = {"type": _HUB.get(first, first), "value": round(best["test"][first], 4)}
    several = isinstance(model.task, Multilabel)
    # to the hub all but numbers are classes
    task = {"type": f"image-{'classification' if model.classes else model.task.name}"}
    data = {"name": str(found.summary["dataset"]), "type": "private"}
    front: dict[str, Any] = {
        "license": licence,
        **({"pipeline_tag": task["type"]} if model.classes else {}),  # the hub knows no other
        "tags": [task["type"], *["multi-label"] * several, "timm", "onnx", "sfda_tune"],
        "model-index": [
            {
                "name": best["backbone"],
                "results": [{"task": task, "dataset": data, "metrics": [value]}],
            }
        ],
    }
    if config.get("hf_hub_id"):
        front["base_model"] = config["hf_hub_id"]
    latency = best.get("latency_ms")
    env = Environment(autoescape=False, keep_trailing_newline=True, trim_blocks=True)  # Markdown
    env.filters["call"] = call
    return env.from_string(_CARD).render(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        backbone=best["backbone"],
        how="with a linear probe of" if best.get("epochs") == 0 else "fine-tuned on",
        dataset=found.summary["dataset"],
        classes=model.classes,
        kind=_KINDS.get(model.task.name, "classes"),
        use=_USE.get(model.task.name, ""),
        inside="sigmoid" if several else "softmax" if model.classes else "the unit of the numbers",
        labels=[_tell_label(r) for r in best.get("labels") or ()],
        version=model.provenance["versions"]["sfda_tune"],
        candidates=len(found.summary["candidates"]),
        images=found.images,
        n_test=found.summary["n_images"]["test"],
        test=best["test"],
        intervals=found.intervals,
        exported=model.task.exported[1],
        where=" (torch, where it was trained)",
        latency="not measured" if latency is None else f"{latency:.1f} ms",
        n_params=best["n_params"],
        spec=spec,
        licence=licence,
        shape=" × ".join(map(str, about["input"]["shape"])),
        parity=f"{replace(export, why='')}.".replace(f"{export.folder}{os.sep}", ""),
    )
