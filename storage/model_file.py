"""What a `model.pth` holds beside the weights, and how it is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from evaluation import Calibration
from imaging.lesions import is_malignant
from storage.tensors import check_alike, is_number, load_tensors, save_tensors

MAX_IMAGE_SIZE = 8192  # pixels on a side that a model.pth may ask for

_NOT_GIVEN: list[str] = []  # in place of class names that the file does not have


@dataclass(frozen=True, eq=False)
class ModelInfo(Mapping[str, Any]):
    """Holds all that is in a `model.pth` but the weights.

    It is a mapping too: `info["classes"]` is `info.classes`. Keys that a later version of the
    project has added to the file are in `others` and in the mapping; what earlier versions did not
    write has a default without effect.

    Attributes
    ----------
    config : the arguments of `get_model` that rebuild the model
    classes : names in label order
    image_size : side of the images in pixels
    preprocessors : fingerprint of the user's preprocessors; empty for none
    precision : "fp32", "bf16" or "fp16", in which it was trained; empty if unknown
    metrics : of the best evaluation on the validation images
    temperature, bias : of the `calibration`; 1 and zeros change nothing
    thresholds : of calibrated probabilities, by what is screened for and by aim
    malignant_classes : names; their probabilities add up to that of `malignant`
    unknown_classes : names that are counted neither as malignant nor as benign
    """

    config: dict[str, Any]
    classes: list[str]
    image_size: int
    preprocessors: str = ""
    precision: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    bias: list[float] = field(default_factory=list)
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    malignant_classes: list[str] = field(default_factory=lambda: _NOT_GIVEN)
    unknown_classes: list[str] = field(default_factory=lambda: _NOT_GIVEN)
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bias == []:
            object.__setattr__(self, "bias", [0.0] * len(self.classes))
        # Earlier versions wrote neither, or counted all other classes as benign; now only those are
        # that are known to be.
        if self.malignant_classes is _NOT_GIVEN:
            malignant = [name for name in self.classes if is_malignant(name)]
            object.__setattr__(self, "malignant_classes", malignant)
        if self.unknown_classes is _NOT_GIVEN:
            others = [name for name in self.classes if name not in self.malignant_classes]
            doubtful = [name for name in others if is_malignant(name) is not False]
            object.__setattr__(self, "unknown_classes", doubtful)

    @classmethod
    def from_contents(cls, contents: Mapping[str, Any]) -> "ModelInfo":
        """Returns what these contents of a file say; raises ValueError if they are inconsistent."""
        classes = contents["classes"]
        if not _are_names(classes) or len(set(classes)) < len(classes):
            raise ValueError("classes must be a list of different names")
        names = {each.name for each in fields(cls)} - {"others"}
        known = {name: contents[name] for name in names & contents.keys()}
        others = {n: contents[n] for n in contents if n not in names | {"state_dict"}}
        info = cls(**known, others=others)
        _check_info(info)
        return info

    def save(self, path: str | Path, state_dict: Mapping[str, Tensor]) -> None:
        """Writes a `model.pth` of these weights, whole or not at all, for `load_model`."""
        save_tensors(path, {**self, "state_dict": dict(state_dict)})

    @property
    def calibration(self) -> Calibration:
        """Returns how the model's probabilities are calibrated."""
        return Calibration(float(self.temperature), tuple(map(float, self.bias)))

    def _as_dict(self) -> dict[str, Any]:
        return {n: value for n, value in vars(self).items() if n != "others"} | self.others

    def __getitem__(self, name: str) -> Any:
        return self._as_dict()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._as_dict())

    def __len__(self) -> int:
        return len(self._as_dict())


def read_model_file(path: str | Path) -> dict[str, Any]:
    """Returns the contents of a `model.pth`; raises ValueError when a part is missing."""
    contents = load_tensors(path)
    found = set(contents) if isinstance(contents, dict) else set()
    missing = sorted({"config", "classes", "image_size", "state_dict"} - found)
    if missing:
        raise ValueError(f"{path}: not a model of this project ({', '.join(missing)} missing)")
    return contents


def _check_info(info: ModelInfo) -> None:
    """Raises ValueError unless what a `model.pth` says fits together, its classes being names."""
    for name in ("config", "metrics", "thresholds"):
        if not isinstance(info[name], dict):
            raise ValueError(f"{name} is not a dict")
    config, num_classes = info.config, len(info.classes)
    if not {"name", "num_classes", "image_size"} <= config.keys():
        raise ValueError("config has no name, num_classes or image_size")
    if type(config["num_classes"]) is not int or config["num_classes"] != num_classes:
        raise ValueError(f"the file has {num_classes} classes, but num_classes of config differs")
    for size in (info.image_size, config["image_size"]):
        if type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE:
            raise ValueError(f"image_size must be a whole number from 1 to {MAX_IMAGE_SIZE:,}")
    if config["name"] == "simple_cnn" and info.image_size != config["image_size"]:
        raise ValueError(f"image_size is {info.image_size}, but {config['image_size']} in config")
    check_alike(config.get("dropout_rate", 0.0), 0.0, "dropout_rate of config")
    check_alike([info.preprocessors, info.precision], ["", ""], "preprocessors, precision")
    check_alike(info.temperature, 1.0, "temperature")
    check_alike(info.bias, [0.0] * num_classes, "bias")
    if not 1e-3 <= info.temperature <= 1e3:  # training fits temperatures from 1/20 to 20
        raise ValueError("temperature must be from 0.001 to 1000")
    for name in ("malignant_classes", "unknown_classes"):
        if not _are_names(info[name]) or not set(info[name]) <= set(info.classes):
            raise ValueError(f"{name} must be a list of some of the classes")
    for name, aims in info.thresholds.items():
        # Just above 1 is the threshold that nothing reaches.
        if (
            not isinstance(aims, dict)
            or not _are_names([name, *aims])
            or not all(is_number(value) and 0 <= value <= 1 + 1e-9 for value in aims.values())
        ):
            raise ValueError(f"thresholds of {str(name)[:80]!r} must be numbers from 0 to 1 by aim")


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
