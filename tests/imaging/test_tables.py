"""Tables are read as people have them, and their rows found for each image."""

import csv
import io

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dataset import DatasetBuilder
from imaging.tables import check_id_column, decode_latin1, join_table, read_table
from storage.files import write_csv

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1"]
PATHS = [
    f"{folder}/ISIC_{number}.jpg"
    for start, folder in enumerate(["Train/mel", "Train/nv", "Test/mel", "Test/nv"])
    for number in range(100 + start, 2000, 250)
]
# Two letters of Latin-1 whose bytes are valid UTF-8 would be read as that.
cells = st.text(st.sampled_from("aä0;,\t\"' "), max_size=6).map(str.strip)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("tables") / "table.csv"


def written(rows, separator=",", quoting=csv.QUOTE_MINIMAL, after=""):
    file = io.StringIO()
    csv.writer(file, delimiter=separator, quoting=quoting, lineterminator="\n").writerows(rows)
    return file.getvalue().replace(separator, separator + after) if after else file.getvalue()


@given(
    rows=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6),
    separator=st.sampled_from(",;\t"),
    encoding=st.sampled_from(ENCODINGS),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@example([("a,b", "c;ä", "e")], ";", "utf-16", csv.QUOTE_MINIMAL)
def test_a_table_is_the_same_however_it_is_written(path, rows, separator, encoding, quoting):
    rows = [(f"{number}x{first}", *others) for number, (first, *others) in enumerate(rows)]
    text = written([("image", "Größe", "dx"), *rows], separator, quoting)
    path.write_bytes(text.encode(encoding))
    table = read_table(path)
    found = join_table([f"{rows[0][0]}.png"], table, path, id_column="image")
    assert list(table.columns) == ["image", "Größe", "dx"] and len(table) == len(rows)
    if encoding != "latin-1":  # there, `join_table` decodes it
        assert table.fillna("").to_numpy().tolist() == [list(row) for row in rows]
    assert found.fillna("").iloc[0].tolist() == list(rows[0][1:])


def test_spaces_after_separators_are_dropped_but_not_those_in_quotes(path):
    path.write_text('image_id, dx, note \na, mel, " b "\nc,,\n')
    table = read_table(path)
    assert list(table.columns) == ["image_id", "dx", "note"]
    assert table.fillna("missing").to_numpy().tolist() == [
        ["a", "mel", " b "], ["c", "missing", "missing"],
    ]  # fmt: skip


def test_text_is_text(path):
    path.write_text("image;dx;n\na;0;007\nb;1;1e5\nc;NA;None\n")
    assert read_table(path)["dx"].tolist() == ["0", "1", "NA"]
    assert read_table(path)["n"].tolist() == ["007", "1e5", "None"]


def test_a_decimal_comma_is_no_separator(path):
    path.write_text("image;age, years;size\na;60;2,5\nb;61;3,7\n")
    assert read_table(path)["size"].tolist() == ["2,5", "3,7"]


# ---------------------------------------------------------------------------- names of images


