"""Whoever computed the features of an image, nobody computes them again, and all see the same."""

import functools
import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sfda_tune
from sfda_tune import open_dataset, rank
from sfda_tune.backbones.specs import resolve_backbones
from sfda_tune.extraction import plan
from sfda_tune.extraction.run import extract
from sfda_tune.extraction.settings import Settings
from sfda_tune.extraction.store import FeatureStore, open_store
from sfda_tune.metrics.scoring import Scorer
from sfda_tune.pipelines.noting import NotingScorer
from sfda_tune.values.features import Features
from sfda_tune.values.files import digest_file

CPU = Settings(device="cpu", workers=0)
HERE = {"device": "cpu", "workers": 0}


def run(dataset, backbones, **kwargs):
    return {e.backbone.name: e for e in extract(dataset, backbones, CPU, **kwargs)}


class Net(torch.nn.Module):
    """Counts the images that it is shown; those that fill a batch up are copies of its last."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(12)), []

    def forward(self, x):
        self.seen.append(len(torch.unique(x.flatten(1), dim=0)))
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) * self.weight

    def __deepcopy__(self, memo):
        return self  # so that the test sees `seen`

    def __getstate__(self):  # what it has seen makes it no other network
        return {k: v for k, v in self.__dict__.items() if k != "seen"}

    def count(self):
        """Return how many images it was shown since the last time."""
        n = sum(self.seen)
        self.seen.clear()
        return n


def to_tensor(image):
    return torch.from_numpy(np.array(image.resize((8, 8)), np.float32)).permute(2, 0, 1) / 255


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def counted(net, tmp_path, monkeypatch):
    """Backbone whose fingerprint is that of its weights, and arguments with a fresh cache."""
    monkeypatch.setattr("sfda_tune.backbones.fingerprints.identify", lambda *_: "counted")
    (backbone,) = resolve_backbones({"counted": (net, to_tensor)})
    return backbone


def made(n, seed=0):
    """Images of two classes, and their labels."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 8, 8, 3), np.uint8)
    return pixels, np.arange(n) % 2


def test_one_image_added_to_a_thousand_is_the_only_one_that_is_computed(net, counted, tmp_path):
    x, y = made(1001)
    how = {**HERE, "cache": tmp_path}
    rank((x[1:], y[1:]), counted, **how)
    net.count()
    before = rank((x[1:], y[1:]), counted, **how)
    assert net.count() == 0
    after = rank((x, y), counted, **how)  # it comes first
    assert net.count() == 1
    assert before.info["n_samples"] == 1000
    assert after.info["n_samples"] == 1001
    order = np.random.default_rng(1).permutation(1001)
    rank((x[order], y[order]), counted, **how)
    assert net.count() == 0


def test_samples_races_and_full_runs_share(net, counted, tmp_path):
    data, how = made(600), {**HERE, "cache": tmp_path}
    computed = 0
    for n in (100, 300, 500):
        rank(data, counted, samples=n, **how)
        computed += net.count()
        assert computed == n
    rank(data, counted, race=True, **how)
    assert net.count() == 100
    rank(data, counted, **how)
    assert net.count() == 0


def test_folds_share(net, counted, tmp_path):
    dataset, store = open_dataset(made(90)), FeatureStore(tmp_path)
    for fold in np.array_split(np.arange(90), 5):
        train = np.setdiff1d(np.arange(90), fold)
        run(dataset.subset(train), [counted], store=store)
        run(dataset.subset(fold), [counted], store=store)
    assert net.count() == 90


def test_a_search_shares_what_was_ranked(net, counted, tmp_path, monkeypatch):
    data, cache = made(300), tmp_path / "cache"
    rank(data, counted, **HERE, cache=cache)
    assert net.count() == 300

    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr("sfda_tune.pipelines.stages.make_shortlist", stop)
    with pytest.raises(InterruptedError):
        sfda_tune.search(data, counted, out=tmp_path / "run", device="cpu", cache=cache, trials=1)
    assert net.count() == 0


