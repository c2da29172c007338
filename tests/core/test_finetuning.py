"""Fine-tuning: what it reaches, what it writes, how it resumes, and what it refuses."""

import copy
import itertools
import json
import math
import os
import pickle
import random
import signal
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from scipy.special import softmax
from sklearn.metrics import log_loss
from torch import nn

from sfda_tune import (
    Backbone,
    BackboneError,
    DatasetError,
    ImageDataset,
    open_dataset,
    resolve_backbones,
)
from sfda_tune.data import decoding as images
from sfda_tune.extraction import pixels
from sfda_tune.finetuning import run as finetuning
from sfda_tune.finetuning.checkpoints import (
    DamagedError,
    read_state,
    read_tensors,
    write_state,
    write_tensors,
)
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.epochs import Epoch, OutOfTimeError, measure
from sfda_tune.finetuning.heads import fit_head
from sfda_tune.finetuning.images import Images, Order, augmentation, shrink, split
from sfda_tune.finetuning.models import Model, load_model, predict
from sfda_tune.finetuning.run import BEST, CHECKPOINT, DivergedError, finetune
from sfda_tune.finetuning.shared import SharedWork
from sfda_tune.metrics.linear_probe import linear_probe
from sfda_tune.pipelines.training import FixedLengthFineTuning

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
LIVELY = {"mixup": 0.4, "ema_decay": 0.9, "augmentation": {"scale": (0.5, 1.0), "re_prob": 0.3}}


def demo(name="resnet_glyphs"):
    (backbone,) = resolve_backbones(f"demo:{name}")
    return backbone


def digits(n=60):
    return open_dataset("digits", samples=n)


def train(backbone=None, data=None, *, stop=None, folder=None, **config):
    """Run until `stop` epochs (None: to the end); return the run."""
    options = {k: config.pop(k) for k in ("val", "workers", "shared") if k in config}
    run = finetune(
        backbone or demo(),
        data if data is not None else digits(),
        FinetuneConfig(**{"epochs": 2, **config}),
        checkpoint_dir=folder,
        device="cpu",
        **options,
    )
    with run:
        for epoch in run:
            if epoch.number == stop:
                break
    return run


def metrics(run):
    timings = {"seconds", "images_per_second"}
    return [{k: v for k, v in e.to_dict().items() if k not in timings} for e in run.history]


def weights(run):
    return {k: v.clone() for k, v in run.module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def between(a, b, part):
    return {k: a[k].lerp(v, part) if v.is_floating_point() else v for k, v in b.items()}


class Plain(nn.Module):
    """A network of the user's own, with maps instead of vectors, that fails on large batches."""

    def __init__(self, most=10**9):
        super().__init__()
        self.conv, self.most = nn.Conv2d(3, 8, 3, 2), most

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (as if)")
        return self.conv(x).relu()


def to_tensor(image):
    return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1) / 255


def own(most=10**9):
    torch.manual_seed(0)
    module = Plain(most)
    return Backbone("own", load=lambda: (module, to_tensor))


# ---- what it reaches


@pytest.mark.slow
def test_training_beats_the_linear_probe_and_starts_ahead_of_a_random_head():
    data = open_dataset("digits")
    rows = data.sample_rows(200)
    test = data.subset(np.setdiff1d(data.sample_rows(700), rows))
    probe_first = train(data=data.subset(rows), val=test, epochs=10)
    from_random = train(data=data.subset(rows), val=test, epochs=10, head="random")
    first, last = probe_first.history[0], probe_first.history[-1]
    assert last.accuracy > first.accuracy + 0.01 > 0.88
    assert probe_first.history[1].accuracy > from_random.history[0].accuracy + 0.1  # epoch 1
    assert last.log_loss < from_random.history[-1].log_loss  # in accuracy both end alike
    assert last.log_loss < first.log_loss


def test_training_begins_as_unsure_of_its_images_as_of_others():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 30)), np.arange(120) % 3
    x += 2 * np.eye(3, 30)[y]
    weight, bias, sharpness = fit_head(x, y, 3)
    logits = x @ weight.T + bias
    held_out = -linear_probe(x, y).details["log_likelihood"]
    assert log_loss(y, softmax(logits, axis=1)) < 0.7 * held_out
    assert log_loss(y, softmax(sharpness**2 * logits, axis=1)) == pytest.approx(held_out)
    assert fit_head(rng.normal(size=(60, 200)), y[:60], 3)[2] == 0.5  # nothing to be sure of


def test_epoch_zero_is_logistic_regression_on_the_frozen_features():
    run = train(epochs=0)
    (start,) = run.history
    assert (start.number, start.steps, start.lr) == (0, 0, 0.0)
    assert math.isnan(start.train_loss)
    assert start.accuracy > 0.6
    frozen = train(epochs=1, freeze="backbone").module.state_dict()
    body = [k for k in frozen if not k.startswith("fc.")]
    assert equal({k: run.module.state_dict()[k] for k in body}, {k: frozen[k] for k in body})
    assert not torch.equal(run.module.state_dict()["fc.weight"], frozen["fc.weight"])


