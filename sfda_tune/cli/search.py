"""The commands ``sfda-tune search`` and ``sfda-tune predict``."""

from __future__ import annotations

import math
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from sfda_tune.cli.terminal import check_out, fail, messages, output, show_result, split_commas

__all__ = ["predict", "search"]


def search(
    dataset: Annotated[
        str, typer.Argument(help="As for `rank`; a folder may have train/, val/ and test/.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="RUN",
            help="Folder of the search. It is resumed, and extended by more --trials or --budget.",
        ),
    ],
    backbones: Annotated[
        list[str] | None,
        typer.Option("--backbones", "-b", metavar="SPEC...", help="As for `rank`."),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(metavar="N", help="Fine-tunings in all. Default: 12, without --budget."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="For everything: 2h, 45m, 90s, 1h30m.")
    ] = None,
    engine: Annotated[str, typer.Option(help="What runs the trials: optuna or ray.")] = "optuna",
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Database that workers share. Default: RUN/study.db."),
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", help="Processes that train at once.")] = 1,
    decoders: Annotated[
        int | None,
        typer.Option(metavar="N", help="Decoding processes of each. Default: one per core."),
    ] = None,
    keep: Annotated[
        int | None, typer.Option(metavar="K", help="Tune at most K backbones. Default: 3.")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="accuracy; accuracy,latency; or accuracy,params.")
    ] = "accuracy",
    metric: Annotated[
        str, typer.Option(help="accuracy, balanced_accuracy, macro_f1 or log_loss.")
    ] = "accuracy",
    max_params: Annotated[
        float | None, typer.Option(metavar="N", help="Leave larger backbones out: 25e6.")
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Leave slower ones out: milliseconds per image, here."),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to vary, as YAML or JSON.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Of a full trial. Default: by size.")] = None,
    previous: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Search on other data to learn from. Repeatable."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Use a stratified sample of so many images.")
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(help="Test images, or the fraction to hold out. Default: own part, or 0.2."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Use this part of DATASET only: train, val, test, all.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the paths.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels.")] = None,
    max_unreadable: Annotated[
        float, typer.Option(help="Fraction of unreadable images that is tolerated.")
    ] = 0.1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, tf32 (CUDA), bfloat16 or float16.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Of the splits and of the trials.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the kept features.")
    ] = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", metavar="FILE_OR_MODULE", help="As for `rank`.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Rank BACKBONES on DATASET, tune the best, fine-tune the winner and test it.

    The same command goes on where it was interrupted, and helps where it is running already.

    For example:

      sfda-tune search photos/ -b 'resnet50*' 'convnext_*.fb_in22k*' --budget 2h -o run/
    """
    from sfda_tune.pipelines import search as pipeline
    from sfda_tune.pipelines.progress import SearchProgress
    from sfda_tune.pipelines.terminal import say

    try:
        found = pipeline.search(
            dataset,
            ["demo:*"] if backbones is None else split_commas(backbones),
            trials=trials,
            budget=budget,
            engine=engine,
            storage=storage,
            workers=workers,
            decoders=decoders,
            keep=keep,
            objective=tuple(objective.replace(" ", "").split(",")),
            metric=metric,
            max_params=max_params,
            max_latency=max_latency,
            space=space,
            epochs=epochs,
            previous=previous or (),
            samples=samples,
            test=_fraction(test),
            split=split,
            image_column=image_column,
            label_column=label_column,
            max_unreadable=max_unreadable,
            device=device,
            precision=precision,
            plugins=imports or (),
            cache=cache or True,
            seed=seed,
            out=out,
            progress=False if quiet else SearchProgress(messages),
        )
    except KeyboardInterrupt:
        say(messages, "The same command goes on from here.")
        raise
    show_result(found)


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished search.")],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES...", help="Files, or folders: as for `rank`.")
    ],
    csv: Annotated[
        Path | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Write all probabilities there, as they become known. Names that a spreadsheet "
            "would run begin with an apostrophe; bytes that are no UTF-8 are kept.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    imports: Annotated[
        list[str] | None, typer.Option("--import", metavar="FILE_OR_MODULE", help="As for `rank`.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Classify IMAGES with the winner of the search in RUN."""
    from sfda_tune.data.folders import image_files
    from sfda_tune.finetuning.models import load_model, predict_batches
    from sfda_tune.pipelines.result import SearchResult
    from sfda_tune.pipelines.terminal import say

    if csv is not None:
        check_out(csv, "--csv", replaces=False)
    model = load_model(SearchResult.open(run).folder / "model", plugins=imports or ())
    files: list[str] = []
    for given in images:
        found = list(image_files(given)) if os.path.isdir(given) else [given]
        if not found:
            warnings.warn(f"{given!r} holds no image files", stacklevel=2)
        files += found
    if not files:
        raise ValueError(f"`IMAGES` must be image files, or folders that hold some: {images!r}.")
    table = _Table(csv, ["item", "predicted", "confidence", *(f"p_{c}" for c in model.classes)])
    unreadable: dict[int, str] = {}
    known = 0
    with table:
        for rows, p, bad in predict_batches(model, files, device=device):
            lines, shown = [], []
            for row, numbers in zip(rows, p.tolist(), strict=True):
                is_known = all(map(math.isfinite, numbers))
                best = max(range(len(numbers)), key=numbers.__getitem__)
                name = model.classes[best] if is_known else ""
                cells = [f"{x:.6g}" if is_known else "" for x in (numbers[best], *numbers)]
                lines.append([files[row], name, *cells])
                why = f"cannot be read: {bad[row]}" if row in bad else "has no finite numbers"
                said = f"{name}  {numbers[best]:.3f}" if is_known else why
                shown.append(f"{files[row]}  {said}")
                known += is_known
            table.write(lines)  # before they are shown: a kill loses nothing that was
            for line in shown:
                say(output, line)
            unreadable |= bad
    if unreadable:
        text = f"{len(unreadable)} of {len(files)} images cannot be read"
        warnings.warn(text, stacklevel=2)
    if table.problem:
        fail(f"{str(csv)!r} could not be written to the end ({table.problem}).")
    if not known:
        raise typer.Exit(1)


class _Table:
    """A CSV file that grows with what is known; what goes wrong is kept for later."""

    def __init__(self, path: Path | None, head: list[str]) -> None:
        self.path, self.head, self.problem = path, head, ""
        self._file: Any = None

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what cannot be flushed was told already
                self._file.close()

    def write(self, rows: list[list[Any]]) -> None:
        """Append rows; the first ones replace what the file held."""
        from sfda_tune.values.text import csv_line

        if self.path is None or self.problem:
            return
        try:
            if self._file is None:
                self._file = open(  # noqa: SIM115 - closed at the end
                    self.path, "w", encoding="utf-8", errors="surrogateescape", newline=""
                )
                rows = [self.head, *rows]
            self._file.write("".join(map(csv_line, rows)))
            self._file.flush()
        except OSError as error:
            self.problem = error.strerror or str(error)


def _fraction(text: str | None) -> float | str | None:
    try:
        return text if text is None else float(text)
    except ValueError:
        return text
