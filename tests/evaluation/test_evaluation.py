"""Metrics: scikit-learn's own numbers, also where a class has no images or no predictions."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import softmax
from scipy.stats import binomtest, norm
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

from benchmarks.coverage import CASES, measure
from evaluation import (
    HEADLINES,
    MALIGNANT,
    Calibration,
    choose_thresholds,
    compare,
    compute_intervals,
    compute_metrics,
    compute_subgroups,
    counted_as,
    effective_sample_size,
    evaluate_predictions,
    fit_calibration,
    intervals,
    left_out_of_screening,
    match_classes,
    most_confident_mistakes,
    reliability,
    screen,
    screening_targets,
    screening_warnings,
    typical_examples,
    wilson_interval,
)

AVERAGED = ("precision", "recall", "f1")
PER_CLASS = ("precision", "recall", "specificity", "f1", "roc_auc", "average_precision")
UNBOUNDED = {"log_loss": np.inf, "brier_score": 2.0}


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
        assert [*row] == [*PER_CLASS, "support"]
        figures = [row[name] for name in (*AVERAGED, "support")]
        assert figures == pytest.approx([column[label] for column in per_class])
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
def test_figures_of_probabilities_are_scikit_learns(case):
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
def test_every_figure_is_within_its_bounds_and_plain_json_without_a_warning(case):
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


# --- intervals --------------------------------------------------------------------------------


def simulated(num_images, accuracy, seed, num_classes=3):
    """Labels and probabilities of a model that is right with the given probability."""
    rng = np.random.default_rng(seed)
    y_true = rng.integers(num_classes, size=num_images)
    is_right = rng.random(num_images) < accuracy
    wrong = (y_true + rng.integers(1, num_classes, num_images)) % num_classes
    return y_true, one_hot(np.where(is_right, y_true, wrong), num_classes)


def test_an_interval_lies_about_its_figure_and_narrows_with_more_images():
    widths = []
    for num_images in (50, 800):
        y_true, y_prob = simulated(num_images, 0.7, seed=0)
        names = ["a", "b", "c"]
        metrics = compute_metrics(y_true, y_prob, names)
        intervals = compute_intervals(y_true, y_prob, names)
        assert set(intervals) == {*HEADLINES, "per_class"}
        for name in HEADLINES:
            low, high = intervals[name]
            assert 0 <= low <= metrics[name] <= high <= 1
        for name in names:
            for figure in ("precision", "recall"):
                low, high = intervals["per_class"][name][figure]
                assert low < metrics["per_class"][name][figure] < high
        low, high = intervals["accuracy"]
        widths.append(high - low)
        error = np.sqrt(metrics["accuracy"] * (1 - metrics["accuracy"]) / num_images)
        assert high - low == pytest.approx(2 * norm.ppf(0.975) * error, rel=0.15)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.25)


def test_the_bias_of_small_test_sets_is_taken_out_of_the_interval():
    """Weighted precision looks better than it is on few images, and better still in resamples."""
    names = [str(label) for label in range(9)]
    offsets = []
    for seed in range(20):
        y_true, y_prob = simulated(150, 0.6, seed, num_classes=9)
        low, high = compute_intervals(y_true, y_prob, names)["precision"]
        offsets.append((low + high) / 2 - compute_metrics(y_true, y_prob, names)["precision"])
    assert np.mean(offsets) < 0


def test_images_that_belong_together_are_drawn_together():
    y_true, y_prob = simulated(100, 0.7, seed=1)
    names = ["a", "b", "c"]
    low, high = compute_intervals(y_true, y_prob, names)["accuracy"]
    copies = np.repeat(np.arange(100), 4)
    doubled = compute_intervals(y_true[copies], y_prob[copies], names, groups=copies)
    assert doubled["accuracy"] == pytest.approx([low, high], abs=0.02)
    pretended = compute_intervals(y_true[copies], y_prob[copies], names)["accuracy"]
    assert pretended[1] - pretended[0] < 0.6 * (high - low)


def test_the_same_seed_gives_the_same_intervals():
    case = (*simulated(60, 0.6, seed=2), ["a", "b", "c"])
    assert compute_intervals(*case) == compute_intervals(*case)
    assert compute_intervals(*case) != compute_intervals(*case, seed=1)


def test_classes_without_images_or_predictions_have_no_interval():
    intervals = compute_intervals([0, 0, 1], one_hot([0, 1, 1], 3), ["a", "b", "c"])
    assert intervals["per_class"]["c"] == {"precision": None, "recall": None}
    assert json.loads(json.dumps(intervals, allow_nan=False)) == intervals


@given(st.integers(0, 300), st.integers(1, 300))
def test_wilson_intervals_are_those_of_scipy(successes, total):
    successes = min(successes, total)
    expected = binomtest(successes, total).proportion_ci(method="wilson")
    low, high = wilson_interval(successes, total)
    assert [low, high] == pytest.approx(list(expected), abs=1e-6)
    assert low <= successes / total <= high  # not an ulp beside it either
    assert wilson_interval(0, 0) is None


def test_the_same_model_is_no_better_than_itself_and_a_better_one_is():
    y_true, better = simulated(300, 0.9, seed=3)
    worse = better.copy()
    changed = np.flatnonzero(better.argmax(axis=1) == y_true)[:40]
    worse[changed] = one_hot((y_true[changed] + 1) % 3, 3)
    better, worse = better.argmax(axis=1), worse.argmax(axis=1)
    same = compare(y_true, better, better)
    assert set(same) == set(HEADLINES)
    for name in HEADLINES:
        assert same[name]["difference"] == 0 and same[name]["probability"] == 0.5
        low, high = same[name]["interval"]
        assert -0.02 < low < 0 < high < 0.02
    compared = compare(y_true, better, worse)
    assert compared["accuracy"]["difference"] == pytest.approx(40 / 300)
    assert compared["accuracy"]["interval"][0] > 0
    assert compared["accuracy"]["probability"] > 0.99
    reverse = compare(y_true, worse, better)
    assert reverse["accuracy"]["difference"] == pytest.approx(-40 / 300)


# Where all images are right or all are wrong the resamples are too. By each: y_true, y_pred.
BORDERS = {
    "all right": ([0, 1, 2, 1] * 5, [0, 1, 2, 1] * 5),
    "all right, one class": ([1] * 20, [1] * 20),
    "none right": ([0, 1, 2, 1] * 5, [1, 2, 0, 2] * 5),
    "always the same class": ([0, 1, 2, 1] * 5, [1] * 20),
    "one image": ([0], [0]),
}


@pytest.mark.parametrize("case", BORDERS)
def test_no_interval_collapses_where_all_resamples_are_alike(case):
    y_true, y_pred = map(np.array, BORDERS[case])
    names = ["a", "b", "c"]
    intervals = compute_intervals(y_true, one_hot(y_pred, 3), names)
    metrics = compute_metrics(y_true, one_hot(y_pred, 3), names)
    for name in HEADLINES:
        low, high = intervals[name]
        assert 0 <= low <= metrics[name] <= high <= 1
        assert high - low > 0.05, name


def test_20_right_of_20_give_about_wilsons_interval():
    y_true = np.arange(20) % 2
    intervals = compute_intervals(y_true, one_hot(y_true, 2), ["a", "b"])
    for name in HEADLINES:
        low, high = intervals[name]
        assert high == 1
        assert low == pytest.approx(wilson_interval(20, 20)[0], abs=0.06)


@settings(deadline=None, max_examples=25)
@given(predictions(), st.data())
def test_every_interval_holds_its_figure_and_has_a_width(case, data):
    y_true, _, names = case
    groups = data.draw(arrays(np.int64, len(y_true), elements=st.integers(0, 9)))
    metrics = compute_metrics(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "NUM_RESAMPLES", 200)
        found = compute_intervals(*case, groups)
    for name in HEADLINES:
        low, high = found[name]
        assert 0 <= low <= metrics[name] <= high <= 1 and low < high
    for name in names:
        for figure in ("precision", "recall"):
            interval = found["per_class"][name][figure]
            value = metrics["per_class"][name][figure]
            assert value is None or interval is None or interval[0] <= value <= interval[1]
            assert interval is None or interval[0] < interval[1]


@pytest.mark.parametrize(
    ("what", "case", "lowest"),
    [
        ("border", "20 pictures of 2 classes, recall 0.97", 0.93),
        ("border", "50 pictures of 5 classes, recall 0.9", 0.91),
        ("areas", "AUC 0.99, 10 positives and 30 negatives", 0.93),
        ("differences", "0.97 and 0.97 on 20 images", 0.93),
    ],
)
def test_intervals_near_the_border_hold_the_true_value(what, case, lowest, monkeypatch):
    """In 200 simulated sets; RESULTS.md has the shares of more sets and more cases."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 400)
    for name, (share, _) in measure(CASES[what][case], 200).items():
        assert share >= lowest, name


