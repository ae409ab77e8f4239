"""What is watched while a model trains: losses, weights and speed, and the progress bar."""

import logging
import math
import time

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from learning.checkpoints import Progress
from learning.distributed import is_progress_hidden, mean_over_processes


class NonFiniteLossError(ValueError):
    """A loss or weight that is infinite or not a number: training has diverged."""


def diverged(what: str, step: int, learning_rate: float) -> NonFiniteLossError:
    """Returns the error for this, with the step, its learning rate and advice."""
    return NonFiniteLossError(
        f"{what} at step {step} (learning rate {learning_rate:.3g}); try a smaller "
        "--learning_rate, or --precision fp32"
    )


def check_weights(model: nn.Module, progress: Progress) -> None:
    """Raises NonFiniteLossError for weights or statistics that are not finite.

    The loss of a step is from before its update, and that of validation may hide an infinity.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise diverged(f"{name} is not finite", progress.step, progress.learning_rate)


class Window:
    """The training steps since the last evaluation, those of a run that is resumed among them."""

    def __init__(self, progress: Progress) -> None:
        self.losses_before = progress.recent_losses
        self.num_images = progress.recent_images
        self.started = time.monotonic() - progress.recent_seconds
        self.steps: list[tuple[int, float]] = []
        self.losses: list[Tensor] = []  # they stay on the device: reading one waits for it

    def add(self, progress: Progress, loss: Tensor, num_images: int) -> None:
        """Adds a step, with its mean loss and its number of images."""
        self.steps.append((progress.step, progress.learning_rate))
        self.losses.append(loss)
        self.num_images += num_images

    def all_losses(self) -> list[float]:
        """Returns the losses, means over the processes, which call this together.

        All of them raise NonFiniteLossError for the first loss that is not finite.
        """
        losses = mean_over_processes(torch.stack(self.losses)).tolist() if self.losses else []
        for (step, learning_rate), loss in zip(self.steps, losses, strict=True):
            if not math.isfinite(loss):
                raise diverged(f"the training loss is {loss}", step, learning_rate)
        return self.losses_before + losses

    def mean_loss(self) -> float:
        """Returns the mean of `all_losses`."""
        return float(np.mean(self.all_losses()))

    def images_per_second(self) -> float:
        """Returns the speed of training since the last evaluation."""
        return self.num_images / (time.monotonic() - self.started)

    def pause(self, progress: Progress) -> None:
        """Stores in `progress` what another window needs to go on where this one is."""
        progress.recent_losses = self.all_losses()
        progress.recent_images = self.num_images
        progress.recent_seconds = time.monotonic() - self.started


class StepBar:
    """A progress bar over steps with loss, learning rate and the last validation."""

    def __init__(self, num_steps: int, progress: Progress, logger: logging.Logger) -> None:
        self._num_steps = num_steps
        self._logger = logger
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

    def __enter__(self) -> "StepBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, window: Window) -> None:
        """Moves on by one step, and shows its loss about once a second."""
        self._bar.update()
        if not self._bar.disable and time.monotonic() - self._shown > 1:
            learning_rate, loss = window.steps[-1][1], window.losses[-1].item()
            self._bar.set_postfix_str(f"loss {loss:.3f}, lr {learning_rate:.1e}{self._validation}")
            self._shown = time.monotonic()

    def log(self, progress: Progress) -> None:
        """Logs the last evaluation in one line, and shows it beside the bar from then on."""
        last = {name: values[-1] for name, values in progress.history.items()}
        self._validation = f", valid balanced accuracy {last['valid_balanced_accuracy']:.3f}"
        self._logger.info(
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
