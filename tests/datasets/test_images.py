"""Any image file comes out as upright RGB, and anything else as one clear error."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paddlemix.datasets import images
from paddlemix.datasets.images import check_image, is_url, load_image
from paddlemix.errors import MissingFileError, UserError
from tests.tiny import noise_picture

UPRIGHT = noise_picture(6, 4)
# How each orientation's pixels are stored, so that turning them gives UPRIGHT.  Source: EXIF 2.3
STORED = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, 1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, -1),
}


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def assert_pixels(path: Path, expected: np.ndarray) -> None:
    image = load_image(path)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)
    check_image(str(path))


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    stored = np.ascontiguousarray(STORED[orientation](np.asarray(UPRIGHT)))
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(stored).save(path, exif=exif(orientation), **options)
    assert_pixels(path, np.asarray(UPRIGHT))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "damaged",
    [
        exif(9).tobytes(),
        exif(6).tobytes().replace(struct.pack(">HH", 0x0112, 3), struct.pack(">HH", 0x0112, 2)),
        exif(6).tobytes()[:20],
        b"Exif\0\0II*\0",
        b"Exif\0\0nonsense",
    ],
    ids=["unknown", "text", "cut", "empty", "nonsense"],
)
def test_damaged_exif_does_not_cost_the_image(tmp_path: Path, damaged: bytes) -> None:
    UPRIGHT.save(tmp_path / "a.png", exif=damaged)
    assert_pixels(tmp_path / "a.png", np.asarray(UPRIGHT))


@pytest.mark.parametrize("kind", [1, 2, 7])
def test_orientation_beside_a_damaged_tag(tmp_path: Path, kind: int) -> None:
    tags = exif(6)
    tags[0x011A] = 72.0  # resolution, a fraction, declared as bytes or text
    damaged = tags.tobytes().replace(struct.pack(">HH", 0x011A, 5), struct.pack(">HH", 0x011A, kind))
    assert damaged != tags.tobytes()
    Image.fromarray(np.ascontiguousarray(STORED[6](np.asarray(UPRIGHT)))).save(tmp_path / "a.png", exif=damaged)
    assert_pixels(tmp_path / "a.png", np.asarray(UPRIGHT))


def test_grey_and_one_bit(tmp_path: Path) -> None:
    grey = np.asarray(UPRIGHT)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert_pixels(tmp_path / "grey.png", np.stack([grey] * 3, axis=-1))
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    assert_pixels(tmp_path / "bits.png", np.stack([(grey > 127) * 255] * 3, axis=-1))


def test_transparency_is_dropped(tmp_path: Path) -> None:
    alpha = np.full((4, 6, 1), 7, dtype=np.uint8)
    Image.fromarray(np.concatenate([np.asarray(UPRIGHT), alpha], axis=-1)).save(tmp_path / "rgba.png")
    assert_pixels(tmp_path / "rgba.png", np.asarray(UPRIGHT))


@pytest.mark.filterwarnings("ignore:Palette images")
def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255]))
    expected = [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 255, 0]]]
    assert_pixels(tmp_path / "p.png", np.array(expected))


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    image = load_image(tmp_path / "a.jpg")
    assert (image.mode, image.size) == ("RGB", (6, 4))
    np.testing.assert_allclose(np.asarray(image), np.full((4, 6, 3), (255, 0, 0)), atol=3)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path, kind: str) -> None:
    grey = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / f"a.{kind}")
    assert_pixels(tmp_path / f"a.{kind}", np.stack([grey >> 8] * 3, axis=-1))


def test_sixteen_bit_pgm(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0x12, 0x34, 0xFF, 0xFF]))
    assert_pixels(tmp_path / "a.pgm", np.array([[[0x12] * 3, [0xFF] * 3]]))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_of_unknown_range(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.ones((2, 2), dtype=kind)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="a.tiff' has 32-bit pixels of unknown range; save it with 8 or 16 bits"):
        load_image(tmp_path / "a.tiff")


def test_truncated(tmp_path: Path) -> None:
    for kind in ("png", "jpg"):
        path = tmp_path / f"a.{kind}"
        noise_picture(60, 60).save(path)
        path.write_bytes(path.read_bytes()[:-200])
        check_image(str(path))  # its header is whole
        with pytest.raises(UserError, match=rf"a.{kind}' is broken: "):
            load_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"<html></html>", b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    for function in (load_image, check_image):
        with pytest.raises(UserError, match="a.png' is (not an image file that can be read|broken: )"):
            function(str(tmp_path / "a.png"))


def test_not_there(tmp_path: Path) -> None:
    for function in (load_image, check_image):
        with pytest.raises(MissingFileError, match="absent.png' does not exist .relative paths start from image_root"):
            function(str(tmp_path / "absent.png"))
        with pytest.raises(MissingFileError, match=re.escape(f"image '{tmp_path}' is a folder")):
            function(str(tmp_path))


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_picture(9, 9).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(UserError, match="a.png' is broken: .*81 pixels"):
        load_image(tmp_path / "a.png")


def test_whatever_the_decoder_raises_is_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_picture(9, 9).save(tmp_path / "a.png")

    def fail(self: Image.Image) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(UserError, match="a.png' is broken: unpack requires"):
        load_image(tmp_path / "a.png")


class FakeResponse:
    """What `requests.get` gives, without a network."""

    def __init__(self, content: bytes, status: int = 200) -> None:
        self.content, self.status = content, status

    def __enter__(self) -> FakeResponse:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def raise_for_status(self) -> None:
        import requests

        if self.status != 200:
            raise requests.HTTPError(f"{self.status} Not Found")

    def iter_content(self, chunk_size: int) -> Any:
        return (self.content[start : start + chunk_size] for start in range(0, len(self.content), chunk_size))


def serve(monkeypatch: pytest.MonkeyPatch, response: FakeResponse) -> None:
    monkeypatch.setattr("requests.get", lambda url, timeout, stream: response)


def test_url(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://example.org/a.png"
    file = io.BytesIO()
    UPRIGHT.save(file, "PNG")
    serve(monkeypatch, FakeResponse(file.getvalue()))
    np.testing.assert_array_equal(np.asarray(load_image(url)), np.asarray(UPRIGHT))
    serve(monkeypatch, FakeResponse(b"<html>"))
    with pytest.raises(UserError, match=f"{url}' is not an image"):
        load_image(url)
    serve(monkeypatch, FakeResponse(b"", status=404))
    with pytest.raises(UserError, match=f"{url}' cannot be fetched: 404"):
        load_image(url)
    monkeypatch.setattr(images, "_MAX_URL_BYTES", 1 << 20)
    serve(monkeypatch, FakeResponse(bytes((1 << 20) + 1)))
    with pytest.raises(UserError, match=f"{url}' is larger than 1 MiB"):
        load_image(url)
    check_image(url)  # left for later


def test_is_url() -> None:
    assert is_url("http://a") and is_url("https://a")
    assert not is_url("a/http://b") and not is_url("ftp://a")
