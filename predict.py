"""The command and the function that predict the classes of new images with trained models.

    python predict.py --model models/resnet_finetuned/model.pth IMAGE_OR_FOLDER...

As in train_models.py, what imports torch is imported where it is needed, so that neither `--help`
nor a mistyped flag waits for it.
"""

import importlib
import os
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment import console

# Those with `as` are not used here, but users import them from here.
from experiment.prediction_settings import PROGRAM, Settings, parse_arguments
from experiment.prediction_settings import WITHOUT_EFFECT as WITHOUT_EFFECT
from experiment.prediction_settings import make_parser as make_parser
from inference.options import NUM_VIEWS as NUM_VIEWS
from inference.options import Paths, check_file_to_write, find_model
from learning.processes import StopSignals
from storage.files import printable

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from imaging.prepare import Preprocessor

MAX_ROWS_PRINTED = 20  # where there is a file that has them all
MARK = " *"  # after a predicted class that is not the most probable one
WHY_MARKED = (
    "another class is more probable, the first in the last column. Classes are predicted before "
    "calibration, when a model trained on balanced classes takes all to be equally common."
)
MAX_PATH_WIDTH = 60  # characters of the column of paths in the printed table; longer ones stick out
MOST_ROWS_PRINTED, WIDEST_PATH = MAX_ROWS_PRINTED, MAX_PATH_WIDTH  # their former names
SUFFIXES = {"output": (".csv", ".json"), "features": (".npz",), "export": (".onnx",)}
# Public names of this module that need torch: imported from these modules when first used.
LATE_NAMES = {
    "inference.ensemble": ("AIM", "BATCHES_AHEAD", "Ensemble", "predict_batches"),
    "inference.files": ("find_files",),
    "inference.explain": ("SMALLEST_MAP", "gradcam"),
    "inference.features": ("extract_features",),
    "inference.export": ("ONNX_PACKAGES", "export_onnx"),
}
__all__ = ["main", "predict", *(name for names in LATE_NAMES.values() for name in names)]


