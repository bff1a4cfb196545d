"""The smallest gRPC server that identifies its callers by the rules of the broker, and how to call any such server.

`Target` is a server to try certificates on: this one, or a whole broker. `outcome` says what became of a call.
"""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc

from carnet.testing import CertificateAuthority
from carnet_broker.core.workload import IdentityCache, LeafRules, TrustBundle, UnauthenticatedError
from carnet_broker.edges.grpc.listeners import TlsPems, server_credentials
from certificate_recipe import Presented
from support.http2 import grpc_status_of_call, tls_connection
from wrong_kind import Client, Expected

__all__ = ["METHOD", "MtlsServer", "Target", "grpc_channel", "mtls_server", "openssl_context", "outcome"]

METHOD: Final = "/carnet.test.v1.Identity/Get"
_SERVER: Final = "spiffe://prod.example/ns/test/sa/server"
_SERVER_NAME: Final = "server.test.svc.prod.example"
_TIMEOUT: Final = 10


@dataclass(frozen=True, slots=True)
class Target:
    """A gRPC server that wants a client certificate, and a unary method of it to call."""

    address: str
    server_name: str
    """The DNS name in its certificate."""
    ca_pem: bytes
    """The root of its certificate."""
    method: str = METHOD
    request: bytes = b""
    """The serialised request message."""


@dataclass
class MtlsServer:
    """A running server. Change `bundle` and `clock` while it runs; each call and handshake sees the newest."""

    bundle: TrustBundle
    client_ca_pem: bytes
    clock: Callable[[], datetime]
    target: Target
    contexts: list[Mapping[str, Sequence[bytes]]] = field(default_factory=list)
    """What gRPC said about the other side, for each call."""
    reasons: list[str] = field(default_factory=list)
    """Why calls were refused; callers are not told."""


@contextmanager
def mtls_server(ca: CertificateAuthority) -> Iterator[MtlsServer]:
    """Run a server that trusts `ca`, on a port of 127.0.0.1."""
    own = ca.issue(_SERVER, dns_names=[_SERVER_NAME])
    identities = IdentityCache(LeafRules())

    def get(_: bytes, context: grpc.ServicerContext) -> bytes:
        peer: Any = context.auth_context()  # A sequence of bytes by name, which is not what the stubs say.
        running.contexts.append(peer)
        # gRPC gives the leaf alone, and what the client sent after it as one text; the latter is absent where it sent
        # nothing else.
        chain = (*peer.get("x509_pem_cert", ()), *peer.get("x509_pem_cert_chain", ()))
        version = b"".join(peer.get("ssl_tls_version", ())).decode()
        try:
            workload = identities.authenticate(chain, tls_version=version, bundle=running.bundle, now=running.clock())
        except UnauthenticatedError as error:
            running.reasons.append(error.reason)
            context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return str(workload.spiffe_id).encode()

    bundle = TrustBundle.parse(ca.root_pem, [], ["prod.example"])
    placeholder = Target("", _SERVER_NAME, ca.root_pem)
    running = MtlsServer(bundle, ca.root_pem, lambda: datetime.now(UTC), placeholder)
    credentials = server_credentials(lambda: TlsPems(own.private_key_pem, own.certificate_pem, running.client_ca_pem))
    service, method = METHOD.removeprefix("/").split("/")
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads, options=[("grpc.so_reuseport", 0), ("grpc.server_handshake_timeout_ms", 5000)])
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(service, {method: grpc.unary_unary_rpc_method_handler(get)})]
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        running.target = Target(f"127.0.0.1:{port}", _SERVER_NAME, ca.root_pem)
        try:
            yield running
        finally:
            server.stop(grace=None).wait()


@contextmanager
def grpc_channel(target: Target, shown: Presented, *options: tuple[str, Any]) -> Iterator[grpc.Channel]:
    """Open a gRPC channel that shows a certificate."""
    credentials = grpc.ssl_channel_credentials(target.ca_pem, shown.private_key_pem or None, shown.chain_pem or None)
    always = [("grpc.ssl_target_name_override", target.server_name), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(target.address, credentials, [*always, *options]) as channel:
        yield channel


def openssl_context(target: Target, shown: Presented) -> ssl.SSLContext:
    """Return a client context of OpenSSL that shows a certificate, whatever its kind."""
    context = ssl.create_default_context(cadata=target.ca_pem.decode())
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    if shown.chain_pem:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "shown.pem"
            file.write_bytes(shown.private_key_pem + shown.chain_pem)
            context.load_cert_chain(file)
    return context


def outcome(target: Target, shown: Presented, client: Client = Client.GRPC) -> Expected:
    """Call `target` over a new connection, and return what became of it."""
    status = _status_by_grpc(target, shown) if client is Client.GRPC else _status_by_openssl(target, shown)
    if status is None:
        return Expected.HANDSHAKE
    unauthenticated, denied = grpc.StatusCode.UNAUTHENTICATED.value[0], grpc.StatusCode.PERMISSION_DENIED.value[0]
    if status == unauthenticated:
        return Expected.UNAUTHENTICATED
    # Denied is accepted: the caller is known, and the policy gives it nothing.
    assert status in (0, denied), f"the call ended with status {status}"
    return Expected.ACCEPT


def _status_by_grpc(target: Target, shown: Presented) -> int | None:
    with grpc_channel(target, shown) as channel:
        try:
            call: Any = channel.unary_unary(target.method)
            call(target.request, timeout=_TIMEOUT)
        except grpc.RpcError as error:
            code: int = error.code().value[0]
            # The handshake failed: gRPC's client says only that it could not connect.
            return None if error.code() is grpc.StatusCode.UNAVAILABLE else code
    return 0


def _status_by_openssl(target: Target, shown: Presented) -> int | None:
    context = openssl_context(target, shown)
    with (
        suppress(ssl.SSLError, ConnectionError),
        tls_connection(target.address, context, server_name=target.server_name) as connection,
    ):
        return grpc_status_of_call(connection, target.method, target.request)
    return None
