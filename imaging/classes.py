"""Names of classes: which spellings are one class."""

import re
import unicodedata
import warnings

import pandas as pd

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
