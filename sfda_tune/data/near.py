"""Near duplicates: pictures that show the same in another size, quality, light or file.

A score that leaves one of them out is given away by the other. They are compared as thumbnails of
32 × 32 pixels in colour, whose brightness and contrast are taken out; two whose correlation
exceeds .995 are one group, which is left out together and stays on one side of every split.

Measured on eight real data sets (6,700 photos, drawings and textures; the slow tests of
``tests/core/test_near.py``): no two different pictures reach .995 (the closest have .993). Of 80
copies in each, of half the size or as JPEG of quality 50, all are found, but 10 of the aerial
scenes. In a ninth, 94 of 436 pictures are found, and are what its source says: tiles seen under
several lights. Crops and mirror images are not found; pictures of less than 32 pixels, such as
``digits``, are not compared, for many of them are nearly the same by chance.
"""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import PIL

from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import UNREADABLE, get_switches
from sfda_tune.data.groups import merge_codes
from sfda_tune.data.loader import Loader, cut

__all__ = ["MOST", "Near", "describe_near", "find_near", "near_codes", "shared_near", "with_near"]

SIDE = 32  # pixels of a thumbnail
SAME = 0.995  # correlation
ROUGHLY = 0.975  # of 64 random projections: worth a look
FLAT = 2.0  # grey levels: what varies less shows nothing
MOST = 50_000  # images: the thumbnails of more would take more than a gigabyte
NOTED = 20_000  # thumbnails of a data set that are noted, 4 kB each
KIND = {"pairs": [[int]], "equal": [[int]]}
THUMBNAILS = {"images": str, "pixels": str}
Pairs = list[tuple[int, int]]


class Near(NamedTuple):
    """Pairs of rows that show nearly the same, and those that show the very same pixels."""

    pairs: Pairs
    equal: Pairs


