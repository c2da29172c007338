"""`search`: real searches on a few digits, stopped, killed, repeated and run twice at once."""

import csv
import inspect
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile

import sfda_tune
from sfda_tune import Backbone, BackboneError, open_dataset
from sfda_tune.backbones import demo
from sfda_tune.data import loader
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.decoding import get_switches
from sfda_tune.data.loader import Loader, cut
from sfda_tune.data.splits import split_images
from sfda_tune.finetuning import models as predictions
from sfda_tune.finetuning import run as finetuning
from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.finetuning.epochs import OutOfTimeError
from sfda_tune.finetuning.run import finetune
from sfda_tune.pipelines import stages
from sfda_tune.pipelines.budget import Budget, Workload
from sfda_tune.pipelines.clock import Beat, Clock, counting
from sfda_tune.pipelines.config import SearchConfig
from sfda_tune.pipelines.engines import Trial, run_trial
from sfda_tune.pipelines.inputs import open_inputs
from sfda_tune.pipelines.progress import NullProgress, SearchProgress
from sfda_tune.pipelines.result import SearchResult
from sfda_tune.pipelines.run_folder import RunFolder
from sfda_tune.pipelines.search import search
from sfda_tune.pipelines.spaces import default_space, open_space
from sfda_tune.pipelines.stages import choose_survivors, work
from sfda_tune.pipelines.training import (
    FixedLengthFineTuning,
    evaluate_winner,
    train,
    train_winner,
)
from sfda_tune.pipelines.trials import (
    best_epoch,
    estimate_everything,
    find_best,
    find_front,
    find_near,
    seconds_per_epoch,
)
from sfda_tune.pipelines.workers import await_workers, start_workers
from sfda_tune.selection.forecast import order_by_forecast
from sfda_tune.values.features import Score
from sfda_tune.values.ranking import Ranking
from sfda_tune.values.redaction import redact, without_secrets
from sfda_tune.values.text import read_csv_cell

pytest.importorskip("optuna")

