"""What a set of predictions is worth, from true labels, probabilities and class names."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support


def compute_metrics(
    y_true: np.ndarray, y_prob: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """The figures of a set of predictions, by name; all but the confusion matrix in [0, 1].

    Parameters
    ----------
    y_true : int array (N,), labels from 0 to C - 1
    y_prob : float array (N, C), a probability for each class; the highest is the prediction
    class_names : the C names, in label order

    Returns
    -------
    dict with `accuracy`; `balanced_accuracy`, the mean recall of the classes that have images;
    `precision`, `recall` and `f1`, weighted by the classes' numbers of images; `macro_precision`,
    `macro_recall` and `macro_f1`, their plain means; `per_class`, by class name `precision`,
    `recall`, `f1` and `support`; `confusion_matrix`, counts as lists, a row a true class.

    A class that is never predicted has precision 0. A class without images has None for its figures
    and is left out of the means.

    Raises ValueError for no predictions, shapes that do not fit, labels out of range, or
    probabilities that are not finite.
    """
    y_true, y_prob = np.asarray(y_true), np.asarray(y_prob)
    _check(y_true, y_prob, len(class_names))
    y_pred = y_prob.argmax(axis=1)
    labels = np.arange(len(class_names))
    precision, recall, f1, support = precision_recall_fscore_support(
        y_true, y_pred, labels=labels, zero_division=0
    )
    present = support > 0
    metrics: dict[str, Any] = {
        "accuracy": float(accuracy_score(y_true, y_pred)),
        "balanced_accuracy": float(recall[present].mean()),
    }
    for name, values in {"precision": precision, "recall": recall, "f1": f1}.items():
        metrics[name] = float(np.average(values, weights=support))
        metrics[f"macro_{name}"] = float(values[present].mean())
    metrics["per_class"] = {
        class_name: {
            "precision": float(precision[label]) if present[label] else None,
            "recall": float(recall[label]) if present[label] else None,
            "f1": float(f1[label]) if present[label] else None,
            "support": int(support[label]),
        }
        for label, class_name in enumerate(class_names)
    }
    metrics["confusion_matrix"] = confusion_matrix(y_true, y_pred, labels=labels).tolist()
    return metrics


def _check(y_true: np.ndarray, y_prob: np.ndarray, num_classes: int) -> None:
    if y_true.ndim != 1 or len(y_true) == 0:
        raise ValueError(f"y_true has shape {y_true.shape}; it must be (N,) with N of 1 or more")
    if y_prob.shape != (len(y_true), num_classes):
        raise ValueError(
            f"y_prob has shape {y_prob.shape}; for {len(y_true)} labels and {num_classes} classes "
            f"it must be {(len(y_true), num_classes)}"
        )
    if y_true.min() < 0 or y_true.max() >= num_classes:
        raise ValueError(
            f"y_true goes from {y_true.min()} to {y_true.max()}; labels of {num_classes} classes "
            f"go from 0 to {num_classes - 1}"
        )
    if not np.isfinite(y_prob).all():
        raise ValueError("y_prob holds values that are not finite")
