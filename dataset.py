"""Image folders → metadata → memory-mapped arrays → stratified splits → loaders."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import random
import re
import secrets
import signal
import sys
import sysconfig
import threading
import time
import types
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import PIL
import torch
from filelock import Timeout
from joblib import cpu_count
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from augmentation import Views, apply_views, draw_views
from imaging import audit
from imaging.decode import UnreadableImageError, decode, read_regular_file, scaled_size
from storage.files import lock, read_csv, remove_leftovers, write_text

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
UNSUPPORTED_SUFFIXES = {".gif", ".heic", ".heif", ".avif"}  # named, as they are pictures too
DEFAULT_SPLITS = {"train": 0.70, "valid": 0.20, "test": 0.10}
STEM_COLUMNS = ("image_id", "image_name", "isic_id")  # HAM10000's, the 2020 challenge's, ISIC's
METADATA_COLUMNS = (
    "path",
    "class",
    "label",
    "source_split",
    "width",
    "height",
    "content_hash",
    "picture",
    "group",
    "split",
)
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "test": "test",
    "testing": "test",
}
SHARE_OF_GPU_FOR_IMAGES = 0.25  # of its free memory, for each split
EVALUATION_BATCHES = 4  # times as many images a batch, on GPUs, where nothing is trained
MAX_REPETITIONS = 25  # of each probe image, to notice a preprocessor that is random
SECONDS_OF_PROBING = 0.5  # after which a slow one is believed
MOST_REPEATS = 10  # how much oftener than by plain shuffling balanced sampling may show an image

Preprocessor = Callable[[np.ndarray], np.ndarray]


# ---------------------------------------------------------------------------- single images


def read_image(path: str | Path, longest_side: int | None = None) -> np.ndarray:
    """The image in a file as a viewer shows it: uint8 RGB `(height, width, 3)`.

    EXIF orientation is applied, transparency laid over white, 16 bits reduced to 8; an image with a
    side above `longest_side` is scaled down to it. Raises UnreadableImageError naming the file.
    """
    try:
        image = decode(read_regular_file(path)[0])[0]
        if longest_side is not None:
            image.thumbnail((longest_side, longest_side))
        return np.array(image)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{_shown(path)}: {error}") from error


def prepare_image(
    path: str | Path, image_size: int = 224, preprocessors: Sequence[Preprocessor] = ()
) -> np.ndarray:
    """The image in a file as the models see it: uint8 RGB `(image_size, image_size, 3)`.

    Read as by `read_image`, through the preprocessors, shorter side to `round(image_size * 256 /
    224)`, centre crop: what `DatasetBuilder` keeps of it. Raises UnreadableImageError naming the
    file, and ValueError naming a preprocessor that gives no image.
    """
    try:
        image, _ = _decode_for(read_regular_file(path)[0], image_size, preprocessors)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{_shown(path)}: {error}") from error
    return _prepare(image, image_size, preprocessors, path)


def resize(image: np.ndarray, size: int = 256) -> np.ndarray:
    """Scales a uint8 RGB image `(h, w, 3)` to a shorter side of `size`, the aspect ratio kept."""
    height, width = image.shape[:2]
    scaled = scaled_size(width, height, size)
    return np.array(Image.fromarray(image).resize(scaled, Image.Resampling.BILINEAR))


def center_crop(image: np.ndarray, size: int = 224) -> np.ndarray:
    """The middle of an image `(h, w, 3)`, `size` on each side or the whole side if that is less."""
    height, width = image.shape[:2]
    top, left = round(max(height - size, 0) / 2), round(max(width - size, 0) / 2)
    return image[top : top + size, left : left + size]


def normalize(image: np.ndarray) -> np.ndarray:
    """A uint8 image as float32 in [0, 1], x / 255."""
    return image.astype(np.float32) / 255


def _shorter_side(image_size: int) -> int:
    return round(image_size * 256 / 224)


def _fit(image: Image.Image, image_size: int) -> Image.Image:
    """Shorter side to `round(image_size * 256 / 224)`, centre crop `image_size`, in one resampling.

    What torchvision's Resize and CenterCrop make of a PIL image, to within one of 255 levels, but
    only the pixels that stay are computed.
    """
    width, height = image.size
    scaled_width, scaled_height = scaled_size(width, height, _shorter_side(image_size))
    left, top = round((scaled_width - image_size) / 2), round((scaled_height - image_size) / 2)
    x, y = width / scaled_width, height / scaled_height
    box = (left * x, top * y, (left + image_size) * x, (top + image_size) * y)
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)


def _thumbnail(image: Image.Image) -> np.ndarray:
    """The whole image as `audit` compares it, whatever its shape: grey, uint8."""
    size = (audit.THUMBNAIL_SIZE, audit.THUMBNAIL_SIZE)
    return np.asarray(image.resize(size, Image.Resampling.BOX).convert("L"))


def _decode_for(
    contents: bytes, image_size: int, preprocessors: Sequence[Preprocessor]
) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`: for a preprocessor the original, without one no more than is needed."""
    needed = max(_shorter_side(image_size), 2 * audit.THUMBNAIL_SIZE)
    return decode(contents, None if preprocessors else needed)


def _prepare(
    image: Image.Image, image_size: int, preprocessors: Sequence[Preprocessor], path: str | Path
) -> np.ndarray:
    if preprocessors:
        try:
            image = Image.fromarray(_preprocess(np.array(image), preprocessors))
        except ValueError as error:
            raise ValueError(f"{error} (on {_shown(path)})") from error
    return np.asarray(_fit(image, image_size))


