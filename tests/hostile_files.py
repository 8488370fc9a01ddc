"""Files that strangers could serve as pictures, made in memory: bombs, cut and damaged files, other formats, odd pictures.

Each has the reasons that it may end with; None is a picture that is taken. A file of which libraries may rightly say
different things (a name of a colour that has none, say) has several.
"""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms

File = tuple[bytes, tuple[str | None, ...]]
BROKEN = ("truncated", "not_an_image")
TOO_MUCH = ("decode_timeout", "decode_memory", "truncated")


def scene(width: int = 64, height: int = 48) -> np.ndarray:
    """Smooth, with no symmetry, so that a wrong turn shows: uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)


def noise(width: int = 64, height: int = 48) -> np.ndarray:
    """What no format makes small: uint8 (height, width, 3)."""
    return np.random.default_rng(width * height).integers(256, size=(height, width, 3), dtype=np.uint8)


def encode(array: np.ndarray | Image.Image, name: str = "JPEG", **options: Any) -> bytes:
    """A picture as a file of the format."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes = b"", *, depth: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    """A PNG that claims a size, whatever its compressed body holds; `extra` chunks lie before it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """`count` zero bytes, compressed without ever holding them."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(min(1 << 20, count - done))) for done in range(0, count, 1 << 20)]
    return b"".join(parts) + packer.flush()


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which PIL does not write: uint16 (height, width, 3)."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(width, height, zlib.compress(rows), depth=16, colour=2)


def marker(data: bytes, kind: int) -> int:
    """Where a JPEG's first marker of this kind begins."""
    place = 2
    while data[place + 1] != kind:
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return place


