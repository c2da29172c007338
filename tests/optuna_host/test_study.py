"""What one does with a study and a ranking: keep it there, suggest, enqueue, extend, publish."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import numpy as np
import optuna
import pytest
import sfda_tune_optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import RandomSampler
from optuna.trial import TrialState
from optuna_lab import NAMES, VALUES, make_trial, objective
from sfda_tune_optuna import (
    BackboneSelectionProblem,
    CalibrationCallback,
    SFDASampler,
    calibrate_study,
    enqueue_top_k,
    extend_backbones,
    load_ranking,
    save_ranking,
    suggest_backbone,
)
from sfda_tune_optuna.store import KEY, compare_rankings

from sfda_tune.selection.calibration import estimate_errors
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking


def make_ranking(**info):
    rng = np.random.default_rng(0)
    scores = [Score(n, v, per_sample=v + rng.normal(size=50)) for n, v in VALUES.items()]
    scores.append(Score("broken", error="OSError: no weights"))
    return Ranking(scores, metric="sfda", info={"dataset": "digits", "seed": 3, **info})


# Kept in the study -------------------------------------------------------------------------------
def test_a_ranking_survives_with_errors_and_failures():
    study, ranking = optuna.create_study(), make_ranking(versions={"torch": "2"})
    save_ranking(study, ranking)
    loaded = load_ranking(study)
    assert list(loaded) == list(ranking)
    assert [loaded[n] for n in NAMES] == [ranking[n] for n in NAMES]
    assert loaded.failed == ranking.failed
    assert (loaded.metric, dict(loaded.info)) == ("sfda", {"dataset": "digits", "seed": 3})
    errors = estimate_errors(ranking)
    assert errors["a"] == pytest.approx(np.std(ranking.score("a").per_sample, ddof=1) / 50**0.5)
    assert estimate_errors(loaded) == errors
    assert set(errors) == set(NAMES)
    assert estimate_errors(VALUES) is None


def test_errors_that_are_no_numbers_are_not_saved():
    scores = [Score("a", 0.5, per_sample=np.array([1.0, np.nan])), Score("b", 0.4)]
    scores.append(Score("c", 0.3, details={"standard_error": 0.1}))
    study = optuna.create_study(sampler=SFDASampler(Ranking(scores), seed=0))
    study.optimize(lambda t: len(t.suggest_categorical("backbone", ["a", "b"])), n_trials=3)
    assert study.user_attrs[KEY]["errors"] == {"c": 0.1}


@pytest.mark.parametrize("n", [10, 3000])
def test_a_large_ranking_is_cut_into_pieces(n, tmp_path):
    scores = {f"backbone_{i:05d}": i / 7 for i in range(n)}
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/s.db")
    save_ranking(study, {"old": 1.0})
    save_ranking(study, scores)
    assert dict(load_ranking(study)) == scores
    sizes = [len(json.dumps(value)) for value in study.user_attrs.values()]
    assert max(sizes) < 64_000
    assert (sum(sizes) > 64_000) == (n == 3000)
    assert study.user_attrs[KEY]["version"] == 1


def test_a_ranking_of_a_newer_version_is_refused():
    study = optuna.create_study()
    study.set_user_attr(KEY, {"version": 2})
    with pytest.raises(ValueError, match="must have version 1 but has 2; upgrade"):
        load_ranking(study)


def test_what_differs_is_said():
    study = optuna.create_study()
    save_ranking(study, make_ranking())
    assert compare_rankings(study, make_ranking(versions={"torch": "3"}, seconds=4)) is None
    other = {n: v for n, v in VALUES.items() if n not in "ab"} | {"c": 0.0, "new": 1.0}
    other = Ranking([Score(n, v) for n, v in other.items()], "logme", info={"dataset": "pets"})
    said = compare_rankings(study, other)
    for part in (
        "lacks a, b, broken",
        "adds new",
        "scores differently c",
        "has the metric 'logme' instead of 'sfda'",
        "has dataset 'pets' instead of 'digits'",
    ):
        assert part in said


# Suggested, enqueued, extended -------------------------------------------------------------------
def test_suggest_backbone_offers_what_could_be_scored():
    study = optuna.create_study()
    trial = study.ask()
    assert suggest_backbone(trial, make_ranking()) in NAMES
    assert trial.distributions["backbone"] == CategoricalDistribution(NAMES)
    with pytest.raises(ValueError, match=r"extend_backbones\(study, new, study_name"):
        suggest_backbone(study.ask(), {"a": 1.0, "z": 2.0})
    with pytest.raises(ValueError, match="at least one scored backbone"):
        suggest_backbone(study.ask(), {})
    study.enqueue_trial({"net": "nonsense"})
    with pytest.raises(ValueError, match="nonsense"):
        suggest_backbone(study.ask(), VALUES, "net")


def test_enqueue_top_k():
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(0))
    assert enqueue_top_k(study, make_ranking(), 2, params={"lr": 1e-3}) == ["a", "b"]
    study.optimize(objective, n_trials=1)
    assert enqueue_top_k(study, VALUES, 3, params={"lr": 1e-3}) == ["c"]
    assert enqueue_top_k(study, VALUES, 1, params={"lr": 1e-3}, skip_if_exists=False) == ["a"]
    study.optimize(objective, n_trials=3)
    assert [t.params for t in study.trials] == [{"backbone": n, "lr": 1e-3} for n in "abca"]


@pytest.mark.parametrize("database", [False, True])
def test_extend_backbones_keeps_everything(database, tmp_path):
    storage = f"sqlite:///{tmp_path}/s.db" if database else optuna.storages.InMemoryStorage()
    sampler = SFDASampler(make_ranking(), survivors=4, seed=0)
    study = optuna.create_study(direction="maximize", storage=storage, sampler=sampler)
    study.set_user_attr("mine", 1)
    study.optimize(objective, n_trials=3)
    more = {"user_attrs": {"u": 1}, "system_attrs": {"s": 2}}
    study.add_trial(make_trial("b", state="PRUNED", intermediate_values={0: 0.5}, **more))
    study.add_trial(make_trial("c", state="FAIL"))
    study.enqueue_trial({"backbone": "d"})
    running = study.ask()  # takes the enqueued one
    study.enqueue_trial({"backbone": "e"})
    extended = extend_backbones(study, {"z": 2.0, "a": 0.1}, study_name="more")
    old = [t for t in study.trials if t.number != running.number]
    assert len(extended.trials) == len(old)
    for before, after in zip(old, extended.trials, strict=True):
        for name in ("state", "values", "params", "user_attrs", "system_attrs",
                     "intermediate_values", "datetime_start", "datetime_complete"):  # fmt: skip
            assert getattr(before, name) == getattr(after, name), name
        if "backbone" in after.params:
            assert after.distributions["backbone"].choices == (*NAMES, "z")
    assert extended.user_attrs["mine"] == 1
    assert {n: load_ranking(extended)[n] for n in "abz"} == {"a": 0.1, "b": 0.8, "z": 2.0}
    extended.sampler = SFDASampler.from_study(extended)
    assert extended.sampler.settings["survivors"] == 4
    accuracy = {**VALUES, "z": 0.95}
    extended.optimize(lambda t: accuracy[suggest_backbone(t, accuracy)], n_trials=8)
    assert "z" in {t.params.get("backbone") for t in extended.trials}
    with pytest.raises(ValueError, match="`new` must be names of backbones"):
        extend_backbones(study, "z", study_name="other")


def test_extend_backbones_mixes_no_scores():
    by_sfda = Ranking([Score("a", 0.5), Score("b", 0.4)], "sfda (loo)")
    other = Ranking([Score("c", -3.0)], "logme")
    forecasts = [
        Ranking([Score(n, v) for n, v in values.items()], "forecast (full)")
        for values in ({"a": 0.5, "b": -0.5}, {"c": 0.1}, {"a": 0.3, "b": -0.6, "c": 0.3})
    ]
    for old, new in (
        (by_sfda, other), (forecasts[0], forecasts[1]), (forecasts[0], {"c": 0.9}),
        (by_sfda, forecasts[2]),
    ):  # fmt: skip
        study = optuna.create_study()
        save_ranking(study, old)
        with pytest.raises(ValueError, match="rank all backbones together"):
            extend_backbones(study, new, study_name="more")
        with pytest.raises(KeyError):
            optuna.load_study(study_name="more", storage=study._storage)
    study = optuna.create_study()
    save_ranking(study, forecasts[0])
    extended = extend_backbones(study, forecasts[2], study_name="more")
    assert dict(load_ranking(extended)) == dict(forecasts[2])


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_extend_backbones_of_several_objectives(tmp_path):
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.set_metric_names(["accuracy", "seconds"])
    study.add_trial(make_trial("a", values=[0.9, 3.0]))
    extended = extend_backbones(
        study, ["z"], study_name="more", storage=f"sqlite:///{tmp_path}/s.db"
    )
    assert extended.directions == study.directions
    assert extended.metric_names == ["accuracy", "seconds"]
    assert extended.trials[0].values == [0.9, 3.0]


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2"])
def test_wrong_arguments_are_named(k):
    study = optuna.create_study()
    with pytest.raises(ValueError, match=f"`k` must be an integer ≥ 1 but is {k!r}"):
        enqueue_top_k(study, VALUES, k)
    for use, name in ((save_ranking, "ranking"), (enqueue_top_k, "scores")):
        with pytest.raises(ValueError, match=f"`{name}` must be a Ranking or a mapping but is"):
            use(study, NAMES)


def test_callback_without_a_ranking_stops_at_once():
    study = optuna.create_study(direction="maximize", sampler=RandomSampler(0))
    with pytest.raises(ValueError, match="must hold a ranking but has none"):
        study.optimize(objective, n_trials=9, callbacks=[CalibrationCallback(every=5)])
    assert len(study.trials) == 1


def test_callback(monkeypatch):
    said = []
    logger = logging.getLogger("optuna.sfda_tune_optuna.callbacks")
    monkeypatch.setattr(logger, "info", said.append)
    study = optuna.create_study(direction="maximize", sampler=SFDASampler(VALUES, seed=0))
    callback = CalibrationCallback(every=4)
    study.optimize(objective, n_trials=10, callbacks=[callback], n_jobs=2)
    assert len(said) == 2
    assert callback.calibration.n_trials >= 4
    with pytest.raises(ValueError, match="`every` must be an integer ≥ 1 but is 0"):
        CalibrationCallback(every=0)


# Studies that `optuna ask` drives ----------------------------------------------------------------
@pytest.mark.parametrize("journal", [False, True])
def test_a_study_of_another_process_is_enqueued_and_calibrated(journal, tmp_path):
    def load():
        storage = f"sqlite:///{tmp_path / 'study'}"
        if journal:
            backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study"))
            storage = optuna.storages.JournalStorage(backend)
        return optuna.create_study(study_name="s", storage=storage, load_if_exists=True)

    study = load()
    save_ranking(study, make_ranking(), settings={"param_name": "net"})
    assert enqueue_top_k(study, make_ranking(), 2, param_name="net") == ["a", "b"]
    study = load()
    assert enqueue_top_k(study, load_ranking(study), 3, param_name="net") == ["c"]
    study.optimize(lambda t: VALUES[t.suggest_categorical("net", NAMES)], 3)
    assert calibrate_study(load()).n_trials == 3


# A table of fine-tuning runs ---------------------------------------------------------------------
ROWS = [
    {"model": name, "lr": lr, "acc": 0.8 - 0.1 * i - 5 * abs(lr - 0.01), "s": 10 * (i + 1)}
    for i, name in enumerate("abc")
    for lr in (0.1, 0.01)
    if (name, lr) != ("c", 0.1)
]
COLUMNS = {"backbone": "model", "value": "acc", "seconds": "s"}


def test_benchmark_of_a_table(tmp_path):
    file = tmp_path / "runs.csv"
    lines = [",".join((*ROWS[0], "data"))]
    lines += [",".join((*map(str, row.values()), d)) for row in ROWS for d in ("x", "y")]
    file.write_text("\n".join(lines))
    problem = BackboneSelectionProblem(ROWS, **COLUMNS, proxy_scores={"a": 2, "b": 1})
    same = BackboneSelectionProblem(file, **COLUMNS, where={"data": "x"}, params="lr")
    assert problem.backbones == same.backbones == ("a", "b")
    assert problem.dropped == ("c",)
    assert problem.costs == same.costs == {"a": 10.0, "b": 20.0}
    assert problem.read_seconds({"model": "b", "lr": 0.01}) == 20.0
    assert problem.search_space == same.search_space
    sampler = SFDASampler(problem.proxy_scores, param_name="model", seed=0)
    study = optuna.create_study(directions=problem.directions, sampler=sampler)
    study.optimize(problem, n_trials=8)
    assert study.best_value == problem.best_value == pytest.approx(0.8)
    assert study.best_params == {"model": "a", "lr": 0.01}


def test_benchmark_averages_repeats_and_refuses_what_is_not_there():
    rows = [{"backbone": "a", "lr": 1, "accuracy": v} for v in (0.5, 0.7)]
    problem = BackboneSelectionProblem(rows)
    assert problem.evaluate({"backbone": "a", "lr": 1}) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="`params` must be a point of `search_space`"):
        problem.evaluate({"backbone": "a", "lr": 2})
    with pytest.raises(ValueError, match=r"lacks \['epochs'\]"):
        BackboneSelectionProblem(rows, params=("lr", "epochs"))
    rows = [{"backbone": n, "lr": i, "accuracy": 0} for i, n in enumerate("ab")]
    with pytest.raises(ValueError, match="none of 2 has"):
        BackboneSelectionProblem(rows)


# The package -------------------------------------------------------------------------------------
def run_code(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_public_names():
    for name in sfda_tune_optuna.__all__:
        assert getattr(sfda_tune_optuna, name).__doc__
        assert name in dir(sfda_tune_optuna)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        sfda_tune_optuna.nonsense  # noqa: B018


def test_a_worker_imports_neither_torch_nor_plots():
    code = """
