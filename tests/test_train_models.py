import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_score, recall_score
from torchvision.models import resnet50

import visualizations
from dataset import DatasetBuilder, create_dataloaders
from evaluation import Calibration
from imaging.cache import ArrayCache
from models import MODELS, load_model
from predict import predict
from tests.samples import snapshot, training_flags
from train_models import DEMO_SETTINGS, MODEL_NAMES, Settings, command, main, parse_arguments
from training import evaluate

pytestmark = pytest.mark.usefixtures("no_figures")
ROOT = Path(__file__).parents[1]
RUN_FILES = {
    "config.json", "audit.csv", "splits.csv", "comparison.csv", "comparison.png",
    "class_distribution.png", "samples.png", "augmentations.png", "report.html",
}  # fmt: skip
MODEL_FILES = {
    "model.pth", "last.pth", "history.csv", "metrics.json", "predictions.csv",
    "learning_curves.png", "confusion_matrix.png", "class_metrics.png", "roc_pr_curves.png",
    "reliability.png", "gradcam.png",
}  # fmt: skip


@pytest.fixture
def arguments(make_images, tmp_path):
    """A command line that trains in a second or two."""
    root = make_images({"Train/melanoma": 16, "Train/mole $1_x": 14, "Test/melanoma": 4})
    return training_flags(root, tmp_path / "out", layers=18, num_steps=4, weights="none")


def names(folder):
    return {path.name for path in folder.iterdir() if path.is_file()} - {".lock"}


def errors(text):
    """The lines of stderr but for warnings."""
    lines = text.splitlines()
    return [line for line in lines if not line.startswith("train_models.py: warning: ")]


# ---------------------------------------------------------------------------- a run


def test_one_command_trains_plots_and_compares_all_four(arguments, tmp_path, capfd, quick_figures):
    assert main(arguments) == 0
    out = tmp_path / "out"
    assert names(out) == RUN_FILES
    assert {path.name for path in out.iterdir() if path.is_dir()} == set(MODEL_NAMES)
    comparison = pd.read_csv(out / "comparison.csv").set_index("model")
    assert list(comparison.index) == list(MODEL_NAMES)
    metadata = pd.read_csv(out / "splits.csv")
    tested = set(metadata.loc[metadata["split"] == "test", "path"])
    for name in MODEL_NAMES:
        assert names(out / name) - {"mistakes.png"} == MODEL_FILES
        predictions = pd.read_csv(out / name / "predictions.csv")
        assert set(predictions["path"]) == tested
        classes = ["melanoma", "mole $1_x"]
        probabilities = predictions[[f"prob_{c}" for c in classes]]
        assert np.allclose(probabilities.sum(axis=1), 1)
        wrong = predictions["predicted_class"] != predictions["true_class"]
        assert (out / name / "mistakes.png").exists() == wrong.any()
        report = json.loads((out / name / "metrics.json").read_text())
        truth = (predictions["true_class"], predictions["predicted_class"])
        options = {"average": "weighted", "zero_division": 0}
        assert report["test"]["precision"] == pytest.approx(precision_score(*truth, **options))
        assert comparison.loc[name, "recall"] == pytest.approx(recall_score(*truth, **options))
        assert report["test"]["confusion_matrix"] == confusion_matrix(*truth).tolist()
        low, high = report["test_intervals"]["recall"]
        assert low <= report["test"]["recall"] <= high
        assert comparison.loc[name, ["recall_low", "recall_high"]].tolist() == [low, high]
        assert comparison.loc[name, "gap_to_best"] == pytest.approx(
            comparison["balanced_accuracy"].max() - comparison.loc[name, "balanced_accuracy"]
        )
        for figure in ("learning_curves.png", "confusion_matrix.png"):
            with Image.open(out / name / figure) as image:
                image.load()
    printed = capfd.readouterr().out
    assert "resnet_finetuned (4 of 4)" in printed
    assert "parameters" in printed and f"{comparison['parameters'].iloc[0]:,}" in printed
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["num_steps"] == 4
    assert config["versions"]["torch"] == torch.__version__


