"""The classifiers, behind `get_model` and `load_model`, and what a `model.pth` holds.

Every model takes float32 images `(B, 3, H, W)` in [0, 1], normalises them itself as its backbone
needs, and gives float32 logits `(B, num_classes)`. Its `config` holds the arguments of `get_model`
that rebuild it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, resnet18, resnet34, resnet50

from evaluation import Calibration
from imaging.lesions import is_malignant
from storage.files import did_you_mean
from storage.tensors import check_alike, is_number, load_tensors, save_tensors
from storage.weights import download_weights, load_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_IMAGE_SIZE = 8192  # pixels on a side that a model.pth may ask for
LARGEST_IMAGE = MAX_IMAGE_SIZE  # its former name
RESNETS = {18: resnet18, 34: resnet34, 50: resnet50}
STARTS = ("scratch", "head", "finetuned")


@dataclass(frozen=True)
class Backbone:
    """Describes a backbone: how it is built, its weights, its input and its feature maps."""

    build: Callable[[], tuple[nn.Module, int]]  # gives a module to features `(B, F)`, and F
    feature_maps: tuple[tuple[str, int], ...] = ()  # layers and their strides, the last first
    weights_url: str | None = None  # of the default weights, a state dict
    classifier: str = "fc."  # prefix of those of its names that are left out
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of RGB in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD


def _build_resnet(layers: int) -> tuple[nn.Module, int]:
    backbone = RESNETS[layers](weights=None)
    num_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone, num_features


# `get_model` knows each entry as <name>_scratch, <name>_head and <name>_finetuned.
BACKBONES = {
    f"resnet{layers}": Backbone(
        build=partial(_build_resnet, layers),
        feature_maps=(("layer4", 32), ("layer3", 16), ("layer2", 8), ("layer1", 4)),
        weights_url=get_model_weights(f"resnet{layers}").DEFAULT.url,
    )
    for layers in RESNETS
}


class ClassificationHead(nn.Sequential):
    """Classifies features by three dense layers, of 256, 128 and `num_classes` outputs."""

    def __init__(self, in_features: int, num_classes: int, dropout_rate: float) -> None:
        super().__init__(
            nn.Linear(in_features, 256),
            nn.ReLU(),
            nn.Dropout(dropout_rate),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Dropout(dropout_rate),
            nn.Linear(128, num_classes),
        )


def _of_channels(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


class LesionClassifier(nn.Module):
    """Joins a backbone, from normalised images to features `(B, F)`, to the common head.

    `mean`, `std` and `feature_maps` are those of `Backbone`.
    """

    is_frozen = False  # whether the backbone stays as it is, batch-norm statistics included
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        in_features: int,
        num_classes: int,
        dropout_rate: float,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        feature_maps: tuple[tuple[str, int], ...] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ClassificationHead(in_features, num_classes, dropout_rate)
        self.config: dict[str, Any] = {}
        self.feature_maps = feature_maps
        self.normalization = (mean, std)
        self.register_buffer("mean", _of_channels(mean), persistent=False)
        self.register_buffer("std", _of_channels(std), persistent=False)

    def train(self, mode: bool = True) -> "LesionClassifier":
        """Sets the training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()
        return self

    def feature_map_layer(self, image_size: int, min_map_size: int = 1) -> nn.Module:
        """Returns the last layer whose maps of such images have `min_map_size` places on a side.

        Without any, it is the first layer with maps. Raises ValueError for a backbone that names
        no layers with maps.
        """
        if not self.feature_maps:
            raise ValueError("the backbone of this model names no layer with feature maps")
        large = (name for name, stride in self.feature_maps if image_size / stride >= min_map_size)
        return self.backbone.get_submodule(next(large, self.feature_maps[-1][0]))

    def features(self, images: Tensor) -> Tensor:
        """Returns the features `(B, F)` of images `(B, 3, H, W)` in [0, 1]."""
        with torch.no_grad() if self.is_frozen else contextlib.nullcontext():
            return self.backbone((images - self.mean) / self.std)

    def forward(self, images: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Returns the logits `(B, num_classes)` of images in [0, 1], or of their features."""
        if images is not None:
            features = self.features(images)
        if features is None:
            raise TypeError("the model takes images, or their features")
        # With the eight bits of bf16's mantissa, different logits would become equal.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())


class SimpleCNN(LesionClassifier):
    """Classifies by two convolutions with average pooling: the baseline.

    Stride 2 in both 5 x 5 convolutions gives the published 3.4 million parameters at 224 pixels.
    """

    def __init__(self, num_classes: int, dropout_rate: float = 0.7, image_size: int = 224) -> None:
        # The two convolutions of stride 2 round up, the two poolings round down.
        side = ((image_size + 1) // 2 // 2 + 1) // 2 // 2
        if side < 1:
            raise ValueError(f"image_size must be at least 11 for SimpleCNN, not {image_size}")
        backbone = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=5, stride=2, padding=2),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, kernel_size=5, stride=2, padding=2),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * side * side, 256),
            nn.ReLU(),
        )
        super().__init__(backbone, 256, num_classes, dropout_rate, feature_maps=(("4", 8),))
        self.image_size = image_size

    def features(self, images: Tensor) -> Tensor:
        """Returns the features `(B, 256)` of images of the size that the model is made for."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this SimpleCNN takes images of {self.image_size} pixels on a side, not "
                f"{tuple(images.shape[-2:])}; call get_model with the image_size of the data"
            )
        return super().features(images)