import sys, sfda_tune_optuna
heavy = {"torch", "timm", "plotly", "matplotlib", "optuna_dashboard", "optunahub"}
sys.exit(str(heavy & set(sys.modules) or ""))
"""
    done = run_code(code)
    assert done.stderr.strip() == ""


def test_missing_packages_are_named():
    code = """
import sys, sfda_tune_optuna as s
for name in ("plotly", "matplotlib", "optuna_dashboard", "optunahub"):
    sys.modules[name] = None
import optuna
for use in (lambda: s.plot_backbone_ranking(optuna.create_study(), ranking={"a": 1}),
            lambda: __import__("sfda_tune_optuna.plots.matplotlib").plots.matplotlib
                .plot_backbone_ranking(optuna.create_study(), ranking={"a": 1}),
            lambda: s.publish_to_dashboard(optuna.create_study(), ranking={"a": 1}),
            lambda: s.BackboneSelectionProblem):
    try:
        use()
    except ModuleNotFoundError as error:
        print(error)
"""
    done = run_code(code)
    said = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "This figure needs plotly",
        "This figure needs matplotlib",
        "publish_to_dashboard needs optuna-dashboard",
        "BackboneSelectionProblem needs optunahub",
    ], done.stderr


def test_without_optuna_it_is_named():
    code = "import sys; sys.modules['optuna'] = None; import sfda_tune_optuna"
    done = run_code(code)
    assert "sfda_tune_optuna needs Optuna: pip install 'sfda-tune[optuna]'" in done.stderr


def test_private_names_stay_in_one_module():
    import ast
    from pathlib import Path

    folder = Path(sfda_tune_optuna.__file__).parent
    for file in folder.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if file.name != "_compat.py" and isinstance(node, ast.Attribute):
                private = node.attr.startswith("_") and node.attr[1:2] != "_"
                private = private and node.attr != "_replace"  # of every named tuple
                ours = getattr(node.value, "id", "") in ("self", "cls")
                assert ours or not private, (file.name, node.attr)
            if file.name != "_compat.py" and isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("optuna._"), file.name


def test_trial_states_are_all_handled():
    assert len(TrialState) == 5  # a new one needs a place in `history.observe`
