"""The classifiers, behind `get_model` and `load_model`, and what a `model.pth` holds.

Every model takes float32 images `(B, 3, H, W)` in [0, 1], normalises them itself as its backbone
needs, and gives float32 logits `(B, num_classes)`. Its `config` holds the arguments of `get_model`
that rebuild it.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, resnet18, resnet34, resnet50

from learning.backbones import (
    EFFICIENTNET_LITE0,
    IMAGENET_MEAN,
    IMAGENET_STD,
    TIMM,
    Backbone,
    timm_backbone,
    torchvision_backbones,
)
from storage.files import did_you_mean
from storage.model_file import MAX_IMAGE_SIZE as MAX_IMAGE_SIZE
from storage.model_file import ModelInfo, read_model_file
from storage.tensors import check_alike
from storage.weights import LoadedWeights, download_weights, is_constant, load_weights

LARGEST_IMAGE = MAX_IMAGE_SIZE  # its former name
RESNETS = {18: resnet18, 34: resnet34, 50: resnet50}
STARTS = ("scratch", "head", "finetuned")


def _build_resnet(layers: int) -> tuple[nn.Module, int]:
    backbone = RESNETS[layers](weights=None)
    num_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone, num_features


# `get_model` knows each entry as <name>_scratch, <name>_head and <name>_finetuned.
BACKBONES: dict[str, Backbone] = torchvision_backbones() | {
    "efficientnet_lite0": EFFICIENTNET_LITE0,
    **{
        f"resnet{layers}": Backbone(
            build=partial(_build_resnet, layers),
            feature_maps=(("layer4", 32), ("layer3", 16), ("layer2", 8), ("layer1", 4)),
            weights_url=get_model_weights(f"resnet{layers}").DEFAULT.url,
        )
        for layers in RESNETS
    },
}


def find_backbone(name: str) -> Backbone:
    """Returns the entry of `BACKBONES` with this name, or timm's for `timm/<name>`."""
    return timm_backbone(name) if name.startswith(TIMM) else BACKBONES[name]


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
    image_size: int | None = None  # the side of the images that it is made for; None for any
    cpu_training_precision = ""  # as that of `Backbone`
    loaded_weights: LoadedWeights | None = None  # what the backbone started from
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
        self.found_layers: dict[tuple[int, ...], str] = {}  # see `inference.feature_maps`
        self.normalization = (mean, std)
        self.register_buffer("mean", _of_channels(mean), persistent=False)
        self.register_buffer("std", _of_channels(std), persistent=False)

    def train(self, mode: bool = True) -> "LesionClassifier":
        """Sets the training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], *more: Any, **options: Any) -> Any:
        """Loads weights as torch does; without versions of the layers, as of their present ones."""
        if not hasattr(state_dict, "_metadata"):
            state_dict = OrderedDict(state_dict)
            vars(state_dict).update(vars(self.state_dict()))
        return super().load_state_dict(state_dict, *more, **options)

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
        """Returns the features `(B, F)` of images `(B, 3, H, W)` in [0, 1].

        Raises ValueError for images of another size than the one that the model is made for.
        """
        if self.image_size is not None and images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this {type(self).__name__} takes images of {self.image_size} pixels on a side, "
                f"not {tuple(images.shape[-2:])}; call get_model with the image_size of the data"
            )
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


class BackboneClassifier(LesionClassifier):
    """Classifies by a backbone of `BACKBONES`, or of timm.

    `start` is "scratch" (random weights), "finetuned" (pretrained) or "head" (pretrained and
    frozen). `weights` is "imagenet" (the backbone's default weights), the path of a file as
    `load_weights` reads it, or None for random weights. `image_size` matters to backbones that are
    built for one size.
    """

    def __init__(
        self,
        backbone: str,
        start: str,
        num_classes: int,
        dropout_rate: float = 0.7,
        weights: str | Path | None = "imagenet",
        image_size: int = 224,
    ) -> None:
        entry = find_backbone(backbone)
        size = (image_size,) if entry.takes_image_size else ()
        module, num_features = entry.build(*size)
        of_entry = (entry.mean, entry.std, entry.feature_maps)
        super().__init__(module, num_features, num_classes, dropout_rate, *of_entry)
        if size:
            self.image_size = image_size
        self.cpu_training_precision = entry.cpu_training_precision
        if start != "scratch" and weights is not None:
            self.loaded_weights = _load_weights(module, backbone, weights, image_size)
        self.is_frozen = start == "head"
        if self.is_frozen:
            module.requires_grad_(False).eval()


def _load_weights(
    module: nn.Module, backbone: str, weights: str | Path, image_size: int
) -> LoadedWeights:
    entry = find_backbone(backbone)
    source: Any = weights if weights == "imagenet" else Path(weights)
    if weights == "imagenet" and entry.find_weights is not None:
        source = entry.find_weights(image_size)
    elif weights == "imagenet":
        source = download_weights(entry.weights_url, backbone)
    return load_weights(module, source, backbone, entry.classifier, entry.adapt)


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

    `<backbone>` is one of `BACKBONES`, or `timm/` and a name of timm's; `<start>` is scratch,
    finetuned or head, for which `BackboneClassifier` describes `weights`; models that start from
    random weights ignore "imagenet". `layers` is the depth of the ResNets in `MODELS`, `image_size`
    the side in pixels of the images, for SimpleCNN and vision transformers, which take one size.
    With a `seed`, random weights depend on `(seed, name)` alone and the global random state stays
    as it was; without, they are drawn from it.

    Raises ValueError for an unknown name, depth or dropout rate, fewer than two classes, weights
    that do not fit, an image size that the model cannot have, or a path of weights for a model that
    starts from random ones; FileNotFoundError when the weights are not there and cannot be
    downloaded; and ModuleNotFoundError for a model of timm without timm.

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
            of_start = (dropout_rate, weights, image_size)
            model = BackboneClassifier(backbone, start, num_classes, *of_start)
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
    """Raises ValueError, with the nearest known names, unless `get_model` knows the name.

    For a model of timm it is a ModuleNotFoundError where timm is not installed.
    """
    backbone, _, start = str(name).rpartition("_")
    if backbone.startswith(TIMM) and start in STARTS:
        timm_backbone(backbone)
        return
    known = [*MODELS, *(f"{backbone}_{start}" for backbone in BACKBONES for start in STARTS)]
    if name not in known:
        shown, otherwise = str(name)[:80], f"the common models are {', '.join(MODELS)}"
        suggestion = did_you_mean(shown, known, otherwise)
        raise ValueError(f"unknown model {shown!r}; {suggestion}")


def is_pretrained(name: str) -> bool:
    """Returns whether the model of this name starts from pretrained weights."""
    return name.endswith(("_head", "_finetuned"))


def load_model(path: str | Path) -> tuple[LesionClassifier, ModelInfo]:
    """Returns the trained model in a `model.pth`, on the CPU in evaluation mode, and its info.

    Raises FileNotFoundError when there is no such file, and ValueError when it is not a
    `model.pth`, its weights are not finite, or its contents are inconsistent.
    """
    contents = read_model_file(path)
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
    # Tables that follow from the architecture are not taken from the file, and some are not in it.
    names = model.state_dict()
    tables = [name for name in names if is_constant(name, names[name])]
    others = {name for name, _ in model.named_buffers()} - names.keys() - {"mean", "std"}
    if tables or others:
        model = get_model(**config | {"weights": None, "seed": 0})
        weights = {**weights} | {name: model.state_dict()[name] for name in tables}
    else:
        model.to_empty(device="cpu")
        model.mean, model.std = map(_of_channels, model.normalization)
    # Copied, as tensors that were read are mapped from the file and may share memory.
    model.load_state_dict({**weights})
    return model


def plan_model(name: str, *, layers: int = 50, image_size: int = 224) -> LesionClassifier:
    """Returns a model as `get_model` does, but on the meta device, without memory for weights.

    An image of this size was tried with it: raises ValueError, with a size near it that the model
    takes, if there is one, when it does not take it, besides what `get_model` raises.
    """
    try:
        return _try_size(name, layers, image_size)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        if not isinstance(error, ValueError) and _takes_real_images(name, layers, image_size):
            with torch.device("meta"):
                return get_model(name, 2, layers=layers, weights=None, image_size=image_size)
    nearest = [size for step in range(1, 17) for size in (image_size - step, image_size + step)]
    for size in (*nearest, 224):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            _try_size(name, layers, size)
            reason = f"it takes {size}"
            break
    raise ValueError(f"{name} does not take images of {image_size} pixels on a side; {reason}")


def check_weights(
    name: str, weights: str | Path, *, layers: int = 50, image_size: int = 224
) -> LoadedWeights:
    """Returns what a pretrained model would start from; raises what `get_model` does, as early.

    The model is on the meta device. Default weights are downloaded.
    """
    with torch.device("meta"):
        model = get_model(name, 2, layers=layers, weights=None, image_size=image_size, seed=0)
    return _load_weights(model.backbone, name_of_backbone(name, layers), weights, image_size)


def name_of_backbone(name: str, layers: int = 50) -> str:
    """Returns the name in `BACKBONES` of a model's backbone, other than SimpleCNN's."""
    return f"resnet{layers}" if name in MODELS else name.rpartition("_")[0]


def _try_size(name: str, layers: int, image_size: int) -> LesionClassifier:
    with torch.device("meta"):
        model = get_model(name, 2, layers=layers, weights=None, image_size=image_size, seed=0)
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    with evaluation_mode(model), torch.no_grad():
        # As forward does, but for autocast, of which the meta device knows nothing.
        model.head(model.features(image))
    return model


def _takes_real_images(name: str, layers: int, image_size: int) -> bool:
    """Returns whether the model takes such images; some need real numbers, and say so."""
    model = get_model(name, 2, layers=layers, weights=None, image_size=image_size, seed=0)
    try:
        with evaluation_mode(model), torch.no_grad():
            model(torch.zeros(1, 3, image_size, image_size))
    except RuntimeError:
        return False
    return True


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
