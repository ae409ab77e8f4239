"""Small image folders that tests make for themselves."""

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

# A shell without job control starts its background jobs with SIGINT ignored, and the tests'
# subprocesses would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

MakeImages = Callable[..., Path]


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """A function that fills a folder with the given number of PNGs of each `<class>` path.

    Each image is a tinted, textured square: no two are alike, and the tint tells the class.
    """

    def make(counts: Mapping[str, int], name: str = "raw", size: int = 40, seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        root = tmp_path / name
        for number, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True)
            tint = np.array([(number * 70) % 200, (number * 130) % 200, 60])
            for i in range(count):
                pixels = (tint + rng.integers(0, 56, (size, size, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{i:04d}.png")
        return root

    return make


@pytest.fixture(params=["fp32", "bf16"])
def auto_precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the precision `auto` stands for in this process: each in turn, whatever the processor.

    torch computes in bf16 everywhere, if slowly.
    """
    is_bf16 = request.param == "bf16"
    monkeypatch.setattr("learning.hardware.computes_in_bfloat16", lambda device: is_bf16)
    return request.param


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


@pytest.fixture
def quick_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves figures as a few pixels, as drawing them takes most of the time of a short run.

    Tests marked with `draws` have them drawn.
    """

    def save(figure: object, file: BinaryIO, *, format: str, **options: object) -> None:
        Image.new("RGB", (8, 8)).save(file, format)

    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
