"""The other side of the letter box: what a pipeline, or somebody with breakglass, does through Vault alone."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from carnet.errors import ConfigError
from carnet_broker.edges.vault.documents import KEYRING, content_of_entry
from carnet_broker.edges.vault.kv import KvMount
from carnet_broker.edges.vault.requests import BREAKGLASS, REQUESTS, result_of_entry, results_name
from carnet_broker.edges.vault.session import VaultForbiddenError, VaultLoginError, VaultNotTrustedError, VaultSession
from carnet_broker.ports import KeyStoreUnavailableError, RequestKind, RequestResult

__all__ = ["RotationClient"]


class RotationClient:
    """Asks for rotations, and reads the answers. Thread-safe.

    Every method raises `KeyStoreUnavailableError` where Vault gives no answer, and `ConfigError` where it refuses the
    role: then trying again does not help.
    """

    def __init__(self, session: VaultSession) -> None:
        self._session = session
        self._kv = KvMount(session)

    def submit(self, kind: RequestKind, kid: str | None = None) -> str:
        """Write a request, and return its id. `kid` is the key to revoke.

        After `KeyStoreUnavailableError` the request may have been written; sending another is harmless, for both are
        answered by the same rotation.
        """
        request_id = str(uuid.uuid4())
        door, role = (REQUESTS, "ci") if kind is RequestKind.ROTATE else (BREAKGLASS, "breakglass")
        data = {"kind": str(kind)} | ({} if kid is None else {"kid": kid})
        with self._refusals(f"ask to {kind}", role):
            self._kv.write(f"{door}/{request_id}", f"a request to {kind}", data, expected_version=0)
        return request_id

    def result(self, request_id: str) -> RequestResult | None:
        """Return the answer to a request so far, None where no broker has answered yet."""
        with self._refusals("read results", "ci"):
            entry = self._kv.read(results_name(request_id), f"the result of {request_id}")
        if entry is None:
            return None
        result = result_of_entry(entry)
        if result is None:
            self._session.senseless(f"read the result of {request_id}", "it is none that a broker wrote")
        return result

    def keyring(self) -> dict[str, Any]:
        """Return the keyring document as it stands. It holds public keys only."""
        settings = self._session.settings
        with self._refusals("read the keyring", "ci"):
            entry = self._kv.read(KEYRING, "the keyring document")
        if entry is None or entry.data is None:
            msg = (
                f"Vault at {settings.address}: there is no keyring in {settings.environment}: start a broker, which"
                " makes the first key"
            )
            raise KeyStoreUnavailableError(msg)
        return content_of_entry(self._session, entry)

    @contextmanager
    def _refusals(self, what: str, role: str) -> Iterator[None]:
        """Make what Vault refuses to this role a `ConfigError`. `role` is the one that may."""
        settings = self._session.settings
        try:
            yield
        except VaultLoginError as error:
            msg = f"VAULT_ROLE_ID or VAULT_SECRET_ID is wrong: {error}"
            raise ConfigError(msg) from error
        except VaultNotTrustedError as error:
            msg = f"VAULT_CACERT is wrong or not set: {error}"
            raise ConfigError(msg) from error
        except VaultForbiddenError as error:
            msg = (
                f"the role behind VAULT_ROLE_ID may not {what} in {settings.environment}: use the role"
                f" carnet-{role}-{settings.environment}; if it is that one, check the environment"
                f" ({settings.environment}) and the KV mount ({settings.kv_mount})"
            )
            raise ConfigError(msg) from error
