"""The command line: ``sfda-tune rank``, ``sfda-tune backbones``, ``sfda-tune cache``."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.table import Table

from sfda_tune import __version__
from sfda_tune.cli import search as commands_search
from sfda_tune.pipelines.terminal import Terminal, hang_up, say, spell_out, text
from sfda_tune.values.ranking import HEADINGS, format_count
from sfda_tune.values.text import printable

if TYPE_CHECKING:
    from sfda_tune.selection.uncertainty import Confidence
    from sfda_tune.values.ranking import Ranking

app = typer.Typer(
    name="sfda-tune",
    help="Rank pretrained image backbones on your own labelled images, before the first epoch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Look at the kept features, or delete them.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

UsageError: Any = typer.BadParameter.__bases__[0]  # click's; recent typers bring their own click
output = Terminal()  # results, on standard output
messages = Terminal(stderr=True)  # everything else

Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="FILE_OR_MODULE",
        help="Run this Python file (or import this module): it registers further architectures "
        "with timm. Worker processes run it too. May be repeated.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")]
CacheDir = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Folder of the kept features, or a bucket (s3://…). Default: ~/.cache/sfda_tune, or "
        "$SFDA_TUNE_CACHE.",
    ),
]


@app.command()
def rank(
    dataset: Annotated[
        str,
        typer.Argument(
            help="An image folder (one sub-folder per class, or train/ and val/ with these), a "
            "CSV or Parquet file of paths and labels, `hf:NAME`, or `digits`."
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
        str,
        typer.Option(
            help="Score to rank by, or several, whose ranks are averaged: `sfda+imagenet`, "
            "`2*sfda+knn`. `imagenet` (published accuracy) and `params` look at no image."
        ),
    ] = "sfda",
    variant: Annotated[
        str | None, typer.Option(help="Variant of the metric `sfda`: official, paper or loo.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Use a stratified sample of so many images.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of that sample.")] = 0,
    race: Annotated[
        bool,
        typer.Option(
            "--race",
            help="Show few images to all, more only to those that may still be in the top.",
        ),
    ] = False,
    top: Annotated[int, typer.Option(metavar="K", help="The top that a race is to find.")] = 5,
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    precision: Annotated[
        str, typer.Option(help="float32, tf32 (CUDA), bfloat16 or float16.")
    ] = "float32",
    batch_size: Annotated[
        int | None, typer.Option(help="Images per forward pass. Default: automatic.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Decoding processes. Default: one per core, at most 8.")
    ] = None,
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
            "ADDRESS that of $RAY_ADDRESS, else a Ray on this machine. Needs sfda-tune[ray].",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    debug: Debug = False,
) -> None:
    """Rank BACKBONES on the labelled images of DATASET.

    Every backbone runs once over the images; nothing is trained.
    Interrupt with Ctrl-C at any time: what is finished is shown and
    written, and the same command goes on from there.

    For example:

      sfda-tune rank

      sfda-tune rank photos/ -b resnet50 'convnext_*.fb_in22k*' -o r.json
    """
    if out is not None:
        if out.suffix.lower() not in (".json", ".csv"):
            _fail(f"--out must end in .json or .csv but is {str(out)!r}.")
        _check_out(out, "--out")
    if cache is not None and no_cache:
        _fail("--cache and --no-cache exclude each other; leave one out.")
    import sfda_tune
    from sfda_tune.data.copies import CopiesWarning

    executor = None if ray is None else _ray(ray)
    interrupted = False
    warnings.simplefilter("ignore", CopiesWarning)  # said below the table
    specs = ["demo:*"] if backbones is None else _split_commas(backbones)
    try:
        ranking = sfda_tune.rank(
            dataset,
            specs,
            metric=metric,
            variant=variant,
            samples=samples,
            seed=seed,
            split=split,
            image_column=image_column,
            label_column=label_column,
            device=device,
            precision=precision,
            batch_size=batch_size,
            workers=workers,
            max_unreadable=max_unreadable,
            cache=False if no_cache else cache or True,
            plugins=imports or (),
            executor=executor,
            progress=False if quiet else _bar(),
            race=race,
            top=top,
            ensemble=ensemble,
        )
    except sfda_tune.RankingInterruptedError as stop:
        ranking, interrupted = stop.ranking, True
    except sfda_tune.BackboneError as error:
        if dataset == "digits" and len(specs) > 1 and os.path.exists(specs[-1]):
            _fail(f"{error}; if {specs[-1]!r} is the data set: it stands before --backbones.")
        raise
    problem = None if out is None else _write(ranking, out)  # before anything is shown
    _show(ranking)
    if problem:
        _fail(problem)
    if interrupted:
        say(messages, "Interrupted: the same command goes on from here.")
        raise typer.Exit(130)
    if len(ranking.failed) == len(ranking):
        _fail("no backbone could be ranked; each one's error stands below the table.")


def _ray(address: str) -> Any:
    import importlib

    try:
        integration = importlib.import_module("sfda_tune_ray")
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "sfda_tune_ray"):
            raise
        _fail("--ray needs Ray: pip install 'sfda-tune[ray]'")
    return integration.RayExecutor(address or None)


def _bar() -> Any:
    from sfda_tune.pipelines.progress import Bar

    return Bar(messages)


def _check_out(out: Path, option: str) -> None:
    """Refuse before the work what could not be written after it."""
    if not out.parent.is_dir():
        _fail(f"{option}: there is no folder {str(out.parent)!r}; create it first.")
    if not os.access(out.parent, os.W_OK) or out.is_dir():
        _fail(f"{option}: {str(out)!r} cannot be written.")


def _write(ranking: Ranking, out: Path) -> str | None:
    """Write the ranking; return what went wrong: it is still to be shown."""
    try:
        if out.suffix.lower() == ".csv":
            ranking.to_csv(out)
        else:
            ranking.to_json(out)
    except OSError as error:
        return f"{str(out)!r} could not be written ({error.strerror or error})."
    return None


def _split_commas(specs: list[str] | None) -> list[str]:
    """Split at commas, except in the names of existing folders."""
    parts: list[str] = []
    for spec in specs or []:
        parts += [spec] if os.path.exists(spec) else [p.strip() for p in spec.split(",")]
    return parts


def _show(ranking: Ranking) -> None:
    from sfda_tune.selection.uncertainty import diagnose

    info = ranking.info
    title = f"{info['dataset']}: {info['n_samples']} images, {info['n_classes']} classes"
    table = Table(title=text(f"{title}; {ranking.metric}"), title_justify="left")
    c = _confidence(ranking)
    sure = {} if c is None else _sure(c)
    widths = [len(printable(name)) for name in ranking]
    shown = _columns(widths, [*HEADINGS[:3], *_SURE[: 2 * bool(sure)]])
    for name in shown:
        if name == "backbone":  # folded where the terminal is narrow
            table.add_column(name, overflow="fold", min_width=12)
        else:
            left = name == "note"
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for score, cells in zip(ranking.scores, ranking.cells(), strict=True):
        row: dict[str, str] = dict(zip(HEADINGS, cells, strict=True))
        row |= sure.get(score.backbone, dict.fromkeys(_SURE, ""))
        row["note"] = row["note"] if score.error is None else "see below"
        table.add_row(*(text(row[name]) for name in shown))
    _print(table)
    for name, error in ranking.failed.items():
        say(output, f"{name}: {error}")
    for line in _findings(ranking, c):
        say(output, line)
    for diagnostic in diagnose(ranking):
        if diagnostic.kind not in ("failed", "unreadable"):  # said already
            say(messages, f"{diagnostic.severity}: {diagnostic.message}")
    seconds = info["seconds"]
    say(
        messages,
        f"{seconds['total']:.1f} s in all on {info['device']}: "
        f"waiting for pixels {seconds['decode']:.1f} (decoding itself "
        f"{seconds['decode_work']:.1f}), forward passes {seconds['forward']:.1f}, "
        f"loading {seconds['load']:.1f}, scoring {seconds['score']:.1f}",
    )


_SURE = ("90% ranks", "P(best)")


def _confidence(ranking: Ranking) -> Confidence | None:
    from sfda_tune.selection.uncertainty import confidence

    try:
        return confidence(ranking)
    except ValueError:  # the metric is no mean over images, or nothing was scored
        return None


def _sure(c: Confidence) -> dict[str, dict[str, str]]:
    """Return the cells of the columns `_SURE`, by backbone."""
    return {
        str(name): {
            "90% ranks": f"{first}" if first == last else f"{first}–{last}",
            "P(best)": f"{best:.2f}",
        }
        for name, (first, last), best in zip(
            c.names, c.rank_interval, c.best.values(), strict=True
        )
    }


def _findings(ranking: Ranking, c: Confidence | None) -> list[str]:
    """Say what follows from the ranking: the shortlist, the race, the ensemble."""
    from sfda_tune.selection.uncertainty import shortlist

    lines = []
    if c is not None:
        names = [str(name) for name in shortlist(c)]
        if len(names) > 1:
            among = "of those that finished the race, " * ("race" in ranking.info)
            text = f"Best by this score, {among}with probability .95, one of: {', '.join(names)}"
            lines.append(text)
        groups = [", ".join(map(str, group)) for group in c.groups if len(group) > 1]
        if groups:
            lines.append(f"Not told apart by these images: {'; '.join(groups)}")
    if race := ranking.info.get("race"):
        saved = 1 - race["forward_passes"] / race["full_run"]
        lines.append(
            f"Race for the top {race['top']}: {race['forward_passes']} forward passes instead of "
            f"{race['full_run']}, {saved:.0%} saved"
        )
    if ensemble := ranking.info.get("ensemble"):
        lines.append(f"To fine-tune together: {', '.join(ensemble['backbones'])}")
    return lines


def _print(table: Table) -> None:
    """Print a table; a file or a pipe has no width, so there nothing is folded or cut."""
    if output.is_terminal:
        output.print(table)
    else:
        wide = Terminal(width=10_000)
        Terminal(width=wide.measure(table).maximum).print(table)


def _columns(names: list[int], first: list[str]) -> list[str]:
    """Leave out the less important columns where the terminal is too narrow for all."""
    shown = [*first, *HEADINGS[3:]]
    room = 10_000 if not output.is_terminal else output.width
    for name in ("images/s", "params", "width", *_SURE):
        if name in shown and max(names, default=0) + 9 * len(shown) > room:
            shown.remove(name)
    return shown


@app.command("backbones")
def list_backbones(
    patterns: Annotated[
        list[str], typer.Argument(metavar="GLOB...", help="As for `rank --backbones`.")
    ],
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """List the pretrained backbones that match GLOB, with their size.

    The weights are not fetched: parameters, megabytes (as float32), feature width and input size
    come from the architecture.
    """
    from rich.progress import track

    from sfda_tune.backbones.specs import describe, resolve_backbones

    found = resolve_backbones(_split_commas(patterns), plugins=imports or ())
    table = Table()
    for name in ("backbone", "params", "MB", "width", "input"):
        table.add_column(name, justify="left" if name == "backbone" else "right", no_wrap=True)
    failures = 0
    for backbone in track(found, "reading", console=messages, transient=True):
        try:
            d = describe(backbone)
        except ValueError as error:
            failures += 1
            table.add_row(text(backbone.name), "failed")
            say(messages, f"{backbone.name}: {error}")
            continue
        _, height, width = d.preprocessing.input_size or (0, 0, 0)
        table.add_row(
            text(backbone.name),
            format_count(d.n_params),
            f"{d.n_params * 4 / 1e6:.1f}",
            "" if d.n_dims is None else str(d.n_dims),
            f"{height}×{width}" if height else "",
        )
    _print(table)
    if failures == len(found):
        raise typer.Exit(1)


@app.command("evaluate")
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


@app.command("report")
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

    files = [write_report(source, out)]
    for path in files + ([] if plots is None else save_plots(source, plots)):
        say(output, path)


app.command("search")(commands_search.search)
app.command("predict")(commands_search.predict)


@cache_app.command("show")
def show_cache(cache: CacheDir = None, debug: Debug = False) -> None:
    """Show where the features are kept and what they take."""
    store = _store(cache)
    totals = store.summary()
    table = Table(title=text(store.root), title_justify="left")
    for name in ("backbone", "entries", "images", "MB"):
        table.add_column(name, justify="left" if name == "backbone" else "right")
    for name, total in sorted(totals.items()):
        megabytes = f"{total['bytes'] / 1e6:.1f}"
        table.add_row(text(name), str(total["entries"]), str(total["images"]), megabytes)
    size = sum(total["bytes"] for total in totals.values()) / 1e6
    table.add_section()
    table.add_row("all", str(sum(t["entries"] for t in totals.values())), "", f"{size:.1f}")
    _print(table)


@cache_app.command("clear")
def clear_cache(
    cache: CacheDir = None,
    older_than: Annotated[
        float | None,
        typer.Option(metavar="DAYS", min=0, help="Only features not used for so many days."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Delete kept features; they are computed again when needed."""
    store = _store(cache)
    count, size = store.clear(older_than)
    say(output, f"deleted {count} entries, {size / 1e6:.1f} MB, from {store.root}")


