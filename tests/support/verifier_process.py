"""A process with many verifiers and their load: what a service runs, many times. See `support.spread`.

Each verifier is an `AsyncVerifier` with streams of its own. When it learns of a change it verifies the token that is
watched, and notes when that was refused. Meanwhile tokens are issued and verified all the time.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc

from carnet import AsyncVerifier, Identity
from carnet.errors import CarnetError, InvalidTokenError
from carnet.tls import secure_aio_channel
from carnet.v1 import token_pb2, token_pb2_grpc
from support.child_lines import serve_lines
from support.running_broker import BROKER_NAME, ISSUER

_KEPT = 200
_LIVE_WITHIN = 10.0


class _Watched:
    """A verifier, and the token that it is to refuse."""

    def __init__(self, verifier: AsyncVerifier, peer: bytes) -> None:
        self.verifier = verifier
        self._peer = peer
        self._token: str | None = None
        self._looking: set[asyncio.Task[None]] = set()
        self.refused_at = 0.0
        self.refused = asyncio.Event()
        verifier.on_revocation(self.changed)

    async def expect(self, token: str) -> None:
        """Check that `token` is accepted now, and watch for its refusal."""
        self.refused.clear()
        await self.verifier.verify(token, peer_certificate=self._peer)
        self._token = token

    def changed(self) -> None:
        """Look again: something was revoked."""
        task = asyncio.get_running_loop().create_task(self._look())
        self._looking.add(task)
        task.add_done_callback(self._looking.discard)

    async def _look(self) -> None:
        token = self._token
        if token is None or self.refused.is_set():
            return
        if await self.verdict(token) == "REVOKED":
            self.refused_at = time.monotonic()
            self.refused.set()

    async def verdict(self, token: str) -> str:
        """Return ``accepted``, or the reason why not."""
        try:
            await self.verifier.verify(token, peer_certificate=self._peer)
        except InvalidTokenError as error:
            return str(error.reason)
        return "accepted"


class _Process:
    def __init__(self, settings: dict[str, Any], stack: AsyncExitStack) -> None:
        self._settings = settings
        self._stack = stack
        self._caller = Identity.load(settings["caller_certificate"], settings["caller_key"])
        self._ca_pem = Path(settings["ca_file"]).read_bytes()
        self._watched: list[_Watched] = []
        self._alive: deque[str] = deque(maxlen=_KEPT)
        self._counts: Counter[str] = Counter()

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """Answer one line."""
        answers: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
            "begin": self._begin,
            "expect": self._expect,
            "refused": self._refused,
            "check": self._check,
        }
        return await answers[question.pop("do")](**question)

    async def _begin(self) -> dict[str, Any]:
        """Begin the verifiers and the load; tell which brokers they follow."""
        settings = self._settings
        service = Identity.load(settings["service_certificate"], settings["service_key"])
        peer = self._caller.certificate_chain_pem
        for _ in range(settings["verifiers"]):
            verifier = AsyncVerifier(
                audience="payments",
                issuer=ISSUER,
                trust=settings["trust"],
                identity=service,
                ca_file=settings["ca_file"],
                broker_name=BROKER_NAME,
            )
            self._watched.append(_Watched(await self._stack.enter_async_context(verifier), peer))
        await asyncio.gather(*(watched.verifier.wait_ready() for watched in self._watched))
        deadline = time.monotonic() + _LIVE_WITHIN
        while not all(watched.verifier.status().live for watched in self._watched):
            if time.monotonic() > deadline:
                break  # The answer tells.
            await asyncio.sleep(0.05)
        load = [asyncio.create_task(self._issue(target)) for target in settings["tokens"]]
        load.append(asyncio.create_task(self._verify()))
        for task in load:
            self._stack.callback(task.cancel)
        statuses = [watched.verifier.status() for watched in self._watched]
        return {
            "live": sum(status.live for status in statuses),
            "following": dict(Counter(status.target for status in statuses)),
        }

    async def _expect(self, token: str) -> dict[str, Any]:
        """All accept the token that will be revoked."""
        await asyncio.gather(*(watched.expect(token) for watched in self._watched))
        return {"accepted": len(self._watched)}

    async def _refused(self, within: float) -> dict[str, Any]:
        """Wait until all refuse it; tell when each of them did."""
        try:
            async with asyncio.timeout(within):
                await asyncio.gather(*(watched.refused.wait() for watched in self._watched))
        except TimeoutError:
            late = [str(watched.verifier.status()) for watched in self._watched if not watched.refused.is_set()]
            return {"late": late}
        return {"at": [watched.refused_at for watched in self._watched]}

    async def _check(self, tokens: Sequence[str]) -> dict[str, Any]:
        """Verify tokens that were revoked, by all, and tell the verdicts, and what the load came to."""
        verdicts = Counter([await watched.verdict(token) for watched in self._watched for token in tokens])
        return {"verdicts": dict(verdicts), "load": dict(self._counts)}

    async def _issue(self, target: str) -> None:
        """Have one replica issue at a steady rate."""
        async with secure_aio_channel(
            target, identity=self._caller, ca_pem=self._ca_pem, server_name=BROKER_NAME
        ) as channel:
            stub = token_pb2_grpc.TokenServiceStub(channel)
            request = token_pb2.IssueTokenRequest(audience="payments")
            while True:
                try:
                    answer = await stub.IssueToken(request, timeout=5)
                except grpc.RpcError as error:
                    self._counts[f"not issued: {error.code().name}"] += 1
                else:
                    self._alive.append(answer.token)
                    self._counts["issued"] += 1
                await asyncio.sleep(1 / self._settings["issues_per_second"])

    async def _verify(self) -> None:
        """Verify tokens that nobody revokes."""
        while True:
            if self._alive:
                token = random.choice(self._alive)  # noqa: S311 - picks a token, guards nothing
                verifier = random.choice(self._watched).verifier  # noqa: S311 - as above
                try:
                    await verifier.verify(token, peer_certificate=self._caller.certificate)
                except CarnetError as error:
                    self._counts[f"good token refused: {error}"] += 1
                else:
                    self._counts["verified"] += 1
            await asyncio.sleep(1 / self._settings["verifies_per_second"])


async def _main() -> None:
    async with AsyncExitStack() as stack:
        await serve_lines(_Process(json.loads(sys.argv[1]), stack).answer)


if __name__ == "__main__":
    asyncio.run(_main())
