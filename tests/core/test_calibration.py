"""Temperatures and calibration errors, of classifiers whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from sfda_tune.finetuning.calibration import (
    apply_temperature,
    calibrate_on_test,
    calibration_error,
    fit_temperature,
)


def classifier(temperature, n=20_000, n_classes=5, seed=0):
    """Labels drawn from softmax(z), and a classifier with the logits `temperature` z."""
    rng = np.random.default_rng(seed)
    z = 2 * rng.normal(size=(n, n_classes))
    labels = (softmax(z, axis=1).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return labels, softmax(temperature * z, axis=1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_the_temperature_of_a_known_classifier_is_found(temperature):
    labels, p = classifier(temperature)
    found = fit_temperature(labels, p)
    assert found == pytest.approx(temperature, rel=0.05)
    test_labels, q = classifier(temperature, seed=1)
    c = calibrate_on_test(test_labels, q, found, len(labels))
    assert c["ece_after"] < 0.015
    assert c["log_loss_after"] <= c["log_loss_before"] + 1e-4
    if temperature != 1.0:
        assert c["ece_before"] > 5 * c["ece_after"]
    assert (apply_temperature(q, found).argmax(1) == q.argmax(1)).all()
    np.testing.assert_allclose(apply_temperature(q, temperature), classifier(1.0, seed=1)[1])


def test_the_calibration_error_by_its_definition():
    labels, p = classifier(2.0, n=300)
    error, bins = calibration_error(labels, p)
    total, sure = 0.0, p.max(axis=1)
    for b in range(15):
        inside = [i for i in range(300) if min(int(sure[i] * 15), 14) == b]
        right = sum(p[i].argmax() == labels[i] for i in inside)
        total += abs(sum(sure[i] for i in inside) - right)
    assert error == pytest.approx(total / 300)
    assert sum(n for *_, n in bins) == 300


def test_certainty_and_many_images_are_no_trouble():
    p = np.eye(3)[[0, 1, 2, 0]]
    assert np.isfinite(fit_temperature(np.array([0, 1, 2, 1]), p))
    all_right = np.array([[0.8, 0.2], [0.4, 0.6]])
    assert fit_temperature(np.array([0, 1]), all_right) == 1  # of which 1/20 would be the best
    assert calibration_error(np.array([0, 1, 2, 0]), p)[0] == 0.0
    labels, p = classifier(2.0, n=500_000)  # every second is taken
    assert fit_temperature(labels, p) == pytest.approx(2.0, rel=0.02)
