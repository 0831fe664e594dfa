"""The server's own certificate authority (CA), with elliptic-curve keys, and the server's certificate."""

import hashlib
import ipaddress
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import ServerError

__all__ = [
    "compute_certificate_fingerprint",
    "ends",
    "ends_soon",
    "generate_private_key",
    "is_certificate_valid_for",
    "issue_server_certificate",
    "make_ca_certificate",
]

_ALWAYS = ("localhost", "127.0.0.1", "::1")
_AUTHORITY_DAYS, _SERVER_DAYS = 3650, 397
_SOON = timedelta(days=180)
_BEGIN = datetime(1970, 1, 1, tzinfo=UTC)
"""The certificate is valid from this long ago. A device whose clock is behind must accept it to get the time."""


def generate_private_key() -> bytes:
    """Return a new P-384 private key as PEM."""
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_ca_certificate(key: bytes) -> bytes:
    """Return a CA certificate as PEM for this private key."""
    private = _private(key)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtune authority")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = _builder(name, name, private.public_key(), _AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return _signed(builder.add_extension(usage, critical=True), private)


def issue_server_certificate(
    authority_key: bytes, authority_certificate: bytes, key: bytes, names: Iterable[str]
) -> bytes:
    """Return a server certificate as PEM for host names and addresses. It always contains this machine's own names."""
    issuer, private = x509.load_pem_x509_certificate(authority_certificate), _private(key)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtune server")])
    alternatives = x509.SubjectAlternativeName([_general(name) for name in dict.fromkeys([*names, *_ALWAYS])])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = _builder(subject, issuer.subject, private.public_key(), _SERVER_DAYS, issuer.not_valid_after_utc)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(alternatives, critical=False).add_extension(usage, critical=False)
    return _signed(builder, _private(authority_key))


def is_certificate_valid_for(pem: bytes, names: Iterable[str], until: datetime) -> bool:
    """Whether a certificate is valid for all the names until the given time."""
    found = x509.load_pem_x509_certificate(pem)
    known = set(found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    return known >= {_general(name) for name in names} and found.not_valid_after_utc > until


def ends(pem: bytes) -> datetime:
    """Return when a certificate expires."""
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def ends_soon(ca: str) -> datetime | None:
    """Return when a CA certificate expires if this is within half a year, otherwise None."""
    until = ends(ca.encode())
    return until if until < datetime.now(UTC) + _SOON else None


def compute_certificate_fingerprint(pem: str) -> str:
    """Return the hexadecimal SHA-256 of a certificate in DER. Enrolment tokens contain that of the CA."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name.encode("idna").decode("ascii"))
    except ValueError as error:
        raise ServerError(
            f"{name!r} is neither a host name nor an address; write the one that devices connect to"
        ) from error


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, latest: datetime | None = None
) -> x509.CertificateBuilder:
    until = datetime.now(UTC) + timedelta(days=days)
    names = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    dated = names.serial_number(x509.random_serial_number()).not_valid_before(_BEGIN)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key)
    return dated.not_valid_after(min(until, latest or until)).add_extension(identifier, critical=False)


def _signed(builder: x509.CertificateBuilder, issuer: ec.EllipticCurvePrivateKey) -> bytes:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())
    return (
        builder.add_extension(identifier, critical=False)
        .sign(issuer, hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )
