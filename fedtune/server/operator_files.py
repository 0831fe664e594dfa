"""Operators: what each role may do, and their files: where the server is, its authority, a key only the file holds."""

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
"""Look at everything; also submit, stop and resume runs; also let devices and operators in and out."""
ROLES: tuple[str, ...] = get_args(Role)
"""Each may do what the ones before it may."""
_NAME_LENGTH = 64


def allows(role: str, needed: Role) -> bool:
    """Whether an operator of a role may do what needs one."""
    return role in ROLES and ROLES.index(role) >= ROLES.index(needed)


def write_operator_file(place: ServerHome, access: Access, name: str, output: Path, role: str = "admin") -> None:
    """Write an operator's file, readable by its owner only; an earlier key of that name is worthless then."""
    if not require_clean(name, "an operator's name", _NAME_LENGTH).strip():
        raise ServerError("an operator needs a name; give one of letters and digits")
    key = generate_secret()
    write_bytes_atomically(output, place.encode_operator_file(key))
    access.set_operator(name, hash_secret(key), role)
