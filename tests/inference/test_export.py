"""A trained model as an ONNX file."""

import json
import sys

import numpy as np
import pytest
import torch

from inference.export import export_onnx
from predict import main
from tests.samples import CLASSES, small_model


def test_an_export_gives_the_same_logits_and_says_how_to_use_it(tmp_path, save_model, capfd):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = small_model(name="resnet_head", image_size=28)
    path = save_model(model=model, temperature=1.5, bias=[0.1, 0.0, -0.1])
    assert main(["--model", str(path), "--export", str(tmp_path / "m.onnx")]) == 0
    assert "same logits" in capfd.readouterr().out
    exported = onnx.load(tmp_path / "m.onnx")
    metadata = {entry.key: json.loads(entry.value) for entry in exported.metadata_props}
    assert metadata == {
        "classes": CLASSES, "image_size": 28, "shorter_side": 32, "preprocessors": "",
        "temperature": 1.5, "bias": [0.1, 0.0, -0.1],
    }  # fmt: skip
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    images = torch.rand(5, 3, 28, 28)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    assert np.allclose(logits, model(images).detach().numpy(), atol=1e-4)


def test_an_export_that_gives_other_logits_is_not_written(tmp_path, save_model, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")

    class OtherSession(runtime.InferenceSession):
        def run(self, *arguments):
            return [output + 1e-3 for output in super().run(*arguments)]

    monkeypatch.setattr(runtime, "InferenceSession", OtherSession)
    with pytest.raises(ValueError, match="other logits than PyTorch, by up to 0.001"):
        export_onnx(save_model(), tmp_path / "m.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth"]


def test_without_the_packages_an_export_says_what_to_install(
    tmp_path, save_model, monkeypatch, capfd
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["--model", str(save_model()), "--export", str(tmp_path / "m.onnx")]) == 2
    error = capfd.readouterr().err
    assert "pip install onnx onnxscript onnxruntime" in error and error.count("\n") == 1
