"""The files of one training run: written whole, read back as if they came from a stranger."""

import hashlib
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from augmentation import describe_policy
from dataset import LesionLoader
from evaluation import best_evaluation
from imaging.batches import Inputs
from storage.files import write_csv
from storage.tensors import check_alike, is_number, load_tensors, save_tensors

Batches = Iterable[tuple[Inputs, Tensor]]


@dataclass
class Progress:
    """How far a run has come, and the best of it."""

    step: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)
    best_metrics: dict[str, Any] = field(default_factory=dict)
    best_state: dict[str, Tensor] = field(default_factory=dict)
    evaluations_since_best: int = 0
    learning_rate: float = 0.0  # of the last step
    saved_step: int = 0  # that `last.pth` holds
    recent_losses: list[float] = field(default_factory=list)  # since the last evaluation
    recent_images: int = 0
    recent_seconds: float = 0.0

    def add(self, metrics: dict[str, Any], train_loss: float, images_per_second: float) -> bool:
        """Takes an evaluation into the history, and says whether it is the best so far."""
        entry = {
            "step": self.step,
            "learning_rate": self.learning_rate,
            "train_loss": train_loss,
            "valid_loss": metrics["loss"],
            "valid_precision": metrics["precision"],
            "valid_recall": metrics["recall"],
            "valid_f1": metrics["f1"],
            "valid_balanced_accuracy": metrics["balanced_accuracy"],
            "images_per_second": images_per_second,
        }
        for name, value in entry.items():
            self.history.setdefault(name, []).append(value)
        is_best = best_evaluation(self.history) == len(self.history["step"]) - 1
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        if is_best:
            self.best_metrics = metrics
        self.recent_losses, self.recent_images, self.recent_seconds = [], 0, 0.0
        return is_best

    def is_evaluation_due(self, eval_every: int, num_steps: int) -> bool:
        is_at_one = self.step % eval_every == 0 or self.step == num_steps
        return is_at_one and self.step > self._evaluated_step()

    def is_over(self, num_steps: int, patience: int) -> bool:
        return self._evaluated_step() >= num_steps or 0 < patience <= self.evaluations_since_best

    def _evaluated_step(self) -> int:
        return self.history["step"][-1] if self.history else 0


class Checkpoint:
    """The files of one run in its `save_path`."""

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        scaler: torch.amp.GradScaler,
        settings: dict[str, Any],
    ) -> None:
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.settings = settings

    def save_history(self, progress: Progress) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_csv(pd.DataFrame(progress.history), self.folder / "history.csv")

    def save_last(self, progress: Progress) -> None:
        """Writes `last.pth`, all that is needed to go on from this step."""
        contents = {
            "settings": self.settings,
            "environment": _environment(self.model),
            "progress": vars(progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.folder / "last.pth", contents)

    def restore(self) -> Progress:
        """Brings everything to where `last.pth` left it; a fresh start if there is none."""
        path = self.folder / "last.pth"
        if not path.exists():
            return Progress()
        contents = load_tensors(path)
        kinds = {"settings", "progress", "model", "optimizer", "scheduler"}
        if not isinstance(contents, dict) or not kinds <= contents.keys():
            raise ValueError(f"{path}: not a checkpoint of this project")
        self._check_settings(contents["settings"], path)
        _warn_of_other_environment(path, contents.get("environment"), _environment(self.model))
        try:
            return self._take(contents)
        # What a scheduler of one's own makes of a state that is none cannot be known.
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: a checkpoint that cannot be used ({reason})") from error

    def _check_settings(self, before: Any, path: Path) -> None:
        """Raises ValueError when the checkpoint is of another run, and says what differs."""
        if not isinstance(before, dict):
            raise ValueError(f"{path}: not a checkpoint of this project")
        differing = [
            f"{name} was {before.get(name)}, is {self.settings.get(name)}"
            for name in sorted(before.keys() | self.settings.keys(), key=str)
            if not _is_same_setting(name, before.get(name), self.settings.get(name))
        ]
        if differing:
            raise ValueError(f"{path} is of another run: {'; '.join(differing)}")

    def _take(self, contents: dict[str, Any]) -> Progress:
        progress = _checked_progress(contents["progress"], self.model, self.settings["num_steps"])
        check_alike(contents["model"], self.model.state_dict(), "model")
        _check_optimizer(contents["optimizer"], self.optimizer)
        self.model.load_state_dict(dict(contents["model"]))
        self.optimizer.load_state_dict(_completed(contents["optimizer"], self.optimizer))
        if self.scheduler is not None:
            own, found = self.scheduler.state_dict(), contents["scheduler"]
            _check_common(found, own, "scheduler", needed=own.keys() & {"last_epoch"})
            self.scheduler.load_state_dict(found)
        if contents.get("scaler"):
            own, found = self.scaler.state_dict(), contents["scaler"]
            _check_common(found, own, "scaler")
            self.scaler.load_state_dict(own | found)
        return progress


def _is_same_setting(name: str, before: Any, now: Any) -> bool:
    """Returns whether a setting is what it was, as far as both versions of torch know of it.

    Versions differ in what they keep of an optimizer and of a scheduler: `decoupled_weight_decay`
    is there since 2.7.
    """
    if name not in ("optimizer", "scheduler"):
        return repr(before) == repr(now)
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_is_same_setting(name, before[key], now[key]) for key in before.keys() & now)
    if isinstance(before, list) and isinstance(now, list):
        pairs = zip(before, now, strict=False)
        return len(before) == len(now) and all(_is_same_setting(name, *pair) for pair in pairs)
    if isinstance(before, str) and isinstance(now, dict):  # as this project once wrote it
        return before == "{" + ", ".join(f"{key!r}: {value}" for key, value in now.items()) + "}"
    return repr(before) == repr(now)


