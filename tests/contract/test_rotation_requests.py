"""The contract of `ports.RotationRequests`: one suite for the fake and for KV in a real OpenBao."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import hvac
import pytest

from carnet_broker.core.keyring import Keyring, Timing
from carnet_broker.core.requests import judge
from carnet_broker.edges.vault import RotationClient, VaultRotationRequests
from carnet_broker.ports import (
    KeyStoreUnavailableError,
    RequestKind,
    RequestResult,
    RequestStatus,
    RotationRequest,
    RotationRequests,
)
from support.fakes import FakeRotationRequests
from support.vault import VaultPlace

_KID = "x" * 42 + "A"
_ACCEPTED = RequestResult(RequestStatus.ACCEPTED, "WAITING_FOR_VERIFIERS", "wait", {"generation": 1})
_DONE = RequestResult(RequestStatus.DONE, "ROTATED", "key x signs", {"active_kid": _KID})
_REFUSED = RequestResult(RequestStatus.REFUSED, "TOO_SOON", "later")


@dataclass(frozen=True)
class Subject:
    """One implementation: the side of the brokers, and that of CI and breakglass."""

    open: Callable[[], RotationRequests]
    submit: Callable[..., str]
    result: Callable[[str], RequestResult | None]


@pytest.fixture(params=["fake", "vault"], name="subject")
def _subject(request: pytest.FixtureRequest) -> Subject:
    """Each implementation in turn."""
    if request.param == "fake":
        fake = FakeRotationRequests()
        return Subject(
            lambda: fake,
            lambda kind, kid=None: fake.submit(kind, kid, breakglass=kind is not RequestKind.ROTATE),
            fake.result,
        )
    place: VaultPlace = request.getfixturevalue("vault_place")
    ci, breakglass = RotationClient(place.session("ci")), RotationClient(place.session("breakglass"))
    return Subject(
        lambda: VaultRotationRequests(place.session()),
        lambda kind, kid=None: (ci if kind is RequestKind.ROTATE else breakglass).submit(kind, kid),
        ci.result,
    )


def _ids(found: object) -> list[str]:
    assert isinstance(found, (list, tuple))
    return [one.request_id for one in found]


def test_empty_box_has_nothing_pending(subject: Subject):
    """Nobody has asked for anything, and that is not an error."""
    assert [] == list(subject.open().pending())
    assert 0 == subject.open().sweep(before=datetime.now(UTC))


def test_requests_come_oldest_first_with_their_door(subject: Subject):
    """Every kind arrives as it was asked for; the two that need breakglass came by its door."""
    asked = [
        subject.submit(RequestKind.ROTATE),
        subject.submit(RequestKind.REVOKE, _KID),
        subject.submit(RequestKind.ROTATE_NOW),
        subject.submit(RequestKind.ROTATE),
    ]
    found = subject.open().pending()
    assert asked == _ids(found)
    assert [(RequestKind.ROTATE, False), (RequestKind.REVOKE, True), (RequestKind.ROTATE_NOW, True)] == [
        (one.kind, one.breakglass) for one in found[:3]
    ]
    assert [None, _KID, None, None] == [one.kid for one in found]
    assert [None] * 4 == [one.result for one in found]
    assert all(one.created_at.utcoffset() == timedelta(0) for one in found)


def test_accepted_request_stays_with_its_answer(subject: Subject):
    """An answer that is not final is seen by CI and by every broker, and may be replaced by the final one."""
    request_id = subject.submit(RequestKind.ROTATE)
    one, other = subject.open(), subject.open()
    one.answer(one.pending()[0], _ACCEPTED)
    assert _ACCEPTED == subject.result(request_id)
    assert [_ACCEPTED] == [request.result for request in other.pending()]
    other.answer(other.pending()[0], _DONE)
    assert _DONE == subject.result(request_id)
    for box in (one, other):
        assert [] == list(box.pending())


@pytest.mark.parametrize("final", [_DONE, _REFUSED], ids=["done", "refused"])
def test_final_answer_stands(subject: Subject, final: RequestResult):
    """A broker that is late does not replace what another one said for good."""
    request_id = subject.submit(RequestKind.ROTATE)
    one, late = subject.open(), subject.open()
    seen_by_late = late.pending()[0]
    one.answer(one.pending()[0], final)
    for result in (_ACCEPTED, _DONE, _REFUSED):
        late.answer(seen_by_late, result)
    assert final == subject.result(request_id)


def test_late_broker_learns_the_answer_of_another(subject: Subject):
    """Who lost the race to answer sees no pending request afterwards, and others are still pending."""
    first, second = subject.submit(RequestKind.ROTATE), subject.submit(RequestKind.ROTATE)
    one, late = subject.open(), subject.open()
    seen_by_late = late.pending()[0]
    one.answer(one.pending()[0], _DONE)
    late.answer(seen_by_late, _REFUSED)
    assert [second] == _ids(late.pending())
    assert (_DONE, None) == (subject.result(first), subject.result(second))


def test_sweep_deletes_only_what_is_old_and_answered(subject: Subject):
    """Open requests stay however old, answered ones until they are old; the results go with the requests."""
    answered, opened, accepted = (subject.submit(RequestKind.ROTATE) for _ in range(3))
    box = subject.open()
    requests = {one.request_id: one for one in box.pending()}
    box.answer(requests[answered], _DONE)
    box.answer(requests[accepted], _ACCEPTED)
    assert 0 == box.sweep(before=requests[answered].created_at)
    assert _DONE == subject.result(answered)
    later = requests[answered].created_at + timedelta(days=1)
    assert 1 == subject.open().sweep(before=later)
    assert None is subject.result(answered)
    assert [opened, accepted] == _ids(subject.open().pending())
    assert 0 == box.sweep(before=later)
    assert [opened, accepted] == _ids(box.pending())


# -- Vault alone -----------------------------------------------------------------------------------------------------


def _put(place: VaultPlace, role: str, name: str, data: dict[str, Any]) -> None:
    """Write an entry as CI or breakglass could by hand."""
    body = {"data": data, "options": {"cas": 0}}
    place.session(role).call("write", "POST", f"{place.kv_path}/{name}", body)


@pytest.mark.parametrize("door", ["requests", "breakglass"])
@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "explode"},
        {"kind": None},
        {"kind": ["rotate"]},
        {"kind": "ROTATE"},
        {"kind": "rotate "},
        {"kind": "rotate", "kid": _KID},
        {"kind": "rotate-now", "force": True},
        {"kind": "revoke"},
        {"kind": "revoke", "kid": "../../keyring"},
        {"kind": "revoke", "kid": 7},
        {"kind": "revoke", "kid": None},
        {"kind": "rotate", "text": "x" * 100_000},
    ],
    ids=lambda data: str(data)[:40],
)
def test_garbage_is_refused_and_does_not_stop_others(vault_place: VaultPlace, door: str, data: dict[str, Any]):
    """Content that is no request gets an answer that says so, once, and the requests around it are read."""
    ci = RotationClient(vault_place.session("ci"))
    before = ci.submit(RequestKind.ROTATE)
    garbage = str(uuid.uuid4())
    _put(vault_place, "breakglass", f"{door}/{garbage}", data)
    after = ci.submit(RequestKind.ROTATE)
    box = VaultRotationRequests(vault_place.session())
    assert [before, after] == _ids(box.pending())
    result = ci.result(garbage)
    assert result is not None
    assert (RequestStatus.REFUSED, "UNREADABLE") == (result.status, result.reason)
    assert [before, after] == _ids(VaultRotationRequests(vault_place.session()).pending())
    versions = vault_place.root().read(f"{vault_place.metadata_path}/results/{garbage}")["data"]["current_version"]
    assert 1 == versions


@pytest.mark.parametrize(
    "name", ["hello", "0" * 36, "A" * 8 + str(uuid.uuid4())[8:]], ids=["a word", "zeros", "capital letters"]
)
def test_name_that_is_no_uuid_is_refused(vault_place: VaultPlace, name: str):
    """A request is named by a UUID; another name is answered where that can be done."""
    _put(vault_place, "ci", f"requests/{name}", {"kind": "rotate"})
    assert [] == list(VaultRotationRequests(vault_place.session()).pending())
    result = RotationClient(vault_place.session("ci")).result(name)
    assert result is not None
    assert "UNREADABLE" == result.reason


def test_folders_and_odd_names_are_passed_over(vault_place: VaultPlace):
    """What cannot be the name of a request is left alone, whoever put it there."""
    root = vault_place.root()
    for name in ("a.b", "x" * 80, "folder/inner", "with space"):
        root.write_data(f"{vault_place.kv_path}/requests/{name}", data={"data": {"kind": "rotate"}})
    request_id = RotationClient(vault_place.session("ci")).submit(RequestKind.ROTATE)
    assert [request_id] == _ids(VaultRotationRequests(vault_place.session()).pending())


@pytest.mark.parametrize("data", [{"kind": "rotate-now"}, {"kind": "revoke", "kid": _KID}], ids=["now", "revoke"])
def test_ci_gets_no_breakglass_by_writing_its_words(vault_place: VaultPlace, data: dict[str, Any]):
    """What takes breakglass and came by CI's door is marked so, and refused by the rules."""
    _put(vault_place, "ci", f"requests/{uuid.uuid4()}", data)
    request = VaultRotationRequests(vault_place.session()).pending()[0]
    assert not request.breakglass
    result = judge(request, Keyring(issuer="https://x"), timing=Timing())
    assert (RequestStatus.REFUSED, "BREAKGLASS_REQUIRED") == (result.status, result.reason)


