"""Evaluates predictions, given true labels, probabilities and class names.

Everywhere `y_true` is int (N,), labels from 0 to C - 1; `y_prob` float (N, C), a probability for
each class; `y_pred` int (N,), the predicted labels, by default those of the highest probability;
`class_names` the C names in label order. All functions raise ValueError for no predictions, shapes
that do not fit, labels out of range, or probabilities that are not finite.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from evaluation.calibration import NUM_BINS, Calibration, fit_calibration, reliability
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
    format_percent,
    most_confident_mistakes,
    proper_scores,
    typical_examples,
)
from evaluation.screening import (
    MALIGNANT,
    OPERATING_POINTS,
    ScreeningScores,
    choose_thresholds,
    group_by_malignancy,
    match_classes,
    screen,
    screening_scores,
    screening_targets,
    screening_unavailable_reason,
    screening_warnings,
)
from evaluation.subgroups import AGE_BANDS, MAX_SUBGROUPS, MIN_SUBGROUP_SIZE, compute_subgroups


def evaluate_predictions(
    y_true: np.ndarray,
    y_prob: np.ndarray,
    class_names: Sequence[str],
    calibration: Calibration,
    thresholds: Mapping[str, Mapping[str, float]],
    *,
    calibrated: np.ndarray | None = None,
    malignant: Sequence[str] = MALIGNANT,
    unknown: Sequence[str] | None = None,
    groups: ArrayLike | None = None,
    columns: pd.DataFrame | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """Returns all that `metrics.json` says of a model's predictions.

    `y_prob` (N, C) are the model's own probabilities: the highest is its prediction. Everything
    else is computed from the calibrated ones: `calibrated` (N, C), such as for merged classes, or
    those that `calibration` gives. `thresholds` has for each of `screening_targets` what
    `choose_thresholds` returned for the validation images; a target without any is left out. What
    is flagged as melanoma at an aimed sensitivity counts as flagged as malignant.
    `malignant` and `unknown` are as in `group_by_malignancy`; `columns` (N rows) divide into
    subgroups.

    The result has `test` (`compute_metrics`), `test_intervals` (`compute_intervals`), `calibration`
    (`temperature` and `bias`, unless `calibrated` is given, and `reliability` and `proper_scores`
    of the probabilities `before` and `after`), `counted_as` (`group_by_malignancy`), `screening`
    (`screen`, by target, with its `classes` and `classes_left_out`) and `subgroups`
    (`compute_subgroups`).
    """
    y_true, y_prob, y_pred = check_predictions(y_true, y_prob, len(class_names))
    fitted = _describe_calibration(calibration, class_names) if calibrated is None else {}
    calibrated = calibration.apply(y_prob) if calibrated is None else calibrated
    kinds = (class_names, malignant, unknown)
    targets, excluded = screening_targets(*kinds), screening_targets(*kinds, positive=None)
    scores = screening_scores(y_true, calibrated, *kinds)
    scores = {name: scores[name] for name in scores if name in thresholds}
    implied = {"malignant": _flagged_as_melanoma(scores, thresholds)}
    columns = pd.DataFrame() if columns is None else columns
    return {
        "test": compute_metrics(y_true, calibrated, class_names, y_pred),
        "test_intervals": compute_intervals(
            y_true, calibrated, class_names, groups, y_pred, seed=seed
        ),
        "calibration": fitted
        | {
            when: reliability(y_true, shown, y_pred, groups) | proper_scores(y_true, shown)
            for when, shown in (("before", y_prob), ("after", calibrated))
        },
        "counted_as": group_by_malignancy(*kinds),
        "screening": {
            name: {
                "classes": [class_names[label] for label in targets[name]],
                "classes_left_out": [class_names[label] for label in excluded[name]],
            }
            | screen(*scores[name], thresholds[name], groups, implied=implied.get(name), seed=seed)
            for name in scores
        },
        "subgroups": compute_subgroups(y_true, y_pred, columns, groups, targets=scores, seed=seed),
    }


def _describe_calibration(calibration: Calibration, class_names: Sequence[str]) -> dict[str, Any]:
    bias = dict(zip(class_names, calibration.bias, strict=True))
    return {"temperature": calibration.temperature, "bias": bias}


def _flagged_as_melanoma(
    scores: Mapping[str, ScreeningScores], thresholds: Mapping[str, Mapping[str, float]]
) -> dict[str, np.ndarray]:
    """Returns the images that are, by each aimed sensitivity of both targets."""
    if "melanoma" not in scores:
        return {}
    aims = thresholds.get("malignant", {}).keys() & thresholds["melanoma"].keys()
    score = scores["melanoma"].score
    return {
        aim: score >= thresholds["melanoma"][aim] for aim in aims if aim.startswith("sensitivity")
    }


# Former names.
assess = evaluate_predictions
counted_as = group_by_malignancy
left_out_of_screening = partial(screening_targets, positive=None)
why_screening_is_off = screening_unavailable_reason
AIMS, MOST_SUBGROUPS, SMALLEST_SUBGROUP = OPERATING_POINTS, MAX_SUBGROUPS, MIN_SUBGROUP_SIZE
