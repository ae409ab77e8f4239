"""The verdict: what the results of a run support, before any table."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation import Calibration, evaluate_predictions
from experiment.run_files import Run
from experiment.verdict import judge

CLASSES = ["melanoma", "nevus", "wart"]
LABELS = np.repeat([0, 1, 2], [30, 60, 30])
NO_CHANGE = Calibration(1.0, (0.0, 0.0, 0.0))


def probabilities(predicted, confidence=0.9):
    rest = (1 - confidence) / 2
    return np.where(np.eye(3, dtype=bool)[predicted], confidence, rest)


def right_in(share, seed=0):
    """Predicted labels of which this share is right."""
    generator = np.random.default_rng(seed)
    wrong = generator.random(len(LABELS)) >= share
    return np.where(wrong, (LABELS + generator.integers(1, 3, len(LABELS))) % 3, LABELS)


def leave(folder, name="cnn", predicted=None, calibration=NO_CHANGE, thresholds=None, **more):
    """Leaves the files of a model that predicted so."""
    y_prob = probabilities(right_in(0.8) if predicted is None else predicted)
    found = evaluate_predictions(LABELS, y_prob, CLASSES, calibration, thresholds or {})
    (folder / name).mkdir(parents=True)
    contents = {"model": name, "classes": CLASSES} | found | more
    (folder / name / "metrics.json").write_text(json.dumps(contents))


def answers(folder):
    return {answer.question: answer for answer in judge(Run(folder))}


def test_a_model_that_predicts_one_class_is_not_better_than_chance(tmp_path):
    leave(tmp_path, predicted=np.ones_like(LABELS))
    found = answers(tmp_path)
    chance = found["Better than chance?"]
    assert not chance.is_good and chance.text.startswith("not shown: balanced accuracy 0.33")
    assert "chance 0.33;" in chance.text
    assert "0.50 for always predicting nevus" in chance.text
    never = found["Are all classes predicted?"]
    assert (never.is_good, never.text) == (False, "no: it never predicts melanoma, wart")
    melanoma = found["Is melanoma found?"]
    assert melanoma.is_good is False
    assert melanoma.text.startswith("0 of 30: sensitivity 0.00 (0.00 to ")


def test_a_model_that_is_right_in_most_images_is_better_than_chance(tmp_path):
    leave(tmp_path)
    found = answers(tmp_path)
    assert found["Better than chance?"].is_good
    assert "always predicting" not in found["Better than chance?"].text
    assert "Are all classes predicted?" not in found
    assert "Is one model the best?" not in found  # there is one


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 9))
def test_no_model_is_better_than_chance_whose_interval_includes_chance(
    tmp_path_factory, share, seed
):
    folder = tmp_path_factory.mktemp("run")
    leave(folder, predicted=right_in(share, seed))
    (model,) = Run(folder).models
    low, _ = model.intervals["balanced_accuracy"]
    assert answers(folder)["Better than chance?"].is_good == (low > 1 / 3)


def test_a_threshold_that_missed_its_aim_is_named(tmp_path):
    thresholds = {"melanoma": {"sensitivity 95%": 0.5}, "malignant": {"sensitivity 95%": 0.01}}
    leave(tmp_path, thresholds=thresholds)
    found = answers(tmp_path)
    missed = found["Does the threshold for melanoma hold?"]
    assert not missed.is_good and missed.text.startswith("aimed at 95 % sensitivity, reached ")
    assert found["Does the threshold for malignant hold?"].is_good


def test_calibration_that_made_it_worse_is_named(tmp_path):
    leave(tmp_path, calibration=Calibration(0.2, (0.0, 0.0, 0.0)))
    assert answers(tmp_path)["Did calibration help?"].is_good is False


def test_a_best_model_is_named_only_where_the_test_images_tell_it_from_the_others(tmp_path):
    leave(tmp_path, "a", right_in(0.9))
    leave(tmp_path, "b", right_in(0.7))
    for low, is_best in ((-0.02, None), (0.05, True)):
        rows = {"model": ["a", "b"], "gap_to_best": [0.0, 0.2]}
        rows |= {"gap_to_best_low": [0.0, low], "gap_to_best_high": [0.0, 0.3]}
        pd.DataFrame(rows).to_csv(tmp_path / "comparison.csv", index=False)
        best = answers(tmp_path)["Is one model the best?"]
        assert best.is_good is is_best
        assert ("cannot tell it from b" in best.text) == (is_best is None)


@pytest.mark.parametrize(
    ("config", "said"),
    [({"is_synthetic": True}, "synthetic images, which say nothing about skin"), ({}, None)],
)
def test_synthetic_images_say_nothing_about_skin(tmp_path, config, said):
    leave(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    sound = answers(tmp_path).get("Are the data sound?")
    assert sound is None if said is None else said in sound.text


def test_contradictory_labels_and_divided_groups_are_faults_of_the_data(tmp_path):
    leave(tmp_path)
    pd.DataFrame({"path": ["a", "b"], "class": CLASSES[:2], "group": [1, 1],
                  "split": ["train", "test"]}).to_csv(tmp_path / "splits.csv")  # fmt: skip
    audit = pd.DataFrame({"kind": ["contradiction"], "images": ["a; b"],
                          "classes": ["melanoma; nevus"], "distance": [0.0]})  # fmt: skip
    audit.to_csv(tmp_path / "audit.csv")
    sound = answers(tmp_path)["Are the data sound?"]
    assert not sound.is_good
    assert "images with several labels: 1; groups of images divided between splits: 1" in sound.text


def test_a_test_split_is_large_enough_only_with_a_narrow_interval(tmp_path):
    leave(tmp_path)
    enough = answers(tmp_path)["Is the test split large enough?"]
    assert not enough.is_good and enough.text.startswith("no: 120 images, balanced accuracy")


def test_a_model_that_is_not_pretrained_says_so_beside_its_name(tmp_path):
    leave(tmp_path, "resnet_finetuned")
    leave(tmp_path, "resnet_head", right_in(0.7))
    runs = {"resnet_finetuned": {"weights": "none"}, "resnet_head": {"weights": "imagenet"}}
    (tmp_path / "config.json").write_text(json.dumps({"runs": runs}))
    names = [model.label for model in Run(tmp_path).models]
    assert names == ["resnet_finetuned (not pretrained)", "resnet_head"]
