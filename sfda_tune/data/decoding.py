"""One item (path, encoded bytes, array, image) → upright 8-bit RGB, or `UnreadableImage`.

====================================  ====================================================
RGB, grey, 1-bit, palette, CMYK,      exactly Pillow's ``convert("RGB")``, like the loaders of
YCbCr, HSV, LAB                       timm and torchvision
alpha, palette with transparency      laid over white: `convert` would show the arbitrary
                                      colours that lie below transparent pixels
16-bit grey, 32-bit integers          v / 257 (0 … 65535 → 0 … 255): `convert` would clip; of
                                      `bit_depth` b: 255 v / (2^b − 1)
floating point                        times 255 if all ≤ 1, as is if all ≤ 255, else v / 257
EXIF orientation                      applied
several frames                        the first
other numbers of bands, other         `sfda_tune.data.formats`
formats (DICOM, NIfTI, ``.npy``)
`bands`, other than one or three      no RGB: an array (h, w, bands), scaled by the same rules
====================================  ====================================================
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import os
import re
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sfda_tune.data.formats import (
    ALL,
    Reading,
    choose_bands,
    find_reader,
    parse_reading,
    to_uint8,
)
from sfda_tune.values.files import open_regular
from sfda_tune.values.text import one_line

__all__ = [
    "UNREADABLE", "Passing", "Picture", "UnreadableImage", "as_picture", "decode", "digest",
    "digest_pixels", "explain", "open_picture", "to_rgb",
]  # fmt: skip

UNREADABLE = "unreadable"
"""`ImageDataset.digest` of an image that cannot be read."""

# Neither Pillow's list of formats, nor a file that Pillow opened but did not decode yet, nor
# somebody's data set may be used by two threads at a time.
_LOCK = threading.RLock()
# What a second attempt may not meet again.
_AGAIN = {errno.EAGAIN, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE}
LOOK = 8  # images
_QUIET: Any = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # entry of `warnings.filters`


def renew_lock() -> None:
    """Forget who holds the lock: a thread that never ends, or one that a fork left behind."""
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=renew_lock)


Picture = Image.Image | np.ndarray
"""A decoded image: upright 8-bit RGB, or uint8 (h, w, bands) where the bands are no colours."""


class Passing(str):
    """A reason that is no verdict about the bytes of an image: it holds for this run only."""

    __slots__ = ()


class Verdict(Exception):  # noqa: N818 - not an error of ours
    """What the decoder says of the bytes of an image; its cause has the details."""


@dataclass(frozen=True)
class Member:
    """A file inside a tar, as an item: where its bytes lie."""

    path: str
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """Return the bytes; `ValueError` if the file ends before."""
        with open_regular(self.path, 1 << 60) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"{self.path!r} ends within {self.name!r}; fetch it again")
        return content

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


class UnreadableImage(Exception):  # noqa: N818 - a fact about one image, which a sweep survives
    """One image is missing, damaged, or no image: its `name`, and the `reason` on one line.

    The reason is a `Passing` unless the decoder found it in the bytes.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def to_rgb(image: Image.Image, reading: Reading | None = None) -> Image.Image:
    """Turn an image of any mode into upright 8-bit RGB; the rules stand at the top of the module.

    Of several frames, the current one counts (the first of a file just opened). `ValueError` if
    the range of deep pixels is unknown (negative, NaN, or above 65535).

    >>> deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    >>> np.asarray(to_rgb(deep))[0, :, 0]
    array([  0, 100, 255], dtype=uint8)
    """
    _prepare_pillow()
    image.load()
    with suppress(Exception):  # damaged EXIF data do not make the pixels unreadable
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # I, I;16, I;16B, …
        return Image.fromarray(to_uint8(np.asarray(image), reading)).convert("RGB")
    if reading is not None and reading.bands is not None:
        image = image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")
        return Image.fromarray(to_uint8(np.asarray(image), reading)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _chosen(image: Image.Image, reading: Reading | None) -> Picture:
    """Return what was chosen of an image that Pillow has opened."""
    if reading is None or not is_many(reading):
        return to_rgb(image, reading)
    _prepare_pillow()
    image.load()
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    deep = image.mode == "F" or image.mode.startswith("I")
    image = image if deep or image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")
    array = to_uint8(np.asarray(image), reading)
    return array[..., None] if array.ndim == 2 else array


def is_many(reading: Reading) -> bool:
    """Whether images are arrays of bands, or may be."""
    return reading.bands == ALL or reading.channels != 3


def as_picture(image: Picture) -> Image.Image:
    """Return what people are shown: of many bands the first three, of two the first.

    >>> as_picture(np.zeros((4, 6, 5), np.uint8)).size
    (6, 4)
    """
    if isinstance(image, Image.Image):
        return image
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., 0]
    return Image.fromarray(np.ascontiguousarray(shown)).convert("RGB")


