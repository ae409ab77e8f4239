"""A training run: its parts, how far it has come, and the files that it writes."""

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from augmentation import describe_policy
from dataset import LesionLoader, check_seed
from evaluation import (
    Evaluation,
    best_evaluation,
    choose_thresholds,
    fit_calibration,
    group_by_malignancy,
    screening_scores,
)
from imaging.batches import Inputs
from imaging.splits import check_at_least
from learning.features import FeatureLoader
from learning.hardware import describe_hardware, name_of_precision
from learning.losses import Criterion
from learning.processes import get_world_size, is_first_process
from models import ModelInfo
from storage.files import write_csv
from storage.tensors import check_alike, load_tensors, save_tensors

Batches = Iterable[tuple[Inputs, Tensor]]
# Takes the model, its evaluation on the validation images and the metrics of that.
OnBest = Callable[[nn.Module, Evaluation, dict[str, Any]], None]
VALIDATION_METRICS = ("loss", "precision", "recall", "f1", "balanced_accuracy")  # in the history


@dataclass(frozen=True)
class Plan:
    """The numbers that a resumed run must share; raises ValueError for those out of range."""

    num_steps: int
    eval_every: int
    early_stopping_patience: int
    accumulate: int
    seed: int

    def __post_init__(self) -> None:
        own = {"num_steps": self.num_steps, "eval_every": self.eval_every}
        check_at_least(1, **own, accumulate=self.accumulate)
        check_at_least(0, early_stopping_patience=self.early_stopping_patience)
        check_seed(self.seed)


@dataclass
class Progress:
    """Holds how far a run has come, and its best weights."""

    step: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    best_metrics: dict[str, Any] = field(default_factory=dict)
    best_state: dict[str, Tensor] = field(default_factory=dict)
    evaluations_since_best: int = 0
    learning_rate: float = 0.0  # of the last step
    saved_step: int = 0  # the step that `last.pth` holds
    recent_losses: list[float] = field(default_factory=list)  # since the last evaluation
    recent_images: int = 0
    recent_seconds: float = 0.0

    def add(self, metrics: dict[str, Any]) -> bool:
        """Adds an evaluation after the recent steps to the history; returns if it is the best."""
        entry = {
            "step": self.step,
            "learning_rate": self.learning_rate,
            "train_loss": float(np.mean(self.recent_losses)),
            **{f"valid_{name}": metrics[name] for name in VALIDATION_METRICS},
            "images_per_second": self.recent_images / self.recent_seconds,
        }
        for name, value in entry.items():
            self.history.setdefault(name, []).append(value)
        is_best = best_evaluation(self.history) == len(self.history["step"]) - 1
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        if is_best:
            self.best_metrics = metrics
        self.recent_losses, self.recent_images, self.recent_seconds = [], 0, 0.0
        return is_best

    def is_evaluation_due(self, plan: Plan) -> bool:
        """Returns whether the model is to be evaluated before the next step."""
        is_at_one = self.step % plan.eval_every == 0 or self.step == plan.num_steps
        return is_at_one and self.step > self._evaluated_step()

    def is_over(self, plan: Plan) -> bool:
        """Returns whether the run has reached its last evaluation, or stops early."""
        if self._evaluated_step() >= plan.num_steps:
            return True
        return 0 < plan.early_stopping_patience <= self.evaluations_since_best

    def _evaluated_step(self) -> float:
        return self.history["step"][-1] if self.history else 0


