"""Image folders → metadata → memory-mapped arrays → stratified splits → loaders."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from augmentation import Policy, resolve_policy
from imaging import audit
from imaging.batches import (
    MAX_GPU_FRACTION,
    MAX_REPEATS,
    DeviceDataset,
    GatheredBatch,
    Inputs,
    LesionDataset,
    balanced_frequencies,
    fits_in_gpu_memory,
    gather_batches,
    shuffled_epoch,
    to_float,
)
from imaging.cache import ArrayCache, PreparedImages
from imaging.classes import check_class_names, find_implausible_classes
from imaging.decode import UnreadableImageError
from imaging.prepare import (
    MAX_REPETITIONS,
    SECONDS_OF_PROBING,
    Preprocessor,
    center_crop,
    fingerprint,
    normalize,
    prepare_image,
    read_image,
    resize,
)
from imaging.sources import (
    IMAGE_SUFFIXES,
    METADATA_COLUMNS,
    SPLIT_FOLDERS,
    UNSUPPORTED_SUFFIXES,
    Images,
    Sources,
    default_groups,
    find_images,
    given_name,
    read_images,
)
from imaging.splits import (
    check_at_least,
    check_seed,
    check_splits,
    derive_seed,
    given_splits,
    group_images,
    has_folder_of_split,
    k_fold_splits,
    read_splits,
    split_of_folder,
    splits_of_folders,
    stratified_split,
    take_valid_out_of_train,
    warn_of_divided_groups,
    warn_of_missing_classes,
)
from imaging.tables import STEM_COLUMNS, check_id_column, join_table, read_table
from storage.files import printable

__all__ = [
    "DEFAULT_SPLITS", "IMAGE_SUFFIXES", "MAX_REPETITIONS", "METADATA_COLUMNS", "SECONDS_OF_PROBING",
    "SPLIT_FOLDERS", "STEM_COLUMNS", "UNSUPPORTED_SUFFIXES", "DatasetBuilder", "LesionDataset",
    "LesionLoader", "Preprocessor", "UnreadableImageError", "balanced_frequencies", "center_crop",
    "check_seed", "create_dataloaders", "derive_seed", "find_images", "fingerprint", "group_images",
    "has_folder_of_split", "join_table", "k_fold_splits", "normalize", "prepare_image",
    "read_image", "read_table", "resize", "stratified_split", "to_float",
]  # fmt: skip

DEFAULT_SPLITS = {"train": 0.70, "valid": 0.20, "test": 0.10}
SPLIT_BY = ("random", "folders", "official")
EVALUATION_BATCHES = 4  # times as many images in a batch, on GPUs, where nothing is trained
SHARE_OF_GPU_FOR_IMAGES = MAX_GPU_FRACTION  # its former name
MOST_REPEATS = MAX_REPEATS  # its former name


@dataclass(eq=False)
class DatasetBuilder(Sources):
    """Makes stratified data sets from a folder of images, with a folder for each class.

    Parameters
    ----------
    data_dir : folder of `<class>/<image>`, or of `<split>/<class>/<image>`, which are pooled, or of
        a published set as it is downloaded, or of another layout of `imaging.layouts.READERS`
    layout : name of the layout; by default it is recognised by the files
    image_size : side in pixels of the square images that the models see
    cache_dir : folder of the array of prepared images; `processed/` beside `data_dir` if None
    num_workers : threads that prepare images; None is one for each core the process may use
    seed : decides which images go to which split
    skip_unreadable : leave out images that cannot be read, with a warning, instead of raising
    labels_csv : a table whose column `class` overrides the folders of the images that it names; if
        these are in no folders, or it has one-hot columns instead, it alone gives the classes
    label_column : the column of `labels_csv`, or else of `metadata_csv`, that alone gives the
        classes, or several one-hot columns, as `imaging.labels.labels_of_rows` describes
    class_names : classes by their numbers in the table, from 0
    class_map : new names of classes by their old ones, or texts `old=new`, or a table with these
        two columns; classes of equal new names are merged, those without one are left out
    unlabelled : what to do with images without a label: "error", or "drop" them
    label_conflicts : what to do with images that are in several classes: "keep" them (together, in
        one split), "drop" them all, or "error"
    metadata_csv : a table whose columns are added to the metadata; one whose name the metadata has
        already gets the suffix `_given`
    group_by : columns of `metadata_csv` or of the folder's reader; images with the same value stay
        in one split; None for `lesion_id` and `patient_id`, where there are such columns
    split_by : "random", or "folders" for the splits that the folders Train, Test and, if there is
        one, Valid make, or "official" for those of a column `split` of `metadata_csv` or of the
        folder's reader; without a Valid it is taken out of Train
    splits_csv : a table whose column `split` gives the split of each image, such as an earlier
        run's `splits.csv`; images without one are left out
    accept_class_names : go on with classes that do not look like classes, such as a folder named
        images or test, which are an error otherwise (`imaging.classes.find_implausible_classes`)
    id_column : the column of the tables that names the images; by default the one whose values
        match most of them; a table without it is matched as if it were not given

    Names of images match as `imaging.tables.ImageNames` describes.
    """

    _: KW_ONLY
    image_size: int = 224
    cache_dir: str | Path | None = None
    num_workers: int | None = None
    seed: int = 42
    skip_unreadable: bool = False
    label_conflicts: str = "keep"
    group_by: Sequence[str] | None = None
    split_by: str = "random"
    splits_csv: str | Path | None = None

    def __post_init__(self) -> None:
        check_at_least(8, image_size=self.image_size)
        check_at_least(0, num_workers=self.num_workers or 0)
        check_seed(self.seed)
        if self.label_conflicts not in ("keep", "drop", "error"):
            raise ValueError(
                f"label_conflicts must be keep, drop or error, not {self.label_conflicts!r}"
            )
        if self.split_by not in SPLIT_BY:
            raise ValueError(f"split_by must be {', '.join(SPLIT_BY)}, not {self.split_by!r}")
        if self.split_by != "random" and self.splits_csv is not None:
            raise ValueError(f"give split_by={self.split_by!r} or splits_csv, not both")
        super().__post_init__()
        if self.id_column is not None and not self._tables():
            raise ValueError(
                "id_column needs a table that has it: labels_csv, metadata_csv or splits_csv"
            )

    def list_images(self, *, content_hash: bool = False) -> pd.DataFrame:
        """Returns `path`, `class` and `source_split` of each image, without decoding any.

        Where splits are given, the column `split` has them, missing for images without one. With
        `content_hash` the files are read as by `build`, and the column of that name identifies
        their contents. Raises what `build` raises for a folder or tables that cannot be used.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `prepare` and `build` warn of the same
            images, given, *_ = self._read_images()
        if not self.accept_class_names:
            check_class_names(images, self.data_dir)
        split = self._given_splits(images, given)
        if split is not None:
            images["split"] = split
        if content_hash:
            index = self._cache(()).load(images["path"].tolist())
            images["content_hash"] = [record.content_hash for record in index.records]
        return images

    def build(
        self,
        preprocessors: Sequence[Preprocessor] = (),
        splits: Mapping[str, float] | None = None,
        *,
        prepared: PreparedImages | None = None,
    ) -> tuple[dict[str, LesionDataset], pd.DataFrame]:
        """Returns the data set of each split, and the metadata of all images.

        A preprocessor maps a uint8 RGB array `(h, w, 3)` to another of any height and width, uint8
        or float in [0, 1]; they run in the order given, before the images are scaled and cropped.
        `splits` are names and fractions, by default train 0.7, valid 0.2, test 0.1. Identical files
        and near-duplicates are never divided between splits. `prepared` is the result of `prepare`
        for these preprocessors, to save reading the files again.

        The metadata has a row for each image: `path`, `class`, `label`, `source_split`, `width`,
        `height`, `content_hash`, `picture` (the same number for identical files and
        near-duplicates), `group`, `split`, and the columns of the folder's reader and of
        `metadata_csv`.

        Raises FileNotFoundError or ValueError for a folder, tables or splits that cannot be used,
        and UnreadableImageError, which names all images that cannot be read.
        """
        splits = DEFAULT_SPLITS if splits is None else splits
        check_splits(splits)
        # Until the end, the index of the table is the row of the image in the array.
        metadata, given, cache, index, _ = prepared or self.prepare(preprocessors)
        if not self.accept_class_names:
            check_class_names(metadata, self.data_dir)
        split = self._given_splits(metadata, given)
        is_used = index.check_readable(skip_unreadable=self.skip_unreadable)
        if split is not None:
            is_used &= split.notna().to_numpy()
            if split.isna().any():
                message = f"{split.isna().sum():,} of {len(split):,} images are in no split"
                warnings.warn(f"{message}, and are left out", stacklevel=2)
        metadata = self._resolve_label_conflicts(metadata[is_used])
        classes = sorted(metadata["class"].unique())
        if len(classes) < 2:
            raise ValueError(f"{printable(self.data_dir)}: fewer than two classes remain")
        metadata["label"] = metadata["class"].map(classes.index)
        keys = ["picture", *map(given_name, self.groups(given))]
        metadata["group"] = group_images(metadata.join(given), keys)
        metadata["split"] = self._split(metadata, split, splits)
        metadata = metadata[list(METADATA_COLUMNS)].join(given)

        names = list(splits)
        if self.splits_csv is not None or self.split_by != "random":
            names = [name for name in DEFAULT_SPLITS if name in set(metadata["split"])]
        warn_of_missing_classes(metadata, names)
        datasets, array_path = {}, cache.folder / index.array
        for name in names:
            part = metadata[metadata["split"] == name]
            rows, part = part.index.to_numpy(), part.reset_index(drop=True)
            datasets[name] = LesionDataset(array_path, rows, part, classes, cache.fingerprint)
        return datasets, metadata.reset_index(drop=True)

    def audit(
        self, preprocessors: Sequence[Preprocessor] = (), *, prepared: PreparedImages | None = None
    ) -> pd.DataFrame:
        """Returns what is wrong with the images, a row for each finding (see `imaging.audit`).

        All images count, whatever `label_conflicts` and `skip_unreadable` say; one that cannot be
        read is a finding. Leakage is sought between the splits of `splits_csv`, or else, unless
        `split_by` is "folders", of a column `split` of `metadata_csv`, or else of folders named
        Train, Valid and Test.

        Raises what `build` raises for a folder or tables that cannot be used.
        """
        metadata, given, cache, index, _ = prepared or self.prepare(preprocessors)
        metadata = metadata.assign(error=[record.error for record in index.records])
        if self.splits_csv is not None:
            split = read_splits(metadata, self.splits_csv, id_column=self.id_column)
        elif self.split_by != "folders" and "split_given" in given:
            split = given["split_given"]
        else:
            split = split_of_folder(metadata["source_split"])
        metadata["split"] = split.fillna("")
        implausible = () if self.accept_class_names else find_implausible_classes(metadata)
        return audit.audit(metadata, index.near_duplicates, cache.thumbnails(index), implausible)

    def prepare(self, preprocessors: Sequence[Preprocessor] = ()) -> PreparedImages:
        """Finds and reads all images, once for both `audit` and `build`.

        Raises what `build` raises for a folder or tables that cannot be used.
        """
        images = self._read_images()
        cache, metadata = self._cache(preprocessors), images.table
        index = cache.load(metadata["path"].tolist())
        for name in ("width", "height", "content_hash"):
            metadata[name] = [getattr(record, name) for record in index.records]
        metadata["picture"] = audit.number_originals(
            metadata["content_hash"], index.near_duplicates, cache.thumbnails(index)
        )
        if self.splits_csv is not None:
            read_splits(metadata, self.splits_csv, id_column=self.id_column, uses=images.tables)
        return PreparedImages(metadata, images.given, cache, index, images)

    def groups(self, given: pd.DataFrame) -> tuple[str, ...]:
        """Returns the columns that keep images together, of those beside the metadata's own."""
        return default_groups(given) if self.group_by is None else tuple(self.group_by)

    def _tables(self) -> list[str | Path]:
        tables = (self.labels_csv, self.metadata_csv, self.splits_csv)
        return [table for table in tables if table is not None]

    def _cache(self, preprocessors: Sequence[Preprocessor]) -> ArrayCache:
        data_dir = Path(self.data_dir)
        default = Path(os.path.abspath(data_dir)).parent / "processed"
        cache_dir = default if self.cache_dir is None else Path(self.cache_dir)
        return ArrayCache(data_dir, cache_dir, self.image_size, preprocessors, self.num_workers)

    def _read_images(self) -> Images:
        if self.id_column is not None:
            check_id_column(self._tables(), self.id_column)
        return read_images(self, self.group_by or ())

    def _resolve_label_conflicts(self, metadata: pd.DataFrame) -> pd.DataFrame:
        conflicting = metadata.groupby("picture")["class"].transform("nunique") > 1
        if self.label_conflicts == "error" and conflicting.any():
            first = metadata[metadata["picture"] == metadata["picture"][conflicting].iloc[0]]
            names = ", ".join(map(printable, first["path"]))
            raise ValueError(
                f"{conflicting.sum()} images have copies of another class, such as {names}; "
                "correct the labels, or set label_conflicts to keep or drop"
            )
        return (metadata[~conflicting] if self.label_conflicts == "drop" else metadata).copy()

    def _given_splits(self, images: pd.DataFrame, given: pd.DataFrame) -> pd.Series | None:
        if self.splits_csv is not None:
            return read_splits(images, self.splits_csv, id_column=self.id_column)
        if self.split_by == "folders":
            return splits_of_folders(images, self.data_dir)
        if self.split_by == "official":
            if "split_given" not in given:
                raise ValueError(
                    f"{printable(self.data_dir)}: split_by is official, but neither the layout nor "
                    "metadata_csv has a column split"
                )
            return given_splits(given["split_given"], images["path"], self.data_dir)
        return None

    def _split(
        self, metadata: pd.DataFrame, given: pd.Series | None, splits: Mapping[str, float]
    ) -> np.ndarray:
        labels, groups = metadata["label"].to_numpy(), metadata["group"].to_numpy()
        if given is None:
            return stratified_split(labels, groups, splits, self.seed)
        split = given[metadata.index].to_numpy(object, copy=True)
        if self.splits_csv is None and "valid" not in set(split):
            take_valid_out_of_train(split, labels, groups, splits, self.seed)
        warn_of_divided_groups(groups, split)
        return split


