"""How often the bootstrap's 95 % intervals hold the true figure.

    python benchmarks/coverage.py

Simulates data sets like the test split of the ISIC nine-class set: images drawn from a population
whose class shares and error rates are known, every tenth picture there twice or three times with
the same result. Prints, for each headline figure, the share of data sets whose interval holds the
figure of the population, which should be 95 %.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from evaluation import HEADLINES, _headlines, compute_intervals

# Shares of the classes in the ISIC set, and how often each is called right.
SHARES = np.array([130, 392, 111, 454, 373, 478, 80, 197, 142]) / 2357
RECALLS = np.array([0.45, 0.75, 0.70, 0.85, 0.80, 0.80, 0.20, 0.65, 0.95])


def population() -> np.ndarray:
    """The share of each pair of true and predicted class, (C, C): errors go where images are."""
    num_classes = len(SHARES)
    rates = np.tile(SHARES, (num_classes, 1))
    np.fill_diagonal(rates, 0)
    rates *= ((1 - RECALLS) / rates.sum(axis=1))[:, None]
    return SHARES[:, None] * (rates + np.diag(RECALLS))


def draw(
    rng: np.random.Generator, num_pictures: int, cells: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_classes = len(SHARES)
    pictures = rng.choice(cells.size, num_pictures, p=cells.ravel() / cells.sum())
    copies = np.where(rng.random(num_pictures) < 0.1, rng.integers(2, 4, num_pictures), 1)
    images = np.repeat(pictures, copies)
    return images // num_classes, images % num_classes, np.repeat(np.arange(num_pictures), copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", type=int, default=500)
    parser.add_argument("--pictures", type=int, nargs="+", default=[235, 1000])
    arguments = parser.parse_args()
    cells = population()
    truth = {name: values[0] for name, values in _headlines(cells[None] * 1e6).items()}
    names = [str(label) for label in range(len(SHARES))]
    for num_pictures in arguments.pictures:
        rng = np.random.default_rng(0)
        held = dict.fromkeys(HEADLINES, 0)
        for seed in range(arguments.sets):
            y_true, y_pred, groups = draw(rng, num_pictures, cells)
            intervals = compute_intervals(
                y_true, np.eye(len(SHARES))[y_pred], names, groups, seed=seed
            )
            for name in HEADLINES:
                low, high = intervals[name]
                held[name] += low <= truth[name] <= high
        print(f"{arguments.sets} data sets of {num_pictures} pictures")
        for name in HEADLINES:
            print(f"{name}: true {truth[name]:.3f}, held by {held[name] / arguments.sets:.1%}")


if __name__ == "__main__":
    main()
