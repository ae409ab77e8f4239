"""What is wrong with a set of images, from a table of their hashes, thumbnails and labels.

Knows neither image files nor torch: whoever decodes the images makes the thumbnails with
`THUMBNAIL_SIZE` and gives them here.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.fft import dctn
from scipy.spatial import cKDTree

THUMBNAIL_SIZE = 32
# Chosen on the ISIC nine-class set: pairs made by re-encoding (JPEG quality 40 to 95), resizing
# (0.4 to 1.6), mirroring and turning reach 0.194; the closest of different pictures are 0.21 apart.
MAX_DISTANCE = 0.2
TREE_DIMENSIONS = 14  # in more, a k-d tree looks almost everywhere
FEWEST_IMAGES = 10  # of a class, below which nothing can be learnt or measured

FINDINGS = ["kind", "images", "classes", "distance"]


def find_near_duplicates(thumbnails: np.ndarray) -> pd.DataFrame:
    """The pairs of thumbnails that show the same picture, re-encoded, resized, mirrored or turned.

    `thumbnails` is uint8 grey (N, 32, 32), each the whole picture whatever its shape. Gives a row a
    pair: `first` and `second`, row numbers with first < second, and `distance`, the root mean
    square difference in the best of the eight orientations, each thumbnail brought to mean 0 and
    standard deviation 1: 0 for the same, the root of 2 for what has nothing in common.

    Mirroring and turning by 90 degrees change only signs and order of the coefficients of the
    discrete cosine transform, so the low ones without sign, averaged with their transposes, are the
    same for all eight orientations, and no further apart than the thumbnails are: a k-d tree over
    them gives candidates without missing any.
    """
    described = _describe(thumbnails)
    reach = THUMBNAIL_SIZE * MAX_DISTANCE
    tree = cKDTree(described[:, -TREE_DIMENSIONS:])
    candidates = np.sort(tree.query_pairs(reach, output_type="ndarray"), axis=1)
    candidates = candidates[_is_within(described, candidates, reach)]
    candidates = candidates[np.lexsort(candidates.T[::-1])]
    parts = [candidates[i : i + 4096] for i in range(0, len(candidates), 4096)]
    distances = [_distance(thumbnails[a], thumbnails[b]) for a, b in (part.T for part in parts)]
    distance = np.concatenate(distances) if distances else np.empty(0)
    found = distance <= MAX_DISTANCE
    first, second = candidates[found].T
    return pd.DataFrame({"first": first, "second": second, "distance": distance[found]})


def audit(metadata: pd.DataFrame, thumbnails: np.ndarray) -> pd.DataFrame:
    """What is wrong with the images, a row a finding: `kind`, `images`, `classes`, `distance`.

    `metadata` has a row an image and the columns `path`, `class`, `source_split` and
    `content_hash`; `thumbnails` (N, 32, 32) are in the same order. Kinds, the gravest first:

    `contradiction` : the same picture under several classes
    `leakage` : the same picture in several folders named as splits
    `identical` : files with the same contents
    `near-duplicate` : other files of the same picture, with their distance
    `flat` : an image of one colour
    `small class` : fewer than 10 pictures
    """
    one_of_each = metadata.drop_duplicates("content_hash").index
    near = find_near_duplicates(thumbnails[one_of_each])
    near["first"], near["second"] = one_of_each[near["first"]], one_of_each[near["second"]]
    same = [rows for rows in metadata.groupby("content_hash").indices.values() if len(rows) > 1]
    groups = [*same, *near[["first", "second"]].to_numpy()]
    distances = [0.0] * len(same) + near["distance"].tolist()
    kinds = ["identical"] * len(same) + ["near-duplicate"] * len(near)

    findings = []
    for rows, distance, kind in zip(groups, distances, kinds, strict=True):
        if metadata["class"].iloc[rows].nunique() > 1:
            findings.append(_finding("contradiction", metadata, rows, distance))
        if metadata["source_split"].iloc[rows].nunique() > 1:
            findings.append(_finding("leakage", metadata, rows, distance))
        findings.append(_finding(kind, metadata, rows, distance))
    for row in np.flatnonzero(np.ptp(thumbnails, axis=(1, 2)) == 0):
        findings.append(_finding("flat", metadata, [row], np.nan))
    for rows in metadata.groupby("class").indices.values():
        if metadata["content_hash"].iloc[rows].nunique() < FEWEST_IMAGES:
            findings.append(_finding("small class", metadata, rows, np.nan))
    order = ["contradiction", "leakage", "identical", "near-duplicate", "flat", "small class"]
    table = pd.DataFrame(findings, columns=FINDINGS)
    table["kind"] = pd.Categorical(table["kind"], categories=order)
    return table.sort_values(["kind", "distance"], kind="stable", ignore_index=True)


def summarise(findings: pd.DataFrame) -> str:
    """The findings in a few lines that a person can act on; one line when there are none."""
    counts = findings["kind"].value_counts()
    lines = {
        "identical": "{} groups of identical files",
        "near-duplicate": "{} pairs of near-duplicates",
        "contradiction": "{} of these stand under several classes: at least one label of each is "
        "wrong (--labels_csv corrects them, --label_conflicts drop leaves them out)",
        "leakage": "{} of these stand on both sides of folders named as splits",
        "flat": "{} images of one flat colour",
        "small class": "{} classes of fewer than " + str(FEWEST_IMAGES) + " pictures",
    }
    said = [text.format(counts[kind]) for kind, text in lines.items() if counts.get(kind, 0) > 0]
    return "\n".join(said) if said else "nothing found"


def _describe(thumbnails: np.ndarray) -> np.ndarray:
    """136 numbers a thumbnail that mirroring and turning do not change, float32 (N, 136).

    They are turned so that the last ones tell most (principal components).
    """
    parts = []
    for start in range(0, len(thumbnails), 8192):
        part = _standardise(thumbnails[start : start + 8192])
        low = np.abs(dctn(part, axes=(1, 2), norm="ortho")[:, :16, :16])
        low = (low + low.transpose(0, 2, 1)) / 2
        rows, columns = np.triu_indices(16)
        # What stands for two coefficients counts twice in a distance.
        parts.append(low[:, rows, columns] * np.where(rows == columns, 1, np.sqrt(2)))
    described = np.concatenate(parts)
    centred = described - described.mean(axis=0)
    return centred @ np.linalg.eigh(centred.T @ centred)[1]


def _is_within(described: np.ndarray, pairs: np.ndarray, reach: float) -> np.ndarray:
    near = [np.empty(0, dtype=bool)]
    for start in range(0, len(pairs), 100_000):
        first, second = pairs[start : start + 100_000].T
        near.append(((described[first] - described[second]) ** 2).sum(axis=1) <= reach**2)
    return np.concatenate(near)


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    first, second = _standardise(first), _standardise(second)
    squares = [((first - view) ** 2).mean(axis=(1, 2)) for view in _orientations(second)]
    return np.sqrt(np.min(squares, axis=0))


def _standardise(thumbnails: np.ndarray) -> np.ndarray:
    values = thumbnails.astype(np.float32)
    values -= values.mean(axis=(1, 2), keepdims=True)
    return values / np.maximum(values.std(axis=(1, 2), keepdims=True), 1.0)


def _orientations(images: np.ndarray) -> Iterable[np.ndarray]:
    for view in (images, images.transpose(0, 2, 1)):
        yield from (view, view[:, ::-1], view[:, :, ::-1], view[:, ::-1, ::-1])


def _finding(kind: str, metadata: pd.DataFrame, rows: Iterable[int], distance: float) -> tuple:
    chosen = metadata.iloc[list(rows)]
    classes = "; ".join(sorted(chosen["class"].unique()))
    return kind, "; ".join(chosen["path"]), classes, distance
