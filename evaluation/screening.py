"""Screening: malignant lesions, or melanoma, against the rest; targets, thresholds, ROC AUC."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from evaluation.intervals import (
    Resampled,
    effective_sample_size,
    interval_of_share,
    number_groups,
    resampled_counts,
    score_interval,
)
from evaluation.metrics import compute_roc_curve, safe_ratio
from imaging.lesions import DIAGNOSES, find_diagnosis, is_malignant, is_melanoma, normalize_name

OPERATING_POINTS = tuple((aim, x) for aim in ("sensitivity", "specificity") for x in (0.90, 0.95))
# The diagnoses that count as malignant by default.
MALIGNANT = tuple(dict.fromkeys(d.name for d in DIAGNOSES if d.is_malignant))


def match_classes(class_names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Returns the labels of the classes that match any of the `wanted` names.

    A name matches the classes of the same spelling; without any, those whose names differ only by
    case, `_`, `-`, punctuation or a plural s; without any, those of the same diagnosis, so that
    `mel` is melanoma (`lesions.find_diagnosis`). `MALIGNANT` stands for all malignant classes.
    Raises ValueError for a name that matches no class, and suggests the closest one.
    """
    malignant = [label for label, name in enumerate(class_names) if is_malignant(name)]
    is_default = tuple(wanted) == MALIGNANT
    found = {n: malignant if is_default else _matching_labels(class_names, n) for n in wanted}
    missing = [name for name in found if not found[name]]
    if missing:
        plain = {normalize_name(name): name for name in reversed(class_names)}
        closest = [
            plain[match]
            for name in missing
            for match in difflib.get_close_matches(normalize_name(name), plain, 1)
        ]
        unknown = f"unknown class{'es' if len(missing) > 1 else ''} {', '.join(missing)}"
        if closest:
            unknown += f"; did you mean {', '.join(dict.fromkeys(closest))}?"
        raise ValueError(f"{unknown} (the classes are {', '.join(class_names)})")
    return sorted({label for labels in found.values() for label in labels})


def _matching_labels(class_names: Sequence[str], wanted: str) -> list[int]:
    for simplify in (str, normalize_name, _name_of_diagnosis):
        key = simplify(wanted)
        labels = [label for label, n in enumerate(class_names) if key and simplify(n) == key]
        if labels:
            return labels
    return []


def _name_of_diagnosis(name: str) -> str:
    diagnosis = find_diagnosis(name)
    return "" if diagnosis is None else diagnosis.name


