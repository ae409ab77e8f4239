"""Optimiser, schedule, loop; `train` and `evaluate`.

The history that `train` returns is a dict of equally long lists, an entry for each evaluation:
`step` (steps done), `learning_rate`, `train_loss` (mean since the last entry), `valid_loss`,
`valid_precision`, `valid_recall`, `valid_f1`, `valid_balanced_accuracy`, `images_per_second`.

It writes to `save_path`, if given: `model.pth` (the best weights, for `models.load_model`, with the
calibration and the thresholds from validation), `last.pth` (all that is needed to resume) and
`history.csv`.

In a process group (`torch.distributed.init_process_group`) the processes train one model together,
each on the part of the data that its loaders give it; the first one writes for all.

SIGINT (Ctrl-C) and SIGTERM are held back until the step is done and `last.pth` is written; then
they go to the handler from before, which by default raises KeyboardInterrupt or ends the process.
A second one acts at once. Signals are left alone in other threads than the main one.
"""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from dataset import LesionLoader, derive_seed
from evaluation import MALIGNANT, Evaluation, compute_metrics
from imaging.batches import Inputs
from imaging.splits import check_at_least
from learning.checkpoints import Batches, OnBest, Plan, Progress, Run
from learning.distributed import (
    SECONDS_BETWEEN_EXCHANGES,
    Agreement,
    gather_batches,
    gradient_exchange,
    mean_over_processes,
    progress_bar,
    share_buffers,
)
from learning.hardware import (
    PRECISIONS,
    choose_device,
    compute_logits,
    fastest_convolutions,
    memory_format_for,
    name_of_precision,
    resolve_precision,
    resolve_training_precision,
)
from learning.losses import Criterion, describe_criterion, make_criterion
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


def _diverged(what: str, step: int, learning_rate: float) -> NonFiniteLossError:
    """Returns the error for this, with the step, its learning rate and advice."""
    return NonFiniteLossError(
        f"{what} at step {step} (learning rate {learning_rate:.3g}); try a smaller "
        "--learning_rate, or --precision fp32"
    )


