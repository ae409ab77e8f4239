"""The processes that train together, and the signals that stop one; without torch."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SECONDS_OF_ONE_SIGNAL = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_distributed() -> bool:
    """Returns whether `torch.distributed.init_process_group` has been called."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def get_rank() -> int:
    """Returns the number of this process: in its process group, or else as torchrun started it."""
    return _of_group("get_rank") if is_distributed() else torchrun_variable("RANK", 0)


def get_world_size() -> int:
    """Returns the number of processes: in the process group, or else that torchrun started."""
    return _of_group("get_world_size") if is_distributed() else torchrun_variable("WORLD_SIZE", 1)


def is_first_process() -> bool:
    """Returns whether this process prints, draws and writes for all."""
    return get_rank() == 0


def torchrun_variable(name: str, default: int) -> int:
    """Returns RANK, WORLD_SIZE or LOCAL_RANK; the default where torchrun did not start this."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default


def _of_group(function: str) -> int:
    return getattr(sys.modules["torch.distributed"], function)()


class Stopped(KeyboardInterrupt):
    """Raised for a signal that ends the program: SIGINT (Ctrl-C) or SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signal.Signals(signum)


class StopSignals:
    """Handles SIGINT (Ctrl-C) and SIGTERM in a `with` block, in the main thread.

    With `at_once` the first signal raises Stopped, and a second one ends the process. Otherwise the
    first is kept in `received`, 0 before, and passed to the former handler at the end of the block;
    a second one is passed to it at once. Signals less than a second after the first do not count:
    timeout(1) and torchrun send two.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.received = 0
        self._at_once = at_once
        self._raises = at_once
        self._first_at: float | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._former = _set_handlers(self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        _restore_handlers(self._former)
        if self.received and kind is None:
            self._pass_on(self.received)

    @contextlib.contextmanager
    def skippable(self) -> Iterator[None]:
        """Has the first signal end this block at once, without an exception.

        For work that can be done again. Of several processes none ends its block, as the others
        would wait for it in theirs.
        """
        self._raises = get_world_size() == 1
        try:
            yield
        except KeyboardInterrupt:
            if not self.received:
                raise
        finally:
            self._raises = self._at_once

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._first_at is None:
            self._first_at = time.monotonic()
            self.received = 0 if self._at_once else signum
            if self._raises:
                raise Stopped(signum)
        elif time.monotonic() - self._first_at > SECONDS_OF_ONE_SIGNAL:
            _restore_handlers(self._former)
            self._pass_on(signum)

    def _pass_on(self, signum: int) -> None:
        handler = signal.SIG_DFL if self._at_once else self._former.get(signum)
        if callable(handler):
            handler(signum, None)
        elif handler is signal.SIG_DFL:
            signal.signal(signum, handler)
            signal.raise_signal(signum)
        raise KeyboardInterrupt  # the block has ended, whatever a handler of the user's does


@contextlib.contextmanager
def default_signals() -> Iterator[None]:
    """Lets SIGINT and SIGTERM end the process in the block, also while it waits in C++."""
    former = _set_handlers(signal.SIG_DFL)
    try:
        yield
    finally:
        _restore_handlers(former)


def _set_handlers(handler: Callable | signal.Handlers) -> dict[int, Any]:
    """Sets the handler of both signals, and returns the former ones of those that were set."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    # None is a handler that is not Python's, and whoever ignores a signal means it.
    replaced = [s for s in STOP_SIGNALS if signal.getsignal(s) not in (None, signal.SIG_IGN)]
    return {signum: signal.signal(signum, handler) for signum in replaced}


def _restore_handlers(former: dict[int, Any]) -> None:
    for signum, handler in former.items():
        signal.signal(signum, handler)


def exit_with_launcher() -> None:
    """Has Linux send SIGTERM when torchrun is killed, which cannot stop its processes then."""
    if get_world_size() > 1 and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG in <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
