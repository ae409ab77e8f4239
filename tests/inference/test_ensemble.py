"""What models see of new images, and what becomes of their probabilities."""

import inspect
import json
import os
import time
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from torch import nn

import models
from dataset import DatasetBuilder, LesionLoader, fingerprint, normalize, resize
from evaluation import Calibration
from inference import ensemble
from inference.options import PredictionOptions
from predict import Ensemble, find_files, main, predict, predict_batches
from storage.files import read_csv
from tests.samples import CLASSES, PROBABILITIES, THRESHOLDS, break_files, small_model
from training import evaluate

COLUMNS = ["path", "class", "probability", "most_probable", *PROBABILITIES]

# ---------------------------------------------------------------------------- what the models see


def seen_by_model(monkeypatch):
    """The batches that models loaded from now on are given."""
    seen, load = [], ensemble.load_model

    def load_and_watch(path):
        model, info = load(path)
        model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        return model, info

    monkeypatch.setattr(ensemble, "load_model", load_and_watch)
    return seen


@pytest.mark.parametrize("preprocessors", [(), (resize, normalize)])
def test_a_training_image_is_bit_for_bit_what_it_was_in_training(
    tmp_path, save_model, monkeypatch, preprocessors
):
    rng = np.random.default_rng(0)
    for number in range(12):  # photographs of several sizes, most decoded at a fraction of it
        side = (300, 217, 1200, 64)[number % 4]
        noise = rng.integers(0, 256, (side // 8, side // 6, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((side * 4 // 3, side))
        folder = tmp_path / "raw" / CLASSES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        exif = image.getexif()
        exif[ExifTags.Base.Orientation] = 1 + number % 8
        image.save(folder / f"{number}.jpg", exif=exif)
    splits, _ = DatasetBuilder(tmp_path / "raw", image_size=32).build(preprocessors)
    train = splits["train"]
    seen = seen_by_model(monkeypatch)
    model = save_model(preprocessors=train.preprocessors)
    paths = [tmp_path / "raw" / path for path in train.metadata["path"]]
    predict(model, paths, preprocessors=preprocessors, device="cpu")
    expected = torch.stack([train[i][0] for i in range(len(train))])
    assert torch.equal(torch.cat(seen), expected)


def test_probabilities_are_those_of_evaluate_calibrated(make_images, save_model, auto_precision):
    root = make_images(dict.fromkeys(CLASSES, 8))
    splits, _ = DatasetBuilder(root, image_size=32).build()
    test = splits["test"]
    path = save_model(temperature=1.7, bias=[0.4, -0.1, -0.3])
    model, _ = models.load_model(path)
    expected = evaluate(model, LesionLoader(test, device="cpu"), device="cpu").probabilities
    table = predict(path, [root / p for p in test.metadata["path"]], device="cpu")
    assert list(table.columns) == COLUMNS
    calibrated = Calibration(1.7, (0.4, -0.1, -0.3)).apply(expected)
    assert np.allclose(table[PROBABILITIES], calibrated, atol=1e-6)
    assert not np.allclose(table[PROBABILITIES], expected, atol=0.01)
    assert table["class"].tolist() == [CLASSES[label] for label in expected.argmax(axis=1)]


def test_the_decided_class_need_not_be_the_most_probable(images, save_model):
    plain = predict(save_model(), images, device="cpu")
    moved = predict(save_model(bias=[0.0, 9.0, 0.0]), images, device="cpu")
    assert set(moved[PROBABILITIES].idxmax(axis=1)) == {"prob_mole $1_x"}
    assert moved["class"].tolist() == plain["class"].tolist()
    assert set(plain["class"]) != {"mole $1_x"}
    assert plain["most_probable"].tolist() == plain["class"].tolist()
    assert set(moved["most_probable"]) == {"mole $1_x"}
    for table in (plain, moved):
        own = [row[f"prob_{row['class']}"] for row in table.to_dict("records")]
        assert table["probability"].tolist() == own


def test_of_equally_probable_classes_the_predicted_one_is_the_most_probable(images, save_model):
    undecided = small_model()
    with torch.no_grad():
        undecided.head[-1].weight.zero_()
        undecided.head[-1].bias.copy_(torch.tensor([0.0, 0.0, 1e-14]))
    path = save_model(model=undecided, temperature=1e3)
    table = predict(path, images, device="cpu", precision="fp32")
    assert len(np.unique(table[PROBABILITIES])) == 1
    assert set(table["class"]) == set(table["most_probable"]) == {"nevus"}


def test_the_size_of_batches_and_the_number_of_threads_change_nothing(
    images, save_model, auto_precision
):
    model = save_model()
    one = predict(model, images, batch_size=1, num_workers=1, device="cpu")
    all_at_once = predict(model, images, batch_size=64, num_workers=5, device="cpu")
    assert one[["path", "class"]].equals(all_at_once[["path", "class"]])
    assert np.allclose(one[PROBABILITIES], all_at_once[PROBABILITIES], atol=1e-6)


def test_no_more_than_two_batches_are_decoded_ahead_of_the_model(images, save_model, monkeypatch):
    paths = [str(images / "a" / f"copy {n}.png") for n in range(40)]
    for path in paths:
        Path(path).write_bytes((images / "a/0000.png").read_bytes())
    decoded, decoded_before = [], []
    prepare, see = ensemble.prepare_image, Ensemble.probabilities

    def count(path, *rest):
        decoded.append(path)
        return prepare(path, *rest)

    def see_slowly(ensemble, pixels, tta):
        assert pixels.shape == (4, 32, 32, 3) and pixels.dtype == np.uint8
        time.sleep(0.02)  # for the threads to run as far ahead as they may
        decoded_before.append(len(decoded))
        return see(ensemble, pixels, tta)

    monkeypatch.setattr(ensemble, "prepare_image", count)
    monkeypatch.setattr(Ensemble, "probabilities", see_slowly)
    table = predict(save_model(), paths, batch_size=4, num_workers=3, device="cpu")
    assert table["path"].tolist() == paths
    assert len(decoded_before) == 10 and sorted(decoded) == sorted(paths)
    for number, count in enumerate(decoded_before, 1):
        assert 4 * number <= count <= 4 * number + 8


def test_a_model_that_gives_no_numbers_is_an_error(images, save_model):
    model = small_model()
    with torch.no_grad():
        model.head[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        predict(save_model(model=model), images, device="cpu")


class TakesAges(nn.Module):
    """Logits from the mean of the image and an age; it knows no other inputs."""

    def forward(self, images, ages):
        ages = ages[:, None] / 100
        means = images.mean(dim=(2, 3))
        return torch.cat([means[:, :2], ages], dim=1)


def test_models_get_further_inputs_beside_each_view_of_the_images(save_model, monkeypatch):
    def load_with_ages(path):
        return TakesAges(), load(path)[1]

    load = ensemble.load_model
    monkeypatch.setattr(ensemble, "load_model", load_with_ages)
    model = Ensemble(save_model(), device="cpu", precision="fp32")
    images = np.zeros((2, 32, 32, 3), np.uint8)
    ages = np.array([0, 100], np.float32)
    raw, _ = model.probabilities({"images": images, "ages": ages}, tta=8)
    expected = np.exp([[0, 0, 0], [0, 0, 1]])
    assert np.allclose(raw, expected / expected.sum(axis=1, keepdims=True))


def test_batches_take_the_options_of_predict_and_no_others(images, save_model):
    model = save_model()
    tables = [t for t, _ in predict_batches(model, images, batch_size=3, tta=2, device="cpu")]
    assert [len(table) for table in tables] == [3, 3, 1]
    together = predict(model, images, tta=2, device="cpu")
    assert np.allclose(pd.concat(tables)[PROBABILITIES], together[PROBABILITIES], atol=1e-6)
    options = list(inspect.signature(predict).parameters)[2:]
    assert options == [field.name for field in fields(PredictionOptions)]
    with pytest.raises(TypeError, match="top_k"):
        next(predict_batches(model, images, top_k=2))


# ---------------------------------------------------------------------------- several models, views


def test_an_ensemble_takes_the_mean_of_probabilities(images, save_model, auto_precision):
    calibrations = [(0.5, (2.0, 0.0, -2.0)), (2.0, (0.0, 0.0, 0.0)), (1.0, (0.0, 1.0, -1.0))]
    paths = [
        save_model(f"{seed}.pth", small_model(seed), temperature=t, bias=list(b))
        for seed, (t, b) in enumerate(calibrations)
    ]
    together = predict(paths, images, device="cpu")
    alone = [predict(path, images, device="cpu")[PROBABILITIES].to_numpy() for path in paths]
    assert np.allclose(together[PROBABILITIES], np.mean(alone, axis=0))
    raw = [
        predict(save_model(model=small_model(seed)), images, device="cpu")[PROBABILITIES]
        for seed in range(3)
    ]
    decided = np.mean(raw, axis=0).argmax(axis=1)
    assert together["class"].tolist() == [CLASSES[label] for label in decided]


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"classes": [*CLASSES[:2], "other"]}, "classes differ"),
        ({"classes": CLASSES[::-1]}, "classes differ"),
        ({"model": "other size"}, "image_size differ, 24 and 32"),
        ({"preprocessors": "0123456789abcdef"}, "preprocessors differ, 0123456789abcdef and none"),
        ({"malignant_classes": ["nevus"]}, "malignant_classes differ"),
    ],
)
def test_models_that_do_not_fit_are_not_averaged(images, save_model, info, words, capfd):
    if "model" in info:
        info = {"model": small_model(image_size=24)}
    models = ["--model", save_model(), "--model", save_model("other.pth", **info)]
    assert main([*map(str, models), str(images), "--device", "cpu"]) == 2
    error = capfd.readouterr().err
    assert words in error and "other.pth" in error and error.count("\n") == 1


