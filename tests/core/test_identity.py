import copy
import dataclasses
import enum
import functools
import os
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms as tv
from timm.models import save_for_hf
from torch import nn

from sfda_tune.backbones import identity
from sfda_tune.backbones.identity import files_behind, identify


class Net(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class Kind(enum.Enum):
    A = 1
    B = 2


@dataclasses.dataclass
class Options:
    power: int = 1


class Inner(nn.Module):
    power = 1

    def forward(self, x):
        return x**self.power


def with_forward(function):
    net = Net()
    net.forward = types.MethodType(function, net)
    return net


def raised(n):
    return lambda self, x: self.conv(x) ** n


def with_hook(factor):
    net = Net()
    net.conv.register_forward_hook(lambda module, inputs, output: output * factor)
    return net


def limited(n):
    def transform(image):
        return tv.functional.to_tensor(image if image.width < n else image.rotate(90))

    return transform


def resized(size):
    return tv.Compose(
        [tv.Resize(size), tv.CenterCrop(16), tv.ToTensor(), tv.Lambda(lambda x: x * 2)]
    )


MAKERS = {
    "attribute": lambda n: Net(power=float(n)),
    "nested attribute": lambda n: Net(options={"a": [1, (2, n)]}),
    "array": lambda n: Net(scale=np.full(3, n)),
    "tensor in a list": lambda n: Net(scales=[torch.full((2,), n)]),
    "object": lambda n: Net(options=Options(n)),
    "enumeration": lambda n: Net(kind=Kind(n)),
    "set": lambda n: Net(names=frozenset({"a", "b", str(n)})),
    "partial": lambda n: functools.partial(raised, n),
    "closure": lambda n: with_forward(raised(n)),
    "hook": with_hook,
    "transform": resized,
    "transform that looks alike on small images": lambda n: limited(1000 * n),
    "activation": lambda n: nn.Sequential([nn.ReLU(), nn.Tanh()][n - 1]),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_computes_something_else_is_something_else(make):
    one = identify(make(1))
    assert identify(make(1)) == one
    assert identify(copy.deepcopy(make(1))) == one
    assert identify(make(2)) != one


def test_what_was_changed_since_is_something_else(monkeypatch):
    before = identify(nn.Sequential(Inner()))
    monkeypatch.setattr(Inner, "power", 2)
    changed = identify(nn.Sequential(Inner()))
    monkeypatch.setattr(Inner, "forward", lambda self, x: x)
    assert len({before, changed, identify(nn.Sequential(Inner()))}) == 3
    before = identify(nn.ReLU())
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x)  # in the library itself
    assert identify(nn.ReLU()) != before


FACTOR = 2


def test_globals_and_helpers_count(monkeypatch, tmp_path):
    net = with_forward(lambda self, x: self.conv(x) * FACTOR)
    before = identify(net)
    monkeypatch.setitem(globals(), "FACTOR", 3)
    assert identify(net) != before
    (tmp_path / "helper_of_identity.py").write_text("def act(x):\n    return x * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    import helper_of_identity  # type: ignore[import-not-found]

    net = with_forward(lambda self, x: helper_of_identity.act(self.conv(x)))
    before = identify(net)
    monkeypatch.setattr(helper_of_identity, "act", lambda x: x * 3)
    assert identify(net) != before


def test_what_is_imported_in_a_function_counts_before_it_is_loaded(monkeypatch, tmp_path):
    def late(self, x):
        from lazy_of_identity import act  # type: ignore[import-not-found]

        return act(self.conv(x))

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lazy_of_identity.py").write_text("def act(x):\n    return x\n")
    before = identify(with_forward(late))
    assert identify(with_forward(late)) == before
    (tmp_path / "lazy_of_identity.py").write_text("def act(x):\n    return -x\n")
    assert identify(with_forward(late)) != before
    assert "lazy_of_identity" not in sys.modules


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(3, 3),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU())),
        lambda: timm.create_model("test_vit"),
        lambda: timm.create_model("test_byobnet"),
    ],
)
def test_networks_of_all_kinds_are_found_again(make):
    def made(seed):
        torch.manual_seed(seed)
        return copy.deepcopy(make())

    assert identify(made(0)) == identify(made(0))
    assert identify(made(0)) != identify(made(1))


