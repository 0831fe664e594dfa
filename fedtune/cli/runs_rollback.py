"""``fedtune runs rollback``: take a run back to an earlier round, here or on a server."""

from pathlib import Path

import click

from fedtune.cli.operator_client import connect_to_server

__all__ = ["rollback"]


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--round", "round_number", type=click.IntRange(0), required=True, help="Round to return to.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option(
    "--operator-file", type=click.Path(path_type=Path), metavar="FILE", help="Operator file, for a run on a server."
)
@click.option("--store", metavar="URL", help="SQLAlchemy URL of the run store.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def rollback(
    run: str, round_number: int, yes: bool, operator_file: Path | None, store: str | None, as_json: bool
) -> None:
    """Delete all later rounds of a run, with their checkpoints. The run can then resume from this round.

    Stop the run first. Resume it afterwards with fedtune simulate --resume or fedtune runs resume. Each device stores
    its local state for the last two rounds in which it trained. If you go further back, that state starts anew.

    Example: fedtune runs rollback latest --round 12
    """
    from fedtune.json_text import json_text

    if not yes:
        click.confirm(f"Remove all rounds of {run} after round {round_number} permanently?", abort=True, err=True)
    done = (
        _roll_back_on_server(operator_file, run, round_number)
        if operator_file
        else _roll_back_here(store, run, round_number)
    )
    removed, name = done["removed"], done["run"]
    then = f"fedtune runs resume {name}" if operator_file else f"fedtune simulate --resume {name}"
    click.echo(
        json_text(done) if as_json else f"rolled back: {name} to round {round_number}, {removed} removed; next: {then}"
    )


def _roll_back_on_server(operator_file: Path, run: str, round_number: int) -> dict[str, object]:
    with connect_to_server(operator_file) as connection:
        reply: dict[str, object] = connection.request_json("POST", f"runs/{run}/rollback", {"round": round_number})
    return reply


def _roll_back_here(store: str | None, run: str, round_number: int) -> dict[str, object]:
    from fedtune.tracking import Store
    from fedtune.tracking.rollback import rollback_run

    with Store.open(store) as opened:
        found = opened.run(run)
        removed = rollback_run(opened, found.id, round_number)
    return {"run": found.id, "round": round_number, "removed": removed}