def _shown(path: str | Path) -> str:
    """A path as it fits into one line of a message."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


# ---------------------------------------------------------------------------- preprocessors


def fingerprint(preprocessors: Sequence[Preprocessor]) -> str:
    """What tells these preprocessors from others, 16 hex digits; empty for none.

    Made from their code, constants, defaults, closures and the module's functions and values that
    they use, and from what they make of a few probe images. Raises ValueError naming one that makes
    something else of the same image another time.
    """
    if not preprocessors:
        return ""
    digest = hashlib.sha256()
    probes = list(_probe_images())
    for preprocessor in preprocessors:
        results = [_probe(preprocessor, probe) for probe in probes]
        # Described after it has run: what it keeps from its first call on belongs to it.
        digest.update(_describe(preprocessor, {}).encode("utf-8", "surrogateescape"))
        for result in results:
            digest.update(result)
        _check_repeatable(preprocessor, probes, results)
    return digest.hexdigest()[:16]


def _check_repeatable(
    preprocessor: Preprocessor, probes: Sequence[np.ndarray], results: Sequence[bytes]
) -> None:
    """Raises ValueError unless the preprocessor gives these results again, and again.

    What draws from the global generators without seeding them is noticed even where the results
    happen to be the same.
    """
    state = _global_random_state()
    end = time.monotonic() + SECONDS_OF_PROBING
    for _ in range(MAX_REPETITIONS):
        again = [_probe(preprocessor, probe) for probe in probes]
        if again != results or _global_random_state() != state:
            raise ValueError(
                f"preprocessor {_name_of(preprocessor)} does not make the same of the same image "
                "every time (randomness, time, or something kept from call to call); what it makes "
                "is kept on disk and must come out the same for new images: leave randomness to "
                "the augmentation, or start a generator from a fixed seed in each call"
            )
        if time.monotonic() > end:
            return


def _global_random_state() -> tuple[Any, ...]:
    numpy_state = str(np.random.get_state(legacy=False))
    return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()


def _probe_images() -> Iterator[np.ndarray]:
    rows, columns = np.mgrid[0:48, 0:64]
    yield np.stack([rows * 5, columns * 4, rows + columns], axis=-1).astype(np.uint8)
    yield np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)


def _probe(preprocessor: Preprocessor, image: np.ndarray) -> bytes:
    try:
        result = np.asarray(preprocessor(image.copy()))
    except Exception as error:  # a user's code: that it refuses a probe tells it apart as well
        return type(error).__name__.encode()
    if result.dtype.hasobject:  # no image; its bytes would be addresses, other ones in each run
        return f"{result.dtype}{result.shape}".encode()
    return f"{result.dtype}{result.shape}".encode() + result.tobytes()


def _name_of(preprocessor: Preprocessor) -> str:
    while isinstance(preprocessor, functools.partial):
        preprocessor = preprocessor.func
    return getattr(preprocessor, "__name__", type(preprocessor).__name__)


def _describe(value: Any, seen: dict[int, Any]) -> str:
    """A text that changes when what the value does changes, and not from run to run."""

    def describe_all(values: Any) -> str:
        return "[" + ", ".join(_describe(v, seen) for v in values) + "]"

    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.hasobject:
            return f"{value.dtype}{value.shape}{_describe(value.tolist(), seen)}"
        return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if id(value) in seen:
        return "again"
    seen[id(value)] = value  # keeps it alive, or a later value might get its number
    if isinstance(value, types.ModuleType):
        return _describe_module(value)
    if isinstance(value, list | tuple):
        return describe_all(value)
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(_describe(v, dict(seen)) for v in value)) + "}"
    if isinstance(value, dict):  # which may have been made from a set
        return describe_all(sorted(value.items(), key=lambda i: _describe(i[0], dict(seen))))
    if isinstance(value, functools.partial):
        keywords = list(value.keywords.items())
        return "partial" + describe_all([value.func, value.args, keywords])
    if isinstance(value, types.MethodType):
        return "method" + describe_all([value.__func__, value.__self__])
    if isinstance(value, classmethod | staticmethod):
        return type(value).__name__ + _describe(value.__func__, seen)
    if isinstance(value, property):
        return "property" + describe_all([value.fget])
    if isinstance(value, types.CodeType):
        return f"{value.co_code.hex()} {value.co_names}" + describe_all(value.co_consts)
    if isinstance(value, types.FunctionType):
        return _describe_function(value, describe_all)
    if isinstance(value, types.BuiltinFunctionType | np.ufunc):
        return repr(value.__name__)
    if isinstance(value, type):
        return _describe_class(value, describe_all)
    if isinstance(value, logging.Logger):  # has all the loggers of the process among its attributes
        return f"logger {value.name!r}"
    if hasattr(value, "__dict__"):
        return "object" + describe_all([type(value), list(vars(value).items())])
    # The default text of an object is its address, which changes from run to run.
    if type(value).__repr__ is object.__repr__:
        return repr(type(value))
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _describe_module(module: types.ModuleType) -> str:
    filename = getattr(module, "__file__", None)
    if filename is None or _is_installed(filename):
        return module.__name__
    return module.__name__ + hashlib.sha256(Path(filename).read_bytes()).hexdigest()


def _describe_class(kind: type, describe_all: Callable[[Any], str]) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    module = sys.modules.get(kind.__module__)
    if kind.__module__ == "builtins" or _is_installed(getattr(module, "__file__", None) or ""):
        return name
    behaviour = types.FunctionType | classmethod | staticmethod | property
    own = {
        member: value
        for member, value in sorted(vars(kind).items())
        if isinstance(value, behaviour) or not member.startswith("__")
    }
    return name + describe_all([own, kind.__bases__])


def _describe_function(function: types.FunctionType, describe_all: Callable[[Any], str]) -> str:
    if _is_installed(function.__code__.co_filename):
        return f"{function.__module__}.{function.__qualname__}"
    names = _names_used(function.__code__)
    used = {n: function.__globals__[n] for n in names if n in function.__globals__}
    enclosed = []
    for cell in function.__closure__ or ():
        try:
            enclosed.append(cell.cell_contents)
        except ValueError:  # a variable that is not bound yet
            enclosed.append("unbound")
    keywords = function.__kwdefaults__ and list(function.__kwdefaults__.items())
    return "function" + describe_all(
        [function.__code__, function.__defaults__, keywords, enclosed, used]
    )


def _names_used(code: types.CodeType) -> list[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_names_used(constant))
    return sorted(names)


def _is_installed(filename: str) -> bool:
    paths = sysconfig.get_paths()
    return filename.startswith(tuple(paths[kind] for kind in ("stdlib", "purelib", "platlib")))


def _preprocess(image: np.ndarray, preprocessors: Sequence[Preprocessor]) -> np.ndarray:
    for preprocessor in preprocessors:
        name = _name_of(preprocessor)
        try:
            result = preprocessor(image)
        except Exception as error:
            raise ValueError(f"preprocessor {name}: {type(error).__name__}: {error}") from error
        image = _as_uint8(result, name)
    return image


def _as_uint8(image: Any, name: str) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"preprocessor {name} gave shape {image.shape}; it must be (h, w, 3)")
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"preprocessor {name} gave {image.dtype}; it must be uint8 or float")
    # Interpolation may leave [0, 1] by a rounding error; anything beyond that is another range.
    if not (image.min() >= -1e-3 and image.max() <= 1 + 1e-3):
        low, high = image.min(), image.max()
        raise ValueError(f"preprocessor {name} gave values from {low} to {high}; not in [0, 1]")
    return np.round(image.clip(0, 1) * 255).astype(np.uint8)


# ---------------------------------------------------------------------------- image folders


def find_images(data_dir: str | Path, *, has_class_folders: bool = True) -> pd.DataFrame:
    """The images below a folder, a row each: `path`, `class`, `source_split`, sorted by path.

    `path` is relative to `data_dir` with forward slashes, `class` the parent folder's name, and
    `source_split` what lies above that. Without class folders there is no `class`, and
    `source_split` is all that lies above the image. Hidden files and folders are passed over, links
    followed. What has an image's name but is none, or of a format that is not supported, has its
    row too: whoever reads it hears of it.

    Raises FileNotFoundError for no such folder; ValueError for no images, and where there are class
    folders for images that stand directly in `data_dir` and for fewer than two classes.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"{_shown(data_dir)}: no such folder")
    paths = sorted(path.relative_to(data_dir).as_posix() for path in _walk(data_dir, frozenset()))
    if not paths:
        raise ValueError(
            f"{_shown(data_dir)}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}); the layout is "
            "one sub-folder a class"
        )
    parents = [path.split("/")[:-1] for path in paths]
    if not has_class_folders:
        source_splits = ["/".join(parent) for parent in parents]
        return pd.DataFrame({"path": paths, "source_split": source_splits}, dtype=object)
    if not all(parents):
        stray = paths[parents.index([])]
        raise ValueError(
            f"{_shown(data_dir)}: {_shown(stray)} stands directly in it; the layout is one "
            "sub-folder a class"
        )
    # One system writes é as one character, another as e and an accent: it is the same class.
    classes = [unicodedata.normalize("NFC", parent[-1]) for parent in parents]
    unwritable = [name for name in classes if not _is_unicode(name)]
    if unwritable:
        raise ValueError(
            f"{_shown(data_dir)}: the name of the class folder {_shown(unwritable[0])} is not "
            "valid UTF-8; rename it"
        )
    if len(set(classes)) < 2:
        raise ValueError(
            f"{_shown(data_dir)}: all images are of one class, {_shown(classes[0])}; a classifier "
            "needs two or more"
        )
    source_splits = ["/".join(parent[:-1]) for parent in parents]
    # As str, pandas with pyarrow could not hold names that are not valid UTF-8.
    return pd.DataFrame(
        {"path": paths, "class": classes, "source_split": source_splits}, dtype=object
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _walk(folder: Path, ancestors: frozenset[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a folder that it lies in
        return
    for name in os.listdir(folder):
        path = folder / name
        if name.startswith("."):
            continue
        is_named_like_an_image = path.suffix.lower() in IMAGE_SUFFIXES | UNSUPPORTED_SUFFIXES
        if os.path.isdir(path):
            inside = list(_walk(path, ancestors | {identity}))
            yield from inside or ([path] if is_named_like_an_image else [])
        elif is_named_like_an_image:
            yield path


# ---------------------------------------------------------------------------- the user's tables


def read_table(path: str | Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file with a row an image, which it names in `path` or in one of `STEM_COLUMNS`.

    All cells are text, whatever they look like, and only empty ones are missing, see `read_csv`.

    Raises FileNotFoundError for no such file, and ValueError for a file that is no such table or
    lacks one of `columns`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{_shown(path)}: no such file")
    try:
        table = read_csv(path)
    except ValueError as error:  # pandas' own errors for what cannot be parsed are ValueErrors
        raise ValueError(f"{_shown(path)}: not a table in CSV ({error})") from error
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(
            f"{_shown(path)}: no column {', '.join(missing)}; it has "
            f"{', '.join(map(_shown, table.columns))}"
        )
    return table


def join_table(paths: Sequence[str], table: pd.DataFrame, name: str | Path) -> pd.DataFrame:
    """The table's row for each image, in the images' order; empty values where it has none.

    Images are found by `path`, relative to the data's folder, or else by the file's name without
    its suffix in one of `STEM_COLUMNS`. `name` is what errors call the table. Raises ValueError
    when the table names no images, names one twice, or names none of these.
    """
    keys = [column for column in ("path", *STEM_COLUMNS) if column in table]
    if not keys:
        raise ValueError(
            f"{_shown(name)}: no column {', '.join(('path', *STEM_COLUMNS))} to know the images by"
        )
    wanted = pd.Index(paths)
    if keys[0] != "path":
        wanted = pd.Index([PurePosixPath(path).stem for path in paths])
    if len(table) == 0:
        raise ValueError(f"{_shown(name)}: has no rows")
    rows = table.set_index(keys[0])
    found = rows[rows.index.isin(wanted)]
    if len(found) == 0:
        raise ValueError(
            f"{_shown(name)}: matches no image; its {keys[0]} are like {rows.index[0]!r}, those of "
            f"the images like {wanted[0]!r}"
        )
    if found.index.has_duplicates:
        twice = found.index[found.index.duplicated()][0]
        raise ValueError(f"{_shown(name)}: has more than one row for {_shown(twice)}")
    return found.reindex(wanted).reset_index(drop=True)


def _check_unicode(values: pd.Series, name: str | Path) -> None:
    """Raises ValueError for names of classes or splits that no figure could show."""
    unwritable = values[~values.map(_is_unicode).astype(bool)]
    if len(unwritable) > 0:
        raise ValueError(
            f"{_shown(name)}: {_shown(unwritable.iloc[0])} is not valid UTF-8; save the table as "
            "UTF-8"
        )


def _warn_of_rows_without_image(
    paths: Sequence[str], table: pd.DataFrame, name: str | Path
) -> None:
    """Warns of rows of a table, which `join_table` has taken, that name none of these images."""
    key = next(column for column in ("path", *STEM_COLUMNS) if column in table)
    known = set(paths) if key == "path" else {PurePosixPath(path).stem for path in paths}
    extra = table[key][~table[key].isin(known)]
    if len(extra) > 0:
        warnings.warn(
            f"{_shown(name)}: {len(extra)} of its {len(table)} rows name no image here, such as "
            f"{_shown(extra.iloc[0])}",
            stacklevel=4,
        )


def group_images(metadata: pd.DataFrame, keys: Sequence[str]) -> np.ndarray:
    """Numbers (N,) of the groups of images that belong together by any of these columns.

    Images with the same value of a key are in one group, and so are those that others join: a
    patient with two lesions joins the pictures of both. An empty value joins nothing.
    """
    num_images = len(metadata)
    links = []
    for key in keys:
        codes = pd.factorize(metadata[key].mask(metadata[key] == ""))[0]
        first = pd.Series(range(num_images)).groupby(codes).transform("first").to_numpy()
        named = np.flatnonzero(codes >= 0)
        links.append(np.stack([named, first[named]]))
    rows, columns = np.concatenate(links, axis=1)
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(num_images, num_images))
    return connected_components(graph, directed=False)[1]


# ---------------------------------------------------------------------------- the array on disk


@dataclass(frozen=True)
class _FileRecord:
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
class _Index:
    """What `index.json` says of an array. An array that no index names does not exist."""

    version: str
    array: str
    thumbnails: str
    hashed_at_ns: int
    records: list[_FileRecord]
    near_duplicates: pd.DataFrame  # of rows of the array, as audit.py finds them


class _ArrayCache:
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

    def load(self, paths: Sequence[str]) -> _Index:
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
                _shown(self.folder),
            ) from error
        with lock(self.folder / ".lock"):
            remove_leftovers(self.folder)
            yield

    def _current_index(self, paths: Sequence[str]) -> _Index | None:
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

    def _write_refreshed_index(self, index: _Index) -> None:
        """Writes the index, which saves time, where nobody else is writing or may write alone."""
        with (
            contextlib.suppress(Timeout, PermissionError),
            lock(self.folder / ".lock").acquire(timeout=0),
        ):
            remove_leftovers(self.folder)
            if (self.folder / index.array).exists():  # or another process has built it anew
                self._write_index(index)

    def _is_surely_unchanged(self, record: _FileRecord, index: _Index) -> bool:
        try:
            status = os.stat(self.data_dir / record.path)
        except OSError:
            return False
        # File systems keep times in steps of up to two seconds: what was written just before it was
        # hashed may have been written again since, in the same step.
        settled = max(status.st_mtime_ns, status.st_ctime_ns) < index.hashed_at_ns - 2_000_000_000
        return settled and record.matches(status)

    def _refreshed(self, record: _FileRecord) -> _FileRecord | None:
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

    def _build(self, paths: Sequence[str]) -> _Index:
        before = self._read_index()
        self._remove_arrays(but=before)
        started = time.time_ns()
        token = secrets.token_hex(8)
        array_path, thumbnails_path = (
            self.folder / f"{name}-{token}.npy" for name in ("images", "thumbnails")
        )
        try:
            records, near = self._write_arrays(array_path, thumbnails_path, paths)
            index = _Index(
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
    ) -> tuple[list[_FileRecord], pd.DataFrame]:
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
    ) -> list[_FileRecord]:
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
    ) -> _FileRecord:
        path = paths[row]
        contents, size, mtime_ns, ctime_ns = b"", 0, 0, 0
        try:
            contents, status = read_regular_file(self.data_dir / path)
            size, mtime_ns, ctime_ns = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            image, (width, height) = _decode_for(contents, self.image_size, self.preprocessors)
            problem = ""
        except UnreadableImageError as error:
            width, height, problem = 0, 0, str(error)
        else:
            array[row] = _prepare(image, self.image_size, self.preprocessors, path)
            thumbnails[row] = _thumbnail(image)
        content_hash = hashlib.sha256(contents).hexdigest()
        return _FileRecord(path, size, mtime_ns, ctime_ns, content_hash, width, height, problem)

    def _read_index(self) -> _Index | None:
        try:
            contents = json.loads((self.folder / "index.json").read_text(encoding="ascii"))
            columns = contents.pop("records")
            records = [_FileRecord(*row) for row in zip(*columns, strict=True)]
            near = pd.DataFrame(contents.pop("near_duplicates"))
            index = _Index(records=records, near_duplicates=near, **contents)
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

    def thumbnails(self, index: _Index) -> np.ndarray:
        return np.load(self.folder / index.thumbnails, mmap_mode="r")

    def _write_index(self, index: _Index) -> None:
        names = [field.name for field in fields(_FileRecord)]
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

    def _remove_arrays(self, but: _Index | None) -> None:
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


