import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageFile
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

import sfda_tune
from sfda_tune import DatasetError, open_dataset
from sfda_tune.backbones import devices, loading
from sfda_tune.backbones.preprocessing import Preprocessing
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.data import decoding as images
from sfda_tune.data.decoding import Passing
from sfda_tune.extraction import pixels, plan
from sfda_tune.extraction import run as extraction
from sfda_tune.extraction import worker as workers
from sfda_tune.extraction.crashes import find_crashing_images
from sfda_tune.extraction.run import extract
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import Entry, FeatureStore

CPU = Settings(device="cpu", workers=0)


def run(dataset, backbones, settings=CPU, **kwargs):
    return {e.backbone.name: e for e in extract(dataset, backbones, settings, **kwargs)}


def features(results):
    return {name: e.features.x for name, e in results.items()}


@pytest.fixture(scope="module")
def zoo(toy_zoo):
    return resolve_backbones(toy_zoo)


@pytest.fixture(scope="module")
def dataset(photos):
    return open_dataset(photos)


@pytest.fixture(scope="module")
def plain(photos, toy_zoo):
    """What a user of timm would write: one loop per backbone, one image at a time."""
    result = {}
    files = sorted(photos.glob("*/*.jpg"))
    for folder in sorted(toy_zoo.iterdir()):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        transform = create_transform(**resolve_model_data_config(model), is_training=False)
        with torch.inference_mode():
            rows = [model(transform(_open(file))[None])[0].numpy() for file in files]
        result[folder.name] = np.stack(rows)
    return result


def _open(file):
    from PIL import ImageOps

    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_a_plain_timm_loop(dataset, zoo, plain, workers):
    results = run(dataset, zoo, replace(CPU, workers=workers))
    assert sorted(results) == sorted(plain)
    for name, expected in plain.items():
        assert results[name].error is None
        x = results[name].features.x
        assert x.shape == expected.shape
        assert np.abs(x - expected).max() <= 1e-5
        assert np.abs(expected).max() > 0.01  # it could have differed
        assert results[name].features.y.tolist() == [0] * 12 + [1] * 12 + [2] * 12
        assert results[name].images_per_second > 0


class Counting:
    """A dataset that counts its decodes."""

    def __init__(self, dataset):
        self.dataset, self.count, self.lock = dataset, Counter(), threading.Lock()

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def subset(self, rows):
        part = Counting(self.dataset.subset(rows))
        part.count, part.names = self.count, [self.dataset.item_name(r) for r in rows]
        return part

    def load(self, row):
        with self.lock:
            self.count[self.names[row]] += 1
        return self.dataset.load(row)


@pytest.mark.parametrize("map_fn", [None, "threads"])
def test_every_image_is_decoded_once_for_all_backbones(dataset, zoo, map_fn, monkeypatch):
    monkeypatch.setattr(plan, "SHARD", 10)
    counting = Counting(dataset)
    if map_fn:
        with ThreadPoolExecutor(3) as pool:
            run(counting, zoo, map_fn=pool.map)
    else:
        run(counting, zoo)
    assert set(counting.count.values()) == {1}
    assert len(counting.count) == len(dataset)


def test_runs_side_by_side_do_not_disturb_each_other(dataset, zoo):
    alone = features(run(dataset, zoo[:2]))
    counts = [Counting(dataset) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda counting: features(run(counting, zoo[:2])), counts))
    for result, counting in zip(results, counts, strict=True):
        for name, x in result.items():
            np.testing.assert_allclose(x, alone[name], atol=1e-6)
        assert len(counting.count) == 36
    assert not pixels.SHARED


def test_pixels_take_no_more_memory_than_one_may(dataset, zoo, monkeypatch):
    """A process of a pool is not told that a run has ended."""
    worker, left = workers.Worker(CPU, None), []

    def pool(fn, units):
        (unit,) = units
        for k in range(6):  # as if of six runs
            yield worker(replace(unit, run=f"{unit.run} {k}"))
            left.append(sum(shared.nbytes for _, shared in pixels.SHARED.values()))

    one = 36 * 3 * 32 * 32
    monkeypatch.setattr(pixels, "PIXEL_BYTES", 2.5 * one)
    run(dataset, zoo[:1], map_fn=pool)
    assert left == [one, 2 * one, 2 * one, 2 * one, 2 * one, 2 * one]
    monkeypatch.setattr(pixels, "IDLE", 0.01)
    monkeypatch.setattr(pixels, "_JANITOR", None)
    with pixels.SHARED_LOCK:
        pixels.watch_idle()
    while pixels._JANITOR is not None:
        pixels._JANITOR.join(0.1)
    assert not pixels.SHARED


