"""Image files → arrays as the models see them; preprocessors and their fingerprint."""

import functools
import hashlib
import logging
import random
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imaging import audit
from imaging.decode import UnreadableImageError, as_uint8, decode, read_regular_file, scaled_size
from storage.files import printable

MAX_REPETITIONS = 25  # of each probe image, to notice a preprocessor that is random
SECONDS_OF_PROBING = 0.5  # after which a slow one is believed
Preprocessor = Callable[[np.ndarray], np.ndarray]


def read_image(path: str | Path, longest_side: int | None = None) -> np.ndarray:
    """Returns the image in a file as a viewer shows it: uint8 RGB `(height, width, 3)`.

    EXIF orientation is applied, transparency laid over white, 16 bits reduced to 8; an image with a
    side above `longest_side` is scaled down to it. Raises UnreadableImageError naming the file.
    """
    image = _decode_file(path)
    if longest_side is not None:
        image.thumbnail((longest_side, longest_side))
    return np.array(image)


def prepare_image(
    path: str | Path, image_size: int = 224, preprocessors: Sequence[Preprocessor] = ()
) -> np.ndarray:
    """Returns the image in a file as the models see it: uint8 RGB `(image_size, image_size, 3)`.

    It is read as by `read_image`, goes through the preprocessors, is scaled to a shorter side of
    `round(image_size * 256 / 224)` and cropped at the centre, as `DatasetBuilder` does. Raises
    UnreadableImageError naming the file, and ValueError naming a preprocessor whose result is not
    an image.
    """
    image = _decode_file(path, needed_side(image_size, preprocessors))
    return prepare(image, image_size, preprocessors, path)


def resize(image: np.ndarray, size: int = 256) -> np.ndarray:
    """Scales a uint8 RGB image `(h, w, 3)` to a shorter side of `size` at its aspect ratio."""
    height, width = image.shape[:2]
    scaled = scaled_size(width, height, size)
    return np.array(Image.fromarray(image).resize(scaled, Image.Resampling.BILINEAR))


def center_crop(image: np.ndarray, size: int = 224) -> np.ndarray:
    """Returns the centre of an image `(h, w, 3)`, `size` on each side that has as many pixels."""
    height, width = image.shape[:2]
    top, left = round(max(height - size, 0) / 2), round(max(width - size, 0) / 2)
    return image[top : top + size, left : left + size]


def normalize(image: np.ndarray) -> np.ndarray:
    """Returns a uint8 image as float32 in [0, 1], x / 255."""
    return image.astype(np.float32) / 255


def shorter_side(image_size: int) -> int:
    """Returns the pixels that the shorter side is scaled to before the crop of `image_size`."""
    return round(image_size * 256 / 224)


