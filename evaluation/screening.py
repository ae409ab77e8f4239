"""Melanoma and malignant against the rest: targets, thresholds, curves."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.intervals import (
    basic_interval,
    effective_sample_size,
    group_numbers,
    interval_of_share,
    resampled_counts,
    wilson_interval,
)
from evaluation.metrics import compute_roc_curve, safe_ratio
from imaging.lesions import DIAGNOSES, find_diagnosis, is_malignant, is_melanoma, normalize_name

AIMS = (("sensitivity", 0.90), ("sensitivity", 0.95), ("specificity", 0.90), ("specificity", 0.95))
# The diagnoses that count as malignant where nothing else is asked for.
MALIGNANT = tuple(dict.fromkeys(d.name for d in DIAGNOSES if d.is_malignant))


def match_classes(class_names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Returns the labels of the classes that are called like one of `wanted`.

    The first of these that there is for a name: classes of the same spelling; classes whose names
    differ by case, `_`, `-`, punctuation and a plural s alone; classes of the same diagnosis, so
    that `mel` is melanoma (`lesions.find_diagnosis`). Raises ValueError for a name that no class is
    called like, and names the nearest. `MALIGNANT` stands for the malignant classes, whichever
    there are; ValueError when there is none.
    """
    if tuple(wanted) == MALIGNANT:
        labels = [label for label, name in enumerate(class_names) if is_malignant(name)]
        missing = [] if labels else list(wanted)
    else:
        found = {name: _called_like(class_names, name) for name in wanted}
        labels = sorted({label for labels in found.values() for label in labels})
        missing = [name for name in found if not found[name]]
    if missing:
        nearest = dict.fromkeys(_nearest(class_names, name) for name in missing)
        raise ValueError(
            f"none of the classes {', '.join(class_names)} is called like {', '.join(missing)}; "
            f"the nearest: {', '.join(nearest)}"
        )
    return labels


def _called_like(class_names: Sequence[str], wanted: str) -> list[int]:
    plain, diagnosis = normalize_name(wanted), find_diagnosis(wanted)
    same_spelling = [name == wanted for name in class_names]
    same_name = [plain != "" and normalize_name(name) == plain for name in class_names]
    diagnoses = [find_diagnosis(name) for name in class_names]
    same_diagnosis = [
        None not in (found, diagnosis) and found.name == diagnosis.name for found in diagnoses
    ]
    for is_same in (same_spelling, same_name, same_diagnosis):
        if any(is_same):
            return np.flatnonzero(is_same).tolist()
    return []


def _nearest(class_names: Sequence[str], wanted: str) -> str:
    plain = normalize_name(wanted)
    return max(
        class_names,
        key=lambda name: difflib.SequenceMatcher(None, normalize_name(name), plain).ratio(),
    )


