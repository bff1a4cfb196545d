"""The settings of the SDK: explicit argument, then environment, then default.

Each setting is one `Variable`. A variable that is set to nothing is an error, not "unset": an empty value in a manifest
is a mistake that a default would hide. Errors have one form and name what to set::

    CARNET_BROKER is not set: give brokers=... or set it to host:port[,host:port]
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from carnet.claims import is_name
from carnet.endpoints import Target, is_dns_name, parse_targets
from carnet.errors import ConfigError, InvalidIdentityError
from carnet.identity import Identity, StrPath, load_ca_file
from carnet.spiffe import SpiffeID, server_dns_name

__all__ = [
    "AUDIENCE",
    "BROKER",
    "BROKER_NAME",
    "CACHE_DIR",
    "CA_FILE",
    "CERT_FILE",
    "ISSUER",
    "KEY_FILE",
    "TRUST",
    "Environment",
    "Variable",
    "audience",
    "broker_name",
    "ca_pem",
    "cache_dir",
    "identity",
    "issuer",
    "targets",
]

Environment = Mapping[str, str]
"""Names and values; `os.environ` wherever none is given."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting: the environment variable, the argument that goes before it, and what a value looks like."""

    name: str
    argument: str
    form: str

    def find(self, given: str | None, environ: Environment | None = None) -> str | None:
        """Return the value, None where neither argument nor variable is set. Raises `ConfigError` for an empty one."""
        value = (os.environ if environ is None else environ).get(self.name) if given is None else given
        if value is not None and not value.strip():
            msg = f"{self.source(given)} is empty: set it to {self.form}, or leave it out"
            raise ConfigError(msg)
        return value

    def require(self, given: str | None, environ: Environment | None = None) -> str:
        """Return the value. Raises `ConfigError` where there is none, or an empty one."""
        value = self.find(given, environ)
        if value is None:
            msg = f"{self.name} is not set: give {self.argument}=... or set it to {self.form}"
            raise ConfigError(msg)
        return value

    def source(self, given: object) -> str:
        """Return the name by which an error speaks of the value: that of the argument if one was given."""
        return self.name if given is None else self.argument


BROKER: Final = Variable("CARNET_BROKER", "brokers", "host:port[,host:port]")
TRUST: Final = Variable("CARNET_TRUST", "trust", "host:port[,host:port]")
BROKER_NAME: Final = Variable("CARNET_BROKER_NAME", "broker_name", "the DNS name in the broker's certificate")
CERT_FILE: Final = Variable("CARNET_CERT_FILE", "cert_file", "the PEM file of your certificate and its chain")
KEY_FILE: Final = Variable("CARNET_KEY_FILE", "key_file", "the PEM file of your private key")
CA_FILE: Final = Variable("CARNET_CA_FILE", "ca_file", "the PEM file of the authorities that you trust")
ISSUER: Final = Variable(
    "CARNET_ISSUER", "issuer", "the issuer in the broker's policy, for instance https://tokens.prod.example"
)
AUDIENCE: Final = Variable("CARNET_AUDIENCE", "audience", "the name of your service in the broker's policy")

CACHE_DIR: Final = Variable("CARNET_CACHE_DIR", "state_dir", "a directory of your own, which nobody else may open")


def targets(
    variable: Variable, given: str | Iterable[str] | None = None, environ: Environment | None = None
) -> tuple[Target, ...]:
    """Return the servers of `BROKER` or `TRUST`: a list of ``host:port``, or one text divided by commas.

    Raises `ConfigError`.
    """
    text = given if given is None or isinstance(given, str) else ",".join(given)
    value = variable.require(text, environ)
    try:
        return parse_targets(value)
    except ConfigError as error:
        msg = f"{variable.source(text)}: {error}"
        raise ConfigError(msg) from error


def identity(
    cert_file: StrPath | None = None, key_file: StrPath | None = None, environ: Environment | None = None
) -> Identity:
    """Load the identity in the files of `CERT_FILE` and `KEY_FILE`. Raises `ConfigError`.

    Both come from arguments or both from the environment: a mixture is a pair that does not belong together.
    """
    if (cert_file is None) != (key_file is None):
        given, missing = (CERT_FILE, KEY_FILE) if key_file is None else (KEY_FILE, CERT_FILE)
        msg = f"{given.argument}=... is given without {missing.argument}=...: give both, or neither"
        raise ConfigError(msg)
    return Identity.load(
        CERT_FILE.require(_text(cert_file), environ),
        KEY_FILE.require(_text(key_file), environ),
        cert_variable=CERT_FILE.name if cert_file is None else None,
        key_variable=KEY_FILE.name if key_file is None else None,
    )


def ca_pem(ca_file: StrPath | None = None, environ: Environment | None = None) -> bytes:
    """Load the authorities in the file of `CA_FILE`. Raises `ConfigError`."""
    path = CA_FILE.require(_text(ca_file), environ)
    return load_ca_file(path, variable=CA_FILE.name if ca_file is None else None)


def cache_dir(given: StrPath | None = None, environ: Environment | None = None) -> str | None:
    """Return the directory for what outlives a process, None where none is set. Raises `ConfigError` for no name."""
    return CACHE_DIR.find(_text(given), environ)


def issuer(given: str | None = None, environ: Environment | None = None) -> str:
    """Return the issuer whose tokens are good. Raises `ConfigError`: there is no default, and there must not be one."""
    return _name(ISSUER, given, environ)


def audience(given: str | None = None, environ: Environment | None = None) -> str:
    """Return the audience that this service is. Raises `ConfigError`."""
    return _name(AUDIENCE, given, environ)


def broker_name(given: str | None = None, *, workload: SpiffeID, environ: Environment | None = None) -> str:
    """Return the DNS name that the broker's certificate must carry. Raises `ConfigError` for what is no DNS name.

    The default is that of ``spiffe://DOMAIN/ns/carnet/sa/broker`` in the trust domain of `workload`. It does not depend
    on where the broker is reached, so whoever can change that cannot choose the name.
    """
    value = BROKER_NAME.find(given, environ)
    if value is None:
        return server_dns_name(SpiffeID(workload.trust_domain, ("ns", "carnet", "sa", "broker")))
    if is_dns_name(value):
        return value
    try:
        hint = f"{value[:80]} serves as {server_dns_name(SpiffeID.parse(value))}"
    except InvalidIdentityError:
        hint = f"set it to {BROKER_NAME.form}, without scheme and port"
    msg = f"{BROKER_NAME.source(given)} is {value[:80]!r}, which is no DNS name: {hint}"
    raise ConfigError(msg)


def _text(path: StrPath | None) -> str | None:
    return None if path is None else os.fspath(path)


def _name(variable: Variable, given: str | None, environ: Environment | None) -> str:
    value = variable.require(given, environ)
    if not is_name(value):
        msg = f"{variable.source(given)} is {value[:80]!r}, which no token can name: set it to {variable.form}"
        raise ConfigError(msg)
    return value
