"""``medray federate provision``: an authority, the server's files, and a start-up kit for each site.

    federations/<name>/
      authority/ca.crt, ca.key       who has this key can let machines in: keep it off the server
      server/ca.crt, server.crt, server.key, federation.json, sites/<site>.crt
      kits/<site>.zip                the only place of that site's private key: hand it over, then delete it

A second call makes what is missing and touches nothing else: a new site in ``sites.yaml`` gets a kit, one that was
taken out is no longer let in, ``renew`` makes new keys for those that it names.
"""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from medray.config.federation_files import Invitation, InvitedSite, read_invitation
from medray.data.writers.atomic import appearing
from medray.errors import FederationError
from medray.privacy.credentials import Identity, issue_node, issue_server, new_authority

SERVER = "server"
"""What ``renew`` calls the server."""


@dataclass(frozen=True, kw_only=True)
class Provisioned:
    """What a call made.

    Attributes:
        directory: of the federation.
        kits: by site, those that are new.
        removed: sites that are no longer let in.
        server_renewed: whether the server has a new certificate.
    """

    directory: Path
    kits: dict[str, Path]
    removed: tuple[str, ...]
    server_renewed: bool


def provision(path: Path, *, out: Path | None = None, renew: Collection[str] = ()) -> Provisioned:
    """Make keys, certificates and start-up kits.

    Args:
        path: ``sites.yaml``.
        out: the federation's folder; None for ``federations/<name>``.
        renew: sites, or ``server``, whose keys are made anew.

    Raises:
        ConfigError: ``sites.yaml`` is refused.
        FederationError: ``renew`` names nobody of it, or the folder is another federation's.
    """
    asked, now = read_invitation(path), dt.datetime.now(dt.UTC)
    unknown = sorted(set(renew) - {site.name for site in asked.sites} - {SERVER})
    if unknown:
        there = ", ".join(site.name for site in asked.sites)
        raise FederationError(f"--renew {', '.join(unknown)}: not in {path}; there are {there} and {SERVER}")
    directory = out or Path("federations") / asked.name
    authority = _authority(directory / "authority", asked.name, now)
    renewed = _server(directory / "server", asked, authority, now, renew=SERVER in renew)
    folder, kits = directory / "server" / "sites", {}
    folder.mkdir(parents=True, exist_ok=True)
    for site in asked.sites:
        certificate = folder / f"{site.name}.crt"
        if certificate.exists() and site.name not in renew:
            continue
        node = issue_node(authority, site.name, now=now, days=asked.days)
        kit = directory / "kits" / f"{site.name}.zip"
        # The kit first: a certificate without one would count as handed over.
        _write(kit, _kit(asked, site, authority, node), secret=True)
        _write(certificate, node.certificate)
        kits[site.name] = kit
    names = {site.name for site in asked.sites}
    gone = [found for found in sorted(folder.glob("*.crt")) if found.stem not in names]
    for found in gone:
        found.unlink()
    return Provisioned(
        directory=directory, kits=kits, removed=tuple(found.stem for found in gone), server_renewed=renewed
    )


def _authority(folder: Path, name: str, now: dt.datetime) -> Identity:
    certificate, key = folder / "ca.crt", folder / "ca.key"
    if certificate.exists() and key.exists():
        return Identity(certificate=certificate.read_bytes(), key=key.read_bytes())
    if certificate.exists():
        raise FederationError(
            f"{key}: missing, while its certificate is there. Bring the key back from where it is kept, or make a new "
            "federation with --out"
        )
    made = new_authority(name, now=now)
    _write(key, made.key, secret=True)
    _write(certificate, made.certificate)
    return made


def _server(folder: Path, asked: Invitation, authority: Identity, now: dt.datetime, *, renew: bool) -> bool:
    """Write the server's files where they are missing or no longer fit; whether its certificate is new."""
    about = {"name": asked.name, "host": asked.server.host, "port": asked.server.port, "also": list(asked.server.also)}
    described = folder / "federation.json"
    if described.exists():
        before = json.loads(described.read_text(encoding="utf-8"))
        if before.get("name") != asked.name:
            raise FederationError(f"{folder.parent}: belongs to federation {before.get('name')!r}, not {asked.name!r}")
        if before == about and not renew and (folder / "server.crt").exists():
            return False
    hosts = [asked.server.host, *asked.server.also, "localhost", "127.0.0.1"]
    made = issue_server(authority, hosts, now=now, days=asked.days)
    _write(folder / "server.key", made.key, secret=True)
    _write(folder / "server.crt", made.certificate)
    _write(folder / "ca.crt", authority.certificate)
    _write(described, json.dumps(about, indent=1).encode())
    return True


def _kit(asked: Invitation, site: InvitedSite, authority: Identity, node: Identity) -> bytes:
    """The zip of one site: nothing in it is of use to another."""
    fill = {
        "federation": asked.name,
        "site": site.name,
        "organisation": site.organisation or site.name,
        "host": asked.server.host,
        "port": str(asked.server.port),
        "classes": json.dumps(list(asked.classes), ensure_ascii=False),
        "until": f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=asked.days):%Y-%m-%d}",
    }
    files = {"ca.crt": authority.certificate, "node.key": node.key, "node.crt": node.certificate}
    for name in ("site.yaml", "README.md", "medray-site.service"):
        text = (resources.files("medray.workflows.federation") / "kit" / name).read_text(encoding="utf-8")
        for word, value in fill.items():
            text = text.replace(f"<<{word}>>", value)
        files[name] = text.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(f"{asked.name}-{site.name}/{name}", date_time=dt.datetime.now().timetuple()[:6])
            entry.external_attr = (0o100600 if name == "node.key" else 0o100644) << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    with appearing(path) as partial:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if secret else 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
