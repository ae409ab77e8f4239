"""Small data sets and models, and files that are no images, that tests share."""

import os

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from dataset import DatasetBuilder
from models import Backbone, get_model

CLASSES = ["melanoma", "mole $1_x", "nevus"]
PROBABILITIES = [f"prob_{name}" for name in CLASSES]
THRESHOLDS = {
    "malignant": {"sensitivity 90%": 0.9, "sensitivity 95%": 0.5, "specificity 90%": 0.95},
    "melanoma": {"sensitivity 95%": 0.3},
}


def small_model(seed=0, name="simple_cnn", image_size=32):
    """A model whose probabilities differ from image to image, which fresh weights' hardly do."""
    options = {"layers": 18, "weights": None, "image_size": image_size, "seed": seed}
    model = get_model(name, len(CLASSES), **options).eval()
    with torch.no_grad():
        for layer in model.head:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(4)
    return model


def save_few_pixels(figure, file, *, format, **options):
    """In place of `Figure.savefig`: drawing figures takes most of the time of a short run."""
    Image.new("RGB", (8, 8)).save(file, format)


def training_flags(data_dir, save_dir, **others):
    """The command line of a run that takes a second or two."""
    flags = {"data_dir": data_dir, "save_dir": save_dir, "image_size": 32, "num_steps": 2}
    flags |= {"eval_every": 2, "batch_size": 8, "device": "cpu"} | others
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def snapshot(folder):
    """Every file below a folder with its contents and time, to see that nothing was touched."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in files]


def save_all_figures_as_few_pixels():
    """For processes that tests start."""
    Figure.savefig = save_few_pixels


def small_backbone():
    """An entry of `BACKBONES` with batch norm, and much faster than a ResNet."""

    def build():
        layers = [nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 8

    return Backbone(build=build, feature_maps=(("2", 4),))


def break_files(folder):
    """Adds files that are no images to a folder with `a/0000.png`; gives their names."""
    whole = (folder / "a/0000.png").read_bytes()
    (folder / "empty.jpg").touch()
    (folder / "cut\nshort.png").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(folder / "pipe.gif")
    return ["empty.jpg", "cut\nshort.png", "pipe.gif"]


def build(root, image_size=16, splits=None, preprocessors=(), **options):
    builder = DatasetBuilder(root, image_size=image_size, **options)
    return builder.build(preprocessors=preprocessors, splits=splits)


def shown(splits, path):
    """The prepared image of a file."""
    for split in splits.values():
        found = np.flatnonzero(split.metadata["path"] == path)
        if len(found):
            return split.gather(found)[0]
    raise KeyError(path)
