"""What models are worth on labelled images: assessed, pictured, compared, and left in a folder.

After training this is done for the test split (`train_models.py`), and later for other images
(`predict.py --evaluate`), so that both leave the same.
"""

import contextlib
import json
import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
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

from audit import worst_pairs
from dataset import (
    METADATA_COLUMNS,
    DatasetBuilder,
    LesionDataset,
    create_dataloaders,
    read_image,
    to_float,
)
from evaluation import (
    assess,
    compare,
    match_classes,
    most_confident_mistakes,
    typical_examples,
)
from files import lock, write_atomically, write_text
from models import LesionClassifier, count_parameters, load_model
from predict import calibration_of, gradcam
from report import write_report
from training import Evaluation, evaluate
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

COMPARED = ("precision", "recall", "f1", "accuracy", "balanced_accuracy")


# Loading workers of a process that was killed hold its lock until they notice, 5 seconds at most.
SECONDS_TO_WAIT = 6


@contextlib.contextmanager
def claim(save_dir: str | Path) -> Iterator[None]:
    """Keeps other runs out of `save_dir`, which is made, as long as the block lasts.

    The claim ends with its process, however that ends. Raises ValueError when another process has
    it, and says which.
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
        try:
            write_text(owner, f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            yield
        finally:
            owner.unlink(missing_ok=True)


def _describe_owner(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # it has the lock, and has not come to writing this yet
        return "another process"


def leave_results(
    folder: Path,
    about: dict[str, Any],
    model: LesionClassifier,
    info: dict[str, Any],
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
    classes, groups = info["classes"], dataset.metadata["group"]
    y_true, y_prob = evaluation.labels, evaluation.probabilities
    calibration = calibration_of(info)
    own = [name for name in METADATA_COLUMNS if name != "source_split"]
    found = assess(
        y_true,
        y_prob,
        classes,
        calibration,
        info.get("thresholds", {}),
        malignant=info.get("malignant_classes", []),
        groups=groups,
        columns=dataset.metadata.drop(columns=own, errors="ignore"),
        seed=seed,
    )
    found["test"]["loss"] = evaluation.loss
    y_pred, calibrated = y_prob.argmax(axis=1), calibration.apply(y_prob)
    folder.mkdir(parents=True, exist_ok=True)
    table = _predictions(dataset.metadata["path"], y_true, y_pred, calibrated, classes)
    with write_atomically(folder / "predictions.csv") as temporary:
        table.to_csv(temporary, index=False, errors="surrogateescape")
    _picture_figures(folder, about["model"], found, y_true, calibrated, classes)
    _picture_images(folder, about["model"], model, dataset, table, (y_true, calibrated, y_pred))
    text = json.dumps(about | found, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / "metrics.json", text + "\n")


def _predictions(
    paths: pd.Series,
    y_true: np.ndarray,
    y_pred: np.ndarray,
    calibrated: np.ndarray,
    classes: Sequence[str],
) -> pd.DataFrame:
    columns: dict[str, Any] = {
        "path": paths.to_numpy(),
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
    """Writes `comparison.csv` and `comparison.png` from what `leave_results` left for each model.

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
    with write_atomically(save_dir / "comparison.csv") as temporary:
        comparison.to_csv(temporary, index=False)
    plot_model_comparison(comparison, save_path=save_dir / "comparison.png")
    return comparison


def _comparison_row(report: dict[str, Any]) -> dict[str, Any]:
    row = {"model": report["model"]}
    for name in COMPARED:
        row[name] = report["test"][name]
        row[f"{name}_low"], row[f"{name}_high"] = report["test_intervals"][name]
    return row | {n: report[n] for n in ("training_time", "parameters", "trainable_parameters")}


def _read_decisions(folder: Path, classes: Sequence[str]) -> np.ndarray:
    table = pd.read_csv(folder / "predictions.csv", keep_default_na=False, dtype=str)
    labels = {name: label for label, name in enumerate(classes)}
    return table["predicted_class"].map(labels).to_numpy()


def leave_audit(save_dir: Path, findings: pd.DataFrame) -> None:
    """Writes `audit.csv`; a picture of an earlier audit goes."""
    save_dir.mkdir(parents=True, exist_ok=True)
    (save_dir / "audit.png").unlink(missing_ok=True)
    table = findings.copy()
    for name in ("images", "classes"):
        table[name] = table[name].map("; ".join)
    with write_atomically(save_dir / "audit.csv") as temporary:
        table.to_csv(temporary, index=False, errors="surrogateescape")


