"""Confidence intervals by bootstrap over groups, and Wilson's for shares."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import norm

from evaluation.metrics import HEADLINES, check_predictions, decisions, headline_metrics

NUM_RESAMPLES = 2000
MAX_COUNTS_AT_ONCE = 4_000_000  # of the bootstrap in memory: 32 MB
Z = 1.959964  # the normal distribution's 97.5 % quantile


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
    resamples of whole groups with the possibility of groups unlike those seen (see
    `basic_interval`), so that 20 right of 20 give 0.87 to 1 and not 1 to 1. A class's recall and
    precision have Wilson's score interval (1927) for the effective number of groups
    (`effective_sample_size`), under `per_class`; None where nothing was counted.
    """
    num_classes = len(class_names)
    y_true, y_prob = check_predictions(y_true, y_prob, num_classes)
    y_pred = decisions(y_true, y_prob, y_pred)
    groups = group_numbers(groups, len(y_true))
    figures, *resampled = bootstrap(y_true[:, None], y_pred[:, None], num_classes, groups, seed)
    intervals: dict[str, Any] = {
        name: basic_interval(
            *(values[name][:, 0] for values in resampled), figures[name][0], groups.max() + 1
        )
        for name in HEADLINES
    }
    is_right = y_true == y_pred
    intervals["per_class"] = {
        name: {
            "precision": interval_of_share(is_right[y_pred == label], groups[y_pred == label]),
            "recall": interval_of_share(is_right[y_true == label], groups[y_true == label]),
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
    be added that only one of them gets right (see `basic_interval`): two models that agree on 20
    images may differ on others. Gives `difference` (A - B), its 95 % `interval`, and
    `probability`, the share of resamples in which A is better, ties counted half.
    """
    y_true, *predicted = (np.asarray(labels) for labels in (y_true, y_pred_a, y_pred_b))
    highest = max(labels.max(initial=0) for labels in (y_true, *predicted))
    num_classes = max(int(highest) + 1, 2)  # where all is one class, another could have been called
    for y_pred in predicted:
        check_predictions(y_true, np.zeros((len(y_pred), num_classes)), num_classes)
    groups = group_numbers(groups, len(y_true))
    figures, drawn, smoothed = bootstrap(
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
            "interval": basic_interval(
                differences, smoothed_ones, difference, groups.max() + 1, lowest=-1.0
            ),
            "probability": float(np.mean((differences > 0) + 0.5 * (differences == 0))),
        }
    return compared


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
    return [float(max(min(low, share), 0)), float(min(max(high, share), 1))]  # despite rounding


def effective_sample_size(groups: Sequence[Any], weights: np.ndarray | None = None) -> float:
    """Gives the number of independent observations that images of these groups are worth.

    Kish (1965): (Σ w)² / Σ W², with w the weights of the images, equal unless given, and W their
    sums over each group. Images of one group count as if all had the same result, so that with
    equal weights and groups of equal size it is the number of groups; images without groups have
    one each.
    """
    group_of_image = group_numbers(groups, len(groups))
    sums = np.bincount(group_of_image, weights)
    return float(sums.sum() ** 2 / (sums**2).sum()) if len(sums) > 0 else 0.0


def interval_of_share(is_hit: np.ndarray, groups: np.ndarray) -> list[float] | None:
    """Gives Wilson's interval of the share of hits, for the effective number of groups."""
    size = effective_sample_size(groups)
    return wilson_interval(is_hit.mean() * size, size) if size > 0 else None


def group_numbers(groups: Sequence[Any] | None, num_images: int) -> np.ndarray:
    """Numbers the groups of the images (N,) from 0; where none are given each has its own."""
    if groups is None:
        return np.arange(num_images)
    groups = np.asarray(groups)
    if groups.shape != (num_images,):
        raise ValueError(f"groups has shape {groups.shape}; it must be {(num_images,)}")
    return np.unique(groups, return_inverse=True)[1]


def bootstrap(
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
    for counts in resampled_counts(cells, observed.size, groups, seed):
        confusions = counts.reshape(-1, *shape)
        unseen = images_per_group * _unseen_groups(rng, len(counts), observed, are_opposed)
        drawn.append(headline_metrics(confusions))
        smoothed.append(headline_metrics(confusions + unseen))
    return headline_metrics(observed), _joined(drawn), _joined(smoothed)


def _joined(figures: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([some[name] for some in figures]) for name in HEADLINES}


def resampled_counts(
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


def basic_interval(
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
