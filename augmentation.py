"""Random views of a batch of images, on the batch's own device.

Every function takes images as float32 `(B, 3, H, W)` in [0, 1] and returns a new batch of the same
shape, device and range, each image varied on its own. What is random comes from a
`torch.Generator`: its state and the number of images alone decide the views, on whatever device it
and the images are.
"""

import functools
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

# So many normal deviates are drawn once; the noise of an image is a stretch of them (see `_noise`).
NOISE_TABLE_SIZE = 2**22


@dataclass(frozen=True)
class Views:
    """What is drawn for each image of a batch; all tensors are `(B,)`."""

    mirrored: Tensor  # 1 or -1, left to right
    upended: Tensor  # 1 or -1, top to bottom
    angle: Tensor  # radians
    brightness: Tensor  # a factor
    contrast: Tensor  # a factor
    noise_std: Tensor
    noise_place: Tensor  # in [0, 1), of the stretch of noise

    def __getitem__(self, images: slice) -> "Views":
        """The views of a part of the batch."""
        return Views(*(getattr(self, field.name)[images] for field in fields(self)))

    def to(self, device: torch.device) -> "Views":
        parts = torch.stack([getattr(self, field.name) for field in fields(self)])
        return Views(*parts.to(device, non_blocking=True))


def draw_views(count: int, generator: torch.Generator) -> Views:
    """The training views of `count` images: flips, rotation, brightness, contrast and noise."""
    return Views(
        mirrored=_signs(count, generator),
        upended=_signs(count, generator),
        angle=_angles(count, generator),
        brightness=_factors(count, generator),
        contrast=_factors(count, generator),
        noise_std=_uniform(count, generator, 0.0, 0.03),
        noise_place=_uniform(count, generator, 0.0, 1.0),
    )


def apply_views(images: Tensor, views: Views) -> Tensor:
    """The images as `views` says: flipped, turned, then brightness, contrast, and noise.

    As fast as memory allows: the flips are part of the rotation, and brightness and contrast are
    one multiplication, so that values are cut to [0, 1] once, at the end.
    """
    views = views.to(images.device)
    turned = _turn(images, views.angle, views.mirrored, views.upended)
    brightness, contrast = _per_image(views.brightness), _per_image(views.contrast)
    # c (b x - b m) + b m, with the mean m of an image, is (c b) x + (1 - c) b m.
    shift = (1 - contrast) * brightness * turned.mean(dim=(1, 2, 3), keepdim=True)
    noise = _noise(images, views.noise_place).mul_(_per_image(views.noise_std)).add_(shift)
    return noise.addcmul_(turned, contrast * brightness).clamp_(0, 1)


def augment_batch(images: Tensor, generator: torch.Generator) -> Tensor:
    """The training views: flips, rotation, brightness, contrast and noise at their defaults."""
    return apply_views(images, draw_views(len(images), generator))


def flip_batch_horizontally(
    images: Tensor, generator: torch.Generator, probability: float = 0.5
) -> Tensor:
    """Mirrors each image left to right with the given probability."""
    return _flip(images, _signs(len(images), generator, probability), dim=3)


def flip_batch_vertically(
    images: Tensor, generator: torch.Generator, probability: float = 0.5
) -> Tensor:
    """Mirrors each image top to bottom with the given probability."""
    return _flip(images, _signs(len(images), generator, probability), dim=2)


def rotate_batch(images: Tensor, generator: torch.Generator, degrees: float = 10.0) -> Tensor:
    """Turns each image about its centre by an angle drawn evenly from [-degrees, degrees].

    Bilinear; the corners that come into view are filled by reflection.
    """
    return _turn(images, _angles(len(images), generator, degrees).to(images.device)).clamp_(0, 1)


def adjust_batch_brightness(
    images: Tensor, generator: torch.Generator, strength: float = 0.2
) -> Tensor:
    """Multiplies each image by a factor drawn evenly from [1 - strength, 1 + strength]."""
    factors = _factors(len(images), generator, strength).to(images.device)
    return (images * _per_image(factors)).clamp_(0, 1)


def adjust_batch_contrast(
    images: Tensor, generator: torch.Generator, strength: float = 0.2
) -> Tensor:
    """Moves each image away from or towards its own mean grey by a factor from [1 - s, 1 + s]."""
    factors = _factors(len(images), generator, strength).to(images.device)
    means = images.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(means, images, _per_image(factors)).clamp_(0, 1)


def add_noise_to_batch(images: Tensor, generator: torch.Generator, max_std: float = 0.03) -> Tensor:
    """Adds Gaussian noise, its standard deviation drawn for each image evenly from [0, max_std]."""
    std = _uniform(len(images), generator, 0.0, max_std).to(images.device)
    places = _uniform(len(images), generator, 0.0, 1.0).to(images.device)
    return torch.addcmul(images, _noise(images, places), _per_image(std)).clamp_(0, 1)


def _flip(images: Tensor, signs: Tensor, dim: int) -> Tensor:
    return torch.where(_per_image(signs.to(images.device)) < 0, images.flip(dim), images)


def _turn(
    images: Tensor, angles: Tensor, mirrored: Tensor | None = None, upended: Tensor | None = None
) -> Tensor:
    """The images turned by angles `(B,)` in radians, and before that flipped where a sign is -1."""
    height, width = images.shape[2:]
    x, y = _pixel_centres(width, images.device), _pixel_centres(height, images.device)[:, None]
    cos, sin = angles.cos().view(-1, 1, 1), angles.sin().view(-1, 1, 1)
    mirrored = torch.ones_like(cos) if mirrored is None else mirrored.view(-1, 1, 1)
    upended = torch.ones_like(cos) if upended is None else upended.view(-1, 1, 1)
    # Where each pixel comes from. Coordinates run from -1 to 1 along either side, so a turn of an
    # oblong image needs the ratio of its sides.
    grid = images.new_empty(len(images), height, width, 2)
    torch.sub(mirrored * cos * x, mirrored * sin * (height / width) * y, out=grid[..., 0])
    torch.add(upended * sin * (width / height) * x, upended * cos * y, out=grid[..., 1])
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def _pixel_centres(count: int, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device) * 2 + 1) / count - 1


def _noise(images: Tensor, places: Tensor) -> Tensor:
    """Normal deviates of the images' shape.

    Drawing them one by one would cost as much as all other views together. So each image takes a
    stretch of one long table of deviates, from a place of its own: within an image they are
    independent, and between images nobody learns anything from so few repetitions.
    """
    length = images[0].numel()
    table = _noise_table(max(NOISE_TABLE_SIZE, 2 * length), images.device)
    starts = (places.double() * (len(table) - length)).long()
    return table.unfold(0, length, 1)[starts].view(images.shape)


@functools.cache
def _noise_table(size: int, device: torch.device) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)


def _signs(count: int, generator: torch.Generator, probability: float = 0.5) -> Tensor:
    """-1 with the given probability, or else 1."""
    return 1 - 2 * (_uniform(count, generator, 0.0, 1.0) < probability).float()


def _angles(count: int, generator: torch.Generator, degrees: float = 10.0) -> Tensor:
    return _uniform(count, generator, -degrees, degrees) * (math.pi / 180)


def _factors(count: int, generator: torch.Generator, strength: float = 0.2) -> Tensor:
    return _uniform(count, generator, 1 - strength, 1 + strength)


def _uniform(count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """One number an image, `(B,)`, on the generator's device."""
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
