"""Bringing Vault into a wanted state: read first, write only what differs, and say what was done.

This is what makes a bootstrap repeatable. Each step looks at Vault and not at what an earlier run may have done, so a
run after a finished one writes nothing, and a run after a half-finished one does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import hvac
import requests

from carnet.errors import ConfigError

__all__ = ["BootstrapError", "Item", "Outcome", "Report", "Vault"]


class BootstrapError(ConfigError):
    """Vault holds something that is in the way, or refuses. The message names it and says what to do."""

    code = "BOOTSTRAP"


class Outcome(StrEnum):
    """What a step had to do."""

    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in Vault, or one file, that has been brought into its wanted state."""

    name: str
    outcome: Outcome


Report = Callable[[Item], None]


def _data(answer: dict[str, Any] | requests.Response | None) -> dict[str, Any] | None:
    if isinstance(answer, requests.Response):
        msg = "what answers at VAULT_ADDR is not Vault; set it to Vault's URL, without a path"
        raise BootstrapError(msg)
    return None if answer is None else answer["data"]


class Vault:
    """The few calls that a bootstrap needs. Errors are those of hvac and requests."""

    def __init__(self, client: hvac.Client, report: Report) -> None:
        self._client = client
        self._report = report

    def report(self, name: str, outcome: Outcome) -> None:
        """Tell the caller that `name` is now as it should be."""
        self._report(Item(name, outcome))

    def read(self, path: str) -> dict[str, Any] | None:
        """Return the data at `path`, None where there is none."""
        return _data(self._client.read(path))

    def keys(self, path: str) -> list[str]:
        """Return the names under `path`."""
        found = _data(self._client.list(path))
        return [] if found is None else list(found["keys"])

    def write(self, path: str, **data: object) -> dict[str, Any]:
        """Write `data` to `path` and return the data of the answer, empty where there is none."""
        answer = self._client.write_data(path, data=data)
        return answer.get("data") or {} if isinstance(answer, dict) else {}

    def ensure(
        self, name: str, path: str, wanted: Mapping[str, Any], *, optional: frozenset[str] = frozenset()
    ) -> None:
        """Make the settings at `path` be `wanted`; others stay as they are.

        Values are compared as Vault gives them back, so durations are given in the form of the answer. `optional` names
        settings that some servers do not have: where the answer lacks one, it is not missed.
        """
        current = self.read(path)
        if current is None:
            self.write(path, **wanted)
            self.report(name, Outcome.CREATED)
        elif any(current.get(key) != value for key, value in wanted.items() if key in current or key not in optional):
            self.write(path, **wanted)
            self.report(name, Outcome.CHANGED)
        else:
            self.report(name, Outcome.UNCHANGED)

    def ensure_mount(
        self, kind: str, path: str, type_: str, *, max_lease: int = 0, options: Mapping[str, str] | None = None
    ) -> None:
        """Enable the engine `type_` at `path`; `kind` is ``mounts`` or ``auth``, `max_lease` seconds (0: Vault's)."""
        name = f"{kind.removesuffix('s')} {path}"
        current = (self.read(f"sys/{kind}") or {}).get(f"{path}/")
        if current is None:
            self.write(f"sys/{kind}/{path}", type=type_, config={"max_lease_ttl": max_lease}, options=options)
            self.report(name, Outcome.CREATED)
            return
        # A Vault lists an engine of KV version 2 under its plain type.
        if current["type"] != type_ or (options and (current["options"] or {}) != options):
            msg = f"{path}/ in Vault is a {current['type']} engine with other options; move it, or choose another mount"
            raise BootstrapError(msg)
        if current["config"]["max_lease_ttl"] != max_lease:
            self.write(f"sys/{kind}/{path}/tune", max_lease_ttl=max_lease)
            self.report(name, Outcome.CHANGED)
            return
        self.report(name, Outcome.UNCHANGED)
