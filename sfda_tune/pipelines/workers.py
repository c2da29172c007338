"""The further processes of a search on one machine."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sfda_tune.backbones.devices import use_threads
from sfda_tune.data.decoding import get_switches, set_switches
from sfda_tune.data.loader import telling
from sfda_tune.pipelines.budget import Budget
from sfda_tune.pipelines.config import SearchConfig
from sfda_tune.pipelines.engines import Engine
from sfda_tune.pipelines.run_folder import RunFolder
from sfda_tune.values.files import write_text
from sfda_tune.values.redaction import hide_secrets
from sfda_tune.values.text import printable

__all__ = ["await_workers", "share_cores", "start_workers", "work_as"]


@dataclass(frozen=True)
class Worker:
    """A further process, and the memory where it tells which image it decodes."""

    process: BaseProcess
    at: Any


@contextmanager
def share_cores(workers: int, threads: int | None = None) -> Iterator[None]:
    """Leave every worker its part of the cores: threads that wait for each other are slow."""
    import torch

    with use_threads(threads or max(1, torch.get_num_threads() // workers)):
        yield


def start_workers(
    config: SearchConfig, engine: Engine, target: Callable[[SearchConfig, int], None]
) -> list[Worker]:
    """Start the other workers: processes that make the same call, numbered from 1."""
    if config.workers == 1 or getattr(engine, "spreads", False):
        return []
    spawn, quiet = multiprocessing.get_context("spawn"), replace(config, progress=False)
    workers = []
    for number in range(1, config.workers):
        at = spawn.RawArray("c", 1024)
        how = (get_switches(), target, quiet, number, at)
        workers.append(Worker(spawn.Process(target=_start, args=how), at))
    try:
        for worker in workers:
            worker.process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`workers` must be 1 but is {config.workers}: data or backbones cannot be sent to "
            f"other processes ({error}); use module-level functions instead of lambdas."
        ) from error
    return workers


def _start(
    switches: Mapping[str, Any],
    target: Callable[[SearchConfig, int], None],
    config: SearchConfig,
    number: int,
    at: Any,
) -> None:
    def tell(name: str) -> None:
        at.value = name.encode("utf-8", "surrogateescape")[:1023]

    set_switches(switches)  # which images can be read is the same everywhere
    with telling(tell):
        target(config, number)


@contextmanager
def work_as(config: SearchConfig, number: int) -> Iterator[SearchConfig]:
    """Be worker `number`: on a device of its own, if there are several; say why it ends."""
    import torch

    if config.device == "auto" and torch.cuda.device_count() > 1:
        config = replace(config, device=f"cuda:{number % torch.cuda.device_count()}")
    note = _note(config.out, number)
    note.unlink(missing_ok=True)
    with share_cores(config.workers, config.threads):
        try:
            yield config
        except KeyboardInterrupt:
            return
        except Exception as error:  # its traceback follows on standard error
            with suppress(OSError):  # perhaps it is the disk that is full
                write_text(note, hide_secrets(f"{type(error).__name__}: {error}", config.storage))
            raise


def await_workers(
    workers: Sequence[Worker], folder: RunFolder, budget: Budget, end: Callable[[], float]
) -> None:
    """Wait for the other workers until the `end`; say which of them failed, and why.

    Others have made, or will make, the trials of one that failed.
    """
    for number, worker in enumerate(workers, 1):
        slack = 0.01 * budget.deadline
        process = worker.process
        process.join(None if budget.seconds is None else max(1.0, end() - budget.now() + slack))
        code, note = process.exitcode, _note(folder.path, number)
        if code == 0:
            continue
        if code is None:
            why = "was stopped, for it did not see that the budget was spent"
            process.terminate()
        elif code < 0:
            why = f"was ended by signal {-code}{', perhaps without memory left' * (code == -9)}"
        else:
            why = f"failed with code {code}"
        if code and (image := worker.at.value.decode("utf-8", "surrogateescape")):
            why += f" while it decoded {printable(image)}; move it away or write it anew"
        if code and note.is_file():
            why += f": {note.read_text(encoding='utf-8').strip()[:300]}"
        text = f"worker {number} {why}; the others have done its work"
        warnings.warn(text, stacklevel=2)
        with folder.edit() as state:
            state.setdefault("warnings", []).append(text)


def _note(folder: Path, number: int) -> Path:
    """Return where a worker writes why it ends."""
    return folder / f"worker-{number}.txt"
