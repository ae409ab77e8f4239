"""Random views of a batch of images, on the batch's own device.

Every function takes images as float32 `(B, 3, H, W)` in [0, 1] and a `torch.Generator` on the same
device, draws for each image of the batch independently, and returns a new batch of the same shape,
device and range. The same generator state gives the same views.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def flip_batch_horizontally(
    images: Tensor, generator: torch.Generator, probability: float = 0.5
) -> Tensor:
    """Mirrors each image left to right with the given probability."""
    return _flip(images, generator, probability, dim=3)


def flip_batch_vertically(
    images: Tensor, generator: torch.Generator, probability: float = 0.5
) -> Tensor:
    """Mirrors each image top to bottom with the given probability."""
    return _flip(images, generator, probability, dim=2)


def adjust_batch_brightness(
    images: Tensor, generator: torch.Generator, strength: float = 0.2
) -> Tensor:
    """Multiplies each image by a factor drawn evenly from [1 - strength, 1 + strength]."""
    return (images * _factors(images, generator, strength)).clamp_(0, 1)


def adjust_batch_contrast(
    images: Tensor, generator: torch.Generator, strength: float = 0.2
) -> Tensor:
    """Moves each image away from or towards its own mean grey by a factor from [1 - s, 1 + s]."""
    means = images.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(means, images, _factors(images, generator, strength)).clamp_(0, 1)


def rotate_batch(images: Tensor, generator: torch.Generator, degrees: float = 10.0) -> Tensor:
    """Turns each image about its centre by an angle drawn evenly from [-degrees, degrees].

    Bilinear; the corners that come into view are filled by reflection.
    """
    angles = _uniform(images, generator, -degrees, degrees).flatten() * (math.pi / 180)
    height, width = images.shape[2:]
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # Grid coordinates run from -1 to 1 along either side, so a turn of an oblong image needs the
    # ratio of its sides.
    rows = [cos, -sin * (height / width), zero, sin * (width / height), cos, zero]
    grid = F.affine_grid(
        torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False
    )
    turned = F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return turned.clamp_(0, 1)


def add_noise_to_batch(images: Tensor, generator: torch.Generator, max_std: float = 0.03) -> Tensor:
    """Adds Gaussian noise, its standard deviation drawn for each image evenly from [0, max_std]."""
    std = _uniform(images, generator, 0.0, max_std)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    return torch.addcmul(images, noise, std).clamp_(0, 1)


def augment_batch(images: Tensor, generator: torch.Generator) -> Tensor:
    """The training views: flips, rotation, brightness, contrast and noise at their defaults."""
    images = flip_batch_horizontally(images, generator)
    images = flip_batch_vertically(images, generator)
    images = rotate_batch(images, generator)
    images = adjust_batch_brightness(images, generator)
    images = adjust_batch_contrast(images, generator)
    return add_noise_to_batch(images, generator)


def _flip(images: Tensor, generator: torch.Generator, probability: float, dim: int) -> Tensor:
    chosen = _uniform(images, generator, 0.0, 1.0) < probability
    return torch.where(chosen, images.flip(dim), images)


def _factors(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    return _uniform(images, generator, 1 - strength, 1 + strength)


def _uniform(images: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    """One number an image, `(B, 1, 1, 1)`."""
    draws = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    return low + (high - low) * draws
