"""The plain port: uvicorn in our own loop, on a socket that is bound before anything is served."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from carnet.errors import ConfigError
from carnet_broker.edges.http.plain import ImpatientProtocol

__all__ = ["PlainServer", "listen", "new_plain_server"]


class PlainServer(uvicorn.Server):
    """Uvicorn without its own signal handlers: ours drain the whole process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def new_plain_server(app: Starlette, *, connections: int) -> PlainServer:
    """Return a server of `app` that takes at most so many connections."""
    return PlainServer(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            http=ImpatientProtocol,
            limit_concurrency=connections,
            timeout_keep_alive=5,
        )
    )


def listen(host: str, port: int, *, setting: str) -> socket.socket:
    """Return a socket that listens. Raises `ConfigError` that names `setting`."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        msg = f"{setting}: cannot listen on {address} ({error.strerror}); give a free port of an address of this host"
        raise ConfigError(msg) from error
