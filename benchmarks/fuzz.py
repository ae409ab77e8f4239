"""Decodes mutated image files by the thousand, and names what does not end in a picture or refusal.

    python benchmarks/fuzz.py --decodes 20000 --seed 0

Starts from small files of each format and kind that `imaging.decode.decode` knows, and flips, cuts,
inserts, doubles and exchanges bytes, chunks and segments. Batches run in a process of their own, so
that a crash or a hang is found, named by its number, and the rest goes on. `--save DIR` keeps the
files that were found; file number N of a seed is always the same.

    python benchmarks/fuzz.py --largest

decodes instead the files that take longest of those within the limits of `imaging/decode.py`.
"""

import argparse
import io
import queue
import random
import re
import resource
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from imaging.decode import (
    MAX_PIXELS,
    MAX_RLE_PIXELS,
    MAX_SCANNED_PIXELS,
    UnreadableImageError,
    decode,
)

KINDS = ["read", "refused", "foreign exception", "crash", "hang"]
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def make_files() -> dict[str, bytes]:
    """Whole files, a few kilobytes each, by name."""
    rows, columns = np.mgrid[0:40, 0:56]
    noise = np.random.default_rng(0).integers(0, 40, (40, 56))
    planes = [rows * 5, columns * 4, rows + columns + noise]
    rgb = Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))
    deep = Image.fromarray((rows * columns * 29).astype(np.uint16))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.fromarray((columns * 4).astype(np.uint8)))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a lesion"
    files = {
        "jpeg": _saved(rgb, "JPEG"),
        "jpeg, progressive": _saved(rgb, "JPEG", progressive=True),
        "jpeg, CMYK": _saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg, grey": _saved(rgb.convert("L"), "JPEG"),
        "jpeg, EXIF": _saved(rgb, "JPEG", exif=exif, comment=b"left arm", icc_profile=b"x" * 200),
        "jpeg, progressive, many scans": _with_scans(_saved(rgb, "JPEG", progressive=True), 30),
        "png": _saved(rgb, "PNG"),
        "png, palette": _saved(rgb.quantize(16), "PNG", transparency=3),
        "png, alpha": _saved(alpha, "PNG"),
        "png, 16 bits": _saved(deep, "PNG"),
        "png, EXIF": _saved(rgb.convert("LA"), "PNG", exif=exif),
        "png, animated": _saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]),
        "tiff, EXIF": _saved(rgb, "TIFF", exif=exif),
        "tiff, 16 bits": _saved(deep, "TIFF"),
        "tiff, pages": _saved(rgb, "TIFF", save_all=True, append_images=[rgb.rotate(90), alpha]),
        "tiff, big": _saved(rgb, "TIFF", big_tiff=True),
        "bmp": _saved(rgb, "BMP"),
        "bmp, palette": _saved(rgb.quantize(16), "BMP"),
        "bmp, run lengths": _run_length_bmp(40, 30),
        "webp": _saved(rgb, "WEBP", exif=exif),
        "webp, lossless": _saved(alpha, "WEBP", lossless=True),
        "webp, animated": _saved(rgb, "WEBP", save_all=True, append_images=[alpha.rotate(90)]),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_ccitt"):
        image = rgb.convert("1") if compression == "tiff_ccitt" else rgb
        files[f"tiff, {compression}"] = _saved(image, "TIFF", compression=compression)
    return files


def mutate(contents: bytes, rng: random.Random) -> bytes:
    """One to five changes; the checksums of a PNG are set right again two times in three."""
    mutated = bytearray(contents)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 5))):
        rng.choice(MUTATIONS)(mutated, rng)
    if rng.randrange(3) > 0:
        return _with_right_checksums(bytes(mutated))
    return bytes(mutated)


