"""An image file from anywhere → its upright RGB pixels, or one kind of error, in bounded time.

What an application may add to the image in a file (EXIF, colour profiles, text, previews, further
pages) is taken out before Pillow sees the file: a viewer shows the image however broken that is,
and so it costs neither time nor memory.
"""

import io
import os
import stat
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_BYTES = 512 * 2**20
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb
# Each scan of a JPEG passes over the whole image, however few bytes it has. Encoders make about
# ten; this allows 11 of the largest image and 1,000 of a small one.
MAX_SCANNED_PIXELS = 1_000_000_000
MAX_RLE_PIXELS = 2**22  # Pillow decodes run-length-encoded BMPs in Python, a megapixel a second
MAX_PARTS = 100_000  # segments of a JPEG, chunks of a PNG
MAX_TAG_VALUES = 1_000_000  # of one tag of a TIFF, such as the places of its strips

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two are BigTIFF's
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")

# JPEG: all that an application may add, but for those by which decoders know the colour space.
METADATA_MARKERS = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
SOI, EOI, SOS, EXIF_MARKER = 0xD8, 0xD9, 0xDA, 0xE1
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# TIFF: size, coding, strips, tiles, palette and colour space, by the numbers of the specification.
TIFF_TAGS = (
    *(256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521),
    *(529, 530, 531, 532),
)
ORIENTATION_TAG = 274
TURN_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """A file that should be an image and cannot be read as one."""


def read_regular_file(path: str | Path) -> tuple[bytes, os.stat_result]:
    """Returns the bytes of a file, and its state just before they were read.

    Raises UnreadableImageError, which does not name the file, if it is not a regular one, cannot be
    opened or has more than `MAX_BYTES`.
    """
    try:
        # A pipe would be waited on for ever, so the kind of file is checked before opening it.
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImageError("a folder")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImageError("not a regular file")
        if status.st_size > MAX_BYTES:
            raise UnreadableImageError(
                f"a file of {status.st_size:,} bytes, over the limit of {MAX_BYTES:,}"
            )
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            return file.read(), status
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error


def decode(contents: bytes, shorter_side: int | None = None) -> tuple[Image.Image, tuple[int, int]]:
    """Returns the upright RGB image in the contents of a file, and its original width and height.

    It is the first page or frame, with EXIF orientation applied, transparency laid over white and
    16 bits reduced to 8. With `shorter_side`, a JPEG is decoded, at a fraction of the work, to a
    half, a quarter or an eighth of its size where that leaves as many pixels.

    Raises UnreadableImageError and nothing else, whatever the contents are. More than `MAX_PIXELS`
    are refused before memory is taken for them.
    """
    if not contents:
        raise UnreadableImageError("empty file")
    try:
        file, orientation = _open(contents)
        width, height = file.size
        if shorter_side is not None:
            file.draft(None, scaled_size(width, height, shorter_side))
        file.load()
        if file.format == "WEBP":
            orientation = _orientation(file.info.get("exif", b""))
        image = _to_rgb(file)
    except Exception as error:  # Pillow documents no closed set of errors for damaged files
        raise UnreadableImageError(str(error).strip() or type(error).__name__) from error
    if orientation in TURN_UPRIGHT:
        image = image.transpose(TURN_UPRIGHT[orientation])
    return image, (width, height) if orientation < 5 else (height, width)


def as_uint8(images: ArrayLike, name: str, ndim: int = 3) -> np.ndarray:
    """Returns RGB images, uint8 or float in [0, 1], as uint8 `(..., H, W, 3)` of `ndim` dimensions.

    Raises ValueError, which calls them `name`, for anything else.
    """
    images = np.asarray(images)
    if images.ndim != ndim or images.shape[-1] != 3 or not images.size:
        expected = {3: "(H, W, 3)", 4: "(N, H, W, 3)", 5: "(R, N, H, W, 3)"}[ndim]
        raise ValueError(f"{name} has shape {images.shape}; it must be {expected}, and not empty")
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name} is {images.dtype}; it must be uint8, or float in [0, 1]")
    # Interpolation may leave [0, 1] by a rounding error; anything beyond that is another range.
    low, high = images.min(), images.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"{name} has values from {low} to {high}; floats must be in [0, 1]")
    return (images.clip(0, 1) * 255).round().astype(np.uint8)


