"""The flags of `predict.py`: each is one field of `Settings`; torch-free."""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from experiment import console
from experiment.console import flag_field
from inference.options import NUM_VIEWS

PROGRAM = "predict.py"
_positive = console.number_type(int, lambda n: 1 <= n < 2**31, "at least 1 and less than 2**31")
_views = console.number_type(int, lambda n: 1 <= n <= NUM_VIEWS, f"from 1 to {NUM_VIEWS}")
_probability = console.number_type(float, lambda p: 0 <= p <= 1, "a probability from 0 to 1")


def _threshold(text: str) -> tuple[str, float]:
    name, _, probability = text.rpartition("=")
    if not name.strip():
        raise argparse.ArgumentTypeError(f"must be of the form NAME=0.2, not {text!r}")
    return name.strip(), _probability(probability)


def _text(text: str) -> str:
    if not text.strip():  # such as a variable of the shell that is not set
        raise argparse.ArgumentTypeError("must not be empty")
    return text


# The groups of flags in the order of --help.
GROUPS = ("common", "prediction", "evaluation", "export", "machine")
EXAMPLES = """\
examples:
  python predict.py --model models/resnet_head/model.pth new_images
  python predict.py --model models/resnet_head/model.pth --output table.csv new_images
  python predict.py --model models/resnet_head/model.pth --gradcam maps lesion.jpg
  python predict.py --model models/resnet_head/model.pth --evaluate report other_hospital
  python predict.py --model models/resnet_head/model.pth --features table.npz new_images
  python predict.py --model models/resnet_head/model.pth --export model.onnx

Exit status: 0 if all is well, 1 if an image could not be read, 2 if the command cannot be run.
For research and teaching, not for diagnosis.
"""


def _flag(*arguments: Any, evaluate: str | None = None, **options: Any) -> Any:
    """Returns the field of a flag without effect with --export, and, given advice, other modes."""
    no_effect = {"--export": ""}
    if evaluate is not None:
        no_effect |= {"--evaluate": evaluate, "--features": ""}
    return flag_field(*arguments, no_effect=no_effect, **options)


@dataclass(frozen=True)
class Settings:
    """The settings of the command; each is a flag of the same name, but for `images`."""

    images: tuple[str, ...] = flag_field(
        (),
        "images, folders of images, .txt lists or .csv tables of files",
        "IMAGE_OR_FOLDER",
        group="common",
        nargs="*",
    )
    model: tuple[str, ...] = flag_field(
        None, "a model.pth or its folder; several --model form an ensemble", "PATH",
        group="common",
        type=_text, action="append", required=True,
    )  # fmt: skip
    output: str | None = _flag(
        None, "write the predictions to a .csv or .json file", "FILE", group="common", type=_text,
        evaluate="its tables of predictions are in the folder that it is given",
    )  # fmt: skip
    top_k: int = _flag(
        3, "how many probabilities to print for each image", "N", group="prediction",
        type=_positive, evaluate="",
    )  # fmt: skip
    tta: int = _flag(
        1, "average over this many flips and quarter-turns of each image, 1 to 8", "N",
        group="prediction", type=_views, evaluate="",
    )  # fmt: skip
    gradcam: str | None = _flag(
        None, "save a Grad-CAM figure of each image in this folder", "DIR", group="prediction",
        type=_text, evaluate="it draws examples for each class by itself",
    )  # fmt: skip
    threshold: Mapping[str, float] | None = _flag(
        None, "flag images whose probability of a class, or of malignant, is at least P; can be "
        "repeated (default: the model's own, for a sensitivity of 95 %)", "NAME=P",
        group="prediction", type=_threshold, action="append",
        evaluate="it reports several thresholds of each model's own",
    )  # fmt: skip
    device: str = _flag(
        "auto", "device to predict on; auto is CUDA if available", "auto|cpu|cuda",
        group="machine",
    )  # fmt: skip
    precision: str = _flag(
        "auto", "precision of the model; auto is bf16 where the hardware supports it",
        choices=("auto", "fp32", "bf16", "fp16"), group="machine",
    )  # fmt: skip
    batch_size: int = _flag(32, "images per batch", "N", group="machine", type=_positive)
    num_workers: int | None = _flag(
        None, "threads that decode images (default: one for each core)", "N", group="machine",
        type=_positive,
    )  # fmt: skip
    evaluate: str | None = flag_field(
        None, "measure the models on a folder of labelled images, and report in DIR", "DIR",
        group="evaluation", type=_text,
    )  # fmt: skip
    labels_csv: str | None = _flag(
        None, "table of classes that override the folder names", "FILE", group="evaluation",
        type=_text,
    )  # fmt: skip
    label_column: Sequence[str] | None = _flag(
        None, "column that gives the classes in place of the folder names; repeated, one-hot "
        "columns", "NAME", group="evaluation", type=_text, action="append",
    )  # fmt: skip
    id_column: str | None = _flag(
        None, "column of the table that names the images (default: the one that matches most)",
        "NAME", group="evaluation", type=_text,
    )  # fmt: skip
    class_names: Sequence[str] | None = _flag(
        None, "class of number 0 in the column, repeated for 1, 2, ...", "NAME",
        group="evaluation", type=_text, action="append",
    )  # fmt: skip
    class_map: Sequence[str] | None = _flag(
        None, "new name of a class of the model and the images, can be repeated; probabilities of "
        "equal ones add up, a class without one is left out; or a table with the columns old and "
        "new", "OLD=NEW", group="evaluation", type=_text, action="append",
    )  # fmt: skip
    unlabelled: str = _flag(
        "error", "what to do with images without a label", choices=("error", "drop"),
        group="evaluation",
    )  # fmt: skip
    features: str | None = flag_field(
        None, "write the features of the images to an .npz file, and predict nothing", "FILE",
        group="export", type=_text,
    )  # fmt: skip
    export: str | None = flag_field(
        None, "write the model as ONNX, checked against PyTorch, and predict nothing", "FILE",
        group="export", type=_text,
    )  # fmt: skip
    overwrite: bool = flag_field(False, "replace existing files", group="common")


