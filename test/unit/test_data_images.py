"""Decoding: exact, checked before it allocates, the same with and without simplejpeg."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from workers_data import encode, picture, with_claimed_size

from data import images, open_dataset
from data.images import contact_sheet, decode_image, image_size, inside, recorded_channel_order
from data.synthetic import SyntheticDataset
from runtime.errors import DamagedItem, DataError

pytestmark = pytest.mark.core


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(images, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_pixels_are_pillows(decoder, format):
    data = encode(picture(1), format)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert image_size(data) == (112, 112)


def test_bgr_files_come_out_as_rgb(decoder):
    image = picture(2)
    for format in ("PNG", "JPEG"):
        np.testing.assert_array_equal(
            decode_image(encode(image[:, :, ::-1], format), "bgr"),
            decode_image(encode(image[:, :, ::-1], format))[:, :, ::-1],
        )


def test_gray_cmyk_and_transparent_images(decoder):
    gray = picture(3)[:, :, 0]
    assert decode_image(encode(gray)).shape == (112, 112, 3)
    cmyk = io.BytesIO()
    Image.fromarray(picture(3)).convert("CMYK").save(cmyk, "JPEG")
    assert decode_image(cmyk.getvalue()).shape == (112, 112, 3)
    clear = np.dstack([picture(3), np.full((112, 112), 9, np.uint8)])
    np.testing.assert_array_equal(decode_image(encode(clear, "PNG")), picture(3))


def test_in_place(decoder):
    for format in ("JPEG", "PNG"):
        data = encode(picture(4), format)
        out_BHWC = np.zeros((2, 112, 112, 3), np.uint8)
        decode_image(data, "rgb", out_BHWC[1])
        np.testing.assert_array_equal(out_BHWC[1], decode_image(data))
        assert not out_BHWC[0].any()


def test_memoryview_is_enough(decoder):
    data = encode(picture(5))
    np.testing.assert_array_equal(decode_image(memoryview(b"head" + data)[4:]), decode_image(data))


@pytest.mark.parametrize("cut", [0, 1, 2, 10, 300, -2, -60])
def test_cut_off_jpeg(decoder, cut):
    with pytest.raises(DamagedItem):
        decode_image(encode(picture(6), quality=95)[:cut])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP"])
def test_cut_off_others(format):
    with pytest.raises(DamagedItem):
        decode_image(encode(picture(6), format)[:200])


def _png_claiming(width: int, height: int) -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(100000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (head, body, b"IEND")
    )


@pytest.mark.parametrize("bomb", ["jpeg", "png"])
@pytest.mark.parametrize("side", [6000, 65000])  # beyond the larger Pillow itself refuses
def test_a_bomb_is_refused_before_it_is_decoded(decoder, bomb, side):
    data = with_claimed_size(encode(picture(7)), side, side) if bomb == "jpeg" else _png_claiming(side, side)
    tracemalloc.start()
    with pytest.raises(DamagedItem, match=f"claims {side}x{side} pixels|{side * side} pixels.? exceeds limit"):
        decode_image(data)
    with pytest.raises(DamagedItem, match=f"is {side}x{side} where 112x112 is needed|exceeds limit"):
        decode_image(data, "rgb", np.empty((112, 112, 3), np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        bytes(1000),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"GIF89a" + bytes(50),
        b"\xff\xd8\xff\xe0garbage",
        b"\x89PNG\r\n\x1a\n" + bytes(40),
    ],
)
def test_what_is_no_image_of_a_format_read_here(decoder, data):
    with pytest.raises(DamagedItem) as caught:
        decode_image(data)
    assert "\n" not in str(caught.value)
    with pytest.raises(DamagedItem):
        image_size(data)


@pytest.mark.parametrize("path", ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "", "a\0b"])
def test_paths_stay_inside_their_root(tmp_path, path):
    with pytest.raises(DataError, match="list line 1: path .* leaves the data set's folder"):
        inside(tmp_path, path, "list line 1")


def test_paths_inside_are_joined(tmp_path):
    assert inside(tmp_path, "./a b/c..d.jpg", "") == tmp_path / "a b" / "c..d.jpg"


def test_channel_order_is_a_choice(tmp_path):
    with pytest.raises(DataError, match="channel_order 'grb': choose from rgb, bgr"):
        images.check_channel_order("grb")
    (tmp_path / "imgs_channel_order.txt").write_text("BGR\n")
    assert recorded_channel_order(tmp_path / "imgs") == "bgr"
    assert recorded_channel_order(tmp_path / "other") is None
    (tmp_path / "imgs_channel_order.txt").write_text("green" * 10000)
    with pytest.raises(DataError, match="is not a channel order"):
        recorded_channel_order(tmp_path / "imgs")


def test_contact_sheet(tmp_path):
    contact_sheet(SyntheticDataset(50, 5), tmp_path / "sheet.png", rows=3, cols=4)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 112, 4 * 112, 3)
    dataset = SyntheticDataset(50, 5)
    np.testing.assert_array_equal(sheet[112:224, 112:224], dataset[7][0])  # class 2, its second image
    with pytest.raises(DataError, match="cannot be written"):
        contact_sheet(dataset, tmp_path / "no folder" / "sheet.png")


def test_a_sheet_shows_damaged_images_black(tmp_path, shared):
    contact_sheet(open_dataset(shared / "real" / "lfw_small"), tmp_path / "sheet.png", rows=2, cols=100)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    tiles = [row.any(axis=(0, 2, 3)) for row in sheet.reshape(2, 112, -1, 112, 3)]
    counts = [int(row.sum()) for row in tiles]
    assert counts[0] != counts[1] and len(tiles[0]) == max(counts)  # no more columns than images


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_cut(format):
    grey_HW = np.arange(0, 65536, 64, np.uint16).reshape(32, 32)
    image_HWC = decode_image(encode(grey_HW, format))
    expected_HW = np.rint(grey_HW / 257).astype(np.uint8)
    np.testing.assert_array_equal(image_HWC, np.repeat(expected_HW[:, :, None], 3, axis=2))


@pytest.mark.parametrize("dtype, name", [(np.float32, "float"), (np.int32, "32-bit")])
def test_numbers_without_a_known_range_are_refused(dtype, name):
    with pytest.raises(DamagedItem, match=f"holds {name} numbers: convert it to 8 bits"):
        decode_image(encode(np.ones((8, 8), dtype), "TIFF"))
