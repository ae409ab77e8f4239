"""Evaluations write over nothing: what may stand in their folder, and what becomes of it."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from experiment import external, run_folder
from experiment.external import EvaluationSettings, evaluate_folder
from experiment.run_folder import EVALUATION_FILES, RESULT_FILES, TRAINING_FILES, claim
from models import get_model
from predict import main
from storage.tensors import save_tensors

CLASSES = ["melanoma", "nevus", "vascular lesion"]

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def save_model(tmp_path):
    """A function that writes the `model.pth` of a model of this name."""

    def save(name="cnn", seed=0, classes=CLASSES, folder="models"):
        options = {"weights": None, "image_size": 32, "seed": seed}
        model = get_model("simple_cnn", len(classes), **options).eval()
        (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
        contents = {
            "config": model.config, "classes": list(classes), "image_size": 32,
            "preprocessors": "", "state_dict": model.state_dict(),
        }  # fmt: skip
        save_tensors(tmp_path / folder / name / "model.pth", contents)
        return tmp_path / folder / name / "model.pth"

    return save


@pytest.fixture
def images(make_images):
    return make_images(dict.fromkeys(CLASSES, 3), name="images")


@pytest.fixture
def measured(monkeypatch):
    """The names of the models that are measured from now on."""
    names, leave = [], external.save_results

    def leave_and_watch(folder, *rest, **options):
        names.append(folder.name)
        leave(folder, *rest, **options)

    monkeypatch.setattr(external, "save_results", leave_and_watch)
    return names


def contents(folder):
    """All files below a folder, but for the lock, and what is in them."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def command(model, images, save_dir, *more):
    models = [model] if isinstance(model, Path) else model
    words = [word for path in models for word in ("--model", str(path))]
    words += ["--evaluate", str(save_dir), "--device", "cpu", "--precision", "fp32"]
    return main([*words, *more, str(images)])


def config(folder):
    return json.loads((folder / "config.json").read_text())


# ---------------------------------------------------------------------------- other runs


def training_run(folder):
    """What training leaves, as far as it matters here, with one of the two models begun."""
    settings = {"data_dir": "raw", "models": ["cnn", "other"]}
    text = json.dumps({"command": "train", "settings": settings, "runs": {"cnn": {}, "other": {}}})
    (folder / "cnn").mkdir(parents=True)
    (folder / "config.json").write_text(text)
    for name in ("splits.csv", "cnn/last.pth", "cnn/metrics.json", "cnn/predictions.csv"):
        (folder / name).write_text(f"the run's {name}")


def training_run_of_today(folder):
    training_run(folder)
    text = json.dumps(config(folder) | {"kind": "training"})
    (folder / "config.json").write_text(text)


def audit(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"kind": "audit", "settings": {}}))
    (folder / "audit.csv").write_text("the audit")


def config_of_another_program(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"theme": "dark"}')


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (training_run, "contains a training run"),
        (training_run_of_today, "contains a training run"),
        (audit, "contains an audit"),
        (config_of_another_program, "config.json was not written by this program"),
    ],
)
def test_the_folder_of_another_kind_of_run_is_refused_before_anything_is_read_or_written(
    tmp_path, images, capfd, prepare, words, more
):
    prepare(tmp_path / "out")
    before = contents(tmp_path)
    assert command(tmp_path / "no model is read.pth", images, tmp_path / "out", *more) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line and "choose another folder" in line
    with pytest.raises(ValueError, match="choose another folder"):
        evaluate_folder([tmp_path / "no.pth"], images, tmp_path / "out", overwrite=bool(more))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["cnn", "other", "link"])
def test_the_folder_of_a_model_in_a_training_run_is_refused(tmp_path, images, capfd, name):
    training_run(tmp_path / "out")
    (tmp_path / "out/link").symlink_to(tmp_path / "out/cnn")
    before = contents(tmp_path)
    assert command(tmp_path / "no model is read.pth", images, tmp_path / "out" / name) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "to a model of the training run" in line
    assert contents(tmp_path) == before


