import os
import pickle
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import dataset
from dataset import (
    DatasetBuilder,
    LesionLoader,
    balanced_frequencies,
    create_dataloaders,
    find_images,
    group_images,
    k_fold_splits,
    stratified_split,
)
from imaging.synthetic import CLASSES, draw_lesion


def build(root, image_size=16, splits=None, preprocessors=(), **options):
    builder = DatasetBuilder(root, image_size=image_size, **options)
    return builder.build(preprocessors=preprocessors, splits=splits)


# ---------------------------------------------------------------------------- folders


def test_train_and_test_are_pooled_and_remembered(make_images):
    root = make_images({"Train/melanoma": 2, "Test/melanoma": 1, "Train/nevus": 3})
    images = find_images(root)
    assert images["path"].tolist() == sorted(images["path"])
    assert images["path"][0] == "Test/melanoma/0000.png"
    assert images.groupby(["class", "source_split"]).size().to_dict() == {
        ("melanoma", "Test"): 1,
        ("melanoma", "Train"): 2,
        ("nevus", "Train"): 3,
    }


def test_classes_alone_work_with_spaces_and_unicode(make_images):
    root = make_images({"basal cell carcinoma": 1, "Нévus – 痣": 2})
    images = find_images(root)
    assert set(images["class"]) == {"basal cell carcinoma", "Нévus – 痣"}
    assert set(images["source_split"]) == {""}


def test_one_class_written_in_two_ways_is_one_class(make_images):
    root = make_images({"Train/n\u00e9vus": 2, "Test/ne\u0301vus": 1, "Train/b": 1})
    assert sorted(find_images(root)["class"]) == ["b"] + ["n\u00e9vus"] * 3


def test_a_class_name_that_no_table_could_hold_is_refused(make_images):
    root = make_images({"a": 1, "b": 1})
    os.rename(root / "b", os.fsencode(root) + b"/caf\xe9")
    with pytest.raises(ValueError, match="not valid UTF-8; rename it"):
        find_images(root)


def test_hidden_files_and_files_of_other_kinds_are_passed_over(make_images):
    root = make_images({"a": 1, "b": 1, ".cache/c": 1})
    shutil.copy(root / "a/0000.png", root / "a/._0000.png")
    (root / "a/notes.txt").write_text("no image")
    shutil.copy(root / "a/0000.png", root / "a/UPPER.PNG")
    assert find_images(root)["path"].tolist() == ["a/0000.png", "a/UPPER.PNG", "b/0000.png"]


def test_a_link_to_the_folder_it_lies_in_ends(make_images):
    root = make_images({"a": 1, "b": 1})
    (root / "a/again").symlink_to(root)
    assert len(find_images(root)) == 2


def test_folders_that_cannot_be_used_are_named(make_images, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images"):
        find_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="one class, a"):
        find_images(make_images({"Train/a": 1, "Test/a": 1}, name="single"))
    stray = make_images({"a": 1, "b": 1}, name="stray")
    shutil.copy(stray / "a/0000.png", stray / "loose.png")
    with pytest.raises(ValueError, match="loose.png stands directly"):
        find_images(stray)


def shown(splits, path):
    for split in splits.values():
        found = np.flatnonzero(split.metadata["path"] == path)
        if len(found):
            return split.gather(found)[0]
    raise KeyError(path)


# ---------------------------------------------------------------------------- splits

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
    sizes = rng.geometric(rng.uniform(0.2, 1), size=rng.integers(5, 200))
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
    for label, size in enumerate(np.bincount(labels)):
        # A class too small for one image in each split comes into each all the same.
        lacking = sum(max(0, 1 - size * fraction) for fraction in THREE.values())
        for name, fraction in THREE.items():
            count = (split[labels == label] == name).sum()
            assert abs(count - size * fraction) <= sizes.max() + lacking + 1e-9


