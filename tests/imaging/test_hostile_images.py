"""Odd and hostile image files, each made here: what a viewer shows is read, the rest is named."""

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.fuzz import make_files, mutate, outcome_of
from dataset import DatasetBuilder, UnreadableImageError, find_images, prepare_image, read_image
from imaging.decode import MAX_BYTES, decode

ROOT = Path(__file__).parents[2]
ORIENTATION, STRIP_OFFSETS = 274, 273


def smooth(width=48, height=32):
    """A smooth image without symmetry, which JPEG changes little."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 255 // height, columns * 255 // width, (rows + columns) * 2]
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(contents):
    return np.asarray(decode(contents)[0])


def is_close(first, second, tolerance=3.0):
    difference = np.abs(first.astype(int) - second.astype(int))
    return first.shape == second.shape and difference.mean() < tolerance


def with_chunk(png, kind, data, checksum=None):
    """The PNG with a further chunk behind its header."""
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return png[:33] + chunk + png[33:]


def with_segment(jpeg, marker, data, times=1):
    """The JPEG with a further segment at its beginning."""
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data
    return jpeg[:2] + segment * times + jpeg[2:]


def with_scans(jpeg, number):
    """The progressive JPEG with its last scan `number` times."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * number + jpeg[-2:]


def with_tags(tiff, changed=(), added=()):
    """The TIFF with values of its tags changed to (type, count, value), and tags added to it."""
    (start,) = struct.unpack_from("<I", tiff, 4)
    (number,) = struct.unpack_from("<H", tiff, start)
    tags = [struct.unpack_from("<HHII", tiff, start + 2 + 12 * i) for i in range(number)]
    tags = [(tag[0], *dict(changed).get(tag[0], tag[1:])) for tag in tags] + list(added)
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = tiff[:4] + struct.pack("<I", len(tiff))
    return header + tiff[8:] + struct.pack("<H", len(tags)) + directory + bytes(4)


def greedy_exif(num_bytes):
    """EXIF whose 60,000 tags all claim the whole of it: read naively, it takes gigabytes."""
    tags = b"".join(struct.pack("<HHII", i, 7, num_bytes - 8, 8) for i in range(60_000))
    exif = b"II*\0" + struct.pack("<IH", 8, 60_000) + tags
    return exif.ljust(num_bytes, b"\0")


def interlaced(image):
    """A PNG in the seven passes of Adam7, which Pillow cannot write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)]
    passes += [(2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for y, x, dy, dx in passes for row in image[y::dy, x::dx] if row.size]
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    height, width = image.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return png_of(header, data)


def png_of(header, data):
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        png += struct.pack(">I", len(content)) + kind + content + crc
    return png


def flat_png(width, height, data=None):
    """A PNG of one bit a pixel, all black."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    if data is None:
        data = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 1)
    return png_of(header, data)


def exif_of(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


# ---------------------------------------------------------------------------- read as shown


def test_sixteen_bits_are_reduced_not_clipped():
    values = np.array([[0, 257, 30_000, 65_535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decoded(encoded(values, kind))[0, :, 0].tolist() == [0, 1, 117, 255]


def test_transparency_lies_over_white():
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0]]], dtype=np.uint8)
    assert decoded(encoded(pixels))[0].tolist() == [[200, 0, 0], [255, 255, 255]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    contents = encoded(palette, transparency=1)
    assert decoded(contents)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_cmyk_and_grey_become_rgb():
    red = decoded(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))[4, 4]
    assert red[0] > 240 and red[1] < 15 and red[2] < 15
    for kind in ("PNG", "JPEG"):
        assert decoded(encoded(Image.new("L", (8, 8), 90), kind))[0, 0].tolist() == [90, 90, 90]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :8] = 255  # a mark in the upper left corner
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    contents = encoded(np.ascontiguousarray(stored), kind, exif=exif_of(orientation))
    image, size = decode(contents)
    assert size == image.size == (32, 16)
    assert is_close(np.asarray(image), upright)


@pytest.mark.parametrize("orientation", [0, 9, 600])
def test_an_orientation_that_is_none_changes_nothing(orientation):
    contents = encoded(smooth(), exif=exif_of(orientation))
    assert np.array_equal(decoded(contents), smooth())


