"""What models are worth on labelled images: assessed, pictured, compared, and left in a folder.

After training this is done for the test split (`train_models.py`), and later for other images
(`predict.py --evaluate`), so that both leave the same.
"""

import contextlib
import hashlib
import json
import os
import platform
import socket
import tempfile
import time
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import PIL
import sklearn
import torch
import torchvision
from filelock import Timeout

from dataset import (
    METADATA_COLUMNS,
    DatasetBuilder,
    LesionDataset,
    create_dataloaders,
    read_image,
    to_float,
)
from evaluation import (
    compare,
    counted_as,
    evaluate_predictions,
    match_classes,
    most_confident_mistakes,
    screening_warnings,
    typical_examples,
)
from experiment.report import write_report
from experiment.run_folder import EVALUATION, TRAINING, kind_of_run, read_config
from imaging.audit import worst_pairs
from imaging.lesions import normalize_name
from inference.explain import gradcam
from models import LesionClassifier, ModelInfo, count_parameters, load_model
from storage.files import (
    join_names,
    lock,
    name_column,
    read_csv,
    remove_leftovers,
    write_csv,
    write_json,
    write_text,
)
from training import (
    Evaluation,
    choose_device,
    evaluate,
    name_of_precision,
    resolve_precision,
)
from visualizations import (
    plot_class_metrics,
    plot_confusion_matrix,
    plot_gradcams,
    plot_mistakes,
    plot_model_comparison,
    plot_pairs,
    plot_reliability,
    plot_roc_pr_curves,
)

# What stands in the folder of a run, what an evaluation adds for a model, and training alone.
RUN_FILES = (
    "config.json", "splits.csv", "audit.csv", "audit.png", "comparison.csv", "comparison.png",
    "report.html",
)  # fmt: skip
MODEL_FILES = (
    "metrics.json", "predictions.csv", "confusion_matrix.png", "class_metrics.png",
    "roc_pr_curves.png", "reliability.png", "mistakes.png", "gradcam.png",
)  # fmt: skip
TRAINING_FILES = ("model.pth", "last.pth", "history.csv")
# What figures depend on, in the words of a message about figures of something else.
OTHERS = {
    "images": "other images or labels",
    "classes": "other classes",
    "model": "another model.pth",
    "precision": "another precision",
    "seed": "another seed",
}
COMPARED = ("precision", "recall", "f1", "accuracy", "balanced_accuracy")


# Loading workers of a process that was killed hold its lock until they notice, 5 seconds at most.
SECONDS_TO_WAIT = 6


