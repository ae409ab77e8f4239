"""Reads tables as people have them, and finds the row of each image in them."""

import bisect
import codecs
import csv
import difflib
import io
import itertools
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from storage.files import is_utf8, printable

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
UNSUPPORTED_SUFFIXES = {".gif", ".heic", ".heif", ".avif"}  # images as well, so reported
STEM_COLUMNS = ("image_id", "image_name", "isic_id")  # HAM10000's, the 2020 challenge's, ISIC's
USUAL_ID_COLUMNS = ("path", *STEM_COLUMNS)
SEPARATORS = (",", ";", "\t")
NUM_ROWS_PROBED = 50  # of a table, for its separator
NEAR_TIE = 0.9  # of the images that the best column matches
MIN_SHARE_MATCHED = (
    0.5  # of the rows or of the images, by a column that has none of the usual names
)
NUM_NEIGHBOURS = 100  # names in sorted order among which the nearest is looked for


def read_table(path: str | Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Returns a table whose rows describe images, every cell as text; only empty ones are missing.

    Cells are separated by commas, semicolons or tabs, and may be quoted; spaces after a separator
    and around the names of columns are dropped. The file is UTF-8, UTF-16, or Latin-1, whose bytes
    are surrogate escapes until `join_table` decodes them, as names of files may have such bytes.

    Raises FileNotFoundError if there is no such file, and ValueError if it is no such table or
    lacks one of `columns`.
    """
    if not Path(path).is_file():
        what = " is a folder, not a table" if Path(path).is_dir() else ": no such file"
        raise FileNotFoundError(f"{printable(path)}{what}")
    try:
        text = decode_text(Path(path).read_bytes())
        table = pd.read_csv(
            io.BytesIO(text.encode("utf-8", "surrogateescape")),
            sep=_find_separator(text),
            skipinitialspace=True,
            dtype=object,  # not str, which pyarrow, if it is installed, limits to valid UTF-8
            keep_default_na=False,
            na_values=[""],
            encoding="utf-8",
            encoding_errors="surrogateescape",
        )
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("some rows have more cells than the header")
    except ValueError as error:  # pandas' own errors for what cannot be parsed are ValueErrors
        reason = " ".join(str(error).split())
        raise ValueError(f"{printable(path)}: not a valid CSV table ({reason})") from error
    names = [decode_latin1(name).strip() for name in table.columns]
    if len(set(names)) == len(names):
        table.columns = pd.Index(names, dtype=object)
    missing = [name for name in columns if name not in table]
    if missing:
        known = ", ".join(map(printable, table.columns))
        raise ValueError(
            f"{printable(path)}: no column {', '.join(missing)}; its columns are {known}"
        )
    return table


def check_id_column(tables: Iterable[str | Path], id_column: str) -> None:
    """Raises ValueError if none of the tables has this column."""
    known = []
    for path in tables:
        columns = read_table(path).columns
        if id_column in columns:
            return
        known.append(f"{printable(path)} has {', '.join(map(printable, columns))}")
    raise ValueError(f"--id_column {printable(id_column)}: no such column; {'; '.join(known)}")


def decode_latin1(text: str) -> str:
    """Returns text with bytes that were not UTF-8 read as Windows-1252, or else as Latin-1."""
    if is_utf8(text):
        return text
    contents = text.encode("utf-8", "surrogateescape")
    try:
        return contents.decode("cp1252")
    except UnicodeDecodeError:
        return contents.decode("latin-1")


def decode_text(contents: bytes) -> str:
    """Returns the text of a file in UTF-8 or UTF-16; other bytes become surrogate escapes."""
    if contents.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return contents.decode("utf-16")
    for zeros, others, encoding in ((1, 0, "utf-16-le"), (0, 1, "utf-16-be")):
        if contents[zeros:4:2] == b"\0\0" and b"\0" not in contents[others:4:2]:
            return contents.decode(encoding)
    return contents.decode("utf-8-sig", "surrogateescape")


def _find_separator(text: str) -> str:
    """Returns the separator with which most rows have as many cells as the header, and the most."""

    def agreement(separator: str) -> tuple[float, int]:
        lines = io.StringIO(text[:100_000], newline="")
        records = csv.reader(lines, delimiter=separator, skipinitialspace=True)
        try:
            probed = [row for row in itertools.islice(records, NUM_ROWS_PROBED) if row]
        except csv.Error:
            return 0.0, 0
        if not probed or len(probed[0]) < 2:
            return 0.0, 0
        header, *rows = map(len, probed)
        return (rows.count(header) / len(rows) if rows else 1.0), header

    return max(SEPARATORS, key=agreement)  # the first of equals


# ---------------------------------------------------------------------------- names of images


def _fold(name: str) -> tuple[tuple[str, ...], str, str]:
    """Returns folders, file name and its stem as names are compared: without regard to case."""
    if not name.isascii():
        name = unicodedata.normalize("NFC", decode_latin1(name))
    folders = [
        p for p in name.casefold().strip().replace("\\", "/").split("/") if p not in ("", ".")
    ]
    file = folders.pop() if folders else ""
    stem, dot, suffix = file.rpartition(".")
    is_image = dot + suffix in IMAGE_SUFFIXES | UNSUPPORTED_SUFFIXES
    return tuple(folders), file, stem if stem and is_image else file


class ImageNames:
    """Finds images by the names that tables have for them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(paths)
        self._exact = set(self.paths)
        self._folded = [_fold(path) for path in self.paths]
        self._by_stem: dict[str, list[int]] = {}
        for number, (_, _, stem) in enumerate(self._folded):
            self._by_stem.setdefault(stem, []).append(number)

    def find(self, values: Iterable[str]) -> dict[str, dict[int, int]]:
        """Returns for each value that names images their numbers, and how well each agrees.

        Names agree with or without the suffix, the folders above, an absolute prefix, and without
        regard to case and to the kind of slash. Where some values are whole paths, all are. Where
        no value agrees in the folders that it has, the file's name decides, if only one image has
        it.
        """
        values = list(values)
        has_paths = any(value in self._exact and "/" in value for value in values)
        found = {value: self._matches(value, has_paths) for value in values}
        if not any(found.values()):
            by_name = {value: self._matches(value, has_paths, by_name=True) for value in values}
            found = {v: numbers for v, numbers in by_name.items() if len(numbers) == 1}
        return {value: numbers for value, numbers in found.items() if numbers}

    def _matches(self, value: str, has_paths: bool, by_name: bool = False) -> dict[int, int]:
        folders, file, stem = _fold(value)
        name = re.split(r"[/\\]", value)[-1]
        numbers = self._by_stem.get(stem, [])
        if file != stem:  # which may be the stem of file.jpg.png
            numbers = [*numbers, *self._by_stem.get(file, [])]
        agreement = {}
        for number in numbers:
            above, own_file, own_stem = self._folded[number]
            common = min(len(above), len(folders))
            is_alike = common == 0 or above[-common:] == folders[-common:]
            if has_paths:
                is_alike = above == folders
            if is_alike or by_name:
                path = self.paths[number]
                own_name = path.rpartition("/")[2]
                is_named = file in (own_file, own_stem)
                is_exact = name in (own_name, own_name.rpartition(".")[0])
                agreement[number] = 4 * (value == path) + 2 * is_named + is_exact
        best = max(agreement.values(), default=0)
        return {number: rank for number, rank in agreement.items() if rank == best}

    def nearest(self, value: str) -> str:
        """Returns the image whose name is most like a value that names none."""
        return nearest_name(value, self.paths)


def nearest_name(name: str, names: Iterable[str]) -> str:
    """Returns the name most like this one, from its neighbours in sorted order; "" if none is."""
    by_stem = {_fold(each)[2]: each for each in names}
    stems = sorted(by_stem)
    stem = _fold(name)[2]
    place = bisect.bisect(stems, stem)
    around = stems[max(place - NUM_NEIGHBOURS, 0) : place + NUM_NEIGHBOURS]
    close = difflib.get_close_matches(stem, around, n=1)
    return by_stem[close[0]] if close else ""


# ---------------------------------------------------------------------------- rows of images


@dataclass(frozen=True)
class Match:
    """The column of a table that names the images, and the images that each of its values names."""

    column: str
    found: dict[str, dict[int, int]]

    @property
    def num_images(self) -> int:
        """Returns how many images have a row."""
        return len(set(itertools.chain.from_iterable(self.found.values())))

    def contradicts(self, other: "Match", table: pd.DataFrame) -> bool:
        """Returns whether the other column names other images in some row."""
        both = table[[self.column, other.column]].drop_duplicates()
        both = both[both[self.column].isin(self.found) & both[other.column].isin(other.found)]
        pairs = zip(both[self.column], both[other.column], strict=True)
        return any(self.found[one].keys().isdisjoint(other.found[two]) for one, two in pairs)


def find_id_column(
    table: pd.DataFrame, images: ImageNames, name: str | Path, id_column: str | None = None
) -> Match:
    """Returns the column whose values name most images, or `id_column` where the table has it.

    The usual names, `path`, `image_id`, `image_name` and `isic_id`, are preferred to columns that
    match about as many. Raises ValueError if no column names an image, and if two of them name
    different images in the same row, and about as many.
    """
    columns = [column for column in USUAL_ID_COLUMNS if column in table]
    columns += [column for column in table.columns if column not in columns]
    if id_column is not None and id_column in table:
        columns = [id_column]
    matches = []
    for column in columns:
        values = [value for value in table[column].unique() if isinstance(value, str)]
        match = Match(column, images.find(values))
        if match.found:
            matches.append(match)
        if column in USUAL_ID_COLUMNS and match.num_images == len(images.paths):
            break
    if not matches:
        raise ValueError(_why_none_matches(table, columns, images, name))
    most = max(match.num_images for match in matches)
    near = [match for match in matches if match.num_images >= NEAR_TIE * most]
    usual = [match for match in near if match.column in USUAL_ID_COLUMNS]
    best, *rivals = usual or sorted(near, key=lambda match: -match.num_images)
    for rival in rivals:
        if best.contradicts(rival, table):
            raise ValueError(
                f"{printable(name)}: both {printable(best.column)} and {printable(rival.column)} "
                f"name images ({best.num_images:,} and {rival.num_images:,}), and not the same; "
                "choose one with --id_column (id_column)"
            )
    if not usual and columns != [id_column]:
        _check_plausible(best, table, images, name)
    return best


def _check_plausible(
    best: Match, table: pd.DataFrame, images: ImageNames, name: str | Path
) -> None:
    shares = (
        best.num_images / len(images.paths),
        table[best.column].isin(best.found).sum() / table[best.column].notna().sum(),
    )
    if max(shares) < MIN_SHARE_MATCHED:
        raise ValueError(
            f"{printable(name)}: no column names the images for certain; {printable(best.column)} "
            f"names {best.num_images:,} of {len(images.paths):,}; if it is meant, give it as "
            "--id_column (id_column)"
        )


def _why_none_matches(
    table: pd.DataFrame, columns: Sequence[str], images: ImageNames, name: str | Path
) -> str:
    filled = [column for column in columns if table[column].notna().any()]
    if not filled:
        return f"{printable(name)}: no row matches an image, as all its cells are empty"
    value = table[filled[0]].dropna().iloc[0]
    nearest = images.nearest(value) or images.paths[0]
    return (
        f"{printable(name)}: no row matches an image; its column {printable(filled[0])} has values "
        f"like {value!r}, but the images have names like {nearest!r}"
    )


def join_table(
    paths: Iterable[str],
    table: pd.DataFrame,
    name: str | Path,
    *,
    warn_unmatched: bool = False,
    is_correction: bool = False,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    uses: list[str] | None = None,
) -> pd.DataFrame:
    """Returns the table's row for each image, in the images' order; empty values where it has none.

    The column that names the images, see `find_id_column`, is left out; `columns` are those to
    return, by default all. `name` is what errors call the table. Rows that say the same of an image
    are one row. Raises ValueError if no row matches an image, and for rows that contradict each
    other. One line that says how much of the table was used is added to `uses`. With
    `warn_unmatched` it is a warning if rows match no image or, unless it is a correction, images
    have no row.
    """
    if len(table) == 0:
        raise ValueError(f"{printable(name)}: the table has no rows")
    images = ImageNames(paths)
    match = find_id_column(table, images, name, id_column)
    wanted = table.columns.drop(match.column) if columns is None else list(columns)
    rows, numbers = _pair_rows(table[match.column], match.found)
    found = table[wanted].iloc[rows]
    found.index = pd.Index(numbers)
    found = _unify_rows(found, images.paths, name).reindex(range(len(images.paths)))
    if uses is not None or warn_unmatched:
        use, is_complete = _describe_use(table[match.column], match, images, name, is_correction)
        if uses is not None:
            uses.append(use)
        if warn_unmatched and not is_complete:
            warnings.warn(use, stacklevel=2)
    return found.apply(_decode_cells) if len(found.columns) else found


def _describe_use(
    values: pd.Series, match: Match, images: ImageNames, name: str | Path, is_correction: bool
) -> tuple[str, bool]:
    """Returns a line that says how much of a table was used, and whether that is all."""
    is_used = values.isin(match.found)
    matched = set(itertools.chain.from_iterable(match.found.values()))
    without = [path for number, path in enumerate(images.paths) if number not in matched]
    unused = [value if isinstance(value, str) else "" for value in values[~is_used]]
    parts = [
        f"{printable(name)}: {is_used.sum():,} of its {len(values):,} rows used, for "
        f"{len(matched):,} of {len(images.paths):,} images, matched by {printable(match.column)}"
    ]
    for names, what, others in (
        (unused, "rows match no image", images.paths),
        (without, "images have no row", unused),
    ):
        if names:
            nearest = nearest_name(names[0], others)
            is_like = f" (nearest: {printable(nearest)})" if nearest else ""
            example = printable(names[0]) or "one without a name"
            parts.append(f"{len(names):,} {what}, such as {example}{is_like}")
    return "; ".join(parts), not unused and (is_correction or not without)


def _decode_cells(cells: pd.Series) -> pd.Series:
    if all(map(is_utf8, cells.unique())):
        return cells
    return cells.map(decode_latin1, na_action="ignore")


def _pair_rows(values: pd.Series, found: dict[str, dict[int, int]]) -> tuple[list[int], list[int]]:
    """Returns the number of a row and of its image for each pair that belongs together.

    Of an image's rows only those that agree best with its name are kept.
    """
    best: dict[int, int] = {}
    for numbers in found.values():
        for number, rank in numbers.items():
            best[number] = max(best.get(number, 0), rank)
    pairs = [
        (row, number)
        for row, value in enumerate(values)
        for number, rank in found.get(value, {}).items()
        if rank == best[number]
    ]
    return [row for row, _ in pairs], [number for _, number in pairs]


def _unify_rows(rows: pd.DataFrame, paths: Sequence[str], name: str | Path) -> pd.DataFrame:
    """Returns one row for each image, whose number is the index."""
    is_repeated = rows.index.duplicated(keep=False)
    if not is_repeated.any():
        return rows
    repeated = rows[is_repeated].groupby(level=0)
    for column, counts in repeated.nunique().items():
        if (counts > 1).any():
            number = counts[counts > 1].index[0]
            one, two, *_ = rows[column][number].dropna().unique()
            raise ValueError(
                f"{printable(name)}: its rows for {printable(paths[number])} contradict each "
                f"other: {printable(str(column))} is {one!r} and {two!r}; keep one of them"
            )
    return pd.concat([rows[~is_repeated], repeated.first()])