def test_an_epoch_reports_what_happened():
    run = train(epochs=3, patience=None, batch_size=16, schedule="constant", warmup_epochs=0)
    assert [e.number for e in run.history] == [0, 1, 2, 3]
    assert [e.steps for e in run.history] == [0, 3, 6, 9]  # 48 images in batches of 16
    last = run.history[-1]
    assert last.lr == FinetuneConfig().lr
    assert last.best == max(e.accuracy for e in run.history) == run.best.accuracy
    assert last.best_number == run.best.number
    assert last.images_per_second > 0
    assert Epoch.from_dict(json.loads(json.dumps(last.to_dict()))) == last
    p = predict(run.model(), run.val, device="cpu")
    assert measure(run.val.labels, p)["log_loss"] == pytest.approx(run.best.log_loss, abs=1e-6)


def test_early_stopping_and_auto_epochs():
    run = train(epochs=20, patience=2, lr=1e-9, weight_decay=0)
    assert len(run.history) <= 5 + run.best.number
    assert run.history[-1].number == run.best.number + 2
    assert finetune(demo(), digits(250)).config.epochs == 30
    data = ImageDataset("many", [b""] * 50_000, np.arange(50_000) % 2, ("a", "b"))
    assert finetune(demo(), data).config.epochs == 5


@pytest.mark.parametrize(
    "options",
    [
        {
            "optimizer": "sgd",
            "layer_decay": 0.7,
            "head_lr_ratio": 10,
            "schedule": "wsd",
            "batch_size": 8,
        },
        {"optimizer": "lamb", "schedule": "poly", "cutmix": 1.0, "class_weights": "balanced"},
        {"precision": "bfloat16", "label_smoothing": 0.1, "schedule": "tanh"},
        {"augmentation": {"auto_augment": "rand-m5-n1", "re_prob": 0.5}, "monitor": "log_loss"},
        {"augmentation": {"no_aug": True}, "head": "random", "monitor": "macro_f1"},
    ],
    ids=lambda o: ",".join(o),
)
def test_every_option_trains(options):
    run = train(demo("vit_glyphs"), epochs=1, **options)
    assert math.isfinite(run.history[-1].train_loss)
    if "layer_decay" in options:
        scales = {round(g["lr_scale"], 6) for g in run._optimizer.param_groups}
        assert max(scales) == 10
        assert 0.7 in scales or 1.0 in scales
        assert len(scales) > 3


def test_ema_is_evaluated_and_kept():
    run = train(epochs=2, ema_decay=0.999, lr=1e-2)
    assert equal(run.model().module.state_dict(), run._weights)
    if run.best.number == 2:
        assert equal(run._weights, run._ema.module.state_dict())
    assert not equal(run._ema.module.state_dict(), weights(run))


# ---- determinism and resumption


@pytest.mark.slow
def test_workers_do_not_change_the_result():
    a = train(workers=0, epochs=1, **LIVELY)
    b = train(workers=2, epochs=1, **LIVELY)
    assert equal(weights(a), weights(b))
    assert metrics(a) == metrics(b)
    assert metrics(a) != metrics(train(epochs=1, seed=1, **LIVELY))


def test_the_callers_random_streams_are_left_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    train(epochs=1, **LIVELY).model()
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected  # noqa: NPY002


@pytest.mark.parametrize(
    "options", [{}, LIVELY, {"optimizer": "sgd"}], ids=["plain", "all", "sgd"]
)
def test_a_resumed_run_is_the_uninterrupted_run_to_the_last_bit(tmp_path, options):
    whole = train(folder=tmp_path / "a", epochs=4, **options)
    part = train(folder=tmp_path / "b", epochs=4, stop=2, **options)
    assert [e.number for e in part.history] == [0, 1, 2]
    again = train(folder=tmp_path / "b", epochs=4, **options)
    assert metrics(again) == metrics(whole)
    assert equal(weights(again), weights(whole))
    assert equal(again._weights, whole._weights)
    (a, _), (b, _) = (read_state(tmp_path / name / CHECKPOINT) for name in "ab")
    assert str(a["optimizer"]["param_groups"]) == str(b["optimizer"]["param_groups"])
    for key, state in a["optimizer"]["state"].items():
        assert equal(state, b["optimizer"]["state"][key])
    assert (a["ema"] is None) == ("ema_decay" not in options)
    if a["ema"] is not None:
        assert equal(a["ema"], b["ema"])


@pytest.mark.parametrize("stop", [0, 1])
def test_the_softened_head_is_there_after_a_resumption(tmp_path, stop):
    whole = train(epochs=2)
    train(folder=tmp_path, epochs=2, stop=stop)
    again = train(folder=tmp_path, epochs=2)
    assert equal(again._start, whole._start)
    probe = train(epochs=0)._weights
    start = train(epochs=1, batch_norm="frozen")._start
    changed = {k: start[k] / v for k, v in probe.items() if not torch.equal(start[k], v)}
    assert len(changed) == 2  # weight and bias of the head
    (sharpness,) = {round(float(v.flatten()[0]), 4) for v in changed.values()}
    assert 0.5 <= sharpness < 1
    assert all(torch.allclose(v, v.flatten()[0]) for v in changed.values())
    assert metrics(again) == metrics(whole)
    assert equal(weights(again), weights(whole))


