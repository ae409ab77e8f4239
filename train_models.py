"""The command: trains and compares the four models on a folder of images.

    python train_models.py --data_dir ./data/raw --save_dir ./models

It puts the other modules in order and has no logic of its own. They are imported where they are
needed: importing torch takes seconds, which neither `--help` nor a mistyped flag should.

    torchrun --nproc_per_node=2 train_models.py --data_dir ./data/raw --save_dir ./models

trains with two processes, the first of which prints, draws and writes for both.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from console import Parser, say, speak_utf8, with_underscores

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch

    from dataset import DatasetBuilder, LesionDataset, LesionLoader
    from models import LesionClassifier

STOPPING = (signal.SIGINT, signal.SIGTERM)
PROGRAM = "train_models.py"
MODEL_NAMES = ("simple_cnn", "resnet_scratch", "resnet_head", "resnet_finetuned")
# Settings on which no result depends: a run may be resumed with others.
NOT_RESULTS = {
    "data_dir", "save_dir", "cache_dir", "labels_csv", "metadata_csv", "splits_csv", "models",
    "device", "num_workers", "checkpoint_every", "resume", "audit_only",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a run is told; each is a flag of the same name."""

    data_dir: str | None = None
    save_dir: str = "models"
    cache_dir: str | None = None
    models: tuple[str, ...] = MODEL_NAMES
    layers: int = 50
    image_size: int = 224
    weights: str = "imagenet"
    labels_csv: str | None = None
    label_column: str | None = None
    label_conflicts: str = "keep"
    metadata_csv: str | None = None
    group_by: tuple[str, ...] = ()
    splits: tuple[float, ...] = (0.7, 0.2, 0.1)
    split_by: str = "random"
    splits_csv: str | None = None
    batch_size: int = 32
    accumulate: int = 1
    num_steps: int = 2000
    learning_rate: float = 0.001
    weight_decay: float = 1e-4
    dropout_rate: float = 0.7
    warmup_fraction: float = 0.2
    schedule: str = "cosine"
    augmentation: bool = True
    balanced: bool = True
    class_weights: str = "none"
    malignant_classes: tuple[str, ...] = ()
    eval_every: int = 100
    early_stopping_patience: int = 0
    checkpoint_every: int | None = None
    precision: str = "auto"
    compile: bool = False
    device: str = "auto"
    deterministic: bool = False
    num_workers: int | None = None
    seed: int = 42
    skip_unreadable: bool = False
    resume: bool = False
    audit_only: bool = False


