"""What a set of predictions is worth, from true labels, probabilities and class names.

Everywhere `y_true` is int (N,), labels from 0 to C - 1; `y_prob` float (N, C), a probability for
each class; `y_pred` int (N,), the classes decided for, those of the highest probability unless they
are given; `class_names` the C names in label order. All of it raises ValueError for no predictions,
shapes that do not fit, labels out of range, or probabilities that are not finite.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evaluation.calibration import (
    NUM_BINS,
    Calibration,
    fit_calibration,
    reliability,
)
from evaluation.intervals import (
    MAX_COUNTS_AT_ONCE,
    NUM_RESAMPLES,
    Z,
    compare,
    compute_intervals,
    effective_sample_size,
    wilson_interval,
)
from evaluation.metrics import (
    HEADLINES,
    Evaluation,
    best_evaluation,
    check_predictions,
    compute_metrics,
    most_confident_mistakes,
    proper_scores,
    typical_examples,
)
from evaluation.screening import (
    AIMS,
    MALIGNANT,
    choose_thresholds,
    counted_as,
    left_out_of_screening,
    match_classes,
    screen,
    screening_scores,
    screening_targets,
    screening_warnings,
    why_screening_is_off,
)
from evaluation.subgroups import AGE_BANDS, MOST_SUBGROUPS, SMALLEST_SUBGROUP, compute_subgroups

__all__ = [
    "AGE_BANDS",
    "AIMS",
    "HEADLINES",
    "MALIGNANT",
    "MAX_COUNTS_AT_ONCE",
    "MOST_SUBGROUPS",
    "NUM_BINS",
    "NUM_RESAMPLES",
    "SMALLEST_SUBGROUP",
    "Calibration",
    "Evaluation",
    "Z",
    "best_evaluation",
    "choose_thresholds",
    "compare",
    "compute_intervals",
    "compute_metrics",
    "compute_subgroups",
    "counted_as",
    "effective_sample_size",
    "evaluate_predictions",
    "fit_calibration",
    "left_out_of_screening",
    "match_classes",
    "most_confident_mistakes",
    "reliability",
    "screen",
    "screening_scores",
    "screening_targets",
    "screening_warnings",
    "typical_examples",
    "why_screening_is_off",
    "wilson_interval",
]


def evaluate_predictions(
    y_true: np.ndarray,
    y_prob: np.ndarray,
    class_names: Sequence[str],
    calibration: "Calibration",
    thresholds: Mapping[str, Mapping[str, float]],
    *,
    malignant: Sequence[str] = MALIGNANT,
    unknown: Sequence[str] | None = None,
    groups: Sequence[Any] | None = None,
    columns: pd.DataFrame | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """Returns what `metrics.json` holds of a model: all metrics of its predictions.

    `y_prob` (N, C) are the model's own probabilities, the highest its decision; all else comes from
    the calibrated ones. `thresholds` has for each of `screening_targets` those that
    `choose_thresholds` gave on validation; a target without them, or without positives or negatives
    here, is left out. `malignant` and `unknown` are as in `counted_as`; images of unknown classes
    are left out of screening. Subgroups are made by the `columns` (N rows).

    Returns `test` (`compute_metrics`), `test_intervals` (`compute_intervals`), `calibration` (its
    `temperature`, `bias`, and `reliability` of the decisions, `log_loss` and `brier_score` with the
    probabilities `before` and `after`), `counted_as`, `screening` (`screen`, by target, with its
    `classes` and `classes_left_out`) and `subgroups` (`compute_subgroups`).
    """
    y_true, y_prob = check_predictions(y_true, y_prob, len(class_names))
    y_pred, calibrated = y_prob.argmax(axis=1), calibration.apply(y_prob)
    metrics = compute_metrics(y_true, calibrated, class_names, y_pred)
    labels = screening_targets(class_names, malignant, unknown)
    left_out = left_out_of_screening(class_names, malignant, unknown)
    scores = screening_scores(y_true, calibrated, class_names, malignant, unknown)
    scores = {name: scores[name] for name in scores if name in thresholds}
    screening = {
        name: {
            "classes": [class_names[label] for label in labels[name]],
            "classes_left_out": [class_names[label] for label in left_out[name]],
        }
        | screen(*scores[name], thresholds[name], groups, seed=seed)
        for name in scores
    }
    return {
        "test": metrics,
        "test_intervals": compute_intervals(
            y_true, calibrated, class_names, groups, y_pred, seed=seed
        ),
        "calibration": {
            "temperature": calibration.temperature,
            "bias": dict(zip(class_names, calibration.bias, strict=True)),
        }
        | {
            side: reliability(y_true, prob, y_pred) | proper_scores(y_true, prob)
            for side, prob in (("before", y_prob), ("after", calibrated))
        },
        "counted_as": counted_as(class_names, malignant, unknown),
        "screening": screening,
        "subgroups": {}
        if columns is None
        else compute_subgroups(y_true, y_pred, columns, groups, targets=scores, seed=seed),
    }


assess = evaluate_predictions  # its former name
