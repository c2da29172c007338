"""The truth on real input: fine-tune the zoo's backbones on its data sets.

    python tests/benchmarks/real_zoo.py [--device cuda] [--jobs 6] [--minutes 60] [--out FILE]
                                        [--seed 1]
    python tests/benchmarks/real_zoo.py --merge FILE [FILE ...]
    python tests/benchmarks/real_zoo.py --report [--cache DIR] [--truth FILE [FILE ...]]

It fills ``real_zoo.json`` beside this file (or the pairs it lacks into another FILE, which
``--merge`` adds to it), one data set after the other, the most complete first, its cheap backbones
first; it can be stopped at any time and goes on where it was. Recipe, the same for all: 500
images (stratified, seed 0), 100 of them held out (stratified again), `FinetuneConfig` as it is
with five epochs; the accuracy is that of the last epoch on the data set's whole validation part.
Learning rate 0 leaves the network as it is: the linear probe, epoch 0. "Frozen or fine-tuned"
takes of the two what is better on the 100. "score" is SFDA (loo) of the 500 images.

``real_zoo_seed1.json`` and ``…2.json`` are the same by other seeds, of the images, the split and
the training: how far would another have found the same truth? (wbc has fewer than 500 images, so
there of the split and the training.)

``real_zoo_sgd.json`` is the truth by the recipe before (``--truth FILE`` reports on it): a random
head, SGD, six epochs, the learning rate of .003, .01 and .05 chosen on the 100. Six epochs of that
cost some networks more than they gain.

``--report`` scores the frozen features of the 500 images of seed 0 with every metric and prints,
for each, the mean over the data sets of weighted τ, of regret@1 (accuracy lost by taking its
first) and of hit@3 (whether the truly best is among its first three); the truth is the mean
accuracy of the three seeds. ``imagenet`` is the published accuracy, the median of them where there
is none; ``random`` is the mean of 1,000 orders. Below stands by how much those above the default
score are better (± standard error over the data sets), and by how much without the one network
that matters most to it: a gain that one network makes is not one to build on.
"""

import argparse
import csv
import functools
import itertools
import json
import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from sfda_tune import extract, open_dataset, resolve_backbones
from sfda_tune.backbones.loading import describe
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import FeatureStore
from sfda_tune.finetuning.models import Model, predict
from sfda_tune.finetuning.run import FinetuneConfig, SharedWork, finetune
from sfda_tune.metrics import describe_metrics, get_metric
from sfda_tune.metrics.combine import combine, combine_hub
from sfda_tune.metrics.sfda import VARIANTS, sfda
from sfda_tune.selection.evaluation import hit_at_k, regret_at_k, weighted_tau
from sfda_tune.values.files import write_text

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
RESULTS = Path(__file__).with_name("real_zoo.json")
DATASETS = (
    "trashnet", "clothing", "signdigits", "omniglot8", "rsscn7", "neusteel", "grocery", "magtile",
    "wbc",
)  # fmt: skip
SEEDS = (0, 1, 2)
RECIPE = {
    "images": 500, "chosen_on": 100, "learning_rates": [0, FinetuneConfig().lr], "epochs": 5,
    "by": "sfda_tune.finetuning",
}  # fmt: skip

SETTINGS = {"lr": [1e-4, 1e-3, 1e-2], "batch_norm": ["frozen", "train"]}
SETTINGS_FILE = Path(__file__).with_name("real_zoo_settings.json")
N_SETTINGS = 8  # backbones, the cheapest

logger = logging.getLogger("real_zoo")


def seed_file(seed: int) -> Path:
    """Return the file of a seed."""
    return RESULTS.with_name(f"real_zoo_seed{seed}.json") if seed else RESULTS


def read_results(file: Path = RESULTS, recipe: dict = RECIPE) -> dict:
    """Return ``{"recipe": …, "accuracies": {dataset: {backbone: {…}}}}``."""
    if file.is_file():
        results = json.loads(file.read_text())
        if results["recipe"] == recipe:
            return results
        sys.exit(f"{file} was made with another recipe; move it away first")
    return {"recipe": recipe, "accuracies": {}}


def is_complete(entry: dict) -> bool:
    """Whether every learning rate was tried."""
    return {run["lr"] for run in entry["runs"]} >= set(RECIPE["learning_rates"])


def seeded(seed: int) -> dict:
    """Return the recipe with a seed."""
    return RECIPE | ({"seed": seed} if seed else {})


