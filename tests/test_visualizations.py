"""Figures: what they show is what was given, legibly, and drawing them leaves no trace."""

import copy
import os
import subprocess
import sys
import warnings
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from visualizations import (
    overlay_heatmap,
    plot_augmentations,
    plot_class_distribution,
    plot_class_metrics,
    plot_confusion_matrix,
    plot_gradcams,
    plot_learning_curves,
    plot_mistakes,
    plot_model_comparison,
    plot_pairs,
    plot_reliability,
    plot_roc_pr_curves,
    plot_samples,
)

LONG_NAMES = [f"class number {i} with a rather long name, yes" for i in range(9)]
HISTORY = {
    "step": [100, 200, 300, 400],
    "learning_rate": [1e-3, 5e-4, 1e-4, 1e-5],
    "train_loss": [2.0, 1.5, 1.2, 1.0],
    "valid_loss": [2.1, 1.7, 1.4, 1.6],
    "valid_precision": [0.30, 0.50, 0.72, 0.70],
    "valid_recall": [0.32, 0.52, 0.71, 0.69],
    "valid_f1": [0.31, 0.51, 0.71, 0.69],
    "valid_balanced_accuracy": [0.20, 0.40, 0.60, 0.60],
    "images_per_second": [90.0, 91.0, 92.0, 93.0],
}
CONFUSION = np.array([[3, 1, 0], [0, 0, 0], [1, 1, 998]])
METADATA = pd.DataFrame(
    {
        "class": ["nevus"] * 5 + ["melanoma"] * 8,
        "split": ["extra", "test", "train", "train", "valid"] + ["train"] * 6 + ["valid"] * 2,
    }
)
COMPARISON = pd.DataFrame(
    {
        "model": ["simple_cnn", "resnet_head"],
        "precision": [0.41, 0.72],
        "recall": [0.42, 0.73],
        "f1": [0.43, 0.74],
        "balanced_accuracy": [0.44, np.nan],
        "training_time": [60.0, 7200.0],
        "parameters": [3_365_065, np.nan],
    }
)
BEFORE = {
    "confidence": [None, 0.4, 0.9],
    "accuracy": [None, 0.5, 0.6],
    "count": [0, 2, 5],
    "expected_calibration_error": 0.2428,
    "maximum_calibration_error": 0.3,
}
AFTER = {
    "confidence": [0.3, 0.5, float("nan")],
    "accuracy": [0.25, 0.75, float("nan")],
    "count": [4, 3, 0],
    "expected_calibration_error": 0.1357,
    "maximum_calibration_error": 0.25,
}
PER_CLASS = {
    "melanoma": {"recall": 0.25, "precision": 0.5, "f1": 0.33, "support": 8},
    "nevus": {"recall": 0.75, "precision": 0.0, "f1": 0.8, "support": 1200},
    "empty": {"recall": None, "precision": float("nan"), "f1": None, "support": 0},
}
INTERVALS = {
    "melanoma": {"recall": [0.07, 0.59], "precision": [0.15, 0.85]},
    "nevus": {"recall": [0.7, 0.8], "precision": None},
    "empty": {"recall": None, "precision": [0.0, 0.9]},
}