class _Thumbnails:
    """The thumbnails of a data set, for `sfda_tune.data.loader`; zeros for what is none."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def name(self, row: int) -> str:
        return self.images.item_name(row)

    def __getitem__(self, row: int) -> np.ndarray | None:
        return self.images.thumbnail(row, SIDE)


def _read(images: ImageDataset, rows: Sequence[int], workers: int = 8) -> tuple[np.ndarray, bool]:
    """Return the thumbnails of some rows, (n, SIDE, SIDE, 3) of 8 bits; whether that will last.

    Else some could not be read for a reason that may pass, and are zeros.
    """
    batches = [[rows[i] for i in part] for part in cut(len(rows), 64)]
    loader = Loader(_Thumbnails(images), batches, list, threads=min(workers, len(batches)))
    out, lasts = np.zeros((len(rows), SIDE, SIDE, 3), np.uint8), True
    for n, one in enumerate(one for _, part in loader for one in part):
        if one is None:
            lasts = False
        else:
            out[n] = one
    return out, lasts


def _standardise(
    images: ImageDataset, store: Any = None, digests: Sequence[str] | None = None
) -> tuple[np.ndarray, bool]:
    """Return thumbnails as rows of length 1 and mean 0; zeros where there is nothing to see.

    And whether that will last.
    """
    if store is None:
        found, lasts = _read(images, range(len(images)))
    else:
        found, lasts = _recall(images, store, images.digests() if digests is None else digests)
    return _centre(found), lasts


def _centre(thumbnails: np.ndarray) -> np.ndarray:
    out = np.zeros((len(thumbnails), SIDE * SIDE * 3), dtype=np.float32)
    for start in range(0, len(out), 1024):
        z = thumbnails[start : start + 1024].astype(np.float32)
        z -= z.mean(axis=(1, 2), keepdims=True)  # of each channel: a cast is no likeness
        z = z.reshape(len(z), -1)
        norm = np.linalg.norm(z, axis=1, keepdims=True)
        seen = norm > FLAT * z.shape[1] ** 0.5
        np.divide(z, norm, out=out[start : start + 1024], where=seen)
    return out


def _recall(images: ImageDataset, store: Any, digests: Sequence[str]) -> tuple[np.ndarray, bool]:
    """Do as `_read` does; what images that somebody saw of the same data set show is noted."""
    about = [SIDE, PIL.__version__, get_switches(), images.name]
    key = hashlib.blake2b(repr(about).encode(), digest_size=20).hexdigest()
    noted, old = store.recall("thumbnails", key, THUMBNAILS), {}
    if noted is not None:
        pixels = np.frombuffer(b64decode(noted["pixels"]), np.uint8).reshape(-1, SIDE, SIDE, 3)
        old = dict(zip(noted["images"].split(), pixels, strict=True))
    new = [row for row, digest in enumerate(digests) if digest not in old]
    found = np.zeros((len(digests), SIDE, SIDE, 3), np.uint8)
    found[new], lasts = _read(replace(images, contents=digests), new)
    # what shows nothing now may be readable another time
    fresh = {digests[row]: found[row] for row in new if found[row].any()}
    fresh.pop(UNREADABLE, None)
    for row in np.setdiff1d(np.arange(len(digests)), new):
        found[row] = old[digests[row]]
    if fresh:
        kept = dict(list((fresh | old).items())[:NOTED])
        text = b64encode(np.stack(list(kept.values())).tobytes()).decode()
        store.note("thumbnails", key, {"images": " ".join(kept), "pixels": text})
    return found, lasts


def _pairs(a: np.ndarray, b: np.ndarray | None = None) -> Pairs:
    """Return the rows of `a` and of `b` (default: later ones of `a`) that show the same."""
    other = a if b is None else b
    axes = np.random.default_rng(0).normal(size=(a.shape[1], 64)).astype(np.float32)
    p, q = (_unit(z @ axes) for z in (a, other))
    found: Pairs = []
    for i in range(0, len(p), 1024):
        start = i if b is None else 0
        rows, columns = np.nonzero(p[i : i + 1024] @ q[start:].T > ROUGHLY)
        rows, columns = rows + i, columns + start
        later = columns > rows if b is None else np.ones(len(rows), bool)
        rows, columns = rows[later], columns[later]
        for k in range(0, len(rows), 4096):
            r, c = rows[k : k + 4096], columns[k : k + 4096]
            same = np.einsum("ij,ij->i", a[r], other[c]) > SAME
            found += zip(r[same].tolist(), c[same].tolist(), strict=True)
    return found


def _unit(z: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(z, axis=1, keepdims=True)
    return np.divide(z, norm, out=np.zeros_like(z), where=norm > 0)


def find_near(
    images: ImageDataset, store: Any = None, digests: Sequence[str] | None = None
) -> Near | None:
    """Return the pairs of rows that are near duplicates; None if there are too many images.

    Every image is decoded once (a JPEG at a fraction of its size), unless the `store` has a note
    of the same `digests` (default: those of the images), or of its thumbnail, from a ranking or a
    search of other images of the data set.
    """
    if len(images) > MOST:
        return None
    key = None
    if store is not None:
        digests = images.digests() if digests is None else digests
        images = replace(images, contents=digests)
        key = hashlib.blake2b("\n".join([f"{SIDE} {SAME}", *digests]).encode(), digest_size=20)
        noted = store.recall("near", key.hexdigest(), KIND)
        if noted is not None:
            return Near(*([(i, j) for i, j in noted[name]] for name in KIND))
    thumbnails, lasts = _standardise(images, store, digests)
    pairs = _pairs(thumbnails)
    rows = sorted({row for pair in pairs for row in pair})
    pixels = dict(zip(rows, images.digests(rows, pixels=True), strict=True))
    found = Near(pairs, [(i, j) for i, j in pairs if pixels[i] == pixels[j] != UNREADABLE])
    if store is not None and key is not None and lasts and UNREADABLE not in pixels.values():
        store.note(
            "near",
            key.hexdigest(),
            {name: list(map(list, v)) for name, v in found._asdict().items()},
        )
    return found


def near_codes(n: int, pairs: Pairs) -> np.ndarray:
    """Return a code for each row, equal for what is connected by pairs.

    >>> near_codes(5, [(0, 1), (1, 3)]).tolist()
    [0, 0, 1, 0, 2]
    """
    ends = np.array([*pairs, *((row, row) for row in range(n))]).reshape(-1, 2)
    edges = np.repeat(np.arange(len(ends)), 2)
    codes = merge_codes(ends.ravel(), edges)  # rows that share an edge
    out = np.empty(n, dtype=np.int64)
    out[ends.ravel()] = codes
    return np.unique(out, return_inverse=True)[1]


def with_near(images: ImageDataset, pairs: Pairs) -> ImageDataset:
    """Return the images with near duplicates, and the groups that they connect, as one group."""
    if not pairs:
        return images
    codes = near_codes(len(images), pairs)
    if images.groups is not None:
        codes = merge_codes(codes, np.unique(images.groups, return_inverse=True)[1])
    first = np.unique(codes, return_index=True)[1]
    names = np.empty(len(first), dtype=object)
    names[:] = [
        images.item_name(row) if images.groups is None else images.groups[row]
        for row in first.tolist()
    ]
    return replace(images, groups=names[codes])


def describe_near(images: ImageDataset, pairs: Pairs | None) -> dict[str, Any]:
    """Return the near duplicates by name, and how many there are: JSON values."""
    if pairs is None:
        return {"near_duplicates": None}
    if not pairs:
        return {}
    codes = near_codes(len(images), pairs)
    sizes = np.bincount(codes)
    several = sizes > 1
    classes = images.labels if images.classes else np.zeros(len(images))
    torn = [len(np.unique(classes[codes == c], axis=0)) > 1 for c in np.flatnonzero(several)]
    name = images.item_name
    return {
        "near_duplicates": {
            "n": int(sizes[several].sum()),
            "sets": int(several.sum()),
            "several_classes": int(sum(torn)),
            "pairs": [[name(i), name(j)] for i, j in pairs[:20]],
        }
    }


def shared_near(parts: Sequence[ImageDataset], store: Any = None) -> list[list[set[int]]]:
    """Return of each data set the rows that are near duplicates of an image of each one before.

    Images are decoded as `find_near` does.
    """
    z = [_standardise(images, store)[0] for images in parts]
    return [[{row for _, row in _pairs(a, b)} for a in z[:k]] for k, b in enumerate(z)]
