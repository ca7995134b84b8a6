"""Small sound files of each format, made here, so that nothing depends on real data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest


@pytest.fixture()
def volume() -> np.ndarray:
    """(4, 5, 6) int16, every voxel another value."""
    return np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)


@pytest.fixture()
def save_nifti(tmp_path: Path) -> Callable[..., Path]:
    """Write an array in given axis codes (such as "LPS") with spacing (1, 2, 3) mm along the file's axes."""

    def save(array: np.ndarray, codes: str = "RAS", name: str = "scan.nii.gz") -> Path:
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for column, (code, step) in enumerate(zip(codes, (1.0, 2.0, 3.0), strict=True)):
            row = next(i for i, pair in enumerate(("LR", "PA", "IS")) if code in pair)
            affine[row, column] = step if code in "RAS" else -step
        affine[:3, 3] = (10, 20, 30)
        nib.save(nib.Nifti1Image(array, affine), tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture()
def save_slice(tmp_path: Path) -> Callable[..., Path]:
    """Write one DICOM CT slice of (rows, columns) uint16; keywords become elements, None removes one."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    series = generate_uid()

    def save(pixels: np.ndarray, z: float = 0.0, name: str = "slice.dcm", **elements: Any) -> Path:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.Modality, data.InstanceNumber = series, "CT", 1
        data.ImagePositionPatient, data.ImageOrientationPatient = [5.0, 7.0, z], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [2.0, 1.0], 3.0
        data.Rows, data.Columns = pixels.shape[:2]
        data.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
        data.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
        if pixels.ndim == 3:
            data.PlanarConfiguration = 0
        bits = 8 * pixels.dtype.itemsize
        data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
        data.PixelRepresentation = int(pixels.dtype.kind == "i")
        data.PixelData = pixels.tobytes()
        for keyword, value in elements.items():
            if value is None:
                delattr(data, keyword)
            else:
                setattr(data, keyword, value)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(path, enforce_file_format=True)
        return path

    return save
