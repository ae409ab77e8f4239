"""Every flag of `train_models.py` once: name, type, default, help."""

import argparse
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from experiment.console import (
    Parser,
    check_flags_have_effect,
    given_flags,
    print_message,
    with_underscores,
)
from experiment.console import number_type as _number
from learning.processes import get_world_size, is_first_process, torchrun_variable

PROGRAM = "train_models.py"
MODEL_NAMES = ("simple_cnn", "resnet_scratch", "resnet_head", "resnet_finetuned")
# Settings on which no result depends: a run may be resumed with others.
NOT_RESULTS = {
    "data_dir", "save_dir", "cache_dir", "labels_csv", "metadata_csv", "splits_csv", "models",
    "device", "num_workers", "checkpoint_every", "resume", "overwrite", "audit_only",
}  # fmt: skip
# The flags that have an effect with --audit_only, which neither splits nor trains.
OF_AUDIT = {
    "data_dir", "demo", "save_dir", "cache_dir", "image_size", "labels_csv", "label_column",
    "metadata_csv", "split_by", "splits_csv", "num_workers", "audit_only",
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
    overwrite: bool = False
    audit_only: bool = False


DEMO_SETTINGS = Settings(
    data_dir="data/demo",
    save_dir="models/demo",
    layers=18,
    image_size=32,
    num_steps=280,
    eval_every=70,
    learning_rate=0.003,
    dropout_rate=0.1,
)


def parse_arguments(argv: Sequence[str]) -> tuple[Settings, bool]:
    """The settings, and whether this is the demo; exits with status 2 for a flag that is wrong."""
    argv = [with_underscores(word) for word in argv]
    parser = make_parser()
    arguments = vars(parser.parse_args(argv))
    if arguments["demo"]:
        parser.set_defaults(**asdict(DEMO_SETTINGS))
        arguments = vars(parser.parse_args(argv))
    elif arguments["data_dir"] is None:
        parser.error("give a folder of images with --data_dir, or try it without one with --demo")
    _check_effects(parser, given_flags(parser, argv), arguments)
    is_demo = arguments.pop("demo")
    arguments["models"] = tuple(dict.fromkeys(arguments["models"]))
    arguments["splits"] = tuple(arguments["splits"])
    arguments["group_by"] = tuple(arguments["group_by"])
    arguments["malignant_classes"] = tuple(arguments["malignant_classes"])
    if abs(sum(arguments["splits"]) - 1) > 1e-6:
        shown = " ".join(f"{fraction:g}" for fraction in arguments["splits"])
        parser.error(f"--splits {shown} sums to {sum(arguments['splits']):g}, not to 1")
    return Settings(**arguments), is_demo


def _check_effects(
    parser: argparse.ArgumentParser, given: set[str], arguments: dict[str, Any]
) -> None:
    """Ends with status 2 for a flag that has no effect beside the others that were given."""
    if arguments["audit_only"]:
        check_flags_have_effect(parser, given, "--audit_only", dict.fromkeys(given - OF_AUDIT, ""))
    if arguments["resume"] and arguments["overwrite"]:
        parser.error("--resume goes on with a run, --overwrite starts it afresh; give one of them")
    if arguments["schedule"] == "constant":
        check_flags_have_effect(parser, given, "--schedule constant", {"warmup_fraction": ""})
    if arguments["splits_csv"] is not None:
        unused = {"splits": "", "split_by": ""}
        check_flags_have_effect(parser, given, "--splits_csv", unused)
    if arguments["device"] == "cpu":
        advice = "the weights are the same there without it"
        check_flags_have_effect(parser, given, "--device cpu", {"deterministic": advice})
    if "splits" in given and arguments["split_by"] == "folders":
        from dataset import has_folder_of_split

        if has_folder_of_split(arguments["data_dir"], "valid"):
            mode = "--split_by folders where there is a folder for validation"
            check_flags_have_effect(parser, given, mode, {"splits": ""})
    _warn_of_unused_flags(given, arguments)


def _warn_of_unused_flags(given: set[str], arguments: dict[str, Any]) -> None:
    """Warns of flags that none of the chosen models uses.

    That is no error, as one command line may be meant for any choice of models.
    """
    models = dict.fromkeys(arguments["models"])
    used_by = {"layers": set(MODEL_NAMES) - {"simple_cnn"}}
    if arguments["weights"] in ("imagenet", "none"):  # of a file it is an error
        used_by["weights"] = {"resnet_head", "resnet_finetuned"}
    for name in sorted(given & used_by.keys()):
        if not models.keys() & used_by[name]:
            show_warning(f"--{name} has no effect with --models {' '.join(models)}")


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags, with the defaults of `Settings`."""
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
    add("--overwrite", action="store_true", help="start afresh, and replace what is in save_dir")
    parser.set_defaults(**asdict(Settings()))
    return parser


def command(settings: Settings, is_demo: bool = False) -> str:
    """The command that gives these settings, without those that are the defaults anyway."""
    words = [*_launcher(), "train_models.py", *(["--demo"] if is_demo else [])]
    defaults = DEMO_SETTINGS if is_demo else Settings()
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if value == getattr(defaults, field.name):
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        elif isinstance(value, tuple):
            words += [f"--{field.name}", *map(str, value)]
        else:
            words += [f"--{field.name}", str(value)]
    return shlex.join(words)


def _launcher() -> list[str]:
    """The words of the command before the script."""
    if get_world_size() == 1:
        return ["python"]
    processes, nodes = os.environ["LOCAL_WORLD_SIZE"], torchrun_variable("GROUP_WORLD_SIZE", 1)
    of_nodes = [f"--nnodes={nodes}"] if nodes > 1 else []
    return ["torchrun", *of_nodes, f"--nproc_per_node={processes}"]


def show_warning(message: Warning | str, *details: Any) -> None:
    """Prints a warning in one line, in the first process alone: for `warnings.showwarning`."""
    if is_first_process():
        print_message(PROGRAM, "warning", message)
