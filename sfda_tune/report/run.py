"""Reading the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sfda_tune.report.pictures import draw_hard_images, make_thumbnail
from sfda_tune.report.plots import STATES
from sfda_tune.values.files import check, open_regular, read_json, read_rows, say_kind
from sfda_tune.values.formats import CONFIG, ENVIRONMENT, HARD_IMAGE, SEARCH
from sfda_tune.values.metrics import LOWER
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import read_csv_cell

__all__ = ["Run", "read_numbers", "read_run"]

N_PICTURES = 12


@dataclass(frozen=True)
class Run:
    """What there is to report: a ranking, and perhaps the search that followed."""

    ranking: Ranking
    search: Mapping[str, Any] | None = None
    trials: Sequence[dict[str, Any]] = ()
    config: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None
    predictions: Sequence[Mapping[str, str]] = ()  # item, label, predicted
    hardest: Sequence[Mapping[str, Any]] = ()
    gaps: Sequence[str] = ()  # what is missing, in sentences
    folder: str = ""  # of the search
    pictures: Mapping[int, str] = field(default_factory=dict)  # of the hard images of the ranking

    @property
    def sign(self) -> int:
        """−1 where lower values are better."""
        return -1 if (self.search or {}).get("metric") in LOWER else 1

    @property
    def of_numbers(self) -> bool:
        """Whether labels are numbers to predict."""
        return _is(self, "regression")

    @property
    def column(self) -> str:
        """The column of the labels, "" where nobody named one."""
        given = self.config or self.ranking.info.get("arguments") or {}
        return str(given.get("label_column") or "")

    @property
    def of_levels(self) -> bool:
        """Whether classes are levels in an order."""
        return _is(self, "ordinal")

    @property
    def of_labels(self) -> bool:
        """Whether an image may have several labels."""
        return _is(self, "multilabel")


def _is(run: Run, task: str) -> bool:
    return task in ((run.search or {}).get("task"), run.ranking.info.get("task"))


def read_run(source: str | os.PathLike[str], images: Any = True) -> Run:
    """Read the folder of a search, finished or not, or the file of a ranking.

    `images` say where the pictures of hard images come from, see `draw_hard_images`.

    Raises
    ------
    ValueError
        If there is neither, or a file is not what it should be; the message names the file. A
        missing file is no error: the report says what is missing.
    """
    path = Path(source)
    if path.is_file():
        ranking = _read_ranking(path)
        return Run(ranking, pictures=draw_hard_images(ranking.info, images, N_PICTURES))
    search = _read(path / "search.json", SEARCH)
    is_ranked = os.path.lexists(path / "ranking.json")
    if not search and not is_ranked:
        why = "is a folder without either" if path.is_dir() else say_kind(path)
        raise ValueError(
            f"{os.fspath(path)!r} must be a ranking.json, or the folder of a search with its "
            f"search.json, but {why}; see `sfda-tune search --out`."
        )
    predictions = _read_predictions(path / "test_predictions.csv")
    entries = _read(path / "hardest" / "hardest.json", [object])
    ranking = _read_ranking(path / "ranking.json") if is_ranked else Ranking(())
    hardest = [entry for e in entries if (entry := _add_picture(path / "hardest", e))]
    gaps = {
        "There is no ranking: the search ended before the backbones were ranked.": not is_ranked,
        "No test images were predicted, so the winner is not examined.": not predictions,
        "Not all thumbnails of hard images could be read.": len(hardest) < len(entries),
    }
    return Run(
        ranking,
        search or None,
        _complete(search.get("trials") or (), path / "search.json"),
        _read(path / "config.json", CONFIG),
        _read(path / "environment.json", ENVIRONMENT),
        predictions,
        hardest if images is not False else [],
        [gap for gap, holds in gaps.items() if holds],
        os.fspath(path),
        draw_hard_images(ranking.info, images, N_PICTURES),
    )


def _read_ranking(path: Path) -> Ranking:
    try:
        return Ranking.from_json(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)}: must be UTF-8 ({error}).") from None


def _read(path: Path, kind: Any) -> Any:
    """Read JSON of a kind; what is empty where there is no file."""
    empty: Any = [] if isinstance(kind, list) else {}
    if not os.path.lexists(path):
        return empty
    data = read_json(path, kind)
    if data and isinstance(data, dict) and data.get("format", 1) != 1:
        raise ValueError(
            f"{os.fspath(path)}: must be an object of format 1; did a later sfda-tune write it?"
        )
    return data


def _complete(entries: Iterable[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Give each trial all fields, in the order of their numbers."""
    empty = dict.fromkeys(("value", "values", "started", "seconds", "error")) | {"epochs": []}
    trials = [empty | entry for entry in entries]
    for i, trial in enumerate(trials):
        if trial["state"] not in STATES:
            raise ValueError(
                f"{os.fspath(path)}: `trials[{i}].state` must be one of {', '.join(STATES)} but "
                f"is {trial['state']!r}."
            )
    return sorted(trials, key=lambda t: t["number"])


def _read_predictions(path: Path) -> list[dict[str, str]]:
    columns = ("item", "label", "predicted")
    if not os.path.lexists(path):
        return []
    return [{c: read_csv_cell(row[c]) for c in columns} for row in read_rows(path, columns)]


def read_numbers(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and predictions of test images as numbers, (n,) each.

    Raises
    ------
    ValueError
        If one of them is none.
    """
    texts = [(row["label"], row["predicted"]) for row in run.predictions]
    try:
        found = np.array(texts, np.float64).reshape(-1, 2)
    except ValueError as error:
        raise ValueError(f"test_predictions.csv must hold numbers, but {error}.") from None
    if not np.isfinite(found).all():
        raise ValueError("test_predictions.csv must hold finite numbers but does not.")
    return found[:, 0], found[:, 1]


def _add_picture(folder: Path, entry: Any) -> dict[str, Any] | None:
    """Return the entry with its image as base64; decoded before, so that it is an image."""
    from PIL import Image

    try:
        entry = dict.fromkeys(("item", "label", "predicted"), "?") | {"p_label": None} | entry
        if Path(entry["file"]).name != entry["file"]:
            raise ValueError("outside the folder")
        check(entry, HARD_IMAGE)
        with open_regular(folder / entry["file"]) as file, Image.open(file) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, KeyError, TypeError, Image.DecompressionBombError):
        return None
    return entry | {"data": make_thumbnail(picture)}
