"""Carnet in gRPC: servers that verify their callers, channels that attach tokens; for threads and asyncio."""

from __future__ import annotations

from carnet.grpc.aio_client import secure_aio_channel
from carnet.grpc.aio_server import AsyncServerInterceptor
from carnet.grpc.attaching import NoTokenError
from carnet.grpc.client import secure_channel
from carnet.grpc.guard import StreamEnd
from carnet.grpc.rules import Rule, allow_any_scope, allow_unauthenticated, require
from carnet.grpc.server import ServerInterceptor

__all__ = [
    "AsyncServerInterceptor",
    "NoTokenError",
    "Rule",
    "ServerInterceptor",
    "StreamEnd",
    "allow_any_scope",
    "allow_unauthenticated",
    "require",
    "secure_aio_channel",
    "secure_channel",
]
