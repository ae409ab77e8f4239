"""Finds what is wrong with a set of images, given their hashes, thumbnails and labels.

The caller makes the thumbnails: grey, `THUMBNAIL_SIZE` on each side whatever the
shape of the image. Images of the same original, identical files and near-duplicates, have the same
number in the column `picture`.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np
import pandas as pd
from scipy.fft import dctn
from scipy.spatial import cKDTree

from storage.files import printable
from storage.progress import ProgressBar

THUMBNAIL_SIZE = 32
# Chosen on the ISIC nine-class set from the curve that benchmarks/near_duplicates.py prints.
MAX_DISTANCE = 0.14
TREE_DIMENSIONS = 12  # in more, a k-d tree looks almost everywhere
MIN_CONTRAST = 1.0  # standard deviation of a thumbnail's grey levels, of 255
MIN_SIDE = 32  # pixels, below which a lesion cannot be recognised
MIN_DISTINCT_IMAGES = 10  # of a class, below which nothing can be learnt or measured

# The kinds of findings, the gravest first, and how the summary names them.
KINDS = {
    "unreadable": "files that cannot be read: {}",
    "class name": "classes that look like splits, parts, masks or single images, and not like "
    "classes, unless --accept_class_names says so: {}",
    "contradiction": "images with several labels: {}, each of which has at most one that is right; "
    "--labels_csv corrects them, --label_conflicts drop leaves these images out",
    "leakage": "images in several of the given splits: {}; new splits of the pooled images keep "
    "the copies of each together",
    "identical": "groups of identical files: {}",
    "near-duplicate": "pairs of near-duplicates: {}",
    "tiny": f"images of less than {MIN_SIDE} pixels on a side: {{}}",
    "flat": "images of a single colour: {}",
    "small class": f"classes of fewer than {MIN_DISTINCT_IMAGES} different images, too few to "
    "learn or to measure: {}",
}
PAIR_KINDS = ("contradiction", "leakage", "identical", "near-duplicate")
# Thumbnails are compared at half their size, where re-encoding and resizing change least, and
# within a disc: dark corners and the black frame of a lens are alike in all images of a camera,
# and would outweigh the lesions.
_GRID = THUMBNAIL_SIZE // 2
_AXIS = (np.arange(_GRID) + 0.5) * 2 / _GRID - 1
_DISC = np.hypot(_AXIS[:, None], _AXIS) < 0.7


def find_near_duplicates(
    thumbnails: np.ndarray, content_hashes: Iterable[str], max_distance: float = MAX_DISTANCE
) -> pd.DataFrame:
    """Returns the pairs of files that show the same image, re-encoded, resized, flipped or rotated.

    `thumbnails` is uint8 grey (N, 32, 32). A row for each pair has `first` and `second`, row
    numbers with first < second, and `distance`, at most `max_distance`: the root mean square
    difference, within a disc about the middle, in the best of the eight orientations, each
    thumbnail standardized to mean 0 and standard deviation 1. That is 0 for the same image and
    √2 for unrelated ones. Of files with equal `content_hashes` only the first is compared, and
    images of a single colour are not.

    Flips and rotations by 90 degrees change only the signs and the order of the coefficients of
    the discrete cosine transform. Their absolute values, averaged with their transposes, are the
    same in all eight orientations, and no further apart than the thumbnails are, so a k-d tree of
    them gives candidates without missing any.
    """
    compared = pd.Series(content_hashes).drop_duplicates().index.to_numpy()
    compared = compared[_contrast(thumbnails[compared]) >= MIN_CONTRAST]
    if len(compared) < 2:
        return pd.DataFrame({"first": [], "second": [], "distance": []})
    features = _invariant_features(thumbnails[compared])
    radius = np.sqrt(_DISC.sum()) * max_distance
    tree = cKDTree(features[:, -TREE_DIMENSIONS:])
    candidates = np.sort(tree.query_pairs(radius, output_type="ndarray"), axis=1)
    squares = _in_chunks(
        lambda pairs: ((features[pairs[:, 0]] - features[pairs[:, 1]]) ** 2).sum(axis=1),
        candidates,
        100_000,
        "choosing pairs of images",
    )
    candidates = candidates[squares <= radius**2]
    candidates = compared[candidates[np.lexsort(candidates.T[::-1])]]
    distance = _distances(thumbnails, candidates)
    found = distance <= max_distance
    first, second = candidates[found].T
    return pd.DataFrame({"first": first, "second": second, "distance": distance[found]})


def number_originals(
    content_hashes: Iterable[str], near_duplicates: pd.DataFrame, thumbnails: np.ndarray
) -> np.ndarray:
    """Returns a number for each image, int (N,), the same for images of the same original.

    Numbers count from 0 in order of appearance. Identical files share one, and so do
    near-duplicates, nearest first, as long as no two of them are further apart than copies of one
    original can be (twice `MAX_DISTANCE`), so that a series that changes by small steps is divided.
    """
    content = pd.factorize(pd.Series(content_hashes))[0]
    first_rows = np.unique(content, return_index=True)[1]
    original = np.arange(len(first_rows))
    members = {number: [number] for number in original}
    nearest_first = near_duplicates.sort_values("distance", kind="stable")
    for rows in nearest_first[["first", "second"]].to_numpy():
        first, second = sorted(original[content[rows]])
        if first == second:
            continue
        pairs = [(first_rows[a], first_rows[b]) for a in members[first] for b in members[second]]
        if _distances(thumbnails, np.array(pairs)).max() > 2 * MAX_DISTANCE:
            continue
        members[first] += members.pop(second)
        original[members[first]] = first
    return pd.factorize(original[content])[0]


def audit(
    metadata: pd.DataFrame,
    near_duplicates: pd.DataFrame,
    thumbnails: np.ndarray,
    implausible_classes: Collection[str] = (),
) -> pd.DataFrame:
    """Returns what is wrong with the images, a row for each finding, the gravest first.

    `metadata` has a row for each image and the columns `path`, `class`, `content_hash`, `picture`
    (see `number_originals`), `width`, `height`, `split` (empty for none) and `error` (empty for
    images that could be read). `near_duplicates` comes from `find_near_duplicates`; `thumbnails`
    (N, 32, 32) are in the same order. `implausible_classes` are those that
    `imaging.classes.find_implausible_classes` finds.

    The columns: `kind`, see `KINDS`; `images` and `classes`, the paths and the class of each;
    `distance`, the largest between near-duplicates among them, 0 for identical files.
    """
    images = metadata.reset_index(drop=True)
    images["split"] = images["split"].mask(images["split"] == "")
    is_readable = images["error"] == ""
    readable = images[is_readable]
    paths, classes, pictures = (images[n].to_numpy(object) for n in ("path", "class", "picture"))
    pairs = near_duplicates[["first", "second"]].to_numpy(int)
    max_distance = near_duplicates["distance"].groupby(pictures[pairs[:, 0]]).max().to_dict()
    findings = []

    def add(kind: str, rows: np.ndarray | pd.Index, distance: float) -> None:
        findings.append((kind, tuple(paths[rows]), tuple(classes[rows]), distance))

    def num_different(column: str, key: str) -> pd.Series:
        return readable.groupby(key)[column].transform("nunique")

    groups = {
        "unreadable": ("path", ~is_readable),
        "class name": ("class", images["class"].isin(list(implausible_classes))),
        "contradiction": ("picture", num_different("class", "picture") > 1),
        "leakage": ("picture", num_different("split", "picture") > 1),
        "identical": ("content_hash", readable.duplicated("content_hash", keep=False)),
        "tiny": ("path", is_readable & (images[["width", "height"]].min(axis=1) < MIN_SIDE)),
        "flat": ("path", is_readable & (_contrast(thumbnails, np.ones_like(_DISC)) < MIN_CONTRAST)),
        "small class": ("class", num_different("picture", "class") < MIN_DISTINCT_IMAGES),
    }
    for kind, (key, is_found) in groups.items():
        found = images.loc[is_found.index[is_found]]
        for value, group in found.groupby(key, sort=key == "class"):
            add(kind, group.index, max_distance.get(value, 0.0) if kind in PAIR_KINDS else np.nan)
    for pair, distance in zip(pairs, near_duplicates["distance"], strict=True):
        add("near-duplicate", pair, distance)
    table = pd.DataFrame(findings, columns=["kind", "images", "classes", "distance"])
    table["kind"] = pd.Categorical(table["kind"], categories=list(KINDS))
    return table.sort_values(["kind", "distance"], kind="stable", ignore_index=True)


def summarise(findings: pd.DataFrame) -> str:
    """Returns a line for each kind of finding, or one that says that there are none.

    Single files and classes are named, at most three of each kind.
    """
    lines = []
    for kind, text in KINDS.items():
        rows = findings[findings["kind"] == kind]
        if len(rows) == 0:
            continue
        line = text.format(len(rows))
        if kind not in PAIR_KINDS:
            named = rows["classes"] if kind in ("small class", "class name") else rows["images"]
            names = [printable(name) for name, *_ in named[:3]]
            line += f" ({', '.join(names)}{', …' if len(rows) > 3 else ''})"
        lines.append(line)
    return "\n".join(lines) if lines else "nothing found"


def worst_pairs(findings: pd.DataFrame, max_pairs: int = 12) -> pd.DataFrame:
    """Returns the findings to look at first, a row for each pair of files.

    The columns: `images` and `classes` of the two files, of different classes where there are
    any; `kinds`, all that was found of these two; `distance`. The gravest kinds come first, and
    each combination of classes once before any comes twice.
    """
    pairs = findings[findings["kind"].isin(PAIR_KINDS)].copy()
    seconds = [_second_of_pair(classes) for classes in pairs["classes"]]
    for name in ("images", "classes"):
        pairs[name] = [(v[0], v[second]) for v, second in zip(pairs[name], seconds, strict=True)]
    kinds = pairs.groupby("images", sort=False)["kind"].agg(tuple).rename("kinds")
    pairs = pairs.drop_duplicates("images").join(kinds, on="images")
    pairs["turn"] = pairs.groupby(["kinds", "classes"], observed=True).cumcount()
    pairs = pairs.sort_values(["turn", "kind"], kind="stable", ignore_index=True)[:max_pairs]
    return pairs[["kinds", "images", "classes", "distance"]]


def _second_of_pair(classes: Sequence[str]) -> int:
    return next((i for i, name in enumerate(classes) if name != classes[0]), 1)


def unavoidable_errors(metadata: pd.DataFrame) -> int:
    """Returns how many of these images any classifier gets wrong.

    Identical files get the same answer, so at best those of their commonest class are right.
    `metadata` has the columns `content_hash` and `class`.
    """
    counts = metadata.groupby(["content_hash", "class"]).size()
    return int(counts.sum() - counts.groupby("content_hash").max().sum())


def _in_chunks(
    function: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, size: int, name: str = ""
) -> np.ndarray:
    """Returns what the function makes of the rows, `size` at a time to bound the memory.

    With a `name`, more than one chunk shows its progress under it.
    """
    starts: Iterable[int] = range(0, max(len(rows), 1), size)
    if name and len(rows) > size:
        starts = ProgressBar(starts, name, unit="chunk")
    return np.concatenate([function(rows[start : start + size]) for start in starts])


def _contrast(thumbnails: np.ndarray, where: np.ndarray = _DISC) -> np.ndarray:
    """Returns the standard deviation of the grey levels of each thumbnail, (N,)."""
    return _in_chunks(lambda part: _halved(part)[:, where].std(axis=1), thumbnails, 8192)


def _halved(thumbnails: np.ndarray) -> np.ndarray:
    """Returns the means of 2 x 2 pixels, float32 (N, 16, 16)."""
    blocks = thumbnails.reshape(-1, _GRID, 2, _GRID, 2)
    return blocks.mean(axis=(2, 4), dtype=np.float32)


def _invariant_features(thumbnails: np.ndarray) -> np.ndarray:
    """Returns features that flips and rotations by 90 degrees do not change, float32 (N, 136).

    They are principal components, those of the largest variance last.
    """
    rows, columns = np.triu_indices(_GRID)
    # A feature that stands for two coefficients counts twice in a distance.
    weights = np.where(rows == columns, 1, np.sqrt(2)).astype(np.float32)

    def features_of(part: np.ndarray) -> np.ndarray:
        sizes = np.abs(dctn(_standardized(part), axes=(1, 2), norm="ortho"))
        return ((sizes + sizes.transpose(0, 2, 1)) / 2)[:, rows, columns] * weights

    features = _in_chunks(features_of, thumbnails, 8192, "describing images")
    centred = features - features.mean(axis=0)
    return centred @ np.linalg.eigh(centred.T @ centred)[1]


def _distances(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns how far apart the thumbnails of each pair of rows (P, 2) are, (P,)."""

    def distances_of(part: np.ndarray) -> np.ndarray:
        first, second = (_standardized(thumbnails[rows]) for rows in part.T)
        squares = [((first - view) ** 2).sum(axis=(1, 2)) for view in _orientations(second)]
        return np.sqrt(np.min(squares, axis=0) / _DISC.sum()).astype(np.float64)

    return _in_chunks(distances_of, pairs, 4096, "comparing pairs of images")


def _standardized(thumbnails: np.ndarray) -> np.ndarray:
    """Returns mean 0 and standard deviation 1 within the disc, 0 outside, float32 (N, 16, 16)."""
    values = _halved(thumbnails)
    inside = values[:, _DISC]
    inside -= inside.mean(axis=1, keepdims=True)
    values[:] = 0
    values[:, _DISC] = inside / inside.std(axis=1, keepdims=True)
    return values


def _orientations(images: np.ndarray) -> Iterator[np.ndarray]:
    for view in (images, images.transpose(0, 2, 1)):
        yield from (view, view[:, ::-1], view[:, :, ::-1], view[:, ::-1, ::-1])
