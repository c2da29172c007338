"""What the tests of this folder have in common."""

import os

import numpy as np
import pytest

from sfda_tune import Ranking

TIMES = int(os.environ.get("SFDA_TUNE_CHAOS") or 1)
BACKBONES = ("demo:resnet_glyphs", "demo:regnet_shapes", "demo:convnext_glyphs")


def trials(n):
    """Repeat a test with the seeds 0 … n − 1, or $SFDA_TUNE_CHAOS times as many.

    The seed stands in the name of the test, which pytest shows where it fails and takes as the
    argument that repeats it.
    """
    return pytest.mark.parametrize("seed", range(n * TIMES))


def essence(ranking):
    """Return all of a ranking, or of a file of one, that must be the same to the last bit."""
    if not isinstance(ranking, Ranking):
        ranking = Ranking.from_json(ranking)
    scores = [
        (s.backbone, s.value, s.error, None if s.per_sample is None else s.per_sample.tobytes())
        for s in ranking.scores
    ]
    return scores, np.asarray(ranking.labels).tolist()
