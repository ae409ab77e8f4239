"""Every flag of train_models.py changes something in every mode, or is refused there.

A recorder takes the place of all that is expensive. What reaches the parts that do the work is
compared with and without the flag; a flag that is not in `FLAGS` below fails the first test.
"""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import dataset
import models
import training
from experiment import checks, images, pipeline, settings
from experiment.run_folder import TRAINING
from experiment.settings import OF_AUDIT, PROGRAM, Settings, command, flag, parse_arguments
from storage.weights import LoadedWeights
from train_models import main

# What is given to each flag, and before it what it needs to make sense.
FLAGS = {
    "data_dir": (["--data_dir", "other"], []),
    "demo": (["--demo"], []),
    "save_dir": (["--save_dir", "elsewhere"], []),
    "cache_dir": (["--cache_dir", "cache"], []),
    "skip_unreadable": (["--skip_unreadable"], []),
    "splits": (["--splits", "0.6", "0.2", "0.2"], []),
    "split_by": (["--split_by", "folders"], []),
    "splits_csv": (["--splits_csv", "splits.csv"], []),
    "layout": (["--layout", "ham10000"], []),
    "labels_csv": (["--labels_csv", "table.csv"], []),
    "label_column": (["--label_column", "class"], ["--labels_csv", "table.csv"]),
    "class_names": (["--class_names", "nevus", "melanoma"], ["--labels_csv", "numbers.csv"]),
    "class_map": (["--class_map", "nevus=benign"], []),
    "unlabelled": (["--unlabelled", "drop"], []),
    "label_conflicts": (["--label_conflicts", "drop"], []),
    "metadata_csv": (["--metadata_csv", "table.csv"], []),
    "group_by": (["--group_by", "patient"], ["--metadata_csv", "table.csv"]),
    "accept_class_names": (["--accept_class_names"], []),
    "id_column": (["--id_column", "path"], ["--metadata_csv", "table.csv"]),
    "audit_only": (["--audit_only"], []),
    "image_size": (["--image_size", "48"], []),
    "models": (["--models", "resnet_scratch"], []),
    "layers": (["--layers", "34"], []),
    "weights": (["--weights", "weights.pth"], ["--models", "resnet_head"]),
    "dropout_rate": (["--dropout_rate", "0.3"], []),
    "batch_size": (["--batch_size", "4"], []),
    "accumulate": (["--accumulate", "2"], []),
    "num_steps": (["--num_steps", "7"], []),
    "learning_rate": (["--learning_rate", "0.1"], []),
    "weight_decay": (["--weight_decay", "0.1"], []),
    "schedule": (["--schedule", "constant"], []),
    "warmup_fraction": (["--warmup_fraction", "0.1"], []),
    "augmentation": (["--no-augmentation"], []),
    "cached_features": (["--cached_features"], []),
    "balanced": (["--no-balanced"], []),
    "class_weights": (["--class_weights", "balanced"], []),
    "malignant_classes": (["--malignant_classes", "nevus"], []),
    "eval_every": (["--eval_every", "3"], []),
    "early_stopping_patience": (["--early_stopping_patience", "3"], []),
    "precision": (["--precision", "bf16"], []),
    "compile": (["--compile"], []),
    "device": (["--device", "cpu"], []),
    "deterministic": (["--deterministic"], []),
    "num_workers": (["--num_workers", "1"], []),
    "seed": (["--seed", "7"], []),
    "checkpoint_every": (["--checkpoint_every", "3"], []),
    "resume": (["--resume"], []),
    "overwrite": (["--overwrite"], ["--save_dir", "occupied"]),
}
MODES = {
    "train": ["--data_dir", "raw"],
    "audit_only": ["--data_dir", "raw", "--audit_only"],
    "demo": ["--demo"],
}
# Flags that are accepted in a mode without changing anything there, and why.
WITHOUT_EFFECT = {
    ("audit_only", "audit_only"): "it is the mode, given twice",
    ("demo", "demo"): "it is the mode, given twice",
}


class TrainingBegins(Exception):
    """Raised by the recorder in place of training, when all that a flag can change is known."""


def draw_images(root, counts):
    rng = np.random.default_rng(0)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{folder.split('/')[-1]}{i}.png")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with images and tables."""
    root = tmp_path_factory.mktemp("flags")
    counts = {"Train/melanoma": 24, "Train/nevus": 24, "Test/melanoma": 6, "Test/nevus": 6}
    for name in ("raw", "other", "data/demo"):
        draw_images(root / name, counts)
    paths = sorted(p.relative_to(root / "raw").as_posix() for p in (root / "raw").rglob("*.png"))
    table = pd.DataFrame({"path": paths, "class": ["b", "a"] * 30, "patient": range(60)})
    table.to_csv(root / "table.csv", index=False)
    table.assign(**{"class": ["0", "1"] * 30}).to_csv(root / "numbers.csv", index=False)
    splits = {"path": paths, "split": ["train"] * 40 + ["valid", "test"] * 10}
    pd.DataFrame(splits).to_csv(root / "splits.csv", index=False)
    torch_weights = models.get_model("resnet_scratch", 2, layers=18).backbone.state_dict()
    training.torch.save(torch_weights, root / "weights.pth")
    return root