def mutated_file(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """The name of the file that it was, and what became of it."""
    rng = random.Random(f"{seed} {number}")
    name = list(files)[number % len(files)]
    return name, mutate(files[name], rng)


# ---------------------------------------------------------------------------- changes


def _somewhere(contents: bytearray, rng: random.Random) -> slice:
    """A stretch, mostly a short one, and half of the time among the headers."""
    end = min(len(contents), 200) if rng.randrange(2) else len(contents)
    start = rng.randint(0, end)
    return slice(start, start + rng.choice((1, 1, 1, 2, 4, 12, len(contents) // 4)))


def _flip_a_bit(contents: bytearray, rng: random.Random) -> None:
    if contents:
        contents[_somewhere(contents, rng).start % len(contents)] ^= 1 << rng.randrange(8)


def _write_a_number(contents: bytearray, rng: random.Random) -> None:
    width, order = rng.choice((1, 2, 4)), rng.choice(("little", "big"))
    start = _somewhere(contents, rng).start
    number = rng.choice(NUMBERS) % 256**width
    contents[start : start + width] = number.to_bytes(width, order)


def _cut_the_end(contents: bytearray, rng: random.Random) -> None:
    del contents[rng.randint(0, len(contents)) :]


def _remove(contents: bytearray, rng: random.Random) -> None:
    del contents[_somewhere(contents, rng)]


def _insert(contents: bytearray, rng: random.Random) -> None:
    start = _somewhere(contents, rng).start
    contents[start:start] = rng.randbytes(rng.choice((1, 2, 4, 30)))


def _double(contents: bytearray, rng: random.Random) -> None:
    stretch = _somewhere(contents, rng)
    contents[stretch.start : stretch.start] = contents[stretch] * rng.choice((1, 2, 50))


def _exchange(contents: bytearray, rng: random.Random) -> None:
    first, second = _somewhere(contents, rng), _somewhere(contents, rng)
    contents[first], contents[second] = contents[second], contents[first]


def _double_or_exchange_parts(contents: bytearray, rng: random.Random) -> None:
    """Whole segments of a JPEG or chunks of a PNG or WebP, as far as their beginnings are clear."""
    beginnings = [m.start() for m in re.finditer(rb"\xff[\xc0-\xfe]|.{4}[A-Za-z]{4}", contents)]
    if len(beginnings) < 3:
        return
    start, middle, end = sorted(rng.sample(beginnings, 3))
    first, second = contents[start:middle], contents[middle:end]
    contents[start:end] = rng.choice((second + first, first + second + first, second * 3 + first))


MUTATIONS = (
    *(_flip_a_bit, _flip_a_bit, _flip_a_bit, _write_a_number, _write_a_number, _cut_the_end),
    *(_remove, _insert, _double, _exchange, _double_or_exchange_parts),
)


def _with_right_checksums(png: bytes) -> bytes:
    """Without this hardly a changed PNG would come past its checksums to the decoder."""
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        return png
    fixed, at = bytearray(png), 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 <= len(png):
            fixed[end : end + 4] = struct.pack(">I", zlib.crc32(png[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # saving as JPEG leaves its settings in an image
    return buffer.getvalue()


def _with_scans(jpeg: bytes, number: int) -> bytes:
    """A progressive JPEG whose last scan comes `number` times."""
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * number + b"\xff\xd9"


def _run_length_bmp(width: int, height: int) -> bytes:
    """All kinds of codes: a run, bytes as they are, ends of rows, a skip, the end."""
    row = bytes([width // 2, 7, 0, width // 2, *range(width // 2), 0, 0])
    return _bmp(width, height, row * (height - 1) + bytes([0, 2, 3, 0, 5, 9, 0, 0, 0, 1]))


def _bmp(width: int, height: int, codes: bytes) -> bytes:
    palette = bytes(range(256)) * 4
    offset = 14 + 40 + len(palette)
    header = struct.pack("<2sIHHI", b"BM", offset + len(codes), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(codes), 0, 0, 256, 0)
    return header + info + palette + codes


def largest_files() -> Iterator[tuple[str, bytes]]:
    """Files that are only just allowed."""
    side = int(MAX_PIXELS**0.5)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    large = Image.fromarray(noise)
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
        yield f"{kind}, {side} x {side}, noise", _saved(large, kind, **options)
    for width in (side, 1000):
        image = large.crop((0, 0, width, width))
        jpeg = _saved(image, "JPEG", progressive=True)
        allowed = MAX_SCANNED_PIXELS // width**2
        contents = _with_scans(jpeg, allowed - jpeg.count(b"\xff\xda") + 1)
        yield f"JPEG, {width} x {width}, noise, {allowed:,} scans", contents
    side = int((MAX_RLE_PIXELS / 2) ** 0.5) - 20  # a code for each pixel has two bytes
    codes = (bytes([1, 7]) * side + bytes([0, 0])) * side
    yield f"BMP, {side} x {side}, run lengths of one pixel", _bmp(side, side, codes)


# ---------------------------------------------------------------------------- the run


def decode_range(seed: int, numbers: range) -> None:
    """Prints a line a file: number, seconds, warnings, what came out."""
    files = make_files()
    for number in numbers:
        _, contents = mutated_file(files, seed, number)
        shorter_side = (None, 16)[number // len(files) % 2]
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            outcome = outcome_of(contents, shorter_side)
        seconds = time.perf_counter() - started
        print(number, f"{seconds:.6f}", len(warned), outcome, sep="\t", flush=True)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, sep="\t", flush=True)


def time_largest() -> None:
    for name, contents in largest_files():
        started = time.perf_counter()
        outcome = outcome_of(contents, None)
        seconds = time.perf_counter() - started
        print(f"{name}, {len(contents) / 1e6:.1f} MB: {outcome} in {seconds:.1f} s", flush=True)


def outcome_of(contents: bytes, shorter_side: int | None) -> str:
    """`read`, `refused`, or what else came out of the decoder."""
    try:
        image, size = decode(contents, shorter_side)
    except UnreadableImageError:
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ").replace("\t", " ")
    is_sound = image.mode == "RGB" and (shorter_side is not None or image.size == size)
    return "read" if is_sound else f"mode {image.mode}, {image.size} instead of {size}"


class _Batch:
    """A process that decodes a range of files, and the lines that it prints."""

    def __init__(self, seed: int, numbers: range) -> None:
        command = [sys.executable, __file__, "--seed", str(seed)]
        command += ["--range", str(numbers.start), str(numbers.stop)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.errors: list[str] = []
        self.readers = [
            threading.Thread(target=self._read_lines),
            threading.Thread(target=self._read_errors),
        ]
        for reader in self.readers:
            reader.start()

    def _read_lines(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put("")

    def _read_errors(self) -> None:
        self.errors += self.process.stderr

    def next_line(self, timeout: float) -> str | None:
        """The next line; empty when the process has ended; None when it takes too long."""
        try:
            return self.lines.get(timeout=timeout)
        except queue.Empty:
            return None

    def end(self) -> int:
        self.process.kill()
        for reader in self.readers:
            reader.join()
        return self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--decodes", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1000, help="decodes a process")
    parser.add_argument("--limit", type=float, default=10, help="seconds that a file may take")
    parser.add_argument("--save", type=Path, help="a folder for the files that were found")
    parser.add_argument("--largest", action="store_true", help="the slowest files, not mutated")
    parser.add_argument("--range", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.range:
        decode_range(arguments.seed, range(*arguments.range))
        return
    if arguments.largest:
        time_largest()
    else:
        run(arguments)


class Findings:
    """What came of the files, as far as they have been decoded."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.names = list(files)
        self.num_done = 0
        self.counts = {name: Counter() for name in files}
        self.slowest = (0.0, 0)
        self.peak = 0.0
        self.num_warnings = 0
        self.errors: list[str] = []
        self.found: list[tuple[int, str]] = []

    def name(self, number: int) -> str:
        return self.names[number % len(self.names)]

    def add(self, kind: str, what: str = "") -> None:
        """Counts the next file; `what` is said of one that should be looked at."""
        self.counts[self.name(self.num_done)][kind] += 1
        if what:
            self.found.append((self.num_done, what))
        self.num_done += 1

    def add_line(self, line: str, limit: float) -> None:
        """Counts what a process says of the next file, or at its end of its memory."""
        first, *values = line.split("\t")
        if first == "peak":
            self.peak = max(self.peak, float(values[0]))
            return
        seconds, num_warnings, outcome = float(values[0]), int(values[1]), values[2]
        self.slowest = max(self.slowest, (seconds, self.num_done))
        self.num_warnings += num_warnings
        if seconds > limit:
            self.add("hang", f"{seconds:.1f} s")
        elif outcome in ("read", "refused"):
            self.add(outcome)
        else:
            self.add("foreign exception", outcome)

    def print(self) -> None:
        table = pd.DataFrame.from_dict(self.counts, orient="index").reindex(columns=KINDS)
        table = table.fillna(0).astype(int)
        print(pd.concat([table, table.sum().to_frame("all").T]).to_string())
        seconds, number = self.slowest
        print(f"slowest: number {number} ({self.name(number)}), {seconds:.3f} s")
        print(f"peak memory {self.peak:.0f} MB; warnings {self.num_warnings:,}")
        print(f"lines on stderr: {len(self.errors):,}", *self.errors[:10])
        for number, what in self.found:
            print(f"number {number} ({self.name(number)}): {what}")


def run(arguments: argparse.Namespace) -> None:
    files = make_files()
    findings = Findings(files)
    with tqdm(total=arguments.decodes, disable=None) as bar:
        while findings.num_done < arguments.decodes:
            stop = min(findings.num_done + arguments.batch, arguments.decodes)
            decode_batch(findings, arguments.seed, stop, arguments.limit)
            bar.update(findings.num_done - bar.n)
    findings.print()
    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
        for number, _ in findings.found:
            contents = mutated_file(files, arguments.seed, number)[1]
            (arguments.save / str(number)).write_bytes(contents)


def decode_batch(findings: Findings, seed: int, stop: int, limit: float) -> None:
    """Decodes in one process up to `stop`, or up to the file that crashes or stops it."""
    batch = _Batch(seed, range(findings.num_done, stop))
    # The process has to start, too, before the first line.
    while line := batch.next_line(limit + 30):
        findings.add_line(line, limit)
    status = batch.end()
    findings.errors += batch.errors
    if line is None:
        findings.add("hang", f"more than {limit} s")
    elif findings.num_done < stop:
        findings.add("crash", f"exit status {status}")


if __name__ == "__main__":
    main()
