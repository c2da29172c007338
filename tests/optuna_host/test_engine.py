"""The Optuna engine by itself: which trials it asks for, and what becomes of those of the dead."""

import socket
import threading
import time
from dataclasses import replace

import optuna
import pytest
from filelock import FileLock
from optuna.trial import TrialState
from sfda_tune_optuna.engine import FOLDER, RECORD, open_study, read_trials, tune
from sfda_tune_optuna.history import observe

from sfda_tune.engines import Job, OutOfTimeError, load_engine
from sfda_tune.spaces import open_space

SCORES = {"vit": 3.0, "resnet": 2.0, "alexnet": 1.0}
REACHES = {"vit": 0.7, "resnet": 0.9, "alexnet": 0.5}
SPACE = open_space(
    {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "freeze": ["none", "backbone"]}
)


def learn(trial, n_epochs=3, fails=()):
    """Stand in for fine-tuning: what is tested here is what the engine makes of its results."""
    if trial.backbone in fails:
        raise RuntimeError("out of memory")
    for number in range(len(trial.epochs), n_epochs + 1):
        value = REACHES[trial.backbone] * (1 - 0.5 ** (number + 1)) - 10 * trial.params["lr"]
        epoch = {"number": number, "value": value, "log_loss": 1.0, "seconds": 0.0}
        epochs = (*trial.epochs, epoch | {"train_loss": None})
        trial = replace(trial, epochs=epochs, value=value, values=(value, 5.0))
        yield trial


@pytest.fixture
def job(tmp_path):
    def make(**changes):
        options = {
            "name": "a study", "folder": tmp_path, "scores": SCORES, "space": SPACE,
            "directions": ("maximize",), "n_epochs": 3, "n_trials": 8, "storage": None, "seed": 0,
            "train": lambda t: one_value(learn(t)), "remake": lambda: None,
            "tell": lambda trials: None, "is_over": lambda: False,
        }  # fmt: skip
        return Job(**options | changes)

    return make


def one_value(steps):
    return (replace(t, values=t.values[:1]) for t in steps)


def essence(trials):
    return [(t.number, t.backbone, dict(t.params), t.value, t.state) for t in trials]


def test_it_is_registered():
    assert load_engine("optuna") is tune


def test_defaults_first_then_the_sampler_with_the_same_seed_the_same(job, tmp_path):
    trials = tune(job())
    assert [t.number for t in trials] == list(range(8))
    assert [t.backbone for t in trials[:3]] == list(SCORES)
    assert all(t.params == SPACE.default() for t in trials[:3])
    assert len({t.params["lr"] for t in trials[3:]}) >= 3  # n-th trials of two backbones: paired
    assert {t.state for t in trials} == {"complete", "pruned"}
    (tmp_path / "again").mkdir()
    again = tune(job(folder=tmp_path / "again"))
    assert essence(again) == essence(trials)
    (tmp_path / "other").mkdir()
    assert essence(tune(job(folder=tmp_path / "other", seed=1)))[3:] != essence(trials)[3:]


def test_the_trials_outweigh_the_scores(job):
    trials = tune(job(n_trials=25))
    tried = [t.backbone for t in trials]
    assert tried.count("resnet") > tried.count("vit")  # the scores said otherwise


def test_weak_trials_are_pruned_and_their_epochs_kept(job):
    trials = tune(job(n_trials=12))
    pruned = [t for t in trials if t.state == "pruned"]
    assert pruned
    assert all(0 < len(t.epochs) < 4 for t in pruned)
    assert all(len(t.epochs) == 4 for t in trials if t.state == "complete")


def test_a_failure_is_evidence_and_no_end(job):
    told = []
    trials = tune(
        job(train=lambda t: one_value(learn(t, fails=("vit",))), tell=lambda ts: told.append(ts))
    )
    failed = [t for t in trials if t.state == "failed"]
    assert {(t.backbone, t.error) for t in failed} == {("vit", "RuntimeError: out of memory")}
    assert len(failed) < 4
    assert told[-1] == trials


