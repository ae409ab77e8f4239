import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import best_evaluation


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
