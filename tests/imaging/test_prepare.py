"""Preprocessors and their fingerprint, resizing and cropping."""

import functools
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from dataset import (
    UnreadableImageError,
    center_crop,
    fingerprint,
    normalize,
    prepare_image,
    resize,
)
from imaging import prepare
from tests.samples import build, shown

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [(33, 57), (60, 45), (224, 224), (7, 5), (300, 256), (100, 900)])
def test_resize_and_crop_are_those_of_torchvision(size):
    width, height = size
    rng = np.random.default_rng(width)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(image)
    difference = np.abs(
        np.asarray(prepare.resize_and_crop(image, 224)).astype(int) - np.asarray(expected)
    )
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


@pytest.mark.parametrize(
    ("preprocessor", "message"),
    [
        (lambda x: x[:, :, 0], r"preprocessor <lambda> on a/0000\.png has shape \(40, 40\)"),
        (lambda x: x.astype(np.int32), "<lambda>.*int32"),
        (lambda x: x.astype(np.float32), r"<lambda> .* values from .* in \[0, 1\]"),
        (lambda x: x.astype(np.float32) * np.nan, "<lambda> .* values from nan to nan"),
        (lambda x: x.nonsense, "<lambda> on a/0000.png: AttributeError"),
    ],
)
def test_a_preprocessor_that_gives_no_image_is_named(make_images, preprocessor, message):
    root = make_images({"a": 4, "b": 4})
    with pytest.raises(ValueError, match=message):
        build(root, preprocessors=[preprocessor], num_workers=1)


@pytest.mark.parametrize("preprocessors", [[], [lambda image: image[:, ::-1]]])
def test_a_single_image_is_prepared_as_the_builder_does(make_images, preprocessors):
    root = make_images({"a": 4, "b": 4}, size=50)
    splits, _ = build(root, splits={"train": 1.0}, preprocessors=preprocessors)
    for i, path in enumerate(splits["train"].metadata["path"]):
        alone = prepare_image(root / path, 16, preprocessors)
        assert np.array_equal(alone, splits["train"].gather([i])[0])
    with pytest.raises(UnreadableImageError, match="nothing.jpg: No such file"):
        prepare_image(root / "nothing.jpg")


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
    @classmethod
    def make(cls):
        return {4}
class Sub(Base):
    def __init__(self):
        self.a, self.b, self.c, self.d = 1, {5}, {6}, {{"e": [{7}]}}
f = Sub()
"""


def test_a_fingerprint_sees_all_of_an_object():
    def printed(numbers):
        namespace = {"__name__": "of_the_user"}
        exec(CALLABLES.format(*numbers), namespace)
        return fingerprint([namespace["f"]])

    plain = [1] * 8
    found = [printed(plain)] + [printed([*plain[:i], 2, *plain[i + 1 :]]) for i in range(8)]
    assert len(set(found)) == 9
    assert printed(plain) == found[0]


def test_a_fingerprint_tells_preprocessors_apart_and_the_same_ones_alike():
    rare = "def f(x, limit={}):\n    return x * 0 if x.shape == (1, {}, 3) else {}"
    nested = "def f(x):\n    return [y for y in [x] if y.size or {}][0]"
    sources = [
        rare.format(1, 2, "x"),
        rare.format(2, 2, "x"),  # another default, which changes nothing in the probes
        rare.format(1, 3, "x"),  # another constant
        rare.format(1, 2, "x.copy()"),
        nested.format("1"),
        nested.format("2"),  # another constant of a function inside
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
    with pytest.raises(ValueError, match=f"preprocessor {name} gives different results") as error:
        fingerprint([resize, preprocessor])
    assert "augmentation" in str(error.value) and "\n" not in str(error.value)


def test_a_build_with_a_random_preprocessor_prepares_nothing(make_images):
    root = make_images({"a": 3, "b": 3})
    with pytest.raises(ValueError, match="preprocessor flip gives different results"):
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
from imaging.prepare import fingerprint

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


def test_a_fingerprint_is_the_same_in_every_run(capsys):
    other = subprocess.run(
        [sys.executable, "-c", OF_ANY_RUN],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    exec(OF_ANY_RUN, {"__name__": "__main__"})  # in this process, whose hashes are others
    assert capsys.readouterr().out == other.stdout and len(other.stdout.split()) == 2