def as_shares(values: ArrayLike, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns values that must be of this shape and in [0, 1] as float64.

    Raises ValueError, with this name, for others.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != shape or not values.size:
        raise ValueError(f"{name} has shape {values.shape}; it must be {shape}, and not empty")
    low, high = values.min(), values.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # so written, it refuses NaN
        raise ValueError(f"{name} goes from {low} to {high}; it must be in [0, 1]")
    return values


def scaled_size(width: int, height: int, shorter_side: int) -> tuple[int, int]:
    """Returns width and height at the same aspect ratio, the shorter one being `shorter_side`."""
    if width <= height:
        return shorter_side, int(shorter_side * height / width)
    return int(shorter_side * width / height), shorter_side


def _open(contents: bytes) -> tuple[ImageFile, int]:
    """Returns the image, not decoded yet, and its orientation."""
    # The formats' own classes, as Image.open would warn, in every thread, of what is refused here.
    orientation, num_scans = 1, 1
    kind: type[ImageFile]
    if contents.startswith(b"\xff\xd8\xff"):
        kind, (contents, orientation, num_scans) = JpegImageFile, _strip_jpeg(contents)
    elif contents.startswith(PNG_SIGNATURE):
        kind, (contents, orientation) = PngImageFile, _strip_png(contents)
    elif contents.startswith(TIFF_SIGNATURES):
        kind, (contents, orientation) = TiffImageFile, _strip_tiff(contents)
    elif contents.startswith(b"BM"):
        kind = BmpImageFile
    elif contents.startswith(b"RIFF") and contents[8:12] == b"WEBP":
        kind = WebPImageFile
    elif contents.startswith(b"GIF8"):
        raise UnreadableImageError("GIF is not supported; save it as PNG")
    elif contents[4:8] == b"ftyp" and contents[8:12] in HEIF_BRANDS:
        raise UnreadableImageError("HEIC and AVIF are not supported; save it as JPEG or PNG")
    else:
        raise UnreadableImageError("not an image, or of an unknown format")
    image = kind(io.BytesIO(contents))
    _check_limits(image, len(contents), num_scans)
    return image, orientation


def _check_limits(image: ImageFile, num_bytes: int, num_scans: int) -> None:
    width, height = image.size
    num_pixels, size = width * height, f"{width:,} x {height:,}"
    if num_pixels > MAX_PIXELS:
        raise UnreadableImageError(f"an image of {size} pixels, over the limit of {MAX_PIXELS:,}")
    if num_scans * max(num_pixels, 1_000_000) > MAX_SCANNED_PIXELS:
        raise UnreadableImageError(f"a JPEG with {num_scans:,} scans, too many for {size} pixels")
    # A row counts as 256, as one code skips as many and Pillow fills them before it looks.
    cost = max(width * max(height, 256), num_bytes)
    if image.tile and image.tile[0][0] == "bmp_rle" and cost > MAX_RLE_PIXELS:
        raise UnreadableImageError(f"a run-length-encoded BMP of over {MAX_RLE_PIXELS:,} pixels")
    # What strips or tiles do not cover, Pillow would leave black.
    boxes = (tile[1] or (0, 0, 0, 0) for tile in image.tile)
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in boxes)
    if image.format == "TIFF" and covered < num_pixels:
        raise UnreadableImageError("a TIFF with missing strips or tiles")


def _strip_jpeg(contents: bytes) -> tuple[bytes, int, int]:
    """Returns a JPEG without metadata or what follows its end, its orientation and scans."""
    markers = _find_markers(contents)
    kept, start, orientation, num_scans = [], 0, 1, 0
    end = 2
    for _ in range(MAX_PARTS):
        following = np.searchsorted(markers, end)
        if following == len(markers):
            raise UnreadableImageError("a truncated JPEG, without an end marker")
        at = int(markers[following])
        kind = contents[at + 1]
        if kind == EOI:
            kept.append(contents[start : at + 2])
            return b"".join(kept), orientation, num_scans
        end = at + 2
        if kind != SOI:
            end += int.from_bytes(contents[at + 2 : at + 4], "big")
        num_scans += kind == SOS
        if kind in METADATA_MARKERS:
            if kind == EXIF_MARKER and orientation == 1:
                orientation = _orientation(contents[at + 4 : end])
            kept.append(contents[start:at])
            start = end
    raise UnreadableImageError(f"a JPEG of more than {MAX_PARTS:,} segments")


