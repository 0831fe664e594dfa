"""Renamed commands, options and values. An old name still works, and one line names the new one."""

from collections.abc import Mapping, Sequence

__all__ = ["COMMANDS", "OPTIONS", "VALUES", "describe_renaming", "translate_old_names"]

COMMANDS = {
    "device enroll": "enrol",
    "server token": "create-token",
    "server remove": "remove-device",
    "server operator": "add-operator",
}
"""The last word of the command's new name."""

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "data show": {"--picture": "--output"},
    "device join": {"--idle": "--trainer-idle-timeout"},
    "evaluate": {"--part": "--split"},
    "merge": {
        "--as": "--format",
        "--base": "--base-model",
        "--calibrate": "--calibration-data",
        "--evaluate": "--eval-data",
        "--part": "--split",
        "--rank": "--max-rank",
        "--shard-size": "--max-shard-size",
        "--tokenizer": "--tokenizer-source",
    },
    "profile": {
        "--batch": "--batch-size",
        "--check": "--check-gradients",
        "--image": "--image-size",
        "--length": "--max-length",
    },
    "runs": {"--server": "--operator-file"},
    "server": {"--server": "--operator-file"},
    "server create-token": {"--hours": "--valid-hours"},
    "server devices": {
        "--tag": "fedtune server tag DEVICE --add TAG",
        "--untag": "fedtune server tag DEVICE --remove TAG",
    },
    "server init": {"--name": "--hostname"},
    "server operators": {"--remove": "fedtune server remove-operator NAME"},
    "server tokens": {"--remove": "fedtune server remove-token TOKEN"},
    "submit": {"--server": "--operator-file"},
}
"""Renamed options by command, or by group for all its commands. An option that became a command is hidden."""

VALUES: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "device join": {"--data": {"part": "partition"}},
    "device package": {"--data": {"part": "partition"}},
    "export": {"--format": {"full": "model"}},
    "simulate": {"--engine": {"local": "in-process"}},
}
"""Renamed values by command and option: the whole value, or its part before the colon."""


def translate_old_names(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments with the new names, and one sentence for each old name."""
    words, old_command = list(arguments), " ".join(arguments[:2])
    notices = []
    if old_command in COMMANDS:
        words[1] = COMMANDS[old_command]
        notices.append(describe_renaming(old_command, f"{words[0]} {words[1]}"))
    paths = (" ".join(words[:1]), " ".join(words[:2]))
    options = {old: new for path in paths for old, new in OPTIONS.get(path, {}).items()}
    values = {option: of for path in paths for option, of in VALUES.get(path, {}).items()}
    end = words.index("--") if "--" in words else len(words)
    for place in range(end):
        words[place], renamed = _rename_option(words[place], options)
        notices += renamed
    for place in range(end):
        words[place], renamed = _rename_value(words[place], words[place - 1] if place else "", values)
        notices += renamed
    return words, list(dict.fromkeys(notices))


def describe_renaming(old: str, new: str) -> str:
    """Return one sentence with the new name."""
    return f"{old} is called {new} now"


def _rename_option(word: str, options: Mapping[str, str]) -> tuple[str, list[str]]:
    option, equals, value = word.partition("=")
    new = options.get(option)
    if new is None:
        return word, []
    kept = word if " " in new else f"{new}{equals}{value}"
    return kept, [describe_renaming(option, new)]


def _rename_value(word: str, before: str, values: Mapping[str, Mapping[str, str]]) -> tuple[str, list[str]]:
    """Replace a value, which is the word after its option, or follows an equals sign."""
    option, equals, value = word.partition("=")
    if not (equals and option in values):
        option, equals, value = before, "", word
    head, colon, rest = value.partition(":")
    new = values.get(option, {}).get(head)
    if new is None:
        return word, []
    start, shown = (f"{option}=" if equals else ""), colon + rest
    return f"{start}{new}{shown}", [describe_renaming(f"{option} {value}", f"{option} {new}{shown}")]
