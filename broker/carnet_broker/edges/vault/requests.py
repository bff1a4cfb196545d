"""The letter box in KV: CI puts requests into ``requests/``, breakglass into ``breakglass/``, brokers answer in
``results/``.

Whoever may write a request may write a thousand, and anything into them. So a round reads a bounded number of each
door, breakglass has its own share, and of more new requests than that a random choice is read: nobody can take all the
places by the name of a request. What was read is remembered, for a request never changes, and a final answer neither.

A door can be stuffed until it cannot be listed any more, and with names that nobody may have. Then each look deletes
some of what is there, so that it gets well by itself: names first that no request has, and for the rest chance decides,
which hits a request that is new as rarely as any other. What was read before, and waits for its answer, stays.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote

from carnet.jwk import is_thumbprint
from carnet_broker.edges.vault.kv import MAX_LIST_BYTES, KvEntry, KvMount, first_names
from carnet_broker.edges.vault.session import VaultSession, VaultTooLargeError
from carnet_broker.ports import (
    DocumentConflictError,
    KeyStoreUnavailableError,
    RequestKind,
    RequestResult,
    RequestStatus,
    RotationRequest,
)

__all__ = ["BREAKGLASS", "REQUESTS", "VaultRotationRequests", "result_of_entry", "results_name"]

REQUESTS: Final = "requests"
BREAKGLASS: Final = "breakglass"
_DOORS: Final = (BREAKGLASS, REQUESTS)
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ANSWERABLE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_REQUEST_BYTES: Final = 16 * 1024
_TRIES: Final = 3
_UNREADABLE: Final = RequestResult(
    RequestStatus.REFUSED,
    "UNREADABLE",
    "the request is not one that `carnet-broker keys rotate` or `keys revoke` writes: send it again with that",
)


@dataclass(slots=True)
class _Known:
    """What is known of one request. `request` is None where it cannot be read."""

    request: RotationRequest | None
    created_at: datetime | None = None
    result: RequestResult | None = None
    result_version: int = 0

    @property
    def is_final(self) -> bool:
        return self.result is not None and self.result.status is not RequestStatus.ACCEPTED


class VaultRotationRequests:
    """The letter box of one environment. Thread-safe; calls are made one after the other."""

    def __init__(self, session: VaultSession, *, limit: int = 100, max_list_bytes: int = MAX_LIST_BYTES) -> None:
        """`limit` is how many new requests, and how many open ones, are read of each door in one round.

        `max_list_bytes`: the longest list of a door that is read.
        """
        self._session = session
        self._kv = KvMount(session)
        self._limit = limit
        self._max_list_bytes = max_list_bytes
        self._lock = threading.Lock()
        self._doors: dict[str, dict[str, _Known]] = {door: {} for door in _DOORS}
        self.overfull: frozenset[str] = frozenset()
        """The doors that hold more than can be listed, and were passed over; for an alarm. Each look deletes some."""

    def pending(self) -> Sequence[RotationRequest]:
        """Return the requests whose result is not final, oldest first, at most `limit` of each door.

        Content that is no request is answered as refused, and does not stop the others; nor does a door that was
        stuffed until it cannot be listed: see `overfull`. Raises `KeyStoreUnavailableError`.
        """
        with self._lock:
            found: list[RotationRequest] = []
            for name in self._look_everywhere():
                found += self._open(name)
            return sorted(found, key=lambda request: request.created_at)

    def answer(self, request: RotationRequest, result: RequestResult) -> None:
        """Write the result of `request`, unless a final one is there already. Raises `KeyStoreUnavailableError`."""
        with self._lock:
            door = BREAKGLASS if request.breakglass else REQUESTS
            default = _Known(request, request.created_at)
            known = self._doors[door].setdefault(request.request_id, default)
            self._answer(request.request_id, known, result)

    def sweep(self, *, before: datetime) -> int:
        """Delete requests, with their results, that were answered for good and made before `before`; say how many.

        At most ten times `limit` in one call. Raises `KeyStoreUnavailableError`.
        """
        deleted = 0
        with self._lock:
            for name in self._look_everywhere():
                self._open(name)
                known = self._doors[name]
                for request_id, one in list(known.items()):
                    if one.is_final and one.created_at is not None and one.created_at < before:
                        # The result goes first: a request without one is answered again, a result without a request
                        # would stay for ever.
                        self._kv.destroy(results_name(request_id), f"the result of {request_id}")
                        self._kv.destroy(f"{name}/{request_id}", f"request {request_id}")
                        del known[request_id]
                        deleted += 1
                        if deleted >= 10 * self._limit:
                            return deleted
        return deleted

    # -- reading ---------------------------------------------------------------------------------------------------

    def _look_everywhere(self) -> list[str]:
        """Look at every door, and return those that could be."""
        overfull = set()
        for door in _DOORS:
            try:
                self._look(door)
            except VaultTooLargeError as error:
                overfull.add(door)
                self._delete_some(door, first_names(error.beginning))
        self.overfull = frozenset(overfull)
        return [door for door in _DOORS if door not in overfull]

    def _look(self, door: str) -> None:
        """Read up to `limit` requests that are new, and forget those that are gone."""
        listed = self._kv.names(door, f"the {door}", max_bytes=self._max_list_bytes)
        names = [name for name in listed if _ANSWERABLE.fullmatch(name)]
        if len(listed) - len(names) > self._limit:
            self._delete_some(door, set(listed) - set(names))
        known = self._doors[door]
        for gone in known.keys() - set(names):
            del known[gone]
        new = [name for name in names if name not in known]
        if len(new) > self._limit:
            new = random.sample(new, self._limit)  # For fairness, not for secrecy.
        for name in new:
            one = self._read(door, name)
            if one.request is None:
                self._answer(name, one, _UNREADABLE)
            known[name] = one

    def _delete_some(self, door: str, names: Collection[str]) -> None:
        """Delete up to five times `limit` of these names with their results: those first that no request has."""
        known = self._doors[door]
        surplus = [name for name in names if not name.endswith("/") and (name not in known or known[name].is_final)]
        random.shuffle(surplus)
        surplus.sort(key=lambda name: _ANSWERABLE.fullmatch(name) is not None)
        for name in surplus[: 5 * self._limit]:
            try:
                if _ANSWERABLE.fullmatch(name):
                    self._kv.destroy(results_name(name), "the result of a surplus request")
                self._kv.destroy(f"{door}/{quote(name, safe='')}", "a surplus request")
            except KeyStoreUnavailableError:
                return  # The door stays reported, and the next look tries others; the other door must not wait.
            known.pop(name, None)

    def _read(self, door: str, name: str) -> _Known:
        try:
            entry = self._kv.read(f"{door}/{name}", f"request {name}", max_bytes=_MAX_REQUEST_BYTES)
        except VaultTooLargeError:
            entry = None
        if entry is None:
            return _Known(None)
        request = _request_of_entry(name, entry, breakglass=door == BREAKGLASS)
        return _Known(request, entry.created_at)

    def _open(self, door: str) -> list[RotationRequest]:
        """Return the oldest requests of `door` without a final result, with the result so far read anew."""
        candidates = [
            (one.created_at, name, one)
            for name, one in self._doors[door].items()
            if one.request is not None and one.created_at is not None and not one.is_final
        ]
        found = []
        for _, name, one in sorted(candidates, key=lambda each: each[:2])[: self._limit]:
            self._refresh(name, one)
            if one.request is not None and not one.is_final:
                found.append(_with_result(one.request, one.result))
        return found

    def _refresh(self, name: str, one: _Known) -> None:
        """Read the result of a request anew."""
        entry = self._kv.read(results_name(name), f"the result of {name}")
        one.result_version = 0 if entry is None else entry.version
        one.result = None if entry is None else result_of_entry(entry)

    # -- answering -------------------------------------------------------------------------------------------------

    def _answer(self, name: str, one: _Known, result: RequestResult) -> None:
        what = f"the result of {name}"
        for _ in range(_TRIES):
            if one.is_final or one.result == result:
                return
            try:
                version = self._kv.write(
                    results_name(name), what, _result_to_data(result), expected_version=one.result_version
                )
            except DocumentConflictError:
                self._refresh(name, one)  # Another broker answered; if for good, its answer stands.
                continue
            one.result, one.result_version = result, version
            return
        msg = f"{what} is written by several brokers at once: it is tried again"
        raise KeyStoreUnavailableError(msg)


def results_name(request_id: str) -> str:
    """Return the name of the entry that holds the result of a request."""
    return f"results/{request_id}"


def result_of_entry(entry: KvEntry) -> RequestResult | None:
    """Return the result in `entry`, None where it is none that a broker wrote."""
    data = entry.data
    if data is None or data.keys() != {"status", "reason", "message", "detail"}:
        return None
    reason, message, detail = data["reason"], data["message"], data["detail"]
    if not (isinstance(reason, str) and isinstance(message, str) and isinstance(detail, dict)):
        return None
    try:
        status = RequestStatus(data["status"])
    except ValueError:
        return None
    return RequestResult(status, reason, message, detail)


def _result_to_data(result: RequestResult) -> dict[str, Any]:
    return {
        "status": str(result.status),
        "reason": result.reason,
        "message": result.message,
        "detail": result.detail,
    }


def _request_of_entry(name: str, entry: KvEntry, *, breakglass: bool) -> RotationRequest | None:
    """Return the request in `entry`, None where it is none."""
    data = entry.data
    if data is None or not _UUID.fullmatch(name):
        return None
    try:
        kind = RequestKind(data.get("kind", ""))
    except ValueError:
        return None
    kid = data.get("kid")
    if kind is RequestKind.REVOKE:
        if data.keys() != {"kind", "kid"} or not isinstance(kid, str) or not is_thumbprint(kid):
            return None
    elif data.keys() != {"kind"}:
        return None
    return RotationRequest(name, kind, entry.created_at, breakglass, kid)


def _with_result(request: RotationRequest, result: RequestResult | None) -> RotationRequest:
    return RotationRequest(
        request.request_id, request.kind, request.created_at, request.breakglass, request.kid, result
    )
