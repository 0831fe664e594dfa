"""One-time tokens and operator keys: random, shown once, known to the server by their hash only."""

import base64
import hashlib
import json
import secrets

from fedtune.server.certificate_authority import compute_certificate_fingerprint

__all__ = ["encode_token", "generate_secret", "hash_secret"]


def generate_secret() -> str:
    """Text of 256 random bits."""
    return secrets.token_urlsafe(32)


def hash_secret(secret: str) -> str:
    """What is kept of a secret: it has too many bits to be guessed from its hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def encode_token(url: str, ca: str, secret: str) -> str:
    """What an operator hands to a device: where to go, whom to trust, the secret, as one word."""
    content = json.dumps({"url": url, "ca_sha256": compute_certificate_fingerprint(ca), "secret": secret}).encode()
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
