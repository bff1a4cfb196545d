"""One wrong certificate (or the good twin of one), and what has to become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from carnet.testing.ca import CertificateAuthority
from certificate_recipe import Presented

__all__ = ["Build", "Client", "Expected", "WrongCertificate"]

Build = Callable[[CertificateAuthority, datetime], Presented]


class Expected(StrEnum):
    """What a server that trusts the authority's root has to do."""

    HANDSHAKE = "handshake"
    """The TLS handshake fails; no call is ever seen."""
    UNAUTHENTICATED = "UNAUTHENTICATED"
    """The handshake passes, and every call is answered UNAUTHENTICATED."""
    ACCEPT = "accept"
    """The caller is who the certificate says; it may still have no right to anything."""


class Client(StrEnum):
    """What can show the certificate to a server."""

    GRPC = "grpc"
    """A gRPC client (BoringSSL)."""
    OPENSSL = "openssl"
    """OpenSSL, from Python's `ssl` or the command: a gRPC client cannot load the key or the certificate."""


@dataclass(frozen=True, slots=True)
class WrongCertificate:
    """A kind of certificate. `name` starts with the id of the rule that it tries."""

    name: str
    expected: Expected
    note: str
    build: Build
    """Makes it: from an authority whose root the server trusts, for the time that is given (aware UTC)."""
    client: Client = Client.GRPC

    @property
    def row(self) -> str:
        """The id of the rule, for instance ``T03``."""
        return self.name.partition("-")[0]
