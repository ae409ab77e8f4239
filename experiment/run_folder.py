"""What the folder of a run holds, and what a new run may write and replace there."""

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import Timeout

from storage.files import lock, remove_leftovers, write_text

TRAINING, EVALUATION, AUDIT = "training", "evaluation", "audit"

# What the commands write into the folder of a run and into those of its models. Nothing else is
# ever removed. `metrics.json` comes first: without it a model no longer counts as finished.
COMPARISON_FILES = ("report.html", "comparison.csv", "comparison.png")
EVALUATION_FILES = ("config.json", "audit.csv", "audit.png", "splits.csv", *COMPARISON_FILES)
DATA_FIGURES = ("class_distribution.png", "samples.png", "augmentations.png")
TRAINING_FILES = ("last.pth", "model.pth", "history.csv")
FOREIGN_FILES = ("config.json", *TRAINING_FILES)  # in no model's folder of an evaluation
RESULT_FILES = (
    "metrics.json", "predictions.csv", "confusion_matrix.png", "class_metrics.png",
    "roc_pr_curves.png", "reliability.png", "mistakes.png", "gradcam.png",
)  # fmt: skip
MODEL_FILES = ("metrics.json", *TRAINING_FILES, *RESULT_FILES[1:], "learning_curves.png")

# Keys of a model's record in config.json that follow from the images; the others are settings.
DATA, METADATA = "images and splits", "columns of metadata_csv"
# Key of a run for what differs from model to model, by the name of its folder: `TRAINING_PRECISION`
# where that is not the precision of all. `WEIGHTS` is a digest of the file of initial weights.
BY_MODEL, TRAINING_PRECISION, WEIGHTS = "by model", "training_precision", "weights_sha256"
# What the metrics of an evaluation depend on, in the words of a message.
DIFFERENCES = {
    "images": "other images or labels",
    "classes": "other classes",
    "model": "another model.pth",
    "precision": "another precision",
    "seed": "another seed",
}
# Loading workers of a process that was killed hold its lock until they notice, 5 seconds at most.
SECONDS_TO_WAIT = 6


