"""The dictionaries of AutoGluon and Ludwig; tests/*_host/test_trainer.py tests the Trainer."""

import json
import math

import pytest

from sfda_tune import Ranking
from sfda_tune.finetuning.trainer import TrainerSpace
from sfda_tune.pipelines.automl import to_autogluon, to_ludwig
from sfda_tune.values.features import Score

NAMES = {"resnet50.a1_in1k": 2.5, "vit_small_patch16_224": 3.1, "broken": math.nan}


@pytest.fixture
def ranking():
    return Ranking(
        (
            Score("mine", 9.0, details={"spec": ""}),
            Score("best", 3.0, details={"spec": "hf-hub:timm/resnet18.a1_in1k"}),
            Score("demo:vit_glyphs", 2.0, details={"spec": "demo:vit_glyphs"}),
            Score("resnet50.a1_in1k", 1.0, details={"spec": "resnet50.a1_in1k"}),
            Score("failed", error="OSError: no weights", details={"spec": "failed"}),
        )
    )


def test_autogluon_trains_the_best():
    assert to_autogluon(NAMES, 1) == {
        "hyperparameters": {
            "model.names": ["timm_image"],
            "model.timm_image.checkpoint_name": "vit_small_patch16_224",
        }
    }


def test_autogluon_searches_the_best_first():
    found = to_autogluon(NAMES, 5, n_trials=7, choice=lambda *names: names)
    key = "model.timm_image.checkpoint_name"
    assert found["hyperparameters"][key] == ("vit_small_patch16_224", "resnet50.a1_in1k")
    assert found["hyperparameter_tune_kwargs"] == {
        "searcher": "random", "scheduler": "FIFO", "num_trials": 7,
    }  # fmt: skip
    assert to_autogluon(NAMES, 2, choice=list_of)["hyperparameter_tune_kwargs"]["num_trials"] == 2


def list_of(*names):
    return list(names)


def test_autogluon_is_needed_for_its_own_spaces(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "autogluon", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install autogluon\.multimodal, or pass"):
        to_autogluon(NAMES, 2)


def test_autogluon_opens_no_folders_of_safetensors(ranking, tmp_path):
    with pytest.warns(UserWarning, match=r"left out.*: mine, demo:vit_glyphs"):
        found = to_autogluon(ranking, 3, choice=list_of)
    names = found["hyperparameters"]["model.timm_image.checkpoint_name"]
    assert names == ["hf-hub:timm/resnet18.a1_in1k", "resnet50.a1_in1k"]
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    spec = f"local-dir:{tmp_path}"
    found = to_autogluon({spec: 1.0}, 1)
    assert found["hyperparameters"]["model.timm_image.checkpoint_name"] == str(tmp_path)


def test_ludwig_searches_a_grid_of_the_best(ranking):
    with pytest.warns(UserWarning, match="left out.*: mine"):
        config = to_ludwig(ranking, 2, image="photo", label="kind")
    assert json.loads(json.dumps(config)) == config
    (feature,) = config["input_features"]
    assert feature["name"] == "photo"
    assert feature["encoder"] == {
        "type": "timm", "model_name": "hf-hub:timm/resnet18.a1_in1k",
        "use_pretrained": True, "trainable": True,
    }  # fmt: skip
    assert config["output_features"] == [{"name": "kind", "type": "category"}]
    hyperopt = config["hyperopt"]
    assert (hyperopt["goal"], hyperopt["metric"]) == ("maximize", "accuracy")
    assert hyperopt["output_feature"] == "kind"
    (space,) = hyperopt["parameters"].values()
    assert space["space"] == "grid_search"
    assert space["values"][1].startswith("local-dir:")
    assert hyperopt["executor"] == {"type": "ray", "num_samples": 1}


def test_ludwig_draws_or_trains_the_best():
    hyperopt = to_ludwig(NAMES, 2, n_trials=9)["hyperopt"]
    names = ["vit_small_patch16_224", "resnet50.a1_in1k"]
    assert hyperopt["parameters"] == {
        "image.encoder.model_name": {"space": "choice", "categories": names}
    }
    assert hyperopt["executor"]["num_samples"] == 9
    assert "hyperopt" not in to_ludwig(NAMES, 1)


@pytest.mark.parametrize("function", [to_autogluon, to_ludwig])
def test_errors_say_what_is_wrong(function):
    with pytest.raises(ValueError, match="`k` must be an integer ≥ 1 but is 0"):
        function(NAMES, 0)
    with pytest.raises(ValueError, match="`n_trials` must be an integer ≥ 1 but is True"):
        function(NAMES, 2, n_trials=True)
    with pytest.raises(ValueError, match="a scored backbone"):
        function({"broken": math.nan}, 2)


def test_space_reads_any_trial():
    space = TrainerSpace({"b": "b", "a": "a"}, "net")
    assert space.choose(None) == "b"
    assert space.choose({"net": "a", "lr": 1}) == "a"
    with pytest.raises(NotImplementedError, match="made by hp_space"):
        space()


def test_ludwig_predicts_numbers_where_the_ranking_is_of_numbers(ranking):
    found = Ranking(ranking.scores[1:4], "ridge", info={"task": "regression"})
    config = to_ludwig(found, 3, label="age")
    assert config["output_features"] == [{"name": "age", "type": "number"}]
    assert config["hyperopt"]["metric"] == "r2"
