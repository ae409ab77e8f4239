"""The order of a run: data, audit, models, comparison, report."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiment.console import format_duration
from experiment.run_folder import (
    AUDIT,
    TRAINING,
    TrainingFolder,
    describe_data,
    digest_images,
    kind_of_run,
    write_config,
)
from experiment.settings import (
    DEMO_SETTINGS,
    NOT_RESULTS,
    Settings,
    command,
)
from learning.processes import (
    default_signals,
    get_world_size,
    is_first_process,
    torchrun_variable,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

    from dataset import DatasetBuilder, LesionDataset, LesionLoader, PreparedImages
    from models import LesionClassifier


def run(settings: Settings, is_demo: bool = False) -> int:
    """Trains and compares the models; nothing in `save_dir` is touched before all is in order.

    What flags and folders tell is checked before any image is read. Gives the exit status: 1 when
    only the audit was asked for and it found something.
    """
    if settings.audit_only and not is_first_process():
        return 0  # one process is enough, and the end of another one with status 1 would stop it
    _check_folders(settings, is_demo)
    # Not before the check above: torch comes with it.
    from experiment.results import claim

    _check_models(settings.models)
    if is_first_process() and (Path(settings.save_dir) / ".lock").exists():
        with claim(settings.save_dir):  # to say at once that it is in use, not after the images
            pass
    if is_demo:
        settings = _prepare_demo(settings)
    builder = _make_builder(settings)
    images = builder.list_images()
    if not settings.audit_only:
        _check_images(images, settings)
    device = _check_run(settings, is_demo)
    if settings.audit_only:
        return _audit_alone(builder, settings, is_demo)

    prepared = builder.prepare()
    findings = _audit(builder, prepared)
    loaders, metadata = _load_data(builder, prepared, settings, device)
    _say_what_is_screened_for(loaders["train"].dataset.classes, settings)
    with claim(settings.save_dir) if is_first_process() else contextlib.nullcontext():
        if is_first_process():
            _begin(settings, metadata, digest_images(prepared.metadata), device, is_demo)
        with _resumable(settings, is_demo), _deterministic(settings.deterministic):
            _train_and_compare(settings, loaders, metadata, findings, device)
    return 0


def _audit_alone(builder: "DatasetBuilder", settings: Settings, is_demo: bool) -> int:
    """Leaves the audit in `save_dir`, and gives the exit status: 1 when it found something."""
    from experiment.results import claim, plot_audit, save_audit

    save_dir = Path(settings.save_dir)
    prepared = builder.prepare()
    images = digest_images(prepared.metadata)
    TrainingFolder.read(save_dir).check_audit(images)
    findings = _audit(builder, prepared)
    with claim(save_dir):
        folder = TrainingFolder.read(save_dir)
        folder.check_audit(images)
        if kind_of_run(folder.config) != TRAINING:
            _write_config(AUDIT, settings, is_demo, None, images=images)
        save_audit(save_dir, findings)
        plot_audit(save_dir, findings, settings.data_dir)
    print(f"\nEverything is in {save_dir}.")
    return 1 if len(findings) > 0 else 0


def _train_and_compare(
    settings: Settings,
    loaders: "dict[str, LesionLoader]",
    metadata: "pd.DataFrame",
    findings: "pd.DataFrame",
    device: "torch.device",
) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from experiment.report import write_report
    from experiment.results import compare_models, plot_audit, save_audit

    save_dir = Path(settings.save_dir)
    if is_first_process():
        save_audit(save_dir, findings)
        _say_unavoidable_errors(loaders["test"].dataset)
    # What is finished in this folder now is of this run: all processes see the same.
    with _process_group(device):
        for number, name in enumerate(settings.models, 1):
            print(f"\n{name} ({number} of {len(settings.models)})", flush=True)
            if (save_dir / name / "metrics.json").exists():
                print("finished already")
            else:
                with logging_redirect_tqdm():  # or a line of the log would break the bar
                    _train_one(name, settings, loaders, device)
    if is_first_process():
        # Drawing takes seconds, for which the training should not wait.
        plot_audit(save_dir, findings, settings.data_dir)
        _picture_data(save_dir, loaders["train"].dataset, metadata, settings)
        test = loaders["test"].dataset
        folder = TrainingFolder.read(save_dir)
        models = [*settings.models, *filter(folder.is_finished, folder.others(settings.models))]
        _say_comparison(compare_models(save_dir, models, test, seed=settings.seed))
        write_report(save_dir)
        print(f"\nEverything is in {save_dir}; begin with {save_dir / 'report.html'}.")


@contextlib.contextmanager
def silence_other_processes() -> Iterator[None]:
    """Keeps what the other processes print to themselves, but for errors."""
    if is_first_process():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _process_group(device: "torch.device") -> Iterator[None]:
    """Joins the processes; by now the images are prepared, so none waits long for another."""
    if get_world_size() == 1:
        yield
        return
    import torch.distributed as dist

    # Joining waits in C++ for up to half an hour, where Python's handlers are not heard.
    with default_signals():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()  # after an error torchrun ends the others instead


def exit_with_launcher() -> None:
    """Has Linux send SIGTERM when torchrun is killed, which cannot tell its processes then."""
    if get_world_size() > 1 and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _make_builder(settings: Settings) -> "DatasetBuilder":
    from dataset import DatasetBuilder

    return DatasetBuilder(
        settings.data_dir,
        image_size=settings.image_size,
        cache_dir=settings.cache_dir,
        num_workers=settings.num_workers or None,
        seed=settings.seed,
        skip_unreadable=settings.skip_unreadable,
        labels_csv=settings.labels_csv,
        label_column=settings.label_column,
        label_conflicts=settings.label_conflicts,
        metadata_csv=settings.metadata_csv,
        group_by=settings.group_by,
        split_by=settings.split_by,
        splits_csv=settings.splits_csv,
    )


@contextlib.contextmanager
def _deterministic(is_on: bool) -> Iterator[None]:
    """Has torch use deterministic algorithms alone in the block, if `is_on`."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if is_on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)