def _store(cache: str | None) -> Any:
    from sfda_tune.extraction.store import open_store

    return open_store(cache)


def _version(show: bool) -> None:
    if show:
        say(output, f"sfda-tune {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Rank pretrained image backbones on your own labelled images, before the first epoch."""


def _fail(message: str) -> NoReturn:
    _print_error(message)
    raise typer.Exit(1)


def _print_error(message: str) -> None:
    say(messages, "error:", style="bold red", end=" ")
    say(messages, " ".join(message.split()))  # one line, whatever a plug-in or a library says


_ADDRESS = re.compile(r"auto|local|(ray://)?[^\s/]+:\d+")


def _spread(arguments: list[str]) -> list[str]:
    """Let ``--backbones a b c`` mean ``--backbones a --backbones b --backbones c``.

    And let ``--ray`` do without its address.
    """
    result: list[str] = []
    option, fresh = None, False
    for k, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[k:]]
        if argument == "--ray" and not _ADDRESS.fullmatch("".join(arguments[k + 1 : k + 2])):
            option = None
            result.append("--ray=")
            continue
        if argument.startswith("-") and argument != "-":
            option = argument if argument in ("--backbones", "-b", "--import") else None
            fresh = True
            result.append(argument)
        elif option in ("--backbones", "-b") and not fresh:
            result += [option, argument]
        else:
            fresh = False
            result.append(argument)
    return result


