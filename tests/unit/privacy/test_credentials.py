from __future__ import annotations

import datetime as dt
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from medray.errors import FederationError
from medray.privacy.credentials import Identity, issue_node, issue_server, new_authority, node_of

NOW = dt.datetime(2026, 11, 28, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def authority() -> Identity:
    return new_authority("hearts", now=NOW)


def test_a_site_is_known_by_its_certificate(authority: Identity) -> None:
    node = issue_node(authority, "charite", now=NOW, days=10)
    site, key = node_of(node.certificate, authority.certificate, now=NOW)
    assert site == "charite" and key.startswith(b"-----BEGIN PUBLIC KEY-----")
    assert node.key.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")


def test_what_no_certificate_vouches_for_is_refused(authority: Identity) -> None:
    node = issue_node(authority, "charite", now=NOW, days=10)
    server = issue_server(authority, ["fed.example.org", "10.0.0.1"], now=NOW, days=10)
    cases = [
        (node.certificate, authority.certificate, NOW + dt.timedelta(days=11), "expired on 2026-12-08"),
        (node.certificate, authority.certificate, NOW - dt.timedelta(days=1), "valid only from"),
        (node.certificate, new_authority("hearts", now=NOW).certificate, NOW, "not signed by this federation"),
        (server.certificate, authority.certificate, NOW, "is no site's"),
        (authority.certificate, authority.certificate, NOW, "is no site's"),
        (
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            authority.certificate,
            NOW,
            "no certificate",
        ),
    ]
    for certificate, issuer, now, reason in cases:
        with pytest.raises(FederationError, match=reason):
            node_of(certificate, issuer, now=now)


def test_python_takes_the_servers_certificate(authority: Identity, tmp_path: Path) -> None:
    server = issue_server(authority, ["fed.example.org", "10.0.0.1"], now=NOW, days=10)
    for name, content in (("ca.crt", authority.certificate), ("s.crt", server.certificate), ("s.key", server.key)):
        (tmp_path / name).write_bytes(content)
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    context.load_cert_chain(str(tmp_path / "s.crt"), str(tmp_path / "s.key"))  # raises where key and certificate differ
    names = x509.load_pem_x509_certificate(server.certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["fed.example.org"]
    assert [str(address) for address in names.value.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