@pytest.mark.parametrize("labels", [np.arange(20) % 2, np.zeros(20, int)])
def test_two_models_without_mistakes_may_differ_on_other_images(labels):
    for found in compare(labels, labels, labels).values():
        low, high = found["interval"]
        assert -0.25 < low < -0.05 and 0.05 < high < 0.25


def copied(groups, *values):
    """Each value three times over, and the group of each copy."""
    return (np.repeat(groups, 3), *(np.repeat(value, 3, axis=0) for value in values))


def test_copies_and_images_of_one_lesion_narrow_no_interval_of_a_class():
    y_true, y_prob = simulated(60, 0.8, seed=4)
    names = ["a", "b", "c"]
    once = compute_intervals(y_true, y_prob, names)["per_class"]
    groups, y_true, y_prob = copied(np.arange(60), y_true, y_prob)
    thrice = compute_intervals(y_true, y_prob, names, groups)["per_class"]
    for name in names:
        for figure in ("precision", "recall"):
            assert thrice[name][figure] == pytest.approx(once[name][figure])


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_images_are_worth_at_most_as_many_observations_as_they_have_groups(groups):
    size = effective_sample_size(groups)
    assert 1 - 1e-9 <= size <= len(set(groups)) + 1e-9
    assert effective_sample_size(groups * 2) == pytest.approx(size)
    assert effective_sample_size(range(len(groups))) == pytest.approx(len(groups))


