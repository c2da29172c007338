"""One self-contained HTML page about a ranking or a search: ``sfda-tune report``.

`read_run` reads, the functions below compute, `report.html.j2` has the words and the layout. The
page loads nothing: style and script are inside, and its content security policy names their
hashes, so that a class called ``<script>`` would stay text even if it were not escaped. Charts are
SVG in per cent of the width, as readable on a phone as on paper, and each is told in words, too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sfda_tune.report.axes import Axis, make_lines, place_labels, shorten
from sfda_tune.report.commands import find_next, repeat, settle
from sfda_tune.report.plots import count_confusions, find_front
from sfda_tune.report.run import N_PICTURES, Run, read_numbers, read_run
from sfda_tune.selection.advice import recommend
from sfda_tune.selection.calibration import Calibration, Observation, calibrate
from sfda_tune.selection.diagnostics import diagnose
from sfda_tune.selection.evaluation import accuracy_interval
from sfda_tune.selection.forecast import is_forecast
from sfda_tune.selection.images import ImageEvidence, judge_classes, judge_images
from sfda_tune.selection.labels import judge_labels
from sfda_tune.selection.odds import find_odds
from sfda_tune.selection.tables import listed
from sfda_tune.selection.uncertainty import Confidence
from sfda_tune.values.files import write_text
from sfda_tune.values.metrics import call
from sfda_tune.values.text import capitalize, describe_images, format_duration, printable

__all__ = ["render", "save_plots", "write_report"]

HERE = Path(__file__).parent
COLOURS = (
    "page", "card", "ink", "muted", "link", "complete", "pruned", "failed", "running", "front",
)  # fmt: skip
THEMES = {  # the first five for text, the others for marks
    "light": "#ffffff #f3f5f7 #1b1e22 #555c64 #005a8c #0072B2 #CC79A7 #D55E00 #6b737c #009E73",
    "dark": "#15181c #20252b #e8eaed #a8b0b8 #7cc4f0 #56B4E9 #CC79A7 #E69F00 #8d969e #2ec79b",
}
MOST_MARKS = 500  # of test images
PHONE = 270  # pixels that a chart is wide on a phone
MANY = 60  # marks, of which only those on the front have room for a number
COSTS = (  # name, words, whether more is better
    ("images_per_second", "images per second", True),
    ("latency_ms", "milliseconds per image", False),
    ("n_params", "parameters", False),
)


def write_report(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    images: Any = True,
) -> Path:
    """Write the page about a search or a ranking; return where it is.

    Parameters
    ----------
    source : path
        The folder that `sfda-tune search` wrote, finished or not, or a file of `Ranking.to_json`.
    out : path, optional
        Default: ``report.html`` in the folder, or the ranking's name with ``.html``.
    images : bool, ImageDataset or callable, default True
        The page shows small pictures of the hardest images, where they are found: the files that
        the ranking names, as Pillow opens them or a function (of path, bit depth, bands), or the
        `ImageDataset` that is given. False: none.

    Raises
    ------
    ValueError
        If `source` cannot be read; see `read_run`.

    Examples
    --------
    >>> import tempfile
    >>> from sfda_tune import Ranking, Score
    >>> path = Path(tempfile.mkdtemp()) / "ranking.json"
    >>> _ = Ranking([Score("vit", 0.9), Score("resnet", 0.8)], "knn").to_json(path)
    >>> write_report(path).name
    'ranking.html'
    """
    path = Path(source)
    target = Path(out or (path / "report.html" if path.is_dir() else path.with_suffix(".html")))
    write_text(target, render(read_run(path, images)))
    return target


def render(run: Run) -> str:
    """Return the page as text."""
    from jinja2 import Environment, FileSystemLoader

    env = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "count": shorten,
        "soft": _soften,
        "duration": format_duration,
        "number": _number,
        "probability": _probability,
    }
    env.filters |= {
        "percent": lambda v: f"{100 * v:.1f}\N{NO-BREAK SPACE}%",
        "words": lambda key: call(str(key)),
    }
    themes = {name: zip(COLOURS, text.split(), strict=True) for name, text in THEMES.items()}
    style = env.from_string((HERE / "report.css").read_text("utf-8")).render(themes=themes)
    script = (HERE / "report.js").read_text("utf-8")
    ranking, sure = run.ranking, find_odds(run.ranking)
    command, lacking = repeat(run)
    evidence = judge_images(ranking)
    rows, dataset = _rows(run), _describe_dataset(run, evidence)
    unseen = ranking.info.get("not_looked_at") or ()
    shown = [h["image"] for h in dataset["hard"]], [h["item"] for h in run.hardest]
    return env.get_template("report.html.j2").render(
        run=run,
        search=run.search or {},
        style=style,
        script=script,
        hashes=(_hash(style), _hash(script)),
        advice=recommend(ranking, sure),
        diagnostics=_diagnostics(run, sure),
        rows=rows,
        licenses=sorted({r["license"] for r in rows if r["license"]}),
        failed={n: e for n, e in ranking.failed.items() if n not in unseen},
        ranked="forecast" if is_forecast(ranking) else "score",
        tradeoffs=_tradeoffs(run),
        evidence=evidence,
        classes=judge_classes(evidence) if evidence else [],
        labels=judge_labels(ranking),
        dataset=dataset,
        short=_without_folder(shown[0]) | _without_folder(shown[1]),
        course=_course(run),
        calibration=_calibration(run),
        test=None if run.of_numbers or run.of_labels else _test(run),
        tested=_examine_labels(run) if run.of_labels else None,
        numbers=_examine_numbers(run) if run.of_numbers else None,
        temperature=_temperature(run),
        command=command,
        lacking=lacking,
        next=find_next(run, run.folder or "RUN"),
        images=describe_images(run.search) if run.search and run.search.get("n_images") else "",
        data=_data(run),
        Axis=Axis,
    )


def save_plots(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> list[Path]:
    """Save the figures of `sfda_tune.report.plots` as PNG and SVG; return the files.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    from sfda_tune.report import plots

    run, folder = read_run(source, images=False), Path(folder)
    figure = plots.import_figure()
    draw = {"ranking": partial(plots.plot_ranking, run.ranking)}
    for key, label, more in COSTS:
        if costs := _costs(run, key):
            values = (run.ranking, costs)
            draw[key] = partial(plots.plot_pareto, *values, cost=label, maximize=more)
    if run.trials:
        draw["trials"] = partial(plots.plot_trials, run.trials)
        draw["calibration"] = partial(plots.plot_calibration, _calibrate(run))
    if calibration := _winner_calibration(run):
        draw["reliability"] = partial(plots.plot_reliability, calibration)
    if run.predictions and run.of_numbers:
        draw["predictions"] = partial(plots.plot_predictions, *read_numbers(run))
    elif run.predictions and not run.of_labels:
        *pairs, classes = _classes(run)
        draw["confusion"] = partial(plots.plot_confusion, *pairs, classes=classes)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, plot in draw.items():
        n = {"ranking": len(run.ranking), "trials": len({t["backbone"] for t in run.trials})}
        rows = 1.4 + 0.28 * min(n.get(name, 0), 30)  # each name has a line
        longest = max(map(len, run.ranking), default=0) if name in n else 0
        size = (6.4 + 0.08 * max(0, longest - 30), max(4.8, rows))
        sheet = figure(size, layout="constrained")
        plot(ax=sheet.subplots())
        for suffix in ("png", "svg"):
            files.append(folder / f"{name}.{suffix}")
            sheet.savefig(files[-1], dpi=200)
    return files


