"""What only a CUDA device can show; `tests/benchmarks/gpu.py` runs it where there is one."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfda_tune import open_dataset
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.extraction import plan, settings, worker
from sfda_tune.extraction import run as extraction
from sfda_tune.extraction.run import extract
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import FeatureStore
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.run import finetune
from sfda_tune.metrics import scoring
from sfda_tune.metrics.scoring import Scorer, score
from sfda_tune.values.features import Features

pytestmark = pytest.mark.gpu

CUDA = Settings(device="cuda", workers=0)
DIFFERENCES = {"float32": 1e-5, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}  # of the largest


def run(dataset, backbones, settings=CUDA, **kwargs):
    results = {e.backbone.name: e for e in extract(dataset, backbones, settings, **kwargs)}
    assert {name: e.error for name, e in results.items() if e.error} == {}
    return {name: e.features.x for name, e in results.items()}


@pytest.fixture(scope="module")
def zoo(toy_zoo):
    return resolve_backbones(toy_zoo)


@pytest.fixture(scope="module")
def dataset(photos):
    return open_dataset(photos)


@pytest.fixture(scope="module")
def on_cpu(dataset, zoo):
    return run(dataset, zoo, Settings(device="cpu", workers=0))


@pytest.mark.parametrize("precision", settings.PRECISIONS)
def test_precisions(dataset, zoo, on_cpu, precision):
    before = torch.backends.cudnn.conv.fp32_precision
    found = run(dataset, zoo, replace(CUDA, precision=precision))
    assert torch.backends.cudnn.conv.fp32_precision == before
    for name, x in on_cpu.items():
        assert np.abs(found[name] - x).max() <= DIFFERENCES[precision] * np.abs(x).max()
        assert found[name].dtype == np.float32


SWITCHES = {"LANES": extraction, "PIN": worker, "SIDE_STREAM": worker, "WARM_UP": worker}
assert all(hasattr(module, name) for name, module in SWITCHES.items())  # seen without a GPU, too


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_fast_changes_nothing(dataset, zoo, switch, monkeypatch):
    """Each alone, and in shards so small that several are under way."""
    monkeypatch.setattr(plan, "SHARD", 8)
    settings = replace(CUDA, batch_size=3)
    expected = run(dataset, zoo, settings)
    monkeypatch.setattr(SWITCHES[switch], switch, 1 if switch == "LANES" else False)
    for name, x in run(dataset, zoo, settings).items():
        assert np.array_equal(x, expected[name])


def test_what_is_kept_is_what_was_computed(dataset, zoo, tmp_path):
    store = FeatureStore(tmp_path)
    expected = run(dataset, zoo, store=store)
    again = list(extract(dataset, zoo, CUDA, store=store))
    assert all(e.cached and e.peak_memory > 0 and e.images_per_second > 0 for e in again)
    for e in again:
        assert np.array_equal(e.features.x, expected[e.backbone.name])


def test_a_device_by_its_index(dataset, zoo, on_cpu):
    last = f"cuda:{torch.cuda.device_count() - 1}"
    for name, x in run(dataset, zoo[:2], replace(CUDA, device=last)).items():
        assert np.abs(x - on_cpu[name]).max() <= 1e-5 * np.abs(on_cpu[name]).max()
    with pytest.raises(ValueError, match="`device` must be"):
        run(dataset, zoo[:1], replace(CUDA, device=f"cuda:{torch.cuda.device_count()}"))


class Hungry(torch.nn.Module):
    """Takes 64 MB for each image."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 8)

    def forward(self, x):
        taken = torch.ones((len(x), 1 << 24), device=x.device)
        return self.head(x.mean((2, 3)) * taken[:, :1])


@pytest.fixture
def little_memory():
    """1 GB of the card's memory, as the driver counts it."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_batch_that_does_not_fit_is_halved(dataset, little_memory):
    def transform(image):
        return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255

    backbones = resolve_backbones({"hungry": (Hungry(), transform)})
    (whole,) = extract(dataset, backbones, replace(CUDA, batch_size=32))
    assert whole.error is None
    assert whole.peak_batch < 32
    (small,) = extract(dataset, backbones, replace(CUDA, batch_size=2))
    assert np.allclose(whole.features.x, small.features.x, rtol=1e-5)


SCRIPT = """
import sys
import torch
from sfda_tune import Backbone, rank

class Broken(torch.nn.Module):
    def forward(self, x):
        far = torch.full((1,), 10**6, device=x.device)
        return x.mean((2, 3)) + torch.zeros(3, device=x.device)[far]

def to_pixels(image):
    return torch.zeros(3, 8, 8)

def make_broken():
    return Broken(), to_pixels

if __name__ == "__main__":
    photos, zoo, device = sys.argv[1:]
    broken = Backbone("broken", load=make_broken)
    names = [f"{zoo}/convnext", broken, f"{zoo}/resnet", f"{zoo}/vit"]
    ranking = rank(photos, names, device=device, cache=False, workers=0)
    for score in ranking.scores:
        print(score.backbone, score.error or score.n_samples)
"""


def test_a_network_that_breaks_the_context_fails_alone(photos, toy_zoo, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(photos), str(toy_zoo), "cuda"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert [lines[name] for name in ("convnext", "resnet", "vit")] == ["36"] * 3
    assert "CUDA error" in lines["broken"]


def test_scores_on_the_device_are_those_of_the_cpu():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 2000)
    features = Features(rng.normal(size=(2000, 1024)).astype(np.float32) + y[:, None] % 3, y)
    for variant in ("loo", "official", "paper"):
        here = score(features, variant=variant)
        there = Scorer("sfda", variant).score(features, "cuda")
        fast = scoring.has_fast_float64("cuda")
        assert there.details["device"].startswith("cuda" if fast else "cpu")
        assert there.value == pytest.approx(here.value, abs=1e-9)
        assert np.abs(there.per_sample - here.per_sample).max() <= 1e-6


CONFIG = FinetuneConfig(epochs=2, batch_size=8, lr=1e-3)


@pytest.mark.parametrize("precision", settings.PRECISIONS)
def test_fine_tuning(dataset, zoo, precision, tmp_path):
    config = replace(CONFIG, precision=precision)
    (*_, last) = finetune(zoo[0], dataset, config, device="cuda", workers=0)
    first = finetune(zoo[0], dataset, config, device="cuda", workers=0, checkpoint_dir=tmp_path)
    assert next(first).number == 0
    assert next(first).number == 1
    first.close()
    resumed = finetune(zoo[0], dataset, config, device="cuda", workers=0, checkpoint_dir=tmp_path)
    (again,) = resumed
    assert again.number == last.number == 2
    assert again.train_loss == pytest.approx(last.train_loss, rel=0.05)


def test_a_training_batch_that_does_not_fit_is_halved(dataset, little_memory):
    def transform(image):
        return torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255

    (backbone,) = resolve_backbones({"hungry": (Hungry(), transform)})
    tuning = finetune(backbone, dataset, replace(CONFIG, batch_size=28), device="cuda", workers=0)
    assert [epoch.number for epoch in tuning] == [0, 1, 2]
    assert tuning._micro < 28
