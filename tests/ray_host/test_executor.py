"""Extraction over actors gives what the local one gives, whatever happens to the actors."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import ray
from executor_lab import FullStore, Item, Load
from PIL import Image
from ray._private import services
from sfda_tune_ray import RayExecutor, cluster
from sfda_tune_ray import executor as module

import sfda_tune
from sfda_tune import DatasetError, RankingInterruptedError
from sfda_tune.backbones.loading import describe
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.data.copies import CopiesWarning
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.opening import open_dataset
from sfda_tune.extraction import plan
from sfda_tune.extraction.pixels import forget_pixels
from sfda_tune.extraction.plan import BackboneJob
from sfda_tune.extraction.run import extract
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import FeatureStore, open_store
from sfda_tune.extraction.worker import Worker
from sfda_tune.values.features import Backbone

CPU = Settings(device="cpu", workers=0)
NETS = [Backbone("a", load=Load()), Backbone("b", load=Load(most=4, scale=2))]


@pytest.fixture(scope="module")
def executor(ray_cluster):
    """Two actors for all tests that do not kill them on purpose."""
    with RayExecutor(num_gpus=0, actors=2, unit_seconds=0.5) as executor:
        yield executor


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(plan, "SHARD", 8)
    monkeypatch.setattr(module, "PATIENCE", 600)  # a busy machine is slow to start actors


@pytest.fixture(scope="module")
def zoo(toy_zoo):
    return resolve_backbones(toy_zoo)


@pytest.fixture(scope="module")
def dataset(photos):
    return open_dataset(photos)


def pixels(n=40):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (150, 150, 3), np.uint8) for _ in range(n)]


def make_dataset(special=None, n=40):
    items = list(pixels(n))
    for row, item in (special or {}).items():
        items[row] = item
    return ImageDataset("made", items, np.arange(n) % 2, ("x", "y"))


def run(dataset, backbones, settings=CPU, **kwargs):
    """The last extraction of each backbone: one comes again when a row turns out bad."""
    return {e.backbone.name: e for e in extract(dataset, backbones, settings, **kwargs)}


def assert_same(results, expected, rows=None):
    assert set(results) == set(expected) != set()
    for name, e in results.items():
        x, keep = expected[name].features.x, expected[name].rows
        if rows is not None:
            x, keep = x[np.isin(keep, rows)], rows
        assert e.error is None
        assert e.rows.tolist() == list(keep)
        np.testing.assert_array_equal(e.features.x, x)  # to the last bit


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)


# The same as here -------------------------------------------------------------------------------
class Watch:
    def __init__(self, stop_after=10**9):
        self.total, self.cached, self.seen, self.left = 0, 0, 0, stop_after

    def start(self, n_images, n_cached):
        self.total, self.cached = n_images, n_cached

    def advance(self, name, n):
        self.seen += n
        self.left -= n
        if self.left < 0:
            raise KeyboardInterrupt

    def finish(self, score):
        pass


def test_ranking_keys_and_files_are_those_of_a_local_run(executor, photos, toy_zoo, tmp_path):
    here = sfda_tune.rank(photos, toy_zoo, device="cpu", cache=tmp_path / "here")
    watch = Watch()
    there = sfda_tune.rank(
        photos, toy_zoo, cache=tmp_path / "there", executor=executor, progress=watch
    )
    assert list(there) == list(here)
    assert [there[name] for name in there] == [here[name] for name in here]
    assert there.info["device"] == here.info["device"] == "cpu"
    stores = [FeatureStore(tmp_path / where) for where in ("here", "there")]
    files = [sorted(p.stem for p, _ in store.entries()) for store in stores]
    assert files[0] == files[1]
    assert len(files[0]) == 4 * 5
    for key in {path.parent.name for path, _ in stores[0].entries()}:
        a, b = (store.get(key, open_dataset(photos).digests()) for store in stores)
        assert len(a.rows) == 36
        np.testing.assert_array_equal(a.x, b.x)
        np.testing.assert_array_equal(a.rows, b.rows)
    assert (watch.seen, watch.total) == (4 * 36, 4 * 36)
    report = there.info["executor"]
    assert sum(actor["images"] for actor in report["actors"]) == 4 * 36
    assert report["faults"] == []
    assert 0 < report["utilisation"] <= 1
    assert 1 <= report["decodes_per_image"] <= 4
    assert not list((tmp_path / "there").glob(".*"))  # no marker is left


def test_what_is_in_the_store_is_not_computed_again(executor, dataset, zoo, tmp_path):
    store, watch = FeatureStore(tmp_path), Watch()
    first = run(dataset, zoo, store=store)
    for path, _ in list(store.entries())[::3]:
        path.unlink()
    absent = 20 - sum(1 for _ in store.entries())
    again = run(dataset, zoo, store=store, executor=executor, progress=watch)
    assert_same(again, first)
    assert absent > 3
    assert watch.seen == watch.total <= 8 * absent


def test_where_all_is_kept_no_cluster_is_asked_for(photos, toy_zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    nobody = RayExecutor("127.0.0.1:1")
    here = sfda_tune.rank(photos, toy_zoo / "vit", device="cpu", cache=tmp_path)
    there = sfda_tune.rank(photos, toy_zoo / "vit", cache=tmp_path, executor=nobody)
    assert there["vit"] == here["vit"]
    assert "executor" not in there.info
    with pytest.raises(ConnectionError, match="no cluster answers there"):
        sfda_tune.rank(photos, toy_zoo, cache=tmp_path, executor=nobody)


def test_an_interrupt_keeps_what_is_finished_and_lets_the_actors_go(
    ray_cluster, photos, toy_zoo, tmp_path
):
    free = ray.available_resources()["CPU"]
    options = {"cache": tmp_path, "executor": RayExecutor(num_gpus=0, actors=1, unit_seconds=0.1)}
    with pytest.raises(RankingInterruptedError):
        sfda_tune.rank(photos, toy_zoo, progress=Watch(60), **options)
    kept = sum(1 for _ in FeatureStore(tmp_path).entries())
    assert 8 <= kept < 20
    wait_for(lambda: ray.available_resources()["CPU"] == free)
    assert ray.is_initialized()  # the cluster was not ours


@pytest.mark.slow
def test_race_and_simulated_gpus(executor, photos, toy_zoo, tmp_path):
    """Actors stay from one stage to the next; a device that is asked for is the device."""
    here = sfda_tune.rank(photos, toy_zoo, device="cpu", race=True, top=1, cache=False)
    with RayExecutor(num_gpus=3, actors=2, cpus_per_actor=1) as gpus:  # the cluster has 4
        assert gpus.resolve_device("auto") == "cuda"
        there = sfda_tune.rank(
            photos, toy_zoo, device="cpu", race=True, top=1, cache=tmp_path, executor=gpus
        )
    assert [there[name] for name in there] == [here[name] for name in here]
    assert len(there.info["executor"]["actors"]) == 1


def test_a_store_by_address(executor, dataset, zoo, tmp_path):
    pytest.importorskip("fsspec")
    store = open_store(f"local://{tmp_path}")
    assert_same(run(dataset, zoo[:2], store=store, executor=executor), run(dataset, zoo[:2]))
    assert all(e.cached for e in run(dataset, zoo[:2], store=store).values())
    assert len(list(tmp_path.glob("segments/*/*/*.safetensors"))) == 2 * 5


def test_it_needs_a_store(executor, photos):
    with pytest.raises(ValueError, match=r"is the class RayExecutor; call it: RayExecutor\(\)"):
        sfda_tune.rank(photos, "demo:*noise*", executor=RayExecutor)
    with pytest.raises(ValueError, match=r"`executor` needs a `cache`.*cache=True"):
        sfda_tune.rank(photos, cache=False, executor=executor)
    with pytest.raises(ValueError, match="`executor` needs a `store`"):
        next(extract(open_dataset(photos), [], executor=executor))


# Faults -----------------------------------------------------------------------------------------
before = {}  # the reports when a test began, of an executor that serves several


def kinds(executor):
    n = len(before[executor]["faults"]) if executor in before else 0
    return [fault["kind"] for fault in executor.report()["faults"][n:]]


@pytest.fixture(scope="module")
def mortal(ray_cluster):
    """One actor for the tests that kill it: Ray starts it again."""
    options = {"unit_seconds": 0.2, "attempts": 2, "image_seconds": 3}
    with RayExecutor(num_gpus=0, actors=1, **options) as executor:
        yield executor


@pytest.fixture
def fresh(mortal, monkeypatch):
    monkeypatch.setattr(mortal, "deadline", 15)
    before[mortal] = mortal.report()
    return mortal


@pytest.mark.slow
def test_a_killed_actor_costs_nothing(fresh, tmp_path):
    expected = run(make_dataset(), NETS)
    once = Item(pixels()[11], os.getpid(), once=str(tmp_path / "killed"))
    results = run(make_dataset({11: once}), NETS, store=FeatureStore(tmp_path), executor=fresh)
    assert (tmp_path / "killed").exists()
    assert_same(results, expected)
    assert kinds(fresh) == ["actor"]
    assert fresh.report()["restarts"] == before[fresh]["restarts"] + 1


@pytest.mark.parametrize(
    "how", [signal.SIGSEGV, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_an_image_that_kills_is_left_out_of_every_backbone(fresh, tmp_path, how):
    """Also of one that was finished before: in its features the row is dropped.

    That the decoder crashes is kept; whoever was killed may have been short of memory.
    """
    store, plugin = FeatureStore(tmp_path), tmp_path / "plugin.py"
    plugin.touch()
    nets = [replace(net, plugins=(str(plugin),)) for net in NETS]
    expected = run(make_dataset(), nets)
    poison = Item(pixels()[11], os.getpid(), signal=how)
    run(make_dataset({11: poison}), nets[:1], store=store)  # reads it here, where it does no harm
    results = run(make_dataset({11: poison}), nets, store=store, executor=fresh)
    assert_same(results, expected, [row for row in range(40) if row != 11])
    for e in results.values():
        assert list(e.unreadable) == [11]
        assert f"ends with code -{how:d}" in e.unreadable[11]
    assert kinds(fresh) == ["actor", "image"]
    again = run(make_dataset({11: poison}), nets, store=store)  # where it does no harm
    for name, e in again.items():
        crashed = how == signal.SIGSEGV
        assert e.cached == (crashed or name == nets[0].name)
        assert e.rows.tolist() == (results[name].rows.tolist() if crashed else [*range(40)])


@pytest.mark.slow
def test_a_hung_image_is_named(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(fresh, "deadline", 3)
    hang = Item(pixels()[10], os.getpid(), hang=True)
    expected = run(make_dataset(n=16), NETS)
    dataset = make_dataset({10: hang}, n=16)
    results = run(dataset, NETS, store=FeatureStore(tmp_path), executor=fresh)
    assert_same(results, expected, [row for row in range(16) if row != 10])
    assert results["a"].unreadable == {10: "a process that decodes it hangs for more than 3 s"}


@pytest.mark.slow
def test_the_guilty_backbone_fails_and_the_others_go_on(fresh, tmp_path):
    hows = enumerate(("kill", "load", "raise", "exit"), start=3)
    bad = [Backbone(how, load=Load(how, scale=k)) for k, how in hows]
    expected = run(make_dataset(), NETS)
    found = run(make_dataset(), [*bad, *NETS], store=FeatureStore(tmp_path), executor=fresh)
    assert_same({name: found[name] for name in "ab"}, expected)
    assert "its process died" in found["kill"].error
    assert found["load"].error == "FileNotFoundError: no weights here"
    assert found["raise"].error == "RuntimeError: a broken network"
    assert "its unit failed" in found["exit"].error
    assert "(RuntimeError: exit called sys.exit)" in found["exit"].error
    assert set(kinds(fresh)) == {"actor", "unit", "backbone"}


def test_a_damaged_image(executor, photos, zoo, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    (root / "ant" / "05.jpg").write_bytes(b"")
    dataset = open_dataset(root)
    results = run(dataset, zoo[:2], store=FeatureStore(tmp_path / "s"), executor=executor)
    assert_same(results, run(dataset, zoo[:2]))
    assert list(results["convnext"].unreadable) == [5]


def test_a_full_disk(executor, dataset, zoo, tmp_path):
    with pytest.warns(UserWarning, match="could not be kept in .*No space left"):
        results = run(dataset, zoo[:2], store=FullStore(tmp_path), executor=executor)
    assert_same(results, run(dataset, zoo[:2]))


@pytest.mark.slow
def test_a_full_disk_and_then_an_image_that_kills(fresh, tmp_path):
    """What no disk took is still there when a row turns out bad after a backbone was finished."""
    nets = [NETS[0], Backbone("small", load=Load(small=True))]  # each reads all images
    later = Item(pixels()[39], os.getpid(), later=str(tmp_path / "read"))
    expected = run(make_dataset(), nets)
    dataset, full = make_dataset({39: later}), FullStore(tmp_path)
    with pytest.warns(UserWarning, match="could not be kept in .*No space left"):
        found = list(extract(dataset, nets, CPU, store=full, executor=fresh))
    first, *again = found
    assert first.rows.tolist() == list(range(40))
    assert {e.backbone.name for e in again} == {"a", "small"}  # one came again
    assert_same({e.backbone.name: e for e in again}, expected, list(range(39)))


def test_a_run_that_ended_early_leaves_nothing_to_the_next(executor, tmp_path):
    """Its units are still under way, and mean other rows."""
    slow = [Backbone(f"n{k}", load=Load("slow", scale=3 + k)) for k in range(4)]
    early = extract(make_dataset(), slow, CPU, store=FeatureStore(tmp_path), executor=executor)
    next(early)
    assert any(state.queue for state in executor.states)
    early.close()
    dataset, backbones = make_dataset(n=30), [*NETS, *slow]
    results = run(dataset, backbones, store=FeatureStore(tmp_path), executor=executor)
    assert_same(results, run(dataset, backbones))


def test_without_room_the_user_is_told(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    executor = RayExecutor(num_gpus=0, actors=1, cpus_per_actor=64)
    with pytest.raises(UserWarning, match=r"no actor could start .* asks for 64 CPUs and 0 GPUs"):
        run(make_dataset(), NETS, store=FeatureStore(tmp_path), executor=executor)


def test_machines_that_do_not_reach_the_store_get_no_work(fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", lambda self: None)  # then the actors do not find the mark
    with pytest.raises(OSError, match=r"no machine of the cluster reaches .*; pass `cache`"):
        run(make_dataset(), NETS, store=FeatureStore(tmp_path), executor=fresh)
    assert kinds(fresh) == ["store"]


def test_images_that_only_the_driver_has_end_the_run(executor, zoo, photos, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")

    class Gone(ImageDataset):
        def digests(self, rows=None, workers=8):
            found = super().digests(rows, workers)
            shutil.rmtree(root)
            return found

    there = open_dataset(root)
    dataset = Gone(there.name, there.items, there.labels, there.classes)
    with pytest.raises(DatasetError, match=r"is not there on the machine 127\.0\.0\.1; every"):
        run(dataset, zoo[:1], store=FeatureStore(tmp_path / "s"), executor=executor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's sockets
def test_machines_come_and_go(ray_cluster, tmp_path):
    """One that joins gets an actor, without being asked for; its loss is nobody's fault."""
    end = tmp_path / "end"
    options = {"unit_seconds": 0.01, "memory": 1}  # short units of one backbone
    executor = RayExecutor(num_gpus=4, cpus_per_actor=0.1, **options)  # one actor per machine

    class Cloud(Watch):
        node, lost = None, False

        def advance(self, name, n):
            super().advance(name, n)
            if self.node is None:
                self.node = ray_cluster.add_node(num_cpus=1, num_gpus=4)
            placed = [a for a in executor.states if a.info is not None]
            if not self.lost and any(
                a.images and a.info.node == self.node.node_id for a in placed
            ):
                ray_cluster.remove_node(self.node, allow_graceful=False)
                self.lost = True
            if "machine" in kinds(executor):
                end.touch()

    expected, watch = run(make_dataset(), NETS), Cloud()
    slow = [Backbone(f"n{k}", load=Load(str(end), scale=3 + k)) for k in range(8)]
    with executor:
        results = run(
            make_dataset(), [*NETS, *slow], store=FeatureStore(tmp_path / "store"),
            executor=executor, progress=watch,
        )  # fmt: skip
        assert watch.lost
        assert "machine" in kinds(executor)
    assert_same({name: results[name] for name in "ab"}, expected)
    assert all(e.error is None for e in results.values())