def test_other_processes_find_the_same():
    script = (
        "from sfda_tune.backbones.identity import identify; "
        "import torch, timm, importlib.util as u; "
        f"s = u.spec_from_file_location('another_name', {__file__!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); torch.manual_seed(0); "
        "print(*[identify(make(1)) for make in m.MAKERS.values()], identify(timm.create_model("
        "'test_vit')))"
    )
    torch.manual_seed(0)
    here = [identify(make(1)) for make in MAKERS.values()]
    here.append(identify(timm.create_model("test_vit")))
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert found.stdout.split() == here


def test_what_cannot_be_compared_is_said_and_never_found_again():
    net = Net(source=(n for n in range(3)))
    with pytest.warns(UserWarning, match=r"features of mine cannot .* builtins\.generator"):
        first = identify(net, "mine")
    with pytest.warns(UserWarning, match="features of Net"):
        assert identify(net) != first


def test_a_plug_in_is_its_text_and_all_that_it_imports(tmp_path, monkeypatch):
    (tmp_path / "parts").mkdir()  # no __init__.py
    (tmp_path / "parts" / "deep.py").write_text("X = 1\n")
    (tmp_path / "middle_of_plugin.py").write_text("def f():\n    from parts.deep import X\n")
    (tmp_path / "unrelated.py").write_text("1/0\n")
    plugin = tmp_path / "a_plugin.py"
    plugin.write_text("import json, torch\nimport middle_of_plugin\n")
    first = files_behind(str(plugin), None)
    (tmp_path / "unrelated.py").write_text("2/0 + 3\n")
    assert files_behind(str(plugin), None) == first
    (tmp_path / "parts" / "deep.py").write_text("X = 22\n")
    second = files_behind(str(plugin), None)
    monkeypatch.setattr(torch, "__version__", "99.0")
    plugin.write_text("import json, torch\nimport middle_of_plugin\n\n")
    third = files_behind(str(plugin), None)
    assert len({first, second, third}) == 3
    monkeypatch.syspath_prepend(tmp_path)
    import a_plugin  # type: ignore[import-not-found]

    by_name = files_behind("a_plugin", a_plugin)
    (tmp_path / "parts" / "deep.py").write_text("X = 333\n")
    assert files_behind("a_plugin", a_plugin) != by_name


@pytest.mark.parametrize("is_recorded", [True, False])
def test_what_was_installed_elsewhere_counts_by_its_version(tmp_path, monkeypatch, is_recorded):
    """As by ``pip install --target``; what is only developed there counts by its text."""
    name = f"elsewhere_{is_recorded}"
    package, information = (tmp_path / "site" / f"{name}{end}" for end in ("", "-1.0.dist-info"))
    package.mkdir(parents=True)
    information.mkdir()
    (package / "__init__.py").write_text("X = 1\n")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    if is_recorded:
        (information / "RECORD").write_text(f"{name}/__init__.py,,\n")
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"import {name}\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    first = files_behind(str(plugin), None)
    (package / "__init__.py").write_text("X = 22\n")
    os.utime(plugin, ns=(1, 1))  # it is looked at again
    assert (files_behind(str(plugin), None) == first) == is_recorded


def test_timm_in_a_checkout_is_its_files_and_not_walked_through(tmp_path):
    """That takes a minute, at every run."""
    where = tmp_path / "checkout" / "timm"
    shutil.copytree(Path(timm.__file__).parent, where)
    save_for_hf(timm.create_model("test_vit"), tmp_path / "vit", safe_serialization=True)
    script = (
        "import sys, timm\n"
        "from sfda_tune import resolve_backbones\n"
        "from sfda_tune.backbones import fingerprints\n"
        "fingerprints.identify = None\n"
        "(backbone,) = resolve_backbones(sys.argv[1])\n"
        "print(timm.__file__)\n"
        "print(fingerprints.fingerprint(backbone))\n"
    )

    def run():
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "vit")],
            capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(where.parent), *sys.path])},
        )  # fmt: skip
        file, found = done.stdout.split()
        assert file.startswith(str(where))
        return found

    first = run()
    with (where / "models" / "vision_transformer.py").open("a") as file:
        file.write("\nX = 1\n")
    assert run() != first


def test_a_library_in_an_archive_is_the_archive(tmp_path, monkeypatch):
    found = []
    for text in ("X = 1", "X = 2"):
        archive = tmp_path / f"{text}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("a_zipped_library/__init__.py", text)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(archive)
            identity._sources.cache_clear()
            found.append(identity._sources("a_zipped_library"))
    identity._sources.cache_clear()
    assert len({"", *found}) == 3
