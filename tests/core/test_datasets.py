"""Every documented form of images and every message, on real files made by Pillow."""

from __future__ import annotations

import csv
import io
import logging
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tracemalloc
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from sfda_tune.data.checks import DatasetError
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import UNREADABLE, UnreadableImage, to_rgb
from sfda_tune.data.opening import open_dataset
from sfda_tune.pipelines.search import search

ZOO = Path(__file__).parents[2] / ".." / "shared" / "zoo"
RNG = np.random.default_rng(0)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, image: Any = None, **options: Any) -> Path:
    """Save an image (default: noise, 6 wide and 4 high) in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = noise(4, 6, 3) if image is None else image
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def folder(root: Path, classes: str = "cat dog", n: int = 3) -> Path:
    for name in classes.split():
        for i in range(n):
            write(root / name / f"{i}.png")
    return root


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def one(item: Any) -> ImageDataset:
    """A data set of one item, whatever it is."""
    return ImageDataset("one", [item], np.zeros(1, int), ("only",))


def pixels(item: Any) -> np.ndarray:
    image = one(item).load(0)
    assert image.mode == "RGB"
    return np.asarray(image)


def names(data: ImageDataset) -> list[str]:
    return [os.path.basename(str(item)) for item in data.items]


def message(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(*args, **kwargs)
    return str(caught.value)


# ---- importing


def test_import_needs_numpy_and_pillow_only():
    code = (
        "import sys, sfda_tune.data.opening, sfda_tune.data.decoding\n"
        "heavy = {'torch', 'timm', 'pandas', 'datasets', 'sklearn', 'pyarrow', 'torchvision'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# ---- decoding


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_ordinary_modes_are_exactly_what_timm_loads(mode):
    image = Image.fromarray(noise(9, 7, 3)).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


FILES = {
    "RGB": (
        "jpg",
        "jpeg",
        "png",
        "webp",
        "bmp",
        "gif",
        "tif",
        "tiff",
        "ppm",
        "avif",
        "jp2",
        "tga",
    ),
    "L": ("jpg", "png", "bmp", "gif", "tif", "pgm"),
    "1": ("png", "bmp", "tif", "pbm"),
    "P": ("png", "gif"),
    "CMYK": ("jpg", "tif"),
    "LAB": ("tif",),
}


@pytest.mark.parametrize(("suffix", "mode"), [(s, mode) for mode in FILES for s in FILES[mode]])
def test_files_load_as_with_timm(tmp_path, suffix, mode):
    image = Image.fromarray(noise(9, 7, 3))
    image = Image.new("LAB", (7, 9), (150, 120, 90)) if mode == "LAB" else image.convert(mode)
    path = write(tmp_path / f"x.{suffix}", image)
    with Image.open(path) as plain:
        assert plain.mode == mode or suffix == "gif"
        expected = np.asarray(plain.convert("RGB"))
    assert np.array_equal(pixels(path), expected)
    assert np.array_equal(pixels(path.read_bytes()), expected)


def test_alpha_lies_over_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [255, 0, 0, 128]]], np.uint8)
    assert pixels(write(tmp_path / "x.png", rgba)).tolist() == [
        [[255, 0, 0], [255] * 3, [255, 127, 127]]
    ]
    la = Image.new("LA", (1, 1), (10, 0))
    assert pixels(write(tmp_path / "la.png", la)).tolist() == [[[255] * 3]]
    opaque = noise(5, 5, 4)
    opaque[..., 3] = 255
    assert np.array_equal(pixels(write(tmp_path / "o.png", opaque)), opaque[..., :3])


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_transparent_palette_entries_are_white(tmp_path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    path = write(tmp_path / "x.png", image, transparency=transparency)
    assert pixels(path).tolist() == [[[*RED], [*WHITE]]]


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 1000, 51400, 65535]], np.uint16)
    path = write(tmp_path / f"x.{suffix}", values)
    assert pixels(path)[0, :, 0].tolist() == [0, 1, 4, 200, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 100, 255], [0, 100, 255]),
        ([0, 25700, 65535], [0, 100, 255]),
    ],
)
def test_floating_point_tiff(tmp_path, values, expected):
    path = write(tmp_path / "x.tif", np.array([values], np.float32))
    assert pixels(path)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("values", [[-1, 1], [0, float("nan")], [0, 1e6]])
def test_pixels_of_unknown_range_are_unreadable(tmp_path, values):
    path = write(tmp_path / "x.tif", np.array([values], np.float32))
    with pytest.raises(
        UnreadableImage, match=r"x\.tif: pixels from .* convert the image to 8 bit"
    ):
        one(path).load(0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied_once(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(suffix, {})
    path = write(
        tmp_path / f"x.{suffix}",
        np.kron(noise(2, 3, 3), np.ones((8, 8, 1), np.uint8)),
        exif=exif,
        **options,
    )
    with Image.open(path) as plain:
        expected = np.asarray(ImageOps.exif_transpose(plain))
    assert expected.shape == ((16, 24, 3) if orientation < 5 else (24, 16, 3))
    assert np.array_equal(pixels(path), expected)


def test_damaged_exif_leaves_the_pixels_readable(tmp_path):
    path = write(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage")
    assert pixels(path).shape == (4, 6, 3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_the_first_frame_counts(tmp_path, suffix):
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    options = {"lossless": True} if suffix == "webp" else {}
    path = write(tmp_path / f"x.{suffix}", first, save_all=True, append_images=[second], **options)
    assert pixels(path)[0, 0].tolist() == [*RED]


def test_to_rgb_leaves_its_argument_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(Image.new("RGBA", (2, 3)), "PNG", exif=exif)))
    assert to_rgb(image).size == (3, 2)
    assert image.size == (2, 3)
    assert image.mode == "RGBA"
    assert image.getexif()[0x0112] == 6


# ---- what cannot be read


def test_large_images_are_neither_noise_nor_a_crash(tmp_path, monkeypatch):
    path = write(tmp_path / "x.png", noise(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # 900 pixels: Pillow warns
    assert pixels(path).shape == (30, 30, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow refuses
    with pytest.raises(UnreadableImage, match="DecompressionBombError"):
        one(path).load(0)


# ---- digests


def test_digest_is_of_the_content_alone(tmp_path):
    image = noise(4, 6, 3)
    a = write(tmp_path / "a" / "x.png", image)
    b = tmp_path / "b" / "other.JPG"
    b.parent.mkdir()
    b.write_bytes(a.read_bytes())
    write(tmp_path / "b" / "z.png", image ^ np.uint8(1))
    data = open_dataset(tmp_path)
    assert names(data) == ["x.png", "other.JPG", "z.png"]
    x, other, z = data.digests()
    assert x == other != z
    assert re.fullmatch("[0-9a-f]{40}", x)
    assert data.subset([2, 0]).digests(workers=1) == [z, x] == data.digests([2, 0])
    assert one(a.read_bytes()).digest(0) == x  # encoded bytes like the file


def test_digest_of_arrays_sees_pixels_and_shape():
    zeros = np.zeros((2, 6), np.uint8)
    changed = zeros.copy()
    changed[1, 5] = 1
    digests = [one(a).digest(0) for a in (zeros, changed, zeros.reshape(3, 4))]
    assert len(set(digests)) == 3
    assert one(zeros.copy(order="F")).digest(0) == digests[0]
    assert one(Image.fromarray(zeros)).digest(0) != one(Image.fromarray(changed)).digest(0)


# ---- the value


def test_value_is_frozen_and_its_labels_read_only():
    labels = np.array([0, 1])
    data = ImageDataset("x", ["a", "b"], labels, ("no", "yes"))
    with pytest.raises(AttributeError):
        data.name = "y"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        data.labels[0] = 1
    labels[0] = 1  # the caller's own array is still the caller's
    assert repr(data) == "ImageDataset('x', 2 images, 2 classes)"


def test_pickle_by_spawn(tmp_path):
    import datasets

    hf = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(noise(3, 4, 3)) for _ in range(4)], "label": list("abab")},
        features=datasets.Features(image=datasets.Image(), label=datasets.Value("string")),
    )
    forms = [
        open_dataset(folder(tmp_path / "f")),
        open_dataset((noise(4, 3, 3), [0, 1, 0, 1])),
        open_dataset(([Image.fromarray(noise(3, 4, 3)) for _ in range(2)], [0, 1])),
        open_dataset("digits", samples=20),
        open_dataset(hf),
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        digests = [pool.submit(data.digests) for data in forms]
        images = [pool.submit(data.load, 1) for data in forms]
        for data, digest, image in zip(forms, digests, images, strict=True):
            assert digest.result() == data.digests()
            assert image.result().tobytes() == data.load(1).tobytes()


# ---- sampling

SIZES = [1, 2, 3, 50, 144, 300]


def _sized() -> ImageDataset:
    labels = RNG.permutation(np.repeat(np.arange(len(SIZES)), SIZES))
    return ImageDataset("x", [str(n) for n in range(500)], labels, tuple("abcdef"))


def test_sample_is_stratified_deterministic_and_in_order():
    data = _sized()
    part = data.sample(100)
    counts = np.bincount(part.labels)
    # two of each class first (one of the class that has one), then in proportion
    assert counts.sum() == 100
    assert counts[:3].tolist() == [1, 2, 2]
    assert np.abs(counts[3:] - 95 * np.array(SIZES[3:]) / sum(SIZES[3:])).max() <= 1
    assert np.all(np.diff(part.origin) > 0)
    assert part.items == data.sample(100).items
    assert part.items != data.sample(100, seed=1).items


def test_smaller_samples_are_part_of_larger_ones():
    data = _sized()
    last: set[Any] = set()
    for n in range(len(SIZES), 500):
        part = data.sample(n, seed=3)
        rows = set(part.items)
        counts = np.bincount(part.labels, minlength=len(SIZES))
        assert len(rows) == n
        assert last < rows
        assert counts.min() >= 1
        if n >= 2 * len(SIZES):
            assert all(counts >= np.minimum(2, SIZES))
        last = rows
    assert data.sample(500) is data
    assert data.sample(10**9) is data


# ---- digits and ImageDataset


def test_digits():
    from sklearn.datasets import load_digits

    data = open_dataset("digits")
    original: Any = load_digits()
    assert (data.name, len(data), data.classes) == ("digits", 1797, tuple("0123456789"))
    assert np.array_equal(data.labels, original.target)
    assert np.array_equal(np.asarray(data.load(3))[..., 1], np.rint(original.images[3] * 255 / 16))
    assert np.asarray(data.load(0)).max() <= 255
    assert {len(open_dataset("digits", samples=n)) for n in (10, 300)} == {10, 300}


def test_image_dataset_is_returned_as_it_is():
    data = open_dataset("digits")
    assert open_dataset(data) is data
    assert open_dataset(data, samples=100).items[3].tolist() == data.sample(100).items[3].tolist()
    assert "`split` and `labels` cannot be used with an ImageDataset" in message(
        data, split="val", labels=[1]
    )


# ---- folders


def test_folder_of_classes(tmp_path):
    root = tmp_path / "pets"
    write(root / "dog" / "10.JPG")
    write(root / "dog" / "2.jpeg")
    write(root / "dog" / "deep" / "down" / "1.Png")
    write(root / "cat" / "b.webp")
    write(root / "cat" / "a.bmp")
    write(root / "cat" / ".hidden.png")
    write(root / "cat" / ".thumbs" / "1.png")
    write(root / ".git" / "1.png")
    write(root / "__MACOSX" / "1.png")
    (root / "cat" / "notes.txt").write_text("no image")
    data = open_dataset(str(root))
    assert (data.name, data.classes) == ("pets", ("cat", "dog"))
    assert names(data) == ["a.bmp", "b.webp", "2.jpeg", "10.JPG", "1.Png"]
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.item_name(0) == str(root / "cat" / "a.bmp")
    assert [data.load(n).size for n in range(5)] == [(6, 4)] * 5


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    folder(root / "train", n=3)
    folder(root / "valid", n=2)
    folder(root / "test", "cat dog eel", n=1)
    return root


@pytest.mark.parametrize(
    ("split", "n", "name"),
    [
        (None, 6, "pets"),
        ("train", 6, "pets"),
        ("val", 4, "pets/val"),
        ("validation", 4, "pets/validation"),
        ("test", 3, "pets/test"),
        ("all", 13, "pets/all"),
    ],
)
def test_folder_with_splits(splits, split, n, name):
    data = open_dataset(splits, split=split)
    assert (len(data), data.name) == (n, name)
    assert data.classes == (("cat", "dog", "eel") if split in ("test", "all") else ("cat", "dog"))


HOSTILE = [
    "a b.png",
    "ü ñ 图.png",
    "quo'te\".png",
    "new\nline.png",
    "-rf.png",
    "%s {0}.png",
    "a,b;c.png",
    " lead.png",
]


def test_hostile_names(tmp_path):
    root = tmp_path / "hos tile\n'ü"
    for name in HOSTILE:
        write(root / "cat" / name)
        write(root / "dog\n2" / name)
    raw = os.fsencode(root / "cat") + b"/\xff.png"
    Path(os.fsdecode(raw)).write_bytes((root / "cat" / HOSTILE[0]).read_bytes())
    data = open_dataset(root)
    assert len(data) == 2 * len(HOSTILE) + 1
    assert data.classes == ("cat", "dog\\n2")
    assert data.name == "hos tile\\n'ü"
    for n in range(len(data)):
        assert data.load(n).size == (6, 4)
        assert data.item_name(n).isprintable()
        data.item_name(n).encode()
    assert len(set(data.digests())) == 2 * len(HOSTILE)
    assert pickle.loads(pickle.dumps(data)).digests() == data.digests()


def test_links_are_followed_but_never_in_circles(tmp_path):
    root = folder(tmp_path / "pets")
    outside = folder(tmp_path / "elsewhere", "more", n=2)
    (root / "cat" / "more").symlink_to(outside / "more")
    (root / "cat" / "again").symlink_to(outside / "more")  # same folder: its images count once
    (root / "cat" / "up").symlink_to(root)  # would make dogs cats
    (root / "cat" / "self").symlink_to(root / "cat" / "self")
    (root / "dog" / "loop").symlink_to(root / "dog")
    (root / "dog" / "9.png").symlink_to(outside / "more" / "0.png")
    (root / "eel").symlink_to(outside / "more")
    data = open_dataset(root)
    assert np.bincount(data.labels).tolist() == [5, 4, 2]
    assert UNREADABLE not in data.digests()


# ---- paths in general


# ---- tables


def table(path: Path, rows: list[Any], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "CSV"])
def test_csv(tmp_path, delimiter, encoding, suffix):
    folder(tmp_path / "i")
    rows = [
        ["path", "label"],
        ["i/cat/0.png", "Katze"],
        [str(tmp_path / "i/dog/0.png"), "Hünd"],
        [],
    ]
    path = table(tmp_path / f"pets.{suffix}", rows, delimiter, encoding)
    data = open_dataset(path)
    assert (data.name, data.classes, data.labels.tolist()) == ("pets", ("Hünd", "Katze"), [1, 0])
    assert data.item_name(0) == str(tmp_path / "i/cat/0.png")
    assert data.load(1).size == (6, 4)


def test_csv_with_blanks_after_the_commas(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "b, c.png")
    (tmp_path / "t.csv").write_text('label, path\ncat, a.png\ndog, "b, c.png"\n')
    data = open_dataset(tmp_path / "t.csv")
    assert (data.classes, UNREADABLE in data.digests()) == (("cat", "dog"), False)


def _parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_of_paths(tmp_path):
    folder(tmp_path / "i")
    paths = ["i/cat/0.png", str(tmp_path / "i/dog/1.png"), "i/dog/2.png"]
    data = open_dataset(_parquet(tmp_path / "t.parquet", {"file": paths, "target": [10, 9, 10]}))
    assert (data.name, data.classes, data.labels.tolist()) == ("t", ("9", "10"), [1, 0, 1])
    assert UNREADABLE not in data.digests()
    assert "has only 'file', 'target'; leave `split` out" in message(
        tmp_path / "t.parquet", split="val"
    )


def test_parquet_of_encoded_images(tmp_path):
    write(tmp_path / "x.png", np.full((1, 1, 3), 7, np.uint8))
    png = [encoded(Image.new("RGB", (1, 1), (n, 0, 0)), "PNG") for n in range(40)]
    images = [{"bytes": b, "path": f"{n}.png"} for n, b in enumerate(png)]
    images[5] = {"bytes": None, "path": "x.png"}
    images[6] = {"bytes": None, "path": None}
    labels = list("abcd") * 10
    path = _parquet(tmp_path / "t.pq", {"image": images, "label": labels}, row_group_size=7)
    data = open_dataset(path)
    assert len(data) == 40
    assert [np.asarray(data.load(n))[0, 0, 0] for n in (0, 5, 39)] == [0, 7, 39]
    with pytest.raises(UnreadableImage, match="row 6: there is no image in this row"):
        data.load(6)
    part = open_dataset(path, samples=12, seed=4)
    same = data.sample(12, seed=4)
    assert part.origin.tolist() == same.origin.tolist()
    assert part.digests() == same.digests()
    assert part.item_name(0) == f"row {part.origin[0]}"
    flat = _parquet(tmp_path / "b.parquet", {"image": png, "label": labels})
    assert open_dataset(flat).digest(3) == data.digest(3)


def test_a_small_parquet_of_very_many_rows(tmp_path):
    """A few kilobytes hold millions of rows; none becomes an object before it is asked for."""
    import pyarrow as pa

    n = 300_000
    Image.new("L", (8, 8)).save(tmp_path / "0.png")
    codes = pa.array(np.arange(n, dtype=np.int32) % 2)
    columns = {
        "path": pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), ["0.png"]),
        "label": pa.DictionaryArray.from_arrays(codes, ["b", "a"]),
    }
    path = _parquet(tmp_path / "t.parquet", columns)
    assert path.stat().st_size < 1e5
    tracemalloc.start()
    data = open_dataset(path, samples=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert data.classes == ("a", "b")
    assert np.bincount(data.labels).tolist() == [25, 25]
    assert data.items == [str(tmp_path / "0.png")] * 50
    assert (data.labels == (data.origin + 1) % 2).all()
    assert peak < 100 * n  # bytes; as objects they took 300 each


def test_a_parquet_column_too_large_for_memory_is_read_by_row_groups(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [write(tmp_path / f"{k}.png").read_bytes() for k in range(12)]
    for name, cells in (("bytes", images), ("hf", [{"bytes": b, "path": None} for b in images])):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": cells, "label": list("ab") * 6}), path, row_group_size=5)
        whole = open_dataset(path)
        monkeypatch.setattr("sfda_tune.data.tables.LARGE", 100)
        by_groups = open_dataset(path)
        monkeypatch.undo()
        assert (
            by_groups.digests()
            == whole.digests()
            == pickle.loads(pickle.dumps(by_groups)).digests()
        )
        rows = [11, 0, 6, 4, 5]
        assert by_groups.subset(rows).digests() == [whole.digest(row) for row in rows]


def test_parquet_with_class_names_of_hugging_face(tmp_path):
    import datasets

    png = [encoded(Image.new("L", (1, 1), n), "PNG") for n in range(4)]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["z", "a"])
    )
    rows = datasets.Dataset.from_dict({"image": png, "label": [0, 1, 1, 0]}, features=features)
    rows.to_parquet(str(tmp_path / "t.parquet"))
    data = open_dataset(tmp_path / "t.parquet")
    assert (data.classes, data.labels.tolist()) == (("z", "a"), [0, 1, 1, 0])
    assert np.asarray(data.load(2))[0, 0, 0] == 2


# ---- arrays and lists


@pytest.mark.parametrize(
    "shape", [(4, 5, 6), (4, 5, 6, 1), (4, 5, 6, 3), (4, 5, 6, 4), (4, 3, 3, 3)]
)
@pytest.mark.parametrize("form", ["tuple", "dict", "labels", "list"])
def test_arrays(shape, form):
    images = noise(*shape)
    if shape[-1] == 4:
        images[..., 3] = 255
    before, labels = images.copy(), np.array(["b", "a", "b", "a"])
    data = {
        "tuple": lambda: open_dataset((images, labels)),
        "dict": lambda: open_dataset({"images": images, "labels": labels}),
        "labels": lambda: open_dataset(images, labels=labels),
        "list": lambda: open_dataset((list(images), list(labels))),
    }[form]()
    assert (data.classes, data.labels.tolist()) == (("a", "b"), [1, 0, 1, 0])
    expected = images if len(shape) == 3 else images[..., 0] if shape[-1] == 1 else images[..., :3]
    if expected.ndim == 3:
        expected = np.repeat(expected[..., None], 3, axis=3)
    assert np.array_equal([np.asarray(data.load(n)) for n in range(4)], expected)
    assert np.array_equal(images, before)
    assert images.flags.writeable
    assert (data.name, data.item_name(3)) == ("arrays", "row 3")


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.uint16, [0, 257, 51400, 65535], [0, 1, 200, 255]),
        (bool, [0, 1, 1, 0], [0, 255, 255, 0]),
        (np.float32, [0, 0.5, 100 / 255, 1], [0, 128, 100, 255]),
        (np.float64, [0, 1 + 1e-7, 3 / 255, 1], [0, 255, 3, 255]),
        (np.float16, [0, 1, 0, 1], [0, 255, 0, 255]),
    ],
)
def test_array_dtypes(dtype, values, expected, as_list):
    images = np.array(values, dtype).reshape(2, 1, 2)
    before = images.copy()
    data = open_dataset((list(images) if as_list else images, [0, 1]))
    assert [np.asarray(data.load(n))[0, :, 0].tolist() for n in (0, 1)] == [
        expected[:2],
        expected[2:],
    ]
    assert np.array_equal(images, before)


def test_list_of_anything(tmp_path):
    path = write(tmp_path / "x.png", np.full((2, 2, 3), 9, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(io.BytesIO(encoded(Image.new("L", (2, 5)), "PNG", exif=exif)))
    images = [path, str(path), path.read_bytes(), noise(3, 7), noise(8, 2, 3), upright]
    data = open_dataset(images, labels=[0, 1] * 3)
    assert [data.load(n).size for n in range(6)] == [(2, 2)] * 3 + [(7, 3), (2, 8), (5, 2)]
    assert data.item_name(0) == str(path)
    assert data.item_name(2) == "row 2"
    assert len({*data.digests()[:3]}) == 1
    arrays = np.empty(2, object)
    arrays[:] = [noise(2, 3), noise(4, 5)]
    assert open_dataset((arrays, [0, 1])).load(1).size == (5, 4)
    assert open_dataset((np.array([str(path)] * 2), [0, 1])).load(1).size == (2, 2)


def test_lazily_opened_images_may_be_used_by_many_threads(tmp_path):
    paths = [write(tmp_path / f"{n}.png", noise(64, 64, 3)) for n in range(8)]
    images = [Image.open(path) for path in paths]
    data = open_dataset((images, [0, 1] * 4))
    expected = [Image.open(io.BytesIO(path.read_bytes())).tobytes() for path in paths]
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda n: data.load(n % 8).tobytes(), range(80)))
    assert loaded == expected * 10
    for image in images:
        image.close()


def test_tensors():
    import torch

    chw = torch.from_numpy(noise(4, 3, 5, 6))
    data = open_dataset((chw, torch.tensor([1, 0, 1, 0])))
    assert data.classes == ("0", "1")
    assert np.array_equal(np.asarray(data.load(2)), chw[2].permute(1, 2, 0).numpy())
    scaled = open_dataset((list(chw / 255), [1, 0, 1, 0]))
    assert np.array_equal(np.asarray(scaled.load(2)), np.asarray(data.load(2)))
    half = open_dataset(((chw / 255).bfloat16(), [1, 0, 1, 0]))
    assert half.load(0).size == (6, 5)
    grey = open_dataset((torch.rand(4, 9, 3, requires_grad=True), [1, 0, 1, 0]))
    assert grey.load(0).size == (3, 9)
    hwc = open_dataset((torch.from_numpy(noise(4, 5, 6, 3)), [1, 0, 1, 0]))
    assert hwc.load(0).size == (6, 5)


# ---- labels


def test_pandas_labels():
    import pandas as pd

    series = pd.Series(["b", "a", "b"], index=[7, 7, 1])
    assert open_dataset((noise(3, 2, 2), series)).labels.tolist() == [1, 0, 1]
    assert open_dataset((noise(3, 2, 2), pd.Categorical(["b", "a", "b"]))).classes == ("a", "b")
    for missing in (pd.NA, pd.NaT):
        assert "1 of 3 are missing (row 1)" in message(noise(3, 2, 2), labels=["a", missing, "b"])


# ---- torchvision


class Cifar:
    """Like torchvision's: arrays inside, PIL images outside, labels in `targets`."""

    classes = ["ship", "frog", "unused"]  # noqa: RUF012

    def __init__(self, transform=None, target_transform=None):
        self.data = np.random.default_rng(1).integers(0, 256, (6, 4, 4, 3), np.uint8)
        self.targets = [1, 0, 1, 0, 1, 0]
        self.transform, self.target_transform = transform, target_transform
        self.decoded = 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        if row >= len(self):
            raise IndexError(row)
        self.decoded += 1
        image: Any = Image.fromarray(self.data[row])
        return self.transform(image) if self.transform else image, self.targets[row]


