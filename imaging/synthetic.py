"""Draws lesion-like images of nine classes, for the demo and the tests.

The classes and their unbalance are those of the ISIC nine-class set; the signs are those that
textbooks of dermoscopy give, much simplified. Nobody learns anything about skin from these images:
they are there so that the whole program can be run without data and without a network.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

from storage.files import lock

Range = tuple[float, float]  # a number is drawn evenly between the two
Colours = tuple[str, str]  # a colour is drawn on the line between the two


@dataclass(frozen=True)
class Structure:
    """Something seen in or over a lesion; `kind` picks the function that draws its mask.

    `width` is the size or the spacing of its elements as a fraction of the image's side (for
    `blotches` and `ring`: of the lesion's radius), `count` how many there are where that can be
    said, and `reach` where they may lie, from 0, the centre, to 1, the border.
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
    """How the members of a class look, and how many of them the ISIC nine-class set has.

    `radius` is a fraction of the image's side; `elongation` the ratio of the axes; `asymmetry` how
    far a second lobe juts out, `irregularity` how deep the border is notched, and `edge` how wide
    it fades, all three in radii; `opacity` how much of the skin the pigment hides.
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


LOOKS = {
    "actinic keratosis": Looks(
        train_images=114,
        test_images=16,
        border=("#d98f80", "#b9625a"),
        centre=("#d27a6c", "#a8504c"),
        radius=(0.22, 0.38),
        elongation=(1.0, 1.5),
        asymmetry=(0.1, 0.7),
        irregularity=(0.15, 0.4),
        edge=(0.4, 0.9),
        opacity=(0.4, 0.75),
        structures=(
            Structure(
                "follicles", ("#f3d9c4", "#e8c8a8"), 0.75, (0.045, 0.075), opacity=(0.4, 0.8)
            ),
            Structure("scales", ("#f4ead8", "#e3cf9f"), 0.6, (0.02, 0.035), opacity=(0.3, 0.7)),
            Structure("dots", ("#6e4632", "#94664a"), 0.3, (0.008, 0.02), (2, 8)),
        ),
    ),
    "basal cell carcinoma": Looks(
        train_images=378,
        test_images=16,
        border=("#e3aca6", "#c98580"),
        centre=("#dc9c9a", "#b8706f"),
        radius=(0.16, 0.34),
        elongation=(1.0, 1.5),
        asymmetry=(0.0, 0.6),
        irregularity=(0.08, 0.25),
        edge=(0.12, 0.4),
        opacity=(0.4, 0.85),
        structures=(
            Structure("ring", ("#f6dcd6", "#ffeee8"), 0.5, (0.08, 0.16), opacity=(0.3, 0.65)),
            Structure("blotches", ("#7a2f26", "#4c211c"), 0.35, (0.15, 0.35), (1, 2), (0.0, 0.5)),
            Structure("vessels", ("#b3202c", "#8c1a2a"), 0.8, (0.008, 0.014), (2, 5), (0.5, 1.05)),
            Structure("dots", ("#5a5f72", "#3d3f52"), 0.65, (0.012, 0.035), (2, 10)),
        ),
    ),
    "dermatofibroma": Looks(
        train_images=95,
        test_images=16,
        border=("#c99a78", "#a9765a"),
        centre=("#cf9f88", "#b0796a"),
        radius=(0.15, 0.28),
        elongation=(1.0, 1.2),
        asymmetry=(0.0, 0.25),
        irregularity=(0.03, 0.12),
        edge=(0.25, 0.6),
        opacity=(0.5, 0.85),
        structures=(
            Structure("network", ("#8a5a40", "#6e442f"), 0.75, (0.025, 0.04), reach=(0.45, 1.05)),
            Structure("blotches", ("#f5e6dc", "#e6c9c4"), 0.85, (0.3, 0.6), (1, 2), (0.0, 0.2)),
            Structure("dots", ("#b8403e", "#943434"), 0.2, (0.006, 0.012), (3, 10)),
        ),
    ),
    "melanoma": Looks(
        train_images=438,
        test_images=16,
        border=("#985a34", "#562e18"),
        centre=("#6e3e22", "#22140e"),
        radius=(0.18, 0.36),
        elongation=(1.0, 1.5),
        asymmetry=(0.2, 0.9),
        irregularity=(0.15, 0.4),
        edge=(0.06, 0.25),
        opacity=(0.75, 1.0),
        structures=(
            Structure("network", ("#3a2218", "#20140f"), 0.5, (0.035, 0.06)),
            Structure("blotches", ("#1c1412", "#33211a"), 0.65, (0.2, 0.5), (1, 3), (0.1, 0.9)),
            Structure("blotches", ("#77808f", "#565c6c"), 0.6, (0.3, 0.6), (1, 2), (0.0, 0.7)),
            Structure("blotches", ("#e8d5cc", "#cdb6b4"), 0.4, (0.12, 0.35), (1, 2), (0.1, 0.8)),
            Structure("blotches", ("#b04a44", "#8f3a38"), 0.35, (0.15, 0.35), (1, 2), (0.3, 0.9)),
            Structure("dots", ("#20140f", "#3a2218"), 0.5, (0.008, 0.022), (4, 16), (0.6, 1.15)),
        ),
    ),
    "nevus": Looks(
        train_images=357,
        test_images=16,
        border=("#be8258", "#864e2e"),
        centre=("#9a5a34", "#502a18"),
        radius=(0.13, 0.32),
        elongation=(1.0, 1.35),
        asymmetry=(0.0, 0.3),
        irregularity=(0.02, 0.14),
        edge=(0.1, 0.4),
        opacity=(0.65, 0.95),
        structures=(
            Structure("network", ("#5c3622", "#3c2417"), 0.75, (0.025, 0.045)),
            Structure("dots", ("#4e2e1e", "#6a4029"), 0.35, (0.008, 0.02), (6, 20), (0.0, 0.9)),
        ),
    ),
    "pigmented benign keratosis": Looks(
        train_images=462,
        test_images=16,
        border=("#b88a62", "#8a6044"),
        centre=("#a87854", "#745242"),
        radius=(0.14, 0.34),
        elongation=(1.0, 1.6),
        asymmetry=(0.0, 0.6),
        irregularity=(0.08, 0.28),
        edge=(0.06, 0.25),
        opacity=(0.5, 0.9),
        structures=(
            Structure(
                "fingerprint", ("#6b4a38", "#523a30"), 0.75, (0.025, 0.045), opacity=(0.4, 0.8)
            ),
            Structure("dots", ("#6f6a70", "#57525c"), 0.4, (0.006, 0.014), (8, 30)),
            Structure("dots", ("#f2e6cf", "#e4cf9f"), 0.2, (0.008, 0.018), (2, 6), (0.0, 0.8)),
            Structure("blotches", ("#c98a52", "#b5703f"), 0.3, (0.2, 0.45), (1, 2), (0.0, 0.8)),
        ),
    ),
    "seborrheic keratosis": Looks(
        train_images=77,
        test_images=3,
        border=("#94663c", "#5a3820"),
        centre=("#a07248", "#603e28"),
        radius=(0.2, 0.36),
        elongation=(1.0, 1.5),
        asymmetry=(0.0, 0.4),
        irregularity=(0.05, 0.15),
        edge=(0.02, 0.08),
        opacity=(0.85, 1.0),
        structures=(
            Structure("fingerprint", ("#4a3022", "#38251b"), 0.3, (0.06, 0.1), opacity=(0.3, 0.6)),
            Structure("dots", ("#2e1d14", "#42291c"), 0.6, (0.012, 0.026), (4, 14), (0.0, 0.9)),
            Structure("dots", ("#f7efdc", "#ecd9a4"), 0.85, (0.01, 0.024), (6, 22), (0.0, 0.9)),
        ),
    ),
    "squamous cell carcinoma": Looks(
        train_images=181,
        test_images=16,
        border=("#d88c80", "#b3554f"),
        centre=("#cb6f64", "#9c4540"),
        radius=(0.17, 0.34),
        elongation=(1.0, 1.4),
        asymmetry=(0.1, 0.6),
        irregularity=(0.12, 0.35),
        edge=(0.15, 0.45),
        opacity=(0.55, 0.9),
        structures=(
            Structure("dots", ("#a3202a", "#7d1c24"), 0.5, (0.006, 0.014), (6, 24), (0.5, 1.0)),
            Structure("blotches", ("#c79a4e", "#8a5a30"), 0.7, (0.25, 0.5), (1, 2), (0.0, 0.25)),
            Structure("scales", ("#fbf4e4", "#efd9a0"), 0.8, (0.03, 0.05), opacity=(0.6, 0.95)),
            Structure("blotches", ("#5a1e18", "#3f1814"), 0.3, (0.1, 0.2), (1, 2), (0.0, 0.4)),
        ),
    ),
    "vascular lesion": Looks(
        train_images=139,
        test_images=3,
        border=("#c4485a", "#8c2a4a"),
        centre=("#b02c44", "#6e1c3c"),
        radius=(0.1, 0.28),
        elongation=(1.0, 1.35),
        asymmetry=(0.0, 0.4),
        irregularity=(0.04, 0.18),
        edge=(0.05, 0.25),
        opacity=(0.65, 0.95),
        structures=(
            Structure("dots", ("#a3182e", "#c42a3c"), 0.8, (0.025, 0.055), (5, 14)),
            Structure("dots", ("#5c1a40", "#3e1530"), 0.65, (0.025, 0.05), (2, 10)),
            Structure("blotches", ("#e0c0d0", "#c8a8c8"), 0.3, (0.2, 0.4), opacity=(0.3, 0.6)),
            Structure("blotches", ("#2a0f1a", "#3c1424"), 0.25, (0.15, 0.35), (1, 2)),
        ),
    ),
}

CLASSES = tuple(sorted(LOOKS))

# From the lightest skin to the darkest, as a dermatoscope shows it.
SKIN_TONES = ("#f0d3c8", "#e6b8ac", "#dba48e", "#c68c72", "#a26c50", "#7a4e36")

# What lies over any lesion, whatever its class.
NUISANCES = (
    Structure(
        "network", ("#9a6a58", "#7a4c3c"), 0.4, (0.03, 0.05), reach=(0, 9), opacity=(0.1, 0.3)
    ),
    Structure("hairs", ("#2a1c16", "#5a4030"), 0.4, (0.004, 0.01), (1, 14), opacity=(0.6, 0.95)),
    Structure("bubbles", ("#fff6f0", "#ffffff"), 0.15, (0.01, 0.04), (1, 6), opacity=(0.3, 0.6)),
    Structure("ruler", ("#1c1c20", "#3c3c40"), 0.12, (0.03, 0.05), (8, 20), opacity=(0.7, 0.95)),
    Structure("vignette", ("#080606", "#140e0e"), 0.3, (0.5, 0.62), opacity=(0.85, 1.0)),
)

SPLITS = ("Train", "Test")
MIN_IMAGES_PER_CLASS = (4, 1)  # in Train and in Test
MIN_IMAGES = len(CLASSES) * sum(MIN_IMAGES_PER_CLASS)
MIN_SIZE = 16


def draw_lesion(class_name: str, rng: np.random.Generator, size: int = 128) -> Image.Image:
    """An RGB image of `size` x `size` pixels that shows a drawn lesion of the given class.

    The image depends on the class, the size and the state of `rng` alone. Raises ValueError when
    the class is none of `CLASSES`, or the size is below `MIN_SIZE`.
    """
    if class_name not in LOOKS:
        raise ValueError(f"{class_name!r} is none of the classes {', '.join(CLASSES)}")
    if size < MIN_SIZE:
        raise ValueError(f"size {size} is too small to draw in, take at least {MIN_SIZE}")
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
    """Draws `num_images` JPEGs into `root/Train/<class>/` and `root/Test/<class>/`, and gives root.

    Classes and splits are as unbalanced as in the ISIC nine-class set, but none is empty. The i-th
    image of a class in a split depends on (seed, split, class, i) alone, however many others are
    drawn. `root` appears whole or not at all, drawn by one process while others wait. Raises
    FileExistsError when `root` holds anything already, unless `exist_ok` leaves that as it is, and
    ValueError when `num_images` is below `MIN_IMAGES`.
    """
    if num_images < MIN_IMAGES:
        raise ValueError(f"{num_images} images are too few, draw at least {MIN_IMAGES}")
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = root.with_name(f".{root.name}.unfinished")
    with lock(root.with_name(f".{root.name}.lock")):
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            if exist_ok and root.is_dir():
                return root
            raise FileExistsError(f"{root}: already exists, remove it or name another folder")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        try:
            _draw_files(unfinished, _count_images(num_images), seed, size)
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


def _count_images(num_images: int) -> np.ndarray:
    """How many images each split (rows) has of each class (columns), by largest remainder."""
    table = [LOOKS[class_name] for class_name in CLASSES]
    real = np.array([(looks.train_images, looks.test_images) for looks in table]).T
    quotas = num_images * real / real.sum()
    counts = np.floor(quotas).astype(int)
    by_remainder = np.argsort((counts - quotas).ravel(), kind="stable")
    counts.flat[by_remainder[: num_images - counts.sum()]] += 1
    spare = counts - np.array(MIN_IMAGES_PER_CLASS)[:, None]
    while spare.min() < 0:
        poorest, richest = spare.argmin(), spare.argmax()
        spare.flat[[poorest, richest]] += [1, -1]
    return spare + np.array(MIN_IMAGES_PER_CLASS)[:, None]


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
    tones = np.array([_rgb(tone) for tone in SKIN_TONES])
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
    count = rng.integers(*structure.count, endpoint=True)
    for x, y in scale * lesion.points(rng, count, structure.reach):
        width, height = scale * rng.uniform(*structure.width) * rng.uniform(0.8, 1.2, 2)
        box = (x - width, y - height, x + width, y + height)
        draw.ellipse(box, fill=int(rng.integers(150, 256)))
    return _vector_mask(image) * lesion.within((0, structure.reach[1] + 0.1))


def _blotches(structure: Structure, lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    x, y = _warped_grid(lesion.size, rng, 0.08)
    mask = np.zeros_like(x)
    count = rng.integers(*structure.count, endpoint=True)
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
    count = rng.integers(*structure.count, endpoint=True)
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
    count = rng.integers(*structure.count, endpoint=True)
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
    return sum(np.cos(along_x * x + along_y * y) for along_x, along_y in waves)


def _unevenly(lesion: _Lesion, rng: np.random.Generator) -> np.ndarray:
    return _ramp(0.7 + _noise(rng, lesion.size, 6))


def _noise(rng: np.random.Generator, size: int, *cells: int) -> np.ndarray:
    """Smooth noise about 0: random values, `cells` to a side, and finer ones of half the weight."""
    field = np.zeros((1, 1), dtype=np.float32)
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
