"""What the tests of this folder run in processes of their own, forked where all is imported."""

import os
import sys

import numpy as np
import pytest
import sfda_tune_optuna.engine  # noqa: F401  imported once, in the server that forks
import torch

import sfda_tune.cli.main
import sfda_tune.pipelines.search
from sfda_tune import Ranking

TIMES = int(os.environ.get("SFDA_TUNE_CHAOS") or 1)
BACKBONES = ("demo:resnet_glyphs", "demo:regnet_shapes", "demo:convnext_glyphs")


def trials(n):
    """Repeat a test with the seeds 0 … n − 1, or $SFDA_TUNE_CHAOS times as many.

    The seed stands in the name of the test, which pytest shows where it fails and takes as the
    argument that repeats it.
    """
    return pytest.mark.parametrize("seed", range(n * TIMES))


def run_command(arguments, log, environment):
    """Be `sfda-tune` in a child process, with a process group of its own."""
    os.setsid()
    os.environ.update(environment)
    with open(log, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (os.fdopen(k, "w", closefd=False) for k in (1, 2))
    torch.set_num_threads(1)
    sfda_tune.cli.main.main(list(map(str, arguments)))


def essence(ranking):
    """Return all of a ranking, or of a file of one, that must be the same to the last bit."""
    if not isinstance(ranking, Ranking):
        ranking = Ranking.from_json(ranking)
    scores = [
        (s.backbone, s.value, s.error, None if s.per_sample is None else s.per_sample.tobytes())
        for s in ranking.scores
    ]
    return scores, np.asarray(ranking.labels).tolist()
