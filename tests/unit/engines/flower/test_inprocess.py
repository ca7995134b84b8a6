"""Messages over Flower's own Message API, within this process."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np
import pytest

from medray.engines.flower.inprocess import in_process
from medray.engines.flower.parcel import Kind, Parcel, wire_size
from medray.errors import FederationError


@dataclass(frozen=True)
class Site:
    number: int
    names: tuple[str, ...] = ("north", "south", "west")

    def __call__(self, kind: Kind, parcel: Parcel) -> Parcel:
        if kind == "query":
            return Parcel(text={"name": self.names[self.number]})
        if parcel.text.get("fail") == self.number:
            raise ValueError("no such file")
        if parcel.text.get("sleep") == self.number:
            time.sleep(0.25)
        twice = {name: (value * np.asarray(2, value.dtype)) for name, value in parcel.arrays.items()}
        return Parcel(text={"kind": kind, "got": parcel.text.get("who")}, arrays=twice)


def arrays() -> dict[str, np.ndarray]:
    return {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(1.5, np.float32),
        "codes": np.arange(4, dtype=np.int8),
    }


def test_parcels_arrive_as_they_were_sent() -> None:
    hub = in_process(Site, 3)
    assert hub.sites() == ("north", "south", "west")
    found = hub.ask("train", {name: Parcel(text={"who": name}, arrays=arrays()) for name in ("north", "west")}, 10)
    assert found.keys() == {"north", "west"} and found["west"].text == {"kind": "train", "got": "west"}
    for name, value in arrays().items():
        came = found["north"].arrays[name]
        assert came.dtype == value.dtype and came.shape == value.shape and np.array_equal(came, 2 * value)
    assert found["north"].size == wire_size(found["north"]) > sum(value.nbytes for value in arrays().values())


def test_a_failing_site_says_why_and_a_slow_one_is_late() -> None:
    hub = in_process(Site, 3)
    names = hub.sites()
    found = hub.ask("train", dict.fromkeys(names, Parcel(text={"fail": 0, "sleep": 1})), 0.2)
    assert found.keys() == {"north", "west"}
    assert found["north"].error == "ValueError: no such file" and found["west"].error is None


def test_two_sites_of_one_name_are_refused() -> None:
    with pytest.raises(FederationError, match="'twin'"):
        in_process(lambda number: Site(number, ("twin", "twin")), 2).sites()


def test_flower_is_told_to_report_nothing() -> None:
    from flwr.supercore import telemetry

    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0" and telemetry.FLWR_TELEMETRY_ENABLED == "0"