@dataclass
class Run:
    """All that belongs to one call of `train`.

    With `write_to` the first process writes its files; without, nobody does.
    """

    model: nn.Module
    train_loader: Batches
    valid_loader: Batches
    optimizer: Optimizer
    scheduler: LRScheduler | None
    device: torch.device
    dtype: torch.dtype
    plan: Plan
    class_names: list[str]
    criterion: Criterion
    on_best: OnBest | None
    checkpoint_every: int | None
    valid_precision: str = "auto"  # in which the model is evaluated
    progress: Progress = field(default_factory=Progress)
    folder: Path | None = None
    next_checkpoint: float = 0.0  # when `last.pth` is due, by time.monotonic()

    def __post_init__(self) -> None:
        is_fp16 = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_fp16)
        if self.checkpoint_every is not None:
            check_at_least(1, checkpoint_every=self.checkpoint_every)

    def write_to(
        self,
        folder: Path,
        criterion: str | None,
        class_weights: Sequence[float] | None,
        malignant_classes: Sequence[str],
    ) -> None:
        """Has the run write its files to this folder; `criterion` describes the loss.

        Raises ValueError for a malignant class that is not among the classes.
        """
        counted = group_by_malignancy(self.class_names, malignant_classes)
        config, dataset = _config(self.model), getattr(self.valid_loader, "dataset", None)
        self.info = ModelInfo(
            config=config,
            classes=self.class_names,
            image_size=getattr(dataset, "image_size", None) or config.get("image_size", 0),
            preprocessors=getattr(dataset, "preprocessors", ""),
            precision=name_of_precision(self.dtype),
            malignant_classes=counted["malignant"],
            unknown_classes=counted["unknown"],
        )
        weights = None if class_weights is None else [float(weight) for weight in class_weights]
        is_balanced = getattr(self.train_loader, "balanced", False)
        self.priors_shifted = weights is not None or is_balanced
        # What must be the same for the run to be resumed.
        self.settings = _describe_parts(self) | {
            **vars(self.plan),
            "class_weights": weights,
            "precision": str(self.dtype),
            "world_size": get_world_size(),
            "criterion": criterion,
        }
        self.folder = folder

    def save_history(self) -> None:
        """Writes `history.csv`, a row an evaluation."""
        if path := self._file("history.csv"):
            write_csv(pd.DataFrame(self.progress.history), path)

    def save_best(self, evaluation: Evaluation) -> None:
        """Writes `model.pth`: the best weights, and how to use them; or calls `on_best` instead."""
        if self.on_best is not None:
            if is_first_process():
                self.on_best(self.model, evaluation, self.progress.best_metrics)
        elif path := self._file("model.pth"):
            info, y_true, y_prob = self.info, evaluation.labels, evaluation.probabilities
            calibration = fit_calibration(y_true, y_prob, priors_shifted=self.priors_shifted)
            groups = (info.classes, info.malignant_classes, info.unknown_classes)
            scores = screening_scores(y_true, calibration.apply(y_prob), *groups)
            info = replace(
                info,
                metrics=self.progress.best_metrics,
                temperature=calibration.temperature,
                bias=list(calibration.bias),
                thresholds={name: choose_thresholds(*scores[name]) for name in scores},
            )
            info.save(path, self.progress.best_state)

    def save_last(self) -> None:
        """Writes `last.pth`: all that is needed to resume from this step."""
        self.progress.saved_step = self.progress.step
        if path := self._file("last.pth"):
            contents = {
                "settings": self.settings,
                "environment": describe_hardware(self.device),
                "progress": vars(self.progress),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            save_tensors(path, contents)

    def _file(self, name: str) -> Path | None:
        if self.folder is None or not is_first_process():
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def restore(self) -> None:
        """Restores the state that `last.pth` holds; without the file, the run starts afresh.

        Raises ValueError for a run that cannot be resumed, and a file that is damaged or of
        another run.
        """
        if self.folder is None:
            raise ValueError("resume needs the save_path of the run to continue")
        if not isinstance(self.train_loader, LesionLoader):
            raise ValueError(
                "resume needs a LesionLoader (create_dataloaders): another training loader cannot "
                "continue where it stopped"
            )
        path = self.folder / "last.pth"
        if not path.exists():
            return
        contents = load_tensors(path)
        kinds = {"settings", "progress", "model", "optimizer", "scheduler"}
        is_checkpoint = isinstance(contents, dict) and kinds <= contents.keys()
        if not is_checkpoint or not isinstance(contents["settings"], dict):
            raise ValueError(f"{path}: not a checkpoint of this program")
        differing = _differences(contents["settings"], self.settings)
        if differing:
            raise ValueError(f"{path} belongs to another run: {differing}")
        environment, before = describe_hardware(self.device), contents.get("environment")
        before = environment | (before if isinstance(before, dict) else {})
        differing = _differences(before, environment)
        if differing:
            warnings.warn(
                f"{path}: {differing}; the weights will be as good as those of an uninterrupted "
                "run, but not identical",
                stacklevel=2,
            )
        try:
            self._restore_from(contents)
        # A user's own scheduler may raise anything for a state that it does not expect.
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: cannot resume from this checkpoint ({reason})") from error

    def _restore_from(self, contents: dict[str, Any]) -> None:
        progress = _read_progress(contents["progress"], self.model, self.plan.num_steps)
        check_alike(contents["model"], self.model.state_dict(), "model")
        optimizer_state = _read_optimizer(contents["optimizer"], self.optimizer)
        self.model.load_state_dict(dict(contents["model"]))
        self.optimizer.load_state_dict(optimizer_state)
        if self.scheduler is not None:
            own, stored = self.scheduler.state_dict(), contents["scheduler"]
            stored = _completed(stored, own, "scheduler", needed=own.keys() & {"last_epoch"})
            self.scheduler.load_state_dict(stored)
        if contents.get("scaler"):
            own = self.scaler.state_dict()
            self.scaler.load_state_dict(_completed(contents["scaler"], own, "scaler"))
        self.progress = progress


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} is {now.get(name)}, but was {before.get(name)}"
        for name in sorted(before.keys() | now.keys(), key=str)
        if not _is_same_setting(name, before.get(name), now.get(name))
    )


def _is_same_setting(name: str, before: Any, now: Any) -> bool:
    """Returns whether a setting is the same, as far as both versions of torch know it.

    Versions differ in what they keep of an optimizer and of a scheduler: `decoupled_weight_decay`
    is there since 2.7.
    """
    if name in ("optimizer", "scheduler"):
        if isinstance(before, dict) and isinstance(now, dict):
            return all(_is_same_setting(name, before[key], now[key]) for key in before.keys() & now)
        if isinstance(before, list) and isinstance(now, list):
            pairs = zip(before, now, strict=False)
            return len(before) == len(now) and all(_is_same_setting(name, *pair) for pair in pairs)
        if isinstance(before, str) and isinstance(now, dict):  # as earlier versions wrote it
            now = "{" + ", ".join(f"{key!r}: {value}" for key, value in now.items()) + "}"
    return repr(before) == repr(now)


