"""The requests on a Watch stream, as they come in: bytes from a verifier, or a refusal."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from carnet.v1 import trust_pb2
from carnet_broker.core.watching import Hello, HelloError
from carnet_broker.edges.grpc.trust_knowledge import invalid
from carnet_broker.edges.grpc.trust_messages import hello_of

__all__ = ["hello_in", "parsed"]


def hello_in(request: bytes) -> Hello:
    """Return how a verifier introduces itself in its first request. Raises `RefusedError`."""
    message = parsed(request)
    if message.WhichOneof("kind") != "hello":
        msg = "the first request is a hello"
        raise invalid(msg)
    try:
        return hello_of(message.hello)
    except HelloError as error:
        raise invalid(str(error)) from error


def parsed(request: bytes) -> trust_pb2.WatchRequest:
    """Return one request. Raises `RefusedError`."""
    try:
        return trust_pb2.WatchRequest.FromString(request)
    except DecodeError as error:
        msg = "the request is not a message of this method"
        raise invalid(msg) from error