def _check_common(
    found: Any, expected: dict[str, Any], name: str, needed: Collection[str] = ()
) -> None:
    """Raises ValueError as `check_alike` does, but not for keys that only one of the two has.

    Those are of another version of torch, to which they are left. The `needed` are in all versions.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no dict")
    common = {key: value for key, value in expected.items() if key in found or key in needed}
    check_alike({key: found[key] for key in common if key in found}, common, name)


def _completed(found: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Adds what only this version of torch knows of an optimizer to the state that was found."""
    own = optimizer.state_dict()["param_groups"]
    groups = [mine | group for mine, group in zip(own, found["param_groups"], strict=True)]
    return {**found, "param_groups": groups}


_RANKED = ("loss", "balanced_accuracy")  # metrics by which the best weights are chosen
_ADDED_LATER = {"learning_rate", "saved_step"}  # of progress; a run goes on as well without them


def _checked_progress(found: Any, model: nn.Module, num_steps: int) -> Progress:
    """The progress that a checkpoint holds; raises ValueError where it is none."""
    if not isinstance(found, dict):
        raise ValueError("its progress is none")
    names = {each.name for each in fields(Progress)}
    differing = (found.keys() ^ names) - (_ADDED_LATER - found.keys())
    if differing:
        shown = ", ".join(sorted(str(name)[:80] for name in differing))
        raise ValueError(f"its progress is that of another version of this project: {shown}")
    progress = Progress(**found)
    for name in ("step", "saved_step", "evaluations_since_best"):
        count = getattr(progress, name)
        if type(count) is not int or not 0 <= count <= num_steps:
            raise ValueError(f"{name} is not a whole number from 0 to {num_steps}")
    for name in ("learning_rate", "recent_images", "recent_seconds"):
        _check_numbers([getattr(progress, name)], name)
    _check_numbers(progress.recent_losses, "recent_losses")
    history, best = progress.history, progress.best_metrics
    if not isinstance(history, dict) or not isinstance(best, dict):
        raise ValueError("its history and best_metrics are no dicts")
    if history:
        example = Progress()
        example.add(dict.fromkeys((*_RANKED, "precision", "recall", "f1"), 0.0), 0.0, 0.0)
        if history.keys() != example.history.keys():
            raise ValueError("history has other columns")
        for name, values in history.items():
            _check_numbers(values, f"history of {name}")
            if len(values) != len(history["step"]):
                raise ValueError("history has columns of different lengths")
        check_alike({name: best.get(name) for name in _RANKED}, dict.fromkeys(_RANKED, 0.0), "best")
        check_alike(progress.best_state, model.state_dict(), "best_state")
    elif best or progress.best_state:
        raise ValueError("it has best weights without an evaluation")
    return progress