def test_a_lost_network_goes_back_to_its_best_weights(tmp_path, caplog):
    """With a rate at which training ends in chance, in the first epochs or later."""
    wild = {"lr": 0.5, "epochs": 3, "batch_size": 8, "clip_grad": None}
    whole = train(**wild)
    assert 1 <= len(whole.backoffs) <= 3
    assert "the limit is 2.3" in whole.backoffs[0]
    assert "it goes on from epoch 0 with 0.25 of the learning rate" in caplog.text
    assert whole.history[-1].lr < 0.5 * 0.25 ** len(whole.backoffs)
    assert whole.model().provenance["backoffs"] == whole.backoffs
    train(folder=tmp_path, stop=1, **wild)
    again = train(folder=tmp_path, **wild)
    assert again.backoffs == whole.backoffs
    assert metrics(again) == metrics(whole)
    assert equal(weights(again), weights(whole))
    assert not train(lr=1e-4).backoffs


def test_a_loss_that_begins_above_chance_takes_nothing_back():
    """Features of an untrained network differ much between an image and its crops."""
    run = train(demo("vit_untrained"), digits(200), epochs=2, freeze="backbone")
    assert run._first_loss > math.log(10)
    assert not run.backoffs


def test_after_the_last_epoch_weights_nearer_to_the_start_count_too():
    """WiSE-FT; at this rate three steps do more harm than good."""
    run = train(demo("vit_glyphs"), digits(120), epochs=1, lr=3e-3)
    last = run.history[-1]
    assert last.interpolation in (0.5, 0.75)
    start, end = run._start, weights(run)
    losses = []
    for part in (last.interpolation, 1.0):
        run.module.load_state_dict(between(start, end, part))
        p = predict(Model(run.module.eval(), run.preprocessing, run.task), run.val)
        losses.append(measure(run.val.labels, p)["log_loss"])
    assert losses[0] < losses[1]
    assert losses[0] == pytest.approx(last.log_loss, rel=1e-5)
    assert {e.interpolation for e in train(head="random").history} == {1.0}


def test_a_final_training_goes_as_far_as_its_trial(tmp_path):
    data = digits(60)
    parts = split(data, digits(30), config := FinetuneConfig(epochs=2))

    def run(name, stop=None):
        run = FixedLengthFineTuning(demo(), parts, config, tmp_path / name, True, "cpu", 0)
        for epoch in run.interpolate(0.5):
            if epoch.number == stop:
                break
        return run

    whole = run("a")
    assert [e.interpolation for e in whole.history] == [1.0, 1.0, 0.5]
    start, end = whole._start, weights(whole)
    assert equal(whole._weights, between(start, end, 0.5))
    assert not equal(whole._weights, end)
    run("b", stop=1)
    assert equal(run("b")._weights, whole._weights)


def test_a_killed_process_is_resumed(tmp_path, forked):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_finetuning import *\n"
        f"run = finetune(demo(), digits(), FinetuneConfig(epochs=4), device='cpu',\n"
        f"    checkpoint_dir={str(tmp_path / 'b')!r})\n"
        "for epoch in run:\n"
        "    if epoch.number == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    child = forked([script], tmp_path / "log")
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    again, whole = train(folder=tmp_path / "b", epochs=4), train(epochs=4)
    assert metrics(again) == metrics(whole)
    assert equal(weights(again), weights(whole))


def test_a_finished_run_is_not_repeated_and_its_model_is_there(tmp_path):
    run = train(folder=tmp_path)
    again = finetune(demo(), digits(), FinetuneConfig(epochs=2), checkpoint_dir=tmp_path)
    assert list(again) == []
    assert metrics(again) == metrics(run)
    assert equal(again.model().module.state_dict(), run._weights)
    fresh = finetune(
        demo(), digits(), FinetuneConfig(epochs=2), checkpoint_dir=tmp_path, resume=False
    )
    assert next(fresh).number == 0
    fresh.close()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(folder=tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"another run, with lr 0\.001 instead of 0\.1.*resume"):
        train(folder=tmp_path, epochs=1, lr=0.1)
    with pytest.raises(ValueError, match="another run, with images"):
        train(folder=tmp_path, data=digits(70), epochs=1)
    write_tensors(tmp_path / CHECKPOINT, {"x": torch.zeros(3)}, {"of": "somebody else"})
    with pytest.raises(ValueError, match="is another file"):
        train(folder=tmp_path, epochs=1)


