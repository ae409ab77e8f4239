"""How fast a training step is without any loading, by layout of the tensors and precision.

    python benchmarks/step.py

Prints images per second of forward, backward and AdamW on one batch in memory, the variants in
turn, best of three rounds.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import get_model
from training import make_optimizer

BATCH_SIZE, NUM_CLASSES = 32, 9
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def make_step(name: str, size: int, layout: torch.memory_format, dtype: torch.dtype):
    model = get_model(name, NUM_CLASSES, layers=18, weights=None, image_size=size, seed=0)
    model.to(memory_format=layout).train()
    optimizer = make_optimizer(model)
    images = torch.rand(BATCH_SIZE, 3, size, size).to(memory_format=layout)
    labels = torch.randint(0, NUM_CLASSES, (BATCH_SIZE,))

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            logits = model(images)
        cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--precisions", nargs="+", default=["float32"], metavar="DTYPE")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in ("resnet_scratch", "simple_cnn"):
        variants = {
            f"{precision}, {layout}": make_step(
                name, arguments.image_size, LAYOUTS[layout], getattr(torch, precision)
            )
            for precision in arguments.precisions
            for layout in LAYOUTS
        }
        best = dict.fromkeys(variants, 0.0)
        for round_number in range(arguments.rounds + 1):
            for variant, step in variants.items():
                started = time.perf_counter()
                step()
                step()
                speed = 2 * BATCH_SIZE / (time.perf_counter() - started)
                if round_number > 0:  # the first warms up
                    best[variant] = max(best[variant], speed)
        for variant, speed in best.items():
            print(f"{name} at {arguments.image_size}, {variant}: {speed:.1f} images/s")


if __name__ == "__main__":
    main()
