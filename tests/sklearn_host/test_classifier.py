"""`BackboneClassifier`."""

import json
import shutil

import numpy as np
import pytest
import timm
from sfda_tune_sklearn import BackboneClassifier
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

import sfda_tune
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


def test_indicator_matrices_are_refused_with_the_way_to_go():
    images, y = np.zeros((6, 8, 8), np.uint8), np.eye(6)[:, :3].astype(int)
    with pytest.raises(ValueError, match=r"has the shape \(6, 3\); .*task='multilabel'"):
        BackboneClassifier().fit(images, y)