def test_the_seed_decides_who_and_not_how_many():
    labels = np.repeat([0, 1, 2], [50, 20, 10])
    groups = np.arange(80)
    first, again, other = (stratified_split(labels, groups, THREE, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    for label in range(3):
        counts = [sorted((s[labels == label] == n).sum() for n in THREE) for s in (first, other)]
        assert counts[0] == counts[1]


def test_any_names_and_fractions_work(make_images):
    root = make_images({"a": 8, "b": 8})
    splits, metadata = build(root, splits={"fit": 0.5, "check": 0.5})
    assert {name: len(split) for name, split in splits.items()} == {"fit": 8, "check": 8}
    assert set(metadata["split"]) == {"fit", "check"}


@pytest.mark.parametrize(
    "splits",
    [{"train": 0.7, "test": 0.2}, {"train": 1.2, "test": -0.2}, {}, {"train": float("nan")}],
)
def test_fractions_that_cannot_be_are_refused(make_images, splits):
    with pytest.raises(ValueError, match="splits"):
        build(make_images({"a": 3, "b": 3}), splits=splits)


def test_identical_files_stay_together_whatever_their_class(make_images):
    root = make_images({"Train/a": 20, "Train/b": 20, "Test/b": 10})
    for i in range(10):
        shutil.copy(root / f"Train/a/{i:04d}.png", root / f"Test/b/copy{i}.png")
    _, metadata = build(root)
    assert metadata["picture"].nunique() == 50
    assert metadata.groupby("content_hash")["split"].nunique().max() == 1
    assert metadata.groupby("group")["split"].nunique().max() == 1


def save_lesions(root, counts, seed=0):
    rng = np.random.default_rng(seed)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            lesion = draw_lesion(CLASSES[i % len(CLASSES)], rng, 96)
            lesion.save(root / folder / f"{i:04d}.jpg", quality=90)
    return root


def turn_and_save_again(source, target):
    with Image.open(source) as image:
        image.transpose(Image.Transpose.ROTATE_90).resize((80, 80)).save(target, quality=90)


def test_near_duplicates_stay_together_and_count_as_one_picture(tmp_path):
    root = save_lesions(tmp_path / "raw", {"a": 20, "b": 20})
    for i in range(10):
        turn_and_save_again(root / f"a/{i:04d}.jpg", root / f"a/turned {i}.jpg")
        turn_and_save_again(root / f"b/{i:04d}.jpg", root / f"a/contradicting {i}.jpg")
    _, metadata = build(root)
    assert metadata["picture"].nunique() == 40
    assert metadata["content_hash"].nunique() == 60
    assert metadata.groupby("picture")["split"].nunique().max() == 1
    _, metadata = build(root, label_conflicts="drop")
    assert len(metadata) == 40
    assert not metadata["path"].str.contains("contradicting").any()


def test_the_audit_knows_pictures_labels_splits_and_broken_files(tmp_path):
    root = save_lesions(tmp_path / "raw", {"Train/a": 14, "Train/b": 12, "Test/a": 10})
    turn_and_save_again(root / "Train/b/0003.jpg", root / "Train/a/turned.jpg")
    shutil.copy(root / "Train/a/0001.jpg", root / "Test/a/copy.jpg")
    (root / "Test/a/broken.jpg").write_bytes(b"GIF89a")
    Image.new("RGB", (20, 90), "red").save(root / "Train/b/red.png")
    builder = DatasetBuilder(root, image_size=16)
    findings = builder.audit()
    named = [(row.kind, row.images) for row in findings.itertuples()]
    turned = ("Train/a/turned.jpg", "Train/b/0003.jpg")
    copied = ("Test/a/copy.jpg", "Train/a/0001.jpg")
    assert named == [
        ("unreadable", ("Test/a/broken.jpg",)),
        ("contradiction", turned),
        ("leakage", copied),
        ("identical", copied),
        ("near-duplicate", turned),
        ("tiny", ("Train/b/red.png",)),
        ("flat", ("Train/b/red.png",)),
    ]
    assert builder.audit().equals(findings)  # from the array that is there


@pytest.mark.parametrize("flag", ["splits_csv", "metadata_csv"])
def test_the_audit_finds_leakage_between_the_splits_of_a_table(tmp_path, flag):
    root = save_lesions(tmp_path / "raw", {"a": 12, "b": 12})
    shutil.copy(root / "a/0003.jpg", root / "a/copy.jpg")
    paths = find_images(root)["path"]
    splits = pd.DataFrame({"path": paths, "split": "train"})
    splits.loc[splits["path"] == "a/copy.jpg", "split"] = "test"
    table = write(tmp_path / "table.csv", splits)
    findings = DatasetBuilder(root, image_size=16, **{flag: table}).audit()
    assert findings["kind"].tolist() == ["leakage", "identical"]
    assert DatasetBuilder(root, image_size=16).audit()["kind"].tolist() == ["identical"]


def test_with_splits_by_folders_the_audit_looks_at_the_folders(tmp_path):
    root = save_lesions(tmp_path / "raw", {"Train/a": 12, "Train/b": 12, "Test/a": 10})
    shutil.copy(root / "Train/a/0003.jpg", root / "Test/a/copy.jpg")
    splits = find_images(root)[["path"]].assign(split="train")
    table = write(tmp_path / "table.csv", splits)
    options = {"image_size": 16, "metadata_csv": table}
    by_folders = DatasetBuilder(root, split_by="folders", **options).audit()
    assert by_folders["kind"].tolist() == ["leakage", "identical"]
    assert DatasetBuilder(root, **options).audit()["kind"].tolist() == ["identical"]


def test_splits_do_not_depend_on_the_order_of_the_file_system(make_images, monkeypatch):
    root = make_images({"Train/a": 20, "Test/a": 7, "Train/b": 13})
    _, expected = build(root)
    names = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(names(path), reverse=True))
    _, metadata = build(root)
    assert metadata.equals(expected)


def test_a_class_of_one_image_is_trained_on_and_warned_of(make_images):
    root = make_images({"a": 10, "b": 10, "lonely": 1})
    with pytest.warns(UserWarning, match=r"lonely \(1 images\) is not in valid, test"):
        _, metadata = build(root)
    assert metadata.loc[metadata["class"] == "lonely", "split"].tolist() == ["train"]


def test_metadata_has_a_row_an_image_with_all_columns(make_images):
    root = make_images({"Train/b": 5, "Train/a": 5})
    Image.new("RGB", (30, 20)).save(root / "Train/a/oblong.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, metadata = build(root)
    assert metadata.columns.tolist() == [
        "path", "class", "label", "source_split", "width", "height", "content_hash", "picture",
        "group", "split",
    ]  # fmt: skip
    assert metadata.groupby("class")["label"].unique().map(list).to_dict() == {"a": [0], "b": [1]}
    oblong = metadata.set_index("path").loc["Train/a/oblong.png"]
    assert (oblong["width"], oblong["height"]) == (30, 20)


# ---------------------------------------------------------------------------- tables


def write(path, table):
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def test_labels_from_a_table_override_those_of_the_folders(make_images, tmp_path):
    root = make_images({"a": 12, "b": 12})
    labels = write(tmp_path / "l.csv", {"path": ["a/0000.png", "b/0003.png"], "class": ["b", "c"]})
    with pytest.warns(UserWarning, match=r"c \(1 images\) is not in valid, test"):
        _, metadata = build(root, labels_csv=labels)
    found = metadata.set_index("path")["class"]
    assert (found["a/0000.png"], found["b/0003.png"]) == ("b", "c")
    assert found.drop(["a/0000.png", "b/0003.png"]).value_counts().to_dict() == {"a": 11, "b": 11}


def test_rows_of_a_table_of_labels_that_name_no_image_are_said(make_images, tmp_path):
    root = make_images({"a": 12, "b": 12})
    labels = write(tmp_path / "l.csv", {"path": ["a/0000.png", "a/nine.png"], "class": ["b", "b"]})
    with pytest.warns(
        UserWarning, match="l.csv: 1 of its 2 rows name no image here, such as a/nine"
    ):
        build(root, labels_csv=labels)
    write(labels, {"image_id": ["0000", "0001"], "class": ["b", "b"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(root, labels_csv=labels)


def test_a_flat_folder_trains_from_a_table_alone(make_images, tmp_path):
    root = make_images({"all": 20})
    names = [f"{i:04d}" for i in range(20)]
    table = {"image_id": names, "dx": ["mel", "nv"] * 10, "age": [None, *range(19)]}
    table = write(tmp_path / "HAM10000_metadata.csv", table)
    splits, metadata = build(root / "all", metadata_csv=table, label_column="dx")
    assert splits["train"].classes == ["mel", "nv"]
    assert metadata.set_index("path").loc["0003.png", ["class", "dx", "age"]].tolist() == [
        "nv", "nv", "2.0",
    ]  # fmt: skip
    write(table, {"image_id": names[1:], "dx": ["mel"] * 19})
    with pytest.raises(ValueError, match=r"no dx for 1 of 20 images, such as 0000\.png"):
        build(root / "all", metadata_csv=table, label_column="dx")


def test_the_columns_of_a_table_come_into_the_metadata_and_its_groups_stay_whole(
    make_images, tmp_path
):
    root = make_images({"Train/a": 30, "Train/b": 30})
    paths = find_images(root)["path"].tolist()
    table = {
        "path": paths[:50],
        "patient_id": [f"p{i // 5}" for i in range(45)] + [None] * 5,
        "lesion_id": [i // 2 for i in range(50)],
        "sex": ["f", "m"] * 25,
        "split": ["x"] * 50,
    }
    table = write(tmp_path / "m.csv", table)
    _, metadata = build(root, metadata_csv=table, group_by=["patient_id", "lesion_id"])
    assert metadata.columns.tolist()[-4:] == ["patient_id", "lesion_id", "sex", "split_given"]
    for key in ("patient_id", "lesion_id", "picture"):
        assert metadata.groupby(key)["split"].nunique().max() == 1
    with_none = metadata[metadata["patient_id"].isna()]
    assert with_none["group"].nunique() > 5  # an empty value joins nothing
    assert metadata["sex"].isna().sum() == 10


def test_groups_are_joined_by_any_key():
    metadata = pd.DataFrame(
        {"picture": [0, 1, 2, 3, 3, 4], "patient": ["x", None, "y", "y", None, None]}
    )
    groups = group_images(metadata, ["picture", "patient"])
    assert groups.tolist() == [0, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"path": ["x.png"], "class": ["a"]}, {"labels_csv": 1}, "matches no image"),
        ({"path": ["a/0000.png"] * 2, "class": ["a"] * 2}, {"labels_csv": 1}, "more than one row"),
        ({"path": [], "class": []}, {"labels_csv": 1}, "has no rows"),
        ({"path": ["a/0000.png"]}, {"labels_csv": 1}, "no column class; it has path"),
        ({"name": ["a/0000.png"], "class": ["a"]}, {"labels_csv": 1}, "no column path, image_id"),
        (
            {"path": ["a/0000.png"]},
            {"metadata_csv": 1, "group_by": ["lesion_id"]},
            "no column lesion_id",
        ),
        ({"path": ["a/0000.png"], "split": ["train"]}, {"splits_csv": 1}, "no split for 7 of 8"),
    ],
)
def test_tables_that_do_not_fit_are_refused(make_images, tmp_path, table, options, message):
    root = make_images({"a": 4, "b": 4})
    path = write(tmp_path / "t.csv", table)
    options = {name: path if value == 1 else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        build(root, **options)
    assert not (root.parent / "processed").exists() or "splits_csv" in options


def test_rows_of_images_that_are_not_here_may_be_anything(make_images, tmp_path):
    root = make_images({"a": 4, "b": 4})
    rows = {"path": ["a/0000.png", "x.png", "x.png"], "age": [60, 1, 2]}
    _, metadata = build(root, metadata_csv=write(tmp_path / "t.csv", pd.DataFrame(rows)))
    assert metadata["age"].dropna().tolist() == ["60"]


def test_files_that_are_no_tables_are_refused(make_images, tmp_path):
    root = make_images({"a": 4, "b": 4})
    with pytest.raises(FileNotFoundError, match="gone.csv"):
        build(root, labels_csv=tmp_path / "gone.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(ValueError, match="binary.csv"):
        build(root, labels_csv=tmp_path / "binary.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="empty.csv"):
        build(root, labels_csv=tmp_path / "empty.csv")


def test_options_that_contradict_one_another_are_refused(tmp_path):
    for options, message in [
        ({"split_by": "folders", "splits_csv": "x.csv"}, "not from both"),
        ({"label_column": "dx"}, "label_column needs the table"),
        ({"group_by": ["lesion_id"]}, "group_by needs the table"),
        ({"split_by": "chance"}, "split_by is 'chance'"),
        ({"label_conflicts": "ignore"}, "label_conflicts is 'ignore'"),
    ]:
        with pytest.raises(ValueError, match=message):
            DatasetBuilder(tmp_path, **options)


def with_conflicts(make_images):
    root = make_images({"Train/a": 20, "Train/b": 20, "Test/a": 4, "Test/b": 8})
    for i in range(6):
        shutil.copy(root / f"Train/a/{i:04d}.png", root / f"Test/b/copy{i}.png")
    shutil.copy(root / "Train/a/0010.png", root / "Train/a/again.png")  # no contradiction
    return root


def test_contradictory_labels_are_kept_dropped_or_an_error(make_images):
    root = with_conflicts(make_images)
    assert len(build(root)[1]) == 59
    _, dropped = build(root, label_conflicts="drop")
    assert len(dropped) == 47
    assert dropped.groupby("picture")["class"].nunique().max() == 1
    assert "Train/a/again.png" in set(dropped["path"])
    with pytest.raises(ValueError, match=r"12 images .* such as .*Train/a/0000\.png"):
        build(root, label_conflicts="error")


def test_images_keep_their_pixels_when_others_are_left_out(make_images):
    root = with_conflicts(make_images)
    whole, _ = build(root)
    part, metadata = build(root, label_conflicts="drop")
    for path in metadata["path"]:
        assert np.array_equal(shown(whole, path), shown(part, path))


def test_splits_by_folders_take_validation_out_of_train_and_report_leakage(make_images):
    root = with_conflicts(make_images)
    with pytest.warns(UserWarning, match=r"leakage: 6 groups .* 12 images"):
        splits, metadata = build(root, split_by="folders")
    of_test = metadata["source_split"] == "Test"
    assert (metadata["split"][of_test] == "test").all()
    assert set(metadata["split"][~of_test]) == {"train", "valid"}
    assert len(splits["valid"]) == pytest.approx(41 * 0.2 / 0.9, abs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(root, split_by="folders", label_conflicts="drop")


def test_a_validation_folder_is_taken_as_it_is(make_images):
    root = make_images({f"{s}/{c}": 3 for s in ("train", "VAL", "Test") for c in "ab"})
    splits, metadata = build(root, split_by="folders")
    assert {name: len(split) for name, split in splits.items()} == dict.fromkeys(splits, 6)
    assert (metadata["split"] == metadata["source_split"].str.lower().replace("val", "valid")).all()
    with pytest.raises(ValueError, match="is in no folder named Train"):
        build(make_images({"a": 3, "b": 3}, name="plain"), split_by="folders")
    untested = make_images({"Train/a": 3, "Train/b": 3}, name="untested")
    with pytest.raises(ValueError, match="no folder for the test split"):
        build(untested, split_by="folders")


def test_an_earlier_table_of_splits_gives_the_same_splits(make_images, tmp_path):
    root = make_images({"a": 20, "b": 20})
    _, first = build(root)
    path = write(tmp_path / "splits.csv", first.sample(frac=1, random_state=0))
    splits, again = build(root, splits_csv=path, seed=7)
    assert again["split"].tolist() == first["split"].tolist()
    assert list(splits) == ["train", "valid", "test"]
    (root / "a/0000.png").unlink()
    with pytest.warns(UserWarning, match="1 of its images are not here"):
        build(root, splits_csv=path)


def test_classes_of_fewer_groups_than_folds_are_warned_of():
    sizes = {"common": 20, "rare": 3, "lone": 1}
    names = np.repeat(list(sizes), list(sizes.values()))
    metadata = pd.DataFrame({"class": names, "label": pd.factorize(names)[0], "group": range(24)})
    message = r"classes with fewer groups than k=5: lone \(1 group\), rare \(3 groups\);"
    with pytest.warns(UserWarning, match=message) as caught:
        k_fold_splits(metadata, 5)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        k_fold_splits(metadata[metadata["class"] == "common"], 5)
    with pytest.warns(UserWarning, match=r"k=2: 7 \(1 group\);"):
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
        with pytest.raises(ValueError, match="k is"):
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


# ---------------------------------------------------------------------------- data sets, loaders


@pytest.fixture
def splits(make_images):
    return build(make_images({"a": 40, "b": 20, "c": 10}))[0]


def test_an_item_is_a_float_image_and_a_label(splits):
    train = splits["train"]
    image, label = train[3]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    stored = torch.from_numpy(train.gather([3])[0])
    assert torch.equal(image, stored.permute(2, 0, 1) / 255)
    assert label == train.labels[3] == train.classes.index(train.metadata["class"][3])


def test_a_copy_in_another_process_opens_the_array_again(splits):
    train = splits["train"]
    train[0]
    assert len(pickle.dumps(train)) < train.gather(np.arange(len(train))).nbytes
    assert torch.equal(pickle.loads(pickle.dumps(train))[5][0], train[5][0])
    alone = list(DataLoader(train, batch_size=8))
    for context in ("fork", "spawn"):
        helped = list(
            DataLoader(train, batch_size=8, num_workers=1, multiprocessing_context=context)
        )
        assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, helped, strict=True))


def test_an_epoch_shows_each_image_once(splits):
    loaders = create_dataloaders(splits, batch_size=16, device="cpu", augmentation=False)
    train = splits["train"]
    batches = list(loaders["train"])
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 1]
    assert len(loaders["train"]) == 4
    expected = sorted(train[i][0].sum().item() for i in range(len(train)))
    assert sorted(torch.cat([x for x, _ in batches]).sum((1, 2, 3)).tolist()) == pytest.approx(
        expected, rel=1e-5
    )
    valid = torch.cat([labels for _, labels in loaders["valid"]])
    assert valid.tolist() == splits["valid"].labels.tolist()  # in order


def take(stream, count):
    return [next(stream) for _ in range(count)]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_batch_k_depends_on_the_seed_and_k_alone(splits, balanced):
    def loader(**options):
        return create_dataloaders(splits, 8, device="cpu", balanced=balanced, **options)["train"]

    first = take(loader().batches(), 20)
    assert {images.shape for images, _ in first} == {(8, 3, 16, 16)}
    used = loader()
    list(used)  # an epoch before changes nothing
    assert same(take(used.batches(start=13), 7), first[13:])
    assert same(take(loader(num_workers=2).batches(), 6), first[:6])
    assert not same(take(loader(seed=7).batches(), 20), first)
    images = torch.cat([images for images, _ in first])
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images)  # every view is its own


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_cut_the_batches_that_one_would_have(splits, balanced, world_size):
    def streams(batch_size, **place):
        options = {"device": "cpu", "balanced": balanced} | place
        loader = create_dataloaders(splits, batch_size, **options)["train"]
        return take(loader.batches(start=2), 8)

    whole = streams(4 * world_size)
    parts = [streams(4, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [
        tuple(map(torch.cat, zip(*pieces, strict=True))) for pieces in zip(*parts, strict=True)
    ]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole, joined, strict=True))
    # Views and all: nothing but the mean of an image may be added up in another order.
    assert all(torch.allclose(a[0], b[0], atol=1e-6) for a, b in zip(whole, joined, strict=True))


@given(world_size=st.integers(1, 9), batch_size=st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_each_image_of_an_epoch_goes_to_exactly_one_process(splits, world_size, batch_size):
    options = {"device": "cpu", "world_size": world_size}
    loaders = [
        create_dataloaders(splits, batch_size, rank=rank, **options) for rank in range(world_size)
    ]
    for name, split in splits.items():
        batches = [list(loader[name]) for loader in loaders]
        assert [len(loader[name]) for loader in loaders] == [len(part) for part in batches]
        labels = [labels for part in batches for _, labels in part]
        assert sorted(torch.cat(labels).tolist()) == sorted(split.labels.tolist())
    # What is not shuffled comes in order, so that the results can be put together again.
    images = torch.cat(
        [images for part in (list(o["valid"]) for o in loaders) for images, _ in part]
    )
    valid = splits["valid"]
    assert torch.equal(images, torch.stack([valid[i][0] for i in range(len(valid))]))


def test_images_that_lie_on_the_device_are_those_in_the_array(splits):
    train, indices = splits["train"], np.array([5, 0, 48, 5])
    kept = dataset._OnDevice(train, torch.device("cpu"))[indices]
    assert same([kept], [dataset._Gatherer(train)[indices]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_batches_on_the_gpu_are_those_on_the_cpu(splits, monkeypatch, share):
    monkeypatch.setattr(dataset, "SHARE_OF_GPU_FOR_IMAGES", share)  # 0: from pinned memory
    streams = [create_dataloaders(splits, 8, device=d)["train"].batches() for d in ("cpu", "cuda")]
    for (images, labels), (on_gpu, labels_on_gpu) in zip(
        *(take(s, 6) for s in streams), strict=True
    ):
        assert on_gpu.device.type == labels_on_gpu.device.type == "cuda"
        assert torch.equal(labels, labels_on_gpu.cpu())
        assert torch.allclose(images, on_gpu.cpu(), atol=1e-4)


def test_loaders_leave_the_global_random_state_alone(splits):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loaders = create_dataloaders(splits, 8, device="cpu", balanced=True, num_workers=1)
    take(loaders["train"].batches(), 3)
    list(loaders["train"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_only_the_training_split_is_augmented(splits):
    loaders = create_dataloaders(splits, 1, device="cpu")
    for number, (image, _) in enumerate(loaders["valid"]):
        assert torch.equal(image[0], splits["valid"][number][0])
    originals = {splits["train"][i][0].numpy().tobytes() for i in range(len(splits["train"]))}
    assert not any(image.numpy().tobytes() in originals for image, _ in loaders["train"])


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
def test_balanced_epochs_draw_what_they_should(make_images, sizes):
    counts = dict(zip("abc", sizes, strict=True))
    splits, _ = build(make_images(counts, size=8), image_size=8, splits={"train": 1.0})
    loader = LesionLoader(splits["train"], 50, shuffle=True, balanced=True, device="cpu")
    drawn = np.concatenate([loader._order(epoch) for epoch in range(4)])
    expected = balanced_frequencies(splits["train"].labels)
    times = np.bincount(drawn, minlength=len(expected))
    assert (np.abs(times - 4 * expected) <= 4).all()
    by_class = np.bincount(splits["train"].labels, weights=times)
    wanted = np.bincount(splits["train"].labels, weights=4 * expected)
    assert np.abs(by_class - wanted).max() <= 8


def test_mistakes_in_loaders_are_said(splits):
    with pytest.raises(ValueError, match="batch_size is 0"):
        create_dataloaders(splits, batch_size=0)
    with pytest.raises(ValueError, match="num_workers is -1"):
        create_dataloaders(splits, num_workers=-1)
    with pytest.raises(ValueError, match="seed is -1"):
        create_dataloaders(splits, seed=-1)
    with pytest.raises(ValueError, match="rank is 2"):
        create_dataloaders(splits, rank=2, world_size=2)


def test_a_split_without_images_is_named(make_images):
    with pytest.warns(UserWarning, match="not every split"):
        splits, _ = build(make_images({"a": 1, "b": 1}))
    with pytest.raises(ValueError, match="no images are left for valid, test"):
        create_dataloaders(splits)