def test_a_new_folder_inside_that_of_a_training_run_is_as_good_as_any(
    tmp_path, images, save_model, capfd
):
    training_run(tmp_path / "out")
    before = contents(tmp_path / "out")
    assert command(save_model(), images, tmp_path / "out/elsewhere") == 0
    assert before.items() <= contents(tmp_path / "out").items()


@pytest.mark.parametrize(
    "file",
    [
        *EVALUATION_FILES[1:], *RESULT_FILES, *TRAINING_FILES,
        *(f"cnn/{name}" for name in (*RESULT_FILES, *TRAINING_FILES)),
        "cnn/config.json", "cnn", "x/metrics.json",
    ],
)  # fmt: skip
def test_files_of_something_else_are_never_written_over(tmp_path, images, file):
    (tmp_path / "out" / file).parent.mkdir(parents=True)
    (tmp_path / "out" / file).write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="choose another folder"):
            evaluate_folder(
                [tmp_path / "cnn/none.pth"], images, tmp_path / "out", overwrite=overwrite
            )
    assert contents(tmp_path / "out") == {file: b"precious"}


def test_other_files_in_the_folder_stay(tmp_path, images, save_model):
    (tmp_path / "out/cnn").mkdir(parents=True)
    for file in ("notes.txt", "cnn/notes.txt"):
        (tmp_path / "out" / file).write_text("precious")
    for more in ([], ["--overwrite"]):
        assert command(save_model(), images, tmp_path / "out", *more) == 0
        assert (tmp_path / "out/notes.txt").read_text() == "precious"
        assert (tmp_path / "out/cnn/notes.txt").read_text() == "precious"


@pytest.mark.parametrize("out", ["images", "images/nevus", "images/new", "link/new"])
def test_a_folder_among_the_images_is_refused(tmp_path, images, out):
    (tmp_path / "link").symlink_to(images)
    with pytest.raises(
        ValueError, match=r"is (inside .*|the folder of the images); choose another"
    ):
        evaluate_folder([tmp_path / "none.pth"], images, tmp_path / out)


def test_the_folder_of_a_model_that_would_lie_among_the_images_is_refused(tmp_path, make_images):
    images = make_images(dict.fromkeys(CLASSES, 2), name="out/cnn")
    with pytest.raises(ValueError, match="cnn is the folder of the images"):
        evaluate_folder([tmp_path / "models/cnn/model.pth"], images, tmp_path / "out")


def test_a_file_is_no_folder(tmp_path, images):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ValueError, match="out is a file"):
        evaluate_folder([tmp_path / "none.pth"], images, tmp_path / "out")


# ---------------------------------------------------------------------------- the same again


def test_the_same_evaluation_again_is_passed_over_and_its_report_drawn_anew(
    tmp_path, images, save_model, measured, capfd
):
    out, model = tmp_path / "out", save_model()
    assert command(model, images, out) == 0
    printed, before = capfd.readouterr().out, contents(out)
    (out / "report.html").unlink()
    shutil.copytree(images, tmp_path / "moved")
    for where in (images, tmp_path / "moved"):  # it is the contents that count
        assert command(model, where, out, "--batch_size", "2") == 0
        captured = capfd.readouterr()
        assert "skipped cnn, already evaluated on these images" in captured.err
        assert captured.err.count("\n") == 1 and captured.out == printed
        assert contents(out) == before
    assert measured == ["cnn"]


def other_model(save_model, images):
    save_model(seed=1)


def image_more(save_model, images):
    shutil.copy(images / "nevus/0000.png", images / "nevus/more.png")


def image_less(save_model, images):
    (images / "nevus/0000.png").unlink()


def image_changed(save_model, images):
    shutil.copy(images / "melanoma/0000.png", images / "nevus/0000.png")


