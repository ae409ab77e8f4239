"""Balanced sampling shows each image as often as it should."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imaging.batches import balanced_frequencies, shuffled_epoch


@given(st.lists(st.integers(1, 200), min_size=2, max_size=9))
def test_balanced_sampling_is_even_but_repeats_no_image_too_often(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    frequency = balanced_frequencies(labels)
    assert frequency.sum() == pytest.approx(len(labels))
    assert frequency.max() <= 10 * (1 + 1e-9)
    totals = np.bincount(labels, weights=frequency)
    free = totals[frequency[np.cumsum(sizes) - 1] < 10 * (1 - 1e-9)]
    assert np.allclose(free, free[:1])  # classes that are not held back are drawn alike
    assert totals.max() <= free.max(initial=totals.max()) * (1 + 1e-9)


@pytest.mark.parametrize("sizes", [(300, 30, 20), (300, 2, 98)])
def test_balanced_epochs_draw_as_often_as_expected(sizes):
    labels = np.repeat(np.arange(3), sizes)
    drawn = [shuffled_epoch(labels, 42, epoch, balanced=True) for epoch in range(4)]
    expected = balanced_frequencies(labels)
    times = np.bincount(np.concatenate(drawn), minlength=len(expected))
    assert (np.abs(times - 4 * expected) <= 4).all()
    by_class = np.bincount(labels, weights=times)
    wanted = np.bincount(labels, weights=4 * expected)
    assert np.abs(by_class - wanted).max() <= 8
