"""What a set of predictions is worth, from true labels, probabilities and class names.

Everywhere `y_true` is int (N,), labels from 0 to C - 1; `y_prob` float (N, C), a probability for
each class, of which the highest is the prediction; `class_names` the C names in label order. All of
it raises ValueError for no predictions, shapes that do not fit, labels out of range, or
probabilities that are not finite.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    cohen_kappa_score,
    confusion_matrix,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)

# Those of `compute_metrics` that have an interval.
HEADLINES = (
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "f1",
    "macro_precision",
    "macro_recall",
    "macro_f1",
)
NUM_RESAMPLES = 2000
NUM_BINS = 15  # of a reliability curve, as in Guo et al. 2017
MALIGNANT = ("melanoma", "basal cell carcinoma", "squamous cell carcinoma", "actinic keratosis")


def compute_metrics(
    y_true: np.ndarray, y_prob: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """The figures of a set of predictions, by name, as plain values.

    Returns
    -------
    dict with `accuracy`; `balanced_accuracy`, the mean recall of the classes that have images;
    `top_2_accuracy`, the share of images whose class is among the two most probable;
    `precision`, `recall` and `f1`, weighted by the classes' numbers of images; `macro_precision`,
    `macro_recall`, `macro_f1`, `macro_roc_auc` and `macro_average_precision`, plain means;
    `cohen_kappa` and `matthews_corrcoef`, from -1 to 1; `log_loss`, the mean of
    -log(probability of the true class); `brier_score`, the mean squared distance of the
    probabilities from the truth, from 0 to 2 (Brier 1950); `per_class`, by class name `precision`,
    `recall`, `specificity`, `f1`, `roc_auc`, `average_precision` (of the class against the rest)
    and `support`; `confusion_matrix`, counts as lists, a row a true class.

    A class that is never predicted has precision 0. A class without images has None for its figures
    and is left out of the means, and so are areas of a class that all images have.
    """
    y_true, y_prob = _checked(y_true, y_prob, len(class_names))
    y_pred = y_prob.argmax(axis=1)
    labels = np.arange(len(class_names))
    precision, recall, f1, support = precision_recall_fscore_support(
        y_true, y_pred, labels=labels, zero_division=0
    )
    present = support > 0
    roc_auc, average_precision = _areas(y_true, y_prob)
    per_class = {
        "precision": precision,
        "recall": recall,
        "specificity": _specificity(y_true, y_pred, labels),
        "f1": f1,
        "roc_auc": roc_auc,
        "average_precision": average_precision,
    }
    probability_of_truth = y_prob[np.arange(len(y_true)), y_true]
    smallest = np.finfo(y_prob.dtype).eps  # log 0 would make one image decide all
    metrics: dict[str, Any] = {
        "accuracy": float(accuracy_score(y_true, y_pred)),
        "balanced_accuracy": float(recall[present].mean()),
        "top_2_accuracy": float(_is_among_top_2(y_true, y_prob).mean()),
        "cohen_kappa": _or_0(cohen_kappa_score, y_true, y_pred),
        "matthews_corrcoef": _or_0(matthews_corrcoef, y_true, y_pred),
        "log_loss": float(-np.log(np.maximum(probability_of_truth, smallest)).mean()),
        "brier_score": float(((y_prob - np.eye(len(labels))[y_true]) ** 2).sum(axis=1).mean()),
    }
    for name in ("precision", "recall", "f1"):
        metrics[name] = float(np.average(per_class[name], weights=support))
    for name in ("precision", "recall", "f1", "roc_auc", "average_precision"):
        known = per_class[name][present & np.isfinite(per_class[name])]
        metrics[f"macro_{name}"] = float(known.mean()) if len(known) else None
    metrics["per_class"] = {
        class_name: {
            name: float(values[label]) if present[label] and np.isfinite(values[label]) else None
            for name, values in per_class.items()
        }
        | {"support": int(support[label])}
        for label, class_name in enumerate(class_names)
    }
    metrics["confusion_matrix"] = confusion_matrix(y_true, y_pred, labels=labels).tolist()
    return metrics


def compute_intervals(
    y_true: np.ndarray,
    y_prob: np.ndarray,
    class_names: Sequence[str],
    groups: Sequence[Any] | None = None,
    *,
    seed: int = 42,
) -> dict[str, Any]:
    """95 % intervals of the figures of `compute_metrics`, by the same names, as [low, high].

    The headline figures by percentile bootstrap (Efron 1979), 2,000 resamples of whole groups:
    images with equal `groups` (N,), such as those of one lesion, are drawn together. A class's
    recall and precision by Wilson's score interval (1927), under `per_class`; None where nothing
    was counted.
    """
    y_true, y_prob = _checked(y_true, y_prob, len(class_names))
    counts = _resampled_confusions(y_true, y_prob, groups, seed)
    intervals: dict[str, Any] = {
        name: np.quantile(values, [0.025, 0.975]).tolist()
        for name, values in _headlines(counts).items()
    }
    observed = _confusion(y_true, y_prob)
    intervals["per_class"] = {
        name: {
            "precision": wilson_interval(observed[label, label], observed[:, label].sum()),
            "recall": wilson_interval(observed[label, label], observed[label].sum()),
        }
        for label, name in enumerate(class_names)
    }
    return intervals


def compare(
    y_true: np.ndarray,
    y_prob_a: np.ndarray,
    y_prob_b: np.ndarray,
    groups: Sequence[Any] | None = None,
    *,
    seed: int = 42,
) -> dict[str, dict[str, Any]]:
    """By how much model A is better than model B on these images, for each headline figure.

    Paired bootstrap: both are measured on the same resamples of whole groups. Gives `difference`
    (A - B), its 95 % `interval`, and `probability`, the share of resamples in which A is better,
    ties counted half.
    """
    num_classes = np.asarray(y_prob_a).shape[-1]
    y_true, y_prob_a = _checked(y_true, y_prob_a, num_classes)
    y_true, y_prob_b = _checked(y_true, y_prob_b, num_classes)
    resampled = [
        _headlines(_resampled_confusions(y_true, y_prob, groups, seed))
        for y_prob in (y_prob_a, y_prob_b)
    ]
    observed = [_headlines(_confusion(y_true, y_prob)[None]) for y_prob in (y_prob_a, y_prob_b)]
    compared = {}
    for name in HEADLINES:
        differences = resampled[0][name] - resampled[1][name]
        compared[name] = {
            "difference": float(observed[0][name][0] - observed[1][name][0]),
            "interval": np.quantile(differences, [0.025, 0.975]).tolist(),
            "probability": float(np.mean((differences > 0) + 0.5 * (differences == 0))),
        }
    return compared


def wilson_interval(successes: int, total: int) -> list[float] | None:
    """Wilson's 95 % score interval of a share, [low, high]; None of nothing.

    With the share p of n and z = 1.96, (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n).
    """
    if total == 0:
        return None
    share, z = successes / total, 1.959964  # the normal distribution's 97.5 % quantile
    centre = share + z**2 / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = (centre - half) / (1 + z**2 / total), (centre + half) / (1 + z**2 / total)
    return [float(max(low, 0)), float(min(high, 1))]


# ---------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Calibration:
    """Turns a model's probabilities into calibrated ones: softmax(log(p) / temperature + bias).

    A temperature above 1 makes them less sure (Guo et al. 2017); `bias` has a number for each
    class, which undoes priors that balanced sampling has shifted (Alexandari et al. 2020).
    """

    temperature: float
    bias: tuple[float, ...]

    def apply(self, y_prob: np.ndarray) -> np.ndarray:
        return softmax(_log(y_prob) / self.temperature + np.array(self.bias), axis=1)


def fit_calibration(y_true: np.ndarray, y_prob: np.ndarray) -> Calibration:
    """The calibration that makes these images most likely, which are those of validation.

    Never those of training, on which a model is surer than it should be. A weak prior (standard
    deviation 3) keeps the bias of a class without images finite.
    """
    y_true, y_prob = _checked(y_true, y_prob, np.asarray(y_prob).shape[-1])
    log_prob, num_classes = _log(y_prob), y_prob.shape[1]
    truth = np.eye(num_classes)[y_true]

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        inverse, bias = np.exp(-parameters[0]), parameters[1:]
        log_calibrated = log_softmax(log_prob * inverse + bias, axis=1)
        loss = -(truth * log_calibrated).sum() + (bias**2).sum() / (2 * 3**2)
        residual = np.exp(log_calibrated) - truth
        of_temperature = -(residual * log_prob).sum() * inverse
        of_bias = residual.sum(axis=0) + bias / 3**2
        return loss, np.concatenate([[of_temperature], of_bias])

    start = np.zeros(num_classes + 1)
    bounds = [(-3.0, 3.0), *[(None, None)] * num_classes]  # temperatures from 1/20 to 20
    found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", bounds=bounds)
    bias = found.x[1:] - found.x[1:].mean()
    return Calibration(float(np.exp(found.x[0])), tuple(bias.tolist()))


def reliability(y_true: np.ndarray, y_prob: np.ndarray) -> dict[str, Any]:
    """How far the probability of the predicted class is from how often it is right.

    In 15 equal bins of that probability (Guo et al. 2017): `confidence`, its mean in each bin,
    `accuracy`, None for both in an empty one, and `count`; over the bins
    `expected_calibration_error`, the mean of |accuracy - confidence| weighted by count, and
    `maximum_calibration_error`, the largest.
    """
    y_true, y_prob = _checked(y_true, y_prob, np.asarray(y_prob).shape[-1])
    confidence, is_right = y_prob.max(axis=1), y_prob.argmax(axis=1) == y_true
    # Bins are closed above, so that a probability of 1 is in the last.
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    means = [
        np.bincount(bins, weights=values, minlength=NUM_BINS) / np.maximum(count, 1)
        for values in (confidence, is_right)
    ]
    gaps = np.abs(means[0] - means[1])

    def without_empty(values: np.ndarray) -> list[float | None]:
        return [float(v) if n > 0 else None for v, n in zip(values, count, strict=True)]

    return {
        "confidence": without_empty(means[0]),
        "accuracy": without_empty(means[1]),
        "count": count.tolist(),
        "expected_calibration_error": float(np.average(gaps, weights=count)),
        "maximum_calibration_error": float(gaps.max()),
    }


def _log(y_prob: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(y_prob, 1e-12))


# ---------------------------------------------------------------------------- screening


def match_classes(class_names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """The labels of the classes that are called like one of `wanted`.

    Case, `_`, `-` and a plural s make no difference. Raises ValueError when none is.
    """
    names = {_plain(name) for name in wanted}
    labels = [label for label, name in enumerate(class_names) if _plain(name) in names]
    if not labels:
        raise ValueError(
            f"none of the classes {', '.join(class_names)} is called like {', '.join(wanted)}"
        )
    return labels


def _plain(name: str) -> str:
    words = name.casefold().replace("_", " ").replace("-", " ").split()
    return " ".join(word.removesuffix("s") for word in words)


def screen(
    is_positive: np.ndarray,
    score: np.ndarray,
    valid_is_positive: np.ndarray,
    valid_score: np.ndarray,
    groups: Sequence[Any] | None = None,
    *,
    seed: int = 42,
) -> dict[str, Any]:
    """How well a score, higher for what must not be missed, tells it from the rest.

    All are arrays (N,), of the images tested and of those of validation, on which the thresholds
    are chosen. Gives `roc_auc` with its `roc_auc_interval` (bootstrap over `groups`), and `points`:
    for 90 % and 95 % of sensitivity or of specificity `aim`, `threshold`, the `sensitivity` and
    `specificity` that it has on the images tested, and their Wilson intervals. A point is the
    threshold that reaches its aim on validation with the best of the other; `score >= threshold`
    is positive.

    Raises ValueError when one of the two kinds is missing, in the test or in validation.
    """
    is_positive, valid_is_positive = (np.asarray(a, bool) for a in (is_positive, valid_is_positive))
    score, valid_score = np.asarray(score, float), np.asarray(valid_score, float)
    for name, values in {"test": is_positive, "validation": valid_is_positive}.items():
        if values.all() or not values.any():
            raise ValueError(f"the {name} images are all of one kind; nothing can be told apart")
    rank = np.unique(score, return_inverse=True)[1]
    areas = [
        _roc_auc(np.bincount(rank, times * is_positive), np.bincount(rank, times * ~is_positive))
        for times in _resampled_times(is_positive, groups, seed)
    ]
    points = []
    for aim in ("sensitivity", "specificity"):
        for level in (0.90, 0.95):
            threshold = _threshold(valid_is_positive, valid_score, aim, level)
            points.append(
                {"aim": f"{aim} {level:.0%}", "threshold": threshold}
                | _sensitivity_and_specificity(is_positive, score >= threshold)
            )
    return {
        "roc_auc": _roc_auc(np.bincount(rank, is_positive), np.bincount(rank, ~is_positive)),
        "roc_auc_interval": np.nanquantile(areas, [0.025, 0.975]).tolist(),
        "positives": int(is_positive.sum()),
        "negatives": int((~is_positive).sum()),
        "points": points,
    }


def _roc_auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The area from the numbers of both at each score, lowest first; NaN where one kind lacks.

    It is the share of pairs of a positive and a negative in which the positive has the higher
    score, ties counted half (Mann and Whitney 1947).
    """
    pairs = positives.sum() * negatives.sum()
    won = positives @ (np.cumsum(negatives) - negatives / 2)
    return float(won / pairs) if pairs > 0 else np.nan


