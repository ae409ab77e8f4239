"""Finds the images below a folder, and takes their classes from the folders that they are in."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from imaging.classes import unify_class_names
from imaging.tables import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES
from storage.files import is_utf8, printable


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
    images = list_images(data_dir, has_class_folders=has_class_folders)
    if not has_class_folders:
        return images
    if images["class"].isna().any():
        raise ValueError(why_unlabelled(images, data_dir))
    images = images.assign(**{"class": unify_class_names(images["class"])})
    if images["class"].nunique() < 2:
        raise ValueError(
            f"{printable(data_dir)}: all images are of one class, "
            f"{printable(images['class'].iloc[0])}; at least two classes are needed"
        )
    return images


def list_images(data_dir: str | Path, *, has_class_folders: bool = True) -> pd.DataFrame:
    """Returns what `find_images` does, but images directly in the folder have no class.

    The names of classes are as written, and may be of a single class. Raises what `find_images`
    raises for a folder without images and for names that are not valid UTF-8.
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
        images["class"] = pd.Series(_classes_of(data_dir, parents), dtype=object)
        parents = [parent[:-1] for parent in parents]
    images["source_split"] = pd.Series(["/".join(parent) for parent in parents], dtype=object)
    return images


def list_names(folder: Path, num_levels: int = 3) -> list[str]:
    """Returns what lies in a folder and in those up to three levels below, in sorted order.

    The paths are relative to the folder, and those of folders end with a slash. Hidden files and
    folders are ignored, as is a folder that cannot be read or does not exist.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []
    found = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if not os.path.isdir(entry):  # `entry.is_dir` raises OSError for a link to itself
            found.append(entry.name)
            continue
        found.append(f"{entry.name}/")
        if num_levels > 0:
            inside = list_names(folder / entry.name, num_levels - 1)
            found += [f"{entry.name}/{name}" for name in inside]
    return found


def why_unlabelled(images: pd.DataFrame, data_dir: str | Path) -> str:
    """Returns the message for images whose folder gives them no class."""
    stray = images["path"][images["class"].isna()].iloc[0]
    return f"{printable(data_dir)}: {printable(stray)} is not in a class folder; move it into one"


def _classes_of(data_dir: Path, parents: list[list[str]]) -> list[str | None]:
    # One system writes é as one character, another as e and an accent: it is the same class.
    names = [unicodedata.normalize("NFC", parent[-1]) if parent else None for parent in parents]
    for name in names:
        if name is not None and not is_utf8(name):
            raise ValueError(
                f"{printable(data_dir)}: the class folder {printable(name)} is not valid UTF-8; "
                "rename it"
            )
    return names


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
