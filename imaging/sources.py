"""Where the images and labels of a data set come from: one table with a row for each image."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from imaging.classes import (
    SPLIT_WORDS,
    find_implausible_classes,
    is_mask,
    unify_class_names,
    words_of,
)
from imaging.folders import find_images, list_images, why_unlabelled
from imaging.labels import is_one_hot, labels_of_rows, read_class_map, rename_classes
from imaging.layouts import CLASS_FOLDERS, READERS, Reader, layout_of
from imaging.medmnist import DERMAMNIST, images_folder, is_archive
from imaging.tables import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES, join_table, read_table
from storage.files import did_you_mean, is_utf8, printable

__all__ = [
    "IMAGE_COLUMNS", "IMAGE_SUFFIXES", "METADATA_COLUMNS", "READERS", "SPLIT_FOLDERS",
    "UNSUPPORTED_SUFFIXES", "Images", "Reader", "Sources", "find_images", "read_folder",
    "read_images",
]  # fmt: skip
IMAGE_COLUMNS = ["path", "class", "source_split"]  # which every reader gives
METADATA_COLUMNS = (
    "path", "class", "label", "source_split", "width", "height", "content_hash", "picture", "group",
    "split",
)  # fmt: skip
GROUP_COLUMNS = ("lesion_id", "patient_id")  # which keep images together unless told otherwise
SPLIT_FOLDERS = SPLIT_WORDS  # what a column `split` may say, and what names of folders consist of
UNLABELLED = ("error", "drop")


@dataclass(eq=False)
class Sources:
    """The folder and the tables of a data set, and how to read them; see `DatasetBuilder`."""

    data_dir: str | Path
    _: KW_ONLY
    layout: str | None = None
    labels_csv: str | Path | None = None
    label_column: str | Sequence[str] | None = None
    metadata_csv: str | Path | None = None
    id_column: str | None = None
    class_names: Sequence[str] = ()
    class_map: Mapping[str, str] | Sequence[str] | str | Path = ()
    unlabelled: str = "error"
    accept_class_names: bool = False

    def __post_init__(self) -> None:
        if is_archive(self.data_dir):
            self.data_dir, self.layout = images_folder(self.data_dir), self.layout or DERMAMNIST
        if self.unlabelled not in UNLABELLED:
            raise ValueError(f"unlabelled must be error or drop, not {self.unlabelled!r}")
        sources = (self.labels_csv, self.metadata_csv, self.layout)
        if self.label_column and sources == (None, None, None):
            raise ValueError(
                "label_column needs the table that has it: labels_csv or metadata_csv, or the name "
                "of the layout whose tables have it"
            )
        if self.class_names and not (self.labels_csv or self.label_column):
            raise ValueError("class_names needs the table with their numbers: labels_csv")
        if self.layout is not None and self.layout not in READERS:
            otherwise = f"the known ones are {', '.join(READERS)}"
            suggestion = did_you_mean(self.layout, READERS, otherwise)
            raise ValueError(f"unknown layout {self.layout!r}; {suggestion}")


class Images(NamedTuple):
    """The images of a data set, their further columns, and how these came about."""

    table: pd.DataFrame  # `IMAGE_COLUMNS`, a row for each image
    given: pd.DataFrame  # the columns of the reader and of metadata_csv, by their `given_name`
    layout: str
    left_out: dict[str, int]  # images by the reason that they were left out
    tables: list[str]  # how much of each table was used, a line each


def read_folder(data_dir: str | Path, layout: str | None = None) -> pd.DataFrame:
    """Returns the images of a folder, sorted by path, read as the layout of this name.

    By default it is that of `imaging.layouts.layout_of`. An image without a label has no class.
    """
    data_dir = Path(data_dir)
    name = layout_of(data_dir) if layout is None else layout
    images = READERS[name].read(data_dir)
    for column in IMAGE_COLUMNS:
        if column not in images or (column != "class" and images[column].isna().any()):
            raise ValueError(
                f"{printable(data_dir)}: the reader of {name} returned images without {column}"
            )
    columns = [*IMAGE_COLUMNS, *images.columns.drop(IMAGE_COLUMNS)]
    return images[columns].sort_values("path", kind="stable", ignore_index=True)


def read_images(sources: Sources, required: Sequence[str] = ()) -> Images:
    """Returns the images, their classes and their further columns, some of which are required.

    The classes are those of the table of labels if it gives all of them: by `label_column`, by
    one-hot columns, or, where the images are not in folders, by its column `class`. Otherwise they
    are the folder's, which the column `class` of `labels_csv` corrects. Warns of rows that match no
    image and of images without a row. Raises FileNotFoundError or ValueError for what cannot be
    used.
    """
    images, layout, label_table = _find_images(sources)
    tables = list(images.attrs.get("tables", []))
    left_out = _count_reasons(images)
    images = images[images.pop("left_out").isna()].reset_index(drop=True)
    if label_table is not None:
        use = tables if label_table != sources.metadata_csv else []
        images = _add_labels(images, label_table, sources, use)
    images, unlabelled = _drop_unlabelled(images, sources, layout, label_table)
    images = _rename(images, sources)
    is_kept = images["class"].notna()
    left_out |= unlabelled
    if not is_kept.all():
        left_out["class left out by --class_map"] = int((~is_kept).sum())
    images = images[is_kept].reset_index(drop=True)
    _check_classes(images["class"], label_table or sources.data_dir)
    given = _read_metadata(images, sources, required, tables)
    return Images(images[IMAGE_COLUMNS].copy(), given, layout, left_out, tables)


def _find_images(sources: Sources) -> tuple[pd.DataFrame, str, str | Path | None]:
    """Returns the images, the name of their layout, and the table that gives or corrects labels.

    Where that table gives all labels, the images have no `class`.
    """
    table = sources.labels_csv or (sources.metadata_csv if sources.label_column else None)
    is_plain = table is not None and sources.layout is None and _gives_all_labels(sources, table)
    if is_plain:
        images, layout = list_images(sources.data_dir, has_class_folders=False), "table of labels"
    else:
        layout = sources.layout or layout_of(sources.data_dir)
        images = read_folder(sources.data_dir, layout)
        if sources.label_column:
            images = images.drop(columns="class")
            if table is None:
                where = f"{sources.data_dir} ({layout})"
                labels = labels_of_rows(images, where, _label_columns(sources), sources.class_names)
                images = images.assign(**{"class": labels})
    if "left_out" not in images:
        images = images.assign(left_out=None)
    return images, layout, table


def _label_columns(sources: Sources) -> list[str]:
    columns = sources.label_column
    return [columns] if isinstance(columns, str) else list(columns or ())


def _gives_all_labels(sources: Sources, table: str | Path) -> bool:
    if sources.label_column or is_one_hot(read_table(table)):
        return True
    if layout_of(sources.data_dir) != CLASS_FOLDERS:
        return False
    return bool(list_images(sources.data_dir)["class"].isna().all())


def _count_reasons(images: pd.DataFrame) -> dict[str, int]:
    return {str(why): int(n) for why, n in images["left_out"].value_counts().items()}


def _add_labels(
    images: pd.DataFrame,
    name: str | Path,
    sources: Sources,
    tables: list[str],
) -> pd.DataFrame:
    """Returns the images with the classes in a table, or their own where it has none."""
    table, is_correction = read_table(name), "class" in images
    columns = _label_columns(sources)
    table = table.assign(**{"class": labels_of_rows(table, name, columns, sources.class_names)})
    labels = join_table(
        images["path"],
        table,
        name,
        warn_unmatched=True,
        is_correction=is_correction,
        id_column=sources.id_column,
        columns=["class"],
        uses=tables,
    )["class"]
    if is_correction:
        labels = labels.fillna(images["class"])
    invalid = labels[labels.notna() & ~labels.map(is_utf8, na_action="ignore").eq(True)]
    if len(invalid) > 0:
        raise ValueError(
            f"{printable(name)}: {printable(invalid.iloc[0])} is not valid UTF-8; save the table "
            "as UTF-8"
        )
    return images.assign(**{"class": labels})


def _drop_unlabelled(
    images: pd.DataFrame, sources: Sources, layout: str, label_table: str | Path | None
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Returns the images that have a label, and how many others there are, by what they show.

    Raises ValueError for images without one, unless they are to be left out. Then images in folders
    that are hardly of a class, such as test or masks, have none either.
    """
    is_missing = images["class"].isna()
    if sources.unlabelled == "error":
        if is_missing.any():
            raise ValueError(_why_unlabelled(images, sources, layout, label_table))
        return images, {}
    if not sources.accept_class_names:
        named = find_implausible_classes(images[~is_missing])
        folders = [name for name, why in named.items() if why != "a single image"]
        is_missing |= images["class"].isin(folders)
    paths = images["path"][is_missing]
    counts = paths.map(_kind_of_unlabelled).value_counts()
    return images[~is_missing].reset_index(drop=True), {
        f"no label ({kind})": int(count) for kind, count in counts.items()
    }


