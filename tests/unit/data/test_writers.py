"""Answers lie right on their input, whatever its orientation."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from PIL import Image as Pillow

from medray.data.image import Image
from medray.data.readers import read_image, read_mask
from medray.data.writers import nifti, picture
from medray.data.writers.dicom_seg import Algorithm, write_segmentation
from medray.data.writers.dicom_sr import write_report
from medray.errors import DataError

NOTE = "Research use only. Not a medical device."
ALGORITHM = Algorithm(name="tiny", version="1", note=NOTE)
CODES = ["".join(c) for o in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*o)]


def oblique(codes, spacing=(0.8, 1.1, 2.5), degrees=12.0):
    """An affine of the given axis codes, turned about an odd axis."""
    axes = np.zeros((3, 3))
    for column, code in enumerate(codes):
        axes["RLAPSI".index(code) // 2, column] = 1 if code in "RAS" else -1
    k = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    angle = np.deg2rad(degrees)
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    affine = np.eye(4)
    affine[:3, :3] = turn @ axes * np.array(spacing)
    affine[:3, 3] = (-30.0, 12.0, 7.0)
    return affine


def marked(shape=(7, 9, 5)):
    """Values without any symmetry."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize("codes", CODES)
def test_nifti_answers_in_every_orientation(tmp_path, codes):
    values = marked()
    nib.save(nib.Nifti1Image(values, oblique(codes)), tmp_path / "in.nii.gz")
    image = read_image("in.nii.gz", tmp_path)
    labels = (image.array[0] % 5).astype(np.uint8)
    nifti.write_labels(tmp_path / "out.nii.gz", labels, image, note=NOTE)
    back, original = nib.load(tmp_path / "out.nii.gz"), nib.load(tmp_path / "in.nii.gz")
    assert (np.asarray(back.dataobj) == values % 5).all(), "voxel on voxel, in the file's own axes"
    np.testing.assert_allclose(back.affine, original.affine, atol=1e-4)
    np.testing.assert_allclose(back.get_qform(), original.affine, atol=1e-4)
    assert back.header.get_data_dtype() == np.uint8
    assert bytes(back.header["descrip"]).rstrip(b"\0").decode() == NOTE
    assert (read_mask("out.nii.gz", tmp_path).array == labels).all()


def test_a_sheared_grid_has_no_qform(tmp_path):
    affine = oblique("RAS")
    affine[0, 2] += 0.7
    source = nib.Nifti1Image(marked(), affine)
    source.set_sform(affine, 1)
    nib.save(source, tmp_path / "in.nii")
    image = read_image("in.nii", tmp_path)
    nifti.write_labels(tmp_path / "out.nii", (image.array[0] % 3).astype(np.uint8), image)
    back = nib.load(tmp_path / "out.nii")
    np.testing.assert_allclose(back.affine, affine, atol=1e-4)
    assert int(back.header["qform_code"]) == 0


@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 1)])
def test_a_flat_nifti(tmp_path, shape):
    values = marked(shape)
    nib.save(nib.Nifti1Image(values, oblique("LPS", degrees=0)), tmp_path / "in.nii.gz")
    image = read_image("in.nii.gz", tmp_path)
    assert image.ndim == 2
    nifti.write_labels(tmp_path / "out.nii.gz", (image.array[0] % 4).astype(np.uint8), image)
    back = nib.load(tmp_path / "out.nii.gz")
    assert (np.asarray(back.dataobj).reshape(shape) == values % 4).all()
    np.testing.assert_allclose(back.affine, nib.load(tmp_path / "in.nii.gz").affine, atol=1e-4)


def test_an_image_without_file_keeps_its_own_grid(tmp_path):
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    image = Image(array=marked()[None], spacing=(2.0, 2.0, 3.0), affine=affine)
    nifti.write_labels(tmp_path / "out.nii.gz", np.ones((7, 9, 5), np.uint8), image)
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii.gz").affine, affine)


def test_many_labels_take_more_bits_and_shapes_must_agree(tmp_path):
    image = Image(array=marked()[None], spacing=None)
    nifti.write_labels(tmp_path / "out.nii", marked().astype(np.int32), image)
    assert (np.asarray(nib.load(tmp_path / "out.nii").dataobj) == marked()).all()
    with pytest.raises(DataError, match="must be alike"):
        nifti.write_labels(tmp_path / "no.nii", np.zeros((2, 2, 2), np.uint8), image)
    assert not (tmp_path / "no.nii").exists()


def test_picture_masks_read_back_as_labels(tmp_path):
    labels = (marked((6, 8)) % 4).astype(np.uint8)
    picture.write_labels(tmp_path / "mask.png", labels, note=NOTE)
    assert (read_mask("mask.png", tmp_path).array == labels).all()
    assert Pillow.open(tmp_path / "mask.png").text["Description"] == NOTE
    with pytest.raises(DataError, match="NIfTI"):
        picture.write_labels(tmp_path / "no.png", np.full((4, 4), 300))


