"""The gRPC servers: limits on all that a peer can send, and mutual TLS whose files can be swapped.

gRPC asks for the TLS configuration at each handshake, under a lock, and uses it after it has let go of the lock
(github.com/grpc/grpc/issues/36693). A configuration that another handshake replaces in between is used after it was
freed: a hundred clients that connect at the same time, strangers among them, end the process. So a configuration is
replaced only when nobody has asked for one in the last half second. In a quiet broker that is at each handshake; in a
busy one handshakes are held back for half a second when the files have changed, and every ten minutes.

A new configuration is also what keeps TLS sessions from being resumed: one of an earlier configuration finds no cache.
So a session can be resumed in a burst of handshakes, and for ten minutes at most. Each call on a resumed connection is
judged by the certificate that it brings back, like those of any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, cast

import grpc

from carnet.errors import ConfigError
from carnet_broker.edges.grpc.unknown_methods import guarded_against_unknown_methods

__all__ = ["ListenerLimits", "TlsPems", "bind", "new_server", "server_credentials"]


_SETTLED_AFTER: Final = 0.5
_LOOK_AGAIN_AFTER: Final = 0.02
_REPLACED_AFTER: Final = 600.0
"""Seconds; the longest that a configuration is kept, and so the longest that a session of it can be resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerLimits:
    """The bounds of one listener."""

    max_message_bytes: int = 64 * 1024
    max_metadata_bytes: int = 16 * 1024
    max_streams_per_connection: int = 128
    max_concurrent_calls: int = 4096
    """Of all callers. One that is stuck costs about 26 KB."""
    max_waiting_calls: int = 16_384
    """Calls that this process has not looked at yet; gRPC cancels those beyond half of it, more and more of them."""
    max_connections: int = 10_000
    handshake_timeout: timedelta = timedelta(seconds=5)
    connection_age: timedelta = timedelta(minutes=30)
    connection_age_grace: timedelta = timedelta(seconds=30)
    connection_idle: timedelta = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class TlsPems:
    """What a handshake is made with. PEM."""

    private_key: bytes
    certificate_chain: bytes
    client_ca: bytes

    def __repr__(self) -> str:
        return "TlsPems(...)"


class _Configurations:
    """What gRPC asks for at each handshake of one listener, never for two at once."""

    def __init__(
        self, pems: Callable[[], TlsPems], *, mono: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._pems = pems
        self._mono = mono
        self._sleep = sleep
        self._served = pems()
        self._asked_at = self._replaced_at = mono()

    @property
    def first(self) -> grpc.ServerCertificateConfiguration:
        """The configuration to begin with."""
        return _configuration(self._served)

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """Return a new configuration, or None to go on with the one that is there."""
        current = self._pems()
        is_due = current != self._served or self._mono() - self._replaced_at >= _REPLACED_AFTER
        # Whoever asked before us needs microseconds to be through. Waking up often gives its thread the processor also
        # where there is little of it; those who come after us wait for us.
        while is_due and not self._is_settled():
            self._sleep(_LOOK_AGAIN_AFTER)
        is_settled, self._asked_at = self._is_settled(), self._mono()
        if not is_settled:
            return None
        self._served, self._replaced_at = current, self._asked_at
        return _configuration(current)

    def _is_settled(self) -> bool:
        """Say whether nobody can be between asking for a configuration and using it."""
        return self._mono() - self._asked_at >= _SETTLED_AFTER


def _configuration(pems: TlsPems) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pems.private_key, pems.certificate_chain)], pems.client_ca)


def server_credentials(pems: Callable[[], TlsPems]) -> grpc.ServerCredentials:
    """Return credentials for one listener, which follow `pems` and require a client certificate."""
    configurations = _Configurations(pems, mono=time.monotonic, sleep=time.sleep)
    # The stubs do not know that None means unchanged.
    fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", configurations)
    return grpc.dynamic_ssl_server_credentials(configurations.first, fetch, require_client_authentication=True)


def new_server(limits: ListenerLimits) -> grpc.aio.Server:
    """Return a server; to be called inside the loop that will run it."""
    with guarded_against_unknown_methods():
        return grpc.aio.server(
            options=_options(limits),
            maximum_concurrent_rpcs=limits.max_concurrent_calls,
        )


def bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials, *, setting: str) -> int:
    """Bind `server` to `address`, and return the port. Raises `ConfigError` that names `setting`."""
    try:
        port: int = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        msg = f"{setting}: cannot listen on {address}: is the port taken by another process? ({error})"
        raise ConfigError(msg) from error
    if port == 0:
        msg = f"{setting}: cannot listen on {address}: give a free port of an address of this host"
        raise ConfigError(msg)
    return port


def _options(limits: ListenerLimits) -> list[tuple[str, Any]]:
    def milliseconds(duration: timedelta) -> int:
        return round(duration / timedelta(milliseconds=1))

    return [
        # By default a second server could bind the same port, and take half of the connections, without a word.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.http2.lookahead_bytes", limits.max_message_bytes),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
        ("grpc.server.max_pending_requests", limits.max_waiting_calls // 2),
        ("grpc.server.max_pending_requests_hard_limit", limits.max_waiting_calls),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", milliseconds(limits.handshake_timeout)),
        ("grpc.max_connection_age_ms", milliseconds(limits.connection_age)),
        ("grpc.max_connection_age_grace_ms", milliseconds(limits.connection_age_grace)),
        ("grpc.max_connection_idle_ms", milliseconds(limits.connection_idle)),
        # A client may ping an idle connection each 10 s, not faster; a third ping too early ends the connection.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    ]
