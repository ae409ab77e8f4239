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
from scipy.sparse import csr_array
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

from imaging.lesions import DIAGNOSES, find_diagnosis, is_malignant, is_melanoma, normalize_name

# Those of `compute_metrics` that have an interval.
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
MAX_COUNTS_AT_ONCE = 4_000_000  # of the bootstrap in memory: 32 MB
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
    `top_2_accuracy`, the share of images whose class is the decided one or the most probable of
    the others;
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
        "top_2_accuracy": float(_is_among_top_2(y_true, y_prob, y_pred).mean()),
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

    Images with equal `groups` (N,), such as those of one lesion, count as one observation. The
    headline figures, which are all but macro precision, have intervals by bootstrap, 2,000
    resamples of whole groups with the possibility of groups unlike those seen (see `_interval`), so
    that 20 right of 20 give 0.87 to 1 and not 1 to 1. A class's recall and precision have Wilson's
    score interval (1927) for the effective number of groups (`effective_sample_size`), under
    `per_class`; None where nothing was counted.
    """
    num_classes = len(class_names)
    y_true, y_prob = _checked(y_true, y_prob, num_classes)
    y_pred = _decided(y_true, y_prob, y_pred)
    groups = _group_numbers(groups, len(y_true))
    figures, *resampled = _bootstrap(y_true[:, None], y_pred[:, None], num_classes, groups, seed)
    intervals: dict[str, Any] = {
        name: _interval(
            *(values[name][:, 0] for values in resampled), figures[name][0], groups.max() + 1
        )
        for name in HEADLINES
    }
    is_right = y_true == y_pred
    intervals["per_class"] = {
        name: {
            "precision": _interval_of_share(is_right[y_pred == label], groups[y_pred == label]),
            "recall": _interval_of_share(is_right[y_true == label], groups[y_true == label]),
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

    Paired bootstrap: both are measured on the same resamples of whole groups, to which groups may
    be added that only one of them gets right (see `_interval`): two models that agree on 20 images
    may differ on others. Gives `difference` (A - B), its 95 % `interval`, and `probability`, the
    share of resamples in which A is better, ties counted half.
    """
    y_true, *predicted = (np.asarray(labels) for labels in (y_true, y_pred_a, y_pred_b))
    highest = max(labels.max(initial=0) for labels in (y_true, *predicted))
    num_classes = max(int(highest) + 1, 2)  # where all is one class, another could have been called
    for y_pred in predicted:
        _checked(y_true, np.zeros((len(y_pred), num_classes)), num_classes)
    groups = _group_numbers(groups, len(y_true))
    figures, drawn, smoothed = _bootstrap(
        np.stack([y_true, y_true], axis=1),
        np.stack(predicted, axis=1),
        num_classes,
        groups,
        seed,
        are_opposed=True,
    )
    compared = {}
    for name in HEADLINES:
        difference, differences, smoothed_ones = (
            values[name][..., 0] - values[name][..., 1] for values in (figures, drawn, smoothed)
        )
        compared[name] = {
            "difference": float(difference),
            "interval": _interval(
                differences, smoothed_ones, difference, groups.max() + 1, lowest=-1.0
            ),
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
    `temperature`, `bias`, and `reliability` of the decisions, `log_loss` and `brier_score` with the
    probabilities `before` and `after`), `counted_as`, `screening` (`screen`, by target, with its
    `classes` and `classes_left_out`) and `subgroups` (`compute_subgroups`).
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
            "before": _trustworthiness(y_true, y_prob, class_names, y_pred),
            "after": _trustworthiness(y_true, calibrated, class_names, y_pred),
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
    y_true: np.ndarray, y_prob: np.ndarray, class_names: Sequence[str], y_pred: np.ndarray
) -> dict[str, Any]:
    metrics = compute_metrics(y_true, y_prob, class_names, y_pred)
    return reliability(y_true, y_prob, y_pred) | {
        n: metrics[n] for n in ("log_loss", "brier_score")
    }


def wilson_interval(successes: float, total: float) -> list[float] | None:
    """Wilson's 95 % score interval of a share, [low, high]; None of nothing.

    With the share p of n and z = 1.96, (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n). Where
    n is an effective sample size, neither number need be whole.
    """
    if total == 0:
        return None
    share = successes / total
    centre = share + Z**2 / (2 * total)
    half = Z * np.sqrt(share * (1 - share) / total + (Z / (2 * total)) ** 2)
    low, high = (centre - half) / (1 + Z**2 / total), (centre + half) / (1 + Z**2 / total)
    return [float(max(low, 0)), float(min(high, 1))]