def merge(files: list[Path], seed: int) -> None:
    """Add the pairs of other files to that of the seed; what is complete there stays."""
    mine_file, recipe = seed_file(seed), seeded(seed)
    results, new = read_results(mine_file, recipe), 0
    for file in files:
        if not file.is_file():
            sys.exit(f"{file} is no file; pass one that --out has written")
        for name, found in read_results(file, recipe)["accuracies"].items():
            mine = results["accuracies"].setdefault(name, {})
            for backbone, entry in found.items():
                if not is_complete(mine.get(backbone, {"runs": []})):
                    new += is_complete(entry)
                    mine[backbone] = entry
    write_text(mine_file, json.dumps(results, indent=1) + "\n")
    print(f"{new} complete pairs are new in {mine_file}")


class Tuning:
    """Fine-tune one backbone on one data set; what settings have in common is done once."""

    def __init__(self, backbone, name: str, device: str, seed: int = 0) -> None:
        self.backbone, self.device, self.shared = backbone, device, SharedWork()
        self.images = open_dataset(ZOO / "datasets" / name).sample(RECIPE["images"], seed=seed)
        self.test = open_dataset(ZOO / "datasets" / name, split="val")
        rows, held_out = train_test_split(
            np.arange(len(self.images)),
            test_size=RECIPE["chosen_on"],
            stratify=self.images.labels,
            random_state=seed,
        )
        self.train, self.val = self.images.subset(rows), self.images.subset(held_out)

    def __call__(self, config: FinetuneConfig) -> dict[str, float]:
        """Return the last accuracies, on the images held out and on the test images."""
        run = finetune(
            self.backbone, self.train, config, val=self.val, device=self.device, workers=0,
            shared=self.shared,
        )  # fmt: skip
        *_, last = run
        trained = {k: v.cpu() for k, v in run.module.state_dict().items()}
        run.module.load_state_dict(run._between(trained, last.interpolation))
        model = Model(run.module.eval(), run.preprocessing, run.task)
        guess = np.array(model.classes)[predict(model, self.test, device=self.device).argmax(1)]
        correct = float(np.mean(guess == np.array(self.test.classes)[self.test.labels]))
        return {"held_out": last.accuracy, "accuracy": correct}


def measure(backbone, name: str, device: str, runs: list[dict], seed: int = 0) -> dict:
    """Fine-tune one backbone on one data set with every learning rate that `runs` lacks."""
    started = time.perf_counter()
    tune = Tuning(backbone, name, device, seed)
    for lr in sorted(set(RECIPE["learning_rates"]) - {run["lr"] for run in runs}):
        length = {"epochs": RECIPE["epochs"], "lr": lr} if lr else {"epochs": 0}
        config = FinetuneConfig(**length, seed=seed)
        runs = [*runs, {"lr": lr, **tune(config)}]
    (found,) = extract(tune.images, [backbone], Settings(device=device, workers=0))
    runs = sorted(runs, key=lambda run: run["lr"])
    best = max(runs, key=lambda run: run["held_out"])
    return {
        "accuracy": best["accuracy"],
        "runs": runs,
        "score": float(sfda(found.features.x, found.features.y, variant="loo")),
        "seconds": time.perf_counter() - started,
        "device": device,
    }


def fill_settings(device: str, names: Sequence[str], out: Path) -> None:
    """Fine-tune the cheap backbones with every setting: ``{data set: {backbone: runs}}``.

    For `study_replay.py`: the accuracy on the test images, and the seconds, of each setting in the
    order of the product. A file that exists is gone on with.
    """
    found = json.loads(out.read_text()) if out.is_file() else {}
    plugins = [str(ZOO / "zoo_models.py")]
    backbones = sorted(resolve_backbones(str(ZOO / "models"), plugins=plugins), key=_cost)
    for name in names:
        cells = found.setdefault(name, {})
        for backbone in backbones[:N_SETTINGS]:
            if backbone.name in cells:
                continue
            tune, runs = Tuning(backbone, name, device), []
            for values in itertools.product(*SETTINGS.values()):
                started = time.process_time()
                config = FinetuneConfig(
                    epochs=RECIPE["epochs"], **dict(zip(SETTINGS, values, strict=True))
                )
                runs.append([tune(config)["accuracy"], time.process_time() - started])
            cells[backbone.name] = runs
            write_text(out, json.dumps(found) + "\n")
            logger.info("%s × %s: %s", name, backbone.name, runs)


def _cost(backbone) -> int:
    """Return about what a backbone costs: the cheap ones come first, on every data set."""
    about = describe(backbone)
    _, height, width = about.preprocessing.geometry.input_size
    return height * width * about.n_params


