"""Header: what a file says about its image before any pixel is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from medray.data.image import Modality


@dataclass(frozen=True, kw_only=True)
class Header:
    """What :func:`medray.data.readers.probe` returns.

    Attributes:
        shape: spatial shape of the image as it would be read: (H, W) or (X, Y, Z) in RAS.
        channels: number of channels.
        spacing: mm per spatial axis; None where the file has none.
        modality: as far as the file says.
    """

    shape: tuple[int, ...]
    channels: int
    spacing: tuple[float, ...] | None
    modality: Modality = "other"
