"""Trained models meet other images: the same figures, tables and report as after training."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import recall_score

from experiment.external import EvaluationSettings, evaluate_folder, find_label
from experiment.results import compare_models
from models import ModelInfo
from predict import main as predict_main
from storage.tensors import load_tensors, save_tensors
from train_models import main as train_main

pytestmark = pytest.mark.usefixtures("quick_figures")


@pytest.fixture(scope="module")
def trained(make_module_images):
    """A small model of three classes, trained for a few steps, and the folder of its images."""
    root = make_module_images({"melanoma": 14, "nevus": 12, "vascular lesion": 12})
    arguments = [
        "--data_dir", str(root), "--save_dir", str(root.parent / "out"), "--image_size", "32",
        "--num_steps", "12", "--batch_size", "8", "--models", "simple_cnn", "--device", "cpu",
        "--learning_rate", "0.01", "--dropout_rate", "0",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", save_a_pixel)
        assert train_main(arguments) == 0
    return root.parent / "out/simple_cnn/model.pth", root


def save_a_pixel(figure, file, *, format, **options):
    Image.new("RGB", (1, 1)).save(file, format)


@pytest.mark.draws
def test_other_images_are_measured_as_the_test_split_was(
    auto_precision, trained, make_images, tmp_path
):
    model, _ = trained
    # Another hospital names its folders otherwise, and has not all classes.
    other = make_images({"Nevi/Melanomas": 9, "Vascular_Lesion": 8}, name="other", seed=3)
    comparison, unreadable = evaluate_folder(
        [model], other, tmp_path / "found", EvaluationSettings(device="cpu")
    )
    assert unreadable == []
    report = json.loads((tmp_path / "found/simple_cnn/metrics.json").read_text())
    predictions = pd.read_csv(tmp_path / "found/simple_cnn/predictions.csv")
    assert predictions["true_class"].value_counts().to_dict() == {
        "melanoma": 9, "vascular lesion": 8,
    }  # fmt: skip
    recall = recall_score(
        predictions["true_class"], predictions["predicted_class"], average="weighted",
        zero_division=0,
    )  # fmt: skip
    assert report["test"]["recall"] == pytest.approx(recall)
    assert comparison["recall"].tolist() == [pytest.approx(recall)]
    assert report["test"]["per_class"]["nevus"]["recall"] is None
    brought = json.loads((model.parent / "metrics.json").read_text())["screening"]["melanoma"]
    thresholds = [
        [point["threshold"] for point in screened["points"]]
        for screened in (brought, report["screening"]["melanoma"])
    ]
    assert np.allclose(*thresholds)  # chosen on validation, never on these images
    assert (tmp_path / "found/report.html").stat().st_size > 100_000
    config = json.loads((tmp_path / "found/config.json").read_text())
    assert config["precision"] == report["precision"] == auto_precision


def test_the_command_names_what_cannot_be_read_and_says_so_in_its_status(trained, tmp_path, capfd):
    model, root = trained
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy/nevus/broken.jpg").write_text("no image")
    words = ["--model", str(model), "--evaluate", str(tmp_path / "found"), "--device", "cpu"]
    assert predict_main([*words, str(tmp_path / "copy")]) == 1
    printed = capfd.readouterr()
    assert "nevus/broken.jpg: cannot be read" in printed.err
    assert "simple_cnn" in printed.out and "report.html" in printed.out
    assert predict_main([*words, str(root)]) == 0


def test_a_class_that_the_model_does_not_know_is_one_line(trained, make_images, tmp_path, capfd):
    other = make_images({"melanoma": 3, "cat": 3}, name="cats")
    words = ["--model", str(trained[0]), "--evaluate", str(tmp_path / "found"), "--device", "cpu"]
    assert predict_main([*words, str(other)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "the model does not know the class cat, only melanoma, nevus, vascular lesion" in line
    assert not (tmp_path / "found").exists()


def test_images_are_labelled_by_diagnosis_where_the_model_has_another_name_for_it(
    trained, make_images, tmp_path, capfd
):
    other = make_images({"mel": 6, "NV": 5, "Vascular-Lesions": 4}, name="codes")
    words = ["--model", str(trained[0]), "--evaluate", str(tmp_path / "found"), "--device", "cpu"]
    assert predict_main([*words, str(other)]) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("classes named otherwise in the model: NV as nevus, mel as melanoma")
    predictions = pd.read_csv(tmp_path / "found/simple_cnn/predictions.csv")
    assert predictions["true_class"].value_counts().to_dict() == {
        "melanoma": 6, "nevus": 5, "vascular lesion": 4,
    }  # fmt: skip


def test_a_class_of_the_images_that_may_be_several_of_the_model_is_refused():
    classes = ["melanoma in situ", "Melanoma Invasive", "nevus"]
    with pytest.raises(ValueError, match="class mel could be any of .* in situ, Melanoma"):
        find_label("mel", classes)
    assert find_label("Melanoma, invasive", classes) == 1
    assert find_label("melanoma", ["melanoma in situ", "melanoma"]) == 1
    assert find_label("melanoma (in situ)", ["melanoma", "nevus"]) == 0


def test_what_an_earlier_model_took_for_benign_counts_as_benign_only_if_it_is_known_to_be():
    contents = {"config": {}, "classes": ["bcc", "melanoma in situ", "UNK", "nevus"]}

    def kinds(**more):
        info = ModelInfo(**contents, image_size=32, **more)
        return info.malignant_classes, info.unknown_classes

    assert kinds(malignant_classes=["bcc"]) == (["bcc"], ["melanoma in situ", "UNK"])
    assert kinds(malignant_classes=["bcc"], unknown_classes=["UNK"]) == (["bcc"], ["UNK"])
    assert kinds() == (["bcc", "melanoma in situ"], ["UNK"])


def test_models_that_differ_are_measured_by_themselves(trained, tmp_path):
    model, root = trained
    import torch

    contents = torch.load(model, weights_only=True)
    (tmp_path / "twin").mkdir()
    torch.save(contents | {"preprocessors": "abc"}, tmp_path / "twin/model.pth")
    with pytest.raises(ValueError, match="twin was trained with custom preprocessors"):
        evaluate_folder([model, tmp_path / "twin/model.pth"], root, tmp_path / "found")
    shutil.copytree(model.parent, tmp_path / "again/simple_cnn")
    comparison, _ = evaluate_folder(
        [model, Path(tmp_path / "again/simple_cnn/model.pth")], root, tmp_path / "found"
    )
    assert comparison["model"].tolist() == ["simple_cnn", "simple_cnn (2)"]
    assert comparison["gap_to_best"].tolist() == [0, 0]
    assert comparison.loc[0, ["gap_to_best_low", "gap_to_best_high"]].tolist() == [0, 0]
    # A twin may be better or worse on other images, the best never than itself.
    assert comparison["gap_to_best_low"][1] < 0 < comparison["gap_to_best_high"][1]


def test_the_figure_of_the_comparison_has_the_best_model_on_top(tmp_path, monkeypatch):
    labels, classes = np.arange(30) % 3, ["a", "b", "c"]
    for model, num_right in {"worse": 10, "better": 20}.items():
        predicted = np.where(np.arange(30) < num_right, labels, (labels + 1) % 3)
        names = ("precision", "recall", "f1", "accuracy", "balanced_accuracy")
        metrics = {"model": model, "test": dict.fromkeys(names, num_right / 30)}
        metrics["test_intervals"] = dict.fromkeys(names, (0, 1))
        metrics |= {"training_time": 1, "parameters": 2, "trainable_parameters": 2}
        (tmp_path / model).mkdir()
        (tmp_path / model / "metrics.json").write_text(json.dumps(metrics))
        table = pd.DataFrame({"predicted_class": [classes[label] for label in predicted]})
        table.to_csv(tmp_path / model / "predictions.csv")
    drawn = []
    plot = "visualizations.plot_model_comparison"
    monkeypatch.setattr(plot, lambda table, **options: drawn.append(table["model"].tolist()))
    metadata = pd.DataFrame({"group": range(30)})
    dataset = SimpleNamespace(classes=classes, labels=labels, metadata=metadata)
    comparison = compare_models(tmp_path, ["worse", "better"], dataset)
    assert drawn == [["better", "worse"]]
    assert comparison["model"].tolist() == ["better", "worse"]


@pytest.mark.draws
def test_a_model_of_before_calibrations_is_measured_with_its_own_probabilities(trained, tmp_path):
    model, root = trained
    contents = load_tensors(model)
    later = ("temperature", "bias", "thresholds", "malignant_classes", "preprocessors", "metrics")
    for name in (*later, "precision"):
        del contents[name]
    (tmp_path / "old").mkdir()
    save_tensors(tmp_path / "old/model.pth", contents)
    evaluate_folder(
        [tmp_path / "old/model.pth"], root, tmp_path / "found", EvaluationSettings(device="cpu")
    )
    report = json.loads((tmp_path / "found/old/metrics.json").read_text())
    before, after = report["calibration"]["before"], report["calibration"]["after"]
    assert after["count"] == before["count"]
    # Not the same bits: probabilities of 0 become 1e-12, so that they have a logarithm.
    for name in ("log_loss", "brier_score", "expected_calibration_error"):
        assert after[name] == pytest.approx(before[name], abs=1e-9)
    assert report["screening"] == {}
    assert (tmp_path / "found/report.html").stat().st_size > 100_000


def test_a_model_is_measured_on_labels_that_merge_its_classes(trained, make_images, tmp_path):
    model, root = trained
    plain, merged = tmp_path / "plain", tmp_path / "merged"
    evaluate_folder([model], root, plain, EvaluationSettings(device="cpu"))
    class_map = {"melanoma": "malignant", "nevus": "benign", "vascular lesion": "benign"}
    settings = EvaluationSettings(device="cpu", class_map=class_map)
    evaluate_folder([model], root, merged, settings)
    own = pd.read_csv(plain / "simple_cnn/predictions.csv")
    found = pd.read_csv(merged / "simple_cnn/predictions.csv")
    assert found["path"].tolist() == own["path"].tolist()
    assert found["true_class"].tolist() == own["true_class"].map(class_map).tolist()
    both = own["prob_nevus"] + own["prob_vascular lesion"]
    assert found["prob_benign"].tolist() == pytest.approx(both.tolist())
    before, after = (
        json.loads((folder / "simple_cnn/metrics.json").read_text()) for folder in (plain, merged)
    )
    area = before["screening"]["malignant"]["roc_auc"]
    assert after["screening"]["malignant"]["roc_auc"] == pytest.approx(area)
    assert list(after["screening"]) == ["malignant"]  # which class is melanoma is not known now
    assert after["counted_as"] == {"malignant": ["malignant"], "benign": ["benign"], "unknown": []}
    # The truth may have the new names from the start.
    truth = make_images({"malignant": 4, "benign": 4}, name="truth")
    comparison, _ = evaluate_folder([model], truth, tmp_path / "truth_found", settings)
    assert len(comparison) == 1


def test_a_class_that_joins_malignant_and_benign_ones_screens_for_nothing(trained, tmp_path):
    model, root = trained
    settings = EvaluationSettings(device="cpu", class_map=["melanoma=pigmented", "nevus=pigmented"])
    with pytest.warns(UserWarning, match="screening"):
        evaluate_folder([model], root, tmp_path / "out", settings)
    metrics = json.loads((tmp_path / "out/simple_cnn/metrics.json").read_text())
    assert metrics["counted_as"]["unknown"] == ["pigmented"]
    assert metrics["screening"] == {}
