"""Every figure: arrays and tables in, a matplotlib `Figure` out.

Figures are built without pyplot: no display is needed, none stays open, and nobody's rcParams
change. Names and titles are shown as they are, never read as mathematics. With `save_path` the
figure is also written there, whole or not at all, in the format that its suffix names (.png, .pdf,
.svg and what else matplotlib can write); an unknown suffix is a ValueError, a missing folder a
FileNotFoundError.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from evaluation import best_evaluation
from evaluation.metrics import (
    Curve,
    check_labels,
    check_predictions,
    compute_precision_recall_curve,
    compute_roc_curve,
    format_percent,
)
from imaging.decode import as_shares, as_uint8
from imaging.heatmaps import HEATMAP_COLOURS, blend_heatmaps
from imaging.heatmaps import overlay_heatmap as overlay_heatmap  # for those who import it from here
from imaging.lesions import is_malignant, is_melanoma
from storage.files import write_atomically

_COLOURS = sns.color_palette("colorblind")
_BLUE, _ORANGE, _GREEN = _COLOURS[:3]
_DARK_GREY, _LIGHT_GREY = "0.35", "0.92"

# The lines of classes differ in dashes too, which grey print keeps. Two colours of the palette are
# too pale for a line.
_LINE_COLOURS = [*(_COLOURS[index] for index in (0, 1, 2, 3, 4, 5, 7, 9)), "black"]
_DASHES: list[str | tuple[int, tuple[float, ...]]] = [
    "solid",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (2.5, 1.5)),
    (0, (6, 1.5, 1, 1.5, 1, 1.5)),
    (0, (12, 2)),
    (0, (1, 3)),
    (0, (4, 1.5, 4, 1.5, 1, 1.5)),
]

_STYLE: dict[Any, float] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "text.usetex": False,
    "pdf.fonttype": 42,  # journals ask for TrueType, and Type 3 is matplotlib's default
}
_INCHES_PER_CHARACTER = 0.6 * _STYLE["font.size"] / 72

_LEARNING_PANELS = {  # y label: (history column, legend, colour) of each line
    "Loss": [("train_loss", "training", _BLUE), ("valid_loss", "validation", _ORANGE)],
    "Validation precision": [("valid_precision", "weighted mean", _ORANGE)],
    "Validation recall": [
        ("valid_recall", "weighted mean", _ORANGE),
        ("valid_balanced_accuracy", "balanced accuracy", _GREEN),
    ],
    "Learning rate": [("learning_rate", "", _DARK_GREY)],
}
_METRICS = ["precision", "recall", "f1", "balanced_accuracy"]
_UNIT_RANGE = (-0.02, 1.02)
_NO_FRAME: dict[str, Any] = {"frame_on": False, "xticks": [], "yticks": []}


def plot_learning_curves(
    history: Mapping[str, Sequence[float | None]] | pd.DataFrame,
    *,
    learning_rates: Sequence[float] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws loss, precision, recall and learning rate over the steps, the best evaluation marked.

    `history` holds equally long columns, an entry an evaluation: `step`, `learning_rate`,
    `train_loss`, `valid_loss`, and in [0, 1] `valid_precision`, `valid_recall` and
    `valid_balanced_accuracy`; others are passed over. None and NaN leave a gap. The best evaluation
    has the highest `valid_balanced_accuracy`, of equal ones the lowest `valid_loss`.
    `learning_rates` are those of each step from the first; by default those at evaluations are
    joined.

    Raises ValueError when a column is missing, lengths differ, or there is no entry.
    """
    columns = [line[0] for lines in _LEARNING_PANELS.values() for line in lines]
    table = _checked_table(history, "history", ["step", *columns]).astype(float)
    with _figure((7.2, 5.0), title, save_path) as figure:
        panels = figure.subplots(2, 2, sharex=True).flat
        for ax, (name, lines) in zip(panels, _LEARNING_PANELS.items(), strict=True):
            for column, label, colour in lines:
                values = table.set_index("step")[column]
                if column == "learning_rate" and learning_rates is not None:
                    values = pd.Series(np.asarray(learning_rates, dtype=float))
                    values.index += 1
                # Dots as wide as the line still show a value between two gaps.
                dots = {"markeredgewidth": 0, "markersize": 7.0 if len(values) <= 50 else 2.4}
                ax.plot(values, color=colour, label=label, marker=".", **dots)
            ax.set_ylabel(name)
            if name.startswith("Validation"):
                ax.set_ylim(_UNIT_RANGE)  # the same in every figure, so that models compare
            if name == "Learning rate":
                _use_log_scale(ax, values)
            else:
                ax.legend()
        for ax in figure.axes[2:]:
            ax.set_xlabel("Step")
            _use_whole_numbers(ax.xaxis, nbins=6, steps=[1, 2, 5, 10])
        _mark_best_evaluation(figure, table)
    return figure


