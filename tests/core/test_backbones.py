import hashlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from sfda_tune import Backbone
from sfda_tune.backbones import demo, loading, plugins
from sfda_tune.backbones.fingerprints import fingerprint
from sfda_tune.backbones.loading import describe, load
from sfda_tune.backbones.plugins import BackboneError
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.data.hub import forget_reachable
from sfda_tune.metrics.priors import look_up_facts


def specs(*given, **kwargs):
    return {b.name: b.spec for b in resolve_backbones(list(given), **kwargs)}


def test_timm_names_and_globs():
    assert specs("resnet50.a1_in1k") == {"resnet50.a1_in1k": "resnet50.a1_in1k"}
    assert specs("resnet18") == {"resnet18": "resnet18"}
    found = specs("convnext_*.fb_in22k*")
    assert len(found) > 5
    assert set(found) <= set(timm.list_models(pretrained=True))
    assert all(".fb_in22k" in name for name in found)


def test_each_backbone_once():
    assert list(specs("resnet18", "resnet18", "demo:*noise*", "demo:*noise*")) == [
        "resnet18",
        "demo:resnet_noise",
    ]


def test_the_same_weights_once_however_they_are_spelt():
    names = ["resnet18.a1_in1k", "resnet18", "hf-hub:timm/resnet18.a1_in1k"]
    for k, first in enumerate(names):
        with pytest.warns(UserWarning, match=f"is {first!r} again") as said:
            assert list(specs(first, *names[:k], *names[k + 1 :])) == [first]
        assert len(said) == 2
    others = ["resnet18", "resnet18.fb_swsl_ig1b_ft_in1k", "hf-hub:timm/resnet18", "hf-hub:me/net"]
    assert list(specs(*others)) == others


def test_hub_names_are_not_looked_up():
    assert specs("hf-hub:me/mine@v2") == {"hf-hub:me/mine@v2": "hf-hub:me/mine@v2"}


def test_folders(toy_zoo, tmp_path, monkeypatch):
    one = specs(f"local-dir:{toy_zoo / 'resnet'}")
    assert one == {"resnet": f"local-dir:{toy_zoo / 'resnet'}"}
    assert specs(toy_zoo / "resnet") == one
    assert list(specs(str(toy_zoo))) == ["convnext", "efficientnet", "resnet", "vit"]
    assert list(specs(f"{toy_zoo}/*net")) == ["efficientnet", "resnet"]
    monkeypatch.chdir(toy_zoo)
    assert specs("vit") == specs(toy_zoo / "vit")
    assert specs("./vit") == specs(toy_zoo / "vit")


def test_folders_of_one_name_are_told_apart(toy_zoo, tmp_path):
    shutil.copytree(toy_zoo / "vit", tmp_path / "vit")
    assert list(specs(toy_zoo / "vit", tmp_path / "vit")) == [
        f"local-dir:{toy_zoo / 'vit'}",
        f"local-dir:{tmp_path / 'vit'}",
    ]


def test_demo():
    assert list(specs("demo:*")) == [f"demo:{name}" for name in demo.names()]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet5O", r"no model 'resnet5O'.*did you mean resnet5"),
        ("resnet50.nonsense", r"no such pretrained tag; timm has .*resnet50\.a1_in1k"),
        ("zzz*", "no model 'zzz\\*'"),
        ("test_byobnet_*", "no model"),
        ("demo:nothing", r"'demo:nothing' matches none of \['demo:"),
        ("hf-hub:nothing", "must look like 'hf-hub:owner/name'"),
        ("hf-hub:toy/", "must look like 'hf-hub:owner/name'"),
        ("HF-HUB:me/mine", r"config\.json, or hf-hub:me/mine for one"),
        ("./mine", r"'\./mine' names no folder; pass a folder that holds a config\.json$"),
        ("local-dir:me/mine", r"holds a config\.json$"),
        ("local-dir:/no/such/place", "names no folder"),
        ("./no/such/place", "names no folder"),
        (3, "no str, Backbone or mapping"),
        (None, "no str, Backbone or mapping"),
        ("demo", r"must be 'demo:\*'"),
        ("RESNET18", "did you mean resnet18"),
        ("timm/resnet18.a1_in1k", r"or hf-hub:timm/resnet18\.a1_in1k"),
        ({"mine": 3}, "'mine' must be a torch.nn.Module"),
        ({"mine": torch.nn.Linear(1, 1)}, r"'mine' is no timm model.*pass \(module, transform\)"),
    ],
)
def test_refused(spec, message):
    with pytest.raises(BackboneError, match=message):
        resolve_backbones([spec])


