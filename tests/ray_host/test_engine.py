"""`sfda_tune.search` on Ray: from the ranking to the tested winner, interrupted and resumed."""

import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, replace

import pytest
from sfda_tune_ray.engine import _is_done, tune

from sfda_tune.finetuning.config import FinetuneConfig
from sfda_tune.pipelines.engines import Job, Trial, load_engine
from sfda_tune.pipelines.result import SearchResult
from sfda_tune.pipelines.search import search
from sfda_tune.pipelines.spaces import default_space

# of sockets that Tune leaves open
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
QUICK = {"epochs": 2, "samples": 200, "keep": 2, "test": 0.2, "device": "cpu"}


def test_it_is_registered():
    assert load_engine("ray") is tune


@pytest.mark.parametrize(
    ("ends", "n_trials", "is_over", "done"),
    [
        ([], 6, False, False),
        ([], 4, True, True),
        ([("trials", 4)], 4, False, True),
        ([("trials", 4)], 6, False, False),
        ([("trials", 6)], 6, False, True),  # all backbones failed before
        ([("time", 6)], 6, False, False),  # and now there is more
        ([("time", 4)], 4, False, True),  # the last trial ended with the time
        ([("time", None)], None, False, False),
        ([("trials", 4), (None, 6)], 6, False, False),  # interrupted
        ([(None, 4)], 4, False, True),  # interrupted after the last trial
    ],
)
def test_what_is_left_to_do(tmp_path, ends, n_trials, is_over, done):
    trial = Trial(0, "a", {}, state="complete", value=0.5)
    for name in (names := [f"ray-{k}" for k in range(4)]):
        (tmp_path / "trials" / name).mkdir(parents=True)
        (tmp_path / "trials" / name / "trial.json").write_text(json.dumps(asdict(trial)))
    past = [{"trials": names if k == 0 else [], "end": end, "n_trials": n}
            for k, (end, n) in enumerate(ends)]  # fmt: skip
    (tmp_path / "ray-trials.json").write_text(json.dumps(past))
    job = Job(
        "study", tmp_path, {"a": 1.0}, default_space(100), ("maximize",), 3, n_trials, None, 0,
        train=iter, train_factory=lambda: iter, update_trials=lambda trials: None,
        is_over=lambda: is_over,
    )  # fmt: skip
    assert _is_done(job) is done


@pytest.fixture
def two_places(ray_cluster, monkeypatch):
    """Two trials at a time: each place costs another import of torch, and two cores do it."""
    monkeypatch.setattr("sfda_tune_ray.engine.count_places", lambda *asked: 2)


@pytest.mark.slow
def test_a_search_on_a_cluster(two_places, tmp_path):
    data = {"cache": tmp_path / "cache", "out": tmp_path / "run", "engine": "ray"}
    backbones = ["demo:resnet_glyphs", "demo:convnext_glyphs", "demo:vit_untrained"]
    found = search("digits", backbones, trials=3, **QUICK, **data)
    assert found.summary["status"] == "done"
    assert [t["number"] for t in found.trials] == [0, 1, 2]
    assert {t["state"] for t in found.trials} <= {"complete", "pruned"}
    # The first trials are the defaults of the survivors, best first.
    survivors = found.summary["survivors"]
    assert [t["backbone"] for t in found.trials[:2]] == survivors
    assert found.trials[0]["params"] == found.trials[1]["params"] != found.trials[2]["params"]
    assert {t["backbone"] for t in found.trials} <= set(survivors)
    assert found.best["trial"] in range(3)
    assert found.test["accuracy"] > 0.6
    assert (found.folder / "report.html").stat().st_size > 10_000
    # Called again, it has nothing to do.
    before = (found.folder / "search.json").read_bytes()
    search("digits", backbones, trials=3, **QUICK, **data)
    assert (found.folder / "search.json").read_bytes() == before
    with pytest.raises(ValueError, match="trials 3, but now trials is 2; take the same, or more"):
        search("digits", backbones, trials=2, **QUICK, **data)