def _on_terminate(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _show_warning(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
    if issubclass(category, UserWarning):
        say(messages, "warning:", style="yellow", end=" ")
        say(messages, message)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors are one line, and a traceback with ``--debug``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    spell_out()
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Printable(logging.BASIC_FORMAT))
    if not debug:
        warnings.showwarning = _show_warning
    for name in ("SIGTERM", "SIGHUP"):  # `kill`, a closed terminal: as Ctrl-C, unless `nohup`
        sign = getattr(signal, name, None)  # Windows has no SIGHUP
        if sign is not None and signal.getsignal(sign) != signal.SIG_IGN:
            signal.signal(sign, _on_terminate)
    try:
        code = app(_spread(arguments), prog_name="sfda-tune", standalone_mode=False)
    except UsageError as error:
        _print_error(f"{error.format_message()} (see `sfda-tune --help`)")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        say(messages, "Interrupted.")
        sys.exit(130)
    except Exception as error:
        if debug:
            for line in traceback.format_exc().splitlines():
                say(messages, line)
            sys.exit(1)
        known = str(error) if isinstance(error, (ValueError, OSError)) else ""
        _print_error(known or f"{type(error).__name__}: {error} (--debug shows the traceback)")
        sys.exit(1)
    try:
        if sys.stdout is not None:  # closed by `>&-`
            sys.stdout.flush()
    except BrokenPipeError:  # `sfda-tune … | head`
        hang_up(sys.stdout)
    sys.exit(code or 0)


class _Printable(logging.Formatter):
    """What libraries log holds names, too."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).splitlines()))
