"""``carnet-broker keys``: what CI and breakglass do to the signing keys, through Vault, or a broker's admin port."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import click

from carnet.durations import format_duration
from carnet.errors import ConfigError
from carnet_broker.cli.admin import (
    REFUSED,
    admin_errors,
    admin_option,
    status_lines,
    status_to_json,
)
from carnet_broker.cli.output import cli_errors, complain, json_option, show
from carnet_broker.cli.spans import DurationType, about, moment_and_distance
from carnet_broker.core.keyring import Keyring
from carnet_broker.core.keyring_document import keyring_of_content
from carnet_broker.core.requests import RequestKind, RequestResult, RequestStatus
from carnet_broker.edges.grpc.admin_client import ADMIN, AdminClient
from carnet_broker.edges.vault import (
    RotationClient,
    SecretFile,
    SecretValue,
    VaultSession,
    VaultSettingError,
    VaultSettings,
)
from carnet_broker.ports import KeyStoreUnavailableError

__all__ = ["keys"]

NO_ANSWER: Final = 4
_LOOK_EVERY: Final = 0.25
_NAMES: Final = {
    "address": "VAULT_ADDR",
    "namespace": "VAULT_NAMESPACE",
    "environment": "CARNET_ENVIRONMENT (--env)",
    "transit_key": "CARNET_ENVIRONMENT (--env)",
    "kv_mount": "--kv-mount",
    "approle_mount": "--approle-mount",
}
"""What the settings of Vault are called here."""


def _vault_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which Vault, and who we are there."""
    for option in reversed(
        (
            click.option("--vault-addr", envvar="VAULT_ADDR", show_envvar=True, help="URL of Vault or OpenBao."),
            click.option(
                "--vault-cacert",
                type=click.Path(path_type=Path),
                envvar="VAULT_CACERT",
                show_envvar=True,
                help="PEM file of the CAs that vouch for Vault.",
            ),
            click.option("--vault-namespace", envvar="VAULT_NAMESPACE", show_envvar=True, help="Vault namespace."),
            click.option("--role-id", envvar="VAULT_ROLE_ID", show_envvar=True, help="AppRole role id."),
            click.option(
                "--secret-id-file",
                type=click.Path(path_type=Path),
                envvar="VAULT_SECRET_ID_FILE",
                show_envvar=True,
                help="File with the AppRole secret id; or set VAULT_SECRET_ID.",
            ),
            click.option(
                "--env",
                "environment",
                envvar="CARNET_ENVIRONMENT",
                show_envvar=True,
                default="prod",
                show_default=True,
                help="The environment whose keys are meant.",
            ),
            click.option("--kv-mount", default="carnet", show_default=True, help="Mount of the KV v2 engine."),
            click.option("--approle-mount", default="approle", show_default=True, help="Mount of AppRole."),
        )
    ):
        command = option(command)
    return command


def _client(
    *,
    vault_addr: str | None,
    vault_cacert: Path | None,
    vault_namespace: str | None,
    role_id: str | None,
    secret_id_file: Path | None,
    environment: str,
    kv_mount: str,
    approle_mount: str,
) -> RotationClient:
    """Return the requester's side of the letter box. Raises `ConfigError` that names the missing variable."""
    import os

    if not vault_addr:
        msg = "VAULT_ADDR is not set: set it to the URL of Vault, for instance https://vault.example:8200"
        raise ConfigError(msg)
    if not role_id:
        msg = "VAULT_ROLE_ID is not set: set it to the role id of carnet-ci (or carnet-breakglass)"
        raise ConfigError(msg)
    # Not an option: an argument of a command can be read by every process of the machine.
    secret_id = os.environ.get("VAULT_SECRET_ID")
    if secret_id_file is None and not secret_id:
        msg = "VAULT_SECRET_ID_FILE is not set: set it to the file with the AppRole secret id, or set VAULT_SECRET_ID"
        raise ConfigError(msg)
    try:
        settings = VaultSettings(
            address=vault_addr,
            ca_file=vault_cacert,
            namespace=vault_namespace,
            environment=environment,
            kv_mount=kv_mount,
            approle_mount=approle_mount,
            role_id=SecretValue("VAULT_ROLE_ID", role_id),
            secret_id=SecretFile(secret_id_file) if secret_id_file else SecretValue("VAULT_SECRET_ID", secret_id or ""),
        )
    except VaultSettingError as error:
        msg = f"{_NAMES[error.field]}: {error}"
        raise ConfigError(msg) from error
    _check_files(settings)
    return RotationClient(VaultSession(settings))


def _check_files(settings: VaultSettings) -> None:
    """Read what the variables name, once. Raises `ConfigError` that names the variable."""
    try:
        settings.check_files()
    except ConfigError as error:
        # Each message begins with the name of the variable, or of the file that a variable names.
        file = {str(settings.ca_file): "VAULT_CACERT: "}
        if isinstance(settings.secret_id, SecretFile):
            file[str(settings.secret_id.path)] = "VAULT_SECRET_ID_FILE: "
        name = next((name for path, name in file.items() if str(error).startswith(path)), "")
        msg = f"{name}{error}"
        raise ConfigError(msg) from error


