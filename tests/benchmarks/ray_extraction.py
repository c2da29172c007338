"""What extraction over actors costs, against the local path and against the ideal.

    python tests/benchmarks/ray_extraction.py [--samples 1024] [--repeats 3] [--only simulation]

*Overhead*: the same backbones, images, shards and number of threads; local are as many processes
(`ProcessPoolExecutor.map` as `map_fn`) as there are actors, each decoding for itself, as actors
do, and warmed up, as actors are: start-up is left out on both sides. The plain local path, one
process with decoding processes beside it, stands below for comparison.

*Simulation*: the dispatcher that the executor uses, under a virtual clock. Costs of backbones are
lognormal (sigma 1.2), the planner's guess is off by a lognormal factor (sigma .5), each unit by
another (sigma .1). Ideal is the larger of work / actors and the largest unit, after the first
download. An actor downloads on its own, one network after the other, and keeps what has come:
those of its units and of the one that it may get next; a unit begins with what is there.

*Driver*: completions per second through Ray with empty units; seconds and memory to plan 1,000
backbones × 10⁶ rows.
"""

import argparse
import heapq
import multiprocessing
import os
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np

GEOMETRIES = 20


def simulate(n_backbones, n_shards, n_actors, seed, load=0.0, bundle=16, download=0.0):
    """Return makespan / ideal, how many units there were, and loads / work.

    A network takes an actor `load` seconds to open and `download` seconds to fetch.
    """
    from sfda_tune_ray.dispatch import Dispatcher, make_bundles

    rng = np.random.default_rng(seed)
    cost = {f"b{k}": float(c) for k, c in enumerate(rng.lognormal(0, 1.2, n_backbones))}
    guess = {
        name: (int(rng.integers(GEOMETRIES)), 1e7 * c * rng.lognormal(0, 0.5), 224**2)
        for name, c in cost.items()
    }
    missing = dict.fromkeys(cost, frozenset(range(n_shards)))
    memory = 4 * bundle * float(np.mean([params for _, params, _ in guess.values()]))
    bundles = make_bundles(guess, missing, memory=memory, actors=n_actors)
    for b in bundles:
        b.most = 8
    dispatcher = Dispatcher(bundles, n_actors=n_actors)
    true = {id(b): 0.5 + sum(cost[name] for name in b.names) for b in bundles}
    queues = [deque() for _ in range(n_actors)]
    last, computing, events = {}, {}, []
    here = [{} for _ in range(n_actors)]  # name → when its weights have come
    line = [0.0] * n_actors  # when all have that were asked for
    work = loads = now = 0.0
    units = 0

    def begin(actor, at):
        nonlocal work, loads
        task = queues[actor][0]
        seconds = true[id(task.bundle)] * len(task.shards) * rng.lognormal(0, 0.1)
        loading = load * len(task.names) * (last.get(actor) is not task.bundle)
        last[actor], computing[actor] = task.bundle, seconds
        work, loads = work + seconds, loads + loading
        end = at + seconds + loading
        if download:
            end = fetch(actor, at, task, (seconds + loading) / len(task.names))
        heapq.heappush(events, (end, actor))

    def fetch(actor, at, task, each):
        """Ask for what is needed, and for what may be; return when the task ends."""
        ahead = [other.names for other in list(queues[actor])[1:]]
        for names in (task.names, *ahead, dispatcher.foresee(actor)):
            for name in names:
                if name not in here[actor]:
                    here[actor][name] = line[actor] = max(line[actor], at) + download
        for come in sorted(here[actor][name] for name in task.names):
            at = max(at, come) + each
        return at

    def fill(actor, at):
        while len(queues[actor]) < 2:
            task = dispatcher.next(actor, ahead=bool(queues[actor]))
            if task is None:
                return
            queues[actor].append(task)
            if len(queues[actor]) == 1:
                begin(actor, at)

    for actor in range(n_actors):
        fill(actor, 0.0)
    while events:
        now, actor = heapq.heappop(events)
        dispatcher.complete(queues[actor].popleft(), computing[actor])
        units += 1
        if queues[actor]:
            begin(actor, now)
        fill(actor, now)
    assert not dispatcher.unfinished
    ideal = max(work / n_actors, *true.values()) + download
    return now / ideal, units, loads / work


def show_simulation(repeats):
    print("actors  backbones  rows       load s  fetch s  makespan/ideal median  p95    units  "
          "loads/work")  # fmt: skip
    for n_actors, n_backbones, n_shards, load, download in (
        (8, 50, 49, 0.0, 0.0), (8, 50, 49, 0.5, 0.0), (8, 50, 10, 0.0, 0.0), (8, 50, 49, 0.5, 1.0),
        (8, 50, 49, 0.5, 5.0),
        (800, 1000, 977, 0.0, 0.0), (800, 1000, 977, 0.5, 0.0), (800, 1000, 977, 0.5, 1.0),
        (800, 1000, 977, 0.5, 5.0), (800, 200, 196, 0.0, 0.0), (800, 200, 196, 0.5, 1.0),
    ):  # fmt: skip
        runs = [
            simulate(n_backbones, n_shards, n_actors, seed, load, download=download)
            for seed in range(10 * repeats if n_actors == 8 else repeats)
        ]
        ratio = [r for r, _, _ in runs]
        print(
            f"{n_actors:6}  {n_backbones:9}  {1024 * n_shards:9,}  {load:6}  {download:7}  "
            f"{np.median(ratio):21.3f}  {np.quantile(ratio, 0.95):.3f}  {runs[0][1]:6}  "
            f"{np.mean([x for _, _, x in runs]):.3f}",
            flush=True,
        )


