"""Metrics: scikit-learn's own numbers, also where a class has no images or no predictions."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from evaluation import compute_metrics

AVERAGED = ("precision", "recall", "f1")


@st.composite
def predictions(draw):
    """(y_true, y_prob, class_names); ties and classes without images or predictions are common."""
    num_classes = draw(st.integers(2, 6))
    count = draw(st.integers(1, 30))
    y_true = draw(arrays(np.int64, count, elements=st.integers(0, num_classes - 1)))
    shares = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
    y_prob = draw(arrays(np.float64, (count, num_classes), elements=shares))
    return y_true, y_prob, [f"class {label}" for label in range(num_classes)]


def one_hot(y_pred, num_classes):
    return np.eye(num_classes)[y_pred]


@settings(deadline=None, max_examples=50)
@given(predictions())
def test_every_figure_is_scikit_learns(case):
    y_true, y_prob, names = case
    y_pred = y_prob.argmax(axis=1)
    present = np.unique(y_true)
    labels = range(len(names))
    metrics = compute_metrics(*case)

    assert metrics["accuracy"] == pytest.approx(accuracy_score(y_true, y_pred))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of predicted classes without images
        expected = balanced_accuracy_score(y_true, y_pred)
    assert metrics["balanced_accuracy"] == pytest.approx(expected)

    for average, prefix in (("weighted", ""), ("macro", "macro_")):
        expected = precision_recall_fscore_support(
            y_true, y_pred, labels=present, average=average, zero_division=0
        )
        figures = [metrics[prefix + name] for name in AVERAGED]
        assert figures == pytest.approx(expected[:3])

    per_class = precision_recall_fscore_support(y_true, y_pred, labels=labels, zero_division=0)
    assert list(metrics["per_class"]) == names
    for label in present:
        row = metrics["per_class"][names[label]]
        assert [*row] == [*AVERAGED, "support"]
        assert [*row.values()] == pytest.approx([column[label] for column in per_class])

    expected = confusion_matrix(y_true, y_pred, labels=labels)
    assert metrics["confusion_matrix"] == expected.tolist()


@settings(deadline=None, max_examples=50)
@given(predictions())
def test_every_figure_lies_between_0_and_1_and_is_plain_json_without_a_warning(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = compute_metrics(*case)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    means = [value for value in metrics.values() if isinstance(value, float)]
    rows = [row[name] for row in metrics["per_class"].values() for name in AVERAGED]
    assert len(means) == 8
    assert all(0 <= value <= 1 for value in means + [value for value in rows if value is not None])


@settings(deadline=None, max_examples=50)
@given(predictions())
def test_the_confusion_matrix_counts_every_image_once_in_the_row_of_its_true_class(case):
    metrics = compute_metrics(*case)
    supports = [row["support"] for row in metrics["per_class"].values()]
    assert [sum(row) for row in metrics["confusion_matrix"]] == supports
    assert supports == np.bincount(case[0], minlength=len(case[2])).tolist()


@settings(deadline=None, max_examples=50)
@given(predictions(), st.randoms(use_true_random=False))
def test_the_order_of_the_images_makes_no_difference(case, random):
    y_true, y_prob, names = case
    order = list(range(len(y_true)))
    random.shuffle(order)
    assert compute_metrics(y_true[order], y_prob[order], names) == compute_metrics(*case)


def test_the_figures_of_a_small_case_counted_by_hand():
    y_true = [0, 0, 0, 1]
    y_pred = [0, 0, 1, 1]
    metrics = compute_metrics(y_true, one_hot(y_pred, 2), ["melanoma", "nevus"])
    assert metrics["accuracy"] == 0.75
    assert metrics["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["precision"] == pytest.approx((3 * 1 + 1 * 1 / 2) / 4)
    assert metrics["recall"] == pytest.approx((3 * 2 / 3 + 1 * 1) / 4)
    assert metrics["f1"] == pytest.approx((3 * 0.8 + 1 * 2 / 3) / 4)
    assert metrics["macro_precision"] == pytest.approx(0.75)
    assert metrics["macro_recall"] == pytest.approx(5 / 6)
    assert metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert metrics["confusion_matrix"] == [[2, 1], [0, 1]]


def test_a_class_without_images_has_no_figures_and_is_left_out_of_the_means():
    y_true = [0, 0, 1, 1]
    y_pred = [0, 2, 1, 1]  # class 2 has no image but is predicted, class 3 neither
    metrics = compute_metrics(y_true, one_hot(y_pred, 4), ["a", "b", "c", "d"])
    nothing = {"precision": None, "recall": None, "f1": None, "support": 0}
    assert metrics["per_class"]["c"] == nothing
    assert metrics["per_class"]["d"] == nothing
    assert metrics["balanced_accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert metrics["macro_precision"] == pytest.approx((1 + 1) / 2)
    assert metrics["macro_recall"] == pytest.approx((0.5 + 1) / 2)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_a_class_that_is_never_predicted_has_precision_0_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = compute_metrics([0, 1], one_hot([0, 0], 2), ["a", "b"])
    assert metrics["per_class"]["b"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert metrics["macro_precision"] == 0.25


def test_many_classes_and_few_images_give_no_warning():
    labels = np.arange(22) % 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = compute_metrics(labels, one_hot(labels, 20), [str(label) for label in range(20)])
    assert metrics["accuracy"] == 1


def test_arrays_are_left_as_they_were():
    y_true, y_prob = np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    before = y_true.copy(), y_prob.copy()
    compute_metrics(y_true, y_prob, ["a", "b"])
    assert np.array_equal(y_true, before[0])
    assert np.array_equal(y_prob, before[1])


@pytest.mark.parametrize(
    ("y_true", "y_prob"),
    [
        ([], np.empty((0, 2))),
        (0, [[0.5, 0.5]]),
        ([[0], [1]], [[1, 0], [0, 1]]),
        ([0, 1], [[1, 0]]),
        ([0, 1], [1, 0]),
        ([0, 1], [[1, 0, 0], [0, 1, 0]]),
        ([0, 1], [[1], [1]]),
    ],
    ids=["none", "scalar", "2-D labels", "too few", "1-D", "a class too many", "a class too few"],
)
def test_shapes_that_do_not_fit_are_refused(y_true, y_prob):
    with pytest.raises(ValueError, match="shape"):
        compute_metrics(np.array(y_true), np.array(y_prob), ["a", "b"])


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize("label", [-1, 2, 0.5, np.nan])
def test_labels_that_are_no_class_are_refused(label):
    with pytest.raises(ValueError):
        compute_metrics(np.array([0, label]), np.eye(2), ["a", "b"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_probabilities_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="finite"):
        compute_metrics(np.array([0, 1]), np.array([[0.5, value], [0, 1]]), ["a", "b"])
