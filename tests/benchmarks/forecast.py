"""The forecast of fine-tuned accuracy: fit its coefficients, and see how far it can be trusted.

    python tests/benchmarks/forecast.py             # leave one benchmark out: order and odds
    python tests/benchmarks/forecast.py --fit       # write sfda_tune/selection/forecast.json
    python tests/benchmarks/forecast.py --table     # write imagenet.csv and renamed.json

Benchmarks, with the evidence that stands for a score of the user's images:

=========  ========================================================================  ==============
threedpc   317 timm networks, depth and perspective (3D-PC)                          linear probe
fastai     75 and 80 timm networks, Pets and Planet                                  none
group1     11 CNNs × 11 data sets (SFDA)                                             linear probe
group3     10 transformers × 11 data sets                                            none
tmlr       10 networks × 11 data sets (2405.20420)                                   none
medmnist   9 networks × 11 medical data sets (2412.20172), AUC                       none
zoo        ``real_zoo*.json``: small networks of several pretrainings, fine-tuned    SFDA (loo)
           by this package, the mean of three seeds; a task for each seed's images
=========  ========================================================================  ==============

SFDA and other scores are published for tmlr and medmnist, but in the form that saturates at 1. A
benchmark weighs the same however many data sets it has. Accuracy and size count alike (w_E : w_G :
w_A = 2 : 1 : 1; three free weights move a lot as benchmarks are left out, and the order gains
nothing). So there are three coefficients: the length of w, γ and σ, fitted to the benchmarks with
evidence (non-negative least squares); and two without, to all. Those of a head on frozen features
are fitted to the zoo alone, where a score of few images and the probe on others are known.

In the report coefficients come from the *other* benchmarks. Benchmarks of more than 60 networks
give 12 random hubs of 15 for the odds. "Hit" is how often the first by P(best) is the best one,
"P" its P(best); "in .95" how often the list holds the best one, "of" its part of the networks.

Two data sets of the zoo came last and decided nothing (`HELD_OUT`; the report has them). With the
coefficients that ship, weighted tau and regret of the first (of the best of three) among 20
networks: on wbc .33 and .031 (.031), SFDA .42 and .008 (.008); on magtile .33 and .053 (.053),
SFDA .42 and .044 (.044). Of the weight of the images the mean of three seeds says what the first
alone did (.294 and .285).

Tried, and not worth it: other ImageNets in place of the first (in weighted tau on a table -real
and -v2 are from .05 worse to .03 better, -a from .14 worse to .02 better, -r and -sketch worse); a
larger correlation of facts that are not known with the images (on the zoo the order gains .01, and
lists hold the best less often); a weight of the images that falls with their number (the zoo, with
500 images, has .75 alone, group1 .37, 3D-PC .02; but within group1 it is largest for the data sets
with the most images a class); ranks of ``sfda``, ``knn`` and ``linear_probe`` averaged as evidence
(on the zoo a weighted tau higher by .05, where a head is trained by .08, each with a standard
error of .04 to .05; without one of the 26 networks nothing is left of the first, less than half of
the second: ``real_zoo.py --report``; the probe takes 13 to 41 times as long as the score).
"""

import argparse
import csv
import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import real_zoo
import timm
from scipy.optimize import nnls
from scipy.stats import rankdata

from sfda_tune import resolve_backbones
from sfda_tune.backbones.loading import measure_cost
from sfda_tune.metrics.priors import Facts, look_up_facts
from sfda_tune.selection.evaluation import regret_at_k, weighted_tau
from sfda_tune.selection.forecast import (
    COLUMNS,
    forecast,
    normal_scores,
    scale_facts,
    table_facts,
)
from sfda_tune.values.files import write_text