def test_deleted_request_is_forgotten(vault_place: VaultPlace):
    """A request that somebody deleted is not pending any more, in whichever way it was deleted."""
    client = RotationClient(vault_place.session("ci"))
    softly, wholly, kept = (client.submit(RequestKind.ROTATE) for _ in range(3))
    box = VaultRotationRequests(vault_place.session())
    assert [softly, wholly, kept] == _ids(box.pending())
    vault_place.root().delete(f"{vault_place.metadata_path}/requests/{wholly}")
    assert [softly, kept] == _ids(box.pending())
    vault_place.root().delete(f"{vault_place.kv_path}/requests/{softly}")
    assert [kept] == _ids(VaultRotationRequests(vault_place.session()).pending())


def test_flood_is_read_in_parts_and_starves_nobody(vault_place: VaultPlace):
    """Of thirty requests a round reads five of each door; breakglass is there at once, and all come in the end."""
    ci, breakglass = RotationClient(vault_place.session("ci")), RotationClient(vault_place.session("breakglass"))
    flood = {ci.submit(RequestKind.ROTATE) for _ in range(30)}
    now = breakglass.submit(RequestKind.ROTATE_NOW)
    box = VaultRotationRequests(vault_place.session(), limit=5)
    first = box.pending()
    assert 6 == len(first)
    assert now in _ids(first)
    answered: set[str] = set()
    for _ in range(20):
        for request in box.pending():
            box.answer(request, _REFUSED)
            answered.add(request.request_id)
        if len(answered) == 31:
            break
    assert flood | {now} == answered


