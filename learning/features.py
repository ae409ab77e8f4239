"""Features of a frozen backbone, computed once and kept on disk, for training its head.

A frozen backbone gives the same features for the same pixels at every step. `cache_features`
computes those of the images that training and validation show, and returns loaders that give them
in place of the images. A rotation by a few degrees or another brightness would be other pixels at
each step, so of the augmentations only the eight flips and quarter-turns are left.
"""

import hashlib
import inspect
import json
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor

from augmentation import NUM_TURNS, POLICIES, turn
from dataset import LesionDataset, LesionLoader, to_float
from imaging.batches import MAX_GPU_FRACTION, GatheredBatch, Inputs
from learning.hardware import (
    autocast,
    describe_hardware,
    memory_format_for,
    name_of_precision,
    resolve_precision,
)
from models import LesionClassifier, evaluation_mode
from storage.files import lock, remove_leftovers, write_atomically
from storage.progress import ProgressBar

MAX_BYTES = 2 * 10**9  # of all features of a model; above, training computes them at each step
CACHED_SPLITS = ("train", "valid")
VERSION = 1  # of what is in the files


class FeatureLoader(LesionLoader):
    """Batches `({"features": float32 (B, F)}, labels)`: what `loader` gives, after the backbone.

    `features` are those of the images of `loader`, float32 `(N, V, F)` in V views. The order is
    that of `loader`. Where it augments, batch k has one of the views of each image, which depends
    only on the seed and k, and is the one that the policy "flips_and_quarter_turns" draws;
    elsewhere there is one view, the image as it is.
    """

    def __init__(self, loader: LesionLoader, features: Tensor) -> None:
        super().__init__(
            loader.dataset,
            loader.batch_size,
            shuffle=loader.shuffle,
            augmentation=POLICIES["flips_and_quarter_turns" if loader.augmentation else "none"],
            balanced=loader.balanced,
            device=loader.device,
            seed=loader.seed,
            rank=loader.rank,
            world_size=loader.world_size,
        )
        self.features = features.to(self.device) if _fits(features, self.device) else features

    def _gathered(self, parts: Iterator[np.ndarray]) -> Iterator[GatheredBatch]:
        labels, others = torch.from_numpy(self.dataset.labels), self.dataset.extra_inputs
        for part in map(torch.from_numpy, parts):
            yield {"rows": part} | {name: of[part] for name, of in others.items()}, labels[part]

    def _finish(self, batch: GatheredBatch, drawn: list[Any]) -> tuple[Inputs, Tensor]:
        inputs, labels = batch
        rows = inputs.pop("rows")
        views = drawn[0] if drawn else torch.zeros_like(rows)
        inputs["features"] = self.features[rows, views]
        inputs = {name: t.to(self.device, non_blocking=True) for name, t in inputs.items()}
        return inputs, labels.to(self.device, non_blocking=True)


def cache_features(
    model: LesionClassifier,
    loaders: Mapping[str, LesionLoader],
    *,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> dict[str, LesionLoader]:
    """Returns the loaders with a `FeatureLoader` in place of those named train and valid.

    Any other, such as that of the test images, stays as it is: the model is tested on images, as it
    is used later. Training then changes the head alone, and `train` and `evaluate` treat the
    loaders like any other; the model is whole, and so is its `model.pth`.

    The features lie beside the array of the images, `features-*.npy`, written whole or not at all,
    and are read from there when the images, the weights of the backbone, the views, the batch size,
    the precision, the versions of torch and torchvision, the hardware and the number of threads are
    the same. Several processes wait for the one that computes them. `device` is where the model is
    moved to, by default where it is; `precision` is as for `train`.

    Above `MAX_BYTES` of features the loaders are returned as they are, with a warning. Raises
    ValueError for a model whose backbone is not frozen, or that does not take `features`.
    """
    if not model.is_frozen:
        raise ValueError(
            "only a frozen backbone has features that stay the same; choose a <backbone>_head model"
        )
    if "features" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__}.forward does not take features")
    if not are_cacheable(model, loaders):
        num_bytes = size_of_features(model, loaders)
        warnings.warn(
            f"the features of {model.config.get('name', 'the model')} would take "
            f"{num_bytes / 1e9:.1f} GB, more than the {MAX_BYTES / 1e9:.1f} GB that are kept; they "
            "are computed at each step",
            stacklevel=2,
        )
        return dict(loaders)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = resolve_precision(precision, device)
    model.to(device).to(memory_format=memory_format_for(device, dtype))
    return {
        name: FeatureLoader(loader, _load_features(model, loader, device, dtype))
        if name in CACHED_SPLITS
        else loader
        for name, loader in loaders.items()
    }