def _load_data(
    builder: "DatasetBuilder",
    prepared: "PreparedImages",
    settings: Settings,
    device: "torch.device",
) -> "tuple[dict[str, LesionLoader], pd.DataFrame]":
    from dataset import create_dataloaders

    splits = dict(zip(("train", "valid", "test"), settings.splits, strict=True))
    datasets, metadata = builder.build(splits=splits, prepared=prepared)
    _check_given_splits(set(datasets), settings)
    _check_batch_size(len(datasets["train"]), "training images", settings)
    unused = [name for name in datasets if name not in splits]
    if unused:
        count = sum(len(datasets[name]) for name in unused)
        warnings.warn(
            f"--splits_csv {settings.splits_csv}: {count} images are in splits that are not "
            f"{', '.join(splits)} and are not used: {', '.join(unused)}",
            stacklevel=2,
        )
    loaders = create_dataloaders(
        datasets,
        settings.batch_size,
        augmentation=settings.augmentation,
        balanced=settings.balanced,
        device=device,
        seed=settings.seed,
        num_workers=settings.num_workers or 0,
        rank=torchrun_variable("RANK", 0),
        world_size=get_world_size(),
    )
    sizes = ", ".join(f"{len(dataset):,} {name}" for name, dataset in datasets.items())
    num_classes = len(datasets["train"].classes)
    print(f"{len(metadata):,} images of {num_classes} classes: {sizes}", flush=True)
    if get_world_size() > 1:
        images = get_world_size() * settings.batch_size
        print(
            f"{get_world_size()} processes, together with batches of {images:,} images",
            flush=True,
        )
    return loaders, metadata


def _say_what_is_screened_for(classes: Sequence[str], settings: Settings) -> None:
    """Prints which classes count as malignant; raises ValueError for a name that is no class."""
    from evaluation import MALIGNANT, counted_as, screening_warnings

    counted = counted_as(classes, settings.malignant_classes or MALIGNANT)
    malignant, benign, unknown = (", ".join(counted[kind]) for kind in counted)
    unknown = f"; not known: {unknown}" if unknown else ""
    print(f"counted as malignant: {malignant or 'none'}; benign: {benign or 'none'}{unknown}",
          flush=True)  # fmt: skip
    for message in screening_warnings(counted):
        warnings.warn(message, stacklevel=2)


def _audit(builder: "DatasetBuilder", prepared: "PreparedImages") -> "pd.DataFrame":
    from imaging.audit import summarise

    findings = builder.audit(prepared=prepared)
    print("audit: " + summarise(findings).replace("\n", "\n       "), flush=True)
    return findings


