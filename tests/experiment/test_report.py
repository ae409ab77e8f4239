"""The report: says what the run left, is one file, and is safe and usable in a real browser."""

import base64
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from experiment.report import MAX_PNG_SIZE, write_report

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = Path("/usr/bin/chromium")
HOSTILE = "<script>alert(1)</script>"
FIGURES = (
    "class_distribution.png",
    "samples.png",
    "augmentations.png",
    "comparison.png",
    "audit.png",
    "cnn/learning_curves.png",
    "cnn/confusion_matrix.png",
    "cnn/roc_pr_curves.png",
    "cnn/reliability.png",
    "cnn/class_metrics.png",
    "cnn/mistakes.png",
    "cnn/gradcam.png",
)
SUPPORT = {"melanoma": 20, "nevus": 30, "wart": 3}


def metrics_of(model, balanced_accuracy, classes):
    """A `metrics.json` with every key; of the classes the last has no test images of its own."""
    interval = [balanced_accuracy - 0.06, balanced_accuracy + 0.07]
    reliability = {"expected_calibration_error": 0.1234, "maximum_calibration_error": 0.4}
    supports = dict(zip(classes, SUPPORT.values(), strict=True))
    figures = {
        "precision": 0.5,
        "recall": 0.15555,
        "specificity": 0.9,
        "f1": 0.25,
        "roc_auc": 0.93532,
        "average_precision": None,
    }
    point = {
        "aim": "sensitivity 95%",
        "threshold": 0.07421,
        "sensitivity": 0.9,
        "sensitivity_interval": [0.7, 0.97],
        "specificity": 0.41,
        "specificity_interval": [0.25, 0.59],
    }
    group = {
        "images": 28,
        "is_too_small": True,
        "accuracy": 0.5,
        "accuracy_interval": [0.3, 0.7],
        "balanced_accuracy": 0.4,
        "balanced_accuracy_interval": [0.2, 0.6],
    }
    area = {"roc_auc": 0.66, "roc_auc_interval": [0.5, 0.8]}
    gap = {"figure": "balanced_accuracy", "highest": "male", "lowest": "female"}
    return {
        "model": model,
        "classes": list(classes),
        "training_time": 3725.4,
        "parameters": 3365065,
        "trainable_parameters": 558601,
        "test": {
            "balanced_accuracy": balanced_accuracy,
            "precision": 0.55,
            "recall": 0.45,
            "cohen_kappa": -0.1236,
            "macro_roc_auc": None,
            "per_class": {name: figures | {"support": n} for name, n in supports.items()},
            "confusion_matrix": [[3, 17, 0], [0, 30, 0], [1, 1, 1]],
        },
        "test_intervals": {
            "balanced_accuracy": interval,
            "precision": [0.47, 0.65],
            "recall": [0.39, 0.51],
            "per_class": {
                name: {"recall": [0.08, 0.29], "precision": None} for name in supports
            },
        },
        "calibration": {
            "temperature": 1.4142,
            "bias": dict.fromkeys(classes, -0.5),
            "before": reliability | {"log_loss": 1.5, "brier_score": 0.7},
            "after": reliability | {"expected_calibration_error": 0.0567, "log_loss": 1.1},
        },
        "screening": {
            "malignant": {
                "classes": list(classes)[:2],
                "roc_auc": 0.8,
                "roc_auc_interval": [0.7, 0.9],
                "positives": 20,
                "negatives": 33,
                "points": [point],
            }
        },
        "subgroups": {
            "patient_sex": {
                "groups": {"male": group | {"images": 40, "is_too_small": False}, "x": group},
                "widest_gap": gap | {"difference": 0.25, "interval": [0.05, 0.44]},
                "screening": {
                    "malignant": {
                        "roc_auc_of_column": 0.91,
                        "groups": {"male": area | {"positives": 12, "negatives": 28}},
                    }
                },
            }
        },
    }  # fmt: skip