def one_thread():
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)


def wait(seconds):
    time.sleep(seconds)


def show_overhead(samples, repeats, zoo):
    from sfda_tune_ray import RayExecutor

    import sfda_tune
    from sfda_tune.extraction import plan
    from sfda_tune.extraction.run import extract
    from sfda_tune.extraction.settings import Settings
    from sfda_tune.extraction.store import FeatureStore

    one_thread()
    plan.SHARD = 128
    dataset = sfda_tune.open_dataset("digits" if zoo is None else zoo[0]).sample(samples)
    backbones = sfda_tune.resolve_backbones(
        "demo:*" if zoo is None else zoo[1], plugins=[] if zoo is None else zoo[2:]
    )
    small, settings = dataset.sample(64), Settings(device="cpu", workers=0)
    seconds = {"2 processes": [], "2 actors": [], "plain local": []}

    def timed(name, how, data, settings=settings, **more):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            found = list(extract(data, backbones, settings, store=FeatureStore(folder), **more))
            if data is dataset:
                seconds[name].append(time.perf_counter() - started)
        assert not any(e.error for e in found), [e.error for e in found]

    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(2, mp_context=context, initializer=one_thread) as pool,
        RayExecutor("local", actors=2, num_gpus=0, cpus_per_actor=1) as executor,
    ):
        list(pool.map(wait, [1, 1]))  # both processes are there
        for name, more in (
            ("2 processes", {"map_fn": pool.map}),
            ("2 actors", {"executor": executor}),
        ):
            for _ in range(2):
                timed(name, more, small, **more)
        for _ in range(repeats):
            timed("2 processes", None, dataset, map_fn=pool.map)
            timed("2 actors", None, dataset, executor=executor)
            timed("plain local", None, dataset, Settings(device="cpu"))
        report = executor.report()
    print(f"{len(backbones)} backbones × {len(dataset)} images, shards of {plan.SHARD}")
    for name, each in seconds.items():
        print(f"{name:12} best {min(each):7.2f} s   all {[round(s, 2) for s in each]}")
    print(f"2 actors / 2 processes: {min(seconds['2 actors']) / min(seconds['2 processes']):.3f}")
    print(f"decodes per image: {report['decodes_per_image']:.2f}")


def show_driver():
    import psutil
    from sfda_tune_ray.dispatch import Dispatcher, make_bundles

    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    tracemalloc.start()
    rng = np.random.default_rng(0)
    images = [f"{k:040x}" for k in range(10**6)]  # digests, which the plan holds
    sizes = {
        f"backbone_{k}": (int(rng.integers(117)), float(rng.lognormal(17, 1)), 224**2)
        for k in range(1000)
    }
    everything = frozenset(range(977))
    missing = dict.fromkeys(sizes, everything)
    bundles = make_bundles(sizes, missing, memory=24e9, actors=800)
    dispatcher = Dispatcher(bundles, n_actors=800)
    tasks = [dispatcher.next(actor, ahead=bool(k)) for k in range(2) for actor in range(800)]
    traced = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    seconds, grown = time.perf_counter() - started, process.memory_info().rss - before
    print(
        f"1,000 backbones × 10⁶ rows: {len(bundles)} bundles, planned in {seconds:.1f} s, "
        f"{traced / 1e6:.0f} MB of Python objects, RSS + {grown / 1e6:.0f} MB "
        f"({len(images):,} digests, {sum(t is not None for t in tasks)} tasks out)"
    )


def show_completions(seconds=5.0):
    import ray
    from sfda_tune_ray.cluster import connect
    from sfda_tune_ray.dispatch import Bundle, Dispatcher

    with connect("local"):

        @ray.remote(num_cpus=0)
        class Nothing:
            def run(self):
                return 0

        actors = [Nothing.remote() for _ in range(4)]
        ray.get([a.run.remote() for a in actors])
        bundles = [Bundle((f"b{k}",), 1.0, deque(range(977))) for k in range(1000)]
        dispatcher, queues = Dispatcher(bundles, n_actors=4), {a: deque() for a in actors}
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for actor, queue in queues.items():
                while len(queue) < 2:
                    task = dispatcher.next(actor, ahead=bool(queue))
                    queue.append((actor.run.remote(), task))
            waiting = {queue[0][0]: queue for queue in queues.values()}
            ready, rest = ray.wait(list(waiting), timeout=0.5)
            if ready and rest:
                ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
            for ref in ready:
                ray.get(ref)
                dispatcher.complete(waiting[ref].popleft()[1], 10.0)
                done += 1
    print(f"driver: {done / seconds:.0f} completions per second (4 actors, empty units)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--zoo", nargs="*", help="data set, backbones, plug-in; default: demo")
    parser.add_argument("--only", choices=["simulation", "overhead", "driver", "completions"])
    o = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, show in {
        "simulation": lambda: show_simulation(o.repeats),
        "driver": show_driver,
        "completions": show_completions,
        "overhead": lambda: show_overhead(o.samples, o.repeats, o.zoo),
    }.items():
        if o.only in (None, name):
            show()
            sys.stdout.flush()


if __name__ == "__main__":
    main()