def _say_unavoidable_errors(dataset: "LesionDataset") -> None:
    from imaging.audit import unavoidable_errors

    errors = unavoidable_errors(dataset.metadata)
    if errors > 0:
        print(
            f"at least {errors} of the {len(dataset):,} test images will be called wrong, whatever "
            "the model: their pictures stand under several classes"
        )


def _prepare_demo(settings: Settings) -> Settings:
    """Draws the synthetic set if it is not there yet, and says what the demo runs."""
    from imaging.synthetic import make_dataset
    from models import imagenet_weights

    if settings.weights == "imagenet" and not settings.audit_only:
        try:
            imagenet_weights(settings.layers, download=False)
        except FileNotFoundError:
            settings = replace(settings, weights="none")
            print(
                "no ImageNet weights on this machine: resnet_head and resnet_finetuned start from "
                "random weights"
            )
    if not Path(settings.data_dir).exists():
        _check_run(settings, is_demo=True)
        print(f"drawing synthetic images in {settings.data_dir}", flush=True)
        make_dataset(settings.data_dir, exist_ok=True)  # as another process may draw them now
    print(f"the demo is: {command(settings)}", flush=True)
    return settings


def _check_folders(settings: Settings, is_demo: bool) -> None:
    data_dir, save_dir = Path(settings.data_dir).resolve(), Path(settings.save_dir).resolve()
    if not data_dir.is_dir() and not (is_demo and not data_dir.exists()):
        raise FileNotFoundError(f"--data_dir {settings.data_dir}: no such folder")
    if save_dir.is_relative_to(data_dir):
        raise ValueError(
            f"--save_dir {settings.save_dir} lies in --data_dir, where its pictures would be taken "
            "for images of lesions; choose a folder elsewhere"
        )
    existing = next(path for path in (save_dir, *save_dir.parents) if path.exists())
    if not existing.is_dir():
        where = "is" if existing == save_dir else f"lies in {existing}, which is"
        raise ValueError(f"--save_dir {settings.save_dir} {where} a file; choose a folder")
    if not os.access(existing, os.W_OK):
        raise PermissionError(
            f"--save_dir {settings.save_dir}: no permission to write there; choose another folder"
        )


def _check_models(names: Sequence[str]) -> None:
    """Raises ValueError for a name of `--models` that is of no model."""
    from models import check_model_name

    for name in names:
        try:
            check_model_name(name)
        except ValueError as error:
            raise ValueError(f"--models {name}: {error}") from None


def _check_images(images: "pd.DataFrame", settings: Settings) -> None:
    """Raises ValueError for what the paths and tables alone tell, as `list_images` gives them."""
    from evaluation import match_classes

    if settings.malignant_classes:
        match_classes(sorted(images["class"].unique()), settings.malignant_classes)
    if "split" in images:
        _check_given_splits(set(images["split"].dropna()), settings)
        _check_batch_size((images["split"] == "train").sum(), "training images", settings)
    else:  # which of them are for training is known once they have been read
        _check_batch_size(len(images), "images in all", settings)


def _check_given_splits(names: set[str], settings: Settings) -> None:
    missing = [name for name in ("train", "valid", "test") if name not in names]
    if settings.splits_csv is not None and missing:
        raise ValueError(f"--splits_csv {settings.splits_csv}: has no split {', '.join(missing)}")


def _check_batch_size(num_images: int, which: str, settings: Settings) -> None:
    processes = get_world_size()
    together = settings.batch_size * processes
    if together > num_images:
        of_all = f" in {get_world_size()} processes, {together} together," * (get_world_size() > 1)
        raise ValueError(
            f"--batch_size {settings.batch_size}{of_all} is more than the {num_images} {which}; "
            "choose a smaller one"
        )


def _check_run(settings: Settings, is_demo: bool) -> "torch.device | None":
    """Raises for what `save_dir`, device and weights do not allow; gives the device of a training.

    Loading weights, which may have to be downloaded, comes last.
    """
    folder = TrainingFolder.read(settings.save_dir)
    if settings.audit_only:
        return None
    device = _choose_device(settings.device)
    run = _describe_run(settings, device)
    _check_folder(folder, settings, run, is_demo)
    _check_weights(settings, folder.not_done(settings.models, run, settings.overwrite))
    return device


