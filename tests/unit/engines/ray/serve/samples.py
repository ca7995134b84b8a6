"""Small bundles and files to send, made here."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image as Pillow

from medray.bundle.spec import InferenceSpec
from medray.bundle.write import write_bundle
from medray.config.schema import ModelConfig, PreprocessConfig
from medray.models.catalogue import build_model


def write_small(
    directory: Path, kind: str = "classification", *, ndim: int = 2, seed: int = 0, spacing: Any = None, **fields: Any
) -> Path:
    """A bundle of a small network of the catalogue, whose weights ``seed`` decides; ``spacing``: resampled to, mm."""
    torch.manual_seed(seed)
    segments = kind == "segmentation"
    size, patch = (None, (16,) * ndim) if segments else ((16,) * ndim, None)
    config = ModelConfig(name="unet" if segments else "small_cnn", feature_size=4, depth=2)
    classes = ["background", "organ"] if segments else ["normal", "ill"]
    model = build_model(config, kind=kind, ndim=ndim, in_channels=1, num_outputs=2, patch_size=patch or size)
    given: dict[str, Any] = {"modality": "MR" if ndim == 3 else "XR", "name": f"{kind}-{ndim}d"} | fields
    write_bundle(
        directory,
        kind=kind,
        ndim=ndim,
        channels=1,
        classes=classes,
        preprocess=PreprocessConfig(size=size, spacing=spacing),
        inference=InferenceSpec(patch_size=patch, divisor=4),
        models=[model],
        configs=[config],
        onnx=False,
        **given,
    )
    return directory


def png(shape: tuple[int, ...] = (20, 24), seed: int = 0) -> bytes:
    """A grey picture of noise."""
    stream = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Pillow.fromarray(values).save(stream, format="PNG")
    return stream.getvalue()


def nii(shape: tuple[int, ...] = (20, 18, 17), seed: int = 0, affine: Any = None) -> nib.Nifti1Image:
    """A volume of noise."""
    values = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
    return nib.Nifti1Image(values, np.diag([2.0, 1.0, 3.0, 1.0]) if affine is None else affine)


def npy(array: Any) -> bytes:
    """An array as .npy."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, *, zip64: bool = False) -> bytes:
    """A zip of these files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, content in members.items():
            with archive.open(name, "w", force_zip64=zip64) as file:
                file.write(content)
    return stream.getvalue()


def nifti_bytes(image: nib.Nifti1Image) -> bytes:
    """As .nii.gz."""
    import gzip

    return gzip.compress(image.to_bytes(), 1)
