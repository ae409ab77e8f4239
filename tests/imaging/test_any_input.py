"""Folders and tables of any names and contents: understood or refused, never made up."""

import os
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dataset import DatasetBuilder

FOLDERS = (
    "mel", "Mel", "mel ", "nv", "n-v", "n_v", "Train", "test", "val", "images", "masks", "bcc",
    "imgs_part_1", "ISIC_2019_Training_Input", "né", "ne\u0301", "..x", "a=b", "0", "1", "true",
)  # fmt: skip
FILES = (
    "ISIC_1.jpg", "ISIC_2.jpg", "ISIC_2_segmentation.png", "isic_3.JPG", "4.png", "5.bmp",
    "ISIC_1_superpixels.png", "notes.txt", "6",
)  # fmt: skip
HEADERS = (
    "path", "image_id", "image", "class", "dx", "MEL", "NV", "melanoma", "split", "lesion_id",
    "target", "score_weight", "", " class", "age",
)  # fmt: skip
CELLS = (
    "ISIC_1", "ISIC_2.jpg", "isic_3", "Train/mel/ISIC_1.jpg", "mel", "MEL ", "nv", "0", "1", "0.0",
    "1.0", "true", "False", "train", "Val", "testing", "holdout", "", " ", '"', "NA", "é", "\udce9",
    "x,y", "-1", "1e9", "\0",
)  # fmt: skip
trees = st.lists(
    st.tuples(st.lists(st.sampled_from(FOLDERS), max_size=3), st.sampled_from(FILES)), max_size=8
)
tables = st.none() | st.tuples(
    st.sampled_from([",", ";", "\t"]),
    st.lists(st.sampled_from(HEADERS), min_size=1, max_size=4),
    st.lists(st.lists(st.sampled_from(CELLS), min_size=1, max_size=4), max_size=5),
)
choices = st.fixed_dictionaries(
    {},
    optional={
        "label_column": st.sampled_from([["class"], ["dx"], ["MEL", "NV"], ["target"], ["nope"]]),
        "class_names": st.just(["nv", "mel"]),
        "class_map": st.sampled_from([{"mel": "malignant"}, {"nv": ""}, {"MEL": "nv", "bcc": "x"}]),
        "unlabelled": st.just("drop"),
        "accept_class_names": st.booleans(),
        "split_by": st.sampled_from(["folders", "official"]),
        "id_column": st.sampled_from(["image", "age"]),
    },
)


def write_table(path, contents):
    if contents is None:
        return None
    separator, header, rows = contents
    lines = [separator.join(cells) for cells in [header, *rows]]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    return path


def cells_of(contents):
    if contents is None:
        return set()
    _, header, rows = contents
    return {*header, *(cell for row in rows for cell in row)}


@given(trees, tables, tables, tables, choices)
@example([(["test"], "ISIC_1.jpg"), (["mel"], "4.png")], None, None, None, {"unlabelled": "drop"})
@example(
    [(["all"], "ISIC_1.jpg"), (["all"], "ISIC_2.jpg")],
    (",", ["image", "MEL", "NV"], [["ISIC_1", "1", "0"], ["ISIC_2", "0", "1"]]),
    None,
    None,
    {},
)
@settings(
    max_examples=int(os.environ.get("MUTATIONS", "200")),
    suppress_health_check=[HealthCheck.too_slow],
)
def test_what_is_understood_is_in_the_input_and_anything_else_is_refused_in_a_line(
    tree, labels, metadata, splits, options
):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(folder) / "set"
        root.mkdir()
        for parents, name in tree:
            file = root.joinpath(*parents, name)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        tables = {"labels_csv": labels, "metadata_csv": metadata, "splits_csv": splits}
        given_tables = {
            name: write_table(Path(folder) / f"{name}.csv", contents)
            for name, contents in tables.items()
        }
        try:
            images = DatasetBuilder(root, **given_tables, **options).list_images()
        except (ValueError, FileNotFoundError) as error:
            assert str(error) and "\n" not in str(error)
            return
        names = {parent for parents, _ in tree for parent in parents}
        names |= cells_of(labels) | cells_of(metadata) | {"nv", "mel"}
        names |= set(options.get("class_map", {}).values()) | {"not melanoma"}
        assert {name.strip() for name in images["class"]} <= _spellings(names)
        if "split" in images:
            assert set(images["split"].dropna()) <= {"train", "valid", "test"}
        found = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}
        assert set(images["path"]) <= found and images["path"].is_unique


def _spellings(names):
    """The names as they may come out of a table: composed, and Latin-1 where they are not UTF-8."""
    import unicodedata

    decoded = {name.encode("utf-8", "surrogateescape").decode("latin-1") for name in names}
    return {unicodedata.normalize("NFC", name).strip().strip('"') for name in names | decoded}


@pytest.mark.parametrize("name", ["label_column", "layout", "unlabelled"])
def test_a_wrong_option_is_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        DatasetBuilder(tmp_path / "nowhere", **{name: "wrong"})
