"""Shared by all tests: no network, a cache of their own, a toy zoo of timm checkpoints."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "zoo"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # `--import-mode=importlib` does not
USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
for _sign in USUAL:
    if signal.getsignal(_sign) is signal.SIG_IGN:  # by `nohup`, or a shell's &
        signal.signal(_sign, USUAL[_sign])
LOOPBACK = ("hub", "optuna_host", "ray_host")  # folders of tests that need servers on this machine


PRELOADED = [
    "command_lab", "sfda_tune.pipelines.search", "timm.optim", "torch._dynamo",
    "sklearn.datasets", "sqlalchemy.orm", "pandas", "sfda_tune_optuna.engine",
]  # fmt: skip


# Files and folders that take long go first, or one process works at them alone at the end.
LONG = (
    "gpu", "ray_host", "chaos", "test_examples.py", "test_real_zoo.py", "test_selection.py",
    "test_cli.py", "test_extraction.py", "test_finetuning.py", "hub", "optuna_host",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist's order, by the number of tests
        config.option.loadscopereorder = False


def _place(item: pytest.Item) -> int:
    parts = item.path.parts
    return next((k for k, name in enumerate(LONG) if name in parts), len(LONG))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    items.sort(key=_place)

    for item in items:
        if item.get_closest_marker("zoo") and not ZOO.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"no real weights and images at {ZOO}"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny networks gain nothing from more, and on a busy machine threads wait for each other."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for child processes


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails as a machine without one does.

    Databases, Ray, gRPC and the dashboard are reached on this machine, and only there.
    """
    connect = socket.socket.connect
    loopback = request.path.parent.name in LOOPBACK

    def local_only(self: socket.socket, address: Any) -> None:
        inet = self.family in (socket.AF_INET, socket.AF_INET6)
        if inet and not (loopback and address[0] in ("127.0.0.1", "::1", "localhost")):
            raise OSError(f"the tests have no network: {address}")
        connect(self, address)

    def know_nobody(*a: object, **k: object) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket.socket, "connect", local_only)
    if not loopback:
        monkeypatch.setattr(socket, "getaddrinfo", know_nobody)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default cache of this test, also for its child processes."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SFDA_TUNE_CACHE", str(folder))
    return folder


def write_checkpoint(
    folder: Path,
    architecture: str,
    size: int = 32,
    *,
    seed: int = 0,
    mean: float = 0.5,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    crop_mode: str = "center",
    num_classes: int = 7,
    **model_args: object,
) -> Path:
    """Write a timm checkpoint folder with reproducible random weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=num_classes, **model_args)
    for module in model.modules():  # statistics other than 0 and 1, so that eval mode matters
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    cfg = {
        "input_size": [3, size, size],
        "fixed_input_size": False,
        "interpolation": interpolation,
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "mean": [mean] * 3,
        "std": [0.25] * 3,
        "num_classes": num_classes,
        "first_conv": model.pretrained_cfg["first_conv"],
        "classifier": model.pretrained_cfg["classifier"],
    }
    config = {"architecture": architecture, "num_classes": num_classes, "pretrained_cfg": cfg}
    if model_args:
        config["model_args"] = model_args
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    return write_checkpoint


@pytest.fixture(scope="session")
def toy_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints, three geometries; `resnet` and `convnext` share theirs, not their mean."""
    root = tmp_path_factory.mktemp("toy zoo")
    write_checkpoint(root / "resnet", "test_resnet", 32)
    write_checkpoint(root / "convnext", "test_convnext", 32, mean=0.4)
    write_checkpoint(root / "efficientnet", "test_efficientnet", 48, interpolation="bilinear")
    write_checkpoint(root / "vit", "test_vit", 32, crop_pct=1.0, crop_mode="border", img_size=32)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: 3 classes × 12 photos of different sizes, two of them grey or with EXIF."""
    root = tmp_path_factory.mktemp("photos") / "my photos"
    rng = np.random.default_rng(0)
    for c, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir(parents=True)
        for n in range(12):
            height, width = rng.integers(40, 90, 2)
            pixels = rng.integers(0, 256, (height, width, 3), np.uint8) // 2
            pixels[..., c] += 100
            image = Image.fromarray(pixels)
            if n == 0:
                image = image.convert("L")
            exif = Image.Exif()
            if n == 1:
                exif[0x0112] = 6  # rotated by a quarter turn
            image.save(root / name / f"{n:02d}.jpg", exif=exif, quality=92)
    return root


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Environment for child processes: no hub, no colours, no plug-ins from outside."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return dict(os.environ)


@pytest.fixture(scope="session")
def forked() -> Iterator[Callable[..., Any]]:
    """Start `sfda-tune` or a script in a forked process; what is left of it is ended at the end.

    Where an interpreter must start or end as a user's does, take `subprocess` instead.
    """
    import command_lab

    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        for name in (
            "COLUMNS",
            "LINES",
        ):  # readline's, which `os.environ` lacks; consoles keep them
            os.unsetenv(name)
        ensure_running()
    children = []

    def start(arguments: list[Any], out: Path, err: Path | None = None) -> Any:
        is_script = str(arguments[0]).endswith(".py")
        be = command_lab.run_script if is_script else command_lab.run_command
        environment = os.environ | own | {"PWD": os.getcwd()}
        child = context.Process(
            target=be, args=(arguments, str(out), str(err or out), environment)
        )
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:  # a number may belong to somebody else once its process is gone
        if child.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


@pytest.fixture
def digits() -> list[dict[str, Any]]:
    """96 digits as a Trainer of Hugging Face takes them."""
    import torch
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    X = torch.tensor(X[:96] / 16, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    return [{"pixel_values": x, "labels": int(c)} for x, c in zip(X, y[:96], strict=True)]


@pytest.fixture
def make_trainer(
    digits: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Make a real Trainer of Hugging Face that takes two steps on the digits, without network."""
    transformers = pytest.importorskip("transformers")
    from accelerate.state import GradientState

    # a training that ended by `max_steps` leaves a weak reference there, which no Trainer of this
    # process can be pickled with
    GradientState._reset_state()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(space: Any, **arguments: Any) -> Any:
        options = transformers.TrainingArguments(
            str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=16, report_to=[],
            eval_strategy="no", save_strategy="no", use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        return transformers.Trainer(
            model_init=space.model_init(10), args=options, train_dataset=digits[:64],
            eval_dataset=digits[64:], **arguments,
        )  # fmt: skip

    return make