def _find_markers(contents: bytes) -> np.ndarray:
    """Returns where segments of a JPEG may begin: in metadata also by chance, in pixels never."""
    values = np.frombuffer(contents, np.uint8)
    found = np.flatnonzero(values[:-1] == 0xFF)
    kinds = values[found + 1]
    is_restart = (kinds >= 0xD0) & (kinds <= 0xD7)
    return found[(kinds >= 0xC0) & (kinds < 0xFF) & ~is_restart]


def _strip_png(contents: bytes) -> tuple[bytes, int]:
    """Returns a PNG with only the chunks that make the image, and its orientation."""
    view, at, orientation = memoryview(contents), len(PNG_SIGNATURE), 1
    kept: list[bytes | memoryview] = [PNG_SIGNATURE]
    for _ in range(MAX_PARTS):
        if at + 12 > len(contents) and kept[-1][4:8] == b"IDAT":
            return b"".join(kept), orientation  # the decoder notices missing pixels
        length, kind = int.from_bytes(view[at : at + 4], "big"), contents[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(contents):
            raise UnreadableImageError("a truncated PNG")
        if kind == b"eXIf":
            orientation = _orientation(contents[at + 8 : end - 4])
        elif kind in PNG_CHUNKS:
            if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
                raise UnreadableImageError(
                    f"a damaged PNG, with a wrong checksum of {kind.decode()}"
                )
            kept.append(view[at:end])
        if kind == b"IEND":
            return b"".join(kept), orientation
        at = end
    raise UnreadableImageError(f"a PNG of more than {MAX_PARTS:,} chunks")


def _strip_tiff(contents: bytes) -> tuple[bytes, int]:
    """Returns a TIFF of the first page with only the tags that make the image; its orientation."""
    try:
        tags, order, width = _first_directory(contents)
    except ValueError as error:
        raise UnreadableImageError("a truncated TIFF") from error
    tags = tags[np.unique(tags["tag"], return_index=True)[1]]
    tags = tags[np.isin(tags["tag"], TIFF_TAGS)]
    if (tags["count"] > MAX_TAG_VALUES).any():
        raise UnreadableImageError(f"a TIFF with a tag of more than {MAX_TAG_VALUES:,} values")
    offset = len(contents) + len(contents) % 2  # a directory begins at an even place
    header = contents[:width] + offset.to_bytes(width, order)
    number = len(tags).to_bytes(8 if width == 8 else 2, order)
    rest = contents[len(header) :].ljust(offset - len(header), b"\0")
    stripped = b"".join([header, rest, number, tags.tobytes(), bytes(width)])
    return stripped, _orientation(contents)


def _orientation(exif: bytes) -> int:
    """Returns the orientation in EXIF data or a TIFF: 1 to 8, and 1 where it is not valid."""
    exif = exif.removeprefix(b"Exif\0\0")
    if not exif.startswith(TIFF_SIGNATURES):
        return 1
    try:
        tags, order, _ = _first_directory(exif)
        tag = tags[tags["tag"] == ORIENTATION_TAG][0]
    except (ValueError, IndexError):
        return 1
    length = {1: 1, 3: 2, 4: 4}.get(int(tag["type"]), 0)  # BYTE, SHORT, LONG
    value = int.from_bytes(tag["value"].tobytes()[:length], order)
    return value if value in TURN_UPRIGHT else 1


def _first_directory(tiff: bytes) -> tuple[np.ndarray, Literal["little", "big"], int]:
    """Returns the tags of the first page, a record each, the byte order and an offset's bytes.

    Raises ValueError where there is no such directory.
    """
    order: Literal["little", "big"] = "little" if tiff.startswith(b"II") else "big"
    width = 8 if b"+" in tiff[2:4] else 4  # 8 in a BigTIFF
    offset = int.from_bytes(tiff[width : 2 * width], order)
    start = offset + (8 if width == 8 else 2)
    number = int.from_bytes(tiff[offset:start], order)
    kinds = {"tag": "u2", "type": "u2", "count": f"u{width}", "value": f"V{width}"}
    record = np.dtype(list(kinds.items())).newbyteorder(order)
    if start + number * record.itemsize > len(tiff):
        raise ValueError("the directory is truncated")
    return np.frombuffer(tiff, record, number, start), order, width


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableImageError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16 bits at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImageError("its pixels have more than 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image.convert("RGB")
