"""An image in memory.

Shape legend: C channels; spatial axes are (H, W) = (rows, columns) in 2-D and (X, Y, Z) in 3-D, where increasing
indices go to the patient's Right, Anterior, Superior (RAS+), whatever the file said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Modality = Literal["CT", "MR", "XR", "US", "fundus", "dermoscopy", "microscopy", "table", "other"]


@dataclass(frozen=True, kw_only=True)
class Image:
    """Pixels and where they lie.

    Attributes:
        array: (C, *spatial) float32, in the file's own units (HU for CT after the modality LUT).
        spacing: mm per spatial axis; None where the file has none (a photograph).
        affine: (4, 4), voxel index of ``array`` to RAS millimetres; None in 2-D files without geometry.
        modality: as far as the file says.
        source: the path or reference that it was read from.
        original: what a writer needs to give an answer in the input's own geometry (original affine, shape,
            orientation, DICOM series files); empty where there is nothing to remember.
    """

    array: npt.NDArray[np.float32]
    spacing: tuple[float, ...] | None
    affine: npt.NDArray[np.float64] | None = None
    modality: Modality = "other"
    source: str = ""
    original: dict[str, Any] = field(default_factory=dict)

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return self.array.ndim - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape."""
        return tuple(int(n) for n in self.array.shape[1:])


@dataclass(frozen=True, kw_only=True)
class Mask:
    """A label map: (*spatial) uint8 or int32 with the geometry of :class:`Image`."""

    array: npt.NDArray[np.integer[Any]]
    spacing: tuple[float, ...] | None
    affine: npt.NDArray[np.float64] | None = None
    source: str = ""