def test_no_time_is_no_evidence(job):
    def late(trial):
        raise OutOfTimeError
        yield

    clock = iter([False, True])
    limited = job(train=late, is_over=lambda: next(clock))
    (only,) = tune(limited)
    assert (only.state, only.error) == ("failed", "no time for an epoch")
    study = open_study(limited)
    assert study.trials[0].state == TrialState.FAIL
    assert observe(study, study.trials[:1], "backbone") == []


def test_the_trial_of_a_dead_worker_goes_on_in_its_folder(job):
    def die(trial):
        yield next(one_value(learn(trial)))
        raise KeyboardInterrupt  # leaves as a killed process does: running, its lock free

    with pytest.raises(KeyboardInterrupt):
        tune(job(train=die))
    study = open_study(job())
    assert study.trials[0].state == TrialState.RUNNING
    seen = []
    trials = tune(job(train=lambda t: seen.append(t) or one_value(learn(t))))
    assert len(trials) == 8
    assert seen[0].backbone in SCORES
    (heir,) = [t for t in trials if t.folder == "00000"]
    assert heir.number > 0
    assert (heir.backbone, heir.params) == ("vit", SPACE.default())
    dead = study.trials[0]
    assert dead.state == TrialState.FAIL
    assert observe(study, [dead], "backbone") == []  # nothing against the backbone


def test_the_trial_of_a_living_worker_is_left_alone(job, tmp_path):
    study = open_study(job(n_trials=1))
    ours = study.ask()
    ours.suggest_categorical("backbone", sorted(SCORES))
    ours.set_user_attr(RECORD, record(0, "00000"))
    (tmp_path / "trials" / "00000").mkdir(parents=True)
    with FileLock(tmp_path / "trials" / "00000" / "worker.lock"):
        worker = threading.Thread(target=tune, args=(job(n_trials=1),))
        worker.start()
        time.sleep(1.5)
        assert worker.is_alive()  # it waits
        assert len(study.trials) == 1
        ours.set_user_attr(RECORD, record(0, "00000", state="complete"))
        study.tell(ours, 0.5)
    worker.join(timeout=20)
    assert not worker.is_alive()


def record(number, folder, state="running", started=0.0):
    return {
        "number": number, "backbone": "vit", "params": {}, "folder": folder, "state": state,
        "value": None, "values": None, "started": started, "seconds": None,
        "worker": f"{socket.gethostname()}:0", "error": None, "epochs": [],
    }  # fmt: skip


def test_a_trial_on_another_machine_is_left_alone_until_it_is_stale(job):
    started = time.time()
    until = started + 2.5
    limited = job(n_trials=1, is_over=lambda: time.time() > until)
    study = open_study(limited)
    ours = study.ask()
    ours.suggest_categorical("backbone", sorted(SCORES))
    ours.set_user_attr(RECORD, record(0, "elsewhere", started=started))
    (waiting,) = tune(limited)
    assert waiting.state == "running"
    assert study.trials[0].state == TrialState.RUNNING


def test_two_objectives(job):
    trials = tune(job(directions=("maximize", "minimize"), train=learn, n_trials=5))
    assert {t.state for t in trials} == {"complete"}
    assert all(t.values == (t.value, 5.0) for t in trials)
    assert len(open_study(job(directions=("maximize", "minimize"))).best_trials) >= 1


def test_a_storage_of_ones_own_and_a_second_process_that_joins(job, tmp_path):
    url = f"sqlite:///{tmp_path / 'other.db'}"
    (tmp_path / "b").mkdir()
    first = tune(job(storage=url, n_trials=3))
    both = tune(job(storage=url, n_trials=5, folder=tmp_path / "b"))  # as on another machine
    assert essence(both[:3]) == essence(first)
    assert len(both) == 5
    assert not (tmp_path / "study.db").exists()
    study = optuna.load_study(study_name="a study", storage=url)
    assert essence(read_trials(study)) == essence(both)
    assert all(FOLDER not in t.user_attrs for t in study.trials)