def test_neither_shards_nor_how_many_at_once_nor_workers_change_anything(
    dataset, zoo, monkeypatch
):
    whole = features(run(dataset, zoo))
    monkeypatch.setattr(plan, "SHARD", 8)
    settings = replace(CPU, batch_size=4)
    small = features(run(dataset, zoo, settings))
    monkeypatch.setattr(pixels, "PIXEL_BYTES", 1)  # one shard at once
    alone = features(run(dataset, zoo, settings))
    workers = features(run(dataset, zoo, replace(settings, workers=2)))
    for name, x in whole.items():
        np.testing.assert_allclose(small[name], x, atol=2e-6)
        np.testing.assert_array_equal(alone[name], small[name])  # to the last bit
        np.testing.assert_array_equal(workers[name], small[name])


def test_geometries_follow_each_other_where_not_all_pixels_fit(dataset, zoo, monkeypatch):
    monkeypatch.setattr(plan, "SHARD", 8)
    settings, opened, most = replace(CPU, batch_size=4), [], []
    whole = features(run(dataset, zoo, settings))
    load, pixels_of = workers.loading.load, pixels.SharedPixels.pixels

    def note(backbone):
        opened.append(backbone.name)
        return load(backbone)

    def measure(shared, key, rows):
        most.append(sum(s.nbytes for _, s in pixels.SHARED.values()))
        return pixels_of(shared, key, rows)

    monkeypatch.setattr(workers.loading, "load", note)
    monkeypatch.setattr(pixels.SharedPixels, "pixels", measure)
    memory = 5 * 8 * 3 * 48 * 48  # of all shards, at the largest geometry
    monkeypatch.setattr(pixels, "PIXEL_BYTES", memory)
    monkeypatch.setattr(plan, "OPENING", 0.0)  # images cost more: they are decoded once
    parts = features(run(dataset, zoo, settings))
    assert len(opened) > len(zoo)
    opened.clear()
    monkeypatch.setattr(plan, "OPENING", 100.0)
    alone = features(run(dataset, zoo, settings))
    assert sorted(opened) == sorted(backbone.name for backbone in zoo)  # once each
    assert abs(opened.index("resnet") - opened.index("convnext")) == 1  # share a geometry
    assert max(most) <= memory
    for name, x in whole.items():
        np.testing.assert_array_equal(parts[name], x)
        np.testing.assert_array_equal(alone[name], x)


def test_a_failed_allocation_shifts_no_pixels(dataset, zoo, tmp_path, monkeypatch):
    whole, store, empty = features(run(dataset, zoo[:3])), FeatureStore(tmp_path), torch.empty

    def fails_once(*args, **kwargs):
        if "pin_memory" in kwargs:
            monkeypatch.setattr(torch, "empty", empty)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", fails_once)
    first = run(dataset, zoo[:3], store=store)
    assert [e.error is None for e in first.values()] == [False, True, True]
    second = run(dataset, zoo[:3], store=store)
    for name, x in whole.items():
        np.testing.assert_allclose(second[name].features.x, x, atol=2e-6)


def test_an_outcome_that_never_comes_is_an_error(dataset, zoo):
    results = run(dataset, zoo[:2], map_fn=lambda fn, units: map(fn, list(units)[1:]))
    assert (
        "nothing came back for 1 of its 1 parts; look at what runs them (`map_fn`"
        in results["convnext"].error
    )
    assert results["efficientnet"].error is None


def test_an_image_that_ends_the_decoding_is_named(photos, zoo, tmp_path):
    data = open_dataset(photos)
    items = [*data.items[:20], partial(_end, os.getpid(), data.items[20]), *data.items[21:]]
    deadly = replace(data, items=items)
    with pytest.raises(DatasetError, match=r"died while it decoded row 20 \(SIGKILL\)"):
        run(deadly, zoo[:2], replace(CPU, workers=2))


def _end(parent, item):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_threads_and_processes_give_the_same(dataset, zoo, plugged_in, forked):
    serial = features(run(dataset, zoo))
    with ThreadPoolExecutor(2) as threads:
        others = [features(run(dataset, zoo, map_fn=threads.map))]
    context = multiprocessing.get_context("forkserver")  # that of `forked` has imported all
    plugged = resolve_backbones(plugged_in[0], plugins=[str(plugged_in[1])])
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        others.append(features(run(dataset, [*zoo[:2], *plugged], map_fn=processes.map)))

    with context.Pool(1) as pool:  # its processes are daemons
        others.append(features(run(dataset, zoo[:1], Settings(device="cpu"), map_fn=pool.map)))

    def backwards(fn, items):
        return [fn(item) for item in reversed(list(items))]

    others.append(features(run(dataset, zoo, map_fn=backwards)))
    for other in others:
        for name, x in other.items():
            np.testing.assert_allclose(x, serial[name.removeprefix("plugged ")], atol=1e-6)


