"""Keys and certificates of a federation: an authority of its own, the server's certificate, a key for each site.

Sites know the server by the authority's certificate (TLS). The server knows a site by its node key, an elliptic-curve
key that signs every request (Flower's node authentication), and trusts that key by a certificate of the authority that
names the site and runs out. Private keys are made once, written once, and readable by their owner alone.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from medray.errors import FederationError

_AUTHORITY_DAYS = 3650
_EARLY = dt.timedelta(hours=1)  # clocks of hospitals differ


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


def new_authority(name: str, *, now: dt.datetime) -> Identity:
    """The authority of one federation; whoever has its key can let machines in."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(f"{name} federation authority")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        _begin(subject, subject, key.public_key(), now, _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return Identity(certificate=_pem(builder.sign(key, hashes.SHA384())), key=_private(key))


def issue_server(authority: Identity, hosts: Sequence[str], *, now: dt.datetime, days: int) -> Identity:
    """The server's certificate, for all names and addresses by which it is reached."""
    key = ec.generate_private_key(ec.SECP384R1())
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
    certificate = _issue(
        authority, _name(hosts[0]), key.public_key(), now, days, ExtendedKeyUsageOID.SERVER_AUTH, names
    )
    return Identity(certificate=certificate, key=_private(key))


def issue_node(authority: Identity, site: str, *, now: dt.datetime, days: int) -> Identity:
    """A site's key (OpenSSH's format, as Flower reads it) and the certificate that binds it to the site's name."""
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = _issue(authority, _name(site), key.public_key(), now, days, ExtendedKeyUsageOID.CLIENT_AUTH, None)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    return Identity(certificate=certificate, key=private)


def node_of(certificate: bytes, authority: bytes, *, now: dt.datetime) -> tuple[str, bytes]:
    """The site that a node certificate names, and its public key (PEM), once the certificate has been verified.

    Raises:
        FederationError: no certificate, not signed by this authority, not yet or no longer valid, or not of a node.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
        issuer = x509.load_pem_x509_certificate(authority)
        site = str(found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    except (ValueError, IndexError) as error:
        raise FederationError(f"no certificate ({error}). Make one with: medray federate provision") from None
    try:
        found.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError):
        raise FederationError(
            f"certificate of {site!r}: not signed by this federation's authority. Make kits with the authority that "
            "the server runs with"
        ) from None
    check_dates(found, f"certificate of {site!r}", now=now)
    try:
        usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        node = ExtendedKeyUsageOID.CLIENT_AUTH in usage
    except (x509.ExtensionNotFound, ValueError):  # such as the authority's own
        node = False
    if not node:
        raise FederationError(f"certificate of {site!r}: is no site's. Take the one from its start-up kit")
    return site, found.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def issued_at(certificate: bytes) -> int:
    """From when a certificate (PEM) is valid, in seconds since 1970; of two of one site the later was made later."""
    return int(x509.load_pem_x509_certificate(certificate).not_valid_before_utc.timestamp())


def check_dates(certificate: x509.Certificate, what: str, *, now: dt.datetime) -> None:
    """Refuse a certificate outside its time.

    Raises:
        FederationError: states the date and the command that makes a new one.
    """
    if now > certificate.not_valid_after_utc:
        raise FederationError(
            f"{what}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}. Make a new one with: medray federate "
            "provision --renew"
        )
    if now < certificate.not_valid_before_utc:
        raise FederationError(
            f"{what}: valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC. Check this machine's clock"
        )


def _issue(
    authority: Identity,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: dt.datetime,
    days: int,
    usage: x509.ObjectIdentifier,
    names: x509.SubjectAlternativeName | None,
) -> bytes:
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    signer = serialization.load_pem_private_key(authority.key, None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    builder = (
        _begin(subject, issuer.subject, key, now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return _pem(builder.sign(signer, hashes.SHA384()))


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: dt.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
