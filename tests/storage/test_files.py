"""Files: whole or not at all, one process at a time, and no code run from any of them."""

import contextlib
import errno
import fcntl
import os
import pickle
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.files import lock, remove_leftovers, write_atomically, write_text
from storage.tensors import load_tensors, save_tensors

ROOT = Path(__file__).resolve().parents[2]

HALF_A_WRITE = """
import sys
from storage.files import write_atomically
with write_atomically(sys.argv[1]) as temporary, temporary.open("w") as file:
    print("half of the new,", file=file, flush=True)
    print(temporary, flush=True)
    sys.stdin.readline()
    print("and the other half", file=file, flush=True)
"""
HOLD_THE_LOCK = """
import sys
from storage.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""
COUNT_UNDER_THE_LOCK = """
import sys
from pathlib import Path
from storage.files import lock
counter = Path(sys.argv[1])
for _ in range(100):
    with lock(sys.argv[1] + ".lock"):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


class TouchesAFile:
    """Unpickling it would run `Path(path).touch()`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture
def running():
    """Starts `running(script, *arguments)`, gives it once its first line is out, kills it after."""
    processes = []

    def start_and_wait(script, *arguments):
        process = start(script, *arguments)
        processes.append(process)
        process.first_line = process.stdout.readline().strip()
        return process

    yield start_and_wait
    for process in processes:
        process.kill()
        process.communicate()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_write_leaves_the_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "history.csv", "σ, schärfer\n")
    assert (tmp_path / "history.csv").read_bytes() == "σ, schärfer\n".encode()
    assert names_in(tmp_path) == ["history.csv"]


def test_the_old_file_stands_whole_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("old")
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_the_temporary_file_lies_beside_the_file_hidden_and_with_its_suffix(tmp_path):
    with write_atomically(tmp_path / "images.npy") as temporary:
        np.save(temporary, np.arange(3))  # appends .npy to a name of any other suffix
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".npy")
        assert temporary.name.startswith(".")
    assert np.load(tmp_path / "images.npy").tolist() == [0, 1, 2]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_write_that_raises_leaves_what_was_there_and_no_temporary(tmp_path, error):
    path = tmp_path / "model.pth"
    path.write_text("old")

    def write_half():
        with write_atomically(path) as temporary:
            temporary.write_text("half of the new")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        write_half()
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["model.pth"]


def test_a_first_write_that_raises_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "a lone surrogate \ud800 is not UTF-8")
    assert names_in(tmp_path) == []


def test_tensors_that_cannot_be_saved_leave_the_old_ones(tmp_path):
    path = tmp_path / "model.pth"
    save_tensors(path, {"step": 1})
    with pytest.raises(Exception, match="pickle|local object"):
        save_tensors(path, {"step": lambda: 2})
    assert load_tensors(path) == {"step": 1}
    assert names_in(tmp_path) == ["model.pth"]


def test_a_file_can_be_named_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text("a.txt", "here")
    assert (tmp_path / "a.txt").read_text() == "here"


def test_a_process_killed_in_the_middle_of_a_write_leaves_the_old_file_whole(tmp_path, running):
    path = tmp_path / "model.pth"
    path.write_text("old")
    process = running(HALF_A_WRITE, path)
    process.kill()
    assert process.wait() == -9

    assert path.read_text() == "old"
    leftover = Path(process.first_line)
    assert names_in(tmp_path) == sorted([leftover.name, "model.pth"])

    write_text(path, "newer")
    assert path.read_text() == "newer"
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == ["model.pth"]


def test_a_write_leaves_what_another_machine_is_writing(tmp_path):
    with write_atomically(tmp_path / "model.pth") as elsewhere:
        elsewhere.write_text("of another machine")
        write_text(tmp_path / "model.pth", "mine")
    assert (tmp_path / "model.pth").read_text() == "of another machine"
    assert names_in(tmp_path) == ["model.pth"]


def test_what_is_being_written_is_no_leftover(tmp_path, running):
    path = tmp_path / "model.pth"
    process = running(HALF_A_WRITE, path)
    remove_leftovers(tmp_path)
    process.communicate("go on\n")
    assert process.returncode == 0
    assert path.read_text() == "half of the new,\nand the other half\n"
    assert names_in(tmp_path) == ["model.pth"]


def test_nothing_else_is_taken_for_a_leftover(tmp_path):
    others = [
        "model.pth", ".model.pth", ".model.backup.tmp.pth", "model.0123456789abcdef.tmp.pth",
        ".model.0123456789abcdef.pth", ".model.0123456789abcde.tmp.pth", ".tmp",
        ".model.0123456789abcdef.tmp.pth.gz", ".model.0123456789ABCDEF.tmp.pth",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("not ours")
    (tmp_path / "below").mkdir()
    below = tmp_path / "below/.a.0123456789abcdef.tmp"
    below.touch()
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == sorted([*others, "below"])
    assert below.exists()


file_names = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=127
).filter(
    lambda name: (
        name not in (".", "..")
        and len(name.encode()) <= 255
        and len(Path(name).suffix.encode()) <= 100
    )
)


@settings(deadline=None)
@given(name=file_names | st.text("ä", min_size=100, max_size=127))
def test_a_file_of_any_name_is_written_and_its_leftover_found(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("names")
    with write_atomically(folder / name) as temporary:
        temporary.touch()
    temporary.touch()  # as a killed process leaves it
    assert names_in(folder) == sorted([name, temporary.name])
    remove_leftovers(folder)
    assert names_in(folder) == [name]


def test_all_writes_at_once_have_names_of_their_own(tmp_path):
    with contextlib.ExitStack() as writes:
        path = tmp_path / "model.pth"
        temporaries = [writes.enter_context(write_atomically(path)) for _ in range(50)]
        assert len(set(temporaries)) == 50
        for temporary in temporaries:
            temporary.touch()


def test_a_write_does_not_look_at_what_else_is_in_the_folder(tmp_path, monkeypatch):
    def fails(*args):
        raise AssertionError("it lists the folder")

    monkeypatch.setattr(os, "listdir", fails)
    monkeypatch.setattr(os, "scandir", fails)
    write_text(tmp_path / "a.txt", "here")
    monkeypatch.undo()
    assert names_in(tmp_path) == ["a.txt"]


def test_where_no_folder_can_be_locked_files_are_written_and_leftovers_removed(
    tmp_path, monkeypatch
):
    def unsupported(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".a.txt.0123456789abcdef.tmp.txt").touch()
    write_text(tmp_path / "a.txt", "here")
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == ["a.txt"]


def test_tensors_and_plain_values_come_back_as_they_were_saved(tmp_path):
    contents = {
        "weights": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "classes": ["melanoma", "nevus"],
        "metrics": {"recall": None, "f1": 0.1, "done": True},
    }
    save_tensors(tmp_path / "a.pth", contents)
    loaded = load_tensors(str(tmp_path / "a.pth"))
    for name in ("weights", "half", "count"):
        tensor = contents.pop(name)
        assert torch.equal(loaded[name], tensor)
        assert loaded.pop(name).dtype == tensor.dtype
    assert loaded == contents


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tensors_saved_on_a_gpu_are_loaded_on_the_cpu(tmp_path):
    save_tensors(tmp_path / "a.pth", {"weights": torch.ones(2, device="cuda")})
    assert load_tensors(tmp_path / "a.pth")["weights"].device.type == "cpu"


@pytest.mark.parametrize(
    "save",
    [
        lambda contents, path: path.write_bytes(pickle.dumps(contents)),
        torch.save,
        lambda contents, path: torch.save(contents, path, _use_new_zipfile_serialization=False),
    ],
    ids=["pickle", "torch.save", "torch.save of old"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_would_run_code_is_refused_and_the_code_does_not_run(tmp_path, save):
    proof, path = tmp_path / "code has run", tmp_path / "model.pth"
    contents = {"weights": torch.zeros(2), "trap": TouchesAFile(proof)}
    pickle.loads(pickle.dumps(contents))
    assert proof.exists()  # the trap works
    proof.unlink()

    save(contents, path)
    with pytest.raises(ValueError) as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)
    assert not proof.exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_an_error_that_names_it_wherever_it_ends(tmp_path, is_zip):
    path = tmp_path / "model.pth"
    contents = {"weights": torch.arange(20_000.0), "classes": ["a", "b"]}
    torch.save(contents, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    for length in [*range(0, 1000, 37), *range(1000, len(whole), 1777), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError) as caught:
            load_tensors(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_a_file_that_was_saved_by_plain_torch_is_read(tmp_path, is_zip):
    path = tmp_path / "resnet.pth"
    torch.save({"w": torch.arange(3)}, path, _use_new_zipfile_serialization=is_zip)
    assert load_tensors(path)["w"].tolist() == [0, 1, 2]


def test_a_file_in_which_a_bit_has_flipped_is_never_read_as_other_weights(tmp_path):
    path = tmp_path / "model.pth"
    weights = torch.arange(1000.0)
    save_tensors(path, {"weights": weights})
    damaged = bytearray(path.read_bytes())
    at = damaged.find(weights.numpy().tobytes())
    assert at > 0
    damaged[at + 1234] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="model.pth"):
        load_tensors(path)


@pytest.mark.parametrize("contents", ["", "hello", "learning rate,loss\n0.1,2.0\n"])
def test_a_text_file_is_an_error_of_one_line_that_names_it(tmp_path, contents):
    path = tmp_path / "model.pth"
    path.write_text(contents)
    with pytest.raises(ValueError) as caught:
        load_tensors(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory):
    return tmp_path_factory.mktemp("bytes") / "model.pth"


@settings(deadline=None)
@given(contents=st.binary(max_size=200))
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_bytes_that_are_no_tensors_are_an_error_that_names_the_file(module_path, contents):
    module_path.write_bytes(contents)
    with pytest.raises(ValueError) as caught:
        load_tensors(module_path)
    assert str(module_path) in str(caught.value)


def test_a_file_that_is_not_there_is_a_file_not_found_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_tensors(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path)


def test_a_lock_held_by_another_process_cannot_be_taken_until_it_is_given_back(tmp_path, running):
    path = tmp_path / "cache.lock"
    holder = running(HOLD_THE_LOCK, path)
    assert holder.first_line == "held"
    with pytest.raises(filelock.Timeout):
        lock(path).acquire(timeout=0.2)
    holder.communicate("give it back\n")
    with lock(path).acquire(timeout=10):
        pass


def test_a_lock_ends_with_a_killed_process(tmp_path, running):
    path = tmp_path / "cache.lock"
    holder = running(HOLD_THE_LOCK, path)
    with pytest.raises(filelock.Timeout):
        lock(path).acquire(timeout=0.2)
    holder.kill()
    holder.wait()
    with lock(path).acquire(timeout=10):
        pass


def test_two_processes_that_count_under_the_lock_lose_nothing(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [start(COUNT_UNDER_THE_LOCK, counter) for _ in range(2)]
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0]
    assert counter.read_text() == "200"