@pytest.mark.parametrize("name", [CHECKPOINT, BEST])
def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path, name, caplog):
    whole = train(folder=tmp_path, epochs=2)
    content = (tmp_path / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    for place in [*rng.integers(header, size=25), *rng.integers(header, len(content), size=25)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DamagedError, match="cannot be read"):
            read_state(tmp_path / name)
    again = train(folder=tmp_path, epochs=2)  # as if it were not there
    assert metrics(again) == metrics(whole)
    assert equal(again._weights, whole._weights)
    assert f"{name}' must be a checkpoint" in caplog.text
    assert "the run starts over" in caplog.text
    for cut in (b"", b"damaged", content[:-1]):
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(DamagedError):
            read_state(tmp_path / name)


def test_a_checkpoint_of_an_earlier_version_has_no_digest(tmp_path):
    write_state(tmp_path / CHECKPOINT, {"x": torch.ones(3)}, {})
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        header = file.metadata()["sfda_tune"]
    tensors = read_tensors(tmp_path / CHECKPOINT)
    write_tensors(tmp_path / CHECKPOINT, tensors, {"sfda_tune": header})
    state, _ = read_state(tmp_path / CHECKPOINT)
    assert state["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("stop", [0, 1])
def test_a_run_of_an_earlier_version_goes_on_by_its_recipe(tmp_path, stop):
    train(folder=tmp_path, stop=stop, warmup_epochs=0.5)
    state, notes = read_state(tmp_path / CHECKPOINT)
    del state["start"], notes["first_loss"], notes["backoffs"]
    notes["batch_norm"] = "frozen"
    write_state(tmp_path / CHECKPOINT, state, notes)
    run = train(folder=tmp_path)
    assert [e.number for e in run.history] == [0, 1, 2]
    assert (run.config.warmup_epochs, run.config.batch_norm) == (0.5, "frozen")
    assert not run._start
    assert run.history[-1].interpolation == 1


def test_checkpoints_hold_no_pickle(tmp_path):
    train(folder=tmp_path, epochs=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.safetensors", CHECKPOINT]
    (tmp_path / "plain").touch()
    assert (tmp_path / CHECKPOINT).stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safe_open(tmp_path / CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["sfda_tune"])["notes"]["lr"] == FinetuneConfig().lr


def test_pixels_in_memory_or_not_give_the_same_result(monkeypatch):
    kept = train(epochs=1)
    monkeypatch.setattr("sfda_tune.extraction.pixels.PIXEL_BYTES", 1000)
    anew = train(epochs=1)
    assert metrics(kept) == metrics(anew)


# ---- what it writes


def test_a_flipped_bit_in_a_model_is_noticed(tmp_path):
    folder = train(epochs=0).save_model(tmp_path / "model")
    model, rng = load_model(folder), np.random.default_rng(0)
    for name in ("config.json", "model.safetensors", "provenance.json"):
        content = (folder / name).read_bytes()
        for place in rng.integers(len(content), size=15):
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(rng.integers(8))
            (folder / name).write_bytes(damaged)
            if name != "provenance.json":
                with pytest.raises(BackboneError, match=rf"was written: {name} changed"):
                    load_model(folder)
            else:
                with suppress(ValueError):  # or it is about what no prediction depends on
                    assert load_model(folder).classes == model.classes
        (folder / name).write_bytes(content)
    told = json.loads((folder / "provenance.json").read_text())
    changed = {**told, "classes": told["classes"][::-1]}
    (folder / "provenance.json").write_text(json.dumps(changed))
    with pytest.raises(BackboneError, match="classes changed or missing"):
        load_model(folder)
    del told["digests"]  # of an earlier version
    (folder / "provenance.json").write_text(json.dumps(told))
    assert load_model(folder).classes == model.classes


@pytest.mark.parametrize("name", ["resnet_glyphs", "vit_glyphs", "convnext_glyphs"])
def test_the_model_folder_opens_with_timm(tmp_path, name):
    data = open_dataset("digits", samples=60)
    run = train(demo(name), data, epochs=1)
    folder = run.save_model(tmp_path / "model")
    files = ["config.json", "model.safetensors", "provenance.json"]
    assert sorted(p.name for p in folder.iterdir()) == files
    assert len({(folder / name).stat().st_mode for name in files}) == 1  # as the umask says
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(3, *run.preprocessing.input_size)
    with torch.inference_mode():
        assert torch.equal(plain(x), run.model().module(x))
    config = json.loads((folder / "config.json").read_text())
    assert tuple(config["label_names"]) == data.classes
    assert config["num_classes"] == len(data.classes)
    assert config["pretrained_cfg"]["mean"] == pytest.approx(run.preprocessing.mean)
    assert config["pretrained_cfg"]["crop_pct"] == run.preprocessing.geometry.crop_pct
    story = json.loads((folder / "provenance.json").read_text())
    assert story["config"] == run.config.to_dict()
    assert story["best"] == run.best.to_dict()
    assert story["train"]["images"] == 48
    assert story["versions"]["timm"] == timm.__version__
    loaded = load_model(folder)
    assert loaded.classes == data.classes
    assert loaded.preprocessing.fingerprint() == run.preprocessing.fingerprint()
    p = predict(folder, run.val, device="cpu")
    assert p.sum(1) == pytest.approx(1)
    assert (p.argmax(1) == run.val.labels).mean() == run.best.accuracy


def test_predictions_of_files_arrays_and_what_cannot_be_read(tmp_path, photos):
    data = open_dataset(photos)
    model = train(data=data, epochs=0).model()
    whole = predict(model, photos)
    assert whole.shape == (36, 3)
    arrays = [np.array(data.load(row)) for row in range(3)]
    assert predict(model, arrays) == pytest.approx(predict(model, data.subset(range(3))))
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"1 of 2 images cannot be read.*x\.jpg"):
        p = predict(model, [tmp_path / "x.jpg", photos / "ant" / "03.jpg"])
    assert np.isnan(p[0]).all()
    assert p[1].sum() == pytest.approx(1)
    with pytest.raises(BackboneError, match=r"no provenance\.json"):
        load_model(tmp_path)


def test_an_image_that_never_ends_ends_a_prediction(monkeypatch, photos):
    monkeypatch.setenv("SFDA_TUNE_PATIENCE", "0.2")
    data = open_dataset(photos)
    items = [*data.items[:3], threading.Event().wait]
    stuck = ImageDataset("stuck", items, data.labels[:4], data.classes)
    run = train(demo(), digits(), epochs=0)
    with pytest.raises(DatasetError, match="stalled by row 3: no sign of life"):
        predict(run.model(), stuck)
    assert len(predict(run.model(), data.subset(range(3)))) == 3  # nothing else is stuck


def test_a_network_of_ones_own(tmp_path):
    backbone = own()
    run = train(backbone, epochs=2, lr=0.01, layer_decay=0.5)
    folder = run.save_model(tmp_path)
    assert not (folder / "config.json").exists()
    with pytest.raises(BackboneError, match="`backbone` must be given"):
        load_model(folder)
    assert predict(load_model(folder, backbone=backbone), run.val) == pytest.approx(
        predict(run.model(), run.val)
    )
    given, _ = backbone.load()
    torch.manual_seed(0)
    assert equal(given.state_dict(), Plain().state_dict())  # the caller's was not trained


def test_a_head_that_is_not_linear_starts_at_random(caplog):
    class Cosine(nn.Linear):
        def __init__(self, n_in, n_out):
            super().__init__(n_in, n_out, bias=False)

    model = timm.create_model("test_resnet", num_classes=3)
    reset = model.reset_classifier

    def reset_classifier(n, **_):
        reset(n)
        if n:
            model.fc = Cosine(model.num_features, n)

    class Special(type(model)):
        def reset_classifier(self, num_classes, global_pool=None):
            super().reset_classifier(num_classes)
            if num_classes:
                self.fc = Cosine(self.num_features, num_classes)

    model.__class__ = Special
    (backbone,) = resolve_backbones({"cosine": model})
    run = train(backbone, epochs=1)
    assert "starts at random" in caplog.text
    assert [e.number for e in run.history] == [0, 1]


# ---- memory


def test_out_of_memory_keeps_the_batch(caplog):
    whole = train(own(), epochs=1, augmentation={"no_aug": True})
    parts = train(own(most=5), epochs=1, augmentation={"no_aug": True})
    assert "4 images at a time" in caplog.text
    assert parts.history[-1].steps == whole.history[-1].steps
    assert parts.history[-1].train_loss == pytest.approx(whole.history[-1].train_loss, rel=1e-5)
    for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# ---- odd input


def test_out_of_memory_in_the_head_shifts_no_features(monkeypatch):
    whole = train(epochs=0)
    real = nn.Linear.forward

    def small(self, x):
        if len(x) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory (as if)")
        return real(self, x)

    monkeypatch.setattr(nn.Linear, "forward", small)
    parts = train(epochs=0)
    assert parts.history[0].accuracy == whole.history[0].accuracy
    assert parts.history[0].log_loss == pytest.approx(whole.history[0].log_loss, rel=1e-3)


def test_divergence_names_the_learning_rate():
    with pytest.raises(DivergedError, match=r"diverged in epoch \d.*lr=1e\+30; try lr=1e\+29"):
        train(optimizer="sgd", lr=1e30, clip_grad=None, warmup_epochs=0)


def test_unreadable_images_are_left_out_and_named(tmp_path, photos):
    data = open_dataset(photos)
    items = [*data.items]
    (tmp_path / "broken.jpg").write_bytes(Path(items[5]).read_bytes()[:40])
    items[5] = str(tmp_path / "broken.jpg")
    broken = ImageDataset("photos", items, data.labels, data.classes)
    for options in ({}, {"mixup": 0.2}):
        run = train(data=broken, epochs=1, val_fraction=0.25, **options)
        assert list(run.unreadable) == [str(tmp_path / "broken.jpg")]
    items[6:12] = [b"no image"] * 6
    with pytest.raises(DatasetError, match=r"[67] of the 36 images cannot be read.*broken\.jpg"):
        train(data=ImageDataset("photos", items, data.labels, data.classes))


def test_classes_of_one_image_and_classes_missing_in_validation():
    data = digits(60)
    rows = [*np.flatnonzero(data.labels != 9), np.flatnonzero(data.labels == 9)[0]]
    run = train(data=data.subset(rows), epochs=1, class_weights="balanced")
    assert (run.train.labels == 9).sum() == 1
    assert 9 not in run.val.labels
    assert 0 < run.history[-1].balanced_accuracy <= 1
    absent = data.subset(data.labels < 8)  # two of ten classes have no image at all
    assert predict(train(data=absent, epochs=1).model(), absent).shape[1] == 10
    with pytest.raises(ValueError, match="at least two classes but has 6 of 1"):
        train(data=data.subset(data.labels == 3))
    with pytest.raises(ValueError, match="too few to hold out"):
        train(data=data.subset([0, int(np.flatnonzero(data.labels != data.labels[0])[0])]))


def test_validation_classes_are_matched_by_name():
    data = digits(60)
    names = tuple(reversed(data.classes))
    turned = ImageDataset("turned", data.items, 9 - data.labels, names)
    a, b = train(val=data, epochs=0), train(val=turned, epochs=0)
    assert metrics(a) == metrics(b)
    strange = ImageDataset("strange", data.items, data.labels, ("ten", *data.classes[1:]))
    with pytest.raises(ValueError, match=r"unknown classes \['ten'\]"):
        train(val=strange)


def test_grey_backbones_and_grey_images(make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "grey", "test_resnet", 32, in_chans=1)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.25]}
    (folder / "config.json").write_text(json.dumps(config))
    (backbone,) = resolve_backbones(folder)
    grey = [Image.fromarray(np.full((20, 30), 40 * k, np.uint8)) for k in range(6)] * 4
    data = open_dataset((grey, [k % 2 for k in range(24)]))
    run = train(backbone, data, epochs=1, augmentation={"auto_augment": "rand-m5-n1"})
    timm_model = timm.create_model(f"local-dir:{run.save_model(tmp_path / 'm')}", pretrained=True)
    assert timm_model.pretrained_cfg["input_size"] == (1, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, "`lr` must be a number ≥ 1e-12 but is -1"),
        ({"lr": math.nan}, "`lr` must be a number"),
        ({"epochs": 2.5}, "`epochs` must be an integer ≥ 0 or 'auto' but is 2.5"),
        ({"epochs": 0, "head": "random"}, "`epochs` must be > 0"),
        ({"batch_size": True}, "`batch_size` must be an integer"),
        ({"optimizer": "adamwx"}, "`optimizer` must be one of .* but is 'adamwx'"),
        ({"schedule": "plateau"}, "`schedule` must be one of"),
        ({"augmentation": {"hflop": 1}}, "`augmentation` must be arguments of timm.*hflop"),
        ({"patience": 0}, "`patience` must be an integer ≥ 1 or None"),
        ({"mixup": None}, "`mixup` must be a number ≥ 0 but is None"),
    ],
)
def test_a_wrong_configuration_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**options)


