"""Unit files for systemd: services that do not run as root, with correctly escaped arguments."""

import os
import pwd
import re
import sys
from pathlib import Path

from fedtune import paths
from fedtune.errors import FedtuneError
from fedtune.shipped import fill_template

__all__ = ["service", "service_home", "service_user"]

_PLAIN = re.compile(r"[A-Za-z0-9_./:=@,+-]+")
_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")


def service(template: str, words: list[str], user: str, folder: Path) -> str:
    """Return a unit file that runs ``fedtune`` with these arguments as ``user``, who can write only to ``folder``.

    ``template`` is a file shipped with fedtune, e.g. ``server/fedtune-server.service``. Raises FedtuneError when an
    argument cannot be written in a unit file, or the name of ``folder`` has quotes or backslashes.
    """
    if re.search(r"[\"'\\]", str(folder)):
        raise FedtuneError(f"systemd cannot make {folder} writable, as its name has a quote or a backslash; rename it")
    program = str(Path(sys.executable).parent / "fedtune")
    return fill_template(
        template,
        user=user,
        command=" ".join([_word(program), *(_word(word).replace("$", "$$") for word in words)]),
        environment=_word(f"FEDTUNE_HOME={folder}"),
        writable=_word(str(folder)),
    )


def service_user(named: str | None) -> str:
    """Return the user of a service: the named one, or the current one; FedtuneError for root."""
    user = named or pwd.getpwuid(os.geteuid()).pw_name
    if user == "root":
        raise FedtuneError("a service does not run as root; name the user it is to run as, e.g. --user fedtune")
    if not _NAME.fullmatch(user):
        raise FedtuneError(f"--user is {user!r}; write the name of a user of this machine")
    return user


def service_home(user: str) -> Path:
    """Return fedtune's home folder for a service of ``user``; FedtuneError when there is no such user."""
    if "FEDTUNE_HOME" in os.environ:
        return paths.get_home_folder()
    try:
        return Path(pwd.getpwnam(user).pw_dir) / ".fedtune"
    except KeyError as error:
        raise FedtuneError(
            f"there is no user {user!r} on this machine; set FEDTUNE_HOME to the folder the service is to use, e.g. "
            "/var/lib/fedtune"
        ) from error


def _word(text: str) -> str:
    """Return an argument escaped for a unit file: quoted if necessary, with specifiers doubled."""
    if not text.isprintable():
        raise FedtuneError(f"{text!r} cannot stand in a unit file; leave out what does not print")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return escaped if _PLAIN.fullmatch(text) else f'"{escaped}"'
