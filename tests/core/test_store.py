import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sfda_tune.extraction import store as store_module
from sfda_tune.extraction.store import (
    Entry,
    FeatureStore,
    RemoteStore,
    default_root,
    make_key,
    open_cache,
    open_store,
)

KEY = make_key("weights", "preprocessing", "float32")
IMAGES = ["a", "b", "c", "d"]


def entry(seed: int = 0, n: int = 4) -> Entry:
    """Of `n` images; the third one is unreadable."""
    rows = np.delete(np.arange(n), 2)
    x = np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)[rows]
    info = {"backbone": "net", "n_params": 7, "dataset": "photos", "forward_seconds": float(n)}
    return Entry(x, rows, {2: "truncated"}, info)


def put(store, images=IMAGES, seed=0):
    """Put the entry of some images; return where it lies."""
    before = {path for path, _ in store.entries()}
    store.put(KEY, images, entry(seed, len(images)))
    (path,) = {path for path, _ in store.entries()} - before
    return path


def test_what_goes_in_comes_out(tmp_path):
    store = FeatureStore(tmp_path / "new" / "cache")
    assert not len(store.get(KEY, IMAGES).known)
    put(store)
    again = store.get(KEY, IMAGES)
    np.testing.assert_array_equal(again.x, entry().x)
    assert again.rows.tolist() == [0, 1, 3]
    assert again.unreadable == {2: "truncated"}
    assert again.info == entry().info
    assert [p.suffix for p in (tmp_path / "new").rglob("*") if p.is_file()] == [".safetensors"]


