"""The command line. A command is imported only when it is called. An error prints one sentence and an exit code."""

import gc
import importlib
import os
import sys
import warnings

import click

from fedtune.cli.old_names import translate_old_names
from fedtune.errors import FedtuneError, FedtuneWarning
from fedtune.untrusted import clean_lines

__all__ = ["cli", "explain_missing_module", "format_warning", "main"]

_COMMANDS = {
    "check-plugin": ("check_plugin:check_plugin", "Check a technique, merge step or task on tiny models."),
    "data": ("data:data", "Show the examples of a recipe and their partition over clients."),
    "device": ("device:device", "Enrol this machine as a device and take part in runs."),
    "evaluate": ("evaluate:evaluate", "Score a run, a checkpoint or the base on any data source."),
    "export": ("export:export", "Write the result of a run for transformers or PEFT."),
    "merge": ("merge:merge", "Merge fine-tunes of one base into one model."),
    "methods": ("methods:methods", "List techniques, merge steps, algorithms and tasks, or print a card."),
    "new": ("new:new", "Write the start of a package with a method of your own."),
    "plan": ("plan:plan", "Predict memory and recommend settings for a memory budget."),
    "profile": ("profile:profile", "Measure what a training step costs with each technique."),
    "recipe": ("recipe:recipe", "Rewrite a recipe in the newest version."),
    "runs": ("runs:runs", "List, show, compare, plot, export, delete, roll back, watch, stop and resume runs."),
    "server": ("server:server", "Run a server for real devices."),
    "simulate": ("simulate:simulate", "Run a federation on this machine."),
    "submit": ("submit:submit", "Run a federation on the devices of a server."),
    "ui": ("ui:ui", "Show the runs of a store as pages in a browser."),
}


_FORMAT = warnings.formatwarning


class _Lazy(click.Group):
    """A group that imports a command's module when the command is called, not to list it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Translate old names, then parse. Shell completion prints no notices."""
        words, notices = translate_old_names(args)
        for sentence in () if ctx.resilient_parsing else notices:
            click.echo(f"fedtune: {clean_lines(sentence)}", err=True)
        return super().parse_args(ctx, words)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(f"fedtune.cli.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in sorted(_COMMANDS.items())])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fedtune")
def cli() -> None:
    """Federated and continual fine-tuning for constrained devices.

    \b
    Example:
      fedtune simulate recipes/sentiment.yaml
      fedtune runs list
    """


def main() -> None:
    """Run the command line. Exit code 0: success; 2: an error that the user can fix; 130: Ctrl-C."""
    _set_environment()
    warnings.formatwarning = format_warning
    gc.set_threshold(
        50_000, 20, 20
    )  # imports create a hundred thousand objects and no garbage; this saves half a second
    try:
        sys.exit(_run())
    finally:
        gc.freeze()  # the process ends here; a last garbage collection would take another half second


def _run() -> int:
    try:
        return int(cli(standalone_mode=False) or 0)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except FedtuneError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _refuse(explain_missing_module(error))
    except OSError as error:
        return _refuse(f"{error.filename or 'the system'}: {error.strerror or error}; fix this and try again")
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return 130


def explain_missing_module(error: ModuleNotFoundError) -> str:
    """Explain a package that the minimal install leaves out. Any other missing module is a bug."""
    from fedtune.minimal_install import explain_missing_module

    sentence = explain_missing_module(error.name or "")
    if sentence is None:
        raise error
    return sentence


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning. Warnings of fedtune are one sentence; others keep Python's format."""
    if issubclass(category, FedtuneWarning):
        return f"fedtune: {clean_lines(str(message))}\n"
    return _FORMAT(message, category, filename, lineno, line)


def _set_environment() -> None:
    """Disable telemetry, update checks and foreign progress bars; keep the working folder off the import path."""
    for name, value in {
        "PYTHONSAFEPATH": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)


def _refuse(sentence: str) -> int:
    click.echo(f"fedtune: {clean_lines(sentence)}", err=True)  # it may quote a device or a server
    return 2


if __name__ == "__main__":
    main()