def flipped_and_turned(image):
    for turns in range(4):
        turned = np.rot90(image, turns)
        yield turned
        yield turned[:, ::-1]


def test_with_all_eight_views_flips_and_turns_of_an_image_make_no_difference(tmp_path, save_model):
    # At this size scaling to the shorter side and cropping the middle take no side.
    model = save_model(model=small_model(image_size=28))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image[:16, :8] = 0
    for number, view in enumerate(flipped_and_turned(image)):
        Image.fromarray(np.ascontiguousarray(view)).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    one = predict(model, paths, device="cpu")[PROBABILITIES].to_numpy()
    assert np.ptp(one, axis=0).max() > 0.01
    eight = predict(model, paths, tta=8, device="cpu")[PROBABILITIES].to_numpy()
    assert np.ptp(eight, axis=0).max() < 1e-6
    assert np.allclose(eight[0], one.mean(axis=0), atol=1e-6)
    two = predict(model, paths, tta=2, device="cpu")[PROBABILITIES].to_numpy()
    assert np.allclose(two[0], one[:2].mean(axis=0), atol=1e-6)  # itself and its mirror image
    four = predict(model, paths, tta=4, device="cpu")[PROBABILITIES].to_numpy()
    assert np.allclose(
        four[0], one[[0, 1, 4, 5]].mean(axis=0), atol=1e-6
    )  # half-turns, not quarter


