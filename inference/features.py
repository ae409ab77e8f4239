"""The features that a trained model's backbone gives new images, for methods of one's own."""

import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from dataset import to_float
from inference.ensemble import Ensemble, find_files, prepared_batches
from inference.options import Paths, PredictionOptions, check_file_to_write, find_model
from learning.features import compute_features, count_features
from storage.files import write_atomically
from storage.progress import ProgressBar

FeatureBatch = tuple[list[str], np.ndarray, list[str]]  # paths, features, what cannot be read


def extract_features(
    model: str | os.PathLike[str],
    images: Paths,
    *,
    output: str | Path | None = None,
    **options: Any,
) -> tuple[np.ndarray, list[str]]:
    """Returns the features that a trained model's head classifies, and the paths of their images.

    They are float32 `(N, F)`, a row for each of the N images in the order of the paths, computed in
    evaluation mode of the image as it is. Files that cannot be read have a warning and no row.

    Parameters
    ----------
    model : a `model.pth`, or a folder with one
    images : files and folders, as for `predict.predict`
    output : an .npz file for them as well, arrays `features` and `paths`, written whole or not at
        all; `numpy.load` reads it
    options : `preprocessors`, `device`, `precision`, `batch_size`, `num_workers`, as for
        `predict.predict`

    Raises what `predict.predict` raises.
    """
    batches = feature_batches(model, images, output=output, **options)
    paths, features, problems = zip(*batches, strict=True)
    if unreadable := [problem for of_batch in problems for problem in of_batch]:
        words = f"{len(unreadable)} images cannot be read: {'; '.join(unreadable)}"
        warnings.warn(words, stacklevel=2)
    return np.concatenate(features), [path for of_batch in paths for path in of_batch]


def save_features(
    output: str | Path, model: str | os.PathLike[str], images: Paths, **options: Any
) -> tuple[tuple[int, int], list[str]]:
    """Writes the `output` of `extract_features` without keeping the features in memory.

    Returns N and F, and a message on each file that could not be read.
    """
    num_images, num_features, unreadable = 0, 0, []
    with closing(feature_batches(model, images, output=output, **options)) as batches:
        for _, features, problems in batches:
            num_images, num_features = num_images + len(features), features.shape[1]
            unreadable += problems
    return (num_images, num_features), unreadable


def feature_batches(
    model: str | os.PathLike[str],
    images: Paths,
    *,
    output: str | Path | None = None,
    **options: Any,
) -> Generator[FeatureBatch]:
    """Yields the paths and features of `extract_features` by batch, and what could not be read.

    However many images there are, it takes the same memory. `output` appears after the last batch.
    """
    chosen = PredictionOptions(**options)
    if output is not None:
        check_file_to_write(output, (".npz",))
    paths = find_files(images)
    ensemble = Ensemble(
        find_model(model),
        preprocessors=chosen.preprocessors,
        device=chosen.device,
        precision=chosen.precision,
    )
    (classifier,), device = ensemble.models, ensemble.device
    with (
        _rows_to(output, count_features(classifier)) as write_rows,
        ProgressBar(name="computing features", total=len(paths), unit="img") as bar,
    ):
        for read, pixels, unreadable in prepared_batches(paths, ensemble, chosen):
            features = np.empty((0, count_features(classifier)), dtype=np.float32)
            if read:
                prepared = to_float(torch.from_numpy(pixels).to(device))
                computed = compute_features(classifier, prepared, device, ensemble.dtype)
                features = computed.cpu().numpy()
            write_rows(read, features)
            bar.update(len(read) + len(unreadable))
            yield read, features, unreadable


@contextmanager
def _rows_to(
    output: str | Path | None, num_features: int
) -> Iterator[Callable[[list[str], np.ndarray], None]]:
    """Gives a function that adds paths and features to `output`, which appears at the end."""
    if output is None:
        yield lambda paths, features: None
        return
    names: list[str] = []
    # How many rows there are stands before them in the file, and is known when all are read.
    with (
        write_atomically(output) as temporary,
        tempfile.TemporaryFile(dir=Path(output).parent) as rows,
    ):

        def write_rows(paths: list[str], features: np.ndarray) -> None:
            rows.write(features.astype("<f4").tobytes())
            names.extend(paths)

        yield write_rows
        rows.seek(0)
        _write_npz(temporary, names, rows, num_features)


def _write_npz(path: Path, names: list[str], rows: IO[bytes], num_features: int) -> None:
    shape = (len(names), num_features)
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(rows, file)
        with archive.open("paths.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, np.array(names, dtype=str), allow_pickle=False)
