"""Change the host names or the port of a server: in its settings and in its certificate. All else stays the same."""

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
    """Add host names before the existing ones, change the listening address, and return the new URL.

    The earlier names stay in the certificate, so that devices can still connect by them.
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
    if not _says(text, moved.settings):  # e.g. because of a YAML anchor
        raise ServerError(
            f"{path} has YAML that cannot be changed automatically; change listen and hostnames in it yourself"
        )
    moved.renew_certificate()  # raises for an invalid name before anything is written
    write_bytes_atomically(path, text.encode())
    _rename(moved)
    return moved.settings.get_public_url()


def _rewritten(path: Path, wanted: Mapping[str, object]) -> str:
    """Return the text of a YAML file with new values and with renamed keys; the rest and all comments stay the same."""
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
    """Whether a YAML text contains exactly these settings."""
    try:
        return check_server_settings(load(text), "server.yaml") == settings
    except (YamlError, ServerError):
        return False


def _span(node: yaml.Node) -> tuple[int, int]:
    """Return the start and the end of a key or a value in the text."""
    return node.start_mark.index, _end(node)


def _end(node: yaml.Node) -> int:
    """Return the end of a value. A list in block style ends after its last item, not at the next key."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)


def _rename(place: ServerHome) -> None:
    """Write the new address to the operator file of this machine. The key stays the same."""
    if place.operator_file.exists():
        told = json.loads(place.operator_file.read_text(encoding="utf-8"))
        write_bytes_atomically(place.operator_file, place.encode_operator_file(str(told["key"])))