@contextlib.contextmanager
def claim(save_dir: str | Path) -> Iterator[None]:
    """Keeps other runs out of `save_dir`, which is created, until the block ends.

    Removes half-written files of killed runs there and in the folders of its models. The claim
    ends with its process, however that ends. Raises ValueError when another process has claimed the
    folder, and says which.
    """
    save_dir = Path(save_dir)
    save_dir.mkdir(parents=True, exist_ok=True)
    owner = save_dir / ".owner"
    try:
        held = lock(save_dir / ".lock").acquire(timeout=SECONDS_TO_WAIT)
    except Timeout:
        raise ValueError(
            f"{save_dir} is in use by {_describe_owner(owner)}; wait for it to end, or choose "
            "another folder"
        ) from None
    with held:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        for folder in (save_dir, *_model_folders(save_dir)):
            remove_leftovers(folder)
        try:
            write_text(owner, f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            yield
        finally:
            owner.unlink(missing_ok=True)


def check_unclaimed(save_dir: str | Path) -> None:
    """Raises ValueError when another process has claimed the folder, which need not exist."""
    if (Path(save_dir) / ".lock").exists():
        with claim(save_dir):
            pass


def _model_folders(save_dir: Path) -> list[Path]:
    """Returns the folders in `save_dir` that a run on it writes to.

    One with a lock of its own is another run's, such as `models/demo` in `models`.
    """
    return [
        path
        for path in save_dir.iterdir()
        if path.is_dir()
        and not path.is_symlink()
        and not (path / ".lock").exists()
        and os.access(path, os.R_OK | os.W_OK | os.X_OK)
    ]


def _describe_owner(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # it has the lock, but has not written this yet
        return "another process"


def check_save_dir(save_dir: str | Path, data_dir: str | Path) -> None:
    """Raises ValueError or PermissionError when results cannot go to this folder."""
    folder = Path(save_dir).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        where = "is" if existing == folder else f"is in {existing}, which is"
        raise ValueError(f"{save_dir} {where} a file; choose another folder")
    if folder == Path(data_dir).resolve():
        raise ValueError(f"{save_dir} is the folder of the images; choose another for the results")
    if folder.is_relative_to(Path(data_dir).resolve()):
        raise ValueError(
            f"{save_dir} is inside {data_dir}, where figures would be taken for images of lesions; "
            "choose another folder for the results"
        )
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{save_dir}: no permission to write; choose another folder")


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

    In files written before `kind` was recorded, other keys tell.
    """
    if not config:
        return None
    return config.get("kind") or (TRAINING if "runs" in config else EVALUATION)


def write_config(save_dir: str | Path, config: Mapping[str, Any]) -> None:
    """Writes `config.json`."""
    write_text(Path(save_dir) / "config.json", json.dumps(config, indent=2) + "\n")


def digest(contents: bytes) -> str:
    """Returns 16 hex digits that differ for other contents."""
    return hashlib.sha256(contents).hexdigest()[:16]


def folder_name(model: str) -> str:
    """Returns the name of a model's folder, by which all files of a run call it."""
    return model.replace("/", "_")


def record_of(model: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a run that this model's results depend on."""
    shared = {name: value for name, value in run.items() if name != BY_MODEL}
    return shared | run.get(BY_MODEL, {}).get(model, {})


def _valid_records(runs: Any) -> dict[str, dict[str, Any]]:
    """Returns the records of a `config.json` by model, without names that are no folder's here."""
    return {
        name: record
        for name, record in (runs.items() if isinstance(runs, dict) else ())
        if isinstance(record, dict) and Path(name).name == name and name not in ("", "..")
    }


class TrainingFolder:
    """The folder of a training run, which need not exist, and the models in it.

    A model's record is a dict of all that its results depend on: settings, and under `DATA` and
    `METADATA` digests of what it was trained and tested on. The argument `run` of the methods is
    such a dict for the present run, without these two before its images have been read, and with
    what is not the same for all models under `BY_MODEL`.

    Raises ValueError when it holds an evaluation, or a `config.json` of another program.
    """

    def __init__(self, save_dir: str | Path) -> None:
        self.save_dir, self.config = Path(save_dir), read_config(save_dir)
        self.records = _valid_records(self.config.get("runs"))  # of all models, finished or not
        if kind_of_run(self.config) == EVALUATION:
            raise ValueError(
                f"{save_dir} contains an evaluation (predict.py --evaluate); choose another "
                "--save_dir"
            )

    def is_finished(self, model: str) -> bool:
        """Returns whether the model has results, of whatever run."""
        return (self.save_dir / model / "metrics.json").exists()

    def can_be_resumed(self, model: str) -> bool:
        """Returns whether the model is unfinished and has a checkpoint."""
        return not self.is_finished(model) and (self.save_dir / model / "last.pth").exists()

    def is_done(self, model: str, run: dict[str, Any]) -> bool:
        """Returns whether the model is finished, with the settings and data of this run."""
        return self.is_finished(model) and not self._differences(model, run)

    def others(self, models: Sequence[str]) -> list[str]:
        """Returns the models in the folder that are not among these."""
        return [name for name in self.records if name not in models and self._exists(name)]

    def check(
        self, models: Sequence[str], run: dict[str, Any], *, resume: bool, may_replace: bool
    ) -> None:
        """Raises ValueError when training these models would lose results in the folder.

        With `resume`, also when the folder holds the models of another run.
        """
        differing = {name: self._differences(name, run) for name in models if self._exists(name)}
        if resume:
            for name, differences in differing.items():
                if differences:
                    raise ValueError(
                        f"--resume: {self.save_dir / name} belongs to another run: "
                        f"{'; '.join(differences)}. Start over with --overwrite instead of "
                        "--resume, or choose another --save_dir"
                    )
        elif not may_replace:
            self._check_not_lost(differing)
        of_other_data = self._of_other_data(models, run)
        if of_other_data and not may_replace:
            raise ValueError(
                f"{self.save_dir} contains models of other images or splits, which cannot be "
                f"compared with this run: {'; '.join(map(self._describe, of_other_data))}. Choose "
                "another --save_dir, or remove them with --overwrite"
            )

    def check_audit(self, images: str) -> None:
        """Raises ValueError when the folder holds a training run on images of another digest."""
        if kind_of_run(self.config) == TRAINING and self.config.get("images") != images:
            raise ValueError(
                f"{self.save_dir} contains a training run on other images; choose another "
                "--save_dir for the audit"
            )

    def make_room(self, models: Sequence[str], run: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Removes these models, those of other data, and the figures that compare all models.

        Returns the records of the models that are kept.
        """
        of_other_data = self._of_other_data(models, run)
        removed = [*models, *of_other_data]
        _remove(self.save_dir / model / file for model in removed for file in MODEL_FILES)
        _remove_empty(self.save_dir / model for model in of_other_data)
        _remove(self.save_dir / file for file in (*COMPARISON_FILES, *DATA_FIGURES))
        return {name: record for name, record in self.records.items() if name not in removed}

    def _check_not_lost(self, differing: Mapping[str, list[str]]) -> None:
        lost = {
            name: differences
            for name, differences in differing.items()
            if differences or self.can_be_resumed(name)
        }
        if lost:
            described = ("; ".join([self._describe(name), *lost[name]]) for name in lost)
            ways = "Start over with --overwrite, or choose another --save_dir"
            if not all(lost.values()):
                ways = f"Continue with --resume, s{ways[1:]}"
            raise ValueError(
                f"{self.save_dir} contains results of another run: {'. '.join(described)}. {ways}"
            )

    def _differences(self, model: str, run: dict[str, Any]) -> list[str]:
        before, run = self.records.get(model), record_of(model, run)
        if before is None:
            return ["its settings are unknown"]
        if before.get("precision") == "auto":  # of an earlier version; `last.pth` has what it was
            before = before | {"precision": run["precision"]}
        # Not written by earlier versions, and the former not where it is `precision`.
        run.setdefault(TRAINING_PRECISION, run.get("precision"))
        before = {TRAINING_PRECISION: before.get("precision"), WEIGHTS: run.get(WEIGHTS)} | before
        before = {"cached_features": False} | before  # earlier versions did not have it
        differing = [name for name in run if before.get(name) != run[name]]
        if "precision" in differing and TRAINING_PRECISION in differing:
            differing.remove(TRAINING_PRECISION)
        of_digests = {DATA: "images or splits differ", METADATA: f"{METADATA} differ"}
        of_digests[WEIGHTS] = "the file of --weights has other contents"
        return [of_digests.get(n, f"{n} is {run[n]}, but was {before.get(n)}") for n in differing]

    def _of_other_data(self, models: Sequence[str], run: dict[str, Any]) -> list[str]:
        if DATA not in run:
            return []
        return [n for n in self.others(models) if self.records[n].get(DATA) != run[DATA]]

    def _describe(self, model: str) -> str:
        """Returns the model's name with its steps, accuracy and date."""
        steps = self.records.get(model, {}).get("num_steps")
        known = [] if steps is None else [f"{steps} steps"]
        if self.is_finished(model):
            path = self.save_dir / model / "metrics.json"
            with contextlib.suppress(ValueError, KeyError, TypeError):  # of another program
                accuracy = json.loads(path.read_text(encoding="utf-8"))["test"]["balanced_accuracy"]
                known.append(f"balanced accuracy {accuracy:.3f}")
            finished = time.strftime("%Y-%m-%d", time.localtime(path.stat().st_mtime))
            known.append(f"finished {finished}")
        else:
            known.append("unfinished")
        return f"{model} ({', '.join(known)})"

    def _exists(self, model: str) -> bool:
        folder = self.save_dir / model
        return any((folder / name).exists() for name in ("metrics.json", "last.pth", "model.pth"))


class EvaluationFolder:
    """The folder of an evaluation (predict.py --evaluate), which need not exist, and its models.

    A model's record is a dict of all that its results depend on, with the keys of `DIFFERENCES`;
    `runs` are such records of the present evaluation, without that of the images before these have
    been read.

    Raises ValueError when an evaluation of models of these names would write over files other than
    those of an earlier evaluation.
    """

    def __init__(self, save_dir: str | Path, models: Iterable[str], data_dir: str | Path) -> None:
        self.save_dir = save_dir = Path(save_dir)
        model_folders = [save_dir / name for name in models]
        for folder in (save_dir, *model_folders):
            check_save_dir(folder, data_dir)
        self.config = read_config(save_dir)
        kind = kind_of_run(self.config)
        if kind not in (None, EVALUATION):
            contents = "an audit" if kind == AUDIT else "a training run"
            raise ValueError(
                f"{save_dir} contains {contents}; choose another folder for the evaluation"
            )
        if _belongs_to_training(save_dir):
            raise ValueError(
                f"{save_dir} belongs to a model of the training run in "
                f"{save_dir.resolve().parent}; choose another folder for the evaluation"
            )
        if kind == EVALUATION:  # its own results may be there
            foreign = [folder / file for folder in model_folders for file in FOREIGN_FILES]
        else:
            files = (*EVALUATION_FILES, *RESULT_FILES, *TRAINING_FILES)
            foreign = [folder / file for folder in (save_dir, *model_folders) for file in files]
            foreign += sorted(save_dir.glob("*/metrics.json"))
        for path in foreign:
            if path.exists():
                raise ValueError(f"{path} was not written by an evaluation; choose another folder")

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """The record of each model that was evaluated here, finished or not."""
        if kind_of_run(self.config) != EVALUATION:
            return {}
        runs = self.config.get("runs")
        if not isinstance(runs, dict):  # written before there was such a record
            runs = {path.parent.name: {} for path in self.save_dir.glob("*/metrics.json")}
        return {
            name: record
            for name, record in _valid_records(runs).items()
            if (self.save_dir / name).is_dir()
            and not any((self.save_dir / name / file).exists() for file in FOREIGN_FILES)
        }

    def measured(
        self, runs: Mapping[str, dict[str, Any]], overwrite: bool
    ) -> dict[str, dict[str, Any]]:
        """Returns the records of the finished models whose results are kept.

        With `overwrite` those of `runs` are not among them. Without it, raises ValueError when
        results would be lost: of other images or classes, or of another model of the same name.
        """
        any_run, kept = next(iter(runs.values())), {}
        of_all_models = {what: any_run[what] for what in any_run if what in ("images", "classes")}
        for name, before in self.records.items():
            is_finished = (self.save_dir / name / "metrics.json").exists()
            if not is_finished or (overwrite and name in runs):
                continue
            now = runs.get(name, of_all_models)
            differing = [DIFFERENCES[what] for what in now if before.get(what) != now[what]]
            if differing and not overwrite:
                words = ", ".join(differing) if before else "no record of its images"
                raise ValueError(
                    f"{self.save_dir} contains an evaluation of {name} with {words}; replace it "
                    "with --overwrite, or choose another folder"
                )
            if not differing:
                kept[name] = before
        return kept

    def make_room(self, kept: Container[str]) -> None:
        """Removes the results of the models that are not `kept`, and the comparison of all models.

        `metrics.json` goes first: without it no model counts as measured if this is interrupted.
        """
        folders = [self.save_dir / name for name in self.records if name not in kept]
        _remove(folder / file for file in RESULT_FILES for folder in folders)
        _remove_empty(folders)
        _remove(self.save_dir / file for file in COMPARISON_FILES)


def _belongs_to_training(folder: Path) -> bool:
    """Returns whether the folder is that of a model of a training run in the parent folder."""
    folder = folder.resolve()
    try:
        config = read_config(folder.parent)
    except ValueError:  # any program may have a config.json
        return False
    chosen = map(folder_name, config.get("settings", {}).get("models") or ())
    names = {*(config.get("runs") or ()), *chosen}
    return kind_of_run(config) == TRAINING and folder.name in names


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if not any(folder.iterdir()):
            folder.rmdir()