def test_configurations_travel_as_json():
    config = FinetuneConfig(**LIVELY, patience=3)
    assert FinetuneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"has \['learning_rate'\]"):
        FinetuneConfig.from_dict({"learning_rate": 1})


# ---- parts


def test_batches_cover_every_image_and_never_hold_a_single_one():
    for n in (2, 3, 7, 33, 64):
        order = Order(n, 2 if n < 10 else 32, seed=0)
        order.epoch = 1
        batches = list(order)
        assert sorted(row for batch in batches for _, row in batch) == list(range(n))
        assert len(batches) == len(order)
        assert min(map(len, batches)) > 1


def test_large_photos_are_shrunk_once_and_small_ones_not(photos):
    (backbone,) = resolve_backbones("demo:resnet_glyphs")
    from sfda_tune.backbones.loading import load

    preprocessing = load(backbone)[1]
    small = shrink(preprocessing.geometry, {"scale": (0.7, 1)})
    assert small(Image.new("RGB", (400, 200))).shape == (small.side, 2 * small.side, 3)
    assert small(Image.new("RGB", (9, 8))).shape == (8, 9, 3)
    images = Images(open_dataset(photos), small, 0)
    view = augmentation(preprocessing, {"scale": (0.7, 1)})
    assert view(images[0]).dtype == torch.uint8
    assert tuple(view(images[0]).shape) == preprocessing.input_size


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenetv1_025.coral_in1k_128", "cifar_resnet20.akamaster_cifar10_32"]
)
def test_real_weights_on_real_photos(tmp_path, name):
    plugins = [str(ZOO / "zoo_models.py")]
    (backbone,) = resolve_backbones(ZOO / "models" / name, plugins=plugins)
    photos = open_dataset(ZOO / "datasets" / "trashnet").sample(200)
    run = train(backbone, photos, epochs=3)
    assert run.best.accuracy > 1.5 / 6  # six classes, 40 validation images
    folder = run.save_model(tmp_path)
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, *run.preprocessing.input_size)
    with torch.inference_mode():
        assert torch.equal(plain(x), run.model().module(x))


