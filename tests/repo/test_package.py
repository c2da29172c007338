"""What the wheel holds, and that it works where the source tree is not."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    info = f"sfda_tune-{wheel.name.split('-')[1]}.dist-info"
    packages = {"sfda_tune", "sfda_tune_optuna", "sfda_tune_ray", "sfda_tune_sklearn"}
    assert tops == packages | {info}
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert {
        "sfda_tune/report/report.html.j2",
        "sfda_tune/report/report.css",
        "sfda_tune/report/report.js",
    } <= set(names)
    assert "sfda_tune/metrics/imagenet.csv" in names
    assert sum(n.endswith("model.safetensors") for n in names) == 8
    assert "sfda_tune/backbones/demo/accuracies.json" in names
    assert [n for n in names if "/demo/" in n and n.endswith(".py")] == [
        "sfda_tune/backbones/demo/__init__.py"
    ]
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not [n for n in names if n.endswith((".md", ".pyc", ".pt", ".pkl"))]
    assert wheel.stat().st_size < 5e6


@pytest.mark.slow
def test_wheel_works_away_from_the_source_tree(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import sfda_tune; assert 'site' in sfda_tune.__file__, sfda_tune.__file__\n"
        "r = sfda_tune.rank('digits', 'demo:resnet_*', samples=60, cache=False, device='cpu')\n"
        "assert len(r) == 2 and not r.failed, r"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