def test_unequal_groups_are_worth_less_than_their_number():
    assert effective_sample_size(["a", "b", "c"]) == pytest.approx(3)
    assert effective_sample_size(["a", "a", "b", "b"]) == pytest.approx(2)
    assert effective_sample_size(["a", "a", "a", "b"]) == pytest.approx(16 / 10)
    assert effective_sample_size(["a", "b"], np.array([3, 1])) == pytest.approx(16 / 10)


def test_groups_of_another_number_are_refused():
    with pytest.raises(ValueError, match="groups"):
        compute_intervals([0, 1], np.eye(2), ["a", "b"], groups=[0])


# --- calibration ------------------------------------------------------------------------------


def drawn_from(logits, seed=0):
    """Labels drawn from the softmax of the logits."""
    noise = np.random.default_rng(seed).gumbel(size=logits.shape)
    return (logits + noise).argmax(axis=1)


def test_the_temperature_and_bias_that_spoilt_the_probabilities_are_found():
    true_logits = np.random.default_rng(1).normal(0, 1.5, (20_000, 3))
    y_true = drawn_from(true_logits)
    shift = np.array([1.0, 0.0, -1.0])
    calibration = fit_calibration(y_true, softmax(2.5 * true_logits + shift, axis=1))
    assert calibration.temperature == pytest.approx(2.5, rel=0.05)
    assert calibration.bias == pytest.approx(-shift / 2.5, abs=0.05)
    calibrated = calibration.apply(softmax(2.5 * true_logits + shift, axis=1))
    assert calibrated == pytest.approx(softmax(true_logits, axis=1), abs=0.03)
    before = reliability(y_true, softmax(2.5 * true_logits + shift, axis=1))
    after = reliability(y_true, calibrated)
    assert before["expected_calibration_error"] > 0.1
    assert after["expected_calibration_error"] < 0.02


@settings(deadline=None, max_examples=50)
@given(predictions())
def test_calibration_is_finite_and_makes_its_images_no_less_likely(case):
    y_true, y_prob, names = case
    y_prob = (y_prob + 0.01) / (y_prob + 0.01).sum(axis=1, keepdims=True)
    calibration = fit_calibration(y_true, y_prob)
    calibrated = calibration.apply(y_prob)
    assert np.isfinite(calibrated).all() and calibrated.sum(axis=1) == pytest.approx(1)
    assert 0.04 < calibration.temperature < 21
    assert sum(calibration.bias) == pytest.approx(0, abs=1e-6)
    labels = range(len(names))
    before, after = (log_loss(y_true, p, labels=labels) for p in (y_prob, calibrated))
    assert after <= before + 1e-6


def test_a_calibration_without_bias_changes_no_prediction():
    y_prob = np.random.default_rng(0).dirichlet(np.ones(5), 200)
    calibrated = Calibration(3.0, (0.0,) * 5).apply(y_prob)
    assert (calibrated.argmax(axis=1) == y_prob.argmax(axis=1)).all()
    assert (calibrated.max(axis=1) < y_prob.max(axis=1)).all()


