"""Every flag of predict.py changes something or is refused, in each of the command's modes.

The flags are those that the parser knows: a new one without an entry fails. None needs an excuse.
"""

import os
import shutil
from dataclasses import dataclass, field, fields

import pandas as pd
import pytest
import torch
from torch import nn

import predict
from experiment import external
from imaging import cache
from inference import ensemble, export, features
from learning import hardware
from models import get_model
from predict import main
from storage.tensors import save_tensors

CLASSES = ["melanoma", "nevus", "other"]
REFUSED = "refused"


@dataclass(frozen=True)
class Changes:
    """What the command shows or does is not the same with these words as without them."""

    words: list[str]
    base: list[str] = field(default_factory=list)  # stands on the command line either way
    status: int = 0
    without: int = 0  # the status without these words


# By mode: what stands on the command line in any case, in a folder of its own.
BASES = {
    "predict": ["--model", "m/model.pth", "--device", "cpu", "--precision", "fp32", "images"],
    "--evaluate": [
        "--model", "m/model.pth", "--evaluate", "out", "--device", "cpu", "--precision", "fp32",
        "images",
    ],
    "--features": [
        "--model", "m/model.pth", "--features", "m.npz", "--device", "cpu", "--precision", "fp32",
        "images",
    ],
    "--export": ["--model", "m/model.pth", "--export", "m.onnx"],
}  # fmt: skip
THREADS = str((os.cpu_count() or 1) + 1)
COMMON = {
    "model": Changes(["--model", "n/model.pth"]),
    "device": Changes(["--device", "abacus"], status=2),  # whatever there is, it is tried
    "precision": Changes(["--precision", "bf16"]),
    "batch_size": Changes(["--batch_size", "2"]),
    "num_workers": Changes(["--num_workers", THREADS]),
}
EFFECTS = {
    "predict": COMMON | {
        "output": Changes(["--output", "out.csv"]),
        "top_k": Changes(["--top_k", "1"]),
        "tta": Changes(["--tta", "2"]),
        "gradcam": Changes(["--gradcam", "overlays"]),
        "threshold": Changes(["--threshold", "nevus=0.1"]),
        "labels_csv": REFUSED,
        "label_column": REFUSED,
        "id_column": REFUSED,
        "class_names": REFUSED,
        "class_map": REFUSED,
        "unlabelled": REFUSED,
        "evaluate": Changes(["--evaluate", "out"]),
        "features": Changes(["--features", "m.npz"]),
        "export": REFUSED,  # as there are images
        "overwrite": Changes(["--overwrite"], base=["--output", "there.csv"], without=2),
    },
    "--evaluate": COMMON | {
        "output": REFUSED,
        "top_k": REFUSED,
        "tta": REFUSED,
        "gradcam": REFUSED,
        "threshold": REFUSED,
        "labels_csv": Changes(["--labels_csv", "labels.csv"]),
        "label_column": Changes(["--label_column", "dx"], base=["--labels_csv", "labels.csv"]),
        "id_column": Changes(["--id_column", "other"], base=["--labels_csv", "labels.csv"]),
        "class_names": Changes(
            [word for name in CLASSES for word in ("--class_names", name)],
            base=["--labels_csv", "labels.csv", "--label_column", "number"],
            without=2,
        ),
        "class_map": Changes(["--class_map", "other=nevus"]),
        "unlabelled": Changes(
            ["--unlabelled", "drop"],
            base=["--labels_csv", "some.csv", "--label_column", "dx"],
            without=2,
        ),
        "evaluate": Changes(["--evaluate", "elsewhere"]),
        "features": REFUSED,
        "export": REFUSED,
        "overwrite": Changes(["--overwrite"], base=["--evaluate", "there"], without=2),
    },
    "--features": COMMON | {
        "model": Changes(["--model", "n/model.pth"], status=2),  # one at a time
        "output": REFUSED,
        "top_k": REFUSED,
        "tta": REFUSED,
        "gradcam": REFUSED,
        "threshold": REFUSED,
        "labels_csv": REFUSED,
        "label_column": REFUSED,
        "id_column": REFUSED,
        "class_names": REFUSED,
        "class_map": REFUSED,
        "unlabelled": REFUSED,
        "evaluate": REFUSED,
        "features": Changes(["--features", "elsewhere.npz"]),
        "export": REFUSED,
        "overwrite": Changes(["--overwrite"], base=["--features", "there.npz"], without=2),
    },
    "--export": {
        "model": Changes(["--model", "n/model.pth"], status=2),  # one at a time
        "output": REFUSED,
        "top_k": REFUSED,
        "tta": REFUSED,
        "gradcam": REFUSED,
        "threshold": REFUSED,
        "device": REFUSED,
        "precision": REFUSED,
        "batch_size": REFUSED,
        "num_workers": REFUSED,
        "labels_csv": REFUSED,
        "label_column": REFUSED,
        "id_column": REFUSED,
        "class_names": REFUSED,
        "class_map": REFUSED,
        "unlabelled": REFUSED,
        "evaluate": REFUSED,
        "features": REFUSED,
        "export": Changes(["--export", "elsewhere.onnx"]),
        "overwrite": Changes(["--overwrite"], base=["--export", "there.onnx"], without=2),
    },
}  # fmt: skip
VALUES = {
    "output": "out.csv", "top_k": "2", "tta": "2", "gradcam": "overlays", "threshold": "nevus=0.5",
    "device": "cpu", "precision": "fp32", "batch_size": "2", "num_workers": "2",
    "labels_csv": "labels.csv", "label_column": "dx", "evaluate": "out", "export": "m.onnx",
    "id_column": "path", "class_names": "nevus", "class_map": "a=b", "unlabelled": "drop",
    "features": "m.npz",
}  # fmt: skip
FLAGS = {each.name: each for each in fields(predict.Settings) if each.name != "images"}


