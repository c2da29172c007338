"""Images of other than three channels: networks are adapted to them as timm does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from sfda_tune import Backbone, BackboneError, open_dataset, rank, resolve_backbones, search
from sfda_tune.backbones import loading
from sfda_tune.backbones.preprocessing import Bandwise, Geometry, Preprocessing
from sfda_tune.cli.main import app
from sfda_tune.data.checks import DatasetError
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.images import augmentation, shrink
from sfda_tune.finetuning.models import load_model, predict
from sfda_tune.finetuning.run import finetune
from sfda_tune.selection.diagnostics import diagnose

tifffile = pytest.importorskip("tifffile")
QUICK = {"device": "cpu", "cache": False}


def bands_of(image: np.ndarray, seed: int) -> np.ndarray:
    """Five bands of 16 bits in which a digit is seen in the first and the last only."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 20000, (5, *image.shape))
    noise[0] += (image * 2500).astype(int)
    noise[4] += (image * 2500).astype(int)
    return np.moveaxis(np.clip(noise, 0, 65535).astype(np.uint16), 0, 2)


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    """A folder of TIFF stacks of five bands, two classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = tmp_path_factory.mktemp("stacks")
    kept = np.flatnonzero(digits.target < 2)[:120]
    for k in kept:
        path = folder / f"{'zero' if digits.target[k] == 0 else 'one'}" / f"{k}.tif"
        path.parent.mkdir(exist_ok=True)
        array = np.moveaxis(bands_of(digits.images[k], k), 2, 0)
        tifffile.imwrite(path, array, photometric="minisblack")
    return folder


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_networks_are_those_of_timm(channels):
    for backbone in resolve_backbones(["demo:*_glyphs", "demo:densenet*", "demo:eff*"]):
        name = loading.timm_name(backbone.spec)
        theirs = timm.create_model(name, pretrained=True, in_chans=channels, num_classes=0)
        module, preprocessing = loading.load(backbone.taking(channels))
        mine, reference = module.state_dict(), theirs.state_dict()
        assert mine.keys() == reference.keys()
        assert all(torch.equal(mine[k], reference[k]) for k in mine)
        from timm.data.model_config import resolve_input_data_config

        config = resolve_input_data_config(theirs)
        assert preprocessing.input_size == config["input_size"]
        assert (preprocessing.mean, preprocessing.std) == (config["mean"], config["std"])
        opened = timm.create_model(name, pretrained=True)
        given = Backbone("mine", load=lambda module=opened: (module, None), channels=channels)
        own, same = loading.load(given)
        for k, v in own.state_dict().items():  # timm adapts the demo's weights in 16 bits
            torch.testing.assert_close(v, mine[k], atol=1e-3, rtol=1e-3)
        assert same.fingerprint() == preprocessing.fingerprint()


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_bands_are_resized_as_pillow_resizes_colours(mode):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (61, 93, 3), np.uint8)
    fill = (0.4,) * 3 if mode == "border" else ()
    rgb = Geometry((3, 40, 40), "bicubic", 0.9, mode, fill).build()
    many = Geometry((6, 40, 40), "bicubic", 0.9, mode, fill * 2).build()
    assert isinstance(many, Bandwise)
    made = many(np.concatenate([image, image[..., ::-1]], -1))
    expected = rgb(Image.fromarray(image))
    assert torch.equal(made, torch.cat([expected, expected.flip(0)]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": (0.3, 1.0), "color_jitter": (0.4, 0.4, 0.4, 0.1)},
        {"auto_augment": "rand-m9-mstd0.5-inc1", "vflip": 0.5},
        {"auto_augment": "augmix-m5-w4-d2"},
        {"auto_augment": "original"},
        {"auto_augment": "3a"},
        {"grayscale_prob": 0.5, "gaussian_blur_prob": 0.5},
    ],
)
def test_augmentation_treats_all_bands_alike(arguments):
    """Seven copies of a band stay copies of each other, whatever is drawn."""
    from sfda_tune.finetuning.images import seed_streams

    band = np.random.default_rng(1).integers(0, 256, (50, 44, 1), np.uint8)
    image = np.repeat(band, 7, 2)
    p = Preprocessing(Geometry((7, 24, 24), "bicubic", 0.9, "center"), (0.5,) * 7, (0.5,) * 7)
    prepare, view = shrink(p.geometry, arguments), augmentation(p, arguments)
    seen = []
    for epoch in range(8):
        seed_streams(epoch)
        made = view(prepare(image))
        assert made.shape == (7, 24, 24)
        assert (made == made[:1]).all()
        seen.append(made[0])
    assert len({one.numpy().tobytes() for one in seen}) == 8


def test_all_bands_are_counted_and_must_agree(stacks, tmp_path):
    images = open_dataset(stacks, bands="all")
    assert (images.channels, images.reading.bands) == (5, (1, 2, 3, 4, 5))
    assert images.load(0).shape == (8, 8, 5)
    assert open_dataset(stacks, bands="4,3,2").channels == 3
    assert open_dataset(stacks, bands="4,3").channels == 2
    assert open_dataset(stacks, bands="2,1,5,4").load(0)[..., 1].tolist() == (
        images.load(0)[..., 0].tolist()
    )
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (9, 9, 4), np.uint8) for _ in range(6)]
    four = open_dataset((arrays, list("ababab")), bands="all")
    assert (four.channels, four.load(1).tolist()) == (4, arrays[1].tolist())
    three = open_dataset(([a[..., :3] for a in arrays], list("ababab")), bands="all")
    assert (three.channels, three.load(0).mode) == (3, "RGB")
    arrays[3] = arrays[3][..., :3]
    with pytest.raises(
        DatasetError, match=r"same number of bands but they have 4 \(row 0\) and 3"
    ):
        open_dataset((arrays, list("ababab")), bands="all")
    with pytest.raises(DatasetError, match="needs an image to count them in"):
        open_dataset(([b"", b""] * 2, list("abab")), bands="all")


def test_an_image_of_other_bands_is_unreadable(stacks, tmp_path):
    from sfda_tune.data.decoding import UnreadableImage

    images = open_dataset(stacks, bands="all")
    odd = tmp_path / "odd.tif"
    tifffile.imwrite(odd, np.zeros((4, 8, 8), np.uint16), photometric="minisblack")
    items = [*images.items[:3], str(odd)]
    from dataclasses import replace

    part = replace(images.subset(range(4)), items=items)
    with pytest.raises(UnreadableImage, match="has 4 bands, other images 5"):
        part.load(3)


def test_from_ranking_to_prediction(stacks, tmp_path):
    """Features by channels in the cache, page, search, model, prediction, timm and ONNX."""
    kept = {"device": "cpu", "cache": tmp_path / "cache", "metric": "sfda"}
    names = "demo:resnet_glyphs"
    five = rank(stacks, names, bands="all", **kept)
    assert five.info["channels"] == 5
    assert "channels" in {d.kind for d in diagnose(five)}
    three = rank(stacks, names, bands="2,3,4", **kept)
    assert "channels" not in three.info
    assert five.scores[0].value > three.scores[0].value + 0.05  # what is seen is in bands 1 and 5
    again = rank(stacks, names, bands="all", **kept)
    assert dict(again) == dict(five)
    found = search(stacks, names, bands="all", trials=1, epochs=2, out=tmp_path / "run", **QUICK)
    assert found.best["test"]["accuracy"] > 0.8
    model = load_model(found.folder / "model")
    assert model.provenance["reading"] == {"bit_depth": None, "bands": [1, 2, 3, 4, 5], "of": 5}
    paths = sorted(stacks.glob("*/*.tif"))[:6]
    p = predict(model, paths)
    assert np.isfinite(p).all()
    opened = timm.create_model(f"local-dir:{found.folder / 'model'}", pretrained=True).eval()
    arrays = [np.moveaxis(tifffile.imread(path), 0, 2) for path in paths]
    x = torch.stack(
        [model.preprocessing.build()(open_dataset((arrays[:2], ["a", "b"]), bands="all").load(0))]
    )
    with torch.inference_mode():
        theirs = opened(model.preprocessing.normalize(x)).softmax(1).numpy()
    np.testing.assert_allclose(theirs[0], p[0], atol=1e-5)
    np.testing.assert_allclose(predict(model, arrays), p, atol=1e-6)
    with pytest.raises(ValueError, match="must have 5 channels"):
        predict(model, open_dataset(stacks, bands="1,2,3"))
    assert list((found.folder / "hardest").glob("*.png"))
    page = (found.folder / "report.html").read_text()
    assert "data:image/jpeg" in page


def test_fine_tuning_with_every_augmentation(stacks):
    config = {
        "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0, "re_mode": "pixel",
        "color_jitter": 0.4, "scale": (0.4, 1.0),
    }  # fmt: skip
    images = open_dataset(stacks, bands="all")
    (backbone,) = resolve_backbones("demo:resnet_glyphs")
    settings = FinetuneConfig(epochs=1, augmentation=config, mixup=0.2, cutmix=1.0)
    run = finetune(backbone, images, settings, device="cpu", workers=0)
    epochs = list(run)
    assert len(epochs) == 2
    assert np.isfinite(epochs[-1].train_loss)
    three = open_dataset(stacks, bands="1,2,3")
    with pytest.raises(ValueError, match="`val` must have 5 channels, as `dataset`, but has 3"):
        finetune(backbone, images, settings, val=three, device="cpu")


def test_checkpoints_of_many_channels(stacks, tmp_path):
    """A checkpoint trained with five channels stays as it is; RGB images it does not take."""
    (backbone,) = resolve_backbones("demo:resnet_noise")
    module, _ = loading.load(backbone.taking(5))
    from timm.models import save_for_hf

    save_for_hf(module, str(tmp_path / "five"), safe_serialization=True)
    spec = f"local-dir:{tmp_path / 'five'}"
    images = open_dataset(stacks, bands="all", samples=40)
    ours, same = rank(images, ["demo:resnet_noise", spec], metric="sfda", **QUICK).scores
    assert ours.value == pytest.approx(same.value, abs=1e-6)
    (error,) = rank("digits", spec, samples=40, **QUICK).failed.values()
    assert "takes 5 channels, images have 3" in error
    (five,) = resolve_backbones(spec)
    adapted = loading.load(five.taking(7))[0].state_dict()["conv1.0.weight"]
    before = module.state_dict()["conv1.0.weight"]
    torch.testing.assert_close(adapted, torch.cat([before, before[:, :2]], 1) * 5 / 7)


def test_networks_that_cannot_be_adapted_say_so(stacks):
    """One whose stem is no convolution of the channels; one of your own takes arrays."""
    images = open_dataset(stacks, bands="all", samples=40)

    class Odd(torch.nn.Module):
        pretrained_cfg = {"input_size": (3, 32, 32), "first_conv": "first"}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(4, 4)

    def means(array):
        assert array.shape[2] == 5
        return torch.from_numpy(array.astype(np.float32)).mean((0, 1))[:, None, None] / 255

    mine = Backbone("mine", load=lambda: (torch.nn.Flatten(), means))
    rgb = Backbone("rgb", load=lambda: (torch.nn.Flatten(), lambda image: image.convert("L")))
    odd = Backbone("odd", load=lambda: (Odd(), None))
    ranking = rank(images, [mine, rgb, odd], metric="sfda", **QUICK)
    errors = ranking.failed
    assert "fails on an array of 5 bands" in errors["rgb"]
    assert "no convolution that can be adapted to 5 channels" in errors["odd"]
    assert set(errors) == {"rgb", "odd"}


def test_timm_s_own_that_it_would_leave_at_random():
    backbone = Backbone("tresnet_m", channels=4)
    with pytest.raises(BackboneError, match="no convolution that timm adapts to 4 channels"):
        loading.describe(backbone)
    assert loading.describe(Backbone("crossvit_tiny_240", channels=4)).preprocessing.mean[3] > 0


def test_command_line(stacks, tmp_path):
    out = tmp_path / "ranking.json"
    command = ["rank", str(stacks), "--backbones", "demo:resnet_glyphs,demo:resnet_noise"]
    command += ["--bands", "all", "--device", "cpu", "--no-cache", "--out", str(out), "--quiet"]
    done = CliRunner().invoke(app, [*command, "--metric", "sfda"])
    assert done.exit_code == 0, done.output
    assert "images have 5 channels" in " ".join(done.output.split())
    assert json.loads(out.read_text())["info"]["arguments"]["bands"] == "all"
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(out), "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert "data:image/jpeg" in page.read_text()
    done = CliRunner().invoke(app, [*command, "--dry-run"])
    assert done.exit_code == 0, done.output


@pytest.mark.slow
def test_what_is_written_for_onnx(stacks, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from sfda_tune.pipelines.export import export_onnx

    found = search(
        stacks, "demo:resnet_glyphs", bands="5,4,2,1", trials=1, epochs=1, out=tmp_path / "run",
        **QUICK,
    )  # fmt: skip
    exported = export_onnx(found)
    assert exported.images == "test images"
    assert exported.max_difference < 1e-5
    about = json.loads((exported.folder / "preprocessing.json").read_text())
    assert about["input"]["shape"][1] == 4
    assert about["steps"][0]["bands"] == [5, 4, 2, 1]
    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    assert session.get_inputs()[0].shape[1] == 4
