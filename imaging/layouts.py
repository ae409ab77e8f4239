"""The layouts of folders of images: class folders, and the published sets as downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from imaging.folders import list_images


@dataclass(frozen=True)
class Reader:
    """A layout of a folder of images.

    `recognizes` says whether a folder has this layout. `read` returns a row for each image: `path`
    (relative to the folder, with forward slashes), `class` (missing for images without a label),
    `source_split` (the part of the set as published, such as Train, or empty), and any further
    columns, which become part of the metadata. Those of the published sets have common names:
    `patient_id`, `lesion_id`, `age` in years, `sex`, `site`, and `split` for the official one. Rows
    with a text in a column `left_out` are left out for that reason, such as "mask".

    `title`, `licence` and `columns` are what `train_models.py --layouts` shows of it.
    """

    recognizes: Callable[[Path], bool]
    read: Callable[[Path], pd.DataFrame]
    title: str = ""
    licence: str = ""
    columns: str = ""


CLASS_FOLDERS = "class folders"
# To add a layout, add its reader at the end; the last one that recognizes a folder reads it.
READERS = {CLASS_FOLDERS: Reader(recognizes=lambda folder: True, read=list_images)}
