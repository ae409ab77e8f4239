"""Files whole or not at all, locks, and tensors from untrusted files."""

import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, and renames it to `path` once the block has ended well.

    The temporary file keeps the suffix of `path`, is flushed to the disk before the rename, and is
    removed when the block raises; what stood at `path` before stays whole until then. What a
    killed process left behind for the same `path` is removed first.
    """
    path = Path(path)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` as UTF-8, whole or not at all."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: str | Path, contents: dict[str, Any]) -> None:
    """Writes a dict of tensors and plain values to `path`, whole or not at all."""
    import torch

    with write_atomically(path) as temporary:
        torch.save(contents, temporary)


def load_tensors(path: str | Path) -> Any:
    """The tensors and plain values in the file at `path`, on the CPU; no code in it is ever run.

    Raises FileNotFoundError when there is no such file, and ValueError when it is not a file of
    tensors, is damaged, or holds anything but tensors and plain values.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb"):  # a file that may not be read is no damaged file
        pass
    try:
        _check_zip(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents no closed set of errors for damaged files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a readable file of tensors ({reason})") from error


def lock(path: str | Path) -> FileLock:
    """A lock between processes, held inside `with lock(path):`; it ends with its process."""
    return FileLock(path)


def _check_zip(path: Path) -> None:
    """Raises when the bytes in a zip are not those written: torch.load checks no sums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")


def _remove_leftovers(path: Path) -> None:
    name = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.tmp" + re.escape(path.suffix))
    for sibling in path.parent.iterdir():
        match = name.fullmatch(sibling.name)
        if match and not _is_running(int(match[1])):
            sibling.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
