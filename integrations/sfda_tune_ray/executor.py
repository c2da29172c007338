"""`RayExecutor`: the extraction of `sfda_tune.rank` over the actors of a Ray cluster.

The driver holds the plan and nothing else: actors write features into the store and send back keys
and counters, so the driver may be killed at any moment; the next run does what is missing. Actors
are restarted by Ray without end but no call is ever repeated by it, because only we know what a
call that was lost may have been guilty of:

=============================  ====================================================================
fault                          what follows
=============================  ====================================================================
an actor dies                  its unit is done again at once, after a child process has read the
                               images one by one: one that ends it is left out of *every* backbone
it dies again                  the backbones of the unit are parted; one that ends four processes
                               has failed, the others go on
a machine is lost              nobody is at fault
a unit takes too long          the actor is ended, then as above
an error outside a backbone    the unit waits until the end; four times, and it has failed
a backbone raises              it has failed, the others go on
no memory for one image        once more, with no other network beside it
the store cannot be written    the features travel to the driver, and the user is warned
the images are not there       the run ends: the machine that lacks them is named
=============================  ====================================================================
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
import uuid
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.cloudpickle import dumps  # type: ignore[attr-defined]
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sfda_tune.backbones.devices import is_working, resolve_device
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.decoding import UNREADABLE
from sfda_tune.extraction.crashes import find_crashing_images
from sfda_tune.extraction.fetching import Fetcher, sweep
from sfda_tune.extraction.plan import Outcome, Plan, Unit, shards_at_once
from sfda_tune.extraction.worker import Worker
from sfda_tune.values.features import Backbone
from sfda_tune.values.text import integer, is_number, require, some
from sfda_tune_ray.cluster import connect, count_places, share_cpus
from sfda_tune_ray.dispatch import Dispatcher, Task, make_bundles

__all__ = ["RayExecutor"]

logger = logging.getLogger(__name__)

SWEEPING = 60.0  # seconds that the removal of weights may take
TICK = 0.5  # seconds between two looks at deadlines and machines
PATIENCE = 60.0  # seconds without any actor before the user is told
FAULTS_KEPT = 1000


@dataclass(frozen=True)
class ActorInfo:
    """What an actor tells of itself."""

    node: str
    host: str
    memory: int  # bytes, for networks and pixels
    reaches_store: bool


@dataclass(frozen=True)
class _Result:
    outcomes: list[Outcome]
    crashing: dict[int, str]  # row of the unit's data set → why
    decodes: int
    seconds: float  # in all
    computing: float  # of these, after networks had been fetched and opened


@dataclass(frozen=True)
class _Disk:
    """How much of a machine's disk weights may take."""

    limit: int
    share: int  # actors on the machine
    ledger: str  # what begins the names of the files that say what came