def image_elsewhere(save_model, images):
    (images / "melanoma/0000.png").rename(images / "nevus/moved.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_model, "another model.pth"),
        (image_more, "other images or labels"),
        (image_less, "other images or labels"),
        (image_changed, "other images or labels"),
        (image_elsewhere, "other images or labels"),
        (["--precision", "bf16"], "another precision"),
        (["--labels_csv", "labels.csv"], "other images or labels"),
    ],
)
def test_another_evaluation_is_refused_and_says_what_would_be_lost(
    tmp_path, images, save_model, capfd, monkeypatch, change, words
):
    monkeypatch.chdir(tmp_path)
    out, model = tmp_path / "out", save_model()
    assert command(model, images, out) == 0
    before = contents(out)
    (tmp_path / "labels.csv").write_text("path,class\nnevus/0000.png,melanoma\n")
    more = change if isinstance(change, list) else []
    if not more:
        change(save_model, images)
    capfd.readouterr()
    assert command(model, images, out, *more) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{out} contains an evaluation of cnn with {words}; replace it" in line
    assert "replace it with --overwrite, or choose another folder" in line
    assert contents(out) == before
    assert command(model, images, out, *more, "--overwrite") == 0
    assert contents(out) != before


def test_what_can_be_told_without_the_images_is_told_before_they_are_prepared(
    tmp_path, images, save_model, monkeypatch
):
    evaluate_folder([save_model()], images, tmp_path / "out")
    monkeypatch.setattr(external.DatasetBuilder, "prepare", lambda self: pytest.fail("too late"))
    with pytest.raises(ValueError, match="with another model.pth; replace it"):
        evaluate_folder([save_model(seed=1)], images, tmp_path / "out")


def test_other_models_measured_on_the_same_images_stay_in_the_comparison(
    tmp_path, images, save_model, measured
):
    out, one, two = tmp_path / "out", save_model("one", seed=1), save_model("two", seed=2)
    evaluate_folder([one], images, out, EvaluationSettings(precision="fp32"))
    before = contents(out / "one")
    comparison, _ = evaluate_folder(
        [two], images, out, EvaluationSettings(precision="bf16")
    )  # its own settings
    assert comparison["model"].tolist() == ["one", "two"] and measured == ["one", "two"]
    assert contents(out / "one") == before
    assert config(out)["runs"]["one"]["precision"] == "float32"
    assert config(out)["runs"]["two"]["precision"] == "bfloat16"
    assert all(f">{name}<" in (out / "report.html").read_text() for name in ("one", "two"))
    with pytest.warns(UserWarning, match="out: skipped one"):
        comparison, _ = evaluate_folder([one], images, out, EvaluationSettings(precision="fp32"))
    assert comparison["model"].tolist() == ["one", "two"] and measured == ["one", "two"]


def test_models_of_other_classes_are_not_compared_in_one_folder(tmp_path, images, save_model):
    evaluate_folder([save_model("one")], images, tmp_path / "out")
    model = save_model("two", classes=[*CLASSES, "other"])
    with pytest.raises(ValueError, match="evaluation of one with other classes; replace it"):
        evaluate_folder([model], images, tmp_path / "out")


def test_overwriting_measures_again_and_removes_what_is_of_other_images(
    tmp_path, images, save_model, measured
):
    out = tmp_path / "out"
    evaluate_folder([save_model("one"), save_model("two")], images, out)
    comparison, _ = evaluate_folder([save_model("two")], images, out, overwrite=True)
    assert measured == ["one", "two", "two"]
    assert comparison["model"].tolist() == ["one", "two"]
    image_more(None, images)
    comparison, _ = evaluate_folder([save_model("two")], images, out, overwrite=True)
    assert comparison["model"].tolist() == ["two"]
    assert not (out / "one").exists()
    assert config(out)["runs"].keys() == {"two"}


