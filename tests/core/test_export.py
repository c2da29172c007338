"""The winner of a search as ONNX: the same answers without torch, and what a user needs for it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

import sfda_tune
from sfda_tune import Ranking
from sfda_tune.cli.main import main
from sfda_tune.finetuning.models import load_model
from sfda_tune.pipelines import export as module
from sfda_tune.pipelines.export import export_onnx
from sfda_tune.values.files import read_json, write_json

onnxruntime = pytest.importorskip("onnxruntime")
QUICK = {"trials": 1, "epochs": 1, "samples": 60, "cache": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return sfda_tune.search("digits", "demo:resnet_glyphs", **QUICK, out=folder / "run")


@pytest.fixture(scope="module")
def exported(run):
    return export_onnx(run)


def test_onnx_says_what_torch_says_of_the_test_images(run, exported):
    found = exported
    assert (found.images, found.n_images) == ("test images", 12)
    assert found.max_difference < 1e-5
    assert found.value == found.value_torch == run.test["accuracy"]
    assert str(found.folder / "model.onnx") in str(found)


def by_hand(image, steps):
    """Prepare an image as preprocessing.json says, with Pillow alone."""
    convert, resize, crop = steps
    image = image.convert(convert["to"])
    assert resize["what"].startswith("the shorter side")
    scale = resize["to"][0] / min(image.size)
    size = [round(side * scale) for side in image.size]
    image = image.resize(size, getattr(Image.Resampling, resize["interpolation"].upper()))
    height, width = crop["size"]
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)


def test_what_is_written_is_enough_to_use_it_without_torch(run, exported):
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    about = json.loads((exported.folder / "preprocessing.json").read_text())
    images = [Image.fromarray(a) for a in np.random.default_rng(0).integers(
        0, 256, (3, 40, 40, 3), np.uint8)]  # fmt: skip
    pixels = np.stack([by_hand(image, about["steps"]) for image in images])
    (p,) = session.run(["probabilities"], {"pixels": pixels})
    np.testing.assert_allclose(p, run.predict(images, device="cpu"), atol=1e-5)
    assert about["classes"] == run.classes


def test_the_card_holds_figures_and_licence(run, exported):
    text = (exported.folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit"
    accuracy = front["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert accuracy == round(run.test["accuracy"], 4)
    low, high = run.best["test_interval"]
    assert f"{run.test['accuracy']:.4f} (95 % interval {low:.3f} to {high:.3f})" in text
    assert "licence mit" in text


def test_the_licence_may_be_that_of_the_ranking(run, exported, tmp_path):
    """Of a checkpoint on the hub, whose card names it and whose configuration does not."""
    model = load_model(run.folder / "model")
    model.module.pretrained_cfg.pop("license")
    about = json.loads((exported.folder / "preprocessing.json").read_text())
    for told, card in (("cc-by-nc-4.0", "cc-by-nc-4.0"), (None, "unknown")):
        scores = [replace(s, details={**s.details, "license": told}) for s in run.ranking.scores]
        found = replace(run, ranking=Ranking(scores, run.ranking.metric))
        text = module._write_card(found, model, exported, about)
        assert f"licence {card}. What" in text
        assert yaml.safe_load(text.split("---")[1])["license"] == card


@pytest.mark.slow
def test_without_the_images_it_compares_on_noise_and_says_so(tmp_path):
    data = sfda_tune.open_dataset("digits").sample(60)
    quick = {k: v for k, v in QUICK.items() if k != "samples"}
    found = sfda_tune.search(data, "demo:resnet_glyphs", **quick, out=tmp_path)
    made = export_onnx(found)
    assert made.images == "images of noise"
    assert "images of noise (the search was given `dataset` in memory) its" in str(made)
    assert made.value is None
    assert made.max_difference < 1e-5
    mine = export_onnx(found, images=data)
    assert (mine.images, mine.n_images) == ("images that were given", 60)
    assert mine.value == mine.value_torch > 0.3


def test_the_test_images_are_found_from_any_directory(photos, tmp_path, monkeypatch):
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    quick = {"trials": 1, "epochs": 1, "cache": False, "out": tmp_path / "run"}
    found = sfda_tune.search("photos", "demo:resnet_glyphs", **quick)
    monkeypatch.chdir("/")
    images, *told = module._test_images(found, None)
    assert (len(images), told) == (found.summary["n_images"]["test"], ["test images", ""])
    goes_on = sfda_tune.search(str(tmp_path / "photos"), "demo:resnet_glyphs", **quick)
    assert len(goes_on.trials) == 1
    config = read_json(found.folder / "config.json")
    assert (config["dataset"], config["directory"]) == (str(tmp_path / "photos"), "/")
    write_json(found.folder / "config.json", config | {"dataset": "photos"})
    (moved := tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "photos", moved)
    *_, what, why = module._test_images(found, None)
    assert (what, why) == ("images of noise", "there is nothing at /photos")
    monkeypatch.chdir(moved)
    assert module._test_images(found, None)[1:] == ("test images", "")
    next(moved.rglob("*.jpg")).unlink()
    write_json(found.folder / "config.json", config | {"dataset": str(moved / "photos")})
    assert "are others now" in module._test_images(found, None)[2]
    write_json(found.folder / "config.json", config | {"test": "<ndarray>"})
    assert module._test_images(found, None)[2] == "the search was given `test` in memory"


@pytest.mark.slow
def test_what_differs_is_not_written(run, tmp_path, monkeypatch):
    true = module._run
    monkeypatch.setattr(module, "_run", lambda *a: np.roll(true(*a), 1, axis=1))
    with pytest.raises(ValueError, match=r"differs by .* in the probability of a class"):
        export_onnx(run, tmp_path / "x")
    assert not (tmp_path / "x" / "model.onnx").exists()


def test_without_onnx_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"\[onnx\]"):
        export_onnx(run)


@pytest.mark.slow
def test_the_command(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["export", str(run.folder), "--onnx", "-o", str(tmp_path / "there")])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "on 12 test images its probabilities differ by at most" in out
    with pytest.raises(SystemExit) as end:
        main(["export", str(tmp_path)])
    assert end.value.code == 1
    assert "finished search" in capsys.readouterr().err
