"""`finetune_trainable` in a real run: checkpoints, early stopping, resumption."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image, ImageFile
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from sfda_tune_ray import SFDASearcher, backbone_space, finetune_trainable
from tune_lab import make_tuner, run

from sfda_tune import open_dataset

RANKING = {"demo:resnet_glyphs": 2.0, "demo:vit_glyphs": 1.0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_from_ranking_to_fine_tuned_survivors(ray_cluster, tmp_path):
    data = open_dataset("digits", samples=60)
    trainable = finetune_trainable(data, config={"epochs": 2})
    space = {"backbone": backbone_space(RANKING), "lr": tune.loguniform(1e-4, 1e-2)}
    results = run(
        make_tuner(
            trainable, tmp_path, space, search_alg=SFDASearcher(RANKING, seed=0), num_samples=2,
            scheduler=ASHAScheduler(max_t=3), metric="accuracy", mode="max",
        )
    )  # fmt: skip
    assert not results.errors
    assert [result.metrics["number"] for result in results] == [2, 2]
    best = results.get_best_result()
    assert best.metrics["accuracy"] > 0.5
    with best.checkpoint.as_directory() as folder:
        assert "best.safetensors" in os.listdir(folder)
    assert finetune_trainable("digits") is not finetune_trainable("digits")


def test_wrong_configurations_are_named():
    with pytest.raises(ValueError, match=r"only have the fields .* has \['epoch'\]"):
        finetune_trainable("digits", config={"epoch": 1})
    train = finetune_trainable("digits")
    with pytest.raises(ValueError, match=r"must hold 'backbone' but has only .'lr', 'm/backbone'"):
        train({"m": {"backbone": "demo:resnet_glyphs"}, "lr": 0.1})
    with pytest.raises(ValueError, match=r"must be the name of one of .*, but is 'demo:\*glyphs'"):
        train({"backbone": "demo:*glyphs"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("where", "switch", "value", "fails"),
    [(ImageFile, "LOAD_TRUNCATED_IMAGES", True, False), (Image, "MAX_IMAGE_PIXELS", 20, True)],
)
def test_trials_have_pillow_s_switches(
    ray_cluster, tmp_path, monkeypatch, where, switch, value, fails
):
    """Each value makes the trial end in the other way than Pillow's own would."""
    pixels = np.random.default_rng(0).integers(0, 255, (12, 40, 40, 3), np.uint8)
    for k, image in enumerate(pixels):
        file = tmp_path / "photos" / "ab"[k % 2] / f"{k}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
        if switch == "LOAD_TRUNCATED_IMAGES":
            file.write_bytes(file.read_bytes()[:-300])
            with pytest.raises(OSError, match="truncated"), Image.open(file) as photo:
                photo.load()
    monkeypatch.setattr(where, switch, value)
    trainable = finetune_trainable(str(tmp_path / "photos"), config={"epochs": 0})
    results = run(make_tuner(trainable, tmp_path, {"backbone": "demo:resnet_glyphs"}))
    assert [error is not None for error in results.errors] == [True] * fails
