"""What stands in the folder of a run: which command left it, and what a new run may replace."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

TRAINING, EVALUATION, AUDIT = "training", "evaluation", "audit"

# What the commands write into the folder of a run and into that of a model. Nothing else is ever
# removed. `metrics.json` comes first: without it a model no longer counts as finished.
RUN_FIGURES = (
    "report.html", "comparison.csv", "comparison.png", "class_distribution.png", "samples.png",
    "augmentations.png",
)  # fmt: skip
RUN_FILES = ("config.json", "audit.csv", "audit.png", "splits.csv", *RUN_FIGURES)
MODEL_FILES = (
    "metrics.json", "last.pth", "model.pth", "history.csv", "predictions.csv",
    "learning_curves.png", "confusion_matrix.png", "class_metrics.png", "roc_pr_curves.png",
    "reliability.png", "mistakes.png", "gradcam.png",
)  # fmt: skip

# Keys of a model's record in config.json that only the images can tell; the others are settings.
DATA, METADATA = "images and splits", "columns of metadata_csv"


def read_config(save_dir: str | Path) -> dict[str, Any]:
    """Returns the contents of `config.json` in a folder; an empty dict where there is none.

    Raises ValueError when the file was not written by this program.
    """
    path = Path(save_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and isinstance(config["settings"], dict):
            return config
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError):
        pass
    raise ValueError(f"{path} was not written by this program; choose another folder")


def kind_of_run(config: dict[str, Any]) -> str | None:
    """Returns TRAINING, EVALUATION or AUDIT for what `read_config` gives; None for an empty dict.

    Files written before `kind` was recorded are told apart by what they hold.
    """
    if not config:
        return None
    return config.get("kind") or (TRAINING if "runs" in config else EVALUATION)


def write_config(
    save_dir: str | Path,
    told: Mapping[str, Any],
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    more: Mapping[str, Any],
) -> None:
    """Writes `config.json`: what was told of the run, its settings, which are not the defaults."""
    from storage.files import write_text

    changed = [name for name, value in settings.items() if value != defaults[name]]
    config = {**told, "settings": dict(settings), "not_default": changed, **more}
    write_text(Path(save_dir) / "config.json", json.dumps(config, indent=2) + "\n")


def digest_images(images: "pd.DataFrame") -> str:
    """Returns what tells these images and their classes from others, 16 hex digits."""
    return _digest(images[["path", "class", "content_hash"]])


def describe_data(metadata: "pd.DataFrame") -> dict[str, str | None]:
    """Returns the part of a model's record that the metadata of its data set tell."""
    from dataset import METADATA_COLUMNS

    given = metadata.drop(columns=list(METADATA_COLUMNS), errors="ignore")
    return {
        DATA: _digest(metadata[["path", "class", "content_hash", "split"]]),
        METADATA: _digest(given) if len(given.columns) else None,
    }