JPEG, PNG, TIFF = (encoded(smooth(), kind) for kind in ("JPEG", "PNG", "TIFF"))
BROKEN_EXIF = [
    b"Exif\0\0",
    b"Exif\0\0II*\0",
    b"Exif\0\0II*\0" + b"\xff" * 200,
    b"Exif\0\0no TIFF at all",
    b"Exif\0\0" + struct.pack(">2sHIH", b"MM", 42, 8, 9) + b"\x01\x12" * 20,
]
# A file as its name says, and what a viewer shows of it.
SHOWN_BY_A_VIEWER = {
    "progressive.jpg": encoded(smooth(), "JPEG", progressive=True),
    "many_scans.jpg": with_scans(encoded(smooth(), "JPEG", progressive=True), 50),
    "a_png_inside.jpg": PNG,
    "a_jpeg_inside.png": JPEG,
    "a_gif_only_by_name.gif": PNG,
    "more_behind_its_end.jpg": JPEG + b"\xff\xda\xff\xd8" * 2000,
    "more_behind_its_end.png": PNG + b"IDAT" * 2000,
    **{f"broken_exif_{i}.jpg": with_segment(JPEG, 0xE1, e) for i, e in enumerate(BROKEN_EXIF)},
    **{f"broken_exif_{i}.png": with_chunk(PNG, b"eXIf", e) for i, e in enumerate(BROKEN_EXIF)},
    "greedy_exif.jpg": with_segment(JPEG, 0xE1, b"Exif\0\0" + greedy_exif(720_100)[:65_000], 90),
    "greedy_exif.png": with_chunk(PNG, b"eXIf", greedy_exif(9_000_000)),
    "greedy_tags.tif": with_tags(TIFF, added=[(i, 7, 700_000, 8) for i in range(600, 60_000)]),
    "broken_pages.jpg": with_segment(JPEG, 0xE2, b"MPF\0II*\0" + b"\xff" * 50),
    "preview_inside.jpg": with_segment(JPEG, 0xE1, b"Exif\0\0" + JPEG[:600]),
    "text_bomb.png": with_chunk(PNG, b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000), 1)),
    "profile_bomb.png": with_chunk(PNG, b"iCCP", b"a\0\0" + zlib.compress(bytes(20_000_000), 1)),
    "wrong_checksum_of_a_comment.png": with_chunk(PNG, b"tEXt", b"a\0b", checksum=1),
    "no_end.png": PNG[:-12],
    "interlaced.png": interlaced(smooth()),
    "palette.png": encoded(Image.fromarray(smooth()).quantize(256)),
    "animated.png": encoded(smooth(), save_all=True, append_images=[Image.new("RGB", (48, 32))]),
    "animated.webp": encoded(
        smooth(), "WEBP", save_all=True, append_images=[Image.new("RGB", (48, 32))]
    ),
    "pages.tif": encoded(smooth(), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "pages_in_a_ring.tif": TIFF[:-4] + struct.pack("<I", 8),
    "big.tif": encoded(smooth(), "TIFF", big_tiff=True),
    "lzw.TIFF": encoded(smooth(), "TIFF", compression="tiff_lzw"),
    "deflate.tif": encoded(smooth(), "TIFF", compression="tiff_adobe_deflate"),
    "jpeg.tif": encoded(smooth(), "TIFF", compression="jpeg", quality=95),
    "plain.bmp": encoded(smooth(), "BMP"),
}


@pytest.mark.parametrize("name", SHOWN_BY_A_VIEWER)
def test_what_a_viewer_shows_is_read_quickly(tmp_path, name):
    (tmp_path / name).write_bytes(SHOWN_BY_A_VIEWER[name])
    started = time.process_time()
    image = read_image(tmp_path / name)
    assert time.process_time() - started < 2
    assert is_close(image, smooth(), tolerance=8)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_extreme_shapes_are_read_and_prepared(tmp_path, size, kind):
    path = tmp_path / "thin"
    path.write_bytes(encoded(Image.new("RGB", size, (200, 30, 60)), kind))
    assert read_image(path).shape == (size[1], size[0], 3)
    assert is_close(prepare_image(path, 16), np.full((16, 16, 3), (200, 30, 60)))


# ---------------------------------------------------------------------------- refused


def huge_webp():
    """An animation on a canvas of 20000 x 20000."""
    whole = SHOWN_BY_A_VIEWER["animated.webp"]
    size = whole.index(b"VP8X") + 12
    return whole[:size] + (20_000 - 1).to_bytes(3, "little") * 2 + whole[size + 6 :]