def test_reliability_of_a_small_case_counted_by_hand():
    y_prob = [[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [1.0, 0.0]]
    found = reliability([0, 1, 0, 0], y_prob)
    assert found["count"] == [0] * 8 + [1] + [0] * 4 + [2, 1]
    assert found["confidence"][8] == pytest.approx(0.6) and found["accuracy"][8] == 1
    assert found["confidence"][13] == pytest.approx(0.9) and found["accuracy"][13] == 0.5
    assert found["accuracy"][0] is None
    assert found["expected_calibration_error"] == pytest.approx((0.4 + 2 * 0.4 + 0) / 4)
    assert found["maximum_calibration_error"] == pytest.approx(0.4)


def test_reliability_is_that_of_the_class_decided_for():
    y_prob = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    found = reliability([0, 0, 1], y_prob, y_pred=[0, 0, 1])
    assert found["count"][2] == 1 and found["confidence"][2] == pytest.approx(0.2)
    assert found["accuracy"][2] == 1  # right, though the other class is more probable
    assert found["expected_calibration_error"] == pytest.approx((0.1 + 0.8 + 0.3) / 3)


@settings(deadline=None, max_examples=50)
@given(predictions(), st.data())
def test_with_any_calibration_the_figures_of_decisions_agree_with_each_other(case, data):
    y_true, y_prob, names = case
    y_prob = (y_prob + 0.01) / (y_prob + 0.01).sum(axis=1, keepdims=True)
    bias = [data.draw(st.floats(-5, 5)) for _ in names]
    calibration = Calibration(data.draw(st.floats(0.1, 10)), tuple(bias))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "NUM_RESAMPLES", 20)
        found = evaluate_predictions(y_true, y_prob, names, calibration, {})
    y_pred = y_prob.argmax(axis=1)
    confidence = calibration.apply(y_prob)[np.arange(len(y_pred)), y_pred]
    test = found["test"]
    assert test["accuracy"] == pytest.approx((y_pred == y_true).mean())
    assert np.trace(test["confusion_matrix"]) == (y_pred == y_true).sum()
    assert test["accuracy"] <= test["top_2_accuracy"] <= 1
    for side in ("before", "after"):
        bins = pd.DataFrame({n: found["calibration"][side][n] for n in ("accuracy", "count")})
        assert bins["count"].sum() == len(y_true)
        share_right = (bins["accuracy"].fillna(0) * bins["count"]).sum() / len(y_true)
        assert share_right == pytest.approx(test["accuracy"])
    bins = found["calibration"]["after"]
    mean = sum((c or 0) * n for c, n in zip(bins["confidence"], bins["count"], strict=True))
    assert mean / len(y_true) == pytest.approx(confidence.mean())


# --- screening --------------------------------------------------------------------------------


def test_classes_are_matched_whatever_the_case_hyphens_and_plurals():
    names = ["Basal_Cell-Carcinomas", "nevus", "MELANOMA", "actinic keratosis", "naevi"]
    assert match_classes(names, MALIGNANT) == [0, 2, 3]
    with pytest.raises(ValueError, match="none of the classes cat, dog is called like melanoma"):
        match_classes(["cat", "dog"], MALIGNANT)


def test_an_exact_spelling_goes_before_a_similar_one_and_that_before_the_diagnosis():
    names = ["Melanoma", "melanoma", "melanoma (in situ)", "mel", "HPV+", "HPV-"]
    assert match_classes(names, ["melanoma"]) == [1]
    assert match_classes(names, ["MELANOMAS"]) == [0, 1]
    assert match_classes(names, ["malignant melanoma"]) == [0, 1, 2, 3]
    assert match_classes(names, ["hpv+"]) == [4]
    assert match_classes(["akiec", "bcc", "nv"], ["Nevus", "actinic keratosis"]) == [0, 2]
    assert match_classes(["melanoma in situ", "nevus"], ["melanoma"]) == [0]


def test_a_wanted_name_of_no_class_is_an_error_that_names_it_and_the_nearest_class():
    names = ["melanoma", "basal cell carcinoma", "nevus"]
    words = "is called like bsal cell carcinoma; the nearest: basal cell carcinoma$"
    for wanted in (["melanoma", "bsal cell carcinoma"], ["bsal cell carcinoma"]):
        for function in (match_classes, counted_as, screening_targets):
            with pytest.raises(ValueError, match=words):
                function(names, wanted)
    with pytest.raises(ValueError, match="called like melonama, nevu5; the nearest: mel.*, nevus$"):
        match_classes(names, ["nevus", "melonama", "nevu5"])
    with pytest.raises(ValueError, match="is called like ---"):
        match_classes(["...", "nevus"], ["---"])


@pytest.mark.parametrize(
    ("names", "malignant", "melanoma"),
    [
        ("akiec bcc bkl df mel nv vasc", "akiec bcc mel", "mel"),
        ("MEL NV BCC AK BKL DF VASC SCC", "MEL BCC AK SCC", "MEL"),
        ("ACK BCC MEL NEV SCC SEK", "ACK BCC MEL SCC", "MEL"),
        ("AKIEC BCC BEN_OTH BKL DF INF MAL_OTH MEL NV SCCKA VASC",
         "AKIEC BCC MAL_OTH MEL SCCKA", "MEL"),
        ("melanoma-in-situ basal-cell-carcinoma melanocytic-nevi",
         "melanoma-in-situ basal-cell-carcinoma", "melanoma-in-situ"),
        ("benign malignant", "malignant", ""),
        ("melanoma non-melanoma", None, "melanoma"),
    ],
)  # fmt: skip
def test_the_published_sets_are_screened_without_a_word_of_the_users(names, malignant, melanoma):
    names = names.split()
    expected = {"malignant": malignant, "melanoma": melanoma}
    assert screening_targets(names) == {
        target: [names.index(name) for name in of_target.split()]
        for target, of_target in expected.items()
        if of_target
    }