def plot_confusion_matrix(
    confusion: np.ndarray | Sequence[Sequence[int]],
    class_names: Sequence[str],
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws the count of each true and predicted class, its share of the true class as colour.

    `confusion` holds counts (C, C), a row a true class and a column a predicted one; `class_names`
    the C names. Cells of no images stay empty, and so does the row of a class without any.

    Raises ValueError when `confusion` is not square, holds anything but counts, or has another
    number of classes than `class_names`.
    """
    counts = _checked_confusion(confusion, len(class_names))
    cell = float(np.clip(5.6 / len(counts), 0.45, 1.2))  # inches
    side, names = len(counts) * cell, _text_width(class_names)
    is_slanted = names > 0.9 * cell
    size = (side + names + 1.1, side + (0.75 * names if is_slanted else 0.0) + 0.8)
    slant: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    with _figure(size, title, save_path) as figure:
        ax = figure.add_subplot()
        _draw_confusion(ax, counts, cell)
        ax.set_ylabel("True class", labelpad=8)
        ax.set_yticks(range(len(counts)), class_names, parse_math=False)
        ax.set_xlabel("Predicted class")
        options = slant if is_slanted else {}
        ax.set_xticks(range(len(counts)), class_names, parse_math=False, **options)
    return figure


def plot_roc_pr_curves(
    y_true: np.ndarray | Sequence[int],
    y_prob: np.ndarray,
    class_names: Sequence[str],
    *,
    malignant: Sequence[str] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws ROC and precision-recall curves of each class against the rest, with their areas.

    `y_true` (N,) are the indices of the true classes in `class_names`, `y_prob` (N, C) a
    probability for each class. A class without images, or that all images have, has no curve. The
    area under precision and recall is the average precision; n is the class's number of images.
    Melanoma and after it the other malignant classes come first and in front, with thicker lines;
    they are those that `imaging.lesions.is_malignant` knows, or those named `malignant`.

    Raises ValueError for no predictions, shapes that do not fit, labels out of range, or
    probabilities that are not in [0, 1].
    """
    y_true, y_prob, _ = check_predictions(y_true, y_prob, len(class_names))
    as_shares(y_prob, "y_prob", y_prob.shape)
    support = np.bincount(y_true, minlength=len(class_names))
    widths = _line_widths(class_names, malignant)
    of_class = {
        label: (y_true == label, y_prob[:, label])
        for label in np.argsort(-widths, kind="stable").tolist()
        if 0 < support[label] < len(y_true)
    }
    width = max(7.2, 2 * (_text_width(class_names) + 18 * _INCHES_PER_CHARACTER + 0.8))
    with _figure((width, 3.8 + 0.15 * len(of_class)), title, save_path) as figure:
        figure.set_layout_engine("constrained")  # "compressed" lets wide legends overlap
        roc, precision_recall = figure.subplots(1, 2)
        roc.set(xlabel="False positive rate", ylabel="True positive rate (recall)")
        curves = {label: compute_roc_curve(*of_class[label]) for label in of_class}
        _draw_curves(roc, curves, class_names, widths, "Area under the curve")
        if curves:
            _draw_diagonal(roc)
        precision_recall.set(xlabel="Recall", ylabel="Precision")
        curves = {label: compute_precision_recall_curve(*of_class[label]) for label in of_class}
        names = [f"{name} (n = {n:,})" for name, n in zip(class_names, support, strict=True)]
        style = {"drawstyle": "steps-post"}
        _draw_curves(precision_recall, curves, names, widths, "Average precision", **style)
    return figure


def plot_reliability(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws how often predictions are right over their probability, before and after calibration.

    `before` and `after` are what `evaluation.reliability` gives: in equal bins of [0, 1]
    `confidence`, `accuracy` and `count`, and over them `expected_calibration_error`. On the
    diagonal probabilities are what they say; a bin whose accuracy is None or NaN has no point.
    Where both have `equal_count_bins`, the points are those of these bins, with the intervals of
    their accuracies. Below are the numbers of images in the equal bins.

    Raises ValueError when one of these is missing, there is no bin, or their numbers differ.
    """
    curves = {"before": before, "after": after}
    columns = ["confidence", "accuracy", "count", "expected_calibration_error"]
    tables = {name: _checked_table(curves[name], name, columns).astype(float) for name in curves}
    points, key = tables, "equal_count_bins"
    if key in before and key in after:  # not in those of earlier versions
        columns = ["confidence", "accuracy", "accuracy_interval"]
        points = {n: _checked_table(curves[n][key], f"{key} of {n}", columns) for n in curves}
    num_bins = len(tables["before"])
    if len(tables["after"]) != num_bins:
        raise ValueError(f"before has {num_bins} bins, after has {len(tables['after'])}")
    with _figure((3.6, 4.6), title, save_path) as figure:
        diagram, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _draw_diagonal(diagram)
        styles = [
            {"color": _BLUE, "marker": "o", "linestyle": "dashed"},
            {"color": _ORANGE, "marker": "s", "linestyle": "solid"},
        ]
        for name, style, offset in zip(tables, styles, (-0.2, 0.2), strict=True):
            bins, intervals = points[name], points[name].get("accuracy_interval")
            diagram.plot(bins["confidence"], bins["accuracy"], markersize=4, **style)
            if intervals is not None:
                low, high = np.array(intervals.tolist()).T
                diagram.vlines(bins["confidence"], low, high, color=style["color"], linewidth=1)
            middles = (np.arange(num_bins) + 0.5 + offset) / num_bins
            counts.bar(middles, tables[name]["count"], width=0.4 / num_bins, color=style["color"])
        interval = " (95 % interval)" if diagram.collections else ""
        diagram.set(xlim=_UNIT_RANGE, ylim=_UNIT_RANGE, ylabel=f"Share that is right{interval}")
        counts.set(xlabel="Probability of the predicted class", ylabel="Images")
        _use_whole_numbers(counts.yaxis, nbins=3)
        errors = [
            f"{table['expected_calibration_error'][0]:.3f}  {name} calibration"
            for name, table in tables.items()
        ]
        heading = "Expected calibration error"
        _put_legend_below(figure, diagram.lines[1:], errors, ncols=1, title=heading)
    return figure


def plot_class_metrics(
    per_class: Mapping[str, Mapping[str, Any]],
    intervals: Mapping[str, Mapping[str, Any]],
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws recall and precision of each class with their intervals, and its number of images.

    `per_class` has by class name `recall` and `precision`, in [0, 1], and `support`; `intervals`
    by the same names [low, high] of both. These are the `per_class` of `evaluation.compute_metrics`
    and `compute_intervals`. What is None or NaN is not drawn.

    Raises ValueError when there is no class, or one lacks any of these.
    """
    names = list(per_class)
    if not names:
        raise ValueError("per_class has no classes; there is nothing to draw")
    for name in names:
        _check_has(per_class[name], f"per_class of {name}", ["recall", "precision", "support"])
        _check_has(intervals.get(name, {}), f"intervals of {name}", ["recall", "precision"])
    with _figure((4.6 + _text_width(names), 0.32 * len(names) + 1.0), title, save_path) as figure:
        ax = figure.add_subplot()
        styles = {"recall": (_BLUE, "o", -0.18), "precision": (_ORANGE, "s", 0.18)}
        for metric, (colour, marker, offset) in styles.items():
            rows = np.arange(len(names)) + offset
            values = np.array([per_class[name][metric] for name in names], dtype=float)
            ends = [intervals[name][metric] or (None, None) for name in names]
            ax.plot(values, rows, color=colour, marker=marker, markersize=4, linestyle="")
            _draw_intervals(ax, rows, values, np.array(ends, dtype=float), colour)
        _name_rows(ax, names)
        _write_beside_rows(ax, "Images", [f"{per_class[name]['support']:,}" for name in names])
        ax.hlines(np.arange(1, len(names)) - 0.5, 0, 1, color=_LIGHT_GREY, linewidth=0.6, zorder=0)
        ax.set_xlim(_UNIT_RANGE)
        ax.set_xlabel("Share, with its 95 % interval")
        _put_legend_below(figure, ax.lines, list(styles))
    return figure


def plot_class_distribution(
    metadata: pd.DataFrame, *, title: str | None = None, save_path: str | Path | None = None
) -> Figure:
    """Draws the number of images of each class in each split as bars.

    `metadata` is a table with a row an image and the columns `class` and `split`. The classes are
    sorted by name, as their labels are. The splits train, valid and test come first, others after
    them in order of appearance.

    Raises ValueError when a column is missing, a class or split is, or there is no row.
    """
    counts = _counts_by_class_and_split(metadata)
    num_classes, num_splits = counts.shape
    height = num_classes * max(0.14 * num_splits + 0.08, 0.3) + 0.9
    with _figure((4.6 + _text_width(counts.index), height), title, save_path) as figure:
        ax = figure.add_subplot()
        for bars in _draw_bars(ax, counts).values():
            ax.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=6.5)
        ax.margins(x=0.1)
        ax.set_xlabel("Images")
        _use_whole_numbers(ax.xaxis, nbins=6, steps=[1, 2, 5, 10])
        totals = [f"{split} ({count:,})" for split, count in counts.sum().items()]
        _put_legend_below(figure, ax.containers, totals)
    return figure


def plot_samples(
    images: np.ndarray,
    labels: np.ndarray | Sequence[int],
    class_names: Sequence[str],
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws a row of images for each class: the first six given of it.

    `images` is (N, H, W, 3), uint8 or float in [0, 1]; `labels` (N,) are the indices of their
    classes in `class_names`. A class without images has no row.

    Raises ValueError for no images, another shape or range, or labels that do not fit.
    """
    images = as_uint8(images, "images", ndim=4)
    labels = check_labels(labels, "labels", len(images), len(class_names))
    shown = np.unique(labels)
    rows = [images[labels == label][:6] for label in shown]
    names = [class_names[label] for label in shown]
    aspect = images.shape[1] / images.shape[2]
    size = (max(map(len, rows)) + _text_width(names) + 0.2, len(rows) * aspect + 0.4)
    with _figure(size, title, save_path) as figure:
        ax = figure.add_subplot(**_NO_FRAME)
        middles, _ = _draw_montage(ax, rows)
        ax.set_yticks(middles, names, parse_math=False)
        ax.tick_params(length=0)
    return figure


def plot_augmentations(
    original: np.ndarray,
    augmented: np.ndarray,
    *,
    view_names: Sequence[str] | None = None,
    image_names: Sequence[str] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws an image, framed, followed by views of it, row by row; or several, a row each.

    `original` is (H, W, 3) and `augmented` (N, H, W, 3), or for several images (R, H, W, 3) and
    (R, N, H, W, 3), uint8 or float in [0, 1]. `view_names` are the headings of the N views, which
    are then all in one row; `image_names` are the R names of the rows.

    Raises ValueError for no views, another shape or range, views of another size, or names of
    another number.
    """
    images = _with_views(original, augmented)
    num_images, num_columns, height, width, _ = images.shape
    rows = list(images)
    _check_lengths(images, image_names=image_names)
    _check_lengths(images[0, 1:], view_names=view_names)
    if num_images == 1 and view_names is None:
        num_columns = math.ceil(math.sqrt(num_columns))
        rows = [images[0, n : n + num_columns] for n in range(0, len(images[0]), num_columns)]
    headings = [_caption(name, width=14) for name in ["original", *(view_names or [])]]
    cell = 1.4 if view_names is None else 1.0  # inches
    size = (
        cell * num_columns + _text_width(image_names or [""]) + 0.2,
        cell * len(rows) * height / width + _captions_height(headings) + 0.4,
    )
    with _figure(size, title, save_path) as figure:
        ax = figure.add_subplot(**_NO_FRAME)
        ys, xs = _draw_montage(ax, rows)
        for x, heading in zip(xs, headings, strict=False):
            ax.text(x, -0.04 * height, heading, ha="center", va="bottom", parse_math=False)
        for y in ys[:num_images]:
            frame = Rectangle((0, y - height / 2), width, height, fill=False, ec=_ORANGE, lw=2)
            ax.add_patch(frame).set_clip_on(False)
        if image_names is not None:
            ax.set_yticks(ys, image_names, parse_math=False)
            ax.tick_params(length=0)
    return figure


def plot_pairs(
    pairs: pd.DataFrame,
    images: Sequence[Sequence[np.ndarray]],
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws findings of an audit, two images of each side by side with their classes and paths.

    `pairs` is the table that `imaging.audit.worst_pairs` gives; `images` holds two images for each
    of its rows, (H, W, 3) of any size, uint8 or float in [0, 1].

    Raises ValueError when a column is missing, there is no row, or images are of another number,
    shape or range.
    """
    pairs = _checked_table(pairs, "pairs", ["kinds", "images", "classes", "distance"])
    if len(images) != len(pairs) or any(len(both) != 2 for both in images):
        raise ValueError(f"images must hold two for each of the {len(pairs)} pairs")
    captions = [
        [_caption(name, path) for name, path in zip(names, paths, strict=True)]
        for names, paths in zip(pairs["classes"], pairs["images"], strict=True)
    ]
    headings = [
        ", ".join(kinds) + (f" ({distance:.2f} apart)" if distance > 0 else "")
        for kinds, distance in zip(pairs["kinds"], pairs["distance"], strict=True)
    ]
    num_rows = math.ceil(len(pairs) / 2)
    height = num_rows * (2.0 + _captions_height(text for both in captions for text in both))
    with _figure((7.2, height), title, save_path) as figure:
        ratios = [1, 1, 0.05, 1, 1]  # a gap between two pairs
        axes = figure.subplots(
            num_rows, 5, squeeze=False, width_ratios=ratios, subplot_kw=_NO_FRAME
        )
        places = np.delete(axes, 2, axis=1).reshape(-1, 2)
        for place, heading, texts, two in zip(places, headings, captions, images, strict=False):
            place[0].set_title(heading, loc="left", fontsize=7)
            for ax, image, text in zip(place, two, texts, strict=True):
                _draw_captioned_image(ax, as_uint8(image, "an image of a pair", ndim=3), text)
    return figure


def plot_mistakes(
    images: np.ndarray,
    true_classes: Sequence[str],
    predicted_classes: Sequence[str],
    confidences: np.ndarray | Sequence[float],
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws misclassified images, the most confident mistake first, twelve at most.

    `images` is (N, H, W, 3), uint8 or float in [0, 1]; `true_classes` and `predicted_classes` hold
    N names, `confidences` (N,) the probabilities of the predicted ones. `names` are those of the
    images, such as their paths.

    Raises ValueError for no images, another shape, range or number, or an image that is no mistake.
    """
    images = as_uint8(images, "images", ndim=4)
    classes = {"true_classes": true_classes, "predicted_classes": predicted_classes}
    _check_lengths(images, **classes, names=names)
    names = [""] * len(images) if names is None else names
    confidences = as_shares(confidences, "confidences", (len(images),))
    captions: list[str] = []
    for true, predicted, share, name in zip(*classes.values(), confidences, names, strict=True):
        if true == predicted:
            raise ValueError(f"image {len(captions)} is no mistake: {true!r} is right")
        texts = (
            f"true: {true}",
            f"predicted: {predicted}",
            f"probability: {format_percent(share)}",
        )
        captions.append(_caption(*texts, name, width=32))
    shown = np.argsort(-confidences, kind="stable")[:12]
    images, captions = images[shown], [captions[i] for i in shown]
    with _figure(_grid_size(images, captions, 4), title, save_path) as figure:
        _draw_grid(figure, images, captions, 4)
    return figure


def plot_gradcams(
    images: np.ndarray,
    heatmaps: np.ndarray,
    true_classes: Sequence[str],
    predicted_classes: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws images, and beside each the same in grey under its heatmap, row by row.

    `images` is (N, H, W, 3), uint8 or float in [0, 1], and `heatmaps` (N, H, W) float in [0, 1];
    `true_classes` and `predicted_classes` hold N names. The predicted class is named where it is
    wrong. `names` are those of the images, such as their paths.

    Raises ValueError for no images, or another shape, range or number.
    """
    images = as_uint8(images, "images", ndim=4)
    heatmaps = as_shares(heatmaps, "heatmaps", images.shape[:3])
    classes = {"true_classes": true_classes, "predicted_classes": predicted_classes}
    _check_lengths(images, **classes, names=names)
    names = [""] * len(images) if names is None else names
    captions = [
        _caption(f"true: {true}", f"predicted: {predicted}" * (predicted != true), name, width=42)
        for true, predicted, name in zip(*classes.values(), names, strict=True)
    ]
    gap = np.full((*images.shape[:2], max(1, images.shape[2] // 30), 3), 255, dtype=np.uint8)
    # Grey images leave the colours of the map as they are on the scale.
    overlays = blend_heatmaps(images.mean(axis=-1, keepdims=True), heatmaps, opacity=0.5)
    images = np.concatenate([images, gap, overlays], axis=2)
    width, height = _grid_size(images, captions, 3)
    with _figure((width, height + 0.5), title, save_path) as figure:
        _draw_grid(figure, images, captions, 3)
        scale = figure.colorbar(
            ScalarMappable(cmap=HEATMAP_COLOURS),
            ax=figure.axes,
            ticks=[0, 1],
            location="bottom",
            shrink=2 / width,
            aspect=25,
            pad=0.1 / height,
            label="Grad-CAM",
        )
        scale.outline.set_visible(False)
    return figure


def plot_model_comparison(
    comparison: pd.DataFrame, *, title: str | None = None, save_path: str | Path | None = None
) -> Figure:
    """Draws the metrics of each model as bars, and beside them its training time and size.

    `comparison` is a table with a row a model, shown in that order, and the columns `model`;
    `precision`, `recall`, `f1` and `balanced_accuracy`, in [0, 1]; `training_time`, in seconds; and
    `parameters`, their number. A value that is missing (NaN) is shown as n/a. A metric that has the
    columns `<metric>_low` and `<metric>_high` has its interval drawn as a line.

    Raises ValueError when a column is missing or there is no row.
    """
    columns = ["model", *_METRICS, "training_time", "parameters"]
    _checked_table(comparison, "comparison", columns)
    table = comparison.set_index(comparison["model"].astype(str))
    time, unit = _in_readable_unit(table["training_time"].astype(float))
    size = (6.4 + _text_width(table.index), 0.7 * len(table) + 1.0)
    with _figure(size, title, save_path) as figure:
        scores, times, sizes = figure.subplots(1, 3, sharey=True, width_ratios=[3, 1.2, 1.2])
        _draw_metric_bars(scores, table)
        _draw_dots(times, time, f"Training time ({unit})")
        _draw_dots(sizes, table["parameters"].astype(float) / 1e6, "Parameters (millions)")
        names = ["precision", "recall", "F1", "balanced accuracy"]
        _put_legend_below(figure, scores.containers, names)
    return figure


@contextmanager
def _figure(
    size: tuple[float, float], title: str | None, save_path: str | Path | None
) -> Iterator[Figure]:
    """An empty figure to fill inside the block, laid out and saved at its end."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes: once said is too often already.
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure = Figure(figsize=size, layout="compressed")
        if title is not None:
            figure.suptitle(title, parse_math=False)
        yield figure
        if save_path is None:
            figure.draw_without_rendering()  # creates all ticks now, while the style holds
            return
        suffix = Path(save_path).suffix.removeprefix(".")
        # Drawn in memory: on a full disk the writers of JPEG and PDF fail in ways of their own.
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix, dpi=200, bbox_inches="tight")
        with write_atomically(save_path) as temporary:
            temporary.write_bytes(drawn.getbuffer())


def _mark_best_evaluation(figure: Figure, table: pd.DataFrame) -> None:
    number = best_evaluation(table.to_dict("list"))
    if number is None:
        return
    step, accuracy = table.iloc[number][["step", "valid_balanced_accuracy"]]
    for ax in figure.axes:
        line = ax.axvline(step, color=_DARK_GREY, linestyle="--", linewidth=0.8, zorder=0)
    text = f"best evaluation: step {step:,.0f}, balanced accuracy {accuracy:.3f}"
    _put_legend_below(figure, [line], [text])


def _use_whole_numbers(axis: Axis, **options: Any) -> None:
    axis.set_major_locator(ticker.MaxNLocator(integer=True, **options))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))


def _use_log_scale(ax: Axes, values: pd.Series) -> None:
    positive = values[values > 0]
    if positive.empty:
        return
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:.0e}"))
    ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    if positive.max() < 10 * positive.min():  # have two numbers in sight
        middle = math.sqrt(positive.min() * positive.max())
        ax.set_ylim(middle / 10, middle * 10)


