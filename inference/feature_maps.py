"""Which layer of a backbone Grad-CAM explains, and its output as maps."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models import LesionClassifier, evaluation_mode

MAX_EXTRA_TOKENS = 8  # of classes and registers, beside those of places


def find_layer(model: LesionClassifier, image: Tensor, min_map_size: int) -> nn.Module:
    """Returns the layer of the last feature maps of such an image, `(1, 3, H, W)` in [0, 1].

    It is the one that the backbone names, see `LesionClassifier.feature_map_layer`. Where it names
    none, it is the last layer whose output has places, `min_map_size` or more on a side, through
    which all passes that the backbone knows of the image, and whose places bear on the features: in
    a convolutional network its last block, in a vision transformer the block before the last, of
    whose successor only the class token is read. Raises ValueError for a backbone without maps.
    """
    if model.feature_maps:
        return model.feature_map_layer(min(image.shape[2:]), min_map_size)
    key = tuple(image.shape[2:])
    if key not in model.found_layers:
        with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
            pixels = (image.clone() - model.mean) / model.std
            model.found_layers[key] = _search(model.backbone, pixels, min_map_size)
    return model.backbone.get_submodule(model.found_layers[key])


def as_maps(values: Tensor, image_shape: torch.Size) -> Tensor | None:
    """Returns a layer's output as maps `(N, C, h, w)`, or None for one that has no places.

    `image_shape` is `(N, 3, H, W)`. Besides maps, the output may have the channels last, or be
    tokens `(N, L, C)`, of which the last are those of places in rows.
    """
    ratio = image_shape[2] / image_shape[3]
    tolerance = 0.0 if ratio == 1 else max(1.0, ratio)  # as sides are rounded
    if values.ndim == 4:
        _, first, second, third = values.shape
        is_last = abs(second - ratio * third) > tolerance >= abs(first - ratio * second)
        return values.permute(0, 3, 1, 2) if is_last else values
    if values.ndim == 3 and ratio == 1:
        side = math.isqrt(values.shape[1])
        num_others = values.shape[1] - side**2
        if num_others <= MAX_EXTRA_TOKENS:
            return values[:, num_others:].transpose(1, 2).unflatten(2, (side, side))
    return None


def call_detached(module: nn.Module, values: Tensor) -> Tensor:
    """Calls a module of which no parameter gets a gradient."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    return functional_call(module, parameters, values)


def _search(backbone: nn.Module, pixels: Tensor, min_map_size: int) -> str:
    """Returns the name of the layer that `find_layer` describes."""
    sides = _sides_of_maps(backbone, pixels)
    smallest = min(min_map_size, max(sides.values(), default=0))
    names = [name for name, side in sides.items() if side >= smallest]
    passed = []
    for name in reversed(names):
        bears_all, bears_something = _bears(backbone, name, pixels)
        if bears_all and bears_something:
            return name
        passed += [name] * bears_all
    if not passed:
        raise ValueError("the backbone of this model has no layer with feature maps to explain")
    return passed[0]  # nothing in the image bears on the features


def _sides_of_maps(backbone: nn.Module, pixels: Tensor) -> dict[str, int]:
    """Returns the shorter side of the maps of each layer that has some, in order of their output.

    Layers that are called several times are left out, and poolings to a fixed size, which can have
    more places than there is something to tell of.
    """
    sides: dict[str, int] = {}
    num_calls: dict[str, int] = {}

    def note(name: str, output: Any) -> None:
        num_calls[name] = num_calls.get(name, 0) + 1
        maps = as_maps(output, pixels.shape) if isinstance(output, Tensor) else None
        if maps is not None and min(maps.shape[2:]) > 1:
            sides.pop(name, None)
            sides[name] = min(maps.shape[2:])

    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name, module in backbone.named_modules()
        if name and not isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d)
    ]
    try:
        with torch.no_grad():
            backbone(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: side for name, side in sides.items() if num_calls[name] == 1}


def _bears(backbone: nn.Module, name: str, pixels: Tensor) -> tuple[bool, bool]:
    """Returns whether features follow from this layer alone, and at all from its places."""
    cut: list[Tensor] = []

    def cut_here(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        cut.append(output.detach().requires_grad_())
        return cut[0].clone()  # as the next layer may work in place

    pixels = pixels.detach().requires_grad_()
    hook = backbone.get_submodule(name).register_forward_hook(cut_here)
    try:
        features = call_detached(backbone, pixels)
    finally:
        hook.remove()
    if not features.requires_grad:
        return False, False
    # Not their sum, which is constant after a normalisation.
    factors = torch.linspace(-1, 1, features.numel(), device=features.device).sin()
    score = (features.float().flatten() * factors).sum()
    of_layer, of_image = torch.autograd.grad(score, (cut[0], pixels), allow_unused=True)
    maps = None if of_layer is None else as_maps(of_layer, pixels.shape)
    return of_image is None, maps is not None and bool((maps != 0).any())
