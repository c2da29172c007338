"""Progress of a run, for people: one bar over all images of all backbones, with the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from sfda_tune.pipelines.engines import Trial
from sfda_tune.values.features import Score
from sfda_tune.values.text import format_bytes, printable, require

REDRAW = 0.2  # seconds between two pictures of a bar in a notebook
LEADERS = 5  # backbones below a bar
LONG = 10_000  # forward passes of which it is said before that they are many

__all__ = ["Bar", "NullProgress", "SearchProgress", "as_progress", "check_progress", "is_notebook"]


class NullProgress:
    """Shows nothing; what a progress object must answer to, with `rank` or with `search`."""

    def plan(self, work: Mapping[str, tuple[int, float]]) -> None:
        """Receive, before `start`, the images that each backbone is to see, and their cost."""

    def start(self, n_images: int, n_cached: int) -> None:
        """Receive how many images × backbones lie ahead, and how many backbones are cached."""

    def expect(self, n: int, size: int) -> None:
        """Receive, before `start`, of how many backbones weights come, and how many bytes."""

    def advance(self, backbone: str, n_images: int) -> None:
        """Receive that a backbone has seen so many further images."""

    def finish(self, score: Score) -> None:
        """Receive the score of a backbone."""

    def fetch(self, backbone: str, done: int, total: int | None) -> None:
        """Receive how many bytes of a backbone's weights have come, in another thread."""

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