def test_a_run_says_in_which_precision_it_was_computed(arguments, tmp_path, auto_precision):
    out = tmp_path / "out"
    assert main([*arguments, "--models", "simple_cnn"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["precision"] == "auto"  # what was asked for
    assert config["precision"] == config["runs"]["simple_cnn"]["precision"] == auto_precision
    metrics = json.loads((out / "simple_cnn/metrics.json").read_text())
    assert metrics["precision"] == auto_precision
    assert load_model(out / "simple_cnn/model.pth")[1].precision == auto_precision
    report = (out / "report.html").read_text()
    assert re.search(rf"floating-point precision</t.>\s*<td[^>]*>{auto_precision}<", report)


def test_a_run_is_never_gone_on_with_in_another_precision(arguments, tmp_path, monkeypatch, capfd):
    words = [*arguments, "--models", "simple_cnn"]
    monkeypatch.setattr("learning.hardware.computes_in_bfloat16", lambda device: True)
    assert main(words) == 0
    (tmp_path / "out/simple_cnn/metrics.json").unlink()
    monkeypatch.setattr("learning.hardware.computes_in_bfloat16", lambda device: False)
    before = snapshot(tmp_path / "out")
    assert main([*words, "--resume"]) == 2
    assert "precision is fp32, but was bf16" in capfd.readouterr().err
    assert snapshot(tmp_path / "out") == before
    assert main([*words, "--resume", "--precision", "bf16"]) == 0


def test_a_run_looks_at_the_images_once(arguments, monkeypatch):
    loaded, load = [], ArrayCache.load

    def count(cache, paths):
        loaded.append(len(paths))
        return load(cache, paths)

    monkeypatch.setattr(ArrayCache, "load", count)
    assert main([*arguments, "--models", "simple_cnn"]) == 0
    assert loaded == [34]


def test_deterministic_algorithms_are_those_of_the_run_alone(arguments, monkeypatch):
    seen = []

    def fails(*args, **kwargs):
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise OSError("the disk is gone")

    monkeypatch.setattr("experiment.pipeline.train", fails)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    words = [*arguments, "--models", "simple_cnn", "--device", "auto", "--deterministic"]
    assert main(words) == 2
    assert seen == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_audit_alone_says_what_it_found_and_trains_nothing(arguments, tmp_path, capfd):
    root, out = Path(arguments[1]), tmp_path / "out"
    arguments = arguments[:6]  # those that have an effect on an audit
    assert main([*arguments, "--audit_only"]) == 0
    assert "audit: nothing found" in capfd.readouterr().out
    assert names(out) == {"audit.csv", "config.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["kind"] == "audit"
    assert parse_arguments(shlex.split(config["command"])[2:])[0].audit_only
    shutil.copy(root / "Train/melanoma/0000.png", root / "Test/melanoma/a copy.png")
    shutil.copy(root / "Train/melanoma/0001.png", root / "Train/mole $1_x/other.png")
    (root / "Test/melanoma/empty.jpg").touch()
    assert main([*arguments, "--audit_only"]) == 1
    printed = capfd.readouterr().out
    for text in ("files that cannot be read: 1", "images with several labels: 1,",
                 "groups of identical files: 2"):  # fmt: skip
        assert text in printed
    assert names(out) == {"audit.csv", "audit.png", "config.json"}
    table = pd.read_csv(out / "audit.csv")
    assert list(table.columns) == ["kind", "images", "classes", "distance"]
    assert table["kind"].tolist() == [
        "unreadable", "contradiction", "leakage", "identical", "identical",
    ]  # fmt: skip
    assert table["images"][2] == "Test/melanoma/a copy.png; Train/melanoma/0000.png"
    with Image.open(out / "audit.png") as image:
        image.load()
    assert main(["--data_dir", str(root / "nothing"), "--audit_only"]) == 2


def test_a_run_says_what_no_model_can_get_right(arguments, tmp_path, capfd):
    root = Path(arguments[1])
    for i in range(12):
        copy = root / f"Train/mole $1_x/copy {i}.png"
        shutil.copy(root / f"Train/melanoma/{i:04d}.png", copy)
    main([*arguments, "--models", "simple_cnn"])
    printed = capfd.readouterr().out
    assert "audit: images with several labels: 12," in printed
    metadata = pd.read_csv(tmp_path / "out/splits.csv")
    doubled = metadata[(metadata["split"] == "test") & metadata["path"].str.contains("copy")]
    assert len(doubled) > 0
    assert f"at least {len(doubled)} of the {(metadata['split'] == 'test').sum()} test" in printed
    assert (tmp_path / "out/audit.png").exists()
    dropped = ["--label_conflicts", "drop", "--save_dir", str(tmp_path / "dropped")]
    main([*arguments, "--models", "simple_cnn", *dropped])
    assert "at least" not in capfd.readouterr().out


def test_a_model_alone_is_the_same_as_among_others(arguments, tmp_path):
    main([*arguments, "--models", "simple_cnn", "resnet_scratch"])
    main([*arguments, "--models", "resnet_scratch", "--save_dir", str(tmp_path / "alone")])
    first, _ = load_model(tmp_path / "out/resnet_scratch/model.pth")
    alone, _ = load_model(tmp_path / "alone/resnet_scratch/model.pth")
    expected = alone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rates_drawn_are_those_trained_with(arguments, schedule, monkeypatch):
    drawn = []
    plot = "experiment.pipeline.plot_learning_curves"
    monkeypatch.setattr(plot, lambda history, **options: drawn.append((history, options)))
    chosen = ["--models", "simple_cnn", "--eval_every", "1", "--schedule", schedule]
    assert main([*arguments, *chosen]) == 0
    ((history, options),) = drawn
    assert history["step"] == [1, 2, 3, 4]
    assert options["learning_rates"] == history["learning_rate"]
    assert len(set(options["learning_rates"])) == (1 if schedule == "constant" else 4)


def test_figures_name_the_files_that_they_show(arguments, tmp_path, monkeypatch, quick_figures):
    shown = {}

    def watch(name):
        plot = getattr(visualizations, name)

        def watched(*data, **options):
            shown.setdefault(name, []).append((data, options))
            return plot(*data, **options)

        monkeypatch.setattr(visualizations, name, watched)

    for name in ("plot_mistakes", "plot_gradcams"):
        watch(name)
    assert main([*arguments, "--models", "simple_cnn", "resnet_scratch"]) == 0
    assert len(shown["plot_gradcams"]) == 2
    for (_, *columns), options in shown["plot_mistakes"] + shown["plot_gradcams"]:
        table = pd.read_csv(tmp_path / "out" / options["title"] / "predictions.csv")
        rows = table.set_index("path").loc[options["names"]]
        true, predicted = [column for column in columns if np.ndim(column) == 1][:2]
        assert rows["true_class"].tolist() == list(true)
        assert rows["predicted_class"].tolist() == list(predicted)


def test_resume_passes_over_what_is_finished_and_finishes_the_rest(arguments, tmp_path, capfd):
    chosen = ["--models", "simple_cnn", "resnet_scratch"]
    main([*arguments, *chosen])
    out = tmp_path / "out"
    (out / "resnet_scratch/metrics.json").unlink()
    expected = pd.read_csv(out / "resnet_scratch/predictions.csv")
    finished = snapshot(out / "simple_cnn")
    capfd.readouterr()
    assert main([*arguments, *chosen, "--resume"]) == 0
    assert "already finished" in capfd.readouterr().out
    assert snapshot(out / "simple_cnn") == finished
    assert pd.read_csv(out / "resnet_scratch/predictions.csv").equals(expected)
    assert list(pd.read_csv(out / "comparison.csv")["model"]) == chosen[1:]


def test_resume_with_other_settings_is_refused(arguments, tmp_path, capfd):
    main([*arguments, "--models", "simple_cnn"])
    before = snapshot(tmp_path / "out")
    assert main([*arguments, "--models", "simple_cnn", "--resume", "--num_steps", "6"]) == 2
    assert "num_steps is 6, but was 4" in capfd.readouterr().err
    assert snapshot(tmp_path / "out") == before


def test_resume_never_compares_models_of_different_runs(arguments, tmp_path, capfd):
    simple = [*arguments, "--models", "simple_cnn"]
    main(simple)
    main([*arguments, "--models", "resnet_scratch", "--num_steps", "3"])
    both = [*arguments, "--models", "simple_cnn", "resnet_scratch", "--resume", "--num_steps", "3"]
    assert main(both) == 2
    assert "simple_cnn belongs to another run: num_steps is 3, but was 4" in capfd.readouterr().err
    assert main([*simple, "--resume", "--save_dir", str(tmp_path / "out")]) == 0
    (Path(arguments[1]) / "Train/melanoma/0000.png").unlink()
    before = snapshot(tmp_path / "out")
    assert main([*simple, "--resume"]) == 2
    assert "images or splits differ" in capfd.readouterr().err
    assert snapshot(tmp_path / "out") == before


def test_a_config_of_something_else_is_not_overwritten(arguments, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text('{"model_type": "vit"}')
    before = snapshot(tmp_path / "out")
    assert main(arguments) == 2
    assert "config.json was not written by this program" in capfd.readouterr().err
    assert snapshot(tmp_path / "out") == before


def test_the_demo_leaves_a_real_run_alone(arguments, tmp_path, monkeypatch, capfd):
    main([*arguments, "--models", "simple_cnn"])
    before = snapshot(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert main(["--demo", "--device", "cpu", "--save_dir", "out"]) == 2
    assert "out contains results of another run: simple_cnn" in capfd.readouterr().err
    assert snapshot(tmp_path / "out") == before


def test_an_older_run_is_never_taken_for_this_one(arguments, tmp_path, monkeypatch):
    main([*arguments, "--models", "simple_cnn"])

    def fails(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr("experiment.pipeline.train", fails)
    assert main([*arguments, "--models", "simple_cnn", "--overwrite"]) == 2
    left = names(tmp_path / "out/simple_cnn")
    assert not {"metrics.json", "last.pth"} & left
    assert "comparison.csv" not in names(tmp_path / "out")


def test_tables_and_official_splits_reach_the_run(arguments, tmp_path):
    root = Path(arguments[1])
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    table = pd.DataFrame({"path": paths, "patient": [i // 3 for i in range(len(paths))]})
    table.to_csv(tmp_path / "patients.csv", index=False)
    options = ["--metadata_csv", str(tmp_path / "patients.csv"), "--group_by", "patient"]
    assert main([*arguments, "--models", "simple_cnn", *options]) == 0
    first = pd.read_csv(tmp_path / "out/splits.csv")
    assert first.groupby("patient")["split"].nunique().max() == 1
    (tmp_path / "out/splits.csv").rename(tmp_path / "splits.csv")
    options = ["--splits_csv", str(tmp_path / "splits.csv"), "--seed", "7", "--overwrite"]
    assert main([*arguments, "--models", "simple_cnn", *options]) == 0
    again = pd.read_csv(tmp_path / "out/splits.csv")
    assert again["split"].tolist() == first["split"].tolist()


def test_a_class_of_one_image_works_with_a_warning(arguments, make_images, capfd):
    root = make_images({"a": 12, "b": 12, "lonely": 1}, name="lonely")
    options = ["--data_dir", str(root), "--models", "simple_cnn", "--class_weights", "balanced"]
    assert main([*arguments, *options]) == 0
    assert "warning: some splits lack a class: lonely" in capfd.readouterr().err


# ---------------------------------------------------------------------------- screening


@pytest.fixture
def quick(tmp_path):
    """Flags of a run of one small model on another folder, given as a function of the folder."""
    return lambda root: training_flags(root, tmp_path / "out", models="simple_cnn")


def test_the_codes_of_ham10000_are_screened_without_a_warning(quick, make_images, tmp_path, capfd):
    counts = dict.fromkeys(["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"], 12)
    root = make_images({"all": sum(counts.values())}, name="ham", size=32)
    stems = sorted(path.stem for path in root.rglob("*.png"))
    table = pd.DataFrame({"image_id": stems, "dx": np.repeat(list(counts), 12)})
    table.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    labels = ["--labels_csv", str(tmp_path / "HAM10000_metadata.csv"), "--label_column", "dx"]
    assert main([*quick(root), *labels]) == 0
    printed = capfd.readouterr()
    assert "counted as malignant: akiec, bcc, mel; benign: bkl, df, nv, vasc\n" in printed.out
    assert printed.err == ""
    metrics = json.loads((tmp_path / "out/simple_cnn/metrics.json").read_text())
    screening = metrics["screening"]
    assert screening["malignant"]["classes"] == ["akiec", "bcc", "mel"]
    assert screening["melanoma"]["classes"] == ["mel"]
    assert screening["malignant"]["classes_left_out"] == metrics["counted_as"]["unknown"] == []


def test_a_run_says_when_screening_is_off_and_the_report_does(quick, make_images, tmp_path, capfd):
    root = make_images({"cat": 14, "dog": 14}, name="pets")
    assert main(quick(root)) == 0
    (line,) = capfd.readouterr().err.splitlines()
    off = "none of the classes cat, dog is known as malignant; name those that are malignant"
    assert f"warning: screening is off: {off} with --malignant_classes" in line
    assert f"Screening is off: {off}" in (tmp_path / "out/report.html").read_text()
    assert json.loads((tmp_path / "out/simple_cnn/metrics.json").read_text())["screening"] == {}


def test_images_of_a_class_that_is_not_known_are_no_negatives(quick, make_images, tmp_path, capfd):
    root = make_images({"melanoma (in situ)": 14, "nevus": 14, "UNK": 14}, name="unknown")
    assert main(quick(root)) == 0
    printed, counted = capfd.readouterr(), "malignant: melanoma (in situ); benign: nevus"
    assert f"counted as {counted}; not known: UNK\n" in printed.out
    assert "left out of the screening metrics: UNK;" in printed.err
    metrics = json.loads((tmp_path / "out/simple_cnn/metrics.json").read_text())
    for target in ("malignant", "melanoma"):
        found = metrics["screening"][target]
        assert found["classes"] == ["melanoma (in situ)"] and found["classes_left_out"] == ["UNK"]
        assert found["negatives"] == metrics["test"]["per_class"]["nevus"]["support"]
    assert "left out of the screening metrics: UNK." in (tmp_path / "out/report.html").read_text()


def test_a_malignant_class_that_there_is_not_is_named_with_the_nearest_before_any_training(
    quick, make_images, tmp_path, capfd
):
    root = make_images({"melanoma": 14, "basal cell carcinoma": 12, "nevus": 12}, name="three")
    wanted = ["--malignant_classes", "melanoma", "bsal cell carcinoma"]
    assert main([*quick(root), *wanted]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "unknown class bsal cell carcinoma; did you mean basal cell carcinoma" in line
    assert not (tmp_path / "out").exists()


def test_a_split_of_an_unknown_name_in_a_table_is_an_error(quick, make_images, tmp_path, capfd):
    root = make_images({"melanoma": 14, "nevus": 14}, name="two")
    paths = [f"{name}/{i:04d}.png" for name in ("melanoma", "nevus") for i in range(14)]
    splits = ["trian", *["train"] * 17, *["VAL"] * 5, *["Test"] * 5]
    pd.DataFrame({"path": paths, "split": splits}).to_csv(tmp_path / "splits.csv", index=False)
    words = [*quick(root), "--splits_csv", str(tmp_path / "splits.csv")]
    assert main(words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "split is 'trian' for 1 images, such as melanoma/0000.png; it has to be train" in line
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- several processes


def torchrun(arguments, script=ROOT / "train_models.py", **options):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen([*launcher, str(script), *arguments], text=True, **options)


def test_two_processes_train_what_one_with_twice_the_batch_does(
    arguments, start_processes, tmp_path
):
    options = ["--models", "simple_cnn", "--dropout_rate", "0", "--precision", "fp32"]
    words = [*arguments, *options, "--batch_size", "4"]
    both = start_processes(ROOT / "train_models.py", *words)
    main([*arguments, *options, "--batch_size", "8", "--save_dir", str(tmp_path / "one")])
    (printed, errors), (printed_by_second, _) = (each.communicate(timeout=240) for each in both)
    assert [each.returncode for each in both] == [0, 0], errors
    assert "2 processes with batches of 8 images in all" in printed
    assert printed.count("Everything is in") == 1 and printed_by_second == ""
    assert names(tmp_path / "out/simple_cnn") - {"mistakes.png"} == MODEL_FILES

    one, two = (tmp_path / name / "simple_cnn" for name in ("one", "out"))
    expected, found = (load_model(folder / "model.pth")[0].state_dict() for folder in (one, two))
    assert all(torch.allclose(expected[key], found[key], atol=1e-6) for key in expected)
    histories = [pd.read_csv(folder / "history.csv") for folder in (one, two)]
    for column in set(histories[0]) - {"images_per_second"}:
        assert np.allclose(histories[0][column], histories[1][column], atol=1e-5), column
    predictions = [pd.read_csv(folder / "predictions.csv") for folder in (one, two)]
    assert predictions[0]["path"].equals(predictions[1]["path"])
    assert np.allclose(*(p.filter(like="prob_") for p in predictions), atol=1e-5)


SMALL_DEMO = """
import functools, sys, train_models
from experiment import pipeline
pipeline.make_dataset = functools.partial(pipeline.make_dataset, num_images=60, size=48)
sys.exit(train_models.main())
"""


def test_two_processes_draw_the_demo_once_and_train_on_it(start_processes, tmp_path):
    script = tmp_path / "small_demo.py"
    script.write_text(SMALL_DEMO)
    quick = ["--models", "simple_cnn", "--num_steps", "2", "--eval_every", "2", "--device", "cpu"]
    both = start_processes(script, "--demo", "--batch_size", "8", *quick, cwd=tmp_path)
    (printed, errors), (printed_by_second, _) = (each.communicate(timeout=240) for each in both)
    assert [each.returncode for each in both] == [0, 0], errors
    assert printed_by_second == ""
    # The second process may be quicker: it says nothing, and the first finds the images.
    assert printed.count("drawing synthetic images in data/demo") <= 1
    assert len(list((tmp_path / "data/demo").rglob("*.jpg"))) == 60
    out = tmp_path / "models/demo"
    assert names(out / "simple_cnn") - {"mistakes.png"} == MODEL_FILES
    said = json.loads((out / "config.json").read_text())["command"]
    assert said.startswith("torchrun --nproc_per_node=2 train_models.py --demo --models simple_cnn")


def test_of_two_processes_one_audits(arguments, start_processes, tmp_path):
    shutil.copy(
        Path(arguments[1]) / "Test/melanoma/0000.png", Path(arguments[1]) / "Train/mole $1_x"
    )
    both = start_processes(ROOT / "train_models.py", *arguments[:6], "--audit_only")
    (printed, errors), (printed_by_second, _) = (each.communicate(timeout=240) for each in both)
    assert [each.returncode for each in both] == [1, 0] and "error: " not in errors, errors
    assert printed_by_second == ""
    assert printed.count("audit: images with several labels: 1") == 1
    assert names(tmp_path / "out") == {"audit.csv", "audit.png", "config.json"}


def wait_for(file, process, log):
    waited = time.monotonic()
    while not file.exists() and time.monotonic() - waited < 120 and process.poll() is None:
        time.sleep(0.02)
    assert file.exists(), log()


LONG = ["--models", "simple_cnn", "--num_steps", "160", "--eval_every", "160"]
LONG += ["--checkpoint_every", "10"]


def test_when_one_process_is_killed_torchrun_ends_the_other_and_both_can_go_on(
    arguments, start_processes, tmp_path
):
    words = [*arguments, *LONG]
    last = tmp_path / "out/simple_cnn/last.pth"
    with (tmp_path / "log").open("w+") as log:
        both = torchrun(words, stdout=log, stderr=log)
        wait_for(last, both, (tmp_path / "log").read_text)
        workers = Path(f"/proc/{both.pid}/task/{both.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        assert both.wait(timeout=60) != 0
    assert not last.with_name("metrics.json").exists()
    again = start_processes(ROOT / "train_models.py", *words, "--resume")
    assert [each.wait(timeout=120) for each in again] == [0, 0], again[0].communicate()
    assert names(last.parent) - {"mistakes.png"} == MODEL_FILES
    assert "160" in last.with_name("history.csv").read_text()


def test_when_one_process_is_to_stop_both_do_after_the_same_step(
    arguments, start_processes, tmp_path
):
    both = start_processes(ROOT / "train_models.py", *arguments, *LONG)
    last = tmp_path / "out/simple_cnn/last.pth"
    wait_for(last, both[0], lambda: both[0].communicate()[1])
    both[1].send_signal(signal.SIGTERM)
    assert [each.wait(timeout=60) for each in both] == [143, -signal.SIGTERM]
    said = "stopped by SIGTERM; continue with: torchrun --nproc_per_node=2 train_models.py"
    assert said in both[0].communicate()[1]
    assert not last.with_name("metrics.json").exists()


NAN_IN_ONE = """
import sys
import torch
import torch.distributed as dist
from models import get_model
from training import make_optimizer, train
dist.init_process_group("gloo")
model = get_model("simple_cnn", 2, image_size=16, seed=0)
batch = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
spoilt = batch[0] * (torch.nan if dist.get_rank() == 1 else 1), batch[1]
batches = [batch, batch, spoilt, *[batch] * 50]
train(model, batches, [batch], 2, 40, make_optimizer(model), eval_every=5, save_path=sys.argv[1])
"""


def test_a_loss_that_is_none_in_one_process_ends_all_at_the_same_step(start_processes, tmp_path):
    (tmp_path / "script.py").write_text(NAN_IN_ONE)
    both = start_processes(tmp_path / "script.py", tmp_path / "m")
    assert [each.wait(timeout=120) for each in both] == [1, 1]
    for each in both:
        _, errors = each.communicate()
        assert "NonFiniteLossError: the training loss is nan at step 3 (" in errors
    assert not (tmp_path / "m/last.pth").exists()


# ---------------------------------------------------------------------------- mistakes


def mistakes(make_images, tmp_path):
    root = make_images({"a": 5, "b": 5}, name="good")
    broken = make_images({"a": 5, "b": 5}, name="broken")
    Image.open(broken / "a/0000.png").save(broken / "a/cut.jpg")
    whole = (broken / "a/cut.jpg").read_bytes()
    (broken / "a/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (broken / "b/text.jpg").write_text("no image")
    (tmp_path / "bare").mkdir()
    single = make_images({"Train/a": 3, "Test/a": 3}, name="single")
    tiny = make_images({"a": 1, "b": 1}, name="tiny")
    return [
        (["--data_dir", str(tmp_path / "nowhere")], ["nowhere: no such folder"]),
        (["--data_dir", str(tmp_path / "bare")], ["bare: no images"]),
        (["--data_dir", str(single)], ["one class, a"]),
        (["--data_dir", str(broken)], ["a/cut.jpg (", "b/text.jpg (", "--skip_unreadable"]),
        (["--data_dir", str(tiny), "--batch_size", "2"], ["none are left for valid, test"]),
        (["--data_dir", str(root), "--save_dir", str(root / "out")], ["is inside"]),
        (["--batch_size", "0"], ["--batch_size: must be at least 1"]),
        (["--num_steps", "ten"], ["--num_steps: must be a whole number, not 'ten'"]),
        (["--learning_rate", "nan"], ["--learning_rate: must be greater than 0, not nan"]),
        (["--models", "nonsense"], ["unknown model 'nonsense'", "resnet"]),
        (["--splits", "0.5", "0.2", "0.2"], ["--splits 0.5 0.2 0.2 adds up to 0.9"]),
        (["--weights", "imagenet"], ["resnet18-f37072fd.pth", "--weights none"]),
        (["--weights", str(tmp_path / "gone.pth")], ["gone.pth: no such file"]),
        (["--device", "nonsense"], ["device nonsense"]),
        (["--image_size", "8"], ["--image_size: must be at least 16, not 8"]),
        (["--demo"], ["--demo", "--data_dir"]),
        (["--device", "meta"], ["device meta"]),
        (
            ["--models", "simple_cnn", "--weights", str(root)],
            ["all chosen models start from random weights"],
        ),
        (["--mistyped"], ["unknown flag --mistyped; see --help"]),
        (["--learning_rat", "1"], ["did you mean --learning_rate?"]),
    ]


def test_mistakes_are_one_line_and_touch_nothing(
    arguments, make_images, tmp_path, monkeypatch, capfd
):
    def no_network(url, *args, **kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    out = tmp_path / "out"
    (out / "own_model").mkdir(parents=True)
    (out / "own_model/metrics.json").write_text("{}")
    (out / "own_model/last.pth").write_text("precious")
    before = snapshot(out)
    for flags, expected in mistakes(make_images, tmp_path):
        try:
            status = main([*arguments, *flags])
        except SystemExit as stop:  # argparse leaves by itself
            status = stop.code
        (message,) = errors(capfd.readouterr().err)
        assert status == 2, flags
        assert all(part in message for part in expected), message
        assert snapshot(out) == before, flags


def test_out_of_memory_is_one_line_with_the_batch_size_to_try(arguments, monkeypatch, capfd):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    monkeypatch.setattr("experiment.pipeline.train", fails)
    assert main([*arguments, "--batch_size", "16", "--accumulate", "2"]) == 2
    (line,) = errors(capfd.readouterr().err)
    assert "out of memory with --batch_size 16; try --batch_size 8 --accumulate 4" in line


def test_a_compiler_that_is_not_there_is_one_line(arguments, tmp_path):
    words = [sys.executable, ROOT / "train_models.py", *arguments]
    words += ["--models", "simple_cnn", "--compile"]
    env = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(words, env=os.environ | env, capture_output=True, text=True)
    (line,) = errors(result.stderr)
    assert result.returncode == 2
    assert "--compile does not work here (" in line and "leave it out" in line


def test_a_warning_and_an_error_have_no_traceback_in_a_real_process(tmp_path):
    words = [sys.executable, ROOT / "train_models.py", "--data_dir", tmp_path / "x"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr


# ---------------------------------------------------------------------------- flags


def test_the_models_of_the_driver_are_those_of_the_library():
    assert tuple(MODELS) == MODEL_NAMES


def test_dashes_and_underscores_both_work():
    for flag in ("--batch-size", "--batch_size", "--batch-size=7"):
        value = [] if "=" in flag else ["7"]
        assert parse_arguments(["--data-dir", "a-b_c", flag, *value])[0].batch_size == 7
    for flag in ("--no-balanced", "--no_balanced"):
        assert parse_arguments(["--data_dir", "x", flag])[0].balanced is False
    settings, _ = parse_arguments(["--data_dir", "x", "--no-skip-unreadable"][:2])
    assert settings == Settings(data_dir="x")


any_settings = st.builds(
    Settings,
    data_dir=st.sampled_from(["data/raw", "a folder", "it's"]),
    models=st.lists(st.sampled_from(MODEL_NAMES), min_size=1, unique=True).map(tuple),
    splits=st.sampled_from([(0.7, 0.2, 0.1), (0.5, 0.25, 0.25)]),
    learning_rate=st.floats(1e-6, 1, exclude_min=True),
    checkpoint_every=st.none() | st.integers(1, 9),
    balanced=st.booleans(),
    augmentation=st.booleans(),
    schedule=st.sampled_from(["cosine", "constant"]),
)


@given(any_settings, st.booleans(), st.sampled_from(["", "resume", "overwrite"]))
def test_the_command_printed_gives_the_same_settings(settings, is_demo, how):
    settings = replace(settings, **({how: True} if how else {}))
    if is_demo:
        settings = replace(settings, data_dir=DEMO_SETTINGS.data_dir)
    words = shlex.split(command(settings, is_demo))
    assert words[:2] == ["python", "train_models.py"]
    assert parse_arguments(words[2:]) == (settings, is_demo)


def test_help_and_mistyped_flags_do_not_wait_for_torch():
    script = "import sys, train_models; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0


# ---------------------------------------------------------------------------- the library's example


def test_the_example_of_the_readme_runs_as_it_stands(make_images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights = tmp_path / "torch/hub/checkpoints/resnet50-11ad3fa6.pth"
    weights.parent.mkdir(parents=True)
    torch.save(resnet50(weights=None).state_dict(), weights)
    make_images({"Train/melanoma": 14, "Train/nevus": 10, "Test/nevus": 4}, name="data/raw")
    monkeypatch.chdir(tmp_path)

    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "num_steps=2000" in code and 'DatasetBuilder("./data/raw")' in code
    shorter = code.replace("num_steps=2000", "num_steps=2").replace("batch_size=32", "batch_size=4")
    namespace = {}
    exec(shorter.replace('("./data/raw")', '("./data/raw", image_size=32)'), namespace)
    assert namespace["metrics"]["step"] == [2]
    assert math.isfinite(namespace["metrics"]["valid_loss"][0])
    assert names(tmp_path / "models/resnet_finetuned") == {"model.pth", "last.pth", "history.csv"}


def test_a_saved_model_gives_the_probabilities_in_predictions_csv(
    arguments, tmp_path, auto_precision
):
    main([*arguments, "--models", "simple_cnn"])
    model, info = load_model(tmp_path / "out/simple_cnn/model.pth")
    builder = DatasetBuilder(arguments[1], image_size=info["image_size"])
    splits, _ = builder.build()
    loader = create_dataloaders(splits, 8, device="cpu")["test"]
    expected = pd.read_csv(tmp_path / "out/simple_cnn/predictions.csv")
    found = evaluate(model, loader).probabilities
    decided = [info["classes"][label] for label in found.argmax(axis=1)]
    assert expected["predicted_class"].tolist() == decided
    calibrated = Calibration(info["temperature"], tuple(info["bias"])).apply(found)
    assert np.allclose(expected.filter(like="prob_").to_numpy(), calibrated, atol=1e-12)
    again = predict(tmp_path / "out/simple_cnn/model.pth", Path(arguments[1])).set_index("path")
    for row in expected.to_dict("records"):
        alone = again.loc[(Path(arguments[1]) / row["path"]).as_posix()]
        assert alone["class"] == row["predicted_class"]
        assert alone["prob_melanoma"] == pytest.approx(row["prob_melanoma"], abs=1e-6)