@pytest.mark.slow
def test_trials_without_time_for_an_epoch(two_places, tmp_path):
    """They report nothing, are no evidence, and do not end the others."""

    def train_factory():
        from sfda_tune.finetuning.epochs import OutOfTimeError

        def train(trial):
            if trial.backbone == "late":
                raise OutOfTimeError
            yield replace(
                trial,
                value=0.5,
                values=(0.5,),
                epochs=({"number": 0, "value": 0.5, "log_loss": 1, "seconds": 1},),
            )

        return train

    job = Job(
        "study", tmp_path, {"late": 2.0, "soon": 1.0}, default_space(100), ("maximize",), 3, 4,
        None, 0, train=iter, train_factory=train_factory, update_trials=lambda trials: None,
        is_over=lambda: False,
    )  # fmt: skip
    trials = tune(job)
    ends = {(t.backbone, t.state, t.error) for t in trials}
    assert ends == {("late", "failed", "no time for an epoch"), ("soon", "complete", None)}
    assert len(trials) == 4
    assert len({t.worker for t in trials}) < 4  # small trials share a process


@pytest.mark.slow
def test_a_full_disk_ends_the_search_and_costs_no_trial(two_places, tmp_path):
    full = tmp_path / "full"
    full.touch()

    def train_factory():
        def train(trial):
            epochs = ({"number": 0, "value": 0.5, "log_loss": 1, "seconds": 1},)
            yield replace(trial, value=0.5, values=(0.5,), epochs=epochs)
            if full.exists():
                raise RuntimeError("the epoch could not be kept") from OSError(28, "full")

        return train

    job = Job(
        "study", tmp_path, {"a": 2.0, "b": 1.0}, default_space(100), ("maximize",), 3, 2, None, 0,
        train=iter, train_factory=train_factory, update_trials=lambda trials: None,
        is_over=lambda: False,
    )  # fmt: skip
    with pytest.raises(OSError, match="No space left on device"):
        tune(job)
    full.unlink()
    gc.collect()  # files that Tune leaves open where it stops trials
    assert [(t.state, t.error) for t in tune(job)] == [("complete", None)] * 2


def test_busy_gpus_do_not_outlast_the_time(two_places, tmp_path):
    import ray

    class Hog:
        def ready(self):
            return True

    hog = ray.remote(num_gpus=4, num_cpus=0)(Hog).remote()
    assert ray.get(hog.ready.remote())
    end = time.monotonic() + 1
    job = Job(
        "study", tmp_path, {"a": 1.0}, default_space(100), ("maximize",), 3, 1, None, 0,
        train=iter, train_factory=lambda: iter, update_trials=lambda trials: None,
        is_over=lambda: time.monotonic() > end,
    )  # fmt: skip
    try:
        assert tune(job) == []
    finally:
        ray.kill(hog)


@pytest.mark.slow
def test_ray_is_not_started_to_the_end_if_the_time_is_over_before(tmp_path):
    """Nor does anything of it stay, in a process that goes on."""
    code = f"""
        import psutil, ray, signal
        from pathlib import Path
        from sfda_tune.pipelines.engines import Job
        from sfda_tune.pipelines.spaces import default_space
        from sfda_tune_ray.engine import tune

        job = Job(
            "study", Path({str(tmp_path)!r}), {{"a": 1.0}}, default_space(100), ("maximize",), 3,
            1, "local", 0, train=iter, train_factory=None, update_trials=lambda trials: None,
            is_over=lambda replies=iter([False]): next(replies, True),
        )
        ray._private.worker.connect = None  # what follows the start of the processes
        before = [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)]
        assert tune(job) == []
        after = [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)]
        assert before == after and not ray.is_initialized()
        assert not psutil.wait_procs(psutil.Process().children(), 30)[1]
    """
    environment = os.environ | {"RAY_AUTH_MODE": ""}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, env=environment, check=True, timeout=100)