class LesionLoader:
    """Batches `(images, labels)` of a data set on the device: float32 in [0, 1], and int64.

    If the data set has further inputs, a dict takes the place of the images and holds them under
    `images`, the others under their names.

    `for images, labels in loader` is one epoch; its last batch may be smaller.
    `loader.batches(start=k)` is the endless stream of full batches that training reads; batch k
    depends only on the seed and k.

    Where several processes train together, each has a loader with its own `rank` below
    `world_size`, and gets its part of each batch of `batches`, which then has `batch_size` times
    `world_size` images in all, and of the images of an epoch, each of which exactly one gets.
    """

    def __init__(
        self,
        dataset: LesionDataset,
        batch_size: int = 32,
        *,
        shuffle: bool = False,
        augmentation: bool | str | Policy = False,
        balanced: bool = False,
        device: torch.device | str | None = None,
        seed: int = 42,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, num_workers=num_workers)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be at least 0 and less than world_size, not {rank}")
        if len(dataset) == 0:
            raise ValueError("the data set has no images")
        check_seed(seed)
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augmentation = resolve_policy(augmentation)
        self.balanced = balanced
        self.device = torch.device(device) if device is not None else _default_device()
        self.seed = seed
        self.num_workers = num_workers
        self.rank = rank
        self.world_size = world_size
        self._epoch = 0
        self._on_device: DeviceDataset | None = None

    def __len__(self) -> int:
        return -(-len(self._own_part(np.arange(len(self.dataset)))) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        epoch = self._epoch
        self._epoch += 1
        order = self._own_part(self._order(epoch))
        parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        for number, batch in enumerate(self._gathered(iter(parts))):
            drawn = self._draw(len(batch[1]), "epoch batch", epoch, number, self.rank)
            yield self._finish(batch, drawn)

    def batches(self, start: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
        """Yields batch number `start` and all that follow, each of `batch_size` images."""
        size = self.batch_size * self.world_size
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        parts = (part[own] for part in self._endless_order(start, size))
        for number, batch in enumerate(self._gathered(parts), start):
            drawn = [values[own] for values in self._draw(size, "batch", number)]
            yield self._finish(batch, drawn)

    def _own_part(self, order: np.ndarray) -> np.ndarray:
        return np.array_split(order, self.world_size)[self.rank]

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.dataset))
        labels = self.dataset.labels
        return shuffled_epoch(labels, self.seed, epoch, balanced=self.balanced)

    def _endless_order(self, start: int, size: int) -> Iterator[np.ndarray]:
        epoch, skip = divmod(start * size, len(self.dataset))
        waiting = self._order(epoch)[skip:]
        while True:
            while len(waiting) < size:
                epoch += 1
                waiting = np.concatenate([waiting, self._order(epoch)])
            yield waiting[:size]
            waiting = waiting[size:]

    def _gathered(self, parts: Iterator[np.ndarray]) -> Iterator[GatheredBatch]:
        if self._on_device is None and fits_in_gpu_memory(self.dataset, self.device):
            self._on_device = DeviceDataset(self.dataset, self.device)
        if self._on_device is not None:
            return map(self._on_device.gather_batch, parts)
        pin_memory = self.device.type == "cuda"  # so that copying a batch need not wait for the GPU
        return gather_batches(self.dataset, parts, self.num_workers, pin_memory)

    def _draw(self, count: int, purpose: str, *numbers: int) -> list[Any]:
        """Returns what each entry of the policy draws for `count` images."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, purpose, *numbers))
        return [entry.draw(generator, count) for entry in self.augmentation]

    def _finish(self, batch: GatheredBatch, drawn: list[Any]) -> tuple[Inputs, Tensor]:
        inputs, labels = batch
        inputs = {name: t.to(self.device, non_blocking=True) for name, t in inputs.items()}
        labels = labels.to(self.device, non_blocking=True)
        images = to_float(inputs["images"])
        for entry, values in zip(self.augmentation, drawn, strict=True):
            images, labels = entry.apply(images, labels, values)
        return images if len(inputs) == 1 else inputs | {"images": images}, labels


def create_dataloaders(
    dataset_splits: Mapping[str, LesionDataset],
    batch_size: int = 32,
    *,
    augmentation: bool | str | Policy = True,
    balanced: bool = False,
    device: torch.device | str | None = None,
    seed: int = 42,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, LesionLoader]:
    """Returns a loader for each split; only the one named `train` is shuffled and augmented.

    `augmentation` is whether to apply the "standard" policy, or the name of one of
    `augmentation.POLICIES`, or a policy of one's own.
    `balanced` draws the classes of the training split equally often, but no image more than ten
    times as often as plain shuffling would. `device` is where the batches go, None for CUDA if it
    is available; there the other splits come in batches four times as large, as evaluation needs
    less memory. `num_workers` are processes that read ahead, 0 for none. Where several processes
    train together, `batch_size` is that of each, and `rank` is the number of this one of
    `world_size`. Raises ValueError for a split without images.
    """
    device = torch.device(device) if device is not None else _default_device()
    larger = 1 if device.type == "cpu" else EVALUATION_BATCHES
    empty = [name for name, dataset in dataset_splits.items() if len(dataset) == 0]
    if empty:
        raise ValueError(
            f"too few images, or groups of images: none are left for {', '.join(empty)}"
        )
    return {
        name: LesionLoader(
            dataset,
            batch_size if name == "train" else batch_size * larger,
            shuffle=name == "train",
            augmentation=augmentation if name == "train" else "none",
            balanced=balanced and name == "train",
            device=device,
            seed=seed,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
        )
        for name, dataset in dataset_splits.items()
    }


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