def test_views_are_averaged_before_calibration(images, save_model, auto_precision):
    plain, calibrated = save_model("1.pth"), save_model("2.pth", temperature=3.0)
    raw = predict(plain, images, tta=8, device="cpu")[PROBABILITIES].to_numpy()
    expected = Calibration(3.0, (0.0, 0.0, 0.0)).apply(raw)
    table = predict(calibrated, images, tta=8, device="cpu")
    assert np.allclose(table[PROBABILITIES], expected)


# ---------------------------------------------------------------------------- flags


def test_flags_are_set_by_the_thresholds_that_the_model_brings(images, save_model, auto_precision):
    model = save_model(
        thresholds=THRESHOLDS, malignant_classes=["melanoma", "nevus"], bias=[1, 0, 0]
    )
    table = predict(model, images, device="cpu")
    assert list(table.columns[-2:]) == ["flag_malignant", "flag_melanoma"]
    malignant = table["prob_melanoma"] + table["prob_nevus"]
    assert table["flag_malignant"].tolist() == (malignant >= 0.5).tolist()
    assert table["flag_melanoma"].tolist() == (table["prob_melanoma"] >= 0.3).tolist()


def test_given_thresholds_take_the_place_of_those_it_brings(images, save_model):
    model = save_model(thresholds=THRESHOLDS, malignant_classes=["nevus"])
    plain = predict(model, images, thresholds={}, device="cpu")
    assert list(plain.columns) == COLUMNS
    middle = float(plain["prob_mole $1_x"].median())
    given = {"Mole-$1_x": middle, "MALIGNANT": float(plain["prob_nevus"].min()), "Melanomas": 1}
    table = predict(model, images, thresholds=given, device="cpu")
    assert list(table.columns[-3:]) == ["flag_Mole-$1_x", "flag_MALIGNANT", "flag_Melanomas"]
    assert table["flag_Mole-$1_x"].tolist() == (plain["prob_mole $1_x"] >= middle).tolist()
    assert 0 < table["flag_Mole-$1_x"].sum() < len(table)
    assert table["flag_MALIGNANT"].all() and not table["flag_Melanomas"].any()


