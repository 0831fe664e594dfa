"""The roles of operators, and operator files: the server's URL, its CA certificate, and the operator's key."""

from pathlib import Path
from typing import Literal, get_args

from fedtune.errors import ServerError
from fedtune.files import write_bytes_atomically
from fedtune.server.credentials import generate_secret, hash_secret
from fedtune.server.server_home import ServerHome
from fedtune.tracking import Access
from fedtune.untrusted import require_clean

__all__ = ["ROLES", "Role", "allows", "write_operator_file"]

Role = Literal["read", "submit", "admin"]
"""read: list everything. submit: also submit, stop and resume runs. admin: also manage devices and operators."""
ROLES: tuple[str, ...] = get_args(Role)
"""In ascending order: each role includes the earlier ones."""
_NAME_LENGTH = 64


def allows(role: str, needed: Role) -> bool:
    """Whether a role includes the needed one."""
    return role in ROLES and ROLES.index(role) >= ROLES.index(needed)


def write_operator_file(place: ServerHome, access: Access, name: str, output: Path, role: str = "admin") -> None:
    """Write an operator file that only its owner can read. An earlier key of this operator is no longer valid."""
    if not require_clean(name, "an operator's name", _NAME_LENGTH).strip():
        raise ServerError("an operator needs a name; write one of letters and digits")
    key = generate_secret()
    write_bytes_atomically(output, place.encode_operator_file(key))
    access.set_operator(name, hash_secret(key), role)
