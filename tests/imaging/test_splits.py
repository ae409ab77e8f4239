"""Splits and folds are stratified by class and never divide a group."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaging.splits import group_images, k_fold_splits, stratified_split

THREE = {"train": 0.7, "valid": 0.2, "test": 0.1}
several_classes = st.lists(st.integers(1, 60), min_size=2, max_size=6)


@given(several_classes, st.integers(0, 5))
def test_single_images_are_split_by_the_largest_remainder(sizes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    split = stratified_split(labels, np.arange(len(labels)), THREE, seed)
    for label, size in enumerate(sizes):
        names = split[labels == label]
        assert (names == "train").any()
        for name, fraction in THREE.items():
            count = (names == name).sum()
            if size >= 3:
                assert count >= 1
            if size >= 10:  # with fewer, having every class everywhere comes first
                assert abs(count - size * fraction) < 1


@settings(deadline=None)
@given(st.data())
def test_groups_are_never_divided_and_every_image_has_a_split(data):
    num_images = data.draw(st.integers(2, 60))
    numbers = st.lists(st.integers(0, 14), min_size=num_images, max_size=num_images)
    labels = np.unique(data.draw(numbers), return_inverse=True)[1] % 4
    labels = np.unique(labels, return_inverse=True)[1]
    groups = np.array(data.draw(numbers))
    split = stratified_split(labels, groups, THREE, data.draw(st.integers(0, 5)))
    assert set(split) <= set(THREE)
    for group in np.unique(groups):
        assert len(set(split[groups == group])) == 1


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_splits_of_whole_groups_are_within_the_largest_group_of_their_share(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.geometric(rng.uniform(0.2, 1), size=rng.integers(5, 100))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    num_classes = rng.integers(2, 10)
    shares = rng.dirichlet(np.full(num_classes, rng.uniform(0.3, 3)))
    of_group = rng.choice(num_classes, len(sizes), p=shares)[groups]
    of_image = rng.choice(num_classes, len(groups), p=shares)
    is_mixed = (rng.random(len(sizes)) < rng.random())[groups]  # these hold several classes
    labels = np.unique(np.where(is_mixed, of_image, of_group), return_inverse=True)[1]
    split = stratified_split(labels, groups, THREE, seed)
    for group in range(len(sizes)):
        assert len(set(split[groups == group])) == 1
    # Groups of several classes cannot suit all of them: in 1 of some 10,000 cases an image more.
    allowed = sizes.max() + is_mixed.any()
    for label, size in enumerate(np.bincount(labels)):
        # A class too small for one image in each split is in each nevertheless.
        lacking = sum(max(0, 1 - size * fraction) for fraction in THREE.values())
        for name, fraction in THREE.items():
            count = (split[labels == label] == name).sum()
            assert abs(count - size * fraction) <= allowed + lacking + 1e-9


def test_the_seed_decides_which_images_and_not_how_many():
    labels = np.repeat([0, 1, 2], [50, 20, 10])
    groups = np.arange(80)
    first, again, other = (stratified_split(labels, groups, THREE, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    for label in range(3):
        counts = [sorted((s[labels == label] == n).sum() for n in THREE) for s in (first, other)]
        assert counts[0] == counts[1]


def test_groups_are_joined_by_any_key():
    metadata = pd.DataFrame(
        {"picture": [0, 1, 2, 3, 3, 4], "patient": ["x", None, "y", "y", None, None]}
    )
    groups = group_images(metadata, ["picture", "patient"])
    assert groups.tolist() == [0, 1, 2, 2, 2, 3]


def test_classes_of_fewer_groups_than_folds_are_warned_of():
    sizes = {"common": 20, "rare": 3, "lone": 1}
    names = np.repeat(list(sizes), list(sizes.values()))
    metadata = pd.DataFrame({"class": names, "label": pd.factorize(names)[0], "group": range(24)})
    message = r"classes with fewer groups than k=5: lone \(1\), rare \(3\);"
    with pytest.warns(UserWarning, match=message) as caught:
        k_fold_splits(metadata, 5)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        k_fold_splits(metadata[metadata["class"] == "common"], 5)
    with pytest.warns(UserWarning, match=r"k=2: 7 \(1\);"):
        k_fold_splits(pd.DataFrame({"label": [7, 7, 0, 0], "group": [0, 0, 1, 2]}), 2)


@pytest.mark.filterwarnings("ignore:classes with fewer groups")
def test_the_seed_decides_which_fold_has_a_class_of_one_group():
    metadata = pd.DataFrame({"label": [0] * 20 + [1, 2], "group": range(22)})
    found = {}
    for seed in range(12):
        folds = k_fold_splits(metadata, 5, seed)
        found[seed] = [[20 in valid for _, valid in folds].index(True)]
        found[seed] += [[21 in valid for _, valid in folds].index(True)]
        assert found[seed][0] != found[seed][1]  # no fold lacks more than it must
    assert len({first for first, _ in found.values()}) > 2


@pytest.mark.filterwarnings("ignore:classes with fewer groups")
@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_training_part_has_every_class_of_two_groups(seed):
    rng = np.random.default_rng(seed)
    num_groups, k = rng.integers(5, 40), int(rng.integers(2, 6))
    groups = np.repeat(np.arange(num_groups), rng.geometric(0.5, num_groups))
    shares = rng.dirichlet(np.full(rng.integers(2, 7), 0.5))
    of_image = rng.choice(len(shares), len(groups), p=shares)
    of_group = rng.choice(len(shares), num_groups, p=shares)[groups]
    is_mixed = (rng.random(num_groups) < rng.random())[groups]
    metadata = pd.DataFrame({"label": np.where(is_mixed, of_image, of_group), "group": groups})
    num_groups_of = metadata.groupby("label")["group"].nunique()
    for train, valid in k_fold_splits(metadata, k, seed % 1000):
        labels = metadata["label"].to_numpy()
        assert set(num_groups_of.index[num_groups_of >= 2]) <= set(labels[train])
        assert set(num_groups_of.index[num_groups_of >= k]) <= set(labels[valid])


@pytest.mark.filterwarnings("ignore:classes with fewer groups")
@given(several_classes, st.integers(2, 5))
def test_folds_are_stratified_and_each_row_is_validated_once(sizes, k):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    metadata = pd.DataFrame({"label": labels, "group": np.arange(len(labels)) // 2})
    if metadata["group"].nunique() < k:
        with pytest.raises(ValueError, match="k must be from 2 to"):
            k_fold_splits(metadata, k)
        return
    folds = k_fold_splits(metadata, k)
    validated = np.concatenate([valid for _, valid in folds])
    assert sorted(validated) == list(range(len(labels)))
    for train, valid in folds:
        assert sorted([*train, *valid]) == list(range(len(labels)))
        assert not set(metadata["group"][train]) & set(metadata["group"][valid])
        for label, size in enumerate(sizes):
            assert abs((labels[valid] == label).sum() - size / k) <= 4
