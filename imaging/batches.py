"""The images of one split, the order in which an epoch shows them, and how batches are gathered."""

import functools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imaging.splits import derive_seed

MAX_GPU_FRACTION = 0.25  # of a GPU's free memory that the images of a split may take
MAX_REPEATS = 10  # times as often as plain shuffling, that balanced sampling may show an image
Inputs = Tensor | dict[str, Tensor]  # images, or `images` and further inputs by name
GatheredBatch = tuple[dict[str, Tensor], Tensor]  # inputs by name, and labels


@dataclass(eq=False, repr=False)
class LesionDataset(Dataset):
    """Images and labels of one split; `dataset[i]` is `(float32 (3, H, W) in [0, 1], int)`.

    With further inputs, added by `add_input`, the first part of an item is a dict: the image under
    `images`, and the others under their names.

    The images lie in an array on disk. It is opened on first use, so a copy of the data set in
    another process opens it again instead of copying the images.

    Attributes: `classes`, the names in label order; `labels`, int64 `(N,)`; `metadata`, a row for
    each image; `image_size`; `preprocessors`, their fingerprint, empty for none; `extra_inputs`,
    tensors `(N, ...)` by name.
    """

    array_path: Path
    rows: np.ndarray
    metadata: pd.DataFrame
    classes: list[str]
    preprocessors: str = ""
    extra_inputs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.array_path = Path(self.array_path).absolute()
        self.labels = self.metadata["label"].to_numpy(np.int64, copy=True)
        self.image_size = self._images.shape[1]
        inputs, self.extra_inputs = self.extra_inputs, {}
        for name, values in inputs.items():
            self.add_input(name, values)

    def add_input(self, name: str, values: Tensor) -> None:
        """Adds an input beside the images: a tensor `(N, ...)`, a row for each image, in order."""
        if name == "images":
            raise ValueError(
                "an input cannot be called images, which is the name of the images themselves"
            )
        if len(values) != len(self):
            raise ValueError(f"input {name} has {len(values)} rows for {len(self)} images")
        self.extra_inputs[name] = values

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Inputs, int]:
        image = to_float(torch.from_numpy(self.gather([index])))[0].contiguous()
        label = int(self.labels[index])
        if not self.extra_inputs:
            return image, label
        return {"images": image} | {n: v[index] for n, v in self.extra_inputs.items()}, label

    def gather(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns these images as they are stored, uint8 `(B, H, W, 3)`."""
        return self._images[self.rows[np.asarray(indices)]]

    def gather_batch(self, indices: Sequence[int] | np.ndarray) -> GatheredBatch:
        """Returns the inputs by name, `images` among them as uint8 `(B, H, W, 3)`, and labels."""
        indices = np.asarray(indices)
        images = torch.from_numpy(self.gather(indices))
        extra_inputs = {name: values[indices] for name, values in self.extra_inputs.items()}
        return {"images": images} | extra_inputs, torch.from_numpy(self.labels[indices])

    @functools.cached_property
    def _images(self) -> np.ndarray:
        return np.load(self.array_path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_images"}


def gather_batches(
    dataset: LesionDataset, parts: Iterator[np.ndarray], num_workers: int, pin_memory: bool
) -> Iterator[GatheredBatch]:
    """Returns the batch of each part, numbers of images, read ahead by processes if there are any.

    The global random state is not used.
    """
    # DataLoader takes the numbers for the items, and gathers a batch to collate them.
    return iter(
        DataLoader(
            range(len(dataset)),  # type: ignore[arg-type]  # the stubs demand a Dataset
            batch_sampler=parts,  # type: ignore[arg-type]  # and a Sampler
            collate_fn=dataset.gather_batch,
            num_workers=num_workers,
            generator=torch.Generator(),
            pin_memory=pin_memory,
            worker_init_fn=_ignore_interrupts,
        )
    )


def _ignore_interrupts(worker: int) -> None:
    """Leaves Ctrl-C to the parent, which may still need a batch to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class DeviceDataset:
    """A copy of a data set in a device's memory, from which batches are gathered fastest."""

    def __init__(self, dataset: LesionDataset, device: torch.device) -> None:
        size = dataset.image_size
        images = torch.empty(len(dataset), size, size, 3, dtype=torch.uint8, device=device)
        for start in range(0, len(dataset), 256):
            rows = np.arange(start, min(start + 256, len(dataset)))
            images[start : start + 256] = torch.from_numpy(dataset.gather(rows)).to(device)
        extra_inputs = {name: values.to(device) for name, values in dataset.extra_inputs.items()}
        self.inputs = {"images": images} | extra_inputs
        self.labels = torch.from_numpy(dataset.labels).to(device)

    def gather_batch(self, indices: np.ndarray) -> GatheredBatch:
        """Returns what `LesionDataset.gather_batch` returns, on the device."""
        places = torch.from_numpy(indices).to(self.labels.device, non_blocking=True)
        inputs = {name: values[places] for name, values in self.inputs.items()}
        return inputs, self.labels[places]


def fits_in_gpu_memory(dataset: LesionDataset, device: torch.device) -> bool:
    """Returns whether the device is a GPU whose free memory has room for the images."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return len(dataset) * dataset.image_size**2 * 3 < free * MAX_GPU_FRACTION


def to_float(images: Tensor) -> Tensor:
    """Returns uint8 `(B, H, W, 3)` as float32 `(B, 3, H, W)` in [0, 1], on the same device.

    The channels stay last in memory, as convolutions are fastest then.
    """
    return images.to(torch.float32).div_(255).permute(0, 3, 1, 2)


def shuffled_epoch(
    labels: np.ndarray, seed: int, epoch: int, *, balanced: bool = False
) -> np.ndarray:
    """Returns the numbers of the images in the order in which an epoch shows them, (N,).

    With `balanced` each appears as often as `balanced_frequencies` says, rounded up or down.
    """
    rng = np.random.default_rng(derive_seed(seed, "order", epoch))
    images = rng.permutation(len(labels))
    if not balanced:
        return images
    # Systematic sampling.
    expected = balanced_frequencies(labels)[images]
    passed = np.floor(np.cumsum(expected) + rng.random() + 1e-9).astype(np.int64)
    passed[-1] = len(images)
    return rng.permutation(np.repeat(images, np.diff(passed, prepend=0)))


def balanced_frequencies(labels: np.ndarray) -> np.ndarray:
    """Returns how often balanced sampling shows each image in an epoch of N draws, float64 (N,).

    Classes are drawn equally often, but no image more than `MAX_REPEATS` times; the draws that a
    class loses by that go to the other classes in equal parts.
    """
    num_images = len(labels)
    classes, class_of_image, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    frequency = np.zeros(len(classes))
    capped = np.zeros(len(classes), dtype=bool)
    while not capped.all():
        rest = num_images - MAX_REPEATS * sizes[capped].sum()
        frequency[~capped] = rest / (~capped).sum() / sizes[~capped]
        newly = ~capped & (frequency > MAX_REPEATS)
        if not newly.any():
            break
        frequency[newly] = MAX_REPEATS
        capped |= newly
    return frequency[class_of_image]