def fill(device: str, minutes: float, jobs: int, out: Path, seed: int) -> None:
    """Measure every pair that neither the file of the seed nor `out` has.

    Of another seed than 0 those are measured that ``real_zoo.json`` has.
    """
    recipe = seeded(seed)
    results, known = read_results(out, recipe), read_results(seed_file(seed), recipe)["accuracies"]
    first = read_results()["accuracies"]
    deadline = time.monotonic() + 60 * minutes
    plugins = [str(ZOO / "zoo_models.py")]
    backbones = sorted(resolve_backbones(str(ZOO / "models"), plugins=plugins), key=_cost)
    todo = []
    for name in DATASETS:
        for backbone in backbones:
            entries = (a.get(name, {}).get(backbone.name) for a in (results["accuracies"], known))
            entry = next(filter(None, entries), {"runs": []})
            if not is_complete(entry) and (not seed or backbone.name in first.get(name, {})):
                todo.append((name, backbone, entry["runs"]))
    left = {name: sum(n == name for n, *_ in todo) for name in DATASETS}
    todo.sort(key=lambda pair: (left[pair[0]], DATASETS.index(pair[0]), _cost(pair[1])))
    logger.info("%d pairs to measure", len(todo))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        running: dict = {}
        while todo or running:
            while todo and len(running) < jobs and time.monotonic() < deadline:
                name, backbone, runs = todo.pop(0)
                running[pool.submit(measure, backbone, name, device, runs, seed)] = name, backbone
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name, backbone = running.pop(done)
                entry = results["accuracies"].setdefault(name, {})[backbone.name] = done.result()
                write_text(out, json.dumps(results, indent=1) + "\n")
                logger.info(
                    "%s × %s: %.3f in %.0f s", name, backbone.name, entry["accuracy"],
                    entry["seconds"],
                )  # fmt: skip


def read_imagenet() -> dict[str, float]:
    """Return the published accuracies of the networks that were pretrained on ImageNet."""
    with (ZOO / "models.csv").open(newline="") as lines:
        return {
            row["name"]: float(row["top1_published"].split()[0].rstrip("*"))
            for row in csv.DictReader(lines)
            if row["pretrained_on"].startswith("ImageNet-1k")
        }


BLENDS = (
    ("sfda loo", "imagenet"), ("sfda loo", "params"), ("sfda loo", "knn"),
    ("sfda loo", "linear_probe"), ("sfda loo", "knn", "linear_probe"),
)  # fmt: skip


def columns(cache: str | None, truths: dict) -> dict[str, dict[str, dict[str, float]]]:
    """Return {metric: {data set: {backbone: score}}} on the images of the recipe."""
    known = read_imagenet()
    usable = [i.name for i in describe_metrics() if "features" in i.needs and i.name != "sfda"]
    sfdas = {
        f"sfda {variant}": functools.partial(sfda, variant=variant) for variant in VARIANTS
    } | {
        "sfda loo, λ by loo": functools.partial(sfda, variant="loo", shrinkage="loo"),
        "sfda loo, raw": functools.partial(sfda, variant="loo", normalize="none"),
        "sfda loo, l2": functools.partial(sfda, variant="loo", normalize="l2"),
        "sfda loo, challenge": functools.partial(sfda, variant="loo", challenge=True),
    }
    functions = sfdas | {name: get_metric(name) for name in usable}
    table: dict = {name: {} for name in [*functions, "imagenet", "params", "width"]}
    store = FeatureStore(cache or tempfile.mkdtemp())
    backbones = resolve_backbones(str(ZOO / "models"), plugins=[str(ZOO / "zoo_models.py")])
    for name, truth in truths.items():
        images = open_dataset(ZOO / "datasets" / name).sample(RECIPE["images"], seed=0)
        measured = [b for b in backbones if b.name in truth]
        found = list(extract(images, measured, Settings(device="cpu"), store=store))
        for metric, function in functions.items():
            results = {
                e.backbone.name: function(e.features.x, e.features.y)
                for e in found
            }  # fmt: skip
            if any("hub_parts" in getattr(r, "details", ()) for r in results.values()):
                table[metric][name] = combine_hub(results)
            else:
                table[metric][name] = {b: float(r) for b, r in results.items()}
        median = float(np.median([known[b.name] for b in measured if b.name in known]))
        table["imagenet"][name] = {b.name: known.get(b.name, median) for b in measured}
        table["params"][name] = {e.backbone.name: float(e.n_params) for e in found}
        table["width"][name] = {e.backbone.name: float(e.features.n_dims) for e in found}
        for some in BLENDS:
            both = combine(*(table[metric][name] for metric in some))
            table.setdefault(" + ".join(some), {})[name] = both
    return table


def _figures(scores: dict[str, float], truth: dict[str, float]) -> tuple[float, float, float]:
    return (
        weighted_tau(scores, truth),
        regret_at_k(scores, truth, 1),
        hit_at_k(scores, truth, 3, of="best"),
    )


