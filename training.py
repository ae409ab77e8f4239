"""Optimiser, schedule, loop; `train` and `evaluate`."""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from dataset import LesionLoader, check_seed, derive_seed
from evaluation import (
    MALIGNANT,
    choose_thresholds,
    compute_metrics,
    counted_as,
    fit_calibration,
    screening_scores,
)
from learning.checkpoints import Batches, Checkpoint, Progress, describe_run
from learning.distributed import (
    SECONDS_BETWEEN_EXCHANGES,
    Agreement,
    gather_batches,
    gradient_exchange,
    is_progress_hidden,
    mean_over_processes,
    share_buffers,
)
from learning.hardware import (
    PRECISIONS,
    autocast,
    choose_device,
    fastest_convolutions,
    memory_format_for,
    move_images,
    name_of_precision,
    own_random_state,
    resolve_precision,
)
from learning.processes import (
    SECONDS_OF_ONE_SIGNAL,
    StopSignals,
    get_rank,
    get_world_size,
    is_distributed,
)
from models import evaluation_mode

__all__ = [
    "PRECISIONS",
    "SECONDS_BETWEEN_EXCHANGES",
    "SECONDS_OF_ONE_SIGNAL",
    "Evaluation",
    "NonFiniteLossError",
    "choose_device",
    "compute_metrics",
    "evaluate",
    "make_optimizer",
    "name_of_precision",
    "resolve_precision",
    "train",
    "warmup_cosine",
]

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_CHECKPOINTS = 300.0


class NonFiniteLossError(ValueError):
    """A loss or weight that is infinite or not a number: training has diverged."""


class Evaluation(NamedTuple):
    """Mean cross-entropy, true labels int64 `(N,)` and probabilities float64 `(N, num_classes)`."""

    loss: float
    labels: np.ndarray
    probabilities: np.ndarray


def make_optimizer(
    model: nn.Module, learning_rate: float = 1e-3, weight_decay: float = 1e-4
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays neither biases nor normalisation weights.

    What is multiplied with features, the tensors of two or more dimensions, is decayed; frozen
    parameters are not in it. Raises ValueError for a rate that is not above 0, a negative decay, or
    a model without trainable parameters.
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; it must be greater than 0")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}; it must be 0 or more")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no trainable parameters")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=fused)


def warmup_cosine(optimizer: Optimizer, num_steps: int, warmup_fraction: float = 0.2) -> LambdaLR:
    """Linear warm-up and cosine decay (Loshchilov and Hutter 2017), stepped once a training step.

    With the optimizer's rate as the peak p, N = `num_steps` and w = round(N * warmup_fraction):
    p/10 + (p - p/10) s/w for s < w, then p/100 + (p - p/100) (1 + cos(pi (s - w)/(N - 1 - w))) / 2,
    for steps s = 0 … N - 1; past the end it stays. Raises ValueError for fewer than one step or a
    fraction outside [0, 1].
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be 1 or more")
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup_fraction is {warmup_fraction}; it must be from 0 to 1")
    warmup_steps = round(num_steps * warmup_fraction)
    decay_steps = num_steps - 1 - warmup_steps

    def share_of_peak(step: int) -> float:
        step = min(step, num_steps - 1)
        if step < warmup_steps:
            return 0.1 + 0.9 * step / warmup_steps
        progress = (step - warmup_steps) / decay_steps if decay_steps > 0 else 0.0
        return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, share_of_peak)


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    device: torch.device | str | None = None,
    precision: str = "auto",
) -> Evaluation:
    """The model's loss and probabilities on all images of a loader, in evaluation mode.

    `loader` gives batches of float32 images `(B, 3, H, W)` in [0, 1] and int64 labels `(B,)`.
    `device` is where the model is moved to, by default where it is. Of several processes whose
    LesionLoaders share the images, each gets the result on all of them. The model's modules are
    left in the modes that they were in, also when this raises. Raises ValueError for a loader
    without batches.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = resolve_precision(precision, device)
    model.to(device)
    all_logits, all_labels = [], []
    with evaluation_mode(model), torch.inference_mode():
        for images, labels in tqdm(loader, "evaluating", disable=is_progress_hidden(), leave=False):
            with autocast(device, dtype):
                all_logits.append(model(move_images(images, device, dtype)).float())
            all_labels.append(labels)
    if isinstance(loader, LesionLoader) and loader.world_size > 1:
        all_logits, all_labels = gather_batches(all_logits, all_labels)
    if not all_labels:
        raise ValueError("the loader gave no batches to evaluate on")
    logits = torch.cat(all_logits).cpu().double()
    labels = torch.cat([labels.cpu() for labels in all_labels])
    loss = F.cross_entropy(logits, labels).item()
    return Evaluation(loss, labels.numpy(), logits.softmax(dim=1).numpy())


