"""The script of the paper's experiment: its tables, the stand-ins, and its real path offline."""

import json
import re
import runpy
import socket
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torchvision.models import get_model_weights, mobilenet_v2, resnet50

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def paper():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "examples/reproduce_paper.py")))


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch, tmp_path):
    attempts = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: attempts.append(a) or [])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # `main` sets it for the whole process
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
    yield
    assert attempts == []


def write(root, names):
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(root / name)


def write_datasets(root):
    """Write DTD and VOC2007 as torchvision reads them, 36 and 12 images."""
    names = [f"{c}/{c}_{k}.jpg" for c in ("banded", "woven", "dotted") for k in range(12)]
    dtd, voc = root / "dtd/dtd", root / "VOCdevkit/VOC2007"
    write(dtd / "images", names)
    write(voc / "JPEGImages", [f"{k}.jpg" for k in range(12)])
    for folder in (dtd / "labels", voc / "Annotations", voc / "ImageSets/Main"):
        folder.mkdir(parents=True)
    for k, split in enumerate(("train", "val", "test")):
        (dtd / f"labels/{split}1.txt").write_text("\n".join(names[k::3]))
    (voc / "ImageSets/Main/trainval.txt").write_text("\n".join(map(str, range(12))))
    one = "<object><name>{}</name><difficult>{}</difficult></object>"
    for k in range(12):
        both = ("cat", 0, "aeroplane", 1) if k % 2 else ("person", 0, "dog", 0)
        (voc / f"Annotations/{k}.xml").write_text(f"<all>{one}{one}</all>".format(*both))


def test_the_tables_name_what_exists(paper):
    assert [len(group.models) for group in paper.groups()] == [11, 12, 10]
    for model in (model for group in paper.groups() for model in group.models):
        if model.source == "timm":
            assert model.weights in timm.list_pretrained()
        elif model.source == "torchvision":
            assert "IMAGENET1K_V1" in get_model_weights(model.weights).__members__
        else:
            assert model.weights.startswith("https://") == (model.source == "url")
    for data in paper.datasets():
        options = signature(getattr(torchvision.datasets, data.source)).parameters
        assert {"root", "download", data.key} <= {*options, ""}


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no published numbers at {SHARED}")
def test_the_published_numbers(paper):
    printed = json.loads((SHARED / "published_tau_w.json").read_text())
    names = [data.name for data in paper.datasets()]
    keys = {"cnn": ("datasets", "supervised_group1"), "ssl": ("ssl_datasets", "ssl_group2")}
    for key, taus in paper.PUBLISHED.items():
        group, metric = key.split()
        order, table = (printed[k] for k in keys[group])
        there = {name: tau for name, tau in zip(names, taus, strict=True) if tau == tau}
        assert there == dict(zip(order, table[metric], strict=True))
    for group in paper.groups():
        truth = paper.accuracies(group, paper.TRUTH)
        assert list(truth) == names
        assert {model.name for model in group.models} == set(truth["dtd"])


def test_the_stand_ins_and_the_cache(paper, capsys):
    taus = []
    for cached in (0, 8):
        assert paper.main(["--stand-in", "--groups", "demo", "--samples", "100"]) == 0
        text = capsys.readouterr().out
        assert re.search(rf"digits: 8 models, 100 images, .* images/s, {cached} cached", text)
        assert len(re.findall(r"over nleep: .*%.*: \+59\.1%.* ÷ \d+\.\d .*: ÷ 22\.5", text)) == 2
        taus.append(re.search(r"digits \(8\)" + r" +(-?\d\.\d{3})" * 3, text).groups())
    assert taus[0] == taus[1]


def test_what_is_missing_is_named(paper, capsys, tmp_path):
    truth = tmp_path / "truth.csv"
    truth.write_text("dataset,model,accuracy\ndtd,resnet34,70\n")
    assert paper.main(["--data", str(tmp_path), "--truth", str(truth)]) == 1
    text = capsys.readouterr().out
    models = [f"{group.name}/{x.name}" for group in paper.groups() for x in group.models]
    for name in [*models, *(data.name for data in paper.datasets())]:
        assert f"skipped {name}: " in text
    with pytest.raises(SystemExit):
        paper.main(["--truth", str(tmp_path / "none.csv")])
    assert "--truth: a CSV with columns dataset, model, accuracy" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_path_offline(paper, capsys, tmp_path, make_checkpoint):
    write_datasets(tmp_path)
    hub = tmp_path / "torch/hub/checkpoints"
    torch.save(mobilenet_v2().state_dict(), hub / "mobilenet_v2-b0353104.pth")
    for name, architecture in (("resnet34", "test_resnet"), ("googlenet", "test_convnext")):
        make_checkpoint(tmp_path / "models" / name, architecture)
    damaged = make_checkpoint(tmp_path / "models/resnet50", "test_resnet")
    (damaged / "model.safetensors").write_bytes(b"damaged")
    truth = {"resnet34": 70, "googlenet": 60, "mobilenet_v2": 65, "resnet50": 71}
    (tmp_path / "sfda_group1_cnn.json").write_text(json.dumps({"dtd": truth, "voc2007": truth}))
    arguments = ["--groups", "cnn", "--data", str(tmp_path), "--truth", str(tmp_path)]
    arguments += ["--checkpoints", str(tmp_path / "models"), "--datasets", "dtd"]
    assert paper.main([*arguments, "voc2007"]) == 0
    text = capsys.readouterr().out
    assert "cnn, dtd: 3 models, 24 images" in text  # train and val
    assert "cnn, voc2007: 3 models, 12 images" in text
    assert "failed cnn/resnet50 on dtd: " in text
    assert re.search(r"dtd \(3\) .* 0\.597 +0\.777 +0\.647 ", text)  # published
    assert paper.main([*arguments, "--all-splits"]) == 0
    assert "cnn, dtd: 3 models, 36 images" in capsys.readouterr().out
    # Of person and dog the first in the alphabet; an aeroplane that is difficult does not count.
    files = [tmp_path / f"VOCdevkit/VOC2007/Annotations/{k}.xml" for k in (0, 1)]
    assert [paper.voc_label(file) for file in files] == ["dog", "cat"]


@pytest.mark.slow
def test_a_self_supervised_checkpoint_is_unwrapped(paper, tmp_path):
    file = tmp_path / "torch/hub/checkpoints/moco.pth.tar"
    whole, x = resnet50().eval(), torch.rand(1, 3, 64, 64)
    state = {f"module.encoder_q.{key}": value for key, value in whole.state_dict().items()}
    torch.save({"epoch": 200, "state_dict": {**state, "module.queue": x}}, file)
    module, transform = paper.load("url", "https://nowhere.invalid/moco.pth.tar")
    file.unlink()  # 100 MB
    assert torch.equal(whole.fc(module.eval()(x)), whole(x))
    assert transform(Image.new("RGB", (300, 260))).shape == (3, 224, 224)
