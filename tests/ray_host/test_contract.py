"""Names that Ray does not promise: when one of them vanishes, this says which."""

import functools
import importlib

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

NAMES = """
ray._private.dict:flatten_dict
ray._private.ray_constants:ENABLE_RAY_CLUSTER
ray._raylet:Config.initialize
ray._raylet:AuthenticationTokenLoader.instance
ray._raylet:AuthenticationTokenLoader.reset_cache
ray.cloudpickle:dumps
ray.tune.experiment:Trial.init_local_path
ray.tune.experiment:Trial.is_finished
ray.tune.experiment:Trial.has_reported_at_least_once
ray.tune.experiment:Trial.error_file
ray.tune.search.sample:Categorical._Uniform
ray.tune.search.sample:_BackwardsCompatibleNumpyRng
ray.tune.search.variant_generator:parse_spec_vars
"""
OBJECTS = {
    "ASHAScheduler": (ASHAScheduler, ("_brackets", "_num_stopped", "_trial_info")),
    "Bracket": (lambda: ASHAScheduler()._brackets[0], ("_rungs",)),
    "OptunaSearch": (
        OptunaSearch,
        ("_completed_trials", "_ot_study", "_ot_trials", "_setup_study", "_space", "_storage"),
    ),
    "Trial": (lambda: Trial("stub", stub=True), ("run_metadata.last_result",)),
}


def read(thing, name):
    return functools.reduce(getattr, name.split("."), thing)


@pytest.mark.parametrize("name", NAMES.split())
def test_private_names_of_ray_are_there(name):
    module, _, path = name.partition(":")
    read(importlib.import_module(module), path)


@pytest.mark.parametrize("name", OBJECTS)
def test_private_attributes_of_ray_are_there(name):
    make, paths = OBJECTS[name]
    for path in paths:
        read(make(), path)