def _checked_confusion(confusion: ArrayLike, num_classes: int) -> np.ndarray:
    counts = np.nan_to_num(confusion, nan=-1, posinf=-1).astype(np.int64)
    if counts.shape != (num_classes, num_classes) or num_classes == 0:
        raise ValueError(
            f"confusion has shape {counts.shape}; for the {num_classes} names in class_names it "
            f"must be {(num_classes, num_classes)}, and not empty"
        )
    if (counts != confusion).any() or counts.min() < 0:
        raise ValueError("confusion must hold counts: whole numbers from 0")
    return counts


def _draw_confusion(ax: Axes, confusion: np.ndarray, cell: float) -> None:
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.ma.divide(confusion, totals)  # masked where there are no images
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set_facecolor(_LIGHT_GREY)
    digits = len(f"{confusion.max():,}")
    fontsize = min(9.0, 15 * cell, 72 * 0.9 * cell / (0.65 * digits))
    for row, column in np.argwhere(confusion):
        share = shares[row, column]
        colour = "white" if share > 0.65 else "black"
        text = f"{confusion[row, column]:,}\n{format_percent(share)}"
        ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=fontsize)
    for row in np.flatnonzero(totals == 0).tolist():
        middle = (len(confusion) - 1) / 2
        ax.text(middle, row, "no images", ha="center", va="center", color=_DARK_GREY)
    edges = np.arange(len(confusion) + 1) - 0.5
    ax.hlines(edges, edges[0], edges[-1], color="white", linewidth=1)
    ax.vlines(edges, edges[0], edges[-1], color="white", linewidth=1)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    place = ax.inset_axes((1.03, 0, 0.035, 1))
    percent = ticker.PercentFormatter(1, symbol=" %")
    scale = ax.figure.colorbar(image, cax=place, label="Share of the true class", format=percent)
    scale.outline.set_visible(False)


