"""The plan and the dispatcher, without Ray and without waiting."""

import importlib.util
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from sfda_tune_ray.dispatch import Bundle, Dispatcher, make_bundles

_FILE = Path(__file__).parents[1] / "benchmarks" / "ray_extraction.py"


def make(*todo, **options):
    """One bundle for each number of shards; a shard of the k-th takes 10 / (k + 1)."""
    bundles = [Bundle((f"b{k}",), 10.0 / (k + 1), deque(range(n))) for k, n in enumerate(todo)]
    return Dispatcher(bundles, **options)


def take_all(dispatcher, actors=2):
    tasks, actor = [], 0
    while (task := dispatcher.next(actor)) is not None:
        tasks.append(task)
        dispatcher.complete(task, None)
        actor = (actor + 1) % actors
    return tasks


# Bundles ----------------------------------------------------------------------------------------
def test_bundles_share_geometry_and_fit_the_memory():
    rng = np.random.default_rng(0)
    sizes = {f"b{k}": (k % 3, float(rng.lognormal(16, 1)), 224**2) for k in range(60)}
    missing = dict.fromkeys(sizes, frozenset(range(200)))
    bundles = make_bundles(sizes, missing, memory=4e8, actors=4)
    assert sorted(n for b in bundles for n in b.names) == sorted(sizes)
    for bundle in bundles:
        assert len({sizes[n][0] for n in bundle.names}) == 1
        assert len(bundle.names) == 1 or 4 * sum(sizes[n][1] for n in bundle.names) <= 4e8
    assert len(bundles) < 40
    assert bundles[0].cost == max(b.cost for b in bundles)  # big backbones first


def test_a_bundle_lacks_what_one_of_its_backbones_lacks():
    sizes = dict.fromkeys("abc", (0, 1e6, 224**2))
    missing = {"a": frozenset({1, 2}), "b": frozenset({2, 9}), "c": frozenset()}
    (bundle,) = make_bundles(sizes, missing, memory=1e9, actors=0.01)
    assert bundle.names == ("a", "b")
    assert list(bundle.todo) == [1, 2, 9]


def test_few_images_are_shared_out_to_all_actors():
    sizes = {f"b{k}": (0, 1e7, 224**2) for k in range(16)}
    bundles = make_bundles(sizes, dict.fromkeys(sizes, frozenset({0})), memory=1e12, actors=8)
    assert len(bundles) == 16


# Tasks ------------------------------------------------------------------------------------------
def test_each_shard_of_each_bundle_once():
    dispatcher = make(20, 7, 1, seconds=1e9)
    tasks = take_all(dispatcher)
    found = sorted((t.names[0], s) for t in tasks for s in t.shards)
    assert found == sorted((f"b{k}", s) for k, n in enumerate((20, 7, 1)) for s in range(n))
    assert not dispatcher.unfinished


def test_an_actor_stays_with_its_bundle_and_the_largest_comes_first():
    dispatcher = make(50, 40, 30, n_actors=2)
    first, second = dispatcher.next("x"), dispatcher.next("y")
    assert [first.names, second.names] == [("b0",), ("b0",)]  # twice what b1 is
    dispatcher = make(50, 90, n_actors=2)
    assert [dispatcher.next(a).names for a in "xyxyxy"] == [("b0",), ("b1",)] * 3


def test_units_take_the_seconds_asked_for_and_shrink_to_single_shards():
    dispatcher = make(400, n_actors=1, seconds=20.0)
    dispatcher.bundles[0].most = 100
    sizes = []
    while (task := dispatcher.next("x")) is not None:
        sizes.append(len(task.shards))
        dispatcher.complete(task, 2.0 * len(task.shards))
    assert sizes[0] == 1  # nothing was measured yet
    assert max(sizes) == sizes[1] == 10
    assert sizes[-1] == 1
    assert sizes[1:] == sorted(sizes[1:], reverse=True)


def test_one_ahead_but_not_at_the_end():
    dispatcher = make(100, n_actors=2)
    assert dispatcher.next("x") is not None
    assert dispatcher.next("x", ahead=True) is not None
    dispatcher = make(3, n_actors=2)
    assert dispatcher.next("x") is not None
    assert dispatcher.next("x", ahead=True) is None
    assert dispatcher.next("y") is not None


