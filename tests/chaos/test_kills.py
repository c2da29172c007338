"""`kill -9` at random moments, then the same command again."""

import json
import random
import time

import optuna
import pytest
from chaos_lab import BACKBONES, essence, trials
from optuna.trial import TrialState

from sfda_tune.finetuning.config import FinetuneConfig

SEARCH = ["--epochs", 2, "--samples", 60, "--keep", 2, "--device", "cpu", "-q"]
DONE = ("complete", "pruned")


def disturb(rng, kill, command, log, seconds):
    """Kill a command one to three times."""
    for _ in range(rng.randint(1, 3)):
        kill(command, log, rng.uniform(0, seconds), everything=rng.random() < 0.7)


# Rank -------------------------------------------------------------------------------------------
def rank(photos, folder, workers):
    return [
        "rank", photos, "--backbones", *BACKBONES, "--decoders", workers, "--device", "cpu", "-q",
        "--cache", folder / "cache", "--out", folder / "r.json",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(finish, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    seconds = {}
    for workers in (0, 2):
        (folder / f"{workers}").mkdir()
        begun = time.monotonic()
        finish(rank(photos, folder / f"{workers}", workers), folder / "log")
        seconds[workers] = time.monotonic() - begun
    return essence(folder / "0" / "r.json"), seconds


@trials(3)
def test_rank(seed, undisturbed, finish, kill, photos, tmp_path):
    expected, seconds = undisturbed
    rng = random.Random(seed)
    workers = rng.choice((0, 2))
    command = rank(photos, tmp_path, workers)
    disturb(rng, kill, command, tmp_path / "log", seconds[workers])
    finish(command, tmp_path / "log")
    assert essence(tmp_path / "r.json") == expected


# Search -----------------------------------------------------------------------------------------
def search(folder, n, workers=1):
    command = ["search", "digits", "--backbones", *BACKBONES[:2], "--trials", n, *SEARCH]
    return [*command, "--workers", workers, "--cache", folder / "cache", "--out", folder / "run"]


def check(run, n):
    state = json.loads((run / "search.json").read_text())
    assert state["status"] == "done"
    assert len(state["trials"]) == n
    assert {t["state"] for t in state["trials"]} <= set(DONE)
    defaults = FinetuneConfig()
    for backbone in state["survivors"]:
        assert any(
            t["backbone"] == backbone
            and all(value == getattr(defaults, name) for name, value in t["params"].items())
            for t in state["trials"]
        ), f"the default trial of {backbone} is lost"
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "report.html").is_file()
    return state


@pytest.fixture(scope="module")
def seconds(finish, tmp_path_factory):
    folder, begun = tmp_path_factory.mktemp("undisturbed"), time.monotonic()
    finish(search(folder, 3), folder / "log")
    return time.monotonic() - begun


def check_study(run):
    storage = f"sqlite:///{run / 'study.db'}"
    (summary,) = optuna.get_all_study_summaries(storage)
    states = [t.state for t in optuna.load_study(study_name=summary.study_name, storage=storage)
              .get_trials(deepcopy=False)]  # fmt: skip
    assert not {TrialState.RUNNING, TrialState.WAITING} & set(states)


@trials(3)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of SQLite's connections
def test_search(seed, seconds, finish, kill, tmp_path):
    command = search(tmp_path, 3)
    disturb(random.Random(seed), kill, command, tmp_path / "log", seconds)
    finish(command, tmp_path / "log")
    check(tmp_path / "run", 3)
    check_study(tmp_path / "run")


@trials(1)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_search_with_workers(seed, seconds, finish, kill, tmp_path):
    rng = random.Random(seed)
    command = search(tmp_path, 4, workers=2)
    kill(command, tmp_path / "log", rng.uniform(0.5, 3) * seconds, rng.random() < 0.5)
    finish(command, tmp_path / "log")
    check(tmp_path / "run", 4)
    check_study(tmp_path / "run")
