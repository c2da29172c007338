"""Backbones: from what a user writes to a network that gives features.

==========================  =====================================================================
spec                        meaning
==========================  =====================================================================
``resnet50.a1_in1k``        a timm name; pretrained weights from the hub through timm's own cache
``convnext_*.fb_in22k*``    a glob over timm's pretrained names
``hf-hub:owner/name``       a timm checkpoint on the Hugging Face hub
``local-dir:PATH``          a timm checkpoint folder (``config.json`` and weights)
``PATH``                    such a folder, a folder of such folders, or a glob over them
``demo:*``                  the small backbones that ship with the package, or a glob over them
`Backbone`                  anything else: ``Backbone("mine", load=lambda: (module, transform))``
``{"mine": module}``        modules by name; with ``(module, transform)`` a transform of your own
==========================  =====================================================================

Weights are opened as timm opens them: safetensors, else ``torch.load(weights_only=True)``. Nothing
is fetched unless a spec names remote weights that are not in the local cache yet.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import fnmatch
import functools
import glob as globbing
import hashlib
import importlib
import importlib.util
import logging
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.backbones import demo
from sfda_tune.backbones.identity import files_behind, identify, is_installed, version_of
from sfda_tune.backbones.preprocessing import Preprocessing, check_input_size
from sfda_tune.data.hub import cache_only_if_unreachable
from sfda_tune.values.files import digest_file, read_json, say_kind
from sfda_tune.values.ranking import Backbone
from sfda_tune.values.text import one_line, printable

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "BackboneError",
    "Description",
    "describe",
    "fingerprint",
    "load",
    "load_plugin",
    "resolve_backbones",
]

logger = logging.getLogger(__name__)

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".tar", ".npz")


CALLS = 500_000  # of PyTorch's functions, in building a network


class BackboneError(ValueError):
    """A backbone spec that cannot be understood, or a backbone that cannot be opened."""


@dataclass(frozen=True)
class Description:
    """What is known of a backbone without its weights."""

    backbone: Backbone
    n_params: int
    n_dims: int | None
    preprocessing: Preprocessing


# Plug-ins ---------------------------------------------------------------------------------------
_PLUGINS: dict[str, ModuleType] = {}
_PLUGIN_LOCK = threading.RLock()


def load_plugin(source: str | os.PathLike[str]) -> ModuleType:
    """Run a Python file, or import a module, that registers further architectures with timm.

    Parameters
    ----------
    source : str or path
        ``"my_models.py"``, ``"path/to/my_models.py"`` or ``"package.my_models"``. A file is run
        once per process; files beside it can be imported by it.

    Returns
    -------
    module

    Raises
    ------
    BackboneError
        If there is no such file or module, or if running it fails.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    is_file = path.suffix == ".py" or path.exists() or os.sep in name
    key = str(path.resolve()) if is_file else name
    with _PLUGIN_LOCK:
        if key in _PLUGINS:
            return _PLUGINS[key]
        try:
            if not is_file:
                module = importlib.import_module(name)
            else:
                if not path.is_file():
                    raise FileNotFoundError(f"{str(path)!r} {say_kind(path)}")
                module = _imported_from(key) or _run_file(path.resolve())
        except (Exception, SystemExit) as error:
            raise BackboneError(
                f"the plug-in {name!r} could not be imported ({type(error).__name__}: {error}); "
                "pass a Python file or the name of an importable module."
            ) from error
        _PLUGINS[key] = module
        return module


def _imported_from(file: str) -> ModuleType | None:
    """Return the module that the user's program imported from this file already."""
    for module in list(sys.modules.values()):
        origin = getattr(module, "__file__", None)
        if origin and str(Path(origin).resolve()) == file:
            return module
    return None


def _run_file(path: Path) -> ModuleType:
    name = f"sfda_tune_plugin_{path.stem}"  # a file called json.py must not become `json`
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as `python path/to/file.py` would
    sys.modules[name] = module  # timm's registry looks the module up by its name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