def _check_folder(
    folder: TrainingFolder, settings: Settings, run: dict[str, Any], is_demo: bool
) -> None:
    """Raises ValueError when the run would lose results in `save_dir`."""
    earlier = folder.config.get("settings", {}).get("data_dir")
    is_other = earlier is not None and Path(earlier).resolve() != Path(settings.data_dir).resolve()
    is_of_training = kind_of_run(folder.config) == TRAINING
    if is_demo and is_other and is_of_training and not settings.overwrite:
        raise ValueError(
            f"{folder.save_dir} holds a run on other images; give the demo another --save_dir"
        )
    folder.check(
        settings.models,
        run,
        resume=settings.resume,
        may_replace=settings.overwrite or (is_demo and _is_of_demo(settings.save_dir)),
    )


def _is_of_demo(save_dir: str) -> bool:
    return Path(save_dir).resolve() == Path(DEMO_SETTINGS.save_dir).resolve()


def _check_weights(settings: Settings, trained: Sequence[str]) -> None:
    """Raises when weights are wanted and cannot be had or do not fit, or a file has no use."""
    from models import is_pretrained

    if not any(map(is_pretrained, settings.models)):
        if settings.weights not in ("imagenet", "none"):
            raise ValueError(
                f"--weights {settings.weights}: none of the chosen models starts from given weights"
            )
        return
    pretrained = [name for name in trained if is_pretrained(name)]
    if pretrained and settings.weights != "none":
        # They load into one as into the other, whatever the classes: one model is test enough.
        _make_model(pretrained[0], 2, settings)


def _choose_device(name: str) -> "torch.device":
    """The device of this process: of several processes, each has a GPU of its own."""
    import torch

    from training import choose_device

    if get_world_size() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{torchrun_variable('LOCAL_RANK', 0)}"
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _make_model(name: str, num_classes: int, settings: Settings) -> "LesionClassifier":
    from models import get_model, is_pretrained

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


def _begin(
    settings: Settings,
    metadata: "pd.DataFrame",
    images: str,
    device: "torch.device",
    is_demo: bool,
) -> None:
    """Makes `save_dir` ready: no result of an older run is left to be taken for one of this."""
    from storage.files import write_csv

    folder = TrainingFolder.read(settings.save_dir)
    run = _describe_run(settings, device, metadata)
    _check_folder(folder, settings, run, is_demo)
    trained = folder.not_done(settings.models, run, settings.overwrite)
    resumed = [m for m in trained if settings.resume and folder.can_be_resumed(m)]
    records = folder.make_room([m for m in trained if m not in resumed], run)
    if not trained:
        return  # what stands in the folder is of the command that trained the models
    records |= dict.fromkeys(trained, run)
    _write_config(TRAINING, settings, is_demo, device, images=images, runs=records)
    write_csv(metadata, folder.save_dir / "splits.csv")


def _write_config(
    kind: str, settings: Settings, is_demo: bool, device: "torch.device | None", **more: Any
) -> None:
    from experiment.results import environment

    told = {"kind": kind, "command": command(settings, is_demo)}
    defaults = asdict(Settings())
    about = environment(device, settings.precision)
    write_config(settings.save_dir, told, asdict(settings), defaults, more | about)


def _describe_run(
    settings: Settings, device: "torch.device", metadata: "pd.DataFrame | None" = None
) -> dict[str, Any]:
    """What a model's results depend on, as JSON gives it back; without metadata the settings."""
    from training import name_of_precision, resolve_precision

    run = {name: value for name, value in asdict(settings).items() if name not in NOT_RESULTS}
    # The precision that is used: "auto" is another one on another machine.
    run["precision"] = name_of_precision(resolve_precision(settings.precision, device))
    run |= {"processes": get_world_size()} | ({} if metadata is None else describe_data(metadata))
    return json.loads(json.dumps(run))


def _picture_data(
    save_dir: Path, dataset: "LesionDataset", metadata: "pd.DataFrame", settings: Settings
) -> None:
    import torch

    from augmentation import augment_batch
    from dataset import to_float
    from visualizations import plot_augmentations, plot_class_distribution, plot_samples

    plot_class_distribution(metadata, save_path=save_dir / "class_distribution.png")
    first = dataset.metadata.groupby("class").head(6).index.to_numpy()
    plot_samples(
        dataset.gather(first),
        dataset.labels[first],
        dataset.classes,
        save_path=save_dir / "samples.png",
    )
    original = dataset.gather([0])
    if settings.augmentation:
        generator = torch.Generator().manual_seed(settings.seed)
        views = augment_batch(to_float(torch.from_numpy(original)).repeat(11, 1, 1, 1), generator)
        plot_augmentations(
            original[0],
            views.permute(0, 2, 3, 1).numpy(),
            save_path=save_dir / "augmentations.png",
        )


