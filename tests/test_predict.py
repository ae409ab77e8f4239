"""The command and the function; what models make of images is in inference/test_ensemble.py."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import predict as predict_module
from predict import main, predict
from tests.samples import PROBABILITIES, THRESHOLDS, break_files, small_model

ROOT = Path(__file__).parents[1]


def test_the_command_prints_the_most_probable_classes_and_flags(
    images, save_model, capfd, auto_precision
):
    model = save_model(thresholds=THRESHOLDS, malignant_classes=["melanoma", "nevus"])
    table = predict(model, images, device="cpu")
    assert main(["--model", str(model), str(images), "--top-k", "2", "--device", "cpu"]) == 0
    header, *rows = capfd.readouterr().out.rstrip().split("\n")
    assert header.split("  ")[0] == "image" and header.endswith("most probable classes")
    assert len(rows) == 7 + 2
    for (_, row), line in zip(table.iterrows(), rows[:7], strict=True):
        own = row[f"prob_{row['class']}"]
        assert line.startswith(f"{row['path']}  {row['class']} {own:.3f}  ")
        ranked = row[PROBABILITIES].astype(float).sort_values(ascending=False)
        top = [f"{name.removeprefix('prob_')} {p:.3f}" for name, p in ranked.items()]
        assert line.endswith(f"  {top[0]}, {top[1]}")
        assert ("malignant" in line) == row["flag_malignant"]
    flagged = f"malignant {table['flag_malignant'].sum()}, melanoma {table['flag_melanoma'].sum()}"
    assert rows[-1] == f"7 images; flagged: {flagged}; precision {auto_precision}"


def test_a_class_that_is_not_the_most_probable_is_marked_with_a_reason_below_the_table(
    make_images, tmp_path, save_model, capfd
):
    root = make_images({"a": 25})
    plain = predict(save_model(), root, device="cpu")
    assert set(plain["class"]) == {"nevus"}
    halfway = float(np.log(plain["prob_nevus"] / plain["prob_mole $1_x"]).median())
    path = save_model(bias=[0.0, halfway, 0.0])
    table = predict(path, root, device="cpu")
    is_marked = (table["class"] != table["most_probable"]).tolist()
    assert 0 < sum(is_marked) < 25
    words = ["--model", str(path), str(root), "--device", "cpu", "--top_k", "1"]
    assert main([*words, "--output", str(tmp_path / "out.csv")]) == 0
    _, *rows, more, _, reason, _, _ = capfd.readouterr().out.rstrip().split("\n")
    assert len(rows) == 20 and more == "... and 5 more"
    for line, (_, row), marked in zip(rows, table.iterrows(), is_marked, strict=False):
        _, predicted, highest = (cell.strip() for cell in re.split("  +", line))
        assert predicted == f"{row['class']} {row['probability']:.3f}" + " *" * marked
        assert highest.rpartition(" ")[0] == row["most_probable"]
    assert reason.startswith(f"* {sum(is_marked)} of 25 images: another class is more probable")
    assert main(["--model", str(save_model()), *words[2:]]) == 0
    assert "*" not in capfd.readouterr().out


def test_the_folder_of_a_model_stands_for_it(images, tmp_path, save_model, capfd):
    for name in ("one", "two"):
        (tmp_path / "models" / name).mkdir(parents=True)
        save_model(f"models/{name}/model.pth", small_model(len(name)))
    words = [str(images), "--device", "cpu", "--model"]
    printed = []
    for path in ("models/one/model.pth", "models/one"):
        assert main([*words, str(tmp_path / path)]) == 0
        printed.append(capfd.readouterr().out)
    assert printed[0] == printed[1]
    assert main([*words, str(tmp_path / "models")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "models has 2 models; choose one, or name each" in line
    assert line.endswith(f"{tmp_path}/models/one, {tmp_path}/models/two")
    assert main([*words, str(images)]) == 2
    assert "images: no model.pth in this folder or below it" in capfd.readouterr().err


def test_with_a_file_for_the_table_the_first_rows_are_printed(
    make_images, tmp_path, save_model, capfd
):
    root, output = make_images({"a": 25}), tmp_path / "out.csv"
    arguments = ["--model", str(save_model()), str(root), "--batch_size", "8", "--device", "cpu"]
    main([*arguments, "--output", str(output)])
    printed = capfd.readouterr().out
    assert printed.count(".png") == 20 and "... and 5 more" in printed
    assert len(pd.read_csv(output)) == 25
    main(arguments)
    assert capfd.readouterr().out.count(".png") == 25


def test_flags_of_the_command_do_what_the_function_does(
    images, tmp_path, save_model, capfd, auto_precision
):
    one, two = save_model("1.pth"), save_model("2.pth", small_model(1))
    main([
        str(images / "b"), "--model", str(one), "--model", str(two), "--tta", "8",
        "--output", str(tmp_path / "out.csv"), str(images / "a"), "--threshold", "nevus=0.25",
        "--threshold=mole $1_x=0.5", "--gradcam", str(tmp_path / "cam"), "--device", "cpu",
        "--precision", "fp32", "--num-workers", "2", "--batch-size", "4",
    ])  # fmt: skip
    expected = predict(
        [one, two], [images / "b", images / "a"], tta=8, device="cpu", precision="fp32",
        thresholds={"nevus": 0.25, "mole $1_x": 0.5},
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "out.csv")
    assert list(table.columns) == list(expected.columns)
    numbers = ["probability", *PROBABILITIES]
    assert table.drop(columns=numbers).equals(expected.drop(columns=numbers))
    assert np.allclose(table[numbers], expected[numbers], atol=1e-6)
    assert len(list((tmp_path / "cam").iterdir())) == 7


def test_exit_statuses_are_0_for_all_read_1_for_some_and_2_for_a_mistake(
    images, tmp_path, save_model, start
):
    def run(*words, cwd):
        process = start(ROOT / "predict.py", *words, cwd=cwd)
        return *process.communicate(timeout=120), process.returncode

    picture = (images / "a/0000.png").read_bytes()
    for name in ("-x.png", "möle ☃\n.png"):
        (images / name).write_bytes(picture)
    model = save_model()
    words = ["--model", model, ".", "--output", "../o.json", "--", "-x.png"]
    printed, errors, status = run(*words, cwd=images)
    assert (status, errors) == (0, "")
    paths = [row["path"] for row in json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))]
    assert paths == ["-x.png", *(f"a/{i:04d}.png" for i in range(4)),
                     *(f"b/{i:04d}.png" for i in range(3)), "möle ☃\n.png"]  # fmt: skip
    assert "\nmöle" not in printed and r"'m\xf6le \u2603\n.png'" in printed

    break_files(images)
    printed, errors, status = run("--model", model, "--output", "../o.csv", ".", cwd=images)
    assert status == 1
    assert len(errors.splitlines()) == 3
    for line, words in zip(
        errors.splitlines(), (r"cut\nshort.png'", "empty.jpg: empty", "pipe.gif"), strict=True
    ):
        assert line.startswith("predict.py: warning: ") and words in line
    assert "9 images; could not be read: 3" in printed
    assert len(pd.read_csv(tmp_path / "o.csv")) == 9

    printed, errors, status = run("--model", model, "gone.png", cwd=images)
    assert (status, printed) == (2, "")
    assert errors == "predict.py: error: gone.png: no such file or folder\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["a.png"], "--model"),
        (["--model", "m.pth"], "give the images"),
        (
            ["--model", "m.pth", "a.png", "--threshold", "nevus"],
            "must be of the form NAME=0.2, not 'nevus'",
        ),
        (
            ["--model", "m.pth", "a.png", "--threshold", "nevus=x"],
            "--threshold: must be a number, not 'x'",
        ),
        (["--model", "m.pth", "a.png", "--tta", "x"], "--tta: must be a whole number, not 'x'"),
        (
            ["--model", "m.pth", "a.png", "--top_k", "0"],
            "--top_k: must be at least 1",
        ),
        (["--model", "m.pth", "a.png", "--export", "m.onnx"], "--export takes no images"),
        (["--model", "m", "--model", "n", "--export", "m.onnx"], "--export takes one --model"),
        (["--model", "m.pth", "--export", "m.onx"], "must end in .onnx"),
        (["--model", "m.pth", "--unknown", "a.png"], "--unknown"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(words, error, capfd):
    try:
        status = main(words)
    except SystemExit as exit:
        status = exit.code
    captured = capfd.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith("predict.py: error: ") and error in captured.err
    assert captured.err.count("\n") == 1


def test_help_does_not_wait_for_torch():
    code = "import sys, predict; sys.exit(bool({'torch', 'pandas', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_names_that_need_torch_are_imported_when_first_used():
    for name in predict_module.__all__:
        assert callable(getattr(predict_module, name)) or name.isupper()
    with pytest.raises(AttributeError, match="no attribute 'prediction'"):
        predict_module.prediction  # noqa: B018


def test_nothing_is_warned_of_when_all_is_well(images, save_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(save_model(), images, device=torch.device("cpu"))


def test_the_command_warns_of_thresholds_in_one_line_that_names_the_way_out(
    images, save_model, capfd
):
    model = str(save_model(thresholds=THRESHOLDS, malignant_classes=["nevus"]))
    words = ["--model", model, "--device", "cpu", "--tta", "8", str(images)]
    assert main(words) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("predict.py: warning: ") and "--threshold NAME=P" in line
    assert main([*words, "--threshold", "melanoma=0.2"]) == 0
    assert capfd.readouterr().err == ""
