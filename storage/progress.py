"""Shows the progress of long work: bars on a terminal, elsewhere a line every minute.

Both go to stderr. A `RunProgress` is one line over all stages of a run, with the time left over all
of them; a `ProgressBar` is the bar of one piece of work, below that line where there is one.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_UPDATES = 1.0  # of the line over all stages on a terminal


class ProgressBar:
    """Shows how much of a piece of work is done, and how long the rest will take.

    It is an iterator over `items`, or is told by `update` of what is done, in a `with` block. On a
    terminal it is a bar that disappears at the end; elsewhere it prints a line every minute, unless
    a `RunProgress` does so.

    Parameters
    ----------
    items : what to iterate over; None where `update` is called instead
    name : what is being done, such as "preparing images"
    total : the number of items, by default `len(items)`
    initial : how many of them were done before
    is_shown : False to show nothing
    clock : gives the time in seconds
    options : further arguments of tqdm
    """

    def __init__(
        self,
        items: Iterable | None = None,
        name: str = "",
        total: int | None = None,
        *,
        initial: int = 0,
        is_shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> None:
        if total is None and items is not None:
            with contextlib.suppress(TypeError):  # an iterator, or a loader that does not know
                total = len(items)  # type: ignore[arg-type]
        self.name, self.total, self.initial, self.num_done = name, total, initial, initial
        self._items, self._clock, self._run = items, clock, _current_run.get()
        self._prints = is_shown and self._run is None
        self._started = self._last_line = clock()
        disable = None if is_shown else True  # None: where stderr is not a terminal
        self._bar = tqdm(
            desc=name, total=total, initial=initial, leave=False, disable=disable, **options
        )

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._items or ():
                yield item
                self.update()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def update(self, count: int = 1) -> bool:
        """Counts items that are done; returns whether the bar on the terminal was drawn again."""
        self.num_done += count
        if self.total and self._run is not None:
            self._run.follow(self.name, self.initial / self.total, self.num_done / self.total)
        if self._bar.disable and self._prints:
            now = self._clock()
            if now - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line = now
                _print_line(self.describe())
        return bool(self._bar.update(count))

    def set_postfix(self, text: str) -> None:
        """Shows a text at the end of the bar on the terminal."""
        self._bar.set_postfix_str(text)

    def describe(self) -> str:
        """Returns the line that is printed where there is no terminal."""
        if not self.total:
            return f"{self.name}: {self.num_done:,} done"
        seconds = self._clock() - self._started
        left = seconds * (self.total - self.num_done) / max(self.num_done - self.initial, 1)
        percent = 100 * self.num_done / self.total
        return f"{self.name}: {percent:.0f} %, about {format_time_left(left)} left"


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    `subject` is what it belongs to, such as "resnet_head (2 of 4)". The progress within it is that
    of the `ProgressBar` of the same `name`, if there is one. Stages of one `kind` take as long as
    their `work` says, in any unit.
    """

    subject: str
    name: str
    kind: str
    work: float = 1.0

    def __str__(self) -> str:
        return f"{self.subject}: {self.name}" if self.subject else self.name


