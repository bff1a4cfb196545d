"""The broker's configuration: one YAML file, read once, strictly. An unknown key is an error with file and line.

There are no environment overrides: what a broker does can be read from its file. Secrets are not in it; it names the
files that hold them.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Final, Literal

import pydantic

from carnet.claims import is_name
from carnet.durations import parse_duration
from carnet.errors import ConfigError
from carnet_broker.core.keyring import Timing
from carnet_broker.core.marked_yaml import Duration, Section, read_yaml, validate
from carnet_broker.edges.grpc.settled import SETTLED_AFTER

__all__ = ["BrokerConfig", "host_and_port", "is_loopback", "load_config"]


def _duration_or_zero(value: object) -> timedelta:
    if value == "0" or (type(value) is int and value == 0):  # type(): False is an int to isinstance.
        return timedelta(0)
    if not isinstance(value, str):
        msg = "this must be a duration or 0; write for instance 90s, 10m or 0"
        raise ValueError(msg)  # noqa: TRY004 - pydantic collects ValueError only.
    return parse_duration(value)


_HOST: Final = re.compile(r"[A-Za-z0-9._-]{1,253}")
_PORT: Final = re.compile(r"[0-9]{1,5}")

DurationOrZero = Annotated[timedelta, pydantic.PlainValidator(_duration_or_zero)]


def _address(value: object) -> str:
    if isinstance(value, str):
        host, _, port = value.rpartition(":")
        if _is_host(host) and _PORT.fullmatch(port) and int(port) <= 65_535:  # noqa: PLR2004
            return value
    msg = f"{value!r:.80} is no address; write host:port, for instance 0.0.0.0:8443 or [::1]:8443 (port 0: any free)"
    raise ValueError(msg)


def _is_host(host: str) -> bool:
    """Say whether `host` is a name, an IPv4 address, or an IPv6 address in brackets (RFC 3986 section 3.2.2)."""
    if not (host.startswith("[") and host.endswith("]")):
        return _HOST.fullmatch(host) is not None
    try:
        ipaddress.IPv6Address(host[1:-1])
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Say whether `host` is an address of this machine that others cannot reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Address = Annotated[str, pydantic.PlainValidator(_address)]


def host_and_port(address: str) -> tuple[str, int]:
    """Return the host, without brackets, and the port of a checked address."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


class Listeners(Section):
    """Where the broker listens."""

    tokens: Address = "127.0.0.1:8443"
    trust: Address = "127.0.0.1:8444"
    plain: Address = "127.0.0.1:8080"
    admin: Address = "127.0.0.1:8445"
    admin_beyond_loopback: bool = False
    """Whether `admin` may be bound to an address that others can reach; then the policy must have admins."""


class TlsFiles(Section):
    """The broker's own certificate, and whom it trusts. PEM files, watched: a renewed file needs no restart."""

    certificate_file: Path
    key_file: Path
    client_ca_file: Path
    crl_files: tuple[Path, ...] = ()
    max_leaf_life: Duration = timedelta(days=90)


class VaultConfig(Section):
    """HashiCorp Vault or OpenBao."""

    address: str
    ca_file: Path | None = None
    namespace: str | None = None
    role_id_file: Path
    secret_id_file: Path
    environment: str
    """The prefix of this environment's paths, for instance prod."""
    kv_mount: str = "carnet"
    transit_mount: str = "transit"
    transit_key: str | None = None
    """Default: carnet-ENVIRONMENT."""
    approle_mount: str = "approle"
    timeout: Duration = timedelta(seconds=5)
    """For one operation as a whole."""
    sign_within: Duration = timedelta(seconds=2)
    """How long a caller waits for a signature of Transit before it is told that there is none."""
    poll_interval: Duration = timedelta(seconds=5)
    start_within: Duration = timedelta(seconds=10)
    """How long the broker, when it starts, waits for a Vault that does not answer."""

    @pydantic.field_validator("address")
    @classmethod
    def _is_url(cls, value: str) -> str:
        # The whole host, not how it begins: 127.0.0.1.example is not this machine.
        if re.fullmatch(r"https://.+|http://(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?/?", value) is None:
            msg = f"{value!r:.80} is not an https URL; plain http is for loopback only"
            raise ValueError(msg)
        return value


