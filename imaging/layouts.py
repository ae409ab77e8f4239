"""The layouts of folders of images: class folders, and the published sets as downloaded."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from imaging.classes import split_of_name
from imaging.folders import list_images, list_names
from imaging.medmnist import DERMAMNIST, MARKER, read_dermamnist
from imaging.published import Table, are_all_there, plain_name, read_ph2_table, read_published


@dataclass(frozen=True)
class Reader:
    """A layout of a folder of images.

    `recognizes` says whether a folder has this layout, and so do `files`: patterns of names in
    lower case, all of which are found in the folder or up to three levels below it; those of
    folders end with a slash, those of tables have no suffix. `read` returns a row for each image:
    `path` (relative to the folder, with forward slashes), `class` (missing for images without a
    label), `source_split` (the part of the set as published, such as Train, or empty), and any
    further columns, which become part of the metadata. Those of the published sets have common
    names: `patient_id`, `lesion_id`, `age` in years, `sex`, `site`, and `split` for the official
    one. Rows with a text in a column `left_out` are left out for that reason, such as "mask". Lines
    in `attrs["tables"]` are shown on the first screen.

    `title`, `licence` and `columns` are what `train_models.py --layouts` shows of it.
    """

    recognizes: Callable[[Path], bool]
    read: Callable[[Path], pd.DataFrame]
    title: str = ""
    licence: str = ""
    columns: str = ""
    files: Sequence[str] = ()


def layout_of(data_dir: str | Path) -> str:
    """Returns the name of the last layout of `READERS` that recognizes the folder."""
    folder = Path(data_dir)
    names = {plain_name(path) for path in list_names(folder)}

    def is_recognized(reader: Reader) -> bool:
        if reader.files and are_all_there(reader.files, names):
            return True
        return reader.recognizes(folder)

    return next(name for name in reversed(READERS) if is_recognized(READERS[name]))


def describe_layouts() -> str:
    """Returns a text of the layouts, at most 100 wide: name, title, licence and what is read."""
    lines = []
    for name, reader in READERS.items():
        licence = f"; {reader.licence}" if reader.licence else ""
        lines.append(f"{name:<16}{reader.title}{licence}".rstrip())
        lines += textwrap.wrap(
            reader.columns, 100, initial_indent=16 * " ", subsequent_indent=16 * " "
        )
    return "\n".join(lines)


def _published(
    *files: str, tables: Sequence[Table], duplicates: str | None = None, **texts: str
) -> Reader:
    """Returns the reader of a set that has these files; for the others see `read_published`."""
    read = partial(read_published, tables=tables, duplicates=duplicates)
    return Reader(lambda folder: False, read, files=files, **texts)


def _read_isic9(folder: Path) -> pd.DataFrame:
    images = list_images(folder)
    folders = images["source_split"].map(lambda path: path.rpartition("/")[2])
    return images.assign(split=folders.map(split_of_name))


_ISIC_CODES = ("MEL", "NV", "BCC", "AKIEC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
_HAM10000_CODES = {code: code.lower() for code in _ISIC_CODES}
_PH2_CLASSES = {"0": "Common Nevus", "1": "Atypical Nevus", "2": "Melanoma"}
_ISIC_2016_CLASSES = {"0": "benign", "0.0": "benign", "1": "malignant", "1.0": "malignant"}

CLASS_FOLDERS = "class folders"
# To add a layout, add its reader at the end; the last one that recognizes a folder reads it.
READERS = {
    CLASS_FOLDERS: Reader(
        lambda folder: True,
        list_images,
        columns="the class, a folder for each; the folders above these are source_split",
    ),
    "isic9": Reader(
        lambda folder: False,
        _read_isic9,
        title="Kaggle's nine-class set, skin-cancer9-classesisic",
        licence="see the publisher",
        columns="the class; the official split, train or test, of the folders",
        files=("skin cancer isic the international skin imaging collaboration/",),
    ),
    "isic2016": _published(
        "isbi2016_isic_part3*_groundtruth",
        title="ISIC 2016 challenge, part 3",
        licence="CC0, see the publisher",
        columns="the class, benign or malignant; the official split",
        tables=[
            Table(
                ["isbi2016_isic_part3*_groundtruth"],
                labels=["class"],
                class_names=_ISIC_2016_CLASSES,
                header=["image", "class"],
            )
        ],
    ),
    "isic2017": _published(
        "isic-2017_*part3_groundtruth",
        title="ISIC 2017 challenge, part 3",
        licence="CC0, see the publisher",
        columns="the class, melanoma, seborrheic_keratosis or, where both are 0, nevus; age, sex; "
        "the official split",
        tables=[
            Table(
                ["isic-2017_*part3_groundtruth"],
                labels=["melanoma", "seborrheic_keratosis"],
                otherwise="nevus",
            ),
            Table(["isic-2017_*_metadata"]),
        ],
    ),
    "isic2018": _published(
        "isic2018_task3_*_groundtruth",
        title="ISIC 2018 challenge, task 3",
        licence="CC BY-NC 4.0, see the publisher",
        columns="the class, one of seven; lesion_id, diagnosis_confirm_type; the official split",
        tables=[
            Table(["isic2018_task3_*_groundtruth"], labels=_ISIC_CODES),
            Table(["isic2018_task3_*lesiongroupings"]),
        ],
    ),
    "isic2019": _published(
        "isic_2019_*_groundtruth",
        title="ISIC 2019 challenge",
        licence="CC BY-NC 4.0",
        columns="the class, one of eight or UNK; lesion_id, age, sex, site; the official split",
        tables=[
            Table(["isic_2019_*_groundtruth"], labels=_ISIC_CODES),
            Table(["isic_2019_*_metadata"]),
        ],
    ),
    "isic2020": _published(
        "isic_2020_training_groundtruth*",
        title="ISIC 2020 challenge (SIIM-ISIC)",
        licence="CC BY-NC 4.0, see the publisher",
        columns="the class, benign or malignant; patient_id, lesion_id, age, sex, site, diagnosis; "
        "the second image of each pair in the list of duplicates is left out",
        tables=[
            Table(
                ["isic_2020_training_groundtruth_v2", "isic_2020_training_groundtruth", "train"],
                labels=["benign_malignant"],
            ),
            Table(["isic_2020_test_metadata", "test"]),
        ],
        duplicates="isic_2020_training_duplicates",
    ),
    "ham10000": _published(
        "ham10000_metadata",
        title="HAM10000",
        licence="CC BY-NC 4.0, see the publisher",
        columns="the class, one of seven; lesion_id, age, sex, site, dx_type; with the tables and "
        "images of ISIC 2018's test set beside it, the official split",
        tables=[
            Table(["ham10000_metadata"], labels=["dx"], split="train"),
            Table(
                ["isic2018_task3_*_groundtruth"],
                labels=["dx", *_ISIC_CODES],
                class_names=_HAM10000_CODES,
            ),
        ],
    ),
    "pad_ufes_20": _published(
        "metadata",
        "imgs_part_*/",
        "pat_*_*_*.png",
        title="PAD-UFES-20",
        licence="CC BY 4.0, see the publisher",
        columns="the class, diagnostic; patient_id, lesion_id, age, sex, site, biopsed, and all "
        "other columns",
        tables=[Table(["metadata"], id_columns=["img_id"], labels=["diagnostic"])],
    ),
    "ph2": _published(
        "ph2 dataset images/",
        title="PH2",
        licence="for research and education, see the publisher",
        columns="the class, Common Nevus, Atypical Nevus or Melanoma; the dermoscopic criteria of "
        "PH2_dataset.txt",
        tables=[
            Table(
                ["ph2_dataset"],
                id_columns=["Name"],
                labels=["Clinical Diagnosis"],
                class_names=_PH2_CLASSES,
                read=read_ph2_table,
            )
        ],
    ),
    "fitzpatrick17k": _published(
        "fitzpatrick17k",
        title="Fitzpatrick17k",
        licence="CC BY-NC-SA 3.0",
        columns="the class, three_partition_label: benign, malignant or non-neoplastic; label, "
        "nine_partition_label, fitzpatrick_scale, fitzpatrick_centaur, qc",
        tables=[
            Table(["fitzpatrick17k"], id_columns=["md5hash"], labels=["three_partition_label"])
        ],
    ),
    "ddi": _published(
        "ddi_metadata",
        title="Diverse Dermatology Images (DDI)",
        licence="for research, see the publisher (Stanford)",
        columns="the class, benign or malignant; skin_tone, disease",
        tables=[Table(["ddi_metadata"], id_columns=["DDI_file"], labels=["malignant"])],
    ),
    DERMAMNIST: Reader(
        lambda folder: (folder / MARKER).is_file(),
        read_dermamnist,
        title="DermaMNIST of MedMNIST, dermamnist*.npz",
        licence="CC BY-NC 4.0",
        columns="the class, one of seven; the official split, which divides lesions; the images "
        "are written as PNG files into a folder beside the .npz file",
        files=("dermamnist*.npz",),
    ),
}
