import functools
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import dataset
from dataset import (
    DatasetBuilder,
    UnreadableImageError,
    center_crop,
    create_dataloaders,
    find_images,
    fingerprint,
    normalize,
    prepare_image,
    resize,
    to_float,
)
from imaging import batches, cache, prepare
from imaging.batches import DeviceDataset
from imaging.synthetic import CLASSES, draw_lesion
from models import get_model
from storage.files import lock

ROOT = Path(__file__).parents[1]


def build(root, image_size=16, splits=None, preprocessors=(), **options):
    builder = DatasetBuilder(root, image_size=image_size, **options)
    return builder.build(preprocessors=preprocessors, splits=splits)


def array_file(root):
    (path,) = (root.parent / "processed").glob("*/images-*.npy")
    return path


# ---------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("size", [(33, 57), (60, 45), (224, 224), (7, 5), (300, 256), (100, 900)])
def test_resize_and_crop_are_those_of_torchvision(size):
    width, height = size
    rng = np.random.default_rng(width)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(image)
    difference = np.abs(np.asarray(prepare._fit(image, 224)).astype(int) - np.asarray(expected))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.3
    resized = resize(np.asarray(image), 64)
    assert np.array_equal(resized, np.asarray(transforms.Resize(64)(image)))
    if min(size) >= 5:
        crop = center_crop(np.asarray(image), 5)
        assert np.array_equal(crop, np.asarray(transforms.CenterCrop(5)(image)))


def test_a_large_jpeg_is_decoded_smaller_but_looks_the_same(make_images, tmp_path):
    root = make_images({"a": 4, "b": 4}, size=30)
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    large = small.resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(root / "a/large.jpg", quality=95)
    large.rotate(90, expand=True).save(root / "a/turned.jpg", quality=95, exif=exif)
    splits, metadata = build(root, image_size=56)
    sizes = metadata.set_index("path")[["width", "height"]]
    assert sizes.loc["a/large.jpg"].tolist() == [1600, 1200]  # of the original, upright
    assert sizes.loc["a/turned.jpg"].tolist() == [1600, 1200]
    expected = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56)])(large)
    for path in ("a/large.jpg", "a/turned.jpg"):
        difference = np.abs(shown(splits, path).astype(int) - np.asarray(expected))
        assert difference.mean() < 2
    seen = []
    build(root, image_size=56, preprocessors=[lambda x: seen.append(x.shape) or x])
    assert seen.count((1200, 1600, 3)) == 2  # a preprocessor gets the original


def test_preprocessors_run_in_order_and_may_change_size_and_range(make_images):
    root = make_images({"a": 5, "b": 5}, size=50)
    seen = []

    def look(image):
        seen.append((image.shape, image.dtype))
        return image

    chain = [functools.partial(resize, size=30), functools.partial(center_crop, size=20), look]
    splits, _ = build(root, preprocessors=[*chain, normalize, look])
    assert set(seen[-10:]) == {((20, 20, 3), np.dtype(np.uint8))}
    plain, _ = build(root, preprocessors=chain)
    for name in splits:  # x / 255 and back is exact
        everything = np.arange(len(splits[name]))
        assert np.array_equal(splits[name].gather(everything), plain[name].gather(everything))


CORES = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import dataset, predict
from imaging import cache
from inference import ensemble
class Pool:
    def __init__(self, num_workers):
        print(num_workers)
        raise KeyboardInterrupt
cache.ThreadPoolExecutor = ensemble.ThreadPoolExecutor = Pool
model, images = sys.argv[1:]
for work in (
    dataset.DatasetBuilder(images, image_size=16).build,
    lambda: predict.predict(model, images, device="cpu"),
):
    try:
        work()
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_no_more_threads_than_the_process_may_use_cores(make_images, tmp_path):
    model = get_model("simple_cnn", 2, image_size=16)
    contents = {"config": model.config, "classes": ["a", "b"], "image_size": 16}
    contents |= {"preprocessors": "", "metrics": {}, "state_dict": model.state_dict()}
    torch.save(contents, tmp_path / "model.pth")
    root = make_images({"a": 1, "b": 1})
    done = subprocess.run(
        [sys.executable, "-c", CORES, str(tmp_path / "model.pth"), str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        (lambda x: x[:, :, 0], r"<lambda>.*shape \(40, 40\)"),
        (lambda x: x.astype(np.int32), "<lambda>.*int32"),
        (lambda x: x.astype(np.float32), r"<lambda>.*not in \[0, 1\]"),
        (lambda x: x.astype(np.float32) * np.nan, r"<lambda>.*not in \[0, 1\]"),
        (lambda x: x.nonsense, "<lambda>: AttributeError.*on a/0000.png"),
    ],
)
def test_a_preprocessor_that_gives_no_image_is_named(make_images, preprocessor, message):
    root = make_images({"a": 4, "b": 4})
    with pytest.raises(ValueError, match=message):
        build(root, preprocessors=[preprocessor], num_workers=1)


