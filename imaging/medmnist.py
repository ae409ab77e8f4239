"""DermaMNIST of MedMNIST: its images, which are arrays in one .npz file, become image files."""

import json
import logging
import os
import secrets
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from imaging.classes import SPLIT_WORDS
from imaging.folders import list_images, list_names
from storage.files import printable
from storage.progress import ProgressBar

# By the numbers that the labels have.
CLASSES = (
    "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma",
    "benign keratosis-like lesions", "dermatofibroma", "melanoma", "melanocytic nevi",
    "vascular lesions",
)  # fmt: skip
SPLITS = ("train", "val", "test")
DERMAMNIST = "dermamnist"  # the name of the layout
MARKER = "dermamnist.json"  # in a folder of images: which file they are from
logger = logging.getLogger(__name__)


def is_archive(path: str | Path) -> bool:
    """Returns whether this is a file of DermaMNIST, such as dermamnist_64.npz, by its name."""
    name = Path(path).name.casefold()
    return name.startswith("dermamnist") and name.endswith(".npz")


def images_folder(archive: str | Path) -> Path:
    """Returns the folder of the images of a file: `dermamnist_64_images` beside it."""
    return Path(archive).with_name(f"{Path(archive).stem}_images")


def read_dermamnist(folder: Path) -> pd.DataFrame:
    """Returns the images of a folder that has DermaMNIST's file, or is the `images_folder` of one.

    The images are written first, if they are not there yet. Raises ValueError if the folder has
    several such files, or one that is not as published.
    """
    archives = [folder / name for name in list_names(folder) if is_archive(name)]
    if len(archives) > 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in archives)
        raise ValueError(
            f"{printable(folder)}: {names} have the same images; choose one as --data_dir"
        )
    beside = folder.with_name(folder.name.removesuffix("_images") + ".npz")
    if archives:
        root = write_images(archives[0])
    elif is_archive(beside) and beside.is_file():
        root = write_images(beside)
    else:
        root = folder
    images = list_images(root)
    images["split"] = images["source_split"].map(SPLIT_WORDS)
    if archives:
        above = root.relative_to(folder).as_posix()
        for column in ("path", "source_split"):
            images[column] = above + "/" + images[column]
    return images


def write_images(archive: Path) -> Path:
    """Returns the folder with the images of the file as `<split>/<class>/<number>.png`.

    They are written unless they are there, whole or not at all; a message says so. Raises
    ValueError if the folder has other contents, or the file is not as published.
    """
    folder, source = images_folder(archive), _describe(archive)
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
        try:
            num_images = _write_all(archive, temporary)
            (temporary / MARKER).write_text(json.dumps(source), encoding="utf-8")
            os.rename(temporary, folder)
            logger.warning(f"{archive.name}: wrote its {num_images:,} images as files to {folder}")
        except OSError:
            if not folder.exists():  # or another process has written it meanwhile
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != source:
        raise ValueError(
            f"{printable(folder)} has no images from {printable(archive)}, or from another version "
            "of it; rename or remove that folder"
        )
    return folder


def _describe(archive: Path) -> dict[str, list[int]]:
    """Returns the size and the checksum of each array, which the file's own directory has."""
    try:
        with zipfile.ZipFile(archive) as file:
            return {each.filename: [each.file_size, each.CRC] for each in file.infolist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{printable(archive)}: not a valid .npz file ({error})") from error


def _write_all(archive: Path, folder: Path) -> int:
    """Writes the images of all splits, and returns how many there are."""
    total = 0
    with np.load(archive) as arrays, ThreadPoolExecutor() as pool:
        for split in SPLITS:
            images, labels = _check_arrays(arrays, archive, split)
            paths = []
            for number, label in enumerate(labels):
                paths.append(folder / split / CLASSES[label] / f"{number:05d}.png")
            for parent in {path.parent for path in paths}:
                parent.mkdir(parents=True, exist_ok=True)
            done = pool.map(_save, images, paths)
            total += len(list(ProgressBar(done, f"writing {split} images", len(paths), unit="img")))
    return total


def _save(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, compress_level=1)


def _check_arrays(
    arrays: np.lib.npyio.NpzFile, archive: Path, split: str
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images (N, h, w, 3) and labels (N,) of a split; raises ValueError for others."""
    try:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].ravel()
    except (KeyError, ValueError) as error:
        raise ValueError(f"{printable(archive)}: not DermaMNIST ({error})") from error
    is_image = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
    if not is_image or len(images) != len(labels) or not np.isin(labels, range(len(CLASSES))).all():
        raise ValueError(
            f"{printable(archive)}: not DermaMNIST, as {split}_images and {split}_labels are not "
            f"RGB images and as many labels from 0 to {len(CLASSES) - 1}"
        )
    return images, labels
