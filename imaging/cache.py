"""The array of prepared images on disk, and what is known of each file."""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import PIL
from filelock import Timeout
from joblib import cpu_count
from tqdm import tqdm

from imaging import audit
from imaging.decode import UnreadableImageError, read_regular_file
from imaging.prepare import Preprocessor, decode_for, fingerprint, make_thumbnail, prepare
from storage.files import lock, printable, remove_leftovers, write_text


@dataclass(frozen=True)
class FileRecord:
    """What the build knows of one image file; its row in the array has the same number."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    content_hash: str
    width: int  # of the original, upright
    height: int
    error: str  # empty when the image could be read

    def matches(self, status: os.stat_result) -> bool:
        recorded = (self.size, self.mtime_ns, self.ctime_ns)
        return recorded == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class CacheIndex:
    """What `index.json` says of an array. An array that no index names does not exist."""

    version: str
    array: str
    thumbnails: str
    hashed_at_ns: int
    records: list[FileRecord]
    near_duplicates: pd.DataFrame  # of rows of the array, as audit.py finds them


class ArrayCache:
    """The array of one image folder at one size, after certain preprocessors, in its own folder.

    The array is written first and the index, which makes it count, last and in one piece: a build
    that is killed leaves no index that names what it left.
    """

    def __init__(
        self,
        data_dir: Path,
        cache_dir: Path,
        image_size: int,
        preprocessors: Sequence[Preprocessor],
        num_workers: int | None,
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.image_size = image_size
        self.preprocessors = preprocessors
        self.num_workers = num_workers or cpu_count()
        self.fingerprint = fingerprint(preprocessors)
        identity = f"{self.data_dir}\n{self.fingerprint}".encode("utf-8", "surrogateescape")
        code = hashlib.sha256(identity).hexdigest()[:8]
        self.folder = cache_dir / f"{self.data_dir.name}-{image_size}-{code}"
        self.version = (
            f"4, Pillow {PIL.__version__}, {image_size}, {self.fingerprint}, "
            f"near-duplicates {audit.THUMBNAIL_SIZE}, {audit.MAX_DISTANCE}"
        )

    def load(self, paths: Sequence[str]) -> CacheIndex:
        """The index of these images as they are now; the array is built when there is none."""
        index = self._current_index(paths)
        if index is None:
            with self._locked():
                index = self._current_index(paths) or self._build(paths)
        return index

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the folder, which it makes; whoever else wants to build there waits."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / ".lock", "ab"):
                pass
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; choose another folder for prepared images with --cache_dir "
                "(cache_dir)",
                printable(self.folder),
            ) from error
        with lock(self.folder / ".lock"):
            remove_leftovers(self.folder)
            yield

    def _current_index(self, paths: Sequence[str]) -> CacheIndex | None:
        """The index, if the array it names is there and made from these images as they are now."""
        index = self._read_index()
        if index is None or [record.path for record in index.records] != list(paths):
            return None
        now = time.time_ns()
        doubtful = [r for r in index.records if not self._is_surely_unchanged(r, index)]
        if not doubtful:
            return index
        # A copy, a checkout or a touch changes the times alone; only the contents decide.
        progress = tqdm(doubtful, "checking images", unit="img", disable=None, leave=False)
        refreshed = {old.path: self._refreshed(old) for old in progress}
        if any(record is None for record in refreshed.values()):
            return None
        records = [refreshed.get(r.path, r) or r for r in index.records]
        index = replace(index, hashed_at_ns=now, records=records)
        if os.access(self.folder, os.W_OK):
            self._write_refreshed_index(index)
        return index

    def _write_refreshed_index(self, index: CacheIndex) -> None:
        """Writes the index, which saves time, where nobody else is writing or may write alone."""
        with (
            contextlib.suppress(Timeout, PermissionError),
            lock(self.folder / ".lock").acquire(timeout=0),
        ):
            remove_leftovers(self.folder)
            if (self.folder / index.array).exists():  # or another process has built it anew
                self._write_index(index)

    def _is_surely_unchanged(self, record: FileRecord, index: CacheIndex) -> bool:
        try:
            status = os.stat(self.data_dir / record.path)
        except OSError:
            return False
        # File systems keep times in steps of up to two seconds: what was written just before it was
        # hashed may have been written again since, in the same step.
        settled = max(status.st_mtime_ns, status.st_ctime_ns) < index.hashed_at_ns - 2_000_000_000
        return settled and record.matches(status)

    def _refreshed(self, record: FileRecord) -> FileRecord | None:
        """The record with the file's times as they are now, or None if its contents are others."""
        try:
            contents, status = read_regular_file(self.data_dir / record.path)
        except UnreadableImageError as error:
            return record if str(error) == record.error else None
        if hashlib.sha256(contents).hexdigest() != record.content_hash:
            return None
        return replace(
            record,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
        )

    def _build(self, paths: Sequence[str]) -> CacheIndex:
        before = self._read_index()
        self._remove_arrays(but=before)
        started = time.time_ns()
        token = secrets.token_hex(8)
        array_path, thumbnails_path = (
            self.folder / f"{name}-{token}.npy" for name in ("images", "thumbnails")
        )
        try:
            records, near = self._write_arrays(array_path, thumbnails_path, paths)
            index = CacheIndex(
                self.version, array_path.name, thumbnails_path.name, started, records, near
            )
            self._write_index(index)
        except BaseException:
            array_path.unlink(missing_ok=True)
            thumbnails_path.unlink(missing_ok=True)
            raise
        self._remove_arrays(but=index)
        return index

    def _write_arrays(
        self, array_path: Path, thumbnails_path: Path, paths: Sequence[str]
    ) -> tuple[list[FileRecord], pd.DataFrame]:
        side, size = audit.THUMBNAIL_SIZE, self.image_size
        with (
            _NewArray(array_path, (len(paths), size, size, 3)) as array,
            _NewArray(thumbnails_path, (len(paths), side, side)) as thumbnails,
        ):
            records = self._write_rows(array, thumbnails, paths)
        hashes = [record.content_hash for record in records]
        with tqdm(desc="looking for near-duplicates", total=0, disable=None, leave=False):
            return records, audit.find_near_duplicates(
                np.load(thumbnails_path, mmap_mode="r"), hashes
            )

    def _write_rows(
        self, array: "_NewArray", thumbnails: "_NewArray", paths: Sequence[str]
    ) -> list[FileRecord]:
        write_row = functools.partial(self._write_row, array, thumbnails, paths)
        pool = ThreadPoolExecutor(self.num_workers)
        try:
            progress = tqdm(
                total=len(paths), desc="preparing images", unit="img", disable=None, leave=False
            )
            records = []
            with progress:
                # A part at a time, or the tasks that wait would fill the memory.
                for start in range(0, len(paths), 1024):
                    for record in pool.map(write_row, range(start, min(start + 1024, len(paths)))):
                        records.append(record)
                        progress.update()
        finally:
            pool.shutdown(cancel_futures=True)
        return records

    def _write_row(
        self, array: "_NewArray", thumbnails: "_NewArray", paths: Sequence[str], row: int
    ) -> FileRecord:
        path = paths[row]
        contents, size, mtime_ns, ctime_ns = b"", 0, 0, 0
        try:
            contents, status = read_regular_file(self.data_dir / path)
            size, mtime_ns, ctime_ns = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            image, (width, height) = decode_for(contents, self.image_size, self.preprocessors)
            problem = ""
        except UnreadableImageError as error:
            width, height, problem = 0, 0, str(error)
        else:
            array[row] = prepare(image, self.image_size, self.preprocessors, path)
            thumbnails[row] = make_thumbnail(image)
        content_hash = hashlib.sha256(contents).hexdigest()
        return FileRecord(path, size, mtime_ns, ctime_ns, content_hash, width, height, problem)

    def _read_index(self) -> CacheIndex | None:
        try:
            contents = json.loads((self.folder / "index.json").read_text(encoding="ascii"))
            columns = contents.pop("records")
            records = [FileRecord(*row) for row in zip(*columns, strict=True)]
            near = pd.DataFrame(contents.pop("near_duplicates"))
            index = CacheIndex(records=records, near_duplicates=near, **contents)
            array = np.load(self.folder / index.array, mmap_mode="r")
            thumbnails = self.thumbnails(index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # none there, or none of ours: the array is made anew
        expected = {
            (len(records), self.image_size, self.image_size, 3): array,
            (len(records), audit.THUMBNAIL_SIZE, audit.THUMBNAIL_SIZE): thumbnails,
        }
        fits = all(a.shape == shape and a.dtype == np.uint8 for shape, a in expected.items())
        return index if fits and index.version == self.version else None

    def thumbnails(self, index: CacheIndex) -> np.ndarray:
        return np.load(self.folder / index.thumbnails, mmap_mode="r")

    def _write_index(self, index: CacheIndex) -> None:
        names = [field.name for field in fields(FileRecord)]
        columns = [[getattr(record, name) for record in index.records] for name in names]
        contents = {
            "version": index.version,
            "array": index.array,
            "thumbnails": index.thumbnails,
            "hashed_at_ns": index.hashed_at_ns,
            "records": columns,
            "near_duplicates": index.near_duplicates.to_dict("list"),
        }
        write_text(self.folder / "index.json", json.dumps(contents))

    def _remove_arrays(self, but: CacheIndex | None) -> None:
        kept = (but.array, but.thumbnails) if but else ()
        for path in self.folder.glob("*-*.npy"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


class _NewArray:
    """A uint8 array in a new .npy file, filled a row at a time by any thread, in any order.

    The space on disk is reserved first. Rows are written, not mapped: where a file system has
    promised too much, that is an OSError, and not a signal that kills the process.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._path = path
        self._num_bytes = math.prod(shape)
        self._row_bytes = math.prod(shape[1:])
        self._lock = threading.Lock()
        with self._errors_that_say_what_is_needed():
            self._file = open(path, "wb")  # noqa: SIM115, closed by the `with` that this is for
            try:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(self._file, header)
                self._file.flush()
                self._start = self._file.tell()
                _reserve(self._file, self._num_bytes)
            except BaseException:
                self._file.close()
                raise

    def __setitem__(self, row: int, values: np.ndarray) -> None:
        contents = np.ascontiguousarray(values, dtype=np.uint8).tobytes()
        if len(contents) != self._row_bytes:
            raise ValueError(f"a row of {len(contents)} bytes where {self._row_bytes} belong")
        with self._lock, self._errors_that_say_what_is_needed():
            self._file.seek(self._start + row * self._row_bytes)
            self._file.write(contents)

    def __enter__(self) -> "_NewArray":
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        with self._errors_that_say_what_is_needed(), self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    @contextmanager
    def _errors_that_say_what_is_needed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; {self._num_bytes / 1e6:,.1f} MB are needed, elsewhere with "
                "--cache_dir (cache_dir)",
                str(self._path),
            ) from error


def _reserve(file: BinaryIO, num_bytes: int) -> None:
    """Makes a file longer by so many zeros, for which the disk has room."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), file.tell(), num_bytes)
            return
        except OSError as error:
            # From C libraries that do not, as glibc does, write zeros where the file system cannot.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    zeros = bytes(2**20)
    for start in range(0, num_bytes, len(zeros)):
        file.write(zeros[: num_bytes - start])
    file.flush()
