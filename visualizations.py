"""Every figure: arrays and tables in, a matplotlib `Figure` out.

Figures are built without pyplot: no display is needed, none stays open, and nobody's rcParams
change. Names and titles are shown as they are, never read as mathematics. With `save_path` the
figure is also written there, whole or not at all, in the format that its suffix names (.png, .pdf,
.svg and what else matplotlib can write); an unknown suffix is a ValueError, a missing folder a
FileNotFoundError.
"""

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from evaluation import best_evaluation
from evaluation.metrics import Curve, compute_precision_recall_curve, compute_roc_curve
from imaging.decode import as_shares, as_uint8
from imaging.heatmaps import HEATMAP_COLOURS, blend_heatmaps
from imaging.heatmaps import overlay_heatmap as overlay_heatmap  # for those who import it from here
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

_STYLE = {
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
_METRICS = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "balanced_accuracy": "balanced accuracy",
}
_SAMPLES_PER_CLASS = 6
_MAX_MISTAKES = 12
_HEATMAP_OPACITY = 0.5


def plot_learning_curves(
    history: Mapping[str, Sequence[float | None]] | pd.DataFrame,
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws loss, precision, recall and learning rate over the steps, the best evaluation marked.

    `history` holds equally long columns, an entry an evaluation: `step`, `learning_rate`,
    `train_loss`, `valid_loss`, and in [0, 1] `valid_precision`, `valid_recall` and
    `valid_balanced_accuracy`; others are passed over. None and NaN leave a gap. The best evaluation
    has the highest `valid_balanced_accuracy`, of equal ones the lowest `valid_loss`.

    Raises ValueError when a column is missing, lengths differ, or there is no entry.
    """
    columns = [line[0] for lines in _LEARNING_PANELS.values() for line in lines]
    table = _checked_table(history, "history", ["step", *columns]).astype(float)
    with _figure((7.2, 5.0), title, save_path) as figure:
        panels = figure.subplots(2, 2, sharex=True).flat
        dot = 5 if len(table) <= 50 else 2  # small ones still show a value between two gaps
        for ax, (name, lines) in zip(panels, _LEARNING_PANELS.items(), strict=True):
            for column, label, colour in lines:
                line = ax.plot(table["step"], table[column], color=colour, label=label)[0]
                line.set(marker=".", markersize=dot)
            ax.set_ylabel(name)
            if name.startswith("Validation"):
                ax.set_ylim(-0.02, 1.02)  # the same in every figure, so that models compare
            if name == "Learning rate":
                _use_log_scale(ax, table["learning_rate"])
            else:
                ax.legend()
        for ax in figure.axes[2:]:
            ax.set_xlabel("Step")
            _use_whole_numbers(ax)
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
    the C names. The row of a class without images stays empty.

    Raises ValueError when `confusion` is not square, holds anything but counts, or has another
    number of classes than `class_names`.
    """
    confusion = _checked_confusion(confusion, class_names)
    num_classes = len(confusion)
    cell = float(np.clip(5.6 / num_classes, 0.45, 1.2))  # inches
    names = _longest(class_names) * _INCHES_PER_CHARACTER
    is_rotated = names > 0.9 * cell
    size = (
        num_classes * cell + names + 1.1,
        num_classes * cell + (0.75 * names if is_rotated else 0.0) + 0.8,
    )
    with _figure(size, title, save_path) as figure:
        ax = figure.add_subplot()
        _draw_confusion(ax, confusion, cell)
        ax.set_ylabel("True class", labelpad=8)
        ax.set_yticks(range(num_classes), class_names, parse_math=False)
        ax.set_xlabel("Predicted class")
        ax.set_xticks(range(num_classes), class_names, parse_math=False)
        if is_rotated:
            for label in ax.get_xticklabels():
                label.set(rotation=45, ha="right", rotation_mode="anchor")
    return figure


def plot_roc_pr_curves(
    y_true: np.ndarray | Sequence[int],
    y_prob: np.ndarray,
    class_names: Sequence[str],
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws ROC and precision-recall curves of each class against the rest, with their areas.

    `y_true` (N,) are the indices of the true classes in `class_names`, `y_prob` (N, C) a
    probability for each class. A class without images, or that all images have, has no curve. The
    area under precision and recall is the average precision; n is the class's number of images.

    Raises ValueError for no predictions, shapes that do not fit, labels out of range, or
    probabilities that are not in [0, 1].
    """
    y_prob = as_shares(y_prob, "y_prob", (np.size(y_true), len(class_names)))
    y_true = _checked_labels(y_true, "y_true", *y_prob.shape)
    support = np.bincount(y_true, minlength=len(class_names))
    shown = [label for label, n in enumerate(support) if 0 < n < len(y_true)]
    width = max(7.2, 2 * ((_longest(class_names) + 18) * _INCHES_PER_CHARACTER + 0.8))
    with _figure((width, 3.8 + 0.15 * len(shown)), title, save_path) as figure:
        figure.set_layout_engine("constrained")  # "compressed" lets wide legends overlap
        roc, precision_recall = figure.subplots(1, 2)
        roc.set(xlabel="False positive rate", ylabel="True positive rate (recall)")
        curves = {label: compute_roc_curve(y_true == label, y_prob[:, label]) for label in shown}
        _draw_curves(roc, curves, class_names, "Area under the curve")
        if shown:
            _draw_diagonal(roc)
        precision_recall.set(xlabel="Recall", ylabel="Precision")
        curves = {
            label: compute_precision_recall_curve(y_true == label, y_prob[:, label])
            for label in shown
        }
        names = [f"{name} (n = {n:,})" for name, n in zip(class_names, support, strict=True)]
        _draw_curves(precision_recall, curves, names, "Average precision", drawstyle="steps-post")
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
    Below are the numbers of images.

    Raises ValueError when one of these is missing, there is no bin, or their numbers differ.
    """
    columns = ["confidence", "accuracy", "count", "expected_calibration_error"]
    bins = {
        name: _checked_table(curve, name, columns).astype(float)
        for name, curve in {"before": before, "after": after}.items()
    }
    num_bins = len(bins["before"])
    if len(bins["after"]) != num_bins:
        raise ValueError(f"before has {num_bins} bins, after has {len(bins['after'])}")
    with _figure((3.6, 4.6), title, save_path) as figure:
        diagram, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _draw_diagonal(diagram)
        styles = [(_BLUE, "o", "dashed"), (_ORANGE, "s", "solid")]
        for index, (table, style) in enumerate(zip(bins.values(), styles, strict=True)):
            colour, marker, dashes = style
            line = diagram.plot(table["confidence"], table["accuracy"], color=colour)[0]
            line.set(marker=marker, markersize=4, linestyle=dashes)
            middles = (np.arange(num_bins) + 0.5 + 0.4 * (index - 0.5)) / num_bins
            counts.bar(middles, table["count"], width=0.4 / num_bins, color=colour)
        diagram.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="Share that is right")
        counts.set(xlabel="Probability of the predicted class", ylabel="Images")
        counts.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        counts.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        errors = [
            f"{table['expected_calibration_error'][0]:.3f}  {name} calibration"
            for name, table in bins.items()
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
        for given, needed in (
            (per_class, ("recall", "precision", "support")),
            (intervals, ("recall", "precision")),
        ):
            missing = [key for key in needed if key not in given.get(name, ())]
            if missing:
                which = "per_class" if given is per_class else "intervals"
                raise ValueError(f"{which} lacks {', '.join(missing)} of {name}")
    size = (4.6 + _longest(names) * _INCHES_PER_CHARACTER, 0.32 * len(names) + 1.0)
    with _figure(size, title, save_path) as figure:
        ax = figure.add_subplot()
        styles = {"recall": (_BLUE, "o"), "precision": (_ORANGE, "s")}
        for index, (metric, (colour, marker)) in enumerate(styles.items()):
            rows = np.arange(len(names)) + 0.36 * (index - 0.5)
            values = np.array([per_class[name][metric] for name in names], dtype=float)
            ends = [intervals[name][metric] or (None, None) for name in names]
            ax.plot(values, rows, color=colour, marker=marker, markersize=4, linestyle="")
            _draw_intervals(ax, rows, values, np.array(ends, dtype=float), colour)
        _name_rows(ax, names)
        _write_beside_rows(ax, "Images", [f"{per_class[name]['support']:,}" for name in names])
        ax.hlines(np.arange(1, len(names)) - 0.5, 0, 1, color=_LIGHT_GREY, linewidth=0.6, zorder=0)
        ax.set_xlim(-0.02, 1.02)
        ax.set_xlabel("Share, with its 95% interval")
        _put_legend_below(figure, ax.lines, list(styles))
    return figure


def plot_class_distribution(
    metadata: pd.DataFrame, *, title: str | None = None, save_path: str | Path | None = None
) -> Figure:
    """Draws the number of images of each class in each split as bars, the largest class on top.

    `metadata` is a table with a row an image and the columns `class` and `split`. The splits train,
    valid and test come first, others after them in order of appearance.

    Raises ValueError when a column is missing, a class or split is, or there is no row.
    """
    counts = _counts_by_class_and_split(metadata)
    names, (num_classes, num_splits) = list(counts.index), counts.shape
    bar = 0.8 / num_splits
    height = num_classes * max(0.14 * num_splits + 0.08, 0.3) + 0.9
    size = (4.6 + _longest(names) * _INCHES_PER_CHARACTER, height)
    with _figure(size, title, save_path) as figure:
        ax = figure.add_subplot()
        handles = []
        for index, split in enumerate(counts):
            rows = np.arange(num_classes) + (index - (num_splits - 1) / 2) * bar
            colour = _COLOURS[index % len(_COLOURS)]
            bars = ax.barh(rows, counts[split], height=bar, color=colour)
            texts = [f"{count:,}" for count in counts[split]]
            ax.bar_label(bars, texts, padding=2, fontsize=6.5)
            handles.append(bars)
        _name_rows(ax, names)
        ax.margins(x=0.1)
        ax.set_xlabel("Images")
        _use_whole_numbers(ax)
        totals = [f"{split} ({counts[split].sum():,})" for split in counts]
        _put_legend_below(figure, handles, totals)
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
    labels = _checked_labels(labels, "labels", len(images), len(class_names))
    shown = np.unique(labels)
    rows = [images[labels == label][:_SAMPLES_PER_CLASS] for label in shown]
    names = [class_names[label] for label in shown]
    columns = max(len(row) for row in rows)
    aspect = images.shape[1] / images.shape[2]
    size = (columns + _longest(names) * _INCHES_PER_CHARACTER + 0.2, len(rows) * aspect + 0.4)
    with _figure(size, title, save_path) as figure:
        ax = figure.add_subplot()
        centres = _draw_montage(ax, rows, columns)
        ax.set_yticks(centres, names, parse_math=False)
    return figure


def plot_augmentations(
    original: np.ndarray,
    augmented: np.ndarray,
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws an image, framed, followed by views of it, row by row.

    `original` is (H, W, 3) and `augmented` (N, H, W, 3), both uint8 or float in [0, 1].

    Raises ValueError for no views, another shape or range, or views of another size.
    """
    original = as_uint8(original, "original", ndim=3)
    augmented = as_uint8(augmented, "augmented", ndim=4)
    if augmented.shape[1:] != original.shape:
        raise ValueError(
            f"augmented has images of shape {augmented.shape[1:]}, original is {original.shape}"
        )
    images = np.concatenate([original[None], augmented])
    columns = math.ceil(math.sqrt(len(images)))
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    height, width = original.shape[:2]
    size = (1.4 * columns + 0.2, 1.4 * len(rows) * height / width + 0.5)
    with _figure(size, title, save_path) as figure:
        ax = figure.add_subplot()
        _draw_montage(ax, rows, columns)
        ax.set_yticks([])
        frame = Rectangle((0, 0), width, height, fill=False, edgecolor=_ORANGE, linewidth=2)
        ax.add_patch(frame).set_clip_on(False)
        ax.annotate(
            "original", (width / 2, 0), (0, 4), textcoords="offset points", ha="center", va="bottom"
        )
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
    num_lines = max(text.count("\n") + 1 for both in captions for text in both)
    num_rows = math.ceil(len(pairs) / 2)
    with _figure((7.2, (2.0 + 0.12 * num_lines) * num_rows), title, save_path) as figure:
        ratios = [1, 1, 0.05, 1, 1]  # a gap between two pairs
        axes = figure.subplots(num_rows, 5, squeeze=False, width_ratios=ratios)
        for ax in axes.flat:
            ax.set_axis_off()
        axes = np.delete(axes, 2, axis=1).reshape(-1, 2)
        for axes_of_pair, heading, texts, two in zip(
            axes, headings, captions, images, strict=False
        ):
            axes_of_pair[0].set_title(heading, loc="left", fontsize=7)
            for ax, image, text in zip(axes_of_pair, two, texts, strict=True):
                image = as_uint8(image, "an image of a pair", ndim=3)
                _draw_captioned_image(ax, image, text)
    return figure


def plot_mistakes(
    images: np.ndarray,
    true_classes: Sequence[str],
    predicted_classes: Sequence[str],
    confidences: np.ndarray | Sequence[float],
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws misclassified images, the most confident mistake first, twelve at most.

    `images` is (N, H, W, 3), uint8 or float in [0, 1]; `true_classes` and `predicted_classes` hold
    N names, `confidences` (N,) the probabilities of the predicted ones.

    Raises ValueError for no images, another shape, range or number, or an image that is no mistake.
    """
    images = as_uint8(images, "images", ndim=4)
    true_classes = _checked_names(true_classes, "true_classes", len(images))
    predicted_classes = _checked_names(predicted_classes, "predicted_classes", len(images))
    right = [i for i in range(len(images)) if true_classes[i] == predicted_classes[i]]
    if right:
        raise ValueError(f"image {right[0]} is no mistake: {true_classes[right[0]]!r} is right")
    confidences = as_shares(confidences, "confidences", (len(images),))
    shown = np.argsort(-confidences, kind="stable")[:_MAX_MISTAKES]
    captions = [
        _caption(
            f"true: {true_classes[i]}",
            f"predicted: {predicted_classes[i]}",
            f"probability: {_percent(confidences[i])}",
            width=32,
        )
        for i in shown
    ]
    with _figure(_grid_size(images, captions, 4), title, save_path) as figure:
        _draw_grid(figure, images[shown], captions, 4)
    return figure


def plot_gradcams(
    images: np.ndarray,
    heatmaps: np.ndarray,
    true_classes: Sequence[str],
    predicted_classes: Sequence[str],
    *,
    title: str | None = None,
    save_path: str | Path | None = None,
) -> Figure:
    """Draws images, and beside each the same in grey under its heatmap, row by row.

    `images` is (N, H, W, 3), uint8 or float in [0, 1], and `heatmaps` (N, H, W) float in [0, 1];
    `true_classes` and `predicted_classes` hold N names. The predicted class is named where it is
    wrong.

    Raises ValueError for no images, or another shape, range or number.
    """
    images = as_uint8(images, "images", ndim=4)
    heatmaps = as_shares(heatmaps, "heatmaps", images.shape[:3])
    true_classes = _checked_names(true_classes, "true_classes", len(images))
    predicted_classes = _checked_names(predicted_classes, "predicted_classes", len(images))
    captions = [
        _caption(f"true: {true}", f"predicted: {predicted}" if predicted != true else "", width=42)
        for true, predicted in zip(true_classes, predicted_classes, strict=True)
    ]
    gap = np.full((*images.shape[:2], max(1, images.shape[2] // 30), 3), 255, dtype=np.uint8)
    # Grey images leave the colours of the map as they are on the scale.
    overlays = blend_heatmaps(images.mean(axis=-1, keepdims=True), heatmaps, _HEATMAP_OPACITY)
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
        )
        scale.set_label("Grad-CAM")
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
    names = list(_checked_table(comparison, "comparison", columns)["model"].astype(str))
    metrics = comparison[list(_METRICS)].astype(float)
    intervals = {
        name: comparison[[f"{name}_low", f"{name}_high"]].to_numpy(dtype=float)
        for name in _METRICS
        if f"{name}_low" in comparison and f"{name}_high" in comparison
    }
    time, unit = _in_readable_unit(comparison["training_time"].astype(float))
    millions = comparison["parameters"].astype(float) / 1e6
    size = (6.4 + _longest(names) * _INCHES_PER_CHARACTER, 0.7 * len(names) + 1.0)
    with _figure(size, title, save_path) as figure:
        scores, times, sizes = figure.subplots(1, 3, sharey=True, width_ratios=[3, 1.2, 1.2])
        _draw_metric_bars(scores, metrics, intervals)
        _draw_dots(times, time, f"Training time ({unit})")
        _draw_dots(sizes, millions, "Parameters (millions)")
        _name_rows(scores, names)
        _put_legend_below(figure, scores.containers, list(_METRICS.values()))
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


def _use_whole_numbers(ax: Axes) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _use_log_scale(ax: Axes, values: pd.Series) -> None:
    positive = values[values > 0]
    if positive.empty:
        return
    ax.set_yscale("log")
    ax.yaxis.set_minor_formatter(NullFormatter())
    if positive.max() < 10 * positive.min():  # only powers of ten are named: have two in sight
        middle = math.sqrt(positive.min() * positive.max())
        ax.set_ylim(middle / 10, middle * 10)


def _checked_confusion(
    confusion: np.ndarray | Sequence[Sequence[int]], class_names: Sequence[str]
) -> np.ndarray:
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or len(set(confusion.shape)) != 1 or not confusion.size:
        raise ValueError(f"confusion has shape {confusion.shape}; it must be (C, C)")
    if len(class_names) != len(confusion):
        raise ValueError(
            f"confusion has {len(confusion)} classes, class_names has {len(class_names)}"
        )
    with np.errstate(invalid="ignore"):  # what NaN becomes is no longer equal to it
        counts = confusion.astype(np.int64)
    if (counts != confusion).any() or (counts < 0).any():
        raise ValueError("confusion must hold counts: whole numbers from 0")
    return counts


def _draw_confusion(ax: Axes, confusion: np.ndarray, cell: float) -> None:
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.ma.masked_array(confusion / np.maximum(totals, 1))
    shares[totals[:, 0] == 0] = np.ma.masked
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set_facecolor(_LIGHT_GREY)
    digits = len(f"{confusion.max():,}")
    fontsize = min(9.0, 15 * cell, 72 * 0.9 * cell / (0.65 * digits))
    for (row, column), count in np.ndenumerate(confusion):
        if totals[row]:
            share = shares[row, column]
            colour = "white" if share > 0.65 else "black" if count else "0.6"
            text = f"{count:,}\n{_percent(share)}"
            ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=fontsize)
    for row in np.flatnonzero(totals == 0):
        middle = (len(confusion) - 1) / 2
        ax.text(middle, row, "no images", ha="center", va="center", color=_DARK_GREY)
    edges = np.arange(len(confusion) + 1) - 0.5
    ax.hlines(edges, edges[0], edges[-1], color="white", linewidth=1)
    ax.vlines(edges, edges[0], edges[-1], color="white", linewidth=1)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    scale = ax.figure.colorbar(image, cax=ax.inset_axes([1.03, 0, 0.035, 1]))
    scale.set_label("Share of the true class")
    scale.ax.yaxis.set_major_formatter(PercentFormatter(1))
    scale.outline.set_visible(False)


def _percent(share: float) -> str:
    if 0 < share < 0.005:
        return "<1%"
    if 0.995 <= share < 1:
        return ">99%"
    return f"{share:.0%}"


def _line_style(label: int) -> dict[str, Any]:
    """That of a class, the same in every figure; no two alike among the first 81."""
    count = len(_LINE_COLOURS)
    return {
        "color": _LINE_COLOURS[label % count],
        "linestyle": _DASHES[(label + label // count) % count],
    }


def _draw_curves(
    ax: Axes, curves: Mapping[int, Curve], names: Sequence[str], heading: str, **style: Any
) -> None:
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
    if not curves:
        ax.text(0.5, 0.5, "all images are of one class", ha="center", va="center")
        return
    for label, curve in curves.items():
        ax.plot(curve.x, curve.y, **_line_style(label), **style)
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
    classes, splits = table["class"].astype(str), table["split"].astype(str)
    usual = ["train", "valid", "test"]
    order = sorted(splits.unique(), key=lambda s: usual.index(s) if s in usual else len(usual))
    counts = pd.crosstab(classes, splits)[order]
    largest_first = counts.sum(axis=1).sort_values(ascending=False, kind="stable").index
    return counts.loc[largest_first]


def _checked_labels(
    labels: np.ndarray | Sequence[int], name: str, num_images: int, num_classes: int
) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name} are {labels.dtype} {labels.shape}; for {num_images} images they must be "
            f"whole numbers ({num_images},)"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{name} go from {labels.min()} to {labels.max()}; those of {num_classes} classes "
            f"go from 0 to {num_classes - 1}"
        )
    return labels


def _checked_names(names: Sequence[str], name: str, num_images: int) -> list[str]:
    if len(names) != num_images:
        raise ValueError(f"{name} has {len(names)} names for {num_images} images")
    return list(names)


def _draw_montage(ax: Axes, rows: Sequence[np.ndarray], columns: int) -> list[float]:
    """Draws rows of images (n, H, W, 3) on one white canvas; gives the height of their middles."""
    height, width = rows[0].shape[1:3]
    gap = max(1, round(0.04 * width))
    shape = (len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for index, row in enumerate(rows):
        for column, image in enumerate(row):
            top, left = index * (height + gap), column * (width + gap)
            canvas[top : top + height, left : left + width] = image
    ax.imshow(canvas, extent=(0, shape[1], shape[0], 0))
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return [index * (height + gap) + height / 2 for index in range(len(rows))]


def _caption(*texts: str, width: int = 30) -> str:
    # Paths break between folders rather than within a name.
    spaced = (textwrap.wrap(text.replace("/", "/ "), width) for text in texts)
    lines = [line.replace("/ ", "/") for wrapped in spaced for line in wrapped]
    # A file may be called anything.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _draw_captioned_image(ax: Axes, image: np.ndarray, caption: str) -> None:
    ax.set_axis_on()
    ax.imshow(image)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_xlabel(caption, parse_math=False, fontsize=6.5)


def _grid_size(images: np.ndarray, captions: Sequence[str], columns: int) -> tuple[float, float]:
    """The inches that captioned images take, in rows of `columns` on a page 7.2 inches wide."""
    num_rows = math.ceil(len(captions) / columns)
    num_lines = max(caption.count("\n") + 1 for caption in captions)
    cell = 7.2 / columns
    height = cell * images.shape[1] / images.shape[2] + 0.12 * num_lines + 0.12
    return cell * min(columns, len(captions)), num_rows * height + 0.2


def _draw_grid(figure: Figure, images: np.ndarray, captions: Sequence[str], columns: int) -> None:
    columns = min(columns, len(images))
    axes = figure.subplots(math.ceil(len(images) / columns), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, caption in zip(axes.flat, images, captions, strict=False):
        _draw_captioned_image(ax, image, caption)


def _checked_table(
    values: pd.DataFrame | Mapping[str, Any], name: str, columns: Sequence[str]
) -> pd.DataFrame:
    missing = [column for column in columns if column not in values]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    try:
        table = pd.DataFrame({column: values[column] for column in columns})
    except ValueError as error:  # lengths differ
        raise ValueError(f"{name}: {error}") from error
    if table.empty:
        raise ValueError(f"{name} has no rows; there is nothing to draw")
    return table


def _in_readable_unit(seconds: pd.Series) -> tuple[pd.Series, str]:
    longest = seconds.max()
    if longest >= 2 * 3600:
        return seconds / 3600, "hours"
    if longest >= 2 * 60:
        return seconds / 60, "minutes"
    return seconds, "seconds"


def _draw_metric_bars(ax: Axes, metrics: pd.DataFrame, intervals: Mapping[str, np.ndarray]) -> None:
    bar = 0.8 / len(_METRICS)
    for index, name in enumerate(_METRICS):
        rows = np.arange(len(metrics)) + (index - (len(_METRICS) - 1) / 2) * bar
        values = metrics[name].to_numpy()
        ax.barh(rows, np.nan_to_num(values), height=bar, color=_COLOURS[index])
        ends = intervals.get(name, np.full((len(values), 2), np.nan))
        _draw_intervals(ax, rows, values, ends, "black")
        for row, value, high in zip(rows, values, ends[:, 1], strict=True):
            text = "n/a" if math.isnan(value) else f"{value:.3f}"
            end = 0 if math.isnan(value) else np.fmax(value, high)
            ax.annotate(
                text, (end, row), (2, 0), textcoords="offset points", va="center", fontsize=6.5
            )
    ax.set_xlim(0, 1.1)
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.set_xlabel("Score, with its 95% interval" if intervals else "Score")


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
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    elif high > 0:
        ax.set_xlim(-0.15 * high, 1.25 * high)  # room for the number over a dot at the edge
    else:
        ax.set_xticks([])
    middle = sum(ax.get_xlim()) / 2
    for row, value in zip(rows, values.fillna(middle), strict=True):
        text = "n/a" if values.isna().iloc[row] else f"{value:.3g}"
        ax.annotate(
            text, (value, row), (0, 5), textcoords="offset points", ha="center", fontsize=6.5
        )


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


def _longest(names: Sequence[str]) -> int:
    return max(len(name) for name in names)