def test_classes_that_are_not_known_count_neither_as_malignant_nor_as_benign():
    names = ["mel", "UNK", "nv", "malignant", "cat"]
    assert counted_as(names) == {
        "malignant": ["mel", "malignant"], "benign": ["nv"], "unknown": ["UNK", "cat"],
    }  # fmt: skip
    assert screening_targets(names) == {"malignant": [0, 3], "melanoma": [0]}
    # What is malignant may be a melanoma.
    assert left_out_of_screening(names) == {"malignant": [1, 4], "melanoma": [1, 3, 4]}
    # The user has said it all.
    assert counted_as(names, ["mel", "cat"])["benign"] == ["UNK", "nv", "malignant"]
    assert left_out_of_screening(names, ["mel", "cat"]) == {"malignant": [], "melanoma": [4]}
    assert counted_as(names, ["mel"], ["cat"])["unknown"] == ["cat"]


@given(st.lists(st.sampled_from(["mel", "bcc", "nv", "UNK", "malignant", "a", "melanoma in situ"])))
def test_every_class_counts_as_one_thing_and_melanoma_never_as_benign(names):
    names = list(dict.fromkeys(names))
    counted = counted_as(names)
    assert sorted(name for kind in counted.values() for name in kind) == sorted(names)
    assert not {"mel", "bcc", "malignant", "melanoma in situ", "UNK", "a"} & set(counted["benign"])
    for target, labels in screening_targets(names).items():
        left_out = left_out_of_screening(names)[target]
        assert labels and not set(labels) & set(left_out)
        assert len(labels) + len(left_out) < len(names)


@settings(deadline=None, max_examples=2)
@given(st.integers(0, 2**32 - 1))
def test_images_of_unknown_classes_change_no_figure_of_screening(seed):
    rng = np.random.default_rng(seed)
    y_true = np.arange(90) % 4
    y_prob = softmax(rng.normal(size=(90, 4)) + np.eye(4)[y_true], axis=1)
    names, known = ["melanoma", "bcc", "nevus", "UNK"], y_true != 3
    columns = pd.DataFrame({"camera": rng.choice(["one", "other"], 90)})
    groups = rng.integers(60, size=90)
    thresholds = {target: {"sensitivity 95%": 0.4} for target in ("malignant", "melanoma")}
    calibration = Calibration(1.0, (0.0,) * 4)
    whole, part = (
        evaluate_predictions(
            y_true[kept], y_prob[kept], names, calibration, thresholds,
            groups=groups[kept], columns=columns[kept],
        )
        for kept in (np.full(90, True), known)
    )  # fmt: skip
    assert whole["screening"] == part["screening"]
    assert whole["screening"]["malignant"]["classes_left_out"] == ["UNK"]
    assert whole["screening"]["malignant"]["negatives"] == (y_true == 2).sum()
    within = [found["subgroups"]["camera"]["screening"] for found in (whole, part)]
    assert within[0] == within[1]
    assert whole["counted_as"]["unknown"] == ["UNK"]


def test_what_a_user_has_to_hear_about_screening_is_said_and_nothing_else():
    assert screening_warnings(counted_as(["melanoma", "bcc", "nevus"])) == []
    assert screening_warnings(counted_as(["melanoma", "cat"], ["melanoma"])) == []
    (off,) = screening_warnings(counted_as(["cat", "dog"]))
    assert off.startswith("screening is off: none of the classes cat, dog is known as malignant; ")
    assert off.endswith("with --malignant_classes")
    (off,) = screening_warnings(counted_as(["melanoma", "cat"]))
    assert off.startswith("screening is off: none of the classes melanoma, cat is known as benign")
    (unknown,) = screening_warnings(counted_as(["melanoma", "cat", "nevus"]))
    assert "left out of the screening figures: cat;" in unknown
    (doubtful,) = screening_warnings(counted_as(["mel", "akiec", "nv"], ["mel"]))
    assert doubtful.endswith("but known as malignant: akiec")


