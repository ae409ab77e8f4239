"""The order of a run: data, audit, models, comparison, report."""

import contextlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.optim.lr_scheduler import LambdaLR
from tqdm.contrib.logging import logging_redirect_tqdm

from dataset import (
    METADATA_COLUMNS,
    DatasetBuilder,
    LesionDataset,
    LesionLoader,
    create_dataloaders,
)
from evaluation import MALIGNANT, group_by_malignancy, match_classes, screening_warnings
from experiment import results, run_folder
from experiment.console import format_duration, noting
from experiment.report import write_report
from experiment.run_files import Run
from experiment.run_folder import AUDIT, DATA, METADATA, TRAINING, TrainingFolder, claim
from experiment.settings import DEMO_SETTINGS, NOT_RESULTS, Settings, command
from experiment.stages import GUESSES, choose_features, make_stages
from experiment.verdict import format_verdict
from imaging.audit import summarise, unavoidable_errors
from imaging.synthetic import is_synthetic, make_dataset
from learning.distributed import choose_own_device, process_group
from learning.features import FeatureLoader, cache_features
from learning.hardware import deterministic_algorithms
from learning.processes import get_rank, get_world_size, is_first_process
from models import (
    LesionClassifier,
    check_model_name,
    get_model,
    imagenet_weights,
    is_pretrained,
    load_model,
)
from storage.files import write_csv
from storage.progress import RunProgress, print_beside_bars
from training import (
    evaluate,
    make_optimizer,
    name_of_precision,
    resolve_precision,
    train,
    warmup_cosine,
)
from visualizations import plot_learning_curves

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Data:
    """The images of a run, and what the audit found in them."""

    loaders: dict[str, LesionLoader]
    metadata: pd.DataFrame
    findings: pd.DataFrame
    digest: str

    def __getitem__(self, split: str) -> LesionDataset:
        return self.loaders[split].dataset


def run(settings: Settings, is_demo: bool = False) -> int:
    """Trains and compares the models, or only audits the images, and returns the exit status.

    The status is 1 when an audit found something. All that can be checked without the images is
    checked before they are read, and everything before `save_dir` is touched.
    """
    for name in settings.models:
        check_model_name(name)
    TrainingFolder(settings.save_dir)  # raises what it raises before the demo's images are drawn
    if is_demo:
        settings = _prepare_demo(settings)
    builder = _make_builder(settings)
    if settings.audit_only:
        return _audit_alone(builder, settings, is_demo)
    _check_images(builder.list_images(), settings)
    device = _check_run(settings, is_demo)
    data = _load_data(builder, settings, device)
    with claim(settings.save_dir) if is_first_process() else contextlib.nullcontext():
        if is_first_process():
            _prepare_folder(settings, data, device, is_demo)
        again = command(replace(settings, resume=True, overwrite=False), is_demo)
        with noting(f"continue with: {again}"), deterministic_algorithms(settings.deterministic):
            _train_and_compare(settings, data, device)
    return 0


# ---------------------------------------------------------------------------- the images


def _make_builder(settings: Settings) -> DatasetBuilder:
    return DatasetBuilder(
        settings.data_dir,
        image_size=settings.image_size,
        cache_dir=settings.cache_dir,
        num_workers=settings.num_workers or None,
        seed=settings.seed,
        skip_unreadable=settings.skip_unreadable,
        labels_csv=settings.labels_csv,
        label_column=settings.label_column,
        accept_class_names=settings.accept_class_names,
        label_conflicts=settings.label_conflicts,
        metadata_csv=settings.metadata_csv,
        id_column=settings.id_column,
        group_by=settings.group_by,
        split_by=settings.split_by,
        splits_csv=settings.splits_csv,
    )


