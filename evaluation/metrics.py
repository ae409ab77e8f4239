"""Metrics of predictions for imbalanced classes, and which images to look at."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.metrics import (
    auc,
    cohen_kappa_score,
    confusion_matrix,
    matthews_corrcoef,
    precision_recall_curve,
    roc_curve,
)

# The metrics that have bootstrap intervals.
HEADLINES = (
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "f1",
    "macro_recall",
    "macro_f1",
)


class Evaluation(NamedTuple):
    """Mean cross-entropy, true labels int64 `(N,)` and probabilities float64 `(N, num_classes)`."""

    loss: float
    labels: np.ndarray
    probabilities: np.ndarray


def compute_metrics(
    y_true: np.ndarray,
    y_prob: np.ndarray,
    class_names: Sequence[str],
    y_pred: np.ndarray | None = None,
) -> dict[str, Any]:
    """Returns the metrics of predictions by name, as plain values.

    They are `accuracy`; `balanced_accuracy`, the mean recall of the classes that have images;
    `top_2_accuracy`, the share of images whose class is the predicted one or the most probable of
    the others; `precision`, `recall` and `f1`, weighted by the classes' numbers of images;
    `macro_precision`, `macro_recall`, `macro_f1`, `macro_roc_auc` and `macro_average_precision`,
    plain means; `cohen_kappa`; `matthews_corrcoef`; `log_loss` and `brier_score` (`proper_scores`);
    `per_class`, by class name `precision`, `recall`, `specificity`, `f1`, `roc_auc`,
    `average_precision` and `support`; and `confusion_matrix`, with a row for each true class.

    A class that is never predicted has precision 0. The metrics of a class without images are None
    and left out of the means, as are the areas under the curves of a class that all images have.
    """
    y_true, y_prob, y_pred = check_predictions(y_true, y_prob, len(class_names), y_pred)
    confusion = confusion_matrix(y_true, y_pred, labels=np.arange(len(class_names)))
    support = confusion.sum(axis=1)
    per_class = _metrics_per_class(y_true, y_prob, confusion)
    macro: dict[str, float | None] = {}
    for name in ("precision", "recall", "f1", "roc_auc", "average_precision"):
        known = per_class[name][np.isfinite(per_class[name])]
        macro[f"macro_{name}"] = float(known.mean()) if len(known) else None
    # Agreement beyond chance is not defined where all is one class.
    is_one_class = np.ptp([y_true, y_pred]) == 0
    columns = {
        name: np.where(np.isfinite(values), values, np.array(None))
        for name, values in per_class.items()
    }
    table = pd.DataFrame(columns | {"support": support}, index=list(class_names), dtype=object)
    return {
        "accuracy": float((y_true == y_pred).mean()),
        "balanced_accuracy": macro["macro_recall"],
        "top_2_accuracy": float(_is_among_top_2(y_true, y_prob, y_pred).mean()),
        "cohen_kappa": 0.0 if is_one_class else float(cohen_kappa_score(y_true, y_pred)),
        "matthews_corrcoef": 0.0 if is_one_class else float(matthews_corrcoef(y_true, y_pred)),
        **proper_scores(y_true, y_prob),
        **{
            name: float(np.average(np.nan_to_num(per_class[name]), weights=support))
            for name in ("precision", "recall", "f1")
        },
        **macro,
        "per_class": table.to_dict("index"),
        "confusion_matrix": confusion.tolist(),
    }


def _metrics_per_class(
    y_true: np.ndarray, y_prob: np.ndarray, confusion: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns each metric of all classes (C,); NaN where it is not defined."""
    support, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    others = len(y_true) - support
    true_negatives = others - predicted + np.diag(confusion)
    areas = np.full((2, len(confusion)), np.nan)
    for label in np.flatnonzero((support > 0) & (others > 0)):
        binary = y_true == label, y_prob[:, label]
        areas[0, label] = compute_roc_curve(*binary).area
        areas[1, label] = compute_precision_recall_curve(*binary).area
    metrics = _precision_recall_f1(confusion)
    metrics["specificity"] = safe_ratio(true_negatives, others, np.nan)
    metrics["f1"] = metrics.pop("f1")
    metrics["roc_auc"], metrics["average_precision"] = areas
    return {name: np.where(support > 0, values, np.nan) for name, values in metrics.items()}


