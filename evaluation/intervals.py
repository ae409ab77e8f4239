"""Confidence intervals: the bootstrap over groups, and Wilson's score interval of proportions."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse import csr_array
from scipy.stats import norm

from evaluation.metrics import HEADLINES, check_labels, check_predictions, headline_metrics
from storage.progress import ProgressBar

NUM_RESAMPLES = 2000
MAX_COUNTS_AT_ONCE = 4_000_000  # of the bootstrap in memory: 32 MB
Z = 1.959964  # the normal distribution's 97.5 % quantile


def compute_intervals(
    y_true: np.ndarray,
    y_prob: np.ndarray,
    class_names: Sequence[str],
    groups: ArrayLike | None = None,
    y_pred: np.ndarray | None = None,
    *,
    seed: int = 42,
) -> dict[str, Any]:
    """Returns 95 % intervals, [low, high], by the names that `compute_metrics` gives the metrics.

    Images with equal `groups` (N,), such as those of one lesion, count as one observation. The
    `HEADLINES` have bootstrap intervals (`Resampled.interval`); precision and recall of each class,
    under `per_class`, Wilson's for the effective number of groups, or None without images.
    """
    num_classes = len(class_names)
    y_true, y_prob, y_pred = check_predictions(y_true, y_prob, num_classes, y_pred)
    group = number_groups(groups, len(y_true))
    resampled = bootstrap(y_true[:, None], y_pred[:, None], num_classes, group, seed)
    intervals: dict[str, Any] = {
        name: resampled[name].part(0).interval(group.max() + 1) for name in HEADLINES
    }
    is_right = y_true == y_pred
    intervals["per_class"] = {
        name: {
            "precision": interval_of_share(is_right[y_pred == label], group[y_pred == label]),
            "recall": interval_of_share(is_right[y_true == label], group[y_true == label]),
        }
        for label, name in enumerate(class_names)
    }
    return intervals


def compare(
    y_true: np.ndarray,
    y_pred_a: np.ndarray,
    y_pred_b: np.ndarray,
    groups: ArrayLike | None = None,
    *,
    seed: int = 42,
) -> dict[str, dict[str, Any]]:
    """Returns how much better model A is than model B on the same images, by headline metric.

    Both are measured on the same resamples of whole groups (paired bootstrap). Each metric has its
    `difference` (A - B), the 95 % `interval` of that, and `probability`, the share of resamples in
    which A is better, ties counted half. Two models that agree on 20 images may differ on others:
    the unseen groups of a resample are right in one model alone.
    """
    labels = {"y_true": y_true, "y_pred_a": y_pred_a, "y_pred_b": y_pred_b}
    highest = max(np.max(values, initial=0) for values in labels.values())
    num_classes = max(int(highest) + 1, 2)  # with one class there is no wrong prediction to add
    y_true, *both = (
        check_labels(values, name, np.size(y_true), num_classes) for name, values in labels.items()
    )
    group = number_groups(groups, len(y_true))
    y_pred = np.stack(both, axis=1)
    resampled = bootstrap(y_true[:, None], y_pred, num_classes, group, seed, are_opposed=True)
    compared = {}
    for name in HEADLINES:
        difference = resampled[name].part(0) - resampled[name].part(1)
        is_better, is_tie = difference.drawn > 0, difference.drawn == 0
        compared[name] = {
            "difference": float(difference.observed),
            "interval": difference.interval(group.max() + 1, lowest=-1.0),
            "probability": float(np.mean(is_better + 0.5 * is_tie)),
        }
    return compared


def wilson_interval(successes: float, total: float) -> list[float] | None:
    """Returns Wilson's 95 % score interval of a proportion, [low, high]; None if total is 0."""
    return None if total == 0 else score_interval(successes, total)


def score_interval(successes: float, total: float) -> list[float]:
    """Returns Wilson's 95 % score interval (1927) of a proportion, [low, high].

    (p + z²/2n ± z √(p (1 - p)/n + z²/4n²)) / (1 + z²/n) for p of n. The numbers need not be whole,
    as those of `scipy.stats.binomtest` must: n may be an effective sample size.
    """
    share = successes / total
    centre = share + Z**2 / (2 * total)
    half = Z * np.sqrt(share * (1 - share) / total + (Z / (2 * total)) ** 2)
    low, high = (centre - half) / (1 + Z**2 / total), (centre + half) / (1 + Z**2 / total)
    return [float(max(min(low, share), 0)), float(min(max(high, share), 1))]  # despite rounding


def effective_sample_size(groups: ArrayLike, weights: np.ndarray | None = None) -> float:
    """Returns how many independent observations the images of these groups are worth.

    Kish (1965): (Σ w)² / Σ W², with w the weights of the images, equal by default, and W their sums
    over each group. Of equal weights and groups of equal size it is the number of groups.
    """
    sums = np.bincount(number_groups(groups, np.size(groups)), weights)
    return float(sums.sum() ** 2 / (sums**2).sum()) if len(sums) > 0 else 0.0


def interval_of_share(is_hit: np.ndarray, groups: np.ndarray) -> list[float] | None:
    """Returns Wilson's interval of the share of hits, for the effective number of groups."""
    size = effective_sample_size(groups)
    return score_interval(is_hit.mean() * size, size) if size > 0 else None


def number_groups(groups: ArrayLike | None, num_images: int) -> np.ndarray:
    """Returns the number of each image's group (N,), from 0; by default each image has its own."""
    if groups is None:
        return np.arange(num_images)
    groups = np.asarray(groups)
    if groups.shape != (num_images,):
        raise ValueError(f"groups has shape {groups.shape}; it must be {(num_images,)}")
    return np.unique(groups, return_inverse=True)[1]


