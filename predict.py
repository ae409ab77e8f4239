"""Trained models on new images, and what they looked at: a command and a function.

    python predict.py --model models/resnet_finetuned/model.pth IMAGE_OR_FOLDER...

As in train_models.py, what imports torch is imported where it is needed.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.console import (
    Parser,
    check_flags_have_effect,
    given_flags,
    in_one_line,
    number_type,
    say,
    say_stopped,
    speak_utf8,
    stoppable,
    with_underscores,
)
from learning.allocator import keep_freed_memory

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from torch import Tensor, nn

    from dataset import Preprocessor
    from models import LesionClassifier, ModelInfo

AIM = "sensitivity 95%"  # of the thresholds that models bring, the one that flags are set by
PROGRAM = "predict.py"
SMALLEST_MAP = 4  # on a side; the one place of a 1 x 1 map would explain nothing
BATCHES_AHEAD = 2  # of images decoded while a GPU works; on the CPU both would want the same cores
NUM_VIEWS = 8  # flips and quarter-turns of a square
MOST_ROWS_PRINTED = 20  # where there is a file that has them all
WIDEST_PATH = 60  # characters that the printed table leaves for paths; longer ones stick out
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Flags that a mode of the command has no use for, with what to do instead.
WITHOUT_EFFECT = {
    "evaluate": {
        "output": "its tables of predictions are in the folder that it is given",
        "top_k": "",
        "tta": "",
        "gradcam": "it draws examples for each class by itself",
        "threshold": "it reports several thresholds of each model's own",
    },
    "export": {
        **dict.fromkeys(("output", "top_k", "tta", "gradcam", "threshold"), ""),
        **dict.fromkeys(("device", "precision", "batch_size", "num_workers"), ""),
        **dict.fromkeys(("labels_csv", "label_column"), ""),
    },
}

Paths = str | os.PathLike | Sequence[str | os.PathLike]


# ---------------------------------------------------------------------------- prediction


def predict(
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
) -> "pd.DataFrame":
    """What trained models say of images, a row an image.

    Parameters
    ----------
    model : a `model.pth`, or several: an ensemble, which takes the mean of their probabilities
    images : files and folders; of a folder all images below it that are not hidden, sorted
    output : a .csv or .json file for the table as well, written whole or not at all
    tta : over how many of the 8 flips and quarter-turns raw probabilities are averaged; 1 is the
        image as it is, 2 adds its mirror image, 4 all flips
    gradcam : a folder for a picture of each image under its `gradcam` for the decided class
    thresholds : by name of a class, or `malignant` for those counted as such, or `melanoma` for
        all classes of it, in situ and metastases too, the calibrated
        probability from which an image is flagged; None is those chosen in training for a
        sensitivity of 95 % of one model that sees each image as it is. For several models, of which
        it is their mean, and for `tta` above 1 none are chosen: a warning says so
    preprocessors : those that the models were trained with
    device, precision : as in training; None is CUDA where there is one
    batch_size : images that the models see at once
    num_workers : threads that decode; None is one a core that the process may use

    Returns
    -------
    A table with `path`; `class`, what the models decide for, which is the highest mean of their raw
    probabilities; a `prob_<class>` for each class, calibrated; and a `flag_<name>` for each
    threshold. Calibration can move another class than the decided one to the top.

    A file that cannot be read is named in a warning and has no row. Raises FileNotFoundError for
    what is not there, and ValueError for models that do not fit each other or the preprocessors,
    thresholds of no class, and arguments that cannot be.
    """
    import pandas as pd

    tables, unreadable = [], []
    for table, problems in predict_batches(
        model,
        images,
        output=output,
        tta=tta,
        gradcam=gradcam,
        thresholds=thresholds,
        preprocessors=preprocessors,
        device=device,
        precision=precision,
        batch_size=batch_size,
        num_workers=num_workers,
    ):
        tables.append(table)
        unreadable += problems
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} images cannot be read: {'; '.join(unreadable)}", stacklevel=2
        )
    return pd.concat([t for t in tables if len(t) > 0] or tables[:1], ignore_index=True)


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
        _check_file_to_write(Path(output), (".csv", ".json"))
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
                    _save_overlay(Path(gradcam) / _overlay_name(path), image, heatmap)
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
    missing = [_printable(str(path)) for path in images if not os.path.exists(path)]
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


# ---------------------------------------------------------------------------- checks


def _check_numbers(tta: int, batch_size: int, num_workers: int | None) -> None:
    if not 1 <= tta <= NUM_VIEWS:
        raise ValueError(f"tta is {tta}; it must be from 1 to {NUM_VIEWS}")
    for name, number in {"batch_size": batch_size, "num_workers": num_workers}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be 1 or more")


def _check_file_to_write(path: Path, suffixes: Sequence[str]) -> None:
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


# ---------------------------------------------------------------------------- Grad-CAM


def gradcam(
    model: "LesionClassifier", images: "Tensor | np.ndarray", labels: "Sequence[int] | np.ndarray"
) -> "np.ndarray":
    """Where a model saw what speaks for a class, float32 `(N, H, W)` in [0, 1].

    `images` are float `(N, 3, H, W)` in [0, 1], `labels` int `(N,)` the classes to explain. With
    A_k the maps that the last convolution stage gives (of images below 128 pixels an earlier one of
    a ResNet, with maps of 4 x 4 or more) and y the class's logit, it is ReLU(sum_k a_k
    A_k), where a_k is the mean of dy/dA_k over the map (Selvaraju et al. 2017), scaled up
    bilinearly to the image and divided by its maximum; where nothing speaks for the class it is 0.
    Computed in float32. The model is left as it was, on its device. Raises ValueError for labels
    that do not fit.
    """
    import torch
    from torch.func import functional_call
    from torch.nn.functional import interpolate, relu

    from models import evaluation_mode

    images = torch.as_tensor(images, dtype=torch.float32, device=model.mean.device)
    labels = torch.as_tensor(labels, dtype=torch.int64, device=model.mean.device)
    num_classes = model.config["num_classes"]
    if labels.shape != images.shape[:1] or ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(f"labels must be {len(images)} numbers from 0 to {num_classes - 1}")
    activations: list[Tensor] = []

    def start_graph_here(module: "nn.Module", inputs: Any, output: "Tensor") -> "Tensor":
        activations.append(output.detach().requires_grad_())
        return activations[0]

    # Detached, the parameters get no gradient, and what leads to the activations is not recorded.
    def apply(module: "nn.Module", values: "Tensor") -> "Tensor":
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return functional_call(module, parameters, values)

    hook = _last_stage(model, min(images.shape[2:])).register_forward_hook(start_graph_here)
    try:
        with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
            # Not model(images): a frozen backbone switches gradients off in there.
            features = apply(model.backbone, (images - model.mean) / model.std)
            logits = apply(model.head, features.float())
            # A copy, as one made in inference mode cannot be part of a graph.
            score = logits.gather(1, labels.clone()[:, None]).sum()
            (gradients,) = torch.autograd.grad(score, activations)
    finally:
        hook.remove()
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    maps = relu((weights * activations[0].detach()).sum(dim=1, keepdim=True))
    maps = interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    highest = maps.amax(dim=(1, 2), keepdim=True)
    return (maps / highest.clamp_min(torch.finfo(maps.dtype).tiny)).cpu().numpy()


def _last_stage(model: "LesionClassifier", image_size: int) -> "nn.Module":
    """The last convolution stage; of a ResNet, the last whose maps still tell places apart."""
    from torch import nn

    from models import SimpleCNN

    if isinstance(model, SimpleCNN):
        layers = list(model.backbone)
        last = max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d))
        return layers[last + 1]  # the ReLU after it
    strides = {"layer4": 32, "layer3": 16, "layer2": 8, "layer1": 4}
    large = [name for name, stride in strides.items() if image_size / stride >= SMALLEST_MAP]
    return getattr(model.backbone, large[0] if large else "layer1")


def _overlay_name(path: str) -> str:
    """A file name that tells the image, and its path from all others with the same name."""
    stem = "".join(c if c.isprintable() and c not in '\\:*?"<>|' else "_" for c in Path(path).stem)
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{stem[:48]}-{digest[:12]}.png"  # the longest name that file systems take has 255 bytes


def _save_overlay(path: Path, image: "np.ndarray", heatmap: "np.ndarray") -> None:
    """Draws a heat map over an image uint8 `(H, W, 3)`, the more opaque the higher it is."""
    import matplotlib
    import numpy as np
    from PIL import Image

    from storage.files import write_atomically

    colours = 255 * matplotlib.colormaps["viridis"](heatmap)[..., :3]
    opacity = 0.6 * heatmap[..., None]
    mixed = np.round((1 - opacity) * image + opacity * colours).astype(np.uint8)
    with write_atomically(path) as temporary:
        Image.fromarray(mixed).save(temporary)


# ---------------------------------------------------------------------------- ONNX


def export_onnx(model: str | Path, path: str | Path) -> None:
    """Writes a trained model as ONNX, once onnxruntime has given the same logits as PyTorch.

    Input `images`, float32 `(batch, 3, image_size, image_size)`, RGB in [0, 1]; output `logits`,
    raw, for probabilities softmax(log_softmax(logits) / temperature + bias). What is needed to use
    it is in the metadata as JSON: `classes`, `image_size`, `shorter_side` (to which an image is
    scaled before the crop of `image_size` from its middle), `preprocessors` (the fingerprint of
    one's own, empty for none), `temperature`, `bias`.

    Raises ModuleNotFoundError when the packages that this needs are missing, and ValueError when
    the logits differ.
    """
    _check_file_to_write(Path(path), (".onnx",))
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"--export needs {', '.join(missing)}; install with: pip install "
            f"{' '.join(ONNX_PACKAGES)}"
        )
    import onnx

    from dataset import _shorter_side
    from models import load_model
    from storage.files import write_atomically

    classifier, info = load_model(model)
    size = info.image_size
    metadata = {
        "classes": info.classes,
        "image_size": size,
        "shorter_side": _shorter_side(size),
        "preprocessors": info.preprocessors,
        "temperature": info.calibration.temperature,
        "bias": info.calibration.bias,
    }
    with write_atomically(path) as temporary:
        _export_logits(temporary, classifier, size)
        exported = onnx.load(temporary)
        onnx.helper.set_model_props(exported, {name: json.dumps(v) for name, v in metadata.items()})
        onnx.save(exported, temporary)
        _check_same_logits(temporary, classifier, size)


def _export_logits(path: Path, classifier: "LesionClassifier", image_size: int) -> None:
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        # Of torch's two exporters the newer fails on batch norm in torch 2.6 and the older is
        # deprecated since 2.9, so each version takes its default. Both know `dynamic_axes`, if with
        # a warning; whether they got it right is checked.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            classifier,
            (torch.rand(2, 3, image_size, image_size),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            external_data=False,
            verbose=False,
        )


def _check_same_logits(path: Path, classifier: "LesionClassifier", image_size: int) -> None:
    import numpy as np
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        images = torch.rand(count, 3, image_size, image_size, generator=generator)
        (exported,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = classifier(images).numpy()
        if not np.allclose(exported, expected, atol=1e-4):
            difference = np.abs(exported - expected).max()
            raise ValueError(
                f"onnxruntime gives other logits than PyTorch, by up to {difference:.3g}; nothing "
                "was written"
            )


# ---------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class Settings:
    """What the command is told; each is a flag of the same name, but for `images`."""

    model: tuple[str, ...]
    images: tuple[str, ...]
    output: str | None
    top_k: int
    tta: int
    gradcam: str | None
    threshold: dict[str, float] | None
    device: str
    precision: str
    batch_size: int
    num_workers: int | None
    evaluate: str | None
    labels_csv: str | None
    label_column: str | None
    export: str | None
    overwrite: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status: 1 when an image could not be read.

    An interruption ends in one line, with status 130 for SIGINT (Ctrl-C) and 143 for SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = parse_arguments(argv)
    with warnings.catch_warnings(), stoppable():
        warnings.showwarning = _show_warning
        try:
            return run(settings, command=shlex.join(["python", PROGRAM, *argv]))
        except (ValueError, OSError, ModuleNotFoundError) as error:
            return _say_error(error)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # by name, as torch is not imported here
                raise
            return _say_error(
                f"out of memory with --batch_size {settings.batch_size}; try a smaller one"
            )
        except KeyboardInterrupt as interruption:
            return say_stopped(PROGRAM, interruption, "nothing was written")


def run(settings: Settings, command: str = "") -> int:
    """Exports the model, or predicts and prints; gives the exit status."""
    _check_nothing_is_lost(settings)
    if settings.export is not None:
        export_onnx(settings.model[0], settings.export)
        print(f"{settings.export}: gives the same logits in onnxruntime as in PyTorch")
        return 0
    if settings.evaluate is not None:
        with _noting("the same command goes on with the models that are left, without --overwrite"):
            return _evaluate_and_print(settings, command)
    if settings.gradcam is not None:
        with _noting(f"the overlays drawn so far are in {settings.gradcam}"):
            return _predict_and_print(settings)
    return _predict_and_print(settings)


def _check_nothing_is_lost(settings: Settings) -> None:
    """Raises before the work is done when a file would be written over without --overwrite."""
    for path, suffixes in ((settings.output, (".csv", ".json")), (settings.export, (".onnx",))):
        if path is None:
            continue
        _check_file_to_write(Path(path), suffixes)
        if any(_is_same_file(path, other) for other in (*settings.model, *settings.images)):
            raise ValueError(f"{path} is to be read as well; choose another name")
        if os.path.lexists(path) and not settings.overwrite:
            raise ValueError(
                f"{path} exists and would be lost; --overwrite replaces it, or choose another name"
            )
    if settings.gradcam is not None and not settings.overwrite:
        _check_no_overlay_is_lost(settings.gradcam, settings.images)


def _check_no_overlay_is_lost(folder: str, images: Sequence[str]) -> None:
    if not os.path.isdir(folder):
        return
    existing = set(os.listdir(folder))
    overlays = [name for name in map(_overlay_name, find_files(images)) if name in existing]
    if overlays:
        raise ValueError(
            f"{folder} has overlays of {len(overlays)} of these images, such as {overlays[0]}, "
            "which would be lost; --overwrite replaces them, or choose another folder"
        )


def _is_same_file(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


@contextmanager
def _noting(what_now: str) -> Iterator[None]:
    """Adds to an interruption how matters stand after it."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        interruption.add_note(what_now)
        raise


def _evaluate_and_print(settings: Settings, command: str) -> int:
    from experiment.results import evaluate_folder

    comparison, unreadable = evaluate_folder(
        settings.model,
        settings.images[0],
        settings.evaluate,
        labels_csv=settings.labels_csv,
        label_column=settings.label_column,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        overwrite=settings.overwrite,
        command=command,
    )
    for problem in unreadable:
        say(PROGRAM, "warning", problem)
    columns = ["model", "precision", "recall", "balanced_accuracy"]
    print(comparison[columns].to_string(index=False, float_format="{:.3f}".format))
    print(f"\nEverything is in {settings.evaluate}; begin with {settings.evaluate}/report.html.")
    return 1 if unreadable else 0


def _predict_and_print(settings: Settings) -> int:
    from tqdm import tqdm

    from training import choose_device, name_of_precision, resolve_precision

    printer = _Printer(settings.top_k, None if settings.output is None else MOST_ROWS_PRINTED)
    num_images, num_unreadable, num_flagged = 0, 0, Counter()
    batches = predict_batches(
        settings.model,
        settings.images,
        output=settings.output,
        tta=settings.tta,
        gradcam=settings.gradcam,
        thresholds=settings.threshold,
        device=settings.device,
        precision=settings.precision,
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
    )
    with closing(batches):  # or an interruption could leave its temporary file
        for table, unreadable in batches:
            for problem in unreadable:
                tqdm.write(f"{PROGRAM}: warning: {in_one_line(problem)}", file=sys.stderr)
            printer.print(table)
            num_images += len(table)
            num_unreadable += len(unreadable)
            flagged = {flag: int(table[f"flag_{flag}"].sum()) for flag in _names(table)[1]}
            num_flagged.update(flagged)
    if num_images > printer.num_printed:
        print(f"... and {num_images - printer.num_printed:,} more")
    summary = [f"{num_images:,} images"]
    if num_flagged:
        counts = (f"{_printable(flag)} {number:,}" for flag, number in num_flagged.items())
        summary.append(f"flagged: {', '.join(counts)}")
    if num_unreadable > 0:
        summary.append(f"could not be read: {num_unreadable:,}")
    dtype = resolve_precision(settings.precision, choose_device(settings.device))
    summary.append(f"precision {name_of_precision(dtype)}")
    print(f"\n{'; '.join(summary)}")
    return 1 if num_unreadable > 0 else 0


class _Printer:
    """Prints tables as one, in columns as wide as the first of them needs."""

    def __init__(self, top_k: int, most_rows: int | None) -> None:
        self.top_k = top_k
        self.most_rows = most_rows
        self.num_printed = 0
        self._widths: list[int] = []

    def print(self, table: "pd.DataFrame") -> None:
        from tqdm import tqdm

        if self.most_rows is not None:
            table = table.head(self.most_rows - self.num_printed)
        classes, flags = _names(table)
        rows = [self._cells(row, classes, flags) for row in table.to_dict("records")]
        if self.num_printed == 0 and rows:
            header = ["image", "class", "flags", "calibrated probabilities"]
            rows.insert(0, header if flags else [*header[:2], header[-1]])
            self._widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
            self._widths[0] = min(self._widths[0], WIDEST_PATH)
        for cells in rows:
            padded = zip(cells, self._widths, strict=True)
            # Not print, which would break the bar.
            tqdm.write("  ".join(cell.ljust(width) for cell, width in padded).rstrip())
        self.num_printed += len(table)

    def _cells(self, row: dict[str, Any], classes: list[str], flags: list[str]) -> list[str]:
        ranked = sorted(classes, key=lambda name: -row[f"prob_{name}"])[: self.top_k]
        probabilities = [f"{_printable(name)} {row[f'prob_{name}']:.3f}" for name in ranked]
        flagged = [_printable(name) for name in flags if row[f"flag_{name}"]]
        cells = [_printable(row["path"]), _printable(row["class"]), ", ".join(probabilities)]
        if flags:
            cells.insert(2, ", ".join(flagged) or "-")
        return cells


def _names(table: "pd.DataFrame") -> tuple[list[str], list[str]]:
    """The classes, and the flags, that a table of `predict` has."""
    classes, flags = (
        [column.removeprefix(kind) for column in table.columns if column.startswith(kind)]
        for kind in ("prob_", "flag_")
    )
    return classes, flags


def parse_arguments(argv: Sequence[str]) -> Settings:
    """The settings; exits with status 2 for a flag that is wrong."""
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)  # what follows are images, whatever it is
    flags = [with_underscores(word) for word in argv[:end]]
    parser = _make_parser()
    arguments = vars(parser.parse_intermixed_args(flags))
    arguments["images"] += argv[end + 1 :]
    _check_mode(parser, arguments, given_flags(parser, flags))
    thresholds = arguments.pop("threshold")
    return Settings(
        model=tuple(arguments.pop("model")),
        images=tuple(arguments.pop("images")),
        threshold=None if thresholds is None else dict(thresholds),
        **arguments,
    )


