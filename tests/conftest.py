"""Small image folders that tests make for themselves."""

import ctypes
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from tests.samples import save_all_figures_as_few_pixels, save_few_pixels

# A shell without job control starts its background jobs with SIGINT ignored, and the tests'
# subprocesses would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Speed is not tested, and a busy machine is slow.
settings.register_profile("any speed", settings(), deadline=None)
settings.load_profile("any speed")

MakeImages = Callable[..., Path]


def draw_images(
    root: Path, counts: Mapping[str, int], name: str = "raw", size: int = 40, seed: int = 0
) -> Path:
    """Fills the folder `name` in `root` with the given number of PNGs of each `<class>` path.

    Each image is a tinted, textured square: no two are alike, and the tint tells the class.
    """
    rng = np.random.default_rng(seed)
    for number, (folder, count) in enumerate(counts.items()):
        (root / name / folder).mkdir(parents=True)
        tint = np.array([(number * 70) % 200, (number * 130) % 200, 60])
        for i in range(count):
            pixels = (tint + rng.integers(0, 56, (size, size, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / folder / f"{i:04d}.png")
    return root / name


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """Returns `draw_images` for the test's own folder."""
    return functools.partial(draw_images, tmp_path)


@pytest.fixture(scope="module")
def make_module_images(tmp_path_factory: pytest.TempPathFactory) -> MakeImages:
    """Returns `draw_images` for a folder that the tests of a module share."""
    return functools.partial(draw_images, tmp_path_factory.mktemp("images"))


class Started:
    """A script that runs in a process of its own; the same methods as `subprocess.Popen`'s."""

    def __init__(self, process: multiprocessing.Process, streams: tuple[Path, Path]) -> None:
        self._process, self._streams = process, streams
        self.args = process.name
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end, and gives what was printed to stdout and to stderr."""
        self.wait(timeout)
        out, err = (file.read_text("utf-8") for file in self._streams)
        return out, err

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def fork_server() -> Any:
    """Processes that have imported what the commands need, which takes seconds each time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["experiment.pipeline", "experiment.results", "experiment.report", "predict"]
    )
    return context


@pytest.fixture
def start(
    fork_server: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable]:
    """A function that starts a script in a process of its own, without the seconds of importing.

    The environment is set before the script runs, but after torch was imported. `calls` are made
    first of all, such as `(resource.setrlimit, (kind, limits))`. Figures are a few pixels, unless
    the test is marked with `draws`.
    """
    running: list[Started] = []
    is_drawn = request.node.get_closest_marker("draws") is not None
    first = [] if is_drawn else [(save_all_figures_as_few_pixels, ())]

    def start_script(
        script: Path,
        *words: object,
        env: Mapping[str, str] = os.environ,
        cwd: Path | None = None,
        calls: Iterable[tuple[Callable, tuple]] = (),
    ) -> Started:
        folder = tmp_path_factory.mktemp("streams")
        streams = folder / "stdout", folder / "stderr"
        for stream in streams:
            stream.touch()
        given = {
            "script": str(script),
            "words": [str(word) for word in words],
            "environment": dict(env),
            "folder": str(cwd or Path.cwd()),
            "streams": [str(stream) for stream in streams],
            "calls": [*first, *calls],
        }
        process = fork_server.Process(
            target=runpy.run_path, args=(str(Path(__file__).with_name("run_script.py")), given)
        )
        process.start()
        running.append(started := Started(process, streams))
        return started

    yield start_script
    for started in running:
        started.kill()


@pytest.fixture
def start_processes(start: Callable) -> Callable:
    """A function that starts a script in processes that train together, as torchrun would."""

    def start_ranks(script: Path, *words: object, count: int = 2, **options: Any) -> list[Started]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        shared = {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        shared |= {"OMP_NUM_THREADS": "1"}
        environment = options.pop("env", os.environ) | shared
        return [
            start(
                script,
                *words,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **options,
            )
            for rank in range(count)
        ]

    return start_ranks


@pytest.fixture
def images(make_images: MakeImages) -> Path:
    """A folder of seven images in two folders."""
    return make_images({"a": 4, "b": 3}, name="images")


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a `model.pth`; `info` is what it holds besides."""
    from storage.tensors import save_tensors
    from tests.samples import CLASSES, small_model

    def save(file="model.pth", model=None, classes=CLASSES, **info):
        model = small_model() if model is None else model
        contents = {
            "config": model.config,
            "classes": list(classes),
            "image_size": model.config["image_size"],
            "preprocessors": "",
            "state_dict": model.state_dict(),
        }
        save_tensors(tmp_path / file, contents | info)
        return tmp_path / file

    return save


@pytest.fixture(params=["fp32", "bf16"])
def auto_precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the precision `auto` stands for in this process: each in turn, whatever the processor.

    torch computes in bf16 everywhere, if slowly.
    """
    is_bf16 = request.param == "bf16"
    monkeypatch.setattr("learning.hardware.computes_in_bfloat16", lambda device: is_bf16)
    return request.param


@pytest.fixture
def quick_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves figures as a few pixels, as drawing them takes most of the time of a short run.

    Tests marked with `draws` have them drawn.
    """

    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_few_pixels)


@pytest.fixture
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has runs and evaluations plot next to nothing, unless the test asks for `quick_figures`."""
    if "quick_figures" in request.fixturenames:
        return
    for name in (
        "experiment.results.plot_data",
        "experiment.pipeline.plot_learning_curves",
        "experiment.results.plot_metrics",
        "experiment.results.plot_examples",
        "visualizations.plot_model_comparison",
    ):
        monkeypatch.setattr(name, lambda *args, **kwargs: None)


@pytest.fixture
def without_the_rights_of_root() -> Callable[[], AbstractContextManager[None]]:
    """A context in which this thread may not pass over permission bits, as root may."""
    if not sys.platform.startswith("linux"):
        pytest.skip("drops rights as Linux has it")
    libc = ctypes.CDLL(None)
    this_thread = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
    rights = (ctypes.c_uint32 * 6)()
    assert libc.capget(this_thread, rights) == 0

    @contextmanager
    def drop() -> Iterator[None]:
        effective = rights[0]
        rights[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        # With SECBIT_NO_SETUID_FIXUP, or access(2) would still count root's permitted rights.
        secure_bits = libc.prctl(27, 0, 0, 0, 0)
        assert libc.prctl(28, secure_bits | 0b100, 0, 0, 0) == 0
        assert libc.capset(this_thread, rights) == 0
        try:
            yield
        finally:
            rights[0] = effective
            assert libc.capset(this_thread, rights) == 0
            assert libc.prctl(28, secure_bits, 0, 0, 0) == 0

    return drop