def test_cifar_like():
    source = Cifar()
    data = open_dataset(source)
    assert source.decoded <= 3  # labels do not cost a decoding
    assert (data.name, data.classes) == ("Cifar", ("ship", "frog"))
    assert data.labels.tolist() == source.targets
    assert np.array_equal(np.asarray(data.load(4)), source.data[4])
    assert data.item_name(4) == "row 4"
    assert len(set(data.digests())) == 6
    assert data.subset([4, 1]).digests() == data.digests([4, 1])


def test_transform_to_tensors_is_not_applied(caplog):
    from torchvision import transforms

    normalise = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.1] * 3)]
    )
    source = Cifar(transform=normalise)
    with caplog.at_level(logging.INFO, "sfda_tune.data"):
        data = open_dataset(source)
    assert "its transform is not applied" in caplog.text
    assert source.transform is normalise  # the user's object is as before
    assert np.array_equal(np.asarray(data.load(4)), source.data[4])
    kept = open_dataset(Cifar(transform=transforms.CenterCrop(2)))
    assert np.array_equal(np.asarray(kept.load(4)), source.data[4, 1:3, 1:3])


def test_target_transform_is_applied():
    data = open_dataset(
        Cifar(target_transform=lambda target: "even" if target % 2 == 0 else "odd")
    )
    assert (data.classes, data.labels.tolist()) == (("even", "odd"), [1, 0, 1, 0, 1, 0])