QUICK = {"trials": 3, "epochs": 2, "samples": 120}
ONE = "demo:resnet_glyphs"
STAGES = ["rank", "shortlist", "tune", "train", "test"]
PAIR = ["demo:resnet_glyphs", "demo:regnet_shapes"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return search("digits", PAIR, **QUICK, cache=False, out=tmp_path_factory.mktemp("run"))


def read(folder, name="search.json"):
    return json.loads((folder / name).read_text())


def essence(result):
    return [(t["number"], t["backbone"], t["params"], t["value"]) for t in result.trials]


def config_of(*args, **options):
    """Return the configuration of a call of `search`."""
    call = inspect.signature(search).bind(*args, **options)
    call.apply_defaults()
    return SearchConfig(**call.arguments)


# One search -------------------------------------------------------------------------------------
def test_the_folder_says_all(found):
    state = read(found.folder)
    assert state["status"] == "done"
    assert [s["name"] for s in state["stages"]] == STAGES
    assert all(s["seconds"] is not None and s["note"] for s in state["stages"])
    assert state["survivors"] == list(found.ranking)
    assert "all 2" in state["decision"]
    assert len(state["trials"]) == 3
    assert {t["state"] for t in state["trials"]} <= {"complete", "pruned"}
    assert state["seconds"]["total"] > sum(s["seconds"] for s in state["stages"]) * 0.9
    assert state["seconds"]["train_everything_estimate"] > 0
    assert set(state["best"]["test"]) == {"accuracy", "balanced_accuracy", "macro_f1", "log_loss"}
    assert state["best"]["latency_ms"] > 0
    assert state["best"]["n_params"] == state["costs"][state["best"]["backbone"]]["n_params"]
    c, (n_test, n_val) = state["best"]["calibration"], (24, 19)
    assert (c["n_val"], sum(n for *_, n in c["bins_before"])) == (n_val, n_test)
    at = best_epoch(Trial(**found.trials[found.best["trial"]]), "accuracy")
    assert c["temperature"] == at["temperature"] > 0
    with (found.folder / "test_predictions.csv").open() as file:
        sure = [
            (float(r["confidence"]), r["label"] == r["predicted"]) for r in csv.DictReader(file)
        ]
    of = [(min(int(15 * p), 14), p, right) for p, right in sure]
    gaps = [abs(sum(p - right for b, p, right in of if b == k)) for k in range(15)]
    assert c["ece_before"] == pytest.approx(sum(gaps) / n_test, abs=1e-5)
    assert c["log_loss_before"] == pytest.approx(state["best"]["test"]["log_loss"], abs=1e-6)
    page = (found.folder / "report.html").read_text(encoding="utf-8")
    assert f"{c['ece_before']:.4f}; {c['ece_after']:.4f} at the temperature" in page
    shown = repr(found)
    assert f"  {c['ece_before']:.4f}, {c['ece_after']:.4f} at temperature" in shown
    assert len(shown.splitlines()) < 12
    assert f"<td>{state['best']['test']['log_loss']:.4f}</td>" in found._repr_html_()
    assert read(found.folder, "config.json")["epochs"] == 2
    assert "optuna" in read(found.folder, "environment.json")["versions"]


def test_the_first_trial_is_the_default_of_the_best_scored(found):
    first = found.trials[0]
    assert first["backbone"] == next(iter(found.ranking))
    defaults = FinetuneConfig()
    assert first["params"]["lr"] == defaults.lr
    assert all(value == getattr(defaults, name) for name, value in first["params"].items())


def test_no_stage_before_the_test_sees_test_images(found):
    rows = read(found.folder, "splits.json")
    parts = [set(rows[name]) for name in ("train", "val", "test")]
    assert [len(p) for p in parts] == [77, 19, 24]
    assert len(set.union(*parts)) == 120
    assert found.ranking.info["n_samples"] == 77
    data = open_dataset("digits", samples=120)
    ranked = sorted(found.ranking.labels.tolist())
    assert ranked == sorted(data.labels[rows["train"]].tolist())
    provenance = read(found.folder / "model", "provenance.json")
    assert provenance["search"]["images"] == "train and val"
    assert provenance["best"] is None  # measured on images that it was trained on
    assert provenance["train"]["images"] == 77 + 19


def test_the_winner_is_the_best_trial_and_its_model_opens(found):
    best = max(t["value"] for t in found.trials)
    assert next(t for t in found.trials if t["number"] == found.best["trial"])["value"] == best
    import timm

    assert timm.create_model(f"local-dir:{found.folder / 'model'}", pretrained=True)
    data = open_dataset("digits", samples=120)
    test = data.subset(read(found.folder, "splits.json")["test"])
    p = SearchResult.open(found.folder).predict(test)
    assert np.mean(p.argmax(1) == test.labels) == pytest.approx(found.test["accuracy"])
    with (found.folder / "test_predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    right = [row["label"] == row["predicted"] for row in table]
    assert np.mean(right) == pytest.approx(found.test["accuracy"])
    hardest = read(found.folder / "hardest", "hardest.json")
    assert len(hardest) == 12
    assert [h["p_label"] for h in hardest] == sorted(h["p_label"] for h in hardest)
    assert hardest[0]["p_label"] == pytest.approx(
        min(float(row[f"p_{row['label']}"]) for row in table), abs=1e-5
    )
    for entry in hardest:
        with Image.open(found.folder / "hardest" / entry["file"]) as image:
            assert max(image.size) <= 160


def test_only_the_best_keeps_its_weights(found):
    kept = {path.parent.name for path in found.folder.glob("trials/0*/*.safetensors")}
    assert kept == {f"{found.best['trial']:05d}"}


def test_the_same_call_repeats_nothing_and_another_one_is_refused(found):
    before, started = read(found.folder), time.monotonic()
    (found.folder / "report.html").unlink()  # as if killed just before it was written
    again = search("digits", PAIR, **QUICK, cache=False, out=found.folder)
    assert time.monotonic() - started < 10
    assert essence(again) == essence(found)
    assert read(found.folder) == before
    assert (found.folder / "report.html").is_file()
    with pytest.raises(ValueError, match="holds a search with seed 0, but now seed is 1"):
        search("digits", PAIR, **QUICK, cache=False, out=found.folder, seed=1)
    with pytest.raises(ValueError, match=r"with space None, but now space is .*'lr': 0.001"):
        search("digits", PAIR, **QUICK, cache=False, out=found.folder, space={"lr": 0.001})


def test_python_and_the_command_line_continue_each_other(tmp_path):
    call = {n: p.default for n, p in inspect.signature(search).parameters.items()}
    call |= {"dataset": "digits", "out": tmp_path}
    given = [SearchConfig(**call | {"backbones": b}) for b in (ONE, [ONE], (ONE,))]
    assert len({json.dumps(config.to_dict()) for config in given}) == 1
    given = [
        SearchConfig(**call | {"objective": o})
        for o in ("accuracy, params", ("accuracy", "params"))
    ]
    assert given[0].objective == given[1].objective == ("accuracy", "params")


def test_one_text_or_path_is_one_of_several(tmp_path):
    for old in (tmp_path / "old", str(tmp_path / "old")):
        told = config_of("digits", plugins="my_models.py", previous=old, out=tmp_path)
        assert told.plugins == ("my_models.py",)
        assert told.previous == (str(old),)


def test_a_folder_may_be_written_otherwise_when_a_search_goes_on(photos, tmp_path, monkeypatch):
    """`search photos/` at the command line, `search("photos")` or an absolute path in Python."""
    monkeypatch.chdir(photos.parent)
    few = {"trials": 1, "epochs": 1, "cache": False, "out": tmp_path / "run"}
    first = search(f"{photos.name}/", ONE, **few)
    for again in (photos.name, photos):
        assert len(search(again, ONE, **few).trials) == len(first.trials)
    shutil.copytree(photos, tmp_path / "other")
    next((tmp_path / "other").rglob("*.*g")).unlink()
    with pytest.raises(ValueError, match="holds a search with dataset"):
        search(tmp_path / "other", ONE, **few)


def test_the_same_seed_gives_the_same_trials(found, tmp_path, monkeypatch):
    heads, fit = [], finetuning.start_head
    monkeypatch.setattr(finetuning, "start_head", lambda *x: heads.append(x) or fit(*x))
    again = search("digits", PAIR, **QUICK, cache=False, out=tmp_path)
    n_backbones = len({t["backbone"] for t in again.trials})
    # For epoch 0 and for what trains the backbone, too; shared, but by the winner
    assert n_backbones + 1 < len(heads) <= 2 * (n_backbones + 1) < 2 * (len(again.trials) + 1)
    assert essence(again) == essence(found)
    assert again.test == found.test
    assert [t["state"] for t in again.trials] == [t["state"] for t in found.trials]


def test_a_search_may_learn_from_an_earlier_one(found, tmp_path):
    known = found.history
    complete = [t for t in found.trials if t["state"] == "complete"]
    assert [(o.params, o.value) for o in known] == [(t["params"], t["value"]) for t in complete]
    few = {"trials": 1, "epochs": 1, "samples": 120, "cache": False, "out": tmp_path / "run"}
    again = search("digits", ONE, previous=[found.folder], **few)
    assert again.summary["status"] == "done"
    assert read(again.folder, "config.json")["previous"] == [str(found.folder)]
    for options, message in (
        ({"previous": [tmp_path]}, "must be that of a finished search .* holds no search.json"),
        ({"previous": [found.folder], "objective": ("accuracy", "params")}, "several objectives"),
    ):
        with pytest.raises(ValueError, match=message):
            search("digits", ONE, **few | options | {"out": tmp_path / "none"})
    assert not (tmp_path / "none").exists()


def test_more_trials_or_a_larger_budget_go_on(tmp_path):
    few = {"epochs": 1, "samples": 120, "cache": False, "out": tmp_path}
    first = search("digits", ONE, trials=1, **few)
    more = search("digits", ONE, trials=3, **few)
    assert more.summary["status"] == "done"
    assert [t["number"] for t in more.trials] == [0, 1, 2]
    assert more.trials[0] == first.trials[0]  # not trained again
    assert [s["name"] for s in more.summary["stages"]] == STAGES
    assert more.summary["stages"][:2] == first.summary["stages"][:2]
    assert read(tmp_path, "config.json")["trials"] == 3
    best = max(t["value"] for t in more.trials)
    assert next(t for t in more.trials if t["number"] == more.best["trial"])["value"] == best
    with pytest.raises(ValueError, match="trials 3, but now trials is 2; take the same, or more,"):
        search("digits", ONE, trials=2, **few)
    assert len(search("digits", ONE, trials=4, budget="1h", **few).trials) == 4


def test_a_budget_that_was_too_small_may_grow(tmp_path):
    few = {"trials": 2, "epochs": 1, "samples": 120, "cache": False, "out": tmp_path}
    with pytest.raises(ValueError, match=r"`budget` was 0.05 s: give more"):
        search("digits", PAIR, budget=0.05, **few)
    found = search("digits", PAIR, budget="1h", **few)
    assert found.summary["status"] == "done"
    assert len(found.ranking) == 2  # ranked again, and all of them
    assert len(found.trials) == 2


def test_images_that_take_the_whole_budget_to_be_read_end_the_search_early(tmp_path):
    for row in range(40):
        (tmp_path / "data" / str(row % 2)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.full((3000, 4000), row, np.uint8))
        image.save(tmp_path / "data" / str(row % 2) / f"{row}.png", compress_level=1)
    with pytest.raises(ValueError, match=r"could not be read.*`budget` was 0.2 s: give more"):
        search(tmp_path / "data", ONE, budget=0.2, out=tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()  # another budget may follow


def test_a_ranking_that_no_time_is_left_for_is_refused(tmp_path, monkeypatch):
    late = []

    def open_late(config, progress):
        folder = RunFolder.open(config.out, progress)
        return folder, Budget(50.0, lambda: 40.0 * len(late))

    monkeypatch.setattr(stages, "_open", open_late)
    monkeypatch.setattr(stages, "measure_costs", lambda *x, **y: late.append(1) or ({}, {}))
    said = "what comes before the ranking was not done within .* 50 % of the budget; `budget` was"
    with pytest.raises(ValueError, match=said):
        search("digits", ONE, budget=50, samples=120, epochs=1, out=tmp_path)


def test_a_winner_that_training_made_worse_is_a_linear_probe(tmp_path):
    how = {"trials": 1, "epochs": 1, "samples": 120, "space": {"lr": 0.5, "clip_grad": None}}
    found = search("digits", ONE, **how, out=tmp_path)
    assert found.best["epochs"] == 0
    assert found.summary["stages"][3]["note"].startswith("a linear probe, no epoch, on training")
    assert "with a linear probe on its frozen features" in (tmp_path / "report.html").read_text()


def test_why_the_winner_could_not_be_trained_once_more_is_said(tmp_path):
    class Spoiler(NullProgress):
        def leave(self, stage, note):
            if stage == "tune":  # a checkpoint that is not of the final training
                shutil.copytree(tmp_path / "trials" / "00000", tmp_path / "trials" / "final")

    how = {"trials": 1, "epochs": 1, "samples": 120}
    found = search("digits", ONE, **how, out=tmp_path, progress=Spoiler())
    note = found.summary["stages"][3]["note"]
    assert note.startswith("the weights of the best trial, `checkpoint_dir`")
    assert "belongs to another run" in note
    assert found.summary["status"] == "done"  # there is no budget that could be spent


# Interrupted ------------------------------------------------------------------------------------
def test_ctrl_c_keeps_what_is_done(tmp_path):
    class Impatient(NullProgress):
        def show(self, trials, best, n_trials, stop):
            if len(trials) == 2 and trials[1].epochs:
                raise KeyboardInterrupt

    options = {**QUICK, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        search("digits", ONE, **options, progress=Impatient())
    stopped = read(tmp_path)
    assert stopped["status"] == "interrupted"
    with pytest.raises(ValueError, match=r"of a finished search but .* status 'interrupted'"):
        SearchResult.open(tmp_path)
    result = search("digits", ONE, **options)
    assert result.trials[0] == stopped["trials"][0]
    assert [t["state"] for t in result.trials].count("failed") == 0
    assert len(result.trials) == 3
    old = stopped["trials"][1]
    new = next(t for t in result.trials if t["folder"] == old["folder"])
    assert new["epochs"][: len(old["epochs"])] == old["epochs"]  # seconds too: not repeated


CALL = """
import sys
from sfda_tune import search
if __name__ == "__main__":
    search("digits", "demo:resnet_glyphs", trials={trials}, epochs={epochs}, samples=120,
           space={{"lr": {{"low": 0.001, "high": 0.02, "log": True}}}}, out=sys.argv[1])
"""


@pytest.fixture
def start(forked, tmp_path):
    def begin(**options):
        script = tmp_path / "call.py"
        script.write_text(CALL.format(**options))
        return forked([script, tmp_path / "run"], tmp_path / "log")

    return begin


def finish(process, log):
    process.join(120)
    assert process.exitcode == 0, log.read_text()


def wait_for(holds, seconds=90):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if holds():
                return
        except FileNotFoundError:  # not begun yet
            pass
        time.sleep(0.02)
    raise AssertionError("it did not happen")


@pytest.mark.slow
def test_kill_9_loses_at_most_an_epoch(start, tmp_path):
    options = {"trials": 2, "epochs": 12}
    process = start(**options)
    run = tmp_path / "run"
    wait_for(lambda: read(run)["trials"] and len(read(run)["trials"][-1]["epochs"]) > 4)
    process.kill()
    process.join()
    killed = read(run)
    finish(start(**options), tmp_path / "log")
    done = read(run)
    assert done["status"] == "done"
    assert done["stages"][:2] == killed["stages"][:2]  # neither ranked nor shortened again
    assert len(done["trials"]) == 2
    assert {t["state"] for t in done["trials"]} <= {"complete", "pruned"}
    old = killed["trials"][-1]
    (new,) = [t for t in done["trials"] if t["folder"] == old["folder"]]
    assert new["epochs"][: len(old["epochs"])] == old["epochs"]
    assert new["params"] == old["params"]
    assert [e["number"] for e in new["epochs"]] == list(range(len(new["epochs"])))


@pytest.mark.slow
def test_two_processes_share_one_search(start, tmp_path):
    options = {"trials": 12, "epochs": 6}  # enough for one that comes some seconds later
    pair = [start(**options) for _ in range(2)]
    for process in pair:
        finish(process, tmp_path / "log")
    done = read(tmp_path / "run")
    assert done["status"] == "done"
    assert sorted(t["number"] for t in done["trials"]) == list(range(12))
    assert {t["state"] for t in done["trials"]} <= {"complete", "pruned"}
    assert len({t["worker"] for t in done["trials"]}) == 2
    assert [s["name"] for s in done["stages"]].count("rank") == 1


def note_switches(config, number):
    (config.out / f"{number}.json").write_text(json.dumps(get_switches()))


def test_workers_have_pillow_s_switches(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1234)
    config = config_of("digits", out=tmp_path, workers=2, trials=1)
    (worker,) = start_workers(config, lambda job: (), note_switches)
    worker.process.join()
    assert worker.process.exitcode == 0
    assert json.loads((tmp_path / "1.json").read_text()) == get_switches() != {}


@pytest.mark.slow
def test_workers_are_processes_of_the_same_search(tmp_path):
    result = search("digits", ONE, trials=3, epochs=3, samples=60, workers=2, out=tmp_path)
    assert result.summary["status"] == "done"
    assert sorted(t["number"] for t in result.trials) == [0, 1, 2]


@pytest.mark.slow
def test_a_time_budget_is_kept(tmp_path):
    started = time.monotonic()
    result = search("digits", PAIR, budget="20s", epochs=400, samples=300, out=tmp_path)
    assert time.monotonic() - started < 20 + 3
    assert result.summary["status"] == "budget spent"
    assert result.summary["seconds"]["total"] > 12  # it used its time, too
    assert result.test["accuracy"] > 0.8


def test_time_is_left_to_train_the_winner_once_more():
    epochs = [{"number": k, "value": 0.5 + k / 9, "log_loss": 1.0, "seconds": 60.0}
              for k in range(4)]  # fmt: skip
    trial = Trial(0, ONE, {}, value=epochs[-1]["value"], epochs=tuple(epochs))
    todo = Workload("accuracy", {"train": 80, "val": 20, "test": 50}, 0.1, {ONE: 10.0})
    budget = Budget(3600.0, lambda: 0.0)
    to_train = budget.seconds_to_train(todo, [trial])
    assert 4 * 60 * 1.25 < to_train < 4 * 60 * 1.25 + 20
    end = budget.deadline - budget.seconds_to_test(todo, [trial])
    stop = budget.end_of_trials(todo, [trial])
    assert stop + to_train + 30 < end < 3600  # also if the last trial takes its time to stop
    short = Budget(600.0, lambda: 0.0)  # the checkpoint will do
    to_test = short.seconds_to_test(todo, [trial])
    assert short.end_of_trials(todo, [trial]) == pytest.approx(600 - to_test)
    assert Budget(None, lambda: 0.0).end_of_trials(todo, [trial]) == float("inf")


def trial_of(number, backbone, *values, losses=None, **more):
    epochs = tuple(
        {"number": k, "value": v, "log_loss": loss, "train_loss": None, "seconds": 2.0}
        for k, (v, loss) in enumerate(zip(values, losses or [1.0] * len(values), strict=True))
    )
    return Trial(number, backbone, {}, f"{number:05d}", value=max(values), epochs=epochs, **more)


def test_what_follows_from_trials():
    early = trial_of(0, "a", 0.5, 0.9, 0.9, losses=[1.0, 0.5, 0.4], values=(0.9, 5.0))
    late = trial_of(1, "b", 0.9, losses=[0.45], values=(0.9, 3.0))
    trials = [late, early, Trial(2, "a", {}, state="failed")]
    assert find_best(trials, "accuracy", 100) == early  # the lower log-loss at its value
    assert find_best(trials[2:], "accuracy", 100) is None
    assert best_epoch(early, "accuracy")["number"] == 2
    lucky = trial_of(3, "c", 0.92, losses=[0.5])
    assert find_best([*trials, lucky], "accuracy", 100) == early  # less than an error above it
    assert find_best([*trials, lucky], "accuracy", 10_000) == lucky
    assert find_near([*trials, lucky], "accuracy", 100) == [early, late, lucky]
    losses = [trial_of(k, "a", loss, losses=[loss]) for k, loss in enumerate((0.30, 0.29))]
    assert find_best(losses, "log_loss", 10).number == 1
    perfect = [trial_of(k, "a", 1.0, losses=[loss]) for k, loss in enumerate((0.3, 0.2))]
    assert find_best([*perfect, early], "accuracy", 5).number == 1
    assert find_front(trials, ("maximize", "minimize")) == [1]
    costs = {n: {"seconds_per_epoch": seconds_per_epoch(trials, n)} for n in "abc"}
    assert [c["seconds_per_epoch"] for c in costs.values()] == [2.0, None, None]
    # two epochs: of 2 s, of half, and a third as many images per second; one is not known
    speeds = {"a": 60.0, "b": 30.0, "c": 20.0, "d": None}
    assert estimate_everything(trials, costs, speeds) == pytest.approx(2 * (2 + 4 + 6))


def test_trial_and_winner_are_trained_without_a_search(tmp_path):
    config = config_of("digits", ONE, trials=1, epochs=1, samples=60, out=tmp_path)
    inputs, folder = open_inputs(config, None), RunFolder.open(tmp_path)
    costs = {ONE: {"latency_ms": None, "n_params": 7}}
    state = {"trials": [], "stages": [], "costs": costs, "seconds": {"total": 0.0}}
    (tmp_path / "search.json").write_text(json.dumps(state))
    first = Trial(4, ONE, inputs.space.default(), "00004")
    steps = list(train(folder, inputs, first, lambda: False))
    assert [len(t.epochs) for t in steps] == [1, 2]
    assert steps[-1].values == (steps[-1].value,)
    sizes = {name: len(part) for name, part in inputs.parts.items()}
    todo = Workload("accuracy", sizes, 0.0, {ONE: 100.0})
    with pytest.raises(OutOfTimeError):
        list(train(folder, inputs, replace(first, folder="late"), lambda: True))
    late = Budget(1.0, lambda: 5.0)  # an epoch was made, but there is no time for another
    note = train_winner(folder, late, inputs, todo, steps[-1])
    assert note == "the weights of the best trial, for the budget was spent"
    assert read(tmp_path / "model", "provenance.json")["train"]["images"] == sizes["train"]
    note = train_winner(folder, Budget(None, folder.now), inputs, todo, steps[-1])
    assert note.endswith("on training and validation images")
    provenance = read(tmp_path / "model", "provenance.json")
    assert provenance["train"]["images"] == sizes["train"] + sizes["val"]
    assert (provenance["search"]["trial"], provenance["best"]) == (4, None)
    found = evaluate_winner(folder, inputs, steps[-1])
    low, high = found["test_interval"]
    assert low <= found["test"]["accuracy"] <= high
    assert found["latency_ms"] > 0


def test_a_trial_stops_inside_an_epoch():
    (backbone,) = sfda_tune.resolve_backbones(ONE)
    data, asked = open_dataset("digits", samples=100), itertools.count()

    def train(trial):
        config = FinetuneConfig(epochs=50)
        with finetune(backbone, data, config, should_stop=lambda: next(asked) > 120) as run:
            for epoch in run:
                yield Trial(0, ONE, {}, value=epoch.best, epochs=({"seconds": epoch.seconds},))

    done = run_trial(train, Trial(0, ONE, {}, started=time.time()), lambda trial: False)
    assert (done.state, done.error) == ("pruned", None)
    assert done.value is not None
    never = run_trial(lambda trial: no_time(), Trial(0, ONE, {}), lambda trial: False)
    assert (never.state, never.error) == ("failed", "no time for an epoch")


def no_time():
    raise OutOfTimeError
    yield


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_jump_of_the_time_of_day_neither_ends_nor_extends_a_search(tmp_path, monkeypatch, jump):
    now = time.time

    class Setter(NullProgress):
        def enter(self, stage):
            monkeypatch.setattr(time, "time", lambda: now() + jump)

    how = {"trials": 2, "epochs": 1, "samples": 60, "budget": "1h", "cache": False}
    found = search("digits", ONE, **how, out=tmp_path, progress=Setter())
    assert found.summary["status"] == "done"
    assert len(found.trials) == 2
    assert all(0 <= t["seconds"] < 600 for t in found.trials)
    assert all(0 <= s["seconds"] < 600 for s in found.summary["stages"])
    assert 0 < found.summary["seconds"]["total"] < 600


def test_seconds_are_added_up_over_processes_without_the_pauses(tmp_path):
    first = Clock(tmp_path / "seconds.json", known=100.0)
    first.write()
    second = Clock(tmp_path / "seconds.json")  # goes on, or joins
    assert 100 <= second() < 200
    second.write()
    assert first() == pytest.approx(second(), abs=5)
    (tmp_path / "seconds.json").write_text('{"seconds": Infinity}')  # damaged
    assert Clock(tmp_path / "seconds.json")() < 100


def test_seconds_count_from_the_call_on(tmp_path):
    """To import torch takes seconds, which the budget is to hold."""
    with counting():
        begun = time.monotonic()
        with counting():  # of a search that a command called
            while time.monotonic() == begun:
                pass
            clock = Clock(tmp_path / "seconds.json")
            assert clock() >= time.monotonic() - begun > 0
    assert Clock(tmp_path / "seconds.json")() < time.monotonic() - begun


def test_a_beat_goes_on_after_a_failure(caplog):
    calls, done = [], threading.Event()

    def call():
        calls.append(0)
        if len(calls) < 3:
            raise OSError("no database")
        done.set()

    with Beat(call, 0.01):
        assert done.wait(20)
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "OSError('no database')" in caplog.text


def test_a_search_leaves_everything_as_it_found_it(tmp_path):
    import optuna
    import torch

    def look():
        return {
            "filters": list(warnings.filters), "random": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "torch": torch.get_rng_state().tolist(), "threads": torch.get_num_threads(),
            "environment": dict(os.environ), "optuna": optuna.logging.get_verbosity(),
            "handlers": {n: list(logging.getLogger(n).handlers) for n in (None, "optuna")},
            "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
            "folder": os.getcwd(), "alive": {t.name for t in threading.enumerate()},
        }  # fmt: skip

    optuna.logging.set_verbosity(optuna.logging.INFO)
    before = look()
    search("digits", ONE, trials=1, epochs=1, samples=60, cache=False, out=tmp_path)
    after = look()
    assert after.pop("alive") <= before.pop("alive")  # another test's threads may end meanwhile
    for name, value in before.items():
        assert after[name] == value, name


class Saboteur(NullProgress):
    """Kills the helpers of a search."""

    def enter(self, stage):
        for process in multiprocessing.active_children() if stage == "tune" else ():
            process.kill()


def test_a_worker_that_fails_is_said(tmp_path):
    how = {"trials": 2, "epochs": 1, "samples": 60, "cache": False, "workers": 2}
    with pytest.warns(UserWarning, match="worker 1 was ended by signal 9, perhaps without memory"):
        found = search("digits", ONE, **how, out=tmp_path, progress=Saboteur())
    assert len(found.trials) == 2
    assert found.summary["status"] == "done"
    assert "worker 1 was ended by signal 9" in found.summary["warnings"][0]


def die_of_an_image(config, number):
    class Deadly:
        def name(self, key):
            return f"{key}.png"

        def __getitem__(self, key):
            if key == 3:  # in this thread, as a decoder would: another may be late
                signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)

    list(Loader(Deadly(), cut(5), list))


def test_a_worker_that_dies_of_an_image_is_said(tmp_path):
    folder = RunFolder.open(tmp_path)
    (tmp_path / "search.json").write_text('{"seconds": {"total": 0}}')
    config = config_of("digits", out=tmp_path, workers=2, trials=1)
    workers = start_workers(config, lambda job: (), die_of_an_image)
    with pytest.warns(UserWarning, match=r"by signal 11 while it decoded 3\.png; move it away"):
        await_workers(workers, folder, Budget(None, folder.now), lambda: 0.0)


def test_a_worker_writes_why_it_fails(tmp_path):
    config = config_of("digits", "demo:nobody", workers=2, out=tmp_path)
    with pytest.raises(BackboneError, match="demo:nobody"):
        work(config, 1)
    assert "BackboneError: " in (tmp_path / "worker-1.txt").read_text()


SECRET = "s3cret"
ADDRESSES = [
    f"postgresql://u:{SECRET}@h/db", f"postgresql://h/db?user=u&password={SECRET}",
    f"mysql+pymysql://u:a@{SECRET}@h/db", f"mysql://h/db?passwd={SECRET}&charset=utf8",
    f"sqlite:///x.db?key={SECRET}", f"postgresql://h:5432/db?password=a@{SECRET}",
    f"mysql://u:p/{SECRET}@h/db", f"mysql://u:p?{SECRET}@h/db", f"redis://:{SECRET}@h:6379/0",
    f"rediss://{SECRET}@h", f"grpc://h:13000?token={SECRET}", f"mssql://h/db;PWD={SECRET}",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3D{SECRET}", f"u:{SECRET}@h",
    f"host=h user=u password={SECRET} dbname=x", f"postgresql://u:{SECRET}%40x@h/db",
    f"postgresql://h/db?pass%77ord={SECRET}", f"postgresql://u:p#{SECRET}@h/db",
]  # fmt: skip


@pytest.mark.parametrize("url", ADDRESSES)
def test_no_address_shows_its_secret(url):
    assert SECRET not in redact(url)
    assert redact(redact(url)) == redact(url)
    other = url.replace(SECRET, "another")
    assert redact(other) == redact(url)  # with a new password the same search goes on
    with pytest.raises(RuntimeError, match=r"OSError: no answer") as raised, without_secrets(url):
        raise OSError(f"no answer from {url}, with {SECRET}")
    assert SECRET not in str(raised.value)
    assert raised.value.__suppress_context__


def test_addresses_without_secrets_stay():
    for url in (
        "sqlite:////home/me@work/x.db?timeout=60",
        "postgresql://h:5432/db?sslmode=require",
        "auto",
        "10.0.0.1:6379",
        "ray://h:10001",
    ):
        assert redact(url) == url


def test_a_storage_with_a_key_is_written_nowhere_and_goes_on(tmp_path):
    url = f"sqlite:///file:{tmp_path / 's.db'}?uri=true&key={SECRET}&check_same_thread=false"
    how = {"epochs": 1, "samples": 60, "cache": False, "out": tmp_path / "run"}
    search("digits", ONE, trials=1, storage=url, **how)
    more = search("digits", ONE, trials=2, storage=url.replace(SECRET, "another"), **how)
    assert len(more.trials) == 2
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    with pytest.raises(ValueError, match=r"with storage .* but now storage is None"):
        search("digits", ONE, trials=2, **how)
    config = read(tmp_path / "run", "config.json")  # as an earlier version wrote it
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "storage": url}))
    search("digits", ONE, trials=2, storage=url, **how)
    assert SECRET not in (tmp_path / "run" / "config.json").read_text()


