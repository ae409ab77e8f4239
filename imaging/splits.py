"""Splits: stratified ones and folds that never divide a group, and those of tables and folders."""

import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from imaging.classes import SPLIT_WORDS, split_of_name
from imaging.tables import join_table, read_table
from storage.files import printable


def group_images(metadata: pd.DataFrame, keys: Sequence[str]) -> np.ndarray:
    """Returns for each image the number of its group, int (N,): images that belong together.

    Images with the same value in any of these columns are in one group, directly or through other
    images: a patient with two lesions joins the images of both. An empty value joins nothing.
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
    """Returns the name of each image's split, stratified by class, without dividing a group.

    Parameters
    ----------
    labels : int array (N,), the class of each image, from 0
    groups : array (N,), images with equal values stay together
    splits : split names and their fractions, which sum to 1
    seed : decides which groups go where, but not how many

    Each split gets as close to its fraction of each class as whole groups allow; for groups of one
    image that is the largest-remainder method. Every class is in the training split (the one named
    `train`, or else the largest), and, unless groups of several classes prevent it, a class with at
    least as many groups as there are splits is in all of them. Raises ValueError as `check_splits`.
    """
    names, fractions = check_splits(splits)
    training = names.index("train") if "train" in names else int(fractions.argmax())
    return np.array(names)[_assign_splits(labels, groups, fractions, training, seed)]


def _assign_splits(
    labels: np.ndarray, groups: np.ndarray, fractions: np.ndarray, training: int | None, seed: int
) -> np.ndarray:
    """Returns the number of each image's split; for `training` see `_numbers_of_groups`."""
    group_ids, first_rows, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    num_classes = int(labels.max()) + 1
    contents = np.zeros((len(group_ids), num_classes), dtype=np.int64)
    np.add.at(contents, (group_of_row, labels), 1)

    # Groups with the same number of images of each class are of one kind, and interchangeable.
    kinds, kind_of_group = np.unique(contents, axis=0, return_inverse=True)
    kind_of_group = kind_of_group.ravel()  # numpy 2.0 alone gives it a second dimension
    kind_sizes = np.bincount(kind_of_group, minlength=len(kinds))
    numbers = _numbers_of_groups(kinds, kind_sizes, fractions, training)

    rng = np.random.default_rng(seed)
    split_of_group = np.empty(len(group_ids), dtype=np.int64)
    for kind in range(len(kinds)):
        members = np.flatnonzero(kind_of_group == kind)
        members = members[first_rows[members].argsort()]
        split_of_group[rng.permutation(members)] = np.arange(len(fractions)).repeat(numbers[kind])
    return split_of_group[group_of_row]


