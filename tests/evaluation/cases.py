"""Predictions that several test modules make for themselves."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays


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


def simulated(num_images, accuracy, seed, num_classes=3):
    """Labels and probabilities of a model that is right with the given probability."""
    rng = np.random.default_rng(seed)
    y_true = rng.integers(num_classes, size=num_images)
    is_right = rng.random(num_images) < accuracy
    wrong = (y_true + rng.integers(1, num_classes, num_images)) % num_classes
    return y_true, one_hot(np.where(is_right, y_true, wrong), num_classes)


def copied(groups, *values):
    """Each value three times over, and the group of each copy."""
    return (np.repeat(groups, 3), *(np.repeat(value, 3, axis=0) for value in values))
