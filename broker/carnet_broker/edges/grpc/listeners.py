"""The gRPC servers: limits on all that a peer can send, and mutual TLS whose files can be swapped.

When the TLS configuration is replaced, and what that is good for, is in `configurations`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, cast

import grpc

from carnet.errors import ConfigError
from carnet_broker.edges.grpc.configurations import Configurations, Keeping, TlsPems
from carnet_broker.edges.grpc.keeper import keepers_of
from carnet_broker.edges.grpc.unknown_methods import guarded_against_unknown_methods

__all__ = ["ListenerLimits", "MutualTls", "TlsPems", "bind", "connections_within", "new_server", "server_credentials"]

_MAX_KEEPERS: Final = 128
"""Of one listener; an eighth of its connections at most. With half a second for each, 256 replacements a second."""


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


def connections_within(descriptors: int) -> int:
    """Return how many connections a listener can have with so many descriptors; one to itself takes two of them."""
    return descriptors - min(_MAX_KEEPERS, descriptors // 9) - 1


class MutualTls:
    """The credentials of one listener, which follow `pems` and require a client certificate."""

    def __init__(self, pems: Callable[[], TlsPems], limits: ListenerLimits) -> None:
        self._may_keep = min(_MAX_KEEPERS, limits.max_connections // 8)
        keeping = Keeping(handshake_timeout=limits.handshake_timeout.total_seconds(), at_most=self._may_keep)
        self._configurations = Configurations(pems, keeping, mono=time.monotonic, sleep=time.sleep)
        # The stubs do not know that None means unchanged.
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", self._configurations)
        self.credentials = grpc.dynamic_ssl_server_credentials(
            self._configurations.first, fetch, require_client_authentication=True
        )

    def keep(self, host: str, port: int) -> None:
        """Say where the listener is bound: then a burst of handshakes gets new configurations too."""
        open_keeper = keepers_of(host, port)
        if open_keeper is not None and self._may_keep:
            self._configurations.keep_by(open_keeper)

    def freeze(self) -> None:
        """Follow the files no longer. To be called before the listener is stopped."""
        self._configurations.freeze()


def server_credentials(pems: Callable[[], TlsPems]) -> grpc.ServerCredentials:
    """Return credentials for one listener of any server, which follow `pems` and require a client certificate.

    In a burst, of handshakes that are less than half a second apart, the configuration stays for a minute at most.
    """
    return MutualTls(pems, ListenerLimits()).credentials


def new_server(limits: ListenerLimits) -> grpc.aio.Server:
    """Return a server; to be called inside the loop that will run it."""
    with guarded_against_unknown_methods():
        return grpc.aio.server(
            options=_options(limits),
            maximum_concurrent_rpcs=limits.max_concurrent_calls,
        )


def bind(server: grpc.aio.Server, address: str, tls: MutualTls, *, setting: str) -> int:
    """Bind `server` to `address`, and return the port. Raises `ConfigError` that names `setting`."""
    try:
        port: int = server.add_secure_port(address, tls.credentials)
    except RuntimeError as error:
        msg = f"{setting}: cannot listen on {address}: is the port taken by another process? ({error})"
        raise ConfigError(msg) from error
    if port == 0:
        msg = f"{setting}: cannot listen on {address}: give a free port of an address of this host"
        raise ConfigError(msg)
    tls.keep(address.rpartition(":")[0], port)
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
