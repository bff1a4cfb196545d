"""The trust listeners of the brokers: how they are reached, and what to say when one cannot be."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import grpc
import grpc.aio

from carnet.endpoints import Target
from carnet.forking import prepare_for_forks
from carnet.identity import Identity
from carnet.keysets import Moment
from carnet.tls import ChannelOption, secure_aio_channel, secure_channel

__all__ = [
    "AsyncTrustChannels",
    "TrustChannels",
    "TrustServers",
    "code_of",
    "describe",
    "read_clocks",
    "remedy",
]

_SHOWN: Final = 300
"""Characters of what a server says."""

_OPTIONS: Final[tuple[ChannelOption, ...]] = (
    # A peer that vanished ends a stream within 20 s. Brokers allow a ping in 10 s.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # A part of a change is far smaller; a broker of a later version may choose larger ones.
    ("grpc.max_receive_message_length", 1024 * 1024),
)


def read_clocks() -> Moment:
    """Return the moment that it is. The one place where the verifier reads a clock."""
    return Moment(time.monotonic(), datetime.now(UTC))


@dataclass(frozen=True, slots=True)
class TrustServers:
    """How the trust listeners of the brokers are reached. They want mutual TLS, so an identity is needed."""

    targets: Sequence[Target]
    identity: Identity
    ca_pem: bytes
    server_name: str
    """The DNS name that their certificates carry."""
    timeout: timedelta
    """For the whole of one fetch, whatever the number of servers."""


class TrustChannels:
    """One channel to each server, made when it is first asked for. Thread-safe: a stream and a fetch share them."""

    def __init__(self, servers: TrustServers) -> None:
        self._servers = servers
        self._lock = threading.Lock()
        self._channels: dict[Target, grpc.Channel] = {}
        self._closed = False

    def get(self, target: Target) -> grpc.Channel:
        """Return the channel to `target`. Raises `ValueError` after `close`, as a closed channel does."""
        with self._lock:
            if self._closed:
                msg = "the channels are closed"
                raise ValueError(msg)
            channel = self._channels.get(target)
            if channel is None:
                servers = self._servers
                channel = self._channels[target] = secure_channel(
                    target,
                    identity=servers.identity,
                    ca_pem=servers.ca_pem,
                    server_name=servers.server_name,
                    options=_OPTIONS,
                )
                prepare_for_forks()
            return channel

    def close(self) -> None:
        """Close the connections; calls on them fail."""
        with self._lock:
            self._closed = True
            channels = list(self._channels.values())
        for channel in channels:
            channel.close()


class AsyncTrustChannels:
    """What `TrustChannels` is, for the event loop of its first use."""

    def __init__(self, servers: TrustServers) -> None:
        self._servers = servers
        self._channels: dict[Target, grpc.aio.Channel] = {}

    def get(self, target: Target) -> grpc.aio.Channel:
        """Return the channel to `target`."""
        channel = self._channels.get(target)
        if channel is None:
            servers = self._servers
            channel = self._channels[target] = secure_aio_channel(
                target,
                identity=servers.identity,
                ca_pem=servers.ca_pem,
                server_name=servers.server_name,
                options=_OPTIONS,
            )
        return channel

    async def close(self) -> None:
        """Close the connections; calls on them fail."""
        for channel in self._channels.copy().values():
            await channel.close()


def code_of(error: Exception | None) -> grpc.StatusCode | None:
    """Return the status code that a call ended with, None where it is not known."""
    return error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None


def describe(error: Exception | None) -> str:
    """Return what a call failed of, in some words."""
    if isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        details = error.details() or ""
        return f"{error.code().name} {details[:_SHOWN]}"
    return "the connection is closed"


def remedy(texts: str, servers: TrustServers) -> str:
    """Say what to do about it, from what the servers did and what this side knows."""
    ended_at = servers.identity.not_after
    # gRPC says "Socket closed" when a server refuses the certificate: the likeliest reason is known here.
    if ended_at < datetime.now(UTC):
        return f"the own certificate ended at {ended_at:%Y-%m-%dT%H:%M:%SZ}, check CARNET_CERT_FILE"
    for sign, text in (
        ("UNIMPLEMENTED", "this is no trust listener (that for tokens has a port of its own), check CARNET_TRUST"),
        (
            "CERTIFICATE_VERIFY_FAILED",
            "the certificate there has ended or is not from your authorities, check CARNET_CA_FILE",
        ),
        (
            "Hostname Verification",
            f"the certificate there is not for {servers.server_name}, check CARNET_TRUST and CARNET_BROKER_NAME",
        ),
        (
            "Socket closed",
            "the broker may not trust your certificate, check CARNET_CERT_FILE and the broker's CA file",
        ),
        (
            "PERMISSION_DENIED",
            f"name {servers.identity.spiffe_id} in the served_by of an audience in the broker's policy",
        ),
    ):
        if sign in texts:
            return text
    return "check CARNET_TRUST, and that a broker runs there and is ready"
