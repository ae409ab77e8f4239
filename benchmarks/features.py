"""How fast a head trains on cached features, and on images, in turn in one process.

    python benchmarks/features.py --data_dir ./data/raw --model resnet_head --layers 18

Cold: `cache_features` with an empty cache, then `train` with its evaluations; warm: the same,
with the features on disk. Live: `train` on the images, of which a few steps and one evaluation are
timed, half before and half after the others, and their time is multiplied to `num_steps` and as
many evaluations: that is an extrapolation. Building the model and preparing the images is in none
of them. Prints the seconds of each and the ratios.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from dataset import DatasetBuilder, LesionLoader, create_dataloaders
from learning.features import cache_features
from models import LesionClassifier, get_model
from training import evaluate, make_optimizer, train, warmup_cosine

Loaders = dict[str, LesionLoader]


def fit(model: LesionClassifier, loaders: Loaders, num_steps: int, eval_every: int) -> dict:
    """Trains as the command does, with files in a folder of its own; returns the history."""
    optimizer = make_optimizer(model)
    num_classes = len(loaders["train"].dataset.classes)
    scheduler = warmup_cosine(optimizer, num_steps)
    parts = (model, loaders["train"], loaders["valid"], num_classes, num_steps, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        _, history = train(*parts, scheduler, eval_every=eval_every, save_path=folder)
    return history


def seconds_of_cached(model: LesionClassifier, loaders: Loaders, arguments) -> tuple[float, float]:
    """Returns the seconds of computing or reading the features, and of training on them."""
    started = time.perf_counter()
    cached = cache_features(model, loaders)
    loaded = time.perf_counter()
    fit(model, cached, arguments.num_steps, arguments.eval_every)
    return loaded - started, time.perf_counter() - loaded


def seconds_of_live(model: LesionClassifier, loaders: Loaders, steps: int) -> tuple[float, float]:
    """Returns the seconds of one training step and of one evaluation."""
    fit(model, loaders, 2, 2)  # warms up
    history = fit(model, loaders, steps, steps)
    started = time.perf_counter()
    evaluate(model, loaders["valid"])
    seconds = time.perf_counter() - started
    return loaders["train"].batch_size / history["images_per_second"][-1], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path)
    parser.add_argument("--model", default="resnet_head")
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_steps", type=int, default=2000)
    parser.add_argument("--eval_every", type=int, default=100)
    parser.add_argument("--live_steps", type=int, default=60)
    arguments = parser.parse_args()
    size, weights = arguments.image_size, arguments.weights
    builder = DatasetBuilder(arguments.data_dir, cache_dir=arguments.cache_dir, image_size=size)
    splits, metadata = builder.build()
    loaders = create_dataloaders(splits, arguments.batch_size, balanced=True)

    def make_model() -> LesionClassifier:
        options = {"layers": arguments.layers, "weights": None if weights == "none" else weights}
        num_classes = len(metadata["class"].unique())
        model = get_model(arguments.model, num_classes, image_size=size, seed=0, **options)
        return model.to(loaders["train"].device)

    for path in splits["train"].array_path.parent.glob("features-*.npy"):
        path.unlink()
    turns = [seconds_of_live(make_model(), loaders, arguments.live_steps // 2)]
    cold = seconds_of_cached(make_model(), loaders, arguments)
    warm = seconds_of_cached(make_model(), loaders, arguments)
    turns.append(seconds_of_live(make_model(), loaders, arguments.live_steps // 2))
    step, evaluation = (sum(of) / len(turns) for of in zip(*turns, strict=True))
    num_evaluations = -(-arguments.num_steps // arguments.eval_every)
    live = arguments.num_steps * step + num_evaluations * evaluation
    device = loaders["train"].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads; {arguments.model}, "
        f"{arguments.num_steps:,} steps with batches of {arguments.batch_size} at {size} pixels, "
        f"{num_evaluations} evaluations of {len(splits['valid'])} images; "
        f"{len(splits['train']):,} training images"
    )
    spread = ", ".join(f"{1 / seconds:.2f}" for seconds, _ in turns)
    print(f"live: {spread} steps/s, evaluation {evaluation:.1f} s; extrapolated: {live:,.0f} s")
    for label, (loading, training) in {"cold": cold, "warm": warm}.items():
        total = loading + training
        print(
            f"{label}: features {loading:,.1f} s, training {training:.1f} s, together "
            f"{total:,.1f} s; live / {label} {live / total:.1f}"
        )


if __name__ == "__main__":
    main()