# What can go wrong ------------------------------------------------------------------------------
def test_one_bad_backbone_and_one_bad_trial_do_not_end_the_search(tmp_path, monkeypatch):
    shutil.copytree(demo.folder("resnet_glyphs"), tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights")
    space = {"optimizer": ["adamw", "fusedsgd"], "lr": {"low": 0.001, "high": 0.01}}  # needs apex
    result = search(
        "digits", [ONE, f"local-dir:{tmp_path / 'broken'}"], trials=6, epochs=1, samples=60,
        space=space, out=tmp_path / "run",
    )  # fmt: skip
    assert result.summary["excluded"].keys() == {"broken"}
    note = result.summary["stages"][0]["note"]
    assert note.startswith("1 of 2 backbones ranked; without broken: ")
    assert result.summary["excluded"]["broken"] in note
    by_optimizer = {t["params"]["optimizer"]: t for t in result.trials}
    assert by_optimizer["fusedsgd"]["state"] == "failed"
    assert by_optimizer["fusedsgd"]["error"]
    assert result.best["backbone"] == ONE


def test_constraints_leave_backbones_out(tmp_path):
    result = search("digits", PAIR, **QUICK, max_params=100e3, out=tmp_path / "a")
    assert list(result.ranking) == ["demo:regnet_shapes"]
    assert result.summary["excluded"] == {ONE: "0.195 M parameters > 0.1 M"}
    with pytest.raises(ValueError, match=r"`storage` must be a URL .*dialects:abacus"):
        search("digits", PAIR, **QUICK, storage="abacus://x", out=tmp_path / "b")
    with pytest.raises(ValueError, match=r"all 2 are excluded; .* > 1e-06 ms on this device"):
        search("digits", PAIR, **QUICK, max_latency=1e-6, out=tmp_path / "b")


def test_the_best_of_each_kind_of_evidence_is_tuned():
    names = ["resnet18.a1_in1k", "resnet50.a1_in1k", "resnet101.a1_in1k", "resnet152.a1_in1k"]
    scored = Ranking([Score(n, v) for n, v in zip(names, (0.9, 0.8, 0.7, 0.1), strict=True)])
    found = order_by_forecast(scored)
    by_both, by_prior, by_score = next(iter(found)), names[3], names[0]
    assert by_both not in (by_prior, by_score)
    assert choose_survivors(found, 1) == [by_both]
    assert set(choose_survivors(found, 2)) == {by_both, by_prior}
    assert set(choose_survivors(found, 3)) == {by_both, by_prior, by_score}
    assert choose_survivors(found, 9) == list(found)
    assert choose_survivors(scored, 2) == names[:2]


def test_it_says_how_likely_the_best_is_tuned(tmp_path):
    names = ("a", "b", "c")
    for name in names:  # three times the same network: equal scores
        shutil.copytree(demo.folder("resnet_glyphs"), tmp_path / name)
    result = search(
        "digits", [str(tmp_path / n) for n in names], **QUICK, keep=2, out=tmp_path / "r"
    )
    state = result.summary
    assert state["separable"] is False
    said = "are tuned; the best is one of them with probability 0.6"
    assert state["decision"].startswith(f"of 3 backbones, a, b {said}")
    assert "with .95 one of 3: a larger keep tunes more; 3 backbones have" in state["decision"]
    assert state["survivors"] == ["a", "b"]
    assert {t["backbone"] for t in state["trials"]} <= {"a", "b"}


def test_two_objectives_give_a_front(tmp_path):
    result = search(
        "digits", PAIR, trials=4, epochs=1, samples=120, objective=("accuracy", "params"),
        max_latency=1e6, out=tmp_path,
    )  # fmt: skip
    trials = {t["number"]: t for t in result.trials}
    front = [trials[n]["values"] for n in result.summary["front"]]
    assert front
    for value, params in front:
        better = [t["values"] for t in trials.values() if t["values"][0] > value]
        assert all(p > params for _, p in better)
    assert result.best["val"]["accuracy"] == max(t["value"] for t in trials.values())
    costs = result.summary["costs"]
    assert trials[0]["values"][1] == costs[trials[0]["backbone"]]["n_params"]
    # measured once
    assert result.best["latency_ms"] == costs[result.best["backbone"]]["latency_ms"] > 0


def test_a_network_of_ones_own_and_a_test_part_of_its_own(tmp_path):
    data = open_dataset("digits", samples=100)
    for row in range(100):
        part = "test" if row % 4 == 0 else "train"
        folder = tmp_path / "data" / part / f"class {data.classes[data.labels[row]]}"
        folder.mkdir(parents=True, exist_ok=True)
        data.load(row).save(folder / f"{row}.png")
    import timm

    module = timm.create_model(f"local-dir:{demo.folder('resnet_glyphs')}", pretrained=True)
    transform = sfda_tune.backbones.loading.load(sfda_tune.resolve_backbones(ONE)[0])[1].build()
    module.reset_classifier(0)
    own = Backbone("mine", load=lambda: (module, lambda image: transform(image).float() / 255))
    result = search(tmp_path / "data", own, trials=1, epochs=1, out=tmp_path / "run")
    assert read(tmp_path / "run", "splits.json")["test_source"] == "own part"
    assert result.summary["n_images"] == {"test": 25, "val": 15, "train": 60}
    assert result.test["accuracy"] > 0.3
    shutil.rmtree(tmp_path / "data" / "train" / "class 3")
    with pytest.raises(DatasetError, match="classes that the training images lack: class 3"):
        search(tmp_path / "data", own, trials=1, out=tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "soon"}, "`budget` must be a time such as '2h'"),
        ({"budget": "-5"}, "`budget` must be"),
        ({"trials": 0}, "`trials` must be an integer ≥ 1 but is 0"),
        ({"workers": None}, "`workers` must be an integer ≥ 1"),
        ({"keep": 1.5}, "`keep` must be an integer ≥ 1"),
        ({"objective": "speed"}, "`objective` must be one of"),
        ({"metric": "auc"}, "`metric` must be one of"),
        ({"test": 1.5}, r"`test` must be in \(0, 1\)"),
        ({"max_params": -1}, "`max_params` must be a number > 0"),
        ({"max_params": np.inf}, "`max_params` must be a number > 0 but is inf"),
        ({"max_latency": "5ms"}, "`max_latency` must be a number > 0 but is '5ms'"),
        ({"seed": 2**40}, "`seed` must be an integer in 0 … 4294967295"),
        ({"progress": "x"}, "`progress` must be True, False, or an object with"),
        ({"engine": "abacus"}, "`engine` must be one of optuna"),
        ({"space": {"epochs": 3}}, "'epochs', which is an argument of the search"),
        ({"space": {"rate": 3}}, "must only have the fields .* but has 'rate'"),
        ({"space": {"lr": {"low": 0.1, "high": 0.01}}}, "'lr' must be {low: number"),
        ({"space": {"lr": {"low": 0, "high": 1, "log": True}}}, "with log low > 0"),
        ({"space": {"freeze": ["none", "head"]}}, "`space`: `freeze` must be one of"),
        ({"space": {"freeze": []}}, "at least one choice"),
        ({"space": "nowhere.yaml"}, "cannot be read"),
    ],
)
def test_bad_arguments_are_named_before_any_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        search("digits", ONE, **options, out=tmp_path / "run")
    assert not (tmp_path / "run" / "search.json").exists()


