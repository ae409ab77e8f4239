"""What a set of predictions is worth, from true labels, probabilities and class names.

Everywhere `y_true` is int (N,), labels from 0 to C - 1; `y_prob` float (N, C), a probability for
each class, of which the highest is the prediction; `class_names` the C names in label order. All of
it raises ValueError for no predictions, shapes that do not fit, labels out of range, or
probabilities that are not finite.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
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
    observed = _confusions(y_true, y_prob, np.ones((1, len(y_true))))[0]
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
    observed = [
        _headlines(_confusions(y_true, y_prob, np.ones((1, len(y_true)))))
        for y_prob in (y_prob_a, y_prob_b)
    ]
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


# ---------------------------------------------------------------------------- the bootstrap


def _resampled_confusions(
    y_true: np.ndarray, y_prob: np.ndarray, groups: Sequence[Any] | None, seed: int
) -> np.ndarray:
    """The confusion matrix of each resample, (NUM_RESAMPLES, C, C)."""
    groups = np.arange(len(y_true)) if groups is None else np.asarray(groups)
    if groups.shape != y_true.shape:
        raise ValueError(f"groups has shape {groups.shape}; it must be {y_true.shape}")
    group_of_image = np.unique(groups, return_inverse=True)[1]
    num_groups = group_of_image.max() + 1
    rng = np.random.default_rng(seed)
    confusions = []
    for start in range(0, NUM_RESAMPLES, 100):  # some at a time, or large sets would fill memory
        number = min(100, NUM_RESAMPLES - start)
        times = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=number)
        confusions.append(_confusions(y_true, y_prob, times[:, group_of_image]))
    return np.concatenate(confusions)


def _confusions(y_true: np.ndarray, y_prob: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Confusion matrices (R, C, C) when image i counts `times[r, i]` times."""
    num_classes = y_prob.shape[1]
    cell = y_true * num_classes + y_prob.argmax(axis=1)
    cells = np.zeros((len(cell), num_classes**2))
    cells[np.arange(len(cell)), cell] = 1
    return (times @ cells).reshape(-1, num_classes, num_classes)


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