WAYS = {
    "as it is": lambda path: path,
    "without the suffix": lambda path: path.removesuffix(".jpg"),
    "an absolute prefix": lambda path: f"/home/somebody/set/{path}",
    "backslashes": lambda path: "C:\\set\\" + path.replace("/", "\\"),
    "upper case": str.upper,
    "the file's name": lambda path: path.split("/")[-1],
    "the stem": lambda path: path.split("/")[-1].removesuffix(".jpg"),
    "another suffix": lambda path: path.replace(".jpg", ".PNG"),
    "spaces around": lambda path: f" {path} ",
    "other folders": lambda path: f"HAM10000_images_part_1/{path.split('/')[-1]}",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("column", ["path", "image_id", "Dateiname"])
def test_images_are_found_in_whatever_way_a_table_names_them(way, column):
    rows = {"n": range(len(PATHS)), column: map(WAYS[way], PATHS), "age": 50}
    table = pd.DataFrame(rows).astype(str)[::-1]
    assert join_table(PATHS, table, "t.csv")["n"].astype(int).tolist() == [*range(len(PATHS))]


names = st.lists(st.text("abAB/.", min_size=1, max_size=5), min_size=1, max_size=6, unique=True)


@given(names)
def test_a_table_of_whole_paths_gives_every_image_its_own_row(found):
    paths = [f"x/{name.strip('/')}.png" for name in found]
    paths = [*dict.fromkeys(path.replace("//", "/") for path in paths)]
    table = pd.DataFrame({"path": paths, "n": paths}, dtype=object)
    assert join_table(paths, table, "t.csv")["n"].tolist() == paths


@given(st.lists(st.sampled_from(PATHS), min_size=1, unique=True), st.sampled_from([*WAYS]))
def test_a_row_is_never_given_to_an_image_that_it_does_not_name(some, way):
    rows = [f"row of {PATHS.index(path)}" for path in some]
    table = pd.DataFrame({"file": map(WAYS[way], some), "n": rows}, dtype=object)
    given_rows = join_table(PATHS, table, "t.csv")["n"].fillna("").tolist()
    assert given_rows == [f"row of {i}" if p in some else "" for i, p in enumerate(PATHS)]


def test_the_same_name_in_two_folders_is_told_apart_by_the_folder():
    paths = ["a/1.png", "b/1.png", "b/2.png"]
    table = pd.DataFrame({"path": ["b/1.png", "c/2.png"], "n": ["x", "y"]})
    assert join_table(paths, table, "t.csv")["n"].fillna("").tolist() == ["", "x", ""]
    table = pd.DataFrame({"image_id": ["1"], "n": ["x"]})
    assert join_table(paths, table, "t.csv")["n"].fillna("").tolist() == ["x", "x", ""]


def test_an_image_and_its_mask_have_rows_of_their_own():
    table = pd.DataFrame({"file": ["1.jpg", "1.png"], "n": ["image", "mask"]})
    assert join_table(["1.jpg", "1.png"], table, "t.csv")["n"].tolist() == ["image", "mask"]


def test_names_that_are_not_utf8_match_the_names_of_files(path):
    path.write_bytes("bild;dx\nnäv1.png;mäl\nnäv2.png;nv\n".encode("latin-1"))
    for paths in (["näv1.png", "näv2.png"], ["n\udce4v1.png", "n\udce4v2.png"]):
        assert join_table(paths, read_table(path), path)["dx"].tolist() == ["mäl", "nv"]


# ---------------------------------------------------------------------------- the column


def test_two_columns_that_name_different_images_are_an_error_that_names_both():
    paths = [f"{i}.png" for i in range(1, 41)]
    numbers = {"case": range(1, 41), "row": range(40)}
    table = pd.DataFrame(numbers | {"dx": "mel"}).astype(str)
    message = r"t\.csv: both case and row name images \(40 and 39\), .* --id_column"
    with pytest.raises(ValueError, match=message):
        join_table(paths, table, "t.csv")
    found = join_table(paths, table, "t.csv", id_column="row")
    assert found["case"].fillna("").tolist() == [*map(str, range(2, 41)), ""]
    # One of the usual names is what it says.
    usual = table.rename(columns={"case": "image_id"})
    assert join_table(paths, usual, "t.csv")["row"].tolist() == [*map(str, range(40))]


def test_two_columns_that_name_the_same_images_are_as_good_as_one():
    table = pd.DataFrame({"file": ["1.png", "2.png"], "name": ["1", "2"], "n": ["x", "y"]})
    assert join_table(["2.png", "1.png"], table, "t.csv")["n"].tolist() == ["y", "x"]


def test_a_column_that_happens_to_match_a_few_images_does_not_name_them():
    paths = [f"{i}.png" for i in range(1000)]
    table = pd.DataFrame({"code": [f"x{i}" for i in range(100)], "age": range(990, 1090)})
    with pytest.raises(ValueError, match=r"no column names the images for certain; age names 10"):
        join_table(paths, table.astype(str), "t.csv")
    found = join_table(paths, table.astype(str), "t.csv", id_column="age")
    assert found["code"].dropna().tolist() == [f"x{i}" for i in range(10)]


def test_a_column_that_no_table_has_is_an_error_that_lists_those_that_there_are(tmp_path):
    write_csv(pd.DataFrame({"file": ["a"], "age": ["1"]}), tmp_path / "m.csv")
    write_csv(pd.DataFrame({"path": ["a"]}), tmp_path / "s.csv")
    check_id_column([tmp_path / "s.csv", tmp_path / "m.csv"], "file")
    with pytest.raises(ValueError, match=r"--id_column fil: .*m\.csv has file, age; .*has path"):
        check_id_column([tmp_path / "m.csv", tmp_path / "s.csv"], "fil")


def test_an_id_column_without_a_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="id_column needs a table"):
        DatasetBuilder(tmp_path, id_column="file")


