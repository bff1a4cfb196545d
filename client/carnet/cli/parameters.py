"""What commands take: durations, tokens and certificates, as they are written on a command line."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Final

import click

from carnet.durations import parse_duration

__all__ = ["duration", "read_peer_certificate", "read_token"]

_MAX_INPUT: Final = 64 * 1024
_HEX_THUMBPRINT: Final = re.compile(r"(?:[0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}")


def duration(ctx: click.Context, param: click.Parameter, value: str | None) -> timedelta | None:
    """Return the duration that the option's value is (``90s``, ``10m``), or fail with what to write."""
    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def read_token(argument: str) -> str:
    """Return the token that `argument` is; ``-`` reads it from standard input, where no other process can see it."""
    if argument == "-":
        # Bytes that are no text make no token, and no traceback either.
        argument = sys.stdin.buffer.read(_MAX_INPUT).decode("ascii", "replace")
    token = argument.strip()
    if not token:
        msg = "no token was given: pipe it in, for instance: carnet token AUDIENCE | carnet inspect -"
        raise click.ClickException(msg)
    return token


def read_peer_certificate(argument: str) -> str:
    """Return the thumbprint (``x5t#S256``) of the certificate that `argument` names.

    That is a SHA-256 thumbprint in base64url or hexadecimal, or else the name of a PEM file.
    """
    from cryptography import x509  # noqa: PLC0415 - see carnet.cli

    from carnet.claims import certificate_thumbprint  # noqa: PLC0415
    from carnet.encoding import base64url  # noqa: PLC0415
    from carnet.jwk import is_thumbprint  # noqa: PLC0415

    if is_thumbprint(argument):
        return argument
    if _HEX_THUMBPRINT.fullmatch(argument):
        return base64url(bytes.fromhex(argument.replace(":", ""))).decode("ascii")
    try:
        return certificate_thumbprint(x509.load_pem_x509_certificate(Path(argument).read_bytes()))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no PEM certificate in it"
        msg = f"--peer-certificate {argument[:200]}: {reason}; give a PEM file, or a SHA-256 thumbprint"
        raise click.ClickException(msg) from error