# ---- shared work


@pytest.fixture
def work(monkeypatch):
    """Count decoded images, forward passes of whole networks and fits of heads."""
    done = {"decoded": 0, "passes": 0, "heads": 0}

    def count(owner, name, what):
        original = getattr(owner, name)

        def counted(*args, **options):
            done[what] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    count(ImageDataset, "load", "decoded")
    count(finetuning, "forward", "passes")
    count(finetuning, "start_head", "heads")

    def since():
        now = dict(done)
        done.update(dict.fromkeys(done, 0))
        return now

    return since


@pytest.mark.parametrize("make", [demo, own], ids=["timm", "own"])
def test_runs_that_share_work_end_like_those_that_do_not(make, work, tmp_path):
    data, backbone, shared = digits(), make(), SharedWork()
    configs = [
        {"lr": 1e-3, **LIVELY},
        {"lr": 3e-3},
        {"lr": 1e-3, "freeze": "backbone"},
        {"batch_norm": "frozen"},
    ]
    alone = [train(backbone, digits(), workers=0, **config) for config in configs]
    work()
    runs, costs = [], []
    for k, config in enumerate(configs):
        folder = tmp_path / str(k)
        runs.append(train(backbone, data, folder=folder, workers=0, shared=shared, **config))
        costs.append(work())
    for a, b in zip(alone, runs, strict=True):
        assert metrics(a) == metrics(b)
        assert equal(weights(a), weights(b))
    assert costs[0]["decoded"] >= len(data)
    # one for epoch 0, one for the statistics that training begins with
    assert costs[0]["heads"] == 1 + (make is demo)
    # the first has smaller crops, so larger images
    assert costs[1]["decoded"] == (make is demo) * len(runs[0].train)
    assert costs[1]["heads"] == 2 * (make is demo)
    assert costs[2]["decoded"] == costs[2]["heads"] == 0
    assert costs[3]["decoded"] == costs[3]["heads"] == 0
    # two batches of training images for each head, one of validation images before any epoch
    assert costs[0]["passes"] - costs[3]["passes"] == (5 if make is demo else 3)
    # a head that was trained alone is not interpolated, which takes two more
    assert costs[2]["passes"] == costs[3]["passes"] - 2 == 2


