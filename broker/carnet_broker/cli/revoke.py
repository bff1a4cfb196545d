"""``carnet-broker revoke``: cut off a token, a workload or a certificate now, and see who has heard of it."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click

from carnet.durations import format_duration
from carnet.errors import ConfigError
from carnet.revocations import RevocationKind
from carnet_broker.cli.admin import NOT_YET, admin_errors, admin_option, told_verifiers, verifier_to_json
from carnet_broker.cli.output import cli_errors, complain, json_option, show
from carnet_broker.cli.spans import DurationType
from carnet_broker.core.revocation_target import (
    certificate_in_pem,
    certificate_name,
    moment,
    subject_of,
    token_id_of,
)
from carnet_broker.edges.grpc.admin_client import AdminClient, AdminUnavailableError, Revoked, SpreadSeen

__all__ = ["revoke"]

_LOOK_EVERY: Final = 0.1
_TELL_EVERY: Final = 1.0
_MAX_PEM: Final = 64 * 1024


@click.command()
@click.option("--jti", metavar="JTI", help="Revoke one token, by its jti (never the token itself).")
@click.option("--subject", metavar="SPIFFE-ID", help="Revoke all tokens of a workload that were issued up to now.")
@click.option("--certificate", metavar="CERT", help="Revoke a certificate: a SHA-256 thumbprint, or a PEM file.")
@click.option("--root", metavar="JTI", help="Revoke one token, and all that were derived from it.")
@click.option("--block", is_flag=True, help="With --subject: issue no more to it either, until lifted.")
@click.option("--lift", is_flag=True, help="With --subject: end the block.")
@click.option("--ends-at", metavar="TIME", help="When the token or certificate ends by itself (RFC 3339), if known.")
@click.option("--reason", default="", help="For the record, at most 200 characters.")
@click.option("--wait", is_flag=True, help="Return when every live verifier has it; then say how fast that was.")
@click.option("--timeout", type=DurationType(), default="30s", show_default=True, help="How long to wait with --wait.")
@admin_option
@json_option
@cli_errors
@admin_errors
def revoke(
    *,
    jti: str | None,
    subject: str | None,
    certificate: str | None,
    root: str | None,
    block: bool,
    lift: bool,
    ends_at: str | None,
    reason: str,
    wait: bool,
    timeout: timedelta,
    admin: str | None,
    as_json: bool,
) -> None:
    """Revoke a token, the tokens of a workload, or a certificate. It is durable when the command returns.

    Speaks to CARNET_ADMIN, with the certificate of an admin (CARNET_CERT_FILE, CARNET_KEY_FILE, CARNET_CA_FILE).

    Exit code: 0 done, 1 the broker cannot be asked, or not now: ask again, 2 bad input, 3 refused: no admin of the
    policy, 4 not every live verifier has it in time: it is durable all the same.
    """
    given = {"--jti": jti, "--subject": subject, "--certificate": certificate, "--root": root}
    kind, value, end = _target({name: text for name, text in given.items() if text is not None}, block=block, lift=lift)
    if ends_at is not None:
        end = moment(ends_at, "--ends-at")
    with AdminClient(admin) as client:
        revoked = client.revoke(kind, value, ends_at=end, reason=reason)
        spread, all_have_it = _follow(client, revoked, timeout) if wait else (None, True)
    until = "until lifted" if revoked.expires_at is None else f"until {revoked.expires_at.isoformat()}"
    result: dict[str, Any] = {
        "epoch": revoked.epoch,
        "revocation_version": revoked.version,
        "kind": str(kind),
        "value": value,
        "created_at": revoked.created_at.isoformat(),
        "expires_at": None if revoked.expires_at is None else revoked.expires_at.isoformat(),
    }
    lines = [f"revoked: {kind} {value}, as version {revoked.version}, in force {until}"]
    if spread is not None:
        result["spread"] = _spread_to_json(spread)
        lines.append(_spread_line(spread))
    show(result, lines, as_json=as_json)
    if not all_have_it:
        raise SystemExit(_not_yet(spread, timeout))


def _target(given: dict[str, str], *, block: bool, lift: bool) -> tuple[RevocationKind, str, datetime | None]:
    """Return what is to be revoked, and its end where that is known. Raises `ConfigError`."""
    if len(given) != 1:
        msg = f"give one of --jti, --subject, --certificate and --root, not {len(given)} of them"
        raise ConfigError(msg)
    ((option, text),) = given.items()
    if (block or lift) and option != "--subject":
        msg = f"--{'block' if block else 'lift'} goes with --subject"
        raise ConfigError(msg)
    if block and lift:
        msg = "--block and --lift: give one of them"
        raise ConfigError(msg)
    if option == "--subject":
        kind = RevocationKind.BLOCK if block else RevocationKind.LIFT if lift else RevocationKind.SUBJECT
        return kind, subject_of(text), None
    if option == "--certificate":
        return RevocationKind.CERTIFICATE, *_certificate(text)
    return RevocationKind.TOKEN if option == "--jti" else RevocationKind.ROOT, token_id_of(text, option), None


def _certificate(text: str) -> tuple[str, datetime | None]:
    name = certificate_name(text)
    if name is not None:
        return name, None
    try:
        with Path(text).open("rb") as file:
            found = certificate_in_pem(file.read(_MAX_PEM))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no PEM certificate in it"
        msg = f"--certificate {text[:200]}: {reason}; give a PEM file, or a SHA-256 thumbprint in hex or base64url"
        raise ConfigError(msg) from error
    return found.name, found.not_after


def _follow(client: AdminClient, revoked: Revoked, timeout: timedelta) -> tuple[SpreadSeen | None, bool]:
    """Return how far it has spread once every live verifier has it, or time is over. Tells of progress on the way.

    A broker that cannot be asked meanwhile is asked again: what was revoked stays so.
    """
    started = told_at = time.monotonic()
    spread: SpreadSeen | None = None
    while True:
        try:
            spread = client.spread(revoked)
        except AdminUnavailableError as error:
            trouble: str | None = str(error)
        else:
            trouble = None
            if spread.acknowledged >= spread.live:
                return spread, True
        now = time.monotonic()
        if now - started > timeout.total_seconds():
            return spread, False
        if now - told_at >= _TELL_EVERY:
            told_at = now
            has_it = "" if spread is None else f"{spread.acknowledged} of {spread.live} live verifiers have it"
            click.echo(trouble or has_it, err=True)
        time.sleep(_LOOK_EVERY)


def _not_yet(spread: SpreadSeen | None, timeout: timedelta) -> int:
    """Say who has not acknowledged the revocation, and return the exit code."""
    if spread is None:
        complain(f"the broker did not say who has it within {format_duration(timeout)}; it is durable all the same")
        return NOT_YET
    for line in told_verifiers(spread.missing):
        click.echo(f"missing: {line}", err=True)
    complain(
        f"{spread.live - spread.acknowledged} of {spread.live} live verifiers have not acknowledged it within"
        f" {format_duration(timeout)}. It is durable: each takes it as soon as it can, or refuses all tokens once its"
        " max_staleness is over"
    )
    return NOT_YET


def _spread_line(spread: SpreadSeen) -> str:
    told = f"{spread.acknowledged} of {spread.live} live verifiers have it"
    if spread.p50 is None or spread.p99 is None or spread.slowest is None:
        return told
    times = f"p50 {_ms(spread.p50)}, p99 {_ms(spread.p99)}, slowest {_ms(spread.slowest)}"
    return f"{told}; from durable to acknowledged: {times}"


def _spread_to_json(spread: SpreadSeen) -> dict[str, Any]:
    times = {"p50": spread.p50, "p99": spread.p99, "slowest": spread.slowest}
    return {
        "live": spread.live,
        "acknowledged": spread.acknowledged,
        **{f"{name}_seconds": None if at is None else at.total_seconds() for name, at in times.items()},
        "missing": [verifier_to_json(verifier) for verifier in spread.missing],
    }


def _ms(duration: timedelta) -> str:
    return f"{duration / timedelta(milliseconds=1):.1f} ms"