def train(
    model: nn.Module,
    train_loader: Batches,
    valid_loader: Batches,
    num_classes: int,
    num_steps: int,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    device: torch.device | str | None = None,
    eval_every: int = 100,
    save_path: str | Path | None = None,
    *,
    precision: str = "auto",
    resume: bool = False,
    early_stopping_patience: int = 0,
    class_weights: Sequence[float] | None = None,
    checkpoint_every: int | None = None,
    accumulate: int = 1,
    compile: bool = False,
    malignant_classes: Sequence[str] = MALIGNANT,
    seed: int = 42,
) -> tuple[nn.Module, dict[str, list[float]]]:
    """Trains for `num_steps` steps, and gives the model with its best weights and the history.

    The loaders are `dataset.LesionLoader`s or any iterables of float32 images `(B, 3, H, W)` in
    [0, 1] and labels, int64 `(B,)` or in training also float `(B, num_classes)`; a training loader
    that ends is begun again. The scheduler is stepped once a training step (`ReduceLROnPlateau`
    once an evaluation, with the validation loss).

    Every `eval_every` steps and at the end the model is evaluated on all of `valid_loader`. The
    best weights are those of the highest balanced accuracy, ties by the lower loss; after
    `early_stopping_patience` evaluations without a better one training ends (0 is never).

    In a process group (`torch.distributed.init_process_group`) the processes train one model
    together, each on the part of the data that its loaders give it; that of rank 0 writes.

    Parameters
    ----------
    precision : "auto", "fp32", "bf16" or, on CUDA, "fp16"; see `resolve_precision`
    resume : go on from `last.pth` in `save_path` if there is one; needs a LesionLoader
    class_weights : `num_classes` factors of the loss, by true class
    checkpoint_every : steps between writings of `last.pth`; None is every five minutes
    accumulate : batches a step, whose gradients are averaged: large batches in small memory
    compile : whether to run the training steps through `torch.compile`
    malignant_classes : names of classes, all others being benign; by default those known as
        malignant, and classes that are not known have no part in the thresholds of `model.pth`
    seed : decides dropout; the data have their own seed in the loader

    Returns
    -------
    The model in evaluation mode, and a dict of equally long lists, an entry an evaluation: `step`
    (steps done), `learning_rate`, `train_loss` (mean since the last entry), `valid_loss`,
    `valid_precision`, `valid_recall`, `valid_f1`, `valid_balanced_accuracy`, `images_per_second`.

    In `save_path`, if given: `model.pth` (the best weights, for `models.load_model`, with the
    calibration and the thresholds that validation gave), `last.pth` (all that is needed to resume)
    and `history.csv`.

    SIGINT (Ctrl-C) and SIGTERM are held back until the step is done and `last.pth` is written; then
    whatever handled them before does so, by default with a KeyboardInterrupt or the end of the
    process. A second one acts at once. In other threads than the main one signals are left alone.

    Raises ValueError for arguments that cannot be, or a `last.pth` of another run, and
    NonFiniteLossError when training diverges.
    """
    _check_arguments(num_steps, eval_every, early_stopping_patience, checkpoint_every, accumulate)
    check_seed(seed)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = resolve_precision(precision, device)
    model.to(device, memory_format=memory_format_for(device, dtype))
    criterion = _make_criterion(class_weights, num_classes).to(device)
    class_names = _class_names(valid_loader, num_classes)
    counted = counted_as(class_names, malignant_classes)
    shifted = class_weights is not None or getattr(train_loader, "balanced", False)
    rank, world_size = get_rank(), get_world_size()
    if world_size > 1 and not is_distributed():
        raise ValueError(
            f"torchrun started {world_size} processes; call torch.distributed.init_process_group "
            "before train, so that they train one model"
        )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    checkpoint = None
    progress = Progress()
    if save_path is not None:
        settings = {
            "num_steps": num_steps,
            "eval_every": eval_every,
            "early_stopping_patience": early_stopping_patience,
            "class_weights": None if class_weights is None else [float(w) for w in class_weights],
            "precision": str(dtype),
            "accumulate": accumulate,
            "world_size": world_size,
            "seed": seed,
        } | describe_run(model, optimizer, scheduler, train_loader, valid_loader, num_steps)
        checkpoint = Checkpoint(Path(save_path), model, optimizer, scheduler, scaler, settings)
    if resume:
        progress = _resume(checkpoint, train_loader)
    if rank > 0:
        checkpoint = None  # the first process writes for all

    batches = _endless_batches(train_loader, progress.step * accumulate)
    model.train()
    forward = _make_forward(model, device, compile)
    together = Agreement()
    window, next_checkpoint = _Window(progress), time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS
    with (
        own_random_state(device),
        fastest_convolutions(),
        _saying_what_is_kept(save_path, progress),
        _StepBar(num_steps, progress) as bar,
        StopSignals() as signals,
    ):
        while not progress.is_over(num_steps, early_stopping_patience):
            if not progress.is_evaluation_due(eval_every, num_steps):
                progress.learning_rate = optimizer.param_groups[0]["lr"]
                torch.manual_seed(derive_seed(seed, "dropout", progress.step, rank))
                losses, num_images = [], 0
                for images, labels in itertools.islice(batches, accumulate):
                    is_last = len(losses) == accumulate - 1
                    with gradient_exchange(forward, is_last):
                        with autocast(device, dtype):
                            logits = forward(move_images(images, device, dtype))
                        loss = criterion(logits.float(), labels.to(device)) / accumulate
                        scaler.scale(loss).backward()
                    losses.append(loss.detach())
                    num_images += len(images) * world_size
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step()
                progress.step += 1
                window.add(progress, torch.stack(losses).sum(), num_images)
                bar.update(window)

            evaluation = None
            if progress.is_evaluation_due(eval_every, num_steps):
                train_loss, speed = window.mean_loss(), window.images_per_second()
                _check_weights(model, progress)
                share_buffers(model)
                with signals.skippable():
                    evaluation = evaluate(model, valid_loader, device=device, precision=precision)
            if evaluation is not None:
                metrics = _summarise(evaluation, class_names, progress)
                is_best = progress.add(metrics, train_loss, speed)
                if is_best:
                    progress.best_state = _copy_to_cpu(model.state_dict())
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(evaluation.loss)
                if checkpoint is not None:
                    checkpoint.save_history(progress)
                    if is_best:
                        fitted = _fit_outputs(evaluation, class_names, counted, shifted)
                        fitted["precision"] = name_of_precision(dtype)
                        checkpoint.save_best(progress, valid_loader, class_names, fitted)
                bar.log(progress)
                window = _Window(progress)

            is_late = time.monotonic() > next_checkpoint
            stopping, is_due = together.largest(signals.received, is_late)
            if stopping:
                signals.received = stopping
                break
            if checkpoint_every is not None:
                is_due = progress.step % checkpoint_every == 0
            if is_due:
                seconds = _save_last(checkpoint, model, progress, window)
                pause = max(SECONDS_BETWEEN_CHECKPOINTS, 100 * seconds)  # a slow disk costs 1 % too
                next_checkpoint = time.monotonic() + pause
        _save_last(checkpoint, model, progress, window)
        together.wait()  # if one process ended while the first still writes, torchrun would end it
    model.load_state_dict(progress.best_state)
    return model.eval(), progress.history


