"""The images of a prediction: files, folders, lists of files and tables with a column of paths."""

import os
from pathlib import Path

import pandas as pd

from imaging.folders import find_images
from imaging.tables import decode_text, read_table
from inference.options import Paths, as_list
from storage.files import printable

LISTS, TABLES = (".txt",), (".csv", ".tsv")
PATH_COLUMNS = ("path", "file", "filename", "image")  # of a table, in upper or lower case


def find_files(images: Paths) -> list[str]:
    """Returns the files that these stand for, each once, with forward slashes.

    A folder stands for the images below it as `dataset.find_images` finds them, a `.txt` file for
    the file in each of its lines, a `.csv` or `.tsv` table for those in its column of paths, and
    any other file for itself, whatever its suffix. Paths in a list or table are relative to its
    own folder, or else to the current one.

    Raises FileNotFoundError naming all that do not exist, and ValueError for a folder without
    images and for an empty list.
    """
    images = as_list(images)
    if not images:
        raise ValueError("no images given; give files or folders")
    missing = [printable(path) for path in images if not os.path.exists(path)]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file or folder")
    found: list[str] = []
    for path in map(Path, images):
        if path.is_dir():
            inside = find_images(path, has_class_folders=False)["path"]
            found += [(path / name).as_posix() for name in inside]
        elif path.suffix.lower() in (*LISTS, *TABLES):
            found += _listed_files(path)
        else:
            found.append(path.as_posix())
    return list(dict.fromkeys(found))


def _listed_files(path: Path) -> list[str]:
    """Returns the files that a list or a table names."""
    if path.suffix.lower() in LISTS:
        lines = decode_text(path.read_bytes()).splitlines()
        names = [line.strip() for line in lines if line.strip()]
    else:
        table = read_table(path)
        names = table[_path_column(table, path)].dropna().str.strip().tolist()
    if not names:
        raise ValueError(f"{printable(path)}: no images in this list")
    found = [_existing(name, path.parent) for name in names]
    missing = [name for name, file in zip(names, found, strict=True) if file is None]
    if missing:
        raise FileNotFoundError(
            f"{printable(path)}: {len(missing):,} of its {len(names):,} files do not exist, such "
            f"as {printable(missing[0])}; paths are relative to the folder of the list"
        )
    return [file for file in found if file is not None]


def _path_column(table: pd.DataFrame, path: Path) -> str:
    known = {str(column).casefold(): column for column in table.columns}
    for name in PATH_COLUMNS:
        if name in known:
            return known[name]
    raise ValueError(
        f"{printable(path)}: no column {' or '.join(PATH_COLUMNS)}; its columns are "
        f"{', '.join(map(printable, table.columns))}"
    )


def _existing(name: str, folder: Path) -> str | None:
    for file in (folder / name, Path(name)):
        if file.is_file():
            return file.as_posix()
    return None