def small_model(seed):
    model = get_model("simple_cnn", len(CLASSES), weights=None, image_size=32, seed=seed).eval()
    with torch.no_grad():
        for layer in model.head:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(4)
    return model


@pytest.fixture
def here(tmp_path, make_images, monkeypatch):
    """The folder that the command is run in, with models, images, labels and earlier files."""
    make_images({"melanoma": 4, "nevus": 3}, name="images")
    for seed, name in enumerate("mn"):
        model = small_model(seed)
        contents = {
            "config": model.config, "classes": CLASSES, "image_size": 32, "preprocessors": "",
            "state_dict": model.state_dict(),
        }  # fmt: skip
        (tmp_path / name).mkdir()
        save_tensors(tmp_path / name / "model.pth", contents)
    paths = [f"{name}/{i:04d}.png" for name, count in (("melanoma", 4), ("nevus", 3))
             for i in range(count)]  # fmt: skip
    labels = {
        "path": paths,
        "class": ["nevus", *CLASSES[:1] * 6],
        "dx": [*CLASSES, *CLASSES[:1] * 4],
        "number": [1, *[0] * 6],
        "other": paths[::-1],
    }
    pd.DataFrame(labels).to_csv(tmp_path / "labels.csv", index=False)
    pd.DataFrame(labels).iloc[:4].to_csv(tmp_path / "some.csv", index=False)
    for name in ("there.csv", "there.npz", "there.onnx"):
        (tmp_path / name).write_text("earlier")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def observe(here, monkeypatch, capfd):
    """A function that runs the command and gives all that it shows, writes and does.

    What would take seconds, figures and ONNX, is replaced by files of what they would show.
    """
    done = []

    def note(module, name, what):
        original = getattr(module, name)

        def noting(*arguments, **options):
            done.append((name, what(*arguments, **options)))
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, noting)

    def see(ensemble, pixels, tta=1):
        raw, calibrated = probabilities(ensemble, pixels, tta)
        done.append((len(pixels), raw.tolist()))
        return raw, calibrated

    def leave(folder, model, info, evaluation, dataset, **options):
        folder.mkdir(parents=True, exist_ok=True)
        found = [evaluation.labels.tolist(), evaluation.probabilities.tolist()]
        (folder / "metrics.json").write_text(str(found))

    def compare(save_dir, models, *rest, **options):
        columns = ("precision", "recall", "balanced_accuracy")
        return pd.DataFrame({"model": models} | dict.fromkeys(columns, 0.5))

    probabilities = predict.Ensemble.probabilities
    monkeypatch.setattr(predict.Ensemble, "probabilities", see)
    monkeypatch.setattr(external, "save_results", leave)
    monkeypatch.setattr(external, "compare_models", compare)
    monkeypatch.setattr(external, "write_report", lambda save_dir: None)
    for module in (ensemble, cache):
        note(module, "ThreadPoolExecutor", lambda threads: threads)
    note(features, "compute_features", lambda model, images, *rest: len(images))
    note(hardware, "choose_device", str)
    note(ensemble, "choose_device", str)
    note(external, "create_dataloaders", lambda _, batch_size, **options: batch_size)
    monkeypatch.setattr(export, "export_onnx", lambda model, path: shutil.copy(model, path))

    def run(words):
        done.clear()
        before = files(here)
        try:
            status = main(words)
        except SystemExit as exit:
            status = exit.code
        written = {name: text for name, text in files(here).items() if before.get(name) != text}
        captured = capfd.readouterr()
        for name in written:
            (here / name).unlink()
        for name in before.keys() & written.keys():
            (here / name).write_bytes(before[name])
        return status, captured.out, captured.err, written, list(done)

    return run


