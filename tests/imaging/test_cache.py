"""The array of prepared images on disk: current or made anew, never half of one."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imaging import cache
from inference import ensemble
from models import get_model
from predict import predict
from storage.files import lock
from tests.samples import build, shown


def array_file(root):
    (path,) = (root.parent / "processed").glob("*/images-*.npy")
    return path


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_no_more_threads_than_the_process_may_use_cores(make_images, tmp_path, monkeypatch):
    class Pool:
        def __init__(self, num_workers):
            raise KeyboardInterrupt(num_workers)

    for module in (cache, ensemble):
        monkeypatch.setattr(module, "ThreadPoolExecutor", Pool)
    model = get_model("simple_cnn", 2, image_size=16)
    contents = {"config": model.config, "classes": ["a", "b"], "image_size": 16}
    contents |= {"preprocessors": "", "metrics": {}, "state_dict": model.state_dict()}
    torch.save(contents, tmp_path / "model.pth")
    root = make_images({"a": 1, "b": 1})
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with pytest.raises(KeyboardInterrupt, match="^1$"):
            build(root)
        with pytest.raises(KeyboardInterrupt, match="^1$"):
            predict(tmp_path / "model.pth", root, device="cpu")
    finally:
        os.sched_setaffinity(0, cores)


def test_a_second_build_reads_the_array_of_the_first(make_images):
    root = make_images({"a": 6, "b": 6})
    first, metadata = build(root)
    before = array_file(root).stat()
    images = first["train"].gather(np.arange(len(first["train"])))
    second, metadata_again = build(root)
    assert array_file(root).stat().st_ino == before.st_ino
    assert metadata.equals(metadata_again)
    assert np.array_equal(second["train"].gather(np.arange(len(second["train"]))), images)


def test_new_times_alone_rebuild_nothing(make_images):
    root = make_images({"a": 6, "b": 6})
    build(root)
    before = array_file(root).stat()
    os.utime(root / "a/0000.png")
    build(root)
    assert array_file(root).stat().st_ino == before.st_ino


def test_an_older_file_is_not_hashed_again(make_images, monkeypatch):
    root = make_images({"a": 6, "b": 6})
    long_ago = time.time() - 3600
    build(root)
    for path in root.rglob("*.png"):
        os.utime(path, (long_ago, long_ago))
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10_000_000_000)
    _, expected = build(root)  # takes the new times into the index
    read = []
    monkeypatch.setattr(cache, "read_regular_file", read.append)
    _, metadata = build(root)
    assert read == []
    assert metadata.equals(expected)


def test_whoever_has_the_lock_of_the_array_removes_leftovers_and_others_write_nothing(make_images):
    root = make_images({"a": 6, "b": 6})
    build(root)
    folder = array_file(root).parent
    leftover = folder / ".index.0123456789abcdef.tmp.json"
    leftover.write_text("{")
    index = folder / "index.json"
    before = index.read_bytes()
    with lock(folder / ".lock"):
        os.utime(root / "a/0000.png")
        build(root)  # without waiting
        assert leftover.exists() and index.read_bytes() == before
    build(root)
    assert not leftover.exists() and index.read_bytes() != before
    leftover.write_text("{")
    (root / "a/0000.png").unlink()
    build(root)
    assert not leftover.exists()


def test_a_changed_image_is_read_again_even_with_its_old_size_and_time(make_images):
    root = make_images({"a": 6, "b": 6})
    path = root / "a/0000.png"
    for i, name in enumerate(("black", "white")):
        Image.new("RGB", (40, 40), name).save(root / f"{name}.bmp")
        (root / f"{name}.bmp").rename(root / f"a/{i}.bmp")
    build(root)
    before = (root / "a/0.bmp").stat()
    (root / "a/0.bmp").write_bytes((root / "a/1.bmp").read_bytes())
    (root / "a/1.bmp").unlink()
    os.utime(root / "a/0.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (root / "a/0.bmp").stat().st_size == before.st_size
    splits, metadata = build(root)
    assert (shown(splits, "a/0.bmp") == 255).all()
    assert len(metadata) == 13
    path.unlink()
    assert len(build(root)[1]) == 12


def test_another_size_or_preprocessor_is_another_array(make_images):
    root = make_images({"a": 6, "b": 6})
    assert build(root)[0]["train"].image_size == 16
    assert build(root, image_size=24)[0]["train"].image_size == 24
    inverted, _ = build(root, preprocessors=[lambda x: 255 - x])
    plain, _ = build(root)
    assert (shown(inverted, "a/0000.png") != shown(plain, "a/0000.png")).mean() > 0.9
    assert inverted["train"].preprocessors and not plain["train"].preprocessors


def slow(image):
    time.sleep(0.03)
    return image


def start_build(root, *preprocessors):
    options = {"preprocessors": preprocessors, "num_workers": 1}
    process = multiprocessing.get_context("fork").Process(
        target=build, args=(root,), kwargs=options
    )
    process.start()
    return process


def test_a_build_that_is_killed_leaves_nothing_that_counts(make_images):
    root = make_images({"a": 15, "b": 15})
    processed = root.parent / "processed"
    process = start_build(root, slow)
    while not list(processed.glob("*/images-*.npy")):  # until then it sees probe images
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.join()
    killed = array_file(root)  # it was in the middle of it
    assert not list(processed.glob("*/index.json"))
    build(root, preprocessors=[slow])
    assert len(list(processed.glob("*/index.json"))) == 1
    assert array_file(root) != killed
    assert (np.load(array_file(root)).reshape(30, -1).max(axis=1) > 0).all()


def test_two_builds_at_once_give_one_array(make_images):
    root = make_images({"a": 15, "b": 15})
    pair = [start_build(root, slow) for _ in range(2)]
    for process in pair:
        process.join()
        assert process.exitcode == 0
    assert array_file(root).exists()


def test_builds_killed_at_any_moment_are_followed_by_correct_ones(make_images):
    root = make_images({"a": 60, "b": 60}, size=80)
    started = time.monotonic()
    expected, metadata = build(root)
    duration = time.monotonic() - started
    moments = random.Random(0)
    folder = array_file(root).parent
    num_killed = 0
    for _ in range(200):
        before = array_file(root).name
        (folder / "index.json").unlink()
        child = start_build(root)
        time.sleep(moments.uniform(0, duration))
        child.kill()
        child.join()
        arrays = {path.name for path in folder.glob("images-*.npy")}
        num_killed += bool(arrays - {before}) and not (folder / "index.json").exists()
        splits, metadata_after = build(root)
        assert metadata_after.equals(metadata)
        for name, split in splits.items():
            numbers = np.arange(len(split))
            assert np.array_equal(split.gather(numbers), expected[name].gather(numbers))
        assert len(list(folder.glob("*.npy"))) == 2  # what the killed one left is gone
        if num_killed == 10:
            return
    raise AssertionError(f"only {num_killed} of 200 builds were killed at work")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder not even root writes")
def test_a_cache_folder_that_cannot_be_written_is_named_with_the_flag(make_images, tmp_path):
    root = make_images({"a": 3, "b": 3})
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/sys/kernel")):
        with pytest.raises(OSError, match="--cache_dir") as caught:
            build(root, cache_dir=folder)
        assert str(folder) in str(caught.value)


def test_a_read_only_data_folder_is_only_read(make_images, tmp_path):
    root = make_images({"a": 3, "b": 3})
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))
    for folder in (root, root / "a", root / "b"):
        folder.chmod(0o555)
    build(root, cache_dir=tmp_path / "cache")
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == before


def test_a_damaged_index_or_array_is_made_anew(make_images):
    root = make_images({"a": 6, "b": 6})
    expected = shown(build(root)[0], "a/0000.png")
    path = array_file(root)
    (path.parent / "index.json").write_text("{")
    assert np.array_equal(shown(build(root)[0], "a/0000.png"), expected)
    for name in ("images", "thumbnails"):
        (path,) = array_file(root).parent.glob(f"{name}-*.npy")
        path.write_bytes(path.read_bytes()[:-1])
        assert np.array_equal(shown(build(root)[0], "a/0000.png"), expected)
        assert not path.exists()