def _rows(run: Run) -> list[dict[str, Any]]:
    """Return one row per scored backbone: `Ranking.records`, and what the page says of it."""
    ranking, rows = run.ranking, []
    latency, speed = _costs(run, "latency_ms"), _costs(run, "images_per_second")
    trained = is_forecast(ranking)
    for r in ranking.records()[: len(ranking) - len(ranking.failed)]:
        name = r["backbone"]
        value, sure = ranking[name], r["p_best"] is not None
        low, high = (r["interval_low"], r["interval_high"]) if sure else (value, value)
        shown = [_in_figures(v, trained) for v in (value, low, high)]
        rows.append(r | {"value": value, "low": low, "high": high, "shown": shown, "sure": sure})
        n, details = r["n_params"], ranking.score(name).details
        rows[-1] |= {"mb": 4e-6 * n if n else None, "license": details.get("license")}
        rows[-1] |= {"latency_ms": latency.get(name), "images_per_second": speed.get(name)}
        rows[-1] |= {"batch": details.get("batch")}
    return rows


def _in_figures(value: float, trained: bool) -> str:
    return f"{value:+z.2f}" if trained else f"{value:.4f}"


def _diagnostics(run: Run, sure: Confidence | None) -> list[tuple[str, str, str]]:
    """Return (severity, sentence, command that settles it), warnings first, each once."""
    search, ranking = run.search or {}, run.ranking
    found = [("note", gap, "") for gap in run.gaps]
    if search and search.get("status") not in ("done", "budget spent"):
        text = f"The search is not done (state: {search.get('status')}); run it again to go on."
        found.append(("warning", text, repeat(run)[0]))
    for note in search.get("notes") or ():
        found.append(("warning", f"{capitalize(note)}.", ""))
    if search.get("decision"):
        found.append(("note", f"{capitalize(str(search['decision']))}.", ""))
    if sure is None and len(ranking) > len(ranking.failed):
        text = "How certain the order is cannot be told: the scores are no means over images."
        found.append(("note", text, ""))
    found += [(d.severity, capitalize(d.message), settle(run, d.kind)) for d in diagnose(ranking)]
    if warning := _calibrate(run).warning:
        found.append(("warning", f"{warning}.", ""))
    for name, why in (search.get("excluded") or {}).items():
        found.append(("note", f"{name} was excluded: {why}.", ""))
    for t in run.trials:
        if t["state"] == "failed":
            why = t["error"] or "no reason is known"
            found.append(("warning", f"Trial {t['number']}, {t['backbone']}, failed: {why}", ""))
    if run.predictions and not run.of_numbers and not run.of_labels:
        labels, _, classes = _classes(run)
        if empty := [c for c in classes if c not in set(labels)]:
            what = "Levels" if run.of_levels else "Classes"
            found.append(("note", f"{what} without a test image: {listed(empty, 8)}", ""))
    once: dict[str, tuple[str, str, str]] = {}
    for entry in found:
        once.setdefault(entry[1], entry)
    return sorted(once.values(), key=lambda entry: entry[0] != "warning")


