"""Features of new images: in Python, and as a file."""

import os
import signal

import numpy as np
import pytest
import torch

from imaging.batches import to_float
from imaging.prepare import prepare_image
from inference import features
from inference.features import extract_features, feature_batches
from models import load_model
from predict import main
from tests.samples import break_files, small_model


def expected_features(path, images):
    model, info = load_model(path)
    pixels = np.stack([prepare_image(image, info.image_size) for image in images])
    with torch.no_grad():
        return model.features(to_float(torch.from_numpy(pixels))).numpy()


@pytest.mark.parametrize("name", ["simple_cnn", "resnet_head"])
def test_features_are_what_the_head_classifies(images, save_model, name):
    path = save_model(model=small_model(name=name))
    found, paths = extract_features(path, images, precision="fp32", device="cpu", batch_size=3)
    assert paths == sorted(image.as_posix() for image in images.rglob("*.png"))
    assert found.dtype == np.float32 and found.shape == (7, 512 if name == "resnet_head" else 256)
    assert np.allclose(found, expected_features(path, paths), atol=1e-5)
    model, _ = load_model(path)
    with torch.no_grad():
        logits = model(features=torch.from_numpy(found))
        pixels = np.stack([prepare_image(image, 32) for image in paths])
        assert torch.allclose(logits, model(to_float(torch.from_numpy(pixels))), atol=1e-4)


def test_the_command_writes_them_with_their_paths(images, save_model, tmp_path, capfd):
    path, output = save_model(), tmp_path / "features.npz"
    odd = images / os.fsdecode(b"caf\xe9.png")
    (images / "a/0000.png").rename(odd)
    words = ["--model", str(path), "--features", str(output), "--precision", "fp32"]
    assert main([*words, "--device", "cpu", "--batch_size", "3", str(images)]) == 0
    assert capfd.readouterr().out == f"{output}: 256 features of 7 images\n"
    with np.load(output, allow_pickle=False) as file:
        assert set(file) == {"features", "paths"}
        found, paths = extract_features(path, images, precision="fp32", device="cpu", batch_size=3)
        assert np.array_equal(file["features"], found) and file["features"].dtype == np.float32
        assert file["paths"].tolist() == paths
        assert odd.as_posix() in paths


def test_files_that_cannot_be_read_have_no_row(images, save_model, tmp_path, capfd):
    unreadable = break_files(images)
    path, output = save_model(), tmp_path / "features.npz"
    with pytest.warns(UserWarning, match="3 images cannot be read"):
        found, paths = extract_features(path, images, device="cpu")
    assert len(found) == len(paths) == 7
    words = ["--model", str(path), "--features", str(output), "--device", "cpu"]
    assert main([*words, str(images)]) == 1
    errors = capfd.readouterr().err
    assert all(name.split("\n")[0] in errors for name in unreadable)
    with np.load(output) as file:
        assert len(file["features"]) == len(file["paths"]) == 7


def test_without_a_readable_image_there_are_no_rows(save_model, tmp_path):
    (tmp_path / "empty.png").touch()
    output = tmp_path / "features.npz"
    with pytest.warns(UserWarning, match="1 images cannot be read"):
        found, paths = extract_features(
            save_model(), tmp_path / "empty.png", output=output, device="cpu"
        )
    assert found.shape == (0, 256) and paths == []
    with np.load(output) as file:
        assert file["features"].shape == (0, 256) and file["paths"].shape == (0,)


def test_a_file_appears_when_all_is_done_or_not_at_all(images, save_model, tmp_path, monkeypatch):
    output = tmp_path / "features.npz"
    output.write_text("earlier")
    before = set(tmp_path.iterdir())
    batches = feature_batches(save_model(), images, output=output, device="cpu", batch_size=2)
    before.add(tmp_path / "model.pth")
    next(batches)
    batches.close()
    assert output.read_text() == "earlier" and set(tmp_path.iterdir()) == before

    def interrupt(*arguments):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(features, "compute_features", interrupt)
    words = ["--model", str(tmp_path / "model.pth"), "--features", str(output), "--overwrite"]
    assert main([*words, str(images)]) == 130
    assert output.read_text() == "earlier" and set(tmp_path.iterdir()) == before


def test_mistakes_are_named(images, save_model, tmp_path):
    path = save_model()
    for output, message in (
        ("features.csv", "must end in .npz"),
        ("gone/features.npz", "no folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            extract_features(path, images, output=tmp_path / output, device="cpu")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        extract_features(path, images, batch_size=0)
    with pytest.raises(FileNotFoundError, match="gone: no such file or folder"):
        extract_features(path, tmp_path / "gone")
