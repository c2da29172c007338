"""``sfda-tune backbones``, ``evaluate``, ``compare`` and ``report``."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from sfda_tune.cli.options import AsJson, Debug, Imports
from sfda_tune.cli.terminal import (
    check_out,
    fail,
    fit_columns,
    messages,
    output,
    print_json,
    print_table,
    say_hidden,
    split_commas,
)
from sfda_tune.pipelines.terminal import say, text
from sfda_tune.values.files import check_folder
from sfda_tune.values.text import format_count

COLUMNS = ("backbone", "params", "MB", "width", "input", "top-1", "GMACs")
SORTS = ("imagenet", "gmacs", "params", "width", "input")


def list_backbones(
    patterns: Annotated[
        list[str], typer.Argument(metavar="GLOB", help="As for `rank --backbones`.")
    ],
    sort: Annotated[
        str | None,
        typer.Option(
            help=f"By what: {', '.join(SORTS)} (best first), or name. Default: as given."
        ),
    ] = None,
    imports: Imports = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the pretrained backbones that match GLOB, with their size.

    The weights are not fetched: parameters, megabytes (as float32), feature
    width and input size come from the architecture, accuracy on ImageNet (for
    weights that have not seen its labels: after fine-tuning to them) and
    multiplications (in thousand millions) from a table. Only `hf-hub:` needs
    the hub, for a few lines.

    For example:

      sfda-tune backbones preset:small 'convnext_*.fb_in22k*' --sort imagenet
    """
    from rich.progress import track

    from sfda_tune.backbones.loading import describe
    from sfda_tune.backbones.specs import resolve_backbones
    from sfda_tune.metrics.priors import look_up_facts

    if sort not in (None, "name", *SORTS):
        fail(f"--sort must be name, {', '.join(SORTS)} but is {sort!r}.")
    found = resolve_backbones(split_commas(patterns), plugins=imports or ())
    facts = look_up_facts(backbone.spec for backbone in found)
    rows: list[tuple[float, dict[str, Any]]] = []
    failures, size = 0, 0.0
    for backbone in track(found, "reading", console=messages, transient=True):
        try:
            d = describe(backbone)
        except ValueError as error:
            failures += 1
            rows.append((math.inf, {"backbone": backbone.name, "error": str(error)}))
            say(messages, f"{backbone.name}: {error}")
            continue
        _, height, width = d.preprocessing.input_size or (0, 0, 0)
        fact, size = facts[backbone.spec], size + d.n_params * 4 / 1e6
        about = {"n_params": d.n_params, "n_dims": d.n_dims, "height": height, "width": width}
        about |= {"top1": fact.top1, "gmacs": fact.gmacs}
        keys = {"imagenet": -fact.top1, "gmacs": fact.gmacs, "params": float(d.n_params),
                "width": float(d.n_dims or math.nan), "input": float(height * width)}  # fmt: skip
        key = keys.get(sort or "", 0.0)
        rows.append((math.inf if math.isnan(key) else key, {"backbone": backbone.name, **about}))
    if sort == "name":
        rows.sort(key=lambda row: row[1]["backbone"])
    rows.sort(key=lambda row: row[0])
    if as_json:
        print_json([row for _, row in rows])
    else:
        cells = [dict(zip_longest(COLUMNS, _cells(row), fillvalue="")) for _, row in rows]
        shown = fit_columns([*COLUMNS], cells, ["width", "input", "GMACs", "MB"], 48)
        table = Table()
        for name in shown:
            table.add_column(name, justify="left" if name == "backbone" else "right", no_wrap=True)
        for row in cells:
            table.add_row(*(text(row[name]) for name in shown))
        print_table(table)
        say_hidden([*COLUMNS], shown, "--json")
    say(messages, f"{len(found) - failures} backbones, {size:,.0f} MB in all")
    if failures == len(found):
        raise typer.Exit(1)