def resized_claim(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header says another size."""
    place = next(marker(data, kind) for kind in (0xC0, 0xC2) if bytes([0xFF, kind]) in data)
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def with_segment(data: bytes, kind: int, body: bytes) -> bytes:
    """A JPEG with one more segment right at its start."""
    return data[:2] + bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body + data[2:]


def many_scans(scans: int) -> bytes:
    """A progressive JPEG of 3.6 megapixels that refines the same nothing over and over: seconds of work for a few kilobytes."""
    side = 1900
    frame = b"\xff\xc2" + struct.pack(">HBHHBBBB", 11, 8, side, side, 1, 1, 0x11, 0)
    tables = b"\xff\xdb" + struct.pack(">HB", 67, 0) + b"\1" * 64
    code = b"\1" + bytes(15)  # one code, of one bit
    # An end of band for 2**14 blocks and more at once, so that a scan of a million blocks is a few bytes.
    tables += b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + code + b"\xe0"
    tables += b"\xff\xc4" + struct.pack(">HB", 20, 0x00) + code + b"\0"
    first = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 0, 0, 0) + bytes((side // 8 + 1) ** 2 // 8 + 8)
    blocks = (side // 8 + 1) ** 2
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 63, 0) + bytes(2 * (blocks >> 14) + 64)
    return b"\xff\xd8" + tables + frame + first + scan * scans + b"\xff\xd9"


def riff(kind: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A RIFF file, WebP's frame."""
    body = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + kind + body


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("evil.sh", "rm -rf ~")
    return out.getvalue()


def bombs() -> dict[str, File]:
    """Small files that claim, or are, much."""
    jpeg, large = encode(scene()), ("too_many_pixels",)
    canvas = bytes(4) + (16382).to_bytes(3, "little") * 2
    text = b"Comment\0\0" + zeros(64 << 20)
    profile = chunk(b"iCCP", b"x\0\0" + zeros(64 << 20))
    whole = zlib.compress(b"".join(b"\0" + bytes(64 * 3) for _ in range(48)))
    return {
        "png of 30,000 x 30,000": (png(30_000, 30_000, zeros(30_000 * 3_800)), large),
        "png of 2**32 - 1 squared": (png(2**32 - 1, 2**32 - 1), (*large, "not_an_image")),
        "gif of 65,535 squared": (
            b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(99),
            (*large, *BROKEN),
        ),
        "webp canvas of 16,383 squared": (riff(b"WEBP", (b"VP8X", canvas), (b"VP8 ", bytes(50))), large),
        "webp lossless of 16,384 squared": (riff(b"WEBP", (b"VP8L", b"\x2f" + b"\xff" * 60)), large),
        "jpeg that claims 65,500 squared": (resized_claim(jpeg, 65_500, 65_500), large),
        "jpeg that claims 1,900 squared": (resized_claim(jpeg, 1_900, 1_900), ("truncated",)),
        "bmp that claims 2**31 - 1 squared": (_bmp(2**31 - 1, 2**31 - 1), large),
        "bmp that claims 1,900 squared": (_bmp(1_900, 1_900), BROKEN),
        "png with 64 MB of text": (png(64, 48, whole, colour=2, extra=chunk(b"zTXt", text)), (None, *BROKEN)),
        "png with 64 MB of profile": (png(64, 48, whole, colour=2, extra=profile), (None, *BROKEN)),
        "png with more rows than it says": (png(64, 48, zeros(64 << 20), colour=2), (None, "truncated")),
        "jpeg with 60 KB of EXIF loops": (with_segment(jpeg, 0xE1, _looping_exif()), (None,)),
        "jpeg of 2,000 scans": (many_scans(2_000), (None, *TOO_MUCH)),
        "jpeg with 40,000 comments": (_commented(jpeg, 40_000), (None,)),
        "gif of 10,000 frames": (_gif_of(10_000), ("animated",)),
    }


def cut() -> dict[str, File]:
    """Whole pictures that break off, at each kind of boundary."""
    files: dict[str, File] = {}
    jpeg = encode(noise(), quality=90)
    scan = marker(jpeg, 0xDA)
    spots = {
        "in its magic": 2,
        "after its magic": 4,
        "in a segment": 12,
        "before its frame": marker(jpeg, 0xC0),
        "in its frame": marker(jpeg, 0xC0) + 6,
        "before its scan": scan,
        "in its scan's header": scan + 5,
        "after its scan's header": scan + 14,
        "in its scan": (scan + len(jpeg)) // 2,
        "before its end mark": len(jpeg) - 2,
        "in its end mark": len(jpeg) - 1,
    }
    files |= {f"jpeg cut {where}": (jpeg[:spot], BROKEN) for where, spot in spots.items()}
    files["jpeg cut, and ended all the same"] = (jpeg[: spots["in its scan"]] + b"\xff\xd9", ("truncated",))
    progressive = encode(noise(), quality=90, progressive=True)
    files["progressive jpeg cut in a later scan"] = (progressive[: len(progressive) * 3 // 4], ("truncated",))
    data = encode(noise(), "PNG")
    header = 8 + 25
    for where, spot in {"in its magic": 5, "in its header": 20, "after its header": header, "in a chunk's name": header + 6,
                        "in its data": len(data) // 2, "before its end": len(data) - 12}.items():  # fmt: skip
        files[f"png cut {where}"] = (data[:spot], BROKEN)
    for name, share in (("GIF", 0.5), ("BMP", 0.5), ("WEBP", 0.5), ("WEBP", 0.95)):
        whole = encode(noise(), name)
        files[f"{name.lower()} cut at {share:.0%}"] = (whole[: int(len(whole) * share)], BROKEN)
    return files


def damaged() -> dict[str, File]:
    """Pictures with something wrong within."""
    jpeg, restarts = encode(noise(), quality=90), encode(noise(128, 96), quality=90, restart_marker_blocks=4)
    scan, first = marker(jpeg, 0xDA) + 14, restarts.index(b"\xff\xd0")
    data = encode(noise(), "PNG")
    wrong_sum = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
    return {
        "jpeg with noise in its scan": (
            jpeg[: scan + 400] + b"\xff\xd0\x12" * 40 + jpeg[scan + 500 :],
            (None, "truncated"),
        ),
        "jpeg without tables": (jpeg[:2] + jpeg[marker(jpeg, 0xC0) :], BROKEN),
        "jpeg with restarts in disorder": (restarts[:first] + b"\xff\xd5" + restarts[first + 2 :], (None, "truncated")),
        "jpeg with bytes before its end": (jpeg[:-2] + b"\0\0abc" + jpeg[-2:], (None,)),
        "jpeg of 12 bits": (
            jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
            (*BROKEN, "unsupported_format"),
        ),
        "jpeg of arithmetic coding": (jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1), (None, *BROKEN)),
        "jpeg of no height": (resized_claim(jpeg, 64, 0), (*BROKEN, "too_small")),
        "png with a wrong checksum": (wrong_sum, BROKEN),
        "png whose data is none": (png(64, 48, b"no zlib at all", colour=2), ("truncated",)),
        "png with a header and nothing behind it": (png(64, 48), ("truncated",)),
        "jpeg with broken EXIF": (encode(scene(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), (None,)),
        "jpeg with nonsense for EXIF": (encode(scene(), exif=b"Exif\0\0nonsense"), (None,)),
        "jpeg with nonsense for a profile": (encode(scene(), icc_profile=b"nonsense" * 99), (None,)),
        "jpeg with half a profile": (encode(scene(), icc_profile=_srgb()[:200]), (None,)),
        "phone's jpeg that is its own preview": (_own_preview(), (None, "truncated")),
    }


def other_things() -> dict[str, File]:
    """What is no picture, or none that we take."""
    none, other = ("not_an_image",), ("unsupported_format",)
    jpeg = encode(scene())
    return {
        "nothing": (b"", none),
        "html": (b"<!doctype html><title>404</title>", none),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", none),
        "svg of a billion laughs": (b'<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><svg>&b;</svg>', none),
        "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj", none),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n", none),
        "json": (b'{"error": "not found"}', none),
        "text": (b"Not found\n" * 99, none),
        "noise": (noise().tobytes(), none),
        "gzip of a jpeg": (gzip.compress(jpeg), none),
        "zip": (_zip(), none),
        "elf": (b"\x7fELF\2\1\1" + bytes(57), none),
        "avif": (b"\0\0\0\x1cftypavif" + bytes(40), other),
        "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), other),
        "tiff": (encode(scene(), "TIFF"), other),
        "tiff of floats": (encode(Image.fromarray(np.ones((48, 64), np.float32)), "TIFF"), other),
        "icon": (encode(scene(), "ICO"), other),
        "photoshop": (b"8BPS\0\1" + bytes(40), other),
        "gif of two frames": (_gif_of(2), ("animated",)),
        "webp of two frames": (_frames("WEBP"), ("animated",)),
        "png of two frames": (_frames("PNG"), ("animated",)),
        "one pixel": (encode(scene(1, 1), "PNG"), ("too_small",)),
        "1 x 20,000": (encode(np.zeros((20_000, 1, 3), np.uint8), "PNG"), ("too_small",)),
        "20,000 x 1": (encode(np.zeros((1, 20_000, 3), np.uint8), "PNG"), ("too_small",)),
        "16 x 2,000": (encode(np.zeros((2_000, 16, 3), np.uint8)), ("bad_aspect_ratio",)),
    }


def pictures() -> dict[str, File]:
    """Odd ones that are fine, each of `scene()`."""
    array, image, good = scene(), Image.fromarray(scene()), (None,)
    inverted = encode(image.convert("CMYK"), quality=100, subsampling=0)
    files: dict[str, File] = {
        "jpeg": (encode(array, quality=95), good),
        "progressive jpeg": (encode(array, quality=95, progressive=True), good),
        "jpeg without subsampling": (encode(array, quality=95, subsampling=0), good),
        "jpeg in RGB": (encode(array, quality=98, subsampling=0, keep_rgb=True), good),
        "jpeg in CMYK": (inverted, good),
        "jpeg in YCCK": (_ycck(), good),
        "jpeg with a zip behind it": (encode(array, quality=95) + _zip(), good),
        "jpeg in sRGB by name": (encode(array, quality=95, icc_profile=_srgb()), good),
        "phone's jpeg with a second picture": (encode(array, "MPO", save_all=True, append_images=[image], quality=95), good),
        "png": (encode(array, "PNG"), good),
        "png of 16 bits": (png16(array.astype(np.uint16) * 257), good),
        "png of colours": (encode(image.quantize(256), "PNG"), good),
        "png with alpha": (encode(image.convert("RGBA"), "PNG"), good),
        "png interlaced by its word only": (_interlaced(), (None, "truncated")),
        "webp": (encode(array, "WEBP", lossless=True), good),
        "gif": (encode(array, "GIF"), good),
        "bmp": (encode(array, "BMP"), good),
    }  # fmt: skip
    return files


def every_file() -> dict[str, File]:
    """All of them, by name."""
    return bombs() | cut() | damaged() | other_things() | pictures()


def _bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + header + bytes(100)


def _looping_exif() -> bytes:
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)  # a directory within that is this one
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 4000) + entry * 4000 + struct.pack("<I", 8)


def _commented(data: bytes, count: int) -> bytes:
    return data[:2] + b"\xff\xfe\0\3x" * count + data[2:]


def _gif_of(frames: int) -> bytes:
    first = encode(Image.fromarray(scene()).quantize(4), "GIF")
    start = first.index(b",")
    frame = first[start:-1]
    return first[:start] + frame * frames + b";"


def _frames(name: str) -> bytes:
    frames = [Image.fromarray(scene()[:, ::step]).resize((64, 48)) for step in (1, -1)]
    return encode(frames[0], name, save_all=True, append_images=frames[1:])


def _own_preview() -> bytes:
    data = encode(scene(), "MPO", save_all=True, append_images=[Image.fromarray(scene())])
    place = data.index(b"\x02\xb0") if b"\x02\xb0" in data else data.index(b"MPF\0") + 40
    return data[:place] + data[place : place + 40].replace(b"\0\0\0\1", b"\0\0\0\0") + data[place + 40 :]


def _srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _ycck() -> bytes:
    """A CMYK JPEG as Photoshop has it: luma and chroma of the inks, all inverted, as the last byte of its Adobe segment says."""
    luma = np.asarray(Image.fromarray(255 - scene()).convert("YCbCr"))
    inks = np.dstack([255 - luma, np.zeros(luma.shape[:2], np.uint8)])
    data = encode(Image.fromarray(inks, "CMYK"), quality=100, subsampling=0)
    place = data.index(b"Adobe") + 11
    return data[:place] + b"\2" + data[place + 1 :]


def _interlaced() -> bytes:
    data = encode(scene(), "PNG")
    header = bytearray(data[16:29])
    header[12] = 1
    return data[:8] + chunk(b"IHDR", bytes(header)) + data[33:]
