from __future__ import annotations

import random

import numpy as np
import pydicom
import pytest

from medray.data.manifest import Case
from medray.data.readers import probe, read_case, read_image, read_mask
from medray.errors import UnreadableError

PIXELS = np.arange(20, dtype=np.uint16).reshape(4, 5) * 10
RAMP = np.stack([PIXELS + z for z in range(4)])  # (slices, rows, columns)


@pytest.fixture()
def series(tmp_path, save_slice):
    """Write slices at the given z (mm) under names that say nothing of their order; returns the directory."""

    def write(depths, **elements):
        names = random.Random(1).sample(range(100, 999), len(depths))
        for number, (name, z) in enumerate(zip(names, depths, strict=True)):
            save_slice(RAMP[number % 4], z, f"series/{name}.dcm", InstanceNumber=99 - number, **elements)
        return tmp_path / "series"

    return write


def test_a_series_becomes_a_volume_by_position(tmp_path, series):
    image = read_image(str(series([-30.0, -27.0, -24.0, -21.0])), tmp_path)
    # columns go left and rows back in LPS: both are flipped in RAS
    np.testing.assert_array_equal(image.array[0], RAMP.transpose(2, 1, 0)[::-1, ::-1])
    assert (image.spacing, image.modality, image.original["tilt"]) == ((1.0, 2.0, 3.0), "CT", 0.0)
    np.testing.assert_allclose(image.affine @ [4, 3, 0, 1], [-5, -7, -30, 1])
    assert image.original["orientation"] == "LPS"
    assert image.original["shape"] == (5, 4, 4)
    header = probe("series", tmp_path)
    assert (header.shape, header.channels, header.spacing, header.modality) == ((5, 4, 4), 1, image.spacing, "CT")
    positions = [pydicom.dcmread(file).ImagePositionPatient[2] for file in image.original["files"]]
    assert positions == [-30, -27, -24, -21]


def test_a_sagittal_series_turns_too(tmp_path, save_slice):
    for number in range(3):
        save_slice(
            RAMP[number],
            name=f"s/{number}.dcm",
            ImagePositionPatient=[number * 3.0, 0, 0],
            ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
        )
    image = read_image("s", tmp_path)
    assert image.array.shape == (1, 3, 5, 4)
    assert image.spacing == (3.0, 1.0, 2.0)
    # x = 6 mm left is RAS -6: the last slice is the first index; column 0 is the most anterior
    np.testing.assert_allclose(image.affine @ [0, 4, 3, 1], [-6, 0, 0, 1])
    assert image.array[0, 0, 4, 3] == RAMP[2, 0, 0]


def test_repeats_become_channels(tmp_path, save_slice):
    for time in range(2):
        for z in range(3):
            save_slice(RAMP[z] + 100 * time, z * 3.0, f"s/{time}{z}.dcm", InstanceNumber=time * 3 + z)
    image = read_image("s", tmp_path)
    assert image.array.shape == (2, 5, 4, 3)
    np.testing.assert_array_equal(image.array[1] - image.array[0], 100)
    (tmp_path / "s/12.dcm").unlink()
    with pytest.raises(UnreadableError, match="2 frames at one place but 1 at another"):
        read_image("s", tmp_path)


def test_copies_count_once(tmp_path, series):
    folder = series([0.0, 3.0])
    first = min(folder.iterdir())
    (folder / "copy.dcm").write_bytes(first.read_bytes())
    assert read_image("series", tmp_path).array.shape == (1, 5, 4, 2)


@pytest.mark.parametrize(
    ("depths", "cause"),
    [
        ([0, 3, 6, 12], "1 of 5 slices missing"),
        ([0, 3, 6, 7.2], "unevenly spaced"),
    ],
)
def test_gaps_are_found(tmp_path, series, depths, cause):
    series(depths)
    for read in (read_image, probe):
        with pytest.raises(UnreadableError, match=rf"series: .*{cause}"):
            read("series", tmp_path)


def test_rounded_positions_are_even_enough(tmp_path, series):
    series([0.0, 1.25, 2.5, 3.8])
    assert read_image("series", tmp_path).spacing[2] == pytest.approx(3.8 / 3)


def test_gantry_tilt_shears_the_affine(tmp_path, save_slice):
    for z in range(3):
        save_slice(RAMP[z], name=f"s/{z}.dcm", ImagePositionPatient=[0, z * 1.0, z * 3.0])
    image = read_image("s", tmp_path)
    assert image.original["tilt"] == pytest.approx(np.degrees(np.arctan(1 / 3)), abs=0.01)
    column = image.affine[:3, 2]
    np.testing.assert_allclose(column, [0, -1, 3])


