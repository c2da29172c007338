import dataclasses
import errno
import os
import socket
import sqlite3
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from sfda_tune.extraction.store import FeatureStore
from sfda_tune.finetuning.checkpoints import write_tensors
from sfda_tune.pipelines.config import SearchConfig
from sfda_tune.pipelines.result import SearchResult
from sfda_tune.pipelines.run_folder import RunFolder
from sfda_tune.report.run import read_run
from sfda_tune.selection.tables import read_scores
from sfda_tune.values.files import (
    check,
    clear_leftovers,
    find_disk_fault,
    open_regular,
    read_json,
    read_rows,
    replacing,
    unfinished,
    write_text,
)


def test_threads_that_write_one_file_never_meet(tmp_path):
    path = tmp_path / ("x" * 250)  # as long as names can be
    texts = ["a" * 300_000, "b" * 200_000]
    write_text(path, texts[0])
    problems = []

    def write(text):
        try:
            for _ in range(40):
                write_text(path, text)
                assert path.read_text() in texts
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert os.listdir(tmp_path) == [path.name]


def test_an_error_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "x", "old")

    def fail():
        with replacing(tmp_path / "x") as temporary:
            temporary.write_text("new")
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_full_disk_is_known_however_it_is_told(tmp_path):
    pages = sqlite3.connect(tmp_path / "x.db")
    pages.execute("PRAGMA max_page_count = 2")
    pages.execute("CREATE TABLE t (x)")
    with pytest.raises(sqlite3.OperationalError) as full:
        pages.execute("INSERT INTO t VALUES (zeroblob(1000000))")
    pages.close()
    told = "Traceback …\nOSError: [Errno 30] Read-only file system: 'x'"
    rust = SafetensorError("I/O error: No space left on device (os error 28)")
    for error in (full.value, rust, OSError(errno.EDQUOT, "quota"), RuntimeError(told)):
        assert find_disk_fault(error)
        behind, unsaid = ValueError("other"), ValueError("other")
        behind.__cause__, unsaid.__context__ = error, error
        assert find_disk_fault(behind) == find_disk_fault(unsaid) == find_disk_fault(error)
    assert find_disk_fault(FileNotFoundError(2, "not there")) is None


def test_names_in_other_encodings_come_back(tmp_path):
    import json

    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_text(tmp_path / "x.json", json.dumps({"name": name}, ensure_ascii=False))
    assert read_json(tmp_path / "x.json", {"name": str})["name"] == name


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_files_have_the_permissions_of_the_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        write_text(tmp_path / "text", "x")
        write_tensors(tmp_path / "weights", {"x": torch.zeros(2)}, {})
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}


def test_leftovers_of_killed_processes_are_cleared(tmp_path):
    with unfinished(tmp_path) as young:
        young.write_text("")
        old = young.with_name(young.name.replace("-", "-0"))
        old.mkdir()
        (old / "x").write_text("")
        (tmp_path / ".of_others.tmp").write_text("")
        day = time.time() - 90_000
        os.utime(old, (day, day))
        os.utime(tmp_path / ".of_others.tmp", (day, day))
        clear_leftovers(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".of_others.tmp", young.name])
    assert not young.exists()


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_loop(path):
    path.symlink_to(path)


def make_sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


STRANGE = {
    "fifo": make_fifo,
    "socket": make_socket,
    "loop": make_loop,
    "sparse": make_sparse,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}


@pytest.fixture(params=STRANGE)
def make_strange(request, monkeypatch):
    def make(path):
        monkeypatch.chdir(path.parent)  # the address of a socket is short
        STRANGE[request.param](Path(path.name))
        return path

    return make


@pytest.fixture
def strange(make_strange, tmp_path):
    return make_strange(tmp_path / "strange")


def test_what_is_no_file_is_not_read(strange):
    with pytest.raises(OSError):  # noqa: PT011
        open_regular(strange)
    with pytest.raises(ValueError, match="strange: "):
        read_json(strange)
    with pytest.raises(ValueError, match="strange: must be CSV"):
        read_rows(strange, ["a"])


def test_an_image_that_is_no_file_is_unreadable(strange):
    from sfda_tune.data.decoding import UNREADABLE, UnreadableImage
    from sfda_tune.data.opening import open_dataset

    real = strange.with_name("real.png")
    Image.new("L", (4, 4)).save(real)
    data = open_dataset(([strange, real], ["a", "b"]))
    with pytest.raises(UnreadableImage):
        data.load(0)
    assert data.digests()[0] == UNREADABLE


def test_an_entry_that_is_no_file_is_absent(make_strange, tmp_path):
    from sfda_tune.extraction.store import Entry, FeatureStore, make_key

    store, key = FeatureStore(tmp_path / "cache"), make_key("w", "p", "float32")
    path = store.path(key, f"1-{'0' * 32}")
    path.parent.mkdir(parents=True)
    make_strange(path)
    assert not len(store.get(key, ["a"]).known)
    store.summary()
    store.put(key, ["a"], Entry(np.zeros((1, 2), np.float32), np.arange(1)))
    assert len(store.get(key, ["a"]).known) == 1


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (3, str, "it must be a text but is 3"),
        (True, int, "an integer but is True"),
        (float("nan"), float, "a number but is nan"),
        (10**400, float, "a number but is 1"),
        ({"a": [1, "x"]}, {"a": [int]}, r"`a\[1\]` must be an integer but is 'x'"),
        ({"a": {"b": 1}}, {"a": {str: (str, None)}}, "`a.b` must be a text or null but is 1"),
        ({}, {"a": int}, "it must have 'a'"),
        ({"a": "\x1b[31m\n"}, {"a": int}, r"but is '\\x1b\[31m\\n'"),
    ],
)
def test_what_is_of_another_kind_is_named(value, kind, message):
    with pytest.raises(ValueError, match=message):
        check(value, kind)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": NaN}', "\xff", '{"a": 1e999}'])
def test_what_is_no_json_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json: .*restore it") as caught:
        read_json(tmp_path / "x.json", {"a": float})
    assert "\n" not in str(caught.value)


def config_with_out(out):
    given = dict.fromkeys(f.name for f in dataclasses.fields(SearchConfig))
    given |= {
        "workers": 1,
        "seed": 0,
        "objective": "accuracy",
        "metric": "accuracy",
        "plugins": (),
    }
    return SearchConfig(**given | {"max_unreadable": 0.1, "out": out})


DOORS = [SearchResult.open, read_run, FeatureStore, read_scores, config_with_out]


@pytest.mark.parametrize("door", DOORS)
def test_every_door_says_what_is_in_the_place_of_what_it_opens(door, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    kinds = {
        "fifo": "is a FIFO",
        "loop": r"cannot be opened \(Too many levels of symbolic links\)",
        "dangling": "is a link to nothing",
        "/dev/null": "is a device",
        "missing": "does not exist",
    }
    for name, said in kinds.items():
        if name != "missing" or door not in (FeatureStore, config_with_out):  # they make it
            with pytest.raises((ValueError, FileNotFoundError), match=said):
                door(tmp_path / name)


@pytest.mark.parametrize("door", [SearchResult.open, read_run, RunFolder.open])
def test_every_door_says_what_is_in_the_place_of_a_file(door, tmp_path):
    os.mkfifo(tmp_path / "search.json")
    with pytest.raises(ValueError, match=r"search\.json: is a FIFO"):
        door(tmp_path)