def _audit_alone(builder: DatasetBuilder, settings: Settings, is_demo: bool) -> int:
    """Writes the audit to `save_dir`, and returns the exit status: 1 when it found something."""
    save_dir = Path(settings.save_dir)
    prepared = builder.prepare()
    images = _digest(prepared.metadata[["path", "class", "content_hash"]])
    TrainingFolder(save_dir).check_audit(images)
    findings = builder.audit(prepared=prepared)
    _print_audit(findings)
    with claim(save_dir):
        folder = TrainingFolder(save_dir)
        folder.check_audit(images)
        if run_folder.kind_of_run(folder.config) != TRAINING:
            _write_config(AUDIT, settings, is_demo, None, images=images)
        results.save_audit(save_dir, findings)
        results.plot_audit(save_dir, findings, settings.data_dir)
    print(f"\nEverything is in {save_dir}.")
    return 1 if len(findings) > 0 else 0


def _print_audit(findings: pd.DataFrame) -> None:
    print("audit: " + summarise(findings).replace("\n", "\n       "), flush=True)


def _load_data(builder: DatasetBuilder, settings: Settings, device: torch.device) -> Data:
    prepared = builder.prepare()
    findings = builder.audit(prepared=prepared)
    _print_audit(findings)
    fractions = dict(zip(SPLITS, settings.splits, strict=True))
    datasets, metadata = builder.build(splits=fractions, prepared=prepared)
    _check_given_splits(set(datasets), settings)
    _check_batch_size(len(datasets["train"]), "training images", settings)
    loaders = create_dataloaders(
        datasets,
        settings.batch_size,
        augmentation=settings.augmentation,
        balanced=settings.balanced,
        device=device,
        seed=settings.seed,
        num_workers=settings.num_workers or 0,
        rank=get_rank(),
        world_size=get_world_size(),
    )
    classes, processes = datasets["train"].classes, get_world_size()
    sizes = ", ".join(f"{len(dataset):,} {name}" for name, dataset in datasets.items())
    print(f"{len(metadata):,} images of {len(classes)} classes: {sizes}", flush=True)
    if processes > 1:
        together = processes * settings.batch_size
        print(f"{processes} processes with batches of {together:,} images in all", flush=True)
    _print_screening(classes, settings)
    images = prepared.metadata[["path", "class", "content_hash"]]
    return Data(loaders, metadata, findings, _digest(images))


def _print_screening(classes: Sequence[str], settings: Settings) -> None:
    """Prints which classes count as malignant; raises ValueError for a name that is no class."""
    counted = group_by_malignancy(classes, settings.malignant_classes or MALIGNANT)
    malignant, benign, unknown = (", ".join(names) for names in counted.values())
    unknown = f"; unknown: {unknown}" if unknown else ""
    print(f"counted as malignant: {malignant or 'none'}; benign: {benign or 'none'}{unknown}",
          flush=True)  # fmt: skip
    for message in screening_warnings(counted):
        warnings.warn(message, stacklevel=2)


def _prepare_demo(settings: Settings) -> Settings:
    """Draws the synthetic images if they are not there yet, and prints what the demo runs."""
    if settings.weights == "imagenet" and not settings.audit_only:
        try:
            imagenet_weights(settings.layers, download=False)
        except FileNotFoundError:
            settings = replace(settings, weights="none")
            print(
                "no ImageNet weights on this machine, so resnet_head and resnet_finetuned start "
                "from random weights"
            )
    if not Path(settings.data_dir).exists():
        if not settings.audit_only:
            _check_run(settings, is_demo=True)
        print(f"drawing synthetic images in {settings.data_dir}", flush=True)
        make_dataset(settings.data_dir, exist_ok=True)  # as another process may draw them now
    print(f"the demo is the same as: {command(settings)}", flush=True)
    return settings


# ---------------------------------------------------------------------------- checks


