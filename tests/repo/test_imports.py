"""The core knows no host, and importing it is quick."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ("optuna", "ray", "sfda_tune_optuna", "sfda_tune_ray", "sfda_tune_sklearn")

GUARD = """
import sys, importlib.abc, pkgutil
class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hosts!r}:
            raise SystemExit(f"{{name}} was imported")
sys.meta_path.insert(0, Guard())
{more}
import sfda_tune
for module in pkgutil.walk_packages(sfda_tune.__path__, "sfda_tune."):
    __import__(module.name)
"""


def guard(more: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", GUARD.format(hosts=HOSTS, more=more)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_core_never_imports_a_host():
    done = guard()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("host", HOSTS)
def test_the_guard_can_fail(host):
    done = guard(f"import {host}")
    assert done.returncode == 1
    assert f"{host} was imported" in done.stderr


def _imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_not_even_inside_a_function():
    files = list((ROOT / "sfda_tune").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        assert not _imported(ast.parse(file.read_text())) & set(HOSTS), file
    assert _imported(ast.parse("def f():\n    import ray.tune")) == {"ray"}


def test_ruff_bans_them_too(tmp_path):
    """The lint rule fails on a lazy import in the core and allows it in an integration."""
    config = ["--config", str(ROOT / "pyproject.toml"), "--select", "TID251", "--no-cache", "-"]
    for place, code in (("sfda_tune/x.py", 1), ("integrations/sfda_tune_ray/x.py", 0)):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--stdin-filename", place, *config],
            input="def f():\n    import ray\n    return ray\n",
            text=True, capture_output=True, check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == code, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("sfda_tune/values/text.py", "", None),
        ("sfda_tune/values/text.py", "import sfda_tune.report", "Imports only downwards"),
        (
            "sfda_tune/data/dataset.py",
            "def f():\n    from sfda_tune.backbones import specs",
            "Imports only downwards",
        ),
        ("sfda_tune/cli/rank.py", "import sfda_tune_ray", "Imports only downwards"),
        # Of the integrations one module alone may import another one.
        ("sfda_tune_ray/searcher.py", "import sfda_tune_optuna", None),
        ("sfda_tune_ray/spaces.py", "import sfda_tune_optuna", "Imports only downwards"),
        ("sfda_tune_ray/searcher.py", "import sfda_tune_sklearn", "Imports only downwards"),
        ("sfda_tune_optuna/engine.py", "import sfda_tune_ray.searcher", "Imports only downwards"),
        (
            "sfda_tune/values/files.py",
            "import sfda_tune.values.ranking",
            "No circle inside a room",
        ),
    ],
)
def test_the_contracts_of_the_rooms_can_fail(tmp_path, file, line, broken):
    """On a copy of the packages, with a line that does not belong there; without it they hold."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in (ROOT / "sfda_tune", *(ROOT / "integrations").glob("sfda_tune_*")):
        shutil.copytree(
            package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__")
        )
    with (tmp_path / file).open("a") as module:
        module.write(f"\n{line}\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (broken is not None), done.stdout + done.stderr
    lines = [text.partition(" BROKEN") for text in done.stdout.splitlines()]
    found = [name for name, is_broken, _ in lines if is_broken]
    assert found == ([broken] if broken else [])


def test_importing_loads_neither_torch_nor_timm_and_is_quick():
    code = (
        "import time; t = time.perf_counter(); import sfda_tune; s = time.perf_counter() - t\n"
        "import sys; print(s, sorted({'torch', 'timm', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert all(run.stdout.split()[1:] == ["[]"] for run in runs)
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.3


def test_every_public_name_is_there_and_typed():
    import sfda_tune

    for name in sfda_tune.__all__:
        assert getattr(sfda_tune, name) is not None
        assert name in dir(sfda_tune)
    assert len(sfda_tune.__all__) <= 20  # the rest lives in its modules
    assert (ROOT / "sfda_tune" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sfda_tune.nonsense  # noqa: B018
