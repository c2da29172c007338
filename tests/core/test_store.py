import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sfda_tune.extraction import store as store_module
from sfda_tune.extraction.store import (
    Entry,
    FeatureStore,
    default_root,
    make_key,
    open_store,
)

KEY = make_key(["a", "b"], "weights", "preprocessing", "float32")


def entry(seed: int = 0) -> Entry:
    x = np.random.default_rng(seed).normal(size=(3, 5)).astype(np.float32)
    return Entry(x, np.array([0, 1, 3]), {"2": "truncated"}, {"backbone": "net", "n_params": 7})


def test_what_goes_in_comes_out(tmp_path):
    store = FeatureStore(tmp_path / "new" / "cache")
    assert store.get(KEY) is None
    store.put(KEY, entry())
    again = store.get(KEY)
    assert again is not None
    np.testing.assert_array_equal(again.x, entry().x)
    assert again.rows.tolist() == [0, 1, 3]
    assert again.unreadable == {"2": "truncated"}
    assert again.info == {"backbone": "net", "n_params": 7}
    assert [p.suffix for p in (tmp_path / "new").rglob("*") if p.is_file()] == [".safetensors"]


def test_the_key_depends_on_everything():
    others = [
        make_key(["b", "a"], "weights", "preprocessing", "float32"),
        make_key(["a"], "weights", "preprocessing", "float32"),
        make_key(["a", "b"], "other", "preprocessing", "float32"),
        make_key(["a", "b"], "weights", "other", "float32"),
        make_key(["a", "b"], "weights", "preprocessing", "float16"),
    ]
    assert len({KEY, *others}) == 6


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def _flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def _foreign(path):
    save_file({"x": np.zeros((3, 5), np.float32), "rows": np.arange(3)}, path)


def _of_another_key(path):
    other = FeatureStore(path.parents[3] / "other")
    other.put("0" * 40, entry())
    path.write_bytes(other.path("0" * 40).read_bytes())


def _garbage(path):
    path.write_bytes(b"\xff" * 100)


def _empty(path):
    path.write_bytes(b"")


def _folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [_truncate, _flip_a_bit, _foreign, _of_another_key, _garbage, _empty]
)
def test_damaged_entries_count_as_absent_and_are_replaced(tmp_path, damage, caplog):
    store = FeatureStore(tmp_path / "cache")
    store.put(KEY, entry())
    damage(store.path(KEY))
    assert store.get(KEY) is None
    assert "ignoring the cache file" in caplog.text
    store.summary()
    store.put(KEY, entry(1))
    again = store.get(KEY)
    assert again is not None
    np.testing.assert_array_equal(again.x, entry(1).x)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("info", "[1]"),
        ("info", "null"),
        ("info", '{"forward_seconds": "x"}'),
        ("info", "[" * 100_000),
        ("unreadable", "[]"),
        ("unreadable", '{"2": 5}'),
        ("unreadable", '{"7": "truncated"}'),
        ("unreadable", '{"x": "truncated"}'),
    ],
)
@pytest.mark.parametrize("resealed", [False, True])
def test_a_strange_header_counts_as_absent(tmp_path, field, text, resealed):
    store = FeatureStore(tmp_path)
    store.put(KEY, entry())
    with safe_open(store.path(KEY), "np") as file:
        header, tensors = dict(file.metadata()), {k: file.get_tensor(k) for k in ("x", "rows")}
    header[field] = text
    if resealed:  # as another version of the package may have written it
        header["digest"] = store_module._digest(tensors["x"], tensors["rows"], header)
    save_file(tensors, store.path(KEY), header)
    assert store.get(KEY) is None
    store.summary()


@pytest.mark.parametrize(
    ("x", "rows"),
    [
        (np.zeros((3, 5)), np.arange(3)),
        (np.zeros((3, 5), np.float32), np.arange(3, dtype=np.int32)),
        (np.zeros((3, 5), np.float32), np.array([2, 1, 0])),
        (np.zeros((3, 5), np.float32), np.array([0, 1, 5])),
        (np.zeros((3, 5), np.float32), np.arange(4)),
        (np.zeros(3, np.float32), np.arange(3)),
    ],
)
def test_strange_arrays_count_as_absent(tmp_path, x, rows):
    store = FeatureStore(tmp_path)
    store.put(KEY, Entry(x, rows))
    assert store.get(KEY) is None
    store.summary()


def test_a_shared_store_heeds_the_umask(tmp_path):
    old = os.umask(0o002)
    try:
        FeatureStore(tmp_path / "cache").put(KEY, entry())
    finally:
        os.umask(old)
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o020  # the group may write


def test_a_folder_in_the_way_is_an_os_error(tmp_path):
    store = FeatureStore(tmp_path)
    store.put(KEY, entry())
    _folder(store.path(KEY))
    assert store.get(KEY) is None
    with pytest.raises(OSError, match="directory"):
        store.put(KEY, entry())


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`cache` must be a folder"):
        FeatureStore(tmp_path / "file")


def _write_many(root):
    store = FeatureStore(root)
    for _ in range(30):
        store.put(KEY, entry())
        again = store.get(KEY)
        assert again is not None
        np.testing.assert_array_equal(again.x, entry().x)
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
        f"s.FeatureStore({str(tmp_path)!r}).put({KEY!r}, "
        "s.Entry(np.zeros((2, 2), np.float32), np.arange(2)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    store = FeatureStore(tmp_path)
    assert store.get(KEY) is None
    assert len(list(tmp_path.rglob("*.tmp"))) == 1
    store.clear()
    assert not list(tmp_path.rglob("*.tmp"))


def test_summary_and_clear(tmp_path):
    store = FeatureStore(tmp_path)
    other = make_key([], "", "", "")
    store.put(KEY, entry())
    store.put(other, entry())
    summary = store.summary()
    assert summary["net"]["entries"] == 2
    assert summary["net"]["images"] == 6
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))
    assert summary["net"]["bytes"] == size
    old = time.time() - 3 * 86400
    os.utime(store.path(KEY), (old, old))
    assert store.clear(older_than=2)[0] == 1
    assert store.get(KEY) is None
    assert store.get(other) is not None
    os.utime(store.path(other), (old, old))
    store.get(other)  # a read counts as use
    assert store.clear(older_than=2)[0] == 0
    assert store.clear() == (1, size // 2)
    assert store.summary() == {}


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("SFDA_TUNE_CACHE", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.delenv("SFDA_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root().name == "sfda_tune"


def test_a_bucket_holds_what_a_folder_does(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    bucket, folder = open_store("memory://bucket/of/features"), FeatureStore(tmp_path)
    assert bucket.get(KEY) is None
    for store in (bucket, folder):
        store.put(KEY, entry())
        found = store.get(KEY)
        np.testing.assert_array_equal(found.x, entry().x)
    fs = fsspec.filesystem("memory")
    (path,) = fs.find("/bucket/of/features")
    assert path.endswith(f"of/features/{folder.path(KEY).relative_to(tmp_path).as_posix()}")
    folder.path(KEY).write_bytes(fs.cat_file(path))
    np.testing.assert_array_equal(folder.get(KEY).x, entry().x)
    fs.pipe_file(path, b"damaged")
    assert bucket.get(KEY) is None
    fs.rm("/bucket", recursive=True)
