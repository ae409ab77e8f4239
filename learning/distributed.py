"""Several processes that train one model: exchanges between them, stopping together."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from learning.hardware import choose_device
from learning.processes import default_signals, get_rank, get_world_size, torchrun_variable
from storage.progress import ProgressBar

SECONDS_BETWEEN_EXCHANGES = 0.5


def progress_bar(
    items: Iterable | None = None, name: str = "", total: int | None = None, **options: Any
) -> ProgressBar:
    """Returns a `ProgressBar` that the first process alone shows."""
    return ProgressBar(items, name, total, is_shown=get_rank() == 0, **options)


def gradient_exchange(forward: Callable, is_due: bool) -> contextlib.AbstractContextManager:
    """Returns the context of a backward pass, in which processes exchange gradients if due."""
    if isinstance(forward, DistributedDataParallel) and not is_due:
        return forward.no_sync()
    return contextlib.nullcontext()


def share_buffers(model: nn.Module) -> None:
    """Gives all processes the batch-norm statistics of the first."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def mean_over_processes(values: Tensor) -> Tensor:
    """Returns the means of each value over all processes, which call it together."""
    if get_world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / get_world_size()


class Agreement:
    """Lets all processes stop or write after the same step.

    They ask each other every so many steps, as asking takes time, and agree on how many: those of
    the slowest in half a second. They do it with gloo, which never waits for a GPU.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if get_world_size() > 1 else None
        self._steps_left = self._steps = 1
        self._asked = time.monotonic()

    def largest(self, *numbers: int) -> list[int]:
        """Returns each number's maximum over the processes; zeros after a step without asking."""
        if self._group is None:
            return list(numbers)
        self._steps_left -= 1
        if self._steps_left > 0:
            return [0] * len(numbers)
        microseconds = int(1e6 * (time.monotonic() - self._asked) / self._steps)
        shared = torch.tensor([*numbers, microseconds])
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        *largest, microseconds = shared.tolist()
        self._steps = max(int(1e6 * SECONDS_BETWEEN_EXCHANGES / max(microseconds, 1)), 1)
        self._steps_left, self._asked = self._steps, time.monotonic()
        return largest

    def wait(self) -> None:
        """Waits until all processes have called this."""
        if self._group is not None:
            dist.barrier(group=self._group)


def gather_batches(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Returns the logits and labels of all processes, on the CPU, in the order of their ranks."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [(logits.cpu(), labels.cpu()) for logits, labels in batches])
    return [batch for part in parts for batch in part]


def choose_own_device(name: str) -> torch.device:
    """Returns the device of this process: of several processes, each has a GPU of its own."""
    if get_world_size() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{torchrun_variable('LOCAL_RANK', 0)}"
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, for the block; a single one needs no group."""
    if get_world_size() == 1:
        yield
        return
    # Joining waits in C++ for up to half an hour, where Python's handlers are not heard.
    with default_signals():
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()  # after an error torchrun ends the others instead