def test_images_are_checked_where_plug_ins_are_loaded(dataset, plugged_in):
    checkpoint, plugin = plugged_in
    with plugin.open("a") as file:
        file.write(f"\nwith open({str(plugin.parent / 'seen')!r}, 'a') as f: f.write('x')\n")
    (backbone,) = resolve_backbones(checkpoint, plugins=[str(plugin)])
    units = []

    def keep(worker, given):
        units.extend(given)
        return map(worker, units)

    run(dataset, [backbone], map_fn=keep)
    before = (plugin.parent / "seen").stat().st_size
    some = replace(units[0], dataset=dataset.subset(np.arange(3)))
    assert find_crashing_images(some, timeout=60) == {}
    assert (plugin.parent / "seen").stat().st_size == before + 1  # in the child


@pytest.fixture
def plugged_in(toy_zoo, tmp_path):
    """A checkpoint whose architecture only a plug-in file knows, and that file."""
    plugin, name = tmp_path / "plugin_for_workers.py", f"known_to_{tmp_path.name}"
    plugin.write_text(
        "import timm.models.resnet as r\nfrom timm.models import register_model\n\n"
        f"@register_model\ndef {name}(pretrained=False, **kwargs):\n"
        "    return r.test_resnet(pretrained=pretrained, **kwargs)\n"
    )
    folder = shutil.copytree(toy_zoo / "resnet", tmp_path / "plugged resnet")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("test_resnet", name))
    return folder, plugin


# The store --------------------------------------------------------------------------------------
def test_a_second_run_makes_no_forward_pass(dataset, zoo, tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    first = run(dataset, zoo, store=store)
    assert not any(e.cached for e in first.values())
    monkeypatch.setattr(loading, "load", lambda b: pytest.fail("a backbone was loaded"))
    again = run(dataset, zoo, store=store)
    assert all(e.cached for e in again.values())
    for name, e in again.items():
        np.testing.assert_array_equal(e.features.x, first[name].features.x)
        assert e.images_per_second == pytest.approx(first[name].images_per_second)


def test_labels_and_paths_do_not_matter_to_the_store_but_pixels_do(photos, zoo, tmp_path):
    store = FeatureStore(tmp_path / "cache")
    run(open_dataset(photos), zoo[:1], store=store)
    moved = tmp_path / "moved"
    for c in "ant", "bee", "cat":
        shutil.copytree(photos / c, moved / f"new {c}")
    assert run(open_dataset(moved), zoo[:1], store=store)["convnext"].cached
    file = moved / "new ant" / "03.jpg"
    file.write_bytes((moved / "new bee" / "03.jpg").read_bytes())
    again = run(open_dataset(moved), zoo[:1], store=store)["convnext"]
    assert again.cached  # nothing new
    assert (again.features.x[3] == again.features.x[15]).all()
    Image.new("RGB", (40, 30)).save(file)
    assert not run(open_dataset(moved), zoo[:1], store=store)["convnext"].cached


def test_precision_and_weights_matter_to_the_store(dataset, toy_zoo, tmp_path, make_checkpoint):
    store = FeatureStore(tmp_path / "cache")
    zoo = resolve_backbones(toy_zoo / "resnet")
    run(dataset, zoo, store=store)
    assert not run(dataset, zoo, replace(CPU, precision="bfloat16"), store=store)["resnet"].cached
    make_checkpoint(tmp_path / "resnet", "test_resnet", seed=1)
    other = resolve_backbones(tmp_path / "resnet")
    assert not run(dataset, other, store=store)["resnet"].cached
    assert run(dataset, zoo, store=store)["resnet"].cached


class StopAfter:
    """Interrupts as Ctrl-C would, after so many images."""

    def __init__(self, images):
        self.left, self.seen = images, Counter()

    def start(self, n_images, n_cached):
        self.total, self.cached = n_images, n_cached

    def advance(self, name, n):
        self.seen[name] += n
        self.left -= n
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 30, 80, 130])
def test_after_an_interrupt_only_the_unfinished_is_computed(
    dataset, zoo, tmp_path, monkeypatch, after
):
    monkeypatch.setattr(plan, "SHARD", 16)  # three shards: 16, 16, 4
    settings = replace(CPU, batch_size=4)
    whole = features(run(dataset, zoo, settings))
    store = FeatureStore(tmp_path)
    stop = StopAfter(after)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, zoo, settings, store=store, progress=stop)
    assert not pixels.SHARED  # the pixels are given back
    kept = int(sum(total["images"] for total in store.summary().values()))
    assert kept == sum(stop.seen.values()) > after  # also of the shard at hand
    count = StopAfter(10**9)
    results = run(dataset, zoo, settings, store=store, progress=count)
    assert sum(count.seen.values()) == count.total == 4 * 36 - kept
    for name, x in features(results).items():
        np.testing.assert_array_equal(x, whole[name])


