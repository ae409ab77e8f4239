import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from audit import THUMBNAIL_SIZE, audit, find_near_duplicates, summarise
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


def table(paths, classes, hashes, source_splits=None):
    return pd.DataFrame(
        {
            "path": paths,
            "class": classes,
            "source_split": source_splits or [""] * len(paths),
            "content_hash": hashes,
        }
    )


@pytest.mark.parametrize("turn", TURNS)
def test_a_picture_is_known_again_mirrored_turned_resized_and_saved_anew(lesions, turn):
    changed = []
    for number, lesion in enumerate(lesions):
        side = 60 + number
        other = lesion if turn is None else lesion.transpose(turn)
        changed.append(thumbnail(saved_again(other.resize((side, side)), quality=60 + number % 35)))
    both = np.stack([thumbnail(lesion) for lesion in lesions] + changed)
    found = find_near_duplicates(both)
    true_pairs = {(i, i + len(lesions)) for i in range(len(lesions))}
    found_pairs = set(zip(found["first"], found["second"], strict=True))
    assert len(true_pairs & found_pairs) >= 0.97 * len(true_pairs)
    assert len(found_pairs - true_pairs) == 0


def test_different_lesions_are_no_pair_and_a_picture_itself_is_at_distance_0(lesions):
    thumbnails = np.stack([thumbnail(lesion) for lesion in lesions])
    assert len(find_near_duplicates(thumbnails)) == 0
    twice = find_near_duplicates(np.concatenate([thumbnails, thumbnails[:1]]))
    assert twice[["first", "second"]].to_numpy().tolist() == [[0, 90]]
    assert twice["distance"][0] == 0


def test_each_kind_of_finding_names_its_images_and_classes(lesions):
    thumbnails = [thumbnail(lesion) for lesion in lesions]
    paths = [f"Train/a/{i}.jpg" for i in range(90)]
    classes, hashes, sources = ["a"] * 90, [f"h{i}" for i in range(90)], ["Train"] * 90
    extra = [
        ("Test/a/same.jpg", "a", "h0", "Test", thumbnails[0]),  # identical, leakage
        ("Train/b/other.jpg", "b", "h1", "Train", thumbnails[1]),  # identical, contradiction
        ("Train/a/new.jpg", "a", "n2", "Train", thumbnail(saved_again(lesions[2], 70))),
        ("Train/a/flat.jpg", "a", "flat", "Train", np.full((32, 32), 7, dtype=np.uint8)),
    ]
    for path, name, content, source, image in extra:
        paths.append(path)
        classes.append(name)
        hashes.append(content)
        sources.append(source)
        thumbnails.append(image)
    findings = audit(table(paths, classes, hashes, sources), np.stack(thumbnails))
    named = {
        kind: rows["images"].tolist() for kind, rows in findings.groupby("kind", observed=True)
    }
    assert named == {
        "contradiction": ["Train/a/1.jpg; Train/b/other.jpg"],
        "leakage": ["Train/a/0.jpg; Test/a/same.jpg"],
        "identical": ["Train/a/0.jpg; Test/a/same.jpg", "Train/a/1.jpg; Train/b/other.jpg"],
        "near-duplicate": ["Train/a/2.jpg; Train/a/new.jpg"],
        "flat": ["Train/a/flat.jpg"],
        "small class": ["Train/b/other.jpg"],
    }
    assert findings["classes"][0] == "a; b"
    text = summarise(findings)
    assert "2 groups of identical files" in text and "1 of these stand under several" in text


def test_nothing_wrong_is_said_in_one_line(lesions):
    thumbnails = np.stack([thumbnail(lesion) for lesion in lesions])
    names = [f"{i}.jpg" for i in range(90)]
    findings = audit(table(names, ["a", "b"] * 45, names), thumbnails)
    assert len(findings) == 0
    assert summarise(findings) == "nothing found"