def resize_and_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Scales an image to a shorter side of `shorter_side(image_size)` and crops it at the centre.

    The result is that of torchvision's Resize and CenterCrop to within one of 255 levels, but only
    the pixels that stay are computed.
    """
    width, height = image.size
    scaled_width, scaled_height = scaled_size(width, height, shorter_side(image_size))
    left, top = round((scaled_width - image_size) / 2), round((scaled_height - image_size) / 2)
    x, y = width / scaled_width, height / scaled_height
    box = (left * x, top * y, (left + image_size) * x, (top + image_size) * y)
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """Returns the whole image as `audit` compares it, whatever its shape: grey, uint8."""
    size = (audit.THUMBNAIL_SIZE, audit.THUMBNAIL_SIZE)
    return np.asarray(image.resize(size, Image.Resampling.BOX).convert("L"))


def needed_side(image_size: int, preprocessors: Sequence[Preprocessor]) -> int | None:
    """Returns the shorter side that `decode` must keep, None for the original."""
    return None if preprocessors else max(shorter_side(image_size), 2 * audit.THUMBNAIL_SIZE)


def prepare(
    image: Image.Image, image_size: int, preprocessors: Sequence[Preprocessor], path: str | Path
) -> np.ndarray:
    """Returns a decoded image as the models see it.

    Raises ValueError, which names `path` too, for a preprocessor whose result is not an image.
    """
    for preprocessor in preprocessors:
        name = f"preprocessor {_name_of(preprocessor)} on {printable(path)}"
        try:
            result = preprocessor(np.array(image))
        except Exception as error:
            raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
        image = Image.fromarray(as_uint8(result, f"the result of {name}"))
    return np.asarray(resize_and_crop(image, image_size))


def fingerprint(preprocessors: Sequence[Preprocessor]) -> str:
    """Returns 16 hex digits that tell these preprocessors from others; empty for none.

    They depend on the preprocessors' code, constants, defaults, closures, partial arguments and
    attributes, and on what they make of a few probe images. Raises ValueError naming one whose
    result for the same image changes.
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

    One that draws from a global generator without seeding it is noticed even where the results
    happen to be the same.
    """
    state = _global_random_state()
    end = time.monotonic() + SECONDS_OF_PROBING
    for _ in range(MAX_REPETITIONS):
        again = [_probe(preprocessor, probe) for probe in probes]
        if again != results or _global_random_state() != state:
            raise ValueError(
                f"preprocessor {_name_of(preprocessor)} gives different results for the same image "
                "(it uses randomness, the time, or something kept between calls), but results are "
                "kept on disk and must be the same for new images; leave randomness to the "
                "augmentation, or seed a generator in each call"
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
    # Objects' bytes would be their addresses, which change from run to run.
    contents = b"" if result.dtype.hasobject else result.tobytes()
    return f"{result.dtype}{result.shape}".encode() + contents


def _name_of(preprocessor: Preprocessor) -> str:
    while isinstance(preprocessor, functools.partial):
        preprocessor = preprocessor.func
    return getattr(preprocessor, "__name__", type(preprocessor).__name__)


def _describe(value: Any, seen: dict[int, Any]) -> str:
    """Returns a text that changes with what a value does, and is the same in every run."""
    if isinstance(value, Tensor):
        value = value.numpy(force=True)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    parts = _parts_of(value)
    if parts is None:
        # The default text of an object has its address, which changes from run to run.
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    if id(value) in seen:
        return "again"
    seen[id(value)] = value  # keeps it alive, or a later value might get its number
    return f"{type(value).__name__}({', '.join(_describe(part, seen) for part in parts)})"


def _parts_of(value: Any) -> Iterable[Any] | None:
    """Returns what a value consists of, None for one that its text describes."""
    match value:
        case types.CodeType():
            return value.co_code, value.co_names, value.co_consts
        case types.FunctionType():
            cells = value.__closure__ or ()
            return value.__code__, value.__defaults__, value.__kwdefaults__, cells
        case types.CellType():
            try:
                return [value.cell_contents]
            except ValueError:  # a variable that is not bound yet
                return []
        case types.MethodType():
            return value.__func__, value.__self__
        case functools.partial():
            return value.func, value.args, value.keywords
        case classmethod() | staticmethod():
            return [value.__func__]
        case property():
            return [value.fget]
        case dict():  # which may have been made from a set
            return sorted(value.items(), key=lambda item: _describe(item[0], {}))
        case set() | frozenset():
            return sorted(value, key=lambda part: _describe(part, {}))
        case list() | tuple():
            return value
        case np.ndarray():
            return value.ravel().tolist()
        case types.ModuleType():
            return [value.__name__]
        case logging.Logger():  # has all loggers of the process among its attributes
            return [value.name]
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return None
    members = [item for kind in type(value).__mro__ for item in vars(kind).items()]
    own = [m for name, m in members if isinstance(m, types.FunctionType) or name[:2] != "__"]
    return type(value), getattr(value, "__name__", ""), own, vars(value)


def _decode_file(path: str | Path, shorter_side: int | None = None) -> Image.Image:
    try:
        return decode(read_regular_file(path)[0], shorter_side)[0]
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{printable(path)}: {error}") from error
