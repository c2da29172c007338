"""The Optuna engine by itself: which trials it asks for, and what becomes of those of the dead."""

import errno
import socket
import threading
import time
from dataclasses import replace

import optuna
import pytest
from filelock import FileLock
from optuna.trial import TrialState
from safetensors import SafetensorError
from sfda_tune_optuna import engine
from sfda_tune_optuna.engine import BEAT, FOLDER, RECORD, open_study, read_trials, tune
from sfda_tune_optuna.history import observe

from sfda_tune.finetuning.epochs import OutOfTimeError
from sfda_tune.pipelines.engines import Job, load_engine
from sfda_tune.pipelines.spaces import open_space

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
            "train": lambda t: one_value(learn(t)), "train_factory": lambda: None,
            "update_trials": lambda trials: None, "is_over": lambda: False,
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
        job(
            train=lambda t: one_value(learn(t, fails=("vit",))),
            update_trials=lambda ts: told.append(ts),
        )
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
    assert observe(study, study.trials[:1], "backbone") == ()


@pytest.mark.parametrize("fault", [
    SafetensorError("Error while serializing: I/O error: No space left (os error 28)"),
    OSError(errno.EROFS, "Read-only file system"),
])  # fmt: skip
def test_a_full_disk_ends_the_search_and_costs_no_trial(job, fault):
    def fail(trial):
        yield next(one_value(learn(trial)))
        raise RuntimeError("the epoch could not be kept") from fault

    with pytest.raises(RuntimeError, match="could not be kept"):
        tune(job(train=fail))
    seen = []
    trials = tune(job(train=lambda t: seen.append(t) or one_value(learn(t))))
    assert {t.state for t in trials} == {"complete", "pruned"}
    assert len(seen) == len(trials) == 8
    assert "00000" in {t.folder for t in trials}


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
    assert observe(study, [dead], "backbone") == ()  # nothing against the backbone


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


class Killed(BaseException):
    """Stands in for `kill -9`: what comes after it in the engine does not happen."""


def kill(*_, **__):
    raise Killed


def states(job):
    return [t.state.name for t in open_study(job).trials]


@pytest.mark.parametrize(
    ("where", "shared"),
    [(name, True) for name in ("enqueue", "ask", "suggest", "write", "train", "end", "tell")]
    + [("ask", False), ("train", False)],
)
def test_a_kill_anywhere_loses_no_trial(job, tmp_path, monkeypatch, where, shared):
    """Two kills at the same place, so that the trial that goes on is hit, too; then to the end."""
    monkeypatch.setattr(engine, "STALE", 0.2)
    url = None if shared else f"sqlite:///{tmp_path / 'other.db'}"
    places = {
        "enqueue": (optuna.Study, "enqueue_trial"), "ask": (engine, "_place"),
        "suggest": (engine, "_suggest"), "write": (engine, "_write"),
        "train": (engine, "run_trial"),
        "end": (engine, "_end"), "tell": (optuna.Study, "tell"),
    }  # fmt: skip
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(*places[where], kill)
            with pytest.raises(Killed):
                tune(job(storage=url, n_trials=4))
    trials = tune(job(storage=url, n_trials=4))
    assert {t.state for t in trials} <= {"complete", "pruned"}
    assert len(trials) == 4
    defaults = [t.backbone for t in trials if dict(t.params) == SPACE.default()]
    assert sorted(defaults[:3]) == sorted(SCORES)  # of each backbone
    assert len({t.folder for t in trials}) == 4
    assert not {"RUNNING", "WAITING"} & {*states(job(storage=url, n_trials=4))}
    assert essence(tune(job(storage=url, n_trials=4))) == essence(trials)  # nothing is left to do


def test_a_kill_between_the_end_of_the_dead_and_its_heir(job, monkeypatch):
    with pytest.raises(Killed):
        tune(job(train=kill))
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", kill)
        with pytest.raises(Killed):
            tune(job())
    assert states(job())[0] == "FAIL"
    trials = tune(job())
    assert len(trials) == 8
    assert [t.params for t in trials if t.folder == "00000"] == [SPACE.default()]


