"""The command: trains and compares the four models on a folder of images.

    python train_models.py --data_dir ./data/raw --save_dir ./models

It puts the other modules in order and has no logic of its own. They are imported where they are
needed: importing torch takes seconds, which neither `--help` nor a mistyped flag should.

    torchrun --nproc_per_node=2 train_models.py --data_dir ./data/raw --save_dir ./models

trains with two processes, the first of which prints, draws and writes for both.
"""

import logging
import sys
from collections.abc import Sequence

from experiment.console import exit_status, is_out_of_memory, start
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
)
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
    with silence_other_processes(), stopping:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        exit_with_launcher()
        return exit_status(
            PROGRAM,
            lambda: run(settings, is_demo),
            advice=lambda error: _advice(error, settings),
            if_stopped="nothing had been begun",
            show_warnings=is_first_process(),
        )


def _advice(error: RuntimeError, settings: Settings) -> str | None:
    """What to do about an error of torch's that the user can do something about."""
    if is_out_of_memory(error):
        half = max(settings.batch_size // 2, 1)
        twice = 2 * settings.accumulate
        return (
            f"out of memory with --batch_size {settings.batch_size}; try --batch_size {half} "
            f"--accumulate {twice}, or smaller --layers or --image_size"
        )
    if settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().split("\n")[0]
        return f"--compile does not work here ({reason}); run without it"
    return None


if __name__ == "__main__":
    start(main)
