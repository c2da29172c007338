"""What a fine-tuning without any tuning should do: `lr` and `batch_norm` of `FinetuneConfig`.

    python tests/benchmarks/finetuning_defaults.py

Real networks of the zoo, 400 training images, accuracy on 300 others. As last seen, on the first
five pairs (the logistic regression before any epoch has .781 there):

============================  =====  =====  =====  =====  =====  =====  =====  =====
learning rate                 1e-4   3e-4   5e-4   1e-3   3e-3   3e-4   1e-3   3e-3
layer decay                   none   none   none   none   none   .75    .75    .75
============================  =====  =====  =====  =====  =====  =====  =====  =====
accuracy, best of 6 epochs    .801   .826   .834   .813   .796   .807   .816   .819
accuracy, last epoch          .785   .823   .832   .806   .774   .788   .813   .815
============================  =====  =====  =====  =====  =====  =====  =====  =====

These normalised by the batch (``--batch-norm train``). In so few steps that can be far from what
the head was started with: at 5e-4 the last epoch of mobilenetv1_050 has .780, .723, .563 on the
three data sets, below the .800, .710, .883 of its start, and .827, .753, .957 with frozen
statistics; tf_mobilenetv3_small_100 .813, .783, .987 and .783, .787, .980. Eight epochs of five
demo networks on 200 and 600 digits: .703, .824, .928 at 3e-4, 1e-3, 3e-3, frozen .895, .921, .938.
Hence the defaults, 5e-4 and frozen statistics.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import sfda_tune
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.run import finetune
from sfda_tune.finetuning.shared import SharedWork

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
NETWORKS = "tf_mobilenetv3_small_100", "regnetx_002", "mobilenetv1_050"
SETTINGS = [(lr, None) for lr in (1e-4, 3e-4, 5e-4, 1e-3, 3e-3)]
SETTINGS += [(lr, 0.75) for lr in (3e-4, 1e-3, 3e-3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", default=["trashnet", "clothing", "signdigits"])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="how their names begin")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-norm", choices=("frozen", "train"), default="frozen")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plugin = str(ZOO / "zoo_models.py")
    known = sfda_tune.resolve_backbones(str(ZOO / "models"), plugins=(plugin,))
    found = []
    for start in options.networks:
        (backbone,) = [b for b in known if b.name.startswith(start)]
        for name in options.datasets:
            folder, shared = ZOO / "datasets" / name, SharedWork()
            data = sfda_tune.open_dataset(folder / "train").sample(400)
            val = sfda_tune.open_dataset(folder / "val").sample(300)
            found.append([])
            for lr, decay in SETTINGS:
                norm = options.batch_norm
                config = FinetuneConfig(
                    epochs=options.epochs, lr=lr, layer_decay=decay, batch_norm=norm
                )
                run = finetune(backbone, data, config, val=val, device="cpu", shared=shared)
                accuracies = [epoch.accuracy for epoch in run]
                found[-1].append((max(accuracies), accuracies[-1]))
                values = [round(value, 3) for value in accuracies]
                row = {"dataset": name, "backbone": backbone.name, "lr": lr, "decay": decay}
                print(json.dumps(row | {"accuracies": values}), flush=True)
    for (lr, decay), (best, last) in zip(SETTINGS, np.mean(found, axis=0), strict=True):
        print(f"lr {lr:g}, layer decay {decay}: best epoch {best:.3f}, last {last:.3f}")


if __name__ == "__main__":
    main()
