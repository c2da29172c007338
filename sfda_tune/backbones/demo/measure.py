"""Measure the truth of the demo: ``python -m sfda_tune.backbones.demo.measure``.

Fine-tunes every ``demo:*`` backbone, all weights, on scikit-learn's `digits` and writes the test
accuracies to `accuracies.json`. That file is the ground truth that rankings of the demo backbones
are compared with. Training uses only 200 images: `digits` is so easy that with 500 most
randomly initialised convolutional networks already pass .95, and there would be little to rank.

A backbone whose weights and recipe did not change since the last run is skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import sklearn
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from sfda_tune.backbones import demo
from sfda_tune.values.files import write_bytes

log = logging.getLogger("sfda_tune.backbones.demo.measure")

RECIPE: dict[str, Any] = {
    "data": "sklearn digits, 200 training images (stratified), the other 1597 for testing",
    "split_seed": 0,
    "n_train": 200,
    "n_validation": 60,
    "selection": "learning rate with the lower validation loss, mean of 2 seeds, "
    "then retrained on all 200",
    "trained": "all weights, new linear head",
    "optimizer": "SGD, momentum 0.9, Nesterov, weight decay 1e-4, cosine to 0, clip 1.0",
    "learning_rates": [0.03, 0.1],
    "epochs": 12,
    "batch_size": 32,
    "augmentation": "none",
    "seeds": [0, 1, 2],
}


def digits_split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images (n, 8, 8) uint8, labels, training indices and test indices of `digits`."""
    data = cast(Any, load_digits())
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    train, test = _split(np.arange(len(images)), labels, RECIPE["n_train"])
    return images, labels, train, test


def _split(indices: np.ndarray, labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = train_test_split(
        indices, train_size=size, stratify=labels[indices], random_state=RECIPE["split_seed"]
    )
    return np.asarray(first), np.asarray(second)


def open_model(folder: Path, num_classes: int) -> nn.Module:
    """Open a demo backbone with plain timm."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=num_classes)


def prepare(images: np.ndarray, folder: Path) -> torch.Tensor:
    """Apply the backbone's own evaluation transform to grey uint8 images."""
    config = resolve_model_data_config(open_model(folder, 0))
    transform: Any = create_transform(**config, is_training=False)
    return torch.stack([transform(Image.fromarray(image).convert("RGB")) for image in images])


def finetune(
    folder: Path, x: torch.Tensor, y: torch.Tensor, learning_rate: float, seed: int
) -> nn.Module:
    """Train all weights on (x, y) and return the model in evaluation mode."""
    torch.manual_seed(seed)  # the new head and the order of the batches
    model = open_model(folder, 0)
    cast(Any, model).reset_classifier(10)  # a new head, also where the source had 10 classes
    model.train()
    size, epochs = RECIPE["batch_size"], RECIPE["epochs"]
    per_epoch = len(x) // size
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * per_epoch)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: per_epoch * size].split(size):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return accuracy and mean log loss."""
    logits = torch.cat([model(part) for part in x.split(256)])
    loss = nn.functional.cross_entropy(logits, y)
    return (logits.argmax(1) == y).double().mean().item(), loss.item()


def measure(name: str) -> dict[str, Any]:
    """Return the entry of `accuracies.json` for one backbone."""
    folder, start = demo.folder(name), time.perf_counter()
    images, labels, train, test = digits_split()
    x, y = prepare(images, folder), torch.from_numpy(labels)
    fit, validation = _split(train, labels, len(train) - RECIPE["n_validation"])
    losses = {}
    for lr in RECIPE["learning_rates"]:
        runs = [finetune(folder, x[fit], y[fit], lr, seed) for seed in (10, 11)]
        losses[lr] = np.mean([evaluate(run, x[validation], y[validation])[1] for run in runs])
    best = min(losses, key=lambda lr: losses[lr])
    values = [
        round(evaluate(finetune(folder, x[train], y[train], best, seed), x[test], y[test])[0], 5)
        for seed in RECIPE["seeds"]
    ]
    config = json.loads((folder / "config.json").read_text())
    model = open_model(folder, 0).eval()
    with torch.no_grad():
        width = model(x[:2]).shape[1]
    return {
        "mean": round(float(np.mean(values)), 5),
        "std": round(float(np.std(values, ddof=1)), 5),
        "values": values,
        "learning_rate": best,
        "architecture": config["architecture"],
        "source_task": config["source_task"],
        "width": width,
        "params": sum(p.numel() for p in model.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "key": _key(folder),
    }


def _key(folder: Path) -> str:
    """Hash of all that decides an entry: weights, config, recipe."""
    digest = hashlib.sha256(json.dumps(RECIPE, sort_keys=True).encode())
    for file in ("config.json", "model.safetensors"):
        digest.update((folder / file).read_bytes())
    return digest.hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``python -m sfda_tune.backbones.demo.measure``."""
    parser = argparse.ArgumentParser(prog="sfda_tune.backbones.demo.measure", description=__doc__)
    parser.add_argument("--only", choices=demo.names(), action="append", metavar="NAME")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    known = demo.truth()["backbones"] if demo.ACCURACIES.exists() else {}
    for name in options.only or demo.names():
        if known.get(name, {}).get("key") != _key(demo.folder(name)):
            known[name] = measure(name)
            content = {
                "recipe": RECIPE,
                "versions": {
                    "torch": torch.__version__.split("+")[0],
                    "timm": timm.__version__,
                    "scikit-learn": sklearn.__version__,
                },
                "backbones": {key: known[key] for key in sorted(known) if key in demo.names()},
            }
            write_bytes(demo.ACCURACIES, (json.dumps(content, indent=2) + "\n").encode())
        entry = known[name]
        log.info("%-24s %.4f ± %.4f  %s", name, entry["mean"], entry["std"], entry["values"])


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)  # ours only, not those of timm
    main()
