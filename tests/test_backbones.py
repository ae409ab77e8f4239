"""The backbones of torchvision, EfficientNet-Lite0 and timm, as models of this project."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import list_models

from inference.explain import gradcam
from inference.export import export_onnx
from models import ModelInfo, get_model, load_model

TORCHVISION = list_models(module=torchvision.models)
# The smallest member of each family, and a size of images that it takes.
SMALL = {
    "efficientnet_lite0": 64, "alexnet": 64, "convnext_tiny": 32, "densenet121": 32,
    "efficientnet_b0": 32, "efficientnet_v2_s": 32, "googlenet": 32, "inception_v3": 75,
    "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32, "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 64,
    "swin_t": 64, "swin_v2_t": 64, "vgg11": 32, "vit_b_32": 128,
}  # fmt: skip


@pytest.mark.parametrize("backbone", SMALL)
def test_probe(backbone, tmp_path):
    import time

    size = SMALL[backbone]
    times = [time.time()]
    model = get_model(f"{backbone}_scratch", 3, weights=None, image_size=size, seed=0)
    times.append(time.time())
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 1]))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    times.append(time.time())
    with torch.no_grad():
        for layer in model.head:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(4)
    heat = gradcam(model, images, [0, 1])
    where = model.found_layers
    times.append(time.time())
    info = ModelInfo(config=model.config, classes=["a", "b", "c"], image_size=size)
    info.save(tmp_path / "model.pth", model.state_dict())
    loaded, _ = load_model(tmp_path / "model.pth")
    with torch.no_grad():
        same = torch.equal(loaded(images), model.eval()(images))
    times.append(time.time())
    try:
        export_onnx(tmp_path / "model.pth", tmp_path / "m.onnx")
        ok = True
    except Exception as error:
        ok = f"{type(error).__name__}: {str(error)[:300]}"
    times.append(time.time())
    print(
        "\n##",
        backbone,
        size,
        heat.max(axis=(1, 2)),
        np.ptp(heat, axis=(1, 2)),
        where,
        same,
        ok,
        np.diff(times).round(1),
    )
