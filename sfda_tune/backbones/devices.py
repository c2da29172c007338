"""Devices: how exactly they compute, whether they still do, and what is faster there."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

__all__ = ["check_precision", "compute", "has_fast_float64", "is_working", "pin", "scores_faster"]

logger = logging.getLogger(__name__)

# Multiplications of a score from which a GPU repays the transfer of the features and the start of
# its libraries; below, a CPU takes some hundredths of a second.
WORTH_A_TRANSFER = 2e9


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


def has_fast_float64(device: Any) -> bool:
    """Whether a CUDA device has more than the token float64 units of cards for games.

    Those of compute capability x.0 up to 10 (P100, V100, A100, H100, B200) compute float64 at half
    the rate of float32, all others at 1/32 or 1/64.
    """
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return minor == 0 and 6 <= major <= 10


def scores_faster(shape: tuple[int, int], device: Any) -> bool:
    """Whether SFDA of so many samples and dimensions is faster on a device than on the host.

    Goes by the size and the kind of card, not by the clock: the same input is computed in the same
    place each time.
    """
    import torch

    n, d = shape
    if torch.device(device).type != "cuda" or n * d * min(n, d) < WORTH_A_TRANSFER:
        return False
    return torch.cuda.is_available() and has_fast_float64(device)
