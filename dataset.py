"""Image folders → metadata → memory-mapped arrays → stratified splits → loaders."""

import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from augmentation import Policy, resolve_policy
from imaging import audit
from imaging.batches import (
    MAX_GPU_FRACTION,
    MAX_REPEATS,
    DeviceDataset,
    Inputs,
    LesionDataset,
    balanced_frequencies,
    fits_in_gpu_memory,
    shuffled_epoch,
    to_float,
)
from imaging.cache import ArrayCache, CacheIndex, FileRecord
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
    STEM_COLUMNS,
    UNSUPPORTED_SUFFIXES,
    check_unicode,
    find_images,
    given_name,
    has_folder_of_split,
    join_table,
    read_folder,
    read_table,
    split_of_folder,
    warn_of_rows_without_image,
)
from imaging.splits import (
    check_seed,
    check_splits,
    derive_seed,
    group_images,
    k_fold_splits,
    stratified_split,
    warn_of_missing_classes,
)
from storage.files import printable

__all__ = [
    "DEFAULT_SPLITS",
    "IMAGE_SUFFIXES",
    "MAX_REPETITIONS",
    "METADATA_COLUMNS",
    "SECONDS_OF_PROBING",
    "SPLIT_FOLDERS",
    "STEM_COLUMNS",
    "UNSUPPORTED_SUFFIXES",
    "DatasetBuilder",
    "LesionDataset",
    "LesionLoader",
    "Preprocessor",
    "UnreadableImageError",
    "balanced_frequencies",
    "center_crop",
    "check_seed",
    "create_dataloaders",
    "derive_seed",
    "find_images",
    "fingerprint",
    "group_images",
    "has_folder_of_split",
    "join_table",
    "k_fold_splits",
    "normalize",
    "prepare_image",
    "read_image",
    "read_table",
    "resize",
    "stratified_split",
    "to_float",
]

DEFAULT_SPLITS = {"train": 0.70, "valid": 0.20, "test": 0.10}
EVALUATION_BATCHES = 4  # times as many images a batch, on GPUs, where nothing is trained
SHARE_OF_GPU_FOR_IMAGES = MAX_GPU_FRACTION  # its former name
MOST_REPEATS = MAX_REPEATS  # its former name