def files(folder):
    """The contents of all files that are not different each time anyway."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "config.json")
    }


@pytest.mark.parametrize("mode", EFFECTS)
def test_every_flag_has_an_entry(mode):
    assert EFFECTS[mode].keys() == FLAGS.keys()


@pytest.mark.parametrize(
    ("mode", "flag"),
    [(m, f) for m, effects in EFFECTS.items() for f, effect in effects.items()
     if effect != REFUSED],
)  # fmt: skip
def test_a_flag_changes_something(here, observe, mode, flag):
    effect = EFFECTS[mode][flag]
    if flag == "overwrite" and mode == "--evaluate":
        other = [*BASES[mode], "--evaluate", "there", "--precision", "bf16"]
        assert main(other) == 0
    base = [*BASES[mode], *effect.base]
    without, with_flag = observe(base), observe([*base, *effect.words])
    assert without[0] == effect.without, without
    assert with_flag[0] == effect.status, with_flag
    assert with_flag != without


@pytest.mark.parametrize(
    ("mode", "flag"),
    [(m, f) for m, effects in EFFECTS.items() for f, effect in effects.items()
     if effect == REFUSED],
)  # fmt: skip
def test_a_flag_without_effect_is_refused_and_named_before_anything_is_read(
    tmp_path, monkeypatch, capfd, mode, flag
):
    monkeypatch.chdir(tmp_path)  # where there is nothing
    values = {VALUES[flag]}
    if FLAGS[flag].default is not None:
        values.add(str(FLAGS[flag].default))  # given is given, even if it changes nothing
    for value in values:
        dashes = f"--{flag.replace('_', '-')}"
        for words in ([f"--{flag}", value], [f"--{flag}={value}"], [dashes, value]):
            with pytest.raises(SystemExit) as exit:
                main([*BASES[mode], *words])
            captured = capfd.readouterr()
            assert exit.value.code == 2
            (line,) = captured.err.splitlines()
            assert line.startswith("predict.py: error: ") and f"--{flag}" in line
            assert mode in line or mode == "predict"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("mode", EFFECTS)
@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--batch_size", "0"], "--batch_size: must be at least 1"),
        (["--batch_size", "-3"], "--batch_size: must be at least 1"),
        (["--batch_size", "1" + 5000 * "0"], "must be a whole number"),
        (["--batch_size", str(2**31)], "less than 2**31"),
        (["--batch_size", "2.5"], "--batch_size: must be a whole number, not '2.5'"),
        (["--num_workers", "0"], "--num_workers: must be at least 1"),
        (["--top_k", "0"], "--top_k: must be at least 1"),
        (["--tta", "0"], "--tta: must be from 1 to 8, not 0"),
        (["--tta", "9"], "--tta: must be from 1 to 8, not 9"),
        (["--threshold", "nevus=nan"], "must be a probability from 0 to 1, not nan"),
        (["--threshold", "nevus=inf"], "must be a probability from 0 to 1, not inf"),
        (["--threshold", "nevus=-1e-9"], "must be a probability from 0 to 1, not -1e-9"),
        (["--threshold", "nevus=20%"], "must be a number, not '20%'"),
        (["--threshold", "=0.5"], "must be of the form NAME=0.2, not '=0.5'"),
        (["--threshold", " =0.5"], "must be of the form NAME=0.2, not ' =0.5'"),
        (["--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
        *(
            ([f"--{flag}", value], f"--{flag}: must not be empty")
            for flag in (
                "output",
                "gradcam",
                "labels_csv",
                "label_column",
                "evaluate",
                "features",
                "export",
            )
            for value in ("", " ")
        ),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_read(
    tmp_path, monkeypatch, capfd, mode, words, error
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main([*BASES[mode], *words])
    captured = capfd.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert error in captured.err and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--threshold", "nevus=0.2", "--threshold", "nevus=0.3"], "--threshold nevus is given tw"),
        (["--overwrite"], "--overwrite has no effect without --output"),
        (["--label_column", "dx", "--evaluate", "out"], "--label_column needs the table"),
        (["--evaluate", "out", "more"], "--evaluate takes one folder of labelled images"),
        (["--evaluate", "out", "--export", "m.onnx"], "give one at a time"),
        (["--evaluate", "out", "--features", "m.npz"], "give one at a time"),
        (["--features", "m.npz", "--model", "n"], "--features takes one --model"),
        (["--export", "m.onnx"], "has no effect with --export"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(tmp_path, monkeypatch, capfd, words, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main([*BASES["predict"], *words])
    assert exit.value.code == 2
    assert error in capfd.readouterr().err


def test_of_one_flag_in_several_spellings_all_are_found(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    images = ["a.png", "--", "--output"]  # what follows the dashes is a file
    for word in ("--top-k=3", "--top_k=3"):
        with pytest.raises(SystemExit):
            main(["a.png", word, "--model=m.pth", "--evaluate=out", *images[1:]])
        assert "--top_k has no effect with --evaluate" in capfd.readouterr().err
    assert main(["--model", "m.pth", *images]) == 2
    assert "a.png, --output: no such file or folder" in capfd.readouterr().err


# ---------------------------------------------------------------------------- earlier files


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("predict", ["--output", "there.csv"]),
        ("predict", ["--output", "link.json"]),
        ("--features", ["--features", "there.npz"]),
        ("--export", ["--export", "there.onnx"]),
    ],
)
def test_a_file_that_exists_is_refused_before_anything_is_read(here, capfd, mode, words):
    (here / "link.json").symlink_to(here / "nowhere")
    shutil.rmtree(here / "m")
    shutil.rmtree(here / "images")
    before = files(here)
    assert main([*BASES[mode], *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{words[1]} already exists; replace it with --overwrite, or choose" in line
    assert files(here) == before and not (here / "nowhere").exists()


def test_a_file_to_overwrite_is_replaced_when_all_is_done(here, capfd):
    words = [*BASES["predict"], "--output", "there.csv", "--overwrite"]
    assert main([*words, "images/gone.png"]) == 2
    assert (here / "there.csv").read_text() == "earlier"
    assert main(words) == 0
    assert len(pd.read_csv(here / "there.csv")) == 7


def test_the_library_replaces_files_as_it_always_did(here):
    table = predict.predict("m/model.pth", "images", output="there.csv", device="cpu")
    assert pd.read_csv(here / "there.csv")["path"].tolist() == table["path"].tolist()


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_what_is_read_is_not_written_over(here, capfd, more):
    os.link(here / "m/model.pth", here / "model.onnx")
    os.link(here / "images/nevus/0000.png", here / "image.csv")
    os.link(here / "images/nevus/0000.png", here / "image.npz")
    before = files(here)
    for words in (
        ["--model", "m/model.pth", "--export", "model.onnx"],
        ["--model", "m/model.pth", "--features", "image.npz", "images/nevus/0000.png"],
        ["--model", "m/model.pth", "--output", "image.csv", "image.csv"],
        ["--model", "m/model.pth", "--output", "image.csv", "images/nevus/0000.png"],
    ):
        assert main([*words, *more]) == 2
        assert "is also an input; choose another name" in capfd.readouterr().err
    assert files(here) == before


def test_overlays_of_the_same_images_are_not_replaced_and_other_files_stay(here, capfd):
    (here / "overlays").mkdir()
    (here / "overlays/notes.txt").write_text("precious")
    words = ["--model", "m/model.pth", "--device", "cpu", "--gradcam", "overlays"]
    assert main([*words, "images/nevus"]) == 0
    before = files(here)
    other = ["--model", "n/model.pth", *words[2:]]
    assert main([*other, "images/melanoma", "images/nevus/0001.png"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "overlays already has overlays of 1 of these images, such as 0001-" in error
    assert "replace them with --overwrite, or choose another folder" in error
    assert files(here) == before
    assert main([*other, "images/melanoma"]) == 0
    assert before.items() < files(here).items() and len(files(here)) == len(before) + 4
    assert main([*other, "images/nevus", "--overwrite"]) == 0
    changed = {name for name, text in files(here).items() if before.get(name, text) != text}
    assert changed and all(name.startswith("overlays/000") for name in changed)


@pytest.mark.parametrize(("output", "folder"), [("a.csv", "a.csv"), ("a.csv", "a.csv/overlays")])
def test_a_table_and_a_folder_do_not_get_the_same_name(here, capfd, output, folder):
    words = ["--output", output, "--gradcam", folder]
    assert main([*BASES["predict"], *words]) == 2
    assert "cannot be a folder, as a.csv is a file" in capfd.readouterr().err
    assert not (here / "a.csv").exists()
