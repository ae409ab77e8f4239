"""Confidence intervals hold their metric and, in simulations, the true value."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest, norm

from benchmarks.coverage import CASES, measure
from evaluation import (
    HEADLINES,
    compare,
    compute_intervals,
    compute_metrics,
    effective_sample_size,
    intervals,
    wilson_interval,
)
from tests.evaluation.cases import copied, one_hot, predictions, simulated


def test_an_interval_lies_about_its_metric_and_narrows_with_more_images():
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
            for metric in ("precision", "recall"):
                low, high = intervals["per_class"][name][metric]
                assert low < metrics["per_class"][name][metric] < high
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
def test_every_interval_holds_its_metric_and_has_a_width(case, data):
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
        for metric in ("precision", "recall"):
            interval = found["per_class"][name][metric]
            value = metrics["per_class"][name][metric]
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
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 200)
    for name, (share, _) in measure(CASES[what][case], 200).items():
        assert share >= lowest, name


@pytest.mark.parametrize("labels", [np.arange(20) % 2, np.zeros(20, int)])
def test_two_models_without_mistakes_may_differ_on_other_images(labels):
    for found in compare(labels, labels, labels).values():
        low, high = found["interval"]
        assert -0.25 < low < -0.05 and 0.05 < high < 0.25


def test_copies_and_images_of_one_lesion_narrow_no_interval_of_a_class():
    y_true, y_prob = simulated(60, 0.8, seed=4)
    names = ["a", "b", "c"]
    once = compute_intervals(y_true, y_prob, names)["per_class"]
    groups, y_true, y_prob = copied(np.arange(60), y_true, y_prob)
    thrice = compute_intervals(y_true, y_prob, names, groups)["per_class"]
    for name in names:
        for metric in ("precision", "recall"):
            assert thrice[name][metric] == pytest.approx(once[name][metric])


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


@pytest.mark.parametrize("labels", [[0], [0, -1], [0, 0.5]])
def test_models_are_compared_on_labels_of_the_same_images_alone(labels):
    with pytest.raises(ValueError, match="y_pred_b (has|goes)"):
        compare([0, 1], [0, 1], labels)
