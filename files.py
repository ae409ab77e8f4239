"""Files whole or not at all, locks, tables in CSV, and tensors from untrusted files."""

import csv
import errno
import fcntl
import io
import json
import math
import os
import pickletools
import re
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from filelock import FileLock

if TYPE_CHECKING:
    import pandas as pd

# What torch.save names when it writes tensors and plain values. torch.load takes more, of which
# some ask for memory that no byte of the file pays for, such as bytearray(10**12).
KNOWN_NAMES = {
    "collections Counter",
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    *(
        f"torch {kind}Storage"
        for kind in (
            "BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short",
        )
    ),
}  # fmt: skip
MOST_PICKLED_BYTES = 16 * 2**20  # a checkpoint of ResNet-50 has 0.2 MB beside its tensors
MOST_VALUES = 1_000_000
DEEPEST_NESTING = 30
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
    may have them, become surrogate escapes, as in Python's own paths. Raises ValueError for a file
    that is no such table.
    """
    import pandas as pd

    # From the open file, as pandas would take some names for addresses or for archives.
    with open(path, "rb") as file:
        table = pd.read_csv(
            file,
            dtype=object,  # not str, which pyarrow, where it is installed, limits to valid UTF-8
            keep_default_na=False,
            na_values=[""],
            encoding="utf-8-sig",
            encoding_errors="surrogateescape",
        )
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("its rows have more cells than its header has names")
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


def save_tensors(path: str | Path, contents: dict[str, Any]) -> None:
    """Writes a dict of tensors and plain values to `path`, whole or not at all.

    Raises OSError, which says how many bytes are needed, when the disk does not take them.
    """
    import torch

    with write_atomically(path) as temporary:
        try:
            torch.save(contents, temporary)
        except RuntimeError as error:
            raise _reason_not_written(temporary, contents, error) from error


def load_tensors(path: str | Path) -> Any:
    """The tensors and plain values in the file at `path`, on the CPU; no code in it is ever run.

    All tensors are dense and have their bytes in the file: a small one takes little memory and
    time, whatever it claims. Their numbers may be anything, see `check_alike`.

    Raises FileNotFoundError when there is no such file, and ValueError when it is not a file of
    tensors, is damaged, or holds anything but tensors and plain values.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:  # a file that may not be read is no damaged file
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        _check_names(_pickled_in_zip(path) if is_zip else _start_of(path))
        # Mapped, a storage cannot be larger than the file; torch 2.6 would read beyond its end.
        can_be_mapped = is_zip and _is_utf8(path)
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
        _check_values(contents, path.stat().st_size)
    except Exception as error:  # torch.load documents no closed set of errors for damaged files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a readable file of tensors ({reason})") from error
    return contents


def check_alike(found: Any, expected: Any, name: str) -> None:
    """Raises ValueError, which says where, unless `found` can take the place of `expected`.

    Dicts must have the same keys and lists the same length. A tensor must have the same shape, be
    of floating point or not as the other is, and be finite; a number must be one, and finite if the
    other is. In place of None anything can be.
    """
    import torch

    if isinstance(expected, torch.Tensor):
        _check_tensor_alike(found, expected, name)
    elif isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} is no dict")
        for verb, keys in {
            "lacks": expected.keys() - found.keys(),
            "has an unknown": found.keys() - expected.keys(),
        }.items():
            if keys:
                raise ValueError(f"{name} {verb} {min(map(str, keys))[:80]}")
        for key, value in expected.items():
            check_alike(found[key], value, f"{name} {key}")
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            raise ValueError(f"{name} is no list of {len(expected)}")
        for number, pair in enumerate(zip(found, expected, strict=True)):
            check_alike(*pair, f"{name} {number}")
    elif is_number(expected):
        if not is_number(found) or (math.isfinite(expected) and not math.isfinite(found)):
            raise ValueError(f"{name} is no finite number")
    elif expected is not None and type(found) is not type(expected):
        raise ValueError(f"{name} is a {type(found).__name__}, no {type(expected).__name__}")


