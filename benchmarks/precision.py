"""Whether bf16 costs accuracy: the same runs in fp32 and bf16, over several seeds.

    python benchmarks/precision.py --data_dir ./data/raw --models simple_cnn --num_steps 600

Runs `train_models.py` for each precision and seed (which decides weights, order and splits), and
prints the figures on the test split, their means, and the differences between the precisions of one
seed beside the spread between the seeds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

FIGURES = ["loss", "precision", "recall", "balanced_accuracy"]


def test_figures(words: list[str], model: str) -> dict[str, float]:
    """Trains, and gives the figures on the test split."""
    script = Path(__file__).parents[1] / "train_models.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, *words, "--models", model, "--save_dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        metrics = json.loads((Path(folder) / model / "metrics.json").read_text(encoding="utf-8"))
    return {name: metrics["test"][name] for name in FIGURES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["simple_cnn", "resnet_scratch"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    arguments, others = parser.parse_known_args()  # the others are for train_models.py
    for model in arguments.models:
        rows = []
        for seed in arguments.seeds:
            for precision in arguments.precisions:
                words = [*others, "--seed", str(seed), "--precision", precision]
                rows.append({"seed": seed, "dtype": precision} | test_figures(words, model))
                print(model, rows[-1], flush=True)
        table = pd.DataFrame(rows).pivot(index="seed", columns="dtype", values=FIGURES)
        summary = pd.concat([table, table.agg(["mean", "std"])])
        print(f"{model}\n{summary.round(3).to_string()}", flush=True)


if __name__ == "__main__":
    main()
