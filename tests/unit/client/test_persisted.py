"""What a verifier keeps for the next start: who may write it, what is read of it, and which of two wins."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from carnet.errors import ConfigError
from carnet.jwk import KeySet, PublicJWK
from carnet.persisted import StateFile, StateFileError, StateKeeper
from carnet.revocations import Position, Revocation, RevocationKind
from carnet.trust_state import SavedTrust

ISSUER = "https://tokens.prod.example"
WALL = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
ORDERS = "spiffe://prod.example/ns/shop/sa/orders"
BUDGET = timedelta(minutes=5)
ENTRIES = (
    Revocation(1, RevocationKind.TOKEN, "token-0000000000000001", 0, WALL + timedelta(hours=1)),
    Revocation(2, RevocationKind.SUBJECT, ORDERS, 2, WALL + timedelta(hours=1)),
    Revocation(3, RevocationKind.BLOCK, ORDERS, 3, None),
)
TRUST = SavedTrust(
    Position(1_700_000_000_000, 4, 3, bytes(range(32))),
    KeySet.of([PublicJWK.of(ec.generate_private_key(ec.SECP256R1()).public_key())]),
    timedelta(minutes=5),
    ENTRIES,
    timedelta(seconds=2),
)


def state_file(directory: Path, audience: str = "payments") -> StateFile:
    """Return the file of a verifier."""
    return StateFile(directory / "state", issuer=ISSUER, audience=audience)


def test_what_is_kept_is_what_is_read_and_it_ages(tmp_path: Path):
    """Keys, position and entries as they were; the age is that of then and the time since."""
    file = state_file(tmp_path)
    assert None is file.load(wall=WALL, max_age=BUDGET)
    assert file.save(TRUST, wall=WALL)
    kept = file.load(wall=WALL + timedelta(seconds=60), max_age=BUDGET)
    assert timedelta(seconds=62) == kept.age
    assert TRUST.keys.keys.keys() == kept.keys.keys.keys()
    assert (TRUST.position, TRUST.entries, TRUST.max_age) == (kept.position, kept.entries, kept.max_age)
    assert (0o700, 0o600) == (file.path.parent.stat().st_mode & 0o777, file.path.stat().st_mode & 0o777)
    assert [file.path] == list(file.path.parent.iterdir())


@pytest.mark.parametrize("later", [timedelta(minutes=5), timedelta(seconds=-10)])
def test_a_file_that_is_too_old_or_from_the_future_is_not_used(later: timedelta, tmp_path: Path):
    """A clock that was set back says nothing of how old it is."""
    file = state_file(tmp_path)
    file.save(TRUST, wall=WALL)
    with pytest.raises(StateFileError, match="too old, or in the future"):
        file.load(wall=WALL + later, max_age=BUDGET)


def test_a_clock_that_was_set_back_a_little_does_not_make_a_file_younger(tmp_path: Path):
    """Within one run of the machine the time since its start counts, where it is more."""
    file = state_file(tmp_path)
    file.save(TRUST, wall=WALL)
    text = file.path.read_text().split("\n", 1)
    head = json.loads(text[0])
    head["known_at_uptime_ms"] -= 600_000
    file.path.write_text(json.dumps(head) + "\n" + text[1])
    with pytest.raises(StateFileError, match="too old"):
        file.load(wall=WALL + timedelta(seconds=1), max_age=BUDGET)
    head["boot"] = "another run"
    file.path.write_text(json.dumps(head) + "\n" + text[1])
    assert timedelta(seconds=3) == file.load(wall=WALL + timedelta(seconds=1), max_age=BUDGET).age


def test_each_audience_has_a_file_of_its_own_and_none_reads_that_of_another(tmp_path: Path):
    """Two services in one directory; a file that was renamed is not believed."""
    payments, bank = state_file(tmp_path), state_file(tmp_path, "bank")
    payments.save(TRUST, wall=WALL)
    assert None is bank.load(wall=WALL, max_age=BUDGET)
    payments.path.rename(bank.path)
    with pytest.raises(StateFileError, match="another issuer or audience"):
        bank.load(wall=WALL, max_age=BUDGET)


def _head(**changed: object) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        head, _, body = raw.partition(b"\n")
        return json.dumps(json.loads(head) | changed).encode() + b"\n" + body

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-5],
        lambda raw: raw + b"\n",
        lambda raw: raw.partition(b"\n")[0],
        lambda raw: b"",
        lambda raw: b"{}\n",
        lambda raw: raw.replace(b"token-", b"other-"),
        lambda raw: b"[1]" + raw,
        lambda raw: b"\xff" + raw,
        _head(format=2),
        _head(more=1),
        _head(generation=-1),
        _head(generation=True),
        _head(generation="4"),
        _head(known_at_ms=2**60),
        _head(known_at_ms=2**53),
        _head(revocation_digest="00"),
        _head(revocation_digest="x" * 64),
        _head(revocation_digest=7),
        _head(sha256=7),
        _head(boot=None),
    ],
)
def test_a_file_with_anything_wrong_in_it_is_not_used_and_not_in_the_way(
    damage: Callable[[bytes], bytes], tmp_path: Path
):
    """Half a file, another form, another type, another content: refused, and the next one is written over it."""
    file = state_file(tmp_path)
    file.save(TRUST, wall=WALL)
    file.path.write_bytes(damage(file.path.read_bytes()))
    with pytest.raises(StateFileError):
        file.load(wall=WALL + timedelta(seconds=1), max_age=BUDGET)
    newer = replace(TRUST, position=replace(TRUST.position, revocation_version=9))
    assert file.save(newer, wall=WALL)
    assert newer.position == file.load(wall=WALL, max_age=BUDGET).position


@pytest.mark.parametrize(
    "line",
    [
        [1, "token", "token-0000000000000001", 0],
        [1, "token", 7, 0, None],
        ["1", "token", "token-0000000000000001", 0, 1795521600],
        [1, "token", "token-0000000000000001", 0, None],
        [1, "token", "token-0000000000000001", 0, 2**60],
        [1, "grudge", "token-0000000000000001", 0, 1795521600],
        [1, "token", "short", 0, 1795521600],
        {"version": 1},
    ],
)
def test_an_entry_that_cannot_be_makes_the_whole_file_useless(line: object, tmp_path: Path):
    """Its checksum is right: it was written by something that is wrong."""
    file = state_file(tmp_path)
    file.save(TRUST, wall=WALL)
    head, keys, _ = file.path.read_bytes().split(b"\n", 2)
    body = keys + b"\n" + json.dumps(line).encode() + b"\n"

    checksum = hashlib.sha256(body).hexdigest()
    file.path.write_bytes(json.dumps(json.loads(head) | {"sha256": checksum}).encode() + b"\n" + body)
    with pytest.raises(StateFileError, match="cannot be"):
        file.load(wall=WALL, max_age=BUDGET)


def test_of_two_processes_the_last_wins_but_never_with_a_lower_position(tmp_path: Path):
    """Two workers write one file: within an epoch nothing goes back, and what is alike gets no older."""
    file = state_file(tmp_path)
    assert file.save(TRUST, wall=WALL)
    position = TRUST.position
    for lower in (
        replace(position, revocation_version=2),
        replace(position, generation=3, revocation_version=9),
        replace(position, epoch=position.epoch - 1, generation=9, revocation_version=9),
    ):
        assert not file.save(replace(TRUST, position=lower), wall=WALL + timedelta(seconds=5))
    assert not file.save(replace(TRUST, age=timedelta(seconds=9)), wall=WALL), "alike, and older"
    assert file.save(TRUST, wall=WALL + timedelta(seconds=1)), "alike, and fresher"
    assert file.save(TRUST, wall=WALL - timedelta(hours=1)), "what is there is from the future"
    later = replace(position, epoch=position.epoch + 1, generation=1, revocation_version=1)
    assert file.save(replace(TRUST, position=later), wall=WALL)
    assert later == file.load(wall=WALL, max_age=BUDGET).position


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777, 0o770])
def test_a_directory_that_others_may_open_is_refused_with_the_remedy(mode: int, tmp_path: Path):
    """Whoever can write there chooses whom the service believes."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(mode)
    with pytest.raises(
        ConfigError, match=f"with mode {mode:o}: it must belong to user {os.geteuid()} alone, run chmod"
    ):
        state_file(tmp_path)


