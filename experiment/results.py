"""Predictions on labelled images → the files of a run: metrics, tables, figures, comparison.

A training run writes them for the test split (`train_models.py`), and an evaluation for other
images (`predict.py --evaluate`).
"""

import json
import platform
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
    evaluate_predictions,
    group_by_malignancy,
    match_classes,
    most_confident_mistakes,
    screening_warnings,
    typical_examples,
)
from experiment import run_folder
from experiment.report import write_report
from experiment.run_folder import EVALUATION, EvaluationFolder, claim, digest
from imaging.audit import worst_pairs
from imaging.lesions import normalize_name
from imaging.synthetic import is_synthetic
from inference.ensemble import check_alike
from inference.explain import gradcam
from models import LesionClassifier, ModelInfo, count_parameters, load_model
from storage.files import join_names, name_column, read_csv, write_csv, write_json
from training import Evaluation, choose_device, evaluate, name_of_precision, resolve_precision

MAX_CLASSES_AUGMENTED = 4  # in the figure


def save_results(
    folder: Path,
    model: LesionClassifier,
    info: ModelInfo,
    evaluation: Evaluation,
    dataset: LesionDataset,
    *,
    precision: str,
    seed: int = 42,
    training_time: float | None = None,
) -> None:
    """Writes into `folder`, which has the model's name, what its predictions are worth.

    `model` and `info` are as `load_model` returns them, `evaluation` as `evaluate` does for
    `dataset`, whose labels are the model's. `precision` is the name of that of the evaluation.
    `metrics.json` is written last, after `predictions.csv` and the figures: where it is, all is.
    """
    own = set(METADATA_COLUMNS) - {"source_split"}
    metrics = evaluate_predictions(
        evaluation.labels,
        evaluation.probabilities,
        info.classes,
        info.calibration,
        info.thresholds,
        malignant=info.malignant_classes or [],
        unknown=info.unknown_classes,
        groups=dataset.metadata["group"].tolist(),
        columns=dataset.metadata.drop(columns=list(own), errors="ignore"),
        seed=seed,
    )
    metrics["test"]["loss"] = evaluation.loss
    calibrated = info.calibration.apply(evaluation.probabilities)
    folder.mkdir(parents=True, exist_ok=True)
    names = np.array(info.classes, dtype=object)
    predictions = {
        "path": name_column(dataset.metadata["path"].tolist()),
        "true_class": names[evaluation.labels],
        "predicted_class": names[evaluation.probabilities.argmax(axis=1)],
    } | {f"prob_{name}": calibrated[:, label] for label, name in enumerate(names)}
    write_csv(pd.DataFrame(predictions), folder / "predictions.csv")
    plot_metrics(folder, metrics, evaluation.labels, calibrated, info.classes)
    plot_examples(folder, model, dataset, evaluation, calibrated)
    about = {
        "model": folder.name,
        "precision": precision,
        "classes": info.classes,
        "training_time": training_time,
        "parameters": count_parameters(model),
        "trainable_parameters": count_parameters(model, trainable_only=True),
    }
    write_json(folder / "metrics.json", about | metrics)


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
) -> None:
    """Plots into a model's folder its most confident mistakes and Grad-CAMs of right and wrong."""
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
        gradcam(model, pixels, y_pred[examples]),
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


