"""Weights to start from: default ones that are downloaded, and files of them."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from storage.files import lock
from storage.tensors import check_alike, load_tensors


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


def load_weights(backbone: nn.Module, path: Path, architecture: str, classifier: str) -> None:
    """Loads the state dict in a file, without the names that start with `classifier`.

    Raises FileNotFoundError if there is no such file, and ValueError if it does not fit.
    """
    weights, expected = load_tensors(path), backbone.state_dict()
    try:
        if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
            raise ValueError("not a dict of named tensors")
        own = {name: tensor for name, tensor in weights.items() if not name.startswith(classifier)}
        # Checks what is in both; of what is missing or unexpected torch knows what may be.
        common = own.keys() & expected.keys()
        check_alike({name: own[name] for name in common}, {n: expected[n] for n in common}, "file")
        backbone.load_state_dict(own)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not the weights of a {architecture} ({reason})") from error
