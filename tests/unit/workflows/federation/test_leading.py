"""What a run over a network refuses to begin, whom it believes, and what its log may hold."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from medray.errors import FederationError
from medray.workflows.federation import leading
from medray.workflows.federation.leading import lead, run_federation


def test_the_server_is_told_which_node_is_which_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(leading, "start_run", lambda federation, app, config: given.update(config) or "1")
    run_federation(tmp_path / "f", None, ["model.name=linear"], out=tmp_path / "run")
    register = Path(given["nodes"])
    assert register == tmp_path / "f" / "server" / "state" / "nodes.json"
    app = tomllib.loads((leading.APP / "pyproject.toml").read_text(encoding="utf-8"))
    assert app["tool"]["flwr"]["app"]["config"].keys() == given.keys(), "Flower takes no other keys"
    asked: list[Mapping[int, str]] = []

    def hub_of(names: Mapping[int, str]) -> Any:
        asked.append(names)
        raise KeyError("far enough")

    with pytest.raises(FederationError, match=r"nodes\.json.*medray federate server"):
        lead(hub_of, given)
    register.parent.mkdir(parents=True)
    register.write_text(json.dumps({"kiel": 7, "jena": 8}), encoding="utf-8")
    with pytest.raises(KeyError):
        lead(hub_of, given)
    assert asked == [{7: "kiel", 8: "jena"}]


def test_what_a_site_wrote_is_one_line_of_the_log(tmp_path: Path) -> None:
    said = leading._Journal(tmp_path / "run.log")
    said("jena failed: disk full\n2026-01-01T00:00:00+00:00 round 9 of 9\x1b[2J" + "x" * 10_000)
    said("done")
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").split("\n")
    assert len(lines) == 3 and "disk full 2026" in lines[0] and "\x1b" not in lines[0] and len(lines[0]) < 4100
