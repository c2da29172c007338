"""Fine-tune demo backbones on digits: the objective of the examples 10 to 14.

By itself it ranks the backbones, tries each with several learning rates and writes what it reached
after 2, 4 and 8 epochs: a table for `BackboneSelectionProblem`.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sfda_tune
from sfda_tune import ImageDataset
from sfda_tune.backbones import loading
from sfda_tune.backbones.preprocessing import Preprocessing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)  # tiny networks gain nothing from more, and other workers need them


def open_split() -> tuple[ImageDataset, ImageDataset]:
    """Return 200 images to rank and train with, and 300 others to validate with."""
    data = sfda_tune.open_dataset("digits")
    train = data.sample_rows(200)
    return data.subset(train), data.subset(np.setdiff1d(data.sample_rows(500), train))


def open_backbone(name: str) -> tuple[nn.Module, Preprocessing]:
    """Open any backbone that can be ranked: a timm network without classifier."""
    (backbone,) = sfda_tune.resolve_backbones(name)
    return loading.load(backbone)


@lru_cache
def prepare(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return inputs and labels of both parts, as the backbone wants them."""
    preprocessing, parts = open_backbone(name)[1], []
    transform = preprocessing.build()
    for data in open_split():
        x = torch.stack([transform(data.load(row)) for row in range(len(data))]).to(DEVICE)
        parts.append((preprocessing.normalize(x), torch.tensor(data.labels, device=DEVICE)))
    return parts


def finetune(
    name: str, optimizer: Callable[[Any], torch.optim.Optimizer], epochs: int, seed: int = 0
) -> Iterator[float]:
    """Train all weights; yield the validation accuracy after each epoch."""
    (x, y), (x_new, y_new) = prepare(name)
    backbone = open_backbone(name)[0].requires_grad_(True).to(DEVICE)
    torch.manual_seed(seed)
    model = nn.Sequential(backbone, nn.Linear(backbone(x[:1]).shape[1], 10, device=DEVICE))
    updates = optimizer(model.parameters())
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(x), device=DEVICE).split(32):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            updates.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            updates.step()
        with torch.no_grad():
            yield (model.eval()(x_new).argmax(1) == y_new).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("digits.csv"))
    parser.add_argument("--smoke", action="store_true", help="three backbones, two epochs")
    options = parser.parse_args()
    names, rates, n_epochs = "demo:*", (0.003, 0.01, 0.03, 0.1, 0.3), 8
    if options.smoke:
        names, rates, n_epochs = "demo:*glyphs", (0.03,), 2

    ranking = sfda_tune.rank(open_split()[0], names, progress=True)
    print(ranking)
    with options.out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["backbone", "lr", "epochs", "accuracy", "seconds"])
        for name, lr in product(sorted(ranking), rates):
            optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
            start = time.process_time()  # of this process alone, however busy the machine is
            for epoch, accuracy in enumerate(finetune(name, optimizer, n_epochs), start=1):
                if epoch in (2, 4, 8):
                    seconds = time.process_time() - start
                    table.writerow([name, lr, epoch, f"{accuracy:.4f}", f"{seconds:.2f}"])


if __name__ == "__main__":
    main()
