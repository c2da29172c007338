"""Recreate the ``demo:*`` backbones: ``python -m sfda_tune.backbones.demo.pretrain``.

Draws each backbone's source task (:mod:`sfda_tune.backbones.demo.sources`), trains the backbone on
it from a random initialisation and writes a timm checkpoint folder (`config.json`,
`model.safetensors`). All seeds are fixed; the weights are bit-identical only with the same torch
build and the same number of threads (one by default). The whole set takes about ten minutes on one
CPU core.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save
from torch import nn

from sfda_tune.backbones.demo import sources
from sfda_tune.values.files import write_bytes

log = logging.getLogger("sfda_tune.backbones.demo.pretrain")

WEIGHTS = Path(__file__).parent / "weights"
HALF = ((0.5,) * 3, (0.5,) * 3)
DARK = ((0.3,) * 3, (0.3,) * 3)


@dataclass(frozen=True)
class Spec:
    """How one demo backbone is built and pretrained."""

    family: str
    architecture: str
    model_args: dict[str, Any]
    task: str | None
    """Source task; None leaves the random initialisation as it is."""
    seed: int
    size: int = 32
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] = field(default=HALF)
    steps: int = 1500
    pool: int = 12288
    lr: float = 2e-3

    @property
    def num_classes(self) -> int:
        """Number of source logits."""
        return sources.classes(self.task) if self.task else 10


def _resnet(channels: list[int]) -> dict[str, Any]:
    return {"layers": [1, 1, 1, 1], "channels": channels, "stem_width": 16}


def _vit(width: int, depth: int) -> dict[str, Any]:
    size = {"img_size": 32, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": 2}
    return {**size, "mlp_ratio": 2, "class_token": False, "global_pool": "avg"}


# Width is deliberately not aligned with quality, in neither direction.
SPECS: dict[str, Spec] = {
    "densenet_digits": Spec(
        "densenet",
        "densenet121",
        {"growth_rate": 8, "block_config": [3, 3, 3], "stem_type": "deep"},
        "digits",
        seed=1,
        size=48,
        crop_pct=0.9,
    ),
    "resnet_glyphs": Spec("resnet", "resnet10t", _resnet([16, 32, 48, 96]), "letters", seed=2),
    "vit_glyphs": Spec("vit", "test_vit", _vit(64, 4), "letters", seed=3, lr=1e-3, steps=3000),
    "convnext_glyphs": Spec(
        "convnext",
        "convnext_atto",
        {"depths": [1, 1, 2, 0], "dims": [16, 32, 64, 256], "patch_size": 2},
        "letters",
        seed=4,
        mean_std=DARK,
        steps=2000,
    ),
    "regnet_shapes": Spec(
        "regnet",
        "regnetx_002",
        {"depth": 8, "w0": 8, "wa": 8.0, "wm": 2.0, "group_size": 8, "stem_width": 16},
        "shapes",
        seed=5,
        size=40,
        interpolation="bilinear",
    ),
    "efficientnet_textures": Spec(
        "efficientnet", "test_efficientnet", {}, "textures", seed=6, interpolation="bilinear"
    ),
    "resnet_noise": Spec(
        "resnet",
        "resnet14t",
        _resnet([16, 24, 48, 96]),
        "noise",
        seed=7,
        pool=4096,
        steps=2500,
        lr=1e-2,
    ),
    "vit_untrained": Spec("vit", "test_vit", _vit(160, 2) | {"mlp_ratio": 1}, None, seed=8),
}


def build(spec: Spec) -> Any:
    """Return the backbone of `spec`, with its source head, at random initialisation."""
    torch.manual_seed(spec.seed)
    return timm.create_model(
        spec.architecture, pretrained=False, num_classes=spec.num_classes, **spec.model_args
    )


def normalise(images: np.ndarray, spec: Spec) -> torch.Tensor:
    """Return uint8 images (n, h, w, 3) as a float tensor (n, 3, h, w), mean and std applied."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in spec.mean_std)
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0 - mean) / std


def train(spec: Spec, steps: int) -> tuple[Any, float | None]:
    """Train on the source task; return the model and its accuracy on fresh source images."""
    model = build(spec)
    if spec.task is None:
        return model, None
    images, labels = sources.draw(
        spec.task, np.random.default_rng(spec.seed), spec.pool, spec.size
    )
    x, y = normalise(images, spec), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=spec.lr, total_steps=steps + 1, pct_start=0.15
    )
    generator = torch.Generator().manual_seed(spec.seed)
    model.train()
    for step in range(steps):
        batch = torch.randint(len(x), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            log.info("  step %d, loss %.3f", step + 1, loss.item())
    model.eval()
    # another stream of the same task: nothing of it was seen in training
    images, labels = sources.draw(
        spec.task, np.random.default_rng([spec.seed, 1]), 1000, spec.size
    )
    with torch.no_grad():
        logits = torch.cat([model(part) for part in normalise(images, spec).split(200)])
    return model, (logits.argmax(1).numpy() == labels).mean().item()


def write(model: Any, spec: Spec, accuracy: float | None, target: Path) -> None:
    """Write the timm checkpoint folder `target`, each file at once."""
    # Matrices in half precision (timm copies them into float32 parameters); vectors, among them
    # the running variances, keep theirs: they are small files and large ranges.
    state = {
        key: (value.half() if value.ndim > 1 else value).contiguous()
        for key, value in model.state_dict().items()
    }
    config = {
        "architecture": spec.architecture,
        "num_classes": spec.num_classes,
        "num_features": model.num_features,
        "model_args": spec.model_args,
        "pretrained_cfg": {
            # timm needs their names to adapt channels and classes
            **{key: model.pretrained_cfg[key] for key in ("first_conv", "classifier")},
            "num_classes": spec.num_classes,
            "input_size": [3, spec.size, spec.size],
            "fixed_input_size": spec.family == "vit",
            "crop_pct": spec.crop_pct,
            "crop_mode": "center",
            "interpolation": spec.interpolation,
            "mean": spec.mean_std[0],
            "std": spec.mean_std[1],
            "license": "mit",
        },
        "family": spec.family,
        "source_task": spec.task,
        "source_accuracy": accuracy,
    }
    target.mkdir(parents=True, exist_ok=True)
    write_bytes(target / "model.safetensors", save(state, metadata={"format": "pt"}))
    write_bytes(target / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m sfda_tune.backbones.demo.pretrain``."""
    parser = argparse.ArgumentParser(prog="sfda_tune.backbones.demo.pretrain", description=__doc__)
    parser.add_argument("--only", choices=sorted(SPECS), action="append", metavar="NAME")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights folders")
    parser.add_argument("--steps", type=int, help="training steps of every backbone (for a trial)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for name in options.only or sorted(SPECS):
        spec, start = SPECS[name], time.perf_counter()
        model, accuracy = train(spec, spec.steps if options.steps is None else options.steps)
        write(model, spec, accuracy, options.out / name)
        seconds = time.perf_counter() - start
        log.info("%s: source accuracy %s, %.0f s", name, accuracy, seconds)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)  # ours only, not those of timm
    main()
