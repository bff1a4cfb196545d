"""A proxy that passes bytes on, until a test cuts the line or lets it hang.

It stands before any server on TCP or on a Unix socket: a broker, OpenBao, PostgreSQL. It does not look at what passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

__all__ = ["TcpProxy", "proxy_to"]

_CHUNK: Final = 65_536
_WITHIN: Final = 10.0

_Result = TypeVar("_Result")


class TcpProxy:
    """Passes connections on. Made by `proxy_to`; to be used from any thread but its own."""

    def __init__(self, upstream: str | Path, loop: asyncio.AbstractEventLoop) -> None:
        self._upstream = upstream
        self._loop = loop
        self._passing = asyncio.Event()
        self._passing.set()
        self._cut = False
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""
        """``host:port`` of the proxy, or the path of its socket."""

    @property
    def connections(self) -> int:
        """How many connections pass through."""
        return len(self._open) // 2

    def cut(self) -> None:
        """End all connections, and each new one at once, until `mend`."""
        self._call(self._do_cut())

    def hang(self) -> None:
        """Pass nothing on until `mend`: connections stay open, new ones are taken, and no byte comes through."""
        self._call(self._do_hang())

    def mend(self) -> None:
        """Pass everything on again, also what was held back."""
        self._call(self._do_mend())

    def _call(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_WITHIN)

    async def _do_cut(self) -> None:
        self._cut = True
        self._passing.set()
        for writer in self._open:
            writer.transport.abort()

    async def _do_hang(self) -> None:
        self._passing.clear()

    async def _do_mend(self) -> None:
        self._cut = False
        self._passing.set()

    @asynccontextmanager
    async def serving(self, listen: Path | None) -> AsyncIterator[None]:
        """Serve for the length of the block, on a port that the system picks, or on the socket `listen`."""
        if listen is None:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        else:
            server = await asyncio.start_unix_server(self._accept, listen)
            self.address = str(listen)
        try:
            yield
        finally:
            server.close()
            await self._do_cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError):  # Either end may break the line off.
                await self._connect(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            return
        if isinstance(self._upstream, Path):
            there, back = await asyncio.open_unix_connection(self._upstream)
        else:
            host, _, port = self._upstream.rpartition(":")
            there, back = await asyncio.open_connection(host, int(port))
        ends = {writer, back}
        self._open |= ends
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, back))
                both.create_task(self._pass(there, writer))
        except* OSError:
            pass
        finally:
            self._open -= ends
            back.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK):
            await self._passing.wait()
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()


@contextmanager
def proxy_to(upstream: str | Path, *, listen: Path | None = None) -> Iterator[TcpProxy]:
    """Put a proxy before `upstream` (``host:port``, or a socket) for the length of the block, in a thread of its own.

    It listens on a port that the system picks, or on the socket `listen`.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="proxy", daemon=True)
    thread.start()
    proxy = TcpProxy(upstream, loop)
    served = proxy.serving(listen)
    try:
        asyncio.run_coroutine_threadsafe(served.__aenter__(), loop).result(_WITHIN)
        try:
            yield proxy
        finally:
            asyncio.run_coroutine_threadsafe(served.__aexit__(None, None, None), loop).result(_WITHIN)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_WITHIN)
        loop.close()