class _Window:
    """The training steps since the last evaluation, those of a run that is resumed among them."""

    def __init__(self, progress: Progress) -> None:
        self.losses_before = progress.recent_losses
        self.num_images = progress.recent_images
        self.started = time.monotonic() - progress.recent_seconds
        self.steps: list[tuple[int, float]] = []
        self.losses: list[Tensor] = []  # they stay on the device: reading one waits for it

    def add(self, progress: Progress, loss: Tensor, num_images: int) -> None:
        self.steps.append((progress.step, progress.learning_rate))
        self.losses.append(loss)
        self.num_images += num_images

    def all_losses(self) -> list[float]:
        """The losses, means over the processes; NonFiniteLossError for the first that is no number.

        All processes call this together, and all of them raise.
        """
        losses = mean_over_processes(torch.stack(self.losses)).tolist() if self.losses else []
        for (step, learning_rate), loss in zip(self.steps, losses, strict=True):
            if not math.isfinite(loss):
                raise _diverged(f"the training loss is {loss}", step, learning_rate)
        return self.losses_before + losses

    def mean_loss(self) -> float:
        return float(np.mean(self.all_losses()))

    def images_per_second(self) -> float:
        return self.num_images / (time.monotonic() - self.started)

    def pause(self, progress: Progress) -> None:
        """Leaves in `progress` what another window needs to go on where this one is."""
        progress.recent_losses = self.all_losses()
        progress.recent_images = self.num_images
        progress.recent_seconds = time.monotonic() - self.started


