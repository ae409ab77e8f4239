"""Labels in the shapes that tables have them, and other names for classes."""

import warnings

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import DatasetBuilder
from imaging.labels import labels_of_rows, read_class_map, rename_classes

ISIC_2019 = {
    "image": ["ISIC_0", "ISIC_1", "ISIC_2"],
    "MEL": ["0.0", "1.0", "0.0"],
    "NV": ["1.0", "0.0", "0.0"],
    "BCC": ["0.0", "0.0", "1.0"],
    "UNK": ["0.0", "0.0", "0.0"],
    "score_weight": ["1.0", "0.0", "1.0"],
}


def labels(table, *columns, **options):
    found = labels_of_rows(pd.DataFrame(table, dtype=object), "t.csv", columns, **options)
    return [None if pd.isna(label) else label for label in found]


def test_one_hot_columns_are_found_without_being_named():
    assert labels(ISIC_2019) == ["NV", "MEL", "BCC"]
    assert labels(ISIC_2019, "MEL", "NV", "BCC") == ["NV", "MEL", "BCC"]


def test_a_row_of_no_class_is_unlabelled_or_of_the_one_that_is_left():
    table = {
        "image_id": ["a", "b", "c"],
        "melanoma": ["1.0", "0.0", "0.0"],
        "seborrheic_keratosis": ["0.0", "1.0", "0.0"],
    }
    assert labels(table) == ["melanoma", "seborrheic_keratosis", None]
    columns = ("melanoma", "seborrheic_keratosis")
    assert labels(table, *columns, otherwise="nevus")[2] == "nevus"


def test_a_row_of_two_classes_is_an_error_that_names_both():
    table = ISIC_2019 | {"NV": ["1", "1", "0"]}
    with pytest.raises(ValueError, match=r"t\.csv: row 3 is of several classes, MEL, NV"):
        labels(table)


@pytest.mark.parametrize(
    ("column", "values", "found"),
    [
        ("malignant", ["True", "False", "true"], ["malignant", "benign", "malignant"]),
        ("melanoma", ["1", "0", "0"], ["melanoma", "not melanoma", "not melanoma"]),
        ("target", ["1", "0", "1"], ["1", "0", "1"]),  # what it says, it says of nothing known
        ("dx", ["0", "1", None], ["0", "1", None]),
    ],
)
def test_true_and_false_are_of_the_diagnosis_that_the_column_is_called(column, values, found):
    assert labels({"id": list("abc"), column: values}, column) == found


def test_numbers_become_the_names_of_classes():
    table = {"id": list("abc"), "label": ["2", "0", "1.0"]}
    assert labels(table, "label", class_names=["nv", "mel", "bcc"]) == ["bcc", "nv", "mel"]
    with pytest.raises(ValueError, match=r"label is '2', but with 2 .* from 0 to 1"):
        labels(table, "label", class_names=["nv", "mel"])


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6))
def test_a_label_is_always_one_of_the_columns_that_are_true(rows):
    table = {name: [str(int(row[i])) for row in rows] for i, name in enumerate("abc")}
    if any(sum(row) > 1 for row in rows):
        with pytest.raises(ValueError, match="several classes"):
            labels(table, "a", "b", "c")
        return
    for row, label in zip(rows, labels(table, "a", "b", "c"), strict=True):
        assert label == ("abc"[row.index(True)] if any(row) else None)


# ---------------------------------------------------------------------------- other names


def test_a_class_map_renames_merges_and_leaves_out(tmp_path):
    (tmp_path / "map.csv").write_text("old,new\nMEL,malignant\nbcc,malignant\nnv,benign\nunk,\n")
    class_map = read_class_map([str(tmp_path / "map.csv")])
    assert class_map == read_class_map(["MEL=malignant", "bcc=malignant", "nv=benign", "unk="])
    renamed = rename_classes(pd.Series(["mel", "BCC", "nv", "UNK", "df"]), class_map)
    assert renamed.fillna("none").tolist() == ["malignant", "malignant", "benign", "none", "df"]