DRIVER = """
import sys, sfda_tune
from sfda_tune.extraction import plan
from sfda_tune_ray import RayExecutor
plan.SHARD = 8
if __name__ == "__main__":
    executor = RayExecutor(sys.argv[1], num_gpus=0, actors=1, unit_seconds=0.01)
    sfda_tune.rank(sys.argv[2], sys.argv[3], cache=sys.argv[4], executor=executor)
"""


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_there(
    executor, ray_cluster, photos, toy_zoo, tmp_path, clean_environment
):
    script, store = tmp_path / "driver.py", FeatureStore(tmp_path / "store")
    script.write_text(DRIVER)
    places = [ray_cluster.address, str(photos), str(toy_zoo), str(store.root)]
    driver = subprocess.Popen([sys.executable, str(script), *places], stderr=subprocess.DEVNULL)
    wait_for(lambda: sum(1 for _ in store.entries()) >= 4, 120)
    driver.kill()
    assert driver.wait(60) != 0
    time.sleep(1)  # what an actor was about to write
    left = 20 - sum(1 for _ in store.entries())
    watch = Watch()
    dataset, zoo = open_dataset(photos), resolve_backbones(toy_zoo)
    results = run(dataset, zoo, store=store, executor=executor, progress=watch)
    assert 0 < left <= 16
    assert watch.seen <= 8 * left
    assert_same(results, run(dataset, zoo))
    assert not list(Path(store.root).rglob("*.tmp"))[1:]  # at most the marker