def test_the_variable_may_name_a_bucket_and_a_folder_is_no_bucket(tmp_path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFDA_TUNE_CACHE", "memory://bucket/x")
    for store in (open_store(), open_cache(True)):
        assert (type(store), store.root) == (RemoteStore, "memory://bucket/x")
        store.put(KEY, IMAGES, entry())
    with pytest.raises(ValueError, match="`cache` must be a folder but 'memory:/bucket/x' is an"):
        FeatureStore()
    for given in ("s3://bucket/x", Path("s3://bucket/x")):
        with pytest.raises(ValueError, match="is an address; `open_store` opens it"):
            FeatureStore(given)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("SFDA_TUNE_CACHE", str(tmp_path / "y"))
    assert (type(open_store()), open_store().root) == (FeatureStore, tmp_path / "y")


def test_images_are_found_in_any_order_and_company(tmp_path):
    store = FeatureStore(tmp_path)
    put(store)
    put(store, ["e", "f", "g", "a"], seed=1)  # `a` is there already: the bits are the same anyway
    x = {**dict(zip("abd", entry().x, strict=True)), "f": entry(1).x[1], "e": entry(1).x[0]}
    found = store.get(KEY, ["f", "none", "d", "c", "b", "e", "f", "g"])
    assert found.rows.tolist() == [0, 2, 4, 5, 6]
    np.testing.assert_array_equal(found.x, [x[k] for k in "fdbef"])
    assert found.unreadable == {3: "truncated", 7: "truncated"}
    assert found.known.tolist() == [0, 2, 3, 4, 5, 6, 7]
    one = store.get(KEY, ["b"])
    assert one.info["forward_seconds"] == pytest.approx(1.0)  # its share of four
    assert not len(store.get("0" * 40, IMAGES).known)


def test_who_can_read_an_image_is_believed(tmp_path):
    """Another version of a decoder could not."""
    for seed, order in enumerate((["a", "b", "c"], ["c", "a", "b"])):
        store = FeatureStore(tmp_path / str(seed))
        for images in (order, ["c", "x", "y"]) if seed else (["c", "x", "y"], order):
            put(store, images)
        found = store.get(KEY, ["c", "y"])
        assert found.rows.tolist() == [0]
        assert found.unreadable == {1: "truncated"}


def test_many_images_make_segments_of_a_few_hundred(tmp_path):
    store, images = FeatureStore(tmp_path), [f"i{k}" for k in range(1300)]
    store.put(KEY, images, entry(n=1300))
    sizes = sorted(int(path.name.partition("-")[0]) for path, _ in store.entries())
    assert sizes == [276, 512, 512]
    np.testing.assert_array_equal(store.get(KEY, images).x, entry(n=1300).x)
    assert store.get(KEY, images).info["forward_seconds"] == pytest.approx(1300)


def test_the_key_depends_on_everything():
    others = [
        make_key("other", "preprocessing", "float32"),
        make_key("weights", "other", "float32"),
        make_key("weights", "preprocessing", "float16"),
    ]
    assert len({KEY, *others}) == 4


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def _foreign(path):
    save_file({"x": np.zeros((3, 5), np.float32)}, path)


def _of_another_key(path):
    other = FeatureStore(path.parents[4] / "other")
    other.put("0" * 40, IMAGES, entry())
    ((file, _),) = other.entries()
    path.write_bytes(file.read_bytes())


def _garbage(path):
    path.write_bytes(b"\xff" * 100)


def _empty(path):
    path.write_bytes(b"")


def _folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [_truncate, _flip_a_bit, _foreign, _of_another_key, _garbage, _empty, _folder]
)
def test_damaged_segments_count_as_absent_and_are_replaced(tmp_path, damage, caplog):
    store = FeatureStore(tmp_path / "cache")
    damage(put(store))
    assert not len(store.get(KEY, IMAGES).known)
    if damage is not _folder:
        assert "ignoring the cache file" in caplog.text
    store.summary()
    put(store, seed=1)
    np.testing.assert_array_equal(store.get(KEY, IMAGES).x, entry(1).x)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("parts", "[1]"),
        ("parts", "null"),
        ("parts", '[{"images": 4, "forward_seconds": "x"}]'),
        ("parts", '[{"images": 3}]'),
        ("parts", '[{"images": 5}, {"images": -1}]'),
        ("parts", "[" * 100_000),
        ("unreadable", "[]"),
        ("unreadable", '{"2": 5}'),
        ("unreadable", '{"7": "truncated"}'),
        ("unreadable", '{"x": "truncated"}'),
        ("unreadable", '{"-1": "truncated"}'),
        ("images", "a b c"),
        ("images", ""),
    ],
)
@pytest.mark.parametrize("resealed", [False, True])
def test_a_strange_header_counts_as_absent(tmp_path, field, text, resealed):
    store = FeatureStore(tmp_path)
    path = put(store)
    with safe_open(path, "np") as file:
        header, x = dict(file.metadata()), file.get_tensor("x")
    header[field] = text
    if resealed:  # as another version of the package may have written it
        header["digest"] = store_module._digest(x, header)
    save_file({"x": x}, path, header)
    assert not len(store.get(KEY, IMAGES).known)
    store.summary()


@pytest.mark.parametrize(
    "x",
    [np.zeros((3, 5)), np.zeros((4, 5), np.float32), np.zeros(3, np.float32)],
)
def test_strange_arrays_count_as_absent(tmp_path, x):
    store = FeatureStore(tmp_path)
    store._put(KEY, store_module._Segment(IMAGES, x, {2: "truncated"}, [{"images": 4}]))
    assert sum(1 for _ in store.entries()) == 1
    assert not len(store.get(KEY, IMAGES).known)
    store.summary()


# Joined -----------------------------------------------------------------------------------------
def put_many(store, n=40):
    """One image at a time."""
    for k in range(n):
        one = Entry(np.full((1, 3), k, np.float32), np.arange(1), {}, {"dataset": f"{k % 2}"})
        store.put(KEY, [f"i{k}"], one)
    return [f"i{k}" for k in range(n)]


