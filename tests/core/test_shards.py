"""WebDataset shards."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from sfda_tune import open_dataset, rank
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.decoding import Member, UnreadableImage

CPU = {"device": "cpu", "workers": 0}


def encode(k: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(k).integers(0, 255, (12, 10, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def samples(rows, label="cls"):
    for k in rows:
        yield f"{k:06d}.png", encode(k)
        text = (
            str(k % 3)
            if label == "cls"
            else json.dumps({"label": "abc"[k % 3], "patient": k // 4})
        )
        yield f"{k:06d}.{label}", text.encode()


@pytest.fixture
def shards(tmp_path):
    for name, rows in (("train-000", range(9)), ("train-001", range(9, 21)), ("val-0", range(9))):
        write(tmp_path / f"{name}.tar", samples(rows))
    return tmp_path


@pytest.mark.parametrize(
    "pattern", ["train-*.tar", "train-{000..001}.tar", "train-{000,001}.tar", ""]
)
def test_a_pattern_and_a_folder_are_all_training_shards(shards, pattern):
    images = open_dataset(shards / pattern if pattern else shards)
    assert len(images) == 21
    assert images.classes == ("0", "1", "2")
    assert images.labels.tolist() == [k % 3 for k in range(21)]
    for k in (0, 8, 9, 20):
        assert (np.asarray(images.load(k)) == np.asarray(Image.open(io.BytesIO(encode(k))))).all()
    assert images.item_name(9) == str(shards / "train-001.tar" / "000009.png")


def test_parts_by_the_names_of_shards(shards):
    assert len(open_dataset(shards, split="val")) == 9
    assert len(open_dataset(shards, split="all")) == 30
    with pytest.raises(DatasetError, match="`split` can only be used if the names of shards"):
        open_dataset(shards / "train-000.tar", split="test")


def test_opening_reads_labels_only_and_a_sample_what_it_draws(shards, monkeypatch):
    read = []
    true = Member.read
    monkeypatch.setattr(Member, "read", lambda self: read.append(self.name) or true(self))
    images = open_dataset(shards, samples=6)
    assert [name for name in read if name.endswith("png")] == ["000000.png"]  # is it dark?
    read.clear()
    rank(images, "demo:resnet_noise", cache=False, **CPU)
    assert len({name for name in read if name.endswith("png")}) == 6


def test_the_same_images_in_a_folder_are_kept_under_the_same_digests(shards, tmp_path):
    images = open_dataset(shards)
    folder = tmp_path / "photos"
    for k in range(21):
        (folder / str(k % 3)).mkdir(parents=True, exist_ok=True)
        (folder / str(k % 3) / f"{k}.png").write_bytes(encode(k))
    assert sorted(images.digests()) == sorted(open_dataset(folder).digests())


def test_labels_in_json_and_in_folders_and_groups_by_name(tmp_path):
    write(tmp_path / "a.tar", samples(range(12), "json"))
    assert open_dataset(tmp_path / "a.tar").classes == ("a", "b", "c")
    by_patient = open_dataset(tmp_path / "a.tar", label_column="patient")
    assert by_patient.classes == ("0", "1", "2")
    assert by_patient.labels.tolist() == [k // 4 for k in range(12)]
    write(tmp_path / "b.tar", [(f"./{'xy'[k % 2]}/{k}.png", encode(k)) for k in range(6)])
    images = open_dataset(tmp_path / "b.tar", groups=lambda path: int(path[-5]) // 2)
    assert images.classes == ("x", "y")
    assert images.groups.tolist() == list("001122")


def test_what_else_is_in_a_tar(tmp_path):
    odd = [("._000.png", b"x"), ("__MACOSX/a.png", b"x"), ("9.txt", b"a picture"), ("9.cls", b"1")]
    write(tmp_path / "a.tar", [*samples(range(6)), *odd])
    with pytest.warns(UserWarning, match=r"samples without an image are left out: 1 \(9\)"):
        assert len(open_dataset(tmp_path / "a.tar")) == 6
    twice = [(f"{k}.{kind}.png", encode(k)) for k in range(6) for kind in ("input", "mask")]
    write(tmp_path / "b.tar", [*twice, *((f"{k}.cls", b"01"[k % 2 :][:1]) for k in range(6))])
    with pytest.raises(
        DatasetError, match=r"one image to a sample, but '0' has 'input.png', 'mask"
    ):
        open_dataset(tmp_path / "b.tar")
    assert len(open_dataset(tmp_path / "b.tar", image_column="input.png")) == 6


@pytest.mark.parametrize(
    ("name", "members", "options", "message"),
    [
        ("a.tar", [("1.png", encode(1)), ("2.png", encode(2))], {}, "must hold labels: a .cls"),
        ("a.tar", list(samples(range(4), "txt")), {}, "must hold labels"),
        ("a.tar", [("1.cls", b"0")], {}, "must hold images, such as 000017.jpg, but has 'cls'"),
        (
            "a.tar",
            list(samples(range(4))),
            {"image_column": "jpg"},
            "`image_column` must be one of",
        ),
        ("a.tar", [("1.png", encode(1)), ("1.json", b"{")], {}, "must be JSON"),
        ("a.tar", list(samples(range(4), "json")), {"label_column": "x"}, "must be a field"),
        ("a.tar", [], {}, "must hold images"),
    ],
)
def test_refuses(name, members, options, message, tmp_path):
    write(tmp_path / name, members)
    with pytest.raises(DatasetError, match=message):
        open_dataset(tmp_path / name, **options)


def test_damaged_and_compressed_files(shards, tmp_path):
    write(tmp_path / "z.tar", samples(range(6)), "w:gz")
    with pytest.raises(DatasetError, match=r"no whole tar file.*unpack it to a plain"):
        open_dataset(tmp_path / "z.tar")
    with pytest.raises(DatasetError, match="There is no file"):
        open_dataset(shards / "train-{000..004}.tar")
    images = open_dataset(shards / "train-000.tar")
    content = (shards / "train-000.tar").read_bytes()
    (shards / "train-000.tar").write_bytes(content[: images.items[5].offset + 10])
    images.load(4)
    with pytest.raises(UnreadableImage, match=r"ends within '000005\.png'"):
        images.load(5)