# Specs to backbones -----------------------------------------------------------------------------
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
        In the order of the specs, each once, with unique names.

    Raises
    ------
    BackboneError
        Naming every spec that matches nothing, with what is close to it.

    Examples
    --------
    >>> [b.name for b in resolve_backbones("demo:*noise*")]
    ['demo:resnet_noise']
    """
    plugins = tuple(os.path.abspath(p) if os.path.exists(p) else os.fspath(p) for p in plugins)
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
        distinct.setdefault((backbone.spec, id(backbone.load)), backbone)
    if not distinct:
        raise BackboneError("`backbones` is empty; pass a spec such as 'resnet*' or 'demo:*'")
    return _with_unique_names(list(distinct.values()))


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
            raise BackboneError(f"{spec!r} matches none of {['demo:' + n for n in demo.names()]}")
        return [(f"demo:{name}", f"demo:{name}") for name in names]
    if spec.startswith(("hf-hub:", "hf_hub:")):
        owner_and_name = spec.partition(":")[2]
        if "/" not in owner_and_name:
            raise BackboneError(f"{spec!r} must look like 'hf-hub:owner/name'")
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


def _expand_folder(spec: str, path: str) -> list[tuple[str, str]]:
    path = os.path.expanduser(path)
    literal = os.path.isdir(path) or not globbing.has_magic(path)  # "runs [v1]" may be there
    folders = [path] if literal else sorted(globbing.glob(path))
    folders = [Path(os.path.abspath(folder)) for folder in folders if os.path.isdir(folder)]
    if not folders and (os.path.exists(spec) or spec.endswith(WEIGHT_FILES)):
        raise BackboneError(
            f"{spec!r} {say_kind(spec)}; pass the folder that holds config.json and weights"
        )
    if not folders:
        hub = f", or hf-hub:{spec} for one on the hub" if spec.count("/") == 1 else ""
        raise BackboneError(
            f"{spec!r} names no folder; pass a folder that holds a config.json{hub}"
        )
    found = []
    for folder in folders:
        inside = [folder] if (folder / "config.json").is_file() else sorted(folder.iterdir())
        found += [f for f in inside if (f / "config.json").is_file()]
        bare = [f for f in inside if f not in found and any(map(_is_weights, _files_in(f)))]
        if bare:
            warnings.warn(
                "left out, for want of a config.json beside the weights: "
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


def _files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_weights(file: Path) -> bool:
    return file.suffix in WEIGHT_FILES and file.is_file()


def _expand_timm(spec: str) -> list[tuple[str, str]]:
    import timm

    if any(c in spec for c in "*?["):
        names = timm.list_models(spec, pretrained=True)
        if names:
            return [(name, name) for name in names]
        if timm.list_models(spec):
            raise BackboneError(
                f"no timm architecture that matches {spec!r} has pretrained weights"
            )
    elif timm.is_model(spec.partition(".")[0]):
        if timm.models.is_model_pretrained(spec):
            return [(spec, spec)]
        tags = timm.list_models(spec.partition(".")[0], pretrained=True)
        if tags:
            raise BackboneError(f"{spec!r} has no such pretrained tag; timm has {', '.join(tags)}")
        raise BackboneError(
            f"timm has no pretrained weights for {spec!r}; pass a checkpoint as local-dir:PATH"
        )
    known = timm.list_models() + timm.list_models(pretrained=True)
    close = difflib.get_close_matches(spec.lower(), known, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "see `sfda-tune backbones '*'`"
    raise BackboneError(
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


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the ``config.json`` of a timm checkpoint folder.

    Raises
    ------
    BackboneError
        If there is none, or it is not one of timm's; the message says what it is.
    """
    some = {str: object}
    kind = {"architecture?": str, "pretrained_cfg?": some, "model_args?": (some, None)}
    try:
        config = read_json(Path(folder) / "config.json", kind, f"check {folder}")
    except FileNotFoundError:
        raise BackboneError(f"it has no config.json; check {folder}") from None
    except ValueError as error:
        raise BackboneError(str(error)) from None
    if "architecture" not in config:
        raise BackboneError(f"its config.json {_say_whose(config)}; check {folder}")
    if (size := config.get("pretrained_cfg", {}).get("input_size")) is not None:
        try:
            check_input_size(size)
        except ValueError as error:
            raise BackboneError(f"{error}; check {folder}") from None
    return config


