"""One member of each family of backbones: trained, stopped and resumed, explained, exported.

    python benchmarks/families.py [NAME ...]

Each is trained for four steps on drawn images, twice whole and once stopped after two steps and
resumed; the weights must be equal, bit for bit. ONNX is compared with PyTorch by `export_onnx`.
These take minutes, too long for the tests, which do the same for a few of them.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from dataset import DatasetBuilder, create_dataloaders
from imaging.synthetic import make_dataset
from inference.explain import gradcam
from inference.export import export_onnx
from models import ModelInfo, get_model
from training import make_optimizer, train, warmup_cosine

# Names, and sides of images that they take.
MEMBERS = {
    "simple_cnn": 32, "resnet18": 32, "efficientnet_lite0": 32, "efficientnet_b0": 32,
    "efficientnet_v2_s": 32, "alexnet": 64, "convnext_tiny": 32, "densenet121": 32,
    "googlenet": 32, "inception_v3": 75, "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "regnet_y_400mf": 32, "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64, "vgg11": 32, "vit_b_32": 64,
    "wide_resnet50_2": 32,
}  # fmt: skip
NUM_STEPS, STOPPED_AFTER = 4, 2


class Stopped(Exception):
    """Ends a training run between two steps."""


def make_model(name, image_size, num_classes):
    name = name if name == "simple_cnn" else f"{name}_scratch"
    return get_model(name, num_classes, weights=None, image_size=image_size, seed=0)


def run(name, splits, folder, *, stop=None, resume=False):
    """Returns the model after `NUM_STEPS` steps, unless it is stopped before."""
    loaders = create_dataloaders(splits, 4, device="cpu")
    model = make_model(name, splits["train"].image_size, len(splits["train"].classes))
    optimizer = make_optimizer(model, 1e-3)
    if stop is not None:
        batches = loaders["train"].batches

        def some(start=0):
            for number, batch in enumerate(batches(start)):
                if number == stop:
                    raise Stopped
                yield batch

        loaders["train"].batches = some
    return train(
        model, loaders["train"], loaders["valid"], len(splits["train"].classes), NUM_STEPS,
        optimizer, warmup_cosine(optimizer, NUM_STEPS), "cpu", NUM_STEPS, folder,
        checkpoint_every=1, resume=resume,
    )[0]  # fmt: skip


def are_equal(one, two):
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def check(name, root, folder):
    splits, _ = DatasetBuilder(root, image_size=MEMBERS[name], cache_dir=folder / "cache").build()
    splits = {name: split for name, split in splits.items() if name != "test"}
    model = run(name, splits, folder / "whole")
    again = run(name, splits, folder / "again")
    try:
        run(name, splits, folder / "stopped", stop=STOPPED_AFTER)
    except Stopped:
        resumed = run(name, splits, folder / "stopped", resume=True)
    images = torch.rand(4, 3, MEMBERS[name], MEMBERS[name], generator=torch.Generator())
    model.to(memory_format=torch.contiguous_format)
    maps = gradcam(model, images, [0, 1, 0, 1])
    info = ModelInfo(config=model.config, classes=splits["train"].classes, image_size=MEMBERS[name])
    info.save(folder / "model.pth", model.state_dict())
    try:
        export_onnx(folder / "model.pth", folder / "model.onnx")
        exported = "same logits"
    except (ValueError, RuntimeError) as error:
        exported = " ".join(str(error).split())[:60]
    not_empty = int((np.ptp(maps, axis=(1, 2)) > 0).sum())
    return are_equal(model, again), are_equal(model, resumed), f"{not_empty} of 4", exported


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=[*MEMBERS])
    warnings.simplefilter("ignore")
    print(f"{'network':20} repeated  resumed  maps that are not empty  ONNX      seconds")
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(Path(folder) / "images")
        for name in parser.parse_args().names:
            start = time.perf_counter()
            parts = Path(folder) / name
            parts.mkdir()
            repeated, resumed, maps, exported = check(name, Path(folder) / "images", parts)
            seconds = time.perf_counter() - start
            print(
                f"{name:20} {'equal' if repeated else 'DIFFER':9} "
                f"{'equal' if resumed else 'DIFFER':8} {maps:24} {exported:11} {seconds:.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