def _describe_dataset(run: Run, evidence: ImageEvidence | None) -> dict[str, Any]:
    """Return what is remarkable about the images that were ranked on."""
    info, labels = run.ranking.info, run.ranking.labels
    entries = list(info.get("hard_images") or ())
    about: dict[str, Any] = {"sizes": [], "hard": [], "n_doubtful": 0}
    if labels is None or not len(labels) or "task" in info:
        return about
    sizes = np.bincount(labels)
    names = [str(c) for c in info.get("classes") or ()]
    names += [f"class {c}" for c in range(len(names), len(sizes))]
    present = np.flatnonzero(sizes)
    order = present[np.argsort(sizes[present], kind="stable")]
    about["sizes"] = [(names[c], int(sizes[c])) for c in order]
    about["ratio"] = float(sizes[order[-1]] / sizes[order[0]])
    if evidence:
        about["n_doubtful"] = int(evidence.doubtful.sum())
    shown = list(entries[:N_PICTURES])
    about["hard"] = [e | {"data": run.pictures.get(k)} for k, e in enumerate(shown)]
    about["n_pictures"] = len(run.pictures)
    return about


def _data(run: Run) -> str:
    """Return what the page lets people take away, as JSON in ASCII."""
    ranking = run.ranking
    keys = ("dataset", "n_samples", "n_classes", "task", "target", "level_counts", "label_counts")
    info = {k: ranking.info[k] for k in (*keys, "seed") if k in ranking.info}
    about = {"metric": ranking.metric, "info": info, "records": ranking.records()}
    data = {"csv": ranking.to_csv(), "json": about}
    return json.dumps(data, default=str, allow_nan=False)