def test_an_ensemble_flags_by_the_mean_of_its_thresholds(save_model):
    first = save_model("1.pth", thresholds=THRESHOLDS, malignant_classes=["nevus"])
    other = {"malignant": {"sensitivity 95%": 0.1}}
    second = save_model("2.pth", thresholds=other, malignant_classes=["nevus"])
    ensemble = Ensemble([first, second], device="cpu")
    assert ensemble.thresholds == {"malignant": pytest.approx(0.3)}  # melanoma: not in both


def test_published_codes_name_classes_and_melanoma_all_classes_of_it(images, save_model):
    model = save_model(classes=["melanoma", "Melanoma (in situ)", "nevus"], thresholds=THRESHOLDS)
    given = {"nv": 0.3, "melanoma (in situ)": 0.3}
    table = predict(model, images, thresholds=given, device="cpu")
    assert table["flag_nv"].tolist() == (table["prob_nevus"] >= 0.3).tolist()
    in_situ = table["prob_Melanoma (in situ)"]
    assert table["flag_melanoma (in situ)"].tolist() == (in_situ >= 0.3).tolist()
    both = table["prob_melanoma"] + in_situ
    middle = float(both.median())
    for name in ("MEL", "melanoma"):
        table = predict(model, images, thresholds={name: middle}, device="cpu")
        assert table[f"flag_{name}"].tolist() == (both >= middle).tolist()
        assert 0 < table[f"flag_{name}"].sum() < len(table)


@pytest.fixture(scope="module")
def ensemble_of_seven_classes(tmp_path_factory):
    """An ensemble in which bcc and two melanomas are malignant; its probabilities do not matter."""
    classes = ["bcc", "mel", "melanoma (in situ)", "nevus", "df", "vasc", "bkl"]
    model = models.get_model("simple_cnn", 7, weights=None, image_size=32)
    info = models.ModelInfo(
        config=model.config, classes=classes, image_size=32, malignant_classes=classes[:3]
    )
    path = tmp_path_factory.mktemp("model") / "model.pth"
    info.save(path, model.state_dict())
    return Ensemble(path, device="cpu")


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["malignant", "MALIGNANT", "melanoma", "MEL", "bcc", "nevus"]),
        st.floats(0, 1),
    ),
    st.integers(0, 2**32 - 1),
)
def test_what_is_flagged_as_melanoma_is_flagged_as_malignant(
    ensemble_of_seven_classes, thresholds, seed
):
    probabilities = np.random.default_rng(seed).dirichlet(np.full(7, 0.3), size=20)
    flags = ensemble_of_seven_classes.flags(thresholds)
    flagged = ensemble_of_seven_classes.flagged(probabilities, flags)
    assert list(flagged) == list(thresholds)
    reached = {
        name: probabilities[:, labels].sum(axis=1) >= thresholds[name]
        for name, (labels, _) in flags.items()
    }
    implying = [reached[name] for name in thresholds if name != "nevus"]
    for name in thresholds:
        is_malignant = name.lower() == "malignant"
        expected = np.any(implying, axis=0) if is_malignant else reached[name]
        assert flagged[name].tolist() == expected.tolist()


def test_melanoma_counts_as_malignant_in_flags_whatever_else_was_said_to(save_model):
    model = Ensemble(save_model(malignant_classes=["nevus"]), device="cpu")
    flags = model.flags({"melanoma": 0.5, "malignant": 0.5})
    flagged = model.flagged(np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]), flags)
    assert flagged["melanoma"].tolist() == [True, False, False]
    assert flagged["malignant"].tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("num_models", "tta", "words"),
    [(2, 1, "with 2 models they"), (1, 4, "with 4 views they"), (2, 8, "2 models and 8 views")],
)
def test_thresholds_that_were_not_chosen_for_what_is_used_are_warned_of(
    images, save_model, num_models, tta, words
):
    saved = [
        save_model(f"{n}.pth", thresholds=THRESHOLDS, malignant_classes=["nevus"])
        for n in range(num_models)
    ]
    with pytest.warns(UserWarning, match=words) as warned:
        table = predict(saved, images, tta=tta, device="cpu")
    assert len(warned) == 1
    message = str(warned[0].message)
    assert "the thresholds of malignant, melanoma were chosen for one model and one view" in message
    assert "may not find 95 %" in message and "--threshold" in message
    assert "flag_melanoma" in table


