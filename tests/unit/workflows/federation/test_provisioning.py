from __future__ import annotations

import datetime as dt
import re
import stat
import zipfile
from pathlib import Path

import pytest

from medray.config.federation_files import read_site
from medray.errors import ConfigError, FederationError
from medray.privacy.credentials import node_of
from medray.workflows.federation.provisioning import Provisioned, provision

INVITATION = """
name: hearts
server: {host: fed.example.org, port: 9443, also: [10.0.0.1]}
sites:
  - {name: charite, organisation: Charité}
  - {name: "no"}
"""


def make(folder: Path, text: str = INVITATION, **more: object) -> Provisioned:
    (folder / "sites.yaml").write_text(text, encoding="utf-8")
    return provision(folder / "sites.yaml", out=folder / "hearts", **more)  # type: ignore[arg-type]


def unpack(kit: Path, folder: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(kit) as archive:
        archive.extractall(folder)
        return {Path(name).name: archive.read(name) for name in archive.namelist()}


def test_a_kit_is_all_that_a_site_needs(tmp_path: Path) -> None:
    made = make(tmp_path)
    assert set(made.kits) == {"charite", "no"}
    files = unpack(made.kits["charite"], tmp_path / "site")
    assert set(files) == {"ca.crt", "node.crt", "node.key", "site.yaml", "README.md", "medray-site.service"}
    site = read_site(tmp_path / "site" / "hearts-charite" / "site.yaml")
    assert (site.federation, site.name, site.server) == ("hearts", "charite", "fed.example.org:9443")
    assert site.privacy.required and site.key == (tmp_path / "site" / "hearts-charite" / "node.key").resolve()
    for name, content in files.items():
        assert b"<<" not in content, f"{name} has a gap that was not filled"
    assert "Charité" in files["README.md"].decode()
    unpack(made.kits["no"], tmp_path / "site")
    assert read_site(tmp_path / "site" / "hearts-no" / "site.yaml").name == "no"  # a word that YAML 1.1 takes for false


def test_nothing_secret_lies_in_anothers_hands(tmp_path: Path) -> None:
    made = make(tmp_path)
    secrets = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]+")
    kits = {name: unpack(kit, tmp_path / name) for name, kit in made.kits.items()}
    found = {name: [s for content in files.values() for s in secrets.findall(content)] for name, files in kits.items()}
    assert all(len(keys) == 1 for keys in found.values()) and found["charite"] != found["no"]
    server = b"".join(path.read_bytes() for path in (made.directory / "server").rglob("*") if path.is_file())
    assert len(secrets.findall(server)) == 1  # its own
    assert (made.directory / "authority" / "ca.key").read_bytes() not in server
    for path in [
        *made.kits.values(),
        made.directory / "server" / "server.key",
        made.directory / "authority" / "ca.key",
    ]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_second_call_makes_what_is_missing_and_no_more(tmp_path: Path) -> None:
    first = make(tmp_path)
    before = {path: path.read_bytes() for path in first.directory.rglob("*") if path.is_file()}
    again = make(tmp_path)
    assert not again.kits and not again.server_renewed
    assert all(path.read_bytes() == content for path, content in before.items())
    more = make(tmp_path, INVITATION + "  - {name: kiel}\n")
    assert set(more.kits) == {"kiel"}
    fewer = make(tmp_path, INVITATION.replace('  - {name: "no"}\n', ""))
    assert set(fewer.removed) == {"kiel", "no"}
    assert [path.stem for path in (fewer.directory / "server" / "sites").iterdir()] == ["charite"]


def test_renewing_replaces_keys(tmp_path: Path) -> None:
    made = make(tmp_path)
    server, ca = made.directory / "server", (made.directory / "server" / "ca.crt").read_bytes()
    now = dt.datetime.now(dt.UTC)
    before = node_of((server / "sites" / "charite.crt").read_bytes(), ca, now=now)
    old = (server / "server.crt").read_bytes()
    renewed = make(tmp_path, renew=["charite", "server"])
    after = node_of((server / "sites" / "charite.crt").read_bytes(), ca, now=now)
    assert set(renewed.kits) == {"charite"} and renewed.server_renewed
    assert before[0] == after[0] and before[1] != after[1] and (server / "server.crt").read_bytes() != old
    moved = make(tmp_path, INVITATION.replace("10.0.0.1", "10.0.0.2"))
    assert moved.server_renewed and not moved.kits


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (INVITATION.replace("charite,", "../x,"), "sites.0.name"),
        (INVITATION.replace("Charité", '"a\\nb: c"'), "organisation"),
        (INVITATION + "  - {name: charite}\n", "stands there twice"),
        (INVITATION.replace("host:", "hots:"), "Did you mean host"),
        (INVITATION.replace("9443", "70000"), "server.port"),
    ],
)
def test_a_bad_invitation_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        make(tmp_path, text)


def test_what_cannot_be_renewed_is_named(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="kiel"):
        make(tmp_path, renew=["kiel"])
    made = make(tmp_path)
    (made.directory / "authority" / "ca.key").unlink()
    with pytest.raises(FederationError, match="Bring the key back"):
        make(tmp_path, renew=["charite"])