def _why_unlabelled(
    images: pd.DataFrame, sources: Sources, layout: str, label_table: str | Path | None
) -> str:
    advice = ", or leave images without a label out with --unlabelled drop (unlabelled='drop')"
    if label_table is None and layout == CLASS_FOLDERS:
        return why_unlabelled(images, sources.data_dir) + advice
    paths = images["path"][images["class"].isna()]
    return (
        f"{printable(label_table or sources.data_dir)}: no class for {len(paths):,} of "
        f"{len(images):,} images, such as {printable(paths.iloc[0])}; add them to the table, or "
        "remove the images" + advice
    )


def _kind_of_unlabelled(path: str) -> str:
    words = {word for part in path.split("/") for word in words_of(part)}
    if "superpixel" in words:
        return "superpixels"
    return "masks" if is_mask(path) or {"mask", "segmentation"} & words else "other images"


def _rename(images: pd.DataFrame, sources: Sources) -> pd.DataFrame:
    """Returns the images with one spelling for each class, after `class_map`."""
    labels = unify_class_names(images["class"])
    class_map = read_class_map(sources.class_map)
    return images.assign(**{"class": rename_classes(labels, class_map) if class_map else labels})


def _check_classes(labels: pd.Series, where: str | Path) -> None:
    if labels.nunique() < 2:
        found = f"of one class, {printable(labels.iloc[0])}" if len(labels) else "left out"
        raise ValueError(
            f"{printable(where)}: all images are {found}; at least two classes are needed"
        )


