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
from typing import Any, NoReturn

from experiment import console
from experiment.console import flag_field, number_type
from learning.processes import get_world_size, is_first_process, torchrun_variable

PROGRAM = "train_models.py"
MODEL_NAMES = ("simple_cnn", "resnet_scratch", "resnet_head", "resnet_finetuned")

# The groups of flags in the order of --help.
GROUPS = ("common", "data", "model", "training", "evaluation", "machine", "run")
EXAMPLES = """\
examples:
  python train_models.py --demo
  python train_models.py --data_dir ./data/raw --save_dir ./models
  python train_models.py --data_dir ./data/raw --models resnet_finetuned --layers 18
  python train_models.py --data_dir ./data/raw --save_dir ./models --resume
  python train_models.py --data_dir ./data/raw --audit_only --save_dir ./audit

For research and teaching, not for diagnosis. docs/training.md explains every flag.
"""

_positive = number_type(int, lambda n: n >= 1, "at least 1")
_natural = number_type(int, lambda n: n >= 0, "at least 0")
_side = number_type(int, lambda n: n >= 16, "at least 16")
_seed = number_type(int, lambda n: 0 <= n < 2**63, "at least 0 and less than 2**63")
_rate = number_type(float, lambda x: 0 < x < math.inf, "greater than 0")
_decay = number_type(float, lambda x: 0 <= x < math.inf, "at least 0")
_share = number_type(float, lambda x: 0 <= x <= 1, "from 0 to 1")
_part = number_type(float, lambda x: 0 < x < 1, "greater than 0 and less than 1")
_dropout = number_type(float, lambda x: 0 <= x < 1, "at least 0 and less than 1")


