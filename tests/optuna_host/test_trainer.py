"""Hugging Face's own `Trainer.hyperparameter_search` over the backbones, without network."""

import json

import numpy as np
import optuna
import pytest
import timm
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sfda_tune_optuna import hp_space

from sfda_tune.backbones import demo

transformers = pytest.importorskip("transformers")
RANKING = {"demo:resnet_glyphs": 2.0, "demo:vit_glyphs": 1.5, "demo:resnet_noise": 0.2}
ARCHITECTURE = {"demo:resnet_glyphs": "resnet10t", "demo:vit_glyphs": "test_vit"}


def measure(prediction):
    return {"acc": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


@pytest.mark.slow
def test_search_trains_the_backbone_that_the_trial_names(make_trainer):
    rate = FloatDistribution(1e-4, 1e-2, log=True)
    space = hp_space(RANKING, k=2, learning_rate=rate, weight_decay=0.01)
    trainer = make_trainer(space, compute_metrics=measure)
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append((model.config.architecture, args.learning_rate, args.weight_decay))

    trainer.add_callback(Watch())
    study = {"sampler": optuna.samplers.RandomSampler(seed=1), "study_name": "s"}
    best = trainer.hyperparameter_search(
        space, backend="optuna", n_trials=4, direction="maximize",
        compute_objective=lambda m: m["eval_acc"], **study,
    )  # fmt: skip
    assert {architecture for architecture, _, _ in seen} == set(ARCHITECTURE.values())
    assert len({rate for _, rate, _ in seen}) == 4
    assert all(decay == 0.01 for _, _, decay in seen)
    architecture = seen[int(best.run_id)][0]
    assert ARCHITECTURE[best.hyperparameters["backbone"]] == architecture
    winner = trainer.model_init(best.hyperparameters)
    assert winner.config.architecture == architecture


def test_model_is_the_pretrained_backbone_with_its_preprocessing(digits, tmp_path):
    space = hp_space(RANKING, k=2)
    model = space.model_init(("zero", "one"))().eval()  # the best one
    assert model.config.architecture == "resnet10t"
    assert dict(model.config.id2label) == {0: "zero", 1: "one"}
    folder = f"local-dir:{demo.folder('resnet_glyphs')}"
    reference = timm.create_model(folder, pretrained=True, num_classes=0).eval()
    pixels = torch.stack([d["pixel_values"] for d in digits[:4]])
    pixels = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    cfg = reference.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        expected = model.timm_model.get_classifier()(reference((pixels - mean) / std))
        logits = model(pixels).logits
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")  # a checkpoint for timm and transformers
    opened = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        again = opened.eval()((pixels - mean) / std).logits
    np.testing.assert_allclose(logits, again, atol=1e-4)
    assert json.loads((tmp_path / "saved/config.json").read_text())["architecture"] == "resnet10t"


def test_distributions_become_suggestions():
    rate, steps = FloatDistribution(0.1, 1.0, step=0.1), IntDistribution(1, 9, step=2)
    space = hp_space(
        RANKING, k=None, lr=rate, steps=steps, optim=CategoricalDistribution(["a", "b"])
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    assert space.choose(trial) == space.choose(trial)  # before and after the Trainer asks
    values = space(trial)
    assert list(values) == ["lr", "steps", "optim"]
    assert trial.distributions["lr"] == rate
    assert trial.distributions["steps"] == steps
    assert trial.distributions["backbone"].choices == tuple(sorted(RANKING))
    assert space.choose(None) == "demo:resnet_glyphs"
