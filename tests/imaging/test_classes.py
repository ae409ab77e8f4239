"""Names of classes: spellings of one class, under the commonest of them."""

import warnings

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset import DatasetBuilder
from imaging.audit import summarise
from imaging.classes import class_key, find_implausible_classes, unify_class_names
from imaging.lesions import DIAGNOSES
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


# ---------------------------------------------------------------------------- names of no class


def refused(root):
    with pytest.raises(ValueError, match="do not look like classes") as caught:
        DatasetBuilder(root, image_size=16).list_images()
    return str(caught.value)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"train/mel": 3, "train/nv": 2, "test": 4}, "(test: a split)"),
        ({"train/images": 3, "train/masks": 3}, "(images: images of any class; masks: masks)"),
        ({f"imgs_part_{i}": 2 for i in (1, 2, 3)},
         "(imgs_part_1, imgs_part_2, imgs_part_3: a part of a set)"),
        ({"HAM10000_images_part_1": 2, "nv": 2}, "(HAM10000_images_part_1: a part of a set)"),
        ({"ISIC2018_Task3_Training_Input": 2, "ISIC2018_Task3_Validation_Input": 2},
         "(ISIC2018_Task3_Training_Input, ISIC2018_Task3_Validation_Input: a split)"),
        ({"melanoma": 2, "nevus": 2, "Superpixels": 2}, "(Superpixels: masks)"),
        ({"mel": 2, "HAM10000_segmentations_lesion_tschandl": 2}, "lesion_tschandl: masks)"),
        ({"testSet": 2, "Validation images": 2, "x": 2}, "(Validation images, testSet: a split)"),
    ],
)  # fmt: skip
def test_folders_that_are_no_classes_are_an_error_that_names_the_flag(make_images, counts, said):
    message = refused(make_images(counts))
    assert said in message and "--accept_class_names" in message


def test_the_error_says_what_was_understood(make_images):
    message = refused(make_images({"train/mel": 3, "train/nv": 2, "test": 4}))
    assert "raw: the 3 classes were understood as test (4), mel (3), nv (2), but" in message


@pytest.mark.parametrize(
    "name",
    sorted({n for d in DIAGNOSES for n in (d.name, *d.spellings)} | {"1", "a", "other", "0"}),
)
def test_no_diagnosis_is_taken_for_something_else(name):
    table = pd.DataFrame({"path": ["x.jpg", "y.jpg"] * 2, "class": [name, name, "nv2", "nv2"]})
    assert find_implausible_classes(table) == {}


def test_a_class_of_masks_of_others_is_none(make_images):
    root = make_images({"melanoma": 3, "nevus": 2, "drawn": 3})
    for number, ending in enumerate(("_mask", "_segmentation", "-Seg")):
        (root / f"drawn/{number:04d}.png").rename(root / f"drawn/{number:04d}{ending}.png")
    assert "(drawn: masks)" in refused(root)
    (root / "drawn/0000_mask.png").rename(root / "drawn/0077_mask.png")  # of no image
    assert len(DatasetBuilder(root, image_size=16).list_images()) == 8


def test_classes_of_a_single_image_by_the_hundred_are_none():
    paths = [f"{i}/x.png" for i in range(300)]
    for singles, others, are_found in [(300, 0, True), (20, 10, True), (19, 1, False),
                                       (20, 20, False), (100, 100, True)]:  # fmt: skip
        names = [f"p{i}" for i in range(singles)] + [f"c{i}" for i in range(others)] * 2
        table = pd.DataFrame({"path": [paths[i % 300] for i in range(len(names))], "class": names})
        found = find_implausible_classes(table)
        assert found == (dict.fromkeys(names[:singles], "a single image") if are_found else {})


def test_what_is_accepted_is_built_and_no_finding(make_images):
    root = make_images({"images": 12, "melanoma": 12})
    with pytest.raises(ValueError, match="accept_class_names=True"):
        DatasetBuilder(root, image_size=16).build()
    builder = DatasetBuilder(root, image_size=16, accept_class_names=True)
    _, metadata = builder.build()
    assert metadata["class"].value_counts().to_dict() == {"images": 12, "melanoma": 12}
    assert "class name" not in set(builder.audit()["kind"])


def test_the_audit_finds_them(make_images):
    root = make_images({"train/melanoma": 12, "train/nevus": 12, "test": 12})
    findings = DatasetBuilder(root, image_size=16).audit()
    (found,) = findings[findings["kind"] == "class name"].itertuples()
    assert set(found.classes) == {"test"} and len(found.images) == 12
    assert "unless --accept_class_names says so: 1 (test)" in summarise(findings)
