"""What is wrong with a set of images, from a table of their hashes, thumbnails and labels.

Knows neither image files nor torch: whoever decodes the images makes the thumbnails, grey and
`THUMBNAIL_SIZE` on each side whatever the shape of the picture, and gives them here.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.fft import dctn
from scipy.spatial import cKDTree

from storage.files import printable

THUMBNAIL_SIZE = 32
# Chosen on the ISIC nine-class set from the curve that benchmarks/near_duplicates.py prints.
MAX_DISTANCE = 0.14
TREE_DIMENSIONS = 12  # in more, a k-d tree looks almost everywhere
FLAT = 1.0  # standard deviation of a thumbnail's grey levels, of 255
SMALL_SIDE = 32  # pixels, below which nothing of a lesion can be seen
FEWEST_PICTURES = 10  # of a class, below which nothing can be learnt or measured

# What a finding may be, the gravest first, and how the summary says it.
KINDS = {
    "unreadable": "files that cannot be read: {}",
    "contradiction": "pictures under several classes: {}, of which one label each must be wrong; "
    "--labels_csv corrects it, --label_conflicts drop leaves these pictures out",
    "leakage": "pictures in several of the given splits: {}; pooled and split anew, each comes "
    "into one",
    "identical": "groups of identical files: {}",
    "near-duplicate": "pairs of other files that show the same picture: {}",
    "tiny": "images of less than " + str(SMALL_SIDE) + " pixels on a side: {}",
    "flat": "images of one colour: {}",
    "small class": "classes of fewer than " + str(FEWEST_PICTURES) + " pictures, too few to learn "
    "or to measure: {}",
}
# Thumbnails are compared at half their size, where re-encoding and resizing change least, and
# within a disc: dark corners and the black frame round a lens are alike in all pictures of a
# camera, and would outweigh the lesions.
_GRID = THUMBNAIL_SIZE // 2
_AXIS = (np.arange(_GRID) + 0.5) * 2 / _GRID - 1
_DISC = np.hypot(_AXIS[:, None], _AXIS) < 0.7
PAIRS = ("contradiction", "leakage", "identical", "near-duplicate")


def find_near_duplicates(
    thumbnails: np.ndarray, content_hashes: Sequence[str], max_distance: float = MAX_DISTANCE
) -> pd.DataFrame:
    """The pairs of files that show the same picture, re-encoded, resized, mirrored or turned.

    `thumbnails` is uint8 grey (N, 32, 32). Gives a row a pair: `first` and `second`, row numbers
    with first < second, and `distance`, up to `max_distance`: the root mean square difference in
    the best of the eight orientations, each thumbnail brought to mean 0 and standard deviation 1,
    within a disc about the middle. That is 0 for the same, the root of 2 for what has nothing in
    common. Of files with equal `content_hashes` the first alone is compared, and images of one
    colour are not.

    Mirroring and turning by 90 degrees change only signs and order of the coefficients of the
    discrete cosine transform, so these without sign, averaged with their transposes, are the same
    for all eight orientations, and no further apart than the thumbnails are: a k-d tree over them
    gives candidates without missing any.
    """
    compared = pd.Series(content_hashes).drop_duplicates().index.to_numpy()
    compared = compared[_contrast(thumbnails[compared]) >= FLAT]
    if len(compared) < 2:
        return pd.DataFrame({"first": [], "second": [], "distance": []})
    described = _describe(thumbnails[compared])
    reach = np.sqrt(_DISC.sum()) * max_distance
    tree = cKDTree(described[:, -TREE_DIMENSIONS:])
    candidates = np.sort(tree.query_pairs(reach, output_type="ndarray"), axis=1)
    candidates = candidates[_is_within(described, candidates, reach)]
    candidates = compared[candidates[np.lexsort(candidates.T[::-1])]]
    distance = _distances(thumbnails, candidates)
    found = distance <= max_distance
    first, second = candidates[found].T
    return pd.DataFrame({"first": first, "second": second, "distance": distance[found]})


def number_pictures(
    content_hashes: Sequence[str], near_duplicates: pd.DataFrame, thumbnails: np.ndarray
) -> np.ndarray:
    """The number of the picture that each image shows, int (N,), from 0 in order of appearance.

    Files with equal contents show one picture, and so do near-duplicates, nearest first, as long as
    no two files of a picture are further apart than copies of one original can be (twice
    `MAX_DISTANCE`): a series that changes by small steps does not become one picture.
    """
    content = pd.factorize(pd.Series(content_hashes))[0]
    first_rows = np.unique(content, return_index=True)[1]
    picture = np.arange(len(first_rows))
    members = {number: [number] for number in picture}
    nearest_first = near_duplicates.sort_values("distance", kind="stable")
    for rows in nearest_first[["first", "second"]].to_numpy():
        kept, joining = sorted(picture[content[rows]])
        if kept == joining:
            continue
        pairs = [(first_rows[a], first_rows[b]) for a in members[kept] for b in members[joining]]
        if _distances(thumbnails, np.array(pairs)).max() > 2 * MAX_DISTANCE:
            continue
        members[kept] += members.pop(joining)
        picture[members[kept]] = kept
    return pd.factorize(picture[content])[0]


def audit(
    metadata: pd.DataFrame, near_duplicates: pd.DataFrame, thumbnails: np.ndarray
) -> pd.DataFrame:
    """What is wrong with the images, a row a finding, the gravest first.

    `metadata` has a row an image and the columns `path`, `class`, `content_hash`, `picture` (of
    `number_pictures`), `width`, `height`, `split` (of a folder or a table, empty for none) and
    `error` (empty for images that could be read); `near_duplicates` comes from
    `find_near_duplicates`; `thumbnails` (N, 32, 32) are in the same order.

    The columns: `kind`; `images` and `classes`, a tuple of paths and one of the class of each;
    `distance`, the largest between near-duplicates among them, 0 for identical files. The kinds:
    `unreadable`; `contradiction`, one picture under several classes; `leakage`, one in several
    splits; `identical`, files with the same contents; `near-duplicate`, two others of one picture;
    `tiny`, less than 32 pixels on a side; `flat`, of one colour; `small class`, fewer than 10
    pictures.
    """
    names = ("path", "class", "split", "content_hash", "picture")
    paths, classes, splits, contents, pictures = (metadata[n].to_numpy(object) for n in names)
    is_readable = (metadata["error"] == "").to_numpy()
    readable = np.flatnonzero(is_readable)
    first = near_duplicates["first"].to_numpy(int)
    apart = near_duplicates["distance"].groupby(pictures[first]).max().to_dict()
    findings = []

    def add(kind: str, rows: Sequence[int], distance: float = np.nan) -> None:
        rows = list(rows)
        findings.append((kind, tuple(paths[rows]), tuple(classes[rows]), distance))

    for row in np.flatnonzero(~is_readable):
        add("unreadable", [row])
    for picture, rows in pd.Series(readable).groupby(pictures[readable], sort=False):
        if len(set(classes[rows])) > 1:
            add("contradiction", rows, apart.get(picture, 0.0))
        if len(set(splits[rows]) - {""}) > 1:
            add("leakage", rows, apart.get(picture, 0.0))
    for _, rows in pd.Series(readable).groupby(contents[readable], sort=False):
        if len(rows) > 1:
            add("identical", rows, 0.0)
    for pair in near_duplicates.itertuples():
        add("near-duplicate", [pair.first, pair.second], pair.distance)
    shorter_side = metadata[["width", "height"]].min(axis=1).to_numpy()
    for row in readable[shorter_side[readable] < SMALL_SIDE]:
        add("tiny", [row])
    for row in readable[_contrast(thumbnails[readable], np.ones_like(_DISC)) < FLAT]:
        add("flat", [row])
    for _, rows in pd.Series(readable).groupby(classes[readable]):
        if len(set(pictures[rows])) < FEWEST_PICTURES:
            add("small class", rows)
    table = pd.DataFrame(findings, columns=["kind", "images", "classes", "distance"])
    table["kind"] = pd.Categorical(table["kind"], categories=list(KINDS))
    return table.sort_values(["kind", "distance"], kind="stable", ignore_index=True)


def summarise(findings: pd.DataFrame) -> str:
    """The findings in a few lines that a person can act on; one line when there are none.

    Single files and classes are named, three of each kind at most.
    """
    lines = []
    for kind, rows in findings.groupby("kind", observed=True):
        line = KINDS[kind].format(len(rows))
        if kind not in PAIRS:
            named = rows["classes"] if kind == "small class" else rows["images"]
            names = [printable(name) for name, *_ in named[:3]]
            line += f" ({', '.join(names)}{', …' if len(rows) > 3 else ''})"
        lines.append(line)
    return "\n".join(lines) if lines else "nothing found"


def worst_pairs(findings: pd.DataFrame, most: int = 12) -> pd.DataFrame:
    """A choice of findings to look at, a row a pair: `kinds`, `images`, `classes`, `distance`.

    `images` and `classes` are those of two files, of different classes where there are such, and
    `kinds` all that was found of these two. The gravest kinds come first, and of each combination
    of classes one before any has a second.
    """
    pairs = findings[findings["kind"].isin(PAIRS)].copy()
    chosen = [_two_of(classes) for classes in pairs["classes"]]
    for name in ("images", "classes"):
        values = zip(pairs[name], chosen, strict=True)
        pairs[name] = [tuple(of_all[i] for i in two) for of_all, two in values]
    kinds = pairs.groupby("images", sort=False)["kind"].agg(tuple).rename("kinds")
    pairs = pairs.drop_duplicates("images").join(kinds, on="images")
    pairs["turn"] = pairs.groupby(["kinds", "classes"], observed=True).cumcount()
    pairs = pairs.sort_values(["turn", "kind"], kind="stable", ignore_index=True)[:most]
    return pairs[["kinds", "images", "classes", "distance"]]


def _two_of(classes: Sequence[str]) -> tuple[int, int]:
    other = [i for i, name in enumerate(classes) if name != classes[0]]
    return 0, other[0] if other else 1


def unavoidable_errors(metadata: pd.DataFrame) -> int:
    """How many of these images any classifier must call wrong: it gives equal files one answer.

    `metadata` has the columns `content_hash` and `class`; of equal files the commonest class is
    right.
    """
    counts = metadata.groupby(["content_hash", "class"]).size()
    return int(counts.sum() - counts.groupby("content_hash").max().sum())


def _contrast(thumbnails: np.ndarray, where: np.ndarray = _DISC) -> np.ndarray:
    """The standard deviation of the grey levels, (N,)."""
    parts = [np.empty(0, dtype=np.float32)]
    for start in range(0, len(thumbnails), 8192):
        parts.append(_halved(thumbnails[start : start + 8192])[:, where].std(axis=1))
    return np.concatenate(parts)


def _halved(thumbnails: np.ndarray) -> np.ndarray:
    """The means of 2 x 2 pixels, float32 (N, 16, 16)."""
    blocks = thumbnails.reshape(-1, _GRID, 2, _GRID, 2)
    return blocks.mean(axis=(2, 4), dtype=np.float32)


def _describe(thumbnails: np.ndarray) -> np.ndarray:
    """136 numbers a thumbnail that mirroring and turning do not change, float32 (N, 136).

    They are turned so that the last ones tell most (principal components).
    """
    rows, columns = np.triu_indices(_GRID)
    weights = np.where(rows == columns, 1, np.sqrt(2)).astype(np.float32)
    parts = []
    for start in range(0, len(thumbnails), 8192):
        part = _standardise(thumbnails[start : start + 8192])
        sizes = np.abs(dctn(part, axes=(1, 2), norm="ortho"))
        sizes = (sizes + sizes.transpose(0, 2, 1)) / 2
        # What stands for two coefficients counts twice in a distance.
        parts.append(sizes[:, rows, columns] * weights)
    described = np.concatenate(parts)
    centred = described - described.mean(axis=0)
    return centred @ np.linalg.eigh(centred.T @ centred)[1]


def _is_within(described: np.ndarray, pairs: np.ndarray, reach: float) -> np.ndarray:
    near = [np.empty(0, dtype=bool)]
    for start in range(0, len(pairs), 100_000):
        first, second = pairs[start : start + 100_000].T
        near.append(((described[first] - described[second]) ** 2).sum(axis=1) <= reach**2)
    return np.concatenate(near)


def _distances(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """How far apart the thumbnails of each pair of rows (P, 2) are, (P,)."""
    parts = [np.empty(0)]
    for start in range(0, len(pairs), 4096):
        rows = pairs[start : start + 4096].T
        first, second = (_standardise(thumbnails[side]) for side in rows)
        squares = [((first - view) ** 2).sum(axis=(1, 2)) for view in _orientations(second)]
        parts.append(np.sqrt(np.min(squares, axis=0) / _DISC.sum()))
    return np.concatenate(parts)


def _standardise(thumbnails: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 within the disc, 0 outside, float32 (N, 16, 16)."""
    values = _halved(thumbnails)
    inside = values[:, _DISC]
    inside -= inside.mean(axis=1, keepdims=True)
    values[:] = 0
    values[:, _DISC] = inside / inside.std(axis=1, keepdims=True)
    return values


def _orientations(images: np.ndarray) -> Iterable[np.ndarray]:
    for view in (images, images.transpose(0, 2, 1)):
        yield from (view, view[:, ::-1], view[:, :, ::-1], view[:, ::-1, ::-1])
