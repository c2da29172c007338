"""Replay studies on real fine-tuning tables: how soon is a study within 1 point of the best?

    python tests/benchmarks/study_replay.py [--seeds 20] [--tables held-out] [--jobs 1]

A trial looks its value up in a table of ../shared/data, through real Optuna studies:

- **SHiFT** (9 tables): 30 backbones, drawn per seed from the complete block of 178 with lr .01 at
  800 images (`cifar100`, `dmlab`: × lr .1 where it was run), with recorded seconds;
- **CLIP** (24 tables): 12 backbones × 3 lr × 3 epochs; without seconds: cost is GMACs × epochs;
- **zoo**: fine-tunings of our own, 3 lr × 2 kinds of batch_norm, with CPU seconds
  (``real_zoo.py --settings``, ``real_zoo_settings.json``); nothing was fitted to it.

The proxy is made: normal scores of the backbones' best values, mixed with noise to the Spearman
correlation ρ. Every second table (``--tables fit``) served to fit the constants of
`sfda_tune.selection.policy`; the default are the others. Trials and cost are means over seeds (a
miss counts with its budget), ratios are geometric means over tables. Blind: 1, 3 or 9 trials of
each backbone in the order of the scores, TPE within a backbone; targets refer to the best of the
three for each ρ. "best backbone known" is TPE on that one alone: no choice of backbones can do
better. Nothing is cached; the same arguments print the same tables.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from scipy.stats import norm, rankdata

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
if not any((Path(p) / "sfda_tune_optuna").is_dir() for p in sys.path):
    sys.path.append(str(ROOT / "integrations"))

RHOS = (-0.8, -0.5, 0.0, 0.3, 0.5, 0.7, 0.9)
POOL, CLOSE = 30, 0.01
KEEP = (5, 10)


class Table(NamedTuple):
    """Values and costs, shape (backbones, settings)."""

    name: str
    value: np.ndarray
    cost: np.ndarray
    space: dict[str, list[Any]]  # of the other parameters; settings in their product's order


class Case(NamedTuple):
    """A table with a pool of backbones and their scores."""

    table: Table
    scores: dict[str, float]
    seed: int

    @property
    def goal(self) -> float:
        return float(self.table.value.max()) - CLOSE

    @property
    def budget(self) -> int:
        K, H = self.table.value.shape
        return 3 * K if H < 9 else K * H


def read_shift() -> list[Table]:
    rows: dict[tuple[str, str], dict[tuple[str, float], list[tuple[float, float]]]] = {}
    with (DATA / "shift_finetunes.csv").open() as file:
        for r in csv.DictReader(file):
            if r["train_slice"] == "800":
                runs = rows.setdefault((r["dataset"], r["task"]), {})
                pair = float(r["test_accuracy"]), float(r["elapsed_s"])
                runs.setdefault((r["model"], float(r["lr"])), []).append(pair)
    block = set.intersection(*[{m for m, lr in runs if lr == 0.01} for runs in rows.values()])
    tables = []
    for (dataset, task), runs in sorted(rows.items()):
        lrs = [0.01, 0.1] if dataset in ("cifar100", "dmlab") else [0.01]
        models = sorted(m for m in block if all((m, lr) in runs for lr in lrs))
        cells = np.array([[np.mean(runs[m, lr], axis=0) for lr in lrs] for m in models])
        space = {"lr": lrs} if len(lrs) > 1 else {}
        name = f"shift {dataset}{task and '/' + task}"
        tables.append(Table(name, cells[..., 0], cells[..., 1], space))
    return tables


def read_clip() -> list[Table]:
    runs: dict[str, dict[tuple[str, float, float], tuple[float, float]]] = {}
    with (DATA / "clip_probe.csv").open() as file:
        for r in csv.DictReader(file):
            lr, epochs = float(r["lr"]), float(r["epochs"])
            pair = float(r["accuracy"]), float(r["gmacs"]) * epochs
            shots = "all" if r["shots"] == "-1" else r["shots"]
            runs.setdefault(f"clip {r['dataset']}@{shots}", {})[r["model"], lr, epochs] = pair
    tables = []
    for name, cells in sorted(runs.items()):
        models, lrs, epochs = (sorted({key[i] for key in cells}) for i in range(3))
        grid = np.array([[cells[m, a, e] for a in lrs for e in epochs] for m in models])
        tables.append(Table(name, grid[..., 0], grid[..., 1], {"lr": lrs, "epochs": epochs}))
    return tables


def read_zoo() -> list[Table]:
    from real_zoo import SETTINGS, SETTINGS_FILE

    tables = []
    for name, cells in json.loads(SETTINGS_FILE.read_text()).items():
        grid = np.array([cells[backbone] for backbone in sorted(cells)])
        tables.append(Table(f"zoo {name}", grid[..., 0], grid[..., 1], SETTINGS))
    return tables


def make_case(table: Table, rho: float, seed: int, pool: int) -> Case:
    rng = np.random.default_rng([seed, *table.name.encode()])
    K = len(table.value)
    kept = np.sort(rng.choice(K, min(pool, K), replace=False))
    table = table._replace(value=table.value[kept], cost=table.cost[kept])
    best = table.value.max(axis=1)
    normal = norm.ppf((rankdata(best) - 0.5) / len(best))
    r = 2 * np.sin(np.pi * rho / 6)  # Pearson's r of a Gaussian pair with Spearman's ρ
    scores = r * normal + np.sqrt(1 - r**2) * rng.normal(size=len(best))
    return Case(table, {f"b{k:03d}": float(s) for k, s in enumerate(scores)}, seed)


# Methods: each returns trials and cost until the goal is reached -----------------------------
def run(
    case: Case,
    sampler: BaseSampler | None = None,
    *,
    names: Iterable[str] = (),
    enqueue: int = 0,
) -> tuple[float, float]:
    names = sorted(names) or sorted(case.scores)
    sampler = TPESampler(seed=case.seed) if sampler is None else sampler
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for name in best(case, enqueue):
        study.enqueue_trial({"backbone": name})
    cost = 0.0
    for number in range(case.budget):
        trial = study.ask()
        k = int(trial.suggest_categorical("backbone", names)[1:])
        h = suggest_setting(trial, case.table.space)
        cost += case.table.cost[k, h]
        if case.table.value[k, h] >= case.goal:
            return number + 1, cost
        study.tell(trial, case.table.value[k, h])
    return case.budget, cost


def best(case: Case, n: int | None = None) -> list[str]:
    return sorted(case.scores, key=lambda name: -case.scores[name])[:n]


def suggest_setting(trial: optuna.Trial, space: dict[str, list[Any]]) -> int:
    h = 0
    for name, values in space.items():
        h = h * len(values) + values.index(trial.suggest_categorical(name, values))
    return h


def follow(case: Case, each: int) -> tuple[float, float]:
    """Follow the scores: `each` trials of one backbone after the other, again and again."""
    space = {name: CategoricalDistribution(v) for name, v in case.table.space.items()}
    order, cost = best(case), 0.0
    seeds = np.random.default_rng(case.seed).permutation(10_000).tolist()
    studies = [
        optuna.create_study(direction="maximize", sampler=TPESampler(seed=s))
        for s in seeds[: len(order)]
    ]
    each = each if space else 1  # a second trial would be the same
    for number in range(case.budget):
        i = number // each % len(order)
        trial = studies[i].ask(space)
        k, h = int(order[i][1:]), suggest_setting(trial, case.table.space)
        cost += case.table.cost[k, h]
        if case.table.value[k, h] >= case.goal:
            return number + 1, cost
        studies[i].tell(trial, case.table.value[k, h])
    return case.budget, cost


def ours(case: Case) -> tuple[float, float]:
    from sfda_tune_optuna import SFDASampler

    return run(case, SFDASampler(case.scores, seed=case.seed))


METHODS: dict[str, Callable[[Case], tuple[float, float]]] = {
    "random": lambda c: run(c, RandomSampler(seed=c.seed)),
    "TPE": run,
    "TPE + 3 enqueued": lambda c: run(c, enqueue=3),
    "TPE on top 5": lambda c: run(c, names=best(c, 5)),
    **{f"blind, {m} each": partial(follow, each=m) for m in (1, 3, 9)},
    "SFDASampler": ours,
    "best backbone known": lambda c: run(c, names=[f"b{c.table.value.max(axis=1).argmax():03d}"]),
}
UNINFORMED = ("random", "TPE", "best backbone known")  # the same for all ρ


# The pruner alone ----------------------------------------------------------------------------
def run_pruner(case: Case, keep: int | None, base: BasePruner) -> tuple[float, bool]:
    """Return cost until, and if, the goal is reached; epochs are steps, a gated trial is free."""
    from sfda_tune_optuna import SFDAPruner

    pruner = base if keep is None else SFDAPruner(case.scores, keep=keep, base_pruner=base)
    sampler = TPESampler(seed=case.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    K, H = case.table.value.shape
    steps = len(case.table.space.get("epochs", [0]))
    value, cost = (a.reshape(K, H // steps, steps) for a in (case.table.value, case.table.cost))
    cost = np.diff(cost, axis=2, prepend=0.0)  # GMACs × epochs is cumulative
    goal = value[..., -1].max() - CLOSE
    space = {name: v for name, v in case.table.space.items() if name != "epochs"}
    limit = case.budget * float(cost.sum(axis=2).mean()) / steps
    spent = 0.0
    for _ in range(20 * case.budget):
        trial = study.ask()
        k = int(trial.suggest_categorical("backbone", sorted(case.scores))[1:])
        stops = trial.should_prune()
        h = 0 if stops else suggest_setting(trial, space)
        for step in range(steps):
            if stops:
                break
            spent += cost[k, h, step]
            trial.report(value[k, h, step], step)
            stops = step + 1 < steps and trial.should_prune()
        if spent >= limit:
            break
        if not stops and value[k, h, -1] >= goal:
            return spent, True
        state = optuna.trial.TrialState.PRUNED if stops else None
        study.tell(trial, None if stops else value[k, h, -1], state=state)
    return limit, False


BASES: dict[str, Callable[[], BasePruner]] = {
    "none": NopPruner,
    "median": MedianPruner,
    "halving": lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
}


# All of it -------------------------------------------------------------------------------------
def replay(job: tuple[Table, float, int, int]) -> dict[tuple[str, str, float], Any]:
    """Return {(method, table, ρ): array of trials and cost per seed} of one table and ρ."""
    table, rho, seeds, pool = job
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    cases = [make_case(table, rho, seed, pool) for seed in range(seeds)]
    found: dict[tuple[str, str, float], Any] = {}
    for method, function in METHODS.items():
        if method not in UNINFORMED or rho == RHOS[0]:
            found[method, table.name, rho] = np.array([function(case) for case in cases])
    for base, make in BASES.items():
        if base != "none" and "epochs" not in table.space:
            continue
        for keep in (None, *KEEP):
            if rho == RHOS[0] if keep is None else rho >= 0.5:
                spent = [run_pruner(case, keep, make()) for case in cases]
                found[f"{base} {keep}", table.name, rho] = np.array(spent, dtype=float)
    return found


def cell(found: dict, method: str, table: str, rho: float) -> np.ndarray:
    informed = method not in UNINFORMED and not method.endswith(" None")
    return found[method, table, rho if informed else RHOS[0]]


def ratio(
    found: dict,
    methods: tuple[str, str],
    tables: list[str],
    rho: float,
    what: int,
    of: Any = np.mean,
) -> float:
    mine, other = ([of(cell(found, m, t, rho)[:, what]) for t in tables] for m in methods)
    return float(np.exp(np.mean(np.log(mine) - np.log(other))))


def print_table(title: str, head: list[str], rows: Iterable[list[str]]) -> None:
    print(f"## {title}\n")
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")
    print()


def report_ratios(found: dict, family: str, tables: list[str], unit: str, what: int) -> None:
    mean = np.exp(np.mean([np.log(cell(found, "TPE", t, 0)[:, what].mean()) for t in tables]))
    title = f"{family}, {len(tables)} tables: {unit} relative to TPE ({mean:,.4g})"
    rows = [
        [m, *(f"{ratio(found, (m, 'TPE'), tables, rho, what):.2f}" for rho in RHOS)]
        for m in METHODS
    ]
    print_table(title, ["", *(f"ρ {rho:g}" for rho in RHOS)], rows)


def report_targets(found: dict, families: dict[str, list[str]]) -> None:
    def ours_to(other: str, tables: list[str], rho: float, what: int) -> float:
        others = [m for m in METHODS if m.split(",")[0] == other]
        return max(ratio(found, ("SFDASampler", m), tables, rho, what) for m in others)

    good, bad, rows = RHOS[4:], RHOS[:3], []
    for family, tables in families.items():
        for what, unit in enumerate(("trials", "cost")):
            worst = [max(ours_to("TPE", [t], rho, what) for t in tables) for rho in bad]
            for text, limit, values in [
                ("ρ ≥ .5: of TPE", 0.5, [ours_to("TPE", tables, rho, what) for rho in good]),
                ("ρ ≥ .5: of blind", 1.3, [ours_to("blind", tables, rho, what) for rho in good]),
                ("ρ .9: of blind", 1.1, [ours_to("blind", tables, 0.9, what)]),
                ("ρ ≤ 0: of TPE", 1.25, [ours_to("TPE", tables, rho, what) for rho in bad]),
                ("ρ ≤ 0: of TPE, worst table", 2.0, worst),
            ]:
                met = sum(v <= limit for v in values)
                verdict = "met" if met == len(values) else f"{met} of {len(values)}"
                shown = " / ".join(f"{v:.2f}" for v in values)
                rows.append([family, unit, text, f"≤ {limit}", shown, verdict])
    print_table("Targets", ["tables", "unit", "target", "limit", "measured", ""], rows)


def report_pruner(found: dict, families: dict[str, list[str]]) -> None:
    rows = []
    for family, tables in families.items():
        for base, keep in product(BASES, KEEP):
            method, alone = f"{base} {keep}", f"{base} None"
            ts = [t for t in tables if (method, t, 0.9) in found]
            cells = [
                f"{ratio(found, (method, alone), ts, rho, 0):.2f} / "
                f"{ratio(found, (method, alone), ts, rho, 0, np.median):.2f} / "
                f"{np.mean([cell(found, method, t, rho)[:, 1] for t in ts]):.0%}"
                for rho in RHOS[4:]
                if ts
            ]
            rows += [[family, base, str(keep), *cells]] if ts else []
    title = (
        "Pruner alone: cost of that of TPE with the same base pruner: mean / median / got there"
    )
    head = ["tables", "base pruner", "keep", *(f"ρ {rho:g} (≤ 0.6)" for rho in RHOS[4:])]
    print_table(title, head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--tables", default="held-out", help="held-out, fit, all, or a part of names"
    )
    parser.add_argument("--pool", type=int, default=POOL, help="backbones per SHiFT study")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    tables = [t for family in (read_shift(), read_clip()) for t in family]
    parts = {"fit": tables[::2], "held-out": [*tables[1::2], *read_zoo()]}
    parts["all"] = [*tables, *read_zoo()]
    tables = parts.get(args.tables, [t for t in parts["all"] if args.tables in t.name])
    started = time.perf_counter()
    jobs = [(t, rho, args.seeds, args.pool) for t in tables for rho in RHOS]
    found: dict[tuple[str, str, float], Any] = {}
    with ProcessPoolExecutor(args.jobs) as executor:
        for part in (map if args.jobs == 1 else executor.map)(replay, jobs):
            found |= part
    names = [t.name for t in tables]
    families = {f: [n for n in names if n.startswith(f.lower())] for f in ("SHiFT", "CLIP", "zoo")}
    families = {f: n for f, n in (families | {"all": names}).items() if n}
    print(
        f"# Study replay: {len(names)} tables, {args.seeds} seeds, Optuna {optuna.__version__}\n"
    )
    for (family, ts), (what, unit) in product(families.items(), enumerate(("trials", "cost"))):
        report_ratios(found, family, ts, unit, what)
    report_targets(found, families)
    report_pruner(found, families)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