def group_by_malignancy(
    class_names: Sequence[str],
    malignant: Sequence[str] = MALIGNANT,
    unknown: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """Returns the names of the classes that count as `malignant`, as `benign` and as `unknown`.

    By default as `lesions.is_malignant` says. With other names in `malignant`, the classes that
    match them count as malignant and all others as benign. Classes in `unknown` always count as
    unknown. Raises ValueError for a name in `malignant` that matches no class.
    """
    truths = _truths_by_target(class_names, malignant, unknown)["malignant"]
    names = np.array(class_names, dtype=object)
    return {
        "malignant": names[truths == 1].tolist(),
        "benign": names[truths == 0].tolist(),
        "unknown": names[np.isnan(truths)].tolist(),
    }


def _truths_by_target(
    class_names: Sequence[str], malignant: Sequence[str], unknown: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Returns by target whether each class (C,) is positive: 1, 0, or NaN if that is unknown."""
    counted = [is_malignant(name) for name in class_names]
    if tuple(malignant) != MALIGNANT:
        labels = match_classes(class_names, malignant)
        counted = [label in labels for label in range(len(class_names))]
    melanoma = [is_melanoma(name) for name in class_names]
    for label, name in enumerate(class_names):
        if name in (unknown or ()):
            counted[label] = None
        if counted[label] is False:  # no melanoma either, unless the name says so
            melanoma[label] = bool(melanoma[label])
    return {"malignant": np.array(counted, float), "melanoma": np.array(melanoma, float)}


def screening_targets(
    class_names: Sequence[str],
    malignant: Sequence[str] = MALIGNANT,
    unknown: Sequence[str] | None = None,
    *,
    positive: bool | None = True,
) -> dict[str, list[int]]:
    """Returns the labels of the positive classes of each target, `malignant` and `melanoma`.

    With `positive=None` they are those of the classes that may be positive or negative, whose
    images are left out. `malignant` and `unknown` are as in `group_by_malignancy`; `melanoma` has
    in-situ and metastatic ones too. Each target has positive and negative classes, or is left out.
    """
    return {
        name: np.flatnonzero(np.isnan(truths) if positive is None else truths == positive).tolist()
        for name, truths in _truths_by_target(class_names, malignant, unknown).items()
        if {0, 1} <= set(truths)
    }


class ScreeningScores(NamedTuple):
    """Whether each of N images is positive for a target, and a score that is higher if it is."""

    is_positive: np.ndarray  # NaN where it is not known
    score: np.ndarray


def screening_scores(
    y_true: np.ndarray,
    y_prob: np.ndarray,
    class_names: Sequence[str],
    malignant: Sequence[str] = MALIGNANT,
    unknown: Sequence[str] | None = None,
) -> dict[str, ScreeningScores]:
    """Returns the scores for each of `screening_targets` that has positive and negative images.

    They are the sums of the probabilities of the positive classes.
    """
    return {
        name: ScreeningScores(truths[y_true], y_prob[:, truths == 1].sum(axis=1))
        for name, truths in _truths_by_target(class_names, malignant, unknown).items()
        if np.isin([0, 1], truths[y_true]).all()
    }


def screening_unavailable_reason(counted: Mapping[str, Sequence[str]]) -> str | None:
    """Returns why there are no targets, given `group_by_malignancy`; None where there are."""
    names = [name for kind in counted.values() for name in kind]
    if screening_targets(names, counted["malignant"], counted["unknown"]):
        return None
    lacking = "benign" if counted["malignant"] else "malignant"
    return (
        f"none of the classes {', '.join(names)} is known as {lacking}; name those that are "
        "malignant with --malignant_classes"
    )


def screening_warnings(counted: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns warnings on what is screened for, given the result of `group_by_malignancy`."""
    reason = screening_unavailable_reason(counted)
    found = [] if reason is None else [f"screening is off: {reason}"]
    if counted["unknown"] and reason is None:
        found.append(
            "not known whether malignant or benign, and left out of the screening metrics: "
            f"{', '.join(counted['unknown'])}; name what is malignant with --malignant_classes"
        )
    doubtful = [name for name in counted["benign"] if is_malignant(name)]
    if doubtful:
        found.append(
            f"counted as benign, as --malignant_classes does not name them, but known as "
            f"malignant: {', '.join(doubtful)}"
        )
    return found


def choose_thresholds(is_positive: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Returns a threshold for each of `OPERATING_POINTS`, such as "sensitivity 95%".

    `is_positive` and `score` (N,) are those of the validation images, as in `ScreeningScores`; a
    prediction is positive where `score >= threshold`. Of the thresholds with at least that
    sensitivity it is the one with the highest specificity, and the other way round. Raises
    ValueError when all images are positive or all are negative.
    """
    is_positive, score = select_known(is_positive, score)
    return {
        f"{aim} {level:.0%}": _threshold(is_positive, score, aim, level)
        for aim, level in OPERATING_POINTS
    }


def screen(
    is_positive: np.ndarray,
    score: np.ndarray,
    thresholds: Mapping[str, float],
    groups: ArrayLike | None = None,
    *,
    implied: Mapping[str, np.ndarray] | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """Returns how well a score tells positive images from negative ones.

    `is_positive` and `score` (N,) are those of the test images, as in `ScreeningScores`, and
    `thresholds` what `choose_thresholds` gave for the validation images. The result has `roc_auc`,
    `roc_auc_interval`, `positives` and `negatives` (`roc_auc_with_interval`), and `points`: for
    each threshold its `aim`, `threshold`, `sensitivity` and `specificity`, with Wilson intervals
    for the effective numbers of groups. `implied` has by aim the images (N,) that are flagged
    whatever their score, such as those flagged as melanoma when the target is malignant. Raises
    ValueError when all images are positive or all are negative.
    """
    score, groups = np.asarray(score), number_groups(groups, len(is_positive))
    flagged = {aim: score >= threshold for aim, threshold in thresholds.items()}
    for aim, images in (implied or {}).items():
        flagged[aim] = flagged[aim] | images
    truth, points = is_positive, []
    is_positive, score, groups = select_known(is_positive, score, groups)
    for aim, threshold in thresholds.items():
        _, is_flagged = select_known(truth, flagged[aim])
        found, rejected = is_flagged[is_positive], ~is_flagged[~is_positive]
        points.append(
            {
                "aim": aim,
                "threshold": float(threshold),
                "sensitivity": float(found.mean()),
                "sensitivity_interval": interval_of_share(found, groups[is_positive]),
                "specificity": float(rejected.mean()),
                "specificity_interval": interval_of_share(rejected, groups[~is_positive]),
            }
        )
    return roc_auc_with_interval(is_positive, score, groups, seed) | {"points": points}


def roc_auc_with_interval(
    is_positive: np.ndarray, score: np.ndarray, groups: np.ndarray, seed: int
) -> dict[str, Any]:
    """Returns the ROC AUC of a score, its 95 % interval, and the numbers of images of both kinds.

    Each end is the wider of that of the bootstrap, which collapses where the score separates the
    kinds perfectly, and that of Wilson's interval with the images weighted by 1 / (number of their
    kind). Near 1 its effective sample size, 4 mn / (m + n) for m and n images, is the one that the
    variance of Hanley and McNeil (1982) implies.
    """
    values, rank = np.unique(score, return_inverse=True)
    groups = number_groups(groups, len(groups))  # of these images alone
    cells = 2 * rank[:, None] + is_positive[:, None]
    chunks = resampled_counts(cells, 2 * len(values), groups, seed)
    drawn = np.concatenate([_roc_aucs(counts[:, 1::2], counts[:, ::2]) for counts in chunks])
    roc_auc = compute_roc_curve(is_positive, score).area
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    size = effective_sample_size(groups, np.where(is_positive, 1 / positives, 1 / negatives))
    bootstrap = Resampled(np.array(roc_auc), drawn, drawn).interval(size)
    wilson = score_interval(roc_auc * size, size)
    return {
        "roc_auc": roc_auc,
        "roc_auc_interval": [min(bootstrap[0], wilson[0]), max(bootstrap[1], wilson[1])],
        "positives": positives,
        "negatives": negatives,
    }


def select_known(is_positive: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns the arrays without the images whose `is_positive` is NaN, and that as bool.

    Raises ValueError when these images are all positive or all negative.
    """
    is_positive = np.asarray(is_positive, float)
    is_known = ~np.isnan(is_positive)
    is_positive = is_positive[is_known].astype(bool)
    if is_positive.all() or not is_positive.any():
        kind = "positive" if is_positive.any() else "negative"
        raise ValueError(
            f"screening needs positive and negative images, but all of these are {kind}"
        )
    return is_positive, *(np.asarray(values)[is_known] for values in others)


def _roc_aucs(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Returns areas (R,) from the numbers of images with each score (R, S), lowest score first.

    The share of pairs of a positive and a negative in which the positive has the higher score, ties
    counted half (Mann and Whitney 1947); NaN without such pairs.
    """
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    won = (positives * (np.cumsum(negatives, axis=1) - negatives / 2)).sum(axis=1)
    return safe_ratio(won, pairs, np.nan)


def _threshold(is_positive: np.ndarray, score: np.ndarray, aim: str, level: float) -> float:
    # The highest that still finds enough positives, or the lowest that rejects enough negatives.
    values = score[is_positive] if aim == "sensitivity" else -score[~is_positive]
    value = np.sort(values)[-int(np.ceil(level * len(values) - 1e-9))]
    return float(value if aim == "sensitivity" else np.nextafter(-value, np.inf))