class _Extractor:
    """The actor: a `Worker` that keeps the networks of its bundle between units."""

    def __init__(self, cpus: float, gpus: float) -> None:
        if not gpus:  # Ray hides no GPU from an actor that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import timm  # noqa: F401 - what takes seconds is done before the first unit
        import torch
        from ray.util import metrics

        self._cpus, self._gpus, self._threads = cpus, gpus, max(1, int(cpus))
        torch.set_num_threads(self._threads)
        self._worker: Worker | None = None
        self._fetcher = Fetcher()
        self._images = metrics.Counter(
            "sfda_tune_images", "Images through a backbone", ("backbone",)
        )
        self._seconds = metrics.Counter("sfda_tune_seconds", "Spent by the actors", ("part",))
        self._unreadable = metrics.Counter("sfda_tune_unreadable", "Images that cannot be read")

    def ping(self, marker: str | None) -> ActorInfo:
        """Say where it is; `marker` is a file that the driver wrote into the store."""
        import psutil
        import torch

        memory = psutil.virtual_memory().available * self._cpus / (psutil.cpu_count() or 1)
        if self._gpus and torch.cuda.is_available():
            memory = torch.cuda.mem_get_info()[1] * min(self._gpus, 1)
        context = ray.get_runtime_context()
        return ActorInfo(
            context.get_node_id(),
            ray.util.get_node_ip_address(),
            int(memory),
            marker is None or os.path.exists(marker),
        )

    def run(
        self,
        worker: Worker,
        units: list[Unit],
        isolated: float | None,
        ahead: list[Backbone],
        disk: _Disk | None,
    ) -> _Result:
        """Run the units of one bundle on the same shards; first check its images if `isolated`.

        The weights of those `ahead` are fetched meanwhile, within what there is of the `disk`.
        """
        import torch

        started = time.perf_counter()
        old = self._worker
        if old is None or (old.settings, old.store) != (worker.settings, worker.store):
            self._worker = replace(
                worker, threads=self._threads, resident={}, fetcher=self._fetcher
            )
        worker = self._worker  # type: ignore[assignment]
        _check_mount(units[0])
        crashing: dict[int, str] = {}
        if isolated is not None:
            crashing = find_crashing_images(units[0], timeout=isolated, dumps=dumps)
            units = [replace(unit, crashing=crashing) for unit in units]
        resident = worker.resident
        assert resident is not None
        for name in resident.keys() - {unit.backbone.name for unit in units}:
            del resident[name]
        self._expect([*(unit.backbone for unit in units), *ahead], disk)
        open_already = [unit for unit in units if unit.backbone.name in resident]
        others = self._fetcher.order(u for u in units if u.backbone.name not in resident)
        outcomes, computing = [], 0.0
        for unit in itertools.chain(open_already, others):
            begun = time.perf_counter()
            try:
                outcome = worker(unit)
            except SystemExit as error:  # for Ray that would be the end of an actor's life
                raise RuntimeError(f"{unit.backbone.name} called sys.exit") from error
            if "out of memory" in (outcome.error or "") and len(resident) > 1:
                resident.clear()
                torch.cuda.empty_cache()
                outcome = worker(unit)
            computing += time.perf_counter() - begun - outcome.seconds["load"]
            if outcome.error is not None and not is_working(worker.settings.device):
                os._exit(1)  # every later call would fail, too
            if outcome.error is not None:
                resident.pop(unit.backbone.name, None)
            # what is in the store need not travel
            outcome.entries = {s: e for s, e in outcome.entries.items() if s not in outcome.kept}
            outcomes.append(outcome)
            self._images.inc(outcome.n_images or 1e-9, {"backbone": outcome.name})
            for part, spent in outcome.seconds.items():
                self._seconds.inc(spent or 1e-9, {"part": part})
        return _Result(
            outcomes,
            crashing,
            sum(outcome.n_decoded for outcome in outcomes),
            time.perf_counter() - started,
            computing,
        )

    def _expect(self, backbones: list[Backbone], disk: _Disk | None) -> None:
        """Have the weights of these fetched, but for networks that are open."""
        assert self._worker is not None
        fetcher = self._fetcher
        fetcher.limit = fetcher.ledger = None
        if disk is not None:
            from huggingface_hub import constants

            folder = Path(constants.HF_HUB_CACHE)
            folder.mkdir(parents=True, exist_ok=True)
            fetcher.limit, fetcher.share = disk.limit // disk.share, disk.share
            fetcher.ledger = folder / f"{disk.ledger}-{os.getpid()}"
        resident = self._worker.resident or {}
        fetcher.expect(b for b in backbones if b.name not in resident)


def _sweep(ledger: str) -> list[str]:
    """Remove what actors have fetched to this machine; return what cannot be removed."""
    from huggingface_hub import constants

    return sweep(Path(constants.HF_HUB_CACHE).glob(f"{ledger}-*"))


