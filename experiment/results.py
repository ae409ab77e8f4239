"""Predictions on labelled images → the files of a run: metrics, tables, figures, comparison.

A training run writes them for the test split (`train_models.py`), and an evaluation for other
images (`experiment.external`).
"""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import PIL
import sklearn
import torch
import torchvision

import visualizations
from augmentation import apply_views, example_views
from dataset import METADATA_COLUMNS, LesionDataset, read_image, to_float
from evaluation import (
    compare,
    evaluate_predictions,
    most_confident_mistakes,
    typical_examples,
)
from evaluation.merging import MergedClasses
from imaging.audit import worst_pairs
from imaging.lesions import is_melanoma
from inference.explain import gradcam
from models import LesionClassifier, ModelInfo, count_parameters
from storage.files import join_names, name_column, read_csv, write_csv, write_json
from training import Evaluation, choose_device, name_of_precision, resolve_precision

MAX_CLASSES_AUGMENTED = 4  # in the figure


def save_results(
    folder: Path,
    model: LesionClassifier,
    info: ModelInfo,
    evaluation: Evaluation,
    dataset: LesionDataset,
    *,
    about: Mapping[str, Any],
    merged: MergedClasses | None = None,
    seed: int = 42,
) -> None:
    """Writes into `folder`, which has the model's name, what its predictions are worth.

    `model` and `info` are as `load_model` returns them, `evaluation` as `evaluate` does for
    `dataset`, whose labels are the model's or, given those, the merged classes. `about` is what
    else `metrics.json` says: the name of the `precision` of the evaluation, and `training_time` in
    seconds. It is written last, after `predictions.csv` and the figures: where it is, all is.
    """
    y_prob = evaluation.probabilities
    calibrated = info.calibration.apply(y_prob)
    explained = y_prob.argmax(axis=1)
    if merged is not None:
        own_prob, y_prob, calibrated = y_prob, merged.merge(y_prob), merged.merge(calibrated)
        explained = merged.strongest_member(own_prob, y_prob.argmax(axis=1))
        evaluation = Evaluation(_loss(evaluation.labels, y_prob), evaluation.labels, y_prob)
        info = merge_info(info, merged)
    own = set(METADATA_COLUMNS) - {"source_split"}
    metrics = evaluate_predictions(
        evaluation.labels,
        y_prob,
        info.classes,
        info.calibration,
        info.thresholds,
        calibrated=None if merged is None else calibrated,
        malignant=info.malignant_classes or [],
        unknown=info.unknown_classes,
        groups=dataset.metadata["group"].tolist(),
        columns=dataset.metadata.drop(columns=list(own), errors="ignore"),
        seed=seed,
    )
    metrics["test"]["loss"] = evaluation.loss
    folder.mkdir(parents=True, exist_ok=True)
    names = np.array(info.classes, dtype=object)
    predictions = {
        "path": name_column(dataset.metadata["path"].tolist()),
        "true_class": names[evaluation.labels],
        "predicted_class": names[y_prob.argmax(axis=1)],
    } | {f"prob_{name}": calibrated[:, label] for label, name in enumerate(names)}
    write_csv(pd.DataFrame(predictions), folder / "predictions.csv")
    plot_metrics(folder, metrics, evaluation.labels, calibrated, info.classes)
    plot_examples(folder, model, dataset, evaluation, calibrated, explained)
    about = {
        "model": folder.name,
        "precision": about["precision"],
        "classes": info.classes,
        "training_time": about.get("training_time"),
        "parameters": count_parameters(model),
        "trainable_parameters": count_parameters(model, trainable_only=True),
    }
    write_json(folder / "metrics.json", about | metrics)


def merge_info(info: ModelInfo, merged: MergedClasses) -> ModelInfo:
    """Returns what a model's info says of its merged classes.

    A class of malignant and other members is unknown. Thresholds stay where the merged classes
    screen for the same, as sums of probabilities do.
    """
    malignant, mixed = merged.joined(info.malignant_classes or [], info.classes)
    unknown, partly = merged.joined(info.unknown_classes or [], info.classes)
    screened = {"malignant"} - ({"malignant"} if mixed or partly else set())
    screened |= {"melanoma"} & {n for n in info.thresholds if _keeps_melanoma(info, merged)}
    is_whole = min(merged.numbers) >= 0
    return replace(
        info,
        classes=list(merged.names),
        bias=[],
        temperature=1.0,
        malignant_classes=malignant,
        unknown_classes=list(dict.fromkeys([*mixed, *unknown, *partly])),
        thresholds={n: t for n, t in info.thresholds.items() if is_whole and n in screened},
    )