def _read_metadata(
    images: pd.DataFrame,
    sources: Sources,
    required: Sequence[str],
    tables: list[str],
) -> pd.DataFrame:
    """Returns the columns beside `IMAGE_COLUMNS`: those of the folder's reader and of the table.

    Of columns of the same name the table's is kept. Raises ValueError if a required one is in
    neither, and if two would have the same name.
    """
    given = images.drop(columns=IMAGE_COLUMNS)
    missing, name = [column for column in required if column not in given], sources.metadata_csv
    if name is not None:
        rows = join_table(
            images["path"],
            read_table(name, missing),
            name,
            warn_unmatched=True,
            id_column=sources.id_column,
            uses=tables,
        )
        given = pd.concat([given.drop(columns=rows.columns, errors="ignore"), rows], axis=1)
    elif missing:
        raise ValueError(
            f"group_by: no column {printable(missing[0])}; give its table as metadata_csv"
        )
    given = given.rename(columns=given_name)
    if given.columns.has_duplicates:
        column = printable(given.columns[given.columns.duplicated()][0])
        table = "" if name is None else f"{printable(name)}: "
        raise ValueError(f"{table}two columns would be called {column}; rename one of them")
    return given


def given_name(column: str) -> str:
    """Returns the name of a user's column in the metadata, which has columns of its own."""
    return f"{column}_given" if column in METADATA_COLUMNS else column


def default_groups(given: pd.DataFrame) -> tuple[str, ...]:
    """Returns the columns that keep images together by default: those of lesions and patients."""
    return tuple(column for column in GROUP_COLUMNS if column in given)