OF_EVALUATION = {
    each.name for each in fields(Settings) if each.metadata["group"] == "evaluation"
} - {"evaluate"}
# By mode the flags without effect in it, and what to do instead; kept for those who import it.
WITHOUT_EFFECT = {
    mode: {
        each.name: each.metadata["no_effect"][f"--{mode}"]
        for each in fields(Settings)
        if f"--{mode}" in each.metadata["no_effect"]
    }
    for mode in ("evaluate", "features", "export")
}


def parse_arguments(argv: Sequence[str]) -> Settings:
    """Returns the settings; exits with status 2 for a flag that is wrong."""
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)  # what follows are images, whatever it is
    flags = [console.with_underscores(word) for word in argv[:end]]
    parser = make_parser()
    parser.check_flags(flags)
    arguments = vars(parser.parse_intermixed_args(flags))
    arguments["images"] = (*arguments["images"], *argv[end + 1 :])
    arguments["model"] = tuple(arguments["model"])
    _check_mode(parser, arguments, console.given_flags(parser, flags))
    if arguments["threshold"] is not None:
        arguments["threshold"] = dict(arguments["threshold"])
    return Settings(**arguments)


def _check_mode(
    parser: argparse.ArgumentParser, arguments: dict[str, Any], given: set[str]
) -> None:
    """Ends with status 2 for flags and images that do not go together."""
    images = arguments["images"]
    modes = [mode for mode in ("evaluate", "features", "export") if mode in given]
    if len(modes) > 1:
        parser.error(f"--{modes[0]} and --{modes[1]} cannot be combined; give one at a time")
    console.check_flag_fields(parser, Settings, given, arguments)
    if arguments["export"] is not None:
        if images:
            parser.error("--export takes no images; leave them out, or leave out --export")
        if len(arguments["model"]) > 1:
            parser.error("--export takes one --model; export one at a time")
    elif arguments["evaluate"] is not None:
        if len(images) != 1:
            parser.error("--evaluate takes one folder of labelled images")
        for name in sorted(given & {"label_column", "id_column", "class_names"}):
            if "labels_csv" not in given:
                parser.error(f"--{name} needs the table that has the column: --labels_csv")
    else:
        if not images:
            parser.error("give the images or folders to predict")
        if arguments["features"] is not None and len(arguments["model"]) > 1:
            parser.error("--features takes one --model; write those of one at a time")
        for name in sorted(given & OF_EVALUATION):
            mode = "without --evaluate" if arguments["features"] is None else "with --features"
            parser.error(f"--{name} has no effect {mode}")
        if "overwrite" in given and not given & {"output", "gradcam", "features"}:
            parser.error("--overwrite has no effect without --output or another flag that writes")
    for name, number in Counter(name for name, _ in arguments["threshold"] or ()).items():
        if number > 1:
            parser.error(f"--threshold {name} is given twice")


def make_parser() -> console.Parser:
    """Returns the parser of all flags, with the defaults of `Settings`."""
    parser = console.Parser(
        prog=PROGRAM,
        description="Predicts the classes of images of skin lesions with trained models.",
        usage=f"{PROGRAM} --model FILE [--model FILE ...] [flags] IMAGE_OR_FOLDER ...",
        epilog=EXAMPLES,
    )
    groups = parser.add_groups(GROUPS)
    for each in fields(Settings):
        name = each.name if each.name == "images" else f"--{each.name}"
        groups[each.metadata["group"]].add_argument(
            name, default=each.default, **each.metadata["options"]
        )
    return parser