def test_what_cannot_be_sent_is_refused(tmp_path):
    module, half = sfda_tune.backbones.loading.load(Backbone(ONE))
    own = Backbone("mine", load=lambda: (module, half.build()))
    with pytest.raises(ValueError, match=r"`workers` must be 1 but is 2: .* instead of lambdas"):
        search("digits", own, samples=60, workers=2, out=tmp_path)


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`out` must be a folder"):
        search("digits", ONE, out=tmp_path / "file")


# Space, budget, board, command line -------------------------------------------------------------
def test_a_space_from_yaml(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(
        "lr: {low: 1e-3, high: 0.005, log: true}\nbatch_size: {low: 8, high: 16}\n"
        "freeze: [backbone]\noptimizer: adamw\naugmentation: {no_aug: true}\n"
    )
    space = open_space(file)
    assert space.default() == {"lr": 0.001, "batch_size": 16, "freeze": "backbone"}
    config = space.config({"lr": 0.002}, epochs=1)
    assert (config.optimizer, config.augmentation) == ("adamw", {"no_aug": True})
    assert open_space(space.to_dict()) == space
    assert open_space(space) is space


def test_default_spaces_hold_the_default_configuration():
    defaults = FinetuneConfig()
    for n in (100, 10_000):
        space = default_space(n)
        assert all(getattr(defaults, k) == v for k, v in space.default().items())


def test_the_board_shows_stage_trials_and_time_left():
    from io import StringIO

    from rich.console import Console

    board = SearchProgress(Console(file=(text := StringIO()), width=100))
    board.enter("rank")
    board.plan({"vit": (100, 2.0)})
    board.start(100, 0)
    board.advance("vit", 50)
    assert board.rich.tasks[0].description == "rank: vit, 0 of 1 backbones"
    assert board.rich.tasks[0].fields["left"].startswith("ETA 0:00:0")
    board.leave("rank", "2 backbones ranked")
    assert "2 backbones ranked" in text.getvalue()
    board.enter("tune")
    trials = [Trial(0, "vit", {}, state="complete", value=0.9), Trial(1, "vit", {})]
    board.show(trials, trials[0], 4, float("inf"))
    assert board.rich.tasks[0].description == "tune: 1 of 4 trials, best 0.9000 by vit (trial 0)"
    board.show(trials, trials[0], None, time.time() + 3600)
    assert board.rich.tasks[0].fields["left"] in ("ETA 1:00:00", "ETA 0:59:59")


@pytest.mark.parametrize("decoders", [0, 2])
def test_so_many_processes_decode(photos, toy_zoo, tmp_path, monkeypatch, decoders):
    started, start = set(), loader._start
    monkeypatch.setattr(loader, "_start", lambda *how: started.add(how[2]) or start(*how))
    how = {"trials": 1, "epochs": 1, "device": "cpu", "cache": False, "out": tmp_path / "run"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few images
        search(photos, toy_zoo / "resnet", decoders=decoders, **how)
    assert started <= {decoders, min(decoders, 1)}  # fewer for a part of few images
    assert bool(started) == bool(decoders)
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert told["decoders"] == decoders


def test_the_command_line(tmp_path, capsys, monkeypatch):
    import torch

    from sfda_tune.cli.main import main

    real, used = torch.set_num_threads, []
    monkeypatch.setattr(torch, "set_num_threads", lambda n: used.append(n) or real(n))
    run, images = tmp_path / "run", tmp_path / "images"
    command = "search digits --trials 1 --epochs 1 --samples 60 -q --threads 3 --out"
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), str(run), "--backbones", ONE])
    assert 3 in used
    assert "threads: 3" in (run / "config.yaml").read_text()
    out, err = capsys.readouterr()
    assert f"{ONE}, trial 0" in out
    found = SearchResult.open(run)
    low, high = found.best["test_interval"]
    assert f"{found.test['accuracy']:.4f} (95 %: {low:.4f} to {high:.4f})" in out
    assert "The only ranked backbone is tuned." in out
    assert f"Next: sfda-tune predict {run} IMAGES" in " ".join(err.split())
    images.mkdir()
    data = open_dataset("digits")
    for row in range(3):
        data.load(row).save(images / f"{row}.png")
    with pytest.raises(SystemExit, match="0"):
        main(["predict", str(run), str(images), "--csv", str(tmp_path / "p.csv"), "--threads=4"])
    assert 4 in used
    shown = capsys.readouterr().out.splitlines()
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["item"] for row in rows] == [str(images / f"{k}.png") for k in range(3)]
    p = SearchResult.open(run).predict(images)
    for row, line, probabilities in zip(rows, shown, p, strict=True):
        assert row["predicted"] == data.classes[probabilities.argmax()]
        assert float(row["confidence"]) == pytest.approx(probabilities.max(), rel=1e-4)
        assert row["predicted"] in line
    with pytest.raises(SystemExit, match="1"):
        main(["predict", str(tmp_path), str(images)])
    assert "must be that of a finished search" in capsys.readouterr().err