@pytest.mark.parametrize("root", ["folder", "memory://bucket/of/features"])
def test_small_segments_that_pile_up_are_joined(tmp_path, root):
    store = open_store(root if "://" in root else tmp_path / root)
    images = put_many(store, 15)
    assert store.compact(KEY) == 0  # a few do no harm
    images = put_many(store)
    store.put(KEY, ["bad", "i1"], Entry(np.empty((0, 0), np.float32), np.empty(0, int), {0: "x"}))
    before = store.get(KEY, [*images, "bad"])
    assert store.compact(KEY) == 41
    assert len(store._list(KEY)) == 1
    after = store.get(KEY, [*images, "bad"])
    np.testing.assert_array_equal(after.x, before.x)
    assert after.x[:, 0].tolist() == list(range(40))
    assert after.unreadable == before.unreadable == {40: "x"}
    if "://" not in root:
        kept = {dataset: total["images"] for (dataset, _), total in store.summary().items()}
        assert kept == {"0": 20, "1": 20, "?": 1}
    else:
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_what_is_joined_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    store, read = FeatureStore(tmp_path), FeatureStore._read
    images = put_many(store)

    def join_first(self, key, name):
        monkeypatch.setattr(FeatureStore, "_read", read)
        assert self.compact(key) == 40
        return read(self, key, name)

    monkeypatch.setattr(FeatureStore, "_read", join_first)
    assert store.get(KEY, images).x[:, 0].tolist() == list(range(40))


def test_the_same_images_in_another_order_have_the_same_name(tmp_path):
    """Else two processes that join them might each delete what the other has just written."""
    one, two = FeatureStore(tmp_path / "one"), FeatureStore(tmp_path / "two")
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    info, names = {"dataset": "d"}, ["a", "b", "bad", "c", "e"]
    rows = np.array([0, 1, 3, 4])
    one.put(KEY, names, Entry(x, rows, {2: "x"}, info))
    two.put(KEY, names[::-1], Entry(x[::-1].copy(), np.array([0, 1, 3, 4]), {2: "x"}, info))
    assert one._list(KEY) == two._list(KEY)
    two.put(KEY, names, Entry(x + 1, rows, {2: "x"}, info))
    assert len(two._list(KEY)) == 2


def _join_and_look(root):
    store, images = FeatureStore(root), [f"i{k}" for k in range(40)]
    for _ in range(20):
        store.compact(KEY)
        assert store.get(KEY, images).x[:, 0].tolist() == list(range(40))
        put_many(store, 17)
    return True


def test_several_processes_join_and_look_and_lose_nothing(tmp_path):
    import multiprocessing

    put_many(FeatureStore(tmp_path))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        assert all(pool.map(_join_and_look, [tmp_path] * 3))


def test_a_shared_store_heeds_the_umask(tmp_path):
    old = os.umask(0o002)
    try:
        put(FeatureStore(tmp_path / "cache"))
    finally:
        os.umask(old)
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o020  # the group may write


def test_a_folder_in_the_way_is_an_os_error(tmp_path):
    store = FeatureStore(tmp_path)
    _folder(put(store))
    assert not len(store.get(KEY, IMAGES).known)
    with pytest.raises(OSError, match="directory"):
        store.put(KEY, IMAGES, entry())


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`cache` must be a folder"):
        FeatureStore(tmp_path / "file")


def _write_many(root):
    store = FeatureStore(root)
    for _ in range(30):
        store.put(KEY, IMAGES, entry())
        np.testing.assert_array_equal(store.get(KEY, IMAGES).x, entry().x)
    return True


def test_several_processes_share_a_store(tmp_path):
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        assert all(pool.map(_write_many, [tmp_path] * 3))