class DatasetBuilder:
    """Makes stratified data sets from a folder of images, one sub-folder a class.

    Parameters
    ----------
    data_dir : folder of `<class>/<image>`, or of `<split>/<class>/<image>`, which are pooled
    image_size : side in pixels of the square images that the models see
    cache_dir : where the array of prepared images is kept; `processed/` beside `data_dir` if None
    num_workers : threads that prepare images; None is one a core that the process may use
    seed : decides which images go to which split
    skip_unreadable : go on without images that cannot be read, with a warning, instead of raising
    labels_csv : a table whose column `class` overrides the folders of the images that it names
    label_column : the column of `labels_csv`, or else of `metadata_csv`, that alone gives the
        classes; the images then need no class folders
    label_conflicts : what becomes of pictures that stand under several classes: "keep" them
        (together, in one split), "drop" them all, or "error"
    metadata_csv : a table whose columns are added to the metadata; a name that the metadata has
        already gets the ending `_given`
    group_by : columns of `metadata_csv`; images with the same lesion or patient stay in one split
    split_by : "random", or "folders" for the splits that the folders Train, Test and, if there is
        one, Valid make; without a Valid it is taken out of Train
    splits_csv : a table whose column `split` gives the split of every image, such as an earlier
        run's `splits.csv`

    Tables name the images as `join_table` says.
    """

    def __init__(
        self,
        data_dir: str | Path,
        *,
        image_size: int = 224,
        cache_dir: str | Path | None = None,
        num_workers: int | None = None,
        seed: int = 42,
        skip_unreadable: bool = False,
        labels_csv: str | Path | None = None,
        label_column: str | None = None,
        label_conflicts: str = "keep",
        metadata_csv: str | Path | None = None,
        group_by: Sequence[str] = (),
        split_by: str = "random",
        splits_csv: str | Path | None = None,
    ) -> None:
        if image_size < 8:
            raise ValueError(f"image_size is {image_size}; it must be 8 or more")
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 0 or more")
        if label_conflicts not in ("keep", "drop", "error"):
            raise ValueError(f"label_conflicts is {label_conflicts!r}; not keep, drop or error")
        if split_by not in ("random", "folders"):
            raise ValueError(f"split_by is {split_by!r}; it must be random or folders")
        if split_by == "folders" and splits_csv is not None:
            raise ValueError(
                "splits come from split_by='folders' or from splits_csv, not from both"
            )
        if label_column is not None and labels_csv is None and metadata_csv is None:
            raise ValueError("label_column needs the table it is in: labels_csv or metadata_csv")
        check_seed(seed)
        self.data_dir = Path(data_dir)
        self.image_size = image_size
        default = Path(os.path.abspath(data_dir)).parent / "processed"
        self.cache_dir = default if cache_dir is None else Path(cache_dir)
        self.num_workers = num_workers
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.labels_csv = labels_csv
        self.label_column = label_column
        self.label_conflicts = label_conflicts
        self.metadata_csv = metadata_csv
        self.group_by = list(group_by)
        self.split_by = split_by
        self.splits_csv = splits_csv

    def list_images(self, *, content_hash: bool = False) -> pd.DataFrame:
        """Returns a row an image, without opening one: `path`, `class` and `source_split`.

        Where splits are given, the column `split` has them, missing for images without one. With
        `content_hash` a column of that name tells the contents, for which the files are read as by
        `build`. Raises what `build` raises for a folder or tables that cannot be used.
        """
        images, _ = self._read_tables()
        if self.splits_csv is not None:
            table = read_table(self.splits_csv, ["split"])
            images["split"] = join_table(images["path"], table, self.splits_csv)["split"]
        elif self.split_by == "folders":
            images["split"] = self._splits_of_folders(images)
        if content_hash:
            index = self._cache(()).load(images["path"].tolist())
            images["content_hash"] = [record.content_hash for record in index.records]
        return images

    def build(
        self,
        preprocessors: Sequence[Preprocessor] = (),
        splits: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, LesionDataset], pd.DataFrame]:
        """The data set of each split, and the metadata of all images.

        A preprocessor maps a uint8 RGB array `(h, w, 3)` to another of any height and width, uint8
        or float in [0, 1]; they run in the order given, before the images are scaled and cropped.
        `splits` are names and fractions, by default train 0.7, valid 0.2, test 0.1. Files of the
        same picture, identical or nearly so, are never divided between splits.

        The metadata has a row an image: `path`, `class`, `label`, `source_split`, `width`,
        `height`, `content_hash`, `picture`, `group`, `split`, and the columns of `metadata_csv`.

        Raises FileNotFoundError or ValueError for a folder, tables or splits that cannot be used,
        and UnreadableImageError, which names all images that cannot be read.
        """
        splits = DEFAULT_SPLITS if splits is None else splits
        check_splits(splits)
        # Until the end, the index of the table is the row of the image in the array.
        metadata, given, cache, index = self._load(preprocessors)
        readable = self._check_readable(index.records)
        metadata = self._settle_label_conflicts(metadata[readable])
        classes = sorted(metadata["class"].unique())
        if len(classes) < 2:
            raise ValueError(f"{printable(self.data_dir)}: fewer than two classes are left")
        metadata.insert(2, "label", metadata["class"].map(classes.index))
        metadata = metadata.join(given)
        keys = ["picture", *(given_name(name) for name in self.group_by)]
        groups = group_images(metadata, keys)
        metadata.insert(metadata.columns.get_loc("picture") + 1, "group", groups)
        split = self._split(metadata, splits)
        metadata.insert(metadata.columns.get_loc("group") + 1, "split", split)

        names = list(splits)
        if self.splits_csv is not None or self.split_by == "folders":
            usual = [name for name in DEFAULT_SPLITS if name in set(split)]
            names = [*usual, *sorted(set(split) - set(usual))]
        warn_of_missing_classes(metadata, names)
        datasets = {}
        for name in names:
            part = metadata[metadata["split"] == name]
            datasets[name] = LesionDataset(
                cache.folder / index.array,
                part.index.to_numpy(),
                part.reset_index(drop=True),
                classes,
                cache.fingerprint,
            )
        return datasets, metadata.reset_index(drop=True)

    def audit(self, preprocessors: Sequence[Preprocessor] = ()) -> pd.DataFrame:
        """What is wrong with the images, a row a finding, as `audit.audit` describes it.

        All images count, whatever `label_conflicts` and `skip_unreadable` say; one that cannot be
        read is a finding. The splits that no picture should be on both sides of are those of
        `splits_csv`, or else, unless `split_by` is "folders", of a column `split` of
        `metadata_csv`, or else of folders named Train, Valid and Test.

        Raises what `build` raises for a folder or tables that cannot be used.
        """
        metadata, given, cache, index = self._load(preprocessors)
        metadata["error"] = [record.error for record in index.records]
        if self.splits_csv is not None:
            table = read_table(self.splits_csv, ["split"])
            split = join_table(metadata["path"], table, self.splits_csv)["split"]
        elif self.split_by == "random" and "split_given" in given:
            split = given["split_given"]
        else:
            split = split_of_folder(metadata["source_split"])
        metadata["split"] = split.fillna("")
        return audit.audit(metadata, index.near_duplicates, cache.thumbnails(index))

    def _load(
        self, preprocessors: Sequence[Preprocessor]
    ) -> tuple[pd.DataFrame, pd.DataFrame, ArrayCache, CacheIndex]:
        """Image by image what is known of the files, and the user's columns; the prepared array."""
        images, given = self._read_tables()
        cache = self._cache(preprocessors)
        index = cache.load(images["path"].tolist())
        metadata = _metadata(images, index.records)
        metadata["picture"] = audit.number_pictures(
            metadata["content_hash"], index.near_duplicates, cache.thumbnails(index)
        )
        return metadata, given, cache, index

    def _cache(self, preprocessors: Sequence[Preprocessor]) -> ArrayCache:
        return ArrayCache(
            self.data_dir, self.cache_dir, self.image_size, preprocessors, self.num_workers
        )

    def _read_tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Returns `path`, `class` and `source_split` of each image, and the columns beside them."""
        images = self._find_labelled_images()
        given = self._read_metadata(images)
        return images[["path", "class", "source_split"]].copy(), given

    def _find_labelled_images(self) -> pd.DataFrame:
        if self.label_column is None:
            images = read_folder(self.data_dir)
        else:
            images = find_images(self.data_dir, has_class_folders=False)
        name = self.labels_csv or (self.metadata_csv if self.label_column else None)
        if name is None:
            return images
        column = self.label_column or "class"
        table = read_table(name, [column])
        labels = join_table(images["path"], table, name)[column]
        if self.label_column is None:
            warn_of_rows_without_image(images["path"], table, name)
            labels = labels.fillna(images["class"])
        elif labels.isna().any():
            without = images["path"][labels.isna()]
            raise ValueError(
                f"{printable(name)}: no {column} for {len(without)} of {len(images)} images, such "
                f"as {printable(without.iloc[0])}; add them or move these images away"
            )
        check_unicode(labels, name)
        images = images.drop(columns="class", errors="ignore")
        images.insert(1, "class", labels)
        if images["class"].nunique() < 2:
            raise ValueError(f"{printable(name)}: all images are of one class")
        return images

    def _read_metadata(self, images: pd.DataFrame) -> pd.DataFrame:
        """The columns of the folder's reader and of the user's table, a row an image."""
        given = images.drop(columns=["path", "class", "source_split"]).rename(columns=given_name)
        if self.metadata_csv is None:
            missing = [name for name in self.group_by if given_name(name) not in given]
            if missing:
                raise ValueError(
                    f"group_by needs the table its columns are in: metadata_csv; {missing[0]} is "
                    f"no column of {printable(self.data_dir)}"
                )
            return given
        in_table = [name for name in self.group_by if given_name(name) not in given]
        table = read_table(self.metadata_csv, in_table)
        added = join_table(images["path"], table, self.metadata_csv).rename(columns=given_name)
        if added.columns.has_duplicates:
            name = added.columns[added.columns.duplicated()][0]
            raise ValueError(
                f"{printable(self.metadata_csv)}: has both {name.removesuffix('_given')} and "
                f"{name}, which would both be called {name}; rename or remove one"
            )
        in_both = given.columns.intersection(added.columns)
        if len(in_both) > 0:
            raise ValueError(
                f"{printable(self.metadata_csv)}: its column {printable(in_both[0])} is in "
                f"{printable(self.data_dir)} as well; rename or remove it"
            )
        return given.join(added)

    def _settle_label_conflicts(self, metadata: pd.DataFrame) -> pd.DataFrame:
        conflicting = metadata.groupby("picture")["class"].transform("nunique") > 1
        if self.label_conflicts == "error" and conflicting.any():
            first = metadata[metadata["picture"] == metadata["picture"][conflicting].iloc[0]]
            names = ", ".join(map(printable, first["path"]))
            raise ValueError(
                f"{conflicting.sum()} images are of pictures that stand under several classes, "
                f"such as {names}"
            )
        return metadata[~conflicting].copy() if self.label_conflicts == "drop" else metadata

    def _split(self, metadata: pd.DataFrame, splits: Mapping[str, float]) -> np.ndarray:
        if self.splits_csv is not None:
            split = self._read_splits(metadata)
        elif self.split_by == "folders":
            split = self._split_by_folders(metadata, splits)
        else:
            labels, groups = metadata["label"].to_numpy(), metadata["group"].to_numpy()
            return stratified_split(labels, groups, splits, self.seed)
        divided = pd.Series(split).groupby(metadata["group"].to_numpy()).nunique() > 1
        if divided.any():
            affected = metadata["group"].isin(divided.index[divided]).sum()
            warnings.warn(
                f"leakage: {divided.sum()} groups of images that belong together (same picture, "
                f"lesion or patient), {affected} images, are divided between these splits",
                stacklevel=3,
            )
        return split

    def _read_splits(self, metadata: pd.DataFrame) -> np.ndarray:
        table = read_table(self.splits_csv, ["split"])
        split = join_table(metadata["path"], table, self.splits_csv)["split"]
        without = metadata["path"][split.isna().to_numpy()]
        if len(without) > 0:
            raise ValueError(
                f"{printable(self.splits_csv)}: no split for {len(without)} of {len(metadata)} "
                f"images, such as {printable(without.iloc[0])}"
            )
        check_unicode(split, self.splits_csv)
        if len(table) > len(metadata):
            extra = len(table) - len(metadata)
            warnings.warn(
                f"{printable(self.splits_csv)}: {extra} of its images are not here",
                stacklevel=4,
            )
        return split.to_numpy(object)

    def _splits_of_folders(self, metadata: pd.DataFrame) -> pd.Series:
        split = split_of_folder(metadata["source_split"])
        if split.isna().any():
            stray = metadata["path"][split.isna()].iloc[0]
            raise ValueError(
                f"{printable(stray)} is in no folder named Train, Valid or Test, which split_by "
                "needs"
            )
        missing = sorted({"train", "test"} - set(split))
        if missing:
            raise ValueError(f"{printable(self.data_dir)}: no folder for the {missing[0]} split")
        return split

    def _split_by_folders(self, metadata: pd.DataFrame, splits: Mapping[str, float]) -> np.ndarray:
        split = self._splits_of_folders(metadata)
        if "valid" not in set(split):
            if not {"train", "valid"} <= set(splits):
                raise ValueError("splits must have train and valid to take valid out of Train")
            whole = splits["train"] + splits["valid"]
            parts = {name: splits[name] / whole for name in ("train", "valid")}
            rows = metadata[split == "train"]
            labels = pd.factorize(rows["label"], sort=True)[0]
            split[split == "train"] = stratified_split(
                labels, rows["group"].to_numpy(), parts, self.seed
            )
        return split.to_numpy()

    def _check_readable(self, records: Sequence[FileRecord]) -> np.ndarray:
        unreadable = [record for record in records if record.error]
        if unreadable:
            names = ", ".join(f"{printable(r.path)} ({r.error})" for r in unreadable)
            found = f"{len(unreadable)} of {len(records)} images cannot be read"
            if not self.skip_unreadable:
                raise UnreadableImageError(
                    f"{found}: {names}; mend or remove them, or go on without them with "
                    "--skip_unreadable (skip_unreadable=True)"
                )
            warnings.warn(f"{found} and are left out: {names}", stacklevel=3)
        return np.array([not record.error for record in records])


def _metadata(images: pd.DataFrame, records: Sequence[FileRecord]) -> pd.DataFrame:
    metadata = images.copy()
    for name in ("width", "height", "content_hash"):
        metadata[name] = [getattr(record, name) for record in records]
    return metadata


class LesionLoader:
    """Batches `(images, labels)` of a data set, ready on the device: float32 in [0, 1], and int64.

    Where the data set has further inputs, a dict stands in place of the images: these under
    `images`, the others under their names.

    `for images, labels in loader` is one epoch, the last batch as small as it comes.
    `loader.batches(start=k)` is the endless stream of full batches that training reads; batch k
    depends on the seed and k alone.

    Of several processes each has a loader with its own `rank` below `world_size`, and gets its part
    of what one loader would give: of every batch of `batches`, which then has `batch_size` times
    `world_size` images in all, and of the images of an epoch, each of which exactly one process
    gets.
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
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}; it must be 0 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be 0 or more and below world_size")
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
        """The batches from number `start` on, without end; each has `batch_size` images."""
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
        """The numbers of the images of each batch of this size, epoch after epoch."""
        epoch, skip = divmod(start * size, len(self.dataset))
        waiting = self._order(epoch)[skip:]
        while True:
            while len(waiting) < size:
                epoch += 1
                waiting = np.concatenate([waiting, self._order(epoch)])
            yield waiting[:size]
            waiting = waiting[size:]

    def _gathered(self, parts: Iterator[np.ndarray]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        if self._on_device is None and fits_in_gpu_memory(self.dataset, self.device):
            self._on_device = DeviceDataset(self.dataset, self.device)
        if self._on_device is not None:
            return map(self._on_device.gather_batch, parts)
        # The numbers of the images are the items; their batch is gathered when they are collated.
        return iter(
            DataLoader(
                range(len(self.dataset)),  # type: ignore[arg-type]  # which DataLoader takes
                batch_sampler=parts,
                collate_fn=self.dataset.gather_batch,
                num_workers=self.num_workers,
                generator=torch.Generator(),  # instead of the global random state
                pin_memory=self.device.type == "cuda",  # it reaches a busy GPU from there alone
                worker_init_fn=_leave_ctrl_c_to_the_parent,
            )
        )

    def _draw(self, count: int, purpose: str, *numbers: int) -> list[Any]:
        """Returns what each entry of the policy draws for `count` images."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, purpose, *numbers))
        return [entry.draw(generator, count) for entry in self.augmentation]

    def _finish(
        self, batch: tuple[dict[str, Tensor], Tensor], drawn: list[Any]
    ) -> tuple[Inputs, Tensor]:
        inputs, labels = batch
        inputs = {name: t.to(self.device, non_blocking=True) for name, t in inputs.items()}
        labels = labels.to(self.device, non_blocking=True)
        images = to_float(inputs["images"])
        for entry, values in zip(self.augmentation, drawn, strict=True):
            images, labels = entry.apply(images, labels, values)
        return images if len(inputs) == 1 else inputs | {"images": images}, labels


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    """A terminal sends it to all processes; the parent may still want a batch to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
    """A loader for each split; the one named `train` is shuffled and augmented, the others neither.

    `augmentation` is whether to apply the "standard" policy, or the name of one of
    `augmentation.POLICIES`, or a policy of one's own.
    `balanced` draws the classes of the training split evenly, but no image more than ten times as
    often as plain shuffling would. `device` is where the batches are made ready, None for CUDA
    where there is one; there the other splits come in batches four times as large, as evaluation
    needs less memory. `num_workers` are processes that read ahead, 0 for none. With several
    processes that train together, `batch_size` is that of one, and `rank` says which this is of
    `world_size`. Raises ValueError for a split without images.
    """
    device = torch.device(device) if device is not None else _default_device()
    larger = 1 if device.type == "cpu" else EVALUATION_BATCHES
    empty = [name for name, dataset in dataset_splits.items() if len(dataset) == 0]
    if empty:
        raise ValueError(f"no images are left for {', '.join(empty)}: there are too few in all")
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
