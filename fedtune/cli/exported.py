"""A run's result as a whole model in the cache, for commands that read models."""

from pathlib import Path

__all__ = ["exported"]


def exported(reference: str, store: str | None) -> Path:
    """The folder of ``RUN`` or ``RUN@ROUND``; it is written once and found again."""
    from fedtune.cli.target import load_target
    from fedtune.errors import StoreError
    from fedtune.export import export
    from fedtune.home import cache

    run, _, number = reference.partition("@")
    if number and not number.isdigit():
        raise StoreError(f"run:{reference}: {number!r} is no round; write run:ID@ROUND, e.g. run:latest@0")
    recipe, state, found, at = load_target(run, int(number) if number else None, store)
    folder = cache() / "exported" / f"{found}-{at}"
    if not folder.exists():
        export(recipe, state, folder, "full", f"# {found}\n\nRound {at}.\n")
    return folder