def _costs(run: Run, key: str) -> dict[str, float]:
    """Return what each scored backbone costs: as the search measured it, or the ranking.

    Images per second are those of batches, or of one image after the other where that was faster:
    the machine was busier then, and no page shows a network slower in batches than by the image.
    """
    search = run.search or {}
    found, measured, best = {}, search.get("costs") or {}, search.get("best") or {}
    for s in run.ranking.scores:
        known = measured.get(s.backbone) or {}
        cost = known.get(key) or s.details.get(key)
        if cost and s.error is None:
            found[s.backbone] = float(cost)
            ms = (best if best.get("backbone") == s.backbone else known).get("latency_ms")
            if key == "images_per_second" and ms:
                found[s.backbone] = max(found[s.backbone], 1000 / ms)
    return found


def _tradeoffs(run: Run) -> list[dict[str, Any]]:
    """Set score against cost; a mark is (x, y, kind, label, what it is)."""
    charts, scores = [], run.ranking
    trained = is_forecast(scores)
    rank = {name: i for i, name in enumerate(scores, 1)}
    for key, label, more in COSTS:
        costs = _costs(run, key)
        x, y = Axis.over(costs.values(), log=True), Axis.over(scores[n] for n in costs)
        at = {n: (x.at(cost), y.at(scores[n])) for n, cost in costs.items()}
        text = {
            n: f"{n}: {_in_figures(scores[n], trained)}, {shorten(float(f'{c:.4g}'))} {label}"
            for n, c in costs.items()
        }
        front = find_front(scores, costs, maximize=more)
        kind = dict.fromkeys(costs, "complete") | dict.fromkeys(front, "front")
        many = len(costs) > MANY
        first = front if many else sorted(costs, key=lambda n: (kind[n] != "front", rank[n]))
        places = [(*at[n], str(rank[n])) for n in first]
        numbers = place_labels(places)
        label_of = dict(zip(first, numbers, strict=True))
        drawn = sorted(costs, key=lambda n: kind[n] == "front")  # the front over the others
        marks = [(*at[n], kind[n], label_of.get(n, ""), text[n]) for n in drawn]
        lines = make_lines([at[n] for n in front], "front")
        about = {"cost": label, "more": more, "marks": marks, "lines": lines}
        about |= {"many": many, "roomy": {*numbers} - {*place_labels(places, width=PHONE)}}
        if costs:
            charts.append({"x": x, "y": y, "names": [(rank[n], text[n]) for n in front]} | about)
    return charts


def _course(run: Run) -> dict[str, Any]:
    """When the trials ran, and the values over time."""
    begun = [t for t in run.trials if t["started"] is not None]
    first = min((t["started"] for t in begun), default=0.0)
    trials = [t | {"from": t["started"] - first, "for": t["seconds"] or 0.0} for t in begun]
    x = Axis(0.0, 1.02 * max([1e-3, *(t["from"] + t["for"] for t in trials)]))
    valued = [t for t in trials if t["value"] is not None and math.isfinite(t["value"])]
    valued.sort(key=lambda t: t["from"] + t["for"])
    y = Axis.over(t["value"] for t in valued)
    marks, steps, best = [], [], -math.inf
    for t in valued:
        a, b = x.at(t["from"] + t["for"]), y.at(t["value"])
        text = f"trial {t['number']}, {t['backbone']}, {t['state']}: {_number(t['value'])}"
        marks.append((a, b, t["state"], "", text))
        if t["state"] == "complete" and run.sign * t["value"] > best:
            best = run.sign * t["value"]
            steps += [(a, steps[-1][1]), (a, b)] if steps else [(a, b)]
    lines = make_lines([*steps, (100.0, steps[-1][1])] if steps else [], "complete")
    lanes = {t["backbone"]: [u for u in trials if u["backbone"] == t["backbone"]] for t in trials}
    return {"x": x, "y": y, "marks": marks, "lines": lines, "lanes": lanes}