def _line_widths(class_names: Sequence[str], malignant: Sequence[str] | None) -> np.ndarray:
    """Returns the width of each class's curve (C,): melanoma, other malignant ones, the rest."""
    malignant = list(filter(is_malignant, class_names)) if malignant is None else malignant
    if not malignant:
        return np.full(len(class_names), _STYLE["lines.linewidth"])
    widths = [(2.2 if is_melanoma(n) else 1.5) if n in malignant else 0.8 for n in class_names]
    return np.array(widths)


def _draw_curves(
    ax: Axes,
    curves: Mapping[int, Curve],
    names: Sequence[str],
    widths: np.ndarray,
    heading: str,
    **style: Any,
) -> None:
    """Draws the curve of each class, whose line is the same in every figure.

    No two lines are alike among those of the first 81 classes.
    """
    ax.set(xlim=_UNIT_RANGE, ylim=_UNIT_RANGE, box_aspect=1)
    if not curves:
        ax.text(0.5, 0.5, "all images are of one class", ha="center", va="center")
        return
    for label, curve in curves.items():
        colour = _LINE_COLOURS[label % len(_LINE_COLOURS)]
        dashes = _DASHES[(label + label // len(_DASHES)) % len(_DASHES)]
        style |= {"linewidth": widths[label], "zorder": 2 + widths[label] / 10}
        ax.plot(curve.x, curve.y, color=colour, linestyle=dashes, **style)
    texts = [f"{curve.area:.3f}  {names[label]}" for label, curve in curves.items()]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "handlelength": 4}
    _put_legend(ax, ax.lines, texts, **place, title=heading)


def _draw_diagonal(ax: Axes) -> None:
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=0.6, zorder=0)


