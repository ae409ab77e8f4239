"""Files written whole or not at all, locks, and tables in CSV."""

import csv
import difflib
import errno
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from filelock import FileLock

if TYPE_CHECKING:
    import pandas as pd


DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
NO_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
TEMPORARY_NAME = re.compile(r"\..{1,20}\.[0-9a-f]{16}\.tmp(\.[^.]*)?", re.DOTALL)


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and renames it to `path` once the block has ended well.

    The temporary file keeps the suffix of `path`, has a name that no other write has, is flushed to
    the disk before the rename, and is removed when the block raises; what was at `path` before
    stays whole until then. A process that is killed leaves its temporary file behind, which
    `remove_leftovers` removes. An OSError of the temporary file names `path`.
    """
    path = Path(path)
    # Cut, as a name may have 255 bytes, and a character four of them.
    temporary = path.with_name(f".{path.stem[:20]}.{secrets.token_hex(8)}.tmp{path.suffix}")
    with _locked_folder(path.parent, fcntl.LOCK_SH) as (folder, _):  # shared by all who write there
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            os.fsync(folder)
        except OSError as error:
            # Writing to an open file gives an error without a name; so does much else in the block.
            is_of_writing = error.filename is None and error.errno in DISK_ERRORS
            if is_of_writing or str(error.filename) == str(temporary):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path) -> None:
    """Removes the temporary files that killed processes left in a folder, not below it.

    Only the holder of the folder's lock may call this: no other run writes there, on this machine
    or another. What writes there without that lock, such as a prediction whose table goes to the
    folder, has the folder itself locked, where its file system can: then nothing is removed.
    """
    with _locked_folder(Path(folder), fcntl.LOCK_EX | fcntl.LOCK_NB) as (_, nobody_writes):
        if nobody_writes:
            for path in Path(folder).iterdir():
                if TEMPORARY_NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, whole or not at all."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, contents: Any) -> None:
    """Writes plain values to `path` as JSON in UTF-8, whole or not at all.

    Bytes of a file name that are not UTF-8 are written as `\\udcXX`, which JSON readers give back.
    Raises ValueError for numbers that are not finite, which JSON does not have.
    """
    text = json.dumps(contents, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")


def read_csv(path: str | Path) -> "pd.DataFrame":
    """Reads a table in CSV, every cell as the text that it holds; an empty cell is missing (NaN).

    The file is UTF-8, with or without a byte order mark. Bytes that are not UTF-8, as file names
    may have them, become surrogate escapes, as in Python's own paths. Raises ValueError naming a
    file that is no such table.
    """
    import pandas as pd

    try:
        # From the open file, as pandas would take some names for addresses or for archives.
        with open(path, "rb") as file:
            table = pd.read_csv(
                file,
                dtype=object,  # not str, which pyarrow, if it is installed, limits to valid UTF-8
                keep_default_na=False,
                na_values=[""],
                encoding="utf-8-sig",
                encoding_errors="surrogateescape",
            )
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("some rows have more cells than the header")
    except ValueError as error:  # pandas' own errors for what cannot be parsed are ValueErrors
        raise ValueError(f"{printable(path)}: not a valid CSV table ({error})") from error
    return table


def write_csv(table: "pd.DataFrame", file: str | Path | TextIO, *, header: bool = True) -> None:
    """Writes a table as `read_csv` reads it; text is quoted, and a missing value is an empty cell.

    A path is written whole or not at all; a file should be open as `open_csv` opens it.
    """
    if isinstance(file, str | Path):
        with write_atomically(file) as temporary, open_csv(temporary) as opened:
            write_csv(table, opened, header=header)
        return
    table.to_csv(
        file,
        index=False,
        header=header,
        quoting=csv.QUOTE_NONNUMERIC,  # unquoted, a lone carriage return in a name ends the row
        lineterminator="\n",
    )


def open_csv(path: str | Path) -> TextIO:
    """Opens a file for writing a table in CSV in parts."""
    return open(path, "w", encoding="utf-8", errors="surrogateescape", newline="")


def name_column(names: Sequence[str]) -> "pd.Series":
    """Returns file names as a column of a table, whatever bytes they have."""
    import pandas as pd

    # pandas' own strings, where pyarrow is installed, hold valid UTF-8 alone.
    return pd.Series(names, dtype=None if is_utf8("".join(names)) else object)


def join_names(names: Iterable[str]) -> str:
    """Returns any number of non-empty names as one cell: `a; b`.

    A semicolon or backslash in a name gets a backslash before it, which `split_names` takes away.
    """
    return "; ".join(re.sub(r"([\\;])", r"\\\1", name) for name in names)


def split_names(cell: str) -> tuple[str, ...]:
    """Returns the names that `join_names` joined."""
    parts = re.findall(r"(?:\\.|[^\\;])+", cell, flags=re.DOTALL)
    names = [parts[0], *(part.removeprefix(" ") for part in parts[1:])] if parts else []
    return tuple(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in names)


def did_you_mean(name: str, known: Iterable[str], otherwise: str, max_names: int = 3) -> str:
    """Returns "did you mean ...?" with the known names most like this one, or else `otherwise`.

    Names that are clearly less alike than the closest one are left out.
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=max_names, cutoff=0.75)
    if not close:
        return otherwise
    likeness = [difflib.SequenceMatcher(None, each, name).ratio() for each in close]
    alike = [
        each for each, ratio in zip(close, likeness, strict=True) if ratio > likeness[0] - 0.05
    ]
    *others, last = alike
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"


def printable(path: str | Path) -> str:
    """Returns a path as it fits into one line of a message."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def is_utf8(name: str | Path) -> bool:
    """Returns whether the name of a file is valid UTF-8."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def lock(path: str | Path) -> FileLock:
    """Returns a lock between processes for `with lock(path):`; it ends with its process."""
    return FileLock(path)


@contextmanager
def _locked_folder(folder: Path, operation: int) -> Iterator[tuple[int, bool]]:
    """Gives the descriptor of a folder that is locked until the block ends, and True.

    The second is False when another process has the lock, but True where there are no such locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    is_free = True
    try:
        try:
            fcntl.flock(descriptor, operation)
        except BlockingIOError:
            is_free = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield descriptor, is_free
    finally:
        os.close(descriptor)
