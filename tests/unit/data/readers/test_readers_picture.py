from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageOps

from medray.data.readers import probe, read_image, read_mask
from medray.errors import UnreadableError

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def save(path, array, mode=None, **options):
    Pillow.fromarray(array, mode).save(path, **options) if mode else Pillow.fromarray(array).save(path, **options)
    return path.name


def png(height: int, width: int, depth: int, kind: int, rows: bytes) -> bytes:
    """A PNG written by hand: Pillow can't write 16 bits per colour."""

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_values_come_as_they_are_stored(tmp_path, suffix):
    for array in (GREY, COLOUR):
        name = save(tmp_path / f"a.{suffix}", array)
        image = read_image(name, tmp_path)
        expected = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        np.testing.assert_array_equal(image.array, expected)
        assert image.array.dtype == np.float32
        assert (image.spacing, image.affine, image.original["bits"]) == (None, None, 8)
        assert (probe(name, tmp_path).shape, probe(name, tmp_path).channels) == ((6, 8), len(expected))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_grey(tmp_path, suffix):
    array = GREY.astype(np.uint16) * 250
    image = read_image(save(tmp_path / f"a.{suffix}", array), tmp_path)
    np.testing.assert_array_equal(image.array[0], array)
    assert image.original["bits"] == 16


def test_sixteen_bits_colour_keep_all_bits(tmp_path):
    array = np.arange(6 * 8 * 3, dtype=np.uint16).reshape(6, 8, 3) * 301
    (tmp_path / "a.png").write_bytes(png(6, 8, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)))
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb")
    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(read_image(name, tmp_path).array, array.transpose(2, 0, 1))
        assert probe(name, tmp_path).channels == 3


def test_alpha_is_dropped_not_blended(tmp_path):
    rgba = np.dstack([COLOUR, np.zeros((6, 8), np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", rgba), tmp_path).array, COLOUR.transpose(2, 0, 1))
    la = np.dstack([GREY, np.zeros((6, 8), np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "b.png", la), tmp_path).array[0], GREY)


def test_palettes_become_their_colours_or_greys(tmp_path):
    indices = Pillow.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    indices.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    indices.save(tmp_path / "colour.png")
    image = read_image("colour.png", tmp_path)
    assert image.array[:, 0, 1].tolist() == [255, 0, 0]
    indices.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    indices.save(tmp_path / "grey.png")
    assert read_image("grey.png", tmp_path).array.tolist() == [[[10, 20], [30, 20]]]
    assert (probe("colour.png", tmp_path).channels, probe("grey.png", tmp_path).channels) == (3, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_exif_orientation_turns_image_and_mask(tmp_path, orientation, suffix):
    picture = Pillow.fromarray(np.kron(np.array([[0, 255, 0], [0, 0, 0]], np.uint8), np.ones((16, 16), np.uint8)))
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / f"a.{suffix}", exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    picture.save(tmp_path / "turned.png", exif=exif)
    with Pillow.open(tmp_path / "turned.png") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_allclose(read_image(f"a.{suffix}", tmp_path).array[0], expected, atol=3 * (suffix == "jpg"))
    np.testing.assert_array_equal(read_mask(f"a.{suffix}", tmp_path).array, expected > 127)
    assert probe(f"a.{suffix}", tmp_path).shape == expected.shape


def test_several_pages_are_refused(tmp_path):
    pages = [Pillow.fromarray(GREY), Pillow.fromarray(GREY + 1)]
    for name in ("a.tif", "a.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(UnreadableError, match=rf"{name}: holds 2 pages"):
            read_image(name, tmp_path)


def test_masks_black_and_white_become_zero_and_one(tmp_path):
    binary = (GREY > 100).astype(np.uint8)
    names = [
        save(tmp_path / "a.png", binary * 255),
        save(tmp_path / "b.png", binary * np.uint16(65535)),
        save(tmp_path / "c.png", np.repeat(binary[..., None] * 255, 3, axis=2)),
        save(tmp_path / "d.gif", binary * 255),
        save(tmp_path / "e.png", binary.astype(bool)),
        save(tmp_path / "f.png", binary),
        save(tmp_path / "g.jpg", np.kron(binary * 255, np.ones((16, 16), np.uint8)).astype(np.uint8), quality=95),
    ]
    for name in names:
        labels = read_mask(name, tmp_path).array
        np.testing.assert_array_equal(labels[::16, ::16] if name == "g.jpg" else labels, binary, err_msg=name)
    assert read_mask(save(tmp_path / "h.png", np.full((4, 4), 255, np.uint8)), tmp_path).array.min() == 1


def test_masks_keep_labels_and_indices(tmp_path):
    labels = np.array([[0, 1, 2], [255, 3, 0]], np.uint8)
    np.testing.assert_array_equal(read_mask(save(tmp_path / "a.png", labels), tmp_path).array, labels)
    indexed = Pillow.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    indexed.save(tmp_path / "b.png")
    assert read_mask("b.png", tmp_path).array.tolist() == [[0, 1], [2, 1]]
    indexed.putpalette([255, 255, 255, 0, 0, 0, 0, 0, 0])  # white first: the colour says what is foreground
    indexed.save(tmp_path / "c.png")
    assert read_mask("c.png", tmp_path).array.tolist() == [[1, 0], [0, 0]]


def test_true_colours_and_blurred_labels_are_no_mask(tmp_path):
    with pytest.raises(UnreadableError, match=r"a\.png: a colour picture is no mask"):
        read_mask(save(tmp_path / "a.png", COLOUR), tmp_path)
    with pytest.raises(UnreadableError, match=r"b\.jpg: JPEG blurs"):
        read_mask(save(tmp_path / "b.jpg", np.full((16, 16), 100, np.uint8)), tmp_path)


def test_claims_and_damage_name_the_file(tmp_path):
    (tmp_path / "huge.png").write_bytes(png(60000, 60000, 8, 0, b"\0"))
    (tmp_path / "bomb.png").write_bytes(png(11000, 11000, 8, 2, b"\0"))
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / save(tmp_path / "whole.png", COLOUR)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) - 30])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("huge.png", "bomb.png", "text.png", "cut.png", "empty.png"):
        for read in (read_image, read_mask):
            with pytest.raises(UnreadableError, match=rf"{name}: \w+"):
                read(name, tmp_path)


def test_content_wins_over_suffix(tmp_path):
    save(tmp_path / "a.png", GREY)
    (tmp_path / "a.png").rename(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_image("a.nii.gz", tmp_path).array[0], GREY)


def test_drive_is_read_as_colour_and_binary_masks(shared_data):
    assert read_image("drive/training/images/21_training.tif", shared_data).array.shape == (3, 584, 565)
    vessels = read_mask("drive/training/1st_manual/21_manual1.gif", shared_data).array
    field = read_mask("drive/training/mask/21_training_mask.gif", shared_data).array
    assert vessels.dtype == np.uint8 and vessels.max() == 1
    assert 0.05 < vessels.mean() < 0.2
    assert 0.6 < field.mean() < 0.75