# Parts and unreadable images --------------------------------------------------------------------
def save_digits(root, n=60, part=""):
    """Write images of two digits as ``root[/part]/class/row.png``."""
    data = open_dataset("digits")
    for row in np.flatnonzero(data.labels < 2)[:n]:
        folder = root / part / data.classes[data.labels[row]]
        folder.mkdir(parents=True, exist_ok=True)
        data.load(row).save(folder / f"{row}.png")
    return root


def split_up(root, **options):
    given = dict.fromkeys(("split", "image_column", "label_column", "samples", "test"))
    return split_images({**given, "dataset": root, "seed": 0, **options})


def test_own_parts_are_used(tmp_path):
    for part, n in (("Training", 20), ("dev", 10), ("tst", 8)):
        save_digits(tmp_path, n, part)
    (tmp_path / "tst" / "0").rename(tmp_path / "elsewhere")
    shutil.move(tmp_path / "elsewhere", tmp_path.parent / "elsewhere")
    parts, _, sources = split_up(tmp_path)
    assert [len(parts[p]) for p in ("train", "val")] == [20, 10]
    assert set(parts["test"].labels) == {1}  # of one class: it can be tested on
    assert set(sources.values()) == {"own part"}
    parts, _, sources = split_up(tmp_path, test=0.25)
    assert (len(parts["test"]), sources["test"], sources["val"]) == (5, "held out", "own part")
    sources = split_up(tmp_path, split="train")[2]
    assert sources == {"train": "own part", "val": "held out", "test": "held out"}