def test_copies_are_found_wherever_they_lie(photos, toy_zoo, tmp_path):
    store, zoo = FeatureStore(tmp_path / "cache"), resolve_backbones(toy_zoo / "resnet")
    first = run(open_dataset(photos), zoo, store=store)["resnet"]
    (tmp_path / "x" / "one").mkdir(parents=True)
    (tmp_path / "x" / "two").mkdir()
    files = sorted(photos.glob("*/*.jpg"))
    for k in (30, 2, 17):
        target = tmp_path / "x" / ("one" if k < 20 else "two") / f"{k}.jpg"
        target.write_bytes(files[k].read_bytes())
    again = run(open_dataset(tmp_path / "x"), zoo, store=store)["resnet"]
    assert again.cached
    np.testing.assert_array_equal(again.features.x, first.features.x[[2, 17, 30]])


@pytest.fixture(scope="module")
def zoo(toy_zoo):
    """Kernels of EfficientNet give other bits in other sizes of batches."""
    return resolve_backbones(toy_zoo)


@pytest.mark.parametrize("shard", [512, 8])
def test_the_same_bits_whatever_was_kept_and_however_rows_were_grouped(
    photos, zoo, tmp_path, monkeypatch, shard
):
    dataset = open_dataset(photos)
    whole = {name: e.features.x for name, e in run(dataset, zoo).items()}
    monkeypatch.setattr(plan, "SHARD", shard)
    rng = np.random.default_rng(shard)
    for trial in range(2):
        store = FeatureStore(tmp_path / str(trial))
        for n in (1, 5, 20):
            rows = np.sort(rng.choice(36, n, replace=False))
            some = [zoo[k] for k in rng.permutation(len(zoo))[:3]]
            for name, e in run(dataset.subset(rows), some, store=store).items():
                np.testing.assert_array_equal(e.features.x, whole[name][rows])
        for name, e in run(dataset, zoo, store=store).items():
            assert e.rows.tolist() == list(range(36))
            np.testing.assert_array_equal(e.features.x, whole[name])


def test_who_lacks_what_is_computed_and_no_more(net, counted, tmp_path):
    dataset, store = open_dataset(made(60)), FeatureStore(tmp_path)
    run(dataset.subset(range(0, 40)), [counted], store=store)
    assert net.count() == 40
    seen = []

    class Watch:
        def start(self, n_images, n_cached):
            seen.append((n_images, n_cached))

        def advance(self, name, n):
            seen.append(n)

    results = run(dataset, [counted], store=store, progress=Watch())
    assert seen[0] == (20, 0)
    assert sum(seen[1:]) == 20
    assert net.count() == 20
    np.testing.assert_array_equal(
        results["counted"].features.x, run(dataset, [counted])["counted"].features.x
    )


def test_what_vanishes_meanwhile_is_computed_again(photos, zoo, tmp_path, monkeypatch):
    """Another process clears the cache, or makes room in it."""
    monkeypatch.setattr(plan, "SHARD", 16)
    monkeypatch.setattr("sfda_tune.extraction.pixels.PIXEL_BYTES", 1)
    dataset, store, whole = (
        open_dataset(photos),
        FeatureStore(tmp_path),
        run(open_dataset(photos), zoo[:2]),
    )

    class Clear:
        left = 20

        def start(self, n_images, n_cached):
            pass

        def advance(self, name, n):
            self.left -= n
            if self.left < 0 and n:
                self.left = 10**9
                store.clear()

    for name, e in run(dataset, zoo[:2], store=store, progress=Clear()).items():
        assert e.error is None
        np.testing.assert_array_equal(e.features.x, whole[name].features.x)