def png(size=(40, 30), noise=False):
    pixels = np.full((*size[::-1], 3), 200, dtype=np.uint8)
    if noise:
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", dpi=(140, 140))
    return buffer.getvalue()


def write(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        text = contents if isinstance(contents, str) else json.dumps(contents)
        path.write_text(text, encoding="utf-8")


def make_run(save_dir, classes=tuple(SUPPORT), command="python train_models.py --seed 7"):
    """A small `save_dir` with all that a run leaves: models `cnn`, the best, and `net`."""
    write(save_dir / "cnn/metrics.json", metrics_of("cnn", 0.5037, classes))
    write(save_dir / "net/metrics.json", metrics_of("net", 0.4512, classes))
    write(
        save_dir / "cnn/history.csv",
        "step,valid_loss,valid_balanced_accuracy\n10,2.0,0.3\n20,1.5,0.48\n30,1.4,0.47\n",
    )
    write(
        save_dir / "comparison.csv",
        "model,balanced_accuracy,gap_to_best,gap_to_best_low,gap_to_best_high\n"
        "net,0.4512,0.0525,-0.0312,0.1377\ncnn,0.5037,0,0,0\n",
    )
    write(
        save_dir / "config.json",
        {
            "command": command,
            "settings": {"data_dir": "raw", "seed": 7, "balanced": True, "labels_csv": None},
            "runs": {"cnn": {"processes": 2}},
            "started": "2026-11-23T22:34:51+0000",
            "versions": {"python": "3.11.7", "torch": "2.14.1+cu130"},
            "machine": "Linux-6.18",
            "gpu": None,
            "threads": 3,
        },
    )
    lines = ["path,class,content_hash,group,split"]
    quoted = ['"' + name.replace('"', '""') + '"' for name in classes]
    for number, split in enumerate(["train"] * 1200 + ["valid"] * 6 + ["test"] * 6):
        lines.append(f"{number}.png,{quoted[number % 3]},{number // 2},{number // 2},{split}")
    write(save_dir / "splits.csv", "\n".join(lines) + "\n")
    write(
        save_dir / "audit.csv",
        "kind,images,classes,distance\n"
        "contradiction,0.png; 1.png,melanoma; nevus,0.0\n"
        "leakage,0.png; 1.png,melanoma; nevus,0.0\n"
        "identical,0.png; 1.png,melanoma; nevus,0.0\n"
        f"tiny,{quoted[0]},nevus,\n",
    )
    for name in FIGURES:
        write(save_dir / name, png())
    return save_dir


class Page(HTMLParser):
    """What is on the page: its texts by element, the elements with their attributes."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.handle_data(" ")
        self.texts.append((tag, []))
        if tag not in ("meta", "link", "img"):
            self.open.append(self.texts[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        for _, text in self.open:
            text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, *tags):
        """The texts of these elements, white space made single."""
        return [" ".join("".join(text).split()) for tag, text in self.texts if tag in tags]

    def words(self):
        return self.text("body")[0]


@pytest.fixture
def save_dir(tmp_path):
    return make_run(tmp_path / "models")


@pytest.fixture
def page(save_dir):
    return Page(write_report(save_dir))


# ---------------------------------------------------------------------------- what it says


def test_the_verdict_comes_first_with_its_interval_and_the_recall_of_melanoma(page):
    assert page.text("h1") == ["Skin lesion classification"]
    verdict = "Of 2 models, cnn has the highest balanced accuracy, 0.50 (0.44 to 0.57)."
    assert verdict in page.text("p")
    said = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    assert said["Is one model the best?"].startswith("not shown: cnn is ahead, but")
    assert said["Is melanoma found?"] == "3 of 20: sensitivity 0.16 (0.08 to 0.29), precision 0.50"


def test_the_title_can_be_chosen(save_dir):
    page = Page(write_report(save_dir, title="Another hospital"))
    assert page.text("h1") == page.text("title") == ["Another hospital"]


def test_the_report_lies_beside_what_it_is_of(save_dir):
    assert write_report(save_dir) == save_dir / "report.html"
    assert [path.name for path in save_dir.iterdir() if path.name.startswith(".")] == []


def test_the_comparison_has_the_best_first_and_says_what_is_not_told_apart(page):
    rows = page.text("tr")
    assert rows[1].startswith("cnn 0.50 (0.44 to 0.57) – 0.55 (0.47 to 0.65)")
    assert rows[2].startswith("net 0.45 (0.39 to 0.52) 0.05 (−0.03 to 0.14) 0.55 (0.47 to 0.65)")
    assert rows[1].endswith("62 min 05 s 3,365,065")
    assert any("cannot tell net from cnn" in text for text in page.text("p"))


def test_models_and_classes_that_look_like_numbers_or_nothing_are_names(save_dir):
    for old, new in {"cnn": "007", "net": "NA"}.items():
        shutil.move(save_dir / old, save_dir / new)
        metrics = json.loads((save_dir / new / "metrics.json").read_text())
        write(save_dir / new / "metrics.json", metrics | {"model": new})
    table = (save_dir / "comparison.csv").read_text().replace("net", "NA").replace("cnn", "007")
    (save_dir / "comparison.csv").write_text(table)
    rows = Page(write_report(save_dir)).text("tr")
    assert any(row.startswith("007 0.50") and " – " in row for row in rows)
    assert any(row.startswith("NA 0.45") and "0.05 (−0.03 to 0.14)" in row for row in rows)


def test_models_that_are_told_apart_are_said_to_be(save_dir):
    table = (save_dir / "comparison.csv").read_text().replace("-0.0312", "0.0012")
    (save_dir / "comparison.csv").write_text(table)
    texts = Page(write_report(save_dir)).text("p")
    assert not any("cannot tell" in text for text in texts)
    assert "All other models are behind cnn: no interval of a gap includes 0." in texts


def test_a_reader_is_told_what_to_know_before_believing_it(page):
    points = page.text("li")

    def said(what):
        return next(text for text in points if text.startswith(what))

    assert "53 images of 3 classes, of 1,212 in all" in said("Test split.")
    assert said("Classes with too few test images.").split("images. ")[1].startswith("wart (3):")
    assert "1 image with several labels, of which at most one" in said("Contradictory labels.")
    # The six test images are three pairs of equal files, each pair of two classes.
    assert "must misclassify at least 3 test images." in said("Contradictory labels.")
    assert "No images that belong together are in different splits." in said("Leakage.")
    assert "1 image in several of the splits that the data came with." in said("Leakage.")
    assert "1 group of identical files and 0 pairs" in said("Duplicates.")
    assert said("Chosen on the test images.")
    assert "Nothing here is approved" in said("Not a diagnostic device.")


def test_groups_in_several_splits_are_called_leakage(save_dir):
    splits = (save_dir / "splits.csv").read_text().replace(",605,test", ",0,test")
    (save_dir / "splits.csv").write_text(splits)
    points = Page(write_report(save_dir)).text("li")
    assert any(text.startswith("Leakage. 1 group of images that belong") for text in points)


def test_images_left_out_for_their_labels_are_not_held_against_the_models(save_dir):
    config = json.loads((save_dir / "config.json").read_text())
    config["settings"]["label_conflicts"] = "drop"
    write(save_dir / "config.json", config)
    point = next(t for t in Page(write_report(save_dir)).text("li") if t.startswith("Contradict"))
    assert "left out of training and test" in point
    assert "misclassify" not in point


def test_the_files_of_the_mistakes_are_named_the_most_confident_first(page, tmp_path):
    assert "cnn: the most confident mistakes" not in page.text("caption")  # no predictions.csv
    save_dir = make_run(tmp_path / "out")
    lines = ["path,true_class,predicted_class,prob_melanoma,prob_nevus,prob_wart"]
    lines += ["a/1.png,melanoma,nevus,0.3,0.6,0.1", "a/2.png,nevus,nevus,0,1,0"]
    lines += ["a/<3>.png,melanoma,wart,0,0.001,0.999"]
    lines += [f"b/{n}.png,wart,nevus,0.45,0.5,0.05" for n in range(20)]
    write(save_dir / "cnn/predictions.csv", "\n".join(lines) + "\n")
    rows = Page(write_report(save_dir)).text("tr")
    first = rows.index("a/<3>.png melanoma predicted as wart, probability >99 %")
    assert rows[first + 1] == "a/1.png melanoma predicted as nevus, probability 60 %"
    shown = [row for row in rows if " predicted as " in row]
    assert len(shown) == 12 and shown[-1] == "b/9.png wart predicted as nevus, probability 50 %"
    write(save_dir / "cnn/predictions.csv", "\n".join(lines[:2]).replace("0.6", "high"))
    with pytest.raises(ValueError, match=r"predictions\.csv: not a table of predictions"):
        write_report(save_dir)


def test_a_class_has_its_figures_with_intervals_and_a_dash_where_there_is_none(page):
    row = next(text for text in page.text("tr") if text.startswith("melanoma 20"))
    assert row == "melanoma 20 0.16 (0.08 to 0.29) 0.50 0.900 0.250 0.935 –"


def test_screening_calibration_and_subgroups_of_each_model_are_shown(page):
    assert page.text("h2")[2:4] == ["cnn", "net"]
    rows, captions = page.text("tr"), page.text("caption")
    assert rows.count("sensitivity 95 % 0.0742 0.90 (0.70 to 0.97) 0.41 (0.25 to 0.59)") == 2
    screening = "cnn: malignant (melanoma, nevus) against the rest, 20 against 33 test images, "
    assert screening + "ROC AUC 0.80 (0.70 to 0.90)" in captions
    assert "Expected calibration error 0.123 0.057" in rows
    assert "Brier score 0.700 –" in rows
    assert "x 28 (too few) 0.40 (0.20 to 0.60) 0.50 (0.30 to 0.70)" in rows
    assert (
        "Widest gap in balanced accuracy between sufficiently large groups: 0.25 (0.05 to 0.44), "
        "highest in “male”, lowest in “female”." in page.text("p")
    )
    alone = "Malignant against the rest by patient sex alone, without looking at the image"
    assert f"{alone}: ROC AUC 0.91." in page.text("p")
    assert any(text.startswith(f"A shortcut. {alone}, has") for text in page.text("li"))
    assert "male 12 28 0.66 (0.50 to 0.80)" in rows
    assert "Cohen's kappa −0.124" in rows


def change_metrics(save_dir, **changes):
    for model in ("cnn", "net"):
        path = save_dir / model / "metrics.json"
        write(path, json.loads(path.read_text()) | changes)


def test_screening_that_is_off_is_said_with_the_reason_and_the_way_out(save_dir):
    counted = {"malignant": [], "benign": [], "unknown": ["cat", "<dog>"]}
    change_metrics(save_dir, screening={}, counted_as=counted)
    texts = Page(write_report(save_dir)).text("p")
    off = "Screening is off: none of the classes cat, <dog> is known as malignant; name those that "
    assert texts.count(f"{off}are malignant with --malignant_classes.") == 2
    counted = {"malignant": ["melanoma"], "benign": ["nevus"], "unknown": []}
    change_metrics(save_dir, counted_as=counted)
    texts = Page(write_report(save_dir)).text("p")
    assert "Counted as malignant: melanoma; as benign: nevus." in texts
    assert any(text.startswith("Screening could not be measured: ") for text in texts)


def test_classes_that_are_not_known_are_named_beside_the_figures_of_screening(save_dir):
    counted = {"malignant": ["melanoma"], "benign": ["nevus"], "unknown": ["UNK"]}
    change_metrics(save_dir, counted_as=counted)
    texts = Page(write_report(save_dir)).text("p")
    said = "Not known whether malignant or benign, and left out of the screening metrics: UNK."
    assert sum(text.endswith(said) for text in texts) == 2


def test_the_recall_of_every_class_of_melanoma_is_said_first(save_dir):
    classes = ("melanoma in situ", "Melanoma Invasive", "nevus")
    make_run(save_dir, classes=classes)
    page = Page(write_report(save_dir))
    said = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    assert "sensitivity 0.16" in said["Is melanoma in situ found?"]
    assert "Is Melanoma Invasive found?" in said and "Is nevus found?" not in said


def test_what_was_run_is_told_and_what_differs_from_the_defaults_comes_first(page):
    assert page.text("pre") == ["python train_models.py --seed 7"]
    captions, rows = page.text("caption"), page.text("tr")
    differing = captions.index("Settings that differ from the defaults")
    assert differing < captions.index("Settings left at their defaults")
    assert rows.index("seed 7") < rows.index("balanced yes") < rows.index("labels_csv –")
    for row in ("torch 2.14.1+cu130", "GPU none", "threads 3", "processes 2"):
        assert row in rows


def test_a_flag_inside_of_a_name_is_no_flag(tmp_path):
    command = "python train_models.py --data_dir 'a --seed b' --no-balanced"
    rows = Page(write_report(make_run(tmp_path, command=command))).text("tr")
    assert rows.index("balanced yes") < rows.index(
        "seed 7"
    )  # those left at their defaults come last


def test_a_setting_that_was_switched_off_differs_from_its_default(tmp_path):
    save_dir = make_run(tmp_path, command="python train_models.py --no-balanced")
    rows = Page(write_report(save_dir)).text("tr")
    assert rows.index("balanced yes") < rows.index("seed 7")


def test_the_data_is_counted_by_class_and_split_and_its_audit_summed_up(page):
    rows = page.text("tr")
    assert "class train valid test all" in rows
    assert "melanoma 400 2 2 404" in rows
    assert "all classes 1,200 6 6 1,212" in rows
    assert any(text.startswith("groups of identical files: 1") for text in page.text("li"))


def test_images_of_another_hospital_are_all_test_images_and_nothing_was_trained(save_dir):
    for model in ("cnn", "net"):
        path = save_dir / model / "metrics.json"
        write(path, json.loads(path.read_text()) | {"training_time": None})
    config = {"command": "python predict.py --evaluate there", "settings": {"data_dir": "there"}}
    write(save_dir / "config.json", config)
    rows = [f"{number}.png,wart,{number},{number},test" for number in range(53)]
    write(save_dir / "splits.csv", "\n".join(["path,class,content_hash,group,split", *rows]))
    page = Page(write_report(save_dir))
    assert "training time" not in page.text("th")
    assert not any("of training" in text for text in page.text("p"))
    assert any(text.startswith("Test split. 53 images of 3 classes. ") for text in page.text("li"))
    assert not any(text.startswith("Leakage.") for text in page.text("li"))
    assert "Settings left at their defaults" not in page.text("caption")
    assert "data_dir there" in page.text("tr")


def test_models_of_other_runs_are_named_and_not_shown(save_dir):
    write(save_dir / "old/metrics.json", metrics_of("old", 0.9, SUPPORT))
    page = Page(write_report(save_dir))
    assert page.text("h2") == ["Comparison", "Limitations", "cnn", "net", "What was run"]
    assert any("not part of this report: old." in text for text in page.text("p"))


def test_every_figure_is_inside_and_its_text_tells_what_it_shows(page):
    images = page.all("img")
    assert len(images) == len(FIGURES)
    for image in images:
        header, data = image["src"].split(",")
        assert header == "data:image/png;base64"
        assert base64.b64decode(data) == png()
        assert len(image["alt"]) > 30
    alts = " ".join(image["alt"] for image in images)
    assert "34 of 53 images predicted correctly. Most frequent mistake: 17 images of" in alts
    assert "0.48 at step 20 of 30" in alts
    assert "error 0.123 before calibration, 0.057 after" in alts
    assert "cnn 0.50 (0.44 to 0.57); net 0.45" in alts


def test_photographs_are_embedded_smaller_and_figures_at_one_scale(save_dir):
    large = png((600, 400), noise=True)
    assert len(large) > MAX_PNG_SIZE
    (save_dir / "samples.png").write_bytes(large)
    images = Page(write_report(save_dir)).all("img")
    (photograph,) = [image for image in images if image["src"].startswith("data:image/jpeg")]
    data = base64.b64decode(photograph["src"].split(",")[1])
    assert len(data) < len(large) / 2
    assert Image.open(io.BytesIO(data)).size == (600, 400)
    assert (photograph["width"], photograph["height"]) == ("600", "400")


def test_a_report_is_written_from_any_working_directory(save_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Page(write_report("models")).words() == Page(write_report(save_dir)).words()


# ---------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("absent", [*FIGURES, "config.json", "splits.csv", "audit.csv"])
def test_a_file_that_is_not_there_is_left_out(save_dir, absent):
    whole = Page(write_report(save_dir))
    (save_dir / absent).unlink()
    page = Page(write_report(save_dir))
    assert len(page.source) < len(whole.source)
    has_figure = absent.endswith(".png") or absent == "audit.csv"
    assert len(page.all("img")) == len(whole.all("img")) - has_figure
    assert page.text("h2") == whole.text("h2")


@pytest.mark.parametrize("absent", ["Screening", "Calibration", "Subgroups"])
def test_a_part_that_was_not_measured_has_no_heading(save_dir, absent):
    for model in ("cnn", "net"):
        path = save_dir / model / "metrics.json"
        metrics = json.loads(path.read_text())
        assert absent in Page(write_report(save_dir)).text("h3")
        del metrics[absent.lower()]
        write(path, metrics)
    (save_dir / "cnn/reliability.png").unlink()
    assert absent not in Page(write_report(save_dir)).text("h3")


def test_the_least_that_a_model_can_leave_is_enough(tmp_path):
    write(tmp_path / "cnn/metrics.json", {})
    page = Page(write_report(tmp_path))
    assert "cnn has a balanced accuracy of –." in page.text("p")
    assert page.text("h2") == ["Comparison", "Limitations", "cnn", "What was run"]
    assert any(text.startswith("Not a diagnostic device.") for text in page.text("li"))


def test_a_run_of_an_earlier_version_is_reported(save_dir):
    for model in ("cnn", "net"):
        path = save_dir / model / "metrics.json"
        metrics = json.loads(path.read_text())
        for name in ("calibration", "screening", "subgroups"):
            del metrics[name]
        write(path, metrics)
    write(save_dir / "comparison.csv", "model,balanced_accuracy\ncnn,0.5037\nnet,0.4512\n")
    page = Page(write_report(save_dir))
    assert page.text("tr")[2].startswith("net 0.45 (0.39 to 0.52) 0.55 (0.47 to 0.65)")
    assert not any("cannot tell" in text for text in page.text("p"))


def test_the_gaps_of_an_earlier_version_are_read_by_their_former_name(save_dir):
    before = Page(write_report(save_dir)).words()
    table = (save_dir / "comparison.csv").read_text().replace("gap_to_best", "behind_best")
    (save_dir / "comparison.csv").write_text(table)
    assert Page(write_report(save_dir)).words() == before


def test_melanoma_without_test_images_is_said(save_dir):
    path = save_dir / "cnn/metrics.json"
    metrics = json.loads(path.read_text())
    figures = metrics["test"]["per_class"]["melanoma"]
    metrics["test"]["per_class"]["melanoma"] = dict.fromkeys(figures) | {"support": 0}
    write(path, metrics)
    page = Page(write_report(save_dir))
    assert any(text.endswith("no test image shows melanoma") for text in page.text("dd"))
    assert "melanoma 0 – – – – – –" in page.text("tr")


def test_a_folder_without_a_finished_model_is_an_error_that_says_so(save_dir):
    for model in ("cnn", "net"):
        (save_dir / model / "metrics.json").unlink()
    with pytest.raises(ValueError, match="no model has a metrics.json"):
        write_report(save_dir)
    assert not (save_dir / "report.html").exists()


def test_a_damaged_file_is_named_and_the_report_before_stays(save_dir):
    before = write_report(save_dir).read_bytes()
    (save_dir / "net/metrics.json").write_text('{"model": ')
    with pytest.raises(ValueError, match="net/metrics.json: not a valid JSON file"):
        write_report(save_dir)
    make_run(save_dir)
    for name, contents in {
        "splits.csv": 'a,b\n"',
        "comparison.csv": "model,recall\ncnn,x\n",
    }.items():
        whole = (save_dir / name).read_text()
        (save_dir / name).write_text(contents)
        with pytest.raises(ValueError, match=f"{name}: not a (valid CSV )?table"):
            write_report(save_dir)
        (save_dir / name).write_text(whole)
    assert (save_dir / "report.html").read_bytes() == before


# ---------------------------------------------------------------------------- text stays text


def test_nothing_that_a_name_says_becomes_html(tmp_path):
    breaking_out = '"><img src=x onerror=alert(1)>'
    command = f"python train_models.py --data_dir '{HOSTILE}'"
    save_dir = make_run(tmp_path, (HOSTILE, breaking_out, "{{ 7 * 7 }}"), command)
    page = Page(write_report(save_dir, title=f"</title>{HOSTILE}"))
    assert page.all("script") == []
    assert len(page.all("img")) == len(FIGURES)
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert HOSTILE not in page.source
    assert page.text("pre") == [command]
    headings = page.text("th")
    assert {HOSTILE, breaking_out, "{{ 7 * 7 }}"} <= set(headings)
    assert any(HOSTILE in image["alt"] for image in page.all("img"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(names=st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs"])), min_size=3,
                      max_size=3, unique=True))  # fmt: skip
def test_any_class_name_is_read_as_it_is_written(tmp_path_factory, names):
    names = [f"«{name}»" for name in names]  # none of the page's own headings
    save_dir = tmp_path_factory.mktemp("names")
    write(save_dir / "cnn/metrics.json", metrics_of("cnn", 0.5, names))
    page = Page(write_report(save_dir))
    rows = ["".join(text) for tag, text in page.texts if tag == "th"]
    assert [name for name in rows if name in names][:3] == names


def test_file_names_that_are_not_utf8_can_be_shown(save_dir):
    config = json.loads((save_dir / "config.json").read_text())
    config["command"] = "python train_models.py --data_dir raw\udcff"
    write(save_dir / "config.json", config)
    splits = (save_dir / "splits.csv").read_bytes().replace(b"wart", b"w\xffrt")
    (save_dir / "splits.csv").write_bytes(splits)
    page = Page(write_report(save_dir))
    assert page.text("pre") == [r"python train_models.py --data_dir raw\udcff"]
    assert r"w\udcffrt 400 2 2 404" in page.text("tr")


def test_the_page_refers_to_nothing_outside_itself(page):
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "http://" not in page.source
    assert "https://" not in page.source
    style = page.text("style")[0]
    assert "url(" not in style
    assert "@import" not in style


# ---------------------------------------------------------------------------- who reads it how


def test_headings_are_in_order_and_tables_and_links_say_what_they_are(page):
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))
    boxes = [box for box in page.all("div") if box.get("class") == "scroll"]
    assert boxes and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= set(ids)
    assert page.elements.index(("a", {"class": "skip", "href": "#section-1"})) < [
        tag for tag, _ in page.elements
    ].index("nav")


def test_the_report_needs_no_torch():
    code = "import sys, experiment.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.fixture(scope="module")
def browser():
    """Chromium, headless; without it the test is skipped, but fails where CI says that it is CI."""
    missing = [] if CHROMIUM.exists() else [f"Chromium at {CHROMIUM} (apt-get install chromium)"]
    if importlib.util.find_spec("playwright") is None:
        missing.append("the Python package playwright")
    if missing:
        (pytest.fail if "CI" in os.environ else pytest.skip)(f"needs {' and '.join(missing)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


class Seen:
    """A page in the browser, and all that it said, asked for or tried."""

    def __init__(self, browser, path, width, **options):
        self.said, self.asked_for = [], []
        self.tab = browser.new_page(viewport={"width": width, "height": 800}, **options)
        self.tab.set_default_timeout(120_000)  # a machine may be busy with other things
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("dialog", self._dismiss)
        self.tab.on("request", lambda request: self.asked_for.append(request.url))
        self.tab.goto(path.as_uri())

    def _dismiss(self, dialog):
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def __call__(self, script):
        return self.tab.evaluate(script)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_browser_shows_it_quietly_and_without_scrolling_sideways(
    browser, tmp_path, width, colours
):
    classes = (HOSTILE, '"><img src=x onerror=alert(2)>', "a_name_without_a_space_" * 6)
    command = f"python train_models.py --data_dir {HOSTILE} --save_dir {'deep_' * 60}"
    path = write_report(make_run(tmp_path, classes, command))
    seen = Seen(browser, path, width, color_scheme=colours)

    assert seen.tab.get_by_role("heading", level=1).inner_text() == "Skin lesion classification"
    for summary in seen.tab.locator("summary").all():
        summary.click()
    widths = seen("[...document.images].map(image => image.naturalWidth)")
    assert widths == [40] * len(FIGURES)
    assert seen("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert width > 400 or seen(f"{wide}.length") == 0  # on a telephone no table scrolls sideways
    assert seen("document.scripts.length") == 0
    assert seen.tab.get_by_role("rowheader", name=HOSTILE, exact=True).count() > 0
    background = seen("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (colours == "light")
    assert seen.said == []
    assert [url for url in seen.asked_for if not url.startswith("data:")] == [path.as_uri()]


def test_it_can_be_read_with_the_keyboard(browser, save_dir):
    seen = Seen(browser, write_report(save_dir), 700)
    seen.tab.keyboard.press("Tab")
    assert seen("document.activeElement.textContent") == "Skip to the results"
    assert seen("document.activeElement.getBoundingClientRect().top") >= 0
    assert seen("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    seen.tab.keyboard.press("Enter")
    assert seen("document.activeElement.textContent") == "Comparison"
    seen.tab.keyboard.press("Tab")
    assert seen("document.activeElement.scrollLeft") == 0
    seen.tab.keyboard.press("ArrowRight")
    for _ in range(100):  # wait_for_function would evaluate a string, which the page forbids
        if seen("document.activeElement.scrollLeft") > 0:
            return
        seen.tab.wait_for_timeout(50)
    pytest.fail("the table does not scroll")


def test_in_print_all_is_open_and_dark(browser, save_dir):
    seen = Seen(browser, write_report(save_dir), 794, color_scheme="dark")
    folded = seen.tab.get_by_role("rowheader", name="labels_csv")
    assert not folded.is_visible()
    seen.tab.emulate_media(media="print")
    assert folded.is_visible()
    assert seen("getComputedStyle(document.body).color") == "rgb(29, 35, 41)"
    assert seen.tab.pdf().startswith(b"%PDF")