HERE = Path(__file__).resolve()
DATA = HERE.parents[3] / "shared" / "data"
PACKAGE = HERE.parents[2] / "sfda_tune"
SCALES = {"error": 0.08, "gmacs": 0.3, "macts": 0.3}  # half a percent of 80, a third of the size
PRIOR = np.array([1.0, 0.5, 0.5])
CORRELATIONS = {"error": 0.4, "gmacs": 0.2, "macts": 0.2}  # with the probe, in threedpc
TIMM = "huggingface/pytorch-image-models:results/ @aa4b5850 (Apache-2.0)"
SOURCES = {
    "threedpc": "serre-lab/VPT @5362795 (CC-BY-4.0)",
    "fastai": "tcapelle/fastai_timm @2ef632d",
    "group1": "TencentARC/SFDA @3b7edf7; alizkzm/te-guide",
    "group3": "alizkzm/te-guide",
    "tmlr": "VirtualSpaceman/tmlr-transferability-benchmark @a7808700",
    "medmnist": "DovileDo/transferability-in-medical-imaging @7e308c4 (MIT)",
    "zoo": "tests/benchmarks/real_zoo.json, real_zoo_seed1.json, real_zoo_seed2.json",
}

# ImageNet accuracy, GMACs, activations of networks that timm's table has under other names or not
# at all: torchvision's first weights, PVT v1, and those that were pretrained without labels.
OTHERS = {
    "resnet34": (73.314, 3.66, 3.74), "resnet50": (76.13, 4.11, 11.11),
    "resnet101": (77.374, 7.83, 16.23), "resnet152": (78.312, 11.56, 22.56),
    "densenet121": (74.434, 2.87, 6.9), "densenet161": (77.138, 7.79, 11.06),
    "densenet169": (75.6, 3.4, 7.3), "densenet201": (76.896, 4.34, 7.85),
    "mnasnet1_0": (73.456, 0.33, 5.46), "mnasnet": (73.456, 0.33, 5.46),
    "mobilenet_v2": (71.878, 0.31, 6.68), "mobilenet": (71.878, 0.31, 6.68),
    "googlenet": (69.778, 1.5, 4.9), "inception_v3": (77.294, 2.85, 5.1),
    "resnet18": (69.758, 1.82, 2.48), "resnet": (76.13, 4.11, 11.11),
    "densenet": (74.434, 2.87, 6.9), "vgg": (71.59, 15.5, 13.5), "shufflenet": (69.36, 0.15, 2.0),
    "pvt_t": (75.1, 1.9, 6.0), "pvt_s": (79.8, 3.8, 12.0), "pvt_m": (81.2, 6.7, 20.0),
    "mocov3_vits16": (math.nan, 4.6, 11.95), "dino_vits16": (math.nan, 4.6, 11.95),
}  # fmt: skip
NAMES = {
    "efficientnet": "efficientnet_b0.ra_in1k", "convnext": "convnext_tiny.fb_in1k",
    "efficientnet_b0": "efficientnet_b0.ra_in1k", "mobilenetv2_050": "mobilenetv2_050.lamb_in1k",
    "mobilenetv2_100": "mobilenetv2_100.ra_in1k",
    "vit_small_patch16_224": "vit_small_patch16_224.augreg_in1k",
    "vit_t_16": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_s_16": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b_16": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "pvtv2_b2": "pvt_v2_b2.in1k", "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    benchmark: str
    name: str
    names: list[str]
    facts: dict[str, Facts]
    truth: np.ndarray
    evidence: np.ndarray | None = None
    frozen: np.ndarray | None = None  # accuracy of a head on frozen features, if not the evidence

    def part(self, rows: np.ndarray) -> "Task":
        names = [self.names[k] for k in rows]
        evidence = None if self.evidence is None else self.evidence[rows]
        return Task(self.benchmark, self.name, names, self.facts, self.truth[rows], evidence)


def rows(file: str) -> list[dict[str, str]]:
    with (DATA / file).open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def facts_of(names: list[str]) -> dict[str, Facts]:
    found = look_up_facts([NAMES.get(name, name) for name in names])
    known = {n: Facts(*OTHERS[n]) if n in OTHERS else found[NAMES.get(n, n)] for n in names}
    return known


def open_tasks() -> list[Task]:
    tasks = []

    def add(benchmark: str, name: str, truth: dict[str, float], evidence: Any = None) -> None:
        names = [n for n in truth if math.isfinite(truth[n]) and (not evidence or n in evidence)]
        values = np.array([truth[n] for n in names])
        seen = np.array([evidence[n] for n in names]) if evidence else None
        tasks.append(Task(benchmark, name, names, facts_of(names), values, seen))

    tuned, probed = (rows(f"finetuned/threedpc_{k}.csv") for k in ("finetuned", "linear_probe"))
    for name in ("depth_accuracy", "perspective_accuracy"):
        truth, probe = ({r["model_name"]: float(r[name] or "nan") / 100 for r in t}
                        for t in (tuned, probed))  # fmt: skip
        add("threedpc", name, truth, probe)
    repeats: dict[str, dict[str, float]] = defaultdict(dict)
    for r in rows("finetuned/fastai_timm.csv"):
        if r["error_rate"]:
            of = repeats[r["dataset"]]
            of[r["model_name"]] = max(of.get(r["model_name"], 0.0), 1 - float(r["error_rate"]))
    for name, truth in repeats.items():
        known = facts_of(list(truth))
        add("fastai", name, {n: v for n, v in truth.items() if math.isfinite(known[n].gmacs)})
    cnn, head = (json.loads((DATA / "ground_truth" / f"sfda_group1_cnn{k}.json").read_text())
                 for k in ("", "_headonly"))  # fmt: skip
    for name, truth in cnn.items():
        add("group1", name, {n: v / 100 for n, v in truth.items()}, head[name])
    for name, truth in json.loads(
        (DATA / "ground_truth/sfda_group3_vit.json").read_text()
    ).items():
        add("group3", name, {n: v / 100 for n, v in truth.items()})
    tmlr = json.loads((DATA / "tmlr_bench/tmlr_scores.json").read_text())
    for name, found in tmlr["datasets"].items():
        scale = 100 if max(found["test"]) > 1.5 else 1
        pairs = zip(tmlr["models"], found["test"], strict=True)
        add("tmlr", name, {n: v / scale for n, v in pairs})
    table = rows("medmnist/AUCs_model.csv")
    for name in [c for c in table[0] if c not in ("", "source")]:
        add("medmnist", name, {r["source"]: float(r[name]) / 100 for r in table})
    return tasks + open_zoo()


def open_zoo() -> list[Task]:
    """Return a task for each seed's score, all with the mean accuracy of the seeds as truth."""
    top1, plugins = real_zoo.read_imagenet(), [str(real_zoo.ZOO / "zoo_models.py")]
    facts = {
        b.name: Facts(top1.get(b.name, math.nan), *measure_cost(b))
        for b in resolve_backbones(str(real_zoo.ZOO / "models"), plugins=plugins)
    }
    scores = [read_scores(seed) for seed in real_zoo.SEEDS]
    tuned, frozen = (
        real_zoo.average([read_seed(seed, is_tuned) for seed in real_zoo.SEEDS])
        for is_tuned in (True, False)
    )
    tasks = []
    for name, known in tuned.items():
        names = list(known)
        truth, probe = (np.array([of[name][n] for n in names]) for of in (tuned, frozen))
        for seed in scores:
            score = np.array([seed[name][n] for n in names])
            tasks.append(Task("zoo", name, names, facts, truth, score, probe))
    return tasks


def read_scores(seed: int) -> dict[str, dict[str, float]]:
    results = real_zoo.read_results(real_zoo.seed_file(seed), real_zoo.seeded(seed))
    return {
        name: {n: entry["score"] for n, entry in found.items()}
        for name, found in results["accuracies"].items()
    }


def read_seed(seed: int, is_tuned: bool = True) -> dict[str, dict[str, float]]:
    """Return the accuracies of all weights fine-tuned, or of a head on frozen features."""
    results = real_zoo.read_results(real_zoo.seed_file(seed), real_zoo.seeded(seed))
    rates = real_zoo.RECIPE["learning_rates"]
    return real_zoo.read_truths(results, rates[1:] if is_tuned else rates[:1])


# Fit ---------------------------------------------------------------------------------------------
def design(task: Task, with_evidence: bool) -> np.ndarray:
    """Return x' (n, 3), and z as a fourth column."""
    z = np.zeros(len(task.names))
    if with_evidence and task.evidence is not None:
        z = normal_scores(task.evidence)
    x = table_facts([task.facts[n] for n in task.names])
    fixed, _, _ = scale_facts(x, SCALES, CORRELATIONS if with_evidence else NOTHING, z)
    return np.vstack([fixed, z]).T


NOTHING = dict.fromkeys(CORRELATIONS, 0.0)


def solve(tasks: list[Task], with_evidence: bool) -> dict[str, float]:
    """Least squares, every benchmark with the same weight."""
    size = defaultdict(int)
    for task in tasks:
        size[task.benchmark] += 1
    X = [design(task, with_evidence) for task in tasks]
    weights = [
        np.full(len(x), 1 / len(x) / size[t.benchmark]) for x, t in zip(X, tasks, strict=True)
    ]
    A, weight = np.concatenate(X), np.sqrt(np.concatenate(weights))
    A = np.stack([A[:, :3] @ PRIOR, A[:, 3]], axis=1)
    y = np.concatenate([normal_scores(task.truth) for task in tasks])
    (length, images), _ = nnls(A * weight[:, None], y * weight)
    residual = np.sqrt(np.average((y - A @ [length, images]) ** 2, weights=weight**2))
    parts = dict(zip(COLUMNS, (length * PRIOR).tolist(), strict=True))
    return parts | {"images": float(images), "residual": float(residual)}


def fit(tasks: list[Task]) -> dict[str, dict[str, float]]:
    """Return the coefficients with and without evidence.

    What is left with evidence is that of all benchmarks without, times what evidence makes of it
    where there is some: two benchmarks alone would make σ too small for a third.
    """
    seen = [task for task in tasks if task.evidence is not None]
    full, rest = solve(seen, True), solve(tasks, False)
    full["residual"] *= rest["residual"] / solve(seen, False)["residual"]
    return {"full": full, "unseen": rest}


def fit_head(tasks: list[Task]) -> dict[str, float]:
    """Return the coefficients of a head on frozen features, fitted to data sets of the zoo.

    The least squares are of all networks, and the bad ones are easy: what is left of them makes
    odds too sure of the best. So σ is the least by which the .95 list holds the best in .95 of the
    data sets, each judged by the coefficients of the others.
    """
    names = dict.fromkeys(task.name for task in tasks)
    without = {name: solve([t for t in tasks if t.name != name], True) for name in names}
    of = solve(tasks, True)
    for times in np.arange(1, 4, 0.1):
        wider = {n: o | {"residual": times * o["residual"]} for n, o in without.items()}
        held = [judge(task, {"full": wider[task.name]}, [])[3] for task in tasks]
        if np.mean(held) >= 0.95:
            break
    return of | {"residual": of["residual"] * float(times)}


def to_head(tasks: list[Task]) -> list[Task]:
    """Return the tasks whose truth is a head on frozen features."""
    known = [task for task in tasks if task.frozen is not None]
    return [replace(task, truth=task.frozen) for task in known]


HELD_OUT = ("wbc", "magtile")  # of the zoo: their truth came last, and decides nothing


def coefficients(tasks: list[Task]) -> dict[str, Any]:
    """Return what ships."""
    tasks = [task for task in tasks if task.name not in HELD_OUT]
    names = sorted({task.benchmark for task in tasks})
    return {
        "by": "tests/benchmarks/forecast.py --fit",
        "fitted_to": {name: SOURCES[name] for name in names},
        "table": TIMM,
        "scales": SCALES,
        "correlations": CORRELATIONS,
        "full": rounded(fit(tasks)["full"]),
        "head": rounded(fit_head(to_head(tasks))),
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


# Report ------------------------------------------------------------------------------------------
SINGLE = {
    "ImageNet": lambda t: [t.facts[n].top1 for n in t.names],
    "GMACs": lambda t: [t.facts[n].gmacs for n in t.names],
    "activations": lambda t: [t.facts[n].macts for n in t.names],
    "images": lambda t: t.evidence,
}


def report(tasks: list[Task]) -> None:
    figures: dict[str, dict[str, list[tuple[float, ...]]]] = defaultdict(lambda: defaultdict(list))
    odds: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    bins: list[tuple[float, float]] = []
    rng = np.random.default_rng(0)
    for benchmark in dict.fromkeys(task.benchmark for task in tasks):
        others = [task for task in tasks if task.benchmark != benchmark]
        ours = fit(others)
        for task in [t for t in tasks if t.benchmark == benchmark]:
            truth = dict(zip(task.names, task.truth.tolist(), strict=True))
            columns = {name: call(task) for name, call in SINGLE.items()}
            columns["forecast"] = expect(task, ours)
            for name, values in columns.items():
                if values is not None:
                    v = np.array(values, np.float64)
                    v[~np.isfinite(v)] = np.nanmedian(v)
                    s = dict(zip(task.names, v.tolist(), strict=True))
                    figures[name][benchmark].append(figures_of(s, truth))
            n = len(task.names)
            hubs = [np.arange(n)]
            if n > 60:
                hubs = [rng.choice(n, 15, replace=False) for _ in range(12)]
            for hub in hubs:
                odds[benchmark].append(judge(task.part(hub), ours, bins))
    names = list(odds)
    print(f"{'':12}" + "".join(f"{name:>20}" for name in [*names, "mean"]))
    for name in ("forecast", *SINGLE):
        cells = [np.mean(figures[name][b], axis=0) if figures[name][b] else None for b in names]
        have = [c for c in cells if c is not None]
        cells.append(np.mean(have, axis=0) if len(have) == len(names) else None)
        shown = ("" if c is None else f"{c[0]:.2f} {c[1]:.4f} {c[2]:.4f}" for c in cells)
        print(f"{name:12}" + "".join(f"{text:>20}" for text in shown))
    print("\nWeighted tau, regret of the first, of the best of three")
    for k, what in ((1, "once"), (2, "twice")):
        found = compare_seeds(k, is_tuned=True)
        print("Zoo, who fine-tunes all {}: {:.2f} {:.4f} {:.4f}".format(what, *found))
    print()
    print("            90% ranks    hit      P  in .95     of")
    for name in [*names, "mean"]:
        all_ = [np.mean(odds[b], axis=0) for b in names]
        found = np.mean(all_, axis=0) if name == "mean" else np.mean(odds[name], axis=0)
        print(f"{name:12}   {found[0]:6.2f} " + " ".join(f"{v:6.2f}" for v in found[1:]))
    report_disagreement(tasks)
    report_head(to_head(tasks))
    print("\nP(best)      of   said   true")
    for low, high in ((0, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1.01)):
        some = np.array([pair for pair in bins if low <= pair[0] < high])
        said, true = some.mean(axis=0)
        print(f"{low:.2f}–{min(high, 1):.2f}  {len(some):5}   {said:.2f}   {true:.2f}")


def compare_seeds(k: int, *, is_tuned: bool) -> np.ndarray:
    """Return the figures of the mean accuracies of `k` seeds, if the others' mean is the truth."""
    seeds, rows_ = {seed: read_seed(seed, is_tuned) for seed in real_zoo.SEEDS}, []
    for some in itertools.combinations(seeds, k):
        said = real_zoo.average([seeds[seed] for seed in some])
        truths = real_zoo.average([seeds[seed] for seed in seeds if seed not in some])
        rows_ += [figures_of(said[name], truth) for name, truth in truths.items()]
    return np.mean(rows_, axis=0)


def figures_of(scores: dict[str, float], truth: dict[str, float]) -> tuple[float, float, float]:
    """Return weighted tau, regret of the first, of the best of three."""
    scores = {name: scores[name] for name in truth}
    return weighted_tau(scores, truth), *(regret_at_k(scores, truth, k) for k in (1, 3))


def report_disagreement(tasks: list[Task]) -> None:
    """Let scores of the images, or the truth, contradict what is known of the networks."""
    print("\nOdds where they disagree        90% ranks    hit      P  in .95     of")
    rng = np.random.default_rng(0)
    for benchmark in ("zoo", "group1"):
        ours = fit([task for task in tasks if task.benchmark != benchmark])
        mine = [task for task in tasks if task.benchmark == benchmark]
        orders = [[rng.permutation(len(task.names)) for _ in range(5)] for task in mine]
        for what in ("as they are", "scores permuted", "scores reversed", "truth permuted"):
            found = []
            for task, some in zip(mine, orders, strict=True):
                for order in some if "permuted" in what else some[:1]:
                    changed = task
                    if what.startswith("scores"):
                        of = task.evidence
                        assert of is not None
                        changed = replace(task, evidence=-of if "reversed" in what else of[order])
                    elif "permuted" in what:
                        changed = replace(task, truth=task.truth[order])
                    found.append(judge(changed, ours, []))
            figures = np.mean(found, axis=0)
            print(f"{benchmark + ', ' + what:32}" + " ".join(f"{v:6.2f} " for v in figures))


def report_head(tasks: list[Task]) -> None:
    """Leave one data set out."""
    print("\nA head on frozen features (zoo)   tau  regret  90% ranks   hit      P  in .95  of")
    names, rows = dict.fromkeys(task.name for task in tasks), []
    without = {name: fit_head([t for t in tasks if t.name != name]) for name in names}
    for task in tasks:
        ours = {"full": without[task.name]}
        truth = dict(zip(task.names, task.truth.tolist(), strict=True))
        scores = dict(zip(task.names, expect(task, ours).tolist(), strict=True))
        row = (weighted_tau(scores, truth), regret_at_k(scores, truth, 1), *judge(task, ours, []))
        rows.append(row)
        print(f"{task.name:30}" + "".join(f"{v:8.3f}" for v in row))
    print(f"{'mean':30}" + "".join(f"{v:8.3f}" for v in np.mean(rows, axis=0)))
    once = compare_seeds(1, is_tuned=False)
    print(f"{'who trains all heads once':30}{'{:8.3f}{:8.3f}'.format(*once)}")


def expect(task: Task, ours: dict[str, Any]) -> np.ndarray:
    seen = task.evidence is not None
    of = ours["full" if seen else "unseen"]
    return design(task, seen) @ np.array([*(of[key] for key in COLUMNS), of["images"]])


def judge(task: Task, ours: dict[str, Any], bins: list[tuple[float, float]]) -> tuple[float, ...]:
    """Return coverage, hit, its P, whether the list holds the best one, and its size."""
    seen = task.evidence is not None
    of = {
        "scales": SCALES,
        "correlations": CORRELATIONS if seen else NOTHING,
        "full": ours["full" if seen else "unseen"],
    }
    values = task.evidence if task.evidence is not None else np.zeros(len(task.names))
    scores = dict(zip(task.names, values.tolist(), strict=True))
    f = forecast(scores, facts=task.facts, coefficients=of)
    rank = dict(zip(task.names, rankdata(-task.truth, method="min"), strict=True))
    inside = [a <= rank[n] <= b for n, (a, b) in zip(f.names, f.rank_interval, strict=True)]
    best = {n for n in task.names if rank[n] == 1}
    bins += [(p, (n in best) / len(best)) for n, p in f.best.items()]
    first = max(f.best, key=lambda n: f.best[n])
    chosen = f.shortlist(0.95)
    return (
        float(np.mean(inside)), first in best, f.best[first], bool(best & set(chosen)),
        len(chosen) / len(rank),
    )  # fmt: skip


def write_table() -> None:
    """Put GMACs and activations of timm's benchmarks beside the accuracies; and former names."""
    size: dict[tuple[str, str], tuple[str, str]] = {}
    for file in sorted((DATA / "timm").glob("benchmark-infer-*.csv")):
        for r in rows(f"timm/{file.name}"):
            pair = (r["infer_gmacs"].replace(",", ""), r["infer_macts"].replace(",", ""))
            if all(pair):
                size.setdefault((r["model"], r["infer_img_size"]), pair)
    lines = ["model,img_size,top1,param_count,gmacs,macts"]
    for r in rows("timm/results-imagenet.csv"):
        found = size.get((r["model"].partition(".")[0], r["img_size"]), ("", ""))
        count = r["param_count"].replace(",", "")
        lines.append(",".join([r["model"], r["img_size"], r["top1"], count, *found]))
    write_text(PACKAGE / "metrics" / "imagenet.csv", "\n".join(lines) + "\n")
    renamed = {old: new for old, new in sorted(timm.models.get_deprecated_models().items()) if new}
    write_text(PACKAGE / "metrics" / "renamed.json", json.dumps(renamed, indent=0) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        write_table()
    elif options.fit:
        text = json.dumps(coefficients(open_tasks()), indent=1)
        write_text(PACKAGE / "selection" / "forecast.json", text + "\n")
        print(text)
    else:
        report(open_tasks())


if __name__ == "__main__":
    main()