def _keeps_melanoma(info: ModelInfo, merged: MergedClasses) -> bool:
    """Returns whether the merged classes of melanoma are those of the model's classes of it."""
    own = [name for name in info.classes if is_melanoma(name)]
    whole, mixed = merged.joined(own, info.classes)
    return not mixed and whole == [name for name in merged.names if is_melanoma(name)]


def _loss(labels: np.ndarray, y_prob: np.ndarray) -> float:
    """Returns the cross-entropy of the labels under merged probabilities."""
    of_labels = y_prob[np.arange(len(y_prob)), labels]
    return float(-np.log(np.maximum(of_labels, np.finfo(np.float32).tiny)).mean())


def plot_metrics(
    folder: Path,
    metrics: Mapping[str, Any],
    y_true: np.ndarray,
    calibrated: np.ndarray,
    classes: Sequence[str],
) -> None:
    """Plots confusion matrix, metrics by class, curves and calibration into a model's folder.

    `metrics` is what `evaluate_predictions` returns.
    """
    name, test = folder.name, metrics["test"]
    matrix, title = np.array(test["confusion_matrix"]), f"{name}, test images"
    visualizations.plot_confusion_matrix(
        matrix, classes, title=title, save_path=folder / "confusion_matrix.png"
    )
    per_class, intervals = test["per_class"], metrics["test_intervals"]["per_class"]
    visualizations.plot_class_metrics(
        per_class, intervals, title=name, save_path=folder / "class_metrics.png"
    )
    visualizations.plot_roc_pr_curves(
        y_true,
        calibrated,
        classes,
        malignant=metrics["counted_as"]["malignant"],
        title=name,
        save_path=folder / "roc_pr_curves.png",
    )
    before, after = metrics["calibration"]["before"], metrics["calibration"]["after"]
    visualizations.plot_reliability(before, after, title=name, save_path=folder / "reliability.png")


def plot_examples(
    folder: Path,
    model: LesionClassifier,
    dataset: LesionDataset,
    evaluation: Evaluation,
    calibrated: np.ndarray,
    explained: np.ndarray,
) -> None:
    """Plots into a model's folder its most confident mistakes and Grad-CAMs of right and wrong.

    `explained` (N,) are the labels of the model's own classes that the Grad-CAMs are of.
    """
    y_true, y_pred = evaluation.labels, evaluation.probabilities.argmax(axis=1)
    names, paths = np.array(dataset.classes, dtype=object), dataset.metadata["path"].to_numpy()
    true, predicted = names[y_true], names[y_pred]
    mistakes = most_confident_mistakes(y_true, calibrated, y_pred)
    (folder / "mistakes.png").unlink(missing_ok=True)
    if len(mistakes) > 0:
        visualizations.plot_mistakes(
            dataset.gather(mistakes),
            true[mistakes],
            predicted[mistakes],
            calibrated[mistakes, y_pred[mistakes]],
            names=paths[mistakes],
            title=folder.name,
            save_path=folder / "mistakes.png",
        )
    examples = typical_examples(y_true, calibrated, y_pred)
    images = dataset.gather(examples)
    pixels = to_float(torch.from_numpy(images).to(next(model.parameters()).device))
    visualizations.plot_gradcams(
        images,
        gradcam(model, pixels, explained[examples]),
        true[examples],
        predicted[examples],
        names=paths[examples],
        title=folder.name,
        save_path=folder / "gradcam.png",
    )


