"""Backbones: from what a user writes to a network that gives features.

==========================  =====================================================================
spec                        meaning
==========================  =====================================================================
``resnet50.a1_in1k``        a timm name; pretrained weights from the hub through timm's own cache
``convnext_*.fb_in22k*``    a glob over timm's pretrained names
``hf-hub:owner/name``       a timm checkpoint on the Hugging Face hub
``local-dir:PATH``          a timm checkpoint folder (``config.json`` and weights)
``PATH``                    such a folder, a folder of such folders, or a glob over them
``preset:medium``           twelve timm names for a size: fast, small, medium, large, medical
``demo:*``                  the small backbones that ship with the package, or a glob over them
`Backbone`                  anything else: ``Backbone("mine", load=lambda: (module, transform))``
``{"mine": module}``        modules by name; with ``(module, transform)`` a transform of your own
==========================  =====================================================================

Weights are opened as timm opens them: safetensors, else ``torch.load(weights_only=True)``. Nothing
is fetched unless a spec names remote weights that are not in the local cache yet.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import glob as globbing
import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sfda_tune.backbones import demo
from sfda_tune.backbones.loading import WEIGHT_FILES, files_in, is_weights
from sfda_tune.backbones.plugins import BackboneError, load_plugin
from sfda_tune.values.features import Backbone
from sfda_tune.values.files import say_kind
from sfda_tune.values.text import as_tuple, did_you_mean, printable

__all__ = ["resolve_backbones"]


def resolve_backbones(specs: Any, *, plugins: Iterable[str] = ()) -> list[Backbone]:
    """Expand specs to backbones, without loading or fetching any weights.

    Parameters
    ----------
    specs : str, Backbone, mapping, or an iterable of these
        See the table of the module.
    plugins : iterable of str
        Files or modules for `load_plugin`; every process that loads the backbones runs them.

    Returns
    -------
    list of Backbone
        In the order of the specs, with unique names; the same weights once, as first spelt.

    Raises
    ------
    BackboneError
        Naming every spec that matches nothing, with what is close to it.

    Examples
    --------
    >>> [b.name for b in resolve_backbones("demo:*noise*")]
    ['demo:resnet_noise']
    """
    given = as_tuple("plugins", plugins)
    plugins = tuple(os.path.abspath(p) if os.path.exists(p) else os.fspath(p) for p in given)
    for plugin in plugins:
        load_plugin(plugin)
    if isinstance(specs, (str, os.PathLike, Backbone, Mapping)) or not isinstance(specs, Iterable):
        specs = [specs]
    found: list[Backbone] = []
    problems: list[str] = []
    for spec in specs:
        if isinstance(spec, Backbone):
            found.append(spec)
        elif isinstance(spec, Mapping):
            found.extend(_given(name, value) for name, value in spec.items())
        elif isinstance(spec, (str, os.PathLike)):
            try:
                found.extend(
                    Backbone(name, opened, plugins=plugins)
                    for name, opened in _expand(os.fspath(spec))
                )
            except BackboneError as error:
                problems.append(str(error))
        else:
            problems.append(
                f"{spec!r} is no str, Backbone or mapping; pass {{'name': (module, transform)}} "
                "for a network of your own"
            )
    if problems:
        raise BackboneError("; ".join(problems))
    distinct: dict[tuple[str, int], Backbone] = {}
    for backbone in found:
        key = _spell_out(backbone.spec), id(backbone.load)
        if (first := distinct.setdefault(key, backbone)).spec != backbone.spec:
            warnings.warn(f"{backbone.name!r} is {first.name!r} again", stacklevel=2)
    if not distinct:
        raise BackboneError("`backbones` is empty; pass a spec such as 'resnet*' or 'demo:*'")
    return _with_unique_names(list(distinct.values()))


def _spell_out(spec: str) -> str:
    """Return a spec with its tag, and without the address from which timm fetches it anyway."""
    timm: Any = sys.modules.get("timm")  # else none of the specs is a name of timm's
    name = spec.removeprefix("hf-hub:timm/")
    if timm is None or not timm.models.is_model_pretrained(name):
        return spec
    config = timm.get_pretrained_cfg(name)
    if name != spec:
        return name if config.hf_hub_id == f"timm/{name}" else spec
    return f"{config.architecture}.{config.tag}" if config.tag else spec


@functools.cache
def _presets() -> dict[str, Any]:
    """Return the presets: for each what it is for and its names, the most promising first."""
    return json.loads(Path(__file__).with_name("presets.json").read_text("utf-8"))["presets"]


def _with_unique_names(backbones: list[Backbone]) -> list[Backbone]:
    """Call folders of the same name by their whole path."""
    names = [b.name for b in backbones]
    result = [
        Backbone(b.spec, b.spec, b.load, b.plugins) if names.count(b.name) > 1 and b.spec else b
        for b in backbones
    ]
    names = [b.name for b in result]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BackboneError(f"`backbones` must have unique names but repeats {twice}")
    return result


def _expand(spec: str) -> list[tuple[str, str]]:
    """Expand one text to pairs of name and what timm opens."""
    if spec in ("demo", "demo:"):
        raise BackboneError(f"{spec!r} must be 'demo:*' or 'demo:NAME'")
    if spec.startswith("demo:"):
        names = fnmatch.filter(demo.names(), spec[len("demo:") :])
        if not names:
            known = [f"demo:{name}" for name in demo.names()]
            raise BackboneError(f"{spec!r} matches none of {known}{did_you_mean(spec, known)}")
        return [(f"demo:{name}", f"demo:{name}") for name in names]
    if spec.startswith("preset:"):
        presets, name = _presets(), spec.partition(":")[2]
        if name not in presets:
            known = "; ".join(f"preset:{name}, {p['what']}" for name, p in presets.items())
            hint = did_you_mean(spec, [f"preset:{name}" for name in presets])
            raise BackboneError(f"{spec!r} is none of the presets: {known}{hint}")
        return [pair for name in presets[name]["names"] for pair in _expand_timm(name)]
    if spec.startswith(("hf-hub:", "hf_hub:")):
        owner_and_name = spec.partition(":")[2]
        if not _is_repo(owner_and_name.partition("@")[0]):
            raise BackboneError(
                f"{spec!r} must look like 'hf-hub:owner/name': letters, digits, '_', and single "
                "'-' or '.' between them"
            )
        return [(f"hf-hub:{owner_and_name}", f"hf-hub:{owner_and_name}")]
    if spec.startswith("local-dir:"):
        return _expand_folder(spec, spec.partition(":")[2])
    looks_like_path = spec.startswith((".", "~")) or any(
        s and s in spec for s in (os.sep, os.altsep)
    )
    if looks_like_path:
        return _expand_folder(spec, spec)
    try:
        return _expand_timm(spec)
    except BackboneError:
        if os.path.isdir(spec):
            return _expand_folder(spec, spec)
        raise


def _is_repo(text: str) -> bool:
    """Whether the hub may have a repository of this name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def _expand_folder(spec: str, path: str) -> list[tuple[str, str]]:
    path = os.path.expanduser(path)
    literal = os.path.isdir(path) or not globbing.has_magic(path)  # "runs [v1]" may be there
    folders = [path] if literal else sorted(globbing.glob(path))
    folders = [Path(os.path.abspath(folder)) for folder in folders if os.path.isdir(folder)]
    if not folders and (os.path.lexists(path) or spec.endswith(WEIGHT_FILES)):
        raise BackboneError(
            f"{spec!r} {say_kind(path)}; pass the folder that holds config.json and weights"
        )
    if not folders:
        repo = re.sub("^hf[-_]hub:", "", spec, flags=re.IGNORECASE)
        hub = f", or hf-hub:{repo} for one on the hub" if _is_repo(repo) else ""
        raise BackboneError(
            f"{spec!r} names no folder; pass a folder that holds a config.json{hub}"
        )
    found = []
    for folder in folders:
        inside = [folder] if (folder / "config.json").is_file() else sorted(folder.iterdir())
        found += [f for f in inside if (f / "config.json").is_file()]
        bare = [f for f in inside if f not in found and any(map(is_weights, files_in(f)))]
        if bare:
            warnings.warn(
                "left out, without a config.json beside the weights: "
                + ", ".join(printable(f.name) for f in bare),
                stacklevel=2,
            )
    for config in [f / "config.json" for f in folders]:
        if config.exists() and not config.is_file():
            raise BackboneError(f"{str(config)!r} must be a file but {say_kind(config)}")
    if not found:
        raise BackboneError(
            f"{spec!r} holds no timm checkpoint: neither it nor a folder in it has a config.json"
        )
    return [(folder.name, f"local-dir:{folder}") for folder in found]


