"""What the commands say of mistakes; `docs/mistakes.md` is the list of them.

    UPDATE_DOCS=1 python -m pytest tests/test_mistakes.py

writes that page again after a message has changed.
"""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import predict
import train_models
from tests.samples import save_few_pixels

PAGE = Path(__file__).resolve().parent.parent / "docs/mistakes.md"
SMALL = " --image_size 32 --batch_size 8"  # not shown on the page
TRAIN = f"train_models.py --data_dir data --models simple_cnn{SMALL} --num_steps 2"
METADATA = f"{TRAIN} --metadata_csv table.csv"
PREDICT = "predict.py --model models/simple_cnn/model.pth"


def write(name, text):
    Path(name).write_text(text, encoding="utf-8")


def add_text_file():
    write("data/nevus/notes.jpg", "not an image")


def truncate_image():
    path = sorted(Path("data/nevus").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-40])


def leave_one_class():
    shutil.rmtree("data/nevus")


def leave_two_images():
    for path in sorted(Path("data/nevus").iterdir())[2:]:
        path.unlink()


def put_image_beside_folders():
    Image.new("RGB", (32, 32)).save("data/stray.png")


def rows(*lines):
    return lambda: write("table.csv", "\n".join(lines) + "\n")


def all_rows(header, cell):
    def write_table():
        images = sorted(path.relative_to("data") for path in Path("data").rglob("*.png"))
        write("table.csv", "\n".join([header, *(f"{path},{cell}" for path in images)]))

    return write_table


def corrupt_model():
    write("models/simple_cnn/model.pth", "not a model")


HEADER = """# Mistakes and their messages

Written by `tests/test_mistakes.py`, which makes every mistake in a folder with images of two
classes in `data` and a model in `models`. Exit status 2 means that nothing was changed; 1, that the
command worked and found something; 0, that it only warned.

| mistake | command | message | exit status |
| --- | --- | --- | --- |
"""

