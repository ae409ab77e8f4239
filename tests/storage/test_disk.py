"""A disk that takes no more, for real: by a limit on the size of this process's files.

What was there before stays whole, and the error is one line that names the file.
"""

import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from dataset import DatasetBuilder, create_dataloaders
from imaging.cache import new_array
from models import get_model
from storage.tensors import load_tensors, save_tensors
from train_models import main
from training import make_optimizer, train
from visualizations import plot_confusion_matrix

pytestmark = pytest.mark.usefixtures("quick_figures")


@contextmanager
def files_of_at_most(num_bytes):
    """Limits the size of all files; Python makes the signal of a larger one an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("limit", [1, 600, 5000, 100_000])
def test_tensors_that_the_disk_does_not_take_leave_the_old_ones_and_say_what_they_need(
    tmp_path, limit
):
    path = tmp_path / "model.pth"
    save_tensors(path, {"step": 1})
    with files_of_at_most(limit), pytest.raises(OSError) as caught:
        save_tensors(path, {"weights": torch.zeros(500_000)})
    assert str(caught.value) == f"[Errno 27] File too large; 2.0 MB are needed: '{path}'"
    assert load_tensors(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def arguments(root, tmp_path, *more):
    return [
        "--data_dir", str(root), "--save_dir", str(tmp_path / "out"), "--image_size", "32",
        "--num_steps", "2", "--batch_size", "8", "--models", "simple_cnn", "--device", "cpu", *more,
    ]  # fmt: skip


def error_of(words, capfd):
    """The one line with which a training run ends that cannot be done."""
    assert main(words) == 2
    lines = capfd.readouterr().err.splitlines()
    (line,) = [line for line in lines if "warning" not in line]
    assert line.startswith("train_models.py: error: ")
    return line


def test_a_build_without_room_says_how_much_it_needs_and_leaves_nothing(
    make_images, tmp_path, capfd
):
    root = make_images({"melanoma": 10, "nevus": 10})
    with files_of_at_most(30_000):
        line = error_of(arguments(root, tmp_path), capfd)
    assert "0.1 MB are needed" in line and "--cache_dir" in line  # 20 of 32 x 32 x 3 bytes
    assert not list((tmp_path / "processed").rglob("*.npy"))
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_while_rows_are_written_is_the_same_error(tmp_path, monkeypatch):
    def reserves_nothing(descriptor, start, num_bytes):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", reserves_nothing, raising=False)
    with new_array(tmp_path / "a.npy", (3, 1000, 1000)) as write_row:
        write_row(1, np.full((1000, 1000), 7, np.uint8))
    assert np.load(tmp_path / "a.npy").sum(axis=(1, 2)).tolist() == [0, 7_000_000, 0]
    full = new_array(tmp_path / "b.npy", (3, 1000, 1000))
    with pytest.raises(OSError, match="File too large"), full as write_row:
        write_row(0, np.full((1000, 1000), 7, np.uint8))
        with files_of_at_most(1_500_000):
            write_row(1, np.full((1000, 1000), 7, np.uint8))


def test_a_checkpoint_without_room_leaves_all_that_was_there(make_images, tmp_path):
    root, out = make_images({"melanoma": 10, "nevus": 10}), tmp_path / "out"
    splits, _ = DatasetBuilder(root, image_size=32).build()
    loaders = create_dataloaders(splits, 8, device="cpu")

    def run():
        model = get_model("simple_cnn", 2, image_size=32)
        optimizer = make_optimizer(model)
        train(model, loaders["train"], loaders["valid"], 2, 2, optimizer, save_path=out)

    run()
    before = files_below(out)
    with files_of_at_most(600_000), pytest.raises(OSError, match="MB are needed") as caught:
        run()
    assert str(out / "model.pth") in str(caught.value)
    after = files_below(out)
    del before[out / "history.csv"], after[out / "history.csv"]  # written first
    assert after == before


@pytest.mark.draws
@pytest.mark.parametrize("suffix", ["png", "jpg", "pdf", "svg"])
def test_a_figure_without_room_leaves_the_old_one(tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    path.write_text("the old one")
    with files_of_at_most(2000), pytest.raises(OSError) as caught:
        plot_confusion_matrix(np.array([[3, 1], [0, 2]]), ["a", "b"], save_path=path)
    assert str(caught.value) == f"[Errno 27] File too large: '{path}'"
    assert files_below(tmp_path) == {path: b"the old one"}


@pytest.mark.parametrize("folder", [".", "simple_cnn"])  # before the training, and within it
def test_a_folder_that_may_not_be_written_is_one_line_and_stays_as_it_is(
    make_images, tmp_path, folder, without_the_rights_of_root, capfd
):
    root, out = make_images({"melanoma": 10, "nevus": 10}), tmp_path / "out"
    (out / "simple_cnn").mkdir(parents=True)
    (out / folder).chmod(0o555)
    with without_the_rights_of_root():
        line = error_of(arguments(root, tmp_path), capfd)
    reason = "no permission to write" if folder == "." else "Permission denied"
    assert reason in line and str(out / folder) in line
    assert not list((out / "simple_cnn").iterdir())
