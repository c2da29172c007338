"""Small pictures of the images that a page is about, as text; the page loads nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image, ImageOps

from sfda_tune.values.files import open_regular

__all__ = ["draw_hard_images", "make_thumbnail"]

SIZE = 160  # pixels


def make_thumbnail(image: Image.Image) -> str:
    """Return a small JPEG as base64."""
    picture = ImageOps.exif_transpose(image).convert("RGB")
    picture.thumbnail((SIZE, SIZE))
    picture.save(buffer := io.BytesIO(), "JPEG", quality=85, subsampling=0)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def draw_hard_images(info: Mapping[str, Any], images: Any, n: int) -> dict[int, str]:
    """Return thumbnails of the first hard images of a ranking, by their place in its list.

    `images`: True looks for the files that the ranking names (and the digits, which scikit-learn
    has); a function opens them, given path, bit depth and bands; an `ImageDataset` is looked into;
    False for none. What cannot be read is left out.
    """
    entries = list(info.get("hard_images") or ())[:n]
    if images is False or not entries:
        return {}
    look = _finder(info, images)
    found = {}
    for k, entry in enumerate(entries):
        try:
            found[k] = look(entry)
        except Exception:  # of whatever decoder or data set: a picture less, which the page says
            continue
    return found


def _finder(info: Mapping[str, Any], images: Any) -> Callable[[Mapping[str, Any]], str]:
    """Return what makes a thumbnail of an entry of the list, or raises."""
    given = info.get("arguments") or {}
    if not (images is True or callable(images)):
        where = {int(row): i for i, row in enumerate(images.origin)}
        return lambda entry: make_thumbnail(images.picture(where[entry["row"]]))
    if given.get("dataset") == "digits":
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        grey = (digits.images * (255 / 16)).round().astype("uint8")
        return lambda entry: make_thumbnail(Image.fromarray(grey[entry["row"]]))
    if callable(images):
        how = given.get("bit_depth"), given.get("bands")
        open_picture: Any = images
        return lambda entry: make_thumbnail(open_picture(entry["image"], *how))
    return _draw_file


def _draw_file(entry: Mapping[str, Any]) -> str:
    with open_regular(entry["image"]) as file, Image.open(file) as image:
        return make_thumbnail(image)