def _threshold(is_positive: np.ndarray, score: np.ndarray, aim: str, level: float) -> float:
    if aim == "sensitivity":  # the highest that still calls enough of the positives positive
        ranked = np.sort(score[is_positive])[::-1]
        return float(ranked[int(np.ceil(level * len(ranked) - 1e-9)) - 1])
    # The lowest that still leaves enough of the negatives negative.
    ranked = np.sort(score[~is_positive])
    highest_negative = ranked[int(np.ceil(level * len(ranked) - 1e-9)) - 1]
    return float(np.nextafter(highest_negative, np.inf))


def _sensitivity_and_specificity(is_positive: np.ndarray, is_called: np.ndarray) -> dict[str, Any]:
    found, rejected = (is_called & is_positive).sum(), (~is_called & ~is_positive).sum()
    positives, negatives = is_positive.sum(), (~is_positive).sum()
    return {
        "sensitivity": float(found / positives),
        "sensitivity_interval": wilson_interval(found, positives),
        "specificity": float(rejected / negatives),
        "specificity_interval": wilson_interval(rejected, negatives),
    }


# ---------------------------------------------------------------------------- the bootstrap


def _resampled_confusions(
    y_true: np.ndarray, y_prob: np.ndarray, groups: Sequence[Any] | None, seed: int
) -> np.ndarray:
    """The confusion matrix of each resample, (NUM_RESAMPLES, C, C)."""
    resamples = _resampled_times(y_true, groups, seed)
    return np.stack([_confusion(y_true, y_prob, times) for times in resamples])


