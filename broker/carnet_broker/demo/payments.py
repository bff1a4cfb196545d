"""The payments service of the demo: charges only for callers whose token says that they may.

``python -m carnet_broker.demo.payments``; everything but the address (PAYMENTS_LISTEN) is the SDK's environment.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from carnet import Verifier, current
from carnet.errors import CarnetError
from carnet.grpc import ServerInterceptor, require
from carnet_broker.demo.shop import CHARGE, decode, encode
from carnet_broker.edges.grpc.listeners import TlsPems, server_credentials

_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # Quoted: only the stubs know its parameters.


class _Payments(grpc.GenericRpcHandler):
    """Serves `CHARGE`."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> _Handler | None:
        if handler_call_details.method != CHARGE:
            return None
        return grpc.unary_unary_rpc_method_handler(_charge, request_deserializer=decode, response_serializer=encode)


def _charge(request: dict[str, Any], context: grpc.ServicerContext) -> dict[str, Any]:
    del context
    claims = current()
    return {"charged": request["amount"], "for": str(claims.subject), "scopes": list(claims.scopes)}


def _credentials() -> grpc.ServerCredentials:
    """Return credentials that follow the files: a renewed certificate needs no restart."""
    files = [Path(os.environ[name]) for name in ("CARNET_KEY_FILE", "CARNET_CERT_FILE", "CARNET_CA_FILE")]
    return server_credentials(lambda: TlsPems(*(file.read_bytes() for file in files)))


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Verifier() as verifier, ThreadPoolExecutor(max_workers=8) as pool:
        verifier.wait_ready()
        interceptor = ServerInterceptor(verifier, {CHARGE: require(scopes=["charge"])})
        server = grpc.server(pool, interceptors=[interceptor], options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers([_Payments()])
        address = os.environ.get("PAYMENTS_LISTEN", "0.0.0.0:8443")
        port = server.add_secure_port(address, _credentials())
        server.start()
        print(f"payments: serving on port {port}", flush=True)
        stop.wait()
        server.stop(grace=5).wait()


if __name__ == "__main__":
    try:
        main()
    except CarnetError as error:
        sys.exit(f"payments: {error}")