class Resampled(NamedTuple):
    """A metric of each of P parts of the predictions, as observed and in R resamples.

    Each `smoothed` resample is the `drawn` one with a few unseen groups added.
    """

    observed: np.ndarray  # (P,)
    drawn: np.ndarray  # (R, P)
    smoothed: np.ndarray  # (R, P)

    def part(self, index: int) -> "Resampled":
        """Returns the metric of one part alone, with shapes (), (R,) and (R,)."""
        return Resampled(*(values[..., index] for values in self))

    def __sub__(self, other: "Resampled") -> "Resampled":
        return Resampled(*(a - b for a, b in zip(self, other, strict=True)))

    def interval(self, sample_size: float, *, lowest: float = 0.0, z: float = Z) -> list[float]:
        """Returns the 95 % interval of the metric of one part, [low, high]; NaN are left out.

        Its ends are percentiles of the smoothed resamples: plain ones of images that are all right,
        or all wrong, are all alike. One group more that is right and one that is wrong, on average,
        give about Wilson's interval there (Agresti and Coull 1998 and Price and Bonett 2004 add two
        of each, which benchmarks/RESULTS.md shows to be too many).

        The percentiles are Phi(z0 ± z), with Phi(z0) the share of plain resamples below the
        observed value, ties counted half: half of Efron's bias correction (BC, 1981), as the whole
        one, Phi(2 z0 ± z), overshoots near 0 and 1. The observed value is always inside. A metric
        that is the same in all resamples gets the width by which an outcome not seen in
        `sample_size` observations could move it, between `lowest` and 1.
        """
        is_known = np.isfinite(self.drawn)
        drawn, smoothed = self.drawn[is_known], self.smoothed[is_known]
        is_tie = np.isclose(drawn, self.observed, rtol=0, atol=1e-9)
        share_below = np.mean(((drawn < self.observed) & ~is_tie) + 0.5 * is_tie)
        z0 = np.clip(norm.ppf(share_below), -Z, Z)
        low, high = np.quantile(smoothed, norm.cdf(z0 + np.array([-z, z])))
        low, high = min(low, self.observed), max(high, self.observed)
        if high - low < 1e-9:
            share_unseen = score_interval(0, sample_size)[1]
            low, high = low - share_unseen * (low - lowest), high + share_unseen * (1 - high)
        return [float(low), float(high)]


def bootstrap(
    y_true: np.ndarray,
    y_pred: np.ndarray,
    num_classes: int,
    groups: np.ndarray,
    seed: int,
    subgroup: np.ndarray | None = None,
    *,
    are_opposed: bool = False,
) -> dict[str, Resampled]:
    """Returns the headline metrics of P parts in the same NUM_RESAMPLES resamples of whole groups.

    The parts are the models whose predictions are the columns of `y_pred` (N, P), or the subgroups
    into which `subgroup` (N,) divides the images.
    """
    part = np.arange(y_pred.shape[1]) if subgroup is None else subgroup[:, None]
    cells = (part * num_classes + y_true) * num_classes + y_pred
    shape = (int(part.max()) + 1, num_classes, num_classes)
    observed = np.bincount(cells.ravel(), minlength=np.prod(shape)).reshape(shape)
    images_per_group = len(groups) / len(np.unique(groups))
    rng = np.random.default_rng([seed, 1])
    chunks = []
    for counts in resampled_counts(cells, observed.size, groups, seed):
        confusions = counts.reshape(-1, *shape)
        unseen = images_per_group * _unseen_groups(rng, len(counts), observed, are_opposed)
        chunks.append(headline_metrics(np.stack([confusions, confusions + unseen])))
    metrics = headline_metrics(observed)
    return {
        name: Resampled(metrics[name], *np.concatenate([chunk[name] for chunk in chunks], axis=1))
        for name in HEADLINES
    }


def resampled_counts(
    cells: np.ndarray, num_cells: int, groups: np.ndarray, seed: int
) -> Iterator[np.ndarray]:
    """Yields how often each cell is drawn, (r, num_cells), for NUM_RESAMPLES resamples in all.

    A resample has as many groups as there are, drawn with replacement; each brings all its images,
    and an image counts in its `cells` (N, P). The draws depend on the seed and the groups alone.
    """
    num_groups = int(groups.max()) + 1
    rows = np.repeat(groups, cells.shape[1])
    cells_of_group = csr_array(
        (np.ones(cells.size), (rows, cells.ravel())), shape=(num_groups, num_cells)
    )
    rng = np.random.default_rng(seed)
    at_once = max(1, MAX_COUNTS_AT_ONCE // max(num_groups, num_cells))
    starts: Iterable[int] = range(0, NUM_RESAMPLES, at_once)
    if at_once < NUM_RESAMPLES:
        starts = ProgressBar(starts, "confidence intervals", unit="chunk")
    for start in starts:
        # Faster than rng.multinomial, which draws a binomial number for each group and resample.
        count = min(at_once, NUM_RESAMPLES - start)
        drawn = rng.integers(num_groups, size=(count, num_groups))
        drawn += num_groups * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * num_groups)
        yield times.reshape(count, num_groups) @ cells_of_group


def _unseen_groups(
    rng: np.random.Generator, count: int, observed: np.ndarray, are_opposed: bool
) -> np.ndarray:
    """Returns confusion matrices (count, P, C, C) of groups that could have been seen as well.

    In each part, Poisson numbers with a mean of one that is right and one that is wrong, spread
    evenly over the classes that have images, and the wrong ones over the other classes. Of opposed
    models one is wrong where the other is right.
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