def size_of_features(model: LesionClassifier, loaders: Mapping[str, LesionLoader]) -> int:
    """Returns how many bytes of features `cache_features` would keep for these loaders."""
    shapes = [_shape(model, loaders[name]) for name in CACHED_SPLITS if name in loaders]
    return sum(int(np.prod(shape)) for shape in shapes) * 4


def are_cacheable(model: LesionClassifier, loaders: Mapping[str, LesionLoader]) -> bool:
    """Returns whether `cache_features` would keep the features of these loaders."""
    return size_of_features(model, loaders) <= MAX_BYTES


def count_features(model: LesionClassifier) -> int:
    """Returns how many features of an image the model's head takes."""
    return next(model.head.parameters()).shape[1]


def compute_features(
    model: LesionClassifier, images: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Returns the features `(B, F)` of images `(B, 3, H, W)` in [0, 1], as float32.

    They are computed in evaluation mode, on this device in this precision.
    """
    images = images.to(device, memory_format=memory_format_for(device, dtype))
    with evaluation_mode(model), torch.inference_mode(), autocast(device, dtype):
        return model.features(images).float()


def _shape(model: LesionClassifier, loader: LesionLoader) -> tuple[int, int, int]:
    num_views = NUM_TURNS if loader.augmentation else 1
    return len(loader.dataset), num_views, count_features(model)


def _fits(features: Tensor, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return features.nbytes < free * MAX_GPU_FRACTION


def _load_features(
    model: LesionClassifier, loader: LesionLoader, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Returns the features of a loader's images, from the disk; computes them where it must."""
    shape = _shape(model, loader)
    folder = loader.dataset.array_path.parent
    path = folder / f"features-{_key(model, loader, device, dtype)}.npy"
    if not _is_whole(path, shape):
        try:
            with lock(folder / ".lock"):
                remove_leftovers(folder)
                if not _is_whole(path, shape):  # or another process has just written it
                    _write_features(path, model, loader, device, dtype)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}; {np.prod(shape) * 4 / 1e6:,.1f} MB are needed for features; "
                "choose another folder with --cache_dir (cache_dir)",
                str(path),
            ) from error
    # Copied where it is written to, which nobody does: torch warns of arrays that are read-only.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False  # none there, or none of ours: it is written anew
    return array.shape == shape and array.dtype == np.float32


def _write_features(
    path: Path,
    model: LesionClassifier,
    loader: LesionLoader,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    shape, dataset = _shape(model, loader), loader.dataset
    with (
        write_atomically(path) as temporary,
        open(temporary, "wb") as file,
        ProgressBar(name="computing features", total=len(dataset), unit="img") as bar,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(dataset), loader.batch_size):
            rows = np.arange(start, min(start + loader.batch_size, len(dataset)))
            images = to_float(torch.from_numpy(dataset.gather(rows)).to(device))
            views = (turn(images, view) for view in range(shape[1]))
            features = [compute_features(model, view, device, dtype) for view in views]
            file.write(torch.stack(features, dim=1).cpu().numpy().astype("<f4").tobytes())
            bar.update(len(rows))


def _key(
    model: LesionClassifier, loader: LesionLoader, device: torch.device, dtype: torch.dtype
) -> str:
    """Returns 32 hex digits that differ wherever the features may differ in a single bit."""
    described = {
        "version": VERSION,
        "images": _describe_images(loader.dataset),
        "shape": _shape(model, loader),
        "batch_size": loader.batch_size,
        "precision": name_of_precision(dtype),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torchvision": torchvision.__version__,
        "backbone": repr(model.backbone),
        "processor": _name_of_processor(),
        **describe_hardware(device),
    }
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update(np.ascontiguousarray(loader.dataset.rows, dtype=np.int64).tobytes())
    weights = model.backbone.state_dict() | {"mean": model.mean, "std": model.std}
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _describe_images(dataset: LesionDataset) -> list[Any]:
    """Returns what tells the array and the images in it from others.

    The name of an array is never given twice, and an array is made anew when an image changes.
    """
    array = os.stat(dataset.array_path)
    hashes = dataset.metadata["content_hash"].tolist() if "content_hash" in dataset.metadata else []
    identity = [dataset.array_path.name, array.st_size, array.st_mtime_ns]
    return [*identity, dataset.image_size, dataset.preprocessors, hashes]


def _name_of_processor() -> str:
    """Returns the name of the processor, as exactly as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # of other systems than Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
