import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imaging.audit import (
    MAX_DISTANCE,
    THUMBNAIL_SIZE,
    audit,
    find_near_duplicates,
    number_originals,
    summarise,
    unavoidable_errors,
    worst_pairs,
)
from imaging.synthetic import CLASSES, draw_lesion

TURNS = [None, *Image.Transpose]


def thumbnail(image):
    size = (THUMBNAIL_SIZE, THUMBNAIL_SIZE)
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX))


def reencoded(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


@pytest.fixture(scope="module")
def lesions():
    rng = np.random.default_rng(0)
    return [draw_lesion(CLASSES[i % len(CLASSES)], rng, 96) for i in range(90)]


def table(paths, classes, hashes, originals=None, splits=None):
    return pd.DataFrame(
        {
            "path": paths,
            "class": classes,
            "content_hash": hashes,
            "picture": hashes if originals is None else originals,
            "split": splits or [""] * len(paths),
            "width": 600,
            "height": 450,
            "error": "",
        }
    )


def near(thumbnails, hashes=None):
    return find_near_duplicates(thumbnails, range(len(thumbnails)) if hashes is None else hashes)


@pytest.mark.parametrize("turn", TURNS)
def test_copies_that_are_flipped_rotated_resized_or_reencoded_are_found(lesions, turn):
    changed = []
    for number, lesion in enumerate(lesions):
        side = 60 + number
        other = lesion if turn is None else lesion.transpose(turn)
        changed.append(thumbnail(reencoded(other.resize((side, side)), quality=60 + number % 35)))
    both = np.stack([thumbnail(lesion) for lesion in lesions] + changed)
    found = near(both)
    true_pairs = {(i, i + len(lesions)) for i in range(len(lesions))}
    found_pairs = set(zip(found["first"], found["second"], strict=True))
    assert len(true_pairs & found_pairs) >= 0.97 * len(true_pairs)
    assert len(found_pairs - true_pairs) == 0


def test_different_lesions_are_not_paired_and_a_copy_is_at_distance_0(lesions):
    thumbnails = np.stack([thumbnail(lesion) for lesion in lesions])
    assert len(near(thumbnails)) == 0
    twice = near(np.concatenate([thumbnails, thumbnails[:1]]))
    assert twice[["first", "second"]].to_numpy().tolist() == [[0, 90]]
    assert twice["distance"][0] == 0


def test_identical_files_and_images_of_one_colour_are_no_near_duplicates(lesions):
    grey = np.full((32, 32), 90, dtype=np.uint8)
    thumbnails = np.stack([thumbnail(lesions[0])] * 3 + [grey, grey + 1])
    found = near(thumbnails, ["a", "a", "other encoding", "grey", "lighter"])
    assert found[["first", "second"]].to_numpy().tolist() == [[0, 2]]
    assert len(near(thumbnails[:2], ["a", "a"])) == len(near(thumbnails[3:])) == 0


def test_different_lesions_in_the_same_black_frame_are_not_paired(lesions):
    """Round lenses leave black corners that are alike in all images of a camera."""
    across = np.linspace(-1, 1, 96)
    inside = (np.hypot(across[:, None], across) < 0.8)[:, :, None]
    framed = [
        Image.fromarray(np.where(inside, np.asarray(lesion), 8).astype(np.uint8))
        for lesion in lesions
    ]
    thumbnails = np.stack([thumbnail(image) for image in framed])
    assert len(near(thumbnails)) == 0
    again = [thumbnail(reencoded(image.rotate(90), 70)) for image in framed]
    found = near(np.concatenate([thumbnails, again]))
    assert len(found) >= 0.9 * len(lesions)
    assert (found["second"] == found["first"] + len(lesions)).all()


def test_hundreds_of_copies_of_two_images_have_two_numbers(lesions):
    rng = np.random.default_rng(0)
    thumbnails = np.stack([thumbnail(lesions[i % 2]) for i in range(300)]).astype(int)
    thumbnails = (thumbnails + rng.integers(-2, 3, thumbnails.shape)).clip(0, 255).astype(np.uint8)
    originals = number_originals(range(300), near(thumbnails), thumbnails)
    assert originals.tolist() == [0, 1] * 150


def test_copies_of_an_image_have_one_number(lesions):
    thumbnails = [thumbnail(lesion) for lesion in lesions[:5]]
    thumbnails += [thumbnail(reencoded(lesions[3], 60)), thumbnails[1]]
    thumbnails += [thumbnail(lesions[3].transpose(Image.Transpose.ROTATE_90))]
    hashes = ["a", "b", "c", "d", "e", "d again", "b", "d turned"]
    originals = number_originals(hashes, near(np.stack(thumbnails), hashes), np.stack(thumbnails))
    assert originals.tolist() == [0, 1, 2, 3, 4, 3, 1, 3]


def test_a_series_that_changes_by_small_steps_has_several_numbers(lesions):
    """Each is a near-duplicate of the next, yet the first and the last are different lesions."""
    ends = [thumbnail(lesion).astype(float) for lesion in lesions[:2]]
    weights = np.linspace(0, 1, 60)[:, None, None]
    series = (ends[0] * (1 - weights) + ends[1] * weights).round().astype(np.uint8)
    found = near(series)
    assert set(zip(range(59), range(1, 60), strict=True)) <= set(
        zip(found["first"], found["second"], strict=True)
    )
    originals = number_originals(range(60), found, series)
    assert originals[0] != originals[-1]
    for number in set(originals):
        members = series[originals == number]
        apart = find_near_duplicates(members, range(len(members)), max_distance=2)
        assert len(apart) == len(members) * (len(members) - 1) / 2
        assert apart["distance"].max() <= 2 * MAX_DISTANCE + 1e-6


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
    thumbnails += [thumbnails[0], thumbnails[1], thumbnail(reencoded(lesions[2], 70))]
    blank = np.zeros((32, 32), dtype=np.uint8)
    ramp = np.arange(1024).astype(np.uint8).reshape(32, 32)
    thumbnails = np.stack([*thumbnails, blank + 7, ramp, blank, blank])
    found = near(thumbnails, images["content_hash"])
    images["picture"] = number_originals(images["content_hash"], found, thumbnails)
    findings = audit(images, found, thumbnails)
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
    lines = summarise(findings).split("\n")
    assert lines[0] == "files that cannot be read: 2 (a/broken.jpg, a/broken too.jpg)"
    assert lines[3] == "groups of identical files: 2"
    assert lines[-1].endswith("measure: 1 (b)")
    assert len(lines) == 8


def test_an_image_in_many_files_is_one_contradiction_and_one_leak(lesions):
    """The copy in the test split is near a file that has an identical one in training."""
    changed = [lesions[0], lesions[0], reencoded(lesions[0], 60), reencoded(lesions[0], 80)]
    thumbnails = np.stack([thumbnail(image) for image in changed])
    images = table(list("wxyz"), ["a", "a", "b", "c"], ["one", "one", "two", "three"])
    images["split"] = ["", "train", "test", "test"]
    found = near(thumbnails, images["content_hash"])
    images["picture"] = number_originals(images["content_hash"], found, thumbnails)
    findings = audit(images, found, thumbnails)
    of_originals = findings[findings["kind"].isin(["contradiction", "leakage"])]
    assert of_originals["images"].tolist() == [tuple("wxyz")] * 2
    assert (of_originals["distance"] == found["distance"].max()).all()
    assert worst_pairs(findings)["classes"][0] == ("a", "b")


def test_no_findings_are_summarised_in_one_line(lesions):
    thumbnails = np.stack([thumbnail(lesion) for lesion in lesions])
    names = [f"{i}.jpg" for i in range(90)]
    findings = audit(table(names, ["a", "b"] * 45, names), near(thumbnails), thumbnails)
    assert len(findings) == 0
    assert summarise(findings) == "nothing found"
    assert len(worst_pairs(findings)) == 0


def test_the_worst_pairs_have_every_combination_before_any_comes_twice():
    def finding(kind, number, classes, distance=0.0):
        return kind, (f"{classes}{number}.jpg", f"{classes}{number} again.jpg"), classes, distance

    rows = [finding("contradiction", i, ("a", "b")) for i in range(20)]
    rows += [finding("contradiction", 0, ("b", "c")), finding("leakage", 0, ("a", "b"))]
    rows += [finding("near-duplicate", 0, ("a", "a"), 0.1)]
    rows += [("flat", ("x.jpg",), ("a",), np.nan), ("small class", ("x.jpg",), ("a",), np.nan)]
    findings = pd.DataFrame(rows, columns=["kind", "images", "classes", "distance"])
    kinds = ["contradiction", "leakage", "near-duplicate", "flat", "small class"]
    findings["kind"] = pd.Categorical(findings["kind"], categories=kinds)
    chosen = worst_pairs(findings, max_pairs=6)
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


def test_errors_are_unavoidable_where_equal_files_have_several_classes():
    contents = ["x", "x", "y", "y", "y", "z", "z"]
    classes = ["a", "b", "a", "a", "b", "c", "c"]
    assert unavoidable_errors(pd.DataFrame({"content_hash": contents, "class": classes})) == 2
