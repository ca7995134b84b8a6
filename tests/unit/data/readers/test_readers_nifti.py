from __future__ import annotations

import gzip
import struct

import nibabel as nib
import numpy as np
import pytest

from medray.data.readers import guard, probe, read_image, read_mask
from medray.errors import UnreadableError


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL", "ILA"])
def test_turns_to_ras_as_nibabel_does(tmp_path, volume, save_nifti, codes):
    path = save_nifti(volume, codes)
    image = read_image(path.name, tmp_path)
    expected = nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(image.array[0], expected.get_fdata())
    np.testing.assert_allclose(image.affine, expected.affine)
    assert image.spacing == pytest.approx(expected.header.get_zooms())
    assert image.original["orientation"] == codes
    assert image.original["shape"] == volume.shape
    np.testing.assert_allclose(image.original["affine"], nib.load(path).affine)
    header = probe(path.name, tmp_path)
    assert (header.shape, header.channels, header.spacing) == (image.shape, 1, pytest.approx(image.spacing))


def test_oblique_keeps_its_affine(tmp_path, volume):
    turn = nib.eulerangles.euler2mat(0.1, 0.2, 0.3)
    affine = nib.affines.from_matvec(turn * [1, 2, 3], [4, 5, 6])
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "a.nii")
    image = read_image("a.nii", tmp_path)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    assert image.spacing == pytest.approx((1, 2, 3), abs=1e-5)


def test_fourth_axis_becomes_channels(tmp_path, save_nifti):
    array = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    image = read_image(save_nifti(array).name, tmp_path)
    np.testing.assert_array_equal(image.array, array.transpose(3, 0, 1, 2))


def test_single_slice_is_a_picture_of_rows_and_columns(tmp_path, save_nifti):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    path = save_nifti(array, "LPS")
    image = read_image(path.name, tmp_path)
    np.testing.assert_array_equal(image.array[0], array[:, :, 0].T)
    assert image.spacing == (2.0, 1.0)
    # row 2, column 1 lies where the file's voxel (1, 2, 0) lies
    np.testing.assert_allclose(image.affine @ [2, 1, 0, 1], nib.load(path).affine @ [1, 2, 0, 1])
    assert read_mask(path.name, tmp_path).array.shape == (4, 3)
    assert probe(path.name, tmp_path).shape == (4, 3)


def test_rescales_and_mends_what_is_not_finite(tmp_path):
    stored = nib.Nifti1Image(np.full((2, 2, 2), 3, np.int16), np.eye(4))
    stored.header.set_slope_inter(2.0, -1.0)
    nib.save(stored, tmp_path / "scaled.nii")
    raw = bytearray((tmp_path / "scaled.nii").read_bytes())
    struct.pack_into("<2f", raw, 112, 2.0, -1.0)
    (tmp_path / "scaled.nii").write_bytes(raw)
    slope, inter = nib.load(tmp_path / "scaled.nii").dataobj.slope, nib.load(tmp_path / "scaled.nii").dataobj.inter
    image = read_image("scaled.nii", tmp_path)
    np.testing.assert_allclose(image.array[0], nib.load(tmp_path / "scaled.nii").get_fdata())
    assert (slope, inter) == (2.0, -1.0)

    array = np.arange(8, dtype=np.float64).reshape(2, 2, 2) - 1000
    array[0, 0, 0], array[1, 1, 1] = np.nan, np.inf
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "nan.nii")
    image = read_image("nan.nii", tmp_path)
    assert (image.array[0, 0, 0, 0], image.array[0, 1, 1, 1]) == (-999, -994)
    assert image.original["nonfinite"] == 2
    nib.save(nib.Nifti1Image(array * np.nan, np.eye(4)), tmp_path / "all.nii")
    with pytest.raises(UnreadableError, match=r"all\.nii.*finite"):
        read_image("all.nii", tmp_path)


def test_rgb_records_become_channels(tmp_path):
    record = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    array = np.zeros((2, 3, 4), record)
    array["R"], array["B"] = 7, 9
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "rgb.nii")
    image = read_image("rgb.nii", tmp_path)
    assert image.array.shape == (3, 2, 3, 4)
    assert [channel.max() for channel in image.array] == [7, 0, 9]


