"""What a training run may do to a folder in which something stands already."""

import functools
import json
import os
import shutil
import time
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiment import settings
from experiment.external import EvaluationSettings, evaluate_folder
from experiment.run_folder import (
    AUDIT,
    DATA,
    DATA_FIGURES,
    EVALUATION,
    EVALUATION_FILES,
    METADATA,
    MODEL_FILES,
    TRAINING,
    TrainingFolder,
    kind_of_run,
    read_config,
)
from imaging import cache
from imaging.synthetic import make_dataset
from tests.samples import snapshot, training_flags
from train_models import DEMO_SETTINGS, main

RUN_FILES = {*EVALUATION_FILES, *DATA_FIGURES}
RUN = {"num_steps": 2, "seed": 42, DATA: "these", METADATA: None}
OTHER_SETTINGS, OTHER_DATA = RUN | {"num_steps": 60}, RUN | {DATA: "those"}
STATES = {
    "finished": ("metrics.json", "last.pth", "model.pth"),
    "unfinished": ("last.pth", "model.pth"),
    "begun": ("model.pth",),
    "nothing": (),
}


def make_folder(root, models):
    """A folder with models, by name the state and the record of each."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, (state, _) in models.items():
        (root / name).mkdir()
        for file in STATES[state]:
            (root / name / file).write_text("{}")
        (root / name / "notes.txt").write_text("the user's own")
    runs = {name: record for name, (_, record) in models.items() if record is not None}
    config = {"kind": TRAINING, "settings": {}, "runs": runs}
    (root / "config.json").write_text(json.dumps(config))
    return TrainingFolder(root)


# ---------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("state", "record", "refusal"),
    [
        ("finished", RUN, None),
        ("finished", OTHER_SETTINGS, "num_steps is 2, but was 60"),
        ("finished", OTHER_DATA, "images or splits differ"),
        ("finished", RUN | {METADATA: "a"}, "columns of metadata_csv differ"),
        ("finished", None, "its settings are unknown"),
        ("unfinished", RUN, "Continue with --resume, start over with --overwrite, or choose"),
        (
            "unfinished",
            OTHER_SETTINGS,
            "num_steps is 2, but was 60. Start over with --overwrite, or",
        ),
        ("unfinished", None, "its settings are unknown. Start over with --overwrite, or"),
        ("begun", RUN, None),
        ("begun", OTHER_SETTINGS, "num_steps is 2, but was 60"),
        ("begun", None, "its settings are unknown"),  # a model.pth that someone put there
        ("nothing", OTHER_DATA, None),
    ],
)
def test_without_a_flag_nothing_is_lost(tmp_path, state, record, refusal):
    folder = make_folder(tmp_path / "out", {"cnn": (state, record)})
    if refusal is None:
        folder.check(["cnn"], RUN, resume=False, may_replace=False)
        assert folder.is_done("cnn", RUN) == (state == "finished")
    else:
        with pytest.raises(ValueError) as raised:
            folder.check(["cnn"], RUN, resume=False, may_replace=False)
        assert refusal in str(raised.value) and "another --save_dir" in str(raised.value)
        assert "cnn (" in str(raised.value)
    folder.check(["cnn"], RUN, resume=False, may_replace=True)


@pytest.mark.parametrize(("state", "record"), [*product(STATES, [RUN, OTHER_SETTINGS, None])])
def test_resuming_goes_on_with_the_same_run_alone(tmp_path, state, record):
    folder = make_folder(tmp_path / "out", {"cnn": (state, record)})
    if state == "nothing" or record == RUN:
        folder.check(["cnn"], RUN, resume=True, may_replace=False)
        return
    with pytest.raises(ValueError, match=r"--resume: .*cnn belongs to another run: .*--overwrite"):
        folder.check(["cnn"], RUN, resume=True, may_replace=False)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("state", ["finished", "unfinished"])
def test_other_models_are_kept_unless_they_are_of_other_data(tmp_path, state, resume):
    folder = make_folder(tmp_path / "out", {"net": (state, OTHER_SETTINGS)})
    folder.check(["cnn"], RUN, resume=resume, may_replace=False)
    assert folder.others(["cnn"]) == ["net"]
    folder = make_folder(tmp_path / "out", {"net": (state, OTHER_DATA), "old": ("nothing", RUN)})
    without_data = {name: RUN[name] for name in ("num_steps", "seed")}
    folder.check(["cnn"], without_data, resume=resume, may_replace=False)  # nothing to tell by yet
    with pytest.raises(ValueError, match=r"other images or splits.*: net \(2 steps, .*--overwrite"):
        folder.check(["cnn"], RUN, resume=resume, may_replace=False)


def test_what_would_be_lost_is_named_with_what_a_person_knows_it_by(tmp_path):
    records = {"cnn": ("finished", OTHER_SETTINGS), "net": ("unfinished", RUN)}
    folder = make_folder(tmp_path / "out", records)
    metrics = tmp_path / "out/cnn/metrics.json"
    metrics.write_text(json.dumps({"test": {"balanced_accuracy": 0.51234}}))
    day = time.mktime((2026, 3, 1, 12, 0, 0, 0, 0, -1))
    os.utime(metrics, (day, day))
    with pytest.raises(ValueError) as raised:
        folder.check(["cnn", "net"], RUN, resume=False, may_replace=False)
    assert str(raised.value) == (
        f"{tmp_path / 'out'} contains results of another run: cnn (60 steps, balanced accuracy "
        "0.512, finished 2026-03-01); num_steps is 2, but was 60. net (2 steps, unfinished). "
        "Continue with --resume, start over with --overwrite, or choose another --save_dir"
    )


models_in_folder = st.dictionaries(
    st.sampled_from(["cnn", "net", "head", "fine"]),
    st.tuples(
        st.sampled_from(list(STATES)), st.sampled_from([RUN, OTHER_SETTINGS, OTHER_DATA, None])
    ),
)


@given(models_in_folder, st.booleans(), st.booleans())
def test_what_is_not_replaced_on_purpose_stays(tmp_path_factory, models, resume, may_replace):
    root = tmp_path_factory.getbasetemp() / "any"
    folder = make_folder(root, models)
    asked = ["cnn", "net"]
    before = snapshot(root)
    try:
        folder.check(asked, RUN, resume=resume, may_replace=may_replace)
    except ValueError:
        assert snapshot(root) == before
        return
    afresh = [
        name
        for name in asked
        if not folder.is_done(name, RUN) and not (resume and folder.can_be_resumed(name))
    ]
    records = folder.make_room(afresh, RUN)
    for name, (state, record) in models.items():
        left = {path.name for path in (root / name).iterdir()} - {"notes.txt"}
        assert (root / name / "notes.txt").read_text() == "the user's own"
        is_other = name not in asked
        is_kept = record is None or record[DATA] == RUN[DATA] if is_other else name not in afresh
        if state == "nothing":
            continue
        assert left == (set(STATES[state]) if is_kept else set()), (name, state, record)
        assert (name in records) == (is_kept and record is not None)
        if not is_kept and not may_replace:
            assert state == "begun" and record == RUN  # of which nothing can be gone on with


def test_names_of_a_config_never_reach_other_folders(tmp_path):
    make_folder(tmp_path / "out", {"cnn": ("finished", OTHER_DATA)})
    shutil.copytree(tmp_path / "out/cnn", tmp_path / "elsewhere")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["runs"] = dict.fromkeys(("../elsewhere", "..", ".", str(tmp_path), ""), OTHER_DATA)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    before = snapshot(tmp_path / "elsewhere")
    folder = TrainingFolder(tmp_path / "out")
    assert folder.records == {}
    folder.make_room(["cnn"], RUN)
    assert snapshot(tmp_path / "elsewhere") == before


# ---------------------------------------------------------------------------- the command

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def arguments(make_images, tmp_path):
    """A command line that trains in a second or two."""
    root = make_images({"melanoma": 20, "nevus": 14})
    return training_flags(root, tmp_path / "out", models="simple_cnn")


def refusal(words, capfd):
    """The one line with which the command refuses these arguments."""
    capfd.readouterr()
    assert main(words) == 2
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if not line.startswith("train_models.py: warning: ")]
    return line


def test_the_same_command_again_passes_over_what_is_finished(
    arguments, tmp_path, capfd, quick_figures
):
    assert main(arguments) == 0
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir() if p.is_file()} <= {*RUN_FILES, ".lock"}
    assert {p.name for p in (out / "simple_cnn").iterdir()} <= set(MODEL_FILES)
    for name in ("report.html", "comparison.csv", "comparison.png"):
        (out / name).unlink()
    before = snapshot(out / "simple_cnn"), (out / "config.json").read_bytes()
    capfd.readouterr()
    assert main(arguments) == 0
    assert "already finished" in capfd.readouterr().out
    assert (snapshot(out / "simple_cnn"), (out / "config.json").read_bytes()) == before
    assert {p.name for p in out.iterdir() if p.is_file()} <= {*RUN_FILES, ".lock"}
    assert (out / "report.html").exists() and (out / "comparison.csv").exists()


def test_only_overwrite_loses_a_finished_model(arguments, tmp_path, capfd):
    main(arguments)
    out = tmp_path / "out"
    (out / "simple_cnn/notes.txt").write_text("mine")
    before = snapshot(out)
    message = refusal([*arguments, "--num_steps", "3"], capfd)
    assert "simple_cnn (2 steps, balanced accuracy 0." in message
    assert "num_steps is 3, but was 2. Start over with --overwrite, or choose another" in message
    assert snapshot(out) == before
    assert main([*arguments, "--num_steps", "3", "--overwrite"]) == 0
    assert list(pd.read_csv(out / "simple_cnn/history.csv")["step"]) == [2, 3]
    assert (out / "simple_cnn/notes.txt").read_text() == "mine"
    config = read_config(out)
    assert config["command"].endswith("--overwrite") and config["runs"]["simple_cnn"]
    assert "overwrite" not in config["runs"]["simple_cnn"]
    assert main([*arguments, "--num_steps", "3", "--overwrite"]) == 0  # even when nothing differs
    assert "already finished" not in capfd.readouterr().out


def test_an_unfinished_model_needs_resume_or_overwrite(arguments, tmp_path, capfd):
    main(arguments)
    out = tmp_path / "out"
    (out / "simple_cnn/metrics.json").unlink()
    before = snapshot(out)
    assert "with --resume, start over with --overwrite" in refusal(arguments, capfd)
    assert snapshot(out) == before
    assert main([*arguments, "--resume"]) == 0
    (out / "simple_cnn/metrics.json").unlink()
    assert main([*arguments, "--overwrite"]) == 0
    for name in ("metrics.json", "last.pth"):
        (out / "simple_cnn" / name).unlink()
    assert main(arguments) == 0  # there is nothing to go on with


def test_other_models_of_the_same_data_stay_in_the_report_with_their_settings(
    arguments, tmp_path, capfd
):
    main(arguments)
    out = tmp_path / "out"
    before = snapshot(out / "simple_cnn")
    options = ["--models", "resnet_scratch", "--layers", "18", "--num_steps", "3"]
    assert main([*arguments, *options]) == 0
    assert snapshot(out / "simple_cnn") == before
    assert sorted(pd.read_csv(out / "comparison.csv")["model"]) == ["resnet_scratch", "simple_cnn"]
    page = (out / "report.html").read_text()
    assert "Not all models were trained with the same settings" in page
    table = page.partition("Settings that are not the same for all models")[2].partition("</table")
    models = ["resnet_scratch", "simple_cnn"]
    for name, of_model in {"num_steps": "32", "layers": ["18", "50"]}.items():
        row = table[0].partition(f">{name}<")[2].partition("</tr")[0]
        cells = [cell.partition(">")[2].partition("</td")[0] for cell in row.split("<td")[1:]]
        order = [table[0].index(f">{model}<") for model in models]
        assert (cells if order[0] < order[1] else cells[::-1]) == list(of_model)
    assert "seed" not in table[0]
    assert main([*arguments, *options]) == 0  # and once more, without training anything
    assert len(pd.read_csv(out / "comparison.csv")) == 2


def test_models_of_other_data_are_never_compared(arguments, tmp_path, capfd):
    main(arguments)
    out = tmp_path / "out"
    (out / "simple_cnn/notes.txt").write_text("mine")
    before = snapshot(out)
    options = ["--models", "resnet_scratch", "--layers", "18"]
    other = [*arguments, *options, "--seed", "7"]  # other splits
    message = refusal(other, capfd)
    assert "out contains models of other images or splits" in message and "simple_cnn (2" in message
    assert snapshot(out) == before
    (Path(arguments[1]) / "nevus/0000.png").unlink()
    assert "images or splits differ" in refusal(arguments, capfd)
    assert snapshot(out) == before
    assert main([*other, "--overwrite"]) == 0
    assert [path.name for path in (out / "simple_cnn").iterdir()] == ["notes.txt"]
    assert list(pd.read_csv(out / "comparison.csv")["model"]) == ["resnet_scratch"]
    assert list(read_config(out)["runs"]) == ["resnet_scratch"]


def test_a_table_of_other_columns_is_other_data(arguments, tmp_path, capfd):
    main(arguments)
    names = [p.relative_to(arguments[1]).as_posix() for p in Path(arguments[1]).rglob("*.png")]
    table = pd.DataFrame({"path": names, "site": [name[-5] for name in names]})
    table.to_csv(tmp_path / "sites.csv", index=False)
    words = [*arguments, "--metadata_csv", str(tmp_path / "sites.csv")]
    assert "columns of metadata_csv differ" in refusal(words, capfd)


def test_an_evaluation_is_replaced_by_no_other_command(arguments, tmp_path, capfd):
    main(arguments)
    elsewhere = tmp_path / "elsewhere"
    evaluate_folder(
        [tmp_path / "out/simple_cnn/model.pth"],
        arguments[1],
        elsewhere,
        EvaluationSettings(device="cpu"),
    )
    assert kind_of_run(read_config(elsewhere)) == EVALUATION
    before = snapshot(elsewhere)
    options = ["--save_dir", str(elsewhere)]
    for words in (arguments, [*arguments, "--overwrite"], [*arguments[:2], "--audit_only"]):
        assert "elsewhere contains an evaluation" in refusal([*words, *options], capfd)
    assert snapshot(elsewhere) == before


def test_an_audit_is_shared_by_a_run_on_the_same_images_and_replaced_by_one_on_others(
    arguments, make_images, tmp_path, capfd
):
    out, of_audit = tmp_path / "out", arguments[:6]
    other = make_images({"melanoma": 12, "nevus": 12}, name="other", seed=1)
    shutil.copy(other / "nevus/0000.png", other / "nevus/copy.png")
    on_others = [*of_audit, "--data_dir", str(other), "--audit_only"]
    assert main(on_others) == 1
    assert main([*of_audit, "--audit_only"]) == 0
    assert kind_of_run(read_config(out)) == AUDIT
    assert main(on_others) == 1 and (out / "audit.png").exists()
    assert main(arguments) == 0
    config = read_config(out)
    assert kind_of_run(config) == TRAINING
    assert len(pd.read_csv(out / "audit.csv")) == 0 and not (out / "audit.png").exists()
    assert main([*of_audit, "--audit_only"]) == 0
    assert read_config(out) == config
    before = snapshot(out)
    assert "out contains a training run on other images" in refusal(on_others, capfd)
    (Path(arguments[1]) / "nevus/0000.png").write_bytes(
        (Path(arguments[1]) / "nevus/0001.png").read_bytes()
    )  # the same names, other contents
    assert "on other images" in refusal([*of_audit, "--audit_only"], capfd)
    assert snapshot(out) == before


# ---------------------------------------------------------------------------- the demo


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo with few images and steps, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    draw_few = functools.partial(make_dataset, num_images=60, size=48)
    monkeypatch.setattr("experiment.pipeline.make_dataset", draw_few)
    quick_settings = replace(DEMO_SETTINGS, num_steps=2, batch_size=8, models=("simple_cnn",))
    monkeypatch.setattr(settings, "DEMO_SETTINGS", quick_settings)
    return ["--demo", "--weights", "none", "--device", "cpu"]


def test_the_demo_replaces_its_own_folder_alone(demo, tmp_path, capfd):
    assert main(demo) == 0
    out = tmp_path / "models/demo"
    said = "python train_models.py --demo --weights none --device cpu"
    assert read_config(out)["command"] == said
    before = snapshot(out / "simple_cnn")
    assert main(demo) == 0
    assert "already finished" in capfd.readouterr().out
    assert snapshot(out / "simple_cnn") == before
    assert main([*demo, "--num_steps", "3"]) == 0
    assert list(pd.read_csv(out / "simple_cnn/history.csv")["step"]) == [3]
    (out / "simple_cnn/metrics.json").unlink()
    assert "num_steps is 2, but was 3" in refusal([*demo, "--resume"], capfd)
    assert main([*demo, "--num_steps", "3", "--resume"]) == 0
    (out / "simple_cnn/metrics.json").unlink()
    assert main([*demo, "--seed", "7"]) == 0  # unfinished, and other splits
    shutil.copytree(out, tmp_path / "own")
    message = refusal([*demo, "--save_dir", "own"], capfd)
    assert "own contains results of another run" in message and "seed is 42, but was 7" in message


def test_the_demo_never_replaces_a_run_on_other_images(demo, arguments, tmp_path, capfd):
    main([*arguments, "--save_dir", "models/demo"])
    before = snapshot(tmp_path / "models/demo")
    for words, said in (
        (demo, "models/demo contains results of another run: simple_cnn"),
        ([*demo, "--resume"], "models/demo/simple_cnn belongs to another run"),
        (["--demo", "--audit_only"], "models/demo contains a training run on other images"),
    ):
        assert said in refusal(words, capfd)
    assert snapshot(tmp_path / "models/demo") == before


def test_whoever_comes_second_finds_the_images_drawn(tmp_path):
    first = make_dataset(tmp_path / "demo", num_images=60, size=32)
    before = snapshot(first)
    assert make_dataset(tmp_path / "demo", num_images=60, size=32, exist_ok=True) == first
    assert snapshot(first) == before
    with pytest.raises(FileExistsError):
        make_dataset(tmp_path / "demo", num_images=60, size=32)


# ---------------------------------------------------------------------------- cheap checks first


@pytest.fixture
def no_image_is_read(monkeypatch):
    """Fails the test when an image would be read or drawn, or weights be downloaded."""

    def fails(*args, **kwargs):
        pytest.fail("something expensive came before a cheap check")

    monkeypatch.setattr(cache, "read_regular_file", fails)
    monkeypatch.setattr("torch.hub.download_url_to_file", fails)
    monkeypatch.setattr("experiment.pipeline.make_dataset", fails)


# A mistake of each kind and what is said of it, in the order in which they are looked for.
MISTAKES = {
    "flags": (["--splits", "0.5", "0.2", "0.2"], "adds up to 0.9"),
    "folder": (["--data_dir", "nowhere"], "nowhere: no such folder"),
    "no images": (["--data_dir", "empty"], "empty: no images"),
    "table": (["--labels_csv", "other.csv"], "other.csv: no row matches an image"),
    "classes": (["--malignant_classes", "bsal cell carcinoma"], "bsal cell carcinoma"),
    "batch size": (["--batch_size", "4096"], "--batch_size 4096 is larger than the 34 images"),
    "device": (["--device", "nonsense"], "device nonsense"),
    "precision": (["--precision", "fp16"], "precision fp16 needs CUDA"),
    "save_dir": (["--save_dir", "occupied"], "occupied contains results of another run"),
    "weights": (["--weights", "gone.pth"], "gone.pth: no such file"),
}


def test_of_two_mistakes_the_one_that_is_cheaper_to_see_is_said(
    arguments, tmp_path, monkeypatch, capfd, no_image_is_read
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    pd.DataFrame({"path": ["x.png"], "class": ["x"]}).to_csv("other.csv", index=False)
    make_folder(tmp_path / "occupied", {"resnet_head": ("finished", None)})
    names = list(MISTAKES)
    for first, second in [*pairwise(names), *((n, "weights") for n in names)]:
        (words, said), (more, _) = MISTAKES[first], MISTAKES[second]
        if {*words} & {*more} & {"--data_dir", "--device"}:
            continue  # the second would take the place of the first
        base = [*arguments, "--models", "resnet_head", "--layers", "18", *more, *words]
        capfd.readouterr()
        try:
            status = main(base)
        except SystemExit as stop:  # argparse leaves by itself
            status = stop.code
        (line,) = capfd.readouterr().err.splitlines()
        assert status == 2 and said in line, (first, second, line)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--metadata_csv", "t.csv", "--group_by", "patient"], "t.csv: no column patient"),
        (["--metadata_csv", "t.csv", "--label_column", "dx"], "t.csv: no column dx"),
        (["--metadata_csv", "gone.csv"], "gone.csv: no such file"),
        (["--splits_csv", "t.csv"], "t.csv: no column split"),
        (["--splits_csv", "s.csv"], "s.csv: no images in valid, test"),
        (["--split_by", "folders"], "is not in a folder named Train, Valid or Test"),
        (["--save_dir", "t.csv/out"], "t.csv, which is a file"),
        (["--batch_size", "35"], "--batch_size 35 is larger than the 34 images"),
        (["--device", "meta"], "device meta"),
    ],
)
def test_what_flags_and_folders_tell_is_said_before_any_image_is_read(
    arguments, tmp_path, monkeypatch, capfd, no_image_is_read, words, said
):
    monkeypatch.chdir(tmp_path)
    names = [p.relative_to(arguments[1]).as_posix() for p in Path(arguments[1]).rglob("*.png")]
    pd.DataFrame({"path": names, "site": "x"}).to_csv("t.csv", index=False)
    pd.DataFrame({"path": names, "split": "train"}).to_csv("s.csv", index=False)
    assert said in refusal([*arguments, *words], capfd)
    assert not (tmp_path / "processed").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "nonsense"], "device nonsense"),
        (["--save_dir", "occupied"], "occupied contains results of another run"),
        (["--weights", "gone.pth"], "gone.pth: no such file"),
    ],
)
def test_the_demo_draws_nothing_before_it_is_checked(
    tmp_path, monkeypatch, capfd, no_image_is_read, words, said
):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "occupied", {"simple_cnn": ("finished", None)})
    assert said in refusal(["--demo", *words], capfd)


def test_the_batch_size_is_held_against_the_training_images(arguments, tmp_path, capfd):
    message = refusal([*arguments, "--batch_size", "30"], capfd)  # of 34 images 24 are for training
    assert "--batch_size 30 is larger than the 24 training images" in message
    assert not (tmp_path / "out").exists()


def test_of_several_processes_the_batches_count_together(arguments, monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    message = refusal([*arguments, "--batch_size", "9"], capfd)
    assert "--batch_size 9 in 4 processes, 36 in all, is larger than the 34 images" in message


def test_finished_models_need_no_weights(arguments, tmp_path, capfd):
    import torch

    from models import get_model

    weights = tmp_path / "weights.pth"
    torch.save(get_model("resnet_scratch", 2, layers=18).backbone.state_dict(), weights)
    words = [*arguments, "--models", "resnet_head", "--layers", "18", "--weights", str(weights)]
    assert main(words) == 0
    weights.unlink()
    assert main(words) == 0
    assert "already finished" in capfd.readouterr().out
