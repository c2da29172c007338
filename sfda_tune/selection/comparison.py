"""Two rankings side by side: who moved, and how far they agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sfda_tune.selection.evaluation import kendall_tau, weighted_tau
from sfda_tune.selection.odds import find_odds
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.text import printable, some

__all__ = ["Comparison", "compare"]

# What is told of two rankings where it differs
_INFO = ("dataset", "n_samples", "n_classes", "evidence", "seed", "fingerprint")


@dataclass(frozen=True)
class Comparison:
    """What two rankings say of the same backbones; made by `compare`.

    Parameters
    ----------
    rows : tuple of dict
        ``backbone, a, b, moved``, and ``p_best_a, p_best_b`` where the odds are known, in the
        order of the second: ranks among the common backbones, 1 is the best, and by how many
        places a backbone went up.
    only_a, only_b : tuple of str
        With a value in one of them alone.
    kendall_tau, weighted_tau : float
        Of the common ones; NaN with fewer than two.
    differences : tuple of str
        Other images, another metric.
    """

    rows: tuple[dict[str, Any], ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    kendall_tau: float
    weighted_tau: float
    differences: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        if self.rows:
            first = self.rows[0]
            before = min(self.rows, key=lambda row: row["a"])
            if before["backbone"] == first["backbone"]:
                lines.append(f"The first of both is {printable(first['backbone'])}.")
            else:
                now, then = printable(first["backbone"]), printable(before["backbone"])
                lines.append(
                    f"The first is {now} now, number {first['a']} before; {then} is number "
                    f"{before['b']}."
                )
        if math.isfinite(self.kendall_tau):
            lines.append(
                f"Of {len(self.rows)} common backbones, {sum(r['moved'] != 0 for r in self.rows)} "
                f"have moved; Kendall's tau {self.kendall_tau:.2f}, weighted "
                f"{self.weighted_tau:.2f} (1: the same order)."
            )
        for name, which in (("first", self.only_a), ("second", self.only_b)):
            if which:
                lines.append(f"Only in the {name}: {some(list(which))}.")
        return "\n".join([*lines, *self.differences])


def compare(a: Mapping[str, float], b: Mapping[str, float]) -> Comparison:
    """Compare two rankings, or two mappings of scores, of which higher is better.

    Raises
    ------
    ValueError
        If no backbone has a value in both.

    Examples
    --------
    >>> print(compare({"vit": 3.0, "resnet": 2.0, "old": 1.0}, {"vit": 0.1, "resnet": 0.2}))
    The first is resnet now, number 2 before; vit is number 2.
    Of 2 common backbones, 2 have moved; Kendall's tau -1.00, weighted -1.00 (1: the same order).
    Only in the first: old.
    """
    seen = [{n for n, v in x.items() if v is not None and math.isfinite(v)} for x in (a, b)]
    common = seen[0] & seen[1]
    if not common:
        raise ValueError("the two rankings must share a backbone with a value, but share none.")
    ranks = [
        {n: k for k, n in enumerate(sorted(common, key=lambda n: (-x[n], n)), 1)} for x in (a, b)
    ]
    odds = [find_odds(x) if isinstance(x, Ranking) else None for x in (a, b)]
    best = [{} if o is None else {str(n): p for n, p in o.best.items()} for o in odds]
    rows = tuple(
        {"backbone": name, "a": ranks[0][name], "b": rank, "moved": ranks[0][name] - rank}
        | {f"p_best_{k}": p[name] for k, p in zip("ab", best, strict=True) if name in p}
        for name, rank in ranks[1].items()
    )
    values = [[float(x[n]) for n in sorted(common)] for x in (a, b)]
    is_pair = len(common) > 1
    differences = []
    if isinstance(a, Ranking) and isinstance(b, Ranking):
        pairs = [("metric", a.metric, b.metric)]
        pairs += [(key, a.info.get(key), b.info.get(key)) for key in _INFO]
        for key, one, other in pairs:
            if one != other:
                what = {"fingerprint": "images", "n_samples": "number of images"}.get(key, key)
                shown = "" if key == "fingerprint" else f": {one} and {other}"
                differences.append(f"They differ in {what.replace('_', ' ')}{shown}.")
    return Comparison(
        rows,
        tuple(sorted(seen[0] - common)),
        tuple(sorted(seen[1] - common)),
        kendall_tau(*values) if is_pair else math.nan,
        weighted_tau(*values) if is_pair else math.nan,
        tuple(differences),
    )