class _Work:
    """What lies ahead of an extraction, in costs, and how much of it is done."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.ahead: dict[str, list[float]] = {}  # images, cost of one, images seen

    def plan(self, work: Mapping[str, tuple[int, float]]) -> None:
        """Add what lies ahead; in a race the same backbones come again."""
        for name, (n, cost) in work.items():
            known = self.ahead.setdefault(name, [0.0, cost, 0.0])
            known[0] += n

    def advance(self, backbone: str, n_images: int) -> None:
        self.ahead.setdefault(backbone, [0.0, 1.0, 0.0])[2] += n_images

    @property
    def total(self) -> float:
        return sum(n * cost for n, cost, _ in self.ahead.values())

    @property
    def done(self) -> float:
        return sum(min(seen, n) * cost for n, cost, seen in self.ahead.values())

    @property
    def backbones(self) -> str:
        """How many backbones are through, in words."""
        through = sum(seen >= n for n, _, seen in self.ahead.values())
        return f"{through} of {len(self.ahead)} backbones"

    @property
    def left(self) -> float | None:
        """The seconds left, if the rest goes as what is done."""
        if not self.done:
            return None
        return (time.monotonic() - self.started) * (self.total - self.done) / self.done


class _Leaders:
    """The best few scores so far; in a race of those that have seen as many images as any."""

    def __init__(self, n: int = LEADERS) -> None:
        self.scores: dict[str, Score] = {}
        self._n = n

    def add(self, score: Score) -> None:
        self.scores[score.backbone] = score

    def lines(self) -> list[str]:
        """Return nothing while there is nobody to be better than."""
        known = [s for s in list(self.scores.values()) if math.isfinite(s.value)]
        most = max((s.n_samples for s in known), default=0)
        known = sorted((s for s in known if s.n_samples == most), key=lambda s: -s.value)
        if len(known) < 2 or not self._n:
            return []
        best = [f"{s.value:10.4f}  {printable(s.backbone)}" for s in known[: self._n]]
        return ["  best scores so far", *best]


def is_notebook() -> bool:
    """Whether a notebook shows what is printed: Jupyter, Colab, Databricks."""
    from rich.console import Console

    return Console().is_jupyter


def _progress_of(console: Any, leaders: _Leaders) -> Any:
    """Return the class of `rich` that draws bars on a console, on terminals with the leaders.

    In notebooks `rich` itself needs ipywidgets to redraw; IPython redraws without.
    """
    from rich.progress import Progress
    from rich.text import Text

    class Board(Progress):
        def get_renderables(self) -> Iterator[Any]:
            yield from super().get_renderables()
            for line in leaders.lines():
                yield Text(line, "dim", no_wrap=True, overflow="ellipsis")

    if not console.is_jupyter:
        return Board if console.is_terminal else Progress
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
    """A `rich` progress bar on standard error, or in a notebook.

    On a terminal the best scores so far stand below it, but for ``leaders=False``.
    """

    def __init__(self, console: Any = None, *, leaders: bool = True) -> None:
        from rich import progress

        from sfda_tune.pipelines.terminal import Terminal

        console = console or Terminal(stderr=True)
        self._leaders = _Leaders(n=LEADERS if leaders else 0)
        self.rich = _progress_of(console, self._leaders)(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[through]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[left]}"),
            progress.TextColumn("{task.fields[coming]}", markup=False),
            console=console,
            transient=True,
        )
        empty: dict[str, Any] = {"through": "", "left": "", "coming": ""}
        self._task = self.rich.add_task("opening images and networks", total=None, **empty)
        self._work = _Work()
        self._told = self._coming = False  # once, though a race begins anew at each of its stages

    def plan(self, work: Mapping[str, tuple[int, float]]) -> None:
        """Know what lies ahead."""
        self._work.plan(work)

    def start(self, n_images: int, n_cached: int) -> None:
        """Show the bar, unless everything is cached."""
        if n_cached:
            self.rich.console.print(f"{n_cached} backbones need no forward pass (cached features)")
        if n_images >= LONG and not self._told:
            self._told = True
            self.rich.console.print(
                f"{n_images:,} forward passes lie ahead, of {len(self._work.ahead)} backbones; "
                "`--dry-run` tells what a run takes"
            )
        if n_images:
            work = self._work
            self.rich.update(
                self._task, description="opening", total=work.total, through=work.backbones
            )

    def expect(self, n: int, size: int) -> None:
        """Say how much is to be downloaded."""
        if not self._coming:
            self._coming = True
            self.rich.console.print(
                f"the weights of {n} backbones are to be downloaded, about {format_bytes(size)}"
            )

    def advance(self, backbone: str, n_images: int) -> None:
        """Move the bar on and name the backbone at work."""
        work = self._work
        work.advance(backbone, n_images)
        self.rich.update(
            self._task, completed=work.done, total=work.total, through=work.backbones,
            left="" if work.left is None else _left(work.left), description=printable(backbone),
        )  # fmt: skip

    def finish(self, score: Score) -> None:
        """Compare a score with the others."""
        self._leaders.add(score)

    def fetch(self, backbone: str, done: int, total: int | None) -> None:
        """Tell which weights come, and how much of them is here."""
        self.rich.update(self._task, coming=_say_coming(backbone, done, total))


class SearchProgress(NullProgress):
    """One line per finished stage and a moving one below, on standard error.

    On a terminal the best scores of the ranking stand below that, but for ``leaders=False``.
    """

    def __init__(self, console: Any = None, *, leaders: bool = True) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

        from sfda_tune.pipelines.terminal import Terminal

        console = console or Terminal(stderr=True)
        self._leaders = _Leaders(n=LEADERS if leaders else 0)
        self.rich = _progress_of(console, self._leaders)(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[coming]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self.rich.add_task("starting", total=None, left="", coming="")
        self._stage, self._work = "", _Work()

    def enter(self, stage: str) -> None:
        """Name the stage."""
        self._stage, self._started = stage, time.monotonic()
        self.say("", 0, None)

    def leave(self, stage: str, note: str) -> None:
        """Print what the stage has found."""
        from sfda_tune.pipelines.terminal import say

        self._leaders.scores.clear()
        seconds = time.monotonic() - self._started
        say(self.rich.console, f"{stage:<9} {seconds:6.1f} s  {note}")

    def say(self, what: str, done: float, total: float | None, left: float | None = None) -> None:
        """Move the bar, and estimate the seconds left from the share that is done."""
        if left is None and total and done:
            left = (time.monotonic() - self._started) * (total - done) / done
        shown = "" if left is None else _left(left)
        text = f"{self._stage}: {printable(what)}" if what else self._stage
        self.rich.update(self._task, description=text, completed=done, total=total, left=shown)

    def plan(self, work: Mapping[str, tuple[int, float]]) -> None:
        """Know what the ranking has to look at."""
        self._work.plan(work)

    def advance(self, backbone: str, n_images: int) -> None:
        """Show which backbone is being ranked."""
        work = self._work
        work.advance(backbone, n_images)
        self.say(f"{backbone}, {work.backbones}", work.done, work.total)

    def finish(self, score: Score) -> None:
        """Compare a score with the others."""
        self._leaders.add(score)

    def fetch(self, backbone: str, done: int, total: int | None) -> None:
        """Tell which weights come, and how much of them is here."""
        self.rich.update(self._task, coming=_say_coming(backbone, done, total))

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


def _say_coming(backbone: str, done: int, total: int | None) -> str:
    """Say how much of a download is here; nothing when it is whole."""
    if total is not None and done >= total:
        return ""
    of = "" if total is None else f" of {format_bytes(total)}"
    return f"fetching {printable(backbone)}: {format_bytes(done)}{of}"


def check_progress(progress: Any) -> None:
    """Refuse what `as_progress` cannot show."""
    rule = "True, False, or an object with the methods of NullProgress,"
    known = not progress or progress is True or hasattr(progress, "start")
    require("progress", progress, rule, known)


@contextmanager
def as_progress(progress: Any, kind: type[Bar | SearchProgress] = Bar) -> Iterator[Any]:
    """Turn a bool into a progress object and show it; hand any other object through.

    None is a bar in a notebook, and nothing elsewhere.
    """
    progress = is_notebook() if progress is None else progress
    shown = kind() if progress is True else progress or NullProgress()
    with shown.rich if isinstance(shown, (Bar, SearchProgress)) else nullcontext():
        yield shown
