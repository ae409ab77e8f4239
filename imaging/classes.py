"""Names of classes: which spellings are one class, and which names are hardly of a class."""

import itertools
import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd

from storage.files import printable

_HYPHENS = "\\-\u2010\u2011\u2012\u2013\u2014"
_SEPARATORS = re.compile(rf"[\s_{_HYPHENS}]+")
MAX_NAMED = 5  # classes in a message


def class_key(name: str) -> str:
    """Returns the same text for all spellings of a class.

    Spellings are of one class if they differ only by case, spaces, hyphens and underscores. Between
    two digits, and as a minus sign before the first, these make a difference: "stage 1-2" is not
    "stage 12". A name of nothing else is its own key.
    """
    text = unicodedata.normalize("NFC", name)
    text = unicodedata.normalize("NFC", text.casefold())

    def replaced(match: re.Match[str]) -> str:
        before, after = text[: match.start()], text[match.end() :]
        is_before_a_digit = after[:1].isdecimal()
        if before and before[-1].isdecimal() and is_before_a_digit:
            return " "
        return "-" if not before and is_before_a_digit and match[0][-1] not in " _" else ""

    return _SEPARATORS.sub(replaced, text) or name


def unify_class_names(names: pd.Series) -> pd.Series:
    """Returns the names with one spelling for each class, the commonest, and warns of the others.

    Of equally common spellings the first in sorted order is taken. Missing names stay missing.
    """
    counts = names.value_counts()
    spellings: dict[str, list[str]] = {}
    for name in sorted(counts.index):
        spellings.setdefault(class_key(name), []).append(name)
    chosen: dict[str, str] = {}
    described = []
    for same in spellings.values():
        first, *others = sorted(same, key=lambda name: -counts[name])
        chosen |= dict.fromkeys(others, first)
        if others:
            written = ", ".join(f"{name!r} ({counts[name]:,} images)" for name in others)
            described.append(f"{written} as {first!r} ({counts[first]:,})")
    if not chosen:
        return names
    more = f"; and {len(described) - MAX_NAMED} more" if len(described) > MAX_NAMED else ""
    warnings.warn(
        "names that differ only by case, spaces, hyphens or underscores are one class: "
        f"{'; '.join(described[:MAX_NAMED])}{more}",
        stacklevel=2,
    )
    return names.map(chosen).fillna(names)


# ---------------------------------------------------------------------------- names of no class

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trainset": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "valset": "valid",
    "dev": "valid",
    "development": "valid",
    "devset": "valid",
    "test": "test",
    "testing": "test",
    "testset": "test",
}
# What a folder holds, where its name says nothing of a diagnosis.
_CONTENTS = {
    "image", "img", "picture", "photo", "photograph", "pic", "input", "mask", "segmentation",
    "seg", "superpixel", "groundtruth", "annotation", "heatmap", "thumbnail",
}  # fmt: skip
_FILLERS = {
    "set", "data", "dataset", "split", "folder", "file", "raw", "jpg", "jpeg", "png", "bmp", "tif",
    "tiff", "ground", "truth", "label", "unlabelled", "unlabeled", "isic", "ham", "challenge",
    "task", "v", "part", "archive", "all",
}  # fmt: skip
_PARTS = {"part", "fold", "batch", "chunk", "shard", "split"}
_MASK_SUFFIX = re.compile(
    r"(?<=.)[_\- ](?:segmentation|superpixels?|mask|seg|groundtruth|ground_truth|lesion)$", re.I
)
MIN_SINGLE_IMAGE_CLASSES = 20  # where most classes are of one image; 100 where they are not


def words_of(name: str) -> list[str]:
    """Returns the words of a folder's name, in lower case and the singular, numbers apart."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+|\d+", spaced.casefold())
    return [word[:-1] if word.endswith("s") and len(word) > 3 else word for word in words]


def split_of_name(name: str) -> str | None:
    """Returns the split that a folder's name stands for: train, valid or test; None for others.

    Beside a word for the split, such as training, val, dev or testing, the name may only have words
    that say nothing, such as set, data, images or a number.
    """
    words = [w for w in words_of(name) if not w.isdecimal() and w not in _FILLERS | _CONTENTS]
    splits = {SPLIT_WORDS.get(word) for word in words}
    return splits.pop() if len(splits) == 1 else None


def _why_no_class(name: str) -> str | None:
    """Returns what a name is of instead of a class, if it is."""
    words = words_of(name)
    if split_of_name(name) is not None:
        return "a split"
    if {"mask", "segmentation", "superpixel", "groundtruth"} & {*words}:
        return "masks"
    if any(a in _PARTS and b.isdecimal() for a, b in itertools.pairwise(words)):
        return "a part of a set"
    is_known = [w in _CONTENTS | _FILLERS or w.isdecimal() for w in words]
    if _CONTENTS & {*words} and (all(is_known) or {"image", "img", "input"} & {*words}):
        return "images of any class"
    return None


def is_mask(path: str) -> bool:
    """Returns whether the name of a file is that of a mask, such as X_segmentation.png."""
    return _MASK_SUFFIX.search(PurePosixPath(path).stem) is not None


def find_implausible_classes(images: pd.DataFrame) -> dict[str, str]:
    """Returns the classes that are hardly classes, and what each seems to be instead.

    These are names of splits, of parts of a set, and of what a folder holds, such as images or
    masks; classes whose files are all masks of those of others, `X_segmentation.png` beside
    `X.jpg`; and classes of a single image, where there are many of them. `images` has a row for
    each image, and the columns `path` and `class`.
    """
    counts = images["class"].value_counts().sort_index()
    found = {name: why for name in counts.index if (why := _why_no_class(name)) is not None}
    stems = images["path"].map(lambda path: PurePosixPath(path).stem)
    masked = stems.map(lambda stem: _MASK_SUFFIX.sub("", stem))
    is_suffixed = stems != masked
    for name in counts.index[~counts.index.isin(images["class"][~is_suffixed])]:
        others = set(stems[images["class"] != name])
        if name not in found and masked[images["class"] == name].isin(others).all():
            found[name] = "masks"
    single = counts.index[counts == 1]
    is_most = len(single) >= MIN_SINGLE_IMAGE_CLASSES and 2 * len(single) > len(counts)
    if is_most or len(single) >= 100:
        found |= {name: "a single image" for name in single if name not in found}
    return found


def check_class_names(images: pd.DataFrame, data_dir: str | Path) -> None:
    """Raises ValueError for classes that are hardly classes, see `find_implausible_classes`."""
    found = find_implausible_classes(images)
    if not found:
        return
    by_reason: dict[str, list[str]] = {}
    for name, why in found.items():
        by_reason.setdefault(why, []).append(printable(name))
    counts = images["class"].value_counts()
    understood = [f"{printable(str(name))} ({count:,})" for name, count in counts.items()]
    reasons = "; ".join(f"{_listed(names)}: {why}" for why, names in by_reason.items())
    raise ValueError(
        f"{printable(data_dir)}: the {len(counts):,} classes were understood as "
        f"{_listed(understood)}, but these do not look like classes ({reasons}); point --data_dir "
        "to the folder that has a folder for each class, take the classes from a table with "
        "--label_column, or, if they are classes, accept them with --accept_class_names "
        "(accept_class_names=True)"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
