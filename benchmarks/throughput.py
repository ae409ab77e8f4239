"""How fast training is: the loop that people write, ours, and a bare step, in turn in one process.

    python benchmarks/throughput.py --data_dir ./data/raw

The plain loop reads an ImageFolder with two workers and torchvision's transforms, in float32. Ours
is `create_dataloaders` and `train` as they come. The bare step has one batch in memory, and the
precision and layout that `train` chooses; a frozen backbone runs under no_grad there as well. All
do the same five augmentations but the last, which does none. Evaluation is `evaluate` on the
validation split against the model alone on one batch in memory. They take turns of a few steps,
with one run of `train` or `evaluate` throughout. Prints the median images per second of several
rounds, and the medians of ours / plain and ours / bare.
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
from learning.hardware import autocast, memory_format_for
from models import MODELS, get_model
from training import (
    evaluate,
    make_optimizer,
    resolve_precision,
    train,
    warmup_cosine,
)

NUM_WORKERS = 2
READ_AHEAD = 2 * NUM_WORKERS  # batches that a DataLoader has in hand
Runs = dict[str, Callable[[int], float]]  # does so many batches, gives images per second
Speeds = list[dict[str, float]]  # of each variant, a round an entry

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
        num_images = 0
        for number in range(READ_AHEAD + num_steps):
            if number == READ_AHEAD:  # what was read between the turns is used up
                started, num_images = time.perf_counter(), 0
            images, labels = next(batches)
            optimizer.zero_grad()
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            loss.item()  # as everybody's loop does, to show it
            num_images += len(images)
        speed = num_images / (time.perf_counter() - started)
        time.sleep(2)  # the workers go on reading, which is not to slow the next
        return speed

    return run


def bare_steps(
    model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device
) -> Callable[[int], float]:
    dtype = resolve_precision("auto", device)
    layout = memory_format_for(device, dtype)
    model.to(device, memory_format=layout).train()
    optimizer = make_optimizer(model)
    images, labels = batch[0].to(device, memory_format=layout), batch[1].to(device)

    def run(num_steps: int) -> float:
        _wait_for(device)
        started = time.perf_counter()
        for _ in range(num_steps):
            with autocast(device, dtype):
                logits = model(images)
            cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        _wait_for(device)
        return num_steps * len(images) / (time.perf_counter() - started)

    return run


def train_in_turn(
    model: nn.Module,
    loaders: dict,
    device: torch.device,
    others: Runs,
    num_steps: int,
    rounds: int,
) -> Speeds:
    """One run of `train`, which gives way to the others after every `num_steps` of its steps."""
    speeds: Speeds = []
    batches = in_turn(loaders["train"].batches(), device, others, num_steps, rounds, speeds)
    optimizer = make_optimizer(model)
    num_steps = num_steps * (rounds + 1) + 1
    train(
        model,
        batches,
        [next(iter(loaders["valid"]))],
        num_classes=len(loaders["train"].dataset.classes),
        num_steps=num_steps,
        optimizer=optimizer,
        scheduler=warmup_cosine(optimizer, num_steps),
        device=device,
        eval_every=num_steps,
    )
    return speeds


def bare_inference(
    model: nn.Module, images: Tensor, device: torch.device
) -> Callable[[int], float]:
    dtype = resolve_precision("auto", device)
    layout = memory_format_for(device, dtype)
    model.to(device, memory_format=layout).eval()
    images = images.to(device, memory_format=layout)

    def run(num_batches: int) -> float:
        _wait_for(device)
        started = time.perf_counter()
        with torch.inference_mode(), autocast(device, dtype):
            for _ in range(num_batches):
                model(images)
        _wait_for(device)
        return num_batches * len(images) / (time.perf_counter() - started)

    return run


def evaluate_in_turn(
    model: nn.Module,
    loader: LesionLoader,
    device: torch.device,
    others: Runs,
    num_batches: int,
    rounds: int,
) -> Speeds:
    """The same with one run of `evaluate`."""
    full = (
        batch for _ in itertools.count() for batch in loader if len(batch[1]) == loader.batch_size
    )
    speeds: Speeds = []
    evaluate(model, in_turn(full, device, others, num_batches, rounds, speeds), device=device)
    return speeds


def in_turn(
    stream: Iterator[tuple[Tensor, Tensor]],
    device: torch.device,
    others: Runs,
    count: int,
    rounds: int,
    speeds: Speeds,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for whoever is measured; notes, a round at a time, how fast all are by turns.

    Machines are faster at one time than at another. Short turns see to it that all variants have
    their share of both, so that their ratios in a round are steadier than the speeds. The first
    round is not noted: it warms up.
    """
    for number in range(rounds + 1):
        found = {variant: run(count) for variant, run in others.items()}
        _wait_for(device)
        started, num_images = time.perf_counter(), 0
        for images, labels in itertools.islice(stream, count):
            num_images += len(labels)
            yield images, labels
        _wait_for(device)
        if number > 0:
            speeds.append(found | {"ours": num_images / (time.perf_counter() - started)})
    yield next(stream)  # or the last round would not come to its end


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def describe(speeds: Speeds) -> str:
    """The medians, and those of the ratios of each round."""
    variants = ["plain", "ours", "bare"] if "plain" in speeds[0] else ["ours", "bare"]
    medians = (f"{v} {statistics.median(speed[v] for speed in speeds):.1f}" for v in variants)
    ratios = (
        f"ours / {v} {statistics.median(speed['ours'] / speed[v] for speed in speeds):.2f}"
        for v in variants
        if v != "ours"
    )
    return f"images/s: {', '.join(medians)}; {', '.join(ratios)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--cache_dir", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4, help="a turn")
    parser.add_argument("--rounds", type=int, default=8)
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
        num_workers=NUM_WORKERS,
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

        others = {
            "plain": plain_steps(make_model(), endless(plain_loader), device),
            "bare": bare_steps(make_model(), next(loaders["train"].batches()), device),
        }
        steps, rounds = arguments.steps, arguments.rounds
        speeds = train_in_turn(make_model(), loaders, device, others, steps, rounds)
        print(f"{name}, training, {describe(speeds)}", flush=True)
        images, _ = next(iter(loaders["valid"]))
        others = {"bare": bare_inference(make_model(), images, device)}
        speeds = evaluate_in_turn(make_model(), loaders["valid"], device, others, steps, rounds)
        print(f"{name}, evaluation, {describe(speeds)}", flush=True)


if __name__ == "__main__":
    main()