def test_a_perfect_score_has_area_1_and_perfect_points():
    is_positive = np.arange(40) % 4 == 0
    thresholds = choose_thresholds(is_positive, is_positive * 1.0)
    found = screen(is_positive, is_positive * 1.0, thresholds)
    assert found["roc_auc"] == 1
    low, high = found["roc_auc_interval"]
    assert 0.8 < low < 0.95 and high == 1  # another of 10 positives might well not be parted
    assert [point["aim"] for point in found["points"]] == [
        "sensitivity 90%", "sensitivity 95%", "specificity 90%", "specificity 95%",
    ]  # fmt: skip
    for point in found["points"][:2]:
        assert point["sensitivity"] == point["specificity"] == 1
        assert point["sensitivity_interval"] == wilson_interval(10, 10)


def test_copies_and_images_of_one_lesion_narrow_no_interval_of_screening():
    rng = np.random.default_rng(8)
    is_positive = np.arange(60) % 3 == 0
    score = rng.normal(is_positive * 1.5, 1)
    thresholds = choose_thresholds(is_positive, score)
    once = screen(is_positive, score, thresholds)
    groups, is_positive, score = copied(np.arange(60), is_positive, score)
    thrice = screen(is_positive, score, thresholds, groups)
    assert thrice["roc_auc_interval"] == pytest.approx(once["roc_auc_interval"])
    for point, same_point in zip(thrice["points"], once["points"], strict=True):
        for name in ("sensitivity_interval", "specificity_interval"):
            assert point[name] == pytest.approx(same_point[name])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_thresholds_reach_their_aim_on_validation_and_no_better_one_does(seed, has_ties):
    rng = np.random.default_rng(seed)
    is_positive = np.arange(60) % 3 == 0
    score = rng.normal(is_positive * 1.5, 1)
    score = score.round() if has_ties else score
    found = screen(is_positive, score, choose_thresholds(is_positive, score))
    assert found["roc_auc"] == pytest.approx(roc_auc_score(is_positive, score))
    assert found["roc_auc_interval"][0] <= found["roc_auc"] <= found["roc_auc_interval"][1]
    rates = [
        ((score[is_positive] >= t).mean(), (score[~is_positive] < t).mean())
        for t in [*np.unique(score), np.inf]
    ]
    levels = (0.90, 0.95)
    for point, level in zip(found["points"][:2], levels, strict=True):
        assert point["sensitivity"] >= level
        assert point["specificity"] == max(spec for sens, spec in rates if sens >= level)
    for point, level in zip(found["points"][2:], levels, strict=True):
        assert point["specificity"] >= level
        assert point["sensitivity"] == max(sens for sens, spec in rates if spec >= level)


def test_screening_without_one_of_the_kinds_is_refused():
    with pytest.raises(ValueError, match="images are all of one kind"):
        screen([1, 1], [0.1, 0.9], {"sensitivity 95%": 0.5})
    with pytest.raises(ValueError, match="images are all of one kind"):
        choose_thresholds([0, 0], [0.5, 0.6])


def test_what_is_screened_for_is_what_the_classes_have():
    names = ["Melanoma", "nevus", "basal_cell_carcinoma"]
    assert screening_targets(names) == {"malignant": [0, 2], "melanoma": [0]}
    assert screening_targets(names, ["nevus"]) == {"malignant": [1], "melanoma": [0]}
    assert screening_targets(["cat", "dog"]) == {}
    assert screening_targets(["melanoma", "actinic keratosis"]) == {"melanoma": [0]}


# --- subgroups --------------------------------------------------------------------------------


def test_subgroups_have_the_figures_of_their_images_alone():
    y_true, y_prob = simulated(400, 0.8, seed=5)
    y_pred = y_prob.argmax(axis=1)
    is_female = np.arange(400) % 2 == 0
    y_pred[is_female & (np.arange(400) % 5 == 0)] = 0
    columns = pd.DataFrame({"sex": np.where(is_female, "female", "male"), "image_id": range(400)})
    columns["image_id"] = columns["image_id"].astype(str)
    found = compute_subgroups(y_true, y_pred, columns)
    assert set(found) == {"sex"}  # a column of names tells no kinds apart
    for sex, part in (("female", is_female), ("male", ~is_female)):
        group = found["sex"]["groups"][sex]
        assert group["images"] == 200 and not group["is_too_small"]
        assert group["accuracy"] == pytest.approx(accuracy_score(y_true[part], y_pred[part]))
        expected = balanced_accuracy_score(y_true[part], y_pred[part])
        assert group["balanced_accuracy"] == pytest.approx(expected)
        for figure in ("accuracy", "balanced_accuracy"):
            low, high = group[f"{figure}_interval"]
            assert low < group[figure] < high
    gap = found["sex"]["widest_gap"]
    groups = found["sex"]["groups"]
    assert (gap["highest"], gap["lowest"]) == ("male", "female")
    expected = groups["male"]["balanced_accuracy"] - groups["female"]["balanced_accuracy"]
    assert gap["difference"] == pytest.approx(expected)
    assert gap["interval"][0] < expected < gap["interval"][1]


