"""``carnet verify``: a token checked as a service would check it."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from carnet.cli.parameters import duration, read_peer_certificate, read_token

if TYPE_CHECKING:
    from carnet.claims import Claims

__all__ = ["verify"]


@click.command()
@click.argument("token")
@click.option("--audience", metavar="A", help="The service that checks the token.  [default: CARNET_AUDIENCE]")
@click.option(
    "--peer-certificate",
    metavar="X",
    help="The client certificate that the token came with: a PEM file, or its SHA-256 thumbprint (hex or base64url).",
)
@click.option(
    "--no-binding", is_flag=True, help="Accept a token whoever sends it, as a service without mutual TLS does."
)
@click.option(
    "--timeout", callback=duration, default="10s", show_default=True, metavar="D", help="Wait at most so long."
)
@click.option("--json", "as_json", is_flag=True, help="Print an object: valid, and claims, or reason and message.")
def verify(
    token: str,
    *,
    audience: str | None,
    peer_certificate: str | None,
    no_binding: bool,
    timeout: timedelta,
    as_json: bool,
) -> int:
    """Verify TOKEN with the keys that its issuer publishes.

    TOKEN - reads from standard input. A token is bound to the certificate of its holder: say which certificate it came
    with, or --no-binding.

    Exit code 0: the token is good; 1: it is not; 2: bad input or configuration; 3: the keys could not be had.
    """
    from carnet.errors import InvalidTokenError  # noqa: PLC0415 - see carnet.cli

    text = read_token(token)
    thumbprint = None if peer_certificate is None else read_peer_certificate(peer_certificate)
    if thumbprint is None and not no_binding:
        msg = "a token is good only with its holder's certificate: give --peer-certificate X, or --no-binding"
        raise click.ClickException(msg)
    try:
        claims = _verified(text, audience, thumbprint, timeout, no_binding=no_binding)
    except InvalidTokenError as error:
        if as_json:
            click.echo(json.dumps({"valid": False, "reason": error.reason, "message": str(error)}))
        else:
            click.echo(f"error: the token is not good: {error} ({error.reason})", err=True)
        return 1
    if as_json:
        click.echo(json.dumps({"valid": True, "claims": claims.to_payload()}))
    else:
        click.echo(
            f"the token is good until {claims.expires_at:%Y-%m-%dT%H:%M:%SZ}:"
            f" {claims.subject} may {', '.join(claims.scopes)} at {claims.audience}"
        )
    return 0


def _verified(
    token: str, audience: str | None, thumbprint: str | None, timeout: timedelta, *, no_binding: bool
) -> Claims:
    from carnet.errors import InvalidTokenError, InvalidTokenReason  # noqa: PLC0415 - see carnet.cli
    from carnet.trust import Verifier  # noqa: PLC0415
    from carnet.verify import parse_unverified  # noqa: PLC0415

    parse_unverified(token)  # What is no token needs no keys to be refused.
    with Verifier(audience=audience, binding="none", mode="poll") as verifier:
        verifier.wait_ready(timeout)
        claims = verifier.verify(token)
    # The verifier checks against a certificate; on a command line it may be known by its thumbprint only.
    if claims.confirmation is None and not no_binding:
        msg = "the token is bound to no certificate"
        raise InvalidTokenError(InvalidTokenReason.MISSING_CLAIM, msg)
    if None not in (claims.confirmation, thumbprint) and claims.confirmation != thumbprint:
        msg = "the token is bound to another certificate"
        raise InvalidTokenError(InvalidTokenReason.WRONG_CONFIRMATION, msg)
    return claims