def _say_whose(config: Mapping[str, Any]) -> str:
    of = config.get("model_type") or config.get("architectures")
    if not of:
        return "names no `architecture`, as those of timm do"
    return (
        f"is of a transformers checkpoint ({one_line(str(of), 60)}), which timm cannot open; take "
        "timm's version of it (`sfda-tune backbones '*NAME*'`), or in Python Backbone(name, "
        "load=…) with a module that returns its features"
    )


# Backbones to networks --------------------------------------------------------------------------
def describe(backbone: Backbone) -> Description:
    """Find out parameters, width and preprocessing, without loading weights.

    Raises
    ------
    BackboneError
        If the backbone cannot be opened; the message says why and what to do.
    """
    import torch

    if backbone.load is not None:
        module, preprocessing = load(backbone)
        return Description(backbone, _count(module), None, preprocessing)
    try:
        with torch.device("meta"):
            module = _create(backbone, pretrained=False)
    except BackboneError:
        raise
    except Exception as error:  # a constructor that computes with its buffers
        logger.debug("%s cannot be built on the meta device: %s", backbone.name, error)
        module = _create(backbone, pretrained=False)
    return Description(backbone, _count(module), _width(module), _preprocessing(module))


def load(backbone: Backbone) -> tuple[nn.Module, Preprocessing]:
    """Open a backbone with its weights, on the CPU, in eval mode, without its classifier.

    Returns
    -------
    module : torch.nn.Module
        Maps (n, channels, height, width) to features (n, n_dims).
    preprocessing : Preprocessing

    Raises
    ------
    BackboneError
        If it cannot be opened; the message says why and what to do.
    """
    if backbone.load is None:
        module = _create(backbone, pretrained=True)
        return module.eval().requires_grad_(False), _preprocessing(module)
    for plugin in backbone.plugins:
        load_plugin(plugin)
    module, transform = backbone.load()
    module = copy.deepcopy(module)  # the caller's stays in its mode, on its device
    if transform is not None:
        preprocessing = Preprocessing(None, transform=transform)
    else:
        preprocessing = _preprocessing(module)
        module.reset_classifier(0)
    return module.eval().requires_grad_(False), preprocessing


def _create(backbone: Backbone, *, pretrained: bool) -> Any:
    import timm

    for plugin in backbone.plugins:
        load_plugin(plugin)
    try:
        name = timm_name(backbone.spec)
        local = name.startswith("local-dir:")
        if local:
            read_config(name.partition(":")[2])
        with nullcontext() if local else cache_only_if_unreachable(), _bounded():
            # With its own classifier timm loads strictly, so a checkpoint that does not fit is an
            # error; with num_classes=0 it would silently leave what is missing at random.
            module: Any = _build(name) if pretrained else timm.create_model(name)
    except BackboneError:
        raise
    except Exception as error:
        raise BackboneError(_explain(backbone, error)) from error
    module.reset_classifier(0)
    return module


def _build(name: str) -> Any:
    """Build a network and load its weights, without drawing random ones first if it can be."""
    import timm
    import torch

    from sfda_tune.backbones.initialization import NoRandomWeights

    with NoRandomWeights() as blank, contextlib.suppress(torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
        module = timm.create_model(name, pretrained=True)
        if not blank.incomplete():
            return module
    return timm.create_model(name, pretrained=True)  # an architecture that loads no weights


def _bounded() -> Any:
    """Return a context that refuses to build what no machine can hold: a mistaken configuration.

    It sees the tensors of this thread as they are made, before they are filled; on the device
    "meta" they take no memory, and only the absurd is refused.
    """
    import psutil
    import torch
    from torch.overrides import TorchFunctionMode

    class Bounded(TorchFunctionMode):
        calls, real, meta = 0, 0, 0

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = func(*args, **(kwargs or {}))
            self.calls += 1
            if func in makers and isinstance(made, torch.Tensor):
                size = made.numel() * made.element_size()
                self.real += 0 if made.is_meta else size
                self.meta += size if made.is_meta else 0
            if self.calls > CALLS or self.real > memory or self.meta > 1 << 42:
                held = f"than the {memory / 2**30:.3g} GiB of this machine can hold"
                raise MemoryError(
                    "its configuration asks for a larger network "
                    + ("than anybody has" if self.real <= memory else held)
                )
            return made

    makers = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}
    makers |= {torch.randint, torch.arange, torch.linspace, torch.eye, torch.tensor}
    memory = psutil.virtual_memory().total
    return Bounded()


