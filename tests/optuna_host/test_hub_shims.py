"""The OptunaHub packages: they load as from the hub, run, and keep the registry's rules."""

from __future__ import annotations

import csv
import inspect
import re
import runpy
import sys
from pathlib import Path

import optuna
import pytest
import sfda_tune_optuna
import yaml

optunahub = pytest.importorskip("optunahub")

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = ROOT / "integrations" / "optunahub" / "package"
PACKAGES = {
    "samplers/sfda_tune": ["SFDASampler"],
    "pruners/sfda_tune": ["SFDAPruner", "gate"],
    "benchmarks/backbone_selection": ["BackboneSelectionProblem"],
}
SCORES = {"demo:convnext_glyphs": 3.0, "demo:resnet_glyphs": 2.0, "demo:vit_untrained": 1.0}

every_package = pytest.mark.parametrize("package", PACKAGES)


def load(package: str):
    return optunahub.load_local_module(package, registry_root=str(REGISTRY))


@pytest.fixture
def hub(monkeypatch):
    """`load_module` without the network: what is here is what the hub would hold."""
    before = dict(sys.modules)
    monkeypatch.setattr(optunahub, "load_module", load)
    yield
    for name in sys.modules.keys() - before.keys():
        if name.startswith("optunahub_registry"):
            del sys.modules[name]


def read_front_matter(package: str) -> tuple[dict, str]:
    text = (REGISTRY / package / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


# Loading and using ------------------------------------------------------------------------------
@every_package
def test_package_hands_out_what_the_adapter_has(package):
    module = load(package)
    assert set(PACKAGES[package]) <= set(module.__all__)
    for name in PACKAGES[package]:
        assert getattr(module, name) is getattr(sfda_tune_optuna, name)


def test_there_is_no_other_package():
    found = {str(path.parent.relative_to(REGISTRY)) for path in REGISTRY.rglob("__init__.py")}
    assert found == set(PACKAGES)


def test_sampler_benchmark_and_pruner_work_together():
    benchmark = load("benchmarks/backbone_selection")
    problem = benchmark.BackboneSelectionProblem(
        benchmark.DIGITS, params=("lr", "epochs"), seconds="seconds", proxy_scores=SCORES
    )
    sampler = load("samplers/sfda_tune").SFDASampler(problem.proxy_scores, seed=0)
    pruner = load("pruners/sfda_tune").SFDAPruner(problem.proxy_scores, keep=2)

    def objective(trial: optuna.Trial) -> float:
        value = problem(trial)
        if trial.should_prune():
            raise optuna.TrialPruned
        return value

    study = optuna.create_study(directions=problem.directions, sampler=sampler, pruner=pruner)
    study.optimize(objective, n_trials=12)
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    assert complete
    assert {trial.params["backbone"] for trial in complete} <= pruner.survivors
    assert all(problem.read_seconds(trial.params) > 0 for trial in complete)
    assert sampler.calibration(study).n_trials == len(complete)


def test_gate_of_the_pruner_package():
    gate = load("pruners/sfda_tune").gate
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.enqueue_trial({"backbone": "demo:vit_untrained"})

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        trial.suggest_categorical("backbone", sorted(SCORES))
        gate(trial, SCORES, keep=2)
        return 1.0, 1.0

    study.optimize(objective, n_trials=1)
    assert study.trials[0].state.name == "PRUNED"


def test_table_is_complete_and_of_the_demo_backbones():
    from sfda_tune.backbones import demo

    module = load("benchmarks/backbone_selection")
    problem = module.BackboneSelectionProblem(
        module.DIGITS, params=("lr", "epochs"), seconds="seconds"
    )
    assert problem.dropped == ()
    assert problem.backbones == tuple(f"demo:{name}" for name in demo.names())
    assert set(problem.costs) == set(problem.backbones)
    with Path(module.DIGITS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 5 * 3  # as README.md says
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)


# As a user of the hub would run them ------------------------------------------------------------
@every_package
def test_example_runs(package, hub, capsys):
    runpy.run_path(str(REGISTRY / package / "example.py"), run_name="__main__")
    assert re.search(r"0\.\d{3} of 0\.\d{3}", capsys.readouterr().out)


@every_package
def test_readme_s_example_runs(package, hub, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", read_front_matter(package)[1], re.DOTALL)
    exec(compile(code, f"{package}/README.md", "exec"), {"fine_tune": lambda name, lr: 1 - lr})
    assert capsys.readouterr().out


# The registry's rules ---------------------------------------------------------------------------
@every_package
def test_front_matter(package):
    front, _ = read_front_matter(package)
    assert list(front) == ["author", "title", "description", "tags", "optuna_versions", "license"]
    assert all(
        isinstance(front[key], str) and front[key] for key in ("author", "title", "description")
    )
    assert front["license"] == "MIT License"
    for key in ("tags", "optuna_versions"):
        assert front[key]
        assert all(isinstance(entry, str) for entry in front[key])
    assert package.split("/")[0].removesuffix("s") in front["tags"]
    assert not front["title"].endswith(".")


@every_package
def test_readme_has_the_sections_and_no_html(package):
    _, body = read_front_matter(package)
    headings = re.findall(r"^## (.+)$", body, re.MULTILINE)
    assert headings == ["Abstract", "APIs", "Installation", "Example", "Others"]
    assert not re.search(r"<[a-zA-Z!/]", body)
    for name in PACKAGES[package]:
        assert f"`{name}(" in body


@every_package
def test_readme_names_every_argument_with_its_default(package):
    _, body = read_front_matter(package)
    for name in PACKAGES[package]:
        (signature,) = re.findall(rf"^### \w+ `{name}\((.*)\)`$", body, re.MULTILINE)
        documented = {
            part.partition("=")[0]: part.partition("=")[2]
            for part in re.split(r", (?![^(]*\))", signature)
        }
        documented.pop("*")
        parameters = inspect.signature(getattr(sfda_tune_optuna, name)).parameters
        assert list(documented) == list(parameters)
        for argument, default in documented.items():
            empty = parameters[argument].default is inspect.Parameter.empty
            assert empty == (default == ""), argument
            if not empty:
                assert parameters[argument].default == eval(default), argument


@every_package
def test_files_of_a_package(package):
    folder = REGISTRY / package
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files >= {"LICENSE", "README.md", "__init__.py", "example.py", "requirements.txt"}
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (folder / "requirements.txt").read_text() == "sfda-tune[optuna]\n"
    assert not any(b"\0" in (folder / name).read_bytes() for name in files)  # no binaries
