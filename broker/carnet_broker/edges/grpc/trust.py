"""TrustService: which keys to trust."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

import grpc

from carnet.admission import Admission
from carnet.v1 import trust_pb2, trust_pb2_grpc
from carnet_broker.edges.grpc.calls import caller
from carnet_broker.edges.grpc.status import UnavailableError
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError
from carnet_broker.ports import Clock
from carnet_broker.signing import KeyringHolder

__all__ = ["TrustServicer"]


class TrustServicer(trust_pb2_grpc.TrustServiceServicer):
    """Serves TrustService on an asyncio server."""

    def __init__(
        self,
        *,
        holder: KeyringHolder,
        admission: Admission,
        clock: Clock,
        max_age: timedelta,
        read_again: Callable[[], Awaitable[bool]],
    ) -> None:
        """Wire the parts. `read_again` makes the replica read the keyring, and says whether Vault answered."""
        self._holder = holder
        self._admission = admission
        self._clock = clock
        self._max_age = max_age
        self._read_again = read_again

    async def GetKeySet(  # noqa: N802 - the name in the proto
        self, request: trust_pb2.GetKeySetRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> trust_pb2.GetKeySetResponse:
        """Return the published keys. Raises `UnavailableError` rather than give an empty or a known old set."""
        del context
        retry_after = self._admission.admit(str(caller().spiffe_id), 1, self._clock.mono())
        if retry_after is not None:
            refusal = Refusal(RefusalReason.TOO_MANY_REQUESTS, "too many requests of this workload", retry_after)
            raise RefusedError(refusal)
        if (
            self._misses(request.missing_key_id)
            and not await self._read_again()
            and self._misses(request.missing_key_id)
        ):
            msg = "the caller misses a key, and Vault cannot be asked for it"
            raise UnavailableError(msg)
        view = self._holder.view
        if view is None or not view.jwks:
            msg = "no keyring is loaded"
            raise UnavailableError(msg)
        response = trust_pb2.GetKeySetResponse(
            issuer=view.keyring.issuer, generation=view.keyring.generation, jwks=view.jwks
        )
        response.max_age.FromTimedelta(self._max_age)
        age = view.age(self._clock.now(), self._clock.mono())
        response.age.FromTimedelta(max(age, timedelta(0)))
        return response

    def _misses(self, kid: str) -> bool:
        """Say whether the caller named a key that this replica does not publish."""
        view = self._holder.view
        return bool(kid) and (view is None or all(key.kid != kid for key in view.keyring.published))
