"""``sfda-tune backbones``, ``evaluate`` and ``report``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sfda_tune.cli.options import Debug, Imports
from sfda_tune.cli.terminal import check_out, fail, messages, output, print_table, split_commas
from sfda_tune.pipelines.terminal import say, text
from sfda_tune.values.files import check_folder
from sfda_tune.values.text import format_count

SORTS = ("imagenet", "gmacs", "params", "width", "input")


def list_backbones(
    patterns: Annotated[
        list[str], typer.Argument(metavar="GLOB...", help="As for `rank --backbones`.")
    ],
    sort: Annotated[
        str,
        typer.Option(help=f"By what: {', '.join(SORTS)} (best first), or name."),
    ] = "name",
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """List the pretrained backbones that match GLOB, with their size.

    The weights are not fetched: parameters, megabytes (as float32), feature
    width and input size come from the architecture, accuracy on ImageNet and
    multiplications (in thousand millions) from a table. Only `hf-hub:` needs
    the hub, for a few lines.
    """
    from rich.progress import track

    from sfda_tune.backbones.loading import describe
    from sfda_tune.backbones.specs import resolve_backbones
    from sfda_tune.metrics.priors import look_up_facts

    if sort not in ("name", *SORTS):
        fail(f"--sort must be name, {', '.join(SORTS)} but is {sort!r}.")
    found = resolve_backbones(split_commas(patterns), plugins=imports or ())
    facts = look_up_facts(backbone.spec for backbone in found)
    table = Table()
    for name in ("backbone", "params", "MB", "width", "input", "top-1", "GMACs"):
        table.add_column(name, justify="left" if name == "backbone" else "right", no_wrap=True)
    rows: list[tuple[float, list[Any]]] = []
    failures = 0
    for backbone in track(found, "reading", console=messages, transient=True):
        try:
            d = describe(backbone)
        except ValueError as error:
            failures += 1
            rows.append((math.inf, [text(backbone.name), "failed"]))
            say(messages, f"{backbone.name}: {error}")
            continue
        _, height, width = d.preprocessing.input_size or (0, 0, 0)
        fact = facts[backbone.spec]
        row = [
            text(backbone.name),
            format_count(d.n_params),
            f"{d.n_params * 4 / 1e6:.1f}",
            "" if d.n_dims is None else str(d.n_dims),
            f"{height}×{width}" if height else "",
            f"{fact.top1:.1f}" if math.isfinite(fact.top1) else "",
            f"{fact.gmacs:.2f}" if math.isfinite(fact.gmacs) else "",
        ]
        keys = {"imagenet": -fact.top1, "gmacs": fact.gmacs, "params": float(d.n_params),
                "width": float(d.n_dims or math.nan), "input": float(height * width)}  # fmt: skip
        key = keys.get(sort, 0.0)
        rows.append((math.inf if math.isnan(key) else key, row))
    for _, row in sorted(rows, key=lambda row: row[0]):
        table.add_row(*row)
    print_table(table)
    if failures == len(found):
        raise typer.Exit(1)


def evaluate_scores(
    scores: Annotated[
        Path, typer.Argument(help="A ranking (.json, .csv) or {backbone: score}, as JSON or CSV.")
    ],
    truth: Annotated[
        Path,
        typer.Argument(help="Accuracies after fine-tuning: {backbone: accuracy}, JSON or CSV."),
    ],
    column: Annotated[
        str | None, typer.Option(help="Column of the accuracies in a CSV of several.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the permutations.")] = 0,
    debug: Debug = False,
) -> None:
    """Tell how good SCORES were, given the TRUTH.

    Both may also hold several data sets: {dataset: {backbone: number}}.
    """
    from collections.abc import Mapping

    from sfda_tune.selection.evaluation import evaluate, evaluate_many
    from sfda_tune.selection.tables import read_scores, read_truth

    known = read_truth(truth, column=column)
    nested = any(isinstance(value, Mapping) for value in known.values())
    judge: Any = evaluate_many if nested else evaluate
    result = judge(read_scores(scores), known, seed=seed)
    for line in repr(result).splitlines():
        say(output, line)


def report_on(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|RANKING", help="The folder of a search, or a ranking (.json of `rank`)."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Default: RUN/report.html, or RANKING as .html."
        ),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", metavar="DIR", help="Also save figures there, as PNG and SVG."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a search or a ranking; it needs no network."""
    from sfda_tune.report.html import save_plots, write_report

    if out is not None:
        check_out(out, "--out")
    if plots is not None:
        check_folder("--plots", plots)
    files = [write_report(source, out)]
    for path in files + ([] if plots is None else save_plots(source, plots)):
        say(output, path)
