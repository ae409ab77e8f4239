"""Reads a published set: images in any folders, and tables of their labels and metadata."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pandas as pd

from imaging.classes import SPLIT_WORDS, words_of
from imaging.folders import list_images, list_names
from imaging.labels import labels_of_rows
from imaging.tables import ImageNames, join_table, read_table
from storage.files import is_utf8, printable

TABLE_SUFFIXES = (".csv", ".tab", ".tsv", ".txt", "")  # of several with one name, the first is read
COMMON_NAMES = {
    "age_approx": "age",
    "age_approximate": "age",
    "anatom_site_general": "site",
    "anatom_site_general_challenge": "site",
    "localization": "site",
    "region": "site",
    "gender": "sex",
    "patient": "patient_id",
}
# Columns that say nothing of an image, or only what its class says.
NOT_METADATA = {"Unnamed: 0", "url", "url_alphanum", "target", "score_weight", "validation_weight"}
# What an image shows instead of a lesion, by the end of its name.
LEFT_OUT = {
    "superpixels": re.compile(r"_superpixels$", re.I),
    "mask": re.compile(r"_(segmentation|mask|lesion|attribute_\w+|r\d+_label\d+)$", re.I),
}


@dataclass(frozen=True)
class Table:
    """A kind of table of a published set, and what its columns mean.

    Parameters
    ----------
    files : patterns of its name in lower case, without the suffix; all files that match the first
        pattern that any file matches are read
    id_columns : the first of these that it has names the images
    labels : the column of the classes, or those of one class each, some of which may be missing;
        none if it has only metadata
    otherwise : the class of rows in which none of several columns is 1
    class_names : other names for its classes
    split : the official split of its images; by default that of which its name has the word
    header : the names of its columns, where the file has none
    read : reads a file of it
    """

    files: Sequence[str]
    id_columns: Sequence[str] = ("image", "image_id", "image_name")
    labels: Sequence[str] = ()
    otherwise: str | None = None
    class_names: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    header: Sequence[str] = ()
    read: Callable[[Path], pd.DataFrame] = read_table


def plain_name(path: str) -> str:
    """Returns the last part of a path in lower case, without the suffix of a table."""
    end = "/" if path.endswith("/") else ""
    name = PurePosixPath(path.casefold())
    is_table = not end and name.suffix in TABLE_SUFFIXES
    return (name.stem if is_table else name.name) + end


def are_all_there(patterns: Sequence[str], names: Collection[str]) -> bool:
    """Returns whether each pattern matches one of these names, which are as of `plain_name`."""
    return all(
        any(fnmatchcase(name, pattern) for name in names) if "*" in pattern else pattern in names
        for pattern in patterns
    )


def read_published(
    folder: Path, tables: Sequence[Table], duplicates: str | None = None
) -> pd.DataFrame:
    """Returns the images of a published set, as `imaging.layouts.Reader.read` does.

    An image without a row has no class. Masks and superpixels are left out, and so are images that
    are there twice, with the same name and size, and the second image of each pair in the table
    named `duplicates`. There is a column `split` if the labelled images are of several splits.

    Raises FileNotFoundError or ValueError if there is no image, no table or none that fits.
    """
    folder = Path(folder)
    images = list_images(folder, has_class_folders=False)
    images["left_out"] = _find_left_out(folder, images["path"], duplicates)
    rows, name = _read_tables(folder, tables)
    is_image = images["left_out"].isna() | (images["left_out"] == "duplicate")
    kept = images[is_image]
    if len(kept) == 0:
        raise ValueError(f"{printable(folder)}: no images of lesions")
    uses: list[str] = []
    try:
        found = join_table(
            kept["path"], rows, name, warn_unmatched=True, id_column="image", uses=uses
        )
    except ValueError as error:
        raise ValueError(
            f"{error}; if these images are not of that set, read them by their folders with "
            '--layout "class folders"'
        ) from error
    found = found.drop(columns=images.columns, errors="ignore").set_index(kept.index)
    images = images.join(found)
    if "split" not in images:
        images["split"] = None
    images["split"] = images["split"].fillna(images["source_split"].map(_split_of))
    if images["split"][is_image & images["class"].notna()].nunique() < 2:
        images = images.drop(columns="split")
    images.attrs["tables"] = uses
    return images


def _split_of(name: str) -> str | None:
    """Returns the split for which the last word of a path that is of one stands."""
    splits = [SPLIT_WORDS[word] for word in words_of(name) if word in SPLIT_WORDS]
    return splits[-1] if splits else None


# ---------------------------------------------------------------------------- images left out


def _find_left_out(folder: Path, paths: pd.Series, duplicates: str | None) -> pd.Series:
    """Returns for each path why it is left out, missing where it is not."""
    reasons = [_what_is_shown(path) for path in paths]
    by_name: dict[str, list[int]] = {}  # the sizes of the files with one name
    for number, path in enumerate(paths):
        if reasons[number] is None and (folder / path).is_file():
            sizes = by_name.setdefault(PurePosixPath(path).name.casefold(), [])
            size = (folder / path).stat().st_size
            if size in sizes:
                reasons[number] = "copy in another folder"
            sizes.append(size)
    for name in find_tables(folder, [duplicates] if duplicates else []):
        pairs = read_table(folder / name, ["image_name_1", "image_name_2"])
        ones, twos = pairs["image_name_1"].fillna(""), pairs["image_name_2"].fillna("")
        found = ImageNames(paths).find({*ones, *twos})
        for one, two in zip(ones, twos, strict=True):
            for number in found.get(two, ()) if one in found else ():
                reasons[number] = reasons[number] or "duplicate"
    return pd.Series(reasons, dtype=object)


def _what_is_shown(path: str) -> str | None:
    stem = PurePosixPath(path).stem
    return next((what for what, pattern in LEFT_OUT.items() if pattern.search(stem)), None)


# ---------------------------------------------------------------------------- tables


def find_tables(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Returns the tables in a folder that match the first pattern that any matches.

    Of tables with one name, in several folders or formats, there is one.
    """
    names = [name for name in list_names(folder) if not name.endswith("/")]
    names = [n for n in names if PurePosixPath(n).suffix.casefold() in TABLE_SUFFIXES]
    for pattern in patterns:
        found: dict[str, list[str]] = {}
        for name in names:
            if fnmatchcase(plain_name(name), pattern):
                found.setdefault(plain_name(name), []).append(name)
        if found:
            return [min(same, key=_preference) for same in found.values()]
    return []


