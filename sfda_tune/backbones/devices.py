"""Devices: how exactly they compute, whether they still do, and what is faster there."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import sys
import weakref
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from sfda_tune.backbones.preprocessing import Preprocessing
from sfda_tune.values.text import did_you_mean

if TYPE_CHECKING:
    import torch


__all__ = [
    "check_device", "check_precision", "choose_layout", "compute", "is_working", "lay_out", "pin",
]  # fmt: skip

logger = logging.getLogger(__name__)
KINDS = (
    "cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia", "maia", "ipu", "hip", "mkldnn", "vulkan",
    "opengl", "opencl", "ideep", "ve", "fpga", "lazy", "meta", "privateuseone",
)  # fmt: skip


def check_precision(precision: str, device: str) -> None:
    """Refuse what only CUDA devices do on any other; ``"auto"`` is not known yet.

    Raises
    ------
    ValueError
    """
    if precision == "tf32" and device != "auto" and not device.startswith("cuda"):
        raise ValueError(
            f"`precision` 'tf32' needs a CUDA device but `device` is {device!r}; take 'float32'."
        )


@contextlib.contextmanager
def compute(device: Any, precision: str, *, exact: bool = True) -> Iterator[None]:
    """Compute in a precision.

    Parameters
    ----------
    device : str or torch.device
    precision : {"float32", "tf32", "bfloat16", "float16"}
        ``"tf32"`` multiplies float32 numbers cut to 10 bits, on the tensor cores of CUDA devices;
        the half precisions are torch's autocast.
    exact : bool, default True
        Whether ``"float32"`` means that no product is cut. Torch's own default cuts them in
        convolutions, not in matrix products; False leaves that to torch.
    """
    import torch

    kind = torch.device(device).type
    if precision in ("bfloat16", "float16"):
        with torch.autocast(kind, getattr(torch, precision)):
            yield
    elif kind == "cuda" and (precision == "tf32" or exact):
        with _multiply(tf32=precision == "tf32"):
            yield
    else:
        yield


@contextlib.contextmanager
def _multiply(*, tf32: bool) -> Iterator[None]:
    """Say how float32 products are made; torch knows that for the whole process only."""
    import torch

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    if hasattr(cuda.matmul, "fp32_precision"):  # torch 2.9; the older switches warn since then
        owners, name = (cuda.matmul, cudnn.conv, cudnn.rnn), "fp32_precision"
        value: Any = "tf32" if tf32 else "ieee"
    else:
        owners, name, value = (cuda.matmul, cudnn), "allow_tf32", tf32
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            setattr(owner, name, old)


def pin(tensor: Any) -> bool:
    """Let GPUs read the memory of a tensor by themselves, for as long as it lives, if they may.

    Some containers limit how much memory can be pinned. It is registered instead of allocated as
    such: torch's allocator takes up to twice as much, and ends the process where it frees memory
    after a context was broken.
    """
    import torch

    runtime: Any = torch.cuda.cudart()
    storage = tensor.untyped_storage()
    address, size = storage.data_ptr(), storage.nbytes()
    if error := int(runtime.cudaHostRegister(address, size, 0)):
        logger.info("%d MB are not pinned: CUDA error %d", size >> 20, error)
        return False
    weakref.finalize(storage, runtime.cudaHostUnregister, address)
    return True


def is_working(device: Any) -> bool:
    """Whether a device still computes.

    A kernel that reads where it must not leaves the context of CUDA unusable for the rest of the
    process, whoever asks next.
    """
    import torch

    if torch.device(device).type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return float(torch.ones(1, device=device) + 1) == 2
    except torch.OutOfMemoryError:  # full, but alive
        return True
    except RuntimeError:
        return False


SMALL = 5e5  # parameters × (pixels / 224²): below, one thread computes


def choose_layout(module: Any) -> torch.memory_format:
    """Return the layout in which the 2-D convolutions of a network are fast where it is.

    That is channels_last, but on a GPU for networks with depthwise convolutions: cuDNN compiles
    those in that layout, one by one, when a process first uses them. On an H200 the first batch of
    256 took EfficientNet-B0 3.5 s instead of .4 and the first training step 14 s instead of 1.1;
    the later ones are up to twice as fast, which pays after some 50,000 images. Kernels of 7 × 7
    (ConvNeXt) are compiled in either layout.
    """
    import torch

    on_gpu = any(p.is_cuda for p in itertools.islice(module.parameters(), 1))
    if on_gpu and any(map(_is_compiled, module.modules())):
        return torch.contiguous_format
    return torch.channels_last


def _is_compiled(module: Any) -> bool:
    """Whether it is a depthwise convolution that only channels_last has compiled."""
    import torch

    return (
        isinstance(module, torch.nn.Conv2d)
        and module.groups == module.in_channels > 1
        and max(module.kernel_size) < 7
    )


def lay_out(module: Any) -> torch.memory_format:
    """Lay out the weights of 2-D convolutions as `choose_layout` says, in place; return how.

    As ``module.to(memory_format=…)``, which refuses networks that hold a 3-D convolution, too
    (timm's lambda networks).
    """
    layout = choose_layout(module)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
    return layout


@contextlib.contextmanager
def use_threads(n: int | None) -> Iterator[None]:
    """Let PyTorch compute with `n` threads (None: as it does), then with as many as before."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(n or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def few_threads(module: torch.nn.Module, preprocessing: Preprocessing) -> Iterator[None]:
    """Let PyTorch compute a small network with one thread.

    On an idle machine with two cores a second thread gained such networks at most a tenth; with
    anything else running beside, waiting for each other cost them 20 to 50 times the seconds.
    Goes by the network, not by the load, so that the same input gives the same bits.
    """
    import torch

    _, height, width = preprocessing.input_size or (3, 224, 224)
    work = sum(p.numel() for p in module.parameters()) * height * width / 224**2
    with use_threads(1 if work < SMALL else torch.get_num_threads()):
        yield


def check_device(device: str) -> None:
    """Refuse what cannot be a device, before torch is imported, which takes seconds.

    Raises
    ------
    ValueError
        If the text is neither "auto" nor the name of a device of torch.

    Examples
    --------
    >>> check_device("cuda:1")
    """
    if "torch" in sys.modules or entry_points(group="torch.backends"):
        return  # which knows, and may have been taught others
    if not re.fullmatch(rf"auto|({'|'.join(KINDS)})(:\d+)?", device):
        raise ValueError(
            f"`device` must be 'auto' or a device torch can use, such as 'cpu', 'cuda', 'cuda:1' "
            f"or 'mps', but is {device!r}{did_you_mean(device, KINDS) or '.'}"
        )


def resolve_device(device: str) -> str:
    """Return the torch device behind ``"auto"``, or check the given one.

    Raises
    ------
    ValueError
        If torch cannot use it.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"`device` must be 'auto' or a device torch can use but is {device!r} ({reason})."
        ) from error
    return device


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in text for sign in ("out of memory", "can't allocate memory", "bad_alloc")
    )