@pytest.fixture
def outcome(workplace, monkeypatch, capfd):
    """A function that runs the command, and gives what reached those who do the work.

    Instead of that, it is the message when the command refuses the arguments.
    """
    monkeypatch.chdir(workplace)
    # Of the demo's own models, each takes a second to check.
    small = replace(settings.DEMO_SETTINGS, models=settings.MODEL_NAMES, layers=18)
    monkeypatch.setattr(settings, "DEMO_SETTINGS", small)
    monkeypatch.setenv("TORCH_HOME", str(workplace / "torch"))
    finished = workplace / "occupied/resnet_head/metrics.json"
    finished.parent.mkdir(parents=True, exist_ok=True)
    finished.write_text("{}")
    config = {"kind": TRAINING, "settings": {"data_dir": "data/demo"}, "runs": {"resnet_head": {}}}
    (workplace / "occupied/config.json").write_text(json.dumps(config))
    tiny = models.get_model("simple_cnn", 2, image_size=32)
    tiny.is_frozen = True  # as in a model whose features can be cached
    record = {}

    def recorded(function, stand_in=None):
        def call(*args, **kwargs):
            kept = [a for a in args if isinstance(a, str | int | float | tuple | Path)]
            record[function.__name__] = kept, kwargs
            return (stand_in or function)(*args, **kwargs)

        return call

    def begin(*args, **kwargs):
        record["deterministic"] = training.torch.are_deterministic_algorithms_enabled()
        raise TrainingBegins

    make = dataset.DatasetBuilder.__init__
    monkeypatch.setattr(dataset.DatasetBuilder, "__init__", recorded(make))
    build = dataset.DatasetBuilder.build
    monkeypatch.setattr(dataset.DatasetBuilder, "build", recorded(build))
    for name, stand_in in {
        "get_model": lambda *args, **kwargs: tiny,
        "make_optimizer": None,
        "warmup_cosine": None,
        "cache_features": lambda model, loaders, **options: loaders,
        "train": begin,
        "claim": None,
    }.items():
        monkeypatch.setattr(pipeline, name, recorded(getattr(pipeline, name), stand_in))
    for module, name, stand_in in (
        (images, "create_dataloaders", None),
        (checks, "choose_own_device", None),
        (checks, "check_weights", lambda *args, **kwargs: LoadedWeights("f", "0", "loaded")),
    ):
        monkeypatch.setattr(module, name, recorded(getattr(module, name), stand_in))

    def run(words):
        record.clear()
        try:
            status = main(words)
        except TrainingBegins:
            status = "trains"
        except SystemExit as stop:
            status = stop.code
        error = capfd.readouterr().err
        return error if status == 2 else repr((status, _plain(record)))

    return run