def _precision_recall_f1(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """Returns those of each class (..., C), from confusion matrices (..., C, C); 0 of nothing."""
    hits = np.diagonal(confusions, axis1=-2, axis2=-1)
    support, predicted = confusions.sum(axis=-1), confusions.sum(axis=-2)
    return {
        "precision": safe_ratio(hits, predicted, 0),
        "recall": safe_ratio(hits, support, 0),
        "f1": safe_ratio(2 * hits, support + predicted, 0),
    }


def proper_scores(y_true: np.ndarray, y_prob: np.ndarray) -> dict[str, float]:
    """Returns `log_loss`, the mean of -log(probability of the true class), and `brier_score`.

    The latter is the mean squared distance from the truth, from 0 to 2 (Brier 1950).
    """
    probability_of_truth = y_prob[np.arange(len(y_true)), y_true]
    smallest = np.finfo(y_prob.dtype).eps  # log 0 would make one image decide all
    truth = np.eye(y_prob.shape[1])[y_true]
    return {
        "log_loss": float(-np.log(np.maximum(probability_of_truth, smallest)).mean()),
        "brier_score": float(((y_prob - truth) ** 2).sum(axis=1).mean()),
    }


class Curve(NamedTuple):
    """The points of a curve and the area under it."""

    x: np.ndarray
    y: np.ndarray
    area: float


def compute_roc_curve(is_positive: np.ndarray, score: np.ndarray) -> Curve:
    """Returns the ROC curve of a score: true positive rate over false positive rate."""
    false_positive_rate, recall, _ = roc_curve(is_positive, score)
    return Curve(false_positive_rate, recall, float(auc(false_positive_rate, recall)))


def compute_precision_recall_curve(is_positive: np.ndarray, score: np.ndarray) -> Curve:
    """Returns precision over recall as steps, under which the area is the average precision.

    Each step goes from its recall down to the next. Of points with the same recall it is the last,
    most precise one; the end at (0, 1), which no threshold reaches, is left out.
    """
    precision, recall, _ = precision_recall_curve(is_positive, score)
    area = float(-(np.diff(recall) * precision[:-1]).sum())
    is_step = np.diff(recall) < 0
    recall, precision = recall[:-1][is_step], precision[:-1][is_step]
    return Curve(np.append(recall, 0), np.append(precision, precision[-1]), area)


def most_confident_mistakes(
    y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray, count: int = 12
) -> np.ndarray:
    """Returns the indices of the most confident wrong predictions, the most confident first."""
    confidence = y_prob[np.arange(len(y_pred)), y_pred]
    ranked = np.argsort(-confidence, kind="stable")
    return ranked[(y_true != y_pred)[ranked]][:count]


def typical_examples(y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray) -> np.ndarray:
    """Returns for each class the indices of a right and a wrong prediction, where there are any.

    Each has the median confidence of its kind: it is neither the model's best nor its worst.
    """
    confidence = y_prob[np.arange(len(y_pred)), y_pred]
    chosen: list[int] = []
    for label in range(y_prob.shape[1]):
        for is_right in (True, False):
            of_kind = np.flatnonzero((y_true == label) & ((y_true == y_pred) == is_right))
            ranked = of_kind[np.argsort(confidence[of_kind], kind="stable")]
            chosen.extend(ranked[len(ranked) // 2 : len(ranked) // 2 + 1])
    return np.array(chosen, dtype=np.int64)


def headline_metrics(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the headline metrics of confusion matrices (..., C, C), each (...,); NaN if empty."""
    support = confusions.sum(axis=-1)
    total, present = support.sum(axis=-1), support > 0
    hits = np.trace(confusions, axis1=-2, axis2=-1)
    headlines = {"accuracy": safe_ratio(hits, total, np.nan)}
    for name, values in _precision_recall_f1(confusions).items():
        headlines[name] = safe_ratio((values * support).sum(axis=-1), total, np.nan)
        headlines[f"macro_{name}"] = safe_ratio(
            (values * present).sum(axis=-1), present.sum(axis=-1), np.nan
        )
    return headlines | {"balanced_accuracy": headlines["macro_recall"]}


def best_evaluation(history: Mapping[Any, Sequence[float | None]]) -> int | None:
    """Returns the index of the best evaluation in a training history, or None.

    It has the highest `valid_balanced_accuracy`; of equal ones the lowest `valid_loss`, and of
    those the first. None and NaN are missing values.
    """
    accuracy = np.asarray(history.get("valid_balanced_accuracy", ()), dtype=np.float64)
    loss = np.asarray(history.get("valid_loss", ()), dtype=np.float64)
    if np.isnan(accuracy).all():
        return None
    return int(np.lexsort((loss, -accuracy))[0])  # stable, and NaN comes last


def safe_ratio(numerators: np.ndarray, denominators: np.ndarray, of_nothing: float) -> np.ndarray:
    """Returns the quotients, and `of_nothing` where the denominator is 0."""
    quotients = np.full(np.shape(numerators), of_nothing, dtype=np.float64)
    return np.divide(numerators, denominators, out=quotients, where=denominators > 0)


def format_percent(share: float) -> str:
    """Returns a share in percent, as figures, report and console show it, such as "95 %".

    Only 0 is "0 %" and only 1 is "100 %"; what would be rounded to them is "<1 %" and ">99 %".
    """
    if 0 < share < 0.005:
        return "<1 %"
    if 0.995 <= share < 1:
        return ">99 %"
    return f"{100 * share:.0f} %"


def check_predictions(
    y_true: ArrayLike, y_prob: ArrayLike, num_classes: int, y_pred: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns labels int64 (N,), probabilities float64 (N, C) and predicted labels (N,).

    By default the latter are those of the highest probability. Raises ValueError for shapes that
    do not fit, labels out of range, and probabilities that are not finite.
    """
    y_prob, shape = np.asarray(y_prob, dtype=np.float64), (np.size(y_true), num_classes)
    if y_prob.shape != shape:
        raise ValueError(
            f"y_prob has shape {y_prob.shape}; for {shape[0]} labels and {num_classes} classes "
            f"it must be {shape}"
        )
    y_true = check_labels(y_true, "y_true", len(y_prob), num_classes)
    if not np.isfinite(y_prob).all():
        raise ValueError("y_prob holds values that are not finite")
    y_pred = y_prob.argmax(axis=1) if y_pred is None else y_pred
    return y_true, y_prob, check_labels(y_pred, "y_pred", len(y_true), num_classes)


def check_labels(labels: ArrayLike, name: str, num_images: int, num_classes: int) -> np.ndarray:
    """Returns the labels of images as int64 (N,).

    Raises ValueError, with this name, for another shape, no images, and labels out of range.
    """
    labels = np.asarray(labels)
    if labels.shape != (num_images,) or num_images == 0:
        raise ValueError(
            f"{name} has shape {labels.shape}; it must be ({num_images},), and not empty"
        )
    if not np.isin(labels, np.arange(num_classes)).all():
        raise ValueError(
            f"{name} goes from {labels.min()} to {labels.max()}; labels of {num_classes} classes "
            f"are whole numbers from 0 to {num_classes - 1}"
        )
    return labels.astype(np.int64)


def _is_among_top_2(y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray) -> np.ndarray:
    """Of equal probabilities that of the first class counts as the higher, as in `argmax`."""
    images = np.arange(len(y_true))
    others = y_prob.copy()
    others[images, y_pred] = -np.inf
    return (y_pred == y_true) | (others.argmax(axis=1) == y_true)
