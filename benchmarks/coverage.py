"""Measures how often the 95 % intervals of evaluation.py hold the true value.

    python benchmarks/coverage.py
    python benchmarks/coverage.py gaps --sets 200

Draws data sets from populations whose true values are known, with fixed seeds, and prints in what
share of them the interval holds the true value, and how wide it is on average:

headlines   The figures over all classes on sets like the test split of the ISIC nine-class set, in
            which every tenth picture stands twice or three times with the same result.
border      The same figures where few images or none are called wrong.
classes     Recall and precision of single classes, on the same sets as headlines.
areas       The ROC AUC of scores of two normal distributions.
gaps        The widest gap between subgroups, of lesions with one to three images.
differences The difference between two models on the same images, which often err on the same ones.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).parents[1]))
from evaluation import HEADLINES, compare, compute_intervals, compute_subgroups, screen
from evaluation.metrics import headline_metrics

# Shares of the classes in the ISIC set, and how often each is called right.
SHARES = np.array([130, 392, 111, 454, 373, 478, 80, 197, 142]) / 2357
RECALLS = np.array([0.45, 0.75, 0.70, 0.85, 0.80, 0.80, 0.20, 0.65, 0.95])

Intervals = Iterable[tuple[str, float, list[float]]]  # what of, its true value, and [low, high]


def population(shares: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """The share of each pair of true and predicted class, (C, C): errors go where images are."""
    rates = np.tile(shares, (len(shares), 1))
    np.fill_diagonal(rates, 0)
    rates *= ((1 - recalls) / rates.sum(axis=1))[:, None]
    return shares[:, None] * (rates + np.diag(recalls))


def draw(
    rng: np.random.Generator, num_pictures: int, cells: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True and predicted classes, and groups, of pictures of which every tenth has copies."""
    pictures = rng.choice(cells.size, num_pictures, p=cells.ravel() / cells.sum())
    copies = np.where(rng.random(num_pictures) < 0.1, rng.integers(2, 4, num_pictures), 1)
    images = np.repeat(pictures, copies)
    return *np.divmod(images, len(cells)), np.repeat(np.arange(num_pictures), copies)


def _generator(seed: int) -> np.random.Generator:
    """Gives one that is independent of those that evaluation.py makes from the same seed."""
    return np.random.default_rng([seed, 2026])


def headlines_of(cells: np.ndarray, num_pictures: int) -> Callable[[int], Intervals]:
    truth = headline_metrics(cells[None] * 1e6)
    names = [str(label) for label in range(len(cells))]

    def one_set(seed: int) -> Iterator[tuple[str, float, list[float]]]:
        y_true, y_pred, groups = draw(_generator(seed), num_pictures, cells)
        y_prob = np.eye(len(cells))[y_pred]
        intervals = compute_intervals(y_true, y_prob, names, groups, seed=seed)
        for name in HEADLINES:
            yield name, truth[name][0], intervals[name]

    return one_set


def classes_of(cells: np.ndarray, num_pictures: int) -> Callable[[int], Intervals]:
    names = [str(label) for label in range(len(cells))]
    hits = np.diag(cells)
    truth = {"recall": hits / cells.sum(axis=1), "precision": hits / cells.sum(axis=0)}

    def one_set(seed: int) -> Iterator[tuple[str, float, list[float]]]:
        y_true, y_pred, groups = draw(_generator(seed), num_pictures, cells)
        y_prob = np.eye(len(cells))[y_pred]
        found = compute_intervals(y_true, y_prob, names, groups, seed=seed)["per_class"]
        for figure, values in truth.items():
            for label, name in enumerate(names):
                if found[name][figure] is not None:
                    yield f"{figure} of the classes", values[label], found[name][figure]

    return one_set


def area_of(area: float, num_positives: int, num_negatives: int) -> Callable[[int], Intervals]:
    is_positive = np.arange(num_positives + num_negatives) < num_positives
    distance = np.sqrt(2) * norm.ppf(area)

    def one_set(seed: int) -> Iterator[tuple[str, float, list[float]]]:
        score = _generator(seed).normal(distance * is_positive)
        yield "ROC AUC", area, screen(is_positive, score, {}, seed=seed)["roc_auc_interval"]

    return one_set


def gap_of(
    recalls: np.ndarray, num_lesions: int, shares: np.ndarray | None = None
) -> Callable[[int], Intervals]:
    """`recalls` (K, C) of each class in each subgroup; a lesion's images are of one subgroup each.

    Without `shares` of the subgroups each lesion has an image in every one of them.
    """
    num_subgroups, num_classes = recalls.shape
    class_shares = np.array([0.5, 0.3, 0.2])
    true_values = recalls.mean(axis=1)

    def one_set(seed: int) -> Iterator[tuple[str, float, list[float]]]:
        rng = _generator(seed)
        if shares is None:
            lesion = np.repeat(np.arange(num_lesions), num_subgroups)
            subgroup = np.tile(np.arange(num_subgroups), num_lesions)
        else:
            lesion = np.repeat(np.arange(num_lesions), rng.integers(1, 4, num_lesions))
            subgroup = rng.choice(num_subgroups, num_lesions, p=shares)[lesion]
        y_true = rng.choice(num_classes, num_lesions, p=class_shares)[lesion]
        is_alike = rng.random(len(lesion)) < 0.5  # half of the images share their lesion's luck
        luck = np.where(is_alike, rng.random(num_lesions)[lesion], rng.random(len(lesion)))
        wrong = (y_true + rng.integers(1, num_classes, len(lesion))) % num_classes
        y_pred = np.where(luck < recalls[subgroup, y_true], y_true, wrong)
        columns = pd.DataFrame({"subgroup": subgroup.astype(str)})
        found = compute_subgroups(y_true, y_pred, columns, lesion, seed=seed)["subgroup"]
        for name, group in found["groups"].items():
            interval = group["balanced_accuracy_interval"]
            yield "balanced accuracy of each", true_values[int(name)], interval
        gap = found["widest_gap"]
        true_gap = true_values[int(gap["highest"])] - true_values[int(gap["lowest"])]
        yield "widest gap", true_gap, gap["interval"]

    return one_set


