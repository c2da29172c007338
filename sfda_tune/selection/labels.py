"""What a ranking says of several labels per image: which of them separate badly."""

from __future__ import annotations

from typing import Any

from sfda_tune.selection.forecast import find_evidence
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import is_number

__all__ = ["judge_labels"]


def judge_labels(ranking: Ranking) -> list[dict[str, Any]]:
    """Return a record for each label, the one that separates worst first; unjudged ones last.

    ``positives`` and ``missing`` count images; ``share`` is that of the positives among those
    known, which is the average precision of a guess. ``average_precision`` is that of the first
    backbone of the ranking, ``best_average_precision`` the highest, of ``best``; None of labels
    that could not be judged. A label separates by how far its first average precision is above
    its share. Empty if the metric has no average precisions.

    Examples
    --------
    >>> from sfda_tune.values.features import Score
    >>> counts = [{"name": "cat", "positives": 5, "missing": 0},
    ...           {"name": "dog", "positives": 5, "missing": 0}]
    >>> info = {"task": "multilabel", "label_counts": counts, "n_samples": 10}
    >>> scores = [Score("a", 0.9, details={"average_precisions": [0.9, 0.6]}),
    ...           Score("b", 0.8, details={"average_precisions": [0.7, 0.8]})]
    >>> [(r["name"], r["average_precision"], r["best"]) for r in judge_labels(Ranking(scores,
    ...     info=info))]
    [('dog', 0.6, 'b'), ('cat', 0.9, 'a')]
    """
    counts, n = ranking.info.get("label_counts"), ranking.info.get("n_samples")
    if not counts or not n:
        return []
    order = [name for name in ranking if name not in ranking.failed]
    evidence = find_evidence(ranking)
    found: dict[str, list[float | None]] = {}
    for name in order:
        values = evidence.score(name).details.get("average_precisions")
        if isinstance(values, list) and len(values) == len(counts):
            found[name] = values
    if not found:
        return []
    first, rows = next(iter(found)), []
    for c, count in enumerate(counts):
        each = {name: float(v[c] or 0.0) for name, v in found.items() if is_number(v[c])}
        best = max(each, key=lambda name: each[name], default=None)
        known = n - count["missing"]
        rows.append(
            {
                **count,
                "share": count["positives"] / known if known else 0.0,
                "average_precision": each.get(first),
                "best": best,
                "best_average_precision": None if best is None else each[best],
            }
        )
    return sorted(rows, key=_skill)


def _skill(row: dict[str, Any]) -> tuple[bool, float]:
    """How far above chance a label is told apart, 1 being without error."""
    value, share = row["average_precision"], row["share"]
    return value is None, 0.0 if value is None else (value - share) / max(1 - share, 1e-9)
