"""Tables: whatever files and classes are called comes back as it was, and nothing is guessed."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from dataset import DatasetBuilder
from experiment.run_files import read_findings
from predict import main as predict_main
from storage.files import join_names, open_csv, read_csv, split_names, write_csv, write_json
from train_models import main as train_main

# All that tables elsewhere take for missing or for numbers, and what ends cells and rows.
CLASSES = ["NA", "None", "null", "nan", "inf", "True", "1", "1.0", "01"]
LOOKS_LIKE_ELSE = [
    *CLASSES,
    "1e5",
    "007",
    "N/A",
    "-",
    " a ",
    "a\rb",
    "a\r\nb",
    'q"u,o"te',
    "\ufeffx",
]

# Any bytes that a file system takes for a name, as Python has them, and any text.
file_names = st.binary(min_size=1).filter(lambda b: b"\0" not in b and b"/" not in b)
file_names = file_names.map(os.fsdecode) | st.sampled_from([*LOOKS_LIKE_ELSE, "\udce9.png"])
class_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
class_names |= st.sampled_from(LOOKS_LIKE_ELSE)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("tables") / "table.csv"


@given(
    rows=st.lists(st.tuples(file_names, class_names | st.none()), max_size=8), heading=class_names
)
@example(rows=[("a", "\0"), ("\r", None)], heading="\n")
def test_any_names_come_back_from_a_table_as_they_were(path, rows, heading):
    table = pd.DataFrame(rows, columns=["path", heading], dtype=object)
    write_csv(table.assign(number=1.5), path)
    found = read_csv(path)
    assert list(found.columns) == ["path", heading, "number"]
    assert found["path"].tolist() == [name for name, _ in rows]
    assert found[heading].isna().tolist() == [name is None for _, name in rows]
    assert found[heading].dropna().tolist() == [name for _, name in rows if name is not None]
    assert found["number"].tolist() == ["1.5"] * len(rows)


def test_a_table_may_be_written_in_parts(tmp_path):
    table = pd.DataFrame({"path": ["a", "b\r"], "x": [0.1, None]})
    write_csv(table, tmp_path / "whole.csv")
    with open_csv(tmp_path / "parts.csv") as file:
        write_csv(table[:1], file)
        write_csv(table[1:], file, header=False)
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_tables_of_other_programs_are_read(tmp_path):
    table = tmp_path / "excel.csv"
    table.write_bytes(b'\xef\xbb\xbf"path",n\r\na.png, NA\r\n"b;\n.png",""\r\n\r\nc.png\r\n')
    found = read_csv(table)
    assert found["path"].tolist() == ["a.png", "b;\n.png", "c.png"]
    assert found["n"].fillna("missing").tolist() == [" NA", "missing", "missing"]


@pytest.mark.parametrize("contents", [b"a,b\n1,2,3\n", b"a,b\n1,2\n1,2,3\n", b'a,b\n"1,2\n', b""])
def test_a_table_whose_cells_cannot_be_told_apart_is_refused(tmp_path, contents):
    (tmp_path / "t.csv").write_bytes(contents)
    with pytest.raises(ValueError, match=r"t\.csv: not a valid CSV table \("):
        read_csv(tmp_path / "t.csv")


@given(st.lists(file_names | class_names))
@example(["a; b", "a\\", "; ", " ", "\\;", "\n"])
def test_names_joined_in_one_cell_are_told_apart_again(names):
    assert split_names(join_names(names)) == tuple(names)


def test_plain_names_are_joined_as_a_person_would():
    assert join_names(["Test/a b.png", "Train/c.png"]) == "Test/a b.png; Train/c.png"


def test_json_gives_back_names_that_are_not_utf8(tmp_path):
    write_json(tmp_path / "a.json", {"é": ["\udce9.png", None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert '"é"' in text and json.loads(text) == {"é": ["\udce9.png", None]}


# ---------------------------------------------------------------------------- a whole run

ODD = "not utf-8 \udce9; odd.png"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Images of odd names in folders whose names are not UTF-8, and a table of odd classes."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    rows = []
    for number, (name, i) in enumerate((name, i) for name in CLASSES for i in range(6)):
        place = folder / "raw" / ["Tr\udce4n", "T\udcffst"][i % 2] / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        path = place / [ODD, "n\\; \r\n {}.png"][i % 2].replace(".png", f"{number}.png")
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        relative = path.relative_to(folder / "raw").as_posix()
        if name != "null":  # one of them keeps the folder's class
            rows.append((relative, name, f"00{i % 3}" if i % 3 else "", f"c\udce4m {i % 2}"))
    (first, second) = (folder / "raw" / rows[i][0] for i in (0, 7))
    shutil.copy(first, second)  # one picture under two classes
    columns = ["path", "class", "patient", "camera"]
    write_csv(pd.DataFrame(rows, columns=columns, dtype=object), folder / "table.csv")
    return folder / "raw"


@pytest.fixture(scope="module")
def run(raw):
    """The folder of a run on these images."""
    out = raw.parent / "out"
    words = [
        "--data_dir", raw, "--save_dir", out, "--labels_csv", raw.parent / "table.csv",
        "--metadata_csv", raw.parent / "table.csv", "--models", "simple_cnn", "--device", "cpu",
        "--image_size", "32", "--num_steps", "2", "--eval_every", "2", "--batch_size", "8",
    ]  # fmt: skip
    assert train_main(list(map(str, words))) == 0
    return out


def test_a_run_on_names_that_are_not_utf8_ends_with_comparison_and_report(run):
    assert read_csv(run / "comparison.csv")["model"].tolist() == ["simple_cnn"]
    for name in ("report.html", "audit.png", "comparison.png", "simple_cnn/metrics.json"):
        assert (run / name).stat().st_size > 0
    predictions = read_csv(run / "simple_cnn/predictions.csv")
    assert any(ODD[:-4] in path for path in predictions["path"])
    metrics = json.loads((run / "simple_cnn/metrics.json").read_text(encoding="utf-8"))
    assert metrics["classes"] == sorted({*CLASSES, "a", "b"} - {"null"})
    assert set(metrics["subgroups"]["camera"]["groups"]) <= {"cäm 0", "cäm 1", "unknown"}
    assert set(predictions["true_class"]) <= set(metrics["classes"])


def test_the_classes_of_a_table_are_what_it_says_whatever_they_look_like(run, raw):
    table = read_csv(raw.parent / "table.csv").set_index("path")["class"]
    found = read_csv(run / "splits.csv").set_index("path")["class"]
    assert found[table.index].tolist() == table.tolist()
    rest = found.drop(table.index)
    assert rest.tolist() == [path.split("/")[1] for path in rest.index]


def test_a_run_reads_its_own_splits_again(run, raw):
    table = read_csv(run / "splits.csv")
    splits, metadata = DatasetBuilder(
        raw, image_size=32, labels_csv=raw.parent / "table.csv", splits_csv=run / "splits.csv"
    ).build()
    for name in ("path", "class", "split"):
        assert metadata[name].tolist() == table[name].tolist()
    assert sum(map(len, splits.values())) == len(table)


def test_the_report_reads_the_audit_as_it_was_found(run, raw):
    options = {"image_size": 32, "labels_csv": raw.parent / "table.csv"}
    findings = DatasetBuilder(raw, **options).audit()
    found = read_findings(run / "audit.csv")
    assert "contradiction" in set(findings["kind"])
    for name in ("kind", "images", "classes"):
        assert found[name].tolist() == findings[name].tolist()


def test_images_of_such_names_are_evaluated_and_predicted(run, raw, tmp_path):
    words = ["--model", str(run / "simple_cnn/model.pth"), "--device", "cpu"]
    labels = ["--labels_csv", str(raw.parent / "table.csv")]
    table = read_csv(raw.parent / "table.csv")
    for folder in raw.iterdir():
        for path in folder.glob("*/*"):
            if path.relative_to(raw).as_posix() in set(table["path"]):
                (tmp_path / "raw" / path.relative_to(raw)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "raw" / path.relative_to(raw))
    found = tmp_path / "found"
    assert predict_main([*words, *labels, "--evaluate", str(found), str(tmp_path / "raw")]) == 0
    predictions = read_csv(found / "simple_cnn/predictions.csv").set_index("path")["true_class"]
    assert predictions[table["path"]].tolist() == table["class"].tolist()
    output = tmp_path / "o.csv"
    assert predict_main([*words, "--output", str(output), str(tmp_path / "raw")]) == 0
    assert sorted(read_csv(output)["path"]) == sorted(
        (tmp_path / "raw" / path).as_posix() for path in table["path"]
    )


def test_a_table_in_latin_1_is_read_as_it_was_written(make_images, tmp_path):
    root = make_images({"a": 3, "b": 3})
    table = tmp_path / "latin1.csv"
    table.write_bytes("path,class\na/0000.png,Leberfleck übel\n".encode("latin-1"))
    images = DatasetBuilder(root, image_size=16, labels_csv=table).list_images()
    assert images["class"].tolist() == ["Leberfleck übel", *"aabbb"]


# ---------------------------------------------------------------------------- labels and groups


def test_whole_numbers_given_for_some_images_stay_whole(make_images, tmp_path):
    root = make_images({"1": 6, "2": 6})
    paths = [f"{c}/{i:04d}.png" for c in "12" for i in range(6)]
    table = pd.DataFrame({"path": paths, "class": [2, None] * 6}, dtype=object)
    write_csv(table, tmp_path / "t.csv")
    builder = DatasetBuilder(root, image_size=16, labels_csv=tmp_path / "t.csv")
    _, metadata = builder.build()
    assert metadata["class"].value_counts().to_dict() == {"1": 3, "2": 9}
    table["dx"] = [0, 1] * 6
    write_csv(table, tmp_path / "t.csv")
    options = {"metadata_csv": tmp_path / "t.csv", "label_column": "dx", "image_size": 16}
    splits, _ = DatasetBuilder(root, **options).build()
    assert splits["train"].classes == ["0", "1"]


def test_numbers_that_are_written_differently_are_different_patients(make_images, tmp_path):
    root = make_images({"a": 6, "b": 6})
    paths = [f"{c}/{i:04d}.png" for c in "ab" for i in range(6)]
    patients = ["007", "7", "7.0", "NA", "NA", "nan", "007", "7", "7.0", "", "", "None"]
    write_csv(pd.DataFrame({"path": paths, "patient": patients}), tmp_path / "t.csv")
    _, metadata = DatasetBuilder(
        root, image_size=16, metadata_csv=tmp_path / "t.csv", group_by=["patient"]
    ).build()
    groups = metadata.groupby("group")["path"].agg(list).tolist()
    pairs = [["a/0000.png", "b/0000.png"], ["a/0001.png", "b/0001.png"]]
    pairs += [["a/0002.png", "b/0002.png"], ["a/0003.png", "a/0004.png"]]
    assert [group for group in groups if len(group) > 1] == pairs  # an empty value joins nothing
    assert metadata["patient"].fillna("").tolist() == patients


def test_two_columns_that_would_get_one_name_are_refused(make_images, tmp_path):
    root = make_images({"a": 3, "b": 3})
    rows = {"path": ["a/0000.png"], "split": ["train"], "split_given": ["test"]}
    write_csv(pd.DataFrame(rows), tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"t\.csv: two columns would be called split_given"):
        DatasetBuilder(root, image_size=16, metadata_csv=tmp_path / "t.csv").build()


# ---------------------------------------------------------------------------- pandas with pyarrow


def test_names_are_no_strings_of_pyarrow_which_only_holds_utf8(make_images, tmp_path):
    _, metadata = DatasetBuilder(make_images({"x/a": 3, "x/b": 3}), image_size=16).build()
    write_csv(metadata, tmp_path / "t.csv")
    for table in (metadata, read_csv(tmp_path / "t.csv")):
        assert {str(table[name].dtype) for name in ("path", "class", "source_split")} == {"object"}
