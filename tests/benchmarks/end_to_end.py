"""`search` against what it replaces: test accuracy and seconds, several seeds.

==========  ======================================================================================
arm         what it does; all use the same images, space, epochs and final training
==========  ======================================================================================
search      `sfda_tune.search`
everything  (a) every backbone × 4 configurations (the default, then random ones), full length
defaults    the first of these four only
optuna      (b) TPE + Hyperband over backbone and parameters, until it has search's validation
            accuracy, at most `--patience` trials
ray         (c) the same with Ray Tune: random search + ASHA; only with `--arms ray`
imagenet    (d) the 4 configurations of the backbone with the best published ImageNet accuracy; the
            demo backbones have none, so there of the one with the most parameters
==========  ======================================================================================

    python tests/benchmarks/end_to_end.py --dataset demo --seeds 3
    python tests/benchmarks/end_to_end.py --dataset trashnet --samples 400 --epochs 3 --cheapest 16

Of a data set of the zoo its validation part is the test part here.

Seconds are CPU seconds of one process and one thread, so that a busy machine does not matter much
(with ``--device cuda`` of the clock; of work that `--jobs` processes share, the sum); those of Ray
are what its trials took, without the start of their processes. Finished arms are kept in `--out`
and not repeated; of "everything", which takes hours, finished backbones are, too.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import real_zoo

import sfda_tune
from sfda_tune.backbones.loading import describe, measure_cost
from sfda_tune.data.splits import join, split_images
from sfda_tune.finetuning.models import predict
from sfda_tune.finetuning.run import SharedWork, finetune
from sfda_tune.pipelines.spaces import default_space
from sfda_tune.pipelines.training import FixedLengthFineTuning
from sfda_tune.values.files import write_text

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
ARMS = ("search", "everything", "imagenet", "optuna")


class Bench:
    """One data set and seed."""

    def __init__(
        self, dataset: str, seed: int, samples: int | None, epochs: int | None,
        cheapest: int | None, device: str, jobs: int,
    ) -> None:  # fmt: skip
        is_demo = dataset == "demo"
        self.settings = (dataset, seed, samples, epochs, cheapest, device)
        self.device, self.jobs, self.shared = device, jobs, SharedWork()
        self.clock = time.process_time if device == "cpu" else time.perf_counter
        self.dataset: Any = "digits" if is_demo else str(ZOO / "datasets" / dataset / "train")
        self.held_out: Any = None if is_demo else str(ZOO / "datasets" / dataset / "val")
        self.specs: Any = "demo:*" if is_demo else str(ZOO / "models")
        self.plugins = () if is_demo else (str(ZOO / "zoo_models.py"),)
        self.seed, self.samples, self.is_demo = seed, samples, is_demo
        given = {"dataset": self.dataset, "samples": samples, "seed": seed, "test": self.held_out}
        given |= dict.fromkeys(("split", "image_column", "label_column"))
        self.parts = split_images(given)[0]
        found = sfda_tune.resolve_backbones(self.specs, plugins=self.plugins)
        if cheapest is not None:
            found = sorted(found, key=measure_cost)[:cheapest]
            self.specs = [b.spec for b in found]
        self.backbones = {b.name: b for b in found}
        self.space = default_space(len(self.parts["train"]))
        auto = max(5, round(30 * min(1, 200 / len(self.parts["train"])) ** (1 / 3)))
        self.epochs = epochs or max(3, round(auto / 2))  # as `search`

    def train(self, name: str, params: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        config = self.space.config(params, epochs=self.epochs, seed=self.seed)
        run = finetune(
            self.backbones[name], self.parts["train"], config, val=self.parts["val"],
            device=self.device, workers=0, shared=self.shared,
        )  # fmt: skip
        for epoch in run:
            yield epoch, run

    def test(self, name: str, params: Mapping[str, Any], last: int, part: float) -> float:
        """Train once more with the validation images, as `search`; return the test accuracy."""
        parts, config = self.parts, self.space.config(params, epochs=self.epochs, seed=self.seed)
        both = (join(parts["train"], parts["val"]), parts["val"])
        run = FixedLengthFineTuning(self.backbones[name], both, config, None, True, self.device, 0)
        run.interpolate(part)
        next(epoch for epoch in run if epoch.number == last)
        p = predict(run.model(), parts["test"], device=self.device)
        return float(np.mean(p.argmax(1) == parts["test"].labels))

    def configurations(self) -> list[dict[str, Any]]:
        rng, found = np.random.default_rng(self.seed), [self.space.default()]
        for _ in range(3):
            draw: dict[str, Any] = {}
            for d in self.space.dimensions:
                if d.choices:
                    draw[d.name] = d.choices[rng.integers(len(d.choices))]
                else:
                    low, high = np.log([d.low, d.high]) if d.log else (d.low, d.high)
                    x = rng.uniform(low, high)
                    draw[d.name] = float(np.exp(x) if d.log else x)
            found.append(draw)
        return found

    # The arms -----------------------------------------------------------------------------------
    def search(self) -> dict[str, Any]:
        started = self.clock()
        with tempfile.TemporaryDirectory() as folder:
            result = sfda_tune.search(
                self.dataset, self.specs, trials=12, samples=self.samples, seed=self.seed,
                epochs=self.epochs, plugins=self.plugins, cache=False, device=self.device,
                out=folder, test=self.held_out, decoders=0,
            )  # fmt: skip
        return {
            "test": result.test["accuracy"],
            "val": result.best["val"]["accuracy"],
            "backbone": result.best["backbone"],
            "seconds": self.clock() - started,
            "trials": len(result.trials),
        }

    def tune(self, name: str) -> list[tuple[Any, ...]]:
        """Train every configuration of a backbone to the end."""
        trials = []
        for k, params in enumerate(self.configurations()):
            started = self.clock()
            epochs = [epoch for epoch, _ in self.train(name, params)]
            last = epochs[-1]
            part = next(e.interpolation for e in epochs if e.number == last.best_number)
            spent = self.clock() - started
            trials.append((last.best, last.best_number, part, name, params, k, spent))
        return trials

    def full(self, names: list[str], kept: Path | None = None) -> dict[str, Any]:
        """Train every configuration of every named backbone to the end."""
        known = json.loads(kept.read_text()) if kept and kept.is_file() else {}
        for name, trials in self.tune_all([name for name in names if name not in known]):
            known[name] = trials
            if kept:
                write_text(kept, json.dumps(known) + "\n")
        trials = [trial for name in names for trial in known[name]]
        found = []
        for some in (trials, [t for t in trials if t[5] == 0]):
            val, last, part, name, params, *_ = max(some, key=lambda t: t[0])
            spent = sum(t[6] for t in some)
            found.append(self.finish(name, params, last, part, val, spent))
        return found[0] | {"trials": len(trials), "defaults": found[1]}

    def tune_all(self, names: list[str]) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
        if self.jobs == 1 or len(names) < 2:
            yield from ((name, self.tune(name)) for name in names)
            return
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        with ProcessPoolExecutor(self.jobs, context, open_bench, self.settings) as pool:
            yield from zip(names, pool.map(tune_one, names), strict=True)

    def finish(
        self, name: str, params: Any, last: int, part: float, val: float, spent: float
    ) -> dict[str, Any]:
        started = self.clock()
        test = self.test(name, params, last, part)
        seconds = spent + self.clock() - started
        return {"test": test, "val": val, "backbone": name, "seconds": seconds}

    def everything(self, kept: Path) -> dict[str, Any]:
        return self.full(list(self.backbones), kept)

    def imagenet(self) -> dict[str, Any]:
        if self.is_demo:
            prior = {n: float(describe(b).n_params) for n, b in self.backbones.items()}
        else:
            known = real_zoo.read_imagenet()
            prior = {name: known[name] for name in self.backbones if name in known}
        return self.full([max(prior, key=lambda name: prior[name])])

    def optuna(self, target: float, patience: int) -> dict[str, Any]:
        started, best = self.clock(), (-1.0, 0, 1.0, "", {})

        def objective(trial: optuna.Trial) -> float:
            nonlocal best
            name = trial.suggest_categorical("backbone", sorted(self.backbones))
            params = {
                d.name: trial.suggest_categorical(d.name, d.choices)
                if d.choices
                else trial.suggest_float(d.name, d.low, d.high, log=d.log)
                for d in self.space.dimensions
            }
            value = 0.0
            for epoch, _ in self.train(name, params):
                value = epoch.best
                if value > best[0]:
                    best = (value, epoch.number, epoch.interpolation, name, params)
                trial.report(epoch.accuracy, epoch.number)
                if value >= target:
                    trial.study.stop()
                    return value
                if trial.should_prune():
                    raise optuna.TrialPruned
            return value

        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=self.seed),
            pruner=optuna.pruners.HyperbandPruner(max_resource=self.epochs + 1),
        )
        study.optimize(objective, n_trials=patience)
        found = {"trials": len(study.trials), "reached": best[0] >= target}
        val, last, part, name, params = best
        return self.finish(name, params, last, part, val, self.clock() - started) | found

    def ray(self, target: float, patience: int) -> dict[str, Any]:
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler

        def objective(config: dict[str, Any]) -> None:
            begun = time.process_time()
            params = {d.name: config[d.name] for d in self.space.dimensions}
            parts = {}
            for epoch, _ in self.train(config["backbone"], params):
                parts[epoch.number] = epoch.interpolation
                spent = time.process_time() - begun
                tune.report({
                    "best": epoch.best, "number": epoch.best_number, "spent": spent,
                    "part": parts[epoch.best_number],
                })  # fmt: skip

        class Reached(tune.Stopper):
            is_done = False

            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                self.is_done |= result["best"] >= target
                return self.is_done

            def stop_all(self) -> bool:
                return self.is_done

        space: dict[str, Any] = {"backbone": tune.choice(sorted(self.backbones))}
        for d in self.space.dimensions:
            draw = tune.loguniform if d.log else tune.uniform
            space[d.name] = tune.choice(list(d.choices)) if d.choices else draw(d.low, d.high)
        tuner = tune.Tuner(
            objective,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="best", mode="max", num_samples=patience, max_concurrent_trials=1,
                scheduler=ASHAScheduler(max_t=self.epochs + 1),
            ),
            run_config=tune.RunConfig(
                stop=Reached(), verbose=0, storage_path=tempfile.mkdtemp(prefix="end_to_end-")
            ),
        )  # fmt: skip
        results = tuner.fit()
        top: Any = results.get_best_result("best", "max")
        params = {d.name: top.config[d.name] for d in self.space.dimensions}
        started = time.process_time()
        last, part = top.metrics["number"], top.metrics["part"]
        test = self.test(top.config["backbone"], params, last, part)
        seconds = time.process_time() - started + sum((r.metrics or {})["spent"] for r in results)
        found = {"backbone": top.config["backbone"], "trials": len(results)}
        return {"test": test, "val": top.metrics["best"], "seconds": seconds, **found}


BENCH: Any = None  # of a process that tunes for another


def open_bench(*settings: Any) -> None:
    global BENCH
    prepare()
    BENCH = Bench(*settings, jobs=1)


def tune_one(name: str) -> list[tuple[Any, ...]]:
    return BENCH.tune(name)


def prepare() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="demo", help="demo, or a data set of the zoo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="backbones of everything at a time")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--cheapest", type=int, help="so many backbones, by GMACs")
    parser.add_argument("--patience", type=int, default=40)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--out", type=Path, default=Path("end_to_end.json"))
    options = parser.parse_args()
    prepare()
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    for seed in range(options.first, options.first + options.seeds):
        sizes = (options.samples, options.epochs, options.cheapest)
        bench = Bench(options.dataset, seed, *sizes, options.device, options.jobs)
        key = f"{options.dataset}, {options.samples or 'all'} images, seed {seed}"
        done = known.setdefault(key, {})
        for arm in options.arms:
            if arm not in done:
                call: Callable[..., Any] = getattr(bench, arm)
                is_rival = arm in ("optuna", "ray")
                if is_rival:
                    done[arm] = call(done["search"]["val"], options.patience)
                elif arm == "everything":
                    done[arm] = call(options.out.with_suffix(f".{options.dataset}{seed}.json"))
                    done["defaults"] = done[arm].pop("defaults")
                else:
                    done[arm] = call()
                done[arm].pop("defaults", None)
                options.out.write_text(json.dumps(known, indent=1) + "\n")
            r = done[arm]
            ratio = done["search"]["seconds"] / r["seconds"]
            line = f"{key}  {arm:<10} test {r['test']:.4f}  val {r['val']:.4f}  "
            print(f"{line}{r['seconds']:6.1f} s  search takes {ratio:.2f}×  {r['backbone']}")


if __name__ == "__main__":
    main()