def is_number(value: Any) -> bool:
    """Whether this is an int or a float but NaN; a bool is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float) and not math.isnan(value)


def lock(path: str | Path) -> FileLock:
    """A lock between processes, held inside `with lock(path):`; it ends with its process."""
    return FileLock(path)


def _check_tensor_alike(found: Any, expected: Any, name: str) -> None:
    import torch

    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{name} is no tensor")
    if found.shape != expected.shape:
        raise ValueError(f"{name} is {tuple(found.shape)}, not {tuple(expected.shape)}")
    if found.is_floating_point() != expected.is_floating_point():
        raise ValueError(f"{name} is {found.dtype}, not {expected.dtype}")
    # As it will be used: what float64 holds can be too large for float32.
    if not found.to(expected.dtype).isfinite().all():
        raise ValueError(f"{name} has numbers that are not finite")


def _pickled_in_zip(path: Path) -> io.BytesIO:
    """What a file of torch.save holds beside the tensors; raises when its bytes are damaged.

    torch.load checks no sums, and inflates what torch.save would not have compressed.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which no file of tensors is")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it claims to hold more bytes than it has")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        pickles = [e for e in entries if e.filename.lower().endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip that torch.save did not write")
        if pickles[0].file_size > MOST_PICKLED_BYTES:
            raise ValueError("it holds too much beside tensors")
        return io.BytesIO(archive.read(pickles[0]))


def _start_of(path: Path) -> io.BytesIO:
    """Where a file of torch.save before version 1.6 has all that is no tensor."""
    with path.open("rb") as file:
        return io.BytesIO(file.read(MOST_PICKLED_BYTES))


def _check_names(pickled: io.BytesIO) -> None:
    """Raises when unpickling would use anything but what files of tensors need."""
    size = len(pickled.getbuffer())
    for _ in range(5):  # as many pickles stand one after the other in an old file; else it is one
        if pickled.tell() == size:
            return
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STACK_GLOBAL":
                raise ValueError("it is pickled as no file of tensors is")
            if opcode.name in ("GLOBAL", "INST") and argument not in KNOWN_NAMES:
                shown = ascii(argument.replace(" ", "."))[1:81]
                raise ValueError(f"it asks for {shown}, which no file of weights needs")


def _check_values(contents: Any, most_bytes: int) -> None:
    """Raises for what is no tensor or plain value, and for tensors larger than the file.

    A value in which others stand many times over, or itself, is as many values, or too deep.
    """
    import torch

    waiting, number = [(contents, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        number += 1
        if number > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        if depth > DEEPEST_NESTING:
            raise ValueError("its values are nested too deep")
        if isinstance(value, Mapping):
            waiting += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list | tuple):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > min(storage, most_bytes):
                raise ValueError("a tensor in it is larger than the numbers that it has for it")
        elif value is not None and not isinstance(value, bool | int | float | str):
            raise ValueError(f"it holds a {type(value).__name__}")


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # torch opens any name, but maps only files of these
        return False
    return True


def _reason_not_written(path: Path, contents: Mapping[str, Any], error: RuntimeError) -> OSError:
    """torch keeps the reason to itself; the next bytes that are written to the file tell it."""
    reason = OSError(errno.EIO, str(error).strip().split("\n")[0])
    try:
        with path.open("ab") as file:
            file.write(bytes(2**16))
    except OSError as of_disk:
        reason = of_disk
    megabytes = _num_bytes(contents) / 1e6
    return OSError(reason.errno, f"{reason.strerror}; {megabytes:,.1f} MB are needed", str(path))


def _num_bytes(contents: Any) -> int:
    """The bytes of all tensors in nested dicts."""
    if isinstance(contents, Mapping):
        return sum(map(_num_bytes, contents.values()))
    return getattr(contents, "nbytes", 0)


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
