"""Small pictures of the images that a page is about, as text; the page loads nothing."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from PIL import Image

from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import decode
from sfda_tune.data.opening import open_dataset

__all__ = ["draw_hard_images", "make_thumbnail"]

SIZE = 160  # pixels


def make_thumbnail(image: Image.Image) -> str:
    """Return a small JPEG as base64."""
    picture = image.convert("RGB")
    picture.thumbnail((SIZE, SIZE))
    picture.save(buffer := io.BytesIO(), "JPEG", quality=85, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def draw_hard_images(info: Mapping[str, Any], images: Any, n: int) -> dict[int, str]:
    """Return thumbnails of the first hard images of a ranking, by their place in its list.

    `images`: True looks for the files that the ranking names (and the digits, which scikit-learn
    has); what `open_dataset` takes is looked into; False for none. What cannot be read is left
    out.
    """
    entries = list(info.get("hard_images") or ())[:n]
    if images is False or not entries:
        return {}
    known = None
    if images is not True:
        known = images if isinstance(images, ImageDataset) else open_dataset(images)
    elif (info.get("arguments") or {}).get("dataset") == "digits":
        known = open_dataset("digits")
    where = {} if known is None else {int(row): i for i, row in enumerate(known.origin)}
    found = {}
    for k, entry in enumerate(entries):
        with suppress(Exception):  # of whatever decoder: a picture less
            if known is not None:
                found[k] = make_thumbnail(known.load(where[entry["row"]]))
            elif os.path.isfile(entry["image"]):
                found[k] = make_thumbnail(decode(entry["image"]))
    return found