def test_same_answer_is_written_once(vault_place: VaultPlace):
    """A broker that says the same again, each round, does not write again."""
    request_id = RotationClient(vault_place.session("ci")).submit(RequestKind.ROTATE)
    for box in (VaultRotationRequests(vault_place.session()), VaultRotationRequests(vault_place.session())):
        for _ in range(3):
            box.answer(box.pending()[0], _ACCEPTED)
    path = f"{vault_place.metadata_path}/results/{request_id}"
    assert 1 == vault_place.root().read(path)["data"]["current_version"]


def test_answer_to_a_request_that_was_not_read_before(vault_place: VaultPlace):
    """An answer may be given by a broker that has the request from elsewhere; a final one there stands."""
    request_id = RotationClient(vault_place.session("ci")).submit(RequestKind.ROTATE)
    request = RotationRequest(request_id, RequestKind.ROTATE, datetime.now(UTC), breakglass=False)
    VaultRotationRequests(vault_place.session()).answer(request, _DONE)
    VaultRotationRequests(vault_place.session()).answer(request, _REFUSED)
    assert _DONE == RotationClient(vault_place.session("ci")).result(request_id)


def test_result_that_no_broker_wrote_is_replaced(vault_place: VaultPlace):
    """A result that cannot be read counts as none: the next answer takes its place."""
    client = RotationClient(vault_place.session("ci"))
    request_id = client.submit(RequestKind.ROTATE)
    path = f"{vault_place.kv_path}/results/{request_id}"
    for data in ({"status": "great"}, {"status": "great", "reason": "", "message": "", "detail": {}}, {}):
        vault_place.root().write_data(path, data={"data": data})
        with pytest.raises(KeyStoreUnavailableError, match="none that a broker wrote"):
            client.result(request_id)
    box = VaultRotationRequests(vault_place.session())
    box.answer(box.pending()[0], _DONE)
    assert _DONE == client.result(request_id)


