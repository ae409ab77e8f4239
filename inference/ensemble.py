"""Trained models on new images: models, views and batches → probabilities."""

import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.explain import gradcam, overlay_name, save_overlay
from storage.files import printable

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from torch import Tensor

    from dataset import Preprocessor
    from models import LesionClassifier, ModelInfo


AIM = "sensitivity 95%"  # of the thresholds that models bring, the one that flags are set by
BATCHES_AHEAD = 2  # of images decoded while a GPU works; on the CPU both would want the same cores
NUM_VIEWS = 8  # flips and quarter-turns of a square
Paths = str | os.PathLike | Sequence[str | os.PathLike]


def predict_batches(
    model: Paths,
    images: Paths,
    *,
    output: str | Path | None = None,
    tta: int = 1,
    gradcam: str | Path | None = None,
    thresholds: Mapping[str, float] | None = None,
    preprocessors: "Sequence[Preprocessor]" = (),
    device: "torch.device | str | None" = None,
    precision: str = "auto",
    batch_size: int = 32,
    num_workers: int | None = None,
) -> "Iterator[tuple[pd.DataFrame, list[str]]]":
    """The table of `predict` a batch at a time, each with what could not be read, in any number.

    Takes the same memory however many images there are. `output` appears after the last batch.
    """
    from joblib import cpu_count
    from tqdm import tqdm

    images = _as_list(images)
    _check_numbers(tta, batch_size, num_workers)
    if output is not None:
        check_file_to_write(Path(output), (".csv", ".json"))
    paths = find_files(images)
    if gradcam is not None:
        _check_folder_to_fill(Path(gradcam), images)
        if output is not None and Path(gradcam).resolve().is_relative_to(Path(output).resolve()):
            raise ValueError(f"{gradcam} is to be a folder, and {output} a file; choose another")
    ensemble = Ensemble(model, preprocessors=preprocessors, device=device, precision=precision)
    flags = ensemble.flags(thresholds)
    if thresholds is None:
        _warn_of_thresholds(flags, len(ensemble.models), tta)
    if gradcam is not None:
        Path(gradcam).mkdir(parents=True, exist_ok=True)
    batches = _prepared_batches(
        paths,
        ensemble.image_size,
        preprocessors,
        batch_size,
        num_workers or cpu_count(),
        0 if ensemble.device.type == "cpu" else BATCHES_AHEAD,
    )
    with (
        _rows_to(output) as write_rows,
        tqdm(total=len(paths), desc="predicting", unit="img", disable=None, leave=False) as bar,
    ):
        for read, pixels, unreadable in batches:
            raw, calibrated = ensemble.probabilities(pixels, tta)
            labels = raw.argmax(axis=1)
            table = _table(read, labels, calibrated, ensemble.classes, flags)
            write_rows(table)
            if gradcam is not None and read:
                for path, image, heatmap in zip(
                    read, pixels, ensemble.heatmaps(pixels, labels), strict=True
                ):
                    save_overlay(Path(gradcam) / overlay_name(path), image, heatmap)
            bar.update(len(read) + len(unreadable))
            yield table, unreadable


def find_files(images: Paths) -> list[str]:
    """The files that these files and folders stand for, each once, with forward slashes.

    A folder stands for the images below it as `dataset.find_images` finds them, a file for itself,
    whatever its suffix. Raises FileNotFoundError naming all that is not there, and ValueError for a
    folder without images.
    """
    from dataset import find_images

    images = _as_list(images)
    if not images:
        raise ValueError("no images are given; name files or folders")
    missing = [printable(str(path)) for path in images if not os.path.exists(path)]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such file or folder")
    found: list[str] = []
    for path in map(Path, images):
        if path.is_dir():
            inside = find_images(path, has_class_folders=False)["path"]
            found += [(path / name).as_posix() for name in inside]
        else:
            found.append(path.as_posix())
    return list(dict.fromkeys(found))


