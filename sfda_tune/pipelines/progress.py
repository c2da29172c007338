"""Progress of a run, for people: one bar over all images of all backbones, with the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sfda_tune.values.ranking import Score
from sfda_tune.values.text import printable

__all__ = ["Bar", "Silent", "as_progress"]


class Silent:
    """Shows nothing; what a progress object must answer to."""

    def start(self, n_images: int, n_cached: int) -> None:
        """Hear how many images × backbones lie ahead, and how many backbones are cached."""

    def advance(self, backbone: str, n_images: int) -> None:
        """Hear that a backbone has seen so many further images."""

    def finish(self, score: Score) -> None:
        """Hear the score of a backbone."""


class Bar(Silent):
    """A `rich` progress bar on standard error."""

    def __init__(self, console: Any = None) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from sfda_tune.pipelines.terminal import Terminal

        self.rich = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console or Terminal(stderr=True),
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


@contextmanager
def as_progress(progress: Any) -> Iterator[Any]:
    """Turn a bool into a progress object and show it; hand any other object through."""
    if not isinstance(progress, (bool, Bar)):
        yield progress or Silent()
        return
    bar = Bar() if progress is True else progress
    if isinstance(bar, Bar):
        with bar.rich:
            yield bar
    else:
        yield Silent()