def test_created_at_is_vaults_clock(vault_place: VaultPlace):
    """The time of a request is when Vault wrote it."""
    before = datetime.now(UTC)
    RotationClient(vault_place.session("ci")).submit(RequestKind.ROTATE)
    time.sleep(0.01)
    created_at = VaultRotationRequests(vault_place.session()).pending()[0].created_at
    assert before - timedelta(milliseconds=1) <= created_at <= datetime.now(UTC)


ODD = ("two words", "a%2Fb", "a%2e", "q?x=1#y", "\u00fc", "semi;colon", "..a", '"quoted",', "back\\slash")


def _stuff(root: hvac.Client, place: VaultPlace, name: str) -> None:
    """Write an entry of any name into the door of CI."""
    path = f"v1/{place.kv_path}/requests/{quote(name, safe='')}"
    root.adapter.request("POST", path, json={"data": {"kind": "junk"}})


def _names(place: VaultPlace, folder: str) -> set[str]:
    found = place.root().list(f"{place.metadata_path}/{folder}")
    return set() if found is None else set(found["data"]["keys"])


@pytest.mark.parametrize("kind", ["odd", "good"])
def test_a_stuffed_door_gets_well_by_itself(vault_place: VaultPlace, kind: str):
    """It is reported and passed over while it cannot be listed, and each look deletes some, with their results.

    The other door, and a request that was read before, wait for nothing.
    """
    ci, breakglass = RotationClient(vault_place.session("ci")), RotationClient(vault_place.session("breakglass"))
    waiting, urgent = ci.submit(RequestKind.ROTATE), breakglass.submit(RequestKind.ROTATE_NOW)
    box = VaultRotationRequests(vault_place.session(), limit=20, max_list_bytes=48 * 1024)
    assert {waiting, urgent} == set(_ids(box.pending()))
    names = {f"{number:03}{'x' * 300}" for number in range(200)} | set(ODD)
    if kind == "good":
        names = {f"{number:03}{'x' * 61}" for number in range(800)}
    root = vault_place.root()
    for name in names:
        _stuff(root, vault_place, name)
    box.answer(RotationRequest(waiting, RequestKind.ROTATE, datetime.now(UTC), breakglass=False), _ACCEPTED)
    assert [urgent] == _ids(box.pending())
    assert frozenset({"requests"}) == box.overfull
    assert 100 == len(names | {waiting}) - len(_names(vault_place, "requests"))
    looks = 1
    while box.overfull:
        box.pending()
        looks += 1
        assert looks < 12
    assert {waiting, urgent} == set(_ids(box.pending()))
    left = _names(vault_place, "requests")
    assert waiting in left
    assert _names(vault_place, "results") <= left | {urgent}


def test_names_that_no_request_can_have_are_deleted_when_they_are_many(vault_place: VaultPlace):
    """Whatever signs they are of; a few are left alone, and a request is read meanwhile."""
    waiting = RotationClient(vault_place.session("ci")).submit(RequestKind.ROTATE)
    root = vault_place.root()
    for name in ODD:
        _stuff(root, vault_place, name)
    few = VaultRotationRequests(vault_place.session(), limit=len(ODD))
    assert [waiting] == _ids(few.pending())
    assert set(ODD) | {waiting} == _names(vault_place, "requests")
    many = VaultRotationRequests(vault_place.session(), limit=len(ODD) - 1)
    assert [waiting] == _ids(many.pending())
    assert {waiting} == _names(vault_place, "requests")
