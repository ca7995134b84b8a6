"""Phantoms as files, for whoever wants to see what a data set on disk looks like."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medray.data.manifest import Case, Manifest
from medray.data.phantoms.catalogue import SCHEME, phantom_manifest, read_phantom
from medray.errors import DataError


def write_phantom(
    name: str,
    directory: Path,
    *,
    cases: int | None = None,
    seed: int = 0,
    size: tuple[int, ...] | int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write a phantom set as files: NIfTI (3-D) or PNG (2-D) images and masks, ``classes.json`` and ``cases.csv``.

    Returns:
        The table, which any command takes as ``data=``.

    Raises:
        DataError: an unknown name or size, or ``directory`` can't be written.
    """
    query = f"?seed={seed}"
    if cases is not None:
        query += f"&cases={cases}"
    if size is not None:
        query += "&size=" + (str(size) if isinstance(size, int) else "x".join(map(str, size)))
    manifest = phantom_manifest(f"{SCHEME}{name}{query}")
    table = directory / "cases.csv"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = json.dumps(list(manifest.classes), ensure_ascii=False)
        (directory / "classes.json").write_text(names + "\n", encoding="utf-8")
        rows = [_write_case(manifest, case, directory) for case in _counted(manifest.cases, progress)]
        with table.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise DataError(f"{directory}: {error.strerror or error}. Choose a directory that can be written") from None
    return table


def _counted(cases: tuple[Case, ...], progress: Callable[[int, int, str], None] | None) -> Any:
    for done, case in enumerate(cases, 1):
        yield case
        if progress is not None:
            progress(done, len(cases), case.id)


def _write_case(manifest: Manifest, case: Case, directory: Path) -> dict[str, Any]:
    image, mask, _ = read_phantom(case.images[0])
    suffix = ".nii.gz" if manifest.ndim == 3 else ".png"
    row: dict[str, Any] = {"image": f"images/{case.id}{suffix}"}
    _write_array(directory / row["image"], image.array, image.affine)
    if mask is not None:
        row["mask"] = f"masks/{case.id}{suffix}"
        _write_array(directory / row["mask"], mask.array[None], mask.affine)
    if case.valid is not None:
        valid = read_phantom(case.valid)[1]
        assert valid is not None
        row["valid"] = f"valid/{case.id}{suffix}"
        _write_array(directory / row["valid"], valid.array[None], valid.affine)
    if isinstance(case.label, int):
        row["label"] = manifest.classes[case.label]
    elif case.label is not None:
        row |= {f"label_{name}": flag for name, flag in zip(manifest.classes, case.label, strict=True)}
    return {**row, "patient": case.patient, "site": case.site, **case.columns}


def _write_array(path: Path, array: Any, affine: Any) -> None:
    """(C, *spatial) whole numbers to NIfTI (int16/uint8), 16-bit grey PNG or 8-bit PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if affine is not None:
        import nibabel

        kind = np.uint8 if array.dtype == np.uint8 else np.int16
        nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array[0]).astype(kind), affine), path)
        return
    from PIL import Image as Picture

    if array.shape[0] == 3:
        pixels = np.moveaxis(array, 0, -1).astype(np.uint8)
    else:
        pixels = array[0].astype(np.uint16 if array.max() > 255 else np.uint8)
    Picture.fromarray(pixels).save(path)
