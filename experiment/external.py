"""Trained models measured on labelled images that they have never seen: `predict.py --evaluate`."""

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dataset import DatasetBuilder, LesionDataset, create_dataloaders
from evaluation import group_by_malignancy, match_classes, screening_warnings
from evaluation.merging import MergedClasses
from experiment import run_folder
from experiment.report import write_report
from experiment.results import (
    compare_models,
    environment,
    merge_info,
    plot_audit,
    save_audit,
    save_results,
)
from experiment.run_folder import EVALUATION, EvaluationFolder, claim, digest
from imaging.classes import class_key
from imaging.labels import read_class_map
from imaging.lesions import normalize_name
from imaging.synthetic import is_synthetic
from inference.ensemble import check_alike
from models import LesionClassifier, ModelInfo, load_model
from storage.files import write_csv
from training import choose_device, evaluate, name_of_precision, resolve_precision


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of `evaluate_folder`, named like the flags of `predict.py`."""

    labels_csv: str | None = None
    label_column: str | Sequence[str] | None = None
    id_column: str | None = None
    class_names: Sequence[str] | None = None
    class_map: Mapping[str, str] | Sequence[str] | str | Path | None = None
    unlabelled: str = "error"
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
    models', by name or by diagnosis, after `class_map` has renamed, merged or left out those of
    both. Writes into `save_dir` what training does, and returns the comparison and the files that
    cannot be read.

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
    if settings.class_map:
        same["class_map"] = read_class_map(settings.class_map)
    runs = {name: {"model": digest(path.read_bytes())} | same for name, path in named.items()}
    folder.measured(runs, overwrite)  # checked before the images are prepared, too
    with tempfile.TemporaryDirectory() as cache_dir:
        dataset, metadata, findings, merged = _read_images(data_dir, cache_dir, info, settings)
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
                used = {"model": list(map(str, models)), "data_dir": str(data_dir)}
                about = {"command": command, "runs": kept | runs}
                _write_config(save_dir, about, used, settings, device)
            write_csv(metadata, save_dir / "splits.csv")
            save_audit(save_dir, findings)
            plot_audit(save_dir, findings, data_dir)
            _measure(unmeasured, save_dir, dataset, merged, settings, device)
            comparison = compare_models(save_dir, [*kept | runs], dataset, seed=settings.seed)
            write_report(save_dir)
    unreadable = findings["images"][findings["kind"] == "unreadable"]
    return comparison, [f"{path}: cannot be read" for paths in unreadable for path in paths]


def _write_config(
    save_dir: Path,
    about: dict[str, Any],
    used: dict[str, Any],
    settings: EvaluationSettings,
    device: torch.device,
) -> None:
    shown = used | asdict(settings) | {"device": str(device)}
    kind = {"kind": EVALUATION, "is_synthetic": is_synthetic(used["data_dir"])}
    about = kind | about | {"settings": shown} | environment(device, settings.precision)
    run_folder.write_config(save_dir, about)


def _read_images(
    data_dir: str | Path, cache_dir: str, info: ModelInfo, settings: EvaluationSettings
) -> tuple[LesionDataset, pd.DataFrame, pd.DataFrame, MergedClasses | None]:
    """Returns the images, labelled as by the model, their metadata, and what the audit found.

    With a `class_map`, the labels are those of the merged classes, which are returned too.
    """
    builder = DatasetBuilder(
        data_dir,
        image_size=info.image_size,
        cache_dir=cache_dir,
        num_workers=settings.num_workers,
        seed=settings.seed,
        labels_csv=settings.labels_csv,
        label_column=settings.label_column,
        id_column=settings.id_column,
        class_names=settings.class_names or (),
        unlabelled=settings.unlabelled,
        skip_unreadable=True,
        accept_class_names=True,  # as they have to be the model's
    )
    merged = None
    if settings.class_map:
        class_map = read_class_map(settings.class_map)
        found = builder.list_images()["class"].unique().tolist()
        merged = MergedClasses.from_map(info.classes, class_map, found)
        keys = set(map(class_key, found))
        builder.class_map = {old: new for old, new in class_map.items() if class_key(old) in keys}
        info = merge_info(info, merged)
    prepared = builder.prepare()
    findings = builder.audit(prepared=prepared)
    splits, metadata = builder.build(splits={"test": 1.0}, prepared=prepared)
    dataset = splits["test"]
    label_of = {name: find_label(name, info.classes) for name in dataset.classes}
    _warn_of_classes(label_of, info)
    labelled = dataset.metadata.assign(label=dataset.metadata["class"].map(label_of))
    dataset = LesionDataset(
        dataset.array_path, dataset.rows, labelled, info.classes, extra_inputs=dataset.extra_inputs
    )
    return dataset, metadata, findings, merged


def _warn_of_classes(label_of: Mapping[str, int], info: ModelInfo) -> None:
    renamed = [
        f"{name} as {info.classes[label]}"
        for name, label in label_of.items()
        if normalize_name(name) != normalize_name(info.classes[label])
    ]
    messages = [f"classes named otherwise in the model: {', '.join(renamed)}"] if renamed else []
    counted = group_by_malignancy(info.classes, info.malignant_classes or [], info.unknown_classes)
    for message in messages + screening_warnings(counted):
        warnings.warn(message, stacklevel=4)


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
    merged: MergedClasses | None,
    settings: EvaluationSettings,
    device: torch.device,
) -> None:
    loader = create_dataloaders({"test": dataset}, settings.batch_size, device=device)["test"]
    precision = name_of_precision(resolve_precision(settings.precision, device))
    for name, (model, info) in models.items():
        evaluation = evaluate(model, loader, device=device, precision=precision)
        folder, seed = save_dir / name, settings.seed
        about = {"precision": precision}
        save_results(
            folder, model, info, evaluation, dataset, about=about, merged=merged, seed=seed
        )


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
