"""What the two commands have in common: how they take flags, and how they speak."""

import argparse
import os
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, which is a page long."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {in_one_line(message)}\n")


def with_underscores(word: str) -> str:
    """The flag as argparse knows it: dashes and underscores both work, after `--no-` as well."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    prefix = "--no-" if flag.startswith(("--no-", "--no_")) else "--"
    return prefix + flag[len(prefix) :].replace("-", "_") + equals + value


def say(program: str, kind: str, message: object) -> None:
    """Prints an error or a warning, in one line, to stderr."""
    print(f"{program}: {kind}: {in_one_line(message)}", file=sys.stderr)


def in_one_line(message: object) -> str:
    return " ".join(str(message).split())


def speak_utf8() -> None:
    """Lets file names be read as what they are, and any of them be printed; call it first of all.

    Where the locale is not UTF-8, Python reads names of files as other text, which no table could
    give to another machine. Its UTF-8 mode can only be chosen at its start: it is started again.
    """
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