class Ensemble:
    """One trained model or several, on a device, that give the mean of their probabilities.

    Attributes: `classes`, the names in label order; `image_size`; `malignant_classes`, the names of
    those counted as malignant; `thresholds`, by name, the mean of those that all models bring. A
    model's own were chosen on validation for that model and for images as they are; their mean, and
    views by `tta`, need not reach the same sensitivity.

    Raises ValueError for models whose classes, image size, preprocessors or malignant classes
    differ, for preprocessors that are not those of the training, and for a device or precision that
    cannot be used.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        preprocessors: "Sequence[Preprocessor]" = (),
        device: "torch.device | str | None" = None,
        precision: str = "auto",
    ) -> None:
        from learning.hardware import choose_device, memory_format_for, resolve_precision
        from models import load_model

        paths = _as_list(paths)
        if not paths:
            raise ValueError("no model is given; name one model.pth or several")
        self.device = choose_device(device)
        self.dtype = resolve_precision(precision, self.device)
        self.memory_format = memory_format_for(self.device, self.dtype)
        models, infos = zip(*map(load_model, paths), strict=True)
        for path, info in zip(paths, infos, strict=True):
            _check_alike(path, info, paths[0], infos[0])
            _check_preprocessors(path, info, preprocessors)
        self.models: list[LesionClassifier] = [
            model.to(self.device, memory_format=self.memory_format) for model in models
        ]
        self.calibrations = [info.calibration for info in infos]
        self.classes: list[str] = infos[0].classes
        self.image_size: int = infos[0].image_size
        self.malignant_classes: list[str] = infos[0].malignant_classes
        self.thresholds = _mean_thresholds(infos)

    def probabilities(self, images: "np.ndarray", tta: int = 1) -> "tuple[np.ndarray, np.ndarray]":
        """The means of the raw and of the calibrated probabilities, float64 `(N, num_classes)`.

        `images` are uint8 `(N, H, W, 3)`, seen in `tta` views. The class decided for is the highest
        of the raw ones.
        """
        import numpy as np
        import torch

        from dataset import to_float

        pixels = to_float(torch.from_numpy(images).to(self.device))
        raw = [self._raw_probabilities(model, pixels, tta) for model in self.models]
        if not np.isfinite(raw).all():
            raise ValueError(
                "a model gives something else than finite numbers; it is damaged, or needs "
                "--precision fp32"
            )
        calibrated = [c.apply(p) for c, p in zip(self.calibrations, raw, strict=True)]
        return np.mean(raw, axis=0), np.mean(calibrated, axis=0)

    def _raw_probabilities(
        self, model: "LesionClassifier", images: "Tensor", tta: int
    ) -> "np.ndarray":
        import torch

        from learning.hardware import autocast

        with torch.inference_mode():
            logits = []
            for view in islice(_views(images), tta):
                with autocast(self.device, self.dtype):
                    logits.append(model(view.contiguous(memory_format=self.memory_format)).float())
            return torch.stack(logits).cpu().double().softmax(dim=2).mean(dim=0).numpy()

    def heatmaps(self, images: "np.ndarray", labels: "np.ndarray") -> "np.ndarray":
        """The mean of the models' `gradcam` for uint8 images `(N, H, W, 3)`, highest value 1."""
        import numpy as np
        import torch

        from dataset import to_float

        pixels = to_float(torch.from_numpy(images).to(self.device))
        heatmaps = np.mean([gradcam(model, pixels, labels) for model in self.models], axis=0)
        highest = heatmaps.max(axis=(1, 2), keepdims=True)
        return heatmaps / np.where(highest > 0, highest, 1)

    def flags(self, thresholds: Mapping[str, float] | None) -> dict[str, tuple[list[int], float]]:
        """For each threshold, by name, the labels whose probabilities are added up, and itself.

        A name is `malignant`, for all classes that count as such, `melanoma`, for all classes of
        it, or that of a class as `evaluation.match_classes` finds it. None is `self.thresholds`.
        Raises ValueError for a name of no class or a threshold that is no probability.
        """
        from evaluation import match_classes
        from imaging.lesions import is_melanoma, normalize_name

        targets = {
            "malignant": [self.classes.index(name) for name in self.malignant_classes],
            "melanoma": [label for label, name in enumerate(self.classes) if is_melanoma(name)],
        }
        flags = {}
        for name, threshold in (self.thresholds if thresholds is None else thresholds).items():
            if not 0 <= threshold <= 1:
                raise ValueError(f"the threshold of {name} is {threshold}; it must be from 0 to 1")
            labels = targets.get(normalize_name(name)) or match_classes(self.classes, [name])
            flags[name] = (labels, float(threshold))
        return flags


def _views(images: "Tensor") -> "Iterator[Tensor]":
    """The 8 flips and quarter-turns of images `(N, C, H, H)`: first itself, then its mirror image.

    The first four are those without quarter-turns.
    """
    import torch

    for turns in (0, 2, 1, 3):
        # rot90 by nothing is a copy too, with the channels first in memory.
        turned = torch.rot90(images, turns, (2, 3)) if turns > 0 else images
        yield turned
        yield turned.flip(3)


def _prepared_batches(
    paths: Sequence[str],
    image_size: int,
    preprocessors: "Sequence[Preprocessor]",
    batch_size: int,
    num_workers: int,
    num_ahead: int,
) -> "Iterator[tuple[list[str], np.ndarray, list[str]]]":
    """Batches of paths, their images uint8 `(N, H, W, 3)`, and what could not be read among them.

    Decoded by threads, at most `num_ahead` batches before they are asked for.
    """
    import numpy as np

    from dataset import UnreadableImageError, prepare_image

    most = (1 + num_ahead) * batch_size
    pool = ThreadPoolExecutor(num_workers)
    futures = ((p, pool.submit(prepare_image, p, image_size, preprocessors)) for p in paths)
    try:
        waiting = deque(islice(futures, most))
        while waiting:
            read, images, unreadable = [], [], []
            for _ in range(min(batch_size, len(waiting))):
                path, future = waiting.popleft()
                try:
                    images.append(future.result())
                    read.append(path)
                except UnreadableImageError as error:
                    unreadable.append(str(error))
            shape = (len(images), image_size, image_size, 3)
            yield read, np.array(images, dtype=np.uint8).reshape(shape), unreadable
            waiting.extend(islice(futures, most - len(waiting)))
    finally:
        pool.shutdown(cancel_futures=True)


