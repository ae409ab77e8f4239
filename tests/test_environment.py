"""What is around a run (names of folders, locale, hash seed) does not reach its results."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import torch

from dataset import DatasetBuilder, create_dataloaders
from models import load_model
from predict import predict
from train_models import main

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "--image_size", "32", "--models", "simple_cnn", "--num_steps", "4", "--eval_every", "2",
    "--batch_size", "8", "--device", "cpu", "--precision", "fp32",
]  # fmt: skip
ASCII = {
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii:strict",
}


def run(script, words, environment):
    kept = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, words)],
        env=kept | environment,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode("utf-8")


def test_a_run_is_the_same_without_home_in_ascii_and_in_folders_with_odd_names(
    make_images, tmp_path, no_figures
):
    plain = make_images({"melanoma": 16, "Leberfleck übel": 14, "c": 4})
    odd = tmp_path / "meine Bilder, größte 'Menge' 痣"
    odd.mkdir()
    shutil.copytree(plain, odd / "roh & echt")
    assert main(["--data_dir", str(plain), "--save_dir", str(tmp_path / "out"), *SETTINGS]) == 0
    words = ["--data_dir", odd / "roh & echt", "--save_dir", odd / "Läufe 1"]
    words += ["--cache_dir", odd / "vorbe reitet", "--num_workers", "2", *SETTINGS]
    # With matplotlib's folder, or it would look at all fonts of the system once more.
    fonts = {"MPLCONFIGDIR": matplotlib.get_configdir()}
    printed = run("train_models.py", words, ASCII | {"PYTHONHASHSEED": "4711"} | fonts)
    assert "simple_cnn" in printed and "\x1b" not in printed and printed.isascii()
    one, other = tmp_path / "out/simple_cnn", odd / "Läufe 1/simple_cnn"
    weights = load_model(one / "model.pth")[0].state_dict()
    again = load_model(other / "model.pth")[0].state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert (one / "predictions.csv").read_bytes() == (other / "predictions.csv").read_bytes()

    images = sorted((odd / "roh & echt/Leberfleck übel").iterdir())
    table = odd / "Tabelle ä.csv"
    words = ["--model", other / "model.pth", *images, "--output", table, "--precision", "fp32"]
    run("predict.py", words, ASCII)
    expected = predict(other / "model.pth", images, device="cpu", precision="fp32")
    found = pd.read_csv(table)
    assert found["path"].tolist() == expected["path"].tolist() == [str(path) for path in images]
    assert found["class"].tolist() == expected["class"].tolist()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loading_processes_are_started_in_any_way(make_images, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    splits, _ = DatasetBuilder(make_images({"a": 12, "b": 8, "c": 4}), image_size=32).build()
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        batches = {
            num_workers: list(
                create_dataloaders(splits, 8, device="cpu", num_workers=num_workers)["train"]
            )
            for num_workers in (0, 2)
        }
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(batches[0]) == len(batches[2])
    for (images, labels), (again, its_labels) in zip(batches[0], batches[2], strict=True):
        assert torch.equal(images, again) and torch.equal(labels, its_labels)