def test_slices_that_are_not_parallel_or_alike(tmp_path, save_slice):
    save_slice(PIXELS, 0.0, "a/0.dcm")
    save_slice(PIXELS, 3.0, "a/1.dcm", ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    save_slice(PIXELS, 0.0, "b/0.dcm")
    save_slice(PIXELS[:2], 3.0, "b/1.dcm")
    save_slice(PIXELS, 0.0, "c/0.dcm")
    save_slice(PIXELS, 3.0, "c/1.dcm", ImagePositionPatient=None)
    for folder, cause in {"a": "parallel", "b": "different size", "c": "no position"}.items():
        with pytest.raises(UnreadableError, match=rf"{folder}: .*{cause}"):
            read_image(folder, tmp_path)


def test_several_series_are_named_and_one_can_be_picked(tmp_path, save_slice):
    for uid, z in (("1.2.3", 0.0), ("1.2.3", 3.0), ("1.2.4", 0.0)):
        save_slice(PIXELS, z, f"s/{uid}_{z}.dcm", SeriesInstanceUID=uid, SeriesDescription=f"head {uid}")
    with pytest.raises(UnreadableError, match=r"2 series: 1\.2\.3 \(CT, head 1\.2\.3, 2 files\); 1\.2\.4"):
        read_image("s", tmp_path)
    assert read_image("s#1.2.3", tmp_path).shape == (5, 4, 2)
    with pytest.raises(UnreadableError, match="no series 9"):
        read_image("s#9", tmp_path)


def test_scouts_reports_and_other_files_are_passed_over(tmp_path, save_slice, series):
    folder = series([0.0, 3.0])
    (folder / "notes.txt").write_text("hello")
    scout, report = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "1.2.840.10008.5.1.4.1.1.88.11"
    save_slice(PIXELS, 50.0, "series/scout.dcm", SeriesInstanceUID="1.2.9", **scout)
    save_slice(PIXELS, 0.0, "series/report.dcm", SeriesInstanceUID="1.2.8", SOPClassUID=report)
    assert read_image("series", tmp_path).shape == (5, 4, 2)
    with pytest.raises(UnreadableError, match=r"report\.dcm: no image but a structured report"):
        read_image("series/report.dcm", tmp_path)


def test_one_damaged_file_of_a_series_is_named(tmp_path, series):
    folder = series([0.0, 3.0, 6.0])
    file = sorted(folder.iterdir())[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UnreadableError, match=rf"{file.name}: truncated"):
        read_image("series", tmp_path)
    file.write_bytes(b"")
    with pytest.raises(UnreadableError, match=rf"{file.name}: the file is empty"):
        read_image("series", tmp_path)


def test_a_single_file_is_a_picture_of_rows_and_columns(tmp_path, save_slice):
    image = read_image(save_slice(PIXELS, 9.0).name, tmp_path)
    np.testing.assert_array_equal(image.array[0], PIXELS)
    assert image.spacing == (2.0, 1.0)
    np.testing.assert_allclose(image.affine @ [3, 4, 0, 1], [-(5 + 4), -(7 + 6), 9, 1])


def test_values_by_slope_table_and_photometric_interpretation(tmp_path, save_slice):
    hounsfield = read_image(save_slice(PIXELS, RescaleSlope=2, RescaleIntercept=-1024).name, tmp_path)
    np.testing.assert_array_equal(hounsfield.array[0], PIXELS * 2.0 - 1024)
    bits = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    inverted = read_image(save_slice(PIXELS, Modality="CR", **bits).name, tmp_path)
    np.testing.assert_array_equal(inverted.array[0], 4095.0 - PIXELS)
    assert inverted.modality == "XR"
    quantity = read_image(save_slice(PIXELS, Modality="CT", **bits).name, tmp_path)
    np.testing.assert_array_equal(quantity.array[0], PIXELS)
    colour = np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8)
    np.testing.assert_array_equal(read_image(save_slice(colour).name, tmp_path).array, colour.transpose(2, 0, 1))


def test_padding_takes_the_smallest_other_value(tmp_path, save_slice):
    pixels = PIXELS.astype(np.int16) + 5
    pixels[0] = -2000
    path = save_slice(pixels)
    data = pydicom.dcmread(path)
    data.add_new("PixelPaddingValue", "US", 63536)  # -2000 by the wrong sign, as many scanners write it
    data.save_as(path, enforce_file_format=True)
    image = read_image(path.name, tmp_path)
    np.testing.assert_array_equal(image.array[0, 0], pixels[1:].min())
    np.testing.assert_array_equal(image.array[0, 1:], pixels[1:])