def function_from(source):
    namespace = {"np": np}
    exec(source, namespace)
    return namespace["f"]


def with_options(image, **options):
    return image


CALLABLES = """
class Base:
    LIMIT = {0}
    def __call__(self, x):
        return x if x.size else {1}
    @property
    def size(self):
        return {2}
    @staticmethod
    def helper():
        return {3}
class Sub(Base):
    def __init__(self):
        self.a, self.b, self.c, self.d = 1, 1, {4}, {5}
f = Sub()
one = two = three = 1
four = {6}
def g(x):
    return f(x) if x.size else one + two + three + four
"""


def test_a_fingerprint_sees_all_of_an_object_and_of_what_a_function_uses():
    def printed(numbers):
        namespace = {"__name__": "of_the_user"}
        exec(CALLABLES.format(*numbers), namespace)
        return fingerprint([namespace["g"]])

    plain = [1] * 7
    found = [printed(plain)] + [printed([*plain[:i], 2, *plain[i + 1 :]]) for i in range(7)]
    assert len(set(found)) == 8
    assert printed(plain) == found[0]


def test_a_fingerprint_tells_preprocessors_apart_and_the_same_ones_alike():
    rare = "def f(x, limit={}):\n    return x * 0 if x.shape == (1, {}, 3) else {}"
    helper = "def g(x):\n    return x if x.size else {}\ndef f(x):\n    return g(x)"
    sources = [
        rare.format(1, 2, "x"),
        rare.format(2, 2, "x"),  # another default, which changes nothing in the probes
        rare.format(1, 3, "x"),  # another constant
        rare.format(1, 2, "x.copy()"),
        helper.format("1"),
        helper.format("2"),  # another function that it calls
        "limit = 1\ndef f(x):\n    return x if x.size else limit",
        "limit = 2\ndef f(x):\n    return x if x.size else limit",
    ]
    prints = [fingerprint([function_from(source)]) for source in sources]
    assert len(set(prints)) == len(prints)
    assert prints == [fingerprint([function_from(source)]) for source in sources]

    def enclosing(value):
        return lambda x: x if x.size else value

    assert fingerprint([enclosing(1)]) == fingerprint([enclosing(1)])
    assert fingerprint([enclosing(1)]) != fingerprint([enclosing(2)])
    many = dict.fromkeys("abcd", 1)
    changed = [fingerprint([functools.partial(with_options, **many | {k: 2})]) for k in many]
    assert len({*changed, fingerprint([functools.partial(with_options, **many)])}) == 5
    assert fingerprint([functools.partial(resize, size=9)]) != fingerprint([resize])
    assert fingerprint([resize, normalize]) != fingerprint([normalize, resize])
    assert fingerprint([]) == ""


class Noise:
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, image):
        return self.rng.integers(0, 2, image.shape, dtype=np.uint8) + image // 2


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return image // self.calls


class LikeTheLast:
    """Brings each image to the brightness of the one before."""

    mean = 128.0

    def __call__(self, image):
        shift, self.mean = self.mean - image.mean(), image.mean()
        return np.clip(image + shift, 0, 255).astype(np.uint8)


def flipped_by(chance):
    def flip(image):
        return image[:, ::-1] if chance() < 0.5 else image

    return flip


def hardly_ever(image):
    return image[::-1] if random.random() < 1e-9 else image


def counting():
    number = 0

    def count(image):
        nonlocal number
        number = (number + 1) % 7
        return np.roll(image, number, axis=0)

    return count