class StoreConfig(Section):
    """The shared store: SQLite for the brokers of one host, PostgreSQL for more."""

    url: str
    password_file: Path | None = None
    poll_interval: Duration = timedelta(seconds=1)
    """How often the store is looked at though nothing has told of a change."""
    lease: Duration = timedelta(seconds=15)
    """How long this broker counts as running after it last said so."""
    timeout: Duration = timedelta(seconds=5)
    """For one transaction as a whole."""
    start_within: Duration = timedelta(seconds=10)
    """How long the broker, when it starts, waits for a store that does not answer."""
    verifier_sessions: Annotated[int, pydantic.Field(gt=0)] = 200
    """Verifiers of one workload that rotations wait for."""

    @pydantic.field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        # The text may hold a password, so it is not shown.
        if re.fullmatch(r"sqlite:////.+|postgres(ql)?://.+", value) is None:
            msg = "this is no URL of a store; write sqlite:////absolute/path or postgresql://user@host:port/database"
            raise ValueError(msg)
        return value


class TrustConfig(Section):
    """The stream that tells verifiers of keys and revocations."""

    heartbeat: Duration = timedelta(seconds=15)
    """The longest time between two responses to a verifier."""
    max_staleness: Duration = timedelta(minutes=5)
    """How old what a broker knows may be before it tells nobody any more, and issues nothing."""


class KeysConfig(Section):
    """Where the signing keys live, and the timing of their rotation."""

    store: Literal["kv", "transit"] = "kv"
    max_age: Duration = timedelta(minutes=5)
    poller_interval: DurationOrZero = timedelta(minutes=10)
    replica_lag: Duration = timedelta(seconds=15)
    skew: DurationOrZero = timedelta(seconds=5)
    leeway: DurationOrZero = timedelta(seconds=30)
    island: Duration = timedelta(minutes=15)
    """How long a replica that cannot reach Vault goes on signing."""
    confirm_within: Duration = timedelta(seconds=60)
    """How old the last reading of Vault may be before the replica calls itself degraded."""
    sign_for: Duration = timedelta(days=7)
    rotate_every: Duration = timedelta(days=1)
    min_interval: DurationOrZero = timedelta(minutes=10)
    acknowledge_within: DurationOrZero = timedelta(minutes=15)
    """How long a rotation that is due waits for verifiers that have not loaded the key."""


class TokensConfig(Section):
    """The lives of tokens."""

    default_life: Duration = timedelta(minutes=5)
    longest_life: Duration = timedelta(hours=1)
    shortest_life: Duration = timedelta(seconds=30)


class AuditConfig(Section):
    """The audit files."""

    directory: Path
    durability: Literal["fsync", "write"] = "fsync"


class LimitsConfig(Section):
    """The bounds of what one peer can ask for."""

    tokens_per_second: Annotated[int, pydantic.Field(gt=0)] = 200
    """Tokens a second and workload, in the long run."""
    token_burst: Annotated[int, pydantic.Field(gt=0)] = 400
    key_sets_per_second: Annotated[int, pydantic.Field(gt=0)] = 50
    revocations_per_second: Annotated[int, pydantic.Field(gt=0)] = 5
    """Tokens that a workload may revoke a second, in the long run."""
    revocation_burst: Annotated[int, pydantic.Field(gt=0)] = 50
    calls_in_flight: Annotated[int, pydantic.Field(gt=0)] = 256
    """Calls of one workload, on one listener, that are not over."""
    streams: Annotated[int, pydantic.Field(gt=0)] = 256
    """Streams of one workload: verifiers that watch."""
    connections: Annotated[int, pydantic.Field(gt=0)] = 10_000
    """Connections to one listener, about 80 KB each."""
    read_within: Duration = timedelta(seconds=5)
    """How long a caller may take to send its request."""
    handshake_timeout: Duration = timedelta(seconds=5)
    connection_age: Duration = timedelta(minutes=30)
    drain: Duration = timedelta(seconds=10)
    """How long calls under way may take at shutdown."""

    @pydantic.field_validator("handshake_timeout")
    @classmethod
    def _outlasts_a_replacement(cls, value: timedelta) -> timedelta:
        # A handshake may have to wait for so long where the files have changed.
        if value <= timedelta(seconds=SETTLED_AFTER):
            msg = "handshake_timeout must be longer than half a second; give 2s or more"
            raise ValueError(msg)
        return value


