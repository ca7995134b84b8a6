"""Parcels to Flower's records and back. Nothing is unpickled: arrays travel in numpy's plain format, text as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from medray.engines.flower.parcel import Parcel, wire_size
from medray.errors import FederationError

__all__ = ["pack", "unpack"]

_TEXT, _ARRAYS = "medray", "arrays"


def pack(parcel: Parcel) -> RecordDict:
    """The records that carry a parcel."""
    text = json.dumps({"text": dict(parcel.text), "error": parcel.error}, allow_nan=True)
    arrays = {name: Array(np.asarray(value, order="C")) for name, value in parcel.arrays.items()}
    return RecordDict({_TEXT: ConfigRecord({"json": text}), _ARRAYS: ArrayRecord(arrays)})


def unpack(message: Message) -> Parcel:
    """The parcel that a message carries; where the other side failed, one with the error.

    Raises:
        FederationError: the records are none of ours, whatever they are: a stranger wrote them.
    """
    if message.has_error():
        reason = message.error.reason or f"code {message.error.code}"
        return Parcel(error=reason.strip()[-2000:])
    try:
        text = str(message.content[_TEXT]["json"])  # type: ignore[index]
        document = json.loads(text)
        record = message.content[_ARRAYS]
        assert isinstance(record, ArrayRecord)
        arrays = {name: array.numpy() for name, array in record.items()}
        # numpy reads archives, too, and opens them late.
        if not all(isinstance(value, np.ndarray) for value in arrays.values()):
            raise TypeError("what should be an array is none")
        error = document["error"]
        found = Parcel(text=dict(document["text"]), arrays=arrays, error=None if error is None else str(error)[:2000])
        return replace(found, size=wire_size(found))
    except Exception as error:  # headers without end, archives, JSON a thousand levels deep
        raise FederationError(
            f"a message that is none of medray's ({type(error).__name__}: {str(error)[:200]}). Do both sides run the "
            "same version?"
        ) from None
