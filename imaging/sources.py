"""Reads folders and tables into one table with a row for each image."""

import itertools
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from imaging.classes import SPLIT_WORDS, split_of_name, unify_class_names
from imaging.tables import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES, join_table, read_table
from storage.files import is_utf8, printable

IMAGE_COLUMNS = ["path", "class", "source_split"]  # which every reader gives
METADATA_COLUMNS = (
    "path", "class", "label", "source_split", "width", "height", "content_hash", "picture", "group",
    "split",
)  # fmt: skip
SPLIT_FOLDERS = SPLIT_WORDS  # what a column `split` may say, and what names of folders consist of


@dataclass(frozen=True)
class Reader:
    """A layout of a folder of images.

    `recognizes` says whether a folder has this layout. `read` returns a row for each image: `path`
    (relative to the folder, with forward slashes), `class`, `source_split` (the part of the set as
    published, such as Train, or empty), and any further columns, which become part of the metadata.
    """

    recognizes: Callable[[Path], bool]
    read: Callable[[Path], pd.DataFrame]


def read_folder(data_dir: str | Path) -> pd.DataFrame:
    """Returns the images of a folder, sorted by path, from the last reader that recognizes it."""
    data_dir = Path(data_dir)
    name = next(name for name in reversed(READERS) if READERS[name].recognizes(data_dir))
    images = READERS[name].read(data_dir)
    for column in IMAGE_COLUMNS:
        if column not in images or images[column].isna().any():
            raise ValueError(
                f"{printable(data_dir)}: the reader of {name} returned images without {column}"
            )
    columns = [*IMAGE_COLUMNS, *images.columns.drop(IMAGE_COLUMNS)]
    images = images.assign(**{"class": unify_class_names(images["class"])})
    return images[columns].sort_values("path", kind="stable", ignore_index=True)


def find_images(data_dir: str | Path, *, has_class_folders: bool = True) -> pd.DataFrame:
    """Returns the images below a folder, sorted by path: `path`, `class`, `source_split`.

    `path` is relative to `data_dir` with forward slashes, `class` the parent folder's name, and
    `source_split` what lies above that. Without class folders there is no `class`, and
    `source_split` is all that lies above the image. Hidden files and folders are ignored, links
    followed. Whatever is named like an image is listed, so that reading it reports an error.

    Raises FileNotFoundError if the folder does not exist, ValueError if it has no images and, with
    class folders, for images directly in `data_dir` and for fewer than two classes. Names that
    differ only by case, spaces, hyphens and underscores are one class, with a warning.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        what = " is a file, not a folder" if data_dir.exists() else ": no such folder"
        raise FileNotFoundError(f"{printable(data_dir)}{what}")
    paths = sorted(path.relative_to(data_dir).as_posix() for path in _walk(data_dir, frozenset()))
    if not paths:
        raise ValueError(
            f"{printable(data_dir)}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}); put those of "
            "each class into a folder of its own"
        )
    parents = [path.split("/")[:-1] for path in paths]
    # As str, pandas with pyarrow could not hold names that are not valid UTF-8.
    images = pd.DataFrame({"path": paths}, dtype=object)
    if has_class_folders:
        images["class"] = pd.Series(_classes_of(data_dir, paths, parents), dtype=object)
        parents = [parent[:-1] for parent in parents]
    images["source_split"] = pd.Series(["/".join(parent) for parent in parents], dtype=object)
    return images


def _classes_of(data_dir: Path, paths: list[str], parents: list[list[str]]) -> list[str]:
    folder = printable(data_dir)
    if not all(parents):
        stray = printable(paths[parents.index([])])
        raise ValueError(f"{folder}: {stray} is not in a class folder; move it into one")
    # One system writes é as one character, another as e and an accent: it is the same class.
    classes = [unicodedata.normalize("NFC", parent[-1]) for parent in parents]
    for name in classes:
        if not is_utf8(name):
            raise ValueError(
                f"{folder}: the class folder {printable(name)} is not valid UTF-8; rename it"
            )
    classes = unify_class_names(pd.Series(classes, dtype=object)).tolist()
    if len(set(classes)) < 2:
        raise ValueError(
            f"{folder}: all images are of one class, {printable(classes[0])}; at least two classes "
            "are needed"
        )
    return classes


# To add a layout, add its reader at the end; the last one that recognizes a folder reads it.
READERS = {"class folders": Reader(recognizes=lambda folder: True, read=find_images)}


def _walk(folder: Path, ancestors: frozenset[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a folder that it lies in
        return
    for name in os.listdir(folder):
        path = folder / name
        if name.startswith("."):
            continue
        is_named_like_an_image = path.suffix.lower() in IMAGE_SUFFIXES | UNSUPPORTED_SUFFIXES
        if os.path.isdir(path):
            inside = list(_walk(path, ancestors | {identity}))
            yield from inside or ([path] if is_named_like_an_image else [])
        elif is_named_like_an_image:
            yield path


def read_images(
    data_dir: str | Path,
    labels_csv: str | Path | None,
    label_column: str | None,
    metadata_csv: str | Path | None,
    required: Sequence[str],
    *,
    id_column: str | None = None,
    warn_unmatched: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns `IMAGE_COLUMNS` of each image, and the further columns, of which some are required.

    With a `label_column`, the classes are that column's of `labels_csv`, or else of `metadata_csv`;
    without one, the column `class` of `labels_csv` overrides those of the folders.
    """
    name = labels_csv or metadata_csv
    if label_column is not None and name is not None:
        images = find_images(data_dir, has_class_folders=False)
    else:
        images, name, label_column = read_folder(data_dir), labels_csv, "class"
    if name is not None:
        # Of a table that gives labels and metadata it is said once, below.
        is_said = warn_unmatched and labels_csv is not None
        images = read_labels(
            images, name, label_column, id_column=id_column, warn_unmatched=is_said
        )
    given = read_metadata(
        images, metadata_csv, required, id_column=id_column, warn_unmatched=warn_unmatched
    )
    return images[IMAGE_COLUMNS].copy(), given