def _calibration(run: Run) -> dict[str, Any] | None:
    """Compare the best value of each backbone with its score."""
    c, rank = _calibrate(run), {name: i for i, name in enumerate(run.ranking, 1)}
    rows = [r | {"best": run.sign * r["best"]} for r in c.reached]
    rows.sort(key=lambda r: rank[r["backbone"]])
    line = [(z, run.sign * value) for z, value in c.fit_line()]
    x = Axis.over(r["z"] for r in rows)
    y = Axis.over([r["best"] for r in rows] + [value for _, value in line])
    names = [
        (rank[r["backbone"]], f"{r['backbone']}: {_number(r['best'])}, trials: {r['n_trials']}")
        for r in rows
    ]
    marks = [
        (x.at(r["z"]), y.at(r["best"]), "complete", str(i), text)
        for r, (i, text) in zip(rows, names, strict=True)
    ]
    lines = make_lines([(x.at(z), y.at(value)) for z, value in line], "fit")
    about = {"calibration": c, "marks": marks, "lines": lines, "names": names}
    return {"x": x, "y": y} | about if rows else None


def _test(run: Run) -> dict[str, Any] | None:
    """Count what the winner made of the test images: per class, and what it took for what."""
    if not run.predictions:
        return None
    labels, predicted, classes = _classes(run)
    counts = count_confusions(labels, predicted, classes)
    n, right = counts.sum(axis=1), counts.diagonal()
    level = np.ceil(9 * counts / np.maximum(n, 1)[:, None]).astype(int)
    rows = [
        {"name": c, "n": int(n[i]), "right": int(right[i]), "share": right[i] / n[i]}
        | {"interval": accuracy_interval(right[i], n[i])}
        for i, c in enumerate(classes)
        if n[i]
    ]
    wrong = counts * ~np.eye(len(classes), dtype=bool)
    worst = zip(
        *np.unravel_index(np.argsort(-wrong, axis=None, kind="stable"), wrong.shape), strict=True
    )
    pairs = [
        (classes[i], classes[j], int(wrong[i, j]), wrong[i, j] / n[i])
        for i, j in worst
        if wrong[i, j]
    ]
    best = (run.search or {}).get("best") or {}
    intervals = best.get("test_intervals") or {"accuracy": best.get("test_interval") or ()}
    known = intervals.get("accuracy", ())  # knows groups
    return {
        "matrix": [
            list(zip(*row, strict=True))
            for row in zip(counts.tolist(), level.tolist(), strict=True)
        ],
        "classes": classes,
        "pairs": pairs[:20],
        "rows": sorted(rows, key=lambda r: r["share"]),
        "n": int(n.sum()),
        "right": int(right.sum()),
        "values": best.get("test") or {},
        "intervals": intervals,
        "interval": known if len(known) == 2 else accuracy_interval(right.sum(), n.sum()),
    }


def _examine_labels(run: Run) -> dict[str, Any] | None:
    """Return what the test said of each of several labels, the worst first."""
    best = (run.search or {}).get("best") or {}
    rows = best.get("labels")
    if not rows:
        return None
    share = {r["label"]: r["images"] / max(r["known"], 1) for r in rows}
    judged = [r | {"share": share[r["label"]]} for r in rows if r["average_precision"] is not None]
    return {
        "n": len(run.predictions),
        "values": best.get("test") or {},
        "intervals": best.get("test_intervals") or {},
        "rows": sorted(
            rows, key=lambda r: (r["average_precision"] is None, r["average_precision"])
        ),
        "judged": sorted(judged, key=lambda r: r["average_precision"]),
    }