def open_picture(path: str, bit_depth: Any = None, bands: Any = None) -> Image.Image:
    """Return what people are shown of a file."""
    return as_picture(decode(path, reading=parse_reading(bit_depth, bands)))


def decode(
    item: Any,
    least: int | None = None,
    reading: Reading | None = None,
    expected: str | None = None,
) -> Picture:
    """Item of an `ImageDataset` → RGB image, or its bands; `explain` says why, if it raises.

    Where `least` pixels on a side will do, a JPEG is decoded at a fraction of its size.

    A `Verdict` is about the bytes, which were read before; anything else may pass. So may what is
    not of the `expected` digest: that is asked of the very bytes that are decoded.
    """
    content = _read(item)
    if expected not in (None, UNREADABLE) and digest(content, reading) != expected:
        hint = " (is its transform random?)" if isinstance(content, Image.Image) else ""
        raise ValueError(f"has changed since it was first read{hint}")
    try:
        many = reading is not None and is_many(reading)
        if isinstance(content, np.ndarray):  # `as_item` has chosen its bands
            if reading is not None and (many or reading.of):
                content = choose_bands(content, replace(reading, bands=ALL))
            if many:
                return content
            content = Image.fromarray(content[..., 0] if content.shape[2:] == (1,) else content)
            return to_rgb(content)
        if isinstance(content, Image.Image):
            return _chosen(content, reading)
        if read := find_reader(content, reading):
            array = read(content, reading)
            if many:
                return array[..., None] if array.ndim == 2 else array
            return to_rgb(Image.fromarray(array))
        _prepare_pillow()
        with Image.open(io.BytesIO(content)) as image:
            if least is not None:
                image.draft(None, (least, least))  # pyright: ignore[reportArgumentType]
            return _chosen(image, reading)
    except Exception as error:
        if is_passing(error):
            raise
        raise Verdict from error


