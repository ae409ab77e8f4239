"""Which near-duplicates the audit finds at which threshold, on copies made of real images.

    python benchmarks/near_duplicates.py --data_dir ./data/raw

Makes a copy of every different image: mirrored and turned in one of eight ways, resized by 0.4 to
1.6, saved as JPEG of quality 40 to 95. Prints for each threshold the share of the copies that are
found, and how many pairs of originals are; and the nearest of those, to be looked at.
"""

import argparse
import hashlib
import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataset import find_images
from imaging.audit import MAX_DISTANCE, find_near_duplicates
from imaging.decode import decode
from imaging.prepare import make_thumbnail

THRESHOLDS = (0.04, 0.06, 0.08, 0.1, 0.12, MAX_DISTANCE, 0.16, 0.18, 0.2, 0.22, 0.24)
TURNS = [None, *Image.Transpose]


def changed_copy(image: Image.Image, rng: np.random.Generator) -> bytes:
    turn = TURNS[rng.integers(len(TURNS))]
    image = image if turn is None else image.transpose(turn)
    scale = rng.uniform(0.4, 1.6)
    size = [max(1, round(side * scale)) for side in image.size]
    buffer = io.BytesIO()
    quality = int(rng.integers(40, 96))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="decides the changes")
    arguments = parser.parse_args()
    files = {path: (arguments.data_dir / path).read_bytes() for path in _paths(arguments.data_dir)}
    rng = np.random.default_rng(arguments.seed)
    originals, copies = [], []
    for contents in tqdm(files.values(), "copies", disable=None):
        image = decode(contents)[0]
        originals.append(make_thumbnail(image))
        copies.append(make_thumbnail(decode(changed_copy(image, rng))[0]))
    thumbnails, paths = np.stack(originals + copies), list(files)
    found = find_near_duplicates(thumbnails, range(len(thumbnails)), max(THRESHOLDS))
    num_images = len(paths)
    is_copy = found["second"] == found["first"] + num_images
    others = found[found["second"] < num_images]  # those of originals with originals
    # Of a pair of others, the copies of both make three more.
    different = found["first"] % num_images != found["second"] % num_images
    rows = []
    for threshold in THRESHOLDS:
        within = found["distance"] <= threshold
        recall = (within & is_copy).sum() / num_images
        others_within = (others["distance"] <= threshold).sum()
        rows.append((threshold, f"{recall:.4f}", others_within, (within & different).sum()))
    print(f"{num_images} different files, as many copies; the furthest copy found is ", end="")
    print(f"{found['distance'][is_copy].max():.3f} away")
    names = ["threshold", "copies found", "pairs of different files", "with their copies"]
    print(pd.DataFrame(rows, columns=names).to_string(index=False))
    for pair in others.sort_values("distance").head(20).itertuples():
        print(f"{pair.distance:.3f}  {paths[pair.first]}  {paths[pair.second]}")


def _paths(data_dir: Path) -> list[str]:
    """The images of a folder, of identical ones the first alone."""
    table = find_images(data_dir)
    table["content_hash"] = [
        hashlib.sha256((data_dir / path).read_bytes()).hexdigest() for path in table["path"]
    ]
    return table.drop_duplicates("content_hash")["path"].tolist()


if __name__ == "__main__":
    main()