def flag(
    default: Any,
    help: str,
    metavar: str | tuple[str, ...] | None = None,
    *,
    group: str = "run",
    audit: bool = False,
    result: bool = True,
    no_effect: Mapping[str, str] = MappingProxyType({}),
    used_by: Callable[[str, Any], bool] | None = None,
    **options: Any,
) -> Any:
    """Returns a dataclass field that is a flag of the command.

    Parameters
    ----------
    group : one of `GROUPS`
    audit : whether it has an effect with --audit_only, which neither splits nor trains
    result : whether a model's results depend on it, so that a run is resumed only with the same
    used_by : whether the model of a name makes use of a value; None: every model does

    All else is as in `flag_field`.
    """
    no_effect = {**no_effect} if audit else {**no_effect, "--audit_only": ""}
    made = flag_field(default, help, metavar, group=group, no_effect=no_effect, **options)
    metadata = made.metadata | {"result": result, "used_by": used_by}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The settings of a run; each is a flag of the same name."""

    # None never gets past `parse_arguments`: the folder is given, or is that of the demo.
    data_dir: str = flag(
        None, "folder of images, with a subfolder for each class", "DIR", group="common",
        audit=True, result=False,
    )  # fmt: skip
    save_dir: str = flag(
        "models", "folder for the results", "DIR", group="common", audit=True, result=False
    )
    cache_dir: str | None = flag(
        None, "folder for prepared images (default: processed/ beside data_dir)", "DIR",
        group="data", audit=True, result=False,
    )  # fmt: skip
    models: tuple[str, ...] = flag(
        MODEL_NAMES, "models to train and compare", "NAME", group="common", result=False
    )
    layers: int = flag(
        50, "depth of the ResNets", type=int, choices=(18, 34, 50), group="model",
        used_by=lambda model, _: model.startswith("resnet_"),
    )  # fmt: skip
    image_size: int = flag(
        224, "side length of the square images", "PIXELS", group="common", type=_side, audit=True
    )
    weights: str = flag(
        "imagenet", "initial weights of the pretrained models", "imagenet|none|FILE",
        group="model",
        # That no model starts from a file is an error, which comes later.
        used_by=lambda model, weights: (
            weights not in ("imagenet", "none") or model.endswith(("_head", "_finetuned"))
        ),
    )  # fmt: skip
    layout: str | None = flag(
        None, "layout of data_dir, one of --layouts (default: recognised by its files)", "NAME",
        group="data", audit=True, result=False,
    )  # fmt: skip
    labels_csv: str | None = flag(
        None, "table of classes that override the folder names", "FILE", group="data",
        audit=True, result=False,
    )  # fmt: skip
    label_column: tuple[str, ...] = flag(
        (), "column that gives the classes in place of the folder names, or one-hot columns",
        "NAME", group="data", audit=True,
    )  # fmt: skip
    class_names: tuple[str, ...] = flag(
        (), "classes by their numbers in the column, from 0", "NAME", group="data", audit=True,
        result=False,
    )  # fmt: skip
    class_map: tuple[str, ...] = flag(
        (), "new names of classes; equal ones are merged, those without one left out; or a table "
        "with the columns old and new", "OLD=NEW", group="data", audit=True, result=False,
    )  # fmt: skip
    unlabelled: str = flag(
        "error", "what to do with images without a label", choices=("error", "drop"), group="data",
        audit=True, result=False,
    )  # fmt: skip
    accept_class_names: bool = flag(
        False, "accept classes that do not look like classes, such as images or test",
        group="data", audit=True, result=False,
    )  # fmt: skip
    label_conflicts: str = flag(
        "keep", "what to do with copies of an image that have different classes",
        choices=("keep", "drop", "error"), group="data",
    )  # fmt: skip
    metadata_csv: str | None = flag(
        None, "table of more columns, such as age or patient", "FILE", group="data",
        audit=True, result=False,
    )  # fmt: skip
    id_column: str | None = flag(
        None, "column of the tables that names the images (default: the one that matches most)",
        "NAME", group="data", audit=True, result=False,
    )  # fmt: skip
    group_by: tuple[str, ...] | None = flag(
        None, "columns whose equal values keep images in one split (default: lesion_id and "
        "patient_id where there are such columns; none if empty)", "NAME", group="data", nargs="*",
    )  # fmt: skip
    splits: tuple[float, ...] = flag(
        (0.7, 0.2, 0.1), "fractions of the images", ("TRAIN", "VALID", "TEST"), group="data",
        nargs=3, type=_part, no_effect={"--splits_csv": ""},
    )  # fmt: skip
    split_by: str = flag(
        "random", "folders: keep the splits of the folders Train, Valid and Test; official: those "
        "of a column split", choices=("random", "folders", "official"), group="data", audit=True,
        no_effect={"--splits_csv": ""},
    )  # fmt: skip
    splits_csv: str | None = flag(
        None, "table of splits, such as an earlier splits.csv", "FILE", group="data",
        audit=True, result=False,
    )  # fmt: skip
    batch_size: int = flag(32, "images per batch", "N", group="common", type=_positive)
    accumulate: int = flag(
        1, "batches per step, whose gradients are averaged", "N", group="training", type=_positive
    )
    num_steps: int = flag(2000, "training steps", "N", group="common", type=_positive)
    learning_rate: float = flag(0.001, "peak learning rate", "X", group="common", type=_rate)
    weight_decay: float = flag(1e-4, "weight decay of AdamW", "X", group="training", type=_decay)
    dropout_rate: float = flag(
        0.7, "dropout of both layers in the head", "P", group="model", type=_dropout
    )
    warmup_fraction: float = flag(
        0.2, "share of the steps in which the learning rate rises", "X", group="training",
        type=_share, no_effect={"--schedule constant": ""},
    )  # fmt: skip
    schedule: str = flag(
        "cosine", "learning rate: warm-up and cosine decay, or constant",
        choices=("cosine", "constant"), group="training",
    )  # fmt: skip
    augmentation: bool = flag(True, "vary the training images at random", group="training")
    cached_features: bool = flag(
        False, "compute the features of frozen backbones once, in eight flips and quarter-turns",
        group="training", used_by=lambda model, is_on: not is_on or model.endswith("_head"),
    )  # fmt: skip
    balanced: bool = flag(True, "sample all classes equally often", group="training")
    class_weights: str = flag(
        "none", "weight the loss by class size", choices=("none", "balanced"), group="training"
    )
    malignant_classes: tuple[str, ...] = flag(
        (), "classes that count as malignant (default: those known to be)", "NAME",
        group="evaluation",
    )  # fmt: skip
    eval_every: int = flag(
        100, "steps between evaluations", "N", group="evaluation", type=_positive
    )
    early_stopping_patience: int = flag(
        0, "evaluations without improvement after which training stops; 0 is never", "N",
        group="evaluation", type=_natural,
    )  # fmt: skip
    checkpoint_every: int | None = flag(
        None, "steps between checkpoints (default: one every five minutes)", "N", group="run",
        type=_positive, result=False,
    )  # fmt: skip
    precision: str = flag(
        "auto", "precision of the model; auto is bf16 where the hardware supports it",
        choices=("auto", "fp32", "bf16", "fp16"), group="machine",
    )  # fmt: skip
    compile: bool = flag(False, "train with torch.compile", group="machine")
    device: str = flag(
        "auto", "device to train on; auto is CUDA if available", "auto|cpu|cuda", group="machine",
        result=False,
    )  # fmt: skip
    deterministic: bool = flag(
        False, "reproduce weights on CUDA bit for bit, more slowly", group="machine",
        no_effect={"--device cpu": "the weights are the same there without it"},
    )  # fmt: skip
    num_workers: int | None = flag(
        None, "threads that prepare and processes that load images", "N", group="machine",
        type=_natural, audit=True, result=False,
    )  # fmt: skip
    seed: int = flag(42, "seed of all that is random", "N", group="run", type=_seed)
    skip_unreadable: bool = flag(
        False, "leave out images that cannot be read, instead of stopping", group="data"
    )
    resume: bool = flag(False, "continue the run in save_dir", group="run", result=False)
    overwrite: bool = flag(
        False, "start over, and replace the results in save_dir", group="run", result=False
    )
    audit_only: bool = flag(
        False, "look for faults in the images and train nothing", group="run", audit=True,
        result=False,
    )  # fmt: skip


DEMO_SETTINGS = Settings(
    data_dir="data/demo",
    save_dir="models/demo",
    models=(
        "simple_cnn", "efficientnet_lite0_scratch", "efficientnet_lite0_head",
        "efficientnet_lite0_finetuned",
    ),
    image_size=64,
    num_steps=200,
    eval_every=50,
    dropout_rate=0.1,
)  # fmt: skip
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
    parser.check_flags(argv)
    arguments = vars(parser.parse_args(argv))
    if arguments["demo"]:
        parser.set_defaults(**asdict(DEMO_SETTINGS))
        arguments = vars(parser.parse_args(argv))
    elif arguments["data_dir"] is None:
        parser.error(
            "give a folder of images with --data_dir, or try the program without one with --demo"
        )
    _check_effects(parser, settings_class, console.given_flags(parser, argv), arguments)
    is_demo = arguments.pop("demo")
    arguments["models"] = dict.fromkeys(arguments["models"])
    arguments |= {n: tuple(v) for n, v in arguments.items() if isinstance(v, list | dict)}
    settings = settings_class(**arguments)
    if abs(sum(settings.splits) - 1) > 1e-6:
        shown = " ".join(f"{fraction:g}" for fraction in settings.splits)
        parser.error(f"--splits {shown} adds up to {sum(settings.splits):g}, not to 1")
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
        parser.error("--resume continues a run and --overwrite starts it over; give one of them")
    console.check_flag_fields(parser, settings_class, given, arguments)
    if "splits" in given and arguments["split_by"] == "folders":
        from imaging.splits import has_folder_of_split

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


class _PrintLayouts(argparse.Action):
    """Prints the table of layouts, and ends with status 0."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from imaging.layouts import describe_layouts

        print(describe_layouts())
        parser.exit()


def make_parser(settings_class: type[Settings] = Settings) -> console.Parser:
    """Returns the parser of all flags, with the defaults of `Settings`."""
    parser = console.Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} (--data_dir DIR | --demo) [flags]",
        description="Trains, evaluates and compares classifiers of skin lesions.",
        epilog=EXAMPLES,
    )
    groups = parser.add_groups(GROUPS)
    source = groups["common"].add_mutually_exclusive_group()
    source.add_argument("--demo", action="store_true", help="draw a small data set and train on it")
    groups["data"].add_argument(
        "--layouts", action=_PrintLayouts, nargs=0, default=argparse.SUPPRESS,
        help="print the published sets that are known, and what is read of them",
    )  # fmt: skip
    for each in fields(settings_class):
        group = source if each.name == "data_dir" else groups[each.metadata["group"]]
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
