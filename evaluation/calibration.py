"""Calibration of probabilities by temperature and bias, and how reliable they are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from evaluation.intervals import interval_of_share, number_groups
from evaluation.metrics import check_predictions

NUM_BINS = 15  # of the calibration errors, equal in width, as in Guo et al. 2017
MAX_EQUAL_COUNT_BINS = 10
MIN_IMAGES_IN_BIN = 10  # of equal count, but for images of equal probability


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
    y_true: np.ndarray,
    y_prob: np.ndarray,
    y_pred: np.ndarray | None = None,
    groups: ArrayLike | None = None,
) -> dict[str, Any]:
    """Returns how far the probabilities of the predicted classes are from how often they are right.

    In `NUM_BINS` equal bins of that probability: `confidence`, its mean, `accuracy`, both None in
    an empty bin, and `count`; over all bins `expected_calibration_error`, the mean of
    |accuracy - confidence| weighted by count, and `maximum_calibration_error`, the largest.

    `equal_count_bins` has the same in at most `MAX_EQUAL_COUNT_BINS` bins of about as many images
    each, and Wilson's 95 % intervals of their accuracies, `accuracy_interval`. Images of equal
    probability share a bin; in the intervals those of equal `groups` (N,) count as one observation.
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
        "equal_count_bins": _equal_count_bins(confidence, is_right, groups),
    }


def _equal_count_bins(
    confidence: np.ndarray, is_right: np.ndarray, groups: ArrayLike | None
) -> dict[str, list[Any]]:
    group = number_groups(groups, len(confidence))
    num_bins = int(np.clip(len(confidence) // MIN_IMAGES_IN_BIN, 1, MAX_EQUAL_COUNT_BINS))
    last = [part[-1] for part in np.array_split(np.sort(confidence), num_bins)]
    bins = np.searchsorted(np.unique(last), confidence)  # each is closed above
    parts = [bins == index for index in range(bins.max() + 1)]
    return {
        "confidence": [float(confidence[part].mean()) for part in parts],
        "accuracy": [float(is_right[part].mean()) for part in parts],
        "accuracy_interval": [interval_of_share(is_right[part], group[part]) for part in parts],
        "count": [int(part.sum()) for part in parts],
    }


def _log(y_prob: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(y_prob, 1e-12))
