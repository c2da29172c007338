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
from sfda_tune.selection.calibration import Observation
from sfda_tune.values.files import check, read_json, say_kind, write_csv, write_json
from sfda_tune.values.formats import FOUND, SEARCH
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import (
    describe_images,
    format_count,
    format_duration,
    printable,
)

__all__ = ["SearchResult", "write_predictions"]


def write_predictions(folder: Path, images: ImageDataset, p: np.ndarray, rows: Any) -> None:
    """Write test_predictions.csv and the 12 images with the lowest probability of their label."""
    classes = images.classes
    table = [["item", "label", "predicted", "confidence", *(f"p_{c}" for c in classes)]]
    for row in rows:
        label, guess = classes[images.labels[row]], classes[p[row].argmax()]
        numbers = [f"{x:.6g}" for x in (p[row].max(), *p[row])]
        table.append([images.item_name(row), label, guess, *numbers])
    write_csv(folder / "test_predictions.csv", table)
    (folder / "hardest").mkdir(exist_ok=True)
    right = p[rows, images.labels[rows]]
    entries = []
    for k, i in enumerate(np.argsort(right, kind="stable")[:12]):
        row, file = rows[i], f"{k:02d}.png"
        image = images.load(row)
        image.thumbnail((160, 160))
        image.save(folder / "hardest" / file)
        entries.append(
            {
                "file": file,
                "item": images.item_name(row),
                "label": classes[images.labels[row]],
                "predicted": classes[p[row].argmax()],
                "p_label": float(right[i]),
            }
        )
    write_json(folder / "hardest" / "hardest.json", entries)


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
        sign = -1.0 if self.summary["metric"] == "log_loss" else 1.0
        return tuple(
            Observation(t["backbone"], "complete", sign * t["value"], params=t["params"])
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
        """Accuracy, balanced accuracy, macro-F1 and log-loss on the test images."""
        return self.best["test"]

    @property
    def classes(self) -> list[str]:
        """The classes behind the columns of `predict`."""
        return self.summary["classes"]

    @property
    def images(self) -> str:
        """Which images trained, validated and tested, in a sentence."""
        return describe_images(self.summary)

    def predict(self, images: Any, **options: Any) -> np.ndarray:
        """Return class probabilities (n_images, n_classes); see `predictions.predict`."""
        return predict(self.folder / "model", images, **options)

    def rows(self) -> list[tuple[str, str]]:
        """Return what there is to say of the winner, in figures: pairs of name and value."""
        best, found = self.best, []
        for name, value in self.test.items():
            shown = f"{value:.4f}"
            if name == "accuracy" and "test_interval" in best:
                shown += " (95 %: {:.4f} to {:.4f})".format(*best["test_interval"])
            found.append((name.replace("_", " "), shown))
        if calibration := best.get("calibration"):
            shown = "{ece_before:.4f}, {ece_after:.4f} at temperature {temperature:.2f}"
            found.append(("calibration error", shown.format(**calibration)))
        if best.get("latency_ms"):
            found.append(("latency of one image", f"{best['latency_ms']:.1f} ms"))
        if best.get("n_params"):
            found.append(("parameters", format_count(best["n_params"])))
        seconds = self.summary["seconds"]["total"]
        found.append(("trials", f"{len(self.trials)} in {format_duration(seconds)}"))
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
        numbers = ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in b["test"].items())
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
        if "test_interval" not in self.best:  # of an older version
            return ""
        low, high = self.best["test_interval"]
        return f" (95 % interval of the accuracy: {low:.4f} to {high:.4f})"
