"""Draws lesion-like images of nine classes, for the demo and the tests.

The classes and their imbalance are those of the ISIC nine-class set; how they look, in
`synthetic.toml`, follows the signs in textbooks of dermoscopy, much simplified. The images let the
whole program run without data or a network; they teach nothing about skin.
"""

import math
import os
import shutil
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from storage.files import lock
from storage.progress import ProgressBar

Range = Sequence[float]  # two ends, between which a number is drawn uniformly
Colours = Sequence[str]  # two ends, between which a colour is drawn uniformly


@dataclass(frozen=True)
class Structure:
    """Something in or over a lesion; `kind` is the method of `_Drawing` that gives its mask.

    `width` is the size or the spacing of its elements as a fraction of the image's side (for
    `blotches` and `ring`: of the lesion's radius), `count` their number where they can be counted,
    and `reach` where they may lie, from 0, the centre, to 1, the border.
    """

    kind: str
    colours: Colours
    probability: float
    width: Range
    count: Sequence[int] = (1, 1)
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
    structures: Sequence[Structure]


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
LOOKS = {
    name: Looks(**fields | {"structures": [Structure(**each) for each in fields["structures"]]})
    for name, fields in _TABLES["classes"].items()
}
CLASSES = tuple(sorted(LOOKS))
NUISANCES = [Structure(**fields) for fields in _TABLES["nuisances"]]  # over a lesion of any class
SPLITS = ("Train", "Test")
MIN_IMAGES_PER_CLASS = (4, 1)  # in Train and in Test
MIN_IMAGES = len(CLASSES) * sum(MIN_IMAGES_PER_CLASS)
MIN_SIZE = 16
MARKER = "synthetic.txt"  # in the folder of drawn images, so that no result of theirs is believed