def _resampled_times(
    y_true: np.ndarray, groups: Sequence[Any] | None, seed: int
) -> Iterator[np.ndarray]:
    """How often each image (N,) is drawn, for each of the NUM_RESAMPLES resamples of groups."""
    groups = np.arange(len(y_true)) if groups is None else np.asarray(groups)
    if groups.shape != y_true.shape:
        raise ValueError(f"groups has shape {groups.shape}; it must be {y_true.shape}")
    group_of_image = np.unique(groups, return_inverse=True)[1]
    num_groups = group_of_image.max() + 1
    rng = np.random.default_rng(seed)
    for _ in range(NUM_RESAMPLES):
        drawn = rng.integers(num_groups, size=num_groups)
        yield np.bincount(drawn, minlength=num_groups)[group_of_image]


def _confusion(
    y_true: np.ndarray, y_prob: np.ndarray, times: np.ndarray | None = None
) -> np.ndarray:
    """The confusion matrix (C, C) when each image counts as often as `times` (N,) says."""
    num_classes = y_prob.shape[1]
    cells = y_true * num_classes + y_prob.argmax(axis=1)
    counts = np.bincount(cells, weights=times, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def _headlines(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """The headline figures of confusion matrices (R, C, C), each (R,)."""
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    support, predicted = confusions.sum(axis=2), confusions.sum(axis=1)
    per_class = {
        "precision": hits / np.maximum(predicted, 1),
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + predicted, 1),
    }
    total, present = support.sum(axis=1), support > 0
    headlines = {"accuracy": hits.sum(axis=1) / total}
    for name, values in per_class.items():
        headlines[name] = (values * support).sum(axis=1) / total
        headlines[f"macro_{name}"] = (values * present).sum(axis=1) / present.sum(axis=1)
    return headlines | {"balanced_accuracy": headlines["macro_recall"]}


# ---------------------------------------------------------------------------- single figures


def _checked(
    y_true: np.ndarray, y_prob: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    y_true, y_prob = np.asarray(y_true), np.asarray(y_prob, dtype=np.float64)
    if y_true.ndim != 1 or len(y_true) == 0:
        raise ValueError(f"y_true has shape {y_true.shape}; it must be (N,) with N of 1 or more")
    if y_prob.shape != (len(y_true), num_classes):
        raise ValueError(
            f"y_prob has shape {y_prob.shape}; for {len(y_true)} labels and {num_classes} classes "
            f"it must be {(len(y_true), num_classes)}"
        )
    if not np.isin(y_true, np.arange(num_classes)).all():
        raise ValueError(
            f"y_true goes from {y_true.min()} to {y_true.max()}; labels of {num_classes} classes "
            f"are whole numbers from 0 to {num_classes - 1}"
        )
    if not np.isfinite(y_prob).all():
        raise ValueError("y_prob holds values that are not finite")
    return y_true.astype(np.int64), y_prob


def _areas(y_true: np.ndarray, y_prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each class against the rest under the ROC and precision-recall curves; NaN for none."""
    areas = np.full((2, y_prob.shape[1]), np.nan)
    for label, scores in enumerate(y_prob.T):
        is_class = y_true == label
        if 0 < is_class.sum() < len(is_class):
            areas[:, label] = (
                roc_auc_score(is_class, scores),
                average_precision_score(is_class, scores),
            )
    return areas[0], areas[1]


def _specificity(y_true: np.ndarray, y_pred: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The share of the images of other classes that are not called this one; NaN without others."""
    others = y_true[:, None] != labels
    rejected = others & (y_pred[:, None] != labels)
    counts = others.sum(axis=0)
    return np.where(counts > 0, rejected.sum(axis=0) / np.maximum(counts, 1), np.nan)


def _is_among_top_2(y_true: np.ndarray, y_prob: np.ndarray) -> np.ndarray:
    """As with the prediction, of equal probabilities the first class counts as the higher."""
    top = np.argsort(-y_prob, axis=1, kind="stable")[:, :2]
    return (top == y_true[:, None]).any(axis=1)


def _or_0(score, y_true: np.ndarray, y_pred: np.ndarray) -> float:
    """An agreement beyond chance, 0 where all is one class and it is not defined."""
    is_one_class = len(np.unique(np.concatenate([y_true, y_pred]))) == 1
    return 0.0 if is_one_class else float(score(y_true, y_pred))
