"""Several processes, and the signals that stop one: ranks, exchanges, stopping together."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from learning.hardware import choose_device

SECONDS_OF_ONE_SIGNAL = 1.0
SECONDS_BETWEEN_EXCHANGES = 0.5


class Signals:
    """Holds SIGINT and SIGTERM back while it is entered; a second one acts at once.

    On leaving, the handlers are what they were before, and get the signal that was held back.
    """

    def __init__(self) -> None:
        self.noted = 0  # the number of the signal, 0 for none
        self._noted_at = 0.0
        self._is_raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                # None is a handler that is not Python's, and whoever ignores a signal means it.
                if signal.getsignal(signum) not in (None, signal.SIG_IGN):
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._restore()
        if self.noted and kind is None:
            self._deliver(self.noted)

    @contextlib.contextmanager
    def ending_this(self) -> Iterator[None]:
        """A block that can be done again, and that a signal therefore ends at once.

        Not in one process of several: the others would wait for it in theirs.
        """
        self._is_raised = get_world_size() == 1
        try:
            yield
        except KeyboardInterrupt:
            if not self.noted:
                raise
        finally:
            self._is_raised = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # timeout(1) and torchrun send a signal to the process that its group has had already.
        if self.noted and time.monotonic() - self._noted_at > SECONDS_OF_ONE_SIGNAL:
            self._restore()
            self._deliver(signum)
        if not self.noted:
            self.noted, self._noted_at = signum, time.monotonic()
        if self._is_raised:
            self._is_raised = False
            raise KeyboardInterrupt

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _deliver(self, signum: int) -> None:
        handler = self._before.get(signum)
        if callable(handler):
            handler(signum, None)
        elif handler is signal.SIG_DFL:
            signal.raise_signal(signum)
        raise KeyboardInterrupt  # the training ends, whatever a handler of the user's makes of it


def get_rank() -> int:
    """Returns the number of this process, 0 where it is the only one."""
    return dist.get_rank() if _is_distributed() else 0


def get_world_size() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if _is_distributed() else 1


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_progress_hidden() -> bool | None:
    """What tqdm's `disable` is to be: no bars but those of the first process, on a terminal."""
    return True if get_rank() > 0 else None


def gradient_exchange(forward: Callable, is_due: bool) -> contextlib.AbstractContextManager:
    """Processes exchange their gradients once a step, not after each of its batches."""
    if is_due or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


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
        self._group = dist.new_group(backend="gloo") if get_world_size() > 1 else None
        self._steps_left = self._steps = 1
        self._asked = time.monotonic()

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over the processes; zeros after a step without asking."""
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
        if self._group is not None:
            dist.barrier(group=self._group)


def gather_batches(logits: list[Tensor], labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The batches of all processes, in the order of their ranks."""
    own = ([batch.cpu() for batch in logits], [batch.cpu() for batch in labels])
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return [b for part in parts for b in part[0]], [b for part in parts for b in part[1]]


def choose_own_device(name: str, rank: int, num_processes: int) -> torch.device:
    """Returns the device of this process, which of several processes has a GPU of its own.

    `rank` is its number among the processes on this machine.
    """
    if num_processes > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{rank}"
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(device: torch.device, num_processes: int) -> Iterator[None]:
    """Joins the processes for the block, which trains one model; a single one needs no group."""
    if num_processes == 1:
        yield
        return
    # Joining waits in C++ for up to half an hour, where Python's handlers are not heard.
    stopping = (signal.SIGINT, signal.SIGTERM)
    handlers = {signum: signal.signal(signum, signal.SIG_DFL) for signum in stopping}
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    yield
    dist.destroy_process_group()  # after an error torchrun ends the others instead