def _check_mount(unit: Unit) -> None:
    """Refuse to call images unreadable that the driver did read: here they are not there."""
    paths = [
        path
        for (_, rows), digests in zip(unit.shards, unit.images, strict=True)
        for path, digest in zip((unit.dataset.items[r] for r in rows), digests, strict=True)
        if digest != UNREADABLE and isinstance(path, (str, os.PathLike))
    ][:16]
    if paths and not any(map(os.path.exists, paths)):
        raise DatasetError(
            f"{os.fspath(paths[0])!r} is not there on the machine {ray.util.get_node_ip_address()}"
            "; every machine of the cluster must have the images under the same path"
        )


# The driver -------------------------------------------------------------------------------------
@dataclass(eq=False)
class ActorState:
    """An actor, as the driver knows it; it has `info` from when it answers until it dies."""

    handle: Any
    ping: Any
    info: ActorInfo | None = None
    queue: deque[tuple[Any, Task]] = field(default_factory=deque)
    since: float = math.inf  # when the first of the queue was begun
    joined: float = 0.0
    host: str = "?"
    present: float = 0.0  # seconds
    busy: float = 0.0
    images: int = 0
    restarts: int = 0

    def mark_unavailable(self) -> None:
        """Give it no work until it has answered again."""
        if self.info is not None:
            self.present += time.monotonic() - self.joined
            self.info = None


