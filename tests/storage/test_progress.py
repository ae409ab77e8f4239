"""Bars and lines about long work, with a clock of the tests' own."""

import contextlib
import io
import sys
import time

import pytest

from storage.progress import (
    SECONDS_BETWEEN_LINES,
    ProgressBar,
    RunProgress,
    Stage,
    format_time_left,
)


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@contextlib.contextmanager
def terminal():
    """A terminal in place of stderr, in the test itself, as pytest sets stderr before it."""
    with pytest.MonkeyPatch.context() as patch:
        stream = Terminal()
        patch.setattr(sys, "stderr", stream)
        yield stream


STAGES = [
    Stage("cnn (1 of 2)", "training", "model", 100),
    Stage("cnn (1 of 2)", "figures", "figures"),
    Stage("net (2 of 2)", "training", "model", 300),
    Stage("net (2 of 2)", "figures", "figures"),
    Stage("", "report", "report"),
]


def test_without_a_terminal_a_bar_is_a_line_a_minute(clock, capfd):
    for _ in ProgressBar(range(100), "preparing images", clock=clock):
        clock.wait(SECONDS_BETWEEN_LINES / 20)
    assert capfd.readouterr().err.splitlines() == [
        "preparing images: 20 %, about 4 min left",
        "preparing images: 40 %, about 3 min left",
        "preparing images: 60 %, about 2 min left",
        "preparing images: 80 %, about 1 min left",
        "preparing images: 100 %, about 1 s left",
    ]


def test_work_of_less_than_a_minute_prints_nothing_without_a_terminal(clock, capfd):
    assert list(ProgressBar([3, 4], "preparing images", clock=clock)) == [3, 4]
    assert capfd.readouterr().err == ""


def test_what_was_done_before_does_not_count_as_fast_work(clock):
    with ProgressBar(name="training", total=100, initial=80, clock=clock) as bar:
        clock.wait(30)
        bar.update(10)
        assert bar.describe() == "training: 90 %, about 30 s left"


def test_work_of_unknown_length_says_how_much_is_done(clock, capfd):
    for _ in ProgressBar(iter(range(30)), "evaluating", clock=clock):
        clock.wait(4)
    assert capfd.readouterr().err.splitlines() == ["evaluating: 15 done", "evaluating: 30 done"]


def test_nothing_is_printed_of_a_bar_that_is_not_shown(clock, capfd):
    with terminal() as stream:
        list(ProgressBar(range(9), "training", is_shown=False))
    for _ in ProgressBar(range(9), "training", is_shown=False, clock=clock):
        clock.wait(100)
    assert capfd.readouterr().err == stream.getvalue() == ""


def test_on_a_terminal_a_bar_has_its_name_and_is_removed_at_the_end():
    with terminal() as stream:
        for _ in ProgressBar(range(3), "preparing images", unit="img", mininterval=0):
            time.sleep(0.01)
    shown = stream.getvalue().split("\r")
    assert any(line.startswith("preparing images:  67%") and "img/s]" in line for line in shown)
    assert shown[-1] == "" and shown[-2].strip() == ""


def test_the_time_left_is_that_of_all_stages(clock):
    progress = RunProgress(STAGES, {"figures": 10.0, "report": 20.0}, clock=clock)
    with progress:
        progress.next_stage()
        assert progress.seconds_left() is None  # nothing is known of the training
        bar = ProgressBar(name="training", total=50, clock=clock)
        clock.wait(10)
        bar.update(25)
        # 10 s for the rest of this training, 60 s for the other, which is three times the work.
        assert progress.seconds_left() == pytest.approx(10 + 10 + 60 + 10 + 20)
        clock.wait(10)
        bar.update(25)
        progress.next_stage()
        clock.wait(4)
        assert progress.seconds_left() == pytest.approx(6 + 60 + 10 + 20)
        progress.next_stage()  # the figures took 4 s, so those of the other will
        assert progress.seconds_left() == pytest.approx(60 + 4 + 20)
        clock.wait(30)
        ProgressBar(name="training", total=10, clock=clock).update(2)
        # Its own pace tells: 30 s for a fifth.
        assert progress.seconds_left() == pytest.approx(120 + 4 + 20)
        progress.next_stage()
        progress.next_stage()
        clock.wait(25)
        assert progress.seconds_left() == 0  # longer than guessed


def test_a_stage_that_continues_an_earlier_run_is_measured_from_where_it_began(clock):
    progress = RunProgress([STAGES[0], STAGES[2]], clock=clock)
    with progress:
        progress.next_stage()
        bar = ProgressBar(name="training", total=100, initial=90, clock=clock)
        clock.wait(5)
        bar.update(5)
        assert progress.seconds_left() == pytest.approx(5 + 300)
        clock.wait(5)
        bar.update(5)
        progress.next_stage()
        assert progress.seconds_left() == pytest.approx(300)


def test_a_bar_of_another_name_says_nothing_of_the_stage(clock):
    progress = RunProgress(STAGES[:1], clock=clock)
    with progress:
        progress.next_stage()
        clock.wait(10)
        ProgressBar(name="evaluating", total=2, clock=clock).update(2)
        assert progress.seconds_left() is None
        assert progress.describe() == "cnn (1 of 2): training"


def test_without_a_terminal_a_run_is_a_line_a_minute_of_stage_share_and_time_left(clock, capfd):
    progress = RunProgress(STAGES, {"figures": 0.0, "report": 0.0}, clock=clock)
    with progress:
        progress.next_stage()
        bar = ProgressBar(name="training", total=50, clock=clock)
        for _ in range(6):
            clock.wait(SECONDS_BETWEEN_LINES / 3)
            bar.update(5)
            progress.show()
    assert capfd.readouterr().err.splitlines() == [
        "cnn (1 of 2): training 30 %; whole run 8 %, about 12 min left",
        "cnn (1 of 2): training 60 %; whole run 15 %, about 11 min left",
    ]


def test_on_a_terminal_a_run_is_one_line_above_the_bar_of_the_stage(clock):
    guesses = {"figures": 5.0, "report": 5.0}
    with terminal() as stream, RunProgress(STAGES, guesses, clock=clock) as progress:
        progress.next_stage()
        with ProgressBar(name="training", total=4, mininterval=0, clock=clock) as bar:
            clock.wait(60)
            bar.update(2)
            progress.show()
    shown = stream.getvalue()
    assert "cnn (1 of 2): training  12%|" in shown
    assert "| about 7 min left for the run" in shown
    assert "\ntraining" in shown.replace("\r", "")  # on the next line


def test_a_run_shows_life_while_it_does_one_long_thing():
    stages = [Stage("", "report", "report")]
    with terminal() as stream, RunProgress(stages, {"report": 3.0}) as progress:
        progress.next_stage()
        time.sleep(1.2)
    shown = stream.getvalue()
    assert "about 3 s left" in shown and "about 2 s left" in shown


def test_bars_print_their_own_lines_again_after_a_run(clock, capfd):
    with RunProgress(STAGES, clock=clock):
        pass
    for _ in ProgressBar(range(2), "predicting", clock=clock):
        clock.wait(90)
    assert "predicting: 50 %" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 s"),
        (59, "59 s"),
        (60, "1 min"),
        (3540, "59 min"),
        (3599, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_times_are_as_exact_as_an_estimate_is(seconds, words):
    assert format_time_left(seconds) == words