class Pairs:
    """The least that a map data set can be."""

    def __init__(self, pairs, **attributes):
        self.pairs = pairs
        vars(self).update(attributes)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, row):
        if isinstance(self.pairs[row], Exception):
            raise self.pairs[row]
        return self.pairs[row]


def test_images_that_a_map_data_set_may_return():
    import torch

    array = noise(5, 6, 3)
    chw = torch.from_numpy(array).permute(2, 0, 1)
    forms = [Image.fromarray(array), array, chw, torch.from_numpy(array), chw / 255, array / 255]
    data = open_dataset(Pairs([(image, n % 2) for n, image in enumerate(forms)]))
    assert all(np.array_equal(np.asarray(data.load(n)), array) for n in range(len(forms)))
    assert data.classes == ("0", "1")


@pytest.mark.parametrize("attribute", ["targets", "labels", "_labels"])
@pytest.mark.parametrize("form", [list, tuple, np.array])
def test_labels_without_decoding(attribute, form):
    pairs: list[Any] = [(noise(2, 2), "unused")] * 50
    pairs[7] = OSError("damaged")
    data = open_dataset(Pairs(pairs, **{attribute: form([0, 1] * 25)}))
    assert len(data) == 50
    with pytest.raises(UnreadableImage, match="row 7: damaged"):
        data.load(7)
    assert data.digest(7) == UNREADABLE


