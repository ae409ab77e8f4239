"""How fast an array is built, and in how much memory: ours and a plain loop, in turn.

    python benchmarks/build.py --data_dir ./data/raw

Makes JPEGs of camera sizes from the images in `data_dir` (enlarged, with grain, so that there is
detail to decode), then prepares them with `DatasetBuilder` and with the loop that people write:
open, convert, resize, crop, append. Prints images per second and peak memory of both, their ratio,
and how far the pixels differ, beside how far JPEG quality 90 moves them.
"""

import argparse
import io
import multiprocessing
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataset import DatasetBuilder, LesionDataset, find_images

SIZES = {(1024, 768): 400, (3000, 2000): 80}
PLAIN = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])


def make_images(source: Path, root: Path, size: tuple[int, int], count: int) -> None:
    paths = find_images(source)["path"].sample(count, random_state=0)
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 4, (size[1], size[0], 3)).astype(np.float32)
    for number, path in enumerate(paths):
        with Image.open(source / path) as image:
            large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
        noisy = np.clip(large + np.roll(grain, number * 7, axis=1), 0, 255).astype(np.uint8)
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(folder / f"{number:05d}.jpg", quality=92)


def plain_loop(root: Path) -> np.ndarray:
    images = []
    for path in find_images(root)["path"]:
        images.append(np.asarray(PLAIN(Image.open(root / path).convert("RGB"))))
    return np.stack(images)


def ours(root: Path, cache: Path) -> np.ndarray:
    dataset = only_build(root, cache)
    return dataset.gather(np.arange(len(dataset)))


def measure_memory(function, arguments) -> float:
    """Peak megabytes that a call adds, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def call() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function(*arguments)
        sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = context.Process(target=call)
    process.start()
    peak = receiver.recv()
    process.join()
    return peak


def only_build(root: Path, cache: Path) -> LesionDataset:
    datasets, _ = DatasetBuilder(root, cache_dir=cache).build(splits={"all": 1.0})
    return datasets["all"]


def quality_90(images: np.ndarray) -> float:
    """The mean difference in levels of 255 that saving as JPEG at quality 90 makes."""
    differences = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=90)
        saved = np.asarray(Image.open(buffer)).astype(int)
        differences.append(np.abs(saved - image).mean())
    return float(np.mean(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torchvision {torchvision.__version__}")
    for size, count in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "raw"
            make_images(arguments.data_dir, root, size, count)
            speeds = {"plain": [], "ours": []}
            for repeat in range(arguments.repeats):
                started = time.perf_counter()
                plain = plain_loop(root)
                speeds["plain"].append(count / (time.perf_counter() - started))
                started = time.perf_counter()
                fast = ours(root, Path(folder) / f"cache{repeat}")
                speeds["ours"].append(count / (time.perf_counter() - started))
            best = {name: max(values) for name, values in speeds.items()}
            memory = {
                "plain": measure_memory(plain_loop, (root,)),
                "ours": measure_memory(only_build, (root, Path(folder) / "cache-memory")),
            }
            difference = np.abs(plain.astype(int) - fast).mean()
            print(
                f"{size[0]} x {size[1]}, {count} images, best of {arguments.repeats}: plain "
                f"{best['plain']:.1f} images/s, ours {best['ours']:.1f}, ratio "
                f"{best['ours'] / best['plain']:.2f}; peak memory plain {memory['plain']:.0f} MB, "
                f"ours {memory['ours']:.0f} MB; pixels differ by {difference:.2f} levels on "
                f"average, JPEG quality 90 by {quality_90(plain[:50]):.2f}"
            )


if __name__ == "__main__":
    main()