class _StepBar:
    """A progress bar over steps with loss, learning rate and the last validation."""

    def __init__(self, num_steps: int, progress: Progress) -> None:
        self._num_steps = num_steps
        self._bar = tqdm(
            total=num_steps,
            initial=progress.step,
            desc="training",
            unit="step",
            disable=is_progress_hidden(),
            leave=False,
        )
        self._shown = time.monotonic()
        self._validation = ""

    def __enter__(self) -> "_StepBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, window: _Window) -> None:
        self._bar.update()
        if not self._bar.disable and time.monotonic() - self._shown > 1:
            learning_rate, loss = window.steps[-1][1], window.losses[-1].item()
            self._bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.1e}{self._validation}")
            self._shown = time.monotonic()

    def log(self, progress: Progress) -> None:
        """One line on the last evaluation, to the log and from then on beside the bar."""
        last = {name: values[-1] for name, values in progress.history.items()}
        self._validation = f", valid balanced accuracy {last['valid_balanced_accuracy']:.3f}"
        logger.info(
            "step %d/%d: train loss %.3f, valid loss %.3f, precision %.3f, recall %.3f, "
            "balanced accuracy %.3f, %.1f images/s%s",
            last["step"],
            self._num_steps,
            last["train_loss"],
            last["valid_loss"],
            last["valid_precision"],
            last["valid_recall"],
            last["valid_balanced_accuracy"],
            last["images_per_second"],
            " (best)" if progress.evaluations_since_best == 0 else "",
        )


@contextlib.contextmanager
def _saying_what_is_kept(save_path: str | Path | None, progress: Progress) -> Iterator[None]:
    """Adds to a NonFiniteLossError which files hold the training from before it."""
    try:
        yield
    except NonFiniteLossError as error:
        if save_path is None:
            raise
        kept = "no checkpoint had been written before"
        if progress.saved_step:
            kept = f"{Path(save_path) / 'last.pth'} is that of step {progress.saved_step}"
        if progress.best_metrics:
            best = progress.best_metrics["step"]
            kept += f", {Path(save_path) / 'model.pth'} the best, of step {best}"
        raise NonFiniteLossError(f"{error}; {kept}") from None


def _diverged(what: str, step: int, learning_rate: float) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{what} at step {step} (learning rate {learning_rate:.3g}); try a smaller "
        "--learning_rate, or --precision fp32"
    )