def test_class_names_that_repeat():
    # ImageNet has two classes called crane; torchvision keeps tuples of names
    source = Cifar()
    source.classes = [("crane",), ("crane",), ("frog", "toad")]  # type: ignore[assignment]
    source.targets = [0, 1, 2] * 2
    assert open_dataset(source).classes == ("crane (0)", "crane (1)", "frog, toad")


def test_torchvision_classes(tmp_path):
    from torchvision import datasets, transforms

    folder(tmp_path / "pets")
    source = datasets.ImageFolder(str(tmp_path / "pets"), transform=transforms.ToTensor())
    data = open_dataset(source)
    assert (data.name, data.classes) == ("ImageFolder", ("cat", "dog"))
    assert data.items == open_dataset(tmp_path / "pets").items
    fake = datasets.FakeData(
        size=12, image_size=(3, 8, 9), num_classes=3, transform=transforms.ToTensor()
    )
    data = open_dataset(fake)
    assert (len(data), data.load(0).size) == (12, (9, 8))
    assert data.digest(0) == data.digest(0)


def test_torch_subsets(tmp_path):
    import torch
    from torch.utils.data import Subset, TensorDataset

    part = Subset(Subset(Cifar(), [5, 4, 3, 2]), [0, 3])  # type: ignore[arg-type]
    data = open_dataset(part)
    assert (data.name, data.classes, data.labels.tolist()) == ("Cifar", ("ship", "frog"), [0, 1])
    assert [data.item_name(n) for n in (0, 1)] == ["row 5", "row 2"]
    assert np.array_equal(np.asarray(data.load(1)), Cifar().data[2])
    tensors = TensorDataset(torch.rand(6, 3, 4, 4), torch.arange(6) % 3)
    data = open_dataset(Subset(tensors, [1, 2, 4]))
    assert (data.classes, data.labels.tolist()) == (("1", "2"), [0, 1, 0])
    folder(tmp_path)
    from torchvision.datasets import ImageFolder

    data = open_dataset(Subset(ImageFolder(str(tmp_path)), [5, 0]))
    assert names(data) == ["2.png", "0.png"]
    assert data.classes == ("cat", "dog")


# ---- Hugging Face


@pytest.fixture
def hf(tmp_path, monkeypatch):
    """The library `datasets`, off the network, with its cache in tmp_path."""
    import datasets
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return datasets


def _hf_dataset(hf: Any, n: int = 6, **columns: Any) -> Any:
    features = hf.Features(
        photo=hf.Image(),
        kind=hf.ClassLabel(names=["z", "a", "unused"]),
        **{name: hf.Value("string") for name in columns},
    )
    photos = [Image.new("RGB", (3, 2), (i, 0, 0)) for i in range(n)]
    kinds = [i % 2 for i in range(n)]
    return hf.Dataset.from_dict({"photo": photos, "kind": kinds, **columns}, features=features)


def test_hugging_face_dataset(hf):
    rows = _hf_dataset(hf)
    data = open_dataset(rows)
    assert (data.name, data.classes, data.labels.tolist()) == ("dataset", ("z", "a"), [0, 1] * 3)
    assert [np.asarray(data.load(n))[0, 0, 0] for n in range(6)] == list(range(6))
    assert len(set(data.digests())) == 6
    assert data.digests(list(range(6)) * 99) == data.digests() * 99  # by 8 threads
    assert rows.features["photo"].decode  # the user's object is as before
    shuffled = open_dataset(rows.shuffle(seed=1).select(range(4)))
    assert sorted(set(data.digests()) - set(shuffled.digests()))[2:] == []
    formatted = open_dataset(rows.with_transform(lambda batch: 1 / 0))
    assert formatted.digests() == data.digests()


def test_hugging_face_columns(hf):
    rows = _hf_dataset(hf, label=list("xyxyxy"))
    assert open_dataset(rows).classes == ("z", "a")  # the only ClassLabel column
    assert open_dataset(rows, label_column="label").classes == ("x", "y")
    assert (
        "`image_column` must be a column of Data set 'dataset', one of 'photo', 'kind', 'label', "
        "but is 'x'" in message(rows, image_column="x")
    )
    assert "`image_column` must hold images, paths or bytes, but 'kind'" in message(
        rows, image_column="kind"
    )
    plain = rows.remove_columns(["kind", "label"])
    assert "`label_column` must be a column of Data set 'dataset', one of 'photo'" in message(
        plain
    )


def test_hugging_face_paths_bytes_and_gaps(hf, tmp_path):
    path = str(write(tmp_path / "x.png"))
    data = Path(path).read_bytes()
    labels = ["a", "b"]
    for cells in ([path, path], [data, data]):
        opened = open_dataset(hf.Dataset.from_dict({"image": cells, "label": labels}))
        assert opened.load(1).size == (6, 4)
    features = hf.Features(image=hf.Image(), label=hf.Value("string"))
    rows = hf.Dataset.from_dict({"image": [path, None], "label": labels}, features=features)
    opened = open_dataset(rows)
    assert opened.digest(0) == one(data).digest(0)  # the file as it is, not re-encoded
    with pytest.raises(UnreadableImage, match="row 1: there is no image in this row"):
        opened.load(1)


def test_hugging_face_missing_labels(hf):
    rows = _hf_dataset(hf).add_column("label", ["a", None, "b"] * 2)
    assert (
        "Data set 'dataset', column 'label', must hold a label for every image, but 2 of 6"
        in message(rows, label_column="label")
    )
    features = rows.features
    unlabelled = hf.Dataset.from_dict(
        {"photo": [Image.new("L", (1, 1))] * 2, "kind": [-1, 0], "label": ["", ""]},
        features=features,
    )
    assert "1 of 2 are missing (row 0)" in message(unlabelled)


def test_hugging_face_splits(hf):
    both = hf.DatasetDict(train=_hf_dataset(hf, 6), validation=_hf_dataset(hf, 4))
    assert len(open_dataset(both)) == 6
    assert len(open_dataset(both, split="val")) == 4
    assert len(open_dataset(both, split="all")) == 10
    assert open_dataset(both, split="val").name == "dataset/val"
    assert (
        "`split` must be one of 'train', 'validation' or 'all' for Data set 'dataset' but is "
        "'test'" in message(both, split="test")
    )
    assert len(open_dataset(hf.DatasetDict(extra=_hf_dataset(hf, 4)))) == 4  # the only one
    assert "which is a single split" in message(both["train"], split="train[:5]")
    assert "`labels` cannot be used with a Hugging Face" in message(both, labels=[1])


def test_hugging_face_streams(hf, tmp_path):
    both = hf.DatasetDict(train=_hf_dataset(hf, 6), validation=_hf_dataset(hf, 4))
    streams = {name: part.to_iterable_dataset() for name, part in both.items()}
    assert "is a stream, of which as many images" in message(streams["train"])
    found = open_dataset(streams["train"], samples=4, seed=1)
    assert len(set(found.digests()) & set(open_dataset(both).digests())) == 4
    assert found.classes == ("z", "a")
    assert found.digests() == open_dataset(streams["train"], samples=4, seed=1).digests()
    orders = {tuple(open_dataset(streams["train"], samples=6, seed=k).digests()) for k in range(4)}
    assert len(orders) > 1
    parts = hf.IterableDatasetDict(streams)
    assert len(open_dataset(parts, split="val", samples=3)) == 3
    with pytest.raises(DatasetError, match="must not be a stream for a search"):
        search(streams["train"], "demo:resnet_noise", samples=4, out=tmp_path / "run")
    for k in range(8):
        write(tmp_path / "photos" / "ab"[k % 2] / f"{k}.png")
    drawn = open_dataset(f"hf-stream:{tmp_path / 'photos'}", samples=5)
    assert (len(drawn), drawn.classes) == (5, ("a", "b"))
    assert "'hf-stream:NAME'" in message("hf-stream:")


