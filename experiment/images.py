"""The images of a run: where they come from, what they are, and whether a run can use them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from dataset import DatasetBuilder, LesionDataset, LesionLoader, create_dataloaders
from evaluation import MALIGNANT, group_by_malignancy, screening_warnings
from experiment import run_folder
from experiment.checks import SPLITS, check_batch_size, check_given_splits
from experiment.settings import Settings
from imaging.audit import summarise
from imaging.cache import PreparedImages
from imaging.layouts import READERS
from learning.processes import get_rank, get_world_size
from storage.files import printable

MAX_NAMES = 12  # classes that a line names


@dataclass(frozen=True)
class Data:
    """The images of a run, and what the audit found in them."""

    loaders: dict[str, LesionLoader]
    metadata: pd.DataFrame
    findings: pd.DataFrame
    digest: str

    def __getitem__(self, split: str) -> LesionDataset:
        return self.loaders[split].dataset


def make_builder(settings: Settings) -> DatasetBuilder:
    """Returns the builder of the images that the settings describe."""
    same = (
        "image_size", "cache_dir", "seed", "skip_unreadable", "layout", "labels_csv",
        "label_column", "class_names", "class_map", "unlabelled", "accept_class_names",
        "label_conflicts", "metadata_csv", "id_column", "group_by", "split_by", "splits_csv",
    )  # fmt: skip
    return DatasetBuilder(
        settings.data_dir,
        num_workers=settings.num_workers or None,
        **{name: getattr(settings, name) for name in same},
    )


def load_data(builder: DatasetBuilder, settings: Settings, device: torch.device) -> Data:
    """Reads, audits and splits the images, and prints what they are.

    Raises ValueError for images that the run cannot use.
    """
    prepared = builder.prepare()
    findings = builder.audit(prepared=prepared)
    fractions = dict(zip(SPLITS, settings.splits, strict=True))
    datasets, metadata = builder.build(splits=fractions, prepared=prepared)
    check_given_splits(set(datasets), settings)
    check_batch_size(len(datasets["train"]), "training images", settings)
    loaders = create_dataloaders(
        datasets,
        settings.batch_size,
        augmentation=settings.augmentation,
        balanced=settings.balanced,
        device=device,
        seed=settings.seed,
        num_workers=settings.num_workers or 0,
        rank=get_rank(),
        world_size=get_world_size(),
    )
    groups = builder.groups(prepared.given)
    lines = [
        *describe_images(prepared, metadata, settings),
        *_describe_splits(metadata, groups, settings),
        _describe_malignancy(datasets["train"].classes, settings),
    ]
    if get_world_size() > 1:
        together = get_world_size() * settings.batch_size
        lines.append(f"{get_world_size()} processes with batches of {together:,} images in all")
    print("\n".join(lines), flush=True)
    print_audit(findings)
    images = prepared.metadata[["path", "class", "content_hash"]]
    return Data(loaders, metadata, findings, digest_of_table(images))


def digest_of_table(table: pd.DataFrame) -> str:
    """Returns what identifies the contents of a table."""
    return run_folder.digest(table.to_csv(index=False).encode("utf-8", "surrogateescape"))


# ---------------------------------------------------------------------------- in words


def describe_images(
    prepared: PreparedImages, metadata: pd.DataFrame, settings: Settings
) -> list[str]:
    """Returns at most six lines about the images, those left out and the tables.

    `metadata` has the images that are used.
    """
    layout = READERS.get(prepared.images.layout)
    title = layout.title if layout is not None and layout.title else prepared.images.layout
    counts = metadata["class"].value_counts()
    listed = [f"{printable(str(name))} {count:,}" for name, count in counts.items()]
    left_out = _left_out(prepared, metadata, settings)
    reasons = [f"{count:,} images: {reason}" for reason, count in left_out.items()]
    return [
        f"data: {len(metadata):,} images of {len(counts):,} classes in "
        f"{printable(settings.data_dir)} ({title})",
        f"classes: {_listed(listed)}",
        *([f"left out: {'; '.join(reasons)}"] if reasons else []),
        *(f"table: {line}" for line in prepared.images.tables),
    ]


def _left_out(
    prepared: PreparedImages, metadata: pd.DataFrame, settings: Settings
) -> dict[str, int]:
    """Returns how many images are not in the metadata, by reason."""
    found = prepared.metadata
    is_used = found["path"].isin(metadata["path"])
    is_broken = pd.Series([bool(r.error) for r in prepared.cache_index.records], found.index)
    is_conflict = found.groupby("picture")["class"].transform("nunique") > 1
    is_conflict &= settings.label_conflicts == "drop"
    counts = {
        "cannot be read": (~is_used & is_broken).sum(),
        "copies have another class": (~is_used & ~is_broken & is_conflict).sum(),
        "in no split": (~is_used & ~is_broken & ~is_conflict).sum(),
    }
    return prepared.images.left_out | {why: int(n) for why, n in counts.items() if n > 0}


def _describe_splits(
    metadata: pd.DataFrame, groups: Sequence[str], settings: Settings
) -> list[str]:
    sizes = metadata["split"].value_counts()
    listed = ", ".join(f"{sizes.get(name, 0):,} {name}" for name in SPLITS)
    how = f"at random, stratified by class, seed {settings.seed}"
    if settings.splits_csv is not None:
        how = f"those of {printable(settings.splits_csv)}"
    elif settings.split_by == "folders":
        how = "those of the folders"
    elif settings.split_by == "official":
        how = "those of the data set"
    together = ", ".join(["copies of an image", *(f"equal {printable(name)}" for name in groups)])
    return [
        f"splits: {how}: {listed}",
        f"groups: {metadata['group'].nunique():,}, of {together}",
    ]


def _describe_malignancy(classes: Sequence[str], settings: Settings) -> str:
    """Returns which classes count as malignant; raises ValueError for a name that is no class."""
    counted = group_by_malignancy(classes, settings.malignant_classes or MALIGNANT)
    for message in screening_warnings(counted):
        warnings.warn(message, stacklevel=2)
    malignant, benign, unknown = (_listed(names) for names in counted.values())
    unknown = f"; not known: {unknown}" if unknown else ""
    return f"counted as malignant: {malignant or 'none'}; benign: {benign or 'none'}{unknown}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def print_audit(findings: pd.DataFrame) -> None:
    """Prints what the audit found, a line for each kind of finding."""
    print("audit: " + summarise(findings).replace("\n", "\n       "), flush=True)
