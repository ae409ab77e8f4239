"""The command: trains and compares the four models on a folder of images.

    python train_models.py --data_dir ./data/raw --save_dir ./models

What imports torch is imported after the flags are checked: that takes seconds, which neither
`--help` nor a mistyped flag should.

    torchrun --nproc_per_node=2 train_models.py --data_dir ./data/raw --save_dir ./models

trains with two processes, the first of which prints, draws and writes for both.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiment.console import exit_status, is_out_of_memory, start
from experiment.run_folder import check_save_dir, check_unclaimed

# Those with `as` are not used here, but users import them from here.
from experiment.settings import DEMO_SETTINGS as DEMO_SETTINGS
from experiment.settings import MODEL_NAMES as MODEL_NAMES
from experiment.settings import NOT_RESULTS as NOT_RESULTS
from experiment.settings import OF_AUDIT as OF_AUDIT
from experiment.settings import PROGRAM, Settings, parse_arguments
from experiment.settings import command as command
from learning.processes import StopSignals, default_signals, exit_with_launcher, is_first_process


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, as `experiment.console.exit_status` does."""
    settings, is_demo = parse_arguments(sys.argv[1:] if argv is None else argv)
    is_first = is_first_process()
    stdout = contextlib.nullcontext() if is_first else contextlib.redirect_stdout(io.StringIO())
    with stdout, StopSignals(at_once=True) if is_first else default_signals():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        exit_with_launcher()
        return exit_status(
            PROGRAM,
            lambda: run(settings, is_demo),
            advice=lambda error: _advice(error, settings),
            if_stopped="nothing was changed",
            show_warnings=is_first,
        )


def run(settings: Settings, is_demo: bool = False) -> int:
    """Trains and compares the models, or audits the images alone, and returns the exit status.

    The status is 1 when an audit found something. The folders are checked before torch is imported.
    """
    if settings.audit_only and not is_first_process():
        return 0  # one process is enough, and torchrun would stop it when another one ends with 1
    data_dir = Path(settings.data_dir)
    if data_dir.suffix.lower() == ".npz" and data_dir.is_file():
        settings = _with_images_of(data_dir, settings)
        data_dir = Path(settings.data_dir)
    elif not data_dir.is_dir() and not (is_demo and not data_dir.exists()):
        what = " is a file, not a folder" if data_dir.exists() else ": no such folder"
        raise FileNotFoundError(f"--data_dir {data_dir}{what}")
    check_save_dir(settings.save_dir, data_dir)
    if is_first_process():
        check_unclaimed(settings.save_dir)  # now, not after the images are prepared
    from experiment import pipeline

    return pipeline.run(settings, is_demo)


def _with_images_of(archive: Path, settings: Settings) -> Settings:
    """Returns the settings with the folder of the images of a file of DermaMNIST in its place."""
    from imaging.medmnist import DERMAMNIST, images_folder, is_archive

    if not is_archive(archive):
        raise ValueError(f"--data_dir {archive} is not DermaMNIST, whose name is dermamnist*.npz")
    layout = settings.layout or DERMAMNIST
    return replace(settings, data_dir=str(images_folder(archive)), layout=layout)


def _advice(error: RuntimeError, settings: Settings) -> str | None:
    """Returns what to do about an error of torch's, if the user can do something about it."""
    if is_out_of_memory(error):
        return (
            f"out of memory with --batch_size {settings.batch_size}; try "
            f"--batch_size {max(settings.batch_size // 2, 1)} "
            f"--accumulate {2 * settings.accumulate}, or smaller --layers or --image_size"
        )
    if settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().split("\n")[0]
        return f"--compile does not work here ({reason}); leave it out"
    return None


if __name__ == "__main__":
    start(main)