def test_all_bad_specs_are_named_at_once():
    with pytest.raises(BackboneError, match=r"resnet5O.*; .*hf-hub:nothing.*; .*hf-hub:a/b/c"):
        resolve_backbones(["resnet5O", "resnet18", "hf-hub:nothing", "hf-hub:a/b/c"])


def test_a_link_to_nothing_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dang").symlink_to("gone")
    for spec in ("./dang", "local-dir:dang"):
        with pytest.raises(BackboneError, match="is a link to nothing; pass the folder"):
            resolve_backbones(spec)


def test_weights_without_a_config_are_named(toy_zoo, tmp_path):
    shutil.copytree(toy_zoo / "vit", tmp_path / "vit")
    shutil.copytree(toy_zoo / "resnet", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.warns(UserWarning, match=r"without a config\.json beside the weights: bare"):
        assert list(specs(tmp_path)) == ["vit"]


@pytest.mark.parametrize("config", ["[]", "{", "{}"])
def test_a_broken_config_names_the_folder(toy_zoo, tmp_path, config):
    shutil.copytree(toy_zoo / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "config.json").write_text(config)
    with pytest.raises(BackboneError, match=f"check {tmp_path / 'vit'}"):
        describe(resolve_backbones(tmp_path / "vit")[0])


def test_a_plugin_may_be_called_like_a_library(tmp_path):
    import json

    (tmp_path / "json.py").write_text("x = 1")
    assert plugins.load_plugin(tmp_path / "json.py").x == 1
    assert sys.modules["json"] is json


def test_nothing_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="`backbones` is empty"):
        resolve_backbones([])
    with pytest.raises(BackboneError, match="holds no timm checkpoint"):
        resolve_backbones(str(tmp_path))


@pytest.mark.parametrize("name", ["resnet", "convnext", "efficientnet", "vit"])
def test_loading_and_preprocessing_are_those_of_timm(toy_zoo, photos, name):
    path = f"local-dir:{toy_zoo / name}"
    module, preprocessing = load(Backbone(name, path))
    plain = timm.create_model(path, pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(plain))
    half = preprocessing.build()
    for file in sorted(photos.glob("*/*.jpg"))[:6]:
        image = Image.open(file).convert("RGB")
        expected = transform(image)
        pixels = half(image)
        assert pixels.dtype == torch.uint8
        ours = preprocessing.normalize(pixels[None])
        assert torch.equal(ours[0], expected)  # to the last bit
        with torch.inference_mode():
            torch.testing.assert_close(module(ours), plain(ours), rtol=0, atol=0)
    assert not module.training


def test_description_needs_no_weights(toy_zoo, tmp_path):
    shutil.copytree(toy_zoo / "vit", tmp_path / "vit")
    (tmp_path / "vit" / "model.safetensors").unlink()
    bare = resolve_backbones(tmp_path / "vit")[0]
    d = describe(bare)
    whole = load(resolve_backbones(toy_zoo / "vit")[0])[0]
    assert d.n_params == sum(p.numel() for p in whole.parameters())
    assert d.n_dims == 64
    assert d.preprocessing.input_size == (3, 32, 32)
    with pytest.raises(BackboneError, match="No suitable checkpoints found"):
        load(bare)


