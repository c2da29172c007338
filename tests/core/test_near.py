"""Near duplicates: found among photos, not among pictures that are merely similar."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

import sfda_tune
from sfda_tune.data import near
from sfda_tune.data.copies import CopiesWarning
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.near import find_near, near_codes, with_near
from sfda_tune.data.opening import open_dataset
from sfda_tune.data.splits import split_images, tell_shared
from sfda_tune.extraction.store import FeatureStore
from sfda_tune.selection.diagnostics import diagnose

ZOO = Path(__file__).parents[3] / "shared" / "zoo" / "datasets"
CPU: dict[str, Any] = {"device": "cpu", "workers": 0, "cache": False}


def scene(seed: int) -> Image.Image:
    """A smooth picture of 96 × 80 pixels, as photos are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 96, 3), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(5)), float)
    return Image.fromarray(((blurred - blurred.min()) / np.ptp(blurred) * 255).astype(np.uint8))


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    image.save(stream := io.BytesIO(), "JPEG", quality=quality)
    return stream.getvalue()


def altered(image: Image.Image) -> list[Any]:
    return [
        as_jpeg(image, 85),
        image.resize((48, 40), Image.Resampling.LANCZOS),
        image.point([round(0.8 * v + 10) for v in range(256)] * 3),
    ]


def dataset(n: int = 20, labels: Any = None) -> ImageDataset:
    """Scenes of which the first three stand there in three other forms, too."""
    scenes = [scene(k) for k in range(n)]
    items: list[Any] = scenes + [other for image in scenes[:3] for other in altered(image)]
    codes = np.arange(len(items)) % 2 if labels is None else np.asarray(labels)
    codes[n:] = np.repeat(codes[:3], 3)
    return ImageDataset("scenes", items, codes, ("a", "b"))


def pairs_of(images: ImageDataset) -> list[tuple[int, int]]:
    found = find_near(images)
    assert found is not None
    return found.pairs


def test_altered_pictures_are_found_and_nothing_else():
    images = dataset()
    pairs = pairs_of(images)
    codes = near_codes(len(images), pairs)
    sets = [np.flatnonzero(codes == c).tolist() for c in range(codes.max() + 1)]
    found = [rows for rows in sets if len(rows) > 1]
    assert found == [[0, 20, 21, 22], [1, 23, 24, 25], [2, 26, 27, 28]]
    assert len(np.unique(codes)) == 20


def test_small_flat_and_broken_pictures_are_like_nothing():
    flat = [Image.new("RGB", (64, 64), c) for c in ("red", "red", "white")]
    items = [*flat, b"broken", b"broken", np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)]
    images = ImageDataset("x", items, np.zeros(7, int), ("a",))
    assert pairs_of(images) == []
    assert pairs_of(open_dataset("digits", samples=300)) == []


def test_groups_that_share_a_picture_become_one():
    images = dataset()
    groups = np.array([f"g{row // 2}" for row in range(len(images))], dtype=object)
    images = ImageDataset("x", images.items, images.labels, images.classes, groups=groups)
    found = with_near(images, pairs_of(images))
    assert found.groups is not None
    together = {row: {*np.flatnonzero(found.groups == found.groups[row])} for row in (0, 2, 6)}
    assert {0, 1, 20, 21, 22, 23, 24, 25} <= together[0]  # g0 holds the scenes 0 and 1
    assert {2, 3, 26, 27, 28} <= together[2]
    assert together[6] == {6, 7}


def test_rank_leaves_them_out_together_and_says_so(tmp_path):
    images = dataset()
    options = {**CPU, "cache": tmp_path}
    with pytest.warns(CopiesWarning, match="12 images nearly equal others"):
        ranking = sfda_tune.rank(images, "demo:resnet_glyphs", **options)
    assert ranking.info["groups"]["n"] == 20
    assert ranking.info["near_duplicates"]["sets"] == 3
    assert ranking.info["near_duplicates"]["several_classes"] == 0
    kinds = {d.kind: d.severity for d in diagnose(sfda_tune.Ranking.from_json(ranking.to_json()))}
    assert kinds["near"] == "note"
    score = ranking.score("demo:resnet_glyphs").details
    assert score["value_without_groups"] > score["evidence"]
    labels = np.arange(29) % 2
    torn = ImageDataset("x", images.items, labels, ("a", "b"))
    with pytest.warns(CopiesWarning, match="3 of these stand in more than one class"):
        sfda_tune.rank(torn, "demo:resnet_glyphs", **options)