NOT_REPEATABLE = {
    "flip": [
        flipped_by(random.random),
        flipped_by(np.random.random),
        flipped_by(lambda: torch.rand(1)),
        flipped_by(np.random.default_rng(1).random),
        flipped_by(lambda: np.random.default_rng().random()),
        flipped_by(random.Random(1).random),
        functools.partial(flipped_by(random.random)),
        flipped_by(lambda: time.perf_counter_ns() % 2),
        flipped_by(lambda: os.urandom(1)[0] % 2),
    ],
    "hardly_ever": [hardly_ever],
    "count": [counting()],
    "Noise": [Noise()],
    "Counter": [Counter()],
    "LikeTheLast": [LikeTheLast()],
}


@pytest.mark.parametrize(
    ("name", "preprocessor"),
    [(name, f) for name, several in NOT_REPEATABLE.items() for f in several],
)
def test_a_preprocessor_that_is_not_repeatable_is_refused_at_once(make_images, name, preprocessor):
    np.random.seed(0)
    with pytest.raises(ValueError, match=f"preprocessor {name} does not make the same") as error:
        fingerprint([resize, preprocessor])
    assert "augmentation" in str(error.value) and "\n" not in str(error.value)


def test_a_build_with_a_random_preprocessor_prepares_nothing(make_images):
    root = make_images({"a": 3, "b": 3})
    with pytest.raises(ValueError, match="preprocessor flip does not make the same"):
        build(root, preprocessors=[flipped_by(random.random)])
    assert not (root.parent / "processed").exists()


class Lazy:
    table = None

    def __call__(self, image):
        if self.table is None:
            self.table = np.arange(256, dtype=np.uint8)[::-1].copy()
        return self.table[image]


def seeded(image):
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)
    noise = np.random.default_rng(3).random(image.shape) + np.random.random(image.shape)
    return np.clip(image + noise + random.random() + torch.rand(1).item(), 0, 255).astype(np.uint8)


def refusing(image):
    if image.shape != (40, 40, 3):
        raise ValueError("of no use to me")
    return image


