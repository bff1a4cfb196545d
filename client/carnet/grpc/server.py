"""`ServerInterceptor`: callers are verified before a handler of a synchronous server runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import cast

import grpc

from carnet.errors import InvalidTokenError, KeySetUnavailableError
from carnet.grpc.guard import Admitted, AuthContext, Guard, StreamEnd, describe_peer
from carnet.grpc.handlers import Handler, StreamEnder, refuse, wrap_blocking
from carnet.grpc.refusal_log import RefusalLog
from carnet.grpc.refusals import RefusedError, refused_by
from carnet.grpc.rules import Rule
from carnet.trust import Verifier

__all__ = ["ServerInterceptor"]


class ServerInterceptor(grpc.ServerInterceptor):
    """Lets a call through to its handler only with a good token, from the holder of its certificate, with the scopes.

    ::

        interceptor = ServerInterceptor(
            Verifier(audience="payments"),
            {"/shop.Payments/Charge": require(scopes=["charge"]), "/shop.Payments/Ping": allow_unauthenticated()},
        )
        server = grpc.server(pool, interceptors=[interceptor])

    A method without a rule is refused to everybody. The server must ask for client certificates
    (``require_client_auth=True``), unless the verifier was made with ``binding="none"``. In the handler
    `carnet.current()` returns the claims of the caller. `stream` says when streams end: ``"token"`` with the token or
    the caller's certificate, also when one of them is revoked, ``"open"`` never. What a refused caller sees is in
    `carnet.grpc.refusals`; the reason goes to the log ``carnet.grpc``, ten lines a second for each caller. Raises
    `ConfigError` for rules that make no sense.
    """

    def __init__(
        self, verifier: Verifier, rules: Mapping[str, Rule], *, stream: StreamEnd | str = StreamEnd.TOKEN
    ) -> None:
        self._verifier = verifier
        self._guard = Guard(rules, stream=stream)
        if self._guard.accepts_stale:
            verifier.will_accept_stale()
        self._refusals = RefusalLog()
        self._ender = StreamEnder()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler: the caller's certificate is known only inside the call. Called by gRPC."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not self._guard.asks_for_token(method):
            return handler

        def admit(context: grpc.ServicerContext) -> Admitted:
            return self._admit(method, context)

        return wrap_blocking(handler, admit=admit, ender=self._ender)

    def _admit(self, method: str, context: grpc.ServicerContext) -> Admitted:
        peer = cast("AuthContext", context.auth_context())  # Typed as one text for each key; it is a list of them.
        try:
            presented = self._guard.presented(context.invocation_metadata(), peer, now=datetime.now(UTC))
            try:
                claims = self._verifier.verify(
                    presented.token, peer_certificate=presented.certificate, on_stale=self._guard.on_stale(method)
                )
            except (InvalidTokenError, KeySetUnavailableError) as error:
                raise refused_by(error) from error
            return self._guard.admit(method, claims, presented, self._verifier)
        except RefusedError as refused:
            self._refusals.refused(method, describe_peer(peer), refused)
            refuse(context, refused.refusal)