@pytest.mark.parametrize(
    ("num_models", "options"),
    [(1, {}), (2, {"thresholds": {"melanoma": 0.2}}), (1, {"tta": 8, "thresholds": {}})],
)
def test_thresholds_that_are_given_or_of_one_model_and_view_are_not_warned_of(
    images, save_model, num_models, options
):
    saved = [
        save_model(f"{n}.pth", thresholds=THRESHOLDS, malignant_classes=["nevus"])
        for n in range(num_models)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(saved, images, device="cpu", **options)


def test_without_thresholds_an_ensemble_has_nothing_to_warn_of(images, save_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict([save_model("1.pth"), save_model("2.pth")], images, tta=2, device="cpu")


@pytest.mark.parametrize(
    ("thresholds", "words"),
    [
        ({"dermatofibroma": 0.2}, "unknown class dermatofibroma"),
        ({"malignant": 0.2}, "unknown class malignant"),  # this model says none of its classes is
        ({"nevus": 1.2}, "threshold of nevus must be from 0 to 1, not 1.2"),
        ({"nevus": float("nan")}, "threshold of nevus must be from 0 to 1, not nan"),
    ],
)
def test_a_threshold_of_nothing_is_an_error(images, save_model, thresholds, words):
    model = save_model(malignant_classes=[])
    with pytest.raises(ValueError, match=words):
        predict(model, images, thresholds=thresholds, device="cpu")


def test_a_class_that_is_called_malignant_can_be_flagged(images, save_model):
    model = save_model(classes=["benign", "malignant", "other"])
    table = predict(model, images, thresholds={"malignant": 0.3}, device="cpu")
    assert table["flag_malignant"].tolist() == (table["prob_malignant"] >= 0.3).tolist()


# ---------------------------------------------------------------------------- files and folders


def test_folders_are_walked_and_files_are_taken_whatever_their_suffix(images, save_model):
    (images / ".hidden").mkdir()
    image = (images / "a/0000.png").read_bytes()
    for name in (".hidden/1.png", "a/.2.png", "a/no suffix", "a/notes.txt"):
        (images / name).write_bytes(image)
    given = [images / "b/0001.png", images, images / "a/no suffix", images / ".hidden/1.png"]
    expected = ["b/0001.png", *(f"a/{i:04d}.png" for i in range(4)), "b/0000.png", "b/0002.png"]
    expected += ["a/no suffix", ".hidden/1.png"]
    assert find_files(given) == [f"{images.as_posix()}/{name}" for name in expected]
    assert predict(save_model(), given, device="cpu")["path"].tolist() == find_files(given)


def test_what_is_not_there_is_named_all_at_once(images, tmp_path, save_model):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    given = [images, tmp_path / "x\ny.png", tmp_path / "link.png"]
    with pytest.raises(FileNotFoundError, match=r"x\\ny.png.*link.png: no such file or folder"):
        predict(save_model(), given)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing: no images"):
        predict(save_model(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="no images given"):
        predict(save_model(), [])
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        predict(tmp_path / "gone.pth", images)
    with pytest.raises(ValueError, match="no model given"):
        predict([], images)


def test_unreadable_images_are_named_in_a_warning_and_passed_over(images, save_model):
    broken = break_files(images)
    with pytest.warns(UserWarning, match="3 images cannot be read") as caught:
        table = predict(save_model(), images, batch_size=2, device="cpu")
    message = str(caught[0].message)
    assert all(ascii(name).strip("'") in message for name in broken) and "\n" not in message
    assert table["path"].tolist() == [p for p in find_files(images) if Path(p).parent != images]
    assert table.index.tolist() == list(range(7))


def test_where_nothing_can_be_read_the_table_has_no_rows(images, save_model, tmp_path):
    paths = [images / name for name in break_files(images)]
    model = save_model(thresholds=THRESHOLDS, malignant_classes=["nevus"])
    for name in ("out.csv", "out.json"):
        with pytest.warns(UserWarning, match="3 images"):
            table = predict(model, paths, output=tmp_path / name, batch_size=2, device="cpu")
        assert len(table) == 0
        assert list(table.columns) == [*COLUMNS, "flag_malignant", "flag_melanoma"]
    assert list(pd.read_csv(tmp_path / "out.csv").columns) == list(table.columns)
    assert json.loads((tmp_path / "out.json").read_text()) == []


ODD_NAMES = [
    "-x.png", "--model", "a b.png", "new\nline.png", "back\rhere.png", 'quo"te,.png', "möle ☃.png",
    "<b>&amp;.png", "$1_x.png", "=1+1.png", b"not utf-8 \xff.png",
]  # fmt: skip


def test_any_name_comes_back_from_the_files_as_it_was(images, tmp_path, save_model, monkeypatch):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [os.fsdecode(name) for name in ODD_NAMES]
    for name in names:
        (folder / name).write_bytes((images / "a/0000.png").read_bytes())
    monkeypatch.chdir(folder)
    model = save_model()
    table = predict(model, names, output=tmp_path / "out.csv", device="cpu")
    assert table["path"].tolist() == names
    read = read_csv(tmp_path / "out.csv")
    assert read["path"].tolist() == names
    assert np.allclose(read[PROBABILITIES].astype(float), table[PROBABILITIES], rtol=1e-12)
    predict(model, names, output=tmp_path / "out.json", device="cpu")
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [row["path"] for row in rows] == names
    assert rows == table.to_dict("records")


def test_files_hold_the_table_with_flags(images, tmp_path, save_model):
    model = save_model(thresholds=THRESHOLDS, malignant_classes=["nevus"])
    for name in ("out.csv", "out.JSON"):
        table = predict(model, images, output=tmp_path / name, batch_size=3, device="cpu")
    assert len(table) == 7
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out.csv"), table, rtol=1e-14)
    assert json.loads((tmp_path / "out.JSON").read_text()) == table.to_dict("records")


def test_a_run_that_fails_halfway_leaves_the_earlier_file(
    images, tmp_path, save_model, monkeypatch
):
    output, see, written = tmp_path / "out.csv", Ensemble.probabilities, []

    def fail_at_the_third(ensemble, pixels, tta):
        written.append(len(list(tmp_path.glob(".out*"))))
        if len(written) == 3:
            raise OSError("the disk is gone")
        return see(ensemble, pixels, tta)

    output.write_text("earlier")
    monkeypatch.setattr(Ensemble, "probabilities", fail_at_the_third)
    with pytest.raises(OSError, match="the disk is gone"):
        predict(save_model(), images, output=output, batch_size=2, device="cpu")
    assert written == [1, 1, 1]  # what there is so far is on the disk, under another name
    assert output.read_text() == "earlier" and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("output", "words"),
    [("out.txt", "must end in .csv or .json"), ("gone/out.csv", "no folder"), ("d.csv", "folder")],
)
def test_an_output_that_cannot_be_written_is_an_error_before_the_work(
    images, tmp_path, save_model, output, words
):
    (tmp_path / "d.csv").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        predict(tmp_path / "no model is read.pth", images, output=tmp_path / output)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tta": 0}, "tta must be from 1 to 8, not 0"),
        ({"tta": 9}, "tta must be from 1 to 8, not 9"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"num_workers": 0}, "num_workers must be at least 1, not 0"),
        ({"device": "gpu"}, "device gpu cannot be used"),
        ({"precision": "fp8"}, "precision must be .*, not 'fp8'"),
    ],
)
def test_arguments_out_of_range_are_errors(images, save_model, options, words):
    with pytest.raises(ValueError, match=words):
        predict(save_model(), images, **options)


# ---------------------------------------------------------------------------- preprocessors


def test_a_model_with_preprocessors_needs_them_and_the_command_cannot_know_them(
    images, save_model, capfd
):
    def darken(image):
        return image // 2

    model = save_model(preprocessors=fingerprint([darken]))
    assert main(["--model", str(model), str(images)]) == 2
    error = capfd.readouterr().err
    assert (
        "custom preprocessors, which the command does not have" in error and error.count("\n") == 1
    )
    with pytest.raises(ValueError, match="preprocessors other than those given"):
        predict(model, images, preprocessors=[resize])
    with pytest.raises(ValueError, match="other than those given .*none, not"):
        predict(save_model("plain.pth"), images, preprocessors=[darken])
    dark = predict(model, images, preprocessors=[darken], device="cpu")
    plain = predict(save_model("plain.pth"), images, device="cpu")
    assert not np.allclose(dark[PROBABILITIES], plain[PROBABILITIES], atol=1e-3)