def test_preprocessors_that_seed_themselves_keep_a_table_or_refuse_the_probes_are_allowed(
    make_images,
):
    root = make_images({"a": 3, "b": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(root, preprocessors=[seeded, Lazy()])
        build(root, preprocessors=[refusing])
    lazy = Lazy()
    assert fingerprint([lazy]) == fingerprint([lazy])


OF_ANY_RUN = """
import collections, functools, logging, re, threading, weakref
import numpy as np
from dataset import fingerprint

log = logging.getLogger("prepare")
logging.getLogger(str(id(log)))

class Slots:
    __slots__ = ("limit",)

class Keeps:
    def __init__(self):
        self.lock, self.rng = threading.Lock(), np.random.default_rng(0)
        self.old, self.view, self.log = np.random.RandomState(0), memoryview(b"x"), log
        self.names = frozenset(f"name {i}" for i in range(9))
        self.numbers = dict.fromkeys(self.names, 1)
        self.method, self.queue = "a".__add__, collections.deque([object(), Slots()])
        self.array = np.array([object(), {1}], dtype=object)
        self.pattern, self.ref = re.compile("x"), weakref.ref(log)
    def __call__(self, image):
        log.debug("at work")
        return image if "name 1" in {"name 1", "name 2", "x"} else self.numbers

print(fingerprint([Keeps()]), fingerprint([lambda image: None]))
"""


def test_a_fingerprint_is_the_same_in_every_run():
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", OF_ANY_RUN],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in "12"
    ]
    one, other = (run.communicate()[0] for run in runs)
    assert one == other and len(one.split()) == 2


# ---------------------------------------------------------------------------- the array on disk


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


def shown(splits, path):
    for split in splits.values():
        found = np.flatnonzero(split.metadata["path"] == path)
        if len(found):
            return split.gather(found)[0]
    raise KeyError(path)


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


SLOW_BUILD = """
import sys, time
sys.path.insert(0, {root!r})
from dataset import DatasetBuilder
def slow(image):
    print("at work", flush=True)
    time.sleep({seconds})
    return image
DatasetBuilder({data!r}, image_size=16).build(preprocessors=[slow])
"""


def test_a_build_that_is_killed_leaves_nothing_that_counts(make_images):
    root = make_images({"a": 4, "b": 4})
    script = SLOW_BUILD.format(root=str(ROOT), data=str(root), seconds=0.2)
    command, processed = [sys.executable, "-c", script], root.parent / "processed"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while not list(processed.glob("*/images-*.npy")):  # until then it sees probe images
            assert process.stdout.readline()
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    killed = array_file(root)  # it was in the middle of it
    assert not list(processed.glob("*/index.json"))
    subprocess.run(command, check=True, capture_output=True)
    assert len(list(processed.glob("*/index.json"))) == 1
    assert array_file(root) != killed
    assert (np.load(array_file(root)).reshape(8, -1).max(axis=1) > 0).all()


def test_two_builds_at_once_give_one_array(make_images):
    root = make_images({"a": 30, "b": 30})
    script = SLOW_BUILD.format(root=str(ROOT), data=str(root), seconds=0.02)
    command = [sys.executable, "-c", script]
    pair = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in pair:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert array_file(root).exists()


def test_builds_killed_at_any_moment_are_followed_by_correct_ones(make_images):
    root = make_images({"a": 150, "b": 150}, size=120)
    started = time.monotonic()
    expected, metadata = build(root)
    duration = time.monotonic() - started
    moments = random.Random(0)
    folder = array_file(root).parent
    num_killed = 0
    for _ in range(200):
        before = array_file(root).name
        (folder / "index.json").unlink()
        child = multiprocessing.get_context("fork").Process(target=build, args=(root,))
        child.start()
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
        if num_killed == 20:
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


# ---------------------------------------------------------------------------- splits


def test_any_names_and_fractions_work(make_images):
    root = make_images({"a": 8, "b": 8})
    splits, metadata = build(root, splits={"fit": 0.5, "check": 0.5})
    assert {name: len(split) for name, split in splits.items()} == {"fit": 8, "check": 8}
    assert set(metadata["split"]) == {"fit", "check"}


@pytest.mark.parametrize(
    "splits",
    [{"train": 0.7, "test": 0.2}, {"train": 1.2, "test": -0.2}, {}, {"train": float("nan")}],
)
def test_fractions_that_cannot_be_are_refused(make_images, splits):
    with pytest.raises(ValueError, match="splits"):
        build(make_images({"a": 3, "b": 3}), splits=splits)


def test_identical_files_stay_together_whatever_their_class(make_images):
    root = make_images({"Train/a": 20, "Train/b": 20, "Test/b": 10})
    for i in range(10):
        shutil.copy(root / f"Train/a/{i:04d}.png", root / f"Test/b/copy{i}.png")
    _, metadata = build(root)
    assert metadata["picture"].nunique() == 50
    assert metadata.groupby("content_hash")["split"].nunique().max() == 1
    assert metadata.groupby("group")["split"].nunique().max() == 1


def save_lesions(root, counts, seed=0):
    rng = np.random.default_rng(seed)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            lesion = draw_lesion(CLASSES[i % len(CLASSES)], rng, 96)
            lesion.save(root / folder / f"{i:04d}.jpg", quality=90)
    return root


def turn_and_save_again(source, target):
    with Image.open(source) as image:
        image.transpose(Image.Transpose.ROTATE_90).resize((80, 80)).save(target, quality=90)


def test_near_duplicates_stay_together_and_count_as_one_picture(tmp_path):
    root = save_lesions(tmp_path / "raw", {"a": 20, "b": 20})
    for i in range(10):
        turn_and_save_again(root / f"a/{i:04d}.jpg", root / f"a/turned {i}.jpg")
        turn_and_save_again(root / f"b/{i:04d}.jpg", root / f"a/contradicting {i}.jpg")
    _, metadata = build(root)
    assert metadata["picture"].nunique() == 40
    assert metadata["content_hash"].nunique() == 60
    assert metadata.groupby("picture")["split"].nunique().max() == 1
    _, metadata = build(root, label_conflicts="drop")
    assert len(metadata) == 40
    assert not metadata["path"].str.contains("contradicting").any()


def test_the_audit_knows_pictures_labels_splits_and_broken_files(tmp_path):
    root = save_lesions(tmp_path / "raw", {"Train/a": 14, "Train/b": 12, "Test/a": 10})
    turn_and_save_again(root / "Train/b/0003.jpg", root / "Train/a/turned.jpg")
    shutil.copy(root / "Train/a/0001.jpg", root / "Test/a/copy.jpg")
    (root / "Test/a/broken.jpg").write_bytes(b"GIF89a")
    Image.new("RGB", (20, 90), "red").save(root / "Train/b/red.png")
    builder = DatasetBuilder(root, image_size=16)
    findings = builder.audit()
    named = [(row.kind, row.images) for row in findings.itertuples()]
    turned = ("Train/a/turned.jpg", "Train/b/0003.jpg")
    copied = ("Test/a/copy.jpg", "Train/a/0001.jpg")
    assert named == [
        ("unreadable", ("Test/a/broken.jpg",)),
        ("contradiction", turned),
        ("leakage", copied),
        ("identical", copied),
        ("near-duplicate", turned),
        ("tiny", ("Train/b/red.png",)),
        ("flat", ("Train/b/red.png",)),
    ]
    assert builder.audit().equals(findings)  # from the array that is there


@pytest.mark.parametrize("flag", ["splits_csv", "metadata_csv"])
def test_the_audit_finds_leakage_between_the_splits_of_a_table(tmp_path, flag):
    root = save_lesions(tmp_path / "raw", {"a": 12, "b": 12})
    shutil.copy(root / "a/0003.jpg", root / "a/copy.jpg")
    paths = find_images(root)["path"]
    splits = pd.DataFrame({"path": paths, "split": "train"})
    splits.loc[splits["path"] == "a/copy.jpg", "split"] = "test"
    table = write(tmp_path / "table.csv", splits)
    findings = DatasetBuilder(root, image_size=16, **{flag: table}).audit()
    assert findings["kind"].tolist() == ["leakage", "identical"]
    assert DatasetBuilder(root, image_size=16).audit()["kind"].tolist() == ["identical"]


def test_with_splits_by_folders_the_audit_looks_at_the_folders(tmp_path):
    root = save_lesions(tmp_path / "raw", {"Train/a": 12, "Train/b": 12, "Test/a": 10})
    shutil.copy(root / "Train/a/0003.jpg", root / "Test/a/copy.jpg")
    splits = find_images(root)[["path"]].assign(split="train")
    table = write(tmp_path / "table.csv", splits)
    options = {"image_size": 16, "metadata_csv": table}
    by_folders = DatasetBuilder(root, split_by="folders", **options).audit()
    assert by_folders["kind"].tolist() == ["leakage", "identical"]
    assert DatasetBuilder(root, **options).audit()["kind"].tolist() == ["identical"]


def test_splits_do_not_depend_on_the_order_of_the_file_system(make_images, monkeypatch):
    root = make_images({"Train/a": 20, "Test/a": 7, "Train/b": 13})
    _, expected = build(root)
    names = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: sorted(names(path), reverse=True))
    _, metadata = build(root)
    assert metadata.equals(expected)