def test_hugging_face_local_folder(hf, tmp_path, monkeypatch):
    folder(tmp_path / "pets" / "train", n=3)
    folder(tmp_path / "pets" / "test", n=2)
    data = open_dataset(f"hf:{tmp_path / 'pets'}")
    assert (data.name, data.classes, len(data)) == ("pets", ("cat", "dog"), 6)
    assert sorted(data.digests()) == sorted(open_dataset(tmp_path / "pets").digests())
    assert len(open_dataset(f"hf:{tmp_path / 'pets'}", split="test")) == 4
    sliced = open_dataset(f"hf:{tmp_path / 'pets'}", split="train[1:5]", samples=3)
    assert (len(sliced), sliced.name) == (3, "pets/train[1:5]")
    _hf_dataset(hf).save_to_disk(tmp_path / "saved")
    assert len(open_dataset(f"hf:{tmp_path / 'saved'}")) == 6
    hf.DatasetDict(train=_hf_dataset(hf)).save_to_disk(tmp_path / "saved:2")
    assert len(open_dataset(f"hf:{tmp_path / 'saved:2'}")) == 6
    for name in ("saved", "saved:2"):  # a slice that cannot be had is not dropped
        assert "`split`" in message(f"hf:{tmp_path / name}", split="train[:2]")


def test_hugging_face_errors_are_one_line(hf, tmp_path, monkeypatch):
    text = message("hf:owner/no-such-data-set")
    assert "\n" not in text
    assert text.startswith("`spec` 'hf:owner/no-such-data-set' cannot be loaded: ")
    assert "but is 'hf:'" in message("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "'hf:' needs the package 'datasets': pip install 'sfda-tune[data]'" in message("hf:x")


# ---- what cannot be read

JPEG = encoded(Image.fromarray(noise(99, 99, 3)), "JPEG")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("folder", "Is a directory"),
        (b"", r"is empty \(0 bytes\)"),
        (b"hello", "is not an image in a format that Pillow can read"),
        (LFS, "Git LFS pointer.*git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC.*convert it to JPEG"),
        (JPEG[:999], "truncated"),
        (encoded(Image.fromarray(noise(99, 99, 3)), "PNG")[:999], "truncated"),
    ],
)
def test_unreadable_files(tmp_path, content, reason):
    path = tmp_path / "x.jpg"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    data = one(str(path))
    with pytest.raises(UnreadableImage, match=reason) as caught:
        data.load(0)
    assert caught.value.name == str(path)
    assert "\n" not in caught.value.reason
    assert "0x" not in caught.value.reason
    assert (data.digest(0) != UNREADABLE) == isinstance(content, bytes)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.name, again.reason, str(again)) == (*caught.value.args, str(caught.value))


def test_warnings_of_pillow_never_escape(tmp_path):
    damaged = one(write(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage"))
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        assert {image.size for image in pool.map(damaged.load, [0] * 200)} == {(6, 4)}
    assert not caught


def test_subset_keeps_classes_and_row_names():
    data = open_dataset((noise(6, 2, 2), list("abcabc")))
    part = data.subset([5, 0]).subset(np.array([True, False]))
    assert (part.labels.tolist(), part.classes) == ([2], ("a", "b", "c"))
    assert part.item_name(0) == "row 5"
    assert part.digest(0) == data.digest(5)
    assert len(data.subset([])) == 0
    for rows in ([6], [0.5], [True]):
        with pytest.raises(IndexError):
            data.subset(rows)


@pytest.mark.parametrize("labels", [[0], [0.0, 1.0], [[0, 1]], [0, 2], [-1, 0]])
def test_value_checks_its_labels(labels):
    with pytest.raises(DatasetError, match="`labels` must"):
        ImageDataset("x", ["a", "b"], np.array(labels), ("no", "yes"))


def test_order_is_natural(tmp_path):
    for name in ("b2", "b10", "a", "10", "9", "1.5", "-1", "Z"):
        for i in (1, 2, 10, "x", "01"):
            write(tmp_path / name / f"i{i}.png", noise(1, 1))
    data = open_dataset(tmp_path)
    assert data.classes == ("-1", "1.5", "9", "10", "Z", "a", "b2", "b10")
    assert names(data)[:5] == ["i01.png", "i1.png", "i2.png", "i10.png", "ix.png"]


def test_relative_folder_stays_valid_elsewhere(tmp_path, monkeypatch):
    folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path / "pets")
    data = open_dataset(".")
    monkeypatch.chdir("/")
    assert (data.name, data.load(0).size) == ("pets", (6, 4))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_dataset("~/pets")) == 6


def test_split_rule(tmp_path):
    # a class that is called like a split does not make a split layout …
    assert len(open_dataset(folder(tmp_path / "a", "train bus tram"), split="all")) == 9
    # … nor do splits without train
    assert open_dataset(folder(tmp_path / "b", "val test")).classes == ("test", "val")
    assert "'bus', 'train', 'tram'; leave `split` out" in message(tmp_path / "a", split="val")
    folder(tmp_path / "c" / "Train")
    assert len(open_dataset(tmp_path / "c")) == 6
    text = "`split` must be one of 'Train' or 'all' for Folder"
    assert text in message(tmp_path / "c", split="val")


def test_folder_messages(tmp_path):
    write(tmp_path / "flat" / "1.jpg")
    text = message(tmp_path / "flat")
    assert "must have one sub-folder per class" in text
    assert "cat/1.jpg" in text
    assert "has 1 images and no sub-folders" in text
    assert ".csv table" in text
    for name in ("a", "b"):
        (tmp_path / "none" / name).mkdir(parents=True)
    assert "its sub-folders ('a', 'b') have none; known are" in message(tmp_path / "none")
    text = message(folder(tmp_path / "outer" / "pets").parent)
    assert "at least 2 classes to rank backbones, but all 6 images are of class 'pets'" in text
    assert f"try {str(tmp_path / 'outer' / 'pets')!r}" in text
    assert "a sub-folder of their own" in message(folder(tmp_path / "single", "cat"))


def test_what_a_folder_leaves_out_is_a_warning(tmp_path, monkeypatch):
    write(folder(tmp_path) / "cover.png")
    with pytest.warns(UserWarning, match="1 images directly in"):
        open_dataset(tmp_path)
    (tmp_path / "cover.png").unlink()
    (tmp_path / "eel").mkdir()
    with pytest.warns(UserWarning, match=r"1 class folders without images are left out \('eel'\)"):
        assert open_dataset(tmp_path).classes == ("cat", "dog")
    (tmp_path / "eel").rmdir()
    (tmp_path / "cat" / "secret").mkdir()
    scan = os.scandir

    def denied(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.warns(UserWarning, match="secret' is left out: Permission denied"):
        assert len(open_dataset(tmp_path)) == 6


def test_path_that_does_not_exist(tmp_path):
    folder(tmp_path / "flowers")
    text = message(tmp_path / "flowres")
    assert "flowres' does not exist; perhaps" in text
    assert str(tmp_path / "flowers") in text
    assert "'digits'; a folder with one sub-folder per class" in text
    assert str(tmp_path / "flowers") in message(tmp_path / "flower" / "train" / "cat")
    for spec in ("", "nul\0", "https://example.org/x.csv"):
        assert f"{spec!r} does not exist" in message(spec)
    os.mkfifo(tmp_path / "table.csv")
    assert "table.csv' is neither a file nor a folder" in message(tmp_path / "table.csv")
    (tmp_path / "x.zip").touch()
    assert "x.zip'; unpack it first" in message(tmp_path / "x.zip")


@pytest.mark.parametrize("spec", [None, 3, b"x", object(), iter([]), {1, 2}, len])
def test_other_things_are_told_the_forms(spec):
    text = message(spec)
    assert "A data set is one of: 'digits'; a folder" in text
    assert type(spec).__name__ in text


def test_hints_for_pandas_and_data_loaders():
    import pandas as pd
    import torch

    assert "DataFrame; pass (table['path'].tolist(), table['label'])" in message(pd.DataFrame())
    loader = torch.utils.data.DataLoader([(1, 2)])  # type: ignore[arg-type]
    assert "DataLoader; pass its `.dataset`" in message(loader)


@pytest.mark.parametrize(
    ("spec", "options", "text"),
    [
        ("digits", {"split": "val"}, "`split` cannot be used with 'digits'"),
        (
            "digits",
            {"image_column": "x", "label_column": "y"},
            "`image_column` and `label_column`",
        ),
        ("digits", {"labels": [1]}, "`labels` cannot be used with 'digits'"),
        ("digits", {"samples": 0}, "`samples` must be a positive int but is 0"),
        ("digits", {"samples": 2.5}, "`samples` must be a positive int but is 2.5"),
        ("digits", {"samples": 9}, "at least the number of classes, 10, but is 9"),
        ({"images": 1, "labels": 2}, {"split": "val"}, "`split` cannot be used with arrays"),
        ({"x": 1, "y": 2}, {}, "must have the keys 'images' and 'labels' but has 'x', 'y'"),
        (noise(4, 2, 2), {}, "`labels` must be given with images in a list or array"),
        ([noise(2, 2)], {}, "open_dataset((images, labels))"),
    ],
)
def test_option_messages(spec, options, text):
    assert text in message(spec, **options)


def test_csv_columns(tmp_path):
    folder(tmp_path)
    head = ["id", " Class ", "Filename", "kind"]
    rows = [head, ["1", " a ", "cat/0.png", "x"], ["2", "b", "dog/0.png", "y"]]
    path = table(tmp_path / "t.csv", rows)
    assert open_dataset(path).classes == ("a", "b")
    assert open_dataset(path, label_column="kind").classes == ("x", "y")
    assert open_dataset(path, image_column="Filename").load(0).size == (6, 4)
    for empty in ("", "\n"):
        (tmp_path / "e.csv").write_text(empty)
        for options in ({}, {"label_columns": "a"}):
            text = message(tmp_path / "e.csv", **options)
            assert "e.csv' (its first line must name the columns) is empty." in text
    text = message(path, label_column="color")
    assert "`label_column` must be a column of Table" in text
    assert "one of 'id', 'Class', 'Filename', 'kind', but is 'color'" in text
    text = message(table(tmp_path / "u.csv", [["id", "klass"], ["1", "2"]]))
    assert "`image_column` must be a column of Table" in text
    assert "(its first line must name the columns), one of 'id', 'klass', but is None" in text
    assert "by default it is the first one called path, image, file" in text


@pytest.mark.parametrize("missing", ["", " ", "nan", "NaN", "<NA>"])
def test_csv_labels_that_are_missing(tmp_path, missing):
    rows = [["path", "label"], ["a.png", "x"], [], ["a.png", missing], ["a.png"], ["a", "None"]]
    text = message(table(tmp_path / "t.csv", rows))
    assert "column 'label', must hold a label for every image" in text
    assert "2 of 4 are missing (line 4, line 5)" in text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a.png,x\nb,c.png,y\nd.png,x,\n", "2 fields per line, as its header has, but line 3"),
        (b'"a.png,x\nb.png,y\n', "must be a CSV file in UTF-8: unexpected end of data"),
        ("grün.png,x\n".encode("latin-1"), "must be a CSV file in UTF-8: 'utf-8' codec"),
        (b"", "must hold at least one image"),
        (b"a.png,x\nb.png,y\n", "none of the 2 exists, for instance"),
    ],
)
def test_csv_messages(tmp_path, content, text):
    (tmp_path / "t.csv").write_bytes(b"path,label\n" + content)
    assert text in message(tmp_path / "t.csv")


