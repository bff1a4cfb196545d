"""What one trust stream costs the broker. Run in ``tests/``: ``python -m bench.trust_stream_cost [--streams N]``.

A real broker process on a real Vault, with its store in SQLite, and N streams, each on its own connection with mutual
TLS. Measured is the processor time and the memory of the broker's process, its threads for the store included, and,
on one of the streams, the bytes on the wire. Prints one JSON object. The figures are for ``fleet_simulation``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click

from carnet.tls import secure_aio_channel
from carnet.v1 import trust_pb2, trust_pb2_grpc
from carnet_broker.demo.openbao import OpenBao
from support.running_broker import BROKER_NAME, PAYMENTS, RunningBroker, start_broker
from support.vault import prepare
from support.watching import hello, revoke_a_token_in_store

TICKS: Final = os.sysconf("SC_CLK_TCK")
HEARTBEAT: Final = 1.0
AT_ONCE: Final = 20
"""Streams that are opened at the same time."""
WITHIN: Final = 30.0


class Wire:
    """Counts the bytes of one connection, both ways."""

    def __init__(self) -> None:
        self.up = self.down = 0

    @asynccontextmanager
    async def before(self, upstream: str) -> AsyncIterator[str]:
        """Stand before `upstream`; the address to connect to."""

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            host, _, port = upstream.rpartition(":")
            there, back = await asyncio.open_connection(host, int(port))
            with contextlib.suppress(asyncio.CancelledError):  # As it ends.
                await asyncio.gather(self._pass(reader, back, "up"), self._pass(there, writer, "down"))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        while chunk := await reader.read(65_536):
            setattr(self, way, getattr(self, way) + len(chunk))
            writer.write(chunk)
            await writer.drain()
        writer.close()


class Streams:
    """Raw verifiers in this process: each answers what it is sent, as loaded."""

    def __init__(self) -> None:
        self.responses = 0
        self.versions: list[int] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, count: int, address: str, broker: RunningBroker, stack: AsyncExitStack) -> None:
        """Open further streams, some at a time."""
        identity = broker.identity(PAYMENTS)
        for first in range(0, count, AT_ONCE):
            for _ in range(first, min(first + AT_ONCE, count)):
                channel = secure_aio_channel(
                    address, identity=identity, ca_pem=broker.ca.root_pem, server_name=BROKER_NAME
                )
                await stack.enter_async_context(channel)
                self._tasks.append(asyncio.create_task(self._watch(channel, len(self._tasks))))
                self.versions.append(-1)
            await until(lambda: min(self.versions) >= 0)

    async def _watch(self, channel: Any, number: int) -> None:  # noqa: ANN401 - of either kind of stubs
        call = trust_pb2_grpc.TrustServiceStub(channel).Watch()
        await call.write(hello(f"verifier-{number}", max_staleness=300.0))
        count = 0
        async for response in call:
            count += 1
            self.responses += 1
            answer = trust_pb2.WatchAnswer(number=count, position=response.position)
            await call.write(trust_pb2.WatchRequest(answer=answer))
            self.versions[number] = response.position.revocation_version

    async def close(self) -> None:
        """End all."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(WITHIN):
        while not condition():  # noqa: ASYNC110 - the condition is of many streams
            await asyncio.sleep(0.002)


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory(pid: int) -> int:
    """Return the bytes of memory that a process has for itself."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_")) * 1024


async def measure(broker: RunningBroker, count: int, seconds: float, revocations: int) -> dict[str, float]:
    """Return the figures."""
    pid, wire, streams = broker.process.pid, Wire(), Streams()
    address = broker.addresses["trust"]
    async with AsyncExitStack() as stack:
        # What the first stream brings with it (modules, pools) is not of a stream.
        tapped = await stack.enter_async_context(wire.before(address))
        await streams.open(1, tapped, broker, stack)
        await asyncio.sleep(0.2)
        connected = wire.up, wire.down
        cpu, began = cpu_seconds(pid), time.monotonic()
        await asyncio.sleep(seconds)
        idle = (cpu_seconds(pid) - cpu) / (time.monotonic() - began)

        def spent(cpu: float, began: float) -> float:
            return cpu_seconds(pid) - cpu - idle * (time.monotonic() - began)

        held = memory(pid)
        cpu, began = cpu_seconds(pid), time.monotonic()
        await streams.open(count, address, broker, stack)
        opening = spent(cpu, began) / count
        await asyncio.sleep(2.0)
        held = memory(pid) - held

        cpu, began, seen, before = cpu_seconds(pid), time.monotonic(), streams.responses, (wire.up, wire.down)
        await asyncio.sleep(seconds)
        beats = streams.responses - seen
        beat = spent(cpu, began) / beats
        passed = wire.up - before[0], wire.down - before[1]
        each = beats / len(streams.versions)

        cpu, began, seen = cpu_seconds(pid), time.monotonic(), streams.responses
        spread = []
        for _ in range(revocations):
            version = await asyncio.to_thread(revoke_a_token_in_store, broker)
            told = time.monotonic()
            await until(lambda version=version: min(streams.versions) >= version)
            spread.append(time.monotonic() - told)
            await asyncio.sleep(0.3)
        pushed = revocations * len(streams.versions)
        push = (spent(cpu, began) - (streams.responses - seen - pushed) * beat) / pushed
        await streams.close()
    return {
        "streams": len(streams.versions),
        "idle_cpu_share": round(idle, 4),
        "open_cpu_us": round(opening * 1e6),
        "heartbeat_cpu_us": round(beat * 1e6),
        "push_cpu_us": round(push * 1e6),
        "memory_bytes": round(held / count),
        "opening_bytes_up": connected[0],
        "opening_bytes_down": connected[1],
        "heartbeat_bytes_up": round(passed[0] / each, 1),
        "heartbeat_bytes_down": round(passed[1] / each, 1),
        "push_to_all_ms_median": round(sorted(spread)[len(spread) // 2] * 1e3, 1),
    }


@click.command()
@click.option("--streams", default=200, show_default=True)
@click.option("--seconds", default=6.0, show_default=True, help="Length of one measurement.")
@click.option("--revocations", default=12, show_default=True)
def main(streams: int, seconds: float, revocations: int) -> None:
    """Measure what a trust stream costs the broker."""
    settings = {
        "trust": {"heartbeat": f"{HEARTBEAT:g}s"},
        "store": {"verifier_sessions": streams + 1},
        "limits": {"streams": streams + 1, "key_sets_per_second": streams + 1},
    }
    with TemporaryDirectory() as name, OpenBao.start(Path(name) / "openbao", dev=True) as server:
        place = prepare(server, Path(name) / "login")
        with start_broker(place, Path(name) / "broker", settings=settings) as broker:
            figures = asyncio.run(measure(broker, streams, seconds, revocations))
        place.close()
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"machine": machine, "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
