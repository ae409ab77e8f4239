"""Calibration of probabilities by temperature and bias, and how reliable they are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from evaluation.metrics import check_predictions

NUM_BINS = 15  # of a reliability curve, as in Guo et al. 2017


@dataclass(frozen=True)
class Calibration:
    """Turns a model's probabilities into calibrated ones: softmax(log(p) / temperature + bias).

    A temperature above 1 lowers the confidence (Guo et al. 2017); a bias for each class undoes
    priors that balanced sampling has shifted (Alexandari et al. 2020).
    """

    temperature: float
    bias: tuple[float, ...]

    def apply(self, y_prob: np.ndarray) -> np.ndarray:
        """Returns the calibrated probabilities (N, C) of a model's own."""
        return softmax(_log(y_prob) / self.temperature + np.array(self.bias), axis=1)


def fit_calibration(
    y_true: np.ndarray, y_prob: np.ndarray, *, priors_shifted: bool = True
) -> Calibration:
    """Returns the calibration under which the labels of the validation images are most likely.

    On training images a model is overconfident. Balanced sampling and class weights shift the
    priors; without `priors_shifted` the biases stay 0. A weak prior (standard deviation 3) keeps
    the bias of a class without images finite.
    """
    num_classes = np.asarray(y_prob).shape[-1]
    y_true, y_prob, _ = check_predictions(y_true, y_prob, num_classes)
    log_prob = _log(y_prob)
    truth = np.eye(num_classes)[y_true]

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        inverse, bias = np.exp(-parameters[0]), parameters[1:]
        log_calibrated = log_softmax(log_prob * inverse + bias, axis=1)
        loss = -(truth * log_calibrated).sum() + (bias**2).sum() / (2 * 3**2)
        residual = np.exp(log_calibrated) - truth
        of_temperature = -(residual * log_prob).sum() * inverse
        of_bias = (residual.sum(axis=0) + bias / 3**2) * priors_shifted
        return loss, np.concatenate([[of_temperature], of_bias])

    start = np.zeros(num_classes + 1)
    bounds = [(-3.0, 3.0), *[(None, None)] * num_classes]  # temperatures from 1/20 to 20
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds)
    bias = found.x[1:] - found.x[1:].mean()
    return Calibration(float(np.exp(found.x[0])), tuple(bias.tolist()))


def reliability(
    y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray | None = None
) -> dict[str, Any]:
    """Returns how far the probabilities of the predicted classes are from how often they are right.

    In `NUM_BINS` equal bins of that probability: `confidence`, its mean, `accuracy`, both None in
    an empty bin, and `count`; over all bins `expected_calibration_error`, the mean of
    |accuracy - confidence| weighted by count, and `maximum_calibration_error`, the largest.
    """
    num_classes = np.asarray(y_prob).shape[-1]
    y_true, y_prob, y_pred = check_predictions(y_true, y_prob, num_classes, y_pred)
    confidence, is_right = y_prob[np.arange(len(y_pred)), y_pred], y_pred == y_true
    # Bins are closed above, so that a probability of 1 is in the last.
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    means = [
        np.bincount(bins, weights=values, minlength=NUM_BINS) / np.maximum(count, 1)
        for values in (confidence, is_right)
    ]
    gaps = np.abs(means[0] - means[1])
    confidences, accuracies = np.where(count > 0, means, np.array(None)).tolist()
    return {
        "confidence": confidences,
        "accuracy": accuracies,
        "count": count.tolist(),
        "expected_calibration_error": float(np.average(gaps, weights=count)),
        "maximum_calibration_error": float(gaps.max()),
    }


def _log(y_prob: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(y_prob, 1e-12))