def test_overlays_colour_the_labels_only(tmp_path):
    image = Image(array=np.tile(marked((6, 8)), (1, 1, 1)), spacing=None)
    labels = np.zeros((6, 8), np.uint8)
    labels[1:5, 2:6] = 1
    shown = picture.overlay(image.array, labels)
    grey = (shown[..., 0] == shown[..., 1]) & (shown[..., 1] == shown[..., 2])
    assert grey[labels == 0].all() and not grey[labels == 1].any()
    assert tuple(shown[1, 2]) == picture.colour(1), "outlines are drawn in full colour"
    picture.write_overlay(tmp_path / "o.png", image, labels)
    assert Pillow.open(tmp_path / "o.png").size == (8, 6)


def write_series(folder, orientation, *, slices=5, rows=6, columns=7, order=None, spacing=(0.9, 0.7), step=2.0):
    """A little CT series; each pixel's value tells its slice, row and column."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir()
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    along = np.array(orientation, dtype=float)
    normal = np.cross(along[:3], along[3:])
    for number, k in enumerate(order or range(slices)):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset = pydicom.Dataset()
        dataset.file_meta = meta
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, frame
        dataset.Modality, dataset.PatientID, dataset.InstanceNumber = "CT", "p", number + 1
        dataset.SpecificCharacterSet, dataset.PatientName = "ISO_IR 100", "Müller^Jörg"
        dataset.ImageOrientationPatient = [float(v) for v in along]
        dataset.ImagePositionPatient = [float(v) for v in np.array([-50.0, 20.0, 3.0]) + normal * step * k]
        dataset.PixelSpacing, dataset.SliceThickness = list(spacing), step
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 1
        dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        pixels = k * 100 + np.arange(rows)[:, None] * 10 + np.arange(columns)[None]
        dataset.PixelData = pixels.astype(np.uint16).tobytes()
        dataset.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)


def turned(degrees):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return (c, s, 0.0, -s * c, c * c, s)


ORIENTATIONS = {
    "axial": (1, 0, 0, 0, 1, 0),
    "feet first": (-1, 0, 0, 0, 1, 0),
    "coronal": (1, 0, 0, 0, 0, -1),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "oblique": turned(17.0),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_dicom_seg_lies_on_its_series(tmp_path, name):
    import highdicom as hd
    import pydicom

    write_series(tmp_path / "series", ORIENTATIONS[name], order=[3, 0, 4, 2, 1])
    image = read_image("series", tmp_path)
    labels = np.where(image.array[0] % 10 == 3, 2, image.array[0] // 100 == 2).astype(np.uint8)
    classes = ("background", "slice two", "Säule drei")
    write_segmentation(tmp_path / "seg.dcm", labels, image, classes=classes, algorithm=ALGORITHM)
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    files = sorted((tmp_path / "series").iterdir())
    sources = [pydicom.dcmread(file) for file in files]
    back = seg.get_pixels_by_source_instance([source.SOPInstanceUID for source in sources], combine_segments=True)
    for frame, source in zip(back, sources, strict=True):
        stored = source.pixel_array
        assert (frame == np.where(stored % 10 == 3, 2, stored // 100 == 2)).all()
    # and by its own geometry alone, as a viewer would overlay it
    volume = seg.get_volume(combine_segments=True)
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    place = np.linalg.inv(image.affine) @ to_ras
    for index in np.argwhere(volume.array >= 0)[::7]:
        voxel = np.rint(place @ [*index, 1])[:3].astype(int)
        assert labels[tuple(voxel)] == volume.array[tuple(index)]
    assert seg.StudyInstanceUID == sources[0].StudyInstanceUID
    assert seg.FrameOfReferenceUID == sources[0].FrameOfReferenceUID
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == sources[0].SeriesInstanceUID
    assert seg.SeriesInstanceUID != sources[0].SeriesInstanceUID
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["slice two", "Säule drei"]
    assert str(seg.PatientName) == "Müller^Jörg"
    assert seg.ContentDescription == NOTE and NOTE in seg.SeriesDescription
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("tiny", "1")


def test_an_empty_answer_is_an_object_too(tmp_path):
    import highdicom as hd

    write_series(tmp_path / "series", ORIENTATIONS["axial"])
    image = read_image("series", tmp_path)
    labels = np.zeros(image.shape, np.uint8)
    write_segmentation(tmp_path / "seg.dcm", labels, image, classes=("b", "lesion"), algorithm=ALGORITHM)
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["lesion"]
    assert not seg.pixel_array.any()


def test_labels_of_another_place_are_refused(tmp_path):
    write_series(tmp_path / "series", ORIENTATIONS["axial"])
    image = read_image("series", tmp_path)
    affine = image.affine.copy()
    affine[0, 3] += 40
    moved = Image(array=image.array, spacing=image.spacing, affine=affine, original=image.original, source="moved")
    with pytest.raises(DataError, match="voxels outside"):
        write_segmentation(
            tmp_path / "seg.dcm", np.ones(image.shape, np.uint8), moved, classes=("b", "l"), algorithm=ALGORITHM
        )
    assert not (tmp_path / "seg.dcm").exists()
    with pytest.raises(DataError, match="not known which DICOM files"):
        write_segmentation(
            tmp_path / "seg.dcm",
            np.ones(image.shape, np.uint8),
            Image(array=image.array, spacing=image.spacing, affine=affine),
            classes=("b", "l"),
            algorithm=ALGORITHM,
        )


@pytest.mark.parametrize(
    "place",
    [
        "dcmqi/data/segmentations/ct-3slice",
        "dcmqi/data/segmentations/24x38x3/multiframe/mf.dcm",
        "pydicom-test_files/test_files/dicomdirtests/98892001/CT5N",
        "dcm_qa_nih/In/20180918GE/mr_0004",
        "highdicom/data/test_files/dx_image.dcm",
    ],
)
def test_real_series(tmp_path, shared_data, place):
    import highdicom as hd

    image = read_image(place, shared_data / "dicom")
    pixels = image.array[0]
    labels = (pixels > np.percentile(pixels, 80)).astype(np.uint8)
    write_segmentation(tmp_path / "seg.dcm", labels, image, classes=("b", "bright"), algorithm=ALGORITHM)
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    if image.ndim == 2:
        assert (seg.pixel_array.reshape(labels.shape) == labels).all()
        return
    volume = seg.get_volume(combine_segments=True)
    place_of = np.linalg.inv(image.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    index = np.argwhere(volume.array >= 0)
    voxel = place_of @ np.c_[index, np.ones(len(index))].T
    assert np.abs(voxel[:3] - np.rint(voxel[:3])).max() < 0.1
    x, y, z = np.rint(voxel[:3]).astype(int)
    assert (labels[x, y, z] == volume.array.ravel()).all()
    assert int(volume.array.sum()) == int(labels.sum()), "no labelled voxel is lost"


def figures_of(path):
    import highdicom as hd

    groups = hd.sr.srread(path).content.get_image_measurement_groups()
    return {
        group.tracking_identifier: [
            *((m.name.meaning, m.value, m.unit.value) for m in group.get_measurements()),
            *(evaluation.value.meaning for evaluation in group.get_qualitative_evaluations()),
        ]
        for group in groups
    }


def test_dicom_sr_tells_the_figures_and_refers_to_its_series(tmp_path):
    import pydicom

    write_series(tmp_path / "series", (1, 0, 0, 0, 1, 0))
    image = read_image("series", tmp_path)
    path = tmp_path / "sr.dcm"
    likely = {"gesund ü": 0.25, "krank": 0.75}
    write_report(path, image, probabilities=likely, decided=("krank",), uncertainty=0.8, algorithm=ALGORITHM)
    found = figures_of(path)
    assert found["gesund ü"] == [("Probability", 0.25, "1"), "Absent"]
    assert found["krank"] == [("Probability", 0.75, "1"), "Present"]
    assert found["answer"] == [("Uncertainty (normalised entropy)", 0.8, "1")]
    document = pydicom.dcmread(path)
    assert document.VerificationFlag == "UNVERIFIED" and str(document.PatientName) == "Müller^Jörg"
    sources = {pydicom.dcmread(file).SOPInstanceUID for file in (tmp_path / "series").iterdir()}
    series = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert {one.ReferencedSOPInstanceUID for one in series.ReferencedSOPSequence} == sources
    texts = [element.value for element in document.iterall() if element.keyword == "TextValue"]
    assert ALGORITHM.note in texts  # the intended use travels with it
    codes = {e.value for e in document.iterall() if e.keyword == "CodeValue" and str(e.value).startswith("C")}
    write_report(path, image, probabilities={"krank": 0.1, "a\\b": 0.9}, algorithm=ALGORITHM)
    again = {e.value for e in pydicom.dcmread(path).iterall() if e.keyword == "CodeValue"}
    assert len(codes & again) == 1  # the same word has the same code in every report, another one another

    write_report(path, image, volumes_ml={"organ" * 20: 21.3}, algorithm=ALGORITHM)
    assert figures_of(path) == {("organ" * 20)[:64]: [("Volume", 21.3, "ml")]}
    with pytest.raises(DataError, match="needs a figure"):
        write_report(path, image, algorithm=ALGORITHM)
    with pytest.raises(DataError, match="not known which DICOM files"):
        write_report(
            path, Image(array=np.zeros((1, 4, 4), np.float32), spacing=None), volumes_ml={"a": 1.0}, algorithm=ALGORITHM
        )