# Ray itself -------------------------------------------------------------------------------------
OWN = """
import os, psutil, ray, sfda_tune
from sfda_tune_ray import RayExecutor
if __name__ == "__main__":
    before = dict(os.environ)
    with RayExecutor("local", options={"num_cpus": 1}) as executor:
        ports = [c.laddr.ip for p in psutil.Process().children(recursive=True) + [psutil.Process()]
                 for c in p.net_connections("tcp") if c.status == "LISTEN"]
        ports = {ip.removeprefix("::ffff:") for ip in ports}
        assert ports == {"127.0.0.1"}, ports
        assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
        ranking = sfda_tune.rank("digits", "demo:*noise*", samples=40, executor=executor)
        assert not ranking.failed
        children = psutil.Process().children(recursive=True)
    assert not ray.is_initialized()
    assert not psutil.wait_procs(children, 20)[1]
    assert {k: v for k, v in os.environ.items() if "AUTH" in k} == {
        k: v for k, v in before.items() if "AUTH" in k}
    assert not os.path.exists(os.path.expanduser("~/.ray/auth_token"))
    print("fine")
"""


@pytest.mark.slow
def test_a_ray_of_our_own_is_reached_by_nobody_else(tmp_path, clean_environment):
    environment = {k: v for k, v in clean_environment.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
    script = tmp_path / "own.py"
    script.write_text(OWN)
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr


def test_an_address_where_nobody_is(monkeypatch):
    """Ray alone would try for minutes."""
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for given in (address, f"ray://{address}"):
        with pytest.raises(ConnectionError, match=r"`address` is .* no cluster answers there"), \
                RayExecutor(given):  # fmt: skip
            pass


def greet(server, words):
    server.settimeout(60)
    with server.accept()[0] as line:
        line.sendall(words)
        line.recv(100)


@pytest.mark.parametrize("who", ["dead", "silent", "another", "in RAY_ADDRESS", "nobody"])
def test_auto_says_in_seconds_that_no_cluster_answers(who, monkeypatch, tmp_path):
    """Ray itself tries for minutes."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(services, "find_gcs_addresses", set)  # not the cluster of the tests
    monkeypatch.setattr(cluster, "KNOCK_SECONDS", 1)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    told = "'auto' but no cluster answers there (no Ray runs on this machine)"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if who == "another":
            Thread(target=greet, args=(server, b"SSH-2.0-any"), daemon=True).start()
        elif who != "silent":
            server.close()
        if who == "in RAY_ADDRESS":
            monkeypatch.setenv("RAY_ADDRESS", address)
            told = f"'auto', {address} by RAY_ADDRESS, but"
        elif who != "nobody":
            (tmp_path / "ray").mkdir()
            (tmp_path / "ray/ray_current_cluster").write_text(address)
            told = f"'auto', {address} by the last `ray start`, but"
        with pytest.raises(ConnectionError) as error, RayExecutor("auto"):
            pass
    assert f"`address` is {told}" in str(error.value)
    assert "start one (`ray start --head`), or leave the address out" in str(error.value)


def test_another_ray_is_refused_while_connected(ray_cluster):
    for address in ("local", "127.0.0.1:1", "ray://127.0.0.1:10001"):
        with pytest.raises(ValueError, match=f"{address}' but this process is connected"), \
                RayExecutor(address):  # fmt: skip
            pass
    local = ray_cluster.address.replace("127.0.0.1", "localhost")
    for address in (None, "auto", ray_cluster.address, local):
        with RayExecutor(address):
            pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"actors": 0}, "`actors` must be an integer ≥ 1 but is 0"),
        ({"attempts": 2.5}, "`attempts` must be an integer ≥ 1 but is 2.5"),
        ({"memory": "8G"}, "`memory` must be positive but is '8G'"),
        ({"num_gpus": -1}, "`num_gpus` must be 0, 1/n or a whole number but is -1"),
        ({"num_gpus": 0.3}, "`num_gpus` must be 0, 1/n or a whole number but is 0.3"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RayExecutor(**arguments)


def test_command_line(ray_cluster, monkeypatch, capsys, tmp_path):
    from sfda_tune.cli.main import main
    from sfda_tune.cli.options import spread_lists

    for given, then in {
        "--ray": "--ray=",
        "--ray -q": "--ray= -q",
        "--ray auto": "--ray auto",
        "--ray ray://10.0.0.1:10001 -b x y": "--ray ray://10.0.0.1:10001 -b x -b y",
        "--ray digits": "--ray= digits",
    }.items():
        assert " ".join(spread_lists(given.split())) == then
    command = "rank digits -b demo:*noise* --samples 40 -q --device cpu --ray"
    monkeypatch.setattr(module, "count_places", lambda *asked: 1)  # each imports torch
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` changes both
    terminate = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(SystemExit):
        main([*command.split(), "--cache", str(tmp_path)])
    signal.signal(signal.SIGTERM, terminate)
    told = capsys.readouterr()
    assert "demo:resnet_noise" in told.out, told.err
    assert sum(1 for _ in FeatureStore(tmp_path).entries()) == 5


def test_a_bucket_holds_whole_entries_or_none(dataset, zoo):
    pytest.importorskip("fsspec")
    store = open_store("memory://bucket/features")
    first = run(dataset, zoo[:1], store=store)
    again = run(dataset, zoo[:1], store=store)
    assert again["convnext"].cached
    assert_same(again, first)
    assert not len(store.get("0" * 40, dataset.digests()).known)
    with pytest.raises(ValueError, match="cannot be opened"):
        open_store("nonsense://bucket")


def test_the_same_pixels_in_other_files_are_copies_here_and_there(
    photos, toy_zoo, tmp_path, executor
):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    for file in sorted(root.glob("*/*"))[::3]:
        with Image.open(file) as image:
            image.convert("RGB").save(file.with_name(f"{file.stem}_again.bmp"))
    how = {"precision": "bfloat16", "cache": tmp_path / "here"}
    with pytest.warns(CopiesWarning, match="images are exact copies of others"):
        here = sfda_tune.rank(root, toy_zoo, device="cpu", **how)
    how["cache"] = tmp_path / "there"
    with pytest.warns(CopiesWarning, match="images are exact copies of others"):
        there = sfda_tune.rank(root, toy_zoo, executor=executor, **how)
    assert len(here.info["copies"]) == len(list(root.glob("*/*_again.bmp")))
    assert there.info["copies"] == here.info["copies"]
    assert dict(there) == pytest.approx(dict(here), rel=1e-4)


def test_a_unit_costs_what_it_computes_not_what_it_waits_for(tmp_path):
    """Else actors would leave the networks that they have just fetched for others."""
    actor, dataset = module._Extractor(1, 0), make_dataset(n=8)
    everything = np.ones(8, bool)
    jobs = {"a": BackboneJob(describe(Backbone("a", load=Load("late"))), None, None, ~everything)}
    made = plan.Plan("run", dataset, jobs, dataset.digests(), 0, {"a": everything})
    units = list(made.units(["a"], [0], 0))
    try:
        result = actor.run(Worker(CPU, FeatureStore(tmp_path)), units, None, [], None)
    finally:
        forget_pixels(made.run)  # as the end of a run does
    assert result.outcomes[0].error is None
    assert 0 < result.computing < result.seconds - 0.4


@pytest.mark.slow
def test_a_budget_is_kept_and_what_it_left_is_told(executor, tmp_path):
    class Asleep(RayExecutor):
        def __enter__(self):
            raise AssertionError("there is nothing to compute")

    nets = [Backbone(f"n{k:02}", load=Load("slow", scale=1 + k / 9)) for k in range(16)]
    options = {"metric": "sfda", "device": "cpu", "cache": tmp_path / "cache"}
    dataset = make_dataset()
    sfda_tune.rank(dataset, NETS, executor=executor, **{**options, "cache": tmp_path / "other"})
    started = time.monotonic()
    cut = sfda_tune.rank(dataset, nets, budget=2, race=False, executor=executor, **options)
    assert time.monotonic() - started < 2 + 5
    unseen = cut.info["not_looked_at"]
    assert 0 < len(unseen) < 16
    names = [net.name for net in nets]
    assert unseen == [name for name in names if name in unseen]
    assert all(cut.failed[name].startswith("not looked at: the 2 s ") for name in unseen)
    seen = [net for net in nets if net.name not in unseen]
    assert seen
    again = sfda_tune.rank(dataset, seen, budget=60, executor=Asleep(num_gpus=0), **options)
    assert {**again} == {name: cut[name] for name in again}  # kept: Ray is not even started
    whole = sfda_tune.rank(dataset, nets, budget="10m", executor=executor, **options)
    local = sfda_tune.rank(dataset, nets, metric="sfda", device="cpu", cache=False, workers=0)
    assert not whole.failed
    assert "not_looked_at" not in whole.info
    assert {**whole} == {**local}


def test_what_an_executor_cannot_keep_to_is_refused(dataset, zoo, tmp_path):
    class Mine:
        """Bounds no weights."""

    with pytest.raises(ValueError, match="`weights_disk` is for downloads of this process, or of"):
        sfda_tune.rank(dataset, zoo, executor=Mine(), cache=tmp_path, weights_disk="1GB")
    with pytest.raises(ValueError, match="with `map_fn`; leave one out"):
        sfda_tune.rank(dataset, zoo, map_fn=map, weights_disk="1GB")