def test_a_limit_holds_and_spares_what_the_run_needs(photos, zoo, tmp_path, monkeypatch):
    dataset, store = open_dataset(photos), FeatureStore(tmp_path)
    run(dataset, zoo[:2], store=store)
    size = sum(stat.st_size for _, stat in store.entries())
    for path, _ in store.entries():
        os.utime(path, (1e9, 1e9))
    monkeypatch.setenv("SFDA_TUNE_CACHE_SIZE", str(size))
    results = run(dataset, zoo[1:], store=store)  # the second one is used again
    assert results[zoo[1].name].cached
    left = {name for _, name in store.summary()}
    assert left == {b.name for b in zoo[1:]}
    assert all(e.cached for e in run(dataset, zoo[1:], store=store).values())
    monkeypatch.setenv("SFDA_TUNE_CACHE_SIZE", "1k")
    run(dataset, zoo[:1], store=store)
    assert {name for _, name in store.summary()} == {zoo[0].name}


def test_features_of_an_earlier_version_are_not_used_and_that_is_said(
    photos, zoo, tmp_path, caplog
):
    old = tmp_path / "features" / "ab" / f"{'ab' * 20}.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x")
    store = FeatureStore(tmp_path)
    run(open_dataset(photos), zoo[:1], store=store)
    said = f"what an earlier version kept in {tmp_path} is not used; `sfda-tune cache clear"
    assert caplog.text.count(said) == 1
    run(open_dataset(photos), zoo[:1], store=store)  # who misses nothing is not told
    assert caplog.text.count(said) == 1
    assert old.exists()


def test_small_segments_are_joined_as_they_pile_up(net, counted, tmp_path):
    dataset, store = open_dataset(made(24)), FeatureStore(tmp_path)
    for k in range(24):
        run(dataset.subset([k]), [counted], store=store)
        assert sum(1 for _ in store.entries()) < 17
    assert net.count() == 24
    assert run(dataset, [counted], store=store)["counted"].cached


def test_an_unreadable_image_is_known_wherever_it_comes(net, counted, tmp_path):
    root = tmp_path / "photos"
    for c in "ab":
        (root / c).mkdir(parents=True)
        for k in range(6):
            pixels = np.random.default_rng([ord(c), k]).integers(0, 256, (9, 9, 3), np.uint8)
            Image.fromarray(pixels).save(root / c / f"{k}.png")
    (root / "a" / "2.png").write_bytes(b"nothing")
    dataset, store = open_dataset(root), FeatureStore(tmp_path / "cache")
    first = run(dataset, [counted], store=store)["counted"]
    assert list(first.unreadable) == [2]
    assert net.count() == 11
    some = dataset.subset([7, 2, 0])
    again = list(extract(some, [counted], Settings(**HERE, max_unreadable=0.5), store=store))[-1]
    assert (again.cached, again.rows.tolist(), list(again.unreadable)) == (True, [0, 2], [1])
    np.testing.assert_array_equal(again.features.x, first.features.x[[6, 0]])


# Notes ------------------------------------------------------------------------------------------
def test_a_warm_ranking_builds_no_network_and_computes_no_score(
    photos, toy_zoo, tmp_path, monkeypatch
):
    how = {**HERE, "cache": tmp_path}
    first = rank(photos, toy_zoo, **how)
    monkeypatch.setattr(
        "sfda_tune.backbones.loading.create", lambda *_, **__: pytest.fail("built")
    )
    monkeypatch.setattr(Scorer, "score", lambda *_: pytest.fail("scored"))
    again = rank(photos, toy_zoo, **how)
    for old, new in zip(first.scores, again.scores, strict=True):
        assert (old.backbone, old.value) == (new.backbone, new.value)
        np.testing.assert_array_equal(old.per_sample, new.per_sample)
        for key, value in old.details.items():
            if key not in ("cached", "note", "images_per_second"):
                assert new.details[key] == value
    with pytest.raises(pytest.fail.Exception, match="scored"):
        rank(photos, toy_zoo, metric="knn", **how)


def features(seed=0):
    return Features(np.random.default_rng(seed).normal(size=(30, 5)), np.arange(30) % 3, "abc")


