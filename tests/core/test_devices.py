import contextlib
import importlib
import json
import os
import shutil

import numpy as np
import pytest
import timm
import torch
from timm.models import register_model
from torchvision.transforms.functional import pil_to_tensor

from sfda_tune import open_dataset, rank
from sfda_tune.backbones import devices
from sfda_tune.backbones.initialization import NoRandomWeights
from sfda_tune.backbones.loading import load
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.extraction.settings import Settings
from sfda_tune.finetuning.run import FinetuneConfig, finetune
from sfda_tune.metrics import scoring
from sfda_tune.values.features import Backbone


# Networks without random weights ----------------------------------------------------------------
def test_a_network_with_weights_draws_none(toy_zoo):
    (backbone,) = resolve_backbones(toy_zoo / "vit")
    plain = timm.create_model(f"local-dir:{toy_zoo / 'vit'}", pretrained=True, num_classes=0)
    state = torch.random.get_rng_state()
    module, _ = load(backbone)
    assert torch.equal(torch.random.get_rng_state(), state)
    expected = plain.state_dict()
    assert module.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize(
    "name", ["resnet18", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224"]
)
def test_what_nobody_loads_is_noticed(name):
    with NoRandomWeights() as blank:
        module = timm.create_model(name)
    assert blank.incomplete()
    module.load_state_dict(timm.create_model(name).state_dict())
    assert not blank.incomplete()
    assert not any(p.isnan().any() for p in module.parameters())


def test_a_part_that_nobody_loads_is_noticed():
    with NoRandomWeights() as blank, torch.no_grad():
        weight = torch.nn.Linear(4, 4).weight
        weight[:2] = 1.0
    assert blank.incomplete()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what networks of timm warn of
def test_networks_are_those_of_a_usual_build_to_the_last_bit(make_checkpoint, tmp_path):
    """Any architectures of timm, and all that they compute; no buffer is in a checkpoint alone."""
    n = int(os.environ.get("SFDA_TUNE_ARCHITECTURES", "8"))
    names = np.random.default_rng(n).permutation(timm.list_models()).tolist()
    done = []
    while names and len(done) < n:
        name = names.pop()
        with torch.device("meta"):
            module = timm.create_model(name)
        if sum(p.numel() for p in module.parameters()) > 3e7 or not module.num_classes:
            continue
        config = {k: module.pretrained_cfg[k] for k in ("input_size", "first_conv", "classifier")}
        folder = make_checkpoint(tmp_path / "x", name, num_classes=module.num_classes)
        told = json.loads((folder / "config.json").read_text())
        told["pretrained_cfg"] |= config
        (folder / "config.json").write_text(json.dumps(told))
        x, expected = torch.rand(1, *config["input_size"]), None
        with torch.inference_mode():
            # whose configuration is of another size than itself cannot be opened so
            with contextlib.suppress(AssertionError, RuntimeError):
                usual = timm.create_model(f"local-dir:{folder}", pretrained=True)
                usual.reset_classifier(0)
                expected = usual.eval()(x)
            if expected is not None:
                module, _ = load(*resolve_backbones(folder))
                assert torch.equal(module(x), expected), name
                done.append(name)
        shutil.rmtree(folder)


def test_an_architecture_that_loads_no_weights_is_still_random(caplog):
    caplog.set_level("DEBUG", "sfda_tune")

    @register_model
    def devices_untrained(pretrained=False, **kwargs):
        return timm.create_model("test_resnet", **kwargs)

    module, _ = load(Backbone("devices_untrained"))
    assert all(p.isfinite().all() for p in module.parameters())
    assert next(module.parameters()).std() > 0
    assert "devices_untrained leaves weights at random: it is built as usual" in caplog.text


# Which device, and how ---------------------------------------------------------------------------
def test_precisions_of_a_cpu():
    with devices.compute("cpu", "bfloat16"):
        assert torch.is_autocast_enabled("cpu")
    with devices.compute("cpu", "float32"):
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="`precision` 'tf32' needs a CUDA device but `device` is"):
        devices.check_precision("tf32", "cpu")


