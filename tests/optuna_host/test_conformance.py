"""Optuna's own test suites for samplers, over every kind of base sampler.

They call their parameters `x` and `y`. So each runs twice: with `param_name="backbone"`, where we
only pass things through, and with `param_name="x"`, where `x` is a backbone if it is a choice and
an ordinary number if it is not.
"""

from __future__ import annotations

import warnings

import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)
from optuna_lab import Climber, Swarm
from sfda_tune_optuna import SFDASampler

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore::sfda_tune_optuna.SFDAWarning"),  # no trial has a backbone
]

NAMES = (0, 1, 2, 3, "a", "b", "c", "x", "y", True, False)
SCORES = {name: float(i % 7) for i, name in enumerate(NAMES)}
BASES = {
    "tpe": lambda: TPESampler(n_startup_trials=0),
    "tpe-univariate": lambda: TPESampler(n_startup_trials=0, multivariate=False),
    "tpe-group": lambda: TPESampler(n_startup_trials=0, multivariate=True, group=True),
    "random": RandomSampler,
    "nsga2": NSGAIISampler,
    "qmc": QMCSampler,
    "cmaes": lambda: CmaEsSampler(n_startup_trials=0, warn_independent_sampling=False),
    "gp": lambda: GPSampler(n_startup_trials=0),
    # With state of their own; the second on the base class that OptunaHub's samplers have.
    "swarm": Swarm,
    "climber": Climber,
}
SINGLE = ("cmaes",)  # one objective


QUICK = ("tpe", "random", "nsga2", "cmaes", "swarm", "climber")


def cases(names=tuple(BASES), params=("backbone", "x")):
    return [
        pytest.param(
            (base, param, conditional),
            id=f"{base}-{param}-{'per-backbone' if conditional else 'pooled'}",
            marks=[] if base in QUICK and conditional else [pytest.mark.slow],
        )
        for base in names
        for param in params
        for conditional in (True, False)
        # Where no parameter is a backbone, the path is the same for all bases; likewise if pooled.
        if param == "x" or base in ("tpe", "cmaes")
        if conditional or (base in ("tpe", "nsga2") and param == "x")
    ]


class _Fixture:
    @pytest.fixture
    def sampler(self, request):
        base, param, conditional = request.param

        def make() -> SFDASampler:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                sampler = BASES[base]()
            return SFDASampler(
                SCORES, param_name=param, base_sampler=sampler, conditional=conditional
            )

        return make


@pytest.mark.parametrize("sampler", cases(), indirect=True)
class TestBasic(_Fixture, BasicSamplerTestCase):
    pass


@pytest.mark.parametrize("sampler", cases(["tpe"], ["backbone"]), indirect=True)
class TestRelative(_Fixture, RelativeSamplerTestCase):
    pass


@pytest.mark.parametrize("sampler", cases([b for b in BASES if b not in SINGLE]), indirect=True)
class TestMultiObjective(_Fixture, MultiObjectiveSamplerTestCase):
    pass


@pytest.mark.parametrize("sampler", cases(SINGLE), indirect=True)
class TestSingleOnly(_Fixture, SingleOnlySamplerTestCase):
    pass
