"""Trained models on new images: models, views and batches → probabilities."""

import json
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import cpu_count
from torch import Tensor

from augmentation import turn
from dataset import (
    Preprocessor,
    UnreadableImageError,
    fingerprint,
    prepare_image,
    to_float,
)
from evaluation import match_classes
from imaging.heatmaps import FIGURE_SIDE
from imaging.lesions import is_melanoma, normalize_name
from inference.explain import gradcam, overlay_name, save_overlay
from inference.files import find_files
from inference.options import Paths, PredictionOptions, as_list, find_model
from learning.hardware import choose_device, compute_logits, memory_format_for, resolve_precision
from models import LesionClassifier, ModelInfo, load_model
from storage.files import name_column, write_atomically, write_csv
from storage.progress import ProgressBar

DEFAULT_AIM = "sensitivity 95%"  # of the thresholds in a model.pth, the one that sets flags
AIM = DEFAULT_AIM  # its former name
BATCHES_AHEAD = 2  # of images decoded while a GPU works; on the CPU both would want the same cores


def predict_batches(
    model: Paths, images: Paths, **options: Any
) -> Generator[tuple[pd.DataFrame, list[str]]]:
    """Yields the table of `predict.predict` batch by batch, each with what could not be read.

    `options` are those of `predict.predict`, see `PredictionOptions`. However many images there
    are, it takes the same memory. `output` appears after the last batch.
    """
    chosen, images = PredictionOptions(**options), as_list(images)
    paths = find_files(images)
    if chosen.gradcam is not None:
        _check_folder_of_overlays(Path(chosen.gradcam), images, chosen.output)
    ensemble = Ensemble(
        model,
        preprocessors=chosen.preprocessors,
        device=chosen.device,
        precision=chosen.precision,
    )
    flags = ensemble.flags(chosen.thresholds)
    if chosen.thresholds is None:
        _warn_of_thresholds(flags, len(ensemble.models), chosen.tta)
    if chosen.gradcam is not None:
        Path(chosen.gradcam).mkdir(parents=True, exist_ok=True)
    with (
        _rows_to(chosen.output) as write_rows,
        ProgressBar(name="predicting", total=len(paths), unit="img") as bar,
    ):
        for read, pixels, unreadable in prepared_batches(paths, ensemble, chosen):
            raw, calibrated = ensemble.probabilities(pixels, chosen.tta)
            labels = raw.argmax(axis=1)
            flagged = ensemble.flagged(calibrated, flags)
            table = _table(read, labels, calibrated, ensemble.classes, flagged)
            write_rows(table)
            if chosen.gradcam is not None and read:
                _save_overlays(
                    Path(chosen.gradcam), table, ensemble.heatmaps(pixels, labels), chosen
                )
            bar.update(len(read) + len(unreadable))
            yield table, unreadable


