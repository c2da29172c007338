"""What the features of a backbone depend on, as one digest: the key of what is stored."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sfda_tune.backbones.devices import few_threads
from sfda_tune.backbones.identity import files_behind, identify, is_foreign, version_of
from sfda_tune.backbones.loading import create, files_in, is_weights, load, read_config, timm_name
from sfda_tune.backbones.plugins import load_plugin
from sfda_tune.backbones.preprocessing import Preprocessing
from sfda_tune.backbones.weights import find_cached, find_file, find_remote, version
from sfda_tune.values.features import Backbone
from sfda_tune.values.files import digest_file

__all__ = ["fingerprint", "stand_in"]


def fingerprint(
    backbone: Backbone, module: Any = None, digest: Callable[[Any], str] = digest_file
) -> str | None:
    """Return a digest of all that a backbone's features depend on, apart from the images.

    Of a timm name, hub name or folder: its weights and configuration by their bytes, the version
    of timm, the plug-ins with all they import, and the code of an architecture that is not timm's.
    Of a network of the user's own: see `identity`, and what it makes of two fixed images.

    Without `module` it answers from files alone, and with None where the weights are not in a
    local file yet. With `module` (as `load` returns it) it always answers; for weights in files
    with the same digest as without. `digest` is what digests files.
    """
    parts = _surroundings(backbone)
    name = timm_name(backbone.spec)
    if backbone.load is not None:
        module, preprocessing = load(backbone)
        parts += [identify(module, backbone.name), _try_out(module, preprocessing)]
    elif name.startswith("local-dir:"):
        folder = Path(name.partition(":")[2])
        parts.append(_own_architecture(backbone, read_config(folder)["architecture"]))
        files = sorted(filter(is_weights, files_in(folder)))
        parts += [f"{f.name} {digest(f)}" for f in [folder / "config.json", *files]]
    else:
        parts.append(name)
        file = find_cached(name)
        if file is None and module is None:
            return None
        if name.startswith("hf-hub:"):
            remote = find_remote(name)
            config = find_file(remote, ["config.json"]) if remote else None
            parts.append(digest(config) if config else "")
            architecture = read_config(Path(config).parent)["architecture"] if config else ""
        else:
            architecture = name.partition(".")[0]
        parts.append(_own_architecture(backbone, architecture))
        parts.append(digest(file) if file is not None else identify(module, backbone.name))
    return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()


def stand_in(backbone: Backbone, digest: Callable[[Any], str] = digest_file) -> str | None:
    """Return a digest that stands for the fingerprint of weights that were on this machine once.

    It has the commit that the hub's cache knows in the place of their bytes; None without one.
    """
    remote = None if backbone.load is not None else find_remote(timm_name(backbone.spec))
    if remote is None or (commit := version(remote)) is None:
        return None
    architecture = backbone.spec.partition(".")[0]
    parts = [*_surroundings(backbone), backbone.spec, commit]
    if backbone.spec.startswith("hf-hub:"):
        if (config := find_file(remote, ["config.json"])) is None:
            return None
        parts.append(digest(config))
        architecture = read_config(Path(config).parent)["architecture"]
    parts.append(_own_architecture(backbone, architecture))
    return hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()


def _surroundings(backbone: Backbone) -> list[str]:
    """Return what the features of all networks depend on."""
    parts = [f"{package} {version_of(package)}" for package in ("timm", "torch")]
    return parts + [files_behind(plugin, load_plugin(plugin)) for plugin in backbone.plugins]


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
    if is_foreign(build.__module__):
        return f"{package} {version_of(package)}"
    with torch.random.fork_rng(devices=[]):  # of a tensor that is no weight the numbers count
        torch.manual_seed(0)
        module = create(backbone, pretrained=False)
    weights = module.state_dict(keep_vars=True).values()
    return identify([build, module], backbone.name, by_shape=weights)


def _try_out(module: Any, preprocessing: Preprocessing) -> str:
    """Return roughly what a network makes of two fixed images, on the CPU.

    It tells networks apart whose code is no Python, or reads a file. Where there is a fork, in a
    process of its own, which a network may end.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.parent_process():
        return _respond(module, preprocessing)
    fork = multiprocessing.get_context("fork")
    there, here = fork.Pipe(duplex=False)
    process = fork.Process(target=_send_response, args=(here, module, preprocessing), daemon=True)
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


def _send_response(pipe: Any, module: Any, preprocessing: Preprocessing) -> None:
    import torch

    torch.set_num_threads(1)  # those of the other process do not exist here
    pipe.send(_respond(module, preprocessing))


def _respond(module: Any, preprocessing: Preprocessing) -> str:
    """Return the outputs on fixed images, rounded to a hundredth of the features' size.

    The last digits depend on the processor and its threads.
    """
    import torch

    generator = np.random.default_rng(0)
    shape = preprocessing.input_size or preprocessing.output_size
    x = torch.from_numpy(generator.random((2, *shape), np.float32))
    try:
        threads = few_threads(module, preprocessing)
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), threads:
            torch.manual_seed(0)
            y = module(x).double()
        y = y.mean((2, 3)) if y.ndim == 4 else y
        directions = generator.standard_normal((y.shape[1], 8))
        seen, size = y.numpy() @ directions, float(y.norm())
    except Exception as error:  # the extraction will say so; or it runs on another device only
        return type(error).__name__
    told = [*(seen / (size or 1.0)).ravel(), np.log10(size or 1.0)]
    return repr([round(float(v), 2) + 0.0 for v in told])
