"""``carnet token``."""

from __future__ import annotations

import json
from datetime import timedelta

import click

from carnet.cli.parameters import duration

__all__ = ["token"]


@click.command()
@click.argument("audience")
@click.option("--scope", "scopes", multiple=True, metavar="S", help="Ask for this scope; may be given again.")
@click.option(
    "--ttl", callback=duration, metavar="D", help="Ask for a life of 90s, 10m, 1h... The broker may shorten it."
)
@click.option(
    "--timeout", callback=duration, default="10s", show_default=True, metavar="D", help="Wait at most so long."
)
@click.option("--json", "as_json", is_flag=True, help="Print an object with token, audience, scopes and expires_at.")
def token(audience: str, *, scopes: tuple[str, ...], ttl: timedelta | None, timeout: timedelta, as_json: bool) -> None:
    """Get a token for AUDIENCE, and print it alone.

    Without --scope the token carries every scope that the policy grants. Exit code 0: printed; 1: the broker refused;
    2: bad input or configuration; 3: no broker answered.
    """
    from carnet.source import Client  # noqa: PLC0415 - see carnet.cli

    with Client(timeout=timeout) as client:
        got = client.get_token(audience, scopes=scopes, ttl=ttl)
    if as_json:
        expires_at = f"{got.expires_at:%Y-%m-%dT%H:%M:%SZ}"
        shown = {"token": got.value, "audience": got.audience, "scopes": got.scopes, "expires_at": expires_at}
        click.echo(json.dumps(shown))
    else:
        click.echo(got.value)
