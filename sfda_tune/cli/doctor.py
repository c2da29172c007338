"""``sfda-tune doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from sfda_tune.cli.options import AsJson, CacheDir, Debug
from sfda_tune.cli.terminal import output, print_json
from sfda_tune.pipelines.terminal import say

PACKAGES = (
    "sfda-tune", "torch", "torchvision", "timm", "numpy", "scipy", "pillow", "safetensors",
    "huggingface-hub",
)  # fmt: skip
EXTRAS = {  # package → what brings it
    "optuna": "sfda-tune[optuna]", "ray": "sfda-tune[ray]", "scikit-learn": "sfda-tune[sklearn]",
    "datasets": "sfda-tune[data]", "pandas": "sfda-tune[data]", "pyarrow": "sfda-tune[data]",
    "matplotlib": "sfda-tune[report]", "fsspec": "fsspec", "s3fs": "s3fs",
}  # fmt: skip
SETTINGS = (
    "SFDA_TUNE_CACHE", "SFDA_TUNE_CACHE_SIZE", "SFDA_TUNE_PATIENCE", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "RAY_ADDRESS",
)  # fmt: skip
SMALL_SHM = 1 << 30  # bytes; Docker gives 64 MB
Fact = tuple[str, str, str]  # what, its value, and what is wrong with it


def diagnose(cache: CacheDir = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Show versions, devices, cache and hub, and what is missing: for a report of a bug.

    Nothing secret is shown. Ends with 1 if something keeps `rank` from working.

    For example:

      sfda-tune doctor
    """
    problems, told = [], {}
    for title, facts in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("cache", _cache(cache)),
        ("hub", _hub()),
        ("settings", _settings()),
    ):
        told[title] = {}
        try:
            for what, value, problem in facts:
                told[title][what] = _without_home(value)
                if problem:
                    problems.append(f"{what}: {_without_home(problem)}")
        except (OSError, ValueError) as error:  # of a library that reads its settings
            problems.append(f"{title}: {_without_home(error)}")
    if as_json:
        print_json({**told, "problems": problems})
    else:
        width = max(len(what) for values in told.values() for what in values) + 1
        for title, values in told.items():
            say(output, title)
            for what, value in values.items() or [("none", "")]:
                say(output, f"  {what:<{width}}{value}")
        for line in ["problems", *(f"  {p}" for p in problems)] if problems else ["no problems"]:
            say(output, line)
    if problems:
        raise typer.Exit(1)


def _versions() -> Iterator[Fact]:
    yield "python", f"{platform.python_version()}, {platform.platform()}", ""
    for name in PACKAGES:
        try:
            found = version(name)
            if name == "torch":  # with what it was built for
                import torch

                found = torch.__version__
            yield name, found, ""
        except PackageNotFoundError:
            wrong = "" if name == "sfda-tune" else f"missing: pip install {name}"
            yield name, "not installed", wrong  # the package itself: run from a source tree
    for name, brings in EXTRAS.items():
        try:
            yield name, version(name), ""
        except PackageNotFoundError:
            yield name, f"not installed: pip install '{brings}'", ""


def _devices() -> Iterator[Fact]:
    import psutil
    import torch

    from sfda_tune.backbones.devices import resolve_device
    from sfda_tune.data.loader import count_cores

    yield "auto", resolve_device("auto"), ""
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{found.name}, {found.total_memory / 1e9:.1f} GB", ""
    cores, threads = psutil.cpu_count(), torch.get_num_threads()
    yield "cpu", f"{cores} cores, {count_cores()} for decoding, torch threads: {threads}", ""
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free", ""
    if sys.platform == "linux":
        try:
            shared = shutil.disk_usage("/dev/shm")
        except OSError as error:
            yield "/dev/shm", f"cannot be used ({error.strerror})", ""
            return
        said = f"{shared.total / 1e6:.0f} MB, {shared.free / 1e6:.0f} MB free"
        if shared.total < SMALL_SHM:
            said += "; decoding needs none of it, Ray is slow: `docker run --shm-size=2g`"
        yield "/dev/shm", said, ""


def _cache(cache: str | None) -> Iterator[Fact]:
    from sfda_tune.extraction.store import FeatureStore, open_store, size_limit
    from sfda_tune.values.files import unfinished
    from sfda_tune.values.redaction import hide_secrets, redact

    try:
        store, limit = open_store(cache), size_limit()
    except ValueError as error:
        address = cache or os.environ.get("SFDA_TUNE_CACHE")
        yield "folder", "none", hide_secrets(str(error), address)
        return
    if type(store) is not FeatureStore:
        yield "folder", redact(str(store.root)) or "", ""
        return
    yield "folder", str(store.root), ""
    wrong = ""
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        with unfinished(store.root) as path:
            path.write_bytes(b"x")
    except OSError as error:
        wrong = f"cannot be written ({error.strerror}); pass --cache or set SFDA_TUNE_CACHE"
    yield "writable", "no" if wrong else "yes", wrong
    files = [*store.entries(), *store.notes(), *store.entries(outdated=True)]
    size = sum(stat.st_size for _, stat in files) / 1e6
    allowed = "no limit" if limit is None else f"at most {limit / 1e6:.1f} MB"
    yield "size", f"{size:.1f} MB in {len(files)} files, {allowed}", ""
    if store.has_outdated:
        yield "outdated", "some, not used: `sfda-tune cache clear --outdated`", ""
    if not wrong:
        yield "disk", f"{shutil.disk_usage(store.root).free / 1e9:.1f} GB free", ""


def _hub() -> Iterator[Fact]:
    import torch
    from huggingface_hub import constants, get_token

    from sfda_tune.backbones.weights import find_cut
    from sfda_tune.data.hub import reachable
    from sfda_tune.values.files import say_kind
    from sfda_tune.values.redaction import redact

    yield "endpoint", redact(constants.ENDPOINT) or "", ""
    started = time.perf_counter()
    answers = reachable()
    spent = time.perf_counter() - started
    said = f"yes, after {spent:.1f} s" if answers else "no: only weights that are here already"
    yield "reachable", said, ""
    try:
        yield "token", "yes" if get_token() else "no", ""
    except OSError as error:
        yield "token", "none", f"cannot be read ({error}); see HF_HOME and HF_TOKEN_PATH"
    here = Path(constants.HF_HUB_CACHE).absolute()
    above = next(path for path in (here, *here.parents) if path.exists())
    wrong = "" if above.is_dir() else f"must be in a folder but {above} {say_kind(above)}"
    yield "weights", f"{here}, {torch.hub.get_dir()}", wrong
    if left := [stat.st_size for stat in find_cut().values()]:
        said = f"{len(left)} cut downloads, {sum(left) / 1e6:.1f} MB: `sfda-tune cache clear`"
        yield "leftovers", said, ""


def _settings() -> Iterator[Fact]:
    from sfda_tune.data.loader import patience
    from sfda_tune.values.redaction import redact

    for name in SETTINGS:
        if (value := os.environ.get(name)) is not None:
            yield name, redact(value) or "", ""
    patience()


def _without_home(text: Any) -> str:
    home = str(Path.home())
    return str(text) if home == "/" else str(text).replace(home, "~")