def test_a_class_of_one_image_is_trained_on_and_warned_of(make_images):
    root = make_images({"a": 10, "b": 10, "lonely": 1})
    with pytest.warns(UserWarning, match=r"lonely \(1 images\) is not in valid, test"):
        _, metadata = build(root)
    assert metadata.loc[metadata["class"] == "lonely", "split"].tolist() == ["train"]


def test_metadata_has_a_row_an_image_with_all_columns(make_images):
    root = make_images({"Train/b": 5, "Train/a": 5})
    Image.new("RGB", (30, 20)).save(root / "Train/a/oblong.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, metadata = build(root)
    assert metadata.columns.tolist() == [
        "path", "class", "label", "source_split", "width", "height", "content_hash", "picture",
        "group", "split",
    ]  # fmt: skip
    assert metadata.groupby("class")["label"].unique().map(list).to_dict() == {"a": [0], "b": [1]}
    oblong = metadata.set_index("path").loc["Train/a/oblong.png"]
    assert (oblong["width"], oblong["height"]) == (30, 20)


# ---------------------------------------------------------------------------- tables


def write(path, table):
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def test_options_that_contradict_one_another_are_refused(tmp_path):
    for options, message in [
        ({"split_by": "folders", "splits_csv": "x.csv"}, "not from both"),
        ({"label_column": "dx"}, "label_column needs the table"),
        ({"split_by": "chance"}, "split_by is 'chance'"),
        ({"label_conflicts": "ignore"}, "label_conflicts is 'ignore'"),
    ]:
        with pytest.raises(ValueError, match=message):
            DatasetBuilder(tmp_path, **options)


def with_conflicts(make_images):
    root = make_images({"Train/a": 20, "Train/b": 20, "Test/a": 4, "Test/b": 8})
    for i in range(6):
        shutil.copy(root / f"Train/a/{i:04d}.png", root / f"Test/b/copy{i}.png")
    shutil.copy(root / "Train/a/0010.png", root / "Train/a/again.png")  # no contradiction
    return root


def test_contradictory_labels_are_kept_dropped_or_an_error(make_images):
    root = with_conflicts(make_images)
    assert len(build(root)[1]) == 59
    _, dropped = build(root, label_conflicts="drop")
    assert len(dropped) == 47
    assert dropped.groupby("picture")["class"].nunique().max() == 1
    assert "Train/a/again.png" in set(dropped["path"])
    with pytest.raises(ValueError, match=r"12 images .* such as .*Train/a/0000\.png"):
        build(root, label_conflicts="error")


def test_images_keep_their_pixels_when_others_are_left_out(make_images):
    root = with_conflicts(make_images)
    whole, _ = build(root)
    part, metadata = build(root, label_conflicts="drop")
    for path in metadata["path"]:
        assert np.array_equal(shown(whole, path), shown(part, path))


def test_splits_by_folders_take_validation_out_of_train_and_report_leakage(make_images):
    root = with_conflicts(make_images)
    with pytest.warns(UserWarning, match=r"leakage: 6 groups .* 12 images"):
        splits, metadata = build(root, split_by="folders")
    of_test = metadata["source_split"] == "Test"
    assert (metadata["split"][of_test] == "test").all()
    assert set(metadata["split"][~of_test]) == {"train", "valid"}
    assert len(splits["valid"]) == pytest.approx(41 * 0.2 / 0.9, abs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(root, split_by="folders", label_conflicts="drop")


def test_a_validation_folder_is_taken_as_it_is(make_images):
    root = make_images({f"{s}/{c}": 3 for s in ("train", "VAL", "Test") for c in "ab"})
    splits, metadata = build(root, split_by="folders")
    assert {name: len(split) for name, split in splits.items()} == dict.fromkeys(splits, 6)
    assert (metadata["split"] == metadata["source_split"].str.lower().replace("val", "valid")).all()
    with pytest.raises(ValueError, match="is in no folder named Train"):
        build(make_images({"a": 3, "b": 3}, name="plain"), split_by="folders")
    untested = make_images({"Train/a": 3, "Train/b": 3}, name="untested")
    with pytest.raises(ValueError, match="no folder for the test split"):
        build(untested, split_by="folders")


def test_an_earlier_table_of_splits_gives_the_same_splits(make_images, tmp_path):
    root = make_images({"a": 20, "b": 20})
    _, first = build(root)
    path = write(tmp_path / "splits.csv", first.sample(frac=1, random_state=0))
    splits, again = build(root, splits_csv=path, seed=7)
    assert again["split"].tolist() == first["split"].tolist()
    assert list(splits) == ["train", "valid", "test"]
    (root / "a/0000.png").unlink()
    with pytest.warns(UserWarning, match="1 of its images are not here"):
        build(root, splits_csv=path)


# ---------------------------------------------------------------------------- data sets, loaders


@pytest.fixture
def splits(make_images):
    return build(make_images({"a": 40, "b": 20, "c": 10}))[0]


def test_an_item_is_a_float_image_and_a_label(splits):
    train = splits["train"]
    image, label = train[3]
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    stored = torch.from_numpy(train.gather([3])[0])
    assert torch.equal(image, stored.permute(2, 0, 1) / 255)
    assert label == train.labels[3] == train.classes.index(train.metadata["class"][3])


@pytest.mark.parametrize("preprocessors", [[], [lambda image: image[:, ::-1]]])
def test_a_single_image_is_prepared_as_the_builder_does(make_images, preprocessors):
    root = make_images({"a": 4, "b": 4}, size=50)
    splits, _ = build(root, splits={"train": 1.0}, preprocessors=preprocessors)
    for i, path in enumerate(splits["train"].metadata["path"]):
        alone = prepare_image(root / path, 16, preprocessors)
        assert np.array_equal(alone, splits["train"].gather([i])[0])
    with pytest.raises(UnreadableImageError, match="nothing.jpg: No such file"):
        prepare_image(root / "nothing.jpg")


def test_a_copy_in_another_process_opens_the_array_again(splits):
    train = splits["train"]
    train[0]
    assert len(pickle.dumps(train)) < train.gather(np.arange(len(train))).nbytes
    assert torch.equal(pickle.loads(pickle.dumps(train))[5][0], train[5][0])
    alone = list(DataLoader(train, batch_size=8))
    for context in ("fork", "spawn"):
        helped = list(
            DataLoader(train, batch_size=8, num_workers=1, multiprocessing_context=context)
        )
        assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, helped, strict=True))


