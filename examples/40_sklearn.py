"""scikit-learn: backbone features in a pipeline, and the backbone chosen by a classifier.

`BackboneFeatures` turns images into features for any model, and `GridSearchCV` may choose its
backbone. `BackboneClassifier` ranks all backbones, tunes and fine-tunes the best ones; it is saved
without pickle.
"""

import argparse
import tempfile

from sfda_tune_sklearn import BackboneClassifier, BackboneFeatures
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

NAMES = ["demo:resnet_glyphs", "demo:convnext_glyphs", "demo:regnet_shapes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="fewer images, no fine-tuning")
    smoke = parser.parse_args().smoke
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(
        X, y, train_size=150 if smoke else 400, test_size=300, stratify=y, random_state=0
    )
    raw = KNeighborsClassifier(1).fit(X, y)
    print(f"nearest neighbour on pixels: {raw.score(X_test, y_test):.3f}")

    grid = {"backbonefeatures__backbone": NAMES, "svc__C": [1, 10]}
    search = GridSearchCV(make_pipeline(BackboneFeatures(), SVC()), grid, cv=3)
    search.fit(X, y)  # each backbone sees each image once: features are cached
    print(f"features and a support vector machine: {search.score(X_test, y_test):.3f}")
    print(f"  with {search.best_params_}")

    model = BackboneClassifier("demo:*", finetune=not smoke, n_trials=6, random_state=0)
    model.fit(X, y)
    print(model.ranking_)
    print(f"{model.backbone_}: {model.score(X_test, y_test):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        again = BackboneClassifier.load(model.save(folder))
        print(f"saved and loaded: {again.score(X_test, y_test):.3f}")


if __name__ == "__main__":
    main()