class RayExecutor:
    """Runs an extraction over actors of a Ray cluster; for ``sfda_tune.rank(executor=…)``.

    On CPUs the features, their keys and files, and so the ranking are those of a local run, bit
    for bit, if PyTorch computes with as many threads there (`cpus_per_actor`). Needs a store that
    every machine reaches: a shared folder, or a bucket (``cache="s3://…"``).

    Parameters
    ----------
    address : str, optional
        ``"local"`` starts a Ray on this machine, on loopback and with a random token; else the
        address of a cluster, ``"auto"`` for the one that runs. Default: the connection there is,
        else ``RAY_ADDRESS``, else ``"local"``.
    actors : int, optional
        So many, also if the cluster has no room yet: an autoscaler sees what is asked for.
        Default: as many as there is room for, also when machines join later.
    num_gpus : float, optional
        Per actor: 0, or 1/n, or whole. Default: 1 on a cluster with GPUs, else 0. Fractions share
        a device without protecting its memory; bundles of backbones in one actor do better.
    cpus_per_actor : float, optional
        Also the number of decoding threads. Default: all CPUs per GPU, or 1 without GPUs.
    memory : int, optional
        Bytes an actor may use for networks and pixels. Default: that of its device, or its share
        of what is free on its machine.
    unit_seconds : float, default 15
        What one call to an actor is to take.
    deadline : float, default 1800
        Seconds after which a call counts as hung.
    image_seconds : float, default 60
        The same for one image, when a unit is looked into.
    attempts : int, default 4
        After so many faults a backbone has failed.
    options : mapping, optional
        Further arguments of `ray.init`, for instance ``{"runtime_env": {…}}``.

    Raises
    ------
    ValueError
        Naming the argument, the rule and the value.

    Examples
    --------
    >>> RayExecutor(num_gpus=0.3)
    Traceback (most recent call last):
    ...
    ValueError: `num_gpus` must be 0, 1/n or a whole number but is 0.3; take 0.5 or 0.25.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        actors: int | None = None,
        num_gpus: float | None = None,
        cpus_per_actor: float | None = None,
        memory: int | None = None,
        unit_seconds: float = 15.0,
        deadline: float = 1800.0,
        image_seconds: float = 60.0,
        attempts: int = 4,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.address, self.actors, self.memory = address, actors, memory
        self.num_gpus, self.cpus_per_actor = num_gpus, cpus_per_actor
        self.unit_seconds, self.deadline, self.attempts = unit_seconds, deadline, attempts
        self.image_seconds, self.options = image_seconds, dict(options or {})
        for name in ("actors", "attempts"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, integer(name, value, 1))
        for name in ("cpus_per_actor", "memory", "unit_seconds", "deadline", "image_seconds"):
            if (value := getattr(self, name)) is not None:
                require(name, value, "positive", is_number(value) and value > 0)
        x = num_gpus or 0.0
        x = 1 / x if 0 < x < 1 else x
        if not 0 <= x < math.inf or abs(x - round(x)) > 1e-6:
            raise ValueError(
                f"`num_gpus` must be 0, 1/n or a whole number but is {num_gpus!r}; take 0.5 or "
                "0.25."
            )
        self._depth, self._stack = 0, ExitStack()
        self._gpus, self._cpus = 0.0, 1.0
        self._states: list[ActorState] = []
        self._gone: list[ActorState] = []
        self._store: Any = None
        self._marker: Path | None = None
        self._ledger = ""
        self._nodes: set[str] = set()  # with weights that are to be removed in the end
        self._clear()

    def _clear(self) -> None:
        self._refused = self._outside = 0  # actors that did not start, or not see the store
        self.waited = 0.0  # seconds until the first actor of a run had started
        self._faults: list[dict[str, Any]] = []
        self._counts = dict.fromkeys(("units", "decodes", "images", "seconds", "faults"), 0.0)

    def __enter__(self) -> RayExecutor:
        """Connect to Ray; actors start with the first run."""
        if not self._depth:
            self._clear()
            self._ledger = f".sfda-tune-{uuid.uuid4().hex}"
            self._stack.enter_context(connect(self.address, **self.options))
            nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
            gpus = any(n.get("GPU") for n in nodes)
            self._gpus = (1.0 if gpus else 0.0) if self.num_gpus is None else self.num_gpus
            self._cpus = self.cpus_per_actor or share_cpus(nodes, self._gpus)
        self._depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        """Let the actors go, and what of Ray was started."""
        self._depth -= 1
        if not self._depth:
            try:
                for state in list(self._states):
                    self._dismiss(state)
                self._sweep()
                self._forget_marker()
            finally:
                self._stack.close()

    def resolve_device(self, device: str) -> str:
        """Return the device of the actors: CUDA if they have GPUs, for ``"auto"``."""
        if device == "auto":
            return "cuda" if self._gpus else "cpu"
        return device if self._gpus else resolve_device(device)

    bounds_weights = True  # see `Executor`

    @property
    def n_places(self) -> int:
        """How many units run at a time; 1 while nobody knows."""
        return self.actors or max(1, count_places(self._gpus, self._cpus) if self._depth else 0)

    @property
    def states(self) -> tuple[ActorState, ...]:
        """What the driver knows of each actor."""
        return tuple(self._states)

    def report(self) -> dict[str, Any]:
        """Return what the actors did and suffered, as JSON values."""
        now = time.monotonic()
        states = [m for m in [*self._gone, *self._states] if m.present or m.info]
        present = {m: m.present + (now - m.joined if m.info else 0.0) for m in states}
        counts = self._counts
        return {
            "kind": "ray",
            "actors": [
                {
                    "machine": m.host,
                    "images": m.images,
                    "images_per_second": m.images / m.busy if m.busy else None,
                    "utilisation": m.busy / present[m] if present[m] else None,
                    "restarts": m.restarts,
                }
                for m in states
            ],
            "utilisation": sum(m.busy for m in states) / (sum(present.values()) or 1.0),
            "restarts": sum(m.restarts for m in states),
            "units": int(counts["units"]),
            "decodes_per_image": counts["decodes"] / counts["images"] if counts["images"] else 0.0,
            "seconds": counts["seconds"],
            "n_faults": int(counts["faults"]),
            "faults": list(self._faults),
        }

    def run(self, worker: Worker, plan: Plan) -> Generator[Outcome, None, None]:
        """Run all that the plan misses."""
        names = [name for name, absent in plan.missing.items() if absent]
        if not names:
            return
        with self:
            started = time.monotonic()
            try:
                self._alone = time.monotonic() + PATIENCE
                self._scale_up(worker)
                while not any(m.info for m in self._states):
                    pings = {m.ping: m for m in self._states}
                    for ref in ray.wait(list(pings), timeout=TICK)[0]:
                        self._on_actor_ready(pings[ref])
                    self._warn_if_alone()
                    if worker.advance is not None:
                        worker.advance(names[0], 0)
                self.waited += time.monotonic() - started
                yield from _PlanRun(self, worker, plan, names).outcomes()
            finally:
                self._counts["seconds"] += time.monotonic() - started
                for state in self._states:  # of a run that ended early; not for the next one
                    state.queue.clear()
                self._forget_marker()

    # Actors --------------------------------------------------------------------------------
    def _scale_up(self, worker: Worker) -> None:
        """Ask for the actors that are missing."""
        if self._store != worker.store:
            self._forget_marker()
            self._store, self._outside = worker.store, 0
            with contextlib.suppress(OSError, AttributeError):  # full, or no folder
                marker = Path(worker.store.root) / f".{uuid.uuid4().hex}.tmp"  # type: ignore
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.touch()
                self._marker = marker
            for state in self._states:
                state.mark_unavailable()
                state.ping = self._ping(state.handle)
        room = self.actors or max(1, count_places(self._gpus, self._cpus) - self._outside)
        for _ in range(len(self._states), room):
            self._add()

    def _add(self) -> None:
        kind = ray.remote(_Extractor).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=-1, max_task_retries=0
        )
        handle = kind.remote(self._cpus, self._gpus)
        self._states.append(ActorState(handle, self._ping(handle)))

    def _ping(self, handle: Any) -> Any:
        marker = str(self._marker) if self._marker else None
        return handle.ping.options(max_task_retries=-1).remote(marker)

    def _warn_if_alone(self) -> None:
        now = time.monotonic()
        if any(m.info for m in self._states):
            self._alone = now + PATIENCE
        elif now > self._alone:
            self._alone = math.inf
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            warnings.warn(
                f"no actor could start for {PATIENCE:g} s; each asks for {self._cpus:g} CPUs and "
                f"{self._gpus:g} GPUs, free are {free}; the run waits for room",
                stacklevel=2,
            )

    def _on_actor_ready(self, state: ActorState) -> None:
        """Receive the answer of an actor that starts, for the first time or again."""
        try:
            info: Any = ray.get(state.ping)
        except RayError as error:  # it never came to life
            self._dismiss(state)
            self._refused += 1
            if self._refused >= 3 and not any(m.info for m in self._states):
                raise RuntimeError(f"no actor can start: {_line(error)}") from error
            return self._add()
        state.ping = None
        if not info.reaches_store:
            self._dismiss(state)
            self._outside += 1
            self._note("store", info.host, reason="does not reach the cache folder")
            if not self._states:
                raise OSError(
                    f"no machine of the cluster reaches {self._store.root}; "
                    "pass `cache` (--cache) a folder that all share, or a bucket"
                )
            return None
        self._refused = 0
        state.info, state.host, state.joined = info, info.host, time.monotonic()
        return None

    def _dismiss(self, state: ActorState) -> None:
        self._states.remove(state)
        self._gone.append(state)
        state.mark_unavailable()
        with contextlib.suppress(Exception):  # Ray itself may be gone
            ray.kill(state.handle)

    def _sweep(self) -> None:
        """Remove the weights that actors have fetched, who have ended."""
        sweepers = [
            ray.remote(_sweep)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, False))
            .remote(self._ledger)
            for node in self._nodes & {n["NodeID"] for n in ray.nodes() if n["Alive"]}
        ]
        self._nodes.clear()
        if not sweepers:
            return
        done, late = ray.wait(sweepers, num_returns=len(sweepers), timeout=SWEEPING)
        left = [f"all on {len(late)} machines that do not answer"] * bool(late)
        for found in done:
            try:
                left += ray.get(found)
            except RayError as error:
                left.append(_line(error))
        if left:
            text = f"weights that were fetched could not be removed: {some(left)}"
            warnings.warn(text, stacklevel=2)

    def _forget_marker(self) -> None:
        self._store = None
        if self._marker is not None:
            self._marker.unlink(missing_ok=True)
            self._marker = None

    def _note(self, kind: str, machine: str, **more: Any) -> dict[str, Any]:
        fault = {"kind": kind, "machine": machine, **more}
        logger.warning("%s", fault)
        self._counts["faults"] += 1
        if len(self._faults) < FAULTS_KEPT:
            self._faults.append(fault)
        return fault


class _PlanRun:
    """One plan under way: tasks out to the actors, outcomes back."""

    def __init__(
        self, executor: RayExecutor, worker: Worker, plan: Plan, names: list[str]
    ) -> None:
        self.executor, self.worker, self.plan, self.names = executor, worker, plan, names
        infos = [m.info for m in executor._states if m.info]
        memory = executor.memory or min(info.memory for info in infos)
        sizes = {}
        for name in names:
            transform = plan.preprocessing(name)
            _, height, width = transform.input_size or (3, 224, 224)
            sizes[name] = transform.key, plan.n_params(name), height * width
        n = executor.actors or len(executor._states)
        bundles = make_bundles(sizes, plan.missing, memory=0.3 * memory, actors=n)
        for bundle in bundles:
            bundle.most = shards_at_once([plan.preprocessing(bundle.names[0])], memory)
        self.dispatcher = Dispatcher(bundles, executor.unit_seconds, executor.attempts)
        users = frozenset().union(*(plan.missing[name] for name in names))
        executor._counts["images"] += sum(len(plan.shards[s]) for s in users)
        self.suspects: list[tuple[str, Task, dict[str, Any], float]] = []

    def outcomes(self) -> Iterator[Outcome]:
        looked = time.monotonic()
        while self.dispatcher.unfinished:
            states = self.executor._states
            self.dispatcher.n_actors = max(sum(m.info is not None for m in states), 1)
            for state in states:
                if state.info is not None:
                    self._fill(state)
            waiting = {m.ping: m for m in states if m.ping is not None}
            waiting |= {m.queue[0][0]: m for m in states if m.queue}
            ready, rest = ray.wait(list(waiting), timeout=TICK) if waiting else ([], [])
            if self.worker.advance is not None:  # which may stop the run
                self.worker.advance(self.names[0], 0)
            if ready and rest:  # and whatever else has come meanwhile
                ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
            for ref in ready:
                yield from self._receive(waiting[ref])
            if time.monotonic() - looked > TICK:
                looked = time.monotonic()
                self._manage_actors()

    def _fill(self, state: ActorState) -> None:
        """Give an actor a task, and one ahead so that it need not wait for the driver."""
        new: list[tuple[Task, list[Unit]]] = []
        while len(state.queue) + len(new) < 2:
            task = self.dispatcher.next(state, ahead=bool(state.queue or new))
            if task is None:
                break
            # equal numbers: the pixels of the unit before can be used again
            number = hash((task.shards, self.plan.preprocessing(task.bundle.names[0]).key))
            number += len(self.plan.crashing)
            units = self.plan.units(task.names, task.shards, number, retry=task.attempts > 0)
            if units := list(units):
                new.append((task, units))
            else:  # all failed meanwhile
                self.dispatcher.complete(task, None)
        following = [task.names for task, _ in new[1:]] + [self.dispatcher.foresee(state)]
        for (task, units), ahead in zip(new, following[: len(new)], strict=True):
            timeout = self.executor.image_seconds if task.isolated else None
            backbones = [b for b in map(self.plan.backbone, ahead) if b.load is None]
            disk = self._find_disk(state)
            ref = state.handle.run.remote(self.worker, units, timeout, backbones, disk)
            state.queue.append((ref, task))
            if len(state.queue) == 1:
                state.since = time.monotonic()

    def _find_disk(self, state: ActorState) -> _Disk | None:
        """Return how much of its machine's disk an actor's weights may take; None for any."""
        if self.worker.weights_disk is None or state.info is None:
            return None
        executor, node = self.executor, state.info.node
        executor._nodes.add(node)
        share = sum(m.info is not None and m.info.node == node for m in executor._states)
        return _Disk(self.worker.weights_disk, share, executor._ledger)

    def _receive(self, state: ActorState) -> Iterator[Outcome]:
        """Take what an actor sent: an answer to a ping, a result, an error, or its death."""
        if state.ping is not None:
            self.executor._on_actor_ready(state)
            return
        ref, task = state.queue[0]
        try:
            result: Any = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, DatasetError):
                raise error.cause from None
            state.queue.popleft()
            self._note("unit", state, task, _line(error.cause or error))
            yield from self._record_failure(task, _line(error.cause or error), died=False)
        except RayError as error:
            yield from self._on_actor_died(state, error)
        else:
            state.queue.popleft()
            yield from self._take(state, task, result)
        state.since = time.monotonic()

    def _take(self, state: ActorState, task: Task, result: _Result) -> Iterator[Outcome]:
        plan, counts = self.plan, self.executor._counts
        self.dispatcher.complete(task, result.computing)
        if result.crashing:
            rows = [int(row) for s in task.shards for row in plan.shards[s]]
            new = {
                rows[p]: why for p, why in result.crashing.items() if rows[p] not in plan.crashing
            }
            plan.crashing.update(new)
            for row, why in new.items():
                self._note("image", state, task, why, image=plan.dataset.item_name(row))
        counts["units"] += 1
        counts["decodes"] += result.decodes
        state.busy += result.seconds
        for outcome in result.outcomes:
            state.images += outcome.n_images
            if outcome.error is not None:
                self.dispatcher.drop(outcome.name)
                self._note("backbone", state, task, outcome.error, backbones=[outcome.name])
            yield outcome

    def _on_actor_died(self, state: ActorState, error: RayError) -> Iterator[Outcome]:
        """Only what the actor had begun can be at fault. Ray starts it again."""
        (_, task), *rest = state.queue
        for _, other in reversed(rest):
            self.dispatcher.give_back(other)
        state.queue.clear()
        info, now = state.info, time.monotonic()
        assert info is not None
        hung = state.since == math.inf
        reason = f"no answer for {self.executor.deadline:g} s" if hung else _line(error)
        fault = self._note("actor", state, task, reason)
        self.suspects.append((info.node, task, fault, now))
        state.mark_unavailable()
        state.ping = self.executor._ping(state.handle)
        state.restarts += 1
        self.dispatcher.on_actor_died(state)
        yield from self._record_failure(task, reason, died=True)

    def _record_failure(self, task: Task, reason: str, *, died: bool) -> Iterator[Outcome]:
        for name in self.dispatcher.record_failure(task, reason, died=died):
            self.dispatcher.drop(name)
            what = "its process died" if died else "its unit failed"
            yield Outcome(name, error=f"{what} {task.attempts} times ({reason})")

    def _manage_actors(self) -> None:
        """End what hangs, reset attempts lost with a machine, and take in machines that joined."""
        now, executor = time.monotonic(), self.executor
        executor._warn_if_alone()
        for state in executor._states:
            limit = executor.deadline
            if state.queue and state.queue[0][1].isolated:  # a child process starts, and reads
                limit = 60 + 2 * limit + executor.image_seconds
            if state.queue and now - state.since > limit:
                state.since = math.inf
                ray.kill(state.handle, no_restart=False)
        if self.suspects:
            dead = {node["NodeID"] for node in ray.nodes() if not node["Alive"]}
            for node, task, fault, _ in self.suspects:
                if node in dead:
                    self.dispatcher.reset_attempts(task)
                    fault["kind"] = "machine"
            self.suspects = [s for s in self.suspects if s[0] not in dead and now - s[3] < 60]
        if executor.actors is None:
            executor._scale_up(self.worker)

    def _note(self, kind: str, state: ActorState, task: Task, reason: str, **more: Any) -> Any:
        more = {"backbones": list(task.names), "reason": reason, **more}
        return self.executor._note(kind, state.host, **more)


def _line(error: BaseException) -> str:
    """Return the first line that says anything, without Ray's decoration."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
