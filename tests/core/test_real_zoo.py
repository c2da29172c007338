"""Real weights and real photos, through the public door."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from sfda_tune import Ranking, extract, open_dataset, resolve_backbones
from sfda_tune.extraction.settings import Settings

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
pytestmark = [pytest.mark.zoo, pytest.mark.slow]


def test_the_whole_zoo_is_ranked_through_the_command_line(tmp_path, clean_environment):
    command = [
        sys.executable, "-m", "sfda_tune", "rank", str(ZOO / "datasets" / "trashnet"),
        "--backbones", str(ZOO / "models"),
        "--import", str(ZOO / "zoo_models.py"), "--samples", "48",
        "--device", "cpu", "--out", str(tmp_path / "r.json"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env=clean_environment, check=False
    )
    assert done.returncode == 0, done.stderr
    ranking = Ranking.from_json(tmp_path / "r.json")
    assert sorted(ranking) == sorted(p.name for p in (ZOO / "models").iterdir())
    assert not ranking.failed
    widths = {s.backbone: s.n_dims for s in ranking.scores}
    assert widths["cifar_resnet20.akamaster_cifar10_32"] == 64
    assert widths["mobilenetv2_100.coral_slim_in1k_224"] == 1280
    # Even published SFDA sees that 32-pixel CIFAR networks suit photos less than ImageNet ones.
    values = {"cifar": [], "coral_in1k": []}
    for name, value in ranking.items():
        for kind in values:
            if kind in name:
                values[kind].append(value)
    assert max(values["cifar"]) < min(values["coral_in1k"])


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv1_025.coral_in1k_128",
        "regnetx_002.atu_pycls_in1k_224",
        "tf_mobilenetv3_small_100.atu_tfhub_in1k_224",
        "cifar_resnet20.akamaster_cifar10_32",
    ],
)
def test_features_are_those_of_timm(name):
    photos = open_dataset(ZOO / "datasets" / "clothing", samples=24)
    plugins = [str(ZOO / "zoo_models.py")]
    backbones = resolve_backbones(ZOO / "models" / name, plugins=plugins)
    (found,) = extract(photos, backbones, Settings(device="cpu"))
    plain = timm.create_model(
        f"local-dir:{ZOO / 'models' / name}", pretrained=True, num_classes=0
    ).eval()
    transform = create_transform(**resolve_model_data_config(plain))
    assert callable(transform)
    batch = torch.stack([transform(photos.load(row)) for row in range(24)])  # type: ignore[misc]
    with torch.inference_mode():
        expected = plain(batch).numpy()
    assert found.features is not None
    assert np.abs(found.features.x - expected).max() <= 1e-5 * max(1, np.abs(expected).max())