def test_masks_hold_whole_numbers(tmp_path, save_nifti):
    labels = np.zeros((3, 4, 5), np.float32)
    labels[1] = 2
    mask = read_mask(save_nifti(labels, "LPS").name, tmp_path)
    assert mask.array.dtype == np.uint8
    assert set(np.unique(mask.array)) == {0, 2}
    assert read_mask(save_nifti(labels - 1).name, tmp_path).array.min() == -1
    with pytest.raises(UnreadableError, match=r"half\.nii.*0\.5.*nearest"):
        read_mask(save_nifti(labels / 4, name="half.nii").name, tmp_path)
    with pytest.raises(UnreadableError, match="one channel"):
        read_mask(save_nifti(np.zeros((2, 2, 2, 3), np.uint8)).name, tmp_path)


def test_a_singular_sform_falls_back_to_the_qform(tmp_path, volume):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    image = nib.Nifti1Image(volume, affine)
    image.set_qform(affine, code=1)
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    (tmp_path / "a.nii").write_bytes(raw)
    assert read_image("a.nii", tmp_path).spacing == (1.0, 2.0, 3.0)
    raw[252:256] = bytes(4)  # qform_code, sform_code
    raw[80:92] = bytes(12)  # pixdim
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(UnreadableError, match=r"a\.nii.*geometry"):
        read_image("a.nii", tmp_path)


def _with(raw: bytes, offset: int, layout: str, *values: float) -> bytes:
    copy = bytearray(raw)
    struct.pack_into(layout, copy, offset, *values)
    return bytes(copy)


@pytest.mark.parametrize(
    ("offset", "layout", "values", "cause"),
    [
        (40, "<4h", (3, 32767, 32767, 32767), "at most"),
        (40, "<4h", (3, 32767, 3000, 10), "truncated|claims"),
        (40, "<h", (9,), "axes"),
        (42, "<h", (-3,), "axes|holds nothing"),
        (70, "<h", (32,), "complex"),
        (108, "<f", (1e9,), "byte"),
        (108, "<f", (float("nan"),), "damaged"),
        (112, "<f", (float("inf"),), "scl_slope"),
        (344, "<4s", (b"ni1\0",), "single-file"),
        (0, "<i", (7,), "NIfTI"),
        (280, "<4f", (1e6, 0, 0, 0), "spacing"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_header_claims_are_not_believed(tmp_path, volume, save_nifti, offset, layout, values, cause, zipped):
    raw = _with(save_nifti(volume, name="a.nii").read_bytes(), offset, layout, *values)
    path = tmp_path / ("b.nii.gz" if zipped else "b.nii")
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    for read in (read_image, probe):
        with pytest.raises(UnreadableError, match=rf"{path.name}: .*({cause})"):
            read(path.name, tmp_path)


def test_truncation_and_a_wrong_checksum_are_found(tmp_path, save_nifti):
    array = np.random.default_rng(0).integers(0, 1000, (20, 20, 20), np.int16)
    whole = save_nifti(array).read_bytes()
    for name, data in {
        "cut.nii.gz": whole[: len(whole) // 2],
        "crc.nii.gz": whole[:-8] + b"\0\0\0\0" + whole[-4:],
        "head.nii.gz": gzip.compress(gzip.decompress(whole)[:200]),
        "long.nii.gz": gzip.compress(gzip.decompress(whole) + bytes(2**21)),
        "cut.nii": gzip.decompress(whole)[:-1],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableError, match=name):
            read_image(name, tmp_path)


def test_a_bomb_is_refused_and_an_almost_empty_mask_is_not(tmp_path, save_nifti, monkeypatch):
    monkeypatch.setattr(guard, "BOMB_BYTES", 2**20)
    header = bytearray(gzip.decompress(save_nifti(np.zeros((2, 2, 2), np.uint8)).read_bytes())[:352])
    struct.pack_into("<4h", header, 40, 3, 1000, 1000, 3)
    (tmp_path / "zeros.nii.gz").write_bytes(gzip.compress(bytes(header) + bytes(3_000_000)))
    with pytest.raises(UnreadableError, match=r"zeros\.nii\.gz.*claims"):
        read_image("zeros.nii.gz", tmp_path)
    assert read_mask("zeros.nii.gz", tmp_path).array.shape == (1000, 1000, 3)


def test_real_volumes_are_as_nibabel_reads_them(shared_data):
    for name in ("hippocampus_190", "hippocampus_378"):
        reference = f"msd_hippocampus/imagesTr/{name}.nii.gz"
        image = read_image(reference, shared_data)
        expected = nib.as_closest_canonical(nib.load(shared_data / reference))
        np.testing.assert_allclose(image.array[0], expected.get_fdata(), rtol=1e-6)
        mask = read_mask(reference.replace("imagesTr", "labelsTr"), shared_data)
        assert mask.array.shape == image.shape
        assert set(np.unique(mask.array)) == {0, 1, 2}