@pytest.mark.parametrize("mistakes", [30, 0])
def test_subgroups_with_the_same_pattern_of_mistakes_have_a_gap_with_a_width(mistakes):
    """Their gap is 0, and that of other images of the same kind need not be."""
    y_true = np.tile(np.arange(150) % 3, 2)
    y_pred = np.where(np.tile(np.arange(150) < mistakes, 2), (y_true + 1) % 3, y_true)
    columns = pd.DataFrame({"sex": np.repeat(["female", "male"], 150)})
    gap = compute_subgroups(y_true, y_pred, columns)["sex"]["widest_gap"]
    assert gap["difference"] == 0
    low, high = gap["interval"]
    share = mistakes / 150
    error = np.sqrt(2 * share * (1 - share) / 150) if mistakes else 0.01
    assert low == pytest.approx(-1.96 * error, rel=0.2)
    assert high == pytest.approx(1.96 * error, rel=0.2)


def test_images_of_one_lesion_are_drawn_together_for_all_subgroups():
    """Each lesion is photographed with two cameras, and a model does not see which."""
    y_true, y_prob = simulated(200, 0.7, seed=9)
    lesion = np.repeat(np.arange(200), 2)
    y_true, y_pred = y_true[lesion], y_prob.argmax(axis=1)[lesion]
    columns = pd.DataFrame({"camera": ["one", "other"] * 200})
    paired = compute_subgroups(y_true, y_pred, columns, lesion)["camera"]["widest_gap"]["interval"]
    unpaired = compute_subgroups(y_true, y_pred, columns)["camera"]["widest_gap"]["interval"]
    assert -0.03 < paired[0] < 0 < paired[1] < 0.03
    assert unpaired[0] < -0.07 and unpaired[1] > 0.07


@pytest.mark.parametrize(
    "case",
    [
        "0.8 and 0.7, about 60 and 240 lesions",
        "five of 0.8, 100 lesions each",
        "0.9, 0.8 and 0.7, 100 lesions each",
    ],
)
def test_the_interval_of_a_gap_holds_the_true_gap(case, monkeypatch):
    """In 200 simulated sets, so that a true share of 95 % is measured as 91 to 99 %."""
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 400)
    share, _ = measure(CASES["gaps"][case], 200)["widest gap"]
    assert 0.91 <= share <= 0.99


def test_subgroups_of_one_lesion_each_have_intervals_too():
    lesion = np.repeat(np.arange(3), 40)
    y_true = np.arange(120) % 2
    y_pred = np.where(np.arange(120) % 7 == 0, 1 - y_true, y_true)
    found = compute_subgroups(y_true, y_pred, pd.DataFrame({"x": lesion.astype(str)}), lesion)["x"]
    intervals = [group["accuracy_interval"] for group in found["groups"].values()]
    for low, high in [*intervals, found["widest_gap"]["interval"]]:
        assert low < high


def test_what_a_column_alone_tells_of_a_target_and_what_the_model_does_within_it():
    rng = np.random.default_rng(7)
    source = np.repeat(["a", "b", "c"], [100, 60, 40])
    is_positive = np.concatenate([rng.random(100) < 0.7, rng.random(60) < 0.2, np.zeros(40, bool)])
    score = rng.random(200) + 0.3 * is_positive + 0.5 * (source == "a")
    y_true = is_positive.astype(int)
    columns = pd.DataFrame({"source": source})
    found = compute_subgroups(y_true, y_true, columns, targets={"x": (is_positive, score)})
    within = found["source"]["screening"]["x"]
    share = columns.assign(y=y_true).groupby("source")["y"].transform("mean")
    assert within["roc_auc_of_column"] == pytest.approx(roc_auc_score(is_positive, share))
    assert set(within["groups"]) == {"a", "b"}  # in c there is nothing to tell apart
    for name, group in within["groups"].items():
        part = source == name
        assert group["positives"] == is_positive[part].sum()
        assert group["roc_auc"] == pytest.approx(roc_auc_score(is_positive[part], score[part]))
        low, high = group["roc_auc_interval"]
        assert low < group["roc_auc"] < high


def test_a_column_that_gives_the_target_away_leaves_nothing_to_tell_within_it():
    is_positive = np.arange(60) < 20
    columns = pd.DataFrame({"camera": np.where(is_positive, "one", "other")})
    y_true = is_positive.astype(int)
    targets = {"x": (is_positive, np.linspace(0, 1, 60))}
    within = compute_subgroups(y_true, y_true, columns, targets=targets)["camera"]["screening"]["x"]
    assert within == {"roc_auc_of_column": 1.0, "groups": {}}


