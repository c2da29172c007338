"""scikit-learn: images to features for any model, and backbone selection as an estimator.

>>> from sfda_tune_sklearn import BackboneClassifier, BackboneFeatures, BackboneRegressor

====================  =========================================================================
`BackboneFeatures`    transformer: images → features of one backbone, in front of any model
`BackboneClassifier`  classifier: ranks the backbones, then trains the best ones or their heads
`BackboneRegressor`   the same for numbers to predict
====================  =========================================================================

All take arrays of images, flattened images as `load_digits` gives them, PIL images, encoded
bytes, paths, or a folder; `sfda_tune_sklearn.images` has the rules.
"""

from __future__ import annotations

from sfda_tune_sklearn.classifier import BackboneClassifier
from sfda_tune_sklearn.features import BackboneFeatures
from sfda_tune_sklearn.regressor import BackboneRegressor

__all__ = ["BackboneClassifier", "BackboneFeatures", "BackboneRegressor"]
