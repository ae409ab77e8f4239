"""A disk that takes no more, for real: a limit on the size of files in a process of its own.

What was there before stays whole, and the error is one line that names the file.
"""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from storage.tensors import load_tensors, save_tensors

ROOT = Path(__file__).resolve().parents[2]


def run_limited(num_bytes, *words, script=None):
    """A command whose files may have so many bytes each; Python makes the signal an error."""
    start = [sys.executable, *(["-c", script] if script else []), *map(str, words)]
    return subprocess.run(
        start,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes)),
    )


def files_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SAVE = """
import sys, torch
from storage.tensors import save_tensors
try:
    save_tensors(sys.argv[1], {"weights": torch.zeros(int(sys.argv[2]))})
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [1, 600, 5000, 100_000])
def test_tensors_that_the_disk_does_not_take_leave_the_old_ones_and_say_what_they_need(
    tmp_path, limit
):
    path = tmp_path / "model.pth"
    save_tensors(path, {"step": 1})
    done = run_limited(limit, path, 500_000, script=SAVE)
    assert done.stdout.strip() == f"[Errno 27] File too large; 2.0 MB are needed: '{path}'"
    assert done.stderr == ""
    assert load_tensors(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


def arguments(root, tmp_path, *more):
    return [
        "train_models.py", "--data_dir", root, "--save_dir", tmp_path / "out", "--image_size", "32",
        "--num_steps", "2", "--batch_size", "8", "--models", "simple_cnn", "--device", "cpu", *more,
    ]  # fmt: skip


def only_line(done):
    (line,) = [line for line in done.stderr.splitlines() if "warning" not in line]
    assert done.returncode == 2 and line.startswith("train_models.py: error: ")
    return line


def test_a_build_without_room_says_how_much_it_needs_and_leaves_nothing(make_images, tmp_path):
    root = make_images({"melanoma": 10, "nevus": 10})
    line = only_line(run_limited(30_000, *arguments(root, tmp_path)))
    assert "0.1 MB are needed" in line and "--cache_dir" in line  # 20 of 32 x 32 x 3 bytes
    assert not list((tmp_path / "processed").rglob("*.npy"))
    assert not (tmp_path / "out").exists()


TRAIN = """
import sys
from dataset import DatasetBuilder, create_dataloaders
from models import get_model
from training import make_optimizer, train

root, cache, out = sys.argv[1:]
splits, _ = DatasetBuilder(root, cache_dir=cache, image_size=32).build()
loaders = create_dataloaders(splits, 8, device="cpu")
model = get_model("simple_cnn", 2, image_size=32)
try:
    train(model, loaders["train"], loaders["valid"], 2, 2, make_optimizer(model), save_path=out)
except OSError as error:
    print(error)
"""


def test_a_checkpoint_without_room_leaves_all_that_was_there(make_images, tmp_path):
    words = make_images({"melanoma": 10, "nevus": 10}), tmp_path / "cache", tmp_path / "out"
    done = run_limited(resource.RLIM_INFINITY, *words, script=TRAIN)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    before = files_below(tmp_path / "out")
    line = run_limited(600_000, *words, script=TRAIN).stdout
    assert str(tmp_path / "out/model.pth") in line and "MB are needed" in line
    after = files_below(tmp_path / "out")
    del before[tmp_path / "out/history.csv"], after[tmp_path / "out/history.csv"]  # written first
    assert after == before


PLOT = """
import sys
import numpy as np
from visualizations import plot_confusion_matrix
try:
    plot_confusion_matrix(np.array([[3, 1], [0, 2]]), ["a", "b"], save_path=sys.argv[1])
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", ["png", "jpg", "pdf", "svg"])
def test_a_figure_without_room_leaves_the_old_one(tmp_path, suffix):
    path = tmp_path / f"figure.{suffix}"
    path.write_text("the old one")
    done = run_limited(2000, path, script=PLOT)
    assert done.stdout.strip() == f"[Errno 27] File too large: '{path}'", done.stderr
    assert files_below(tmp_path) == {path: b"the old one"}


def test_a_file_system_that_reserves_nothing_gets_zeros_written(tmp_path, monkeypatch):
    import os

    import numpy as np

    from imaging.cache import _NewArray

    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    with _NewArray(tmp_path / "a.npy", (3, 1000, 1000)) as array:
        array[1] = np.full((1000, 1000), 7)
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 3_000_000
    assert np.load(tmp_path / "a.npy").sum(axis=(1, 2)).tolist() == [0, 7_000_000, 0]


@pytest.mark.parametrize("folder", [".", "simple_cnn"])  # before the training, and within it
def test_a_folder_that_may_not_be_written_is_one_line_and_stays_as_it_is(
    make_images, tmp_path, folder, drop_the_rights_of_root
):
    root, out = make_images({"melanoma": 10, "nevus": 10}), tmp_path / "out"
    (out / "simple_cnn").mkdir(parents=True)
    (out / folder).chmod(0o555)
    done = subprocess.run(
        [sys.executable, *map(str, arguments(root, tmp_path))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=drop_the_rights_of_root,
    )
    line = only_line(done)
    reason = "no permission to write there" if folder == "." else "Permission denied"
    assert reason in line and str(out / folder) in line
    assert not list((out / "simple_cnn").iterdir())
