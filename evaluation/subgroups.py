"""Metrics within subgroups, and the gaps between them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from evaluation.intervals import Resampled, Z, bootstrap, number_groups
from evaluation.metrics import compute_roc_curve, safe_ratio
from evaluation.screening import roc_auc_with_interval, select_known

MIN_SUBGROUP_SIZE = 30  # images; with fewer, bootstrap intervals mean little
MAX_SUBGROUPS = 20  # a column with more values names images or patients, not kinds of them
AGE_BANDS = {"0 to 29": 30, "30 to 44": 45, "45 to 59": 60, "60 to 74": 75, "75 or more": np.inf}


def compute_subgroups(
    y_true: np.ndarray,
    y_pred: np.ndarray,
    columns: pd.DataFrame,
    groups: ArrayLike | None = None,
    *,
    targets: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """Returns the metrics of subgroups of images, by each column (N,) that divides them.

    Numbers of many values, also as text, are binned: ages by `AGE_BANDS`, others by quartiles;
    those of a column such as `patient_id` are names. A column of one value, or of more than
    `MAX_SUBGROUPS`, is skipped; images without a value are "unknown". Each column has `groups`, by
    value `images`, `is_too_small`, `accuracy` and `balanced_accuracy` with bootstrap intervals; and
    `widest_gap` in balanced accuracy between subgroups of `MIN_SUBGROUP_SIZE`, or None. A resample
    is of all images, so that those of one lesion are drawn together across subgroups.

    `targets` are `ScreeningScores`, by name. `screening` has for each the `roc_auc_of_column`, that
    of guessing by the share of positives in a subgroup, without the image; and `groups`, by value,
    the ROC AUC of the score within those that have both kinds. Where the former is high, the model
    may have learnt to tell the subgroups apart (Geirhos et al. 2020), and only the latter show what
    it sees in a lesion.
    """
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    num_classes = max(int(max(y_true.max(), y_pred.max())) + 1, 2)
    group = number_groups(groups, len(y_true))
    found = {}
    for column in columns:
        names, subgroup = np.unique(_subgroup_names(columns[column]), return_inverse=True)
        if not 2 <= len(names) <= MAX_SUBGROUPS:
            continue
        resampled = bootstrap(y_true[:, None], y_pred[:, None], num_classes, group, seed, subgroup)
        found[str(column)] = _compare_subgroups(names, np.bincount(subgroup), resampled) | {
            "screening": {
                target: _screen_within(subgroup, names, is_positive, score, group, seed)
                for target, (is_positive, score) in (targets or {}).items()
            }
        }
    return found


def _compare_subgroups(
    names: np.ndarray, counts: np.ndarray, resampled: Mapping[str, Resampled]
) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for index, (name, count) in enumerate(zip(names, counts, strict=True)):
        groups[name] = {"images": int(count), "is_too_small": bool(count < MIN_SUBGROUP_SIZE)}
        for metric in ("accuracy", "balanced_accuracy"):
            values = resampled[metric].part(index)
            groups[name][metric] = float(values.observed)
            groups[name][f"{metric}_interval"] = values.interval(count)
    gap = _widest_gap(names, counts, resampled["balanced_accuracy"])
    return {"groups": groups, "widest_gap": gap}


def _widest_gap(
    names: np.ndarray, counts: np.ndarray, accuracy: Resampled
) -> dict[str, Any] | None:
    large = np.flatnonzero(counts >= MIN_SUBGROUP_SIZE)
    if len(large) < 2:
        return None
    ranked = large[np.argsort(accuracy.observed[large], kind="stable")]
    highest, lowest = ranked[-1], ranked[0]
    gap = accuracy.part(highest) - accuracy.part(lowest)
    z = _z_of_widest_gap(accuracy.observed[large], accuracy.smoothed[:, large])
    return {
        "figure": "balanced_accuracy",
        "highest": names[highest],
        "lowest": names[lowest],
        "difference": float(gap.observed),
        "interval": gap.interval(min(counts[[highest, lowest]]), lowest=-1.0, z=z),
    }


def _z_of_widest_gap(values: np.ndarray, resampled: np.ndarray) -> float:
    """Returns the z with which the interval of the widest gap of K subgroups holds in 95 %.

    Picked as the furthest apart, two subgroups look further apart than they are. By how much is
    simulated: the true values are the observed `values` (K,), shrunk towards their mean by twice
    the share of their variance that chance explains (empirical Bayes; twice, as a few values can by
    chance lie far apart), and the errors are those of the `resampled` values (R, K). z is what the
    error of the widest gap, in standard errors, exceeds in 5 %. Of two subgroups none is picked.
    """
    if len(values) == 2:
        return Z
    errors = np.nan_to_num(resampled - np.nanmean(resampled, axis=0))
    variances, spread = errors.var(axis=0), values.var(ddof=1)
    shrinkage = max(0.0, 1 - 2 * variances.mean() / spread) if spread > 0 else 0.0
    drawn = values.mean() + shrinkage * (values - values.mean()) + errors
    row, highest, lowest = np.arange(len(drawn)), drawn.argmax(axis=1), drawn.argmin(axis=1)
    error = errors[row, highest] - errors[row, lowest]
    scores = safe_ratio(np.abs(error), np.sqrt(variances[highest] + variances[lowest]), 0.0)
    return max(Z, float(np.quantile(scores, 0.95)))


def _screen_within(
    subgroup: np.ndarray,
    names: np.ndarray,
    is_positive: np.ndarray,
    score: np.ndarray,
    groups: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    is_positive, score, subgroup, groups = select_known(is_positive, score, subgroup, groups)
    share = safe_ratio(np.bincount(subgroup, is_positive), np.bincount(subgroup), 0)
    parts = {name: subgroup == index for index, name in enumerate(names)}
    return {
        "roc_auc_of_column": compute_roc_curve(is_positive, share[subgroup]).area,
        "groups": {
            name: roc_auc_with_interval(is_positive[part], score[part], groups[part], seed)
            for name, part in parts.items()
            if 0 < is_positive[part].sum() < part.sum()
        },
    }


def _subgroup_names(values: pd.Series) -> np.ndarray:
    """Returns the name of each image's subgroup."""
    names = values.astype(object)
    words = str(values.name).casefold().split("_")
    numbers = None if "id" in words else _to_numbers(values)
    if numbers is not None and numbers.nunique() > 8:
        if "age" in words:
            ends = [0, *AGE_BANDS.values()]
            names = pd.cut(numbers, ends, right=False, labels=list(AGE_BANDS))
        else:
            names = pd.qcut(numbers, 4, duplicates="drop").map(
                lambda band: f"{band.left:g} to {band.right:g}", na_action="ignore"
            )
        names = names.astype(object)
    names = names.where(names.notna() & (names != ""), "unknown")
    return np.array([str(name) for name in names], dtype=object)


def _to_numbers(values: pd.Series) -> pd.Series | None:
    """Returns the values as numbers, NaN for missing ones; None unless all are finite numbers."""
    is_given = values.notna() & (values != "")
    numbers = pd.to_numeric(values.astype(str).where(is_given), errors="coerce").astype(float)
    return numbers if np.isfinite(numbers[is_given]).all() else None
