"""``fedtune ui``: the runs of a store as pages in a browser."""

import click

__all__ = ["ui"]


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8787, show_default=True, help="0 takes a free one.")
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
@click.option("--store", metavar="URL", help="SQLAlchemy URL of the run store.")
def ui(host: str, port: int, no_browser: bool, store: str | None) -> None:
    """Show runs, one run and comparisons as pages. They are made on this machine and ask no other one.

    The pages read the store and change nothing. With another --host than
    this machine's own, the printed address has a key that they ask for. End
    with Ctrl-C.

    \b
    Example:
      fedtune ui
      fedtune ui --port 9000 --no-browser --store sqlite:////data/store.sqlite
    """
    from fedtune.tracking.existing_store import open_existing_store
    from fedtune.web.application import make_application
    from fedtune.web.page_key import make_page_key
    from fedtune.web.page_server import is_loopback, make_page_url, open_page_socket, serve_page

    key = None if is_loopback(host) else make_page_key()
    with open_existing_store(store) as opened, open_page_socket(host, port) as listener:
        url = make_page_url(listener, host) + (f"?key={key}" if key else "")
        click.echo(f"fedtune ui: {url} (Ctrl-C ends it)")
        if key:
            click.echo("warning: whoever has this address can read all runs, and it travels unencrypted", err=True)
        if not no_browser:
            click.launch(url)
        serve_page(make_application(opened, host, key), listener)