# ---------------------------------------------------------------------------- other images


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of `evaluate_folder`, named like the flags of `predict.py`."""

    labels_csv: str | None = None
    label_column: str | None = None
    device: torch.device | str | None = None
    precision: str = "auto"
    batch_size: int = 32
    num_workers: int | None = None
    seed: int = 42


def evaluate_folder(
    models: Sequence[str | Path],
    data_dir: str | Path,
    save_dir: str | Path,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    overwrite: bool = False,
    command: str = "",
) -> tuple[pd.DataFrame, list[str]]:
    """Measures trained models, files `model.pth`, on labelled images that they have never seen.

    The images and their labels are found as by `DatasetBuilder`; their classes must be among the
    models', by name or by diagnosis. Writes into `save_dir` what training does, and returns the
    comparison and the files that cannot be read.

    A model that has been measured there on the same images already is skipped, and others that
    have been stay in the comparison. With `overwrite` it is measured again, and the results of an
    evaluation of other images in `save_dir` are removed.

    Raises ValueError for models of different classes or sizes or with preprocessors of their own,
    for a class of the images that the models do not know, and for a `save_dir` in use, with another
    kind of run in it, or, without `overwrite`, with results that would be lost.
    """
    save_dir, named = Path(save_dir), _name_models(models)
    folder = EvaluationFolder(save_dir, named, data_dir)
    run_folder.check_unclaimed(save_dir)  # now, not after the images are prepared
    device = choose_device(settings.device)
    dtype = resolve_precision(settings.precision, device)
    loaded = _load_models(named)
    _, info = next(iter(loaded.values()))
    same = {"classes": info.classes, "precision": str(dtype).split(".")[1], "seed": settings.seed}
    runs = {name: {"model": digest(path.read_bytes())} | same for name, path in named.items()}
    folder.measured(runs, overwrite)  # checked before the images are prepared, too
    with tempfile.TemporaryDirectory() as cache_dir:
        dataset, metadata, findings = _read_images(data_dir, cache_dir, info, settings)
        images = metadata[["path", "class", "content_hash"]].to_numpy().tolist()
        same = {"images": digest(json.dumps(images).encode())}
        runs = {name: run | same for name, run in runs.items()}
        with claim(save_dir):
            # Once more, as from now on nobody else writes there.
            folder = EvaluationFolder(save_dir, named, data_dir)
            kept = folder.measured(runs, overwrite)
            folder.make_room(kept)
            unmeasured = {name: loaded[name] for name in named if name not in kept}
            _warn_of_measured(save_dir, [name for name in named if name in kept])
            if unmeasured:
                synthetic = {"is_synthetic": is_synthetic(data_dir)}
                shown = {"model": list(map(str, models)), "data_dir": str(data_dir)}
                shown |= asdict(settings) | {"device": str(device)}
                about = {"kind": EVALUATION, "command": command, "settings": shown}
                about |= {"runs": kept | runs} | synthetic | environment(device, settings.precision)
                run_folder.write_config(save_dir, about)
            write_csv(metadata, save_dir / "splits.csv")
            save_audit(save_dir, findings)
            plot_audit(save_dir, findings, data_dir)
            _measure(unmeasured, save_dir, dataset, settings, device)
            comparison = compare_models(save_dir, [*kept | runs], dataset, seed=settings.seed)
            write_report(save_dir)
    unreadable = findings["images"][findings["kind"] == "unreadable"]
    return comparison, [f"{path}: cannot be read" for paths in unreadable for path in paths]


def _read_images(
    data_dir: str | Path, cache_dir: str, info: ModelInfo, settings: EvaluationSettings
) -> tuple[LesionDataset, pd.DataFrame, pd.DataFrame]:
    """Returns the images, labelled as by the model, their metadata, and what the audit found."""
    builder = DatasetBuilder(
        data_dir,
        image_size=info.image_size,
        cache_dir=cache_dir,
        num_workers=settings.num_workers,
        seed=settings.seed,
        labels_csv=settings.labels_csv,
        label_column=settings.label_column,
        skip_unreadable=True,
        accept_class_names=True,  # as they have to be the model's
    )
    prepared = builder.prepare()
    findings = builder.audit(prepared=prepared)
    splits, metadata = builder.build(splits={"test": 1.0}, prepared=prepared)
    dataset = splits["test"]
    label_of = {name: find_label(name, info.classes) for name in dataset.classes}
    renamed = [
        f"{name} as {info.classes[label]}"
        for name, label in label_of.items()
        if normalize_name(name) != normalize_name(info.classes[label])
    ]
    messages = [f"classes named otherwise in the model: {', '.join(renamed)}"] if renamed else []
    counted = group_by_malignancy(info.classes, info.malignant_classes or [], info.unknown_classes)
    for message in messages + screening_warnings(counted):
        warnings.warn(message, stacklevel=3)
    labelled = dataset.metadata.assign(label=dataset.metadata["class"].map(label_of))
    dataset = LesionDataset(
        dataset.array_path, dataset.rows, labelled, info.classes, extra_inputs=dataset.extra_inputs
    )
    return dataset, metadata, findings


def find_label(name: str, classes: Sequence[str]) -> int:
    """Returns the number of the one class of the model that has this name or diagnosis."""
    try:
        labels = match_classes(classes, [name])
    except ValueError as error:
        raise ValueError(
            f"the model does not know the class {name}, only {', '.join(classes)}"
        ) from error
    if len(labels) > 1:
        candidates = ", ".join(classes[label] for label in labels)
        raise ValueError(
            f"the class {name} could be any of the model's classes {candidates}; rename it to one "
            "of them"
        )
    return labels[0]


def _measure(
    models: Mapping[str, tuple[LesionClassifier, ModelInfo]],
    save_dir: Path,
    dataset: LesionDataset,
    settings: EvaluationSettings,
    device: torch.device,
) -> None:
    loader = create_dataloaders({"test": dataset}, settings.batch_size, device=device)["test"]
    precision = name_of_precision(resolve_precision(settings.precision, device))
    for name, (model, info) in models.items():
        evaluation = evaluate(model, loader, device=device, precision=precision)
        folder, seed = save_dir / name, settings.seed
        save_results(folder, model, info, evaluation, dataset, precision=precision, seed=seed)


def _warn_of_measured(save_dir: Path, names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"{save_dir}: skipped {', '.join(names)}, already evaluated on these images; "
            "--overwrite evaluates again",
            stacklevel=3,
        )


def _name_models(models: Sequence[str | Path]) -> dict[str, Path]:
    """Returns the files by the names of their folders, which are the models' in a training run."""
    named: dict[str, Path] = {}
    for path in map(Path, models):
        name = path.resolve().parent.name or path.stem
        number = sum(other == name or other.startswith(f"{name} (") for other in named)
        named[f"{name} ({number + 1})" if number else name] = path
    return named


def _load_models(named: Mapping[str, Path]) -> dict[str, tuple[LesionClassifier, ModelInfo]]:
    """Loads the models; raises ValueError for models that cannot see the same images."""
    loaded = {name: load_model(path) for name, path in named.items()}
    infos = {name: info for name, (_, info) in loaded.items()}
    for name, info in infos.items():
        if info.preprocessors:
            raise ValueError(
                f"{name} was trained with custom preprocessors, which this command does not have"
            )
    check_alike(infos, ("classes", "image_size"))
    return loaded
