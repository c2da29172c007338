import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sfda_tune.backbones import demo
from sfda_tune.backbones.demo import measure, pretrain, sources


def _config(name: str) -> dict:
    return json.loads((demo.folder(name) / "config.json").read_text())


def _assert_weights_equal(folder: Path) -> None:
    """The model that plain timm opens holds exactly the numbers of the file."""
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    stored, opened = load_file(folder / "model.safetensors"), model.state_dict()
    assert model.num_classes == config["num_classes"]
    assert stored.keys() == opened.keys()
    for key, value in stored.items():
        assert torch.equal(opened[key], value.to(opened[key].dtype)), key
        assert torch.isfinite(opened[key]).all(), key
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_names_and_folders():
    assert demo.names() == sorted(pretrain.SPECS)
    assert 6 <= len(demo.names()) <= 8
    assert len({_config(name)["family"] for name in demo.names()}) >= 4
    with pytest.raises(ValueError, match=r"no demo backbone 'nope'.*resnet_glyphs"):
        demo.folder("nope")
    for name in demo.names():
        assert name in (demo.__doc__ or "")


def test_package_files_are_small_and_free_of_pickle():
    root = Path(demo.__file__).parent
    files = [
        path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert sum(path.stat().st_size for path in files) <= 4e6
    assert {path.suffix for path in files} <= {".py", ".json", ".safetensors"}


@pytest.mark.parametrize("name", sorted(pretrain.SPECS))
def test_opens_with_plain_timm(name):
    folder = demo.folder(name)
    _assert_weights_equal(folder)
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    size = _config(name)["pretrained_cfg"]["input_size"]
    with torch.no_grad():
        features = backbone(torch.zeros(2, *size))
    assert features.shape == (2, demo.truth()["backbones"][name]["width"])


def test_geometries_differ():
    configs = [_config(name)["pretrained_cfg"] for name in demo.names()]
    assert len({(c["input_size"][1], c["crop_pct"], c["interpolation"]) for c in configs}) >= 2


def test_truth_covers_the_backbones():
    truth = demo.truth()
    assert sorted(truth["backbones"]) == demo.names()
    widths = [entry["width"] for entry in truth["backbones"].values()]
    assert max(widths) >= 4 * min(widths)
    for name, entry in truth["backbones"].items():
        assert len(entry["values"]) == 3
        assert entry["mean"] == pytest.approx(np.mean(entry["values"]), abs=1e-5)
        assert entry["key"] == measure._key(demo.folder(name)), f"measure {name} again"
    means = demo.accuracies()
    assert means == {name: entry["mean"] for name, entry in truth["backbones"].items()}
    noise = np.median([entry["std"] for entry in truth["backbones"].values()])
    low, high = np.quantile(list(means.values()), [0.25, 0.75])  # not the outlier, untrained
    assert high - low > 3 * noise


@pytest.mark.parametrize("task", sorted(sources.TASKS))
def test_source_tasks(task):
    images, labels = sources.draw(task, np.random.default_rng(3), 120, 32)
    again = sources.draw(task, np.random.default_rng(3), 120, 32)
    other, _ = sources.draw(task, np.random.default_rng(4), 120, 32)
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(labels, again[1])
    assert images.shape == (120, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert (images != other).any()
    assert len(np.unique(images.reshape(120, -1), axis=0)) == 120
    assert (images.reshape(120, -1).std(axis=1) > 3).all()  # nothing blank
    counts = np.bincount(labels, minlength=sources.classes(task))
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", ["efficientnet_textures", "vit_untrained"])
def test_pretraining_script(name, tmp_path):
    threads = torch.get_num_threads()
    try:
        pretrain.main(["--steps", "2", "--only", name, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    _assert_weights_equal(tmp_path / name)


def test_untrained_weights_are_reproducible(tmp_path):
    pretrain.write(
        pretrain.build(pretrain.SPECS["vit_untrained"]),
        pretrain.SPECS["vit_untrained"],
        None,
        tmp_path,
    )
    found, expected = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path, demo.folder("vit_untrained"))
    )
    assert found.keys() == expected.keys()
    for name, weight in expected.items():  # processors round the error function differently
        torch.testing.assert_close(found[name], weight, rtol=2e-3, atol=1e-6)


def _probe(name: str) -> float:
    images, labels, train, test = measure.digits_split()
    model = measure.open_model(demo.folder(name), 0).eval()
    with torch.no_grad():
        parts = measure.prepare(images, demo.folder(name)).split(256)
        features = torch.cat([model(part) for part in parts]).numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return probe.fit(features[train], labels[train]).score(features[test], labels[test])


def test_glyph_features_beat_noise_features():
    # the noise backbone is four times as wide
    assert _probe("resnet_glyphs") > _probe("resnet_noise") + 0.05


def test_finetuning_is_repeatable_and_learns(monkeypatch):
    monkeypatch.setitem(measure.RECIPE, "epochs", 4)
    images, labels, train, _ = measure.digits_split()
    folder = demo.folder("resnet_glyphs")
    x, y = measure.prepare(images[train], folder), torch.from_numpy(labels[train])
    first, second = (measure.evaluate(measure.finetune(folder, x, y, 0.05, 0), x, y) for _ in "12")
    assert first == second
    assert first[0] > 0.9


def test_import_is_light():
    code = (
        "import sys, sfda_tune.backbones.demo as d; d.names(); d.accuracies();"
        "sys.exit(bool({'torch', 'timm', 'sfda_tune.backbones.demo.pretrain'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
