"""TrustService: which keys to trust, and which tokens no longer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import grpc

from carnet.admission import Admission
from carnet.v1 import trust_pb2, trust_pb2_grpc
from carnet_broker.core.watching import HelloError
from carnet_broker.edges.grpc.calls import LongCall, caller, takes_long_call
from carnet_broker.edges.grpc.poll_answers import PollAnswers
from carnet_broker.edges.grpc.status import UnavailableError
from carnet_broker.edges.grpc.trust_knowledge import invalid
from carnet_broker.edges.grpc.trust_messages import key_set_message, position_of
from carnet_broker.edges.grpc.watch import Watchers
from carnet_broker.issuance import Refusal, RefusalReason, RefusedError
from carnet_broker.ports import Clock, LogPosition
from carnet_broker.revocation_view import RevocationView
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
        watchers: Watchers,
    ) -> None:
        self._watchers = watchers
        self._known = watchers.known
        self._holder = holder
        self._admission = admission
        self._clock = clock
        self._max_age = max_age
        self._answers = PollAnswers()

    async def GetKeySet(  # noqa: N802 - the name in the proto
        self, request: trust_pb2.GetKeySetRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> trust_pb2.GetKeySetResponse:
        """Return the published keys. Raises `UnavailableError` rather than give an empty or a known old set."""
        del context
        self._admit()
        if (
            self._misses(request.missing_key_id)
            and not await self._known.read_keyring()
            and self._misses(request.missing_key_id)
        ):
            msg = "the caller misses a key, and Vault cannot be asked for it"
            raise UnavailableError(msg)
        view = self._holder.view
        if view is None or not view.jwks:
            msg = "no keyring is loaded"
            raise UnavailableError(msg)
        response = key_set_message(view, max_age=self._max_age)
        age = view.age(self._clock.now(), self._clock.mono())
        response.age.FromTimedelta(max(age, timedelta(0)))
        return response

    async def GetRevocations(  # type: ignore[override] # noqa: N802 - as above
        self, request: trust_pb2.GetRevocationsRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> AsyncIterator[bytes]:
        """Yield what was revoked since a position, encoded; one response without a change where that is nothing."""
        del context
        self._admit()
        self._known.check_serves_any(caller())
        try:
            sent = position_of(getattr(request, "from")) if request.HasField("from") else None
        except HelloError as error:
            msg = f"from: {error}"
            raise invalid(msg) from error
        peer = None if sent is None or sent.epoch == 0 else replace(sent, generation=0)
        await self._known.catch_up(peer, by=str(caller().spiffe_id))
        keys, log = self._known.views()
        at = None if peer is None else LogPosition(peer.epoch, peer.revocation_version, peer.revocation_digest)
        to, parts = self._answers.leading_on(at, log.tail, self._known.revocations.snapshot)
        position = trust_pb2.Position(
            epoch=to.epoch,
            generation=keys.keyring.generation,
            revocation_version=to.version,
            revocation_digest=to.digest,
        )
        is_told = False
        for part in parts:
            # Two encodings of a message, one after the other, are the two merged.
            yield part + self._around(position, log)
            is_told = True
        if not is_told:
            yield self._around(position, log)

    def _around(self, position: trust_pb2.Position, log: RevocationView) -> bytes:
        """Return what a response has beside its change, encoded: its age is that of the moment at which it is sent."""
        response = trust_pb2.GetRevocationsResponse(position=position)
        response.age.FromTimedelta(max(log.age(self._clock.now(), self._clock.mono()), timedelta(0)))
        return response.SerializeToString()

    @takes_long_call
    async def Watch(self, call: LongCall, context: grpc.aio.ServicerContext[object, object]) -> None:  # type: ignore[override] # noqa: N802
        """Serve one verifier until its stream ends."""
        del context
        await self._watchers.serve(call)

    def _admit(self) -> None:
        """Raise `RefusedError` where the caller asks too often."""
        retry_after = self._admission.admit(str(caller().spiffe_id), 1, self._clock.mono())
        if retry_after is not None:
            refusal = Refusal(RefusalReason.TOO_MANY_REQUESTS, "too many requests of this workload", retry_after)
            raise RefusedError(refusal)

    def _misses(self, kid: str) -> bool:
        """Say whether the caller named a key that this replica does not publish."""
        view = self._holder.view
        return bool(kid) and (view is None or all(key.kid != kid for key in view.keyring.published))
