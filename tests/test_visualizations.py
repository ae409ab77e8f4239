"""Figures: what they show is what was given, legibly, and drawing them leaves no trace."""

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
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from visualizations import (
    plot_augmentations,
    plot_class_distribution,
    plot_confusion_matrix,
    plot_learning_curves,
    plot_model_comparison,
    plot_pairs,
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
    images = colour_tiles("red", "green", "blue")
    return plot_augmentations(images[0], images[1:] / 255, title=title, save_path=save_path)


def draw_model_comparison(names, title, save_path):
    columns = ["precision", "recall", "f1", "balanced_accuracy", "training_time", "parameters"]
    table = pd.DataFrame({"model": names, **dict.fromkeys(columns, 1.0)})
    return plot_model_comparison(table, title=title, save_path=save_path)


def draw_pairs(names, title, save_path):
    images = [colour_tiles("red", "blue")] * len(names)
    rows = [(("identical",), (f"{n}/1.jpg", f"{n}/2.jpg"), (n, n), 0.0) for n in names]
    table = pd.DataFrame(rows, columns=["kinds", "images", "classes", "distance"])
    return plot_pairs(table, images, title=title, save_path=save_path)


DRAWN_WITH_NAMES = [
    draw_confusion_matrix,
    draw_class_distribution,
    draw_samples,
    draw_model_comparison,
]
ALL_DRAWN = [draw_learning_curves, draw_augmentations, draw_pairs, *DRAWN_WITH_NAMES]


def row_names(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


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
    with pytest.raises(ValueError, match="no entry"):
        plot_learning_curves({name: [] for name in HISTORY})
    with pytest.raises(ValueError, match=r"different lengths.*'valid_loss': 3"):
        plot_learning_curves(HISTORY | {"valid_loss": [1, 2, 3]})
    with pytest.raises(ValueError, match="lacks train_loss"):
        plot_learning_curves({k: v for k, v in HISTORY.items() if k != "train_loss"})


# --- confusion matrix -------------------------------------------------------------------------


def test_each_cell_shows_its_count_and_its_share_of_the_true_class():
    figure = plot_confusion_matrix(CONFUSION, ["a", "b", "c"])
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert cells.pop((1, 1)) == "no images"
    assert cells == {  # keys are (predicted, true)
        (0, 0): "3\n75%",
        (1, 0): "1\n25%",
        (2, 0): "0\n0%",
        (0, 2): "1\n<1%",
        (1, 2): "1\n<1%",
        (2, 2): "998\n>99%",
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
        ([[1, 2], [3, 4]], ["a", "b", "c"], "2 classes, class_names has 3"),
        ([[0.5, 0.5], [0, 1]], ["a", "b"], "counts"),
        ([[1, -1], [0, 1]], ["a", "b"], "counts"),
        ([[1, np.nan], [0, 1]], ["a", "b"], "counts"),
    ],
)
def test_a_confusion_matrix_that_does_not_fit_is_refused(confusion, names, message):
    with pytest.raises(ValueError, match=message):
        plot_confusion_matrix(confusion, names)


# --- class distribution -----------------------------------------------------------------------


def test_the_bars_are_as_long_as_the_counts():
    figure = plot_class_distribution(METADATA)
    assert row_names(figure) == ["melanoma", "nevus"]  # the larger first
    lengths = [[bar.get_width() for bar in bars] for bars in figure.axes[0].containers]
    assert lengths == [[6, 2], [2, 1], [0, 1], [0, 1]]
    assert texts(figure) == ["6", "2", "2", "1", "0", "1", "0", "1"]


def test_splits_come_as_train_valid_test_and_then_the_others():
    legend = plot_class_distribution(METADATA).legends[0]
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["train (8)", "valid (3)", "test (1)", "extra (1)"]


def test_a_table_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="lacks the columns split"):
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
    with pytest.raises(ValueError, match=r"\(4, 8, 3\).*\(8, 8, 3\)"):
        plot_augmentations(images[0], images[:, :4])


def test_labels_that_do_not_fit_are_refused():
    images = colour_tiles("red", "blue")
    with pytest.raises(ValueError, match="from 0 to 2; those of 2 classes go from 0 to 1"):
        plot_samples(images, [0, 2], ["a", "b"])
    with pytest.raises(ValueError, match=r"\(1,\); for 2 images"):
        plot_samples(images, [0], ["a", "b"])
    with pytest.raises(ValueError, match="whole numbers"):
        plot_samples(images, [0.0, 1.0], ["a", "b"])


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


def test_a_comparison_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="lacks the columns f1, parameters"):
        plot_model_comparison(COMPARISON.drop(columns=["f1", "parameters"]))
    with pytest.raises(ValueError, match="no rows"):
        plot_model_comparison(COMPARISON[:0])