def difference_of(
    recalls: tuple[float, float], num_images: int, num_classes: int = 3
) -> Callable[[int], Intervals]:
    def one_set(seed: int) -> Iterator[tuple[str, float, list[float]]]:
        rng = _generator(seed)
        y_true = rng.integers(num_classes, size=num_images)
        luck, is_alike = rng.random((2, num_images)), rng.random(num_images) < 0.5
        luck[1] = np.where(is_alike, luck[0], luck[1])
        wrong = (y_true + rng.integers(1, num_classes, (2, num_images))) % num_classes
        y_pred = np.where(luck < np.array(recalls)[:, None], y_true, wrong)
        found = compare(y_true, *y_pred, seed=seed)
        for name in ("accuracy", "balanced_accuracy"):
            yield f"difference in {name}", recalls[0] - recalls[1], found[name]["interval"]

    return one_set


def _equal(num_classes: int, recall: float) -> np.ndarray:
    return population(np.full(num_classes, 1 / num_classes), np.full(num_classes, recall))


def _subgroups(*means: float) -> np.ndarray:
    """Recalls of three classes, which are 0.02 above, at, and 0.02 below the mean."""
    return np.array(means)[:, None] + np.array([0.02, 0, -0.02])


ISIC = population(SHARES, RECALLS)
CASES: dict[str, dict[str, Callable[[int], Intervals]]] = {
    "headlines": {f"{n} pictures": headlines_of(ISIC, n) for n in (235, 1000)},
    "border": {
        f"{n} pictures of {c} classes, recall {recall}": headlines_of(_equal(c, recall), n)
        for c in (2, 5)
        for n in (20, 50, 235)
        for recall in (0.8, 0.9, 0.97, 1.0)
    },
    "classes": {f"{n} pictures": classes_of(ISIC, n) for n in (235, 1000)},
    "areas": {
        f"AUC {area}, {m} positives and {n} negatives": area_of(area, m, n)
        for m, n in ((10, 30), (38, 167), (100, 100))
        for area in (0.7, 0.85, 0.95, 0.99)
    },
    "gaps": {
        "0.8 and 0.8, 150 lesions each": gap_of(_subgroups(0.8, 0.8), 300, [0.5, 0.5]),
        "0.85 and 0.7, 150 lesions each": gap_of(_subgroups(0.85, 0.7), 300, [0.5, 0.5]),
        "0.8 and 0.7, about 60 and 240 lesions": gap_of(_subgroups(0.8, 0.7), 300, [0.2, 0.8]),
        "0.97 and 0.97, 150 lesions each": gap_of(_subgroups(0.97, 0.97), 300, [0.5, 0.5]),
        "0.8 and 0.7, the same 150 lesions": gap_of(_subgroups(0.8, 0.7), 150),
        "five of 0.8, 100 lesions each": gap_of(_subgroups(*[0.8] * 5), 500, [0.2] * 5),
        "0.9, 0.8 and 0.7, 100 lesions each": gap_of(_subgroups(0.9, 0.8, 0.7), 300, [1 / 3] * 3),
        "0.85 to 0.7, 50 to 200 lesions": gap_of(
            _subgroups(0.85, 0.8, 0.75, 0.7), 500, [0.1, 0.2, 0.3, 0.4]
        ),
    },
    "differences": {
        f"{a} and {b} on {n} images": difference_of((a, b), n)
        for n in (20, 50, 235)
        for a, b in ((0.97, 0.97), (0.9, 0.8))
    },
}


def measure(one_set: Callable[[int], Intervals], num_sets: int) -> dict[str, tuple[float, float]]:
    """The share of intervals that hold the true value, and their mean width, by what they are of.

    Set k is drawn with seed k.
    """
    held: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    for seed in range(num_sets):
        for name, truth, (low, high) in one_set(seed):
            held.setdefault(name, []).append(low - 1e-9 <= truth <= high + 1e-9)
            widths.setdefault(name, []).append(high - low)
    return {name: (float(np.mean(held[name])), float(np.mean(widths[name]))) for name in held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", choices=["all", *CASES], default="all")
    parser.add_argument("--sets", type=int, default=2000, help="data sets of each kind")
    arguments = parser.parse_args()
    for what in CASES if "all" in arguments.what else arguments.what:
        for case, one_set in CASES[what].items():
            print(f"{what}: {case}")
            for name, (share, width) in measure(one_set, arguments.sets).items():
                print(f"  {name}: held by {share:.1%}, {width:.3f} wide", flush=True)


if __name__ == "__main__":
    main()
