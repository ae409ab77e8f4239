"""What keeping freed memory (`learning.allocator`) does for speed and memory on the CPU.

    python benchmarks/allocator.py --data_dir ../shared/data/isic9

Each model trains, evaluates and predicts (`train`, `evaluate` with our loaders, `predict` on
files) in two processes, one without the setting and one with it, which run in turn while the other
waits. Prints the median images per second over the turns, the median and quartiles of the ratios,
and each process's peak of anonymous memory. EfficientNet-Lite0 needs timm and is left out without
it.
"""

import argparse
import contextlib
import importlib.util
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
WARM_UP = 2  # batches before the first turn


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


def run_in_turns(task: str, model: str, data_dir: str, cache_dir: str, seconds: float) -> None:
    from dataset import DatasetBuilder, create_dataloaders

    datasets, _ = DatasetBuilder(data_dir, cache_dir=cache_dir).build()
    loaders = create_dataloaders(datasets, device="cpu")
    measured = {"training": training, "evaluation": evaluation, "prediction": prediction}[task]
    with contextlib.suppress(Enough):
        measured(make_model(model), loaders, Path(data_dir), Turns(seconds))


class Turns:
    """Runs batches when told to (a line on standard input); prints the speed of each turn."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.images, self.batches, self.started = 0, -WARM_UP, time.perf_counter()

    def count(self, images: int) -> None:
        """To be called after each batch; waits for its turn, raises Enough after the last one."""
        self.batches += 1
        if self.batches > 0:
            self.images += images
            elapsed = time.perf_counter() - self.started
            if self.batches < 2 or elapsed < self.seconds:
                return
            print(self.images / elapsed, file=sys.__stdout__, flush=True)
        elif self.batches < 0:
            return
        if not sys.stdin.readline():
            raise Enough
        self.images, self.batches, self.started = 0, 0, time.perf_counter()


class Enough(Exception):
    """Raised to end a loop of the library's once it has run long enough."""


def training(model, loaders, data_dir: Path, turns: Turns) -> None:
    from training import make_optimizer, train

    optimizer = make_optimizer(model)
    optimizer.register_step_post_hook(lambda *arguments: turns.count(32))
    train(model, loaders["train"], loaders["valid"], NUM_CLASSES, 10_000, optimizer,
          eval_every=10_000)  # fmt: skip


def evaluation(model, loaders, data_dir: Path, turns: Turns) -> None:
    from training import evaluate

    def batches():
        while True:
            for images, labels in loaders["train"].__class__(
                loaders["train"].dataset, loaders["valid"].batch_size, device="cpu"
            ):
                yield images, labels
                turns.count(len(labels))

    evaluate(model, batches())


def prediction(model, loaders, data_dir: Path, turns: Turns) -> None:
    from predict import predict_batches
    from storage.tensors import save_tensors

    classes = [str(label) for label in range(NUM_CLASSES)]
    contents = {"config": model.config, "classes": classes, "image_size": 224,
                "state_dict": model.state_dict()}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save_tensors(Path(folder) / "model.pth", contents)
        while True:
            for table, _ in predict_batches(Path(folder) / "model.pth", data_dir, device="cpu"):
                turns.count(len(table))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seconds", type=float, default=4, help="of each turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cache_dir", help=argparse.SUPPRESS)
    parser.add_argument("--keep", choices=("no", "yes"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.keep:
        run_here(arguments)
        return
    if importlib.util.find_spec("timm") is None:
        arguments.models = [name for name in arguments.models if name != "efficientnet_lite0"]
    with tempfile.TemporaryDirectory() as cache_dir:
        for model in arguments.models:
            for task in arguments.tasks:
                compare(arguments, cache_dir, model, task)


def run_here(arguments: argparse.Namespace) -> None:
    from learning.allocator import keep_freed_memory

    if arguments.keep == "yes" and not keep_freed_memory():
        raise SystemExit("this machine's C library does not take the setting")
    peak = PeakMemory()
    (task,), (model,) = arguments.tasks, arguments.models
    with contextlib.redirect_stdout(sys.stderr):  # libraries print there too
        run_in_turns(task, model, arguments.data_dir, arguments.cache_dir, arguments.seconds)
    print(peak.bytes, file=sys.__stdout__)


def compare(arguments: argparse.Namespace, cache_dir: str, model: str, task: str) -> None:
    processes = {}
    for keep in ("no", "yes"):
        words = [sys.executable, __file__, "--keep", keep, "--data_dir", arguments.data_dir,
                 "--cache_dir", cache_dir, "--models", model, "--tasks", task,
                 "--seconds", str(arguments.seconds)]  # fmt: skip
        processes[keep] = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    speeds = {keep: [] for keep in processes}
    for _ in range(arguments.rounds):
        for keep, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            speeds[keep].append(float(process.stdout.readline()))
    peaks = {keep: int(process.communicate()[0]) for keep, process in processes.items()}
    ratios = [b / a for a, b in zip(speeds["no"], speeds["yes"], strict=True)]
    low, ratio, high = statistics.quantiles(ratios)
    print(
        f"{model}, {task}: {statistics.median(speeds['no']):.1f} images/s, with the setting "
        f"{statistics.median(speeds['yes']):.1f}, ratio {ratio:.3f} (quartiles {low:.3f}, "
        f"{high:.3f}); peak {peaks['no'] / 2**20:.0f} MiB, {peaks['yes'] / 2**20:.0f} MiB, "
        f"{peaks['yes'] / peaks['no'] - 1:+.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
