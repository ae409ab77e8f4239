"""Metrics within subgroups, and the gaps between them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evaluation.intervals import Z, basic_interval, bootstrap, group_numbers
from evaluation.metrics import compute_roc_curve, safe_ratio
from evaluation.screening import select_known, separation

SMALLEST_SUBGROUP = 30  # images; of fewer, intervals by bootstrap mean little
MOST_SUBGROUPS = 20  # a column of more values names images or patients, not kinds of them
AGE_BANDS = {"0 to 29": 30, "30 to 44": 45, "45 to 59": 60, "60 to 74": 75, "75 or more": np.inf}


def compute_subgroups(
    y_true: np.ndarray,
    y_pred: np.ndarray,
    columns: pd.DataFrame,
    groups: Sequence[Any] | None = None,
    *,
    targets: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """How the figures differ between kinds of images, by each column (N,) that tells kinds apart.

    Numbers of many values, also those written as text, come in bands: ages in those of `AGE_BANDS`,
    others in quarters; those of a column such as `patient_id` are names. A column of one value, or
    of more than 20, is left out; images without a value are "unknown". For each column `groups`, by
    value `images`, `is_too_small` (fewer than 30), `accuracy` and `balanced_accuracy` with their
    intervals, as those of `compute_intervals`; and `widest_gap`, the two groups that are large
    enough and differ most in balanced accuracy: `figure`, `highest`, `lowest`, `difference` and its
    `interval`, or None where fewer than two are large enough. All images are resampled together and
    each resample is cut by column, so that images of one lesion are drawn together in whichever
    groups they are. The interval of the gap allows for the two having been picked as the furthest
    apart (see `_z_of_widest_gap`).

    `targets` are what is screened for, by name, with `is_positive` and `score` as `screen` takes
    them, but NaN where it is not known whether an image is positive. `screening` then has for each
    the `roc_auc_of_column`, which a guess by the share of positives among images of the same kind
    has, without a look at them; and `groups`, by value, with the score's `roc_auc` and its interval
    within those where there are both. Where the former is high, the model may have learnt to tell
    the kinds apart instead (Geirhos et al. 2020), and only the latter say what it sees in a lesion.
    """
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    num_classes = max(int(max(y_true.max(), y_pred.max())) + 1, 2)
    groups = group_numbers(groups, len(y_true))
    subgroups = {}
    for column in columns:
        names, kind_of_image = np.unique(_kinds(columns[column]), return_inverse=True)
        if not 2 <= len(names) <= MOST_SUBGROUPS:
            continue
        figures, *resampled = bootstrap(
            y_true[:, None], y_pred[:, None], num_classes, groups, seed, kind_of_image
        )
        found = _of_each_group(names, np.bincount(kind_of_image), figures, resampled)
        subgroups[str(column)] = {
            "groups": found,
            "widest_gap": _widest_gap(
                found, *(values["balanced_accuracy"] for values in resampled)
            ),
            "screening": {
                target: _screen_within(kind_of_image, names, is_positive, score, groups, seed)
                for target, (is_positive, score) in (targets or {}).items()
            },
        }
    return subgroups


def _of_each_group(
    names: np.ndarray,
    counts: np.ndarray,
    figures: Mapping[str, np.ndarray],
    resampled: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for kind, name in enumerate(names.tolist()):
        found[name] = {
            "images": int(counts[kind]),
            "is_too_small": bool(counts[kind] < SMALLEST_SUBGROUP),
        }
        for figure in ("accuracy", "balanced_accuracy"):
            value = float(figures[figure][kind])
            found[name][figure] = value
            found[name][f"{figure}_interval"] = basic_interval(
                *(values[figure][:, kind] for values in resampled), value, counts[kind]
            )
    return found


def _screen_within(
    kind_of_image: np.ndarray,
    names: np.ndarray,
    is_positive: np.ndarray,
    score: np.ndarray,
    groups: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    is_positive, score, kind_of_image, groups = select_known(
        is_positive, score, kind_of_image, groups
    )
    share = np.bincount(kind_of_image, is_positive) / np.bincount(kind_of_image)
    parts = {str(name): kind_of_image == kind for kind, name in enumerate(names)}
    return {
        "roc_auc_of_column": compute_roc_curve(is_positive, share[kind_of_image]).area,
        "groups": {
            name: separation(is_positive[part], score[part], groups[part], seed)
            for name, part in parts.items()
            if 0 < is_positive[part].sum() < part.sum()
        },
    }


def _kinds(values: pd.Series) -> np.ndarray:
    """The name of each image's kind."""
    names = values.astype(object)
    words = str(values.name).casefold().split("_")
    numbers = None if "id" in words else _numbers(values)
    if numbers is not None and numbers.nunique() > 8:
        if "age" in words:
            ends = [0, *AGE_BANDS.values()]
            names = pd.cut(numbers, ends, right=False, labels=list(AGE_BANDS))
        else:
            names = pd.qcut(numbers, 4, duplicates="drop").map(
                lambda band: f"{band.left:g} to {band.right:g}"
            )
        names = names.astype(object)
    names = names.where(names.notna() & (names != ""), "unknown")
    return np.array([str(name) for name in names], dtype=object)