@contextlib.contextmanager
def claim(save_dir: str | Path) -> Iterator[None]:
    """Keeps other runs out of `save_dir`, which is made, as long as the block lasts.

    What killed runs left half written there and in the models' folders is removed. The claim ends
    with its process, however that ends. Raises ValueError when another process has it, and says
    which.
    """
    save_dir = Path(save_dir)
    save_dir.mkdir(parents=True, exist_ok=True)
    owner = save_dir / ".owner"
    try:
        held = lock(save_dir / ".lock").acquire(timeout=SECONDS_TO_WAIT)
    except Timeout:
        raise ValueError(
            f"{save_dir} is in use by {_describe_owner(owner)}; wait for it, or choose another "
            "folder"
        ) from None
    with held:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        for folder in (save_dir, *_model_folders(save_dir)):
            remove_leftovers(folder)
        try:
            write_text(owner, f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            yield
        finally:
            owner.unlink(missing_ok=True)


def _model_folders(save_dir: Path) -> list[Path]:
    """Returns the folders in `save_dir` that a run on it writes to.

    One with a lock of its own is another run's, such as `models/demo` in `models`.
    """
    return [
        path
        for path in save_dir.iterdir()
        if path.is_dir()
        and not path.is_symlink()
        and not (path / ".lock").exists()
        and os.access(path, os.R_OK | os.W_OK | os.X_OK)
    ]


def _describe_owner(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # it has the lock, and has not come to writing this yet
        return "another process"


def save_results(
    folder: Path,
    about: dict[str, Any],
    model: LesionClassifier,
    info: ModelInfo,
    evaluation: Evaluation,
    dataset: LesionDataset,
    *,
    seed: int = 42,
) -> None:
    """Writes what a model's predictions on labelled images are worth into `folder`.

    `model` and `info` are what `load_model` gives, `evaluation` what `evaluate` gives for
    `dataset`, whose labels are the model's; `about` comes first in `metrics.json`. That file is
    written last, after `predictions.csv` and the figures: where it stands, all is there.
    """
    classes, groups = info.classes, dataset.metadata["group"]
    y_true, y_prob = evaluation.labels, evaluation.probabilities
    calibration = info.calibration
    own = [name for name in METADATA_COLUMNS if name != "source_split"]
    found = evaluate_predictions(
        y_true,
        y_prob,
        classes,
        calibration,
        info.thresholds,
        malignant=info.malignant_classes,
        unknown=info.unknown_classes,
        groups=groups,
        columns=dataset.metadata.drop(columns=own, errors="ignore"),
        seed=seed,
    )
    found["test"]["loss"] = evaluation.loss
    y_pred, calibrated = y_prob.argmax(axis=1), calibration.apply(y_prob)
    folder.mkdir(parents=True, exist_ok=True)
    table = _predictions(dataset.metadata["path"], y_true, y_pred, calibrated, classes)
    write_csv(table, folder / "predictions.csv")
    _picture_figures(folder, about["model"], found, y_true, calibrated, classes)
    _picture_images(folder, about["model"], model, dataset, table, (y_true, calibrated, y_pred))
    write_json(folder / "metrics.json", about | found)


def _predictions(
    paths: pd.Series,
    y_true: np.ndarray,
    y_pred: np.ndarray,
    calibrated: np.ndarray,
    classes: Sequence[str],
) -> pd.DataFrame:
    columns: dict[str, Any] = {
        "path": name_column(paths.tolist()),
        "true_class": [classes[label] for label in y_true],
        "predicted_class": [classes[label] for label in y_pred],
    }
    for label, name in enumerate(classes):
        columns[f"prob_{name}"] = calibrated[:, label]
    return pd.DataFrame(columns)


def _picture_figures(
    folder: Path,
    name: str,
    found: dict[str, Any],
    y_true: np.ndarray,
    calibrated: np.ndarray,
    classes: Sequence[str],
) -> None:
    plot_confusion_matrix(
        np.array(found["test"]["confusion_matrix"]),
        classes,
        title=f"{name}, test images",
        save_path=folder / "confusion_matrix.png",
    )
    plot_class_metrics(
        found["test"]["per_class"],
        found["test_intervals"]["per_class"],
        title=name,
        save_path=folder / "class_metrics.png",
    )
    plot_roc_pr_curves(
        y_true, calibrated, classes, title=name, save_path=folder / "roc_pr_curves.png"
    )
    plot_reliability(
        found["calibration"]["before"],
        found["calibration"]["after"],
        title=name,
        save_path=folder / "reliability.png",
    )


def _picture_images(
    folder: Path,
    name: str,
    model: LesionClassifier,
    dataset: LesionDataset,
    table: pd.DataFrame,
    outcome: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """The most confident mistakes, and what the model looked at where it was right and wrong."""
    y_pred, calibrated = outcome[2], outcome[1]
    true, predicted = (table[column].to_numpy() for column in ("true_class", "predicted_class"))
    mistakes = most_confident_mistakes(*outcome)
    (folder / "mistakes.png").unlink(missing_ok=True)
    if len(mistakes) > 0:
        plot_mistakes(
            dataset.gather(mistakes),
            true[mistakes],
            predicted[mistakes],
            calibrated[mistakes, y_pred[mistakes]],
            title=name,
            save_path=folder / "mistakes.png",
        )
    examples = typical_examples(*outcome)
    images = dataset.gather(examples)
    device = next(model.parameters()).device
    pixels = to_float(torch.from_numpy(images).to(device))
    plot_gradcams(
        images,
        gradcam(model, pixels, torch.from_numpy(y_pred[examples])),
        true[examples],
        predicted[examples],
        title=name,
        save_path=folder / "gradcam.png",
    )


def compare_models(
    save_dir: Path, models: Sequence[str], dataset: LesionDataset, *, seed: int = 42
) -> pd.DataFrame:
    """Writes `comparison.csv` and `comparison.png` from what `save_results` left for each model.

    `dataset` has the images that all of them were measured on. Beside each model's figures the
    table has how far its balanced accuracy is behind that of the best, by paired bootstrap.
    """
    reports = [
        json.loads((save_dir / name / "metrics.json").read_text(encoding="utf-8"))
        for name in models
    ]
    rows = [_comparison_row(report) for report in reports]
    best = max(rows, key=lambda row: row["balanced_accuracy"])["model"]
    predicted = {name: _read_decisions(save_dir / name, dataset.classes) for name in models}
    for row in rows:
        decisions = (predicted[best], predicted[row["model"]])
        gap = compare(dataset.labels, *decisions, dataset.metadata["group"], seed=seed)
        gap = gap["balanced_accuracy"]
        row["behind_best"] = gap["difference"]
        # The best is not behind itself, whatever other images would show.
        ends = [0.0, 0.0] if row["model"] == best else gap["interval"]
        row["behind_best_low"], row["behind_best_high"] = ends
    comparison = pd.DataFrame(rows)
    write_csv(comparison, save_dir / "comparison.csv")
    plot_model_comparison(comparison, save_path=save_dir / "comparison.png")
    return comparison


def _comparison_row(report: dict[str, Any]) -> dict[str, Any]:
    row = {"model": report["model"]}
    for name in COMPARED:
        row[name] = report["test"][name]
        row[f"{name}_low"], row[f"{name}_high"] = report["test_intervals"][name]
    return row | {n: report[n] for n in ("training_time", "parameters", "trainable_parameters")}


def _read_decisions(folder: Path, classes: Sequence[str]) -> np.ndarray:
    table = read_csv(folder / "predictions.csv")
    labels = {name: label for label, name in enumerate(classes)}
    return table["predicted_class"].map(labels).to_numpy()


def save_audit(save_dir: Path, findings: pd.DataFrame) -> None:
    """Writes `audit.csv`; a picture of an earlier audit goes."""
    save_dir.mkdir(parents=True, exist_ok=True)
    (save_dir / "audit.png").unlink(missing_ok=True)
    table = findings.copy()
    for name in ("images", "classes"):
        table[name] = table[name].map(join_names)
    write_csv(table, save_dir / "audit.csv")


def plot_audit(save_dir: Path, findings: pd.DataFrame, data_dir: str | Path) -> None:
    """Draws `audit.png`, if there are pairs to show."""
    pairs = worst_pairs(findings)
    if len(pairs) > 0:
        images = [
            [read_image(Path(data_dir) / path, longest_side=400) for path in two]
            for two in pairs["images"]
        ]
        plot_pairs(pairs, images, save_path=save_dir / "audit.png")


def environment(
    device: torch.device | str | None = None, precision: str = "auto"
) -> dict[str, Any]:
    """When and with what this runs: versions of the packages, machine, GPU, threads.

    With a `device` also the precision, which is what `resolve_precision` makes of that asked for.
    """
    packages = (torch, torchvision, np, pd, PIL, sklearn, matplotlib)
    versions = {package.__name__: package.__version__ for package in packages}
    about = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version()} | versions,
        "machine": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
    if device is not None:
        about["precision"] = name_of_precision(resolve_precision(precision, choose_device(device)))
    return about


# ---------------------------------------------------------------------------- other images


def evaluate_folder(
    models: Sequence[str | Path],
    data_dir: str | Path,
    save_dir: str | Path,
    *,
    labels_csv: str | Path | None = None,
    label_column: str | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
    batch_size: int = 32,
    num_workers: int | None = None,
    seed: int = 42,
    overwrite: bool = False,
    command: str = "",
) -> tuple[pd.DataFrame, list[str]]:
    """Measures trained models on labelled images that they have never seen.

    `models` are files `model.pth`; the images and their labels are found as by `DatasetBuilder`,
    and their classes must be among the models', by name or by diagnosis, which a warning says.
    Leaves in `save_dir` what training leaves: figures, tables and `report.html`. The thresholds are
    those that the models bring. Gives the comparison, and the files that cannot be read.

    A model that has been measured there on the same images already is passed over, with a warning,
    and other models that have been stay in the comparison. With `overwrite` it is measured again,
    and whatever an evaluation of other images left in `save_dir` is removed.

    Raises ValueError for models of different classes or sizes or with preprocessors of their own,
    for a class of the images that the models do not know, and for a `save_dir` in use, with another
    kind of run in it, or, without `overwrite`, with figures that would be lost.
    """
    save_dir, named = Path(save_dir), _named(models)
    _check_evaluation_folder(save_dir, named, data_dir)
    if (save_dir / ".lock").exists():
        with claim(save_dir):  # to say at once that it is in use, not after the images are prepared
            pass
    device = choose_device(device)
    dtype = resolve_precision(precision, device)
    loaded = {name: load_model(path) for name, path in named.items()}
    first = next(iter(loaded.values()))[1]
    for name, (_, info) in loaded.items():
        _check_like_first(name, info, first)
    with tempfile.TemporaryDirectory() as cache_dir, contextlib.ExitStack() as claimed:
        builder = DatasetBuilder(
            data_dir,
            image_size=first.image_size,
            cache_dir=cache_dir,
            num_workers=num_workers,
            seed=seed,
            labels_csv=labels_csv,
            label_column=label_column,
            skip_unreadable=True,
        )
        runs = _describe_evaluation(named, first["classes"], dtype, seed)
        _measured_before(save_dir, runs, overwrite)  # to raise before the images are prepared
        prepared = builder.prepare()
        findings = builder.audit(prepared=prepared)
        splits, metadata = builder.build(splits={"test": 1.0}, prepared=prepared)
        dataset = _with_labels_of(splits["test"], first.classes)
        _warn_of_screening(first)
        loader = create_dataloaders({"test": dataset}, batch_size, device=device)["test"]
        images = metadata[["path", "class", "content_hash"]].to_numpy().tolist()
        told = {"images": _digest(json.dumps(images).encode())}
        runs = {name: run | told for name, run in runs.items()}
        claimed.enter_context(claim(save_dir))
        _check_evaluation_folder(save_dir, named, data_dir)  # again, as nobody else can write now
        measured = _measured_before(save_dir, runs, overwrite)
        left = [name for name in loaded if name not in measured]
        _remove_results(save_dir, kept=measured)
        if left:
            settings = {"model": list(map(str, models)), "data_dir": str(data_dir)}
            settings |= {"labels_csv": labels_csv and str(labels_csv), "label_column": label_column}
            settings |= {"device": str(device), "precision": precision, "batch_size": batch_size}
            settings |= {"num_workers": num_workers, "seed": seed}
            config = {"kind": EVALUATION, "command": command, "settings": settings}
            config |= {"runs": measured | runs} | environment(loader.device, precision)
            write_text(save_dir / "config.json", json.dumps(config, indent=2) + "\n")
        if len(left) < len(loaded):
            passed_over = ", ".join(name for name in loaded if name in measured)
            warnings.warn(
                f"{save_dir}: {passed_over} measured on these images already and passed over; "
                "--overwrite measures again",
                stacklevel=2,
            )
        write_csv(metadata, save_dir / "splits.csv")
        save_audit(save_dir, findings)
        plot_audit(save_dir, findings, data_dir)
        for name in left:
            model, info = loaded[name]
            evaluation = evaluate(model, loader, device=loader.device, precision=precision)
            about = {
                "model": name,
                "precision": config["precision"],
                "classes": info.classes,
                "training_time": None,
                "parameters": count_parameters(model),
                "trainable_parameters": count_parameters(model, trainable_only=True),
            }
            save_results(save_dir / name, about, model, info, evaluation, dataset, seed=seed)
        comparison = compare_models(save_dir, list(measured | runs), dataset, seed=seed)
        write_report(save_dir)
    unreadable = findings["images"][findings["kind"] == "unreadable"]
    return comparison, [f"{path}: cannot be read" for paths in unreadable for path in paths]


def _check_evaluation_folder(save_dir: Path, names: Iterable[str], data_dir: str | Path) -> None:
    """Raises ValueError where an evaluation of models of these names would write over other files.

    An earlier evaluation is none of these.
    """
    folders = [save_dir, *(save_dir / name for name in names)]
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; choose another folder for the evaluation")
        if folder.resolve().is_relative_to(Path(data_dir).resolve()):
            raise ValueError(
                f"{folder} lies in {data_dir}, where its figures would be taken for images of "
                "lesions; choose a folder elsewhere for the evaluation"
            )
    kind = kind_of_run(read_config(save_dir))
    if kind not in (None, EVALUATION):
        raise ValueError(
            f"{save_dir} holds another kind of run ({kind}), which an evaluation would write over; "
            "choose another folder"
        )
    if _belongs_to_training(save_dir):
        raise ValueError(
            f"{save_dir} is the folder of a model in the training run {save_dir.resolve().parent}; "
            "choose another folder for the evaluation"
        )
    files = [*RUN_FILES, *MODEL_FILES, *TRAINING_FILES]
    if kind == EVALUATION:  # what it may have left is its own
        folders, files = folders[1:], ["config.json", *TRAINING_FILES]
    in_the_way = [folder / file for folder in folders for file in files]
    in_the_way += [] if kind == EVALUATION else sorted(save_dir.glob("*/metrics.json"))
    for path in in_the_way:
        if path.exists():
            raise ValueError(f"{path} is not of an evaluation; choose another folder for this one")


def _belongs_to_training(folder: Path) -> bool:
    """Whether a training run in the parent folder writes its model of this name here."""
    folder = folder.resolve()
    try:
        config = read_config(folder.parent)
    except ValueError:  # any program may have a config.json
        return False
    names = {*(config.get("runs") or ()), *(config.get("settings", {}).get("models") or ())}
    return kind_of_run(config) == TRAINING and folder.name in names


def _describe_evaluation(
    named: Mapping[str, Path], classes: Sequence[str], dtype: torch.dtype, seed: int
) -> dict[str, dict[str, Any]]:
    """For each model what its figures depend on, but for the images."""
    told = {"classes": classes, "precision": str(dtype).removeprefix("torch."), "seed": seed}
    return {name: {"model": _digest(path.read_bytes())} | told for name, path in named.items()}


def _digest(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()[:16]


def _measured_before(
    save_dir: Path, runs: Mapping[str, dict[str, Any]], overwrite: bool
) -> dict[str, dict[str, Any]]:
    """The models whose figures can stay in `save_dir`, with what each was measured on.

    Of those in `runs` none can when this is to `overwrite` them. Raises ValueError where, without
    `overwrite`, figures cannot stay beside those of `runs`: those of other images or classes, or of
    something else under the same name.
    """
    any_run = next(iter(runs.values()))
    same_for_all = {what: any_run[what] for what in ("images", "classes") if what in any_run}
    measured = {}
    for folder, before in _evaluated_folders(save_dir).items():
        name = folder.name
        if not (folder / "metrics.json").exists() or (overwrite and name in runs):
            continue
        now = runs.get(name, same_for_all)
        differing = [OTHERS[what] for what in now if before.get(what) != now[what]]
        if differing and not overwrite:
            words = ", ".join(differing) if before else "nothing on record about its images"
            raise ValueError(
                f"{save_dir} holds an evaluation of {name} with {words}, which would be lost; "
                "--overwrite replaces it, or choose another folder"
            )
        if not differing:
            measured[name] = before
    return measured


def _evaluated_folders(save_dir: Path) -> dict[Path, dict[str, Any]]:
    """The folders of the models that an evaluation measured, with what is on record about each."""
    config = read_config(save_dir)
    if kind_of_run(config) != EVALUATION:
        return {}
    runs = config.get("runs")
    if not isinstance(runs, dict):  # written before there was such a record
        runs = {path.parent.name: {} for path in save_dir.glob("*/metrics.json")}
    folders = {
        save_dir / name: run
        for name, run in runs.items()
        if isinstance(run, dict) and Path(name).name == name != ".."
    }
    theirs = ("config.json", *TRAINING_FILES)
    return {
        folder: run
        for folder, run in folders.items()
        if folder.is_dir() and not any((folder / file).exists() for file in theirs)
    }


def _remove_results(save_dir: Path, kept: Container[str]) -> None:
    """Removes what an evaluation left of models that are not `kept`, and what is of all models.

    The figures go first: without them no model counts as measured, should this be interrupted.
    """
    folders = [f for f in _evaluated_folders(save_dir) if f.name not in kept]
    for file in MODEL_FILES:
        for folder in folders:
            (folder / file).unlink(missing_ok=True)
    for folder in folders:
        if not any(folder.iterdir()):
            folder.rmdir()
    for file in ("comparison.csv", "comparison.png", "report.html"):
        (save_dir / file).unlink(missing_ok=True)


def _named(models: Sequence[str | Path]) -> dict[str, Path]:
    """A name for each model: its folder's, which is what the driver calls it."""
    named: dict[str, Path] = {}
    for path in map(Path, models):
        name = path.resolve().parent.name or path.stem
        number = sum(other == name or other.startswith(f"{name} (") for other in named)
        named[f"{name} ({number + 1})" if number else name] = path
    return named


def _check_like_first(name: str, info: ModelInfo, first: ModelInfo) -> None:
    if info.preprocessors:
        raise ValueError(
            f"{name} was trained with preprocessors of its own, which are not known here"
        )
    for what in ("classes", "image_size"):
        if info[what] != first[what]:
            raise ValueError(
                f"{name} has {what} {info[what]}, the first model {first[what]}; evaluate each by "
                "itself"
            )


def _with_labels_of(dataset: LesionDataset, classes: Sequence[str]) -> LesionDataset:
    """The same images, labelled by the numbers that a model gives the classes."""
    label_of = {name: _label_of(name, classes) for name in dataset.classes}
    by_diagnosis = [
        f"{name} as {classes[label]}"
        for name, label in label_of.items()
        if normalize_name(name) != normalize_name(classes[label])
    ]
    if by_diagnosis:
        warnings.warn(
            f"classes of the images that the model has by another name: {', '.join(by_diagnosis)}",
            stacklevel=3,
        )
    metadata = dataset.metadata.assign(label=dataset.metadata["class"].map(label_of))
    inputs = dataset.extra_inputs
    return LesionDataset(dataset.array_path, dataset.rows, metadata, classes, extra_inputs=inputs)


def _label_of(name: str, classes: Sequence[str]) -> int:
    """The number of the one class that is called like this."""
    try:
        labels = match_classes(classes, [name])
    except ValueError as error:
        raise ValueError(
            f"the images have a class {name}, the model only {', '.join(classes)}"
        ) from error
    if len(labels) > 1:
        candidates = ", ".join(classes[label] for label in labels)
        raise ValueError(
            f"the images have a class {name}, which may be several of the model: {candidates}; "
            "name it like one of them"
        )
    return labels[0]


def _warn_of_screening(info: ModelInfo) -> None:
    counted = counted_as(info.classes, info.malignant_classes, info.unknown_classes)
    for message in screening_warnings(counted):
        warnings.warn(message, stacklevel=3)
