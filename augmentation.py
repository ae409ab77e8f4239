"""Random views of a batch of images, and the policies that training chooses among.

The functions take images as float32 `(B, 3, H, W)` in [0, 1], on any device, and return a new batch
of the same shape, device and range, in which each image is varied independently. What is random
comes from a `torch.Generator`: its state and the number of images alone decide the views.

A policy is a sequence of augmentations that are applied to a batch one after the other.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_TURNS = 8  # flips and quarter-turns of a square
NOISE_TABLE_SIZE = 2**22  # numbers in the table from which noise is taken; see `_noise`


class Augmentation(Protocol):
    """An entry of a policy."""

    def draw(self, generator: torch.Generator, count: int) -> Any:
        """Returns what is random, for the `count` images of the batches of all processes.

        A slice of it must be that of these images; a tensor with a row for each image will do.
        """

    def apply(self, images: Tensor, labels: Tensor, drawn: Any) -> tuple[Tensor, Tensor]:
        """Returns the new images and their labels, given what was drawn for them.

        Labels are int64 `(B,)`, or float `(B, num_classes)` where an entry has mixed them.
        """


Policy = Sequence[Augmentation]


@dataclass(frozen=True)
class Views:
    """What is drawn for each image of a batch; all tensors are `(B,)`."""

    hflip: Tensor  # -1 for an image that is flipped left to right, else 1
    vflip: Tensor  # -1 for an image that is flipped top to bottom, else 1
    angle: Tensor  # radians
    brightness: Tensor  # a factor
    contrast: Tensor  # a factor
    noise_std: Tensor
    noise_start: Tensor  # in [0, 1), where in the table the image's noise starts

    def __getitem__(self, images: slice) -> "Views":
        """Returns the views of a part of the batch."""
        return Views(*(values[images] for values in vars(self).values()))

    def to(self, device: torch.device) -> "Views":
        """Returns the views on the device."""
        return Views(*torch.stack([*vars(self).values()]).to(device, non_blocking=True))


class StandardViews:
    """Flips, rotation, brightness, contrast and noise at their defaults; labels stay."""

    def draw(self, generator: torch.Generator, count: int) -> Views:
        """Returns `draw_views`."""
        return draw_views(count, generator)

    def apply(self, images: Tensor, labels: Tensor, drawn: Views) -> tuple[Tensor, Tensor]:
        """Returns `apply_views` and the labels."""
        return apply_views(images, drawn), labels


class FlipsAndQuarterTurns:
    """One of the eight flips and quarter-turns of each image, exact to the pixel; labels stay."""

    def draw(self, generator: torch.Generator, count: int) -> Tensor:
        """Returns the number of each image's view, as `turn` takes it, int64 `(count,)`."""
        return torch.randint(NUM_TURNS, (count,), generator=generator)

    def apply(self, images: Tensor, labels: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the view of each square image, and the labels."""
        views, drawn = torch.empty_like(images), drawn.to(images.device)
        for view in range(NUM_TURNS):
            views[drawn == view] = turn(images[drawn == view], view)
        return views, labels


# The values of a view that leaves an image as it is, wherever its noise starts.
_UNCHANGED = {
    "hflip": 1.0,
    "vflip": 1.0,
    "angle": 0.0,
    "brightness": 1.0,
    "contrast": 1.0,
    "noise_std": 0.0,
}

POLICIES: dict[str, Policy] = {
    "none": (),
    "standard": (StandardViews(),),
    "flips_and_quarter_turns": (FlipsAndQuarterTurns(),),
}


def resolve_policy(augmentation: bool | str | Policy) -> Policy:
    """Returns a policy by its name in `POLICIES`; True is "standard", False "none".

    A policy is returned as it is. Raises ValueError for an unknown name.
    """
    if isinstance(augmentation, bool):
        augmentation = "standard" if augmentation else "none"
    if not isinstance(augmentation, str):
        return augmentation
    if augmentation not in POLICIES:
        names = ", ".join(POLICIES)
        raise ValueError(f"unknown augmentation {augmentation!r}; the policies are {names}")
    return POLICIES[augmentation]


def describe_policy(policy: Policy) -> bool | list[list[str]]:
    """Returns plain values that two policies share only if they are the same.

    They are True for "standard" and False for "none", as in the checkpoints of earlier versions.
    """
    if tuple(policy) in (POLICIES["standard"], POLICIES["none"]):
        return len(policy) > 0
    return [[type(entry).__qualname__, repr(getattr(entry, "__dict__", entry))] for entry in policy]


def turn(images: Tensor, view: int) -> Tensor:
    """Returns square images `(N, C, H, H)` in one of the 8 flips and quarter-turns.

    View 0 is the images themselves, 1 their mirror image; the first four are those without
    quarter-turns.
    """
    turns = (0, 2, 1, 3)[view // 2]
    # rot90 by nothing is a copy too, with the channels first in memory.
    turned = torch.rot90(images, turns, (2, 3)) if turns > 0 else images
    return turned.flip(3) if view % 2 else turned


def draw_views(count: int, generator: torch.Generator) -> Views:
    """Draws the training views of `count` images: flips, rotation, brightness, contrast, noise."""
    return Views(
        hflip=_signs(count, generator),
        vflip=_signs(count, generator),
        angle=_uniform(count, generator, -10.0, 10.0).deg2rad(),
        brightness=_uniform(count, generator, 0.8, 1.2),
        contrast=_uniform(count, generator, 0.8, 1.2),
        noise_std=_uniform(count, generator, 0.0, 0.03),
        noise_start=_uniform(count, generator, 0.0, 1.0),
    )


def apply_views(images: Tensor, views: Views) -> Tensor:
    """Returns the images flipped, rotated, changed in brightness and contrast, and with noise.

    As fast as memory allows: the flips are part of the rotation, and brightness and contrast are
    one multiplication, so that values are clamped to [0, 1] once, at the end.
    """
    views = views.to(images.device)
    rotated = _rotate(images, views.angle, views.hflip, views.vflip)
    brightness, contrast = views.brightness.view(-1, 1, 1, 1), views.contrast.view(-1, 1, 1, 1)
    # c (b x - b m) + b m, with the mean m of an image, is (c b) x + (1 - c) b m.
    shift = (1 - contrast) * brightness * rotated.mean(dim=(1, 2, 3), keepdim=True)
    noise = _noise(images, views.noise_start).mul_(views.noise_std.view(-1, 1, 1, 1)).add_(shift)
    return noise.addcmul_(rotated, contrast * brightness).clamp_(0, 1)


def example_views(generator: torch.Generator, num_combined: int = 2) -> tuple[list[str], Views]:
    """Returns views that show what training does to an image, and the name of each.

    The first show one augmentation each, the strongest of 64 that are drawn; `num_combined` more
    show all of them together, as drawn.
    """
    drawn = draw_views(64, generator)
    strongest = {
        name: max(getattr(drawn, name).tolist(), key=lambda value: abs(value - _UNCHANGED[name]))
        for name in _UNCHANGED
    }
    degrees = math.degrees(strongest["angle"])
    names = {
        "hflip": "flipped left to right",
        "vflip": "flipped top to bottom",
        "angle": f"rotated by {abs(degrees):.0f}° {'anti' if degrees > 0 else ''}clockwise",
        "brightness": f"brightness ×\u00a0{strongest['brightness']:.2f}",
        "contrast": f"contrast ×\u00a0{strongest['contrast']:.2f}",
        "noise_std": f"noise of standard deviation {strongest['noise_std']:.2f}",
    }
    singles = {"noise_start": drawn.noise_start[: len(names)]}
    for index, name in enumerate(names):
        singles[name] = torch.full((len(names),), _UNCHANGED[name], device=generator.device)
        singles[name][index] = strongest[name]
    combined = draw_views(num_combined, generator)
    values = {name: torch.cat([singles[name], getattr(combined, name)]) for name in singles}
    return [*names.values(), *["all together"] * num_combined], Views(**values)


def augment_batch(images: Tensor, generator: torch.Generator) -> Tensor:
    """Applies all the training views at their defaults."""
    return apply_views(images, draw_views(len(images), generator))


def flip_batch_horizontally(
    images: Tensor, generator: torch.Generator, probability: float = 0.5
) -> Tensor:
    """Flips each image left to right with the given probability."""
    is_flipped = _per_image(images, generator, 0.0, 1.0) < probability
    return torch.where(is_flipped, images.flip(3), images)


def flip_batch_vertically(
    images: Tensor, generator: torch.Generator, probability: float = 0.5
) -> Tensor:
    """Flips each image top to bottom with the given probability."""
    is_flipped = _per_image(images, generator, 0.0, 1.0) < probability
    return torch.where(is_flipped, images.flip(2), images)


def rotate_batch(images: Tensor, generator: torch.Generator, degrees: float = 10.0) -> Tensor:
    """Rotates each image about its centre by an angle drawn uniformly from [-degrees, degrees].

    Bilinear; the corners that come into view are filled by reflection.
    """
    angles = _per_image(images, generator, -degrees, degrees).deg2rad()
    not_flipped = torch.ones_like(angles)
    return _rotate(images, angles, not_flipped, not_flipped).clamp_(0, 1)


def adjust_batch_brightness(
    images: Tensor, generator: torch.Generator, strength: float = 0.2
) -> Tensor:
    """Multiplies each image by a factor drawn uniformly from [1 - strength, 1 + strength]."""
    return (images * _per_image(images, generator, 1 - strength, 1 + strength)).clamp_(0, 1)


def adjust_batch_contrast(
    images: Tensor, generator: torch.Generator, strength: float = 0.2
) -> Tensor:
    """Scales each image's distance from its mean grey by a factor from [1 - s, 1 + s]."""
    factors = _per_image(images, generator, 1 - strength, 1 + strength)
    means = images.mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(means, images, factors).clamp_(0, 1)


def add_noise_to_batch(images: Tensor, generator: torch.Generator, max_std: float = 0.03) -> Tensor:
    """Adds Gaussian noise, its standard deviation drawn for each image evenly from [0, max_std]."""
    std = _per_image(images, generator, 0.0, max_std)
    starts = _per_image(images, generator, 0.0, 1.0)
    return torch.addcmul(images, _noise(images, starts), std).clamp_(0, 1)


def _rotate(images: Tensor, angles: Tensor, hflip: Tensor, vflip: Tensor) -> Tensor:
    """Flips the images where a sign is -1, then rotates them by angles in radians."""
    height, width = images.shape[2:]
    x, y = _pixel_centres(width, images.device), _pixel_centres(height, images.device)[:, None]
    cos, sin, hflip, vflip = (v.view(-1, 1, 1) for v in (angles.cos(), angles.sin(), hflip, vflip))
    # Where each pixel comes from. Coordinates run from -1 to 1 along either side, so rotating an
    # oblong image needs the ratio of its sides.
    grid = images.new_empty(len(images), height, width, 2)
    torch.sub(hflip * cos * x, hflip * sin * (height / width) * y, out=grid[..., 0])
    torch.add(vflip * sin * (width / height) * x, vflip * cos * y, out=grid[..., 1])
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _pixel_centres(count: int, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device) * 2 + 1) / count - 1


def _noise(images: Tensor, starts: Tensor) -> Tensor:
    """Returns standard normal numbers of the images' shape.

    Drawing each of them would cost as much as all other views together. So each image takes a
    stretch of one long table, from a start of its own: within an image the numbers are independent,
    and between images repetitions are too rare to be learned from.
    """
    length = images[0].numel()
    table = _noise_table(max(NOISE_TABLE_SIZE, 2 * length), images.device)
    first = (starts.view(-1).double() * (len(table) - length)).long()
    return table.unfold(0, length, 1)[first].view(images.shape)


@functools.cache
def _noise_table(size: int, device: torch.device) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """Returns -1 or 1, equally likely."""
    return 1 - 2 * (_uniform(count, generator, 0.0, 1.0) < 0.5).float()


def _uniform(count: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    """Returns a number per image, `(B,)`, on the generator's device."""
    return low + (high - low) * torch.rand(count, generator=generator, device=generator.device)


def _per_image(images: Tensor, generator: torch.Generator, low: float, high: float) -> Tensor:
    """Returns a number per image, `(B, 1, 1, 1)`, on the images' device."""
    return _uniform(len(images), generator, low, high).to(images.device).view(-1, 1, 1, 1)
