"""Weights that stay at the sites, over a server that has no data: what each side has in the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from medray.config.federation_files import SiteConfig
from medray.data.checks import check
from medray.data.fingerprint import measure
from medray.data.layouts import build_manifest
from medray.data.manifest import Manifest
from medray.engines.flower.inprocess import in_process
from medray.engines.flower.parcel import Kind, Parcel
from medray.errors import FederationError
from medray.privacy.audit import Audit
from medray.workflows.federation import leading
from medray.workflows.federation.attending import Guard
from medray.workflows.federation.leading import _lead, run_federation
from medray.workflows.federation.site import SiteFolder
from medray.workflows.prediction import predict_files

SITES = ("jena", "kiel")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Manifest]]:
    found = {}
    for number, name in enumerate(SITES):
        rng = np.random.default_rng(number)
        lines = ["patient,age,marker,label"]
        for row in range(60):
            age, marker = rng.normal(), rng.normal()
            lines.append(f"p{row},{age:.3f},{marker:.3f},{int(age + 2 * marker > 0)}")
        path = tmp_path_factory.mktemp(name) / "cases.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        found[name] = (path, check(build_manifest(f"{path}?columns=age,marker")))
    return found


class Network:
    """Two guarded sites in this process; keeps the names and numbers of all that leaves them."""

    def __init__(self, tables: dict[str, tuple[Path, Manifest]], folder: Path, **privacy: Any) -> None:
        self.left: list[Parcel] = []
        self.homes: dict[str, Path] = {}
        self.guards: list[Guard] = []
        self.away: set[tuple[str, str]] = set()
        for name in SITES:
            tree = {"federation": "f", "name": name, "server": "localhost:1", "data": "-", "fewest": 5}
            rules = SiteConfig.model_validate({**tree, "privacy": {"required": False, **privacy}}).at(folder / name)
            place = SiteFolder(name=name, directory=str(rules.work / "site"), cache=str(rules.work / "cache"))
            tables[name][1].save(rules.work / "site" / "manifest.json")
            self.homes[name] = rules.work
            self.guards.append(Guard(rules, tables[name][1], place))

    def hub(self) -> Any:
        def opened(number: int) -> Callable[[Kind, Parcel], Parcel]:
            def answer(kind: Kind, parcel: Parcel) -> Parcel:
                if (SITES[number], kind) in self.away:
                    raise FederationError("gone")
                found = self.guards[number](kind, parcel)
                self.left.append(found)
                return found

            return answer

        return in_process(opened, len(SITES))


def asked(directory: Path, tables: dict[str, tuple[Path, Manifest]], **federation: Any) -> Path:
    directory.mkdir()
    explicit = {
        "device": "cpu",
        "model": {"name": "mlp", "feature_size": 8},
        "federation": {"rounds": 2, "quorum": 2, "local": ["head.*"], **federation},
    }
    (directory / "asked.yaml").write_text(yaml.safe_dump(explicit), encoding="utf-8")
    measure(tables["jena"][1]).save(directory / "fingerprint.json")
    return directory


def test_each_site_keeps_a_model_of_its_own_and_the_server_what_was_shared(
    tables: dict[str, tuple[Path, Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "POLL_SECONDS", 0.0)
    network, run = Network(tables, tmp_path), asked(tmp_path / "run", tables)
    network.away = {("kiel", "evaluate")}
    _lead(network.hub(), run, time.monotonic(), tmp_path / "none")
    shared = load_file(str(run / "shared.safetensors"))
    assert shared and not any(name.startswith("head.") for name in shared)
    assert not any("head." in name for parcel in network.left for name in parcel.arrays), "nothing of them left"
    assert not (run / "bundle").exists(), "the server's network would have them untrained"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "stay at the sites and were seen by nobody else" in page and "head." in page
    assert json.loads((run / "outcome.json").read_text())["bundles"] == []
    # A site that was away at the end is asked once more when the run goes on; the other has its model already.
    assert "kiel didn't answer to the last weights" in (run / "run.log").read_text(encoding="utf-8")
    bundles = {name: list((home / "models").glob("*/bundle.json")) for name, home in network.homes.items()}
    assert [len(found) for found in bundles.values()] == [1, 0]
    network.away, before = set(), len(network.left)
    _lead(network.hub(), run, time.monotonic(), tmp_path / "none")
    assert sum(bool(parcel.text.get("metrics")) for parcel in network.left[before:]) == 1
    own = {}
    for name, home in network.homes.items():
        [manifest] = (home / "models").glob("*/bundle.json")
        answers = predict_files(manifest.parent, [tables[name][0]], tmp_path / f"answers-{name}", "torch")
        assert not answers.failed and len(answers.answers) == 60
        files = [load_file(str(path)) for path in manifest.parent.glob("**/*.safetensors")]
        [own[name]] = [found for found in files if shared.keys() <= found.keys()]
        assert all(np.allclose(own[name][key], value) for key, value in shared.items()), "the last shared weights"
        noted = [line.about["reason"] for line in Audit(home.parent / "audit.jsonl").read() if line.event == "noted"]
        assert len(noted) == 1 and str(manifest.parent) in noted[0] and "auc" in noted[0]
    heads = [key for key in own["jena"] if key.startswith("head.")]
    assert heads and all(not np.allclose(own["jena"][key], own["kiel"][key]) for key in heads)
    assert {*own["jena"]} - {*shared} >= set(heads)


def test_what_can_not_be_shared_as_asked_is_refused_before_any_site_is_asked(
    tables: dict[str, tuple[Path, Manifest]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any) -> str:
        raise AssertionError("it was started")

    monkeypatch.setattr(leading, "start_run", started)
    measure(tables["jena"][1]).save(tmp_path / "fingerprint.json")
    for overrides, reason in (
        (["model.name=linear", "federation.strategy=fedbn"], "this network has none"),
        (["model.name=linear", "federation.local=[tail.*]"], "fits no weight"),
        (["model.name=linear", "federation.local=['*']"], "nothing is left to share"),
    ):
        with pytest.raises(FederationError, match=reason):
            run_federation(
                tmp_path / "f", None, overrides, out=tmp_path / "run", fingerprint=tmp_path / "fingerprint.json"
            )
        assert not (tmp_path / "run" / "asked.yaml").exists(), "nothing is in the way of another attempt"
