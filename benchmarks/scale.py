"""How long building, auditing and splitting take, and in how much memory, by number of images.

    python benchmarks/scale.py --data_dir ./data/raw --num_images 100000

Makes small JPEGs by blending random pairs of the images in `data_dir`, and a table that gives each
an invented patient, then measures each stage in a process of its own.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataset import DatasetBuilder, find_images
from imaging.audit import find_near_duplicates
from storage.files import write_csv

SIDE, IMAGE_SIZE = 96, 32


def make_images(source: Path, root: Path, num_images: int) -> Path:
    paths = find_images(source)["path"]
    small = np.stack([_read_small(source / path) for path in paths])
    rng = np.random.default_rng(0)
    rows = []
    for number in tqdm(range(num_images), "drawing", disable=None):
        first, second = small[rng.integers(len(small), size=2)]
        weight = rng.uniform(0.2, 0.8)
        blended = first * weight + second[:, ::-1] * (1 - weight) + rng.normal(0, 3, first.shape)
        folder = root / f"class{rng.integers(9)}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.clip(blended, 0, 255).astype(np.uint8))
        image.save(folder / f"{number:06d}.jpg", quality=85)
        rows.append((f"{folder.name}/{number:06d}.jpg", f"patient {rng.integers(num_images // 3)}"))
    table = root.parent / "patients.csv"
    write_csv(pd.DataFrame(rows, columns=["path", "patient_id"]), table)
    return table


def _read_small(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE)), dtype=np.float32)


def build_and_audit(root: Path, table: Path) -> None:
    DatasetBuilder(root, image_size=IMAGE_SIZE).audit()


def pair_alone(root: Path, table: Path) -> None:
    (path,) = (root.parent / "processed").glob("*/thumbnails-*.npy")
    thumbnails = np.load(path)
    print(f"{len(find_near_duplicates(thumbnails, range(len(thumbnails)))):,} near-duplicates")


def audit_again(root: Path, table: Path) -> None:
    DatasetBuilder(root, image_size=IMAGE_SIZE).audit()


def split(root: Path, table: Path) -> None:
    DatasetBuilder(root, image_size=IMAGE_SIZE).build()


def split_by_patient(root: Path, table: Path) -> None:
    builder = DatasetBuilder(
        root, image_size=IMAGE_SIZE, metadata_csv=table, group_by=["patient_id"]
    )
    builder.build()


def measure(stage, *arguments) -> tuple[float, float, float]:
    """Seconds of a call, and megabytes at its peak in a process of its own: anonymous, and all."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        peak = [0.0]
        threading.Thread(target=_watch, args=(peak,), daemon=True).start()
        started = time.perf_counter()
        stage(*arguments)
        seconds = time.perf_counter() - started
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        sender.send((seconds, peak[0], resident))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    sender.close()  # or a child that fails would be waited for without end
    measured = receiver.recv()
    process.join()
    return measured


def _watch(peak: list[float]) -> None:
    while True:
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], float(status.split("RssAnon:")[1].split()[0]) / 1024)
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "raw"
        table = make_images(arguments.data_dir, root, arguments.num_images)
        print(f"{arguments.num_images:,} images")
        for stage in (build_and_audit, pair_alone, audit_again, split, split_by_patient):
            seconds, anonymous, resident = measure(stage, root, table)
            print(
                f"{stage.__name__}: {seconds:.1f} s, peak {anonymous:.0f} MB anonymous, "
                f"{resident:.0f} MB with what is mapped",
                flush=True,
            )


if __name__ == "__main__":
    main()
