"""Spaces and resources, in Ray's own searchers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from scipy.stats import chisquare
from sfda_tune_ray import backbone_resources, backbone_space

from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking

SCORES = {"low": 0.3, "top": 0.8, "mid": 0.5, "none": float("nan")}
ROOT = Path(__file__).resolve().parents[2]


def test_best_first_without_failures():
    assert backbone_space(SCORES).categories == ["top", "mid", "low"]
    assert backbone_space(SCORES, 2).categories == ["top", "mid"]
    with pytest.raises(ValueError, match="`scores` must hold at least one scored backbone"):
        backbone_space(Ranking([Score("a", error="OSError: no weights")]))
    with pytest.raises(ValueError, match="`top_k` must be an integer ≥ 1 but is 0"):
        backbone_space(SCORES, 0)
    with pytest.raises(ValueError, match="`temperature` must be a number > 0"):
        backbone_space(SCORES, temperature=0)


def test_trap_S22_weights_are_obeyed_by_random_search_and_ignored_by_models():
    space = backbone_space(SCORES, temperature=0.2)
    rng = np.random.default_rng(0)
    drawn = Counter(space.sample(size=3000, random_state=rng))
    expected = np.exp(np.array([0.8, 0.5, 0.3]) / 0.2)
    counts = [drawn[name] for name in ("top", "mid", "low")]
    assert chisquare(counts, 3000 * expected / expected.sum()).pvalue > 1e-3
    assert space.sample(random_state=1) == space.sample(random_state=1)
    (distribution,) = OptunaSearch.convert_search_space({"backbone": space}).values()
    assert distribution.choices == ("top", "mid", "low")


def test_trap_T06_resources_follow_size_batch_and_measured_memory():
    ranking = Ranking(
        [
            Score("small", 3, details={"n_params": 5e6, "input_size": (3, 224, 224)}),
            Score("big", 2, details={"n_params": 3e8, "input_size": (3, 518, 518)}),
            Score("lean", 1, details={"n_params": 3e8, "peak_memory": 8e8, "peak_batch": 32}),
        ]
    )
    need = backbone_resources(ranking, cpus=2, gpu_memory=24e9, batch_size="batch")
    gpus = {
        (name, batch): need({"backbone": name, "batch": batch}).required_resources["GPU"]
        for name in ("small", "big", "lean", "unknown") for batch in (8, 64)
    }  # fmt: skip
    assert gpus == {
        ("small", 8): 0.25, ("small", 64): 0.5, ("big", 8): 1, ("big", 64): 1,
        ("lean", 8): 0.5, ("lean", 64): 1, ("unknown", 8): 0.25, ("unknown", 64): 1,
    }  # fmt: skip
    without = backbone_resources(ranking, cpus=2)({"backbone": "big"})
    assert without.required_resources == {"CPU": 2}
    with pytest.raises(ValueError, match="`headroom` must be ≥ 1"):
        backbone_resources(ranking, headroom=0.5)


def test_trap_T05_with_resources_changes_the_function_it_is_given():
    """The reason why the examples wrap a copy: Tune's decorator returns the same object."""

    def train(config):
        return None

    assert tune.with_resources(train, {"cpu": 2}) is train


def test_trap_T08_R20_no_dangerous_names_in_the_package_and_its_tests():
    names = ["ray" + r"\.air", "ray" + r"\.train", "Autoscaling" + "Cluster", "ray" + " stop"]
    words = re.compile("|".join(rf"\b{name}\b" for name in names))
    for folder in ("integrations/sfda_tune_ray", "tests/ray_host", "examples"):
        for file in (ROOT / folder).glob("*.py"):
            assert not words.search(file.read_text()), file


def test_the_package_imports_no_tune_until_it_is_asked():
    code = "import sys, sfda_tune_ray; sys.exit('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