def test_the_column_is_chosen_for_the_tables_that_have_it(make_images, tmp_path):
    root = make_images({"a": 12, "b": 12})
    stems = [f"{c}/{i:04d}" for c in "ab" for i in range(12)]
    table = pd.DataFrame({"file": stems, "other": stems[::-1], "n": range(24)})
    write_csv(table.astype(str), tmp_path / "m.csv")
    options = {"image_size": 16, "metadata_csv": tmp_path / "m.csv"}
    with pytest.raises(ValueError, match="both file and other name images"):
        DatasetBuilder(root, **options).build()
    _, first = DatasetBuilder(root, id_column="file", **options).build()
    assert first["n"].astype(int).tolist() == [*range(24)]
    write_csv(first[["path", "split"]], tmp_path / "splits.csv")
    options |= {"splits_csv": tmp_path / "splits.csv", "id_column": "other", "seed": 7}
    _, again = DatasetBuilder(root, **options).build()
    assert again["n"].astype(int).tolist() == [*range(24)][::-1]
    assert again["split"].tolist() == first["split"].tolist()


# ---------------------------------------------------------------------------- rows


def test_rows_that_say_the_same_are_one_row():
    table = pd.DataFrame(
        {"image_id": ["1", "1.png", "2", "2"], "dx": ["mel", "mel", "nv", None], "age": ["5"] * 4}
    )
    found = join_table(["1.png", "2.png"], table, "t.csv")
    assert found["dx"].tolist() == ["mel", "nv"] and found["age"].tolist() == ["5", "5"]


def test_rows_that_contradict_each_other_are_an_error_with_an_example():
    table = pd.DataFrame(
        {"image_id": ["2", "1", "1"], "dx": ["nv", "mel", "nv"], "n": ["", "1", "2"]}
    )
    message = r"rows for 1\.png contradict each other: dx is 'mel' and 'nv'; keep one"
    with pytest.raises(ValueError, match=message):
        join_table(["1.png", "2.png"], table, "t.csv", columns=["dx"])
    table["dx"] = "nv"  # and what is in a column that is not used does not matter
    assert (
        join_table(["1.png", "2.png"], table, "t.csv", columns=["dx"])["dx"].tolist() == ["nv"] * 2
    )


# ---------------------------------------------------------------------------- any contents

TABLE = (
    'path;dx;"site"\nTrain/mel/ISIC_1.jpg;mel;"back; upper"\nISIC_2;n\xe4vus;\n"ISIC_3.png";,\t\n'
)
changes = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.integers(0, 4),
        st.sampled_from(
            [*";,\t\n\r\0\"' /\\x0", "\r\n", "ISIC_1", "\xef\xbb\xbf", "\xff\xfe", "\xe4"]
        ),
    ),
    max_size=8,
)


@given(changes, st.sampled_from(ENCODINGS), st.booleans())
@example([], "utf-16", True)
def test_any_table_is_read_or_refused_in_a_line_and_gives_what_it_holds(path, edits, encoding, cut):
    text = TABLE
    for place, length, inserted in edits:
        start = int(place * len(text))
        text = text[:start] + inserted + text[start + length :]
    contents = text.encode(encoding)
    path.write_bytes(contents[:-1] if cut else contents)
    images = ["Train/mel/ISIC_1.jpg", "Test/nv/ISIC_2.jpg", "ISIC_3.jpg"]
    try:
        table = read_table(path)
        found = join_table(images, table, path)
    except ValueError as error:
        assert str(path) in str(error)
        return
    held = {decode_latin1(cell) for column in table for cell in table[column].dropna()}
    for column in found:
        assert set(found[column].dropna()) <= held
