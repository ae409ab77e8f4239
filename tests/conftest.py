"""Small image folders that tests make for themselves."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeImages = Callable[..., Path]


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """A function that fills a folder with the given number of PNGs of each `<class>` path.

    Each image is a tinted, textured square: no two are alike, and the tint tells the class.
    """

    def make(counts: Mapping[str, int], name: str = "raw", size: int = 40, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        root = tmp_path / name
        for number, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True)
            tint = np.array([(number * 70) % 200, (number * 130) % 200, 60])
            for i in range(count):
                pixels = (tint + rng.integers(0, 56, (size, size, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{i:04d}.png")
        return root

    return make
