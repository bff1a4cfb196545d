from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carnet_broker.core.ledger import (
    MAX_LINE_BYTES,
    MAX_REFUSAL_BYTES,
    DroppedRecord,
    IssueRecord,
    KeyRevocationRecord,
    OpenedRecord,
    RefusalRecord,
    RevocationRecord,
)

NOW = datetime(2026, 11, 24, 12, 0, 0, 123456, tzinfo=UTC)
ISSUE = IssueRecord(
    at=NOW,
    token_id="jjjjjjjjjjjjjjjjjjjjjj",
    kid="k" * 43,
    subject="spiffe://prod.example/ns/shop/sa/orders",
    audience="payments",
    scopes=("charge", "refund"),
    expires_at=NOW + timedelta(minutes=5),
    certificate="c" * 43,
    policy="p1",
)
ANY_TEXT = st.text(st.characters(exclude_categories=())) | st.text(
    '\r\n\u2028\u2029\x1b\x7f\x00"\\\ud800\udfff\U0001f600'
)

# B10: what a peer may try to put into a field.
HOSTILE = {
    "carriage return, line feed": 'x\r\n{"v":1,"kind":"issue"}',
    "line separators": "x\u2028y\u2029z\x85\x0b\x0c",
    "terminal escapes": "\x1b[2J\x1b]0;owned\x07\x9b31m",
    "delete": "x\x7f\x08\x08",
    "quotes": '","kind":"issue","x":"',
    "backslashes": '\\\\"\\u000a',
    "nul": "a\x00b",
    "lone surrogates": "a\ud800b\udfff",
    "right to left": "\u202etxt.exe\u2066",
    "invalid UTF-8, as Python holds it": b"\xff\xfe\x80".decode("utf-8", "surrogateescape"),
    "a megabyte": "A" * 1_000_000,
    "a megabyte of what is long when escaped": "\U0001f600" * 250_000,
}


def parsed(line: bytes) -> dict[str, Any]:
    """Return the object that `line` is, after checking that it is one line and harmless."""
    assert line.endswith(b"\n")
    assert 1 == line.count(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])
    assert len(line) <= MAX_LINE_BYTES
    assert 1 == len(line.decode().splitlines())
    members = json.loads(line)
    json.dumps(members, ensure_ascii=False).encode("utf-8")  # No lone surrogate came through.
    assert isinstance(members, dict)
    return members


def test_an_issue_says_what_is_issued_to_whom_and_why():
    """Members that mean a claim have the claim's name."""
    assert {
        "v": 1,
        "kind": "issue",
        "at": "2026-11-24T12:00:00.123Z",
        "jti": "jjjjjjjjjjjjjjjjjjjjjj",
        "kid": "k" * 43,
        "sub": "spiffe://prod.example/ns/shop/sa/orders",
        "aud": "payments",
        "scope": ["charge", "refund"],
        "exp": "2026-11-24T12:05:00.123Z",
        "certificate": "c" * 43,
        "bound": True,
        "policy": "p1",
    } == parsed(ISSUE.to_line())


def test_an_issue_names_its_rule_where_there_is_one_and_whether_it_is_bound():
    """`bound` is there either way: that a token is not bound to a certificate is worth finding."""
    members = parsed(replace(ISSUE, rule="grants[3]", bound=False).to_line())

    assert "grants[3]" == members["rule"]
    assert members["bound"] is False


def test_a_refusal_says_what_is_known_and_leaves_out_the_rest():
    """Without an identity there may be nothing but a reason and an address."""
    full = RefusalRecord(
        at=NOW,
        reason="NOT_GRANTED",
        subject="spiffe://prod.example/a",
        audience="bank",
        scopes=("transfer",),
        certificate="c" * 43,
        policy="p1",
        peer="ipv4:10.0.0.1:5",
        detail="why",
    )

    assert {"v": 1, "kind": "refusal", "at": "2026-11-24T12:00:00.123Z", "reason": "EXPIRED"} == parsed(
        RefusalRecord(at=NOW, reason="EXPIRED").to_line()
    )
    assert {
        "v": 1,
        "kind": "refusal",
        "at": "2026-11-24T12:00:00.123Z",
        "reason": "NOT_GRANTED",
        "sub": "spiffe://prod.example/a",
        "aud": "bank",
        "certificate": "c" * 43,
        "policy": "p1",
        "peer": "ipv4:10.0.0.1:5",
        "detail": "why",
        "scope": ["transfer"],
    } == parsed(full.to_line())


