"""The array of prepared images on disk, and what is known of each file."""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import PIL
from filelock import Timeout
from joblib import cpu_count

from imaging import audit
from imaging.decode import UnreadableImageError, decode, read_regular_file
from imaging.prepare import Preprocessor, fingerprint, make_thumbnail, needed_side, prepare
from imaging.sources import Images
from storage.files import lock, printable, remove_leftovers, write_text
from storage.progress import ProgressBar

CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
WriteRow = Callable[[int, np.ndarray], None]


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

    def with_state(self, status: os.stat_result) -> "FileRecord":
        """Returns the record of the same image in a file of this size and these times."""
        mtime, ctime = status.st_mtime_ns, status.st_ctime_ns
        return replace(self, size=status.st_size, mtime_ns=mtime, ctime_ns=ctime)


@dataclass(frozen=True)
class CacheIndex:
    """What `index.json` says of an array. An array that no index names does not exist."""

    version: str
    array: str
    thumbnails: str
    hashed_at_ns: int
    records: list[FileRecord]
    near_duplicates: pd.DataFrame  # of rows of the array, as audit.py finds them

    def check_readable(self, *, skip_unreadable: bool) -> np.ndarray:
        """Returns whether each image could be read (N,).

        Raises UnreadableImageError, which names all that could not, unless they are to be skipped,
        which is a warning.
        """
        unreadable = [record for record in self.records if record.error]
        if unreadable:
            names = ", ".join(f"{printable(r.path)} ({r.error})" for r in unreadable)
            summary = f"{len(unreadable)} of {len(self.records)} images cannot be read"
            if not skip_unreadable:
                raise UnreadableImageError(
                    f"{summary}: {names}; repair or remove them, or skip them with "
                    "--skip_unreadable (skip_unreadable=True)"
                )
            warnings.warn(f"{summary} and are skipped: {names}", stacklevel=3)
        return np.array([not record.error for record in self.records])