def warn_of_dark(items: Any) -> None:
    """Warn where deep images look as if they had fewer bits than 16; a few are looked at."""
    rows = range(0, len(items), max(1, len(items) // LOOK))[:LOOK]
    brightest = 0
    for item in (items[row] for row in rows):
        with suppress(Exception):  # such images are reported when they are loaded
            image = item if isinstance(item, Image.Image) else None
            if isinstance(item, (str, os.PathLike, bytes, Member)):
                _prepare_pillow()
                with open_stream(resolve(item)) as stream, Image.open(stream) as image:
                    if not image.mode.startswith("I"):
                        return
                    image.load()
            if image is None or not image.mode.startswith("I"):
                return
            brightest = max(brightest, int(np.asarray(image).max()))
    if 0 < brightest < 4096:
        bits = 10 if brightest < 1024 else 12
        warnings.warn(
            f"the images have 16 bits, but no pixel of {len(rows)} looked at is above "
            f"{brightest}: with white at 65535 they are nearly black; if they have {bits} bits, "
            f"pass bit_depth={bits} (--bit-depth {bits}), or 16 if they are meant to be dark",
            stacklevel=4,
        )


def find_bands(items: Any, reading: Reading) -> Reading:
    """Return the reading with the numbers of all bands, as the images have; a few are looked at.

    `ValueError` if they differ in them, or none can be read.
    """
    found: dict[int, int] = {}  # bands → row
    why = ""
    for row in range(0, len(items), max(1, len(items) // LOOK)):
        try:
            image: Any = decode(items[row], reading=reading)
            found.setdefault(image.shape[2], row)
        except Exception as error:  # of one image, which is reported when it is loaded
            cause = error.__cause__ if isinstance(error, Verdict) else error
            why = why or explain(cause, items[row])  # pyright: ignore[reportArgumentType]
    if len(found) != 1:
        told = " and ".join(f"{n} (row {row})" for n, row in found.items())
        raise ValueError(
            f"`bands` 'all' needs images with the same number of bands but they have {told}; name "
            "the bands (--bands 1,2,3)."
            if found
            else f"`bands` 'all' needs an image to count them in, but none can be read: one {why}."
        )
    (n,) = found
    return replace(reading, bands=tuple(range(1, n + 1)), of=n)


def is_passing(error: BaseException) -> bool:
    """Whether an error of the decoder, or of a transform, says more of the machine than of it.

    Such are those of the operating system (an `OSError` with a number; Pillow's own have none),
    of memory, and of libraries that are not there.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return True
    signs = ("out of memory", "allocate memory", "bad_alloc", "start new thread")
    missing = isinstance(error, (MemoryError, ImportError))
    return missing or any(sign in str(error).lower() for sign in signs)


def digest(item: Any, reading: Reading | None = None) -> str:
    """Blake2b, in hexadecimal, of the encoded bytes, or of the pixels, shape and dtype.

    With a `reading` that, too.
    """
    item = resolve(item)
    if isinstance(item, Image.Image):
        item = np.asarray(_chosen(item, reading))
    result = hashlib.blake2b(f"{reading} ".encode() if reading else b"", digest_size=20)
    if isinstance(item, np.ndarray):
        result.update(f"array {item.dtype.str} {item.shape}".encode())
        result.update(np.ascontiguousarray(item).data)
    else:
        with open_stream(item) as stream:
            while block := stream.read(1 << 20):
                result.update(block)
    return result.hexdigest()


def digest_pixels(image: Picture) -> str:
    """Blake2b, in hexadecimal, of what a decoded image shows, whatever file it came from."""
    is_array = isinstance(image, np.ndarray)
    about = f"bands {image.shape}" if is_array else f"{image.mode} {image.size}"
    result = hashlib.blake2b(about.encode(), digest_size=20)
    result.update(np.ascontiguousarray(image).data)
    return result.hexdigest()


def explain(error: Exception, item: Any) -> str:
    """Why an item cannot be decoded, on one line."""
    if isinstance(error, UnidentifiedImageError):  # its message holds a memory address
        head = b"?"
        with suppress(Exception), open_stream(resolve(item)) as stream:
            head = stream.read(64)
        if not head:
            return "is empty (0 bytes)"
        if head.startswith(b"version https://git-lfs"):
            return "is a Git LFS pointer, not the image; run `git lfs pull`"
        if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
            return "is HEIC, which Pillow cannot read; convert it to JPEG"
        if head[:4] in (b"II*\0", b"MM\0*"):
            return (
                "is a TIFF that Pillow cannot read; if it has many bands, choose one or three, "
                "counted from 1: bands='3,2,1' (--bands 3,2,1), or 'all'"
            )
        return "is not an image in a format that Pillow can read"
    text = getattr(error, "strerror", None) or str(error)
    if not text or not isinstance(error, OSError | ValueError):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return one_line(text)


def resolve(item: Any) -> Any:
    """Return the path, bytes, uint8 array or loaded image behind an item."""
    if isinstance(item, Member):
        return item.read()
    with _LOCK:
        if callable(item):
            item = item()
        if isinstance(item, Image.Image):
            _prepare_pillow()
            item = item.copy()  # decodes it, if nobody did so far
    if item is None:
        raise ValueError("there is no image in this row")
    return item


def _read(item: Any) -> Any:
    """Return the encoded bytes, array or loaded image behind an item."""
    item = resolve(item)
    if isinstance(item, (np.ndarray, Image.Image, bytes)):
        return item
    try:
        with open_stream(item) as stream:
            return stream.read()
    except OSError as error:
        if error.errno not in _AGAIN:
            raise
    time.sleep(0.05)
    with open_stream(item) as stream:
        return stream.read()


def open_stream(item: Any) -> IO[bytes]:
    return io.BytesIO(item) if isinstance(item, bytes) else open_regular(item)


# What of Pillow can be set, and changes which images are read, and to which pixels; its defaults.
SWITCHES: dict[str, Any] = {
    "Image.MAX_IMAGE_PIXELS": 89478485,
    "ImageFile.LOAD_TRUNCATED_IMAGES": False,
    "AvifImagePlugin.DECODE_CODEC_CHOICE": "auto",
    "BmpImagePlugin.USE_RAW_ALPHA": False,
    "GifImagePlugin.LOADING_STRATEGY": 0,
    "PngImagePlugin.MAX_TEXT_CHUNK": 1 << 20,
    "PngImagePlugin.MAX_TEXT_MEMORY": 64 << 20,
    "TiffImagePlugin.READ_LIBTIFF": False,
}


def get_switches() -> dict[str, Any]:
    """Return those of Pillow's switches that are not as they are by default."""
    found = {}
    for name, default in SWITCHES.items():
        module, attribute = name.split(".")
        value = getattr(importlib.import_module(f"PIL.{module}"), attribute, default)
        if value != default:
            found[name] = value
    return found


def set_switches(changed: Mapping[str, Any]) -> None:
    """Set Pillow's switches as `get_switches` found them in another process."""
    for name in {*get_switches(), *changed}:
        module, attribute = name.split(".")
        value = changed.get(name, SWITCHES[name])
        setattr(importlib.import_module(f"PIL.{module}"), attribute, value)


def _prepare_pillow() -> None:
    """Load all formats, and keep Pillow's warnings from being noise, or errors under ``-W error``.

    A filter that stays, because `warnings.catch_warnings` restores *all* filters on exit: threads
    that overlap would undo each other's work.
    """
    with _LOCK:
        Image.init()
        if not warnings.filters or warnings.filters[0] != _QUIET:
            warnings.filterwarnings("ignore", module=r"PIL\.")