def _plain(value):
    """What has a text that depends on nothing but its contents."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value) if isinstance(value, str | int | float | Path) else type(value).__name__


def test_every_flag_is_looked_at_here():
    assert {"demo"} | {field.name for field in fields(Settings)} == set(FLAGS)


@dataclass(frozen=True)
class MoreSettings(Settings):
    """What somebody adds who adds three flags."""

    momentum: float = flag(0.9, "of SGD", "X", type=float, no_effect={"--device cpu": "try CUDA"})
    optimizers: tuple[str, ...] = flag(("adamw",), "one or several", "NAME", audit=True)
    nesterov: bool = flag(False, "look ahead")


def test_a_field_is_a_flag_with_its_default_its_help_and_its_place_in_the_command(capsys):
    assert parse_arguments(["--data_dir", "x"], MoreSettings)[0].momentum == 0.9
    words = ["--data_dir", "x", "--momentum", "0.5", "--optimizers", "sgd", "lion", "--nesterov"]
    settings, _ = parse_arguments(words, MoreSettings)
    assert settings == MoreSettings("x", momentum=0.5, optimizers=("sgd", "lion"), nesterov=True)
    assert command(settings) == f"python train_models.py {' '.join(words)}"
    with pytest.raises(SystemExit):
        parse_arguments(["--help"], MoreSettings)
    assert re.search(r"--momentum X +of SGD \(default: 0.9\)", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--device", "cpu"], "--momentum has no effect with --device cpu; try CUDA"),
        (["--audit_only"], "--momentum has no effect with --audit_only"),
        (["--device", "cuda"], None),
    ],
)
def test_a_field_says_beside_which_flags_it_has_no_effect(capsys, more, said):
    words = ["--data_dir", "x", "--momentum", "0.5", *more]
    if said is None:
        assert parse_arguments(words, MoreSettings)[0].momentum == 0.5
        return
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(words, MoreSettings)
    assert capsys.readouterr().err == f"{PROGRAM}: error: {said}\n"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_changes_something_or_is_refused(outcome, mode, flag):
    words, needed = FLAGS[flag]
    is_refused_alone = mode == "audit_only" and flag not in OF_AUDIT
    base = [*MODES[mode], *([] if is_refused_alone else needed)]
    without = outcome(base)
    with_flag = outcome([*base, *words])
    if f"{PROGRAM}: error: " in with_flag:
        assert with_flag.count("\n") == 1
        assert f"--{flag}" in with_flag, "it is refused for another reason"
        return
    if (mode, flag) in WITHOUT_EFFECT:
        assert with_flag == without
    else:
        assert with_flag != without


# Beside the flags that precede them, these have no effect.
REFUSED = [
    ["--schedule", "constant", "--warmup_fraction", "0.2"],  # given, if only as the default
    ["--splits_csv", "splits.csv", "--splits", "0.7", "0.2", "0.1"],
    ["--splits_csv", "splits.csv", "--split_by", "random"],
    ["--device", "cpu", "--deterministic"],
    ["--split_by", "folders", "--data_dir", "with_valid", "--splits", "0.7", "0.2", "0.1"],
    ["--models", "simple_cnn", "--weights", "weights.pth"],
    ["--label_column", "dx"],
    ["--class_names", "nevus", "melanoma"],
    ["--group_by", "patient"],
    ["--resume", "--overwrite"],
]


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_flags_that_have_no_effect_together_are_refused(outcome, workplace, words):
    if not (workplace / "with_valid").exists():
        counts = {f"{split}/{name}": 6 for split in ("train", "VAL", "test") for name in "ab"}
        draw_images(workplace / "with_valid", counts)
    message = outcome(["--data_dir", "raw", *words])
    assert message.startswith(f"{PROGRAM}: error: ") and message.count("\n") == 1
    last = [word for word in words if word.startswith("--")][-1]
    assert last.removeprefix("--") in message


def test_fractions_are_used_where_the_folders_lack_a_validation_split(outcome):
    base = ["--data_dir", "raw", "--split_by", "folders"]
    assert outcome(base) != outcome([*base, "--splits", "0.8", "0.1", "0.1"])


@pytest.mark.parametrize(
    ("flag", "value", "models"),
    [
        ("layers", "50", ["simple_cnn"]),
        ("weights", "none", ["simple_cnn"]),
        ("weights", "imagenet", ["simple_cnn", "resnet_scratch"]),
    ],
)
def test_a_flag_of_other_models_than_the_chosen_ones_is_warned_of(
    outcome, capfd, monkeypatch, flag, value, models
):
    warned = []
    monkeypatch.setattr("experiment.console.print_message", lambda *words: warned.append(words))
    base = ["--data_dir", "raw", "--models", *models]
    outcome(base)
    assert warned == []
    outcome([*base, f"--{flag}", value])
    expected = f"--{flag} has no effect with --models {' '.join(models)}"
    assert warned == [(PROGRAM, "warning", expected)]
    warned.clear()
    outcome([*base, "resnet_head", f"--{flag}", value])
    assert warned == []


def test_the_command_recorded_is_the_one_that_was_run(outcome, workplace):
    words = ["--data-dir", "raw", "--no-balanced", "--models", "resnet_head", "--batch_size", "16"]
    outcome([*words, "--save_dir", "recorded"])
    config = json.loads((workplace / "recorded/config.json").read_text())
    assert config["command"] == (
        "python train_models.py --data_dir raw --save_dir recorded --models resnet_head "
        "--batch_size 16 --no-balanced"
    )
    outcome([*words, "--save_dir", "recorded", "--resume"])
    again = json.loads((workplace / "recorded/config.json").read_text())
    assert again["command"] == f"{config['command']} --resume"
    names = ["data_dir", "save_dir", "models", "batch_size", "balanced"]
    assert config["not_default"] == names


def test_the_command_recorded_under_torchrun_starts_as_many_processes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert command(Settings(data_dir="raw")) == (
        "torchrun --nnodes=2 --nproc_per_node=2 train_models.py --data_dir raw"
    )
