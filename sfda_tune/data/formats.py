"""Images that Pillow does not read, or has no mode for, as arrays; how their pixels are scaled.

==================  =======================================================================
DICOM               pydicom: the first frame; grey through the modality LUT and the first
                    window (without one, from its darkest pixel to its lightest, as viewers
                    do: of 16 stored bits few are used), light where MONOCHROME1 has dark;
                    colour as RGB
NIfTI               nibabel: of the first volume the middle slice of the third axis; from its
                    0.5th percentile (black) to its 99.5th (white), for magnetic resonance
                    has no units
``.npy``            ``(h, w)`` or ``(h, w, bands)``, never pickled
TIFF with `bands`   tifffile: bands are counted over all axes but height and width (samples,
                    channels, frames), in their order in the file
==================  =======================================================================
"""

from __future__ import annotations

import gzip
import importlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfda_tune.values.text import is_integer, one_line

__all__ = [
    "Reading", "choose_bands", "deep_to_uint8", "find_reader", "list_bands",
    "parse_reading", "to_uint8",
]  # fmt: skip

MEDICAL, BANDS = "medical", "bands"  # the extras
ALL = "all"  # of the bands
LARGEST = 1 << 30  # bytes of a volume


@dataclass(frozen=True)
class Reading:
    """How the pixels of a data set become RGB, where its files leave it open.

    Parameters
    ----------
    bit_depth : int in 9 … 16, optional
        Integer pixels of more than 8 bits are white at 2^bit_depth − 1; by default at 65535.
        DICOM files say it themselves.
    bands : tuple of int, optional
        Counted from 1. One is shown as grey, three as red, green and blue; networks are adapted to
        any other number. ``"all"`` until `open_dataset` has looked how many there are.
    of : int, optional
        So many bands each image has: what ``"all"`` was found to be.
    """

    bit_depth: int | None = None
    bands: tuple[int, ...] | str | None = None
    of: int | None = None

    @property
    def channels(self) -> int:
        """What networks are shown: 3, or as many as there are bands that are no colours."""
        n = len(self.bands) if isinstance(self.bands, tuple) else 3
        return 3 if n == 1 else n

    def to_dict(self) -> dict[str, Any]:
        """Return what a model's provenance says of it."""
        found: dict[str, Any] = {"bit_depth": self.bit_depth, "bands": self.bands}
        return found if self.of is None else found | {"of": self.of}

    def __str__(self) -> str:
        exactly = "" if self.of is None else f" of {self.of}"
        return f"{self.bit_depth} bits, bands {self.bands}{exactly}"


def parse_reading(bit_depth: Any = None, bands: Any = None) -> Reading | None:
    """Return how to read pixels, None where nothing is asked for.

    >>> parse_reading("12", "4,3,2"), parse_reading("auto")
    (Reading(bit_depth=12, bands=(4, 3, 2), of=None), None)
    """
    given = bit_depth, bands
    if isinstance(bit_depth, str):
        bit_depth = None if bit_depth == "auto" else _integer(bit_depth)
    if bit_depth is not None and not is_integer(bit_depth, 9, 16):
        raise ValueError(
            f"`bit_depth` must be 'auto' or an integer in 9 … 16 but is {given[0]!r}."
        )
    if isinstance(bands, str) and bands != ALL:
        bands = [_integer(band) for band in bands.split(",")]
    if bands is not None and not isinstance(bands, str):
        bands = tuple(bands) if isinstance(bands, Iterable) else (bands,)
        if not bands or not all(is_integer(band, 1) for band in bands):
            raise ValueError(
                "`bands` must be 'all', or bands counted from 1, as '4,3,2' (one: grey; three: "
                f"red, green, blue), but is {given[1]!r}."
            )
        bands = tuple(map(int, bands))
    return None if bit_depth is bands is None else Reading(bit_depth and int(bit_depth), bands)


def list_bands(bands: Any) -> Any:
    """Return bands as the command line has them, ``"4,3,2"``."""
    if bands is None or isinstance(bands, str):
        return bands
    return ",".join(map(str, bands if isinstance(bands, Iterable) else (bands,)))


def _integer(text: str) -> Any:
    return int(text) if text.strip().isdecimal() else text


def choose_bands(array: np.ndarray, reading: Reading) -> np.ndarray:
    """Return an array (h, w, n_chosen) of an array (h, w) or (h, w, n)."""
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.size == 0:
        raise ValueError(f"has the shape {array.shape}: not (h, w) or (h, w, bands)")
    n, bands = array.shape[2], reading.bands
    if reading.of not in (None, n):
        raise ValueError(
            f"has {n} band{'s' * (n > 1)}, other images {reading.of}; leave out what is of "
            "another kind, or name the bands (--bands 1,2,3)"
        )
    if bands == ALL:
        return array
    if bands is not None:
        assert isinstance(bands, tuple)
        if max(bands) > n:
            raise ValueError(
                f"has {n} band{'s' * (n > 1)}, so there is no band {max(bands)}; see `bands`"
            )
        return array[..., [band - 1 for band in bands]]
    if n not in (1, 3, 4):
        raise ValueError(
            f"has {n} bands; choose three of them to be red, green and blue, counted from 1: "
            "bands='3,2,1' (--bands 3,2,1), or adapt the networks to all: bands='all'"
        )
    return array


def to_uint8(array: np.ndarray, reading: Reading | None) -> np.ndarray:
    """Return (h, w) or (h, w, n_chosen) of uint8, of any array of pixels."""
    reading = reading or Reading()
    array = choose_bands(array, reading)
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        array = deep_to_uint8(array, reading.bit_depth)
    return array[..., 0] if array.shape[2] == 1 else array


