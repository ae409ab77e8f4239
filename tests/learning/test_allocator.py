import subprocess
import sys
from pathlib import Path

import pytest

from learning import allocator

ROOT = Path(__file__).parents[2]
FAULTS = """
import resource, sys
import torch
from learning.allocator import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # until small rests of earlier blocks no longer stand between free ones
    torch.ones(2**24)  # 64 MiB
before = faults()
for _ in range(4):
    torch.ones(2**24)
print(faults() - before)
"""


def page_faults(choice):
    words = [sys.executable, "-c", FAULTS, choice]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this C library does not take the setting")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_freed_memory_serves_the_next_tensor_without_page_faults():
    assert page_faults("keep") < 50 < page_faults("default")


class Libc:
    """A C library that answers `mallopt` as told, and keeps what it was asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def gnu_get_libc_version(self):
        return b"2.17"

    def mallopt(self, name, value):
        self.asked.append(name)
        return self.answer


@pytest.mark.parametrize("answer", [0, 1])
def test_a_setting_that_is_refused_is_said_and_no_other_is_made(monkeypatch, answer):
    libc = Libc(answer)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: libc)
    assert allocator.keep_freed_memory() is bool(answer)
    assert len(libc.asked) == (3 if answer else 1)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_other_c_libraries_are_left_alone(monkeypatch, platform):
    monkeypatch.setattr(allocator.sys, "platform", platform)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())  # no function at all
    assert allocator.keep_freed_memory() is False
