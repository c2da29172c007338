"""Progress of a run, for people: one bar over all images of all backbones, with the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from sfda_tune.pipelines.engines import Trial
from sfda_tune.values.features import Score
from sfda_tune.values.text import printable

REDRAW = 0.2  # seconds between two pictures of a bar in a notebook

__all__ = ["Bar", "NullProgress", "SearchProgress", "as_progress", "is_notebook"]


class NullProgress:
    """Shows nothing; what a progress object must answer to, with `rank` or with `search`."""

    def start(self, n_images: int, n_cached: int) -> None:
        """Receive how many images × backbones lie ahead, and how many backbones are cached."""

    def advance(self, backbone: str, n_images: int) -> None:
        """Receive that a backbone has seen so many further images."""

    def finish(self, score: Score) -> None:
        """Receive the score of a backbone."""

    def enter(self, stage: str) -> None:
        """Receive the stage of a search that begins."""

    def leave(self, stage: str, note: str) -> None:
        """Receive what a stage has found."""

    def say(self, what: str, done: float, total: float | None) -> None:
        """Receive what is at work now, and how much of the stage is done."""

    def show(
        self, trials: Sequence[Trial], best: Trial | None, n_trials: int | None, stop: float
    ) -> None:
        """Receive all trials so far; no more than `n_trials`, none after `stop` (Unix time)."""


def is_notebook() -> bool:
    """Whether a notebook shows what is printed: Jupyter, Colab, Databricks."""
    from rich.console import Console

    return Console().is_jupyter


def _progress_of(console: Any) -> Any:
    """Return the class of `rich` that draws bars on a console.

    In notebooks `rich` itself needs ipywidgets to redraw; IPython redraws without.
    """
    from rich.progress import Progress

    if not console.is_jupyter:
        return Progress
    from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

    class NotebookProgress(Progress):
        handle: Any = None
        drawn = 0.0

        def start(self) -> None:
            self.handle = display(self, display_id=True)

        def stop(self) -> None:
            self.handle.update(HTML(""))

        def refresh(self) -> None:
            if self.handle is not None and time.monotonic() - self.drawn > REDRAW:
                self.drawn = time.monotonic()
                self.handle.update(self)

        def update(self, *args: Any, **options: Any) -> None:
            super().update(*args, **options)
            self.refresh()

    return NotebookProgress


class Bar(NullProgress):
    """A `rich` progress bar on standard error, or in a notebook."""

    def __init__(self, console: Any = None) -> None:
        from rich import progress

        from sfda_tune.pipelines.terminal import Terminal

        console = console or Terminal(stderr=True)
        self.rich = _progress_of(console)(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("images"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: Any = None

    def start(self, n_images: int, n_cached: int) -> None:
        """Show the bar, unless everything is cached."""
        if n_cached:
            self.rich.console.print(f"{n_cached} backbones need no forward pass (cached features)")
        if n_images and self._task is None:
            self._task = self.rich.add_task("extracting", total=n_images)
        elif n_images:  # the next stage of a race
            total = (self.rich.tasks[0].total or 0) + n_images
            self.rich.update(self._task, total=total)

    def advance(self, backbone: str, n_images: int) -> None:
        """Move the bar on and name the backbone at work."""
        if self._task is not None:
            self.rich.update(self._task, advance=n_images, description=printable(backbone))


class SearchProgress(NullProgress):
    """One line per finished stage and a moving one below, on standard error."""

    def __init__(self, console: Any = None) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

        from sfda_tune.pipelines.terminal import Terminal

        console = console or Terminal(stderr=True)
        self.rich = _progress_of(console)(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self.rich.add_task("starting", total=None, left="")
        self._stage, self._seen, self._total = "", 0, 0

    def enter(self, stage: str) -> None:
        """Name the stage."""
        self._stage, self._started = stage, time.monotonic()
        self.say("", 0, None)

    def leave(self, stage: str, note: str) -> None:
        """Print what the stage has found."""
        from sfda_tune.pipelines.terminal import say

        seconds = time.monotonic() - self._started
        say(self.rich.console, f"{stage:<9} {seconds:6.1f} s  {note}")

    def say(self, what: str, done: float, total: float | None, left: float | None = None) -> None:
        """Move the bar, and estimate the seconds left from the share that is done."""
        if left is None and total and done:
            left = (time.monotonic() - self._started) * (total - done) / done
        shown = "" if left is None else _left(left)
        text = f"{self._stage}: {printable(what)}" if what else self._stage
        self.rich.update(self._task, description=text, completed=done, total=total, left=shown)

    def start(self, n_images: int, n_cached: int) -> None:
        """Receive how many images the ranking has to look at."""
        self._seen, self._total = 0, n_images

    def advance(self, backbone: str, n_images: int) -> None:
        """Show which backbone is being ranked."""
        self._seen += n_images
        self.say(backbone, self._seen, self._total)

    def show(
        self, trials: Sequence[Trial], best: Trial | None, n_trials: int | None, stop: float
    ) -> None:
        """Show how many trials are done, and the best."""
        done = sum(t.state != "running" for t in trials)
        text = f"{done}{f' of {n_trials}' if n_trials else ''} trials"
        if best is not None and best.value is not None:
            text += f", best {best.value:.4f} by {best.backbone} (trial {best.number})"
        if n_trials is None or (math.isfinite(stop) and not done):
            spent, left = time.monotonic() - self._started, max(0.0, stop - time.time())
            self.say(text, spent, spent + left, left)
        else:
            self.say(text, done, n_trials)


def _left(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@contextmanager
def as_progress(progress: Any, kind: type[Bar | SearchProgress] = Bar) -> Iterator[Any]:
    """Turn a bool into a progress object and show it; hand any other object through.

    None is a bar in a notebook, and nothing elsewhere.
    """
    progress = is_notebook() if progress is None else progress
    shown = kind() if progress is True else progress or NullProgress()
    with shown.rich if isinstance(shown, (Bar, SearchProgress)) else nullcontext():
        yield shown