@dataclass(eq=False)
class ArrayCache:
    """The array of one image folder at one size, after certain preprocessors, in its own folder.

    The array is written first and the index, which makes it count, last and in one piece: a build
    that is killed leaves no index that names what it left.
    """

    data_dir: Path
    cache_dir: Path
    image_size: int
    preprocessors: Sequence[Preprocessor]
    num_workers: int | None

    def __post_init__(self) -> None:
        self.data_dir = self.data_dir.resolve()
        self.fingerprint = fingerprint(self.preprocessors)
        identity = f"{self.data_dir}\n{self.fingerprint}".encode("utf-8", "surrogateescape")
        code = hashlib.sha256(identity).hexdigest()[:8]
        self.folder = self.cache_dir / f"{self.data_dir.name}-{self.image_size}-{code}"
        self.version = (
            f"4, Pillow {PIL.__version__}, {self.image_size}, {self.fingerprint}, "
            f"near-duplicates {audit.THUMBNAIL_SIZE}, {audit.MAX_DISTANCE}"
        )

    def load(self, paths: Sequence[str]) -> CacheIndex:
        """Returns the index of these images as they are now; builds the array where it must."""
        index = self._current_index(paths)
        if index is None:
            with self._locked():
                index = self._current_index(paths) or self._build(paths)
        return index

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Makes the folder and locks it; another process that wants to build there waits."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".lock").touch()
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
        """Returns the index if its array is there and made from these images as they are now."""
        index = self._read_index()
        if index is None or [record.path for record in index.records] != list(paths):
            return None
        now = time.time_ns()
        records = index.records
        doubtful = [i for i, r in enumerate(records) if not self._is_surely_unchanged(r, index)]
        # A copy, a checkout or a touch changes the times alone; only the contents decide.
        for row in ProgressBar(doubtful, "checking images", unit="img"):
            record = self._refreshed(records[row])
            if record is None:
                return None
            records[row] = record
        if doubtful:
            index = replace(index, hashed_at_ns=now)
            self._write_refreshed_index(index)
        return index

    def _write_refreshed_index(self, index: CacheIndex) -> None:
        """Writes the index, which saves time, where nobody else is writing or may write alone."""
        if not os.access(self.folder, os.W_OK):
            return
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
        return settled and record == record.with_state(status)

    def _refreshed(self, record: FileRecord) -> FileRecord | None:
        """Returns the record with the file's times as they are now, None for other contents."""
        try:
            contents, status = read_regular_file(self.data_dir / record.path)
        except UnreadableImageError as error:
            return record if str(error) == record.error else None
        is_same = hashlib.sha256(contents).hexdigest() == record.content_hash
        return record.with_state(status) if is_same else None

    def _build(self, paths: Sequence[str]) -> CacheIndex:
        current, started, token = self._read_index(), time.time_ns(), secrets.token_hex(8)
        try:
            self._remove_arrays(but=current)
            names = f"images-{token}.npy", f"thumbnails-{token}.npy"
            records = self._write_arrays(*names, paths)
            thumbnails = np.load(self.folder / names[1], mmap_mode="r")
            with ProgressBar(name="looking for near-duplicates", bar_format="{desc}"):
                near = audit.find_near_duplicates(thumbnails, [r.content_hash for r in records])
            index = CacheIndex(self.version, *names, started, records, near)
            self._write_index(index)
            current = index
        finally:
            self._remove_arrays(but=current)
        return index

    def _write_arrays(self, images: str, thumbnails: str, paths: Sequence[str]) -> list[FileRecord]:
        shapes = self._shapes(len(paths))
        pool = ThreadPoolExecutor(self.num_workers or cpu_count())
        try:
            with (
                new_array(self.folder / images, shapes[0]) as write_image,
                new_array(self.folder / thumbnails, shapes[1]) as write_thumbnail,
            ):
                write_row = functools.partial(self._write_row, write_image, write_thumbnail)
                # A part at a time, or the tasks that wait would fill the memory.
                done = itertools.chain.from_iterable(
                    pool.map(write_row, itertools.count(start), paths[start : start + 1024])
                    for start in range(0, len(paths), 1024)
                )
                bar = ProgressBar(done, "preparing images", len(paths), unit="img")
                try:
                    return list(bar)
                finally:
                    pool.shutdown(cancel_futures=True)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; {sum(map(math.prod, shapes)) / 1e6:,.1f} MB are needed; "
                "choose another folder with --cache_dir (cache_dir)",
                str(self.folder / images),
            ) from error

    def _write_row(
        self, write_image: WriteRow, write_thumbnail: WriteRow, row: int, path: str
    ) -> FileRecord:
        record = FileRecord(path, 0, 0, 0, hashlib.sha256().hexdigest(), 0, 0, "")
        try:
            contents, status = read_regular_file(self.data_dir / path)
            content_hash = hashlib.sha256(contents).hexdigest()
            record = replace(record.with_state(status), content_hash=content_hash)
            image, size = decode(contents, needed_side(self.image_size, self.preprocessors))
        except UnreadableImageError as error:
            return replace(record, error=str(error))
        write_image(row, prepare(image, self.image_size, self.preprocessors, path))
        write_thumbnail(row, make_thumbnail(image))
        return replace(record, width=size[0], height=size[1])

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
        fits = (array.shape, thumbnails.shape) == self._shapes(len(records))
        fits = fits and array.dtype == thumbnails.dtype == np.uint8
        return index if fits and index.version == self.version else None

    def thumbnails(self, index: CacheIndex) -> np.ndarray:
        """Returns the images' thumbnails as `audit` compares them, uint8, a row an image."""
        return np.load(self.folder / index.thumbnails, mmap_mode="r")

    def _shapes(self, num_images: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        side, size = self.image_size, audit.THUMBNAIL_SIZE
        return (num_images, side, side, 3), (num_images, size, size)

    def _write_index(self, index: CacheIndex) -> None:
        columns = [*zip(*(vars(record).values() for record in index.records), strict=True)]
        near = index.near_duplicates.to_dict("list")
        contents = vars(index) | {"records": columns, "near_duplicates": near}
        write_text(self.folder / "index.json", json.dumps(contents))

    def _remove_arrays(self, but: CacheIndex | None) -> None:
        kept = (but.array, but.thumbnails) if but else ()
        for path in self.folder.glob("*-*.npy"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


class PreparedImages(NamedTuple):
    """The images of a folder as they were when `DatasetBuilder.prepare` read them."""

    metadata: pd.DataFrame  # a row an image: path, class, content_hash, ..., picture
    given: pd.DataFrame  # the columns of the folder's reader and of metadata_csv
    cache: ArrayCache
    cache_index: CacheIndex
    images: Images  # as they were found, before their files were read


@contextmanager
def new_array(path: Path, shape: tuple[int, ...]) -> Iterator[WriteRow]:
    """Gives a function that writes a row of a new uint8 .npy file, from any thread, in any order.

    The space on disk is reserved first, where the file system can. Rows are written, not mapped:
    where it has promised too much, that is an OSError, not a signal that kills the process.
    """
    start = np.lib.format.open_memmap(path, "w+", np.uint8, shape=shape).offset  # all zeros
    writing = threading.Lock()
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in CANNOT_RESERVE:
                raise

        def write_row(row: int, values: np.ndarray) -> None:
            with writing:
                file.seek(start + row * values.nbytes)
                file.write(values.tobytes())

        yield write_row
        file.flush()
        os.fsync(file.fileno())
