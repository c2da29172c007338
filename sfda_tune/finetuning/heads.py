"""A backbone with a classifier on top: made, started as logistic regression, evaluated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfda_tune.backbones import specs as zoo
from sfda_tune.backbones.devices import compute
from sfda_tune.backbones.preprocessing import Preprocessing
from sfda_tune.finetuning.checkpoints import write_tensors
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.values.files import replacing, unfinished
from sfda_tune.values.ranking import Backbone

if TYPE_CHECKING:
    import torch
    from torch import nn

    from sfda_tune.finetuning.models import Model

__all__ = [
    "WEIGHTS",
    "fit_head",
    "forward",
    "make_optimizer",
    "parameter_groups",
    "probabilities",
    "start_head",
    "with_head",
    "write_model",
]

WEIGHTS = "model.safetensors"
PROBE_IMAGES = 2000  # the penalty of the logistic regression is chosen on at most so many


def with_head(
    backbone: Backbone, n_classes: int
) -> tuple[nn.Module, Preprocessing, list[nn.Module]]:
    """Open a backbone with a new classifier; return module, preprocessing, classifier layers.

    Timm networks get timm's own head, networks of the user's own a linear layer on top.
    """
    import torch

    module, preprocessing = zoo.load(backbone)
    if preprocessing.geometry is not None:  # a timm network: `load` took its head off
        network: Any = module
        network.reset_classifier(n_classes)
        head = network.get_classifier()
        return module, preprocessing, list(head) if isinstance(head, tuple | list) else [head]
    from PIL import Image

    example = preprocessing.build()(Image.new("RGB", (256, 256)))
    with torch.inference_mode():
        width = _pool(module(example[None].float())).shape[1]
    headed = _headed(module, width, n_classes)
    return headed.eval(), preprocessing, [headed.head]


def _headed(body: nn.Module, width: int, n_classes: int) -> Any:
    from torch import nn

    class Headed(nn.Module):
        pretrained_cfg = {"classifier": "head"}  # noqa: RUF012 - tells timm which layer is last

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(width, n_classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(_pool(self.body(x)))

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
    """Return the logits of decoded images, on the CPU."""
    import torch

    with torch.inference_mode(), compute(device, precision, exact=False):
        batch = preprocessing.normalize(torch.stack(pixels).to(device))
        return module(batch.contiguous(memory_format=torch.channels_last)).float().cpu()


def probabilities(logits: torch.Tensor) -> np.ndarray:
    """Return softmax probabilities in float64, whose rows add up to one."""
    return logits.double().softmax(1).numpy()


def start_head(layers: list[Any], x: np.ndarray, y: np.ndarray) -> bool:
    """Make logistic regression on features the start of classifier layers, if they are linear."""
    import torch

    fits = [
        isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        and layer.bias is not None
        and layer.weight[0].numel() == x.shape[1]
        for layer in layers
    ]
    if not all(fits):
        return False
    weight, bias = fit_head(x, y, len(layers[0].weight))
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.tensor(weight).view_as(layer.weight))
            layer.bias.copy_(torch.tensor(bias))
    return True


def fit_head(x: np.ndarray, y: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit logistic regression on features; return weight (n_classes, n_dims) and bias.

    The features are standardised, and that is folded into the weight. The penalty is the one that
    `linear_probe` finds by cross-validation on the first `PROBE_IMAGES` of a fixed shuffle.
    """
    from sfda_tune.metrics import linear_probe
    from sfda_tune.metrics._linear import fit_softmax

    some = np.random.default_rng(0).permutation(len(x))[:PROBE_IMAGES]
    C = linear_probe(x[some], y[some]).details["C"]
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale <= 1e-6 * np.abs(mean)] = np.inf  # constant, but for float32's rounding
    theta, _ = fit_softmax(
        (x - mean) / scale, y, n_classes, 1 / (C * len(x)), tolerance=1e-4, max_iter=200
    )
    weight = (theta[:-1] / scale[:, None]).T
    return weight, theta[-1] - weight @ mean


def make_optimizer(
    module: nn.Module, head: list[nn.Module], config: FinetuneConfig, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """Freeze what is to be frozen; return timm's optimizer and schedule, stepped per update."""
    from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    inside = {id(p) for layer in head for p in layer.parameters()}
    for p in module.parameters():
        p.requires_grad_(config.freeze == "none" or id(p) in inside)
    optimizer = create_optimizer_v2(
        module,
        config.optimizer,
        lr=config.lr,
        weight_decay=config.weight_decay,
        param_group_fn=lambda module: parameter_groups(module, inside, config),
    )
    epochs: Any = max(1, int(config.epochs))
    schedule, _ = create_scheduler_v2(
        optimizer,
        config.schedule,
        num_epochs=epochs,
        warmup_epochs=min(config.warmup_epochs, epochs / 2),
        warmup_lr=config.lr / 100,
        decay_rate=1.0,  # the power of "poly"
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return optimizer, schedule


def parameter_groups(module: Any, head: set[int], config: FinetuneConfig) -> list[dict[str, Any]]:
    """Return timm's parameter groups, the head's apart; timm's schedules apply ``lr_scale``."""
    import timm.optim as timm_optim

    optim: Any = timm_optim

    exempt = getattr(module, "no_weight_decay", tuple)()
    if config.layer_decay is None:
        groups = optim.param_groups_weight_decay(module, config.weight_decay, True, exempt)
    else:
        groups = optim.param_groups_layer_decay(
            module, config.weight_decay, exempt, layer_decay=config.layer_decay
        )
    apart = []
    for group in groups:
        for factor, in_head in ((1.0, False), (config.head_lr_ratio, True)):
            params = [p for p in group["params"] if (id(p) in head) == in_head]
            scale = group.get("lr_scale", 1.0) * factor
            apart += [{**group, "params": params, "lr_scale": scale}] if params else []
    return apart


def write_model(backbone: Backbone, model: Model, folder: Path) -> None:
    """Write weights and, for a network of timm's, its ``config.json``."""
    from timm.models import save_for_hf

    module: Any = model.module
    if "architecture" not in (getattr(module, "pretrained_cfg", None) or {}):
        write_tensors(folder / WEIGHTS, module.state_dict(), {"format": "pt"})
        return
    more: dict[str, Any] = {"label_names": list(model.classes)}
    name = zoo.timm_name(backbone.spec)
    if name.startswith("local-dir:"):  # a network can be called otherwise than its base variant
        more["architecture"] = zoo.read_config(name.partition(":")[2])["architecture"]
    elif name and not name.startswith("hf-hub:"):
        more["architecture"] = name.partition(".")[0]
    with unfinished(folder) as new:
        save_for_hf(module, str(new), model_config=more, safe_serialization=True)
        for file in (WEIGHTS, "config.json"):
            with replacing(folder / file) as whole:
                os.replace(new / file, whole)
