"""Trained models on new images, and what they looked at: a command and a function.

    python predict.py --model models/resnet_finetuned/model.pth IMAGE_OR_FOLDER...

As in train_models.py, what imports torch is imported where it is needed: `--help` and a mistyped
flag should not wait for it.
"""

import argparse
import importlib
import os
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.console import (
    Parser,
    check_flags_have_effect,
    exit_status,
    given_flags,
    in_one_line,
    is_out_of_memory,
    noting,
    number_type,
    print_message,
    start,
    with_underscores,
)
from inference.options import NUM_VIEWS, Paths, check_file_to_write
from learning.processes import StopSignals
from storage.files import printable

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from imaging.prepare import Preprocessor
    from inference.ensemble import AIM, BATCHES_AHEAD, Ensemble, find_files, predict_batches
    from inference.explain import SMALLEST_MAP, gradcam
    from inference.export import ONNX_PACKAGES, export_onnx

__all__ = [
    "AIM",
    "BATCHES_AHEAD",
    "ONNX_PACKAGES",
    "SMALLEST_MAP",
    "Ensemble",
    "export_onnx",
    "find_files",
    "gradcam",
    "main",
    "predict",
    "predict_batches",
]

PROGRAM = "predict.py"
MOST_ROWS_PRINTED = 20  # where there is a file that has them all
WIDEST_PATH = 60  # characters that the printed table leaves for paths; longer ones stick out
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
# The names above that this module has from elsewhere: where they need torch, imported when first
# asked for.
LATE_NAMES = {
    "inference.ensemble": {"AIM", "BATCHES_AHEAD", "Ensemble", "find_files", "predict_batches"},
    "inference.explain": {"SMALLEST_MAP", "gradcam"},
    "inference.export": {"ONNX_PACKAGES", "export_onnx"},
}


def __getattr__(name: str) -> Any:
    """Returns a name of `LATE_NAMES`; Python calls it for what the module does not have."""
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

    from inference.ensemble import predict_batches

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

    def advice(error: RuntimeError) -> str | None:
        if is_out_of_memory(error):
            return f"out of memory with --batch_size {settings.batch_size}; try a smaller one"
        return None

    with StopSignals(at_once=True):
        return exit_status(
            PROGRAM,
            lambda: run(settings, command=shlex.join(["python", PROGRAM, *argv])),
            advice=advice,
            if_stopped="nothing was written",
        )


def run(settings: Settings, command: str = "") -> int:
    """Exports the model, or predicts and prints; gives the exit status."""
    _check_nothing_is_lost(settings)
    if settings.export is not None:
        from inference.export import export_onnx

        export_onnx(settings.model[0], settings.export)
        print(f"{settings.export}: gives the same logits in onnxruntime as in PyTorch")
        return 0
    if settings.evaluate is not None:
        with noting("the same command goes on with the models that are left, without --overwrite"):
            return _evaluate_and_print(settings, command)
    if settings.gradcam is not None:
        with noting(f"the overlays drawn so far are in {settings.gradcam}"):
            return _predict_and_print(settings)
    return _predict_and_print(settings)


def _check_nothing_is_lost(settings: Settings) -> None:
    """Raises before the work is done when a file would be written over without --overwrite."""
    for path, suffixes in ((settings.output, (".csv", ".json")), (settings.export, (".onnx",))):
        if path is None:
            continue
        check_file_to_write(path, suffixes)
        if any(_is_same_file(path, other) for other in (*settings.model, *settings.images)):
            raise ValueError(f"{path} is to be read as well; choose another name")
        if os.path.lexists(path) and not settings.overwrite:
            raise ValueError(
                f"{path} exists and would be lost; --overwrite replaces it, or choose another name"
            )
    if settings.gradcam is not None and not settings.overwrite:
        _check_no_overlay_is_lost(settings.gradcam, settings.images)


def _check_no_overlay_is_lost(folder: str, images: Sequence[str]) -> None:
    from inference.ensemble import find_files
    from inference.explain import overlay_name

    if not os.path.isdir(folder):
        return
    existing = set(os.listdir(folder))
    overlays = [name for name in map(overlay_name, find_files(images)) if name in existing]
    if overlays:
        raise ValueError(
            f"{folder} has overlays of {len(overlays)} of these images, such as {overlays[0]}, "
            "which would be lost; --overwrite replaces them, or choose another folder"
        )


def _is_same_file(path: str, other: str) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def _evaluate_and_print(settings: Settings, command: str) -> int:
    from experiment.results import EvaluationSettings, evaluate_folder

    comparison, unreadable = evaluate_folder(
        settings.model,
        settings.images[0],
        settings.evaluate,
        EvaluationSettings(
            labels_csv=settings.labels_csv,
            label_column=settings.label_column,
            device=settings.device,
            precision=settings.precision,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
        ),
        overwrite=settings.overwrite,
        command=command,
    )
    for problem in unreadable:
        print_message(PROGRAM, "warning", problem)
    columns = ["model", "precision", "recall", "balanced_accuracy"]
    print(comparison[columns].to_string(index=False, float_format="{:.3f}".format))
    print(f"\nEverything is in {settings.evaluate}; begin with {settings.evaluate}/report.html.")
    return 1 if unreadable else 0


def _predict_and_print(settings: Settings) -> int:
    from tqdm import tqdm

    from inference.ensemble import predict_batches
    from learning.hardware import choose_device, name_of_precision, resolve_precision

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
        counts = (f"{printable(flag)} {number:,}" for flag, number in num_flagged.items())
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
        probabilities = [f"{printable(name)} {row[f'prob_{name}']:.3f}" for name in ranked]
        flagged = [printable(name) for name in flags if row[f"flag_{name}"]]
        cells = [printable(row["path"]), printable(row["class"]), ", ".join(probabilities)]
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


if __name__ == "__main__":
    start(main)