def test_products_are_cut_only_meanwhile():
    owners = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [owner.fp32_precision for owner in owners]
    for tf32, value in ((True, "tf32"), (False, "ieee")):
        with devices._multiply(tf32=tf32):
            assert [owner.fp32_precision for owner in owners] == [value] * 3
        assert [owner.fp32_precision for owner in owners] == before


@pytest.mark.parametrize(
    ("capability", "fast"),
    [((9, 0), True), ((8, 0), True), ((10, 0), True), ((8, 6), False), ((8, 9), False),
     ((10, 3), False), ((12, 0), False), ((5, 0), False)],
)  # fmt: skip
def test_scores_go_to_cards_that_compute_float64(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert scoring.scores_faster((5000, 2048), "cuda") == fast
    assert not scoring.scores_faster((500, 256), "cuda")
    assert not scoring.scores_faster((5000, 2048), "cpu")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_mps_is_refused_where_it_is_not():
    with pytest.raises(ValueError, match="`device` must be 'auto' or a device torch can use"):
        devices.resolve_device("mps")


def test_what_mps_needs_is_there():
    """Nothing on the way to an MPS device asks for CUDA."""
    for name in ("backbones.devices", "extraction.run", "finetuning.run", "metrics.scoring"):
        importlib.import_module(f"sfda_tune.{name}")
    assert Settings(device="mps").device == "mps"
    assert devices.is_working("mps")
    assert not scoring.scores_faster((50000, 2048), "mps")
    with devices.compute("mps", "float32"):
        pass
    with pytest.raises(ValueError, match="needs a CUDA device"):
        Settings(device="mps", precision="tf32")


def test_a_network_with_a_3d_convolution_is_ranked_and_trained():
    """As timm's lambda networks have them; `Module.to` refuses those as channels_last."""

    class Lambda(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv3d(1, 4, (1, 3, 3))

        def forward(self, x):
            return self.second(self.first(x)[:, None]).mean((3, 4)).flatten(1)

    def open_lambda():
        torch.manual_seed(0)
        return Lambda(), lambda image: pil_to_tensor(image.resize((16, 16))).float() / 255

    backbone = Backbone("lambda", load=open_lambda)
    images = open_dataset("digits", samples=60)
    ranking = rank(images, backbone, cache=False, device="cpu", workers=0)
    assert not ranking.failed
    images = images.subset(range(50)), images.subset(range(50, 60))
    run = finetune(
        backbone, images[0], FinetuneConfig(epochs=1), val=images[1], device="cpu", workers=0
    )
    assert [epoch.number for epoch in run] == [0, 1]
    plain, laid_out = open_lambda()[0].second, open_lambda()[0]
    assert devices.lay_out(laid_out) == torch.channels_last
    assert laid_out.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid_out.second.weight, plain.weight)


DEPTHWISE = torch.nn.Conv2d(8, 8, 3, groups=8)


@pytest.mark.parametrize(
    ("module", "on_gpu"),
    [
        (DEPTHWISE, torch.contiguous_format),
        (torch.nn.Conv2d(8, 16, (1, 5), groups=8), torch.contiguous_format),
        (torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), DEPTHWISE), torch.contiguous_format),
        (torch.nn.Conv2d(8, 8, 7, groups=8), torch.channels_last),
        (torch.nn.Conv2d(8, 8, 3, groups=4), torch.channels_last),
        (torch.nn.Conv2d(1, 8, 3), torch.channels_last),
        (torch.nn.Linear(3, 3), torch.channels_last),
        (torch.nn.Flatten(), torch.channels_last),
    ],
)
def test_what_a_gpu_would_have_to_compile_is_not_channels_last(module, on_gpu, monkeypatch):
    assert devices.choose_layout(module) == torch.channels_last
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert devices.choose_layout(module) == on_gpu