@pytest.mark.slow
def test_two_objectives_give_a_front(two_places, tmp_path):
    data = {"cache": tmp_path / "cache", "out": tmp_path / "run", "engine": "ray"}
    quick = {"epochs": 1, "samples": 100}
    options = {**QUICK, **quick, "objective": ("accuracy", "params"), **data}
    pair = ["demo:resnet_glyphs", "demo:convnext_glyphs"]
    first = search("digits", pair, trials=2, **options)
    found = search("digits", pair, trials=4, **options)  # the second experiment knows the first
    assert [t["number"] for t in found.trials] == list(range(4))
    assert found.trials[:2] == first.trials
    params = [(t["backbone"], json.dumps(t["params"])) for t in found.trials]
    assert len(set(params)) == 4  # neither the defaults nor other draws again
    trials = {t["number"]: t for t in found.trials}
    costs = found.summary["costs"]
    assert {t["state"] for t in trials.values()} == {"complete"}  # none is stopped
    assert all(t["values"][1] == costs[t["backbone"]]["n_params"] for t in trials.values())
    front = [trials[n]["values"] for n in found.summary["front"]]
    assert front
    for value, params in front:
        better = [t["values"] for t in trials.values() if t["values"][0] > value]
        assert all(p > params for _, p in better)
    assert found.best["val"]["accuracy"] == max(t["value"] for t in trials.values())


@pytest.mark.slow
def test_an_ended_driver_goes_on(tmp_path):
    """In processes of their own, with a Ray of their own: killed, then interrupted, then done."""
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "sfda_tune", "search", "digits", "--backbones",
        "demo:resnet_glyphs", "demo:vit_glyphs", "--trials", "5", "--engine=ray", "--epochs", "2",
        "--samples", "60", "--keep", "2", "--device", "cpu", "-q", "--out", str(run),
        "--cache", str(tmp_path / "cache"),
    ]  # fmt: skip
    environment = os.environ | {"RAY_AUTH_MODE": ""}
    done, left = [], []
    for n_done, how in ((0, signal.SIGKILL), (1, signal.SIGINT)):
        with (tmp_path / "stderr").open("w") as stderr:  # a pipe would wait for Ray's daemons
            driver = subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr)
        until = time.monotonic() + 240
        try:
            while not (seen := records(run)) or sum(is_done(r) for r in seen) < n_done:
                assert driver.poll() is None, (tmp_path / "stderr").read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
        finally:
            driver.send_signal(how)
            driver.wait()
        assert driver.returncode != 0
        assert "final" not in [folder.name for folder in (run / "trials").iterdir()]
        for record in records(run):
            (done if is_done(record) else left).append(record)
    assert left
    subprocess.run(command, env=environment, check=True, timeout=300)
    found = SearchResult.open(run)
    assert len(found.trials) == 5
    assert {t["state"] for t in found.trials} <= {"complete", "pruned"}
    for record in done:  # nothing that was finished has been done again
        (same,) = [t for t in found.trials if t["folder"] == record["folder"]]
        assert same["epochs"] == record["epochs"]
    for record in left:  # and what had begun has gone on
        (same,) = [t for t in found.trials if t["folder"] == record["folder"]]
        assert same["epochs"][: len(record["epochs"])] == record["epochs"]
    defaults = FinetuneConfig()
    for backbone in found.summary["survivors"]:  # the default of none is lost
        assert any(
            t["backbone"] == backbone
            and all(value == getattr(defaults, name) for name, value in t["params"].items())
            for t in found.trials
        )
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "report.html").is_file()


def is_done(record):
    return record["state"] != "running"


def records(run):
    found = []
    for file in sorted(run.glob("trials/*/trial.json")):
        found.append(json.loads(file.read_text()))
    return found