def _cells(row: dict[str, Any]) -> list[str]:
    """Return what the table of `list_backbones` shows of a backbone."""
    if "error" in row:
        return [row["backbone"], "failed"]
    top1, gmacs = (row[key] if math.isfinite(row[key]) else None for key in ("top1", "gmacs"))
    return [
        row["backbone"],
        format_count(row["n_params"]),
        f"{row['n_params'] * 4 / 1e6:.1f}",
        "" if row["n_dims"] is None else str(row["n_dims"]),
        f"{row['height']}×{row['width']}" if row["height"] else "",
        "" if top1 is None else f"{top1:.1f}",
        "" if gmacs is None else f"{gmacs:.2f}",
    ]


def evaluate_scores(
    scores: Annotated[
        Path,
        typer.Argument(
            metavar="SCORES",
            help="A ranking (.json, .csv) or {backbone: score}, as JSON or CSV.",
        ),
    ],
    truth: Annotated[
        Path,
        typer.Argument(
            metavar="TRUTH",
            help="Accuracies (or R²) after fine-tuning: {backbone: accuracy}, JSON or CSV.",
        ),
    ],
    column: Annotated[
        str | None, typer.Option(help="Column of the accuracies in a CSV of several.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the permutations.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell how good SCORES were, given the TRUTH.

    Both may also hold several data sets: {dataset: {backbone: number}}.

    For example:

      sfda-tune evaluate ranking.json accuracies.csv
    """
    from collections.abc import Mapping

    from sfda_tune.selection.evaluation import evaluate, evaluate_many
    from sfda_tune.selection.tables import read_scores, read_truth

    known = read_truth(truth, column=column)
    nested = any(isinstance(value, Mapping) for value in known.values())
    judge: Any = evaluate_many if nested else evaluate
    result = judge(read_scores(scores), known, seed=seed)
    if as_json:
        print_json(asdict(result))
        return
    said = "" if nested else f"{result.describe()}\n\n"
    for line in f"{said}{result!r}".splitlines():
        if not re.search(r"\bnan$", line):  # too few backbones for it
            say(output, line)


def compare_rankings(
    first: Annotated[
        Path,
        typer.Argument(metavar="A", help="A ranking (.json, .csv), or the folder of a search."),
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show who moved from ranking A to ranking B, and how far the two agree.

    For example:

      sfda-tune compare before.json after.json
    """
    from sfda_tune.selection.comparison import compare
    from sfda_tune.selection.tables import read_scores

    files = [path / "ranking.json" if path.is_dir() else path for path in (first, second)]
    found = compare(*(read_scores(file) for file in files))
    if as_json:
        print_json(asdict(found))
        return
    has_odds = any("p_best_b" in row for row in found.rows)
    table = Table()
    for name in ("backbone", "A", "B", "moved", *["P(best) A", "P(best) B"] * has_odds):
        left = name == "backbone"
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in found.rows:
        odds = [f"{row[k]:.2f}" if k in row else "" for k in ("p_best_a", "p_best_b")] * has_odds
        moved = f"{row['moved']:+d}" if row["moved"] else ""
        table.add_row(text(row["backbone"]), str(row["a"]), str(row["b"]), moved, *odds)
    print_table(table)
    for line in str(found).splitlines():
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
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Show the hardest images, small.")
    ] = True,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", metavar="DIR", help="Also save figures there, as PNG and SVG."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a search or a ranking; it needs no network.

    For example:

      sfda-tune report run/ --plots figures/
    """
    from sfda_tune.data.decoding import open_picture
    from sfda_tune.report.html import save_plots, write_report

    if out is not None:
        check_out(out, "--out")
    if plots is not None:
        check_folder("--plots", plots)
    page = write_report(source, out, images=open_picture if images else False)
    figures = [] if plots is None else save_plots(source, plots)
    if as_json:
        print_json({"page": str(page), "figures": [str(path) for path in figures]})
    for path in () if as_json else (page, *figures):
        say(output, path)
