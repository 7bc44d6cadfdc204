"""Damages images at random and reads them; run alone for a long session.

    python tests/data/fuzz_images.py --count 20000 --seed 0
    python tests/data/fuzz_images.py --minutes 30 --seed 1

Every damaged file must become pixels, or a `DataError` of one line with the file's name, in
`--limit` CPU seconds and within 1.2 times its size and 100 MB: the limit of pixels is lowered to
2 million. `tests/data/test_preprocess.py` runs a short session; the frame is `tests/fuzzing.py`.
"""

from __future__ import annotations

import functools
import io
import pathlib
import random
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fuzzing
import numpy as np
from PIL import Image

from keras_resnet.data.looking import constant_images
from keras_resnet.data.reading import decode
from keras_resnet.data.scan import _look
from keras_resnet.system.errors import DataError

PIXELS = 2**20  # of one image, twice of all
SIDES = (
    0,
    1,
    2,
    255,
    256,
    1024,
    1450,
    13_300,
    16_383,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**32 - 1,
)
WORDS = [
    *(bytes([0xFF, code]) for code in b"\xc0\xc1\xc2\xc4\xd0\xd8\xd9\xda\xdb\xdd\xe0\xe1\xe2"),
    *(b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"eXIf", b"zTXt", b"acTL", b"fcTL"),
    *(b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"RIFF", b"II*\0", b"MM\0*", b"BM", b"P6"),
    *(b"\x21\xf9", b"\x21\xff", b"\x2c", b"\x3b", b"\xff\xff\xff\xff", b"%!PS", b"\0\0\1\0"),
]  # fmt: skip