def test_the_first_line_of_a_file_names_its_writer():
    """Host and process."""
    assert {"v": 1, "kind": "opened", "at": "2026-11-24T12:00:00.123Z", "writer": "host 7"} == parsed(
        OpenedRecord(NOW, "host 7").to_line()
    )


def test_dropped_refusals_are_counted():
    """How many, and since when."""
    assert {
        "v": 1,
        "kind": "dropped",
        "at": "2026-11-24T12:00:00.123Z",
        "since": "2026-11-24T11:59:00.123Z",
        "n": 17,
    } == parsed(DroppedRecord(NOW, NOW - timedelta(minutes=1), 17).to_line())


def test_times_are_utc_whatever_zone_they_come_in():
    """One hour east of Greenwich."""
    east = NOW.astimezone(timezone(timedelta(hours=1)))

    assert OpenedRecord(NOW, "x").to_line() == OpenedRecord(east, "x").to_line()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_b10_no_text_gets_out_of_its_field(text: str):
    """Every field that a peer can fill: one line, the field stays the field, and it is cut."""
    members = parsed(
        RefusalRecord(
            at=NOW,
            reason=text,
            subject=text,
            audience=text,
            scopes=(text,),
            certificate=text,
            policy=text,
            peer=text,
            detail=text,
        ).to_line()
    )
    assert "refusal" == members["kind"]
    assert {"v", "kind", "at", "reason", "sub", "aud", "certificate", "policy", "peer", "detail", "scope"} == set(
        members
    )
    assert len(members["aud"]) <= 256 + 30
    assert len(members["sub"]) <= 2048 + 30

    issue = parsed(
        replace(
            ISSUE, token_id=text, kid=text, subject=text, audience=text, scopes=(text,), certificate=text, policy=text
        ).to_line()
    )
    assert "issue" == issue["kind"]


@pytest.mark.parametrize("length", [255, 256, 257])
def test_a_field_is_cut_at_its_limit_and_says_so(length: int):
    """256 characters; the reader is told how many there were."""
    cut = parsed(RefusalRecord(at=NOW, reason="R", audience="a" * length).to_line())["aud"]

    assert ("a" * length if length <= 256 else "a" * 256 + "...(257 characters)") == cut


@pytest.mark.parametrize(("count", "told"), [(0, None), (8, None), (9, 9), (64, 64), (10_000, 10_000)])
def test_b10_a_long_list_of_scopes_that_were_refused_is_cut_and_counted(count: int, told: int | None):
    """Eight are recorded: whoever is refused chooses how many there are, and how often."""
    members = parsed(RefusalRecord(at=NOW, reason="R", scopes=("s",) * count).to_line())

    assert min(count, 8) == len(members.get("scope", []))
    assert told == members.get("scopes_asked")


def test_an_issue_has_all_of_its_scopes():
    """The twin: 64, of 128 characters each, is all that a token can have; none is cut."""
    scopes = tuple(f"{number:03}" + "s" * 125 for number in range(64))

    assert list(scopes) == parsed(replace(ISSUE, scopes=scopes).to_line())["scope"]


@pytest.mark.parametrize("text", ["A" * 5000, "\U0001f600" * 5000, '"' * 5000, "\x7f" * 5000, "\x00a" * 5000])
def test_b10_a_refusal_takes_no_more_than_its_part_of_the_disk(text: str):
    """4,096 bytes, whatever a stranger sends: what is long when it is escaped is cut sooner, and says so."""
    fields = dict.fromkeys(("reason", "subject", "audience", "certificate", "policy", "peer", "detail"), text)
    line = RefusalRecord(at=NOW, scopes=(text,) * 10_000, **fields).to_line()
    members = parsed(line)

    assert len(line) <= MAX_REFUSAL_BYTES
    assert 10_000 == members["scopes_asked"]
    assert members["aud"].endswith(f"...({len(text)} characters)")


