"""Tensors in files: written whole, read safely from anywhere."""

import io
import math
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from storage.files import is_utf8, write_atomically

# What torch.save names when it writes tensors and plain values. torch.load takes more, of which
# some ask for memory that no byte of the file pays for, such as bytearray(10**12).
KNOWN_NAMES = {
    "collections Counter",
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
}
KNOWN_TYPES = "BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short"
KNOWN_NAMES |= {f"torch {kind}Storage" for kind in KNOWN_TYPES}
MAX_PICKLED_BYTES = 16 * 2**20  # a checkpoint of ResNet-50 has 0.2 MB beside its tensors
MAX_VALUES = 1_000_000
MAX_DEPTH = 30


def save_tensors(path: str | Path, contents: dict[str, Any]) -> None:
    """Writes a dict of tensors and plain values to `path`, whole or not at all.

    Raises OSError, which says how many bytes are needed, when the disk does not take them.
    """
    with write_atomically(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(contents, file)
        except (OSError, RuntimeError) as error:
            # Where torch's own error follows that of the disk, it does not repeat the reason.
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):
                raise
            needed = f"{_num_bytes(contents) / 1e6:,.1f} MB are needed"
            raise OSError(reason.errno, f"{reason.strerror}; {needed}", str(path)) from error


def load_tensors(path: str | Path) -> Any:
    """Returns the tensors and plain values in a file, on the CPU; no code in it is ever run.

    All tensors are dense and have their bytes in the file: a small one takes little memory and
    time, whatever it claims. Their numbers may be anything, see `check_alike`.

    Raises FileNotFoundError when there is no such file, and ValueError when it is not a file of
    tensors, is damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        what = " is a folder, not a model file" if path.is_dir() else ": no such file"
        raise FileNotFoundError(f"{path}{what}")
    with path.open("rb") as file:  # here a file without permission to read is an OSError
        start = file.read(MAX_PICKLED_BYTES)
    is_zip = start.startswith(b"PK\x03\x04")
    try:
        # Before version 1.6, torch.save put all that is not a tensor at the start of the file.
        _check_names(io.BytesIO(_read_pickle(path) if is_zip else start))
        # Mapped, a storage cannot be larger than the file; torch 2.6 would read beyond its end.
        can_be_mapped = is_zip and is_utf8(path)
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
        _check_values(contents, path.stat().st_size)
    except Exception as error:  # torch.load documents no closed set of errors for damaged files
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a model file ({reason})") from error
    return contents


def check_alike(found: Any, expected: Any, name: str) -> None:
    """Raises ValueError, which says where, unless `found` can take the place of `expected`.

    Dicts must have the same keys and lists the same length. A tensor must have the same shape, be
    floating-point or not as `expected` is, and be finite; a number must be a number, and finite if
    `expected` is. Anything can take the place of None.
    """
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor):
            raise ValueError(f"{name} is not a tensor")
        if found.shape != expected.shape:
            raise ValueError(f"{name} has shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        if found.is_floating_point() != expected.is_floating_point():
            raise ValueError(f"{name} is {found.dtype}, not {expected.dtype}")
        # As it will be used: what float64 holds can be too large for float32.
        if not found.to(expected.dtype).isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
    elif isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} is not a dict")
        missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
        if missing or unknown:
            key = min(map(str, missing or unknown))[:80]
            raise ValueError(f"{name} {'lacks' if missing else 'has an unknown'} {key}")
        for key, value in expected.items():
            check_alike(found[key], value, f"{name} {key}")
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            raise ValueError(f"{name} is not a list of {len(expected)}")
        for number, pair in enumerate(zip(found, expected, strict=True)):
            check_alike(*pair, f"{name} {number}")
    elif is_number(expected):
        if not is_number(found) or (math.isfinite(expected) and not math.isfinite(found)):
            raise ValueError(f"{name} is not a finite number")
    elif expected is not None and type(found) is not type(expected):
        raise ValueError(f"{name} is a {type(found).__name__}, not a {type(expected).__name__}")


def is_number(value: Any) -> bool:
    """Returns whether a value is an int of 64 bits, but not a bool, or a float other than NaN."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float) and not math.isnan(value)


def _read_pickle(path: Path) -> bytes:
    """Returns what a zip of torch.save holds beside the tensors; raises when it is damaged.

    torch.load checks no sums, and inflates what torch.save would not have compressed.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it claims more bytes than it has")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        pickles = [e for e in entries if e.filename.lower().endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip file that torch.save did not write")
        if pickles[0].file_size > MAX_PICKLED_BYTES:
            raise ValueError("it has too much data beside the tensors")
        return archive.read(pickles[0])


def _check_names(pickled: io.BytesIO) -> None:
    """Raises when unpickling would use anything but what files of tensors need."""
    size = len(pickled.getbuffer())
    for _ in range(5):  # an old file has as many pickles, one after the other; a new one has one
        if pickled.tell() == size:
            return
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STACK_GLOBAL":
                raise ValueError("it uses a pickle format that torch.save does not")
            if opcode.name in ("GLOBAL", "INST") and argument not in KNOWN_NAMES:
                shown = ascii(str(argument).replace(" ", "."))[1:-1][:80]
                raise ValueError(f"it refers to {shown}, which no model needs")


def _check_values(contents: Any, max_bytes: int) -> None:
    """Raises for anything but tensors and plain values, and for tensors larger than the file.

    A value that holds others many times over, or itself, counts as many values, or as too deep.
    """
    waiting, number = [(contents, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        number += 1
        if number > MAX_VALUES:
            raise ValueError(f"it holds more than {MAX_VALUES:,} values")
        if depth > MAX_DEPTH:
            raise ValueError("its values are nested too deeply")
        if isinstance(value, Mapping):
            waiting += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list | tuple):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > min(storage, max_bytes):
                raise ValueError("a tensor is larger than its data")
        elif value is not None and not isinstance(value, bool | int | float | str):
            raise ValueError(f"it contains a {type(value).__name__}")


def _num_bytes(contents: Any) -> int:
    """Returns the bytes of all tensors in nested dicts."""
    if isinstance(contents, Mapping):
        return sum(map(_num_bytes, contents.values()))
    return getattr(contents, "nbytes", 0)
