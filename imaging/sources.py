"""Where images and labels come from: folders and tables."""

import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from storage.files import printable, read_csv

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
UNSUPPORTED_SUFFIXES = {".gif", ".heic", ".heif", ".avif"}  # named, as they are pictures too
STEM_COLUMNS = ("image_id", "image_name", "isic_id")  # HAM10000's, the 2020 challenge's, ISIC's
METADATA_COLUMNS = (
    "path",
    "class",
    "label",
    "source_split",
    "width",
    "height",
    "content_hash",
    "picture",
    "group",
    "split",
)
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}


def find_images(data_dir: str | Path, *, has_class_folders: bool = True) -> pd.DataFrame:
    """The images below a folder, a row each: `path`, `class`, `source_split`, sorted by path.

    `path` is relative to `data_dir` with forward slashes, `class` the parent folder's name, and
    `source_split` what lies above that. Without class folders there is no `class`, and
    `source_split` is all that lies above the image. Hidden files and folders are passed over, links
    followed. What has an image's name but is none, or of a format that is not supported, has its
    row too: whoever reads it hears of it.

    Raises FileNotFoundError for no such folder; ValueError for no images, and where there are class
    folders for images that stand directly in `data_dir` and for fewer than two classes.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{printable(data_dir)}: no such folder")
    paths = sorted(path.relative_to(data_dir).as_posix() for path in _walk(data_dir, frozenset()))
    if not paths:
        raise ValueError(
            f"{printable(data_dir)}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}); the layout "
            "is one sub-folder a class"
        )
    parents = [path.split("/")[:-1] for path in paths]
    if not has_class_folders:
        source_splits = ["/".join(parent) for parent in parents]
        return pd.DataFrame({"path": paths, "source_split": source_splits}, dtype=object)
    if not all(parents):
        stray = paths[parents.index([])]
        raise ValueError(
            f"{printable(data_dir)}: {printable(stray)} stands directly in it; the layout is one "
            "sub-folder a class"
        )
    # One system writes é as one character, another as e and an accent: it is the same class.
    classes = [unicodedata.normalize("NFC", parent[-1]) for parent in parents]
    unwritable = [name for name in classes if not _is_unicode(name)]
    if unwritable:
        raise ValueError(
            f"{printable(data_dir)}: the name of the class folder {printable(unwritable[0])} is "
            "not valid UTF-8; rename it"
        )
    if len(set(classes)) < 2:
        raise ValueError(
            f"{printable(data_dir)}: all images are of one class, {printable(classes[0])}; a "
            "classifier needs two or more"
        )
    source_splits = ["/".join(parent[:-1]) for parent in parents]
    # As str, pandas with pyarrow could not hold names that are not valid UTF-8.
    return pd.DataFrame(
        {"path": paths, "class": classes, "source_split": source_splits}, dtype=object
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def read_table(path: str | Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file with a row an image, which it names in `path` or in one of `STEM_COLUMNS`.

    All cells are text, whatever they look like, and only empty ones are missing, see `read_csv`.

    Raises FileNotFoundError for no such file, and ValueError for a file that is no such table or
    lacks one of `columns`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{printable(path)}: no such file")
    table = read_csv(path)
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(
            f"{printable(path)}: no column {', '.join(missing)}; it has "
            f"{', '.join(map(printable, table.columns))}"
        )
    return table


def join_table(paths: Sequence[str], table: pd.DataFrame, name: str | Path) -> pd.DataFrame:
    """The table's row for each image, in the images' order; empty values where it has none.

    Images are found by `path`, relative to the data's folder, or else by the file's name without
    its suffix in one of `STEM_COLUMNS`. `name` is what errors call the table. Raises ValueError
    when the table names no images, names one twice, or names none of these.
    """
    keys = [column for column in ("path", *STEM_COLUMNS) if column in table]
    if not keys:
        raise ValueError(
            f"{printable(name)}: no column {', '.join(('path', *STEM_COLUMNS))} to know the images "
            "by"
        )
    wanted = pd.Index(paths)
    if keys[0] != "path":
        wanted = pd.Index([PurePosixPath(path).stem for path in paths])
    if len(table) == 0:
        raise ValueError(f"{printable(name)}: has no rows")
    rows = table.set_index(keys[0])
    found = rows[rows.index.isin(wanted)]
    if len(found) == 0:
        raise ValueError(
            f"{printable(name)}: matches no image; its {keys[0]} are like {rows.index[0]!r}, those "
            f"of the images like {wanted[0]!r}"
        )
    if found.index.has_duplicates:
        twice = found.index[found.index.duplicated()][0]
        raise ValueError(f"{printable(name)}: has more than one row for {printable(twice)}")
    return found.reindex(wanted).reset_index(drop=True)


def check_unicode(values: pd.Series, name: str | Path) -> None:
    """Raises ValueError for names of classes or splits that no figure could show."""
    unwritable = values[~values.map(_is_unicode).astype(bool)]
    if len(unwritable) > 0:
        raise ValueError(
            f"{printable(name)}: {printable(unwritable.iloc[0])} is not valid UTF-8; save the "
            "table as UTF-8"
        )


def warn_of_rows_without_image(paths: Sequence[str], table: pd.DataFrame, name: str | Path) -> None:
    """Warns of rows of a table, which `join_table` has taken, that name none of these images."""
    key = next(column for column in ("path", *STEM_COLUMNS) if column in table)
    known = set(paths) if key == "path" else {PurePosixPath(path).stem for path in paths}
    extra = table[key][~table[key].isin(known)]
    if len(extra) > 0:
        warnings.warn(
            f"{printable(name)}: {len(extra)} of its {len(table)} rows name no image here, such as "
            f"{printable(extra.iloc[0])}",
            stacklevel=4,
        )


def split_of_folder(source_split: pd.Series) -> pd.Series:
    """The split that a folder's name says, missing where it says none."""
    splits = [SPLIT_FOLDERS.get(folder.split("/")[0].casefold()) for folder in source_split]
    return pd.Series(splits, index=source_split.index, dtype=object)


def has_folder_of_split(data_dir: str | Path, split: str) -> bool:
    """Returns whether a folder in `data_dir` is named like this split: train, valid or test."""
    names = [path.name for path in Path(data_dir).glob("*") if path.is_dir()]
    return split in set(split_of_folder(pd.Series(names, dtype=object).astype(str)))


def given_name(column: str) -> str:
    """Returns what a user's column is called in the metadata, which has names of its own."""
    return f"{column}_given" if column in METADATA_COLUMNS else column