def test_a_class_map_of_unknown_classes_or_two_answers_is_refused():
    with pytest.raises(ValueError, match=r"there is no class 'melanom'; did you mean melanoma\?"):
        rename_classes(pd.Series(["melanoma", "nevus"]), {"melanom": "malignant"})
    with pytest.raises(ValueError, match="renames 'mel' to 'a' and to 'b'"):
        read_class_map(["mel=a", "mel=b"])
    with pytest.raises(ValueError, match="form old=new, not 'mel'"):
        read_class_map(["mel", "nv=benign"])


def test_a_class_map_holds_for_folders_and_says_what_was_left_out(make_images):
    root = make_images({"mel": 12, "Mel_": 2, "bcc": 6, "nv": 12, "unknown": 3})
    class_map = {"mel": "malignant", "bcc": "malignant", "nv": "benign", "unknown": ""}
    builder = DatasetBuilder(root, image_size=16, class_map=class_map)
    with pytest.warns(UserWarning, match="are one class"):
        prepared = builder.prepare()
    counts = prepared.metadata["class"].value_counts().to_dict()
    assert counts == {"malignant": 20, "benign": 12}
    assert prepared.images.left_out == {"class left out by --class_map": 3}
    with pytest.raises(ValueError, match="all images are of one class, lesion"):
        DatasetBuilder(root, class_map=dict.fromkeys(class_map, "lesion")).list_images()


# ---------------------------------------------------------------------------- in a data set


def test_a_flat_folder_trains_from_one_hot_columns_alone(make_images, tmp_path):
    root = make_images({"all": 30})
    names = [f"{i:04d}" for i in range(30)]
    kinds = {name: [str(float(i % 3 == k)) for i in range(30)] for k, name in enumerate("xyz")}
    table = tmp_path / "GroundTruth.csv"
    pd.DataFrame({"image": names} | kinds | {"UNK": "0.0"}).to_csv(table, index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits, metadata = DatasetBuilder(root / "all", image_size=16, labels_csv=table).build()
    assert splits["train"].classes == ["x", "y", "z"]
    assert metadata["class"].tolist() == list("xyz") * 10


def test_a_column_class_labels_images_that_are_in_no_folders(make_images, tmp_path):
    root = make_images({"all": 20})
    table = tmp_path / "l.csv"
    rows = {"image_id": [f"{i:04d}" for i in range(20)], "class": ["nv", "mel"] * 10}
    pd.DataFrame(rows).to_csv(table, index=False)
    images = DatasetBuilder(root / "all", labels_csv=table).list_images()
    assert images["class"].tolist() == ["nv", "mel"] * 10


def test_images_without_a_label_are_left_out_on_request(make_images, tmp_path):
    root = make_images({"all": 24})
    for i in range(3):
        (root / f"all/{i:04d}.png").rename(root / f"all/{i + 3:04d}_superpixels.png")
    (root / "all/0003.png").rename(root / "all/0004_segmentation.png")
    table = tmp_path / "l.csv"
    rows = {"image_id": [f"{i:04d}" for i in range(5, 24)], "class": (["nv", "mel"] * 10)[:19]}
    pd.DataFrame(rows).to_csv(table, index=False)
    options = {"image_size": 16, "labels_csv": table}
    with pytest.raises(ValueError, match=r"no class for 5 of 24 .*; .* --unlabelled drop"):
        DatasetBuilder(root / "all", **options).list_images()
    prepared = DatasetBuilder(root / "all", unlabelled="drop", **options).prepare()
    assert prepared.images.left_out == {
        "no label (superpixels)": 3, "no label (masks)": 1, "no label (other images)": 1,
    }  # fmt: skip
    assert len(prepared.metadata) == 19


def test_a_flat_test_folder_beside_the_classes_is_unlabelled(make_images):
    root = make_images({"train/mel": 8, "train/nv": 8, "test": 5})
    with pytest.raises(ValueError, match=r"do not look like classes \(test: a split\)"):
        DatasetBuilder(root).list_images()
    builder = DatasetBuilder(root, image_size=16, unlabelled="drop")
    assert sorted(builder.list_images()["class"].unique()) == ["mel", "nv"]
    assert builder.prepare().images.left_out == {"no label (other images)": 5}