def _expand_timm(spec: str) -> list[tuple[str, str]]:
    if "timm" not in sys.modules and not globbing.has_magic(spec):
        _refuse_unknown(spec)
    import timm

    if any(c in spec for c in "*?["):
        names = timm.list_models(spec, pretrained=True)
        if names:
            return [(name, name) for name in names]
        if timm.list_models(spec):
            raise BackboneError(
                f"no timm architecture that matches {spec!r} has pretrained weights"
            )
    elif renamed := timm.models.get_deprecated_models().get(spec):
        warnings.warn(f"timm calls {spec!r} {renamed!r} now", stacklevel=2)
        return _expand_timm(renamed)
    elif timm.is_model(spec.partition(".")[0]):
        if timm.models.is_model_pretrained(spec):
            return [(spec, spec)]
        tags = timm.list_models(spec.partition(".")[0], pretrained=True)
        if tags:
            raise BackboneError(f"{spec!r} has no such pretrained tag; timm has {', '.join(tags)}")
        raise BackboneError(
            f"timm has no pretrained weights for {spec!r}; pass a checkpoint as local-dir:PATH"
        )
    raise _unknown(spec, timm.list_models() + timm.list_models(pretrained=True))


def _refuse_unknown(spec: str) -> None:
    """Refuse what stands nowhere in timm's sources; to import it takes seconds."""
    found = importlib.util.find_spec("timm")
    folders = [*(found.submodule_search_locations or ())] if found else []
    files = sorted(Path(folders[0], "models").rglob("*.py")) if folders else []
    text = "".join(file.read_text("utf-8") for file in files)
    if text and not re.search(rf"\b{re.escape(spec.partition('.')[0])}\b", text):
        raise _unknown(spec, re.findall(r"^@register_model\s+def (\w+)\(", text, re.MULTILINE))


def _unknown(spec: str, known: Sequence[str]) -> BackboneError:
    close = difflib.get_close_matches(spec.lower(), known, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "see `sfda-tune backbones '*'`"
    return BackboneError(
        f"timm knows no model {spec!r}, and there is no such folder; {hint} "
        "(--import FILE registers architectures of your own)"
    )


def _given(name: str, value: Any) -> Backbone:
    """Wrap a module, or a module with a transform."""
    module, transform = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not callable(getattr(module, "forward", None)):
        raise BackboneError(
            f"the backbone {name!r} must be a torch.nn.Module or (module, transform) but is "
            f"{type(module).__name__}"
        )
    if transform is None and not getattr(module, "pretrained_cfg", None):
        raise BackboneError(
            f"the backbone {name!r} is no timm model, so its preprocessing is unknown; pass "
            "(module, transform)"
        )
    return Backbone(name, load=functools.partial(_hand_over, module, transform))


def _hand_over(module: Any, transform: Any) -> tuple[Any, Any]:
    return module, transform