# ---------------------------------------------------------------------------- splits


def stratified_split(
    labels: np.ndarray, groups: np.ndarray, splits: Mapping[str, float], seed: int = 42
) -> np.ndarray:
    """The name of the split of each image, stratified by class, no group divided.

    Parameters
    ----------
    labels : int array (N,), the class of each image, from 0
    groups : array (N,), images with equal values stay together
    splits : split names and their fractions, which sum to 1
    seed : decides which groups go where, the numbers being given

    Each split gets as near to its fraction of each class as whole groups allow; for groups of one
    image that is the largest-remainder method. Every class is in the training split (the one named
    `train`, or else the largest), and every split has every class that has at least as many groups
    as there are splits, where groups of several classes leave that possible; `DatasetBuilder` warns
    of what lacks. Raises ValueError for fractions that cannot be.
    """
    names, fractions = _check_splits(splits)
    training = names.index("train") if "train" in names else int(fractions.argmax())
    return np.array(names)[_assign_splits(labels, groups, fractions, training, seed)]


def _assign_splits(
    labels: np.ndarray, groups: np.ndarray, fractions: np.ndarray, training: int | None, seed: int
) -> np.ndarray:
    """The number of the split of each image; `training` as `_numbers_of_groups` takes it."""
    group_ids, first_rows, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    num_classes = int(labels.max()) + 1
    contents = np.zeros((len(group_ids), num_classes), dtype=np.int64)
    np.add.at(contents, (group_of_row, labels), 1)

    # Groups with the same number of images of each class are one kind, and stand for one another.
    kinds, kind_of_group = np.unique(contents, axis=0, return_inverse=True)
    kind_of_group = kind_of_group.ravel()  # numpy 2.0 alone gives it a second dimension
    kind_sizes = np.bincount(kind_of_group, minlength=len(kinds))
    numbers = _numbers_of_groups(kinds, kind_sizes, fractions, training)

    rng = np.random.default_rng(seed)
    split_of_group = np.empty(len(group_ids), dtype=np.int64)
    for kind in range(len(kinds)):
        members = np.flatnonzero(kind_of_group == kind)
        members = members[first_rows[members].argsort()]
        split_of_group[rng.permutation(members)] = np.repeat(
            np.arange(len(fractions)), numbers[kind]
        )
    return split_of_group[group_of_row]


