"""Pixels of more than 8 bits, images of other than three bands, DICOM, NIfTI, arrays in files."""

import gzip
import importlib.util
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfda_tune import open_dataset, rank, search
from sfda_tune.data.checks import DatasetError
from sfda_tune.data.copies import group_twins
from sfda_tune.data.dataset import ImageDataset
from sfda_tune.data.decoding import Passing, UnreadableImage
from sfda_tune.data.formats import Reading, parse_reading
from sfda_tune.finetuning.models import load_model, predict

DEEP = np.arange(0, 4095, 13, dtype=np.uint16).reshape(9, 35)
BANDS = np.random.default_rng(0).integers(0, 4096, (6, 8, 13)).astype(np.uint16)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def load(item, **reading) -> np.ndarray:
    images = ImageDataset("x", [item], np.zeros(1, int), ("a",), reading=parse_reading(**reading))
    return np.asarray(images.load(0))


def reason(item, **reading) -> str:
    with pytest.raises(UnreadableImage) as caught:
        load(item, **reading)
    return caught.value.reason


@pytest.mark.parametrize("bits", [12, 14, 16])
def test_white_is_the_largest_number_of_so_many_bits(bits):
    expected = np.rint(DEEP * 255.0 / (2**bits - 1)).astype(np.uint8)
    found = load(png(DEEP), bit_depth=bits)
    assert (found == expected[..., None]).all()
    arrays = open_dataset(([DEEP] * 4, list("aabb")), bit_depth=bits)
    assert (np.asarray(arrays.load(0)) == found).all()


def test_pixels_that_do_not_fit_are_no_silent_clipping():
    assert "pixels from 0 to 4082: known are integers 0 … 1023" in reason(png(DEEP), bit_depth=10)
    assert (load(png(DEEP)) == np.rint(DEEP / 257).astype(np.uint8)[..., None]).all()


def test_how_pixels_are_read_is_part_of_the_digest_and_of_every_subset():
    images = open_dataset(([png(DEEP), png(DEEP.T)] * 2, list("abab")), bit_depth=16)
    twelve = open_dataset(([png(DEEP), png(DEEP.T)] * 2, list("abab")), bit_depth=12)
    assert images.digest(0) != twelve.digest(0)
    part = twelve.subset([1, 3]).sample(1)
    assert part.reading == Reading(12)
    assert part.load(0).getextrema()[0][1] > 250


def test_dark_images_are_said(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for k in range(3):
            (tmp_path / name / f"{k}.png").write_bytes(png(DEEP + np.uint16(k)))
    with pytest.warns(UserWarning, match=r"no pixel of 6 looked at is above 4084.*--bit-depth 12"):
        open_dataset(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_dataset(tmp_path, bit_depth=16)
        open_dataset(([np.zeros((3, 3), np.uint8)] * 4, list("abab")))


@pytest.mark.parametrize("chosen", ["4,3,2", (13, 1, 7), 5])
def test_bands_of_arrays_files_and_tiffs(chosen):
    tifffile = pytest.importorskip("tifffile")
    bands = parse_reading(bands=chosen).bands
    expected = np.rint(BANDS[..., [b - 1 for b in bands]] * 255.0 / 4095).astype(np.uint8)
    how = {"bit_depth": 12, "bands": chosen}
    files = {kind: io.BytesIO() for kind in ("npy", "samples", "planes", "frames")}
    np.save(files["npy"], BANDS)
    planes = np.moveaxis(BANDS, 2, 0)
    kinds = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(files["samples"], BANDS, **kinds)
    tifffile.imwrite(files["planes"], planes, photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(files["frames"], planes, photometric="minisblack", compression="lzw")
    for kind, file in files.items():
        assert (load(file.getvalue(), **how) == expected).all(), kind
    arrays = open_dataset(([BANDS] * 4, list("abab")), **how)
    assert (np.asarray(arrays.load(2)) == expected).all()
    stacked = open_dataset((np.stack([BANDS] * 4), list("abab")), **how)
    assert (np.asarray(stacked.load(2)) == expected).all()
    import torch

    tensors = torch.tensor(np.stack([planes] * 4).astype(np.int32)).to(torch.uint16)
    assert (np.asarray(open_dataset((tensors, list("abab")), **how).load(1)) == expected).all()


def test_many_bands_need_a_choice():
    tifffile = pytest.importorskip("tifffile")
    file, array = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(file, BANDS, photometric="minisblack", planarconfig="contig")
    np.save(array, BANDS)
    assert "--bands 3,2,1" in reason(file.getvalue())
    assert "has 13 bands; choose three" in reason(array.getvalue())
    assert "has 13 bands, so there is no band 14" in reason(array.getvalue(), bands=14)
    with pytest.raises(DatasetError, match=r"bands=\(4, 3, 2\)"):
        open_dataset(([BANDS] * 4, list("abab")))
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    assert (load(png(red), bands=1) == 200).all()
    assert (load(png(red), bands="3,2,1")[0, 0, 2]) == 200


def test_an_array_file_runs_no_code():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    assert "allow_pickle=False" in reason(file.getvalue())


def dicom(array: np.ndarray, **elements) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    data.Rows, data.Columns = array.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    for name, value in elements.items():
        setattr(data, name, value)
    data.PixelData = array.tobytes()
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def test_dicom_by_its_window():
    grey = load(dicom(DEEP, WindowCenter=2048, WindowWidth=1000))[..., 0].astype(int)
    expected = np.clip((DEEP - 2047.5) / 999 + 0.5, 0, 1) * 255  # PS3.3, C.11.2.1.2.1
    assert np.abs(grey - expected).max() <= 0.51
    shifted = load(
        dicom(DEEP, WindowCenter=1024, WindowWidth=1000, RescaleSlope=1, RescaleIntercept=-1024)
    )
    assert np.abs(shifted[..., 0] - expected).max() <= 0.51
    inverse = dicom(
        DEEP, WindowCenter=2048, WindowWidth=1000, PhotometricInterpretation="MONOCHROME1"
    )
    assert np.abs(255 - load(inverse)[..., 0].astype(int) - expected).max() <= 0.51
    plain = load(dicom(DEEP))[..., 0]
    assert (plain.min(), plain.max()) == (0, 255)
    mask = (np.arange(12).reshape(3, 4) % 2).astype(np.uint16)  # of a segmentation
    assert (load(dicom(mask, BitsStored=1, HighBit=0))[..., 0] == 255 * mask).all()


def test_dicom_whose_decoder_is_not_there_says_so_and_is_tried_again():
    data = pytest.importorskip("pydicom.data")
    path = data.get_testdata_file("JPEG-lossy.dcm", download=False)
    if path is None or importlib.util.find_spec("libjpeg"):
        pytest.skip("pydicom ships no JPEG-lossy.dcm, or what decodes it is installed")
    said = reason(path)
    assert "pip install 'pylibjpeg[all]'" in said
    assert isinstance(said, Passing)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "examples_rgb_color.dcm"])
def test_dicom_of_real_machines_in_a_folder(name, tmp_path):
    data = pytest.importorskip("pydicom.data")
    path = data.get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"pydicom ships no {name}")
    content = Path(path).read_bytes()
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / name).write_bytes(content)
    image = open_dataset(tmp_path).load(0)
    assert image.mode == "RGB"
    assert np.asarray(image).std() > 10