def _preference(name: str) -> tuple[int, int]:
    path = PurePosixPath(name)
    return TABLE_SUFFIXES.index(path.suffix.casefold()), len(path.parts)


def _read_tables(folder: Path, tables: Sequence[Table]) -> tuple[pd.DataFrame, str]:
    """Returns one row for each image in the set's tables, and the names of these.

    The columns are `image`, its name, `class`, `split`, and the others by their common names.
    Raises ValueError if no table has labels, or two rows give an image different classes.
    """
    parts, read = [], []
    for table in tables:
        names = find_tables(folder, table.files)
        parts += [_read(folder / name, table) for name in names]
        read += names
    if not any("class" in part for part in parts):
        wanted = " or ".join(files for table in tables if table.labels for files in table.files)
        raise FileNotFoundError(
            f"{printable(folder)}: no table of labels; put the one that comes with the set, named "
            f"like {wanted}, into this folder, or read it otherwise with --layout (layout)"
        )
    name = f"{folder}: {', '.join(read)}"
    rows = pd.concat(parts, ignore_index=True)
    is_contradicted = rows.groupby("image")["class"].nunique() > 1
    if is_contradicted.any():
        image = is_contradicted.index[is_contradicted][0]
        raise ValueError(
            f"{printable(name)}: the classes of {printable(image)} contradict each other"
        )
    return rows.groupby("image", sort=False).first().reset_index(), name


def _read(path: Path, table: Table) -> pd.DataFrame:
    """Returns the rows of a table of this kind, as `_read_tables` does."""
    rows = table.read(path)
    if table.header and not {*table.header} & {*rows.columns}:
        rows = _with_header(rows, table.header)
    id_column = next((name for name in table.id_columns if name in rows), None)
    if id_column is None:
        known = ", ".join(map(printable, rows.columns))
        raise ValueError(
            f"{printable(path)}: no column {' or '.join(table.id_columns)}; its columns are {known}"
        )
    labels = [name for name in table.labels if name in rows]
    if table.labels and not labels:
        raise ValueError(f"{printable(path)}: no column {' or '.join(table.labels)} of labels")
    not_metadata = {id_column, *labels, *NOT_METADATA}
    columns = [name for name in rows.columns if name not in not_metadata]
    found = rows[columns].rename(columns=COMMON_NAMES)
    if labels:
        classes = labels_of_rows(rows, path, labels, otherwise=table.otherwise)
        found["class"] = classes.map(lambda name: table.class_names.get(name, name), "ignore")
    found["split"] = table.split or _split_of(path.stem)
    found["image"] = rows[id_column]
    return found[found["image"].notna()]


def _with_header(rows: pd.DataFrame, header: Sequence[str]) -> pd.DataFrame:
    """Returns a table whose first row was taken for its header with that row and this header."""
    cells = rows.iloc[:, : len(header)].set_axis(list(header), axis=1)
    first = pd.DataFrame([rows.columns[: len(header)]], columns=list(header), dtype=object)
    return pd.concat([first, cells], ignore_index=True)


def read_ph2_table(path: Path) -> pd.DataFrame:
    """Returns PH2_dataset.txt, whose cells are separated by | and ||, with a legend below."""
    text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("||")]
    cells = [[cell.strip() for cell in re.split(r"\|\|?", line)[1:-1]] for line in lines]
    header = next((row for row in cells if row[:1] == ["Name"]), None)
    rows = [row for row in cells if header and row != header and len(row) == len(header)]
    if header is None or not rows:
        raise ValueError(f"{printable(path)}: not the table of PH2, as no row follows || Name ||")
    table = pd.DataFrame(rows, columns=header, dtype=object)
    return table.map(lambda cell: cell if cell and is_utf8(cell) else None)
