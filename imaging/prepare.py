"""Image files → arrays as the models see them; preprocessors and their fingerprint."""

import functools
import hashlib
import logging
import random
import re
import sys
import sysconfig
import time
import types
from collections.abc import Callable, Iterator, Sequence
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
        raise UnreadableImageError(f"{printable(path)}: {error}") from error


def prepare_image(
    path: str | Path, image_size: int = 224, preprocessors: Sequence[Preprocessor] = ()
) -> np.ndarray:
    """The image in a file as the models see it: uint8 RGB `(image_size, image_size, 3)`.

    Read as by `read_image`, through the preprocessors, shorter side to `round(image_size * 256 /
    224)`, centre crop: what `DatasetBuilder` keeps of it. Raises UnreadableImageError naming the
    file, and ValueError naming a preprocessor that gives no image.
    """
    try:
        image, _ = decode_for(read_regular_file(path)[0], image_size, preprocessors)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{printable(path)}: {error}") from error
    return prepare(image, image_size, preprocessors, path)


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


def shorter_side(image_size: int) -> int:
    """Returns the pixels that the shorter side is scaled to before the crop of `image_size`."""
    return round(image_size * 256 / 224)


def _fit(image: Image.Image, image_size: int) -> Image.Image:
    """Shorter side to `round(image_size * 256 / 224)`, centre crop `image_size`, in one resampling.

    What torchvision's Resize and CenterCrop make of a PIL image, to within one of 255 levels, but
    only the pixels that stay are computed.
    """
    width, height = image.size
    scaled_width, scaled_height = scaled_size(width, height, shorter_side(image_size))
    left, top = round((scaled_width - image_size) / 2), round((scaled_height - image_size) / 2)
    x, y = width / scaled_width, height / scaled_height
    box = (left * x, top * y, (left + image_size) * x, (top + image_size) * y)
    return image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)


def make_thumbnail(image: Image.Image) -> np.ndarray:
    """The whole image as `audit` compares it, whatever its shape: grey, uint8."""
    size = (audit.THUMBNAIL_SIZE, audit.THUMBNAIL_SIZE)
    return np.asarray(image.resize(size, Image.Resampling.BOX).convert("L"))


def decode_for(
    contents: bytes, image_size: int, preprocessors: Sequence[Preprocessor]
) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`: for a preprocessor the original, without one no more than is needed."""
    needed = max(shorter_side(image_size), 2 * audit.THUMBNAIL_SIZE)
    return decode(contents, None if preprocessors else needed)


def prepare(
    image: Image.Image, image_size: int, preprocessors: Sequence[Preprocessor], path: str | Path
) -> np.ndarray:
    """Returns a decoded image as the models see it; ValueError names `path`."""
    if preprocessors:
        try:
            image = Image.fromarray(_preprocess(np.array(image), preprocessors))
        except ValueError as error:
            raise ValueError(f"{error} (on {printable(path)})") from error
    return np.asarray(_fit(image, image_size))


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
        image = as_uint8(result, f"the result of preprocessor {name}")
    return image