def make_optimizer(
    model: nn.Module, learning_rate: float = 1e-3, weight_decay: float = 1e-4
) -> AdamW:
    """Returns AdamW (Loshchilov and Hutter 2019) for the parameters that are not frozen.

    It decays what is multiplied with features, the tensors of two or more dimensions, but neither
    biases nor normalisation weights. Raises ValueError for a rate that is not above 0, a negative
    decay, or a model without trainable parameters.
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be greater than 0, not {learning_rate}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0, not {weight_decay}")
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
    """Returns linear warm-up and cosine decay (Loshchilov and Hutter 2017), for each training step.

    With the optimizer's rate as the peak p, N = `num_steps` and w = round(N * warmup_fraction):
    p/10 + (p - p/10) s/w for s < w, then p/100 + (p - p/100) (1 + cos(pi (s - w)/(N - 1 - w))) / 2,
    for steps s = 0 … N - 1; past the end it stays. Raises ValueError for fewer than one step or a
    fraction outside [0, 1].
    """
    check_at_least(1, num_steps=num_steps)
    if not 0 <= warmup_fraction <= 1:
        raise ValueError(f"warmup_fraction must be from 0 to 1, not {warmup_fraction}")
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
    """Returns the model's loss and probabilities on all images of a loader, in evaluation mode.

    `loader` gives batches of float32 images `(B, 3, H, W)` in [0, 1] and int64 labels `(B,)`; in
    place of the images, also a dict of `images` and further inputs of the model. `device` is where
    the model is moved to, by default where it is. Of several processes whose LesionLoaders share
    the images, each gets the result on all of them. The model's modules keep their training or
    evaluation mode, also when this raises. Raises ValueError for a loader without batches.
    """
    device = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = resolve_precision(precision, device)
    model.to(device)
    batches = []
    with evaluation_mode(model), torch.inference_mode():
        for inputs, labels in progress_bar(loader, "evaluating", unit="batch"):
            batches.append((compute_logits(model, inputs, device, dtype), labels))
    if isinstance(loader, LesionLoader) and loader.world_size > 1:
        batches = gather_batches(batches)
    if not batches:
        raise ValueError("the loader yielded no batches to evaluate on")
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    logits = logits.double()
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
    criterion: str | Criterion = "cross_entropy",
    on_best: OnBest | None = None,
) -> tuple[nn.Module, dict[str, list[float]]]:
    """Trains for `num_steps` steps; returns the model with its best weights, and the history.

    The loaders give batches as for `evaluate`, in training also with float labels `(B,
    num_classes)`; a training loader that ends is begun again. The scheduler is stepped after every
    training step (`ReduceLROnPlateau` after every evaluation, with the validation loss). The model
    is evaluated every `eval_every` steps and at the end; `evaluation.best_evaluation` says which is
    the best. See the top of this module for files, signals and several processes.

    Further parameters: `precision`, see `resolve_training_precision`. `resume` goes on from
    `last.pth` in `save_path`, if there is one; it needs a LesionLoader. `early_stopping_patience`:
    evaluations without a better one after which training ends, 0 for never. `class_weights`:
    `num_classes` factors of the loss, by true class. `checkpoint_every`: steps between writings of
    `last.pth`, None for every five minutes. `accumulate`: batches a step, whose gradients are
    averaged. `compile`: train through `torch.compile`. `malignant_classes`: what `model.pth` has
    thresholds for. `seed`: of dropout. `criterion`: a name in `learning.losses.LOSSES`, or a
    function of float32 logits and labels. `on_best`: called with the model, its evaluation and its
    metrics whenever they are the best so far, in place of writing `model.pth`.

    Raises ValueError for invalid arguments or a `last.pth` of another run, and NonFiniteLossError.
    """
    plan = Plan(num_steps, eval_every, early_stopping_patience, accumulate, seed)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    dtype = resolve_training_precision(precision, device, model)
    model.to(device).to(memory_format=memory_format_for(device, dtype))
    parts = (model, train_loader, valid_loader, optimizer, scheduler, device, dtype, plan)
    class_names = _class_names(valid_loader, num_classes)
    loss = make_criterion(criterion, num_classes, class_weights, device)
    run = Run(*parts, class_names, loss, on_best, checkpoint_every, precision)
    if save_path is not None:
        described = describe_criterion(criterion)
        run.write_to(Path(save_path), described, class_weights, malignant_classes)
    if resume:
        run.restore()
    return _train(run, _make_forward(model, device, compile))


def _train(run: Run, forward: Callable[..., Tensor]) -> tuple[nn.Module, dict[str, list[float]]]:
    """Trains the model of a run whose parts are all in place; `forward` calls the model."""
    plan, progress = run.plan, run.progress
    batches = _endless_batches(run.train_loader, progress.step * plan.accumulate)
    window, agreement = _Window(progress), Agreement()
    run.next_checkpoint = time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS
    bar = progress_bar(
        name="training", total=plan.num_steps, initial=progress.step, unit="step", mininterval=1.0
    )
    run.model.train()
    with (
        torch.random.fork_rng([run.device] if run.device.type == "cuda" else []),
        fastest_convolutions(),
        _name_saved_files(run),
        bar,
        StopSignals() as signals,
    ):
        while not progress.is_over(plan):
            if not progress.is_evaluation_due(plan):
                step_batches = itertools.islice(batches, plan.accumulate)
                window.add(*_train_step(run, forward, step_batches))
                if bar.update():  # about once a second, as reading a loss waits for the device
                    bar.set_postfix(window.describe())
            if progress.is_evaluation_due(plan):
                _evaluate_and_keep(run, window, signals)
            if _stop_or_save(run, window, agreement, signals):
                break
        window.pause(run.model)
        run.save_last()
        agreement.wait()  # torchrun would end a process that still writes when another has ended
    run.model.load_state_dict(progress.best_state)
    return run.model.eval(), progress.history


class _Window:
    """The training steps since the last evaluation, some of which `progress` may hold already."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.restart()

    def restart(self) -> None:
        """Begins to measure time, and drops all steps that `progress` does not hold."""
        self.started = time.monotonic()
        # Step, learning rate and loss, which stays on the device: reading it waits for that.
        self.steps: list[tuple[int, float, Tensor]] = []

    def add(self, loss: Tensor, num_images: int) -> None:
        """Adds the step just done, with its mean loss and its number of images."""
        self.steps.append((self.progress.step, self.progress.learning_rate, loss))
        self.progress.recent_images += num_images

    def pause(self, model: nn.Module) -> None:
        """Moves losses, as means over the processes, which call this together, to `progress`.

        All of them raise NonFiniteLossError for the first loss that is not finite, and each for
        weights that the steps have left not finite.
        """
        if self.steps:
            own = torch.stack([loss for *_, loss in self.steps])
            losses = mean_over_processes(own).tolist()
            for (step, learning_rate, _), loss in zip(self.steps, losses, strict=True):
                if not math.isfinite(loss):
                    raise _diverged(f"the training loss is {loss}", step, learning_rate)
            _check_weights(model, self.progress)
            self.progress.recent_losses += losses
        self.progress.recent_seconds += time.monotonic() - self.started
        self.restart()

    def describe(self) -> str:
        """Returns the last step's loss and learning rate, and the last evaluation, in short."""
        validation = ""
        if self.progress.history:
            accuracy = self.progress.history["valid_balanced_accuracy"][-1]
            validation = f", valid balanced accuracy {accuracy:.3f}"
        _, learning_rate, loss = self.steps[-1]
        return f"loss {loss.item():.3f}, lr {learning_rate:.1e}{validation}"