DEMO_SETTINGS = Settings(
    data_dir="data/demo",
    layers=18,
    image_size=32,
    num_steps=280,
    eval_every=70,
    learning_rate=0.003,
    dropout_rate=0.1,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status; a mistake of the user's ends in one line.

    So does an interruption, with status 130 for SIGINT (Ctrl-C) and 143 for SIGTERM.
    """
    settings, is_demo = parse_arguments(sys.argv[1:] if argv is None else argv)
    with _only_the_first_speaks(), warnings.catch_warnings(), _stoppable():
        warnings.showwarning = _show_warning
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        _end_with_the_launcher()
        try:
            return run(settings, is_demo)
        except (ValueError, OSError) as error:
            return _say_error(error)
        except RuntimeError as error:
            advice = _advice(error, settings)
            if advice is None:
                raise
            return _say_error(advice)
        except KeyboardInterrupt as interruption:
            return _say_stopped(interruption)


class Stopped(KeyboardInterrupt):
    """A signal that ends the run: SIGINT (Ctrl-C) or SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signal.Signals(signum)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Lets SIGINT and SIGTERM end the block with Stopped, in the main thread.

    A second one, later than a moment after the first, ends the process as it would without this.

    Of several processes only the first, which alone prints and writes, ends in this orderly way:
    the others may be waiting for it in a library, where Python's handlers are not heard.
    """
    before = {}
    stopped_at = None

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped_at
        if stopped_at is None:
            stopped_at = time.monotonic()
            raise Stopped(signum)
        if time.monotonic() - stopped_at > 1:  # timeout(1) and torchrun send a signal twice
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    if threading.current_thread() is threading.main_thread():
        for signum in STOPPING:
            # None is a handler that is not Python's, and whoever ignores a signal means it.
            if signal.getsignal(signum) not in (None, signal.SIG_IGN):
                handler = stop if _is_first() else signal.SIG_DFL
                before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _say_stopped(interruption: KeyboardInterrupt) -> int:
    signum = getattr(interruption, "signum", signal.SIGINT)
    (how_to_go_on,) = getattr(interruption, "__notes__", ["nothing had been begun"])
    if _is_first():
        print(f"{PROGRAM}: stopped by {signum.name}; {how_to_go_on}", file=sys.stderr)
    return 128 + signum


@contextlib.contextmanager
def _resumable(settings: Settings) -> Iterator[None]:
    """Adds to an interruption how to go on after it."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        again = command(replace(settings, resume=True))
        if _world_size() > 1:
            processes = os.environ["LOCAL_WORLD_SIZE"]
            again = again.replace("python", f"torchrun --nproc_per_node={processes}", 1)
        interruption.add_note(f"to go on: {again}")
        raise


def _advice(error: RuntimeError, settings: Settings) -> str | None:
    """What to do about an error of torch's that the user can do something about."""
    kind = type(error)  # by name, as torch is not imported here
    if kind.__name__ == "OutOfMemoryError":
        half = max(settings.batch_size // 2, 1)
        twice = 2 * settings.accumulate
        return (
            f"out of memory with --batch_size {settings.batch_size}; try --batch_size {half} "
            f"--accumulate {twice}, or smaller --layers or --image_size"
        )
    if settings.compile and kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().split("\n")[0]
        return f"--compile does not work here ({reason}); run without it"
    return None


def _say_error(message: object) -> int:
    say(PROGRAM, "error", message)
    return 2


# ---------------------------------------------------------------------------- flags


def parse_arguments(argv: Sequence[str]) -> tuple[Settings, bool]:
    """The settings, and whether this is the demo; exits with status 2 for a flag that is wrong."""
    argv = [with_underscores(word) for word in argv]
    parser = _make_parser()
    arguments = vars(parser.parse_args(argv))
    if arguments["demo"]:
        parser.set_defaults(**asdict(DEMO_SETTINGS))
        arguments = vars(parser.parse_args(argv))
    elif arguments["data_dir"] is None:
        parser.error("give a folder of images with --data_dir, or try it without one with --demo")
    is_demo = arguments.pop("demo")
    arguments["models"] = tuple(dict.fromkeys(arguments["models"]))
    arguments["splits"] = tuple(arguments["splits"])
    arguments["group_by"] = tuple(arguments["group_by"])
    arguments["malignant_classes"] = tuple(arguments["malignant_classes"])
    if abs(sum(arguments["splits"]) - 1) > 1e-6:
        shown = " ".join(f"{fraction:g}" for fraction in arguments["splits"])
        parser.error(f"--splits {shown} sums to {sum(arguments['splits']):g}, not to 1")
    return Settings(**arguments), is_demo


def _make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Trains, evaluates, pictures and compares models of skin lesions.",
        epilog="For research and teaching, not for diagnosis.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    positive = _number(int, lambda n: n >= 1, "1 or more")
    natural = _number(int, lambda n: n >= 0, "0 or more")
    rate = _number(float, lambda x: 0 < x < math.inf, "greater than 0")
    decay = _number(float, lambda x: 0 <= x < math.inf, "0 or more")
    share = _number(float, lambda x: 0 <= x <= 1, "from 0 to 1")
    part = _number(float, lambda x: 0 < x < 1, "greater than 0 and less than 1")
    dropout = _number(float, lambda x: 0 <= x < 1, "0 or more and less than 1")
    side = _number(int, lambda n: n >= 16, "16 or more")
    seed = _number(int, lambda n: 0 <= n < 2**63, "0 or more and less than 2**63")
    add = parser.add_argument

    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data_dir", metavar="DIR", help="images, one sub-folder a class")
    source.add_argument("--demo", action="store_true", help="draw a small set and train on it")
    add("--save_dir", metavar="DIR", help="where results go")
    add("--cache_dir", metavar="DIR", help="prepared images (None: processed/ beside data_dir)")
    add("--skip_unreadable", action="store_true", help="go on without images that cannot be read")
    add("--splits", nargs=3, type=part, metavar=("TRAIN", "VALID", "TEST"), help="fractions")
    add("--split_by", choices=("random", "folders"), help="folders: Train and Test as they are")
    add("--splits_csv", metavar="FILE", help="splits from a table, such as an earlier splits.csv")
    add("--labels_csv", metavar="FILE", help="classes that override the folders' names")
    add("--label_column", metavar="NAME", help="the column that alone gives the classes")
    conflicts = ("keep", "drop", "error")
    add("--label_conflicts", choices=conflicts, help="pictures that stand under several classes")
    add("--metadata_csv", metavar="FILE", help="a table to add, by path, image_id or isic_id")
    add("--group_by", nargs="+", metavar="NAME", help="its columns that keep images together")
    add("--audit_only", action="store_true", help="look for faults in the images, train nothing")
    add("--image_size", type=side, metavar="PIXELS", help="side of the square images")

    add("--models", nargs="+", choices=MODEL_NAMES, metavar="NAME", help=", ".join(MODEL_NAMES))
    add("--layers", type=int, choices=(18, 34, 50), help="depth of the ResNets")
    add("--weights", metavar="imagenet|none|FILE", help="start of the two pretrained models")
    add("--dropout_rate", type=dropout, metavar="P", help="of both dropout layers in the head")

    add("--batch_size", type=positive, metavar="N", help="images a batch")
    add("--accumulate", type=positive, metavar="N", help="batches a step, gradients averaged")
    add("--num_steps", type=positive, metavar="N", help="training steps")
    add("--learning_rate", type=rate, metavar="X", help="the peak")
    add("--weight_decay", type=decay, metavar="X", help="of AdamW")
    add("--schedule", choices=("cosine", "constant"), help="warm-up and cosine, or the peak always")
    add("--warmup_fraction", type=share, metavar="X", help="share of the steps")
    add("--augmentation", action=argparse.BooleanOptionalAction, help="vary the training images")
    add("--balanced", action=argparse.BooleanOptionalAction, help="draw the classes evenly")
    add("--class_weights", choices=("none", "balanced"), help="weigh the loss against imbalance")
    malignant = "what is screened for (none given: the classes known as malignant)"
    add("--malignant_classes", nargs="+", metavar="NAME", help=malignant)
    add("--eval_every", type=positive, metavar="N", help="steps between evaluations")
    add("--early_stopping_patience", type=natural, metavar="N", help="evaluations; 0 is off")

    precisions = ("auto", "fp32", "bf16", "fp16")
    add("--precision", choices=precisions, help="auto: bf16 where the hardware computes in it")
    add("--compile", action="store_true", help="run the training steps through torch.compile")
    add("--device", metavar="auto|cpu|cuda", help="auto: CUDA where there is one")
    add("--deterministic", action="store_true", help="the same weights on CUDA too, but slower")
    add("--num_workers", type=natural, metavar="N", help="threads that build, workers that load")
    add("--seed", type=seed, metavar="N", help="decides all that is random")
    add("--checkpoint_every", type=positive, metavar="N", help="steps (None: every five minutes)")
    add("--resume", action="store_true", help="go on with the run in save_dir")
    parser.set_defaults(**asdict(Settings()))
    return parser


def _number(kind: type, is_valid: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """An argparse type: an int or float for which `is_valid` holds."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of that kind") from None
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    return parse


def command(settings: Settings) -> str:
    """The command that gives these settings, without those that are the defaults anyway."""
    words = ["python", "train_models.py"]
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        elif isinstance(value, tuple):
            words += [f"--{field.name}", *map(str, value)]
        else:
            words += [f"--{field.name}", str(value)]
    return shlex.join(words)


# ---------------------------------------------------------------------------- the run


def run(settings: Settings, is_demo: bool = False) -> int:
    """Trains and compares the models; nothing in `save_dir` is touched before all is in order.

    Gives the exit status: 1 when only the audit was asked for and it found something.
    """
    settings = _prepare_demo(settings) if is_demo else settings
    save_dir = Path(settings.save_dir)
    _check_folders(settings)
    # Not before the check above: torch comes with it.
    from results import claim, leave_audit, picture_audit

    if _is_first() and (save_dir / ".lock").exists():
        with claim(save_dir):  # to say at once that it is in use, not after the images are prepared
            pass
    if settings.audit_only:
        findings = _audit(_make_builder(settings))
        with claim(save_dir):
            leave_audit(save_dir, findings)
            picture_audit(save_dir, findings, settings.data_dir)
        print(f"\nEverything is in {save_dir}.")
        return 1 if len(findings) > 0 else 0

    import torch

    device = _choose_device(settings.device)
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    _check_weights(settings)
    builder = _make_builder(settings)
    findings = _audit(builder)
    loaders, metadata = _load_data(builder, settings, device)
    _say_what_is_screened_for(loaders["train"].dataset.classes, settings)
    with claim(save_dir) if _is_first() else contextlib.nullcontext():
        if _is_first():
            _begin(settings, metadata, is_demo)
        with _resumable(settings):
            _train_and_compare(settings, loaders, metadata, findings, device)
    return 0


def _train_and_compare(
    settings: Settings,
    loaders: "dict[str, LesionLoader]",
    metadata: "pd.DataFrame",
    findings: "pd.DataFrame",
    device: "torch.device",
) -> None:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from report import write_report
    from results import compare_models, leave_audit, picture_audit

    save_dir = Path(settings.save_dir)
    if _is_first():
        leave_audit(save_dir, findings)
        _say_unavoidable_errors(loaders["test"].dataset)
    with _process_group(device):
        for number, name in enumerate(settings.models, 1):
            print(f"\n{name} ({number} of {len(settings.models)})", flush=True)
            if settings.resume and (save_dir / name / "metrics.json").exists():
                print("finished already")
            else:
                with logging_redirect_tqdm():  # or a line of the log would break the bar
                    _train_one(name, settings, loaders, device)
    if _is_first():
        # Drawing takes seconds, for which the training should not wait.
        picture_audit(save_dir, findings, settings.data_dir)
        _picture_data(save_dir, loaders["train"].dataset, metadata, settings)
        test = loaders["test"].dataset
        _say_comparison(compare_models(save_dir, settings.models, test, seed=settings.seed))
        write_report(save_dir)
        print(f"\nEverything is in {save_dir}; begin with {save_dir / 'report.html'}.")


# ---------------------------------------------------------------------------- several processes


def _told_by_torchrun(name: str, default: int) -> int:
    """RANK, WORLD_SIZE or LOCAL_RANK; the default when it is not torchrun that started this."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default


def _world_size() -> int:
    return _told_by_torchrun("WORLD_SIZE", 1)


def _is_first() -> bool:
    return _told_by_torchrun("RANK", 0) == 0


@contextlib.contextmanager
def _only_the_first_speaks() -> Iterator[None]:
    """Keeps what the other processes print to themselves, but for errors."""
    if _is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _process_group(device: "torch.device") -> Iterator[None]:
    """Joins the processes; by now the images are prepared, so none waits long for another."""
    if _world_size() == 1:
        yield
        return
    import torch.distributed as dist

    # Joining waits in C++ for up to half an hour, where Python's handlers are not heard.
    handlers = {signum: signal.signal(signum, signal.SIG_DFL) for signum in STOPPING}
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    yield
    dist.destroy_process_group()  # after an error torchrun ends the others instead


def _end_with_the_launcher() -> None:
    """Has Linux send SIGTERM when torchrun is killed, which cannot tell its processes then."""
    if _world_size() > 1 and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


# ---------------------------------------------------------------------------- before the training


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


def _load_data(
    builder: "DatasetBuilder", settings: Settings, device: "torch.device"
) -> "tuple[dict[str, LesionLoader], pd.DataFrame]":
    from dataset import create_dataloaders

    splits = dict(zip(("train", "valid", "test"), settings.splits, strict=True))
    datasets, metadata = builder.build(splits=splits)
    missing = [name for name in splits if name not in datasets]
    if missing:
        raise ValueError(f"--splits_csv {settings.splits_csv}: has no split {', '.join(missing)}")
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
        rank=_told_by_torchrun("RANK", 0),
        world_size=_world_size(),
    )
    sizes = ", ".join(f"{len(dataset):,} {name}" for name, dataset in datasets.items())
    num_classes = len(datasets["train"].classes)
    print(f"{len(metadata):,} images of {num_classes} classes: {sizes}", flush=True)
    if _world_size() > 1:
        images = _world_size() * settings.batch_size
        print(f"{_world_size()} processes, together with batches of {images:,} images", flush=True)
    return loaders, metadata


def _say_what_is_screened_for(classes: Sequence[str], settings: Settings) -> None:
    """Prints which classes count as malignant; raises ValueError for a name that is no class."""
    from evaluation import MALIGNANT, counted_as, screening_warnings

    counted = counted_as(classes, settings.malignant_classes or MALIGNANT)
    malignant, benign = (", ".join(counted[kind]) or "none" for kind in ("malignant", "benign"))
    unknown = f"; not known: {len(counted['unknown'])}" if counted["unknown"] else ""
    print(f"counted as malignant: {malignant}; benign: {benign}{unknown}", flush=True)
    for message in screening_warnings(counted):
        warnings.warn(message, stacklevel=2)


def _audit(builder: "DatasetBuilder") -> "pd.DataFrame":
    from audit import summarise

    findings = builder.audit()
    print("audit: " + summarise(findings).replace("\n", "\n       "), flush=True)
    return findings


def _say_unavoidable_errors(dataset: "LesionDataset") -> None:
    from audit import unavoidable_errors

    errors = unavoidable_errors(dataset.metadata)
    if errors > 0:
        print(
            f"at least {errors} of the {len(dataset):,} test images will be called wrong, whatever "
            "the model: their pictures stand under several classes"
        )


def _prepare_demo(settings: Settings) -> Settings:
    """Draws the synthetic set if it is not there yet, and says what the demo runs."""
    from models import imagenet_weights
    from synthetic import make_dataset

    if not Path(settings.data_dir).exists():
        print(f"drawing synthetic images in {settings.data_dir}", flush=True)
        make_dataset(settings.data_dir)
    if settings.weights == "imagenet":
        try:
            imagenet_weights(settings.layers, download=False)
        except FileNotFoundError:
            settings = replace(settings, weights="none")
            print(
                "no ImageNet weights on this machine: resnet_head and resnet_finetuned start from "
                "random weights"
            )
    print(f"the demo is: {command(settings)}", flush=True)
    return settings


def _check_folders(settings: Settings) -> None:
    data_dir, save_dir = Path(settings.data_dir).resolve(), Path(settings.save_dir).resolve()
    if not data_dir.is_dir():
        raise FileNotFoundError(f"--data_dir {settings.data_dir}: no such folder")
    if save_dir.is_relative_to(data_dir):
        raise ValueError(
            f"--save_dir {settings.save_dir} lies in --data_dir, where its pictures would be taken "
            "for images of lesions; choose a folder elsewhere"
        )
    if save_dir.exists() and not save_dir.is_dir():
        raise ValueError(f"--save_dir {settings.save_dir} is a file; choose a folder")


def _check_weights(settings: Settings) -> None:
    """Raises when weights are wanted and cannot be had or do not fit, or a file has no use."""
    from models import is_pretrained

    pretrained = [name for name in settings.models if is_pretrained(name)]
    if pretrained and settings.weights != "none":
        # They load into one as into the other, whatever the classes: one model is test enough.
        _make_model(pretrained[0], 2, settings)
    elif settings.weights not in ("imagenet", "none"):
        raise ValueError(
            f"--weights {settings.weights}: none of the chosen models starts from given weights"
        )


def _choose_device(name: str) -> "torch.device":
    """The device of this process: of several processes, each has a GPU of its own."""
    import torch

    from training import choose_device

    if _world_size() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{_told_by_torchrun('LOCAL_RANK', 0)}"
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


def _begin(settings: Settings, metadata: "pd.DataFrame", is_demo: bool) -> None:
    """Makes `save_dir` ready: no result of an older run is left to be taken for one of this."""
    from files import write_atomically, write_text
    from results import environment

    save_dir = Path(settings.save_dir)
    earlier = _read_config(save_dir)
    if is_demo and earlier.get("settings", {}).get("data_dir") not in (None, settings.data_dir):
        raise ValueError(
            f"{save_dir} holds a run on other images; give the demo another --save_dir"
        )
    runs = earlier.get("runs", {})
    run = _describe_run(settings, metadata)
    if settings.resume:
        _check_same_run(settings, runs, run)
    else:
        for model in settings.models:
            for name in ("metrics.json", "last.pth"):
                (save_dir / model / name).unlink(missing_ok=True)
    save_dir.mkdir(parents=True, exist_ok=True)
    for name in ("comparison.csv", "comparison.png", "report.html"):
        (save_dir / name).unlink(missing_ok=True)
    config = {
        "command": command(settings),
        "settings": asdict(settings),
        "runs": runs | dict.fromkeys(settings.models, run),
    }
    write_text(save_dir / "config.json", json.dumps(config | environment(), indent=2) + "\n")
    with write_atomically(save_dir / "splits.csv") as temporary:
        metadata.to_csv(temporary, index=False, errors="surrogateescape")


def _read_config(save_dir: Path) -> dict[str, Any]:
    path = save_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config if isinstance(config["runs"], dict) else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by this program; choose another --save_dir"
        ) from error


def _describe_run(settings: Settings, metadata: "pd.DataFrame") -> dict[str, Any]:
    """What a model's results depend on, as JSON gives it back."""
    images = metadata[["path", "class", "content_hash", "split"]].to_csv(index=False)
    digest = hashlib.sha256(images.encode("utf-8", "surrogateescape")).hexdigest()
    kept = {name: value for name, value in asdict(settings).items() if name not in NOT_RESULTS}
    kept |= {"images and splits": digest[:16], "processes": _world_size()}
    return json.loads(json.dumps(kept))


def _check_same_run(settings: Settings, runs: dict[str, Any], run: dict[str, Any]) -> None:
    """Raises ValueError when what stands in `save_dir` is no beginning of this run."""
    for model in settings.models:
        folder = Path(settings.save_dir) / model
        if not any((folder / name).exists() for name in ("metrics.json", "last.pth")):
            continue
        before = runs.get(model, {})
        differing = [
            f"{n} was {before.get(n)}, is {run[n]}" for n in run if before.get(n) != run[n]
        ]
        if differing:
            raise ValueError(
                f"--resume: {folder} is of another run: {'; '.join(differing)}; run without "
                "--resume, or with another --save_dir"
            )


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
    from models import count_parameters, load_model
    from results import leave_results
    from training import evaluate, make_optimizer, train, warmup_cosine
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
    if not _is_first():
        return
    images_a_step = settings.batch_size * settings.accumulate * _world_size()
    about = {
        "model": name,
        "classes": classes,
        "training_time": _training_time(history, images_a_step),
        "parameters": count_parameters(model),
        "trainable_parameters": count_parameters(model, trainable_only=True),
    }
    plot_learning_curves(history, title=name, save_path=folder / "learning_curves.png")
    _, info = load_model(folder / "model.pth")
    leave_results(folder, about, model, info, evaluation, test, seed=settings.seed)


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
            "training time": comparison["training_time"].map(_duration),
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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _show_warning(message: Warning | str, *details: Any) -> None:
    if _is_first():
        say(PROGRAM, "warning", message)


if __name__ == "__main__":
    speak_utf8()
    sys.exit(main())
