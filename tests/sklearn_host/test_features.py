"""`BackboneFeatures`, and how X is read."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sfda_tune_sklearn import BackboneFeatures
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline

from sfda_tune import extract, open_dataset, resolve_backbones
from sfda_tune.data.folders import image_files

COMMON = {"cache": False, "device": "cpu", "workers": 0}
X, Y = load_digits(return_X_y=True)
X, Y = X[:60], Y[:60]


def features(images, backbone="demo:resnet_glyphs", **options):
    return BackboneFeatures(backbone, **COMMON, **options).fit_transform(images)


@pytest.mark.parametrize("backbone", ["demo:resnet_glyphs", "demo:vit_glyphs"])
def test_features_are_those_of_the_extraction(backbone):
    digits = open_dataset("digits").subset(np.arange(60))
    (expected,) = extract(digits, resolve_backbones(backbone))
    found = features(X, backbone)  # 0 … 16, as `open_dataset("digits")` maps them
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.features.x, rtol=1e-4, atol=1e-5)
    assert found.flags.writeable  # scikit-learn's scalers may work in place


def test_every_form_of_the_same_images_gives_the_same_features(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), np.uint8)
    paths = [tmp_path / f"{n}.png" for n in range(6)]
    for image, path in zip(pixels, paths, strict=True):
        Image.fromarray(image).save(path)
    encoded = io.BytesIO()
    Image.fromarray(pixels[0]).save(encoded, "PNG")
    expected = features(pixels)
    forms = {
        "unit floats": pixels / 255,
        "rows": pixels.reshape(6, -1),
        "rows of floats": pixels.reshape(6, -1) / 255,
        "list of arrays": list(pixels),
        "PIL images": [Image.fromarray(image) for image in pixels],
        "paths": paths,
        "array of str": np.array([str(path) for path in paths]),
        "column": pd.DataFrame({"path": [str(path) for path in paths]}),
        "series": pd.Series([str(path) for path in paths]),
        "folder": str(tmp_path),
        "mixed": [encoded.getvalue(), paths[1], *pixels[2:]],
    }
    for form, images in forms.items():
        np.testing.assert_array_equal(features(images), expected, err_msg=form)
    grey = pixels[..., 0]
    np.testing.assert_array_equal(features(grey), features(grey[..., None]))
    np.testing.assert_array_equal(features(grey > 99), features((grey > 99) * np.uint8(255)))


def test_range_of_other_numbers_is_learnt_and_kept():
    transformer = BackboneFeatures(**COMMON).fit(X)
    assert transformer.image_shape_ == (8, 8)
    assert transformer.value_range_ == (0.0, 16.0)
    dark = X[:5] / 4
    assert np.abs(transformer.transform(dark) - transformer.transform(X[:5])).max() > 0.01
    clipped = transformer.transform(np.where(X > 8, 16, X))
    np.testing.assert_array_equal(transformer.transform(np.where(X > 8, 99, X)), clipped)
    fixed = BackboneFeatures(value_range=(0, 16), **COMMON).fit(dark)
    np.testing.assert_array_equal(fixed.transform(X), transformer.transform(X))
    assert BackboneFeatures(**COMMON).fit(X / 20).value_range_ == (0.0, 1.0)
    whole = X.astype(int)
    np.testing.assert_array_equal(features(whole), features(X))


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (np.zeros((4, 30)), {}, "`image_shape` must be given for rows of 30 values"),
        (np.zeros((4, 30)), {"image_shape": (4, 8)}, "must hold the 30 values"),
        (np.zeros((4, 3, 8, 8)), {}, "the channels come last"),
        (np.full((4, 8, 8), np.nan), {}, "contains NaN"),
        (X, {"backbone": "demo:*"}, "names 8"),
        (X, {"value_range": (1, 1)}, "low < high"),
        (["nowhere.png"] * 3, {}, "nowhere.png"),
    ],
)
def test_errors_say_what_to_do(images, options, words):
    with pytest.raises(ValueError, match=words):
        BackboneFeatures(**COMMON).set_params(**options).fit_transform(images)


def test_transform_refuses_what_fit_did_not_see(tmp_path):
    numbers = BackboneFeatures(**COMMON).fit(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="must be uint8, as in fit"):
        numbers.transform(np.full((3, 8, 8), 7.5))
    with pytest.raises(ValueError, match="must hold images, as in fit"):
        BackboneFeatures(**COMMON).fit([Image.new("L", (8, 8))]).transform(np.zeros(64)[None])
    with pytest.raises(ValueError, match="there are none below"):
        numbers.transform(str(tmp_path))


def test_output_has_names():
    transformer = BackboneFeatures(**COMMON).set_output(transform="pandas")
    frame = transformer.fit_transform(pd.DataFrame(X[:4]))
    assert frame.shape == (4, 96)
    assert list(frame.columns[:2]) == ["backbonefeatures0", "backbonefeatures1"]


def test_network_of_ones_own():
    module = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())
    to_tensor = _ToTensor()
    found = features(X[:4], {"mine": (module, to_tensor)})
    assert found.shape == (4, 3)


class _ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255.0


def test_beside_other_columns(photos):
    files = [str(path) for path in image_files(photos)]
    table = pd.DataFrame({"path": files, "weight": np.arange(len(files))})
    both = make_column_transformer(
        (BackboneFeatures(**COMMON), "path"), ("passthrough", ["weight"])
    )
    found = both.fit_transform(table)
    assert found.shape == (36, 97)
    np.testing.assert_array_equal(found[:, -1], table["weight"])


def test_backbone_is_tuned_like_any_parameter(tmp_path):
    model = make_pipeline(
        BackboneFeatures(cache=tmp_path, device="cpu"), LogisticRegression(max_iter=2000)
    )
    grid = {"backbonefeatures__backbone": ["demo:vit_untrained", "demo:resnet_glyphs"]}
    search = GridSearchCV(model, grid, cv=2).fit(X, Y)
    assert search.best_params_ == {"backbonefeatures__backbone": "demo:resnet_glyphs"}
    scores = search.cv_results_["mean_test_score"]
    assert scores[1] > scores[0] + 0.2
    assert cross_val_score(search.best_estimator_, X, Y, cv=2).mean() == pytest.approx(scores[1])


def test_arrays_may_have_any_number_of_bands():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (24, 16, 16, 5), np.uint8)
    x = BackboneFeatures(**COMMON).fit_transform(X)
    changed = X.copy()
    changed[..., 4] = 0  # the last one counts
    assert np.abs(BackboneFeatures(**COMMON).fit_transform(changed) - x).max() > 0.01
    np.testing.assert_array_equal(BackboneFeatures(**COMMON).fit_transform(list(X)), x)
    dataset = open_dataset(X, labels=np.arange(24) % 2, bands="all")
    np.testing.assert_array_equal(BackboneFeatures(**COMMON).fit_transform(dataset), x)
    for mixed in ([*X, X[0, ..., :3]], [*X, X[0, ..., 0]]):
        with pytest.raises(ValueError, match="nothing but arrays of 5 channels"):
            BackboneFeatures(**COMMON).fit_transform(mixed)
