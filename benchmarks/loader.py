"""How fast augmented batches are made: our loader and torchvision's v2 transforms, in turn.

    python benchmarks/loader.py --data_dir ./data/raw

Both read the same prepared array in the same process and do flips, rotation, brightness, contrast
and noise. Prints images per second, the median of several rounds, and their ratio.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataset import DatasetBuilder, LesionDataset, create_dataloaders

TRANSFORMS = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.RandomRotation(10, v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=0.2, contrast=0.2),
        v2.ToDtype(torch.float32, scale=True),
        v2.GaussianNoise(sigma=0.015),
    ]
)


class Transformed(Dataset):
    """The same images as tensors that torchvision's transforms take, one by one."""

    def __init__(self, dataset: LesionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(self.dataset.gather([index])[0]).permute(2, 0, 1)
        return TRANSFORMS(image), int(self.dataset.labels[index])


def endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    splits, _ = DatasetBuilder(arguments.data_dir, cache_dir=arguments.cache_dir).build()
    theirs = DataLoader(Transformed(splits["train"]), 32, shuffle=True, drop_last=True)
    ours = create_dataloaders(splits, 32, device="cpu")["train"]
    streams = {"torchvision v2": endless(theirs), "ours": ours.batches()}
    speeds = {name: [] for name in streams}
    for number in range(arguments.rounds + 1):
        for name, batches in streams.items():
            started = time.perf_counter()
            for _ in range(arguments.batches):
                next(batches)
            if number > 0:  # the first warms up
                speeds[name].append(32 * arguments.batches / (time.perf_counter() - started))
    theirs, ours = (statistics.median(values) for values in speeds.values())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batches of 32 at 224")
    print(f"torchvision v2 {theirs:.0f} images/s, ours {ours:.0f}, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
