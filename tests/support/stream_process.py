"""A process with many raw streams, each on a connection of its own: what a trust process has to bear.

They answer each response and notice when a revocation comes. They verify nothing: it is the broker that is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc

from carnet import Identity
from carnet.tls import secure_aio_channel
from carnet.v1 import trust_pb2
from support.child_lines import serve_lines
from support.running_broker import BROKER_NAME
from support.watching import hello

_METHOD = "/carnet.v1.TrustService/Watch"
_AT_ONCE = 20


class _Streams:
    def __init__(self, settings: dict[str, Any], stack: AsyncExitStack) -> None:
        self._settings = settings
        self._stack = stack
        self._identity = Identity.load(settings["certificate"], settings["key"])
        self._ca_pem = Path(settings["ca_file"]).read_bytes()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._ready = 0
        self._reached: dict[int, list[float]] = {}
        self._ended: list[str] = []

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Answer one line: ``begin``, or when `version` has reached all streams."""
        if question["do"] == "begin":
            for number in range(self._settings["streams"]):
                task = asyncio.create_task(self._follow(number))
                self._stack.callback(task.cancel)
            return await self._until(lambda: self._ready == self._settings["streams"], 90.0)
        reached = self._reached.setdefault(question["version"], [])
        answer = await self._until(lambda: len(reached) == self._settings["streams"], 10.0)
        return {**answer, "at": reached}

    async def _until(self, true: Any, within: float) -> dict[str, Any]:  # noqa: ANN401 - a predicate
        deadline = time.monotonic() + within
        while not true() and time.monotonic() < deadline:  # noqa: ASYNC110 - no event says so
            await asyncio.sleep(0.02)
        return {"ready": self._ready, "ended": self._ended[:3]}

    async def _follow(self, number: int) -> None:
        async with secure_aio_channel(
            self._settings["trust"], identity=self._identity, ca_pem=self._ca_pem, server_name=BROKER_NAME
        ) as channel:
            call: Any = channel.stream_stream(_METHOD)()  # Of bytes, which its stubs do not say.
            async with self._slots:  # A storm of handshakes is another test.
                await call.write(hello(f"stream-{number}").SerializeToString())
                first = await call.read()
            try:
                await self._read(call, first)
            except grpc.aio.AioRpcError as error:
                self._ended.append(f"{error.code()}: {error.details()}")

    async def _read(self, call: Any, response: Any) -> None:  # noqa: ANN401 - gRPC's calls have no types
        count = 0
        while response is not grpc.aio.EOF:
            arrived = time.monotonic()
            message = trust_pb2.WatchResponse.FromString(response)
            count += 1
            self._ready += count == 1
            if count > 1 and message.HasField("change"):
                self._reached.setdefault(message.position.revocation_version, []).append(arrived)
            answer = trust_pb2.WatchAnswer(number=count, position=message.position)
            await call.write(trust_pb2.WatchRequest(answer=answer).SerializeToString())
            response = await call.read()
        self._ended.append("the broker ended it")


async def _main() -> None:
    async with AsyncExitStack() as stack:
        await serve_lines(_Streams(json.loads(sys.argv[1]), stack).answer)


if __name__ == "__main__":
    asyncio.run(_main())