def _examine_numbers(run: Run) -> dict[str, Any] | None:
    """Set what the winner predicted of the test images against what is true, and its errors."""
    if not run.predictions:
        return None
    labels, predicted = read_numbers(run)
    error, y, p = predicted - labels, labels.tolist(), predicted.tolist()
    shown = np.unique(np.linspace(0, len(y) - 1, MOST_MARKS).astype(int))
    both = Axis.over([*y, *p])
    texts = [
        f"{run.predictions[i]['item']}: label {y[i]:.4g}, predicted {p[i]:.4g}" for i in shown
    ]
    ends = [(both.at(v), both.at(v)) for v in (min(*y, *p), max(*y, *p))]
    x, z = Axis.over(p), Axis.over([*error, 0.0])
    best = (run.search or {}).get("best") or {}
    return {
        "n": len(y),
        "n_shown": len(shown),
        "values": best.get("test") or {},
        "intervals": best.get("test_intervals") or {},
        "half": float(np.quantile(np.abs(error), 0.5)),
        "most": float(np.quantile(np.abs(error), 0.9)),
        "bias": float(error.mean()),
        "predicted": {
            "x": both,
            "y": both,
            "marks": [
                (both.at(y[i]), both.at(p[i]), "complete", "", text)
                for i, text in zip(shown, texts, strict=True)
            ],
            "lines": make_lines(ends, "fit"),
            "many": len(shown) > MANY,
        },
        "residuals": {
            "x": x,
            "y": z,
            "marks": [
                (
                    x.at(p[i]),
                    z.at(float(error[i])),
                    "complete",
                    "",
                    f"{text}, error {error[i]:+.3g}",
                )
                for i, text in zip(shown, texts, strict=True)
            ],
            "lines": make_lines([(0.0, z.at(0.0)), (100.0, z.at(0.0))], "fit"),
            "many": len(shown) > MANY,
        },
    }


def _calibrate(run: Run) -> Calibration:
    scores = {name: value for name, value in run.ranking.items() if math.isfinite(value)}
    history = []
    for t in run.trials:
        value = None if t["value"] is None else run.sign * t["value"]
        history.append(Observation(t["backbone"], t["state"], value, t["seconds"]))
    return calibrate(scores, history)


def _classes(run: Run) -> tuple[list[str], list[str], list[str]]:
    """Return labels, predictions, and all classes in the order of the data set."""
    labels, predicted = ([row[key] for row in run.predictions] for key in ("label", "predicted"))
    known = [str(c) for c in (run.search or {}).get("classes") or ()]
    return labels, predicted, list(dict.fromkeys([*known, *sorted({*labels, *predicted})]))


def _winner_calibration(run: Run) -> dict[str, Any] | None:
    """Return what the temperature of the winner was worth; None in an older search."""
    return ((run.search or {}).get("best") or {}).get("calibration")


def _temperature(run: Run) -> dict[str, Any] | None:
    """Set how sure the winner is of its test images against how often it is right."""
    c = _winner_calibration(run)
    if not c:
        return None
    x, y, marks = Axis(0.0, 1.0), Axis(0.0, 1.0), []
    for key, kind, what in (
        ("bins_before", "pruned", "before"),
        ("bins_after", "complete", "after"),
    ):
        for sure, right, n in (bin_ for bin_ in c[key] if len(bin_) == 3):  # from a file
            text = f"{what}: sure {sure:.2f}, right {right:.2f}, images: {n}"
            marks.append((x.at(sure), y.at(right), kind, "", text))
    return {"c": c, "x": x, "y": y, "marks": marks, "lines": [(0, 0, 100, 100, "fit")]}


def _printable(value: Any) -> Any:
    """Let no name turn the text around it, or hide in it; markup of the template stays."""
    from markupsafe import Markup

    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _without_folder(names: Iterable[str]) -> dict[str, str]:
    """Return what is left of the paths of images without the folder that all are in.

    >>> _without_folder(["/data/a/../b/1.jpg", "/data/c/2.jpg"])
    {'/data/a/../b/1.jpg': 'b/1.jpg', '/data/c/2.jpg': 'c/2.jpg'}
    """
    paths = {name: os.path.normpath(name) for name in names}
    if not paths or not all(map(os.path.isabs, paths.values())):
        return {name: name for name in paths}
    folder = os.path.commonpath([os.path.dirname(path) for path in paths.values()])
    return {name: os.path.relpath(path, folder) for name, path in paths.items()}


def _soften(name: Any) -> Any:
    """Let a long name go on in the next line after its punctuation, rather than inside a word."""
    from markupsafe import Markup, escape

    place = r"(?<=[._:/-])(?!(?<=\.)\d)(?=\w)"  # but in 0.99
    return Markup(re.sub(place, "<wbr>", str(escape(printable(name)))))


def _probability(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "below .001"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