def test_all_own_parts_are_sampled_alike(tmp_path):
    for part, n in (("train", 40), ("val", 20), ("test", 12)):
        save_digits(tmp_path, n, part)
    parts, rows, _ = split_up(tmp_path, samples=10)
    assert {name: len(part) for name, part in parts.items()} == {"train": 10, "val": 5, "test": 3}
    assert split_up(tmp_path, samples=10)[1] == rows
    assert {n: len(p) for n, p in split_up(tmp_path, samples=99)[0].items()}["val"] == 20


@pytest.mark.parametrize("part", ["val", "test"])
@pytest.mark.parametrize("fault", ["flat", "empty", "unknown"])
def test_own_parts_that_cannot_be_used_are_refused(tmp_path, part, fault):
    save_digits(tmp_path, 20, "train")
    (tmp_path / part).mkdir()
    if fault == "flat":
        shutil.copy(next(tmp_path.glob("train/*/*.png")), tmp_path / part)
    if fault == "unknown":
        shutil.copytree(tmp_path / "train" / "0", tmp_path / part / "nobody")
    message = f"has a part '{part}' that cannot be used: .* or pass (test=0.2|split='train')"
    with pytest.raises(DatasetError, match="nobody" if fault == "unknown" else message):
        split_up(tmp_path)
    assert len(split_up(tmp_path, split="train")[0]["train"]) == 13


