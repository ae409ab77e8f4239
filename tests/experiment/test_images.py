"""What a run says of its images, on the first screen."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

from experiment.images import load_data, make_builder
from experiment.settings import Settings
from imaging.folders import find_images

MAX_LINES = 12


@pytest.fixture
def first_screen(tmp_path, capsys, recwarn):
    """A function of settings that returns the lines before the audit's, and the data."""

    def read(root, **more):
        settings = Settings(data_dir=str(root), image_size=16, batch_size=2)
        settings = replace(settings, cache_dir=str(tmp_path / "cache"), **more)
        data = load_data(make_builder(settings), settings, torch.device("cpu"))
        lines = capsys.readouterr().out.splitlines()
        lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("audit:"))]
        assert len(lines) <= MAX_LINES
        return lines, data

    return read


def test_the_first_screen_says_what_was_understood(first_screen, make_images, tmp_path):
    root = make_images({"Train/melanoma": 15, "Train/nevus": 15, "Train/odd": 10, "Test/nevus": 4})
    names = find_images(root)["path"]
    table = pd.DataFrame({"path": names, "lesion_id": range(len(names)), "sex": "female"})
    table.loc[:1, "lesion_id"] = 0
    table.to_csv(tmp_path / "m.csv", index=False)
    lines, data = first_screen(root, metadata_csv=str(tmp_path / "m.csv"))
    num_groups = data.metadata["group"].nunique()
    assert num_groups == 43
    sizes = data.metadata["split"].value_counts()
    assert lines == [
        f"data: 44 images of 3 classes in {root} (class folders)",
        "classes: nevus 19, melanoma 15, odd 10",
        f"table: {tmp_path / 'm.csv'}: 44 of its 44 rows used, for 44 of 44 images, matched by "
        "path",
        "splits: at random, stratified by class, seed 42: "
        f"{sizes['train']} train, {sizes['valid']} valid, {sizes['test']} test",
        "groups: 43, of copies of an image, equal lesion_id",
        "counted as malignant: melanoma; benign: nevus; not known: odd",
    ]


def test_everything_that_was_left_out_is_named_with_its_reason(first_screen, make_images, tmp_path):
    root = make_images({"mel": 14, "nv": 14, "unknown": 3, "masks": 5})
    (root / "mel/broken.png").write_text("no image")
    paths = find_images(root)["path"]
    wanted = paths[paths.str.startswith(("mel", "nv"))].iloc[2:]
    split = ["train", "valid", "test"] * 10
    pd.DataFrame({"path": wanted, "split": split[: len(wanted)]}).to_csv(tmp_path / "s.csv")
    lines, data = first_screen(
        root,
        splits_csv=str(tmp_path / "s.csv"),
        class_map=("unknown=",),
        unlabelled="drop",
        skip_unreadable=True,
    )
    (line,) = [line for line in lines if line.startswith("left out: ")]
    assert line == (
        "left out: 5 images: no label (masks); 3 images: class left out by --class_map; "
        "1 images: cannot be read; 2 images: in no split"
    )
    assert len(data.metadata) == 26
    assert any(line.startswith(f"splits: those of {tmp_path / 's.csv'}: ") for line in lines)


@pytest.mark.parametrize("num_classes", [2, 40])
def test_the_first_screen_stays_short_whatever_the_classes(
    first_screen, make_images, tmp_path, num_classes
):
    root = make_images({f"class {i:02d}": 4 for i in range(num_classes)})
    paths = find_images(root)["path"]
    for name in ("labels", "metadata", "splits"):
        table = pd.DataFrame({"path": paths, "patient_id": [f"p{i}" for i in range(len(paths))]})
        table["split"] = (["train", "train", "valid", "test"] * len(paths))[: len(paths)]
        table["class"] = paths.map(lambda path: path.split("/")[0])
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    tables = {f"{n}_csv": str(tmp_path / f"{n}.csv") for n in ("labels", "metadata", "splits")}
    lines, _ = first_screen(root, **tables)
    assert sum(line.startswith("table: ") for line in lines) == 3
    (classes,) = [line for line in lines if line.startswith("classes: ")]
    assert len(re.findall("class ", classes)) == min(num_classes, 12)
    assert ("and 28 more" in classes) == (num_classes == 40)


def test_official_splits_are_kept_and_a_missing_validation_part_is_taken_out_of_train(
    first_screen, make_images, tmp_path
):
    root = make_images({"mel": 20, "nv": 20})
    paths = find_images(root)["path"]
    table = pd.DataFrame({"path": paths, "split": ["train", "train", "train", "test"] * 10})
    table.to_csv(tmp_path / "m.csv", index=False)
    options = {"metadata_csv": str(tmp_path / "m.csv"), "split_by": "official"}
    lines, data = first_screen(root, **options)
    found = data.metadata.set_index("path")["split"]
    assert (found[table["path"][table["split"] == "test"]] == "test").all()
    assert found.value_counts().to_dict() == {"train": 24, "valid": 6, "test": 10}
    assert "splits: those of the data set: 24 train, 6 valid, 10 test" in lines
    with pytest.raises(ValueError, match="neither the layout nor metadata_csv has a column split"):
        first_screen(root, split_by="official")


def test_lesions_and_patients_are_grouped_unless_told_otherwise(
    first_screen, make_images, tmp_path
):
    root = make_images({"mel": 20, "nv": 20})
    rows = {"image_id": find_images(root)["path"], "patient_id": [i // 4 for i in range(40)]}
    pd.DataFrame(rows).to_csv(tmp_path / "m.csv", index=False)
    table = str(tmp_path / "m.csv")
    _, data = first_screen(root, metadata_csv=table)
    assert data.metadata.groupby("patient_id")["split"].nunique().max() == 1
    lines, data = first_screen(root, metadata_csv=table, group_by=())
    assert data.metadata.groupby("patient_id")["split"].nunique().max() > 1
    assert "groups: 40, of copies of an image" in lines
