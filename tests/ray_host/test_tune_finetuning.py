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


@pytest.fixture(scope="module")
def bits(tmp_path_factory):
    """A table of digits: the bits of each, its number, and who wrote it (ten of the same)."""
    from sklearn.datasets import load_digits

    folder, digits = tmp_path_factory.mktemp("bits"), load_digits()
    lines = ["image,b1,b2,b4,b8,number,writer"]
    for k in range(150):
        Image.fromarray((digits.images[k] * 15).astype(np.uint8)).save(folder / f"{k}.png")
        y = int(digits.target[k])
        lines.append(",".join(map(str, [f"{k}.png", *(y >> b & 1 for b in range(4)), y, k // 10])))
    (folder / "table.csv").write_text("\n".join(lines))
    return folder / "table.csv"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("columns", "metric"),
    [
        ({"label_columns": "b1,b2,b4,b8", "groups": "writer"}, "map"),
        ({"label_column": "number", "task": "regression", "groups": "writer"}, "r2"),
    ],
)
def test_labels_columns_and_groups_are_those_of_a_search(
    ray_cluster, tmp_path, bits, columns, metric
):
    from sfda_tune import resolve_backbones
    from sfda_tune.finetuning.config import FinetuneConfig
    from sfda_tune.finetuning.run import finetune

    trainable = finetune_trainable(str(bits), config={"epochs": 1}, device="cpu", **columns)
    space = {"backbone": "demo:resnet_glyphs"}
    (result,) = run(make_tuner(trainable, tmp_path, space, metric=metric, mode="max"))
    assert result.error is None
    (backbone,) = resolve_backbones("demo:resnet_glyphs")
    images = open_dataset(str(bits), **columns)
    *_, here = finetune(backbone, images, FinetuneConfig(epochs=1), device="cpu", workers=0)
    assert result.metrics[metric] == pytest.approx(here.values[metric], abs=0.02)
    alone = open_dataset(str(bits), **{**columns, "groups": None})
    *_, other = finetune(backbone, alone, FinetuneConfig(epochs=1), device="cpu", workers=0)
    assert abs(other.values[metric] - here.values[metric]) > 1e-6  # other images are held out


def test_columns_that_contradict_the_task_are_named_at_once():
    with pytest.raises(ValueError, match="`label_columns` is for several labels per image"):
        finetune_trainable("t.csv", task="regression", label_columns="a,b")
