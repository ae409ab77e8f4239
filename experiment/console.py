"""What the two commands share: how they take flags, what they print, how they end."""

import argparse
import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields
from types import MappingProxyType
from typing import Any, NoReturn

from learning.allocator import keep_freed_memory
from storage.files import did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, and that knows flags by their names.

    Its epilog keeps its line breaks.
    """

    def __init__(self, **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        message = in_one_line(message).removeprefix(
            "argument "
        )  # argparse's "argument --seed: ..."
        self.exit(2, f"{self.prog}: error: {message}\n")

    def check_flags(self, words: Sequence[str]) -> None:
        """Ends with status 2 for a flag that the parser does not have, and suggests another.

        Called before parsing, which would ask for what is missing first.
        """
        for word in words:
            name = word.partition("=")[0]
            if name == "--":
                return
            if name.startswith("--") and name not in self._option_string_actions:
                flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
                self.error(f"unknown flag {name}; {did_you_mean(name, flags, 'see --help')}")

    def add_groups(self, names: Sequence[str]) -> dict[str, Any]:
        """Adds groups of flags, in this order, and returns them by name."""
        return {name: self.add_argument_group(name) for name in names}


def with_underscores(word: str) -> str:
    """Returns a flag with underscores for the dashes in its name; other words as they are."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    prefix = "--no-" if flag.startswith(("--no-", "--no_")) else "--"
    return prefix + flag[len(prefix) :].replace("-", "_") + equals + value


def number_type(kind: type, is_valid: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """Returns an argparse type: an int or float for which `is_valid` holds.

    `wanted` describes it in errors, such as "at least 1".
    """

    def parse(text: str) -> Any:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        try:
            value = kind(text)
        except ValueError:
            wanted_kind = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {wanted_kind}, not {shown!r}") from None
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {shown}")
        return value

    return parse


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """Returns the names of the flags that are on the command line, defaults left out.

    `argv` is what `parser` has parsed before without an error.
    """
    names = vars(parser.parse_known_args(argv)[0])
    without_defaults = argparse.Namespace(**dict.fromkeys(names))  # no flag's own value is None
    found = vars(parser.parse_known_args(argv, without_defaults)[0])
    return {name for name, value in found.items() if value is not None}


def start(main: Callable[[], int]) -> NoReturn:
    """Runs a command as a process of its own and ends the process with the command's exit status.

    Call it before anything else, as both the encoding of file names and the memory allocator are
    set for the whole process. Where the locale is not UTF-8, Python would decode names of files to
    text that is wrong on other machines. Its UTF-8 mode can only be chosen at its start, so the
    process starts again. Names that are not UTF-8 are printed with escapes.
    """
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    sys.exit(main())


def exit_status(
    program: str,
    run: Callable[[], int],
    *,
    advice: Callable[[RuntimeError], str | None],
    if_stopped: str,
    show_warnings: bool = True,
) -> int:
    """Runs a command and returns its exit status; what goes wrong is printed in one line.

    The status is that of `run`, 2 after an error that the user can do something about, 130 or 143
    after SIGINT or SIGTERM. For a RuntimeError, `advice` gives the message, or None when only a
    traceback helps. `if_stopped` is the state to print after a signal, unless the stopped block
    is `noting` another. Warnings are printed in one line too, if `show_warnings`.
    """

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        if show_warnings:
            print_message(program, "warning", message)

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            return run()
        except (ValueError, OSError, ModuleNotFoundError) as error:
            print_message(program, "error", error)
        except RuntimeError as error:
            message = advice(error)
            if message is None:
                raise
            print_message(program, "error", message)
        except KeyboardInterrupt as interruption:
            signum = getattr(interruption, "signum", signal.SIGINT)
            (state,) = getattr(interruption, "__notes__", [if_stopped])
            print(f"{program}: stopped by {signum.name}; {state}", file=sys.stderr)
            return 128 + signum
    return 2


@contextlib.contextmanager
def noting(state: str) -> Iterator[None]:
    """Adds to an interruption of the block what `exit_status` is to print of the state then."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        interruption.add_note(state)
        raise


def is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether this is torch's error for a GPU without memory left, without torch."""
    return type(error).__name__ == "OutOfMemoryError"


def print_message(program: str, kind: str, message: object) -> None:
    """Prints an error or a warning, in one line, to stderr."""
    from storage.progress import print_beside_bars  # imports tqdm, which --help does not need

    print_beside_bars(f"{program}: {kind}: {in_one_line(message)}", to_stderr=True)


def in_one_line(message: object) -> str:
    """Returns the message with single spaces for its line breaks and indentation."""
    return " ".join(str(message).split())


def format_duration(seconds: float) -> str:
    """Returns whole minutes and seconds in words, such as "2 min 05 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def flag_field(
    default: Any,
    help: str,
    metavar: str | tuple[str, ...] | None = None,
    *,
    group: str = "",
    no_effect: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> Any:
    """Returns a dataclass field that is a flag of a command.

    Parameters
    ----------
    help : what it does; the default is added where it says something
    group : the name of the group in which `--help` shows it
    no_effect : flags, such as "--device cpu", beside which it has no effect, which is an error; for
        each what to do instead, which may be empty
    options : more for `add_argument`, such as `type` and `choices`; what follows from a default
        that is a bool or a tuple is there already
    """
    if isinstance(default, bool):
        options["action"] = argparse.BooleanOptionalAction if default else "store_true"
    else:
        options["metavar"] = metavar
    if isinstance(default, tuple):
        options.setdefault("nargs", "+")
    options["help"] = help.replace("%", "%%") + _shown_default(default).replace("%", "%%")
    metadata = {"group": group, "no_effect": no_effect, "options": options}
    return field(default=default, metadata=metadata)


def _shown_default(default: Any) -> str:
    """Returns what `--help` says of a default, nothing for one that means "not given"."""
    if default is None or default is False or default == ():
        return ""
    if default is True:
        return " (default: on)"
    words = default if isinstance(default, tuple) else (default,)
    return f" (default: {' '.join(map(str, words))})"


def check_flag_fields(
    parser: argparse.ArgumentParser,
    settings_class: type,
    given: set[str],
    arguments: Mapping[str, Any],
) -> None:
    """Ends with status 2 when a flag was given beside another with which it has no effect.

    The fields of `settings_class` are those of `flag_field`.
    """
    for each in fields(settings_class):
        for mode, advice in each.metadata["no_effect"].items():
            name, _, value = mode.removeprefix("--").partition(" ")
            has_mode = arguments[name] == value if value else arguments[name] not in (None, False)
            if each.name in given and has_mode:
                advice = f"; {advice}" if advice else ""
                parser.error(f"--{each.name} has no effect with {mode}{advice}")
