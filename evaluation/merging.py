"""Classes of a model merged, renamed or left out, so that it can be measured on other labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from imaging.labels import rename_classes


@dataclass(frozen=True)
class MergedClasses:
    """The classes that those of a model become: their `names`, and the number of each model's.

    `numbers` (C,) is -1 for a class that is left out.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]

    @classmethod
    def from_map(
        cls, classes: Sequence[str], class_map: Mapping[str, str], others: Sequence[str] = ()
    ) -> "MergedClasses":
        """Returns what `class_map`, new names by old ones, makes of a model's classes.

        Raises ValueError for an old name that is neither of the model nor among `others`, and if
        fewer than two classes remain.
        """
        new = rename_classes(pd.Series(classes, dtype=object), class_map, *others)
        names = tuple(dict.fromkeys(new.dropna()))
        if len(names) < 2:
            raise ValueError("class_map leaves fewer than two of the model's classes")
        numbers = [-1 if name is None else names.index(name) for name in new.replace(np.nan, None)]
        return cls(names, tuple(numbers))

    def merge(self, probabilities: np.ndarray) -> np.ndarray:
        """Returns the probabilities (N, M) of the merged classes from those of a model (N, C).

        Those of classes that become one add up. Where classes are left out, the others add up to 1.
        """
        numbers = np.array(self.numbers)
        merged = np.stack(
            [probabilities[:, numbers == m].sum(axis=1) for m in range(len(self.names))], axis=1
        )
        if (numbers < 0).any():
            total = merged.sum(axis=1, keepdims=True)
            even = np.full_like(merged, 1 / len(self.names))
            merged = np.divide(merged, total, out=even, where=total > 0)
        return merged

    def strongest_member(self, probabilities: np.ndarray, merged: np.ndarray) -> np.ndarray:
        """Returns for each image the most probable of a model's classes within a merged one (N,).

        `probabilities` (N, C) are the model's, `merged` (N,) the numbers of merged classes.
        """
        is_member = np.array(self.numbers) == np.asarray(merged)[:, None]
        return np.where(is_member, probabilities, -1.0).argmax(axis=1)

    def joined(self, names: Sequence[str], classes: Sequence[str]) -> tuple[list[str], list[str]]:
        """Returns the merged classes all of whose members are in `names`, and those of both kinds.

        `classes` are the model's.
        """
        is_in = np.isin(classes, list(names))
        numbers = np.array(self.numbers)
        shares = [is_in[numbers == number].mean() for number in range(len(self.names))]
        pairs = list(zip(self.names, shares, strict=True))
        return [n for n, share in pairs if share == 1], [n for n, share in pairs if 0 < share < 1]