def test_a_directory_that_is_none_is_refused(tmp_path: Path):
    """A file, a link, a place that does not exist."""
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        state_file(tmp_path)
    (tmp_path / "state").unlink()
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "state").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="cannot be opened"):
        state_file(tmp_path)
    with pytest.raises(ConfigError, match="cannot be made"):
        StateFile(tmp_path / "no" / "state", issuer=ISSUER, audience="payments")


@pytest.mark.parametrize("kind", ["open to others", "a link", "a pipe"])
def test_a_file_that_others_could_have_made_is_not_read(kind: str, tmp_path: Path):
    """Readable by others, a link elsewhere, a pipe that would block."""
    file = state_file(tmp_path)
    file.save(TRUST, wall=WALL)
    match kind:
        case "open to others":
            file.path.chmod(0o640)
        case "a link":
            file.path.rename(tmp_path / "elsewhere")
            file.path.symlink_to(tmp_path / "elsewhere")
        case _:
            file.path.unlink()
            os.mkfifo(file.path, 0o600)
    with pytest.raises(StateFileError):
        file.load(wall=WALL, max_age=BUDGET)


def test_a_keeper_writes_a_new_position_at_once_and_the_same_now_and_then(tmp_path: Path):
    """A change soon after another waits a moment, unless it is the last."""
    file = state_file(tmp_path)
    keeper = StateKeeper(file, every=timedelta(hours=1))
    assert not keeper.is_due(None)
    assert keeper.is_due(TRUST.position)
    keeper.write(TRUST, wall=WALL)
    assert not keeper.is_due(TRUST.position)
    assert not keeper.is_due(TRUST.position, last=True)
    newer = replace(TRUST.position, revocation_version=9)
    assert (False, True) == (keeper.is_due(newer), keeper.is_due(newer, last=True))


def test_a_file_that_cannot_be_written_is_said_once_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The verifier goes on without: its directory may come back."""
    file = state_file(tmp_path)
    keeper = StateKeeper(file, every=timedelta(hours=1))
    file.path.parent.rmdir()
    keeper.write(TRUST, wall=WALL)
    keeper.write(TRUST, wall=WALL)
    assert 1 == caplog.text.count("cannot be kept for the next start")
    file.path.parent.mkdir(mode=0o700)
    keeper.write(TRUST, wall=WALL)
    assert TRUST.position == file.load(wall=WALL, max_age=BUDGET).position