def test_ages_come_in_bands_and_what_is_not_known_by_itself():
    age = pd.Series([5, 29, 30, 44, 45, 59.0, 60, 74, 75, 90, np.nan])
    y_true = np.arange(11) % 2
    groups = compute_subgroups(y_true, y_true, pd.DataFrame({"age_approx": age}))["age_approx"]
    assert {name: group["images"] for name, group in groups["groups"].items()} == {
        "0 to 29": 2, "30 to 44": 2, "45 to 59": 2, "60 to 74": 2, "75 or more": 2, "unknown": 1,
    }  # fmt: skip
    assert all(group["is_too_small"] for group in groups["groups"].values())
    assert groups["widest_gap"] is None


def test_numbers_written_as_text_come_in_the_same_bands():
    age = [5, 29, 30, 44, 45, 59.0, 60, 74, 75, 90, -1, np.nan]
    numbers = pd.DataFrame({"age": age, "diameter": np.arange(12) / 8})
    texts = numbers.astype(object).map(lambda value: "" if pd.isna(value) else str(value))
    texts["age"] = texts["age"].where(texts["age"] != "", np.nan)
    y_true = np.arange(12) % 2
    expected = compute_subgroups(y_true, y_true, numbers)
    assert compute_subgroups(y_true, y_true, texts) == expected
    assert {name: found["images"] for name, found in expected["age"]["groups"].items()} == {
        "0 to 29": 2, "30 to 44": 2, "45 to 59": 2, "60 to 74": 2, "75 or more": 2, "unknown": 2,
    }  # fmt: skip


def test_what_only_looks_like_numbers_in_part_are_names():
    y_true = np.arange(12) % 2
    numbers = [str(i) for i in range(11)]
    columns = {
        "site": [*numbers, "nan"],
        "size": [*numbers, "inf"],
        "patient_id": [*numbers, "11"],
        "score": ["007", "7", "7.0"] * 4,
    }
    found = compute_subgroups(y_true, y_true, pd.DataFrame(columns))
    assert {name: set(found[name]["groups"]) for name in columns} == {
        name: set(values) for name, values in columns.items()
    }


def test_other_numbers_come_in_quarters():
    columns = pd.DataFrame({"diameter": np.arange(40) / 2, "flat": 1.0, "twice": [0, 1] * 20})
    y_true = np.arange(40) % 3
    found = compute_subgroups(y_true, y_true, columns)
    assert [g["images"] for g in found["diameter"]["groups"].values()] == [10] * 4
    assert set(found["twice"]["groups"]) == {"0", "1"}
    assert "flat" not in found


# --- all of it --------------------------------------------------------------------------------


def test_decisions_are_the_models_own_and_probabilities_the_calibrated_ones():
    y_true, y_prob = simulated(200, 0.7, seed=6)
    y_prob = 0.7 * y_prob + 0.1
    names = ["melanoma", "nevus", "cat"]
    calibration = Calibration(2.0, (3.0, 0.0, -3.0))
    calibrated, y_pred = calibration.apply(y_prob), y_prob.argmax(axis=1)
    assert (calibrated.argmax(axis=1) != y_pred).any()
    thresholds = {"melanoma": choose_thresholds(y_true == 0, calibrated[:, 0])}
    found = evaluate_predictions(y_true, y_prob, names, calibration, thresholds)
    assert found["test"]["accuracy"] == accuracy_score(y_true, y_pred)
    assert found["test"]["log_loss"] == pytest.approx(log_loss(y_true, calibrated))
    assert found["calibration"]["before"]["log_loss"] == pytest.approx(log_loss(y_true, y_prob))
    assert found["calibration"]["after"]["log_loss"] == found["test"]["log_loss"]
    low, high = found["test_intervals"]["accuracy"]
    assert low < found["test"]["accuracy"] < high
    assert set(found["screening"]) == {"melanoma"}  # nothing was chosen for malignant
    known = y_true != 2  # it is not known whether a cat is malignant
    area = roc_auc_score(y_true[known] == 0, calibrated[known, 0])
    assert found["screening"]["melanoma"]["roc_auc"] == pytest.approx(area)
    assert found["subgroups"] == {}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


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
        with pytest.raises(ValueError, match="y_pred must be"):
            compute_metrics([0, 1], np.eye(2), ["a", "b"], y_pred)


def test_without_shifted_priors_only_the_temperature_is_fitted():
    y_true, y_prob = simulated(300, 0.7, seed=7)
    calibration = fit_calibration(y_true, 0.9 * y_prob + 0.1 / 3, priors_shifted=False)
    assert calibration.bias == (0, 0, 0)
    assert calibration.temperature > 1


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
