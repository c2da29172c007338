"""`search`: from labelled images and candidate backbones to the fine-tuned winner.

==========  =======================================================================================
stage       what happens
==========  =======================================================================================
rank        candidates that break a constraint are left out, the others ranked on training images
shortlist   the best `keep` go on; where the ranking cannot tell them apart, it abstains, and a
            short fine-tuning of each plausible candidate decides: the first epochs of its first
            trial, which goes on from there
tune        an engine (`sfda_tune.pipelines.engines`) fine-tunes the survivors with varying
parameters train       the winner once more, on training and validation images, for its best number
of epochs test        on images that nothing above has seen ==========
=======================================================================================

All state is in the folder RUN: the same call goes on where another was stopped, and several at a
time share the trials. Locks on files, which end with their process, keep them apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import pickle
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

import sfda_tune
from sfda_tune.backbones.devices import resolve_device, use_threads
from sfda_tune.backbones.loading import describe
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.copies import group_twins
from sfda_tune.data.decoding import UnreadableImage
from sfda_tune.data.splits import fingerprint, join, split_images, tell_gaps, tell_shared
from sfda_tune.finetuning.config import MONITORS, FinetuneConfig
from sfda_tune.finetuning.epochs import OutOfTimeError, measure
from sfda_tune.finetuning.images import look_at, own_randomness
from sfda_tune.finetuning.models import load_model, predict
from sfda_tune.finetuning.run import BEST, CHECKPOINT, FineTuning, finetune
from sfda_tune.finetuning.shared import SharedWork
from sfda_tune.pipelines.budget import RankingWatch, ends_later, parse_budget
from sfda_tune.pipelines.clock import Beat, Clock
from sfda_tune.pipelines.engines import DIED, Job, Trial, attempt, load_engine, read_trial
from sfda_tune.pipelines.latency import measure_latency, time_forward
from sfda_tune.pipelines.progress import SilentBoard, as_board
from sfda_tune.pipelines.ranking import RankingInterruptedError, rank
from sfda_tune.pipelines.result import SearchResult, write_predictions
from sfda_tune.pipelines.spaces import default_space, open_space
from sfda_tune.report.html import write_report
from sfda_tune.selection.diagnostics import diagnose
from sfda_tune.selection.evaluation import accuracy_interval
from sfda_tune.values.features import Backbone
from sfda_tune.values.files import read_json, write_json, write_text
from sfda_tune.values.formats import PROVENANCE, SPLITS, STATE, TRIAL
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.redaction import hide_secrets, without_secrets
from sfda_tune.values.redaction import redact as _redact
from sfda_tune.values.text import require

__all__ = ["search"]

KEEP = 3
RANK_SHARE, SHORT_SHARE, RETRAIN_SHARE = 0.5, 0.4, 0.3  # at most so much of a budget
# may differ when a search goes on
FREE = ("workers", "progress", "out", "cache", "device", "max_unreadable")
LIMITS = ("trials", "budget")  # may grow
LOCAL = ("dataset", "storage", "plugins", "sfda_tune")  # may differ between machines


def search(
    dataset: Any,
    backbones: Any = "demo:*",
    *,
    trials: int | None = None,
    budget: str | float | None = None,
    engine: str = "optuna",
    storage: str | None = None,
    workers: int = 1,
    keep: int | None = None,
    objective: str | Sequence[str] = "accuracy",
    metric: str = "accuracy",
    max_params: float | None = None,
    max_latency: float | None = None,
    space: Any = None,
    epochs: int | None = None,
    samples: int | None = None,
    test: Any = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_unreadable: float = 0.1,
    device: str = "auto",
    precision: str = "float32",
    plugins: Iterable[str] = (),
    cache: bool | str | os.PathLike[str] | None = True,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: Any = False,
) -> SearchResult:
    """Rank, tune and fine-tune backbones; return the best model and its test.

    The same call with the same `out` goes on with what was interrupted, and may run several times
    at once, on one machine or on several that share the folder (or, with `storage`, at least the
    database). With more `trials` or a larger `budget` it goes on where the smaller one ended.

    Parameters
    ----------
    dataset : object
        See `open_dataset`.
    backbones : str, Backbone, mapping, or an iterable of these, default "demo:*"
        See `sfda_tune.backbones.specs`.
    trials : int, optional
        How many fine-tunings, some of them stopped early. Default: 12 if there is no `budget`.
    budget : str or float, optional
        Time for everything, in seconds or as "90s", "45m", "1h30m". Trials are stopped, inside an
        epoch if need be, so that final training and test fit in.
    engine : str, default "optuna"
        See `sfda_tune.pipelines.engines`.
    storage : str, optional
        URL of the engine's database; default: SQLite in `out`.
    workers : int, default 1
        Processes that train at the same time; on several GPUs, each its own.
    keep : int, default 3
        How many backbones are tuned.
    objective : "accuracy", or ("accuracy", "latency") or ("accuracy", "params")
        With two, the front between them is searched; the winner is the best by the first.
    metric : {"accuracy", "balanced_accuracy", "macro_f1", "log_loss"}
        What "accuracy" means.
    max_params : float, optional
    max_latency : float, optional
        Milliseconds for one image on this device. Backbones above a maximum are left out.
    space : mapping, path or Space, optional
        What may vary, see `sfda_tune.pipelines.spaces`; default: `default_space`.
    epochs : int, optional
        Of a full trial; default: half of what `FinetuneConfig` says for so many images.
    samples : int, optional
        Use a stratified sample of so many images.
    test : float or data set, optional
        Part to hold out, or the test images. Default: the data set's own test part, else 0.2.
    split, image_column, label_column
        See `open_dataset`. Without `split` the data set's own validation part is used, too.
    max_unreadable : float, default 0.1
        Fraction of unreadable images, of all, above which the data set is refused. They are looked
        for once, before anything is ranked, and left out of everything.
    device, precision, plugins, cache
        See `rank`.
    seed : int, default 0
        With one worker, no budget and one objective, the same seed gives the same trials.
    out : path, optional
        The folder RUN; default: a new temporary one.
    progress : bool or Board, default False

    Returns
    -------
    SearchResult

    Raises
    ------
    ValueError, DatasetError, BackboneError
        If an argument cannot be understood, nothing satisfies the constraints, `out` holds another
        search, or no trial came to a value.

    Examples
    --------
    >>> quick = {"trials": 1, "epochs": 1, "samples": 100, "cache": False}
    >>> found = search("digits", "demo:resnet_glyphs", **quick)
    >>> found.best["backbone"], found.test["accuracy"] > 0.5
    ('demo:resnet_glyphs', True)
    """
    given = dict(locals())
    given["out"] = Path(tempfile.mkdtemp(prefix="sfda-tune-") if out is None else out).absolute()
    given["trials"] = 12 if trials is None and budget is None else trials
    given["keep"] = KEEP if keep is None else keep
    given["objective"] = (objective,) if isinstance(objective, str) else tuple(objective)
    given["plugins"] = tuple(plugins)
    _check(given)
    with (
        _as_found(device),
        _share_cores(workers),
        without_secrets(storage),
        as_board(progress) as board,
    ):
        _Search(given, board).run()
    return SearchResult.open(given["out"])


def _work(given: dict[str, Any], number: int) -> None:
    """Be a further worker of a search, in a process of its own."""
    import torch

    if given["device"] == "auto" and torch.cuda.device_count() > 1:
        given = given | {"device": f"cuda:{number % torch.cuda.device_count()}"}
    share, note = _share_cores(given["workers"]), _worker_note(given["out"], number)
    note.unlink(missing_ok=True)
    with as_board(False) as board, share, suppress(KeyboardInterrupt):
        try:
            _Search(given, board).run(number)
        except Exception as error:  # its traceback follows on standard error
            write_text(note, hide_secrets(f"{type(error).__name__}: {error}", given["storage"]))
            raise


def _worker_note(folder: Path, number: int) -> Path:
    """Return where a worker writes why it ends."""
    return folder / f"worker-{number}.txt"


def _open_training(given: dict[str, Any]) -> Callable[[Trial], Iterator[Trial]]:
    """Return how a search under way trains, in another process that sees its folder."""
    search = _Search(given, SilentBoard())
    search.begin()

    def train(trial: Trial) -> Iterator[Trial]:
        search.hear(map(read_trial, search.state["trials"]))
        return search.train_fully(trial)

    return train


class _Search:
    """A search under way, in one of the processes that share its folder."""

    def __init__(self, given: dict[str, Any], board: Any) -> None:
        self.given, self.board, self.folder = given, board, given["out"]
        self.kind: Any = STATE  # what `state` looks for in search.json
        known = self.state["seconds"]["total"] if (self.folder / "search.json").is_file() else 0.0
        self.now = Clock(self.folder / "seconds.json", known)  # all times are such seconds
        self.begun = self.now()
        self.budget = parse_budget(given["budget"])
        self.sign = -1.0 if given["metric"] == "log_loss" else 1.0
        first: Literal["maximize", "minimize"] = "minimize" if self.sign < 0 else "maximize"
        self.directions = (first, "minimize")[: len(given["objective"])]
        self.device = resolve_device(given["device"])
        self.stop = self.deadline = math.inf  # trials end at `stop`
        self.known: list[Trial] = []  # trials with a value
        self.best: Trial | None = None  # of these
        self.shared = SharedWork()

    def run(self, number: int = 0) -> None:
        """Go through the stages that are not done yet; helpers (`number` > 0) only tune."""
        self.folder.mkdir(parents=True, exist_ok=True)
        helpers: list[Any] = []
        stack = ExitStack()
        try:
            with self.lock("stage"):
                self.begin()
                if self.is_done("test"):
                    if not (self.folder / "report.html").exists():  # killed before it was written
                        write_report(self.folder)
                    return
                stack.enter_context(Beat(self.now.write, 1.0))
                self.rank()
                self.shorten()
            if number == 0 and not self.is_done("tune"):
                helpers = self.start_helpers()
            self.compete()
            with self.lock("stage"):
                self.decide()
            self.tune()
            if number == 0:
                self.await_helpers(helpers)
                with self.lock("stage"):
                    self.finish()
        except KeyboardInterrupt:
            with suppress(FileNotFoundError), self.edit() as state:  # or it had not begun
                state["status"] = "interrupted"
            raise
        finally:
            for helper in helpers:
                helper.terminate()
            stack.close()

    # The folder ---------------------------------------------------------------------------------
    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        from filelock import FileLock

        with FileLock(self.folder / f"{name}.lock"):
            yield

    @property
    def state(self) -> dict[str, Any]:
        found = read_json(self.folder / "search.json", self.kind)
        self.kind = {}  # what is written since is our own
        return found

    @contextmanager
    def edit(self) -> Iterator[dict[str, Any]]:
        """Change search.json, one process at a time."""
        with self.lock("state"):
            state = self.state
            yield state
            state["seconds"]["total"] = max(self.now(), state["seconds"]["total"])
            write_json(self.folder / "search.json", state)

    def is_done(self, name: str) -> bool:
        return any(s["name"] == name and s["seconds"] is not None for s in self.state["stages"])

    def enter(self, name: str, status: str) -> None:
        """Note that a stage begins, or goes on."""
        self.board.enter(name)
        with self.edit() as state:
            state["status"] = status
            if all(s["name"] != name for s in state["stages"]):
                entry = {"name": name, "started": time.time(), "seconds": None, "note": ""}
                state["stages"].append(entry)

    def leave(self, name: str, note: str, **changes: Any) -> None:
        """Note that a stage is done, and what it found."""
        with self.edit() as state:
            entry = next(s for s in state["stages"] if s["name"] == name)
            if entry["seconds"] is None:  # all that other stages did not take, nor any pause
                others = sum(s["seconds"] or 0.0 for s in state["stages"])
                entry |= {"seconds": max(0.0, self.now() - others), "note": note}
            state |= changes
        self.board.leave(name, note)

    def begin(self) -> None:
        """Open data and candidates; begin the folder, or check that it is of this search."""
        g = self.given
        self.space = None if g["space"] is None else open_space(g["space"])
        candidates = resolve_backbones(g["backbones"], plugins=g["plugins"])
        self.backbones = {b.name: b for b in candidates}
        self.engine = load_engine(g["engine"])
        self.parts, self.rows, self.sources = split_images(g, self.look)
        config = {"format": 1, "sfda_tune": sfda_tune.__version__, **_jsonable(g)}
        config["data"] = fingerprint(self.parts)
        n = len(self.parts["train"])
        self.space = self.space or default_space(n)
        auto = max(5, round(30 * min(1, 200 / n) ** (1 / 3)))
        self.epochs = g["epochs"] or max(3, round(auto / 2))
        fixed = {k: v for k, v in config.items() if k not in FREE}
        common = [[k, v] for k, v in sorted(fixed.items()) if k not in (*LOCAL, *LIMITS)]
        digest = hashlib.blake2b(json.dumps(common).encode(), digest_size=8)
        self.name = f"sfda-tune {digest.hexdigest()}"
        path = self.folder / "config.json"
        if path.is_file():
            old = read_json(path, dict.fromkeys(LIMITS, object))
            shown = {k: _redact(v) if k == "storage" else v for k, v in old.items()}
            grown = any(ends_later(config[key], old[key]) for key in LIMITS)
            for key in fixed:
                changed = key != "sfda_tune" and shown.get(key) != fixed[key]
                if changed and not (grown and key in LIMITS):
                    raise ValueError(
                        f"`out` {str(self.folder)!r} holds a search with {key} "
                        f"{shown.get(key)!r}, but now {key} is {fixed[key]!r}; take the same"
                        f"{', or more' if key in LIMITS else ''}, or another folder."
                    )
            if shown != old:  # an earlier version hid less
                write_json(path, shown)
                with self.edit() as state:
                    state["storage"] = shown["storage"]
            if grown:
                self.reopen()
                write_json(path, config)
        else:
            self.create(config)
        self.deadline = self.budget or math.inf

    def look(self, opened: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
        """Return the rows that can be read, and a code for each training image, as `group_twins`.

        The images are looked at when the search begins.
        """
        codes = None
        if (self.folder / "config.json").is_file():
            splits = read_json(self.folder / "splits.json", SPLITS)
            bad = splits.get("left_out", {})
            if "copies" in splits:  # else an earlier version compared bytes
                codes = np.arange(len(opened["train"]))
                for rows in splits["copies"]:
                    codes[rows] = rows[0]
        else:
            limit = self.given["max_unreadable"]
            seen = {name: look_at(data) for name, data in opened.items()}
            bad = self.unreadable = {name: found for name, (found, _) in seen.items()}
            self.pixels = {name: digests for name, (_, digests) in seen.items()}
            codes = self.twins = group_twins(opened["train"], self.pixels["train"])
            self.unreadable_names = {
                opened[name].item_name(row): why for name in bad for row, why in bad[name].items()
            }
            n, total = sum(map(len, bad.values())), sum(map(len, opened.values()))
            if n > limit * total:
                item, why = next(iter(self.unreadable_names.items()))
                raise DatasetError(
                    f"{n} of the {total} images cannot be read, more than "
                    f"max_unreadable={limit:g} allows; the first is {item} ({why})"
                )
        rows = {name: np.arange(len(data)) for name, data in opened.items()}
        left = {name: np.setdiff1d(rows[name], list(bad.get(name, ()))) for name in rows}
        return left, codes

    def create(self, config: dict[str, Any]) -> None:
        g = self.given
        getattr(self.engine, "check_storage", lambda url: None)(g["storage"])
        costs, excluded = self.measure_costs()
        of = {name: self.pixels.get(name, self.pixels["train"]) for name in self.parts}
        digests = {name: [of[name][row] for row in rows] for name, rows in self.rows.items()}
        shared = tell_shared(self.parts, digests)
        copies = np.flatnonzero(np.bincount(self.twins) > 1)
        if len(excluded) == len(self.backbones):  # nothing is written: it may be called otherwise
            name, why = next(iter(excluded.items()))
            raise ValueError(
                f"`backbones` leave none to rank, all {len(excluded)} are excluded; {name}: {why}"
            )
        write_json(self.folder / "environment.json", _environment(self.device, g["engine"]))
        write_json(
            self.folder / "splits.json",
            {"fingerprint": config["data"], **self.rows, "test_source": self.sources["test"]}
            | {"left_out": {name: sorted(rows) for name, rows in self.unreadable.items()}}
            | {"copies": [np.flatnonzero(self.twins == c).tolist() for c in copies]},
        )
        state = {
            "format": 1, "status": "ranking", "dataset": self.parts["train"].name,
            "classes": list(self.parts["train"].classes),
            "n_images": {name: len(part) for name, part in self.parts.items()},
            "sources": self.sources, "unreadable": self.unreadable_names,
            "notes": [*shared, *tell_gaps(self.parts)], "stages": [],
            "candidates": list(self.backbones), "excluded": excluded,
            "survivors": [], "separable": None, "decision": "", "objectives": list(g["objective"]),
            "metric": g["metric"], "engine": g["engine"], "storage": _redact(g["storage"]),
            "trials": [], "short_trials": [], "best": None, "front": [], "costs": costs,
            "seconds": {"total": 0.0, "train_everything_estimate": None},
        }  # fmt: skip
        for note in shared:  # the other notes stand with the result
            warnings.warn(f"{note}.", stacklevel=2)
        write_json(self.folder / "search.json", state)
        write_json(self.folder / "config.json", config)  # last: whoever finds it finds all

    @property
    def more_time(self) -> str:
        seconds = self.budget
        return "" if seconds is None else f"; `budget` was {seconds:g} s: give more"

    def reopen(self) -> None:
        """Undo what followed the last trial: more are to come."""
        fresh: dict[str, Any] = {}
        if not self.state["trials"]:
            fresh["costs"], fresh["excluded"] = self.measure_costs()
        with self.edit() as state:
            state |= fresh
            kept = () if fresh else ("rank", "shortlist", "tune")
            state["stages"] = [s for s in state["stages"] if s["name"] in kept]
            state["separable"] = state["separable"] if kept else None
            for stage in state["stages"][2:]:
                stage |= {"seconds": None, "note": ""}
        for folder in (self.folder / "trials").glob("final" if kept else "*"):
            shutil.rmtree(folder, ignore_errors=True)

    # Rank and shortlist -------------------------------------------------------------------------
    @cached_property
    def ranking(self) -> Ranking:
        return Ranking.from_json(self.folder / "ranking.json")

    def rank(self) -> None:
        if self.is_done("rank"):
            return
        g = self.given
        self.enter("rank", "ranking")
        excluded = self.state["excluded"]
        admitted = [b for name, b in self.backbones.items() if name not in excluded]
        end = self.begun + RANK_SHARE * (self.deadline - self.begun)
        watch = RankingWatch(self.board, lambda: self.now() > end)
        try:
            ranking = rank(
                self.parts["train"], admitted, seed=g["seed"], device=self.device,
                precision=g["precision"], cache=g["cache"], plugins=g["plugins"], progress=watch,
                max_unreadable=g["max_unreadable"],
            )  # fmt: skip
        except RankingInterruptedError as stop:
            if not watch.is_over:
                raise
            ranking = stop.ranking
        if len(ranking.failed) == len(ranking):
            name, why = next(iter(ranking.failed.items()))
            hint = self.more_time if watch.is_over else ""
            raise ValueError(f"no backbone could be ranked; {name}: {why}{hint}")
        ranking.to_json(self.folder / "ranking.json")
        excluded |= ranking.failed
        note = f"{len(ranking) - len(ranking.failed)} of {len(self.backbones)} backbones ranked"
        note += ", then their part of the budget was spent" * watch.is_over
        note += "".join(f"; without {name}: {why}" for name, why in list(excluded.items())[:3])
        note += f"; and {len(excluded) - 3} more" * (len(excluded) > 3)
        self.leave("rank", note, excluded=excluded)

    def measure_costs(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return parameters and, if they matter, latencies; and who breaks a constraint."""
        g, costs, excluded = self.given, {}, {}
        timed = g["max_latency"] is not None or "latency" in g["objective"]
        for name, backbone in self.backbones.items():
            cost: dict[str, Any] = dict.fromkeys(("latency_ms", "n_params", "seconds_per_epoch"))
            costs[name] = cost
            try:
                n = cost["n_params"] = describe(backbone).n_params
                if g["max_params"] is not None and n > g["max_params"]:
                    excluded[name] = f"{n / 1e6:.3g} M parameters > {g['max_params'] / 1e6:.3g} M"
                elif timed:
                    ms = cost["latency_ms"] = measure_latency(backbone, self.device)
                    if g["max_latency"] is not None and ms > g["max_latency"]:
                        excluded[name] = f"{ms:.3g} ms > {g['max_latency']:.3g} ms on this device"
            except Exception as error:  # a backbone that cannot be opened is one candidate less
                excluded[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return costs, excluded

    def shorten(self) -> None:
        """Choose the survivors, or find out that the ranking cannot."""
        if self.is_done("shortlist") or self.state["separable"] is not None:
            return
        self.enter("shortlist", "ranking")
        keep, scored = self.given["keep"], self.ranking.shortlist(len(self.ranking))
        why = [d.message for d in diagnose(self.ranking) if d.kind in ("ties", "few_samples")]
        try:
            plausible = self.ranking.shortlist(probability=0.95)
        except ValueError as error:  # the metric is no mean over images
            plausible, why = scored, [*why, str(error)]
        plausible = sorted(plausible, key=scored.index)
        if len(scored) <= keep:
            decision = f"all {len(scored)} ranked backbones are tuned, for `keep` is {keep}"
            self.settle(True, scored, {name: self.ranking[name] for name in scored}, decision)
        elif len(plausible) <= keep and not why:
            decision = (
                f"the ranking is clear: with probability .95 the best by score is among "
                f"{', '.join(plausible)}; the first {keep} are tuned"
            )
            kept = [*plausible, *(name for name in scored if name not in plausible)][:keep]
            self.settle(True, kept, {name: self.ranking[name] for name in kept}, decision)
        else:
            plausible = [
                n for n in scored if n in plausible or n in scored[: 2 * keep * bool(why)]
            ]
            reason = why[0].rstrip(".") if why else f"{len(plausible)} may be the best by score"
            with self.edit() as state:
                state["separable"], state["plausible"] = False, plausible
                state["decision"] = f"the ranking abstains: {reason}"

    def settle(
        self, separable: bool, kept: list[str], scores: Mapping[str, float], decision: str
    ) -> None:
        found = {"separable": separable, "survivors": kept, "decision": decision}
        scores = {name: scores[name] for name in kept}
        self.leave("shortlist", decision, **found, scores=scores)

    def compete(self) -> None:
        """Give each plausible candidate a short fine-tuning with the default parameters."""
        from filelock import FileLock, Timeout

        if self.is_done("shortlist"):
            return
        assert self.space is not None
        params, names = self.space.default(), self.state["plausible"]
        self.stop = self.now() + SHORT_SHARE * (self.deadline - self.now())
        for patience in (0, -1):  # first those that nobody has, then wait for the others
            for k, name in enumerate(names):
                folder = self.folder / "trials" / f"short-{k}"
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    with FileLock(folder / "worker.lock", timeout=patience):
                        if self.now() < self.stop and not (folder / "trial.json").is_file():
                            self.board.say(f"short fine-tuning of {name}", k, len(names))
                            trial = Trial(k, name, params, folder.name, started=time.time())
                            trial = attempt(self.train_shortly, trial, lambda _: False)
                            write_json(folder / "trial.json", asdict(trial))
                except Timeout:
                    continue

    def decide(self) -> None:
        """Keep the best of the short fine-tunings."""
        if self.is_done("shortlist"):
            return
        state, keep = self.state, self.given["keep"]
        found = sorted((self.folder / "trials").glob("short-*/trial.json"))
        short = [read_json(path, TRIAL) for path in found]
        values = {t["backbone"]: self.sign * t["value"] for t in short if t["value"] is not None}
        order = sorted(values, key=lambda name: -values[name])
        order += [name for name in state["plausible"] if name not in values]
        low = min(values.values(), default=0.0)
        scores = {name: values.get(name, low - k - 1) for k, name in enumerate(order)}
        with self.edit() as state:
            state["short_trials"] = short
        kept = order[:keep]
        for trial in short:
            if trial["backbone"] not in kept:
                self.forget(trial["folder"])
        decision = (
            f"{state['decision']}; short fine-tunings of {len(values)} candidates decided "
            f"for {', '.join(kept)}"
        )
        self.settle(False, kept, scores, decision)

    # Tune ---------------------------------------------------------------------------------------
    def start_helpers(self) -> list[Any]:
        """Start the other workers: processes that make the same call."""
        workers = self.given["workers"]
        if workers == 1 or getattr(self.engine, "spreads", False):
            return []
        spawn = multiprocessing.get_context("spawn")
        given = self.given | {"progress": False}
        helpers = [spawn.Process(target=_work, args=(given, k)) for k in range(1, workers)]
        try:
            for helper in helpers:
                helper.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"`workers` must be 1 but is {workers}: data or backbones cannot be sent to other "
                f"processes ({error}); use module-level functions instead of lambdas."
            ) from error
        return helpers

    def await_helpers(self, helpers: list[Any]) -> None:
        """Wait for the other workers; say which of them failed, and why.

        Others have made, or will make, the trials of one that failed.
        """
        for number, helper in enumerate(helpers, 1):
            left = self.stop - self.now()
            helper.join(None if self.budget is None else max(1.0, left + 0.01 * self.budget))
            code = helper.exitcode
            if code == 0:
                continue
            note = _worker_note(self.folder, number)
            if code is None:
                why = "was stopped, for it did not see that the budget was spent"
                helper.terminate()
            elif code < 0:
                why = f"was ended by signal {-code}{', perhaps for want of memory' * (code == -9)}"
            else:
                why = f"failed with code {code}"
            if code and note.is_file():
                why += f": {note.read_text(encoding='utf-8').strip()[:300]}"
            text = f"worker {number} {why}; the others have done its work"
            warnings.warn(text, stacklevel=2)
            with self.edit() as state:
                state.setdefault("warnings", []).append(text)

    def tune(self) -> None:
        if self.is_done("tune"):
            return
        assert self.space is not None
        g, state = self.given, self.state
        self.enter("tune", "tuning")
        self.limit()
        job = Job(
            name=self.name, folder=self.folder, scores=state["scores"], space=self.space,
            directions=self.directions, n_epochs=self.epochs, n_trials=g["trials"],
            storage=g["storage"], seed=g["seed"], train=self.train_fully, tell=self.tell,
            remake=partial(_open_training, self.given | {"progress": False}),
            is_over=self.is_over,
        )  # fmt: skip
        trials = self.engine(job)
        self.tell(trials)
        if self.best is None:
            failed = next((f": {t.error}" for t in trials if t.error), "")
            raise ValueError(
                f"none of {len(trials)} trials came to a value{failed}{self.more_time}"
            )
        spent = self.budget is not None and (g["trials"] or math.inf) > len(trials)
        note = f"{len(trials)} trials" + (", then the budget was spent" if spent else "")
        self.leave("tune", note)

    def train_shortly(self, trial: Trial) -> Iterator[Trial]:
        """Train the first epochs of a full fine-tuning."""
        last = max(1, min(3, self.epochs // 4))
        with closing(self.train(trial)) as steps:
            for now in steps:
                yield now
                if now.epochs[-1]["number"] >= last:
                    return

    def train_fully(self, trial: Trial) -> Iterator[Trial]:
        self.take_over(trial)
        yield from self.train(trial)

    def take_over(self, trial: Trial) -> None:
        """Give a trial the epochs that its backbone had with the same parameters before."""
        assert self.space is not None
        plausible, own = self.state.get("plausible", []), self.folder / "trials" / trial.folder
        if trial.backbone not in plausible or dict(trial.params) != self.space.default():
            return
        short = self.folder / "trials" / f"short-{plausible.index(trial.backbone)}"
        if not (own / CHECKPOINT).is_file():
            for name in (BEST, CHECKPOINT):  # without the latter, the former is not looked at
                with suppress(FileNotFoundError):
                    os.replace(short / name, own / name)

    def forget(self, folder: str) -> None:
        """Delete the weights of a trial."""
        for weights in (self.folder / "trials" / folder).glob("*.safetensors"):
            weights.unlink(missing_ok=True)

    def config(self, params: Mapping[str, Any]) -> FinetuneConfig:
        assert self.space is not None
        g = self.given
        more = {"monitor": g["metric"], "seed": g["seed"], "precision": g["precision"]}
        return self.space.config(params, epochs=self.epochs, **more)

    def train(self, trial: Trial) -> Generator[Trial, None, None]:
        """Fine-tune on the training images; yield the trial after every epoch."""
        begun = self.now()
        with finetune(
            self.backbones[trial.backbone],
            self.parts["train"],
            self.config(trial.params),
            val=self.parts["val"],
            checkpoint_dir=self.folder / "trials" / trial.folder,
            device=self.device,
            max_unreadable=self.given["max_unreadable"],
            shared=self.shared,
            should_stop=self.is_over,
        ) as run:
            if run.history:  # of a dead worker
                yield self.describe(trial, run, begun)
            for _ in run:
                yield self.describe(trial, run, begun)

    def is_over(self) -> bool:
        """Tell whether the time for trials is over."""
        return self.now() >= self.stop

    def describe(self, trial: Trial, run: FineTuning, begun: float) -> Trial:
        """Return the trial as it stands after the last epoch."""
        metric, last = self.given["metric"], run.history[-1]
        epochs = tuple(
            {
                "number": e.number,
                "value": getattr(e, metric),
                "log_loss": e.log_loss,
                "train_loss": e.train_loss if math.isfinite(e.train_loss) else None,
                "seconds": e.seconds,
            }
            for e in run.history
        )
        cost = self.state["costs"][trial.backbone]
        costs = {"latency": cost["latency_ms"], "params": cost["n_params"]}
        values = (last.best, *(float(costs[name]) for name in self.given["objective"][1:]))
        seconds = max(self.now() - begun, sum(e["seconds"] for e in epochs))
        return replace(trial, value=last.best, values=values, seconds=seconds, epochs=epochs)

    def hear(self, trials: Iterable[Trial]) -> None:
        self.known = [t for t in trials if t.value is not None]
        self.best = max(self.known, key=self.goodness, default=None)
        self.limit()

    def tell(self, trials: Sequence[Trial]) -> None:
        """Hear of all trials: write them down, show them, delete weights nobody needs any more."""
        self.hear(trials)
        with self.edit() as state:
            if any(s["name"] == "train" for s in state["stages"]):  # another process was quicker
                return
            state["trials"] = [asdict(t) for t in trials]
            state["front"] = self.find_front()
            for name, cost in state["costs"].items():
                spent = [e["seconds"] for t in self.of(name) for e in t.epochs[1:]]
                cost["seconds_per_epoch"] = float(np.mean(spent)) if spent else None
            state["seconds"]["train_everything_estimate"] = self.estimate(state["costs"])
            if self.best is not None:
                state["best"] = self.summarise(self.best, state["costs"])
        for t in trials:
            if t.state != "running" and t != self.best and t.error != DIED:  # it may go on yet
                self.forget(t.folder)
        stop = time.time() + self.stop - self.now()  # as people tell it
        self.board.show(trials, self.best, self.given["trials"], stop)

    def of(self, backbone: str) -> list[Trial]:
        return [trial for trial in self.known if trial.backbone == backbone]

    def goodness(self, trial: Trial) -> tuple[float, float, int]:
        """Return what to compare trials by: the value; equal ones by the log-loss there."""
        values = [e["value"] for e in trial.epochs]
        at = values.index(trial.value)
        losses = [e["log_loss"] for e in trial.epochs[at:] if e["value"] == trial.value]
        return self.sign * float(trial.value or 0.0), -min(losses), -trial.number

    def best_epoch(self, trial: Trial) -> dict[str, Any]:
        return max(trial.epochs, key=lambda e: (self.sign * e["value"], -e["log_loss"]))

    def summarise(self, trial: Trial, costs: Mapping[str, Any]) -> dict[str, Any]:
        at = self.best_epoch(trial)
        return {
            "trial": trial.number,
            "backbone": trial.backbone,
            "params": dict(trial.params),
            "val": {self.given["metric"]: trial.value, "log_loss": at["log_loss"]},
            "epochs": at["number"],
            "test": None,
            **{k: costs[trial.backbone][k] for k in ("latency_ms", "n_params")},
        }

    def find_front(self) -> list[int]:
        """Return the trials that no other one beats in all objectives."""
        if len(self.directions) == 1:
            return []
        signs = np.array([1.0 if d == "maximize" else -1.0 for d in self.directions])
        points = {t.number: signs * np.array(t.values) for t in self.known}
        return [
            n
            for n, p in points.items()
            if not any((q >= p).all() and (q > p).any() for q in points.values())
        ]

    def estimate(self, costs: Mapping[str, Any]) -> float | None:
        """Return what as many epochs for every candidate as the longest trial had would take.

        A backbone that was not tuned: by its forward speed, compared with those that were.
        """
        longest = max((t.epochs[-1]["number"] for t in self.known), default=0)
        speed = {s.backbone: s.details.get("images_per_second") for s in self.ranking.scores}
        known = {n: c["seconds_per_epoch"] for n, c in costs.items() if c["seconds_per_epoch"]}
        ratios = [seconds * speed[n] for n, seconds in known.items() if speed.get(n)]
        if not ratios:
            return None
        each = [known.get(n, np.median(ratios) / s) for n, s in speed.items() if n in known or s]
        return float(longest * sum(each))

    def limit(self) -> None:
        """Say when trials must stop, so that training and testing the best fits in."""
        if self.budget is None:
            return
        slack = 0.2 * self.seconds_to_train() + 0.01 * self.budget  # no trial stops at once
        needed = self.seconds_to_test() + self.seconds_to_train() + slack
        if self.seconds_to_train() > RETRAIN_SHARE * self.budget:
            needed = self.seconds_to_test()  # its checkpoint will do
        self.stop = self.deadline - needed - getattr(self.engine, "seconds_to_end", 0.0)

    def seconds_to_test(self) -> float:
        n = len(self.parts["test"])
        decoding = n * self.seconds_per_image
        if self.best is None:
            return 0.05 * (self.budget or 0.0) + 0.5 + decoding
        speed = self.ranking.score(self.best.backbone).details.get("images_per_second") or 100.0
        return 0.02 * (self.budget or 0.0) + 1.0 + 2 * n / speed + decoding

    @cached_property
    def seconds_per_image(self) -> float:
        """How long an image takes to be decoded: the mean of a few."""
        images, begun, n = self.parts["train"], self.now(), 0
        for row in np.linspace(0, len(images) - 1, 8).astype(int):
            with suppress(UnreadableImage):
                images.load(row)
            n += 1
            if self.now() - begun > 0.005 * (self.budget or math.inf):
                break
        return (self.now() - begun) / n

    def seconds_to_train(self) -> float:
        """Return how long the best takes on training and validation images."""
        if self.best is None:
            return 0.0
        last, probe = self.best_epoch(self.best)["number"], 0.0
        spent = sum(e["seconds"] for e in self.best.epochs if 0 < e["number"] <= last)
        for trial in self.of(self.best.backbone):  # the first of them started the head for all
            probe = max([probe, *(e["seconds"] for e in trial.epochs if e["number"] == 0)])
        n, more = len(self.parts["train"]), len(self.parts["val"])
        reading = (n + more) * self.seconds_per_image  # to know them again
        return 0.5 + reading + (probe + spent) * (1 + more / n)

    # Train and test -----------------------------------------------------------------------------
    def finish(self) -> None:
        if self.is_done("test"):
            return
        if self.best is None:  # another process has tuned
            self.hear(map(read_trial, self.state["trials"]))
        assert self.best is not None
        if not self.is_done("train"):
            self.enter("train", "training")
            self.leave("train", self.train_winner(self.best))
        self.enter("test", "testing")
        result = self.test(self.best)
        spent = any("budget" in s["note"] for s in self.state["stages"])
        low, high = self.interval
        best = self.summarise(self.best, self.state["costs"]) | {
            "test": result,
            "test_interval": self.interval,
            "latency_ms": self.latency,
        }
        note = f"accuracy {result['accuracy']:.4f} (95 %: {low:.4f} to {high:.4f})"
        # at once: a search whose last stage is done, but which has no winner, would never end
        self.leave("test", note, best=best, status="budget spent" if spent else "done")
        write_report(self.folder)

    def train_winner(self, best: Trial) -> str:
        """Write RUN/model and return how it came about."""
        backbone, val = self.backbones[best.backbone], self.parts["val"]
        config, last = self.config(best.params), self.best_epoch(best)["number"]
        why = "for want of time: the budget was spent"
        both = join(self.parts["train"], val)
        self.stop = self.deadline - self.seconds_to_test()
        has_checkpoint = any((self.folder / "trials" / best.folder).glob("*.safetensors"))
        if not has_checkpoint or self.now() + self.seconds_to_train() <= self.stop:
            folder = self.folder / "trials" / "final"
            try:
                run = _ToTheEnd(
                    backbone, (both, val), config, folder, True, self.device, None,
                    should_stop=self.is_over if has_checkpoint else None,
                )  # fmt: skip
                with run:
                    while (run.history[-1].number if run.history else -1) < last:
                        next(run)
                self.save(run, best, "train and val")
                what = f"{last} epoch{'s' * (last > 1)}" if last else "a linear probe, no epoch,"
                return f"{what} on training and validation images"
            except OutOfTimeError:
                pass
            except ValueError as error:  # it diverged with more images
                why = " ".join(str(error).split())
        parts, folder = self.parts, self.folder / "trials" / best.folder
        run = finetune(
            backbone, parts["train"], config, val=val, checkpoint_dir=folder, device=self.device,
            shared=self.shared,
        )  # fmt: skip
        with run:  # it is there, unless its checkpoint was damaged
            while (run.history[-1].number if run.history else -1) < last:
                next(run)
        self.save(run, best, "train")
        return f"the weights of the best trial, {why}"

    def save(self, run: FineTuning, best: Trial, images: str) -> None:
        folder = run.save_model(self.folder / "model")
        path = folder / "provenance.json"
        note = {"trial": best.number, "images": images, "val": self.best_epoch(best)}
        provenance = read_json(path, PROVENANCE)
        if images != "train":  # `best` was measured on images that it was trained on
            provenance["best"] = None
        write_json(path, {**provenance, "search": note})

    def test(self, best: Trial) -> dict[str, float]:
        """Return the metrics on the test images; write predictions and the hardest images."""
        own = self.backbones[best.backbone] if self.backbones[best.backbone].load else None
        g, images = self.given, self.parts["test"]
        model = load_model(self.folder / "model", backbone=own, plugins=g["plugins"])
        p = predict(model, images, device=self.device, precision=g["precision"])
        rows = np.flatnonzero(np.isfinite(p).all(1))
        write_predictions(self.folder, images, p, rows)
        self.latency = time_forward(model.module, model.preprocessing, self.device)
        right = int((p[rows].argmax(axis=1) == images.labels[rows]).sum())
        self.interval = accuracy_interval(right, len(rows))
        return measure(images.labels[rows], p[rows])


class _ToTheEnd(FineTuning):
    """Keeps the last weights: it has no unseen images to choose the epoch by."""

    def _goodness(self, epoch: Any) -> tuple[float, float]:
        return float(epoch.number), 0.0


# Parts ------------------------------------------------------------------------------------------
@contextmanager
def _as_found(device: str) -> Iterator[None]:
    """Leave random streams and warning filters as they were; libraries use and add some."""
    with own_randomness(resolve_device(device)), warnings.catch_warnings():
        yield


@contextmanager
def _share_cores(workers: int) -> Iterator[None]:
    """Leave every worker its part of the cores: threads that wait for each other are slow."""
    import torch

    with use_threads(max(1, torch.get_num_threads() // workers)):
        yield


def _check(g: Mapping[str, Any]) -> None:
    for name in ("trials", "workers", "keep", "epochs", "samples"):
        is_count = isinstance(g[name], int) and not isinstance(g[name], bool)
        optional = g[name] is None and name not in ("workers", "keep")
        require(name, g[name], "an integer ≥ 1", optional or (is_count and g[name] >= 1))
    for name in ("max_params", "max_latency"):
        require(name, g[name], "a number > 0", g[name] is None or g[name] > 0)
    allowed = ("accuracy", "accuracy,latency", "accuracy,params")
    require("objective", g["objective"], f"one of {allowed}", ",".join(g["objective"]) in allowed)
    require("metric", g["metric"], f"one of {MONITORS}", g["metric"] in MONITORS)
    if isinstance(g["test"], float):
        require("test", g["test"], "in (0, 1), or a data set", 0 < g["test"] < 1)
    limit = g["max_unreadable"]
    is_share = isinstance(limit, (int, float)) and 0 <= limit <= 1
    require("max_unreadable", limit, "in 0 … 1", is_share)
    parse_budget(g["budget"])
    for name in ("dataset", "test"):  # or the next look at the images would find the search there
        spec, out = g[name], g["out"].resolve()
        if isinstance(spec, (str, os.PathLike)) and spec != "digits":
            folder = Path(os.fspath(spec).removeprefix("hf:")).expanduser().resolve()
            if folder.is_dir() and folder in (out, *out.parents):
                raise ValueError(
                    f"`out` must not lie in the folder of the images, {str(folder)!r}, but is "
                    f"{str(g['out'])!r}; take a folder beside it."
                )
    if any(0xDC80 <= ord(c) <= 0xDCFF for c in str(g["out"])):  # safetensors cannot read there
        raise ValueError(f"`out` must be a name in UTF-8 but is {str(g['out'])!r}.")
    if g["out"].exists() and not g["out"].is_dir():
        raise ValueError(f"`out` must be a folder but {str(g['out'])!r} is a file.")


def _jsonable(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments as JSON values; data and networks in memory by their type."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and all(isinstance(v, (str, Backbone)) for v in value):
            return [plain(v) for v in value]
        if isinstance(value, Backbone):
            return value.name
        if isinstance(value, str) and "://" in value:
            return _redact(value)
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        return str(value) if isinstance(value, os.PathLike) else f"<{type(value).__name__}>"

    config = {name: plain(value) for name, value in given.items()}
    if given["space"] is not None:
        config["space"] = open_space(given["space"]).to_dict()
    return config | {"storage": _redact(given["storage"])}


def _environment(device: str, engine: str) -> dict[str, Any]:
    import torch

    versions: dict[str, str] = {"sfda-tune": sfda_tune.__version__}
    for package in ("torch", "timm", "numpy", "scipy", engine):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "format": 1,
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "cpu_count": os.cpu_count(),
        "gpu": gpu,
    }
