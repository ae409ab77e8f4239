"""Weights to start from: default ones that are downloaded, and files of them."""

import hashlib
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from storage.files import lock, printable
from storage.tensors import check_alike, load_tensors

# Where files of weights have the state dict, and what its names may start with.
CONTAINERS = ("state_dict", "model_state_dict", "model", "model_ema", "teacher")
PREFIXES = ("module", "model", "backbone", "encoder", "_orig_mod")
# Takes a backbone and the tensors of a file, and returns those of the backbone's names and sizes.
Adapt = Callable[[nn.Module, "OrderedDict[str, Any]"], "OrderedDict[str, Any]"]


def download_weights(url: str | None, architecture: str, download: bool = True) -> Path:
    """Returns torch.hub's file of this address, downloaded once by all processes together.

    Raises FileNotFoundError, which says which file to put where, if it is not there and cannot, or
    without `download` may not, be downloaded, and for None in place of an address.
    """
    if url is None:
        raise FileNotFoundError(
            f"{architecture} has no default weights; give a file with --weights FILE, or start "
            "from random weights with --weights none"
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    reason = "not downloaded"
    if download and not path.exists():
        hash_prefix, is_shown = path.stem.rsplit("-", 1)[1], sys.stderr.isatty()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with lock(path.with_name(f".{path.name}.lock")):
                if not path.exists():
                    torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=is_shown)
        except (OSError, RuntimeError) as error:  # the latter for a file of another hash
            reason = str(getattr(error, "reason", error))
    if path.exists():
        return path
    raise FileNotFoundError(
        f"no ImageNet weights for {architecture} ({reason}); download {url} on another machine and "
        f"save it as {path}, or give a file with --weights FILE, or start from random weights with "
        "--weights none"
    )


@dataclass(frozen=True)
class LoadedWeights:
    """Says which weights a backbone started from: the file, its digest, and what of it is used."""

    file: str
    sha256: str  # empty where there is no one file
    summary: str = ""


def load_weights(
    backbone: nn.Module,
    source: Path | Mapping[str, Tensor],
    architecture: str,
    classifier: str = "fc.",
    adapt: Adapt | None = None,
) -> LoadedWeights:
    """Loads a state dict, or a file of one, into a backbone, and says what of it was used.

    In a file it may be a value under one of `CONTAINERS`, and its names may start with any of
    `PREFIXES`; so those of a `model.pth` do. `adapt` gets the backbone and the tensors and returns
    those of its own names and sizes. What belongs to no part of the backbone is left out:
    classifiers, such as names that start with `classifier`. On the meta device, nothing is copied
    but all is checked.

    Raises FileNotFoundError if there is no such file, and ValueError if a tensor of the backbone is
    missing, has another shape or is not finite, or the backbone is a smaller one of its kind.
    """
    contents: Any = source if isinstance(source, Mapping) else load_tensors(source)
    name = architecture if isinstance(source, Mapping) else str(source)
    try:
        tensors, others = _without_prefix(_find_state_dict(contents), backbone)
        tensors = tensors if adapt is None else adapt(backbone, tensors)
        unused = _load(backbone, tensors, classifier)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: not the weights of a {architecture} ({reason})") from error
    left_out = [*others, *unused]
    num_tensors = len(tensors) + len(others)
    summary = (
        f"weights {name}: {num_tensors - len(left_out)} of {num_tensors} tensors loaded into "
        f"{architecture}; left out: {_shorten(left_out)}"
    )
    if isinstance(source, Mapping):
        return LoadedWeights(name, "", summary)
    return LoadedWeights(source.name, file_digest(source), summary)


def file_digest(path: str | Path) -> str:
    """Returns the SHA-256 of a file in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_state_dict(contents: Any) -> Mapping[str, Any]:
    """Returns the state dict that contents of a file are, or hold under one of `CONTAINERS`."""
    if isinstance(contents, Mapping):
        inner = (contents[key] for key in CONTAINERS if isinstance(contents.get(key), Mapping))
        contents = next(inner, contents)
    if not isinstance(contents, Mapping) or not all(isinstance(name, str) for name in contents):
        raise ValueError("not a dict of named tensors")
    return contents


def _without_prefix(
    found: Mapping[str, Any], backbone: nn.Module
) -> tuple["OrderedDict[str, Any]", list[str]]:
    """Returns the tensors below the prefix with most names of the backbone, and the other names."""
    expected = backbone.state_dict().keys()
    prefixes = {""}
    for name in found:
        start = ""
        for part in name.split("."):
            if part not in PREFIXES:
                break
            start += f"{part}."
            prefixes.add(start)

    def num_known(prefix: str) -> int:
        return sum(prefix + name in found for name in expected)

    prefix = max(sorted(prefixes, key=len), key=num_known)
    own = {n.removeprefix(prefix): tensor for n, tensor in found.items() if n.startswith(prefix)}
    tensors = OrderedDict(own)
    # The versions of its modules, by which torch knows names of earlier ones.
    versions = getattr(found, "_metadata", None)
    if isinstance(versions, Mapping):
        vars(tensors)["_metadata"] = {
            f"{layer}.".removeprefix(prefix).removesuffix("."): {"version": of_layer["version"]}
            for layer, of_layer in versions.items()
            if isinstance(of_layer, dict) and isinstance(of_layer.get("version"), int)
        }
    return tensors, [name for name in found if not name.startswith(prefix)]


def _load(backbone: nn.Module, tensors: Mapping[str, Any], classifier: str) -> list[str]:
    """Loads tensors of a backbone's own names; returns the names of those that it has no use for.

    Raises ValueError or RuntimeError if they do not fit.
    """
    expected = backbone.state_dict()
    common = tensors.keys() & expected.keys()
    check_alike({name: tensors[name] for name in common}, {n: expected[n] for n in common}, "file")
    constants = {name for name in expected if is_constant(name, expected[name])}
    own = OrderedDict((n, tensor) for n, tensor in tensors.items() if n not in constants)
    vars(own).update(vars(tensors))  # with the versions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on the meta device, of copies not made
        result = backbone.load_state_dict(own, strict=False)
    missing = [name for name in result.missing_keys if name not in constants]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(f"{_shorten(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    parts = {name.split(".")[0] for name in expected}
    foreign = [
        name
        for name in result.unexpected_keys
        if name.split(".")[0] in parts
        and not name.startswith(classifier)
        and not _is_removed(backbone, name.rpartition(".")[0])
    ]
    if foreign:
        raise ValueError(f"it has {_shorten(foreign)} besides")
    return result.unexpected_keys


def is_constant(name: str, tensor: Tensor) -> bool:
    """Returns whether a tensor of a state dict is a table that follows from the architecture."""
    return not tensor.is_floating_point() and not name.endswith("num_batches_tracked")


def _is_removed(backbone: nn.Module, layer: str) -> bool:
    """Returns whether this layer, here an identity, was taken out of the backbone."""
    return any(n == layer and type(m) is nn.Identity for n, m in backbone.named_modules())


def _shorten(names: Sequence[str]) -> str:
    """Returns some names in words: the first three, and how many more."""
    shown = [printable(name)[:80] for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(shown) or "none") + more
