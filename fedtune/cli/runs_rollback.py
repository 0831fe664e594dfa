"""``fedtune runs rollback``: take a run back to an earlier round, here or on a server."""

from pathlib import Path

import click

from fedtune.cli.operator_client import connect_to_server

__all__ = ["rollback"]


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--round", "number", type=click.IntRange(0), required=True, help="Round to return to.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--server", type=click.Path(path_type=Path), metavar="FILE", help="Operator file, for a run on a server.")
@click.option("--store", metavar="URL", help="SQLAlchemy URL of the store.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def rollback(run: str, number: int, yes: bool, server: Path | None, store: str | None, as_json: bool) -> None:
    """Delete all later rounds of a run, with their checkpoints. The run can then resume from this round.

    Stop a run that is being executed first. Go on afterwards with fedtune simulate --resume or fedtune runs resume.
    What devices keep for themselves exists for the last two rounds each trained in; going back further, they begin it
    anew.

    Example: fedtune runs rollback latest --round 12
    """
    from fedtune.json_text import json_text

    if not yes:
        click.confirm(f"Remove all rounds of {run} after round {number} for good?", abort=True, err=True)
    told = _there(server, run, number) if server else _here(store, run, number)
    removed, name = told["removed"], told["run"]
    then = f"fedtune runs resume {name}" if server else f"fedtune simulate --resume {name}"
    click.echo(
        json_text(told) if as_json else f"rolled back: {name} to round {number}, {removed} removed; next: {then}"
    )


def _there(server: Path, run: str, number: int) -> dict[str, object]:
    with connect_to_server(server) as connection:
        told: dict[str, object] = connection.request_json("POST", f"runs/{run}/rollback", {"round": number})
    return told


def _here(store: str | None, run: str, number: int) -> dict[str, object]:
    from fedtune.tracking import Store
    from fedtune.tracking.rollback import rollback_run as roll

    with Store.open(store) as opened:
        found = opened.run(run)
        removed = roll(opened, found.id, number)
    return {"run": found.id, "round": number, "removed": removed}
