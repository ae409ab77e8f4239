"""How fast prediction is: `predict` on image files, and the model on a batch in memory, in turn.

    python benchmarks/predict.py --data_dir ./data/raw --limit 400

`predict` is timed whole: it loads the model, decodes the files, and gives its table. The bare model
has one batch in memory, and the precision and layout that `predict` chooses. The weights are
random, which makes no difference to the time. Prints the median images per second of several rounds
and the median of ours / bare.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from throughput import Speeds, bare_inference, describe

from dataset import prepare_image, to_float
from models import MODELS, LesionClassifier, get_model
from predict import Ensemble, find_files, predict
from storage.tensors import save_tensors
from training import resolve_precision


def save(path: Path, model: LesionClassifier) -> None:
    """Writes the `model.pth` that `train` would write."""
    contents = {
        "config": model.config,
        "classes": [f"class {number}" for number in range(model.config["num_classes"])],
        "image_size": model.config["image_size"],
        "state_dict": model.state_dict(),
    }
    save_tensors(path, contents)


def our_prediction(
    model: Path, paths: Sequence[str], batch_size: int, num_workers: int | None
) -> Callable[[int], float]:
    def run(num_batches: int) -> float:
        chosen = paths[: num_batches * batch_size]
        started = time.perf_counter()
        table = predict(model, chosen, batch_size=batch_size, num_workers=num_workers)
        return len(table) / (time.perf_counter() - started)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=400, help="images, rounded down to batches")
    parser.add_argument("--model", choices=list(MODELS), default="resnet_finetuned")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = find_files(arguments.data_dir)
    # Those of one class may be larger than those of another.
    np.random.default_rng(0).shuffle(paths)
    num_batches = min(arguments.limit, len(paths)) // arguments.batch_size
    batch = np.stack(
        [prepare_image(p, arguments.image_size) for p in paths[: arguments.batch_size]]
    )
    model = get_model(
        arguments.model,
        num_classes=9,
        layers=arguments.layers,
        weights=None,
        image_size=arguments.image_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        save(path, model)
        variants = {
            "ours": our_prediction(path, paths, arguments.batch_size, arguments.num_workers),
            "bare": bare_inference(model, to_float(torch.from_numpy(batch)), device),
        }
        speeds: Speeds = []
        for run in variants.values():
            run(2)  # warms up
        for _ in range(arguments.rounds):
            speeds.append({variant: run(num_batches) for variant, run in variants.items()})
        started = time.perf_counter()
        Ensemble(path)
        loading = time.perf_counter() - started
    name_of_device = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"torch {torch.__version__}, {name_of_device}, {torch.get_num_threads()} threads, "
        f"{resolve_precision('auto', device)}, {num_batches} batches of {arguments.batch_size}"
    )
    print(f"{describe(speeds)}, with {loading:.2f} s of loading the model")


if __name__ == "__main__":
    main()