def test_an_interrupt_within_a_batch_costs_that_batch(dataset, zoo, tmp_path, monkeypatch):
    store, settings, left = FeatureStore(tmp_path), replace(CPU, batch_size=4), [3]
    compute = workers._Forward._compute

    def stop(self, pixels):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return compute(self, pixels)

    monkeypatch.setattr(workers._Forward, "_compute", stop)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, zoo[:1], settings, store=store)
    monkeypatch.undo()
    count = StopAfter(10**9)
    (e,) = run(dataset, zoo[:1], settings, store=store, progress=count).values()
    assert count.total == 36 - 8
    np.testing.assert_array_equal(
        e.features.x, features(run(dataset, zoo[:1], settings))[zoo[0].name]
    )


def test_an_interrupt_goes_on_whatever_was_computed(dataset, tmp_path):
    broken = resolve_backbones({"nan": (Net(), lambda image: torch.full((3, 8, 8), torch.nan))})
    store = FeatureStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, broken, replace(CPU, batch_size=4), store=store, progress=StopAfter(5))
    assert not store.summary()


def kept_by(store, backbone):
    """The segments of one backbone, oldest first."""
    found = [p for p, _ in store.entries() if f'"backbone": "{backbone}"'.encode() in unescaped(p)]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def unescaped(path):
    return path.read_bytes().replace(b"\\", b"")


def test_a_damaged_entry_is_computed_again(dataset, zoo, tmp_path):
    store = FeatureStore(tmp_path)
    first = run(dataset, zoo[:2], store=store)
    (path,) = kept_by(store, "convnext")
    path.write_bytes(path.read_bytes()[:200])
    again = run(dataset, zoo[:2], store=store)
    assert [again[n].cached for n in ("convnext", "efficientnet")] == [False, True]
    np.testing.assert_array_equal(again["convnext"].features.x, first["convnext"].features.x)


def test_between_shards_features_wait_in_the_store(dataset, zoo, tmp_path, monkeypatch):
    whole = features(run(dataset, zoo))
    monkeypatch.setattr(plan, "SHARD", 16)
    monkeypatch.setattr(pixels, "PIXEL_BYTES", 1)
    reads = []
    get = FeatureStore.get
    monkeypatch.setattr(FeatureStore, "get", lambda self, key, images: (
        reads.append(len(images)) or get(self, key, images)))  # fmt: skip
    results = run(dataset, zoo[:2], store=FeatureStore(tmp_path))
    assert reads == [36, 36, 32, 32]  # looked up at the start; two of three shards read again
    for name, x in features(results).items():
        np.testing.assert_allclose(x, whole[name], atol=2e-6)


def test_a_full_disk_costs_the_cache_not_the_result(dataset, zoo, tmp_path, monkeypatch):
    def full(self, key, images, entry: Entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FeatureStore, "put", full)
    with pytest.warns(UserWarning, match="could not be kept in .*No space left"):
        results = run(dataset, zoo[:1], store=FeatureStore(tmp_path))
    assert results["convnext"].features.n_samples == 36