def _check_images(images: pd.DataFrame, settings: Settings) -> None:
    """Raises ValueError for mistakes that the table of `list_images` shows, without the images."""
    if settings.malignant_classes:
        match_classes(sorted(images["class"].unique()), settings.malignant_classes)
    if "split" in images:
        _check_given_splits(set(images["split"].dropna()), settings)
        _check_batch_size((images["split"] == "train").sum(), "training images", settings)
    else:  # how many of them are for training is known once they have been read
        _check_batch_size(len(images), "images", settings)


def _check_given_splits(names: set[str], settings: Settings) -> None:
    missing = [name for name in SPLITS if name not in names]
    if settings.splits_csv is not None and missing:
        raise ValueError(
            f"--splits_csv {settings.splits_csv}: no images in {', '.join(missing)}; the column "
            f"split must name {', '.join(SPLITS[:-1])} and {SPLITS[-1]}"
        )


def _check_batch_size(num_images: int, which: str, settings: Settings) -> None:
    processes = get_world_size()
    together = settings.batch_size * processes
    if together > num_images:
        of_all = f" in {processes} processes, {together} in all," if processes > 1 else ""
        raise ValueError(
            f"--batch_size {settings.batch_size}{of_all} is larger than the {num_images} {which}; "
            "choose a smaller batch"
        )


def _check_run(settings: Settings, is_demo: bool) -> torch.device:
    """Checks `save_dir`, device and weights, which may be downloaded, and returns the device."""
    device = choose_own_device(settings.device)
    _, trained = _check_folder(settings, _describe_run(settings, device), is_demo)
    _check_weights(settings, trained)
    return device


def _check_folder(
    settings: Settings, run: dict[str, Any], is_demo: bool
) -> tuple[TrainingFolder, list[str]]:
    """Returns `save_dir` and the models to train; raises ValueError for results that would be lost.

    `run` is as `TrainingFolder` describes it.
    """
    folder = TrainingFolder(settings.save_dir)
    earlier = folder.config.get("settings", {}).get("data_dir", settings.data_dir)
    is_of_demo = (
        is_demo
        and folder.save_dir.resolve() == Path(DEMO_SETTINGS.save_dir).resolve()
        and Path(earlier).resolve() == Path(settings.data_dir).resolve()
    )
    may_replace = settings.overwrite or is_of_demo
    folder.check(settings.models, run, resume=settings.resume, may_replace=may_replace)
    return folder, [m for m in settings.models if settings.overwrite or not folder.is_done(m, run)]


def _check_weights(settings: Settings, trained: Sequence[str]) -> None:
    """Raises an error for weights that are missing, do not fit or are used by no model."""
    pretrained = [name for name in settings.models if is_pretrained(name)]
    if settings.weights not in ("imagenet", "none") and not pretrained:
        raise ValueError(
            f"--weights {settings.weights}: all chosen models start from random weights"
        )
    tried = [name for name in pretrained if name in trained and settings.weights != "none"]
    if tried:  # they fit either both models or none, whatever the classes: trying one is enough
        _make_model(tried[0], 2, settings)


# ---------------------------------------------------------------------------- the folder


def _prepare_folder(settings: Settings, data: Data, device: torch.device, is_demo: bool) -> None:
    """Removes results of older runs from `save_dir` and writes `config.json` and `splits.csv`."""
    columns = data.metadata.columns.drop(list(METADATA_COLUMNS), errors="ignore")
    run = _describe_run(settings, device) | {
        DATA: _digest(data.metadata[["path", "class", "content_hash", "split"]]),
        METADATA: _digest(data.metadata[columns]) if len(columns) else None,
    }
    folder, trained = _check_folder(settings, run, is_demo)
    resumed = [m for m in trained if settings.resume and folder.can_be_resumed(m)]
    records = folder.make_room([m for m in trained if m not in resumed], run)
    if not trained:
        return  # config.json keeps the command that trained the models
    features = choose_features(settings, data.loaders)
    records |= {m: run | ({"features": features[m]} if m in features else {}) for m in trained}
    _write_config(TRAINING, settings, is_demo, device, images=data.digest, runs=records)
    write_csv(data.metadata, folder.save_dir / "splits.csv")