def test_rows_without_a_path_are_unreadable(tmp_path):
    write(tmp_path / "a.png")  # one that exists is enough
    rows = [["path", "label"], ["a.png", "x"], ["", "y"], ["b.png", "y"]]
    data = open_dataset(table(tmp_path / "t.csv", rows))
    with pytest.raises(UnreadableImage, match="row 1: there is no image in this row"):
        data.load(1)
    assert data.digest(1) == data.digest(2) == UNREADABLE


def test_parquet_messages(tmp_path, monkeypatch):
    columns = {"path": ["a"] * 3, "label": ["x", None, "y"], "n": [1, 2, 3], "f": [1, 2, np.nan]}
    path = _parquet(tmp_path / "t.parquet", columns)
    text = "must hold a label for every image, but 1 of 3 are missing (row 1)"
    assert f"column 'label', {text}" in message(path)
    assert "missing (row 2)" in message(path, label_column="f")
    text = "column 'n', must hold encoded images or names of files, but none of the 3 exists"
    assert text in message(path, image_column="n", label_column="n")
    (tmp_path / "bad.parquet").write_text("no")
    assert "must be a Parquet file" in message(tmp_path / "bad.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "needs the package 'pyarrow': pip install 'sfda-tune[data]'" in message(path)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (np.zeros((4, 9)), "must have shape (h, w) or (h, w, c) with c = 1, 3 or 4 but has (9,)"),
        (np.zeros((4, 5, 5, 2)), "`images[0]` must have shape (h, w) or (h, w, c) with c = 1, 3"),
        (noise(4, 3, 5, 5), "has (3, 5, 5); channels come last: np.moveaxis(image, 0, -1)"),
        (noise(4, 0, 5), "`images[0]` must have shape (h, w) or (h, w, c)"),
        (np.full((4, 2, 2), 255), "int64 from 255 to 255; if they are 0 … 255, use .astype(np."),
        (np.full((4, 2, 2), 200.0), "but is float64 from 200.0 to 200.0; if they are 0 … 255"),
        (np.full((4, 2, 2), -2.0), "from -2.0 to -2.0; remove the normalisation"),
        ([noise(2, 2), 3, 4, 5], "`images[1]` must be an array, a tensor, a PIL image, a path"),
        ([noise(2, 2), np.zeros((2, 2), int), 0, 0], "`images[1]` must be uint8"),
        (["a.png"] * 4, "`images` must hold encoded images or names of files, but none of the 4"),
        ("photos", "`images` must be a sequence with one element per image but is str"),
        (4, "`images` must be a sequence with one element per image but is int"),
        (noise(3, 2, 2), "there are 3 images and 4 labels"),
    ],
)
def test_array_messages(images, text):
    assert text in message((images, [0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 10], ("9", "10")),
        ([1.5, -2.0, 1.5], ("-2", "1.5")),
        ([True, False, True], ("False", "True")),
        ([np.int64(3), 2, 3.0], ("2", "3")),
        ([("x", 1), ("y", 2), ("x", 1)], ("x, 1", "y, 2")),
        ([b"b", b"a", b"b"], ("a", "b")),
        (["a10", "a2", "a10"], ("a2", "a10")),
        (["x", 3, "x"], ("3", "x")),
        (["1", 2, 1], ("1", "2")),
        ([-1, 1, -1], ("-1", "1")),
        (range(3), ("0", "1", "2")),
    ],
)
def test_any_hashable_label(labels, classes):
    data = open_dataset((noise(3, 2, 2), labels))
    assert data.classes == classes
    first, second, third = data.labels.tolist()
    assert first != second
    assert (first == third) == (len(classes) == 2)
    backwards = open_dataset((noise(3, 2, 2), list(labels)[::-1]))
    assert (backwards.classes, backwards.labels.tolist()) == (classes, [third, second, first])


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["a", None, "b", None], "a label for every image, but 2 of 4 are missing (row 1, row 3)"),
        ([0.0, float("nan"), 1.0, 1.0], "1 of 4 are missing (row 1)"),
        (["a", " ", "b", ""], "2 of 4 are missing (row 1, row 3)"),
        (np.eye(4), "one label per image, a number or a name, but the first is [1.0, 0.0, 0.0, 0"),
        (["a"] * 4, "at least 2 classes to rank backbones, but all 4 images are of class 'a'"),
        ("abab", "`labels` must be a sequence with one element per image but is str"),
        (5, "`labels` must be a sequence with one element per image but is int"),
    ],
)
def test_label_messages(labels, text):
    assert text in message((noise(4, 2, 2), labels))
    assert "`labels` must hold at least one image but is empty" in message(([], []))


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ([(np.full((2, 2), -3.0), 0)] * 2, "an image of Pairs, must be uint8"),
        ([(np.full((2, 2), -3.0), 0)] * 2, "remove the normalisation (transform)"),
        ([("x.png", 0)], "an image of Pairs, must be an array, a tensor, a PIL image"),
        ([{"image": 1}], "`spec[row]` must be a pair (image, label), but Pairs raises ValueError"),
        ([KeyError("x")], "`spec[row]` must be a pair (image, label), but Pairs raises KeyError"),
        ([], "The labels of Pairs must hold at least one image"),
        ([(noise(2, 2), [0, 1])], "The labels of Pairs must hold one label per image"),
        (
            [(noise(2, 2), 0), OSError("x")],
            "Pairs must have an attribute `targets` with all labels",
        ),
    ],
)
def test_map_data_set_messages(pairs, text):
    assert text in message(Pairs(pairs))
    source = Cifar()
    source.targets[2] = -1  # STL10's mark
    assert "The labels of Cifar must hold a label for every image" in message(source)
    assert "1 of 6 are missing (row 2)" in message(source)


# ---- real data sets


@pytest.mark.zoo
def test_zoo_counts_and_pixels():
    listing = ZOO / "datasets.csv"
    if not listing.exists():
        pytest.skip(f"{ZOO.resolve()} is not there")
    with listing.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        root = ZOO / "datasets" / row["name"]
        for split in ("train", "val"):
            data = open_dataset(root, split=split)
            assert len(data) == int(row[split])
            assert len(data.classes) == int(row["classes"])
        data = open_dataset(root)
        assert data.name == row["name"]
        digests = data.digests()
        assert len(set(digests)) == len(digests)  # exact duplicates were removed
        for n in range(0, len(data), 50):
            with Image.open(str(data.items[n])) as image:
                assert np.array_equal(np.asarray(data.load(n)), np.asarray(image.convert("RGB")))


