"""A server that moved: other names or another port in its settings, a certificate for them; all else stays."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from fedtune.errors import ServerError
from fedtune.files import write_bytes_atomically
from fedtune.recipe.yaml_text import YamlError, load
from fedtune.server.server_home import ServerHome, open_server_home
from fedtune.server.server_settings import RENAMED_KEYS, ServerSettings, check_server_settings

__all__ = ["readdress"]


def readdress(hostnames: list[str], listen: str | None) -> str:
    """Put the names before those the server has, change where it listens, and return its new URL.

    The earlier names stay in the certificate, so that devices can still reach the server by them.
    """
    place = open_server_home()
    before = place.settings
    wanted: dict[str, object] = {
        "hostnames": list(dict.fromkeys([*hostnames, *before.hostnames])),
        "listen": listen or before.listen,
    }
    told = before.model_dump() | wanted
    moved = replace(place, settings=check_server_settings(told, "the options"))
    path = place.folder / "server.yaml"
    text = _rewritten(path, wanted)
    if not _says(text, moved.settings):  # an anchor that something else refers to, for one
        raise ServerError(
            f"{path} is written in a way that cannot be changed in place; change listen and hostnames in it"
        )
    moved.renew_certificate()  # refuses what is no name, before anything else is written
    write_bytes_atomically(path, text.encode())
    _rename(moved)
    return moved.settings.get_public_url()


def _rewritten(path: Path, wanted: Mapping[str, object]) -> str:
    """The text of a YAML file with other values and present names of keys; the rest, comments too, is as it was."""
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise ServerError(f"{path} has no settings; write at least listen and hostnames")
    found = {RENAMED_KEYS.get(key.value, key.value): (key, value) for key, value in root.value}
    spans = [(*_span(found[key][1]), json.dumps(value)) for key, value in wanted.items() if key in found]
    spans += [(*_span(key), new) for new, (key, _) in found.items() if key.value != new]
    for start, end, written in sorted(spans, reverse=True):
        text = f"{text[:start]}{written}{text[end:]}"
    lacking = [f"{key}: {json.dumps(value)}\n" for key, value in wanted.items() if key not in found]
    return (text if text.endswith("\n") or not lacking else text + "\n") + "".join(lacking)


def _says(text: str, settings: ServerSettings) -> bool:
    """Whether a YAML text means just these settings."""
    try:
        return check_server_settings(load(text), "server.yaml") == settings
    except (YamlError, ServerError):
        return False


def _span(node: yaml.Node) -> tuple[int, int]:
    """Where a key or a value stands in its text."""
    return node.start_mark.index, _end(node)


def _end(node: yaml.Node) -> int:
    """Where a value ends: a list with a dash before each item ends with its last one, not at the next key."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)


def _rename(place: ServerHome) -> None:
    """Let the operator's file of this machine name the new address; its key stays."""
    if place.operator_file.exists():
        told = json.loads(place.operator_file.read_text(encoding="utf-8"))
        write_bytes_atomically(place.operator_file, place.encode_operator_file(str(told["key"])))
