"""Bars in notebooks: `rich` itself needs ipywidgets to redraw them; IPython redraws without."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["is_notebook", "progress_class"]

REDRAW = 0.2  # seconds between two pictures


def is_notebook() -> bool:
    """Whether a notebook shows what is printed: Jupyter, Colab, Databricks."""
    from rich.console import Console

    return Console().is_jupyter


def progress_class() -> Any:
    """Return `rich.progress.Progress`, or what takes its part in a notebook."""
    from rich.progress import Progress

    if not is_notebook():
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
