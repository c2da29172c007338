"""From a backbone to its network and the preprocessing it was trained with."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfda_tune.backbones import demo
from sfda_tune.backbones.devices import use_threads
from sfda_tune.backbones.plugins import BackboneError, load_plugin
from sfda_tune.backbones.preprocessing import Preprocessing, check_input_size
from sfda_tune.backbones.weights import (
    Remote,
    Tell,
    fetch_file,
    find_cached,
    find_remote,
    find_source,
    is_here,
    read_license,
    remove_damaged,
)
from sfda_tune.backbones.weights import fetch as fetch_weights
from sfda_tune.data.hub import cache_only_if_unreachable
from sfda_tune.values.features import Backbone
from sfda_tune.values.files import read_json, say_kind
from sfda_tune.values.redaction import hide_secrets
from sfda_tune.values.text import one_line, printable

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

__all__ = [
    "Description", "check_bounded", "describe", "fetch", "find_license", "load", "measure_cost",
]  # fmt: skip

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".tar", ".npz")


CALLS = 500_000  # of PyTorch's functions, in building a network


@dataclass(frozen=True)
class Description:
    """What is known of a backbone without its weights."""

    backbone: Backbone
    n_params: int
    n_dims: int | None
    preprocessing: Preprocessing


def files_in(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def is_weights(file: Path) -> bool:
    return file.suffix in WEIGHT_FILES and file.is_file()


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
            module = create(backbone, pretrained=False)
    except BackboneError:
        raise
    except Exception as error:  # a constructor that computes with its buffers
        logger.debug("%s cannot be built on the meta device: %s", backbone.name, error)
        module = create(backbone, pretrained=False)
    preprocessing = _preprocessing(module, backbone.channels)
    return Description(backbone, _count(module), _width(module), preprocessing)


def measure_cost(backbone: Backbone) -> tuple[float, float]:
    """Return the 10⁹ multiplications and 10⁶ activations of one image, without loading weights.

    Activations are the outputs of convolutions and matrix products, as in timm's tables. NaN for a
    network of the user's own, or one that cannot compute without numbers.

    >>> from sfda_tune import resolve_backbones
    >>> [round(x, 2) for x in measure_cost(*resolve_backbones("resnet18"))]
    [1.81, 2.48]
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    if backbone.load is not None:
        return math.nan, math.nan
    aten, count = torch.ops.aten, 0
    products = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}

    class Outputs(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal count
            out = func(*args, **(kwargs or {}))
            count += out.numel() if func.overloadpacket in products else 0
            return out

    try:
        with torch.device("meta"):
            module = create(backbone, pretrained=False).eval().requires_grad_(False)
        size = _preprocessing(module, backbone.channels).output_size
        image = torch.zeros(1, *size, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter, Outputs():
            module(image)
    except Exception as error:  # whatever a network does
        logger.debug("%s cannot be counted: %s", backbone.name, error)
        return math.nan, math.nan
    return counter.get_total_flops() / 2e9, count / 1e6


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
    import torch

    if backbone.load is None:
        module = create(backbone, pretrained=True)
        return module.eval().requires_grad_(False), _settle(module, backbone.channels)
    for plugin in backbone.plugins:
        load_plugin(plugin)
    module, transform = backbone.load()
    with torch.no_grad():  # or the parameters of TorchScript would be results
        module = copy.deepcopy(module)  # the caller's stays in its mode, on its device
    if transform is not None:
        preprocessing = Preprocessing(None, transform=transform, channels=backbone.channels)
    else:
        if backbone.channels != 3:
            _adapt(module, backbone.channels)
        preprocessing = _settle(module, backbone.channels)
        _take_off_classifier(module)
    for parameter in module.parameters():  # not `module.requires_grad_`: TorchScript has none
        parameter.requires_grad_(False)
    return module.eval(), preprocessing


def fetch(backbone: Backbone, tell: Tell | None = None) -> tuple[str | None, bool]:
    """See to it that a backbone's weights are here, see `weights.fetch`.

    Raises
    ------
    BackboneError
        If they cannot be had; the message says why and what to do.
    """
    try:
        for plugin in backbone.plugins:
            load_plugin(plugin)
        return fetch_weights(timm_name(backbone.spec), tell)
    except BackboneError:
        raise
    except Exception as error:
        raise BackboneError(_explain(backbone, error)) from error


def check_bounded(backbone: Backbone) -> None:
    """Refuse weights that timm would fetch past what `weights_disk` counts and removes.

    Raises
    ------
    BackboneError
    """
    name = timm_name(backbone.spec)
    if find_source(name)[0] == "url" and not is_here(name):
        raise BackboneError(
            f"timm fetches the weights of {backbone.spec} by their address, not from the hub, and "
            "keeps them, which `weights_disk` cannot bound; take another, or fetch them without it"
        )


def create(backbone: Backbone, *, pretrained: bool) -> Any:
    import timm

    for plugin in backbone.plugins:
        load_plugin(plugin)
    try:
        name = timm_name(backbone.spec)
        local = name.startswith("local-dir:")
        if local:
            read_config(name.partition(":")[2])
        remote = find_remote(name)
        file = None
        if remote is not None and name.startswith("hf-hub:"):
            file = fetch_file(remote, "config.json")
        if pretrained:
            file = fetch_weights(name)[0]
        pinned, overlay = _pin(name, remote, file)
        # With a second thread the many small steps wait for each other where others compute, too.
        with nullcontext() if local else cache_only_if_unreachable(), _bounded(), use_threads(1):
            # With its own classifier timm loads strictly, so a checkpoint that does not fit is an
            # error; with num_classes=0 it would silently leave what is missing at random.
            options: dict[str, Any] = (
                {} if backbone.channels == 3 else {"in_chans": backbone.channels}
            )
            if pretrained:
                module: Any = _build(pinned, pretrained_cfg_overlay=overlay or None, **options)
            else:
                module = timm.create_model(pinned, **options)
        if options:
            _check_adapted(module, backbone.channels)
        if remote is not None and file is not None:
            module.pretrained_cfg["hf_hub_id"] = _hub_id(remote)
    except BackboneError:
        raise
    except Exception as error:
        if pretrained and remove_damaged(timm_name(backbone.spec)):
            return create(backbone, pretrained=True)
        raise BackboneError(_explain(backbone, error)) from error
    _take_off_classifier(module)
    return module


def _take_off_classifier(module: Any) -> None:
    if not hasattr(module, "reset_classifier"):
        raise BackboneError(
            f"its {type(module).__name__} has no `reset_classifier`, so it gives no features; "
            "one of timm's that makes tokens, for a language model (`…_enc`), is there without "
            "`_enc`, too; for another pass in Python Backbone(name, load=…) a module that returns "
            "its features, and a transform"
        )
    module.reset_classifier(0)


def _pin(name: str, remote: Remote | None, file: str | None) -> tuple[str, dict[str, str]]:
    """Have timm open the version in the hub's cache, which the features are kept under.

    By a branch it would ask the hub each time, and take a newer one.
    """
    if remote is None or file is None:
        return name, {}
    parts = Path(file).parts
    hub_id = f"{remote.repo}@{parts[parts.index('snapshots') + 1]}"
    if name.startswith("hf-hub:"):
        return f"hf-hub:{hub_id}", {}
    return name, {"hf_hub_id": hub_id}


def _hub_id(remote: Remote) -> str:
    return f"{remote.repo}@{remote.revision}" if remote.revision else remote.repo


def _build(name: str, **options: Any) -> Any:
    """Build a network and load its weights, without drawing random ones first if it can be."""
    import timm
    import torch

    from sfda_tune.backbones.initialization import NoRandomWeights

    with NoRandomWeights() as blank, contextlib.suppress(torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
        module = timm.create_model(name, pretrained=True, **options)
        if not blank.incomplete():
            return module
    # an architecture that loads no weights, or computes with those that it is to load
    logger.debug("%s leaves weights at random: it is built as usual", name)
    return timm.create_model(name, pretrained=True, **options)


def _first_convolutions(module: Any) -> list[Any]:
    """Return the layers that timm calls the first ones of a network."""
    names = module.pretrained_cfg.get("first_conv") or ()
    names = (names,) if isinstance(names, str) else names
    return [module.get_submodule(name) for name in names]


def _check_adapted(module: Any, channels: int) -> None:
    """Raise a BackboneError if timm would leave the first layer at random for so many channels."""
    if module.pretrained_cfg["input_size"][0] == channels:  # it was trained with so many
        return
    layers = _first_convolutions(module)
    if not layers or any(getattr(one, "in_channels", None) != channels for one in layers):
        raise BackboneError(
            f"its first layer is no convolution that timm adapts to {channels} channels; choose "
            "three bands for it (--bands 3,2,1), or leave it out"
        )


def _adapt(module: Any, channels: int) -> None:
    """Adapt the first convolutions of an opened network, in place, as timm does in opening one."""
    import torch
    from timm.models._manipulate import adapt_input_conv

    layers = _first_convolutions(module) if hasattr(module, "pretrained_cfg") else []
    own = {getattr(one, "in_channels", None) for one in layers}
    if own == {channels}:
        return
    sound = own in ({1}, {3}) and all(
        isinstance(one, torch.nn.Conv2d) and one.groups == 1 for one in layers
    )
    if not sound:
        raise BackboneError(
            f"its first layer is no convolution that can be adapted to {channels} channels; pass "
            "`load` a transform of yours, which is given arrays (h, w, channels), and a network "
            "that takes what it makes"
        )
    for layer in layers:
        weight = adapt_input_conv(channels, layer.weight.data, base_chans=layer.in_channels)
        layer.weight, layer.in_channels = torch.nn.Parameter(weight), channels
    if hasattr(module, "in_chans"):
        module.in_chans = channels


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


def find_license(backbone: Backbone) -> str | None:
    """Return the licence of the weights, as timm's registry or the checkpoint's folder tells it.

    Of others' checkpoints on the hub, as the card says that came with the weights. None where
    nobody says it: networks of your own, for one. Nothing is fetched.

    >>> find_license(Backbone("resnet50.a1_in1k")), find_license(Backbone("mine", load=print))
    ('apache-2.0', None)
    """
    from timm.models import get_pretrained_cfg

    name = timm_name(backbone.spec)
    source, _, rest = name.partition(":")
    if backbone.load is not None:
        return None
    if source == "local-dir":
        try:
            config = read_config(rest)
        except BackboneError:
            return None
        about = config.get("pretrained_cfg")
        found = (about if isinstance(about, dict) else config).get("license")
    else:
        known = rest.removeprefix("timm/") if source == "hf-hub" else name
        about = None if "/" in known else get_pretrained_cfg(known, allow_unregistered=True)
        found = (about and about.license) or read_license(name)
    return found if isinstance(found, str) and found else None


def _explain(backbone: Backbone, error: Exception) -> str:
    """Say in one line why a backbone cannot be opened, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    text = hide_secrets(" ".join(str(error).split()), constants.ENDPOINT)
    if isinstance(error, hub.GatedRepoError):
        return f"{backbone.spec} is gated on the hub: ask for access, then `hf auth login`"
    if isinstance(error, hub.RepositoryNotFoundError):
        return f"the hub has no (public) repository for {backbone.spec}"
    cause = error.__cause__ if isinstance(error, hub.LocalEntryNotFoundError) else error
    if isinstance(cause, hub.HfHubHTTPError):
        said = cause.response.status_code
        if said in (401, 403):
            hint = "you may not have it: look at its page, then `hf auth login`"
        elif said == 429 or said >= 500:
            hint = "also when asked again; try later"
        else:
            hint = one_line(hide_secrets(str(cause), str(cause.response.url)), 200)
        return f"the hub answers {said} to the request for {backbone.spec}: {hint}"
    if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
        known = cause is not None and cause is not error
        why = f" ({one_line(hide_secrets(str(cause), constants.ENDPOINT), 100)})" if known else ""
        return (
            f"the weights of {backbone.spec} are not in the local cache and the hub cannot be "
            f"reached{why}; connect once, or pass a checkpoint folder as local-dir:PATH"
        )
    if "Unknown model" in text:
        return f"{text}: register the architecture with --import FILE (`plugins=` in Python)"
    source, _, rest = (name := timm_name(backbone.spec)).partition(":")
    local = source == "local-dir"
    if "weights_only" in text:  # torch's advice is to open it all the same
        needs = re.search(r"Unsupported globals: (.*?)\. ", text)
        return (
            "its weights are a pickle of more than tensors"
            f"{f' ({one_line(needs[1], 100)})' if needs else ''}, which may run anything when it "
            f"is opened, and is refused; save them as model.safetensors{f'; check {rest}' * local}"
        )
    where = f"; check {rest}" if local else ""
    if not local and (file := find_cached(name)):
        beside = " or the config.json beside it" if source == "hf-hub" else ""
        where = f"; if {file}{beside} is damaged, delete it: the next run fetches it again"
    text = text if len(text) <= 300 else f"{text[:300]} …"  # a list of all missing keys
    if local and isinstance(error, FileNotFoundError) and not text:  # timm's own says nothing
        folder = Path(rest)
        odd = [f for f in sorted(folder.iterdir()) if f.suffix in WEIGHT_FILES and not f.is_file()]
        text = "; ".join(f"{printable(f.name)} {say_kind(f)}" for f in odd)
        text = text or "its weights are missing"
    return f"{type(error).__name__}: {text}{where}"


def _settle(module: Any, channels: int) -> Preprocessing:
    """Return the preprocessing; a network adapted to other channels says so where timm looks."""
    preprocessing = _preprocessing(module, channels)
    if channels != 3:
        told = {"input_size": preprocessing.input_size}
        told |= {"mean": preprocessing.mean, "std": preprocessing.std}
        module.pretrained_cfg = {**module.pretrained_cfg, **told}
    return preprocessing


def _preprocessing(module: Any, channels: int) -> Preprocessing:
    from timm.data.config import resolve_model_data_config

    config = dict(resolve_model_data_config(module))
    own, *size = check_input_size(config["input_size"])
    if channels == 3 and own not in (1, 3):
        raise BackboneError(
            f"the backbone takes {own} channels, images have 3; name as many bands (--bands), or "
            "pass a Backbone with a transform of your own that makes them"
        )
    config["input_size"] = (own if channels == 3 else channels, *size)
    return Preprocessing.from_config(config)


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _width(module: Any) -> int | None:
    for attribute in ("head_hidden_size", "num_features"):
        width = getattr(module, attribute, None)
        if isinstance(width, int):
            return width
    return None