@functools.cache
def samples() -> dict[str, bytes]:
    """Small images of every common format, in its kinds, by a name with the right ending."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(30), np.arange(41))[..., None] * (3, 2, 1)
    rgb = Image.fromarray((smooth + rng.integers(0, 40, smooth.shape)).astype(np.uint8))
    gray, alpha, palette = rgb.convert("L"), rgb.convert("RGBA"), rgb.convert("P")
    alpha.putalpha(gray)
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    marked = {"exif": exif, "icc_profile": bytes(rng.integers(0, 256, 300, np.uint8))}
    kinds: dict[str, tuple[Image.Image, str, dict]] = {
        "plain.jpg": (rgb, "JPEG", {}),
        "marked.jpg": (rgb, "JPEG", {**marked, "progressive": True, "comment": b"no"}),
        "gray.jpeg": (gray, "JPEG", {"restart_marker_blocks": 2}),
        "cmyk.jpg": (rgb.convert("CMYK"), "JPEG", {}),
        "plain.png": (rgb, "PNG", {}),
        "marked.png": (alpha, "PNG", marked),
        "palette.png": (palette, "PNG", {"transparency": bytes(range(256))}),
        "deep.png": (deep, "PNG", {}),
        "moves.png": (rgb, "PNG", {"save_all": True, "append_images": [rgb.rotate(9)]}),
        "plain.gif": (palette, "GIF", {"transparency": 3}),
        "moves.gif": (palette, "GIF", {"save_all": True, "append_images": [rgb.rotate(9)]}),
        "plain.bmp": (rgb, "BMP", {}),
        "palette.bmp": (palette, "BMP", {}),
        "plain.tif": (rgb, "TIFF", marked),
        "lzw.tiff": (alpha, "TIFF", {"compression": "tiff_lzw"}),
        "deflate.tiff": (deep, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "jpeg.tiff": (rgb, "TIFF", {"compression": "jpeg"}),
        "plain.webp": (rgb, "WEBP", marked),
        "lossless.webp": (alpha, "WEBP", {"lossless": True}),
        "moves.webp": (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(9)]}),
        "plain.ppm": (rgb, "PPM", {}),
        "deep.pgm": (deep, "PPM", {}),
        "bits.pbm": (gray.convert("1"), "PPM", {}),
        "plain.ico": (alpha.resize((32, 32)), "ICO", {}),
        "plain.tga": (alpha, "TGA", {"compression": "tga_rle"}),
        "plain.jp2": (rgb, "JPEG2000", {}),
        "plain.pcx": (rgb, "PCX", {}),
        "plain.sgi": (rgb, "SGI", {}),
        "plain.dds": (alpha, "DDS", {}),
    }
    if "AVIF" in Image.SAVE or (Image.init() and "AVIF" in Image.SAVE):
        kinds["plain.avif"] = (rgb, "AVIF", {})
    files = {}
    for name, (image, kind, options) in kinds.items():
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        files[name] = stream.getvalue()
    stream = io.BytesIO()
    np.save(stream, np.asarray(alpha)[..., [0, 1, 2, 3, 0]])
    files["many.npy"] = stream.getvalue()
    numbers = " ".join(map(str, np.asarray(rgb.resize((8, 6))).ravel()))
    files["words.ppm"] = f"P3 # made by hand\n8 6\n255\n{numbers}\n".encode()
    return files


# --- parts of files -------------------------------------------------------------------------------


def png_parts(data: bytes) -> list[bytes]:
    """The signature, and each chunk."""
    parts, at = [data[:8]], 8
    while at < len(data):
        size = 12 + int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at : at + size])
        at += size
    return parts


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def jpeg_parts(data: bytes) -> list[bytes]:
    """The start, each segment, and all that follows the first start of a scan."""
    parts, at = [data[:2]], 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        size = 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        parts.append(data[at : at + size])
        at += size
    return [*parts, data[at:]]


def webp_parts(data: bytes) -> list[bytes]:
    """The head, and each chunk."""
    parts, at = [data[:12]], 12
    while at < len(data):
        size = 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        size += size % 2
        parts.append(data[at : at + size])
        at += size
    return parts


def garbage(kind: str, random: random.Random) -> bytes:
    """A part that libraries read for themselves: EXIF, a colour profile, text that swells."""
    noise = random.randbytes(random.choice((0, 1, 7, 200, 3000)))
    exif = random.choice((b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"")) + noise
    swollen = zlib.compress(bytes(random.choice((10, 2**16, 2**24))))
    if kind == "png":
        return random.choice((
            png_chunk(b"eXIf", exif), png_chunk(b"iCCP", b"a\0\0" + swollen + noise),
            png_chunk(b"zTXt", b"a\0\0" + swollen), png_chunk(b"tRNS", noise),
            png_chunk(b"iTXt", b"a\0\1\0\0\0" + swollen), png_chunk(b"acTL", noise[:8]),
        ))  # fmt: skip
    if kind == "webp":
        name = random.choice((b"EXIF", b"ICCP", b"XMP ", b"ALPH", b"ANMF"))
        body = exif + b"\0" * (len(exif) % 2)
        return name + struct.pack("<I", len(body)) + body
    marker, body = random.choice((
        (b"\xe1", b"Exif\0\0" + exif), (b"\xe2", b"ICC_PROFILE\0\1\1" + noise),
        (b"\xe2", b"MPF\0" + exif), (b"\xed", b"Photoshop 3.0\0" + noise),
        (b"\xee", b"Adobe" + noise),
    ))  # fmt: skip
    return b"\xff" + marker + struct.pack(">H", len(body) + 2) + body


def webp_joined(parts: list[bytes]) -> bytes:
    data = b"".join(parts)
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


PARTS: dict[str, tuple[Callable, Callable]] = {
    "png": (png_parts, b"".join),
    "jpeg": (jpeg_parts, b"".join),
    "webp": (webp_parts, webp_joined),
}


def kind_of(data: bytes) -> str | None:
    """Which of the formats with parts it is."""
    for kind, mark in (("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")):
        if data.startswith(mark):
            return kind
    return None


def with_parts_moved(data: bytes, random: random.Random) -> bytes:
    """Parts swapped, doubled, dropped, damaged with a right checksum, or garbage put between."""
    kind = kind_of(data)
    split, joined = PARTS.get(kind, (lambda data: [], bytes))
    parts = split(data)
    if len(parts) < 3 or len(data) < 20:
        return fuzzing.damaged(data, random, WORDS, (600, 200))
    for _ in range(random.choice((1, 1, 2, 4))):
        a, b = random.randrange(1, len(parts)), random.randrange(1, len(parts))
        match random.randrange(5):
            case 0:
                parts[a], parts[b] = parts[b], parts[a]
            case 1:
                parts.insert(a, parts[b])
            case 2 if len(parts) > 2:
                del parts[a]
            case 3:
                parts.insert(a, garbage(kind, random))
            case _:
                part = parts[a]
                head, tail = (8, 4) if kind == "png" else (4, 0) if kind == "jpeg" else (8, 0)
                body = fuzzing.damaged(part[head : len(part) - tail], random, WORDS, times=(1, 2))
                if kind == "png" and random.random() < 0.8:
                    parts[a] = png_chunk(part[4:8], body)
                else:
                    parts[a] = part[:head] + body + part[len(part) - tail :]
    return joined(parts)


def with_other_sides(data: bytes, random: random.Random) -> bytes:
    """A width or a height, or both, that the pixels do not have."""
    out, sides = bytearray(data), [random.choice(SIDES) for _ in range(2)]
    places: list[tuple[int, str]] = []  # where each of them is, and how it is written
    if data.startswith(b"\x89PNG"):
        places = [(16, ">I"), (20, ">I")]
    elif data.startswith(b"\xff\xd8"):
        frame = re.search(rb"\xff[\xc0-\xc2]\0", data)
        places = [(frame.start() + 5, ">H"), (frame.start() + 7, ">H")] if frame else []
    elif data.startswith(b"GIF"):
        inside = data.find(b"\x2c", 700)
        places = random.choice(([(6, "<H"), (8, "<H")], [(inside + 5, "<H"), (inside + 7, "<H")]))
    elif data.startswith(b"BM"):
        places = [(18, "<I"), (22, "<I")]
    elif data.startswith(b"RIFF"):
        frame = re.search(rb"\x9d\x01\x2a", data)
        if b"VP8X" in data[:16]:
            places = [(24, "<I"), (27, "<I")]
        elif frame:
            places = [(frame.end(), "<H"), (frame.end() + 2, "<H")]
        else:
            places = [(21, "<I")]
    elif data[:4] in (b"II*\0", b"MM\0*"):
        tags = (0x100, 0x101, 0x102, 0x103, 0x115, 0x116, 0x117, 0x142, 0x143)
        found = [data.find(struct.pack("<HH", tag, form)) for tag in tags for form in (3, 4)]
        places = [(at + 8, "<I") for at in random.sample(found, 3) if at > 0]
    elif data[:1] == b"P":
        head = [b"P" + data[1:2], *(str(side).encode() for side in sides)]
        return b"\n".join([*head, *data.split(b"\n", 2)[2:]])
    for (at, form), side in zip(places, sides, strict=False):
        if random.random() < 0.8:
            width = struct.calcsize(form)
            side %= 2 ** (8 * width)
            out[at : at + width] = side.to_bytes(width, "big" if form[0] == ">" else "little")
    if data.startswith(b"\x89PNG") and random.random() < 0.8:
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))
    return bytes(out)


def mutate(name: str, data: bytes, random: random.Random) -> bytes:
    """Damages an image in one of the ways above, or two; rarely it is another's altogether."""
    if random.random() < 0.05:  # whole, under another's ending
        data = random.choice(list(samples().values()))
    for _ in range(random.choice((1, 1, 2))):
        match random.randrange(8):
            case 0 | 1:
                data = with_other_sides(data, random)
            case 2 | 3:
                data = with_parts_moved(data, random)
            case 4:
                data += random.choice((bytes(1000), data, random.randbytes(999), b"\xff\xd9"))
            case 5:
                data = data[: random.randrange(len(data) + 1)]
            case _:
                data = fuzzing.damaged(data, random, WORDS, (600, 200))
    return data


# --- reading --------------------------------------------------------------------------------------


def read(path: pathlib.Path) -> str:
    """Reads an image in every way that the package does."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, PIXELS
    told = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for mode, channels in (("rgb", 3), ("grayscale", 1), ("rgba", 4), (5, 5)):
                try:
                    pixels = decode(path, exif=mode != "rgb", color_mode=mode)
                except DataError as error:
                    assert path.name in str(error) and "\n" not in str(error), str(error)
                    told.append("refused")
                else:
                    deep = pixels.dtype == np.float32 and mode != "rgb"
                    assert (pixels.dtype == np.uint8 or deep) and pixels.ndim == 3, pixels.shape
                    assert pixels.shape[-1] == channels and 0 < pixels.size <= 8 * PIXELS
                    told.append("read")
            seen = _look(str(path))
            assert isinstance(seen, dict) or (path.name in seen and "\n" not in seen), seen
            constant_images([str(path)], 0)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return told[0]


if __name__ == "__main__":
    fuzzing.main(__doc__, samples, mutate, read)