def test_an_epoch_shows_each_image_once(splits):
    loaders = create_dataloaders(splits, batch_size=16, device="cpu", augmentation=False)
    train = splits["train"]
    batches = list(loaders["train"])
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 1]
    assert len(loaders["train"]) == 4
    expected = sorted(train[i][0].sum().item() for i in range(len(train)))
    assert sorted(torch.cat([x for x, _ in batches]).sum((1, 2, 3)).tolist()) == pytest.approx(
        expected, rel=1e-5
    )
    valid = torch.cat([labels for _, labels in loaders["valid"]])
    assert valid.tolist() == splits["valid"].labels.tolist()  # in order


def take(stream, count):
    return [next(stream) for _ in range(count)]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("balanced", [False, True])
def test_batch_k_depends_on_the_seed_and_k_alone(splits, balanced):
    def loader(**options):
        return create_dataloaders(splits, 8, device="cpu", balanced=balanced, **options)["train"]

    first = take(loader().batches(), 20)
    assert {images.shape for images, _ in first} == {(8, 3, 16, 16)}
    used = loader()
    list(used)  # an epoch before changes nothing
    assert same(take(used.batches(start=13), 7), first[13:])
    assert same(take(loader(num_workers=2).batches(), 6), first[:6])
    assert not same(take(loader(seed=7).batches(), 20), first)
    images = torch.cat([images for images, _ in first])
    assert len(torch.unique(images.flatten(1), dim=0)) == len(images)  # every view is its own


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_cut_the_batches_that_one_would_have(splits, balanced, world_size):
    def streams(batch_size, **place):
        options = {"device": "cpu", "balanced": balanced} | place
        loader = create_dataloaders(splits, batch_size, **options)["train"]
        return take(loader.batches(start=2), 8)

    whole = streams(4 * world_size)
    parts = [streams(4, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [
        tuple(map(torch.cat, zip(*pieces, strict=True))) for pieces in zip(*parts, strict=True)
    ]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole, joined, strict=True))
    # Views and all: nothing but the mean of an image may be added up in another order.
    assert all(torch.allclose(a[0], b[0], atol=1e-6) for a, b in zip(whole, joined, strict=True))


