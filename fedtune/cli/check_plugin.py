"""``fedtune check-plugin``: run a method through a small matrix of checks."""

import click

from fedtune.json_text import json_text

__all__ = ["check_plugin"]

_MARKS = {"ok": "ok  ", "failed": "FAIL", "skipped": "skip"}


@click.command("check-plugin")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")
def check_plugin(name: str, as_json: bool) -> None:
    """Check the technique, merge step, task, metric or callback NAME on tiny models.

    Each check prints a line. The exit code is 2 if one fails.

    \b
    Example:
      fedtune check-plugin lora
    """
    from fedtune.library.plug_in_check import check_plug_in

    results = []
    for one in check_plug_in(name):
        results.append(one)
        if not as_json:
            click.echo(f"{_MARKS[one.status]}  {one.what}" + (f": {one.reason}" if one.reason else ""))
    failed = sum(one.status == "failed" for one in results)
    if as_json:
        click.echo(json_text([one._asdict() for one in results]))
    else:
        click.echo(f"{name}: {failed} of {len(results)} checks failed" if failed else f"{name}: all checks passed")
    if failed:
        raise click.exceptions.Exit(2)
