"""What of a run can be checked before its images are read, and what its results depend on."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from evaluation import match_classes
from experiment.run_folder import (
    BY_MODEL,
    TRAINING_PRECISION,
    WEIGHTS,
    TrainingFolder,
    folder_name,
)
from experiment.settings import DEMO_SETTINGS, NOT_RESULTS, Settings
from learning.distributed import choose_own_device
from learning.hardware import (
    name_of_precision,
    resolve_precision,
    resolve_training_precision,
)
from learning.processes import get_world_size
from models import MODELS, check_weights, is_pretrained, name_of_backbone, plan_model
from storage.weights import LoadedWeights, file_digest

SPLITS = ("train", "valid", "test")


def check_images(images: pd.DataFrame, settings: Settings) -> None:
    """Raises ValueError for mistakes that the table of `list_images` shows, without the images."""
    if settings.malignant_classes:
        match_classes(sorted(images["class"].unique()), settings.malignant_classes)
    if "split" in images:
        check_given_splits(set(images["split"].dropna()), settings)
        check_batch_size((images["split"] == "train").sum(), "training images", settings)
    else:  # how many of them are for training is known once they have been read
        check_batch_size(len(images), "images", settings)


def check_given_splits(names: set[str], settings: Settings) -> None:
    """Raises ValueError when a table of splits names none of the images for one of them."""
    missing = [name for name in SPLITS if name not in names]
    if settings.splits_csv is not None and missing:
        raise ValueError(
            f"--splits_csv {settings.splits_csv}: no images in {', '.join(missing)}; the column "
            f"split must name {', '.join(SPLITS[:-1])} and {SPLITS[-1]}"
        )


def check_batch_size(num_images: int, which: str, settings: Settings) -> None:
    """Raises ValueError for batches, of all processes together, of more than these images."""
    processes = get_world_size()
    together = settings.batch_size * processes
    if together > num_images:
        of_all = f" in {processes} processes, {together} in all," if processes > 1 else ""
        raise ValueError(
            f"--batch_size {settings.batch_size}{of_all} is larger than the {num_images} {which}; "
            "choose a smaller batch"
        )


def check_run(settings: Settings, is_demo: bool) -> tuple[torch.device, dict[str, Any]]:
    """Checks `save_dir`, device and weights, which may be downloaded.

    Returns the device, and what the results depend on, as `describe_run` does.
    """
    device = choose_own_device(settings.device)
    run = describe_run(settings, device)
    _, trained = check_folder(settings, run, is_demo)
    found = find_weights(settings, trained)
    if settings.weights != "imagenet":
        for summary in dict.fromkeys(weights.summary for weights in found.values()):
            print(summary, flush=True)
    return device, run


def check_folder(
    settings: Settings, run: dict[str, Any], is_demo: bool
) -> tuple[TrainingFolder, list[str]]:
    """Returns `save_dir` and the models to train; raises ValueError for results that would be lost.

    The models are called as their folders are. `run` is as `TrainingFolder` describes it.
    """
    folder = TrainingFolder(settings.save_dir)
    earlier = folder.config.get("settings", {}).get("data_dir", settings.data_dir)
    is_of_demo = (
        is_demo
        and folder.save_dir.resolve() == Path(DEMO_SETTINGS.save_dir).resolve()
        and Path(earlier).resolve() == Path(settings.data_dir).resolve()
    )
    may_replace = settings.overwrite or is_of_demo
    models = [folder_name(name) for name in settings.models]
    folder.check(models, run, resume=settings.resume, may_replace=may_replace)
    return folder, [m for m in models if settings.overwrite or not folder.is_done(m, run)]


def find_weights(settings: Settings, trained: Sequence[str]) -> dict[str, LoadedWeights]:
    """Returns the initial weights of the models to train, by the names of their folders.

    Raises an error for weights that are missing, do not fit or are used by no model.
    """
    pretrained = [name for name in settings.models if is_pretrained(name)]
    if settings.weights not in ("imagenet", "none") and not pretrained:
        raise ValueError(
            f"--weights {settings.weights}: all chosen models start from random weights"
        )
    by_backbone: dict[str, LoadedWeights] = {}  # they fit all models of one, or none
    found = {}
    for name in pretrained if settings.weights != "none" else ():
        if folder_name(name) in trained:
            size = {"layers": settings.layers, "image_size": settings.image_size}
            backbone = name_of_backbone(name, settings.layers)
            if backbone not in by_backbone:
                by_backbone[backbone] = check_weights(name, settings.weights, **size)
            found[folder_name(name)] = by_backbone[backbone]
    return found


def describe_run(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Returns all that a model's results depend on but the images, as it is read from JSON."""
    run = {name: value for name, value in asdict(settings).items() if name not in NOT_RESULTS}
    # What "auto" stands for on this machine, in evaluation and in training.
    run["precision"] = name_of_precision(resolve_precision(settings.precision, device))
    run[BY_MODEL] = {}
    # The four of the specification take any size, and are trained in the usual precision.
    for name in [name for name in settings.models if name not in MODELS]:
        precision = _training_precision(name, settings, device)
        if precision != run["precision"]:
            run[BY_MODEL][folder_name(name)] = {TRAINING_PRECISION: precision}
    if settings.weights not in ("imagenet", "none") and Path(settings.weights).is_file():
        run[WEIGHTS] = file_digest(settings.weights)
    return json.loads(json.dumps(run | {"processes": get_world_size()}))


def _training_precision(name: str, settings: Settings, device: torch.device) -> str:
    """Returns the precision that a model is trained in; raises ValueError for a wrong size."""
    model = plan_model(name, layers=settings.layers, image_size=settings.image_size)
    return name_of_precision(resolve_training_precision(settings.precision, device, model))