class RunProgress:
    """Shows one line over all stages of a run, with the time left over all of them.

    The time left is estimated from what is known by then: for the present stage from its own pace,
    for later ones from the pace of the stages of their kind so far, and before there are any from
    `guesses`, seconds per unit of work by kind. It is unknown while neither is there.

    In its `with` block a thread updates the line every second on a terminal, and prints one every
    minute elsewhere, so that it shows life whatever the program is doing.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        guesses: Mapping[str, float] | None = None,
        *,
        is_shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stages, self.guesses = list(stages), dict(guesses or {})
        self._clock, self._is_shown = clock, is_shown
        self._number = -1  # of the present stage
        self._first, self._fraction = 0.0, 0.0  # of the present stage: when it began, and now
        self._seconds: dict[str, float] = {}  # by kind, of the stages that have ended
        self._work: dict[str, float] = {}
        self._started = self._stage_started = self._last_line = clock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "RunProgress":
        self._token = _current_run.set(self)
        self._bar = tqdm(
            total=1.0, leave=False, disable=None if self._is_shown else True, bar_format="{desc}"
        )
        if self._is_shown:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        self._bar.close()
        _current_run.reset(self._token)

    def next_stage(self) -> None:
        """Ends the present stage and begins the next one."""
        now = self._clock()
        if self._number >= 0:
            stage = self.stages[self._number]
            share = self._fraction - self._first if self._fraction else 1.0
            self._seconds[stage.kind] = self._seconds.get(stage.kind, 0) + now - self._stage_started
            self._work[stage.kind] = self._work.get(stage.kind, 0) + stage.work * share
        self._number += 1
        self._stage_started, self._first, self._fraction = now, 0.0, 0.0
        self.show()

    def follow(self, name: str, first: float, fraction: float) -> None:
        """Takes note of how much of a bar is done, if it is that of the present stage.

        It began at `first`, which is above 0 where a stage continues what an earlier run has begun.
        """
        if 0 <= self._number < len(self.stages) and self.stages[self._number].name == name:
            self._first, self._fraction = first, fraction

    def seconds_left(self) -> float | None:
        """Returns the seconds until all stages are done, None where there is nothing to go by."""
        if self._number < 0:
            return None
        stage, elapsed = self.stages[self._number], self._clock() - self._stage_started
        share = self._fraction - self._first
        seconds = dict(self._seconds)
        work = dict(self._work)
        if share > 0:
            left = elapsed * (1 - self._fraction) / share
            seconds[stage.kind] = seconds.get(stage.kind, 0) + elapsed
            work[stage.kind] = work.get(stage.kind, 0) + stage.work * share
        paces = self.guesses | {kind: seconds[kind] / work[kind] for kind in work if work[kind] > 0}
        rest = self.stages[self._number + 1 :]
        if not {each.kind for each in rest} <= paces.keys():
            return None
        if share <= 0:
            if stage.kind not in paces:
                return None
            left = max(paces[stage.kind] * stage.work - elapsed, 0.0)
        return left + sum(paces[each.kind] * each.work for each in rest)

    def fraction(self) -> float | None:
        """Returns the share of the whole time that has passed, None where that is unknown."""
        left = self.seconds_left()
        elapsed = self._clock() - self._started
        return None if left is None else elapsed / max(elapsed + left, 1e-9)

    def describe(self) -> str:
        """Returns the line that is printed where there is no terminal."""
        text = str(self.stages[self._number])
        if self._fraction:
            text += f" {100 * self._fraction:.0f} %"
        left, fraction = self.seconds_left(), self.fraction()
        if left is None or fraction is None:
            return text
        return f"{text}; whole run {100 * fraction:.0f} %, about {format_time_left(left)} left"

    def show(self) -> None:
        """Draws the line again on a terminal; elsewhere prints it once a minute has passed."""
        if self._number < 0 or not self._is_shown:
            return
        if not self._bar.disable:
            left, fraction = self.seconds_left(), self.fraction()
            text = str(self.stages[self._number]).replace("{", "{{").replace("}", "}}")
            if left is not None and fraction is not None:
                text += f" {100 * fraction:3.0f}%|{{bar:20}}| about {format_time_left(left)} left"
                text += " for the run"
            self._bar.n = fraction or 0.0
            self._bar.bar_format = text
            self._bar.refresh()
        elif self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            _print_line(self.describe())

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_UPDATES):
            self.show()


_current_run: ContextVar[RunProgress | None] = ContextVar("current_run", default=None)


def format_time_left(seconds: float) -> str:
    """Returns a duration in words, as exact as an estimate is: "40 s", "12 min", "2 h 05 min"."""
    if seconds < 59.5:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def print_beside_bars(text: str, *, to_stderr: bool = False) -> None:
    """Prints a line without breaking the bars on the terminal."""
    stream = sys.stderr if to_stderr else sys.stdout
    tqdm.write(text, file=stream)
    stream.flush()


def _print_line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
