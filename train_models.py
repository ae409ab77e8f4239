"""The command: trains and compares the four models on a folder of images.

    python train_models.py --data_dir ./data/raw --save_dir ./models

It puts the other modules in order and has no logic of its own. They are imported where they are
needed: importing torch takes seconds, which neither `--help` nor a mistyped flag should.

    torchrun --nproc_per_node=2 train_models.py --data_dir ./data/raw --save_dir ./models

trains with two processes, the first of which prints, draws and writes for both.
"""

import logging
import sys
import warnings
from collections.abc import Sequence

from experiment.console import print_message, print_stopped, use_utf8
from experiment.pipeline import exit_with_launcher, run, silence_other_processes
from experiment.settings import (
    DEMO_SETTINGS,
    MODEL_NAMES,
    NOT_RESULTS,
    OF_AUDIT,
    PROGRAM,
    Settings,
    command,
    parse_arguments,
    show_warning,
)
from learning.allocator import keep_freed_memory
from learning.processes import StopSignals, default_signals, is_first_process

__all__ = [
    "DEMO_SETTINGS",
    "MODEL_NAMES",
    "NOT_RESULTS",
    "OF_AUDIT",
    "Settings",
    "command",
    "main",
    "parse_arguments",
    "run",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and gives its exit status; a mistake of the user's ends in one line.

    So does an interruption, with status 130 for SIGINT (Ctrl-C) and 143 for SIGTERM.
    """
    settings, is_demo = parse_arguments(sys.argv[1:] if argv is None else argv)
    stopping = StopSignals(at_once=True) if is_first_process() else default_signals()
    with silence_other_processes(), warnings.catch_warnings(), stopping:
        warnings.showwarning = show_warning
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        exit_with_launcher()
        try:
            return run(settings, is_demo)
        except (ValueError, OSError) as error:
            return _print_error(error)
        except RuntimeError as error:
            advice = _advice(error, settings)
            if advice is None:
                raise
            return _print_error(advice)
        except KeyboardInterrupt as interruption:
            return print_stopped(PROGRAM, interruption, "nothing had been begun")


def _advice(error: RuntimeError, settings: Settings) -> str | None:
    """What to do about an error of torch's that the user can do something about."""
    kind = type(error)  # by name, as torch is not imported here
    if kind.__name__ == "OutOfMemoryError":
        half = max(settings.batch_size // 2, 1)
        twice = 2 * settings.accumulate
        return (
            f"out of memory with --batch_size {settings.batch_size}; try --batch_size {half} "
            f"--accumulate {twice}, or smaller --layers or --image_size"
        )
    if settings.compile and kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().split("\n")[0]
        return f"--compile does not work here ({reason}); run without it"
    return None


def _print_error(message: object) -> int:
    print_message(PROGRAM, "error", message)
    return 2


if __name__ == "__main__":
    use_utf8()
    keep_freed_memory()
    sys.exit(main())