def test_unreadable_images_are_counted_once_for_all(tmp_path):
    root = save_digits(tmp_path / "data")
    bad = sorted(root.glob("*/*.png"))[::12]
    for path in bad:
        path.write_bytes(b"")
    run = tmp_path / "run ?[1]#x%41"  # what stands for something in patterns and URLs
    quick = {"trials": 1, "epochs": 1, "cache": False, "out": run}
    with pytest.raises(DatasetError, match="5 of the 60 images cannot be read, more than max_un"):
        search(root, ONE, **quick, max_unreadable=0.08)
    assert not (run / "config.json").exists()
    result = search(root, ONE, **quick)
    state = read(run)
    assert sorted(state["unreadable"]) == sorted(map(str, bad))
    assert sum(state["n_images"].values()) == 55
    assert result.images == (
        "Images: trained on 35, validated on 9 (held out of the training images), tested on 11 "
        "(held out of the training images); left out as unreadable: 5"
    )
    assert result.images in (run / "report.html").read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", run.name]
    assert (run / "study.db").is_file()
    rows = read(run, "splits.json")
    used = {row for part in ("train", "val", "test") for row in rows[part]}
    assert used.isdisjoint(rows["left_out"]["train"])
    assert len(used) == 55
    again = search(root, ONE, **quick, max_unreadable=0)  # they were looked for when it began
    assert again.summary["trials"] == result.summary["trials"]


