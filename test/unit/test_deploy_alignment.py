"""Photos as users have them, and five landmarks to an aligned face."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from deploy.alignment import TEMPLATE_52, align_faces, similarity_transforms
from deploy.photos import decode_photo, list_photos, read_photo
from runtime.errors import DamagedItem, DataError


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def transformed(points_52, angle, scale, shift):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    return points_52 @ turn.T + shift


def test_a_similarity_is_found_again_exactly():
    rng = np.random.default_rng(0)
    faces = np.stack([transformed(TEMPLATE_52, a, s, t) for a, s, t in
                      zip(rng.uniform(-3, 3, 9), rng.uniform(0.3, 8, 9), rng.uniform(-500, 500, (9, 2)))])  # fmt: skip
    matrices = similarity_transforms(faces)
    back = np.einsum("nij,nkj->nki", matrices[:, :, :2], faces) + matrices[:, None, :, 2]
    np.testing.assert_allclose(back, np.broadcast_to(TEMPLATE_52, back.shape), rtol=0, atol=1e-9)


def test_the_transform_is_the_least_squares_one():
    """No similarity near it is nearer to the template, and it never mirrors a face."""
    rng = np.random.default_rng(1)
    points = transformed(TEMPLATE_52, 0.3, 2.0, 30) + rng.normal(0, 4, (5, 2))
    (matrix,) = similarity_transforms(points[None])
    assert np.linalg.det(matrix[:, :2]) > 0

    def cost(a, b, x, y):
        return np.square(points @ np.array([[a, b], [-b, a]]) + (x, y) - TEMPLATE_52).sum()

    best = np.array([matrix[0, 0], matrix[1, 0], *matrix[:, 2]])
    for step in np.concatenate([np.eye(4), -np.eye(4)]) * (1e-3, 1e-3, 0.1, 0.1):
        assert cost(*best) < cost(*(best + step))


def picture(height=300, width=400):
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, (x + y) // 3 % 256], -1).astype(np.uint8)


def test_an_upright_face_at_its_own_size_is_cut_out_to_the_pixel():
    image = picture()
    (face,) = align_faces(image, TEMPLATE_52[None] + (50, 70))
    assert np.array_equal(face, image[70:182, 50:162])


def test_outside_of_the_picture_is_black_and_nonsense_landmarks_do_no_harm():
    faces = align_faces(picture(), np.stack([TEMPLATE_52 - 60, TEMPLATE_52 + 1e7, np.full((5, 2), 5.0)]))
    assert not faces[0][:60].any() and faces[0][61:, 61:].any()
    assert not faces[1].any() and not faces[2].any()


def test_a_large_face_is_averaged_not_sampled():
    """Stripes of one pixel become grey, and neither black nor white, in a face eight times as large as the output."""
    stripes = np.zeros((1200, 1200, 3), np.uint8)
    stripes[:, ::2] = 255
    (face,) = align_faces(stripes, TEMPLATE_52[None] * 8 + 100)
    assert face[20:90, 20:90].min() > 90 and face[20:90, 20:90].max() < 165


def test_many_faces_are_what_each_is_alone():
    image, rng = picture(), np.random.default_rng(2)
    points = np.stack([transformed(TEMPLATE_52, rng.uniform(-1, 1), rng.uniform(0.5, 3), rng.uniform(0, 90))
                       for _ in range(130)])  # fmt: skip
    together = align_faces(image, points)
    assert all(np.array_equal(together[i], align_faces(image, points[i : i + 1])[0]) for i in (0, 63, 64, 129))
    assert align_faces(image, np.zeros((0, 5, 2))).shape == (0, 112, 112, 3)


def test_the_exif_orientation_is_obeyed():
    upright = Image.fromarray(picture(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
    shown = decode_photo(encoded(upright, exif=exif))
    assert np.array_equal(shown, np.rot90(picture(40, 60), -1))


def test_every_colour_mode_becomes_rgb():
    grey = np.full((9, 7), 100, np.uint8)
    assert np.array_equal(decode_photo(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, -1))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(decode_photo(encoded(deep)), np.repeat(grey[..., None], 3, -1))
    unit = Image.fromarray(np.full((9, 7), 0.5, np.float32))
    assert np.array_equal(np.unique(decode_photo(encoded(unit, "TIFF"))), [127])
    clear = Image.fromarray(np.dstack([np.repeat(grey[..., None], 3, -1), np.zeros_like(grey)]), "RGBA")
    assert (decode_photo(encoded(clear)) == 255).all()  # what is transparent is paper
    cmyk = decode_photo(encoded(Image.new("CMYK", (7, 9), (0, 255, 255, 0)), "JPEG"))
    assert cmyk.shape == (9, 7, 3) and cmyk[..., 0].min() > 200 and cmyk[..., 1].max() < 60
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    first = decode_photo(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert first[0, 0].tolist() == [255, 0, 0]
    assert decode_photo(encoded(Image.new("RGB", (1, 1)))).shape == (1, 1, 3)


def bomb(width=30000, height=30000) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(5000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("data, words", [
    (b"", "is empty"), (b"hello, I am a text", "not an image"), (bomb(), "claims"),
    (bomb(12000, 12000), "claims 12000x12000"),
    (encoded(Image.fromarray(picture()), "JPEG")[:2000], "cut off"),
    (encoded(Image.fromarray(picture()))[:900], "cut off"),
    (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
], ids=["empty", "text", "bomb", "large", "jpeg", "png", "heic"])  # fmt: skip
def test_what_is_no_photo_is_one_line(data, words):
    with pytest.raises(DamagedItem, match=words) as error:
        decode_photo(data)
    assert "\n" not in str(error.value)


def test_a_heic_photo_and_one_that_claims_too_much():
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer, image = io.BytesIO(), Image.new("RGB", (80, 60), (200, 30, 90))
    pillow_heif.from_pillow(image).save(buffer)
    found = decode_photo(buffer.getvalue())
    assert found.shape == (60, 80, 3) and np.abs(found.mean((0, 1)) - (200, 30, 90)).max() < 4
    with pytest.raises(DamagedItem, match="claims 80x60"):
        decode_photo(buffer.getvalue(), max_pixels=1000)
    with pytest.raises(DamagedItem, match="damaged HEIC"):
        decode_photo(buffer.getvalue()[:-50])


def test_photos_are_listed_below_a_folder_and_links_to_folders_are_left(tmp_path):
    for name in ("b/2.JPG", "a.png", "b/1.heic", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert [str(path) for path in list_photos(tmp_path)] == ["a.png", "b/1.heic", "b/2.JPG"]
    with pytest.raises(DataError, match="no such folder"):
        list(list_photos(tmp_path / "missing"))
    with pytest.raises(DamagedItem, match="cannot be read"):
        read_photo(tmp_path)
