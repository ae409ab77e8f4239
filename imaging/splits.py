"""Stratified splits and folds that never divide a group."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from storage.files import printable


def group_images(metadata: pd.DataFrame, keys: Sequence[str]) -> np.ndarray:
    """Numbers (N,) of the groups of images that belong together by any of these columns.

    Images with the same value of a key are in one group, and so are those that others join: a
    patient with two lesions joins the pictures of both. An empty value joins nothing.
    """
    num_images = len(metadata)
    links = []
    for key in keys:
        codes = pd.factorize(metadata[key].mask(metadata[key] == ""))[0]
        first = pd.Series(range(num_images)).groupby(codes).transform("first").to_numpy()
        named = np.flatnonzero(codes >= 0)
        links.append(np.stack([named, first[named]]))
    rows, columns = np.concatenate(links, axis=1)
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(num_images, num_images))
    return connected_components(graph, directed=False)[1]


def stratified_split(
    labels: np.ndarray, groups: np.ndarray, splits: Mapping[str, float], seed: int = 42
) -> np.ndarray:
    """The name of the split of each image, stratified by class, no group divided.

    Parameters
    ----------
    labels : int array (N,), the class of each image, from 0
    groups : array (N,), images with equal values stay together
    splits : split names and their fractions, which sum to 1
    seed : decides which groups go where, the numbers being given

    Each split gets as near to its fraction of each class as whole groups allow; for groups of one
    image that is the largest-remainder method. Every class is in the training split (the one named
    `train`, or else the largest), and every split has every class that has at least as many groups
    as there are splits, where groups of several classes leave that possible; `DatasetBuilder` warns
    of what lacks. Raises ValueError for fractions that cannot be.
    """
    names, fractions = check_splits(splits)
    training = names.index("train") if "train" in names else int(fractions.argmax())
    return np.array(names)[_assign_splits(labels, groups, fractions, training, seed)]


def _assign_splits(
    labels: np.ndarray, groups: np.ndarray, fractions: np.ndarray, training: int | None, seed: int
) -> np.ndarray:
    """The number of the split of each image; `training` as `_numbers_of_groups` takes it."""
    group_ids, first_rows, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    num_classes = int(labels.max()) + 1
    contents = np.zeros((len(group_ids), num_classes), dtype=np.int64)
    np.add.at(contents, (group_of_row, labels), 1)

    # Groups with the same number of images of each class are one kind, and stand for one another.
    kinds, kind_of_group = np.unique(contents, axis=0, return_inverse=True)
    kind_of_group = kind_of_group.ravel()  # numpy 2.0 alone gives it a second dimension
    kind_sizes = np.bincount(kind_of_group, minlength=len(kinds))
    numbers = _numbers_of_groups(kinds, kind_sizes, fractions, training)

    rng = np.random.default_rng(seed)
    split_of_group = np.empty(len(group_ids), dtype=np.int64)
    for kind in range(len(kinds)):
        members = np.flatnonzero(kind_of_group == kind)
        members = members[first_rows[members].argsort()]
        split_of_group[rng.permutation(members)] = np.repeat(
            np.arange(len(fractions)), numbers[kind]
        )
    return split_of_group[group_of_row]


def k_fold_splits(
    metadata: pd.DataFrame, k: int = 5, seed: int = 42
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cross-validation, stratified and grouped: k pairs of training and validation row numbers.

    `metadata` is that of `DatasetBuilder.build`, or some rows of it; its columns `label` and
    `group` are used. Row numbers count from 0, whatever its index. Each row is in one validation
    part, with all of its group. Every training part has every class of at least two groups, and
    every validation part every class of at least k, where groups of several classes leave that
    possible. Warns of classes of fewer groups than k. Raises ValueError for fewer than two folds or
    groups than folds.
    """
    if k < 2 or metadata["group"].nunique() < k:
        raise ValueError(f"k is {k}; it must be from 2 to the number of groups")
    _warn_of_classes_with_few_groups(metadata, k)
    labels = pd.factorize(metadata["label"], sort=True)[0]
    fractions, groups = np.full(k, 1 / k), metadata["group"].to_numpy()
    fold = _assign_splits(labels, groups, fractions, None, seed)
    # What does not divide evenly comes into the first folds; the seed says which these are.
    order = np.random.default_rng(derive_seed(seed, "order of folds")).permutation(k)
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in order]


def _warn_of_classes_with_few_groups(metadata: pd.DataFrame, k: int) -> None:
    name_column = "class" if "class" in metadata else "label"
    num_groups = metadata.groupby(name_column, observed=True)["group"].nunique()
    few = [
        f"{printable(name)} ({number} {'group' if number == 1 else 'groups'})"
        for name, number in num_groups[num_groups < k].items()
    ]
    if few:
        warnings.warn(
            f"classes with fewer groups than k={k}: {', '.join(few)}; not every validation part "
            "has them, and one of a single group is never trained on where it is validated",
            stacklevel=3,
        )