def test_what_differs_is_not_shared(work):
    data, shared = digits(), SharedWork()
    train(demo(), data, workers=0, epochs=0, shared=shared)
    for name, changed in (
        ("resnet_glyphs", {"seed": 1}),
        ("resnet_glyphs", {"val_fraction": 0.3}),
        ("resnet_glyphs", {"batch_size": 8}),
        ("vit_glyphs", {}),
    ):
        alone = train(demo(name), digits(), workers=0, epochs=0, **changed)
        work()
        run = train(demo(name), data, workers=0, epochs=0, shared=shared, **changed)
        assert work()["heads"] == 1
        assert metrics(run) == metrics(alone)
    train(demo(), digits(), workers=0, epochs=0, shared=shared)  # another object
    assert work()["heads"] == 1


@pytest.mark.parametrize(
    ("how_many", "workers"), [(0, 0), (5, 0), (40, 0), (61, 0), (66, 0), (5, 2)]
)
def test_the_end_of_the_time_is_no_property_of_images(how_many, workers, tmp_path):
    """Whenever it comes: nothing half done is kept, and the next run is as if alone."""
    data, shared, asked = digits(), SharedWork(), itertools.count()
    how = {"config": FinetuneConfig(epochs=1), "device": "cpu", "workers": workers}

    def stop():
        return next(asked) >= how_many

    with (
        finetune(demo(), data, **how, shared=shared, should_stop=stop) as run,
        pytest.raises(OutOfTimeError),
    ):
        list(run)
    assert not run.unreadable
    again = finetune(demo(), data, **how, shared=shared, checkpoint_dir=tmp_path)
    alone = finetune(demo(), digits(), **how)
    assert [e.number for e in again] == [e.number for e in alone] == [0, 1]
    assert metrics(again) == metrics(alone)
    assert not again.unreadable


def test_a_run_that_was_out_of_time_goes_on_to_the_last_bit(tmp_path):
    config, asked = FinetuneConfig(epochs=3), itertools.count()
    whole = train(epochs=3)
    run = finetune(
        demo(), digits(), config, checkpoint_dir=tmp_path, device="cpu",
        should_stop=lambda: len(run.history) == 2 and next(asked) > 0,  # inside epoch 2
    )  # fmt: skip
    with run, pytest.raises(OutOfTimeError):
        list(run)
    rest = train(folder=tmp_path, epochs=3)
    assert metrics(rest) == metrics(whole)
    assert equal(weights(rest), weights(whole))


def test_no_other_network_is_asked_for_the_time():
    asked = []
    with finetune(
        demo(), digits(), device="cpu", should_stop=lambda: bool(asked.append(0))
    ) as run:
        next(run)
        before = len(asked)
        nn.Linear(1, 1)(torch.zeros(1, 1))
        assert len(asked) == before > 0


def test_want_of_memory_is_no_property_of_an_image(monkeypatch):
    def prepare(image):
        raise MemoryError

    with pytest.raises(MemoryError):
        Images(digits(), prepare, 0)