def _check_weights(model: nn.Module, progress: Progress) -> None:
    """Raises NonFiniteLossError for weights or statistics that are not finite.

    The loss of a step is from before its update, and that of validation may hide an infinity.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _diverged(f"{name} is not finite", progress.step, progress.learning_rate)


def _save_last(
    checkpoint: Checkpoint | None, model: nn.Module, progress: Progress, window: _Window
) -> float:
    """Writes `last.pth` in the first process, and gives the seconds; all call it together."""
    started = time.monotonic()
    window.pause(progress)
    _check_weights(model, progress)
    progress.saved_step = progress.step
    if checkpoint is not None:
        checkpoint.save_last(progress)
    return time.monotonic() - started


def _check_arguments(
    num_steps: int,
    eval_every: int,
    early_stopping_patience: int,
    checkpoint_every: int | None,
    accumulate: int,
) -> None:
    counts = {"num_steps": num_steps, "eval_every": eval_every, "accumulate": accumulate}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be 1 or more")
    if early_stopping_patience < 0:
        raise ValueError(
            f"early_stopping_patience is {early_stopping_patience}; it must be 0 (off) or more"
        )
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}; it must be 1 or more, or None")


def _resume(checkpoint: Checkpoint | None, train_loader: Batches) -> Progress:
    if checkpoint is None:
        raise ValueError("resume needs the save_path in which the run to go on with was saved")
    if not isinstance(train_loader, LesionLoader):
        raise ValueError(
            "resume needs a LesionLoader (create_dataloaders): another training loader cannot go "
            "on where it stopped"
        )
    return checkpoint.restore()


def _make_criterion(class_weights: Sequence[float] | None, num_classes: int) -> nn.CrossEntropyLoss:
    if class_weights is None:
        return nn.CrossEntropyLoss()
    weights = torch.as_tensor(class_weights, dtype=torch.float32)
    if weights.shape != (num_classes,) or not (weights.isfinite() & (weights > 0)).all():
        raise ValueError(f"class_weights must be {num_classes} numbers greater than 0")
    return nn.CrossEntropyLoss(weight=weights)


def _class_names(loader: Batches, num_classes: int) -> list[str]:
    names = getattr(getattr(loader, "dataset", None), "classes", None)
    if names is None:
        return [str(label) for label in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(f"num_classes is {num_classes}, but the data have {len(names)} classes")
    return [str(name) for name in names]


def _endless_batches(loader: Batches, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    return loader.batches(start) if isinstance(loader, LesionLoader) else _repeat(loader)


def _repeat(loader: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("the training loader gave no batches (any more)")


def _make_forward(model: nn.Module, device: torch.device, compile: bool) -> Callable:
    """The model as the training steps call it."""
    forward = model
    if compile:
        # On a GPU a small batch's kernels are done before the next is launched, so that launching
        # is what takes the time: "reduce-overhead" records them as CUDA graphs.
        forward = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None)
    if get_world_size() > 1:  # last, as `gradient_exchange` must see it
        devices = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, devices, gradient_as_bucket_view=True)
    return forward


def _summarise(
    evaluation: Evaluation, class_names: list[str], progress: Progress
) -> dict[str, Any]:
    if not math.isfinite(evaluation.loss):
        what = f"the validation loss is {evaluation.loss}"
        raise _diverged(what, progress.step, progress.learning_rate)
    metrics = compute_metrics(evaluation.labels, evaluation.probabilities, class_names)
    return {"step": progress.step, "loss": evaluation.loss} | metrics


def _fit_outputs(
    evaluation: Evaluation,
    class_names: list[str],
    counted: dict[str, list[str]],
    priors_shifted: bool,
) -> dict[str, Any]:
    """What turns the model's outputs into probabilities and alarms, from the validation images.

    `counted` is what `counted_as` gives for the classes.
    """
    y_true, y_prob = evaluation.labels, evaluation.probabilities
    calibration = fit_calibration(y_true, y_prob, priors_shifted=priors_shifted)
    calibrated = calibration.apply(y_prob)
    kinds = (class_names, counted["malignant"], counted["unknown"])
    scores = screening_scores(y_true, calibrated, *kinds)
    return {
        "temperature": calibration.temperature,
        "bias": list(calibration.bias),
        "thresholds": {name: choose_thresholds(*scores[name]) for name in scores},
        "malignant_classes": counted["malignant"],
        "unknown_classes": counted["unknown"],
    }


def _copy_to_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