def __getattr__(name: str) -> Any:
    """Returns a name of `LATE_NAMES`; Python calls this for names that the module does not have."""
    for module, names in LATE_NAMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    """Returns a table of what trained models predict, a row for each image.

    Its columns are `path`; `class`, that of the highest probability before calibration, and its
    calibrated `probability`; `most_probable`, the class whose calibrated probability is highest;
    these by class as `prob_<class>`; and a `flag_<name>` for each threshold, where that of a
    malignant class implies `malignant`. Files that cannot be read have a warning and no row.

    Parameters
    ----------
    model : a `model.pth`, or a folder with one, or several, whose probabilities are averaged
    images : files, folders, lists and tables, as `inference.files.find_files` describes
    output : a .csv or .json file for the table as well, written whole or not at all
    tta : how many of the 8 flips and quarter-turns of an image raw probabilities are averaged over;
        1 is the image as it is, 2 adds its mirror image, 4 all flips
    gradcam : a folder for a figure of each image beside its `gradcam` for the predicted class
    thresholds : by name of a class, `malignant` (those counted as such) or `melanoma` (all classes
        of it), the calibrated probability from which an image is flagged. None: those chosen in
        training for a sensitivity of 95 %, with a warning for several models or views
    preprocessors, device, precision, batch_size : as in training; None is CUDA if it is available
    num_workers : threads that decode, None for one a core

    Raises FileNotFoundError for what does not exist, ValueError for values out of range, thresholds
    of no class, a folder of several models, models that do not fit together or the preprocessors.
    """
    import pandas as pd

    from inference.ensemble import predict_batches

    batches = predict_batches(
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
    )
    tables, problems = zip(*batches, strict=True)
    if unreadable := [problem for of_batch in problems for problem in of_batch]:
        words = f"{len(unreadable)} images cannot be read: {'; '.join(unreadable)}"
        warnings.warn(words, stacklevel=2)
    return pd.concat([t for t in tables if len(t) > 0] or tables[:1], ignore_index=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 when an image could not be read.

    An interruption ends in one line, with status 130 for SIGINT (Ctrl-C) and 143 for SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = parse_arguments(argv)
    if_stopped = "nothing was written"
    if settings.evaluate is not None:
        if_stopped = "repeat the command without --overwrite to evaluate the remaining models"
    elif settings.gradcam is not None:
        if_stopped = f"the overlays drawn so far are in {settings.gradcam}"
    too_large = f"out of memory with --batch_size {settings.batch_size}; try a smaller one"
    with StopSignals(at_once=True):
        return console.exit_status(
            PROGRAM,
            lambda: run(settings, command=shlex.join(["python", PROGRAM, *argv])),
            advice=lambda error: too_large if console.is_out_of_memory(error) else None,
            if_stopped=if_stopped,
        )


def run(settings: Settings, command: str = "") -> int:
    """Does what the mode is for: by default predicts and prints; returns the exit status."""
    settings = replace(settings, model=tuple(map(find_model, settings.model)))
    _check_nothing_is_lost(settings)
    if settings.evaluate is not None:
        return _evaluate_and_print(settings, settings.evaluate, command)
    if settings.features is not None:
        return _write_features(settings, settings.features)
    if settings.export is None:
        return _predict_and_print(settings)
    from inference.export import export_onnx

    export_onnx(settings.model[0], settings.export)
    print(f"{settings.export}: same logits in onnxruntime as in PyTorch")
    return 0


def _check_nothing_is_lost(settings: Settings) -> None:
    """Raises ValueError before the work is done when a file or an overlay would be lost."""
    for path, suffixes in ((getattr(settings, name), each) for name, each in SUFFIXES.items()):
        if path is None:
            continue
        check_file_to_write(path, suffixes)
        read = [other for other in (*settings.model, *settings.images) if os.path.exists(other)]
        if os.path.exists(path) and any(os.path.samefile(path, other) for other in read):
            raise ValueError(f"{path} is also an input; choose another name")
        if os.path.lexists(path) and not settings.overwrite:
            way = "replace it with --overwrite, or choose another name"
            raise ValueError(f"{path} already exists; {way}")
    folder = settings.gradcam
    if folder is None or settings.overwrite or not os.path.isdir(folder):
        return
    from inference.explain import overlay_name
    from inference.files import find_files

    existing = set(os.listdir(folder))
    overlays = [n for n in map(overlay_name, find_files(settings.images)) if n in existing]
    if overlays:
        raise ValueError(
            f"{folder} already has overlays of {len(overlays)} of these images, such as "
            f"{overlays[0]}; replace them with --overwrite, or choose another folder"
        )


def _evaluate_and_print(settings: Settings, save_dir: str, command: str) -> int:
    from experiment.external import EvaluationSettings, evaluate_folder

    same = (
        "labels_csv", "label_column", "id_column", "class_names", "class_map", "unlabelled",
        "device", "precision", "batch_size", "num_workers",
    )  # fmt: skip
    comparison, unreadable = evaluate_folder(
        settings.model,
        settings.images[0],
        save_dir,
        EvaluationSettings(**{name: getattr(settings, name) for name in same}),
        overwrite=settings.overwrite,
        command=command,
    )
    for problem in unreadable:
        console.print_message(PROGRAM, "warning", problem)
    columns = ["model", "precision", "recall", "balanced_accuracy"]
    print(comparison[columns].to_string(index=False, float_format="{:.3f}".format))
    print(f"\nEverything is in {save_dir}; start with {save_dir}/report.html.")
    return 1 if unreadable else 0


def _write_features(settings: Settings, output: str) -> int:
    from inference.features import save_features

    names = ("device", "precision", "batch_size", "num_workers")
    options = {name: getattr(settings, name) for name in names}
    shape, unreadable = save_features(output, settings.model[0], settings.images, **options)
    for problem in unreadable:
        console.print_message(PROGRAM, "warning", problem)
    print(f"{output}: {shape[1]:,} features of {shape[0]:,} images")
    return 1 if unreadable else 0


def _predict_and_print(settings: Settings) -> int:
    from inference.ensemble import predict_batches
    from learning.hardware import choose_device, name_of_precision, resolve_precision

    printer = _Printer(settings.top_k, None if settings.output is None else MAX_ROWS_PRINTED)
    num_images, num_unreadable, num_marked = 0, 0, 0
    num_flagged: Counter[Any] = Counter()
    same = ("output", "tta", "gradcam", "device", "precision", "batch_size", "num_workers")
    options = {name: getattr(settings, name) for name in same}
    batches = predict_batches(
        settings.model, settings.images, thresholds=settings.threshold, **options
    )
    with closing(batches):  # or an interruption could leave its temporary file
        for table, unreadable in batches:
            printer.print(table, unreadable)
            num_images += len(table)
            num_unreadable += len(unreadable)
            num_marked += int((table["class"] != table["most_probable"]).sum())
            num_flagged.update(table.filter(regex="^flag_").sum().to_dict())
    if num_images > printer.num_printed:
        print(f"... and {num_images - printer.num_printed:,} more")
    if num_marked > 0:
        print(f"\n{MARK.strip()} {num_marked:,} of {num_images:,} images: {WHY_MARKED}")
    summary = [f"{num_images:,} images"]
    if num_flagged:
        counts = (f"{_shown_name(column)} {number:,}" for column, number in num_flagged.items())
        summary.append(f"flagged: {', '.join(counts)}")
    if num_unreadable > 0:
        summary.append(f"could not be read: {num_unreadable:,}")
    dtype = resolve_precision(settings.precision, choose_device(settings.device))
    summary.append(f"precision {name_of_precision(dtype)}")
    print(f"\n{'; '.join(summary)}")
    return 1 if num_unreadable > 0 else 0


class _Printer:
    """Prints tables as one, in columns as wide as the first of them needs."""

    def __init__(self, top_k: int, max_rows: int | None) -> None:
        self.top_k = top_k
        self.max_rows = max_rows
        self.num_printed = 0
        self.widths: list[int] = []

    def print(self, table: "pd.DataFrame", unreadable: Sequence[str]) -> None:
        """Prints a warning for each unreadable file, and the rows; both beside a progress bar."""
        from tqdm import tqdm

        for problem in unreadable:
            tqdm.write(f"{PROGRAM}: warning: {console.in_one_line(problem)}", file=sys.stderr)
        if self.max_rows is not None:
            table = table.head(self.max_rows - self.num_printed)
        cells = [self._cells(row) for row in table.to_dict("records")]
        rows = [list(row.values()) for row in cells]
        if self.num_printed == 0 and rows:
            rows.insert(0, list(cells[0]))
            self.widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            self.widths[0] = min(self.widths[0], MAX_PATH_WIDTH)
        for row in rows:
            tqdm.write("  ".join(map(str.ljust, row, self.widths)).rstrip())
        self.num_printed += len(table)

    def _cells(self, row: dict[Any, Any]) -> dict[str, str]:
        """Returns what is printed of an image, by heading."""
        predicted = f"{printable(row['class'])} {row['probability']:.3f}"
        if row["class"] != row["most_probable"]:
            predicted += MARK
        cells = {"image": printable(row["path"]), "predicted class": predicted}
        flags = [name for name in row if name.startswith("flag_")]
        if flags:
            cells["flags"] = ", ".join(_shown_name(name) for name in flags if row[name]) or "-"
        ranked = sorted((n for n in row if n.startswith("prob_")), key=lambda name: -row[name])
        probabilities = (f"{_shown_name(name)} {row[name]:.3f}" for name in ranked[: self.top_k])
        return cells | {"most probable classes": ", ".join(probabilities)}


def _shown_name(column: str) -> str:
    """Returns what a column `prob_<name>` or `flag_<name>` is about."""
    return printable(column.partition("_")[2])


if __name__ == "__main__":
    console.start(main)
