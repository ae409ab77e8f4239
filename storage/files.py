"""Files whole or not at all, locks, and tables in CSV."""

import csv
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
    the disk before the rename, and is removed when the block raises; what stood at `path` before
    stays whole until then. A process that is killed leaves its temporary file behind, which
    `remove_leftovers` removes. An OSError of the temporary file names `path`.
    """
    path = Path(path)
    # Cut, as a name may have 255 bytes, and a character four of them.
    temporary = path.with_name(f".{path.stem[:20]}.{secrets.token_hex(8)}.tmp{path.suffix}")
    with _opened_folder(path.parent) as folder:
        _try_to_lock(folder, fcntl.LOCK_SH)  # shared by all who write there
        try:
            yield temporary
            _flush_to_disk(temporary)
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
    folder, has the folder itself locked: while it writes, nothing is removed. (That second lock is
    one that not every network file system has; there, the first must do.)
    """
    with _opened_folder(Path(folder)) as descriptor:
        if _try_to_lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for path in Path(folder).iterdir():
                if TEMPORARY_NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, whole or not at all."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, contents: Any) -> None:
    """Writes plain values to `path` as JSON in UTF-8, whole or not at all.

    The bytes of a file name that are not UTF-8 are written as `\\udcXX`, which JSON gives back.
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
            raise ValueError("its rows have more cells than its header has names")
    except ValueError as error:  # pandas' own errors for what cannot be parsed are ValueErrors
        raise ValueError(f"{printable(path)}: not a table in CSV ({error})") from error
    return table


def write_csv(table: "pd.DataFrame", file: str | Path | TextIO, *, header: bool = True) -> None:
    """Writes a table as `read_csv` reads it; text is quoted, and a missing value is an empty cell.

    To a path, whole or not at all; or its rows to a file that was opened as `open_csv` opens it.
    """
    if isinstance(file, str | Path):
        with write_atomically(file) as temporary, open_csv(temporary) as opened:
            write_csv(table, opened, header=header)
        return
    # Unquoted, a lone carriage return in a name would end the row.
    quoting = csv.QUOTE_NONNUMERIC
    table.to_csv(file, index=False, header=header, quoting=quoting, lineterminator="\n")


def open_csv(path: str | Path) -> TextIO:
    """Opens a file for writing a table in CSV in parts."""
    return open(path, "w", encoding="utf-8", errors="surrogateescape", newline="")


def name_column(names: Sequence[str]) -> "pd.Series":
    """Returns names of files as a column of a table, whatever bytes they have."""
    import pandas as pd

    try:
        "".join(names).encode()
    except UnicodeEncodeError:  # which pandas' own strings do not hold where pyarrow is installed
        return pd.Series(names, dtype=object)
    return pd.Series(names)


def join_names(names: Iterable[str]) -> str:
    """Joins any number of names that are not empty in one cell: `a; b`.

    A semicolon or backslash in a name gets a backslash before it, so that `split_names` can undo
    it.
    """
    return "; ".join(re.sub(r"([\\;])", r"\\\1", name) for name in names)


def split_names(cell: str) -> tuple[str, ...]:
    """Returns the names that `join_names` joined."""
    parts = re.findall(r"(?:\\.|[^\\;])+", cell, flags=re.DOTALL)
    names = [parts[0], *(part.removeprefix(" ") for part in parts[1:])] if parts else []
    return tuple(re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL) for name in names)


def printable(path: str | Path) -> str:
    """A path as it fits into one line of a message."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def lock(path: str | Path) -> FileLock:
    """A lock between processes, held inside `with lock(path):`; it ends with its process."""
    return FileLock(path)


def is_utf8(path: Path) -> bool:
    """Returns whether the name of a file can be written as UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # torch opens any name, but maps only files of these
        return False
    return True


@contextmanager
def _opened_folder(folder: Path) -> Iterator[int]:
    """Gives a descriptor of a folder; a lock on it ends with the block."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int, operation: int) -> bool:
    """Returns False when another process has the lock; True too where there are no such locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