def effective_sample_size(groups: Sequence[Any], weights: np.ndarray | None = None) -> float:
    """Gives the number of independent observations that images of these groups are worth.

    Kish (1965): (Σ w)² / Σ W², with w the weights of the images, equal unless given, and W their
    sums over each group. Images of one group count as if all had the same result, so that with
    equal weights and groups of equal size it is the number of groups; images without groups have
    one each.
    """
    group_of_image = _group_numbers(groups, len(groups))
    sums = np.bincount(group_of_image, weights)
    return float(sums.sum() ** 2 / (sums**2).sum()) if len(sums) > 0 else 0.0


def _interval_of_share(is_hit: np.ndarray, groups: np.ndarray) -> list[float] | None:
    """Gives Wilson's interval of the share of hits, for the effective number of groups."""
    size = effective_sample_size(groups)
    return wilson_interval(is_hit.mean() * size, size) if size > 0 else None


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


def reliability(
    y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray | None = None
) -> dict[str, Any]:
    """How far the probability of the class decided for is from how often it is right.

    In 15 equal bins of that probability (Guo et al. 2017): `confidence`, its mean in each bin,
    `accuracy`, None for both in an empty one, and `count`; over the bins
    `expected_calibration_error`, the mean of |accuracy - confidence| weighted by count, and
    `maximum_calibration_error`, the largest.
    """
    y_true, y_prob = _checked(y_true, y_prob, np.asarray(y_prob).shape[-1])
    y_pred = _decided(y_true, y_prob, y_pred)
    confidence, is_right = y_prob[np.arange(len(y_pred)), y_pred], y_pred == y_true
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
    `choose_thresholds` gave for others. Gives `roc_auc` with its `roc_auc_interval` (the wider end
    of a bootstrap over `groups` and of Wilson's interval, see `_separation`), the numbers of
    `positives` and `negatives`, and `points`: for each threshold its `aim`, `threshold`, the
    `sensitivity` and `specificity` that it has here, and their Wilson intervals for the effective
    numbers of groups (`effective_sample_size`). Raises ValueError when the images are all of one
    kind.
    """
    is_positive, score = _both_kinds(is_positive, score)
    groups = _group_numbers(groups, len(is_positive))
    points = [
        {"aim": aim, "threshold": float(threshold)}
        | _sensitivity_and_specificity(is_positive, score >= threshold, groups)
        for aim, threshold in thresholds.items()
    ]
    return _separation(is_positive, score, groups, seed) | {"points": points}


def _separation(
    is_positive: np.ndarray, score: np.ndarray, groups: np.ndarray, seed: int
) -> dict[str, Any]:
    """Gives the ROC AUC of a score, its interval, and the numbers of both kinds of images.

    Each end is the wider of that of the bootstrap, which collapses where the score parts the kinds
    wholly, and that of Wilson's interval with the images weighted by 1 / (number of their kind).
    Near 1 its effective sample size, 4 mn / (m + n) for m and n images, is the one that the
    variance of Hanley and McNeil (1982) has.
    """
    values, rank = np.unique(score, return_inverse=True)
    groups = _group_numbers(groups, len(groups))  # of these images alone
    areas = [
        _roc_auc(counts[:, 1::2], counts[:, ::2])
        for counts in _resampled_counts(
            2 * rank[:, None] + is_positive[:, None], 2 * len(values), groups, seed
        )
    ]
    areas, roc_auc = np.concatenate(areas), float(roc_auc_score(is_positive, score))
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    weights = np.where(is_positive, 1 / positives, 1 / negatives)
    size = effective_sample_size(groups, weights)
    ends = _interval(areas, areas, roc_auc, size), wilson_interval(roc_auc * size, size)
    return {
        "roc_auc": roc_auc,
        "roc_auc_interval": [min(low for low, _ in ends), max(high for _, high in ends)],
        "positives": positives,
        "negatives": negatives,
    }


def _both_kinds(is_positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    is_positive, score = np.asarray(is_positive, bool), np.asarray(score, float)
    if is_positive.all() or not is_positive.any():
        raise ValueError("the images are all of one kind; nothing can be told apart")
    return is_positive, score


def _roc_auc(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """The areas (R,) from the numbers of both at each score (R, S), lowest first.

    It is the share of pairs of a positive and a negative in which the positive has the higher
    score, ties counted half (Mann and Whitney 1947); NaN where one kind lacks.
    """
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    won = (positives * (np.cumsum(negatives, axis=1) - negatives / 2)).sum(axis=1)
    return _ratio(won, pairs, np.nan)


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
        "sensitivity_interval": _interval_of_share(found, groups[is_positive]),
        "specificity": float(rejected.mean()),
        "specificity_interval": _interval_of_share(rejected, groups[~is_positive]),
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
    groups = _group_numbers(groups, len(y_true))
    subgroups = {}
    for column in columns:
        names, kind_of_image = np.unique(_kinds(columns[column]), return_inverse=True)
        if not 2 <= len(names) <= MOST_SUBGROUPS:
            continue
        figures, *resampled = _bootstrap(
            y_true[:, None], y_pred[:, None], num_classes, groups, seed, kind_of_image
        )
        counts = np.bincount(kind_of_image)
        found = {}
        for kind, name in enumerate(names.tolist()):
            found[name] = {
                "images": int(counts[kind]),
                "is_too_small": bool(counts[kind] < SMALLEST_SUBGROUP),
            }
            for figure in ("accuracy", "balanced_accuracy"):
                value = float(figures[figure][kind])
                found[name][figure] = value
                found[name][f"{figure}_interval"] = _interval(
                    *(values[figure][:, kind] for values in resampled), value, counts[kind]
                )
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


def _screen_within(
    kind_of_image: np.ndarray,
    names: np.ndarray,
    is_positive: np.ndarray,
    score: np.ndarray,
    groups: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    is_known = ~np.isnan(np.asarray(is_positive, float))
    kind_of_image, is_positive, score, groups = (
        np.asarray(values)[is_known] for values in (kind_of_image, is_positive, score, groups)
    )
    is_positive, score = _both_kinds(is_positive, score)
    share = np.bincount(kind_of_image, is_positive) / np.bincount(kind_of_image)
    parts = {str(name): kind_of_image == kind for kind, name in enumerate(names)}
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
        "interval": _interval(
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
    scores = _ratio(np.abs(error), np.sqrt(variances[highest] + variances[lowest]), 0.0)
    return max(Z, float(np.quantile(scores, 0.95)))


# ---------------------------------------------------------------------------- the bootstrap


def _group_numbers(groups: Sequence[Any] | None, num_images: int) -> np.ndarray:
    """Numbers the groups of the images (N,) from 0; where none are given each has its own."""
    if groups is None:
        return np.arange(num_images)
    groups = np.asarray(groups)
    if groups.shape != (num_images,):
        raise ValueError(f"groups has shape {groups.shape}; it must be {(num_images,)}")
    return np.unique(groups, return_inverse=True)[1]


def _bootstrap(
    y_true: np.ndarray,
    y_pred: np.ndarray,
    num_classes: int,
    groups: np.ndarray,
    seed: int,
    kind_of_image: np.ndarray | None = None,
    *,
    are_opposed: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Gives the headline figures observed (P,), and in NUM_RESAMPLES resamples (R, P), twice.

    The P parts are either the models whose decisions are the columns of `y_pred` (N, P), or the
    kinds into which `kind_of_image` (N,) cuts the images. All parts are of the same resamples of
    whole groups. The second time each resample has unseen groups besides (`_unseen_groups`).
    """
    part = np.arange(y_pred.shape[1]) if kind_of_image is None else kind_of_image[:, None]
    cells = (part * num_classes + y_true) * num_classes + y_pred
    shape = (int(part.max()) + 1, num_classes, num_classes)
    observed = np.bincount(cells.ravel(), minlength=np.prod(shape)).reshape(shape)
    images_per_group = len(groups) / len(np.unique(groups))
    rng = np.random.default_rng([seed, 1])
    drawn, smoothed = [], []
    for counts in _resampled_counts(cells, observed.size, groups, seed):
        confusions = counts.reshape(-1, *shape)
        unseen = images_per_group * _unseen_groups(rng, len(counts), observed, are_opposed)
        drawn.append(_headlines(confusions))
        smoothed.append(_headlines(confusions + unseen))
    return _headlines(observed), _joined(drawn), _joined(smoothed)


def _joined(figures: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([some[name] for some in figures]) for name in HEADLINES}


def _resampled_counts(
    cells: np.ndarray, num_cells: int, groups: np.ndarray, seed: int
) -> Iterator[np.ndarray]:
    """Yields how often each cell is drawn, (r, num_cells), for NUM_RESAMPLES resamples in all.

    A resample has as many groups as there are, drawn with replacement; each brings all its images,
    and an image counts in its `cells` (N, P). The groups drawn depend on the seed and the groups
    alone.
    """
    num_groups = int(groups.max()) + 1
    rows = np.repeat(groups, cells.shape[1])
    cells_of_group = csr_array(
        (np.ones(cells.size), (rows, cells.ravel())), shape=(num_groups, num_cells)
    )
    rng = np.random.default_rng(seed)
    at_once = max(1, MAX_COUNTS_AT_ONCE // max(num_groups, num_cells))
    for start in range(0, NUM_RESAMPLES, at_once):
        count = min(at_once, NUM_RESAMPLES - start)
        drawn = rng.integers(num_groups, size=(count, num_groups))
        drawn += num_groups * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * num_groups)
        yield times.reshape(count, num_groups) @ cells_of_group


def _unseen_groups(
    rng: np.random.Generator, count: int, observed: np.ndarray, are_opposed: bool
) -> np.ndarray:
    """The numbers of groups (count, P, C, C) that could have been seen besides, in each resample.

    On average one that is called right and one that is called wrong, in each of P parts; Poisson
    numbers, spread evenly over the classes that have images, and those called wrong over the other
    classes. Where two models are opposed, what is right in one is wrong in the other.
    """
    has_images = observed.sum(axis=2) > 0
    rates = has_images / np.maximum(has_images.sum(axis=1, keepdims=True), 1)
    right, wrong = rng.poisson(rates, (2, count, *rates.shape))
    if are_opposed:
        wrong[:, 1], right[:, 1] = right[:, 0], wrong[:, 0]
    num_classes = observed.shape[-1]
    is_right = np.eye(num_classes)
    elsewhere = (1 - is_right) / max(num_classes - 1, 1)
    return right[..., None] * is_right + wrong[..., None] * elsewhere


def _interval(
    resampled: np.ndarray,
    smoothed: np.ndarray,
    observed: float,
    sample_size: float,
    *,
    lowest: float = 0.0,
    z: float = Z,
) -> list[float]:
    """The 95 % interval of a figure, [low, high], from what it is in resamples, NaN left out.

    They are percentiles of the `smoothed` resamples, which have unseen groups besides: where all
    images are right or all are wrong, resamples of them are too, and say nothing of what a few more
    images could have shown. On average one group more that is right and one that is wrong gives
    about Wilson's interval there (Agresti and Coull 1998 and Price and Bonett 2004 add two of each,
    which benchmarks/RESULTS.md shows to be too many).

    The percentiles are Phi(z0 ± z), with Phi(z0) the share of the plain resamples below what was
    observed, ties counted half. That is half of Efron's bias correction (BC, 1981): the middle is
    where the figure observed lies among the plain resamples, which exaggerate weighted precision.
    The whole correction, Phi(2 z0 ± z), overshoots near the border. The figure observed is always
    inside.

    Weighted precision of images of one class is 1 or 0 in any resample. What never differs gets a
    width by as much as an outcome not seen in `sample_size` could move it, in [`lowest`, 1].
    """
    is_known = np.isfinite(resampled)
    resampled, smoothed = resampled[is_known], smoothed[is_known]
    is_tie = np.isclose(resampled, observed, rtol=0, atol=1e-9)
    share_below = np.mean(((resampled < observed) & ~is_tie) + 0.5 * is_tie)
    z0 = np.clip(norm.ppf(share_below), -Z, Z)
    low, high = np.quantile(smoothed, norm.cdf(z0 + np.array([-z, z])))
    low, high = min(low, observed), max(high, observed)
    if high - low < 1e-9:
        share_unseen = wilson_interval(0, sample_size)[1]
        low, high = low - share_unseen * (low - lowest), high + share_unseen * (1 - high)
    return [float(low), float(high)]


def _headlines(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """The headline figures of confusion matrices (..., C, C), each (...,); NaN of no images."""
    hits = np.diagonal(confusions, axis1=-2, axis2=-1)
    support, predicted = confusions.sum(axis=-1), confusions.sum(axis=-2)
    per_class = {
        "precision": _ratio(hits, predicted, 0),
        "recall": _ratio(hits, support, 0),
        "f1": _ratio(2 * hits, support + predicted, 0),
    }
    total, present = support.sum(axis=-1), support > 0
    headlines = {"accuracy": _ratio(hits.sum(axis=-1), total, np.nan)}
    for name, values in per_class.items():
        headlines[name] = _ratio((values * support).sum(axis=-1), total, np.nan)
        headlines[f"macro_{name}"] = _ratio(
            (values * present).sum(axis=-1), present.sum(axis=-1), np.nan
        )
    return headlines | {"balanced_accuracy": headlines["macro_recall"]}


def _ratio(numerators: np.ndarray, denominators: np.ndarray, of_nothing: float) -> np.ndarray:
    """The quotients, and `of_nothing` where the denominator is 0."""
    quotients = np.full(np.shape(numerators), of_nothing, dtype=np.float64)
    return np.divide(numerators, denominators, out=quotients, where=denominators > 0)


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


def _is_among_top_2(y_true: np.ndarray, y_prob: np.ndarray, y_pred: np.ndarray) -> np.ndarray:
    """Of equal probabilities the first class counts as the higher, as with the decision."""
    images = np.arange(len(y_true))
    others = y_prob.copy()
    others[images, y_pred] = -np.inf
    return (y_pred == y_true) | (others.argmax(axis=1) == y_true)


def _or_0(score, y_true: np.ndarray, y_pred: np.ndarray) -> float:
    """An agreement beyond chance, 0 where all is one class and it is not defined."""
    is_one_class = len(np.unique(np.concatenate([y_true, y_pred]))) == 1
    return 0.0 if is_one_class else float(score(y_true, y_pred))
