"""A trained model as an ONNX file."""

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import torch

from imaging.prepare import shorter_side
from inference.options import check_file_to_write
from models import LesionClassifier, load_model
from storage.files import write_atomically

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(model: str | Path, path: str | Path) -> None:
    """Writes a trained model as ONNX, once onnxruntime has given the same logits as PyTorch.

    Input `images`, float32 `(batch, 3, image_size, image_size)`, RGB in [0, 1]; output `logits`,
    raw, for probabilities softmax(log_softmax(logits) / temperature + bias). What is needed to use
    it is in the metadata as JSON: `classes`, `image_size`, `shorter_side` (to which an image is
    scaled before the crop of `image_size` from its middle), `preprocessors` (the fingerprint of
    custom ones, empty for none), `temperature`, `bias`.

    Raises ModuleNotFoundError when the packages that this needs are missing, and ValueError when
    the logits differ.
    """
    check_file_to_write(path, (".onnx",))
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"--export needs {', '.join(missing)}; install with: pip install "
            f"{' '.join(ONNX_PACKAGES)}"
        )
    import onnx

    classifier, info = load_model(model)
    size = info.image_size
    metadata = {
        "classes": info.classes,
        "image_size": size,
        "shorter_side": shorter_side(size),
        "preprocessors": info.preprocessors,
        "temperature": info.calibration.temperature,
        "bias": info.calibration.bias,
    }
    with write_atomically(path) as temporary:
        _export_logits(temporary, classifier, size)
        exported = onnx.load(temporary)
        onnx.helper.set_model_props(exported, {name: json.dumps(v) for name, v in metadata.items()})
        onnx.save(exported, temporary)
        _check_same_logits(temporary, classifier, size)


def _export_logits(path: Path, classifier: LesionClassifier, image_size: int) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        # Of torch's two exporters the newer fails on batch norm in torch 2.6 and the older is
        # deprecated since 2.9, so each version takes its default. Both know `dynamic_axes`, if with
        # a warning; whether they got it right is checked.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            classifier,
            (torch.rand(2, 3, image_size, image_size),),
            path,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
            external_data=False,
            verbose=False,
        )


def _check_same_logits(path: Path, classifier: LesionClassifier, image_size: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3):
        images = torch.rand(count, 3, image_size, image_size, generator=generator)
        (exported,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = classifier(images).numpy()
        if not np.allclose(exported, expected, atol=1e-4):
            difference = np.abs(exported - expected).max()
            raise ValueError(
                f"onnxruntime gives other logits than PyTorch, by up to {difference:.3g}; nothing "
                "was written"
            )