def _numbers(values: pd.Series) -> pd.Series | None:
    """The values as numbers, NaN for missing ones; None unless all others are finite numbers."""
    is_given = (values.notna() & (values != "")).to_numpy()
    texts = np.array([str(value) for value in values[is_given]], dtype=object)
    numbers = np.full(len(values), np.nan)
    numbers[is_given] = pd.to_numeric(texts, errors="coerce")
    return pd.Series(numbers) if np.isfinite(numbers[is_given]).all() else None


def _widest_gap(
    found: dict[str, Any], drawn: np.ndarray, smoothed: np.ndarray
) -> dict[str, Any] | None:
    """Gives the two subgroups that differ most in balanced accuracy, and the interval of their gap.

    `drawn` and `smoothed` (R, K) are that figure of all K subgroups on the same resamples.
    """
    names, figure = list(found), "balanced_accuracy"
    large = [kind for kind, name in enumerate(names) if not found[name]["is_too_small"]]
    if len(large) < 2:
        return None
    values = np.array([found[name][figure] for name in names])
    ranked = sorted(large, key=lambda kind: values[kind])
    highest, lowest = ranked[-1], ranked[0]
    difference = float(values[highest] - values[lowest])
    return {
        "figure": figure,
        "highest": names[highest],
        "lowest": names[lowest],
        "difference": difference,
        "interval": basic_interval(
            drawn[:, highest] - drawn[:, lowest],
            smoothed[:, highest] - smoothed[:, lowest],
            difference,
            min(found[names[kind]]["images"] for kind in (highest, lowest)),
            lowest=-1.0,
            z=_z_of_widest_gap(values[large], smoothed[:, large]),
        ),
    }


def _z_of_widest_gap(values: np.ndarray, resampled: np.ndarray) -> float:
    """Gives the z with which the interval of a gap holds in 95 %, although the widest was picked.

    Of several subgroups the two furthest apart look further apart than they are. Where it is known
    what is true this can be measured: here true are the `values` (K,), drawn towards their mean by
    twice the share of their variance that chance explains (empirical Bayes; twice, as a few values
    can by chance lie far apart), and to them the errors of the `resampled` ones (R, K) are added.
    In each resample the widest gap is picked, and z is what its error, in standard errors, exceeds
    in 5 %. Of two subgroups nothing is picked.
    """
    if len(values) == 2:
        return Z
    errors = np.nan_to_num(resampled - np.nanmean(resampled, axis=0))
    variances, spread = errors.var(axis=0), values.var(ddof=1)
    kept = max(0.0, 1 - 2 * variances.mean() / spread) if spread > 0 else 0.0
    seen = values.mean() + kept * (values - values.mean()) + errors
    row, highest, lowest = np.arange(len(seen)), seen.argmax(axis=1), seen.argmin(axis=1)
    error = errors[row, highest] - errors[row, lowest]
    scores = safe_ratio(np.abs(error), np.sqrt(variances[highest] + variances[lowest]), 0.0)
    return max(Z, float(np.quantile(scores, 0.95)))