def _check_mode(
    parser: argparse.ArgumentParser, arguments: dict[str, Any], given: set[str]
) -> None:
    """Ends with status 2 for flags and images that do not go together."""
    images, thresholds = arguments["images"], arguments["threshold"] or []
    if {"evaluate", "export"} <= given:
        parser.error("--evaluate and --export do different things; give one of them at a time")
    for mode, without_effect in WITHOUT_EFFECT.items():
        if arguments[mode] is not None:
            check_flags_have_effect(parser, given, f"--{mode}", without_effect)
    if arguments["export"] is not None:
        if images:
            parser.error("--export takes no images; predict them without it")
        if len(arguments["model"]) > 1:
            parser.error("--export takes one --model; export each by itself")
    elif arguments["evaluate"] is not None:
        if len(images) != 1:
            parser.error("--evaluate takes one folder of labelled images")
        if "label_column" in given and "labels_csv" not in given:
            parser.error("--label_column needs the table that the column is in: --labels_csv")
    else:
        if not images:
            parser.error("name the images or folders to predict")
        for name in sorted(given & {"labels_csv", "label_column"}):
            parser.error(f"--{name} has no effect without --evaluate")
        if "overwrite" in given and not given & {"output", "gradcam"}:
            parser.error("--overwrite has no effect without a file to write, such as --output")
    names = [name for name, _ in thresholds]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        parser.error(f"--threshold {twice} is given twice")


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="What trained models say of images of skin lesions.",
        epilog="For research and teaching, not for diagnosis. Exit status: 1 when an image could "
        "not be read, 2 when something is wrong with the command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    positive = number_type(int, lambda n: 1 <= n < 2**31, "1 or more, and less than 2**31")
    views = number_type(int, lambda n: 1 <= n <= NUM_VIEWS, f"from 1 to {NUM_VIEWS}")
    text = _not_empty
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE_OR_FOLDER", help="what to predict")
    add("--model", action="append", type=text, required=True, metavar="FILE",
        help="a model.pth; several --model are an ensemble")  # fmt: skip
    add("--output", type=text, metavar="FILE", help="a .csv or .json file for the table")
    add("--top_k", type=positive, default=3, metavar="N", help="classes printed with probability")
    add("--tta", type=views, default=1, metavar="N", help="flips and turns averaged over, 1 to 8")
    add(
        "--gradcam",
        type=text,
        metavar="DIR",
        help="a folder for pictures of what the models looked at",
    )
    add("--threshold", action="append", type=_threshold, metavar="NAME=P",
        help="flag a class, or malignant, from this probability on; can be repeated (None: the "
        "model's own, for a sensitivity of 95 %%)")  # fmt: skip
    add("--device", default="auto", metavar="auto|cpu|cuda", help="auto: CUDA where there is one")
    precisions = ("auto", "fp32", "bf16", "fp16")
    add("--precision", choices=precisions, default="auto",
        help="auto: bf16 where the hardware computes in it")  # fmt: skip
    add("--batch_size", type=positive, default=32, metavar="N", help="images a batch")
    add(
        "--num_workers",
        type=positive,
        metavar="N",
        help="threads that decode (None: one a processor)",
    )
    add(
        "--evaluate",
        type=text,
        metavar="DIR",
        help="measure the models on a labelled folder, report to DIR",
    )
    add(
        "--labels_csv",
        type=text,
        metavar="FILE",
        help="with --evaluate: classes that override the folders'",
    )
    add(
        "--label_column",
        type=text,
        metavar="NAME",
        help="with --evaluate: the column that gives the classes",
    )
    add(
        "--export",
        type=text,
        metavar="FILE",
        help="write the model as ONNX instead, and check it",
    )
    add("--overwrite", action="store_true", help="replace files that are to be written and exist")
    return parser


def _threshold(text: str) -> tuple[str, float]:
    name, _, probability = text.rpartition("=")
    try:
        threshold = float(probability)
        is_of_the_form = bool(name.strip())
    except ValueError:
        is_of_the_form = False
    if not is_of_the_form:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=0.2")
    if not 0 <= threshold <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a probability is from 0 to 1")
    return name.strip(), threshold


def _not_empty(text: str) -> str:
    if not text.strip():  # such as a variable of the shell that is not set
        raise argparse.ArgumentTypeError("is empty")
    return text


def _show_warning(message: Warning | str, *details: Any) -> None:
    say(PROGRAM, "warning", message)


def _say_error(message: object) -> int:
    say(PROGRAM, "error", message)
    return 2


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)


if __name__ == "__main__":
    speak_utf8()
    keep_freed_memory()
    sys.exit(main())
