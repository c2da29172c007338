"""What a ranking says of the images: classes that separate badly, and labels that may be wrong.

==========  ==========================================================================  ==========
Symbol      Meaning                                                                     Shape
==========  ==========================================================================  ==========
k, N        good backbones (the first by score), images
p_in        probability that backbone i, fitted without image n, gives to its label      (k, N)
==========  ==========================================================================  ==========

Only scores whose contributions are such probabilities tell it: those of leave-one-out SFDA, say.
One network may err on an image for reasons of its own; where all good ones are sure that it is
something else, its label is worth a look. On `digits` with 3 % and 10 % of the labels changed (8
demo backbones), where the threshold was chosen, 46 of 50 and 158 of 162 of the images below
`DOUBTFUL` were changed ones, which are .92 and .93 of the changed. On four other data sets (400
images each, 5 % changed, 4 networks that are right on .44 to .86 of them) 40 of 72 were, which are
.63 of the changed: where networks err often, they doubt good labels, too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfda_tune.selection.forecast import find_evidence
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking

__all__ = ["DOUBTFUL", "ImageEvidence", "judge_classes", "judge_images"]

GOOD = 4  # backbones whose judgement counts, at most
DOUBTFUL = 0.05  # probability of its label below which an image is doubtful, by all of them


@dataclass(frozen=True, eq=False)
class ImageEvidence:
    """What the good backbones make of each image.

    Parameters
    ----------
    scores : tuple of Score
        The good backbones.
    p : array of float64, shape (k, N)
        Probability of the label; NaN for the only image of a class, which nothing can be said of.
    labels : array of int64, shape (N,)
    classes : tuple of str
    """

    scores: tuple[Score, ...]
    p: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def find_hardest(self, n: int) -> list[int]:
        """Return the rows of at most `n` images, those of the lowest mean probability first."""
        mean = self.p.mean(axis=0)
        order = np.argsort(mean, kind="stable")  # NaN last
        return order[: min(n, int(np.isfinite(mean).sum()))].tolist()

    @property
    def doubtful(self) -> np.ndarray:
        """Whether each image is below `DOUBTFUL` for all of them; bool (N,)."""
        return self.p.max(axis=0) < DOUBTFUL


def judge_images(ranking: Ranking) -> ImageEvidence | None:
    """Return what the best backbones by score make of each image; None where scores do not tell.

    Examples
    --------
    >>> p = np.array([0.9, 0.8, 0.01, 0.9])
    >>> ranking = Ranking([Score("a", p.mean(), p)], "sfda (loo)", [0, 0, 1, 1])
    >>> evidence = judge_images(ranking)
    >>> evidence.find_hardest(1), evidence.doubtful.tolist()
    ([2], [False, False, True, False])
    """
    labels = ranking.labels
    if labels is None or not len(labels) or "task" in ranking.info:
        return None
    good = []
    for s in find_evidence(ranking).scores:
        terms = s.per_sample
        if s.error is None and terms is not None and terms.shape == labels.shape:
            good.append(s)
    good = good[:GOOD]
    if not good:
        return None
    p = np.stack([s.per_sample for s in good])  # type: ignore[arg-type]
    if not (np.isfinite(p).all() and p.min() >= 0 and p.max() <= 1 + 1e-9):
        return None
    sizes = np.bincount(labels)
    p[:, sizes[labels] < 2] = np.nan
    names = tuple(map(str, ranking.info.get("classes") or ()))
    if len(names) < len(sizes):
        names = tuple(f"class {c}" for c in range(len(sizes)))
    return ImageEvidence(tuple(good), p, labels, names)


def judge_classes(evidence: ImageEvidence) -> list[dict[str, Any]]:
    """Return a record for each class with two images or more, the one that separates worst first.

    ``p`` is the mean probability of the label, ``low`` and ``high`` those of the backbone that
    does worst and of the one that does best; ``taken_for`` holds pairs of another class and the
    share of the images that they take for it (of the most frequent confusions only).
    """
    present = np.unique(evidence.labels)
    sizes = np.bincount(evidence.labels, minlength=len(evidence.classes))
    taken: dict[int, Counter[int]] = {}
    for s in evidence.scores:
        whole = [e for e in s.details.get("confusions") or () if len(e) == 3]  # from a file
        for at, guess, n in whole:
            if max(at, guess) < len(present):
                taken.setdefault(int(present[at]), Counter())[int(present[guess])] += n
    rows = []
    for c in present.tolist():
        if sizes[c] < 2:
            continue
        each = evidence.p[:, evidence.labels == c].mean(axis=1)
        total = sizes[c] * len(evidence.scores)
        pairs = taken.get(c, Counter()).most_common(3)
        rows.append(
            {
                "name": evidence.classes[c],
                "n": int(sizes[c]),
                "p": float(each.mean()),
                "low": float(each.min()),
                "high": float(each.max()),
                "taken_for": [(evidence.classes[g], n / total) for g, n in pairs],
            }
        )
    return sorted(rows, key=lambda r: r["p"])
