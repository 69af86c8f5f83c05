"""Any image file comes out as upright RGB, and anything else as one clear error."""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import urllib.parse
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paddlemix.datasets.images.decode import image_size, load_image
from paddlemix.datasets.images.sources import ImageSettings, is_data_uri, is_url
from paddlemix.errors import MissingFileError, UserError
from tests.faulty_server import PICTURE, FaultyServer, serving
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
    assert image_size(path) == image.size


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
        assert image_size(path) == (60, 60)  # its header is whole
        with pytest.raises(UserError, match=rf"a.{kind}' is broken: "):
            load_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"<html></html>", b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    for function in (load_image, image_size):
        with pytest.raises(UserError, match="a.png' is (not an image file that can be read|broken: )"):
            function(str(tmp_path / "a.png"))


def test_not_there(tmp_path: Path) -> None:
    for function in (load_image, image_size):
        with pytest.raises(
            MissingFileError, match="absent.png' does not exist .relative paths start from the image root"
        ):
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


@pytest.mark.parametrize(
    ("name", "kind", "orientation", "options"),
    [
        *((f"{number}.{kind}", None, number, {}) for number in STORED for kind in ("png", "tiff", "webp", "jpg")),
        ("lzw.tiff", "TIFF", 6, {"compression": "tiff_lzw"}),
        ("a.gif", "GIF", 0, {}),
        ("a.bmp", "BMP", 0, {}),
        ("a.ppm", "PPM", 0, {}),
        ("a.jp2", "JPEG2000", 0, {}),
        ("a.ico", "ICO", 0, {"sizes": [(16, 16), (32, 32)]}),
        ("a.icns", "ICNS", 0, {}),
        ("a.tga", "TGA", 0, {}),
    ],
)
def test_size_from_the_header_is_that_of_the_image(
    tmp_path: Path, name: str, kind: str | None, orientation: int, options: dict[str, Any]
) -> None:
    picture = noise_picture(128, 128) if name.endswith(("ico", "icns")) else noise_picture(60, 40)
    if orientation:
        options = {**options, "exif": exif(orientation)}
    picture.save(tmp_path / name, kind, **options)
    assert image_size(tmp_path / name) == load_image(tmp_path / name).size


def test_an_icon_of_another_size_than_its_directory_names(tmp_path: Path) -> None:
    noise_picture(64, 64).save(tmp_path / "a.png")
    picture = (tmp_path / "a.png").read_bytes()
    entry = b"ic07" + struct.pack(">I", len(picture) + 8) + picture  # ic07 holds 128 x 128
    (tmp_path / "a.icns").write_bytes(b"icns" + struct.pack(">I", len(entry) + 8) + entry)
    assert image_size(tmp_path / "a.icns") == load_image(tmp_path / "a.icns").size == (64, 64)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


XMP = b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation='6' tiff:Orientation=\"6\"/>"
PROFILE = b"Raw profile type exif\0\nexif\n 30\n" + exif(6).tobytes().hex().encode()


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (chunk(b"eXIf", exif(6).tobytes()[6:]), (4, 6)),
        (chunk(b"iTXt", XMP), (4, 6)),
        (chunk(b"tEXt", PROFILE), (4, 6)),
        (chunk(b"tEXt", b"date:create\0" + b"2024" * 3000), (6, 4)),
    ],
    ids=["exif", "xmp", "profile", "date"],
)
@pytest.mark.parametrize("late", [True, False])
def test_orientation_anywhere_in_a_png(
    tmp_path: Path, content: bytes, size: tuple[int, int], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    UPRIGHT.save(file, "PNG")
    plain = file.getvalue()
    place = len(plain) - 12 if late else 33  # before IEND, behind IHDR
    whole = plain[:place] + content + plain[place:]
    (tmp_path / "a.png").write_bytes(whole)
    uri = "data:image/png;base64," + base64.b64encode(whole).decode()
    assert load_image(tmp_path / "a.png").size == size
    if size == (6, 4) or not late:
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    assert image_size(tmp_path / "a.png") == image_size(uri) == size


def never(*_: Any) -> None:
    pytest.fail("the image was decoded")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "gif", "tiff"])
def test_the_header_alone_is_read(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_picture(60, 40).save(tmp_path / f"a.{kind}")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    assert image_size(tmp_path / f"a.{kind}") == (60, 40)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], **options)
    assert_pixels(tmp_path / f"a.{kind}", np.full((4, 6, 3), (255, 0, 0)))


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    noise_picture(30, 20).save(path)
    size = path.stat().st_size
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    for function in (load_image, image_size):
        with pytest.raises(UserError, match=rf"is larger than {size - 1} bytes: .*raise max_image_bytes"):
            function(path, ImageSettings(max_bytes=size - 1))
        with pytest.raises(
            UserError, match=r"has 600 pixels .30 x 20.; make it smaller or raise max_image_pixels .599"
        ):
            function(path, ImageSettings(max_pixels=599))
    assert image_size(path, ImageSettings(max_bytes=size, max_pixels=600)) == (30, 20)


def test_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    for function in (load_image, image_size):
        with pytest.raises(UserError, match="a.png' is broken: .*3600000000 pixels"):
            function(tmp_path / "a.png")