def _counts_by_class_and_split(metadata: pd.DataFrame) -> pd.DataFrame:
    table = _checked_table(metadata, "metadata", ["class", "split"])
    lacking = int(table.isna().any(axis=1).sum())
    if lacking:
        raise ValueError(f"metadata has {lacking} rows without a class or split")
    table = table.astype(str)
    order = dict.fromkeys(["train", "valid", "test", *table["split"]])
    counts = pd.crosstab(table["class"], table["split"])
    return counts[[split for split in order if split in counts]]


def _check_lengths(images: np.ndarray, **names: Sequence[str] | None) -> None:
    for argument, given in names.items():
        if given is not None and len(given) != len(images):
            raise ValueError(f"{argument} has {len(given)} names for {len(images)} images")


def _with_views(original: ArrayLike, augmented: ArrayLike) -> np.ndarray:
    """Returns each image before its views, (R, 1 + N, H, W, 3)."""
    ndim = 4 if np.ndim(original) == 4 else 3
    images = as_uint8(original, "original", ndim=ndim)
    views = as_uint8(augmented, "augmented", ndim=ndim + 1)
    if views.shape[-3:] != images.shape[-3:] or views.shape[:-4] != images.shape[:-3]:
        raise ValueError(f"augmented has shape {views.shape}, original has {images.shape}")
    shown = np.concatenate([np.expand_dims(images, -4), views], axis=-4)
    return shown.reshape(-1, *shown.shape[-4:])


