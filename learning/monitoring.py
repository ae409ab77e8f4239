"""What is watched while a model trains: losses, weights and speed."""

import math
import time

import torch
from torch import Tensor, nn

from learning.checkpoints import Progress
from learning.distributed import mean_over_processes


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
    """The training steps since the last evaluation, some of which `progress` may hold already."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.restart()

    def restart(self) -> None:
        """Begins to measure time, and drops all steps that `progress` does not hold."""
        self.started = time.monotonic()
        self.steps: list[tuple[int, float]] = []
        self.losses: list[Tensor] = []  # they stay on the device: reading one waits for it

    def add(self, loss: Tensor, num_images: int) -> None:
        """Adds the step just done, with its mean loss and its number of images."""
        self.steps.append((self.progress.step, self.progress.learning_rate))
        self.losses.append(loss)
        self.progress.recent_images += num_images

    def pause(self, model: nn.Module) -> None:
        """Moves losses, as means over the processes, which call this together, to `progress`.

        All of them raise NonFiniteLossError for the first loss that is not finite, and each for
        weights that the steps have left not finite.
        """
        if self.losses:
            losses = mean_over_processes(torch.stack(self.losses)).tolist()
            for (step, learning_rate), loss in zip(self.steps, losses, strict=True):
                if not math.isfinite(loss):
                    raise diverged(f"the training loss is {loss}", step, learning_rate)
            check_weights(model, self.progress)
            self.progress.recent_losses += losses
        self.progress.recent_seconds += time.monotonic() - self.started
        self.restart()

    def describe(self) -> str:
        """Returns the last step's loss and learning rate, and the last evaluation, in short."""
        validation = ""
        if self.progress.history:
            accuracy = self.progress.history["valid_balanced_accuracy"][-1]
            validation = f", valid balanced accuracy {accuracy:.3f}"
        return f"loss {self.losses[-1].item():.3f}, lr {self.steps[-1][1]:.1e}{validation}"