# Images that cannot be read ---------------------------------------------------------------------
@pytest.fixture
def spoilt(photos, tmp_path):
    root = tmp_path / "spoilt"
    shutil.copytree(photos, root)
    (root / "ant" / "05.jpg").write_bytes(b"")
    whole = (root / "bee" / "07.jpg").read_bytes()
    (root / "bee" / "07.jpg").write_bytes(whole[: len(whole) // 2])
    return open_dataset(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_of_every_backbone(spoilt, zoo, plain, workers, tmp_path):
    store = FeatureStore(tmp_path / "cache")
    keep = np.delete(np.arange(36), [5, 19])
    for cached in (False, True):
        results = run(spoilt, zoo, replace(CPU, workers=workers), store=store)
        for name, e in results.items():
            assert e.cached is cached
            assert list(e.unreadable) == [5, 19]
            assert "05.jpg" in spoilt.item_name(5)
            assert e.rows.tolist() == keep.tolist()
            assert np.abs(e.features.x - plain[name][keep]).max() <= 1e-5
            assert e.features.y.tolist() == spoilt.labels[keep].tolist()


def test_too_many_unreadable_images_end_the_run(spoilt, zoo, tmp_path):
    settings = replace(CPU, max_unreadable=0.03)
    message = r"2 of the 36 images cannot be read, more than max_unreadable=0\.03.*05\.jpg"
    store = FeatureStore(tmp_path / "cache")
    with pytest.raises(DatasetError, match=message):
        run(spoilt, zoo, settings)
    run(spoilt, zoo[:1], store=store)
    with pytest.raises(DatasetError, match=message):  # also when all is cached
        run(spoilt, zoo[:1], settings, store=store)


PASSING = [
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
    TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
    OSError("out of memory error when reading image file"),  # Pillow's, without a number
    RuntimeError("can't start new thread"),
    ImportError("libsomething.so is not there"),
]


def _fail_at(monkeypatch, name, error, where="to_rgb", times=10**9):
    """Let the decoder raise when it has the bytes of the image `name` (all: '')."""
    real, decoded, left = getattr(images, where), images._read, [times]
    current = threading.local()

    def read(item):
        current.item = str(item)
        return decoded(item)

    def fail(*args):
        if current.item.endswith(name) and left[0]:
            left[0] -= 1
            raise error
        return real(*args)

    monkeypatch.setattr(images, "_read", read)
    monkeypatch.setattr(images, where, fail)


@pytest.mark.parametrize(("error", "workers"), [(error, k % 2) for k, error in enumerate(PASSING)])
def test_what_may_pass_is_no_fact_about_an_image(
    dataset, zoo, tmp_path, error, workers, monkeypatch
):
    store, settings = FeatureStore(tmp_path), replace(CPU, workers=workers)
    with monkeypatch.context() as patch:
        _fail_at(patch, "ant/05.jpg", error)
        ill = run(dataset, zoo[:2], settings, store=store)
    for e in ill.values():
        assert list(e.unreadable) == [5]
        assert isinstance(e.unreadable[5], Passing)
        assert e.rows.tolist() == [*range(5), *range(6, 36)]
    well = run(dataset, zoo[:2], store=store)
    assert all(e.rows.tolist() == list(range(36)) for e in well.values())
    assert all(e.cached for e in run(dataset, zoo[:2], store=store).values())


@pytest.fixture
def units():
    """Those that `apart` did."""
    return []


@pytest.fixture
def apart(monkeypatch, units):
    """Each unit has its own pixels, as in a pool of processes; the second one's decoder fails."""

    def run_units(worker, plan):
        for unit in plan:
            units.append(unit)
            pixels.forget_pixels(unit.run)
            with monkeypatch.context() as patch:
                if len(units) == 2:
                    _fail_at(patch, "ant/05.jpg", MemoryError())
                yield worker(unit)

    return run_units


@pytest.mark.parametrize("kept", [True, False])
def test_backbones_are_scored_on_the_same_images_whoever_could_not_read_one(
    dataset, zoo, tmp_path, apart, units, kept
):
    store = FeatureStore(tmp_path) if kept else None
    whole = features(run(dataset, zoo[:3]))
    found = list(extract(dataset, zoo[:3], CPU, store=store, map_fn=apart))
    last = {e.backbone.name: e for e in found}
    keep = np.delete(np.arange(36), 5)
    for name, e in last.items():
        assert e.error is None
        assert e.rows.tolist() == keep.tolist()
        np.testing.assert_allclose(e.features.x, whole[name][keep], atol=2e-6)
    assert len(units) == (3 if kept else 4)  # the first one again, if nobody has its features


def test_a_row_that_was_lost_later_is_dropped_from_an_ensemble_too(dataset, zoo, apart):
    with pytest.warns(UserWarning, match=r"05\.jpg; 1 for a reason that may pass \(MemoryError\)"):
        ranking = sfda_tune.rank(
            dataset, zoo[:2], cache=False, device="cpu", map_fn=apart, ensemble=2
        )
    assert not ranking.failed
    assert ranking.info["n_samples"] == 35
    assert ranking.info["ensemble"]


@pytest.mark.parametrize("times", [1, 2])
def test_an_image_whose_content_could_not_be_digested_has_no_features(
    dataset, zoo, tmp_path, monkeypatch, times
):
    """Else its features would be kept under the key of an image that is not there."""
    store = FeatureStore(tmp_path)
    real, left = images.open_stream, [times]

    def stream(item):
        if str(item).endswith("ant/05.jpg") and left[0]:
            left[0] -= 1
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(item)

    monkeypatch.setattr(images, "open_stream", stream)
    ill = run(dataset, zoo[:1], store=store)["convnext"]
    assert list(ill.unreadable) == [5]
    assert ill.rows.tolist() == [*range(5), *range(6, 36)]
    well = run(dataset, zoo[:1], store=store)["convnext"]
    assert (well.cached, len(well.rows)) == (False, 36)
    left[0] = times
    again = run(dataset, zoo[:1], store=store)["convnext"]
    assert (again.cached, len(again.rows)) == (True, 35)


class Rewrite(StopAfter):
    """Writes a file anew when all images are known, and before they are decoded."""

    def __init__(self, file):
        super().__init__(10**9)
        self.file, self.whole = file, file.read_bytes()

    def start(self, n_images, n_cached):
        self.file.write_bytes((self.file.parents[1] / "bee" / "07.jpg").read_bytes())

    def finish(self, score):
        pass


@pytest.mark.parametrize("workers", [0, 1])
def test_features_are_never_kept_of_an_image_that_has_changed(photos, zoo, tmp_path, workers):
    shutil.copytree(photos, root := tmp_path / "photos")
    store, settings = FeatureStore(tmp_path / "cache"), replace(CPU, workers=workers)
    rewrite = Rewrite(root / "ant" / "05.jpg")
    for e in run(open_dataset(root), zoo[:2], settings, store=store, progress=rewrite).values():
        assert e.unreadable == {5: "has changed since it was first read"}
        assert isinstance(e.unreadable[5], Passing)
    rewrite.file.write_bytes(rewrite.whole)
    again = run(open_dataset(root), zoo[:2], settings, store=store)
    for name, x in features(run(open_dataset(root), zoo[:2])).items():
        np.testing.assert_array_equal(again[name].features.x, x)


def test_a_changed_image_is_left_out_of_a_ranking_without_a_store_too(photos, zoo, tmp_path):
    shutil.copytree(photos, root := tmp_path / "photos")
    rewrite = Rewrite(root / "ant" / "05.jpg")
    with pytest.warns(UserWarning, match=r"05\.jpg; 1 for a .* \(has changed since"):
        ranking = sfda_tune.rank(root, zoo[:1], cache=False, device="cpu", progress=rewrite)
    assert ranking.info["n_samples"] == 35


def test_what_entries_call_unreadable_is_tried_again(spoilt, zoo, tmp_path, monkeypatch):
    """Of an earlier version, whose verdicts may be of the machine; or Pillow reads more now."""
    store = FeatureStore(tmp_path / "cache")
    run(spoilt, zoo[:2], store=store)
    decoded = []
    to_rgb = images.to_rgb
    monkeypatch.setattr(images, "to_rgb", lambda *args: decoded.append(1) or to_rgb(*args))
    again = run(spoilt, zoo[:2], store=store)
    assert all(e.cached and list(e.unreadable) == [5, 19] for e in again.values())
    assert len(decoded) == 1  # of the other, no header can be read
    for path, _ in list(store.entries()):
        key, digests = path.parent.name, spoilt.digests()
        entry = store.get(key, digests)
        keep = entry.rows != 7
        unreadable = {**entry.unreadable, 7: "Too many open files"}
        path.unlink()
        entry = replace(entry, x=entry.x[keep], rows=entry.rows[keep], unreadable=unreadable)
        store.put(key, digests, entry)
    healthy = run(spoilt, zoo[:2], store=store)
    assert all(list(e.unreadable) == [5, 19] and not e.cached for e in healthy.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_pillow_s_switches_are_part_of_what_an_entry_is(
    spoilt, zoo, tmp_path, monkeypatch, workers
):
    store, settings = FeatureStore(tmp_path / "cache"), replace(CPU, workers=workers)
    strict = run(spoilt, zoo[:1], settings, store=store)["convnext"]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    loose = run(spoilt, zoo[:1], settings, store=store)["convnext"]
    assert (len(strict.rows), len(loose.rows)) == (34, 35)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60)  # twice as many are an error
    small = run(spoilt, zoo[:1], replace(settings, max_unreadable=1), store=store)["convnext"]
    assert len(small.rows) < 34
    monkeypatch.undo()
    again = run(spoilt, zoo[:1], settings, store=store)["convnext"]
    assert (again.cached, again.rows.tolist()) == (True, strict.rows.tolist())


def test_pillow_s_switches_reach_the_processes_of_a_pool(
    spoilt, zoo, tmp_path, monkeypatch, forked
):
    store = FeatureStore(tmp_path / "cache")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as processes:
        loose = run(spoilt, zoo[:1], store=store, map_fn=processes.map)["convnext"]
    assert len(loose.rows) == 35
    assert run(spoilt, zoo[:1], store=store)["convnext"].cached


# Backbones that fail ----------------------------------------------------------------------------
class Net(torch.nn.Module):
    """Averages each channel; fails, or runs out of memory, as it is told."""

    def __init__(self, most=10**9, output=None):
        super().__init__()
        self.most, self.output, self.sizes = most, output, []
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory, says the test")
        y = x.mean((2, 3)) * self.weight
        return y if self.output is None else self.output(y)

    def __deepcopy__(self, memo):
        return self  # so that the test sees `sizes`


def to_tensor(image):
    return torch.from_numpy(np.array(image.resize((8, 8)), np.float32)).permute(2, 0, 1) / 255


def test_the_batch_is_halved_for_as_long_as_memory_is_short(dataset):
    net = Net(most=5)
    backbones = resolve_backbones({"small": (net, to_tensor), "large": (Net(), to_tensor)})
    results = run(dataset, backbones, replace(CPU, batch_size=32))
    np.testing.assert_allclose(results["small"].features.x, results["large"].features.x, atol=1e-6)
    assert net.sizes[:4] == [32, 16, 8, 4]
    assert max(net.sizes[3:]) == 4
    (one,) = run(dataset.subset([7]), backbones[:1], replace(CPU, batch_size=32)).values()
    np.testing.assert_array_equal(one.features.x, results["small"].features.x[[7]])


@pytest.mark.parametrize(("failures", "left"), [(1, 8), (2, 4)])
def test_memory_that_the_next_network_took_for_a_moment_halves_nothing(
    monkeypatch, failures, left
):
    """What a GPU's batches do is seen without one: only the computing itself is not the GPU's."""
    preprocessing = Preprocessing(None, transform=to_tensor)
    forward = workers._Forward(
        Net(), preprocessing, torch.device("cpu"), replace(CPU, batch_size=8)
    )
    fails = iter([True] * failures)

    def compute(pixels):
        if next(fails, False):
            raise torch.OutOfMemoryError("out of memory, says the test")
        return pixels.mean((2, 3))

    forward.device = torch.device("cuda")
    monkeypatch.setattr(forward, "_run", compute)
    assert forward(torch.ones(8, 3, 4, 4)).shape == (8, 3)
    assert forward.batch_size == left


BROKEN = {
    "no memory": (Net(most=0), "out of memory with a single image"),
    "crash": (Net(output=lambda y: 1 / 0), "ZeroDivisionError: division by zero"),
    "nan": (Net(output=lambda y: y * torch.nan), "its features are not finite in float32"),
    "tokens": (Net(output=lambda y: y[:, None].expand(-1, 4, -1)), "but returned [8, 4, 3]"),
    "crops": (Net(output=lambda y: y.repeat(5, 1)), "of its n = 8 images but returned [40, 3]"),
    "too few": (Net(output=lambda y: y[:1]), "of its n = 8 images but returned [1, 3]"),
    "complex": (Net(output=lambda y: y + 1j), "returned [8, 3] torch.complex64"),
    "list": (Net(output=lambda y: [y]), "returned list"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_failing_backbone_stops_nothing(dataset, zoo, name, monkeypatch):
    monkeypatch.setattr(plan, "SHARD", 8)
    net, message = BROKEN[name]
    net.sizes.clear()
    broken = resolve_backbones({name: (net, to_tensor)})
    results = run(dataset, [zoo[0], *broken, zoo[1]], replace(CPU, batch_size=8))
    error = results[name].error
    assert error is not None
    assert message.replace("\\", "") in error
    assert results[name].features is None
    assert len(net.sizes) <= 4  # not tried again with every shard
    assert results["convnext"].features.n_samples == 36
    assert results["efficientnet"].features.n_samples == 36


def test_maps_of_features_are_averaged(dataset):
    maps = Net(output=lambda y: y[:, :, None, None].expand(-1, -1, 2, 3))
    results = run(dataset, resolve_backbones({"a": (maps, to_tensor), "b": (Net(), to_tensor)}))
    np.testing.assert_allclose(results["a"].features.x, results["b"].features.x, rtol=1e-6)


def _crash(image):
    raise ArithmeticError("no such picture")


def _ragged(image):
    return torch.zeros(3, *image.size)


@pytest.mark.parametrize("transform", [_crash, _ragged, lambda image: "text"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_that_fails_is_its_backbone_s_fault(dataset, zoo, transform, workers):
    broken = resolve_backbones({"broken": (Net(), transform)})
    results = run(dataset, [*broken, zoo[0]], replace(CPU, workers=workers))
    assert results["broken"].error is not None
    assert results["convnext"].features.n_samples == 36


def test_a_missing_checkpoint_is_that_backbone_s_error(dataset, zoo, toy_zoo, tmp_path):
    shutil.copytree(toy_zoo / "vit", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    results = run(dataset, [*resolve_backbones(tmp_path / "bare"), zoo[0]])
    assert "No suitable checkpoints" in results["bare"].error
    assert results["convnext"].features.n_samples == 36


# Settings ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int8"}, "`precision` must be one of float32, tf32, bfloat16, float16"),
        ({"batch_size": 0}, "`batch_size` must be an integer ≥ 1 but is 0"),
        ({"workers": -1}, "`workers` must be an integer ≥ 0"),
        ({"max_unreadable": 2}, r"`max_unreadable` must lie in 0 … 1"),
    ],
)
def test_settings_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


@pytest.mark.parametrize("device", ["cuda:77", "nonsense", "xpu"])
def test_devices_refused(device):
    with pytest.raises(ValueError, match=f"`device` must be .* but is '{device}'"):
        devices.resolve_device(device)


def test_bfloat16_is_close_to_float32(dataset, zoo):
    exact = features(run(dataset, zoo))
    rough = features(run(dataset, zoo, replace(CPU, precision="bfloat16")))
    for name, x in exact.items():
        assert 0 < np.abs(rough[name] - x).max() < 0.1 * np.abs(x).max()
        assert rough[name].dtype == np.float32


@pytest.mark.gpu
def test_cuda_gives_the_features_of_the_cpu(dataset, zoo):
    on_cpu = features(run(dataset, zoo))
    on_cuda = features(run(dataset, zoo, Settings(device="cuda", workers=2)))
    for name, x in on_cpu.items():
        assert np.abs(on_cuda[name] - x).max() <= 1e-3 * np.abs(x).max()


# What a GPU needs, on a CPU ---------------------------------------------------------------------
def test_overlapping_units_give_the_same_features_in_the_same_order(dataset, zoo, monkeypatch):
    monkeypatch.setattr(plan, "SHARD", 10)
    expected = run(dataset, zoo)
    for lanes in (2, 3):
        overlap = partial(extraction._overlap, lanes=lanes)
        found = run(dataset, zoo, map_fn=overlap)
        assert list(found) == list(expected)
        for name, x in features(expected).items():
            assert np.array_equal(found[name].features.x, x)


class Order:
    """A transform of one backbone that takes down who computes, and may break."""

    def __init__(self, name, log, broken=False):
        self.name, self.log, self.broken = name, log, broken

    def __call__(self, image):
        self.log.append(self.name)
        if self.broken:
            raise ArithmeticError("no such picture")
        return torch.zeros(3, 8, 8)


def test_overlapping_units_compute_one_after_the_other(dataset):
    log = []
    backbones = {name: (Net(), Order(name, log, name == "b")) for name in "abcde"}
    overlap = partial(extraction._overlap, lanes=2)
    results = run(dataset, resolve_backbones(backbones), map_fn=overlap)
    assert [name for name, e in results.items() if e.error] == ["b"]
    assert "".join(dict.fromkeys(log)) == "abcde"


def test_an_interrupted_overlap_ends_at_the_next_batch(dataset, zoo, tmp_path):
    store = FeatureStore(tmp_path)
    stop, log = threading.Event(), []

    def interrupt(worker, units):
        def advance(*step):
            log.append(step)
            stop.set()

        for unit in units:
            yield replace(worker, turn=workers.Turn(None, stop), advance=advance)(unit)

    results = run(dataset, zoo[:2], replace(CPU, batch_size=4), map_fn=interrupt, store=store)
    assert [e.error for e in results.values()] == ["EndedError: the run has ended"] * 2
    assert [step for step in log if step[1]] == [(zoo[0].name, 4)]  # nor the other one at all
    assert [total["images"] for total in store.summary().values()] == [4]


@pytest.mark.slow
def test_who_breaks_the_device_fails_and_the_others_go_on_in_a_fresh_process(
    dataset, zoo, toy_zoo, monkeypatch, tmp_path, caplog
):
    """The device is said to be broken as soon as anything has failed here."""
    shutil.copytree(toy_zoo / "vit", tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"nothing")
    broken = resolve_backbones(tmp_path / "bad")
    alive = {"cpu": True}

    def is_working(device):
        alive[device] = False
        return False

    monkeypatch.setattr(extraction, "is_working", is_working)
    in_memory = resolve_backbones({"here": (Net(), lambda image: torch.zeros(3, 8, 8))})
    expected = run(dataset, zoo)
    results = run(dataset, [zoo[0], *broken, *zoo[1:], *in_memory])
    assert not alive["cpu"]
    assert list(results) == [zoo[0].name, "bad", *(b.name for b in zoo[1:]), "here"]
    assert results["bad"].error is not None
    assert "pickle" in results["here"].error  # it cannot travel, and that is said
    for name, x in features(expected).items():
        assert np.array_equal(results[name].features.x, x)
    assert "bad left cpu unusable; the others go on in a fresh process" in caplog.text


def test_tf32_is_for_cuda_devices(dataset, zoo):
    with pytest.raises(ValueError, match="`precision` 'tf32' needs a CUDA device but"):
        run(dataset, zoo, Settings(device="cpu", precision="tf32"))
    assert Settings(precision="tf32").device == "auto"  # not known yet


def test_features_are_the_same_bits_with_any_number_of_threads(dataset, zoo, monkeypatch):
    monkeypatch.setattr(devices, "SMALL", 0.0)
    found, used, real = {}, [], torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: used.append(n) or real(n))
    for n in (1, 2, 3):
        used.clear()
        found[n] = features(run(dataset, zoo, replace(CPU, threads=n)))
        assert max(used) == n
        assert torch.get_num_threads() == 1  # as the tests have it
    for other in (found[2], found[3]):
        for name, x in other.items():
            np.testing.assert_array_equal(x, found[1][name])


@pytest.mark.parametrize("best", [1, 2])
def test_a_batch_is_computed_with_as_many_threads_as_are_fast(dataset, monkeypatch, best):

    from torchvision.transforms import Compose, PILToTensor, Resize

    used = []

    class Slow(torch.nn.Module):
        def forward(self, x):
            used.append(torch.get_num_threads())
            time.sleep(0.0 if used[-1] == best else 0.03)
            return x.float().mean((2, 3))

    monkeypatch.setattr(devices, "SMALL", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        transform = Compose([Resize((8, 8)), PILToTensor()])
        given = resolve_backbones({"slow": (Slow(), transform)})
        (found,) = run(dataset, given, replace(CPU, batch_size=4)).values()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found.error is None
    assert sorted(used[:4]) == [1, 1, 2, 2]
    assert used[4:] == [best] * 5
