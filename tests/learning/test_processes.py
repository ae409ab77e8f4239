"""Ranks from the process group or from torchrun, and signals that are raised or remembered."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from learning.processes import (
    Stopped,
    StopSignals,
    default_signals,
    get_rank,
    get_world_size,
    is_first_process,
)
from models import get_model
from training import make_optimizer, train

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def launched(monkeypatch):
    """Makes this the second of three processes that torchrun started."""
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)


def test_a_process_alone_is_the_first_of_one():
    assert (get_rank(), get_world_size(), is_first_process()) == (0, 1, True)


def test_before_there_is_a_process_group_torchrun_gives_rank_and_world_size(launched):
    assert (get_rank(), get_world_size(), is_first_process()) == (1, 3, False)


def test_a_process_group_counts_more_than_what_torchrun_said(launched):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert (get_rank(), get_world_size(), is_first_process()) == (0, 1, True)
    finally:
        dist.destroy_process_group()


def test_training_under_torchrun_asks_for_a_process_group(launched):
    model = get_model("simple_cnn", 2, image_size=32)
    with pytest.raises(ValueError, match="3 processes; call torch.distributed.init_process_group"):
        train(model, [], [], 2, 1, make_optimizer(model))


def test_ranks_and_signals_do_without_torch():
    script = "import sys, learning.processes as p; p.get_rank(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_raised_at_once_or_remembered_until_the_end(signum):
    before, passed = [signal.getsignal(s) for s in SIGNALS], []
    with pytest.raises(Stopped) as raised, StopSignals(at_once=True):
        signal.raise_signal(signum)
    assert raised.value.signum is signum
    with pytest.raises(Stopped), StopSignals(at_once=True), StopSignals() as signals:
        assert signals.received == 0
        signal.raise_signal(signum)
        assert signals.received == signum
        passed.append("the rest of the block")
    assert passed
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_work_that_can_be_done_again_ends_without_an_exception():
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        with signals.skippable():
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the block went on")
        assert signals.received == signal.SIGINT


def test_the_default_handlers_are_back_in_the_block_and_gone_after_it():
    with StopSignals(at_once=True):
        inside = signal.getsignal(signal.SIGTERM)
        with default_signals():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == inside
