"""The order of a run: data, audit, models, comparison, report."""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.optim.lr_scheduler import LambdaLR
from tqdm.contrib.logging import logging_redirect_tqdm

from dataset import METADATA_COLUMNS, DatasetBuilder, LesionDataset, LesionLoader
from evaluation import MALIGNANT
from experiment import results, run_folder
from experiment.checks import (
    SPLITS,
    check_folder,
    check_images,
    check_run,
    find_weights,
)
from experiment.console import format_duration, noting
from experiment.images import (
    Data,
    describe_images,
    digest_of_table,
    load_data,
    make_builder,
    print_audit,
)
from experiment.report import write_report
from experiment.run_files import Run
from experiment.run_folder import (
    AUDIT,
    DATA,
    METADATA,
    TRAINING,
    TrainingFolder,
    claim,
    folder_name,
    record_of,
)
from experiment.settings import Settings, command
from experiment.stages import GUESSES, choose_features, make_stages
from experiment.verdict import format_verdict
from imaging.audit import unavoidable_errors
from imaging.synthetic import is_synthetic, make_dataset
from learning.distributed import process_group
from learning.features import FeatureLoader, cache_features
from learning.hardware import deterministic_algorithms
from learning.processes import get_world_size, is_first_process
from models import (
    LesionClassifier,
    check_model_name,
    get_model,
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


def run(settings: Settings, is_demo: bool = False) -> int:
    """Trains and compares the models, or only audits the images, and returns the exit status.

    The status is 1 when an audit found something. All that can be checked without the images is
    checked before they are read, and everything before `save_dir` is touched.
    """
    for name in settings.models:
        check_model_name(name)
    TrainingFolder(settings.save_dir)  # raises what it raises before the demo's images are drawn
    if is_demo:
        _prepare_demo(settings)
    builder = make_builder(settings)
    if settings.audit_only:
        return _audit_alone(builder, settings, is_demo)
    check_images(builder.list_images(), settings)
    device, described = check_run(settings, is_demo)
    data = load_data(builder, settings, device)
    with claim(settings.save_dir) if is_first_process() else contextlib.nullcontext():
        if is_first_process():
            _prepare_folder(settings, data, device, described, is_demo)
        again = command(replace(settings, resume=True, overwrite=False), is_demo)
        with noting(f"continue with: {again}"), deterministic_algorithms(settings.deterministic):
            _train_and_compare(settings, data, device)
    return 0


# ---------------------------------------------------------------------------- the images


def _audit_alone(builder: DatasetBuilder, settings: Settings, is_demo: bool) -> int:
    """Writes the audit to `save_dir`, and returns the exit status: 1 when it found something."""
    save_dir = Path(settings.save_dir)
    prepared = builder.prepare()
    images = digest_of_table(prepared.metadata[["path", "class", "content_hash"]])
    TrainingFolder(save_dir).check_audit(images)
    print("\n".join(describe_images(prepared, prepared.metadata, settings)), flush=True)
    findings = builder.audit(prepared=prepared)
    print_audit(findings)
    with claim(save_dir):
        folder = TrainingFolder(save_dir)
        folder.check_audit(images)
        if run_folder.kind_of_run(folder.config) != TRAINING:
            _write_config(AUDIT, settings, is_demo, None, images=images)
        results.save_audit(save_dir, findings)
        results.plot_audit(save_dir, findings, settings.data_dir)
    print(f"\nEverything is in {save_dir}.")
    return 1 if len(findings) > 0 else 0


def _prepare_demo(settings: Settings) -> None:
    """Draws the synthetic images if they are not there yet, and prints what the demo runs."""
    if not Path(settings.data_dir).exists():
        if not settings.audit_only:
            check_run(settings, is_demo=True)
        print(f"drawing synthetic images in {settings.data_dir}", flush=True)
        make_dataset(settings.data_dir, exist_ok=True)  # as another process may draw them now
    print(f"the demo is the same as: {command(settings)}", flush=True)


# ---------------------------------------------------------------------------- the folder


def _prepare_folder(
    settings: Settings, data: Data, device: torch.device, described: dict[str, Any], is_demo: bool
) -> None:
    """Removes results of older runs from `save_dir` and writes `config.json` and `splits.csv`.

    `described` is what `describe_run` returns.
    """
    columns = data.metadata.columns.drop(list(METADATA_COLUMNS), errors="ignore")
    run = described | {
        DATA: digest_of_table(data.metadata[["path", "class", "content_hash", "split"]]),
        METADATA: digest_of_table(data.metadata[columns]) if len(columns) else None,
    }
    folder, trained = check_folder(settings, run, is_demo)
    resumed = [m for m in trained if settings.resume and folder.can_be_resumed(m)]
    records = folder.make_room([m for m in trained if m not in resumed], run)
    if not trained:
        return  # config.json keeps the command that trained the models
    features = choose_features(settings, data.loaders)
    records |= {name: record_of(name, run) for name in trained}
    for model, choice in features.items():
        if folder_name(model) in trained:
            records[folder_name(model)]["features"] = choice
    weights = folder.config.get("initial_weights", {})
    weights = {name: weights[name] for name in records if name in weights}
    for name, loaded in find_weights(settings, trained).items():
        weights[name] = {"file": loaded.file, "sha256": loaded.sha256}
    more = {"images": data.digest, "runs": records, "initial_weights": weights}
    _write_config(TRAINING, settings, is_demo, device, **more)
    write_csv(data.metadata, folder.save_dir / "splits.csv")


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
    folders = {name: save_dir / folder_name(name) for name in settings.models}
    is_finished = {name: (folders[name] / "metrics.json").exists() for name in settings.models}
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
    models = [folder_name(name) for name in settings.models]
    models += filter(folder.is_finished, folder.others(models))
    comparison = results.compare_models(save_dir, models, data["test"], seed=settings.seed)
    write_report(save_dir)
    return comparison


def _train_one(
    name: str, settings: Settings, data: Data, device: torch.device, progress: RunProgress
) -> None:
    """Trains and evaluates a model and writes its folder, `metrics.json` last of all."""
    progress.next_stage()
    folder, classes = Path(settings.save_dir) / folder_name(name), data["train"].classes
    model = _make_model(name, len(classes), settings)
    optimizer = make_optimizer(model, settings.learning_rate, settings.weight_decay)
    scheduler = None
    if settings.schedule == "cosine":
        scheduler = warmup_cosine(optimizer, settings.num_steps, settings.warmup_fraction)
    loaders = _training_loaders(model, settings, data, device, progress)
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
        about={
            "precision": name_of_precision(resolve_precision(settings.precision, device)),
            "training_time": _training_time(history, settings),
        },
        seed=settings.seed,
    )


def _training_loaders(
    model: LesionClassifier,
    settings: Settings,
    data: Data,
    device: torch.device,
    progress: RunProgress,
) -> Mapping[str, LesionLoader]:
    """Returns the loaders to train with: of images, or of the features of a frozen backbone."""
    if not settings.cached_features or not model.is_frozen:
        return data.loaders
    loaders = cache_features(model, data.loaders, device=device, precision=settings.precision)
    if isinstance(loaders["train"], FeatureLoader):
        progress.next_stage()
    return loaders


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
