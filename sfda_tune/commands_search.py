"""The commands ``sfda-tune search`` and ``sfda-tune predict``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    precision: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
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
    from sfda_tune import cli, selection
    from sfda_tune.stages import Board
    from sfda_tune.terminal import say

    try:
        found = selection.search(
            dataset,
            ["demo:*"] if backbones is None else cli._split_commas(backbones),
            trials=trials,
            budget=budget,
            engine=engine,
            storage=storage,
            workers=workers,
            keep=keep,
            objective=tuple(objective.replace(" ", "").split(",")),
            metric=metric,
            max_params=max_params,
            max_latency=max_latency,
            space=space,
            epochs=epochs,
            samples=samples,
            test=_fraction(test),
            split=split,
            image_column=image_column,
            label_column=label_column,
            device=device,
            precision=precision,
            plugins=imports or (),
            cache=cache or True,
            seed=seed,
            out=out,
            progress=False if quiet else Board(cli.messages),
        )
    except KeyboardInterrupt:
        say(cli.messages, "The same command goes on from here.")
        raise
    say(cli.output, found)


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished search.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGES...", help="Files or folders.")],
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write all probabilities there.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    imports: Annotated[
        list[str] | None, typer.Option("--import", metavar="FILE_OR_MODULE", help="As for `rank`.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Classify IMAGES with the winner of the search in RUN."""
    import numpy as np

    from sfda_tune import cli
    from sfda_tune.predictions import image_files, load_model
    from sfda_tune.predictions import predict as classify
    from sfda_tune.selection import SearchResult

    model = load_model(SearchResult.open(run).folder / "model", plugins=imports or ())
    files: list[str] = []
    for given in images:
        files += map(str, image_files(given)) if os.path.isdir(given) else [given]
    if not files:
        raise ValueError(f"`IMAGES` must be image files, or folders that hold some: {images!r}.")
    p = classify(model, files, device=device)
    rows: list[list[Any]] = []
    for file, row in zip(files, p, strict=True):
        known = bool(np.isfinite(row).all())
        numbers = [f"{x:.6g}" for x in (row.max(), *row)] if known else [""] * (len(row) + 1)
        rows.append([file, model.classes[row.argmax()] if known else "", *numbers])
        shown = f"{rows[-1][1]}  {row.max():.3f}" if known else "cannot be read"
        cli.output.print(f"{file}  {shown}", markup=False, highlight=False, soft_wrap=True)
    if csv is not None:
        from sfda_tune.splits import write_csv

        head = ["item", "predicted", "confidence", *(f"p_{name}" for name in model.classes)]
        write_csv(csv, [head, *rows])
    if not np.isfinite(p).any():
        raise typer.Exit(1)


def _fraction(text: str | None) -> float | str | None:
    try:
        return text if text is None else float(text)
    except ValueError:
        return text