# ---- parts


def tree(root: Path, *folders: str, n: int = 2) -> Path:
    """Folders with `n` images each; those that end in / with none."""
    for name in folders:
        (root / name).mkdir(parents=True)
        for i in range(0 if name.endswith("/") else n):
            write(root / name / f"{i}.png")
    return root


PETS = [f"{part}/{c}" for part in ("train", "test") for c in ("cat", "dog")]


@pytest.mark.parametrize("beside", ["annotations/", "masks", "extra/eel", "results/cat"])
def test_parts_are_parts_whatever_lies_beside_them(tmp_path, beside):
    root = tree(tmp_path / "pets", *PETS, beside)
    (root / "README.md").touch()
    (root / "__MACOSX" / "train").mkdir(parents=True)
    name = beside.partition("/")[0]
    for split, n in ((None, 4), ("test", 4), ("all", 8)):
        with pytest.warns(UserWarning, match=f"lies beside them: '{name}'"):
            data = open_dataset(root, split=split)
        assert (data.classes, len(data)) == (("cat", "dog"), n)


def test_images_beside_parts_are_said(tmp_path):
    write(tree(tmp_path, *PETS) / "cover.png")
    with pytest.warns(UserWarning, match="beside them: 1 images directly in it"):
        assert len(open_dataset(tmp_path)) == 4


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("TRAIN", "dev"),
        ("trn", "tst"),
        ("train_set", "eval"),
        ("train2017", "val2017"),
        ("training-images", "holdout"),
        ("seg_train", "seg_test"),  # a word of the name, and the same classes inside
        ("seg_train/seg_train", "seg_test/seg_test"),  # as archives have it
        ("Training/Training", "Testing/Testing"),
        ("trainval", "test"),
    ],
)
def test_parts_by_other_names(tmp_path, train, test):
    root = tree(tmp_path / "pets", *(f"{p}/{c}" for p in (train, test) for c in ("cat", "dog")))
    data = open_dataset(root)
    assert (data.classes, len(data)) == (("cat", "dog"), 4)
    assert all(os.path.join(root, train) in item for item in data.items)
    part = "val" if train in ("TRAIN", "train2017") else "test"
    assert all(os.path.join(root, test) in item for item in open_dataset(root, split=part).items)


@pytest.mark.parametrize(
    "classes",
    [
        ["train", "bus", "tram"],
        ["train", "bus/old", "bus/new"],
        ["bullet_train", "steam_train/1", "steam_train/2", "test_track"],
        ["test_positive/a", "test_negative/b"],
        ["trains", "contest"],
    ],
)
def test_classes_that_are_called_like_parts(tmp_path, classes):
    assert set(open_dataset(tree(tmp_path, *classes)).classes) == {
        name.partition("/")[0] for name in classes
    }


def test_one_part_alone(tmp_path):
    root = tree(tmp_path / "a", "train/cat", "train/dog", "labels/")
    with pytest.warns(UserWarning, match="beside them: 'labels'"):
        assert open_dataset(root).classes == ("cat", "dog")
    # a class of vehicles, or a part beside images of no class: it is said, and can be decided
    root = tree(tmp_path / "b", "train/cat", "train/dog", "unlabelled")
    with pytest.warns(UserWarning, match="'train' are taken to be classes, but hold .*`split`"):
        assert open_dataset(root).classes == ("train", "unlabelled")
    with pytest.warns(UserWarning, match="beside them: 'unlabelled'"):
        assert open_dataset(root, split="train").classes == ("cat", "dog")


def test_parts_without_a_training_part(tmp_path):
    root = tree(tmp_path, "val/cat", "val/dog", "test/cat", "test/dog")
    assert "is None, and there is no training part" in message(root)
    assert open_dataset(root, split="val").classes == ("cat", "dog")


def test_two_parts_of_one_kind(tmp_path):
    root = tree(tmp_path, *PETS, "Training/cat", "Training/dog", n=1)
    with pytest.warns(UserWarning, match="its part 'train' is used, 'Training' is left out"):
        assert len(open_dataset(root)) == 2
    assert len(open_dataset(root, split="Training")) == 2
    (root / "train").rename(root / "trn")
    assert "`split` must be one of 'Training', 'trn'" in message(root)


@pytest.mark.parametrize(
    "folders",
    [
        ["fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"],
        ["cat/train", "cat/test", "dog/train", "dog/test"],
        ["tr/cat", "tr/dog", "te/dog"],
    ],
)
def test_folders_of_the_same_names_inside_classes_are_doubtful(tmp_path, folders):
    with pytest.warns(UserWarning, match="taken to be classes, but hold sub-folders"):
        open_dataset(tree(tmp_path, *folders))


def test_the_folder_of_a_search_is_left_out(tmp_path):
    root = tree(tmp_path / "pets", "cat", "dog", "run/hardest", "dog/run/hardest")
    for run in (root / "run", root / "dog" / "run"):
        for name in ("search.json", "config.json"):
            (run / name).write_text("{}")
    with pytest.warns(UserWarning, match="run' is left out: it is the folder of a search") as said:
        data = open_dataset(root)
    assert (data.classes, len(data), len(said)) == (("cat", "dog"), 4, 2)
    assert "but is the folder of a search" in message(root / "run")


def parts_table(path: Path, head: str, values: list[str]) -> Path:
    rows: list[Any] = [["path", "label", *head.split(",")]]
    for k, value in enumerate(values):
        write(path.parent / f"{k}.png")
        rows.append([f"{k}.png", "ab"[k % 2], *value.split(",")])
    return table(path, rows)


