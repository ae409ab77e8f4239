import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from audit import (
    MAX_DISTANCE,
    THUMBNAIL_SIZE,
    audit,
    find_near_duplicates,
    number_pictures,
    summarise,
    unavoidable_errors,
    worst_pairs,
)
from synthetic import CLASSES, draw_lesion

TURNS = [None, *Image.Transpose]


def thumbnail(image):
    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX))


def saved_again(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


@pytest.fixture(scope="module")
def lesions():
    rng = np.random.default_rng(0)
    return [draw_lesion(CLASSES[i % len(CLASSES)], rng, 96) for i in range(90)]


def table(paths, classes, hashes, splits=None):
    return pd.DataFrame(
        {
            "path": paths,
            "class": classes,
            "content_hash": hashes,
            "split": splits or [""] * len(paths),
            "width": 600,
            "height": 450,
            "error": "",
        }
    )


def near(thumbnails, hashes=None):
    return find_near_duplicates(thumbnails, range(len(thumbnails)) if hashes is None else hashes)


@pytest.mark.parametrize("turn", TURNS)
def test_a_picture_is_known_again_mirrored_turned_resized_and_saved_anew(lesions, turn):
    changed = []
    for number, lesion in enumerate(lesions):
        side = 60 + number
        other = lesion if turn is None else lesion.transpose(turn)
        changed.append(thumbnail(saved_again(other.resize((side, side)), quality=60 + number % 35)))
    both = np.stack([thumbnail(lesion) for lesion in lesions] + changed)
    found = near(both)
    true_pairs = {(i, i + len(lesions)) for i in range(len(lesions))}
    found_pairs = set(zip(found["first"], found["second"], strict=True))
    assert len(true_pairs & found_pairs) >= 0.97 * len(true_pairs)
    assert len(found_pairs - true_pairs) == 0


def test_different_lesions_are_no_pair_and_a_picture_itself_is_at_distance_0(lesions):
    thumbnails = np.stack([thumbnail(lesion) for lesion in lesions])
    assert len(near(thumbnails)) == 0
    twice = near(np.concatenate([thumbnails, thumbnails[:1]]))
    assert twice[["first", "second"]].to_numpy().tolist() == [[0, 90]]
    assert twice["distance"][0] == 0


def test_equal_files_and_images_of_one_colour_are_no_near_duplicates(lesions):
    grey = np.full((16, 16), 90, dtype=np.uint8)
    thumbnails = np.stack([thumbnail(lesions[0])] * 3 + [grey, grey + 1])
    found = near(thumbnails, ["a", "a", "other encoding", "grey", "lighter"])
    assert found[["first", "second"]].to_numpy().tolist() == [[0, 2]]
    assert len(near(thumbnails[:2], ["a", "a"])) == len(near(thumbnails[3:])) == 0


def test_copies_of_a_picture_have_one_number(lesions):
    thumbnails = [thumbnail(lesion) for lesion in lesions[:5]]
    thumbnails += [thumbnail(saved_again(lesions[3], 60)), thumbnails[1]]
    thumbnails += [thumbnail(lesions[3].transpose(Image.Transpose.ROTATE_90))]
    hashes = ["a", "b", "c", "d", "e", "d again", "b", "d turned"]
    pictures = number_pictures(hashes, near(np.stack(thumbnails), hashes), np.stack(thumbnails))
    assert pictures.tolist() == [0, 1, 2, 3, 4, 3, 1, 3]


def test_a_series_that_changes_by_small_steps_does_not_become_one_picture(lesions):
    """Each is a near-duplicate of the next, yet the first and the last are different lesions."""
    ends = [thumbnail(lesion).astype(float) for lesion in lesions[:2]]
    weights = np.linspace(0, 1, 60)[:, None, None]
    series = (ends[0] * (1 - weights) + ends[1] * weights).round().astype(np.uint8)
    found = near(series)
    assert set(zip(range(59), range(1, 60), strict=True)) <= set(
        zip(found["first"], found["second"], strict=True)
    )
    pictures = number_pictures(range(60), found, series)
    assert pictures[0] != pictures[-1]
    for number in set(pictures):
        members = series[pictures == number].astype(np.float32)
        members -= members.mean(axis=(1, 2), keepdims=True)
        members /= members.std(axis=(1, 2), keepdims=True)
        apart = np.sqrt(((members[:, None] - members[None]) ** 2).mean(axis=(2, 3)))
        assert apart.max() <= 2 * MAX_DISTANCE + 1e-4


def test_each_kind_of_finding_names_its_images_and_classes(lesions):
    thumbnails = [thumbnail(lesion) for lesion in lesions]
    images = table([f"a/{i}.jpg" for i in range(90)], ["a"] * 90, [f"h{i}" for i in range(90)])
    images["split"] = "train"
    extra = [
        ("test/same.jpg", "a", "h0", "test", 600, 450, ""),  # identical, leakage
        ("b/other.jpg", "b", "h1", "train", 600, 450, ""),  # identical, contradiction
        ("a/new.jpg", "a", "n2", "train", 600, 450, ""),
        ("a/flat.jpg", "a", "flat", "", 600, 450, ""),
        ("a/tiny.jpg", "a", "tiny", "", 600, 31, ""),
        ("a/broken.jpg", "a", "", "", 0, 0, "empty file"),
        ("a/broken too.jpg", "a", "", "", 0, 0, "empty file"),
    ]
    columns = ["path", "class", "content_hash", "split", "width", "height", "error"]
    images = pd.concat([images, pd.DataFrame(extra, columns=columns)], ignore_index=True)
    thumbnails += [thumbnails[0], thumbnails[1], thumbnail(saved_again(lesions[2], 70))]
    blank = np.zeros((16, 16), dtype=np.uint8)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    thumbnails = np.stack([*thumbnails, blank + 7, ramp, blank, blank])
    findings = audit(images, near(thumbnails, images["content_hash"]), thumbnails)
    named = [(row.kind, row.images, row.classes) for row in findings.itertuples()]
    assert named == [
        ("unreadable", ("a/broken.jpg",), ("a",)),
        ("unreadable", ("a/broken too.jpg",), ("a",)),
        ("contradiction", ("a/1.jpg", "b/other.jpg"), ("a", "b")),
        ("leakage", ("a/0.jpg", "test/same.jpg"), ("a", "a")),
        ("identical", ("a/0.jpg", "test/same.jpg"), ("a", "a")),
        ("identical", ("a/1.jpg", "b/other.jpg"), ("a", "b")),
        ("near-duplicate", ("a/2.jpg", "a/new.jpg"), ("a", "a")),
        ("tiny", ("a/tiny.jpg",), ("a",)),
        ("flat", ("a/flat.jpg",), ("a",)),
        ("small class", ("b/other.jpg",), ("b",)),
    ]
    distances = findings.set_index("kind")["distance"]
    assert distances["contradiction"] == 0 and 0 < distances["near-duplicate"] <= MAX_DISTANCE
    text = summarise(findings)
    assert text.count("\n") == 7
    assert "files that cannot be read: 2\n" in text and "groups of identical files: 2\n" in text


def test_nothing_wrong_is_said_in_one_line(lesions):
    thumbnails = np.stack([thumbnail(lesion) for lesion in lesions])
    names = [f"{i}.jpg" for i in range(90)]
    findings = audit(table(names, ["a", "b"] * 45, names), near(thumbnails), thumbnails)
    assert len(findings) == 0
    assert summarise(findings) == "nothing found"
    assert len(worst_pairs(findings)) == 0


def test_the_pairs_to_look_at_are_of_every_sort_before_any_is_shown_twice():
    def finding(kind, number, classes, distance=0.0):
        return kind, (f"{classes}{number}.jpg", f"{classes}{number} again.jpg"), classes, distance

    rows = [finding("contradiction", i, ("a", "b")) for i in range(20)]
    rows += [finding("contradiction", 0, ("b", "c")), finding("leakage", 0, ("a", "b"))]
    rows += [finding("near-duplicate", 0, ("a", "a"), 0.1)]
    rows += [("flat", ("x.jpg",), ("a",), np.nan), ("small class", ("x.jpg",), ("a",), np.nan)]
    findings = pd.DataFrame(rows, columns=["kind", "images", "classes", "distance"])
    kinds = ["contradiction", "leakage", "near-duplicate", "flat", "small class"]
    findings["kind"] = pd.Categorical(findings["kind"], categories=kinds)
    chosen = worst_pairs(findings, most=6)
    assert chosen["kinds"].tolist() == [
        ("contradiction", "leakage"),
        ("contradiction",),
        ("contradiction",),
        ("near-duplicate",),
        ("contradiction",),
        ("contradiction",),
    ]
    assert chosen["classes"].tolist()[:4] == [("a", "b"), ("a", "b"), ("b", "c"), ("a", "a")]
    assert not chosen["images"].duplicated().any()


def test_errors_are_unavoidable_where_one_picture_has_several_classes():
    pictures = [0, 0, 1, 1, 1, 2, 2]
    classes = ["a", "b", "a", "a", "b", "c", "c"]
    assert unavoidable_errors(pd.DataFrame({"picture": pictures, "class": classes})) == 2
