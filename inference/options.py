"""The options of a prediction, and what is checked of them before the work; without torch."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storage.files import printable

if TYPE_CHECKING:
    import torch

    from imaging.prepare import Preprocessor


NUM_VIEWS = 8  # flips and quarter-turns of a square
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """How images are predicted; `predict.predict` describes each option.

    Raises ValueError for a value out of range, and ValueError or FileNotFoundError for an `output`
    that cannot be written.
    """

    output: str | Path | None = None
    tta: int = 1
    gradcam: str | Path | None = None
    thresholds: Mapping[str, float] | None = None
    preprocessors: "Sequence[Preprocessor]" = ()
    device: "torch.device | str | None" = None
    precision: str = "auto"
    batch_size: int = 32
    num_workers: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.tta <= NUM_VIEWS:
            raise ValueError(f"tta must be from 1 to {NUM_VIEWS}, not {self.tta}")
        for name in ("batch_size", "num_workers"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}")
        if self.output is not None:
            check_file_to_write(self.output, (".csv", ".json"))


def check_file_to_write(path: str | Path, suffixes: Sequence[str]) -> None:
    """Raises ValueError or FileNotFoundError for a file that could not be written at the end."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: the file name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no folder {path.parent}")


def find_model(path: str | os.PathLike[str]) -> str:
    """Returns the file of a model: `path` itself, or the `model.pth` in that folder or below it.

    Raises FileNotFoundError for a folder without a `model.pth`, and ValueError for one that has
    none itself and several below.
    """
    folder = Path(path)
    if not folder.is_dir():
        return os.fspath(path)
    if (folder / "model.pth").is_file():
        return str(folder / "model.pth")
    found = sorted(file for file in folder.rglob("model.pth") if file.is_file())
    if not found:
        raise FileNotFoundError(f"{printable(folder)}: no model.pth in this folder or below it")
    if len(found) > 1:
        names = ", ".join(printable(file.parent) for file in found)
        raise ValueError(
            f"{printable(folder)} has {len(found)} models; choose one, or name each for an "
            f"ensemble: {names}"
        )
    return str(found[0])


def as_list(paths: Paths) -> list[str]:
    """Returns one path or several as a list of strings."""
    return [os.fspath(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