def timm_name(spec: str) -> str:
    """Return what `timm.create_model` opens for a spec."""
    if spec.startswith("demo:"):
        return f"local-dir:{demo.folder(spec[len('demo:') :])}"
    return spec


def _explain(backbone: Backbone, error: Exception) -> str:
    """Say in one line why a backbone cannot be opened, and what to do."""
    from huggingface_hub import errors as hub

    text = " ".join(str(error).split())
    if isinstance(error, hub.GatedRepoError):
        return f"{backbone.spec} is gated on the hub: ask for access, then `hf auth login`"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"the hub has no (public) repository for {backbone.spec}"
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
        return (
            f"the weights of {backbone.spec} are not in the local cache and the hub cannot be "
            "reached; connect once, or pass a checkpoint folder as local-dir:PATH"
        )
    if "Unknown model" in text:
        return f"{text}: register the architecture with --import FILE (`plugins=` in Python)"
    text = text if len(text) <= 300 else f"{text[:300]} …"  # a list of all missing keys
    where = f"; check {timm_name(backbone.spec).partition(':')[2]}"
    local = timm_name(backbone.spec).startswith("local-dir:")
    if local and isinstance(error, FileNotFoundError) and not text:  # timm's own says nothing
        folder = Path(timm_name(backbone.spec).partition(":")[2])
        odd = [f for f in sorted(folder.iterdir()) if f.suffix in WEIGHT_FILES and not f.is_file()]
        text = "; ".join(f"{printable(f.name)} {say_kind(f)}" for f in odd)
        text = text or "its weights are missing"
    return f"{type(error).__name__}: {text}" + (where if local else "")