@pytest.mark.parametrize(
    ("head", "train", "test"),
    [
        ("split", "train", "test"),
        ("Subset", "Training", "TESTING"),
        ("partition", "trn", "val"),
        ("fold", "tr", "te"),
        ("Usage", "Training", "PrivateTest"),
        ("is_valid", "False", "True"),
        ("is_test", "0", "1"),
        ("is_train", "yes", "no"),
        ("in_test", "0", "1"),
        ("test_set", "False", "True"),
        ("is_valid,is_test", "0,0", "0,1"),
        ("split,is_test", "train,0", "test,1"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet", "hf"])
def test_parts_by_column(tmp_path, head, train, test, form):
    path = parts_table(tmp_path / "t.csv", head, [train] * 4 + [test] * 2)
    spec: Any = path
    if form != "csv":
        import pandas as pd

        pd.read_csv(path).to_parquet(spec := tmp_path / "t.parquet")
    if form == "hf":
        datasets = pytest.importorskip("datasets")
        frame = pd.read_csv(path)
        frame["path"] = [str(tmp_path / name) for name in frame["path"]]
        spec = datasets.Dataset.from_pandas(frame)
    part = "val" if test == "val" or head == "is_valid" else "test"
    data = open_dataset(spec)
    assert names(data) == [f"{k}.png" for k in range(4)] or form == "hf"
    assert data.origin.tolist() == [0, 1, 2, 3]
    other = open_dataset(spec, split=part)
    assert (other.origin.tolist(), other.name.endswith(f"/{part}")) == ([4, 5], True)
    assert other.load(0).size == (6, 4)
    assert len(open_dataset(spec, split="all")) == 6
    assert "`split` must be one of" in message(spec, split="nonsense")


def test_columns_that_name_parts_are_honoured_or_fail(tmp_path):
    path = tmp_path / "t.csv"
    parts_table(path, "split", ["train"] * 4 + ["extra"] * 2)
    with pytest.warns(UserWarning, match=r"2 rows are left out, of which the column .* 'extra'"):
        assert len(open_dataset(path)) == 4
    assert len(open_dataset(path, split="extra")) == 2
    parts_table(path, "split", ["train"] * 4 + [""] * 2)
    assert "column 'split', must name the part of every row, but 2 of 6" in message(path)
    assert len(open_dataset(path, split="all")) == 6
    parts_table(path, "is_test", ["0"] * 3 + ["", "1", "1"])
    assert "column 'is_test', must name the part of every row, but 1 of 6" in message(path)
    parts_table(path, "split,is_valid", ["train,0"] * 2 + ["train,1"] * 2)
    assert "'split' and 'is_valid' contradict each other" in message(path)
    parts_table(path, "fold", list("001122"))
    with pytest.warns(UserWarning, match="the column 'fold' is not used, for its values"):
        assert len(open_dataset(path)) == 6
    parts_table(path, "is_valid", ["1"] * 4)
    assert len(open_dataset(path)) == 4  # of one part only, as in a table of its own
    parts_table(path, "split", ["val"] * 2 + ["test"] * 2)
    assert "there is no training part" in message(path)
    parts_table(path, "set,split", ["a,train"] * 2 + ["b,test"] * 2)
    with pytest.warns(UserWarning, match="'set' is not used"):
        assert len(open_dataset(path)) == 2
    assert len(open_dataset(path, label_column="set", split="all")) == 4


def test_labels_of_other_parts_may_be_missing(tmp_path):
    rows = [["path", "label", "split"]]
    rows += [
        [f"{k}.png", "ab"[k % 2] if k < 4 else "", "train" if k < 4 else "test"] for k in range(6)
    ]
    for k in range(6):
        write(tmp_path / f"{k}.png")
    assert len(open_dataset(table(tmp_path / "t.csv", rows))) == 4
    assert "(line 6, line 7)" in message(tmp_path / "t.csv", split="test")


def test_hugging_face_splits_by_other_names(hf):
    data = hf.DatasetDict(Training=_hf_dataset(hf), dev=_hf_dataset(hf, 4))
    assert (len(open_dataset(data)), len(open_dataset(data, split="val"))) == (6, 4)


@pytest.mark.parametrize(
    ("head", "cells", "used"),
    [
        ("group", ["train", "train", "train", "test"], True),
        ("mode", ["training", "training", "training", "validation"], True),
        ("validation", [0, 0, 0, 1], True),
        ("training", ["True", "True", "True", "False"], True),
        ("valid", [0, 0, 0, 1], False),
        ("group", ["train", "train", "b", "test"], False),
        ("testing", [0, 0, 0.5, 1], False),
        ("role", ["tr", "tr", "tr", "te"], True),
        ("group", [0, 0, 0, 1], False),
        ("Stage", ["yes", "", "no", "no"], False),
        ("phase", [1, 1, 2, 3], False),
        ("type", ["seg_train", "seg_train", "seg_train", "seg_test"], False),
    ],
)
def test_columns_of_truths_or_vague_names_are_used_or_said(tmp_path, head, cells, used):
    rows: list[Any] = [["path", "label", head]]
    for k, cell in enumerate([*cells, *cells]):
        write(tmp_path / f"{k}.png")
        rows.append([f"{k}.png", "ab"[k // len(cells)], cell])
    path = table(tmp_path / "t.csv", rows)
    if used:
        assert len(open_dataset(path)) == 6
    else:
        with pytest.warns(UserWarning, match=f"the column '{head}' is not used, for its values"):
            assert len(open_dataset(path)) == 8
        assert len(open_dataset(path, split="all")) == 8


def test_columns_of_vague_names_that_say_something_else(tmp_path):
    rows: list[Any] = [["path", "label", "group", "type", "kind"]]
    for k in range(8):
        write(tmp_path / f"{k}.png")
        rows.append([f"{k}.png", "ab"[k % 2], k, "jpg", 1])
    assert len(open_dataset(table(tmp_path / "t.csv", rows))) == 8  # nothing to say


def test_valid_beside_another_part_is_one(tmp_path):
    rows: list[Any] = [["path", "label", "valid", "test"]]
    for k in range(8):
        write(tmp_path / f"{k}.png")
        rows.append([f"{k}.png", "ab"[k % 2], int(k in (2, 3)), int(k in (4, 5))])
    path = table(tmp_path / "t.csv", rows)
    assert [len(open_dataset(path, split=s)) for s in ("train", "val", "test")] == [4, 2, 2]
    (tmp_path / "u.csv").write_text("path,label,valid\n0.png,a,1\n1.png,b,1\n")
    assert len(open_dataset(tmp_path / "u.csv")) == 2  # leaves nothing out: nothing to say


def test_names_of_class_folders_that_are_none_or_the_same(tmp_path):
    with pytest.raises(DatasetError, match=r"class folders whose names .* ' ' consists of white"):
        open_dataset(tree(tmp_path / "1", " ", "b"))
    with pytest.raises(DatasetError, match="'a', 'a ' differ only in white space; rename"):
        open_dataset(tree(tmp_path / "2", "a", "a ", "b"))
    for k, names in enumerate([("caf\u00e9", "cafe\u0301"), ("Cat", "cat")]):
        root = tree(tmp_path / f"like{k}", *names)
        if len(list(root.iterdir())) < 2:
            pytest.skip("a file system that takes them for one")
        with pytest.warns(UserWarning, match="differ only in case, or in how"):
            assert len(open_dataset(root).classes) == 2
    with pytest.warns(UserWarning, match=r"'\.c' in .* left out: hidden folders with images"):
        assert open_dataset(tree(tmp_path / "3", "a", "b", ".c", ".thumbnails")).classes == (
            "a",
            "b",
        )
    assert open_dataset(tree(tmp_path / "4", "nan", "None")).classes == ("None", "nan")
    assert open_dataset(tree(tmp_path / "5", "a", "A", "\x7f")).classes == ("A", "\\x7f", "a")


# Numbers to predict -----------------------------------------------------------------------------
AGES = (np.arange(60) * 7 % 41 + 18).tolist()  # 41 different, one or two images each


def numbered(form: str, root: Path, labels: list[Any]) -> Any:
    """Return images with these labels in one of the forms that a data set may have."""
    paths = [str(write(root / f"{i}.png")) for i in range(len(labels))]
    if form == "arrays":
        return np.zeros((len(labels), 4, 4), np.uint8), labels
    if form == "torchvision":
        return list_of_pairs(labels)
    if form == "csv":
        file = root / "t.csv"
        lines = [f"{p},{v}" for p, v in zip(paths, labels, strict=True)]
        file.write_text("\n".join(["path,label", *lines]))
        return file
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"path": paths, "label": labels})
        pyarrow.parquet.write_table(table, root / "t.parquet")
        return root / "t.parquet"
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"path": paths, "label": labels})


class list_of_pairs:  # noqa: N801
    def __init__(self, labels: list[Any]) -> None:
        self.targets = labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> Any:
        return Image.new("L", (4, 4)), self.targets[row]


@pytest.mark.parametrize("form", ["arrays", "csv", "parquet", "hf", "torchvision"])
def test_numbers_never_silently_become_classes(form, tmp_path):
    floats = [0.5, 1.25, 3.0, 0.5] * 10
    for n, (labels, told) in enumerate(
        [(floats, "3 different numbers with a fraction from 0.5 to 3 on 40 images"),
         (AGES, "41 different whole numbers from 18 to 58 on 60 images")]
    ):  # fmt: skip
        spec = numbered(form, tmp_path / str(n), labels)
        with pytest.raises(DatasetError, match="--task regression") as error:
            open_dataset(spec)
        assert told in str(error.value)
        assert "--task classification" in str(error.value)
        as_classes = open_dataset(spec, task="classification")
        assert (as_classes.task, len(as_classes.classes)) == ("classification", len(set(labels)))
        numbers = open_dataset(spec, task="regression")
        assert (numbers.task, numbers.classes) == ("regression", ())
        assert numbers.labels.dtype == np.float64
        assert numbers.labels.tolist() == labels
        assert open_dataset(numbers) is numbers
        with pytest.raises(ValueError, match="`task` must be 'regression'"):
            open_dataset(numbers, task="classification")


def test_codes_of_classes_stay_classes(tmp_path):
    codes = [*range(30)] * 3
    for labels in (
        [*range(10)] * 2,
        codes,
        [0.0, 1.0, 2.0] * 4,
        [0.5, 1.5] * 3,
        ["7a", "2.5"] * 4,
    ):
        for task in (None, "auto"):
            data = open_dataset((np.zeros((len(labels), 4, 4), np.uint8), labels), task=task)
            assert len(data.classes) == len(set(labels))
    for age in (3.5, 4.5, 5.5):  # names of folders are classes
        write(tmp_path / str(age) / "1.png")
    assert open_dataset(tmp_path).classes == ("3.5", "4.5", "5.5")
    assert open_dataset(tmp_path, task="regression").labels.tolist() == [3.5, 4.5, 5.5]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.5, "tall", 2.0], "must hold finite numbers .* but holds 'tall'"),
        ([1.5, float("inf"), 2.0], "must hold finite numbers"),
        ([1.5, None, 2.0], "1 of 3 are missing"),
        ([2.5, 2.5, 2.5], "all 3 are 2.5"),
    ],
)
def test_bad_numbers_are_refused(labels, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset((np.zeros((3, 4, 4), np.uint8), labels), task="regression")


def test_samples_of_numbers_are_stratified_by_their_size():
    values = np.random.default_rng(0).lognormal(size=1000)
    data = open_dataset((np.zeros((1000, 2, 2), np.uint8), values), task="regression")
    rows = data.sample_rows(100, seed=3)
    tenth = np.argsort(np.argsort(values))[rows] // 100
    assert np.bincount(tenth).tolist() == [10] * 10
    assert set(rows) < set(data.sample_rows(250, seed=3))
    part = pickle.loads(pickle.dumps(data.subset(rows)))
    assert part.labels.tolist() == values[rows].tolist()
    assert part.task == "regression"
    assert repr(data).endswith(f"numbers {values.min():g} … {values.max():g})")
    ties = open_dataset(
        (np.zeros((50, 2, 2), np.uint8), [0] * 45 + [*range(1, 6)]), task="regression"
    )
    assert len(set(ties.strata[:45])) == 1
