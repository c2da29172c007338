"""Figures, and the dashboard: the real server, looked at with a real browser."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.request
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest
from optuna_dashboard import get_note, save_note, wsgi
from optuna_lab import NAMES, VALUES, make_trial, objective
from PIL import Image
from sfda_tune_optuna import (
    CalibrationCallback,
    SFDASampler,
    SFDAWarning,
    plot_backbone_ranking,
    plot_proxy_calibration,
    publish_to_dashboard,
)
from sfda_tune_optuna.plots import get_calibration_info, get_ranking_info
from sfda_tune_optuna.plots import matplotlib as twins

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def make_study(n=0, direction="maximize", **options):
    options = {"direction": direction} | options
    study = optuna.create_study(**options, sampler=SFDASampler(VALUES, seed=0))
    sign = 1 if direction == "maximize" else -1
    study.optimize(lambda trial: sign * objective(trial), n_trials=n)
    return study


@pytest.mark.parametrize("plot", [plot_backbone_ranking, twins.plot_backbone_ranking])
@pytest.mark.parametrize("n", [0, 1, 12])
def test_ranking_with_any_number_of_trials(plot, n):
    study = make_study(n)
    plot(study, ranking=VALUES)
    info = get_ranking_info(study, VALUES, top=4)
    assert info.names == ("a", "b", "c", "d")
    assert info.title == "Backbones by score (2 more)"
    counts = [sum(t.params["backbone"] == name for t in study.trials) for name in "abcd"]
    assert info.tried == tuple(count > 0 for count in counts)
    for count, label in zip(counts, info.labels, strict=True):
        assert label.startswith(f"{count} trial{'' if count == 1 else 's'}, " if count else "")


@pytest.mark.parametrize("plot", [plot_proxy_calibration, twins.plot_proxy_calibration])
@pytest.mark.parametrize("n", [0, 1, 12])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_calibration_with_any_number_of_trials(plot, n, direction):
    study = make_study(n, direction)
    study.add_trial(make_trial("b", 0.5, state="PRUNED", intermediate_values={0: 0.5}))
    study.add_trial(make_trial("c", state="PRUNED", user_attrs={"sfda:gated": True}))
    study.add_trial(make_trial("d", state="FAIL"))
    plot(study, ranking=VALUES)
    info = get_calibration_info(study, VALUES)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    tried = {t.params["backbone"] for t in done} | {"b"}
    assert set(info.names) == tried
    best = max if direction == "maximize" else min
    for name, value in zip(info.names, info.best, strict=True):
        values = [t.value for t in done if t.params["backbone"] == name]
        assert value == best(values or [0.5]) or name == "b"
    assert [(value, text) for _, value, text in info.others] == [(0.5, "b, pruned")]
    assert len(info.line) == (2 if len(tried) >= 3 else 0)


@pytest.mark.parametrize("plot", [plot_proxy_calibration, twins.plot_proxy_calibration])
def test_an_empty_study_gives_an_empty_figure_and_a_warning(plot):
    with pytest.warns(SFDAWarning, match="no complete trial"):
        plot(optuna.create_study(), ranking=VALUES)
    with pytest.raises(ValueError, match="must hold a ranking but has none"):
        plot(optuna.create_study())


@pytest.mark.parametrize("plot", [plot_backbone_ranking, twins.plot_backbone_ranking])
def test_scores_that_are_no_numbers_are_left_out(plot):
    scores = {**VALUES, "a": float("nan"), "b": float("inf")}
    study = make_study(3)
    plot(study, ranking=scores)
    info = get_ranking_info(study, scores, top=9)
    assert (info.names, info.title) == (tuple("cdef"), "Backbones by score (2 more)")
    publish_to_dashboard(study, ranking=scores)
    assert "| 1 | c |" in get_note(study)


@pytest.mark.parametrize("module", ["plotly", "matplotlib"])
def test_several_objectives_show_the_first(module):
    study = optuna.create_study(directions=["minimize", "maximize"])
    for i, name in enumerate(NAMES):
        study.add_trial(make_trial(name, values=[float(i), -5.0]))
    if module == "matplotlib":
        axes = twins.plot_proxy_calibration(study, ranking=VALUES)
        assert axes.get_ylabel() == "value"
    else:
        figure = plot_proxy_calibration(study, ranking=VALUES)
        assert dict(zip(figure.data[0].text, figure.data[0].y, strict=True)) == dict(
            zip(NAMES, map(float, range(6)), strict=True)
        )


# Dashboard ---------------------------------------------------------------------------------------
class Quiet(WSGIRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def dashboard():
    """A published study with a note of its user's, and the address of the real dashboard."""
    storage = optuna.storages.InMemoryStorage()
    study = make_study(1, storage=storage)
    save_note(study, "my own words")
    callback = CalibrationCallback(every=5, dashboard=True)
    study.optimize(objective, n_trials=19, callbacks=[callback])
    server = make_server("127.0.0.1", 0, wsgi(storage), handler_class=Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield study, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_dashboard_serves_what_was_published(dashboard):
    study, address = dashboard
    with urllib.request.urlopen(f"{address}/api/studies/0", timeout=30) as answer:
        data = json.load(answer)
    assert {g["id"] for g in data["plotly_graph_objects"]} == {"sfda-ranking", "sfda-calibration"}
    assert data["note"]["body"] == get_note(study)


def test_publishing_again_replaces_and_keeps_the_users_words(dashboard):
    study, _ = dashboard
    save_note(study, get_note(study) + "\nwritten below")
    for top in (3, 2):
        publish_to_dashboard(study, top=top)
    note = get_note(study)
    assert note.startswith("my own words\n\n")
    assert note.endswith("\nwritten below")
    assert note.count("## Backbones by score") == 1
    assert "| 2 | b | 0.8 |" in note
    assert "| 3 | c |" not in note
    assert "Calibration: slope " in note


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_it(dashboard, tmp_path):
    """Looked at by hand once; here: the words are in the page, blue bars in the picture."""
    _, address = dashboard

    def browse(page, *options):
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--window-size=1400,2000", "--virtual-time-budget=20000",
            f"--user-data-dir={tmp_path}/profile", *options,
            f"{address}/dashboard/studies/0{page}",
        ]  # fmt: skip
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    page = browse("", "--dump-dom")
    for words in ("Backbones by score", "Scores against values: slope", " trials, best 0."):
        assert words in page
    note = browse("/note", "--dump-dom")
    assert "my own words" in note
    assert "<h2>Backbones by score</h2>" in note
    assert "sfda_tune begins" not in note.partition("<body")[2].partition("<script")[0]
    browse("", f"--screenshot={tmp_path}/page.png")
    with Image.open(tmp_path / "page.png") as picture:
        colours = {c: n for n, c in picture.convert("RGB").getcolors(1 << 24)}
    assert colours.get((0x35, 0x72, 0xB0), 0) > 2000