def test_a_checkpoint_that_does_not_fit_is_an_error_not_a_random_network(toy_zoo, tmp_path):
    shutil.copytree(toy_zoo / "resnet", tmp_path / "wrong")
    shutil.copy(toy_zoo / "convnext" / "model.safetensors", tmp_path / "wrong")
    with pytest.raises(BackboneError, match="Missing key"):
        load(resolve_backbones(tmp_path / "wrong")[0])


def test_pickles_are_not_run(tmp_path, toy_zoo):
    """A checkpoint that would run code when it is unpickled is refused."""
    folder = tmp_path / "evil"
    shutil.copytree(toy_zoo / "resnet", folder)
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "it ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({"state_dict": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BackboneError):
        load(resolve_backbones(folder)[0])
    assert not marker.exists()


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("tf_efficientnet_b0_ns", "tf_efficientnet_b0.ns_jft_in1k"),
        ("convnext_tiny_in22k", "convnext_tiny.fb_in22k"),
        ("xception", "legacy_xception"),
    ],
)
def test_a_former_name_of_timm_is_the_present_one(before, now):
    with pytest.warns(UserWarning, match=f"timm calls '{before}' '{now}' now"):
        (backbone,) = resolve_backbones(before)
    assert (backbone.name, backbone.spec) == (now, now)
    before, now = look_up_facts([before, now]).values()
    assert before == now
    assert before.top1 > 75


def test_unknown_architecture_says_how_to_register_it(toy_zoo, tmp_path):
    shutil.copytree(toy_zoo / "resnet", tmp_path / "x")
    config = (tmp_path / "x" / "config.json").read_text()
    (tmp_path / "x" / "config.json").write_text(config.replace("test_resnet", "nobody_knows_it"))
    with pytest.raises(BackboneError, match=r"nobody_knows_it.*--import FILE"):
        describe(resolve_backbones(tmp_path / "x")[0])


PLUGIN = """
import beside_it
import timm.models.resnet as r
from timm.models import register_model

runs = globals().get("runs", 0) + 1

@register_model
def {name}(pretrained=False, **kwargs):
    return r.test_resnet(pretrained=pretrained, **kwargs)
"""


