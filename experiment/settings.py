"""The flags of `train_models.py`: each is one field of `Settings`.

The parser, `config.json` and the printed command follow from the fields.
"""

import argparse
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

from experiment import console
from experiment.console import flag_field, number_type
from learning.processes import get_world_size, is_first_process, torchrun_variable

PROGRAM = "train_models.py"
MODEL_NAMES = ("simple_cnn", "resnet_scratch", "resnet_head", "resnet_finetuned")

_positive = number_type(int, lambda n: n >= 1, "1 or more")
_natural = number_type(int, lambda n: n >= 0, "0 or more")
_side = number_type(int, lambda n: n >= 16, "16 or more")
_seed = number_type(int, lambda n: 0 <= n < 2**63, "0 or more and less than 2**63")
_rate = number_type(float, lambda x: 0 < x < math.inf, "greater than 0")
_decay = number_type(float, lambda x: 0 <= x < math.inf, "0 or more")
_share = number_type(float, lambda x: 0 <= x <= 1, "from 0 to 1")
_part = number_type(float, lambda x: 0 < x < 1, "greater than 0 and less than 1")
_dropout = number_type(float, lambda x: 0 <= x < 1, "0 or more and less than 1")


def flag(
    default: Any,
    help: str,
    metavar: str | tuple[str, ...] | None = None,
    *,
    audit: bool = False,
    result: bool = True,
    no_effect: Mapping[str, str] = MappingProxyType({}),
    used_by: Callable[[str, Any], bool] | None = None,
    **options: Any,
) -> Any:
    """Returns a dataclass field that is a flag of the command.

    Parameters
    ----------
    audit : whether it has an effect with --audit_only, which neither splits nor trains
    result : whether a model's results depend on it, so that a run is resumed only with the same
    used_by : whether the model of a name makes use of a value; None: every model does

    All else is as in `flag_field`.
    """
    no_effect = {**no_effect} if audit else {**no_effect, "--audit_only": ""}
    made = flag_field(default, help, metavar, no_effect=no_effect, **options)
    metadata = made.metadata | {"result": result, "used_by": used_by}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The settings of a run; each is a flag of the same name."""

    # None never gets past `parse_arguments`: the folder is given, or is that of the demo.
    data_dir: str = flag(None, "images, one sub-folder a class", "DIR", audit=True, result=False)
    save_dir: str = flag("models", "where results go", "DIR", audit=True, result=False)
    cache_dir: str | None = flag(
        None, "prepared images (None: processed/ beside data_dir)", "DIR", audit=True, result=False
    )
    models: tuple[str, ...] = flag(MODEL_NAMES, ", ".join(MODEL_NAMES), "NAME", result=False)
    layers: int = flag(
        50, "depth of the ResNets", type=int, choices=(18, 34, 50),
        used_by=lambda model, _: model.startswith("resnet_"),
    )  # fmt: skip
    image_size: int = flag(224, "side of the square images", "PIXELS", type=_side, audit=True)
    weights: str = flag(
        "imagenet", "start of the two pretrained models", "imagenet|none|FILE",
        # That no model starts from a file is an error, which comes later.
        used_by=lambda model, weights: (
            weights not in ("imagenet", "none") or model.endswith(("_head", "_finetuned"))
        ),
    )  # fmt: skip
    labels_csv: str | None = flag(
        None, "classes that override the folders' names", "FILE", audit=True, result=False
    )
    label_column: str | None = flag(
        None, "the column that alone gives the classes", "NAME", audit=True
    )
    label_conflicts: str = flag(
        "keep", "images of one group that have several classes", choices=("keep", "drop", "error")
    )
    metadata_csv: str | None = flag(
        None, "a table to add, by path, image_id or isic_id", "FILE", audit=True, result=False
    )
    group_by: tuple[str, ...] = flag((), "its columns that keep images together", "NAME")
    splits: tuple[float, ...] = flag(
        (0.7, 0.2, 0.1), "fractions", ("TRAIN", "VALID", "TEST"), nargs=3, type=_part,
        no_effect={"--splits_csv": ""},
    )  # fmt: skip
    split_by: str = flag(
        "random", "folders: Train and Test as they are", choices=("random", "folders"),
        audit=True, no_effect={"--splits_csv": ""},
    )  # fmt: skip
    splits_csv: str | None = flag(
        None, "splits from a table, such as an earlier splits.csv", "FILE",
        audit=True, result=False,
    )  # fmt: skip
    batch_size: int = flag(32, "images a batch", "N", type=_positive)
    accumulate: int = flag(1, "batches a step, gradients averaged", "N", type=_positive)
    num_steps: int = flag(2000, "training steps", "N", type=_positive)
    learning_rate: float = flag(0.001, "the peak", "X", type=_rate)
    weight_decay: float = flag(1e-4, "of AdamW", "X", type=_decay)
    dropout_rate: float = flag(0.7, "of both dropout layers in the head", "P", type=_dropout)
    warmup_fraction: float = flag(
        0.2, "share of the steps", "X", type=_share, no_effect={"--schedule constant": ""}
    )
    schedule: str = flag(
        "cosine", "warm-up and cosine, or the peak always", choices=("cosine", "constant")
    )
    augmentation: bool = flag(True, "vary the training images")
    balanced: bool = flag(True, "draw the classes evenly")
    class_weights: str = flag(
        "none", "weigh the loss against imbalance", choices=("none", "balanced")
    )
    malignant_classes: tuple[str, ...] = flag(
        (), "what is screened for (none given: the classes known as malignant)", "NAME"
    )
    eval_every: int = flag(100, "steps between evaluations", "N", type=_positive)
    early_stopping_patience: int = flag(0, "evaluations; 0 is off", "N", type=_natural)
    checkpoint_every: int | None = flag(
        None, "steps (None: every five minutes)", "N", type=_positive, result=False
    )
    precision: str = flag(
        "auto", "auto: bf16 where the hardware computes in it",
        choices=("auto", "fp32", "bf16", "fp16"),
    )  # fmt: skip
    compile: bool = flag(False, "run the training steps through torch.compile")
    device: str = flag("auto", "auto: CUDA where there is one", "auto|cpu|cuda", result=False)
    deterministic: bool = flag(
        False, "the same weights on CUDA too, but slower",
        no_effect={"--device cpu": "the weights are the same there without it"},
    )  # fmt: skip
    num_workers: int | None = flag(
        None, "threads that build, workers that load", "N", type=_natural, audit=True, result=False
    )
    seed: int = flag(42, "decides all that is random", "N", type=_seed)
    skip_unreadable: bool = flag(False, "go on without images that cannot be read")
    resume: bool = flag(False, "go on with the run in save_dir", result=False)
    overwrite: bool = flag(False, "start afresh, and replace what is in save_dir", result=False)
    audit_only: bool = flag(
        False, "look for faults in the images, train nothing", audit=True, result=False
    )


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
# Settings on which no result depends: a run may be resumed with others.
NOT_RESULTS = {each.name for each in fields(Settings) if not each.metadata["result"]}
# The flags that have an effect with --audit_only, which neither splits nor trains.
OF_AUDIT = {"demo"} | {
    each.name for each in fields(Settings) if "--audit_only" not in each.metadata["no_effect"]
}


def parse_arguments(
    argv: Sequence[str], settings_class: type[Settings] = Settings
) -> tuple[Settings, bool]:
    """Returns the settings and whether this is the demo; exits with status 2 for a wrong flag."""
    argv = [console.with_underscores(word) for word in argv]
    parser = make_parser(settings_class)
    arguments = vars(parser.parse_args(argv))
    if arguments["demo"]:
        parser.set_defaults(**asdict(DEMO_SETTINGS))
        arguments = vars(parser.parse_args(argv))
    elif arguments["data_dir"] is None:
        parser.error("give a folder of images with --data_dir, or try it without one with --demo")
    _check_effects(parser, settings_class, console.given_flags(parser, argv), arguments)
    is_demo = arguments.pop("demo")
    arguments["models"] = dict.fromkeys(arguments["models"])
    for each in fields(settings_class):
        if isinstance(each.default, tuple):
            arguments[each.name] = tuple(arguments[each.name])
    settings = settings_class(**arguments)
    if abs(sum(settings.splits) - 1) > 1e-6:
        shown = " ".join(f"{fraction:g}" for fraction in settings.splits)
        parser.error(f"--splits {shown} sums to {sum(settings.splits):g}, not to 1")
    return settings, is_demo


def _check_effects(
    parser: argparse.ArgumentParser,
    settings_class: type[Settings],
    given: set[str],
    arguments: Mapping[str, Any],
) -> None:
    """Ends with status 2 for a flag that has no effect beside the others that were given.

    For a flag that none of the chosen models uses it is a warning, as one command line may be meant
    for any choice of models.
    """
    if arguments["resume"] and arguments["overwrite"]:
        parser.error("--resume goes on with a run, --overwrite starts it afresh; give one of them")
    console.check_flag_fields(parser, settings_class, given, arguments)
    if "splits" in given and arguments["split_by"] == "folders":
        from imaging.sources import has_folder_of_split

        if has_folder_of_split(arguments["data_dir"], "valid"):
            mode = "--split_by folders where there is a folder for validation"
            parser.error(f"--splits has no effect with {mode}")
    models = dict.fromkeys(arguments["models"])
    for each in fields(settings_class):
        is_used = each.metadata["used_by"] or (lambda model, value: True)
        is_unused = not any(is_used(model, arguments[each.name]) for model in models)
        if each.name in given and is_unused and is_first_process():
            message = f"--{each.name} has no effect with --models {' '.join(models)}"
            console.print_message(PROGRAM, "warning", message)


def make_parser(settings_class: type[Settings] = Settings) -> argparse.ArgumentParser:
    """Returns the parser of all flags, with the defaults of `Settings`."""
    parser = console.Parser(
        prog=PROGRAM,
        description="Trains, evaluates, plots and compares models of skin lesions.",
        epilog="For research and teaching, not for diagnosis.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--demo", action="store_true", help="draw a small set and train on it")
    for each in fields(settings_class):
        group = source if each.name == "data_dir" else parser
        group.add_argument(f"--{each.name}", default=each.default, **each.metadata["options"])
    return parser


def command(settings: Settings, is_demo: bool = False) -> str:
    """Returns the command that gives these settings, without those that are the defaults."""
    words = [*_launcher(), PROGRAM, *(["--demo"] if is_demo else [])]
    for each in fields(settings):
        value = getattr(settings, each.name)
        default = getattr(DEMO_SETTINGS, each.name, each.default) if is_demo else each.default
        if value == default:
            continue
        if isinstance(value, bool):
            words.append(f"--{each.name}" if value else f"--no-{each.name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{each.name}", *map(str, values)]
    return shlex.join(words)


def _launcher() -> list[str]:
    """The words of the command before the script."""
    if get_world_size() == 1:
        return ["python"]
    processes, nodes = os.environ["LOCAL_WORLD_SIZE"], torchrun_variable("GROUP_WORLD_SIZE", 1)
    of_nodes = [f"--nnodes={nodes}"] if nodes > 1 else []
    return ["torchrun", *of_nodes, f"--nproc_per_node={processes}"]