def _completed(
    stored: Any, own: dict[str, Any], name: str, needed: Collection[str] = ()
) -> dict[str, Any]:
    """Returns a state as it was stored, with what only this version of torch knows added to it.

    Raises ValueError unless what both know is alike, and what is `needed` is there.
    """
    if not isinstance(stored, dict):
        raise ValueError(f"{name} is not a dict")
    common = {key: value for key, value in own.items() if key in stored or key in needed}
    check_alike({key: stored[key] for key in common if key in stored}, common, name)
    return own | stored


def _read_progress(stored: Any, model: nn.Module, num_steps: int) -> Progress:
    """Returns the progress that a checkpoint holds; raises ValueError unless it is consistent."""
    if isinstance(stored, dict):  # earlier versions did not write these
        stored = {"learning_rate": 0.0, "saved_step": 0} | stored
    check_alike(stored, dict.fromkeys(vars(Progress())), "progress")
    count = len(stored["history"]["step"]) if stored["history"] else 0
    evaluated = Progress(recent_losses=[0.0], recent_seconds=1.0)
    if count:
        evaluated.add(dict.fromkeys(VALIDATION_METRICS, 0.0))
    ranked = {"loss": 0.0, "balanced_accuracy": 0.0}
    expected = vars(Progress()) | {
        "history": dict.fromkeys(evaluated.history, [0.0] * count),
        "best_metrics": stored["best_metrics"] | ranked if count else {},
        "best_state": model.state_dict() if count else {},
        "recent_losses": [0.0] * len(stored["recent_losses"]),
    }
    check_alike(stored, expected, "progress")
    for name in ("step", "saved_step", "evaluations_since_best"):
        if type(stored[name]) is not int or not 0 <= stored[name] <= num_steps:
            raise ValueError(f"{name} must be a whole number from 0 to {num_steps}")
    return Progress(**stored)


def _read_optimizer(stored: Any, optimizer: Optimizer) -> dict[str, Any]:
    """Returns the state to load; raises ValueError unless it is of the same parameters.

    Of the tensors that an optimizer keeps for a parameter, those of Adam and AdamW alone are known.
    """
    own = optimizer.state_dict()
    check_alike(stored, dict.fromkeys(own), "optimizer")
    check_alike(stored["param_groups"], [None] * len(own["param_groups"]), "optimizer's groups")
    pairs = zip(stored["param_groups"], own["param_groups"], strict=True)
    groups = [_completed(*pair, "optimizer's group", needed=("params", "lr")) for pair in pairs]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not stored["state"].keys() <= set(range(len(parameters))):
        raise ValueError("the optimizer state belongs to other parameters")
    if isinstance(optimizer, Adam | AdamW):
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * optimizer.defaults["amsgrad"]
        for number, state in stored["state"].items():
            kept = dict.fromkeys(names, parameters[number]) | {"step": torch.tensor(0.0)}
            _completed(state, kept, f"optimizer's state {number}", needed=kept)
    return {**stored, "param_groups": groups}


def _describe_parts(run: Run) -> dict[str, Any]:
    """Returns, as plain values, what must be the same of the parts of a resumed run."""
    groups = [
        {name: repr(value) for name, value in group.items() if name not in ("params", "lr")}
        for group in run.optimizer.param_groups
    ]
    described = {
        "model": _config(run.model) or type(run.model).__name__,
        "optimizer": [type(run.optimizer).__name__, groups],
        "learning_rate": [group["lr"] for group in run.optimizer.param_groups],
        "scheduler": _describe_scheduler(run.scheduler, run.plan.num_steps),
        "batch_size": getattr(run.train_loader, "batch_size", None),
    }
    if isinstance(run.train_loader, FeatureLoader):
        described["cached_features"] = True
    for name, loader in {"train": run.train_loader, "valid": run.valid_loader}.items():
        if isinstance(loader, LesionLoader):
            images = loader.dataset.metadata[["path", "class", "content_hash"]].to_csv()
            digest = hashlib.sha256(images.encode(errors="replace")).hexdigest()
            described[f"{name} images"] = digest
            described[f"{name} loader"] = {
                "augmentation": describe_policy(loader.augmentation),
                "balanced": loader.balanced,
                "seed": loader.seed,
                "image_size": loader.dataset.image_size,
                "preprocessors": loader.dataset.preprocessors,
            }
    return described


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config if isinstance(config, dict) else {}


def _describe_scheduler(scheduler: LRScheduler | None, num_steps: int) -> list[Any]:
    if scheduler is None:
        return []
    state = {name: repr(value) for name, value in scheduler.state_dict().items()}
    described: list[Any] = [type(scheduler).__name__, state]
    if isinstance(scheduler, LambdaLR):  # its state does not hold its functions
        steps = range(0, num_steps, max(num_steps // 16, 1))
        described += [repr([factor(s) for s in steps]) for factor in scheduler.lr_lambdas]
    return described
