"""The further processes of a search on one machine."""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sfda_tune.backbones.devices import use_threads
from sfda_tune.data.decoding import get_switches, set_switches
from sfda_tune.pipelines.budget import Budget
from sfda_tune.pipelines.config import SearchConfig
from sfda_tune.pipelines.engines import Engine
from sfda_tune.pipelines.run_folder import RunFolder
from sfda_tune.values.files import write_text
from sfda_tune.values.redaction import hide_secrets

__all__ = ["await_workers", "share_cores", "start_workers", "work_as"]


@contextmanager
def share_cores(workers: int) -> Iterator[None]:
    """Leave every worker its part of the cores: threads that wait for each other are slow."""
    import torch

    with use_threads(max(1, torch.get_num_threads() // workers)):
        yield


def start_workers(
    config: SearchConfig, engine: Engine, target: Callable[[SearchConfig, int], None]
) -> list[BaseProcess]:
    """Start the other workers: processes that make the same call, numbered from 1."""
    if config.workers == 1 or getattr(engine, "spreads", False):
        return []
    spawn, quiet = multiprocessing.get_context("spawn"), replace(config, progress=False)
    how = (get_switches(), target, quiet)
    workers = [spawn.Process(target=_start, args=(*how, k)) for k in range(1, config.workers)]
    try:
        for worker in workers:
            worker.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"`workers` must be 1 but is {config.workers}: data or backbones cannot be sent to "
            f"other processes ({error}); use module-level functions instead of lambdas."
        ) from error
    return list(workers)


def _start(
    switches: Mapping[str, Any],
    target: Callable[[SearchConfig, int], None],
    config: SearchConfig,
    number: int,
) -> None:
    set_switches(switches)  # which images can be read is the same everywhere
    target(config, number)


@contextmanager
def work_as(config: SearchConfig, number: int) -> Iterator[SearchConfig]:
    """Be worker `number`: on a device of its own, if there are several; say why it ends."""
    import torch

    if config.device == "auto" and torch.cuda.device_count() > 1:
        config = replace(config, device=f"cuda:{number % torch.cuda.device_count()}")
    note = _note(config.out, number)
    note.unlink(missing_ok=True)
    with share_cores(config.workers):
        try:
            yield config
        except KeyboardInterrupt:
            return
        except Exception as error:  # its traceback follows on standard error
            write_text(note, hide_secrets(f"{type(error).__name__}: {error}", config.storage))
            raise


def await_workers(
    workers: Sequence[BaseProcess], folder: RunFolder, budget: Budget, end: Callable[[], float]
) -> None:
    """Wait for the other workers until the `end`; say which of them failed, and why.

    Others have made, or will make, the trials of one that failed.
    """
    for number, worker in enumerate(workers, 1):
        slack = 0.01 * budget.deadline
        worker.join(None if budget.seconds is None else max(1.0, end() - budget.now() + slack))
        code, note = worker.exitcode, _note(folder.path, number)
        if code == 0:
            continue
        if code is None:
            why = "was stopped, for it did not see that the budget was spent"
            worker.terminate()
        elif code < 0:
            why = f"was ended by signal {-code}{', perhaps without memory left' * (code == -9)}"
        else:
            why = f"failed with code {code}"
        if code and note.is_file():
            why += f": {note.read_text(encoding='utf-8').strip()[:300]}"
        text = f"worker {number} {why}; the others have done its work"
        warnings.warn(text, stacklevel=2)
        with folder.edit() as state:
            state.setdefault("warnings", []).append(text)


def _note(folder: Path, number: int) -> Path:
    """Return where a worker writes why it ends."""
    return folder / f"worker-{number}.txt"
