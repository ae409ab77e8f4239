"""Metrics: scikit-learn's own numbers, also where a class has no images or no predictions."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    confusion_matrix,
    log_loss,
    matthews_corrcoef,
    precision_recall_fscore_support,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from evaluation import (
    HEADLINES,
    best_evaluation,
    compute_metrics,
    format_percent,
    most_confident_mistakes,
    typical_examples,
)
from tests.evaluation.cases import one_hot, predictions

AVERAGED = ("precision", "recall", "f1")


PER_CLASS = ("precision", "recall", "specificity", "f1", "roc_auc", "average_precision")


UNBOUNDED = {"log_loss": np.inf, "brier_score": 2.0}


@settings(deadline=None, max_examples=50)
@given(predictions())
def test_every_metric_is_scikit_learns(case):
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
        values = [metrics[prefix + name] for name in AVERAGED]
        assert values == pytest.approx(expected[:3])

    per_class = precision_recall_fscore_support(y_true, y_pred, labels=labels, zero_division=0)
    assert list(metrics["per_class"]) == names
    for label in present:
        row = metrics["per_class"][names[label]]
        assert [*row] == [*PER_CLASS, "support"]
        values = [row[name] for name in (*AVERAGED, "support")]
        assert values == pytest.approx([column[label] for column in per_class])
        if len(present) > 1:
            is_class, scores = y_true == label, y_prob[:, label]
            specificity = recall_score(~is_class, y_pred != label, zero_division=0)
            assert row["specificity"] == pytest.approx(specificity)
            assert row["roc_auc"] == pytest.approx(roc_auc_score(is_class, scores))
            area = average_precision_score(is_class, scores)
            assert row["average_precision"] == pytest.approx(area)
        else:
            assert row["specificity"] is row["roc_auc"] is row["average_precision"] is None

    expected = confusion_matrix(y_true, y_pred, labels=labels)
    assert metrics["confusion_matrix"] == expected.tolist()


@settings(deadline=None, max_examples=50)
@given(predictions())
def test_metrics_of_probabilities_are_scikit_learns(case):
    y_true, y_prob, names = case
    y_prob = y_prob + 0.01
    y_prob /= y_prob.sum(axis=1, keepdims=True)
    metrics = compute_metrics(y_true, y_prob, names)
    labels = range(len(names))
    assert metrics["log_loss"] == pytest.approx(log_loss(y_true, y_prob, labels=labels))
    one_by_one = [brier_score_loss(y_true == label, y_prob[:, label]) for label in labels]
    assert metrics["brier_score"] == pytest.approx(sum(one_by_one))
    y_pred = y_prob.argmax(axis=1)
    if len(set(y_true) | set(y_pred)) > 1:
        kappa, matthews = cohen_kappa_score(y_true, y_pred), matthews_corrcoef(y_true, y_pred)
        assert metrics["cohen_kappa"] == pytest.approx(kappa)
        assert metrics["matthews_corrcoef"] == pytest.approx(matthews)
    distinct = y_prob + np.arange(len(names)) * 1e-9  # scikit-learn ranks ties another way
    top_2 = compute_metrics(y_true, distinct, names)["top_2_accuracy"]
    if len(names) > 2:
        assert top_2 == pytest.approx(top_k_accuracy_score(y_true, distinct, labels=labels))
    else:
        assert top_2 == 1


@settings(deadline=None, max_examples=50)
@given(predictions())
def test_every_metric_is_within_its_bounds_and_plain_json_without_a_warning(case):
    y_true, y_prob, names = case
    y_prob = y_prob / np.maximum(y_prob.sum(axis=1, keepdims=True), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = compute_metrics(y_true, y_prob, names)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    means = {name: value for name, value in metrics.items() if isinstance(value, float)}
    rows = [row[name] for row in metrics["per_class"].values() for name in PER_CLASS]
    assert set(HEADLINES) <= set(means)
    for name, value in means.items():
        lowest = -1 if name in ("cohen_kappa", "matthews_corrcoef") else 0
        assert lowest <= value <= UNBOUNDED.get(name, 1)
    assert all(0 <= value <= 1 for value in rows if value is not None)


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
    again, metrics = compute_metrics(y_true[order], y_prob[order], names), compute_metrics(*case)
    assert again.pop("per_class") == metrics.pop("per_class")
    assert again.pop("confusion_matrix") == metrics.pop("confusion_matrix")
    assert again == pytest.approx(metrics)  # sums of floats depend on their order


def test_the_metrics_of_a_small_case_counted_by_hand():
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


def test_a_class_without_images_has_no_metrics_and_is_left_out_of_the_means():
    y_true = [0, 0, 1, 1]
    y_pred = [0, 2, 1, 1]  # class 2 has no image but is predicted, class 3 neither
    metrics = compute_metrics(y_true, one_hot(y_pred, 4), ["a", "b", "c", "d"])
    nothing = dict.fromkeys(PER_CLASS) | {"support": 0}
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
    assert metrics["per_class"]["b"] == {
        "precision": 0.0, "recall": 0.0, "specificity": 1.0, "f1": 0.0, "roc_auc": 0.5,
        "average_precision": 0.5, "support": 1,
    }  # fmt: skip
    assert metrics["macro_precision"] == 0.25


def test_many_classes_and_few_images_give_no_warning():
    labels = np.arange(22) % 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = compute_metrics(labels, one_hot(labels, 20), [str(label) for label in range(20)])
    assert metrics["accuracy"] == 1


def test_mistakes_come_with_the_most_confident_first():
    y_prob = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    y_true, y_pred = np.array([1, 1, 1, 0]), y_prob.argmax(axis=1)
    assert most_confident_mistakes(y_true, y_prob, y_pred).tolist() == [0, 3, 1]
    assert most_confident_mistakes(y_true, y_prob, y_pred, count=1).tolist() == [0]
    assert most_confident_mistakes(y_pred, y_prob, y_pred).tolist() == []


def test_examples_are_one_right_and_one_wrong_of_each_class():
    confidence = np.array([0.9, 0.6, 0.7, 0.8, 0.95, 0.55])
    y_pred = np.array([0, 0, 0, 1, 0, 1])
    y_prob = np.where(np.eye(3)[y_pred] == 1, confidence[:, None], (1 - confidence[:, None]) / 2)
    examples = typical_examples(np.array([0, 0, 0, 0, 1, 1]), y_prob, y_pred)
    assert examples.tolist() == [2, 3, 5, 4]  # of class 2 there is none


def test_decisions_that_are_no_classes_are_refused():
    for y_pred in ([0], [0, 2], [0, -1]):
        with pytest.raises(ValueError, match="y_pred (has|goes)"):
            compute_metrics([0, 1], np.eye(2), ["a", "b"], y_pred)


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


@pytest.mark.parametrize(
    ("accuracies", "losses", "best"),
    [
        ([0.5, 0.7, 0.6], [1.0, 1.0, 0.1], 1),  # the accuracy decides
        ([0.7, 0.7, 0.6], [0.4, 0.3, 0.1], 1),  # then the loss
        ([0.7, 0.7, 0.7], [0.4, 0.3, 0.3], 1),  # then which was first
        ([None, math.nan, 0.1], [0.1, 0.1, 9.0], 2),
        ([0.7, 0.7], [None, 2.0], 1),
        ([None, math.nan], [0.1, 0.1], None),
        ([], [], None),
    ],
)
def test_the_best_evaluation_has_the_highest_accuracy_then_the_lowest_loss(
    accuracies, losses, best
):
    history = {"valid_balanced_accuracy": accuracies, "valid_loss": losses}
    assert best_evaluation(history) == best


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.9]), st.floats(0, 3)), min_size=1))
def test_an_evaluation_is_the_best_so_far_exactly_when_it_beats_all_before_it(evaluations):
    best = 0
    for number, (accuracy, loss) in enumerate(evaluations):
        if (accuracy, -loss) > (evaluations[best][0], -evaluations[best][1]):
            best = number
        so_far = evaluations[: number + 1]
        names = ("valid_balanced_accuracy", "valid_loss")
        assert best_evaluation(dict(zip(names, zip(*so_far, strict=True), strict=True))) == best


def test_only_nothing_is_0_percent_and_only_all_is_100_percent():
    shares = [0, 1e-9, 0.004, 0.006, 0.954, 0.994, 0.996, 1]
    assert [format_percent(share) for share in shares] == [
        "0 %", "<1 %", "<1 %", "1 %", "95 %", "99 %", ">99 %", "100 %",
    ]  # fmt: skip
