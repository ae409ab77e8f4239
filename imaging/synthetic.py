"""Draws lesion-like images of nine classes, for the demo and the tests.

The classes and their imbalance are those of the ISIC nine-class set; how they look, in
`synthetic.toml`, follows the signs in textbooks of dermoscopy, much simplified. The images let the
whole program run without data or a network; they teach nothing about skin.
"""

import math
import os
import shutil
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

from storage.files import lock

Range = tuple[float, float]  # two ends, between which a number is drawn uniformly
Colours = tuple[str, str]  # two ends, between which a colour is drawn uniformly


@dataclass(frozen=True)
class Structure:
    """Something seen in or over a lesion; `kind` picks the function that draws its mask.

    `width` is the size or the spacing of its elements as a fraction of the image's side (for
    `blotches` and `ring`: of the lesion's radius), `count` their number where they can be counted,
    and `reach` where they may lie, from 0, the centre, to 1, the border.
    """

    kind: str
    colours: Colours
    probability: float
    width: Range
    count: tuple[int, int] = (1, 1)
    reach: Range = (0.0, 1.0)
    opacity: Range = (0.6, 0.9)


@dataclass(frozen=True)
class Looks:
    """How the lesions of a class look, and how many images the ISIC nine-class set has of it.

    `radius` is a fraction of the image's side; `elongation` the ratio of the axes; `asymmetry` how
    far a second lobe juts out, `irregularity` the depth of the notches in the border, and `edge`
    the width over which it fades, all three in radii; `opacity` how much of the skin the pigment
    hides.
    """

    train_images: int
    test_images: int
    border: Colours
    centre: Colours
    radius: Range
    elongation: Range
    asymmetry: Range
    irregularity: Range
    edge: Range
    opacity: Range
    structures: tuple[Structure, ...]


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def _structures(table: Iterable[dict[str, Any]]) -> tuple[Structure, ...]:
    return tuple(Structure(**_with_tuples(fields)) for fields in table)


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
LOOKS = {
    name: Looks(**_with_tuples(fields) | {"structures": _structures(fields["structures"])})
    for name, fields in _TABLES["classes"].items()
}
CLASSES = tuple(sorted(LOOKS))
NUISANCES = _structures(_TABLES["nuisances"])  # seen over any lesion, whatever its class
SPLITS = ("Train", "Test")
MIN_IMAGES_PER_CLASS = (4, 1)  # in Train and in Test
MIN_IMAGES = len(CLASSES) * sum(MIN_IMAGES_PER_CLASS)
MIN_SIZE = 16


def draw_lesion(class_name: str, rng: np.random.Generator, size: int = 128) -> Image.Image:
    """Draws a lesion of the given class: an RGB image of `size` x `size` pixels.

    The image depends only on the class, the size and the state of `rng`. Raises ValueError for a
    class that is not in `CLASSES` and for a size below `MIN_SIZE`.
    """
    if class_name not in LOOKS:
        raise ValueError(f"unknown class {class_name!r}; the classes are {', '.join(CLASSES)}")
    if size < MIN_SIZE:
        raise ValueError(f"size is {size}; it must be {MIN_SIZE} or more")
    looks = LOOKS[class_name]
    lesion = _Lesion(looks, rng, size)
    canvas, brightness = _draw_skin(rng, size)
    _draw_pigment(canvas, brightness, looks, lesion, rng)
    for structure in looks.structures:
        _draw_structure(canvas, brightness, structure, lesion, rng)
    for nuisance in NUISANCES:
        _draw_structure(canvas, 1.0, nuisance, lesion, rng)
    return _photograph(canvas, rng)


