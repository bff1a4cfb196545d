"""TokenService: from the wire to `Issuer.issue`, and back."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

import grpc

from carnet.v1 import token_pb2, token_pb2_grpc
from carnet_broker.edges.grpc.calls import caller
from carnet_broker.edges.grpc.status import CODES
from carnet_broker.issuance import MAX_BATCH, Issued, Issuer, RefusedError, TokenRequest
from carnet_broker.ports import Clock
from carnet_broker.revoking import Revoker

__all__ = ["TokenServicer", "parse", "response", "result"]

_LONGEST_TTL_SECONDS: Final = 10 * 365 * 86_400
_NOT_A_TTL: Final = timedelta(0)


class TokenServicer(token_pb2_grpc.TokenServiceServicer):
    """Serves TokenService to callers that `calls.AuthenticatedCalls` has let in."""

    def __init__(self, issuer: Issuer, revoker: Revoker, clock: Clock) -> None:
        self._issuer = issuer
        self._revoker = revoker
        self._clock = clock

    async def IssueToken(  # noqa: N802 - the name in the proto
        self, request: token_pb2.IssueTokenRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> token_pb2.IssueTokenResponse:
        """Issue one token, or raise `RefusedError`."""
        del context
        now, mono = self._clock.now(), self._clock.mono()
        (answer,) = await self._issuer.issue(caller(), [parse(request)], now=now, mono=mono)
        if isinstance(answer, RefusedError):
            raise answer
        return response(answer)

    async def IssueTokens(  # noqa: N802 - as above
        self, request: token_pb2.IssueTokensRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> token_pb2.IssueTokensResponse:
        """Answer each request of a batch."""
        del context
        now, mono = self._clock.now(), self._clock.mono()
        # `Issuer` refuses the call for one too many, so the others need not be looked at.
        asked = [parse(one) for one in request.requests[: MAX_BATCH + 1]]
        answers = await self._issuer.issue(caller(), asked, now=now, mono=mono)
        return token_pb2.IssueTokensResponse(results=[result(answer) for answer in answers])

    async def RevokeToken(  # noqa: N802 - as above
        self, request: token_pb2.RevokeTokenRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> token_pb2.RevokeTokenResponse:
        """Revoke a token of the caller, or raise `RefusedError`."""
        del context
        now, mono = self._clock.now(), self._clock.mono()
        version = await self._revoker.revoke_token(caller(), request.token, now=now, mono=mono)
        return token_pb2.RevokeTokenResponse(revocation_version=version)


def parse(message: token_pb2.IssueTokenRequest) -> TokenRequest:
    """Return what a caller asks for; `Issuer` checks it."""
    ttl: timedelta | None = None
    if message.HasField("ttl"):
        seconds, nanos = message.ttl.seconds, message.ttl.nanos
        # Outside of what a Duration may be (or we grant), it becomes a life that is refused like zero is.
        valid = 0 <= seconds <= _LONGEST_TTL_SECONDS and 0 <= nanos < 1_000_000_000  # noqa: PLR2004
        ttl = timedelta(seconds=seconds, microseconds=nanos // 1000) if valid else _NOT_A_TTL
    return TokenRequest(message.audience, tuple(message.scopes), ttl)


def response(issued: Issued) -> token_pb2.IssueTokenResponse:
    """Return a finished token as it goes over the wire."""
    message = token_pb2.IssueTokenResponse(
        token=issued.token, scopes=issued.draft.claims.scopes, ttl_shortened=issued.draft.shortened
    )
    message.expires_in.FromTimedelta(issued.expires_in)
    message.refresh_in.FromTimedelta(issued.refresh_in)
    return message


def result(answer: Issued | RefusedError) -> token_pb2.IssueTokenResult:
    """Return one result of a batch."""
    if isinstance(answer, Issued):
        return token_pb2.IssueTokenResult(issued=response(answer))
    refusal = answer.refusal
    refused = token_pb2.IssueTokenRefusal(
        code=CODES[refusal.reason].value[0], reason=refusal.reason, message=refusal.message
    )
    if refusal.retry_after is not None:
        refused.retry_after.FromTimedelta(refusal.retry_after)
    return token_pb2.IssueTokenResult(refused=refused)