def k_fold_splits(
    metadata: pd.DataFrame, k: int = 5, seed: int = 42
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns k stratified folds: pairs of the row numbers to train and to validate on.

    `metadata` is that of `DatasetBuilder.build`, or some rows of it; its columns `label` and
    `group` are used. Row numbers count from 0, whatever its index. Each row is in one validation
    part, with all of its group. Unless groups of several classes prevent it, every training part
    has every class of at least two groups, and every validation part every class of at least k.
    Warns of classes of fewer groups than k. Raises ValueError unless k is from 2 to the number of
    groups.
    """
    num_groups = metadata["group"].nunique()
    if not 2 <= k <= num_groups:
        raise ValueError(f"k must be from 2 to {num_groups}, the number of groups, not {k}")
    _warn_of_classes_with_few_groups(metadata, k)
    labels = pd.factorize(metadata["label"], sort=True)[0]
    fractions, groups = np.full(k, 1 / k), metadata["group"].to_numpy()
    fold = _assign_splits(labels, groups, fractions, None, seed)
    # The remainders of uneven divisions are in the first folds; the seed decides their order.
    order = np.random.default_rng(derive_seed(seed, "order of folds")).permutation(k)
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in order]


def _warn_of_classes_with_few_groups(metadata: pd.DataFrame, k: int) -> None:
    name_column = "class" if "class" in metadata else "label"
    num_groups = metadata.groupby(name_column, observed=True)["group"].nunique()
    few = num_groups[num_groups < k]
    if len(few) > 0:
        names = ", ".join(f"{printable(str(name))} ({number})" for name, number in few.items())
        warnings.warn(
            f"classes with fewer groups than k={k}: {names}; they are missing from some validation "
            "parts, and a class of a single group is never both trained and validated on",
            stacklevel=3,
        )


def check_splits(splits: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    """Returns names and fractions; raises ValueError unless these are positive and sum to 1."""
    names, fractions = list(splits), np.array(list(splits.values()), dtype=np.float64)
    if not names:
        raise ValueError(
            "splits must not be empty; give names and fractions, such as {'train': 0.8, ...}"
        )
    if not (fractions > 0).all():
        raise ValueError(f"splits must be greater than 0, not {dict(splits)}")
    if abs(fractions.sum() - 1) > 1e-6:
        raise ValueError(f"splits must add up to 1, not {fractions.sum():g}: {dict(splits)}")
    return names, fractions


def _numbers_of_groups(
    kinds: np.ndarray, kind_sizes: np.ndarray, fractions: np.ndarray, training: int | None
) -> np.ndarray:
    """Returns how many groups of each kind go to each split, (kinds, splits).

    `training` is the number of the training split; None for folds, where each split is left out of
    training in turn, so that no split may have all images of a class.

    Starts from the largest remainders of each kind, and moves a group to another split or exchanges
    two for as long as that brings the splits closer to their shares.
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
        """Returns how far splits are from their shares; `counts` is (..., splits, classes)."""
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
    """Returns the change of `numbers` that lowers the cost most, None if none lowers it.

    A step exchanges a group of one kind in a split for one of another kind in another split; to
    exchange it for the empty kind is to move it.
    """
    num_splits = numbers.shape[1]
    kinds = np.vstack([kinds, np.zeros_like(kinds[:1])])
    available = np.vstack([numbers, np.ones_like(numbers[:1])]) > 0
    # Trying all exchanges takes too long for hundreds of kinds; moves are enough there.
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
    counts = pd.crosstab(metadata["class"], metadata["split"])
    counts = counts.reindex(columns=list(names), fill_value=0)
    lacks = [
        f"{printable(str(name))} ({row.sum()} images) is not in {', '.join(row.index[row == 0])}"
        for name, row in counts.iterrows()
        if (row == 0).any()
    ]
    if lacks:
        warnings.warn(f"some splits lack a class: {'; '.join(lacks)}", stacklevel=3)


def warn_of_divided_groups(groups: np.ndarray, split: np.ndarray) -> None:
    """Warns of leakage: groups of images that are divided between splits."""
    is_divided = pd.Series(split).groupby(groups).transform("nunique") > 1
    if is_divided.any():
        warnings.warn(
            f"leakage: {len(set(groups[is_divided]))} groups of images that belong together (same "
            f"image, lesion or patient) are divided between the splits, {is_divided.sum()} images "
            "in all",
            stacklevel=4,
        )


def check_at_least(minimum: int, **values: int) -> None:
    """Raises ValueError for a value, given by its name, below the minimum."""
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, not {value}")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that numpy's or torch's generators reject."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and less than 2**63, not {seed}")


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Returns a seed of 63 bits for one use of randomness, such as the order of epoch 3."""
    sequence = np.random.SeedSequence(seed, spawn_key=(*purpose.encode(), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


# ---------------------------------------------------------------------------- given splits


def read_splits(
    images: pd.DataFrame,
    name: str | Path,
    *,
    id_column: str | None = None,
    uses: list[str] | None = None,
) -> pd.Series:
    """Returns each image's split in a table's column `split`: train, valid or test, or missing.

    The names are those of `SPLIT_WORDS`, in upper or lower case. The other parameters are as in
    `join_table`; with `uses` it warns of rows that match no image. Raises ValueError for other
    names, and if no image has a split.
    """
    given = join_table(
        images["path"],
        read_table(name, ["split"]),
        name,
        warn_unmatched=uses is not None,
        is_correction=True,  # other images are left out, which is said elsewhere
        id_column=id_column,
        columns=["split"],
        uses=uses,
    )["split"]
    split = given_splits(given, images["path"], name)
    if split.isna().all():
        raise ValueError(f"{printable(name)}: no image has a split, as the column is empty")
    return split


def given_splits(given: pd.Series, paths: pd.Series, where: str | Path) -> pd.Series:
    """Returns train, valid or test for each name of a split, missing where there is none.

    Raises ValueError for a name that is not in `SPLIT_WORDS`.
    """
    split = given.map(lambda text: SPLIT_WORDS.get(text.strip().casefold()), na_action="ignore")
    unknown = given[given.notna() & split.isna()]
    if len(unknown) > 0:
        path = printable(paths[unknown.index[0]])
        value, count = unknown.iloc[0], (given == unknown.iloc[0]).sum()
        raise ValueError(
            f"{printable(where)}: split is {value!r} for {count:,} images, such as {path}; it "
            f"has to be train, valid (or val, validation) or test"
        )
    return split.astype(object)


def split_of_folder(source_split: pd.Series) -> pd.Series:
    """Returns the splits that the names of folders stand for, missing for other names.

    The outermost folder decides whose name is of a split, such as Train, val, dev, testing or
    training_set; but a folder that all images lie in does so only if none below it does.
    """
    parts = {folder: folder.split("/") for folder in source_split.unique()}
    levels = zip(*parts.values(), strict=False)
    num_common = sum(1 for _ in itertools.takewhile(lambda names: len({*names}) == 1, levels))
    splits = {folder: _first_split(names[num_common:]) for folder, names in parts.items()}
    if not any(splits.values()):
        splits = {folder: _first_split(names) for folder, names in parts.items()}
    found = [splits[folder] for folder in source_split]
    return pd.Series(found, index=source_split.index, dtype=object)


def _first_split(folders: Sequence[str]) -> str | None:
    return next((split for name in folders if (split := split_of_name(name)) is not None), None)


def splits_of_folders(images: pd.DataFrame, data_dir: str | Path) -> pd.Series:
    """Returns the split of each image's folder.

    Raises ValueError for an image in no such folder, and for no folder for training or test.
    """
    split = split_of_folder(images["source_split"])
    if split.isna().any():
        stray = images["path"][split.isna()].iloc[0]
        raise ValueError(
            f"split_by: {printable(stray)} is not in a folder named Train, Valid or Test"
        )
    missing = sorted({"train", "test"} - set(split))
    if missing:
        raise ValueError(f"{printable(data_dir)}: no folder for the {missing[0]} split")
    return split


def has_folder_of_split(data_dir: str | Path, split: str) -> bool:
    """Returns whether a folder below `data_dir` stands for this split: train, valid or test."""
    folders = [
        (Path(parent) / name).relative_to(data_dir).as_posix()
        for parent, names, _ in os.walk(data_dir)
        for name in names
        if not name.startswith(".")
    ]
    return split in set(split_of_folder(pd.Series(folders, dtype=object)))


def take_valid_out_of_train(
    split: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    splits: Mapping[str, float],
    seed: int,
) -> None:
    """Moves part of the training images to the split `valid`, in place, as `stratified_split` does.

    The part is valid's fraction of train and valid in `splits`. Raises ValueError if these are not
    among them, or no image is for training.
    """
    if not {"train", "valid"} <= set(splits):
        raise ValueError("splits must have train and valid, as valid is taken out of train")
    is_train = split == "train"
    if not is_train.any():
        raise ValueError("no image is in the split train")
    whole = splits["train"] + splits["valid"]
    parts = {name: splits[name] / whole for name in ("train", "valid")}
    own_labels = pd.factorize(labels[is_train], sort=True)[0]
    split[is_train] = stratified_split(own_labels, groups[is_train], parts, seed)