def _digest(table: pd.DataFrame) -> str:
    return run_folder.digest(table.to_csv(index=False).encode("utf-8", "surrogateescape"))


def _write_config(
    kind: str, settings: Settings, is_demo: bool, device: torch.device | None, **more: Any
) -> None:
    chosen, defaults = asdict(settings), asdict(Settings())
    config = {
        "kind": kind,
        "command": command(settings, is_demo),
        "settings": chosen,
        "is_synthetic": is_demo or is_synthetic(settings.data_dir),
        "not_default": [name for name, value in chosen.items() if value != defaults[name]],
    }
    about = results.environment(device, settings.precision)
    run_folder.write_config(settings.save_dir, config | more | about)


def _describe_run(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Returns all that a model's results depend on but the images, as it is read from JSON."""
    run = {name: value for name, value in asdict(settings).items() if name not in NOT_RESULTS}
    # What "auto" stands for on this machine.
    run["precision"] = name_of_precision(resolve_precision(settings.precision, device))
    return json.loads(json.dumps(run | {"processes": get_world_size()}))


# ---------------------------------------------------------------------------- the models


def _train_and_compare(settings: Settings, data: Data, device: torch.device) -> None:
    save_dir, test = Path(settings.save_dir), data["test"]
    if is_first_process():
        results.save_audit(save_dir, data.findings)
        errors = unavoidable_errors(test.metadata)
        if errors > 0:
            print(
                f"at least {errors} of the {len(test):,} test images will be classified wrong, "
                "whatever the model, because identical images have different classes"
            )
    # All processes have prepared their images by now, so none waits long for another, and all see
    # the same models as finished, as those of other runs have been removed.
    is_finished = {name: (save_dir / name / "metrics.json").exists() for name in settings.models}
    num_images = {split: len(data[split]) for split in SPLITS}
    features = choose_features(settings, data.loaders)
    stages = make_stages(settings, is_finished, num_images, get_world_size(), features)
    with RunProgress(stages, GUESSES, is_shown=is_first_process()) as progress:
        with process_group(device), logging_redirect_tqdm():  # or lines of the log break the bars
            for number, name in enumerate(settings.models, 1):
                print_beside_bars(f"\n{name} ({number} of {len(settings.models)})")
                if is_finished[name]:
                    print_beside_bars("already finished")
                else:
                    _train_one(name, settings, data, device, progress)
        if not is_first_process():
            return
        progress.next_stage()
        comparison = _compare(settings, data)
    _print_comparison(comparison)
    print(format_verdict(Run(save_dir)))
    print(f"\nEverything is in {save_dir}; start with {save_dir / 'report.html'}.")


def _compare(settings: Settings, data: Data) -> pd.DataFrame:
    """Plots the data, compares the models and writes the report; returns the comparison."""
    save_dir = Path(settings.save_dir)
    # Drawing takes seconds, for which the training should not wait.
    results.plot_audit(save_dir, data.findings, settings.data_dir)
    results.plot_data(
        save_dir,
        data.metadata,
        data["train"],
        with_augmentations=settings.augmentation and not settings.cached_features,
        seed=settings.seed,
    )
    folder = TrainingFolder(save_dir)
    models = [*settings.models, *filter(folder.is_finished, folder.others(settings.models))]
    comparison = results.compare_models(save_dir, models, data["test"], seed=settings.seed)
    write_report(save_dir)
    return comparison


def _train_one(
    name: str, settings: Settings, data: Data, device: torch.device, progress: RunProgress
) -> None:
    """Trains and evaluates a model and writes its folder, `metrics.json` last of all."""
    progress.next_stage()
    folder, classes = Path(settings.save_dir) / name, data["train"].classes
    model = _make_model(name, len(classes), settings)
    optimizer = make_optimizer(model, settings.learning_rate, settings.weight_decay)
    scheduler = None
    if settings.schedule == "cosine":
        scheduler = warmup_cosine(optimizer, settings.num_steps, settings.warmup_fraction)
    loaders = data.loaders
    if settings.cached_features and model.is_frozen:
        loaders = cache_features(model, loaders, device=device, precision=settings.precision)
        if isinstance(loaders["train"], FeatureLoader):
            progress.next_stage()
    _, history = train(
        model=model,
        train_loader=loaders["train"],
        valid_loader=loaders["valid"],
        num_classes=len(classes),
        num_steps=settings.num_steps,
        optimizer=optimizer,
        scheduler=scheduler,
        device=device,
        eval_every=settings.eval_every,
        save_path=folder,
        precision=settings.precision,
        resume=settings.resume,
        early_stopping_patience=settings.early_stopping_patience,
        class_weights=_class_weights(settings, data["train"]),
        checkpoint_every=settings.checkpoint_every,
        accumulate=settings.accumulate,
        compile=settings.compile,
        malignant_classes=settings.malignant_classes or MALIGNANT,
        seed=settings.seed,
    )
    progress.next_stage()
    test = data.loaders["test"]
    evaluation = evaluate(model, test, device=device, precision=settings.precision)
    progress.next_stage()
    if not is_first_process():
        return
    plot_learning_curves(
        history,
        learning_rates=_learning_rates(scheduler, history, settings),
        title=name,
        save_path=folder / "learning_curves.png",
    )
    _, info = load_model(folder / "model.pth")
    results.save_results(
        folder,
        model,
        info,
        evaluation,
        test.dataset,
        precision=name_of_precision(resolve_precision(settings.precision, device)),
        seed=settings.seed,
        training_time=_training_time(history, settings),
    )


def _make_model(name: str, num_classes: int, settings: Settings) -> LesionClassifier:
    weights = None if settings.weights == "none" or not is_pretrained(name) else settings.weights
    return get_model(
        name,
        num_classes,
        layers=settings.layers,
        dropout_rate=settings.dropout_rate,
        weights=weights,
        image_size=settings.image_size,
        seed=settings.seed,
    )


def _class_weights(settings: Settings, dataset: LesionDataset) -> list[float] | None:
    if settings.class_weights == "none":
        return None
    labels = np.arange(len(dataset.classes))
    return compute_class_weight("balanced", classes=labels, y=dataset.labels).tolist()


def _learning_rates(
    scheduler: LambdaLR | None, history: dict[str, list[float]], settings: Settings
) -> list[float]:
    """Returns the learning rate of each step, of which the history has those of evaluations."""
    steps = range(int(history["step"][-1]))
    if scheduler is None:
        return [settings.learning_rate for _ in steps]
    return [float(scheduler.base_lrs[0]) * scheduler.lr_lambdas[0](step) for step in steps]


def _training_time(history: dict[str, list[float]], settings: Settings) -> float:
    """Returns the seconds of all training steps, resumed runs included, without evaluations."""
    images_a_step = settings.batch_size * settings.accumulate * get_world_size()
    num_steps = np.diff(history["step"], prepend=0)
    return float((num_steps * images_a_step / history["images_per_second"]).sum())


def _print_comparison(comparison: pd.DataFrame) -> None:
    shown = comparison[["model"]].copy()
    for heading, name in {
        "precision": "precision",
        "recall": "recall",
        "balanced accuracy": "balanced_accuracy",
        "gap to the first": "gap_to_best",
    }.items():
        columns = comparison[[name, f"{name}_low", f"{name}_high"]].to_numpy()
        shown[heading] = [f"{value:.3f} ({low:.2f} to {high:.2f})" for value, low, high in columns]
    shown["training time"] = comparison["training_time"].map(format_duration)
    shown["parameters"] = comparison["parameters"].map("{:,}".format)
    print(
        "\nOn the test split, with 95 % intervals (precision and recall are weighted by class):\n"
        f"{shown.to_string(index=False)}"
    )