@given(world_size=st.integers(1, 9), batch_size=st.integers(1, 9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_each_image_of_an_epoch_goes_to_exactly_one_process(splits, world_size, batch_size):
    options = {"device": "cpu", "world_size": world_size}
    loaders = [
        create_dataloaders(splits, batch_size, rank=rank, **options) for rank in range(world_size)
    ]
    for name, split in splits.items():
        batches = [list(loader[name]) for loader in loaders]
        assert [len(loader[name]) for loader in loaders] == [len(part) for part in batches]
        labels = [labels for part in batches for _, labels in part]
        assert sorted(torch.cat(labels).tolist()) == sorted(split.labels.tolist())
    # What is not shuffled comes in order, so that the results can be put together again.
    images = torch.cat(
        [images for part in (list(o["valid"]) for o in loaders) for images, _ in part]
    )
    valid = splits["valid"]
    assert torch.equal(images, torch.stack([valid[i][0] for i in range(len(valid))]))


def test_images_that_lie_on_the_device_are_those_in_the_array(splits):
    train, indices = splits["train"], np.array([5, 0, 48, 5])
    (images, labels) = DeviceDataset(train, torch.device("cpu")).gather_batch(indices)
    assert np.array_equal(images["images"], train.gather(indices))
    assert np.array_equal(labels, train.labels[indices])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_batches_on_the_gpu_are_those_on_the_cpu(splits, monkeypatch, share):
    monkeypatch.setattr(batches, "MAX_GPU_FRACTION", share)  # 0: from pinned memory
    streams = [create_dataloaders(splits, 8, device=d)["train"].batches() for d in ("cpu", "cuda")]
    for (images, labels), (on_gpu, labels_on_gpu) in zip(
        *(take(s, 6) for s in streams), strict=True
    ):
        assert on_gpu.device.type == labels_on_gpu.device.type == "cuda"
        assert torch.equal(labels, labels_on_gpu.cpu())
        assert torch.allclose(images, on_gpu.cpu(), atol=1e-4)


@pytest.fixture
def with_ages(splits):
    """Splits with an input beside the images, from which each image's row can be told."""
    for split in splits.values():
        numbers = torch.arange(len(split), dtype=torch.float32)
        split.add_input("age", torch.stack([numbers, split.image_size * numbers], dim=1))
    return splits


@pytest.mark.parametrize("place", ["this process", "workers", "device memory"])
def test_a_further_input_comes_in_a_dict_beside_its_images(with_ages, monkeypatch, place):
    if place == "device memory":
        monkeypatch.setattr(dataset, "fits_in_gpu_memory", lambda dataset, device: True)
    options = {"device": "cpu", "num_workers": int(place == "workers"), "augmentation": False}
    loaders = create_dataloaders(with_ages, 8, **options)
    epoch, stream = list(loaders["valid"]), take(loaders["train"].batches(), 9)
    for name, found in (("valid", epoch), ("train", stream)):
        split = with_ages[name]
        for inputs, labels in found:
            assert list(inputs) == ["images", "age"]
            rows = inputs["age"][:, 0].long()
            assert torch.equal(inputs["age"], split.extra_inputs["age"][rows])
            assert torch.equal(inputs["images"], to_float(torch.from_numpy(split.gather(rows))))
            assert torch.equal(labels, torch.from_numpy(split.labels)[rows])
    assert torch.cat([inputs["age"][:, 0] for inputs, _ in epoch]).tolist() == list(range(14))


def test_a_further_input_changes_neither_images_nor_order(make_images):
    root = make_images({"a": 12, "b": 12})
    plain, extended = build(root)[0], build(root)[0]
    extended["train"].add_input("age", torch.zeros(len(extended["train"])))
    streams = [create_dataloaders(s, 8, device="cpu")["train"].batches() for s in (plain, extended)]
    alone, with_age = (take(stream, 6) for stream in streams)
    assert same(alone, [(inputs["images"], labels) for inputs, labels in with_age])


def test_an_item_of_a_data_set_with_a_further_input_is_a_dict_and_a_label(with_ages):
    train = with_ages["train"]
    inputs, label = train[3]
    assert inputs["images"].shape == (3, 16, 16) and label == train.labels[3]
    assert inputs["age"].tolist() == [3, 48]
    inputs, labels = next(iter(DataLoader(train, batch_size=4)))
    assert inputs["age"].shape == (4, 2) and labels.tolist() == train.labels[:4].tolist()


def test_an_input_that_does_not_fit_the_images_is_refused(splits):
    with pytest.raises(ValueError, match="input age has 3 rows for 49 images"):
        splits["train"].add_input("age", torch.zeros(3))
    with pytest.raises(ValueError, match="cannot be called images"):
        splits["train"].add_input("images", torch.zeros(49))


def test_loaders_leave_the_global_random_state_alone(splits):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    loaders = create_dataloaders(splits, 8, device="cpu", balanced=True, num_workers=1)
    take(loaders["train"].batches(), 3)
    list(loaders["train"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_only_the_training_split_is_augmented(splits):
    loaders = create_dataloaders(splits, 1, device="cpu")
    for number, (image, _) in enumerate(loaders["valid"]):
        assert torch.equal(image[0], splits["valid"][number][0])
    originals = {splits["train"][i][0].numpy().tobytes() for i in range(len(splits["train"]))}
    assert not any(image.numpy().tobytes() in originals for image, _ in loaders["train"])


def test_mistakes_in_loaders_are_said(splits):
    with pytest.raises(ValueError, match="batch_size is 0"):
        create_dataloaders(splits, batch_size=0)
    with pytest.raises(ValueError, match="num_workers is -1"):
        create_dataloaders(splits, num_workers=-1)
    with pytest.raises(ValueError, match="seed is -1"):
        create_dataloaders(splits, seed=-1)
    with pytest.raises(ValueError, match="rank is 2"):
        create_dataloaders(splits, rank=2, world_size=2)


def test_a_split_without_images_is_named(make_images):
    with pytest.warns(UserWarning, match="not every split"):
        splits, _ = build(make_images({"a": 1, "b": 1}))
    with pytest.raises(ValueError, match="no images are left for valid, test"):
        create_dataloaders(splits)


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
