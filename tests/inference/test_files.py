"""The images that a prediction is given: files, folders, lists and tables."""

import shutil

import pytest

from predict import find_files


def test_a_list_and_a_table_stand_for_the_files_that_they_name(make_images, tmp_path, monkeypatch):
    root = make_images({"a": 2, "b": 1})
    (root / "list.txt").write_text(f"a/0001.png\n\n  {root}/b/0000.png  \na/0001.png\n")
    expected = [f"{root}/a/0001.png", f"{root}/b/0000.png"]
    assert find_files(root / "list.txt") == expected
    (root / "table.csv").write_text("id;Path\n1;a/0001.png\n2;b/0000.png\n")
    assert find_files(root / "table.csv") == expected
    assert find_files([root / "table.csv", root / "a"]) == [*expected, f"{root}/a/0000.png"]
    shutil.move(root / "list.txt", tmp_path / "list.txt")
    monkeypatch.chdir(root)  # where the list's own folder does not have them
    assert find_files(tmp_path / "list.txt") == ["a/0001.png", expected[1]]


def test_lists_that_cannot_be_used_say_why(make_images):
    root = make_images({"a": 2})
    (root / "list.txt").write_text("a/0001.png\na/none.png\nnowhere.png\n")
    with pytest.raises(FileNotFoundError, match=r"2 of its 3 files do not exist, such as a/none"):
        find_files(root / "list.txt")
    (root / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match="no images in this list"):
        find_files(root / "list.txt")
    (root / "table.csv").write_text("image_id,age\n1,2\n")
    with pytest.raises(ValueError, match=r"no column path or .*; its columns are image_id, age"):
        find_files(root / "table.csv")
