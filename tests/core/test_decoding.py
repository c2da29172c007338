import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from sfda_tune import DatasetError
from sfda_tune.data.loader import Loader

HERE = os.getpid()


class Items:
    """`do` is called with each key; where it returns nothing, the item is the key, as a tensor."""

    def __init__(self, do=lambda key: None):
        self.do = do

    def name(self, key):
        return f"image {key}"

    def __getitem__(self, key):
        made = self.do(key)
        return torch.full((3, 4), key) if made is None else made


CUT = [range(start, min(start + 3, 20)) for start in range(0, 20, 3)]
HOW = {
    "direct": {"direct": True},
    "thread": {},
    "threads": {"threads": 3},
    "process": {"workers": 1},
    "processes": {"workers": 3},
}


@pytest.mark.parametrize("how", HOW)
def test_batches_come_in_order_again_and_again(how):
    loader = Loader(Items(), CUT, torch.stack, **HOW[how])
    for _ in range(2):
        found = list(loader)
        assert [list(keys) for keys, _ in found] == [list(keys) for keys in CUT]
        for keys, value in found:
            assert value[:, 0, 0].tolist() == list(keys)
            value += 1  # it is the caller's
    loader.close()


KINDS = [
    torch.ones(2, 3, dtype=torch.bfloat16),
    torch.arange(6.0).view(2, 3).T,
    torch.nn.Parameter(torch.ones(2)),
    np.arange(6).reshape(2, 3)[:, 1],
    np.empty((0, 3), np.uint8),
    "why not",
]


def test_whatever_an_item_is_it_arrives():
    loader = Loader(Items(KINDS.__getitem__), [range(len(KINDS))], list, workers=1)
    ((_, found),) = loader
    for value, kind in zip(found, KINDS, strict=True):
        assert type(value) is type(kind)
        if isinstance(kind, torch.Tensor):
            assert torch.equal(value, kind)
            assert value.dtype == kind.dtype
        else:
            assert np.array_equal(value, kind)


def _refuse(key):
    if key == 7:
        raise ConnectionResetError(104, "of the item, not of the pipe")


class StayAtHomeError(Exception):
    def __init__(self, a, b):
        super().__init__("only one")


def _refuse_strangely(key):
    if key == 7:
        raise StayAtHomeError(1, 2)


@pytest.mark.parametrize("how", HOW)
def test_the_error_of_an_item_is_the_caller_s(how):
    with pytest.raises(ConnectionResetError, match="of the item"):
        list(Loader(Items(_refuse), CUT, torch.stack, **HOW[how]))
    with pytest.raises((StayAtHomeError, RuntimeError), match="only one"):
        list(Loader(Items(_refuse_strangely), CUT, torch.stack, **HOW[how]))


def _die(how):
    def do(key):
        if key == 7 and os.getpid() != HERE:
            how()

    return do


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGBUS)), "SIGBUS"),
        (lambda: os._exit(3), "code 3"),
    ],
)
def test_a_process_that_dies_names_its_image(how, text):
    with pytest.raises(
        DatasetError, match=rf"died while it decoded image 7 \({text}\).*run again"
    ):
        list(Loader(Items(_die(how)), CUT, torch.stack, workers=2))


def _send_to_process(loader, what):
    for _ in loader:
        os.kill(loader._hands[0].process.pid, what)


def test_a_process_that_is_killed_between_images_ends_the_decoding():
    loader = Loader(Items(), CUT, torch.stack, workers=1)
    with pytest.raises(DatasetError, match="a decoding process died"):
        _send_to_process(loader, signal.SIGKILL)
    assert len(list(loader)) == len(CUT)  # with another process


def _stay(key):
    if key == 7:
        threading.Event().wait()


@pytest.mark.parametrize("how", ["thread", "threads", "process", "processes"])
def test_an_image_that_never_ends_is_an_error_that_names_it(how, monkeypatch):
    monkeypatch.setenv("SFDA_TUNE_PATIENCE", "0.2")
    loader = Loader(Items(_stay), CUT, torch.stack, **HOW[how])
    with pytest.raises(DatasetError, match=r"stalled by image 7: no sign of life for 0\.2 s"):
        list(loader)
    assert not loader._hands


def test_a_stopped_process_is_an_error(monkeypatch):
    monkeypatch.setenv("SFDA_TUNE_PATIENCE", "0.2")
    loader = Loader(Items(), CUT, torch.stack, workers=1)
    with pytest.raises(DatasetError, match="decoding has stalled"):
        _send_to_process(loader, signal.SIGSTOP)


def test_slow_images_are_no_stall(monkeypatch):
    monkeypatch.setenv("SFDA_TUNE_PATIENCE", "0.3")
    loader = Loader(Items(lambda key: time.sleep(0.03)), [range(20)], torch.stack, workers=1)
    assert len(list(loader)) == 1


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan"])
def test_a_wrong_patience_is_named(text, monkeypatch):
    monkeypatch.setenv("SFDA_TUNE_PATIENCE", text)
    with pytest.raises(ValueError, match=f"SFDA_TUNE_PATIENCE must be .* but is '{text}'"):
        list(Loader(Items(), CUT, torch.stack))


def test_where_no_process_can_start_a_thread_decodes_and_says_so(monkeypatch):
    def refuse(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.Process.start", refuse)
    with pytest.warns(
        UserWarning, match="2 of 2 .*temporarily unavailable.* this process decodes"
    ):
        assert len(list(Loader(Items(), CUT, torch.stack, workers=2))) == len(CUT)


def test_processes_end_with_their_loader():
    loader = Loader(Items(), CUT, torch.stack, workers=2)
    next(iter(loader))
    processes = [psutil.Process(hand.process.pid) for hand in loader._hands]
    assert all(process.is_running() for process in processes)
    del loader
    assert not psutil.wait_procs(processes, timeout=10)[1]


def _decode_with_little_shared_memory():
    libc = ctypes.CDLL(None, use_errno=True)
    mounts = ([b"none", b"/", None, 1 << 18 | 1 << 14, None],  # private to this process
              [b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=1m"])  # fmt: skip
    if libc.unshare(0x20000) or any(libc.mount(*mount) for mount in mounts):
        os._exit(77)
    cut = [range(start, start + 2) for start in range(0, 20, 2)]
    loader = Loader(Items(lambda key: torch.zeros(3, 512, 512)), cut, torch.stack, workers=2)
    os._exit(sum(len(value) for _, value in loader))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_a_small_dev_shm_does_not_matter():
    """Docker gives 64 MB; here it is 1 MB, and many times as much is on its way."""
    process = multiprocessing.get_context("fork").Process(target=_decode_with_little_shared_memory)
    process.start()
    process.join(60)
    process.kill()
    if process.exitcode == 77:
        pytest.skip("this user may not mount")
    assert process.exitcode == 20
