"""Admins of a fleet: whom its policy names, and what they ask the admin port."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from carnet import Identity
from carnet.tls import secure_channel
from carnet.v1 import admin_pb2_grpc
from support.fleet import Fleet, Replica
from support.running_broker import BROKER_NAME

__all__ = ["ADMIN", "ADMINS", "admin_stub"]

ADMIN: Final = "spiffe://prod.example/ns/ops/sa/breakglass"
ADMINS: Final = f"""\
admins:
  - {{ workload: {ADMIN}, from: [127.0.0.0/8] }}
"""
"""What is added to a policy."""


@contextmanager
def admin_stub(
    fleet: Fleet, replica: Replica, identity: Identity | None = None
) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
    """Open the admin port of a replica, as the admin unless it is `identity`."""
    with secure_channel(
        replica.addresses["admin"],
        identity=identity or fleet.identity(ADMIN),
        ca_pem=fleet.ca.root_pem,
        server_name=BROKER_NAME,
    ) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)