def _table(
    paths: Sequence[str],
    labels: "np.ndarray",
    probabilities: "np.ndarray",
    classes: Sequence[str],
    flags: Mapping[str, tuple[list[int], float]],
) -> "pd.DataFrame":
    import pandas as pd

    from storage.files import name_column

    columns: dict[str, Any] = {"path": name_column(paths)}
    columns["class"] = [classes[label] for label in labels]
    for label, name in enumerate(classes):
        columns[f"prob_{name}"] = probabilities[:, label]
    for name, (added_up, threshold) in flags.items():
        columns[f"flag_{name}"] = probabilities[:, added_up].sum(axis=1) >= threshold
    return pd.DataFrame(columns)


@contextmanager
def _rows_to(output: str | Path | None) -> "Iterator[Callable[[pd.DataFrame], None]]":
    """Gives a function that adds a table's rows to `output`, which appears when all are there."""
    from storage.files import write_atomically, write_csv

    if output is None:
        yield lambda table: None
        return
    is_json, is_first = Path(output).suffix.lower() == ".json", True
    # A name that is no valid text: in JSON its bytes are written as \udc.., in CSV as they are.
    errors = "backslashreplace" if is_json else "surrogateescape"
    with (
        write_atomically(output) as temporary,
        open(temporary, "w", encoding="utf-8", errors=errors, newline="") as file,
    ):

        def write_rows(table: "pd.DataFrame") -> None:
            nonlocal is_first
            if is_json:
                for row in table.to_dict("records"):
                    file.write("[\n" if is_first else ",\n")
                    file.write(json.dumps(row, ensure_ascii=False))
                    is_first = False
            else:
                write_csv(table, file, header=is_first)
                is_first = False

        yield write_rows
        if is_json:
            file.write("[]\n" if is_first else "\n]\n")


def _check_numbers(tta: int, batch_size: int, num_workers: int | None) -> None:
    if not 1 <= tta <= NUM_VIEWS:
        raise ValueError(f"tta is {tta}; it must be from 1 to {NUM_VIEWS}")
    for name, number in {"batch_size": batch_size, "num_workers": num_workers}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be 1 or more")


def check_file_to_write(path: Path, suffixes: Sequence[str]) -> None:
    """Raises before the work is done rather than after it."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: a file to write must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")


def _check_folder_to_fill(folder: Path, images: Paths) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder for the overlays")
    for path in _as_list(images):
        if Path(path).is_dir() and folder.resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(
                f"{folder} lies in {path}, where the overlays would be taken for images the next "
                "time; choose a folder elsewhere"
            )


def _check_alike(
    path: str | Path, info: "ModelInfo", first_path: str | Path, first: "ModelInfo"
) -> None:
    """Raises when the mean of two models' probabilities would mean nothing."""
    for name in ("classes", "image_size", "preprocessors", "malignant_classes"):
        own, other = info[name], first[name]
        if own != other:
            raise ValueError(
                f"{path} and {first_path} cannot be averaged: {name} differ, "
                f"{own or 'none'} and {other or 'none'}"
            )


def _check_preprocessors(
    path: str | Path, info: "ModelInfo", preprocessors: "Sequence[Preprocessor]"
) -> None:
    from dataset import fingerprint

    trained_with, given = info.preprocessors, fingerprint(preprocessors)
    if trained_with == given:
        return
    if not trained_with:
        raise ValueError(f"{path} was trained without preprocessors; predict without them")
    if not given:
        raise ValueError(
            f"{path} was trained with preprocessors of one's own, which a command cannot be told; "
            "use predict(..., preprocessors=[...]) in Python"
        )
    raise ValueError(
        f"{path} was trained with other preprocessors than those given (fingerprint "
        f"{trained_with}, not {given})"
    )


def _mean_thresholds(infos: "Sequence[ModelInfo]") -> dict[str, float]:
    brought = [
        {name: aims[AIM] for name, aims in info.thresholds.items() if AIM in aims} for info in infos
    ]
    return {
        # A sum of probabilities, from which a threshold is taken, can be a little above 1.
        name: min(sum(thresholds[name] for thresholds in brought) / len(brought), 1.0)
        for name in brought[0]
        if all(name in thresholds for thresholds in brought)
    }


def _warn_of_thresholds(flags: Mapping[str, Any], num_models: int, tta: int) -> None:
    """Warns when the thresholds that models bring are used for something else than one model."""
    used_for = [f"{num_models} models"] * (num_models > 1) + [f"{tta} views"] * (tta > 1)
    if flags and used_for:
        warnings.warn(
            f"the thresholds of {', '.join(flags)} were chosen for one model and one view; with "
            f"{' and '.join(used_for)} they need not find 95 % of such lesions. Give others with "
            "--threshold NAME=P (in Python thresholds={NAME: P})",
            stacklevel=3,
        )


def _as_list(paths: Paths) -> list[str | os.PathLike]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)