def picture_audit(save_dir: Path, findings: pd.DataFrame, data_dir: str | Path) -> None:
    """Draws `audit.png`, if there are pairs to show."""
    pairs = worst_pairs(findings)
    if len(pairs) > 0:
        images = [
            [read_image(Path(data_dir) / path, longest_side=400) for path in two]
            for two in pairs["images"]
        ]
        plot_pairs(pairs, images, save_path=save_dir / "audit.png")


def environment() -> dict[str, Any]:
    """When and with what this runs: versions of the packages, machine, GPU, threads."""
    packages = (torch, torchvision, np, pd, PIL, sklearn, matplotlib)
    versions = {package.__name__: package.__version__ for package in packages}
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version()} | versions,
        "machine": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


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
    command: str = "",
) -> tuple[pd.DataFrame, list[str]]:
    """Measures trained models on labelled images that they have never seen.

    `models` are files `model.pth`; the images and their labels are found as by `DatasetBuilder`,
    and their classes must be among the models', whatever case, hyphens and plurals are. Leaves in
    `save_dir` what training leaves: figures, tables and `report.html`. The thresholds are those
    that the models bring. Gives the comparison, and the files that cannot be read.

    Raises ValueError for models of different classes or sizes or with preprocessors of their own,
    for a class of the images that the models do not know, and for a `save_dir` in use.
    """
    save_dir = Path(save_dir)
    loaded = {name: load_model(path) for name, path in _named(models).items()}
    first = next(iter(loaded.values()))[1]
    for name, (_, info) in loaded.items():
        _check_like_first(name, info, first)
    with tempfile.TemporaryDirectory() as cache_dir, contextlib.ExitStack() as claimed:
        builder = DatasetBuilder(
            data_dir,
            image_size=first["image_size"],
            cache_dir=cache_dir,
            num_workers=num_workers,
            seed=seed,
            labels_csv=labels_csv,
            label_column=label_column,
            skip_unreadable=True,
        )
        findings = builder.audit()
        splits, metadata = builder.build(splits={"test": 1.0})
        dataset = _with_labels_of(splits["test"], first["classes"])
        loader = create_dataloaders({"test": dataset}, batch_size, device=device)["test"]
        claimed.enter_context(claim(save_dir))
        config = {"command": command, "settings": {"data_dir": str(data_dir)}} | environment()
        write_text(save_dir / "config.json", json.dumps(config, indent=2) + "\n")
        with write_atomically(save_dir / "splits.csv") as temporary:
            metadata.to_csv(temporary, index=False, errors="surrogateescape")
        leave_audit(save_dir, findings)
        picture_audit(save_dir, findings, data_dir)
        for name, (model, info) in loaded.items():
            evaluation = evaluate(model, loader, device=loader.device, precision=precision)
            about = {
                "model": name,
                "classes": info["classes"],
                "training_time": None,
                "parameters": count_parameters(model),
                "trainable_parameters": count_parameters(model, trainable_only=True),
            }
            leave_results(save_dir / name, about, model, info, evaluation, dataset, seed=seed)
        comparison = compare_models(save_dir, list(loaded), dataset, seed=seed)
        write_report(save_dir)
    unreadable = findings["images"][findings["kind"] == "unreadable"]
    return comparison, [f"{path}: cannot be read" for paths in unreadable for path in paths]


def _named(models: Sequence[str | Path]) -> dict[str, Path]:
    """A name for each model: its folder's, which is what the driver calls it."""
    named: dict[str, Path] = {}
    for path in map(Path, models):
        name = path.resolve().parent.name or path.stem
        number = sum(other == name or other.startswith(f"{name} (") for other in named)
        named[f"{name} ({number + 1})" if number else name] = path
    return named


def _check_like_first(name: str, info: dict[str, Any], first: dict[str, Any]) -> None:
    if info["preprocessors"]:
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
    label_of = {}
    for name in dataset.classes:
        try:
            label_of[name] = match_classes(classes, [name])[0]
        except ValueError as error:
            raise ValueError(
                f"the images have a class {name}, the model only {', '.join(classes)}"
            ) from error
    metadata = dataset.metadata.assign(label=dataset.metadata["class"].map(label_of))
    return LesionDataset(dataset.array_path, dataset.rows, metadata, classes)
