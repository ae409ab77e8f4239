"""What keeping freed memory (`hardware.keep_freed_memory`) does for speed and memory on the CPU.

    python benchmarks/allocator.py --data_dir ../shared/data/isic9

Each model trains, evaluates and predicts (`train`, `evaluate` with our loaders, `predict` on
files) in processes of its own, without the setting and with it in turn. Prints the median images
per second over the rounds, the median of the ratios of each round, and the largest peak of
anonymous memory. EfficientNet-Lite0
needs timm and is left out without it.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
MODELS = {
    "simple_cnn": {"name": "simple_cnn"},
    "resnet18": {"name": "resnet_scratch", "layers": 18},
    "resnet50": {"name": "resnet_scratch", "layers": 50},
    "efficientnet_lite0": {"name": "efficientnet_lite0"},
}
TASKS = ("training", "evaluation", "prediction")
NUM_CLASSES = 9


class PeakMemory:
    """The peak of this process's anonymous memory (RssAnon) in bytes, sampled by a thread."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            self.bytes = max(self.bytes, int(status.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(0.01)


def make_model(model: str):
    from models import MODELS as CLASSES
    from models import LesionClassifier, get_model

    class EfficientNetLite0(LesionClassifier):
        def __init__(self, num_classes: int, layers: int, dropout_rate: float) -> None:
            import timm

            backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
            super().__init__(backbone, backbone.num_features, num_classes, dropout_rate)

    CLASSES["efficientnet_lite0"] = EfficientNetLite0
    return get_model(num_classes=NUM_CLASSES, weights=None, seed=0, **MODELS[model])


def measure(task: str, model: str, data_dir: str, cache_dir: str, seconds: float) -> float:
    """Images per second of one task, after a warm-up."""
    from dataset import DatasetBuilder, create_dataloaders

    datasets, _ = DatasetBuilder(data_dir, cache_dir=cache_dir).build()
    loaders = create_dataloaders(datasets, device="cpu")
    measured = {"training": training, "evaluation": evaluation, "prediction": prediction}[task]
    return measured(make_model(model), loaders, Path(data_dir), seconds)


class Timer:
    """Counts images from the moment the warm-up is over until enough time has passed."""

    def __init__(self, seconds: float, warm_up: int = 2) -> None:
        self.seconds, self.warm_up = seconds, warm_up
        self.started, self.images, self.calls = 0.0, 0, 0

    def is_done(self, images: int) -> bool:
        self.calls += 1
        if self.calls <= self.warm_up:
            self.started = time.perf_counter()
            return False
        self.images += images
        # At least three batches, so that the slowest model is not measured by one alone.
        return self.calls > self.warm_up + 2 and self.elapsed() > self.seconds

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def speed(self) -> float:
        return self.images / self.elapsed()


class Enough(Exception):
    """Raised to end a loop of the library's once it has run long enough."""


def training(model, loaders, data_dir: Path, seconds: float) -> float:
    from training import make_optimizer, train

    timer, optimizer = Timer(seconds), make_optimizer(model)

    def count(*arguments: object) -> None:
        if timer.is_done(32):
            raise Enough

    optimizer.register_step_post_hook(count)
    try:
        train(model, loaders["train"], loaders["valid"], NUM_CLASSES, 10_000, optimizer,
              eval_every=10_000)  # fmt: skip
    except Enough:
        return timer.speed()
    raise AssertionError("the training ended before it was measured")


def evaluation(model, loaders, data_dir: Path, seconds: float) -> float:
    from training import evaluate

    timer = Timer(seconds)

    def batches():
        while True:
            for images, labels in loaders["train"].__class__(
                loaders["train"].dataset, loaders["valid"].batch_size, device="cpu"
            ):
                yield images, labels
                if timer.is_done(len(labels)):
                    return

    evaluate(model, batches())
    return timer.speed()


def prediction(model, loaders, data_dir: Path, seconds: float) -> float:
    from predict import predict_batches
    from storage.tensors import save_tensors

    classes = [str(label) for label in range(NUM_CLASSES)]
    contents = {"config": model.config, "classes": classes, "image_size": 224,
                "state_dict": model.state_dict()}  # fmt: skip
    timer = Timer(seconds)
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "model.pth", contents)
        for table, _ in predict_batches(Path(folder) / "model.pth", data_dir, device="cpu"):
            if timer.is_done(len(table)):
                break
    return timer.speed()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=10, help="measured in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache_dir", help=argparse.SUPPRESS)
    parser.add_argument("--keep", choices=("no", "yes"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.keep:
        measure_here(arguments)
        return
    if importlib.util.find_spec("timm") is None:
        arguments.models = [name for name in arguments.models if name != "efficientnet_lite0"]
    with tempfile.TemporaryDirectory() as cache_dir:
        for model in arguments.models:
            for task in arguments.tasks:
                compare(arguments, cache_dir, model, task)


def measure_here(arguments: argparse.Namespace) -> None:
    from hardware import keep_freed_memory

    if arguments.keep == "yes" and not keep_freed_memory():
        raise SystemExit("this machine's C library does not take the setting")
    peak = PeakMemory()
    (task,), (model,) = arguments.tasks, arguments.models
    speed = measure(task, model, arguments.data_dir, arguments.cache_dir, arguments.seconds)
    print(json.dumps({"speed": speed, "peak": peak.bytes}))


def compare(arguments: argparse.Namespace, cache_dir: str, model: str, task: str) -> None:
    found = {"no": [], "yes": []}
    for _ in range(arguments.rounds):
        for keep in found:
            words = [sys.executable, __file__, "--keep", keep, "--data_dir", arguments.data_dir,
                     "--cache_dir", cache_dir, "--models", model, "--tasks", task,
                     "--seconds", str(arguments.seconds)]  # fmt: skip
            output = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[keep].append(json.loads(output.splitlines()[-1]))
    speeds = {keep: [one["speed"] for one in several] for keep, several in found.items()}
    peaks = {keep: max(one["peak"] for one in several) for keep, several in found.items()}
    ratio = statistics.median(b / a for a, b in zip(speeds["no"], speeds["yes"], strict=True))
    print(
        f"{model}, {task}: {statistics.median(speeds['no']):.1f} images/s, with the setting "
        f"{statistics.median(speeds['yes']):.1f}, ratio {ratio:.3f}; peak "
        f"{peaks['no'] / 2**20:.0f} MiB, {peaks['yes'] / 2**20:.0f} MiB, "
        f"{peaks['yes'] / peaks['no'] - 1:+.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