def test_what_was_compared_is_noted(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path)
    images = dataset(8)
    digests = images.digests()
    shown: list[int] = []
    read = near._Thumbnails.__getitem__
    monkeypatch.setattr(
        near._Thumbnails, "__getitem__", lambda self, row: shown.append(row) or read(self, row)
    )
    some = images.subset(range(5))
    assert find_near(some, store, digests[:5]) == find_near(some)
    shown.clear()
    first = find_near(images, store, digests)
    assert sorted(shown) == [*range(5, len(images))]  # of the others it is known what they show
    assert first == find_near(images)
    shown.clear()
    assert find_near(images, store, digests) == first
    assert find_near(images.subset([6, 1]), store, [digests[6], digests[1]]) is not None
    assert not shown
    unclear = ["unreadable"] * len(images)  # these are not all alike
    assert find_near(images, store, unclear) == first
    monkeypatch.setattr(near, "MOST", 5)
    assert find_near(images, store, digests) is None


def test_nothing_is_noted_of_a_picture_that_has_changed(tmp_path):
    files = [tmp_path / f"{k}.png" for k in range(4)]
    for k, file in enumerate(files):
        scene(k % 3).resize((48 + k, 40)).save(file)  # the last one is nearly the first
    images = ImageDataset("x", list(map(str, files)), np.zeros(4, int), ("a",))
    store, digests, whole = FeatureStore(tmp_path / "cache"), images.digests(), find_near(images)
    kept = files[3].read_bytes()
    files[3].write_bytes(files[1].read_bytes())
    assert find_near(images, store, digests) == ([], [])
    files[3].write_bytes(kept)
    assert find_near(images, store, digests) == whole == ([(0, 3)], [])


@pytest.mark.filterwarnings("ignore::sfda_tune.data.copies.CopiesWarning")
def test_a_search_and_a_ranking_decode_each_image_once(tmp_path, monkeypatch):
    images = dataset(40)
    shown: list[str] = []
    read = ImageDataset.thumbnail

    def note(self: ImageDataset, row: int, side: int) -> np.ndarray | None:
        shown.append(self.digest(row))
        return read(self, row, side)

    monkeypatch.setattr(ImageDataset, "thumbnail", note)
    how: dict[str, Any] = {"device": "cpu", "cache": tmp_path / "cache"}
    sfda_tune.search(images, "demo:resnet_glyphs", trials=1, epochs=1, out=tmp_path / "run", **how)
    assert sorted(shown) == sorted(images.digests())
    sfda_tune.rank(images, "demo:resnet_glyphs", **how)
    assert len(shown) == len(images)


def test_a_search_keeps_them_on_one_side_and_names_those_in_given_parts():
    images = dataset(40)
    pairs = pairs_of(images)
    codes = near_codes(len(images), pairs)
    g = dict.fromkeys(("split", "samples", "test", "image_column", "label_column"))
    for seed in range(3):
        used = {"train": np.arange(len(images))}
        _, rows, _ = split_images(
            {**g, "dataset": images, "seed": seed}, lambda opened, used=used: (used, codes)
        )
        for part in rows.values():
            assert set(np.flatnonzero(np.isin(codes, codes[part]))) == set(part)
    parts = {"train": images.subset(range(40)), "val": images.subset(range(40, 43))}
    said = tell_shared(parts | {"test": images.subset(range(30, 32))})
    assert any("3 of 3 validation images nearly equal training images" in text for text in said)
    parts = {"train": images.subset(range(3, 20)), "val": images.subset(range(3))}
    said = tell_shared(parts | {"test": images.subset(range(len(images) - 9, len(images)))})
    assert any("9 of 9 test images nearly equal validation images" in text for text in said)


@pytest.mark.slow
@pytest.mark.skipif(not ZOO.is_dir(), reason="needs shared/zoo")
@pytest.mark.parametrize(
    "name",
    ["neusteel", "omniglot8", "signdigits", "trashnet"],  # those most alike, and photos
)
def test_no_two_photos_of_a_real_data_set_are_merged(name):
    assert pairs_of(open_dataset(ZOO / name)) == []


@pytest.mark.slow
@pytest.mark.skipif(not ZOO.is_dir(), reason="needs shared/zoo")
def test_one_tile_under_several_lights_is_found():
    images = open_dataset(ZOO / "magtile")
    pairs = pairs_of(images)
    assert len({row for pair in pairs for row in pair}) > 80
    same = [images.labels[i] == images.labels[j] for i, j in pairs]
    assert np.mean(same) > 0.95