def test_a_note_is_of_these_features_labels_and_metric_only(tmp_path):
    store, one = FeatureStore(tmp_path), features()
    others = [
        features(1),
        Features(one.x, (one.y + 1) % 3, "abc"),
        Features(one.x[:29], one.y[:29], "abc"),
    ]
    noting = NotingScorer(Scorer("sfda"), store)
    expected = noting.score(one, "cpu")
    for other in others:
        assert noting.score(other, "cpu").value == Scorer("sfda").score(other).value
    for scorer in (Scorer("sfda", "paper"), Scorer("knn"), Scorer("sfda + knn")):
        found = NotingScorer(scorer, store).score(one, "cpu")
        assert found.value == scorer.score(one).value
        assert found.details == NotingScorer(scorer, store).score(one, "cpu").details
    assert noting.score(one, "cpu").value == expected.value
    assert sum(1 for _ in store.notes()) == 7


def test_metrics_of_ones_own_are_always_computed(tmp_path):
    calls = []

    def mine(x, y):
        calls.append(1)
        return float(x.mean())

    for metric in (mine, functools.partial(mine)):
        noting = NotingScorer(Scorer(metric), FeatureStore(tmp_path))
        noting.score(features(), "cpu")
        noting.score(features(), "cpu")
    assert len(calls) == 4
    assert not list(FeatureStore(tmp_path).notes())


@pytest.mark.parametrize("content", [b"", b"x", b"{}", b"0\n{}", b"\xff" * 50])
def test_a_damaged_note_is_none(tmp_path, content):
    store = FeatureStore(tmp_path)
    store.note("subject", "ab" * 20, {"value": 3})
    assert store.recall("subject", "ab" * 20, {"value": int}) == {"value": 3}
    assert store.recall("subject", "ab" * 20, {"value": str}) is None
    ((path, _),) = store.notes()
    whole = path.read_bytes()
    path.write_bytes(content)
    assert store.recall("subject", "ab" * 20, {"value": int}) is None
    path.write_bytes(whole.replace(b"3", b"4"))
    assert store.recall("subject", "ab" * 20, {"value": int}) is None
    assert store.clear()[0] == 1
    assert not list(store.notes())


def test_a_file_is_digested_again_when_it_has_changed(tmp_path):
    store, file = FeatureStore(tmp_path / "cache"), tmp_path / "weights"

    def write(byte, age):
        file.write_bytes(byte * (2 << 20))
        then = time.time() - age
        os.utime(file, (then, then))

    write(b"a", 100)
    assert store.digest_file(file) == digest_file(file)
    assert not list(store.notes())  # it was changed just now, by its ctime
    time.sleep(2.1)
    assert store.digest_file(file) == digest_file(file)
    assert len(list(store.notes())) == 1
    write(b"b", 100)  # same size, and nearly the same time
    assert store.digest_file(file) == digest_file(file)


def test_a_bucket_has_no_notes():
    store = open_store("memory://notes")
    store.note("subject", "ab" * 20, 3)
    assert store.recall("subject", "ab" * 20, int) is None


def test_what_was_whole_and_vanishes_as_a_row_turns_out_bad_is_computed_again(
    photos, zoo, tmp_path
):
    dataset, store = open_dataset(photos), FeatureStore(tmp_path)
    whole = run(dataset, zoo[:2])
    run(dataset, zoo[:1], store=store)

    def lose(worker, units):
        for unit in units:
            outcome = worker(unit)
            if unit.backbone.name == zoo[1].name:
                store.clear()
                entry = outcome.entries[0]
                keep = entry.rows != 5
                entry = replace(entry, x=entry.x[keep], rows=entry.rows[keep], unreadable={5: "x"})
                outcome.entries[0], outcome.unreadable[0] = entry, {5: "x"}
                outcome.kept.clear()
            yield outcome

    results = run(dataset, zoo[:2], store=store, map_fn=lose)
    keep = np.delete(np.arange(36), 5)
    for name, e in results.items():
        assert e.error is None
        assert e.rows.tolist() == keep.tolist()
        np.testing.assert_array_equal(e.features.x, whole[name].features.x[keep])
