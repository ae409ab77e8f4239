"""Kills runs at random moments, resumes them, and compares the end with that of an unbroken run.

    python benchmarks/crash.py --times 50 --signal KILL
    python benchmarks/crash.py --times 10 --signal KILL --processes 2

Draws a small set, then builds the array and trains on it once, unbroken; then as often as asked
for, from nothing: the same run gets the signal at a moment drawn evenly from the duration of the
unbroken one, every second one again after it was resumed, and is resumed until it ends. The
weights in `model.pth`, `history.csv` (but for the speed) and `predictions.csv` must be the same
to the last bit, and no temporary file may be left. One process is forked with everything imported,
so that it is work that is interrupted, not imports; several run under torchrun, and the signal goes
to one of them or to the launcher. Ends with status 1 if any run ended otherwise.
"""

import argparse
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_models
from experiment.results import environment
from imaging.synthetic import make_dataset
from storage.files import read_csv


class Trial:
    """One run in a folder of its own, which may take several sessions."""

    def __init__(self, data: Path, folder: Path, processes: int, num_steps: int) -> None:
        self.save_dir = folder / "out"
        self.model = self.save_dir / "simple_cnn"
        self.log = folder / "log"
        self.processes = processes
        folder.mkdir()
        self.arguments = [
            "--data_dir", data, "--save_dir", self.save_dir, "--cache_dir", folder / "cache",
            "--models", "simple_cnn", "--image_size", 32, "--device", "cpu", "--batch_size", 8,
            "--accumulate", 2, "--num_steps", num_steps, "--eval_every", max(num_steps // 8, 1),
            "--early_stopping_patience", 4, "--checkpoint_every", 4,
        ]  # fmt: skip

    def start(self, resume: bool) -> "multiprocessing.Process | subprocess.Popen":
        words = [*map(str, self.arguments), *(["--resume"] if resume else [])]
        if self.processes == 1:
            context = multiprocessing.get_context("fork")
            process = context.Process(target=_train, args=(words, self.log))
            process.start()
            return process
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={self.processes}", train_models.__file__]
        with self.log.open("w") as log:
            return subprocess.Popen([*launcher, *words], stdout=log, stderr=log)

    def is_refused(self) -> bool:
        """Whether workers whose launcher was killed are still at it."""
        return " is in use by " in self.log.read_text(errors="replace")

    def stage(self) -> str:
        """How far the run has come, by what it has left."""
        ends = {
            "building": self.save_dir / "config.json",
            "training": self.model / "learning_curves.png",
            "results": self.model / "metrics.json",
            "data figures": self.save_dir / "augmentations.png",
            "comparison, report": self.save_dir / "report.html",
        }
        return next((name for name, end in ends.items() if not end.exists()), "finished")

    def step(self) -> int:
        path = self.model / "last.pth"
        return torch.load(path, weights_only=True)["progress"]["step"] if path.exists() else 0


def _train(words: Sequence[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.exit(train_models.main(words))


def wait(
    process: "multiprocessing.Process | subprocess.Popen", seconds: float | None
) -> int | None:
    """The exit status, or None when it is still running after so long."""
    if isinstance(process, subprocess.Popen):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
    process.join(seconds)
    return process.exitcode


def interrupt(
    process: "multiprocessing.Process | subprocess.Popen", signum: int, rng: random.Random
) -> None:
    """Sends the signal to the process, or to one of a launcher and its workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    targets = [process.pid]
    if isinstance(process, subprocess.Popen) and children.exists():
        targets += map(int, children.read_text().split())
    os.kill(rng.choice(targets), signum)


def run_broken(
    trial: Trial, duration: float, signum: int, rng: random.Random, breaks: int
) -> list[str]:
    """Runs until the end, and gives the stages in which it was interrupted."""
    stages = []
    for session in range(1000):
        process = trial.start(resume=session > 0)
        if session < breaks and wait(process, rng.uniform(0, duration)) is None:
            stages.append(trial.stage())
            interrupt(process, signum, rng)
        status = wait(process, None)
        expected = {-signum, 0, 128 + signum} if trial.processes == 1 else set(range(-64, 256))
        if session < breaks and status in expected:
            continue
        if status == 0:
            return stages
        if not trial.is_refused():
            raise RuntimeError(f"status {status} in {trial.stage()}: {trial.log.read_text()}")
        time.sleep(1)
    raise RuntimeError(f"{trial.save_dir} stays in use")


def differences(trial: Trial, whole: Trial) -> list[str]:
    """What of the results is not the same to the last bit."""
    found = []
    states = [
        torch.load(t.model / "model.pth", weights_only=True)["state_dict"] for t in (trial, whole)
    ]
    same_names = states[0].keys() == states[1].keys()
    if not same_names or not all(torch.equal(states[0][n], states[1][n]) for n in states[0]):
        found.append("model.pth")
    histories = [
        read_csv(t.model / "history.csv").drop(columns="images_per_second") for t in (trial, whole)
    ]
    if not histories[0].equals(histories[1]):
        found.append("history.csv")
    tables = [(t.model / "predictions.csv").read_bytes() for t in (trial, whole)]
    if tables[0] != tables[1]:
        found.append("predictions.csv")
    found += [str(path) for path in trial.save_dir.parent.rglob("*.tmp*")]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--num_steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signum = signal.Signals[f"SIG{arguments.signal}"]
    rng = random.Random(arguments.seed)
    torch.set_num_threads(1)  # what a fork of several would be left without
    with tempfile.TemporaryDirectory() as folder:
        data = make_dataset(Path(folder) / "data", num_images=120, size=64)
        how = (arguments.processes, arguments.num_steps)
        whole = Trial(data, Path(folder) / "whole", *how)
        started = time.monotonic()
        if wait(whole.start(resume=False), None) != 0:
            raise RuntimeError(whole.log.read_text())
        duration = time.monotonic() - started
        print(f"unbroken: {duration:.1f} s, {whole.step()} steps", flush=True)

        stages, wrong = Counter(), 0
        for number in range(arguments.times):
            trial = Trial(data, Path(folder) / str(number), *how)
            broken = run_broken(trial, duration, signum, rng, breaks=1 + number % 2)
            found = differences(trial, whole)
            stages.update(broken)
            wrong += bool(found)
            print(f"{number + 1}: interrupted in {broken}, differs in {found}", flush=True)
    print(", ".join(f"{name} {count}" for name, count in stages.items()))
    print(f"identical: {arguments.times - wrong} of {arguments.times}")
    print(environment())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
