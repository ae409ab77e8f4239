"""Class labels in the shapes that tables have: names, one-hot columns, true or false, numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from imaging.classes import class_key
from imaging.lesions import find_diagnosis
from imaging.tables import decode_latin1, read_table
from storage.files import did_you_mean, printable

_TRUE, _FALSE = {"1", "1.0", "true", "t", "yes"}, {"0", "0.0", "false", "f", "no"}
NOT_LABELS = {"score_weight", "validation_weight"}  # binary columns of ISIC's tables of labels
COMPLEMENTS = {"malignant": "benign", "benign": "malignant"}


def is_one_hot(table: pd.DataFrame) -> bool:
    """Returns whether a table has no column `class`, but columns that say of each class 0 or 1."""
    return "class" not in table and len(one_hot_columns(table)) >= 2


def one_hot_columns(table: pd.DataFrame) -> list[str]:
    """Returns the columns of a table that have only 0 and 1, or true and false."""
    columns = [name for name in table.columns if str(name).casefold() not in NOT_LABELS]
    return [name for name in columns if _are_binary(table[name])]


def _are_binary(values: pd.Series) -> bool:
    found = {value.strip().casefold() for value in values.dropna().unique()}
    return len(found) > 0 and found <= _TRUE | _FALSE


def labels_of_rows(
    table: pd.DataFrame,
    name: str | Path,
    columns: Sequence[str] = (),
    class_names: Sequence[str] = (),
    otherwise: str | None = None,
) -> pd.Series:
    """Returns the class of each row of a table, missing where the row has none.

    Several `columns` are of one class each, whose name they have: exactly one of them is 1, or
    true, in each row that is labelled, or, given the class `otherwise`, at most one. A single
    column has the names of the classes or, given `class_names`, their numbers from 0; one of 0 and
    1, or true and false, whose name is of a diagnosis says whether a row has it. By default the
    column is `class`, or else the columns are all that `one_hot_columns` finds.

    Raises ValueError for columns that are none of this, with an example.
    """
    if not columns:
        columns = one_hot_columns(table) if is_one_hot(table) else ["class"]
    missing = [column for column in columns if column not in table]
    if missing:
        known = ", ".join(map(printable, table.columns))
        raise ValueError(
            f"{printable(name)}: no column {', '.join(map(printable, missing))}; its columns are "
            f"{known}"
        )
    if len(columns) > 1:
        return _from_one_hot(table[list(columns)], name, otherwise)
    values = table[columns[0]]
    if class_names:
        return _from_numbers(values, name, class_names)
    diagnosis = find_diagnosis(str(columns[0]))
    if diagnosis is not None and _are_binary(values):
        other = COMPLEMENTS.get(diagnosis.name, f"not {columns[0]}")
        is_true = values.str.strip().str.casefold().isin(_TRUE)
        return is_true.map({True: str(columns[0]), False: other}).where(values.notna())
    return values


def _from_one_hot(table: pd.DataFrame, name: str | Path, otherwise: str | None) -> pd.Series:
    for column in table:
        if not table[column].isna().all() and not _are_binary(table[column]):
            wrong = table[column].dropna()
            wrong = wrong[~wrong.str.strip().str.casefold().isin(_TRUE | _FALSE)].iloc[0]
            raise ValueError(
                f"{printable(name)}: column {printable(str(column))} of labels has {wrong!r}; "
                "several columns of labels have only 0 and 1, or true and false"
            )
    is_true = table.apply(lambda values: values.str.strip().str.casefold().isin(_TRUE))
    counts = is_true.sum(axis=1)
    if (counts > 1).any():
        row = counts[counts > 1].index[0]
        found = ", ".join(printable(str(column)) for column in table if is_true.loc[row, column])
        raise ValueError(
            f"{printable(name)}: row {row + 2} is of several classes, {found}; keep one of them"
        )
    labels = is_true.idxmax(axis=1).map(lambda column: decode_latin1(str(column)))
    return labels.astype(object).where(counts == 1, otherwise).where(table.notna().any(axis=1))


def _from_numbers(values: pd.Series, name: str | Path, class_names: Sequence[str]) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce")
    is_number = numbers.isin(range(len(class_names)))
    wrong = values[values.notna() & ~is_number]
    if len(wrong) > 0:
        raise ValueError(
            f"{printable(name)}: {values.name} is {wrong.iloc[0]!r}, but with {len(class_names)} "
            f"--class_names it must be a whole number from 0 to {len(class_names) - 1}"
        )
    return numbers.map(dict(enumerate(class_names))).astype(object)


# ---------------------------------------------------------------------------- other names


def read_class_map(given: Mapping[str, str] | Sequence[str] | str | Path) -> dict[str, str]:
    """Returns new names by old ones: given as such, as texts `old=new`, or as a table of both.

    The table has two columns, `old` and `new`. Nothing as the new name leaves the class out.
    Raises ValueError for anything else, and for a class with two new names.
    """
    if isinstance(given, Mapping):
        return dict(given)
    words = [str(given)] if isinstance(given, str | Path) else list(given)
    if len(words) == 1 and "=" not in words[0]:
        table = read_table(words[0], ["old", "new"]).fillna("")
        pairs = table[["old", "new"]].map(decode_latin1).to_numpy().tolist()
    else:
        wrong = [word for word in words if "=" not in word]
        if wrong:
            raise ValueError(f"class_map must be of the form old=new, not {wrong[0]!r}")
        pairs = [word.rsplit("=", 1) for word in words]
    names: dict[str, str] = {}
    for old, new in ((old.strip(), new.strip()) for old, new in pairs):
        if names.setdefault(old, new) != new:
            raise ValueError(f"class_map renames {old!r} to {names[old]!r} and to {new!r}")
    return names


def rename_classes(labels: pd.Series, class_map: Mapping[str, str], *others: str) -> pd.Series:
    """Returns the labels under their new names, missing where a class is left out.

    Spellings that differ by case, spaces, hyphens and underscores match. Raises ValueError for an
    old name that is neither among the labels nor among `others`, the classes of a model.
    """
    present = [str(label) for label in labels.dropna().unique()]
    known = {class_key(label) for label in [*present, *others]}
    for old in class_map:
        if class_key(old) not in known:
            listed = f"the classes are {', '.join(map(printable, sorted({*present, *others})))}"
            raise ValueError(
                f"class_map: there is no class {old!r}; {did_you_mean(old, present, listed)}"
            )
    new_names = {class_key(old): new or None for old, new in class_map.items()}
    renamed = {label: new_names.get(class_key(label), label) for label in present}
    return labels.map(renamed).astype(object)
