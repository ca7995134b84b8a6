"""What a simulation's server does before its first round."""

from __future__ import annotations

from typing import Any

import pytest

from medray.errors import FederationError
from medray.workflows.federation import simulate


class SlowHub:
    """Sites come up one by one, as they do on Ray."""

    def __init__(self, least: int = 0) -> None:
        self.there = least

    def sites(self) -> tuple[str, ...]:
        self.there += 1
        return ("a", "b", "c")[: self.there - 1]


def test_the_server_waits_for_sites_that_come_up_after_it() -> None:
    hub: Any = SlowHub()
    simulate._await(hub, ("a", "b", "c"))
    assert hub.there == 4


def test_sites_that_never_come_up_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "PATIENCE", 0.15)
    hub: Any = SlowHub()
    with pytest.raises(FederationError, match="sites d, e did not come up"):
        simulate._await(hub, ("a", "d", "e"))
