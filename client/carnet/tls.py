"""Channels over mutual TLS: always with a client certificate, always with the server's name pinned.

gRPC's Python client cannot check the URI SAN of a server. So a server's leaf carries one DNS name derived from its
SPIFFE ID (`carnet.spiffe.server_dns_name`), and every channel names the one that it expects, wherever it connects to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import grpc
import grpc.aio

from carnet.endpoints import Target
from carnet.identity import Identity, load_ca_file

__all__ = [
    "ChannelOption",
    "Identity",
    "Target",
    "channel_options",
    "load_ca_file",
    "secure_aio_channel",
    "secure_channel",
]

ChannelOption: TypeAlias = tuple[str, Any]
"""One of gRPC's channel arguments, as ``(name, value)``."""

MAX_RECEIVE_BYTES: Final = 256 * 1024
"""Enough for 64 KiB of keys, and for 30 tokens of the longest kind in one answer."""

_DEFAULTS: Final[dict[str, Any]] = {
    # Channels of two identities must not share a connection, which has one client certificate.
    "grpc.use_local_subchannel_pool": 1,
    # A peer that vanished without a word (SIGSTOP, a dropped route) ends a waiting stream within 40 s. Only while calls
    # are open: a server with gRPC's default settings punishes pings on an idle connection.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.keepalive_permit_without_calls": 0,
    # gRPC waits up to 120 s between attempts to connect; an outage of a minute would become one of three.
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 5_000,
    "grpc.max_receive_message_length": MAX_RECEIVE_BYTES,
    # A TXT record may not change how calls are made; a proxy for the outside world does not lead to a broker.
    "grpc.service_config_disable_resolution": 1,
    "grpc.enable_http_proxy": 0,
}


def channel_options(server_name: str, options: Iterable[ChannelOption] = ()) -> list[ChannelOption]:
    """Return the arguments of a channel to the server whose certificate says `server_name`.

    `options` come on top of the defaults; none of them changes the name.
    """
    return list({**_DEFAULTS, **dict(options), "grpc.ssl_target_name_override": server_name}.items())


def secure_channel(
    target: Target | str,
    *,
    identity: Identity,
    ca_pem: bytes,
    server_name: str,
    options: Iterable[ChannelOption] = (),
) -> grpc.Channel:
    """Return a channel to `target` that shows `identity` and takes a server only if it is `server_name`.

    `ca_pem` are the authorities that the server's certificate is checked by, and no others. A channel keeps its
    identity: after a renewal make a new one. Nothing is connected before the first call.
    """
    credentials = _credentials(identity, ca_pem)
    return grpc.secure_channel(str(target), credentials, options=channel_options(server_name, options))


def secure_aio_channel(
    target: Target | str,
    *,
    identity: Identity,
    ca_pem: bytes,
    server_name: str,
    options: Iterable[ChannelOption] = (),
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
) -> grpc.aio.Channel:
    """Return what `secure_channel` returns, for asyncio; make it in the event loop that uses it.

    `interceptors` can be given here only: an asyncio channel cannot be wrapped afterwards.
    """
    return grpc.aio.secure_channel(
        str(target),
        _credentials(identity, ca_pem),
        options=channel_options(server_name, options),
        interceptors=interceptors,
    )


def _credentials(identity: Identity, ca_pem: bytes) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=ca_pem,
        private_key=identity.private_key_pem,
        certificate_chain=identity.certificate_chain_pem,
    )