def read_splits(
    images: pd.DataFrame,
    name: str | Path,
    *,
    id_column: str | None = None,
    warn_unmatched: bool = False,
) -> pd.Series:
    """Returns each image's split in a table's column `split`: train, valid or test, or missing.

    The names are those of `SPLIT_FOLDERS`, in upper or lower case. `id_column` and `warn_unmatched`
    are as in `join_table`. Raises ValueError for other names.
    """
    table = read_table(name, ["split"])
    given = join_table(
        images["path"],
        table,
        name,
        warn_unmatched=warn_unmatched,
        id_column=id_column,
        columns=["split"],
    )["split"]
    split = given.map(lambda text: SPLIT_FOLDERS.get(text.strip().casefold()), na_action="ignore")
    unknown = given[given.notna() & split.isna()]
    if len(unknown) > 0:
        path = printable(images["path"].iloc[unknown.index[0]])
        value, count = unknown.iloc[0], (given == unknown.iloc[0]).sum()
        raise ValueError(
            f"{printable(name)}: split is {value!r} for {count:,} images, such as {path}; it "
            f"has to be train, valid (or val, validation) or test"
        )
    return split.astype(object)


def read_labels(
    images: pd.DataFrame,
    name: str | Path,
    column: str,
    *,
    id_column: str | None = None,
    warn_unmatched: bool = False,
) -> pd.DataFrame:
    """Returns the images with the classes in a table's column, or their own if these are missing.

    `id_column` and `warn_unmatched` are as in `join_table`. Raises ValueError for an image that has
    neither class, and if all are of one class.
    """
    is_correction = "class" in images
    labels = join_table(
        images["path"],
        read_table(name, [column]),
        name,
        warn_unmatched=warn_unmatched,
        is_correction=is_correction,
        id_column=id_column,
        columns=[column],
    )[column]
    if is_correction:
        labels = labels.fillna(images["class"])
    check_complete(labels, images["path"], name)
    labels = unify_class_names(labels)
    if labels.nunique() < 2:
        raise ValueError(
            f"{printable(name)}: all images are of one class; at least two classes are needed"
        )
    return images.assign(**{"class": labels})


def read_metadata(
    images: pd.DataFrame,
    name: str | Path | None,
    required: Sequence[str],
    *,
    id_column: str | None = None,
    warn_unmatched: bool = False,
) -> pd.DataFrame:
    """Returns the columns beside `IMAGE_COLUMNS`: those of the folder's reader and of a table.

    `id_column` and `warn_unmatched` are as in `join_table`. Raises ValueError if a required one is
    in neither, and if two would have the same name.
    """
    given = images.drop(columns=IMAGE_COLUMNS)
    missing = [column for column in required if column not in given]
    if name is not None:
        rows = join_table(
            images["path"],
            read_table(name, missing),
            name,
            warn_unmatched=warn_unmatched,
            id_column=id_column,
        )
        given = pd.concat([given, rows], axis=1)
    elif missing:
        raise ValueError(
            f"group_by: no column {printable(missing[0])}; give its table as metadata_csv"
        )
    given = given.rename(columns=given_name)
    if given.columns.has_duplicates:
        column = printable(given.columns[given.columns.duplicated()][0])
        table = "" if name is None else f"{printable(name)}: "
        raise ValueError(f"{table}two columns would be called {column}; rename one of them")
    return given


def check_complete(values: pd.Series, paths: pd.Series, name: str | Path) -> None:
    """Raises ValueError if a table gives some images no value, or a name that is not Unicode."""
    without = paths[values.isna().to_numpy()]
    if len(without) > 0:
        raise ValueError(
            f"{printable(name)}: no {values.name} for {len(without)} of {len(paths)} images, such "
            f"as {printable(without.iloc[0])}; add them to the table, or remove the images"
        )
    invalid = values[~values.map(is_utf8).astype(bool)]
    if len(invalid) > 0:
        raise ValueError(
            f"{printable(name)}: {printable(invalid.iloc[0])} is not valid UTF-8; save the table "
            "as UTF-8"
        )


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


def given_name(column: str) -> str:
    """Returns the name of a user's column in the metadata, which has columns of its own."""
    return f"{column}_given" if column in METADATA_COLUMNS else column
