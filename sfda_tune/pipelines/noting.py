"""Scores that are noted beside the features, so that the same ones are computed once.

A note is found by what a score depends on: the features and labels by their content, the metric by
its name, arguments and code, the kind of device. Metrics of the user's own are always computed.
"""

from __future__ import annotations

import functools
import hashlib
from base64 import b64decode, b64encode
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import scipy

import sfda_tune
from sfda_tune.extraction.store import FeatureStore
from sfda_tune.metrics.scoring import Scorer
from sfda_tune.values.features import Features, Score

__all__ = ["NotingScorer"]

KIND = {"value": float, "per_sample": (str, None), "details": {str: object}}


class NotingScorer:
    """Scores as `scorer` does, and notes what comes of it in a store.

    Parameters
    ----------
    scorer : Scorer
    store : FeatureStore or None
    """

    def __init__(self, scorer: Scorer, store: FeatureStore | None) -> None:
        self.scorer, self.store = scorer, store

    @functools.cached_property
    def metric(self) -> str | None:
        """What is computed, as a text; None for what is not the package's own."""
        found = [f"numpy {np.__version__}", f"scipy {scipy.__version__}", _digest_code()]
        for term in self.scorer.terms:
            function, arguments = term.function, []
            while isinstance(function, functools.partial):
                arguments.append((function.args, sorted(function.keywords.items())))
                function = function.func
            if function is None:  # a prior
                continue
            if not function.__module__.startswith("sfda_tune.metrics."):
                return None
            found.append(f"{term.name} {function.__module__} {function.__qualname__} {arguments}")
        return "\n".join(found)

    def score(self, features: Features, device: str) -> Score:
        """Score, or return what was noted of the same features and labels."""
        if self.store is None or self.metric is None:
            return self.scorer.score(features, device)
        x, y = np.ascontiguousarray(features.x), np.ascontiguousarray(features.y)
        head = [self.metric, device.partition(":")[0], x.shape, x.dtype.str, y.dtype.str]
        digest = hashlib.blake2b(repr(head).encode(), digest_size=20)
        digest.update(x.data)
        digest.update(y.data)
        if features.groups is not None:
            digest.update(b"groups")
            digest.update(np.ascontiguousarray(features.groups).data)
        noted = self.store.recall("scores", digest.hexdigest(), KIND)
        if noted is not None:
            per_sample = noted["per_sample"]
            if per_sample is not None:
                per_sample = np.frombuffer(b64decode(per_sample), "<f8")
            n, d = features.n_samples, features.n_dims
            return Score(features.backbone, noted["value"], per_sample, n, d, noted["details"])
        score: Any = self.scorer.score(features, device)
        if score.error is None:
            per_sample = (
                score.per_sample
            )  # as text: a number for each image would take long to read
            if per_sample is not None:
                per_sample = b64encode(per_sample.astype("<f8").tobytes()).decode()
            value = {"value": score.value, "per_sample": per_sample}
            value |= {"details": dict(score.details)}
            with suppress(TypeError, ValueError):  # a detail that is none of JSON's
                self.store.note("scores", digest.hexdigest(), value)
        return score


@functools.cache
def _digest_code() -> str:
    """Return a digest of the source of the metrics, with what they stand on."""
    root, digest = Path(sfda_tune.__file__).parent, hashlib.blake2b(digest_size=16)
    for file in sorted(p for part in ("metrics", "values") for p in (root / part).glob("*.py")):
        digest.update(file.read_bytes())
    return f"{sfda_tune.__version__} {digest.hexdigest()}"
