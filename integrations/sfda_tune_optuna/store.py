"""A ranking kept in the study it is used in: any worker, notebook or dashboard finds it there."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from optuna.study import Study

from sfda_tune.selection.calibration import estimate_errors, scores_by_name
from sfda_tune.values.features import Score
from sfda_tune.values.files import AtLeast, check, parse_json
from sfda_tune.values.formats import RECORD
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import some
from sfda_tune_optuna._compat import read_study_attrs, write_study_attr

__all__ = ["SFDAWarning", "load_ranking", "save_ranking"]

KEY = "sfda_tune:ranking"
VERSION = 1
CHUNK = 30_000  # characters: MySQL's TEXT holds 64 kB, and quotes are escaped once more


class SFDAWarning(UserWarning):
    """Something about the ranking of a study that its user should know."""


def save_ranking(
    study: Study, ranking: Mapping[Any, float], *, settings: Mapping[str, Any] | None = None
) -> None:
    """Write a ranking, without its per-image terms, to the study's user attributes.

    `SFDASampler` does so at its first trial, unless a ranking is there already.

    Parameters
    ----------
    study : Study
    ranking : Ranking or mapping of str to float
        A `Ranking` is saved with its metric, data set and standard errors.
    settings : mapping of str to JSON value, optional
        What `SFDASampler.from_study` passes on.

    Examples
    --------
    >>> import optuna
    >>> study = optuna.create_study()
    >>> save_ranking(study, {"resnet50": 0.7, "vit_small": 0.9})
    >>> load_ranking(study).shortlist(1)
    ['vit_small']
    """
    payload = _pack(ranking, settings)
    text = json.dumps(payload, allow_nan=False)
    head: dict[str, Any] = {**payload, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    if len(text) > CHUNK:
        # The chunks carry the digest: two workers that save two rankings never mix them.
        digest = payload["digest"]
        chunks = [text[i : i + CHUNK] for i in range(0, len(text), CHUNK)]
        for i, chunk in enumerate(chunks):
            write_study_attr(study, f"{KEY}:{digest}:{i}", chunk)
        head = {"version": VERSION, "digest": digest, "chunks": len(chunks)}
    write_study_attr(study, KEY, head)


def load_record(study: Study) -> dict[str, Any] | None:
    """Return what `save_ranking` wrote, as it is; None if nothing is there."""
    attrs = read_study_attrs(study)
    record = attrs.get(KEY)
    if record is None:
        return None
    version = record.get("version") if isinstance(record, dict) else None
    if version != VERSION:
        raise ValueError(
            f"The study attribute {KEY!r} must have version {VERSION} but has {version!r}; "
            "upgrade sfda-tune or save the ranking again."
        )
    where = f"the study attribute {KEY!r}"
    if "chunks" in record:
        check(record, {"digest": str, "chunks": AtLeast(1, int)}, where)
        names = (f"{KEY}:{record['digest']}:{i}" for i in range(record["chunks"]))
        record = parse_json("".join(str(attrs.get(name, "")) for name in names))
    check(record, RECORD, where)
    return record


def load_ranking(study: Study) -> Ranking:
    """Return the ranking that is saved in the study.

    Raises
    ------
    ValueError
        If there is none.

    Examples
    --------
    >>> import optuna
    >>> study = optuna.create_study()
    >>> save_ranking(study, {"resnet50": 0.7, "vit_small": 0.9})
    >>> dict(load_ranking(study))
    {'vit_small': 0.9, 'resnet50': 0.7}
    """
    record = load_record(study)
    if record is None:
        raise ValueError(
            f"`study` {study.study_name!r} must hold a ranking but has none; call "
            "`save_ranking(study, ranking)` or run a trial with `SFDASampler(ranking)`."
        )
    return _unpack(record)


def compare_rankings(study: Study, ranking: Mapping[Any, float]) -> str | None:
    """Say in one line how a ranking differs from the saved one; None if it does not."""
    old, new = load_record(study), _pack(ranking, None)
    if old is None or old["digest"] == new["digest"]:
        return None
    before, after = old["scores"], new["scores"]
    parts = []
    for what, names in (
        ("lacks", sorted(before.keys() - after.keys())),
        ("adds", sorted(after.keys() - before.keys())),
        ("scores differently", sorted(n for n in before.keys() & after if before[n] != after[n])),
    ):
        if names:
            parts.append(f"{what} {some(names, 3)}")
    if old["metric"] != new["metric"]:
        parts.append(f"has the metric {new['metric']!r} instead of {old['metric']!r}")
    for key in sorted(old["info"].keys() | new["info"].keys()):
        if old["info"].get(key) != new["info"].get(key):
            values = (repr(r["info"].get(key))[:60] for r in (new, old))
            parts.append("has {} {} instead of {}".format(key, *values))
    return "; ".join(parts) or None


# What a ranking is scored on; times and versions differ between equal rankings.
_DATA = ("dataset", "n_samples", "n_classes", "samples", "seed", "fingerprint")


def _pack(ranking: Mapping[Any, float], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    scores = scores_by_name(ranking)
    record: dict[str, Any] = {
        "version": VERSION,
        "metric": "",
        "info": {},
        "scores": {n: v if math.isfinite(v) else None for n, v in sorted(scores.items())},
        "errors": {n: e for n, e in (estimate_errors(ranking) or {}).items() if math.isfinite(e)},
        "failed": {},
    }
    if isinstance(ranking, Ranking):
        info = {key: ranking.info[key] for key in _DATA if key in ranking.info}
        record |= {"metric": ranking.metric, "info": info, "failed": ranking.failed}
    what = json.dumps([record[k] for k in ("metric", "info", "scores")], sort_keys=True)
    record["digest"] = hashlib.sha256(what.encode()).hexdigest()[:16]
    record["settings"] = dict(settings or {})
    return record


def _unpack(record: dict[str, Any]) -> Ranking:
    scores = []
    for name, value in record["scores"].items():
        error = record["failed"].get(name) or ("no score" if value is None else None)
        details = {"standard_error": record["errors"][name]} if name in record["errors"] else {}
        scores.append(
            Score(name, math.nan if value is None else value, error=error, details=details)
        )
    return Ranking(tuple(scores), record["metric"], info=record["info"])