def test_copies_are_found_in_formats_that_pillow_does_not_know():
    items = [dicom(DEEP), dicom(DEEP), dicom(DEEP[::-1].copy()), b"", b""]
    images = open_dataset((items, list("aabba")))
    assert group_twins(images).tolist()[:3] == [0, 0, 2]
    assert len(set(group_twins(images)[3:])) == 2  # empty files are no copies


def test_nifti_is_its_middle_slice():
    nibabel = pytest.importorskip("nibabel")
    volume = np.random.default_rng(0).normal(size=(8, 9, 5)).astype(np.float32)
    content = nibabel.Nifti1Image(volume, np.eye(4)).to_bytes()
    middle = np.rot90(volume[:, :, 2])
    low, high = np.percentile(middle, [0.5, 99.5])
    expected = np.rint(255 * np.clip((middle - low) / (high - low), 0, 1))
    assert (load(content)[..., 0] == expected).all()
    assert (load(gzip.compress(content)) == load(content)).all()
    assert "no NIfTI image within" in reason(gzip.compress(b"x" * 500))


@pytest.mark.parametrize(("module", "extra"), [("pydicom", "medical"), ("tifffile", "bands")])
def test_a_missing_library_is_named_with_its_extra(module, extra, monkeypatch):
    content, how = dicom(DEEP), {}
    if module == "tifffile":
        file = io.BytesIO()
        pytest.importorskip("tifffile").imwrite(file, BANDS, photometric="minisblack")
        content, how = file.getvalue(), {"bands": "1"}
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install 'sfda-tune[{extra}]'" in reason(content, **how)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bit_depth": 8}, "`bit_depth` must be 'auto' or an integer in 9 … 16 but is 8"),
        ({"bit_depth": "deep"}, "`bit_depth` must be 'auto'"),
        ({"bit_depth": True}, "`bit_depth` must be 'auto'"),
        ({"bands": []}, "`bands` must be 'all', or bands"),
        ({"bands": 0}, "`bands` must be 'all', or bands"),
        ({"bands": "r,g,b"}, "`bands` must be 'all', or bands"),
        ({"bands": [1.5]}, "`bands` must be 'all', or bands"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(([DEEP] * 4, list("abab")), **options)


def test_forms_that_know_it_better_refuse():
    images = open_dataset(([DEEP] * 4, list("abab")), bit_depth=12)
    for spec in ("digits", images):
        with pytest.raises(DatasetError, match="`bit_depth` cannot be used with"):
            open_dataset(spec, bit_depth=12)


def test_from_ranking_to_prediction(tmp_path):
    """The winner reads new images as those it was trained on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for k in range(160):
        folder = tmp_path / "photos" / str(digits.target[k] % 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.png").write_bytes(png((digits.images[k] * 255).astype(np.uint16)))
    quick = {"bit_depth": 12, "device": "cpu", "cache": False}
    ranking = rank(tmp_path / "photos", "demo:resnet_glyphs", **quick)
    assert ranking.info["arguments"]["bit_depth"] == 12
    with pytest.warns(UserWarning, match="no pixel"):
        dark = rank(tmp_path / "photos", "demo:resnet_glyphs", device="cpu", cache=False)
    assert dict(dark) != dict(ranking) or dark.scores[0].details != ranking.scores[0].details
    found = search(
        tmp_path / "photos",
        "demo:resnet_glyphs",
        trials=1,
        epochs=1,
        out=tmp_path / "run",
        **quick,
    )
    model = load_model(found.folder / "model")
    assert model.provenance["reading"] == {"bit_depth": 12, "bands": None}
    paths = sorted((tmp_path / "photos").glob("*/*.png"))[:8]
    by_path = predict(model, paths)
    eight_bit = [np.rint(np.asarray(Image.open(p)) * (255 / 4095)).astype(np.uint8) for p in paths]
    model.provenance["reading"] = None
    np.testing.assert_allclose(by_path, predict(model, eight_bit), atol=1e-6)
