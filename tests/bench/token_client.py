"""Asks a token server for tokens, many calls in flight, for some seconds. For `run.py` alone.

``token_client.py ADDRESS DIR SECONDS IN_FLIGHT BATCH``: prints how many tokens it got.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import grpc
import uvloop

from carnet.v1 import token_pb2, token_pb2_grpc
from support.running_broker import BROKER_NAME


async def _run(address: str, directory: Path, seconds: float, in_flight: int, batch: int) -> int:
    credentials = grpc.ssl_channel_credentials(
        (directory / "ca.pem").read_bytes(),
        (directory / "orders-key.pem").read_bytes(),
        (directory / "orders.pem").read_bytes(),
    )
    options = [("grpc.ssl_target_name_override", BROKER_NAME)]
    one = token_pb2.IssueTokenRequest(audience="payments")
    many = token_pb2.IssueTokensRequest(requests=[one] * batch)
    got = 0
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        stub = token_pb2_grpc.TokenServiceStub(channel)
        end = time.monotonic() + seconds

        async def ask() -> None:
            nonlocal got
            while time.monotonic() < end:
                if batch == 1:
                    await stub.IssueToken(one, timeout=10)
                else:
                    await stub.IssueTokens(many, timeout=10)
                got += batch

        await asyncio.gather(*(ask() for _ in range(in_flight)))
    return got


def main() -> None:
    """Run."""
    address, directory, seconds, in_flight, batch = sys.argv[1:]
    print(uvloop.run(_run(address, Path(directory), float(seconds), int(in_flight), int(batch))))


if __name__ == "__main__":
    main()