def test_a_refusal_keeps_the_scopes_that_there_is_room_for():
    """Eight of 128 characters beside a name of usual length; beside fields that are all full, the first ones."""
    scopes = tuple(f"{number}" + "s" * 127 for number in range(8))
    usual = RefusalRecord(at=NOW, reason="R", subject="spiffe://prod.example/" + "s" * 500, scopes=scopes)
    full = dict.fromkeys(("reason", "audience", "certificate", "policy", "peer", "detail"), "x" * 256)

    assert list(scopes) == parsed(usual.to_line())["scope"]
    members = parsed(replace(usual, subject="s" * 2048, **full).to_line())
    assert 8 == members["scopes_asked"]
    assert scopes[:2] == tuple(members["scope"])
    assert ["s" * 2048, "x" * 256] == [members["sub"], members["detail"]]


def test_the_longest_line_is_within_the_promise():
    """All fields full of what is longest when it is escaped."""
    text = "\U0001f600" * 5000
    for record in (
        RefusalRecord(
            at=NOW,
            reason=text,
            subject=text,
            audience=text,
            scopes=(text,) * 100,
            certificate=text,
            policy=text,
            peer=text,
            detail=text,
        ),
        replace(
            ISSUE,
            token_id=text,
            kid=text,
            subject=text,
            audience=text,
            scopes=(text,) * 100,
            certificate=text,
            policy=text,
            rule=text,
        ),
        OpenedRecord(NOW, text),
    ):
        parsed(record.to_line())


@settings(deadline=None)  # A busy machine is slow, and that is not what is tested here.
@given(text=ANY_TEXT, scope=ANY_TEXT)
def test_b10_no_text_at_all_gets_out_of_its_field(text: str, scope: str):
    """Whatever it is made of; and what is a text, and short, comes back as it was."""
    members = parsed(RefusalRecord(at=NOW, reason="R", audience=text, scopes=(scope,), peer=text).to_line())

    whole = text.encode("utf-8", "replace").decode("utf-8")
    if 0 < len(text) <= 21:  # Of 12 bytes each, in the 256 that there are.
        assert whole == members["aud"]
    assert 1 == len(members["scope"])


def test_no_record_has_a_place_for_a_token():
    """A ledger that held tokens would be the thing to steal."""
    for kind in (IssueRecord, RefusalRecord, DroppedRecord, OpenedRecord):
        assert {"token", "jwt", "signature", "key"}.isdisjoint(kind.__dataclass_fields__)


def test_the_line_of_a_revoked_key_says_who_and_what_signs_now() -> None:
    """The members are those that whoever looks for the key asks for."""
    at = datetime(2026, 11, 24, 12, tzinfo=UTC)
    record = KeyRevocationRecord(
        at=at, kid="old", generation=7, active="new", by="spiffe://a/b", certificate="leaf", peer="ipv4:127.0.0.1:1"
    )
    expected = {
        "v": 1,
        "kind": "key_revocation",
        "at": "2026-11-24T12:00:00.000Z",
        "kid": "old",
        "generation": 7,
        "active": "new",
        "by": "spiffe://a/b",
        "certificate": "leaf",
        "peer": "ipv4:127.0.0.1:1",
    }
    assert expected == json.loads(record.to_line())


@pytest.mark.parametrize("is_full", [True, False])
def test_a_revocation_is_one_line_of_what_is_known_of_it(is_full):
    """What is not known has no member."""
    more = {"before_version": 7, "expires_at": datetime(2026, 11, 24, 13, tzinfo=UTC), "reason": "stolen"}
    known = more if is_full else {"before_version": 0, "expires_at": None}
    record = RevocationRecord(
        at=datetime(2026, 11, 24, 12, tzinfo=UTC),
        epoch=3,
        version=7,
        what="subject",
        value="spiffe://prod.example/a",
        by="spiffe://prod.example/admin",
        certificate="A" * 43,
        **known,
    )
    members = json.loads(record.to_line())
    assert (3, 7, "subject") == (members["epoch"], members["version"], members["what"])
    assert is_full == ("reason" in members) == ("before_version" in members) == ("expires_at" in members)
