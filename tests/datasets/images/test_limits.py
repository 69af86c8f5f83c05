"""A small file may not take a decoder minutes or gigabytes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from paddlemix.datasets.images import limits
from paddlemix.datasets.images.decode import image_size, load_image
from paddlemix.datasets.images.sources import ImageSettings
from paddlemix.errors import UserError
from tests.tiny import noise_picture


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refused(path: Path, content: bytes, message: str, settings: ImageSettings | None = None) -> None:
    """Neither the size nor the pixels of a file are given, for one reason."""
    path.write_bytes(content)
    for use in (load_image, image_size):
        with pytest.raises(UserError, match=message):
            use(path, settings or ImageSettings())


@pytest.mark.parametrize(
    "content",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a drawing -->\n<!DOCTYPE svg PUBLIC 'x'>\n<svg width='9'></svg>",
    ],
)
def test_a_drawing_is_named(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "a.svg", content, "a.svg' is SVG, a drawing without pixels; save it as PNG")


def test_comments_of_pnm(tmp_path: Path) -> None:
    good = b"P6\n# made by hand\n2 # width\n1\n255\n" + bytes(6)
    (tmp_path / "good.ppm").write_bytes(good)
    assert load_image(tmp_path / "good.ppm").size == (2, 1)
    refused(tmp_path / "a.ppm", b"P6\n#" + b"x" * 5000 + b"\n2 1\n255\n" + bytes(6), "header of more than 4,096 bytes")
    refused(tmp_path / "b.ppm", b"P6\n" + b"#\n" * 3000 + b"2 1\n255\n" + bytes(6), "header of more than 4,096 bytes")


@pytest.mark.parametrize("content", [b"P6" + b" " * 9000, b" " * 9000, b"P6\n" + b"# \n" * 3000, b"<!--" * 3000])
def test_a_beginning_that_says_nothing(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "a.ppm", content, "image '")


def test_pnm_as_text(tmp_path: Path) -> None:
    (tmp_path / "good.ppm").write_bytes(b"P3\n2 1\n255\n1 2 3 4 5 6\n")
    assert load_image(tmp_path / "good.ppm").getpixel((1, 0)) == (4, 5, 6)
    content = b"P3\n2 1\n255\n" + b"1 2 3 #c\n" * 40_000
    refused(tmp_path / "a.ppm", content, "pixels as 360,011 bytes of text, more than 262,144; save it as PNG")


def test_pixels_of_jpeg_2000(tmp_path: Path) -> None:
    content = encoded(noise_picture(40, 30), "JPEG2000")
    (tmp_path / "a.jp2").write_bytes(content)
    assert load_image(tmp_path / "a.jp2", ImageSettings(max_pixels=9600)).size == (40, 30)
    refused(
        tmp_path / "a.jp2", content, "1,200 pixels in JPEG 2000, .*: 1,199 are allowed", ImageSettings(max_pixels=9599)
    )


def test_bytes_of_jpeg_2000(tmp_path: Path) -> None:
    content = encoded(noise_picture(40, 30), "JPEG2000")
    refused(
        tmp_path / "a.jp2", content + bytes(32 * 1024**2), "larger than 32 MiB in JPEG 2000, which is slow to decode"
    )


def test_scans_of_a_progressive_jpeg(tmp_path: Path) -> None:
    """Each scan of a progressive JPEG is a pass over all pixels, however few bytes it has."""
    content = encoded(Image.new("L", (1200, 900)), "JPEG", progressive=True)
    (tmp_path / "a.jpg").write_bytes(content)
    assert load_image(tmp_path / "a.jpg").size == (1200, 900)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00\x00"  # a refining scan without data
    refused(tmp_path / "b.jpg", content[:-2] + scan * 200 + content[-2:], r"is a JPEG of 20\d scans, 100 are allowed")


def test_chunks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decoder reads piece by piece is stopped by the processor's time; here the clock of the test runs."""
    passed = [0.0]

    def later() -> float:
        passed[0] += 0.01
        return passed[0]

    monkeypatch.setattr(limits, "_now", later)
    content = encoded(noise_picture(4, 3), "PNG")
    (tmp_path / "good.png").write_bytes(content)
    assert load_image(tmp_path / "good.png").size == (4, 3)
    chunk = struct.pack(">I", 0) + b"prIv" + struct.pack(">I", zlib.crc32(b"prIv"))
    refused(
        tmp_path / "a.png", content[:33] + chunk * 100_000 + content[33:], "takes more than 20 s to decode; save it as"
    )


def test_what_is_decompressed_of_a_text_is_bounded(tmp_path: Path) -> None:
    text = b"comment\0\0" + zlib.compress(bytes(80 * 1024**2))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    content = encoded(noise_picture(4, 3), "PNG")
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    with pytest.raises(UserError, match="is broken: Decompressed data too large"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_many_frames_the_first_is_decoded(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), (number, 0, 0)) for number in range(60)]
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    image = load_image(path)
    assert image.size == (8, 6) and getattr(image, "n_frames", 1) == 1


def test_a_format_that_nobody_needs_is_not_decoded(tmp_path: Path) -> None:
    refused(tmp_path / "a.pcx", encoded(noise_picture(8, 6), "PCX"), "is not an image file that can be read")
