"""Real storages with real worker processes: no trial is lost, repeated or misread.

In memory, SQLite, journal file, gRPC proxy, and a private PostgreSQL cluster on a free port of
loopback, which needs the binaries of the Debian package `postgresql`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from optuna_lab import NAMES, VALUES, close_storages, make_trial, objective, open_storage, pairs
from sfda_tune_optuna import SFDASampler, load_ranking
from sfda_tune_optuna.history import observe

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
KINDS = ["sqlite", "journal", "grpc", "postgresql"]

WORKER = """
import sys, time, warnings
warnings.simplefilter("ignore")
import optuna
from optuna.samplers import RandomSampler, TPESampler
lab, kind, place, heartbeat, base, n, mark = sys.argv[1:]
sys.path.insert(0, lab)
from optuna_lab import VALUES, objective, open_storage
from sfda_tune_optuna import SFDASampler
optuna.logging.set_verbosity(optuna.logging.ERROR)
options = {"heartbeat_interval": 1, "grace_period": 2} if heartbeat else {}
base = {"random": RandomSampler, "tpe": lambda: TPESampler(n_startup_trials=4)}[base]()
study = optuna.create_study(
    study_name="s", storage=open_storage(kind, place, **options), direction="maximize",
    load_if_exists=True, sampler=SFDASampler(VALUES, base_sampler=base, seed=7))
def run(trial):
    value = objective(trial)
    if mark and trial.number == 5:
        open(mark, "w").close()
        time.sleep(600)
    return value
study.optimize(run, n_trials=int(n))
"""


@pytest.fixture(scope="session")
def postgresql():
    """URL of a cluster of our own; PostgreSQL refuses to run as root."""
    if BIN is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    as_user = []
    if os.geteuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("no user `postgres` to run PostgreSQL as")
        as_user = ["runuser", "-u", "postgres", "--"]
    folder = Path(tempfile.mkdtemp(prefix="sfda-postgresql-"))
    if as_user:
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def command(*arguments):
        subprocess.run(
            [*as_user, *arguments], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=120
        )

    data = folder / "data"
    control = (str(BIN / "pg_ctl"), "-D", str(data), "-l", str(folder / "log"), "-w")
    try:
        command(str(BIN / "initdb"), "-D", str(data), "-A", "trust", "-U", "sfda", "--no-sync")
        with (data / "postgresql.conf").open("a") as file:
            file.write(f"port = {port}\nlisten_addresses = '127.0.0.1'\n")
            file.write("unix_socket_directories = ''\nfsync = off\n")
        command(*control, "start")
        try:
            yield f"postgresql+psycopg://sfda@127.0.0.1:{port}"
        finally:
            command(*control, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def place(request, tmp_path):
    """Kind and address of an empty storage."""
    kind = request.param
    if kind == "memory":
        yield kind, ""
    elif kind == "sqlite":
        yield kind, f"sqlite:///{tmp_path}/s.db"
    elif kind == "journal":
        yield kind, str(tmp_path / "journal.log")
    elif kind == "postgresql":
        import psycopg

        url = request.getfixturevalue("postgresql")
        name = f"study_{time.time_ns()}"
        server = url.replace("+psycopg", "")
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f"create database {name}")
        yield kind, f"{url}/{name}"
    else:
        from optuna.storages._grpc.server import make_server

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        storage = RDBStorage(f"sqlite:///{tmp_path}/behind.db")
        server = make_server(storage, "127.0.0.1", port)
        server.start()
        yield kind, str(port)
        server.stop(5).wait()
    close_storages()


@pytest.fixture
def work(place):
    """Start a worker process; none outlives the test."""
    # The tables first: two processes that make them at once are one too many for Optuna.
    optuna.create_study(study_name="s", storage=open_storage(*place), direction="maximize")
    started = []

    def start(n, *, base="random", heartbeat="", mark=""):
        command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), *place]
        started.append(subprocess.Popen([*command, heartbeat, base, str(n), str(mark)]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def open_study(place, **options):
    return optuna.load_study(study_name="s", storage=open_storage(*place, **options))


CASES = [(kind, ("random", "tpe")[k % 2]) for k, kind in enumerate(KINDS)]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "base"), CASES, indirect=["place"])
def test_s13_two_workers_with_one_seed_do_not_repeat_each_other(place, work, base):
    workers = [work(12, base=base) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    study = open_study(place)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 24
    assert len(set(pairs(study))) == 24
    assert dict(load_ranking(study)) == VALUES


def wait_for(file, process):
    end = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


QUICK = ("postgresql",)


@pytest.mark.parametrize(
    "place",
    [pytest.param(k, marks=[] if k in QUICK else [pytest.mark.slow]) for k in KINDS],
    indirect=True,
)
def test_a_killed_worker_loses_nothing_and_is_no_evidence(place, work, tmp_path):
    victim = work(20, mark=tmp_path / "in trial 5")
    wait_for(tmp_path / "in trial 5", victim)
    victim.kill()
    assert victim.wait() == -9
    workers = [work(6), work(6)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    study = open_study(place)
    states = [t.state.name for t in study.trials]
    assert states == ["COMPLETE"] * 5 + ["RUNNING"] + ["COMPLETE"] * 12
    assert len(set(pairs(study))) == 18
    history = observe(study, study.trials, "backbone")
    assert [o.state for o in history if o.state != "running"] == ["complete"] * 17


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "retry"), [("sqlite", True), ("postgresql", False)], indirect=["place"]
)
def test_a_killed_worker_that_had_a_heartbeat(place, work, tmp_path, retry):
    """Its trial is failed by the next worker, and tried again with the same backbone."""
    victim = work(20, heartbeat="yes", mark=tmp_path / "in trial 5")
    wait_for(tmp_path / "in trial 5", victim)
    victim.kill()
    victim.wait()
    time.sleep(3.5)
    options = {"heartbeat_interval": 1, "grace_period": 2}
    if retry:
        name = "RetryHeartbeatStaleTrialCallback"  # until 4.8: RetryFailedTrialCallback
        new = hasattr(optuna.storages, name)
        make = getattr(optuna.storages, name if new else "RetryFailedTrialCallback")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            key = "heartbeat_stale_trial_callback" if new else "failed_trial_callback"
            options[key] = make(max_retry=1)
    study = open_study(place, **options)
    study.sampler = SFDASampler.from_study(study, base_sampler=RandomSampler())
    study.optimize(objective, n_trials=6)
    states = [t.state.name for t in study.trials]
    assert states == ["COMPLETE"] * 5 + ["FAIL"] + ["COMPLETE"] * 6
    history = observe(study, study.trials, "backbone")
    assert [o.state for o in history] == ["complete"] * 11
    if retry:
        assert study.trials[6].params == study.trials[5].params


@pytest.mark.parametrize("place", ["memory"], indirect=True)
@pytest.mark.parametrize("base", [RandomSampler, TPESampler])
def test_s15_in_memory_with_threads(place, base):
    sampler = SFDASampler(VALUES, base_sampler=base(), seed=7)
    study = optuna.create_study(
        storage=open_storage(*place), direction="maximize", sampler=sampler
    )
    study.optimize(objective, n_trials=40, n_jobs=4)
    assert len(set(pairs(study))) == 40


@pytest.mark.parametrize("place", ["postgresql"], indirect=True)
def test_a_large_ranking_in_a_real_database(place):
    scores = {f"backbone_{i:05d}.with_a_long_tag": i / 7 for i in range(3000)}
    storage = open_storage(*place)
    study = optuna.create_study(study_name="s", storage=storage, sampler=SFDASampler(scores))
    study.ask()
    assert dict(load_ranking(open_study(place))) == scores


# What counts as evidence -------------------------------------------------------------------------
def test_a_running_trial_is_never_forgotten():
    """Six times as long as any other: nobody but a heartbeat knows that its worker is gone."""
    study = optuna.create_study()
    now = datetime.now()
    running, done = make_trial("a", state="RUNNING", choices=NAMES), make_trial("b")
    running.datetime_start = now - timedelta(hours=6)
    done.datetime_start, done.datetime_complete = now - timedelta(hours=1), now
    study.add_trials([running, done])
    history = observe(study, study.trials, "backbone")
    assert [o.state for o in history] == ["running", "complete"]


def test_failures_count_unless_the_worker_was_killed():
    study = optuna.create_study(sampler=SFDASampler(VALUES, seed=0))
    study.add_trial(make_trial("a", state="FAIL"))  # of another sampler
    with pytest.raises(MemoryError):
        study.optimize(lambda t: [objective(t), exec("raise MemoryError")][0], n_trials=1)
    trial = study.ask()
    trial.suggest_categorical("backbone", NAMES)
    storage = trial.storage
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
    storage.set_trial_state_values(trial_id, TrialState.FAIL)  # as a heartbeat does
    history = observe(study, study.trials, "backbone")
    assert [o.state for o in history] == ["failed", "failed"]


def test_values_become_higher_is_better_and_finite():
    for direction, sign in (("maximize", 1), ("minimize", -1)):
        study = optuna.create_study(direction=direction)
        for value in (1.0, 3.0, float("inf"), float("-inf")):
            study.add_trial(make_trial("a", value))
        pruned = make_trial("b", state="PRUNED", value=2.0, intermediate_values={0: 5.0, 3: 2.0})
        study.add_trial(pruned)
        study.add_trial(make_trial("c", state="PRUNED", user_attrs={"sfda:gated": True}))
        study.add_trial(make_trial(None, 9.0))
        *history, gated = observe(study, study.trials, "backbone")
        assert (gated.backbone, gated.state, gated.value) == ("c", "stopped", None)
        assert [o.value for o in history] == [sign * v for v in (1.0, 3.0, 3.0, 1.0, 2.0)]
        assert (history[4].state, history[4].step) == ("pruned", None)
        assert [o.params for o in history] == [{"lr": 0.01}] * 5
        study.add_trial(make_trial("c", 1.0, intermediate_values={7: 1.0}))
        assert observe(study, study.trials, "backbone")[4].step == 0.5  # 4 of 8 epochs
