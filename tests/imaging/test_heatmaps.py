"""The figure of an image beside its heatmap."""

import os

import numpy as np
import pytest

from imaging.heatmaps import FIGURE_SIDE, draw_explanation, overlay_heatmap

GREY = np.full((64, 64, 3), 128, np.uint8)
HEADING = ["nevus, probability 0.50", "flagged: malignant", "x.png"]


def panels(figure):
    """The image, the overlay and the colour bar of a figure without text beside them."""
    pixels = np.asarray(figure)
    is_white = (pixels == 255).all(axis=2)
    rows = np.flatnonzero(~is_white[:, 20])  # left of all letters but those of the lines of text
    longest = max(np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1), key=len)
    top = longest[0]
    columns = np.flatnonzero(~is_white[top + FIGURE_SIDE // 4])
    left, right, bar = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)[:3]
    rows = slice(top, top + FIGURE_SIDE)
    return [pixels[rows, part[0] : part[-1] + 1] for part in (left, right, bar)]


def test_the_image_stands_beside_its_overlay_and_a_scale_of_what_the_overlay_does():
    heatmap = np.zeros((8, 8))
    heatmap[:, 4:] = 1
    image, overlay, bar = panels(draw_explanation(GREY, heatmap, "nevus", HEADING))
    assert image.shape == overlay.shape == (FIGURE_SIDE, FIGURE_SIDE, 3)
    assert (image == 128).all()
    assert (overlay[:, :200] == 128).all()
    highest = overlay_heatmap(GREY[:1, :1], np.ones((1, 1)))[0, 0]
    assert (overlay[:, 320:] == highest).all() and (highest != 128).any()
    between = overlay[100, 225:285].astype(int)  # smoothly scaled, not in squares
    assert len(np.unique(between, axis=0)) > 40
    assert (bar[0] == highest).all() and (bar[-1] == 128).all()


def test_an_empty_heatmap_is_replaced_by_words():
    drawn = [np.asarray(draw_explanation(GREY, m, "nevus", HEADING)) for m in
             (np.zeros((8, 8)), np.full((8, 8), 1e-3))]  # fmt: skip
    right = [pixels[100:550, 550:1040] for pixels in drawn]
    is_dark = [(pixels.max(axis=2) < 60) for pixels in right]
    assert is_dark[0].sum() > 1000 and not is_dark[1].any()  # letters
    other = np.asarray(draw_explanation(GREY, np.zeros((8, 8)), "melanoma", HEADING))
    assert (other[100:550, 550:1040] != right[0]).any()  # the class is named


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\nb\0",
        os.fsdecode(b"\xff"),
        "möle ☃",
        "母斑 🩺 نمش",
        "W" * 5000,
        "a b " * 500,
        "$1_x %s {",
    ],
)
def test_any_text_fits_into_the_figure(text):
    plain = draw_explanation(GREY, np.zeros((8, 8)), "nevus", HEADING)
    for heatmap in (np.zeros((8, 8)), np.ones((8, 8))):
        figure = draw_explanation(GREY, heatmap, text, [text, text, text])
        assert figure.width == plain.width and figure.height < 3 * FIGURE_SIDE
        pixels = np.asarray(figure)
        for edge in (pixels[:5], pixels[-5:], pixels[:, :5], pixels[:, -5:]):
            assert (edge == 255).all()


def test_all_words_of_a_long_line_are_shown():
    heights = [
        draw_explanation(GREY, np.ones((8, 8)), "nevus", ["nevus", words, "x.png"]).height
        for words in ("flagged: a", "flagged: " + ", ".join(f"class number {n}" for n in range(15)))
    ]
    assert heights[1] > heights[0]


def test_an_image_or_a_heatmap_of_another_shape_or_range_is_refused():
    with pytest.raises(ValueError, match="as high as it is wide"):
        draw_explanation(GREY[:32], np.ones((8, 8)), "nevus", HEADING)
    with pytest.raises(ValueError, match=r"heatmap has shape \(8, 4\)"):
        draw_explanation(GREY, np.ones((8, 4)), "nevus", HEADING)
    with pytest.raises(ValueError, match="heatmap goes from"):
        draw_explanation(GREY, np.full((8, 8), 2.0), "nevus", HEADING)