@pytest.mark.parametrize(
    ("elements", "cause"),
    [
        ({"Rows": 60000, "Columns": 60000}, "at most"),
        ({"Rows": 4000, "Columns": 4000}, "truncated"),
        ({"NumberOfFrames": 40}, "frames without positions"),
        ({"NumberOfFrames": 10**7}, "10000000 frames"),
        ({"PixelSpacing": [1e9, 1]}, "spacing"),
        ({"PixelData": None}, "no pixels"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "MOSAIC"]}, "mosaic"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}, "segmentation"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "PDF"),
        ({"RescaleSlope": 0}, "RescaleSlope"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "perpendicular"),
    ],
)
def test_what_can_not_be_an_image_says_why(tmp_path, save_slice, elements, cause):
    path = save_slice(PIXELS, **elements)
    with pytest.raises(UnreadableError, match=rf"{path.name}: .*{cause}"):
        read_image(path.name, tmp_path)


def test_a_deflated_bomb_is_not_inflated(tmp_path, save_slice, monkeypatch):
    from medray.data.readers import dicom_file

    path = save_slice(np.zeros((1000, 1000), np.uint16))
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(path, enforce_file_format=True)
    assert read_image(path.name, tmp_path).array.max() == 0
    monkeypatch.setattr(dicom_file, "_MAX_INFLATED", 10**6)
    with pytest.raises(UnreadableError, match="bomb"):
        read_image(path.name, tmp_path)


def test_masks_from_images_and_segmentations(tmp_path, save_slice, series):
    labels = np.zeros((4, 5), np.uint16)
    labels[1:3, 2:4] = 2
    assert read_mask(save_slice(labels, name="mask.dcm").name, tmp_path).array.tolist() == labels.tolist()
    pytest.importorskip("highdicom")
    from medray.data.writers.dicom_seg import Algorithm, write_segmentation

    patient = {"PatientID": "1", "PatientName": "A^B", "StudyInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
    folder = series([0.0, 3.0, 6.0, 9.0], **patient)
    image = read_image("series", tmp_path)
    truth = np.zeros(image.shape, np.uint8)
    truth[1:3, 1:3, 1], truth[0, 0, 2] = 1, 2  # two of four slices: the object leaves the others out
    write_segmentation(
        tmp_path / "seg.dcm", truth, image, classes=("", "a", "b"), algorithm=Algorithm(name="t", version="1", note="")
    )
    assert read_mask("seg.dcm", tmp_path).array.shape == (5, 4, 2)
    case = Case(id="x", images=(folder.name,), mask="seg.dcm")
    _, mask, valid = read_case(case, tmp_path)
    np.testing.assert_array_equal(mask.array, truth)
    assert valid is None


def test_geometry_and_values_are_as_dcm2niix_made_them(shared_data):
    series = read_image("dicom/dcm_qa_nih/In/20180918GE/mr_0004", shared_data)
    reference = read_image("dicom/dcm_qa_nih/Ref/DCM2NIIX_regression_test_4.nii", shared_data)
    np.testing.assert_array_equal(series.array, reference.array)
    np.testing.assert_allclose(series.affine, reference.affine, atol=1e-4)


def test_enhanced_and_single_frame_series_agree(shared_data):
    folder = "dicom/dcmqi/data/segmentations/23x38x3"
    single, multi = (read_image(f"{folder}/{kind}", shared_data) for kind in ("image", "multiframe"))
    np.testing.assert_array_equal(single.array, multi.array)
    np.testing.assert_allclose(single.affine, multi.affine)
    _, mask, _ = read_case(Case(id="x", images=(f"{folder}/image",), mask=f"{folder}/seg"), shared_data)
    assert mask.array.sum() == 322


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("MR_small_jp2klossless", "MR_small"),
        ("MR_small_jpeg_ls_lossless", "MR_small"),
        ("MR_small_RLE", "MR_small"),
        ("MR_small_bigendian", "MR_small"),
        ("MR_small_implicit", "MR_small"),
        ("SC_rgb_jpeg_gdcm", "SC_rgb_rle"),
        ("SC_rgb_gdcm_KY", "SC_rgb_rle"),
    ],
)
def test_lossless_transfer_syntaxes_agree(shared_data, name, twin):
    images = [read_image(f"dicom/pydicom-test_files/test_files/{one}.dcm", shared_data) for one in (name, twin)]
    np.testing.assert_array_equal(images[0].array, images[1].array)


@pytest.mark.parametrize("name", ["SC_rgb_jpeg_dcmtk", "SC_ybr_full_422_uncompressed", "SC_rgb_dcmtk_+eb+cy+s2"])
def test_ybr_becomes_rgb(shared_data, name):
    folder = "dicom/pydicom-test_files/test_files"
    lossy, exact = (read_image(f"{folder}/{one}.dcm", shared_data) for one in (name, "SC_rgb_rle"))
    assert np.abs(lossy.array - exact.array).mean() < 6
