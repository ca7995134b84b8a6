from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from medray.data.readers import npz, probe, read_image, read_mask
from medray.errors import UnreadableError

GREY = np.random.default_rng(0).integers(0, 256, (7, 5, 6), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (7, 5, 6, 3), np.uint8)
SOLID = np.random.default_rng(2).integers(0, 256, (7, 4, 5, 6), np.uint8)


@pytest.fixture(params=["stored", "compressed", "streamed"])
def archive(request, tmp_path, monkeypatch):
    """The same arrays, read in each of the three ways."""
    if request.param == "streamed":
        monkeypatch.setattr(npz, "_KEEP_BYTES", 10)
    save = np.savez if request.param == "stored" else np.savez_compressed
    save(tmp_path / "a.npz", grey=GREY, colour=COLOUR, solid=SOLID, labels=GREY // 100, table=np.zeros((7, 1)))
    return tmp_path


def test_items_in_any_order(archive):
    for index in (0, 1, 2, 6, 3, 3, 0):
        np.testing.assert_array_equal(read_image(f"a.npz#grey/{index}", archive).array[0], GREY[index])
        colour = read_image(f"a.npz#colour/{index}", archive)
        np.testing.assert_array_equal(colour.array, COLOUR[index].transpose(2, 0, 1))
        np.testing.assert_array_equal(read_image(f"a.npz#solid/{index}", archive).array[0], SOLID[index])
        np.testing.assert_array_equal(read_mask(f"a.npz#labels/{index}", archive).array, GREY[index] // 100)


def test_headers_tell_shape_and_channels(archive):
    found = {name: probe(f"a.npz#{name}/0", archive) for name in ("grey", "colour", "solid")}
    assert [(h.shape, h.channels) for h in found.values()] == [((5, 6), 1), ((5, 6), 3), ((4, 5, 6), 1)]


@pytest.mark.parametrize(
    ("member", "cause"),
    [
        ("grey/7", "beyond the 7"),
        ("nothing/0", "no array"),
        ("table/0", "shape"),
        *((member, "name one item") for member in ("", "grey", "grey/-1", "grey/1e3", "grey/" + "9" * 40)),
    ],
)
def test_wrong_references_say_what_there_is(archive, member, cause):
    with pytest.raises(UnreadableError, match=rf"a\.npz#?.*{cause}"):
        read_image(f"a.npz#{member}", archive)


def test_a_changed_file_is_read_anew(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=GREY)
    assert read_image("a.npz#x/0", tmp_path).array[0, 0, 0] == GREY[0, 0, 0]
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((2, 9, 9), np.uint8))
    assert read_image("a.npz#x/0", tmp_path).shape == (9, 9)


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('unpickled')",))

    np.savez(tmp_path / "a.npz", x=np.array([[[Bomb()]]], dtype=object))
    with pytest.raises(UnreadableError, match=r"a\.npz#x/0: .*never"):
        read_image("a.npz#x/0", tmp_path)


def _member(shape: str, data: bytes) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize("shape", ["(1000000, 1000000, 1000000)", "(3, 5, 7)", "(0, 5, 5)", "(-1, 5, 5)", "(2,)"])
def test_claims_of_the_array_header_are_not_believed(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", _member(shape, bytes(50)))
    with pytest.raises(UnreadableError, match=r"a\.npz#x/0: "):
        read_image("a.npz#x/0", tmp_path)


def test_a_damaged_member_fails_its_checksum(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=GREY)
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(UnreadableError, match=r"a\.npz#x/0: "):
        read_image("a.npz#x/0", tmp_path)


def test_medmnist(shared_data):
    with np.load(shared_data / "medmnist/breastmnist.npz", allow_pickle=False) as archive:
        expected = archive["test_images"][155]
    image = read_image("medmnist/breastmnist.npz#test_images/155", shared_data)
    np.testing.assert_array_equal(image.array[0], expected)
    with pytest.raises(UnreadableError, match="beyond the 156"):
        read_image("medmnist/breastmnist.npz#test_images/156", shared_data)


def test_an_archive_without_arrays(tmp_path):
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    (tmp_path / "a.npz").write_bytes(empty.getvalue())
    with pytest.raises(UnreadableError, match="nothing"):
        read_image("a.npz#x/0", tmp_path)
