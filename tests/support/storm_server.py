"""A listener as the broker has it, in a process of its own, since the wrong ways of replacing end the process.

``storm_server.py DIRECTORY WAY``: the way is how the TLS configuration is replaced: ``kept``, as the broker does it;
``time``, without keepers; ``always``, at each handshake, whatever others are doing. The directory gets the PEM files of
a client. The port comes on standard output; the files change every second until standard input ends. How often the
configuration was replaced is the last line.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import grpc

from carnet.testing import CertificateAuthority
from carnet_broker.edges.grpc import configurations
from carnet_broker.edges.grpc.listeners import ListenerLimits, MutualTls, TlsPems, bind, new_server

NAME = "broker.carnet.svc.prod.example"
"""The DNS name in the certificate."""


async def _serve(directory: Path, way: str) -> int:
    ca = CertificateAuthority.create()
    client = ca.issue("spiffe://prod.example/ns/shop/sa/orders")
    (directory / "own.pem").write_bytes(client.private_key_pem + client.certificate_pem)
    (directory / "ca.pem").write_bytes(ca.root_pem)
    states = cycle(
        TlsPems(one.private_key_pem, one.certificate_pem, ca.root_pem)
        for one in (ca.issue("spiffe://prod.example/ns/carnet/sa/broker", dns_names=[NAME]) for _ in range(2))
    )
    served, replaced, make = next(states), 0, configurations._configuration

    def counted(pems: TlsPems) -> grpc.ServerCertificateConfiguration:
        nonlocal replaced
        replaced += 1
        return make(pems)

    limits = ListenerLimits()
    server, tls = new_server(limits), MutualTls(lambda: served, limits)
    if way == "always":
        tls.credentials = grpc.dynamic_ssl_server_credentials(
            make(served), lambda: counted(served), require_client_authentication=True
        )
    if way != "kept":
        tls.keep = lambda host, port: None  # type: ignore[method-assign]
    port = bind(server, "127.0.0.1:0", tls, setting="storm")
    await server.start()
    print(port, flush=True)
    over = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    with patch.object(configurations, "_configuration", counted):
        while not over.done():
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(over), 1)
            served = next(states)
        tls.freeze()
        await server.stop(1)
    return replaced


if __name__ == "__main__":
    print(asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2])), flush=True)