def check_splits(splits: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """Returns the names and fractions; ValueError for fractions that make no splits."""
    names, fractions = list(splits), np.array(list(splits.values()), dtype=np.float64)
    if not names:
        raise ValueError("splits is empty; give names and fractions, such as {'train': 0.8, ...}")
    if not (fractions > 0).all():
        raise ValueError(f"splits are {dict(splits)}; each fraction must be greater than 0")
    if abs(fractions.sum() - 1) > 1e-6:
        raise ValueError(f"splits are {dict(splits)}; they sum to {fractions.sum():g}, not to 1")
    return names, fractions


def _numbers_of_groups(
    kinds: np.ndarray, kind_sizes: np.ndarray, fractions: np.ndarray, training: int | None
) -> np.ndarray:
    """How many groups of each kind go to each split, (kinds, splits).

    `training` is the number of the split that is trained on; None where it is all but one in turn,
    so that no split may have the whole of a class.

    Starts from the largest remainders of each kind, and while that brings the splits nearer to
    their shares moves a group from one split to another, or exchanges two.
    """
    numbers = np.stack([_largest_remainder(size, fractions) for size in kind_sizes])
    shares = np.outer(fractions, kind_sizes @ kinds)
    groups_with_class = kind_sizes @ (kinds > 0)
    must_have = np.tile(groups_with_class >= len(fractions), (len(fractions), 1))
    if training is not None:
        must_have[training] = True
    num_images = kind_sizes @ kinds
    must_share = (groups_with_class >= 2) & (training is None)

    def cost(counts: np.ndarray) -> np.ndarray:
        """How far splits are from their shares; `counts` (..., splits, classes)."""
        by_class = ((counts - shares) ** 2).sum(axis=-1)
        in_all = (counts.sum(axis=-1) - shares.sum(axis=-1)) ** 2
        lacks = ((counts == 0) & must_have) | ((counts == num_images) & must_share)
        missing = lacks @ np.ones(kinds.shape[1])
        return by_class + 1e-3 * in_all + 1e9 * missing

    while True:
        step = _best_step(numbers, kinds, cost)
        if step is None:
            return numbers
        numbers += step


def _best_step(
    numbers: np.ndarray, kinds: np.ndarray, cost: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray | None:
    """The change of `numbers` that lowers the cost most, or None where none lowers it.

    A step takes a group of one kind out of a split into another, in exchange for one of another
    kind; with the empty kind in exchange it is a plain move.
    """
    num_splits = numbers.shape[1]
    kinds = np.vstack([kinds, np.zeros_like(kinds[:1])])
    available = np.vstack([numbers, np.ones_like(numbers[:1])]) > 0
    # Exchanging each with each takes too long for hundreds of kinds; moving alone does there.
    others = np.arange(len(kinds)) if len(kinds) <= 64 else np.array([len(kinds) - 1])
    change = (kinds[:-1, None] - kinds[None, others])[:, :, None]
    counts = numbers.T @ kinds[:-1]
    losses, gains = cost(counts - change) - cost(counts), cost(counts + change) - cost(counts)
    delta = losses[:, :, :, None] + gains[:, :, None, :]  # [taken, given, source, target]
    possible = available[:-1, None, :, None] & available[None, others, None, :]
    delta[~possible | np.eye(num_splits, dtype=bool)] = np.inf
    taken, given, source, target = np.unravel_index(delta.argmin(), delta.shape)
    if not delta[taken, given, source, target] < -1e-9:
        return None
    step = np.zeros((len(kinds), num_splits), dtype=np.int64)
    step[taken, [source, target]] += [-1, 1]
    step[others[given], [source, target]] += [1, -1]
    return step[:-1]


def _largest_remainder(total: int, fractions: np.ndarray) -> np.ndarray:
    exact = total * fractions
    counts = np.floor(exact + 1e-9).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    return counts


def warn_of_missing_classes(metadata: pd.DataFrame, names: Sequence[str]) -> None:
    """Warns of classes that have no image in one of the splits."""
    table = pd.crosstab(metadata["class"], metadata["split"]).reindex(columns=names, fill_value=0)
    lacks = [
        f"{printable(name)} ({row.sum()} images) is not in {', '.join(row.index[row == 0])}"
        for name, row in table.iterrows()
        if (row == 0).any()
    ]
    if lacks:
        message = "; ".join(lacks)
        warnings.warn(f"not every split has every class: {message}", stacklevel=3)


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that numpy's and torch's generators do not both take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be 0 or more and less than 2**63")


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of 63 bits for one use of randomness, such as the order of epoch 3."""
    sequence = np.random.SeedSequence(seed, spawn_key=(*purpose.encode(), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