def _digest(table: "pd.DataFrame") -> str:
    text = table.to_csv(index=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class TrainingFolder:
    """The folder of a training run, and what is known of the models in it.

    A model's record is a dict of all that its results depend on: settings, and under `DATA` and
    `METADATA` digests of what it was trained and tested on. A run is described by such a dict; as
    long as its images have not been looked at, without these two.
    """

    save_dir: Path
    config: dict[str, Any]

    @classmethod
    def read(cls, save_dir: str | Path) -> "TrainingFolder":
        """Returns what stands in the folder, which need not exist.

        Raises ValueError when it holds an evaluation, or a `config.json` of another program.
        """
        config = read_config(save_dir)
        if kind_of_run(config) == EVALUATION:
            raise ValueError(
                f"{save_dir} holds an evaluation (predict.py --evaluate), which no other command "
                "replaces; choose another --save_dir"
            )
        return cls(Path(save_dir), config)

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """The record of each model that a run trained here, whether or not it was finished."""
        runs = self.config.get("runs")
        return {
            name: record
            for name, record in (runs.items() if isinstance(runs, dict) else ())
            if isinstance(record, dict) and Path(name).name == name and name not in ("", "..")
        }

    def is_finished(self, model: str) -> bool:
        return (self.save_dir / model / "metrics.json").exists()

    def can_be_resumed(self, model: str) -> bool:
        return not self.is_finished(model) and (self.save_dir / model / "last.pth").exists()

    def is_done(self, model: str, run: dict[str, Any]) -> bool:
        """Returns whether the model is finished, with the settings and data of this run."""
        return self.is_finished(model) and not self._differences(model, run)

    def not_done(self, models: Sequence[str], run: dict[str, Any], overwrite: bool) -> list[str]:
        """Returns those of the models that this run has to train, all of them to `overwrite`."""
        return [model for model in models if overwrite or not self.is_done(model, run)]

    def others(self, models: Sequence[str]) -> list[str]:
        """Returns the other models of which a run left something here."""
        return [
            name
            for name in self.records
            if name not in models and self._has_any(name, ("metrics.json", "last.pth", "model.pth"))
        ]

    def check(
        self, models: Sequence[str], run: dict[str, Any], *, resume: bool, may_replace: bool
    ) -> None:
        """Raises ValueError when training these models would lose what stands here.

        With `resume`, also when what stands here is no beginning of this run.
        """
        if resume:
            self._check_resumed(models, run)
        elif not may_replace:
            self._check_not_lost(models, run)
        of_other_data = self._of_other_data(models, run)
        if of_other_data and not may_replace:
            raise ValueError(
                f"{self.save_dir} holds models of other images or splits, which cannot be compared "
                f"with this run: {'; '.join(map(self._describe, of_other_data))}; choose another "
                "--save_dir, or remove them with --overwrite"
            )

    def check_audit(self, images: str) -> None:
        """Raises ValueError when a run stands here on others than these images.

        `images` is what `digest_images` gives for them.
        """
        if kind_of_run(self.config) == TRAINING and self.config.get("images") != images:
            raise ValueError(
                f"{self.save_dir} holds a training run on other images; choose another --save_dir "
                "for the audit"
            )

    def make_room(self, models: Sequence[str], run: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Removes models of other data, all that is to start afresh, and the figures of the run.

        `models` are those to start afresh. Returns the records of the models that are kept.
        """
        of_other_data = self._of_other_data(models, run)
        removed = [*models, *of_other_data]
        for model in removed:
            _remove_files(self.save_dir / model, MODEL_FILES)
        for model in of_other_data:
            if not any((self.save_dir / model).iterdir()):
                (self.save_dir / model).rmdir()
        _remove_files(self.save_dir, RUN_FIGURES)
        return {name: record for name, record in self.records.items() if name not in removed}

    def _check_resumed(self, models: Sequence[str], run: dict[str, Any]) -> None:
        for model in models:
            differing = self._differences(model, run)
            if differing and self._has_any(model, ("metrics.json", "last.pth", "model.pth")):
                raise ValueError(
                    f"--resume: {self.save_dir / model} is of another run: {'; '.join(differing)}; "
                    "start afresh with --overwrite instead of --resume, or choose another "
                    "--save_dir"
                )

    def _check_not_lost(self, models: Sequence[str], run: dict[str, Any]) -> None:
        lost, ways_out = [], ["start afresh with --overwrite", "choose another --save_dir"]
        for model in models:
            differing = self._differences(model, run)
            is_unfinished = self.can_be_resumed(model)
            if is_unfinished or (differing and self._has_any(model, ("metrics.json", "model.pth"))):
                lost.append("; ".join([self._describe(model), *differing]))
            if is_unfinished and not differing:
                ways_out.insert(0, "go on with --resume")
        if lost:
            *first, last = dict.fromkeys(ways_out)
            raise ValueError(
                f"{self.save_dir} holds what this run would replace: {'. '.join(lost)}. "
                f"{', '.join(first).capitalize()} or {last}"
            )

    def _differences(self, model: str, run: dict[str, Any]) -> list[str]:
        before = self.records.get(model)
        if before is None:
            return ["its settings are not known"]
        if before.get("precision") == "auto":  # of an earlier version; `last.pth` has what it was
            before = before | {"precision": run["precision"]}
        return [f"{n} was {before.get(n)}, is {run[n]}" for n in run if before.get(n) != run[n]]

    def _of_other_data(self, models: Sequence[str], run: dict[str, Any]) -> list[str]:
        if DATA not in run:
            return []
        return [n for n in self.others(models) if self.records[n].get(DATA) != run[DATA]]

    def _describe(self, model: str) -> str:
        """The model with what tells a person which one it is."""
        steps = self.records.get(model, {}).get("num_steps")
        known = [] if steps is None else [f"{steps} steps"]
        path = self.save_dir / model / "metrics.json"
        if not self.is_finished(model):
            return f"{model} ({', '.join([*known, 'unfinished'])})"
        accuracy = _balanced_accuracy(path)
        known += [] if accuracy is None else [f"balanced accuracy {accuracy:.3f}"]
        finished = time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
        return f"{model} ({', '.join([*known, f'finished {finished}'])})"

    def _has_any(self, model: str, names: Sequence[str]) -> bool:
        return any((self.save_dir / model / name).exists() for name in names)


def _balanced_accuracy(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["test"]["balanced_accuracy"])
    except (ValueError, KeyError, TypeError):  # a file of something else has none to show
        return None


def _remove_files(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