def compare_models(
    save_dir: Path, models: Sequence[str], dataset: LesionDataset, *, seed: int = 42
) -> pd.DataFrame:
    """Writes `comparison.csv` and `comparison.png` from what `save_results` wrote for each model.

    `dataset` has the images that all of them were measured on. The table has the highest balanced
    accuracy first, and beside each model's metrics its gap to that, by paired bootstrap.
    """
    files = [save_dir / name / "metrics.json" for name in models]
    rows = [_comparison_row(json.loads(path.read_text(encoding="utf-8"))) for path in files]
    rows.sort(key=lambda row: -row["balanced_accuracy"])
    best = rows[0]["model"]
    label_of = {name: label for label, name in enumerate(dataset.classes)}
    predicted = {}
    for name in models:
        names = read_csv(save_dir / name / "predictions.csv")["predicted_class"]
        predicted[name] = names.map(label_of).to_numpy()
    groups = dataset.metadata["group"].tolist()
    for row in rows:
        # To itself the best has no gap, whatever other images would show.
        gap: dict[str, Any] = {"difference": 0.0, "interval": [0.0, 0.0]}
        if row["model"] != best:
            pair = predicted[best], predicted[row["model"]]
            gap = compare(dataset.labels, *pair, groups, seed=seed)["balanced_accuracy"]
        row["gap_to_best"] = gap["difference"]
        row["gap_to_best_low"], row["gap_to_best_high"] = gap["interval"]
    comparison = pd.DataFrame(rows)
    write_csv(comparison, save_dir / "comparison.csv")
    visualizations.plot_model_comparison(comparison, save_path=save_dir / "comparison.png")
    return comparison


def _comparison_row(report: Mapping[str, Any]) -> dict[str, Any]:
    row = {"model": report["model"]}
    for name in ("precision", "recall", "f1", "accuracy", "balanced_accuracy"):
        row[name] = report["test"][name]
        row[f"{name}_low"], row[f"{name}_high"] = report["test_intervals"][name]
    return row | {n: report[n] for n in ("training_time", "parameters", "trainable_parameters")}


def save_audit(save_dir: Path, findings: pd.DataFrame) -> None:
    """Writes `audit.csv`, and removes the figure of an earlier audit."""
    save_dir.mkdir(parents=True, exist_ok=True)
    (save_dir / "audit.png").unlink(missing_ok=True)
    joined = {name: findings[name].map(join_names) for name in ("images", "classes")}
    write_csv(findings.assign(**joined), save_dir / "audit.csv")


def plot_audit(save_dir: Path, findings: pd.DataFrame, data_dir: str | Path) -> None:
    """Plots `audit.png`, if there are pairs to show."""
    pairs = worst_pairs(findings)
    if len(pairs) > 0:
        images = [
            [read_image(Path(data_dir) / path, longest_side=400) for path in two]
            for two in pairs["images"]
        ]
        visualizations.plot_pairs(pairs, images, save_path=save_dir / "audit.png")


def plot_data(
    save_dir: Path,
    metadata: pd.DataFrame,
    dataset: LesionDataset,
    *,
    with_augmentations: bool,
    seed: int,
) -> None:
    """Plots how many images there are of each class, and samples of the training images."""
    visualizations.plot_class_distribution(metadata, save_path=save_dir / "class_distribution.png")
    first = dataset.metadata.groupby("class").head(6).index.to_numpy()
    visualizations.plot_samples(
        dataset.gather(first),
        dataset.labels[first],
        dataset.classes,
        save_path=save_dir / "samples.png",
    )
    if with_augmentations:
        plot_augmentations(save_dir, dataset, seed=seed)


def plot_augmentations(save_dir: Path, dataset: LesionDataset, *, seed: int) -> None:
    """Plots an image of each of the first classes with each augmentation alone, and with all."""
    labels = np.unique(dataset.labels)[:MAX_CLASSES_AUGMENTED]
    originals = dataset.gather([np.flatnonzero(dataset.labels == label)[0] for label in labels])
    names, views = example_views(torch.Generator().manual_seed(seed))
    augmented = [
        apply_views(pixels.expand(len(names), -1, -1, -1), views)
        for pixels in to_float(torch.from_numpy(originals))
    ]
    visualizations.plot_augmentations(
        originals,
        torch.stack(augmented).permute(0, 1, 3, 4, 2).numpy(),
        view_names=names,
        image_names=[dataset.classes[label] for label in labels],
        save_path=save_dir / "augmentations.png",
    )


def environment(
    device: torch.device | str | None = None, precision: str = "auto"
) -> dict[str, Any]:
    """Returns when and with what this runs: versions of the packages, machine, GPU, threads.

    With a `device` also the name of the precision that `precision` stands for on it.
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