def draw_lesion(class_name: str, rng: np.random.Generator, size: int = 128) -> Image.Image:
    """Draws a lesion of the given class: an RGB image of `size` x `size` pixels.

    The image depends only on the class, the size and the state of `rng`. Raises ValueError for a
    class that is not in `CLASSES` and for a size below `MIN_SIZE`.
    """
    if class_name not in LOOKS:
        raise ValueError(f"unknown class {class_name!r}; the classes are {', '.join(CLASSES)}")
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE}, not {size}")
    looks = LOOKS[class_name]
    drawing = _Drawing(looks, rng, size)
    brightness = drawing.draw_skin()
    drawing.draw_pigment(looks, brightness)
    for structure in looks.structures:
        drawing.draw_structure(structure, brightness)
    for nuisance in NUISANCES:
        drawing.draw_structure(nuisance, 1.0)
    return drawing.photograph()


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
        raise ValueError(f"num_images must be at least {MIN_IMAGES}, not {num_images}")
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = root.with_name(f".{root.name}.unfinished")
    with lock(root.with_name(f".{root.name}.lock")):
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            if exist_ok and root.is_dir():
                return root
            raise FileExistsError(f"{root} already exists; remove it or choose another folder")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            _draw_files(unfinished, count_images(num_images), seed, size)
            (unfinished / MARKER).write_text("These images are synthetic.\n", encoding="utf-8")
            os.replace(unfinished, root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return root


def is_synthetic(root: str | Path) -> bool:
    """Returns whether the images of a folder were drawn by `make_dataset`."""
    return (Path(root) / MARKER).is_file()


def _draw_files(root: Path, counts: np.ndarray, seed: int, size: int) -> None:
    images = [(*cell, i) for cell, count in np.ndenumerate(counts) for i in range(count)]
    for split, label, i in ProgressBar(images, "drawing images", unit="img"):
        image = draw_lesion(CLASSES[label], np.random.default_rng([seed, split, label, i]), size)
        folder = root / SPLITS[split] / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{CLASSES[label].replace(' ', '_')}_{SPLITS[split].lower()}"
        image.save(folder / f"{stem}_{i:04d}.jpg", quality=90)


def count_images(num_images: int) -> np.ndarray:
    """Returns the number of images of each split (rows) and class (columns), `num_images` in all.

    They are as in the ISIC set by largest remainder, and at least `MIN_IMAGES_PER_CLASS`.
    """
    real = np.array([(LOOKS[name].train_images, LOOKS[name].test_images) for name in CLASSES]).T
    quotas = num_images * real / real.sum()
    counts = np.floor(quotas).astype(int)
    by_remainder = np.argsort((counts - quotas).ravel(), kind="stable")
    counts.flat[by_remainder[: num_images - counts.sum()]] += 1
    least = np.array(MIN_IMAGES_PER_CLASS)[:, None]
    while (counts < least).any():
        spare = counts - least
        counts.flat[[spare.argmin(), spare.argmax()]] += [1, -1]
    return counts


class _Drawing:
    """A lesion on a canvas, where further structures are drawn over it.

    Lengths and places are fractions of the image's side. `rho`, of each pixel, is 0 at the centre
    of the lesion, 1 at its border and more outside.
    """

    def __init__(self, looks: Looks, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        steps = (np.arange(size, dtype=np.float32) + 0.5) / size
        self.x, self.y = np.meshgrid(steps, steps)
        self.radius = self.between(looks.radius)
        self.centre = rng.normal(0.5, 0.05, 2)
        angle = rng.uniform(0, 2 * math.pi)
        stretch = math.sqrt(self.between(looks.elongation))
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        self.axes = turn * self.radius * np.array([stretch, 1 / stretch])
        (a, b), (c, d) = np.linalg.inv(self.axes).astype(np.float32)
        x, y = self.x - np.float32(self.centre[0]), self.y - np.float32(self.centre[1])
        u, v = a * x + b * y, c * x + d * y  # in radii
        lobe_u, lobe_v = self.between(looks.asymmetry) * self.unit_vector()
        lobe = _distance(u - lobe_u, v - lobe_v) / rng.uniform(0.55, 0.8)
        notches = self.between(looks.irregularity) * self.noise(5, 11, 26)
        self.rho = np.minimum(_distance(u, v), lobe) + notches

    def draw_skin(self) -> float:
        """Starts the canvas and returns its brightness, from 0.3 to 1."""
        tones = np.array([_rgb(tone) for tone in _TABLES["skin_tones"]])
        position = self.rng.uniform() ** 1.5 * (len(tones) - 1)
        tone = [np.interp(position, range(len(tones)), channel) for channel in tones.T]
        mottling = 1 + 0.06 * self.noise(5, 25)
        pallor = mottling + 0.05 * self.noise(9)
        red, green, blue = np.array(tone, dtype=np.float32)
        self.canvas = np.stack([red * mottling, green * pallor, blue * pallor])
        # Pigment is darker on darker skin, but not in proportion.
        return 0.3 + 0.7 * float(np.mean(tone) / tones[0].mean())

    def draw_pigment(self, looks: Looks, brightness: float) -> None:
        border, centre = (brightness * self.colour(c) for c in (looks.border, looks.centre))
        patches, grain = self.noise(7), self.noise(14, 32)
        depth = _ramp(1.1 - self.rho + 0.7 * patches)
        shade = 1 + self.rng.uniform(0.05, 0.3) * grain
        pigment = [(b + (c - b) * depth) * shade for b, c in zip(border, centre, strict=True)]
        coverage = _ramp((1 - self.rho) / self.between(looks.edge) + 0.5)
        self.blend(pigment, coverage * self.between(looks.opacity))

    def draw_structure(self, structure: Structure, brightness: float) -> None:
        if self.rng.uniform() < structure.probability:
            colour = brightness * self.colour(structure.colours)
            mask = getattr(self, structure.kind)(structure)
            self.blend(colour, mask * self.between(structure.opacity))

    def photograph(self) -> Image.Image:
        across, along = self.unit_vector()
        slope = across * (self.x - 0.5) + along * (self.y - 0.5)
        light = self.rng.uniform(0.9, 1.1) + self.rng.uniform(0, 0.3) * slope
        light += self.rng.uniform(0.01, 0.05) * self.uniform(self.size)  # the noise of the sensor
        white_balance = self.rng.normal(1, (0.04, 0.03, 0.05)).astype(np.float32)
        planes = [plane * light * w for plane, w in zip(self.canvas, white_balance, strict=True)]
        pixels = np.stack(planes, axis=2).clip(0, 255)
        return Image.fromarray(pixels.astype(np.uint8))

    def network(self, structure: Structure) -> np.ndarray:
        return _ramp(-0.1 - 0.6 * self.lattice(structure)) * self.patches(structure.reach)

    def follicles(self, structure: Structure) -> np.ndarray:
        return _ramp(self.lattice(structure) - 0.7) * self.patches(structure.reach)

    def fingerprint(self, structure: Structure) -> np.ndarray:
        x, y = self.warped_grid(0.06)
        across, along = 2 * math.pi / self.between(structure.width) * self.unit_vector()
        return _ramp(0.7 * np.cos(across * x + along * y)) * self.patches(structure.reach)

    def dots(self, structure: Structure) -> np.ndarray:
        image, pen, scale = self.vector_canvas()
        for x, y in scale * self.points(structure):
            radius = scale * self.between(structure.width)
            width, height = radius * self.rng.uniform(0.8, 1.2, 2)
            box = (x - width, y - height, x + width, y + height)
            pen.ellipse(box, fill=int(self.rng.integers(150, 256)))
        return _vector_mask(image) * self.within((0, structure.reach[1] + 0.1))

    def blotches(self, structure: Structure) -> np.ndarray:
        x, y = self.warped_grid(0.08)
        mask = np.zeros_like(x)
        for centre_x, centre_y in self.points(structure).astype(np.float32):
            radius = self.radius * self.between(structure.width)
            mask = np.maximum(mask, _ramp(2 - 2 * _distance(x - centre_x, y - centre_y) / radius))
        return mask * self.within((0, 1))

    def ring(self, structure: Structure) -> np.ndarray:
        distance = (self.rho - 0.9) / self.between(structure.width)
        return _ramp(1.3 - np.abs(distance)) * _ramp(0.7 + self.noise(6))

    def scales(self, structure: Structure) -> np.ndarray:
        cells = round(1 / self.between(structure.width))
        flakes, clumps = self.noise(cells, 2 * cells), self.noise(6)
        return _ramp(4 * (flakes + clumps - 0.5)) * self.within(structure.reach)

    def vessels(self, structure: Structure) -> np.ndarray:
        image, pen, scale = self.vector_canvas()
        for start in self.points(structure):
            inwards = self.centre - start
            angle = math.atan2(inwards[1], inwards[0]) + self.rng.normal(0, 0.4)
            length, width = 1.3 * self.radius, self.between(structure.width)
            self.draw_branch(pen, scale * start, angle, scale * length, scale * width)
        return _vector_mask(image)

    def draw_branch(
        self, pen: ImageDraw.ImageDraw, start: np.ndarray, angle: float, length: float, width: float
    ) -> None:
        angles = angle + self.rng.normal(0, 0.3, 7).cumsum()
        steps = length / len(angles) * np.array([np.cos(angles), np.sin(angles)]).T
        path = np.vstack([start, start + steps.cumsum(axis=0)])
        pen.line(path.ravel().tolist(), fill=255, width=max(1, round(width)), joint="curve")
        if width > 1:
            for node in self.rng.integers(1, 6, 2):
                turned = angles[node] + self.rng.choice((-1, 1)) * self.rng.uniform(0.5, 1.0)
                self.draw_branch(pen, path[node], turned, 0.5 * length, 0.5 * width)

    def hairs(self, structure: Structure) -> np.ndarray:
        image, pen, scale = self.vector_canvas()
        t = np.linspace(0, 1, 10)[:, None]
        growth = self.unit_vector()
        for _ in range(self.number(structure)):
            root = self.rng.uniform(-0.1, 1.1, 2)
            tip = root + self.rng.uniform(0.2, 0.9) * growth + self.rng.normal(0, 0.15, 2)
            bend = (root + tip) / 2 + self.rng.normal(0, 0.1, 2)
            curve = (1 - t) ** 2 * root + 2 * t * (1 - t) * bend + t**2 * tip  # quadratic Bézier
            width = max(1, round(scale * self.between(structure.width)))
            pen.line((scale * curve).ravel().tolist(), fill=255, width=width, joint="curve")
        return _vector_mask(image)

    def bubbles(self, structure: Structure) -> np.ndarray:
        image, pen, scale = self.vector_canvas()
        for _ in range(self.number(structure)):
            x, y = scale * self.rng.uniform(0, 1, 2)
            radius = scale * self.between(structure.width)
            box = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse(box, fill=60, outline=255, width=2)
        return _vector_mask(image)

    def ruler(self, structure: Structure) -> np.ndarray:
        image, pen, scale = self.vector_canvas()
        along = self.unit_vector()
        inwards = np.array([-along[1], along[0]])
        count = self.number(structure)
        spacing = self.between(structure.width)
        corner = 0.5 - self.rng.uniform(0.42, 0.5) * inwards - spacing * count / 2 * along
        for tick in range(count):
            foot = corner + tick * spacing * along
            tip = foot + (0.06 if tick % 5 == 0 else 0.03) * inwards
            pen.line((scale * np.concatenate([foot, tip])).tolist(), fill=255, width=2)
        return _vector_mask(image)

    def vignette(self, structure: Structure) -> np.ndarray:
        centre_x, centre_y = self.rng.normal(0.5, 0.03, 2).astype(np.float32)
        distance = _distance(self.x - centre_x, self.y - centre_y)
        beyond = distance - self.between(structure.width)
        return _ramp(beyond / self.rng.uniform(0.02, 0.12))

    def between(self, ends: Range) -> float:
        low, high = ends
        return self.rng.uniform(low, high)

    def number(self, structure: Structure) -> int:
        fewest, most = structure.count
        return int(self.rng.integers(fewest, most, endpoint=True))

    def points(self, structure: Structure) -> np.ndarray:
        count, (inner, outer) = self.number(structure), structure.reach
        # The root spreads the points evenly over the area.
        distances = np.sqrt(self.rng.uniform(inner**2, outer**2, count))
        angles = self.rng.uniform(0, 2 * math.pi, count)
        points = distances * np.array([np.cos(angles), np.sin(angles)])
        return (self.axes @ points).T + self.centre

    def within(self, reach: Range) -> np.ndarray:
        inner, outer = reach
        mask = _ramp((outer - self.rho) / 0.15 + 0.5)
        return mask * _ramp((self.rho - inner) / 0.15 + 0.5) if inner > 0 else mask

    def patches(self, reach: Range) -> np.ndarray:
        return _ramp(0.7 + self.noise(6)) * self.within(reach)

    def lattice(self, structure: Structure) -> np.ndarray:
        """Three waves 60 degrees apart: high in the cells of a honeycomb, low on its walls."""
        x, y = self.warped_grid(0.03)
        frequency = 2 * math.pi / self.between(structure.width)
        angles = self.rng.uniform(0, math.pi) + np.array([0, math.pi / 3, 2 * math.pi / 3])
        waves = frequency * np.array([np.cos(angles), np.sin(angles)], dtype=np.float32).T
        return np.sum([np.cos(along_x * x + along_y * y) for along_x, along_y in waves], axis=0)

    def warped_grid(self, strength: float) -> tuple[np.ndarray, np.ndarray]:
        warp = strength * self.noise(6)
        return self.x + warp, self.y + warp.T

    def noise(self, *cells: int) -> np.ndarray:
        """Smooth noise about 0: random values, `cells` to a side, and finer ones of half weight."""
        field: np.ndarray = np.zeros((1, 1), dtype=np.float32)
        for octave, side in enumerate(cells):
            field = _resize(field, side) + 0.5**octave * self.uniform(side)
        return _resize(field, self.size)

    def uniform(self, side: int) -> np.ndarray:
        return 2 * self.rng.random((side, side), dtype=np.float32) - 1

    def unit_vector(self) -> np.ndarray:
        angle = self.rng.uniform(0, 2 * math.pi)
        return np.array([math.cos(angle), math.sin(angle)], dtype=np.float32)

    def colour(self, colours: Colours) -> np.ndarray:
        first, second = map(_rgb, colours)
        return first + (second - first) * self.rng.uniform()

    def vector_canvas(self) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
        # Pillow's lines have hard edges; drawn at twice the size and halved they are smooth.
        image = Image.new("L", (2 * self.size, 2 * self.size))
        return image, ImageDraw.Draw(image), 2 * self.size

    def blend(self, colour: Iterable[np.ndarray], mask: np.ndarray) -> None:
        # Plane by plane: the allocator recycles small arrays and maps large ones afresh.
        for plane, value in zip(self.canvas, colour, strict=True):
            plane += (value - plane) * mask


def _vector_mask(image: Image.Image) -> np.ndarray:
    return np.asarray(image.reduce(2), dtype=np.float32) / 255


def _resize(field: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(field).resize((side, side), Image.Resampling.BICUBIC))


def _ramp(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 1)


def _distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y)  # several times as fast as np.hypot


def _rgb(colour: str) -> np.ndarray:
    return np.array(ImageColor.getrgb(colour), dtype=np.float32)
