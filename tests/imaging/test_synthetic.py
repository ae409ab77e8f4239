import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from imaging import synthetic
from imaging.synthetic import CLASSES, MIN_IMAGES, MIN_SIZE, count_images, draw_lesion, make_dataset

ISIC_TRAIN = (114, 378, 95, 438, 357, 462, 77, 181, 139)
ISIC_TEST = (16, 16, 16, 16, 16, 16, 3, 16, 3)


def contents(root):
    """The bytes of every file below root but the marker, by its path relative to root."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "synthetic.txt"
    }


def thumbnails(class_name, count, seed):
    images = [draw_lesion(class_name, np.random.default_rng([seed, i]), 32) for i in range(count)]
    return np.array([np.asarray(image.resize((6, 6)), dtype=float).ravel() for image in images])


@pytest.fixture(scope="module")
def hundred_images(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("drawn") / "raw", 100, seed=7, size=40)


def test_the_nine_classes_are_those_of_the_isic_set_in_sorted_order():
    assert CLASSES == (
        "actinic keratosis",
        "basal cell carcinoma",
        "dermatofibroma",
        "melanoma",
        "nevus",
        "pigmented benign keratosis",
        "seborrheic keratosis",
        "squamous cell carcinoma",
        "vascular lesion",
    )


def test_the_set_has_exactly_the_asked_number_of_files_and_nothing_else(hundred_images):
    assert len(contents(hundred_images)) == 100
    assert all(path.endswith(".jpg") for path in contents(hundred_images))


def test_every_image_lies_in_a_split_and_a_class_and_no_folder_is_empty(hundred_images):
    folders = {path.rsplit("/", 1)[0] for path in contents(hundred_images)}
    assert folders == {f"{split}/{name}" for split in ("Train", "Test") for name in CLASSES}


def test_every_image_is_an_rgb_jpeg_of_the_asked_size(hundred_images):
    for path in hundred_images.rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 40))


def test_no_two_images_show_the_same(hundred_images):
    digests = {
        hashlib.sha256(Image.open(path).tobytes()).hexdigest()
        for path in hundred_images.rglob("*.jpg")
    }
    assert len(digests) == 100


def test_as_many_images_as_the_isic_set_has_are_spread_as_in_the_isic_set():
    train, test = count_images(sum(ISIC_TRAIN) + sum(ISIC_TEST))
    assert tuple(train) == ISIC_TRAIN
    assert tuple(test) == ISIC_TEST


@given(st.integers(MIN_IMAGES, 5000))
def test_counts_sum_to_the_total_and_follow_the_isic_set_but_for_the_smallest(num_images):
    train, test = count_images(num_images)
    assert train.sum() + test.sum() == num_images
    assert train.min() >= 4
    assert test.min() >= 1
    if num_images >= 600:
        ideal = num_images * np.array(ISIC_TRAIN) / 2359
        assert np.abs(train - ideal).max() < 2


def test_the_same_seed_gives_the_same_bytes_and_another_seed_gives_none_of_them(tmp_path):
    first = contents(make_dataset(tmp_path / "first", MIN_IMAGES, seed=1, size=24))
    again = contents(make_dataset(tmp_path / "again", MIN_IMAGES, seed=1, size=24))
    other = contents(make_dataset(tmp_path / "other", MIN_IMAGES, seed=2, size=24))
    assert first == again
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


def test_drawing_more_images_leaves_the_first_ones_as_they_were(tmp_path, hundred_images):
    few = contents(make_dataset(tmp_path / "few", MIN_IMAGES, seed=7, size=40))
    many = contents(hundred_images)
    assert few.items() <= many.items()


def test_a_lesion_depends_on_its_class_size_and_generator_alone():
    def melanoma(seed):
        return draw_lesion("melanoma", np.random.default_rng(seed), 50).tobytes()

    assert melanoma(3) == melanoma(3)
    assert melanoma(3) != melanoma(4)
    assert draw_lesion("nevus", np.random.default_rng(3), 50).tobytes() != melanoma(3)


@pytest.mark.parametrize("class_name", CLASSES)
def test_a_lesion_of_any_class_can_be_drawn_at_any_size(class_name):
    for seed, size in enumerate([MIN_SIZE] * 25 + [33, 200]):  # so that each structure comes up
        image = draw_lesion(class_name, np.random.default_rng(seed), size)
        assert (image.mode, image.size) == ("RGB", (size, size))
        assert np.asarray(image).std() > 2


def test_thumbnails_tell_the_classes_apart_but_not_perfectly():
    train = np.concatenate([thumbnails(name, 20, seed=0) for name in CLASSES])
    test = np.concatenate([thumbnails(name, 10, seed=1) for name in CLASSES])
    labels = np.arange(len(CLASSES))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(train, labels.repeat(20))
    accuracy = classifier.score(test, labels.repeat(10))
    assert 3 / len(CLASSES) < accuracy < 0.9


def test_a_folder_that_holds_something_is_refused_by_name_and_left_as_it_is(tmp_path):
    root = tmp_path / "raw"
    (root / "nevus").mkdir(parents=True)
    (root / "nevus" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=re.escape(str(root))):
        make_dataset(root, MIN_IMAGES, size=24)
    assert contents(root) == {"nevus/mine.jpg": b"precious"}


def test_an_empty_folder_is_filled(tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    assert make_dataset(str(root), MIN_IMAGES, size=24) == root
    assert len(contents(root)) == MIN_IMAGES


def test_too_few_images_are_an_error_that_says_how_many_it_takes(tmp_path):
    with pytest.raises(
        ValueError, match=f"num_images must be at least {MIN_IMAGES}, not {MIN_IMAGES - 1}"
    ):
        make_dataset(tmp_path / "raw", MIN_IMAGES - 1)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_class_is_an_error_that_names_it_and_the_nine():
    with pytest.raises(ValueError, match=r"'freckle'.*vascular lesion"):
        draw_lesion("freckle", np.random.default_rng(0))


def test_a_size_too_small_is_an_error_and_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match=f"at least {MIN_SIZE}, not {MIN_SIZE - 1}"):
        make_dataset(tmp_path / "raw", MIN_IMAGES, size=MIN_SIZE - 1)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_drawing_that_is_killed_leaves_no_set_and_does_not_hinder_the_next(tmp_path):
    root = tmp_path / "raw"
    script = f"from imaging import synthetic; synthetic.make_dataset({str(root)!r}, 20_000, seed=1)"
    drawing = subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(synthetic.__file__).parents[1]
    )
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob("*.jpg")):
            assert drawing.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        drawing.kill()
        drawing.wait()
    assert not root.exists()

    make_dataset(root, MIN_IMAGES, size=24)
    assert len(contents(root)) == MIN_IMAGES
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [root]