def test_a_kill_while_writing_leaves_no_entry(tmp_path):
    script = (
        "import os, numpy as np, sfda_tune.extraction.store as s\n"
        "os.replace = lambda *a: os._exit(9)\n"
        f"s.FeatureStore({str(tmp_path)!r}).put({KEY!r}, ['a', 'b'], "
        "s.Entry(np.zeros((2, 2), np.float32), np.arange(2)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    store = FeatureStore(tmp_path)
    assert not len(store.get(KEY, ["a", "b"]).known)
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    store.clear()
    assert not list(tmp_path.rglob("*.tmp"))


DAY = 86400.0


def age(path, days):
    old = time.time() - days * DAY
    os.utime(path, (old, old))


def test_summary_and_clear(tmp_path):
    store = FeatureStore(tmp_path)
    first, second = put(store), put(store, ["e", "f", "g"])
    other = make_key("", "", "")
    store.put(other, IMAGES, Entry(np.zeros((4, 999), np.float32), np.arange(4)))
    summary = store.summary()
    assert set(summary) == {("photos", "net"), ("?", "?")}
    net = summary["photos", "net"]
    assert (net["segments"], net["images"]) == (2, 7)
    assert net["bytes"] == pytest.approx(first.stat().st_size + second.stat().st_size)
    second_size = second.stat().st_size
    age(first, 3)
    assert time.time() - net["used"] < 60
    assert store.clear(older_than=2, larger_than=10_000) == (0, 0)  # both at once
    assert store.clear(larger_than=10_000)[0] == 1
    assert set(store.summary()) == {("photos", "net")}
    assert store.clear(older_than=2)[0] == 1
    assert store.get(KEY, IMAGES).known.tolist() == []
    assert store.get(KEY, ["e", "f", "g"]).known.tolist() == [0, 1, 2]
    age(second, 3)
    store.get(KEY, ["e"])  # a read counts as use
    assert store.clear(older_than=2)[0] == 0
    assert store.clear() == (1, second_size)
    assert store.summary() == {}


def test_what_is_longest_unused_makes_room(tmp_path):
    store = FeatureStore(tmp_path)
    paths = [put(store, [f"{k}a", f"{k}b", f"{k}c"], seed=k) for k in range(6)]
    for days, path in zip((5, 3, 9, 1, 0, 0), paths, strict=True):
        age(path, days)
    size = paths[0].stat().st_size
    begun = time.time() - DAY / 2
    assert store.shrink(6 * size, begun) == (0, 0)
    assert store.shrink(4 * size, begun) == (2, 2 * size)
    assert [path.exists() for path in paths] == [False, True, False, True, True, True]
    store.get(KEY, ["1a"])  # used again: younger than the fourth
    assert store.shrink(3 * size, begun) == (1, size)
    assert paths[1].exists()
    assert store.shrink(0, begun) == (0, 0)  # what this run has used stays


@pytest.mark.parametrize("text", ["plenty", "-1GB", "20 XB", "GB"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, tmp_path, text):
    monkeypatch.setenv("SFDA_TUNE_CACHE_SIZE", text)
    with pytest.raises(ValueError, match="SFDA_TUNE_CACHE_SIZE must be a size such as 500MB"):
        open_store(tmp_path)


def test_what_an_earlier_version_kept_is_left_alone_and_said(tmp_path):
    store, old = FeatureStore(tmp_path), tmp_path / "features" / "ab" / f"{'ab' * 20}.safetensors"
    assert not store.has_outdated
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x" * 1000)
    path = put(store)
    assert store.has_outdated
    assert store.summary()["(of an earlier version, not used)", ""]["bytes"] == 1000
    with pytest.raises(ValueError, match="`outdated` and `larger_than` exclude each other"):
        store.clear(larger_than=10, outdated=True)
    assert store.clear(outdated=True) == (1, 1000)
    assert path.exists()
    assert not (tmp_path / "features").exists()


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("SFDA_TUNE_CACHE", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("SFDA_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root().name == "sfda_tune"


def test_a_bucket_holds_what_a_folder_does(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    bucket, folder = open_store("memory://bucket/of/features"), FeatureStore(tmp_path)
    assert not len(bucket.get(KEY, IMAGES).known)
    for store in (bucket, folder):
        store.put(KEY, IMAGES, entry())
        np.testing.assert_array_equal(store.get(KEY, ["d", "a"]).x, entry().x[[2, 0]])
    fs = fsspec.filesystem("memory")
    (path,) = fs.find("/bucket/of/features")
    ((file, _),) = folder.entries()
    assert path.endswith(f"of/features/{file.relative_to(tmp_path).as_posix()}")
    file.write_bytes(fs.cat_file(path))
    np.testing.assert_array_equal(folder.get(KEY, IMAGES).x, entry().x)
    fs.pipe_file(path, b"damaged")
    assert not len(bucket.get(KEY, IMAGES).known)
    fs.rm("/bucket", recursive=True)
