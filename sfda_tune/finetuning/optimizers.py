"""Optimizers with a learning rate per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sfda_tune.finetuning.config import FinetuneConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["make_optimizer", "parameter_groups"]
WARMUP = 0.1  # of all epochs


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
    warmup = WARMUP * epochs if config.warmup_epochs is None else config.warmup_epochs
    schedule, _ = create_scheduler_v2(
        optimizer,
        config.schedule,
        num_epochs=epochs,
        warmup_epochs=min(warmup, epochs / 2),
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