def test_no_model_to_be_overwritten_is_lost_before_all_checks(tmp_path, images, save_model):
    out, model = tmp_path / "out", save_model()
    evaluate_folder([model], images, out)
    before = contents(out)
    (images / "cat").mkdir()
    shutil.copy(images / "nevus/0000.png", images / "cat")
    with pytest.raises(ValueError, match="cat"):
        evaluate_folder([model], images, out, overwrite=True)
    assert contents(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_evaluation_that_was_interrupted_is_finished_by_the_same_command(
    tmp_path, images, save_model, measured, monkeypatch, capfd, overwrite
):
    out, models = tmp_path / "out", [save_model("one"), save_model("two", seed=1)]
    if overwrite:
        evaluate_folder([save_model("former", seed=2)], images, out)
        image_more(None, images)
        measured.clear()
    leave = external.save_results

    def stop_at_two(folder, *rest, **options):
        if folder.name == "two":
            signal.raise_signal(signal.SIGTERM)
        leave(folder, *rest, **options)

    more = ["--overwrite"] if overwrite else []
    with monkeypatch.context() as patch:
        patch.setattr(external, "save_results", stop_at_two)
        assert command(models, images, out, *more) == 143
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("predict.py: stopped by SIGTERM; repeat the command")
    assert measured == ["one"] and not (out / "report.html").exists()
    assert command(models, images, out) == 0
    assert measured == ["one", "two"]
    assert (out / "report.html").exists() and not (out / "former").exists()


def test_an_evaluation_that_measured_nothing_yet_keeps_no_other_out(
    tmp_path, images, save_model, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(external, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate_folder([save_model("one")], images, tmp_path / "out")
    image_more(None, images)
    comparison, _ = evaluate_folder([save_model("two")], images, tmp_path / "out")
    assert comparison["model"].tolist() == ["two"]
    assert config(tmp_path / "out")["runs"].keys() == {"two"}


def test_an_evaluation_from_before_there_was_a_record_is_not_lost_either(
    tmp_path, images, save_model
):
    out, model = tmp_path / "out", save_model()
    evaluate_folder([model], images, out)
    old = {"command": "predict", "settings": {"data_dir": str(images)}}
    (out / "config.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="with no record of its images; replace it"):
        evaluate_folder([model], images, out)
    evaluate_folder([model], images, out, overwrite=True)
    assert config(out)["kind"] == "evaluation"


def test_names_in_a_config_lead_nowhere_outside_the_folder(tmp_path, images, save_model):
    out, model = tmp_path / "out", save_model()
    evaluate_folder([model], images, out)
    told = config(out)
    told["runs"] |= {"..": {}, "../beside": {}, str(tmp_path / "beside"): {}, "": {}, "cnn2": 3}
    (out / "config.json").write_text(json.dumps(told))
    (tmp_path / "beside").mkdir()
    (out / "cnn2").mkdir()
    for file in ("metrics.json", "beside/metrics.json"):
        (tmp_path / file).write_text("precious")
    image_more(None, images)
    evaluate_folder([model], images, out, overwrite=True)
    for file in ("metrics.json", "beside/metrics.json"):
        assert (tmp_path / file).read_text() == "precious"


def test_a_folder_in_use_is_said_before_the_models_are_read(
    tmp_path, images, save_model, monkeypatch
):
    evaluate_folder([save_model()], images, tmp_path / "out")
    monkeypatch.setattr(run_folder, "SECONDS_TO_WAIT", 0.1)
    with claim(tmp_path / "out"), pytest.raises(ValueError, match="in use by process"):
        evaluate_folder([tmp_path / "none.pth"], images, tmp_path / "out")


# ---------------------------------------------------------------------------- what is recorded


def test_the_config_says_what_was_run(tmp_path, images, save_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pytest", "-q"])
    model = save_model().relative_to(tmp_path)
    argv = ["--model", str(model), "--evaluate=an out", "--precision", "fp32", "images"]
    assert main(argv) == 0
    told = config(tmp_path / "an out")
    expected = f"python predict.py --model {model} '--evaluate=an out' --precision fp32 images"
    assert told["command"] == expected
    assert told["kind"] == "evaluation"
    assert told["settings"]["model"] == [str(model)] and told["settings"]["data_dir"] == "images"
    assert told["settings"]["precision"] == "fp32"
    assert told["settings"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert os.fspath(model) in (tmp_path / "an out/report.html").read_text()