def deep_to_uint8(pixels: np.ndarray, bit_depth: int | None = None) -> np.ndarray:
    """Scale 16-bit or floating-point pixels; the rules stand at the top of `data.decoding`."""
    low, high, white = pixels.min(), pixels.max(), 2 ** (bit_depth or 16) - 1
    is_float = pixels.dtype.kind == "f"
    if not 0 <= low <= high <= (65535 if is_float else white):  # also false for NaN
        known = f"integers 0 … {white}"
        if not bit_depth:
            known += " and floating point 0 … 1, 0 … 255 or 0 … 65535; convert the image to 8 bit"
        else:
            known += f", of {bit_depth} bits; see `bit_depth` (--bit-depth)"
        raise ValueError(f"pixels from {low} to {high}: known are {known}")
    full = 1 if is_float and high <= 1 else 255 if is_float and high <= 255 else white
    return np.rint(pixels * (255 / full)).astype(np.uint8)


def find_reader(
    content: bytes, reading: Reading | None
) -> Callable[[bytes, Reading | None], np.ndarray] | None:
    """Return what reads these bytes to uint8, by what they begin with; None: Pillow."""
    if content[128:132] == b"DICM":
        return _read_dicom
    if content[:6] == b"\x93NUMPY":
        return lambda content, reading: to_uint8(
            np.load(io.BytesIO(content), allow_pickle=False), reading
        )
    if content[344:348] in (b"n+1\0", b"ni1\0") or content[4:8] == b"n+2\0":
        return _read_nifti
    if content[:2] == b"\x1f\x8b":
        return _read_gzip
    tiff = content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    return _read_tiff if tiff and reading is not None and reading.bands else None


def _need(module: str, what: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs the package {module.partition('.')[0]!r}: pip install "
            f"'sfda-tune[{extra}]' ({one_line(error)})"
        ) from error


def _read_dicom(content: bytes, reading: Reading | None) -> np.ndarray:
    pydicom, pixels = (_need(m, "DICOM", MEDICAL) for m in ("pydicom", "pydicom.pixels"))
    data = pydicom.dcmread(io.BytesIO(content))
    try:
        array = pixels.pixel_array(data, index=0)  # colour as RGB
    except RuntimeError as error:  # what can be installed is no verdict about the file
        raise ImportError(
            f"its compression ({data.file_meta.TransferSyntaxUID.name}) cannot be decoded here: "
            "install another decoder (pip install 'pylibjpeg[all]'); else the file is damaged"
        ) from error
    bits = int(data.BitsStored)
    if array.ndim == 3:
        scaled = array / (2**bits - 1)
    else:
        shown = pixels.apply_modality_lut(array, data)
        if "VOILUTSequence" in data:
            table = data.VOILUTSequence[0].LUTDescriptor
            shown, ends = pixels.apply_voi(shown, data), (0, 2 ** int(table[2]) - 1)
        elif "WindowWidth" in data and "WindowCenter" in data:
            shown = pixels.apply_windowing(shown, data)
            ends = pixels.apply_windowing(np.array([-1e12, 1e12]), data)  # black and white
        else:
            ends = (0, 2**bits - 1) if bits <= 8 else (shown.min(), shown.max())
        low, high = min(ends), max(ends)
        scaled = (np.clip(shown, low, high) - low) / ((high - low) or 1)
        if data.PhotometricInterpretation == "MONOCHROME1":
            scaled = 1 - scaled
    return to_uint8(np.rint(255 * scaled).astype(np.uint8), reading)


def _read_nifti(content: bytes, reading: Reading | None) -> np.ndarray:
    nibabel = _need("nibabel", "NIfTI", MEDICAL)
    second = content[4:8] == b"n+2\0"
    of = nibabel.Nifti2Image if second else nibabel.Nifti1Image
    image = nibabel.as_closest_canonical(of.from_bytes(content))
    volume = image.dataobj
    if len(volume.shape) < 2:
        raise ValueError(f"has the shape {volume.shape}: no slice of an image")
    at = [slice(None)] * 2 + [n // 2 if k == 2 else 0 for k, n in enumerate(volume.shape) if k > 1]
    array = np.rot90(np.asarray(volume[tuple(at)], np.float64))  # upwards: anterior
    if not np.isfinite(array).all():
        raise ValueError("holds values that are not finite")
    low, high = np.percentile(array, [0.5, 99.5])
    scaled = np.clip((array - low) / ((high - low) or 1), 0, 1)
    return to_uint8(np.rint(255 * scaled).astype(np.uint8), reading)


def _read_gzip(content: bytes, reading: Reading | None) -> np.ndarray:
    with gzip.open(io.BytesIO(content)) as file:
        content = file.read(LARGEST + 1)  # few bytes may stand for many
    if len(content) > LARGEST:
        raise ValueError(f"holds more than {LARGEST >> 20} MB")
    if content[344:348] not in (b"n+1\0", b"ni1\0") and content[4:8] != b"n+2\0":
        raise ValueError("is compressed by gzip, and no NIfTI image within; unpack it")
    return _read_nifti(content, reading)


def _read_tiff(content: bytes, reading: Reading | None) -> np.ndarray:
    tifffile = _need("tifffile", "TIFF with `bands`", BANDS)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series[0]
        array, axes = series.asarray(), series.axes
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (0, 1))
    return to_uint8(array.reshape(*array.shape[:2], -1), reading)