def _check_weights(model: nn.Module, progress: Progress) -> None:
    """Raises NonFiniteLossError for weights or statistics that are not finite.

    The loss of a step is from before its update, and that of validation may hide an infinity.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _diverged(f"{name} is not finite", progress.step, progress.learning_rate)


def _train_step(
    run: Run, forward: Callable[..., Tensor], batches: Iterable[tuple[Inputs, Tensor]]
) -> tuple[Tensor, int]:
    """Takes one optimizer step on the batches; returns their mean loss and number of images."""
    progress, accumulate, rank = run.progress, run.plan.accumulate, get_rank()
    progress.learning_rate = run.optimizer.param_groups[0]["lr"]
    torch.manual_seed(derive_seed(run.plan.seed, "dropout", progress.step, rank))
    losses: list[Tensor] = []
    num_images = 0
    for inputs, labels in batches:
        with gradient_exchange(forward, is_due=len(losses) == accumulate - 1):
            logits = compute_logits(run.model, inputs, run.device, run.dtype, forward)
            loss = run.criterion(logits, labels.to(run.device)) / accumulate
            run.scaler.scale(loss).backward()
        losses.append(loss.detach())
        num_images += len(labels) * get_world_size()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    if run.scheduler is not None and not isinstance(run.scheduler, ReduceLROnPlateau):
        run.scheduler.step()
    progress.step += 1
    return torch.stack(losses).sum(), num_images


def _evaluate_and_keep(run: Run, window: _Window, signals: StopSignals) -> None:
    """Evaluates the model, and keeps it if it is the best, unless a signal ends the evaluation."""
    progress, evaluation = run.progress, None
    window.pause(run.model)
    share_buffers(run.model)
    with signals.skippable():
        precision = run.valid_precision
        evaluation = evaluate(run.model, run.valid_loader, device=run.device, precision=precision)
    if evaluation is None:
        return
    if not math.isfinite(evaluation.loss):
        raise _diverged(
            f"the validation loss is {evaluation.loss}", progress.step, progress.learning_rate
        )
    metrics = {"step": progress.step, "loss": evaluation.loss}
    metrics |= compute_metrics(evaluation.labels, evaluation.probabilities, run.class_names)
    is_best = progress.add(metrics)
    if isinstance(run.scheduler, ReduceLROnPlateau):
        run.scheduler.step(evaluation.loss)
    run.save_history()
    if is_best:
        weights = run.model.state_dict().items()
        progress.best_state = {name: w.detach().to("cpu", copy=True) for name, w in weights}
        run.save_best(evaluation)
    logger.info(
        "step %(step)d/%(num_steps)d: train loss %(train_loss).3f, valid loss %(valid_loss).3f, "
        "precision %(valid_precision).3f, recall %(valid_recall).3f, balanced accuracy "
        "%(valid_balanced_accuracy).3f, %(images_per_second).1f images/s%(best)s",
        {name: values[-1] for name, values in progress.history.items()}
        | {"num_steps": run.plan.num_steps, "best": " (best)" if is_best else ""},
    )
    window.restart()


def _stop_or_save(run: Run, window: _Window, agreement: Agreement, signals: StopSignals) -> bool:
    """Writes `last.pth` when it is due; returns whether a process has received a signal.

    All processes call this together.
    """
    stopping, is_due = agreement.largest(signals.received, time.monotonic() > run.next_checkpoint)
    if stopping:
        signals.received = stopping
        return True
    if run.checkpoint_every is not None:
        is_due = run.progress.step % run.checkpoint_every == 0
    if is_due:
        started = time.monotonic()
        window.pause(run.model)
        run.save_last()
        ended = time.monotonic()
        # Of the time on a slow disk, too, checkpoints take no more than a hundredth.
        run.next_checkpoint = ended + max(SECONDS_BETWEEN_CHECKPOINTS, 100 * (ended - started))
    return False


@contextlib.contextmanager
def _name_saved_files(run: Run) -> Iterator[None]:
    """Adds to a NonFiniteLossError the files that hold the training from before it."""
    try:
        yield
    except NonFiniteLossError as error:
        if run.folder is None:
            raise
        kept = "no checkpoint was written before"
        if run.progress.saved_step:
            kept = f"{run.folder / 'last.pth'} is from step {run.progress.saved_step}"
        if run.progress.best_metrics and (run.folder / "model.pth").exists():
            best = run.progress.best_metrics["step"]
            kept += f", {run.folder / 'model.pth'}, the best, from step {best}"
        raise NonFiniteLossError(f"{error}; {kept}") from None


def _class_names(loader: Batches, num_classes: int) -> list[str]:
    names = getattr(getattr(loader, "dataset", None), "classes", None)
    if names is None:
        return [str(label) for label in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(f"num_classes is {num_classes}, but the data has {len(names)} classes")
    return [str(name) for name in names]


def _endless_batches(loader: Batches, start: int) -> Iterator[tuple[Inputs, Tensor]]:
    if isinstance(loader, LesionLoader):
        yield from loader.batches(start)
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("the training loader yielded no batches")


def _make_forward(model: nn.Module, device: torch.device, compile: bool) -> Callable[..., Tensor]:
    """Returns what the training steps call in place of the model."""
    forward: Any = model
    if compile:
        # On a GPU a small batch's kernels are done before the next is launched, so that launching
        # is what takes the time: "reduce-overhead" records them as CUDA graphs.
        forward = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None)
    if get_world_size() > 1:  # last, as `gradient_exchange` must see it
        if not is_distributed():
            raise ValueError(
                f"torchrun started {get_world_size()} processes; call "
                "torch.distributed.init_process_group before train to train one model together"
            )
        devices = [device] if device.type == "cuda" else None
        forward = DistributedDataParallel(forward, devices, gradient_as_bucket_view=True)
    return forward