class BackboneClassifier(LesionClassifier):
    """Classifies by a backbone of `BACKBONES`.

    `start` is "scratch" (random weights), "finetuned" (pretrained) or "head" (pretrained and
    frozen). `weights` is "imagenet" (the backbone's default weights), the path of a state dict, or
    None for random weights.
    """

    def __init__(
        self,
        backbone: str,
        start: str,
        num_classes: int,
        dropout_rate: float = 0.7,
        weights: str | Path | None = "imagenet",
    ) -> None:
        entry = BACKBONES[backbone]
        module, num_features = entry.build()
        of_entry = (entry.mean, entry.std, entry.feature_maps)
        super().__init__(module, num_features, num_classes, dropout_rate, *of_entry)
        if start != "scratch" and weights is not None:
            if weights == "imagenet":
                weights = download_weights(entry.weights_url, backbone)
            load_weights(module, Path(weights), backbone, entry.classifier)
        self.is_frozen = start == "head"
        if self.is_frozen:
            module.requires_grad_(False).eval()


class ResNetFromScratch(BackboneClassifier):
    """Classifies by a ResNet (He et al. 2015) that starts from random weights."""

    def __init__(self, num_classes: int, layers: int = 50, dropout_rate: float = 0.7) -> None:
        super().__init__(f"resnet{layers}", "scratch", num_classes, dropout_rate)


class FinetunedResNet(BackboneClassifier):
    """Classifies by a ResNet that starts from pretrained weights; see `BackboneClassifier`."""

    start = "finetuned"

    def __init__(
        self,
        num_classes: int,
        layers: int = 50,
        dropout_rate: float = 0.7,
        weights: str | Path | None = "imagenet",
    ) -> None:
        super().__init__(f"resnet{layers}", self.start, num_classes, dropout_rate, weights)


class FinetunedHeadResNet(FinetunedResNet):
    """Classifies by a pretrained ResNet that stays as it is, batch-norm statistics included."""

    start = "head"


MODELS: dict[str, Callable[..., LesionClassifier]] = {
    "simple_cnn": SimpleCNN,
    "resnet_scratch": ResNetFromScratch,
    "resnet_head": FinetunedHeadResNet,
    "resnet_finetuned": FinetunedResNet,
}


