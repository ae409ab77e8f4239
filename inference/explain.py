"""Grad-CAM: the parts of an image on which a prediction rests."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from imaging.heatmaps import draw_explanation
from inference.feature_maps import as_maps, call_detached, find_layer
from models import LesionClassifier, evaluation_mode
from storage.files import printable, write_atomically

MIN_MAP_SIZE = 4  # on a side; the one place of a 1 x 1 map would explain nothing
SMALLEST_MAP = MIN_MAP_SIZE  # its former name


def gradcam(
    model: LesionClassifier, images: Tensor | np.ndarray, labels: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Returns heatmaps of where each image raises the logit of a class, float32 `(N, H, W)`.

    `images` are float `(N, 3, H, W)` in [0, 1], `labels` int `(N,)` the classes to explain. With
    A_k the feature maps of the model's last layer where they are 4 x 4 or more, and y the class's
    logit, a heatmap is ReLU(sum_k a_k A_k), where a_k is the mean of dy/dA_k over the map
    (Selvaraju et al. 2017), scaled up bilinearly to the image and divided by its maximum, if that
    is not 0. Computed in float32. The model is left as it was, on its device. Raises ValueError for
    labels that do not fit, and for a backbone without feature maps.
    """
    images = torch.as_tensor(images, dtype=torch.float32, device=model.mean.device)
    classes = torch.as_tensor(labels, dtype=torch.int64, device=model.mean.device)
    num_classes = model.config["num_classes"]
    if classes.shape != images.shape[:1] or ((classes < 0) | (classes >= num_classes)).any():
        raise ValueError(f"labels must be {len(images)} numbers from 0 to {num_classes - 1}")
    activations: list[Tensor] = []

    def start_graph_here(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        activations.append(output.detach().requires_grad_())
        return activations[0].clone()  # as the next layer may work in place

    layer = find_layer(model, images[:1], MIN_MAP_SIZE)
    hook = layer.register_forward_hook(start_graph_here)
    try:
        with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
            # Not model(images): a frozen backbone switches gradients off in there. Detached, the
            # parameters get no gradient, and what leads to the activations is not recorded.
            features = call_detached(model.backbone, (images - model.mean) / model.std)
            logits = call_detached(model.head, features.float())
            # A copy, as one made in inference mode cannot be part of a graph.
            score = logits.gather(1, classes.clone()[:, None]).sum()
            (gradients,) = torch.autograd.grad(score, activations)
    finally:
        hook.remove()
    maps, slopes = (as_maps(each, images.shape) for each in (activations[0].detach(), gradients))
    if maps is None or slopes is None:
        raise ValueError("the layer with feature maps that the backbone names has none")
    maps = relu((slopes.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True))
    maps = interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    highest = maps.amax(dim=(1, 2), keepdim=True)
    return (maps / highest.clamp_min(torch.finfo(maps.dtype).tiny)).cpu().numpy()


def overlay_name(path: str) -> str:
    """Returns a file name with the image's own name and a digest of its path."""
    stem = "".join(c if c.isprintable() and c not in '\\:*?"<>|' else "_" for c in Path(path).stem)
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{stem[:48]}-{digest[:12]}.png"  # the longest name that file systems take has 255 bytes


def save_overlay(
    path: Path, image: np.ndarray, heatmap: np.ndarray, row: Mapping[Any, Any]
) -> None:
    """Writes a PNG of an image beside its heatmap, under what was predicted of it.

    `image` and `heatmap` are as in `heatmaps.draw_explanation`, `row` is that of the image in the
    table of `predict.predict`.
    """
    figure = draw_explanation(image, heatmap, printable(row["class"]), describe_prediction(row))
    with write_atomically(path) as temporary:
        figure.save(temporary, compress_level=1)  # a fraction of the time, at a few more bytes


def describe_prediction(row: Mapping[Any, Any]) -> list[str]:
    """Returns lines on an image's row of the table of `predict.predict`: class, flags, file.

    The first has the predicted class and its probability, and the most probable class where that is
    another.
    """
    prediction = f"{printable(row['class'])}, probability {row['probability']:.3f}"
    other = row["most_probable"]
    if other != row["class"]:
        prediction += f" (more probable: {printable(other)}, {row[f'prob_{other}']:.3f})"
    lines = [prediction]
    flags = [name for name in row if str(name).startswith("flag_")]
    if flags:
        names = ", ".join(printable(name.removeprefix("flag_")) for name in flags if row[name])
        lines.append(f"flagged: {names}" if names else "no flags")
    return [*lines, printable(Path(row["path"]).name)]
