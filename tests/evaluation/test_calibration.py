"""Calibration undoes what spoilt the probabilities; reliability measures it."""

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.special import softmax
from sklearn.metrics import (
    log_loss,
)

from evaluation import (
    Calibration,
    fit_calibration,
    reliability,
    wilson_interval,
)
from tests.evaluation.cases import predictions, simulated


def drawn_from(logits, seed=0):
    """Labels drawn from the softmax of the logits."""
    noise = np.random.default_rng(seed).gumbel(size=logits.shape)
    return (logits + noise).argmax(axis=1)


def test_the_temperature_and_bias_that_spoilt_the_probabilities_are_found():
    true_logits = np.random.default_rng(1).normal(0, 1.5, (20_000, 3))
    y_true = drawn_from(true_logits)
    shift = np.array([1.0, 0.0, -1.0])
    calibration = fit_calibration(y_true, softmax(2.5 * true_logits + shift, axis=1))
    assert calibration.temperature == pytest.approx(2.5, rel=0.05)
    assert calibration.bias == pytest.approx(-shift / 2.5, abs=0.05)
    calibrated = calibration.apply(softmax(2.5 * true_logits + shift, axis=1))
    assert calibrated == pytest.approx(softmax(true_logits, axis=1), abs=0.03)
    before = reliability(y_true, softmax(2.5 * true_logits + shift, axis=1))
    after = reliability(y_true, calibrated)
    assert before["expected_calibration_error"] > 0.1
    assert after["expected_calibration_error"] < 0.02


@settings(deadline=None, max_examples=50)
@given(predictions())
def test_calibration_is_finite_and_makes_its_images_no_less_likely(case):
    y_true, y_prob, names = case
    y_prob = (y_prob + 0.01) / (y_prob + 0.01).sum(axis=1, keepdims=True)
    calibration = fit_calibration(y_true, y_prob)
    calibrated = calibration.apply(y_prob)
    assert np.isfinite(calibrated).all() and calibrated.sum(axis=1) == pytest.approx(1)
    assert 0.04 < calibration.temperature < 21
    assert sum(calibration.bias) == pytest.approx(0, abs=1e-6)
    labels = range(len(names))
    before, after = (log_loss(y_true, p, labels=labels) for p in (y_prob, calibrated))
    assert after <= before + 1e-6


def test_a_calibration_without_bias_changes_no_prediction():
    y_prob = np.random.default_rng(0).dirichlet(np.ones(5), 200)
    calibrated = Calibration(3.0, (0.0,) * 5).apply(y_prob)
    assert (calibrated.argmax(axis=1) == y_prob.argmax(axis=1)).all()
    assert (calibrated.max(axis=1) < y_prob.max(axis=1)).all()


def test_without_shifted_priors_only_the_temperature_is_fitted():
    y_true, y_prob = simulated(300, 0.7, seed=7)
    calibration = fit_calibration(y_true, 0.9 * y_prob + 0.1 / 3, priors_shifted=False)
    assert calibration.bias == (0, 0, 0)
    assert calibration.temperature > 1


def test_reliability_of_a_small_case_counted_by_hand():
    y_prob = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [1.0, 0.0]]
    found = reliability([0, 1, 0, 0], y_prob)
    assert found["count"] == [0] * 8 + [1] + [0] * 4 + [2, 1]
    assert found["confidence"][8] == pytest.approx(0.6) and found["accuracy"][8] == 1
    assert found["confidence"][13] == pytest.approx(0.9) and found["accuracy"][13] == 0.5
    assert found["accuracy"][0] is None
    assert found["expected_calibration_error"] == pytest.approx((0.4 + 2 * 0.4 + 0) / 4)
    assert found["maximum_calibration_error"] == pytest.approx(0.4)


def test_bins_of_equal_count_have_as_many_images_each_with_wilsons_intervals():
    confidence = np.linspace(0.5, 0.9, 40)
    is_right = np.arange(40) % 10 < 7
    order = np.random.default_rng(0).permutation(40)
    y_prob = np.stack([confidence, 1 - confidence], axis=1)[order]
    found = reliability((~is_right).astype(int)[order], y_prob)["equal_count_bins"]
    assert found["count"] == [10] * 4
    assert found["confidence"] == pytest.approx(confidence.reshape(4, 10).mean(axis=1))
    assert found["accuracy"] == pytest.approx([0.7] * 4)
    assert found["accuracy_interval"] == [pytest.approx(wilson_interval(7, 10))] * 4


def test_images_of_equal_probability_share_a_bin_of_equal_count():
    y_prob = np.full((100, 2), 0.5)
    y_prob[:15] = [0.9, 0.1]
    found = reliability(np.arange(100) % 2, y_prob)["equal_count_bins"]
    assert found["count"] == [85, 15]
    assert found["confidence"] == pytest.approx([0.5, 0.9])
    assert found["accuracy"] == pytest.approx([42 / 85, 8 / 15])


def test_there_are_ten_bins_of_equal_count_at_most_and_one_for_a_single_image():
    y_true, y_prob = np.zeros(3007, int), np.random.default_rng(0).dirichlet(np.ones(3), 3007)
    counts = reliability(y_true, y_prob)["equal_count_bins"]["count"]
    assert len(counts) == 10 and set(counts) == {300, 301}
    assert reliability(y_true[:1], y_prob[:1])["equal_count_bins"]["count"] == [1]


def test_copies_of_an_image_make_the_interval_of_a_bin_no_narrower():
    y_true, y_prob = np.array([0, 0, 1, 0, 1]), np.linspace([0.6, 0.4], [0.9, 0.1], 5)
    once = reliability(y_true, y_prob)["equal_count_bins"]
    copies = np.repeat(y_true, 3), np.repeat(y_prob, 3, axis=0)
    thrice = reliability(*copies, groups=np.repeat(np.arange(5), 3))["equal_count_bins"]
    assert thrice["count"] == [15]
    np.testing.assert_allclose(thrice["accuracy_interval"], once["accuracy_interval"])


def test_reliability_is_that_of_the_class_decided_for():
    y_prob = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    found = reliability([0, 0, 1], y_prob, y_pred=[0, 0, 1])
    assert found["count"][2] == 1 and found["confidence"][2] == pytest.approx(0.2)
    assert found["accuracy"][2] == 1  # right, though the other class is more probable
    assert found["expected_calibration_error"] == pytest.approx((0.1 + 0.8 + 0.3) / 3)
