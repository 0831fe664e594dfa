"""One-time tokens and operator keys. They are random and shown once; the server stores only their hash."""

import base64
import hashlib
import json
import secrets

from fedtune.server.certificate_authority import compute_certificate_fingerprint

__all__ = ["encode_token", "generate_secret", "hash_secret"]


def generate_secret() -> str:
    """Return a text with 256 random bits."""
    return secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """Return the hash to store. The secret has too many bits to be guessed from it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def encode_token(url: str, ca: str, secret: str) -> str:
    """Return a token for a device as one word: the server's URL, the hash of its CA certificate, and the secret."""
    content = json.dumps({"url": url, "ca_sha256": compute_certificate_fingerprint(ca), "secret": secret}).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
