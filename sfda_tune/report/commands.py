"""The command lines of a page: what does it again, what comes next, what settles a doubt."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from sfda_tune.report.run import Run
from sfda_tune.selection.forecast import is_forecast
from sfda_tune.values.ranking import Ranking

__all__ = ["find_next", "propose_search", "repeat", "settle"]

SETTLES = {  # kind of a `Diagnostic`: what to rank by instead; None: as before
    "failed": None,
    "ties": {"metric": "knn"},
    "few_samples": {"metric": "sfda", "variant": "loo"},
    "width": {"metric": "knn"},
    "shrinkage": {"metric": "sfda", "variant": "loo"},
}

# What `rank` and `search` mean alike: where the images are, how they are read and computed
_SHARED = (
    "dataset", "image_column", "label_column", "groups", "group_column", "group_regex",
    "split_column", "task", "label_columns", "label_delimiter", "levels", "bit_depth", "bands",
    "max_unreadable", "device", "precision", "import",
)  # fmt: skip


def repeat(run: Run) -> tuple[str, str]:
    """Return the command that does this again, and what has to be added to it, if anything.

    It has no passwords; of what was given in Python alone there is no command.
    """
    if run.search is None:
        options, lacking = _rank_options(run.ranking)
        return _line("rank", options, _given(run.ranking)), lacking
    options = dict(run.config or {})
    specs = options.pop("backbones", run.search.get("candidates"))
    options = {"dataset": run.search.get("dataset")} | options
    options |= {"import": options.pop("plugins", None)}
    line = _line("search", options, [specs] if isinstance(specs, str) else specs or ())
    hidden = re.sub(r"(://[^:/@\s]+):[^@\s]+@", r"\1:***@", line)
    notes = [] if hidden == line else ["The password of the storage is left out."]
    dataset = str(options["dataset"])
    if (
        dataset != "digits"
        and not dataset.startswith(("hf:", "hf-stream:"))
        and not os.path.isabs(dataset)
    ):
        notes.append(
            "Run it in the folder where the search was started, from where its images are found:"
        )
    return hidden, " ".join(notes)


def settle(run: Run, kind: str) -> str:
    """Return the command that settles a doubt about a ranking; empty if there is none."""
    if kind not in SETTLES or run.search is not None:
        return ""
    if "task" in run.ranking.info and "variant" in (SETTLES[kind] or {}):
        return ""
    options, _ = _rank_options(run.ranking)
    changes = SETTLES[kind]
    if changes:
        drop = ("metric", "variant", "train", "budget", "race", "top")
        options = {k: v for k, v in options.items() if k not in drop} | changes
    return _line("rank", options, _given(run.ranking))


def find_next(run: Run, folder: str = "RUN") -> list[tuple[str, str]]:
    """Return what to do next: pairs of a sentence and a command."""
    if run.search is None:
        line, lacking = propose_search(run.ranking)
        words = f"Fine-tune the first three, and keep the best{lacking}:"
        return [(words, line)] if line else []
    if (run.search.get("best") or {}).get("test"):
        words = ["sfda-tune", "predict", folder, "IMAGES"]
        kinds = {"regression": "Predict the numbers", "multilabel": "Name the labels"}
        kinds |= {"ordinal": "Name the levels"}
        what = kinds.get(run.search.get("task") or "", "Name the classes")
        return [(f"{what} of new images:", shlex.join(words))]
    return []


def propose_search(ranking: Ranking, **typed: Any) -> tuple[str, str]:
    """Return the command that tunes the first three on the same images, and what it cannot say.

    `typed` are options as they were typed, where the ranking keeps absolute paths.
    """
    unseen = ranking.info.get("not_looked_at") or ()
    seen = (
        [name for name in ranking.shortlist(len(ranking)) if name not in unseen] if ranking else []
    )
    first = _specs(ranking, seen[:3])
    if not first:
        return "", ""
    options, _ = _rank_options(ranking)
    options = {k: options[k] for k in _SHARED if k in options} | typed | {"out": "run"}
    unsaid = {"backbones", "dataset", "groups"} & {
        *(ranking.info.get("arguments") or {}).get("only_python", ())
    }
    lacking = f" (add its {' and '.join(sorted(unsaid))}, from Python)" if unsaid else ""
    return _line("search", options, first), lacking


def _given(ranking: Ranking) -> list[str]:
    """Return what the candidates were called, globs as globs."""
    given = (ranking.info.get("arguments") or {}).get("backbones")
    return [str(spec) for spec in given] if given else _specs(ranking, list(ranking))


def _specs(ranking: Ranking, names: Sequence[str]) -> list[str]:
    return [str(ranking.score(name).details.get("spec") or name) for name in names]


def _rank_options(ranking: Ranking) -> tuple[dict[str, Any], str]:
    """Return the options of `rank`, and a sentence about what cannot be said as a command."""
    info = ranking.info
    given = info.get("arguments")
    metric = re.fullmatch(r"(\w+)(?: \((\w+)\))?", ranking.metric)
    told = {"metric": metric and metric[1]}
    told |= {"train" if is_forecast(ranking) else "variant": metric and metric[2]}
    if not isinstance(given, Mapping):  # of an earlier version
        options = {"dataset": info.get("dataset"), "samples": info.get("samples")}
        options |= {"seed": info.get("seed"), **told}
        return options, "Its options are those that the ranking tells."
    options = {k: v for k, v in given.items() if k not in ("only_python", "plugins", "backbones")}
    options |= {"import": given.get("plugins")}
    lacking = [str(k) for k in given.get("only_python") or ()]
    options.setdefault("dataset", info.get("dataset") or "DATASET")
    if not (is_forecast(ranking) or {"metric", "variant"} & {*given, *lacking}):
        options |= told  # the score behind a forecast
    words = f"Only from Python, which gave its {' and '.join(lacking)}:" if lacking else ""
    return options, words


def _line(command: str, options: Mapping[str, Any], specs: Sequence[Any]) -> str:
    options = dict(options)
    words = ["sfda-tune", command, str(options.pop("dataset"))]
    words += ["--backbones", *map(str, specs)]
    for key, value in options.items():
        no_option = key in ("format", "sfda_tune", "data", "directory", "progress")
        if no_option or value is None or value == []:
            continue
        option = "--" + key.replace("_", "-")
        if command == "search" and key == "metric":  # so it is called in Python
            option = "--monitor"
        if key in ("import", "previous"):  # given once for each
            words += [word for one in value for word in (option, str(one))]
        elif not isinstance(value, bool):
            value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [option, value]
        elif value and key != "cache":
            words.append(option)
        elif key == "race":  # which a budget may need
            words.append("--no-race")
    return shlex.join(words)
