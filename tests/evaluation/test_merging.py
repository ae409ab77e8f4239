"""The classes of a model merged for other labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.merging import MergedClasses

CLASSES = ["mel", "bcc", "nv", "unknown"]
CLASS_MAP = {"mel": "malignant", "bcc": "malignant", "nv": "benign"}
probabilities_of_images = st.lists(
    st.lists(st.floats(0.01, 1), min_size=4, max_size=4), min_size=1, max_size=5
).map(lambda rows: np.array(rows) / np.sum(rows, axis=1, keepdims=True))


@given(probabilities_of_images)
def test_probabilities_of_classes_that_become_one_add_up(probabilities):
    merged = MergedClasses.from_map(CLASSES, CLASS_MAP)
    assert merged.names == ("malignant", "benign", "unknown")
    found = merged.merge(probabilities)
    np.testing.assert_allclose(found[:, 0], probabilities[:, 0] + probabilities[:, 1])
    np.testing.assert_allclose(found.sum(axis=1), 1)


@given(probabilities_of_images)
def test_without_a_class_the_others_keep_their_ratios(probabilities):
    merged = MergedClasses.from_map(CLASSES, CLASS_MAP | {"unknown": ""})
    found = merged.merge(probabilities)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    left = probabilities[:, 0] + probabilities[:, 1]
    np.testing.assert_allclose(found[:, 0] / found[:, 1], left / probabilities[:, 2])


def test_where_only_a_class_that_is_left_out_is_probable_all_are_alike():
    merged = MergedClasses.from_map(CLASSES, CLASS_MAP | {"unknown": ""})
    np.testing.assert_array_equal(merged.merge(np.array([[0.0, 0, 0, 1]])), [[0.5, 0.5]])


def test_the_strongest_member_is_of_the_merged_class():
    merged = MergedClasses.from_map(CLASSES, CLASS_MAP)
    probabilities = np.array([[0.1, 0.25, 0.6, 0.05], [0.3, 0.2, 0.4, 0.1]])
    assert merged.strongest_member(probabilities, np.array([0, 0])).tolist() == [1, 0]
    assert merged.strongest_member(probabilities, np.array([1, 2])).tolist() == [2, 3]


def test_names_that_match_nothing_and_a_single_class_are_refused():
    with pytest.raises(ValueError, match="no class 'df'"):
        MergedClasses.from_map(CLASSES, {"df": "benign"})
    MergedClasses.from_map(CLASSES, {"df": "benign"}, others=["df"])  # of the images
    with pytest.raises(ValueError, match="fewer than two"):
        MergedClasses.from_map(CLASSES, dict.fromkeys(CLASSES, "lesion"))