def counted_as(
    class_names: Sequence[str],
    malignant: Sequence[str] = MALIGNANT,
    unknown: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """Returns the names of the classes that count as `malignant`, as `benign` and as `unknown`.

    By default as `lesions.is_malignant` says. With other names in `malignant`, classes called like
    these count as malignant and all others as benign, but for those in `unknown`. Raises ValueError
    for a name in `malignant` that no class is called like.
    """
    if tuple(malignant) == MALIGNANT:
        kinds = {True: "malignant", False: "benign", None: "unknown"}
        kind_of = {name: kinds[is_malignant(name)] for name in class_names}
    else:
        labels = match_classes(class_names, malignant)
        kind_of = dict.fromkeys(class_names, "benign")
        kind_of |= {class_names[label]: "malignant" for label in labels}
    kind_of |= dict.fromkeys(unknown or (), "unknown")
    return {
        kind: [name for name in class_names if kind_of[name] == kind]
        for kind in ("malignant", "benign", "unknown")
    }


def screening_targets(
    class_names: Sequence[str],
    malignant: Sequence[str] = MALIGNANT,
    unknown: Sequence[str] | None = None,
) -> dict[str, list[int]]:
    """Returns what is screened for, with the labels of its classes: `malignant` and `melanoma`.

    `malignant` and `unknown` are as in `counted_as`; `melanoma` has all classes of melanoma,
    in-situ ones and metastases too. Only what there is, and what some other class surely is not.
    """
    truths = _screening_truths(class_names, malignant, unknown)
    return {
        name: [label for label, truth in enumerate(of_classes) if truth]
        for name, of_classes in truths.items()
        if True in of_classes and False in of_classes
    }


def left_out_of_screening(
    class_names: Sequence[str],
    malignant: Sequence[str] = MALIGNANT,
    unknown: Sequence[str] | None = None,
) -> dict[str, list[int]]:
    """Returns for each of `screening_targets` the labels of classes that may or may not be it.

    Their images are left out where thresholds are chosen and figures are measured.
    """
    truths = _screening_truths(class_names, malignant, unknown)
    return {
        name: [label for label, truth in enumerate(truths[name]) if truth is None]
        for name in screening_targets(class_names, malignant, unknown)
    }


class ScreeningScores(NamedTuple):
    """How probable it is that each of N images is what is screened for, and whether it is."""

    is_positive: np.ndarray  # NaN where it is not known
    score: np.ndarray


def screening_scores(
    y_true: np.ndarray,
    y_prob: np.ndarray,
    class_names: Sequence[str],
    malignant: Sequence[str] = MALIGNANT,
    unknown: Sequence[str] | None = None,
) -> dict[str, ScreeningScores]:
    """Returns the scores of the images for each of `screening_targets`.

    The score is the sum of the probabilities of the target's classes. A target is left out where
    there are no images of it, or none of anything else.
    """
    left_out = left_out_of_screening(class_names, malignant, unknown)
    scores = {}
    for name, labels in screening_targets(class_names, malignant, unknown).items():
        is_known = ~np.isin(y_true, left_out[name])
        is_positive = np.where(is_known, np.isin(y_true, labels), np.nan)
        if np.isin([0, 1], is_positive).all():
            scores[name] = ScreeningScores(is_positive, y_prob[:, labels].sum(axis=1))
    return scores


def _screening_truths(
    class_names: Sequence[str], malignant: Sequence[str], unknown: Sequence[str] | None
) -> dict[str, list[bool | None]]:
    """Whether each class is malignant, and melanoma; None where that is not known."""
    counted = counted_as(class_names, malignant, unknown)
    truth_of_kind = {"malignant": True, "benign": False, "unknown": None}
    is_counted_as = {name: truth_of_kind[kind] for kind in counted for name in counted[kind]}
    # What counts as benign is no melanoma, unless it is called so.
    return {
        "malignant": [is_counted_as[name] for name in class_names],
        "melanoma": [
            is_melanoma(name) or (False if is_counted_as[name] is False else is_melanoma(name))
            for name in class_names
        ],
    }


def why_screening_is_off(counted: Mapping[str, Sequence[str]]) -> str | None:
    """Returns why nothing can be screened for, from what `counted_as` gives; None where it can."""
    names = [name for kind in counted.values() for name in kind]
    if screening_targets(names, counted["malignant"], counted["unknown"]):
        return None
    lacking = "benign" if counted["malignant"] else "malignant"
    return (
        f"none of the classes {', '.join(names)} is known as {lacking}; name those that are "
        "malignant with --malignant_classes"
    )


def screening_warnings(counted: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns what a user has to hear of, in sentences, from what `counted_as` gives."""
    reason = why_screening_is_off(counted)
    found = [] if reason is None else [f"screening is off: {reason}"]
    if counted["unknown"] and reason is None:
        found.append(
            "not known whether malignant or benign, and left out of the screening figures: "
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
    """For 90 % and 95 % of sensitivity and of specificity, the threshold that reaches it.

    `is_positive` (N,) says which images are what must not be missed, `score` (N,) is higher for
    those; `score >= threshold` is positive. The images are those of validation. Of the thresholds
    that reach an aim, such as "sensitivity 95%", the one with the best of the other. Images whose
    `is_positive` is NaN are left out. Raises ValueError when the others are all of one kind.
    """
    is_positive, score = select_known(is_positive, score)
    return {f"{aim} {level:.0%}": _threshold(is_positive, score, aim, level) for aim, level in AIMS}


def screen(
    is_positive: np.ndarray,
    score: np.ndarray,
    thresholds: Mapping[str, float],
    groups: Sequence[Any] | None = None,
    *,
    seed: int = 42,
) -> dict[str, Any]:
    """How well a score, higher for what must not be missed, tells it from the rest.

    `is_positive` and `score` (N,) are of the images tested, `thresholds` those that
    `choose_thresholds` gave for others. Gives `roc_auc` with its `roc_auc_interval` (the wider end
    of a bootstrap over `groups` and of Wilson's interval, see `separation`), the numbers of
    `positives` and `negatives`, and `points`: for each threshold its `aim`, `threshold`, the
    `sensitivity` and `specificity` that it has here, and their Wilson intervals for the effective
    numbers of groups (`effective_sample_size`). Images whose `is_positive` is NaN are left out.
    Raises ValueError when the others are all of one kind.
    """
    groups = group_numbers(groups, len(is_positive))
    is_positive, score, groups = select_known(is_positive, score, groups)
    points = [
        {"aim": aim, "threshold": float(threshold)}
        | _sensitivity_and_specificity(is_positive, score >= threshold, groups)
        for aim, threshold in thresholds.items()
    ]
    return separation(is_positive, score, groups, seed) | {"points": points}


def separation(
    is_positive: np.ndarray, score: np.ndarray, groups: np.ndarray, seed: int
) -> dict[str, Any]:
    """Gives the ROC AUC of a score, its interval, and the numbers of both kinds of images.

    Each end is the wider of that of the bootstrap, which collapses where the score parts the kinds
    wholly, and that of Wilson's interval with the images weighted by 1 / (number of their kind).
    Near 1 its effective sample size, 4 mn / (m + n) for m and n images, is the one that the
    variance of Hanley and McNeil (1982) has.
    """
    values, rank = np.unique(score, return_inverse=True)
    groups = group_numbers(groups, len(groups))  # of these images alone
    areas = [
        _roc_auc(counts[:, 1::2], counts[:, ::2])
        for counts in resampled_counts(
            2 * rank[:, None] + is_positive[:, None], 2 * len(values), groups, seed
        )
    ]
    areas, roc_auc = np.concatenate(areas), compute_roc_curve(is_positive, score).area
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    weights = np.where(is_positive, 1 / positives, 1 / negatives)
    size = effective_sample_size(groups, weights)
    ends = basic_interval(areas, areas, roc_auc, size), wilson_interval(roc_auc * size, size)
    return {
        "roc_auc": roc_auc,
        "roc_auc_interval": [min(low for low, _ in ends), max(high for _, high in ends)],
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
        raise ValueError("the images are all of one kind; nothing can be told apart")
    return is_positive, *(np.asarray(values)[is_known] for values in others)


def _roc_auc(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """The areas (R,) from the numbers of both at each score (R, S), lowest first.

    It is the share of pairs of a positive and a negative in which the positive has the higher
    score, ties counted half (Mann and Whitney 1947); NaN where one kind lacks.
    """
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    won = (positives * (np.cumsum(negatives, axis=1) - negatives / 2)).sum(axis=1)
    return safe_ratio(won, pairs, np.nan)


def _threshold(is_positive: np.ndarray, score: np.ndarray, aim: str, level: float) -> float:
    if aim == "sensitivity":  # the highest that still calls enough of the positives positive
        ranked = np.sort(score[is_positive])[::-1]
        return float(ranked[int(np.ceil(level * len(ranked) - 1e-9)) - 1])
    # The lowest that still leaves enough of the negatives negative.
    ranked = np.sort(score[~is_positive])
    highest_negative = ranked[int(np.ceil(level * len(ranked) - 1e-9)) - 1]
    return float(np.nextafter(highest_negative, np.inf))


def _sensitivity_and_specificity(
    is_positive: np.ndarray, is_called: np.ndarray, groups: np.ndarray
) -> dict[str, Any]:
    found, rejected = is_called[is_positive], ~is_called[~is_positive]
    return {
        "sensitivity": float(found.mean()),
        "sensitivity_interval": interval_of_share(found, groups[is_positive]),
        "specificity": float(rejected.mean()),
        "specificity_interval": interval_of_share(rejected, groups[~is_positive]),
    }