@click.group(no_args_is_help=False)
def keys() -> None:
    """Rotate and revoke the signing keys, and see how they stand.

    Speaks to Vault by AppRole (VAULT_ADDR, VAULT_ROLE_ID, VAULT_SECRET_ID_FILE): the brokers find the request in Vault,
    and answer there. With CARNET_ADMIN, `revoke` asks a broker in place of Vault, and `status` asks it as well.
    """


@keys.command()
@click.option("--if-older-than", type=DurationType(), help="Do nothing if the signing key is younger than this.")
@click.option("--wait", is_flag=True, help="Return when the new key signs, not when the request is accepted.")
@click.option("--now", is_flag=True, help="Do not wait for verifiers. Needs the carnet-breakglass role.")
@click.option(
    "--timeout",
    type=DurationType(),
    default="30m",
    show_default=True,
    help="How long to wait for the new key with --wait.",
)
@click.option(
    "--answer-within",
    type=DurationType(),
    default="1m",
    show_default=True,
    help="How long to wait for a broker's answer.",
)
@_vault_options
@json_option
@cli_errors
def rotate(
    *,
    if_older_than: timedelta | None,
    wait: bool,
    now: bool,
    timeout: timedelta,
    answer_within: timedelta,
    as_json: bool,
    **vault: Any,  # noqa: ANN401 - the options of `_client`, which names their types
) -> None:
    """Ask the brokers for a new signing key.

    Safe to run twice at once: requests that are made while a rotation is under way join it.

    Exit code: 0 done (or accepted, without --wait; or not needed, with --if-older-than), 2 bad input or a role that may
    not, 3 refused by the brokers, 4 no answer in time: the request stands, and may be carried out later.
    """
    client = _client(**vault)
    try:
        if if_older_than is not None:
            age = _active_age(client.keyring())
            if age is not None and age < if_older_than:
                text = f"not needed: the signing key is {about(age)} old"
                show({"status": "not-needed", "age_seconds": int(age.total_seconds())}, (text,), as_json=as_json)
                return
    except KeyStoreUnavailableError as error:
        raise _no_answer(error) from None
    kind = RequestKind.ROTATE_NOW if now else RequestKind.ROTATE
    _ask(client, kind, wait=wait, timeout=timeout, answer_within=answer_within, as_json=as_json)


# One in 64 keys has a name that begins with "-": it is an argument all the same.
@keys.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@click.argument("kid")
@click.option(
    "--timeout", type=DurationType(), default="1m", show_default=True, help="How long to wait for a broker to do it."
)
@click.option(
    "--via",
    type=click.Choice(["vault", "admin"]),
    help="Through Vault, or a broker's admin port.  [default: admin if CARNET_ADMIN is set, else vault]",
)
@admin_option
@_vault_options
@json_option
@cli_errors
@admin_errors
def revoke(
    *,
    kid: str,
    timeout: timedelta,
    via: str | None,
    admin: str | None,
    as_json: bool,
    **vault: Any,  # noqa: ANN401 - as above
) -> None:
    """Stop trusting the key KID at once; `keys status` lists the keys.

    Through Vault it needs the carnet-breakglass role; through a broker (CARNET_ADMIN) the certificate of an admin.

    If KID is the key that signs, the standby takes over in the same step. Verifiers that are pushed to refuse what KID
    has signed within moments; those that poll when they fetch the key set again: within the max-age that brokers serve
    (keys.max_age).

    Exit code: 0 revoked, 1 the broker cannot be asked, or not now, 2 bad input or a role that may not, 3 refused by the
    brokers (no such key, or no admin), 4 no answer in time: the request stands.
    """
    if via == "admin" or (via is None and _asks_admin(admin)):
        with AdminClient(admin) as broker:
            generation, active = broker.revoke_key(kid)
        text = f"done: the key is revoked, as generation {generation}; now signs {active or 'none'}"
        show({"status": "done", "generation": generation, "active_kid": active}, (text,), as_json=as_json)
        return
    client = _client(**vault)
    _ask(client, RequestKind.REVOKE, kid, wait=True, timeout=timeout, answer_within=timeout, as_json=as_json)


def _asks_admin(admin: str | None) -> bool:
    """Say whether there is a broker to be asked. Raises `ConfigError` where that is set to nothing."""
    return ADMIN.find(admin) is not None


