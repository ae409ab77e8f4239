"""How much memory training takes from a large array and from a small one.

    python benchmarks/memory.py

Writes arrays of 200 and 20,000 random images of 224 pixels (3 GB on disk), trains SimpleCNN on each
in a process of its own, through several thousand of the images, and prints the peak of each
process's anonymous memory (RssAnon: what is not the disk's cache and cannot be given back).
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
IMAGE_SIZE, NUM_CLASSES = 224, 9


def write_array(path: Path, count: int) -> None:
    shape = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    rng = np.random.default_rng(0)
    for start in range(0, count, 500):
        array[start : start + 500] = rng.integers(0, 256, (min(500, count - start), *shape[1:]))
    array.flush()


def train_on(path: Path, num_steps: int) -> int:
    """The peak of this process's RssAnon in bytes, sampled after each batch."""
    from dataset import LesionDataset, create_dataloaders
    from models import get_model
    from training import make_optimizer, train

    count = len(np.load(path, mmap_mode="r"))
    labels = np.arange(count) % NUM_CLASSES
    metadata = pd.DataFrame({"label": labels})
    classes = [str(label) for label in range(NUM_CLASSES)]
    dataset = LesionDataset(path, np.arange(count), metadata, classes)
    few = LesionDataset(path, np.arange(64), metadata[:64], classes)
    loaders = create_dataloaders({"train": dataset, "valid": few}, device="cpu")
    model = get_model("simple_cnn", NUM_CLASSES, seed=0)
    optimizer = make_optimizer(model)
    peak = 0

    def sample(*arguments: object) -> None:
        nonlocal peak
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)

    optimizer.register_step_post_hook(sample)
    loader, valid = loaders["train"], loaders["valid"]
    train(model, loader, valid, NUM_CLASSES, num_steps, optimizer, eval_every=num_steps)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[200, 20_000])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--array", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.array:
        print(train_on(arguments.array, arguments.steps))
        return
    from experiment.results import environment

    print(f"precision {environment('cpu')['precision']}")
    for count in arguments.images:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.npy"
            write_array(path, count)
            words = [sys.executable, __file__, "--array", path, "--steps", str(arguments.steps)]
            peak = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        print(f"{count:,} images: {peak / 2**20:.0f} MiB of anonymous memory", flush=True)


if __name__ == "__main__":
    main()
