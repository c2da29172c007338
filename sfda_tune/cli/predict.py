"""The command ``sfda-tune predict``."""

from __future__ import annotations

import glob
import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sfda_tune.cli.options import AsJson, Threads
from sfda_tune.cli.terminal import check_out, fail, messages, output, print_json

__all__ = ["predict"]


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished search.")],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Files, folders (as for `rank`), patterns such as 'new/**/*.jpg', or CSV and "
            "Parquet files that name files.",
        ),
    ],
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Write all probabilities (or numbers) there, as they become known. Names that a "
            "spreadsheet would run begin with an apostrophe; bytes that are no UTF-8 are kept.",
        ),
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            "--jsonl", metavar="FILE", help="The same as JSON, an image a line, as they are known."
        ),
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of the paths in a table. Default: path, ….")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    threads: Threads = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", metavar="FILE_OR_MODULE", help="As for `rank`.")
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Classify IMAGES with the winner of the search in RUN, or predict their numbers.

    Of levels the median by their probabilities is named, beside the mean, 0 being the lowest. Of
    several labels per image, those are named whose probability reaches their threshold.

    For example:

      sfda-tune predict run/ new_photos/ --csv predictions.csv
    """
    from rich.progress import Progress

    from sfda_tune.finetuning.models import load_model, predict_batches
    from sfda_tune.finetuning.tasks import Multilabel, Ordinal
    from sfda_tune.pipelines.result import SearchResult
    from sfda_tune.pipelines.terminal import say

    for option, path in (("--csv", csv), ("--jsonl", jsonl)):
        if path is not None:
            check_out(path, option, replaces=False)
    model = load_model(SearchResult.open(run).folder / "model", plugins=imports or ())
    files = _find_files(images, image_column)
    sure = "place" if isinstance(model.task, Ordinal) else "confidence"
    several = isinstance(model.task, Multilabel)
    tables = [
        _Table(csv, _csv_labels if several else partial(_csv, sure=sure), model.classes),
        _Table(jsonl, _jsonl, model.classes),
    ]
    unreadable: dict[int, str] = {}
    known, told = 0, []
    bar = Progress(console=messages, transient=True, disable=quiet or not messages.is_terminal)
    with tables[0], tables[1], bar:
        task = bar.add_task("classifying" if model.classes else "predicting", total=len(files))
        for rows, p, bad in predict_batches(model, files, batch_size, device, threads=threads):
            records = []
            for row, numbers in zip(rows, p.tolist(), strict=True):
                record: dict[str, Any] = {"item": files[row]}
                if np.isfinite(numbers).all():
                    record |= _judge(model.task, numbers)
                    known += 1
                else:
                    why = f"cannot be read: {bad[row]}" if row in bad else "has no finite numbers"
                    record["error"] = why
                records.append(record)
            for table in tables:  # before they are shown: a kill loses nothing that was
                table.write(records)
            for record in records if not as_json else ():
                say(output, f"{record['item']}  {_tell(record)}")
            told += records if as_json else []
            unreadable |= bad
            bar.advance(task, len(rows))
    if as_json:
        print_json(told)
    if unreadable:
        text = f"{len(unreadable)} of {len(files)} images cannot be read"
        warnings.warn(text, stacklevel=2)
    for table in tables:
        if table.problem:
            fail(f"{str(table.path)!r} could not be written to the end ({table.problem}).")
    if not known:
        raise typer.Exit(1)


def _find_files(images: list[str], image_column: str | None) -> list[str]:
    """Return the files that folders, patterns and tables stand for."""
    from sfda_tune.data.folders import image_files
    from sfda_tune.data.tables import read_paths

    files: list[str] = []
    for given in images:
        if os.path.isdir(given):
            found = list(image_files(given))
        elif given.lower().endswith((".csv", ".tsv", ".parquet")):
            found = read_paths(given, image_column)
        elif glob.has_magic(given) and not os.path.lexists(given):
            paths = sorted(glob.glob(given, recursive=True))
            found = [path for path in paths if not os.path.isdir(path)]
        else:
            found = [given]
        if not found:
            warnings.warn(f"{given!r} holds no image files", stacklevel=2)
        files += found
    if not files:
        raise ValueError(f"`IMAGES` must be image files, or folders that hold some: {images!r}.")
    return files


def _judge(task: Any, p: Any) -> dict[str, Any]:
    """Return what is predicted: a number, or labels, a level or a class with probabilities."""
    from sfda_tune.finetuning.tasks import Multilabel, Ordinal

    if not task.classes:
        return {"predicted": p}
    odds = dict(zip(task.classes, p, strict=True))
    if isinstance(task, Multilabel):
        named = [c for c, one in zip(odds, task.decide(np.array(p)), strict=True) if one]
        return {"predicted": named, "probabilities": odds}
    if isinstance(task, Ordinal):
        row = np.array([p])
        named = task.classes[task.decide(row)[0]]
        return {"predicted": named, "place": task.find_places(row)[0], "probabilities": odds}
    best = max(odds, key=lambda c: odds[c])
    return {"predicted": best, "confidence": odds[best], "probabilities": odds}


def _tell(record: dict[str, Any]) -> str:
    """Return class or labels and how likely they are, level and place, or the number."""
    if "error" in record:
        return record["error"]
    if isinstance(record["predicted"], list):
        odds = record["probabilities"]
        return ", ".join(f"{c} {odds[c]:.3f}" for c in record["predicted"]) or "no label"
    if "confidence" in record:
        return f"{record['predicted']}  {record['confidence']:.3f}"
    if "place" in record:
        return f"{record['predicted']}  {record['place']:.3f}"
    return f"{record['predicted']:.6g}"


def _csv(
    records: list[dict[str, Any]], classes: tuple[str, ...], is_first: bool, sure: str
) -> str:
    from sfda_tune.values.text import csv_line

    if not classes:
        rows = [["item", "predicted"]] if is_first else []
        for record in records:
            number = record.get("predicted")
            rows.append([record["item"], "" if number is None else f"{number:.9g}"])
        return "".join(map(csv_line, rows))
    head = ["item", "predicted", sure, *(f"p_{c}" for c in classes)]
    rows = [head] if is_first else []
    for record in records:
        odds = record.get("probabilities", {})
        numbers = [record.get(sure), *(odds.get(name) for name in classes)]
        cells = ["" if x is None else f"{x:.6g}" for x in numbers]
        rows.append([record["item"], record.get("predicted", ""), *cells])
    return "".join(map(csv_line, rows))


def _csv_labels(records: list[dict[str, Any]], classes: tuple[str, ...], is_first: bool) -> str:
    """Return 0 or 1 for each label, then its probability; nothing of an unreadable image."""
    from sfda_tune.values.text import csv_line

    head = ["item", *classes, *(f"p_{c}" for c in classes)]
    rows = [head] if is_first else []
    for record in records:
        odds, named = record.get("probabilities"), record.get("predicted", ())
        cells = [""] * (2 * len(classes))
        if odds is not None:
            cells = [str(int(c in named)) for c in classes]
            cells += [f"{odds[c]:.6g}" for c in classes]
        rows.append([record["item"], *cells])
    return "".join(map(csv_line, rows))


def _jsonl(records: list[dict[str, Any]], classes: tuple[str, ...], is_first: bool) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


class _Table:
    """A file that grows with what is known; what goes wrong is kept for later."""

    def __init__(
        self, path: Path | None, write: Callable[..., str], classes: tuple[str, ...]
    ) -> None:
        self.path, self.problem, self._text, self._classes = path, "", write, classes
        self._file: Any = None

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what cannot be flushed was told already
                self._file.close()

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append; the first records replace what the file held."""
        if self.path is None or self.problem:
            return
        try:
            is_first = self._file is None
            if is_first:
                self._file = open(  # noqa: SIM115 - closed at the end
                    self.path, "w", encoding="utf-8", errors="surrogateescape", newline=""
                )
            self._file.write(self._text(records, self._classes, is_first))
            self._file.flush()
        except OSError as error:
            self.problem = error.strerror or str(error)