def test_the_start_of_a_head_is_shared_by_those_that_decode_alike(work):
    """How far training images are shrunk depends on the crops, so the head's start does, too."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (24, 150, 150, 3)).astype(np.uint8)
    data, shared = open_dataset((x, np.arange(24) % 2)), SharedWork()
    for scale in ([0.08, 1.0], [0.9, 1.0]):
        alone, together = (
            train(demo(), data, workers=0, epochs=0, augmentation={"scale": scale}, shared=s)
            for s in (None, shared)
        )
        assert metrics(alone) == metrics(together)


def test_an_image_that_could_not_be_read_in_passing_is_read_by_the_next_run(monkeypatch, photos):
    data, shared, to_rgb = open_dataset(photos), SharedWork(), images.to_rgb
    left = [1]

    def fails_once(image, *reading):
        if left[0]:
            left[0] -= 1
            raise MemoryError
        return to_rgb(image, *reading)

    whole = train(demo(), data, epochs=0, workers=0)
    monkeypatch.setattr(images, "to_rgb", fails_once)
    first = train(demo(), data, epochs=0, workers=0, shared=shared)
    assert [*first.unreadable.values()] == ["MemoryError"]
    second = train(demo(), data, epochs=0, workers=0, shared=shared)
    assert not second.unreadable
    assert metrics(second) == metrics(whole)


def test_an_image_that_ends_the_decoding_is_named(photos):
    data = open_dataset(photos)
    items = [*data.items[:20], partial(_end, os.getpid(), data.items[20]), *data.items[21:]]
    deadly = ImageDataset("deadly", items, data.labels, data.classes)
    with pytest.raises(DatasetError, match=r"died while it decoded row 20 \(SIGKILL\)"):
        train(demo(), deadly, workers=2)


def _end(parent, item):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_unreadable_images_are_told_by_every_run_that_shares_work(monkeypatch, tmp_path):
    data, shared = digits(), SharedWork()
    items = list(data.items)
    items[7] = tmp_path / "gone.png"
    broken = ImageDataset("broken", items, data.labels, data.classes)
    runs = [train(demo(), broken, workers=0, epochs=0, shared=shared) for _ in range(2)]
    assert list(runs[0].unreadable) == [str(tmp_path / "gone.png")]
    assert runs[0].unreadable == runs[1].unreadable
    monkeypatch.setattr(pixels, "PIXEL_BYTES", 1)  # too little memory to keep any image
    shared = SharedWork()
    runs = [train(demo(), broken, workers=0, epochs=0, shared=shared) for _ in range(2)]
    assert runs[0].unreadable == runs[1].unreadable != {}


def test_shared_images_take_no_more_memory_than_those_of_one_run(monkeypatch):
    data, shared = digits(), SharedWork()
    for scale in (0.9, 0.5, 0.3, 0.9):
        train(demo(), data, workers=0, epochs=0, shared=shared, augmentation={"scale": (scale, 1)})
    kept = [images.nbytes for images in shared._images.values()]
    assert len(kept) == 4  # three sizes for training, one for validation
    limit = sum(kept) - 1
    monkeypatch.setattr(pixels, "PIXEL_BYTES", limit)
    train(demo(), data, workers=0, epochs=0, shared=shared, augmentation={"scale": (0.2, 1)})
    assert 0 < sum(images.nbytes for images in shared._images.values()) <= limit


def test_shared_work_travels_empty():
    shared = SharedWork()
    train(demo(), digits(), epochs=0, shared=shared)
    assert shared._images
    assert not pickle.loads(pickle.dumps(shared))._images


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_batch_norm_keeps_the_statistics_of_the_pretraining_or_learns_others(mode):
    before, after = train(epochs=0), train(epochs=1, batch_norm=mode)
    a, b = weights(before), weights(after)
    statistics = [name for name in a if "running_" in name]
    assert statistics
    assert equal(*({k: w[k] for k in statistics} for w in (a, b))) == (mode == "frozen")
    scales = [k.replace("running_mean", "weight") for k in statistics if "mean" in k]
    assert not any(torch.equal(a[k], b[k]) for k in scales)  # they learn either way


def test_training_begins_with_the_statistics_of_the_training_images():
    """And epoch 0, which is what the scores speak of, has those of the pretraining."""
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, 2), nn.ReLU())
    module[0].running_mean.fill_(9.0)
    backbone = Backbone("own", load=lambda: (copy.deepcopy(module), to_tensor))
    run = train(backbone, epochs=1)
    x = torch.stack([to_tensor(run.train.load(row)) for row in range(len(run.train))])
    (name,) = [key for key in run._start if key.endswith("running_mean")]
    torch.testing.assert_close(run._start[name], x.mean((0, 2, 3)))
    variance = run._start[name.replace("mean", "var")]
    torch.testing.assert_close(variance, x.var((0, 2, 3)), rtol=0.02, atol=0)
    probe, frozen = train(backbone, epochs=0), train(backbone, epochs=1, batch_norm="frozen")
    for state in (probe._weights, frozen._start, weights(frozen)):
        assert state[name].tolist() == [9.0] * 3
    assert metrics(run)[0] == metrics(probe)[0]
    assert run.history[1].log_loss < probe.history[0].log_loss


class Small(Plain):
    """A network that cannot normalise a single image by itself: it ends in one value a channel."""

    def __init__(self, most):
        super().__init__(most)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_var.fill_(0.5)

    def forward(self, x):
        return self.norm(super().forward(x).mean((2, 3), keepdim=True)).flatten(1)


def test_an_image_alone_is_normalised_by_what_is_known():
    small = Backbone("small", load=lambda: (Small(1), to_tensor))
    run = train(small, epochs=1)
    assert run._micro == 1
    for state in (run._start, weights(run)):  # nothing was learned of any image
        assert state["body.norm.running_var"].tolist() == [0.5] * 8
    assert math.isfinite(run.history[-1].log_loss)


class Twice(Plain):
    """A network that calls one layer by two names."""

    def __init__(self):
        super().__init__()
        self.norm = self.again = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.again(self.norm(super().forward(x)))


def test_a_layer_with_two_names_begins_with_one_state():
    run = train(Backbone("twice", load=lambda: (Twice(), to_tensor)), epochs=1)
    for key in ("running_mean", "running_var"):
        assert torch.equal(run._start[f"body.norm.{key}"], run._start[f"body.again.{key}"])
        assert not torch.equal(run._start[f"body.norm.{key}"], torch.ones(8))