class LogConfig(Section):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["json", "text"] = "json"
    lines_per_second: Annotated[int, pydantic.Field(gt=0)] = 10
    """Lines about refused calls of one workload, about those of all that are not authenticated, and of a library."""


class BrokerConfig(Section):
    """The whole file."""

    issuer: str
    """The issuer of this environment; the policy has to name the same."""
    policy_file: Path
    tls: TlsFiles
    vault: VaultConfig
    audit: AuditConfig
    store: StoreConfig
    listen: Listeners = Listeners()
    keys: KeysConfig = KeysConfig()
    trust: TrustConfig = TrustConfig()
    tokens: TokensConfig = TokensConfig()
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()

    @pydantic.field_validator("issuer")
    @classmethod
    def _is_issuer(cls, value: str) -> str:
        if not (is_name(value) and value.startswith("https://")):
            msg = f"{value!r:.80} is not an https URL; give the issuer of this environment"
            raise ValueError(msg)
        return value

    @pydantic.field_validator("listen")
    @classmethod
    def _is_private(cls, value: Listeners) -> Listeners:
        host = host_and_port(value.plain)[0]
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            address = None
        if host != "localhost" and (address is None or not (address.is_private or address.is_unspecified)):
            msg = f"plain: {host} is not a loopback or private address; the plain port has no TLS"
            raise ValueError(msg)
        return value

    @pydantic.field_validator("listen")
    @classmethod
    def _is_guarded(cls, value: Listeners) -> Listeners:
        host = host_and_port(value.admin)[0]
        if not (value.admin_beyond_loopback or is_loopback(host)):
            msg = f"admin: {host} is not a loopback address; set admin_beyond_loopback: true if others are to reach it"
            raise ValueError(msg)
        return value

    @pydantic.model_validator(mode="after")
    def _fits(self) -> BrokerConfig:
        tokens = self.tokens
        if not tokens.shortest_life <= tokens.default_life <= tokens.longest_life:
            msg = "tokens: shortest_life <= default_life <= longest_life does not hold; correct them"
            raise ValueError(msg)
        if self.vault.poll_interval > self.keys.replica_lag:
            msg = "vault.poll_interval must not be longer than keys.replica_lag; correct one of them"
            raise ValueError(msg)
        if self.trust.heartbeat * 2 > self.trust.max_staleness:
            msg = "trust.max_staleness must be at least twice trust.heartbeat; correct one of them"
            raise ValueError(msg)
        if self.store.poll_interval * 3 > self.store.lease:
            msg = "store.lease must be at least three times store.poll_interval; correct one of them"
            raise ValueError(msg)
        self.timing()
        return self

    def timing(self) -> Timing:
        """Return the durations that rotation rests on. Raises `ValueError` where they contradict each other."""
        keys = self.keys
        return Timing(
            max_age=keys.max_age,
            poller_interval=keys.poller_interval,
            replica_lag=keys.replica_lag,
            skew=keys.skew,
            leeway=keys.leeway,
            longest_life=self.tokens.longest_life,
            island=keys.island,
            sign_for=keys.sign_for,
            rotate_every=keys.rotate_every,
            min_interval=keys.min_interval,
            acknowledge_within=keys.acknowledge_within,
        )


def load_config(path: Path) -> BrokerConfig:
    """Return the configuration in `path`; relative paths in it count from its directory.

    Raises `ConfigError` that names file, line, what is wrong and what to do.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); give the broker's configuration with --config FILE"
        raise ConfigError(msg) from error
    config = validate(BrokerConfig, read_yaml(text, str(path)))
    return _anchored(config, path.parent)


def _anchored(section: BrokerConfig, directory: Path) -> BrokerConfig:
    """Return the configuration with every relative path made relative to `directory`."""

    def anchor(value: object) -> object:
        if isinstance(value, Path):
            return directory / value
        if isinstance(value, tuple):
            return tuple(anchor(item) for item in value)
        if isinstance(value, Section):
            return value.model_copy(update={name: anchor(getattr(value, name)) for name in type(value).model_fields})
        return value

    anchored = anchor(section)
    assert isinstance(anchored, BrokerConfig)  # noqa: S101 - a model's copy is of its class
    return anchored
