"""What both commands share: flags that are given, errors in one line, exit status."""

import signal
import warnings

import pytest

from experiment.console import Parser, exit_status, given_flags, noting
from learning.processes import Stopped


def run_raising(error, advice=None):
    def run():
        raise error

    return exit_status("a.py", run, advice=lambda _: advice, if_stopped="nothing was done")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no\nsuch   class"),
        OSError("no\nsuch class"),
        ModuleNotFoundError("no such class"),
    ],
)
def test_a_mistake_of_the_user_is_one_line_and_status_2(capsys, error):
    assert run_raising(error) == 2
    assert capsys.readouterr().err == "a.py: error: no such class\n"


def test_a_runtime_error_is_one_line_where_there_is_advice_and_else_a_traceback(capsys):
    assert run_raising(RuntimeError("out of memory"), "try less") == 2
    assert capsys.readouterr().err == "a.py: error: try less\n"
    with pytest.raises(RuntimeError, match="a bug"):
        run_raising(RuntimeError("a bug"))


@pytest.mark.parametrize(
    ("error", "status", "name"),
    [
        (KeyboardInterrupt(), 130, "SIGINT"),
        (Stopped(signal.SIGTERM), 143, "SIGTERM"),
    ],
)
def test_a_signal_is_one_line_with_the_state_that_was_noted_last(capsys, error, status, name):
    assert run_raising(error) == status
    assert capsys.readouterr().err == f"a.py: stopped by {name}; nothing was done\n"
    with pytest.raises(KeyboardInterrupt), noting("half is done"):
        raise error
    assert run_raising(error) == status
    assert capsys.readouterr().err == f"a.py: stopped by {name}; half is done\n"


@pytest.mark.parametrize(
    ("is_shown", "printed"), [(True, "a.py: warning: mind this\n"), (False, "")]
)
def test_warnings_are_one_line_each_from_one_process(capsys, is_shown, printed):
    def run():
        warnings.warn("mind\nthis", stacklevel=1)
        return 1

    options = {"advice": lambda _: None, "if_stopped": "", "show_warnings": is_shown}
    assert exit_status("a.py", run, **options) == 1
    assert capsys.readouterr().err == printed


def test_flags_are_given_when_they_are_on_the_command_line_even_with_their_defaults():
    parser = Parser()
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--compile", action="store_true")
    assert given_flags(parser, ["--steps", "5", "--model", "a", "--model", "b"]) == {
        "steps", "model",
    }  # fmt: skip
    assert given_flags(parser, ["--compile"]) == {"compile"}
    assert given_flags(parser, []) == set()
    assert parser.parse_args([]).steps == 5
