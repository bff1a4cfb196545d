"""The names in Vault: where the engines are mounted, and what a workload is called there."""

from __future__ import annotations

from dataclasses import dataclass

from carnet.errors import InvalidIdentityError
from carnet.spiffe import SpiffeID, server_dns_name

__all__ = ["Mounts", "Workload"]


@dataclass(frozen=True, slots=True)
class Mounts:
    """Where the engines are mounted, without slashes at the ends."""

    kv: str = "carnet"
    transit: str = "transit"
    pki: str = "pki"
    pki_int: str = "pki_int"
    approle: str = "approle"


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload that gets a PKI role of its own."""

    spiffe_id: SpiffeID
    serves: bool = False

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Return the workload that ``SPIFFE_ID`` or ``SPIFFE_ID,serves`` names, or raise `InvalidIdentityError`."""
        name, comma, flag = text.partition(",")
        if comma and flag != "serves":
            msg = f"workload {text[:80]!r}: after the comma only 'serves' may stand"
            raise InvalidIdentityError(msg)
        workload = cls(SpiffeID.parse(name), serves=bool(comma))
        if workload.serves:
            server_dns_name(workload.spiffe_id)  # Raises here, and not halfway through a bootstrap.
        return workload

    @property
    def role(self) -> str:
        """The name of its PKI role: the path with dashes."""
        return "-".join(self.spiffe_id.segments)

    @property
    def dns_name(self) -> str | None:
        """The one DNS name that it may serve by, None where it does not serve."""
        return server_dns_name(self.spiffe_id) if self.serves else None
