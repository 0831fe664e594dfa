"""A server that moved: other names or another port in its settings, a certificate for them; all else stays."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from fedtune.errors import ServerError
from fedtune.files import write_bytes_atomically
from fedtune.recipe.yaml_text import YamlError, load
from fedtune.server.server_home import ServerHome, ServerSettings, check_settings, open_server_home

__all__ = ["readdress"]


def readdress(names: list[str], listen: str | None) -> str:
    """Put the names first among those the server has, and where it listens in place of before; its new URL.

    Names from before stay in the certificate, so that devices which still reach it by them go on doing so.
    """
    place = open_server_home()
    before = place.settings
    wanted: dict[str, object] = {
        "names": list(dict.fromkeys([*names, *before.names])),
        "listen": listen or before.listen,
    }
    told = before.model_dump() | wanted
    moved = replace(place, settings=check_settings(told, "the options"))
    path = place.folder / "server.yaml"
    text = _rewritten(path, wanted)
    if not _says(text, moved.settings):  # an anchor that something else refers to, for one
        raise ServerError(f"{path} is written in a way that cannot be changed in place; change listen and names in it")
    moved.renew_certificate()  # refuses what is no name, before anything else is written
    write_bytes_atomically(path, text.encode())
    _rename(moved)
    return moved.settings.get_public_url()


def _rewritten(path: Path, wanted: Mapping[str, object]) -> str:
    """The text of a YAML file with other values; the rest of it, comments too, is as it was."""
    text = path.read_text(encoding="utf-8")
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise ServerError(f"{path} has no settings; write at least listen and names")
    found = {key.value: value for key, value in root.value}
    spans = [(found[key].start_mark.index, _end(found[key]), value) for key, value in wanted.items() if key in found]
    for start, end, value in sorted(spans, key=lambda span: -span[0]):
        text = f"{text[:start]}{json.dumps(value)}{text[end:]}"
    lacking = [f"{key}: {json.dumps(value)}\n" for key, value in wanted.items() if key not in found]
    return (text if text.endswith("\n") or not lacking else text + "\n") + "".join(lacking)


def _says(text: str, settings: ServerSettings) -> bool:
    """Whether a YAML text means just these settings."""
    try:
        return check_settings(load(text), "server.yaml") == settings
    except (YamlError, ServerError):
        return False


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
