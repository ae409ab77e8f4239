"""All that predictions say of a model, together."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import (
    accuracy_score,
    log_loss,
    roc_auc_score,
)

from evaluation import (
    Calibration,
    choose_thresholds,
    evaluate_predictions,
    intervals,
)
from tests.evaluation.cases import predictions, simulated


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


def test_what_is_flagged_as_melanoma_counts_as_flagged_as_malignant():
    y_true = np.repeat([0, 1, 2], 20)  # melanoma, basal cell carcinoma, nevus
    y_prob = np.random.default_rng(0).dirichlet(np.ones(3), size=60)
    names, none = ["mel", "bcc", "nv"], Calibration(1.0, (0.0, 0.0, 0.0))
    aims = {"sensitivity 95%": 0.9, "specificity 95%": 0.9}
    thresholds = {"malignant": aims, "melanoma": {"sensitivity 95%": 0.1, "specificity 95%": 0.1}}
    found = evaluate_predictions(y_true, y_prob, names, none, thresholds)
    flagged = y_prob[:, :2].sum(axis=1) >= 0.9
    either = flagged | (y_prob[:, 0] >= 0.1)
    points = {point["aim"]: point for point in found["screening"]["malignant"]["points"]}
    assert points["sensitivity 95%"]["sensitivity"] == either[:40].mean() > flagged[:40].mean()
    assert points["sensitivity 95%"]["specificity"] == (~either[40:]).mean()
    assert points["specificity 95%"]["sensitivity"] == flagged[:40].mean()


@settings(deadline=None, max_examples=50)
@given(predictions(), st.data())
def test_with_any_calibration_the_metrics_of_decisions_agree_with_each_other(case, data):
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


@settings(deadline=None, max_examples=2)
@given(st.integers(0, 2**32 - 1))
def test_images_of_unknown_classes_change_no_metric_of_screening(seed):
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