class Ensemble:
    """One trained model or several, on a device, that give the mean of their probabilities.

    `paths` are those of a `model.pth`, or folders with one, see `inference.options.find_model`.

    Attributes: `classes`, the names in label order; `image_size`; `malignant_classes`, the names of
    those counted as malignant; `thresholds`, by name, the mean of those that all models have. These
    were chosen on validation for one model and images as they are; their mean, and more views, need
    not reach the same sensitivity.

    Raises ValueError for models whose classes, image size, preprocessors or malignant classes
    differ, for preprocessors other than those of the training, and for a device or precision that
    cannot be used.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        preprocessors: Sequence[Preprocessor] = (),
        device: torch.device | str | None = None,
        precision: str = "auto",
    ) -> None:
        files = [find_model(path) for path in as_list(paths)]
        if not files:
            raise ValueError("no model given; give one model.pth or several")
        self.device = choose_device(device)
        self.dtype = resolve_precision(precision, self.device)
        models, infos = zip(*map(load_model, files), strict=True)
        info_of = dict(zip(files, infos, strict=True))
        check_alike(info_of, ("classes", "image_size", "preprocessors", "malignant_classes"))
        for path, info in info_of.items():
            _check_preprocessors(path, info, preprocessors)
        layout = memory_format_for(self.device, self.dtype)
        self.models = [model.to(self.device, memory_format=layout) for model in models]
        self.calibrations = [info.calibration for info in infos]
        self.classes: list[str] = infos[0].classes
        self.image_size: int = infos[0].image_size
        self.malignant_classes: list[str] = infos[0].malignant_classes
        self.thresholds = _mean_thresholds(infos)

    def probabilities(
        self, images: np.ndarray | Mapping[str, np.ndarray], tta: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the means of the raw and of the calibrated probabilities.

        Both are float64 `(N, num_classes)`. `images` are uint8 `(N, H, W, 3)`, seen in `tta` views,
        or a dict of them as `images` and of the models' further inputs by name. The predicted class
        is that of the highest raw probability. Raises ValueError when a model gives probabilities
        that are not finite.
        """
        named = images if isinstance(images, Mapping) else {"images": images}
        inputs = {name: torch.from_numpy(values).to(self.device) for name, values in named.items()}
        inputs["images"] = to_float(inputs["images"])
        raw = [self._raw_probabilities(model, inputs, tta) for model in self.models]
        if not np.isfinite(raw).all():
            raise ValueError(
                "a model's probabilities are not finite; it is damaged, or needs --precision fp32"
            )
        calibrated = [c.apply(p) for c, p in zip(self.calibrations, raw, strict=True)]
        return np.mean(raw, axis=0), np.mean(calibrated, axis=0)

    def _raw_probabilities(
        self, model: LesionClassifier, inputs: Mapping[str, Tensor], tta: int
    ) -> np.ndarray:
        with torch.inference_mode():
            logits = [
                compute_logits(model, {**inputs, "images": view}, self.device, self.dtype)
                for view in (turn(inputs["images"], number) for number in range(tta))
            ]
        return torch.stack(logits).cpu().double().softmax(dim=2).mean(dim=0).numpy()

    def heatmaps(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns the mean of the models' `gradcam` of images uint8 `(N, H, W, 3)`.

        Each map is divided by its maximum.
        """
        pixels = to_float(torch.from_numpy(images).to(self.device))
        heatmaps = np.mean([gradcam(model, pixels, labels) for model in self.models], axis=0)
        highest = heatmaps.max(axis=(1, 2), keepdims=True)
        return heatmaps / np.where(highest > 0, highest, 1)

    def flags(self, thresholds: Mapping[str, float] | None) -> dict[str, tuple[list[int], float]]:
        """Returns by name the labels whose probabilities are added up, and the threshold for them.

        A name is `malignant`, for all classes that count as such, `melanoma`, for all classes of
        it, or that of a class as `evaluation.match_classes` finds it. None is `self.thresholds`.
        Raises ValueError for a name of no class or a threshold that is no probability.
        """
        targets, flags = self._targets(), {}
        for name, threshold in (self.thresholds if thresholds is None else thresholds).items():
            if not 0 <= threshold <= 1:
                raise ValueError(f"the threshold of {name} must be from 0 to 1, not {threshold}")
            labels = targets.get(normalize_name(name)) or match_classes(self.classes, [name])
            flags[name] = (labels, float(threshold))
        return flags

    def flagged(
        self, probabilities: np.ndarray, flags: Mapping[str, tuple[list[int], float]]
    ) -> dict[str, np.ndarray]:
        """Returns by name of a flag, as `flags` gives them, which images have it, bool `(N,)`.

        `probabilities` are calibrated, `(N, num_classes)`. An image has a flag whose threshold its
        probabilities reach. What is flagged as melanoma, or as any class that counts as malignant,
        is flagged as `malignant` too if that is among the flags, whatever its threshold.
        """
        found = {
            name: probabilities[:, labels].sum(axis=1) >= threshold
            for name, (labels, threshold) in flags.items()
        }
        malignant = {label for labels in self._targets().values() for label in labels}
        implying = [found[name] for name in flags if set(flags[name][0]) <= malignant]
        for name in flags:
            if normalize_name(name) == "malignant":
                found[name] = np.any([found[name], *implying], axis=0)
        return found

    def _targets(self) -> dict[str, list[int]]:
        return {
            "malignant": [self.classes.index(name) for name in self.malignant_classes],
            "melanoma": [label for label, name in enumerate(self.classes) if is_melanoma(name)],
        }


def prepared_batches(
    paths: Sequence[str], ensemble: Ensemble, options: PredictionOptions
) -> Iterator[tuple[list[str], np.ndarray, list[str]]]:
    """Yields batches of paths, their images uint8 `(N, H, W, 3)`, and messages on unreadable files.

    Threads decode, on the CPU one batch at a time and on a GPU `BATCHES_AHEAD` ahead of it.
    """
    num_ahead = 0 if ensemble.device.type == "cpu" else BATCHES_AHEAD
    max_waiting = (1 + num_ahead) * options.batch_size
    size, preprocessors = ensemble.image_size, options.preprocessors
    pool = ThreadPoolExecutor(options.num_workers or cpu_count())
    futures = ((path, pool.submit(prepare_image, path, size, preprocessors)) for path in paths)
    try:
        waiting = deque(islice(futures, max_waiting))
        while waiting:
            read, images, unreadable = [], [], []
            for _ in range(min(options.batch_size, len(waiting))):
                path, future = waiting.popleft()
                try:
                    images.append(future.result())
                    read.append(path)
                except UnreadableImageError as error:
                    unreadable.append(str(error))
            shape = (len(images), size, size, 3)
            yield read, np.array(images, dtype=np.uint8).reshape(shape), unreadable
            waiting.extend(islice(futures, max_waiting - len(waiting)))
    finally:
        pool.shutdown(cancel_futures=True)


def _table(
    paths: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    flagged: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    own = probabilities[np.arange(len(labels)), labels]
    # Of equally probable classes it is the predicted one.
    highest = np.where(own >= probabilities.max(axis=1), labels, probabilities.argmax(axis=1))
    columns = {
        "path": name_column(paths),
        "class": [classes[label] for label in labels],
        "probability": own,
        "most_probable": [classes[label] for label in highest],
    }
    columns |= {f"prob_{name}": probabilities[:, label] for label, name in enumerate(classes)}
    return pd.DataFrame(columns | {f"flag_{name}": flagged[name] for name in flagged})


def _save_overlays(
    folder: Path, table: pd.DataFrame, heatmaps: np.ndarray, options: PredictionOptions
) -> None:
    """Writes the figure of each row of a table, drawn by threads from the image's own pixels."""

    def save(row: dict[Any, Any], heatmap: np.ndarray) -> None:
        image = prepare_image(row["path"], FIGURE_SIDE, options.preprocessors)
        save_overlay(folder / overlay_name(row["path"]), image, heatmap, row)

    pool = ThreadPoolExecutor(options.num_workers or cpu_count())
    try:
        for _ in pool.map(save, table.to_dict("records"), heatmaps):
            pass  # but raises what a thread has raised
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _rows_to(output: str | Path | None) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Gives a function that adds a table's rows to `output`, which appears when all are there."""
    if output is None:
        yield lambda table: None
        return
    is_json = Path(output).suffix.lower() == ".json"
    # A name that is no valid text: in JSON its bytes are written as \udc.., in CSV as they are.
    errors = "backslashreplace" if is_json else "surrogateescape"
    with (
        write_atomically(output) as temporary,
        open(temporary, "w", encoding="utf-8", errors=errors, newline="") as file,
    ):

        def write_rows(table: pd.DataFrame) -> None:
            is_first = file.tell() == 0
            if not is_json:
                write_csv(table, file, header=is_first)
            elif len(table) > 0:
                rows = (json.dumps(row, ensure_ascii=False) for row in table.to_dict("records"))
                file.write(("[\n" if is_first else ",\n") + ",\n".join(rows))

        yield write_rows
        if is_json:
            file.write("[]\n" if file.tell() == 0 else "\n]\n")


def _check_folder_of_overlays(
    folder: Path, images: Sequence[str], output: str | Path | None
) -> None:
    """Raises ValueError for a file, or a folder whose overlays would be taken for images."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder for the overlays")
    for path in images:
        if Path(path).is_dir() and folder.resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(
                f"{folder} is inside {path}, where overlays would be taken for images the next "
                "time; choose another folder"
            )
    if output is not None and folder.resolve().is_relative_to(Path(output).resolve()):
        raise ValueError(
            f"{folder} cannot be a folder, as {output} is a file; choose another folder"
        )


def check_alike(infos: Mapping[str, ModelInfo], attributes: Sequence[str]) -> None:
    """Raises ValueError when models, here by name, differ in one of these attributes."""
    (first_name, first), *others = infos.items()
    for name, info in others:
        for attribute in attributes:
            own, other = info[attribute], first[attribute]
            if own != other:
                raise ValueError(
                    f"{name} and {first_name} cannot be combined: {attribute} differ, "
                    f"{own or 'none'} and {other or 'none'}"
                )


def _check_preprocessors(path: str, info: ModelInfo, preprocessors: Sequence[Preprocessor]) -> None:
    trained_with, given = info.preprocessors or "none", fingerprint(preprocessors) or "none"
    if trained_with == given:
        return
    if given == "none":
        raise ValueError(
            f"{path} was trained with custom preprocessors, which the command does not have; use "
            "predict(..., preprocessors=[...]) in Python"
        )
    raise ValueError(
        f"{path} was trained with preprocessors other than those given (fingerprint "
        f"{trained_with}, not {given})"
    )


def _mean_thresholds(infos: Sequence[ModelInfo]) -> dict[str, float]:
    """Returns the mean of the thresholds that all models have."""
    stored = pd.DataFrame(
        {name: aims[DEFAULT_AIM] for name, aims in info.thresholds.items() if DEFAULT_AIM in aims}
        for info in infos
    )
    # A sum of probabilities, from which a threshold is taken, can be a little above 1.
    means = stored.dropna(axis=1).mean().clip(upper=1.0)
    return dict(zip(means.index, means.tolist(), strict=True))


def _warn_of_thresholds(flags: Mapping[str, Any], num_models: int, tta: int) -> None:
    """Warns when thresholds chosen for one model and view are used for more."""
    used_for = [f"{num_models} models"] * (num_models > 1) + [f"{tta} views"] * (tta > 1)
    if flags and used_for:
        warnings.warn(
            f"the thresholds of {', '.join(flags)} were chosen for one model and one view; with "
            f"{' and '.join(used_for)} they may not find 95 % of such lesions. Set others with "
            "--threshold NAME=P (in Python, thresholds={NAME: P})",
            stacklevel=3,
        )