def test_plugin_registers_architectures_and_runs_once(toy_zoo, tmp_path):
    (tmp_path / "beside_it.py").write_text("")
    plugin = tmp_path / "my plugin.py"
    plugin.write_text(PLUGIN.format(name="plugged_in"))
    checkpoint = shutil.copytree(toy_zoo / "resnet", tmp_path / "x")
    config = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(config.replace("test_resnet", "plugged_in"))
    (backbone,) = resolve_backbones(checkpoint, plugins=[str(plugin)])
    assert backbone.plugins == (str(plugin),)
    assert load(backbone)[0](torch.zeros(1, 3, 32, 32)).shape == (1, 96)
    module = plugins.load_plugin(plugin)
    assert plugins.load_plugin(str(plugin)) is module
    assert module.runs == 1
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "FileNotFoundError"),
        ("1/0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_bad_plugins(tmp_path, text, message):
    plugin = tmp_path / "bad_plugin.py"
    if text is not None:
        plugin.write_text(text)
    with pytest.raises(BackboneError, match=f"could not be imported.*{message}"):
        plugins.load_plugin(plugin)
    assert not [name for name in sys.modules if "bad_plugin" in name]
    with pytest.raises(BackboneError, match="no_such_module_at_all"):
        plugins.load_plugin("no_such_module_at_all")


@pytest.mark.parametrize("name", ["gemma4_vit_167m_enc", "qwen3_vit_88m_enc"])
def test_a_language_model_s_encoder_is_refused(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with pytest.raises(BackboneError, match=r"tokens, for a language model .*without `_enc`"):
        describe(*resolve_backbones(name))


def test_modules_of_ones_own(toy_zoo):
    mine = timm.create_model(f"local-dir:{toy_zoo / 'resnet'}", pretrained=True).train()
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    a, b = resolve_backbones(
        {"timm": mine, "linear": (linear, lambda image: torch.zeros(3, 2, 2))}
    )
    module, preprocessing = load(a)
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 96)  # the classifier is off
    assert preprocessing.input_size == (3, 32, 32)
    assert mine.training  # the caller's is not touched
    assert mine(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    module, preprocessing = load(b)
    assert preprocessing.input_size is None
    assert module(torch.zeros(2, 3, 2, 2)).shape == (2, 5)


def test_fingerprint_depends_on_weights_config_and_plugin_only(toy_zoo, tmp_path, make_checkpoint):
    original = resolve_backbones(toy_zoo / "resnet")[0]
    first = fingerprint(original)
    assert first == fingerprint(original, load(original)[0])
    moved = shutil.copytree(toy_zoo / "resnet", tmp_path / "moved")
    assert fingerprint(resolve_backbones(moved)[0]) == first  # not on the place
    make_checkpoint(tmp_path / "other", "test_resnet", 32, seed=1)
    assert fingerprint(resolve_backbones(tmp_path / "other")[0]) != first
    make_checkpoint(tmp_path / "config", "test_resnet", 40)
    assert fingerprint(resolve_backbones(tmp_path / "config")[0]) != first
    plugin = tmp_path / "plugin_for_print.py"
    plugin.write_text("")
    assert fingerprint(Backbone("a", original.spec, plugins=(str(plugin),))) != first


IMPOSSIBLE = {
    "crop": ("pretrained_cfg", {"crop_pct": 1e-9}, "crop_pct 1e-09 makes 32 pixels impossible"),
    "empty": ("pretrained_cfg", {"input_size": [3, 0, 0]}, r"integers in 1 … 4096.*\[3, 0, 0\]"),
    "huge": ("pretrained_cfg", {"input_size": [3, 10**5, 10**5]}, "integers in 1 … 4096"),
    "words": ("pretrained_cfg", {"mean": "grey"}, "preprocessing cannot be used"),
    "flat": ("pretrained_cfg", {"std": [0, 0, 0]}, r"std \(0.0, 0.0, 0.0\) is none of 3 channels"),
    "unknown": ("pretrained_cfg", {"interpolation": "guess"}, "preprocessing cannot be used"),
    "wide": ("model_args", {"channels": [10**7] * 4}, "asks for a larger network"),
    "deep": ("model_args", {"layers": [10**8] * 4}, "asks for a larger network"),
    "no object": ("pretrained_cfg", 3, "`pretrained_cfg` must be an object but is 3"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_configuration_fails_alone(toy_zoo, tmp_path, case, monkeypatch):
    field, change, message = IMPOSSIBLE[case]
    monkeypatch.setattr(loading, "CALLS", 5_000)
    folder = shutil.copytree(toy_zoo / "resnet", tmp_path / case)
    config = json.loads((folder / "config.json").read_text())
    config[field] = {**config.get(field, {}), **change} if isinstance(change, dict) else change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        describe(resolve_backbones(folder)[0])


def test_a_checkpoint_of_transformers_is_called_so(toy_zoo, tmp_path):
    folder = shutil.copytree(toy_zoo / "resnet", tmp_path / "hf")
    (folder / "config.json").write_text('{"architectures": ["ViTModel"], "model_type": "vit"}')
    (backbone,) = resolve_backbones(folder)
    for opens in (describe, load, fingerprint):
        with pytest.raises(BackboneError, match=r"of a transformers checkpoint \(vit\)"):
            opens(backbone)


ARCHITECTURE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, num_classes=4, **kwargs):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 16, 3), torch.nn.Linear(16, num_classes)

    def reset_classifier(self, n, *args):
        self.fc = torch.nn.Linear(16, n) if n else torch.nn.Identity()

    def forward(self, x):
        return self.fc(torch.{function}(self.conv(x)).mean((2, 3)))
"""
REGISTER = """
import timm.models, {beside}

def {beside}_net(pretrained=False, **kwargs):
    return timm.models.build_model_with_cfg({beside}.Net, "{beside}_net", pretrained, **kwargs)

{beside}_net.__module__ = __name__
timm.models.register_model({beside}_net)
"""


@pytest.mark.parametrize("by_name", [False, True])
def test_fingerprint_depends_on_what_a_plugin_imports(tmp_path, monkeypatch, by_name):
    beside = f"beside_{by_name}".lower()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{beside}.py").write_text(ARCHITECTURE.format(function="relu"))
    (tmp_path / f"plugin_{beside}.py").write_text(REGISTER.format(beside=beside))
    plugin = f"plugin_{beside}" if by_name else str(tmp_path / f"plugin_{beside}.py")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    cfg = {"input_size": [3, 8, 8], "classifier": "fc", "first_conv": "conv", "num_classes": 4}
    config = {"architecture": f"{beside}_net", "num_classes": 4, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    plugins.load_plugin(plugin)
    net = sys.modules[beside].Net
    save_file(net().state_dict(), folder / "model.safetensors")
    (backbone,) = resolve_backbones(folder, plugins=[plugin])
    first = fingerprint(backbone)
    assert fingerprint(backbone) == first
    monkeypatch.setattr(net, "forward", lambda self, x: self.conv(x).mean((2, 3)))
    second = fingerprint(backbone)
    (tmp_path / f"{beside}.py").write_text(ARCHITECTURE.format(function="tanh") + "\n")
    third = fingerprint(backbone)
    monkeypatch.setattr(timm, "__version__", "99.0")
    assert len({first, second, third, fingerprint(backbone)}) == 4


def test_a_cached_backbone_of_timm_is_not_built(toy_zoo, monkeypatch):
    (backbone,) = resolve_backbones(toy_zoo / "resnet")
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: pytest.fail("it was built"))
    assert fingerprint(backbone) is not None


def test_fingerprint_of_what_no_structure_tells(tmp_path):
    """A network that reads a file when it runs is known by what it makes of two images."""

    class Reads(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) ** float((tmp_path / "power").read_text())

    (backbone,) = resolve_backbones({"m": (Reads(), lambda image: torch.ones(3, 4, 4))})
    found = []
    for power in ("1", "2", "2"):
        (tmp_path / "power").write_text(power)
        found.append(fingerprint(backbone))
    assert found[0] != found[1] == found[2]


def test_fingerprint_of_modules():
    def wrap(module):
        return fingerprint(resolve_backbones({"m": (module, _to_tensor)})[0])

    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    same = pickle.loads(pickle.dumps(module))
    assert wrap(module) == wrap(same)
    with torch.no_grad():
        same.bias[0] += 1
    assert wrap(module) != wrap(same)


def _to_tensor(image):
    return torch.from_numpy(np.asarray(image, np.float32))


def hub_cache(root: Path, repo: str, file: Path) -> None:
    """Lay a file into a Hugging Face cache as a download would have."""
    folder = root / f"models--{repo.replace('/', '--')}"
    commit = "0" * 40
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    shutil.copy(file, folder / "blobs" / digest)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit / file.name).symlink_to(folder / "blobs" / digest)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that cannot be reached, with an empty local cache."""
    from huggingface_hub import constants

    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    forget_reachable()
    yield root
    forget_reachable()


def test_weights_in_the_hub_cache_need_no_network(hub, tmp_path, make_checkpoint):
    torch.manual_seed(3)
    whole = timm.create_model("test_resnet.r160_in1k", pretrained=False)
    file = make_checkpoint(tmp_path / "x", "test_resnet", num_classes=1000) / "model.safetensors"
    (backbone,) = resolve_backbones("test_resnet.r160_in1k")
    assert fingerprint(backbone) is None
    with pytest.raises(
        BackboneError, match="not in the local cache and the hub cannot be reached"
    ):
        load(backbone)
    hub_cache(hub, whole.pretrained_cfg["hf_hub_id"], file)
    module, preprocessing = load(backbone)
    from safetensors.torch import load_file

    weights = load_file(file)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert preprocessing.input_size == (3, 160, 160)
    assert fingerprint(backbone) == fingerprint(backbone, module) is not None


def test_hf_hub_spec_from_the_cache(hub, toy_zoo):
    for file in ("config.json", "model.safetensors"):
        hub_cache(hub, "me/mine", toy_zoo / "vit" / file)
    (backbone,) = resolve_backbones("hf-hub:me/mine")
    assert describe(backbone).n_dims == 64
    assert load(backbone)[0](torch.zeros(1, 3, 32, 32)).shape == (1, 64)
    assert fingerprint(backbone) is not None
    with pytest.raises(BackboneError, match="the hub cannot be reached"):
        describe(resolve_backbones("hf-hub:me/other")[0])


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_is_refused_is_not_advised_to_be_opened(make_checkpoint, tmp_path, old):
    folder = make_checkpoint(tmp_path / "x", "test_resnet")
    (folder / "model.safetensors").unlink()
    content = {"weight": torch.ones(2), "more": Path("x")}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    with pytest.raises(BackboneError, match=r"save them as model\.safetensors; check ") as caught:
        load(resolve_backbones(str(folder))[0])
    assert "weights_only" not in str(caught.value)


FAMILIES = [
    "resnet10t", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "convnext_atto",
    "mobilenetv3_small_050", "mobilenetv4_conv_small", "efficientnet_b0", "vgg11", "levit_128s",
    "densenet121", "swin_tiny_patch4_window7_224", "ghostnet_050", "mixer_s32_224", "regnetx_002",
    "repvgg_a0", "edgenext_xx_small", "inception_v3", "hrnet_w18_small", "eva02_tiny_patch14_224",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_taking_the_classifier_off_is_num_classes_0(name):
    """`_create` opens a checkpoint with its classifier, so that timm checks it, and removes it."""
    torch.manual_seed(0)
    whole = timm.create_model(name, pretrained=False).eval()
    plain = timm.create_model(name, pretrained=False, num_classes=0).eval()
    missing, _ = plain.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    whole.reset_classifier(0)
    x = torch.randn(1, *whole.pretrained_cfg["input_size"])
    with torch.inference_mode():
        torch.testing.assert_close(whole(x), plain(x), rtol=0, atol=0)


def test_what_stands_in_the_place_of_a_file_is_named(tmp_path, make_checkpoint):
    def put(path, kind):
        path.unlink(missing_ok=True)
        path.mkdir() if kind == "folder" else os.mkfifo(path)
        return path

    for kind in ("folder", "FIFO"):
        folder = make_checkpoint(tmp_path / kind, "test_resnet", 32)
        (weights,) = folder.glob("model.*")
        put(weights, kind)
        with pytest.raises(BackboneError, match=rf"model\.safetensors is a {kind};"):
            load(resolve_backbones([str(folder)])[0])
        put(folder / "config.json", kind)
        with pytest.raises(BackboneError, match=rf"config\.json' must be a file but is a {kind}"):
            resolve_backbones([str(folder)])
        plugin = put(tmp_path / f"{kind}.py", kind)
        with pytest.raises(BackboneError, match=rf"{kind}\.py' is a {kind}\)"):
            resolve_backbones(["demo:*"], plugins=[str(plugin)])
    with pytest.raises(BackboneError, match=r"is a FIFO; pass the folder that holds config\.json"):
        resolve_backbones([str(put(tmp_path / "w.safetensors", "FIFO"))])


def test_presets_are_a_dozen_pretrained_networks_of_timm():
    import timm

    known = set(timm.list_pretrained())
    for name in ("fast", "small", "medium", "large", "medical"):
        found = [b.spec for b in resolve_backbones(f"preset:{name}")]
        assert len(found) == 12
        assert set(found) <= known
    with pytest.raises(BackboneError, match=r"none of the presets: preset:fast, below 1 GMAC"):
        resolve_backbones("preset:huge")
