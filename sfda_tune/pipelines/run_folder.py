"""The folder RUN of a search: what stands in it, and who may write when.

==================  ==========================================================================
file                what it holds
==================  ==========================================================================
config.json         the arguments, and where their paths begin; another call must have the same
splits.json         the rows of the parts, what was left out, which images are copies
environment.json    versions and device
search.json         all state: stages, decision, trials, costs, result
seconds.json        the clock, see `sfda_tune.pipelines.clock`
trials/FOLDER/      checkpoints of a trial
==================  ==========================================================================

Locks on files, which end with their process, keep the processes apart that share the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sfda_tune.data.splits import tell_gaps, tell_shared
from sfda_tune.extraction.store import open_cache
from sfda_tune.pipelines.budget import ends_later
from sfda_tune.pipelines.clock import Clock
from sfda_tune.pipelines.config import SearchConfig
from sfda_tune.pipelines.engines import Trial, read_trial
from sfda_tune.pipelines.inputs import Inputs
from sfda_tune.pipelines.progress import NullProgress
from sfda_tune.pipelines.trials import (
    estimate_everything,
    find_best,
    find_front,
    seconds_per_epoch,
    summarise,
)
from sfda_tune.values.files import read_json, write_json
from sfda_tune.values.formats import SPLITS, STATE
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.redaction import redact

__all__ = ["RunFolder", "begin", "name_study", "reopen"]

logger = logging.getLogger(__name__)

# may differ when a search goes on
FREE = (
    "workers", "decoders", "threads", "progress", "out", "cache", "device", "max_unreadable",
    "previous", "weights_disk", "directory",
)  # fmt: skip
LIMITS = ("trials", "budget")  # may grow
LOCAL = ("dataset", "storage", "plugins", "sfda_tune")  # may differ between machines

Speeds = Mapping[str, float | None]  # of a forward pass, by backbone
# What the backbones cost, and which of them break a constraint, and why
Costs = tuple[dict[str, Any], dict[str, str]]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a search, with its clock and with what shows the progress."""

    path: Path
    now: Clock
    progress: Any  # a `NullProgress`

    @classmethod
    def open(cls, path: Path, progress: Any = None) -> RunFolder:
        """Open a folder, which may be empty.

        Raises
        ------
        ValueError
            If its search.json is damaged.
        """
        path.mkdir(parents=True, exist_ok=True)
        file, known = path / "search.json", 0.0
        if os.path.lexists(file):  # what is none is refused
            known = read_json(file, STATE)["seconds"]["total"]
        return cls(path, Clock(path / "seconds.json", known), progress or NullProgress())

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold one of the locks: "stage" or "state"."""
        from filelock import FileLock

        with FileLock(self.path / f"{name}.lock"):
            yield

    def forget_refused(self) -> None:
        """Remove the lock "stage", which the caller holds, unless the search has begun.

        Who waits for it sees that its file is gone, and makes another.
        """
        if not os.path.lexists(self.path / "config.json"):
            with suppress(OSError):  # Windows does not let go what is open
                (self.path / "stage.lock").unlink()

    # search.json --------------------------------------------------------------------------------
    @property
    def state(self) -> dict[str, Any]:
        """What search.json holds now."""
        return read_json(self.path / "search.json", {})  # checked by `open`; since, it is our own

    @contextmanager
    def edit(self) -> Iterator[dict[str, Any]]:
        """Change search.json, one process at a time."""
        with self.lock("state"):
            state = self.state
            yield state
            state["seconds"]["total"] = max(self.now(), state["seconds"]["total"])
            write_json(self.path / "search.json", state)

    def is_done(self, stage: str) -> bool:
        """Tell whether a stage is done."""
        return any(s["name"] == stage and s["seconds"] is not None for s in self.state["stages"])

    def enter(self, stage: str, status: str) -> None:
        """Note that a stage begins, or goes on."""
        self.progress.enter(stage)
        with self.edit() as state:
            state["status"] = status
            if all(s["name"] != stage for s in state["stages"]):
                entry = {"name": stage, "started": time.time(), "seconds": None, "note": ""}
                state["stages"].append(entry)

    def leave(self, stage: str, note: str, **changes: Any) -> None:
        """Note that a stage is done, and what it found."""
        with self.edit() as state:
            entry = next(s for s in state["stages"] if s["name"] == stage)
            if entry["seconds"] is None:  # all that other stages did not take, nor any pause
                others = sum(s["seconds"] or 0.0 for s in state["stages"])
                entry |= {"seconds": max(0.0, self.now() - others), "note": note}
            state |= changes
        logger.info("%s: %s", stage, note)
        self.progress.leave(stage, note)

    # Ranking, parts and trials ------------------------------------------------------------------
    @property
    def ranking(self) -> Ranking:
        """The ranking, once it is made."""
        return Ranking.from_json(self.path / "ranking.json")

    @property
    def splits(self) -> dict[str, Any] | None:
        """What splits.json holds; None if the search has not begun."""
        if not os.path.lexists(self.path / "config.json"):  # it is written last
            return None
        return read_json(self.path / "splits.json", SPLITS)

    @property
    def trials(self) -> list[Trial]:
        """All trials, as the engine told them last."""
        return list(map(read_trial, self.state["trials"]))

    def write_trials(self, trials: Sequence[Trial], config: SearchConfig, speeds: Speeds) -> bool:
        """Write all trials, and what follows from them.

        Returns False, with nothing written, if another process was quicker: it trains already.
        """
        with self.edit() as state:
            if any(s["name"] == "train" for s in state["stages"]):
                return False
            state["trials"] = [asdict(t) for t in trials]
            state["front"] = find_front(trials, config.directions)
            for name, cost in state["costs"].items():
                cost["seconds_per_epoch"] = seconds_per_epoch(trials, name)
            everything = estimate_everything(trials, state["costs"], speeds)
            state["seconds"]["train_everything_estimate"] = everything
            best = find_best(trials, config.metric, state["n_images"]["val"])
            if best is not None:
                state["best"] = summarise(best, config.metric, state["costs"])
        return True

    def trial(self, name: str) -> Path:
        """Return the folder of a trial."""
        return self.path / "trials" / name

    def delete_weights(self, trial: str) -> None:
        """Delete the weights of a trial."""
        for weights in self.trial(trial).glob("*.safetensors"):
            weights.unlink(missing_ok=True)


# The beginning ----------------------------------------------------------------------------------
def begin(folder: RunFolder, inputs: Inputs, measure: Callable[[], Costs]) -> None:
    """Begin the folder, or check that it is of this search; `measure` is called if need be."""
    arguments, path = _describe(inputs), folder.path / "config.json"
    if not os.path.lexists(path):
        getattr(inputs.engine, "check_storage", lambda url: None)(inputs.config.storage)
        _create(folder, inputs, arguments, measure())
        return
    old = read_json(path, dict.fromkeys(LIMITS, object))
    shown = {k: redact(v) if k == "storage" else v for k, v in old.items()}
    if isinstance(old.get("backbones"), str):  # an earlier version kept what it was given
        shown["backbones"] = [old["backbones"]]
    if old.get("data") == arguments["data"]:  # the same images, however their folder is written
        shown |= {key: arguments[key] for key in ("dataset", "directory")}
    grown = any(ends_later(arguments[key], old[key]) for key in LIMITS)
    for key in [key for key in arguments if key not in (*FREE, "sfda_tune")]:
        if shown.get(key) != arguments[key] and not (grown and key in LIMITS):
            raise ValueError(
                f"`out` {str(folder.path)!r} holds a search with {key} {shown.get(key)!r}, but "
                f"now {key} is {arguments[key]!r}; take the same"
                f"{', or more' if key in LIMITS else ''}, or another folder."
            )
    if shown != old:  # an earlier version hid less, or wrote it otherwise
        write_json(path, shown)
        with folder.edit() as state:
            state["storage"] = shown["storage"]
    if grown:
        reopen(folder, measure)
        write_json(path, arguments)


def _describe(inputs: Inputs) -> dict[str, Any]:
    """Return what config.json holds."""
    values = inputs.config.to_dict() | {"directory": os.getcwd(), "data": inputs.fingerprint}
    return {"format": 1, "sfda_tune": version("sfda-tune"), **values}


def name_study(inputs: Inputs) -> str:
    """Return a name that all processes have in common, on other machines, too."""
    arguments, differing = _describe(inputs), (*FREE, *LOCAL, *LIMITS)
    common = [[k, v] for k, v in sorted(arguments.items()) if k not in differing]
    digest = hashlib.blake2b(json.dumps(common).encode(), digest_size=8)
    return f"sfda-tune {digest.hexdigest()}"


def _create(folder: RunFolder, inputs: Inputs, arguments: Mapping[str, Any], found: Costs) -> None:
    """Write the first state."""
    (costs, excluded), config, survey = found, inputs.config, inputs.survey
    parts, candidates = inputs.parts, list(inputs.backbones)
    assert survey is not None
    of = {name: survey.pixels.get(name, survey.pixels["train"]) for name in parts}
    digests = {name: [of[name][row] for row in rows] for name, rows in inputs.rows.items()}
    shared = tell_shared(parts, digests, open_cache(config.cache))
    if len(excluded) == len(candidates):  # nothing is written: it may be called otherwise
        name, why = next(iter(excluded.items()))
        raise ValueError(
            f"`backbones` leave none to rank, all {len(excluded)} are excluded; {name}: {why}"
        )
    copies = np.flatnonzero(np.bincount(survey.twins) > 1)
    splits = {
        "fingerprint": inputs.fingerprint,
        **inputs.rows,
        "test_source": inputs.sources["test"],
        "left_out": {name: sorted(rows) for name, rows in survey.unreadable.items()},
        "copies": [np.flatnonzero(survey.twins == c).tolist() for c in copies],
    }
    state = {
        "format": 1, "status": "ranking", "dataset": parts["train"].name,
        "classes": list(parts["train"].classes), "task": parts["train"].task,
        "n_images": {name: len(part) for name, part in parts.items()},
        "sources": inputs.sources, "unreadable": survey.names,
        "notes": [*shared, *tell_gaps(parts)], "stages": [],
        "candidates": candidates, "excluded": excluded,
        "survivors": [], "separable": None, "decision": "", "objectives": list(config.objective),
        "metric": config.metric, "engine": config.engine, "storage": redact(config.storage),
        "trials": [], "best": None, "front": [], "costs": costs,
        "seconds": {"total": 0.0, "train_everything_estimate": None},
    }  # fmt: skip
    for note in shared:  # the other notes stand with the result
        warnings.warn(f"{note}.", stacklevel=2)
    write_json(folder.path / "environment.json", _environment(inputs.device, config.engine))
    write_json(folder.path / "splits.json", splits)
    write_json(folder.path / "search.json", state)
    write_json(folder.path / "config.json", arguments)  # last: whoever finds it finds all


def reopen(folder: RunFolder, measure: Callable[[], Costs]) -> None:
    """Undo what followed the last trial: more are to come."""
    fresh: dict[str, Any] = {}
    if not folder.state["trials"]:
        fresh["costs"], fresh["excluded"] = measure()
    kept = () if fresh else ("rank", "shortlist", "tune")
    with folder.edit() as state:
        state |= fresh
        state["stages"] = [s for s in state["stages"] if s["name"] in kept]
        state["separable"] = state["separable"] if kept else None
        for stage in state["stages"][2:]:
            stage |= {"seconds": None, "note": ""}
    for trial in (folder.path / "trials").glob("final" if kept else "*"):
        shutil.rmtree(trial, ignore_errors=True)


def _environment(device: str, engine: str) -> dict[str, Any]:
    import torch

    versions: dict[str, str] = {}
    for package in ("sfda-tune", "torch", "timm", "numpy", "scipy", engine):
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
