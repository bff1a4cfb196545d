"""What the services of the demo share: one method, ``/shop.Payments/Charge``, with JSON for messages.

A real service has generated code here. Carnet does not care: its interceptors see methods, metadata and certificates.
"""

from __future__ import annotations

import json
from typing import Any, Final

import grpc

__all__ = ["AUDIENCE", "CHARGE", "SERVER_NAME", "charge", "decode", "encode"]

AUDIENCE: Final = "payments"
CHARGE: Final = "/shop.Payments/Charge"
SERVER_NAME: Final = "payments.shop.svc.prod.example"
"""The one DNS name that the PKI gives to payments; clients check it."""


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as it goes over the wire."""
    return json.dumps(message).encode()


def decode(message: bytes) -> dict[str, Any]:
    """Return what came over the wire."""
    decoded: dict[str, Any] = json.loads(message)
    return decoded


def charge(channel: grpc.Channel, amount: int, *, timeout: float = 5.0) -> dict[str, Any]:
    """Charge `amount` at payments. Raises `grpc.RpcError`."""
    call = channel.unary_unary(CHARGE, request_serializer=encode, response_deserializer=decode)
    answer: dict[str, Any] = call({"amount": amount}, timeout=timeout)
    return answer