def get_model(
    name: str,
    num_classes: int,
    *,
    layers: int = 50,
    dropout_rate: float = 0.7,
    weights: str | Path | None = "imagenet",
    image_size: int = 224,
    seed: int | None = None,
) -> LesionClassifier:
    """Returns the classifier of the given name: one of `MODELS`, or `<backbone>_<start>`.

    `<backbone>` is one of `BACKBONES`, `<start>` is scratch, finetuned or head, for which
    `BackboneClassifier` describes `weights`; models that start from random weights ignore
    "imagenet". `layers` is the depth of the ResNets in `MODELS`, `image_size` the side in pixels of
    the images that SimpleCNN is made for. With a `seed`, random weights depend on `(seed, name)`
    alone and the global random state stays as it was; without, they are drawn from it.

    Raises ValueError for an unknown name, depth or dropout rate, fewer than two classes, weights
    that do not fit, or a path of weights for a model that starts from random ones, and
    FileNotFoundError when the weights are not there and cannot be downloaded.

    >>> get_model("simple_cnn", num_classes=9)(torch.rand(2, 3, 224, 224)).shape
    torch.Size([2, 9])
    """
    check_model_name(name)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, not {num_classes}")
    if layers not in RESNETS:
        raise ValueError(f"layers must be 18, 34 or 50, not {layers}")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate must be at least 0 and less than 1, not {dropout_rate}")
    if not is_pretrained(name) and weights not in ("imagenet", None):
        raise ValueError(f"{name} starts from random weights; it cannot use {weights}")

    # Weights are drawn on the CPU, so its generator alone is set and put back.
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            entropy = np.random.SeedSequence([seed, *name.encode()])
            torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
        if name == "simple_cnn":
            model: LesionClassifier = SimpleCNN(num_classes, dropout_rate, image_size)
        elif name in MODELS:
            more = {"weights": weights} if is_pretrained(name) else {}
            model = MODELS[name](num_classes, layers, dropout_rate, **more)
        else:
            backbone, start = name.rsplit("_", 1)
            model = BackboneClassifier(backbone, start, num_classes, dropout_rate, weights)
    model.config = {
        "name": name,
        "num_classes": num_classes,
        "layers": layers,
        "dropout_rate": dropout_rate,
        "weights": None,  # a checkpoint brings the trained ones
        "image_size": image_size,
    }
    return model


def check_model_name(name: str) -> None:
    """Raises ValueError, with the nearest known names, unless `get_model` knows the name."""
    known = [*MODELS, *(f"{backbone}_{start}" for backbone in BACKBONES for start in STARTS)]
    if name not in known:
        shown, otherwise = str(name)[:80], f"the common models are {', '.join(MODELS)}"
        suggestion = did_you_mean(shown, known, otherwise)
        raise ValueError(f"unknown model {shown!r}; {suggestion}")


def is_pretrained(name: str) -> bool:
    """Returns whether the model of this name starts from pretrained weights."""
    return name.endswith(("_head", "_finetuned"))


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


def load_model(path: str | Path) -> tuple[LesionClassifier, ModelInfo]:
    """Returns the trained model in a `model.pth`, on the CPU in evaluation mode, and its info.

    Raises FileNotFoundError when there is no such file, and ValueError when it is not a
    `model.pth`, its weights are not finite, or its contents are inconsistent.
    """
    contents = load_tensors(path)
    found = set(contents) if isinstance(contents, dict) else set()
    missing = sorted({"config", "classes", "image_size", "state_dict"} - found)
    if missing:
        raise ValueError(f"{path}: not a model of this project ({', '.join(missing)} missing)")
    try:
        info = ModelInfo.from_contents(contents)
        return _restored(info.config, contents["state_dict"]).eval(), info
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # get_model's of a config
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot load this model ({reason})") from error


def _restored(config: dict[str, Any], weights: Any) -> LesionClassifier:
    """Returns the model that a config describes, with these weights."""
    # On the meta device, sizes that a config claims take no time and no memory. `weights` is None,
    # as a config must not make another file be read or downloaded.
    with torch.device("meta"):
        model = get_model(**config | {"weights": None, "seed": 0})
    check_alike(weights, model.state_dict(), "state_dict")
    for name, tensor in weights.items():
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"state_dict {name} has negative variances")
    # Copied, as tensors that were read are mapped from the file and may share memory.
    model.to_empty(device="cpu").load_state_dict(weights)
    model.mean, model.std = map(_of_channels, model.normalization)
    return model


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


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode; at the end, or if the block raises, each module has its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def count_parameters(model: nn.Module, trainable_only: bool = False) -> int:
    """Returns the number of parameters, or of those alone that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


def imagenet_weights(layers: int, download: bool = True) -> Path:
    """Returns the file of torchvision's default weights for a ResNet; see `download_weights`."""
    backbone = f"resnet{layers}"
    return download_weights(BACKBONES[backbone].weights_url, backbone, download)