def test_what_was_finished_but_not_told_is_not_made_again(job, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_end", kill)
        with pytest.raises(Killed):
            tune(job(n_trials=1))
    made = []
    (only,) = tune(job(n_trials=1, train=lambda t: made.append(t) or one_value(learn(t))))
    assert not made
    assert (only.number, only.state) == (0, "complete")
    assert open_study(job(n_trials=1)).trials[0].values == [only.value]


def test_a_trial_that_ends_while_another_process_looks_for_the_dead(job, monkeypatch):
    study = open_study(job(n_trials=2))
    ours = study.ask()  # of another worker, whose lock is free already: it is about to tell
    ours.suggest_categorical("backbone", sorted(SCORES))
    for d in SPACE.dimensions:
        engine._suggest(ours, d)
    ours.set_user_attr(RECORD, record(0, "00000") | {"params": SPACE.default()})
    (job().folder / "trials" / "00000").mkdir(parents=True)
    abandon, meanwhile = engine._abandon, []

    def late(study, number):
        if not meanwhile:
            meanwhile.append(number)
            ended = {"state": "complete", "value": 0.5, "values": [0.5]}
            ours.set_user_attr(RECORD, record(0, "00000") | {"params": SPACE.default()} | ended)
            study.tell(ours, 0.5)
        abandon(study, number)  # and now it is too late

    monkeypatch.setattr(engine, "_abandon", late)
    trials = tune(job(n_trials=2))
    assert meanwhile == [0]
    assert [(t.number, t.backbone, t.state) for t in trials] == [
        (0, "vit", "complete"),
        (1, "resnet", "complete"),
    ]
    assert states(job(n_trials=2)) == ["COMPLETE", "COMPLETE"]  # nobody went on with it


def test_a_worker_that_was_taken_for_dead_leaves_its_trial(job):
    """It hears so at its next epoch; the trial goes on from its checkpoint, here by itself."""
    buried, made = [], []

    def train(trial):
        made.append(trial.number)
        for now in one_value(learn(trial)):
            if not buried:
                buried.append(engine._abandon(open_study(job()), trial.number))
            yield now

    trials = tune(job(n_trials=3, train=train))
    assert {t.state for t in trials} <= {"complete", "pruned"}
    assert len(trials) == 3
    assert [t.folder for t in trials].count("00000") == 1
    assert len(made) == 4


def test_a_worker_gives_signs_of_life_within_an_epoch(job, monkeypatch):
    monkeypatch.setattr(engine, "STALE", 0.1)
    signs = set()

    def train(trial):
        study = optuna.load_study(study_name="a study", storage=url)
        while len(signs) < 3:  # no epoch ends meanwhile
            signs.add(study.trials[trial.number].user_attrs.get(BEAT))
            time.sleep(0.01)
        yield from one_value(learn(trial))

    url = f"sqlite:///{job().folder / 'study.db'}"
    (only,) = tune(job(n_trials=1, train=train))
    assert only.state == "complete"


def test_a_worker_elsewhere_is_dead_once_its_sign_has_not_changed_for_long(
    job, tmp_path, monkeypatch
):
    """By the observer's own clock, whatever the time of day is, here or there."""
    url, now = f"sqlite:///{tmp_path / 'other.db'}", [0.0]
    limited = job(storage=url, n_trials=1)
    study, heard = open_study(limited), {}
    ours = study.ask()
    ours.set_user_attr(RECORD, record(0, "00000", started=time.time() - 1e6))
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])

    def is_dead(after):
        now[0] += after
        return engine._is_dead(study.trials[0], limited, heard)

    assert not is_dead(0)
    for beat in range(3):  # epochs longer than STALE
        assert not is_dead(0.9 * engine.STALE)
        engine._send(ours, beat)
        assert not is_dead(0.9 * engine.STALE)
    assert is_dead(1.1 * engine.STALE)


def test_what_two_machines_enqueue_is_made_once(job, tmp_path):
    url = f"sqlite:///{tmp_path / 'other.db'}"
    study = open_study(job(storage=url))
    for params in [t.system_attrs["fixed_params"] for t in study.trials]:
        study.enqueue_trial(params)  # as by one that looked at the same moment
    trials = tune(job(storage=url))
    assert len(trials) == 8
    assert [t.backbone for t in trials if dict(t.params) == SPACE.default()] == list(SCORES)


def test_trials_without_time_go_on_when_there_is_some(job):
    def late(trial):
        raise OutOfTimeError
        yield

    clock = iter([False, True])
    tune(job(train=late, is_over=lambda: next(clock)))
    trials = tune(job())
    assert len(trials) == 8
    assert {t.state for t in trials} <= {"complete", "pruned"}
    assert {t.backbone for t in trials if dict(t.params) == SPACE.default()} == set(SCORES)


def test_at_the_end_of_the_time_nothing_is_left_running(job):
    with pytest.raises(Killed):
        tune(job(train=kill))
    (dead,) = tune(job(is_over=lambda: True))
    assert (dead.state, dead.error) == ("failed", "its process ended")
    assert "RUNNING" not in states(job())
    assert len(tune(job())) == 8  # and with more time it goes on


def test_the_log_level_stays(job):
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    tune(job(n_trials=1))
    assert optuna.logging.get_verbosity() == optuna.logging.DEBUG


def test_a_storage_that_cannot_be_opened_is_refused_without_its_password(tmp_path):
    check = tune.check_storage
    check(None)
    check(f"sqlite:///{tmp_path / 'study.db'}")
    with pytest.raises(ValueError, match="cannot be opened: unable to open database file"):
        check(f"sqlite:///{tmp_path / 'nowhere' / 'study.db'}")
    for url in (
        "postgresql+psycopg://u:s3@cret@127.0.0.1:1/db",
        "postgresql+psycopg://u:s3cret@127.0.0.1:1/db",
        "postgresql+psycopg://127.0.0.1:1/db?user=u&password=s3cret&connect_timeout=2",
    ):
        with pytest.raises(ValueError, match="`storage` 'postgresql") as refused:
            check(url)
        assert "cret" not in str(refused.value)


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