def _draw_montage(ax: Axes, rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Draws rows of images (n, H, W, 3) on one canvas; returns the middles of rows and columns."""
    height, width = rows[0].shape[1:3]
    gap = max(1, round(0.04 * width))
    shape = (len(rows), max(map(len, rows)), height + gap, width + gap, 3)
    tiles = np.full(shape, 255, dtype=np.uint8)
    for row, images in zip(tiles, rows, strict=True):
        row[: len(images), :height, :width] = images
    canvas = np.vstack([np.hstack(row) for row in tiles])[:-gap, :-gap]
    ax.imshow(canvas, extent=(0, canvas.shape[1], canvas.shape[0], 0))
    ys, xs = np.arange(len(rows)), np.arange(shape[1])
    return ys * (height + gap) + height / 2, xs * (width + gap) + width / 2


def _caption(*texts: str, width: int = 30) -> str:
    # Paths that are too long break before the file's name, and then there rather than in a word.
    wrapper = textwrap.TextWrapper(width, break_on_hyphens=False)
    wrapper.wordsep_simple_re = re.compile(r"( +|(?<=[/_-]))")
    parts = (re.split("(?<=/)(?=[^/]*$)", t) if len(t) > width else [t] for t in texts)
    lines = [line for split in parts for part in split for line in wrapper.wrap(part)]
    # A file may be called anything.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _draw_captioned_image(ax: Axes, image: np.ndarray, caption: str) -> None:
    ax.imshow(image)
    ax.set_xlabel(caption, parse_math=False, fontsize=6.5)


def _grid_size(images: np.ndarray, captions: Sequence[str], columns: int) -> tuple[float, float]:
    """The inches that captioned images take, in rows of `columns` on a page 7.2 inches wide."""
    cell = 7.2 / columns
    height = cell * images.shape[1] / images.shape[2] + _captions_height(captions) + 0.12
    return cell * min(columns, len(images)), math.ceil(len(images) / columns) * height + 0.2


def _draw_grid(figure: Figure, images: np.ndarray, captions: Sequence[str], columns: int) -> None:
    columns = min(columns, len(images))
    num_rows = math.ceil(len(images) / columns)
    axes = figure.subplots(num_rows, columns, squeeze=False, subplot_kw=_NO_FRAME)
    for ax, image, caption in zip(axes.flat, images, captions, strict=False):
        _draw_captioned_image(ax, image, caption)


def _check_has(values: Container[str], name: str, keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")


def _checked_table(
    values: pd.DataFrame | Mapping[str, Any], name: str, columns: Sequence[str]
) -> pd.DataFrame:
    _check_has(values, name, columns)
    try:
        table = pd.DataFrame({column: values[column] for column in columns})
    except ValueError as error:  # lengths differ
        raise ValueError(f"{name}: {error}") from error
    if table.empty:
        raise ValueError(f"{name} has no rows; there is nothing to draw")
    return table


def _in_readable_unit(seconds: pd.Series) -> tuple[pd.Series, str]:
    for unit, length in {"hours": 3600, "minutes": 60}.items():
        if seconds.max() >= 2 * length:
            return seconds / length, unit
    return seconds, "seconds"


def _draw_bars(ax: Axes, table: pd.DataFrame) -> dict[Any, BarContainer]:
    """Draws each row of a table as bars, one a column, and returns the bars of each column."""
    height = 0.8 / table.shape[1]
    bars = {}
    for index, name in enumerate(table):
        rows = np.arange(len(table)) + (index - (table.shape[1] - 1) / 2) * height
        colour = _COLOURS[index % len(_COLOURS)]
        bars[name] = ax.barh(rows, table[name], height=height, color=colour)
    _name_rows(ax, list(table.index))
    return bars


def _draw_metric_bars(ax: Axes, table: pd.DataFrame) -> None:
    metrics = table[_METRICS].astype(float)
    for name, bars in _draw_bars(ax, metrics.fillna(0)).items():
        rows, values = np.array([bar.get_center()[1] for bar in bars]), metrics[name].to_numpy()
        ends = table.reindex(columns=[f"{name}_low", f"{name}_high"]).to_numpy(dtype=float)
        _draw_intervals(ax, rows, values, ends, "black")
        tips = np.where(np.isnan(values), 0, np.fmax(values, ends[:, 1]))
        _write_values(ax, values, ".3f", np.column_stack([tips, rows]), (2, 0), va="center")
    has_intervals = any(lines.get_paths() for lines in ax.collections)
    ax.set_xlim(0, 1.1)
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.set_xlabel("Score, with its 95 % interval" if has_intervals else "Score")


def _write_values(
    ax: Axes, values: np.ndarray, form: str, points: np.ndarray, offset: Any, **options: Any
) -> None:
    """Writes each value, or n/a for NaN, beside its point (N, 2)."""
    for value, (x, y) in zip(values, points, strict=True):
        text = "n/a" if math.isnan(value) else f"{value:{form}}"
        ax.annotate(text, (x, y), offset, textcoords="offset points", fontsize=6.5, **options)


def _draw_intervals(
    ax: Axes, rows: np.ndarray, values: np.ndarray, ends: np.ndarray, colour: Any
) -> None:
    """A line from low to high, `ends` (N, 2), for each value that is known with its interval."""
    known = np.isfinite(values) & np.isfinite(ends).all(axis=1)
    ax.hlines(rows[known], *ends[known].T, color=colour, linewidth=1)


def _draw_dots(ax: Axes, values: pd.Series, label: str) -> None:
    """A dot and its value for each row: what may span decades, where a bar would have no zero."""
    rows = np.arange(len(values))
    ax.hlines(rows, 0, 1, transform=ax.get_yaxis_transform(), color=_LIGHT_GREY, zorder=0)
    ax.plot(values, rows, marker="o", linestyle="", color=_DARK_GREY)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(label)
    low, high = values.min(), values.max()
    if low > 0 and high > 20 * low:
        ax.set_xscale("log")
        ax.set_xlim(low / 3, high * 3)
        ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    elif high > 0:
        ax.set_xlim(-0.15 * high, 1.25 * high)  # room for the number over a dot at the edge
    else:
        ax.set_xticks([])
    points = np.column_stack([values.fillna(sum(ax.get_xlim()) / 2), rows])
    _write_values(ax, values.to_numpy(), ".3g", points, (0, 5), ha="center")


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names, parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def _write_beside_rows(ax: Axes, heading: str, texts: Sequence[str]) -> None:
    for row, text in zip([-0.5, *range(len(texts))], [heading, *texts], strict=True):
        va = "bottom" if row < 0 else "center_baseline"
        ax.text(1.1, row, text, transform=ax.get_yaxis_transform(), ha="right", va=va)


def _put_legend_below(
    figure: Figure, handles: Sequence[Any], names: Sequence[str], ncols: int = 4, **options: Any
) -> None:
    options |= {"loc": "outside lower center", "ncols": min(len(names), ncols)}
    _put_legend(figure, handles, names, **options)


def _put_legend(
    owner: Figure | Axes, handles: Sequence[Any], names: Sequence[str], **options: Any
) -> None:
    legend = owner.legend(handles, [""] * len(names), **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)  # given at once, a name with a leading underscore would be left out


def _captions_height(captions: Iterable[str]) -> float:
    """Returns about how many inches the highest of these captions takes."""
    return 0.12 * (1 + max(caption.count("\n") for caption in captions))


def _text_width(names: Iterable[str]) -> float:
    """Returns about how many inches the longest of these names takes."""
    return max(map(len, names)) * _INCHES_PER_CHARACTER
