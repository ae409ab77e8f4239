"""Heatmaps over images, in colour; without the seconds of importing what draws figures."""

import functools
from bisect import bisect_right
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imaging.decode import as_shares, as_uint8
from storage.files import printable

HEATMAP_COLOURS = "viridis"
FIGURE_SIDE = 512  # of the image and of the overlay in `draw_explanation`, in pixels
MARGIN, BAR_WIDTH, TICK_WIDTH = 16, 20, 40
TEXT_SIZE, HEADING_SIZE = 16, 22
MAX_CHARACTERS = 300  # of a text in a figure; the rest is left out
GREY = (96, 96, 96)


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


def draw_explanation(
    image: np.ndarray, heatmap: np.ndarray, class_name: str, heading: Sequence[str]
) -> Image.Image:
    """Returns a figure of an image and, to its right, the same under its heatmap with a scale.

    `image` is square, (H, H, 3), uint8 or float in [0, 1], and `heatmap` (h, h), float in [0, 1],
    covers the same region; both are scaled smoothly to `FIGURE_SIDE`. `class_name` is the class
    that the heatmap is for, and `heading` the lines above, the first of them in bold; any text will
    do. A heatmap that is 0 everywhere is replaced by a sentence that says what that means.

    Raises ValueError for another shape or range.
    """
    image = as_uint8(image, "image", ndim=3)
    heatmap = np.asarray(heatmap, dtype=np.float32)
    as_shares(heatmap, "heatmap", heatmap.shape[:1] * 2)
    if image.shape[0] != image.shape[1]:
        raise ValueError(f"image has shape {image.shape}; it must be as high as it is wide")
    side = FIGURE_SIDE
    left, right = MARGIN, side + 2 * MARGIN
    width = right + side + MARGIN + BAR_WIDTH + TICK_WIDTH + MARGIN
    texts = [
        *_lay_out(heading[:1], HEADING_SIZE, width - 2 * MARGIN, is_bold=True),
        *_lay_out(heading[1:], TEXT_SIZE, width - 2 * MARGIN),
    ]
    top = MARGIN + sum(_line_height(font) for _, font in texts) + MARGIN // 2
    class_name = printable(class_name)
    captions = _lay_out(
        [f"Grad-CAM: regions that raise the output for {class_name}"], TEXT_SIZE, side
    )
    height = top + side + MARGIN // 2 + _line_height(captions[0][1]) * len(captions) + MARGIN

    figure = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(figure)
    pixels = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    _write(draw, (left, MARGIN), texts)
    figure.paste(pixels, (left, top))
    below = top + side + MARGIN // 2
    _write(draw, (left, below), _lay_out(["image, as cropped for the model"], TEXT_SIZE, side))
    if not heatmap.any():
        figure.paste(_pale(pixels), (right, top))
        _draw_why_empty(draw, (right, top), class_name)
        return figure
    scaled = Image.fromarray(heatmap).resize((side, side), Image.Resampling.BILINEAR)
    overlay = overlay_heatmap(np.asarray(pixels), np.clip(np.asarray(scaled), 0, 1))
    figure.paste(Image.fromarray(overlay), (right, top))
    _write(draw, (right, below), captions)
    _draw_scale(figure, (right + side + MARGIN, top), np.asarray(pixels))
    return figure


def _pale(image: Image.Image) -> Image.Image:
    return Image.blend(image, Image.new("RGB", image.size, "white"), 0.8)


def _draw_why_empty(draw: ImageDraw.ImageDraw, corner: tuple[int, int], class_name: str) -> None:
    sentences = [
        "The heatmap is empty.",
        f"According to Grad-CAM, no region of this image raises the output for {class_name}. "
        "It is predicted all the same, because the outputs for the other classes are lower still.",
    ]
    texts = _lay_out(sentences, HEADING_SIZE, FIGURE_SIDE - 4 * MARGIN)
    height = sum(_line_height(font) for _, font in texts)
    top = max(MARGIN, (FIGURE_SIDE - height) // 2)
    _write(draw, (corner[0] + 2 * MARGIN, corner[1] + top), texts)


def _draw_scale(figure: Image.Image, corner: tuple[int, int], image: np.ndarray) -> None:
    """Draws what heatmaps from 1 to 0 look like over the mean colour of the image."""
    shape = (FIGURE_SIDE, BAR_WIDTH)
    mean = np.broadcast_to(image.mean(axis=(0, 1)).astype(np.uint8), (*shape, 3))
    values = np.broadcast_to(np.linspace(1, 0, FIGURE_SIDE)[:, None], shape)
    figure.paste(Image.fromarray(overlay_heatmap(mean, values)), corner)
    draw, font = ImageDraw.Draw(figure), _font(TEXT_SIZE)
    x = corner[0] + BAR_WIDTH
    for value in (1.0, 0.5, 0.0):
        y = corner[1] + round((1 - value) * (FIGURE_SIDE - 1))
        draw.line([(x, y), (x + 4, y)], fill=GREY)
        anchor = {1.0: "la", 0.5: "lm", 0.0: "ld"}[value]
        draw.text((x + 8, y), f"{value:g}", fill=GREY, font=font, anchor=anchor)


def _lay_out(
    texts: Sequence[str], size: int, width: int, *, is_bold: bool = False
) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """Returns texts in lines that are at most `width` pixels wide, each with its font."""
    font = _font(size, is_bold=is_bold)
    return [(line, font) for text in texts for line in _wrap(text, font, width)]


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Returns a text in lines that fit, broken at a space where there is one."""
    text, lines = printable(text), []
    if len(text) > MAX_CHARACTERS:
        text = text[: MAX_CHARACTERS - 1] + "…"
    while text:
        ends = range(1, len(text) + 1)
        num_fitting = bisect_right(ends, width, key=lambda end: ceil(font.getlength(text[:end])))
        end = fitting = max(1, num_fitting)
        if fitting < len(text) and " " in text[1 : fitting + 1]:
            end = text.rindex(" ", 1, fitting + 1)
        lines.append(text[:end])
        text = text[end:].lstrip(" ")
    return lines


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    texts: Sequence[tuple[str, ImageFont.FreeTypeFont]],
) -> None:
    x, y = corner
    for text, font in texts:
        draw.text((x, y), text, fill="black", font=font)
        y += _line_height(font)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(1.35 * font.size)


@functools.cache
def _font(size: int, *, is_bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns matplotlib's own font, which has more of Unicode than Pillow's."""
    name = "DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)