def test_a_search_among_its_images_is_refused(tmp_path):
    root = save_digits(tmp_path / "data", 20)
    (tmp_path / "link").symlink_to(root)
    for out in (root, root / "run", tmp_path / "link" / "a" / "b"):
        with pytest.raises(ValueError, match="`out` must not lie in the folder of the images"):
            search(root, ONE, out=out)
        with pytest.raises(ValueError, match="`out` must not lie in the folder of the images"):
            search("digits", ONE, test=root, out=out)
    with pytest.raises(ValueError, match="`out` must be a name in UTF-8"):
        search("digits", ONE, out=tmp_path / "caf\udce9")
    assert sorted(p.name for p in root.iterdir()) == ["0", "1"]


# Predictions ------------------------------------------------------------------------------------
NAMES = ["=1+1.png", "-cmd.png", "@a.png", "'quote.png", "a,b;c.png", "new\nline.png",
         "\x1b[31mred.png", "[red].png", "a*[1]?.png", "\u202egnp.png",
         "caf\udce9.png"]  # fmt: skip


@pytest.fixture
def new_images(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    for name in NAMES:
        open_dataset("digits").load(0).save(folder / name, "png")
    return folder


def predict_here(*arguments, code=0):
    from sfda_tune.cli.main import main

    with pytest.raises(SystemExit) as done:
        main(["predict", *map(str, arguments)])
    assert done.value.code == code


def test_no_name_loses_a_prediction_or_reaches_the_terminal(found, new_images, tmp_path, capsys):
    table = tmp_path / "p.csv"
    predict_here(found.folder, new_images, "--csv", table)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == len(NAMES)
    assert shown.replace("\n", "").isprintable()
    with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    items = [read_csv_cell(row["item"]) for row in rows]
    assert sorted(items) == sorted(str(new_images / name) for name in NAMES)
    assert all(float(row["confidence"]) > 0 for row in rows)


def test_cells_that_spreadsheets_run(found, new_images, tmp_path, monkeypatch):
    monkeypatch.chdir(new_images)
    predict_here(found.folder, "--csv", tmp_path / "p.csv", "--", *NAMES[:4])
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [
        "'=1+1.png", "'-cmd.png", "'@a.png", "'quote.png",
    ]  # fmt: skip
    assert all(0 < float(line.split(",")[2]) <= 1 for line in lines[1:])


def test_predict_finds_what_rank_finds(found, tmp_path, capsys):
    image = open_dataset("digits").load(0)
    for name in ("b10.png", "b9.PNG", "sub/c.png", ".hidden/x.png", "__MACOSX/x.png", ".x.png",
                 "sub/@eaDir/x.png", "../linked/d.png"):  # fmt: skip
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "new" / name, "png")
    (tmp_path / "new" / "album.jpg").mkdir()
    (tmp_path / "new" / "link").symlink_to(tmp_path / "linked")
    predict_here(found.folder, tmp_path / "new")
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    found_too = ["b9.PNG", "b10.png", "link/d.png", "sub/c.png"]
    assert names == [str(tmp_path / "new" / name) for name in found_too]


def test_predict_takes_patterns_and_tables_and_writes_json(found, tmp_path, capsys):
    data = open_dataset("digits")
    for row in range(4):
        data.load(row).save(tmp_path / f"{row}.png")
    (tmp_path / "list.csv").write_text("path,split\n1.png,a\n3.png,b\n")
    out = tmp_path / "p.jsonl"
    predict_here(
        found.folder, tmp_path / "[01].png", tmp_path / "list.csv", "--jsonl", out, "--json"
    )
    told = json.loads(capsys.readouterr().out)
    assert told == [json.loads(line) for line in out.read_text().splitlines()]
    assert [os.path.basename(r["item"]) for r in told] == ["0.png", "1.png", "1.png", "3.png"]
    p = found.predict([tmp_path / "0.png"])[0]
    assert list(told[0]["probabilities"].values()) == pytest.approx(p.tolist(), rel=1e-4)
    assert told[0]["predicted"] == found.classes[p.argmax()]
    (tmp_path / "list.csv").write_text("path\n\n")
    predict_here(found.folder, tmp_path / "none*.png", code=1)
    assert "holds no image files" in capsys.readouterr().err


def test_predictions_are_written_as_they_become_known(found, tmp_path, monkeypatch, capsys):
    image = open_dataset("digits").load(0)
    files = [tmp_path / f"{k}.png" for k in range(40)]
    for file in files:
        image.save(file)
    files[3].write_bytes(b"no image")
    forward, calls = predictions.forward, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) > 1:
            raise MemoryError("no memory left")
        return forward(*args)

    monkeypatch.setattr(predictions, "forward", fail_later)
    predict_here(found.folder, *files, "--csv", tmp_path / "p.csv", code=1)
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["item"] for row in rows] == list(map(str, files[:32]))
    assert [k for k, row in enumerate(rows) if not row["predicted"]] == [3]
    shown = capsys.readouterr()
    assert "3.png  cannot be read: is not an image" in shown.out
    assert "no memory left" in shown.err
    monkeypatch.undo()
    predict_here(found.folder, files[0], "--csv", tmp_path / "none" / "p.csv", code=1)
    assert "--csv: there is no folder" in capsys.readouterr().err


def test_a_full_disk_loses_no_prediction_that_is_shown(found, new_images, capsys):
    predict_here(found.folder, new_images, "--csv", "/dev/full", code=1)
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == len(NAMES)
    assert "'/dev/full' could not be written to the end (No space left on device)" in shown.err


def test_the_winner_is_as_far_from_its_start_as_its_trial_was(tmp_path, monkeypatch):
    """Its weights are those between start and end that the validation images preferred."""
    monkeypatch.setattr(finetuning, "INTERPOLATIONS", (0.5,))
    taken = []
    true = FixedLengthFineTuning.interpolate
    monkeypatch.setattr(
        FixedLengthFineTuning,
        "interpolate",
        lambda run, part: taken.append(part) or true(run, part),
    )
    found = search(
        "digits", "demo:vit_untrained", trials=1, epochs=2, samples=200, cache=False, device="cpu",
        out=tmp_path / "run",
    )  # fmt: skip
    epochs = found.trials[0]["epochs"]
    assert [e["interpolation"] for e in epochs] == [1.0, 1.0, 0.5]
    assert found.best["epochs"] == 2
    assert taken == [0.5]
