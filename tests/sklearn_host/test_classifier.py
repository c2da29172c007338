"""`BackboneClassifier`."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import timm
from scipy.sparse import csr_matrix
from sfda_tune_sklearn import BackboneClassifier
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

import sfda_tune
from sfda_tune import BackboneError
from sfda_tune.finetuning.models import load_model, predict

COMMON = {"finetune": False, "cache": False, "device": "cpu"}
X, Y = load_digits(return_X_y=True)
TRAIN, TEST = slice(0, 200), slice(200, 400)


@pytest.fixture(scope="module")
def fitted():
    model = BackboneClassifier("demo:resnet_*", random_state=0, **COMMON)
    return model.fit(X[TRAIN], Y[TRAIN])


def test_ranks_and_probes_the_winner(fitted):
    images = sfda_tune.open_dataset("digits").subset(np.arange(200))
    ranking = sfda_tune.rank(images, "demo:resnet_*", cache=False, device="cpu")
    assert fitted.ranking_.shortlist(2) == ranking.shortlist(2)
    assert fitted.backbone_ == ranking.shortlist(1)[0]
    x = [
        next(iter(sfda_tune.extract(part, sfda_tune.resolve_backbones(fitted.backbone_))))
        for part in (images, sfda_tune.open_dataset("digits").subset(np.arange(200, 400)))
    ]
    x = [extraction.features.x for extraction in x]
    rival = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    grid = GridSearchCV(
        rival, {"logisticregression__C": np.logspace(-4, 0, 5)}, scoring="neg_log_loss"
    ).fit(x[0], Y[TRAIN])
    p = fitted.predict_proba(X[TEST])
    assert p.shape == (200, 10)
    assert log_loss(Y[TEST], p) < 1.1 * log_loss(Y[TEST], grid.predict_proba(x[1]))
    assert fitted.score(X[TEST], Y[TEST]) > 0.85
    assert fitted.result_ is None


def test_saved_and_loaded_without_pickle(fitted, tmp_path, monkeypatch):
    folder = fitted.save(tmp_path / "saved")
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert files == {
        "classifier.json", "ranking.json",
        "model/config.json", "model/model.safetensors", "model/provenance.json",
    }  # fmt: skip
    moved = shutil.move(folder, tmp_path / "elsewhere")
    monkeypatch.setattr("pickle.load", None)
    monkeypatch.setattr("pickle.loads", None)
    opened = BackboneClassifier.load(moved)
    np.testing.assert_array_equal(opened.predict_proba(X[TEST]), fitted.predict_proba(X[TEST]))
    assert opened.predict(X[:3]).dtype == Y.dtype
    assert opened.get_params() == fitted.get_params()
    assert opened.backbone_ == fitted.backbone_
    assert dict(opened.ranking_) == dict(fitted.ranking_)
    assert opened.n_features_in_ == 64
    again = BackboneClassifier.load(opened.save(tmp_path / "again"))
    np.testing.assert_array_equal(again.predict_proba(X[:9]), fitted.predict_proba(X[:9]))
    bare = timm.create_model(f"local-dir:{moved}/model", pretrained=True)
    assert bare.num_classes == 10
    images = sfda_tune.open_dataset("digits").subset(np.arange(9))
    p = predict(load_model(moved / "model"), images, device="cpu")
    np.testing.assert_allclose(p, fitted.predict_proba(X[:9]), atol=1e-6)


def test_folder_must_hold_a_classifier(fitted, tmp_path):
    with pytest.raises(ValueError, match="written by BackboneClassifier"):
        BackboneClassifier.load(tmp_path)
    folder = fitted.save(tmp_path / "saved")
    state = json.loads((folder / "classifier.json").read_text())
    state["params"]["plugins"] = ["evil.py"]  # never run: the module does not exist
    (folder / "classifier.json").write_text(json.dumps(state))
    assert BackboneClassifier.load(folder).plugins == ()
    with pytest.raises(BackboneError, match=r"'evil\.py' could not be imported"):
        BackboneClassifier.load(folder, plugins="evil.py").predict(X[:1])


def test_only_what_has_a_name_can_be_saved(tmp_path):
    module = timm.create_model("test_resnet", num_classes=0)
    model = BackboneClassifier({"mine": module}, **COMMON).fit(X[:60], Y[:60])
    with pytest.raises(ValueError, match="backbones that are named"):
        model.save(tmp_path / "saved")


def test_folder_of_classes(photos, tmp_path):
    model = BackboneClassifier("demo:efficientnet*", **COMMON).fit(photos)
    assert model.classes_.tolist() == ["ant", "bee", "cat"]
    assert model.score(photos) > 0.9
    assert model.predict([str(photos / "bee" / "02.jpg")]).tolist() == ["bee"]
    opened = BackboneClassifier.load(model.save(tmp_path / "saved"))
    np.testing.assert_array_equal(opened.predict(photos), np.repeat(["ant", "bee", "cat"], 12))
    with (
        pytest.raises(ValueError, match="1 cannot be read, the first in row 1"),
        pytest.warns(UserWarning, match="nowhere"),
    ):
        model.predict([str(photos / "bee" / "02.jpg"), "nowhere.jpg"])


def test_works_where_classifiers_work():
    model = BackboneClassifier("demo:resnet_glyphs", random_state=0, **COMMON)
    assert clone(model).get_params() == model.get_params()
    assert cross_val_score(model, X[TRAIN].reshape(-1, 8, 8), Y[TRAIN], cv=2).min() > 0.75
    pipeline = make_pipeline(MinMaxScaler(), model)
    names = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "x", "y"])
    pipeline.fit(X[TRAIN], names[Y[TRAIN]])
    assert pipeline.score(X[TEST], names[Y[TEST]]) > 0.8
    grid = {"backbones": ["demo:vit_untrained", "demo:resnet_glyphs"]}
    search = GridSearchCV(model, grid, cv=2, refit=False).fit(X[:100], Y[:100])
    assert search.best_params_ == {"backbones": "demo:resnet_glyphs"}


def test_options_reach_the_ranking():
    options = {"metric": "knn", "samples": 50}
    model = BackboneClassifier("demo:resnet_*", options=options, **COMMON)
    model.fit(X[TRAIN], Y[TRAIN])
    assert model.ranking_.metric.startswith("knn")
    assert model.ranking_.info["n_samples"] == 50
    assert model.options == options


@pytest.mark.slow
def test_fine_tunes_the_best(tmp_path):
    pytest.importorskip("optuna")
    run = tmp_path / "run"
    options = {"epochs": 2, "keep": 2, "out": str(run)}
    model = BackboneClassifier(
        "demo:*glyphs", n_trials=3, options=options, cache=False, device="cpu", random_state=0
    ).fit(X[TRAIN], Y[TRAIN])
    assert model.score(X[TEST], Y[TEST]) > 0.9
    assert len(model.result_.trials) == 3
    assert model.backbone_ == model.result_.best["backbone"]
    assert (run / "search.json").is_file()
    opened = BackboneClassifier.load(model.save(tmp_path / "saved"))
    np.testing.assert_array_equal(opened.predict_proba(X[TEST]), model.predict_proba(X[TEST]))
    p = model.result_.predict(X[TEST].reshape(-1, 8, 8).astype(np.uint8), device="cpu")
    assert p.shape == (200, 10)


def test_own_parts_of_a_folder_are_used(photos, tmp_path):
    for part, some in (("Training", slice(8)), ("Testing", slice(8, 12))):
        for folder in photos.iterdir():
            (tmp_path / "data" / part / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[some]:
                shutil.copy(file, tmp_path / "data" / part / folder.name)
    options = {"epochs": 1, "keep": 1}
    model = BackboneClassifier("demo:resnet_noise", n_trials=1, options=options, cache=False)
    model.fit(tmp_path / "data")
    assert model.result_ is not None
    assert model.result_.summary["sources"]["test"] == "own part"
    assert model.result_.summary["n_images"]["test"] == 12


def test_groups_reach_the_ranking_and_the_search():
    groups = np.arange(200) // 4
    model = BackboneClassifier("demo:resnet_glyphs", **COMMON).fit(X[TRAIN], Y[TRAIN], groups)
    assert model.ranking_.info["groups"]["n"] == 50
    options = {"epochs": 1, "keep": 1}
    tuned = BackboneClassifier("demo:resnet_glyphs", n_trials=1, options=options, cache=False)
    tuned.fit(X[TRAIN], Y[TRAIN], groups=groups)
    assert tuned.ranking_.groups is not None
    with pytest.raises(ValueError, match="200 images and 3 groups"):
        model.fit(X[TRAIN], Y[TRAIN], groups=[1, 2, 3])


SMALL_ODD = np.stack([Y < 5, Y % 2 == 1, Y > 7], axis=1).astype(int)


@pytest.fixture(scope="module")
def several():
    model = BackboneClassifier("demo:resnet_*", random_state=0, **COMMON)
    return model.fit(X[TRAIN], SMALL_ODD[TRAIN])


def test_several_labels_per_image_are_named_by_their_thresholds(several, tmp_path):
    assert several.backbone_ == "demo:resnet_glyphs"
    assert several.ranking_.info["task"] == "multilabel"
    assert several.classes_.tolist() == [0, 1, 2]
    p, named = several.predict_proba(X[TEST]), several.predict(X[TEST])
    assert p.shape == named.shape == (200, 3)
    thresholds = np.array(several.model_.task.thresholds)
    assert len(set(thresholds)) == 3  # chosen, not .5
    assert list(thresholds) != several.model_.provenance["best"]["thresholds"]  # on others
    np.testing.assert_array_equal(named, p >= thresholds)
    right = (named == SMALL_ODD[TEST]).all(axis=1)
    assert several.score(X[TEST], SMALL_ODD[TEST]) == right.mean() > 0.6
    weight = np.arange(200)
    found = several.score(X[TEST], SMALL_ODD[TEST], sample_weight=weight)
    assert found == pytest.approx(np.average(right, weights=weight))
    opened = BackboneClassifier.load(several.save(tmp_path / "saved"))
    np.testing.assert_array_equal(opened.predict(X[TEST]), named)
    assert opened.classes_.tolist() == [0, 1, 2]


def test_labels_may_be_sparse_named_or_unknown():
    unknown = SMALL_ODD[TRAIN].astype(float)
    unknown[::7, 1] = np.nan
    model = BackboneClassifier("demo:resnet_glyphs", random_state=0, **COMMON)
    frame = pd.DataFrame(unknown, columns=["small", "odd", "large"])
    named = clone(model).fit(X[TRAIN], frame)
    assert named.classes_.tolist() == ["small", "odd", "large"]
    assert named.ranking_.info["label_counts"][1]["missing"] == 29
    rows = ~np.isnan(unknown).any(axis=1)
    expected = (named.predict(X[TRAIN]) == unknown)[rows].all(axis=1).mean()
    assert named.score(X[TRAIN], frame) == expected
    dense = clone(model).fit(X[:60], SMALL_ODD[:60])
    sparse = clone(model).fit(X[:60], csr_matrix(SMALL_ODD[:60]))
    np.testing.assert_array_equal(sparse.predict_proba(X[:9]), dense.predict_proba(X[:9]))
    bits = sfda_tune.open_dataset("digits", samples=60, task="multilabel")
    by_name = clone(model).fit(bits)
    assert by_name.classes_.tolist() == ["bit 1", "bit 2", "bit 4", "bit 8"]
    assert by_name.score(bits) == by_name.score(bits, bits.labels) > 0.5


def test_several_labels_work_where_classifiers_work():
    model = make_pipeline(
        MinMaxScaler(), BackboneClassifier("demo:resnet_glyphs", random_state=0, **COMMON)
    )
    Z, y = X[:100], SMALL_ODD[:100]
    assert cross_val_score(model, Z, y, cv=2).min() > 0.3
    p = cross_val_predict(model, Z, y, cv=2, method="predict_proba")
    assert average_precision_score(y, p) > 0.6


@pytest.mark.slow
def test_a_grid_of_backbones_for_several_labels():
    model = make_pipeline(
        MinMaxScaler(), BackboneClassifier("demo:resnet_glyphs", random_state=0, **COMMON)
    )
    Z, y = X[TRAIN], SMALL_ODD[TRAIN]
    assert cross_val_score(model, Z, y, cv=2, scoring="f1_macro").min() > 0.6
    grid = {"backboneclassifier__backbones": ["demo:resnet_noise", "demo:resnet_glyphs"]}
    search = GridSearchCV(model, grid, cv=2, scoring="average_precision").fit(Z, y)
    assert search.best_params_["backboneclassifier__backbones"] == "demo:resnet_glyphs"
    assert search.predict(Z[:5]).shape == (5, 3)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.eye(6)[:, :3] * 2, r"`y` must hold 0, 1 and NaN .* row 0, column 0 is 2"),
        (np.eye(6)[:, :3], "`y` must have a label that two images have and two do not"),
        (np.eye(5)[:, :3], r"inconsistent numbers of samples: \[6, 5\]"),
    ],
)
def test_what_is_no_indicator_matrix_is_refused(y, message):
    with pytest.raises(ValueError, match=message):
        BackboneClassifier(**COMMON).fit(np.zeros((6, 8, 8), np.uint8), y)


def test_few_images_of_each_label_are_named_from_half_on():
    y = np.zeros((12, 2), int)
    y[:2, 0] = y[2:4, 1] = 1  # none of them can be held out
    model = BackboneClassifier("demo:resnet_glyphs", **COMMON).fit(X[:12], y)
    assert model.model_.task.thresholds == ()
    np.testing.assert_array_equal(model.predict(X[:30]), model.predict_proba(X[:30]) >= 0.5)
    with pytest.raises(ValueError, match="a row in which all labels are known"):
        model.score(X[:2], [[0, np.nan], [np.nan, 1]])
    with pytest.raises(ValueError, match="must have several labels per image but is"):
        model.score(sfda_tune.open_dataset("digits", samples=20))


@pytest.mark.slow
def test_several_labels_are_fine_tuned():
    pytest.importorskip("optuna")
    options = {"epochs": 1, "keep": 1}
    model = BackboneClassifier("demo:resnet_glyphs", n_trials=1, options=options, cache=False)
    model.fit(X[TRAIN], SMALL_ODD[TRAIN], groups=np.arange(200) // 2)
    assert set(model.result_.test) == {"map", "macro_f1", "log_loss"}
    assert list(model.model_.task.thresholds) == [
        label["threshold"] for label in model.result_.best["labels"]
    ]
    assert model.score(X[TEST], SMALL_ODD[TEST]) > 0.5


def test_arrays_of_many_bands(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 128, (40, 16, 16, 5), np.uint8), np.arange(40) % 2
    images[labels == 1, :, 8:, 4] += 127
    model = BackboneClassifier("demo:resnet_glyphs", **COMMON).fit(images, labels)
    assert model.score(images, labels) > 0.9
    with pytest.raises(ValueError, match="must have 5 channels"):
        model.predict(images[..., :3])
    model.save(tmp_path / "model")
    again = BackboneClassifier.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict(images[:4]), model.predict(images[:4]))
