"""The command ``sfda-tune search``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from sfda_tune.cli.config import write_config
from sfda_tune.cli.options import (
    AsJson,
    Bands,
    BitDepth,
    Config,
    GroupColumn,
    GroupRegex,
    Groups,
    LabelColumns,
    LabelDelimiter,
    Levels,
    Log,
    SplitColumn,
    Task,
    Threads,
    Verbose,
    read_groups,
)
from sfda_tune.cli.terminal import messages, print_json, show_result, split_commas

__all__ = ["search"]


def search(
    ctx: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help="As for `rank`; a folder may have train/, val/ and test/."
        ),
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
    threads: Threads = None,
    keep: Annotated[
        int | None, typer.Option(metavar="K", help="Tune at most K backbones. Default: 3.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="accuracy; accuracy,latency; or accuracy,params (for numbers r2, for levels "
            "spearman, for several labels map in its place). Default: the first."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--monitor",
            help="accuracy, balanced_accuracy, macro_f1 or log_loss; for numbers r2, spearman, "
            "rmse or mae; for levels spearman, qwk (quadratic weighted kappa), mae, "
            "accuracy or log_loss; for several labels map (mean average precision), macro_f1 or "
            "log_loss. Default: the first.",
        ),
    ] = None,
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
    groups: Groups = None,
    group_column: GroupColumn = None,
    group_regex: GroupRegex = None,
    split_column: SplitColumn = None,
    task: Task = "auto",
    label_columns: LabelColumns = None,
    label_delimiter: LabelDelimiter = None,
    levels: Levels = None,
    bit_depth: BitDepth = None,
    bands: Bands = None,
    loss: Annotated[
        str | None,
        typer.Option(help="What training minimises for numbers: mse, l1 or huber. Default: mse."),
    ] = None,
    time_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of when images were made: what is held out comes after what is trained "
            "on.",
        ),
    ] = None,
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
    weights_disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Disk for weights that this search downloads, such as `50GB`: they are removed "
            "again, those that are tuned in the end. What was here before stays.",
        ),
    ] = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", metavar="FILE_OR_MODULE", help="As for `rank`.")
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
    log: Log = None,
    verbose: Verbose = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Rank BACKBONES on DATASET, tune the best, fine-tune the winner and test it.

    The same command goes on where it was interrupted, and helps where it is running already.
    Labels that are numbers to predict: --task regression; levels in an order, such as grades:
    --task ordinal; several per image: --task multilabel.

    For example:

      sfda-tune search photos/ -b preset:small --budget 2h -o run/
    """
    from sfda_tune.pipelines import search as pipeline
    from sfda_tune.pipelines.progress import SearchProgress
    from sfda_tune.pipelines.terminal import say

    before, done = _read(out / "config.json"), False
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
            threads=threads,
            keep=keep,
            objective=objective,
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
            groups=read_groups(groups, group_column, group_regex),
            split_column=split_column,
            task=None if task == "auto" else task,
            label_columns=label_columns,
            label_delimiter=label_delimiter,
            levels=levels,
            loss=loss,
            bit_depth=bit_depth,
            bands=bands,
            time_column=time_column,
            max_unreadable=max_unreadable,
            device=device,
            precision=precision,
            plugins=imports or (),
            weights_disk=weights_disk,
            cache=cache or True,
            seed=seed,
            out=out,
            progress=False if quiet else SearchProgress(messages, leaders=not as_json),
        )
        done = True
    except KeyboardInterrupt:
        say(messages, "The same command goes on from here.")
        raise
    finally:  # of a call that the folder refused nothing is kept
        if done or _read(out / "config.json") != before:
            with suppress(*[] if done else [OSError]):  # the disk that ended the search is full
                write_config(ctx, out / "config.yaml")
    if as_json:
        print_json({"folder": str(found.folder), **found.summary})
    else:
        show_result(found)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _fraction(text: str | None) -> float | str | None:
    try:
        return text if text is None else float(text)
    except ValueError:
        return text