def test_more_pixels_than_pillow_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    noise_picture(9, 9).save(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png", ImageSettings(max_pixels=200_000_000)) == (9, 9)


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    UPRIGHT.save(tmp_path / "a.eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", never)
    for function in (load_image, image_size):
        with pytest.raises(UserError, match="a.eps' is PostScript, which is a program"):
            function(tmp_path / "a.eps")


def test_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(MissingFileError, match="is not a file but a device or a pipe"):
        load_image(tmp_path / "a.png")


def test_names_that_are_no_files(tmp_path: Path) -> None:
    base64_without_type = base64.b64encode(noise_picture(60, 60).tobytes()).decode()
    for name, expected in {
        base64_without_type: "[.]{3}' is too long for a path; one in base64 begins with data:image/png;base64,",
        "s3://bucket/a.png": "s3:// is not supported; use http://, https:// or data:",
        "ftp://example.org/a.png": "ftp:// is not supported",
        "file:///a.png": "file:// is not supported",
        "a\0b.png": "does not exist",
        "": "does not exist",
    }.items():
        with pytest.raises(UserError, match=expected) as caught:
            load_image(name)
        assert len(str(caught.value)) < 400


def data_uri(kind: str = "image/png", picture: Image.Image = UPRIGHT) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.parametrize(
    "uri",
    [
        data_uri(),
        data_uri("IMAGE/PNG").replace("data:", "DATA:"),
        data_uri("image/jpeg"),  # the content decides
        data_uri("application/octet-stream"),
        data_uri("image/png;name=a.png"),
        data_uri().replace("+", "%2B").replace("/", "%2F").replace("image%2Fpng", "image/png"),
        data_uri()[:60] + "\n  " + data_uri()[60:],
        "data:image/png," + urllib.parse.quote_from_bytes(base64.b64decode(data_uri().partition(",")[2])),
    ],
    ids=["plain", "case", "other", "octets", "options", "percent", "lines", "unencoded"],
)
def test_data_uri(uri: str) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(uri)), np.asarray(UPRIGHT))
    assert image_size(uri) == (6, 4)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("data:image/png;base64", "is not a data URI; one begins with data:image/png;base64,"),
        ("data:image/png;base64,", "is not an image file that can be read"),
        ("data:image/png;base64,iVBOR!", "is not base64 throughout"),
        ("data:image/png;base64,iVBOR", "is not base64 throughout"),
        (data_uri() + "é", "is not base64 throughout"),
        ("data:text/html;base64,PGh0bWw+", "holds 'text/html', expected image/png or the like"),
        ("data:,hello", "holds 'text/plain', expected image/png"),
        ("data:image/png;base64,aGVsbG8=", "is not an image file that can be read"),
        (data_uri(picture=noise_picture(60, 60))[:-400], "is broken: "),
        (data_uri(picture=noise_picture(90, 90)), "is larger than 20000 bytes: 2.,... bytes"),
        ("data:image/png;base64," + "!" * 40_000, "is larger than 20000 bytes: 29,998 bytes"),  # before it is decoded
    ],
)
def test_broken_data_uri(uri: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        load_image(uri, ImageSettings(max_bytes=20_000))
    assert str(caught.value).startswith(f"image '{uri[:40]}") and len(str(caught.value)) < 200


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.delenv("PADDLEMIX_OFFLINE")
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    with serving() as running:
        yield running


def test_url(server: FaultyServer) -> None:
    settings = ImageSettings(allow_local_network=True, retries=0, max_bytes=1 << 20)
    url = f"{server.address}/picture.png"
    np.testing.assert_array_equal(np.asarray(load_image(url, settings)), np.asarray(PICTURE))
    assert image_size(url, settings) == PICTURE.size
    assert server.asked == ["picture.png"]
    with pytest.raises(UserError, match="^image '.*/missing' cannot be fetched: 404 Not Found"):
        load_image(f"{server.address}/missing", settings)
    with pytest.raises(UserError, match="^image '.*/endless' is larger than 1 MiB .max_image_bytes=1048576"):
        load_image(f"{server.address}/endless", settings)
    with pytest.raises(UserError, match="^image '.*local network; set allow_local_network"):
        load_image(f"{server.address}/unsized", ImageSettings())


def test_url_that_gives_no_image(server: FaultyServer) -> None:
    """The page of an error is asked for again; what stays broken is not."""
    settings = ImageSettings(allow_local_network=True, retries=0)
    for _ in range(2):
        with pytest.raises(UserError, match="html' is not an image file .*; its server sent 'text/html'"):
            load_image(f"{server.address}/html", settings)
        with pytest.raises(UserError, match="untyped' is not an image file .*; its server sent 'no content type'"):
            image_size(f"{server.address}/untyped", settings)
        with pytest.raises(UserError, match="long' is broken: "):
            load_image(f"{server.address}/long", settings)
    assert server.asked.count("html") == 2 and server.asked.count("long") == 1


def test_url_offline(server: FaultyServer) -> None:
    url = f"{server.address}/picture.png"
    for function in (load_image, image_size):
        with pytest.raises(UserError, match="image '.*' is not in the cache, and the setting offline forbids asking"):
            function(url, ImageSettings(offline=True, allow_local_network=True))
    load_image(url, ImageSettings(allow_local_network=True))
    assert load_image(url, ImageSettings(offline=True)).size == PICTURE.size


def test_is_url() -> None:
    assert is_url("http://a") and is_url("https://a")
    assert is_url("HTTPS://a")
    assert not is_url("a/http://b") and not is_url("ftp://a")
    assert is_data_uri("data:image/png;base64,") and is_data_uri("DATA:,") and not is_data_uri("data/a.png")
