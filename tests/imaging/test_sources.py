"""Folders and tables become one table with a row for each image."""

import os
import shutil
import warnings

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import DatasetBuilder
from imaging import sources, splits
from imaging.sources import Reader, find_images


def build(root, **options):
    return DatasetBuilder(root, image_size=16, **options).build()


def write(path, table):
    pd.DataFrame(table).to_csv(path, index=False)
    return path


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


def test_hidden_files_and_files_of_other_kinds_are_ignored(make_images):
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
    with pytest.raises(ValueError, match="loose.png is not in a class folder"):
        find_images(stray)


def test_labels_from_a_table_override_those_of_the_folders(make_images, tmp_path):
    root = make_images({"a": 12, "b": 12})
    labels = write(tmp_path / "l.csv", {"path": ["a/0000.png", "b/0003.png"], "class": ["b", "c"]})
    with pytest.warns(UserWarning, match=r"c \(1 images\) is not in valid, test"):
        _, metadata = build(root, labels_csv=labels)
    found = metadata.set_index("path")["class"]
    assert (found["a/0000.png"], found["b/0003.png"]) == ("b", "c")
    assert found.drop(["a/0000.png", "b/0003.png"]).value_counts().to_dict() == {"a": 11, "b": 11}


def test_a_table_says_how_much_of_it_was_used(make_images, tmp_path):
    root = make_images({"a": 12, "b": 12})
    labels = write(tmp_path / "l.csv", {"path": ["a/0000.png", "a/00005.png"], "class": ["b", "b"]})
    with pytest.warns(UserWarning) as caught:
        build(root, labels_csv=labels)
    (said,) = [str(w.message) for w in caught if "l.csv" in str(w.message)]
    assert said == (
        f"{labels}: 1 of its 2 rows used, for 1 of 24 images, matched by path; 1 rows match no "
        "image, such as a/00005.png (nearest: b/0005.png); 23 images have no row, such as "
        "a/0001.png (nearest: a/00005.png)"
    )
    write(labels, {"image_id": ["0000", "0001"], "class": ["b", "b"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # corrections need not be of all images
        prepared = DatasetBuilder(root, image_size=16, labels_csv=labels).prepare()
    used = "2 of its 2 rows used, for 4 of 24 images, matched by image_id; 20 images have no row"
    assert [used in line for line in prepared.images.tables] == [True]


def test_images_without_metadata_are_warned_of_with_an_example(make_images, tmp_path):
    root = make_images({"a": 12, "b": 12})
    rows = {"image_id": ["a/0000", "a/0001", None], "age": [1, 2, 3]}
    table = write(tmp_path / "m.csv", rows)
    with pytest.warns(UserWarning, match=r"2 of its 3 rows used, for 2 of 24 images") as caught:
        build(root, metadata_csv=table)
    said = [str(warning.message) for warning in caught]
    (line,) = [line for line in said if "m.csv" in line]
    assert "1 rows match no image, such as one without a name; 22 images have no row" in line


@pytest.mark.parametrize(
    ("written", "meant"),
    [("train", "train"), ("Val", "valid"), (" validation ", "valid"), ("TEST", "test")],
)
def test_the_names_of_splits_in_a_table(make_images, tmp_path, written, meant):
    paths = [f"{c}/{i:04d}.png" for c in "ab" for i in range(4)]
    others = {"path": paths, "split": ["train", "test", "valid", written] * 2}
    options = {"splits_csv": write(tmp_path / "s.csv", others)}
    _, metadata = build(make_images({"a": 4, "b": 4}), **options)
    assert metadata["split"].tolist() == ["train", "test", "valid", meant] * 2
    write(tmp_path / "s.csv", {"path": paths, "split": ["train", "holdout"] * 4})
    with pytest.raises(ValueError, match=r"'holdout' for 4 images, such as a/0001\.png; .* train"):
        DatasetBuilder(tmp_path / "raw", **options).list_images()


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
    with pytest.raises(ValueError, match=r"no class for 1 of 20 images, such as 0000\.png"):
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


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"path": ["x.png"], "class": ["a"]}, {"labels_csv": 1}, "no row matches an image"),
        (
            {"path": ["a/0000.png"] * 2, "class": ["a", "b"]},
            {"labels_csv": 1},
            r"rows for a/0000\.png contradict each other: class is 'a' and 'b'",
        ),
        ({"path": [], "class": []}, {"labels_csv": 1}, "has no rows"),
        ({"path": ["a/0000.png"]}, {"labels_csv": 1}, "no column class; its columns are path"),
        (
            {"name": ["lesion 1"], "class": ["a"]},
            {"labels_csv": 1},
            r"its column name has values like 'lesion 1', but .* like 'a/0000\.png'",
        ),
        (
            {"path": ["a/0000.png"]},
            {"metadata_csv": 1, "group_by": ["lesion_id"]},
            "no column lesion_id",
        ),
        ({"path": ["a/0000.png"], "split": [None]}, {"splits_csv": 1}, "no image has a split"),
    ],
)
def test_tables_that_do_not_fit_are_refused(make_images, tmp_path, table, options, message):
    root = make_images({"a": 4, "b": 4})
    path = write(tmp_path / "t.csv", table)
    options = {name: path if value == 1 else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        build(root, **options)
    assert not (root.parent / "processed").exists() or "splits_csv" in options


def test_rows_that_match_no_image_may_have_any_values(make_images, tmp_path):
    root = make_images({"a": 4, "b": 4})
    rows = {"path": ["a/0000.png", "x.png", "x.png"], "age": [60, 1, 2]}
    _, metadata = build(root, metadata_csv=write(tmp_path / "t.csv", pd.DataFrame(rows)))
    assert metadata["age"].dropna().tolist() == ["60"]


def test_files_that_are_not_tables_are_refused(make_images, tmp_path):
    root = make_images({"a": 4, "b": 4})
    with pytest.raises(FileNotFoundError, match="gone.csv"):
        build(root, labels_csv=tmp_path / "gone.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(ValueError, match="binary.csv"):
        build(root, labels_csv=tmp_path / "binary.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="empty.csv"):
        build(root, labels_csv=tmp_path / "empty.csv")


def read_index(folder):
    """Reads a made-up layout: a list of files, diagnoses and lesions beside a folder of images."""
    index = pd.read_csv(folder / "index.txt", sep=";", dtype=str)
    return pd.DataFrame(
        {
            "lesion": index["lesion"],
            "path": "files/" + index["file"],
            "class": index["diagnosis"],
            "source_split": "",
            "width": index["width in mm"],
        }
    )


@pytest.fixture
def indexed(make_images, monkeypatch):
    reader = Reader(lambda folder: (folder / "index.txt").is_file(), read_index)
    monkeypatch.setitem(sources.READERS, "index", reader)
    root = make_images({"files": 12})
    names = [f"{i:04d}.png" for i in reversed(range(12))]
    index = pd.DataFrame({"file": names, "diagnosis": ["mel", "nv"] * 6, "width in mm": range(12)})
    index.assign(lesion=["x", "y", "z"] * 4).to_csv(root / "index.txt", sep=";", index=False)
    return root


def test_a_reader_of_another_layout_is_added_from_outside(indexed):
    _, metadata = build(indexed, group_by=["lesion"])
    assert metadata["path"].tolist() == [f"files/{i:04d}.png" for i in range(12)]
    assert metadata["class"].tolist() == ["nv", "mel"] * 6
    assert metadata["width"].tolist() == [40] * 12
    assert metadata["width_given"].tolist() == [str(i) for i in reversed(range(12))]
    assert metadata.groupby("lesion")["split"].nunique().max() == 1
    images = DatasetBuilder(indexed).list_images()
    assert images.columns.tolist() == ["path", "class", "source_split"]


def test_tables_add_to_and_correct_what_a_reader_gives(indexed, tmp_path):
    names = [f"{i:04d}" for i in range(12)]
    table = write(tmp_path / "t.csv", {"image_id": names, "age": range(12), "class": ["a"] * 12})
    labels = write(tmp_path / "l.csv", {"image_id": names[:6], "class": ["bcc"] * 6})
    _, metadata = build(indexed, metadata_csv=table, labels_csv=labels, group_by=["lesion", "age"])
    assert metadata["class"].tolist() == ["bcc"] * 6 + ["nv", "mel"] * 3
    assert metadata.columns.tolist()[-4:] == ["lesion", "width_given", "age", "class_given"]
    write(table, {"image_id": names, "lesion": [f"own {i}" for i in range(12)]})
    _, metadata = build(indexed, metadata_csv=table)
    assert metadata["lesion"].str.startswith("own").all()  # the user's table counts
    write(table, {"image_id": names, "width": range(12), "width_given": range(12)})
    with pytest.raises(ValueError, match=r"t\.csv: two columns would be called width_given"):
        build(indexed, metadata_csv=table)
    with pytest.raises(ValueError, match="group_by: no column patient; give its table"):
        build(indexed, group_by=["patient"])


@pytest.mark.parametrize("column", ["path", "class", "source_split"])
def test_a_reader_that_leaves_something_out_is_named(indexed, monkeypatch, column):
    reader = Reader(lambda folder: True, lambda folder: read_index(folder).drop(columns=column))
    monkeypatch.setitem(sources.READERS, "half an index", reader)
    with pytest.raises(
        ValueError, match=f"the reader of half an index returned images without {column}"
    ):
        build(indexed)


# ---------------------------------------------------------------------------- splits of folders


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("Train", "Valid", "Test"),
        ("training_set", "val", "testing"),
        ("outer/TRAIN", "outer/dev", "outer/test"),
        ("test/a set/trainset", "test/a set/devset", "test/a set/testset"),  # all are in "test"
        ("ISIC-2017_Training_Data", "ISIC-2017_Validation_Data", "ISIC-2017_Test_v2_Data"),
        ("2019/train images", "2019/validation images", "2020/test images"),
        ("Train/test", "validation", "test/train"),  # the outer one counts
    ],
)
def test_folders_of_any_level_and_of_the_usual_names_give_the_splits(
    make_images, train, valid, test
):
    counts = {f"{folder}/{name}": 4 for folder in (train, valid, test) for name in ("mel", "nv")}
    root = make_images(counts)
    _, metadata = build(root, split_by="folders")
    expected = {f"{train}": "train", f"{valid}": "valid", f"{test}": "test"}
    assert metadata["split"].tolist() == metadata["source_split"].map(expected).tolist()
    assert splits.has_folder_of_split(root, "valid")


def test_a_missing_validation_split_is_taken_out_of_a_training_set_of_any_level(make_images):
    root = make_images({f"x/{s}/{c}": 9 for s in ("training_set", "test_set") for c in "ab"})
    assert not splits.has_folder_of_split(root, "valid")
    _, metadata = build(root, split_by="folders")
    counts = metadata.groupby(["source_split", "split"]).size()
    assert counts["x/test_set"].to_dict() == {"test": 18}
    assert set(counts["x/training_set"].index) == {"train", "valid"}


folders = st.text(st.sampled_from("ab/_ "), min_size=1, max_size=5).map(lambda name: name + "x")


@given(st.lists(folders, min_size=2, max_size=5, unique=True), st.data())
def test_no_folder_of_another_name_is_a_split(names, data):
    assert splits.split_of_folder(pd.Series(names, dtype=object)).isna().all()
    place = data.draw(st.integers(0, len(names) - 1))
    with_split = [f"{name}/Test" if i == place else name for i, name in enumerate(names)]
    found = splits.split_of_folder(pd.Series(with_split, dtype=object))
    assert found.fillna("").tolist() == ["test" if i == place else "" for i in range(len(names))]
