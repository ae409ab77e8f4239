"""How fast training is: the loop that people write, ours, and a bare step, in turn in one process.

    python benchmarks/throughput.py --data_dir ./data/raw

The plain loop reads an ImageFolder with two workers and torchvision's transforms, in float32. Ours
is `create_dataloaders` and `train` as they come. The bare step has one batch in memory, and the
precision and layout that `train` chooses; a frozen backbone runs under no_grad there as well. All
do the same five augmentations but the last, which does none. Evaluation is `evaluate` on the
validation split against the model alone on one batch in memory. Prints the median images per second
of several rounds, ours / plain, and ours / bare.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))
from loader import TRANSFORMS, endless

from dataset import DatasetBuilder, LesionLoader, create_dataloaders
from models import MODELS, get_model
from training import (
    _autocast,
    _memory_format,
    evaluate,
    make_optimizer,
    resolve_precision,
    train,
    warmup_cosine,
)

PLAIN_TRANSFORMS = v2.Compose(
    [
        v2.ToImage(),
        v2.Resize(256),
        v2.CenterCrop(224),
        TRANSFORMS,
    ]
)


def plain_steps(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> Callable[[int], float]:
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def run(num_steps: int) -> float:
        started, num_images = time.perf_counter(), 0
        for _ in range(num_steps):
            images, labels = next(batches)
            optimizer.zero_grad()
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            loss.item()  # as everybody's loop does, to show it
            num_images += len(images)
        return num_images / (time.perf_counter() - started)

    return run


def bare_steps(
    model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device
) -> Callable[[int], float]:
    dtype = resolve_precision("auto", device)
    layout = _memory_format(device, dtype)
    model.to(device, memory_format=layout).train()
    optimizer = make_optimizer(model)
    images, labels = batch[0].to(device, memory_format=layout), batch[1].to(device)

    def run(num_steps: int) -> float:
        _wait_for(device)
        started = time.perf_counter()
        for _ in range(num_steps):
            with _autocast(device, dtype):
                logits = model(images)
            cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        _wait_for(device)
        return num_steps * len(images) / (time.perf_counter() - started)

    return run


def our_steps(
    make_model: Callable[[], nn.Module], loaders: dict, device: torch.device
) -> Callable[[int], float]:
    few = [next(iter(loaders["valid"]))]

    def run(num_steps: int) -> float:
        model = make_model()
        optimizer = make_optimizer(model)
        _, history = train(
            model,
            loaders["train"],
            few,
            num_classes=len(loaders["train"].dataset.classes),
            num_steps=2 * num_steps,
            optimizer=optimizer,
            scheduler=warmup_cosine(optimizer, 2 * num_steps),
            device=device,
            eval_every=num_steps,
        )
        return history["images_per_second"][-1]  # the first half warms up

    return run


def bare_inference(
    model: nn.Module, images: Tensor, device: torch.device
) -> Callable[[int], float]:
    dtype = resolve_precision("auto", device)
    layout = _memory_format(device, dtype)
    model.to(device, memory_format=layout).eval()
    images = images.to(device, memory_format=layout)

    def run(num_batches: int) -> float:
        _wait_for(device)
        started = time.perf_counter()
        with torch.inference_mode(), _autocast(device, dtype):
            for _ in range(num_batches):
                model(images)
        _wait_for(device)
        return num_batches * len(images) / (time.perf_counter() - started)

    return run


def our_evaluation(
    model: nn.Module, loader: LesionLoader, device: torch.device
) -> Callable[[int], float]:
    def run(num_batches: int) -> float:
        started = time.perf_counter()
        found = evaluate(model, itertools.islice(loader, num_batches), device=device)
        return len(found.labels) / (time.perf_counter() - started)

    return run


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turn(
    variants: dict[str, Callable[[int], float]], count: int, rounds: int
) -> Iterator[float]:
    """The median speed of each, after a short warm-up."""
    speeds = {variant: [] for variant in variants}
    for run in variants.values():
        run(2)
    for _ in range(rounds):
        for variant, run in variants.items():
            speeds[variant].append(run(count))
    return (statistics.median(values) for values in speeds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    builder = DatasetBuilder(arguments.data_dir, cache_dir=arguments.cache_dir)
    splits, _ = builder.build()
    loaders = create_dataloaders(splits, arguments.batch_size, device=device)
    folder = arguments.data_dir / "Train"
    plain_set = datasets.ImageFolder(
        folder if folder.is_dir() else arguments.data_dir, PLAIN_TRANSFORMS
    )
    plain_loader = DataLoader(
        plain_set,
        arguments.batch_size,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        drop_last=True,
    )
    name_of_device = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"torch {torch.__version__}, {name_of_device}, {torch.get_num_threads()} threads, ", end=""
    )
    print(f"{resolve_precision('auto', device)}, batches of {arguments.batch_size}")
    for name in arguments.models:

        def make_model(name: str = name) -> nn.Module:
            classes = len(splits["train"].classes)
            return get_model(name, classes, layers=arguments.layers, weights=None, seed=0)

        variants = {
            "plain": plain_steps(make_model(), endless(plain_loader), device),
            "ours": our_steps(make_model, loaders, device),
            "bare": bare_steps(make_model(), next(loaders["train"].batches()), device),
        }
        plain, ours, bare = in_turn(variants, arguments.steps, arguments.rounds)
        print(
            f"{name}: plain {plain:.1f} images/s, ours {ours:.1f}, bare {bare:.1f}; ours / plain "
            f"{ours / plain:.2f}, ours / bare {ours / bare:.2f}",
            flush=True,
        )
        images, _ = next(iter(loaders["valid"]))
        variants = {
            "ours": our_evaluation(make_model(), loaders["valid"], device),
            "bare": bare_inference(make_model(), images, device),
        }
        batches = min(arguments.steps, len(loaders["valid"]))
        ours, bare = in_turn(variants, batches, arguments.rounds)
        print(
            f"{name}, evaluation: ours {ours:.1f} images/s, bare {bare:.1f}; ours / bare "
            f"{ours / bare:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