@pytest.mark.parametrize("tenth", range(1, 10))
@pytest.mark.parametrize(
    "options",
    [
        {"kind": "JPEG"},
        {"kind": "JPEG", "progressive": True},
        {"kind": "PNG"},
        {"kind": "TIFF"},
        {"kind": "TIFF", "compression": "tiff_lzw"},
        {"kind": "BMP"},
        {"kind": "WEBP"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("shorter_side", [None, 8])
def test_a_file_cut_off_at_any_tenth_is_refused(options, tenth, shorter_side):
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    contents = encoded(noise, **options)
    with pytest.raises(UnreadableImageError):
        decode(contents[: len(contents) * tenth // 10], shorter_side)


def png_damaged_inside():
    at = PNG.index(b"IDAT") + 40
    return PNG[:at] + bytes([PNG[at] ^ 1]) + PNG[at + 1 :]


REFUSED = {
    "empty.jpg": (b"", "empty file"),
    "text.jpg": (b"a lesion on the left arm\n", "not an image, or of an unknown"),
    "signature_alone.png": (PNG[:8], "truncated"),
    "no_end.jpg": (JPEG[:-2], "truncated"),
    "zeros_for_the_second_half.jpg": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "truncated"),
    "damaged.png": (png_damaged_inside(), "wrong checksum of IDAT"),
    "moving.gif": (encoded(smooth(), "GIF"), "GIF is not supported"),
    "a_gif_inside.jpg": (encoded(smooth(), "GIF"), "GIF is not supported"),
    "telephone.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC and AVIF are not supported"),
    "bomb.png": (flat_png(10_000, 10_000), "10,000 x 10,000 pixels, over the limit"),
    "huge.png": (flat_png(20_000, 20_000, b""), "20,000 x 20,000 pixels, over the limit"),
    "huge.webp": (huge_webp(), "exceeds limit of .* pixels"),
    "huge.tif": (with_tags(TIFF, {256: (4, 1, 2**31)}.items()), "pixels, over the limit"),
    "scans.jpg": (
        with_scans(encoded(smooth(), "JPEG", progressive=True), 1001),
        "scans, too many",
    ),
    "large_scans.jpg": (
        with_scans(encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True), 60),
        "scans, too many",
    ),
    "segments.jpg": (with_segment(JPEG, 0xFE, b"", 100_001), "100,000 segments"),
    "chunks.png": (PNG[:33] + with_chunk(b"", b"tEXt", b"") * 100_001, "100,000 chunks"),
    "strips.tif": (with_tags(TIFF, {STRIP_OFFSETS: (4, 2**31, 8)}.items()), "1,000,000 values"),
    "shorter_than_it_says.tif": (with_tags(TIFF, {257: (4, 1, 64)}.items()), "strips or tiles"),
    "directory_outside.tif": (TIFF[:4] + b"\xff\xff\xff\xff" + TIFF[8:], "truncated"),
    "floats.tif": (encoded(Image.new("F", (9, 9)), "TIFF"), "floating-point numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_is_refused_quickly_with_its_name_and_reason(tmp_path, name):
    contents, reason = REFUSED[name]
    (tmp_path / name).write_bytes(contents)
    started = time.process_time()
    with pytest.raises(UnreadableImageError, match=f"{name}: .*{reason}"):
        read_image(tmp_path / name)
    assert time.process_time() - started < 2


def test_a_file_of_too_many_bytes_is_refused_unread(tmp_path):
    with open(tmp_path / "large.tif", "wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole, which takes no space
    with pytest.raises(UnreadableImageError, match="536,870,913 bytes, over the limit"):
        read_image(tmp_path / "large.tif")


def run_length_bmp(width, height, data):
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    start = 54 + 1024
    return struct.pack("<2sIHHI", b"BM", 0, 0, 0, start) + info + bytes(range(256)) * 4 + data


def test_run_lengths_of_a_bmp_are_bounded():
    pixels = decoded(run_length_bmp(3, 2, bytes([3, 7, 0, 0, 2, 8, 1, 9, 0, 1])))
    assert (pixels[0] != pixels[1]).any()
    for width, height, data in ((3000, 3000, b""), (80_000_000, 1, b"\0\2\0\xff"), (9, 9, None)):
        with pytest.raises(UnreadableImageError, match="run-length-encoded BMP of over"):
            decode(run_length_bmp(width, height, bytes(2**22) if data is None else data))


# ---------------------------------------------------------------------------- in a folder


def make_hostile(folder):
    """Puts what cannot be read into a folder, and gives what the message should say of each."""
    reasons = {}
    for name in ("empty.jpg", "text.jpg", "moving.gif", "huge.png", "no_end.jpg"):
        (folder / name).write_bytes(REFUSED[name][0])
        reasons[name] = REFUSED[name][1]
    (folder / "folder.jpg").mkdir()
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "looping.jpg").symlink_to("looping.jpg")
    os.mkfifo(folder / "pipe.jpg")
    reasons |= {"folder.jpg": "a folder", "dangling.jpg": "No such file or directory"}
    return reasons | {"looping.jpg": "Too many levels", "pipe.jpg": "not a regular file"}


def test_all_unreadable_images_are_named_at_once(make_images):
    root = make_images({"a": 4, "b": 4})
    reasons = make_hostile(root / "b")
    for _ in range(2):  # the second time from the array on disk
        with pytest.raises(UnreadableImageError) as caught:
            DatasetBuilder(root, image_size=16).build()
        message = str(caught.value)
        assert "9 of 17" in message and "\n" not in message
        for name, reason in reasons.items():
            assert f"b/{name} (" in message and reason in message
    with pytest.warns(UserWarning, match="9 of 17 images cannot be read and are skipped"):
        splits, metadata = DatasetBuilder(root, image_size=16, skip_unreadable=True).build()
    assert len(metadata) == 8 == sum(map(len, splits.values()))
    images = np.concatenate([s.gather(np.arange(len(s))) for s in splits.values()])
    assert images.reshape(8, -1).max(axis=1).min() > 0  # no row of zeros stands for an image


ODD_NAMES = [
    "with spaces.png",
    "two\nlines.png",
    "quotes ' \" `.png",
    "Leberfleck – 痣 🔬.png",
    "-rf.png",
    "--.png",
    "%s {0} $(ls).png",
    "\udce9t\udce9.png",  # é in Latin-1, as Python gives bytes that are no UTF-8
    "n" * 251 + ".png",
]


def test_odd_names_are_names_like_any_other(make_images):
    root = make_images({"a": 3, "b": 3})
    for number, name in enumerate(ODD_NAMES):
        contents = encoded(Image.new("RGB", (20, 20), (10 * number, 99, 0)))
        (root / "a" / name).write_bytes(contents)
    splits, metadata = DatasetBuilder(root, image_size=16).build()
    assert {f"a/{name}" for name in ODD_NAMES} <= set(metadata["path"])
    for number, name in enumerate(ODD_NAMES):
        (found,) = (s for s in splits.values() if f"a/{name}" in set(s.metadata["path"]))
        row = found.metadata["path"].tolist().index(f"a/{name}")
        assert found.gather(np.array([row]))[0, 8, 8].tolist() == [10 * number, 99, 0]


def test_unreadable_images_of_odd_names_are_named_in_one_line(make_images):
    root = make_images({"a": 3, "b": 3})
    for name in ODD_NAMES:
        (root / "a" / name).write_bytes(b"")
    with pytest.raises(UnreadableImageError, match=f"{len(ODD_NAMES)} of 15") as caught:
        DatasetBuilder(root, image_size=16).build()
    assert str(caught.value).isprintable()
    assert "two\\nlines.png" in str(caught.value)


def test_a_file_without_read_permission_is_named(make_images, without_the_rights_of_root):
    root = make_images({"a": 3, "b": 3})
    (root / "a/0001.png").chmod(0)
    message = r"1 of 6 images cannot be read: a/0001\.png \(Permission denied\)"
    with without_the_rights_of_root(), pytest.raises(UnreadableImageError, match=message):
        DatasetBuilder(root, image_size=16).build()


def test_a_folder_named_like_an_image_is_a_folder_if_it_holds_images(make_images):
    root = make_images({"a": 1, "b.jpg": 2})
    assert find_images(root)["class"].tolist() == ["a", "b.jpg", "b.jpg"]


# ---------------------------------------------------------------------------- fuzzing

FILES = make_files()


def test_the_files_that_fuzzing_starts_from_are_read():
    assert {name: outcome_of(contents, None) for name, contents in FILES.items()} == dict.fromkeys(
        FILES, "read"
    )


@settings(max_examples=400, deadline=5000)
@given(
    st.sampled_from(sorted(FILES)), st.randoms(use_true_random=False), st.sampled_from([None, 16])
)
def test_mutated_files_end_in_an_image_or_a_refusal(name, rng, shorter_side):
    contents = mutate(FILES[name], rng)
    assert outcome_of(contents, shorter_side) in ("read", "refused")