# Faults -----------------------------------------------------------------------------------------
def test_who_ends_four_processes_has_failed_and_only_he():
    bundle = Bundle(("a", "guilty", "c"), 1.0, deque([0]))
    dispatcher, seen = Dispatcher([bundle]), []
    while dispatcher.unfinished:
        task = dispatcher.next("x")
        seen.append((task.names, task.isolated))
        if "guilty" in task.names:
            dispatcher.record_failure(task, "died", died=True)
        else:
            dispatcher.complete(task, 1.0)
    together = ("a", "guilty", "c")
    assert seen[:2] == [(together, False), (together, True)]  # at once, and the images first
    assert {names for names, _ in seen[2:]} == {("a",), ("guilty",), ("c",)}
    assert sum("guilty" in names for names, _ in seen) == 4
    assert sum(isolated for _, isolated in seen) == 1
    assert dispatcher.failed == {"guilty"}


def test_an_error_waits_until_the_end():
    dispatcher = make(2)
    task = dispatcher.next("x")
    dispatcher.record_failure(task, "error", died=False)
    other = dispatcher.next("x", ahead=False)
    assert other is task  # nothing of `again` is forgotten
    assert not task.isolated
    lost = [dispatcher.record_failure(task, "error", died=False)]
    while not lost[-1]:
        lost.append(dispatcher.record_failure(dispatcher.next("x"), "error", died=False))
    assert lost == [(), (), ("b0",)]  # with the first: four


def test_a_lost_machine_is_no_attempt():
    dispatcher = make(1, attempts=2)
    task = dispatcher.next("x")
    for _ in range(10):
        assert dispatcher.record_failure(task, "node", died=True) == ()
        dispatcher.reset_attempts(task)
        task = dispatcher.next("x")
    assert task.attempts == 0
    assert not task.isolated


def test_a_lost_machine_is_no_attempt_of_the_parts_either():
    """That a machine is lost is often known after its task was parted and given out again."""
    bundle = Bundle(("a", "b"), 1.0, deque([0]))
    dispatcher = Dispatcher([bundle], attempts=3)
    task = dispatcher.next("x")
    dispatcher.record_failure(task, "died", died=True)
    dispatcher.record_failure(dispatcher.next("x"), "node", died=True)
    a, b = dispatcher.next("x"), dispatcher.next("x")
    assert (a.names, b.names, a.attempts, b.attempts) == (("a",), ("b",), 2, 2)
    dispatcher.reset_attempts(task)
    assert (a.attempts, b.attempts) == (1, 1)
    assert dispatcher.record_failure(a, "died", died=True) == ()
    assert dispatcher.record_failure(dispatcher.next("x"), "died", died=True) == ("a",)


def test_what_nobody_began_comes_first_and_blameless():
    dispatcher = make(100)
    first, ahead = dispatcher.next("x"), dispatcher.next("x", ahead=True)
    dispatcher.give_back(ahead)
    dispatcher.record_failure(first, "died", died=True)
    assert [dispatcher.next("y"), dispatcher.next("y")] == [first, ahead]
    assert ahead.attempts == 0
    dispatcher.complete(first, 100.0)  # with what the search for the fault took
    assert dispatcher.bundles[0].seconds is None
    dispatcher.complete(ahead, 2.0)
    assert dispatcher.bundles[0].seconds == 2.0
    assert dispatcher.pending == 0


def test_a_failed_backbone_gets_no_more_work():
    dispatcher = Dispatcher(
        [Bundle(("a", "b"), 1.0, deque([0, 1])), Bundle(("c",), 1.0, deque([0]))]
    )
    dispatcher.complete(dispatcher.next("x"), 1.0)
    dispatcher.drop("a")
    dispatcher.drop("c")
    assert [t.names for t in take_all(dispatcher)] == [("b",)]


# Makespan ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("ray_extraction_benchmark", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("actors", "backbones", "shards"), [(8, 50, 49), (800, 200, 196)])
def test_makespan_is_near_the_ideal(benchmark, actors, backbones, shards):
    ratio, units, _ = benchmark.simulate(backbones, shards, actors, seed=0)
    assert 1 <= ratio <= 1.05
    assert units > 10 * actors


def test_downloads_hold_few_up(benchmark):
    """A second for each network, which comes while the unit before computes."""
    ratios = [benchmark.simulate(50, 49, 8, seed, load=0.5, download=1.0)[0] for seed in range(8)]
    assert 1 <= np.median(ratios) <= 1.05


def test_actors_seldom_load_other_networks(benchmark):
    """They stay with their bundle although another has somewhat more left."""
    loads = [benchmark.simulate(50, 49, 8, seed, load=0.5)[2] for seed in range(4)]
    assert np.mean(loads) < 0.02