def k_fold_splits(
    metadata: pd.DataFrame, k: int = 5, seed: int = 42
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cross-validation, stratified and grouped: k pairs of training and validation row numbers.

    `metadata` is that of `DatasetBuilder.build`, or some rows of it; its columns `label` and
    `group` are used. Row numbers count from 0, whatever its index. Each row is in one validation
    part, with all of its group. Every training part has every class of at least two groups, and
    every validation part every class of at least k, where groups of several classes leave that
    possible. Warns of classes of fewer groups than k. Raises ValueError for fewer than two folds or
    groups than folds.
    """
    if k < 2 or metadata["group"].nunique() < k:
        raise ValueError(f"k is {k}; it must be from 2 to the number of groups")
    _warn_of_classes_with_few_groups(metadata, k)
    labels = pd.factorize(metadata["label"], sort=True)[0]
    fractions, groups = np.full(k, 1 / k), metadata["group"].to_numpy()
    fold = _assign_splits(labels, groups, fractions, None, seed)
    # What does not divide evenly comes into the first folds; the seed says which these are.
    order = np.random.default_rng(derive_seed(seed, "order of folds")).permutation(k)
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in order]


def _warn_of_classes_with_few_groups(metadata: pd.DataFrame, k: int) -> None:
    name_column = "class" if "class" in metadata else "label"
    num_groups = metadata.groupby(name_column, observed=True)["group"].nunique()
    few = [
        f"{_shown(name)} ({number} {'group' if number == 1 else 'groups'})"
        for name, number in num_groups[num_groups < k].items()
    ]
    if few:
        warnings.warn(
            f"classes with fewer groups than k={k}: {', '.join(few)}; not every validation part "
            "has them, and one of a single group is never trained on where it is validated",
            stacklevel=3,
        )


def _check_splits(splits: Mapping[str, float]) -> tuple[list[str], np.ndarray]:
    names, fractions = list(splits), np.array(list(splits.values()), dtype=np.float64)
    if not names:
        raise ValueError("splits is empty; give names and fractions, such as {'train': 0.8, ...}")
    if not (fractions > 0).all():
        raise ValueError(f"splits are {dict(splits)}; each fraction must be greater than 0")
    if abs(fractions.sum() - 1) > 1e-6:
        raise ValueError(f"splits are {dict(splits)}; they sum to {fractions.sum():g}, not to 1")
    return names, fractions


def _numbers_of_groups(
    kinds: np.ndarray, kind_sizes: np.ndarray, fractions: np.ndarray, training: int | None
) -> np.ndarray:
    """How many groups of each kind go to each split, (kinds, splits).

    `training` is the number of the split that is trained on; None where it is all but one in turn,
    so that no split may have the whole of a class.

    Starts from the largest remainders of each kind, and while that brings the splits nearer to
    their shares moves a group from one split to another, or exchanges two.
    """
    numbers = np.stack([_largest_remainder(size, fractions) for size in kind_sizes])
    shares = np.outer(fractions, kind_sizes @ kinds)
    groups_with_class = kind_sizes @ (kinds > 0)
    must_have = np.tile(groups_with_class >= len(fractions), (len(fractions), 1))
    if training is not None:
        must_have[training] = True
    num_images = kind_sizes @ kinds
    must_share = (groups_with_class >= 2) & (training is None)

    def cost(counts: np.ndarray) -> np.ndarray:
        """How far splits are from their shares; `counts` (..., splits, classes)."""
        by_class = ((counts - shares) ** 2).sum(axis=-1)
        in_all = (counts.sum(axis=-1) - shares.sum(axis=-1)) ** 2
        lacks = ((counts == 0) & must_have) | ((counts == num_images) & must_share)
        missing = lacks @ np.ones(kinds.shape[1])
        return by_class + 1e-3 * in_all + 1e9 * missing

    while True:
        step = _best_step(numbers, kinds, cost)
        if step is None:
            return numbers
        numbers += step


def _best_step(
    numbers: np.ndarray, kinds: np.ndarray, cost: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray | None:
    """The change of `numbers` that lowers the cost most, or None where none lowers it.

    A step takes a group of one kind out of a split into another, in exchange for one of another
    kind; with the empty kind in exchange it is a plain move.
    """
    num_splits = numbers.shape[1]
    kinds = np.vstack([kinds, np.zeros_like(kinds[:1])])
    available = np.vstack([numbers, np.ones_like(numbers[:1])]) > 0
    # Exchanging each with each takes too long for hundreds of kinds; moving alone does there.
    others = np.arange(len(kinds)) if len(kinds) <= 64 else np.array([len(kinds) - 1])
    change = (kinds[:-1, None] - kinds[None, others])[:, :, None]
    counts = numbers.T @ kinds[:-1]
    losses, gains = cost(counts - change) - cost(counts), cost(counts + change) - cost(counts)
    delta = losses[:, :, :, None] + gains[:, :, None, :]  # [taken, given, source, target]
    possible = available[:-1, None, :, None] & available[None, others, None, :]
    delta[~possible | np.eye(num_splits, dtype=bool)] = np.inf
    taken, given, source, target = np.unravel_index(delta.argmin(), delta.shape)
    if not delta[taken, given, source, target] < -1e-9:
        return None
    step = np.zeros((len(kinds), num_splits), dtype=np.int64)
    step[taken, [source, target]] += [-1, 1]
    step[others[given], [source, target]] += [1, -1]
    return step[:-1]


def _largest_remainder(total: int, fractions: np.ndarray) -> np.ndarray:
    exact = total * fractions
    counts = np.floor(exact + 1e-9).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: total - counts.sum()]] += 1
    return counts


def _warn_of_missing_classes(metadata: pd.DataFrame, names: Sequence[str]) -> None:
    table = pd.crosstab(metadata["class"], metadata["split"]).reindex(columns=names, fill_value=0)
    lacks = [
        f"{_shown(name)} ({row.sum()} images) is not in {', '.join(row.index[row == 0])}"
        for name, row in table.iterrows()
        if (row == 0).any()
    ]
    if lacks:
        message = "; ".join(lacks)
        warnings.warn(f"not every split has every class: {message}", stacklevel=3)


# ---------------------------------------------------------------------------- the builder


class DatasetBuilder:
    """Makes stratified data sets from a folder of images, one sub-folder a class.

    Parameters
    ----------
    data_dir : folder of `<class>/<image>`, or of `<split>/<class>/<image>`, which are pooled
    image_size : side in pixels of the square images that the models see
    cache_dir : where the array of prepared images is kept; `processed/` beside `data_dir` if None
    num_workers : threads that prepare images; None is one a core that the process may use
    seed : decides which images go to which split
    skip_unreadable : go on without images that cannot be read, with a warning, instead of raising
    labels_csv : a table whose column `class` overrides the folders of the images that it names
    label_column : the column of `labels_csv`, or else of `metadata_csv`, that alone gives the
        classes; the images then need no class folders
    label_conflicts : what becomes of pictures that stand under several classes: "keep" them
        (together, in one split), "drop" them all, or "error"
    metadata_csv : a table whose columns are added to the metadata; a name that the metadata has
        already gets the ending `_given`
    group_by : columns of `metadata_csv`; images with the same lesion or patient stay in one split
    split_by : "random", or "folders" for the splits that the folders Train, Test and, if there is
        one, Valid make; without a Valid it is taken out of Train
    splits_csv : a table whose column `split` gives the split of every image, such as an earlier
        run's `splits.csv`

    Tables name the images as `join_table` says.
    """

    def __init__(
        self,
        data_dir: str | Path,
        *,
        image_size: int = 224,
        cache_dir: str | Path | None = None,
        num_workers: int | None = None,
        seed: int = 42,
        skip_unreadable: bool = False,
        labels_csv: str | Path | None = None,
        label_column: str | None = None,
        label_conflicts: str = "keep",
        metadata_csv: str | Path | None = None,
        group_by: Sequence[str] = (),
        split_by: str = "random",
        splits_csv: str | Path | None = None,
    ) -> None:
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}; it must be 8 or more")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 0 or more")
        if label_conflicts not in ("keep", "drop", "error"):
            raise ValueError(f"label_conflicts is {label_conflicts!r}; not keep, drop or error")
        if split_by not in ("random", "folders"):
            raise ValueError(f"split_by is {split_by!r}; it must be random or folders")
        if split_by == "folders" and splits_csv is not None:
            raise ValueError(
                "splits come from split_by='folders' or from splits_csv, not from both"
            )
        if label_column is not None and labels_csv is None and metadata_csv is None:
            raise ValueError("label_column needs the table it is in: labels_csv or metadata_csv")
        if group_by and metadata_csv is None:
            raise ValueError("group_by needs the table its columns are in: metadata_csv")
        check_seed(seed)
        self.data_dir = Path(data_dir)
        self.image_size = image_size
        default = Path(os.path.abspath(data_dir)).parent / "processed"
        self.cache_dir = default if cache_dir is None else Path(cache_dir)
        self.num_workers = num_workers
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.labels_csv = labels_csv
        self.label_column = label_column
        self.label_conflicts = label_conflicts
        self.metadata_csv = metadata_csv
        self.group_by = list(group_by)
        self.split_by = split_by
        self.splits_csv = splits_csv

    def list_images(self, *, content_hash: bool = False) -> pd.DataFrame:
        """Returns a row an image, without opening one: `path`, `class` and `source_split`.

        Where splits are given, the column `split` has them, missing for images without one. With
        `content_hash` a column of that name tells the contents, for which the files are read as by
        `build`. Raises what `build` raises for a folder or tables that cannot be used.
        """
        images = self._find_labelled_images()
        self._read_metadata(images)
        if self.splits_csv is not None:
            table = read_table(self.splits_csv, ["split"])
            images["split"] = join_table(images["path"], table, self.splits_csv)["split"]
        elif self.split_by == "folders":
            images["split"] = self._splits_of_folders(images)
        if content_hash:
            index = self._cache(()).load(images["path"].tolist())
            images["content_hash"] = [record.content_hash for record in index.records]
        return images

    def build(
        self,
        preprocessors: Sequence[Preprocessor] = (),
        splits: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, "LesionDataset"], pd.DataFrame]:
        """The data set of each split, and the metadata of all images.

        A preprocessor maps a uint8 RGB array `(h, w, 3)` to another of any height and width, uint8
        or float in [0, 1]; they run in the order given, before the images are scaled and cropped.
        `splits` are names and fractions, by default train 0.7, valid 0.2, test 0.1. Files of the
        same picture, identical or nearly so, are never divided between splits.

        The metadata has a row an image: `path`, `class`, `label`, `source_split`, `width`,
        `height`, `content_hash`, `picture`, `group`, `split`, and the columns of `metadata_csv`.

        Raises FileNotFoundError or ValueError for a folder, tables or splits that cannot be used,
        and UnreadableImageError, which names all images that cannot be read.
        """
        splits = DEFAULT_SPLITS if splits is None else splits
        _check_splits(splits)
        # Until the end, the index of the table is the row of the image in the array.
        metadata, given, cache, index = self._load(preprocessors)
        readable = self._check_readable(index.records)
        metadata = self._settle_label_conflicts(metadata[readable])
        classes = sorted(metadata["class"].unique())
        if len(classes) < 2:
            raise ValueError(f"{_shown(self.data_dir)}: fewer than two classes are left")
        metadata.insert(2, "label", metadata["class"].map(classes.index))
        metadata = metadata.join(given)
        keys = ["picture", *(_given_name(name) for name in self.group_by)]
        groups = group_images(metadata, keys)
        metadata.insert(metadata.columns.get_loc("picture") + 1, "group", groups)
        split = self._split(metadata, splits)
        metadata.insert(metadata.columns.get_loc("group") + 1, "split", split)

        names = list(splits)
        if self.splits_csv is not None or self.split_by == "folders":
            usual = [name for name in DEFAULT_SPLITS if name in set(split)]
            names = [*usual, *sorted(set(split) - set(usual))]
        _warn_of_missing_classes(metadata, names)
        datasets = {}
        for name in names:
            part = metadata[metadata["split"] == name]
            datasets[name] = LesionDataset(
                cache.folder / index.array,
                part.index.to_numpy(),
                part.reset_index(drop=True),
                classes,
                cache.fingerprint,
            )
        return datasets, metadata.reset_index(drop=True)

    def audit(self, preprocessors: Sequence[Preprocessor] = ()) -> pd.DataFrame:
        """What is wrong with the images, a row a finding, as `audit.audit` describes it.

        All images count, whatever `label_conflicts` and `skip_unreadable` say; one that cannot be
        read is a finding. The splits that no picture should be on both sides of are those of
        `splits_csv`, or else, unless `split_by` is "folders", of a column `split` of
        `metadata_csv`, or else of folders named Train, Valid and Test.

        Raises what `build` raises for a folder or tables that cannot be used.
        """
        metadata, given, cache, index = self._load(preprocessors)
        metadata["error"] = [record.error for record in index.records]
        if self.splits_csv is not None:
            table = read_table(self.splits_csv, ["split"])
            split = join_table(metadata["path"], table, self.splits_csv)["split"]
        elif self.split_by == "random" and "split_given" in given:
            split = given["split_given"]
        else:
            split = _split_of_folder(metadata["source_split"])
        metadata["split"] = split.fillna("")
        return audit.audit(metadata, index.near_duplicates, cache.thumbnails(index))

    def _load(
        self, preprocessors: Sequence[Preprocessor]
    ) -> tuple[pd.DataFrame, pd.DataFrame, _ArrayCache, _Index]:
        """Image by image what is known of the files, and the user's columns; the prepared array."""
        images = self._find_labelled_images()
        given = self._read_metadata(images)
        cache = self._cache(preprocessors)
        index = cache.load(images["path"].tolist())
        metadata = _metadata(images, index.records)
        metadata["picture"] = audit.number_pictures(
            metadata["content_hash"], index.near_duplicates, cache.thumbnails(index)
        )
        return metadata, given, cache, index

    def _cache(self, preprocessors: Sequence[Preprocessor]) -> _ArrayCache:
        return _ArrayCache(
            self.data_dir, self.cache_dir, self.image_size, preprocessors, self.num_workers
        )

    def _find_labelled_images(self) -> pd.DataFrame:
        images = find_images(self.data_dir, has_class_folders=self.label_column is None)
        name = self.labels_csv or (self.metadata_csv if self.label_column else None)
        if name is None:
            return images
        column = self.label_column or "class"
        table = read_table(name, [column])
        labels = join_table(images["path"], table, name)[column]
        if self.label_column is None:
            _warn_of_rows_without_image(images["path"], table, name)
            labels = labels.fillna(images["class"])
        elif labels.isna().any():
            without = images["path"][labels.isna()]
            raise ValueError(
                f"{_shown(name)}: no {column} for {len(without)} of {len(images)} images, such as "
                f"{_shown(without.iloc[0])}; add them or move these images away"
            )
        _check_unicode(labels, name)
        images = images.drop(columns="class", errors="ignore")
        images.insert(1, "class", labels)
        if images["class"].nunique() < 2:
            raise ValueError(f"{_shown(name)}: all images are of one class")
        return images

    def _read_metadata(self, images: pd.DataFrame) -> pd.DataFrame:
        """The user's columns, a row an image."""
        if self.metadata_csv is None:
            return pd.DataFrame(index=images.index)
        table = read_table(self.metadata_csv, self.group_by)
        given = join_table(images["path"], table, self.metadata_csv)
        given = given.rename(columns=_given_name)
        if given.columns.has_duplicates:
            name = given.columns[given.columns.duplicated()][0]
            raise ValueError(
                f"{_shown(self.metadata_csv)}: has both {name.removesuffix('_given')} and {name}, "
                f"which would both be called {name}; rename or remove one"
            )
        return given

    def _settle_label_conflicts(self, metadata: pd.DataFrame) -> pd.DataFrame:
        conflicting = metadata.groupby("picture")["class"].transform("nunique") > 1
        if self.label_conflicts == "error" and conflicting.any():
            first = metadata[metadata["picture"] == metadata["picture"][conflicting].iloc[0]]
            names = ", ".join(map(_shown, first["path"]))
            raise ValueError(
                f"{conflicting.sum()} images are of pictures that stand under several classes, "
                f"such as {names}"
            )
        return metadata[~conflicting].copy() if self.label_conflicts == "drop" else metadata

    def _split(self, metadata: pd.DataFrame, splits: Mapping[str, float]) -> np.ndarray:
        if self.splits_csv is not None:
            split = self._read_splits(metadata)
        elif self.split_by == "folders":
            split = self._split_by_folders(metadata, splits)
        else:
            labels, groups = metadata["label"].to_numpy(), metadata["group"].to_numpy()
            return stratified_split(labels, groups, splits, self.seed)
        divided = pd.Series(split).groupby(metadata["group"].to_numpy()).nunique() > 1
        if divided.any():
            affected = metadata["group"].isin(divided.index[divided]).sum()
            warnings.warn(
                f"leakage: {divided.sum()} groups of images that belong together (same picture, "
                f"lesion or patient), {affected} images, are divided between these splits",
                stacklevel=3,
            )
        return split

    def _read_splits(self, metadata: pd.DataFrame) -> np.ndarray:
        table = read_table(self.splits_csv, ["split"])
        split = join_table(metadata["path"], table, self.splits_csv)["split"]
        without = metadata["path"][split.isna().to_numpy()]
        if len(without) > 0:
            raise ValueError(
                f"{_shown(self.splits_csv)}: no split for {len(without)} of {len(metadata)} "
                f"images, such as {_shown(without.iloc[0])}"
            )
        _check_unicode(split, self.splits_csv)
        if len(table) > len(metadata):
            extra = len(table) - len(metadata)
            warnings.warn(
                f"{_shown(self.splits_csv)}: {extra} of its images are not here", stacklevel=4
            )
        return split.to_numpy(object)

    def _splits_of_folders(self, metadata: pd.DataFrame) -> pd.Series:
        split = _split_of_folder(metadata["source_split"])
        if split.isna().any():
            stray = metadata["path"][split.isna()].iloc[0]
            raise ValueError(
                f"{_shown(stray)} is in no folder named Train, Valid or Test, which split_by needs"
            )
        missing = sorted({"train", "test"} - set(split))
        if missing:
            raise ValueError(f"{_shown(self.data_dir)}: no folder for the {missing[0]} split")
        return split

    def _split_by_folders(self, metadata: pd.DataFrame, splits: Mapping[str, float]) -> np.ndarray:
        split = self._splits_of_folders(metadata)
        if "valid" not in set(split):
            if not {"train", "valid"} <= set(splits):
                raise ValueError("splits must have train and valid to take valid out of Train")
            whole = splits["train"] + splits["valid"]
            parts = {name: splits[name] / whole for name in ("train", "valid")}
            rows = metadata[split == "train"]
            labels = pd.factorize(rows["label"], sort=True)[0]
            split[split == "train"] = stratified_split(
                labels, rows["group"].to_numpy(), parts, self.seed
            )
        return split.to_numpy()

    def _check_readable(self, records: Sequence[_FileRecord]) -> np.ndarray:
        unreadable = [record for record in records if record.error]
        if unreadable:
            names = ", ".join(f"{_shown(r.path)} ({r.error})" for r in unreadable)
            found = f"{len(unreadable)} of {len(records)} images cannot be read"
            if not self.skip_unreadable:
                raise UnreadableImageError(
                    f"{found}: {names}; mend or remove them, or go on without them with "
                    "--skip_unreadable (skip_unreadable=True)"
                )
            warnings.warn(f"{found} and are left out: {names}", stacklevel=3)
        return np.array([not record.error for record in records])


def _split_of_folder(source_split: pd.Series) -> pd.Series:
    """The split that a folder's name says, missing where it says none."""
    splits = [SPLIT_FOLDERS.get(folder.split("/")[0].casefold()) for folder in source_split]
    return pd.Series(splits, index=source_split.index, dtype=object)


def has_folder_of_split(data_dir: str | Path, split: str) -> bool:
    """Returns whether a folder in `data_dir` is named like this split: train, valid or test."""
    names = [path.name for path in Path(data_dir).glob("*") if path.is_dir()]
    return split in set(_split_of_folder(pd.Series(names, dtype=object).astype(str)))


def _given_name(column: str) -> str:
    return f"{column}_given" if column in METADATA_COLUMNS else column


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that numpy's and torch's generators do not both take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be 0 or more and less than 2**63")


def _metadata(images: pd.DataFrame, records: Sequence[_FileRecord]) -> pd.DataFrame:
    metadata = images.copy()
    for name in ("width", "height", "content_hash"):
        metadata[name] = [getattr(record, name) for record in records]
    return metadata


# ---------------------------------------------------------------------------- data sets


class LesionDataset(Dataset):
    """Images and labels of one split; `dataset[i]` is `(float32 (3, H, W) in [0, 1], int)`.

    The images lie in an array on disk that is opened where it is read: a copy of the data set in
    another process opens it again.

    Attributes: `classes`, the names in label order; `labels`, int64 `(N,)`; `metadata`, a row an
    image; `image_size`; `preprocessors`, their fingerprint, empty for none.
    """

    def __init__(
        self,
        array_path: Path,
        rows: np.ndarray,
        metadata: pd.DataFrame,
        classes: Sequence[str],
        preprocessors: str = "",
    ) -> None:
        self.array_path = Path(array_path).absolute()
        self.rows = rows
        self.metadata = metadata
        self.classes = list(classes)
        self.labels = metadata["label"].to_numpy(np.int64, copy=True)
        self.preprocessors = preprocessors
        self._array: np.ndarray | None = None
        self.image_size = self._images().shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = to_float(torch.from_numpy(self.gather([index])))[0]
        return image.contiguous(), int(self.labels[index])

    def gather(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images of these numbers as they lie on disk, uint8 `(B, H, W, 3)`."""
        return self._images()[self.rows[np.asarray(indices)]]

    def _images(self) -> np.ndarray:
        if self._array is None:
            self._array = np.load(self.array_path, mmap_mode="r")
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None}


def to_float(images: Tensor) -> Tensor:
    """uint8 `(B, H, W, 3)` as float32 `(B, 3, H, W)` in [0, 1], on the same device.

    The channels stay last in memory: that is how convolutions are fastest.
    """
    return images.to(torch.float32).div_(255).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------- loaders


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of 63 bits for one use of randomness, such as the order of epoch 3."""
    sequence = np.random.SeedSequence(seed, spawn_key=(*purpose.encode(), *numbers))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class LesionLoader:
    """Batches `(images, labels)` of a data set, ready on the device: float32 in [0, 1], and int64.

    `for images, labels in loader` is one epoch, the last batch as small as it comes.
    `loader.batches(start=k)` is the endless stream of full batches that training reads; batch k
    depends on the seed and k alone.

    Of several processes each has a loader with its own `rank` below `world_size`, and gets its part
    of what one loader would give: of every batch of `batches`, which then has `batch_size` times
    `world_size` images in all, and of the images of an epoch, each of which exactly one process
    gets.
    """

    def __init__(
        self,
        dataset: LesionDataset,
        batch_size: int = 32,
        *,
        shuffle: bool = False,
        augmentation: bool = False,
        balanced: bool = False,
        device: torch.device | str | None = None,
        seed: int = 42,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 0 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be 0 or more and below world_size")
        if len(dataset) == 0:
            raise ValueError("the data set has no images")
        check_seed(seed)
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.balanced = balanced
        self.device = torch.device(device) if device is not None else _default_device()
        self.seed = seed
        self.num_workers = num_workers
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._on_device: _OnDevice | None = None

    def __len__(self) -> int:
        return -(-len(self._own_part(np.arange(len(self.dataset)))) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = self._epoch
        self._epoch += 1
        order = self._own_part(self._order(epoch))
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        for number, batch in enumerate(self._gathered(iter(parts))):
            views = self._views(len(batch[1]), "epoch batch", epoch, number, self.rank)
            yield self._finish(batch, views)

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from number `start` on, without end; each has `batch_size` images."""
        size = self.batch_size * self.world_size
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        parts = (part[own] for part in self._endless_order(start, size))
        for number, batch in enumerate(self._gathered(parts), start):
            yield self._finish(batch, self._views(size, "batch", number)[own])

    def _own_part(self, order: np.ndarray) -> np.ndarray:
        return np.array_split(order, self.world_size)[self.rank]

    def _order(self, epoch: int) -> np.ndarray:
        """The numbers of the images of one epoch, in the order in which they are shown."""
        if not self.shuffle:
            return np.arange(len(self.dataset))
        rng = np.random.default_rng(derive_seed(self.seed, "order", epoch))
        if not self.balanced:
            return rng.permutation(len(self.dataset))
        # Systematic sampling: each image as often as expected, rounded up or down.
        images = rng.permutation(len(self.dataset))
        expected = balanced_frequencies(self.dataset.labels)[images]
        passed = np.floor(np.cumsum(expected) + rng.random() + 1e-9).astype(np.int64)
        passed[-1] = len(images)
        return rng.permutation(np.repeat(images, np.diff(passed, prepend=0)))

    def _endless_order(self, start: int, size: int) -> Iterator[np.ndarray]:
        """The numbers of the images of each batch of this size, epoch after epoch."""
        epoch, skip = divmod(start * size, len(self.dataset))
        waiting = self._order(epoch)[skip:]
        while True:
            while len(waiting) < size:
                epoch += 1
                waiting = np.concatenate([waiting, self._order(epoch)])
            yield waiting[:size]
            waiting = waiting[size:]

    def _gathered(self, parts: Iterator[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        if self._on_device is None and _fits(self.dataset, self.device):
            self._on_device = _OnDevice(self.dataset, self.device)
        if self._on_device is not None:
            return map(self._on_device.__getitem__, parts)
        gatherer = _Gatherer(self.dataset)
        pin_memory = self.device.type == "cuda"
        if self.num_workers == 0:
            batches = map(gatherer.__getitem__, parts)
            return map(_pin, batches) if pin_memory else batches
        generator = torch.Generator()  # else DataLoader would draw from the global random state
        return iter(
            DataLoader(
                gatherer,
                batch_size=None,
                sampler=parts,
                num_workers=self.num_workers,
                generator=generator,
                pin_memory=pin_memory,
                worker_init_fn=_leave_ctrl_c_to_the_parent,
            )
        )

    def _views(self, count: int, purpose: str, *numbers: int) -> Views:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, purpose, *numbers))
        return draw_views(count, generator)

    def _finish(self, batch: tuple[Tensor, Tensor], views: Views) -> tuple[Tensor, Tensor]:
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        images = to_float(images)
        return apply_views(images, views) if self.augmentation else images, labels


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    """A terminal sends it to all processes; the parent may still want a batch to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Gatherer(Dataset):
    """A data set whose items are whole batches: item `indices` is `(uint8 (B, H, W, 3), int64)`."""

    def __init__(self, dataset: LesionDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(self.dataset.gather(indices))
        return images, torch.from_numpy(self.dataset.labels[indices])


class _OnDevice:
    """The same as `_Gatherer`, from images that lie in the device's own memory."""

    def __init__(self, dataset: LesionDataset, device: torch.device) -> None:
        size = dataset.image_size
        self.images = torch.empty(len(dataset), size, size, 3, dtype=torch.uint8, device=device)
        for start in range(0, len(dataset), 256):
            rows = np.arange(start, min(start + 256, len(dataset)))
            self.images[start : start + 256] = torch.from_numpy(dataset.gather(rows)).to(device)
        self.labels = torch.from_numpy(dataset.labels).to(device)

    def __getitem__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        places = torch.from_numpy(indices).to(self.images.device, non_blocking=True)
        return self.images[places], self.labels[places]


def _fits(dataset: LesionDataset, device: torch.device) -> bool:
    """Whether the images may stay in the memory of a GPU without being missed there."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return len(dataset) * dataset.image_size**2 * 3 < free * SHARE_OF_GPU_FOR_IMAGES


def _pin(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """From pinned memory a batch reaches the GPU while that is still busy with the last one."""
    images, labels = batch
    return images.pin_memory(), labels.pin_memory()


def balanced_frequencies(labels: np.ndarray) -> np.ndarray:
    """How often balanced sampling shows each image in an epoch of N draws, float64 `(N,)`.

    Classes are drawn evenly, but no image more than `MOST_REPEATS` times; what a class falls short
    of by that is spread evenly over the others.
    """
    num_images = len(labels)
    classes, class_of_image, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    frequency = np.zeros(len(classes))
    capped = np.zeros(len(classes), dtype=bool)
    while not capped.all():
        rest = num_images - MOST_REPEATS * sizes[capped].sum()
        frequency[~capped] = rest / (~capped).sum() / sizes[~capped]
        newly = ~capped & (frequency > MOST_REPEATS)
        if not newly.any():
            break
        frequency[newly] = MOST_REPEATS
        capped |= newly
    return frequency[class_of_image]


def create_dataloaders(
    dataset_splits: Mapping[str, LesionDataset],
    batch_size: int = 32,
    *,
    augmentation: bool = True,
    balanced: bool = False,
    device: torch.device | str | None = None,
    seed: int = 42,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, LesionLoader]:
    """A loader for each split; the one named `train` is shuffled and augmented, the others neither.

    `balanced` draws the classes of the training split evenly, but no image more than ten times as
    often as plain shuffling would. `device` is where the batches are made ready, None for CUDA
    where there is one; there the other splits come in batches four times as large, as evaluation
    needs less memory. `num_workers` are processes that read ahead, 0 for none. With several
    processes that train together, `batch_size` is that of one, and `rank` says which this is of
    `world_size`. Raises ValueError for a split without images.
    """
    device = torch.device(device) if device is not None else _default_device()
    larger = 1 if device.type == "cpu" else EVALUATION_BATCHES
    empty = [name for name, dataset in dataset_splits.items() if len(dataset) == 0]
    if empty:
        raise ValueError(f"no images are left for {', '.join(empty)}: there are too few in all")
    return {
        name: LesionLoader(
            dataset,
            batch_size if name == "train" else batch_size * larger,
            shuffle=name == "train",
            augmentation=augmentation and name == "train",
            balanced=balanced and name == "train",
            device=device,
            seed=seed,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
        )
        for name, dataset in dataset_splits.items()
    }


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