# What was done, what prepared it if anything, and the command.
MISTAKES = [
    ("no flags", None, "train_models.py"),
    ("a flag with a typing error", None, f"{TRAIN} --learning_rat 0.01"),
    ("another flag with a typing error", None, f"{PREDICT} --grad-cam maps data"),
    ("a flag without its value", None, f"{TRAIN} --seed"),
    ("a word for a number", None, f"{TRAIN} --num_steps many"),
    ("a negative number of steps", None, f"{TRAIN} --num_steps -5"),
    ("a dropout rate above 1", None, f"{TRAIN} --dropout_rate 1.5"),
    ("fractions that do not add up to 1", None, f"{TRAIN} --splits 0.7 0.2 0.2"),
    ("a model with a typing error", None,
     "train_models.py --data_dir data --models resnet_finetune"),
    ("a model that nothing resembles", None, "train_models.py --data_dir data --models best"),
    ("an unknown depth", None, f"{TRAIN} --layers 19"),
    ("an image size that is too small", None, f"{TRAIN} --image_size 4"),
    ("a batch larger than the training split", None, f"{TRAIN} --batch_size 500"),
    ("fp16 on a CPU", None, f"{TRAIN} --device cpu --precision fp16"),
    ("a training flag with `--audit_only`", None, f"{TRAIN} --audit_only --num_steps 5"),
    ("a folder that does not exist", None, "train_models.py --data_dir dta"),
    ("a file instead of a folder", rows("x"), "train_models.py --data_dir table.csv"),
    ("a folder without images", lambda: os.mkdir("empty"), "train_models.py --data_dir empty"),
    ("a single class", leave_one_class, TRAIN),
    ("images beside the class folders", put_image_beside_folders, TRAIN),
    ("a class with too few images", leave_two_images, TRAIN),
    ("a text file named like an image", add_text_file, TRAIN),
    ("a truncated image", truncate_image, TRAIN),
    ("the results in the data folder", None, f"{TRAIN} --save_dir data"),
    ("a table that does not exist", None, f"{TRAIN} --metadata_csv tabel.csv"),
    ("a table without a column of images", rows("name,age", "a,1"), METADATA),
    ("a table that matches no image", rows("path,age", "x.png,1"), METADATA),
    ("a grouping column with a typing error", all_rows("path,lesion_id", "1"),
     f"{METADATA} --group_by lesion"),
    ("all images in one group", all_rows("path,lesion_id", "1"),
     f"{METADATA} --group_by lesion_id"),
    ("`--group_by` without a table", None, f"{TRAIN} --group_by lesion_id"),
    ("labels of one class only", all_rows("path,class", "nevus"),
     f"{TRAIN} --labels_csv table.csv"),
    ("splits of unknown names", all_rows("path,split", "testing?"),
     f"{TRAIN} --splits_csv table.csv"),
    ("no test split in the table", all_rows("path,split", "train"),
     f"{TRAIN} --splits_csv table.csv"),
    ("folders without Train and Test", None, f"{TRAIN} --split_by folders"),
    ("a malignant class with a typing error", None, f"{TRAIN} --malignant_classes melanom"),
    ("weights that do not exist", None,
     "train_models.py --data_dir data --models resnet_head --weights resnet.pth"),
    ("`--resume` with other settings", None, f"{TRAIN} --seed 1 --resume"),
    ("other settings in the same folder", None, f"{TRAIN} --seed 1"),
    ("a model that does not exist", None, "predict.py --model models/resnet/model.pth data"),
    ("a folder given as a table", None, f"{TRAIN} --labels_csv data"),
    ("a model file that is damaged", corrupt_model, f"{PREDICT} data"),
    ("no images to predict", None, PREDICT),
    ("an image that does not exist", None, f"{PREDICT} lesion.jpg"),
    ("an output of an unknown format", None, f"{PREDICT} data --output table.xlsx"),
    ("an output that exists", rows("x"), f"{PREDICT} data --output table.csv"),
    ("a threshold above 1", None, f"{PREDICT} data --threshold melanoma=95"),
    ("a threshold for an unknown class", None, f"{PREDICT} data --threshold melanom=0.5"),
    ("an evaluation into a training run", None, f"{PREDICT} --evaluate models data"),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(make_module_images, tmp_path_factory):
    """A folder with images in `data` and a trained model in `models`."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(make_module_images({"melanoma": 24, "nevus": 24}, size=32), folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("matplotlib.figure.Figure.savefig", save_few_pixels)
        assert train_models.main([*shlex.split(TRAIN)[1:], "--device", "cpu"]) == 0
    return folder


@pytest.fixture(scope="module")
def page():
    """The rows of the page by mistake, which are written to it at the end if that is asked for."""
    rows = {}
    yield rows
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(HEADER + "".join(rows[what] for what, _, _ in MISTAKES), encoding="utf-8")


@pytest.mark.parametrize(("what", "prepare", "command"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_answered_as_the_page_says(
    what, prepare, command, trained, page, tmp_path, monkeypatch, capfd, quick_figures
):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if command.startswith("train_models.py") and "--seed 1" not in command:
        shutil.rmtree("models")
    if prepare is not None:
        prepare()
    capfd.readouterr()
    program, *flags = shlex.split(command)
    try:
        status = {"train_models.py": train_models, "predict.py": predict}[program].main(flags)
    except SystemExit as stop:
        status = stop.code
    message = capfd.readouterr().err.strip()
    assert status in (0, 1, 2) and message
    assert "Traceback" not in message
    message = re.sub(r"finished \d{4}-\d\d-\d\d", "finished 2026-01-31", message)
    shown = command.replace(f"{SMALL} --num_steps 2", "")
    cells = (what, f"`{shown}`", message.replace("|", r"\|").replace("\n", "<br>"), str(status))
    page[what] = f"| {' | '.join(cells)} |\n"
    if not os.environ.get("UPDATE_DOCS"):
        assert page[what] in PAGE.read_text(encoding="utf-8")