def _preprocessing(module: Any) -> Preprocessing:
    from timm.data.config import resolve_model_data_config

    return Preprocessing.from_config(resolve_model_data_config(module))


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _width(module: Any) -> int | None:
    for attribute in ("head_hidden_size", "num_features"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    return None


# What the features depend on --------------------------------------------------------------------
def fingerprint(backbone: Backbone, module: Any = None) -> str | None:
    """Return a digest of all that a backbone's features depend on, apart from the images.

    Of a timm name, hub name or folder: its weights and configuration by their bytes, the version
    of timm, the plug-ins with all they import, and the code of an architecture that is not timm's.
    Of a network of the user's own: see `identity`, and what it makes of two fixed images.

    Without `module` it answers from files alone, and with None where the weights are not in a
    local file yet. With `module` (as `load` returns it) it always answers; for weights in files
    with the same digest as without.
    """
    parts = [f"{package} {version_of(package)}" for package in ("timm", "torch")]
    parts += [files_behind(plugin, load_plugin(plugin)) for plugin in backbone.plugins]
    name = timm_name(backbone.spec)
    if backbone.load is not None:
        module, half = load(backbone)
        parts += [identify(module, backbone.name), _try_out(module, half)]
    elif name.startswith("local-dir:"):
        folder = Path(name.partition(":")[2])
        parts.append(_own_architecture(backbone, read_config(folder)["architecture"]))
        files = sorted(filter(_is_weights, _files_in(folder)))
        parts += [f"{f.name} {digest_file(f)}" for f in [folder / "config.json", *files]]
    else:
        parts.append(name)
        file = _cached_file(name)
        if file is None and module is None:
            return None
        if name.startswith("hf-hub:"):
            config = _from_hub(name.partition(":")[2], ["config.json"])
            parts.append(digest_file(config) if config else "")
            architecture = read_config(Path(config).parent)["architecture"] if config else ""
        else:
            architecture = name.partition(".")[0]
        parts.append(_own_architecture(backbone, architecture))
        parts.append(digest_file(file) if file is not None else identify(module, backbone.name))
    return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()


def _own_architecture(backbone: Backbone, architecture: str) -> str:
    """Return a digest of the code and attributes of an architecture that is none of timm's.

    Its weights do not count here, so it is built without any; timm's own are not built.
    """
    import torch
    from timm.models import is_model, model_entrypoint

    if not is_model(architecture):
        return ""  # opening it will say so
    build = model_entrypoint(architecture)
    package = build.__module__.partition(".")[0]
    if is_installed(getattr(sys.modules.get(package), "__file__", None)):
        return f"{package} {version_of(package)}"
    with torch.random.fork_rng(devices=[]):  # of a tensor that is no weight the numbers count
        torch.manual_seed(0)
        module = _create(backbone, pretrained=False)
    weights = module.state_dict(keep_vars=True).values()
    return identify([build, module], backbone.name, by_shape=weights)


def _try_out(module: Any, half: Preprocessing) -> str:
    """Return roughly what a network makes of two fixed images, on the CPU.

    It tells networks apart whose code is no Python, or reads a file. Where there is a fork, in a
    process of its own, which a network may end.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.parent_process():
        return _respond(module, half)
    fork = multiprocessing.get_context("fork")
    there, here = fork.Pipe(duplex=False)
    process = fork.Process(target=_send_response, args=(here, module, half), daemon=True)
    process.start()
    here.close()
    try:
        return there.recv() if there.poll(60) else "hangs"
    except EOFError:
        return "ends its process"
    finally:
        process.kill()
        process.join()
        there.close()


def _send_response(pipe: Any, module: Any, half: Preprocessing) -> None:
    import torch

    torch.set_num_threads(1)  # those of the other process do not exist here
    pipe.send(_respond(module, half))


def _respond(module: Any, half: Preprocessing) -> str:
    """Return the outputs on fixed images, rounded to a hundredth of the features' size.

    The last digits depend on the processor and its threads.
    """
    import torch

    generator = np.random.default_rng(0)
    shape = half.input_size or half.output_size
    x = torch.from_numpy(generator.random((2, *shape), np.float32))
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            y = module(x).double()
        y = y.mean((2, 3)) if y.ndim == 4 else y
        directions = generator.standard_normal((y.shape[1], 8))
        seen, size = y.numpy() @ directions, float(y.norm())
    except Exception as error:  # the extraction will say so; or it runs on another device only
        return type(error).__name__
    told = [*(seen / (size or 1.0)).ravel(), np.log10(size or 1.0)]
    return repr([round(float(v), 2) + 0.0 for v in told])


def _cached_file(name: str) -> str | None:
    """Find the weights of a remote backbone in the caches that timm uses."""
    import timm
    import torch

    hub_id, file_names, url = "", [], None
    if name.startswith("hf-hub:"):
        hub_id = name.partition(":")[2]
    else:
        config = timm.get_pretrained_cfg(name)
        if config is None:
            return None
        hub_id, url = config.hf_hub_id or "", config.url
        if config.hf_hub_filename:
            file_names = [config.hf_hub_filename]
    file_names += ["model.safetensors", "pytorch_model.bin"]
    names = [name for given in file_names for name in (_safe_name(given), given)]
    if hub_id and (file := _from_hub(hub_id, names)):
        return file
    if isinstance(url, str) and url:
        file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        if os.path.isfile(file):
            return file
    return None


def _from_hub(hub_id: str, names: list[str]) -> str | None:
    """Find the first of some files of a repository in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = hub_id.partition("@")
    for name in names:
        file = try_to_load_from_cache(repo, name, revision=revision or None)
        if isinstance(file, str):
            return file
    return None


def _safe_name(file_name: str) -> str:
    return (
        file_name.removesuffix(".bin") + ".safetensors"
        if file_name.endswith(".bin")
        else file_name
    )
