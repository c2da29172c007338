"""What a search found, and the tables it leaves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sfda_tune.data.dataset import ImageDataset
from sfda_tune.finetuning.models import predict
from sfda_tune.finetuning.tasks import Multilabel, Ordinal, Task
from sfda_tune.selection.calibration import Observation
from sfda_tune.selection.several import label_losses
from sfda_tune.values.files import check, read_json, say_kind, write_csv, write_json
from sfda_tune.values.formats import FOUND, SEARCH
from sfda_tune.values.metrics import call, signed, tell
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import (
    describe_images,
    format_count,
    format_duration,
    printable,
)

__all__ = ["SearchResult", "write_predictions"]


def write_predictions(
    folder: Path, images: ImageDataset, p: np.ndarray, rows: Any, task: Task
) -> None:
    """Write test_predictions.csv and the 12 hardest images.

    Those have the lowest probability of their label; of numbers and levels, the largest error; of
    several labels, the largest mean −log p of what is known.
    """
    if isinstance(task, Multilabel):
        told = _tell_labels(images, p[rows], rows, task)
    elif isinstance(task, Ordinal):
        told = _tell_levels(images, p[rows], rows, task)
    else:
        told = (_tell_classes if images.classes else _tell_numbers)(images, p[rows], rows)
    heads, table, about, ease = told
    names = [images.item_name(row) for row in rows]
    lines = [[name, *cells] for name, cells in zip(names, table, strict=True)]
    write_csv(folder / "test_predictions.csv", [["item", *heads], *lines])
    (folder / "hardest").mkdir(exist_ok=True)
    entries = []
    hardest = [i for i in np.argsort(ease, kind="stable")[:12] if np.isfinite(ease[i])]
    for k, i in enumerate(hardest):
        row, file = rows[i], f"{k:02d}.png"
        image = images.picture(row)
        image.thumbnail((160, 160))
        image.save(folder / "hardest" / file)
        told = {"label": table[i][0], "predicted": table[i][1], about[0]: float(about[1][i])}
        entries.append({"file": file, "item": names[i], **told})
    write_json(folder / "hardest" / "hardest.json", entries)


# Heads and cells of the table, what is told of the hardest images, how easy each one is
Told = tuple[list[str], list[list[str]], tuple[str, np.ndarray], np.ndarray]


def _tell_classes(images: ImageDataset, p: np.ndarray, rows: Any) -> Told:
    """Return what test_predictions.csv says of probabilities (n, C)."""
    classes, labels = images.classes, images.labels[rows]
    table = [
        [classes[y], classes[q.argmax()], *(f"{x:.6g}" for x in (q.max(), *q))]
        for y, q in zip(labels, p, strict=True)
    ]
    heads = ["label", "predicted", "confidence", *(f"p_{c}" for c in classes)]
    right = p[np.arange(len(p)), labels]
    return heads, table, ("p_label", right), right


def _tell_numbers(images: ImageDataset, p: np.ndarray, rows: Any) -> Told:
    """Return what test_predictions.csv says of numbers (n,)."""
    labels = images.labels[rows]
    error = p - labels
    table = [[f"{v:.9g}" for v in row] for row in zip(labels, p, error, strict=True)]
    return ["label", "predicted", "error"], table, ("error", error), -np.abs(error)


def _tell_levels(images: ImageDataset, p: np.ndarray, rows: Any, task: Ordinal) -> Told:
    """Return what test_predictions.csv says of probabilities (n, C) of levels."""
    labels, names, places = images.labels[rows], images.classes, task.find_places(p)
    table = [
        [names[y], names[k], *(f"{x:.6g}" for x in (place, *q))]
        for y, k, place, q in zip(labels, task.decide(p), places, p, strict=True)
    ]
    heads = ["label", "predicted", "place", *(f"p_{c}" for c in names)]
    error = places - labels
    return heads, table, ("error", error), -np.abs(error)


def _tell_labels(images: ImageDataset, p: np.ndarray, rows: Any, task: Multilabel) -> Told:
    """Return what test_predictions.csv says of probabilities (n, L) of several labels."""
    labels = images.labels[rows]
    table = [
        [images.label_name(y), images.label_name(named), *(f"{x:.6g}" for x in q)]
        for y, named, q in zip(labels, task.decide(p), p, strict=True)
    ]
    known = (labels >= 0).any(axis=1)
    loss = np.full(len(p), -np.inf)  # nothing is known, nothing is wrong
    loss[known] = np.nanmean(label_losses(labels[known], p[known]), axis=1)
    return (
        ["label", "predicted", *(f"p_{c}" for c in images.classes)],
        table,
        ("loss", loss),
        -loss,
    )


@dataclass(frozen=True, repr=False)
class SearchResult:
    """What a search found; `open` reads it from the folder.

    Parameters
    ----------
    folder : Path
    summary : mapping
        What ``search.json`` holds: stages, decision, trials, front, costs, seconds.
    ranking : Ranking
    """

    folder: Path
    summary: Mapping[str, Any]
    ranking: Ranking

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> SearchResult:
        """Open the folder of a finished search.

        Raises
        ------
        ValueError
            If there is none, or it has not finished.
        """
        folder = Path(folder)
        path = folder / "search.json"
        if os.path.lexists(path):
            summary = read_json(path, SEARCH)
            why = f"has status {summary.get('status')!r}"
        else:
            summary, why = {}, "holds no search.json" if folder.is_dir() else say_kind(folder)
        if summary.get("status") not in ("done", "budget spent"):
            raise ValueError(
                f"`folder` must be that of a finished search but {str(folder)!r} {why}; run "
                "`sfda-tune search` with --out, to the end."
            )
        check(summary, FOUND, "search.json")
        return cls(folder, summary, Ranking.from_json(folder / "ranking.json"))

    @property
    def history(self) -> tuple[Observation, ...]:
        """The trials as evidence for searches on other data: complete ones, higher is better."""
        metric = self.summary["metric"]
        return tuple(
            Observation(t["backbone"], "complete", signed(t["value"], metric), params=t["params"])
            for t in self.summary["trials"]
            if t["state"] == "complete" and t["value"] is not None
        )

    @property
    def best(self) -> dict[str, Any]:
        """The winner: ``trial, backbone, params, val, test, latency_ms, n_params``."""
        return self.summary["best"]

    @property
    def trials(self) -> list[dict[str, Any]]:
        """All trials, each a dict."""
        return self.summary["trials"]

    @property
    def test(self) -> dict[str, float]:
        """What the test images say, by metric: those that `search` names for the task."""
        return self.best["test"]

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of some of these."""
        best = self.best
        if "test_intervals" in best:
            return {name: tuple(ends) for name, ends in best["test_intervals"].items()}
        return {"accuracy": best["test_interval"]} if "test_interval" in best else {}

    @property
    def classes(self) -> list[str]:
        """The classes behind the columns of `predict`, or the levels; none for numbers."""
        return self.summary["classes"]

    @property
    def images(self) -> str:
        """Which images trained, validated and tested, in a sentence."""
        return describe_images(self.summary)

    def predict(self, images: Any, **options: Any) -> np.ndarray:
        """Return class probabilities (n_images, n_classes), or numbers; see `models.predict`."""
        return predict(self.folder / "model", images, **options)

    def rows(self) -> list[tuple[str, str]]:
        """Return what there is to say of the winner, in figures: pairs of name and value."""
        best, found = self.best, []
        for name, value in self.test.items():
            found.append((call(name), tell(value, self.intervals.get(name))))
        if calibration := best.get("calibration"):
            shown = "{ece_before:.4f}, {ece_after:.4f} at temperature {temperature:.2f}"
            found.append(("calibration error", shown.format(**calibration)))
        if best.get("latency_ms"):
            found.append(("latency of one image", f"{best['latency_ms']:.1f} ms"))
        if best.get("n_params"):
            found.append(("parameters", format_count(best["n_params"])))
        seconds = self.summary["seconds"]["total"]
        found.append(("trials", str(len(self.trials))))
        found.append(("time in all", format_duration(seconds)))
        return found

    def _title(self) -> str:
        n = self.summary["n_images"]["test"]
        return (
            f"{printable(self.best['backbone'])}, trial {self.best['trial']}, on {n} test "
            f"image{'s' * (n != 1)}"
        )

    def __repr__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:<{width}}  {value}" for name, value in rows]
        return "\n".join([f"SearchResult: {self._title()}", *lines, f"  {self.folder}"])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table><caption>{escape(self._title())}</caption><tbody>{rows}</tbody></table>"

    def __str__(self) -> str:
        b, s = self.best, self.summary
        numbers = ", ".join(f"{call(k)} {tell(v)}" for k, v in b["test"].items())
        n = s["n_images"]["test"]
        return (
            f"{b['backbone']} (trial {b['trial']}, {len(s['trials'])} in all): {numbers} on "
            f"{n} test image{'s' * (n != 1)}{self._interval}; {s['decision']}; "
            f"{s['seconds']['total']:.0f} s"
            + f"; {self.folder}" * self.folder.is_dir()
            + "".join(f"\nnote: {note}" for note in s.get("notes", ()))
        )

    @property
    def _interval(self) -> str:
        if not self.intervals:  # of an older version
            return ""
        name, (low, high) = next(iter(self.intervals.items()))
        return f" (95 % interval of the {call(name)}: {low:.4f} to {high:.4f})"
