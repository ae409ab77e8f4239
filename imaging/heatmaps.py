"""Heatmaps over images, in colour; without the seconds of importing what draws figures."""

import matplotlib
import numpy as np

from imaging.decode import as_shares, as_uint8

HEATMAP_COLOURS = "viridis"


def overlay_heatmap(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """Returns an image uint8 (H, W, 3) under a heatmap in colour, the more opaque the higher it is.

    `image` is (H, W, 3), uint8 or float in [0, 1], and `heatmap` (H, W) float in [0, 1]. Where the
    heatmap is 0, the image stays as it is.

    Raises ValueError for another shape or range.
    """
    image, heatmap = as_uint8(image, "image", ndim=3), np.asarray(heatmap)
    as_shares(heatmap, "heatmap", image.shape[:2])
    return blend_heatmaps(image, heatmap, 0.6 * heatmap[..., None])


def blend_heatmaps(
    images: np.ndarray, heatmaps: np.ndarray, opacity: np.ndarray | float
) -> np.ndarray:
    """Returns images uint8 (..., 3) mixed with heatmaps (...) in colour, at this opacity."""
    colours = 255 * matplotlib.colormaps[HEATMAP_COLOURS](heatmaps)[..., :3]
    return np.round((1 - opacity) * images + opacity * colours).astype(np.uint8)