def _ask(
    client: RotationClient,
    kind: RequestKind,
    kid: str | None = None,
    *,
    wait: bool,
    timeout: timedelta,
    answer_within: timedelta,
    as_json: bool,
) -> None:
    """Submit a request, follow it, and print the answer. Exits with REFUSED or NO_ANSWER where it is not a good one."""
    try:
        request_id = client.submit(kind, kid)
        result = _follow(client, request_id, wait=wait, timeout=timeout, answer_within=answer_within)
    except KeyStoreUnavailableError as error:
        raise _no_answer(error) from None
    if result is None:
        complain(
            f"no broker answered request {request_id} within {format_duration(answer_within)}: is one running?"
            " The request stands."
        )
        raise SystemExit(NO_ANSWER)
    answer = {"status": str(result.status), "reason": result.reason, "message": result.message, "request": request_id}
    show(answer | {"detail": result.detail}, (f"{result.status}: {result.message}",), as_json=as_json)
    if result.status is RequestStatus.REFUSED:
        raise SystemExit(REFUSED)
    if wait and result.status is not RequestStatus.DONE:
        complain(f"not done within {format_duration(timeout)}; the request {request_id} stands")
        raise SystemExit(NO_ANSWER)


def _follow(
    client: RotationClient, request_id: str, *, wait: bool, timeout: timedelta, answer_within: timedelta
) -> RequestResult | None:
    """Return the newest answer once it is final, or good enough, or time is over. Tells of progress on the way.

    A Vault that fails meanwhile is asked again, for the request stands. Raises `KeyStoreUnavailableError` where it
    still fails when time is over.
    """
    started = time.monotonic()
    told: str | None = None
    result: RequestResult | None = None
    while True:
        elapsed = timedelta(seconds=time.monotonic() - started)
        try:
            result = client.result(request_id)
        except KeyStoreUnavailableError as error:
            if elapsed > (answer_within if result is None else timeout):
                msg = f"{error}; the request {request_id} stands"
                raise KeyStoreUnavailableError(msg) from error
            time.sleep(_LOOK_EVERY)
            continue
        if result is None:
            if elapsed > answer_within:
                return None
        elif result.status is not RequestStatus.ACCEPTED or not wait or elapsed > timeout:
            return result
        elif (progress := _progress(result)) != told:
            told = progress
            click.echo(progress, err=True)
        time.sleep(_LOOK_EVERY)


def _progress(result: RequestResult) -> str:
    """Return what an accepted request waits for: until when, and for whom."""
    detail = result.detail
    text = result.message
    if not_before := detail.get("not_before"):
        text += f" (from {not_before})"
    if deadline := detail.get("deadline"):
        text += f" (or at {deadline} without those that lag)"
    named = detail.get("waiting_for") or []
    lines = [text, *(f"  waiting for {name}" for name in named)]
    if (unnamed := detail.get("missing", 0) - len(named)) > 0:
        lines.append(f"  and for {unnamed} more")
    return "\n".join(lines)


@keys.command()
@admin_option
@_vault_options
@json_option
@cli_errors
@admin_errors
def status(*, admin: str | None, as_json: bool, **vault: Any) -> None:  # noqa: ANN401 - as above
    """Show every signing key: its state, its age, and what comes next.

    With CARNET_ADMIN also the brokers, and which live verifiers have loaded what: those that lag first.

    Exit code: 0, 1 the broker cannot be asked, or not now, 2 bad input or a role that may not, 3 no admin, 4 Vault
    cannot be asked.
    """
    client = _client(**vault)
    try:
        content = client.keyring()
        keyring = _keyring(content)
    except KeyStoreUnavailableError as error:
        raise _no_answer(error) from None
    now = datetime.now(UTC)
    lines = [f"{keyring.issuer}: generation {keyring.generation}, keys in {content['store']}"]
    for key in keyring.keys:
        moments = {
            "created": key.created_at,
            "active since": key.activated_at,
            "signs until": key.sign_until if key.retired_at is None and key.ended_at is None else None,
            "published until": key.keep_until if key.ended_at is None else None,
            "ended": key.ended_at,
        }
        told = ", ".join(f"{name} {moment_and_distance(at, now)}" for name, at in moments.items() if at is not None)
        lines.append(f"  {key.state:<8} {key.kid}  {told}")
    if _asks_admin(admin):
        with AdminClient(admin) as broker:
            seen = broker.status()
        content = content | {"brokers": status_to_json(seen)}
        lines += status_lines(seen)
    show(content, lines, as_json=as_json)


def _no_answer(error: KeyStoreUnavailableError) -> SystemExit:
    """Say why Vault gives no answer, and return how to end: unlike bad input, the same may work later."""
    complain(f"VAULT_ADDR: {error}")
    return SystemExit(NO_ANSWER)


def _keyring(content: dict[str, Any]) -> Keyring:
    """Read the document as it names itself: whoever looks at it has no configuration to hold it against."""
    return keyring_of_content(content, issuer=str(content.get("issuer")), store=str(content.get("store")))


def _active_age(content: dict[str, Any]) -> timedelta | None:
    active = _keyring(content).active
    if active is None or active.activated_at is None:
        return None
    return datetime.now(UTC) - active.activated_at
