"""``sfda-tune rank``."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sfda_tune.cli.config import write_config
from sfda_tune.cli.options import (
    AsJson,
    Bands,
    BitDepth,
    CacheDir,
    Config,
    Debug,
    GroupColumn,
    GroupRegex,
    Groups,
    Imports,
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
from sfda_tune.cli.terminal import (
    check_out,
    describe_ranking,
    fail,
    messages,
    output,
    print_json,
    show_ranking,
    split_commas,
)
from sfda_tune.pipelines.terminal import say
from sfda_tune.values.ranking import Ranking


def rank(
    ctx: typer.Context,
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="An image folder (one sub-folder per class, or train/ and val/ with these), a "
            "CSV or Parquet file of paths and labels, `.tar` files (WebDataset), `hf:NAME`, "
            "`hf-stream:NAME` (draws --samples of a stream), or `digits`.",
        ),
    ] = "digits",
    backbones: Annotated[
        list[str] | None,
        typer.Option(
            "--backbones",
            "-b",
            metavar="SPEC...",
            help="timm names or globs (`resnet50.a1_in1k`, `'convnext_*.fb_in22k*'`), "
            "`hf-hub:owner/name`, a checkpoint folder or a folder of these, `demo:*`. Several "
            "may follow, also separated by commas; DATASET stands before. Default: demo:*.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="`forecast` of what training will reach; or a score of the frozen features to "
            "rank by alone, `sfda`, or several, whose ranks are averaged: `sfda+imagenet`, "
            "`2*sfda+knn`. `imagenet` (published accuracy) and `params` look at no image. "
            "Default: forecast."
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="What the forecast is of: `full`, all weights are fine-tuned, or `head`, a head "
            "on frozen features. Default: full."
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Variant of the metric `sfda`: official, paper or loo.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Use a stratified sample of so many images.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample that --samples draws.")] = 0,
    race: Annotated[
        bool | None,
        typer.Option(
            help="Show few images to all, more only to those that may still be in the top. "
            "Default: where a --budget does not suffice for all images."
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option(metavar="K", help="The top that a race is to find. Default: 5.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time for the images, such as `10m`: the most promising candidates for their "
            "price come first, and race where it does not suffice for all; what saw no image is "
            "ranked by what is known of it."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only tell what it will cost: time, downloads, memory."),
    ] = False,
    weights_disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Disk for weights that this run downloads, such as `50GB`: they are removed "
            "again, at the latest in the end. What was here before stays.",
        ),
    ] = None,
    ensemble: Annotated[
        int | None,
        typer.Option(metavar="K", help="Also choose K backbones to fine-tune together."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val, test or all. Default: train.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of the paths in a table. Default: path, ….")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of the labels. Default: label, class, ….")
    ] = None,
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, tf32 (CUDA), bfloat16 or float16.")
    ] = "float32",
    batch_size: Annotated[
        int | None, typer.Option(help="Images per forward pass. Default: automatic.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--decoders", help="Decoding processes. Default: one per core, at most 8."),
    ] = None,
    threads: Threads = None,
    max_unreadable: Annotated[
        float, typer.Option(help="Fraction of unreadable images that is tolerated.")
    ] = 0.1,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the ranking: .json or .csv."),
    ] = None,
    cache: CacheDir = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no features.")] = False,
    imports: Imports = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="Extract over the actors of a Ray cluster: `auto`, HOST:PORT, `ray://…`. Without "
            "ADDRESS that of $RAY_ADDRESS, else a Ray on this machine. Needs sfda-tune\\[ray].",
        ),
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
    log: Log = None,
    verbose: Verbose = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    debug: Debug = False,
) -> None:
    """Rank BACKBONES on the labelled images of DATASET.

    Every backbone runs once over the images; nothing is trained. The
    forecast is in standard deviations among the candidates.
    Interrupt with Ctrl-C at any time: what is finished is shown and
    written, and the same command goes on from there, but for --no-cache.

    For example:

      sfda-tune rank

      sfda-tune rank tags.csv --task multilabel --label-delimiter ';'

      sfda-tune rank lesions/ --levels mild,moderate,severe

      sfda-tune rank photos/ -b resnet50 'convnext_*.fb_in22k*' -o r.json
    """
    if out is not None:
        if out.suffix.lower() not in (".json", ".csv"):
            fail(f"--out must end in .json or .csv but is {str(out)!r}.")
        check_out(out, "--out")
    if cache is not None and no_cache:
        fail("--cache and --no-cache exclude each other; leave one out.")
    import sfda_tune
    from sfda_tune.data.copies import CopiesWarning
    from sfda_tune.pipelines.progress import Bar

    executor = None if ray is None else _ray(ray)
    interrupted = False
    warnings.simplefilter("ignore", CopiesWarning)  # said below the table
    specs = ["demo:*"] if backbones is None else split_commas(backbones)
    kept = False if no_cache else cache or True
    told = None if task == "auto" else task
    options: dict[str, Any] = {
        "metric": metric, "variant": variant, "train": train, "samples": samples, "seed": seed,
        "split": split, "image_column": image_column, "label_column": label_column,
        "groups": read_groups(groups, group_column, group_regex), "split_column": split_column,
        "device": device, "precision": precision, "batch_size": batch_size, "workers": workers,
        "max_unreadable": max_unreadable, "cache": kept, "plugins": imports or (),
        "executor": executor, "race": race, "top": top, "budget": budget, "ensemble": ensemble,
        "weights_disk": weights_disk, "task": told, "label_columns": label_columns,
        "label_delimiter": label_delimiter, "levels": levels, "bit_depth": bit_depth,
        "bands": bands, "threads": threads,
    }  # fmt: skip
    try:
        if dry_run:
            from sfda_tune.pipelines.bill import draw_up_bill

            bill = draw_up_bill(dataset, specs, **options)
            if as_json:
                print_json(asdict(bill))
            for line in () if as_json else str(bill).splitlines():
                say(output, line)
            return
        bar = False if quiet else Bar(messages, leaders=not as_json)
        ranking = sfda_tune.rank(dataset, specs, progress=bar, **options)
    except sfda_tune.RankingInterruptedError as stop:
        ranking, interrupted = stop.ranking, True
    except sfda_tune.BackboneError as error:
        if dataset == "digits" and len(specs) > 1 and os.path.exists(specs[-1]):
            fail(f"{error}; if {specs[-1]!r} is the data set: it stands before --backbones.")
        raise
    problem = None if out is None else _write(ranking, out, ctx)  # before anything is shown
    if as_json:
        print_json(describe_ranking(ranking))
    else:
        show_ranking(ranking)
    if problem:
        fail(problem)
    if interrupted:
        then = "begins anew, for nothing was kept" if no_cache else "goes on from here"
        say(messages, f"Interrupted: the same command {then}.")
        raise typer.Exit(130)
    if len(ranking) > len(ranking.failed) + 1:
        from sfda_tune.report.commands import propose_search

        line, _ = propose_search(
            ranking, **{"dataset": dataset, "import": imports, "weights_disk": weights_disk}
        )
        say(messages, f"Next: {line}")
    if len(ranking.failed) == len(ranking):
        unseen = len(ranking.info.get("not_looked_at", ())) == len(ranking)
        why = "there was no time to look at any; give a larger --budget."
        fail(why if unseen else "no backbone could be ranked; their errors stand below the table.")


def _ray(address: str) -> Any:
    import importlib

    try:
        integration = importlib.import_module("sfda_tune_ray")
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "sfda_tune_ray"):
            raise
        fail("--ray needs Ray: pip install 'sfda-tune[ray]'")
    return integration.RayExecutor(address or None)


def _write(ranking: Ranking, out: Path, ctx: typer.Context) -> str | None:
    """Write the ranking; return what went wrong: it is still to be shown."""
    try:
        if out.suffix.lower() == ".csv":
            ranking.to_csv(out)
        else:
            ranking.to_json(out)
        write_config(ctx, out.with_suffix(".config.yaml"))
    except OSError as error:
        return f"{str(out)!r} could not be written ({error.strerror or error})."
    return None