def report(cache: str | None, files: list[Path]) -> None:
    """Print how good every metric was, by the mean accuracies of the files."""
    results = [json.loads(file.read_text()) for file in files]
    rates = results[0]["recipe"]["learning_rates"]
    scored = columns(cache, read_truths(results[0], rates))
    for what, some in (
        ("the best of all, frozen or fine-tuned", rates),
        ("fine-tuned, all weights", rates[1:]),
        ("frozen, a linear head", [0]),
    ):
        print(f"\n### Truth: {what}\n")
        truths = average([read_truths(found, some) for found in results])
        print_table(scored, truths)
        print_gains(scored, truths)


def average(truths: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean accuracies, of the backbones that all have."""
    return {
        name: {
            backbone: float(np.mean([truth[name][backbone] for truth in truths]))
            for backbone in known
            if all(backbone in truth[name] for truth in truths)
        }
        for name, known in truths[0].items()
    }


def read_truths(results: dict, rates: Sequence[float]) -> dict[str, dict[str, float]]:
    """Return {data set: {backbone: accuracy}}, the learning rate chosen among `rates`."""
    truths = {}
    for name, found in results["accuracies"].items():
        complete = {
            backbone: [run for run in entry["runs"] if run["lr"] in rates]
            for backbone, entry in found.items()
            if len(entry["runs"]) == len(results["recipe"]["learning_rates"])
        }
        if len(complete) >= 8:
            truths[name] = {
                backbone: max(runs, key=lambda run: run["held_out"])["accuracy"]
                for backbone, runs in complete.items()
            }
    return truths


def print_table(scored, truths) -> None:
    """Print a row for each metric, best first."""
    rows = []
    for metric, scores in scored.items():
        figures = [_figures(scores[d], truth) for d, truth in truths.items()]
        rows.append((metric, *np.mean(figures, axis=0), *(tau for tau, *_ in figures)))
    rng = np.random.default_rng(0)
    orders = [
        [_figures(dict(zip(t, rng.permutation(len(t)), strict=True)), t) for t in truths.values()]
        for _ in range(1000)
    ]
    rows.append(("random", *np.mean(orders, axis=(0, 1)), *np.mean(orders, axis=0)[:, 0]))
    sizes = ", ".join(f"{d} ({len(t)})" for d, t in truths.items())
    print(f"Backbones fine-tuned: {sizes}\n")
    print("| metric | τ_w | regret@1 | hit@3 | " + " | ".join(truths) + " |")
    print("|---|" + "---|" * (3 + len(truths)))
    for metric, *figures in sorted(rows, key=lambda row: -row[1]):
        print(f"| {metric} | " + " | ".join(f"{x:.3f}" for x in figures) + " |")


def print_gains(scored, truths, default: str = "sfda loo") -> None:
    """Print what the better metrics gain on the default one, with and without single networks."""

    def gain(metric: str, left_out: str | None = None) -> np.ndarray:
        rows = []
        for name, truth in truths.items():
            some = {n: accuracy for n, accuracy in truth.items() if n != left_out}
            scores = {n: scored[metric][name][n] for n in some}
            if " + " in metric:  # the ranks are those among fewer
                parts = [scored[part][name] for part in metric.split(" + ")]
                scores = combine(*({n: part[n] for n in some} for part in parts))
            of_default = {n: scored[default][name][n] for n in some}
            rows.append(np.subtract(_figures(scores, some), _figures(of_default, some))[:2])
        return np.array(rows)

    names = sorted({n for truth in truths.values() for n in truth})
    print(f"\n| against `{default}` | τ_w | regret@1 | both without one network | which |")
    print("|---|---|---|---|---|")
    for metric in scored:
        rows = gain(metric)
        mean, error = rows.mean(axis=0), rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
        if mean[0] > 0:
            tau, regret, name = min(
                ((*gain(metric, n).mean(axis=0), n) for n in names), key=lambda found: found[0]
            )
            told = [f"{m:+.{d}f} ± {e:.{d}f}" for m, e, d in zip(mean, error, (3, 4), strict=True)]
            print(f"| {metric} | {' | '.join(told)} | {tau:+.3f}, {regret:+.4f} | {name} |")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--jobs", type=int, default=1, help="pairs at a time, a process each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="by default that of the seed")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--settings", nargs="+", metavar="DATASET", help="see fill_settings")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--truth", type=Path, nargs="+", help="what to report on: all seeds")
    parser.add_argument("--cache", help="where the features for the report are kept")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    if options.report:
        report(options.cache, options.truth or [seed_file(seed) for seed in SEEDS])
    elif options.merge:
        merge(options.merge, options.seed)
    elif options.settings:
        fill_settings(options.device, options.settings, options.out or SETTINGS_FILE)
    else:
        out = options.out or seed_file(options.seed)
        fill(options.device, options.minutes, options.jobs, out, options.seed)


if __name__ == "__main__":
    main()