def make_dataset(
    root: str | Path,
    num_images: int = 600,
    seed: int = 42,
    size: int = 128,
    *,
    exist_ok: bool = False,
) -> Path:
    """Draws JPEGs into `root/Train/<class>/` and `root/Test/<class>/`, and returns root.

    Classes and splits are as imbalanced as in the ISIC nine-class set, but none is empty. The i-th
    image of a class in a split depends only on (seed, split, class, i). `root` appears whole or not
    at all, drawn by one process while others wait. Raises FileExistsError when `root` is not empty,
    unless `exist_ok` leaves it as it is, and ValueError when `num_images` is below `MIN_IMAGES`.
    """
    if num_images < MIN_IMAGES:
        raise ValueError(f"num_images is {num_images}; it must be {MIN_IMAGES} or more")
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = root.with_name(f".{root.name}.unfinished")
    with lock(root.with_name(f".{root.name}.lock")):
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            if exist_ok and root.is_dir():
                return root
            raise FileExistsError(f"{root} already exists; remove it or name another folder")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            _draw_files(unfinished, count_images(num_images), seed, size)
            os.replace(unfinished, root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return root


def _draw_files(root: Path, counts: np.ndarray, seed: int, size: int) -> None:
    progress = tqdm(total=counts.sum(), desc="drawing", unit="img", disable=None, leave=False)
    with progress:
        for (split, label), count in np.ndenumerate(counts):
            class_name = CLASSES[label]
            folder = root / SPLITS[split] / class_name
            folder.mkdir(parents=True)
            stem = f"{class_name.replace(' ', '_')}_{SPLITS[split].lower()}"
            for i in range(count):
                rng = np.random.default_rng([seed, split, label, i])
                image = draw_lesion(class_name, rng, size)
                image.save(folder / f"{stem}_{i:04d}.jpg", quality=90)
                progress.update()


def count_images(num_images: int) -> np.ndarray:
    """Returns the number of images of each split (rows) and class (columns), `num_images` in all.

    They are as in the ISIC set by largest remainder, and at least `MIN_IMAGES_PER_CLASS`.
    """
    table = [LOOKS[class_name] for class_name in CLASSES]
    real = np.array([(looks.train_images, looks.test_images) for looks in table]).T
    quotas = num_images * real / real.sum()
    counts = np.floor(quotas).astype(int)
    by_remainder = np.argsort((counts - quotas).ravel(), kind="stable")
    counts.flat[by_remainder[: num_images - counts.sum()]] += 1
    least = np.array(MIN_IMAGES_PER_CLASS)[:, None]
    while (counts < least).any():
        spare = counts - least
        counts.flat[[spare.argmin(), spare.argmax()]] += [1, -1]
    return counts


class _Lesion:
    """Where a lesion lies: `rho` is 0 at its centre, 1 at its border and more outside."""

    def __init__(self, looks: Looks, rng: np.random.Generator, size: int):
        self.size = size
        self.radius = rng.uniform(*looks.radius)
        self.centre = rng.normal(0.5, 0.05, 2)
        angle = rng.uniform(0, 2 * math.pi)
        stretch = math.sqrt(rng.uniform(*looks.elongation))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        self.axes = turn * self.radius * np.array([stretch, 1 / stretch])
        u, v = self._in_radii(*_pixel_grid(size))
        lobe_u, lobe_v = rng.uniform(*looks.asymmetry) * _unit_vector(rng)
        lobe = _distance(u - lobe_u, v - lobe_v) / rng.uniform(0.55, 0.8)
        notches = rng.uniform(*looks.irregularity) * _noise(rng, size, 5, 11, 26)
        self.rho = np.minimum(_distance(u, v), lobe) + notches

    def _in_radii(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (a, b), (c, d) = np.linalg.inv(self.axes).astype(np.float32)
        x, y = x - np.float32(self.centre[0]), y - np.float32(self.centre[1])
        return a * x + b * y, c * x + d * y

    def within(self, reach: Range) -> np.ndarray:
        inner, outer = reach
        mask = _ramp((outer - self.rho) / 0.15 + 0.5)
        return mask * _ramp((self.rho - inner) / 0.15 + 0.5) if inner > 0 else mask

    def points(self, rng: np.random.Generator, count: int, reach: Range) -> np.ndarray:
        # The root spreads the points evenly over the area.
        distances = np.sqrt(rng.uniform(reach[0] ** 2, reach[1] ** 2, count))
        angles = rng.uniform(0, 2 * math.pi, count)
        points = distances * np.array([np.cos(angles), np.sin(angles)])
        return (self.axes @ points).T + self.centre


def _draw_skin(rng: np.random.Generator, size: int) -> tuple[np.ndarray, float]:
    tones = np.array([_rgb(tone) for tone in _TABLES["skin_tones"]])
    position = rng.uniform() ** 1.5 * (len(tones) - 1)
    tone = [np.interp(position, range(len(tones)), channel) for channel in tones.T]
    mottling = 1 + 0.06 * _noise(rng, size, 5, 25)
    pallor = mottling + 0.05 * _noise(rng, size, 9)
    red, green, blue = np.array(tone, dtype=np.float32)
    # Pigment is darker on darker skin, but not in proportion.
    brightness = 0.3 + 0.7 * float(np.mean(tone) / tones[0].mean())
    return np.stack([red * mottling, green * pallor, blue * pallor]), brightness


def _draw_pigment(
    canvas: np.ndarray,
    brightness: float,
    looks: Looks,
    lesion: _Lesion,
    rng: np.random.Generator,
) -> None:
    border, centre = (brightness * _pick_colour(rng, c) for c in (looks.border, looks.centre))
    patches, grain = _noise(rng, lesion.size, 7), _noise(rng, lesion.size, 14, 32)
    depth = _ramp(1.1 - lesion.rho + 0.7 * patches)
    shade = 1 + rng.uniform(0.05, 0.3) * grain
    pigment = [(b + (c - b) * depth) * shade for b, c in zip(border, centre, strict=True)]
    coverage = _ramp((1 - lesion.rho) / rng.uniform(*looks.edge) + 0.5)
    _blend(canvas, pigment, coverage * rng.uniform(*looks.opacity))


def _draw_structure(
    canvas: np.ndarray,
    brightness: float,
    structure: Structure,
    lesion: _Lesion,
    rng: np.random.Generator,
) -> None:
    if rng.uniform() < structure.probability:
        colour = brightness * _pick_colour(rng, structure.colours)
        mask = _MASKS[structure.kind](structure, lesion, rng)
        _blend(canvas, colour, mask * rng.uniform(*structure.opacity))


def _photograph(canvas: np.ndarray, rng: np.random.Generator) -> Image.Image:
    size = canvas.shape[1]
    x, y = _pixel_grid(size)
    across, along = _unit_vector(rng)
    light = rng.uniform(0.9, 1.1) + rng.uniform(0, 0.3) * (across * (x - 0.5) + along * (y - 0.5))
    light += rng.uniform(0.01, 0.05) * _uniform(rng, size)  # the noise of the sensor
    white_balance = rng.normal(1, (0.04, 0.03, 0.05)).astype(np.float32)
    planes = [(p * light * w).clip(0, 255) for p, w in zip(canvas, white_balance, strict=True)]
    return Image.fromarray(np.stack(planes, axis=2, dtype=np.uint8, casting="unsafe"))


def _network(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    lattice = _lattice(structure, lesion, rng)
    return _ramp(-0.1 - 0.6 * lattice) * _unevenly(lesion, rng) * lesion.within(structure.reach)


def _follicles(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    lattice = _lattice(structure, lesion, rng)
    return _ramp(lattice - 0.7) * _unevenly(lesion, rng) * lesion.within(structure.reach)


def _fingerprint(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    x, y = _warped_grid(lesion.size, rng, 0.06)
    across, along = 2 * math.pi / rng.uniform(*structure.width) * _unit_vector(rng)
    ridges = np.cos(across * x + along * y)
    return _ramp(0.7 * ridges) * _unevenly(lesion, rng) * lesion.within(structure.reach)


def _dots(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    image, draw, scale = _vector_canvas(lesion.size)
    count = int(rng.integers(*structure.count, endpoint=True))
    for x, y in scale * lesion.points(rng, count, structure.reach):
        width, height = scale * rng.uniform(*structure.width) * rng.uniform(0.8, 1.2, 2)
        box = (x - width, y - height, x + width, y + height)
        draw.ellipse(box, fill=int(rng.integers(150, 256)))
    return _vector_mask(image) * lesion.within((0, structure.reach[1] + 0.1))


def _blotches(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    x, y = _warped_grid(lesion.size, rng, 0.08)
    mask = np.zeros_like(x)
    count = int(rng.integers(*structure.count, endpoint=True))
    for centre_x, centre_y in lesion.points(rng, count, structure.reach).astype(np.float32):
        radius = lesion.radius * rng.uniform(*structure.width)
        mask = np.maximum(mask, _ramp(2 - 2 * _distance(x - centre_x, y - centre_y) / radius))
    return mask * lesion.within((0, 1))


def _ring(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    distance = (lesion.rho - 0.9) / rng.uniform(*structure.width)
    return _ramp(1.3 - np.abs(distance)) * _unevenly(lesion, rng)


def _scales(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    cells = round(1 / rng.uniform(*structure.width))
    flakes, clumps = _noise(rng, lesion.size, cells, 2 * cells), _noise(rng, lesion.size, 6)
    return _ramp(4 * (flakes + clumps - 0.5)) * lesion.within(structure.reach)


def _vessels(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    image, draw, scale = _vector_canvas(lesion.size)
    count = int(rng.integers(*structure.count, endpoint=True))
    for start in lesion.points(rng, count, structure.reach):
        inwards = lesion.centre - start
        heading = math.atan2(inwards[1], inwards[0]) + rng.normal(0, 0.4)
        length, width = 1.3 * lesion.radius, rng.uniform(*structure.width)
        _branch(draw, rng, scale * start, heading, scale * length, scale * width)
    return _vector_mask(image)


def _branch(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    start: np.ndarray,
    heading: float,
    length: float,
    width: float,
) -> None:
    headings = heading + rng.normal(0, 0.3, 7).cumsum()
    steps = length / len(headings) * np.array([np.cos(headings), np.sin(headings)]).T
    path = np.vstack([start, start + steps.cumsum(axis=0)])
    draw.line(path.ravel().tolist(), fill=255, width=max(1, round(width)), joint="curve")
    if width > 1:
        for node in rng.integers(1, 6, 2):
            turned = headings[node] + rng.choice((-1, 1)) * rng.uniform(0.5, 1.0)
            _branch(draw, rng, path[node], turned, 0.5 * length, 0.5 * width)


def _hairs(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    image, draw, scale = _vector_canvas(lesion.size)
    t = np.linspace(0, 1, 10)[:, None]
    growth = _unit_vector(rng)
    for _ in range(rng.integers(*structure.count, endpoint=True)):
        root = rng.uniform(-0.1, 1.1, 2)
        tip = root + rng.uniform(0.2, 0.9) * growth + rng.normal(0, 0.15, 2)
        bend = (root + tip) / 2 + rng.normal(0, 0.1, 2)
        curve = (1 - t) ** 2 * root + 2 * t * (1 - t) * bend + t**2 * tip  # quadratic Bézier
        width = max(1, round(scale * rng.uniform(*structure.width)))
        draw.line((scale * curve).ravel().tolist(), fill=255, width=width, joint="curve")
    return _vector_mask(image)


def _bubbles(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    image, draw, scale = _vector_canvas(lesion.size)
    for _ in range(rng.integers(*structure.count, endpoint=True)):
        x, y = scale * rng.uniform(0, 1, 2)
        radius = scale * rng.uniform(*structure.width)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=60, outline=255, width=2)
    return _vector_mask(image)


def _ruler(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    image, draw, scale = _vector_canvas(lesion.size)
    along = _unit_vector(rng)
    inwards = np.array([-along[1], along[0]])
    count = int(rng.integers(*structure.count, endpoint=True))
    spacing = rng.uniform(*structure.width)
    corner = 0.5 - rng.uniform(0.42, 0.5) * inwards - spacing * count / 2 * along
    for tick in range(count):
        foot = corner + tick * spacing * along
        tip = foot + (0.06 if tick % 5 == 0 else 0.03) * inwards
        draw.line((scale * np.concatenate([foot, tip])).tolist(), fill=255, width=2)
    return _vector_mask(image)


def _vignette(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    x, y = _pixel_grid(lesion.size)
    centre_x, centre_y = rng.normal(0.5, 0.03, 2).astype(np.float32)
    distance = _distance(x - centre_x, y - centre_y)
    return _ramp((distance - rng.uniform(*structure.width)) / rng.uniform(0.02, 0.12))


_MASKS: dict[str, Callable[[Structure, _Lesion, np.random.Generator], np.ndarray]] = {
    "network": _network,
    "follicles": _follicles,
    "fingerprint": _fingerprint,
    "dots": _dots,
    "blotches": _blotches,
    "ring": _ring,
    "scales": _scales,
    "vessels": _vessels,
    "hairs": _hairs,
    "bubbles": _bubbles,
    "ruler": _ruler,
    "vignette": _vignette,
}


def _lattice(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    """Three waves 60 degrees apart: high in the cells of a honeycomb, low on its walls."""
    x, y = _warped_grid(lesion.size, rng, 0.03)
    frequency = 2 * math.pi / rng.uniform(*structure.width)
    angles = rng.uniform(0, math.pi) + np.array([0, math.pi / 3, 2 * math.pi / 3])
    waves = frequency * np.array([np.cos(angles), np.sin(angles)], dtype=np.float32).T
    return np.sum([np.cos(along_x * x + along_y * y) for along_x, along_y in waves], axis=0)


def _unevenly(lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    return _ramp(0.7 + _noise(rng, lesion.size, 6))


def _noise(rng: np.random.Generator, size: int, *cells: int) -> np.ndarray:
    """Smooth noise about 0: random values, `cells` to a side, and finer ones of half the weight."""
    field: np.ndarray = np.zeros((1, 1), dtype=np.float32)
    for octave, side in enumerate(cells):
        field = _resize(field, side) + 0.5**octave * _uniform(rng, side)
    return _resize(field, size)


def _uniform(rng: np.random.Generator, side: int) -> np.ndarray:
    return 2 * rng.random((side, side), dtype=np.float32) - 1


def _resize(field: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(field).resize((side, side), Image.Resampling.BICUBIC))


def _pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.broadcast_to(steps, (size, size)), np.broadcast_to(steps[:, None], (size, size))


def _warped_grid(
    size: int, rng: np.random.Generator, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    x, y = _pixel_grid(size)
    warp = strength * _noise(rng, size, 6)
    return x + warp, y + warp.T


def _vector_canvas(size: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    # Pillow's lines have hard edges; drawn at twice the size and halved they are smooth.
    image = Image.new("L", (2 * size, 2 * size))
    return image, ImageDraw.Draw(image), 2 * size


def _vector_mask(image: Image.Image) -> np.ndarray:
    return np.asarray(image.reduce(2), dtype=np.float32) / 255


def _blend(canvas: np.ndarray, colour: Iterable[np.ndarray], mask: np.ndarray) -> None:
    # Plane by plane, as small arrays are recycled by the allocator and large ones mapped afresh.
    for plane, value in zip(canvas, colour, strict=True):
        plane += (value - plane) * mask


def _ramp(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 1)


def _unit_vector(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([math.cos(angle), math.sin(angle)], dtype=np.float32)


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)  # several times as fast as np.hypot


def _rgb(colour: str) -> np.ndarray:
    return np.array(ImageColor.getrgb(colour), dtype=np.float32)


def _pick_colour(rng: np.random.Generator, colours: Colours) -> np.ndarray:
    first, second = map(_rgb, colours)
    return first + (second - first) * rng.uniform()
