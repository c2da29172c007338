"""The stages of a search, in their order.

===========  ==================================================================================
stage        what happens
===========  ==================================================================================
rank         candidates that break a constraint are left out, the others ranked on training
             images
shortlist    the best `keep` go on; it is said how likely the best is one of them
tune         an engine (`sfda_tune.pipelines.engines`) fine-tunes the survivors with varying
             parameters
train        the winner once more, on training and validation images, for its best number of
             epochs
test         on images that nothing above has seen
===========  ==================================================================================

All state is in the folder RUN: a stage reads there what the ones before it have found, and does
nothing if it is done already.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from sfda_tune.backbones.loading import check_bounded, fetch, timm_name
from sfda_tune.backbones.plugins import BackboneError
from sfda_tune.backbones.weights import is_here, look_up_sizes, remove_unused
from sfda_tune.data.decoding import get_switches, open_picture, set_switches
from sfda_tune.pipelines.budget import RANK_SHARE, Budget, Workload
from sfda_tune.pipelines.clock import Beat
from sfda_tune.pipelines.config import SearchConfig
from sfda_tune.pipelines.engines import DIED, Job, Trial
from sfda_tune.pipelines.inputs import Inputs, open_inputs
from sfda_tune.pipelines.latency import measure_costs
from sfda_tune.pipelines.ranking import rank
from sfda_tune.pipelines.result import SearchResult
from sfda_tune.pipelines.run_folder import RunFolder, begin, name_study
from sfda_tune.pipelines.training import (
    evaluate_winner,
    train,
    train_winner,
)
from sfda_tune.pipelines.trials import find_best, find_near, summarise
from sfda_tune.pipelines.workers import await_workers, start_workers, work_as
from sfda_tune.report.html import write_report
from sfda_tune.selection.diagnostics import diagnose
from sfda_tune.selection.forecast import find_evidence, forecast, is_forecast
from sfda_tune.selection.odds import find_odds
from sfda_tune.selection.uncertainty import shortlist
from sfda_tune.values.files import find_disk_fault
from sfda_tune.values.metrics import call, tell
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import format_bytes, some

__all__ = ["choose_survivors", "run_stages", "work"]

logger = logging.getLogger(__name__)
NEAR = 5  # so many trials that may be the winner keep their weights


def run_stages(config: SearchConfig, progress: Any = None, number: int = 0) -> None:
    """Go through the stages that are not done yet; further workers (`number` > 0) only tune."""
    folder, budget = _open(config, progress)
    workers: list[Any] = []
    with ExitStack() as stack:
        try:
            with folder.lock("stage"):
                try:
                    inputs = _begin(config, folder, budget)
                except BaseException:
                    folder.forget_refused()
                    raise
                if folder.is_done("test"):
                    if not (folder.path / "report.html").exists():  # killed before it was written
                        write_report(folder.path, images=open_picture)
                    return
                stack.enter_context(Beat(folder.now.write, 1.0))
                rank_backbones(folder, budget, inputs)
                make_shortlist(config, folder)
                fetch_survivors(folder, inputs)
            todo = _measure_workload(folder, budget, inputs)
            if number == 0 and not folder.is_done("tune"):
                workers = start_workers(config, inputs.engine, work)
            tune(folder, budget, inputs, todo)
            if number == 0:
                end = partial(budget.end_of_trials, todo)
                await_workers(workers, folder, budget, lambda: end(folder.trials))
                with folder.lock("stage"):
                    finish(folder, budget, inputs, todo)
        except KeyboardInterrupt:
            with suppress(FileNotFoundError), folder.edit() as state:  # or it had not begun
                state["status"] = "interrupted"
            raise
        except Exception as error:
            if fault := find_disk_fault(error):
                raise OSError(
                    f"the disk of {str(folder.path)!r} fails: {os.strerror(fault)}; make room, or "
                    "mend it, and the same call goes on from here."
                ) from error
            raise
        finally:
            for worker in workers:
                worker.process.terminate()


def work(config: SearchConfig, number: int) -> None:
    """Be a further worker of a search, in a process of its own."""
    with work_as(config, number) as config:
        run_stages(config, number=number)


def _open(config: SearchConfig, progress: Any = None) -> tuple[RunFolder, Budget]:
    folder = RunFolder.open(config.out, progress)
    return folder, Budget(config.seconds, folder.now, folder.now())


def _begin(config: SearchConfig, folder: RunFolder, budget: Budget) -> Inputs:
    """Open data and candidates; begin the folder, or check that it is of this search."""
    end = budget.end_of_share(RANK_SHARE, budget.begun)

    def check() -> None:
        _require_time(budget, end, "the images could not be read")

    inputs = open_inputs(config, folder.splits, check)
    if config.weights_disk is not None and getattr(inputs.engine, "spreads", False):
        raise ValueError(
            f"`weights_disk` bounds the disk of this machine but is {config.weights_disk!r} with "
            f"the engine {config.engine!r}, which trains on others, too; leave it out, or take "
            "engine='optuna'."
        )
    limits = {"max_params": config.max_params, "max_latency": config.max_latency}
    timed = "latency" in config.objective
    costs = partial(measure_costs, inputs.backbones, inputs.device, timed=timed, **limits)
    begin(folder, inputs, costs)
    return inputs


def _require_time(budget: Budget, end: float, what: str) -> None:
    """Refuse when the time of the ranking is over; `what` was not done in it."""
    if budget.now() >= end:
        raise ValueError(
            f"{what} within the time that a ranking may take, {100 * RANK_SHARE:g} % of the "
            f"budget{budget.hint}"
        )


def _measure_workload(folder: RunFolder, budget: Budget, inputs: Inputs) -> Workload:
    return Workload(
        metric=inputs.config.metric,
        n_images={name: len(part) for name, part in inputs.parts.items()},
        seconds_per_image=budget.time_decoding(inputs.parts["train"]),
        speeds={s.backbone: s.details.get("images_per_second") for s in folder.ranking.scores},
        seconds_to_end=getattr(inputs.engine, "seconds_to_end", 0.0),
    )


# Rank and shortlist -----------------------------------------------------------------------------
def rank_backbones(folder: RunFolder, budget: Budget, inputs: Inputs) -> None:
    """Rank the candidates that break no constraint, within their share of the budget."""
    if folder.is_done("rank"):
        return
    folder.enter("rank", "ranking")
    config, excluded = inputs.config, folder.state["excluded"]
    admitted = [b for name, b in inputs.backbones.items() if name not in excluded]
    end = budget.end_of_share(RANK_SHARE, budget.begun)
    _require_time(budget, end, "what comes before the ranking was not done")
    ranking = rank(
        inputs.parts["train"], admitted, seed=config.seed, device=inputs.device,
        precision=config.precision, cache=config.cache, plugins=config.plugins,
        progress=folder.progress, max_unreadable=config.max_unreadable,
        workers=config.decoders, weights_disk=config.weights_disk,
        budget=None if math.inf == end else max(end - budget.now(), 1e-3),
    )  # fmt: skip
    unseen = ranking.info.get("not_looked_at", [])
    if len(ranking.failed) == len(ranking):
        name, why = next(iter(ranking.failed.items()))
        hint = budget.hint if unseen else ""
        raise ValueError(f"no backbone could be ranked; {name}: {why}{hint}")
    ranking.to_json(folder.path / "ranking.json")
    excluded |= ranking.failed
    n_seen = len(ranking) - len(ranking.failed) - len(unseen)
    note = f"{n_seen} of {len(inputs.backbones)} backbones ranked"
    if unseen:
        note += f"; their part of the budget did not suffice for {some(unseen, 3)}"
    note += "".join(f"; without {name}: {why}" for name, why in list(excluded.items())[:3])
    note += f"; and {len(excluded) - 3} more" * (len(excluded) > 3)
    folder.leave("rank", note, excluded=excluded)


def make_shortlist(config: SearchConfig, folder: RunFolder) -> None:
    """Choose the survivors, and say how likely the best is one of them."""
    if folder.is_done("shortlist"):
        return
    folder.enter("shortlist", "ranking")
    ranking, odds = folder.ranking, find_odds(folder.ranking)
    scored, kept = ranking.shortlist(len(ranking)), choose_survivors(ranking, config.keep)
    doubts = [d.message for d in diagnose(ranking) if d.kind in ("ties", "few_samples")]
    plausible = scored if odds is None else list(map(str, shortlist(odds, 0.95)))
    names = f"of {len(scored)} backbones, {some(kept, 3)}"
    are, among = ("is", "this one") if len(kept) == 1 else ("are", "one of them")
    if len(kept) == len(scored):
        decision = f"all {len(scored)} ranked backbones are tuned"
        if len(scored) == 1:
            decision = "the only ranked backbone is tuned"
    elif odds is None:
        decision = f"{names} {are} tuned; the scores do not tell how likely the best is {among}"
    else:
        share = sum(odds.best[name] for name in kept if name in odds.best)
        decision = f"{names} {are} tuned; the best is {among} with probability {share:.2f}"
        if not set(plausible) <= set(kept):
            decision += f", and with .95 one of {len(plausible)}: a larger keep tunes more"
    decision = "; ".join([decision, *(doubt.rstrip(".") for doubt in doubts)])
    clear = set(plausible) <= set(kept) and not doubts
    found = {"separable": clear, "survivors": kept, "decision": decision}
    folder.leave("shortlist", decision, **found, scores={name: ranking[name] for name in kept})


def choose_survivors(ranking: Ranking, keep: int) -> list[str]:
    """Return the `keep` backbones to tune, in the order of the ranking.

    The first ones, and always (if there is room) the best by each kind of evidence alone: what is
    known of the networks, and the scores of the images. Nothing cheaper than whole fine-tunings
    tells them apart: in 16 sets of four and more networks of the zoo (5 data sets) the rank
    correlation of the best value so far with the test accuracy at the end was .38 before training
    and .32, .33, .44, .74 after 1, 2, 3, 4 of 5 epochs.
    """
    scored = ranking.shortlist(len(ranking))
    first = scored[:1]
    if is_forecast(ranking):
        f = forecast(ranking, train=ranking.info["train"])
        prior = f.mean - f.parts.get("images", np.zeros(len(f.names)))
        first += [f.names[int(prior.argmax())]] if prior.any() else []
        first += find_evidence(ranking).shortlist(1)
    chosen = list(dict.fromkeys([*first, *scored]))[:keep]
    return [name for name in scored if name in chosen]


def fetch_survivors(folder: RunFolder, inputs: Inputs) -> None:
    """Have the weights to be tuned here, within the disk that they may take, until the end."""
    limit, known = inputs.config.weights_limit, folder.state.get("fetched", [])
    if limit is None or folder.is_done("test"):
        return
    survivors = [inputs.backbones[name] for name in folder.state["survivors"]]
    absent = [b for b in survivors if b.load is None and not is_here(timm_name(b.spec))]
    for backbone in absent:
        check_bounded(backbone)
    there = sum(os.path.getsize(file) for file in known if os.path.exists(file))

    def allow(size: int | None) -> None:
        if there + (size or 0) > limit:
            raise BackboneError(
                f"`weights_disk` allows {format_bytes(limit)} but the weights to be tuned, of "
                f"{some([b.name for b in survivors])}, take {format_bytes(there + (size or 0))}; "
                f"with more and out={str(folder.path)!r} the same call goes on from here."
            )

    sizes = look_up_sizes(timm_name(b.spec) for b in absent).values()
    allow(sum(size or 0 for size in sizes))
    for backbone in absent:
        file, fetched = fetch(backbone, lambda _, size: allow(size))  # which knows it in any case
        if file is not None and fetched:
            there += os.path.getsize(file)
            with folder.edit() as state:
                state["fetched"] = [*state.get("fetched", []), file]


def forget_weights(folder: RunFolder) -> None:
    """Remove the weights that `fetch_survivors` fetched."""
    for file in folder.state.get("fetched", []):
        if not remove_unused(file):
            logger.warning("%s stays: another process is opening it", file)
    with folder.edit() as state:
        state.pop("fetched", None)


# Tune -------------------------------------------------------------------------------------------
def tune(folder: RunFolder, budget: Budget, inputs: Inputs, todo: Workload) -> None:
    """Let the engine run trials until there are enough, or until the time for them is over."""
    if folder.is_done("tune"):
        return
    folder.enter("tune", "tuning")
    config, end = inputs.config, budget.end_of_trials(todo, folder.trials)

    def is_over() -> bool:
        return budget.now() >= end

    def update_trials(trials: Sequence[Trial]) -> None:
        nonlocal end
        end = budget.end_of_trials(todo, trials)
        if not folder.write_trials(trials, config, todo.speeds):
            return
        near = find_near(trials, config.metric, todo.n_images["val"])[:NEAR]
        for t in trials:
            if t.state != "running" and t not in near and t.error != DIED:  # it may go on yet
                folder.delete_weights(t.folder)
        stop = time.time() + end - budget.now()  # as people tell it
        folder.progress.show(trials, near[0] if near else None, config.trials, stop)

    job = Job(
        name=name_study(inputs), folder=folder.path, scores=folder.state["scores"],
        space=inputs.space, directions=config.directions, n_epochs=inputs.n_epochs,
        n_trials=config.trials, storage=config.storage, seed=config.seed,
        train=lambda trial: train(folder, inputs, trial, is_over),
        train_factory=partial(open_training, replace(config, progress=False), get_switches()),
        update_trials=update_trials, is_over=is_over,
        previous=[SearchResult.open(run).history for run in config.previous],
    )  # fmt: skip
    trials = inputs.engine(job)
    update_trials(trials)
    if find_best(trials, config.metric, todo.n_images["val"]) is None:
        failed = next((f": {t.error}" for t in trials if t.error), "")
        raise ValueError(f"none of {len(trials)} trials came to a value{failed}{budget.hint}")
    spent = budget.seconds is not None and (config.trials or math.inf) > len(trials)
    note = f"{len(trials)} trials" + (", then the budget was spent" if spent else "")
    folder.leave("tune", note)


def open_training(
    config: SearchConfig, switches: Mapping[str, Any]
) -> Callable[[Trial], Iterator[Trial]]:
    """Return how a search under way trains, in another process that sees its folder."""
    set_switches(switches)
    folder, budget = _open(config)
    inputs = _begin(config, folder, budget)
    todo = _measure_workload(folder, budget, inputs)

    def train_one(trial: Trial) -> Iterator[Trial]:
        end = budget.end_of_trials(todo, folder.trials)
        return train(folder, inputs, trial, lambda: budget.now() >= end)

    return train_one


# Train and test ---------------------------------------------------------------------------------
def finish(folder: RunFolder, budget: Budget, inputs: Inputs, todo: Workload) -> None:
    """Train the winner once more, test it, and write the report."""
    if folder.is_done("test"):
        return
    best = find_best(folder.trials, todo.metric, todo.n_images["val"])
    assert best is not None
    if not folder.is_done("train"):
        folder.enter("train", "training")
        folder.leave("train", train_winner(folder, budget, inputs, todo, best))
    for trial in folder.trials:
        if trial.number != best.number:
            folder.delete_weights(trial.folder)
    folder.enter("test", "testing")
    found = evaluate_winner(folder, inputs, best)
    state = folder.state
    winner = summarise(best, todo.metric, state["costs"]) | found
    spent = any("budget" in s["note"] for s in state["stages"])
    first = inputs.config.kind.monitors[0]
    note = f"{call(first)} {tell(found['test'][first], found['test_interval'])}"
    forget_weights(folder)
    # at once: a search whose last stage is done, but which has no winner, would never end
    folder.leave("test", note, best=winner, status="budget spent" if spent else "done")
    write_report(folder.path, images=open_picture)