def _train_one(
    name: str, settings: Settings, loaders: "dict[str, LesionLoader]", device: "torch.device"
) -> None:
    """Trains one model and fills its folder; `metrics.json`, written last, says that it is done."""
    from evaluation import MALIGNANT
    from experiment.results import save_results
    from models import count_parameters, load_model
    from training import (
        evaluate,
        make_optimizer,
        name_of_precision,
        resolve_precision,
        train,
        warmup_cosine,
    )
    from visualizations import plot_learning_curves

    folder = Path(settings.save_dir) / name
    classes = loaders["train"].dataset.classes
    model = _make_model(name, len(classes), settings)
    optimizer = make_optimizer(model, settings.learning_rate, settings.weight_decay)
    scheduler = None
    if settings.schedule == "cosine":
        scheduler = warmup_cosine(optimizer, settings.num_steps, settings.warmup_fraction)
    model, history = train(
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
        class_weights=_class_weights(settings, loaders["train"].dataset),
        checkpoint_every=settings.checkpoint_every,
        accumulate=settings.accumulate,
        compile=settings.compile,
        malignant_classes=settings.malignant_classes or MALIGNANT,
        seed=settings.seed,
    )
    test = loaders["test"].dataset
    evaluation = evaluate(model, loaders["test"], device=device, precision=settings.precision)
    if not is_first_process():
        return
    images_a_step = settings.batch_size * settings.accumulate * get_world_size()
    about = {
        "model": name,
        "precision": name_of_precision(resolve_precision(settings.precision, device)),
        "classes": classes,
        "training_time": _training_time(history, images_a_step),
        "parameters": count_parameters(model),
        "trainable_parameters": count_parameters(model, trainable_only=True),
    }
    plot_learning_curves(history, title=name, save_path=folder / "learning_curves.png")
    _, info = load_model(folder / "model.pth")
    save_results(folder, about, model, info, evaluation, test, seed=settings.seed)


def _training_time(history: dict[str, list[float]], images_a_step: int) -> float:
    """Seconds spent in training steps, over all sessions of a run; evaluations are not counted."""
    steps = zip([0, *history["step"]], history["step"], strict=False)
    numbers = [(after - before) * images_a_step for before, after in steps]
    return sum(n / speed for n, speed in zip(numbers, history["images_per_second"], strict=True))


def _class_weights(settings: Settings, dataset: "LesionDataset") -> "np.ndarray | None":
    if settings.class_weights == "none":
        return None
    import numpy as np
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.arange(len(dataset.classes))
    return compute_class_weight("balanced", classes=labels, y=dataset.labels)


def _say_comparison(comparison: "pd.DataFrame") -> None:
    import pandas as pd

    shown = pd.DataFrame(
        {
            "model": comparison["model"],
            "precision": _with_intervals(comparison, "precision"),
            "recall": _with_intervals(comparison, "recall"),
            "balanced accuracy": _with_intervals(comparison, "balanced_accuracy"),
            "behind the best": _with_intervals(comparison, "behind_best"),
            "training time": comparison["training_time"].map(format_duration),
            "parameters": comparison["parameters"].map("{:,}".format),
        }
    )
    print(
        "\nOn the test split, with 95 % intervals (precision and recall are weighted by class):\n"
        f"{shown.to_string(index=False)}"
    )


def _with_intervals(comparison: "pd.DataFrame", name: str) -> list[str]:
    columns = (comparison[column] for column in (name, f"{name}_low", f"{name}_high"))
    values = zip(*columns, strict=True)
    return [f"{value:.3f} ({low:.2f} to {high:.2f})" for value, low, high in values]


@contextlib.contextmanager
def _resumable(settings: Settings, is_demo: bool) -> Iterator[None]:
    """Adds to an interruption how to go on after it."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        again = command(replace(settings, resume=True, overwrite=False), is_demo)
        interruption.add_note(f"to go on: {again}")
        raise
