"""Names of classes: spellings of one class, under the commonest of them."""

import warnings

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import DatasetBuilder
from imaging.classes import class_key, unify_class_names
from imaging.sources import find_images

names = st.text(st.sampled_from("aAbBéÉ12 -_\u2013"), min_size=1, max_size=6)
SEPARATORS = st.text(st.sampled_from(" -_"), max_size=2)


def unify(names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return unify_class_names(pd.Series(names, dtype=object)).tolist()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Melanoma", "melanoma "),
        ("basal cell carcinoma", "Basal-Cell_carcinoma"),
        ("basal cell carcinoma", "BasalCellCarcinoma"),
        ("NÉVUS", "ne\u0301vus"),
        ("stage-1", "Stage 1"),
        ("grade 1-2", "Grade_1_2"),
    ],
)
def test_spellings_of_one_class(first, second):
    assert class_key(first) == class_key(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [("nevus", "nevi"), ("1", "-1"), ("1-2", "12"), ("1", "01"), ("1", "1.0"), ("-", "_"),
     ("mel", "mel+"), ("nevus", "névus")],
)  # fmt: skip
def test_names_of_two_classes(first, second):
    assert class_key(first) != class_key(second)


@given(
    words=st.lists(st.text(st.characters(categories=["L"])), min_size=1, max_size=3), data=st.data()
)
def test_separators_and_case_make_no_class(words, data):
    written = [data.draw(SEPARATORS) + word for word in words]
    spelling = "".join(written) + data.draw(SEPARATORS)
    if "".join(words):
        assert class_key(spelling) == class_key("".join(words))
        assert class_key(class_key(spelling)) == class_key(spelling)


@given(st.lists(names, max_size=12))
def test_every_class_keeps_its_commonest_spelling(given_names):
    found = unify(given_names)
    counts = pd.Series(given_names, dtype=object).value_counts()
    for before, after in zip(given_names, found, strict=True):
        assert class_key(before) == class_key(after)
        same = [name for name in counts.index if class_key(name) == class_key(after)]
        assert counts[after] == counts[same].max()
    assert len(set(found)) == len({class_key(name) for name in given_names})
    assert unify(found) == found
    assert unify(given_names[::-1]) == found[::-1]


def test_a_name_that_is_written_in_one_way_stays_as_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = unify_class_names(pd.Series(["mel ", "NV", "mel ", None], dtype=object))
    assert found.tolist() == ["mel ", "NV", "mel ", None]


def test_folders_that_differ_by_case_are_one_class_and_said_in_one_line(make_images):
    root = make_images({"Train/melanoma": 3, "Test/Melanoma": 1, "Train/b": 2, "Test/B ": 1})
    with pytest.warns(UserWarning) as caught:
        images = find_images(root)
    assert images["class"].value_counts().to_dict() == {"melanoma": 4, "b": 3}
    (warning,) = caught
    assert str(warning.message) == (
        "names that differ only by case, spaces, hyphens or underscores are one class: "
        "'B ' (1 images) as 'b' (2); 'Melanoma' (1 images) as 'melanoma' (3)"
    )


def test_folders_of_one_class_written_in_two_ways_are_not_two_classes(make_images):
    root = make_images({"nevus": 3, "Nevus": 1})
    with (
        pytest.warns(UserWarning, match="one class"),
        pytest.raises(ValueError, match="all images are of one class, nevus"),
    ):
        find_images(root)


def test_labels_of_a_table_join_the_folders_classes(make_images, tmp_path):
    root = make_images({"melanoma": 12, "nevus": 12})
    table = tmp_path / "l.csv"
    table.write_text("path,class\nnevus/0000.png,Melanoma \nnevus/0001.png,MELANOMA\n")
    builder = DatasetBuilder(root, image_size=16, labels_csv=table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        builder.list_images()  # the run that follows warns
    with pytest.warns(UserWarning) as caught:
        _, metadata = builder.build()
    assert metadata["class"].value_counts().to_dict() == {"melanoma": 14, "nevus": 10}
    assert len([w for w in caught if "are one class" in str(w.message)]) == 1


def test_a_space_at_the_end_of_every_third_label_makes_no_class(make_images, tmp_path):
    root = make_images({"all": 30})
    rows = [f"{i:04d},{'mel' if i % 2 else 'nv'}{' ' * (i % 3 == 0)}" for i in range(30)]
    table = tmp_path / "m.csv"
    table.write_text("\n".join(["image_id,dx", *rows]))
    builder = DatasetBuilder(root, image_size=16, metadata_csv=table, label_column="dx")
    with pytest.warns(UserWarning, match=r"'mel ' \(5 images\) as 'mel' \(10\)"):
        _, metadata = builder.build()
    assert metadata["class"].value_counts().to_dict() == {"mel": 15, "nv": 15}