def predictions(num_classes: int, num_images: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities that have something to do with them, with ties among them."""
    rng = np.random.default_rng(7)
    y_true = np.arange(num_images) % num_classes
    y_prob = rng.dirichlet(np.ones(num_classes), num_images)
    y_prob = (y_prob + 0.5 * np.eye(num_classes)[y_true]) / 1.5
    return y_true, y_prob.round(2)


def colour_tiles(*colours: str, size: int = 8) -> np.ndarray:
    tiles = np.array([to_rgb(colour) for colour in colours])[:, None, None]
    return np.broadcast_to((tiles * 255).astype(np.uint8), (len(colours), size, size, 3))


def draw_learning_curves(names, title, save_path):
    return plot_learning_curves(HISTORY, title=title, save_path=save_path)


def draw_confusion_matrix(names, title, save_path):
    confusion = np.diag(np.arange(len(names)))
    return plot_confusion_matrix(confusion, names, title=title, save_path=save_path)


def draw_class_distribution(names, title, save_path):
    table = pd.DataFrame([(name, split) for name in names for split in ("train", "valid", "test")])
    table.columns = ["class", "split"]
    return plot_class_distribution(table, title=title, save_path=save_path)


def draw_samples(names, title, save_path):
    images = colour_tiles(*["red"] * len(names))
    return plot_samples(images, range(len(names)), names, title=title, save_path=save_path)


def draw_augmentations(names, title, save_path):
    originals = colour_tiles(*["red"] * len(names))
    views = np.stack([colour_tiles("green", "blue")] * len(names))
    columns = {"view_names": ["rotated by 9° clockwise", "all together"], "image_names": names}
    return plot_augmentations(originals, views, **columns, title=title, save_path=save_path)


def draw_model_comparison(names, title, save_path):
    columns = ["precision", "recall", "f1", "balanced_accuracy", "training_time", "parameters"]
    table = pd.DataFrame({"model": names, **dict.fromkeys(columns, 1.0)})
    return plot_model_comparison(table, title=title, save_path=save_path)


def draw_pairs(names, title, save_path):
    images = [colour_tiles("red", "blue")] * len(names)
    rows = [(("identical",), (f"{n}/1.jpg", f"{n}/2.jpg"), (n, n), 0.0) for n in names]
    table = pd.DataFrame(rows, columns=["kinds", "images", "classes", "distance"])
    return plot_pairs(table, images, title=title, save_path=save_path)


def draw_roc_pr_curves(names, title, save_path):
    return plot_roc_pr_curves(*predictions(len(names)), names, title=title, save_path=save_path)


def draw_reliability(names, title, save_path):
    return plot_reliability(BEFORE, AFTER, title=title, save_path=save_path)


def draw_class_metrics(names, title, save_path):
    per_class = dict.fromkeys(names, PER_CLASS["melanoma"])
    intervals = dict.fromkeys(names, INTERVALS["melanoma"])
    return plot_class_metrics(per_class, intervals, title=title, save_path=save_path)


def draw_mistakes(names, title, save_path):
    images, others = colour_tiles(*["red"] * len(names)), [*names[1:], names[0]]
    shares, paths = np.linspace(0.9, 0.1, len(names)), [f"{n}/ISIC_0024306.jpg" for n in names]
    options = {"names": paths, "title": title, "save_path": save_path}
    return plot_mistakes(images, names, others, shares, **options)


def draw_gradcams(names, title, save_path):
    images, others = colour_tiles(*["red"] * len(names)), [*names[1:], names[0]]
    heatmaps, classes = np.full((len(names), 8, 8), 0.5), (names, others)
    paths = [f"{name}/ISIC_0024306.jpg" for name in names]
    return plot_gradcams(images, heatmaps, *classes, names=paths, title=title, save_path=save_path)


DRAWN_WITH_NAMES = [
    draw_confusion_matrix,
    draw_class_distribution,
    draw_class_metrics,
    draw_samples,
    draw_augmentations,
    draw_model_comparison,
]
DRAWN_WITH_CAPTIONS = [draw_mistakes, draw_gradcams]
ALL_DRAWN = [
    draw_learning_curves,
    draw_roc_pr_curves,
    draw_reliability,
    draw_pairs,
    *DRAWN_WITH_CAPTIONS,
    *DRAWN_WITH_NAMES,
]


def row_names(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def legend_texts(legend: Legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def intervals_in(ax: Axes, index: int) -> list[tuple[float, float]]:
    """Low and high of the intervals that were drawn at once."""
    segments = ax.collections[index].get_segments()
    return [(float(low[0]), float(high[0])) for low, high in segments]


class DashRecorder(RendererBase):
    """Records the dashes with which a line is drawn; `get_linestyle` says no more than "--"."""

    def draw_path(self, gc, path, transform, rgbFace=None):
        self.dashes = gc.get_dashes()


def look(line: Line2D) -> tuple[str, str]:
    recorder = DashRecorder()
    line.draw(recorder)
    return str(recorder.dashes), str(line.get_color())


def captions(figure: Figure) -> list[str]:
    return [ax.get_xlabel() for ax in figure.axes if ax.images]


# --- drawing and saving -----------------------------------------------------------------------


@pytest.mark.parametrize("draw", ALL_DRAWN)
def test_a_figure_is_saved_as_a_whole_png_and_leaves_no_trace_in_matplotlib(draw, tmp_path):
    before = dict(matplotlib.rcParams.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(["a", "b"], "a title", tmp_path / "figure.png")
    assert isinstance(figure, Figure)
    with Image.open(tmp_path / "figure.png") as image:
        image.load()
        assert min(image.size) > 100
        assert len(image.convert("L").getcolors()) > 10
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams.copy()) == before


def test_a_figure_is_drawn_without_a_display_or_a_chosen_backend(tmp_path):
    program = (
        "from visualizations import plot_confusion_matrix as plot;"
        "plot([[1, 0], [2, 3]], ['a', 'b'], save_path='figure.png')"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(("name", "start"), [("f.pdf", b"%PDF"), ("f.svg", b"<?xml")])
def test_the_suffix_decides_the_format(name, start, tmp_path):
    draw_samples(["a"], None, str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(start)


def test_an_unknown_format_is_refused_and_the_file_there_stays(tmp_path):
    path = tmp_path / "figure.xyz"
    path.write_text("older")
    with pytest.raises(ValueError, match="xyz"):
        draw_samples(["a"], None, path)
    assert [p.name for p in tmp_path.iterdir()] == ["figure.xyz"]
    assert path.read_text() == "older"


def test_a_missing_folder_is_not_made_up(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        draw_samples(["a"], None, tmp_path / "nowhere" / "figure.png")


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", DRAWN_WITH_NAMES)
def test_names_and_titles_are_shown_verbatim(draw):
    names = ["_a_b $x^2$", "costs $5", "naïve ü", "\\frac{1}{2} %"]
    figure = draw(names, "$a$ and $b$_c", None)
    assert sorted(row_names(figure)) == sorted(names)
    labels = [*figure.axes[0].get_yticklabels(), figure.texts[0]]
    assert not any(label.get_parse_math() for label in labels)
    assert figure.get_suptitle() == "$a$ and $b$_c"


def test_a_split_with_a_leading_underscore_is_in_the_legend_verbatim():
    table = pd.DataFrame({"class": ["a", "b"], "split": ["_x $y$", "train"]})
    legend = plot_class_distribution(table).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["train (1)", "_x $y$ (1)"]
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_a_name_that_the_font_cannot_write_is_drawn_without_a_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion_matrix(["黑色素瘤", "痣"], "皮肤", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()


@pytest.mark.parametrize("draw", DRAWN_WITH_NAMES)
def test_nine_long_names_are_whole_and_clear_of_one_another(draw):
    figure = draw(LONG_NAMES, "a title", None)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 9
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.axes[0].bbox.x0
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1


def test_the_slanted_names_below_a_confusion_matrix_are_whole_and_clear_of_one_another():
    figure = draw_confusion_matrix(LONG_NAMES, "a title", None)
    ax = figure.axes[0]
    labels = ax.get_xticklabels()
    for label in labels:
        box = label.get_window_extent()
        assert label.get_rotation() == 45
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert ax.xaxis.label.get_window_extent().y1 <= box.y0 and box.y1 <= ax.bbox.y0
    ends = [label.get_transform().transform(label.get_position())[0] for label in labels]
    labels[0].set_rotation(0)
    between_lines = min(right - left for left, right in pairwise(ends)) * np.sin(np.pi / 4)
    assert labels[0].get_window_extent().height < between_lines


def test_names_in_the_legends_of_curves_are_verbatim():
    names = ["_a $x_1$", "costs $5", "\\frac{1}{2} %"]
    for ax in draw_roc_pr_curves(names, None, None).axes:
        legend = ax.get_legend()
        shown = [text.split("  ")[1].split(" (n = ")[0] for text in legend_texts(legend)]
        assert shown == names
        assert not any(text.get_parse_math() for text in legend.get_texts())


def test_long_names_in_the_legends_of_curves_are_whole_and_clear_of_the_rest():
    figure = draw_roc_pr_curves(LONG_NAMES, "a title", None)
    roc, precision_recall = (ax.get_legend().get_window_extent() for ax in figure.axes)
    assert not roc.overlaps(precision_recall)
    for ax, box in zip(figure.axes, (roc, precision_recall), strict=True):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= ax.xaxis.label.get_window_extent().y0
        assert len(legend_texts(ax.get_legend())) == 9


@pytest.mark.parametrize("draw", DRAWN_WITH_CAPTIONS)
def test_long_names_below_images_are_whole_and_clear_of_one_another(draw):
    figure = draw(LONG_NAMES, "a title", None)
    labels = [ax.xaxis.label for ax in figure.axes if ax.images]
    boxes = [label.get_window_extent() for label in labels]
    images = [ax.bbox for ax in figure.axes if ax.images]
    assert len(boxes) == 9
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert not any(box.overlaps(image) for box in boxes for image in images)
    for label, box, name in zip(labels, boxes, LONG_NAMES, strict=True):
        assert f"true: {name}" in label.get_text().replace("\n", " ")
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0


@pytest.mark.parametrize("draw", DRAWN_WITH_CAPTIONS)
def test_names_below_images_are_verbatim(draw):
    figure = draw(["_a $x_1$", "costs $5"], "$a$ and $b$_c", None)
    first, second = captions(figure)
    assert first.split("\n")[:2] == ["true: _a $x_1$", "predicted: costs $5"]
    assert second.split("\n")[:2] == ["true: costs $5", "predicted: _a $x_1$"]
    assert not any(ax.xaxis.label.get_parse_math() for ax in figure.axes if ax.images)
    assert not figure.texts[0].get_parse_math()


# --- learning curves --------------------------------------------------------------------------


@pytest.mark.parametrize("history", [HISTORY, pd.DataFrame(HISTORY)], ids=["dict", "table"])
def test_the_learning_curves_are_the_history(history):
    loss, precision, recall, learning_rate = plot_learning_curves(history).axes
    shown = {
        "train_loss": loss.lines[0],
        "valid_loss": loss.lines[1],
        "valid_precision": precision.lines[0],
        "valid_recall": recall.lines[0],
        "valid_balanced_accuracy": recall.lines[1],
        "learning_rate": learning_rate.lines[0],
    }
    for name, line in shown.items():
        assert line.get_xdata().tolist() == HISTORY["step"]
        assert line.get_ydata().tolist() == HISTORY[name]
    assert learning_rate.get_yscale() == "log"


def test_the_learning_rate_is_drawn_at_every_step_where_it_is_given():
    rates = np.linspace(1e-4, 1e-3, 400)
    figure = plot_learning_curves(HISTORY, learning_rates=pd.Series(rates, index=range(7, 407)))
    (line, _) = figure.axes[3].lines  # and the best evaluation
    assert line.get_xdata().tolist() == list(range(1, 401))
    np.testing.assert_array_equal(line.get_ydata(), rates)
    assert figure.axes[0].lines[0].get_xdata().tolist() == HISTORY["step"]


def test_the_best_evaluation_is_the_most_accurate_then_the_one_with_the_lower_loss():
    figure = plot_learning_curves(HISTORY)
    assert [ax.lines[-1].get_xdata() for ax in figure.axes] == [[300, 300]] * 4
    legend = figure.legends[0].get_texts()[0].get_text()
    assert legend == "best evaluation: step 300, balanced accuracy 0.600"


def test_a_single_evaluation_is_seen_as_a_dot():
    figure = plot_learning_curves({name: values[:1] for name, values in HISTORY.items()})
    for ax in figure.axes:
        assert ax.lines[0].get_marker() not in ("", "None")
        x, y = ax.lines[0].get_xydata()[0]
        assert ax.get_xlim()[0] < x < ax.get_xlim()[1]
        assert ax.get_ylim()[0] < y < ax.get_ylim()[1]


def test_missing_values_leave_a_gap_and_are_never_the_best():
    history = HISTORY | {"valid_balanced_accuracy": [0.2, None, float("nan"), 0.1]}
    figure = plot_learning_curves(history)
    shown = figure.axes[2].lines[1].get_ydata()
    np.testing.assert_array_equal(shown, [0.2, np.nan, np.nan, 0.1])
    assert figure.axes[2].lines[-1].get_xdata() == [100, 100]


def test_a_history_of_nothing_but_gaps_has_no_best_evaluation():
    history = {name: [None] * 4 for name in HISTORY} | {"step": HISTORY["step"]}
    figure = plot_learning_curves(history)
    assert figure.legends == []


def test_a_history_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="history has no rows"):
        plot_learning_curves({name: [] for name in HISTORY})
    with pytest.raises(ValueError, match="All arrays must be of the same length"):
        plot_learning_curves(HISTORY | {"valid_loss": [1, 2, 3]})
    with pytest.raises(ValueError, match="lacks train_loss"):
        plot_learning_curves({k: v for k, v in HISTORY.items() if k != "train_loss"})


# --- confusion matrix -------------------------------------------------------------------------


def test_each_cell_with_images_shows_their_count_and_their_share_of_the_true_class():
    figure = plot_confusion_matrix(CONFUSION, ["a", "b", "c"])
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert cells.pop((1, 1)) == "no images"
    assert cells == {  # keys are (predicted, true)
        (0, 0): "3\n75 %",
        (1, 0): "1\n25 %",  # that of no images, beside it, is empty
        (0, 2): "1\n<1 %",
        (1, 2): "1\n<1 %",
        (2, 2): "998\n>99 %",
    }


def test_colour_is_the_share_from_0_to_1_and_a_class_without_images_has_none():
    image = plot_confusion_matrix(CONFUSION.tolist(), ["a", "b", "c"]).axes[0].images[0]
    shares = image.get_array()
    assert image.get_clim() == (0, 1)
    assert shares.mask.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    np.testing.assert_allclose(shares[[0, 2]], [[0.75, 0.25, 0], [0.001, 0.001, 0.998]])


def test_rows_are_true_classes_from_the_top_and_columns_predicted_ones():
    ax = plot_confusion_matrix([[1, 2], [3, 4]], ["a", "b"]).axes[0]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("True class", "Predicted class")
    top, bottom = (label.get_window_extent().y0 for label in ax.get_yticklabels())
    assert top > bottom
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]


def test_the_texts_of_twenty_classes_stay_within_their_cells():
    figure = plot_confusion_matrix(np.full((20, 20), 12_345), [f"class {i}" for i in range(20)])
    cell = figure.axes[0].bbox.width / 20
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert max(box.width for box in boxes) < cell
    assert max(box.height for box in boxes) < cell


@pytest.mark.parametrize(
    ("confusion", "names", "message"),
    [
        ([[1, 2, 3], [4, 5, 6]], ["a", "b"], r"\(2, 3\)"),
        ([1, 2], ["a", "b"], r"\(2,\)"),
        (np.zeros((0, 0)), [], r"\(0, 0\)"),
        ([[1, 2], [3, 4]], ["a", "b", "c"], r"\(2, 2\); for the 3 names in class_names"),
        ([[0.5, 0.5], [0, 1]], ["a", "b"], "counts"),
        ([[1, -1], [0, 1]], ["a", "b"], "counts"),
        ([[1, np.nan], [0, 1]], ["a", "b"], "counts"),
        ([[1, np.inf], [0, 1]], ["a", "b"], "counts"),
    ],
)
def test_a_confusion_matrix_that_does_not_fit_is_refused(confusion, names, message):
    with pytest.raises(ValueError, match=message):
        plot_confusion_matrix(confusion, names)


# --- ROC and precision-recall curves ----------------------------------------------------------


def test_each_class_has_its_roc_curve_and_the_area_under_it():
    y_true, y_prob = predictions(3)
    roc = plot_roc_pr_curves(y_true, y_prob, ["a", "b", "c"]).axes[0]
    for label in range(3):
        x, y, _ = roc_curve(y_true == label, y_prob[:, label])
        np.testing.assert_array_equal(roc.lines[label].get_xdata(), x)
        np.testing.assert_array_equal(roc.lines[label].get_ydata(), y)
    areas = [roc_auc_score(y_true == label, y_prob[:, label]) for label in range(3)]
    expected = [f"{area:.3f}  {name}" for area, name in zip(areas, "abc", strict=True)]
    assert legend_texts(roc.get_legend()) == expected


def test_the_area_under_a_precision_recall_curve_is_its_average_precision():
    y_true, y_prob = predictions(3)
    ax = plot_roc_pr_curves(y_true.tolist(), y_prob, ["a", "b", "c"]).axes[1]
    expected = []
    for label, line in enumerate(ax.lines):
        area = average_precision_score(y_true == label, y_prob[:, label])
        recall, precision = line.get_data()  # a step goes from its recall down to the next one
        assert line.get_drawstyle() == "steps-post"
        assert (recall[0], recall[-1]) == (1, 0)
        np.testing.assert_allclose(-(np.diff(recall) * precision[:-1]).sum(), area)
        expected.append(f"{area:.3f}  {'abc'[label]} (n = 20)")
    assert legend_texts(ax.get_legend()) == expected


def test_the_precision_at_a_recall_is_the_best_one_there():
    y_true, scores = np.array([0, 1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    ax = plot_roc_pr_curves(y_true, np.stack([1 - scores, scores], axis=1), ["a", "b"]).axes[1]
    assert ax.lines[1].get_xdata().tolist() == [1, 0.5, 0]
    assert ax.lines[1].get_ydata().tolist() == [0.5, 0.5, 0.5]  # 2 of 4, then 1 of 2


def test_a_class_without_images_has_no_curve_and_the_others_keep_their_lines():
    names = ["a", "empty", "c"]
    y_true, y_prob = predictions(3)
    kept = y_true != 1
    whole = plot_roc_pr_curves(y_true, y_prob, names)
    figure = plot_roc_pr_curves(y_true[kept], y_prob[kept], names)
    for ax, of_all in zip(figure.axes, whole.axes, strict=True):
        shown = [text.split("  ")[1][0] for text in legend_texts(ax.get_legend())]
        assert shown == ["a", "c"]
        for line, same in zip(ax.lines, (of_all.lines[0], of_all.lines[2]), strict=False):
            assert look(line) == look(same)


def test_melanoma_and_then_the_other_malignant_classes_are_first_in_front_and_thicker():
    names = ["nevus", "bcc", "vascular lesion", "MEL"]
    for ax in draw_roc_pr_curves(names, None, None).axes:
        shown = [text.split("  ")[1].split(" (n = ")[0] for text in legend_texts(ax.get_legend())]
        assert shown == ["MEL", "bcc", "nevus", "vascular lesion"]
        curves = ax.lines[:4]
        melanoma, carcinoma, *rest = [line.get_linewidth() for line in curves]
        assert melanoma > carcinoma > max(rest)
        melanoma, carcinoma, *rest = [line.get_zorder() for line in curves]
        assert melanoma > carcinoma > max(rest)


def test_the_classes_named_malignant_are_first_and_classes_that_nobody_knows_are_alike():
    y_true, y_prob = predictions(3)
    named = plot_roc_pr_curves(y_true, y_prob, ["melanoma", "b", "c"], malignant=["c"]).axes[0]
    assert [text.split("  ")[1] for text in legend_texts(named.get_legend())] == [
        "c", "melanoma", "b",
    ]  # fmt: skip
    areas = [float(text.split("  ")[0]) for text in legend_texts(named.get_legend())]
    expected = [roc_auc_score(y_true == label, y_prob[:, label]) for label in (2, 0, 1)]
    np.testing.assert_allclose(areas, expected, atol=0.0005)
    unknown = plot_roc_pr_curves(y_true, y_prob, ["a", "b", "c"]).axes[0]
    assert len({line.get_linewidth() for line in unknown.lines[:3]}) == 1


def test_images_of_one_class_have_no_curve_and_the_figure_says_so():
    figure = plot_roc_pr_curves([1, 1], [[0.5, 0.5], [0.2, 0.8]], ["a", "b"])
    for ax in figure.axes:
        assert [text.get_text() for text in ax.texts] == ["all images are of one class"]
        assert len(ax.lines) == 0
        assert ax.get_legend() is None


def test_the_lines_of_nine_classes_differ_in_dashes_and_those_of_twenty_in_something():
    nine, twenty = (
        [
            look(line)
            for line in draw_roc_pr_curves([str(i) for i in range(n)], None, None).axes[1].lines
        ]
        for n in (9, 20)
    )
    assert len({dashes for dashes, _ in nine}) == 9
    assert len(set(twenty)) == 20


def test_no_line_of_a_class_is_too_pale_for_white_paper():
    for line in draw_roc_pr_curves([str(i) for i in range(9)], None, None).axes[1].lines:
        rgb = np.array(to_rgb(line.get_color()))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        luminance = linear @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (luminance + 0.05) > 2  # WCAG's contrast, 1.3 for the palette's yellow


def test_predictions_that_do_not_fit_are_refused():
    y_true, y_prob = predictions(3)
    names = ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"y_prob has shape \(60, 3\).*must be \(60, 2\)"):
        plot_roc_pr_curves(y_true, y_prob, names[:2])
    with pytest.raises(ValueError, match=r"y_prob has shape \(60, 3\).*must be \(59, 3\)"):
        plot_roc_pr_curves(y_true[1:], y_prob, names)
    with pytest.raises(ValueError, match=r"y_true has shape \(0,\).*not empty"):
        plot_roc_pr_curves(y_true[:0], y_prob[:0], names)
    with pytest.raises(ValueError, match="y_true goes from 1 to 3; labels of 3 classes"):
        plot_roc_pr_curves(y_true + 1, y_prob, names)
    with pytest.raises(ValueError, match="whole numbers from 0 to 2"):
        plot_roc_pr_curves(y_true / 2, y_prob, names)
    with pytest.raises(ValueError, match=r"y_prob goes from .*must be in \[0, 1\]"):
        plot_roc_pr_curves(y_true, np.log(y_prob + 0.01), names)
    with pytest.raises(ValueError, match="y_prob holds values that are not finite"):
        plot_roc_pr_curves(y_true, y_prob * np.nan, names)


# --- reliability ------------------------------------------------------------------------------


def test_accuracy_is_drawn_over_confidence_and_empty_bins_leave_a_gap():
    diagram = plot_reliability(BEFORE, AFTER).axes[0]
    diagonal, before, after = diagram.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    np.testing.assert_array_equal(before.get_xdata(), [np.nan, 0.4, 0.9])
    np.testing.assert_array_equal(before.get_ydata(), [np.nan, 0.5, 0.6])
    np.testing.assert_array_equal(after.get_xdata(), [0.3, 0.5, np.nan])
    np.testing.assert_array_equal(after.get_ydata(), [0.25, 0.75, np.nan])
    assert before.get_marker() != after.get_marker()
    assert before.get_linestyle() != after.get_linestyle()


def test_bins_of_equal_count_have_their_points_with_intervals_where_both_curves_have_them():
    bins = {"confidence": [0.4, 0.9], "accuracy": [0.5, 0.6], "count": [4, 3]}
    before = BEFORE | {"equal_count_bins": bins | {"accuracy_interval": [[0.2, 0.8], [0.3, 0.7]]}}
    bins = {"confidence": [0.45], "accuracy": [0.75], "count": [7]}
    after = AFTER | {"equal_count_bins": bins | {"accuracy_interval": [[0.4, 0.95]]}}
    figure = plot_reliability(before, after)
    diagram, counts = figure.axes
    points = [line.get_xydata().tolist() for line in diagram.lines[1:]]
    assert points == [[[0.4, 0.5], [0.9, 0.6]], [[0.45, 0.75]]]
    drawn = [
        [segment.T.tolist() for segment in lines.get_segments()] for lines in diagram.collections
    ]
    assert drawn == [
        [[[0.4, 0.4], [0.2, 0.8]], [[0.9, 0.9], [0.3, 0.7]]],
        [[[0.45, 0.45], [0.4, 0.95]]],
    ]
    assert diagram.get_ylabel() == "Share that is right (95 % interval)"
    heights = [[bar.get_height() for bar in bars] for bars in counts.containers]
    assert heights == [[0, 2, 5], [4, 3, 0]]  # those of the equal bins
    assert plot_reliability(before, AFTER).axes[0].get_ylabel() == "Share that is right"


def test_each_bin_has_bars_as_high_as_its_numbers_of_images():
    counts = plot_reliability(BEFORE, AFTER).axes[1]
    heights = [[bar.get_height() for bar in bars] for bars in counts.containers]
    assert heights == [[0, 2, 5], [4, 3, 0]]
    for bars in counts.containers:
        for index, bar in enumerate(bars):
            assert index / 3 <= bar.get_x() and bar.get_x() + bar.get_width() <= (index + 1) / 3


def test_the_legend_has_the_expected_calibration_errors():
    legend = plot_reliability(BEFORE, AFTER).legends[0]
    assert legend.get_title().get_text() == "Expected calibration error"
    assert legend_texts(legend) == ["0.243  before calibration", "0.136  after calibration"]


def test_a_reliability_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="after lacks count, expected_calibration_error"):
        plot_reliability(BEFORE, {"confidence": [0.5], "accuracy": [0.5]})
    with pytest.raises(ValueError, match="before: All arrays must be of the same length"):
        plot_reliability(BEFORE | {"accuracy": [0.5, 0.6]}, AFTER)
    empty = {name: [] for name in ("confidence", "accuracy", "count")}
    with pytest.raises(ValueError, match="no rows"):
        plot_reliability(BEFORE | empty, AFTER | empty)
    one = {name: [1] for name in ("confidence", "accuracy", "count")}
    with pytest.raises(ValueError, match="before has 3 bins, after has 1"):
        plot_reliability(BEFORE, AFTER | one)


# --- recall and precision of each class -------------------------------------------------------


def test_recall_and_precision_are_dots_with_their_intervals():
    figure = plot_class_metrics(PER_CLASS, INTERVALS)
    ax = figure.axes[0]
    assert row_names(figure) == ["melanoma", "nevus", "empty"]
    assert legend_texts(figure.legends[0]) == ["recall", "precision"]
    recall, precision = ax.lines
    np.testing.assert_array_equal(recall.get_xdata(), [0.25, 0.75, np.nan])
    np.testing.assert_array_equal(precision.get_xdata(), [0.5, 0.0, np.nan])
    assert recall.get_marker() != precision.get_marker()
    assert intervals_in(ax, 0) == [(0.07, 0.59), (0.7, 0.8)]
    assert intervals_in(ax, 1) == [(0.15, 0.85)]  # none where either is missing


def test_an_interval_is_level_with_its_dot_and_recall_is_clear_of_precision():
    ax = plot_class_metrics(PER_CLASS, INTERVALS).axes[0]
    for dots, lines in zip(ax.lines, ax.collections, strict=False):
        for (_, level), _ in lines.get_segments():
            assert level in dots.get_ydata().tolist()
    recall, precision = (line.get_ydata() for line in ax.lines)
    assert (np.round(recall) == range(3)).all() and (np.round(precision) == range(3)).all()
    assert (precision - recall > 0.2).all()  # recall above, both within the row of their class


def test_the_numbers_of_images_stand_beside_their_rows():
    figure = plot_class_metrics(PER_CLASS, INTERVALS)
    assert texts(figure) == ["Images", "8", "1,200", "0"]
    assert [text.get_position()[1] for text in figure.axes[0].texts[1:]] == [0, 1, 2]


def test_classes_of_which_nothing_is_known_are_drawn_without_a_dot():
    figure = plot_class_metrics({"a": PER_CLASS["empty"]}, {"a": INTERVALS["empty"]})
    assert row_names(figure) == ["a"]
    assert all(np.isnan(line.get_xdata()).all() for line in figure.axes[0].lines)


def test_class_metrics_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="per_class has no classes"):
        plot_class_metrics({}, {})
    with pytest.raises(ValueError, match="intervals of nevus lacks recall, precision"):
        plot_class_metrics(PER_CLASS, {"melanoma": INTERVALS["melanoma"]})
    with pytest.raises(ValueError, match="per_class of a lacks support"):
        plot_class_metrics({"a": {"recall": 1, "precision": 1}}, {"a": INTERVALS["empty"]})


# --- class distribution -----------------------------------------------------------------------


def test_the_bars_are_as_long_as_the_counts():
    figure = plot_class_distribution(METADATA)
    assert row_names(figure) == ["melanoma", "nevus"]
    lengths = [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]
    assert lengths == [[6, 2], [2, 1], [0, 1], [0, 1]]
    assert texts(figure) == ["6", "2", "2", "1", "0", "1", "0", "1"]


def test_classes_come_in_the_order_of_their_labels_however_large_they_are():
    table = pd.DataFrame({"class": ["c", "c", "b", "a", "b", "c"], "split": ["train"] * 6})
    assert row_names(plot_class_distribution(table)) == ["a", "b", "c"]


def test_splits_come_as_train_valid_test_and_then_the_others():
    legend = plot_class_distribution(METADATA).legends[0]
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["train (8)", "valid (3)", "test (1)", "extra (1)"]


def test_a_table_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="lacks split"):
        plot_class_distribution(METADATA[["class"]])
    with pytest.raises(ValueError, match="no rows"):
        plot_class_distribution(METADATA[:0])
    with pytest.raises(ValueError, match="1 rows without a class or split"):
        plot_class_distribution(pd.DataFrame({"class": ["a", "b"], "split": ["train", None]}))


# --- images -----------------------------------------------------------------------------------


def pixels_of(figure: Figure) -> np.ndarray:
    return figure.axes[0].images[0].get_array()


def test_a_row_holds_the_images_of_its_class_and_empty_classes_have_none():
    images = colour_tiles("red", "lime", "blue")
    figure = plot_samples(images, [2, 0, 2], ["a", "empty", "c"])
    assert row_names(figure) == ["a", "c"]
    canvas = pixels_of(figure)
    assert canvas.shape == (17, 17, 3)  # two by two tiles of 8 pixels and a gap of 1
    np.testing.assert_array_equal(canvas[:8, :8], images[1])
    np.testing.assert_array_equal(canvas[9:, :8], images[0])
    np.testing.assert_array_equal(canvas[9:, 9:], images[2])
    assert (canvas[:8, 9:] == 255).all()


def test_a_class_shows_its_first_six_images():
    canvas = pixels_of(plot_samples(colour_tiles(*["red"] * 9), [0] * 9, ["a"]))
    assert canvas.shape == (8, 6 * 9 - 1, 3)


def test_the_original_comes_first_and_is_marked():
    images = colour_tiles("red", "lime", "blue", "black")
    figure = plot_augmentations(images[0], images[1:].astype(np.float32) / 255)
    canvas, ax = pixels_of(figure), figure.axes[0]
    for index, (top, left) in enumerate([(0, 0), (0, 9), (9, 0), (9, 9)]):
        np.testing.assert_array_equal(canvas[top : top + 8, left : left + 8], images[index])
    assert ax.patches[0].get_bbox().bounds == (0, 0, 8, 8)
    assert texts(figure) == ["original"]


def test_several_images_have_a_row_each_and_their_views_are_named_above_the_columns():
    originals = colour_tiles("red", "blue")
    views = np.stack([colour_tiles("lime", "black", "white"), colour_tiles("gray", "cyan", "pink")])
    columns = ["flipped $x$", "brightness × 1.13", "all together"]
    figure = plot_augmentations(originals, views, view_names=columns, image_names=["a", "b"])
    canvas, ax = pixels_of(figure), figure.axes[0]
    assert canvas.shape == (17, 4 * 9 - 1, 3)
    for row in range(2):
        for column, image in enumerate([originals[row], *views[row]]):
            top, left = 9 * row, 9 * column
            np.testing.assert_array_equal(canvas[top : top + 8, left : left + 8], image)
    assert [patch.get_bbox().bounds for patch in ax.patches] == [(0, 0, 8, 8), (0, 9, 8, 8)]
    assert [text.replace("\n", " ") for text in texts(figure)] == ["original", *columns]
    assert [text.get_position()[0] for text in ax.texts] == [4, 13, 22, 31]
    assert not any(text.get_parse_math() for text in ax.texts)
    assert row_names(figure) == ["a", "b"]


def test_the_names_of_views_are_whole_and_clear_of_one_another():
    names = ["rotated by 10° anticlockwise", "noise of standard deviation 0.03", "contrast × 0.83"]
    originals, views = colour_tiles("red", "blue"), np.zeros((2, 3, 8, 8, 3), np.uint8)
    figure = plot_augmentations(originals, views, view_names=names, title="a title")
    boxes = [text.get_window_extent() for text in [figure.texts[0], *figure.axes[0].texts]]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_the_named_views_of_one_image_are_in_one_row():
    images = colour_tiles("red", "lime", "blue", "black")
    figure = plot_augmentations(images[0], images[1:], view_names=["1", "2", "3"])
    assert pixels_of(figure).shape == (8, 4 * 9 - 1, 3)
    assert texts(figure) == ["original", "1", "2", "3"]


def test_views_and_names_that_do_not_fit_are_refused():
    originals, views = colour_tiles("red", "blue"), np.zeros((2, 3, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="view_names has 2 names for 3 images"):
        plot_augmentations(originals, views, view_names=["1", "2"])
    with pytest.raises(ValueError, match="image_names has 1 names for 2 images"):
        plot_augmentations(originals, views, image_names=["a"])
    with pytest.raises(ValueError, match=r"\(3, 8, 8, 3\); it must be \(R, N, H, W, 3\)"):
        plot_augmentations(originals, views[0])
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8, 3\).*\(2, 8, 8, 3\)"):
        plot_augmentations(originals, views[:1])


def pairs(*rows):
    return pd.DataFrame(rows, columns=["kinds", "images", "classes", "distance"])


def test_pairs_stand_side_by_side_with_their_kinds_classes_and_paths():
    rows = pairs(
        (("contradiction", "near-duplicate"), ("a_b $x$/1.jpg", "c/2.jpg"), ("a_b $x$", "c"), 0.07),
        (("identical",), ("c/3.jpg", "c/4.jpg"), ("c", "c"), 0.0),
        (("identical",), ("c/5.jpg", "c/6.jpg"), ("c", "c"), 0.0),
    )
    images = [(np.full((8, 5, 3), 10 * n, np.uint8), np.zeros((30, 60, 3))) for n in range(3)]
    shown = [ax for ax in plot_pairs(rows, images).axes if ax.images]
    assert [ax.get_xlabel().split("\n")[-1] for ax in shown] == [
        "a_b $x$/1.jpg", "c/2.jpg", "c/3.jpg", "c/4.jpg", "c/5.jpg", "c/6.jpg",
    ]  # fmt: skip
    assert shown[0].get_xlabel().startswith("a_b $x$\n")
    assert not shown[0].xaxis.label.get_parse_math()
    headings = [ax.get_title(loc="left") for ax in shown]
    assert headings[::2] == ["contradiction, near-duplicate (0.07 apart)"] + ["identical"] * 2
    assert (shown[2].images[0].get_array() == 10).all()


def test_long_names_below_pairs_are_clear_of_one_another():
    figure = draw_pairs([f"{name} {'and a folder' * 6}" for name in LONG_NAMES], None, None)
    labels = [ax.xaxis.label.get_window_extent() for ax in figure.axes if ax.images]
    assert len(labels) == 18
    assert not any(one.overlaps(other) for one, other in combinations(labels, 2))


def test_a_path_that_is_no_unicode_is_drawn_all_the_same(tmp_path):
    rows = pairs((("identical",), ("a/caf\udce9.jpg", "a/2.jpg"), ("a", "a"), 0.0))
    figure = plot_pairs(rows, [colour_tiles("red", "blue")], save_path=tmp_path / "pairs.png")
    assert figure.axes[0].get_xlabel() == "a\na/caf\\udce9.jpg"


def test_pairs_without_two_images_each_are_refused():
    rows = pairs((("identical",), ("a", "b"), ("a", "a"), 0.0))
    with pytest.raises(ValueError, match="two for each of the 1 pairs"):
        plot_pairs(rows, [colour_tiles("red")])
    with pytest.raises(ValueError, match="no rows"):
        plot_pairs(rows[:0], [])


def test_mistakes_come_most_confident_first_with_both_classes_and_the_probability():
    images = colour_tiles("red", "lime", "blue")
    columns = {"true": ["a", "b", "c"], "predicted": ["b", "c", "a"], "prob": [0.5, 0.999, 0.75]}
    table = pd.DataFrame(columns, index=[8, 1, 0])  # rows of a larger table
    figure = plot_mistakes(images, table["true"], table["predicted"], table["prob"])
    assert captions(figure) == [
        "true: b\npredicted: c\nprobability: >99 %",
        "true: c\npredicted: a\nprobability: 75 %",
        "true: a\npredicted: b\nprobability: 50 %",
    ]
    for ax, image in zip(figure.axes, images[[1, 2, 0]], strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), image)


def test_the_file_of_a_mistake_and_of_a_heatmap_is_named_below_it():
    images, paths = colour_tiles("red", "lime"), np.array(["a/_$1$.jpg", "b/2.jpg"], object)
    figure = plot_mistakes(images, ["a", "b"], ["b", "a"], [0.5, 0.75], names=paths)
    assert [caption.split("\n")[-1] for caption in captions(figure)] == ["b/2.jpg", "a/_$1$.jpg"]
    figure = plot_gradcams(images, np.zeros((2, 8, 8)), ["a", "b"], ["a", "c"], names=paths)
    assert captions(figure) == ["true: a\na/_$1$.jpg", "true: b\npredicted: c\nb/2.jpg"]
    long = ["Train/seborrheic keratosis/seborrheic_keratosis_train_0005.jpg", "b/2.jpg"]
    figure = plot_mistakes(images, ["a", "b"], ["b", "a"], [0.75, 0.5], names=long)
    assert captions(figure)[0].split("\n")[3:] == [
        "Train/seborrheic keratosis/",
        "seborrheic_keratosis_train_",
        "0005.jpg",
    ]
    with pytest.raises(ValueError, match="names has 1 names for 2 images"):
        plot_mistakes(images, ["a", "b"], ["b", "a"], [0.5, 0.75], names=paths[:1])
    with pytest.raises(ValueError, match="names has 1 names for 2 images"):
        plot_gradcams(images, np.zeros((2, 8, 8)), ["a", "b"], ["a", "c"], names=paths[:1])


def test_twelve_mistakes_are_shown_at_most_and_equals_keep_their_order():
    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in range(20)])
    figure = plot_mistakes(images, ["a"] * 20, ["b"] * 20, [0.5] * 19 + [0.6])
    shown = [int(ax.images[0].get_array()[0, 0, 0]) for ax in figure.axes if ax.images]
    assert shown == [19, *range(11)]


def test_five_mistakes_leave_the_rest_of_their_row_empty():
    figure = draw_mistakes(["a", "b", "c", "d", "e"], None, None)
    assert [len(ax.images) for ax in figure.axes] == [1] * 5 + [0] * 3
    for ax in figure.axes:
        assert not ax.get_frame_on() and len(ax.get_xticks()) == len(ax.get_yticks()) == 0


def test_what_is_no_mistake_is_refused_as_one():
    images = colour_tiles("red", "lime")
    with pytest.raises(ValueError, match="image 1 is no mistake: 'b'"):
        plot_mistakes(images, ["a", "b"], ["b", "b"], [0.5, 0.6])
    with pytest.raises(ValueError, match="predicted_classes has 1 names for 2 images"):
        plot_mistakes(images, ["a", "b"], ["b"], [0.5, 0.6])
    with pytest.raises(ValueError, match=r"confidences has shape \(1,\); it must be \(2,\)"):
        plot_mistakes(images, ["a", "b"], ["b", "a"], [0.5])
    with pytest.raises(ValueError, match="confidences goes from 0.5 to 60.0"):
        plot_mistakes(images, ["a", "b"], ["b", "a"], [0.5, 60])
    with pytest.raises(ValueError, match=r"\(0, 8, 8, 3\)"):
        plot_mistakes(images[:0], [], [], [])


def test_a_heatmap_is_laid_over_the_grey_image_beside_the_image():
    images = colour_tiles("red", "blue")
    heatmaps = np.zeros((2, 8, 8), np.float32)
    heatmaps[1, :, 4:] = 1
    figure = plot_gradcams(images, heatmaps, ["a", "b"], ["a", "b"])
    colours = (np.array(matplotlib.colormaps["viridis"]([0.0, 1.0])) * 255)[:, :3]
    for index in range(2):
        canvas = figure.axes[index].images[0].get_array()
        assert canvas.shape == (8, 17, 3)  # twice 8 pixels and a gap of 1
        np.testing.assert_array_equal(canvas[:, :8], images[index])
        assert (canvas[:, 8] == 255).all()
        expected = 0.5 * 85 + 0.5 * colours[heatmaps[index].astype(int)]  # pure colours are 255 / 3
        np.testing.assert_allclose(canvas[:, 9:], expected, atol=0.51)
    scale = figure.axes[-1]
    assert scale.get_xlabel() == "Grad-CAM"
    assert scale.get_xlim() == (0, 1)


def test_an_overlay_leaves_the_image_where_the_heatmap_is_0_and_is_its_colour_where_it_is_high():
    image = colour_tiles("red")[0]
    heatmap = np.zeros((8, 8), np.float32)
    heatmap[:, 4:], heatmap[:, 6:] = 0.5, 1
    overlay = overlay_heatmap(image, heatmap)
    assert overlay.dtype == np.uint8
    np.testing.assert_array_equal(overlay[:, :4], image[:, :4])
    colours = 255 * np.array(matplotlib.colormaps["viridis"]([0.5, 1.0]))[:, :3]
    np.testing.assert_allclose(overlay[0, 4], 0.7 * image[0, 4] + 0.3 * colours[0], atol=0.51)
    np.testing.assert_allclose(overlay[0, 7], 0.4 * image[0, 7] + 0.6 * colours[1], atol=0.51)
    np.testing.assert_array_equal(overlay_heatmap(image / 255, heatmap), overlay)
    with pytest.raises(ValueError, match=r"heatmap has shape \(7, 8\); it must be \(8, 8\)"):
        overlay_heatmap(image, heatmap[:7])
    with pytest.raises(ValueError, match="heatmap goes from 0.0 to 2.0"):
        overlay_heatmap(image, 2 * heatmap)
    with pytest.raises(ValueError, match=r"image has shape \(3, 8, 8\)"):
        overlay_heatmap(image.transpose(2, 0, 1), heatmap)


def test_the_predicted_class_is_named_below_a_heatmap_only_where_it_is_wrong():
    images, heatmaps = colour_tiles("red", "blue"), np.zeros((2, 8, 8))
    figure = plot_gradcams(images / 255, heatmaps, ["a", "b"], ["a", "c"])
    assert captions(figure) == ["true: a", "true: b\npredicted: c"]


def test_eighteen_heatmaps_fit_on_a_page():
    names = [f"class number {index}" for index in range(18)]
    figure = draw_gradcams(names, "a title", None)
    assert len(captions(figure)) == 18
    width, height = figure.get_size_inches()
    assert width < 7.5 and height < 10.7  # A4 with margins


def test_heatmaps_that_do_not_fit_are_refused():
    images, heatmaps = colour_tiles("red", "blue"), np.zeros((2, 8, 8))
    with pytest.raises(ValueError, match=r"heatmaps has shape \(2, 7, 7\); it must be \(2, 8, 8\)"):
        plot_gradcams(images, heatmaps[:, :7, :7], ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="heatmaps goes from 0.0 to 255.0"):
        plot_gradcams(images, heatmaps + np.array([0, 255])[:, None, None], ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="heatmaps goes from nan to nan"):
        plot_gradcams(images, heatmaps * np.nan, ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="true_classes has 1 names for 2 images"):
        plot_gradcams(images, heatmaps, ["a"], ["a", "b"])
    with pytest.raises(ValueError, match=r"images has shape \(8, 8, 3\)"):
        plot_gradcams(images[0], heatmaps, ["a", "b"], ["a", "b"])


def test_images_that_do_not_fit_are_refused():
    images = colour_tiles("red", "blue")
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\)"):
        plot_samples(images.transpose(0, 3, 1, 2), [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match=r"\(0, 8, 8, 3\)"):
        plot_samples(images[:0], [], ["a", "b"])
    with pytest.raises(ValueError, match=r"from 0.0 to 255.0"):
        plot_augmentations(images[0].astype(np.float32), images)
    with pytest.raises(ValueError, match="from nan to nan"):
        plot_augmentations(images[0] * np.nan, images)
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 3\).*\(8, 8, 3\)"):
        plot_augmentations(images[0], images[:, :4])


def test_labels_that_do_not_fit_are_refused():
    images = colour_tiles("red", "blue")
    with pytest.raises(ValueError, match="labels goes from 0 to 2; labels of 2 classes"):
        plot_samples(images, [0, 2], ["a", "b"])
    with pytest.raises(ValueError, match=r"labels has shape \(1,\); it must be \(2,\)"):
        plot_samples(images, [0], ["a", "b"])
    with pytest.raises(ValueError, match="whole numbers"):
        plot_samples(images, [0.5, 1.0], ["a", "b"])


# --- model comparison -------------------------------------------------------------------------


def test_the_metrics_are_bars_with_their_values_and_a_missing_one_is_named_as_such():
    figure = plot_model_comparison(COMPARISON)
    lengths = [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]
    assert lengths == [[0.41, 0.72], [0.42, 0.73], [0.43, 0.74], [0.44, 0]]
    assert texts(figure) == ["0.410", "0.720", "0.420", "0.730", "0.430", "0.740", "0.440", "n/a"]
    assert row_names(figure) == ["simple_cnn", "resnet_head"]


def test_training_time_and_parameters_are_shown_in_readable_units():
    _, times, sizes = plot_model_comparison(COMPARISON).axes
    assert times.get_xlabel() == "Training time (hours)"
    np.testing.assert_allclose(times.lines[0].get_xdata(), [1 / 60, 2])
    assert times.get_xscale() == "log"  # the spread is 120
    assert [text.get_text() for text in times.texts] == ["0.0167", "2"]
    assert sizes.get_xlabel() == "Parameters (millions)"
    assert sizes.get_xscale() == "linear"
    assert [text.get_text() for text in sizes.texts] == ["3.37", "n/a"]


def test_a_comparison_without_any_time_or_size_is_drawn():
    table = COMPARISON.assign(training_time=np.nan, parameters=[None, None])
    figure = plot_model_comparison(table)
    assert [text.get_text() for ax in figure.axes[1:] for text in ax.texts] == ["n/a"] * 4


def test_a_metric_with_low_and_high_has_its_interval_and_its_value_clear_of_it():
    table = COMPARISON.assign(
        precision_low=[0.35, 0.7], precision_high=[0.5, 0.74],
        recall_low=[0.4, np.nan], recall_high=[0.44, np.nan],
        balanced_accuracy_low=[0.4, 0.4], balanced_accuracy_high=[0.5, 0.5],
        f1_low=[0.1, 0.1],  # without a high there is no interval
    )  # fmt: skip
    figure = plot_model_comparison(table)
    ax = figure.axes[0]
    drawn = [intervals_in(ax, index) for index in range(4)]
    assert drawn == [[(0.35, 0.5), (0.7, 0.74)], [(0.4, 0.44)], [], [(0.4, 0.5)]]
    assert ax.get_xlabel() == "Score, with its 95 % interval"
    ends = [text.xy[0] for text in ax.texts]
    assert ends == [0.5, 0.74, 0.44, 0.73, 0.43, 0.74, 0.5, 0]
    lengths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    assert lengths == [[0.41, 0.72], [0.42, 0.73], [0.43, 0.74], [0.44, 0]]


def test_a_comparison_without_intervals_does_not_speak_of_them():
    ax = plot_model_comparison(COMPARISON).axes[0]
    assert ax.get_xlabel() == "Score"
    assert [intervals_in(ax, index) for index in range(4)] == [[]] * 4


def test_a_comparison_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="lacks f1, parameters"):
        plot_model_comparison(COMPARISON.drop(columns=["f1", "parameters"]))
    with pytest.raises(ValueError, match="no rows"):
        plot_model_comparison(COMPARISON[:0])


# --- inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "inputs"),
    [
        (plot_roc_pr_curves, [*predictions(3), ["a", "b", "c"]]),
        (plot_reliability, [BEFORE, AFTER]),
        (plot_class_metrics, [PER_CLASS, INTERVALS]),
        (
            plot_mistakes,
            [colour_tiles("red", "blue").copy(), ["a", "b"], ["b", "a"], np.array([0.1, 0.2])],
        ),
        (
            plot_gradcams,
            [colour_tiles("red", "blue") / 255, np.eye(8)[None][[0, 0]], ["a", "b"], ["b", "b"]],
        ),
        (plot_model_comparison, [COMPARISON.assign(f1_low=0.1, f1_high=0.9)]),
    ],
)
def test_what_is_drawn_stays_as_it_is(draw, inputs):
    before = copy.deepcopy(inputs)
    draw(*inputs)
    for value, old in zip(inputs, before, strict=True):
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(value, old)
        else:
            np.testing.assert_equal(value, old)
