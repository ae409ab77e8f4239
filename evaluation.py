"""What a set of predictions is worth, from true labels, probabilities and class names.

Everywhere `y_true` is int (N,), labels from 0 to C - 1; `y_prob` float (N, C), a probability for
each class; `y_pred` int (N,), the classes decided for, those of the highest probability unless they
are given; `class_names` the C names in label order. All of it raises ValueError for no predictions,
shapes that do not fit, labels out of range, or probabilities that are not finite.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from scipy.stats import norm
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    cohen_kappa_score,
    confusion_matrix,
    matthews_corrcoef,
    precision_recall_fscore_support,
    roc_auc_score,
)

from lesions import DIAGNOSES, find_diagnosis, is_malignant, is_melanoma, normalize_name

# Those of `compute_metrics` that have an interval. Macro precision has none: a class that is hardly
# ever predicted leaves the bootstrap nothing to draw (benchmarks/coverage.py, 92 % for 95 %).
HEADLINES = (
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "f1",
    "macro_recall",
    "macro_f1",
)
NUM_RESAMPLES = 2000
Z = 1.959964  # the normal distribution's 97.5 % quantile
NUM_BINS = 15  # of a reliability curve, as in Guo et al. 2017
SMALLEST_SUBGROUP = 30  # images; of fewer, intervals by bootstrap mean little
MOST_SUBGROUPS = 20  # a column of more values names images or patients, not kinds of them
AGE_BANDS = {"0 to 29": 30, "30 to 44": 45, "45 to 59": 60, "60 to 74": 75, "75 or more": np.inf}
AIMS = (("sensitivity", 0.90), ("sensitivity", 0.95), ("specificity", 0.90), ("specificity", 0.95))
# The diagnoses that count as malignant where nothing else is asked for.
MALIGNANT = tuple(dict.fromkeys(d.name for d in DIAGNOSES if d.is_malignant))


def compute_metrics(
    y_true: np.ndarray,
    y_prob: np.ndarray,
    class_names: Sequence[str],
    y_pred: np.ndarray | None = None,
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
    y_pred = _decided(y_true, y_prob, y_pred)
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
    y_pred: np.ndarray | None = None,
    *,
    seed: int = 42,
) -> dict[str, Any]:
    """95 % intervals of the figures of `compute_metrics`, by the same names, as [low, high].

    The headline figures, which are all but macro precision, by bias-corrected bootstrap (Efron
    1981), 2,000 resamples of whole groups: images with equal `groups` (N,), such as those of one
    lesion, are drawn together. A class's recall and precision by Wilson's score interval (1927),
    under `per_class`; None where nothing was counted.
    """
    num_classes = len(class_names)
    y_true, y_prob = _checked(y_true, y_prob, num_classes)
    y_pred = _decided(y_true, y_prob, y_pred)
    resampled = _headlines(_resampled_confusions(y_true, y_pred, num_classes, groups, seed))
    observed = _confusion(y_true, y_pred, num_classes)
    figures = _headlines(observed[None])
    intervals: dict[str, Any] = {
        name: _interval(resampled[name], figures[name][0]) for name in HEADLINES
    }
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
    y_pred_a: np.ndarray,
    y_pred_b: np.ndarray,
    groups: Sequence[Any] | None = None,
    *,
    seed: int = 42,
) -> dict[str, dict[str, Any]]:
    """By how much model A is better than model B on these images, for each headline figure.

    Paired bootstrap: both are measured on the same resamples of whole groups. Gives `difference`
    (A - B), its 95 % `interval`, and `probability`, the share of resamples in which A is better,
    ties counted half.
    """
    y_true, *predicted = (np.asarray(labels) for labels in (y_true, y_pred_a, y_pred_b))
    num_classes = int(max(labels.max(initial=0) for labels in (y_true, *predicted))) + 1
    for y_pred in predicted:
        _checked(y_true, np.zeros((len(y_pred), num_classes)), num_classes)
    resampled = [
        _headlines(_resampled_confusions(y_true, y_pred, num_classes, groups, seed))
        for y_pred in predicted
    ]
    observed = [_headlines(_confusion(y_true, y_pred, num_classes)[None]) for y_pred in predicted]
    compared = {}
    for name in HEADLINES:
        difference = float(observed[0][name][0] - observed[1][name][0])
        differences = resampled[0][name] - resampled[1][name]
        compared[name] = {
            "difference": difference,
            "interval": _interval(differences, difference),
            "probability": float(np.mean((differences > 0) + 0.5 * (differences == 0))),
        }
    return compared


def assess(
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
    """All that the predictions say of a model, as `metrics.json` has it.

    `y_prob` (N, C) are the model's own probabilities: the highest is its decision. All else is of
    the calibrated ones. `thresholds` has for each of `screening_targets` those that
    `choose_thresholds` gave on validation; a target without them, or that is all or none of these
    images, is left out. `malignant` and `unknown` are as in `counted_as`; the images of classes
    that are not known are left out of all that is said of a target. `columns` (N rows) is what
    subgroups are made by.

    Returns `test` (`compute_metrics`), `test_intervals` (`compute_intervals`), `calibration` (its
    `temperature`, `bias`, and `reliability`, `log_loss` and `brier_score` `before` and `after`),
    `counted_as`, `screening` (`screen`, by target, with its `classes` and `classes_left_out`) and
    `subgroups` (`compute_subgroups`).
    """
    y_true, y_prob = _checked(y_true, y_prob, len(class_names))
    y_pred, calibrated = y_prob.argmax(axis=1), calibration.apply(y_prob)
    metrics = compute_metrics(y_true, calibrated, class_names, y_pred)
    screening, targets = {}, {}
    left_out = left_out_of_screening(class_names, malignant, unknown)
    for name, labels in screening_targets(class_names, malignant, unknown).items():
        is_positive, is_known = np.isin(y_true, labels), ~np.isin(y_true, left_out[name])
        if name in thresholds and 0 < is_positive.sum() < is_known.sum():
            score = calibrated[:, labels].sum(axis=1)
            targets[name] = (np.where(is_known, is_positive, np.nan), score)
            screening[name] = {
                "classes": [class_names[label] for label in labels],
                "classes_left_out": [class_names[label] for label in left_out[name]],
            } | screen(
                is_positive[is_known],
                score[is_known],
                thresholds[name],
                None if groups is None else np.asarray(groups)[is_known],
                seed=seed,
            )
    return {
        "test": metrics,
        "test_intervals": compute_intervals(
            y_true, calibrated, class_names, groups, y_pred, seed=seed
        ),
        "calibration": {
            "temperature": calibration.temperature,
            "bias": dict(zip(class_names, calibration.bias, strict=True)),
            "before": _trustworthiness(y_true, y_prob, class_names),
            "after": _trustworthiness(y_true, calibrated, class_names),
        },
        "counted_as": counted_as(class_names, malignant, unknown),
        "screening": screening,
        "subgroups": {}
        if columns is None
        else compute_subgroups(y_true, y_pred, columns, groups, targets=targets, seed=seed),
    }


def most_confident_mistakes(
    y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray, count: int = 12
) -> np.ndarray:
    """The numbers of the images called wrong with the highest probability, that one first."""
    confidence = y_prob[np.arange(len(y_pred)), y_pred]
    ranked = np.argsort(-confidence, kind="stable")
    return ranked[(y_true != y_pred)[ranked]][:count]


def typical_examples(y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray) -> np.ndarray:
    """For each class the number of an image called right and of one called wrong, where there are.

    Of each kind the one whose decided class has the middle probability: neither the model's best
    nor its worst.
    """
    confidence = y_prob[np.arange(len(y_pred)), y_pred]
    chosen = []
    for label in range(y_prob.shape[1]):
        for is_right in (True, False):
            of_kind = np.flatnonzero((y_true == label) & ((y_true == y_pred) == is_right))
            ranked = of_kind[np.argsort(confidence[of_kind], kind="stable")]
            chosen.extend(ranked[len(ranked) // 2 : len(ranked) // 2 + 1])
    return np.array(chosen, dtype=np.int64)


def _trustworthiness(
    y_true: np.ndarray, y_prob: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    metrics = compute_metrics(y_true, y_prob, class_names)
    return reliability(y_true, y_prob) | {n: metrics[n] for n in ("log_loss", "brier_score")}


def wilson_interval(successes: int, total: int) -> list[float] | None:
    """Wilson's 95 % score interval of a share, [low, high]; None of nothing.

    With the share p of n and z = 1.96, (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n).
    """
    if total == 0:
        return None
    share = successes / total
    centre = share + Z**2 / (2 * total)
    half = Z * np.sqrt(share * (1 - share) / total + (Z / (2 * total)) ** 2)
    low, high = (centre - half) / (1 + Z**2 / total), (centre + half) / (1 + Z**2 / total)
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


def fit_calibration(
    y_true: np.ndarray, y_prob: np.ndarray, *, priors_shifted: bool = True
) -> Calibration:
    """The calibration that makes these images most likely, which are those of validation.

    Never those of training, on which a model is surer than it should be. Without `priors_shifted`,
    which balanced sampling and class weights do, the biases stay 0. A weak prior (standard
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
        of_bias = (residual.sum(axis=0) + bias / 3**2) * priors_shifted
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
    that reach an aim, such as "sensitivity 95%", the one with the best of the other. Raises
    ValueError when the images are all of one kind.
    """
    is_positive, score = _both_kinds(is_positive, score)
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
    `choose_thresholds` gave for others. Gives `roc_auc` with its `roc_auc_interval` (bootstrap over
    `groups`), the numbers of `positives` and `negatives`, and `points`: for each threshold its
    `aim`, `threshold`, the `sensitivity` and `specificity` that it has here, and their Wilson
    intervals. Raises ValueError when the images are all of one kind.
    """
    is_positive, score = _both_kinds(is_positive, score)
    points = [
        {"aim": aim, "threshold": float(threshold)}
        | _sensitivity_and_specificity(is_positive, score >= threshold)
        for aim, threshold in thresholds.items()
    ]
    return _separation(is_positive, score, groups, seed) | {"points": points}


def _separation(
    is_positive: np.ndarray, score: np.ndarray, groups: Sequence[Any] | None, seed: int
) -> dict[str, Any]:
    rank = np.unique(score, return_inverse=True)[1]
    areas = [
        _roc_auc(np.bincount(rank, times * is_positive), np.bincount(rank, times * ~is_positive))
        for times in _resampled_times(is_positive, groups, seed)
    ]
    roc_auc = float(roc_auc_score(is_positive, score))
    return {
        "roc_auc": roc_auc,
        "roc_auc_interval": _interval(np.array(areas), roc_auc),
        "positives": int(is_positive.sum()),
        "negatives": int((~is_positive).sum()),
    }


def _both_kinds(is_positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    is_positive, score = np.asarray(is_positive, bool), np.asarray(score, float)
    if is_positive.all() or not is_positive.any():
        raise ValueError("the images are all of one kind; nothing can be told apart")
    return is_positive, score


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


# ---------------------------------------------------------------------------- subgroups


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

    Numbers of many values come in bands: ages in those of `AGE_BANDS`, others in quarters. A column
    of one value, or of more than 20, is left out; images without a value are "unknown". For each
    column `groups`, by value `images`, `is_too_small` (fewer than 30), `accuracy` and
    `balanced_accuracy` with their intervals (bootstrap over `groups`); and `widest_gap`, the two
    groups that are large enough and differ most in balanced accuracy: `figure`, `highest`,
    `lowest`, `difference` and its `interval`, or None where fewer than two are large enough.

    `targets` are what is screened for, by name, with `is_positive` and `score` as `screen` takes
    them, but NaN where it is not known whether an image is positive. `screening` then has for each
    the `roc_auc_of_column`, which a guess by the share of positives among images of the same kind
    has, without a look at them; and `groups`, by value, with the score's `roc_auc` and its interval
    within those where there are both. Where the former is high, the model may have learnt to tell
    the kinds apart instead (Geirhos et al. 2020), and only the latter say what it sees in a lesion.
    """
    y_true, y_pred = np.asarray(y_true), np.asarray(y_pred)
    num_classes = int(max(y_true.max(), y_pred.max())) + 1
    groups = np.arange(len(y_true)) if groups is None else np.asarray(groups)
    subgroups = {}
    for column in columns:
        kinds = _kinds(columns[column])
        names = sorted(set(kinds))
        if not 2 <= len(names) <= MOST_SUBGROUPS:
            continue
        found, resampled = {}, {}
        for name in names:
            part = kinds == name
            case = (y_true[part], y_pred[part], num_classes)
            observed = _headlines(_confusion(*case)[None])
            resampled[name] = _headlines(_resampled_confusions(*case, groups[part], seed))
            found[name] = {
                "images": int(part.sum()),
                "is_too_small": bool(part.sum() < SMALLEST_SUBGROUP),
            }
            for figure in ("accuracy", "balanced_accuracy"):
                value = float(observed[figure][0])
                found[name][figure] = value
                found[name][f"{figure}_interval"] = _interval(resampled[name][figure], value)
        subgroups[str(column)] = {
            "groups": found,
            "widest_gap": _widest_gap(found, resampled),
            "screening": {
                target: _screen_within(kinds, is_positive, score, groups, seed)
                for target, (is_positive, score) in (targets or {}).items()
            },
        }
    return subgroups


def _screen_within(
    kinds: np.ndarray, is_positive: np.ndarray, score: np.ndarray, groups: np.ndarray, seed: int
) -> dict[str, Any]:
    is_known = ~np.isnan(np.asarray(is_positive, float))
    kinds, is_positive, score, groups = (
        np.asarray(values)[is_known] for values in (kinds, is_positive, score, groups)
    )
    is_positive, score = _both_kinds(is_positive, score)
    names, kind_of_image = np.unique(kinds, return_inverse=True)
    share = np.bincount(kind_of_image, is_positive) / np.bincount(kind_of_image)
    parts = {str(name): kinds == name for name in names}
    return {
        "roc_auc_of_column": float(roc_auc_score(is_positive, share[kind_of_image])),
        "groups": {
            name: _separation(is_positive[part], score[part], groups[part], seed)
            for name, part in parts.items()
            if 0 < is_positive[part].sum() < part.sum()
        },
    }


def _kinds(values: pd.Series) -> np.ndarray:
    """The name of each image's kind."""
    names = values.astype(object)
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > 8:
        if "age" in str(values.name).casefold().split("_"):
            ends = [0, *AGE_BANDS.values()]
            names = pd.cut(values, ends, right=False, labels=list(AGE_BANDS))
        else:
            names = pd.qcut(values, 4, duplicates="drop").map(
                lambda band: f"{band.left:g} to {band.right:g}"
            )
        names = names.astype(object)
    return names.where(values.notna() & (values != ""), "unknown").astype(str).to_numpy()


def _widest_gap(found: dict[str, Any], resampled: dict[str, Any]) -> dict[str, Any] | None:
    large = [name for name in found if not found[name]["is_too_small"]]
    if len(large) < 2:
        return None
    figure = "balanced_accuracy"
    ranked = sorted(large, key=lambda name: found[name][figure])
    highest, lowest = ranked[-1], ranked[0]
    difference = found[highest][figure] - found[lowest][figure]
    differences = resampled[highest][figure] - resampled[lowest][figure]
    return {
        "figure": figure,
        "highest": highest,
        "lowest": lowest,
        "difference": difference,
        "interval": _interval(differences, difference),
    }


# ---------------------------------------------------------------------------- the bootstrap


def _resampled_confusions(
    y_true: np.ndarray,
    y_pred: np.ndarray,
    num_classes: int,
    groups: Sequence[Any] | None,
    seed: int,
) -> np.ndarray:
    """The confusion matrix of each resample, (NUM_RESAMPLES, C, C)."""
    resamples = _resampled_times(y_true, groups, seed)
    return np.stack([_confusion(y_true, y_pred, num_classes, times) for times in resamples])


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


def _interval(resampled: np.ndarray, observed: float) -> list[float]:
    """The 95 % interval of a figure, [low, high], from what it is in the resamples, NaN left out.

    Their percentiles Phi(2 z0 ± z), with Phi(z0) the share of resamples below what was observed,
    ties counted half: the bias-corrected bootstrap (BC, Efron 1981). Without a correction the
    intervals of weighted precision, which small test sets exaggerate, lie too high.
    """
    resampled = resampled[np.isfinite(resampled)]
    share_below = np.mean((resampled < observed) + 0.5 * (resampled == observed))
    z0 = np.clip(norm.ppf(share_below), -Z, Z)
    return np.quantile(resampled, norm.cdf(2 * z0 + np.array([-Z, Z]))).tolist()


def _confusion(
    y_true: np.ndarray, y_pred: np.ndarray, num_classes: int, times: np.ndarray | None = None
) -> np.ndarray:
    """The confusion matrix (C, C) when each image counts as often as `times` (N,) says."""
    cells = y_true * num_classes + y_pred
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


def _decided(y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray | None) -> np.ndarray:
    if y_pred is None:
        return y_prob.argmax(axis=1)
    y_pred = np.asarray(y_pred)
    if y_pred.shape != y_true.shape or not np.isin(y_pred, np.arange(y_prob.shape[1])).all():
        raise ValueError(f"y_pred must be {y_true.shape}, labels of {y_prob.shape[1]} classes")
    return y_pred


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