def _check_numbers(values: Any, name: str) -> None:
    if not isinstance(values, list) or not all(v is None or is_number(v) for v in values):
        raise ValueError(f"{name} is no list of numbers")


def _check_optimizer(found: Any, optimizer: Optimizer) -> None:
    """Raises ValueError unless this is the state of an optimizer of the same parameters.

    Of the numbers that it keeps for a parameter, those of Adam and AdamW alone are known here.
    """
    own = optimizer.state_dict()
    if not isinstance(found, dict) or not {"state", "param_groups"} <= found.keys():
        raise ValueError("optimizer is no state of one")
    groups = found["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        raise ValueError(f"optimizer's groups is no list of {len(own['param_groups'])}")
    for number, (group, own_group) in enumerate(zip(groups, own["param_groups"], strict=True)):
        _check_common(group, own_group, f"optimizer's groups {number}", needed=("params", "lr"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(found["state"], dict) or not found["state"].keys() <= set(
        range(len(parameters))
    ):
        raise ValueError("optimizer has a state of other parameters")
    if not isinstance(optimizer, Adam | AdamW):
        return
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * optimizer.defaults["amsgrad"]
    for number, state in found["state"].items():
        kept = dict.fromkeys(names, parameters[number]) | {"step": torch.tensor(0.0)}
        _check_common(state, kept, f"optimizer's state {number}", needed=kept)


def describe_run(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    train_loader: Batches,
    valid_loader: Batches,
    num_steps: int,
) -> dict[str, Any]:
    """What must be the same for a run to go on as if it had not stopped, as plain values."""
    groups = [
        {name: repr(value) for name, value in group.items() if name not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    run = {
        "model": _config(model) or type(model).__name__,
        "optimizer": [type(optimizer).__name__, groups],
        "learning_rate": [group["lr"] for group in optimizer.param_groups],
        "scheduler": _describe_scheduler(scheduler, num_steps),
        "batch_size": getattr(train_loader, "batch_size", None),
    }
    for name, loader in {"train": train_loader, "valid": valid_loader}.items():
        if isinstance(loader, LesionLoader):
            images = loader.dataset.metadata[["path", "class", "content_hash"]]
            run[f"{name} images"] = hashlib.sha256(
                images.to_csv().encode(errors="replace")
            ).hexdigest()
            run[f"{name} loader"] = {
                "augmentation": describe_policy(loader.augmentation),
                "balanced": loader.balanced,
                "seed": loader.seed,
                "image_size": loader.dataset.image_size,
                "preprocessors": loader.dataset.preprocessors,
            }
    return run


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config if isinstance(config, dict) else {}


def _describe_scheduler(scheduler: LRScheduler | None, num_steps: int) -> list[Any]:
    if scheduler is None:
        return []
    state = {name: repr(value) for name, value in scheduler.state_dict().items()}
    described: list[Any] = [type(scheduler).__name__, state]
    if isinstance(scheduler, LambdaLR):  # what its functions hold is not in its state
        steps = range(0, num_steps, max(num_steps // 16, 1))
        described += [repr([factor(s) for s in steps]) for factor in scheduler.lr_lambdas]
    return described


def _environment(model: nn.Module) -> dict[str, Any]:
    """What the last bits of the weights depend on, besides the settings."""
    device = next(model.parameters()).device
    is_cuda = device.type == "cuda"
    kind = torch.backends.cpu.get_cpu_capability()
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{device.type}, {kind}",
    }


def _warn_of_other_environment(path: Path, before: Any, now: dict[str, Any]) -> None:
    before = before if isinstance(before, dict) else {}
    differing = [
        f"{n} was {before[n]}, is {now[n]}" for n in now if before.get(n, now[n]) != now[n]
    ]
    if differing:
        warnings.warn(
            f"{path}: {'; '.join(differing)}: the weights will be as good, but not bit for bit "
            "those of a run that was never stopped",
            stacklevel=2,
        )
